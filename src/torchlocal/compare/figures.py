"""Figures of a comparison: what is judged over epochs or steps, against memory, guided share, and by depth."""

from __future__ import annotations

import statistics
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING

from torchlocal.compare.measures import Measure
from torchlocal.compare.results import Comparison, MethodResult

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

__all__ = ["FigureText", "draw_figures", "figure_texts"]

MEBIBYTE = 2**20
_SIZE = (5.0, 3.9)  # inches: as wide as a telephone, so that text is legible there
# Okabe and Ito's palette: told apart by colour-blind readers as well; the markers tell the methods apart in grey.
_COLOURS = ("#000000", "#D55E00", "#0072B2", "#009E73", "#CC79A7", "#E69F00", "#56B4E9", "#7F7F7F")
_MARKERS = ("s", "D", "o", "^", "v", "P", "X", "*")


def _axes(figure: Figure, *, xlabel: str, ylabel: str) -> Axes:
    axes = figure.add_subplot()
    axes.set_xlabel(xlabel)
    axes.set_ylabel(ylabel)
    axes.grid(True, color="#DDDDDD", linewidth=0.8)
    axes.set_axisbelow(True)
    axes.spines[["top", "right"]].set_visible(False)
    return axes


def _style(index: int) -> tuple[str, str]:
    return _COLOURS[index % len(_COLOURS)], _MARKERS[(index + index // len(_COLOURS)) % len(_MARKERS)]


def _means(series: Sequence[Sequence[float]]) -> list[float]:
    """Mean over seeds at every position; positions that some seed lacks are left out."""
    return [statistics.fmean(values) for values in zip(*series, strict=False)]


def _draw_curves(
    axes: Axes,
    comparison: Comparison,
    curves: Callable[[MethodResult], Sequence[Sequence[float]]],
    position: Callable[[MethodResult, int], float],
    *,
    same: Sequence[str],
) -> bool:
    """A line for every method, the mean over seeds, and a thin one for every seed; those in ``same`` are dashed."""
    drawn = False
    for index, result in enumerate(comparison.results):
        series = curves(result)
        if not any(series):
            continue
        colour, marker = _style(index)
        mean = _means(series)
        positions = [position(result, epoch) for epoch in range(1, max(map(len, series)) + 1)]
        if len(series) > 1:
            for seed in series:
                axes.plot(positions[: len(seed)], seed, color=colour, alpha=0.25, lw=0.9)
        axes.plot(
            positions[: len(mean)],
            mean,
            color=colour,
            marker=marker,
            markersize=5,
            markevery=max(1, len(mean) // 10),
            lw=1.8,
            label=result.method,
            linestyle="--" if result.method in same else "-",  # lets the line below show
        )
        drawn = True
    return drawn


_SAME = ("checkpointing", "recomputed")  # as end-to-end, but for memory and time


def _draw_validation(figure: Figure, comparison: Comparison) -> bool:
    return _draw_across(figure, comparison, f"Validation {comparison.measure.axis}", _validation(comparison))


def _draw_loss(figure: Figure, comparison: Comparison) -> bool:
    return _draw_across(figure, comparison, "Training loss", lambda result: result.losses)


def _draw_across(
    figure: Figure, comparison: Comparison, ylabel: str, curves: Callable[[MethodResult], Sequence[Sequence[float]]]
) -> bool:
    """Curves over epochs, or over steps."""
    steps = comparison.measure.across == "steps"
    axes = _axes(figure, xlabel="Step" if steps else "Epoch", ylabel=ylabel)
    _integer_axis(axes)

    def position(result: MethodResult, epoch: int) -> float:
        return result.epoch_steps[epoch - 1] if steps else epoch

    return _draw_curves(axes, comparison, curves, position, same=_SAME)


def _draw_time(figure: Figure, comparison: Comparison) -> bool:
    axes = _axes(figure, xlabel="Training time (s)", ylabel=f"Validation {comparison.measure.axis}")
    timed = [result for result in comparison.results if result.step_seconds and result.epoch_steps]

    def seconds(result: MethodResult, epoch: int) -> float:
        return (result.step_seconds or 0.0) * result.epoch_steps[epoch - 1]

    return _draw_curves(axes, replace(comparison, results=tuple(timed)), _validation(comparison), seconds, same=())


def _validation(comparison: Comparison) -> Callable[[MethodResult], list[list[float]]]:
    """The curves of each seed, as they are drawn."""
    scale = comparison.measure.scale
    return lambda result: [[scale * value for value in seed] for seed in result.validation]


def _groups(comparison: Comparison) -> dict[str, list[MethodResult]]:
    """Local and guided rows by what they start from: in one group where only the share differs, else each by itself."""
    by_name = {result.method: result for result in comparison.results}
    lines: dict[str, dict[str, MethodResult]] = {}
    for method, baseline in comparison.baselines().items():
        if by_name[method].guided_share < 1:
            line = lines.setdefault(baseline, {})
            line |= {name: by_name[name] for name in (baseline, method) if name in by_name}
    groups: dict[str, list[MethodResult]] = {}
    for name, line in lines.items():
        ordered = sorted(line.values(), key=lambda result: result.guided_share)
        if len({result.guided_share for result in ordered}) == len(ordered) > 1:
            groups[f"from {name}"] = ordered
        else:
            groups |= {result.method: [result] for result in ordered}
    return groups


def _draw_memory(figure: Figure, comparison: Comparison) -> bool:
    axes = _axes(figure, xlabel="Peak memory of one step (MiB)", ylabel=f"Test {comparison.measure.axis}")
    measured = [result for result in comparison.results if result.peak_bytes is not None]
    groups = _groups(replace(comparison, results=tuple(measured)))
    lines = {name: results for name, results in groups.items() if len(results) > 1}
    lines = lines if len(lines) > 1 else {}  # one line alone says no more than its points
    joined = {result.method for results in lines.values() for result in results}
    singles = [result for result in measured if result.method not in joined]
    groups = {f"{result.method} (K = {result.num_modules})": [result] for result in singles} | lines
    for index, (name, results) in enumerate(groups.items()):
        colour, marker = _style(index)
        memory = [(result.peak_bytes or 0) / MEBIBYTE for result in results]
        means = [comparison.measure.scale * result.mean for result in results]
        axes.errorbar(
            memory,
            means,
            yerr=_spread(results, comparison.measure),
            color=colour,
            marker=marker,
            markersize=9,
            capsize=4,
            linestyle="-" if len(results) > 1 else "none",
            label=name,
        )
        if len(results) > 1:  # where the line starts; errorbar draws its own marker above other lines
            axes.plot(memory[0], means[0], marker, color=colour, mfc="white", ms=9, zorder=3)
    axes.margins(0.12)
    axes.set_xlim(left=0)
    return bool(measured)


def _spread(results: Sequence[MethodResult], measure: Measure) -> list[float] | None:
    """Standard deviations as they are drawn; None where there is a single seed."""
    found = [result.std for result in results]
    return None if all(std is None for std in found) else [measure.scale * (std or 0) for std in found]


def _draw_depth(figure: Figure, comparison: Comparison) -> bool:
    name, drawn_as = comparison.measure.by_depth
    axes = _axes(figure, xlabel="Local module (the last is the backbone itself)", ylabel=f"Test {name}")
    drawn = False
    for index, result in enumerate(comparison.results):
        depth = [drawn_as(value) for value in _means(result.depth)]
        colour, marker = _style(index)
        if len(depth) == 1:  # one module: no depth to speak of, but a level to compare the others with
            linestyle = (0, (1, 3)) if result.method == "checkpointing" else (0, (5, 3))
            axes.axhline(depth[0], color=colour, linestyle=linestyle, lw=1.4, label=result.method)
        elif depth:
            axes.plot(range(1, len(depth) + 1), depth, color=colour, marker=marker, ms=5, lw=1.8, label=result.method)
            drawn = True
    _integer_axis(axes)
    return drawn


def _draw_guidance(figure: Figure, comparison: Comparison) -> bool:
    axes = _axes(figure, xlabel="Guided steps (% of all steps)", ylabel=f"Test {comparison.measure.axis}")
    scale = comparison.measure.scale
    groups = _groups(comparison)
    by_name = {result.method: result for result in comparison.results}
    drawn_rows = [result for results in groups.values() for result in results]
    levels = {r.reference: by_name[r.reference] for r in drawn_rows if r.reference in by_name}
    drawn = len({result.guided_share for result in drawn_rows}) > 2
    for index, (name, results) in enumerate(groups.items()):
        colour, marker = _style(index)
        axes.errorbar(
            [100 * result.guided_share for result in results],
            [scale * result.mean for result in results],
            yerr=_spread(results, comparison.measure),
            color=colour,
            marker=marker,
            markersize=7,
            capsize=4,
            lw=1.8,
            label=name,
        )
    for index, (name, result) in enumerate(levels.items(), start=len(groups)):
        axes.axhline(scale * result.mean, color=_style(index)[0], linestyle=(0, (5, 3)), lw=1.4, label=name)
    return drawn


def _integer_axis(axes: Axes) -> None:
    from matplotlib.ticker import MaxNLocator

    axes.xaxis.set_major_locator(MaxNLocator(integer=True, min_n_ticks=1))


@dataclass(frozen=True, kw_only=True)
class FigureText:
    """A figure: what draws it (telling whether there was anything to draw), its title and its caption."""

    draw: Callable[[Figure, Comparison], bool]
    title: str
    caption: str


def figure_texts(measure: Measure) -> dict[str, FigureText]:
    """The figures by name, in the order of the report."""
    validation, test, training = f"Validation {measure.name}", f"Test {measure.name}", "Training loss"
    lines = "as a thick line, single seeds as thin ones."
    bars = "(mean over seeds, bars: one standard deviation)"
    better = "down" if measure.lower else "up"
    depth = f"Test {measure.by_depth[0].partition(' (')[0]} by depth"
    return {
        measure.curve: FigureText(
            draw=_draw_validation,
            title=f"{validation} over {measure.across}",
            caption=f"{validation} over {measure.across}: mean over seeds {lines}",
        ),
        "time": FigureText(
            draw=_draw_time,
            title=f"{validation} over training time",
            caption=f"{validation} over training time: number of steps times the measured time per step, without "
            f"validation and the loading of data. Mean over seeds {lines}",
        ),
        "loss": FigureText(
            draw=_draw_loss,
            title=f"{training} over {measure.across}",
            caption=f"{training} over {measure.across}, of local and guided methods that of the last module: mean over "
            f"seeds {lines}",
        ),
        "memory": FigureText(
            draw=_draw_memory,
            title=f"{test} against peak memory",
            caption=f"{test} {bars} against the peak memory of one step: {better} and left is better. Where points "
            "are joined, the line leads from local training (hollow) to guided.",
        ),
        "guidance": FigureText(
            draw=_draw_guidance,
            title=f"{test} against guided share",
            caption=f"{test} {bars} against the share of guided steps: each line starts at local training; dashed: "
            "end-to-end.",
        ),
        "depth": FigureText(
            draw=_draw_depth,
            title=depth,
            caption=f"{depth}, mean over seeds: what each local module predicts through its auxiliary network, and at "
            "the end the backbone itself. Dashed: methods with a single module.",
        ),
    }


def draw_figures(comparison: Comparison) -> dict[str, Figure]:
    """The figures of the comparison by name; those with nothing to show are left out."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figures = {}
    for name, text in figure_texts(comparison.measure).items():
        figure = Figure(figsize=_SIZE, layout="constrained")
        FigureCanvasAgg(figure)  # no pyplot: nothing global is touched and no display is needed
        if text.draw(figure, comparison):
            axes = figure.axes[0]
            axes.set_title(text.title, loc="left", fontsize="medium")
            labels = axes.get_legend_handles_labels()[1]
            # The figure is about 62 characters wide, and a handle with its gaps takes 6 of them.
            num_columns = max(1, min(4, len(labels), 62 // (max(map(len, labels)) + 6)))
            figure.legend(loc="outside lower center", ncols=num_columns, frameon=False)  # where it can hide nothing
            figures[name] = figure
    return figures
