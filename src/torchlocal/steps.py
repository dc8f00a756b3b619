"""How a network learns from one batch: the local step and the guided step.

Both leave the gradients in ``.grad``, as ``loss.backward()`` would, for any optimizer. Neither reads a value back from
the device.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Protocol

import torch
from torch import Tensor
from torch.utils.checkpoint import get_device_states, set_device_states

from .rules import Batch

if TYPE_CHECKING:
    from .network import DecoupledNetwork

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
    _check(net, x, target, optimizers)
    run = _Run(net, Batch(input=x, target=target, criterion=net.criterion), autocast, backward, scale)
    net.chain.refresh(x.device)
    features = x
    losses = []
    for k, group in enumerate(net.partition.groups):
        with run.autocast():
            features = net.chain.segment(group.start, group.stop)(features)
            loss = run.loss(k, features)
        features = features.detach()
        run.backward(loss)
        losses.append(loss.detach())
        del loss  # with it goes the module's graph, before the next module runs
        if optimizers is not None:
            _apply(optimizers[k])
    return losses


def guided_step(
    net: DecoupledNetwork,
    x: Tensor,
    target: Any,
    *,
    auxiliary: str = "follow",
    recompute: str | int | None = None,
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
    _check(net, x, target, optimizers)
    if auxiliary not in ("follow", "frozen"):
        raise ValueError(f"auxiliary: must be 'follow' or 'frozen', not {auxiliary!r}")
    segments = net.recompute_segments(recompute)
    run = _Run(net, Batch(input=x, target=target, criterion=net.criterion), autocast, backward, scale)
    net.chain.refresh(x.device)
    losses: list[Tensor] = []
    follow = (lambda k, features: losses.append(run.follow(k, features))) if auxiliary == "follow" else None

    # Forward once without a graph, keeping what starts each segment; the last segment keeps its graph at once.
    starts: list[_Start] = []
    features = x
    for segment in segments[:-1]:
        pieces = net.pieces(segment)
        start = _Start(features, [holder[name].clone() for holder, name in _buffers(net, pieces)], [])
        with torch.no_grad():
            features = run.forward(pieces, features, follow, start.random)
        starts.append(start)
    features = features.detach().requires_grad_(len(segments) > 1)
    with run.autocast():
        output = run.forward(net.pieces(segments[-1]), features, follow)
        loss = net.criterion(output, target)
    run.backward(loss)
    losses.append(loss.detach())
    del loss, output
    if len(segments) == 1:
        for optimizer in optimizers or []:
            _apply(optimizer)
        return losses

    waiting = len(net.partition.groups)
    with _random_state_kept(x):
        for i, segment in reversed(list(enumerate(segments))):
            if i < len(segments) - 1:
                gradient = features.grad
                start, pieces = starts.pop(), net.pieces(segment)
                features = start.features.detach().requires_grad_(i > 0)
                with _swapped(_buffers(net, pieces), start.buffers), run.autocast():
                    output = run.forward(pieces, features, random=start.random, replay=True)
                torch.autograd.backward(output, gradient)
                del output, gradient, start
            while optimizers is not None and waiting and net.partition.groups[waiting - 1].start >= segment.start:
                waiting -= 1
                _apply(optimizers[waiting])
    return losses


@dataclass
class _Start:
    """What a segment starts from: its input, the buffers that it writes, and the random state of each piece."""

    features: Tensor
    buffers: list[Tensor]
    random: list[_RandomState]


@dataclass
class _RandomState:
    cpu: Tensor
    devices: tuple[list[int], list[Tensor]]

    @classmethod
    def get(cls, x: Tensor) -> _RandomState:
        return cls(torch.get_rng_state(), get_device_states(x))

    def set(self) -> None:
        torch.set_rng_state(self.cpu)
        set_device_states(*self.devices)


@contextmanager
def _random_state_kept(x: Tensor) -> Iterator[None]:
    state = _RandomState.get(x)
    try:
        yield
    finally:
        state.set()


def _buffers(net: DecoupledNetwork, pieces: list[tuple[range, int | None]]) -> list[tuple[dict[str, Any], str]]:
    return [b for units, _ in pieces for b in net.chain.mutated_buffers(units.start, units.stop)]


@contextmanager
def _swapped(buffers: list[tuple[dict[str, Any], str]], tensors: list[Tensor]) -> Iterator[None]:
    """Let the segment write ``tensors`` instead of its buffers, which hold the first pass's result already."""
    kept = [holder[name] for holder, name in buffers]
    for (holder, name), tensor in zip(buffers, tensors, strict=True):
        holder[name] = tensor
    try:
        yield
    finally:
        for (holder, name), tensor in zip(buffers, kept, strict=True):
            holder[name] = tensor


@dataclass
class _Run:
    """One step's options, and the few things that both steps do."""

    net: DecoupledNetwork
    batch: Batch
    dtype: torch.dtype | None
    backward_with: Callable[[Tensor], Any] | None
    scale: float

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

    def forward(
        self,
        pieces: list[tuple[range, int | None]],
        features: Tensor,
        at_end: Callable[[int, Tensor], None] | None = None,
        random: list[_RandomState] | None = None,
        replay: bool = False,
    ) -> Tensor:
        """Run the pieces of a segment, noting in ``random`` the state before each, or replaying it from there."""
        for i, (units, k) in enumerate(pieces):
            if random is not None:
                if replay:
                    random[i].set()
                else:
                    random.append(_RandomState.get(self.batch.input))
            with self.autocast():
                features = self.net.chain.segment(units.start, units.stop)(features)
            if k is not None and at_end is not None:
                at_end(k, features)
        return features


def _apply(optimizer: SupportsStep) -> None:
    optimizer.step()
    optimizer.zero_grad()


def _check(net: DecoupledNetwork, x: Tensor, target: Any, optimizers: Sequence[SupportsStep] | None) -> None:
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
