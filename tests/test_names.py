"""Wrong names are told at once, in the same words as by what looks them up."""

from __future__ import annotations

import subprocess
import sys

import pytest

from torchlocal.data import load_data
from torchlocal.data.named import data_names
from torchlocal.models import build_model, model_names
from torchlocal.names import DATA, NETWORKS, check_names

CODE = "import sys; from torchlocal.cli.commands import main; print(main(sys.argv[1:]), 'torch' in sys.modules)"


def test_the_names_are_those_that_there_are() -> None:
    assert list(NETWORKS) == model_names() and list(DATA) == data_names()
    check_names(model="timm:anything", data="pairs:digits", device="cuda:1", optimizer="RMSprop")


@pytest.mark.parametrize("name", ["resnte20", "resnet50", "vit", "ResNet32"])
def test_networks(name: str) -> None:
    with pytest.raises(ValueError, match="is unknown") as here:
        check_names(model=name)
    with pytest.raises(ValueError, match="is unknown") as there:
        build_model(name, num_classes=10)
    assert str(here.value) == str(there.value)


@pytest.mark.parametrize("name", ["digts", "pairs:digts", "mnist"])
def test_data(name: str) -> None:
    with pytest.raises(ValueError, match="is unknown") as here:
        check_names(data=name)
    with pytest.raises(ValueError, match="is unknown") as there:
        load_data(name)
    assert str(here.value) == str(there.value)


@pytest.mark.parametrize(
    "arguments",
    [
        ("fit", "--model=resnet50"), ("fit", "--data=digts"), ("fit", "--device=cpuu"), ("fit", "--optimizer=sdg"),
        ("compare", "--model=mlpp"), ("partition", "--data=mnist"), ("plan", "--model=resnet18"),
    ],
)  # fmt: skip
def test_the_command_does_not_load_torch(arguments: tuple[str, ...]) -> None:
    told = subprocess.run([sys.executable, "-c", CODE, *arguments], capture_output=True, text=True)
    assert told.stdout.split() == ["2", "False"], told.stderr
    assert told.stderr.count("\n") == 1 and told.stderr.startswith("torchlocal: ")
