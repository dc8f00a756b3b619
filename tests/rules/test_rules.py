"""Auxiliary networks for every layout of features, and local rules of the user's own."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import torchlocal as tl
from torchlocal.models import build_model
from torchlocal.rules import AUXILIARY_NETWORKS, Batch, Rule, Site
from torchlocal.run.config import FitConfig, build_rule


def site(shape: tuple[int, ...], channel_dim: int = 1) -> Site:
    return Site(
        index=0,
        num_modules=2,
        feature_shape=torch.Size(shape),
        channel_dim=channel_dim,
        input_shape=torch.Size((shape[0], 3, 32, 32)),
        output_shape=torch.Size((shape[0], 7)),
    )


LAYOUTS = {
    "(N, C, H, W)": ((4, 6, 16, 12), 1),
    "(N, C, H, W) small": ((4, 6, 3, 5), 1),
    "(N, H, W, C)": ((4, 16, 12, 6), -1),
    "(N, T, C)": ((4, 17, 6), -1),
    "(N, C, T)": ((4, 6, 17), 1),
    "(N, C)": ((4, 6), 1),
    "(N, C, D, H, W)": ((4, 6, 9, 9, 10), 1),
}


@pytest.mark.parametrize("name", AUXILIARY_NETWORKS)
@pytest.mark.parametrize("layout", LAYOUTS)
def test_auxiliary_networks_take_features_of_any_layout(name: str, layout: str) -> None:
    shape, channel_dim = LAYOUTS[layout]
    torch.manual_seed(0)
    network = AUXILIARY_NETWORKS[name](site(shape, channel_dim))
    features = torch.randn(shape)
    output = network(features)
    assert output.shape == (4, 7)
    output.sum().backward()
    assert all(p.grad is not None for p in network.parameters())


@pytest.mark.parametrize("name", AUXILIARY_NETWORKS)
def test_both_layouts_of_a_map_give_the_same_prediction(name: str) -> None:
    features = torch.randn(4, 6, 16, 12)
    torch.manual_seed(0)
    first = AUXILIARY_NETWORKS[name](site((4, 6, 16, 12), 1))
    torch.manual_seed(0)
    last = AUXILIARY_NETWORKS[name](site((4, 16, 12, 6), -1))
    torch.testing.assert_close(first(features), last(features.movedim(1, -1)))


def test_mlp_sr_has_the_published_size() -> None:
    """838k parameters on ResNet-32 with K = 16 and 10 classes, as the published code of DGL has."""
    model = build_model("resnet32", num_classes=10, in_channels=3, image_size=(32, 32))
    net = tl.decouple(model, 16, sample=(2, 3, 32, 32), rule=tl.GreedyRule("mlp_sr"))
    assert round(sum(p.numel() for p in net.auxiliary.parameters()) / 1000) == 838
    # Three 1×1 convolutions C·C, two hidden layers 4C·4C, a classifier, and two numbers per normalised channel.
    by_hand = [3 * c * c + 2 * 16 * c * c + 40 * c + 10 + 2 * (3 * c + 8 * c) for c in [16] * 6 + [32] * 5 + [64] * 4]
    assert [sum(p.numel() for p in a.parameters()) for a in net.auxiliary] == by_hand


def test_mlp_sr_pools_to_a_quarter_and_to_two_by_two() -> None:
    network = AUXILIARY_NETWORKS["mlp_sr"](site((4, 6, 30, 9)))
    shapes: list[torch.Size] = []
    for layer in network.modules():
        if isinstance(layer, (nn.Conv2d, nn.Linear)):
            layer.register_forward_pre_hook(lambda m, inputs: shapes.append(inputs[0].shape[1:]))
    network(torch.randn(4, 6, 30, 9))
    assert [tuple(s) for s in shapes] == [(6, 8, 3)] * 3 + [(24,)] * 3


def shapes_of(network: nn.Module, *kinds: type[nn.Module]) -> list[tuple[int, ...]]:
    return [tuple(m.weight.shape[:2])[::-1] for m in network.modules() if isinstance(m, kinds)]  # type: ignore[arg-type, index]


@pytest.mark.parametrize(
    ("shape", "classes", "width", "convolutions", "layers"),
    [
        ((2, 64, 8, 8), 1000, 64, [(64, 64)] * 3, [(256, 256)] * 2 + [(256, 1000)]),  # as published
        ((2, 512, 4, 4), 10, 64, [(512, 64), (64, 64), (64, 64)], [(256, 256)] * 2 + [(256, 10)]),
        ((2, 512, 4, 4), 10, None, [(512, 512)] * 3, [(2048, 2048)] * 2 + [(2048, 10)]),  # as published
        ((2, 2048, 7, 7), 1000, 64, [(2048, 64), (64, 64), (64, 64)], [(256, 131), (131, 131), (131, 1000)]),
        ((2, 512, 4, 4), 10**5, 16, [(512, 16), (16, 16), (16, 16)], [(64, 16), (16, 16), (16, 10**5)]),
        ((2, 25088), 10, 64, [], [(25088, 256), (256, 256), (256, 10)]),
    ],
)
def test_mlp_sr_is_bounded_on_wide_features(
    shape: tuple[int, ...],
    classes: int,
    width: int | None,
    convolutions: list[tuple[int, int]],
    layers: list[tuple[int, int]],
) -> None:
    here = replace(site(shape), output_shape=torch.Size((shape[0], classes)))
    with torch.device("meta"):
        network = tl.DGLRule(width=width).auxiliary(here)
    assert shapes_of(network, nn.Conv2d) == convolutions
    assert shapes_of(network, nn.Linear) == layers


def test_convolutions_of_rules_are_bounded_on_wide_features() -> None:
    wide, vector = site((2, 512, 4, 4)), site((2, 512))
    rules: list[Callable[..., Rule]] = [tl.GreedyRule, tl.rules.PredSimRule, tl.rules.InfoProRule]
    for rule in rules:
        (first, *_) = shapes_of(rule().auxiliary(wide), nn.Conv2d)
        (bounded, *_) = shapes_of(rule(width=8).auxiliary(wide), nn.Conv2d)
        (published, *_) = shapes_of(rule(width=None).auxiliary(wide), nn.Conv2d)
        assert (first, bounded, published) == ((512, 64), (512, 8), (512, 512))
    assert shapes_of(tl.GreedyRule().auxiliary(vector), nn.Conv1d) == [(512, 256)]
    assert shapes_of(tl.rules.PredSimRule().auxiliary(vector), nn.Conv1d) == [(512, 256)]
    with pytest.raises(ValueError, match=r"^width: must be a whole number of at least 1, not 0$"):
        tl.DGLRule(width=0)
    with pytest.raises(ValueError, match=r"^width: is an option of the networks conv and mlp_sr; leave it out$"):
        tl.GreedyRule("linear", width=8)


def test_dgl_is_the_default_rule() -> None:
    net = tl.decouple(build_model("resnet20", num_classes=10, in_channels=1, image_size=(8, 8)), 3, sample=(2, 1, 8, 8))
    assert repr(net.rule) == repr(build_rule(FitConfig())) == "DGLRule(auxiliary='mlp_sr')"


def test_conv_has_stride_two_while_the_map_is_large() -> None:
    def convolution(shape: tuple[int, ...]) -> nn.Conv2d:
        return next(m for m in AUXILIARY_NETWORKS["conv"](site(shape)).modules() if isinstance(m, nn.Conv2d))

    assert (convolution((2, 16, 32, 32)).stride, convolution((2, 16, 32, 32)).out_channels) == ((2, 2), 32)
    assert (convolution((2, 64, 8, 8)).stride, convolution((2, 64, 8, 8)).out_channels) == ((1, 1), 64)
    assert convolution((2, 64, 32, 32)).out_channels == 128  # as published
    assert convolution((2, 65, 32, 32)).out_channels == 64  # wider features are reduced


@pytest.mark.parametrize(
    ("name", "size", "layout"),
    [
        ("torchvision:swin_t", (32, 32), -1),
        ("torchvision:vit_b_16", (32, 32), -1),
        ("torchvision:convnext_tiny", (32, 32), 1),
        ("resnet20", (16, 16), 1),
        ("mlp", (8, 8), 1),
    ],
)
def test_the_layout_is_found_even_where_the_shape_does_not_tell(name: str, size: tuple[int, int], layout: int) -> None:
    model = build_model(name, num_classes=7, in_channels=3, image_size=size)
    net = tl.decouple(model, "all", sample=(2, 3, *size), rule=tl.GreedyRule("linear"))
    assert {s.channel_dim for s in net.sites} == {layout}
    widths = {"torchvision:swin_t": {96, 192, 384, 768, 1536}, "torchvision:vit_b_16": {768}, "resnet20": {16, 32, 64}}
    assert name not in widths or {s.channels for s in net.sites} == widths[name]


def test_a_rule_of_ones_own() -> None:
    class Contrast(Rule):
        """Predict the target, and keep features of different images apart."""

        def auxiliary(self, site: Site) -> nn.Module:
            return nn.Sequential(nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(site.channels, site.num_outputs))

        def loss(self, site: Site, auxiliary: nn.Module, features: Tensor, batch: Batch) -> Tensor:
            seen.append((site.index, batch.input.shape))
            similarity = F.normalize(features.flatten(1)) @ F.normalize(features.flatten(1)).T
            return super().loss(site, auxiliary, features, batch) + similarity.square().mean()

    seen: list[tuple[int, torch.Size]] = []
    model = build_model("resnet20", num_classes=10, in_channels=3, image_size=(16, 16))
    x, y = torch.randn(4, 3, 16, 16), torch.tensor([1, 2, 3, 4])
    net = tl.decouple(model, 4, sample=x, rule=Contrast())
    losses = net.local_step(x, y)
    assert len(losses) == 4 and seen == [(k, x.shape) for k in range(3)]


def test_a_network_without_a_vector_of_outputs_needs_a_callable() -> None:
    model = nn.Sequential(nn.Conv2d(3, 4, 3, padding=1), nn.ReLU(), nn.Conv2d(4, 4, 3, padding=1), nn.Conv2d(4, 2, 1))
    with pytest.raises(ValueError, match="predict one vector per example; pass a callable"):
        tl.decouple(model, 2, sample=(2, 3, 8, 8))
    dense = tl.GreedyRule(lambda s: nn.Conv2d(s.channels, 2, 1))
    net = tl.decouple(model, 2, sample=(2, 3, 8, 8), rule=dense)
    assert len(net.local_step(torch.randn(2, 3, 8, 8), torch.zeros(2, 8, 8, dtype=torch.long))) == 2
