"""What depends on the device, as far as it shows without one: on fake tensors, and on functions that are replaced."""

from __future__ import annotations

import threading
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch._subclasses import FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode

import torchlocal as tl
from torchlocal.memory import plans
from torchlocal.micro import divisor
from torchlocal.parallel.team import Elsewhere, RemoteSplit, ShareOfSplit
from torchlocal.rules.infopro import UpsampledConv
from torchlocal.run import build
from torchlocal.run.config import FitConfig
from torchlocal.run.own import Own

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
    monkeypatch.setattr(torch.accelerator, "current_device_index", lambda: 3)
    monkeypatch.setattr(torch.accelerator, "set_device_index", asked.append)
    with torch.no_grad():
        found = plans.by_itself(lambda: (threading.get_ident(), torch.is_grad_enabled()), torch.device(device))
    assert found[0] != threading.get_ident() and found[1]
    assert asked == told


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
    build._check_own_gpus(CUDA, Ranks(["GPU-a", "", "GPU-c"], writes=writes))  # type: ignore[arg-type]
    with pytest.raises(ValueError if writes else Elsewhere, match='"cuda": 3 ranks have 2 GPUs between them') as error:
        build._check_own_gpus(CUDA, Ranks(["GPU-b", "", "GPU-c"], writes=writes))  # type: ignore[arg-type]
    assert "\n" not in str(error.value)


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
