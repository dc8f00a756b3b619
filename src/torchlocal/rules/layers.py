"""The layers that auxiliary networks of several rules are made of, for features of any layout."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from .base import Site

__all__ = ["WIDTH", "BlockMean", "GlobalMean", "SpatialStd", "ToMap", "layers_for", "normalised", "pool_to", "silent"]

WIDTH = 64  # channels of the widest features in the papers' CIFAR ResNets, whose auxiliary networks are as published


class ToMap(nn.Module):
    """Features of any layout as a channels-first map: (N, C, H, W), (N, C, T), or (N, C, 1) for vectors."""

    def __init__(self, site: Site) -> None:
        super().__init__()
        self.channel_dim = site.channel_dim
        self.vector = not site.spatial

    def forward(self, features: Tensor) -> Tensor:
        if self.vector:
            return features.unsqueeze(-1)
        return features if self.channel_dim == 1 else features.movedim(-1, 1)


def layers_for(site: Site) -> tuple[type[nn.Module], type[nn.Module]]:
    """Convolution and norm for the features at ``site``."""
    dims = max(1, len(site.spatial))
    if dims > 3:
        raise ValueError(
            f"rule: features of shape {tuple(site.feature_shape)} have {dims} spatial dimensions, and the auxiliary "
            "networks of the library know at most 3; pass a callable that builds a fitting one"
        )
    convolution = (nn.Conv1d, nn.Conv2d, nn.Conv3d)[dims - 1]
    norm = (nn.BatchNorm1d, nn.BatchNorm2d, nn.BatchNorm3d)[dims - 1]
    return convolution, norm


def pool_to(spatial: Sequence[int], small: Sequence[int]) -> nn.Module:
    """Average pooling of maps of extent ``spatial`` to ``small``; where the one divides the other, by a faster kernel.

    An :class:`~torch.nn.Identity` if there is nothing to pool.
    """
    spatial, small = tuple(spatial), tuple(small)
    if spatial == small:
        return nn.Identity()
    if all(side % target == 0 for side, target in zip(spatial, small, strict=True)):
        kernel = tuple(side // target for side, target in zip(spatial, small, strict=True))
        kinds: Any = (nn.AvgPool1d, BlockMean, nn.AvgPool3d)
        block: nn.Module = kinds[len(spatial) - 1](kernel)
        return block
    adaptive: Any = (nn.AdaptiveAvgPool1d, nn.AdaptiveAvgPool2d, nn.AdaptiveAvgPool3d)[len(spatial) - 1]
    pool: nn.Module = adaptive(small)
    return pool


class BlockMean(nn.Module):
    """Average pooling (N, C, H, W) over blocks that tile the map; its backward pass is a plain copy, hence faster.

    Args:
        kernel: height and width of a block.
    """

    def __init__(self, kernel: tuple[int, int]) -> None:
        super().__init__()
        self.kernel = kernel

    def extra_repr(self) -> str:
        """The block."""
        return f"kernel={self.kernel}"

    def forward(self, maps: Tensor) -> Tensor:
        pooled: Tensor = _BlockMean.apply(maps, self.kernel)
        return pooled


class _BlockMean(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, maps: Tensor, kernel: tuple[int, int]) -> Tensor:
        ctx.kernel, ctx.last = kernel, maps.is_contiguous(memory_format=torch.channels_last) and maps.shape[1] > 1
        return F.avg_pool2d(maps, kernel)

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, None]:
        (rows, columns), (count, channels, height, width) = ctx.kernel, gradient.shape
        share = gradient / (rows * columns)
        if ctx.last:
            share = share.permute(0, 2, 3, 1).reshape(count, height, 1, width, 1, channels)
            share = share.expand(-1, -1, rows, -1, columns, -1)
            return share.reshape(count, height * rows, width * columns, channels).permute(0, 3, 1, 2), None
        if share.device.type == "cpu":  # copying single numbers takes twice as long as this product
            repeat = torch.eye(width, dtype=share.dtype).repeat_interleave(columns, dim=1)
            share = (share.reshape(-1, width) @ repeat).view(count, channels, height, 1, width * columns)
            share = share.expand(-1, -1, -1, rows, -1)
        else:
            share = share.reshape(count, channels, height, 1, width, 1).expand(-1, -1, -1, rows, -1, columns)
        return share.reshape(count, channels, height * rows, width * columns), None


class GlobalMean(nn.Module):
    """Average of maps (N, C, ...) over all positions, (N, C); the gradient has the memory layout of the maps.

    PyTorch's own has the contiguous one, and where that meets channels-last activations the backward kernels before it
    are up to ten times slower (ReLU on CPU).
    """

    def forward(self, maps: Tensor) -> Tensor:
        same: Tensor = _SameLayout.apply(maps)
        return same.mean(tuple(range(2, maps.ndim)))


class _SameLayout(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, maps: Tensor) -> Tensor:
        ctx.last = maps.ndim == 4 and maps.is_contiguous(memory_format=torch.channels_last)
        return maps.view_as(maps)

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> Tensor:
        return gradient.contiguous(memory_format=torch.channels_last) if ctx.last else gradient


class SpatialStd(torch.autograd.Function):
    """Standard deviation of maps (N, C, ...) over all positions, (N, C) in float32 at least, as ``z.std`` has it.

    From sums and sums of squares, which is an order of magnitude faster on CPU than ``torch.std`` and keeps nothing but
    the map itself. The relative error is about 1e-7 × (mean / spread)², so it is for maps whose spread is not far below
    their mean. Where nothing of the spread is left the gradient is zero.
    """

    @staticmethod
    def forward(ctx: Any, maps: Tensor) -> Tensor:
        dims = tuple(range(2, maps.ndim))
        wide = maps.float() if maps.dtype in (torch.bfloat16, torch.float16) else maps
        mean = wide.mean(dims)
        count = wide[0, 0].numel()
        squares = torch.linalg.vector_norm(wide, dim=dims).square()
        std = ((squares - count * mean.square()) / (count - 1)).clamp_min(0).sqrt()
        ctx.save_for_backward(maps, mean, std)
        ctx.count = count
        return std

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> Tensor:
        maps, mean, std = ctx.saved_tensors
        scale = torch.where(std > 0, gradient / (std * (ctx.count - 1)), 0)
        shape = (*scale.shape, *[1] * (maps.ndim - 2))
        shift = (-mean * scale).to(maps.dtype).view(shape)
        return torch.addcmul(shift, maps, scale.to(maps.dtype).view(shape))


def normalised(rows: Tensor, *, eps: float = 1e-8) -> Tensor:
    """Each row (N, D) divided by its length."""
    return rows / (torch.linalg.vector_norm(rows, dim=1, keepdim=True) + eps)


def silent(loss: Tensor) -> Tensor:
    """A loss whose gradient counts and whose value is zero, for a probe that is to learn without being reported."""
    return loss - loss.detach()
