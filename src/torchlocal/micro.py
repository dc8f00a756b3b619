"""Micro-batches: cutting a batch only where the gradient of the whole batch comes out.

Parts are weighed by what the criterion divides by: the number of examples, of tokens that are not ignored, the sum of
class weights, or nothing where it sums. Of a criterion that is not known it is tried, on random predictions and the
step's own target, whether the loss of the batch is the mean of its parts' losses, weighed by their examples.
"""

from __future__ import annotations

import copy
import functools
from typing import Any, TypeAlias

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils._pytree import tree_flatten, tree_unflatten

from .cut.batches import Batch, num_examples
from .modules import LocalModules
from .rules import Rule
from .tokens import TokenCrossEntropy

__all__ = ["NotCut", "Parts", "can_cut", "criterion_of_parts", "cut_batch", "divisor"]

Parts: TypeAlias = list[tuple[Any, Any, Any]]  # inputs, target, share in the loss of the whole

_INDEX_MODULES = (nn.CrossEntropyLoss, nn.NLLLoss, TokenCrossEntropy)
_MEAN_LOSSES = (
    F.mse_loss, F.l1_loss, F.smooth_l1_loss, F.huber_loss, F.binary_cross_entropy, F.binary_cross_entropy_with_logits,
)  # fmt: skip
_MEAN_MODULES = (nn.MSELoss, nn.L1Loss, nn.SmoothL1Loss, nn.HuberLoss, nn.BCELoss, nn.BCEWithLogitsLoss)


class NotCut(ValueError):
    """The batch cannot be cut, for the reason that the message tells."""


def cut_batch(net: LocalModules, batch: Batch, target: Any, count: int, *, follow: bool) -> Parts:
    """A batch and its target in parts as equal as can be, each with its share in the loss of the whole.

    Args:
        net: the network.
        batch: what it is called with.
        target: what the criterion gets.
        count: number of parts.
        follow: the auxiliary networks learn from the parts, too.

    Raises:
        NotCut: the batch has fewer examples, cannot be taken apart, or its gradient would not come out.
    """
    if count == 1:
        return [(batch, target, 1.0)]
    size = num_examples(batch)
    if size < count:
        raise NotCut(f"micro_batches: {size} examples cannot be cut into {count} parts; ask for fewer")
    inputs, labels = _split(batch, size, count, "batch"), _split(target, size, count, "target")
    sizes = [num_examples(part) for part in inputs]
    examples = [n / size for n in sizes]
    if net.chain.fake:  # only the memory counts
        return list(zip(inputs, labels, examples, strict=True))
    if follow and net.rule.compares_examples and net.num_modules > 1:
        raise NotCut(
            f"micro_batches: the local loss of {net.rule!r} compares the examples of a batch with each other, so it is "
            "not the mean of its parts'; give auxiliary='frozen', or a memory mode without micro-batches"
        )
    if _sums(net, target, follow=follow):
        share = 1 / _counted(_unwrapped(net.criterion)[1], target)
        return [(x, y, share) for x, y in zip(inputs, labels, strict=True)]
    shares = _known_shares(net.criterion, target, labels, examples)
    if shares is None:
        if not _is_mean(net, batch, target, labels, sizes):
            raise NotCut(
                "micro_batches: the criterion's loss of the batch is not the mean of its parts' losses, so the "
                "gradient of the whole batch would not come out; use a memory mode without micro-batches, 'exact' "
                "or 'full'"
            )
        shares = list(examples)
    return list(zip(inputs, labels, shares, strict=True))


def criterion_of_parts(net: LocalModules, target: Any, *, follow: bool) -> Any:
    """What the parts of a batch are weighed by :func:`cut_batch` for: one of class indices sums, and divides later.

    So a part in which nothing counts does not divide by zero.
    """
    if net.chain.fake or not _sums(net, target, follow=follow):
        return net.criterion
    criterion: Any = net.criterion
    if isinstance(criterion, nn.Module):
        criterion = copy.copy(criterion)
        criterion.reduction = "sum"
        return criterion
    return functools.partial(criterion, reduction="sum")


def _sums(net: LocalModules, target: Any, *, follow: bool) -> bool:
    """Whether all losses are those of a criterion of class indices that divides by what it counts."""
    function, options = _unwrapped(net.criterion)
    indices = isinstance(target, Tensor) and not target.is_floating_point()
    mean = function == "index" and options.get("reduction", "mean") == "mean"
    plainly = type(net.rule).loss is Rule.loss or net.rule.criterion_only
    return indices and mean and (not follow or net.num_modules == 1 or plainly)


def can_cut(net: LocalModules, batch: Batch, target: Any, *, follow: bool) -> bool:
    """Whether :func:`cut_batch` cuts such a batch at all."""
    try:
        cut_batch(net, batch, target, 2, follow=follow)
    except NotCut:
        return False
    return True


