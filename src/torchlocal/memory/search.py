"""The search for plans: which parts of a step to recompute so that it fits, at the least cost.

What each unit takes is found on fake tensors; the solver makes plans of that, and the plan that is chosen is run as a
whole on fake tensors, so that its peak is not an estimate.
"""

from __future__ import annotations

import warnings
from dataclasses import replace
from typing import Any

import torch

from ..cut.batches import Batch, describe, num_examples, tensors_of
from ..engine import follows
from ..micro import can_cut
from ..recompute import Again, GuidedPlan, Inner, Keep, Plan, Tape
from ..recompute.solver import Solver, StageCost
from .costs import Bench, plans_of
from .fakes import FakeStep

__all__ = ["find_guided_plan", "find_local_plans"]

_LEAST_PART = 16  # examples, or positions of tokens, in the smallest micro-batch that the search considers
_MOST_PARTS = 16
_MOST_TRIALS = 5
# What micro-batches of n examples (of tokens, n positions) add to the time of a step, as a multiple of 1/n: kernels on
# few examples are less efficient. A rough upper bound; measured (CPU, ResNet-32): nothing with 64 examples, 5 % with
# 32, 28 % with 16.
_COST_OF_SMALL_PARTS = 4.0
# The same on CUDA, where kernels want more work, and each part is launched anew. Measured on an H100 (docs/gpu.md), as
# CUDA graphs: 8 parts of 128 images take 2.2 × a step of ResNet-32 in bf16, 8 parts of 16 take 1.7 × a step of ViT-S.
_COST_OF_SMALL_PARTS_ON_CUDA = 100.0


def find_guided_plan(
    fake: FakeStep,
    target: Any,
    memory: str | int,
    *,
    micro_batches: int | None = None,
    auxiliary: str = "follow",
    autocast: torch.dtype | None = None,
    optimizers: object = None,
) -> GuidedPlan:
    """The plan of a guided step for one of the memory modes of :func:`torchlocal.guided_step`, or for so many bytes.

    Where nothing fits, the plan with the smallest peak that was found, and a warning.
    """
    most = 1 if memory == "exact" else micro_batches or _MOST_PARTS
    search = _GuidedSearch(fake, target, most, auxiliary=auxiliary, autocast=autocast, optimizers=optimizers)
    if memory == "exact":
        return search.smallest()
    budget = search.local_peak() if memory == "local" else int(memory)
    # Looking inside of units takes long, and on a CPU it is dearer than micro-batches, where these are possible.
    plan = search.cheapest(budget, inside=False)
    if plan is None or (plan.micro_batches > 1 and search.device_type == "cuda"):
        plan = search.cheapest(budget, inside=True) or plan
    if plan is None:
        plan = search.smallest()
        if plan.bytes > budget:
            limit = "the peak of the local step" if memory == "local" else "the budget"
            warnings.warn(
                f"memory={memory!r}: no guided step of {describe(fake.given)} was found within {limit}, "
                f"{budget / 1e6:.1f} MB; the smallest found takes {plan.bytes / 1e6:.1f} MB and is used",
                stacklevel=1,
            )
    return plan


