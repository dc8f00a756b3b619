"""Predicted and measured peaks, the memory modes of the steps, and the planner."""

from __future__ import annotations

import copy
import json
from dataclasses import replace
from functools import partial
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import torchlocal as tl
from torchlocal.memory import measure, plans, predict, search
from torchlocal.models import build_model
from torchlocal.network import prepare

SGD = partial(torch.optim.SGD, lr=0.1, momentum=0.9)


class Block(nn.Module):
    """Two convolutions around a shortcut, with dropout, BatchNorm and in-place operations."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.first = nn.Conv2d(channels, channels, 3, padding=1, bias=False)
        self.norm = nn.BatchNorm2d(channels)
        self.relu = nn.ReLU(inplace=True)
        self.drop = nn.Dropout(0.3)
        self.second = nn.Conv2d(channels, channels, 3, padding=1)
        self.last = nn.ReLU(inplace=True)

    def forward(self, x: Tensor) -> Tensor:
        """Maps (N, C, H, W) to the same shape."""
        return self.last(self.second(self.drop(self.relu(self.norm(self.first(x))))) + x)


def make_network(num_blocks: int = 8) -> nn.Module:
    head = [nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(8, 5)]
    stem = [nn.Conv2d(3, 8, 3, padding=1), nn.BatchNorm2d(8), nn.ReLU(inplace=True)]
    return nn.Sequential(nn.Sequential(*stem), *(Block(8) for _ in range(num_blocks)), nn.Sequential(*head))


def make_batch(num: int = 32, size: int = 12, classes: int = 5) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(1)
    return torch.randn(num, 3, size, size, generator=generator), torch.randint(classes, (num,), generator=generator)


def outcome(net: tl.DecoupledNetwork, state: dict[str, Tensor], step: str, **options: Any) -> list[Tensor | None]:
    """Losses, gradients, buffers and the random state after a step from the same start."""
    x, y = make_batch()
    net.load_state_dict(state)
    net.zero_grad()
    torch.manual_seed(2)
    losses = getattr(net, f"{step}_step")(x, y, **options)
    found = [*losses, torch.get_rng_state(), *(p.grad for p in net.parameters()), *net.buffers()]
    return [None if t is None else t.clone() for t in found]


def assert_same(first: list[Tensor | None], second: list[Tensor | None]) -> None:
    assert len(first) == len(second)
    assert all(a is b is None or torch.equal(a, b) for a, b in zip(first, second, strict=True))  # type: ignore[arg-type]


# --- exactness ---


@pytest.mark.parametrize("auxiliary", ["follow", "frozen"])
@pytest.mark.parametrize("memory", ["exact", "full", 800_000])
@pytest.mark.parametrize("modules", [3, "all"])
def test_exact_memory_modes_equal_the_plain_guided_step(modules: Any, memory: Any, auxiliary: str) -> None:
    torch.manual_seed(0)
    net = tl.decouple(make_network(), "all" if modules == "all" else modules, sample=make_batch()[0])
    state = copy.deepcopy(net.state_dict())
    plan = net.guided_plan(make_batch()[0], memory=memory, auxiliary=auxiliary)
    if memory == 800_000:  # a budget may cut the batch: keep what it recomputes, without that
        plan = replace(plan, micro_batches=1)
    plain = outcome(net, state, "guided", auxiliary=auxiliary)
    assert_same(plain, outcome(net, state, "guided", auxiliary=auxiliary, memory=plan))


@pytest.mark.parametrize("modules", [2, 4, "all"])
def test_recomputation_in_the_largest_modules_equals_the_plain_local_step(modules: Any) -> None:
    torch.manual_seed(0)
    net = tl.decouple(make_network(), modules, sample=make_batch()[0])
    state = copy.deepcopy(net.state_dict())
    assert net.local_plans(make_batch()[0], recompute="largest")
    assert_same(outcome(net, state, "local"), outcome(net, state, "local", recompute="largest"))
    smaller = predict(net, step="local", recompute="largest").peak_bytes
    assert smaller < 0.9 * predict(net, step="local").peak_bytes


def test_exact_mode_under_autocast_and_with_an_optimizer_per_module() -> None:
    x, y = make_batch()
    torch.manual_seed(0)
    model = make_network()
    results = []
    for memory in (None, "exact"):
        torch.manual_seed(3)
        net = tl.decouple(copy.deepcopy(model), 4, sample=x)
        optimizers = [SGD(parameters) for parameters in net.module_parameters()]
        for _ in range(3):
            net.guided_step(x, y, memory=memory, autocast=torch.bfloat16, optimizers=optimizers)
        results.append([*net.parameters(), *net.buffers()])
    assert_same(*results)


def test_micro_batches_give_the_mean_gradient() -> None:
    torch.manual_seed(0)
    model = nn.Sequential(*(nn.Sequential(nn.Linear(20, 20), nn.ReLU()) for _ in range(6)), nn.Linear(20, 5))
    rule = tl.GreedyRule(auxiliary="linear")
    net = tl.decouple(model, "all", sample=(30, 20), rule=rule)
    x, y = torch.randn(30, 20), torch.randint(5, (30,))
    plain = [loss.clone() for loss in net.guided_step(x, y)]
    gradients = [p.grad.clone() for p in net.parameters() if p.grad is not None]
    net.zero_grad()
    plan = replace(net.guided_plan(x, recompute=3), micro_batches=4)  # 30 examples: parts of 8 and 7
    torch.testing.assert_close(net.guided_step(x, y, memory=plan), plain)
    torch.testing.assert_close([p.grad for p in net.parameters() if p.grad is not None], gradients)


# --- prediction ---


@pytest.mark.parametrize(
    ("step", "options"),
    [
        ("plain", {}),
        ("local", {}),
        ("local", {"recompute": "largest"}),
        ("local", {"autocast": torch.bfloat16}),
        ("guided", {}),
        ("guided", {"auxiliary": "frozen", "recompute": 3}),
        ("guided", {"recompute": "modules"}),
        ("guided", {"memory": "exact"}),
        ("guided", {"memory": "local"}),
    ],
)
@pytest.mark.parametrize("name", ["resnet20", "torchvision:vit_b_16"])
def test_prediction_equals_measurement(name: str, step: str, options: dict[str, Any]) -> None:
    torch.manual_seed(0)
    if name == "resnet20":
        model, x, modules = build_model(name, num_classes=10, image_size=(16, 16)), make_batch(64, 16)[0], "all"
    else:
        from torchvision.models import VisionTransformer

        model, modules = VisionTransformer(32, 8, 4, 2, 32, 64, num_classes=10), 4  # type: ignore[assignment]
        x = make_batch(64, 32)[0]
    y = torch.randint(10, (64,))
    net = tl.decouple(model, modules, sample=x)
    predicted = predict(net, x, y, step=step, **options)

    def run() -> None:
        if step == "plain":
            F.cross_entropy(model(x), y).backward()
        else:
            getattr(net, f"{step}_step")(x, y, **options)

    measured = measure(run)
    assert predicted.peak_bytes == pytest.approx(measured.peak_bytes, rel=0.01)
    assert sum(predicted.breakdown.values()) == predicted.total_bytes
    assert measured.process_bytes is None or measured.process_bytes > 0


def test_prediction_counts_the_optimizer() -> None:
    x, y = make_batch()
    net = tl.decouple(make_network(), 4, sample=x)
    optimizer = torch.optim.AdamW(net.parameters())
    net.local_step(x, y)
    optimizer.step()
    optimizer.zero_grad()

    def run() -> None:
        net.local_step(x, y)
        optimizer.step()

    predicted = predict(net, x, y, optimizer=torch.optim.AdamW)
    assert predicted.peak_bytes == pytest.approx(measure(run).peak_bytes, rel=0.01)
    states = sum(t.nbytes for state in optimizer.state.values() for t in state.values())
    assert predicted.breakdown["optimizer"] == pytest.approx(states, rel=0.01)


def test_prediction_leaves_everything_alone() -> None:
    x, y = make_batch()
    net = tl.decouple(make_network(), 4, sample=x)
    net.local_step(x, y)
    before = [t.clone() for t in [*net.parameters(), *net.buffers(), *(p.grad for p in net.parameters())]]
    random = torch.get_rng_state()
    identities = [id(p) for p in net.parameters()]
    for step, options in (("plain", {}), ("local", {"recompute": "largest"}), ("guided", {"memory": "local"})):
        predict(net, step=step, optimizer=SGD, **options)  # type: ignore[arg-type]
    after = [*net.parameters(), *net.buffers(), *(p.grad for p in net.parameters())]
    assert all(torch.equal(a, b) for a, b in zip(before, after, strict=True))
    assert torch.equal(random, torch.get_rng_state())
    assert identities == [id(p) for p in net.parameters()]


def test_prediction_agrees_with_the_allocator() -> None:
    """An independent count: every allocation that torch's profiler has seen; linear layers have no workspace."""
    x, y = torch.randn(2048, 32), torch.randint(10, (2048,))
    blocks = [nn.Sequential(nn.Linear(32, 32), nn.LayerNorm(32), nn.ReLU(), nn.Linear(32, 32)) for _ in range(8)]
    model = nn.Sequential(nn.Sequential(*blocks[:4]), nn.Sequential(*blocks[4:]), nn.Linear(32, 10))
    for modules in (3, "all"):
        net = tl.decouple(model, modules, sample=x, rule=tl.GreedyRule("linear"))
        net.local_step(x, y)
        net.zero_grad()
        with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU], profile_memory=True) as profile:
            net.local_step(x, y)
        events = [e for e in profile.profiler.kineto_results.events() if e.name() == "[memory]"]
        current = peak = 0
        for event in sorted(events, key=lambda e: e.start_ns()):
            current += event.nbytes()
            peak = max(peak, current)
        assert predict(net, x, y).peak_bytes == pytest.approx(peak, rel=0.05)


