"""InfoPro: features that keep what they know of the input until it is known what the task needs.

Wang, Ni, Song, Yang and Huang, "Revisiting Locally Supervised Learning: an Alternative to End-to-end Training" (ICLR
2021).
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ..checks import check_whole
from .base import Batch, Rule, Site
from .greedy import GreedyRule, linear
from .layers import WIDTH, normalised, silent
from .predsim import one_hot

__all__ = ["PUBLISHED_WEIGHTS", "InfoProRule", "published_weights", "supervised_contrast"]

Weights = tuple[tuple[float, float], tuple[float, float]]

# (data, network, K): weights of reconstruction and task at the first local module, and at the last but one. They are
# those of the authors' commands for the contrastive loss.
PUBLISHED_WEIGHTS: dict[tuple[str, str, int], Weights] = {
    ("cifar10", "resnet32", 2): ((5, 1), (0, 0)),
    ("cifar10", "resnet32", 4): ((6, 0), (1, 2)),
    ("cifar10", "resnet32", 8): ((5, 0), (0, 2)),
    ("cifar10", "resnet32", 16): ((5, 0.05), (0.2, 0.5)),
    ("cifar10", "resnet110", 2): ((5, 0.5), (0, 0)),
    ("cifar10", "resnet110", 4): ((1, 0), (0, 1)),
    ("cifar10", "resnet110", 8): ((5, 0), (0, 1)),
    ("cifar10", "resnet110", 16): ((5, 0), (0.5, 1)),
    ("stl10", "resnet110", 2): ((10, 1), (0, 0)),
    ("stl10", "resnet110", 4): ((20, 0.2), (5, 2)),
    ("stl10", "resnet110", 8): ((20, 0.2), (5, 1)),
    ("stl10", "resnet110", 16): ((20, 0.5), (10, 0.1)),
    ("svhn", "resnet110", 2): ((1, 0.1), (0, 0)),
    ("svhn", "resnet110", 4): ((5, 0), (0.5, 1)),
    ("svhn", "resnet110", 8): ((5, 0), (0.5, 2)),
    ("svhn", "resnet110", 16): ((5, 0.2), (0.5, 1)),
}


def published_weights(data: str, network: str, modules: int) -> Weights:
    """The weights published for a data set, a network and K; where there are none, those of the nearest case.

    Another data set counts as ``"cifar10"``, another network (as on the other data sets ResNet-32) as ``"resnet110"``,
    and K, if it is not 2, as the largest of 4, 8 and 16 that is not above it, or else as 4.
    """
    data = data if data in ("cifar10", "stl10", "svhn") else "cifar10"
    network = network if (data, network, 2) in PUBLISHED_WEIGHTS else "resnet110"
    near = 2 if modules <= 2 else max(k for k in (4, 8, 16) if k <= max(4, modules))
    return PUBLISHED_WEIGHTS[data, network, near]


def supervised_contrast(rows: Tensor, same: Tensor, temperature: float) -> Tensor:
    """The supervised contrastive loss (Khosla et al., "Supervised Contrastive Learning", 2020).

    Args:
        rows: one projection per example (N, D), of length one.
        same: (N, N), whether two examples are of one class.
        temperature: divides the products of the projections.

    Returns:
        The mean over the examples, a 0-dim tensor; an example that is alone in its class counts as zero.
    """
    itself = torch.eye(rows.shape[0], dtype=torch.bool, device=rows.device)
    logits = (rows @ rows.T / temperature).masked_fill(itself, -torch.inf)
    log_probability = logits.log_softmax(1).masked_fill(itself, 0)
    positive = (same & ~itself).to(rows.dtype)
    count = positive.sum(1).clamp_min(1)
    return -((positive * log_probability).sum(1) / count).mean()


class UpsampledConv(nn.Module):
    """Bilinear interpolation to a size, then a 3×3 convolution, as one linear map of the small map.

    Interpolating (corners aligned) mixes positions and the convolution's taps mix channels, so the taps may come first:
    then every tap has few channels, and no map of many channels at full size is made. Rows and columns are
    interpolated and shifted by small matrices.

    Args:
        channels: of the small map.
        out_channels: of the result.
        small: height and width of the small map.
        size: height and width of the result.
    """

    def __init__(self, channels: int, out_channels: int, small: tuple[int, int], size: tuple[int, int]) -> None:
        super().__init__()
        whole = nn.Conv2d(channels, out_channels, 3, padding=1)
        self.weight, self.bias = whole.weight, whole.bias
        self.small, self.size = small, size
        taps = 3 * out_channels * small[0]
        # The taps first take less time, and less memory if the map has many channels; not much more is accepted.
        self.taps_first = small != size and taps * (3 * small[1] + size[1]) < 2 * channels * size[0] * size[1]
        self.rows: Tensor | None
        self.columns: Tensor | None
        rows, columns = (_shifted(*sides) for sides in zip(small, size, strict=True))
        device = self.weight.device
        self.register_buffer("rows", rows.T.contiguous().to(device) if self.taps_first else None, False)
        self.register_buffer("columns", columns.to(device) if self.taps_first else None, False)

    def forward(self, maps: Tensor) -> Tensor:
        """(N, channels, *small) to (N, out_channels, *size)."""
        if not self.taps_first:
            if self.small != self.size:
                maps = F.interpolate(maps, size=self.size, mode="bilinear", align_corners=True)
            return F.conv2d(maps, self.weight, self.bias, padding=1)
        count, (height, width), (out_height, out_width) = maps.shape[0], self.small, self.size
        out_channels = self.weight.shape[0]
        assert self.rows is not None and self.columns is not None
        # Channels of the taps in the order (out channel, row tap, column tap).
        taps = F.conv2d(maps, self.weight.permute(0, 2, 3, 1).reshape(-1, maps.shape[1], 1, 1))
        taps = taps.reshape(count, out_channels * 3, 3, height, width).transpose(2, 3)
        wide = taps.reshape(-1, 3 * width) @ self.columns.to(taps.dtype)
        wide = wide.view(count * out_channels, 3 * height, out_width)
        tall = self.rows.to(wide.dtype).expand(count * out_channels, -1, -1).bmm(wide)
        result = tall.view(count, out_channels, out_height, out_width)
        return result + self.bias.view(-1, 1, 1).to(result.dtype)  # type: ignore[union-attr]


def _shifted(small: int, size: int) -> Tensor:
    """For every tap the matrix that interpolates ``small`` to ``size`` positions and shifts: (3 · small, size).

    On the CPU, since MPS has no float64.
    """
    wide: dict[str, Any] = {"dtype": torch.float64, "device": "cpu"}
    positions = torch.linspace(0, small - 1, size, **wide) if size > 1 else torch.zeros(1, **wide)
    matrix = (1 - (positions - torch.arange(small, **wide)[:, None]).abs()).clamp_min(0)
    padded = F.pad(matrix, (1, 1))
    return torch.cat([padded[:, tap : tap + size] for tap in range(3)]).float()


class _Grid(nn.Module):
    """Features as a channels-first map (N, C, H, W); tokens are laid out in the shape of the image.

    A class token in front is left out.
    """

    def __init__(self, site: Site) -> None:
        super().__init__()
        self.channel_dim, self.skipped = site.channel_dim, 0
        image = tuple(site.input_shape[2:])
        if len(site.input_shape) != 4:
            raise ValueError(
                f"rule: InfoPro reconstructs images (N, C, H, W), and the input has shape {tuple(site.input_shape)}; "
                "use another rule"
            )
        self.spatial: tuple[int, int]
        if len(site.spatial) == 2:
            self.spatial = site.spatial[0], site.spatial[1]
            return
        found = _token_grid(site.spatial[0], image) if len(site.spatial) == 1 else None
        if found is None:
            raise ValueError(
                f"rule: InfoPro reconstructs the image from a map, and features of shape {tuple(site.feature_shape)} "
                f"cannot be laid out as one of the shape of {image[0]}×{image[1]} pixels; use another rule"
            )
        self.skipped, self.spatial = found

    def forward(self, features: Tensor) -> Tensor:
        if features.ndim == 3:
            tokens = features if self.channel_dim == -1 else features.mT
            return tokens[:, self.skipped :].mT.unflatten(2, self.spatial)
        return features if self.channel_dim == 1 else features.movedim(-1, 1)


def _token_grid(num_tokens: int, image: Sequence[int]) -> tuple[int, tuple[int, int]] | None:
    """How many tokens to skip, and height and width of the grid of the others; None if they make no grid."""
    for skipped in (0, 1):
        left = num_tokens - skipped
        for height in range(1, left + 1):
            if left % height == 0 and height * image[1] == left // height * image[0]:
                return skipped, (height, left // height)
    return None


class _InfoProNetwork(nn.Module):
    """Decoder, and the task's branch: class scores or a projection (and then a probe)."""

    def __init__(
        self,
        site: Site,
        task: nn.Module | None,
        probe: nn.Module | None,
        *,
        decodes: bool,
        width: int,
        scale: tuple[Sequence[float], Sequence[float]] | None,
    ) -> None:
        super().__init__()
        self.task, self.probe = task, probe
        self.mean: Tensor | None
        self.std: Tensor | None
        for name, values in zip(("mean", "std"), scale or (None, None), strict=True):
            buffer = None if values is None else torch.tensor(values, dtype=torch.get_default_dtype()).view(-1, 1, 1)
            self.register_buffer(name, buffer, persistent=False)
        self.decoder: nn.Module | None = None
        if decodes:
            grid, image = _Grid(site), tuple(site.input_shape[2:])
            self.decoder = nn.Sequential(
                grid,
                UpsampledConv(site.channels, width, grid.spatial, (image[0], image[1])),
                nn.BatchNorm2d(width),
                nn.ReLU(inplace=True),
                nn.Conv2d(width, site.input_shape[1], 3, padding=1),
            )

    def image(self, x: Tensor) -> Tensor:
        """The input with its values in 0..1."""
        if self.mean is not None and self.std is not None:
            return torch.addcmul(self.mean, x, self.std)
        plain = x.contiguous()  # reducing over strided channels takes many times longer
        low, high = plain.amin((0, 2, 3), keepdim=True), plain.amax((0, 2, 3), keepdim=True)
        return (x - low) / (high - low).clamp_min(torch.finfo(x.dtype).tiny)

    def forward(self, features: Tensor) -> tuple[Tensor | None, Tensor | None, Tensor | None]:
        """The decoded image as logits, what the task's branch makes of the features, and the probe's scores."""
        return (
            None if self.decoder is None else self.decoder(features),
            None if self.task is None else self.task(features),
            None if self.probe is None else self.probe(features.detach()),
        )


