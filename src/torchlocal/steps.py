"""How a network learns from one batch: the local step and the guided step.

Both leave the gradients in ``.grad``, as ``loss.backward()`` would, for any optimizer. Neither reads a value back from
the device.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Protocol

import torch
from torch import Tensor
from torch.utils._pytree import tree_flatten, tree_unflatten

from .recompute import Plan, Recomputation
from .rules import Batch

if TYPE_CHECKING:
    from .network import DecoupledNetwork
    from .schedule import GuidedPlan

__all__ = ["guided_step", "local_step"]


class SupportsStep(Protocol):
    """What a step needs of an optimizer."""

    def step(self) -> Any: ...

    def zero_grad(self) -> Any: ...


def local_step(
    net: DecoupledNetwork,
    x: Tensor,
    target: Any,
    *,
    recompute: str | dict[int, Plan] | None = None,
    autocast: torch.dtype | None = None,
    backward: Callable[[Tensor], Any] | None = None,
    scale: float = 1.0,
    optimizers: Sequence[SupportsStep] | None = None,
) -> list[Tensor]:
    """Train every local module on its own loss: forward, local loss, backward at once, detach, next module.

    One module's activations live at a time (Belilovsky et al., ICML 2020, algorithm 1, run in sequence).

    Args:
        net: the decoupled network.
        x: input batch (N, ...).
        target: whatever the criterion takes, for cross-entropy class indices (N,) or probabilities (N, C).
        recompute: ``"largest"``: recompute inside the local modules that take most, as far as that lowers the peak; the
            results stay the same, bit for bit.
        autocast: run forward passes in this dtype, for example ``torch.bfloat16``.
        backward: called with each loss instead of ``loss.backward()``, for example
            ``lambda loss: scaler.scale(loss).backward()`` or ``fabric.backward``.
        scale: factor on every loss before backward; ``1 / n`` accumulates the mean gradient of n batches.
        optimizers: one per local module (see :meth:`DecoupledNetwork.module_parameters`); each is stepped, and its
            gradients freed, right after the backward pass of its module.

    Returns:
        The K losses, detached 0-dim tensors; the last is the global loss.

    Raises:
        ValueError: the batch is empty or not a tensor, or the number of optimizers is not K.
    """
    check_arguments(net, x, target, optimizers)
    run = Run(net, Batch(input=x, target=target, criterion=net.criterion), autocast, backward, scale)
    net.chain.refresh(x.device)
    plans = net.local_plans(x, target, recompute, autocast=autocast)
    features = x
    losses = []
    for k in range(net.num_modules):
        loss, features = run.local(k, plans.get(k), [features])
        losses.append(loss)
        if optimizers is not None:
            apply(optimizers[k])
    return losses


def guided_step(
    net: DecoupledNetwork,
    x: Tensor,
    target: Any,
    *,
    auxiliary: str = "follow",
    recompute: str | int | None = None,
    memory: str | int | GuidedPlan | None = None,
    autocast: torch.dtype | None = None,
    backward: Callable[[Tensor], Any] | None = None,
    scale: float = 1.0,
    optimizers: Sequence[SupportsStep] | None = None,
) -> list[Tensor]:
    """Train the network on the global loss, with gradients through all modules.

    Args:
        net: the decoupled network.
        x: input batch (N, ...).
        target: whatever the criterion takes.
        auxiliary: ``"follow"``: the auxiliary networks learn too, from their own loss on detached features, which
            leaves the backbone's gradients untouched; ``"frozen"``: they are left alone, and go stale.
        recompute: run the forward pass twice to keep the activations of one segment at a time (Chen et al., "Training
            Deep Nets with Sublinear Memory Cost", 2016): ``"modules"`` takes the local modules as segments, a number
            cuts the units into that many, balanced by activation bytes. Parameters and buffers come out bit for bit as
            without, dropout and BatchNorm statistics included.
        memory: instead of ``recompute``, lets a search choose what is recomputed, once per shape of batch: ``"local"``:
            the cheapest way whose predicted peak is not above the local step's, the batch cut into micro-batches where
            it takes that (BatchNorm then sees these; a mean criterion is assumed); ``"exact"``: the smallest peak
            without micro-batches, that is bit for bit the plain guided step; ``"full"``: nothing is recomputed.
        autocast: run forward passes in this dtype.
        backward: called with each loss instead of ``loss.backward()``.
        scale: factor on every loss before backward.
        optimizers: one per local module; each is stepped, and its gradients freed, as soon as its module's gradients
            are complete.

    Returns:
        Detached 0-dim losses, the last one global: K of them when the auxiliary networks follow, else one.

    Raises:
        ValueError: an option is unknown, the batch is empty, or the number of optimizers is not K.
    """
    check_arguments(net, x, target, optimizers)
    if auxiliary not in ("follow", "frozen"):
        raise ValueError(f"auxiliary: must be 'follow' or 'frozen', not {auxiliary!r}")
    plan = net.guided_plan(
        x, target, auxiliary=auxiliary, recompute=recompute, memory=memory, autocast=autocast, optimizers=optimizers
    )
    parts = split_batch(x, target, plan.micro_batches)
    total: list[Tensor] = []
    for i, (part, labels) in enumerate(parts):
        share = part.shape[0] / x.shape[0]
        run = Run(net, Batch(input=part, target=labels, criterion=net.criterion), autocast, backward, scale * share)
        run.optimizers = optimizers if i == len(parts) - 1 else None
        losses = _guided(run, plan.tree, follow=auxiliary == "follow", whole=len(parts) == 1)
        if share != 1:
            losses = [loss * share for loss in losses]
        total = [a + b for a, b in zip(total, losses, strict=True)] if total else losses
    return total


def _guided(run: Run, plan: Plan, *, follow: bool, whole: bool) -> list[Tensor]:
    net, x, optimizers = run.net, run.batch.input, run.optimizers
    net.chain.refresh(x.device)
    losses: list[Tensor] = []
    ends = {group.stop: k for k, group in enumerate(net.partition.groups[:-1])} if follow else {}
    waiting = [group.start for group in net.partition.groups]

    def passed(unit: int, state: tuple[Any, ...]) -> None:
        if unit in ends:
            losses.append(run.follow(ends[unit], state[0]))
            if optimizers is not None and whole:  # it finds the gradients of the auxiliary network, and no others yet
                apply(optimizers[ends[unit]])

    def learn(outputs: list[Any]) -> list[Tensor | None]:
        loss, gradient = run.learn(net.num_modules - 1, outputs)
        losses.append(loss)
        return [gradient]

    def done(unit: int) -> None:
        while optimizers is not None and waiting and waiting[-1] >= unit:
            waiting.pop()
            apply(optimizers[len(waiting)])

    recomputation = Recomputation(net.chain, x, context=run.autocast, stops=frozenset(ends), passed=passed, done=done)
    recomputation.run(plan, [x.detach()], learn)
    return losses


def split_batch(x: Tensor, target: Any, num_parts: int) -> list[tuple[Tensor, Any]]:
    """A batch and its target in parts as equal as can be; tensors of the target that have a row per example are cut.

    Raises:
        ValueError: the batch has fewer examples, or no tensor of the target has a row per example.
    """
    if num_parts == 1:
        return [(x, target)]
    if x.shape[0] < num_parts:
        raise ValueError(f"micro_batches: {x.shape[0]} examples cannot be cut into {num_parts} parts; ask for fewer")
    leaves, structure = tree_flatten(target)
    rows = [isinstance(leaf, Tensor) and leaf.ndim > 0 and leaf.shape[0] == x.shape[0] for leaf in leaves]
    if not any(rows):
        raise ValueError(
            f"micro_batches: the target has no row for each of the {x.shape[0]} examples, so it cannot be cut into "
            "parts; use a memory mode without micro-batches, 'exact' or 'full'"
        )
    cut = [leaf.tensor_split(num_parts) if r else [leaf] * num_parts for leaf, r in zip(leaves, rows, strict=True)]
    parts = zip(x.tensor_split(num_parts), *cut, strict=True)
    return [(part, tree_unflatten(list(labels), structure)) for part, *labels in parts]


@dataclass
class Run:
    """One step's options, and the few things that both steps do."""

    net: DecoupledNetwork
    batch: Batch
    dtype: torch.dtype | None = None
    backward_with: Callable[[Tensor], Any] | None = None
    scale: float = 1.0
    optimizers: Sequence[SupportsStep] | None = None

    def autocast(self) -> AbstractContextManager[Any]:
        # Entered anew for every piece: leaving it drops the cached casts, which hold a graph, or none when recomputing.
        if self.dtype is None:
            return nullcontext()
        return torch.autocast(self.batch.input.device.type, dtype=self.dtype)

    def loss(self, k: int, features: Tensor) -> Tensor:
        """Local loss of module ``k``, for the last module the global loss."""
        if k == self.net.num_modules - 1:
            return self.batch.criterion(features, self.batch.target)
        return self.net.rule.loss(self.net.sites[k], self.net.auxiliary[k], features, self.batch)

    def backward(self, loss: Tensor) -> None:
        if not loss.requires_grad:  # a module with nothing to train
            return
        if self.scale != 1.0:
            loss = loss * self.scale
        if self.backward_with is None:
            loss.backward()
        else:
            self.backward_with(loss)

    def follow(self, k: int, features: Tensor) -> Tensor:
        """Train the auxiliary network of module ``k`` alone."""
        with torch.enable_grad():
            with self.autocast():
                loss = self.loss(k, features.detach())
            self.backward(loss)
        return loss.detach()

    def local(self, k: int, plan: Plan | None, state: list[Tensor]) -> tuple[Tensor, Tensor]:
        """Local step of module ``k``, by a plan where one is given: its loss, and the features that it hands on."""
        if plan is None:
            group = self.net.partition.groups[k]
            with self.autocast():
                (features,) = self.net.chain.run(group.start, group.stop, state)
                loss = self.loss(k, features)
            features = features.detach()
            self.backward(loss)
            return loss.detach(), features
        kept: list[Tensor] = []

        def learn(outputs: list[Any]) -> list[Tensor | None]:
            features: Tensor = outputs[0].detach()  # a tensor of its own: learn() asks for the other's gradient
            loss, gradient = self.learn(k, outputs)
            kept.extend((loss, features))
            return [gradient]

        Recomputation(self.net.chain, self.batch.input, context=self.autocast).run(plan, list(state), learn)
        loss, features = kept
        return loss, features

    def learn(self, k: int, outputs: list[Any]) -> tuple[Tensor, Tensor | None]:
        """Loss of module ``k`` on its output alone, which is taken out of its list, and the gradient of the output."""
        features = outputs.pop().requires_grad_()
        with torch.enable_grad():
            with self.autocast():
                loss = self.loss(k, features)
            self.backward(loss)
        return loss.detach(), features.grad


def apply(optimizer: SupportsStep) -> None:
    """Update, and free the gradients."""
    optimizer.step()
    optimizer.zero_grad()


def check_arguments(net: DecoupledNetwork, x: Tensor, target: Any, optimizers: Sequence[SupportsStep] | None) -> None:
    """Refuse a batch that does not fit the network, and a wrong number of optimizers."""
    if not isinstance(x, Tensor):
        raise ValueError(f"x: must be a tensor of shape (N, ...), not {type(x).__name__}")
    expected = net.input_shape
    if x.ndim != len(expected) or x.shape[0] == 0:
        raise ValueError(
            f"x: a batch of shape {tuple(x.shape)} does not fit; the network was decoupled with (N, "
            f"{', '.join(str(n) for n in expected[1:])}), N at least 1"
        )
    if isinstance(target, Tensor) and target.ndim and target.shape[0] != x.shape[0]:
        raise ValueError(f"target: it has {target.shape[0]} rows, but the batch has {x.shape[0]}; they must be equal")
    if optimizers is not None and len(optimizers) != net.num_modules:
        raise ValueError(
            f"optimizers: {len(optimizers)} given for {net.num_modules} local modules; make one for each list of "
            "parameters that module_parameters() returns"
        )