# --- targets, on predicted bytes ---


def test_the_local_peak_falls_as_modules_rise() -> None:
    model = build_model("resnet32", num_classes=10)
    peaks = [
        predict(tl.decouple(model, k, sample=(1024, 3, 32, 32)), step="local").peak_bytes for k in (1, 2, 4, 8, 16)
    ]
    assert peaks == sorted(peaks, reverse=True)
    assert peaks[-1] < 0.2 * peaks[0]


@pytest.mark.parametrize(
    ("name", "modules", "shape"),
    [
        ("resnet32", 16, (1024, 3, 32, 32)),
        ("resnet110", 16, (1024, 3, 32, 32)),
        ("resnet110", 55, (1024, 3, 32, 32)),
        ("vgg11b", 6, (256, 3, 32, 32)),
        ("torchvision:resnet50", 16, (64, 3, 224, 224)),
        ("torchvision:vit_b_16", "all", (64, 3, 224, 224)),
    ],
)
def test_a_guided_step_takes_no_more_than_a_local_step(name: str, modules: Any, shape: tuple[int, ...]) -> None:
    with torch.device("meta") if name == "torchvision:vit_b_16" else torch.device("cpu"):
        model = build_model(name, num_classes=10, image_size=shape[2:])  # type: ignore[arg-type]
    net = tl.decouple(model.to_empty(device="cpu"), modules, sample=shape)
    local = predict(net, step="local")
    guided = predict(net, step="guided", memory="local")
    assert guided.peak_bytes <= local.peak_bytes
    if (name, modules) == ("resnet110", 55):
        plain = predict(net, step="plain").peak_bytes
        assert local.peak_bytes <= 0.0545 * plain
        assert predict(net, step="local", recompute="largest").peak_bytes <= 0.04 * plain
        # Nineteen segments are the best number of them, as benchmarks/memory.py finds.
        checkpointed = predict(net, step="guided", auxiliary="frozen", recompute=19).peak_bytes
        budget = predict(net, step="local", recompute="largest").peak_bytes
        assert max(local.peak_bytes, guided.peak_bytes) <= 0.37 * checkpointed
        assert predict(net, step="guided", memory=budget).peak_bytes <= budget <= 0.27 * checkpointed


