"""The networks: published sizes, shapes, names, and one sentence for every mistake."""

from __future__ import annotations

import sys
from collections.abc import Callable
from typing import Any

import pytest
import torch
import torchvision
from torch import Tensor, fx, nn

from torchlocal.models import build_model, model_names

build: Callable[..., Any] = build_model  # its attributes are not those of every nn.Module

# With identity shortcuts instead of projections these are He et al.'s networks: 0.27 M, 0.46 M, 0.66 M, 0.85 M, 1.7 M
# (table 6); the exact numbers are those of the public reimplementations with option A shortcuts.
PUBLISHED = {"resnet20": 269_722, "resnet32": 464_154, "resnet44": 658_586, "resnet56": 853_018, "resnet110": 1_727_962}


@pytest.mark.parametrize(("name", "published"), PUBLISHED.items())
def test_resnet_has_the_published_size(name: str, published: int) -> None:
    model = build(name, num_classes=10)
    total = sum(p.numel() for p in model.parameters())
    projections = sum(p.numel() for key, p in model.named_parameters() if "downsample" in key)
    assert total - projections == published
    assert projections == (16 * 32 + 2 * 32) + (32 * 64 + 2 * 64)
    depth = sum(isinstance(m, nn.Conv2d | nn.Linear) for key, m in model.named_modules() if "downsample" not in key)
    assert depth == int(name.removeprefix("resnet"))


def test_resnet_blocks_are_modules_that_end_in_relu() -> None:
    model = build("resnet32", num_classes=10, in_channels=1, image_size=(14, 14)).eval()
    outputs: dict[str, Tensor] = {}
    names = [f"layer{stage}.{index}" for stage in (1, 2, 3) for index in range(5)]
    for name in names:
        model.get_submodule(name).register_forward_hook(lambda _m, _x, y, n=name: outputs.update({n: y.clone()}))
    torch.manual_seed(0)
    model(torch.randn(2, 1, 14, 14))
    assert list(outputs) == names
    assert all((y >= 0).all() and (y == 0).any() for y in outputs.values())
    assert [tuple(outputs[n].shape[1:]) for n in ("layer1.4", "layer2.0", "layer3.4")] == [
        (16, 14, 14),
        (32, 7, 7),
        (64, 4, 4),
    ]


def test_resnet_block_computes_what_the_paper_says() -> None:
    torch.manual_seed(0)
    block = build("resnet20", num_classes=10).get_submodule("layer2.0").eval()
    x = torch.randn(3, 16, 8, 8)
    with torch.no_grad():
        inner = torch.relu(block.bn1(block.conv1(x)))
        expected = torch.relu(block.bn2(block.conv2(inner)) + block.downsample[1](block.downsample[0](x)))
        assert torch.equal(block(x), expected)


@pytest.mark.parametrize(
    ("name", "widths", "pools_after"),
    [
        ("vgg8b", [128, 256, 256, 512, 512, 512], [1, 3, 4, 5]),
        ("vgg11b", [128, 128, 128, 256, 256, 512, 512, 512, 512], [3, 5, 7, 8]),
    ],
)
def test_vgg_has_the_published_widths(name: str, widths: list[int], pools_after: list[int]) -> None:
    model = build(name, num_classes=10)
    blocks = list(model.features)
    assert [block[0].out_channels for block in blocks] == widths
    assert [i for i, block in enumerate(blocks) if isinstance(block[-1], nn.MaxPool2d)] == pools_after
    assert model.hidden[0].in_features == 512 * 2 * 2 and model.hidden[0].out_features == 1024
    small = build(name, num_classes=10, in_channels=1, image_size=(8, 8))
    assert sum(isinstance(m, nn.MaxPool2d) for m in small.modules()) == 3  # a fourth would leave half a pixel
    large = build(name, num_classes=10, image_size=(96, 96))
    assert large.features[0][0].kernel_size == (7, 7) and large.features[0][0].stride == (2, 2)


SIZES = [(3, (32, 32)), (1, (28, 28)), (1, (14, 14)), (1, (14, 28)), (1, (8, 8)), (3, (7, 3)), (1, (1, 1))]


@pytest.mark.parametrize(
    ("name", "channels", "size"),
    [
        (name, channels, size)
        for name in model_names()
        for channels, size in SIZES
        # The deep ones are the code of their smaller sisters: two sizes do.
        if name not in ("resnet44", "resnet56", "resnet110", "vgg11b") or size in ((14, 28), (1, 1))
    ],
)
def test_own_networks_take_any_image(name: str, channels: int, size: tuple[int, int]) -> None:
    torch.manual_seed(0)
    model = build(name, num_classes=7, in_channels=channels, image_size=size)
    x = torch.randn(2, channels, *size)
    y = model(x)
    assert y.shape == (2, 7) and y.isfinite().all()
    y.sum().backward()
    assert all(p.grad is not None for p in model.parameters())
    model.eval()
    traced = fx.symbolic_trace(model)
    with torch.no_grad():
        assert torch.equal(traced(x), model(x))


def test_weights_follow_the_global_seed() -> None:
    states = []
    for seed in (0, 0, 1):
        torch.manual_seed(seed)
        states.append(build_model("resnet20", num_classes=10).state_dict())
    assert all(torch.equal(states[0][key], states[1][key]) for key in states[0])
    assert not torch.equal(states[0]["conv1.weight"], states[2]["conv1.weight"])