def _split(value: Any, size: int, count: int, name: str) -> list[Any]:
    """A structure in parts: a list with an entry per example, or tensors all of which have a row per example."""
    if isinstance(value, list) and len(value) == size and not any(_is_rows(v, size) for v in value):
        bounds = [len(part) for part in torch.empty(size).tensor_split(count)]
        ends = [sum(bounds[: i + 1]) for i in range(count)]
        return [value[end - length : end] for end, length in zip(ends, bounds, strict=True)]
    leaves, structure = tree_flatten(value)
    tensors = [leaf for leaf in leaves if isinstance(leaf, Tensor)]
    if not tensors or not all(_is_rows(t, size) for t in tensors):
        raise NotCut(
            f"micro_batches: the {name} has no row for each of the {size} examples in every tensor, so it cannot be "
            "cut into parts; use a memory mode without micro-batches, 'exact' or 'full'"
        )
    cut = [leaf.tensor_split(count) if isinstance(leaf, Tensor) else [leaf] * count for leaf in leaves]
    return [tree_unflatten(list(part), structure) for part in zip(*cut, strict=True)]


def _is_rows(value: Any, size: int) -> bool:
    return isinstance(value, Tensor) and value.ndim > 0 and value.shape[0] == size


def _known_shares(criterion: Any, target: Any, labels: list[Any], examples: list[float]) -> list[Any] | None:
    """The parts' shares under a criterion of torch's; None where it is another."""
    function, options = _unwrapped(criterion)
    if function is None:
        return None
    reduction = options.get("reduction", "mean")
    if reduction == "sum":
        return [1.0] * len(labels)
    if reduction != "mean":
        return None
    if function != "index" or not isinstance(target, Tensor) or target.is_floating_point():
        return list(examples)
    total = _counted(options, target)
    return [_counted(options, part) / total for part in labels]


def divisor(criterion: Any, target: Any) -> Tensor | None:
    """What a criterion of torch's divides the loss of a batch by, 0-dim: 0 where it sums; None: it is another.

    Batches that are trained on together, as replicas do, count in proportion to it.
    """
    function, options = _unwrapped(criterion)
    if function is None or not isinstance(target, Tensor) or not target.ndim:
        return None
    if (reduction := options.get("reduction", "mean")) != "mean":
        return target.new_zeros((), dtype=torch.float32) if reduction == "sum" else None
    if function == "index" and not target.is_floating_point():
        return _counted(options, target)
    return target.new_full((), target.shape[0], dtype=torch.float32)


def _counted(options: dict[str, Any], target: Tensor) -> Tensor:
    """The number of targets that are not ignored, or the sum of their class weights."""
    counted = target != options.get("ignore_index", -100)
    weight = options.get("weight")
    if weight is None:
        return counted.sum().to(torch.float32)
    weight = weight.to(target.device)  # a run has its targets on the host while it counts, and a criterion on a device
    return torch.where(counted, weight[target.clamp(min=0, max=len(weight) - 1)], 0).sum()


def _unwrapped(criterion: Any) -> tuple[str | None, dict[str, Any]]:
    options: dict[str, Any] = {}
    while isinstance(criterion, functools.partial):
        if criterion.args:
            return None, {}
        options = {**criterion.keywords, **options}
        criterion = criterion.func
    if type(criterion) in _INDEX_MODULES:
        names = ("weight", "ignore_index", "reduction")
        return "index", {name: getattr(criterion, name) for name in names}
    if type(criterion) in _MEAN_MODULES:
        return "mean", {"reduction": criterion.reduction}
    if criterion in (F.cross_entropy, F.nll_loss):
        return "index", options
    if criterion in _MEAN_LOSSES:
        return "mean", options
    return None, {}


@torch.no_grad()
def _is_mean(net: LocalModules, batch: Batch, target: Any, labels: list[Any], sizes: list[int]) -> bool:
    """Whether the loss of a batch is the mean of its parts' losses, tried on random predictions."""
    shape, dtype, device = net.chain.prediction_layout(batch)
    size = sum(sizes)
    if not shape or shape[0] != size:
        return False
    if device.type == "cuda" and torch.cuda.is_current_stream_capturing():
        raise NotCut(
            "micro_batches: whether this criterion's loss is the mean over examples is tried with each target, which a "
            "CUDA graph cannot; give a loss of torch, or a memory mode without micro-batches, 'exact' or 'full'"
        )
    generator = torch.Generator(device).manual_seed(0)
    prediction = torch.randn(shape, generator=generator, device=device).to(dtype)
    try:
        whole = net.criterion(prediction, target)
        parts = [net.criterion(p, y) for p, y in zip(prediction.split(sizes), labels, strict=True)]
        mean = sum(n / size * part for n, part in zip(sizes, parts, strict=True))
        return bool(torch.isclose(whole, torch.as_tensor(mean).to(whole), rtol=1e-4, atol=1e-6))
    except Exception:  # it does not take parts
        return False
