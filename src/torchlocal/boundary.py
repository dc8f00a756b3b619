"""What crosses from one stage to the next in fewer bytes: bf16, or 8 or 4 bits per number, rounded at random.

int8 and int4 cut a tensor into blocks of 64 numbers that lie side by side (of images, in the rows of one channel of one
example; of tokens, in the channels of one token), each with a step s (bf16) and a whole number z (one byte) that
stands for zero: x becomes q = floor(x / s + z + u), from 0 to 2^bits - 1, and comes out as (q - z) · s. The range of a
block holds all its numbers, zero among them, so nothing is clipped and zero stays zero; with u uniform in [0, 1) the
expected value of what comes out is x (stochastic rounding: Gupta et al., "Deep Learning with Limited Numerical
Precision", 2015; with a zero point as Jacob et al., "Quantization and Training of Neural Networks for Efficient
Integer-Arithmetic-Only Inference", 2018). A block with a number that is not finite comes out as such.

[Note: where the random numbers come from] u is a hash of a number's place and of the sum of all bits of the tensor
(Steele et al., "Fast splittable pseudorandom number generators", 2014). So every tensor is rounded in its own way, and
the same tensor always in the same way: by any process, when it is computed again, in a run that was resumed. There is
no generator whose state would have to be kept, and torch's own are left alone.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from .names import BOUNDARIES

__all__ = ["Original", "check_boundary", "decode", "encode", "encoded_bytes", "rounded"]

_BLOCK = 64  # numbers with a step of their own
_BITS = {"int8": 8, "int4": 4}
_ALIGNED = 4  # bytes; schedules of micro-batches send them as float32
_SMALLEST = 2.0**-126  # a float32, and a bf16, of which the inverse is finite
_UP = 1 + 2.0**-7  # so that rounding to bf16 makes no step smaller
_GOLDEN, _MIX1, _MIX2 = -7046029254386353131, -4658895280553007687, -7723592293110705685  # of 64 bits


@dataclass(frozen=True)
class Original:
    """What a tensor was before it was encoded, but for its numbers."""

    shape: tuple[int, ...]
    stride: tuple[int, ...]
    dtype: torch.dtype

    @classmethod
    def of(cls, tensor: Tensor) -> Original:
        """That of a tensor; one with gaps, or that repeats its numbers, comes out dense."""
        dense = torch.empty_like(tensor, device="meta")
        return cls(tuple(tensor.shape), dense.stride(), tensor.dtype)

    def laid_out(self, numbers: Tensor) -> Tensor:
        """Numbers in logical order, in one dimension, as the tensor."""
        found = numbers.view(self.shape)
        if found.stride() == self.stride and found.dtype == self.dtype:
            return found
        return torch.empty_strided(self.shape, self.stride, dtype=self.dtype, device=numbers.device).copy_(found)


def check_boundary(name: str, value: Any) -> None:
    """Refuse what is no way to send a boundary."""
    if value is not None and value not in BOUNDARIES:
        raise ValueError(f"{name}: must be None or one of {', '.join(BOUNDARIES)}, not {value!r}")


def encoded_bytes(count: int, boundary: str | None, dtype: torch.dtype = torch.float32) -> int:
    """Bytes that so many numbers of a dtype take: 67/64 of a byte each in int8, 35/64 in int4."""
    if boundary is None or not dtype.is_floating_point:
        return count * dtype.itemsize
    if boundary == "bf16":
        return count * min(dtype.itemsize, 2)
    blocks = -(-count // _BLOCK)
    size = blocks * (_BLOCK * _BITS[boundary] // 8 + 3)
    return size + -size % _ALIGNED


def encode(tensor: Tensor, boundary: str | None) -> Tensor:
    """What is sent of a tensor.

    Args:
        tensor: of any shape; what holds no floating-point numbers is sent as it is.
        boundary: ``"bf16"``, ``"int8"``, ``"int4"``, or None: as it is.

    Returns:
        The tensor in bf16 (or as it is, where it has no more bytes), or one dimension of bytes.
    """
    if boundary is None or not tensor.is_floating_point():
        return tensor
    if boundary == "bf16":
        return tensor if tensor.dtype.itemsize <= 2 else tensor.to(torch.bfloat16)
    bits = _BITS[boundary]
    blocks = _in_blocks(tensor.detach())
    steps, zeros = _ranges(blocks, 2**bits - 1)
    numbers = torch.addcmul(zeros + 0.5, blocks, steps.float().reciprocal_())
    numbers.add_(_noise(blocks), alpha=2.0**-16).clamp_(0, 2**bits - 1)
    levels = numbers.to(torch.uint8)  # towards zero
    if bits == 4:
        levels = levels[:, : _BLOCK // 2] | levels[:, _BLOCK // 2 :].bitwise_left_shift(4)
    parts = [levels.view(-1), steps.view(-1).view(torch.uint8), zeros.to(torch.uint8).view(-1)]
    missing = -sum(part.numel() for part in parts) % _ALIGNED
    return torch.cat([*parts, levels.new_zeros(missing)])


def decode(block: Tensor, original: Original, boundary: str | None) -> Tensor:
    """The tensor that was encoded, rounded.

    Args:
        block: what :func:`encode` returned.
        original: what the tensor was.
        boundary: as there.
    """
    if block.dtype != torch.uint8 or original.dtype == torch.uint8:
        return block if block.dtype == original.dtype else block.to(original.dtype)
    assert boundary is not None
    bits, count = _BITS[boundary], 1
    for size in original.shape:
        count *= size
    rows = -(-count // _BLOCK)
    levels, steps, zeros = block[: rows * (_BLOCK * bits // 8 + 3)].split([rows * _BLOCK * bits // 8, rows * 2, rows])
    numbers = torch.empty(rows, _BLOCK, device=block.device)
    if bits == 8:
        numbers.copy_(levels.view(rows, _BLOCK))
    else:
        pairs = levels.view(rows, _BLOCK // 2)
        numbers[:, : _BLOCK // 2] = pairs.bitwise_and(15)
        numbers[:, _BLOCK // 2 :] = pairs.bitwise_right_shift(4)
    numbers.sub_(zeros.view(rows, 1)).mul_(steps.view(torch.bfloat16).view(rows, 1).float())
    return original.laid_out(numbers.view(-1)[:count])


def rounded(tensor: Tensor, boundary: str | None) -> Tensor:
    """A tensor as it arrives on another stage; with a graph, so does its gradient on the way back."""
    if boundary is None or not tensor.is_floating_point():
        return tensor
    if torch.is_grad_enabled() and tensor.requires_grad:
        found: Tensor = _Rounded.apply(tensor, boundary)
        return found
    return decode(encode(tensor.detach(), boundary), Original.of(tensor), boundary)


class _Rounded(torch.autograd.Function):
    """Rounds features forward, and their gradient backward."""

    @staticmethod
    def forward(ctx: Any, tensor: Tensor, boundary: str) -> Tensor:
        ctx.boundary = boundary
        return _apart(tensor, boundary)

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, None]:
        return _apart(gradient, ctx.boundary), None


def _apart(tensor: Tensor, boundary: str) -> Tensor:
    """A tensor as it arrives, never the very one."""
    found = decode(encode(tensor, boundary), Original.of(tensor), boundary)
    return found.clone() if found is tensor else found


def _in_blocks(tensor: Tensor) -> Tensor:
    """The numbers in float32, in logical order, by block; zeros fill the last one."""
    flat = tensor.contiguous().view(-1).float()
    missing = -flat.numel() % _BLOCK
    return (torch.nn.functional.pad(flat, (0, missing)) if missing else flat).view(-1, _BLOCK)


def _ranges(blocks: Tensor, most: int) -> tuple[Tensor, Tensor]:
    """For every block its step in bf16, and the whole number, as a float32, that stands for zero.

    z levels lie below zero and ``most`` - z above, at least one where there are numbers; the step is the smallest by
    which they reach the least and the largest number.
    """
    below, above = blocks.amin(1, keepdim=True).clamp_(max=0).neg_(), blocks.amax(1, keepdim=True).clamp_(min=0)
    zeros = torch.round(most * (below / (below + above)))
    zeros = torch.where(below > 0, zeros.clamp(min=1), 0.0)
    zeros = torch.where(above > 0, zeros.clamp(max=most - 1), zeros)
    steps = torch.maximum(below / zeros.clamp(min=1), above / (most - zeros).clamp(min=1))
    return (steps * _UP).clamp(min=_SMALLEST).to(torch.bfloat16), torch.nan_to_num(zeros, nan=0.0)


def _noise(blocks: Tensor) -> Tensor:
    """Whole numbers of 16 bits, uniform; see the note above."""
    found = torch.arange(1, blocks.numel() // 4 + 1, device=blocks.device).mul_(_GOLDEN)
    found.add_(blocks.view(torch.int64).sum())
    for shift, factor in ((30, _MIX1), (27, _MIX2), (31, 1)):
        # torch repeats the sign in what it shifts to the right, and xor would then lose it.
        found.bitwise_xor_(found.bitwise_right_shift(shift).bitwise_and_(2 ** (64 - shift) - 1))
        found = found.mul_(factor) if factor != 1 else found
    return found.view(torch.int16).view(blocks.shape)
