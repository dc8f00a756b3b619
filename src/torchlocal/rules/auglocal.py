"""AugLocal: auxiliary networks that look like what comes after the module.

Ma, Wu, Si and Tan, "Scaling Supervised Local Learning with Augmented Auxiliary Networks" (ICLR 2024).
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn

from ..checks import check_share, check_whole
from ..cut.copies import UnitCopy
from .base import Rule, Site
from .greedy import linear

__all__ = ["AugLocalRule", "Units", "auxiliary_depth", "sampled_units"]

_CONVOLUTIONS = (nn.Conv1d, nn.Conv2d, nn.Conv3d)
Layout = tuple[torch.Size, int]  # shape, batch included, and which dimension holds the channels


def auxiliary_depth(depth: int, place: float, pyramid: float) -> int:
    """Depth of an auxiliary network under the pyramid rule.

    It falls linearly from ``depth`` at the first module (``place`` 0) to ``pyramid`` of the way to 1 at the last module
    that has an auxiliary network (``place`` 1), rounded, and is at least 1.
    """
    return max(1, round(depth * (1 - pyramid * place) + pyramid * place))


def sampled_units(position: int, num_units: int, depth: int) -> list[int]:
    """Indices of ``depth`` units, spread evenly over those after unit ``position``, the last one among them."""
    left = num_units - 1 - position
    if depth >= left:
        return list(range(position + 1, num_units))
    return [round(position + left / depth * i) for i in range(1, depth + 1)]


class AugLocalRule(Rule):
    """The auxiliary network is made of d units of the same architecture as units further down, and the network's head.

    The units are spread evenly over those after the module and always include the last one, which ends in the head of
    the network; their weights are their own, drawn anew. The loss is the criterion of the task. Where a unit is handed
    something else than it takes in the backbone, since units between are left out, its first convolutions (and a 1×1
    convolution on its shortcut) take the other width and make up for the missing strides; where it does not begin with
    a convolution, average pooling and a projection with a norm come before it. On the CIFAR ResNets these are the
    published networks.

    The published command trains the last d + 1 units of the network as one module; cut so, or keep them all.

    Args:
        depth: number d of units in the auxiliary network of the first module.
        pyramid: how far the depth falls towards 1 over the modules; 0 keeps it.

    Raises:
        ValueError: an option is out of range.
    """

    def __init__(self, depth: int = 2, *, pyramid: float = 0.5) -> None:
        check_whole("depth", depth)
        check_share("pyramid", pyramid)
        self._depth, self._pyramid = depth, float(pyramid)

    def __repr__(self) -> str:
        return f"AugLocalRule(depth={self._depth}, pyramid={self._pyramid:g})"

    def auxiliary(self, site: Site) -> nn.Module:
        downstream = site.downstream
        if downstream is None:
            raise ValueError("rule: AugLocal copies the units after the module; use it through decouple")
        position = downstream.first - 1
        depth = auxiliary_depth(self._depth, site.depth, self._pyramid)
        chosen = sampled_units(position, downstream.first + len(downstream), depth)
        if not chosen:  # on top of the last unit, as MAN looks from there
            return linear(site)
        layout: Layout = site.feature_shape, site.channel_dim
        units: list[nn.Module] = []
        for index in chosen:
            unit = index - downstream.first
            module, _ = downstream.copy(unit)
            if self._depth == 1:
                _normalise_classifier(module, site)
            units.append(fit_input(module, layout, downstream.input_layout(unit)))
            layout = downstream.units[unit].output_shape, downstream.units[unit].channel_dim
        return Units(*units)


class Units(nn.Sequential):
    """Units that run one after another."""

    def compile(self, *args: Any, **kwargs: Any) -> None:
        """Compile each by itself."""
        for unit in self:
            unit.compile(*args, **kwargs)


def fit_input(unit: UnitCopy, given: Layout, wanted: Layout) -> nn.Module:
    """A unit changed in place, or with a layer before it, so that it takes features of another shape.

    Args:
        unit: a unit of its own.
        given: what it will be handed.
        wanted: what it takes now.

    Raises:
        ValueError: vectors are handed to a unit that takes a map.
    """
    if given[1] == wanted[1] and given[0][1:] == wanted[0][1:]:
        return unit
    if len(given[0]) == 2 < len(wanted[0]):
        raise ValueError(
            f"rule: features of shape {tuple(given[0])} cannot be laid out as {tuple(wanted[0])}, which a unit further "
            "down takes; use a rule that does not copy units"
        )
    strides = _strides(given, wanted)
    if strides is None or not _widen(unit, given[0][1], wanted[0][1], strides):
        return Units(_Adapter(given, wanted), unit)
    return unit


def _strides(given: Layout, wanted: Layout) -> tuple[int, ...] | None:
    """By how much strides bring one channels-first map to the other's extent; None if they do not."""
    if given[1] != 1 or wanted[1] != 1 or len(given[0]) != len(wanted[0]) or len(given[0]) < 3:
        return None
    strides = tuple(math.ceil(a / b) for a, b in zip(given[0][2:], wanted[0][2:], strict=True))
    fits = all(math.ceil(a / s) == b for a, b, s in zip(given[0][2:], wanted[0][2:], strides, strict=True))
    return strides if fits else None


