"""The linear layer that makes the prediction is found in the autograd graph, tied or not, or it is said why not."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch import Tensor, nn

from torchlocal.cut.batches import as_prediction
from torchlocal.cut.observe import observe
from torchlocal.cut.read_out import ReadOut, find_read_out
from torchlocal.models import GPT, build_model

TOKENS = torch.zeros(2, 6, dtype=torch.long)


class Ends(nn.Module):
    """Something after, or in place of, the read-out of a decoder."""

    def __init__(self, end: Callable[[Tensor, Tensor], Tensor], *, read: bool = False) -> None:
        super().__init__()
        self.net, self.end = GPT(20, 8, layers=2, width=8, heads=1), end
        if not read:
            self.net.read_out = nn.Identity()  # type: ignore[assignment]

    def forward(self, tokens: Tensor) -> Tensor:
        return self.end(self.net(tokens), self.net.embedding.weight)


def found(model: nn.Module, sample: Tensor) -> ReadOut | str:
    return find_read_out(observe(model, sample, as_prediction))


def test_of_a_decoder() -> None:
    assert found(GPT(20, 8, tied=False), TOKENS) == ReadOut(weight="read_out.weight")
    assert found(GPT(20, 8, tied=True), TOKENS) == ReadOut(weight="embedding.weight")


@pytest.mark.parametrize(("name", "path"), [("resnet20", "fc"), ("mlp", "4"), ("torchvision:swin_t", "head")])
def test_of_a_classifier(name: str, path: str) -> None:
    model = build_model(name, num_classes=10)
    assert found(model, torch.randn(2, 3, 32, 32)) == ReadOut(weight=f"{path}.weight", bias=f"{path}.bias")


def test_where_the_forward_looks_at_its_features() -> None:
    class Router(nn.Sequential):
        def forward(self, x: Tensor) -> Tensor:
            y: Tensor = super().forward(x)
            return y if x.sum() > 0 else y.flatten(1)

    assert found(Router(nn.Linear(4, 8), nn.Linear(8, 3)), torch.randn(2, 4)) == ReadOut(
        weight="1.weight", bias="1.bias"
    )


@pytest.mark.parametrize(
    ("end", "read", "expected"),
    [
        (lambda x, w: x @ w.T, False, ReadOut(weight="net.embedding.weight")),
        (lambda x, w: x.double(), True, ReadOut(weight="net.embedding.weight")),
        (lambda x, w: x.flatten(0, 1), True, ReadOut(weight="net.embedding.weight")),
        (lambda x, w: x.tanh(), True, "the last operation of its forward is no matrix product but Tanh"),
        (lambda x, w: x / 2, True, "the last operation of its forward is no matrix product but Div"),
        (lambda x, w: x, False, "the last operation of its forward is no matrix product but Mul in 'net.norm'"),
        (lambda x, w: x @ (2 * w).T, False, "the matrix of its last product is no parameter by itself"),
        (lambda x, w: x @ w[:10].T, False, "the matrix of its last product is no parameter by itself"),
    ],
)
def test_of_what_else_ends_a_network(
    end: Callable[[Tensor, Tensor], Tensor], read: bool, expected: ReadOut | str
) -> None:
    assert found(Ends(end, read=read), TOKENS) == expected
