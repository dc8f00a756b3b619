"""Copies of units: they run as the unit itself does, and leave the network alone."""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torchvision.models import DenseNet, SwinTransformer, VisionTransformer

import torchlocal as tl
from torchlocal.cut.copies import UnitCopy
from torchlocal.cut.forward import Pass
from torchlocal.models import build_model
from torchlocal.rules import Batch

IDS = torch.arange(48).reshape(4, 12) * 7 % 61
MASK = torch.ones(4, 12, dtype=torch.long)
MASK[1, 8:] = MASK[3, 5:] = 0
SMALL = {"num_attention_heads": 2, "num_hidden_layers": 4}


def llama(*, use_cache: bool = False) -> nn.Module:
    transformers = pytest.importorskip("transformers")
    return transformers.LlamaForCausalLM(
        transformers.LlamaConfig(
            vocab_size=61, hidden_size=16, intermediate_size=32, num_key_value_heads=2, tie_word_embeddings=True,
            use_cache=use_cache, attention_dropout=0.1, **SMALL,
        )
    )  # fmt: skip


def bert() -> nn.Module:
    transformers = pytest.importorskip("transformers")
    config = transformers.BertConfig(vocab_size=61, hidden_size=16, intermediate_size=32, num_labels=5, **SMALL)
    return transformers.BertForSequenceClassification(config)


def vit() -> nn.Module:
    sizes = {"num_layers": 3, "num_heads": 2, "hidden_dim": 12, "mlp_dim": 24, "dropout": 0.1}
    return VisionTransformer(image_size=16, patch_size=4, num_classes=5, **sizes)


class Rough(nn.Module):
    """Parameters of its own between its layers, a layer that runs twice, a counter, an attribute, a bound method."""

    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Linear(6, 6)
        self.blocks = nn.ModuleList(nn.Linear(6, 6) for _ in range(3))
        self.shared = nn.Linear(6, 6)
        self.scale = nn.Parameter(torch.tensor([0.5, 2, 1, 1, 1, 1]))
        self.head = nn.Linear(6, 5)
        self.register_buffer("calls", torch.zeros((), dtype=torch.long))
        self.seen = 0
        self.order = [self.blocks[0], self.blocks[1], self.blocks[2]]  # the same modules once more
        self.squash = self.squashed

    def squashed(self, x: Tensor) -> Tensor:
        return self.shared(x).tanh()

    def forward(self, x: Tensor) -> Tensor:
        self.calls += 1
        self.seen = self.seen + 1
        x = self.stem(x)
        for block in self.order:
            x = self.squash(block(x)) * self.scale
            x = F.dropout(x, 0.2, self.training)
        return self.head(x)


IMAGES = torch.randn(4, 3, 16, 16, generator=torch.Generator().manual_seed(0))
VECTORS = torch.randn(4, 6, generator=torch.Generator().manual_seed(0))
NETWORKS: dict[str, tuple[Callable[[], nn.Module], Any]] = {
    "resnet": (lambda: build_model("resnet20", num_classes=5, image_size=(16, 16)), IMAGES),
    "densenet": (lambda: DenseNet(4, (2, 2), 8, drop_rate=0.1, num_classes=5), IMAGES),
    "vit": (vit, IMAGES),
    "swin": (lambda: SwinTransformer([2, 2], 8, [1, 1], [2, 2], [4, 4], num_classes=5), IMAGES),
    "rough": (Rough, VECTORS),
    "llama": (llama, {"input_ids": IDS, "attention_mask": MASK}),
    "llama, cached": (lambda: llama(use_cache=True), {"input_ids": IDS, "attention_mask": MASK}),
    "bert": (bert, {"input_ids": IDS, "attention_mask": MASK}),
}


def criterion(prediction: Tensor, target: Tensor) -> Tensor:
    return F.cross_entropy(prediction.flatten(0, -2), target.flatten())


def make(name: str, modules: int | str = "all", rule: str = "greedy") -> tuple[tl.DecoupledNetwork, Any, Tensor]:
    torch.manual_seed(0)
    build, batch = NETWORKS[name]
    target = IDS if name.startswith("llama") else torch.tensor([0, 1, 2, 3])
    model = build()
    for parameter in model.parameters():  # zeros would hide a mistake
        if not parameter.any():
            nn.init.normal_(parameter, std=0.1)
    net = tl.decouple(model, modules, sample=batch, rule=rule, criterion=criterion, cost="num_parameters")
    return net, batch, target


def features_of(net: tl.DecoupledNetwork, batch: Any) -> list[Tensor]:
    """What is handed on at every cut point."""
    found: list[Tensor] = []

    def note(unit: int, features: Tensor) -> Tensor:
        found.append(features.detach())
        return features

    stops = tuple(range(1, net.chain.num_units))
    pass_ = Pass(net.chain, batch)
    with pass_.opened(stops):
        pass_.run(0, net.chain.num_units, [], boundary=note, stops=stops)
    return found


