"""Training on several processes: the same bits as on one, and no hang when one is lost."""

from __future__ import annotations

import os
import random
import signal
import time
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
import torch.nn.functional as F
from processes import Pool
from torch import Tensor, nn

import torchlocal as tl
from torchlocal import parallel
from torchlocal.memory.search import GuidedPlan
from torchlocal.recompute import Again, Keep, Tape

STEPS = ["local", "guided", "local", "local", "frozen", "local", "guided", "guided", "local"]


class Block(nn.Module):
    """A residual block with dropout, as a module and as a function."""

    def __init__(self, dropout: float) -> None:
        super().__init__()
        self.dropout = dropout
        self.conv1, self.bn = nn.Conv2d(6, 6, 3, padding=1, bias=False), nn.BatchNorm2d(6)
        self.conv2 = nn.utils.parametrizations.spectral_norm(nn.Conv2d(6, 6, 3, padding=1))

    def forward(self, x: Tensor) -> Tensor:
        y = F.dropout(torch.relu(self.bn(self.conv1(x))), self.dropout, self.training)
        return torch.relu(x + self.conv2(y))


def convolutions(dropout: float) -> nn.Module:
    head = nn.Sequential(nn.AdaptiveAvgPool2d(2), nn.Flatten(), nn.Dropout(dropout), nn.Linear(24, 5))
    return nn.Sequential(nn.Conv2d(3, 6, 3, padding=1), Block(dropout), Block(dropout), nn.Sequential(Block(0.0), head))


