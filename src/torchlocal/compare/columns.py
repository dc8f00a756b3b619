"""The rows and columns of a comparison's table, and how numbers are written for people."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

from torchlocal.compare.measures import Measure

__all__ = ["Column", "Row", "columns", "format_bytes", "format_count", "format_seconds"]


def format_bytes(num_bytes: float) -> str:
    """Bytes for people: `format_bytes(3 * 2**20) == "3.0 MiB"`."""
    for unit in ("B", "KiB", "MiB", "GiB"):
        if abs(num_bytes) < 1000 or unit == "GiB":
            return f"{num_bytes:.0f} B" if unit == "B" else f"{num_bytes:.{0 if abs(num_bytes) >= 100 else 1}f} {unit}"
        num_bytes /= 1024
    raise AssertionError("unreachable")


def format_count(count: float) -> str:
    """Counts for people: `format_count(272_474) == "272 k"`."""
    for size, suffix in ((1e12, " T"), (1e9, " G"), (1e6, " M"), (1e3, " k")):
        if abs(count) >= size:
            value = count / size
            return f"{value:.{0 if value >= 100 else 1 if value >= 10 else 2}f}{suffix}"
    return f"{count:.0f}"


def format_seconds(seconds: float) -> str:
    """Seconds for people: `format_seconds(90) == "90 s"`."""
    if seconds < 100:
        return f"{seconds:.{0 if seconds >= 10 else 1}f} s"
    return f"{seconds / 60:.0f} min" if seconds < 6000 else f"{seconds / 3600:.1f} h"


@dataclass(frozen=True, kw_only=True)
class Row:
    """One line of the comparison table; None where there is nothing to state.

    ``mean`` and ``std`` are those of the judged quantity, ``further`` what its :class:`Measure` tells beside it.
    """

    method: str
    modules: int
    guided_share: float
    mean: float
    std: float | None
    n: int
    further: tuple[float | None, ...]
    gap_closed: float | None
    peak_bytes: int | None
    peak_ratio: float | None
    step_ms: float | None
    step_ratio: float | None
    reach_seconds: float | None
    flops_ratio: float | None
    parameters_backbone: int
    parameters_auxiliary: int


@dataclass(frozen=True, kw_only=True)
class Column:
    """One column.

    Args:
        key: what notes call it by, to tell its number.
        header: as it is shown.
        cell: of a row.
        right: whether it is aligned to the right.
        narrow: whether it is also shown in a terminal.
    """

    key: str
    header: str
    cell: Callable[[Row], str]
    right: bool = True
    narrow: bool = True


def columns(measure: Measure, reach: float | None = None) -> list[Column]:
    """The columns of a comparison that is judged by a measure, with the time to reach a goal if there is one."""

    def further(index: int, form: str) -> Callable[[Row], str]:
        return lambda row: _optional(row.further[index], lambda value: f"{value:{form}}")

    told = [
        Column(key=one.name, header=one.header, cell=further(index, one.form), narrow=one.narrow)
        for index, one in enumerate(measure.further)
    ]
    goal = [
        Column(
            key="reach",
            header=f"Time to {measure.name} {measure.number(reach)}{measure.unit}",
            cell=lambda row: _optional(row.reach_seconds, format_seconds),
        )
        for reach in ([] if reach is None else [reach])
    ]
    return [
        Column(key="method", header="Method", cell=lambda row: row.method, right=False),
        Column(key="modules", header="K", cell=lambda row: str(row.modules)),
        Column(key="guided", header="Guided", cell=lambda row: _per_cent(row.guided_share)),
        Column(key="measure", header=measure.header, cell=lambda row: f"{measure.number(row.mean, row.std)} ({row.n})"),
        *told,
        Column(key="gap", header="Gap closed", cell=lambda row: _optional(row.gap_closed, _per_cent)),
        Column(key="peak", header="Peak memory", cell=lambda row: _optional(row.peak_bytes, format_bytes)),
        Column(key="peak ratio", header="Memory ×", cell=lambda row: _optional(row.peak_ratio, _ratio)),
        Column(key="time", header="Time/step", cell=lambda row: _optional(row.step_ms, _milliseconds)),
        Column(key="time ratio", header="Time ×", cell=lambda row: _optional(row.step_ratio, _ratio)),
        *goal,
        Column(key="flops", header="FLOPs ×", cell=lambda row: _optional(row.flops_ratio, _ratio)),
        Column(
            key="parameters",
            header="Parameters (+ auxiliary)",
            cell=lambda row: f"{format_count(row.parameters_backbone)} + {format_count(row.parameters_auxiliary)}",
        ),
    ]


def _optional(value: float | None, text: Callable[[float], str]) -> str:
    return "-" if value is None else text(value)


def _per_cent(value: float) -> str:
    return f"{100 * value:.0f} %"


def _ratio(value: float) -> str:
    return f"{value:.2f}"


def _milliseconds(value: float) -> str:
    return f"{value:.{0 if value >= 100 else 1}f} ms"
