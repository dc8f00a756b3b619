"""The comparison: every number of its report recomputed from the runs, and interruptions that change nothing."""

import base64
import csv
import json
import math
import os
import re
import signal
import struct
from collections.abc import Callable
from dataclasses import replace
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from torch import nn

from torchlocal.compare import circumstances, comparison
from torchlocal.compare.circumstances import Measured
from torchlocal.compare.comparison import METHODS, CompareConfig, method_configs
from torchlocal.compare.costs import StepCosts
from torchlocal.compare.figures import draw_figures
from torchlocal.compare.methods import RIVALS
from torchlocal.compare.report import format_bytes, format_count, markdown_table, write_report
from torchlocal.compare.results import Comparison, MethodResult, Row
from torchlocal.compare.verdict import verdict
from torchlocal.run import trainer
from torchlocal.run.branches import find_branches
from torchlocal.run.build import learning_rate, train_step
from torchlocal.run.config import FitConfig, GuidanceConfig
from torchlocal.run.own import Own
from torchlocal.run.trainer import Interrupted

SEEDS = (0, 1)
FOUR = ("end-to-end", "checkpointing", "local", "pgl")
TIMED = ("step_ms", "step_ratio")


def small_net(num_classes: int, in_channels: int, size: tuple[int, int]) -> nn.Module:
    """Three convolutions with BatchNorm, and dropout."""
    layers: list[nn.Module] = []
    for before, after in ((in_channels, 8), (8, 16), (16, 16)):
        layers += [nn.Conv2d(before, after, 3, 1, 1), nn.BatchNorm2d(after), nn.ReLU()]
    return nn.Sequential(*layers, nn.Dropout(0.1), nn.AdaptiveAvgPool2d(2), nn.Flatten(), nn.Linear(64, num_classes))


def compare(config: CompareConfig, **options: Any) -> Comparison:
    """With the small network, called "small", in place of one by name."""
    own = {"model": small} if config.fit.model.name == SMALL else {}
    return comparison.compare(config, **own, **options)


def small() -> nn.Module:
    return small_net(10, 1, (8, 8))


SMALL = "own:small"


def small_config(out: Path, **changes: Any) -> CompareConfig:
    """All four methods, two seeds; 3 epochs of 8 steps on digits."""
    fit = FitConfig.of(
        model=SMALL,
        modules=3,
        guidance=GuidanceConfig(period=3),
        data="digits",
        num_train=256,
        num_validation=64,
        epochs=3,
        batch_size=32,
        lr=0.05,
        precision="fp32",
        num_threads=1,
        tensorboard=False,
    )
    options = {
        name: changes.pop(name) for name in ("methods", "seeds", "variants", "timing_rounds", "grid") if name in changes
    }
    values: dict[str, Any] = {
        "out": str(out),
        "methods": FOUR,
        "seeds": SEEDS,
        "timing_rounds": 2,
        "fit": fit.changed(**changes),
    }
    return CompareConfig(**(values | options))


@pytest.fixture(scope="module")
def done(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Comparison]:
    """One finished comparison."""
    out = tmp_path_factory.mktemp("compare") / "done"
    return out, compare(small_config(out), progress=False)


def read_results(out: Path) -> dict[str, list[dict[str, Any]]]:
    results = {
        method: [json.loads((out / method / f"seed{seed}" / "result.json").read_text()) for seed in SEEDS]
        for method in ("end-to-end", "local", "pgl")
    }
    return {method: results[method.replace("checkpointing", "end-to-end")] for method in FOUR}


def read_rows(out: Path) -> list[dict[str, str]]:
    with (out / "report.csv").open(newline="") as file:
        return list(csv.DictReader(file))


def without_times(value: Any) -> Any:
    """A result without what the clock and the place decide."""
    if isinstance(value, dict):
        times = ("seconds", "images_per_second", "out")
        return {key: without_times(item) for key, item in value.items() if key not in times}
    return [without_times(item) for item in value] if isinstance(value, list) else value


def run_files(out: Path) -> dict[Path, int]:
    """When every file of the runs, and of the costs, was last written."""
    paths = [*out.glob("*/seed*/*"), out / "costs.json"]
    return {path: path.stat().st_mtime_ns for path in paths if path.is_file()}


class Units:
    """Circumstances by hand: units of every network, or of each; a third more time than end-to-end."""

    def __init__(self, units: int | dict[str, int]) -> None:
        self.units = units

    def num_units(self, model: str) -> int:
        return self.units if isinstance(self.units, int) else self.units[model]

    def bytes_of_a_step(self, pgl: FitConfig, end_to_end: FitConfig) -> int:
        assert (pgl.cut.modules, end_to_end.guidance.name) == (3, "always")
        return 12_345

    def steps_in_time(self, pgl: FitConfig, end_to_end: FitConfig) -> int:
        assert (pgl.cut.modules, end_to_end.guidance.name) == (3, "always")
        return 32


# --- numbers ---


def expected_rows(out: Path) -> dict[str, dict[str, float | None]]:
    """The table, from result.json and costs.json with arithmetic written out."""
    results, costs = read_results(out), json.loads((out / "costs.json").read_text())["costs"]
    mean = {method: sum(r["test_accuracy"] for r in runs) / len(runs) for method, runs in results.items()}
    gap = mean["end-to-end"] - mean["local"]
    spread = math.sqrt(
        sum((r["test_accuracy"] - mean[m]) ** 2 for m in ("end-to-end", "local") for r in results[m])  # two seeds
    )
    rows: dict[str, dict[str, float | None]] = {}
    for method, runs in results.items():
        share = sum(r["guided_steps"] / r["steps"] for r in runs) / len(runs)
        seconds, cost = costs[method]["seconds"], costs[method]
        rows[method] = {
            "modules": 1 if method in ("end-to-end", "checkpointing") else 3,
            "guided_share": share,
            "accuracy_mean": mean[method],
            "accuracy_std": math.sqrt(sum((r["test_accuracy"] - mean[method]) ** 2 for r in runs) / (len(runs) - 1)),
            "n": len(runs),
            "gap_closed": (mean[method] - mean["local"]) / gap if gap > spread else None,
            "peak_bytes": cost["resident_bytes"] + max(cost["peak_bytes"].values()),
            "step_ms": 1000 * ((1 - share) * seconds.get("local", 0.0) + share * seconds.get("guided", 0.0)),
            "flops": (1 - share) * cost["flops"].get("local", 0) + share * cost["flops"].get("guided", 0),
        }
    for row in rows.values():
        row["peak_ratio"] = row["peak_bytes"] / rows["end-to-end"]["peak_bytes"]  # type: ignore[operator]
        row["step_ratio"] = row["step_ms"] / rows["end-to-end"]["step_ms"]  # type: ignore[operator]
        row["flops_ratio"] = row["flops"] / rows["end-to-end"]["flops"]  # type: ignore[operator]
    for row in rows.values():
        del row["flops"]
    return rows


