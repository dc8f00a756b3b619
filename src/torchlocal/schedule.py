"""The search for plans: which parts of a step to recompute so that it fits, at the least cost.

What each unit takes is found on fake tensors; the solver makes plans of that, and the plan that is chosen is run as a
whole on fake tensors, so that its peak is not an estimate.
"""

from __future__ import annotations

import contextlib
import itertools
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor
from torch.utils._pytree import tree_iter

from .memory import FakeStep, FlopTotal, PeakCounter
from .recompute import Again, Inner, Keep, Plan, Recomputation, Stages, Tape
from .rules import Batch
from .solver import Alternative, Solver, StageCost
from .steps import Run

if TYPE_CHECKING:
    from .network import DecoupledNetwork

__all__ = ["GuidedPlan", "find_guided_plan", "find_local_plans"]

_LEAST_PART = 16  # examples in the smallest micro-batch that the search considers
_MOST_PARTS = 16
_MOST_TRIALS = 3
_MOST_NODES = 14  # of a unit, up to which every range of its nodes is measured
_COST_OF_A_PART = 0.02  # of a step: smaller kernels are less efficient


@dataclass(frozen=True, kw_only=True)
class GuidedPlan:
    """How a guided step runs.

    Attributes:
        tree: what is recomputed.
        micro_batches: in how many parts the batch is cut.
        peak_bytes: predicted peak; None where it was not asked for.
        recomputed: FLOPs that are recomputed, as a share of one forward pass of the backbone.
    """

    tree: Plan
    micro_batches: int = 1
    peak_bytes: int | None = None
    recomputed: float = 0.0


class _Bench:
    """Measures parts of a network without memory; parts of the same build are measured once."""

    def __init__(self, fake: FakeStep, autocast: torch.dtype | None) -> None:
        self.fake, self.net, self._autocast = fake, fake.net, autocast
        self.states: list[list[Any]] = [[fake.x]]  # before every unit
        self.costs: dict[tuple[int, int], StageCost] = {}
        self._keys: list[tuple[Any, ...]] = []
        self._known: dict[tuple[Any, ...], Any] = {}
        self._parameters = list(self.net.parameters())
        chain = self.net.chain
        chain.refresh(fake.x.device)
        for unit in range(chain.num_units):
            state = self.states[-1]
            key = (chain.inside(unit).kind(), state[0].shape, state[0].stride(), state[0].dtype)
            self._keys.append(key)
            if (key, unit > 0) not in self._known:
                self._known[key, unit > 0] = self._measure(chain, unit, unit + 1, state, differentiable=unit > 0)
            self.costs[unit, unit + 1], following = self._known[key, unit > 0]
            self.states.append(following)

    def alternatives(self, unit: int, *, differentiable: bool, held: bool = False) -> list[Alternative]:
        """Ways to run a unit that take less than its graph, by falling peak; ``held``: its output stays afterwards."""
        key = "inside", self._keys[unit], differentiable, held
        if key not in self._known:
            self._known[key] = self._alternatives(unit, differentiable, held)
        found: list[Alternative] = self._known[key]
        return found

    def _alternatives(self, unit: int, differentiable: bool, held: bool) -> list[Alternative]:
        stages = self.net.chain.inside(unit)
        count = stages.num_stages
        costs: dict[tuple[int, int], StageCost] = {}
        states = [self.states[unit]]
        for first in range(count):
            costs[first, first + 1], following = self._measure(
                stages, first, first + 1, states[-1], base=states[0], differentiable=differentiable, origin=0
            )
            states.append(following)
        if count <= _MOST_NODES:
            for first, last in itertools.combinations(range(count + 1), 2):
                if last > first + 1:
                    costs[first, last], _ = self._measure(
                        stages, first, last, states[first], base=states[0], differentiable=differentiable, origin=0
                    )
        whole = self._peak(stages, Tape(0, count), states[0], differentiable, held)
        solver = Solver(costs, whole, held=costs[count - 1, count].output if held else 0)
        found: list[Alternative] = []
        for plan, recomputed in _steps(solver):
            peak = whole if isinstance(plan, Tape) else self._peak(stages, plan, states[0], differentiable, held)
            if peak < min([whole, *(a.peak for a in found)]):
                found.append(Alternative(plan=plan, peak=peak, flops=recomputed))
        return found

    def module_peak(self, k: int, plan: Plan | None) -> tuple[int, int]:
        """Peak of the local step of module ``k`` by itself, beyond its input, and the bytes of gradients it leaves."""
        group, fake = self.net.partition.groups[k], self.fake
        run = Run(self.net, Batch(input=fake.x, target=fake.target, criterion=self.net.criterion), self._autocast)
        with fake.mode, PeakCounter() as counter:
            kept = run.local(k, plan, [self.states[group.start][0].detach()])
            del kept
            left = counter.current
        self._clear()
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

        with self.fake.mode, PeakCounter() as counter:
            recomputation = Recomputation(stages, self.fake.x, context=self._context)
            recomputation.run(plan, list(state), then, differentiable=differentiable)
        self._clear()
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
        flops = FlopTotal()
        with self.fake.mode, PeakCounter() as counter, torch.no_grad(), self._context(), flops:
            result = list(stages.run(first, last, list(state)))
        there = {v.untyped_storage()._cdata for v in base if isinstance(v, Tensor)}
        storages = [v.untyped_storage() for v in result if isinstance(v, Tensor)]
        recomputation = Recomputation(stages, self.fake.x, context=self._context)
        tape = 0

        with self.fake.mode, PeakCounter() as backward:
            # Between nodes the state is the stages' own, who may free it; a unit's input is kept by its first layer.
            own = [torch.empty_like(v) if origin is not None and _is_new(v, there) else v for v in state]
            before = backward.current
            entry = None if origin is None or differentiable else stages.entry_index(last)
            gradients = _gradients([None if i == entry else value for i, value in enumerate(result)])
            incoming = backward.current - before

            def then(outputs: list[Any]) -> list[Tensor | None]:
                nonlocal tape
                tape = max(0, backward.current - before - incoming)
                taken = list(gradients)
                gradients.clear()
                return taken

            recomputation.run(Tape(first, last), own, then, differentiable=differentiable, origin=origin)
        self._clear()
        cost = StageCost(
            output=sum({s._cdata: s.nbytes() for s in storages if s._cdata not in there}.values()),
            tape=tape,
            forward=counter.peak,
            backward=backward.peak - before,
            flops=flops.total + counter.peak / 64,  # of two ways with equal FLOPs the one that moves less
        )
        return cost, result

    def _clear(self) -> None:
        for parameter in self._parameters:
            parameter.grad = None

    @contextlib.contextmanager
    def _context(self) -> Iterator[None]:
        with contextlib.nullcontext() if self._autocast is None else torch.autocast("cpu", dtype=self._autocast):
            yield


