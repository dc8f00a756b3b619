"""Faults of runs and of the command: one owner per folder, nothing lost, and an answer at once."""

from __future__ import annotations

import contextlib
import errno
import json
import os
import re
import shlex
import shutil
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

import torchlocal
from torchlocal import rules
from torchlocal.cli import commands as cli
from torchlocal.cli.commands import main
from torchlocal.compare.comparison import CompareConfig, compare
from torchlocal.guidance import PeriodicGuidance, PhasedGuidance, RandomGuidance
from torchlocal.run import checkpoint, config, trainer
from torchlocal.run.config import FitConfig
from torchlocal.run.folder import Owned, Ownership, temporary_name
from torchlocal.run.trainer import fit

# --- the command answers ---


def python(code: str, *arguments: str) -> subprocess.CompletedProcess[str]:
    """What a fresh Python that imports this torchlocal says."""
    code = f"import sys; sys.path.insert(0, {str(torchlocal.__path__[0]) + '/..'!r})\n{code}"
    return subprocess.run([sys.executable, "-c", code, *arguments], capture_output=True, text=True, timeout=120)


@pytest.mark.parametrize(
    ("argv", "code"),
    [
        ("--help", 0),
        ("fit --help", 0),
        ("compare --help", 0),
        ("plan --help", 0),
        ("recipes", 0),
        ("fit --bogus", 2),
        ("fit --lr fast", 2),
        ("fit --lr -1", 2),
        ("fit --rule bogus", 2),
        ("compare --methods local bogus", 2),
        ("plan --budget much", 2),
        ("evaluate", 2),
        ("bogus", 2),
    ],
)
def test_the_command_answers_without_torch(argv: str, code: int) -> None:
    told = python(
        "from torchlocal.cli.commands import main\n"
        f"code = main({argv.split()!r})\n"
        "print('torch', 'torch' in sys.modules, file=sys.stderr)\n"
        "sys.exit(code)\n"
    )
    assert told.returncode == code, told.stderr
    assert told.stderr.splitlines()[-1] == "torch False"


def test_public_names_are_there_when_asked_for() -> None:
    told = python(
        "import torchlocal as tl\n"
        "assert 'torch' not in sys.modules and set(tl.__all__) <= set(dir(tl))\n"
        "assert tl.plan.__name__ == 'plan' and callable(tl.plan), tl.plan\n"
        "from torchlocal import *\n"
        "assert plan is tl.plan and local_step.__module__ == 'torchlocal.steps' and memory.measure\n"
        "print(hasattr(tl, 'bogus'))\n"
    )
    assert (told.returncode, told.stdout) == (0, "False\n"), told.stderr


@pytest.mark.parametrize(
    "module",
    [
        "run.config",
        "compare.methods",
        "budget",
        "network",
        "rules.man",
        "parallel",
        "memory",
        "steps",
        "recompute",
        "cut.inside",
    ],
)
def test_every_file_can_be_entered_first(module: str) -> None:
    told = python(f"import torchlocal.{module}")
    assert told.returncode == 0, told.stderr


def test_names_of_rules_are_those_of_the_rules() -> None:
    assert tuple(rules.RULES) == config._RULES
    with pytest.raises(ValueError, match="auxiliary"):
        config.FitConfig.of(auxiliary="bogus")


def refused(argv: list[str], capsys: Any) -> str:
    """The one line that tells what is wrong with a command line."""
    capsys.readouterr()
    code = main(argv)
    out, err = capsys.readouterr()
    assert (code, out) == (2, "") and len(err.splitlines()) == 1, (code, out, err)
    assert err.startswith("torchlocal: ") and err.endswith(".\n")
    return err.removeprefix("torchlocal: ").rstrip("\n")


# --- a run folder has one owner ---


def small_config(out: Path, **changes: Any) -> FitConfig:
    """Two epochs of two steps."""
    values: dict[str, Any] = {
        "out": str(out), "model": "mlp", "modules": 2, "data": "digits", "num_train": 64, "num_validation": 32,
        "batch_size": 32, "epochs": 2, "precision": "fp32", "device": "cpu", "num_threads": 1, "tensorboard": False,
    }  # fmt: skip
    return FitConfig.of(**(values | changes))