def test_flops_are_those_of_the_layers(done: tuple[Path, Comparison]) -> None:
    out, _ = done
    costs = json.loads((out / "costs.json").read_text())["costs"]
    # Digits are 8×8; 2 operations per multiplication, 32 images. Backward: gradients of inputs and of weights, without
    # that of the image.
    convolutions = [2 * 32 * 64 * 9 * a * b for a, b in ((1, 8), (8, 16), (16, 16))]
    linear = 2 * 32 * 64 * 10
    assert costs["end-to-end"]["flops"] == {"guided": 3 * (sum(convolutions) + linear) - convolutions[0]}
    assert costs["checkpointing"]["flops"]["guided"] > costs["end-to-end"]["flops"]["guided"]
    assert set(costs["pgl"]["flops"]) == {"local", "guided"}


def test_csv_holds_what_the_runs_give(done: tuple[Path, Comparison]) -> None:
    out, _ = done
    rows, expected = read_rows(out), expected_rows(out)
    assert [row["method"] for row in rows] == list(FOUR)
    for row in rows:
        for name, value in expected[row["method"]].items():
            if value is None:
                assert row[name] == "", (row["method"], name)
            else:
                assert float(row[name]) == pytest.approx(value, rel=1e-9), (row["method"], name)
    backbone = sum(p.numel() for p in small_net(10, 1, (8, 8)).parameters())
    assert all(int(row["parameters_backbone"]) == backbone for row in rows)
    assert [int(row["parameters_auxiliary"]) > 0 for row in rows] == [False, False, True, True]
    assert {row["method"]: float(row["guided_share"]) for row in rows} == pytest.approx(
        {"end-to-end": 1, "checkpointing": 1, "local": 0, "pgl": 1 / 3}
    )
    # The training worked, and accuracies differ between seeds: else the mean and the deviation would prove little.
    assert float(rows[0]["accuracy_mean"]) > 0.3
    assert any(float(row["accuracy_std"]) > 0 for row in rows)
    assert float(rows[1]["peak_bytes"]) < float(rows[0]["peak_bytes"])  # checkpointing saves memory


def test_markdown_holds_the_same_rounded(done: tuple[Path, Comparison]) -> None:
    out, _ = done
    lines = (out / "report.md").read_text().splitlines()
    start = next(i for i, line in enumerate(lines) if line.startswith("| 1 Method"))
    cells = [[cell.strip() for cell in line.strip("|").split("|")] for line in lines[start + 2 : start + 6]]
    for row, (method, values) in zip(cells, expected_rows(out).items(), strict=True):
        gap, milliseconds = values["gap_closed"], values["step_ms"]
        assert milliseconds is not None
        assert row[:10] == [
            method,
            f"{values['modules']}",
            f"{100 * values['guided_share']:.0f} %",  # type: ignore[operator]
            f"{100 * values['accuracy_mean']:.1f} ± {100 * values['accuracy_std']:.1f} (2)",  # type: ignore[operator]
            "-" if gap is None else f"{100 * gap:.0f} %",
            f"{values['peak_bytes'] / 2**10:.0f} KiB"  # type: ignore[operator]
            if values["peak_bytes"] < 1000 * 2**10  # type: ignore[operator]
            else f"{values['peak_bytes'] / 2**20:.1f} MiB",  # type: ignore[operator]
            f"{values['peak_ratio']:.2f}",
            f"{milliseconds:.{0 if milliseconds >= 100 else 1}f} ms",
            f"{values['step_ratio']:.2f}",
            f"{values['flops_ratio']:.2f}",
        ]
    text = "\n".join(lines)
    for path in re.findall(r"\]\((.*?)\)", text):
        assert (out / path).is_file()
    assert "256 training, 64 validation" in text and "Seeds: 0, 1" in text


def test_checkpointing_is_trained_once_since_it_gives_the_same(done: tuple[Path, Comparison], tmp_path: Path) -> None:
    out, _ = done
    assert {path.name for path in out.iterdir() if (path / "seed0").exists()} == {"end-to-end", "local", "pgl"}
    assert "Trained once: checkpointing as end-to-end (" in (out / "report.md").read_text()
    compare(small_config(tmp_path, methods=("checkpointing",), timing_rounds=0), progress=False)
    for seed in SEEDS:
        a, b = (
            torch.load(path / f"seed{seed}" / "best.pt", weights_only=True)["net"]
            for path in (out / "end-to-end", tmp_path / "checkpointing")
        )
        assert a.keys() == b.keys()
        assert all(torch.equal(a[key], b[key]) for key in a)
    weights = [torch.load(out / m / "seed0" / "best.pt", weights_only=True)["net"] for m in ("end-to-end", "local")]
    key = next(iter(weights[0]))
    assert not torch.equal(weights[0][key], weights[1][key])


def test_what_rounds_otherwise_is_trained_by_itself(tmp_path: Path) -> None:
    variants = {
        "same": {"method": "pgl", "memory": "exact"},
        "threads": {"method": "pgl", "num_threads": 2},
        "parts": {"method": "pgl", "memory": 10**9},
    }
    config = small_config(
        tmp_path, methods=("pgl", *variants), variants=variants, memory="full", seeds=(0,), epochs=1, timing_rounds=0
    )
    compare(config, progress=False)
    assert {path.parent.parent.name for path in tmp_path.glob("*/seed0/result.json")} == {"pgl", "threads", "parts"}
    with (tmp_path / "runs.csv").open(newline="") as file:
        assert [row["method"] for row in csv.DictReader(file)] == ["pgl", "threads", "parts"]
    assert [row["method"] for row in read_rows(tmp_path)] == ["pgl", "same", "threads", "parts"]


def method_result(method: str, *values: float, **changes: Any) -> MethodResult:
    return MethodResult(method=method, num_modules=2, guided_share=0.5, test=values, **changes)


def test_gap_closed_by_hand() -> None:
    results = (
        method_result("end-to-end", 0.9, 0.8, peak_bytes=400, step_seconds=0.1),
        method_result("local", 0.5, 0.4, peak_bytes=100, step_seconds=0.15),
        method_result("pgl", 0.8, 0.7, peak_bytes=200),
    )
    rows = Comparison(title="t", results=results).rows()
    assert [row.gap_closed for row in rows] == pytest.approx([1.0, 0.0, 0.75])
    assert [row.mean for row in rows] == pytest.approx([0.85, 0.45, 0.75])
    assert [row.std for row in rows] == pytest.approx([0.1 / math.sqrt(2)] * 3)
    assert [row.peak_ratio for row in rows] == pytest.approx([1.0, 0.25, 0.5])
    assert (rows[1].step_ms, rows[1].step_ratio, rows[2].step_ms) == (pytest.approx(150), pytest.approx(1.5), None)


