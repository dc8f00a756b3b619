"""Faults of a kind that end silently in wrong numbers elsewhere: each has its right value, or is refused in words."""

from __future__ import annotations

import copy
import functools
import warnings
from dataclasses import replace
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import torchlocal as tl
from torchlocal.memory import plans

N = 256
X, Y = torch.randn(N, 8, generator=torch.Generator().manual_seed(0)), torch.arange(N) % 5
LINEAR = tl.GreedyRule("linear")


def model(width: int = 64) -> nn.Module:
    torch.manual_seed(0)
    inner = [nn.Sequential(nn.Linear(8 if i == 0 else width, width), nn.ReLU()) for i in range(6)]
    return nn.Sequential(*inner, nn.Linear(width, 5))


def gradients(net: nn.Module) -> list[Tensor]:
    return [p.grad.clone() for p in net.parameters() if p.grad is not None]


def cut_in_four(net: tl.DecoupledNetwork) -> Any:
    return replace(net.guided_plan(net.sample), micro_batches=4)


IGNORED = Y.masked_fill(torch.arange(N) < 150, -100)  # the first half has nothing but ignored targets
SOFT = F.one_hot(Y, 5).float() * 0.8 + 0.04
WEIGHTS = torch.tensor([0.05, 1, 1, 1, 5])


def masked_mean(prediction: Tensor, target: Tensor) -> Tensor:
    """A criterion of one's own that divides by what it counts."""
    losses = F.cross_entropy(prediction, target, reduction="none", ignore_index=-100)
    return losses.sum() / (target != -100).sum()


def contrast(prediction: Tensor, target: Tensor) -> Tensor:
    """A criterion that compares the examples of a batch with each other."""
    return (prediction @ prediction.T).logsumexp(1).mean() + 0 * target.float().mean()


