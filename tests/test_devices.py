"""What depends on the device, as far as it shows without one: on fake tensors, and on functions that are replaced."""

from __future__ import annotations

import threading
from dataclasses import replace
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from networks import Decoder, SmallNet
from torch import Tensor, nn
from torch._subclasses import FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode

import torchlocal as tl
from torchlocal.micro import divisor
from torchlocal.parallel.team import Elsewhere, RemoteSplit, ShareOfSplit
from torchlocal.recompute import by_itself
from torchlocal.rules import RULES
from torchlocal.rules.infopro import UpsampledConv
from torchlocal.run import build
from torchlocal.run.config import FitConfig
from torchlocal.run.own import Own
from torchlocal.tokens import TokenCrossEntropy

CUDA = build.Execution(device=torch.device("cuda"), precision="fp32", channels_last=False)


def test_a_network_on_two_devices_is_refused() -> None:
    with FakeTensorMode():
        model = nn.Sequential(nn.Linear(4, 4, device="cuda:0"), nn.Linear(4, 3, device="cuda:1"))
        with pytest.raises(ValueError, match=r"has 0\.weight on cuda:0 and 1\.weight on cuda:1; move it") as error:
            tl.decouple(model, sample=(2, 4))
    assert "\n" not in str(error.value)


@pytest.mark.parametrize(("device", "told"), [("cuda:1", [3]), ("cpu", []), ("meta", [])])
def test_a_search_has_the_callers_current_device(monkeypatch: pytest.MonkeyPatch, device: str, told: list[int]) -> None:
    """Which a thread of its own would not have; on a CPU no accelerator is woken."""
    asked: list[int] = []
    monkeypatch.setattr(torch.accelerator, "current_accelerator", lambda *, check_available: torch.device("cuda"))
    monkeypatch.setattr(torch.accelerator, "current_device_index", lambda: 3)
    monkeypatch.setattr(torch.accelerator, "set_device_index", asked.append)
    with torch.no_grad():
        found = by_itself(lambda: (threading.get_ident(), torch.is_grad_enabled()), torch.device(device))
    assert found[0] != threading.get_ident() and found[1]
    assert asked == told


class NoReading(TorchDispatchMode):
    """Refuses what has the host wait for a device: values that it reads, or that shapes depend on, or that it makes."""

    READING = (
        torch.ops.aten._local_scalar_dense.default, torch.ops.aten.nonzero.default, torch.ops.aten.equal.default,
        torch.ops.aten.masked_select.default, torch.ops.aten._unique2.default, torch.ops.aten.lift_fresh.default,
    )  # fmt: skip
    INDEXING = (torch.ops.aten.index.Tensor, torch.ops.aten.index_put_.default)

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        assert func not in self.READING
        assert func not in self.INDEXING or all(i is None or i.dtype not in (torch.bool, torch.uint8) for i in args[1])
        return func(*args, **(kwargs or {}))


@pytest.mark.parametrize(
    "read",
    [
        lambda x: x.sum().item(), lambda x: bool(x.any()), lambda x: x[x > 0], lambda x: x.nonzero(), torch.unique,
        lambda x: torch.tensor([1.0]), lambda x: x.masked_select(x > 0), lambda x: torch.equal(x, x + 1),
        lambda x: x.__setitem__(x > 0, torch.zeros(3)),
    ],
)  # fmt: skip
def test_reading_is_noticed(read: Any) -> None:
    with NoReading():
        x = torch.ones(3).mul(2)
        with pytest.raises(AssertionError):
            read(x)


@pytest.mark.parametrize("rule", sorted(RULES))
def test_no_rule_has_the_host_wait_for_the_device(rule: str) -> None:
    """In any kind of step, from the second of its kind on: the first one may search for a plan."""
    torch.manual_seed(0)
    text = rule in ("solo", "lopt")
    model: nn.Module = Decoder(11, 8) if text else SmallNet(5, 3)
    x = torch.randint(11, (6, 8)) if text else torch.randn(6, 3, 16, 16)
    y = torch.randint(11, (6, 8)) if text else torch.randint(5, (6,))
    modules = 2 if rule == "lopt" else 3
    net = tl.decouple(
        model, modules, sample=x, rule=rule, criterion=TokenCrossEntropy() if text else nn.CrossEntropyLoss()
    )
    steps: list[tuple[Any, dict[str, Any]]] = [
        (net.local_step, {}), (net.local_step, {"recompute": "largest"}),
        (net.guided_step, {"memory": "full"}), (net.guided_step, {"recompute": "modules"}),
        (net.guided_step, {"memory": "exact"}), (net.guided_step, {"auxiliary": "frozen", "memory": "full"}),
    ]  # fmt: skip
    for step, options in steps:
        first = step(x, y, **options)
        with NoReading():
            again = step(x, y, **options)
        assert len(first) == len(again) == (1 if options.get("auxiliary") else modules)


