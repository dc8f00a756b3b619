"""A step runs the network's own forward: what people do with their networks goes on working, or is refused in words."""

from __future__ import annotations

import copy
import functools
import gc
import random
import weakref
from collections.abc import Callable, Iterator
from typing import Any

import numpy as np
import pytest
import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

import torchlocal as tl

X, Y = torch.randn(16, 6, generator=torch.Generator().manual_seed(0)), torch.arange(16) % 5
LINEAR = tl.GreedyRule("linear")


class Block(nn.Module):
    """A residual block with dropout."""

    def __init__(self, width: int = 8) -> None:
        super().__init__()
        self.f, self.g = nn.Linear(width, 2 * width), nn.Linear(2 * width, width)

    def forward(self, x: Tensor) -> Tensor:
        return x + self.g(F.dropout(F.relu(self.f(x)), 0.2, self.training))


class Net(nn.Module):
    """A stem, a list of blocks and a head, called in a loop."""

    def __init__(self, num_blocks: int = 4) -> None:
        super().__init__()
        self.stem = nn.Linear(6, 8)
        self.blocks = nn.ModuleList(Block() for _ in range(num_blocks))
        self.head = nn.Linear(8, 5)

    def forward(self, x: Tensor) -> Tensor:
        x = self.stem(x)
        for block in self.blocks:
            x = block(x)
        return self.head(x)


def make(build: Callable[[], nn.Module] = Net) -> nn.Module:
    torch.manual_seed(0)
    return build()


def seeded(seed: int = 3) -> None:
    torch.manual_seed(seed), random.seed(seed), np.random.seed(seed)


def grads(model: nn.Module) -> list[Tensor | None]:
    return [None if p.grad is None else p.grad.clone() for p in model.parameters()]


def same(first: list[Tensor | None], second: list[Tensor | None]) -> bool:
    pairs = zip(first, second, strict=True)
    return all(a is b is None or (a is not None and b is not None and torch.equal(a, b)) for a, b in pairs)


def assert_guided_is_plain(net: tl.DecoupledNetwork, batch: Any = X, target: Any = Y, **options: Any) -> None:
    """The guided step of a copy's state equals an ordinary step: loss, gradients, buffers, random state."""
    model, state = net.backbone, copy.deepcopy(net.backbone.state_dict())
    net.zero_grad()
    seeded()
    output = model(*batch) if isinstance(batch, tuple) else model(batch)
    expected = net.criterion(net.chain.prediction(output), target)
    expected.backward()
    plain = [*grads(model), *(b.clone() for b in model.buffers()), torch.rand(2)]
    model.load_state_dict(state)
    net.zero_grad()
    seeded()
    loss = net.guided_step(batch, target, auxiliary="frozen", **options)[-1]
    assert torch.equal(loss, expected.detach())
    assert same(plain, [*grads(model), *(b.clone() for b in model.buffers()), torch.rand(2)])
    model.load_state_dict(state)
    net.zero_grad()


def local_by_hand(net: tl.DecoupledNetwork, modules: list[Callable[[Tensor], Tensor]]) -> list[Tensor]:
    """An independent loop over pieces of the network, which leaves the gradients."""
    features, losses = X, []
    for k, module in enumerate(modules):
        # Where an input carries no gradient, the inside of a reentrant checkpoint learns nothing.
        features = module(features.detach().requires_grad_(k > 0))
        output = net.auxiliary[k](features) if k < len(modules) - 1 else features
        loss = F.cross_entropy(output, Y)
        loss.backward()
        losses.append(loss.detach())
    return losses


def assert_local_is_by_hand(net: tl.DecoupledNetwork, modules: list[Callable[[Tensor], Tensor]]) -> None:
    net.zero_grad()
    seeded()
    expected = local_by_hand(net, modules)
    by_hand = grads(net)
    net.zero_grad()
    seeded()
    losses = net.local_step(X, Y)
    assert all(torch.equal(a, b) for a, b in zip(losses, expected, strict=True))
    assert same(grads(net), by_hand)
    net.zero_grad()