@pytest.mark.parametrize(
    ("criterion", "target"),
    [
        (F.cross_entropy, Y),
        (F.cross_entropy, IGNORED),
        (F.cross_entropy, SOFT),
        (nn.CrossEntropyLoss(weight=WEIGHTS, label_smoothing=0.1), Y),
        (functools.partial(F.cross_entropy, weight=WEIGHTS, ignore_index=3), Y),
        (nn.CrossEntropyLoss(reduction="sum"), Y),
        (nn.NLLLoss(ignore_index=2), Y),
        (F.mse_loss, SOFT),
        (nn.BCEWithLogitsLoss(reduction="sum"), SOFT),
        (lambda prediction, target: F.cross_entropy(prediction, target) + 0.1 * prediction.square().mean(), Y),
    ],
)
@pytest.mark.parametrize("follow", ["follow", "frozen"])
def test_micro_batches_give_the_gradient_of_the_whole_batch(criterion: Any, target: Any, follow: str) -> None:
    results = []
    for parts in (False, True):
        torch.manual_seed(1)
        net = tl.decouple(model(), 3, sample=X, criterion=criterion, rule=LINEAR)
        options = {"memory": cut_in_four(net)} if parts else {}
        losses = net.guided_step(X, target, auxiliary=follow, **options)
        results.append((losses, gradients(net)))
    torch.testing.assert_close(results[1][0], results[0][0], rtol=1e-5, atol=1e-6)
    torch.testing.assert_close(results[1][1], results[0][1], rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize(("criterion", "target"), [(masked_mean, IGNORED), (contrast, Y)])
def test_a_criterion_that_is_no_mean_of_its_parts_is_not_cut(criterion: Any, target: Any) -> None:
    net = tl.decouple(model(), 3, sample=X, criterion=criterion, rule=LINEAR)
    net.guided_step(X, target)
    plain = gradients(net)
    net.zero_grad()
    with pytest.raises(ValueError, match="micro_batches: the criterion's loss of the batch is not the mean"):
        net.guided_step(X, target, memory=cut_in_four(net))
    net.zero_grad()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # without micro-batches it may not fit
        net.guided_step(X, target, memory="local")
    assert net.guided_plan(X, target, memory="local").micro_batches == 1
    assert all(map(torch.equal, gradients(net), plain))
    if criterion is masked_mean:
        # A plan for targets that can be cut is not used for those that cannot.
        assert net.guided_plan(X, Y, memory=300_000).micro_batches > 1
        net.zero_grad()
        net.guided_step(X, target, memory=300_000)
        assert all(map(torch.equal, gradients(net), plain))


def test_rules_that_compare_examples_are_not_cut() -> None:
    net = tl.decouple(model(), 3, sample=X, rule="predsim")
    with pytest.raises(ValueError, match=r"micro_batches: the local loss of PredSimRule.* compares the examples"):
        net.guided_step(X, Y, memory=cut_in_four(net))
    assert net.guided_plan(X, Y, memory="local").micro_batches == 1
    net.guided_step(X, Y, auxiliary="frozen", memory=cut_in_four(net))


def test_what_belongs_to_an_example_is_the_structures_own() -> None:
    def detection(output: Tensor, target: Any) -> Tensor:
        return sum((o.square().sum() + t["boxes"].sum() for o, t in zip(output, target, strict=True))) / len(output)

    boxes = [{"boxes": torch.ones(N if i == 3 else 2, 4)} for i in range(N)]
    pairs = (Y, {"other": SOFT})
    uneven = (Y, torch.ones(3))
    results = []
    for parts in (False, True):
        net = tl.decouple(model(), 1, sample=X, criterion=detection)
        options = {"memory": cut_in_four(net)} if parts else {}
        results.append((net.guided_step(X, boxes, **options), gradients(net)))
    torch.testing.assert_close(results[1], results[0], rtol=1e-4, atol=1e-6)
    net = tl.decouple(model(), 1, sample=X, criterion=lambda o, t: F.cross_entropy(o, t[0]) + o.mean() * t[1].mean())
    with pytest.raises(ValueError, match="micro_batches: the target has no row for each of the 256 examples"):
        net.guided_step(X, uneven, memory=cut_in_four(net))
    net = tl.decouple(
        model(), 1, sample=X, criterion=lambda o, t: F.cross_entropy(o, t[0]) + F.mse_loss(o, t[1]["other"])
    )
    net.guided_step(X, pairs, memory=cut_in_four(net))


def test_recomputation_starts_from_what_the_first_run_started_from() -> None:
    class Center(nn.Module):
        """Assigns a buffer anew, writes into another, and changes its input."""

        def __init__(self) -> None:
            super().__init__()
            self.register_buffer("mean", torch.zeros(64))
            self.register_buffer("count", torch.zeros(()))
            self.calls = 0

        def forward(self, x: Tensor) -> Tensor:
            self.mean = 0.9 * self.mean + 0.1 * x.detach().mean(0)
            self.count += 1
            self.calls += 1
            return x - self.mean * self.count

    torch.manual_seed(0)
    first = nn.Sequential(nn.Dropout(0.3, inplace=True), nn.Linear(8, 64), Center(), nn.ReLU(inplace=True))
    network = nn.Sequential(first, *(nn.Sequential(nn.Linear(64, 64), Center()) for _ in range(3)), nn.Linear(64, 5))
    results: list[list[Tensor]] = []
    for how in ({}, {"recompute": "modules"}, {"recompute": 2}, {"memory": "exact"}):
        net = tl.decouple(copy.deepcopy(network), sample=X.shape)
        torch.manual_seed(1)
        for _ in range(2):
            net.guided_step(X.clone(), Y, auxiliary="frozen", **how)
        assert [m.calls for m in net.backbone.modules() if isinstance(m, Center)] == [2] * 4
        results.append([*gradients(net), *net.backbone.buffers()])
    assert all(all(map(torch.equal, found, results[0])) for found in results[1:])


def test_parameters_that_are_replaced_are_followed_inside_of_units() -> None:
    class Scaled(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.f, self.g, self.scale = nn.Linear(8, 256), nn.Linear(256, 64), nn.Parameter(torch.ones(256))

        def forward(self, x: Tensor) -> Tensor:
            return self.g(F.relu(self.f(x) * self.scale) * self.scale)

    torch.manual_seed(0)
    net = tl.decouple(nn.Sequential(Scaled(), nn.ReLU(), nn.Linear(64, 5)), 1, sample=X)
    net.guided_step(X, Y, memory="exact")
    state = {name: t + 0.1 for name, t in net.backbone.state_dict().items()}
    net.backbone.load_state_dict(state, assign=True)
    expected = F.cross_entropy(net.backbone(X), Y)
    plain = torch.autograd.grad(expected, list(net.backbone.parameters()))
    assert torch.equal(net.guided_step(X, Y, memory="exact")[-1], expected.detach())
    assert all(map(torch.equal, gradients(net), plain))


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (
            {"backward": lambda loss: loss.backward()},
            "optimizers: they would step on the gradients that backward= leaves",
        ),
        ({"scale": 0.5}, "optimizers: they step at every call, so gradients scaled by 0.5 would not be accumulated"),
    ],
)
def test_options_that_cannot_go_together_are_refused(options: dict[str, Any], message: str) -> None:
    net = tl.decouple(model(), 3, sample=X)
    optimizers = [torch.optim.SGD(p, lr=0.1) for p in net.module_parameters()]
    for step in (net.local_step, net.guided_step):
        with pytest.raises(ValueError, match=message):
            step(X, Y, optimizers=optimizers, **options)
    assert all(p.grad is None for p in net.parameters())


