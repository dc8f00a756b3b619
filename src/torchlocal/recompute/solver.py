"""The cheapest recomputation of a chain of stages within a given memory, found by dynamic programming.

Beaumont et al., "Optimal checkpointing for heterogeneous chains: how to train deep neural networks with limited
memory" (2019), section 4, with memory counted in slots.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from .plan import Again, Inner, Keep, Plan, Tape

__all__ = ["Alternative", "Solver", "StageCost"]

_SLOTS = 400  # memory is counted in so many steps; each tensor that is stored may lose one to rounding
_INFINITE = float("inf")


@dataclass(frozen=True, kw_only=True)
class StageCost:
    """What a stage takes, in bytes beyond its input.

    Attributes:
        output: its output, and the gradient of that.
        tape: alive after its forward pass with a graph, output included.
        forward: peak of its forward pass without a graph.
        backward: peak of forward and backward, gradients of output and input included.
        flops: of its forward pass.
    """

    output: int
    tape: int
    forward: int
    backward: int
    flops: float


@dataclass(frozen=True, kw_only=True)
class Alternative:
    """Another way to run one stage that is a chain itself: by a plan, with its peak, recomputing so many FLOPs."""

    plan: Plan
    peak: int
    flops: float


class Solver:
    """Finds the cheapest plans within any number of bytes up to a largest.

    Args:
        costs: by first stage and the stage after the last, of every single stage; those of several that run in one
            graph may be added, where they take less than one by one.
        largest: the largest number of bytes that is asked for.
        alternatives: by stage, other ways to run it.
        after: by stage, bytes that are there besides when all stages from this one on have run backward (gradients of
            parameters, or the output where that is kept); the last number belongs to the end of the chain.
        aside: by stage, bytes that something beside the chain takes for a moment when the first forward pass has come
            there.
    """

    def __init__(
        self,
        costs: Mapping[tuple[int, int], StageCost],
        largest: float,
        alternatives: Mapping[int, Sequence[Alternative]] | None = None,
        *,
        after: Sequence[float] | None = None,
        aside: Mapping[int, int] | None = None,
    ) -> None:
        self._costs, self._alternatives = costs, alternatives or {}
        self._slot = max(1, largest) / _SLOTS
        self._range = torch.arange(_SLOTS + 1)
        self._count = max(last for _, last in costs)
        self._after = after or [0.0] * (self._count + 1)
        self._aside = aside or {}
        # table[first, last, m]: FLOPs recomputed for stages first to last - 1 with m slots beyond their input.
        self._table = torch.full((self._count + 1, self._count + 1, _SLOTS + 1), _INFINITE, dtype=torch.float64)
        for length in range(1, self._count + 1):
            for first in range(self._count - length + 1):
                rows = self._options(first, first + length)[0]
                self._table[first, first + length] = rows.min(dim=0).values

    def plan(self, budget: float) -> tuple[Plan, float] | None:
        """The cheapest plan with a peak of at most ``budget`` bytes, and the FLOPs it recomputes, if there is one."""
        slot = min(int(budget / self._slot + 1e-6), _SLOTS)
        cost = float(self._table[0, self._count, slot]) if slot >= 0 else _INFINITE
        return None if cost == _INFINITE else (self._build(0, self._count, slot), cost)

    def curve(self) -> list[tuple[float, float]]:
        """The (bytes, FLOPs recomputed) from which on more is not recomputed, from the fewest bytes on."""
        row = self._table[0, self._count].tolist()
        return [(i * self._slot, cost) for i, cost in enumerate(row) if cost < (row[i - 1] if i else _INFINITE)]

    def _options(self, first: int, last: int) -> tuple[Tensor, list[Plan | tuple[str, int]]]:
        """Ways to run stages ``first`` to ``last - 1``: a row of costs by slots for each, and what it is."""
        costs, middles = self._costs, range(first + 1, last)
        incoming = costs[last - 1, last].output
        before = self._after[last]
        aside = self._aside if last == self._count else {}  # later passes do without
        ways: list[Plan | tuple[str, int]] = []
        least: list[int] = []
        rows: list[Tensor] = []
        leaves: list[tuple[Plan, int, float]] = []
        if (first, last) in costs:
            leaves.append((Tape(first, last), costs[first, last].backward, 0.0))
        if last == first + 1:
            leaves += [(Inner(first, a.plan), a.peak, a.flops) for a in self._alternatives.get(first, ())]
        for plan, peak, flops in leaves:
            ways.append(plan)
            least.append(self._slots(peak + before))
            rows.append(torch.full((1, _SLOTS + 1), flops, dtype=torch.float64))
        for middle in (m for m in middles if (first, m) in costs):
            tape = costs[first, middle]
            forward = tape.tape + max(incoming, aside.get(middle, 0)) + before
            ways.append(("keep", middle))
            least.append(self._slots(max(tape.backward + self._after[middle], forward)))
            rows.append(self._shifted(self._table[[middle], last], [self._slots(tape.tape)]))
        if middles:
            peak, flops, price = 0, 0.0, []
            for middle in middles:
                stage = costs[middle - 1, middle]
                given = costs[middle - 2, middle - 1].output if middle > first + 1 else 0
                peak = max(peak, given + stage.forward, given + stage.output + aside.get(middle, 0))
                flops += stage.flops
                least.append(self._slots(peak + incoming + before))
                price.append(flops)
                ways.append(("again", middle))
            stored = [self._slots(costs[middle - 1, middle].output) for middle in middles]
            again = self._shifted(self._table[first + 1 : last, last], stored) + self._table[first, first + 1 : last]
            rows.append(again + torch.tensor(price, dtype=torch.float64)[:, None])
        return torch.where(self._range >= torch.tensor(least)[:, None], torch.cat(rows), _INFINITE), ways

    def _build(self, first: int, last: int, slot: int) -> Plan:
        rows, ways = self._options(first, last)
        way = ways[int(rows[:, slot].argmin())]
        if not isinstance(way, tuple):
            return way
        kind, middle = way
        if kind == "again":
            right = self._build(middle, last, slot - self._slots(self._costs[middle - 1, middle].output))
            return Again(self._build(first, middle, slot), right)
        right = self._build(middle, last, slot - self._slots(self._costs[first, middle].tape))
        if isinstance(right, Tape):  # one graph does as well as two
            return Tape(first, right.last)
        if isinstance(right, Keep):
            return Keep(Tape(first, right.left.last), right.right)
        return Keep(Tape(first, middle), right)

    def _slots(self, size: float) -> int:
        return min(_SLOTS + 1, -int(-size // self._slot))

    def _shifted(self, rows: Tensor, by: Sequence[int]) -> Tensor:
        """Each row read so many slots further down."""
        index = self._range - torch.tensor(by)[:, None]
        return torch.where(index >= 0, rows.gather(1, index.clamp(min=0)), _INFINITE)
