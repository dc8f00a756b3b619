"""Whole runs on several ranks: the checkpoints of a single process, and a way on when a rank is lost."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
import warnings
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from networks import SmallNet
from processes import Pool
from torch import Tensor

from torchlocal.cli import commands as cli
from torchlocal.parallel import network
from torchlocal.parallel.team import Elsewhere, RemoteSplit
from torchlocal.run import build as assembly
from torchlocal.run import trainer
from torchlocal.run.checkpoint import fixed_fields
from torchlocal.run.config import FitConfig, GuidanceConfig
from torchlocal.run.own import Own
from torchlocal.run.trainer import Interrupted

TIMES = ("seconds", "train_seconds", "epoch_seconds", "images_per_second", "out", "tensorboard", "run")


def small_config(out: Path, **changes: Any) -> FitConfig:
    """Two epochs of 6 steps with augmentation, dropout, BatchNorm, accumulation, clipping and periodic guidance."""
    values: dict[str, Any] = {
        "out": str(out), "cuts": ["stem", "block1"], "data": "digits", "num_train": 192,
        "num_validation": 50, "epochs": 2, "batch_size": 16, "accumulate": 2, "lr": 0.05, "clip": 0.5,
        "precision": "fp32", "device": "cpu", "num_threads": 1, "log_every": 2, "tensorboard": False,
        "guidance": GuidanceConfig(period=3, length=1),
    }  # fmt: skip
    return FitConfig.of(**(values | changes))


def fit(config: FitConfig, **options: Any) -> dict[str, Any]:
    return trainer.fit(config, model=lambda: SmallNet(10, 1), **options)


@pytest.fixture(scope="module")
def uninterrupted(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run of a single process."""
    out = tmp_path_factory.mktemp("alone")
    fit(small_config(out), progress=False)
    return out


def run(config: FitConfig, resume: bool, stop_after: int | None, stopped: int = 0) -> dict[str, Any] | str:
    """Train on this rank; the first one, or another, gets SIGTERM after some steps."""
    network._LOOK_EVERY = 0.0
    real, steps = assembly.train_step, 0

    def train_step(*arguments: Any, **options: Any) -> list[Tensor]:
        nonlocal steps
        steps += 1
        losses = real(*arguments, **options)
        if steps == stop_after and (not dist.is_initialized() or dist.get_rank() == stopped):
            os.kill(os.getpid(), signal.SIGTERM)
        return losses

    trainer.train_step = train_step
    try:
        return fit(config, resume=resume, progress=False, timeout=60)
    except (Interrupted, Elsewhere) as error:
        return f"{type(error).__name__}: {error}"
    finally:
        trainer.train_step = real


def assert_same(a: Any, b: Any, path: str = "") -> None:
    """Equal in every bit, but for times and places."""
    if isinstance(a, dict):
        assert list(a) == list(b), path
        for name in a:
            if name not in TIMES:
                assert_same(a[name], b[name], f"{path}.{name}")
    elif isinstance(a, list | tuple):
        assert len(a) == len(b), path
        for i, (x, y) in enumerate(zip(a, b, strict=True)):
            assert_same(x, y, f"{path}[{i}]")
    elif isinstance(a, Tensor):
        assert torch.equal(a, b), path
    else:
        assert a == b, path


def assert_same_run(out: Path, expected: Path) -> None:
    for name in ("last.pt", "best.pt"):
        assert_same(*(torch.load(folder / name, weights_only=True) for folder in (out, expected)))
    assert_same(*(json.loads((folder / "result.json").read_text()) for folder in (out, expected)))


@pytest.mark.parametrize("world", [2, 3])
def test_a_run_on_several_ranks_is_that_of_one(pool: Pool, tmp_path: Path, uninterrupted: Path, world: int) -> None:
    results = pool.run(world, tmp_path, run, small_config(tmp_path / "run"), False, None)
    assert_same_run(tmp_path / "run", uninterrupted)
    assert_same(results[-1], json.loads((uninterrupted / "result.json").read_text()))
    assert sorted(path.name for path in (tmp_path / "run").iterdir()) == [
        "best.pt", "config.yaml", "last.pt", "metrics.csv", "result.json",
    ]  # fmt: skip


