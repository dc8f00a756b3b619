"""What is lost when runs are killed, checkpoints and data damaged, and command lines mistyped, at random.

    python benchmarks/soak.py --kills 1000 --checkpoints 1000 --commands 1000 --data 1000 --out soak

A command takes seconds to import torch and a fraction of one to do what is tried here. So this process imports all of
it, and each command runs in a fork of it: a process of its own, which is killed, and writes, as any other; its network
has narrower layers. The ranks of such a command are forks, too, of one that does what torchrun does. One trial in
--fresh starts real processes, with `python -m torchlocal` and torchrun.

Each trial is drawn from the seed and its number alone and leaves one line in OUT/log.jsonl, so a soak that was stopped
goes on where it was, and one trial can be repeated (`--only kills/17`). A trial has failed if

- kills: after SIGKILL, at a random moment, of one process, of two ranks, of their launcher or of a comparison, the same
  command does not end with 0, or not bit for bit like the one that nobody killed (lost), or half a file stays behind;
- checkpoints: a damaged file (bits, zeros, cut off) is neither refused in one sentence with exit code 2 nor loaded to
  the same result; one with other parts ends in anything but 0 or a sentence; or one that was refused has changed;
- commands: a random command line ends with an exit code other than 0 and 2, with a traceback, with more than one line
  of error, or not within --patience seconds;
- data: the same for damaged IDX and image files.

Prints how many were tried, how many failed, and in how many of these something was lost.
"""

from __future__ import annotations

import argparse
import contextlib
import gc
import gzip
import importlib
import io
import json
import os
import random
import re
import select
import shutil
import signal
import socket
import struct
import subprocess
import sys
import time
import traceback
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import nn

TINY = [
    "--model=mlp", "--modules=3", "--num-train=64", "--num-validation=32", "--batch-size=32", "--precision=fp32",
    "--device=cpu", "--num-threads=1", "--tensorboard=false", "--checkpoint-every=1", "--quiet",
]  # fmt: skip
IMPORTED = (
    "matplotlib.figure", "torch._dynamo", "torch.distributed", "torchlocal.budget", "torchlocal.compare.comparison",
    "torchlocal.compare.report", "torchlocal.parallel.launch", "torchlocal.parallel.network", "torchlocal.run.export",
)  # fmt: skip
EPOCHS = "--epochs=6"  # of two steps, each saved
LEAVE = 5.0  # seconds that ranks have to leave, before they are killed; torchrun's are 30
TIMES = ("seconds", "train_seconds", "epoch_seconds", "images_per_second", "run", "out")


class Failed(Exception):
    """A trial went wrong; with ``lost``, so did what was on the disk."""

    def __init__(self, told: str, *, lost: bool = False) -> None:
        super().__init__(told)
        self.lost = lost


# --- commands: in a fork of this process, or fresh ---


def warm_up() -> None:
    """Import and compute what every command would, but nothing that starts a thread which stays."""
    torch.set_num_threads(1)
    for name in IMPORTED:
        importlib.import_module(name)
    import PIL.Image
    import sklearn.datasets

    from torchlocal import models
    from torchlocal.cli import commands

    PIL.Image.init()
    digits = sklearn.datasets.load_digits()
    sklearn.datasets.load_digits = lambda: digits
    models.images._OWN["mlp"] = lambda classes, channels, size: nn.Sequential(
        nn.Flatten(),
        *(
            nn.Sequential(nn.Linear(n, 24, bias=False), nn.BatchNorm1d(24), nn.ReLU(inplace=True))
            for n in (channels * size[0] * size[1], 24, 24)
        ),
        nn.Linear(24, classes),
    )
    with contextlib.redirect_stdout(io.StringIO()):
        commands.main(["partition", "--model=mlp", "--modules=3", "--data=digits"])
    gc.collect()
    gc.freeze()


