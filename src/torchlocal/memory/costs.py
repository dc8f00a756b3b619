"""What the parts of a network take, measured on fake tensors: the numbers that a search for plans starts from."""

from __future__ import annotations

import contextlib
import itertools
from collections.abc import Iterable, Iterator, Sequence
from typing import Any

import torch
from torch import Tensor

from ..cut.forward import Pass
from ..engine import Step
from ..recompute import Plan, Recomputation, Stages, Tape, keeping_nothing
from ..recompute.solver import Alternative, Solver, StageCost
from .counter import PeakCounter
from .fakes import FakeStep

__all__ = ["Bench", "plans_of"]

_MOST_NODES = 14  # of a unit, up to which every range of its nodes is measured
_STEP = 0.9  # from one plan to the next that is tried inside of a unit, in bytes
_LONG_STEP = 0.7  # the same in units of more nodes, where a try takes long


class Bench:
    """Measures parts of a network without memory; parts of the same build are measured once."""

    def __init__(self, fake: FakeStep, autocast: torch.dtype | None) -> None:
        self.fake, self.net, self._autocast = fake, fake.net, autocast
        self.states: list[list[Any]] = [[]]  # before every unit
        self.costs: dict[tuple[int, int], StageCost] = {}
        self._keys: list[tuple[Any, ...]] = []
        chain = self.net.chain
        self._kernels = chain.kernels
        # Networks that are cut at the same points share what their units take.
        self._known = chain.measured(fake.batch, f"{autocast} {self.net.to_read_out}")
        with fake.active():
            self._outputs = chain.outputs(fake.batch)
            for unit in range(chain.num_units):
                state = self.states[-1]
                key = (chain.facts.kinds[unit], *((t.shape, t.stride(), t.dtype) for t in state))
                self._keys.append(key)
                if (key, unit > 0) not in self._known:
                    with self._units() as units:
                        self._known[key, unit > 0] = self._measure(
                            units, unit, unit + 1, state, differentiable=unit > 0
                        )
                self.costs[unit, unit + 1], following = self._known[key, unit > 0]
                self.states.append(following)

    @contextlib.contextmanager
    def _units(self) -> Iterator[Pass]:
        """The units of the network, to be run from any to any."""
        pass_ = Pass(
            self.net.chain, self.fake.batch, replay=True, outputs=self._outputs, to_read_out=self.net.to_read_out
        )
        with pass_.opened():
            yield pass_

    def gradients(self, unit: int) -> int:
        """Bytes of the gradients of a unit's parameters."""
        return _num_bytes(self.net.chain.parameters(unit, unit + 1))

    def auxiliary(self, k: int) -> tuple[int, int]:
        """What training the auxiliary network of module ``k`` alone takes for a moment, and the gradients it leaves."""
        network, features = self.net.auxiliary[k], self.states[self.net.partition.groups[k].stop][0]
        key = "auxiliary", str(network), features.shape, features.stride(), features.dtype
        if key not in self._known:
            with self.fake.active():
                step = self._step()
                if k == 0 and step.reads_embedding:
                    step.run = Pass(self.net.chain, self.fake.batch, embedding=True)
                    with torch.no_grad(), step.run.opened():
                        step.run.run(0, 1, [])
                with PeakCounter(kernels=self._kernels) as counter:
                    step.follow(k, features)
            self.fake.clear()
            self._known[key] = counter.peak, _num_bytes(network.parameters())
        found: tuple[int, int] = self._known[key]
        return found

    def alternatives(self, unit: int, *, differentiable: bool, held: bool = False) -> list[Alternative]:
        """Ways to run a unit that take less than its graph, by falling peak; ``held``: its output stays afterwards."""
        key = "inside", self._keys[unit], differentiable, held
        if key not in self._known:
            with self.fake.active():
                self._known[key] = self._alternatives(unit, differentiable, held)
        found: list[Alternative] = self._known[key]
        return found

    def _alternatives(self, unit: int, differentiable: bool, held: bool) -> list[Alternative]:
        stages = self.net.chain.stages_of(unit, to_read_out=self.net.to_read_out)
        if stages is None:
            return []
        count = stages.num_stages
        costs: dict[tuple[int, int], StageCost] = {}
        states = [self.states[unit] or [self.fake.batch]]
        for first in range(count):
            costs[first, first + 1], following = self._measure(
                stages, first, first + 1, states[-1], base=states[0], differentiable=differentiable, origin=0
            )
            states.append(following)
        if count <= _MOST_NODES:
            for first, last in itertools.combinations(range(count + 1), 2):
                if last > first + 1:
                    tape, backward = self._graph(
                        stages, first, last, states[first], states[last], states[0], differentiable, origin=0
                    )
                    costs[first, last] = StageCost(
                        output=costs[last - 1, last].output, tape=tape, forward=0, backward=backward, flops=0.0
                    )  # only of single stages the forward pass without a graph is asked for
        whole = self._peak(stages, Tape(0, count), states[0], differentiable, held)
        after = [costs[count - 1, count].output if held else 0.0] * count + [0.0]
        solver = Solver(costs, whole, after=after)
        found: list[Alternative] = []
        for plan, recomputed in plans_of(solver, step=_STEP if count <= _MOST_NODES else _LONG_STEP):
            peak = whole if isinstance(plan, Tape) else self._peak(stages, plan, states[0], differentiable, held)
            if peak < min([whole, *(a.peak for a in found)]):
                found.append(Alternative(plan=plan, peak=peak, flops=recomputed))
        return found

    def module_peak(self, k: int, plan: Plan | None) -> tuple[int, int]:
        """Peak of the local step of module ``k`` by itself, beyond its input, and the bytes of gradients it leaves."""
        group = self.net.partition.groups[k]
        with self.fake.active(), PeakCounter(kernels=self._kernels) as counter:
            step = self._step()
            step.outputs = self._outputs
            plan = plan or Tape(group.start, group.stop)
            kept = step.local(range(k, k + 1), {k: plan}, [t.detach() for t in self.states[group.start]])
            del kept
            left = counter.current
        self.fake.clear()
        return counter.peak, left

    def module_key(self, k: int) -> tuple[Any, ...]:
        """The same for modules of the same build."""
        network = str(self.net.auxiliary[k]) if k < self.net.num_modules - 1 else ""
        return k == 0, network, *(self._keys[unit] for unit in self.net.partition.groups[k])

    def _peak(self, stages: Stages, plan: Plan, state: Sequence[Any], differentiable: bool, held: bool) -> int:
        kept: list[Any] = []

        def then(outputs: list[Any]) -> list[Tensor | None]:
            kept.extend(outputs if held else [])
            return _gradients(outputs)

        with PeakCounter(kernels=self._kernels) as counter:
            recomputation = Recomputation(stages, self.fake.device, context=self._context)
            recomputation.run(plan, list(state), then, differentiable=differentiable)
        self.fake.clear()
        return counter.peak

    def _measure(
        self,
        stages: Stages,
        first: int,
        last: int,
        state: Sequence[Any],
        *,
        differentiable: bool,
        base: Sequence[Any] = (),
        origin: int | None = None,
    ) -> tuple[StageCost, list[Any]]:
        """Cost of some stages, and their output; what is in ``base`` is there anyway."""
        with PeakCounter(kernels=self._kernels, flops=True) as counter, keeping_nothing(), self._context():
            result = [_detached(v) for v in stages.run(first, last, list(state))]
        there = {v.untyped_storage()._cdata for v in base if isinstance(v, Tensor)}
        storages = [v.untyped_storage() for v in result if isinstance(v, Tensor)]
        tape, backward = self._graph(stages, first, last, state, result, base, differentiable, origin)
        cost = StageCost(
            output=sum({s._cdata: s.nbytes() for s in storages if s._cdata not in there}.values()),
            tape=tape,
            forward=counter.peak,
            backward=backward,
            flops=counter.flops + counter.peak / 64,  # of two ways with equal FLOPs the one that moves less
        )
        return cost, result

    def _graph(
        self,
        stages: Stages,
        first: int,
        last: int,
        state: Sequence[Any],
        result: Sequence[Any],
        base: Sequence[Any],
        differentiable: bool,
        origin: int | None,
    ) -> tuple[int, int]:
        """Bytes alive after some stages have run forward with a graph, and the peak of that and of backward."""
        there = {v.untyped_storage()._cdata for v in base if isinstance(v, Tensor)}
        recomputation = Recomputation(stages, self.fake.device, context=self._context)
        tape = 0
        with PeakCounter(kernels=self._kernels) as counter:
            # Between nodes the state is the stages' own, who may free it; a unit's input is kept by its first layer.
            own = [torch.empty_like(v) if origin is not None and _is_new(v, there) else v for v in state]
            before = counter.current
            entry = None if origin is None or differentiable else stages.entry_index(last)
            gradients = _gradients([None if i == entry else value for i, value in enumerate(result)])
            incoming = counter.current - before

            def then(outputs: list[Any]) -> list[Tensor | None]:
                nonlocal tape
                tape = max(0, counter.current - before - incoming)
                taken = list(gradients)
                gradients.clear()
                return taken

            recomputation.run(Tape(first, last), own, then, differentiable=differentiable, origin=origin)
        self.fake.clear()
        return tape, counter.peak - before

    def _step(self) -> Step:
        return Step.begin(self.net, self.fake.batch, self.fake.target, self._autocast)

    def _context(self) -> contextlib.AbstractContextManager[Any]:
        return self.fake.autocast(self._autocast)


def _num_bytes(parameters: Iterable[Tensor]) -> int:
    return sum(p.numel() * p.element_size() for p in parameters if p.requires_grad)


def _detached(value: Any) -> Any:
    return value.detach() if isinstance(value, Tensor) else value


def _is_new(value: Any, there: set[int]) -> bool:
    return isinstance(value, Tensor) and value.untyped_storage()._cdata not in there


def _gradients(outputs: list[Any]) -> list[Tensor | None]:
    return [torch.empty_like(o) if isinstance(o, Tensor) and o.is_floating_point() else None for o in outputs]


def plans_of(solver: Solver, *, step: float = 0.95) -> list[tuple[Plan, float]]:
    """Plans of a solver from the cheapest on, each with at most ``step`` times the memory of the one before."""
    chosen: list[tuple[Plan, float]] = []
    last = float("inf")
    curve = solver.curve()
    for budget, _ in reversed(curve):
        if (budget < step * last or budget == curve[0][0]) and (solution := solver.plan(budget)) is not None:
            chosen.append(solution)
            last = budget
    return chosen
