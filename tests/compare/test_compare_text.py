"""Comparisons of text: judged by the loss, every number recomputed from the runs."""

from __future__ import annotations

import csv
import json
import math
import os
import re
import signal
import statistics
from pathlib import Path
from typing import Any

import pytest
import yaml

from torchlocal.compare.comparison import METHODS as METHODS_OF_COMPARE
from torchlocal.compare.comparison import CompareConfig, compare, method_configs
from torchlocal.compare.figures import draw_figures
from torchlocal.compare.measures import LOSS, TOKEN_LOSS, measure_of
from torchlocal.compare.report import markdown_report
from torchlocal.compare.results import Comparison, MethodResult
from torchlocal.compare.verdict import verdict
from torchlocal.run import trainer
from torchlocal.run.build import train_step
from torchlocal.run.config import FitConfig, GuidanceConfig
from torchlocal.run.trainer import Interrupted

SEEDS = (0, 1)
METHODS = ("end-to-end", "recomputed", "micro-batches", "local", "pgl")
REACH = 6.9
# The scores over 1,024 tokens are most of what these few layers keep: in one piece there is little to recompute.
pytestmark = pytest.mark.filterwarnings("ignore:memory=.* no guided step")


def config(texts: Path, out: Path, **changes: Any) -> CompareConfig:
    """Two epochs of 6 steps on rows of 16 tokens, the last third guided."""
    own = {name: changes.pop(name) for name in ("methods", "seeds", "timing_rounds", "reach") if name in changes}
    options: dict[str, Any] = {
        "model": "gpt-nano", "model_options": {"layers": 3, "width": 16, "heads": 2, "tied": False}, "modules": 3,
        "rule": "solo", "rule_options": {"depth": 0}, "guidance": GuidanceConfig(name="phased", share=1 / 3),
        "memory": "local", "data": f"text:{texts}", "data_root": str(texts.parent / "root"), "context": 16,
        "epoch_rows": 48, "num_validation": 9, "epochs": 2, "batch_size": 8, "optimizer": "adamw", "lr": 0.01,
        "decay": 0.5, "precision": "fp32", "device": "cpu", "num_threads": 1, "tensorboard": False,
    }  # fmt: skip
    values = {"methods": METHODS, "seeds": SEEDS, "timing_rounds": 2, "reach": REACH, **own}
    return CompareConfig(out=str(out), fit=FitConfig.of(**(options | changes)), **values)


@pytest.fixture(scope="module")
def done(texts: Path, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Comparison]:
    out = tmp_path_factory.mktemp("compare") / "done"
    return out, compare(config(texts, out), progress=False)


def read(path: Path) -> list[dict[str, str]]:
    with path.open(newline="") as file:
        return list(csv.DictReader(file))


def results_of(out: Path) -> dict[str, list[dict[str, Any]]]:
    """result.json of every method and seed; recomputation changes none."""
    return {
        method: [
            json.loads((out / method.replace("recomputed", "end-to-end") / f"seed{seed}" / "result.json").read_text())
            for seed in SEEDS
        ]
        for method in METHODS
    }


class Units:
    """Circumstances by hand."""

    def num_units(self, model: str) -> int:
        return 4

    def bytes_of_a_step(self, pgl: FitConfig, end_to_end: FitConfig) -> int:
        return 2**20

    def steps_in_time(self, pgl: FitConfig, end_to_end: FitConfig) -> int:
        return 13


# --- numbers ---


