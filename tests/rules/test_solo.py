"""SOLO: the loss by its formula, the read-out moved by the last module alone, and copies of it that lag behind."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from networks import assert_equal, gradients
from torch import Tensor, nn
from torch.utils.flop_counter import FlopCounterMode
from torchvision.models import VisionTransformer

import torchlocal as tl
from torchlocal.memory.counter import PeakCounter
from torchlocal.models import GPT, build_model
from torchlocal.models.gpt import Block
from torchlocal.parallel.rehearsal import count_flops
from torchlocal.recompute import GuidedPlan, Tape
from torchlocal.rules import Batch, SoloRule, make_rule
from torchlocal.tokens import TokenCrossEntropy

V, LAYERS = 50, 5
TOKENS = torch.randint(V, (3, 12), generator=torch.Generator().manual_seed(0))
TARGET = TOKENS.roll(-1, 1)
Grads = dict[str, Tensor | None]


def each_token(scores: Tensor, target: Tensor) -> Tensor:
    return F.cross_entropy(scores.flatten(0, 1), target.flatten())


def gpt(*, tied: bool = True) -> GPT:
    torch.manual_seed(0)
    return GPT(V, 16, layers=LAYERS, width=16, heads=2, tied=tied)


def make(
    modules: int | str = 3, *, tied: bool = True, criterion: Any = each_token, **options: Any
) -> tuple[Any, tl.DecoupledNetwork]:
    model = gpt(tied=tied)
    net = tl.decouple(model, modules, sample=TOKENS, rule=SoloRule(**options), criterion=criterion)
    for network in net.auxiliary:  # so that every one of its numbers matters
        nn.init.normal_(network.bias)  # type: ignore[arg-type]
        nn.init.constant_(network.log_temperature, 0.3)  # type: ignore[arg-type]
    return model, net


def batch_of(count: int) -> list[tuple[Tensor, Tensor]]:
    generator = torch.Generator().manual_seed(3)
    tokens = [torch.randint(V, (3, 12), generator=generator) for _ in range(count)]
    return [(t, t.roll(-1, 1)) for t in tokens]


def hidden_states(model: GPT, net: tl.DecoupledNetwork, tokens: Tensor) -> list[Tensor]:
    """What every module hands on, by calling the blocks one after another; each from a detached input."""
    stages: list[Any] = [model.embedding, *model.blocks]
    x, found = tokens, list[Tensor]()
    for group in net.partition.groups[:-1]:
        for unit in group:
            x = stages[unit](x)
        found.append(x)
        x = x.detach()
    for unit in net.partition.groups[-1]:
        x = stages[unit](x)
    return [*found, model.read_out(model.norm(x))]


@pytest.mark.parametrize("depth", [0, 1, 2])
@pytest.mark.parametrize("modules", [3, 5, "all"])
def test_the_loss_is_that_of_the_formula(depth: int, modules: int | str) -> None:
    model, net = make(modules, depth=depth)
    losses = net.local_step(TOKENS, TARGET)
    for k, h in enumerate(hidden_states(model, net, TOKENS)[:-1]):
        network: Any = net.auxiliary[k]
        z = h
        for copied in network.blocks:
            block = Block(16, 2)
            block.load_state_dict({name.split(".", 2)[2]: p for name, p in copied.named_parameters()})
            z = block(z)
        z = z * (z.square().mean(-1, keepdim=True) + torch.finfo(z.dtype).eps).rsqrt() * network.norm.weight
        scores = z @ model.embedding.weight.T / torch.tensor(0.3).exp() + network.bias
        expected = -scores.log_softmax(-1).gather(-1, TARGET[..., None]).mean()
        torch.testing.assert_close(losses[k], expected)
        torch.testing.assert_close(net.depth_outputs(TOKENS)[k], scores)
    assert len(net.auxiliary) == net.num_modules - 1 and all(len(a.blocks) == depth for a in net.auxiliary)  # type: ignore[arg-type]


@pytest.mark.parametrize("depth", [0, 1])
def test_an_mlp_is_that_of_the_formula_and_at_first_its_shortcut(depth: int) -> None:
    model, net = make(depth=depth, hidden=24)
    features = torch.randn(3, 12, 16)
    for network in net.auxiliary:
        mlp: Any = network.blocks[-1]  # type: ignore[index]
        assert torch.equal(mlp(features), features)
        for p in mlp.parameters():
            nn.init.normal_(p, std=0.3)
    losses = net.local_step(TOKENS, TARGET)
    for k, h in enumerate(hidden_states(model, net, TOKENS)[:-1]):
        solo: Any = net.auxiliary[k]
        *blocks, last = solo.blocks
        own = {name: p.detach() for name, p in last.named_parameters()}
        assert len(blocks) == depth and own["up.weight"].shape == (24, 16)
        for block in blocks:
            h = block(h)
        normed = h * (h.square().mean(-1, keepdim=True) + torch.finfo(h.dtype).eps).rsqrt() * own["norm.weight"]
        z = normed @ own["up.weight"].T + own["up.bias"]
        z = h + (0.5 * z * (1 + torch.erf(z / 2**0.5))) @ own["down.weight"].T + own["down.bias"]
        scores = F.linear(solo.norm(z) / solo.log_temperature.exp(), model.read_out.weight, solo.bias)
        torch.testing.assert_close(losses[k], each_token(scores, TARGET))
    assert all(p.grad is not None and p.grad.any() for p in net.auxiliary.parameters())


def test_its_blocks_are_those_that_follow_with_weights_of_their_own() -> None:
    model, net = make("all", depth=2)
    found = [[next(iter(b.state_dict()))[:8] for b in network.blocks] for network in net.auxiliary]  # type: ignore[union-attr]
    # The last unit has the read-out, so the last two modules copy blocks of their own.
    assert found == [[f"blocks.{i}", f"blocks.{i + 1}"] for i in (0, 1, 2, 2, 2)]
    for network in net.auxiliary:
        for name, p in network.named_parameters():
            path = name.split(".", 2)[-1]
            assert not path.startswith("blocks") or p.ndim == 1 or not torch.equal(p, model.get_parameter(path))


@pytest.mark.parametrize("depth", [0, 1])
@pytest.mark.parametrize("tied", [True, False])
@pytest.mark.parametrize("read_out", ["shared", "private"])
def test_the_last_module_alone_moves_the_read_out(depth: int, tied: bool, read_out: str) -> None:
    model, net = make(tied=tied, depth=depth, read_out=read_out)
    losses = net.local_step(TOKENS, TARGET)
    found = gradients(net)
    net.zero_grad()
    by_hand: list[Tensor] = []
    weight = model.read_out.weight.detach()
    stages: list[Any] = [model.embedding, *model.blocks]
    x = TOKENS
    for group, network in zip(net.partition.groups, [*net.auxiliary, None], strict=True):
        for unit in group:
            x = stages[unit](x)
        if network is None:
            loss = each_token(model.read_out(model.norm(x)), TARGET)
        else:
            matrix = weight if read_out == "shared" else network.read_out[0].weight  # type: ignore[index]
            loss = each_token(F.linear(network(x), matrix, network.bias), TARGET)
        loss.backward()
        by_hand.append(loss.detach())
        x = x.detach()
    assert all(torch.equal(a, b) for a, b in zip(losses, by_hand, strict=True))
    assert_equal(found, gradients(net))
    assert all(g is not None and g.any() for g in found.values())
    # What moves the read-out: the last module, and where it is tied, the embedding in front of the first one.
    net.zero_grad()
    states = hidden_states(model, net, TOKENS)
    each_token(states[-1], TARGET).backward()
    expected = model.read_out.weight.grad.clone()
    if tied:
        network = net.auxiliary[0]
        matrix = weight if read_out == "shared" else network.read_out[0].weight  # type: ignore[index, union-attr]
        model.zero_grad()
        each_token(F.linear(network(states[0]), matrix, network.bias), TARGET).backward()  # type: ignore[misc]
        expected = model.embedding.weight.grad + expected
    name = "backbone.embedding.weight" if tied else "backbone.read_out.weight"
    assert torch.equal(found[name], expected)  # type: ignore[arg-type]


def test_the_read_out_belongs_to_the_network_alone() -> None:
    model = gpt(tied=False)
    state, count = copy.deepcopy(model.state_dict()), len(list(model.parameters()))
    net = tl.decouple(model, 3, sample=TOKENS, rule="solo", criterion=each_token)
    assert_equal(model.state_dict(), state)
    parameters = list(net.parameters())
    assert len({id(p) for p in parameters}) == len(parameters)
    assert parameters[:count] == list(model.parameters())
    shared = model.read_out.weight
    assert not any(t is shared or t.data_ptr() == shared.data_ptr() for t in [*net.auxiliary.state_dict().values()])
    assert [sum(p is shared for p in ps) for ps in net.module_parameters()] == [0, 0, 1]


@pytest.mark.parametrize("tied", [True, False])
def test_one_module_and_guided_steps_are_ordinary_training(tied: bool) -> None:
    model = gpt(tied=tied)
    optimizer = torch.optim.AdamW(model.parameters(), lr=0.01)
    for tokens, target in batch_of(3):
        optimizer.zero_grad()
        each_token(model(tokens), target).backward()
        optimizer.step()
    for modules, kind, options in ((1, "local", {}), (1, "guided", {}), (3, "guided", {}), (3, "guided", {"lag": 2})):
        other, net = make(modules, tied=tied, **options)
        optimizer = torch.optim.AdamW(net.parameters(), lr=0.01)
        for tokens, target in batch_of(3):
            optimizer.zero_grad()
            (net.local_step if kind == "local" else net.guided_step)(tokens, target)
            optimizer.step()
        assert_equal(other.state_dict(), model.state_dict())


@pytest.mark.parametrize("recompute", ["modules", 2])
def test_recomputing_changes_nothing(recompute: Any) -> None:
    _, net = make(depth=1)
    other = copy.deepcopy(net)
    losses = [net.guided_step(TOKENS, TARGET), other.guided_step(TOKENS, TARGET, recompute=recompute)]
    assert all(torch.equal(a, b) for a, b in zip(*losses, strict=True))
    assert_equal(gradients(net), gradients(other))


# --- copies that lag behind ---


def train(net: tl.DecoupledNetwork, batches: Any, optimizer: torch.optim.Optimizer) -> list[list[Tensor]]:
    losses = []
    for tokens, target in batches:
        losses.append(net.local_step(tokens, target))
        optimizer.step()
        optimizer.zero_grad()
    return losses


@pytest.mark.parametrize("lag", [1, 2, 3])
@pytest.mark.parametrize("tied", [True, False])
def test_what_a_step_reads_is_what_an_earlier_one_left_behind(lag: int, tied: bool) -> None:
    model, net = make(tied=tied, depth=0, lag=lag)
    optimizer = torch.optim.SGD(net.parameters(), lr=0.5)
    left = [model.read_out.weight.detach().clone()]  # before the first step, then behind each
    for t, (tokens, target) in enumerate(batch_of(10)):
        window = lag * (t // lag - 1)
        matrix = left[window + 1 if window >= 0 else 0]
        with torch.no_grad():
            states = hidden_states(model, net, tokens)
            expected = [
                each_token(F.linear(network(h), matrix, network.bias), target)
                for network, h in zip(net.auxiliary, states, strict=False)
            ]
        losses = net.local_step(tokens, target)
        assert all(torch.equal(a, b) for a, b in zip(losses, expected, strict=False))
        assert lag > 1 or torch.equal(matrix, model.read_out.weight)
        before = net.depth_outputs(tokens)
        optimizer.step()
        optimizer.zero_grad()
        left.append(model.read_out.weight.detach().clone())
        assert torch.equal(before[-1], states[-1]) and not torch.equal(left[-1], left[-2])


def test_a_checkpoint_goes_on_where_it_was() -> None:
    _, net = make(lag=3, depth=1)
    _, other = make(lag=3, depth=1)
    batches = batch_of(9)
    optimizer = torch.optim.SGD(net.parameters(), lr=0.5)
    train(net, batches[:4], optimizer)
    other.load_state_dict(copy.deepcopy(net.state_dict()))
    losses = [train(n, batches[4:], torch.optim.SGD(n.parameters(), lr=0.5)) for n in (net, other)]
    assert all(torch.equal(a, b) for one, two in zip(*losses, strict=True) for a, b in zip(one, two, strict=True))
    assert_equal(net.state_dict(), other.state_dict())


def test_predictions_and_evaluations_are_no_steps() -> None:
    _, net = make(lag=3)
    train(net, batch_of(2), torch.optim.SGD(net.parameters(), lr=0.5))
    before = copy.deepcopy(net.state_dict())
    net.depth_outputs(TOKENS)
    tl.memory.predict(net, TOKENS, TARGET, step="local")
    net.guided_step(TOKENS, TARGET, auxiliary="frozen")
    assert_equal(net.state_dict(), before)


# --- a read-out of one's own, and one that never makes all scores ---


def test_a_private_read_out_learns_by_itself() -> None:
    _, net = make(read_out="private", depth=0)
    _, low = make(read_out="private", depth=0, rank=4)
    assert [p.shape for p in net.auxiliary[0].read_out.parameters()] == [(V, 16)]  # type: ignore[union-attr]
    assert [p.shape for p in low.auxiliary[0].read_out.parameters()] == [(4, 16), (V, 4)]  # type: ignore[union-attr]
    losses = low.local_step(TOKENS, TARGET)
    network: Any = low.auxiliary[0]
    scores = network.read_out(network(hidden_states(low.backbone, low, TOKENS)[0])) + network.bias  # type: ignore[arg-type]
    torch.testing.assert_close(losses[0], each_token(scores, TARGET))
    assert all(p.grad is not None and p.grad.any() for p in low.auxiliary.parameters())


@pytest.mark.parametrize("options", [{}, {"depth": 0}, {"hidden": 8}, {"lag": 2}, {"read_out": "private"}])
def test_scores_a_few_positions_at_a_time(options: dict[str, Any]) -> None:
    results = []
    for criterion in (each_token, TokenCrossEntropy(chunk=7)):
        _, net = make(criterion=criterion, **options)
        losses = net.local_step(TOKENS, TARGET)
        results.append({"losses": torch.stack(losses), **gradients(net)})
    for name, a in results[0].items():
        torch.testing.assert_close(a, results[1][name], rtol=1e-4, atol=1e-7, msg=name)


def test_heads_without_all_scores_take_less_memory_and_as_many_operations() -> None:
    tokens, peaks = torch.zeros(16, 64, dtype=torch.long), []
    product, scores = 2 * 16 * 64 * 16 * 2048, 16 * 64 * 2048 * 4
    for criterion in (each_token, TokenCrossEntropy()):
        model = GPT(2048, 64, layers=3, width=16, heads=2)
        net = tl.decouple(model, 3, sample=tokens, rule=SoloRule(0), criterion=criterion)
        flops = [sum(net.partition.units[unit].flops for unit in group) for group in net.partition.groups]
        assert count_flops(net) == [flops[0] + product, flops[1] + product, flops[2]]
        features = torch.randn(16, 64, 16, requires_grad=True)
        batch = Batch(input=tokens, target=tokens, criterion=criterion)
        with PeakCounter() as peak, FlopCounterMode(display=False) as counted:
            net.rule.loss(net.sites[0], net.auxiliary[0], features, batch).backward()
        assert counted.get_total_flops() == 2 * product  # of three in a read-out that learns
        peaks.append(peak.peak)
    assert peaks[0] > 2 * scores and peaks[1] < scores / 3


@pytest.mark.parametrize("options", [{}, {"depth": 1, "lag": 2}, {"read_out": "private", "depth": 0}])
def test_micro_batches_are_weighed_by_the_tokens_that_count(options: dict[str, Any]) -> None:
    _, net = make(criterion=TokenCrossEntropy(), **options)
    target = TARGET.clone()
    target[0] = target[1, :5] = -100  # nothing counts in the first part
    gradients_of = []
    for count in (1, 3):
        net.zero_grad()
        plan = GuidedPlan(tree=Tape(0, len(net.partition.units)), micro_batches=count)
        losses = net.guided_step(TOKENS, target, memory=plan)
        gradients_of.append({"losses": torch.stack(losses), **gradients(net)})
    for name, a in gradients_of[0].items():
        torch.testing.assert_close(a, gradients_of[1][name], rtol=1e-4, atol=1e-6, msg=name)


@pytest.mark.parametrize("options", [{}, {"lag": 2}, {"read_out": "private", "rank": 3}])
def test_the_predicted_peak_is_that_of_a_step(options: dict[str, Any]) -> None:
    _, net = make(criterion=TokenCrossEntropy(), **options)
    for kind, step in (("local", net.local_step), ("guided", net.guided_step)):
        predicted = tl.memory.predict(net, TOKENS, TARGET, step=kind).peak_bytes
        net.zero_grad()
        with PeakCounter() as counter:
            step(TOKENS, TARGET)
        assert counter.peak == predicted


# --- other networks ---


def test_networks_of_transformers() -> None:
    transformers = pytest.importorskip("transformers")
    sizes: dict[str, Any] = {
        "hidden_size": 16, "intermediate_size": 32, "num_hidden_layers": 4, "num_attention_heads": 2, "vocab_size": V,
    }  # fmt: skip
    llama = transformers.LlamaForCausalLM(transformers.LlamaConfig(**sizes, tie_word_embeddings=True, use_cache=False))
    bert = transformers.BertForSequenceClassification(transformers.BertConfig(**sizes, num_labels=5))
    mask = torch.ones_like(TOKENS)
    mask[0, 7:] = 0
    inputs = {"input_ids": TOKENS, "attention_mask": mask}
    for model, target, criterion in ((llama, TARGET, each_token), (bert, torch.tensor([0, 1, 2]), F.cross_entropy)):
        for modules in (2, 4):
            net = tl.decouple(model, modules, sample=inputs, rule="solo", criterion=criterion)
            losses = net.local_step(inputs, target)
            assert all(loss.isfinite() for loss in losses)
            assert all(p.grad is not None for p in net.parameters() if p.requires_grad)
            net.zero_grad()
            assert len(net.guided_step(inputs, target)) == modules
            net.zero_grad()
            shapes = {output.shape for output in net.depth_outputs(inputs)}
            assert shapes == ({(3, 12, V)} if model is llama else {(3, 5)})
    network: Any = net.auxiliary[0].eval()  # without dropout
    features = torch.randn(3, 12, 16)
    z = network.blocks(features).mean(1)
    expected = F.linear(network.norm(z), bert.classifier.weight, bert.classifier.bias) + network.bias
    torch.testing.assert_close(net.rule.predict(net.sites[0], network, features), expected)


def test_an_encoder_of_images() -> None:
    sizes = {"num_layers": 3, "num_heads": 2, "hidden_dim": 12, "mlp_dim": 24}
    model = VisionTransformer(image_size=16, patch_size=4, num_classes=5, **sizes)
    nn.init.normal_(model.heads.head.weight, std=0.1)  # type: ignore[union-attr, arg-type]
    x, y = torch.randn(4, 3, 16, 16), torch.tensor([0, 1, 2, 3])
    net = tl.decouple(model, 3, sample=x, rule="solo")
    assert len(net.local_step(x, y)) == 3
    assert all(p.grad is not None for p in net.parameters())
    assert [output.shape for output in net.depth_outputs(x)] == [(4, 5)] * 3


class Capped(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.net = gpt()

    def forward(self, tokens: Tensor) -> Tensor:
        scores: Tensor = 5 * torch.tanh(self.net(tokens) / 5)
        return scores


class Mixed(nn.Module):
    """A read-out that is computed anew in every step."""

    def __init__(self) -> None:
        super().__init__()
        self.net = gpt()
        self.net.read_out = nn.Identity()  # type: ignore[assignment]

    def forward(self, tokens: Tensor) -> Tensor:
        scores: Tensor = self.net(tokens) @ (2 * self.net.embedding.weight.T)
        return scores


def test_what_is_refused() -> None:
    cases: list[tuple[Any, Any, dict[str, Any], str]] = [
        (Capped(), TOKENS, {}, "Capped does not end in a linear read-out: the last operation .* no matrix .* but Mul"),
        (
            Mixed(),
            TOKENS,
            {},
            "Mixed does not end in a linear read-out: the matrix of its last product is no parameter",
        ),
        (build_model("resnet20", num_classes=10), (2, 3, 32, 32), {}, r"SOLO predicts at each position .* \(2, 16, 32"),
    ]
    for model, sample, options, message in cases:
        with pytest.raises(ValueError, match=message):
            tl.decouple(model, 2, sample=sample, rule=SoloRule(**options))
    net = tl.decouple(Capped(), 2, sample=TOKENS, rule=SoloRule(read_out="private"), criterion=each_token)
    assert len(net.local_step(TOKENS, TARGET)) == 2  # it needs none of the network's
    wide = [nn.Linear(4, 8), nn.Linear(8, 6), nn.Linear(6, 3)]
    with pytest.raises(ValueError, match="takes 6 features, and there are 8 here; give read_out='private'"):
        tl.decouple(wide, sample=(2, 4), rule="solo")
    with pytest.raises(ValueError, match=r"one that follows makes \(2, 6\) of \(2, 8\); give depth=0"):
        tl.decouple(wide, sample=(2, 4), rule=SoloRule(1, read_out="private"))


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"depth": -1}, "^depth: must be a whole number of at least 0"),
        ({"hidden": 0}, "^hidden: must be a whole number of at least 1"),
        ({"lag": 0}, "^lag: must be a whole number of at least 1"),
        ({"read_out": "own"}, "^read_out: must be 'shared' or 'private'"),
        ({"read_out": "private", "lag": 2}, "^lag: a private read-out is no copy"),
        ({"rank": 2}, "^rank: a shared read-out is the network's"),
        ({"read_out": "private", "rank": 0}, "^rank: must be a whole number"),
    ],
)
def test_options_that_are_refused(options: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        make_rule("solo", options)