@pytest.mark.parametrize("name", NETWORKS)
def test_a_copy_runs_as_the_unit_does(name: str) -> None:
    net, batch, _ = make(name)
    copies = [UnitCopy(net.chain, within) for within in net.chain.facts.within]
    for fitting in ("a batch of the network", "a batch like the sample"):
        entries = features_of(net, batch)
        for unit, (features, twin) in enumerate(zip(entries, copies, strict=True), start=1):
            outputs, gradients, states = [], [], []
            for kind in ("unit", "copy"):
                torch.manual_seed(unit)
                state = {key: value.clone() for key, value in net.backbone.state_dict().items()}
                given = features.clone().requires_grad_()
                pass_ = Pass(net.chain, batch, replay=kind == "unit")
                if kind == "unit":
                    with pass_.opened():
                        (output,) = pass_.run(unit, unit + 1, [given])
                elif fitting == "a batch of the network":
                    with pass_.opened(()):
                        output = twin(given)
                else:
                    output = twin(given)
                output.square().sum().backward()
                if kind == "unit":
                    net.backbone.load_state_dict(state)
                outputs.append(output.detach())
                gradients.append(given.grad)
                states.append(torch.get_rng_state())
                for key, value in net.backbone.state_dict().items():
                    assert torch.equal(value, state[key]), key
            assert torch.equal(*outputs) and torch.equal(*gradients) and torch.equal(*states)
            assert all(p.grad is not None for p in twin.parameters())
        net.zero_grad()


@pytest.mark.parametrize("name", NETWORKS)
def test_only_the_units_tensors_are_copied_by_their_names(name: str) -> None:
    net, _, _ = make(name)
    own = {t.data_ptr() for t in [*net.backbone.parameters(), *net.backbone.buffers()] if t.numel()}
    state = net.backbone.state_dict(keep_vars=True)
    for within in net.chain.facts.within:
        twin = UnitCopy(net.chain, within)
        read = {id(p) for p in net.chain.parameters(within.unit, within.unit + 1)}
        assert {id(state[key]) for key, _ in twin.named_parameters()} == read
        assert all(torch.equal(value, state[key]) for key, value in twin.state_dict().items())
        assert not own & {t.data_ptr() for t in [*twin.parameters(), *twin.buffers()]}


def test_the_body_ends_before_the_head() -> None:
    ends = {"resnet": (4, 64, 4, 4), "vit": (4, 17, 12), "swin": (4, 4, 4, 16), "rough": (4, 6), "llama": (4, 12, 16)}
    heads = {"resnet": "fc", "vit": "heads", "swin": "head", "rough": "head", "llama": "lm_head"}
    for name, shape in ends.items():
        net, batch, _ = make(name)
        twin = UnitCopy(net.chain, net.chain.facts.body)  # type: ignore[arg-type]
        features = features_of(net, batch)[-1]
        assert twin(features).shape == net.chain.facts.body.shape == shape  # type: ignore[union-attr]
        assert not any(key.startswith(f"{heads[name]}.") for key in twin.state_dict())
    with pytest.raises(ValueError, match=r"^rule: the last unit of Sequential holds only the head, so nothing of it"):
        layers = [nn.Sequential(nn.Linear(4, 4), nn.ReLU()) for _ in range(2)]
        tl.decouple([*layers, nn.Linear(4, 3)], sample=(2, 4), rule="man")


@pytest.mark.parametrize("rule", ["auglocal", "man"])
@pytest.mark.parametrize("name", ["resnet", "rough", "llama", "bert"])
def test_steps_leave_what_runs_around_a_copy_alone(name: str, rule: str) -> None:
    """Counters and attributes of the network, which the skeletons have a second time."""
    modules = 3
    net, batch, target = make(name, modules, rule)
    greedy, _, _ = make(name, modules)
    for _ in range(2):
        torch.manual_seed(0)
        losses = net.local_step(batch, target)
        torch.manual_seed(0)
        greedy.local_step(batch, target)
    assert all(loss.isfinite() for loss in losses)
    buffers = dict(greedy.backbone.named_buffers())
    assert {name: b for name, b in net.backbone.named_buffers() if not torch.equal(b, buffers[name])} == {} or (
        name == "rough"  # dropout draws other numbers there
    )
    if name == "rough":
        assert net.backbone.calls == net.backbone.seen == 2
        assert net.backbone.order[0] is net.backbone.blocks[0]
    keys = set(net.backbone.state_dict())
    assert keys == set(NETWORKS[name][0]().state_dict())