@pytest.mark.parametrize("worlds", [(2, 1), (1, 3), (3, 2)])
def test_a_run_goes_on_with_another_number_of_ranks(
    pool: Pool, tmp_path: Path, uninterrupted: Path, worlds: tuple[int, int]
) -> None:
    """Stopped by a signal that only the first rank gets, in the middle of an epoch."""
    config = small_config(tmp_path / "run")
    for i, (world, stop_after) in enumerate(zip(worlds, (4, None), strict=True)):
        folder = tmp_path / str(i)
        folder.mkdir()
        if world == 1:
            told = [run(config, bool(i), stop_after)]
        else:
            told = pool.run(world, folder, run, config, bool(i), stop_after)
        if stop_after:
            # The first rank may have begun another step before the signal, and all end after the same.
            assert "stopped by SIGTERM" in told[0]
            assert told[-1].startswith("Interrupted: stopped by SIGTERM after step ")
            assert torch.load(tmp_path / "run" / "last.pt", weights_only=True)["step"] in (4, 5)
    assert_same_run(tmp_path / "run", uninterrupted)


def test_a_signal_that_only_the_last_rank_gets_stops_all(pool: Pool, tmp_path: Path, uninterrupted: Path) -> None:
    config = small_config(tmp_path / "run")
    for i, stop_after in enumerate((2, None)):
        folder = tmp_path / str(i)
        folder.mkdir()
        told = pool.run(2, folder, run, config, bool(i), stop_after, 1)
        if stop_after:
            assert "stopped by SIGTERM" in told[0] and told[1].startswith("Interrupted: stopped by SIGTERM after step ")
    assert_same_run(tmp_path / "run", uninterrupted)


def test_replicas_stop_and_go_on(pool: Pool, tmp_path: Path) -> None:
    """2 × 2, dropout of each replica included."""
    for name, stops in {"whole": [None], "parts": [4, None]}.items():
        for i, stop_after in enumerate(stops):
            folder = tmp_path / f"{name}{i}"
            folder.mkdir()
            pool.run(4, folder, run, small_config(tmp_path / name, replicas=2), bool(i), stop_after)
    assert_same_run(tmp_path / "parts", tmp_path / "whole")
    with pytest.raises(ValueError, match="replicas=2 needs a number of ranks that it divides, not 1"):
        fit(small_config(tmp_path / "parts", replicas=2), resume=True)


def test_ranks_of_other_configurations_are_refused(pool: Pool, tmp_path: Path) -> None:
    told = pool.run(2, tmp_path, _other_configurations, tmp_path / "run")
    sentence = "lr is 0.2 on rank 1 and 0.1 on rank 0: start all ranks with the same configuration, seed and code"
    assert told == [f"Elsewhere: {sentence}", f"ValueError: {sentence}"]
    assert not (tmp_path / "run").exists()


def _other_configurations(out: Path) -> str:
    try:
        fit(small_config(out, lr=0.1 * (1 + dist.get_rank())))
    except (ValueError, Elsewhere) as error:
        return f"{type(error).__name__}: {error}"
    return "nothing"