TINY = [
    "--model=mlp", "--modules=2", "--data=digits", "--num-train=64", "--num-validation=32", "--batch-size=32",
    "--precision=fp32", "--device=cpu", "--num-threads=1", "--tensorboard=false",
]  # fmt: skip


def start(*arguments: str, **options: Any) -> subprocess.Popen[str]:
    """A process that runs the command, in a process group of its own."""
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": os.pathsep.join(sys.path)}
    streams = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE} | options
    return subprocess.Popen(
        [sys.executable, "-m", "torchlocal", *arguments], env=environment, text=True, start_new_session=True, **streams
    )


def wait_for(holds: Callable[[], Any], process: subprocess.Popen[str] | None = None, seconds: float = 120) -> None:
    end = time.monotonic() + seconds
    while not holds():
        assert time.monotonic() < end, "it takes too long"
        assert process is None or process.poll() is None, process.communicate()
        time.sleep(0.05)


def test_a_folder_that_another_process_writes_is_refused(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    out = tmp_path / "run"
    with start("fit", *TINY, "--epochs=100000", f"--out={out}", stderr=subprocess.DEVNULL) as process:
        wait_for((out / "last.pt").exists, process)
        before = (out / "config.yaml").read_bytes()
        for argv in (["fit", *TINY, "--epochs=1", "--seed=5"], ["fit", *TINY, "--epochs=100000", "--resume"]):
            told = refused([*argv, f"--out={out}"], capsys)
            assert re.fullmatch(
                rf"out='{out}' is being written by process {process.pid} on \S+, since [-\d]+ [:\d]+: wait until it "
                "has ended, stop it, or choose another out.",
                told,
            )
        assert (out / "config.yaml").read_bytes() == before
        process.kill()
    with Ownership(out, str(out)):  # its lock has died with it
        pass
    assert not (out / ".lock").exists()


def test_a_comparison_owns_its_folder(tmp_path: Path) -> None:
    config = CompareConfig(out=str(tmp_path / "c"), methods=("local",), timing_rounds=0, fit=small_config(tmp_path))
    with Ownership(tmp_path / "c", "c"), pytest.raises(Owned, match=f"process {os.getpid()} on "):
        compare(config, progress=False)
    with Ownership(tmp_path / "c/local/seed0", "c"), pytest.raises(ValueError, match=f"local, seed 0: .*{os.getpid()}"):
        compare(config, progress=False)
    assert not (tmp_path / "c/report.html").exists()
    compare(config, progress=False)
    assert (tmp_path / "c/report.html").exists() and not list(tmp_path.rglob(".lock"))


def test_the_lock_dies_with_its_process_though_a_fork_lives_on(tmp_path: Path) -> None:
    """A worker that reads data is such a fork."""
    code = (
        "import os, sys, time\n"
        "from pathlib import Path\n"
        "from torchlocal.run.folder import Ownership\n"
        f"owned = Ownership(Path({str(tmp_path)!r}), 'x')\n"
        "if os.fork() == 0:\n"
        "    time.sleep(60)\n"
        "    os._exit(0)\n"
        "print('ready', flush=True)\n"
        "time.sleep(60)\n"
    )
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(sys.path)}
    with subprocess.Popen(
        [sys.executable, "-c", code], env=environment, stdout=subprocess.PIPE, text=True, start_new_session=True
    ) as process:
        assert process.stdout is not None and process.stdout.readline() == "ready\n"
        try:
            with pytest.raises(Owned):
                Ownership(tmp_path, "x")
            process.kill()
            process.wait(60)
            Ownership(tmp_path, "x", patience=30).release()
        finally:
            os.killpg(process.pid, signal.SIGKILL)


def test_of_many_that_come_and_go_one_is_the_owner(tmp_path: Path) -> None:
    """Each of three processes adds 1 two hundred times, in a folder that comes and goes with its owner."""
    code = (
        "import sys\n"
        "from pathlib import Path\n"
        "from torchlocal.run import folder as room\n"
        "room._WAIT = 0.0\n"
        f"folder, count = Path({str(tmp_path / 'a/b')!r}), Path({str(tmp_path / 'count')!r})\n"
        "for _ in range(200):\n"
        "    with room.Ownership(folder, 'x', patience=100):\n"
        "        value = int(count.read_text())\n"
        "        count.write_text(str(value + 1))\n"
    )
    (tmp_path / "count").write_text("0")
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(sys.path)}
    processes = [subprocess.Popen([sys.executable, "-c", code], env=environment) for _ in range(3)]
    assert [process.wait(120) for process in processes] == [0, 0, 0]
    assert (tmp_path / "count").read_text() == "600"
    assert not list(tmp_path.rglob(".lock"))


