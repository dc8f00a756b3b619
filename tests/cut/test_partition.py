"""Where a network is cut, what its units cost, and what is said when it cannot be cut."""

from __future__ import annotations

import copy
import itertools
import random
import re

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import torchlocal as tl
from torchlocal.cut.forward import Pass
from torchlocal.cut.units import balance
from torchlocal.models import build_model


def resnet(depth: int) -> nn.Module:
    return build_model(f"resnet{depth}", num_classes=10, in_channels=3, image_size=(32, 32))


@pytest.mark.parametrize(("depth", "num_modules"), [(32, 16), (110, 55)])
def test_cifar_resnets_give_the_stem_and_one_residual_block_per_module(depth: int, num_modules: int) -> None:
    model = resnet(depth)
    per_stage = (num_modules - 1) // 3
    for modules in ("all", num_modules):
        net = tl.decouple(model, modules, sample=(2, 3, 32, 32))
        assert net.num_modules == num_modules
        for k, group in enumerate(net.partition.groups[1:-1]):
            (unit,) = (net.partition.units[i] for i in group)
            assert unit.name == f"layer{k // per_stage + 1}.{k % per_stage}"
        assert "layer" not in net.partition.names[0]
        assert net.partition.names[-1].startswith(f"layer3.{per_stage - 1}") and net.partition.names[-1] != "layer3"
        shapes = [tuple(unit.output_shape[1:]) for unit in net.partition.units]
        assert shapes[0] == (16, 32, 32) and shapes[-2] == (64, 8, 8) and shapes[-1] == (10,)


def test_units_cost_what_an_independent_count_says() -> None:
    model = resnet(20)
    sample = torch.randn(4, 3, 32, 32)
    net = tl.decouple(model, "all", sample=sample)
    assert sum(u.num_parameters for u in net.partition.units) == sum(p.numel() for p in model.parameters())

    # 2 · positions · kernel · channels in · channels out, for the middle of the first stage.
    assert net.partition.units[2].flops == 4 * 2 * (2 * 32 * 32 * 9 * 16 * 16)

    # A real forward pass of the first residual block: bytes of what autograd keeps, storages counted once.
    block, features = model.get_submodule("layer1.0"), torch.randn(4, 16, 32, 32, requires_grad=True)
    own = {p.untyped_storage().data_ptr() for p in [*block.parameters(), *block.buffers()]}
    kept: dict[int, int] = {}
    alive = []

    def note(tensor: Tensor) -> Tensor:
        alive.append(tensor)
        if tensor.untyped_storage().data_ptr() not in own:
            kept[tensor.untyped_storage().data_ptr()] = tensor.untyped_storage().nbytes()
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(note, lambda tensor: tensor):
        block(features)
    assert net.partition.units[1].activation_bytes == sum(kept.values())


def test_decoupling_computes_nothing_and_draws_nothing_but_the_auxiliary_networks() -> None:
    model = resnet(20)
    before = {key: tensor.clone() for key, tensor in model.state_dict().items()}
    torch.manual_seed(5)
    net = tl.decouple(model, 4, sample=torch.randn(2, 3, 32, 32), rule=tl.GreedyRule("linear"))
    torch.manual_seed(5)
    torch.randn(2, 3, 32, 32)
    again = [nn.Linear(site.channels, 10) for site in net.sites]
    assert all(torch.equal(a.weight, b[-1].weight) for a, b in zip(again, net.auxiliary, strict=True))
    assert all(torch.equal(tensor, before[key]) for key, tensor in model.state_dict().items())
    assert all(p.grad is None for p in model.parameters())


@pytest.mark.parametrize("seed", range(30))
def test_balance_finds_the_smallest_largest_cost(seed: int) -> None:
    draw = random.Random(seed)
    num_units = draw.randint(2, 9)
    sizes = [draw.randint(0, 20) for _ in range(num_units)]
    extra = [draw.randint(0, 10) for _ in range(num_units)]

    def cost(first: int, last: int) -> float:
        return sum(sizes[first:last]) + extra[last - 1]

    for num_groups in range(1, num_units + 1):
        groups = balance(num_units, num_groups, cost)
        assert [i for g in groups for i in g] == list(range(num_units)) and all(len(g) for g in groups)
        assert len(groups) == num_groups
        every = [
            [cost(a, b) for a, b in itertools.pairwise((0, *inner, num_units))]
            for inner in itertools.combinations(range(1, num_units), num_groups - 1)
        ]
        smallest = min(max(costs) for costs in every)
        found = [cost(g.start, g.stop) for g in groups]
        assert max(found) == smallest
        assert sum(c * c for c in found) == min(sum(c * c for c in costs) for costs in every if max(costs) == smallest)


