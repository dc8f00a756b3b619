"""Names of networks, data sets, devices and optimizers, without loading torch: a wrong one is told at once."""

from __future__ import annotations

import re
from collections.abc import Sequence
from importlib.util import find_spec
from pathlib import Path

from torchlocal.checks import suggestion

__all__ = ["BOUNDARIES", "DATA", "DECODERS", "NETWORKS", "TEXT", "check_names", "unknown_data", "unknown_network"]

NETWORKS = ("resnet20", "resnet32", "resnet44", "resnet56", "resnet110", "vgg8b", "vgg11b", "mlp")
DECODERS = ("gpt-nano", "gpt-tiny", "gpt-mini", "gpt-small", "gpt-medium", "gpt-large", "gpt-xl")  # for text
DATA = ("fashion-mnist-small", "digits", "fashion-mnist", "cifar10", "cifar100", "svhn", "stl10", "folder")
TEXT = ("text:", "tokens:", "dataset:")  # begin the names of texts
BOUNDARIES = ("bf16", "int8", "int4")  # what features and gradients are sent in from stage to stage
_DEVICE = re.compile(r"(auto|cpu|cuda|xpu|mps|mtia|hpu|xla|npu|ipu|ve|fpga|maia|hip|vulkan|meta|privateuseone)(:\d+)?")
_REGISTERED = re.compile(r"^@register_model\(.*\)\n(?:@.*\n)*def (\w+)\(", re.MULTILINE)


def check_names(*, model: object = None, data: object = None, device: object = None, optimizer: object = None) -> None:
    """Refuse names that nothing has, as far as that can be told without torch.

    Raises:
        ValueError: as what looks the name up would.
    """
    if isinstance(model, str) and ":" not in model and model not in (*NETWORKS, *DECODERS):
        found = [f"torchvision:{name}" for name in _of_torchvision()]
        alike = [m for m in found if m.endswith(f":{model}")]
        raise ValueError(unknown_network(model, alike or [*NETWORKS, *DECODERS, *found]))
    if isinstance(data, str) and data.removeprefix("pairs:") not in DATA and not data.startswith(TEXT):
        raise ValueError(unknown_data(data))
    if isinstance(device, str) and not _DEVICE.fullmatch(device):
        raise ValueError(f'device={device!r} is not available here: give "auto" or "cpu"')
    # Those of torch.optim begin with a capital, and are looked up there.
    if isinstance(optimizer, str) and optimizer not in ("sgd", "adamw") and not optimizer[:1].isupper():
        raise ValueError(f'optimizer={optimizer!r} cannot be used: give "sgd", "adamw" or a class of torch.optim')


def unknown_network(name: str, candidates: Sequence[str], wanted: str | None = None, prefix: str = "") -> str:
    """What to say of a name that no network has.

    Args:
        name: as it was given.
        candidates: names that it may be meant for.
        wanted: what is compared with these, if it is not the whole name.
        prefix: of the candidates.
    """
    cutoff = 0.6 if len(candidates) > 1 else 0.0  # a single candidate is the same name with its library
    hint = suggestion((wanted or name).lower(), candidates, most=3, cutoff=cutoff, prefix=prefix)
    return (
        f"model {name!r} is unknown{hint}: choose {', '.join(NETWORKS)}, or torchvision:NAME or timm:NAME with a name "
        f"of that library; for text {', '.join(DECODERS)} or hf:PATH"
    )


def unknown_data(name: str) -> str:
    """What to say of a name that no data set has."""
    base, pairs = name.removeprefix("pairs:"), "pairs:" if name.startswith("pairs:") else ""
    hint = suggestion(base.lower(), DATA, most=2, cutoff=0.5, prefix=pairs)
    return (
        f"data {name!r} is unknown{hint}: choose {', '.join(DATA)}, pairs:NAME with one of these, or "
        "text: text:stdlib, text:PATH, tokens:PATH or dataset:PATH"
    )


def _of_torchvision() -> list[str]:
    """The classifiers of torchvision, read from its source; none where that is not there."""
    spec = find_spec("torchvision")
    places = spec.submodule_search_locations if spec is not None else None
    files = [file for place in places or () for file in sorted((Path(place) / "models").glob("*.py"))]
    return sorted(name for file in files for name in _REGISTERED.findall(file.read_text(encoding="utf-8")))
