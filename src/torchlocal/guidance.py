"""When the global objective is reinstated: schedules that say which steps are guided.

A schedule is a pure function of the step, so a run that resumes at step n goes on as if it had never stopped.
"""

from __future__ import annotations

import math
import random
from dataclasses import asdict, dataclass, fields, replace
from typing import Any

from .checks import check_share, check_whole

__all__ = [
    "GUIDANCES",
    "AlwaysGuidance",
    "AnnealedGuidance",
    "Guidance",
    "NeverGuidance",
    "PeriodicGuidance",
    "PhasedGuidance",
    "RandomGuidance",
    "cosine_factor",
    "make_guidance",
]


def cosine_factor(step: int, decay: range, warmup: int = 0) -> float:
    """A factor for the learning rate: it rises over ``warmup`` steps, stays at 1, and falls along half a cosine.

    Args:
        step: counted from 0.
        decay: the steps over which it falls, to reach 0 at ``decay.stop``.
        warmup: number of steps over which it rises, from 1 / ``warmup`` to 1; what they take of ``decay`` is left out.
    """
    if step < warmup:
        return (step + 1) / warmup
    start = max(decay.start, warmup)
    return 1.0 if step < start else 0.5 * (1 + math.cos(math.pi * (step - start) / (decay.stop - start)))


@dataclass(frozen=True, kw_only=True)
class Guidance:
    """A schedule: called with a step, counted from 0, it says whether that step is guided."""

    def __call__(self, step: int) -> bool:
        """Whether step number ``step`` is guided."""
        raise NotImplementedError

    @property
    def share(self) -> float:
        """Guided share: guided steps / all steps, in the long run."""
        raise NotImplementedError

    def bind(self, *, num_steps: int, steps_per_epoch: int) -> Guidance:
        """The same schedule for a run of this length, with epochs resolved to steps."""
        return self

    def decay(self, step: int, num_steps: int) -> range:
        """The steps, around ``step`` or next, over which the learning rate falls: all, but of phased guidance."""
        return range(max(num_steps, step + 1))

    def cosine(self, step: int, num_steps: int, warmup: int = 0) -> float:
        """A factor for the learning rate: half a cosine from 1 to 0 over training, but of phased guidance.

        Args:
            step: counted from 0.
            num_steps: length of training.
            warmup: over so many steps at the start it rises linearly instead, from 1 / ``warmup`` to 1.
        """
        return cosine_factor(step, self.decay(step, num_steps), warmup)

    def state_dict(self) -> dict[str, Any]:
        """All that a checkpoint needs: the kind of schedule and its arguments. The position is the step itself."""
        return {"name": _NAMES.get(type(self), type(self).__name__), **asdict(self)}


@dataclass(frozen=True, kw_only=True)
class NeverGuidance(Guidance):
    """No step is guided: plain local learning."""

    def __call__(self, step: int) -> bool:
        return False

    @property
    def share(self) -> float:
        return 0.0


@dataclass(frozen=True, kw_only=True)
class AlwaysGuidance(Guidance):
    """Every step is guided: end-to-end training."""

    def __call__(self, step: int) -> bool:
        return True

    @property
    def share(self) -> float:
        return 1.0


@dataclass(frozen=True, kw_only=True)
class PeriodicGuidance(Guidance):
    """Periodic global guidance (PGL): the last ``length`` steps of every ``period`` are guided.

    Bhatti and Moon, "Locally Supervised Learning with Periodic Global Guidance" (2022).

    Args:
        period: length of a period.
        length: guided steps at the end of each period, 1 to ``period``.
        start: where the first period begins; nothing before it is guided.
        unit: what these are counted in, ``"steps"`` or ``"epochs"``; epochs need :meth:`bind`.

    Raises:
        ValueError: an argument is out of range.
    """

    period: int = 5
    length: int = 1
    start: int = 0
    unit: str = "steps"

    def __post_init__(self) -> None:
        check_whole("period", self.period, 1)
        check_whole("length", self.length, 1)
        check_whole("start", self.start, 0)
        if self.length > self.period:
            raise ValueError(f"length: must be at most the period ({self.period}), not {self.length}")
        if self.unit not in ("steps", "epochs"):
            raise ValueError(f"unit: must be 'steps' or 'epochs', not {self.unit!r}")

    def __call__(self, step: int) -> bool:
        if self.unit != "steps":
            raise ValueError(
                "unit: a schedule in epochs has to be bound first: guidance.bind(num_steps=, steps_per_epoch=)"
            )
        return step >= self.start and (step - self.start) % self.period >= self.period - self.length

    @property
    def share(self) -> float:
        return self.length / self.period

    def bind(self, *, num_steps: int, steps_per_epoch: int) -> Guidance:
        if self.unit == "steps":
            return self
        n = steps_per_epoch
        return PeriodicGuidance(period=self.period * n, length=self.length * n, start=self.start * n)


@dataclass(frozen=True, kw_only=True)
class RandomGuidance(Guidance):
    """Each step is guided with probability ``share``, drawn from ``seed`` and the step alone.

    Args:
        share: probability, 0 to 1.
        seed: seed of the draws.

    Raises:
        ValueError: ``share`` is not a probability.
    """

    share: float = 0.2
    seed: int = 0

    def __post_init__(self) -> None:
        check_share("share", self.share)
        check_whole("seed", self.seed, 0)

    def __call__(self, step: int) -> bool:
        return random.Random(f"{self.seed}:{step}").random() < self.share


