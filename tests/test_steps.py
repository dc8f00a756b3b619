"""The invariants of the steps: exact, isolated, lean."""

from __future__ import annotations

import copy
import inspect
import itertools
from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode

import torchlocal as tl
from torchlocal import reference
from torchlocal.models import build_model


def small_network(dropout: float = 0.3) -> nn.Module:
    """Convolutions, BatchNorm, dropout, spectral norm (a buffer that the output depends on) and a residual sum."""

    class Block(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.conv1, self.bn1 = nn.Conv2d(8, 8, 3, padding=1, bias=False), nn.BatchNorm2d(8)
            self.conv2 = nn.utils.parametrizations.spectral_norm(nn.Conv2d(8, 8, 3, padding=1))
            self.dropout = nn.Dropout(dropout)

        def forward(self, x: Tensor) -> Tensor:
            y = self.dropout(torch.relu(self.bn1(self.conv1(x))))
            return torch.relu(x + F.dropout(self.conv2(y), dropout, self.training))

    torch.manual_seed(0)
    return nn.Sequential(
        nn.Sequential(nn.Conv2d(3, 8, 3, padding=1), nn.BatchNorm2d(8), nn.ReLU(inplace=True)),
        Block(), Block(), Block(), nn.Sequential(nn.Conv2d(8, 8, 3), nn.ReLU(), nn.AdaptiveAvgPool2d(2), nn.Flatten(),
                      nn.Linear(32, 5)),
    )  # fmt: skip


def batches(count: int, size: int = 8) -> list[tuple[Tensor, Tensor]]:
    generator = torch.Generator().manual_seed(7)
    return [
        (torch.randn(size, 3, 8, 8, generator=generator), torch.randint(5, (size,), generator=generator))
        for _ in range(count)
    ]


def everything(module: nn.Module) -> list[Tensor]:
    return [*module.parameters(), *module.buffers()]


def same(a: list[Tensor], b: list[Tensor]) -> bool:
    return all(torch.equal(x, y) for x, y in zip(a, b, strict=True))


def sgd(parameters: Any) -> torch.optim.Optimizer:
    return torch.optim.SGD(parameters, lr=0.1, momentum=0.9, nesterov=True, weight_decay=1e-3)


def plain_training(model: nn.Module, data: list[tuple[Tensor, Tensor]], make: Callable[..., Any] = sgd) -> list[Tensor]:
    """An ordinary hand-written loop."""
    optimizer = make(model.parameters())
    torch.manual_seed(11)
    losses = []
    for x, y in data:
        optimizer.zero_grad()
        loss = F.cross_entropy(model(x), y)
        loss.backward()
        optimizer.step()
        losses.append(loss.detach())
    return losses


@pytest.mark.parametrize("make", [sgd, lambda p: torch.optim.AdamW(p, lr=1e-2)])
@pytest.mark.parametrize("step", ["local", "guided", "guided, K=3", "recomputed, K=3", "recomputed in 2, K=5"])
def test_invariant_1_one_module_or_always_guided_is_ordinary_training(step: str, make: Callable[..., Any]) -> None:
    model, reference = small_network(), small_network()
    data = batches(4)
    modules = int(step.split("K=")[1]) if "K=" in step else 1
    net = tl.decouple(model, modules, sample=data[0][0])
    expected = plain_training(reference, data, make)
    optimizer = make(net.parameters())
    options = {"recompute": "modules" if step.startswith("recomputed, ") else 2 if "in 2" in step else None}
    torch.manual_seed(11)
    losses = []
    for x, y in data:
        if step == "local":
            losses += net.local_step(x, y)
        else:
            losses += net.guided_step(x, y, auxiliary="frozen", **options)
        optimizer.step()
        optimizer.zero_grad()
    assert same(losses, expected)
    assert same(everything(model), everything(reference))


@pytest.mark.parametrize("auxiliary", ["follow", "frozen"])
@pytest.mark.parametrize("recompute", ["modules", 1, 2, 3, 4, 5])
def test_invariant_2_recomputation_changes_nothing(recompute: str | int, auxiliary: str) -> None:
    class Noisy(nn.Module):
        """An auxiliary network that draws random numbers between the modules."""

        def __init__(self, site: tl.rules.Site) -> None:
            super().__init__()
            self.dropout, self.layer = nn.Dropout(0.5), nn.Linear(site.channels, site.num_outputs)

        def forward(self, features: Tensor) -> Tensor:
            return self.layer(self.dropout(features.mean((2, 3))))

    results = []
    for option in (None, recompute):
        model = small_network()
        net = tl.decouple(model, 3, sample=(8, 3, 8, 8), rule=tl.GreedyRule(Noisy))
        assert len(net.partition.units) == 5
        optimizer = sgd(net.parameters())
        torch.manual_seed(5)
        seen: list[Tensor] = []
        for x, y in batches(3):
            seen += net.guided_step(x, y, auxiliary=auxiliary, recompute=option)
            seen += [p.grad.clone() for p in net.parameters() if p.grad is not None]
            optimizer.step()
            optimizer.zero_grad()
        results.append([*seen, *everything(net), torch.rand(3)])
    assert same(*results)


def test_recomputation_leaves_the_buffers_themselves_in_place() -> None:
    model = small_network()
    net = tl.decouple(model, "all", sample=(8, 3, 8, 8))
    buffers = [id(b) for b in model.buffers()]
    net.guided_step(*batches(1)[0], recompute="modules")
    assert [id(b) for b in model.buffers()] == buffers
    assert model[0][1].num_batches_tracked == 1


def test_invariant_3_no_gradient_crosses_a_cut() -> None:
    model = small_network()
    x, y = batches(1)[0]
    net = tl.decouple(model, "all", sample=x)
    groups = net.module_parameters()
    assert sorted(id(p) for g in groups for p in g) == sorted(id(p) for p in net.parameters())
    before = [id(p.grad) for p in net.parameters()]
    touched: list[set[int]] = []

    def backward(loss: Tensor) -> None:
        nonlocal before
        loss.backward()
        after = [None if p.grad is None else p.grad.clone() for p in net.parameters()]
        changed = {
            id(p)
            for p, old, new in zip(net.parameters(), grads, after, strict=True)
            if new is not None and (old is None or not torch.equal(old, new))
        }
        touched.append(changed)
        grads[:] = after

    grads: list[Tensor | None] = [None for _ in net.parameters()]
    net.local_step(x, y, backward=backward)
    assert len(touched) == 5
    for k, changed in enumerate(touched):
        assert changed and changed <= {id(p) for p in groups[k]}
        # A convolution's bias before BatchNorm has a gradient of zero or nearly, every weight a proper one.
        assert {id(p) for p in groups[k] if p.ndim > 1} <= changed


def test_training_is_that_of_the_reference() -> None:
    """Losses, parameters and buffers over six steps, two of them guided, bit for bit."""
    model, twin = small_network(), small_network()
    net = tl.decouple(model, sample=(8, 3, 8, 8))
    auxiliary = copy.deepcopy(net.auxiliary)
    optimizer = sgd(net.parameters())
    losses: list[Tensor] = []
    torch.manual_seed(2)
    for step, (x, y) in enumerate(batches(6)):
        losses += (net.guided_step if step % 3 == 2 else net.local_step)(x, y)
        optimizer.step()
        optimizer.zero_grad()
    told: list[Tensor] = []

    def criterion(output: Tensor, target: Tensor) -> Tensor:
        told.append(F.cross_entropy(output, target))
        return told[-1]

    torch.manual_seed(2)
    parameters = [*twin.parameters(), *auxiliary.parameters()]
    reference.train(list(twin), auxiliary, criterion, batches(6), sgd(parameters), lambda step: step % 3 == 2)
    assert same(losses, told)
    assert same(everything(net), [*parameters, *twin.buffers(), *auxiliary.buffers()])


def test_invariant_4_the_peak_of_a_local_step_falls_as_k_rises() -> None:
    torch.manual_seed(0)
    x, y = torch.randn(32, 3, 32, 32), torch.randint(10, (32,))

    def peak(modules: int, classic_mistake: bool = False) -> int:
        model = build_model("resnet32", num_classes=10, in_channels=3, image_size=(32, 32))
        net = tl.decouple(model, modules, sample=x, rule=tl.GreedyRule("linear"))
        if not classic_mistake:
            return tl.memory.measure(lambda: net.local_step(x, y)).peak_bytes
        losses: list[Tensor] = []

        def step() -> None:  # one detach per module, but a single backward pass at the end
            net.local_step(x, y, backward=losses.append)
            torch.stack(losses).sum().backward()
            losses.clear()

        return tl.memory.measure(step).peak_bytes

    peaks = [peak(modules) for modules in (1, 2, 4, 8, 16)]
    assert all(a > b for a, b in itertools.pairwise(peaks)), peaks
    assert peaks[-1] < 0.3 * peaks[0]
    assert peak(16, classic_mistake=True) > 0.9 * peaks[0]


def test_recomputation_lowers_the_peak_of_a_guided_step() -> None:
    torch.manual_seed(0)
    x, y = torch.randn(16, 3, 32, 32), torch.randint(10, (16,))
    model = build_model("resnet32", num_classes=10, in_channels=3, image_size=(32, 32))
    net = tl.decouple(model, 4, sample=x, rule=tl.GreedyRule("linear"))
    full = tl.memory.measure(lambda: net.guided_step(x, y)).peak_bytes
    net.zero_grad()
    recomputed = tl.memory.measure(lambda: net.guided_step(x, y, recompute="modules")).peak_bytes
    assert recomputed < 0.6 * full


def test_following_auxiliary_networks_learn_and_leave_the_backbone_alone() -> None:
    x, y = batches(1)[0]
    gradients = []
    for auxiliary in ("follow", "frozen"):
        net = tl.decouple(small_network(dropout=0.0), 3, sample=x)
        losses = net.guided_step(x, y, auxiliary=auxiliary)
        assert len(losses) == (3 if auxiliary == "follow" else 1)
        assert all((p.grad is not None) == (auxiliary == "follow") for p in net.auxiliary.parameters())
        gradients.append([p.grad for p in net.backbone.parameters()])
    assert same(*gradients)


@pytest.mark.parametrize("guided", [False, True])
@pytest.mark.parametrize("recompute", [None, "modules", 2])
def test_one_optimizer_per_module_equals_one_for_all(guided: bool, recompute: str | int | None) -> None:
    results = []
    for per_module in (False, True):
        net = tl.decouple(small_network(), 3, sample=(8, 3, 8, 8))
        lists = net.module_parameters() if per_module else [list(net.parameters())]
        optimizers = [sgd(parameters) for parameters in lists]
        options: dict[str, Any] = {"recompute": recompute} if guided else {}
        if per_module:
            options["optimizers"] = optimizers
        torch.manual_seed(4)
        for x, y in batches(3):
            (net.guided_step if guided else net.local_step)(x, y, **options)
            if per_module:
                assert all(p.grad is None for p in net.parameters())
            else:
                optimizers[0].step()
                optimizers[0].zero_grad()
        results.append(everything(net))
    assert same(*results)


def test_one_optimizer_per_module_keeps_one_modules_gradients() -> None:
    model = nn.Sequential(*(nn.Sequential(nn.Linear(256, 256), nn.ReLU()) for _ in range(8)))
    x, y = torch.randn(4, 256), torch.randint(256, (4,))
    net = tl.decouple(model, sample=x, rule=tl.GreedyRule("linear"))
    optimizers = [torch.optim.SGD(p, lr=0.1) for p in net.module_parameters()]
    together = tl.memory.measure(lambda: net.local_step(x, y)).peak_bytes
    net.zero_grad()
    apart = tl.memory.measure(lambda: net.local_step(x, y, optimizers=optimizers)).peak_bytes
    assert apart < 0.35 * together


def test_accumulation_equals_the_mean_gradient() -> None:
    data = batches(4)
    net = tl.decouple(small_network(dropout=0.0), 3, sample=data[0][0])
    net.train()
    for step in (net.local_step, net.guided_step):
        net.zero_grad()
        expected: list[Tensor] = [torch.zeros_like(p) for p in net.parameters()]
        for x, y in data:
            state = copy.deepcopy(net.state_dict())
            single = copy.deepcopy(net)
            single.load_state_dict(state)
            single.zero_grad()
            getattr(single, step.__name__)(x, y)
            for total, p in zip(expected, single.parameters(), strict=True):
                total += p.grad / len(data)
            step(x, y, scale=1 / len(data))
        for p, total in zip(net.parameters(), expected, strict=True):
            torch.testing.assert_close(p.grad, total, rtol=1e-4, atol=1e-6)


def test_a_backward_callable_and_a_grad_scaler() -> None:
    x, y = batches(1)[0]
    for step, options in (("local_step", {}), ("guided_step", {}), ("guided_step", {"recompute": "modules"})):
        plain = tl.decouple(small_network(dropout=0.0), 3, sample=x)
        scaled = copy.deepcopy(plain)
        scaler = torch.amp.GradScaler("cpu", init_scale=1024.0)
        getattr(plain, step)(x, y, **options)
        getattr(scaled, step)(x, y, backward=lambda loss, s=scaler: s.scale(loss).backward(), **options)
        for p, q in zip(plain.parameters(), scaled.parameters(), strict=True):
            torch.testing.assert_close(q.grad / 1024.0, p.grad)


@pytest.mark.parametrize("recompute", [None, "modules"])
def test_autocast_equals_ordinary_autocast(recompute: str | None) -> None:
    model, reference = small_network(), small_network()
    x, y = batches(1)[0]
    net = tl.decouple(model, 3, sample=x)
    torch.manual_seed(3)
    losses = net.guided_step(x, y, auxiliary="frozen", recompute=recompute, autocast=torch.bfloat16)
    torch.manual_seed(3)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        loss = F.cross_entropy(reference(x), y)
    loss.backward()
    assert torch.equal(loss, losses[-1])
    assert all(torch.equal(p.grad, q.grad) for p, q in zip(model.parameters(), reference.parameters(), strict=True))
    assert all(loss.isfinite() for loss in net.local_step(x, y, autocast=torch.bfloat16))


@pytest.mark.parametrize("recompute", [None, "modules"])
def test_a_step_inside_the_users_own_autocast(recompute: str | None) -> None:
    gradients = []
    for inside in (False, True):
        net = tl.decouple(small_network(), 3, sample=(8, 3, 8, 8))
        torch.manual_seed(3)
        with torch.autocast("cpu", dtype=torch.bfloat16, enabled=inside):
            net.guided_step(*batches(1)[0], recompute=recompute, autocast=None if inside else torch.bfloat16)
        gradients.append([p.grad for p in net.parameters()])
    assert all(g is not None for g in gradients[1])
    assert same(*gradients)


def test_soft_targets_label_smoothing_and_regression() -> None:
    x, y = batches(1)[0]
    soft = F.one_hot(y, 5).float() * 0.8 + 0.04
    for criterion, target in (
        (nn.CrossEntropyLoss(label_smoothing=0.2), y),
        (F.cross_entropy, soft),
        (F.mse_loss, soft),
        (lambda output, target: (output - target).abs().mean(), soft),
    ):
        net = tl.decouple(small_network(dropout=0.0), 3, sample=x, criterion=criterion)
        losses = net.local_step(x, target)
        net.eval()
        reference = small_network(dropout=0.0)
        assert torch.equal(losses[-1], criterion(reference(x), target).detach())


def test_frozen_batchnorm_and_mixed_modes() -> None:
    """The steps follow the modules' own training flags, whatever they were when the network was decoupled."""
    model = small_network()
    x, y = batches(1)[0]
    net = tl.decouple(model, 3, sample=x)
    model.eval()
    model[1].train()
    reference = copy.deepcopy(model)
    torch.manual_seed(1)
    losses = net.guided_step(x, y, auxiliary="frozen")
    torch.manual_seed(1)
    assert torch.equal(losses[-1], F.cross_entropy(reference(x), y).detach())
    assert same(everything(model), everything(reference))


def test_a_replaced_submodule_and_a_copied_network_are_followed() -> None:
    x, y = batches(1)[0]
    net = tl.decouple(small_network(dropout=0.0), 3, sample=x)
    net.local_step(x, y)
    net.backbone[4][4] = nn.Linear(32, 5)
    expected = F.cross_entropy(copy.deepcopy(net.backbone)(x), y)
    assert torch.equal(net.guided_step(x, y)[-1], expected.detach())
    twin = copy.deepcopy(net)
    twin.zero_grad()
    before = [p.grad.clone() for p in net.parameters()]
    twin.local_step(x, y)
    assert same([p.grad for p in net.parameters()], before)
    assert all(p.grad is not None for p in twin.parameters())


def test_double_precision_networks() -> None:
    model = small_network(dropout=0.0).double()
    x, y = batches(1)[0]
    net = tl.decouple(model, 3, sample=x.double())
    assert all(loss.dtype == torch.float64 for loss in net.local_step(x.double(), y))


def test_invariant_7_the_backbone_is_the_users_own_at_any_time() -> None:
    model, untouched = small_network(), small_network()
    shapes = [(key, tensor.shape) for key, tensor in untouched.state_dict().items()]
    x, y = batches(1)[0]
    net = tl.decouple(model, 4, sample=x)
    assert net.backbone is model
    for _ in range(2):
        net.local_step(x, y)
        net.guided_step(x, y, recompute="modules")
        torch.optim.SGD(net.parameters(), lr=0.1).step()
        assert [(key, tensor.shape) for key, tensor in model.state_dict().items()] == shapes
        untouched.load_state_dict(model.state_dict())
        model.eval(), untouched.eval()
        assert torch.equal(model(x), untouched(x)) and torch.equal(net(x), untouched(x))
        model.train()
    assert [id(p) for p in net.parameters()][: len(list(model.parameters()))] == [id(p) for p in model.parameters()]


def test_accuracy_by_depth() -> None:
    x, _ = batches(1)[0]
    net = tl.decouple(small_network(), 3, sample=x)
    net.eval()
    outputs = net.depth_outputs(x)
    assert [o.shape for o in outputs] == [(8, 5)] * 3
    assert torch.equal(outputs[-1], net.backbone(x)) and not any(o.requires_grad for o in outputs)
    features = net.backbone[0](x)
    if net.partition.groups[0] == range(1):
        assert torch.equal(outputs[0], net.auxiliary[0](features))


def test_losses_are_detached_and_nothing_is_read_back() -> None:
    class Watch(TorchDispatchMode):
        def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
            names.add(func.__name__)
            return func(*args, **(kwargs or {}))

    names: set[str] = set()
    net = tl.decouple(small_network(), 3, sample=(8, 3, 8, 8))
    x, y = batches(1)[0]
    with Watch():
        losses = [*net.local_step(x, y), *net.guided_step(x, y), *net.guided_step(x, y, recompute=2, scale=0.5)]
    assert not any(loss.requires_grad for loss in losses)
    assert any("convolution" in name for name in names)
    assert not any("_local_scalar_dense" in name or "nonzero" in name or "equal" in name for name in names)


MISTAKES: dict[str, tuple[Callable[[tl.DecoupledNetwork], Any], str]] = {
    "not a tensor": (lambda net: net.local_step([1, 2], torch.zeros(2)), "batch: it holds no tensor"),
    "empty batch": (
        lambda net: net.local_step(torch.zeros(0, 3, 8, 8), torch.zeros(0)),
        "batch: must be a batch of at least one",
    ),
    "too few dimensions": (
        lambda net: net.guided_step(torch.zeros(3, 8, 8), torch.zeros(3)),
        "batch: a batch of shape .* does not fit",
    ),
    "target rows": (
        lambda net: net.local_step(torch.zeros(2, 3, 8, 8), torch.zeros(3).long()),
        "target: it has 3 rows, but the batch has 2",
    ),
    "auxiliary": (lambda net: net.guided_step(*batches(1)[0], auxiliary="melted"), "auxiliary: must be 'follow'"),
    "recompute name": (lambda net: net.guided_step(*batches(1)[0], recompute="all"), "recompute: must be None"),
    "recompute zero": (lambda net: net.guided_step(*batches(1)[0], recompute=0), "segments from 1 to 5, not 0"),
    "recompute too many": (lambda net: net.guided_step(*batches(1)[0], recompute=6), "segments from 1 to 5, not 6"),
    "recompute bool": (lambda net: net.guided_step(*batches(1)[0], recompute=True), "not True"),
    "optimizers": (lambda net: net.local_step(*batches(1)[0], optimizers=[]), "optimizers: 0 given for 3"),
}


@pytest.mark.parametrize("case", MISTAKES)
def test_mistakes_get_one_clear_sentence(case: str) -> None:
    call, message = MISTAKES[case]
    net = tl.decouple(small_network(), 3, sample=(8, 3, 8, 8))
    with pytest.raises(ValueError, match=message) as caught:
        call(net)
    assert "\n" not in str(caught.value)


def test_every_module_and_auxiliary_network_is_compiled() -> None:
    """More of them than torch's limit of recompiles for one function (8): none falls back."""
    calls = 0

    def compiler(graph: torch.fx.GraphModule, _: list[Tensor]) -> Any:
        def run(*arguments: Any) -> Any:
            nonlocal calls
            calls += 1
            return graph.forward(*arguments)

        return run

    torch.manual_seed(0)
    x, y = torch.randn(4, 1, 8, 8), torch.randint(10, (4,))
    plain, compiled = (
        tl.decouple(build_model("resnet20", num_classes=10, in_channels=1, image_size=(8, 8)), "all", sample=x)
        for _ in range(2)
    )
    compiled.load_state_dict(plain.state_dict())
    compiled.compile(backend=compiler)
    losses = compiled.local_step(x, y)
    # Stem and head have parameters in two and one modules of their own; between them are nine blocks.
    # Older versions of torch compile none of its own layers by itself, so not those three.
    own = 3 if "isolate_recompiles" in inspect.signature(torch.compile).parameters else 0
    assert calls == own + 9 + len(compiled.auxiliary) == own + 18
    compiled.local_step(x, y)
    assert calls == 2 * (own + 18)
    torch.testing.assert_close(losses, plain.local_step(x, y))
