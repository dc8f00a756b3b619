"""The files of a run folder: written whole or not at all, and refused when they do not fit."""

import contextlib
import csv
import errno
import io
import json
import math
import os
import zipfile
import zlib
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import IO, Any

import torch
import yaml
from torch import Tensor, nn

from torchlocal.checks import shorten
from torchlocal.data import DataBundle, TextBundle
from torchlocal.run.config import fit_options, short_names
from torchlocal.run.folder import temporary_name

__all__ = [
    "check_same_config",
    "check_same_tokens",
    "data_identity",
    "find_checkpoint",
    "fixed_fields",
    "load_backbone",
    "load_checkpoint",
    "load_network",
    "reading",
    "save_checkpoint",
    "write_config",
    "write_file",
    "write_json",
    "write_metrics",
]

BACKBONE = "backbone."  # begins the names of its tensors in a decoupled network
FORMAT = "torchlocal checkpoint"
VERSION = 3  # 2 knew no sections, and nothing of the user's own
# What every checkpoint holds, and what is added to resume from it.
_FIELDS: dict[str, Any] = {
    "run": str,
    "config": dict,
    "precision": str,
    "criterion": str,
    "data": dict,
    "modules": list,
    "step": int,
    "net": dict,
}
_DATA_FIELDS = ("num_train", "num_validation", "num_classes", "shape")
_RESUMED_FIELDS: dict[str, Any] = {
    "optimizer": dict, "random": dict, "position": dict, "rows": list, "loss_sums": Tensor,
}  # fmt: skip


def data_identity(data: DataBundle) -> dict[str, Any]:
    """What a checkpoint notes of the data, to refuse others."""
    found = {
        "num_train": len(data.train),
        "num_validation": len(data.validation),
        "num_classes": data.num_classes,
        "shape": list(data.shape),
        "checksum": data.checksum,
        "classes": list(data.classes),
    }
    if isinstance(data, TextBundle):
        found |= {
            "vocabulary": data.vocabulary,
            "context": data.context,
            "tokenizer": f"{zlib.crc32(data.tokenizer.encode()):08x}",
        }
    return found


def check_same_tokens(path: Path, saved: Mapping[str, Any], data: TextBundle) -> None:
    """Refuse text of other tokens than a checkpoint was trained on.

    Raises:
        ValueError: the vocabulary, the context or the tokenizer is another.
    """
    here = data_identity(data)
    for name in ("vocabulary", "context", "tokenizer"):
        if saved.get(name) != here[name]:
            raise ValueError(
                f"{path} was trained on other tokens: {name} is {saved.get(name)} there and {here[name]} here; give "
                "the tokenizer and the context that it was trained with"
            )


def find_checkpoint(run: str | Path) -> Path:
    """The best checkpoint of a run folder, or the checkpoint that is given.

    Raises:
        FileNotFoundError: the folder holds none.
    """
    path = Path(run).expanduser()
    if not path.is_dir():
        return path
    kept = [path / name for name in ("best.pt", "last.pt") if (path / name).exists()]
    if not kept:
        runs = sorted(path.glob("*/seed*/best.pt"))
        such = f", such as {runs[0].parent}" if runs else ""
        raise FileNotFoundError(f"{path} holds no checkpoint (best.pt, last.pt): give the folder of a run{such}")
    return kept[0]


def save_checkpoint(path: Path, state: Mapping[str, Any]) -> None:
    """Write a checkpoint; an older one at the same path stays until the new one is complete on the disk.

    Raises:
        OSError: if it cannot be written, for example because the disk is full.
    """
    _write_atomically(path, lambda file: torch.save({"format": FORMAT, "version": VERSION, **state}, file))


