"""The local rules against their papers: losses by another way of computing, networks by their published sizes."""

from __future__ import annotations

import itertools
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import torchlocal as tl
from torchlocal.models import build_model
from torchlocal.rules import Batch, Rule, Site, make_rule, published_weights
from torchlocal.rules.auglocal import auxiliary_depth, sampled_units
from torchlocal.rules.downstream import reinitialise
from torchlocal.rules.infopro import PUBLISHED_WEIGHTS, UpsampledConv, supervised_contrast
from torchlocal.rules.layers import BlockMean, GlobalMean, SpatialStd
from torchlocal.rules.predsim import similarity
from torchlocal.run.config import FitConfig, build_rule


def site(shape: tuple[int, ...], *, index: int = 0, num_modules: int = 4, channel_dim: int = 1) -> Site:
    return Site(
        index=index,
        num_modules=num_modules,
        feature_shape=torch.Size(shape),
        channel_dim=channel_dim,
        input_shape=torch.Size((shape[0], 3, 16, 16)),
        output_shape=torch.Size((shape[0], 7)),
    )


def batch(num_examples: int, *, num_classes: int = 7) -> Batch:
    images, labels = torch.randn(num_examples, 3, 16, 16), torch.arange(num_examples) % num_classes
    return Batch(input=images, target=labels, criterion=F.cross_entropy)


def numpy_similarity(rows: np.ndarray) -> np.ndarray:
    """Pearson's correlation of every pair of rows, as NumPy has it."""
    return np.corrcoef(rows)


def softmax_error(scores: np.ndarray, labels: np.ndarray) -> float:
    shifted = scores - scores.max(1, keepdims=True)
    log_probability = shifted - np.log(np.exp(shifted).sum(1, keepdims=True))
    return float(-log_probability[np.arange(len(labels)), labels].mean())


def net32(rule: Rule) -> tl.DecoupledNetwork:
    torch.manual_seed(0)
    model = build_model("resnet32", num_classes=10)
    return tl.decouple(model, 16, sample=(2, 3, 32, 32), rule=rule)


def sizes(net: tl.DecoupledNetwork) -> list[int]:
    return [sum(p.numel() for p in network.parameters()) for network in net.auxiliary]


# --- sizes: ResNet-32, K = 16, 10 classes ---


@pytest.mark.parametrize(("name", "published"), [("dgl", 838), ("predsim", 284), ("infopro", 449)])
def test_auxiliary_networks_have_the_published_size(name: str, published: int) -> None:
    assert round(sum(sizes(net32(make_rule(name)))) / 1000) == published


def test_auglocal_has_the_published_size() -> None:
    """The published 1.34M are those of the first 13 modules: the authors train the last d + 1 = 3 blocks as one."""
    found = sizes(net32(make_rule("auglocal", {"depth": 2})))

    def block(given: int, width: int, *, shortcut: bool) -> int:
        return 9 * given * width + 9 * width**2 + 4 * width + shortcut * (given * width + 2 * width)

    half, end, head = block(16, 32, shortcut=True), block(64, 64, shortcut=False), 650
    up = block(32, 64, shortcut=True)
    by_hand = [half + up + head] * 6 + [block(32, 32, shortcut=False) + up + head] + [up + end + head] * 4
    by_hand += [2 * end + head] * 3 + [end + head]
    assert found == by_hand
    assert sum(found[:13]) == 1_341_058
    together = make_rule("auglocal", {"depth": 2, "together": True})
    model = build_model("resnet32", num_classes=10)
    net = tl.decouple(model, "all", sample=(2, 3, 32, 32), rule=together)
    assert [list(g) for g in net.partition.groups] == [[i] for i in range(13)] + [[13, 14, 15]]
    assert sizes(net) == by_hand[:13]