class _GuidedSearch:
    """Plans for the guided steps of one network, batch and set of options."""

    def __init__(self, fake: FakeStep, target: Any, most_parts: int, *, auxiliary: str, **options: Any) -> None:
        self._fake, net, self._most_parts = fake, fake.net, most_parts
        self.device_type = fake.device.type
        given = target if target is not None else fake.target
        self._cuttable = most_parts > 1 and can_cut(net, fake.given, given, follow=follows(net, auxiliary))
        self._bench = bench = Bench(fake, options["autocast"])
        self._auxiliary, self._options = auxiliary, options
        self._pieces = _num_pieces(fake.batch)
        self._forward = sum(cost.flops for cost in bench.costs.values())
        self._gradients = [bench.gradients(unit) for unit in range(len(bench.costs))]
        groups = net.partition.groups[:-1] if follows(net, auxiliary) else ()
        self._aside = {group.stop: bench.auxiliary(k) for k, group in enumerate(groups)}

    def local_peak(self) -> int:
        """Peak of the local step of the same batch."""
        return self._fake.local({}, **self._options).step_bytes

    def smallest(self) -> GuidedPlan:
        """The cheapest plan with about the smallest peak."""
        costs = self._bench.costs.values()
        largest = 2.0 * max(cost.backward for cost in costs) + max(cost.output for cost in costs)
        least: dict[int, float] = {}
        while not least:
            for parts in self._parts():
                if curve := self._solver(parts, largest / parts, inside=True).curve():
                    least[parts] = self._resident(parts) + curve[0][0]
            largest *= 2  # for what is there beside the units
        parts = next(parts for parts, size in least.items() if size <= 1.02 * min(least.values()))
        solver = self._solver(parts, 1.02 * (least[parts] - self._resident(parts)), inside=True)  # with finer slots
        if not (curve := solver.curve()):  # rounding came out otherwise
            solver = self._solver(parts, largest / parts, inside=True)
            curve = solver.curve()
        solution = solver.plan(1.02 * curve[0][0])  # the very last bytes are the dearest
        assert solution is not None
        return self._verified(solution, parts)

    def cheapest(self, budget: int, *, inside: bool) -> GuidedPlan | None:
        """The cheapest plan whose predicted peak is at most ``budget``."""
        allowed: dict[int, float] = {n: rest for n in self._parts() if (rest := budget - self._resident(n)) > 0}
        solvers: dict[int, Solver] = {}
        for parts, left in allowed.items():
            solvers[parts] = self._solver(parts, left, inside=inside)
            if (solution := solvers[parts].plan(left)) is not None and solution[1] == 0:
                break  # nothing has to be recomputed, so more parts only cost more
        for _ in range(_MOST_TRIALS):
            found = {parts: solution for parts, s in solvers.items() if (solution := s.plan(allowed[parts]))}
            if not found:
                return None
            price = {parts: flops / self._forward / 3 + self._loss(parts) for parts, (_, flops) in found.items()}
            parts = min(found, key=price.__getitem__)
            plan = self._verified(found[parts], parts)
            if plan.bytes <= budget:
                return plan
            allowed[parts] -= max(plan.bytes - budget, 0.002 * budget)
        return None

    def _loss(self, parts: int) -> float:
        """Time that smaller kernels lose, relative to a step."""
        cost = _COST_OF_SMALL_PARTS_ON_CUDA if self.device_type == "cuda" else _COST_OF_SMALL_PARTS
        return 0.0 if parts == 1 else cost * parts / self._pieces

    def _parts(self) -> list[int]:
        """The numbers of micro-batches that are considered."""
        most = min(num_examples(self._fake.batch), self._pieces // _LEAST_PART)
        powers = (2**i for i in range(1, self._most_parts.bit_length()))
        return [1, *(parts for parts in powers if self._cuttable and parts <= most)]

    def _resident(self, parts: int) -> int:
        """Gradients that are there from beginning to end."""
        # With the batch in one piece those of the auxiliary networks come early on, and stay.
        return sum(left for _, left in self._aside.values()) + (sum(self._gradients) if parts > 1 else 0)

    def _solver(self, parts: int, largest: float, *, inside: bool) -> Solver:
        """A solver for what is left beside the resident gradients."""
        costs = {
            (unit, last): _scaled(cost, parts, self._gradients[unit])
            for (unit, last), cost in self._bench.costs.items()
        }
        alternatives = {}
        for unit in self._largest_units() if inside else ():
            found = self._bench.alternatives(unit, differentiable=unit > 0)
            alternatives[unit] = [replace(a, peak=_share(a.peak, parts, self._gradients[unit])) for a in found]
        after = [0.0] * (len(costs) + 1)
        if parts == 1 and self._options["optimizers"] is None:
            after = [float(sum(self._gradients[unit:])) for unit in range(len(after))]
        aside = {unit: -(-peak // parts) for unit, (peak, _) in self._aside.items()}
        return Solver(costs, largest, alternatives, after=after, aside=aside)

    def _largest_units(self) -> list[int]:
        """The units that determine how small a step can be, even when all larger ones run as small as they can."""
        chosen: list[int] = []
        floor = 0
        for (unit, _), cost in sorted(self._bench.costs.items(), key=lambda item: -item[1].backward):
            if cost.backward < 0.8 * floor:  # what is stored beside them differs
                break
            chosen.append(unit)
            peaks = [a.peak for a in self._bench.alternatives(unit, differentiable=unit > 0)]
            floor = max(floor, min([cost.backward, *peaks]))
        return sorted(chosen)

    def _verified(self, solution: tuple[Plan, float], parts: int) -> GuidedPlan:
        tree, flops = solution
        plan = GuidedPlan(tree=tree, micro_batches=parts, recomputed=flops / self._forward)
        prediction = self._fake.guided(plan, auxiliary=self._auxiliary, **self._options)
        return replace(plan, peak_bytes=prediction.step_bytes)


def _num_pieces(batch: Batch) -> int:
    """What the work of kernels goes by: the number of examples, or of token ids (N, T), that of positions."""
    first = next((tensor for tensor in tensors_of(batch) if tensor.ndim > 0), None)
    if first is not None and first.ndim == 2 and first.dtype in (torch.int64, torch.int32):
        return first.numel()
    return num_examples(batch)


def _scaled(cost: StageCost, parts: int, gradients: int) -> StageCost:
    return StageCost(
        output=-(-cost.output // parts),
        tape=-(-cost.tape // parts),
        forward=-(-cost.forward // parts),
        backward=_share(cost.backward, parts, gradients),
        flops=cost.flops,
    )


def _share(peak: int, parts: int, gradients: int) -> int:
    """Of a peak the part that a micro-batch takes; the gradients of parameters do not shrink, but are there already."""
    return peak if parts == 1 else -(-max(0, peak - gradients) // parts)


def find_local_plans(fake: FakeStep, target: Any, *, autocast: torch.dtype | None = None) -> dict[int, Plan]:
    """For the modules that take most, plans by which the peak of a local step is the smallest."""
    net, bench = fake.net, Bench(fake, autocast)
    peaks: dict[tuple[Any, ...], tuple[int, int]] = {}

    def peak_of(k: int, plan: Plan | None) -> tuple[int, int]:
        start = net.partition.groups[k].start
        key = bench.module_key(k), plan and _moved(plan, -start)
        if key not in peaks:
            peaks[key] = bench.module_peak(k, plan)
        return peaks[key]

    before = [0]  # gradients that the modules before have left
    for k in range(net.num_modules):
        before.append(before[-1] + peak_of(k, None)[1])
    plain = [peak_of(k, None)[0] + before[k] for k in range(net.num_modules)]
    plans: dict[int, list[Plan | None]] = {}  # from the cheapest on
    floor = 0
    for k in sorted(range(net.num_modules), key=lambda k: -plain[k]):
        if plain[k] <= floor:  # a larger one takes more at its least
            break
        plans[k] = [None, *_module_plans(bench, net.partition.groups[k])]
        floor = max(floor, min(plain[k], peak_of(k, plans[k][-1])[0] + before[k]))
    chosen: dict[int, Plan] = {}
    for k, found in sorted(plans.items()):
        plan = next((p for p in found if peak_of(k, p)[0] + before[k] <= floor), None)
        if plan is not None:
            chosen[k] = plan
    return chosen


def _module_plans(bench: Bench, group: range) -> list[Plan]:
    """Plans for the units of one module, from the cheapest on."""
    alternatives = {
        unit: bench.alternatives(unit, differentiable=unit > group.start, held=unit == group[-1]) for unit in group
    }
    if len(group) == 1:
        return [Inner(group.start, a.plan) for a in alternatives[group.start]]
    costs = {(i, i + 1): bench.costs[unit, unit + 1] for i, unit in enumerate(group)}
    largest = sum(cost.tape for cost in costs.values()) + max(cost.backward for cost in costs.values())
    after = [float(costs[len(group) - 1, len(group)].output)] * len(group) + [0.0]
    solver = Solver(costs, largest, {i: alternatives[unit] for i, unit in enumerate(group)}, after=after)
    return [_moved(plan, group.start) for plan, _ in plans_of(solver)]


def _moved(plan: Plan, by: int) -> Plan:
    """The same plan for stages that are further on."""
    if isinstance(plan, Tape):
        return Tape(plan.first + by, plan.last + by)
    if isinstance(plan, Inner):
        return Inner(plan.first + by, plan.plan)
    left, right = _moved(plan.left, by), _moved(plan.right, by)
    return Keep(left, right) if isinstance(plan, Keep) and isinstance(left, Tape) else Again(left, right)
