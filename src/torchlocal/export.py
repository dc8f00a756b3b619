"""Export of a trained backbone: as a plain `state_dict`, or as a program of torch.export."""

from __future__ import annotations

import os
from collections.abc import Callable
from pathlib import Path

import torch
from torch import Tensor, nn

from torchlocal.checkpoint import load_checkpoint
from torchlocal.config import config_from_dict
from torchlocal.models import build_model

__all__ = ["export"]

_PREFIX = "backbone."


def export(run: str | Path, *, to: str | Path, weights: str = "best", overwrite: bool = False) -> Path:
    """Write the backbone of a run, without auxiliary networks or any trace of how it was trained.

    The file is written beside its destination, loaded back, and takes its name only when the outputs for random images
    are the backbone's up to rounding.

    Args:
        run: Folder of a run, or one of its checkpoints.
        to: File to write; `.safetensors` and `.pt` hold the `state_dict`, `.pt2` a `torch.export` program for batches
            of any size, in evaluation mode.
        weights: "best" (on validation images) or "last", when `run` is a folder.
        overwrite: Whether to replace a file that exists.

    Returns:
        The path of the file.

    Raises:
        ValueError: an argument is wrong, or the checkpoint does not hold such a network.
        OSError: the checkpoint is absent, or the file cannot be written.
    """
    path, to = Path(run), Path(to)
    if weights not in ("best", "last"):
        raise ValueError(f"weights={weights!r} is unknown: give best or last")
    if to.suffix not in _WRITERS:
        raise ValueError(f"to={str(to)!r} has an unknown ending: give {', '.join(_WRITERS)}")
    if to.is_dir():
        raise ValueError(f"to={str(to)!r} is a folder: give the name of a file")
    if to.exists() and not overwrite:
        raise ValueError(f"to={str(to)!r} exists already: choose another name, or allow overwriting")
    if not to.parent.is_dir():
        raise ValueError(f"to={str(to)!r} is in a folder that does not exist: make it, or choose another")
    if path.is_dir():
        path = path / f"{weights}.pt"
    saved = load_checkpoint(path)
    config = config_from_dict(saved["config"])
    channels, height, width = saved["data"]["shape"]

    def fresh() -> nn.Module:
        return build_model(
            config.model, num_classes=saved["data"]["num_classes"], in_channels=channels, image_size=(height, width)
        )

    model = fresh()
    state = {key.removeprefix(_PREFIX): value for key, value in saved["net"].items() if key.startswith(_PREFIX)}
    try:
        model.load_state_dict(state)
    except RuntimeError as error:
        raise ValueError(
            f"{path} does not hold the weights of {config.model}: use the torchlocal that wrote it"
        ) from error
    model.eval()
    images = torch.randn(3, channels, height, width, generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        expected = model(images)
    temporary = to.with_name(f".{to.stem}-{os.getpid()}{to.suffix}")
    try:
        _WRITERS[to.suffix](model, images, temporary)
        with torch.no_grad():
            outputs = _READERS[to.suffix](temporary, fresh)(images)
        if not torch.allclose(outputs, expected, rtol=1e-4, atol=1e-5):
            raise RuntimeError(f"{to} was not written: loaded back, its outputs differ from the backbone's")
        os.replace(temporary, to)
    finally:
        temporary.unlink(missing_ok=True)
    return to


def _write_safetensors(model: nn.Module, images: Tensor, path: Path) -> None:
    try:
        from safetensors.torch import save_file
    except ImportError as error:
        raise ValueError("to: .safetensors needs the package safetensors: install it, or choose .pt") from error
    # Cloned: safetensors refuses tensors that share memory.
    save_file({key: value.detach().clone().contiguous() for key, value in model.state_dict().items()}, path)


def _write_state_dict(model: nn.Module, images: Tensor, path: Path) -> None:
    torch.save(model.state_dict(), path)


def _write_program(model: nn.Module, images: Tensor, path: Path) -> None:
    batch = torch.export.Dim("batch", min=1)
    program = torch.export.export(model, (images,), dynamic_shapes=({0: batch},))
    torch.export.save(program, path)


def _read_safetensors(path: Path, fresh: Callable[[], nn.Module]) -> nn.Module:
    from safetensors.torch import load_file

    return _load(fresh(), load_file(path))


def _read_state_dict(path: Path, fresh: Callable[[], nn.Module]) -> nn.Module:
    return _load(fresh(), torch.load(path, weights_only=True))


def _read_program(path: Path, fresh: Callable[[], nn.Module]) -> nn.Module:
    return torch.export.load(path).module()


def _load(model: nn.Module, state: dict[str, Tensor]) -> nn.Module:
    model.load_state_dict(state)
    return model.eval()


_WRITERS: dict[str, Callable[[nn.Module, Tensor, Path], None]] = {
    ".safetensors": _write_safetensors,
    ".pt": _write_state_dict,
    ".pt2": _write_program,
}
_READERS: dict[str, Callable[[Path, Callable[[], nn.Module]], nn.Module]] = {
    ".safetensors": _read_safetensors,
    ".pt": _read_state_dict,
    ".pt2": _read_program,
}
