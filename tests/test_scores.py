"""Steps that leave the network's read-out to the criterion, which makes scores for a few positions at a time."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import pytest
import torch
from networks import Decoder
from processes import Pool
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_iter

import torchlocal as tl
from torchlocal.models import build_language_model
from torchlocal.parallel import distribute
from torchlocal.recompute import GuidedPlan, Tape
from torchlocal.rules.solo import SoloRule
from torchlocal.run.config import FitConfig
from torchlocal.tokens import TokenCrossEntropy

N, T, V = 4, 24, 300


def batch() -> tuple[Tensor, Tensor]:
    draw = torch.Generator().manual_seed(1)
    ids = torch.randint(V, (N, T), generator=draw)
    target = ids.roll(-1, 1)
    target[1, 3:] = -100
    return ids, target


def make_model(kind: str) -> nn.Module:
    torch.manual_seed(0)
    if kind == "decoder":  # whose read-out has a bias
        model = Decoder(V, T, dropout=0.0)
        model.head = nn.Linear(16, V)
        return model
    if kind == "llama":
        from transformers import LlamaConfig, LlamaForCausalLM

        sizes: dict[str, Any] = {"hidden_size": 16, "intermediate_size": 32, "num_attention_heads": 2}
        return LlamaForCausalLM(LlamaConfig(vocab_size=V, num_hidden_layers=3, tie_word_embeddings=True, **sizes))
    options = {"tied": kind == "tied", "layers": 3, "width": 16, "heads": 2}
    return build_language_model("gpt-nano", vocabulary=V, context=T, options=options)


def make_net(kind: str, scores: str = "chunked", modules: int = 2, **options: Any) -> tl.DecoupledNetwork:
    model, criterion = make_model(kind), TokenCrossEntropy(scores=scores, chunk=7, **options)
    torch.manual_seed(1)
    return tl.decouple(model, modules, sample=batch()[0], rule=SoloRule(0), criterion=criterion)


def global_by_hand(kind: str, modules: int = 2) -> tuple[Tensor, dict[str, Tensor]]:
    """Loss and gradients of the network by itself, from its scores as a whole."""
    model, (ids, target) = make_net(kind, modules=modules).backbone, batch()
    scores = model(ids)
    scores = getattr(scores, "logits", scores)
    loss = F.cross_entropy(scores.flatten(0, 1), target.flatten())
    loss.backward()
    return loss.detach(), {name: p.grad for name, p in model.named_parameters() if p.grad is not None}


KINDS = ["decoder", "tied", "untied", "llama"]


@pytest.mark.parametrize(
    ("kind", "memory"), [*((kind, memory) for kind in KINDS for memory in ("exact", 2)), ("tied", "local")]
)
def test_guided_steps_have_the_gradients_of_all_scores(kind: str, memory: Any) -> None:
    net = make_net(kind)
    if memory == 2:
        memory = GuidedPlan(tree=Tape(0, len(net.partition.units)), micro_batches=2)
    losses = net.guided_step(*batch(), memory=memory)
    loss, gradients = global_by_hand(kind)
    torch.testing.assert_close(losses[-1], loss)
    for name, parameter in net.backbone.named_parameters():
        torch.testing.assert_close(parameter.grad, gradients[name], rtol=1e-4, atol=1e-7)


@pytest.mark.parametrize("recompute", [None, "largest"])
@pytest.mark.parametrize("kind", KINDS)
def test_local_steps_are_those_of_all_scores(kind: str, recompute: str | None) -> None:
    found, expected = (make_net(kind, scores) for scores in ("chunked", "whole"))
    one, other = found.local_step(*batch(), recompute=recompute), expected.local_step(*batch())
    torch.testing.assert_close(one, other)
    assert torch.equal(one[0], other[0])  # whose read-out is chunked in both
    for a, b in zip(found.parameters(), expected.parameters(), strict=True):
        torch.testing.assert_close(a.grad, b.grad, rtol=1e-4, atol=1e-7)


@pytest.mark.parametrize("modules", [1, 2])
def test_end_to_end_and_guided_steps_have_the_same_bits(modules: int) -> None:
    """The invariant of whole scores: one module, or several and their guided steps, recomputed or not."""
    reference = make_net("untied", modules=1)
    (loss,) = reference.local_step(*batch())
    for memory in ("full", "exact"):
        net = make_net("untied", modules=modules)
        assert torch.equal(net.guided_step(*batch(), memory=memory)[-1], loss)
        for a, b in zip(net.backbone.parameters(), reference.backbone.parameters(), strict=True):
            assert a.grad is not None and torch.equal(a.grad, b.grad)


class Largest(TorchDispatchMode):
    """The largest tensor that an operation makes."""

    count = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        self.count = max([self.count, *(t.numel() for t in tree_iter(result) if isinstance(t, Tensor))])
        return result


@pytest.mark.parametrize("step", ["local", "guided", "exact"])
def test_all_scores_are_never_held(step: str) -> None:
    largest = {}
    for scores in ("whole", "chunked"):
        net, (ids, target) = make_net("untied", scores), batch()
        net.guided_plan(ids, target, memory="exact")  # which is searched on tensors without memory
        with Largest() as seen:
            if step == "local":
                net.local_step(ids, target)
            else:
                net.guided_step(ids, target, memory="exact" if step == "exact" else "full")
        largest[scores] = seen.count
    assert largest["whole"] == N * T * V
    assert largest["chunked"] < N * T * V / 2


def test_predictions_know() -> None:
    whole, chunked, given = make_net("untied", "whole"), make_net("untied"), batch()
    for options in ({"step": "local"}, {"step": "guided", "memory": "full"}, {"step": "guided", "memory": "exact"}):
        before, after = (tl.memory.predict(net, *given, **options) for net in (whole, chunked))
        assert after.peak_bytes < before.peak_bytes - N * T * V * 4
    chunked.local_step(*given)
    chunked.zero_grad()
    measured = tl.memory.measure(lambda: chunked.local_step(*given))
    predicted = tl.memory.predict(chunked, *given, step="local")
    assert predicted.step_bytes == pytest.approx(measured.peak_bytes, rel=0.01)


def test_a_plan_is_for_the_scores_that_it_was_searched_for() -> None:
    net, given = make_net("untied", modules=1), batch()
    chunked = net.guided_plan(*given, memory="exact")
    net.criterion = TokenCrossEntropy()
    assert net.guided_plan(*given, memory="exact").peak_bytes > chunked.peak_bytes + N * T * V * 4
    net.criterion = TokenCrossEntropy(scores="chunked", chunk=7)
    assert net.guided_plan(*given, memory="exact") == chunked


def test_the_network_predicts_as_ever() -> None:
    whole, chunked = make_net("untied", "whole"), make_net("untied")
    ids, _ = batch()
    assert torch.equal(whole(ids), chunked(ids))
    for a, b in zip(whole.depth_outputs(ids), chunked.depth_outputs(ids), strict=True):
        assert torch.equal(a, b) and a.shape == (N, T, V)


def step_on_ranks(kind: str, step: str) -> Any:
    net = distribute(make_net(kind))
    given = batch() if net.is_first else (None, None)
    losses = net.local_step(*given) if step == "local" else net.guided_step(*given, **OPTIONS[step])
    net.synchronize()
    found = {name: p.grad for name, p in net.net.named_parameters() if p.grad is not None}
    net.close()
    return losses, found


OPTIONS: dict[str, dict[str, Any]] = {"guided": {"memory": "full"}, "piped": {"micro_batches": 2}}


@pytest.mark.parametrize(
    ("kind", "step"),
    [("untied", "local"), ("tied", "local"), ("untied", "guided"), ("tied", "guided"), ("untied", "piped")],
)
def test_ranks_have_the_bits_of_one_process(pool: Pool, tmp_path: Path, kind: str, step: str) -> None:
    found = pool.run(2, tmp_path, step_on_ranks, kind, step)
    net = make_net(kind)
    if step == "local":
        losses = net.local_step(*batch())
    else:
        plan = GuidedPlan(tree=Tape(0, len(net.partition.units)), micro_batches=2 if step == "piped" else 1)
        losses = net.guided_step(*batch(), memory=plan)
    assert all(torch.equal(a, b) for a, b in zip(found[-1][0], losses, strict=True))
    expected = {name: p.grad for name, p in net.named_parameters() if p.grad is not None}
    gradients = found[0][1] | found[1][1]
    assert gradients.keys() == expected.keys()
    for name, gradient in expected.items():
        assert torch.equal(gradients[name], gradient), name


# --- what else the network does with its read-out ---


class Peek(nn.Module):
    """A block that reads the network's scores."""

    def __init__(self, read_out: nn.Linear) -> None:
        super().__init__()
        self.layer, self.read_out = nn.Linear(V, V), read_out

    def forward(self, features: Tensor) -> Tensor:
        return self.layer(features) + self.read_out(features).softmax(-1)


