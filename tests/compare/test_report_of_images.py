"""The report of a comparison of images, byte for byte: what other kinds of data add must not change it."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from torchlocal.compare.figures import draw_figures
from torchlocal.compare.report import csv_table, html_report, markdown_report
from torchlocal.compare.results import Comparison, MethodResult

KEPT = Path(__file__).parent / "report_of_images"
RIVALS = ("end-to-end", "recomputed", "micro-batches", "equal-time")
COSTS: dict[str, tuple[int, float, float]] = {  # bytes, seconds and FLOPs of a step
    "end-to-end": (40_000_000, 0.1, 3e9),
    "recomputed": (11_000_000, 0.181, 3.9e9),
    "micro-batches": (9_000_000, 0.11, 3e9),
    "equal-time": (40_000_000, 0.1, 3e9),
    "local": (10_000_000, 0.12, 4e9),
    "pgl": (10_900_000, 0.1234, 4.2e9),
    "few": (15_000_000, 0.11, 3.5e9),
}
ACCURACIES = {
    "end-to-end": (0.79, 0.81),
    "recomputed": (0.79, 0.81),
    "micro-batches": (0.75, 0.75),
    "equal-time": (0.76, 0.78),
    "local": (0.7, 0.72),
    "pgl": (0.75, 0.771),
    "few": (0.74, 0.733),
}


def made(num_seeds: int, *methods: str, costs: bool = True) -> Comparison:
    """A comparison by hand."""
    results = []
    for i, method in enumerate(methods):
        found = ACCURACIES[method][:num_seeds]
        modules = {"local": 4, "pgl": 4, "few": 2}.get(method, 1)
        given: dict[str, Any] = {}
        if costs:
            given = dict(zip(("peak_bytes", "step_seconds", "step_flops"), COSTS[method], strict=True))
        results.append(
            MethodResult(
                method=method,
                num_modules=modules,
                guided_share={"local": 0.0, "pgl": 0.2, "few": 0.5}.get(method, 1.0),
                test=found,
                validation=tuple((value - 0.2, value - 0.1, value + 0.01) for value in found),
                losses=tuple((2.0 + i, 1.5, 1.2 - seed / 10) for seed in range(num_seeds)),
                epoch_steps=(10, 20, 30),
                depth=tuple(tuple(value * (k + 1) / modules for k in range(modules)) for value in found),
                num_parameters=272_474,
                num_auxiliary_parameters=0 if modules == 1 else 12_345 * modules,
                rivals=RIVALS if method == "pgl" else (),
                steps=36 if method == "equal-time" else 30,
                **given,
            )
        )
    return Comparison(
        title="resnet20 on digits, K = 4",
        results=tuple(results),
        facts=(("Data", "digits"), ("Seeds", ", ".join(map(str, range(num_seeds))))),
        configuration="cut:\n  modules: 4\n",
        command="torchlocal compare --config compare.yaml --out NEW_FOLDER",
        rounds=10,
    )


CASES = {
    "seeds": made(2, *ACCURACIES),
    "seed": made(1, "end-to-end", "local", "pgl", costs=False),
}


def drawn(comparison: Comparison) -> dict[str, Any]:
    """What the figures say: words, and the points of all lines."""
    found = {}
    for name, figure in draw_figures(comparison).items():
        (axes,) = figure.axes
        labels = [text.get_text() for text in figure.legends[0].get_texts()]
        lines = [[round(float(v), 6) for v in line.get_xydata().ravel()] for line in axes.lines]
        scales = [axes.get_xscale(), axes.get_yscale()]
        found[name] = [axes.get_title(loc="left"), axes.get_xlabel(), axes.get_ylabel(), scales, labels, lines]
    return found


def written(comparison: Comparison) -> dict[str, str]:
    """The report's files by name."""
    figures = drawn(comparison)
    return {
        "report.md": markdown_report(comparison, [f"figures/{name}.png" for name in figures]),
        "report.csv": csv_table(comparison),
        "report.html": html_report(comparison, dict.fromkeys(figures, b"<svg></svg>")),
        "figures.json": json.dumps(figures, indent=0),
    }


def test_it_is_what_it_was() -> None:
    for case, comparison in CASES.items():
        for name, content in written(comparison).items():
            assert content == (KEPT / case / name).read_text(encoding="utf-8"), (case, name)
