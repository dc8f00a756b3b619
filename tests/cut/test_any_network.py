"""Networks of other kinds: conditioning, long skips, recurrence, experts, dictionaries, windows."""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import torchlocal as tl
from torchlocal.rules import dense


class DiTBlock(nn.Module):
    """A block of a diffusion transformer, modulated by a condition."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.norm1, self.norm2 = (nn.LayerNorm(width, elementwise_affine=False) for _ in range(2))
        self.qkv, self.out = nn.Linear(width, 3 * width), nn.Linear(width, width)
        self.mlp = nn.Sequential(nn.Linear(width, 2 * width), nn.GELU(), nn.Linear(2 * width, width))
        self.modulation = nn.Sequential(nn.SiLU(), nn.Linear(width, 6 * width))

    def forward(self, x: Tensor, condition: Tensor) -> Tensor:
        scale1, shift1, gate1, scale2, shift2, gate2 = self.modulation(condition).unsqueeze(1).chunk(6, -1)
        q, k, v = self.qkv(self.norm1(x) * (1 + scale1) + shift1).chunk(3, -1)
        x = x + gate1 * self.out(F.scaled_dot_product_attention(q, k, v))
        return x + gate2 * self.mlp(self.norm2(x) * (1 + scale2) + shift2)


class DiT(nn.Module):
    """A diffusion transformer on images of 16 pixels: called with image, time and class."""

    def __init__(self, width: int = 32, depth: int = 4) -> None:
        super().__init__()
        self.patches, self.classes = nn.Conv2d(3, width, 4, 4), nn.Embedding(5, width)
        self.time = nn.Sequential(nn.Linear(8, width), nn.SiLU(), nn.Linear(width, width))
        self.blocks = nn.ModuleList(DiTBlock(width) for _ in range(depth))
        self.norm, self.final = nn.LayerNorm(width), nn.Linear(width, 48)

    def forward(self, x: Tensor, time: Tensor, label: Tensor) -> Tensor:
        h = self.patches(x).flatten(2).transpose(1, 2)
        condition = self.time(time) + self.classes(label)
        for block in self.blocks:
            h = block(h, condition)
        return F.pixel_shuffle(self.final(self.norm(h)).transpose(1, 2).reshape(-1, 48, 4, 4), 4)


class Scores(nn.Module):
    """Auxiliary network for DiT: a linear layer from what there is to the image."""

    def __init__(self, site: tl.rules.Site) -> None:
        super().__init__()
        self.tokens = len(site.feature_shape) == 3
        self.layer = nn.Linear(site.channels, 48)

    def forward(self, features: Tensor) -> Tensor:
        tokens = features if self.tokens else features.flatten(2).transpose(1, 2)
        return F.pixel_shuffle(self.layer(tokens).transpose(1, 2).reshape(-1, 48, 4, 4), 4)


class Up(nn.Module):
    """A step up of a U-Net."""

    def __init__(self, width: int, out: int) -> None:
        super().__init__()
        self.conv = nn.Conv2d(width, out, 3, padding=1)

    def forward(self, x: Tensor, skip: Tensor) -> Tensor:
        return F.relu(self.conv(torch.cat([F.interpolate(x, scale_factor=2), skip], 1)))


class UNet(nn.Module):
    """Two steps down, two up, with long skips."""

    def __init__(self) -> None:
        super().__init__()

        def conv(width: int, out: int) -> nn.Module:
            return nn.Sequential(nn.Conv2d(width, out, 3, padding=1), nn.ReLU())

        self.down1, self.down2 = conv(3, 8), conv(8, 16)
        self.middle = nn.Sequential(conv(16, 16), conv(16, 16))
        self.up2, self.up1 = Up(32, 8), Up(16, 8)
        self.after, self.out = conv(8, 8), nn.Sequential(conv(8, 8), nn.Conv2d(8, 4, 1))

    def forward(self, x: Tensor) -> Tensor:
        first = self.down1(x)
        second = self.down2(F.max_pool2d(first, 2))
        h = self.middle(F.max_pool2d(second, 2))
        return self.out(self.after(self.up1(self.up2(h, second), first)))


class Recurrent(nn.Module):
    """Layers that return more than features."""

    def __init__(self) -> None:
        super().__init__()
        self.embedding, self.first = nn.Embedding(50, 16), nn.LSTM(16, 16, batch_first=True)
        self.second, self.third = (
            nn.GRU(16, 16, batch_first=True),
            nn.LSTM(16, 16, batch_first=True, bidirectional=True),
        )
        self.head = nn.Linear(32, 5)

    def forward(self, x: Tensor) -> Tensor:
        h, _ = self.first(self.embedding(x))
        h, _ = self.second(h)
        h, (_, _) = self.third(h)
        return self.head(h[:, -1])


class Experts(nn.Module):
    """Each example goes through the expert that a router chooses."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.router, self.experts = nn.Linear(width, 2), nn.ModuleList(nn.Linear(width, width) for _ in range(2))

    def forward(self, x: Tensor) -> Tensor:
        weights = self.router(x).softmax(-1)
        out = torch.zeros_like(x)
        for i, expert in enumerate(self.experts):
            rows = (weights.argmax(-1) == i).nonzero().squeeze(-1)
            if rows.numel():
                out = out.index_add(0, rows, expert(x[rows]) * weights[rows, i, None])
        return x + out


