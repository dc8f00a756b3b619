"""Every rule in every kind of step, on convolutional and token features, by name, by recipe and of one's own."""

from __future__ import annotations

import copy
import re
import runpy
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode
from torchvision.models import ConvNeXt, SwinTransformer, VisionTransformer
from torchvision.models.convnext import CNBlockConfig

import torchlocal as tl
from torchlocal.cli.options import recipe_names, recipe_options
from torchlocal.compare.comparison import CompareConfig
from torchlocal.cut.forward import Pass
from torchlocal.models import LocalVGG, build_model, mlp
from torchlocal.rules import RULES, make_rule
from torchlocal.run.config import FitConfig, build_rule, declared, fit_options

ROOT = Path(__file__).resolve().parents[2]
FOR_IMAGES = [name for name in RULES if name not in ("solo", "lopt")]  # these have files of their own
OPTIONS: dict[str, tuple[str, dict[str, Any]]] = {name: (name, {}) for name in FOR_IMAGES} | {
    "predsim-sim": ("predsim", {"loss": "sim"}),
    "predsim-free": ("predsim", {"backpropagation_free": True}),
    "infopro-contrast": ("infopro", {"task": "contrast", "weights": [[5, 0.05], [0.2, 0.5]]}),
    "auglocal-1": ("auglocal", {"depth": 1}),
    "man-infopro": ("man", {"base": "infopro"}),
    "man-auglocal": ("man", {"base": "auglocal"}),
}


def resnet() -> nn.Module:
    return build_model("resnet20", num_classes=5, image_size=(16, 16))


def vit() -> nn.Module:
    sizes = {"num_layers": 3, "num_heads": 2, "hidden_dim": 12, "mlp_dim": 24}
    model = VisionTransformer(image_size=16, patch_size=4, num_classes=5, **sizes)
    nn.init.normal_(
        model.heads.head.weight, std=0.1
    )  # it is made zero, and then nothing below learns in the first step
    return model


def swin() -> nn.Module:
    return SwinTransformer([2, 2], 8, [1, 1], [2, 2], [4, 4], num_classes=5)


NETWORKS: dict[str, Callable[[], nn.Module]] = {"resnet": resnet, "vit": vit, "swin": swin}


def make(name: str, network: str = "resnet", modules: int | str = 4) -> tl.DecoupledNetwork:
    torch.manual_seed(0)
    return tl.decouple(NETWORKS[network](), modules, sample=(6, 3, 16, 16), rule=make_rule(*OPTIONS[name]))


def data() -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(0)
    return torch.randn(6, 3, 16, 16, generator=generator), torch.tensor([0, 1, 2, 0, 1, 2])


@pytest.mark.parametrize(
    ("name", "network"), [(n, m) for n in OPTIONS for m in NETWORKS if m == "resnet" or n in FOR_IMAGES]
)
def test_local_and_guided_steps(name: str, network: str) -> None:
    net, (x, y) = make(name, network), data()
    optimizer = torch.optim.SGD(net.parameters(), lr=0.01)

    def step(run: Callable[..., list[Tensor]], **options: Any) -> list[Tensor]:
        before = [p.detach().clone() for p in net.backbone.parameters()]
        losses = run(x, y, **options)
        assert all(loss.ndim == 0 and loss.isfinite() and not loss.requires_grad for loss in losses)
        assert all(p.grad is None or p.grad.isfinite().all() for p in net.parameters())
        optimizer.step()
        optimizer.zero_grad()
        moved = [not torch.equal(a, b) for a, b in zip(before, net.backbone.parameters(), strict=True)]
        assert sum(moved) > 0.7 * len(moved)
        return losses

    assert len(step(net.local_step)) == net.num_modules
    assert len(step(net.guided_step)) == net.num_modules
    assert len(step(net.guided_step, auxiliary="frozen")) == 1
    step(net.guided_step, recompute="modules")
    step(net.local_step, autocast=torch.bfloat16)
    step(net.local_step, recompute={})
    net.eval()
    buffers = [b.clone() for b in net.buffers()]
    assert [output.shape for output in net.depth_outputs(x)] == [(6, 5)] * net.num_modules
    assert all(torch.equal(a, b) for a, b in zip(buffers, net.buffers(), strict=True))


