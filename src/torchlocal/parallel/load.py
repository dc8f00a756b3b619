"""How busy every stage is, for whom it waits, and which stage or link is the slowest."""

from __future__ import annotations

import math
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import astuple, dataclass, fields
from itertools import pairwise
from typing import Self

__all__ = ["Load", "Meter", "Waits", "describe", "slowest"]

_MOST_TOLD = 8  # stages whose numbers are written out
_EVEN = 0.05  # of stages that are busy within so much of each other none is the slowest
_MICRO = 1e6


@dataclass(frozen=True)
class Load:
    """What one stage did while it trained; the difference of two is what it did in between.

    On a GPU these are the times of the host, which runs ahead of the device.

    Attributes:
        seconds: of training, without evaluation and checkpoints.
        starved: seconds of them in which it waited for a batch from the stage before.
        held: seconds in which it waited for room on the way to the next stage.
        others: seconds in which it waited for anything else: gradients, tied parameters, replicas.
        queued: batches that lay ready when it began one, summed over its batches.
        batches: that it has begun.
    """

    seconds: float = 0.0
    starved: float = 0.0
    held: float = 0.0
    others: float = 0.0
    queued: float = 0.0
    batches: float = 0.0

    def __sub__(self, other: Load) -> Load:
        return Load(*(a - b for a, b in zip(astuple(self), astuple(other), strict=True)))

    @property
    def seconds_busy(self) -> float:
        """Seconds in which it did not wait."""
        return max(0.0, self.seconds - self.starved - self.held - self.others)

    @property
    def busy(self) -> float:
        """Share of the time in which it did not wait; NaN where nothing was measured."""
        return self.seconds_busy / self.seconds if self.seconds > 0 else math.nan

    @property
    def queue(self) -> float:
        """Batches that lay ready when it began one, on average: 0 for the first stage, which reads the data."""
        return self.queued / self.batches if self.batches else math.nan

    def numbers(self) -> list[int]:
        """As whole numbers, to be sent: times in microseconds."""
        return [*(round(value * _MICRO) for value in astuple(self)[:4]), round(self.queued), round(self.batches)]

    @classmethod
    def of(cls, numbers: Sequence[int]) -> Self:
        """From such numbers."""
        return cls(*(value / _MICRO for value in numbers[:4]), *numbers[4:])


NUM_NUMBERS = len(fields(Load))


@dataclass
class Waits:
    """Seconds waited, and messages that were there already."""

    seconds: float = 0.0
    queued: int = 0

    @contextmanager
    def clock(self) -> Iterator[None]:
        """What happens here is waiting."""
        start = time.perf_counter()
        try:
            yield
        finally:
            self.seconds += time.perf_counter() - start


class Meter:
    """Measures the load of this stage by clocks around its waiting; it waits for no device.

    Attributes:
        previous: waits for the stage before.
        next: waits for room on the way to the next stage.
        others: waits for anything else.
    """

    def __init__(self) -> None:
        self.previous, self.next, self.others = Waits(), Waits(), Waits()
        self._begun: Load | None = None
        self._until_now = Load()
        self._batches = 0

    def begin(self) -> None:
        """A batch begins that is trained on."""
        if self._begun is None:
            self._begun = self._read()
        self._batches += 1

    def pause(self) -> None:
        """What follows is no training."""
        self._until_now, self._begun = self.total(), None

    def total(self) -> Load:
        """The load since the beginning."""
        if self._begun is None:
            return self._until_now
        since, before = self._read() - self._begun, self._until_now
        return Load(*(a + b for a, b in zip(astuple(before), astuple(since), strict=True)))

    def _read(self) -> Load:
        waited = (self.previous.seconds, self.next.seconds, self.others.seconds)
        return Load(time.perf_counter(), *waited, self.previous.queued, self._batches)


def slowest(loads: Sequence[Load]) -> str:
    """The stage, or the link between two, for which the others wait; empty where all are as busy.

    A link is what holds up a stage that waits for room on it while the next one waits for batches from it.

    >>> slowest([Load(10, held=5), Load(10), Load(10, starved=4)])
    'stage 2 of 3'
    >>> slowest([Load(10, held=6), Load(10, starved=7)])
    'the link from stage 1 to stage 2'
    """
    busy = [load.busy for load in loads]
    if not busy or any(value != value for value in busy):
        return ""
    # A stage that is the slowest neither waits for room nor for batches.
    links = [min(a.held / a.seconds, b.starved / b.seconds) for a, b in pairwise(loads)]
    waits = max(links, default=0.0)
    if waits > max(_EVEN, 1 - max(busy) - _EVEN) and max(busy) < 1 - _EVEN:
        first = links.index(waits) + 1
        return f"the link from stage {first} to stage {first + 1}"
    if max(busy) - min(busy) <= _EVEN:
        return ""
    return f"stage {busy.index(max(busy)) + 1} of {len(loads)}"


def describe(loads: Sequence[Load]) -> str:
    """How busy the stages are, what waits in front of them, and the slowest.

    >>> describe([Load(10, held=5), Load(10, queued=39, batches=10), Load(10, starved=4, batches=10)])
    'stages busy 50 100 60 %, queues 3.9 0.0, slowest: stage 2 of 3'
    """
    busy = [100 * load.busy for load in loads]
    if not busy or any(value != value for value in busy):
        return ""
    queues = [load.queue for load in loads[1:]]
    if len(loads) <= _MOST_TOLD:
        told = f"stages busy {' '.join(f'{value:.0f}' for value in busy)} %"
        told += f", queues {' '.join(f'{value:.1f}' for value in queues)}"
    else:
        told = f"stages busy {min(busy):.0f} to {max(busy):.0f} %, queues {min(queues):.1f} to {max(queues):.1f}"
    named = slowest(loads)
    return f"{told}, slowest: {named}" if named else told
