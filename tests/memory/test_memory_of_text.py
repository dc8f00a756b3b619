"""Predicted and measured peaks of language models, and the plans of their guided steps."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

import torchlocal as tl
from torchlocal.memory import measure, predict
from torchlocal.models import build_language_model
from torchlocal.rules import SoloRule
from torchlocal.tokens import TokenCrossEntropy

V, T, N = 101, 24, 8
MODELS: dict[str, dict[str, Any]] = {
    "gpt-nano": {"layers": 4, "width": 32, "heads": 2, "tied": False},
    "hf:llama": {
        "config": {
            "hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 4, "num_attention_heads": 2,
            "num_key_value_heads": 2, "max_position_embeddings": T, "tie_word_embeddings": False,
        }
    },
}  # fmt: skip


def rows() -> tuple[Tensor, Tensor]:
    """Rows of tokens, and what follows them; of the last row only a part counts."""
    draw = torch.Generator().manual_seed(1)
    ids, target = (torch.randint(V, (N, T), generator=draw) for _ in range(2))
    target[-1, 9:] = -100
    return ids, target


def network(name: str = "gpt-nano", modules: int = 4, depth: int = 0) -> tl.DecoupledNetwork:
    if name.startswith("hf:"):
        pytest.importorskip("transformers")
    torch.manual_seed(0)
    model = build_language_model(name, vocabulary=V, context=T, options=MODELS[name])
    return tl.decouple(model, modules, sample=rows()[0], rule=SoloRule(depth=depth), criterion=TokenCrossEntropy())


@pytest.mark.parametrize(
    ("step", "options"),
    [
        ("plain", {}),
        ("local", {}),
        ("local", {"autocast": torch.bfloat16}),
        ("guided", {"memory": "full"}),
        ("guided", {"memory": "exact"}),
        ("guided", {"memory": "local"}),
        ("guided", {"auxiliary": "frozen", "recompute": 2}),
    ],
)
@pytest.mark.parametrize("name", MODELS)
def test_prediction_equals_measurement(name: str, step: str, options: dict[str, Any]) -> None:
    net, (ids, target) = network(name), rows()
    predicted = predict(net, ids, target, step=step, **options)

    def run() -> None:
        if step == "plain":
            net.criterion(net.chain.call(ids), target).backward()
        else:
            getattr(net, f"{step}_step")(ids, target, **options)

    found = measure(run).peak_bytes
    if options.get("memory") == "local":  # in parts, whose shares in the loss are numbers of a few bytes
        assert predicted.peak_bytes == pytest.approx(found, rel=1e-4)
    else:
        assert predicted.peak_bytes == found
    assert sum(predicted.breakdown.values()) == predicted.total_bytes


def test_rows_of_tokens_are_cut_by_their_positions() -> None:
    """Eight rows make no micro-batch of sixteen examples, but each is as much work as 24 of them."""
    (whole, net), (ids, target) = (network(modules=k) for k in (1, 4)), rows()
    budget = predict(net, ids, target, step="local").step_bytes
    plan = whole.guided_plan(ids, target, memory=budget)
    assert plan.micro_batches in (2, 4, 8) and plan.bytes <= budget < predict(whole, step="plain").step_bytes
    one_piece = whole.guided_plan(ids, target, memory="exact")
    assert one_piece.micro_batches == 1 and plan.recomputed < one_piece.recomputed
    whole.guided_step(ids, target, memory=plan)
    found = [p.grad for p in whole.parameters()]
    whole.zero_grad(set_to_none=True)
    whole.criterion(whole.backbone(ids), target).backward()
    assert len(found) > 20
    for gradient, parameter in zip(found, whole.parameters(), strict=True):
        torch.testing.assert_close(gradient, parameter.grad)
    guided = net.guided_plan(ids, target, memory="local")
    assert guided.micro_batches > 1
    assert measure(lambda: net.guided_step(ids, target, memory=guided)).peak_bytes <= budget