@pytest.mark.parametrize("name", FOR_IMAGES)
def test_guided_steps_within_the_local_peak(name: str) -> None:
    torch.manual_seed(0)
    widths = [(3, 8, 1), (8, 8, 1), (8, 16, 2), (16, 16, 1)]
    blocks = [nn.Sequential(nn.Conv2d(i, o, 3, s, 1), nn.BatchNorm2d(o), nn.ReLU()) for i, o, s in widths]
    head = nn.Sequential(nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(16, 5))
    x, y = (torch.cat([t] * 8) for t in data())
    net = tl.decouple(nn.Sequential(*blocks, head), "all", sample=x, rule=name)
    losses = net.guided_step(x, y, memory="local")
    assert len(losses) == net.num_modules and all(loss.isfinite() for loss in losses)
    peaks = [
        tl.memory.predict(net, x, y, step=s, **o).peak_bytes
        for s, o in (("local", {}), ("guided", {"memory": "local"}))
    ]
    assert peaks[1] <= peaks[0]


@pytest.mark.parametrize("network", ["resnet", "vit"])
@pytest.mark.parametrize("name", OPTIONS)
def test_no_gradient_crosses_a_cut(name: str, network: str) -> None:
    net, (x, y) = make(name, network), data()
    batch = tl.rules.Batch(input=x, target=y, criterion=net.criterion)
    lists = net.module_parameters()
    state: list[Tensor] = []
    for k, group in enumerate(net.partition.groups[:-1]):
        pass_ = Pass(net.chain, x, replay=True)
        with pass_.opened():
            (features,) = pass_.run(group.start, group.stop, state)
        state = [features.detach()]
        net.rule.loss(net.sites[k], net.auxiliary[k], features, batch).backward()
        for j, parameters in enumerate(lists):
            given = [p.grad is not None for p in parameters]
            assert not any(given) if j != k else sum(given) > 0.5 * len(given)
        net.zero_grad()


@pytest.mark.parametrize("name", OPTIONS)
def test_recomputing_changes_nothing(name: str) -> None:
    net, (x, y) = make(name), data()
    other = copy.deepcopy(net)
    losses = [net.guided_step(x, y), other.guided_step(x, y, recompute="modules")]
    assert all(torch.equal(a, b) for a, b in zip(*losses, strict=True))
    for (key, mine), theirs in zip(net.state_dict().items(), other.state_dict().values(), strict=True):
        assert torch.equal(mine, theirs), key
    for a, b in zip(net.parameters(), other.parameters(), strict=True):
        assert (a.grad is None) == (b.grad is None)
        assert a.grad is None or torch.equal(a.grad, b.grad)  # type: ignore[arg-type]


def test_compiled_networks_learn_the_same() -> None:
    for name in ("predsim", "infopro", "man"):
        net, (x, y) = make(name), data()
        losses = copy.deepcopy(net).local_step(x, y)
        net.compile(backend="eager")
        torch.testing.assert_close(net.local_step(x, y), losses)


class _NoReading(TorchDispatchMode):
    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        assert func not in (torch.ops.aten._local_scalar_dense.default, torch.ops.aten.nonzero.default), func
        return func(*args, **(kwargs or {}))


@pytest.mark.parametrize("name", OPTIONS)
def test_no_step_reads_a_value_back(name: str) -> None:
    net, (x, y) = make(name), data()
    with _NoReading():
        net.local_step(x, y)
    with pytest.raises(AssertionError, match="_local_scalar_dense"), _NoReading():
        x.sum().item()


@pytest.mark.parametrize("name", ["predsim", "infopro-contrast"])
def test_probabilities_as_targets(name: str) -> None:
    net, (x, y) = make(name), data()
    once = net.local_step(x, y)
    twice = make(name).local_step(x, nn.functional.one_hot(y, 5).float())
    torch.testing.assert_close(once, twice)
    with pytest.raises(ValueError, match=r"class indices \(N,\) or probabilities \(N, 5\), not shape \(6, 16, 16\)"):
        net.rule.loss(
            net.sites[1],
            net.auxiliary[1],
            torch.randn(net.sites[1].feature_shape),
            tl.rules.Batch(input=x, target=torch.zeros(6, 16, 16), criterion=lambda output, _: output.sum()),
        )


