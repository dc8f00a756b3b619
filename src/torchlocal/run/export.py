"""Export of a trained backbone: as a plain `state_dict`, or as a program of torch.export."""

from __future__ import annotations

import io
from collections.abc import Callable
from pathlib import Path

import torch
from torch import Tensor, nn

from torchlocal.models import build_model
from torchlocal.run.checkpoint import load_backbone, load_checkpoint, write_file
from torchlocal.run.config import FitConfig
from torchlocal.run.own import OWN

__all__ = ["export"]


def export(run: str | Path, *, to: str | Path, weights: str = "best", overwrite: bool = False) -> Path:
    """Write the backbone of a run, without auxiliary networks or any trace of how it was trained.

    The file is made in memory, loaded back, and written (whole or not at all) only when the outputs for random images
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
    config = FitConfig.of(**saved["config"])
    if config.model.name.startswith(OWN) or not saved["data"]["shape"]:
        raise ValueError(
            f"{path} is of a network or data of your own, which are not there: torchlocal.fit(..., model=model) leaves "
            "the weights in the network, to be saved as any other"
        )
    channels, height, width = saved["data"]["shape"]

    def fresh() -> nn.Module:
        return build_model(
            config.model.name,
            num_classes=saved["data"]["num_classes"],
            in_channels=channels,
            image_size=(height, width),
        )

    model = fresh().eval()
    load_backbone(model, saved, path)
    images = torch.randn(3, channels, height, width, generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        expected = model(images)
    # In memory, for a disk that fills up under torch's or safetensors' own writers ends in their words, or the process.
    content = _WRITERS[to.suffix](model, images)
    with torch.no_grad():
        outputs = _READERS[to.suffix](content, fresh)(images)
    if not torch.allclose(outputs, expected, rtol=1e-4, atol=1e-5):
        raise RuntimeError(f"{to} was not written: loaded back, its outputs differ from the backbone's")
    write_file(to, content)
    return to


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
