"""Networks for tests that train whole runs, and what tests ask of any."""

from collections.abc import Mapping

import torch
from torch import Tensor, nn
from torch.nn import functional as F


def gradients(module: nn.Module) -> dict[str, Tensor | None]:
    """Copies of the gradients that are there."""
    return {name: None if p.grad is None else p.grad.clone() for name, p in module.named_parameters()}


def assert_equal(first: Mapping[str, Tensor | None], second: Mapping[str, Tensor | None]) -> None:
    """Bit for bit, by name."""
    assert first.keys() == second.keys()
    for name, a in first.items():
        b = second[name]
        assert (a is None) == (b is None) and (a is None or torch.equal(a, b)), name  # type: ignore[arg-type]


class SmallNet(nn.Module):
    """Convolutions with BatchNorm and dropout: everything that has a state beside the parameters."""

    def __init__(self, num_classes: int, in_channels: int) -> None:
        super().__init__()
        self.stem = nn.Sequential(nn.Conv2d(in_channels, 8, 3, 2, 1), nn.BatchNorm2d(8), nn.ReLU())
        self.block1 = nn.Sequential(nn.Conv2d(8, 8, 3, 1, 1), nn.BatchNorm2d(8), nn.ReLU(), nn.Dropout(0.2))
        self.block2 = nn.Sequential(nn.Conv2d(8, 16, 3, 2, 1), nn.BatchNorm2d(16), nn.ReLU(), nn.Dropout(0.2))
        self.head = nn.Linear(16, num_classes)

    def forward(self, x: Tensor) -> Tensor:
        x = self.block2(self.block1(self.stem(x)))
        return self.head(x.mean((2, 3)))


class Block(nn.Module):
    """Attention to what came before, and a hidden layer."""

    def __init__(self, width: int, dropout: float) -> None:
        super().__init__()
        self.norm1, self.norm2 = nn.LayerNorm(width), nn.LayerNorm(width)
        self.projection, self.out = nn.Linear(width, 3 * width), nn.Linear(width, width)
        self.hidden = nn.Sequential(nn.Linear(width, 2 * width), nn.GELU(), nn.Linear(2 * width, width))
        self.dropout = nn.Dropout(dropout)

    def forward(self, x: Tensor) -> Tensor:
        q, k, v = self.projection(self.norm1(x)).unflatten(-1, (3, 2, -1)).permute(2, 0, 3, 1, 4)
        attended = F.scaled_dot_product_attention(q, k, v, is_causal=True).transpose(1, 2).flatten(2)
        x = x + self.dropout(self.out(attended))
        return x + self.dropout(self.hidden(self.norm2(x)))


class Decoder(nn.Module):
    """A small language model: ids (N, T) to scores (N, T, V)."""

    def __init__(
        self,
        vocabulary: int,
        context: int,
        *,
        width: int = 16,
        depth: int = 4,
        dropout: float = 0.1,
    ) -> None:
        super().__init__()
        self.tokens, self.places = nn.Embedding(vocabulary, width), nn.Embedding(context, width)
        self.blocks = nn.ModuleList(Block(width, dropout) for _ in range(depth))
        self.norm, self.head = nn.LayerNorm(width), nn.Linear(width, vocabulary, bias=False)

    def forward(self, ids: Tensor) -> Tensor:
        x = self.tokens(ids) + self.places.weight[: ids.shape[1]]
        for block in self.blocks:
            x = block(x)
        return self.head(self.norm(x))