def pieces(model: Any) -> list[Callable[[Tensor], Tensor]]:
    """Net as stem with the first two blocks, and the rest."""
    return [
        lambda x: model.blocks[1](model.blocks[0](model.stem(x))),
        lambda x: model.head(model.blocks[3](model.blocks[2](x))),
    ]


# --- what Python decides ---


class RandomDepth(Net):
    """Leaves its second block out, by chance, as Python's, numpy's and torch's generators have it."""

    def __init__(self) -> None:
        super().__init__()
        self.calls = 0
        self.register_buffer("mean", torch.zeros(8))
        self.register_buffer("steps", torch.zeros((), dtype=torch.int64))

    def forward(self, x: Tensor) -> Tensor:
        self.calls += 1
        self.steps += 1
        x = self.stem(x)
        self.mean = 0.9 * self.mean + 0.1 * x.detach().mean(0)
        for i, block in enumerate(self.blocks):
            if i == 1 and random.random() + np.random.rand() + torch.rand(()).item() < 1.5:
                continue
            x = block(x - self.mean)
        return self.head(x + 0.1 * torch.randn_like(x))


@pytest.mark.parametrize("seed", range(4))
@pytest.mark.parametrize("recompute", [None, "modules", "all units"])
def test_random_depth_attributes_and_buffers_are_the_networks(seed: int, recompute: str | None) -> None:
    net = tl.decouple(make(RandomDepth), cuts=["blocks.0", "blocks.2"], sample=X, rule=LINEAR)
    model: Any = net.backbone
    assert model.calls == 0 and model.steps == 0 and not model.mean.any(), "decouple leaves a mark"
    reference = copy.deepcopy(model)
    how = len(net.partition.units) if recompute == "all units" else recompute
    for step in range(3):
        seeded(10 * seed + step)
        expected = F.cross_entropy(reference(X), Y)
        expected.backward()
        after = torch.rand(1), random.random(), np.random.rand()
        seeded(10 * seed + step)
        loss = net.guided_step(X, Y, auxiliary="frozen", recompute=how)[-1]
        assert torch.equal(loss, expected.detach())
        assert (torch.rand(1), random.random(), np.random.rand()) == after
        assert same(grads(model), grads(reference))
        assert model.calls == reference.calls == step + 1
        assert all(torch.equal(a, b) for a, b in zip(model.buffers(), reference.buffers(), strict=True))
    seeded(seed)
    assert len(net.local_step(X, Y)) == 3 and model.calls == 4


def test_an_attribute_that_changes_and_a_block_that_is_switched_on() -> None:
    class Scheduled(Net):
        rate, used = 0.0, 3

        def forward(self, x: Tensor) -> Tensor:
            x = self.stem(x)
            for block in list(self.blocks)[: self.used]:
                x = F.dropout(block(x), self.rate)
            return self.head(x)

    net = tl.decouple(make(Scheduled), cuts=["blocks.0", "blocks.1"], sample=X)
    assert_guided_is_plain(net)
    net.backbone.rate, net.backbone.used = 0.5, 4
    assert_guided_is_plain(net)
    assert_guided_is_plain(net, recompute="modules")
    net.local_step(X, Y)
    assert net.backbone.blocks[3].f.weight.grad is not None


def test_a_cut_that_is_not_reached_is_told() -> None:
    class Skipping(Net):
        skip = False

        def forward(self, x: Tensor) -> Tensor:
            x = self.stem(x)
            for i, block in enumerate(self.blocks):
                x = x if self.skip and i == 1 else block(x)
            return self.head(x)

    net = tl.decouple(make(Skipping), cuts=["blocks.1"], sample=X)
    net.backbone.skip = True
    for step in (net.local_step, functools.partial(net.guided_step, recompute="modules")):
        with pytest.raises(ValueError, match=r"has not come to the cut point after 'blocks.1' in this step"):
            step(X, Y)
    net.backbone.skip = False
    net.local_step(X, Y)


# --- hooks and wrappers ---


