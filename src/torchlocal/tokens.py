"""Cross-entropy over tokens: the mean over all that are not ignored, and without ever holding all scores.

The scores of a batch of N × T positions over V tokens are N·T·V numbers, in a small network more than all its other
activations. Given the features and the read-out instead, they are made for a few positions at a time, and what the loss
needs of them is taken at once: its value, and its gradients with respect to features and read-out, as fused kernels
do (Hsu et al., "Liger Kernel", 2024).
"""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from .checks import check_whole

__all__ = ["TokenCrossEntropy", "chunks_scores", "cross_entropy_of_features"]

_LEAST = 128  # positions at a time, so that the products stay efficient
_STEEPEST = 64.0  # bound of the sum over a chunk's slopes in half precision, whose largest number is 65,504
_FILLS = 2**21  # scores that fill a device; below that only the number of kernels counts


class TokenCrossEntropy(nn.CrossEntropyLoss):
    """Cross-entropy of scores (..., V) against token ids (...), the mean over the positions that are not ignored.

    With ``from_features`` instead of a call the scores are never held as a whole; the values agree to rounding. The
    auxiliary networks of rule ``solo`` are always trained so. With ``scores="chunked"`` the last module, and with it
    the global loss, is as well: a step calls the network up to its read-out, which has to be the ``nn.Linear`` that its
    forward ends in.

    Args:
        ignore_index: target of positions that do not count.
        reduction: ``"mean"`` or ``"sum"``.
        label_smoothing: share of the target that is spread over all tokens.
        chunk: positions at a time; None: as many as take the memory of the features.
        scores: of the network itself in a step: ``"whole"``, as it makes them, or ``"chunked"``.

    Raises:
        ValueError: an argument is none of these.
    """

    def __init__(
        self,
        ignore_index: int = -100,
        reduction: str = "mean",
        label_smoothing: float = 0.0,
        *,
        chunk: int | None = None,
        scores: str = "whole",
    ) -> None:
        if scores not in ("whole", "chunked"):
            raise ValueError(f"scores: must be 'whole' or 'chunked', not {scores!r}")
        if reduction not in ("mean", "sum"):
            raise ValueError(f"reduction: must be 'mean' or 'sum', not {reduction!r}")
        if chunk is not None:
            check_whole("chunk", chunk)
        super().__init__(ignore_index=ignore_index, reduction=reduction, label_smoothing=label_smoothing)
        self.chunk, self.scores = chunk, scores

    def forward(self, input: Tensor, target: Tensor) -> Tensor:
        """The loss of scores (..., V)."""
        return super().forward(input.flatten(0, -2), target.flatten())

    def from_features(self, features: Tensor, weight: Tensor, bias: Tensor | None, target: Tensor) -> Tensor:
        """The loss of the scores that a read-out makes of features; see :func:`cross_entropy_of_features`."""
        return cross_entropy_of_features(
            features,
            weight,
            bias,
            target,
            ignore_index=self.ignore_index,
            reduction=self.reduction,
            label_smoothing=self.label_smoothing,
            chunk=self.chunk,
        )


def chunks_scores(criterion: Any) -> bool:
    """Whether a criterion wants the network's features and read-out, so that it never holds all scores."""
    return getattr(criterion, "scores", "whole") == "chunked"


