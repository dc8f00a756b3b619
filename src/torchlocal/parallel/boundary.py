"""What features and their gradients are sent in from one stage to the next: as they are, or in fewer bits.

[Note: rounding] In 8 and 4 bits numbers are rounded at random, so that their mean is what they were (Alistarh et al.,
"QSGD", 2017). Where the noise came from a generator, its state would have to be kept in checkpoints, and be the same
wherever a step is taken again. It is a function of what is rounded instead: fixed numbers between 0 and 1, one for each
place, all shifted by a checksum of the tensor. So the same tensor is always rounded alike, on any rank and after any
checkpoint, and the next one otherwise.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from .channels import Layout

__all__ = ["KINDS", "Boundary", "Coded"]

KINDS = ("bf16", "int8", "int4")
_BLOCK = 128  # numbers that have their range in common, next to each other in memory
_BITS = {"int8": 8, "int4": 4}
_RANGES = 8  # bytes for each block: its lowest number, and the step between two levels, in float32
_MIX = 0x9E3779B97F4A7C15 - 2**64  # the golden ratio of 2⁶⁴: the highest bits of a multiple depend on all of a checksum
_SHIFTS = 2**16


@dataclass(frozen=True)
class Coded:
    """What is needed beside the bits to have a tensor back."""

    layout: Layout


class Boundary:
    """A way to send floating-point tensors; others, and what beside features travels, are sent as they are.

    ``"bf16"`` takes 2 bytes a number; ``"int8"`` 1.06 and ``"int4"`` .56: blocks of 128 numbers, next to each other in
    memory, have a range in common, whose ends are exact, and which 256 or 16 levels divide evenly.

    Args:
        kind: one of ``KINDS``, or None: as they are.

    Raises:
        ValueError: it is none of these.
    """

    def __init__(self, kind: str | None) -> None:
        if kind is not None and kind not in KINDS:
            raise ValueError(f"boundary: must be one of {', '.join(KINDS)}, or None, not {kind!r}")
        self.kind = kind
        self._noise = torch.empty(0)

    def encode(self, tensor: Tensor, layout: Layout | None = None) -> tuple[Tensor, Any]:
        """What is sent in place of a tensor, and what ``decode`` needs to know of it.

        Args:
            tensor: any.
            layout: write it in the order of this one; by default in that of its own memory.
        """
        if self.kind is None or not tensor.is_floating_point():
            return tensor, None
        if self.kind == "bf16":
            return tensor.to(torch.bfloat16), tensor.dtype
        layout = layout or Layout.of(tensor)
        return self._quantised(layout.pack(tensor.detach()).reshape(-1)), Coded(layout)

    def decode(self, block: Tensor, coded: Any) -> Tensor:
        """The tensor, rounded."""
        if coded is None:
            return block
        if isinstance(coded, torch.dtype):
            return block if block.dtype == coded else block.to(coded)
        layout: Layout = coded.layout
        numbers = layout.allocate(block.device)
        numbers.copy_(self._numbers(block, numbers.numel()).view(numbers.shape))
        return layout.unpack(numbers)

    def num_bytes(self, count: int, width: int) -> int:
        """Bytes that so many numbers take.

        Args:
            count: how many.
            width: bytes of one as it is.
        """
        if self.kind in _BITS:
            return -(-count // _BLOCK) * (_RANGES + _BLOCK * _BITS[self.kind] // 8)
        return count * (width if self.kind is None else 2)

    def _quantised(self, numbers: Tensor) -> Tensor:
        """Codes, then ranges, as bytes."""
        assert self.kind is not None
        count, levels = numbers.numel(), 2 ** _BITS[self.kind] - 1
        if not count:
            return numbers.new_empty(0, dtype=torch.uint8)
        rows = numbers.new_empty(-(-count // _BLOCK), _BLOCK, dtype=torch.float32)
        flat = rows.view(-1)
        flat[:count] = numbers
        flat[count:] = flat[count - 1]  # so that what fills the last block widens no range
        shift = ((rows.view(torch.int32).sum() * _MIX >> 48) % _SHIFTS).to(torch.float32) / _SHIFTS
        low, high = rows.aminmax(dim=1, keepdim=True)
        step = (high - low) / levels
        rows.sub_(low).div_(step.clamp_min(torch.finfo(torch.float32).tiny))
        rows += (self._fixed(rows.shape[0], rows.device) + shift).frac_()
        codes = rows.clamp_(0, levels).to(torch.uint8)
        if self.kind == "int4":
            codes = codes[:, : _BLOCK // 2] | codes[:, _BLOCK // 2 :] << 4
        return torch.cat([t.reshape(-1).view(torch.uint8) for t in (codes, low, step)])

    def _numbers(self, block: Tensor, count: int) -> Tensor:
        if not count:
            return block.new_empty(0, dtype=torch.float32)
        blocks = -(-count // _BLOCK)
        codes, ranges = block.split([block.numel() - blocks * _RANGES, blocks * _RANGES])
        low, step = ranges.view(torch.float32).view(2, blocks, 1)
        codes = codes.view(blocks, -1)
        if self.kind == "int4":
            codes = torch.cat([codes & 15, codes >> 4], dim=1)
        return torch.addcmul(low, codes.to(torch.float32), step).view(-1)[:count]

    def _fixed(self, rows: int, device: torch.device) -> Tensor:
        """The noise of each place."""
        if self._noise.shape[0] < rows or self._noise.device != device:
            generator = torch.Generator().manual_seed(0)
            self._noise = torch.rand(rows, _BLOCK, generator=generator).to(device)
        return self._noise[:rows]
