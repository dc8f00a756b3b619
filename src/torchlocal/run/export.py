"""Export of a trained backbone: as a plain `state_dict`, as a program of torch.export, or for transformers."""

from __future__ import annotations

import io
import os
import shutil
import uuid
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from torchlocal.cut.batches import as_prediction
from torchlocal.models import build_language_model, build_model
from torchlocal.run.checkpoint import load_backbone, load_checkpoint, write_file
from torchlocal.run.config import FitConfig
from torchlocal.run.own import OWN

__all__ = ["export"]


def export(run: str | Path, *, to: str | Path, weights: str = "best", overwrite: bool = False) -> Path:
    """Write the backbone of a run, without auxiliary networks or any trace of how it was trained.

    A file is made in memory, a folder beside the one that is asked for; it is loaded back, and put in its place (whole
    or not at all) only when the outputs for random images or tokens are the backbone's up to rounding.

    Args:
        run: Folder of a run, or one of its checkpoints.
        to: File to write; `.safetensors` and `.pt` hold the `state_dict`, `.pt2` a `torch.export` program for batches
            of any size, in evaluation mode. Or a folder (a name without ending), in the form of `save_pretrained`, with
            the run's tokenizer.json: for networks of the transformers library.
        weights: "best" (on validation data) or "last", when `run` is a folder.
        overwrite: Whether to replace a file that exists.

    Returns:
        The path of the file or folder.

    Raises:
        ValueError: an argument is wrong, or the checkpoint does not hold such a network.
        OSError: the checkpoint is absent, or the file cannot be written.
    """
    path, to = Path(run), Path(to)
    if weights not in ("best", "last"):
        raise ValueError(f"weights={weights!r} is unknown: give best or last")
    if to.suffix and to.suffix not in _WRITERS:
        raise ValueError(
            f"to={str(to)!r} has an unknown ending: give {', '.join(_WRITERS)}, or for transformers a folder, without"
        )
    if to.suffix and to.is_dir():
        raise ValueError(f"to={str(to)!r} is a folder: give the name of a file")
    if to.exists() and not overwrite:
        raise ValueError(f"to={str(to)!r} exists already: choose another name, or allow overwriting")
    if not to.suffix and to.exists() and not (to / "config.json").is_file():
        raise ValueError(f"to={str(to)!r} is something else than an export of before: choose another name")
    if not to.parent.is_dir():
        raise ValueError(f"to={str(to)!r} is in a folder that does not exist: make it, or choose another")
    if path.is_dir():
        path = path / f"{weights}.pt"
    saved = load_checkpoint(path)
    config, told = FitConfig.of(**saved["config"]), saved["data"]
    if config.model.name.startswith(OWN) or not (told["shape"] or "vocabulary" in told):
        raise ValueError(
            f"{path} is of a network or data of your own, which are not there: torchlocal.fit(..., model=model) leaves "
            "the weights in the network, to be saved as any other"
        )
    fresh = partial(_network, config, told)
    model = fresh().eval()
    load_backbone(model, saved, path)
    draw = torch.Generator().manual_seed(0)
    if "vocabulary" in told:
        batch = torch.randint(told["vocabulary"], (3, told["context"]), generator=draw)
    else:
        batch = torch.randn(3, *told["shape"], generator=draw)
    with torch.no_grad():
        expected = as_prediction(model(batch))

    def check(loaded: Callable[[Tensor], Any]) -> None:
        with torch.no_grad():
            outputs = as_prediction(loaded(batch))
        if not torch.allclose(outputs, expected, rtol=1e-4, atol=1e-5):
            raise RuntimeError(f"{to} was not written: loaded back, its outputs differ from the backbone's")

    if not to.suffix:
        _write_pretrained(model, path, to, check)
        return to
    # In memory, for a disk that fills up under torch's or safetensors' own writers ends in their words, or the process.
    content = _WRITERS[to.suffix](model, batch)
    check(_READERS[to.suffix](content, fresh))
    write_file(to, content)
    return to


