"""Benchmarks, in their tiny form on the CPU."""

import argparse
import importlib
import json
import os
import runpy
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from torchlocal.recompute import Tape
from torchlocal.run.build import build_network, resolve_execution
from torchlocal.run.config import guided_options
from torchlocal.run.own import Own

ROOT = Path(__file__).resolve().parents[1]


def run_gpu(folder: Path, *sections: str) -> str:
    command = [sys.executable, str(ROOT / "benchmarks" / "gpu.py"), "--tiny", "--threads", "1", "--out", str(folder)]
    command += ["--sections", *sections, "--only", "resnet32"]
    environment = os.environ | {"PYTHONPATH": str(ROOT / "src")}
    finished = subprocess.run(command, capture_output=True, text=True, timeout=240, env=environment)
    assert finished.returncode == 0, finished.stderr
    return finished.stdout


def test_the_checks_for_accelerators_hold_on_the_cpu(tmp_path: Path) -> None:
    run_gpu(tmp_path, "right", "augmentation")
    content = json.loads((tmp_path / "results.json").read_text())
    section = content["sections"]["right"]
    checks = [row for row in section["rows"] if row["table"] == "right"]
    assert section["status"] == "finished", section
    assert len(checks) == 12
    assert all(row["holds"] and row["differing"] == 0 and row["tensors"] > 50 for row in checks), checks
    report = (tmp_path / "results.md").read_text()
    assert "## right (finished" in report and "| resnet32 | guided = plain | 85 | 0 |" in report
    section = content["sections"]["augmentation"]
    (batches,) = (row for row in section["rows"] if row["table"] == "batches of the device")
    assert section["status"] == "finished" and (batches["batches"], batches["differing"]) == (8, 0), section
    speeds = {(r["network"], r["step"], r["batches"]) for r in section["rows"] if r["table"] == "images per second"}
    assert len(speeds) == 3 + 2 * 4
    assert "right" not in run_gpu(tmp_path, "right")  # a section that is finished is not run again


@pytest.fixture(scope="module")
def language() -> dict[str, Any]:
    return runpy.run_path(str(ROOT / "benchmarks" / "language.py"))


def run_language(monkeypatch: pytest.MonkeyPatch, language: dict[str, Any], folder: Path, *arguments: str) -> None:
    argv = ["language.py", "--tiny", "--out", str(folder), "--seeds", "0", "1", *arguments]
    monkeypatch.setattr(sys, "argv", argv)
    assert language["main"]() == 0