def test_the_last_units_of_auglocal_together() -> None:
    model, sample = build_model("resnet20", num_classes=10), (128, 3, 16, 16)
    rule = tl.rules.AugLocalRule(depth=3, together=True)
    for modules in (1, 2, 4, 7):
        net = tl.decouple(model, modules, sample=sample, rule=rule, cost="flops")
        groups = net.partition.groups
        assert len(groups) == modules and groups[-1].stop == 10 and groups[-1].start <= 6
        assert [i for g in groups for i in g] == list(range(10))
        flops = [unit.flops for unit in net.partition.units]
        assert net.partition.costs == tuple(float(sum(flops[i] for i in g)) for g in groups)
    assert tl.decouple(model, "fewest", sample=sample, rule=rule).num_modules <= 7
    assert {row.modules for row in tl.plan(model, sample, modules=(7, 8, "all"), rule=rule).rows} == {1, 7}
    ahead = tl.rules.ManRule(rule)
    assert ahead.units_at_end == 4 and tl.decouple(model, "all", sample=sample, rule=ahead).num_modules == 7
    with pytest.raises(ValueError, match=r"^modules: 8 local modules .* last 4 of 10 units together, so there are 7"):
        tl.decouple(model, 8, sample=sample, rule=rule)
    with pytest.raises(ValueError, match=r"^rule: AugLocalRule.*the last 4 units are one module; .* no cuts$"):
        tl.decouple(model, cuts=["layer1"], sample=sample, rule=rule)
    with pytest.raises(ValueError, match=r"^together: must be True or False, not 3$"):
        tl.rules.AugLocalRule(together=3)  # type: ignore[arg-type]


# --- PredSim ---


def test_predsim_loss_by_numpy() -> None:
    torch.manual_seed(0)
    here, data = site((6, 8, 16, 16)), batch(6)
    rule = tl.rules.PredSimRule(features=64)
    network = rule.auxiliary(here)
    nn.init.normal_(network.classifier.weight)  # type: ignore[union-attr, arg-type]
    features = torch.randn(here.feature_shape)
    loss = rule.loss(here, network, features, data)
    state = {name: tensor.numpy() for name, tensor in network.state_dict().items()}
    padded = np.pad(features.numpy(), ((0, 0), (0, 0), (1, 1), (1, 1)))
    windows = np.lib.stride_tricks.sliding_window_view(padded, (3, 3), axis=(2, 3))
    maps = np.einsum("nchwij,ocij->nohw", windows, state["projection.weight"])
    alike = numpy_similarity(maps.reshape(6, 8, -1).std(2, ddof=1))
    wanted = numpy_similarity(np.eye(7)[data.target.numpy()])
    pooled = features.numpy().reshape(6, 8, 2, 8, 4, 4).mean((3, 5))  # 8 · 2 · 4 = 64 numbers
    scores = pooled.reshape(6, -1) @ state["classifier.weight"].T + state["classifier.bias"]
    expected = 0.99 * ((alike - wanted) ** 2).mean() + 0.01 * softmax_error(scores, data.target.numpy())
    assert loss.item() == pytest.approx(expected, rel=1e-4)
    torch.testing.assert_close(rule.predict(here, network, features).detach().numpy(), scores, rtol=1e-4, atol=1e-5)


def test_predsim_of_one_loss_only() -> None:
    torch.manual_seed(0)
    here, data, features = site((6, 8, 16, 16)), batch(6), torch.randn(6, 8, 16, 16)
    pred, sim = tl.rules.PredSimRule("pred"), tl.rules.PredSimRule("sim")
    network = pred.auxiliary(here)
    expected = F.cross_entropy(pred.predict(here, network, features), data.target)
    torch.testing.assert_close(pred.loss(here, network, features, data), expected)
    network = sim.auxiliary(here)
    features.requires_grad_()
    loss = sim.loss(here, network, features, data)
    maps = F.conv2d(features, network.projection.weight, padding=1)  # type: ignore[union-attr, arg-type]
    wanted = similarity(F.one_hot(data.target, 7).float())
    torch.testing.assert_close(loss, F.mse_loss(similarity(maps.flatten(2).std(2)), wanted), rtol=1e-4, atol=1e-6)
    # The probe learns from the features, which learn nothing from it.
    (through_loss,) = torch.autograd.grad(loss, features, retain_graph=True)
    (alone,) = torch.autograd.grad(F.mse_loss(similarity(maps), wanted), features)
    torch.testing.assert_close(through_loss, alone)
    loss.backward()
    assert all(p.grad.abs().sum() > 0 for p in network.probe.parameters())  # type: ignore[union-attr]


