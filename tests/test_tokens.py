"""Cross-entropy over tokens, from scores and from features, against torch's."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.flop_counter import FlopCounterMode

import torchlocal as tl
from torchlocal.memory.counter import PeakCounter
from torchlocal.recompute import GuidedPlan, Tape
from torchlocal.tokens import TokenCrossEntropy, cross_entropy_of_features

N, T, C, V = 3, 100, 8, 40


def given(dtype: torch.dtype = torch.float64) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    torch.manual_seed(0)
    features, weight, bias = (torch.randn(size, dtype=dtype) for size in ((N, T, C), (V, C), (V,)))
    target = torch.randint(V, (N, T))
    target[0, :30] = target[2, 7] = -100
    return features, weight, bias, target


def plainly(features: Tensor, weight: Tensor, bias: Tensor | None, target: Tensor, **options: Any) -> Tensor:
    return F.cross_entropy(F.linear(features, weight, bias).flatten(0, -2), target.flatten(), **options)


@pytest.mark.parametrize("chunk", [1, 37, 300, 1000, None])
@pytest.mark.parametrize("options", [{}, {"reduction": "sum"}, {"label_smoothing": 0.1}, {"ignore_index": 3}])
@pytest.mark.parametrize("biased", [True, False])
def test_loss_and_gradients_are_those_of_all_scores(chunk: int | None, options: dict[str, Any], biased: bool) -> None:
    features, weight, bias, target = given()
    target = target.masked_fill(target == -100, options.get("ignore_index", -100))
    first = [t.clone().requires_grad_() for t in ((features, weight, bias) if biased else (features, weight))]
    second = [t.detach().clone().requires_grad_() for t in first]
    loss = cross_entropy_of_features(*first, *([] if biased else [None]), target, chunk=chunk, **options)
    expected = plainly(*second, *([] if biased else [None]), target, **options)
    torch.testing.assert_close(loss, expected, rtol=1e-12, atol=1e-12)
    (3 * loss).backward()
    (3 * expected).backward()
    for a, b in zip(first, second, strict=True):
        torch.testing.assert_close(a.grad, b.grad, rtol=1e-11, atol=1e-13)


def test_it_is_exact_to_rounding_in_single_precision() -> None:
    features, weight, bias, target = given(torch.float32)
    exact = plainly(*(t.double() for t in (features, weight, bias)), target)
    errors = [
        abs(f(features, weight, bias, target).item() - exact.item()) for f in (cross_entropy_of_features, plainly)
    ]
    assert max(errors) < 1e-6 * exact


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_under_autocast_it_is_as_good_as_all_scores(dtype: torch.dtype) -> None:
    features, weight, bias, target = given(torch.float32)
    leaves = [t.to(dtype).requires_grad_() for t in (features, weight, bias)]
    others = [t.detach().clone().requires_grad_() for t in leaves]
    with torch.autocast("cpu", dtype=torch.bfloat16):
        loss, expected = cross_entropy_of_features(*leaves, target), plainly(*others, target)
    assert loss.dtype == torch.float32
    torch.testing.assert_close(loss, expected.float(), rtol=1e-2, atol=0)
    loss.backward()
    expected.backward()
    for a, b in zip(leaves, others, strict=True):
        assert a.grad is not None and b.grad is not None and a.grad.dtype == dtype
        assert (a.grad - b.grad).norm() < 0.02 * b.grad.norm()


def test_in_half_precision_a_scaled_loss_has_gradients_of_all_positions_and_tokens() -> None:
    """A position's share of a token's slope is below the smallest number there; a GradScaler knows only the loss."""
    torch.manual_seed(0)
    features, weight, target = torch.randn(4096, 8), torch.randn(4096, 8) / 10, torch.randint(4096, (4096,))
    target[:100] = -100
    found = []
    for dtype, function in ((torch.float32, plainly), (torch.float16, cross_entropy_of_features)):
        leaves = [t.clone().requires_grad_() for t in (features, weight)]
        with torch.autocast("cpu", dtype=dtype, enabled=dtype == torch.float16):
            loss = function(*leaves, None, target)
        (2.0**16 * loss).backward()
        found.append([loss.detach(), *(leaf.grad for leaf in leaves)])
    for exact, half in zip(*found, strict=True):
        assert exact is not None and half is not None and (half - exact).norm() < 0.002 * exact.norm()


def test_where_nothing_counts_it_is_what_torch_makes_of_it() -> None:
    features, weight, bias, target = given()
    leaf = features.requires_grad_()
    loss = cross_entropy_of_features(leaf, weight, bias, torch.full_like(target, -100))
    loss.backward()
    assert loss.isnan() and leaf.grad is not None and not leaf.grad.any()


def test_the_criterion_takes_scores_or_features() -> None:
    features, weight, bias, target = given()
    criterion = TokenCrossEntropy(label_smoothing=0.1, chunk=50)
    scores = F.linear(features, weight, bias)
    expected = F.cross_entropy(scores.flatten(0, 1), target.flatten(), label_smoothing=0.1)
    assert torch.equal(criterion(scores, target), expected)
    torch.testing.assert_close(criterion.from_features(features, weight, bias, target), expected)
    for options, message in (({"reduction": "none"}, "^reduction: must be"), ({"chunk": 0}, "^chunk: must be")):
        with pytest.raises(ValueError, match=message):
            TokenCrossEntropy(**options)  # type: ignore[arg-type]


@pytest.mark.parametrize(("positions", "targets"), [(40, 60), (60, 40), (20, 21), (20, 1)])
def test_each_position_has_a_target(positions: int, targets: int) -> None:
    with pytest.raises(
        ValueError, match=rf"^target: its {targets} token ids, .* do not match the {positions} positions"
    ):
        cross_entropy_of_features(
            torch.ones(2, positions // 2, C), torch.ones(V, C), None, torch.ones(targets).long(), chunk=20
        )


def test_a_matrix_that_is_read_only_costs_no_gradient_and_scores_are_never_held() -> None:
    torch.manual_seed(0)
    features, weight = torch.randn(2048, 16, requires_grad=True), torch.randn(512, 16)
    target = torch.randint(512, (2048,))

    def cost(function: Any, weight: Tensor) -> tuple[int, int]:
        features.grad = None
        with PeakCounter() as peak, FlopCounterMode(display=False) as flops:
            function(features, weight, None, target).backward()
        return peak.peak, flops.get_total_flops()

    product = 2 * 2048 * 512 * 16
    assert cost(cross_entropy_of_features, weight)[1] == cost(plainly, weight)[1] == 2 * product
    free = weight.clone().requires_grad_()
    assert cost(cross_entropy_of_features, free)[1] == cost(plainly, free)[1] == 3 * product
    scores = 2048 * 512 * 4
    assert cost(plainly, weight)[0] > 2 * scores and cost(cross_entropy_of_features, weight)[0] < scores / 3


def test_micro_batches_are_weighed_by_the_tokens_that_count() -> None:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Embedding(V, C), nn.Linear(C, C), nn.Linear(C, V))
    tokens, target = torch.randint(V, (4, 10)), torch.randint(V, (4, 10))
    target[0] = target[1, :5] = -100
    net = tl.decouple(model, 2, sample=tokens, rule="greedy", criterion=TokenCrossEntropy())
    gradients = []
    for count in (1, 4):  # nothing counts in the first of four
        net.zero_grad()
        plan = GuidedPlan(tree=Tape(0, len(net.partition.units)), micro_batches=count)
        losses = net.guided_step(tokens, target, memory=plan)
        gradients.append([*losses, *(p.grad.clone() for p in net.parameters() if p.grad is not None)])
    assert len(gradients[0]) == len(gradients[1]) == 2 + len(list(net.parameters()))
    for a, b in zip(*gradients, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-5, atol=1e-7)
