"""CUDA graphs of steps: what is refused; that they are right is measured by benchmarks/gpu.py, on a GPU."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import nn

import torchlocal as tl


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (lambda net, x, y: (net.local_step, x, y), "a CUDA graph needs a CUDA device, and the network is on 'cpu'"),
        (lambda net, x, y: (lambda *_: [], x, y), "step must be local_step or guided_step of a decoupled network"),
    ],
)
def test_what_is_refused(arguments: Any, message: str) -> None:
    net = tl.decouple(nn.Sequential(nn.Linear(4, 4), nn.Linear(4, 3)), sample=(2, 4))
    with pytest.raises(ValueError, match=message) as error:
        tl.capture(*arguments(net, torch.randn(2, 4), torch.tensor([0, 1])))
    assert "\n" not in str(error.value)