@pytest.mark.parametrize("where", ["", "stem", "blocks.1", "blocks.2", "blocks.2.f", "head"])
def test_hooks_act_in_steps_as_in_the_network(where: str) -> None:
    net = tl.decouple(make(), cuts=["blocks.1"], sample=X)
    module, count = net.backbone.get_submodule(where), [0]

    def counting(_: nn.Module, args: Any, output: Tensor) -> Tensor:
        count[0] += 1
        return output * 1.5

    module.register_forward_pre_hook(lambda _, args: (args[0] * 2,))
    module.register_forward_hook(counting)
    assert_guided_is_plain(net)
    assert_local_is_by_hand(net, pieces(net.backbone)) if where not in ("",) else net.local_step(X, Y)
    assert_guided_is_plain(net, recompute="modules")
    before = count[0]
    net.local_step(X, Y)
    assert count[0] == before + 1


@pytest.mark.parametrize("reentrant", [False, True])
def test_checkpoints_inside_of_modules_work_and_around_a_cut_are_refused(reentrant: bool) -> None:
    class Inside(Block):
        def forward(self, x: Tensor) -> Tensor:
            return x + checkpoint(lambda h: self.g(F.dropout(F.relu(self.f(h)), 0.2)), x, use_reentrant=reentrant)

    class Around(Net):
        def forward(self, x: Tensor) -> Tensor:
            x = self.stem(x)
            for block in self.blocks:
                x = checkpoint(block, x, use_reentrant=reentrant)
            return self.head(x)

    model: Any = make()
    model.blocks = nn.ModuleList(Inside() for _ in range(4))
    net = tl.decouple(model, cuts=["blocks.1"], sample=X)
    assert_guided_is_plain(net)
    assert_local_is_by_hand(net, pieces(model))
    assert all(p.grad is None for p in model.parameters())
    net.local_step(X, Y)
    assert all(p.grad is not None for p in model.parameters())

    with pytest.raises(ValueError, match=r"no cut is possible after 'blocks.1', since .*checkpoint"):
        tl.decouple(make(Around), cuts=["blocks.1"], sample=X)
    late: Any = make()  # the checkpoint comes after decouple
    net = tl.decouple(late, cuts=["blocks.1"], sample=X)
    late.__class__ = Around
    with pytest.raises(ValueError, match=r"cut point after 'blocks.1' is inside of a checkpoint"):
        net.local_step(X, Y)


def test_steps_without_gradients_are_refused() -> None:
    net = tl.decouple(make(), 2, sample=X)
    for step in (net.local_step, net.guided_step):
        with torch.no_grad(), pytest.raises(ValueError, match="gradients are switched off here"):
            step(X, Y)


@pytest.mark.parametrize("how", ["torch.compile", "compile", "blocks compile", "blocks torch.compile", "net"])
def test_compiled_networks(how: str) -> None:
    compiled: list[Any] = []

    def backend(graph: torch.fx.GraphModule, _: Any) -> Any:
        compiled.append(graph)
        return graph.forward

    model: Any = make()
    model.eval()  # compiled dropout draws its own random numbers
    reference = copy.deepcopy(model)
    if how == "blocks torch.compile":
        model.blocks = nn.ModuleList(torch.compile(block, backend=backend) for block in model.blocks)
    cuts = ["_orig_mod.blocks.1" if how == "torch.compile" else "blocks.1"]
    whole = torch.compile(model, backend=backend) if how == "torch.compile" else model
    net = tl.decouple(whole, cuts=cuts, sample=X)
    if how == "compile":
        model.compile(backend=backend)
    if how == "blocks compile":
        for block in model.blocks:
            block.compile(backend=backend)
    if how == "net":
        net.compile(backend=backend)
    F.cross_entropy(reference(X), Y).backward()
    net.guided_step(X, Y, auxiliary="frozen")
    for p, q in zip(model.parameters(), reference.parameters(), strict=True):
        torch.testing.assert_close(p.grad, q.grad)
    assert compiled
    net.zero_grad()
    seen = len(net.local_step(X, Y))
    assert seen == 2
    reference.zero_grad()
    hand = tl.decouple(reference, cuts=["blocks.1"], sample=X)
    hand.auxiliary.load_state_dict(net.auxiliary.state_dict())
    hand.local_step(X, Y)
    for p, q in zip(model.parameters(), reference.parameters(), strict=True):
        torch.testing.assert_close(p.grad, q.grad)