def test_what_a_killed_owner_left_half_written_is_removed(tmp_path: Path) -> None:
    half = temporary_name(tmp_path / "last.pt")
    assert half != temporary_name(tmp_path / "last.pt") and half.parent == tmp_path
    kept = tmp_path / ".notes.tmp"
    for path in (half, kept):
        path.write_text("x")
    with Ownership(tmp_path, "x"):
        assert kept.exists() and not half.exists()


def test_a_folder_made_for_nothing_is_removed(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="batch_size=999"):
        fit(small_config(tmp_path / "a" / "b", batch_size=999), progress=False)
    assert not (tmp_path / "a").exists()


def test_a_best_checkpoint_of_another_run_is_never_reported(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    fit(small_config(tmp_path / "other", seed=1), progress=False)
    for moment, resume in (("before resuming", True), ("before the end", False)):
        out = tmp_path / moment
        real = checkpoint.save_checkpoint

        def save(path: Path, state: Any, out: Path = out, real: Any = real, resume: bool = resume) -> None:
            real(path, state)
            if path.name == "last.pt" and len(state["rows"]) == 2 - resume:
                shutil.copy(tmp_path / "other/best.pt", out / "best.pt")
                if resume:
                    raise KeyboardInterrupt

        with monkeypatch.context() as patch:
            patch.setattr(checkpoint, "save_checkpoint", save)
            with pytest.raises(KeyboardInterrupt if resume else ValueError) as error:
                fit(small_config(out), progress=False)
        if resume:
            with pytest.raises(ValueError) as error:
                fit(small_config(out), resume=True, progress=False)
        assert str(error.value) == (
            f"{out}/best.pt is of another run than last.pt beside it: put the right one back, or train again"
        )
        assert not (out / "result.json").exists()


def test_a_failed_clean_up_does_not_mask_what_failed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(*_: Any, **__: Any) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    def fail_otherwise(*_: Any, **__: Any) -> None:
        raise OSError(errno.EIO, "Input/output error")

    monkeypatch.setattr(os, "fsync", fail)
    monkeypatch.setattr(Path, "unlink", fail_otherwise)
    with pytest.raises(OSError, match=r"x\.json could not be written: No space left on device; make room on the disk$"):
        checkpoint.write_json(tmp_path / "x.json", {})


# --- a run that is stopped, and how it goes on ---


def end(process: subprocess.Popen[str]) -> None:
    with contextlib.suppress(ProcessLookupError):
        os.killpg(process.pid, signal.SIGKILL)


@pytest.mark.parametrize(("signum", "ranks"), [(signal.SIGHUP, 1), (signal.SIGUSR1, 2)])
def test_a_hang_up_and_a_scheduler_save_like_sigterm(tmp_path: Path, signum: signal.Signals, ranks: int) -> None:
    """And the hint is a command that goes on, as it stands, with the ranks; in a folder with a space in its name."""
    out = tmp_path / "a run"
    argv = ["fit", *TINY, "--epochs=100000", f"--out={out}", "--quiet", f"--ranks={ranks}"]
    with start(*argv, stdout=subprocess.DEVNULL) as process:
        wait_for((out / "last.pt").exists, process)
        process.send_signal(signum)
        _, told = process.communicate(timeout=100)
    assert process.returncode == 128 + signum
    assert len(re.findall(rf"stopped by {signum.name} after step \d+ of 200000; saved in", told)) == 1, told
    hints = re.findall(r"Continue with `torchlocal (.*?)`\.", told)
    assert hints == [f"fit --resume '{out}'" + (" --ranks 2" if ranks > 1 else "")]
    assert len(told.splitlines()) == ranks  # what was saved, and with ranks what to do
    step = checkpoint.load_checkpoint(out / "last.pt")["step"]
    with start(*shlex.split(hints[0]), "--quiet", stdout=subprocess.DEVNULL) as process:
        wait_for(lambda: checkpoint.load_checkpoint(out / "last.pt")["step"] > step, process)
        end(process)


def test_nothing_is_offered_to_go_on_with_where_nothing_has_begun(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def stop(*_: Any) -> None:
        os.kill(os.getpid(), signal.SIGTERM)

    fit(small_config(tmp_path / "old", epochs=1), progress=False)
    before = {path: path.read_bytes() for path in (tmp_path / "old").iterdir()}
    monkeypatch.setattr(trainer, "load_shared_data", stop)
    for out in ("new", "old"):
        (tmp_path / "old/result.json").unlink(missing_ok=True)
        argv = ["fit", *TINY, "--epochs=2", f"--out={tmp_path / out}", *(["--resume"] if out == "old" else [])]
        monkeypatch.setattr(checkpoint, "check_same_config", lambda *_: None)
        assert main(argv) == 143
        assert capsys.readouterr().err.splitlines()[-1] == "torchlocal: Terminated."
    assert not (tmp_path / "new").exists()
    del before[tmp_path / "old/result.json"]
    assert before == {path: path.read_bytes() for path in (tmp_path / "old").iterdir()}


def test_ranks_end_with_their_launcher(tmp_path: Path) -> None:
    """Killed, it cannot tell them; they save and leave, and their folder is free again."""
    out = tmp_path / "run"
    argv = ["fit", *TINY, "--modules=3", "--epochs=100000", f"--out={out}", "--ranks=2"]
    with start(*argv, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL) as process:
        wait_for((out / "last.pt").exists, process)
        ranks = processes_of(str(out)) - {process.pid}
        assert len(ranks) == 2
        process.kill()
        process.wait(60)
        wait_for(lambda: not ranks & processes_of(str(out)))
    Ownership(out, str(out)).release()
    assert checkpoint.load_checkpoint(out / "last.pt", resumable=True)["step"] > 0


def processes_of(argument: str) -> set[int]:
    """The processes with this in their command line that are alive."""
    found = set()
    for folder in Path("/proc").glob("[0-9]*"):
        with contextlib.suppress(OSError):
            if argument in (folder / "cmdline").read_text():
                found.add(int(folder.name))
    return found


def test_ranks_leave_nothing_in_the_temporary_folder(tmp_path: Path) -> None:
    (tmp_path / "tmp").mkdir()
    environment = {**os.environ, "TMPDIR": str(tmp_path / "tmp"), "PYTHONPATH": os.pathsep.join(sys.path)}
    argv = [sys.executable, "-m", "torchlocal", "fit", *TINY, "--epochs=1", "--ranks=2", f"--out={tmp_path / 'run'}"]
    told = subprocess.run([*argv, "--quiet"], env=environment, capture_output=True, text=True, timeout=200)
    assert (told.returncode, told.stderr) == (0, "")
    assert not list((tmp_path / "tmp").iterdir())


@pytest.mark.parametrize("ranks", [1, 2])
def test_a_closed_pipe_does_not_end_the_training(tmp_path: Path, ranks: int) -> None:
    """`torchlocal fit ... 2>&1 | head -1`."""
    argv = ["fit", *TINY, "--epochs=20", f"--out={tmp_path / 'run'}", f"--ranks={ranks}"]
    with start(*argv, stderr=subprocess.STDOUT) as process:
        assert process.stdout is not None
        assert process.stdout.readline().startswith("epoch 1/20")
        process.stdout.close()
        assert process.wait(200) == 0
    assert json.loads((tmp_path / "run/result.json").read_text())["epochs"] == 20


def test_a_closed_pipe_does_not_hide_an_error(tmp_path: Path) -> None:
    read, write = os.pipe()
    os.close(read)
    with start("fit", *TINY, "--lr=1e30", f"--out={tmp_path / 'run'}", stdout=write, stderr=write) as process:
        os.close(write)
        assert process.wait(200) == 2


@pytest.mark.parametrize("module", ["torchlocal.cli.options", "numpy", "torch.nn", "torchlocal.run.trainer"])
def test_ctrl_c_during_the_imports_is_one_line(tmp_path: Path, module: str) -> None:
    told = python(
        "import os, signal\n"
        "signal.signal(signal.SIGINT, signal.default_int_handler)\n"
        "class Finder:\n"
        "    def find_spec(self, name, *_):\n"
        f"        if name == {module!r}:\n"
        "            os.kill(os.getpid(), signal.SIGINT)\n"
        "sys.meta_path.insert(0, Finder())\n"
        "from torchlocal.__main__ import main\n"
        "sys.exit(main())\n",
        *("fit", *TINY, "--epochs=1", "--quiet", f"--out={tmp_path / 'run'}"),
    )
    assert (told.returncode, told.stdout, told.stderr) == (130, "", "torchlocal: Interrupted.\n")


def test_a_moved_run_goes_on_where_it_lies(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    old, new = tmp_path / "old", tmp_path / "new"
    real = checkpoint.save_checkpoint

    def save(path: Path, state: Any) -> None:
        real(path, state)
        if path.name == "last.pt":
            raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(checkpoint, "save_checkpoint", save)
        assert main(["fit", *TINY, "--epochs=2", "--out=old"]) == 130
    assert "Continue with `torchlocal fit --resume old`." in capsys.readouterr().err
    old.rename(new)
    told = refused(["fit", "--config=new/config.yaml", "--resume"], capsys)
    assert told == (
        "new/config.yaml is of a run that was moved here from old: go on with `torchlocal fit --resume new`."
    )
    assert main(["fit", "--resume", "new", "--quiet"]) == 0
    assert not old.exists() and json.loads((new / "result.json").read_text())["epochs"] == 2
    assert main(["fit", "--resume=new", "--quiet"]) == 0  # it has ended: the result is told again
    capsys.readouterr()
    assert "give the folder of a run" in refused(["fit", "--resume", "nowhere"], capsys)
    assert "leave --out out" in refused(["fit", "--resume", "new", "--out=old"], capsys)
    (tmp_path / "c").mkdir()
    (tmp_path / "c/compare.yaml").write_text("")
    told = refused(["fit", "--resume", "c"], capsys)
    assert "go on with `torchlocal compare --config c/compare.yaml --out c`" in told


def test_a_finished_run_cannot_be_made_longer(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    fit(small_config(tmp_path / "run"), progress=False)
    told = refused(["fit", "--resume", str(tmp_path / "run"), "--epochs=5"], capsys)
    assert told == (
        f"{tmp_path}/run/result.json is of another configuration: epochs (2 there, 5 now); learning rate and guidance "
        "are spread over the length of a run, so it is not made longer or shorter: leave it as it is, or train "
        "anew with another out."
    )


# --- what cannot work is one sentence ---


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("lr: 2020-01-01", "lr holds 2020-01-01, which is of the kind date: give numbers and words"),
        ("lr: 2020-13-45", "is not valid YAML"),
        ("lr: " + "[" * 3000, "holds brackets in brackets without end"),
        ("rule_options: " + "[" * 3000 + "]" * 3000, "holds brackets in brackets without end"),
        (
            "rule_options: {a: " + "[" * 50 + "]" * 50 + "}",
            "rule_options holds too many values, or one inside the other",
        ),
        ("rule_options: &a {x: *a}", "rule_options holds too many values, or one inside the other"),
        ("rule_options: {2020-01-01: 3}", "rule_options holds 2020-01-01, which is of the kind date"),
        ("lr: !!binary aGVsbG8=", "lr holds b'hello', which is of the kind bytes"),
        ("lr: !!set {a, b}", "of the kind set"),
        (
            "rule_options:\n  a0: &a0 [x, x, x, x, x, x, x, x, x, x]\n"
            + "".join(f"  a{i}: &a{i} [{', '.join([f'*a{i - 1}'] * 10)}]\n" for i in range(1, 12)),
            "rule_options holds too many values",
        ),
        ("epochs: 99999999999999", "epochs=99999999999999 is larger than anything that could be counted"),
        ("lr: 1.0e+308", "lr=1e+308 is more than a float32 holds: make it smaller."),
    ],
)
def test_a_recipe_that_cannot_work(text: str, message: str, tmp_path: Path, capsys: Any) -> None:
    (tmp_path / "r.yaml").write_text(text)
    for command in ("fit", "compare"):
        told = refused([command, "--config", str(tmp_path / "r.yaml"), f"--out={tmp_path / 'out'}"], capsys)
        assert message in told and len(told) < 300
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    ("argv", "message"),
    [
        ("fit TINY --steps 3000000000", "steps=3000000000 is more than 100,000,000: make it smaller."),
        ("fit TINY --epochs 99999999999", "epochs=99999999999 make 199,999,999,998 steps, more than 100,000,000"),
        ("compare TINY --steps 3000000000", "steps=3000000000 is more than 100,000,000"),
        (
            "compare TINY --methods local --timing-rounds 99999999999",
            "timing_rounds=99999999999 is more than 1,000",
        ),
        ("fit TINY --num-threads 99999999999", "num_threads=99999999999 is more than 4,096"),
        ("fit TINY --num-workers 99999999999", "num_workers=99999999999 is more than 1,024"),
        ("fit TINY --weight-decay 1e308", "weight_decay=1e+308 is more than a float32 holds"),
        ("fit TINY --out ~nobody-here/x", "~nobody-here/x: there is no user 'nobody-here': write ./~nobody-here/x for"),
        ("fit TINY --data-root ~nobody-here", "there is no user 'nobody-here'"),
        ("fit --resume ~nobody-here", "there is no user 'nobody-here'"),
        ("evaluate ~nobody-here", "there is no user 'nobody-here'"),
        ("export ~nobody-here --to x.pt", "there is no user 'nobody-here'"),
        ("plan --figure ~nobody-here/x.png", "there is no user 'nobody-here'"),
        ("fit --rule-options LONG", "--rule-options expects options as {name: value}, got '[[["),
        ("fit --config LONG", "cannot be read (File name too long): give another name."),
        ("evaluate LONG", "File name too long."),
        ("plan --batch-size 999999999999", "--batch-size 999999999999 makes a batch of more than a pebibyte"),
        ("plan --batch-size 99999999999999", "batch_size=99999999999999 is larger than anything that could be counted"),
        ("plan --modules 99999", "--modules 99999: resnet32 can be cut into 16 at most; give fewer, or all."),
        ("plan --budget 1B", "--budget 1B is less than the 1.8 MiB that the parameters of resnet32 take by themselves"),
        ("plan --budget 9999999999999GiB", "is more than any memory has; give a size such as 8GiB or 500MB."),
        ("plan --num-classes 99999999999", "--num-classes: 99999999999 is more than 16,777,216: make it smaller."),
        ("plan --input 3x99999999999x3", "channels, height and width: 99999999999 is more than 16,777,216"),
        (
            "plan --model mlp --input 3x99999x99999",
            "there is not enough memory for another 122877542412288 bytes",
        ),
        ("partition --shape 3 99999999999 3", "channels, height and width: 99999999999 is more than 16,777,216"),
    ],
)
def test_a_command_line_that_cannot_work(
    argv: str, message: str, tmp_path: Path, capsys: Any, monkeypatch: Any
) -> None:
    monkeypatch.chdir(tmp_path)
    words = [word for given in argv.split() for word in (TINY if given == "TINY" else [given])]
    told = refused(["[" * 3000 if word == "LONG" else word for word in words], capsys)
    assert message in told and len(told) < 400
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize(
    ("name", "value", "message"),
    [
        (
            "version",
            None,
            "has checkpoint version None, this torchlocal reads version 3: use the torchlocal",
        ),
        ("config", None, "lacks config, as every checkpoint has it: use a copy, or the torchlocal that wrote it"),
        ("net", {"backbone.0.weight": 3}, "lacks net.backbone.0.weight"),
        ("data", {}, "lacks data.num_train, data.num_validation, data.num_classes, data.shape"),
        ("modules", "x", "lacks modules"),
        ("modules", [torch.zeros(2)], "lacks modules"),
        ("net", None, "lacks net"),
        ("net", 1.5, "lacks net"),
        ("version", torch.zeros(2), "has checkpoint version tensor([0., 0.])"),
        ("config", {"lr": torch.zeros(2)}, "lacks config"),
    ],
)
def test_a_checkpoint_without_its_parts(name: str, value: Any, message: str, tmp_path: Path, capsys: Any) -> None:
    fit(small_config(tmp_path, epochs=1), progress=False)
    (tmp_path / "result.json").unlink()
    for file in ("best.pt", "last.pt"):
        state = torch.load(tmp_path / file, weights_only=True)
        if value is None:
            del state[name]
        else:
            state[name] = value
        torch.save(state, tmp_path / file)
    for argv in (["evaluate", str(tmp_path)], ["export", str(tmp_path), f"--to={tmp_path / 'x.pt'}"]):
        assert f"best.pt {message}" in refused(argv, capsys)
    assert f"last.pt {message}" in refused(["fit", "--resume", str(tmp_path)], capsys)


@pytest.mark.parametrize(
    ("name", "change"),
    [
        ("position", lambda value: value | {"bogus": 1}),
        ("position", lambda value: value | {"best_epoch": 7}),
        ("position", lambda value: {name: v for name, v in value.items() if name != "step"}),
        ("position", lambda value: value | {"step": 10**30}),
        ("position", lambda value: value | {"seconds": []}),
        ("position", lambda value: value | {"seconds": float("nan")}),
        ("position", lambda value: value | {"epoch_guided": "x"}),
        ("position", lambda value: value | {"num_guided": torch.zeros(3)}),
        ("position", lambda value: value | {"epoch_full": 3}),
        ("rows", lambda value: ["x"]),
        ("rows", lambda value: [{}]),
        ("loss_sums", lambda value: value[:1].repeat(5)),
        ("random", lambda value: {}),
        ("random", lambda value: {"cpu": torch.zeros(3)}),
        ("optimizer", lambda value: {}),
        ("optimizer", lambda value: value | {"param_groups": []}),
    ],
)
def test_a_checkpoint_with_other_parts(name: str, change: Any, tmp_path: Path, capsys: Any) -> None:
    fit(small_config(tmp_path, epochs=1), progress=False)
    (tmp_path / "result.json").unlink()
    state = torch.load(tmp_path / "last.pt", weights_only=True)
    torch.save(state | {name: change(state[name])}, tmp_path / "last.pt")
    before = {path.name: path.read_bytes() for path in tmp_path.iterdir()}
    told = refused(["fit", "--resume", str(tmp_path)], capsys)
    assert told.startswith(f"{tmp_path}/last.pt does not hold what this torchlocal writes (")
    assert told.endswith("): use a copy, or the torchlocal that wrote it.")
    assert before == {path.name: path.read_bytes() for path in tmp_path.iterdir()}


def test_a_configuration_that_is_none(tmp_path: Path, capsys: Any) -> None:
    fit(small_config(tmp_path, epochs=1), progress=False)
    state = torch.load(tmp_path / "best.pt", weights_only=True)
    state["config"]["guidance"] = "x"
    torch.save(state, tmp_path / "best.pt")
    assert "guidance='x' must be `name: value` pairs" in refused(["evaluate", str(tmp_path)], capsys)


def test_a_result_without_its_parts(tmp_path: Path, capsys: Any) -> None:
    result = fit(small_config(tmp_path, epochs=1), progress=False)
    checkpoint.write_json(tmp_path / "result.json", {"config": result["config"]})
    assert "result.json is damaged: delete it, and resume to write it again" in refused(
        ["fit", "--resume", str(tmp_path)], capsys
    )


def test_a_long_run_is_looked_through_at_once() -> None:
    for guidance, expected in (
        (PhasedGuidance(share=0.2), True),
        (PeriodicGuidance(period=10**8 + 1), True),  # 1 of so many in the long run: not looked for
        (RandomGuidance(share=0.0), False),
        (PeriodicGuidance(period=5), True),
    ):
        bound = guidance.bind(num_steps=10**8, steps_per_epoch=10)
        assert trainer._guides_any(bound, 10**8) == expected
    assert not trainer._guides_any(PeriodicGuidance(period=7), 6)


# --- what other libraries say stays with them ---


def test_ranks_that_do_not_meet_say_so(tmp_path: Path) -> None:
    """The first of two, which comes alone, and one at a port that somebody else has."""
    with socket.socket() as other, socket.socket() as probe:
        for taken in (other, probe):
            taken.bind(("127.0.0.1", 0))
        other.listen()
        ports = [taken.getsockname()[1] for taken in (other, probe)]
        probe.close()
        for port in ports:
            place = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port), "WORLD_SIZE": "2", "RANK": "0"}
            environment = {**os.environ, **place, "PYTHONPATH": os.pathsep.join(sys.path), "OMP_NUM_THREADS": "1"}
            argv = ["fit", *TINY, "--epochs=2", "--quiet", "--timeout=2", f"--out={tmp_path / 'run'}"]
            told = subprocess.run(
                [sys.executable, "-m", "torchlocal", *argv],
                env=environment,
                capture_output=True,
                text=True,
                timeout=100,
            )
            assert told.returncode == 2
            assert told.stderr == (
                f"torchlocal (rank 0): the 2 ranks cannot meet at 127.0.0.1:{port} (waited up to 2 s): see whether all "
                "have started, with the same MASTER_ADDR and a MASTER_PORT that is free.\n"
            )
    assert not (tmp_path / "run").exists()