@pytest.mark.parametrize("name", OPTIONS)
def test_rules_learn(name: str) -> None:
    """A few local steps on one batch lower every loss."""
    net, (x, y) = make(name), data()
    optimizer = torch.optim.SGD(net.parameters(), lr=0.03, momentum=0.9)
    losses = []
    for _ in range(6):
        losses.append(torch.stack(net.local_step(x, y)))
        optimizer.step()
        optimizer.zero_grad()
    assert (losses[-1] < losses[0]).all()


def test_averages_are_in_the_checkpoint() -> None:
    net, (x, y) = make("man"), data()
    optimizer = torch.optim.SGD(net.parameters(), lr=0.05)
    for _ in range(3):
        net.local_step(x, y)
        optimizer.step()
        optimizer.zero_grad()
    resumed = make("man")
    resumed.load_state_dict(net.state_dict())
    assert all(torch.equal(a, b) for a, b in zip(net.local_step(x, y), resumed.local_step(x, y), strict=True))
    for (key, mine), theirs in zip(net.state_dict().items(), resumed.state_dict().values(), strict=True):
        assert torch.equal(mine, theirs), key
    moved = [k for k in net.state_dict() if ".average." in k and "weight" in k]
    fresh = make("man").state_dict()
    assert moved and not any(torch.equal(fresh[k], net.state_dict()[k]) for k in moved)


def test_units_of_other_layouts_are_fitted() -> None:
    """VGG ends in vectors, so what is sampled takes a pooled and projected map; the MLP has nothing but vectors."""
    blocks = [CNBlockConfig(8, 16, 2), CNBlockConfig(16, None, 2)]
    models = [LocalVGG([8, 16, "M", 16, "M"], 5, 3, (16, 16)), ConvNeXt(blocks, num_classes=5), mlp(5, 3, (16, 16))]
    x, y = data()
    for model in models:
        net = tl.decouple(model, 3, sample=x, rule="auglocal")
        assert all(loss.isfinite() for loss in net.local_step(x, y))


def test_infopro_says_where_it_cannot_work() -> None:
    model = build_model("mlp", num_classes=5, image_size=(16, 16))
    with pytest.raises(
        ValueError, match=r"features of shape \(6, 1024\) cannot be laid out as one of the shape of 16×16"
    ):
        tl.decouple(model, 2, sample=(6, 3, 16, 16), rule="infopro")