def test_parametrizations_weight_and_spectral_norm_and_frozen_layers() -> None:
    model: Any = make()
    nn.utils.parametrizations.weight_norm(model.stem)
    nn.utils.parametrizations.spectral_norm(model.blocks[0].f)
    nn.utils.parametrizations.orthogonal(model.blocks[1].g)
    nn.utils.weight_norm(model.blocks[2].f)
    nn.utils.spectral_norm(model.blocks[3].g)
    for p in model.blocks[0].parameters():
        p.requires_grad_(False)
    net = tl.decouple(model, cuts=["blocks.0", "blocks.1"], sample=X)
    assert [tuple(u.output_shape) for u in net.partition.units] == [(16, 8), (16, 8), (16, 5)]
    assert_guided_is_plain(net)
    assert_guided_is_plain(net, recompute="modules")
    net.local_step(X, Y)
    assert all((p.grad is not None) == p.requires_grad for p in model.parameters())


def test_a_frozen_start_is_a_module_all_the_same() -> None:
    model: Any = make()
    for module in (model.stem, *model.blocks[:2]):
        module.requires_grad_(False)
    net = tl.decouple(model, cuts=["blocks.1"], sample=X)
    net.local_step(X, Y)
    assert all((p.grad is not None) == p.requires_grad for p in net.parameters())
    assert_guided_is_plain(net)
    assert_guided_is_plain(net, recompute="modules")


def test_stored_attributes_are_the_steps_own() -> None:
    class Storing(Block):
        def forward(self, x: Tensor) -> Tensor:
            self.seen, self.history = x, [*getattr(self, "history", []), x.detach().sum()]
            return super().forward(x)

    model: Any = make()
    model.blocks = nn.ModuleList(Storing() for _ in range(4))
    before = [dict(vars(m)) for m in model.modules()]
    net = tl.decouple(model, "all", sample=X, rule=LINEAR)
    tl.memory.predict(net)
    assert [set(vars(m)) for m in model.modules()] == [set(v) for v in before]
    net.local_step(X, Y)
    for block in model.blocks:
        # What is stored stays, though the step has no use for it any more.
        assert type(block.seen) is Tensor and block.seen.isfinite().all() and len(block.history) == 1
        assert torch.equal(block.seen.detach().sum(), block.history[0])


def test_what_a_hook_keeps_is_not_given_back() -> None:
    model = nn.Sequential(
        nn.Sequential(*(nn.Sequential(nn.Linear(8, 8), nn.ReLU()) for _ in range(6))), nn.Linear(8, 5)
    )
    x = torch.randn(4, 8)
    net = tl.decouple(model, "all", sample=x, rule=LINEAR)
    net.local_step(x, Y[:4])
    kept: list[Tensor] = []
    for i in range(6):
        model[0][i].register_forward_pre_hook(lambda _, args: kept.append(args[0]))
    net.local_step(x, Y[:4])
    assert len(kept) == 6 and all(t.isfinite().all() for t in kept)
    features = x
    for i, seen in enumerate(list(kept)):
        assert torch.equal(seen, features)
        features = model[0][i](features).detach()


def test_plain_tensors_in_modules_and_criteria() -> None:
    class Table(nn.Module):
        def __init__(self, width: int, out: int) -> None:
            super().__init__()
            self.f, self.table = nn.Linear(width, out), torch.linspace(0, 1, out)

        def forward(self, x: Tensor) -> Tensor:
            return F.relu(self.f(x)) + self.table

    criterion = functools.partial(F.cross_entropy, weight=torch.linspace(1, 2, 5))
    model = nn.Sequential(nn.Sequential(Table(6, 8), Table(8, 8), Table(8, 8)), nn.Linear(8, 5))
    for modules in (2, "fewest"):
        net = tl.decouple(copy.deepcopy(model), modules, sample=X, criterion=criterion)
        for memory in ("exact", "local"):
            assert_guided_is_plain(net, memory=memory)
    assert type(net.backbone[0][0].table) is Tensor


# --- batches ---