def _is_new(value: Any, there: set[int]) -> bool:
    return isinstance(value, Tensor) and value.untyped_storage()._cdata not in there


def _gradients(outputs: list[Any]) -> list[Tensor | None]:
    return [torch.empty_like(o) if isinstance(o, Tensor) and o.is_floating_point() else None for o in outputs]


def find_guided_plan(
    net: DecoupledNetwork,
    x: Tensor,
    target: Any,
    memory: str | int,
    *,
    auxiliary: str = "follow",
    autocast: torch.dtype | None = None,
    optimizers: object = None,
) -> GuidedPlan:
    """The plan of a guided step for one of the memory modes of :func:`torchlocal.guided_step`, or for so many bytes.

    Where nothing fits, the plan with the smallest peak that was found.
    """
    search = _GuidedSearch(net, x, target, auxiliary=auxiliary, autocast=autocast, optimizers=optimizers)
    if memory == "exact":
        return search.smallest()
    budget = search.local_peak() if memory == "local" else int(memory)
    # Looking inside of units takes long, and is dearer than micro-batches where these are possible.
    return search.cheapest(budget, inside=False) or search.cheapest(budget, inside=True) or search.smallest()


class _GuidedSearch:
    """Plans for the guided steps of one network, batch and set of options."""

    def __init__(self, net: DecoupledNetwork, x: Tensor, target: Any, *, auxiliary: str, **options: Any) -> None:
        self._fake = FakeStep(net, x, target)
        self._bench = _Bench(self._fake, options["autocast"])
        self._auxiliary, self._options = auxiliary, options
        self._forward = sum(cost.flops for cost in self._bench.costs.values())

    def local_peak(self) -> int:
        """Peak of the local step of the same batch."""
        return self._fake.run("local", **self._options).peak_bytes

    def smallest(self) -> GuidedPlan:
        """The cheapest plan with about the smallest peak in which the batch is whole."""
        costs = self._bench.costs.values()
        largest = 2.0 * max(cost.backward for cost in costs) + max(cost.output for cost in costs)
        found = []
        for _ in range(2):  # the second time with finer slots
            solver = self._solver(1, largest, inside=True)
            largest = 1.02 * solver.curve()[0][0]  # the very last bytes are the dearest
            solution = solver.plan(largest)
            assert solution is not None
            found.append(self._verified(solution, 1))
        return min(found, key=_peak_bytes)

    def cheapest(self, budget: int, *, inside: bool) -> GuidedPlan | None:
        """The cheapest plan whose predicted peak is at most ``budget``."""
        solvers: dict[int, Solver] = {}
        parts, num_examples = 1, self._fake.x.shape[0]
        while parts == 1 or (parts <= _MOST_PARTS and num_examples // parts >= _LEAST_PART and self._can_split()):
            solvers[parts] = self._solver(parts, 1.1 * budget, inside=inside)
            parts *= 2
        allowed = dict.fromkeys(solvers, float(budget))
        for _ in range(_MOST_TRIALS):
            found = {parts: solution for parts, s in solvers.items() if (solution := s.plan(allowed[parts]))}
            if not found:
                return None
            price = {parts: flops / self._forward / 3 + _COST_OF_A_PART * parts for parts, (_, flops) in found.items()}
            parts = min(found, key=price.__getitem__)
            plan = self._verified(found[parts], parts)
            if _peak_bytes(plan) <= budget:
                return plan
            allowed[parts] -= max(_peak_bytes(plan) - budget, 0.002 * budget)
        return None

    def _can_split(self) -> bool:
        num_examples = self._fake.x.shape[0]
        return any(isinstance(t, Tensor) and t.shape[:1] == (num_examples,) for t in tree_iter(self._fake.target))

    def _solver(self, parts: int, largest: float, *, inside: bool) -> Solver:
        costs = {stage: _scaled(cost, parts) for stage, cost in self._bench.costs.items()}
        alternatives = {}
        for unit in range(len(costs)) if inside else ():
            found = self._bench.alternatives(unit, differentiable=unit > 0)
            alternatives[unit] = [replace(a, peak=-(-a.peak // parts)) for a in found]
        return Solver(costs, largest, alternatives)

    def _verified(self, solution: tuple[Plan, float], parts: int) -> GuidedPlan:
        tree, flops = solution
        plan = GuidedPlan(tree=tree, micro_batches=parts, recomputed=flops / self._forward)
        prediction = self._fake.run("guided", memory=plan, auxiliary=self._auxiliary, **self._options)
        return replace(plan, peak_bytes=prediction.peak_bytes)


def _peak_bytes(plan: GuidedPlan) -> int:
    assert plan.peak_bytes is not None
    return plan.peak_bytes


def _scaled(cost: StageCost, parts: int) -> StageCost:
    return StageCost(
        output=-(-cost.output // parts),
        tape=-(-cost.tape // parts),
        forward=-(-cost.forward // parts),
        backward=-(-cost.backward // parts),
        flops=cost.flops,
    )


def find_local_plans(
    net: DecoupledNetwork, x: Tensor, target: Any, *, autocast: torch.dtype | None = None
) -> dict[int, Plan]:
    """For the modules that take most, plans by which the peak of a local step is the smallest."""
    bench = _Bench(FakeStep(net, x, target), autocast)
    peaks: dict[tuple[Any, ...], tuple[int, int]] = {}

    def peak_of(k: int, plan: Plan | None) -> tuple[int, int]:
        start = net.partition.groups[k].start
        key = bench.module_key(k), plan and _moved(plan, -start)
        if key not in peaks:
            peaks[key] = bench.module_peak(k, plan)
        return peaks[key]

    plans: list[list[Plan | None]] = []  # of every module from the cheapest on
    before = [0]  # gradients that the modules before have left
    for k, group in enumerate(net.partition.groups):
        plans.append([None, *_module_plans(bench, group)])
        before.append(before[-1] + peak_of(k, None)[1])
    ends = [min(peak_of(k, found[0])[0], peak_of(k, found[-1])[0]) + before[k] for k, found in enumerate(plans)]
    chosen: dict[int, Plan] = {}
    for k, found in enumerate(plans):
        plan = next((p for p in found if peak_of(k, p)[0] + before[k] <= max(ends)), None)
        if plan is not None:
            chosen[k] = plan
    return chosen


def _module_plans(bench: _Bench, group: range) -> list[Plan]:
    """Plans for the units of one module, from the cheapest on."""
    alternatives = {
        unit: bench.alternatives(unit, differentiable=unit > group.start, held=unit == group[-1]) for unit in group
    }
    if len(group) == 1:
        return [Inner(group.start, a.plan) for a in alternatives[group.start]]
    costs = {(i, i + 1): bench.costs[unit, unit + 1] for i, unit in enumerate(group)}
    largest = sum(cost.tape for cost in costs.values()) + max(cost.backward for cost in costs.values())
    held = costs[len(group) - 1, len(group)].output
    solver = Solver(costs, largest, {i: alternatives[unit] for i, unit in enumerate(group)}, held)
    return [_moved(plan, group.start) for plan, _ in _steps(solver)]


def _steps(solver: Solver) -> list[tuple[Plan, float]]:
    """Plans of a solver from the cheapest on, each with clearly less memory than the one before."""
    chosen: list[tuple[Plan, float]] = []
    last = float("inf")
    curve = solver.curve()
    for budget, _ in reversed(curve):
        if (budget < 0.95 * last or budget == curve[0][0]) and (solution := solver.plan(budget)) is not None:
            chosen.append(solution)
            last = budget
    return chosen


def _moved(plan: Plan, by: int) -> Plan:
    """The same plan for stages that are further on."""
    if isinstance(plan, Tape):
        return Tape(plan.first + by, plan.last + by)
    if isinstance(plan, Inner):
        return Inner(plan.first + by, plan.plan)
    left, right = _moved(plan.left, by), _moved(plan.right, by)
    return Keep(left, right) if isinstance(plan, Keep) and isinstance(left, Tape) else Again(left, right)