@pytest.mark.parametrize(
    ("name", "channels", "size"),
    [
        ("torchvision:resnet18", 1, (14, 28)),
        ("torchvision:mobilenet_v3_small", 4, (32, 32)),
        ("torchvision:squeezenet1_1", 1, (32, 32)),
        ("torchvision:googlenet", 1, (32, 32)),
        ("torchvision:inception_v3", 3, (80, 80)),
        ("timm:resnet26", 1, (14, 28)),
        ("timm:vit_tiny_patch16_224", 1, (32, 64)),
        ("timm:convnext_atto", 3, (32, 32)),
    ],
)
def test_library_networks(name: str, channels: int, size: tuple[int, int]) -> None:
    if name.startswith("timm:"):
        pytest.importorskip("timm")
    model = build(name, num_classes=7, in_channels=channels, image_size=size)
    assert model.training
    assert model(torch.zeros(2, channels, *size)).shape == (2, 7)


def test_torchvision_vit_takes_the_image_size() -> None:
    model = build("torchvision:vit_b_32", num_classes=3, image_size=(64, 64))
    assert model.image_size == 64 and model.encoder.pos_embedding.shape[1] == 1 + 4


@pytest.mark.parametrize("channels", [1, 5])
def test_replaced_convolution_keeps_the_variance(channels: int) -> None:
    torch.manual_seed(0)
    plain = torchvision.models.resnet18(num_classes=10).conv1
    torch.manual_seed(0)
    conv = build("torchvision:resnet18", num_classes=10, in_channels=channels).conv1
    assert conv.weight.shape == (64, channels, 7, 7) and conv.in_channels == channels and conv.weight.requires_grad
    expected = torch.stack([plain.weight[:, i % 3] for i in range(channels)], 1) * (3 / channels) ** 0.5
    torch.testing.assert_close(conv.weight, expected)


def test_trying_a_library_network_changes_nothing() -> None:
    torch.manual_seed(0)
    plain = torchvision.models.densenet121(num_classes=10)
    after_plain = torch.get_rng_state()
    torch.manual_seed(0)
    model = build("torchvision:densenet121", num_classes=10)
    assert torch.equal(torch.get_rng_state(), after_plain)
    assert all(torch.equal(a, b) for a, b in zip(model.state_dict().values(), plain.state_dict().values(), strict=True))


def test_model_names() -> None:
    assert {"resnet20", "resnet32", "resnet110", "vgg8b", "vgg11b", "mlp"} <= set(model_names())
    assert "torchvision:resnet50" in model_names("torchvision")
    assert "torchvision:fcn_resnet50" not in model_names("torchvision")
    with pytest.raises(ValueError, match="library='keras'"):
        model_names("keras")


@pytest.mark.parametrize(
    ("name", "options", "message"),
    [
        ("resnet23", {}, r"'resnet23' is unknown \(did you mean resnet"),
        ("resnet18", {}, r"'resnet18' is unknown \(did you mean torchvision:resnet18\?\)"),
        ("torchvision:resnet19", {}, r"did you mean torchvision:resnet18"),
        ("torchvision:fcn_resnet50", {}, r"'torchvision:fcn_resnet50' is not an image classifier"),
        ("timm:resnt26", {}, r"did you mean timm:resnet26"),
        ("timm:hf-hub:timm/resnet18", {}, r"'timm:hf-hub:timm/resnet18' is unknown"),
        ("keras:resnet50", {}, r"did you mean torchvision:resnet50"),
        ("", {}, r"model '' is unknown"),
        ("torchvision:alexnet", {}, r"'torchvision:alexnet' does not take 3 x 32 x 32 images \(.*choose another size"),
        ("torchvision:vit_b_16", {"image_size": (14, 28)}, r"takes square images only, not \(14, 28\)"),
        ("torchvision:vit_b_16", {"image_size": (20, 20)}, r"does not take 3 x 20 x 20 images"),
        ("timm:vit_tiny_patch16_224", {"image_size": (14, 14)}, r"does not take 3 x 14 x 14 images"),
        ("resnet20", {"num_classes": 0}, r"num_classes=0 must be"),
        ("resnet20", {"in_channels": 0}, r"in_channels=0 must be"),
        ("resnet20", {"image_size": (0, 3)}, r"image_size=\(0, 3\) must be"),
        ("resnet20", {"image_size": (3,)}, r"image_size=\(3,\) must be"),
    ],
)
def test_mistakes_get_one_sentence(name: str, options: dict, message: str) -> None:
    if name.startswith("timm:"):
        pytest.importorskip("timm")
    with pytest.raises(ValueError, match=message) as caught:
        build_model(name, **{"num_classes": 10, **options})
    assert "\n" not in str(caught.value)


def test_missing_timm(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "timm", None)
    with pytest.raises(ValueError, match=r"needs timm, which is not installed: pip install 'torchlocal\[timm\]'"):
        build_model("timm:resnet26", num_classes=10)


@pytest.mark.parametrize(("output", "found"), [("tuple", "tuple"), ("features", r"a tensor of shape \(2, 3, 32, 32\)")])
def test_outputs_that_are_no_scores_are_refused(monkeypatch: pytest.MonkeyPatch, output: str, found: str) -> None:
    class Odd(nn.Module):
        def forward(self, x: Tensor) -> object:
            return (x, x) if output == "tuple" and self.training else x

    monkeypatch.setattr(torchvision.models, "get_model", lambda *_args, **_options: Odd())
    with pytest.raises(ValueError, match=f"'torchvision:resnet18' returns {found} for two images"):
        build_model("torchvision:resnet18", num_classes=10)