class Conditioned(nn.Module):
    """Blocks that all take a condition, which a network of its own makes."""

    def __init__(self) -> None:
        super().__init__()
        self.stem, self.maker = nn.Linear(6, 8), nn.Sequential(nn.Linear(3, 8), nn.Tanh())
        self.blocks = nn.ModuleList(Block() for _ in range(4))
        self.head = nn.Linear(8, 5)

    def forward(self, x: Tensor, *, condition: Tensor, scale: float = 1.0) -> dict[str, Tensor]:
        made, x = self.maker(condition), self.stem(x)
        for block in self.blocks:
            x = block(x + scale * made)
        return {"scores": self.head(x), "features": x}


def test_a_second_tensor_is_named_and_can_be_carried() -> None:
    batch = {"x": X, "condition": torch.randn(16, 3)}
    options: dict[str, Any] = {"sample": batch, "prediction": lambda output: output["scores"], "rule": LINEAR}
    with pytest.raises(ValueError, match=r"a second tensor .* made in 'maker.1', used next in 'Conditioned'") as caught:
        tl.decouple(make(Conditioned), cuts=["blocks.1"], **options)
    assert 'carry="collect"' in str(caught.value) and "\n" not in str(caught.value)
    with pytest.raises(ValueError, match="3 local modules were asked for, but Conditioned can be cut into"):
        tl.decouple(make(Conditioned), 3, **options)
    net = tl.decouple(make(Conditioned), cuts=["blocks.0", "blocks.1"], carry="collect", **options)
    model: Any = net.backbone
    seeded()
    losses = net.local_step(batch, Y)
    carried = grads(net)
    # One backward pass of the sum of all losses, with the features detached by hand, gives the same.
    net.zero_grad()
    seeded()
    made, features, total = model.maker(batch["condition"]), model.stem(X), []
    for i, block in enumerate(model.blocks):
        features = block(features + made)
        if i < 2:
            total.append(F.cross_entropy(net.auxiliary[i](features), Y))
            features = features.detach()
    total.append(F.cross_entropy(model.head(features), Y))
    torch.stack(total).sum().backward()
    assert [float(a) for a in losses] == pytest.approx([float(b) for b in total], rel=1e-6)
    for a, b in zip(carried, grads(net), strict=True):
        torch.testing.assert_close(a, b)
    with pytest.raises(ValueError, match='recompute: a network that was decoupled with carry="collect"'):
        net.guided_step(batch, Y, recompute="modules")


