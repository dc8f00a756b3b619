"""Images in memory: how a batch of them is gathered and augmented, on the host or on the device that trains on it."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Protocol

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

__all__ = ["Augmentation", "ImageSource", "MemorySource", "send"]

_MOST_HELD = 512 * 2**20  # bytes of a split that a device holds; above, batches are gathered on the host and sent


def send(tensor: Tensor, device: torch.device) -> Tensor:
    """Brings a tensor to a device; on CUDA without waiting for it, for which the memory has to be pinned.

    The pinned copy may be let go of at once: torch's allocator keeps it until the device has read it. Elsewhere
    nothing is pinned, and the copy is done on return.
    """
    if device.type != "cuda" or tensor.device.type != "cpu":
        return tensor.to(device)
    return (tensor if tensor.is_pinned() else tensor.pin_memory()).to(device, non_blocking=True)


@dataclass(frozen=True, kw_only=True)
class Augmentation:
    """Random crop of the padded image, then a random horizontal flip, for a whole batch at once.

    [Note: the same images on every device] What is random is drawn on the CPU, from the generator of a batch, wherever
    the images are. A crop, a mirrored image and a gathered one are copies of pixels, and normalisation is one product
    and one sum for each pixel, so a device trains on the very numbers that a CPU would.

    Args:
        padding: pixels added on each side before the crop; 0 means no crop.
        mode: "black" (zeros before normalisation) or "reflect".
        flip: mirror each image with probability one half.
    """

    padding: int = 0
    mode: str = "black"
    flip: bool = False

    def draw(self, batch: int, generator: torch.Generator) -> tuple[Tensor, Tensor]:
        """Draws for so many images; it depends on the generator and on their number alone.

        Returns:
            Where the crop begins in the padded image, `(2, B)`, and which are mirrored, `(B,)` of bool.
        """
        offsets = torch.randint(0, 2 * self.padding + 1, (2, batch), generator=generator)
        return offsets, torch.rand(batch, generator=generator) < 0.5

    def __call__(self, images: Tensor, generator: torch.Generator) -> Tensor:
        """Augments `(B, C, H, W)` uint8 images on the host."""
        batch, _, height, width = images.shape
        offsets, flipped = (drawn.numpy() for drawn in self.draw(batch, generator))
        pixels = images.numpy()
        if self.padding:
            if self.mode == "reflect":
                border = ((0, 0), (0, 0), (self.padding, self.padding), (self.padding, self.padding))
                padded = np.pad(pixels, border, mode="reflect")
            else:
                padded = F.pad(images, (self.padding,) * 4).numpy()
            # All crops of all images as one view; numpy copies the chosen ones several times faster than torch.
            windows = np.lib.stride_tricks.sliding_window_view(padded, (height, width), axis=(2, 3))
            pixels = windows[np.arange(batch), :, offsets[0], offsets[1]]
        if self.flip:
            mirrored = pixels[flipped][..., ::-1]
            if not self.padding:  # `pixels` is still the caller's own tensor
                pixels = pixels.copy()
            pixels[flipped] = mirrored
        return torch.from_numpy(pixels)

    def gather(self, images: Tensor, which: Tensor, offsets: Tensor, flipped: Tensor) -> Tensor:
        """Augments some of `(N, C, H, W)` uint8 images where they are: each pixel is looked up where it comes from.

        Args:
            images: all images.
            which: `(B,)`, their indices.
            offsets: `(2, B)`, as drawn, on the same device.
            flipped: `(B,)`, likewise; of bool, or 0 and 1.
        """
        (rows, above), (columns, beside) = map(self._places, offsets, images.shape[2:])
        if self.flip:
            mirrored = flipped.bool()[:, None]
            columns = torch.where(mirrored, columns.flip(1), columns)
            beside = torch.where(mirrored, beside.flip(1), beside)
        channels = torch.arange(images.shape[1], device=images.device)[:, None, None]
        pixels = images[which[:, None, None, None], channels, rows[:, None, :, None], columns[:, None, None, :]]
        if self.padding and self.mode != "reflect":
            pixels.masked_fill_(above[:, None, :, None] | beside[:, None, None, :], 0)
        return pixels

    def _places(self, offsets: Tensor, size: int) -> tuple[Tensor, Tensor]:
        """For each place of the crops, along one dimension, that in the image, and whether it is on the border."""
        places = offsets[:, None] + torch.arange(size, device=offsets.device) - self.padding
        outside = (places < 0) | (places >= size)
        if self.mode == "reflect":
            period = max(2 * size - 2, 1)
            places = places.remainder(period)
            return torch.minimum(places, period - places), outside
        return places.clamp(0, size - 1), outside


class ImageSource(Protocol):
    """Anything that hands out uint8 images by index."""

    shape: tuple[int, int, int]
    in_memory: bool

    def fetch(self, indices: Tensor, generator: torch.Generator | None) -> Tensor:
        """Returns `(B, C, H, W)` uint8 images, augmented when a generator is given."""
        ...

    def to(self, device: torch.device) -> ImageSource:
        """The source that hands out the same images from this device, if it can."""
        ...


class MemorySource:
    """Images held in memory as one uint8 tensor.

    Args:
        images: `(N, C, H, W)`, uint8.
        augmentation: applied when a generator is given to `fetch`; None for none.
        device: where batches are made: if they are small enough, all images are held there from the first batch on.
            None: on the host, with numpy.
    """

    in_memory = True

    def __init__(
        self, images: Tensor, augmentation: Augmentation | None = None, *, device: torch.device | None = None
    ) -> None:
        assert images.dtype == torch.uint8 and images.dim() == 4, (images.dtype, images.shape)
        self.images = images
        self.augmentation = augmentation
        self.shape = (images.shape[1], images.shape[2], images.shape[3])
        self._device = device
        self._held: Tensor | None = None

    def to(self, device: torch.device) -> MemorySource:
        """The same images, of which batches are made on a device."""
        return MemorySource(self.images, self.augmentation, device=device)

    def fetch(self, indices: Tensor, generator: torch.Generator | None) -> Tensor:
        """Returns the images at `indices`."""
        augmentation = self.augmentation if generator is not None else None
        if self._device is not None:
            return self._fetch_there(self._device, indices, augmentation, generator)
        images = self.images.index_select(0, indices)
        return images if augmentation is None or generator is None else augmentation(images, generator)

    def _fetch_there(
        self,
        device: torch.device,
        indices: Tensor,
        augmentation: Augmentation | None,
        generator: torch.Generator | None,
    ) -> Tensor:
        if self._held is None and self.images.nbytes <= _MOST_HELD:
            self._held = self.images.to(device)
        images = self._held
        if images is None:
            images = send(self.images.index_select(0, indices), device)
            indices = torch.arange(len(indices))
        if augmentation is None or generator is None:
            return images if self._held is None else images.index_select(0, send(indices, device))
        offsets, flipped = augmentation.draw(len(indices), generator)
        drawn = send(torch.cat([indices[None], offsets, flipped[None]]), device)  # in one transfer
        return augmentation.gather(images, drawn[0], drawn[1:3], drawn[3])