class Tokens(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.project, self.position = nn.Linear(12, 16), nn.Parameter(torch.zeros(1, 16, 16))

    def forward(self, x: Tensor) -> Tensor:
        patches = F.unfold(x, 2, stride=2).transpose(1, 2)
        return self.project(patches) + self.position


class Classifier(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.norm, self.linear = nn.LayerNorm(16), nn.Linear(16, 5)

    def forward(self, x: Tensor) -> Tensor:
        return self.linear(self.norm(x).mean(1))


def transformer(dropout: float) -> nn.Module:
    layers = [nn.TransformerEncoderLayer(16, 2, 32, dropout, batch_first=True, norm_first=True) for _ in range(3)]
    return nn.Sequential(Tokens(), *layers, Classifier())


BACKBONES = {"convolutions": convolutions, "transformer": transformer}


class ReadsInput(tl.GreedyRule):
    """A loss that depends on the network's input."""

    reads_input = True

    def loss(self, site: Any, auxiliary: nn.Module, features: Tensor, batch: Any) -> Tensor:
        return super().loss(site, auxiliary, features, batch) * (1 + batch.input.mean() ** 2)


def build(backbone: str, dropout: float = 0.3, rule: Any = "greedy", layout: Any = torch.contiguous_format) -> Any:
    torch.manual_seed(0)
    model = BACKBONES[backbone](dropout)
    net = tl.decouple(model, sample=(8, 3, 8, 8), rule=rule).to(memory_format=layout)
    torch.manual_seed(5)
    return net


def batches(count: int, size: int = 8) -> list[tuple[Tensor, Tensor]]:
    generator = torch.Generator().manual_seed(7)
    return [
        (torch.randn(size, 3, 8, 8, generator=generator), torch.randint(5, (size,), generator=generator))
        for _ in range(count)
    ]


def run_steps(net: Any, steps: list[str], options: dict[str, Any], guided: dict[str, Any]) -> list[list[float]]:
    """Train; on a stage without batches, too. Returns the losses."""
    optimizer = torch.optim.SGD(net.parameters(), lr=0.05, momentum=0.9, nesterov=True, weight_decay=1e-3)
    first = getattr(net, "is_first", True)
    told = []
    for kind, (x, y) in zip(steps, batches(len(steps)), strict=True):
        given = (x.to(memory_format=options.get("layout", torch.contiguous_format)), y) if first else (None, None)
        plain = {name: value for name, value in options.items() if name != "layout"}
        if kind == "local":
            losses = net.local_step(*given, **plain)
        else:
            auxiliary = "follow" if kind == "guided" else kind
            losses = net.guided_step(*given, auxiliary=auxiliary, **plain, **guided)
        if first:
            torch.rand(3)  # as a data loader might draw
        optimizer.step()
        optimizer.zero_grad()
        told.append([loss.item() for loss in losses])
    return told


def state_of(net: Any) -> dict[str, Tensor]:
    return {name: tensor.clone() for name, tensor in net.state_dict().items()}


def assert_same(state: dict[str, Tensor], expected: dict[str, Tensor]) -> None:
    assert state.keys() == expected.keys()
    different = [name for name in state if not torch.equal(state[name], expected[name])]
    assert not different, f"{len(different)} of {len(state)} tensors differ: {different[:5]}"


def train_in_parallel(
    build_options: dict[str, Any],
    steps: list[str],
    options: dict[str, Any],
    guided: dict[str, Any],
    how: dict[str, Any],
) -> Any:
    net = parallel.distribute(build(**build_options), timeout=60, **how)
    losses = run_steps(net, steps, options, guided)
    state = state_of(net)
    net.close()
    return losses, state, torch.get_rng_state(), net.bytes_sent


def compare(
    pool: Pool,
    folder: Path,
    world: int,
    build_options: dict[str, Any],
    *,
    steps: list[str] = STEPS,
    options: dict[str, Any] | None = None,
    guided: dict[str, Any] | None = None,
    alone: dict[str, Any] | None = None,
    single: Any = None,
    **how: Any,
) -> list[Any]:
    """Train on several ranks and on one: losses, parameters, buffers and random state must be the same.

    ``single`` is the network of the one process, where that is another than the ranks build.
    """
    options, guided = options or {}, guided or {}
    net = build(**build_options) if single is None else single
    losses = run_steps(net, steps, options, guided if alone is None else alone)
    results = pool.run(world, folder, train_in_parallel, build_options, steps, options, guided, how)
    for _, state, _, _ in results:
        assert_same(state, state_of(net))
    assert results[-1][0] == losses
    assert torch.equal(results[0][2], torch.get_rng_state())
    return results


@pytest.mark.parametrize("world", [2, 3])
@pytest.mark.parametrize("backbone", ["convolutions", "transformer"])
def test_mixed_steps_equal_the_single_process(pool: Pool, tmp_path: Path, backbone: str, world: int) -> None:
    """Convolutions with BatchNorm and spectral norm, and a transformer, with dropout, local and guided."""
    compare(pool, tmp_path, world, {"backbone": backbone})


def test_options_equal_the_single_process(pool: Pool, tmp_path: Path) -> None:
    """bf16 autocast, channels last, a factor on the losses, and another assignment of modules."""
    options = {"autocast": torch.bfloat16, "layout": torch.channels_last, "scale": 0.5}
    build_options = {"backbone": "convolutions", "layout": torch.channels_last}
    compare(pool, tmp_path, 2, build_options, options=options, assignment=[1, 3])


@pytest.mark.parametrize(
    "guided", [{"recompute": "modules"}, {"memory": "exact"}, {"memory": "local"}, {"recompute": 3}]
)
def test_recomputing_guided_steps_equal_the_single_process(pool: Pool, tmp_path: Path, guided: dict[str, Any]) -> None:
    compare(pool, tmp_path, 2, {"backbone": "convolutions"}, guided=guided)


@pytest.mark.parametrize(("world", "guided"), [(2, {}), (3, {"memory": "exact"}), (2, {"recompute": "modules"})])
def test_matching_auxiliary_networks_equal_the_single_process(
    pool: Pool, tmp_path: Path, world: int, guided: dict[str, Any]
) -> None:
    """The gradient that they learn to give may arrive from another rank."""
    steps = ["local", "match", "local", "match", "guided", "local"]
    compare(pool, tmp_path, world, {"backbone": "convolutions"}, steps=steps, guided=guided)


def test_matching_in_overlapping_micro_batches(pool: Pool, tmp_path: Path) -> None:
    """The losses of several parts add up in another order, so to rounding."""
    plan, steps = GuidedPlan(tree=Tape(0, 4), micro_batches=4), ["local", "match", "match", "local"]
    net = build("convolutions")
    losses = run_steps(net, steps, {}, {"memory": plan})
    arguments = ({"backbone": "convolutions"}, steps, {}, {"micro_batches": 4}, {})
    found, state, _, _ = pool.run(3, tmp_path, train_in_parallel, *arguments)[-1]
    for a, b in zip(found, losses, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-5, atol=1e-6)
    torch.testing.assert_close(state, state_of(net), rtol=1e-4, atol=1e-6)


def test_micro_batches_of_a_plan_equal_the_single_process(pool: Pool, tmp_path: Path) -> None:
    plan = GuidedPlan(tree=Tape(0, 4), micro_batches=3)
    compare(pool, tmp_path, 3, {"backbone": "convolutions"}, guided={"memory": plan})


@pytest.mark.parametrize("schedule", ["1f1b", "gpipe"])
@pytest.mark.parametrize("backbone", ["convolutions", "transformer"])
def test_overlapping_micro_batches_equal_the_single_process(
    pool: Pool, tmp_path: Path, backbone: str, schedule: str
) -> None:
    """Both schedules of torch.distributed.pipelining, with dropout, BatchNorm and auxiliary networks."""
    plan = GuidedPlan(tree=Tape(0, len(BACKBONES[backbone](0.0))), micro_batches=4)
    guided = {"micro_batches": 4, "schedule": schedule}
    compare(pool, tmp_path, 3, {"backbone": backbone}, guided=guided, alone={"memory": plan})


def test_fewer_micro_batches_than_stages_are_for_gpipe(pool: Pool, tmp_path: Path) -> None:
    for told in pool.run(3, tmp_path, _few_micro_batches):
        assert told.startswith("micro_batches: 1f1b wants no fewer parts than there are stages, 3, not 2;")


def _few_micro_batches() -> str:
    net = tl.distribute(build("convolutions"))
    given, told = batches(1)[0] if net.is_first else (), "nothing"
    try:
        net.guided_step(*given, micro_batches=2)
    except ValueError as error:
        told = str(error)
    net.guided_step(*given, micro_batches=2, schedule="gpipe")
    net.close()
    return told


def test_overlapping_micro_batches_of_another_layout(pool: Pool, tmp_path: Path) -> None:
    """The messages of torch.distributed.pipelining are contiguous; features in channels last are not."""
    plan, options = GuidedPlan(tree=Tape(0, 4), micro_batches=4), {"layout": torch.channels_last}
    build_options = {"backbone": "convolutions", "layout": torch.channels_last}
    net = build(**build_options)
    steps = ["guided", "local"] * 2
    losses = run_steps(net, steps, options, {"memory": plan})
    arguments = (build_options, steps, options, {"micro_batches": 4}, {})
    found, state, _, _ = pool.run(3, tmp_path, train_in_parallel, *arguments)[-1]
    for a, b in zip(found, losses, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(state, state_of(net), rtol=1e-3, atol=1e-5)


def test_the_input_travels_along_for_rules_that_read_it(pool: Pool, tmp_path: Path) -> None:
    compare(pool, tmp_path, 3, {"backbone": "convolutions", "rule": ReadsInput()})


def test_a_rule_that_reads_the_input_in_secret_is_refused(pool: Pool, tmp_path: Path) -> None:
    told = pool.run(2, tmp_path, _in_secret)[1]
    assert told.endswith(
        "reads the network's input, which is not sent to this rank; set reads_input = True in its class"
    )


class ReadsInSecret(ReadsInput):
    reads_input = False


def _in_secret() -> str:
    net = parallel.distribute(build("convolutions", rule=ReadsInSecret()), assignment=[1, 3], timeout=20)
    try:
        net.local_step(*(batches(1)[0] if net.is_first else ()))
    except ValueError as error:
        return str(error)
    finally:
        net.close()
    return "nothing"


def test_targets_of_any_structure_travel_along(pool: Pool, tmp_path: Path) -> None:
    """Class probabilities beside a number that changes from batch to batch."""
    pool.run(2, tmp_path, _structured_targets)


def _structured_targets() -> None:
    def criterion(output: Tensor, target: Any) -> Tensor:
        return F.cross_entropy(output, target["p"]) * target["weight"]

    torch.manual_seed(0)
    alone = tl.decouple(convolutions(0.0), sample=(8, 3, 8, 8), criterion=criterion)
    torch.manual_seed(0)
    net = parallel.distribute(tl.decouple(convolutions(0.0), sample=(8, 3, 8, 8), criterion=criterion))
    for i, (x, y) in enumerate(batches(70)):
        target = {"p": F.one_hot(y, 5).float(), "weight": 1.0 + i}
        expected = alone.local_step(x, target)
        losses = net.local_step(*((x, target) if net.is_first else ()))
        assert [float(a) for a in losses] == [float(a) for a in expected[: len(losses)]]
    net.close()


def test_optimizers_of_modules_step_within_the_step(pool: Pool, tmp_path: Path) -> None:
    for result in pool.run(2, tmp_path, _optimizers_of_modules):
        assert_same(*result)


def _optimizers_of_modules() -> Any:
    alone, net = build("convolutions"), parallel.distribute(build("convolutions"))
    for network in (alone, net):
        torch.manual_seed(1)
        optimizers = [torch.optim.SGD(parameters, lr=0.05) for parameters in network.module_parameters()]
        for guided, (x, y) in zip([False, True, False, True], batches(4), strict=True):
            step = network.guided_step if guided else network.local_step
            step(*((x, y) if getattr(network, "is_first", True) else ()), optimizers=optimizers)
    state = net.state_dict(), state_of(alone)
    net.close()
    return state


def test_bf16_boundaries_halve_the_traffic(pool: Pool, tmp_path: Path) -> None:
    """And change the result a little."""
    sent, states = [], []
    for i, boundary in enumerate([None, "bf16"]):
        folder = tmp_path / str(i)
        folder.mkdir()
        arguments = ({"backbone": "transformer"}, ["local"] * 2, {}, {}, {"boundary": boundary})
        results = pool.run(2, folder, train_in_parallel, *arguments)
        sent.append(results[0][3])
        states.append(results[0][1])
    features, rest = 8 * 16 * 16, 2 * (8 * 8 + 5056 + 2 * 4 + 4)
    assert 2 * features * 4 < sent[0] <= 2 * features * 4 + rest
    assert sent[0] - sent[1] == 2 * features * 2
    names = [name for name in states[0] if not torch.equal(states[0][name], states[1][name])]
    assert names and all(torch.allclose(states[0][name], states[1][name], atol=1e-2) for name in names)


# --- batches of any kind ---


def build_llama(tied: bool = True, modules: int = 4, rule: Any = "greedy", dropout: float = 0.0) -> Any:
    """A small Llama, cut; what it is called with is a mapping of token ids and a mask."""
    transformers = pytest.importorskip("transformers")
    torch.manual_seed(0)
    config = transformers.LlamaConfig(
        vocab_size=100, hidden_size=32, intermediate_size=64, num_hidden_layers=6, num_attention_heads=4,
        num_key_value_heads=2, tie_word_embeddings=tied, attention_dropout=dropout, use_cache=False,
    )  # fmt: skip
    model = transformers.LlamaForCausalLM(config)
    net = tl.decouple(model, modules, sample=tokens(1)[0][0], rule=rule, prediction=channels_first)
    torch.manual_seed(5)
    return net


def channels_first(output: Any) -> Tensor:
    """Logits as torch's cross-entropy wants them."""
    return output.logits.transpose(1, 2)


def tokens(count: int, size: int = 4, length: int = 10) -> list[tuple[dict[str, Tensor], Tensor]]:
    generator = torch.Generator().manual_seed(7)
    found = []
    for _ in range(count):
        ids = torch.randint(100, (size, length), generator=generator)
        lengths = torch.randint(3, length + 1, (size, 1), generator=generator)
        mask = (torch.arange(length) < lengths).long()
        found.append(({"input_ids": ids, "attention_mask": mask}, ids.roll(-1, 1).masked_fill(mask == 0, -100)))
    return found


class PerToken(tl.GreedyRule):
    """A linear auxiliary network at every position."""

    def auxiliary(self, site: Any) -> nn.Module:
        return nn.Linear(site.channels, site.output_shape[1])

    def predict(self, site: Any, auxiliary: nn.Module, features: Tensor) -> Tensor:
        return auxiliary(features).transpose(1, 2)


class Conditioned(nn.Module):
    """Takes an image, a condition that every block reads, a scale that the first one reads, and class numbers."""

    class Layer(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.linear = nn.Linear(12, 12)

        def forward(self, h: Tensor, condition: Tensor) -> Tensor:
            return h + F.dropout(torch.tanh(self.linear(h) + condition), 0.2, self.training)

    def __init__(self) -> None:
        super().__init__()
        self.embed, self.layers = nn.Linear(8, 12), nn.ModuleList([self.Layer() for _ in range(4)])
        self.head = nn.Linear(12, 5)

    def forward(self, x: Tensor, condition: Tensor, scale: Tensor, flags: Tensor) -> Tensor:
        h = self.embed(x * scale)
        for layer in self.layers:
            keep = F.dropout(torch.ones(h.shape[0], 1), 0.1, self.training) > 0  # drawn between the units
            h = layer(h, (condition * 2).where(flags[:, None] & keep, 0))
        return self.head(h)


def build_conditioned() -> Any:
    torch.manual_seed(0)
    net = tl.decouple(Conditioned(), 3, sample=conditions(1)[0][0])
    torch.manual_seed(5)
    return net


def conditions(count: int, size: int = 8) -> list[tuple[tuple[Tensor, ...], Tensor]]:
    generator = torch.Generator().manual_seed(7)
    return [
        (
            (
                torch.randn(size, 8, generator=generator),
                torch.randn(size, 12, generator=generator),
                torch.rand(size, 1, generator=generator),
                torch.rand(size, generator=generator) < 0.5,
            ),
            torch.randint(5, (size,), generator=generator),
        )
        for _ in range(count)
    ]


def run_any(
    net: Any, given: list[Any], kinds: list[str], guided: dict[str, Any], options: dict[str, Any], accumulate: int = 1
) -> Any:
    optimizer = torch.optim.AdamW(net.parameters(), lr=1e-2)
    first, told = getattr(net, "is_first", True), []
    for i, (kind, batch) in enumerate(zip(kinds, given, strict=True)):
        step = net.local_step if kind == "local" else net.guided_step
        more = guided if kind == "guided" else {}
        losses = step(*(batch if first else ()), **more, **options)
        if (i + 1) % accumulate == 0:
            optimizer.step()
            optimizer.zero_grad()
        told.append([loss.item() for loss in losses])
    return told


def train_any(make: Any, make_options: dict[str, Any], batches_of: Any, rest: tuple[Any, ...], how: Any) -> Any:
    net = parallel.distribute(make(**make_options), timeout=60, **how)
    losses = run_any(net, batches_of(len(rest[0])), *rest)
    state, sent, random = state_of(net), net.bytes_sent, torch.get_rng_state()
    given = batches_of(1)[0]
    net.eval()
    outputs, _ = net.depth_outputs(*(given if net.is_first else ()))
    net.close()
    return losses, state, random, {k: value.clone() for k, value in outputs.items()}, sent


def compare_any(
    pool: Pool,
    folder: Path,
    world: int,
    make: Any,
    batches_of: Any,
    *,
    kinds: str = "llgllggl",
    guided: dict[str, Any] | None = None,
    alone: dict[str, Any] | None = None,
    options: dict[str, Any] | None = None,
    accumulate: int = 1,
    make_options: dict[str, Any] | None = None,
    **how: Any,
) -> Any:
    names = ["local" if kind == "l" else "guided" for kind in kinds]
    rest = (names, guided or {}, options or {}, accumulate)
    net = make(**(make_options or {}))
    losses = run_any(net, batches_of(len(kinds)), names, alone or guided or {}, options or {}, accumulate)
    random, state = torch.get_rng_state(), state_of(net)
    results = pool.run(world, folder, train_any, make, make_options or {}, batches_of, rest, how)
    assert results[-1][0] == losses
    for _, found, *_ in results:
        assert_same(found, state)
    assert torch.equal(results[0][2], random)
    net.eval()
    expected = net.depth_outputs(batches_of(1)[0][0])
    outputs = {k: value for result in results for k, value in result[3].items()}
    assert all(torch.equal(outputs[k], value) for k, value in enumerate(expected))
    return results


@pytest.mark.parametrize("tied", [True, False])
@pytest.mark.parametrize("world", [2, 3])
def test_a_llama_with_a_mask_equals_the_single_process(pool: Pool, tmp_path: Path, tied: bool, world: int) -> None:
    """Token ids and padding as a mapping; the embedding is on the first rank and the head on the last."""
    options = {"tied": tied, "rule": PerToken(), "dropout": 0.1}
    compare_any(pool, tmp_path, world, build_llama, tokens, make_options=options)


@pytest.mark.parametrize(
    "guided",
    [
        {"recompute": "modules"},
        {"recompute": 2},
        {"recompute": 3},
        {"memory": "exact"},
        {"memory": GuidedPlan(tree=Tape(0, 7), micro_batches=2)},
        {"memory": GuidedPlan(tree=Again(Tape(0, 2), Keep(Tape(2, 5), Tape(5, 7))), micro_batches=2)},
    ],
)
def test_a_tied_parameter_in_recomputing_guided_steps(pool: Pool, tmp_path: Path, guided: dict[str, Any]) -> None:
    """Also where gradients of two batches are accumulated, which shows in what order they are added."""
    options = {"rule": PerToken()}
    compare_any(pool, tmp_path, 3, build_llama, tokens, guided=guided, accumulate=2, make_options=options)


def test_a_tied_parameter_under_autocast(pool: Pool, tmp_path: Path) -> None:
    options = {"autocast": torch.bfloat16}
    compare_any(pool, tmp_path, 2, build_llama, tokens, options=options, make_options={"rule": PerToken()})


def test_a_tied_parameter_in_recomputing_local_steps(pool: Pool, tmp_path: Path) -> None:
    options = {"recompute": {0: Again(Tape(0, 1), Tape(1, 2)), 2: Again(Tape(4, 5), Tape(5, 6))}}
    make_options = {"rule": PerToken(), "dropout": 0.1}
    compare_any(pool, tmp_path, 2, build_llama, tokens, kinds="lll", options=options, make_options=make_options)


class Shared(nn.Module):
    """One layer that is called four times, beside a norm of each call's own."""

    def __init__(self) -> None:
        super().__init__()
        self.layer = nn.Linear(8, 8)
        self.norms = nn.ModuleList([nn.LayerNorm(8) for _ in range(5)])
        self.head = nn.Linear(8, 5)

    def forward(self, x: Tensor) -> Tensor:
        for norm in self.norms:
            x = norm(x + torch.tanh(self.layer(x)))
        return self.head(x)


def build_shared() -> Any:
    torch.manual_seed(0)
    net = tl.decouple(Shared(), cuts=[f"norms.{i}" for i in range(5)], sample=(8, 8))
    torch.manual_seed(5)
    return net


def vectors(count: int) -> list[tuple[Tensor, Tensor]]:
    generator = torch.Generator().manual_seed(7)
    return [(torch.randn(8, 8, generator=generator), torch.randint(5, (8,), generator=generator)) for _ in range(count)]


@pytest.mark.parametrize("guided", [{}, {"recompute": 2}, {"recompute": 4}])
def test_a_layer_that_all_ranks_share(pool: Pool, tmp_path: Path, guided: dict[str, Any]) -> None:
    """Several uses on each rank: the order in which gradients are added is that of the single process."""
    compare_any(pool, tmp_path, 3, build_shared, vectors, guided=guided, accumulate=2)


def test_optimizers_of_modules_with_a_tied_parameter(pool: Pool, tmp_path: Path) -> None:
    for result in pool.run(2, tmp_path, _tied_optimizers):
        assert_same(*result)


def _tied_optimizers() -> Any:
    alone, net = build_shared(), parallel.distribute(build_shared())
    for network in (alone, net):
        optimizers = [torch.optim.SGD(parameters, lr=0.05, momentum=0.9) for parameters in network.module_parameters()]
        for guided, batch in zip([False, True, False, True], vectors(4), strict=True):
            step = network.guided_step if guided else network.local_step
            step(*(batch if getattr(network, "is_first", True) else ()), optimizers=optimizers)
    state = net.state_dict(), state_of(alone)
    net.close()
    return state


def test_a_tuple_batch_equals_the_single_process(pool: Pool, tmp_path: Path) -> None:
    """Of its tensors only those travel that later modules read; and random numbers are drawn between the units."""
    net = build_conditioned()
    assert [set(leaves) for leaves in net.chain.facts.inputs][0::4] == [{0, 1, 2}, {1}]
    results = compare_any(pool, tmp_path, 3, build_conditioned, conditions)
    features, condition = 8 * 12 * 4, 8 * 12 * 4
    assert results[0][4] < 9 * 2 * (features + condition) + 9 * (5056 + 8 * 8 + 8 + 16 + 12) + 3 * features


def test_overlapping_micro_batches_of_a_tuple_batch(pool: Pool, tmp_path: Path) -> None:
    plan = GuidedPlan(tree=Tape(0, build_conditioned().chain.num_units), micro_batches=4)
    guided = {"micro_batches": 4}
    compare_any(pool, tmp_path, 3, build_conditioned, conditions, guided=guided, alone={"memory": plan})


def test_overlapping_micro_batches_of_tokens(pool: Pool, tmp_path: Path) -> None:
    """Their shares are those of the tokens that count."""
    plan = GuidedPlan(tree=Tape(0, build_llama().chain.num_units), micro_batches=2)
    options = {"tied": False, "rule": PerToken()}
    arguments = {"guided": {"micro_batches": 2}, "alone": {"memory": plan}, "make_options": options}
    compare_any(pool, tmp_path, 2, build_llama, tokens, **arguments)


class Masked(nn.Module):
    """Hands its mask on beside the features."""

    def __init__(self) -> None:
        super().__init__()
        self.linear = nn.Linear(8, 8)

    def forward(self, h: Tensor, mask: Tensor) -> tuple[Tensor, Tensor, int]:
        return h + torch.tanh(self.linear(h)).where(mask, 0), mask.roll(1, 1), 3


class PassesOn(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.layers, self.head = nn.ModuleList([Masked() for _ in range(4)]), nn.Linear(8, 5)

    def forward(self, x: Tensor) -> Tensor:
        h, mask = x * 2, x > 0
        for layer in self.layers:
            h, mask, number = layer(h, mask)
            assert number == 3
        return self.head(h)


def build_passes_on() -> Any:
    torch.manual_seed(0)
    net = tl.decouple(PassesOn(), "all", sample=(8, 8))
    torch.manual_seed(5)
    return net


@pytest.mark.parametrize("guided", [{}, {"recompute": "modules"}])
def test_what_modules_hand_on_beside_the_features_travels_along(
    pool: Pool, tmp_path: Path, guided: dict[str, Any]
) -> None:
    compare_any(pool, tmp_path, 2, build_passes_on, vectors, guided=guided)


# --- replicas ---


@pytest.mark.parametrize("kind", ["local", "guided", "1f1b"])
def test_a_mesh_averages_the_gradients_of_its_replicas(pool: Pool, tmp_path: Path, kind: str) -> None:
    """2 × 2: the gradients, auxiliary networks included, are the means over the two halves of the batch."""
    results = pool.run(4, tmp_path, _mesh, kind)
    for gradients, expected in results:
        assert gradients.keys() == expected.keys() and len(gradients) > 4
        for name in gradients:
            assert torch.equal(gradients[name], expected[name]), name
    assert any(name.startswith("auxiliary") for name in results[0][0])


def _mesh(kind: str) -> Any:
    alone = build("convolutions", 0.0)
    net = parallel.distribute(build("convolutions", 0.0), replicas=2, timeout=60)
    assert (net.replica, net.stage) == divmod(dist.get_rank(), 2)
    ((x, y),) = batches(1, 16)
    halves = list(zip(x.chunk(2), y.chunk(2), strict=True))
    given = halves[net.replica] if net.is_first else ()
    start = [b.clone() for b in alone.buffers()]
    options: dict[str, Any] = {}
    if kind == "1f1b":
        options = {"memory": GuidedPlan(tree=Tape(0, 4), micro_batches=2)}
        net.guided_step(*given, micro_batches=2)
    else:
        (net.local_step if kind == "local" else net.guided_step)(*given)
    sums: dict[str, Tensor] = {}
    for half in halves:
        for buffer, before in zip(alone.buffers(), start, strict=True):
            buffer.copy_(before)  # every replica has its own
        (alone.local_step if kind == "local" else alone.guided_step)(*half, **options)
        for name, p in alone.named_parameters():
            if p.grad is not None:
                sums[name] = sums[name] + p.grad if name in sums else p.grad
            p.grad = None
    found = {name: p.grad for name, p in net.named_parameters() if p.grad is not None}
    net.close()
    return found, {name: sums[name] / 2 for name, _ in net.named_parameters() if name in sums}


CRITERIA: dict[str, Any] = {
    "ignored": partial(F.cross_entropy, ignore_index=1),
    "weighted": partial(F.cross_entropy, weight=torch.arange(1.0, 11.0)),
    "sum": partial(F.cross_entropy, reduction="sum"),
}


class Linear(tl.Rule):
    """An auxiliary network without BatchNorm, which sees a replica's part of the batch only."""

    def auxiliary(self, site: tl.Site) -> nn.Module:
        return nn.Linear(site.channels, 10)


@pytest.mark.parametrize("kind", ["local", "guided", "1f1b"])
@pytest.mark.parametrize("criterion", list(CRITERIA))
def test_replicas_count_by_what_the_criterion_divides_by(pool: Pool, tmp_path: Path, criterion: str, kind: str) -> None:
    """As in the loss of the whole batch, of which a replica has more targets that count than the other; or all."""
    for gradients, expected in pool.run(4, tmp_path, _uneven, criterion, kind):
        for name in gradients:
            torch.testing.assert_close(gradients[name], expected[name], msg=lambda told, name=name: f"{name}: {told}")


def _uneven(name: str, kind: str) -> Any:
    def make() -> tl.DecoupledNetwork:
        torch.manual_seed(0)
        layers = [nn.Sequential(nn.Flatten(), nn.Linear(192, 8)), nn.Linear(8, 8), nn.Linear(8, 8), nn.Linear(8, 10)]
        return tl.decouple(layers, sample=(8, 3, 8, 8), rule=Linear(), criterion=CRITERIA[name])

    alone, net = make(), parallel.distribute(make(), replicas=2, timeout=60)
    ((x, y),) = batches(1, 16)
    y[:8] = torch.tensor([1, 1, 1, 9, 9, 1, 1, 2])
    if name == "ignored" and kind == "local":
        y[:8] = 1  # nothing counts in the first half
    given = [x.chunk(2)[net.replica], y.chunk(2)[net.replica]] if net.is_first else []
    if kind == "1f1b":
        net.guided_step(*given, micro_batches=2)
    else:
        (net.local_step if kind == "local" else net.guided_step)(*given)
    (alone.local_step if kind == "local" else alone.guided_step)(x, y)
    found = {name: p.grad for name, p in net.named_parameters() if p.grad is not None}
    net.close()
    return found, {name: p.grad for name, p in alone.named_parameters() if p.grad is not None}


# --- refusals ---


def test_ranks_that_are_not_of_one_mind_are_refused(pool: Pool, tmp_path: Path) -> None:
    told = pool.run(2, tmp_path, _differ)[1]
    seed, options, order = told
    assert seed.startswith("ValueError: the checksum of the weights is ") and " on rank 1 and " in seed
    assert options.startswith("ValueError: in_flight is 3 on rank 1 and 2 on rank 0: start all ranks with the same")
    assert order.startswith("RuntimeError: rank 0 (local modules 1 to 3 of 4) is at another step")


def _differ() -> list[str]:
    rank, told = dist.get_rank(), []
    torch.manual_seed(rank)
    mixed = tl.decouple(convolutions(0.0), sample=(8, 3, 8, 8))
    for net, how in ((mixed, {}), (build("convolutions"), {"in_flight": 2 + rank})):
        try:
            parallel.distribute(net, **how)
        except ValueError as error:
            told.append(f"{type(error).__name__}: {error}")
    net = parallel.distribute(build("convolutions", 0.0), assignment=[3, 1])
    try:
        net.local_step(*batches(1)[0]) if rank == 0 else net.guided_step()
    except RuntimeError as error:
        told.append(f"{type(error).__name__}: {error}")
    net.close()
    return told


def test_a_silent_peer_runs_into_the_timeout(pool: Pool, tmp_path: Path) -> None:
    told = pool.run(2, tmp_path, _silent, fails=True)
    assert told[1] == (
        "PeerLost: rank 0 (local modules 1 to 2 of 4) has been silent for 2 s: see whether it hangs, or give a longer "
        "timeout"
    )


def test_a_rule_that_reads_the_next_module_is_refused(pool: Pool, tmp_path: Path) -> None:
    for told in pool.run(2, tmp_path, _next_module):
        assert told.startswith("rule: ReadsNext() reads the parameters of the module that follows, which may be on")


class Unfit(nn.Module):
    """Four layers, and one thing that several ranks cannot do."""

    class Layer(nn.Module):
        def __init__(self, what: str, norm: nn.Module | None) -> None:
            super().__init__()
            self.what, self.linear, self.norm = what, nn.Linear(8, 8), norm

        def forward(self, x: Tensor) -> Tensor:
            x = torch.tanh(self.linear(x if self.norm is None else self.norm(x)))
            if self.what == "layers left out" and self.training and torch.rand([]) < 0.5:
                return x * 1.0
            return F.dropout(x, 0.1, self.training and self.what == "layers left out")

    def __init__(self, what: str) -> None:
        super().__init__()
        self.what, self.head = what, nn.Linear(8, 5)
        norm = nn.BatchNorm1d(8) if what == "a shared norm" else None
        self.layers = nn.ModuleList([self.Layer(what, norm) for _ in range(4)])
        self.register_buffer("count", torch.zeros(()))

    def forward(self, x: Tensor) -> Tensor:
        if self.what == "python":
            x = x * random.random()
        if self.what == "a counter":
            self.count += 1
        for layer in self.layers:
            x = layer(x)
        return self.head(x)


@pytest.mark.parametrize(
    ("what", "message"),
    [
        ("python", "model: Unfit draws from Python's or numpy's random generator in its forward, and a rank cannot"),
        ("a counter", "model: code of Unfit between its units writes the buffer 'count', of which every rank would"),
        ("a shared norm", "assignment: local modules on several ranks use the buffer 'layers.0.norm."),
        ("layers left out", "model: its forward draws random numbers and decides by the values of random numbers (la"),
        ("carry", 'carry: a network that was decoupled with carry="collect" hands gradients back across its cuts'),
        ("micro-batches", "micro_batches: 'layer.weight' is used by local modules on several ranks, and schedules th"),
    ],
)
def test_what_several_ranks_cannot_do_is_refused(pool: Pool, tmp_path: Path, what: str, message: str) -> None:
    for told in pool.run(2, tmp_path, _unfit, what):
        assert told is None or told.startswith(message)
    assert told is not None or what == "layers left out"


def _unfit(what: str) -> str | None:
    torch.manual_seed(0)
    carry = "collect" if what == "carry" else None
    net = build_shared() if what == "micro-batches" else tl.decouple(Unfit(what), 4, sample=(8, 8), carry=carry)
    try:
        shared = parallel.distribute(net, timeout=20)
        if what == "layers left out" and not shared.is_first:  # nothing has come
            shared.close()
            return None
        shared.guided_step(*(vectors(1)[0] if shared.is_first else ()), micro_batches=2 if what[0] == "m" else None)
    except ValueError as error:
        if "shared" in locals():
            shared.close()
        return str(error)
    return "nothing"


class ReadsNext(tl.GreedyRule):
    reads_next_module = True

    def __repr__(self) -> str:
        return "ReadsNext()"


def _next_module() -> str:
    try:
        parallel.distribute(build("convolutions", rule=ReadsNext()))
    except ValueError as error:
        return str(error)
    return "nothing"


def _silent() -> None:
    net = parallel.distribute(build("convolutions", 0.0), assignment=[2, 2], timeout=2)
    if net.is_first:
        time.sleep(4)
        raise AssertionError("it woke up")
    net.local_step()


def test_a_killed_peer_is_named_at_once(pool: Pool, tmp_path: Path) -> None:
    start = time.monotonic()
    told = pool.run(3, tmp_path, _killed, fails=True)
    assert time.monotonic() - start < 60
    assert told[0].startswith("PeerLost: rank 1 (local module 2 of 4) is gone")
    assert told[2].startswith("PeerLost: rank 1 (local module 2 of 4) is gone")


def _killed() -> None:
    net = parallel.distribute(build("convolutions", 0.0), assignment=[1, 1, 2], timeout=120)
    for i, batch in enumerate(batches(50)):
        if net.stage == 1 and i == 5:
            os.kill(os.getpid(), signal.SIGKILL)
        net.local_step(*(batch if net.is_first else ()))
    net.close()


@pytest.mark.parametrize(
    ("how", "message"),
    [
        ({"replicas": 2}, "replicas: 1 ranks cannot be 2 rows of equal length"),
        ({"in_flight": 0}, "in_flight: must be a whole number of at least 1, not 0"),
        ({"timeout": 0}, "timeout: must be a number of seconds above 0, not 0"),
        ({"assignment": [1, 3]}, r"assignment: \[1, 3\] does not give 4 local modules to 1 stages"),
        ({"assignment": "luck"}, "assignment: must be 'flops', 'time' or a list of numbers, not 'luck'"),
        ({"assignment": "time"}, "sample: assignment='time' needs a batch and its target on rank 0"),
    ],
)
def test_wrong_arguments_are_told(tmp_path: Path, how: dict[str, Any], message: str) -> None:
    dist.init_process_group("gloo", store=dist.FileStore(str(tmp_path / "store"), 1), rank=0, world_size=1)
    try:
        with pytest.raises(ValueError, match=message):
            parallel.distribute(build("convolutions"), **how)
    finally:
        dist.destroy_process_group()


def test_without_a_process_group_the_message_says_what_to_call() -> None:
    with pytest.raises(ValueError, match=r"distribute: torch\.distributed is not initialised; call init_process_group"):
        parallel.distribute(build("convolutions"))


def test_one_rank_is_the_single_process(tmp_path: Path) -> None:
    """The steps of a single stage, which has nobody to talk to."""
    alone = build("convolutions")
    expected = run_steps(alone, STEPS, {}, {})
    dist.init_process_group("gloo", store=dist.FileStore(str(tmp_path / "store"), 1), rank=0, world_size=1)
    try:
        net = parallel.distribute(build("convolutions"), assignment="time", sample=batches(1)[0])
        assert run_steps(net, STEPS, {}, {}) == expected
        assert_same(state_of(net), state_of(alone))
        net.close()
    finally:
        dist.destroy_process_group()


# --- assignment ---


def test_modules_are_assigned_so_that_the_slowest_stage_is_fastest() -> None:
    assert parallel.assign([4, 1, 1, 1, 1], 2) == [range(0, 1), range(1, 5)]
    assert parallel.assign([1, 1, 1], 3) == [range(0, 1), range(1, 2), range(2, 3)]
    with pytest.raises(ValueError, match="ranks: 3 processes cannot share 2 local modules"):
        parallel.assign([1, 1], 3)


def test_measuring_leaves_the_network_alone() -> None:
    net = build("convolutions")
    before, random = state_of(net), torch.get_rng_state()
    seconds = parallel.measure_seconds(net, *batches(1)[0])
    assert len(seconds) == net.num_modules and all(value > 0 for value in seconds)
    assert_same(state_of(net), before)
    assert torch.equal(torch.get_rng_state(), random)
    assert all(parameter.grad is None for parameter in net.parameters())