def test_tuples_mappings_and_what_does_not_fit() -> None:
    class Two(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.a, self.b, self.c = nn.Linear(6, 8), nn.Linear(8, 8), nn.Linear(8, 5)

        def forward(self, x: Tensor, keep: Tensor, scale: float = 2.0) -> Tensor:
            return self.c(torch.relu(self.b(torch.relu(self.a(x)))) * keep[:, None] * scale)

    keep = torch.arange(16) % 3 > 0
    for batch in ((X, keep), [X, keep], {"x": X, "keep": keep}, {"x": X, "keep": keep, "scale": 0.5}):
        net = tl.decouple(make(Two), "all", sample=batch)
        arguments = {"x": X, "keep": keep, "scale": batch.get("scale", 2.0) if isinstance(batch, dict) else 2.0}
        expected = F.cross_entropy(net.backbone(**arguments), Y)
        for options in ({}, {"recompute": "modules"}, {"memory": "exact"}, {"memory": "local"}):
            assert torch.equal(net.guided_step(batch, Y, **options)[-1], expected.detach())
        assert len(net.local_step(batch, Y)) == net.num_modules == 2
        assert torch.equal(net.depth_outputs(batch)[-1], net.backbone(**arguments))
        assert tl.memory.predict(net).peak_bytes > 0
    with pytest.raises(
        ValueError, match=r"batch: a batch of shape \(16, 6\) does not fit; the network was decoupled with"
    ):
        net.local_step(X, Y)
    with pytest.raises(ValueError, match=r"sample: Two does not run on a batch \{x: \(16, 6\)\}: TypeError: .*'keep'"):
        tl.decouple(make(Two), 2, sample={"x": X})
    with pytest.raises(ValueError, match="sample: it holds no tensor"):
        tl.decouple(make(Two), 2, sample=[None, {}])


def test_values_of_features_may_be_looked_at() -> None:
    class Routed(nn.Module):
        """Two experts, of which each example goes to one."""

        def __init__(self) -> None:
            super().__init__()
            self.router, self.experts = nn.Linear(8, 2), nn.ModuleList(nn.Linear(8, 8) for _ in range(2))

        def forward(self, x: Tensor) -> Tensor:
            weights = self.router(x).softmax(-1)
            out = torch.zeros_like(x)
            for i, expert in enumerate(self.experts):
                rows = (weights.argmax(-1) == i).nonzero().squeeze(-1)
                if len(rows):
                    out = out.index_add(0, rows, expert(x[rows]) * weights[rows, i, None])
            return x + out

    model: Any = make()
    model.blocks = nn.ModuleList(Routed() for _ in range(4))
    net = tl.decouple(model, 3, sample=X, rule=LINEAR)
    assert net.num_modules == 3
    assert_guided_is_plain(net)
    assert_guided_is_plain(net, recompute="modules")
    net.local_step(X, Y)
    with pytest.raises(ValueError, match="memory: Net does not run on tensors without values"):
        tl.memory.predict(net)


def test_what_comes_before_may_not_be_used_later_without_a_gradient() -> None:
    class Peeking(Net):
        def forward(self, x: Tensor) -> Tensor:
            x = self.stem(x)
            early = x.detach()
            for block in self.blocks:
                x = block(x)
            return self.head(x + early)

    net = tl.decouple(make(Peeking), cuts=["blocks.1"], sample=X)
    assert_guided_is_plain(net)  # one forward is no problem
    net.local_step(X, Y)
    with pytest.raises(ValueError, match=r"cannot run from the cut point after 'blocks.1' on, since something"):
        net.guided_step(X, Y, recompute="modules")


# --- blocks that distribute themselves ---


@pytest.fixture
def process_group(tmp_path: Any) -> Iterator[None]:
    dist.init_process_group("gloo", init_method=f"file://{tmp_path}/store", rank=0, world_size=1)
    yield
    dist.destroy_process_group()


@pytest.mark.usefixtures("process_group")
def test_blocks_in_ddp_and_fsdp() -> None:
    from torch.distributed.fsdp import fully_shard
    from torch.nn.parallel import DistributedDataParallel

    model: Any = make()
    plain = tl.decouple(copy.deepcopy(model), cuts=["blocks.1"], sample=X, rule=LINEAR)
    seeded()
    expected = plain.local_step(X, Y)
    wrapped = copy.deepcopy(model)
    wrapped.blocks = nn.ModuleList(DistributedDataParallel(block) for block in wrapped.blocks)
    net = tl.decouple(wrapped, cuts=["blocks.1"], sample=X, rule=LINEAR)
    net.auxiliary.load_state_dict(plain.auxiliary.state_dict())
    seeded()
    assert all(torch.equal(a, b) for a, b in zip(net.local_step(X, Y), expected, strict=True))
    assert same(grads(net), grads(plain))
    assert_guided_is_plain(net)

    sharded = copy.deepcopy(model)
    for block in sharded.blocks:
        fully_shard(block, mesh=dist.init_device_mesh("cpu", (1,)))
    net = tl.decouple(sharded, cuts=["blocks.1"], sample=X, rule=LINEAR)
    net.auxiliary.load_state_dict(plain.auxiliary.state_dict())
    for _ in range(2):
        net.zero_grad()
        seeded()
        assert all(torch.equal(a, b) for a, b in zip(net.local_step(X, Y), expected, strict=True))
    full = [p.grad.full_tensor() if hasattr(p.grad, "full_tensor") else p.grad for p in net.parameters()]
    assert same(full, grads(plain))

    for whole in (DistributedDataParallel(make()), fully_shard(make(), mesh=dist.init_device_mesh("cpu", (1,)))):
        with pytest.raises(ValueError, match="around the whole network expects one backward pass"):
            tl.decouple(whole, 2, sample=X)


def test_a_network_is_freed_with_its_last_user() -> None:
    model = make()
    reference = weakref.ref(model.head)  # type: ignore[arg-type]
    net = tl.decouple(model, 3, sample=X)
    net.local_step(X, Y)
    net.guided_step(X, Y, memory="exact")
    del model, net
    gc.collect()
    assert reference() is None