def test_the_table_is_what_the_runs_give(done: tuple[Path, Comparison]) -> None:
    out, comparison = done
    assert comparison.measure is TOKEN_LOSS
    rows, costs = read(out / "report.csv"), json.loads((out / "costs.json").read_text())["costs"]
    assert [row["method"] for row in rows] == list(METHODS)
    results = results_of(out)
    mean = {method: sum(r["test_loss"] for r in found) / 2 for method, found in results.items()}
    gap = mean["local"] - mean["end-to-end"]
    half = {m: abs(found[0]["test_loss"] - found[1]["test_loss"]) / math.sqrt(2) for m, found in results.items()}
    told = gap > math.hypot(half["local"], half["end-to-end"])
    for row in rows:
        found, cost = results[row["method"]], costs[row["method"]]
        seconds = sum(
            cost["seconds"][kind] * share
            for kind, share in (("local", 1 - found[0]["guided_share"]), ("guided", found[0]["guided_share"]))
            if share
        )
        assert float(row["loss_mean"]) == pytest.approx(mean[row["method"]], rel=1e-12)
        assert float(row["loss_std"]) == pytest.approx(half[row["method"]])
        assert float(row["perplexity"]) == pytest.approx(math.exp(mean[row["method"]]))
        bits = [r["test_loss"] / math.log(2) / r["bytes_per_token"]["test"] for r in found]
        assert float(row["bits_per_byte"]) == pytest.approx(sum(bits) / 2)
        assert float(row["validation_loss"]) == pytest.approx(sum(r["validation_loss"] for r in found) / 2)
        closed = (mean["local"] - mean[row["method"]]) / gap if told else None
        assert row["gap_closed"] == "" if closed is None else float(row["gap_closed"]) == pytest.approx(closed)
        assert int(row["peak_bytes"]) == cost["resident_bytes"] + max(cost["peak_bytes"].values())
        assert float(row["step_ms"]) == pytest.approx(1000 * seconds)
        steps = []
        for seed in SEEDS:
            epochs = read(out / row["method"].replace("recomputed", "end-to-end") / f"seed{seed}" / "metrics.csv")
            steps += [next(int(e["step"]) for e in epochs if float(e["validation_loss"]) <= REACH)]
        assert float(row["reach_seconds"]) == pytest.approx(seconds * sum(steps) / 2)
    # The training worked, and the epoch was chosen by the loss: else the numbers would prove little.
    assert mean["end-to-end"] < math.log(1024) - 0.3
    for found in results.values():
        assert all(r["test_accuracy"] is None and r["validation_loss"] < math.log(1024) for r in found)


def test_rivals_are_held_to_the_memory_of_pgl(done: tuple[Path, Comparison]) -> None:
    out, comparison = done
    rows = {row.method: row for row in comparison.rows()}
    pgl, whole = rows["pgl"].peak_bytes, rows["end-to-end"].peak_bytes
    assert pgl is not None and whole is not None and pgl < 0.9 * whole
    parts = rows["micro-batches"].peak_bytes
    assert parts is not None and parts <= 1.02 * pgl
    more = {name: (rows[name].flops_ratio or 0.0) - 1.0 for name in ("micro-batches", "recomputed")}
    assert 0.0 <= more["micro-batches"] <= more["recomputed"] > 0.05
    loss = {row.method: row.mean for row in rows.values()}
    assert loss["micro-batches"] == pytest.approx(
        loss["end-to-end"], rel=1e-4
    )  # up to rounding, which training amplifies
    assert loss["recomputed"] == loss["end-to-end"] and not (out / "recomputed").exists()
    assert "Trained once" in dict(comparison.facts)


def test_flops_are_those_of_the_layers(done: tuple[Path, Comparison]) -> None:
    out, _ = done
    costs = json.loads((out / "costs.json").read_text())["costs"]
    # 2 operations per multiplication; in backward twice those of forward.
    read_out, positions, width = 2 * 8 * 16 * 16 * 1024, 8 * 16, 16
    from torchlocal.models import GPT

    hidden = next(p for n, p in GPT(1024, 16, layers=3, width=16, heads=2).named_parameters() if "down" in n).shape[1]
    block = 2 * positions * (4 * width * width + 3 * width * hidden)
    attention = 2 * 2 * positions * 16 * width
    assert costs["end-to-end"]["flops"]["guided"] >= 3 * (3 * block + read_out)
    assert costs["end-to-end"]["flops"]["guided"] <= 3 * (3 * (block + 1.5 * attention) + read_out)
    # Each of the three modules has the read-out; those before the last do not move it.
    more = costs["local"]["flops"]["local"] - costs["end-to-end"]["flops"]["guided"]
    assert more == pytest.approx(2 * 2 * read_out, rel=0.05)


def test_the_report_speaks_of_loss(done: tuple[Path, Comparison]) -> None:
    out, _ = done
    text = (out / "report.md").read_text()
    assert "accuracy" not in text and "image" not in text.replace("![", "")
    headers = next(line for line in text.splitlines() if line.startswith("| 1 Method"))
    assert "4 Test loss (n) | 5 Perplexity | 6 Bits/byte | 7 Validation loss | 8 Gap closed" in headers
    assert f"13 Time to loss {REACH:.3f}" in headers
    assert "Perplexity (5)" in text and "Gap closed (8)" in text and "FLOPs (14)" in text
    assert "× (10, 12, 14)" in text and "steps of 8 rows of 16 tokens" in text
    assert re.search(r"40 documents, [\d,]+ tokens of 1,024 kinds; \d+ training", text)
    assert "What guidance gives: pgl loss " in text and "At equal memory (" in text
    for path in re.findall(r"\]\((.*?)\)", text):
        assert (out / path).is_file()
    page = (out / "report.html").read_text()
    assert page.count("data:image/svg+xml;base64,") == 5 and "Test perplexity by depth" in page
    runs = read(out / "runs.csv")
    trained = [method for method in METHODS if method != "recomputed"]
    assert [(run["method"], run["seed"]) for run in runs] == [(m, str(seed)) for m in trained for seed in SEEDS]
    for run in runs:
        result = results_of(out)[run["method"]][int(run["seed"])]
        for name in ("validation_loss", "test_loss", "test_perplexity", "validation_bits_per_byte", "steps"):
            assert float(run[name]) == result[name]