def test_class_weights_on_a_device_count_targets_on_the_host() -> None:
    with FakeTensorMode():
        weight = torch.ones(3, device="cuda:0")
        found = divisor(nn.CrossEntropyLoss(weight=weight), torch.zeros(4, dtype=torch.int64))
    assert found is not None and found.device.type == "cpu"


class NoDoubles(TorchDispatchMode):
    """Refuses float64 anywhere but on the CPU, as MPS does."""

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        assert not isinstance(result, Tensor) or result.dtype != torch.float64 or result.device.type == "cpu", func
        return result


def test_infopro_makes_its_matrices_without_doubles_on_the_device(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(nn.Conv2d, "reset_parameters", lambda conv: None)  # cannot draw on fake tensors of MPS
    with FakeTensorMode(), NoDoubles(), torch.device("mps"):
        conv = UpsampledConv(64, 3, (8, 8), (32, 32))
        with pytest.raises(AssertionError, match="linspace"):
            torch.linspace(0, 1, 3, dtype=torch.float64)
    assert conv.taps_first and conv.rows is not None and conv.columns is not None
    assert {t.device.type for t in (conv.rows, conv.columns, conv.weight)} == {"mps"}
    assert conv.rows.dtype == conv.columns.dtype == torch.float32


@pytest.mark.parametrize("kind", [None, "mps", "xpu", "cuda"])
def test_the_device_that_is_chosen(monkeypatch: pytest.MonkeyPatch, kind: str | None) -> None:
    def current(*, check_available: bool) -> torch.device | None:
        assert check_available
        return None if kind is None else torch.device(kind)

    monkeypatch.setattr(torch.accelerator, "current_accelerator", current)
    assert build._best_device() == (kind or "cpu")


class Ranks:
    """In place of several ranks, as the second replica's first one sees them.

    Args:
        gpus: of all ranks.
        first: whether this is the very first rank.
    """

    parallel, replicas, replica, num_stages, reads = True, 2, 1, 1, True

    def __init__(self, gpus: list[str], *, writes: bool = False, first: bool = False) -> None:
        self.gpus, self.writes, self.first = gpus, writes, first

    def gather(self, value: str) -> list[str]:
        return [self.gpus[0], value, *self.gpus[2:]]

    def at_reader(self, load: Any) -> Any:
        return load() if self.first else "what the first rank tells"


@pytest.mark.parametrize("writes", [True, False])
def test_ranks_that_share_a_gpu_are_refused(monkeypatch: pytest.MonkeyPatch, writes: bool) -> None:
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda device: SimpleNamespace(uuid="GPU-b"))
    build._check_devices(CUDA, Ranks(["GPU-a", "", "GPU-c"], writes=writes))  # type: ignore[arg-type]
    with pytest.raises(ValueError if writes else Elsewhere, match='"cuda": 3 ranks have 2 GPUs between them') as error:
        build._check_devices(CUDA, Ranks(["GPU-b", "", "GPU-c"], writes=writes))  # type: ignore[arg-type]
    assert "\n" not in str(error.value)


def test_ranks_on_devices_that_cannot_send_are_refused() -> None:
    mps, ranks = replace(CUDA, device=torch.device("mps")), Ranks([], writes=True)
    with pytest.raises(ValueError, match='device="mps": ranks send to each other from a CPU or from GPUs') as error:
        build._check_devices(mps, ranks)  # type: ignore[arg-type]
    assert "\n" not in str(error.value)
    build._check_devices(replace(CUDA, device=torch.device("cpu")), ranks)  # type: ignore[arg-type]


@pytest.mark.parametrize("first", [True, False])
def test_a_rank_that_reads_the_data_makes_batches_on_its_device(first: bool) -> None:
    """Those of the first stage of every replica; what other ranks are told holds no images."""
    config = FitConfig.of(batch_size=8, num_train=40, num_validation=10)
    ranks: Any = Ranks([], first=first)
    data: Any = build.load_shared_data(config, Own(), ranks, torch.device("meta"))
    assert isinstance(data.train, ShareOfSplit)
    assert {part._device.type for part in (data.train._split, data.validation, data.test)} == {"meta"}
    assert len(data.train) == 40
    if first:
        told: list[Any] = []
        ranks.at_reader = lambda load: told.append(load())
        build.load_shared_data(config, Own(), ranks, torch.device("meta"))
        assert all(isinstance(getattr(told[0], name), RemoteSplit) for name in ("train", "validation", "test"))
