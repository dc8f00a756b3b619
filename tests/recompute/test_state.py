"""What a second run starts from: the random generators of the devices that the network is on."""

from __future__ import annotations

import random
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import torchlocal as tl
from torchlocal import engine
from torchlocal.cut import forward
from torchlocal.recompute import RandomState, undisturbed
from torchlocal.run import trainer

DEVICE = torch.device("cuda", 1)
ORDER = ("cpu", "python", "cuda:0", "cuda:1", "xpu:0", "xpu:1", "mps")  # of what `drawn` returns


class Devices:
    """In place of a kind of device that is not here: as many generators, on the CPU, and which device is current.

    Args:
        single: there is one device, and functions that are not told which, as those of MPS.
    """

    def __init__(self, *, single: bool = False) -> None:
        self.generators = [torch.Generator().manual_seed(i) for i in range(1 if single else 2)]
        self.current, self.single, self.woken = 0, single, True

    def is_initialized(self) -> bool:
        return self.woken

    def is_available(self) -> bool:
        return False  # which device is current in a thread cannot be asked

    def _chosen(self, device: tuple[Any, ...]) -> torch.Generator:
        assert len(device) == (0 if self.single else 1)
        index = torch.device(device[0]).index if device else 0
        return self.generators[self.current if index is None else index]

    def get_rng_state(self, *device: Any) -> Tensor:
        return self._chosen(device).get_state()

    def set_rng_state(self, state: Tensor, *device: Any) -> None:
        self._chosen(device).set_state(state)


@pytest.fixture
def devices(monkeypatch: pytest.MonkeyPatch) -> dict[str, Devices]:
    """Two of CUDA and of XPU, one of MPS."""
    found = {"cuda": Devices(), "xpu": Devices(), "mps": Devices(single=True)}
    monkeypatch.setattr(torch, "get_device_module", lambda device: found[torch.device(device).type])
    monkeypatch.setattr(torch.cuda, "is_current_stream_capturing", lambda: False)
    return found


def drawn(devices: dict[str, Devices]) -> list[Tensor]:
    """A number of every generator there is."""
    generators = [generator for kind in devices.values() for generator in kind.generators]
    return [torch.rand(3), torch.tensor(random.random()), *(torch.rand(3, generator=g) for g in generators)]


@pytest.mark.parametrize("name", ["cpu", "meta", "cuda:0", "cuda:1", "cuda", "xpu:1", "mps"])
def test_the_state_is_that_of_the_device(devices: dict[str, Devices], name: str) -> None:
    """Its generator, the CPU's and Python's draw the same again; those of all other devices go on."""
    device = torch.device(name)
    devices["cuda"].current = 1
    before = RandomState.get(device)
    assert not before.differs()
    first = drawn(devices)
    assert before.differs()
    before.set()
    assert not before.differs()
    again = drawn(devices)
    repeated = {where for where, a, b in zip(ORDER, first, again, strict=True) if torch.equal(a, b)}
    assert repeated == {"cpu", "python"} | ({"cuda": {"cuda:1"}, "meta": set()}.get(name, {name}))


def test_what_a_device_alone_has_drawn_is_seen(devices: dict[str, Devices]) -> None:
    before = RandomState.get(DEVICE)
    torch.rand(1, generator=devices["cuda"].generators[0])
    assert not before.differs()  # another device
    torch.rand(1, generator=devices["cuda"].generators[1])
    assert before.differs()


@pytest.mark.parametrize("woken", [True, False])
def test_generators_are_left_as_they_were(
    devices: dict[str, Devices], monkeypatch: pytest.MonkeyPatch, woken: bool
) -> None:
    """Those of the CPU and of the device that is used; and of all others of the accelerator, which a seed is for."""
    monkeypatch.setattr(torch.accelerator, "current_accelerator", lambda *, check_available: torch.device("cuda"))
    monkeypatch.setattr(torch.accelerator, "device_count", lambda: 2)
    devices["cuda"].woken = woken
    with undisturbed(torch.device("xpu", 1)):
        first = drawn(devices)
    again = drawn(devices)
    same = {where for where, a, b in zip(ORDER, first, again, strict=True) if torch.equal(a, b)}
    assert same == {"cpu", "python", "xpu:1"} | ({"cuda:0", "cuda:1"} if woken else set())


class Noise(nn.Module):
    """A linear layer, and a mask that the device's own generator draws."""

    def __init__(self, generator: torch.Generator) -> None:
        super().__init__()
        self.linear = nn.Linear(6, 6)
        self.draw = lambda shape: torch.rand(shape, generator=generator)

    def forward(self, x: Tensor) -> Tensor:
        x = self.linear(x)
        return torch.tanh(x) * (self.draw(x.shape) > 0.3)


@pytest.mark.parametrize("step", ["local", "guided"])
def test_recomputation_draws_again_what_the_device_drew(
    devices: dict[str, Devices], monkeypatch: pytest.MonkeyPatch, step: str
) -> None:
    """The network is on the second device, as far as the step is told; nothing of the first is touched."""
    generator = devices["cuda"].generators[1]
    model = nn.Sequential(*(Noise(generator) for _ in range(6)), nn.Linear(6, 3))
    torch.manual_seed(0)
    net = tl.decouple(model, 3, sample=(8, 6))
    x, y = torch.randn(8, 6), torch.randint(3, (8,))
    assert net.local_plans(x, y, "largest")  # found before, on the device that it really is on
    for room in (engine, forward):
        monkeypatch.setattr(room, "device_of", lambda batch, model: DEVICE)
    untouched = devices["cuda"].generators[0].get_state()
    found = []
    for recompute in (None, "modules" if step == "guided" else "largest"):
        generator.manual_seed(5)
        net.zero_grad()
        losses = getattr(net, f"{step}_step")(x, y, recompute=recompute)
        found.append([*losses, generator.get_state(), *(p.grad.clone() for p in net.parameters())])
    assert all(torch.equal(a, b) for a, b in zip(*found, strict=True))
    generator.manual_seed(5)
    assert not torch.equal(found[0][3], generator.get_state())  # it did draw
    assert torch.equal(untouched, devices["cuda"].generators[0].get_state())


@pytest.mark.parametrize("name", ["cpu", "cuda:1", "xpu:0", "mps"])
def test_a_run_keeps_the_state_of_its_device(devices: dict[str, Devices], name: str) -> None:
    device = torch.device(name)
    kept = trainer._random_states(device)
    assert set(kept) == {"cpu", device.type}
    first = drawn(devices)
    trainer._set_random_states(kept, device)
    again = drawn(devices)
    assert {where for where, a, b in zip(ORDER, first, again, strict=True) if torch.equal(a, b)} == {"cpu", name}
    trainer._set_random_states({"cpu": kept["cpu"]}, device)  # a run that was begun on a CPU goes on elsewhere
    assert torch.equal(torch.rand(3), first[0])