def test_the_balanced_cost_includes_the_auxiliary_network() -> None:
    model = resnet(32)
    partition = tl.decouple(model, 4, sample=(8, 3, 32, 32)).partition
    bare = [sum(partition.units[i].activation_bytes for i in g) for g in partition.groups]
    # A boundary is kept by both its neighbours but counted once, so only the auxiliary network can lift the cost.
    assert all(cost > 0.8 * own for cost, own in zip(partition.costs, bare, strict=True))
    wide = tl.decouple(model, "all", sample=(8, 3, 32, 32), rule=tl.GreedyRule("conv")).partition
    thin = tl.decouple(model, "all", sample=(8, 3, 32, 32), rule=tl.GreedyRule("linear")).partition
    assert (
        all(a > b for a, b in zip(wide.costs[:-1], thin.costs[:-1], strict=True)) and wide.costs[-1] == thin.costs[-1]
    )
    flops = tl.decouple(model, 4, sample=(8, 3, 32, 32), cost="flops").partition
    assert flops.costs == tuple(float(sum(flops.units[i].flops for i in g)) for g in flops.groups)


def test_cut_points_move_late_and_stay_clear_of_in_place_operations() -> None:
    model = nn.Sequential(
        nn.Conv2d(3, 8, 3), nn.BatchNorm2d(8), nn.ReLU(inplace=True), nn.MaxPool2d(2), nn.Conv2d(8, 8, 3),
        nn.ReLU(inplace=True), nn.Conv2d(8, 4, 3), nn.ReLU(), nn.Flatten(), nn.Linear(484, 10),
    )  # fmt: skip
    partition = tl.decouple(model, "all", sample=(2, 3, 32, 32)).partition
    assert [u.name for u in partition.units] == ["0…1", "4", "6…9"]
    assert [tuple(u.output_shape[1:]) for u in partition.units] == [(8, 15, 15), (8, 13, 13), (10,)]

    class InPlace(nn.Module):
        """A residual sum that the next block changes in place before it reads it."""

        def __init__(self) -> None:
            super().__init__()
            self.first, self.second, self.third = (nn.Conv2d(3, 3, 3, padding=1) for _ in range(3))
            self.head = nn.Linear(3, 10)

        def forward(self, x: Tensor) -> Tensor:
            x = self.first(x)
            y = self.second(x)
            x += y
            z = self.third(x)
            x.mul_(2)
            return self.head((x + z).mean((2, 3)))

    with pytest.raises(ValueError, match=r"cuts: no cut is possible after 'second'"):
        tl.decouple(InPlace(), cuts=["second"], sample=(2, 3, 8, 8))


def test_units_can_be_named_as_they_are_told() -> None:
    """Also those that are no single submodule."""
    model = build_model("resnet20", num_classes=10)
    names = [unit.name for unit in tl.decouple(model, "all", sample=(2, 3, 32, 32)).partition.units]
    assert "conv1…bn1" in names
    net = tl.decouple(model, cuts=[names[0], "layer2.0"], sample=(2, 3, 32, 32))
    assert [list(group) for group in net.partition.groups] == [[0], [1], [2]]
    assert [unit.name.split("…")[0] for unit in net.partition.units] == ["conv1", "layer1.0.conv1", "layer2.1.conv1"]
    with pytest.raises(ValueError, match=re.escape(f"possible cut points are after: {', '.join(names[:-1])}")):
        tl.decouple(model, cuts=["bn1"], sample=(2, 3, 32, 32))


def test_explicit_cuts() -> None:
    model = resnet(20)
    net = tl.decouple(model, cuts=["layer1.1", "layer2.0"], sample=(2, 3, 32, 32))
    assert net.num_modules == 3
    x = torch.randn(2, 3, 32, 32)
    model.eval()
    pass_ = Pass(net.chain, x, replay=True)
    with torch.no_grad(), pass_.opened():
        (first,) = pass_.run(0, 1, [])
        (second,) = pass_.run(1, 2, [first])
        (third,) = pass_.run(2, 3, [second])
    assert torch.equal(third, model(x))
    assert first.shape == (2, 16, 32, 32) and second.shape == (2, 32, 16, 16)