def test_curves_are_over_steps_and_depth_is_perplexity(done: tuple[Path, Comparison]) -> None:
    out, comparison = done
    figures = draw_figures(comparison)
    assert list(figures) == ["validation-loss", "time", "loss", "memory", "depth"]
    (axes,) = figures["validation-loss"].axes
    assert (axes.get_xlabel(), axes.get_ylabel()) == ("Step", "Validation loss")
    drawn = {str(line.get_label()): line.get_xydata() for line in axes.lines}
    curves = [[float(row["validation_loss"]) for row in read(out / f"local/seed{s}/metrics.csv")] for s in SEEDS]
    assert drawn["local"][:, 0].tolist() == [6, 12]
    assert drawn["local"][:, 1].tolist() == pytest.approx([sum(at) / 2 for at in zip(*curves, strict=True)])
    (axes,) = figures["depth"].axes
    assert axes.get_ylabel() == "Test perplexity"
    drawn = {str(line.get_label()): line.get_xydata() for line in axes.lines}
    losses = [result["depth_loss"] for result in results_of(out)["pgl"]]
    expected = [math.exp(sum(at) / 2) for at in zip(*losses, strict=True)]
    assert drawn["pgl"][:, 1].tolist() == pytest.approx(expected) and len(expected) == 3


# --- by hand ---


def told(method: str, *losses: float, **changes: Any) -> MethodResult:
    return MethodResult(method=method, num_modules=2, guided_share=0.5, test=losses, steps=10, **changes)


def test_less_is_better_by_hand() -> None:
    rivals = ("end-to-end", "micro-batches", "equal-time")
    curves = {"validation": ((5.0, 4.0, 3.0), (5.0, 3.4, 3.6)), "epoch_steps": (10, 20, 30), "step_seconds": 0.5}
    results = (
        told("end-to-end", 3.0, 3.1, peak_bytes=40 * 2**20),
        told("micro-batches", 3.0, 3.1, peak_bytes=10 * 2**20),
        told("equal-time", 2.8, 2.9),
        told("local", 3.4, 3.5),
        told("pgl", 3.2, 3.3, peak_bytes=10 * 2**20, rivals=rivals, **curves),
    )
    comparison = Comparison(title="t", results=results, measure=TOKEN_LOSS, reach=3.5)
    rows = {row.method: row for row in comparison.rows()}
    closed = [rows[name].gap_closed for name in ("end-to-end", "equal-time", "local", "pgl")]
    assert closed == pytest.approx([1.0, 1.5, 0.0, 0.5])
    assert rows["pgl"].reach_seconds == pytest.approx(0.5 * (30 + 20) / 2)
    assert rows["local"].reach_seconds is None
    assert rows["pgl"].further[0] == pytest.approx(math.exp(3.25)) and rows["pgl"].further[1:] == (None, None)
    assert verdict(comparison) == [
        "What guidance gives: pgl loss 3.250 ± 0.071, local loss 3.450 ± 0.071. Pgl wins by 0.200, more than the "
        "spread of 2 seeds.",
        "At equal memory (10.0 MiB, 0.25 × end-to-end): pgl loss 3.250 ± 0.071; end-to-end in micro-batches loss "
        "3.050 ± 0.071. End-to-end in micro-batches wins by 0.200, more than the spread of 2 seeds.",
        "In equal time: pgl loss 3.250 ± 0.071 in 10 steps; end-to-end loss 2.850 ± 0.071 in 10. End-to-end wins by "
        "0.400, more than the spread of 2 seeds.",
    ]
    assert "down and left is better" in markdown_report(comparison, ["figures/memory.png"])
    never = Comparison(title="t", results=results, measure=TOKEN_LOSS, reach=3.2)  # one seed is never as good
    assert {row.reach_seconds for row in never.rows()} == {None}
    close = (told("end-to-end", 3.0, 3.2), told("local", 3.1, 3.3), told("pgl", 3.1, 3.2))
    found = Comparison(title="t", results=close, measure=TOKEN_LOSS)
    assert {row.gap_closed for row in found.rows()} == {None}
    assert "Nobody wins that 2 seeds could tell: pgl is ahead by 0.050" in verdict(found)[0]