def _network(config: FitConfig, told: dict[str, Any]) -> nn.Module:
    """The network of a run, by name, for what its checkpoint tells of the data."""
    if "vocabulary" in told:
        return build_language_model(
            config.model.name, vocabulary=told["vocabulary"], context=told["context"], options=config.model.options
        )
    channels, height, width = told["shape"]
    return build_model(
        config.model.name, num_classes=told["num_classes"], in_channels=channels, image_size=(height, width)
    )


def _write_pretrained(model: Any, path: Path, to: Path, check: Callable[[Callable[[Tensor], Any]], None]) -> None:
    """Write a folder as `save_pretrained` does, and the tokenizer that lies beside the checkpoint.

    Of a folder that exists the files of these names are replaced, and nothing else is touched.
    """
    if not hasattr(model, "save_pretrained"):
        raise ValueError(
            f"to={str(to)!r} has no ending, so a folder for the transformers library is meant, and "
            f"{type(model).__name__} is none of its networks: give a file that ends in {', '.join(_WRITERS)}"
        )
    model.config.use_cache = True  # switched off for training; who generates with it wants it
    beside = to.with_name(f".{to.name}-{uuid.uuid4().hex}")
    try:
        model.save_pretrained(beside)
        if (path.parent / "tokenizer.json").is_file():
            shutil.copyfile(path.parent / "tokenizer.json", beside / "tokenizer.json")
        check(type(model).from_pretrained(beside, local_files_only=True).eval())
        if not to.exists():
            beside.rename(to)
            return
        for file in sorted(beside.iterdir()):
            os.replace(file, to / file.name)
    except OSError as error:
        reason = error.strerror or str(error).strip().split("\n")[0]
        raise OSError(f"{to} could not be written ({reason}): make room, or choose another place") from error
    finally:
        shutil.rmtree(beside, ignore_errors=True)


def _write_safetensors(model: nn.Module, images: Tensor) -> bytes:
    try:
        from safetensors.torch import save
    except ImportError as error:
        raise ValueError("to: .safetensors needs the package safetensors: install it, or choose .pt") from error
    # Cloned: safetensors refuses tensors that share memory.
    return save({key: value.detach().clone().contiguous() for key, value in model.state_dict().items()})


def _write_state_dict(model: nn.Module, images: Tensor) -> bytes:
    file = io.BytesIO()
    torch.save(model.state_dict(), file)
    return file.getvalue()


def _write_program(model: nn.Module, images: Tensor) -> bytes:
    batch = torch.export.Dim("batch", min=1)
    try:
        program = torch.export.export(model, (images,), dynamic_shapes=({0: batch},))
    except Exception as error:  # what a network does can fail in many ways there
        reason = (str(error).strip().splitlines() or [type(error).__name__])[0]
        raise ValueError(
            f"to: torch.export cannot make a program of this network ({reason}): choose .safetensors or .pt"
        ) from error
    file = io.BytesIO()
    torch.export.save(program, file)
    return file.getvalue()


def _read_safetensors(content: bytes, fresh: Callable[[], nn.Module]) -> nn.Module:
    from safetensors.torch import load

    return _load(fresh(), load(content))


def _read_state_dict(content: bytes, fresh: Callable[[], nn.Module]) -> nn.Module:
    return _load(fresh(), torch.load(io.BytesIO(content), weights_only=True))


def _read_program(content: bytes, fresh: Callable[[], nn.Module]) -> nn.Module:
    return torch.export.load(io.BytesIO(content)).module()


def _load(model: nn.Module, state: dict[str, Tensor]) -> nn.Module:
    model.load_state_dict(state)
    return model.eval()


_WRITERS: dict[str, Callable[[nn.Module, Tensor], bytes]] = {
    ".safetensors": _write_safetensors,
    ".pt": _write_state_dict,
    ".pt2": _write_program,
}
_READERS: dict[str, Callable[[bytes, Callable[[], nn.Module]], nn.Module]] = {
    ".safetensors": _read_safetensors,
    ".pt": _read_state_dict,
    ".pt2": _read_program,
}
