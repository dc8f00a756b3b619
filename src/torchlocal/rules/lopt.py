"""LoPT: fine-tuning in two halves, of which the lower one is held by what it takes to reconstruct its own input.

"LoPT" (arXiv 2605.04913, 2026).
"""

from __future__ import annotations

from typing import Any

import torch.nn.functional as F
from torch import Tensor, nn

from ..checks import check_whole, number
from .base import Batch, Rule, Site
from .downstream import Downstream

__all__ = ["LoptRule"]


class LoptRule(Rule):
    """The lower of two modules learns to reconstruct the embedding; the task is learned by the upper one alone.

    A small network (LayerNorm, a linear layer to a quarter of the width, GELU, a linear layer) makes of the lower
    module's output what the network's first unit, the embedding, has made of the input: the mean squared error, times
    a weight. The embedding is the target as it is in that step; no gradient goes into it from there. The paper cuts at
    the midpoint; balanced by activations the cut may lie elsewhere, since the upper half has the scores.

    Nothing of this predicts. ``predict`` looks at the features through the network's own read-out, after a norm without
    weights; nothing learns from that, and it means little while the lower half is not close to the read-out.

    Args:
        weight: of the reconstruction.
        reduction: the width is divided by this in the middle of the small network.

    Raises:
        ValueError: an option is out of range.
    """

    reads_embedding = True

    def __init__(self, weight: float = 10.0, *, reduction: int = 4) -> None:
        number("weight", weight, "a number above 0", above=0, single=True)
        check_whole("reduction", reduction)
        self._weight, self._reduction = float(weight), reduction

    def __repr__(self) -> str:
        return f"LoptRule(weight={self._weight:g}, reduction={self._reduction})"

    def auxiliary(self, site: Site) -> nn.Module:
        downstream = _downstream(site)
        if site.num_modules != 2:
            raise ValueError(f"rule: LoPT trains two modules, a lower and an upper half, not {site.num_modules}")
        shape, wanted = site.feature_shape, downstream.embedding_shape
        if len(shape) != 3 or site.channel_dim != -1 or shape[:-1] != wanted[:-1]:
            raise ValueError(
                f"rule: LoPT reconstructs the embedding at each position of a sequence (N, T, C), and here features of "
                f"shape {tuple(shape)} meet an embedding of shape {tuple(wanted)}; use another rule"
            )
        width = site.channels
        narrow = max(1, width // self._reduction)
        return nn.Sequential(nn.LayerNorm(width), nn.Linear(width, narrow), nn.GELU(), nn.Linear(narrow, wanted[-1]))

    def loss(self, site: Site, auxiliary: nn.Module, features: Tensor, batch: Batch) -> Tensor:
        assert batch.embedding is not None, "the engine notes it for rules that read it"
        made = auxiliary(features)
        return self._weight * F.mse_loss(made.to(batch.embedding.dtype), batch.embedding)

    def predict(self, site: Site, auxiliary: nn.Module, features: Tensor) -> Tensor:
        downstream = _downstream(site)
        weight, *bias = (p.detach() for p in downstream.parameters([n for n in downstream.read_out() if n is not None]))
        if not site.per_position:
            features = features.mean(1)
        return F.linear(F.rms_norm(features, features.shape[-1:]), weight, *bias)

    def rehearse(self, site: Site, auxiliary: nn.Module, features: Tensor) -> Any:
        return auxiliary(features)


def _downstream(site: Site) -> Downstream:
    if site.downstream is None:
        raise ValueError("rule: LoPT looks at the first unit of the network; use it through decouple")
    return site.downstream