# --- names, options, recipes ---


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"rule": "predsim", "rule_options": {"betta": 1}}, r"^rule: 'predsim' has no option 'betta'; did you mean 'b"),
        ({"rule": "predsim", "rule_options": {"beta": 2}}, r"^rule_options.beta: must be a number from 0 to 1, not 2$"),
        ({"rule": "predsim", "rule_options": {"loss": "all"}}, r"^rule_options.loss: must be one of predsim, pred"),
        ({"rule": "infopro", "rule_options": {"task": "x"}}, r"^rule_options.task: must be 'softmax' or 'contrast'"),
        ({"rule": "infopro", "rule_options": {"weights": [1]}}, r"^rule_options.weights: must be two pairs"),
        ({"rule": "infopro", "rule_options": {"mean": [0.5]}}, r"^mean, std: give both"),
        ({"rule": "auglocal", "rule_options": {"depth": 0}}, r"^rule_options.depth: must be a whole number of at"),
        ({"rule": "auglocal", "rule_options": {"pyramid": 2}}, r"^rule_options.pyramid: must be a number from 0 to 1"),
        ({"rule": "man", "rule_options": {"momentum": 2}}, r"^rule_options.momentum: must be a number from 0 to 1"),
        ({"rule": "man", "rule_options": {"base": "man"}}, r"^rule_options.base: must be another rule"),
        ({"rule": "man", "rule_options": {"base": "mann"}}, r"^rule: no rule named 'mann'"),
        ({"rule": "auglocal", "auxiliary": "linear"}, r"^auxiliary='linear' means nothing to rule='auglocal'"),
        ({"rule": "dgl", "rule_options": [1]}, r"^rule_options=\[1\] must be `name: value` pairs"),
    ],
)  # fmt: skip
def test_wrong_options(values: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        FitConfig.of(**values)


def test_options_of_a_run_reach_the_rule() -> None:
    config = FitConfig.of(rule="auglocal", rule_options={"depth": 4, "pyramid": 0})
    assert repr(build_rule(config)) == "AugLocalRule(depth=4, pyramid=0)"
    assert FitConfig.of(**config.plain()) == config
    assert repr(build_rule(FitConfig.of(rule="dgl"))) == "DGLRule(auxiliary='mlp_sr')"
    assert repr(build_rule(FitConfig.of(rule="greedy"))) == "GreedyRule(auxiliary='conv')"
    assert repr(build_rule(FitConfig.of(auxiliary="linear"))) == "DGLRule(auxiliary='linear')"
    infopro = build_rule(FitConfig.of(rule="infopro", data="stl10", model="resnet110"))
    site = make("infopro").sites[0]
    assert isinstance(infopro, tl.rules.InfoProRule) and infopro.weights(site) == (20, 0.2)


# One of each network and data set; the recipes differ in epochs beside.
REGIMES = ["cifar10-resnet32-160ep", "cifar10-resnet110-160ep", "svhn-resnet32", "svhn-resnet110", "stl10-resnet32",
           "stl10-resnet110"]  # fmt: skip


@pytest.mark.parametrize("name", ["dgl", "predsim", "infopro", "auglocal", "man"])
@pytest.mark.parametrize("recipe", REGIMES)
def test_every_rule_in_every_regime(recipe: str, name: str) -> None:
    assert recipe in recipe_names()
    config = FitConfig.of(**recipe_options(recipe, section=None, known=fit_options())).changed(rule=name)
    side = 96 if config.data.name == "stl10" else 32
    torch.manual_seed(0)
    model = build_model(config.model.name, num_classes=10, image_size=(side, side))
    rule = build_rule(config)
    # Balanced by another cost than in the run, for which nothing has to be tried out.
    net = tl.decouple(model, config.cut.modules, sample=(2, 3, side, side), rule=rule, cost="num_parameters")
    x, y = torch.randn(2, 3, side, side), torch.tensor([3, 4])
    for step in (net.local_step, net.guided_step) if config.model.name == "resnet32" else (net.local_step,):
        assert all(loss.isfinite() for loss in step(x, y))
        assert all(p.grad is None or p.grad.isfinite().all() for p in net.parameters())
        net.zero_grad()


def test_the_comparison_of_all_rules_names_them_all() -> None:
    known = {one.name: one for one in declared(CompareConfig)} | fit_options()
    values = recipe_options("fashion-mnist-rules", section="compare", known=known, ignored=[])
    assert values["grid"] == {"rule": FOR_IMAGES}


# --- rules of one's own, dense prediction ---


def listings() -> list[str]:
    return re.findall(r"^```python\n(.*?)^```", (ROOT / "docs" / "rules.md").read_text(), re.MULTILINE | re.DOTALL)


def test_the_documented_rule_of_ones_own() -> None:
    (listing,) = [code for code in listings() if "class Nearsighted" in code]
    names: dict[str, Any] = {}
    exec(compile(listing, "rules.md", "exec"), names)
    x, y = data()
    net = tl.decouple(resnet(), 4, sample=x, rule=names["Nearsighted"]())
    assert all(loss.isfinite() for loss in [*net.local_step(x, y), *net.guided_step(x, y)])
    assert [output.shape for output in net.depth_outputs(x)] == [(6, 5)] * 4
    assert tl.memory.predict(net).peak_bytes > 0


def test_the_documented_dense_head() -> None:
    (listing,) = [code for code in listings() if "tl.rules.dense()" in code]
    names: dict[str, Any] = {}
    exec(compile(listing, "rules.md", "exec"), names)
    assert len(names["losses"]) == 3 and all(loss.isfinite() for loss in names["losses"])
    with pytest.raises(ValueError, match="the dense head makes a map of scores out of a map"):
        tl.decouple(resnet(), 4, sample=(2, 3, 16, 16), rule=tl.GreedyRule(tl.rules.dense()))


def test_segmentation(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    path = str(ROOT / "examples" / "segmentation.py")
    monkeypatch.setattr(sys, "argv", ["segmentation.py", "--steps", "2", "--batch-size", "4", "--size", "16"])
    names = runpy.run_path(path, run_name="__main__")
    assert re.findall(r"^(.*): mean .* 0\.\d{3}$", capsys.readouterr().out, re.MULTILINE) == [
        "end-to-end", "local", "PGL, every 5th step",
    ]  # fmt: skip
    # The ground alone, which is more than half of all pixels, makes less than a quarter.
    for guidance in (tl.NeverGuidance(), tl.PeriodicGuidance(period=5)):
        assert names["train"](guidance, steps=40, batch_size=8, size=32) > 0.3