class Fork:
    """A command in a fork of this process, the first of a session of its own; as much of Popen as is used here."""

    def __init__(self, arguments: list[str], cwd: Path, ranks: int) -> None:
        self.returncode: int | None = None
        sys.stdout.flush()
        self.pid = os.fork()
        if self.pid == 0:
            _end_with(lambda: _as_command(arguments, cwd, ranks))

    def poll(self) -> int | None:
        if self.returncode is None:
            pid, status = os.waitpid(self.pid, os.WNOHANG)
            self.returncode = os.waitstatus_to_exitcode(status) if pid else None
        return self.returncode

    def wait(self, patience: float) -> int:
        if self.poll() is None:
            handle = os.pidfd_open(self.pid)
            try:
                if not select.select([handle], [], [], patience)[0]:
                    raise subprocess.TimeoutExpired("torchlocal", patience)
            finally:
                os.close(handle)
        code = self.poll()
        assert code is not None
        return code


def _end_with(code: Callable[[], int]) -> None:
    """Leave a fork, whatever happens in it, with what this returns."""
    found = 1
    try:
        found = code()
    except BaseException:
        traceback.print_exc()
    finally:
        with contextlib.suppress(Exception):
            sys.stdout.flush()
            sys.stderr.flush()
        os._exit(found)


def _as_command(arguments: list[str], cwd: Path, ranks: int) -> int:
    os.setsid()
    os.chdir(cwd)
    for name, number in (("stdout", 1), ("stderr", 2)):
        os.dup2(os.open(cwd / f".{name}", os.O_WRONLY | os.O_CREAT | os.O_TRUNC), number)
        setattr(sys, name, os.fdopen(os.dup(number), "w"))
    os.environ.update(environment(cwd))
    signal.signal(signal.SIGINT, signal.default_int_handler)
    warnings.simplefilter("ignore")
    return _launch(arguments, ranks) if ranks > 1 else _main(arguments)


def _main(arguments: list[str]) -> int:
    from torchlocal.cli.commands import main

    sys.argv = ["torchlocal", *arguments]
    return main(arguments)