@pytest.mark.parametrize(
    "results",
    [
        (method_result("end-to-end", 0.5), method_result("local", 0.6), method_result("pgl", 0.7)),
        (method_result("end-to-end", 0.5), method_result("local", 0.5)),
        (method_result("local", 0.5), method_result("pgl", 0.7)),
        (method_result("end-to-end", 0.5), method_result("pgl", 0.7)),
        (method_result("end-to-end", 0.9), method_result("local", 0.6), method_result("pgl", 0.7)),
    ],
)
def test_no_gap_no_share_of_it(results: tuple[MethodResult, ...]) -> None:
    comparison = Comparison(title="t", results=results)
    assert all(row.gap_closed is None for row in comparison.rows())
    assert all(row.std is None for row in comparison.rows())  # one seed
    assert "±" not in markdown_table(comparison)
    assert "n = 1" in comparison.notes()[0]


def test_a_gap_within_the_spread_is_none() -> None:
    pgl = method_result("pgl", 0.8, 0.8)
    for low, told in (
        (0.60, False),
        (0.62, True),
    ):  # spread of each .1 √2 and 0, so that the gap has to be more than .14
        end = method_result("end-to-end", 0.76 - 0.1, 0.76 + 0.1)
        rows = Comparison(title="t", results=(end, method_result("local", 1.22 - low, 1.22 - low), pgl)).rows()
        assert (rows[2].gap_closed is not None) == told


def told(method: str, *values: float, steps: int = 10, **changes: Any) -> MethodResult:
    return method_result(method, *values, steps=steps, **changes)


def test_the_verdict_by_hand() -> None:
    """Who wins at equal memory and in equal time, by how much, and whether the seeds can tell."""
    mebi, rivals = 2**20, ("end-to-end", "recomputed", "micro-batches", "equal-time")
    pgl = told("pgl", 0.75, 0.77, rivals=rivals, peak_bytes=10 * mebi, step_seconds=0.12)
    rows = (
        told("end-to-end", 0.79, 0.81, peak_bytes=40 * mebi, step_seconds=0.1),
        told("recomputed", 0.79, 0.81, peak_bytes=10 * mebi, step_seconds=0.18),
        told("micro-batches", 0.75, 0.75, peak_bytes=9 * mebi, step_seconds=0.11),
        told("equal-time", 0.76, 0.78, steps=12),
        told("local", 0.70, 0.72),
        pgl,
    )
    assert verdict(Comparison(title="t", results=rows)) == [
        "What guidance gives: pgl 76.0 ± 1.4 %, local 71.0 ± 1.4 %. Pgl wins by 5.0 points, more than the spread of 2 "
        "seeds.",
        "At equal memory (10.0 MiB, 0.25 × end-to-end): pgl 76.0 ± 1.4 % in 1.20 × the time of end-to-end; end-to-end "
        "bit for bit 80.0 ± 1.4 % in 1.80 ×; end-to-end in micro-batches 75.0 ± 0.0 % in 1.10 ×. End-to-end bit for "
        "bit wins by 4.0 points, more than the spread of 2 seeds.",
        "In equal time: pgl 76.0 ± 1.4 % in 10 steps; end-to-end 77.0 ± 1.4 % in 12. Nobody wins that 2 seeds could "
        "tell: end-to-end is ahead by 1.0 points, within the spread.",
    ]
    # Of one seed nothing can be told; what does not get down to PGL's memory is no rival, nor what was not trained.
    large = told("recomputed", 0.9, peak_bytes=15 * mebi)
    small = told("micro-batches", 0.7, peak_bytes=10 * mebi)
    single = told("pgl", 0.75, rivals=rivals, peak_bytes=10 * mebi)
    assert verdict(Comparison(title="t", results=(large, small, single))) == [
        "At equal memory (10.0 MiB): pgl 75.0 %; end-to-end in micro-batches 70.0 %; end-to-end bit for bit takes at "
        "least 1.50 × that. Of a single seed, pgl is ahead by 5.0 points, which one seed cannot tell from chance.",
    ]
    assert verdict(Comparison(title="t", results=(large, single)))[0].endswith("takes at least 1.50 × that.")
    assert verdict(Comparison(title="t", results=(rows[0], pgl))) == []


def test_what_others_are_measured_from_closes_nothing() -> None:
    results = (
        method_result("end-to-end", 0.9, 0.9),
        method_result("local", 0.5, 0.5),
        replace(method_result("few", 0.7, 0.7, baseline="local"), guided_share=0.0),
        method_result("guided few", 0.8, 0.8, baseline="few"),
        method_result("more guided", 0.85, 0.85, baseline="guided few"),
    )
    rows = Comparison(title="t", results=results).rows()
    assert [row.gap_closed for row in rows] == pytest.approx([1.0, 0.0, 0.0, 0.5, 0.5])


def test_costs_are_weighted_by_the_guided_share() -> None:
    cost = StepCosts(
        num_modules=2,
        guided_share=0.25,
        resident_bytes=10,
        peak_bytes={"local": 5, "guided": 7},
        seconds={"local": 1.0, "guided": 3.0},
        flops={"local": 8, "guided": 16},
    )
    assert cost.total_peak_bytes == 17
    assert cost.mean_seconds == pytest.approx(1.5)
    assert cost.mean_flops == pytest.approx(10)
    assert replace(cost, guided_share=1.0, seconds={"guided": 3.0}).mean_seconds == 3.0


def test_numbers_for_people() -> None:
    assert [format_bytes(n) for n in (0, 999, 1024, 3 * 2**20, 150 * 2**20, 2**40)] == [
        "0 B", "999 B", "1.0 KiB", "3.0 MiB", "150 MiB", "1024 GiB",
    ]  # fmt: skip
    assert [format_count(n) for n in (0, 999, 1000, 272_474, 7_330_000)] == ["0", "999", "1.00 k", "272 k", "7.33 M"]


# --- report ---


