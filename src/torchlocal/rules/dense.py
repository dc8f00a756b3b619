"""Auxiliary networks for dense prediction: a map of scores, one vector per pixel."""

from __future__ import annotations

from collections.abc import Callable

import torch.nn.functional as F
from torch import Tensor, nn

from .base import Site
from .layers import ToMap

__all__ = ["dense"]


class _Upsample(nn.Module):
    """Bilinear interpolation to a size."""

    def __init__(self, size: tuple[int, int]) -> None:
        super().__init__()
        self.size = size

    def forward(self, maps: Tensor) -> Tensor:
        return F.interpolate(maps, size=self.size, mode="bilinear", align_corners=False)


def dense(width: int = 64) -> Callable[[Site], nn.Module]:
    """Makes a small head for maps: a 3×3 convolution, norm, ReLU, a 1×1 convolution to the scores, and interpolation.

    For ``GreedyRule(dense())``, where the network's output is (N, C, H, W). It works at the resolution of the features
    and only the scores are interpolated.

    Args:
        width: channels of the hidden map.

    Returns:
        A callable that takes a :class:`Site`, for :class:`GreedyRule`.
    """

    def build(site: Site) -> nn.Module:
        if len(site.output_shape) != 4 or len(site.spatial) != 2:
            raise ValueError(
                f"rule: the dense head makes a map of scores out of a map, and here features of shape "
                f"{tuple(site.feature_shape)} meet an output of shape {tuple(site.output_shape)}; use another one"
            )
        height, width_out = site.output_shape[2:]
        layers: list[nn.Module] = [
            ToMap(site),
            nn.Conv2d(site.channels, width, 3, padding=1, bias=False),
            nn.BatchNorm2d(width),
            nn.ReLU(inplace=True),
            nn.Conv2d(width, site.output_shape[1], 1),
        ]
        if site.spatial != (height, width_out):
            layers.append(_Upsample((height, width_out)))
        return nn.Sequential(*layers)

    return build