@pytest.mark.parametrize("rule", ["auglocal", "man"])
@pytest.mark.parametrize("name", ["resnet", "rough", "llama"])
def test_a_copy_of_the_network_has_copies_of_its_own(name: str, rule: str) -> None:
    net, batch, target = make(name, 3, rule)
    before = net.local_step(batch, target) if name == "resnet" else []  # the skeletons are there, and not copied
    net.zero_grad()
    twin, original = copy.deepcopy(net), copy.deepcopy(net.state_dict())
    torch.manual_seed(0)
    theirs = twin.local_step(batch, target)
    assert all(torch.equal(value, original[key]) for key, value in net.state_dict().items())
    assert all(p.grad is None for p in net.parameters())
    torch.manual_seed(0)
    mine = net.local_step(batch, target)
    assert all(torch.equal(a, b) for a, b in zip(mine, theirs, strict=True)) and len(before) in (0, 3)
    for a, b in zip(net.parameters(), twin.parameters(), strict=True):
        assert (a.grad is None) == (b.grad is None) and (a.grad is None or torch.equal(a.grad, b.grad))  # type: ignore[arg-type]
    alone = copy.deepcopy(net.auxiliary[0])
    shape = net.sites[0].feature_shape
    net.eval(), alone.eval()
    features = torch.randn(shape)
    assert torch.equal(alone(features), net.auxiliary[0](features))


@pytest.mark.parametrize("rule", ["auglocal", "man"])
@pytest.mark.parametrize("name", ["resnet", "rough", "llama"])
def test_in_another_dtype(name: str, rule: str) -> None:
    net, batch, target = make(name, 3, rule)
    net.local_step(batch, target)
    net.zero_grad()
    net.to(torch.float64)
    if isinstance(batch, Tensor):
        batch = batch.double()
    losses = net.local_step(batch, target)
    assert all(loss.dtype == torch.float64 and loss.isfinite() for loss in losses)
    assert all(p.grad is None or p.grad.dtype == torch.float64 for p in net.parameters())


@pytest.mark.parametrize("name", ["resnet", "llama"])
@pytest.mark.parametrize("rule", ["auglocal", "man"])
def test_as_many_examples_as_one_likes(name: str, rule: str) -> None:
    net, batch, target = make(name, 3, rule)
    single = {key: value[1:3] for key, value in batch.items()} if isinstance(batch, dict) else batch[1:3]
    assert all(loss.isfinite() for loss in net.local_step(single, target[1:3]))
    for rows in (1, 7):
        shape = net.sites[0].feature_shape
        net.eval()
        assert net.auxiliary[0](torch.randn(rows, *shape[1:])).shape[0] == rows
        net.train()


def test_masks_reach_a_copy() -> None:
    """Padding must not be seen: the copy gets the masks of the batch that the step is on."""
    net, batch, _ = make("llama")
    twin = UnitCopy(net.chain, net.chain.facts.within[1]).eval()
    net.eval()
    features = features_of(net, batch)[1]
    other = features.clone()
    other[3, 5:] += 1
    outputs = []
    for given in (features, other):
        with Pass(net.chain, batch).opened(()):
            outputs.append(twin(given))
    left = {**batch, "attention_mask": MASK.flip(1)}
    torch.testing.assert_close(outputs[0][3, :5], outputs[1][3, :5])
    with Pass(net.chain, left).opened(()):
        assert not torch.allclose(twin(features)[3], outputs[0][3])


def test_what_crosses_beside_the_features_is_refused() -> None:
    class Skips(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.layers = nn.ModuleList(nn.Linear(4, 4) for _ in range(5))

        def forward(self, x: Tensor) -> Tensor:
            x = self.layers[0](x)
            first = x.detach()
            for layer in self.layers[1:]:
                x = layer(x).relu() + first
            return x

    net = tl.decouple(Skips(), 3, sample=(2, 4), rule="auglocal", cost="num_parameters")
    with pytest.raises(ValueError, match=r"^rule: what comes after 'layers\.\d' cannot be copied, since something"):
        net.local_step(torch.randn(2, 4), torch.tensor([0, 1]))


@pytest.mark.parametrize("name", ["resnet", "rough"])
def test_compiled(name: str) -> None:
    class Ahead(tl.Rule):
        """A rule of one's own that knows nothing of compiling."""

        def auxiliary(self, site: tl.rules.Site) -> nn.Module:
            unit, _ = site.downstream.copy(0, head=False)  # type: ignore[union-attr]
            return nn.Sequential(unit, nn.Flatten(), nn.LazyLinear(5))

        def loss(self, site: tl.rules.Site, auxiliary: nn.Module, features: Tensor, batch: Batch) -> Tensor:
            return batch.criterion(auxiliary(features), batch.target)

    torch.manual_seed(0)
    build, batch = NETWORKS[name]
    for rule in ("auglocal", "man", Ahead()):
        net = tl.decouple(build().eval(), 3, sample=batch, rule=rule, cost="num_parameters").eval()
        target = torch.tensor([0, 1, 2, 3])
        losses = net.local_step(batch, target)
        net.compile(backend="eager")
        for _ in range(2):
            torch.testing.assert_close(net.local_step(batch, target), losses)
