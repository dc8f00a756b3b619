"""Every kind of network works: cut at K = 2, 4 and all units; one local and one guided step; nothing else changes."""

from __future__ import annotations

import copy

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import torchlocal as tl
from torchlocal.models import build_model

NAMES = {
    "resnet20": (32, 32),
    "resnet32": (28, 28),
    "resnet110": (16, 16),
    "vgg8b": (32, 32),
    "vgg11b": (32, 32),
    "mlp": (8, 8),
    "torchvision:resnet18": (32, 32),
    "torchvision:resnet50": (32, 32),
    "torchvision:vgg11_bn": (32, 32),
    "torchvision:densenet121": (32, 32),
    "torchvision:mobilenet_v3_small": (32, 32),
    "torchvision:efficientnet_b0": (32, 32),
    "torchvision:convnext_tiny": (32, 32),
    "torchvision:vit_b_16": (32, 32),
    "torchvision:swin_t": (32, 32),
    "torchvision:regnet_y_400mf": (32, 32),
    "timm:resnet26": (32, 32),
    "timm:vit_tiny_patch16_224": (32, 32),
    "timm:convnext_atto": (32, 32),
    "timm:mixer_s32_224": (64, 64),
    "timm:efficientnet_lite0": (32, 32),
    "timm:mobilenetv4_conv_small": (32, 32),
}


def _sequential() -> nn.Module:
    return nn.Sequential(
        nn.Conv2d(3, 8, 3), nn.BatchNorm2d(8), nn.ReLU(inplace=True), nn.Conv2d(8, 8, 3), nn.ReLU(), nn.MaxPool2d(2),
        nn.Conv2d(8, 16, 3), nn.ReLU(), nn.Conv2d(16, 16, 3), nn.ReLU(), nn.Flatten(), nn.Dropout(0.2),
        nn.Linear(1600, 10),
    )  # fmt: skip


def _plain_mlp() -> nn.Module:
    hidden = [layer for _ in range(5) for layer in (nn.Linear(48, 48), nn.BatchNorm1d(48), nn.ReLU(inplace=True))]
    return nn.Sequential(nn.Flatten(), *hidden, nn.Linear(48, 10))


def _model(name: str) -> tuple[nn.Module, Tensor]:
    torch.manual_seed(0)
    if name == "plain mlp":
        return _plain_mlp(), torch.randn(2, 3, 4, 4)
    if name == "sequential":
        return _sequential(), torch.randn(2, 3, 32, 32)
    if name.startswith("timm:"):
        pytest.importorskip("timm")
    height, width = NAMES[name]
    return build_model(name, num_classes=10, in_channels=3, image_size=(height, width)), torch.randn(
        2, 3, height, width
    )


@pytest.mark.parametrize("name", [*NAMES, "sequential", "plain mlp"])
def test_decouple_any_network(name: str) -> None:
    model, x = _model(name)
    y = torch.tensor([1, 7])
    untouched = copy.deepcopy(model)
    keys = [(key, tensor.shape) for key, tensor in model.state_dict().items()]
    identities = [id(p) for p in model.parameters()]
    attributes = set(vars(model))

    for modules in (2, 3 if name == "mlp" else 4, "all"):  # the library's own has three hidden layers
        net = tl.decouple(model, modules, sample=x)
        if modules != "all":
            assert net.num_modules == modules
        assert len(net.auxiliary) == net.num_modules - 1

        for mode in (True, False):
            model.train(mode)
            untouched.train(mode)
            torch.manual_seed(1)
            expected = untouched(x)
            torch.manual_seed(1)
            assert torch.equal(model(x), expected)
        untouched.load_state_dict(model.state_dict())

        model.train()
        assert len(net.local_step(x, y)) == net.num_modules
        assert all(p.grad is not None for p in net.auxiliary.parameters())
        net.zero_grad()

        # With dropout and drop path drawn alike, the guided step's gradients are those of an ordinary step.
        before = copy.deepcopy(model.state_dict())
        torch.manual_seed(2)
        losses = net.guided_step(x, y, auxiliary="frozen")
        untouched.load_state_dict(before)
        untouched.train()
        untouched.zero_grad()
        torch.manual_seed(2)
        loss = F.cross_entropy(untouched(x), y)
        loss.backward()
        assert torch.equal(losses[-1], loss.detach())
        for (key, p), q in zip(model.named_parameters(), untouched.parameters(), strict=True):
            assert (p.grad is None) == (q.grad is None), key
            assert p.grad is None or torch.equal(p.grad, q.grad), key
        assert all(torch.equal(a, b) for a, b in zip(model.buffers(), untouched.buffers(), strict=True))
        net.zero_grad()

        assert [(key, tensor.shape) for key, tensor in model.state_dict().items()] == keys
        assert [id(p) for p in model.parameters()] == identities
        assert set(vars(model)) == attributes


@pytest.mark.parametrize("name", [*NAMES, "sequential", "plain mlp"])
def test_recomputation_is_exact_for_any_network(name: str) -> None:
    model, x = _model(name)
    y = torch.tensor([1, 7])
    net = tl.decouple(model, "all", sample=x)
    state = copy.deepcopy(net.state_dict())
    results = []
    for recompute in (None, "modules", 2):
        net.load_state_dict(state)
        net.zero_grad()
        torch.manual_seed(3)
        losses = net.guided_step(x, y, recompute=recompute)
        results.append([*losses, torch.rand(1), *(p.grad for p in net.parameters()), *net.buffers()])
        results[-1] = [None if t is None else t.clone() for t in results[-1]]
    for other in results[1:]:
        assert all((a is None and b is None) or torch.equal(a, b) for a, b in zip(results[0], other, strict=True))