class Peeking(nn.Module):
    """Its features are as wide as there are tokens, and it may leave its read-out out."""

    def __init__(self) -> None:
        super().__init__()
        self.embedding, self.read_out, self.leaves = nn.Embedding(V, V), nn.Linear(V, V), False
        self.first = Peek(self.read_out)
        self.second, self.third = (nn.Sequential(nn.Linear(V, V), nn.Tanh()) for _ in range(2))

    def forward(self, ids: Tensor) -> Tensor:
        features = self.third(self.second(self.first(self.embedding(ids))))
        return features if self.leaves else self.read_out(features)


def peeking(scores: str) -> tl.DecoupledNetwork:
    torch.manual_seed(0)
    criterion, model = TokenCrossEntropy(scores=scores, chunk=7), Peeking()
    return tl.decouple(model, 3, sample=batch()[0], rule=SoloRule(0), criterion=criterion)


def test_the_last_call_of_the_read_out_counts() -> None:
    """Also where units that do not run have called it inside."""
    chunked, whole = peeking("chunked"), peeking("whole")
    torch.testing.assert_close(chunked.local_step(*batch(), recompute="largest"), whole.local_step(*batch()))
    torch.testing.assert_close(chunked.guided_step(*batch(), recompute=3), whole.guided_step(*batch(), memory="full"))


