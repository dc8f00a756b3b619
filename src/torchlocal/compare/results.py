"""What a comparison has measured, and what its table says of it."""

from __future__ import annotations

import math
import statistics
from collections.abc import Mapping
from dataclasses import dataclass, field

from torchlocal.compare.columns import Row, columns
from torchlocal.compare.measures import ACCURACY, Measure

__all__ = ["Comparison", "MethodResult", "Row", "can_tell"]

MEMORY_NOTE = (
    "Peak memory ({peak}) is what one optimizer step needs: parameters, buffers and optimizer state, plus the highest "
    "sum of tensor bytes allocated at any moment during forward, backward and the update. The input batch, the "
    "allocator's slack and the scratch space inside kernels are not in it{device}, so a process takes more than this "
    "in total. The larger of the local and the guided step counts for a method that takes both."
)
TIME_NOTE = (
    "Time per step ({time}) is the median over {rounds} rounds in which the steps of all methods take turns on the "
    "same batch, loading data not included; a method with local and guided steps is their mean weighted by its guided "
    "share."
)
REACH_NOTE = (
    "Time to {name} {goal} ({reach}) is the number of steps until a validation is as good as that, times the time per "
    "step (mean over seeds); “-” where the runs of a method, or of one seed, never are."
)
FLOPS_NOTE = (
    "FLOPs ({flops}) are those of the matrix products and convolutions of a step, auxiliary networks and recomputation "
    "included."
)


@dataclass(frozen=True, kw_only=True)
class MethodResult:
    """What was measured of one method: costs once, the judged quantity (:class:`Measure`) once per seed.

    Args:
        method: Name of the method.
        num_modules: Number of local modules, K.
        guided_share: Guided steps / all steps, between 0 and 1.
        test: The quantity of every seed on test data.
        validation: For every seed that on validation data after every epoch.
        losses: For every seed the mean training loss of every epoch, that of the last module.
        epoch_steps: Number of steps taken after every epoch.
        depth: For every seed that on test data through every auxiliary network, the backbone's own last.
        further: What is told beside it, of every seed, by its name in result.json.
        peak_bytes: Peak memory of one step in bytes, None if not measured.
        step_seconds: Time per step in seconds, None if not measured.
        step_flops: Floating-point operations per step, None if not counted.
        num_parameters: Parameters of the backbone.
        num_auxiliary_parameters: Parameters of the auxiliary networks.
        reference: Name of the method that its memory and time are relative to.
        baseline: Name of the method from which on the share of the gap closed is counted.
        rivals: Names of end-to-end training and of what a sceptic would train instead, of a row of PGL.
        steps: Number of steps of every run.
    """

    method: str
    num_modules: int
    guided_share: float
    test: tuple[float, ...]
    validation: tuple[tuple[float, ...], ...] = ()
    losses: tuple[tuple[float, ...], ...] = ()
    epoch_steps: tuple[int, ...] = ()
    depth: tuple[tuple[float, ...], ...] = ()
    further: Mapping[str, tuple[float | None, ...]] = field(default_factory=dict)
    peak_bytes: int | None = None
    step_seconds: float | None = None
    step_flops: float | None = None
    num_parameters: int = 0
    num_auxiliary_parameters: int = 0
    reference: str = "end-to-end"
    baseline: str = "local"
    rivals: tuple[str, ...] = ()
    steps: int = 0

    @property
    def mean(self) -> float:
        """Mean on test data over the seeds."""
        return statistics.fmean(self.test)

    @property
    def std(self) -> float | None:
        """Sample standard deviation (n - 1) on test data over the seeds, None for a single seed."""
        return statistics.stdev(self.test) if len(self.test) > 1 else None

    def seconds_to(self, measure: Measure, goal: float) -> float | None:
        """Time until a validation was as good as a goal, mean over seeds; None where one never was, or untimed."""
        found = [measure.reached(curve, goal) for curve in self.validation]
        if not found or None in found or self.step_seconds is None:
            return None
        return self.step_seconds * statistics.fmean(self.epoch_steps[index] for index in found if index is not None)


