"""Images in memory: how a batch of them is gathered and augmented, on the host or on the device that trains on it."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Protocol

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

__all__ = ["Augmentation", "ImageSource", "MemorySource", "send"]

# Bytes of a split, with its border, that a device holds; above, batches are gathered on the host and sent.
_MOST_HELD = 512 * 2**20


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

    def pad(self, images: Tensor) -> Tensor:
        """Images `(B, C, H, W)` on the host with the border from which crops are taken."""
        if not self.padding:
            return images
        if self.mode == "reflect":
            border = ((0, 0), (0, 0), (self.padding, self.padding), (self.padding, self.padding))
            return torch.from_numpy(np.pad(images.numpy(), border, mode="reflect"))
        return F.pad(images, (self.padding,) * 4)

    def __call__(self, images: Tensor, generator: torch.Generator) -> Tensor:
        """Augments `(B, C, H, W)` uint8 images on the host."""
        batch, _, height, width = images.shape
        offsets, flipped = (drawn.numpy() for drawn in self.draw(batch, generator))
        pixels = images.numpy()
        if self.padding:
            padded = self.pad(images).numpy()
            # All crops of all images as one view; numpy copies the chosen ones several times faster than torch.
            windows = np.lib.stride_tricks.sliding_window_view(padded, (height, width), axis=(2, 3))
            pixels = windows[np.arange(batch), :, offsets[0], offsets[1]]
        if self.flip:
            mirrored = pixels[flipped][..., ::-1]
            if not self.padding:  # `pixels` is still the caller's own tensor
                pixels = pixels.copy()
            pixels[flipped] = mirrored
        return torch.from_numpy(pixels)

    def places(self, batch: int, width: int, generator: torch.Generator) -> Tensor:
        """The same draws as places in the padded images.

        Returns:
            `(3, B)`: the row and the column of the first pixel of each, and the step to the next column, 1 or -1.
        """
        offsets, flipped = self.draw(batch, generator)
        mirrored = flipped.long() if self.flip else torch.zeros_like(offsets[0])
        return torch.stack([offsets[0], offsets[1] + mirrored * (width - 1), 1 - 2 * mirrored])


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
        self._held: Tensor | None = None  # with a border

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
        self._hold(device)
        held, (channels, height, width) = self._held, self.shape
        if augmentation is None or generator is None:
            if held is None:
                return send(self.images.index_select(0, indices), device)
            border = self._padding
            inside = held[:, :, border : border + height, border : border + width]
            return inside.index_select(0, send(indices, device))
        places = augmentation.places(len(indices), width, generator)
        if held is None:
            held = send(augmentation.pad(self.images.index_select(0, indices)), device)
            indices = torch.arange(len(indices))
        # Each pixel is looked up where it comes from; all numbers that say so come in one transfer.
        which, top, left, step = send(torch.cat([indices[None], places]), device)[:, :, None, None, None].unbind()
        rows = top + torch.arange(height, device=device)[:, None]
        columns = left + step * torch.arange(width, device=device)
        return held[which, torch.arange(channels, device=device)[:, None, None], rows, columns]

    @property
    def _padding(self) -> int:
        return 0 if self.augmentation is None else self.augmentation.padding

    def _hold(self, device: torch.device) -> None:
        """Have all images on the device, from the first batch on, if they are small enough."""
        count, channels, height, width = self.images.shape
        size = count * channels * (height + 2 * self._padding) * (width + 2 * self._padding)
        if self._held is None and size <= _MOST_HELD:
            images = self.images if self.augmentation is None else self.augmentation.pad(self.images)
            self._held = images.to(device)
