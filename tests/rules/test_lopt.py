"""LoPT: the lower half reconstructs the embedding, the upper half learns the task."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from networks import assert_equal, gradients
from torch import Tensor, nn

import torchlocal as tl
from torchlocal.models import GPT, build_model
from torchlocal.recompute import GuidedPlan, Keep, Tape
from torchlocal.rules import LoptRule, make_rule

V = 50
TOKENS = torch.randint(V, (4, 12), generator=torch.Generator().manual_seed(0))
TARGET = TOKENS.roll(-1, 1)


def each_token(scores: Tensor, target: Tensor) -> Tensor:
    return F.cross_entropy(scores.flatten(0, 1), target.flatten())


def make(*, tied: bool = True, cut: str | None = "blocks.1", **options: Any) -> tuple[GPT, tl.DecoupledNetwork]:
    torch.manual_seed(0)
    model = GPT(V, 16, layers=4, width=16, heads=2, tied=tied)
    nn.init.normal_(model.embedding.weight)
    where: dict[str, Any] = {"modules": 2} if cut is None else {"cuts": [cut]}
    return model, tl.decouple(model, **where, sample=TOKENS, rule=LoptRule(**options), criterion=each_token)


@pytest.mark.parametrize("tied", [True, False])
@pytest.mark.parametrize("cut", ["embedding", "blocks.0", "blocks.1"])
def test_a_step_is_the_hand_written_one(tied: bool, cut: str) -> None:
    model, net = make(tied=tied, cut=cut)
    losses = net.local_step(TOKENS, TARGET)
    found = gradients(net)
    net.zero_grad()
    middle = {"embedding": 0, "blocks.0": 1, "blocks.1": 2}[cut]
    embedded = x = model.embedding(TOKENS)
    for block in model.blocks[:middle]:
        x = block(x)
    made = net.auxiliary[0](x)
    lower = 10 * (made - embedded.detach()).square().mean()
    torch.testing.assert_close(losses[0], lower.detach(), rtol=1e-6, atol=0)
    (10 * F.mse_loss(made, embedded.detach())).backward()
    x = x.detach()
    for block in model.blocks[middle:]:
        x = block(x)
    upper = each_token(model.read_out(model.norm(x)), TARGET)
    upper.backward()
    assert torch.equal(losses[1], upper.detach())
    assert_equal(found, gradients(net))
    assert all(g is not None and g.any() for g in found.values())


def test_its_network_is_as_published() -> None:
    torch.manual_seed(0)
    model = GPT(V, 16, layers=4, width=64, heads=2)
    network = tl.decouple(model, 2, sample=TOKENS, rule="lopt", criterion=each_token).auxiliary[0]
    shapes = [tuple(p.shape) for p in network.parameters()]
    assert [type(layer) for layer in network] == [nn.LayerNorm, nn.Linear, nn.GELU, nn.Linear]  # type: ignore[arg-type, var-annotated]
    assert shapes == [(64,), (64,), (16, 64), (16,), (64, 16), (64,)]
    _, net = make(weight=2, reduction=8)
    assert net.auxiliary[0][1].out_features == 2  # type: ignore[index, union-attr]
    _, other = make(weight=10, reduction=8)
    torch.testing.assert_close(5 * net.local_step(TOKENS, TARGET)[0], other.local_step(TOKENS, TARGET)[0])


@pytest.mark.parametrize("tied", [True, False])
def test_guided_steps_are_ordinary_training_and_the_small_network_follows(tied: bool) -> None:
    model, net = make(tied=tied, cut=None)
    assert len(net.partition.units) == 5 and net.partition.groups[0].stop > 1
    each_token(model(TOKENS), TARGET).backward()
    expected = gradients(model)
    results = []
    with torch.no_grad():
        x = embedded = model.embedding(TOKENS)
        for block in model.blocks[: net.partition.groups[0].stop - 1]:
            x = block(x)
        lower = 10 * F.mse_loss(net.auxiliary[0](x), embedded)
    for options in ({}, {"recompute": "modules"}, {"recompute": 3}, {"memory": "exact"}, {"auxiliary": "frozen"}):
        net.zero_grad()
        losses = net.guided_step(TOKENS, TARGET, **options)  # type: ignore[arg-type]
        assert_equal(gradients(model), expected)
        if "auxiliary" not in options:
            assert torch.equal(losses[0], lower)
            results.append(gradients(net.auxiliary))
    for other in results:
        assert_equal(other, results[0])
    net.zero_grad()
    plan = GuidedPlan(tree=Tape(0, len(net.partition.units)), micro_batches=2)
    parts = net.guided_step(TOKENS, TARGET, memory=plan)
    torch.testing.assert_close(parts[0], lower)


def test_local_steps_that_recompute() -> None:
    _, net = make(cut=None)
    other, groups = copy.deepcopy(net), net.partition.groups
    whole = {k: Keep(Tape(g.start, g.start + 1), Tape(g.start + 1, g.stop)) for k, g in enumerate(groups)}
    losses = [net.local_step(TOKENS, TARGET), other.local_step(TOKENS, TARGET, recompute=whole)]  # type: ignore[arg-type]
    assert all(torch.equal(a, b) for a, b in zip(*losses, strict=True))
    assert_equal(gradients(net), gradients(other))
    assert tl.memory.predict(net, TOKENS, TARGET, step="local").peak_bytes > 0


def test_what_is_seen_of_it_before_the_end() -> None:
    model, net = make()
    with torch.no_grad():
        x = model.embedding(TOKENS)
        for block in model.blocks[:2]:
            x = block(x)
        expected = x * (x.square().mean(-1, keepdim=True) + torch.finfo(x.dtype).eps).rsqrt() @ model.embedding.weight.T
    first, last = net.depth_outputs(TOKENS)
    torch.testing.assert_close(first, expected)
    assert torch.equal(last, model(TOKENS))


def test_a_network_of_transformers() -> None:
    transformers = pytest.importorskip("transformers")
    model = transformers.LlamaForCausalLM(
        transformers.LlamaConfig(
            hidden_size=16, intermediate_size=32, num_hidden_layers=4, num_attention_heads=2, vocab_size=V,
            use_cache=False,
        )
    )  # fmt: skip
    inputs = {"input_ids": TOKENS, "attention_mask": torch.ones_like(TOKENS)}
    net = tl.decouple(model, cuts=["model.layers.1"], sample=inputs, rule="lopt", criterion=each_token)
    losses = net.local_step(inputs, TARGET)
    states = model(**inputs, output_hidden_states=True).hidden_states
    expected = 10 * F.mse_loss(net.auxiliary[0](states[2]), states[0])
    torch.testing.assert_close(losses[0], expected.detach())


def test_what_is_refused() -> None:
    model, _ = make()
    with pytest.raises(ValueError, match=r"^rule: LoPT trains two modules, a lower and an upper half, not 3"):
        tl.decouple(model, 3, sample=TOKENS, rule="lopt", criterion=each_token)
    with pytest.raises(ValueError, match=r"^rule: LoPT reconstructs .* here features of shape \(2, 16, 32, 32\)"):
        tl.decouple(build_model("resnet20", num_classes=10), 2, sample=(2, 3, 32, 32), rule="lopt")
    for options, message in (
        ({"weight": 0}, "^weight=0 must be a number above 0"),
        ({"reduction": 0}, "^reduction: must be a whole number of at least 1"),
    ):
        with pytest.raises(ValueError, match=message):
            make_rule("lopt", options)