def _launch(arguments: list[str], ranks: int) -> int:
    """Fork the ranks, and do with them what torchrun does: when one is lost, the others have to leave."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    os.environ |= {
        "WORLD_SIZE": str(ranks), "LOCAL_WORLD_SIZE": str(ranks), "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port),
        "TORCHELASTIC_RUN_ID": "soak", "TORCHLOCAL_LAUNCHER": str(os.getpid()),
    }  # fmt: skip
    running = {}
    for rank in range(ranks):
        if (pid := os.fork()) == 0:
            os.environ |= {"RANK": str(rank), "LOCAL_RANK": str(rank)}
            _end_with(lambda: _main(arguments))
        running[pid] = rank
    worst, end = 0, float("inf")
    while running:
        pid, status = os.waitpid(-1, os.WNOHANG)
        if pid:
            running.pop(pid)
            code = os.waitstatus_to_exitcode(status)
            if code and not worst:
                worst, end = abs(code), time.monotonic() + LEAVE
                for other in running:
                    os.kill(other, signal.SIGTERM)
        elif time.monotonic() > end:  # it waits, in a call that no signal ends, for the one that is lost
            for other in running:
                os.kill(other, signal.SIGKILL)
            end = float("inf")
        else:
            time.sleep(0.01)
    return worst


def environment(home: Path) -> dict[str, str]:
    return {**os.environ, "HOME": str(home), "OMP_NUM_THREADS": "1", "COLUMNS": "100", "PYTHONWARNINGS": "ignore"}


def begin(arguments: list[str], cwd: Path, *, fresh: bool, ranks: int = 1) -> Fork | subprocess.Popen[bytes]:
    if not fresh:
        return Fork(arguments, cwd, ranks)
    with (cwd / ".stdout").open("wb") as out, (cwd / ".stderr").open("wb") as err:
        return subprocess.Popen(
            [sys.executable, "-m", "torchlocal", *arguments],
            env=environment(cwd), cwd=cwd, start_new_session=True, stdout=out, stderr=err,
        )  # fmt: skip


def run(
    arguments: list[str], patience: float, cwd: Path, *, fresh: bool, ranks: int = 1
) -> subprocess.CompletedProcess[str]:
    process = begin(arguments, cwd, fresh=fresh, ranks=ranks)
    try:
        code = process.wait(patience)
    except subprocess.TimeoutExpired as error:
        with contextlib.suppress(ProcessLookupError):
            os.killpg(process.pid, signal.SIGKILL)
        process.wait(patience)
        raise Failed(f"no end within {patience:g} s") from error
    texts = [(cwd / f".{name}").read_text(errors="replace") for name in ("stdout", "stderr")]
    return subprocess.CompletedProcess(arguments, code, *texts)


def sentence(told: subprocess.CompletedProcess[str], codes: tuple[int, ...]) -> None:
    """Refuse an exit code that is not one of these, and an error that is not one line."""
    lines = [line for line in told.stderr.splitlines() if not line.startswith("torchlocal: warning: ")]
    if told.returncode not in codes or "Traceback" in told.stderr:
        raise Failed(f"exit code {told.returncode}: {told.stderr[-300:]}")
    if told.returncode and (len(lines) != 1 or not lines[0].startswith("torchlocal: ")):
        raise Failed(f"not one sentence: {told.stderr[-300:]}")


def same(a: Any, b: Any) -> bool:
    """Equal in every bit, but for times, places and names."""
    if isinstance(a, dict):
        return a.keys() == b.keys() and all(name in TIMES or same(a[name], b[name]) for name in a)
    if isinstance(a, list | tuple):
        return len(a) == len(b) and all(map(same, a, b))
    if isinstance(a, torch.Tensor):
        return torch.equal(a, b)
    return bool(a == b)


# --- kills ---

KINDS = {
    "one process": ["fit", *TINY, EPOCHS],
    "two ranks": ["fit", *TINY, EPOCHS, "--ranks=2"],
    "launcher": ["fit", *TINY, EPOCHS, "--ranks=2"],
    "compare": ["compare", *TINY, EPOCHS, "--methods", "local", "pgl", "--timing-rounds=0"],
}


def kill(draw: random.Random, folder: Path, fixed: Path, patience: float, fresh: bool) -> str:
    kind = draw.choice(list(KINDS))
    ranks = 2 if kind in ("two ranks", "launcher") else 1
    whole, out = fixed / f"{kind.replace(' ', '-')}{'-fresh' if fresh else ''}", folder / "run"
    arguments = [*KINDS[kind], "--data=digits"]
    if not (whole / "seconds").exists():
        shutil.rmtree(whole, ignore_errors=True)
        start = time.monotonic()
        sentence(run([*arguments, f"--out={whole / 'run'}"], patience, folder, fresh=fresh, ranks=ranks), (0,))
        (whole / "seconds").write_text(str(time.monotonic() - start))
    seconds = float((whole / "seconds").read_text())
    resume = [] if kind == "compare" else ["--resume"]
    in_training, num_kills, torn = 0, draw.randint(1, 3), 0
    for _ in range(num_kills):
        process = begin([*arguments, *resume, f"--out={out}"], folder, fresh=fresh, ranks=ranks)
        time.sleep(draw.uniform(0.3 if fresh else 0.05, 1.0) * seconds)
        in_training += process.poll() is None and any(out.rglob("config.yaml"))
        members = [pid for pid in _alive(process.pid, out) if pid != process.pid]
        victims = [process.pid] if kind != "two ranks" else [draw.choice(members or [process.pid])]
        for pid in victims:
            with contextlib.suppress(ProcessLookupError):
                os.kill(pid, signal.SIGKILL)
        try:
            process.wait(patience)
        except subprocess.TimeoutExpired as error:
            os.killpg(process.pid, signal.SIGKILL)
            raise Failed(f"{kind}: no end within {patience:g} s of a kill") from error
        end = time.monotonic() + patience
        while _alive(process.pid, out):
            if time.monotonic() > end:
                raise Failed(f"{kind}: ranks go on after their launcher")
            time.sleep(0.02)
        torn += any(path.name.startswith(".") and path.suffix != ".lock" for path in out.rglob("*"))
    sentence(run([*arguments, *resume, f"--out={out}"], patience, folder, fresh=fresh, ranks=ranks), (0,))
    results = sorted(path.relative_to(whole / "run") for path in (whole / "run").rglob("result.json"))
    for result in results:
        here, there = (json.loads((place / result).read_text()) for place in (out, whole / "run"))
        if not same(here, there):
            raise Failed(f"{kind}: {result} is another one than that of the run which nobody killed", lost=True)
        for name in ("last.pt", "best.pt"):
            states = [torch.load((p / result).with_name(name), weights_only=True) for p in (out, whole / "run")]
            if not same(*states):
                raise Failed(f"{kind}: {name} is another one", lost=True)
    left = [str(path.relative_to(out)) for path in out.rglob(".*")]
    if left or not results:
        raise Failed(f"{kind}: {left} stay behind")
    return f"{kind}: {num_kills} kills, {in_training} of them in training, {torn} while a file was being written"


def _alive(session: int, out: Path) -> list[int]:
    """The processes of a command, of a session of its own; torchrun's ranks, each of another, name the folder."""
    found = []
    for place in Path("/proc").glob("[0-9]*"):
        with contextlib.suppress(OSError):
            state, _, _, of = (place / "stat").read_text().rpartition(")")[2].split()[:4]
            own = int(of) == session or str(out).encode() in (place / "cmdline").read_bytes()
            if own and state not in "ZX" and int(place.name) != os.getpid():
                found.append(int(place.name))
    return found


