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


def read_out(weight: str, path: str, bias: str | None = None) -> ReadOut:
    return ReadOut(weight=weight, bias=bias, call=(path, 1))


def found(model: nn.Module, sample: Tensor) -> ReadOut | str:
    return find_read_out(observe(model, sample, as_prediction))


def test_of_a_decoder() -> None:
    assert found(GPT(20, 8, tied=False), TOKENS) == read_out("read_out.weight", "read_out")
    assert found(GPT(20, 8, tied=True), TOKENS) == read_out("embedding.weight", "read_out")


@pytest.mark.parametrize(("name", "path"), [("resnet20", "fc"), ("mlp", "4"), ("torchvision:swin_t", "head")])
def test_of_a_classifier(name: str, path: str) -> None:
    model = build_model(name, num_classes=10)
    assert found(model, torch.randn(2, 3, 32, 32)) == read_out(f"{path}.weight", path, f"{path}.bias")


def test_where_the_forward_looks_at_its_features() -> None:
    class Router(nn.Sequential):
        def forward(self, x: Tensor) -> Tensor:
            y: Tensor = super().forward(x)
            return y if x.sum() > 0 else y.flatten(1)

    assert found(Router(nn.Linear(4, 8), nn.Linear(8, 3)), torch.randn(2, 4)) == read_out("1.weight", "1", "1.bias")


class Added(nn.Module):
    """A bias that torch adds in an operation by itself, since the features have gaps; or one beside the layer."""

    def __init__(self, *, beside: bool) -> None:
        super().__init__()
        self.layer, self.head = nn.Linear(4, 4), nn.Linear(4, 3, bias=not beside)
        self.bias = nn.Parameter(torch.zeros(3)) if beside else None

    def forward(self, x: Tensor) -> Tensor:
        scores: Tensor = self.head(self.layer(x).transpose(0, 1))
        return scores if self.bias is None else scores + self.bias


def test_a_bias_is_the_layers_where_it_is_added_in_its_call() -> None:
    sample = torch.randn(2, 5, 4)
    assert found(Added(beside=False), sample) == read_out("head.weight", "head", "head.bias")
    assert found(Added(beside=True), sample) == "the last operation of its forward is no matrix product but Add"


@pytest.mark.parametrize(
    ("end", "read", "expected"),
    [
        (lambda x, w: x @ w.T, False, read_out("net.embedding.weight", "")),
        (lambda x, w: x.double(), True, read_out("net.embedding.weight", "net.read_out")),
        (lambda x, w: x.flatten(0, 1), True, read_out("net.embedding.weight", "net.read_out")),
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
