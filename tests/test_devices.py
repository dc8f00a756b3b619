"""What depends on the device, as far as it shows without one: on fake tensors, and on functions that are replaced."""

from __future__ import annotations

import threading

import pytest
import torch
from torch import nn
from torch._subclasses import FakeTensorMode

import torchlocal as tl
from torchlocal.memory import plans


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