def test_every_optimizer_steps_once_in_every_step() -> None:
    net = tl.decouple(model(), 3, sample=X)
    optimizers = [torch.optim.SGD(p, lr=0.1) for p in net.module_parameters()]
    counts = [0, 0, 0]
    for k, optimizer in enumerate(optimizers):
        optimizer.register_step_post_hook(lambda *_, k=k: counts.__setitem__(k, counts[k] + 1))
    steps: list[Any] = [net.local_step, net.guided_step, functools.partial(net.guided_step, recompute="modules")]
    steps.append(functools.partial(net.guided_step, memory=cut_in_four(net)))
    for number, step in enumerate(steps, 1):
        step(X, Y, optimizers=optimizers)
        assert counts == [number] * 3


def test_tied_parameters_step_with_the_sum_of_their_gradients() -> None:
    class Tied(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.e, self.a, self.b, self.out = nn.Embedding(20, 8), nn.Linear(8, 8), nn.Linear(8, 8), nn.Linear(8, 20)
            self.out.weight = self.e.weight

        def forward(self, ids: Tensor) -> Tensor:
            return self.out(self.b(F.relu(self.a(self.e(ids)))))

    ids, following = torch.randint(20, (64,)), torch.randint(20, (64,))
    results = []
    for per_module in (False, True):
        torch.manual_seed(2)
        net = tl.decouple(Tied(), "all", sample=ids)
        optimizers = [torch.optim.SGD(p, lr=0.1, momentum=0.9) for p in net.module_parameters()]
        for options in ({}, {"recompute": "modules"}, {"recompute": 2}):
            for step in (functools.partial(net.guided_step, **options), net.local_step):
                step(ids, following, optimizers=optimizers if per_module else None)
                for optimizer in () if per_module else optimizers:
                    optimizer.step(), optimizer.zero_grad()
        results.append([p.detach() for p in net.parameters()])
    assert all(map(torch.equal, *results))


def test_mixed_dtypes_and_a_batch_of_one() -> None:
    class Cast(nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            return x.double()

    mixed = nn.Sequential(
        nn.Linear(8, 16), nn.Sequential(Cast(), nn.Linear(16, 16).double()), nn.Linear(16, 5).double()
    )
    net = tl.decouple(mixed, sample=X)
    assert [next(a.parameters()).dtype for a in net.auxiliary] == [torch.float32, torch.float64]
    assert len(net.local_step(X, Y)) == 3
    net = tl.decouple(model(), 3, sample=X)  # DGL's network has BatchNorm over vectors
    with pytest.raises(ValueError, match=r"batch: a single example is too few for BatchNorm, .*drop_last=True"):
        net.local_step(X[:1], Y[:1])


def test_plans_for_many_sizes_of_batches_are_bounded() -> None:
    net = tl.decouple(model(), 3, sample=X, rule=LINEAR)
    for size in (256, 250, 240, 230, *range(60, 220, 8)):
        found = net.guided_plan(X[:size], Y[:size], memory="exact")
        net.zero_grad()
        net.guided_step(X[:size], Y[:size], memory="exact")
        exact = gradients(net)
        net.zero_grad()
        net.guided_step(X[:size], Y[:size])
        assert all(map(torch.equal, exact, gradients(net))) and found.peak_bytes is not None
    assert len(plans._FOUND[net]) == 4
    net.guided_plan(torch.cat([X, X]), torch.cat([Y, Y]), memory="exact")  # a larger one is searched for
    assert len(plans._FOUND[net]) == 5
    # The plan for one kind of target is not used for another.
    net.guided_plan(X, SOFT, memory="exact")
    assert len(plans._FOUND[net]) == 6