def test_what_runs_are_judged_by() -> None:
    assert measure_of({"text": "t", "test_accuracy": None}) is TOKEN_LOSS
    assert measure_of({"test_accuracy": None, "test_loss": 0.1}) is LOSS
    assert measure_of({"test_accuracy": 0.0}).name == "accuracy"
    assert [LOSS.number(v) for v in (3.0, 0.000412345, 12.3456)] == ["3.000", "0.0004123", "12.35"]


def test_scores_in_chunks_are_common_to_all_methods(texts: Path, tmp_path: Path) -> None:
    for scores in ("whole", "chunked"):
        found = method_configs(config(texts, tmp_path, methods=tuple(METHODS_OF_COMPARE), scores=scores), Units())
        assert {subject.config.memory.scores for subject in found.values()} == {scores} and len(found) == 8


# --- again, interrupted ---


def test_stopped_and_resumed_is_the_whole(
    done: tuple[Path, Comparison], texts: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    _, whole = done
    count = 0

    def counted(*arguments: Any, **options: Any) -> Any:
        nonlocal count
        losses = train_step(*arguments, **options)
        count += 1
        if count == 12 + 8:  # in the middle of the second epoch of the second run
            os.kill(os.getpid(), signal.SIGINT)
        return losses

    monkeypatch.setattr(trainer, "train_step", counted)
    some = config(texts, tmp_path, methods=("end-to-end", "local", "pgl"), seeds=(0,), timing_rounds=0, reach=None)
    with pytest.raises(Interrupted, match="step 8 of 12"):
        compare(some, progress=False)
    assert not (tmp_path / "report.csv").exists()
    again = compare(some, progress=False)
    assert count == 12 + 12 + 4  # pgl goes on from the local steps
    expected = {result.method: result for result in whole.results}
    for one in again.results:
        for name in ("test", "validation", "losses", "depth"):
            assert getattr(one, name) == getattr(expected[one.method], name)[:1], (one.method, name)
        assert one.further == {name: values[:1] for name, values in expected[one.method].further.items()}
    assert [row["gap_closed"] for row in read(tmp_path / "report.csv")] == [""] * 3  # of one seed


def test_compare_yaml_repeats_it(done: tuple[Path, Comparison], texts: Path) -> None:
    out, _ = done
    values = yaml.safe_load((out / "compare.yaml").read_text())
    section = values.pop("compare")
    lists = {name: tuple(section.pop(name)) for name in ("methods", "seeds")}
    assert CompareConfig(**section, **lists, fit=FitConfig.of(**values)) == config(texts, out)


def test_a_loss_that_is_not_finite_leaves_the_table(
    texts: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    real = trainer.measure_split

    def measured(*arguments: Any, **options: Any) -> Any:
        found = real(*arguments, **options)
        return found | {"loss": math.nan} if options.get("by_depth") and len(found["depth_loss"]) == 1 else found

    monkeypatch.setattr(trainer, "measure_split", measured)
    one = config(texts, tmp_path, methods=("end-to-end", "local"), seeds=(0,), timing_rounds=0, reach=None)
    with pytest.warns(UserWarning, match="end-to-end, seed 0: the loss on test data is NaN or infinite; it is left"):
        found = compare(one, progress=False)
    assert [result.method for result in found.results] == ["local"]
    assert statistics.fmean(found.results[0].test) > 0 and "Diverged" in dict(found.facts)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"reach": 0.0}, "reach=0.0 must be a number above 0"),
        ({"reach": 3.0, "timing_rounds": 0}, "reach=3.0 needs the time of steps: give timing_rounds above 0"),
        ({"epoch_rows": 7}, "batch_size=8 is more than the 7 rows of text"),
        ({"model": "resnet20", "model_options": {}}, "model 'resnet20' is for images, and these are tokens"),
        ({"data": "text:nowhere"}, "text:nowhere does not exist"),
        ({"data": "digits", "context": None, "epoch_rows": None, "reach": 7.0}, "reach=7 must be an accuracy"),
    ],
)
def test_mistakes(texts: Path, tmp_path: Path, changes: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=re.escape(message)) as caught:
        compare(config(texts, tmp_path / "x", **changes), progress=False)
    assert "\n" not in str(caught.value) and not (tmp_path / "x" / "compare.yaml").exists()