def test_the_grid_of_language_models_goes_on_and_reports(
    language: dict[str, Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    rows = ("--share", "0.4", "--rows", "end-to-end", "k2-rank12-d0-local", "k2-rank12-d0-halves40", "end-to-end-5")
    run_language(monkeypatch, language, tmp_path, *rows[:4])
    assert capsys.readouterr().out.count("validation loss") == 2
    run_language(monkeypatch, language, tmp_path, *rows)
    told = capsys.readouterr().out
    assert told.count("validation loss") == 6 and "end-to-end, seed" not in told  # that is finished
    run_language(monkeypatch, language, tmp_path, "--share", "0.4", "--report")
    lines = capsys.readouterr().out.splitlines()
    assert lines == (tmp_path / "report.md").read_text().splitlines()
    cells = [[cell.strip() for cell in line.strip("|").split("|")] for line in lines if line.startswith("| ")][1:]
    assert [row[:2] for row in cells] == [  # five steps are asked for by the row of an MLP already
        ["end-to-end", "2"], ["end-to-end, 5 steps", "2"], ["K=2, rank12, no block, local", "2"],
        ["K=2, rank12, no block, halves", "2"],
    ]  # fmt: skip
    whole, longer, local, halves = cells
    result = json.loads((tmp_path / "k2-rank12-d0-halves40" / "seed1" / "result.json").read_text())
    assert result["guided_steps"] == 2 and result["config"]["rule"]["options"]["rank"] == 12
    assert result["steps"] == 4 and json.loads((tmp_path / "end-to-end-5/seed0/result.json").read_text())["steps"] == 5
    assert [row[7] for row in (whole, longer, local, halves)] == ["100 %", "100 %", "0 %", "50 %"]
    # One head of 64 x 12 + 12 x 1024 in a network of four blocks and a read-out, all products of each position.
    assert whole[8:10] == ["1.00", "1.00"] and local[8] == halves[8] == "1.05"
    assert whole[11] == longer[11] == "-" and local[11] == halves[11] == longer[2]
    for name in ("loss.svg", "depth.svg"):
        assert "</svg>" in (tmp_path / name).read_text()
    for more in (("--report",), ("--rows", "end-to-end")):  # another share: the learning rate falls over other steps
        with pytest.raises(SystemExit) as stopped:
            run_language(monkeypatch, language, tmp_path, *more)
        assert stopped.value.code == 2 and "decay (0.4 there, 0.2 now)" in capsys.readouterr().err


def test_a_gap_is_closed_only_where_seeds_can_tell(language: dict[str, Any]) -> None:
    def row(name: str, losses: list[float]) -> Any:
        return language["Finished"](
            row=language["Row"](name=name, told=name), seeds=list(range(len(losses))),
            results=[{"test_loss": loss} for loss in losses], curves=[], minutes=[],
        )  # fmt: skip

    guided = row("guided", [3.25, 3.23])
    found = {"end-to-end": row("end-to-end", [3.2, 3.18]), "local": row("local", [3.3, 3.28])}
    assert language["gap_closed"](guided, "local", found) == pytest.approx(0.5)
    # One seed beside rows of two is held to what they have of that seed.
    assert language["gap_closed"](row("guided", [3.28]), "local", found) == pytest.approx(0.2)
    assert language["gap_closed"](guided, "local", found | {"local": row("local", [3.3])}) is None  # one seed
    assert language["gap_closed"](guided, "local", found | {"local": row("local", [3.4, 3.1])}) is None  # too far apart
    assert language["gap_closed"](guided, "local", found | {"local": row("local", [3.1, 3.08])}) is None  # no gap


@pytest.fixture(scope="module")
def wallclock() -> dict[str, Any]:
    return runpy.run_path(str(ROOT / "benchmarks" / "wallclock.py"))


SECONDS = {"one core": 2.0, "all cores": 1.0, "local": 0.5, "phase": 3.0, "spread": 1.5, "1f1b": 4.0, "gpipe": 5.0}


def test_the_time_of_a_step_is_what_the_kinds_of_steps_before_it_take(wallclock: dict[str, Any]) -> None:
    methods, kinds_of, prices = wallclock["METHODS"], wallclock["kinds_of"], wallclock["prices"]
    guided = [False, True, False, False, True, True]
    kinds = ["local", "spread", "local", "local", "phase", "phase"]
    assert kinds_of(guided, methods["pgl"]) == kinds
    assert kinds_of([True] * 3, methods["1f1b"]) == ["1f1b"] * 3
    assert kinds_of([False] * 2, methods["local"]) == ["local"] * 2
    assert kinds_of(guided[:2], methods["pgl 1f1b"]) == ["local", "spread 1f1b"]
    # Five steps of 1.5 s take 7.5 s, of which four local ones take 2.
    assert prices(SECONDS) == SECONDS | {"spread": 5.5}
    assert wallclock["joined"](kinds, prices(SECONDS)) == [0.5, 6.0, 6.5, 7.0, 10.0, 13.0]
    trained = wallclock["Trained"](steps=[2, 6], values=[[0.5, 0.8], [0.7, 0.9]], guided=guided)
    curve = trained.curve(methods["pgl"], SECONDS)
    assert [at for at, _ in curve] == [6.0, 13.0]
    assert [value for _, value in curve] == pytest.approx([0.6, 0.85])
    time_to = wallclock["time_to"]
    assert time_to(curve, 0.6, more=True) == 6.0 and time_to(curve, 0.7, more=True) == 13.0
    assert time_to(curve, 0.9, more=True) is None and time_to(curve, 0.59, more=False) is None
    assert time_to([(1.0, 3.0), (2.0, 2.0)], 2.5, more=False) == 2.0


@pytest.mark.parametrize("name", ["pairs", "pairs32"])
def test_end_to_end_is_trained_in_four_parts_and_nothing_recomputed(wallclock: dict[str, Any], name: str) -> None:
    options = argparse.Namespace(out=Path("unused"), tiny=True, seeds=[0])
    config = wallclock["config_of"](name, "micro-batches", 0, options).changed(batch_size=128, num_train=128)
    config = wallclock["in_parts"](config)
    data, execution = Own().load(config), resolve_execution(config)
    net = build_network(config, data, execution).train()
    x, y = next(iter(data.train.batches(128, train=True, seed=0)))
    plan = net.guided_plan(x, y, autocast=execution.autocast, **guided_options(config))
    units = {"pairs": 10, "pairs32": 16}[name]
    assert (plan.tree, plan.micro_batches, plan.recomputed) == (Tape(0, units), 4, 0.0)
    with pytest.raises(RuntimeError, match="made the search find"):  # parts of 8 images are fewer than it considers
        wallclock["in_parts"](config.changed(batch_size=32))


def test_finished_runs_and_measured_steps_are_joined_in_a_report(
    wallclock: dict[str, Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    rows = {
        "end-to-end": [[0.5, 0.8], [0.6, 0.8]], "micro-batches": [[0.5, 0.7], [0.6, 0.7]],
        "local": [[0.4, 0.6], [0.4, 0.7]], "pgl": [[0.5, 0.7], [0.5, 0.8]],
    }  # fmt: skip
    for row, values in rows.items():
        for seed, accuracies in enumerate(values):
            folder = tmp_path / "pairs" / row / f"seed{seed}"
            folder.mkdir(parents=True)
            lines = [f"{10 * (i + 1)},{value}" for i, value in enumerate(accuracies)]
            (folder / "metrics.csv").write_text("\n".join(["step,validation_accuracy", *lines]))
            config = wallclock["config_of"]("pairs", row, seed, SimpleNamespace(tiny=False, out=tmp_path)).plain()
            (folder / "result.json").write_text(json.dumps({"config": config}))
    slow = {kind: 2 * value for kind, value in SECONDS.items()}
    sent = {"one core": 0.0, "all cores": 0.0, "local": 1e6, "phase": 2e6, "spread": 1.2e6, "1f1b": 2e6, "gpipe": 2e6}
    stages = {"ranks": [[0, 4], [4, 10]], "bare": [[0, 5], [5, 10]]}
    network = wallclock["network_of"]("pairs", SimpleNamespace(tiny=False, out=tmp_path))
    steps = {
        f"pairs, {link}, 2 stages": {"seconds": seconds, "bytes": sent, "stages": stages, "network": network}
        for link, seconds in (("loopback", SECONDS), ("100mbit+20ms", slow))
    }
    (tmp_path / "steps.json").write_text(json.dumps(steps))
    argv = ["wallclock.py", "--tasks", "pairs", "--only", "report", "--out", str(tmp_path), "--panels", "100mbit+20ms"]
    monkeypatch.setattr(sys, "argv", argv)
    assert wallclock["main"]() == 0
    told = capsys.readouterr().out
    assert (tmp_path / "report.md").read_text().strip() == told.strip()
    cells = {}
    for line in told.splitlines():
        row = [cell.strip() for cell in line.strip("|").split("|")]
        cells.setdefault(row[0], row[1:])
    # Twenty steps; of PGL the last four are guided: 16 of .5 s and 4 of 3 s. Stated are 74 %.
    assert cells["one machine, one core"] == ["2", "80.0 ± 0.0", "0.67 (0.67)", "1.33 (1.33)"]
    assert cells["local"] == ["2", "65.0 ± 7.1", "never (0.17)", "never (0.33)"]
    assert cells["PGL, last fifth"] == ["2", "75.0 ± 7.1", "0.33 (0.33)", "0.67 (0.67)"]
    assert cells["1F1B"] == ["2", "70.0 ± 0.0", "never (1.33)", "never (2.67)"]
    assert "PGL, every fifth" not in cells  # no run of it is finished
    assert cells["guided, every fifth"] == ["5.500", "11.000; 2.00 MB; 50 %"]
    assert cells["end-to-end, one core"] == ["2.000", "4.000; 50 %"]
    for ending in ("svg", "png"):
        assert (tmp_path / f"pairs.{ending}").stat().st_size > 1000
    # Steps of another network are not joined with these runs, nor are runs of another configuration.
    steps["pairs, 100mbit+20ms, 2 stages"]["network"] = {**network, "model": {"name": "resnet32", "options": {}}}
    (tmp_path / "steps.json").write_text(json.dumps(steps))
    assert wallclock["main"]() == 0
    assert "100mbit+20ms" not in capsys.readouterr().out
    (folder / "result.json").write_text(json.dumps({"config": config | {"rule": {"name": "greedy"}}}))
    with pytest.raises(SystemExit):
        wallclock["main"]()
    assert "seed1/result.json is of another configuration: rule ('greedy' there" in capsys.readouterr().err


def test_a_real_run_is_told_beside_what_the_joining_says_of_it(
    wallclock: dict[str, Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    stages = {"ranks": [[0, 4], [4, 10]], "bare": [[0, 5], [5, 10]]}
    network = wallclock["network_of"]("pairs", SimpleNamespace(tiny=False, out=tmp_path))
    measured = {"seconds": SECONDS, "stages": stages, "network": network}
    (tmp_path / "steps.json").write_text(json.dumps({"pairs, 100mbit, 2 stages": measured}))
    result = {
        "kinds": ["local"] * 7 + ["phase"] * 2, "seconds": [9.0] * 5 + [0.4, 0.8, 3.5, 4.0], "losses": 9,
        "same_losses": [True] * 9, "same_tensors": 3, "tensors": 3, "largest_difference": 0.0,
        "stages": [[0, 4], [4, 10]], "others": 0.12,
    }  # fmt: skip
    started: list[Any] = []
    names = wallclock["main"].__globals__  # as they are looked up
    monkeypatch.setitem(names, "run_ranks", lambda *arguments: [result, started.append(arguments)][0])
    verify = ["wallclock.py", "--tasks", "pairs", "--verify", "100mbit", "pgl", "--out", str(tmp_path)]
    monkeypatch.setattr(sys, "argv", verify)
    assert wallclock["main"]() == 0
    assert capsys.readouterr().out.splitlines()[1:5] == [
        "  local modules 1–4 | 5–10; other programs took 12 % of all cores meanwhile",
        "  2 × local: 1.2 s, 0.600 s each; joined 1.0 s, 0.500 s each; measured / joined 1.20",
        "  2 × guided, in a phase: 7.5 s, 3.750 s each; joined 6.0 s, 3.000 s each; measured / joined 1.25",
        "  all 4: 8.7 s, 2.175 s each; joined 7.0 s, 1.750 s each; measured / joined 1.24",
    ]
    assert started[0][2][-5:] == ["--method", "pgl", "--modules", "4", "6"]  # the stages that were measured
    result["same_tensors"] = 2
    assert wallclock["main"]() == 1


@pytest.fixture
def links(monkeypatch: pytest.MonkeyPatch) -> Any:
    """The other benchmark, whose names can be replaced."""
    monkeypatch.syspath_prepend(ROOT / "benchmarks")
    return importlib.import_module("parallel")


@pytest.mark.parametrize("version", [1, 2])
def test_a_quota_gives_each_process_its_share_of_a_core(
    links: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, version: int
) -> None:
    monkeypatch.setattr(links, "quota_folder", lambda: (tmp_path, version))
    rmdir = os.rmdir

    def empty_and_remove(folder: Path) -> None:  # the kernel's files do not count
        for file in folder.iterdir():
            file.unlink()
        rmdir(folder)

    monkeypatch.setattr(os, "rmdir", empty_and_remove)
    names = ["cpu.cfs_quota_us", "cpu.cfs_period_us"] if version == 1 else ["cpu.max"]
    for share, expected in ((0.6, "3000 5000"), (1.0, "5000 5000"), (0.1, "1000 10000")):
        with links.quotas(share, 2) as enters:
            groups = sorted(path for path in tmp_path.iterdir() if path.is_dir())
            assert [" ".join((group / name).read_text() for name in names) for group in groups] == [expected] * 2
            for group, enter in zip(groups, enters, strict=True):
                done = subprocess.run([*enter, "sh", "-c", "echo $$ $0", "a b"], capture_output=True, text=True)
                assert done.stdout.split(maxsplit=1) == [(group / "cgroup.procs").read_text().strip(), "a b\n"]
        assert not any(path.is_dir() for path in tmp_path.iterdir())
    with links.quotas(None, 2) as enters:
        assert enters == [[], []] and not any(path.is_dir() for path in tmp_path.iterdir())


def test_a_share_that_cannot_be_had_is_refused(
    links: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    assert links.check_cores(None) is None
    assert links.check_cores(1.5) == "--cores: must be a number above 0 and at most 1, not 1.5"
    monkeypatch.setattr(links, "quota_folder", lambda: (tmp_path / "missing", 1))
    monkeypatch.setattr(sys, "argv", ["parallel.py", "--cores", "0.6"])
    with pytest.raises(SystemExit):
        links.main()
    assert "--cores: a quota of the CPU takes root and cgroups with the controller cpu: " in capsys.readouterr().err
    monkeypatch.setattr(links, "check_cores", lambda share: None)
    monkeypatch.setattr(sys, "argv", ["parallel.py", "--cores", "0.6", "--methods", "both cores"])
    with pytest.raises(SystemExit):
        links.main()
    assert (
        "--cores: every process has one core or less, and these methods take two: leave them out"
        in capsys.readouterr().err
    )


@pytest.fixture(scope="module")
def stages() -> dict[str, Any]:
    return runpy.run_path(str(ROOT / "benchmarks" / "stages.py"))


@pytest.mark.parametrize("num", [1, 2, 5])
def test_the_model_of_stages_is_what_a_loop_comes_to(stages: dict[str, Any], num: int) -> None:
    """Steps that go from stage to stage one after another, each of which takes a second for a batch."""
    c, count = 1.0, 40

    def local(free: list[float]) -> None:
        arrived = 0.0
        for k in range(num):
            free[k] = arrived = max(free[k], arrived) + c

    free = [0.0] * num
    ends = [(local(free), free[-1])[1] for _ in range(count)]
    assert ends[-1] - ends[-2] == stages["local_seconds"](c, 0.0, 1.0, 0.0)
    # Exact guided steps: a third of the time forward, the rest backward, of one batch at a time.
    forward_and_back = sum(c / 3 for _ in range(num)) + sum(2 * c / 3 for _ in range(num))
    assert stages["exact_seconds"](c, 0.0, 1.0, 0.0, num) == pytest.approx(forward_and_back)
    # 1F1B: until the last stage has all micro-batches, and their gradients are back.
    for parts in (1, 4):
        free = [0.0] * num
        for _ in range(parts):
            arrived = 0.0
            for k in range(num):
                free[k] = arrived = max(free[k], arrived) + c / parts / 3
        back = [0.0] * num
        for _ in range(parts):
            arrived = 0.0
            for k in reversed(range(num)):
                back[k] = arrived = max(back[k], arrived) + c / parts * 2 / 3
        assert stages["pipelined_seconds"](c, 0.0, 1.0, 0.0, num, parts) == pytest.approx(free[-1] + back[0])
    # PGL: while a guided batch comes through, the stages that have ended their local steps wait.
    period = 10
    expected = (period - 1) * c + (num - 1) * c + num * c
    assert stages["periodic_seconds"](c, num * c, num, period, 1) == pytest.approx(expected / period)


def test_stages_that_sleep_are_measured(tmp_path: Path) -> None:
    command = [sys.executable, str(ROOT / "benchmarks" / "stages.py"), "--tiny", "--json", str(tmp_path / "found.json")]
    environment = os.environ | {"PYTHONPATH": str(ROOT / "src")}
    finished = subprocess.run(command, capture_output=True, text=True, timeout=240, env=environment)
    assert finished.returncode == 0, finished.stderr
    found = json.loads((tmp_path / "found.json").read_text())["2"]
    # A header; the features, their loss, and the targets of 16 examples.
    assert found["messages"] == 4 and found["bytes"] == 16 * 64 * 4 + 4 + 16 * 8
    assert all(seconds > 0.003 for seconds in found["seconds"].values()) and len(found["seconds"]) == 4