def test_a_mistake_of_the_writer_is_told_by_the_writer(pool: Pool, tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    told = pool.run(2, tmp_path, _no_folder, tmp_path / "file" / "run")
    assert told[0].startswith("Elsewhere") and told[1].startswith("ValueError: out=")


def _no_folder(out: Path) -> str:
    try:
        fit(small_config(out), progress=False)
    except (ValueError, Elsewhere) as error:
        return f"{type(error).__name__}: {error}"
    return "nothing"


def test_other_numbers_of_threads_are_told(pool: Pool, tmp_path: Path) -> None:
    for unequal in (False, True):
        folder = tmp_path / str(unequal)
        folder.mkdir()
        told = pool.run(2, folder, _threads, folder / "run", unequal)
        assert [any("ranks compute with 1 to 2 threads each" in one for one in warned) for warned in told] == [
            False, unequal,
        ]  # fmt: skip


def _threads(out: Path, unequal: bool) -> list[str]:
    torch.set_num_threads(1 + (unequal and dist.get_rank()))
    try:
        with warnings.catch_warnings(record=True) as warned:
            warnings.simplefilter("always")
            fit(small_config(out, num_threads=None, epochs=1), progress=False)
    finally:
        torch.set_num_threads(1)
    return [str(warning.message) for warning in warned]


def test_fp16_and_odd_batches_are_refused(pool: Pool, tmp_path: Path) -> None:
    for told in pool.run(2, tmp_path, _unfit, tmp_path / "run"):
        assert told == [
            'precision="fp16" needs one scale for all modules, so not several ranks: give "bf16" or "fp32"',
            "batch_size=15 cannot be shared by replicas=2: make it a multiple",
        ]


def _unfit(out: Path) -> list[str]:
    told = []
    for changes in ({"precision": "fp16"}, {"replicas": 2, "batch_size": 15}):
        try:
            fit(small_config(out, **changes), progress=False)
        except ValueError as error:
            told.append(str(error))
    return told


def test_a_remote_split_has_as_many_batches_as_the_real_one() -> None:
    data = Own().load(small_config(Path("run")))
    for train, start in ((True, 0), (True, 3), (False, 0), (False, 2)):
        remote = RemoteSplit(len(data.validation)).batches(16, train=train, start=start)
        assert len(list(remote)) == len(list(data.validation.batches(16, train=train, start=start)))


# --- the command ---

OPTIONS = (
    "--model", "resnet20", "--modules", "4", "--num-train", "256", "--num-validation", "32", "--batch-size", "32",
    "--epochs", "6", "--precision", "fp32", "--num-threads", "1", "--checkpoint-every", "4", "--tensorboard", "false",
)  # fmt: skip
TORCHRUN = ("-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2", "--max-restarts", "1")


def command(*arguments: str, torchrun: bool = False) -> subprocess.Popen[str]:
    start = [*(TORCHRUN if torchrun else ()), "-m", "torchlocal"]
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": os.pathsep.join(sys.path)}
    return subprocess.Popen(
        [sys.executable, *start, *arguments],
        env=environment, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True,
    )  # fmt: skip


def rank_process(parent: int, rank: int) -> int:
    """The process of a rank, among the children of the one that started it."""
    for folder in Path("/proc").glob("[0-9]*"):
        try:
            status = (folder / "stat").read_text().rpartition(")")[2].split()
            if int(status[1]) == parent and f"\0RANK={rank}\0" in "\0" + (folder / "environ").read_text():
                return int(folder.name)
        except OSError:  # gone meanwhile
            continue
    raise AssertionError(f"there is no rank {rank}")


def wait_for(path: Path, process: subprocess.Popen[str]) -> None:
    end = time.monotonic() + 120
    while not path.exists():
        assert process.poll() is None and time.monotonic() < end, process.communicate()
        time.sleep(0.05)


def test_a_killed_rank_ends_the_run_and_is_named(tmp_path: Path) -> None:
    out = tmp_path / "run"
    with command("fit", *OPTIONS, "--epochs", "500", "--ranks", "2", "--out", str(out)) as process:
        wait_for(out / "last.pt", process)
        os.kill(rank_process(process.pid, 1), signal.SIGKILL)
        start = time.monotonic()
        _, told = process.communicate(timeout=60)
        seconds = time.monotonic() - start
    assert process.returncode == 2, told
    assert seconds < 20
    lines = [line for line in told.splitlines() if line.startswith("torchlocal")]
    assert any(line.startswith("torchlocal (rank 0): rank 1 (local module") and " is gone (" in line for line in lines)
    assert lines[-1] == (
        "torchlocal: rank 1 of 2 was killed (SIGKILL), which ended the run. Continue with "
        f"`torchlocal fit --resume {out} --ranks 2`."
    )


def test_a_restarted_run_ends_as_if_nothing_had_happened(tmp_path: Path) -> None:
    alone, out = tmp_path / "alone", tmp_path / "run"
    with command("fit", *OPTIONS, "--quiet", "--out", str(alone)) as process:
        assert process.wait(120) == 0
    with command("fit", *OPTIONS, "--quiet", "--out", str(out), torchrun=True) as process:
        wait_for(out / "last.pt", process)
        os.kill(rank_process(process.pid, 0), signal.SIGKILL)
        _, told = process.communicate(timeout=200)
    assert process.returncode == 0, told
    assert_same_run(out, alone)


def test_an_interrupted_command_saves_and_goes_on_alone(tmp_path: Path) -> None:
    out = tmp_path / "run"
    with command("fit", *OPTIONS, "--epochs", "500", "--ranks", "2", "--out", str(out)) as process:
        wait_for(out / "last.pt", process)
        process.send_signal(signal.SIGTERM)
        _, told = process.communicate(timeout=60)
    assert process.returncode == 143, told
    assert told.count("stopped by SIGTERM after step") == 1  # by one rank, not by each
    step = torch.load(out / "last.pt", weights_only=True)["step"]
    with command("fit", "--config", str(out / "config.yaml"), "--resume") as process:
        while torch.load(out / "last.pt", weights_only=True)["step"] <= step:
            assert process.poll() is None
            time.sleep(0.1)
        process.send_signal(signal.SIGTERM)
        process.communicate(timeout=60)


def test_numbers_of_ranks_that_do_not_fit_are_refused(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    arguments = ["fit", "--out", str(tmp_path / "run"), "--ranks"]
    assert cli.main([*arguments, "3", "--replicas", "2"]) == 2
    assert "--ranks 3 must be a multiple of --replicas 2, at least 1." in capsys.readouterr().err
    assert cli.main([*arguments, "0"]) == 2
    assert cli.main([*arguments, "1", "--timeout", "0"]) == 2
    assert "timeout=0.0 must be a number of seconds above 0." in capsys.readouterr().err
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize("worlds", [(1, 2), (2, 1)])
def test_a_run_with_rounded_boundaries_goes_on_with_or_without_ranks(
    pool: Pool, tmp_path: Path, uninterrupted: Path, worlds: tuple[int, int]
) -> None:
    """int4 between two stages: interrupted and resumed on one process and on two, bit for bit one run."""
    changes = {"boundary": "int4", "stages": [1, 2]}
    fit(small_config(tmp_path / "whole", **changes), progress=False)
    whole, exact = ((folder / "result.json").read_text() for folder in (tmp_path / "whole", uninterrupted))
    assert json.loads(whole)["validation_accuracy"] != json.loads(exact)["validation_accuracy"]
    config = small_config(tmp_path / "run", **changes)
    for i, (world, stop_after) in enumerate(zip(worlds, (4, None), strict=True)):
        folder = tmp_path / str(i)
        folder.mkdir()
        arguments = (config, bool(i), stop_after)
        told = [run(*arguments)] if world == 1 else pool.run(world, folder, run, *arguments)
        assert stop_after is None or told[-1].startswith("Interrupted: stopped by SIGTERM after step ")
    assert_same_run(tmp_path / "run", tmp_path / "whole")


def test_stages_are_free_where_nothing_is_rounded(tmp_path: Path) -> None:
    def fixed(**changes: Any) -> dict[str, Any]:
        return fixed_fields(small_config(tmp_path, **changes).plain())

    assert fixed(stages=[1, 2]) == fixed(stages=[2, 1]) == fixed()
    assert fixed(stages=[1, 2], boundary="int8") != fixed(stages=[2, 1], boundary="int8") != fixed()


def test_a_boundary_without_stages_that_fit_is_refused_on_one_process(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="boundary='int8': one process sends nothing to other stages"):
        fit(small_config(tmp_path / "run", boundary="int8"), progress=False)
    with pytest.raises(ValueError, match=r"^stages=\[1, 7\] does not give 3 local modules to 2 stages: give 2 numbers"):
        fit(small_config(tmp_path / "run", boundary="int8", stages=[1, 7]), progress=False)
