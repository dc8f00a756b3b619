"""Decoupled greedy learning: every module learns the task by itself, through a small classifier of its own.

Belilovsky, Eickenberg and Oyallon, "Decoupled Greedy Learning of CNNs" (ICML 2020).
"""

from __future__ import annotations

from collections.abc import Callable

from torch import Tensor, nn

from ..checks import check_whole
from .base import Rule, Site
from .layers import WIDTH, GlobalMean, ToMap, layers_for, pool_to

_SMALL_MAP = 8  # a map of at most this many rows or columns is not reduced further
_HIDDEN = 128
_MOST_READ = 2**17  # weights of a classifier, beyond which fewer hidden units are read


def read_out(site: Site) -> nn.Module:
    """A norm and a linear read-out at each position, for features (N, T, C) and predictions (N, T, V).

    Features of another length or layout (those of an encoder) give one prediction for all positions: that of their
    mean.
    """
    head = nn.Sequential(nn.LayerNorm(site.channels), nn.Linear(site.channels, site.output_shape[-1], bias=False))
    if len(site.feature_shape) == 3 and site.channel_dim == -1 and site.feature_shape[1] == site.output_shape[1]:
        return head
    return nn.Sequential(ToMap(site), GlobalMean(), head, _Everywhere(site.output_shape[1]))


class _Everywhere(nn.Module):
    """One prediction (N, V) for each of so many positions."""

    def __init__(self, length: int) -> None:
        super().__init__()
        self.length = length

    def forward(self, prediction: Tensor) -> Tensor:
        return prediction.unsqueeze(1).expand(-1, self.length, -1)


def linear(site: Site) -> nn.Module:
    """Global average pooling and a linear classifier; at each position of a sequence a norm and a read-out."""
    if site.per_position:
        return read_out(site)
    return nn.Sequential(ToMap(site), GlobalMean(), nn.Linear(site.channels, site.num_outputs))


def _bound(site: Site, width: int | None) -> int | None:
    """Channels, or units on vectors, that features are reduced to; None where they are no wider."""
    if width is None:
        return None
    bound = width if site.spatial else 4 * width
    return bound if site.channels > bound else None