def test_a_rank_that_cannot_write_says_so_alone(tmp_path: Path) -> None:
    """A limit on the size of files is a disk that is full; the others only say who has left them."""
    code = (
        "import os, resource, sys\n"
        "resource.setrlimit(resource.RLIMIT_FSIZE, (100_000, 100_000))\n"
        "os.execv(sys.executable, [sys.executable, '-m', 'torchlocal', *sys.argv[1:]])\n"
    )
    out = tmp_path / "run"
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(sys.path)}
    argv = ["fit", *TINY, "--epochs=2", "--ranks=2", "--quiet", f"--out={out}"]
    told = subprocess.run(
        [sys.executable, "-c", code, *argv], env=environment, capture_output=True, text=True, timeout=200
    )
    assert told.returncode == 2
    first, *others = sorted(told.stderr.splitlines(), reverse=True)
    assert re.fullmatch(r"torchlocal \(rank 1\): \S+/best\.pt could not be written: File too large; .*", first), told
    assert len(others) < 2  # the launcher may end the other one before it sees that it is alone
    assert all(re.fullmatch(r"torchlocal \(rank 0\): .* is gone \(connection \w+\): see .*", line) for line in others)
    assert [path.name for path in out.iterdir()] == ["config.yaml"]


def test_no_memory_is_a_sentence(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    def broken(argv: Any) -> int:
        raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 20.00 MiB. GPU 0 has a total ...")

    monkeypatch.setitem(cli._RUNNERS, "recipes", broken)
    assert refused(["recipes"], capsys) == (
        "there is not enough memory for another 20.00 MiB: make the batch or the network smaller, or see what "
        "`torchlocal plan` recommends."
    )


def test_a_moved_comparison_is_not_begun_anew(tmp_path: Path, monkeypatch: Any, capsys: Any) -> None:
    monkeypatch.chdir(tmp_path)
    argv = [*TINY, "--epochs=1", "--methods", "local", "--timing-rounds=0", "--quiet"]
    assert main(["compare", *argv, "--out=old"]) == 0
    Path("old").rename("new")
    assert refused(["compare", "--config=new/compare.yaml"], capsys) == (
        "new/compare.yaml is of a run that was moved here from old: go on with `torchlocal compare --config "
        "new/compare.yaml --out new`."
    )
    assert main(["compare", "--config=new/compare.yaml", "--out=new", "--quiet"]) == 0
    assert not Path("old").exists()


def test_what_is_left_of_a_kill_at_the_very_end_is_removed(tmp_path: Path) -> None:
    """The lock of a run that has its result, a temporary file of a figure."""
    config = small_config(tmp_path / "run", epochs=1)
    fit(config, progress=False)
    for name in (".lock", f".last.pt.{'0' * 32}.tmp", ".mine"):
        (tmp_path / "run" / name).write_text("")
    fit(config, resume=True, progress=False)
    assert [path.name for path in (tmp_path / "run").glob(".*")] == [".mine"]
    figure = tmp_path / "figures" / f".accuracy.png.{'0' * 32}.tmp"
    figure.parent.mkdir()
    figure.write_text("")
    with Ownership(tmp_path, "out", inside=["figures", "absent"]):
        assert not figure.exists()