class Links(HTMLParser):
    """Everything a browser would fetch, and the text."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.links: list[str] = []
        self.tags: list[str] = []
        self.text = ""
        self.feed(text)

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append(tag)
        self.links += [value or "" for name, value in attrs if name in ("src", "href", "xlink:href", "srcset", "data")]

    def handle_data(self, data: str) -> None:
        self.text += data


def test_guidance_is_drawn_once_per_row() -> None:
    rows = {"end-to-end": (1.0, "local"), "local": (0.0, "local"), "pgl": (0.2, "local"), "tail": (0.2, "local")}
    rows |= {"local-few": (0.0, "local"), "pgl-few": (0.2, "local-few"), "often-few": (0.5, "local-few")}
    results = tuple(
        replace(method_result(name, 0.5), guided_share=share, baseline=baseline)
        for name, (share, baseline) in rows.items()
    )
    (axes,) = draw_figures(Comparison(title="t", results=results))["guidance"].axes
    points = {str(line.get_label()): len(line.lines[0].get_xydata()) for line in axes.containers}
    assert points == {"local": 1, "pgl": 1, "tail": 1, "from local-few": 3}  # two of local's rows have the same share


def test_a_variant_of_another_schedule_leaves_the_options_of_the_common_one(tmp_path: Path) -> None:
    config = small_config(
        tmp_path,
        guidance=GuidanceConfig(name="phased", share=0.3, auxiliary="frozen"),
        rule="auglocal",
        rule_options={"depth": 1},
        methods=("end-to-end", "tail", "often"),
        variants={
            "tail": {"method": "pgl", "guidance": {"name": "periodic", "period": 4}},
            "often": {"method": "pgl", "guidance": {"share": 0.5}},
        },
    )
    found = {name: subject.config for name, subject in method_configs(config, Units(4)).items()}
    assert found["tail"].guidance == GuidanceConfig(period=4, auxiliary="frozen")
    assert found["often"].guidance == GuidanceConfig(share=0.5, auxiliary="frozen")
    assert found["end-to-end"].rule.options == {}  # of a rule that it does not use


def test_memory_joins_each_local_row_to_those_measured_from_it() -> None:
    results = [replace(method_result("end-to-end", 0.9, peak_bytes=400), num_modules=1, guided_share=1.0)]
    for rule, local, pgl in (("dgl", 0.7, 0.8), ("man", 0.6, 0.75)):
        start = method_result(f"local,rule={rule}", local, peak_bytes=100 * 2**20, baseline=f"local,rule={rule}")
        guided = method_result(f"pgl,rule={rule}", pgl, peak_bytes=120 * 2**20, baseline=f"local,rule={rule}")
        results += [replace(start, guided_share=0.0), replace(guided, guided_share=0.2)]
    (axes,) = draw_figures(Comparison(title="t", results=tuple(results)))["memory"].axes
    points = {str(line.get_label()): line.lines[0].get_xydata().tolist() for line in axes.containers}
    assert list(points) == ["end-to-end (K = 1)", "from local,rule=dgl", "from local,rule=man"]
    assert points["from local,rule=dgl"] == [[100, pytest.approx(70)], [120, pytest.approx(80)]]
    assert points["from local,rule=man"] == [[100, pytest.approx(60)], [120, pytest.approx(75)]]
    hollow = [line for line in axes.lines if line.get_markerfacecolor() == "white"]
    assert [line.get_xydata().tolist() for line in hollow] == [[[100, pytest.approx(70)]], [[100, pytest.approx(60)]]]
    assert min(line.get_zorder() for line in hollow) > max(bars.lines[0].get_zorder() for bars in axes.containers)


def test_html_needs_no_network_and_holds_the_figures(done: tuple[Path, Comparison]) -> None:
    out, comparison = done
    page = (out / "report.html").read_text()
    parsed = Links(page)
    assert not re.search(r"""(?:src|href)\s*=\s*["']?\s*(?:https?:)?//""", page)
    assert not re.search(r"@import|url\s*\(", page)
    assert not {"script", "link", "iframe", "object"} & set(parsed.tags)
    prefix = "data:image/svg+xml;base64,"
    assert len(parsed.links) == 5 and all(link.startswith(prefix) for link in parsed.links)
    for link in parsed.links:
        drawing = base64.b64decode(link.removeprefix(prefix)).decode()
        assert "</svg>" in drawing
        assert all(target.startswith("#") for target in Links(drawing).links)
    for row in comparison.rows():
        assert row.method in parsed.text
        assert f"{100 * row.mean:.1f} ± " in parsed.text


def test_figures_are_pictures(done: tuple[Path, Comparison]) -> None:
    out, _ = done
    paths = sorted((out / "figures").iterdir())
    assert [path.name for path in paths] == ["accuracy.png", "depth.png", "loss.png", "memory.png", "time.png"]
    for path in paths:
        content = path.read_bytes()
        assert content[:8] == b"\x89PNG\r\n\x1a\n"
        width, height = struct.unpack(">II", content[16:24])
        assert width > 300 and height > 200 and len(content) > 5000


@pytest.mark.parametrize("variants", [(), ("pgl-every-10-steps-frozen", "pgl-every-20-steps-frozen")])
def test_no_legend_is_cut_off(variants: tuple[str, ...]) -> None:
    curves: dict[str, Any] = {"validation": ((0.1, 0.2),), "depth": ((0.1, 0.2),), "peak_bytes": 2**20}
    curves |= {"losses": ((0.5, 0.4),), "epoch_steps": (3, 6), "step_seconds": 0.1}
    results = tuple(method_result(method, 0.5, **curves) for method in (*METHODS, *variants))
    figures = draw_figures(Comparison(title="t", results=results))
    assert list(figures) == ["accuracy", "time", "loss", "memory", "depth"]
    for figure in figures.values():
        figure.canvas.draw()
        legend, whole = figure.legends[0].get_window_extent(), figure.bbox
        assert whole.x0 <= legend.x0 and legend.x1 <= whole.x1 and legend.y0 >= whole.y0


def test_report_of_little_and_with_awkward_names(tmp_path: Path) -> None:
    awkward = method_result("<b>|x</b>", 0.5)
    write_report(Comparison(title="<script>alert(1)</script>", results=(awkward,)), tmp_path)
    page = (tmp_path / "report.html").read_text()
    assert "<script>" not in page and "<b>" not in page
    table = next(line for line in (tmp_path / "report.md").read_text().splitlines() if "0.5" in line or "50.0" in line)
    assert "\\|x" in table
    assert not list(tmp_path.glob("*.tmp"))


# --- again, interrupted, with another configuration ---


def test_finished_runs_are_not_repeated(done: tuple[Path, Comparison], monkeypatch: pytest.MonkeyPatch) -> None:
    out, comparison = done
    before, report = run_files(out), (out / "report.csv").read_bytes()
    assert len([path for path in before if path.name == "result.json"]) == 6

    def never(*_: Any, **__: Any) -> Any:
        raise AssertionError("a step was trained or measured again")

    monkeypatch.setattr(trainer, "train_step", never)
    monkeypatch.setattr("torchlocal.compare.costs.train_step", never)
    again = compare(small_config(out), progress=False)
    assert run_files(out) == before
    assert (out / "report.csv").read_bytes() == report
    assert again.rows() == comparison.rows()


def stop_after(monkeypatch: pytest.MonkeyPatch, num_steps: int, action: Callable[[], None]) -> None:
    count = 0

    def counted(*arguments: Any, **options: Any) -> Any:
        nonlocal count
        losses = train_step(*arguments, **options)
        count += 1
        if count == num_steps:
            action()
        return losses

    monkeypatch.setattr(trainer, "train_step", counted)