def conv(site: Site, width: int | None = WIDTH) -> nn.Module:
    """A 3×3 convolution, norm, ReLU, global average pooling, a hidden layer of 128 units and a classifier.

    While the map is large (more than 8 rows and columns) the convolution has stride 2 and, up to 128 channels, doubles
    the width. On tokens (N, T, C) the convolution runs along the sequence; on vectors it is a linear layer. Where the
    network predicts at each position of a sequence, a norm and a read-out.

    Args:
        site: where the features are.
        width: channels that the convolution makes of wider features (on vectors four times as many units), so that it
            grows with the channels and not with their square; None: as published.
    """
    if site.per_position:
        return read_out(site)
    convolution, norm = layers_for(site)
    large = bool(site.spatial) and min(site.spatial) > _SMALL_MAP
    channels = max(site.channels, min(2 * site.channels, _HIDDEN)) if large else site.channels
    if (bound := _bound(site, width)) is not None:
        channels = bound
    kernel = 3 if site.spatial else 1
    return nn.Sequential(
        ToMap(site),
        convolution(site.channels, channels, kernel, stride=2 if large else 1, padding=kernel // 2, bias=False),
        norm(channels),
        nn.ReLU(inplace=True),
        GlobalMean(),
        nn.Linear(channels, _HIDDEN),
        nn.ReLU(inplace=True),
        nn.Linear(_HIDDEN, site.num_outputs),
    )


def mlp_sr(site: Site, width: int | None = WIDTH) -> nn.Module:
    """The "MLP-SR-aux" network of the paper (section 4.2): cheap, since it works on a quarter of the resolution.

    Pooled to a quarter of each side, three 1×1 convolutions, pooled to 2×2 (2 tokens of a sequence), two hidden layers
    of as many units as that leaves features, and a classifier. On vectors only two hidden layers and the classifier:
    convolutions would be hidden layers, too. Where the network predicts at each position of a sequence, a norm and a
    read-out.

    Args:
        site: where the features are.
        width: channels to which the first convolution reduces wider features. The hidden layers then have at most four
            times as many units, and fewer, down to ``width``, where the classifier would have more than 131,072
            weights. None: as many channels and hidden units as there are features, as published; that grows with the
            square of the channels.
    """
    if site.per_position:
        return read_out(site)
    convolution, norm = layers_for(site)
    spatial, features, bound = site.spatial, site.channels, _bound(site, width)
    layers: list[nn.Module] = []
    if spatial:
        small = tuple(-(-side // 4) for side in spatial)
        channels = bound or features
        layers += [ToMap(site), pool_to(spatial, small)]
        for before in (features, channels, channels):
            layers += [convolution(before, channels, 1, bias=False), norm(channels), nn.ReLU(inplace=True)]
        features = channels * 2 ** len(spatial)
        layers += [pool_to(small, (2,) * len(small)), nn.Flatten()]
    hidden = features
    if width is not None and bound is not None:
        hidden = min(features, 4 * width, max(width, _MOST_READ // site.num_outputs))
    for before in (features, hidden):
        layers += [nn.Linear(before, hidden, bias=False), nn.BatchNorm1d(hidden), nn.ReLU(inplace=True)]
    return nn.Sequential(*layers, nn.Linear(hidden, site.num_outputs))


AUXILIARY_NETWORKS: dict[str, Callable[..., nn.Module]] = {"linear": linear, "conv": conv, "mlp_sr": mlp_sr}
_BOUNDED = ("conv", "mlp_sr")


class GreedyRule(Rule):
    """Each module minimises the criterion of the task through its own auxiliary network.

    Args:
        auxiliary: ``"linear"``, ``"conv"``, ``"mlp_sr"``, or a callable that takes a :class:`Site` and returns a module
            which maps the features to the shape of the network's output.
        width: channels that ``"conv"`` and ``"mlp_sr"`` reduce wider features to; None: as published, which grows with
            the square of the features' channels. Up to ``width`` channels they are as published.

    Raises:
        ValueError: no auxiliary network of this name exists, or ``width`` is out of range.
    """

    def __init__(self, auxiliary: str | Callable[[Site], nn.Module] = "conv", *, width: int | None = WIDTH) -> None:
        if isinstance(auxiliary, str) and auxiliary not in AUXILIARY_NETWORKS:
            raise ValueError(
                f"auxiliary: no network named {auxiliary!r}; choose one of {', '.join(AUXILIARY_NETWORKS)}, or pass a "
                "callable that builds one"
            )
        if not isinstance(auxiliary, str) and not callable(auxiliary):
            raise ValueError(f"auxiliary: must be a name or a callable, not {type(auxiliary).__name__}")
        if width is not None:
            check_whole("width", width)
        if width != WIDTH and auxiliary not in _BOUNDED:
            raise ValueError(f"width: is an option of the networks {' and '.join(_BOUNDED)}; leave it out")
        self._auxiliary, self._width = auxiliary, width

    def __repr__(self) -> str:
        name = self._auxiliary if isinstance(self._auxiliary, str) else getattr(self._auxiliary, "__name__", "callable")
        width = f", width={self._width}" if self._width != WIDTH else ""
        return f"{type(self).__name__}(auxiliary={name!r}{width})"

    def auxiliary(self, site: Site) -> nn.Module:
        if isinstance(self._auxiliary, str):
            bound = (self._width,) if self._auxiliary in _BOUNDED else ()
            network = AUXILIARY_NETWORKS[self._auxiliary](site, *bound)
        else:
            network = self._auxiliary(site)
        if not isinstance(network, nn.Module):
            raise ValueError(f"auxiliary: the callable must return an nn.Module, not {type(network).__name__}")
        return network


class DGLRule(GreedyRule):
    """DGL: cross-entropy (the criterion of the task) through the "MLP-SR-aux" network, bounded on wide features.

    Belilovsky, Eickenberg and Oyallon, "Decoupled Greedy Learning of CNNs" (ICML 2020), section 4.2.

    Args:
        auxiliary: another auxiliary network, see :class:`GreedyRule`.
        width: channels that wider features are reduced to; None: as published, whatever its size.
    """

    def __init__(self, auxiliary: str | Callable[[Site], nn.Module] = "mlp_sr", *, width: int | None = WIDTH) -> None:
        super().__init__(auxiliary, width=width)