@dataclass(frozen=True, kw_only=True)
class Comparison:
    """Several methods side by side, and what was run.

    Args:
        title: Heading of the report.
        results: One result per method, in the order of the table.
        measure: What they are judged by.
        reach: Value of that which the time is told to; None: none.
        facts: What was run, as (name, value) pairs in the order of the report.
        configuration: The configuration as YAML text.
        command: The command that repeats the comparison.
        rounds: Number of interleaved rounds the time per step is the median of.
        device: "cpu", "cuda" or "mps".
    """

    title: str
    results: tuple[MethodResult, ...]
    measure: Measure = ACCURACY
    reach: float | None = None
    facts: tuple[tuple[str, str], ...] = ()
    configuration: str = ""
    command: str = ""
    rounds: int = 0
    device: str = "cpu"

    def baselines(self) -> dict[str, str]:
        """For every method the row from which its share of the gap is counted; where others start, that row itself."""
        starts = {result.baseline for result in self.results}
        return {r.method: r.method if r.method in starts and r.guided_share == 0 else r.baseline for r in self.results}

    def rows(self) -> list[Row]:
        """The lines of the table, with the ratios to end-to-end and the share of the gap closed."""
        by_name = {result.method: result for result in self.results}
        baselines = self.baselines()
        rows = []
        for result in self.results:
            reference, baseline = by_name.get(result.reference), by_name.get(baselines[result.method])
            gap = self._gap(reference, baseline) if reference and baseline else None
            won = self.measure.gain(result.mean, baseline.mean) if baseline else 0.0
            rows.append(
                Row(
                    method=result.method,
                    modules=result.num_modules,
                    guided_share=result.guided_share,
                    mean=result.mean,
                    std=result.std,
                    n=len(result.test),
                    further=tuple(one.value(result) for one in self.measure.further),
                    gap_closed=won / gap if gap else None,
                    peak_bytes=result.peak_bytes,
                    peak_ratio=_ratio(result.peak_bytes, reference.peak_bytes if reference else None),
                    step_ms=None if result.step_seconds is None else 1000 * result.step_seconds,
                    step_ratio=_ratio(result.step_seconds, reference.step_seconds if reference else None),
                    reach_seconds=None if self.reach is None else result.seconds_to(self.measure, self.reach),
                    flops_ratio=_ratio(result.step_flops, reference.step_flops if reference else None),
                    parameters_backbone=result.num_parameters,
                    parameters_auxiliary=result.num_auxiliary_parameters,
                )
            )
        return rows

    def notes(self) -> list[str]:
        """How to read the numbers, one sentence or two each."""
        measure = self.measure
        number = {one.key: i for i, one in enumerate(columns(measure, self.reach), start=1)}
        counts = sorted({len(result.test) for result in self.results})
        n = " or ".join(str(count) for count in counts)
        spread = (
            f"Test {measure.name} ({number['measure']}) is the mean over seeds (n = {n}, in brackets) ± the sample "
            "standard deviation"
            if counts[-1] > 1
            else f"Test {measure.name} ({number['measure']}) is of a single seed (n = 1), so no spread is given"
        )
        notes = [
            spread
            + f"; the weights are those of the epoch with the best validation {measure.name}, and the test set is "
            "evaluated once, at the end.",
            *(one.note.format(number=number[one.name]) for one in measure.further if one.note),
            f"Gap closed ({number['gap']}) is the share of {measure.gap}: 0 % is local, or the baseline that the "
            "method names, 100 % is end-to-end; “-” where no such gap was measured: with a single seed, or a gap no "
            "larger than the spread of the two over seeds.",
            f"K ({number['modules']}) is the number of local modules, guided ({number['guided']}) the share of steps "
            "that train on the global loss through the whole network; memory, time and FLOPs with × "
            f"({number['peak ratio']}, {number['time ratio']}, {number['flops']}) are relative to end-to-end.",
        ]
        if any(result.peak_bytes is not None for result in self.results):
            device = "" if self.device == "cpu" else " unless the device's own counter includes them"
            notes.append(MEMORY_NOTE.format(device=device, **number))
        if any(result.step_flops is not None for result in self.results):
            notes.append(FLOPS_NOTE.format(**number))
        if any(result.step_seconds is not None for result in self.results):
            notes.append(TIME_NOTE.format(rounds=self.rounds, **number))
        if self.reach is not None:
            notes.append(REACH_NOTE.format(name=measure.name, goal=measure.number(self.reach) + measure.unit, **number))
        return notes

    def _gap(self, reference: MethodResult, baseline: MethodResult) -> float | None:
        """What a baseline loses; None where the seeds cannot tell."""
        gap = self.measure.gain(reference.mean, baseline.mean)
        return gap if gap > 0 and can_tell(reference, baseline) else None


def can_tell(a: MethodResult, b: MethodResult) -> bool:
    """Whether two means differ by more than the spread of the two over seeds; of single seeds never."""
    if a.std is None or b.std is None:
        return False
    return abs(a.mean - b.mean) > math.hypot(a.std, b.std)


def _ratio(value: float | None, reference: float | None) -> float | None:
    return None if value is None or not reference else value / reference
