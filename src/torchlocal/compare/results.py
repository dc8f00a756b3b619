"""What a comparison has measured, and the lines of its table."""

from __future__ import annotations

import math
import statistics
from dataclasses import dataclass

__all__ = ["Comparison", "MethodResult", "Row", "can_tell"]

MEMORY_NOTE = (
    "Peak memory (6) is what one optimizer step needs: parameters, buffers and optimizer state, plus the highest sum "
    "of tensor bytes allocated at any moment during forward, backward and the update. The input batch, the allocator's "
    "slack and the scratch space inside kernels are not in it{device}, so a process takes more than this in total. The "
    "larger of the local and the guided step counts for a method that takes both."
)
TIME_NOTE = (
    "Time per step (8) is the median over {rounds} rounds in which the steps of all methods take turns on the same "
    "batch, loading data not included; a method with local and guided steps is their mean weighted by its guided share."
)
FLOPS_NOTE = (
    "FLOPs (10) are those of the matrix products and convolutions of a step, auxiliary networks and recomputation "
    "included."
)


@dataclass(frozen=True, kw_only=True)
class MethodResult:
    """What was measured of one method: costs once, accuracies once per seed.

    Args:
        method: Name of the method.
        num_modules: Number of local modules, K.
        guided_share: Guided steps / all steps, between 0 and 1.
        accuracies: Test accuracy of every seed, between 0 and 1.
        validation: For every seed the validation accuracy after every epoch.
        losses: For every seed the mean training loss of every epoch, that of the last module.
        epoch_steps: Number of steps taken after every epoch.
        depth_accuracies: For every seed the test accuracy through every auxiliary network, the backbone's own last.
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
    accuracies: tuple[float, ...]
    validation: tuple[tuple[float, ...], ...] = ()
    losses: tuple[tuple[float, ...], ...] = ()
    epoch_steps: tuple[int, ...] = ()
    depth_accuracies: tuple[tuple[float, ...], ...] = ()
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
    def accuracy(self) -> float:
        """Mean test accuracy over the seeds."""
        return statistics.fmean(self.accuracies)

    @property
    def accuracy_std(self) -> float | None:
        """Sample standard deviation (n - 1) of the test accuracy over the seeds, None for a single seed."""
        return statistics.stdev(self.accuracies) if len(self.accuracies) > 1 else None


@dataclass(frozen=True, kw_only=True)
class Row:
    """One line of the comparison table; None where there is nothing to state."""

    method: str
    modules: int
    guided_share: float
    accuracy_mean: float
    accuracy_std: float | None
    n: int
    gap_closed: float | None
    peak_bytes: int | None
    peak_ratio: float | None
    step_ms: float | None
    step_ratio: float | None
    flops_ratio: float | None
    parameters_backbone: int
    parameters_auxiliary: int


@dataclass(frozen=True, kw_only=True)
class Comparison:
    """Several methods side by side, and what was run.

    Args:
        title: Heading of the report.
        results: One result per method, in the order of the table.
        facts: What was run, as (name, value) pairs in the order of the report.
        configuration: The configuration as YAML text.
        command: The command that repeats the comparison.
        rounds: Number of interleaved rounds the time per step is the median of.
        device: "cpu", "cuda" or "mps".
    """

    title: str
    results: tuple[MethodResult, ...]
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
            gap = _gap(reference, baseline) if reference and baseline else None
            rows.append(
                Row(
                    method=result.method,
                    modules=result.num_modules,
                    guided_share=result.guided_share,
                    accuracy_mean=result.accuracy,
                    accuracy_std=result.accuracy_std,
                    n=len(result.accuracies),
                    gap_closed=(result.accuracy - baseline.accuracy) / gap if baseline and gap else None,
                    peak_bytes=result.peak_bytes,
                    peak_ratio=_ratio(result.peak_bytes, reference.peak_bytes if reference else None),
                    step_ms=None if result.step_seconds is None else 1000 * result.step_seconds,
                    step_ratio=_ratio(result.step_seconds, reference.step_seconds if reference else None),
                    flops_ratio=_ratio(result.step_flops, reference.step_flops if reference else None),
                    parameters_backbone=result.num_parameters,
                    parameters_auxiliary=result.num_auxiliary_parameters,
                )
            )
        return rows

    def notes(self) -> list[str]:
        """How to read the numbers, one sentence or two each."""
        counts = sorted({len(result.accuracies) for result in self.results})
        n = " or ".join(str(count) for count in counts)
        spread = (
            f"Test accuracy (4) is the mean over seeds (n = {n}, in brackets) ± the sample standard deviation"
            if counts[-1] > 1
            else "Test accuracy (4) is of a single seed (n = 1), so no spread is given"
        )
        notes = [
            spread + "; the weights are those of the epoch with the best validation accuracy, and the test set is "
            "evaluated once, at the end.",
            "Gap closed (5) is the share of the accuracy that local training loses against end-to-end training and the "
            "method wins back: 0 % is local, or the baseline that the method names, 100 % is end-to-end; “-” where no "
            "such gap was measured: with a single seed, or a gap no larger than the spread of the two over seeds.",
            "K (2) is the number of local modules, guided (3) the share of steps that train on the global loss through "
            "the whole network; memory, time and FLOPs with × (7, 9, 10) are relative to end-to-end.",
        ]
        if any(result.peak_bytes is not None for result in self.results):
            device = "" if self.device == "cpu" else " unless the device's own counter includes them"
            notes.append(MEMORY_NOTE.format(device=device))
        if any(result.step_flops is not None for result in self.results):
            notes.append(FLOPS_NOTE)
        if any(result.step_seconds is not None for result in self.results):
            notes.append(TIME_NOTE.format(rounds=self.rounds))
        return notes


def _gap(reference: MethodResult, baseline: MethodResult) -> float | None:
    """What a baseline loses; None where the seeds cannot tell."""
    gap = reference.accuracy - baseline.accuracy
    return gap if gap > 0 and can_tell(reference, baseline) else None


def can_tell(a: MethodResult, b: MethodResult) -> bool:
    """Whether two mean accuracies differ by more than the spread of the two over seeds; of single seeds never."""
    if a.accuracy_std is None or b.accuracy_std is None:
        return False
    return abs(a.accuracy - b.accuracy) > math.hypot(a.accuracy_std, b.accuracy_std)


def _ratio(value: float | None, reference: float | None) -> float | None:
    return None if value is None or not reference else value / reference