def _widen(unit: UnitCopy, channels: int, expected: int, strides: tuple[int, ...]) -> bool:
    """Have the unit's first convolutions take another width and more stride, and project the input for all else.

    Returns:
        Whether it was possible; if not, nothing was changed.
    """
    first = [path for path in dict.fromkeys(unit.readers) if _is_plain_convolution(unit, path, expected)]
    if not first:
        return False
    for path in first:
        old = unit.get_submodule(path)
        assert isinstance(old, _CONVOLUTIONS)
        stride = tuple(s * t for s, t in zip(old.stride, strides, strict=True))
        new = type(old)(
            channels, old.out_channels, old.kernel_size, stride,  # type: ignore[arg-type]
            padding=old.padding, dilation=old.dilation, bias=old.bias is not None, padding_mode=old.padding_mode,  # type: ignore[arg-type]
        )  # fmt: skip
        _initialise(new)
        unit.replace(path, new)
    if any(path not in first for path in unit.readers):
        kind = _CONVOLUTIONS[len(strides) - 1]
        norm = (nn.BatchNorm1d, nn.BatchNorm2d, nn.BatchNorm3d)[len(strides) - 1]
        projection = kind(channels, expected, 1, strides, bias=False)  # type: ignore[arg-type]
        _initialise(projection)
        unit.project(nn.Sequential(projection, norm(expected)), first)
    return True


def _is_plain_convolution(unit: UnitCopy, path: str, channels: int) -> bool:
    if not path or not unit.owns(path):
        return False
    module: Any = unit.get_submodule(path)
    plain = isinstance(module, _CONVOLUTIONS) and module.groups == 1 and module.in_channels == channels
    # Strides divide the extent exactly as before only with "same" padding.
    return plain and all(
        not isinstance(p, str) and 2 * p == d * (k - 1)
        for p, d, k in zip(module.padding, module.dilation, module.kernel_size, strict=True)
    )


def _initialise(convolution: nn.Module) -> None:
    assert isinstance(convolution, _CONVOLUTIONS)
    nn.init.kaiming_normal_(convolution.weight, mode="fan_out", nonlinearity="relu")


def _normalise_classifier(unit: UnitCopy, site: Site) -> None:
    """Put a norm before the classifier, as the published networks of depth 1 have it."""
    module = unit.get_submodule(unit.last) if unit.owns(unit.last) else None
    if isinstance(module, nn.Linear) and len(site.output_shape) == 2:
        unit.replace(unit.last, nn.Sequential(nn.BatchNorm1d(module.in_features), module))


class _Adapter(nn.Module):
    """Average pooling to another extent, then a linear projection with a norm to another width.

    Args:
        given: layout of what comes in.
        wanted: layout of what goes out.
    """

    def __init__(self, given: Layout, wanted: Layout) -> None:
        super().__init__()
        self.given_dim, self.wanted_dim = given[1], wanted[1]
        before, after = _extent(given), _extent(wanted)
        self.flat = len(before) != len(after)
        if self.flat:
            before = (math.prod(before),)
        self.spatial: tuple[int, ...] = after
        count = (math.prod(after),) if self.flat else after
        pools = (nn.AdaptiveAvgPool1d, nn.AdaptiveAvgPool2d, nn.AdaptiveAvgPool3d)
        self.pool: nn.Module = pools[len(count) - 1](count) if count and before != count else nn.Identity()
        channels, width = given[0][given[1]], wanted[0][wanted[1]]
        self.projection: nn.Module = nn.Identity()
        if channels != width:
            self.projection = nn.Sequential(nn.Conv1d(channels, width, 1, bias=False), nn.BatchNorm1d(width))

    def forward(self, features: Tensor) -> Tensor:
        maps = features if self.given_dim == 1 else features.movedim(-1, 1)
        maps = maps.flatten(2) if self.flat else maps
        maps = self.pool(maps)
        columns = self.projection(maps.flatten(2) if maps.ndim > 2 else maps.unsqueeze(2))
        maps = columns.reshape(*columns.shape[:2], *self.spatial)
        return maps if self.wanted_dim == 1 else maps.movedim(1, -1).contiguous()


def _extent(layout: Layout) -> tuple[int, ...]:
    inner: Sequence[int] = layout[0][2:] if layout[1] == 1 else layout[0][1:-1]
    return tuple(inner)
