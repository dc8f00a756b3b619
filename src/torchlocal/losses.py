"""Losses that torch does not have in the layout of what language models predict."""

from __future__ import annotations

import torch.nn.functional as F
from torch import Tensor

__all__ = ["token_cross_entropy"]


def token_cross_entropy(
    prediction: Tensor,
    target: Tensor,
    *,
    ignore_index: int = -100,
    label_smoothing: float = 0.0,
    reduction: str = "mean",
) -> Tensor:
    """Cross-entropy at each position: the mean over all targets that are not ignored.

    Args:
        prediction: scores of the tokens `(N, T, V)`.
        target: the tokens `(N, T)`, int64.
        ignore_index: a target that does not count.
        label_smoothing: as of :func:`torch.nn.functional.cross_entropy`.
        reduction: "mean" or "sum".
    """
    return F.cross_entropy(
        prediction.flatten(0, -2),
        target.flatten(),
        ignore_index=ignore_index,
        label_smoothing=label_smoothing,
        reduction=reduction,
    )
