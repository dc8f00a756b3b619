"""PredSim: features that predict the target, and that are alike where the targets are.

Nøkland and Eidnes, "Training Neural Networks with Local Error Signals" (ICML 2019).
"""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ..checks import check_share, check_whole
from .base import Batch, Rule, Site
from .greedy import linear
from .layers import WIDTH, SpatialStd, ToMap, layers_for, normalised, pool_to, silent

__all__ = ["PredSimRule", "similarity"]

_LOSSES = ("predsim", "pred", "sim")


def similarity(features: Tensor) -> Tensor:
    """The matrix (N, N) of adjusted cosine similarities between examples.

    Of maps (N, C, ...) with more than three channels and more than one position, the standard deviations over the
    positions are compared; of anything else, all numbers. Each row has its mean taken off.
    """
    if features.ndim > 2:
        by_channel = features.shape[1] > 3 and features[0, 0].numel() > 1
        features = SpatialStd.apply(features) if by_channel else features.flatten(1)
    features = features.float() if features.dtype in (torch.bfloat16, torch.float16) else features
    rows = normalised(features - features.mean(1, keepdim=True))
    return (rows @ rows.T).clamp(-1, 1)


def _pooled(channels: int, spatial: tuple[int, ...], most: int) -> tuple[int, ...]:
    """Extent of the pooled map: sides halve in turn, the first one first, while more than ``most`` numbers are left."""
    kernel = [1] * len(spatial)
    small = list(spatial)
    while True:
        for i in range(len(spatial)):
            if channels * torch.Size(small).numel() <= most:
                return tuple(small)
            kernel[i] *= 2
            small[i] = -(-spatial[i] // kernel[i])
        if all(side == 1 for side in small):
            return tuple(small)


class _FeedbackLinear(nn.Linear):
    """A linear layer whose input gets its gradient through fixed random weights (feedback alignment)."""

    def __init__(self, in_features: int, out_features: int) -> None:
        super().__init__(in_features, out_features)
        self.register_buffer("feedback", self.weight.detach().clone())
        self.feedback: Tensor

    def forward(self, input: Tensor) -> Tensor:
        return super().forward(input.detach()) + silent(F.linear(input, self.feedback))


class _PredSimNetwork(nn.Module):
    """The two branches: class scores (or bits), and the map whose similarities count."""

    def __init__(self, site: Site, loss: str, most: int, num_bits: int | None, widest: int | None) -> None:
        super().__init__()
        convolution, _ = layers_for(site)
        num_classes = site.num_outputs
        spatial = site.spatial or (1,)
        small = _pooled(site.channels, spatial, most)
        width = site.channels * torch.Size(small).numel()
        self.to_map = ToMap(site)
        self.pool = pool_to(spatial, small)
        self.bits: Tensor | None
        self.register_buffer("bits", None if num_bits is None else nn.Linear(num_classes, num_bits).weight.detach())
        self.classifier: nn.Module | None = None
        self.projection: nn.Module | None = None
        if loss != "sim":
            self.classifier = nn.Linear(width, num_classes) if num_bits is None else _FeedbackLinear(width, num_bits)
            nn.init.zeros_(self.classifier.weight)
        if loss != "pred" and num_bits is None:
            kernel = 3 if site.spatial else 1
            channels = site.channels if widest is None else min(site.channels, widest)
            self.projection = convolution(site.channels, channels, kernel, padding=kernel // 2, bias=False)
        self.similar = loss != "pred"
        self.probe = linear(site) if loss == "sim" else None

    def forward(self, features: Tensor) -> tuple[Tensor | None, Tensor | None, Tensor | None]:
        """Class scores (N, num_classes) or bits (N, num_bits), the map for the similarities, and the probe's scores."""
        maps = self.to_map(features)
        pooled = self.pool(maps) if self.classifier is not None or (self.similar and self.bits is not None) else None
        scores = None if self.classifier is None else self.classifier(pooled.flatten(1))  # type: ignore[union-attr]
        similar = None
        if self.similar:
            similar = pooled if self.projection is None else self.projection(maps)
        return scores, similar, None if self.probe is None else self.probe(features.detach())


class PredSimRule(Rule):
    """Prediction loss plus similarity-matching loss: ``(1 - beta) pred + beta sim``.

    ``pred`` is the criterion of the task on a linear classifier of the average-pooled features. ``sim`` is the mean
    squared difference between the similarities of a 3×3 convolution of the features and those of the one-hot targets;
    see :func:`similarity`. Targets are class indices (N,) or probabilities (N, C).

    With ``loss="sim"`` nothing predicts; a linear probe on detached features then tells the accuracy by depth.

    The backpropagation-free variants compare the pooled features with random projections of the
    targets, and predict their signs through a layer with feedback alignment, so that no error passes a weight that
    learns. A local module of more than one layer still runs backward inside itself: the variant is free of
    backpropagation only if every module is one layer, as each unit of ``vgg8b`` is.

    Args:
        loss: ``"predsim"``, ``"pred"`` or ``"sim"``.
        beta: share of the similarity-matching loss in ``"predsim"``.
        features: the most features that the classifier takes, after pooling.
        width: the most channels of that convolution (on vectors four times as many units); None: as many as the
            features have, as published, which grows with the square of the channels.
        backpropagation_free: use the variant without backpropagation.
        bits: size of the random projections of that variant.

    Raises:
        ValueError: an option is out of range.
    """

    compares_examples = True

    def __init__(
        self,
        loss: str = "predsim",
        *,
        beta: float = 0.99,
        features: int = 512,
        width: int | None = WIDTH,
        backpropagation_free: bool = False,
        bits: int = 128,
    ) -> None:
        if loss not in _LOSSES:
            raise ValueError(f"loss: must be one of {', '.join(_LOSSES)}, not {loss!r}")
        check_share("beta", beta)
        check_whole("features", features)
        check_whole("bits", bits)
        if width is not None:
            check_whole("width", width)
        if not isinstance(backpropagation_free, bool):
            raise ValueError(f"backpropagation_free: must be True or False, not {backpropagation_free!r}")
        self._loss, self._beta, self._features = loss, float(beta), features
        self._width, self._bits = width, bits if backpropagation_free else None

    def __repr__(self) -> str:
        free = "" if self._bits is None else f", backpropagation_free=True, bits={self._bits}"
        width = f", width={self._width}" if self._width != WIDTH else ""
        return f"PredSimRule(loss={self._loss!r}, beta={self._beta:g}, features={self._features}{width}{free})"

    def auxiliary(self, site: Site) -> nn.Module:
        widest = self._width if self._width is None or site.spatial else 4 * self._width
        return _PredSimNetwork(site, self._loss, self._features, self._bits, widest)

    def rehearse(self, site: Site, auxiliary: nn.Module, features: Tensor) -> Any:
        scores, similar, _ = auxiliary(features)
        return scores, None if similar is None else similarity(similar)

    def loss(self, site: Site, auxiliary: nn.Module, features: Tensor, batch: Batch) -> Tensor:
        scores, similar, probed = auxiliary(features)
        terms: list[tuple[float, Tensor]] = []
        with torch.autocast(features.device.type, enabled=False):
            wanted = one_hot(batch.target, site) if similar is not None or auxiliary.bits is not None else None
            if wanted is not None and auxiliary.bits is not None:
                wanted = wanted @ auxiliary.bits.T.to(wanted.dtype)  # type: ignore[operator]
            if similar is not None and wanted is not None:
                alike = similarity(similar)
                terms.append((self._beta, F.mse_loss(alike, similarity(wanted).to(alike.dtype))))
            if scores is not None and wanted is not None and auxiliary.bits is not None:
                error = F.binary_cross_entropy_with_logits(scores.float(), (wanted > 0).float())
                terms.append((1 - self._beta, error))
        if scores is not None and auxiliary.bits is None:
            terms.append((1 - self._beta, batch.criterion(scores, batch.target)))
        loss = sum((share * term for share, term in terms[1:]), terms[0][0] * terms[0][1]) if terms[1:] else terms[0][1]
        return loss if probed is None else loss + silent(batch.criterion(probed, batch.target))

    def predict(self, site: Site, auxiliary: nn.Module, features: Tensor) -> Tensor:
        """Class scores; from bits, the log-likelihood of each class's, up to a constant."""
        scores, _, probed = auxiliary(features)
        if scores is None:
            return probed
        if auxiliary.bits is None:
            return scores
        bits: Any = auxiliary.bits
        return scores @ (bits > 0).to(scores.dtype)


def one_hot(target: Any, site: Site) -> Tensor:
    """Targets as rows of probabilities (N, C), float32 at least.

    Raises:
        ValueError: they are neither class indices (N,) nor probabilities (N, C).
    """
    shape = (site.num_outputs,)
    if isinstance(target, Tensor) and target.ndim == 1 and not target.is_floating_point():
        return (target.unsqueeze(1) == torch.arange(shape[0], device=target.device)).float()
    if isinstance(target, Tensor) and target.is_floating_point() and target.shape[1:] == shape:
        return target if target.dtype == torch.float64 else target.float()
    found = f"shape {tuple(target.shape)}" if isinstance(target, Tensor) else type(target).__name__
    raise ValueError(
        f"target: this rule takes class indices (N,) or probabilities (N, {shape[0]}), not {found}; use a greedy rule"
    )