def test_a_parameter_used_twice_may_be_cut_between_its_users() -> None:
    class Tied(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.a, self.b, self.c, self.head = nn.Linear(8, 8), nn.Linear(8, 8), nn.Linear(8, 8), nn.Linear(8, 4)

        def forward(self, x: Tensor) -> Tensor:
            return self.head(self.c(torch.relu(self.a(torch.relu(self.b(torch.relu(self.a(x))))))))

    model = Tied()
    x, y = torch.randn(4, 8), torch.tensor([0, 1, 2, 3])
    net = tl.decouple(model, "all", sample=x, rule=tl.GreedyRule("linear"))
    assert [u.name for u in net.partition.units] == ["a", "b", "a", "c…head"]
    assert [u.num_parameters for u in net.partition.units] == [72, 72, 0, 72 + 36]
    lists = net.module_parameters()
    assert model.a.weight not in set(lists[0]) and model.a.weight in set(lists[2])
    net.local_step(x, y)
    # By hand: the sum of what both users give.
    twin = copy.deepcopy(net)
    twin.zero_grad()
    a, b = twin.backbone.a, twin.backbone.b
    first = a(x)
    F.cross_entropy(twin.auxiliary[0](first), y).backward()
    second = b(torch.relu(first.detach()))
    F.cross_entropy(twin.auxiliary[1](second), y).backward()
    F.cross_entropy(twin.auxiliary[2](a(torch.relu(second.detach()))), y).backward()
    assert torch.equal(a.weight.grad, model.a.weight.grad)


@pytest.mark.parametrize("by_value", [False, True])
def test_a_submodule_with_control_flow_is_kept_whole(by_value: bool) -> None:
    class Branching(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.inner = nn.Linear(8, 8)

        def forward(self, x: Tensor) -> Tensor:
            flip = x.sum() > 0 if by_value else x.shape[0] > 2
            return self.inner(-x) if flip else self.inner(x)

    class Network(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.first, self.second, self.third, self.head = Branching(), Branching(), nn.Linear(8, 8), nn.Linear(8, 3)

        def forward(self, x: Tensor) -> Tensor:
            return self.head(torch.relu(self.third(self.second(self.first(x)))))

    model = Network()
    for x in (torch.ones(2, 8), -torch.ones(4, 8)):
        net = tl.decouple(model, "all", sample=x)
        assert [u.name for u in net.partition.units] == ["first", "second", "third…head"]
        y = torch.zeros(len(x), dtype=torch.long)
        loss = F.cross_entropy(model(x), y)
        assert torch.equal(net.guided_step(x, y)[-1], loss.detach())


def test_lists_and_sequentials() -> None:
    parts = [
        nn.Sequential(nn.Conv2d(3, 8, 3), nn.ReLU()),
        nn.Conv2d(8, 8, 3),
        nn.Sequential(nn.Flatten(), nn.Linear(128, 5)),
    ]
    x, y = torch.randn(4, 3, 8, 8), torch.tensor([0, 1, 2, 3])
    for model in (parts, nn.Sequential(*parts), nn.ModuleList(parts)):
        net = tl.decouple(model, sample=x)
        assert net.num_modules == 3 and len(net.local_step(x, y)) == 3
        assert torch.equal(net(x), parts[2](parts[1](parts[0](x))))


class _TwoInputs(nn.Module):
    def forward(self, x: Tensor, y: Tensor) -> Tensor:
        return x + y


class _Dynamic(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.layer = nn.Linear(8, 3)

    def forward(self, x: Tensor) -> Tensor:
        return self.layer(x) if x.sum() > 0 else self.layer(-x)


class _Pair(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.layer = nn.Linear(8, 3)

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        return self.layer(x), x


IMAGE = (2, 3, 32, 32)
MISTAKES = {
    "K too large": (
        lambda: tl.decouple(resnet(20), 11, sample=IMAGE),
        "modules: 11 local modules were asked for, but .* 10 units",
    ),
    "K zero": (lambda: tl.decouple(resnet(20), 0, sample=IMAGE), "modules: must be at least 1, not 0"),
    "K a float": (
        lambda: tl.decouple(resnet(20), 2.5, sample=IMAGE),
        "modules: must be a whole number, 'all' or 'fewest', not 2.5",
    ),
    "K a bool": (
        lambda: tl.decouple(resnet(20), True, sample=IMAGE),
        "modules: must be a whole number, 'all' or 'fewest', not True",
    ),
    "neither": (lambda: tl.decouple(resnet(20), sample=IMAGE), "modules: say how many"),
    "both": (lambda: tl.decouple(resnet(20), 2, cuts=["layer1"], sample=IMAGE), "cuts: give either"),
    "unknown name": (
        lambda: tl.decouple(resnet(20), cuts=["layer1.9"], sample=IMAGE),
        "no submodule named 'layer1.9'; did you mean",
    ),
    "no cut there": (
        lambda: tl.decouple(resnet(20), cuts=["layer1.0.conv1"], sample=IMAGE),
        "no cut is possible after 'layer1.0.conv1'",
    ),
    "wrong order": (lambda: tl.decouple(resnet(20), cuts=["layer2", "layer1"], sample=IMAGE), "in the order in which"),
    "cuts a string": (lambda: tl.decouple(resnet(20), cuts="layer1", sample=IMAGE), "cuts: must be a list"),
    "cuts empty": (lambda: tl.decouple(resnet(20), cuts=[], sample=IMAGE), "cuts: must be a list of at least one"),
    "wrong channels": (
        lambda: tl.decouple(resnet(20), 2, sample=(2, 1, 32, 32)),
        "sample: .* does not run on an input of shape",
    ),
    "empty sample": (lambda: tl.decouple(resnet(20), 2, sample=torch.zeros(0, 3, 8, 8)), "sample: must be a batch"),
    "sample not a shape": (
        lambda: tl.decouple(resnet(20), 2, sample=(2, "3")),
        "sample: must be an input batch or its shape",
    ),
    "unknown rule": (lambda: tl.decouple(resnet(20), 2, sample=IMAGE, rule="magic"), "rule: no rule named 'magic'"),
    "rule of wrong kind": (lambda: tl.decouple(resnet(20), 2, sample=IMAGE, rule=3), "rule: must be a name or a Rule"),
    "unknown auxiliary": (lambda: tl.GreedyRule("magic"), "auxiliary: no network named 'magic'"),
    "auxiliary not a module": (
        lambda: tl.decouple(resnet(20), 2, sample=IMAGE, rule=tl.GreedyRule(lambda site: 3)),
        "must return an nn.Module, not int",
    ),
    "criterion": (lambda: tl.decouple(resnet(20), 2, sample=IMAGE, criterion="mse"), "criterion: must be callable"),
    "cost": (lambda: tl.decouple(resnet(20), 2, sample=IMAGE, cost="euros"), "cost: must be one of"),
    "not a module": (lambda: tl.decouple(3, 2, sample=IMAGE), "model: must be an nn.Module or a list of them, not int"),
    "empty list": (lambda: tl.decouple([], sample=IMAGE), "model: a list of modules must hold at least one"),
    "list with K": (
        lambda: tl.decouple([nn.Linear(3, 3), nn.Linear(3, 3)], 5, sample=(2, 3)),
        "modules: the 2 modules of the list",
    ),
    "two inputs": (
        lambda: tl.decouple(_TwoInputs(), 2, sample=(2, 8)),
        "sample: _TwoInputs does not run on .* missing 1 required",
    ),
    "not traceable": (
        lambda: tl.decouple(_Dynamic(), 2, sample=(2, 8)),
        "2 local modules were asked for, but _Dynamic can be cut into 1 units",
    ),
    "two outputs": (
        lambda: tl.decouple(_Pair(), 2, sample=(2, 8)),
        "prediction: the network returns tuple, .* give prediction=",
    ),
    "lazy": (lambda: tl.decouple(nn.Sequential(nn.LazyLinear(3), nn.Linear(3, 3)), 2, sample=(2, 8)), "uninitialised"),
    "in-place list": (
        lambda: tl.decouple([nn.Linear(3, 3), nn.ReLU(inplace=True), nn.Linear(3, 3)], sample=(2, 3)),
        "module '0' of the list cannot end",
    ),
}


@pytest.mark.parametrize("case", MISTAKES)
def test_mistakes_get_one_clear_sentence(case: str) -> None:
    call, message = MISTAKES[case]
    with pytest.raises(ValueError, match=message) as caught:
        call()
    assert "\n" not in str(caught.value)


def test_mse_and_callables() -> None:
    model = nn.Sequential(nn.Linear(4, 8), nn.ReLU(), nn.Linear(8, 8), nn.ReLU(), nn.Linear(8, 2))
    x, y = torch.randn(5, 4), torch.randn(5, 2)
    net = tl.decouple(
        model, cuts=["0"], sample=x, criterion=F.mse_loss, rule=tl.GreedyRule(lambda s: nn.Linear(s.channels, 2))
    )
    losses = net.local_step(x, y)
    assert torch.equal(losses[-1], F.mse_loss(model(x), y).detach())