def test_predsim_without_backpropagation() -> None:
    """Bits are predicted, errors come back through the fixed weights, similarities are those of the pooled features."""
    torch.manual_seed(0)
    here, data = site((6, 8, 4, 4)), batch(6)
    rule = tl.rules.PredSimRule(backpropagation_free=True, bits=32)
    network = rule.auxiliary(here)
    features = torch.randn(here.feature_shape, requires_grad=True)
    loss = rule.loss(here, network, features, data)
    bits = network.bits[:, data.target].T  # type: ignore[index]
    scores = features.flatten(1) @ network.classifier.weight.T + network.classifier.bias  # type: ignore[union-attr, operator]
    pred = F.binary_cross_entropy_with_logits(scores, (bits > 0).float())
    sim = F.mse_loss(similarity(features), similarity(bits))
    torch.testing.assert_close(loss, 0.99 * sim + 0.01 * pred)
    (gradient,) = torch.autograd.grad(loss, features, retain_graph=True)
    error = (scores.sigmoid() - (bits > 0).float()) / scores.numel()
    (of_sim,) = torch.autograd.grad(sim, features)
    by_hand = 0.99 * of_sim + 0.01 * (error @ network.classifier.feedback).view_as(features)  # type: ignore[union-attr, operator]
    torch.testing.assert_close(gradient, by_hand)
    # The class whose bits are the likeliest has the best score.
    of_class = (network.bits > 0).float().T[None].expand(6, 7, 32)  # type: ignore[operator]
    given = scores[:, None].expand(6, 7, 32)
    likely = -F.binary_cross_entropy_with_logits(given, of_class, reduction="none").sum(2)
    predicted = rule.predict(here, network, features)
    torch.testing.assert_close(predicted - predicted[:, :1], likely - likely[:, :1], rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("layout", [torch.contiguous_format, torch.channels_last])
def test_fast_layers_are_exact(layout: torch.memory_format) -> None:
    torch.manual_seed(0)
    maps = torch.randn(2, 4, 6, 9, dtype=torch.float64).to(memory_format=layout).requires_grad_()
    torch.testing.assert_close(SpatialStd.apply(maps), maps.std((2, 3)))
    torch.testing.assert_close(BlockMean((2, 3))(maps), F.avg_pool2d(maps, (2, 3)))
    assert torch.autograd.gradcheck(SpatialStd.apply, maps)
    assert torch.autograd.gradcheck(BlockMean((2, 3)), maps)
    torch.testing.assert_close(GlobalMean()(maps), maps.mean((2, 3)))
    assert torch.autograd.gradcheck(GlobalMean(), maps)
    (gradient,) = torch.autograd.grad(GlobalMean()(maps).square().sum(), maps)
    assert gradient.is_contiguous(memory_format=layout)
    constant = torch.ones_like(maps).requires_grad_()
    SpatialStd.apply(constant).sum().backward()
    assert constant.grad is not None and constant.grad.abs().max() == 0
    for dtype, (rows, columns) in itertools.product((torch.float32, torch.bfloat16), ((4, 4), (7, 3))):
        maps = torch.randn(3, 2, 4 * rows, 5 * columns, dtype=dtype, requires_grad=True)
        gradient = torch.randn(3, 2, 4, 5, dtype=dtype)
        BlockMean((rows, columns))(maps).backward(gradient)
        shares = (gradient / (rows * columns)).repeat_interleave(rows, 2).repeat_interleave(columns, 3)
        assert maps.grad is not None and torch.equal(maps.grad, shares)


# --- InfoPro ---


def test_infopro_loss_by_hand() -> None:
    torch.manual_seed(0)
    here, data = site((6, 8, 4, 4), index=1), batch(6)
    rule = tl.rules.InfoProRule(weights=[[5, 0.5], [1, 2.5]])
    network = rule.auxiliary(here)
    features = torch.randn(here.feature_shape)
    loss = rule.loss(here, network, features, data)
    first, norm, last = (network.decoder[i] for i in (1, 2, 4))  # type: ignore[index]
    large = F.interpolate(features, size=(16, 16), mode="bilinear", align_corners=True)
    hidden = F.conv2d(large, first.weight, first.bias, padding=1)
    hidden = F.batch_norm(hidden, None, None, norm.weight, norm.bias, training=True).relu()
    decoded = torch.sigmoid(F.conv2d(hidden, last.weight, last.bias, padding=1)).detach().double().numpy()
    low, high = data.input.amin((0, 2, 3), keepdim=True), data.input.amax((0, 2, 3), keepdim=True)
    image = ((data.input - low) / (high - low)).double().numpy()
    reconstruction = -(image * np.log(decoded) + (1 - image) * np.log(1 - decoded)).mean()
    task = F.cross_entropy(rule.predict(here, network, features), data.target).item()
    # The second of three modules with an auxiliary network: half way.
    assert loss.item() == pytest.approx(3 * reconstruction + 1.5 * task, rel=1e-4)


def test_infopro_undoes_the_normalisation() -> None:
    pixels = torch.rand(4, 3, 16, 16)
    pixels[0, :, 0, 0], pixels[0, :, 0, 1] = 0, 1
    mean, std = [0.4, 0.5, 0.6], [0.2, 0.25, 0.3]
    x = (pixels - torch.tensor(mean).view(3, 1, 1)) / torch.tensor(std).view(3, 1, 1)
    for options in ({}, {"mean": mean, "std": std}):
        network = tl.rules.InfoProRule(**options).auxiliary(site((4, 8, 4, 4)))  # type: ignore[arg-type]
        torch.testing.assert_close(network.image(x), pixels)  # type: ignore[operator]


def test_supervised_contrast_by_its_definition() -> None:
    torch.manual_seed(0)
    rows = F.normalize(torch.randn(6, 5, dtype=torch.float64), dim=1)
    labels = [0, 1, 0, 2, 1, 0]  # the fourth example is alone
    z, total = rows.numpy(), 0.0
    for i in range(6):
        positives = [j for j in range(6) if j != i and labels[j] == labels[i]]
        scale = sum(np.exp(z[i] @ z[a] / 0.07) for a in range(6) if a != i)
        total -= sum(np.log(np.exp(z[i] @ z[p] / 0.07) / scale) for p in positives) / max(1, len(positives)) / 6
    same = torch.tensor(labels)[:, None] == torch.tensor(labels)
    assert supervised_contrast(rows, same, 0.07).item() == pytest.approx(total)


def test_infopro_contrast_and_its_probe() -> None:
    torch.manual_seed(0)
    here, data = site((6, 8, 4, 4), index=2), batch(6, num_classes=3)
    rule = tl.rules.InfoProRule("contrast", weights=[[1, 1], [0, 2]])
    network = rule.auxiliary(here)
    assert network.decoder is None  # of weight 0 there
    features = torch.randn(here.feature_shape, requires_grad=True)
    rows = F.normalize(network.task(features), dim=1)  # type: ignore[operator]
    expected = 2 * supervised_contrast(rows, data.target[:, None] == data.target, 0.07)
    loss = rule.loss(here, network, features, data)
    torch.testing.assert_close(loss, expected)
    (gradient,) = torch.autograd.grad(loss, features, retain_graph=True)
    torch.testing.assert_close(gradient, torch.autograd.grad(expected, features)[0])
    assert rule.predict(here, network, features).shape == (6, 7)


def test_a_task_weight_of_zero_leaves_a_probe() -> None:
    torch.manual_seed(0)
    here, data = site((6, 8, 4, 4)), batch(6)
    rule = tl.rules.InfoProRule(weights=[[0, 0], [0, 1]])
    network = rule.auxiliary(here)
    features = torch.randn(here.feature_shape, requires_grad=True)
    loss = rule.loss(here, network, features, data)
    assert loss.item() == 0
    loss.backward()
    assert features.grad is None
    assert network.probe is not None and all(p.grad is not None for p in network.probe.parameters())


@pytest.mark.parametrize(
    ("channels", "small", "size", "taps_first"),
    [
        (64, (8, 8), (32, 32), True),
        (64, (4, 7), (19, 23), True),
        (8, (1, 1), (6, 6), True),
        (2, (8, 8), (16, 16), False),
        (4, (5, 5), (5, 5), False),
    ],
)
def test_taps_before_interpolation_change_nothing(
    channels: int, small: tuple[int, int], size: tuple[int, int], taps_first: bool
) -> None:
    torch.manual_seed(0)
    layer = UpsampledConv(channels, 5, small, size)
    assert layer.taps_first == taps_first
    maps = torch.randn(3, channels, *small, requires_grad=True)
    plain = F.interpolate(maps, size=size, mode="bilinear", align_corners=True)
    plain = F.conv2d(plain, layer.weight, layer.bias, padding=1)
    result = layer(maps)
    torch.testing.assert_close(result, plain, rtol=1e-4, atol=1e-5)
    wanted = [maps, layer.weight, layer.bias]
    gradient = torch.randn_like(plain)
    pairs = zip(
        torch.autograd.grad(result, wanted, gradient),  # type: ignore[arg-type]
        torch.autograd.grad(plain, wanted, gradient),  # type: ignore[arg-type]
        strict=True,
    )
    for mine, theirs in pairs:
        torch.testing.assert_close(mine, theirs, rtol=1e-3, atol=1e-4)


def test_published_weights() -> None:
    assert published_weights("cifar10", "resnet110", 4) == ((1, 0), (0, 1))
    assert published_weights("stl10", "resnet110", 16) == ((20, 0.5), (10, 0.1))
    assert published_weights("cifar10", "resnet110", 55) == PUBLISHED_WEIGHTS["cifar10", "resnet110", 16]
    assert published_weights("cifar10", "resnet110", 3) == PUBLISHED_WEIGHTS["cifar10", "resnet110", 4]
    assert published_weights("svhn", "resnet32", 8) == PUBLISHED_WEIGHTS["svhn", "resnet110", 8]
    assert published_weights("fashion-mnist", "resnet32", 16) == ((5, 0.05), (0.2, 0.5))
    rule = tl.rules.InfoProRule(published=("cifar10", "resnet110"))
    assert [rule.weights(site((2, 8, 4, 4), index=k, num_modules=8)) for k in (0, 6)] == [(5, 0), (0, 1)]
    assert rule.weights(site((2, 8, 4, 4), num_modules=2)) == (5, 0.5)


def test_the_commands_give_the_runs_published_weights() -> None:
    options: dict[str, Any] = {"data": "svhn", "model": "resnet110"}
    for config in (
        FitConfig.of(rule="infopro", **options),
        FitConfig.of(rule="man", rule_options={"base": "infopro", "base_options": {"task": "contrast"}}, **options),
    ):
        assert "published for svhn, resnet110" in repr(build_rule(config))
    given = {"base": "infopro", "base_options": {"published": ["cifar10", "resnet32"]}}
    assert "published for cifar10, resnet32" in repr(
        build_rule(FitConfig.of(rule="man", rule_options=given, **options))
    )


def test_rules_that_differ_have_other_names() -> None:
    """Modules on several processes compare them to make sure that all have the same rule."""
    rules = [
        tl.rules.InfoProRule(task, **{name: value})
        for task in ("contrast", "softmax")
        for name, value in (("temperature", 0.1), ("projection", 64), ("decoder_width", 8), ("auxiliary", "mlp_sr"))
        if task == "contrast" or name not in ("temperature", "projection")
    ]
    rules += [tl.rules.InfoProRule(), tl.rules.InfoProRule(mean=[0.5], std=[0.2]), tl.rules.InfoProRule("contrast")]
    assert len(set(map(repr, rules))) == len(rules)


# --- AugLocal ---


def test_auglocal_samples_evenly_and_in_a_pyramid() -> None:
    assert sampled_units(0, 16, 2) == [8, 15] and sampled_units(0, 16, 3) == [5, 10, 15]
    assert sampled_units(13, 16, 5) == [14, 15]
    assert all(sampled_units(p, 55, d)[-1] == 54 for p in range(54) for d in range(1, 9))
    assert [auxiliary_depth(5, k / 4, 1.0) for k in range(5)] == [5, 4, 3, 2, 1]
    assert [auxiliary_depth(5, k / 4, 0.5) for k in range(5)] == [5, 4, 4, 4, 3]
    assert auxiliary_depth(5, 1.0, 0.0) == 5


def test_auglocal_is_built_of_fresh_residual_blocks() -> None:
    """Unit 8 (32 channels) and unit 15 (64 channels) after the stem: 16 channels at 32×32 come in."""
    net = net32(make_rule("auglocal", {"depth": 2}))
    first, last = net.auxiliary[0].children()
    convolutions = [m for m in first.modules() if isinstance(m, nn.Conv2d)]
    assert sorted((c.in_channels, c.out_channels, c.stride, c.kernel_size) for c in convolutions) == [
        (16, 32, (2, 2), (1, 1)), (16, 32, (2, 2), (3, 3)), (32, 32, (1, 1), (3, 3)),
    ]  # fmt: skip
    assert first(torch.randn(2, 16, 32, 32)).shape == (2, 32, 16, 16)
    assert last(torch.randn(2, 32, 16, 16)).shape == (2, 10)
    own = {p.data_ptr() for p in net.backbone.parameters()}
    assert not own & {p.data_ptr() for p in net.auxiliary.parameters()}
    copied, original = last.get_submodule("fc").weight, net.backbone.fc.weight  # type: ignore[union-attr]
    assert not torch.equal(copied, original) and torch.allclose(copied.std(), original.std(), rtol=0.2)  # type: ignore[arg-type, operator]


def test_auglocal_of_depth_one_has_a_norm_before_the_classifier() -> None:
    net = net32(make_rule("auglocal", {"depth": 1}))
    norms = [m for m in net.auxiliary[3].modules() if isinstance(m, nn.BatchNorm1d)]
    assert [m.num_features for m in norms] == [64]


def test_drawn_anew() -> None:
    torch.manual_seed(0)
    module = nn.Sequential(nn.Conv2d(8, 64, 3), nn.BatchNorm2d(64), nn.LayerNorm(4))
    module.register_parameter("scale", nn.Parameter(torch.full((5,), 1e-6)))
    nn.init.normal_(module[0].weight, 0.5, 0.02)  # type: ignore[arg-type]
    with torch.no_grad():
        module(torch.randn(2, 8, 6, 6))
        module[1].weight.uniform_()  # type: ignore[union-attr, operator]
    before = module[0].weight.clone()  # type: ignore[union-attr, operator]
    reinitialise(module)
    after: Tensor = module[0].weight  # type: ignore[assignment]
    both = torch.stack([before.flatten(), after.flatten()]).detach()
    assert torch.corrcoef(both)[0, 1].abs() < 0.1
    assert after.mean().item() == pytest.approx(0.5, abs=0.002) and after.std().item() == pytest.approx(0.02, rel=0.05)
    assert module[1].weight.eq(1).all() and module[1].running_mean.eq(0).all()  # type: ignore[union-attr, operator]
    assert module.scale.eq(1e-6).all()  # type: ignore[union-attr, operator]


# --- MAN ---


def test_man_adds_an_average_of_the_next_unit_and_a_learnable_one() -> None:
    torch.manual_seed(0)
    net = net32(make_rule("man", {"base_options": {"auxiliary": "linear"}, "momentum": 0.9}))
    rule, here, ahead = net.rule, net.sites[4], net.auxiliary[4]
    block = net.backbone.get_submodule("layer1.4")
    before = {name: p.clone() for name, p in block.named_parameters()}
    names = [f"average.layer1.4.{name}" for name in before]
    assert set(names) <= set(dict(ahead.named_buffers())) and not set(names) & set(dict(ahead.named_parameters()))
    with torch.no_grad():
        for parameter in block.parameters():
            parameter.add_(1)
    features, data = torch.randn(2, 16, 32, 32), Batch(
        input=torch.randn(2, 3, 32, 32), target=torch.tensor([3, 4]), criterion=F.cross_entropy
    )  # fmt: skip
    loss = rule.loss(here, ahead, features, data)
    for name, value in before.items():
        torch.testing.assert_close(ahead.get_buffer(f"average.layer1.4.{name}"), value + 0.1)
    average = build_model("resnet32", num_classes=10).get_submodule("layer1.4")
    learnable = build_model("resnet32", num_classes=10).get_submodule("layer1.4")
    for module, source in ((average, ahead.average), (learnable, ahead.learnable)):  # type: ignore[union-attr]
        state = {k.removeprefix("layer1.4."): v for k, v in source.state_dict().items()}  # type: ignore[union-attr, operator]
        module.load_state_dict(state)
    expected = F.cross_entropy(ahead.base(average(features) + learnable(features)), data.target)  # type: ignore[operator]
    torch.testing.assert_close(loss, expected)
    loss.backward()
    assert all(p.grad is None for p in net.backbone.parameters())
    assert all(p.grad is not None for p in ahead.parameters())
    frozen = ahead.get_buffer(names[0]).clone()
    rule.predict(here, ahead, features)
    assert torch.equal(frozen, ahead.get_buffer(names[0]))


def test_man_ends_before_the_head() -> None:
    net = net32(make_rule("man"))
    last = net.auxiliary[-1]
    assert last(torch.randn(2, 64, 8, 8)).shape == (2, 64, 8, 8)
    assert not any("fc" in name for name, _ in last.average.named_buffers())  # type: ignore[union-attr, operator]
