"""Writing where there is no room: one sentence, nothing left behind, what was there before untouched."""

from __future__ import annotations

import errno
import json
import os
import shutil
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from torch import Tensor, nn

from torchlocal import models
from torchlocal.cli.commands import main
from torchlocal.compare.report import write_report
from torchlocal.compare.results import Comparison, MethodResult
from torchlocal.run.export import export

TINY = [
    "--model=small", "--modules=2", "--epochs=1", "--batch-size=8", "--precision=fp32", "--num-threads=1",
    "--tensorboard=false", "--quiet",
]  # fmt: skip
ENDINGS = (".pt", ".pt2", ".safetensors")
# What a disk that is full at 8 KiB does: writing more fails in the middle of the file.
ON_A_FULL_DISK = """
import resource, sys
from torch import nn
from torchlocal import models
from torchlocal.cli.commands import main
sys.path.insert(0, sys.argv[1])
from test_faults_export import small_net
models.images._OWN["small"] = small_net
resource.setrlimit(resource.RLIMIT_FSIZE, (8192, resource.RLIM_INFINITY))
sys.exit(0 if [main(argv.split()) for argv in sys.argv[2:]] == [2] * len(sys.argv[2:]) else 1)
"""


def small_net(num_classes: int, in_channels: int, size: tuple[int, int]) -> nn.Module:
    layers: list[nn.Module] = []
    for before, after in ((in_channels, 16), (16, 32)):
        layers += [nn.Conv2d(before, after, 3, 1, 1), nn.BatchNorm2d(after), nn.ReLU()]
    return nn.Sequential(*layers, nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(32, num_classes))


def write_images(root: Path) -> Path:
    rng = np.random.default_rng(0)
    for part in ("train", "val"):
        for name in ("a", "b"):
            (root / part / name).mkdir(parents=True)
            for index in range(16):
                pixels = rng.integers(0, 256, (8, 8, 3), dtype=np.uint8)
                Image.fromarray(pixels).save(root / part / name / f"{index}.png")
    return root