@dataclass(frozen=True, kw_only=True)
class AnnealedGuidance(Guidance):
    """The guided share moves linearly from ``start_share`` to ``end_share`` over training, spread evenly.

    Args:
        start_share: guided share at the first step, 0 to 1.
        end_share: guided share at the last step, 0 to 1.
        num_steps: length of training; left out, :meth:`bind` has to say it. Later steps keep ``end_share``.

    Raises:
        ValueError: an argument is out of range.
    """

    start_share: float = 0.4
    end_share: float = 0.0
    num_steps: int | None = None

    def __post_init__(self) -> None:
        check_share("start_share", self.start_share)
        check_share("end_share", self.end_share)
        if self.num_steps is not None:
            check_whole("num_steps", self.num_steps, 1)

    def __call__(self, step: int) -> bool:
        return math.floor(self._guided_before(step + 1) + 1e-9) > math.floor(self._guided_before(step) + 1e-9)

    def _guided_before(self, step: int) -> float:
        """The integral of the share over the first ``step`` steps."""
        if self.num_steps is None:
            raise ValueError("num_steps: an annealed schedule needs the length of training; give it or call bind()")
        inside, beyond = min(step, self.num_steps), max(0, step - self.num_steps)
        slope = (self.end_share - self.start_share) / self.num_steps
        return self.start_share * inside + slope * inside * inside / 2 + self.end_share * beyond

    @property
    def share(self) -> float:
        return (self.start_share + self.end_share) / 2

    def bind(self, *, num_steps: int, steps_per_epoch: int) -> Guidance:
        if self.num_steps is not None:
            return self
        return AnnealedGuidance(start_share=self.start_share, end_share=self.end_share, num_steps=num_steps)


@dataclass(frozen=True, kw_only=True)
class PhasedGuidance(Guidance):
    """Local steps first, and a guided end: the last ``share`` of the steps, in which the learning rate falls to zero.

    So the network settles under the global loss and not under the local ones (:meth:`cosine` is the factor of the
    rate), and modules that train apart meet but once. With several ``periods`` each of so many equal parts of training
    ends so; with ``spread`` a share of the guided steps lies evenly among the local ones instead, all of them with
    ``spread=1``. Why the end is the default: docs/guidance.md.

    Args:
        share: guided share of every period, 0 to 1.
        periods: number of equal parts of training, each of which ends with such a phase, in which the rate falls.
        spread: share of the guided steps, 0 to 1, that lie evenly among the local ones before the phase; with 1
            there is no phase. The steps over which the learning rate falls stay the same.
        num_steps: length of training; left out, :meth:`bind` has to say it. Later steps belong to the last phase.

    Raises:
        ValueError: an argument is out of range.
    """

    share: float = 0.2
    periods: int = 1
    spread: float = 0.0
    num_steps: int | None = None

    def __post_init__(self) -> None:
        check_share("share", self.share)
        check_whole("periods", self.periods, 1)
        check_share("spread", self.spread)
        if self.num_steps is not None:
            check_whole("num_steps", self.num_steps, 1)
            if self.periods > self.num_steps:
                raise ValueError(f"periods: must be at most the number of steps ({self.num_steps}), not {self.periods}")

    def __call__(self, step: int) -> bool:
        period = self._period(step)
        guided = self._guided(period)
        spread = min(round(self.spread * guided), guided)
        before = len(period) - (guided - spread)  # the steps in front of the phase
        i = step - period.start
        return (i + 1) * spread // before > i * spread // before if i < before or guided == spread else True

    def _period(self, step: int, num_steps: int | None = None) -> range:
        """The steps of the period around a step."""
        num_steps = self.num_steps or num_steps
        if num_steps is None:
            raise ValueError("num_steps: a phased schedule needs the length of training; give it or call bind()")
        k = min(step * self.periods // num_steps, self.periods - 1)
        start, stop = (-(-i * num_steps // self.periods) for i in (k, k + 1))
        return range(start, stop)

    def _guided(self, period: range) -> int:
        """The number of guided steps of a period; a share above 0 guides at least one."""
        return max(1, round(self.share * len(period))) if self.share else 0

    def decay(self, step: int, num_steps: int) -> range:
        period = self._period(step, num_steps)
        guided = self._guided(period)
        if not guided:
            return super().decay(step, num_steps)
        return range(period.stop - guided, max(period.stop, step + 1))

    def bind(self, *, num_steps: int, steps_per_epoch: int) -> Guidance:
        return self if self.num_steps is not None else replace(self, num_steps=num_steps)


GUIDANCES: dict[str, type[Guidance]] = {
    "never": NeverGuidance,
    "always": AlwaysGuidance,
    "periodic": PeriodicGuidance,
    "random": RandomGuidance,
    "annealed": AnnealedGuidance,
    "phased": PhasedGuidance,
}
_NAMES = {kind: name for name, kind in GUIDANCES.items()}


def make_guidance(name: str, **options: Any) -> Guidance:
    """The schedule called ``name``, with its arguments.

    Raises:
        ValueError: the name, or an argument, is unknown or out of range.
    """
    if not isinstance(name, str) or name not in GUIDANCES:
        raise ValueError(f"guidance: no schedule named {name!r}; choose one of {', '.join(GUIDANCES)}")
    known = [f.name for f in fields(GUIDANCES[name])]
    for option in options:
        if option not in known:
            takes = ", ".join(known) or "no arguments"
            raise ValueError(f"guidance: {name!r} takes {takes}, but was given {option!r}")
    return GUIDANCES[name](**options)