# --- damaged checkpoints ---


def damage(draw: random.Random, content: bytes) -> tuple[str, bytes]:
    if not content:  # of one that was damaged before
        return "noise", draw.randbytes(draw.randint(1, 1000))
    kind = draw.choice(["bit", "bytes", "zeros", "cut", "appended", "doubled", "empty", "noise"])
    at, length = draw.randrange(len(content)), draw.randint(1, max(1, len(content) // 4))
    if kind == "bit":
        return kind, content[:at] + bytes([content[at] ^ 1 << draw.randrange(8)]) + content[at + 1 :]
    if kind == "bytes":
        return kind, content[:at] + draw.randbytes(min(length, len(content) - at)) + content[at + length :]
    if kind == "zeros":
        return kind, content[:at] + bytes(min(length, len(content) - at)) + content[at + length :]
    made = {
        "cut": content[:at],
        "appended": content + draw.randbytes(length),
        "doubled": content[:at] + content[max(0, at - length) :],
        "empty": b"",
        "noise": draw.randbytes(length),
    }
    return kind, made[kind]


def damaged_part(draw: random.Random, path: Path) -> str:
    """A file that is whole, but holds something else."""
    state = torch.load(path, weights_only=True)
    name = draw.choice(list(state))
    holder, key = state, name
    if isinstance(state[name], dict) and state[name] and draw.random() < 0.5:
        holder, key = state[name], draw.choice(list(state[name]))
    if draw.random() < 0.5:
        del holder[key]
    else:
        holder[key] = draw.choice([None, -1, 10**30, "x", [], {}, [[]], {"x": 1}, torch.zeros(3), float("nan")])
    torch.save(state, path)
    return f"{name}.{key}"


def checkpoint(draw: random.Random, folder: Path, fixed: Path, patience: float, fresh: bool) -> str:
    whole = fixed / ("stopped-fresh" if fresh else "stopped")
    if not (whole / "done").exists():
        shutil.rmtree(whole, ignore_errors=True)
        sentence(
            run(["fit", *TINY, "--epochs=2", "--data=digits", f"--out={whole / 'run'}"], patience, folder, fresh=fresh),
            (0,),
        )
        (whole / "done").touch()
    out = folder / "run"
    shutil.copytree(whole / "run", out)
    (out / "result.json").unlink()
    file = out / draw.choice(["last.pt", "best.pt"])
    part = draw.random() < 0.5
    if part:
        kind = damaged_part(draw, file)
    else:
        kind, content = damage(draw, file.read_bytes())
        file.write_bytes(content)
    before = {path.name: path.read_bytes() for path in out.iterdir()}
    told = run(["fit", "--resume", str(out), "--quiet"], patience, folder, fresh=fresh)
    sentence(told, (0, 2))
    after = {path.name: path.read_bytes() for path in out.iterdir()}
    if told.returncode == 2 and {n: c for n, c in before.items() if n.endswith(".pt")} != {
        n: c for n, c in after.items() if n.endswith(".pt")
    }:
        raise Failed(f"{file.name} ({kind}) was refused, but a checkpoint has changed", lost=True)
    if told.returncode == 0 and not part:  # bits that nobody reads
        results = [json.loads((place / "result.json").read_text()) for place in (out, whole / "run")]
        if not same(*results):
            raise Failed(f"{file.name} ({kind}) was taken, to another result", lost=True)
    sentence(run(["evaluate", str(out)], patience, folder, fresh=fresh), (0, 2))
    return f"{file.name} {kind}: {told.returncode}"


# --- command lines ---

VALUES = [  # none names a place outside the trial's folder that could be written to
    "0", "1", "2", "-1", "1e-3", "0.5", "1e308", "nan", "inf", "99999999999", "9" * 30, "true", "false", "null",
    "all", "fewest", "x", "", " ", "~", "~nobody", ".", "/dev/null", "[", "[[[[", "{}", "{a: 1}", "{a: [}", "[1, 2]",
    "a=b", "2020-01-01", "dgl", "sgd", "cosine", "digits", "cpu", "cuda", "fp32", "bf16", "1GiB", "modules", "é", "%s",
    "'", "--", "-", "*", "&a [*a]", "!!python/object:os.system",
]  # fmt: skip
RECIPES = ["{}", "lr: {}", "{}: 1", "guidance: {{{}: 1}}", "rule_options: {{a: {}}}", "compare: {}", "- {}", "{}\n{}"]


def command_line(draw: random.Random, folder: Path, fixed: Path, patience: float, fresh: bool) -> str:
    listing = fixed / "options.json"
    if not listing.exists():
        found = {}
        for name in ("fit", "compare", "partition", "plan", "evaluate", "export", "recipes"):
            told = run([name, "--help"], patience, folder, fresh=fresh)
            found[name] = sorted(set(re.findall(r"--[a-z][a-z.-]*", told.stdout)) - {"--help"})
        listing.write_text(json.dumps(found))
    options = json.loads(listing.read_text())
    name = draw.choice([*options, "bogus"])
    known = options.get(name, options["fit"])
    arguments = [name]
    if name in ("fit", "compare"):
        arguments += [*TINY, "--data=digits", "--epochs=1", "--out=run"]
        arguments += ["--methods", "local", "--timing-rounds=0"] if name == "compare" else []
    elif name == "plan":
        arguments += ["--model=mlp", "--input=1x8x8", "--modules", "2"]
    elif name == "partition":
        arguments += ["--model=mlp", "--modules=2", "--data=digits"]
    for _ in range(draw.randint(0, 3) if known else 0):
        word = draw.choice(known)
        if draw.random() < 0.1:
            word = word[: draw.randint(1, len(word))] + draw.choice(["", "x", "-"])
        value = draw.choice(VALUES)
        arguments += draw.choice([[word], [f"{word}={value}"], [word, value], [word, value, draw.choice(VALUES)]])
    if draw.random() < 0.3:
        (folder / "r.yaml").write_text(draw.choice(RECIPES).replace("{}", "{0}").format(draw.choice(VALUES)))
        arguments += ["--config", "r.yaml"]
    told = run(arguments, patience, folder, fresh=fresh)
    try:
        sentence(told, (0, 2))
    except Failed as error:
        raise Failed(f"{arguments[1:]}: {error}") from error
    return f"{name}: {told.returncode}"


# --- damaged data ---


def data(draw: random.Random, folder: Path, fixed: Path, patience: float, fresh: bool) -> str:
    if draw.random() < 0.5:
        kind, name = "idx", "fashion-mnist"
        for split, count in (("train", 96), ("t10k", 16)):
            images = struct.pack(">4BIII", 0, 0, 8, 3, count, 28, 28) + draw.randbytes(count * 784)
            labels = struct.pack(">4BI", 0, 0, 8, 1, count) + bytes(i % 10 for i in range(count))
            for part, content in (("images-idx3", images), ("labels-idx1", labels)):
                zipped = draw.random() < 0.5
                path = folder / f"{split}-{part}-ubyte{'.gz' if zipped else ''}"
                path.write_bytes(gzip.compress(content) if zipped else content)
    else:
        from PIL import Image

        kind, name = "images", "folder"
        for split, count in (("train", 50), ("test", 4)):
            for i in range(2 * count):
                place = folder / split / f"class{i % 2}"
                place.mkdir(parents=True, exist_ok=True)
                buffer = io.BytesIO()
                form = draw.choice(["PNG", "JPEG", "BMP", "GIF"])
                Image.frombytes("RGB", (16, 16), draw.randbytes(768)).save(buffer, form)
                (place / f"{i}.{form.lower()}").write_bytes(buffer.getvalue())
    for _ in range(draw.randint(1, 2)):
        path = draw.choice(sorted(path for path in folder.rglob("*") if path.is_file()))
        told, content = damage(draw, path.read_bytes())
        path.write_bytes(content)
        kind += f", {path.name} {told}"
    size = ["--image-size=16", "--num-workers=0"] if name == "folder" else []
    arguments = ["fit", *TINY, "--epochs=1", f"--data={name}", f"--data-root={folder}", *size]
    result = run([*arguments, f"--out={folder / 'run'}"], patience, folder, fresh=fresh)
    try:
        sentence(result, (0, 2))
    except Failed as error:
        raise Failed(f"{kind}: {error}") from error
    return f"{kind}: {result.returncode}"


TRIALS: dict[str, Callable[[random.Random, Path, Path, float, bool], str]] = {
    "kills": kill,
    "checkpoints": checkpoint,
    "commands": command_line,
    "data": data,
}


def main() -> int:
    parser = argparse.ArgumentParser(description="Count what is lost.")
    for name in TRIALS:
        parser.add_argument(f"--{name}", type=int, default=20, metavar="N", help="number of trials")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--out", type=Path, default=Path("soak"), help="folder of the log")
    parser.add_argument("--patience", type=float, default=60.0, help="seconds that a command may take")
    parser.add_argument("--seconds", type=float, default=float("inf"), help="begin no trial after so long")
    parser.add_argument("--fresh", type=int, default=50, metavar="N", help="one trial in so many starts processes anew")
    parser.add_argument("--only", help="repeat one trial and keep its folder, such as kills/17")
    given = parser.parse_args()
    out, fixed = given.out.resolve(), given.out.resolve() / "fixed"
    fixed.mkdir(parents=True, exist_ok=True)
    log = out / "log.jsonl"
    lines = log.read_text().splitlines() if log.exists() else []
    done = {(entry["kind"], entry["number"]): entry for entry in map(json.loads, lines) if entry["seed"] == given.seed}
    warm_up()
    begun = time.monotonic()
    for kind, trial in TRIALS.items():
        only = [int(given.only.partition("/")[2])] if given.only and given.only.startswith(f"{kind}/") else []
        for number in only if given.only else range(getattr(given, kind)):
            name = f"{kind}/{number}"
            if not given.only and (kind, number) in done:
                continue
            if time.monotonic() - begun > given.seconds:
                break
            folder = out / "trial" / name
            shutil.rmtree(folder, ignore_errors=True)
            folder.mkdir(parents=True)
            entry = {"kind": kind, "number": number, "seed": given.seed, "failed": False, "lost": False}
            try:
                fresh = number % given.fresh == given.fresh - 1
                entry["told"] = trial(random.Random(f"{given.seed}/{name}"), folder, fixed, given.patience, fresh)
            except Failed as error:
                entry |= {"failed": True, "lost": error.lost, "told": str(error)}
            except Exception as error:  # what it left cannot even be read
                entry |= {"failed": True, "lost": True, "told": f"{type(error).__name__}: {error}"}
            if entry["failed"]:
                print(f"{name}: {'lost: ' if entry['lost'] else ''}{entry['told']}", flush=True)
            if given.only is None:
                done[kind, number] = entry
                with log.open("a") as file:
                    file.write(json.dumps(entry) + "\n")
                shutil.rmtree(folder, ignore_errors=True)
            else:
                print(entry["told"])
    print(f"{'':12} {'tried':>7} {'failed':>7} {'lost':>7}")
    for kind in TRIALS:
        entries = [entry for (of, number), entry in done.items() if of == kind and number < getattr(given, kind)]
        print(f"{kind:12} {len(entries):7} {sum(e['failed'] for e in entries):7} {sum(e['lost'] for e in entries):7}")
    return int(any(entry["failed"] for entry in done.values()))


if __name__ == "__main__":
    sys.exit(main())
