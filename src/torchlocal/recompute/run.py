"""Carries a plan out: forward and backward through a chain of stages, some of which run twice."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from contextlib import AbstractContextManager, nullcontext
from functools import partial
from typing import Any, Protocol, TypeAlias

import torch
from torch import Tensor

from ..boundary import rounded
from .plan import Inner, Keep, Plan, Tape, leaves, recomputes
from .state import RandomState, keeping_nothing, without_autocast

__all__ = ["Recomputation", "Stages"]


class Replaying(Protocol):
    """Has parts of a chain run a second time from what they started from."""

    def replaying(self, first: int, last: int, *, new: bool, again: bool) -> AbstractContextManager[None]:
        """Entered around a run of stages ``first`` to ``last - 1``.

        Args:
            first: the first stage.
            last: the stage after the last.
            new: they run for the first time; else they start from what they started from then.
            again: they will run again.
        """


class Stages(Protocol):
    """A chain of stages, each of which maps a tuple of values to the next one's."""

    def run(self, first: int, last: int, state: list[Any]) -> tuple[Any, ...]:
        """Run stages ``first`` to ``last - 1``; ``state`` is taken out of its list."""

    def replay(self) -> Replaying:
        """What has them run again, for one step."""

    def inside(self, stage: int, state: list[Any]) -> Stages | None:
        """The chain that one stage is, and its input put into ``state``; None where there is none."""

    def entry_index(self, stage: int) -> int | None:
        """Where in the state before ``stage`` the very input of the chain is still to be found, if anywhere."""


Gradients: TypeAlias = list[Tensor | None]
Following: TypeAlias = Callable[[list[Any]], Gradients]


class Recomputation:
    """Carries a plan out.

    Args:
        stages: the chain.
        device: that the chain runs on.
        context: entered around every forward pass (autocast).
        stops: stages where a run of several has to be interrupted.
        passed: called with the stage and its input whenever the first forward pass has come to it.
        arrived: called with a stage that is watched, the first value of its input, and the gradient of that, as soon
            as it is there.
        watched: the stages, all of them stops.
        done: called with a stage when the gradients of it and of all that follow are complete.
        boundaries: by stage, how what it takes, and its gradient, are rounded.
    """

    def __init__(
        self,
        stages: Stages,
        device: torch.device,
        *,
        context: Callable[[], AbstractContextManager[Any]],
        stops: frozenset[int] = frozenset(),
        passed: Callable[[int, tuple[Any, ...]], None] | None = None,
        arrived: Callable[[int, Tensor, Tensor | None], None] | None = None,
        watched: frozenset[int] = frozenset(),
        done: Callable[[int], None] | None = None,
        boundaries: Mapping[int, str] | None = None,
    ) -> None:
        self._stages, self._device, self._context = stages, device, context
        self._boundaries = boundaries or {}
        self._stops, self._passed, self._done = stops | set(self._boundaries), passed, done
        self._arrived, self._watched = arrived, watched
        self._replay = stages.replay()

    def run(
        self,
        plan: Plan,
        state: list[Any],
        then: Following,
        *,
        differentiable: bool = False,
        origin: int | None = None,
    ) -> Gradients:
        """Run forward and backward.

        Args:
            plan: over the whole chain.
            state: what the first stage takes; it is taken out of the list, so that it can be freed.
            then: called with the outputs, returns their gradients.
            differentiable: whether gradients with respect to the chain's input are wanted.
            origin: the stage that the input of the chain comes in at, if not the plan's first.

        Returns:
            The gradients of ``state``.
        """
        self._stops |= {stop for leaf in leaves(plan) for stop in (leaf.first, leaf.last)}
        self._origin, self._differentiable = plan.first if origin is None else origin, differentiable
        if not recomputes(plan):
            return self._run(plan, state, then, new=True)
        after: list[RandomState] = []

        def finish(outputs: list[Any]) -> Gradients:
            gradients = then(outputs)
            after.append(RandomState.get(self._device, numpy=False))
            return gradients

        try:
            return self._run(plan, state, finish, new=True)
        finally:
            for random in after:
                random.set()

    def _run(self, plan: Plan, state: list[Any], then: Following, *, new: bool) -> Gradients:
        if isinstance(plan, Tape):
            return self._tape(plan, state, then, new=new)
        if isinstance(plan, Inner):
            return self._inner(plan, state, then, new=new)
        if isinstance(plan, Keep):
            right = plan.right
            return self._tape(plan.left, state, lambda outputs: self._run(right, outputs, then, new=new), new=new)
        kept = list(state)
        wanted = self.wanted(plan.left.first, len(state))
        # In place: the caller's list would keep what it holds alive.
        state[:] = [_asking(value) if w else value for value, w in zip(state, wanted, strict=True)]
        outputs = self._forward(plan.left.first, plan.left.last, state, new=new, again=True)
        outputs = [o.detach() if isinstance(o, Tensor) else o for o in outputs]
        gradients = self._run(plan.right, outputs, then, new=new)
        return self._run(plan.left, kept, lambda outputs: _take(outputs, gradients), new=False)

    def _tape(self, tape: Tape, state: list[Any], then: Following, *, new: bool) -> Gradients:
        arrived: Gradients = []
        state = _enter(state, arrived, self.wanted(tape.first, len(state)))
        outputs = self._forward(tape.first, tape.last, state, new=new)
        handed: Gradients = []
        detached = [o.detach() if isinstance(o, Tensor) else o for o in outputs]
        root = _hand(outputs, handed)
        del outputs[:]
        handed += self._followed(tape.last, detached, then)
        detached.clear()
        if root is not None:
            with without_autocast(self._device):
                root.backward()
        if self._done is not None:
            self._done(tape.first)
        return arrived

    def _inner(self, inner: Inner, state: list[Any], then: Following, *, new: bool) -> Gradients:
        count = len(state)
        stages = self._stages.inside(inner.first, state)
        if stages is None:  # its trace is not right any more
            return self._tape(Tape(inner.first, inner.last), state, then, new=new)
        self._cross(inner.first, state)
        inside = Recomputation(stages, self._device, context=self._context)
        differentiable = self._differentiable or inner.first != self._origin

        def finish(outputs: list[Any]) -> Gradients:
            if new and self._passed is not None:
                self._passed(inner.last, tuple(outputs))
            return self._followed(inner.last, outputs, then)

        with self._replay.replaying(inner.first, inner.last, new=new, again=False):
            gradients = inside.run(inner.plan, state, finish, differentiable=differentiable)
        if self._done is not None:
            self._done(inner.first)
        del gradients[count:]
        self._cross(inner.first, gradients)
        return gradients

    def _followed(self, stage: int, outputs: list[Any], then: Following) -> Gradients:
        """What ``then`` returns; it is told of a stage that is watched."""
        if self._arrived is None or stage not in self._watched:
            return then(outputs)
        first = outputs[0]
        gradients = then(outputs)
        self._arrived(stage, first, gradients[0])
        return gradients

    def wanted(self, stage: int, count: int) -> list[bool]:
        """Which values of the state before a stage need a gradient."""
        if self._differentiable:
            return [True] * count
        entry = self._stages.entry_index(stage)
        return [stage != self._origin and i != entry for i in range(count)]

    def _forward(self, first: int, last: int, state: list[Any], *, new: bool, again: bool = False) -> list[Any]:
        """Run stages, by pieces that no plan of this chain splits; ``again``: they will be run again."""
        stops = [stop for stop in range(first + 1, last) if stop in self._stops] + [last]
        for begin, end in zip([first, *stops], stops, strict=False):
            keeping = keeping_nothing() if again else nullcontext()
            with self._replay.replaying(begin, end, new=new, again=again), keeping, self._context():
                self._cross(begin, state)
                state = list(self._stages.run(begin, end, state))
            if again:
                state = [_asking(value) for value in state]
            elif self._arrived is not None and end in self._watched and end != last:
                state[0].register_hook(partial(self._arrived, end, state[0].detach()))
            if new and self._passed is not None:
                self._passed(end, tuple(state))
        return state

    def _cross(self, stage: int, values: list[Any]) -> None:
        """Round what crosses the boundary before a stage, in its list."""
        if stage in self._boundaries:
            values[:] = [rounded(v, self._boundaries[stage]) if isinstance(v, Tensor) else v for v in values]