@pytest.fixture(scope="module", autouse=True)
def _small() -> Iterator[None]:
    with pytest.MonkeyPatch.context() as patch:
        patch.setitem(models.images._OWN, "small", small_net)
        yield


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder of a finished run, beside the images it was trained with."""
    folder = tmp_path_factory.mktemp("run")
    data = ["--data=folder", f"--data-root={write_images(folder / 'images')}", "--image-size=8", "--num-workers=0"]
    assert main(["fit", *TINY, *data, f"--out={folder / 'run'}"]) == 0
    return folder / "run"


def test_a_full_disk_is_told_in_one_sentence(run: Path, tmp_path: Path) -> None:
    files = [tmp_path / f"model{ending}" for ending in ENDINGS]
    for file in files:
        file.write_text("before")
    commands = [f"export {run} --to {file} --overwrite" for file in files]
    commands += [f"export {run} --to {file.with_stem('new')}" for file in files]
    commands += [f"plan --model=small --input=3x8x8 --batch-size=8 --modules=2 --figure={tmp_path / 'plan.png'}"]
    done = subprocess.run(
        [sys.executable, "-c", ON_A_FULL_DISK, str(Path(__file__).parent), *commands],
        capture_output=True,
        text=True,
        timeout=120,
    )
    assert done.returncode == 0, (done.returncode, done.stderr)  # every command ended with 2
    reason = "could not be written: File too large; make room on the disk"
    told = [f"torchlocal: {file} {reason} (the one written before is untouched)." for file in files]
    told += [f"torchlocal: {file.with_stem('new')} {reason}." for file in files]
    told += [f"torchlocal: {tmp_path / 'plan.png'} {reason}."]
    assert done.stderr.splitlines() == told
    assert sorted(tmp_path.iterdir()) == sorted(files) and {file.read_text() for file in files} == {"before"}


@pytest.mark.parametrize("ending", ENDINGS)
def test_an_export_that_is_interrupted_leaves_nothing(
    ending: str, run: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def interrupted(file: int) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(os, "fsync", interrupted)
    with pytest.raises(KeyboardInterrupt):
        export(run, to=tmp_path / f"model{ending}")
    assert not list(tmp_path.iterdir())


def test_a_network_that_is_no_program_says_so(run: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    class Branching(nn.Sequential):
        def forward(self, x: Tensor) -> Tensor:
            output: Tensor = super().forward(x)
            return output if output.sum().item() > 0 else 2 * output

    def branching(*arguments: Any) -> nn.Module:
        return Branching(*small_net(*arguments))

    monkeypatch.setitem(models.images._OWN, "small", branching)
    with pytest.raises(ValueError, match=r"torch.export cannot make a program of this network .*choose .safetensors"):
        export(run, to=tmp_path / "model.pt2")
    assert not list(tmp_path.iterdir())
    assert export(run, to=tmp_path / "model.pt").is_file()


def test_what_the_disk_says_is_not_masked(run: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def broken(file: int) -> None:
        raise OSError(errno.EIO, "Input/output error")

    monkeypatch.setattr(os, "fsync", broken)
    with pytest.raises(OSError, match=r"model.pt could not be written: Input/output error; see whether"):
        export(run, to=tmp_path / "model.pt")


# --- evaluate ---


def test_evaluate_where_the_data_moved(run: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["evaluate", str(run), "--json"]) == 0
    expected = json.loads(capsys.readouterr().out)
    moved = tmp_path / "moved"
    shutil.move(run.parent / "images", moved)
    try:
        assert main(["evaluate", str(run), "--json"]) == 2
        assert f"the folder {run.parent / 'images' / 'train'} does not exist" in capsys.readouterr().err
        assert main(["evaluate", str(run), f"--data-root={moved}", "--device=cpu", "--json"]) == 0
        assert json.loads(capsys.readouterr().out) == expected
    finally:
        shutil.move(moved, run.parent / "images")


def test_evaluate_computes_where_it_is_told(run: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["evaluate", str(run), "--device=nowhere"]) == 2
    assert capsys.readouterr().err == ('torchlocal: device=\'nowhere\' is not available here: give "auto" or "cpu".\n')
    if not torch.cuda.is_available():
        assert main(["evaluate", str(run), "--device", "cuda"]) == 2
        assert "device='cuda' is not available here" in capsys.readouterr().err


# --- other data than the run's ---


def copy_run(run: Path, to: Path) -> list[str]:
    """Copies a run, as it was before its result was written, and its images; returns how to go on with it."""
    shutil.copytree(run.parent, to, dirs_exist_ok=True)
    (to / "run" / "result.json").unlink()
    return ["fit", f"--config={to / 'run' / 'config.yaml'}", f"--data-root={to / 'images'}", f"--out={to / 'run'}"]


def test_other_classes_are_not_evaluated(run: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    copy_run(run, tmp_path)
    for part in ("train", "val"):
        (tmp_path / "images" / part / "a").rename(tmp_path / "images" / part / "c")  # as many, in another order
    assert main(["evaluate", str(run), f"--data-root={tmp_path / 'images'}"]) == 2
    assert capsys.readouterr().err == (
        f"torchlocal: {run / 'best.pt'} was trained on other classes: number 0 is 'a' there and 'b' here; give a "
        "data_root with class folders of the same names.\n"
    )


def test_a_run_goes_on_with_its_own_images_only(run: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    again = copy_run(run, tmp_path)
    assert main([*again, "--resume", "--quiet"]) == 0  # the same images elsewhere
    (tmp_path / "run" / "result.json").unlink()
    image = tmp_path / "images" / "train" / "a" / "0.png"
    image.rename(image.with_name("new.png"))  # as many of every class
    capsys.readouterr()
    assert main([*again, "--resume", "--quiet"]) == 2
    told = capsys.readouterr().err
    assert f"{tmp_path / 'run' / 'last.pt'} was trained on other data: checksum is " in told
    assert told.count("\n") == 1 and "bring the same data back, or choose another out" in told


def test_checkpoints_without_checksum_go_on(run: Path, tmp_path: Path) -> None:
    again = copy_run(run, tmp_path)
    for name in ("last.pt", "best.pt"):
        saved = torch.load(tmp_path / "run" / name, weights_only=True)
        del saved["data"]["checksum"], saved["data"]["classes"]
        torch.save(saved, tmp_path / "run" / name)
    assert main([*again, "--resume", "--quiet"]) == 0
    assert main(["evaluate", str(tmp_path / "run")]) == 0


def test_finished_runs_on_other_data_are_not_compared(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    images = write_images(tmp_path / "images")
    data = ["--data=folder", f"--data-root={images}", "--image-size=8", "--num-workers=0", "--timing-rounds=0"]
    command = ["compare", *TINY, *data, f"--out={tmp_path / 'c'}", "--seeds", "0", "--methods", "local"]
    assert main(command) == 0
    (images / "train" / "a" / "0.png").rename(images / "train" / "b" / "16.png")
    capsys.readouterr()
    assert main([*command, "end-to-end"]) == 2
    told = capsys.readouterr().err
    assert f"{tmp_path / 'c' / 'local' / 'seed0' / 'result.json'} is of a run on other data: checksum is " in told
    assert told.count("\n") == 1 and not (tmp_path / "c" / "end-to-end").exists()


# --- reports ---


def test_a_report_that_cannot_be_written_is_one_sentence(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    result = MethodResult(method="local", num_modules=2, guided_share=0, test=(0.5,), validation=((0.4, 0.5),))
    comparison = Comparison(title="before", results=(result,))
    write_report(comparison, tmp_path / "c")
    files = {path: path.read_bytes() for path in (tmp_path / "c").rglob("*.*")}
    assert {path.name for path in files} >= {"report.md", "report.csv", "report.html", "accuracy.png"}

    def full(file: int) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(os, "fsync", full)
    with pytest.raises(OSError, match=r"accuracy.png could not be written: No space left on device; make room"):
        write_report(replace(comparison, title="after"), tmp_path / "c")
    assert {path: path.read_bytes() for path in (tmp_path / "c").rglob("*.*")} == files
    (tmp_path / "file").touch()
    with pytest.raises(OSError, match=rf"^{tmp_path / 'file' / 'figures'} cannot be made a folder: Not a directory; "):
        write_report(comparison, tmp_path / "file")