def mixture() -> nn.Module:
    return nn.Sequential(nn.Linear(8, 16), nn.Sequential(*(Experts(16) for _ in range(4))), nn.Linear(16, 5))


def deeplab() -> nn.Module:
    from torchvision.models.segmentation import deeplabv3_mobilenet_v3_large

    return deeplabv3_mobilenet_v3_large(weights=None, weights_backbone=None, num_classes=4)


def timm_model(name: str, **options: Any) -> Callable[[], nn.Module]:
    def make() -> nn.Module:
        timm = pytest.importorskip("timm")
        return timm.create_model(name, num_classes=5, **options)

    return make


generator = torch.Generator().manual_seed(0)
IMAGE = torch.randn(2, 3, 16, 16, generator=generator)
MAP = torch.randint(4, (2, 16, 16), generator=generator)
CLASSES = torch.tensor([1, 3])
DENSE = tl.GreedyRule(dense(8))
CARRIED = {"carry": "collect"}


def image(size: int) -> Tensor:
    return torch.randn(2, 3, size, size, generator=generator)


CASES: dict[str, tuple[Callable[[], nn.Module], Any, Any, dict[str, Any]]] = {
    "diffusion transformer": (
        DiT, (IMAGE, torch.randn(2, 8, generator=generator), CLASSES), torch.randn(2, 3, 16, 16, generator=generator),
        {"criterion": F.mse_loss, "rule": tl.GreedyRule(Scores), **CARRIED},
    ),
    "u-net": (UNet, IMAGE, MAP, {"rule": DENSE}),
    "u-net, carried": (UNet, IMAGE, MAP, {"rule": DENSE, **CARRIED}),
    "recurrent": (Recurrent, torch.randint(50, (2, 7), generator=generator), CLASSES, {}),
    "mixture of experts": (
        mixture, torch.randn(6, 8, generator=generator), torch.arange(6) % 5, {"rule": "greedy"},
    ),
    "deeplabv3": (
        deeplab, image(32), torch.randint(4, (2, 32, 32), generator=generator),
        {"prediction": lambda output: output["out"], "rule": DENSE},
    ),
    "eva02": (timm_model("eva02_tiny_patch14_224", img_size=28), image(28), CLASSES, {}),
    "hiera": (timm_model("hiera_tiny_224", img_size=(64, 64)), image(64), CLASSES, {}),
    "swinv2": (timm_model("swinv2_tiny_window8_256", img_size=64, window_size=2), image(64), CLASSES, {}),
    "maxvit": (timm_model("maxvit_pico_rw_256", img_size=64), image(64), CLASSES, {}),
}  # fmt: skip


def outcome(module: nn.Module) -> list[Tensor | None]:
    found = [*(p.grad for p in module.parameters()), *module.buffers()]
    return [None if t is None else t.clone() for t in found]


def same(first: list[Tensor | None], second: list[Tensor | None]) -> bool:
    pairs = zip(first, second, strict=True)
    return all(a is b is None or (a is not None and b is not None and torch.equal(a, b)) for a, b in pairs)


@pytest.mark.parametrize("name", CASES)
def test_guided_steps_are_exact_and_local_steps_train_every_module(name: str) -> None:
    make, batch, target, options = CASES[name]
    torch.manual_seed(0)
    model = make().train()
    state = copy.deepcopy(model.state_dict())
    for modules in (2, 3, "all"):
        net = tl.decouple(model, modules, sample=batch, **options)
        assert net.num_modules == (modules if isinstance(modules, int) else len(net.partition.units)) > 1
        torch.manual_seed(1)
        prediction = net.chain.prediction(model(*batch) if isinstance(batch, tuple) else model(batch))
        net.criterion(prediction, target).backward()
        expected = outcome(model)
        for recompute in (None, "modules") if net.carry is None else (None,):
            model.load_state_dict(state)
            net.zero_grad()
            torch.manual_seed(1)
            net.guided_step(batch, target, auxiliary="frozen", recompute=recompute)
            assert same(outcome(model), expected), recompute
        model.load_state_dict(state)
        net.zero_grad()
        losses = net.local_step(batch, target)
        assert len(losses) == net.num_modules and all(loss.isfinite() for loss in losses)
        if name != "mixture of experts":  # of which an expert may be left out
            assert all(p.grad is not None for p in net.parameters())
        model.load_state_dict(state)
        net.zero_grad()


def test_torchs_transformer_layers_come_to_cut_points_inside_in_evaluation_too() -> None:
    torch.manual_seed(0)
    layer = nn.TransformerEncoderLayer(16, 2, 32, batch_first=True)
    model = nn.Sequential(nn.Linear(8, 16), nn.TransformerEncoder(layer, 3, enable_nested_tensor=False), nn.Flatten())
    model.append(nn.Linear(16 * 5, 4))
    x = torch.randn(6, 5, 8)
    net = tl.decouple(model, "all", sample=x).eval()
    outputs = net.depth_outputs(x)
    assert len(outputs) == net.num_modules > 3 and torch.backends.mha.get_fastpath_enabled()
    with torch.no_grad():
        torch.testing.assert_close(outputs[-1], model(x))
