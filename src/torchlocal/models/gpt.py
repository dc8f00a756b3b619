"""A small decoder of today's kind, to read and to train: tokens in, scores of the next token out."""

from __future__ import annotations

import math

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from torchlocal.checks import check_whole

__all__ = ["GPT", "SIZES", "Block"]

# Layers, width, heads. From small on those of Brown et al., "Language Models are Few-Shot Learners", 2020, table 2.1.
SIZES: dict[str, tuple[int, int, int]] = {
    "gpt-nano": (4, 64, 2),
    "gpt-tiny": (8, 96, 3),
    "gpt-mini": (8, 256, 4),
    "gpt-small": (12, 768, 12),
    "gpt-medium": (24, 1024, 16),
    "gpt-large": (24, 1536, 16),
    "gpt-xl": (24, 2048, 16),
}
_BASE = 10_000.0  # of the rotary wavelengths
_SPREAD = 0.02  # of the weights at the start


class GPT(nn.Module):
    """A causal decoder: embedding, blocks, norm, read-out.

    Pre-norm blocks with RMSNorm (Zhang & Sennrich 2019), rotary positions (Su et al. 2021) and SwiGLU (Shazeer 2020),
    without biases and without dropout, as in Llama (Touvron et al. 2023). Weights are drawn from a normal distribution
    of deviation 0.02, those that write into the residual stream divided by the root of twice the number of layers
    (Radford et al. 2019).

    Args:
        vocabulary: number of tokens V.
        context: the most tokens T of a sequence.
        layers: number of blocks.
        width: of the residual stream.
        heads: of the attention; each has an even width.
        tied: the read-out's matrix is the embedding's.

    Raises:
        ValueError: the sizes do not fit together.
    """

    def __init__(
        self, vocabulary: int, context: int, layers: int = 8, width: int = 96, heads: int = 3, *, tied: bool = True
    ) -> None:
        super().__init__()
        sizes = {"vocabulary": vocabulary, "context": context, "layers": layers, "width": width, "heads": heads}
        for name, value in sizes.items():
            check_whole(name, value)
        if width % (2 * heads):
            raise ValueError(
                f"width: {width} cannot be shared by {heads} heads of even width; give a multiple of {2 * heads}"
            )
        if not isinstance(tied, bool):
            raise ValueError(f"tied: must be True or False, not {tied!r}")
        self.context = context
        self.embedding = nn.Embedding(vocabulary, width)
        self.blocks = nn.ModuleList(Block(width, heads) for _ in range(layers))
        self.norm = nn.RMSNorm(width)
        self.read_out = nn.Linear(width, vocabulary, bias=False)
        if tied:
            self.read_out.weight = self.embedding.weight
        for name, parameter in self.named_parameters():
            if parameter.ndim > 1:
                into_stream = name.endswith(("attention.out.weight", "mlp.down.weight"))
                nn.init.normal_(parameter, std=_SPREAD / math.sqrt(2 * layers) if into_stream else _SPREAD)

    def forward(self, tokens: Tensor) -> Tensor:
        """Maps token ids (N, T) to scores of the token after each (N, T, V).

        Raises:
            ValueError: the sequences are longer than the context.
        """
        if tokens.shape[-1] > self.context:
            raise ValueError(
                f"tokens: sequences of {tokens.shape[-1]} are longer than the context of {self.context}; cut them"
            )
        x = self.embedding(tokens)
        for block in self.blocks:
            x = block(x)
        scores: Tensor = self.read_out(self.norm(x))
        return scores


class Block(nn.Module):
    """Attention, then a hidden layer, each on a norm of the residual stream that it adds to."""

    def __init__(self, width: int, heads: int) -> None:
        super().__init__()
        self.norm1, self.attention = nn.RMSNorm(width), Attention(width, heads)
        self.norm2, self.mlp = nn.RMSNorm(width), SwiGLU(width)

    def forward(self, x: Tensor) -> Tensor:
        """(N, T, C) to (N, T, C)."""
        x = x + self.attention(self.norm1(x))
        x = x + self.mlp(self.norm2(x))
        return x


class Attention(nn.Module):
    """Causal self-attention with rotary positions."""

    def __init__(self, width: int, heads: int) -> None:
        super().__init__()
        self.heads = heads
        self.qkv = nn.Linear(width, 3 * width, bias=False)
        self.out = nn.Linear(width, width, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        """(N, T, C) to (N, T, C)."""
        q, k, v = self.qkv(x).unflatten(-1, (3, self.heads, -1)).permute(2, 0, 3, 1, 4)  # each (N, heads, T, C / heads)
        cos, sin = rotary(q)
        mixed = F.scaled_dot_product_attention(rotated(q, cos, sin), rotated(k, cos, sin), v, is_causal=True)
        y: Tensor = self.out(mixed.transpose(1, 2).flatten(2))
        return y


class SwiGLU(nn.Module):
    """A gated hidden layer of 8/3 of the width, rounded up to a multiple of 32: as many weights as one of 4 without."""

    def __init__(self, width: int) -> None:
        super().__init__()
        hidden = 32 * math.ceil(8 * width / 3 / 32)
        self.up = nn.Linear(width, 2 * hidden, bias=False)
        self.down = nn.Linear(hidden, width, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        """(N, T, C) to (N, T, C)."""
        gate, value = self.up(x).chunk(2, -1)
        y: Tensor = self.down(F.silu(gate) * value)
        return y


def rotary(q: Tensor) -> tuple[Tensor, Tensor]:
    """Cosines and sines (T, D / 2) of the angles by which pairs of the D numbers of each position are turned."""
    length, size = q.shape[-2:]
    pairs = torch.arange(0, size, 2, device=q.device, dtype=torch.float32)
    positions = torch.arange(length, device=q.device, dtype=torch.float32)
    angles = torch.outer(positions, _BASE ** (-pairs / size))
    return angles.cos().to(q.dtype), angles.sin().to(q.dtype)


def rotated(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """(N, heads, T, D) with number i of each position and number i + D / 2 turned as a pair."""
    a, b = x.chunk(2, -1)
    return torch.cat([a * cos - b * sin, a * sin + b * cos], -1)