def test_a_read_out_that_is_not_come_to_is_refused() -> None:
    net: Any = peeking("chunked")
    net.backbone.leaves = True
    with pytest.raises(ValueError, match=r"^model: the forward has not come to its read-out 'read_out' in this step"):
        net.local_step(*batch())


class Turned(nn.Module):
    """Its features have gaps where its read-out takes them, so that torch adds the bias in an operation by itself."""

    def __init__(self) -> None:
        super().__init__()
        self.embedding, self.layer, self.read_out = nn.Embedding(V, 8), nn.Linear(8, 8), nn.Linear(8, V)

    def forward(self, ids: Tensor) -> Tensor:
        features = self.layer(self.embedding(ids))
        scores: Tensor = self.read_out(features.transpose(0, 1).contiguous().transpose(0, 1))
        return scores


def test_a_bias_that_torch_adds_by_itself_is_the_layers() -> None:
    found = []
    for scores in ("chunked", "whole"):
        torch.manual_seed(0)
        model, criterion = Turned(), TokenCrossEntropy(scores=scores, chunk=7)
        net = tl.decouple(model, 2, sample=batch()[0], rule=SoloRule(0), criterion=criterion)
        found.append([*net.local_step(*batch()), *(p.grad for p in net.parameters())])
    assert not any(gradient is None for gradient in found[0])
    for a, b in zip(*found, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-7)


# --- what cannot be left out ---


class Functional(nn.Module):
    """Applies its matrix itself."""

    def __init__(self) -> None:
        super().__init__()
        self.embedding = nn.Embedding(V, 8)
        self.layer = nn.Linear(8, 8)

    def forward(self, ids: Tensor) -> Tensor:
        return F.linear(self.layer(self.embedding(ids)), self.embedding.weight)


class Capped(Functional):
    """Does something to its scores."""

    def forward(self, ids: Tensor) -> Tensor:
        return super().forward(ids).tanh()


class Shifted(Functional):
    """A bias of its own beside its layer."""

    def __init__(self) -> None:
        super().__init__()
        self.read_out, self.bias = nn.Linear(8, V, bias=False), nn.Parameter(torch.zeros(V))

    def forward(self, ids: Tensor) -> Tensor:
        scores: Tensor = self.read_out(self.embedding(ids)) + self.bias
        return scores


@pytest.mark.parametrize(
    ("model", "told"),
    [
        (Shifted, "Shifted does not: the last operation of its forward is no matrix product but Add"),
        (Functional, "Functional does not: 'embedding.weight' is applied in 'Functional', which is no nn.Linear but"),
        (Capped, "Capped does not: the last operation of its forward is no matrix product but Tanh"),
    ],
)
def test_networks_without_such_a_layer_are_refused(model: type[nn.Module], told: str) -> None:
    with pytest.raises(ValueError, match=f"^criterion: scores='chunked' needs a network that .* {told}"):
        tl.decouple(model(), 1, sample=batch()[0], criterion=TokenCrossEntropy(scores="chunked"))
    net = tl.decouple(model(), 1, sample=batch()[0], criterion=TokenCrossEntropy())
    net.criterion = TokenCrossEntropy(scores="chunked")
    with pytest.raises(ValueError, match=f"^criterion: scores='chunked' needs a network that .* {told}"):
        net.local_step(*batch())


def test_what_is_done_beside_the_layer_is_refused_when_it_comes() -> None:
    net = make_net("untied")
    layer: Any = net.backbone
    layer = layer.read_out

    def refused(told: str) -> None:
        with pytest.raises(
            ValueError, match=rf"'read_out.weight' is applied in 'read_out', which is an nn.Linear {told}"
        ):
            net.local_step(*batch())

    handle = layer.register_forward_hook(lambda *_: None)
    refused("with hooks")
    handle.remove()
    layer.forward = lambda features: F.linear(features / 2, layer.weight)
    refused("with a forward of its own")
    del layer.forward
    copy.deepcopy(net).local_step(*batch())


def test_words(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"^scores: must be 'whole' or 'chunked', not 'lazy'"):
        TokenCrossEntropy(scores="lazy")
    with pytest.raises(ValueError, match=r"^scores='chunked' is for the loss of text that comes with the data"):
        tl.fit(FitConfig.of(data="digits", scores="chunked", out=str(tmp_path / "run"), steps=1), progress=False)