def load_checkpoint(path: Path, *, resumable: bool = False) -> dict[str, Any]:
    """Read a checkpoint onto the CPU.

    Args:
        path: the file.
        resumable: refuse one that only holds weights.

    Raises:
        FileNotFoundError: if there is no such file.
        ValueError: if it is damaged, or not a checkpoint of torchlocal.
    """
    if not path.is_file():
        raise FileNotFoundError(f"there is no checkpoint {path}")
    try:
        with zipfile.ZipFile(path) as archive:  # torch.load does not look at the checksums
            broken = archive.testzip()
        if broken is not None:
            raise zipfile.BadZipFile(f"wrong checksum of {broken}")
        state = torch.load(path, map_location="cpu", weights_only=True)
    except PermissionError:
        raise
    except Exception as error:  # a damaged file can raise nearly anything
        raise ValueError(
            f"{path} is damaged or not a checkpoint ({_first_line(error)}): delete it and train again, or use a copy"
        ) from error
    state = {} if not isinstance(state, dict) else state
    if not isinstance(state.get("format"), str) or state["format"] != FORMAT:
        raise ValueError(f"{path} is not a checkpoint of torchlocal: give the last.pt or best.pt of a run folder")
    version = state.get("version")
    if not isinstance(version, int) or version != VERSION:
        raise ValueError(
            f"{path} has checkpoint version {shorten(str(version), 40)}, this torchlocal reads version {VERSION}: "
            "use the torchlocal that wrote it"
        )
    if resumable and "optimizer" not in state:
        raise ValueError(f"{path} holds weights only and cannot be resumed: resume from a last.pt")
    fields = _FIELDS | (_RESUMED_FIELDS if resumable else {})
    wrong = [name for name, kind in fields.items() if not isinstance(state.get(name), kind)]
    if not wrong:
        wrong = [name for name in ("config", "data", "modules") if not _is_plain(state[name])]
        wrong += [f"data.{name}" for name in _DATA_FIELDS if name not in state["data"]]
        wrong += [f"net.{name}" for name, value in state["net"].items() if not isinstance(value, Tensor)]
    if wrong:
        raise ValueError(
            f"{path} lacks {', '.join(wrong)}, as every checkpoint has it: use a copy, or the torchlocal that wrote it"
        )
    return state


def _is_plain(value: Any) -> bool:
    """Whether a value is made of what YAML has."""
    if isinstance(value, dict):
        return all(isinstance(name, str) and _is_plain(inner) for name, inner in value.items())
    if isinstance(value, (list, tuple)):
        return all(map(_is_plain, value))
    return value is None or isinstance(value, (bool, int, float, str))


@contextlib.contextmanager
def reading(path: Path, *others: type[Exception]) -> Iterator[None]:
    """Turn the errors of reading a checkpoint's fields into one sentence that names the file.

    Raises:
        ValueError: in place of what comes of that, and of the other errors.
    """
    try:
        yield
    except Exception as error:
        if not isinstance(error, (KeyError, TypeError, IndexError, AttributeError, *others)):
            raise
        raise ValueError(
            f"{path} does not hold what this torchlocal writes ({_first_line(error)}): use a copy, or the torchlocal "
            "that wrote it"
        ) from error


def load_network(net: nn.Module, state: Mapping[str, Any], path: Path) -> None:
    """Load a checkpoint's parameters and buffers.

    Raises:
        ValueError: if they are another network's.
    """
    saved, own = state["net"], net.state_dict()
    for key in [*own, *saved]:
        shapes = [tuple(tensors[key].shape) if key in tensors else None for tensors in (saved, own)]
        if shapes[0] != shapes[1]:
            told = ["absent" if shape is None else f"of shape {shape}" for shape in shapes]
            raise ValueError(
                f"{path} is of another network: {key} is {told[0]} in the checkpoint and {told[1]} in this network; "
                "use the model, the data and the torchlocal that wrote it"
            )
    net.load_state_dict(saved)


def load_backbone(model: nn.Module, state: Mapping[str, Any], path: Path) -> None:
    """Load a checkpoint's weights into a plain network.

    Raises:
        ValueError: they are another network's.
    """
    saved = {key.removeprefix(BACKBONE): value for key, value in state["net"].items() if key.startswith(BACKBONE)}
    load_network(model, {"net": saved}, path)


def fixed_fields(config: Mapping[str, Any]) -> dict[str, Any]:
    """The options of a configuration, by short names, that may not differ between a checkpoint and its resumption.

    How much a guided step recomputes may differ, as long as no micro-batches are cut: the results are the same (but
    where the steps are compiled, for other pieces may then round otherwise).
    """
    free = {name for name, one in fit_options().items() if one.free}
    fields = {name: value for name, value in short_names(config).items() if name not in free}
    if fields.get("boundary") is None:
        fields.pop("stages", None)  # who trains which modules makes no difference then
    recompute, memory, parts = fields.pop("recompute", None), fields.get("memory"), fields.pop("micro_batches", None)
    never, always = (fields.get("guidance.name") == name for name in ("never", "always"))
    whole = never or recompute is not None or memory in ("exact", "full") or (memory is None and always) or parts == 1
    if fields.get("compile"):
        fields |= {"recompute": recompute, "micro_batches": parts}
    elif whole:
        fields["memory"] = "no micro-batches"
    elif parts is not None:
        fields["micro_batches"] = parts
    return fields