class InfoProRule(Rule):
    """Reconstruction of the input plus a term for the task, weighted by depth.

    A small decoder (bilinear interpolation, two 3×3 convolutions with norm and ReLU between, sigmoid) is scored by the
    binary cross-entropy against the image, whose values are brought to 0..1. The task's term is the criterion of the
    task, or the supervised contrastive loss of 128-dimensional projections. Both weights go linearly from the first
    module to the last that has an auxiliary network.

    Where nothing that is trained predicts (the contrastive loss, or a task weight of zero), a probe that learns on
    detached features tells the accuracy by depth. A term of weight zero is not computed.

    Args:
        task: ``"softmax"`` or ``"contrast"``.
        weights: ((reconstruction, task) at the first module, the same at the last but one); None: as published for
            ``published`` and the number of modules.
        published: data set and network whose published weights are taken, see :func:`published_weights`; the commands
            give those of the run.
        temperature: of the contrastive loss.
        projection: size of the projections of the contrastive loss.
        decoder_width: channels inside the decoder.
        mean: per channel, what was subtracted from images in 0..1 to normalise them; None: the range of the input, per
            channel and batch, is taken as black to white.
        std: per channel, what they were divided by; goes with ``mean``.
        auxiliary: the network of the task's branch, see :class:`GreedyRule`; "conv" is the published one.
        width: channels that it reduces wider features to, see there.

    Raises:
        ValueError: an option is out of range.
    """

    reads_input = True

    def __init__(
        self,
        task: str = "softmax",
        *,
        weights: Sequence[Sequence[float]] | None = None,
        published: Sequence[str] = ("cifar10", "resnet110"),
        temperature: float = 0.07,
        projection: int = 128,
        decoder_width: int = 12,
        mean: Sequence[float] | None = None,
        std: Sequence[float] | None = None,
        auxiliary: str = "conv",
        width: int | None = WIDTH,
    ) -> None:
        if task not in ("softmax", "contrast"):
            raise ValueError(f"task: must be 'softmax' or 'contrast', not {task!r}")
        if weights is not None and not _are_weights(weights):
            raise ValueError(
                "weights: must be two pairs of numbers of at least 0, [[reconstruction, task] at the first module, the "
                f"same at the last but one], not {weights!r}"
            )
        if (
            not isinstance(published, (list, tuple))
            or len(published) != 2
            or not all(isinstance(name, str) for name in published)
        ):
            raise ValueError(f"published: must be a data set and a network, not {published!r}")
        if not _is_number(temperature) or temperature <= 0:
            raise ValueError(f"temperature: must be a number above 0, not {temperature!r}")
        check_whole("projection", projection)
        check_whole("decoder_width", decoder_width)
        if (mean is None) != (std is None) or not all(_are_numbers(v) for v in (mean, std) if v is not None):
            raise ValueError(f"mean, std: give both as one number per channel, or neither, not {mean!r} and {std!r}")
        self.compares_examples = task == "contrast"  # type: ignore[misc]
        self._task, self._temperature, self._projection = task, float(temperature), projection
        self._weights, self._width, self._mean, self._std = weights, decoder_width, mean, std
        self._published = published[0], published[1]
        self._auxiliary, self._network = auxiliary, GreedyRule(auxiliary, width=width)
        self._bound = "" if width == WIDTH else f", width={width}"

    def __repr__(self) -> str:
        weights = f"published for {', '.join(self._published)}" if self._weights is None else repr(self._weights)
        more = "" if self._mean is None else f", mean={self._mean}, std={self._std}"
        if self._task == "contrast":
            more += f", temperature={self._temperature:g}, projection={self._projection}"
        return (
            f"InfoProRule(task={self._task!r}, weights={weights}, decoder_width={self._width}, "
            f"auxiliary={self._auxiliary!r}{self._bound}{more})"
        )

    def weights(self, site: Site) -> tuple[float, float]:
        """Weights of reconstruction and task at ``site``."""
        first, last = self._weights or published_weights(*self._published, site.num_modules)
        return (
            first[0] * (1 - site.depth) + last[0] * site.depth,
            first[1] * (1 - site.depth) + last[1] * site.depth,
        )

    def auxiliary(self, site: Site) -> nn.Module:
        reconstruction, task = self.weights(site)
        decodes = reconstruction > 0
        if decodes and self._mean is not None and len(self._mean) != site.input_shape[1]:
            raise ValueError(f"mean, std: {len(self._mean)} channels are given, the input has {site.input_shape[1]}")
        if self._task == "softmax":
            network = self._network.auxiliary(site)
            branches: Any = (network, None) if task > 0 else (None, network)
        else:
            outputs = torch.Size((*site.output_shape[:1], self._projection))
            wide = replace(site, output_shape=outputs)
            branches = (self._network.auxiliary(wide) if task > 0 else None, linear(site))
        scale = None if self._mean is None or self._std is None else (self._mean, self._std)
        return _InfoProNetwork(site, *branches, decodes=decodes, width=self._width, scale=scale)

    def rehearse(self, site: Site, auxiliary: nn.Module, features: Tensor) -> Any:
        return auxiliary(features)

    def loss(self, site: Site, auxiliary: nn.Module, features: Tensor, batch: Batch) -> Tensor:
        if not isinstance(batch.input, Tensor):
            raise ValueError(
                f"rule: InfoPro reconstructs the network's input, which has to be a single tensor of images, not a "
                f"{type(batch.input).__name__}; choose another rule, or wrap the network in a module that takes one"
            )
        decoded, task, probed = auxiliary(features)
        weights = self.weights(site)
        terms: list[Tensor] = []
        if decoded is not None:
            wide = torch.promote_types(decoded.dtype, torch.float32)
            error = F.binary_cross_entropy_with_logits(decoded.to(wide), auxiliary.image(batch.input).to(wide))  # type: ignore[operator]
            terms.append(weights[0] * error)
        if task is not None:
            terms.append(weights[1] * self._task_loss(site, task, batch))
        if probed is not None:
            terms.append(silent(batch.criterion(probed, batch.target)))
        return torch.stack([term.float() for term in terms]).sum()

    def predict(self, site: Site, auxiliary: nn.Module, features: Tensor) -> Tensor:
        scores: Tensor = (auxiliary.probe or auxiliary.task)(features)  # type: ignore[operator]
        return scores

    def _task_loss(self, site: Site, output: Tensor, batch: Batch) -> Tensor:
        if self._task == "softmax":
            return batch.criterion(output, batch.target)
        with torch.autocast(output.device.type, enabled=False):
            classes = one_hot(batch.target, site).argmax(1)
            output = output.float() if output.dtype in (torch.bfloat16, torch.float16) else output
            same = classes.unsqueeze(0) == classes.unsqueeze(1)
            return supervised_contrast(normalised(output), same, self._temperature)


def _is_number(value: object) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool)


def _are_numbers(values: object) -> bool:
    return isinstance(values, Sequence) and len(values) > 0 and all(_is_number(value) for value in values)


def _are_weights(weights: object) -> bool:
    return (
        isinstance(weights, Sequence)
        and len(weights) == 2
        and all(_are_numbers(pair) and len(pair) == 2 and all(w >= 0 for w in pair) for pair in weights)
    )
