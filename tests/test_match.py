"""Auxiliary networks that learn, in guided steps, to give the gradient that the global loss gives."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import torchlocal as tl
from torchlocal.models import GPT
from torchlocal.recompute import GuidedPlan, Tape
from torchlocal.tokens import TokenCrossEntropy


def block(dropout: float = 0.0) -> nn.Module:
    return nn.Sequential(nn.Conv2d(4, 4, 3, padding=1), nn.BatchNorm2d(4), nn.ReLU(), nn.Dropout(dropout))


def build(dropout: float = 0.2, rule: Any = "dgl") -> tl.DecoupledNetwork:
    torch.manual_seed(0)
    head = nn.Sequential(nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(4, 5))
    model = nn.Sequential(nn.Conv2d(3, 4, 3, padding=1), block(dropout), block(), nn.Sequential(block(dropout), head))
    return tl.decouple(model, 4, sample=(8, 3, 8, 8), rule=rule).train()


def batch(seed: int = 1) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(8, 3, 8, 8, generator=generator), torch.randint(5, (8,), generator=generator)


def taken(net: tl.DecoupledNetwork, **options: Any) -> tuple[dict[str, Tensor], Tensor, list[Tensor]]:
    """Gradients and buffers after a guided step, what is drawn next, and the losses."""
    torch.manual_seed(3)
    losses = net.guided_step(*batch(), **options)
    found = {name: p.grad.clone() for name, p in net.named_parameters() if p.grad is not None}
    found |= {name: buffer.clone() for name, buffer in net.named_buffers()}
    return found, torch.rand(4), losses


def test_the_loss_by_hand() -> None:
    """Label loss, and 1 - cosine per example between its gradient at the features and that of the global loss."""
    net = build(dropout=0.0)
    by_hand = copy.deepcopy(net)
    found, _, _ = taken(net, auxiliary="match")
    x, y = batch()
    features = []
    for layer in list(by_hand.backbone.children())[:-1]:  # type: ignore[union-attr]
        x = layer(x)
        x.retain_grad()
        features.append(x)
    F.cross_entropy(by_hand.backbone[-1](x), y).backward()  # type: ignore[index]
    for k, reached in enumerate(features):
        network, at = by_hand.auxiliary[k], reached.detach().requires_grad_()
        loss = F.cross_entropy(network(at), y)
        (own,) = torch.autograd.grad(loss, at, create_graph=True)
        assert reached.grad is not None
        dot = (own * reached.grad).sum((1, 2, 3))
        lengths = own.pow(2).sum((1, 2, 3)).sqrt() * reached.grad.pow(2).sum((1, 2, 3)).sqrt()
        expected = torch.autograd.grad(loss + (1 - dot / lengths).mean(), list(network.parameters()))
        for (name, _), gradient in zip(network.named_parameters(), expected, strict=True):
            torch.testing.assert_close(found[f"auxiliary.{k}.{name}"], gradient, rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize("options", [{}, {"memory": "exact"}, {"recompute": "modules"}, {"recompute": 2}])
def test_nothing_else_differs_and_recomputation_changes_nothing(options: dict[str, Any]) -> None:
    """Gradients of the network, buffers, random numbers and losses are those of a step in which they follow."""
    plain, drawn, losses = taken(build())
    whole, _, _ = taken(build(), auxiliary="match")
    found, after, told = taken(build(), auxiliary="match", **options)
    assert all(torch.equal(found[name], whole[name]) for name in whole)
    assert torch.equal(after, drawn)
    assert [float(a) for a in told] == [float(b) for b in losses]
    auxiliary = {name for name in whole if name.startswith("auxiliary.")}
    buffers = {name for name, _ in build().named_buffers()}
    for name in found:
        if name not in auxiliary or name in buffers:
            assert torch.equal(found[name], plain[name]), name
    assert any(not torch.equal(found[name], plain[name]) for name in auxiliary - buffers)


def test_steps_of_it_turn_the_local_gradient_towards_the_global_one() -> None:
    """On one batch, with the network held still."""
    ends = {}
    for auxiliary in ("follow", "match"):
        net = build(dropout=0.0)
        optimizer = torch.optim.Adam(net.auxiliary.parameters(), lr=0.01)
        for _ in range(60):
            net.guided_step(*batch(), auxiliary=auxiliary)
            optimizer.step()
            net.zero_grad()
        ends[auxiliary] = cosine(net)
    assert ends["match"] > max(0.1, ends["follow"] + 0.1)


def cosine(net: tl.DecoupledNetwork) -> float:
    """Mean over the examples, at the first cut."""
    twin = copy.deepcopy(net)
    (x, y), gradients = batch(), []
    for guided in (True, False):
        first, *rest = twin.backbone.children()  # type: ignore[union-attr]
        at = first(x).detach().requires_grad_()
        output = nn.Sequential(*rest)(at) if guided else twin.auxiliary[0](at)
        gradients.append(torch.autograd.grad(F.cross_entropy(output, y), at)[0].flatten(1))
    return float(F.cosine_similarity(*gradients).mean())


def test_micro_batches_add_up() -> None:
    """To the mean over all examples, where nothing looks at several at a time."""
    torch.manual_seed(0)
    layers = [nn.Linear(6, 6), nn.ReLU(), nn.Linear(6, 6), nn.ReLU(), nn.Linear(6, 5)]
    net = tl.decouple(nn.Sequential(*layers), 2, sample=(8, 6), rule=tl.GreedyRule("linear")).train()
    x, y = torch.randn(8, 6), torch.randint(5, (8,))
    found = []
    for count in (1, 4):
        net.zero_grad()
        plan = GuidedPlan(tree=Tape(0, len(net.partition.units)), micro_batches=count)
        net.guided_step(x, y, auxiliary="match", memory=plan)
        found.append([p.grad.clone() for p in net.parameters() if p.grad is not None])
    for one, other in zip(*found, strict=True):
        torch.testing.assert_close(one, other, rtol=1e-4, atol=1e-6)


def test_text_with_a_shared_read_out() -> None:
    """Whose fused loss cannot be differentiated twice: the plain one is taken."""
    torch.manual_seed(0)
    net = tl.decouple(
        GPT(40, 16, layers=3, width=16, heads=2, tied=False),
        3,
        sample=torch.zeros(2, 8, dtype=torch.long),
        rule=tl.rules.make_rule("solo", {"depth": 0}),
        criterion=TokenCrossEntropy(),
    )
    tokens = torch.randint(40, (2, 8))
    plain = net.guided_step(tokens, tokens.roll(-1, 1))
    before = [p.grad.clone() for p in net.auxiliary.parameters() if p.grad is not None]
    net.zero_grad()
    matched = net.guided_step(tokens, tokens.roll(-1, 1), auxiliary="match")
    after = [p.grad for p in net.auxiliary.parameters() if p.grad is not None]
    assert [float(a) for a in plain] == [float(b) for b in matched]
    assert any(not torch.equal(a, b) for a, b in zip(before, after, strict=True))


class Once(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        return 2 * x

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, *gradients: Tensor) -> Tensor:
        return 2 * gradients[0]


class OnceRule(tl.GreedyRule):
    def predict(self, site: Any, auxiliary: nn.Module, features: Tensor) -> Tensor:
        output: Tensor = Once.apply(super().predict(site, auxiliary, features))
        return output


def test_what_has_no_gradient_of_its_gradient_is_refused() -> None:
    net = build(rule=OnceRule())
    with pytest.raises(ValueError, match="auxiliary: 'match' takes gradients of the gradient of the loss of") as error:
        net.guided_step(*batch(), auxiliary="match")
    assert "\n" not in str(error.value)
    with pytest.raises(ValueError, match="must be 'follow', 'match' or 'frozen', not 'copy'"):
        net.guided_step(*batch(), auxiliary="copy")


def test_a_rule_that_reads_the_embedding_is_refused() -> None:
    """Before the step: where the gradient arrives, what the first unit made is gone."""
    torch.manual_seed(0)
    net = tl.decouple(
        GPT(40, 16, layers=4, width=16, heads=2, tied=False),
        2,
        sample=torch.zeros(2, 8, dtype=torch.long),
        rule="lopt",
        criterion=TokenCrossEntropy(),
    )
    tokens = torch.randint(40, (2, 8))
    for step in (net.guided_step, lambda *given, **options: tl.memory.predict(net, *given, step="guided", **options)):
        with pytest.raises(ValueError, match="auxiliary: 'match' comes when the gradient arrives, and the embedding"):
            step(tokens, tokens.roll(-1, 1), auxiliary="match")
    assert all(parameter.grad is None for parameter in net.parameters())


def test_its_memory_is_predicted() -> None:
    net = build()
    follow, match = (tl.memory.predict(net, step="guided", auxiliary=a).flops for a in ("follow", "match"))
    assert match > follow
    measured = tl.memory.measure(lambda: net.guided_step(*batch(), auxiliary="match"))
    net.zero_grad()
    assert measured.peak_bytes == pytest.approx(
        tl.memory.predict(net, step="guided", auxiliary="match").peak_bytes, rel=0.1
    )