def test_interrupted_and_resumed_equals_uninterrupted(
    done: tuple[Path, Comparison], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    whole, _ = done
    # In the middle of the second epoch of the second run (local), by a real signal.
    with monkeypatch.context() as patch:
        stop_after(patch, 24 + 13, lambda: os.kill(os.getpid(), signal.SIGINT))
        with pytest.raises(Interrupted) as caught:
            compare(small_config(tmp_path / "a"), progress=False)
    assert caught.value.signum == signal.SIGINT
    assert "step 13 of 24" in str(caught.value)
    finished = {path.parent.parent.name for path in tmp_path.glob("a/*/seed0/result.json")}
    assert finished == {"end-to-end"}
    assert not (tmp_path / "a" / "report.csv").exists()
    before = {path: time for path, time in run_files(tmp_path / "a").items() if path.parent.parent.name in finished}
    costs = (tmp_path / "a" / "costs.json").read_bytes()

    compare(small_config(tmp_path / "a"), progress=False)

    after = run_files(tmp_path / "a")
    assert all(after[path] == time for path, time in before.items())
    assert (tmp_path / "a" / "costs.json").read_bytes() == costs
    assert without_times(read_results(tmp_path / "a")["local"][0]) == without_times(read_results(whole)["local"][0])
    assert without_times(read_results(tmp_path / "a")) == without_times(read_results(whole))
    rows = [{k: v for k, v in row.items() if k not in TIMED} for row in read_rows(tmp_path / "a")]
    assert rows == [{k: v for k, v in row.items() if k not in TIMED} for row in read_rows(whole)]


def late_config(out: Path, share: float = 1 / 3, **changes: Any) -> CompareConfig:
    """Local learning, and rows that guide the last third and the last 3 of 24 steps."""
    options = {"methods": ("local", "pgl", "late"), "seeds": (0,), "timing_rounds": 0, **changes}
    variants = {"late": {"method": "pgl", "guidance": {"share": 0.125}}}
    guidance = GuidanceConfig(name="phased", share=share, spread=0)
    return small_config(out, variants=variants, guidance=guidance, memory="exact", decay=0.125, **options)


def same_run(a: Path, b: Path) -> None:
    """Two run folders hold the same, bit for bit, but for times and places."""
    assert without_times(json.loads((a / "result.json").read_text())) == without_times(
        json.loads((b / "result.json").read_text())
    )
    for name in ("last.pt", "best.pt"):
        states = [torch.load(folder / name, weights_only=True) for folder in (a, b)]
        for state in states:
            del state["config"]["run"]["out"]
        assert states[0]["config"] == states[1]["config"]
        assert states[0]["net"].keys() == states[1]["net"].keys()
        assert all(torch.equal(tensor, states[1]["net"][key]) for key, tensor in states[0]["net"].items())
    tables = [list(csv.DictReader((folder / "metrics.csv").open(newline=""))) for folder in (a, b)]
    assert len(tables[0]) == len(tables[1]) == 3
    for rows in zip(*tables, strict=True):
        assert without_times(rows[0]) == without_times(rows[1])


@pytest.mark.parametrize("stopped", [False, True])
def test_first_steps_in_common_are_trained_once(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], stopped: bool
) -> None:
    config = late_config(tmp_path / "whole", tensorboard=True)
    num_steps = 0

    def counted(*arguments: Any, **options: Any) -> Any:
        nonlocal num_steps
        num_steps += 1
        return train_step(*arguments, **options)

    if stopped:  # in the epoch after which `pgl` goes on from `local`, and after the first step of `pgl`
        for steps in (13, 24 - 13 + 1):
            with monkeypatch.context() as patch:
                stop_after(patch, steps, lambda: os.kill(os.getpid(), signal.SIGINT))
                with pytest.raises(Interrupted):
                    compare(config)
            num_steps += steps
    monkeypatch.setattr(trainer, "train_step", counted)
    comparison = compare(config)
    assert num_steps == 24 + (24 - 16) + (24 - 21)  # late goes on from local in the middle of an epoch
    assert dict(comparison.facts)["First steps in common"] == "pgl and local (16 steps), late and local (21 steps)"
    assert "first steps in common: pgl and local (16 steps)" in capsys.readouterr().err
    shares = {result.method: result.guided_share for result in comparison.results}
    assert shares == {"local": 0.0, "pgl": pytest.approx(8 / 24), "late": pytest.approx(3 / 24)}
    for method in ("local", "pgl", "late"):
        alone = tmp_path / "alone" / method
        assert list((tmp_path / "whole" / method / "seed0" / "tensorboard").iterdir())
        compare(late_config(alone, methods=(method,), tensorboard=True), progress=False)
        same_run(tmp_path / "whole" / method / "seed0", alone / method / "seed0")
    assert num_steps == 35 + 3 * 24


def test_only_the_same_local_steps_are_in_common(tmp_path: Path) -> None:
    fit = late_config(tmp_path).fit
    never = fit.changed(memory=None, guidance=GuidanceConfig(name="never"))

    def branches(*configs: FitConfig) -> dict[str, tuple[str, int]]:
        return find_branches({str(number): config for number, config in enumerate(configs)}, 256)

    assert branches(never, fit) == {"1": ("0", 16)}
    assert branches(fit, never) == {"1": ("0", 16)}
    assert branches(never, fit, fit.changed(guidance=fit.guidance.changed({"auxiliary": "frozen"}))) == {
        "1": ("0", 16),
        "2": ("0", 16),
    }
    # The one with the most steps in common, which need not be the first.
    half = fit.changed(guidance=fit.guidance.changed({"share": 0.5}))
    assert branches(half, fit, fit.changed(guidance=fit.guidance.changed({"share": 0.25}))) == {
        "1": ("0", 12),
        "2": ("1", 16),
    }
    for changes in ({"lr": 0.1}, {"seed": 1}, {"rule": "greedy"}, {"modules": 2}, {"decay": 1.0}, {"num_threads": 2}):
        assert not branches(never, fit.changed(**changes)), changes
    assert branches(never, fit.changed(decay=0.5)) == {"1": ("0", 12 + 1)}  # the fall begins at 1
    for guidance in (GuidanceConfig(period=3), GuidanceConfig(name="always"), fit.guidance.changed({"share": 0.9})):
        assert not branches(never, fit.changed(guidance=guidance)), guidance
    assert not branches(never, never)
    # Which steps are guided must not depend on the seed; what a step is compiled to depends on steps before.
    assert not branches(never, fit.changed(guidance=GuidanceConfig(name="random", share=0.01)))
    assert not branches(never.changed(compile=True), fit.changed(compile=True))