def _asking(value: Any) -> Any:
    """A value that asks for a gradient, as it would in an ordinary forward."""
    return value.detach().requires_grad_() if _is_floating(value) else value


def _take(outputs: list[Any], gradients: Gradients) -> Gradients:
    """Let go of recomputed outputs, and hand their gradients on, keeping neither."""
    outputs.clear()
    taken = list(gradients)
    gradients.clear()
    return taken


class _Enter(torch.autograd.Function):
    """Starts a graph from tensors, as a leaf would, but without keeping them."""

    @staticmethod
    def forward(ctx: Any, state: list[Any], arrived: Gradients, wanted: list[bool], _: Tensor) -> tuple[Tensor, ...]:
        ctx.arrived, ctx.wanted = arrived, wanted
        ctx.set_materialize_grads(False)
        return tuple(v.detach() for v, w in zip(state, wanted, strict=True) if w)

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor | None) -> tuple[None, None, None, None]:
        rest = iter(gradients)
        ctx.arrived[:] = [next(rest) if wanted else None for wanted in ctx.wanted]
        return None, None, None, None


def _enter(state: list[Any], arrived: Gradients, wanted: list[bool]) -> list[Any]:
    arrived[:] = [None] * len(state)
    wanted = [w and _is_floating(v) for w, v in zip(wanted, state, strict=True)]
    if any(wanted):
        anchor = torch.empty(0, device=state[wanted.index(True)].device, requires_grad=True)
        entered = iter(_Enter.apply(state, arrived, wanted, anchor))
        state[:] = [next(entered) if w else v for w, v in zip(wanted, state, strict=True)]
    return state


class _Hand(torch.autograd.Function):
    """Ends a graph like a loss, and hands gradients to it without keeping them while backward goes on."""

    @staticmethod
    def forward(ctx: Any, handed: Gradients, wanted: list[int], *outputs: Tensor) -> Tensor:
        ctx.handed, ctx.wanted = handed, wanted
        return outputs[0].new_zeros(())

    @staticmethod
    def backward(ctx: Any, _: Tensor) -> tuple[Tensor | None, ...]:
        gradients = [ctx.handed[i] for i in ctx.wanted]
        ctx.handed.clear()
        return None, None, *gradients


def _hand(outputs: list[Any], handed: Gradients) -> Tensor | None:
    wanted = [i for i, o in enumerate(outputs) if isinstance(o, Tensor) and o.requires_grad]
    if not wanted:  # nothing to train
        return None
    root: Tensor = _Hand.apply(handed, wanted, *(outputs[i] for i in wanted))
    return root


def _is_floating(value: Any) -> bool:
    return isinstance(value, Tensor) and (value.is_floating_point() or value.is_complex())