def check_same_config(path: Path, saved: Mapping[str, Any], current: Mapping[str, Any]) -> None:
    """Refuse to go on with a run of another configuration; fields that the saved one is older than count as default.

    Args:
        path: the file that holds the saved configuration.
        saved: that configuration, as plain values.
        current: the configuration to resume with.

    Raises:
        ValueError: naming every field that differs and must not.
    """
    (there, old), (now, new) = ((short_names(config), fixed_fields(config)) for config in (saved, current))
    absent = object()
    differing = [
        f"{name} ({_told(old, there, name)} there, {_told(new, now, name)} now)"
        for name in dict.fromkeys([*old, *new])
        if old.get(name, absent) != new.get(name, absent)
    ]
    if differing:
        names = [told.partition(" ")[0] for told in differing]
        remedy = "resume with the same values, or choose another out"
        if set(names) <= {"epochs", "steps"}:
            remedy = (
                "learning rate and guidance are spread over the length of a run, so it is not made longer or shorter: "
                "leave it as it is, or train anew with another out"
            )
        raise ValueError(f"{path} is of another configuration: {', '.join(differing)}; {remedy}")


def _told(fixed: Mapping[str, Any], given: Mapping[str, Any], name: str) -> str:
    """The value of an option for a message; one that another option has decided names that one."""
    if name not in fixed:
        return "absent"
    if fixed[name] == given[name] or given[name] is not None:
        return repr(given[name])
    reason = "recompute" if given.get("recompute") is not None else "guidance.name"
    return f"{fixed[name]} by {reason}={given[reason]!r}"


def write_config(path: Path, config: Mapping[str, Any], comments: Iterable[str] = ()) -> None:
    """Write the configuration as YAML that can be given back to the command."""
    text = "".join(f"# {comment}\n" for comment in comments) + yaml.safe_dump(dict(config), sort_keys=False)
    write_file(path, text)


def write_json(path: Path, values: Mapping[str, Any]) -> None:
    """Write plain values as JSON."""
    write_file(path, json.dumps(values, indent=2) + "\n")


def write_metrics(path: Path, columns: Sequence[str], rows: Iterable[Mapping[str, float]]) -> None:
    """Write the metrics as CSV; the cell of a number that was not measured (NaN) is empty."""
    text = io.StringIO()
    writer = csv.DictWriter(text, columns, lineterminator="\n")
    writer.writeheader()
    for row in rows:
        writer.writerow({name: "" if math.isnan(value) else value for name, value in row.items()})
    write_file(path, text.getvalue())


def write_file(path: Path, content: str | bytes) -> None:
    """Write a file whole or not at all.

    Raises:
        OSError: if it could not be written; the one written before is untouched.
    """
    data = content.encode() if isinstance(content, str) else content
    _write_atomically(path, lambda file: file.write(data))


def _write_atomically(path: Path, write: Callable[[IO[bytes]], Any]) -> None:
    temporary = temporary_name(path)
    try:
        with open(temporary, "xb") as file:
            write(file)
            file.flush()
            os.fsync(file.fileno())  # else a power cut could leave the new name on an empty file
        os.replace(temporary, path)
    except (OSError, RuntimeError) as error:  # a write that fails inside torch.save arrives as a RuntimeError
        cause = error if isinstance(error, OSError) else error.__context__
        full = isinstance(cause, OSError) and cause.errno in (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)
        kept = " (the one written before is untouched)" if path.exists() else ""
        remedy = "make room on the disk" if full else "see whether the folder can be written to"
        raise OSError(f"{path} could not be written: {_first_line(error)}; {remedy}{kept}") from error
    finally:
        with contextlib.suppress(OSError):  # what went wrong above is what has to be told
            temporary.unlink(missing_ok=True)


def _first_line(error: BaseException) -> str:
    """The first line of an error's message, short enough to be part of a sentence."""
    cause = error.__context__ if isinstance(error.__context__, OSError) else error
    if isinstance(cause, OSError) and cause.strerror:
        return cause.strerror
    lines = str(cause).strip().splitlines()
    return (lines[0] if lines else type(cause).__name__).rstrip(".")[:160]