def test_a_best_of_later_steps_is_not_handed_on(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def config(name: str, *methods: str) -> CompareConfig:
        return late_config(tmp_path / name, methods=methods, share=10 / 24)

    with monkeypatch.context() as patch:  # before step 14, from which pgl would go on
        stop_after(patch, 13, lambda: os.kill(os.getpid(), signal.SIGINT))
        with pytest.raises(Interrupted):
            compare(config("a", "local"), progress=False)
    best = tmp_path / "a" / "local" / "seed0" / "best.pt"  # as if killed at the end of that epoch, before last.pt
    torch.save(torch.load(best, weights_only=True) | {"step": 16}, best)
    compare(config("a", "local", "pgl"), progress=False)
    compare(config("b", "pgl"), progress=False)
    same_run(tmp_path / "a" / "pgl" / "seed0", tmp_path / "b" / "pgl" / "seed0")


@pytest.mark.parametrize(
    ("change", "named"),
    [({"lr": 0.01}, "lr (0.05 there, 0.01 now)"), ({"num_train": 128}, "num_train"), ({"model": "mlp"}, "model")],
)
def test_another_configuration_in_the_folder_is_refused(
    done: tuple[Path, Comparison], change: dict[str, Any], named: str
) -> None:
    out, _ = done
    before = {path: path.stat().st_mtime_ns for path in out.rglob("*")}
    with pytest.raises(ValueError, match=re.escape(named)) as caught:
        compare(small_config(out, **change), progress=False)
    assert "\n" not in str(caught.value) and "choose another out" in str(caught.value)
    assert {path: path.stat().st_mtime_ns for path in out.rglob("*")} == before


def test_a_damaged_run_is_named(done: tuple[Path, Comparison], tmp_path: Path) -> None:
    out = tmp_path / "damaged"
    folder = out / "end-to-end" / "seed0"
    folder.mkdir(parents=True)
    (folder / "result.json").write_text("{")
    with pytest.raises(ValueError, match=r"end-to-end, seed 0: .*result\.json is damaged"):
        compare(small_config(out, methods=("end-to-end",), seeds=(0,), timing_rounds=0), progress=False)
    (folder / "config.yaml").write_text("a: [")
    with pytest.raises(ValueError, match=r"config\.yaml is damaged"):
        compare(small_config(out, methods=("end-to-end",), seeds=(0,), timing_rounds=0), progress=False)


def test_a_method_that_diverges_does_not_stop_the_others(tmp_path: Path) -> None:
    config = small_config(
        tmp_path / "c",
        methods=("wild", "local"),
        seeds=(0,),
        timing_rounds=0,
        variants={"wild": {"method": "local", "lr": 1e30}},
    )
    with pytest.warns(UserWarning, match=r"wild, seed 0: .* is NaN or infinite .*; it is left out of the table"):
        comparison = compare(config, progress=False)
    assert [result.method for result in comparison.results] == ["local"]
    assert dict(comparison.facts)["Diverged"] == "wild, seed 0"
    with (
        pytest.warns(UserWarning, match="left out"),
        pytest.raises(ValueError, match=r"every run diverged \(wild, seed 0\)"),
    ):
        compare(replace(config, out=str(tmp_path / "d"), methods=("wild",)), progress=False)


def test_compare_yaml_repeats_the_comparison(done: tuple[Path, Comparison]) -> None:
    out, comparison = done
    for text in ((out / "compare.yaml").read_text(), comparison.configuration):
        values = yaml.safe_load(text)
        section = values.pop("compare")
        assert CompareConfig(
            **{**section, "methods": tuple(section["methods"]), "seeds": tuple(section["seeds"])},
            fit=FitConfig.of(**values),
        ) == small_config(out)


# --- methods and variants ---


def test_methods_differ_in_their_guidance_only(tmp_path: Path) -> None:
    config = small_config(tmp_path, memory="exact", methods=tuple(METHODS))
    configs = {name: subject.config for name, subject in method_configs(config, Units(9)).items()}
    common = config.fit
    assert configs["pgl"] == common
    assert configs["local"] == common.changed(memory=None, guidance=GuidanceConfig(name="never"))
    end_to_end = common.changed(modules=1, memory=None, guidance=GuidanceConfig(name="always"))
    assert configs["end-to-end"] == end_to_end
    assert configs["checkpointing"] == end_to_end.changed(recompute=3)  # the root of 9 units
    assert configs["recomputed"] == end_to_end.changed(memory=12_345, micro_batches=1)
    assert configs["micro-batches"] == end_to_end.changed(memory=12_345)
    assert configs["equal-time"] == end_to_end.changed(steps=32)
    assert configs["periodic"] == common  # whose guidance is spread already
    thirds = config.fit.changed(guidance=GuidanceConfig(share=0.3, auxiliary="frozen"), memory=None)
    found = method_configs(replace(config, fit=thirds), Units(9))["periodic"].config
    spread = GuidanceConfig(name="periodic", period=10, length=3, auxiliary="frozen")
    assert found == thirds.changed(guidance=spread, decay=0.3)


def test_rivals_get_what_pgl_takes(tmp_path: Path) -> None:
    """Its memory and its time, as measured; decided once, so that a comparison that goes on trains what it began."""
    config = small_config(tmp_path, methods=(*RIVALS, "pgl"), seeds=(0,), modules=2, epochs=1, memory="full")
    comparison = compare(config, progress=False)
    rows = {row.method: row for row in comparison.rows()}
    found = json.loads((tmp_path / "rivals.json").read_text())
    (decided,) = found.values()
    budget, pgl = decided["bytes"], rows["pgl"].peak_bytes
    assert pgl is not None
    runs = {method: yaml.safe_load((tmp_path / method / "seed0" / "config.yaml").read_text()) for method in rows}
    assert {method: run["memory"]["limit"] for method, run in runs.items()} == {
        "recomputed": budget,
        "micro-batches": budget,
        "equal-time": None,
        "pgl": "full",
    }
    assert runs["recomputed"]["memory"]["micro_batches"] == 1
    assert runs["equal-time"]["optimisation"]["steps"] == decided["steps"]
    parameters = 4 * rows["pgl"].parameters_backbone
    # The state of SGD with momentum is as large as the parameters; BatchNorm's buffers are besides.
    assert pgl - budget == pytest.approx(2 * parameters, rel=0.2)
    for method in ("recomputed", "micro-batches"):
        peak = rows[method].peak_bytes
        assert peak is not None and peak <= 1.02 * pgl
    assert [result.steps for result in comparison.results] == [8, 8, decided["steps"], 8]
    assert "In equal time: pgl" in (tmp_path / "report.md").read_text()
    before = {path: path.stat().st_mtime_ns for path in tmp_path.rglob("*")}
    with pytest.raises(ValueError, match=r"lr \(0.05 there, 0.01 now\)"):  # nothing is measured, nor written
        compare(replace(config, fit=config.fit.changed(lr=0.01)), progress=False)
    assert {path: path.stat().st_mtime_ns for path in tmp_path.rglob("*")} == before
    # On a machine on which it comes out otherwise, what was begun goes on.
    decided["steps"] += 1
    with pytest.raises(ValueError, match=r"equal-time.*steps \(\d+ there, \d+ now\)"):
        (tmp_path / "rivals.json").write_text(json.dumps(found))
        compare(config, progress=False)


def test_options_that_come_later_leave_measured_rivals_as_they_are(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A comparison that was begun before an option existed goes on with what its rivals got then."""
    fit = small_config(tmp_path).fit
    pgl, whole = (METHODS[name](fit, Units(9)) for name in ("pgl", "end-to-end"))
    written = [pgl.changed(out="runs/fit", seed=0).plain(), whole.changed(out="runs/fit").plain()]
    for config in written:  # as it was before there were these
        del config["memory"]["scores"], config["optimisation"]["betas"]
    path = tmp_path / "rivals.json"
    path.write_text(json.dumps({json.dumps(written): {"bytes": 123, "steps": 45}, "of the future": {"bytes": 6}}))

    class AnewError(Exception):
        pass

    def anew(*given: Any, **options: Any) -> Any:
        raise AnewError

    monkeypatch.setattr(circumstances, "check_parts", anew)
    measured = Measured(path, fit, None, Own(), rounds=1, say=print)  # type: ignore[arg-type]
    elsewhere = {"data_root": str(tmp_path), "log_every": 3, "out": "elsewhere"}
    for options in ({}, elsewhere):
        given = pgl.changed(**options), whole.changed(**options)
        assert (measured.bytes_of_a_step(*given), measured.steps_in_time(*given)) == (123, 45)
    for options in ({"betas": [0.9, 0.95]}, {"scores": "chunked"}, {"lr": 0.01}, {"num_threads": 2}):
        with pytest.raises(AnewError):
            measured.steps_in_time(pgl.changed(**options), whole.changed(**options))


def test_equal_time_needs_times(tmp_path: Path) -> None:
    fit = small_config(tmp_path).fit
    assert "equal-time" in CompareConfig(fit=fit).methods
    assert "equal-time" not in CompareConfig(fit=fit, timing_rounds=0).methods
    variants = {"longer": {"method": "equal-time"}}
    for methods, given in ((("equal-time",), {}), (("longer",), {"variants": variants})):
        with pytest.raises(ValueError, match=f"methods: '{methods[0]}' needs the time of steps"):
            CompareConfig(fit=fit, methods=methods, timing_rounds=0, **given)


def test_every_method_has_the_learning_rate_of_phased_guidance(tmp_path: Path) -> None:
    def rates(**changes: Any) -> dict[str, list[float]]:
        config = small_config(tmp_path, **changes)
        return {
            name: [learning_rate(subject.config, i, steps_per_epoch=10, num_steps=50) for i in range(50)]
            for name, subject in method_configs(config, Units(9)).items()
        }

    phased = rates(guidance=GuidanceConfig(name="phased", share=0.3))
    assert phased["end-to-end"] == phased["checkpointing"] == phased["local"] == phased["pgl"]
    assert phased["pgl"][:36] == [0.05] * 36 and phased["pgl"][-1] < 0.001
    whole = [0.05 * (1 + math.cos(math.pi * i / 50)) / 2 for i in range(50)]
    assert rates(guidance=GuidanceConfig(period=5))["local"] == pytest.approx(whole)
    assert rates(guidance=GuidanceConfig(name="phased"), decay=1.0)["local"] == pytest.approx(whole)


def test_a_variant_is_a_row_of_its_own(tmp_path: Path) -> None:
    config = small_config(
        tmp_path / "v",
        methods=("local", "often"),
        seeds=(0,),
        variants={"often": {"method": "pgl", "guidance": {"period": 2}, "lr": 0.02}},
        timing_rounds=0,
        num_train=64,
        epochs=1,
    )
    rows = compare(config, progress=False).rows()
    assert [(row.method, row.guided_share) for row in rows] == [("local", 0.0), ("often", 0.5)]
    assert all(row.peak_bytes is None and row.step_ms is None and row.gap_closed is None for row in rows)
    saved = yaml.safe_load((tmp_path / "v" / "often" / "seed0" / "config.yaml").read_text())
    assert (saved["optimisation"]["lr"], saved["guidance"]["period"]) == (0.02, 2)
    assert {row["peak_bytes"] for row in read_rows(tmp_path / "v")} == {""}
    assert not (tmp_path / "v" / "figures" / "memory.png").exists()
    assert not (tmp_path / "v" / "costs.json").exists()


def test_a_variant_names_its_baseline(tmp_path: Path) -> None:
    variants = {
        "two": {"method": "local", "modules": 2},
        "guided two": {"method": "pgl", "modules": 2, "baseline": "two"},
    }
    config = small_config(tmp_path, methods=("guided two", "pgl"), variants=variants)
    subjects = method_configs(config, Units(9))
    assert {name: subject.baseline for name, subject in subjects.items()} == {"guided two": "two", "pgl": "local"}
    assert subjects["guided two"].config == subjects["pgl"].config.changed(modules=2)


def test_end_to_end_may_recompute_otherwise(tmp_path: Path) -> None:
    variants = {
        "exact": {"method": "end-to-end", "memory": "exact"},
        "two": {"method": "checkpointing", "recompute": 2},
    }
    config = small_config(tmp_path, methods=("exact", "two", "checkpointing"), variants=variants)
    found = {name: subject.config for name, subject in method_configs(config, Units(16)).items()}
    assert {name: (c.memory.limit, c.memory.recompute) for name, c in found.items()} == {
        "exact": ("exact", None),
        "two": (None, 2),
        "checkpointing": (None, 4),
    }


def test_end_to_end_with_a_boundary_keeps_the_modules_that_it_lies_between(tmp_path: Path) -> None:
    variants = {"rounded": {"method": "end-to-end", "boundary": "int8"}}
    config = small_config(tmp_path, methods=("end-to-end", "rounded", "local"), variants=variants, stages=[1, 2])
    found = {name: subject.config for name, subject in method_configs(config, Units(16)).items()}
    assert found["end-to-end"].cut.modules == 1 and found["end-to-end"].run.boundary is None
    assert (found["rounded"].cut, found["rounded"].rule) == (found["local"].cut, found["local"].rule)
    assert (found["rounded"].run.boundary, found["rounded"].run.stages) == ("int8", [1, 2])
    assert (found["rounded"].guidance.name, found["rounded"].guidance.auxiliary) == ("always", "frozen")


def test_segments_and_title_are_those_of_every_network(tmp_path: Path) -> None:
    units = {"resnet20": 9, "resnet110": 49}
    config = small_config(tmp_path, methods=("checkpointing",), grid={"model": list(units)})
    found = method_configs(config, Units(units))
    assert [subject.config.memory.recompute for subject in found.values()] == [3, 7]


def test_every_method_is_timed_with_its_own_threads(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    seen: dict[int | None, set[int]] = {}

    def counted(*arguments: Any, config: FitConfig, **options: Any) -> Any:
        seen.setdefault(config.run.num_threads, set()).add(torch.get_num_threads())
        return train_step(*arguments, config=config, **options)

    monkeypatch.setattr("torchlocal.compare.costs.train_step", counted)
    before = torch.get_num_threads()
    config = small_config(
        tmp_path, methods=("local",), seeds=(0,), epochs=1, grid={"num_threads": [1, 2]}, timing_rounds=1
    )
    facts = dict(compare(config, progress=False).facts)
    assert seen == {1: {1}, 2: {2}} and torch.get_num_threads() == before
    assert facts["Varied"] == "num_threads: 1, 2"


def test_a_grid_varies_what_matters(tmp_path: Path) -> None:
    config = small_config(
        tmp_path / "g",
        methods=("end-to-end", "local", "pgl"),
        seeds=(0,),
        grid={"modules": [2, 3], "guidance.period": [2, 4]},
        num_train=128,
        epochs=1,
    )
    subjects = method_configs(config, Units(9))
    combinations = [(2, 2), (2, 4), (3, 2), (3, 4)]
    guided = [f"pgl,modules={modules},period={period}" for modules, period in combinations]
    assert list(subjects) == ["end-to-end", "local,modules=2", "local,modules=3", *guided]
    assert [
        (subjects[n].config.cut.modules, subjects[n].config.guidance.options["period"]) for n in guided
    ] == combinations
    assert [subjects[name].baseline for name in guided] == ["local,modules=2"] * 2 + ["local,modules=3"] * 2
    comparison = compare(config, progress=False)
    rows = {row.method: row for row in comparison.rows()}
    accuracy = {name: row.mean for name, row in rows.items()}
    assert [rows[name].guided_share for name in guided] == [0.5, 0.25, 0.5, 0.25]
    for name in guided:
        gap = accuracy["end-to-end"] - accuracy[subjects[name].baseline]
        expected = (accuracy[name] - accuracy[subjects[name].baseline]) / gap if gap > 0 else None
        assert rows[name].gap_closed in (None, expected)  # None where it is within the spread
    (axes,) = draw_figures(comparison)["guidance"].axes
    shown = {line.get_label(): line for line in axes.containers}
    points = shown["from local,modules=2"].lines[0].get_xydata()
    names = ["local,modules=2", "pgl,modules=2,period=4", "pgl,modules=2,period=2"]
    assert points.tolist() == [[100 * rows[name].guided_share, 100 * accuracy[name]] for name in names]
    with (tmp_path / "g" / "runs.csv").open(newline="") as file:
        runs = list(csv.DictReader(file))
    assert [run["method"] for run in runs] == list(subjects)
    for run in runs:
        result = json.loads((tmp_path / "g" / run["method"] / "seed0" / "result.json").read_text())
        assert float(run["test_accuracy"]) == result["test_accuracy"]
        assert float(run["validation_accuracy"]) == result["validation_accuracy"]
        assert int(run["steps"]) == result["steps"] == 4
        assert int(run["peak_bytes"]) == rows[run["method"]].peak_bytes


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"grid": {"modules": 3}}, "grid: modules must be a list of at least one value, not 3"),
        ({"grid": {"modules": []}}, "grid: modules must be a list"),
        ({"grid": {"modules": [[1, 2]]}}, "grid: the values of modules must be numbers"),
        ({"grid": {"modules": [0]}}, "grid: modules=0 must be"),
        ({"grid": {"depth": [1]}}, "grid: the configuration has unknown fields: depth"),
        ({"grid": {"guidance.period": [0]}}, "grid: guidance.period: must be"),
        ({"grid": {"seed": [0, 1]}}, "grid: seed is common to all methods"),
        ({"methods": ("bogus",)}, "methods: 'bogus' is unknown"),
        ({"methods": ()}, "methods=() must be a list with at least one"),
        ({"methods": ("local", "local")}, "holds an element twice"),
        ({"seeds": (0, 0)}, "holds an element twice"),
        ({"seeds": (-1,)}, "must be whole numbers of at least 0"),
        ({"seeds": (True,)}, "must be whole numbers of at least 0"),
        ({"seeds": (2**32,)}, "below 2**32"),
        ({"timing_rounds": -1}, "timing_rounds=-1 must be"),
        ({"variants": {"pgl": {"method": "local"}}}, "must be a new name"),
        ({"variants": {"../x": {"method": "local"}}}, "must be a new name"),
        ({"variants": {"x/y": {"method": "local"}}}, "'x/y' must be the name of a folder"),
        ({"variants": {1: {"method": "local"}}}, "variants: 1 must be a new name"),
        ({"variants": None}, "variants=None must be `name: value` pairs"),
        ({"grid": ["modules"]}, "grid=['modules'] must be `name: value` pairs"),
        ({"grid": {1: [2]}}, "grid: 1 must be the name of an option"),
        ({"variants": {"x": {"method": ["pgl"]}}}, "must name the method"),
        (
            {"variants": {"x": {"method": "end-to-end", "modules": 3}}, "methods": ("x",)},
            "variants: x: modules means nothing to method end-to-end: leave it out",
        ),
        (
            {"variants": {"x": {"method": "local", "guidance.period": 2}}, "methods": ("x",)},
            "variants: x: guidance.period means nothing to method local",
        ),
        ({"variants": {"x": {"method": "local", "memory": "exact"}}, "methods": ("x",)}, "memory means nothing"),
        (
            {"cuts": ["layer1.0"], "grid": {"modules": [2, 3]}},
            "grid: modules means nothing next to cuts=['layer1.0']: give one of them",
        ),
        (
            {
                "cuts": ["layer1.0"],
                "variants": {"x": {"method": "local", "modules": 3}},
                "methods": ("x",),
            },
            "variants: x: modules means nothing next to cuts",
        ),
        ({"grid": {"image_size": [8, 16]}}, "grid: image_size is common to all methods"),
        ({"variants": {"x": {"lr": 1.0}}}, "must name the method"),
        (
            {"variants": {"x": {"method": "pgl", "baseline": "locl"}}},
            "x: baseline 'locl' must be one of end-to-end, ",
        ),
        ({"variants": {"x": {"method": "pgl", "lr": -1}}, "methods": ("x",)}, "variants: x: lr=-1 must be"),
        ({"variants": {"x": {"method": "pgl", "learning": 1}}, "methods": ("x",)}, "unknown fields: learning"),
        ({"variants": {"x": {"method": "pgl", "data": "svhn"}}, "methods": ("x",)}, "data is common to all methods"),
        ({"variants": {"x": {"method": "pgl", "guidance": "never"}}, "methods": ("x",)}, "guidance must hold options"),
        ({"guidance": GuidanceConfig(name="never")}, "leaves method pgl nothing to do"),
    ],
)
def test_wrong_comparisons_are_refused_before_anything_runs(
    changes: dict[str, Any], message: str, tmp_path: Path
) -> None:
    with pytest.raises(ValueError, match=re.escape(message)) as caught:
        small_config(tmp_path / "x", **changes)
    assert "\n" not in str(caught.value)
    assert not (tmp_path / "x").exists()


def test_a_file_in_the_way_is_refused(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(ValueError, match="cannot be made a folder"):
        compare(small_config(tmp_path / "file" / "x", timing_rounds=0), progress=False)


def test_every_column_of_the_csv_is_a_field_of_the_row(done: tuple[Path, Comparison]) -> None:
    out, comparison = done
    fields = [name for name in Row.__dataclass_fields__ if name not in ("further", "reach_seconds")]
    assert [name.removeprefix("accuracy_") for name in read_rows(out)[0]] == fields
    assert [row.method for row in comparison.rows()] == [row["method"] for row in read_rows(out)]
