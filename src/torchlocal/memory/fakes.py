"""A network and a batch without memory, on which the engine runs as it is, and everything is counted."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, replace
from typing import Any, TypeAlias

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_iter, tree_map_only

from ..cut.batches import Batch, describe, device_of, num_examples, plain, same_layout
from ..cut.intercept import eagerly
from ..cut.observe import fake_batch, fake_twins
from ..cut.untouched import swapped
from ..engine import follows, run_guided, run_local
from ..micro import cut_batch
from ..modules import LocalModules
from ..recompute import GuidedPlan, Plan, RandomState
from ..rules import Batch as StepBatch
from ..rules import Rule, Site
from .counter import PeakCounter

__all__ = ["FakeStep", "MakesOptimizer", "Prediction"]

MakesOptimizer: TypeAlias = Callable[[Iterable[nn.Parameter]], torch.optim.Optimizer]


@dataclass(frozen=True, kw_only=True)
class Prediction:
    """What a step takes at its peak, in bytes.

    Attributes:
        peak_bytes: beyond what exists before the step; what :func:`measure` measures.
        resident_bytes: what exists before the step: parameters, buffers, optimizer state and the batch.
        breakdown: both together at the peak, by ``LABELS``: "parameters" (with buffers), "gradients", "optimizer",
            "boundaries" (the batch, and what one module or segment hands to the next), "auxiliary" (parameters,
            gradients and activations of the auxiliary networks), "activations" (the rest, gradients of activations
            among it). Workspace inside kernels is not included.
        flops: floating-point operations of the step (matrix products and convolutions).
        step_bytes: ``peak_bytes`` before the optimizer's update.
    """

    peak_bytes: int
    resident_bytes: int
    breakdown: dict[str, int]
    flops: int
    step_bytes: int

    @property
    def total_bytes(self) -> int:
        """Everything that is alive at the peak."""
        return self.resident_bytes + self.peak_bytes


class FakeStep:
    """A network and a batch without memory, to be stepped and counted; the network is as it was at any other time.

    Args:
        net: the network.
        batch: see :func:`torchlocal.memory.predict`.
        target: see :func:`torchlocal.memory.predict`.
        optimizer: see :func:`torchlocal.memory.predict`.
    """

    def __init__(
        self,
        net: LocalModules,
        batch: Batch | Sequence[int] | None = None,
        target: Any = None,
        *,
        optimizer: MakesOptimizer | None = None,
    ) -> None:
        self.net, self.mode, self._optimizer = net, net.chain.mode, optimizer
        self._counted: dict[tuple[Any, ...], Prediction] = {}
        if not net.chain.facts.fake:
            raise ValueError(
                f"memory: {type(net.backbone).__name__} does not run on tensors without values "
                f"({net.chain.facts.reason}), so what it takes cannot be predicted, nor a plan be found; measure a "
                "step instead (torchlocal.memory.measure), or leave memory out"
            )
        self.given = self._layout(net, batch)
        self.device = device_of(self.given, net.backbone)
        self._twins = fake_twins(net, self.mode, learn=False, known=net.chain.twins)
        self._depth = 0
        self.batch = fake_batch(self.given, self.mode)
        with self.active():
            self.target = self._target(target)

    @staticmethod
    def _layout(net: LocalModules, batch: Any) -> Batch:
        if batch is None:
            return net.sample
        if isinstance(batch, (tuple, list)) and batch and all(isinstance(n, int) for n in batch):
            shape = tuple(batch)
            expected = tuple(net.sample.shape) if isinstance(net.sample, Tensor) else ()
            if len(shape) != len(expected) or min(shape) < 1:
                wanted = ", ".join(str(n) for n in expected[1:]) if expected else "…"
                raise ValueError(f"batch: must be a batch of shape (N, {wanted}), or that shape, not {shape}")
            if not net.sample.is_floating_point():
                return torch.zeros(shape, dtype=net.sample.dtype, device=net.sample.device)
            return torch.zeros(1, dtype=net.sample.dtype, device=net.sample.device).expand(shape)
        batch = plain(batch)
        if not same_layout(batch, net.sample):
            raise ValueError(
                f"batch: must be like {describe(net.sample)}, of which the number of examples may differ, "
                f"not {describe(batch)}"
            )
        return batch

    @contextlib.contextmanager
    def active(self) -> Iterator[None]:
        """Have the network hold fake tensors for a while, and put everything back."""
        chain = self.net.chain
        if self._depth:
            yield
            return
        state, before = RandomState.get(self.device), chain.fake
        self._depth, chain.fake = 1, True
        try:
            with eagerly(self.net), swapped(self.net, self._twins), torch.enable_grad():
                yield
        finally:
            self._depth, chain.fake = 0, before
            state.set()

    def local(
        self,
        plans: dict[int, Plan],
        *,
        autocast: torch.dtype | None,
        optimizers: object = None,
    ) -> Prediction:
        """Take a local step, and count; ``plans``: by module, what is recomputed."""
        net = self.net
        if not plans and net.num_modules > 2:
            net.chain.expected(self.given, tuple(g.stop for g in net.partition.groups[:-1]))  # outside of the counting

        def step(each: list[Any] | None, counter: PeakCounter) -> float:
            run_local(net, self.batch, self.target, plans, autocast=autocast, optimizers=each)
            return 1.0

        return self._count(("local", *plans.items(), autocast), step, optimizers)

    def guided(
        self,
        plan: GuidedPlan,
        *,
        auxiliary: str,
        autocast: torch.dtype | None,
        optimizers: object = None,
    ) -> Prediction:
        """Take a guided step by a plan, and count."""
        net, follow = self.net, follows(self.net, auxiliary)

        def step(each: list[Any] | None, counter: PeakCounter) -> float:
            fewer, batch, target = self._fewer_parts(plan, 1 if each is None else 3)
            if plan.micro_batches > fewer.micro_batches == 1:
                self._add_gradients(counter, auxiliary=follow)
            parts = cut_batch(net, batch, target, fewer.micro_batches, follow=follow)
            run_guided(net, fewer, parts, auxiliary=auxiliary, autocast=autocast, optimizers=each)
            return num_examples(self.batch) / num_examples(batch)

        return self._count(("guided", plan.tree, plan.micro_batches, auxiliary, autocast), step, optimizers)

    def plain(self, autocast: torch.dtype | None) -> Prediction:
        """Take an ordinary step of the backbone, and count."""

        def step(each: list[Any] | None, counter: PeakCounter) -> float:
            with self.autocast(autocast):
                loss = self.net.criterion(self.net.chain.call(self.batch), self.target)
            loss.backward()
            return 1.0

        return self._count(("plain", autocast), step, None)

    def _count(
        self, what: tuple[Any, ...], step: Callable[[list[Any] | None, PeakCounter], float], optimizers: object
    ) -> Prediction:
        """Take a step on fake tensors, once; it is given the optimizers, and returns by how much its FLOPs are too few.

        Args:
            what: tells the step from others.
            step: takes it.
            optimizers: see :func:`torchlocal.memory.predict`.
        """
        key = (*what, optimizers is None)
        if key not in self._counted:
            self._counted[key] = self._taken(step, optimizers)
        return self._counted[key]

    def _taken(self, step: Callable[[list[Any] | None, PeakCounter], float], optimizers: object) -> Prediction:
        net, kernels = self.net, self.net.chain.kernels
        with self.active():
            self.clear()
            groups = [list(net.parameters())] if optimizers is None else net.module_parameters()
            states: list[torch.optim.Optimizer] = []
            if self._optimizer is not None:
                with PeakCounter(kernels=kernels):  # which makes it quick
                    states = [_with_state(self._optimizer(group)) for group in groups]
            each: list[Any] | None = None if optimizers is None else states or [_Free(group) for group in groups]
            counter = PeakCounter(self._resident(states), kernels=kernels, flops=True)
            with counter, self._labels(counter):
                parts = step(each, counter)
                step_bytes = counter.peak
                if optimizers is None and states:
                    with counter.labelling("optimizer"):
                        states[0].step()
            self.clear()
        return Prediction(
            peak_bytes=counter.peak,
            resident_bytes=counter.resident,
            breakdown=counter.breakdown,
            flops=round(counter.flops * parts),
            step_bytes=step_bytes,
        )

    def clear(self) -> None:
        """Let go of all gradients."""
        for tensor in self._twins.values():
            tensor.grad = None

    def _fewer_parts(self, plan: GuidedPlan, most: int) -> tuple[GuidedPlan, Batch, Any]:
        """The plan with at most so many micro-batches, and the part of the batch that these are.

        One does for all where the gradients of those before are there already; with an optimizer per module there are
        a first, some in the middle and a last one, after which gradients are freed.
        """
        count = num_examples(self.batch)
        rows = most * -(-count // plan.micro_batches)
        if plan.micro_batches <= most or rows > count:
            return plan, self.batch, self.target

        def first(tensor: Tensor) -> Tensor:
            return tensor[:rows] if tensor.ndim and tensor.shape[0] == count else tensor

        parts = [tree_map_only(Tensor, first, value) for value in (self.batch, self.target)]
        target = self.target[:rows] if isinstance(self.target, list) else parts[1]
        return replace(plan, micro_batches=most), parts[0], target

    def _add_gradients(self, counter: PeakCounter, *, auxiliary: bool) -> None:
        """Gradients as an earlier micro-batch leaves them."""
        chain = self.net.chain
        used = chain.parameters(0, chain.num_units)
        for label, parameters in (("gradients", used), ("auxiliary", list(self.net.auxiliary.parameters()))):
            with counter.labelling(label):
                for parameter in parameters:
                    if parameter.requires_grad and (auxiliary or label == "gradients"):
                        parameter.grad = torch.empty_like(parameter)

    def autocast(self, dtype: torch.dtype | None) -> contextlib.AbstractContextManager[Any]:
        """The autocast of a step."""
        return contextlib.nullcontext() if dtype is None else torch.autocast(self.device.type, dtype=dtype)

    def _resident(self, states: Sequence[torch.optim.Optimizer]) -> dict[str, list[Tensor]]:
        backbone, auxiliary = self.net.backbone, self.net.auxiliary
        return {
            "parameters": [*backbone.parameters(), *backbone.buffers()],
            "auxiliary": [*auxiliary.parameters(), *auxiliary.buffers()],
            "optimizer": [t for s in states for t in tree_iter(list(s.state.values())) if isinstance(t, Tensor)],
            "boundaries": [t for t in tree_iter((self.batch, self.target)) if isinstance(t, Tensor)],
        }

    def _target(self, target: Any) -> Any:
        if target is not None:
            return fake_batch(target, self.mode)
        known = self.net.chain.measured(self.given, "target")
        if not known or known["criterion"] is not self.net.criterion:
            known |= {"criterion": self.net.criterion, "target": self._guessed()}
        return known["target"]

    def _guessed(self) -> Any:
        """A target that the criterion takes."""
        with PeakCounter(kernels=self.net.chain.kernels), torch.no_grad():
            output = self.net.chain.call(self.batch)
            shapes = [output.shape[:1], output.shape[:-1], (output.shape[0], *output.shape[2:])]
            guesses = [torch.zeros(shape, dtype=torch.int64, device=output.device) for shape in dict.fromkeys(shapes)]
            reason = ""
            for guess in (*guesses, torch.empty_like(output)):
                try:
                    self.net.criterion(output, guess)
                    return guess
                except Exception as error:
                    reason = reason or str(error).strip().split("\n")[0]
        raise ValueError(
            f"target: the criterion takes neither class indices (N,) nor a tensor like the output ({reason}); give one"
        )

    @contextlib.contextmanager
    def _labels(self, counter: PeakCounter) -> Iterator[None]:
        """Have the network tell the counter what it makes."""
        net, rule, chain = self.net, self.net.rule, self.net.chain

        def hook(label: str) -> Callable[[Tensor], None]:
            return lambda parameter: counter.relabel(parameter.grad, label) if parameter.grad is not None else None

        handles = [
            parameter.register_post_accumulate_grad_hook(hook(label))
            for label, module in (("gradients", net.backbone), ("auxiliary", net.auxiliary))
            for parameter in module.parameters()
            if parameter.requires_grad
        ]
        net.rule, chain.watch = _LabellingRule(rule, counter), lambda features: counter.relabel(features, "boundaries")
        try:
            yield
        finally:
            net.rule, chain.watch = rule, None
            for handle in handles:
                handle.remove()


class _LabellingRule(Rule):
    """A rule whose losses are counted as the auxiliary networks'."""

    def __init__(self, rule: Rule, counter: PeakCounter) -> None:
        self._rule, self._counter = rule, counter
        self.reads_embedding = rule.reads_embedding  # type: ignore[misc]

    def loss(self, site: Site, auxiliary: nn.Module, features: Tensor, batch: StepBatch) -> Tensor:
        with self._counter.labelling("auxiliary"):
            return self._rule.loss(site, auxiliary, features, batch)


class _Free:
    """Stands in for an optimizer of which only the freeing of gradients counts."""

    def __init__(self, parameters: list[nn.Parameter]) -> None:
        self._parameters = parameters

    def step(self) -> None:
        """Nothing."""

    def zero_grad(self) -> None:
        """Free the gradients."""
        for parameter in self._parameters:
            parameter.grad = None


def _with_state(optimizer: torch.optim.Optimizer) -> torch.optim.Optimizer:
    """``optimizer`` with the state that it makes in its first step."""
    for group in optimizer.param_groups:
        for parameter in group["params"]:
            parameter.grad = torch.empty_like(parameter)
    optimizer.step()
    optimizer.zero_grad()
    return optimizer
