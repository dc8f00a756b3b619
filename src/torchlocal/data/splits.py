"""Splits: uint8 images in, batches out, each a pure function of (seed, epoch, batch index)."""

from __future__ import annotations

import copy
import os
import signal
from collections.abc import Iterable, Iterator
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import DataLoader, Dataset

from torchlocal.data.folders import read_image
from torchlocal.data.images import ImageSource, send

__all__ = ["FolderSource", "Split", "make_generator"]

# What a random stream is for: the first word of its key, so that no two purposes ever share a stream.
(
    SHUFFLE_STREAM, _AUGMENT, _PARTNERS, _FIXED_PARTNERS, VALIDATION_STREAM, FOLDER_STREAM, DIGITS_STREAM,
    LOADER_STREAM, DOCUMENT_STREAM,
) = range(1, 10)  # fmt: skip


def make_generator(purpose: int, *, seed: int = 0, epoch: int = 0, index: int = 0) -> torch.Generator:
    """Makes a generator of its own for one purpose, so that the global random state is neither read nor advanced.

    `numpy.random.SeedSequence` mixes the key: neighbouring seeds, epochs and batches get unrelated streams.
    """
    # A key of fixed length: SeedSequence pads short keys with zeros and splits large numbers into 32-bit words.
    key = (purpose, seed & 0xFFFFFFFF, seed >> 32, epoch, index)
    generator = torch.Generator()
    # torch's CPU generator uses the low 32 bits of a seed, and one word of the sequence is just that.
    generator.manual_seed(int(np.random.SeedSequence(key).generate_state(1)[0]))
    return generator


class FolderSource:
    """Image files that are decoded when a batch needs them.

    Training images are cropped at random (8 to 100 % of the area, aspect ratio 3/4 to 4/3) and mirrored with
    probability one half (Szegedy et al. 2015, as in torchvision's ImageNet reference); all others are scaled so that
    the centre crop covers 224/256 of the shorter side.

    Args:
        paths: the image files.
        image_size: height and width of the images handed out.
        augment: crop and mirror when a generator is given to `fetch`.
    """

    in_memory = False

    def __init__(self, paths: list[str], image_size: tuple[int, int], augment: bool) -> None:
        self.paths = paths
        self.image_size = image_size
        self.augment = augment
        self.shape = (3, *image_size)

    def fetch(self, indices: Tensor, generator: torch.Generator | None) -> Tensor:
        """Returns the images at `indices`, decoded, cropped and scaled."""
        generator = generator if self.augment else None
        return torch.stack([self._read(self.paths[index], generator) for index in indices.tolist()])

    def to(self, device: torch.device) -> FolderSource:
        """Itself: images are decoded on the host, by other processes."""
        return self

    def _read(self, path: str, generator: torch.Generator | None) -> Tensor:
        from PIL.Image import Resampling

        height, width = self.image_size
        image = read_image(path)
        if generator is None:
            box = _centre_box(image.width, image.height, width, height)
        else:
            box = _random_box(image.width, image.height, generator)
        pixels = np.array(image.resize((width, height), Resampling.BILINEAR, box=box))
        if generator is not None and torch.rand((), generator=generator) < 0.5:
            pixels = pixels[:, ::-1].copy()
        return torch.from_numpy(pixels).permute(2, 0, 1)


def _centre_box(width: int, height: int, target_width: int, target_height: int) -> tuple[float, float, float, float]:
    """Returns the centred part of an image that becomes the evaluation crop: (left, top, right, bottom)."""
    scale = 224 / 256 * min(width / target_width, height / target_height)
    box_width, box_height = scale * target_width, scale * target_height
    left, top = (width - box_width) / 2, (height - box_height) / 2
    return left, top, left + box_width, top + box_height


def _random_box(width: int, height: int, generator: torch.Generator) -> tuple[float, float, float, float]:
    """Draws the part of an image that becomes the training crop: (left, top, right, bottom)."""
    draws = torch.rand(10, 4, generator=generator).tolist()  # ten tries, as in torchvision
    for area, aspect, x, y in draws:
        target_area = width * height * (0.08 + 0.92 * area)
        ratio = (3 / 4) * ((4 / 3) / (3 / 4)) ** aspect
        box_width, box_height = round((target_area * ratio) ** 0.5), round((target_area / ratio) ** 0.5)
        if 0 < box_width <= width and 0 < box_height <= height:
            left, top = int(x * (width - box_width + 1)), int(y * (height - box_height + 1))
            return left, top, left + box_width, top + box_height
    side = min(width, height)  # a very long image: the centred square
    left, top = (width - side) // 2, (height - side) // 2
    return left, top, left + side, top + side