def cross_entropy_of_features(
    features: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    target: Tensor,
    *,
    ignore_index: int = -100,
    reduction: str = "mean",
    label_smoothing: float = 0.0,
    chunk: int | None = None,
) -> Tensor:
    """``F.cross_entropy(F.linear(features, weight, bias), target)``, a few positions at a time.

    Gradients are computed on the way forward, those alone that are asked for: of a read-only matrix none.

    Args:
        features: (..., C).
        weight: (V, C).
        bias: (V,), or None.
        target: token ids (...).
        ignore_index: target of positions that do not count.
        reduction: ``"mean"`` over those that count, or ``"sum"``.
        label_smoothing: share of the target that is spread over all tokens.
        chunk: positions at a time; None: as many as take the memory of the features, but at least 128, and on CUDA
            at least two million scores (8 MiB).

    Returns:
        The loss, 0-dim, in float32 at least.

    Raises:
        ValueError: there are not as many targets as positions.
    """
    width, vocabulary = features.shape[-1], weight.shape[0]
    rows, labels = features.reshape(-1, width), target.reshape(-1)
    if len(rows) != len(labels):
        raise ValueError(
            f"target: its {len(labels)} token ids, of shape {tuple(target.shape)}, do not match the {len(rows)} "
            f"positions of features of shape {tuple(features.shape)}; give one for each"
        )
    least = max(_LEAST, _FILLS // vocabulary) if features.is_cuda else _LEAST
    size = chunk or max(least, rows.shape[0] * width // vocabulary)
    loss: Tensor = _CrossEntropy.apply(
        rows, weight, bias, labels, ignore_index, reduction == "mean", label_smoothing, size, torch.is_grad_enabled()
    )
    return loss


class _CrossEntropy(torch.autograd.Function):
    """See :func:`cross_entropy_of_features`."""

    @staticmethod
    def forward(
        ctx: Any,
        rows: Tensor,
        weight: Tensor,
        bias: Tensor | None,
        labels: Tensor,
        ignore_index: int,
        mean: bool,
        smoothing: float,
        size: int,
        differentiable: bool,
    ) -> Tensor:
        wanted = [needed and differentiable for needed in ctx.needs_input_grad[:3]]
        device = rows.device.type
        dtype = torch.get_autocast_dtype(device) if torch.is_autocast_enabled(device) else rows.dtype
        wide = torch.promote_types(dtype, torch.float32)
        counted = labels != ignore_index
        count = counted.sum().to(wide) if mean else torch.ones((), dtype=wide, device=rows.device)
        share = torch.where(counted, 1 / count, 0.0)  # of each position in the loss
        steep, rest = share, None  # what slopes are multiplied with now, and gradients in backward
        half = dtype == torch.float16
        if half:  # where slope × share would be 0 before backward comes with the scale of the loss that prevents it
            factor = min(1.0, _STEEPEST / size)
            steep, rest = counted * factor, share.amax() / factor
        gradients = [
            torch.zeros_like(t, dtype=wide) if t is not None and w else None
            for t, w in zip((None, weight, bias), wanted, strict=True)
        ]
        pieces: list[Tensor] = []
        total = torch.zeros((), dtype=wide, device=rows.device)
        with torch.autocast(device, enabled=False):
            matrix = weight.to(dtype)
            offset = None if bias is None else bias.to(dtype)
            places = torch.where(counted, labels, 0).unsqueeze(1)
            for start in range(0, rows.shape[0], size):
                part = slice(start, start + size)
                features, index, weights = rows[part].to(dtype), places[part], share[part].unsqueeze(1)
                scores = F.linear(features, matrix, offset).to(wide)
                norm = scores.logsumexp(1, keepdim=True)
                wrong = norm - (1 - smoothing) * scores.gather(1, index)
                if smoothing:
                    wrong -= smoothing * scores.mean(1, keepdim=True)
                total += torch.where(weights > 0, wrong * weights, 0.0).sum()
                if not any(wanted):
                    continue
                slope = scores.sub_(norm).exp_()  # now the gradient of the loss with respect to the scores
                if smoothing:
                    slope -= smoothing / slope.shape[1]
                slope.scatter_add_(1, index, torch.full_like(norm, smoothing - 1))
                slope *= steep[part].unsqueeze(1)
                if gradients[2] is not None:
                    gradients[2] += slope.sum(0)
                slope = slope.to(dtype)
                if wanted[0]:
                    pieces.append((slope @ matrix).to(wide if half else dtype))
                if gradients[1] is not None:
                    gradients[1] += slope.mT @ features
        if wanted[0]:
            gradients[0] = torch.cat(pieces)
        ctx.save_for_backward(*gradients, rest)
        ctx.dtypes = [None if t is None else t.dtype for t in (rows, weight, bias)]
        return total * (count / count)  # not a number where nothing counts, as ever

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, *outputs: Tensor) -> tuple[Tensor | None, ...]:
        (outer,), (*gradients, rest) = outputs, ctx.saved_tensors
        outer = outer if rest is None else outer * rest
        found = [
            None if gradient is None else gradient.mul_(outer).to(dtype)  # a second backward pass finds it altered
            for gradient, dtype in zip(gradients, ctx.dtypes, strict=True)
        ]
        return *found, *(None,) * 6
