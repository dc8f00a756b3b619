"""What a network is called with: a tensor, a tuple of arguments, or a mapping of keyword arguments."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Hashable, Mapping, Sequence
from typing import Any, TypeAlias

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_flatten, tree_map_only

__all__ = [
    "Batch",
    "as_prediction",
    "call",
    "describe",
    "device_of",
    "fits_into",
    "key_of",
    "num_examples",
    "plain",
    "same_layout",
    "shaped",
    "size_of",
    "tensors_of",
]

Batch: TypeAlias = Any  # Tensor | tuple[Any, ...] | Mapping[str, Any]


def plain(batch: Batch, name: str = "batch") -> Batch:
    """A batch as a tensor, a tuple or a dict, whatever kind of sequence or mapping it came as.

    Raises:
        ValueError: it is none of these, or holds no tensor of at least one example.
    """
    if isinstance(batch, Mapping):
        batch = dict(batch)
    elif isinstance(batch, (tuple, list)):
        batch = tuple(batch)
    elif not isinstance(batch, Tensor):
        raise ValueError(
            f"{name}: must be a tensor, a tuple of arguments or a mapping of keyword arguments, not "
            f"{type(batch).__name__}"
        )
    found = tensors_of(batch)
    if not found:
        raise ValueError(f"{name}: it holds no tensor, so there is nothing to train on")
    if num_examples(batch) == 0:
        raise ValueError(f"{name}: must be a batch of at least one example, and {describe(batch)} holds none")
    return batch


def call(model: Callable[..., Any], batch: Batch) -> Any:
    """``model(batch)``, ``model(*batch)`` or ``model(**batch)``."""
    if isinstance(batch, dict):
        return model(**batch)
    if isinstance(batch, tuple):
        return model(*batch)
    return model(batch)


def tensors_of(batch: Any) -> list[Tensor]:
    """The tensors of a batch, or of any other structure."""
    return [leaf for leaf in tree_flatten(batch)[0] if isinstance(leaf, Tensor)]


def num_examples(batch: Batch) -> int:
    """The number N of examples: the extent of the first dimension of the first tensor that has one."""
    return next((t.shape[0] for t in tensors_of(batch) if t.ndim > 0), 1)


def device_of(batch: Batch, model: nn.Module) -> torch.device:
    """Where a step runs: where the network is, or, without parameters, the batch."""
    anchors = itertools.chain(model.parameters(), tensors_of(batch), [torch.empty(0)])
    return next(anchors).device


def key_of(value: Any) -> Hashable:
    """The layout of a batch (or target): structure, and shape, strides, dtype and device of every tensor."""
    leaves, structure = tree_flatten(value)
    return (
        str(structure),
        tuple(
            (leaf.shape, leaf.stride(), leaf.dtype, str(leaf.device)) if isinstance(leaf, Tensor) else repr(leaf)
            for leaf in leaves
        ),
    )


def fits_into(layout: Any, other: Any) -> bool:
    """Whether a layout is the other one's but for extents, none of which is larger."""
    pairs = list(zip(layout[1], other[1], strict=False))
    return (
        layout[0] == other[0]
        and len(layout[1]) == len(other[1])
        and all(
            a == b if isinstance(a, str) else not isinstance(b, str) and a[2:] == b[2:] and _within(a[0], b[0])
            for a, b in pairs
        )
    )


def _within(shape: torch.Size, other: torch.Size) -> bool:
    return len(shape) == len(other) and all(a <= b for a, b in zip(shape, other, strict=True))


def size_of(layout: Any) -> int:
    """Number of elements of all tensors of a layout."""
    return sum(leaf[0].numel() for leaf in layout[1] if not isinstance(leaf, str))


def same_layout(batch: Batch, other: Batch) -> bool:
    """Whether two batches have the same structure, and their tensors as many dimensions."""
    leaves, structure = tree_flatten(batch)
    others, expected = tree_flatten(other)
    return structure == expected and all(
        isinstance(a, Tensor) == isinstance(b, Tensor) and (not isinstance(a, Tensor) or a.ndim == b.ndim)
        for a, b in zip(leaves, others, strict=True)
    )


def describe(batch: Any) -> str:
    """A batch in words, for messages: the shapes of its tensors."""
    if isinstance(batch, Tensor):
        return f"a batch of shape {tuple(batch.shape)}"
    shapes = tree_map_only(Tensor, lambda t: tuple(t.shape), batch)
    if isinstance(shapes, dict):
        return "a batch {" + ", ".join(f"{name}: {_short(shape)}" for name, shape in shapes.items()) + "}"
    return "a batch (" + ", ".join(_short(shape) for shape in shapes) + ")"


def _short(value: Any) -> str:
    text = str(value)
    return text if len(text) <= 40 else f"{text[:37]}..."


def shaped(sample: Sequence[int], model: nn.Module) -> Tensor:
    """A batch of a shape, in the dtype of the network's first parameter: one number seen as a whole, so no memory."""
    anchor = next((p for p in model.parameters() if p.is_floating_point()), torch.empty(0))
    return torch.zeros(1, dtype=anchor.dtype, device=anchor.device).expand(tuple(sample))


def as_prediction(output: Any) -> Tensor:
    """The prediction in what a network returns, by default: the tensor itself, or its ``logits``.

    Raises:
        ValueError: it is neither a tensor nor has logits.
    """
    found = output.get("logits") if isinstance(output, Mapping) else getattr(output, "logits", output)
    if not isinstance(found, Tensor):
        raise ValueError(
            f"prediction: the network returns {type(output).__name__}, which is neither a tensor nor has logits; give "
            "prediction=, a function that takes the tensor for the criterion from it"
        )
    return found