class Split:
    """One split of a data set, read as batches that can start anywhere and always come out the same.

    Args:
        source: the uint8 images.
        labels: `(N,)`, int64, in `range(num_classes)`.
        num_classes: number of classes.
        mean: per channel, on the scale 0..1, subtracted from the images.
        std: per channel, on the scale 0..1, the images are divided by it.
        pairs: hand out pairs of images side by side, labelled with the sum of their classes modulo `num_classes`.
        num_workers: processes that decode images which are not in memory; None for one per core but at most four.
    """

    def __init__(
        self,
        source: ImageSource,
        labels: Tensor,
        *,
        num_classes: int,
        mean: tuple[float, ...],
        std: tuple[float, ...],
        pairs: bool = False,
        num_workers: int | None = None,
    ) -> None:
        self.num_classes = num_classes
        self.num_workers = min(4, os.cpu_count() or 1) if num_workers is None else num_workers
        self._source = source
        self._labels = labels
        self._device = torch.device("cpu")
        channels, height, width = source.shape
        self.shape = (channels, height, 2 * width if pairs else width)
        # Pairs of a split that is not trained on are fixed, whatever the run's seed.
        self._fixed_partners = _permutation(len(labels), make_generator(_FIXED_PARTNERS)) if pairs else None
        self._scale = 1 / (255 * torch.tensor(std)).view(1, -1, 1, 1)
        self._shift = -(torch.tensor(mean) / torch.tensor(std)).view(1, -1, 1, 1)

    def __len__(self) -> int:
        return len(self._labels)

    def __repr__(self) -> str:
        return f"Split({len(self)} images of shape {self.shape}, {self.num_classes} classes)"

    @property
    def labels(self) -> Tensor:
        """The labels `(N,)` in the order of `batches(train=False)`."""
        if self._fixed_partners is None:
            return self._labels
        return (self._labels + self._labels[self._fixed_partners]) % self.num_classes

    def with_partners(self, index: int) -> Split:
        """The same split, whose pairs (outside training) are the `index`-th drawing of partners; 0 are its own.

        Raises:
            ValueError: it is not a split of pairs, or `index` is below 0.
        """
        if self._fixed_partners is None:
            raise ValueError("this split has no pairs: load the data set as pairs:NAME")
        if not 0 <= index < 2**32:
            raise ValueError(f"index={index} must be at least 0 and below 2**32")
        other = copy.copy(self)
        other._fixed_partners = _permutation(len(self), make_generator(_FIXED_PARTNERS, index=index))
        return other

    def to(self, device: torch.device) -> Split:
        """The same split, whose images come from a device: sent there in 8 bits, normalised there, and if they are in
        memory, gathered and augmented there. Labels stay on the host, where shares in a loss are read from them.
        """
        other = copy.copy(self)
        other._device, other._source = device, self._source.to(device)
        other._scale, other._shift = self._scale.to(device), self._shift.to(device)
        return other

    def num_batches(self, batch_size: int, train: bool) -> int:
        """Returns the number of batches of one pass.

        Raises:
            ValueError: `batch_size` is below 1, or larger than a split to be trained on.
        """
        if batch_size < 1:
            raise ValueError(f"batch_size={batch_size} must be at least 1")
        if not train:
            return -(-len(self) // batch_size)
        if batch_size > len(self):
            raise ValueError(
                f"batch_size={batch_size} is larger than the {len(self)} training images: "
                f"lower batch_size to at most {len(self)} or raise num_train"
            )
        return len(self) // batch_size

    def batches(
        self, batch_size: int, *, epoch: int = 0, train: bool, seed: int = 0, start: int = 0
    ) -> Iterator[tuple[Tensor, Tensor]]:
        """Reads one pass, beginning at batch `start`, exactly as an uninterrupted pass would have gone on.

        Args:
            batch_size: images per batch.
            epoch: the pass; another epoch is another order, other augmentations, other pairs.
            train: shuffle, augment, redraw pairs and drop the last incomplete batch; otherwise everything in order.
            seed: the run's seed, from 0 to 2**64 - 1.
            start: index of the first batch.

        Returns:
            Batches of normalised float32 images `(B, C, H, W)`, on the device that :meth:`to` was given, and of int64
            labels `(B,)`.

        Raises:
            ValueError: a number is out of range, or (while reading) an image file cannot be read.
        """
        count = self.num_batches(batch_size, train)
        if not 0 <= start <= count:
            raise ValueError(f"start={start} is not a batch of this pass: choose 0 to {count}")
        if not 0 <= epoch < 2**32:
            raise ValueError(f"epoch={epoch} must be at least 0 and below 2**32")
        if not 0 <= seed < 2**64:
            raise ValueError(f"seed={seed} must be at least 0 and below 2**64")
        # Checked above and not in a generator function, so that mistakes show at the call.
        return self._read(_Pass(self, batch_size, epoch, train, seed), range(start, count))

    def _read(self, one_pass: _Pass, indices: range) -> Iterator[tuple[Tensor, Tensor]]:
        if self._source.in_memory or self.num_workers == 0:
            items: Iterable[tuple[Tensor, Tensor, str]] = map(one_pass.__getitem__, indices)
        else:
            # A generator of its own, or the loader would draw its base seed from the global one.
            items = DataLoader(
                one_pass,
                batch_size=None,
                sampler=indices,
                num_workers=min(self.num_workers, max(1, len(indices))),
                collate_fn=_unchanged,
                worker_init_fn=_ignore_interrupt,
                generator=torch.Generator(),
            )
        for images, labels, problem in _without_loader_words(items):
            if problem:
                raise ValueError(problem)
            yield send(images, self._device).to(torch.float32).mul_(self._scale).add_(self._shift), labels


class _Pass(Dataset[tuple[Tensor, Tensor, str]]):
    """One pass over a split: the order is drawn once, the batches (uint8) are made when asked for."""

    def __init__(self, split: Split, batch_size: int, epoch: int, train: bool, seed: int) -> None:
        self.source, self.labels, self.num_classes = split._source, split._labels, split.num_classes
        self.batch_size, self.epoch, self.train, self.seed = batch_size, epoch, train, seed
        self.partners = split._fixed_partners
        if train:
            self.order = _permutation(len(split), make_generator(SHUFFLE_STREAM, seed=seed, epoch=epoch))
            if self.partners is not None:
                self.partners = _permutation(len(split), make_generator(_PARTNERS, seed=seed, epoch=epoch))
        else:
            self.order = torch.arange(len(split))

    def __getitem__(self, index: int) -> tuple[Tensor, Tensor, str]:
        # An error crosses from a worker process as text: the loader would bury its sentence in a traceback.
        try:
            return *self._batch(index), ""
        except ValueError as error:
            return torch.empty(0), torch.empty(0), str(error)

    def _batch(self, index: int) -> tuple[Tensor, Tensor]:
        generator = make_generator(_AUGMENT, seed=self.seed, epoch=self.epoch, index=index) if self.train else None
        left = self.order[index * self.batch_size : (index + 1) * self.batch_size]
        images, labels = self.source.fetch(left, generator), self.labels[left]
        if self.partners is not None:
            right = self.partners[left]
            images = torch.cat([images, self.source.fetch(right, generator)], dim=3)
            labels = (labels + self.labels[right]) % self.num_classes
        return images, labels


def _permutation(size: int, generator: torch.Generator) -> Tensor:
    return torch.randperm(size, generator=generator)


def _without_loader_words(items: Iterable[tuple[Tensor, Tensor, str]]) -> Iterator[tuple[Tensor, Tensor, str]]:
    """Tells in one sentence that a worker process was lost."""
    try:
        yield from items
    except RuntimeError as error:
        if "DataLoader worker" not in str(error):
            raise
        raise OSError(
            "a process that decodes images was ended from outside, most likely for want of memory: lower num_workers, "
            "or give num_workers=0"
        ) from error


def _unchanged(item: Any) -> Any:
    return item


def _ignore_interrupt(_worker: int) -> None:
    # Ctrl-C, and a scheduler's SIGTERM, reach every process; only the main one may decide what they mean.
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    signal.signal(signal.SIGTERM, signal.SIG_IGN)