def test_a_budget_is_kept_with_the_batch_in_one_piece() -> None:
    """The cheapest way without micro-batches: less than the least recomputation, and bit for bit the plain step."""
    x, y = torch.randn(64, 3, 32, 32), torch.randint(10, (64,))
    net = tl.decouple(build_model("resnet20", num_classes=10), 1, sample=x)
    plain, least = (predict(net, step="guided", memory=memory).step_bytes for memory in ("full", "exact"))
    budget = least + (plain - least) // 4
    parted = net.guided_plan(x, y, memory=budget)
    whole = net.guided_plan(x, y, memory=budget, micro_batches=1)
    assert parted.micro_batches > 1 == whole.micro_batches and parted.recomputed < whole.recomputed
    assert 0 < whole.recomputed < net.guided_plan(x, y, memory="exact").recomputed
    assert predict(net, step="guided", memory=budget, micro_batches=1).step_bytes <= budget
    assert net.guided_plan(x, y, memory=2 * least // 3, micro_batches=2).micro_batches == 2
    net.guided_step(x, y)
    plain_gradients = [p.grad.clone() for p in net.parameters() if p.grad is not None]
    net.zero_grad()
    net.guided_step(x, y, memory=budget, micro_batches=1)
    assert all(map(torch.equal, plain_gradients, (p.grad for p in net.parameters() if p.grad is not None)))
    for memory in (None, "exact", "full", whole):
        with pytest.raises(ValueError, match=r"^micro_batches: 2 bounds what a search"):
            net.guided_step(x, y, memory=memory, micro_batches=2)
    with pytest.raises(ValueError, match=r"^micro_batches: must be a whole number of at least 1, not 0"):
        net.guided_step(x, y, memory=budget, micro_batches=0)


def test_where_nothing_fits_the_smallest_plan_is_used_with_a_warning() -> None:
    x, _ = make_batch()
    net = tl.decouple(make_network(), 4, sample=x)
    with pytest.warns(UserWarning, match="^memory=1000: no guided step .* within the budget") as caught:
        plan = net.guided_plan(x, memory=1000)
        net.guided_plan(x, memory=1000)
    assert len(caught) == 1
    whole = predict(net, step="guided", memory="exact").peak_bytes
    assert plan.micro_batches == 2 and predict(net, step="guided", memory=plan).peak_bytes < 0.7 * whole


@pytest.mark.parametrize("optimizers", [False, True])
def test_micro_batches_are_predicted_as_they_are_measured(optimizers: bool) -> None:
    x, y = make_batch(64)
    net = tl.decouple(make_network(4), 4, sample=x)
    plan = replace(net.guided_plan(x, recompute=2), micro_batches=4)
    options = {"optimizers": [SGD(p) for p in net.module_parameters()]} if optimizers else {}
    net.guided_step(x, y, memory=plan, **options)  # makes the optimizers' state
    net.zero_grad()
    measured = measure(lambda: net.guided_step(x, y, memory=plan, **options)).peak_bytes
    counted = {"optimizer": SGD} if optimizers else {}
    predicted = predict(net, x, y, step="guided", memory=plan, **options, **counted)  # type: ignore[arg-type]
    assert predicted.peak_bytes == pytest.approx(measured, rel=0.01)


# --- the planner ---


def _total(model: nn.Module, row: Any, batch: int, checkpointing: str) -> int:
    """Predicted bytes of a planner's row at another batch size."""
    shape = (batch, 3, 12, 12)
    net = tl.decouple(model, row.modules, sample=(2, 3, 12, 12))
    steps: list[dict[str, Any]] = {
        "end-to-end": [{"step": "plain"}],
        "checkpointing": [{"step": "guided", "auxiliary": "frozen", "recompute": int(checkpointing.split()[0])}],
        "checkpointing, searched": [{"step": "guided", "memory": "exact"}],
        "local": [{"step": "local"}],
        "pgl": [{"step": "local"}, {"step": "guided", "memory": "local"}],
    }[row.method]
    return max(predict(net, shape, optimizer=SGD, **step).total_bytes for step in steps)


ADAMW = torch.optim.AdamW


@pytest.mark.parametrize(
    ("options", "num"),
    [({}, 5), ({"optimizer": ADAMW, "autocast": torch.bfloat16}, 3)],
    ids=["sgd", "adamw-bf16"],
)
def test_fewest_modules(options: dict[str, Any], num: int) -> None:
    shape = (64, 1, 14, 28)

    def make(modules: int | str) -> tl.DecoupledNetwork:
        torch.manual_seed(3)
        return tl.decouple(model, modules, sample=shape, **options)

    model = build_model("resnet20", num_classes=10, in_channels=1, image_size=shape[2:])
    any_number = prepare(model, 1, sample=shape)
    totals = [predict(any_number(k), **{"optimizer": SGD} | options).total_bytes for k in range(1, 11)]
    assert num == next(k for k, total in enumerate(totals, 1) if total <= 1.02 * totals[-1])
    fewest, given = make("fewest"), make(num)
    assert fewest.partition == given.partition and fewest.num_modules == num
    # The search leaves the random generator alone.
    assert all(map(torch.equal, fewest.auxiliary.state_dict().values(), given.auxiliary.state_dict().values()))
    with torch.no_grad():
        assert make("fewest").num_modules == num


def test_fewest_modules_are_two_at_least() -> None:
    """Of a batch so small, the parameters are all that counts, and end-to-end training takes the least."""
    model, shape = build_model("resnet20", num_classes=10), (2, 3, 8, 8)
    make = prepare(model, 1, sample=shape)
    totals = [predict(make(k), optimizer=SGD).total_bytes for k in (1, 2, 10)]
    assert totals == sorted(totals)
    assert tl.decouple(model, "fewest", sample=shape).num_modules == 2
    assert tl.decouple(nn.Linear(8, 2), "fewest", sample=(2, 8)).num_modules == 1  # it has one unit


def test_fewest_modules_with_an_optimizer_that_looks_at_values() -> None:
    def num(optimizer: Any) -> int:
        return tl.decouple(make_network(3), "fewest", sample=(64, 3, 12, 12), optimizer=optimizer).num_modules

    assert num(torch.optim.Adafactor) == num(SGD)


def test_plan_recommends_one_that_fits() -> None:
    model, shape = make_network(4), (256, 3, 12, 12)
    free = tl.plan(model, shape, modules=(2, "all"))
    assert [(row.method, row.modules) for row in free.rows] == [
        ("end-to-end", 1), ("checkpointing", 1), ("checkpointing, searched", 1), ("local", 2), ("pgl", 2), ("local", 5),
        ("pgl", 5),
    ]  # fmt: skip
    rows = {(row.method, row.modules): row for row in free.rows}
    end_to_end, checkpointing, pgl = rows["end-to-end", 1], rows["checkpointing", 1], rows["pgl", 5]
    assert end_to_end.total_bytes > checkpointing.total_bytes > pgl.total_bytes
    assert end_to_end.flops_ratio == 1 < checkpointing.flops_ratio < 4 / 3 + 0.01
    assert all(sum(row.breakdown.values()) == row.total_bytes for row in free.rows)

    ample = tl.plan(model, shape, modules=("all",), budget=2 * end_to_end.total_bytes)
    assert ample.method == "end-to-end" and "end-to-end" in ample.recommendation
    for row in ample.rows:  # the budget is used, and it is kept
        assert row.largest_batch is not None
        larger = row.largest_batch + row.largest_batch // 20
        sizes = [_total(model, row, size, ample.rows[1].note) for size in (row.largest_batch, larger)]
        assert sizes[0] <= 2 * end_to_end.total_bytes < sizes[1]
    tight = tl.plan(model, shape, modules=("all",), budget=checkpointing.total_bytes)
    assert tight.method == "checkpointing" and "gradient checkpointing" in tight.recommendation
    least = tl.plan(model, shape, modules=("all",), budget=pgl.total_bytes)
    assert least.method == "checkpointing, searched" and "pgl with K=5 fits too, at 0.8" in least.recommendation
    assert tl.decouple(model, least, sample=shape).num_modules == least.modules == 1
    nothing = tl.plan(model, shape, modules=("all",), budget=50_000)
    assert nothing.recommendation.startswith("Nothing fits into") and not any(row.fits for row in nothing.rows)
    assert all(row.largest_batch == 0 for row in nothing.rows) and "no batch size would fit" in nothing.recommendation
    assert json.loads(least.to_json())["method"] == least.method
    # Parameters alone are more than this: a batch of one is looked at, which DGL's BatchNorm over vectors would refuse.
    vectors = nn.Sequential(
        nn.Sequential(nn.Linear(64, 64), nn.ReLU()), nn.Sequential(nn.Linear(64, 64), nn.ReLU()), nn.Linear(64, 10)
    )
    poor = tl.plan(vectors, (256, 64), budget=30_000, modules=(2,))
    assert all(row.largest_batch == 0 for row in poor.rows) and "fits into 29.3 KiB at" in poor.recommendation
    assert tl.decouple(model, 3, sample=(1, *shape[1:])).num_modules == 3
    assert len(least.figure().axes[0].patches) == 6 * len(least.rows)


# --- mistakes ---


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda net, x, y: net.guided_step(x, y, memory="small"), "memory: must be 'local'"),
        (lambda net, x, y: net.guided_step(x, y, memory=-5), "memory: must be 'local'"),
        (lambda net, x, y: net.guided_step(x, y, memory="local", recompute=2), "recompute: memory='local' chooses"),
        (lambda net, x, y: net.guided_step(x, y, memory="full", recompute=2), "recompute: memory='full' chooses"),
        (lambda net, x, y: net.local_step(x, y, recompute="all"), "recompute: must be None or 'largest'"),
        (
            lambda net, x, y: predict(net, step="guided", auxiliary="melted"),
            "auxiliary: must be 'follow', 'match' or 'frozen'",
        ),
        (lambda net, x, y: predict(net, step="local", memory="exact"), "memory: means nothing to step='local'"),
        (lambda net, x, y: predict(net, step="local", auxiliary="frozen"), "auxiliary: means nothing to step='local'"),
        (lambda net, x, y: predict(net, step="plain", recompute=2), "recompute: means nothing to step='plain'"),
        (lambda net, x, y: predict(net, step="global"), "step: must be 'local', 'guided' or 'plain'"),
        (lambda net, x, y: predict(net, (4, 3)), "batch: must be a batch"),
        (lambda net, x, y: predict(net, target=torch.zeros(3, dtype=torch.int64)), "target: it has 3 rows"),
        (lambda net, x, y: tl.plan(net.backbone, x, budget=0), "budget: must be a whole number of bytes"),
        (lambda net, x, y: tl.plan(net.backbone, x, guided_share=2), "guided_share: must be a number from 0 to 1"),
        (lambda net, x, y: tl.plan(net.backbone, x, guided_share="a"), "guided_share: must be a number from 0 to 1"),
        (lambda net, x, y: tl.plan(net.backbone, x, modules=(0,)), "modules: must "),
        (lambda net, x, y: tl.plan(net.backbone, x, modules=(None,)), "modules: must hold whole numbers of at least 1"),
        (
            lambda net, x, y: tl.decouple(
                make_network(3), "fewest", sample=x, criterion=lambda out, target: out.mean() + target.wanted
            ),
            'modules: "fewest" takes a criterion of class indices',
        ),
    ],
)
def test_mistakes_are_told_in_one_sentence(call: Any, message: str) -> None:
    x, y = make_batch()
    net = tl.decouple(make_network(3), 2, sample=x)
    with pytest.raises(ValueError, match=f"^{message}") as error:
        call(net, x, y)
    assert "\n" not in str(error.value)


def test_a_plan_is_carried_out_in_a_copy_and_after_a_change() -> None:
    net = tl.decouple(make_network(), 4, sample=(32, 3, 12, 12))
    x, y = make_batch()
    plan = net.guided_plan(x, y, memory="exact")
    assert "Inner" in repr(plan.tree)

    def peak(net: tl.DecoupledNetwork) -> int:
        net.zero_grad()
        return measure(lambda: net.guided_step(x, y, memory=plan)).peak_bytes

    assert peak(net) == plan.peak_bytes
    assert peak(copy.deepcopy(net)) == plan.peak_bytes  # whose units have not been traced
    net.backbone[1].register_forward_hook(lambda *_: None)  # the traces have to be made anew
    assert peak(net) == plan.peak_bytes


def test_where_small_parts_are_dear_units_are_recomputed_instead(monkeypatch: pytest.MonkeyPatch) -> None:
    """The search for a GPU, on the CPU: its prices only."""
    net = tl.decouple(build_model("resnet20", num_classes=10), 10, sample=(128, 3, 32, 32))
    on_cpu = net.guided_plan(net.sample, memory="local")
    assert on_cpu.micro_batches > 1
    monkeypatch.setattr(search._GuidedSearch, "device_type", property(lambda _: "cuda", lambda *_: None), raising=False)
    plans._FOUND.clear()
    found = net.guided_plan(net.sample, memory="local")
    assert found.micro_batches == 1 and found.recomputed > 0
    assert found.bytes <= predict(net, step="local").peak_bytes
