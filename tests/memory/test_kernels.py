"""What is remembered of operations on fake tensors is what they give."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import nn
from torch._subclasses import FakeTensorMode
from torchvision.models import MobileNetV3, VisionTransformer
from torchvision.models.mobilenetv3 import InvertedResidualConfig

import torchlocal as tl
from torchlocal import memory
from torchlocal.cut.kernels import Kernels, flops_of
from torchlocal.memory.counter import PeakCounter


def plainly(self: Kernels, func: Any, args: Any, kwargs: Any, *, flops: bool) -> tuple[Any, int]:
    result = func(*args, **kwargs)
    return result, flops_of(func, args, kwargs, result) if flops else 0


def transformer() -> nn.Module:
    return VisionTransformer(image_size=16, patch_size=8, num_layers=3, num_heads=2, hidden_dim=16, mlp_dim=32)


def convolutions() -> nn.Module:
    settings = [InvertedResidualConfig(16, 3, 16, 16, True, "HS", s, 1, 1) for s in (1, 2, 1)]
    return MobileNetV3(settings, last_channel=16)


@pytest.mark.parametrize("make", [transformer, convolutions])
@pytest.mark.parametrize("autocast", [None, torch.bfloat16])
def test_predictions_are_those_of_running_every_operation(
    monkeypatch: pytest.MonkeyPatch, make: Callable[[], nn.Module], autocast: torch.dtype | None
) -> None:
    net = tl.decouple(make(), 3, sample=(4, 3, 16, 16))
    steps: list[dict[str, Any]] = [{"step": "plain"}, {"step": "local"}, {"step": "guided", "recompute": "modules"}]
    options: dict[str, Any] = {"autocast": autocast, "optimizer": torch.optim.AdamW}
    quick = [memory.predict(net, **step, **options) for step in [*steps, *steps]]
    monkeypatch.setattr(Kernels, "run", plainly)
    assert quick == 2 * [memory.predict(net, **step, **options) for step in steps]


def test_views_and_operations_in_place_share_memory() -> None:
    mode = FakeTensorMode(allow_non_fake_inputs=True)
    kernels, x = Kernels(mode), mode.from_tensor(torch.zeros(4, 6))
    for _ in range(2):
        with PeakCounter(kernels=kernels) as counter:
            y = x.t()[1:]
            parts = y.split(2)
            same = y.relu_()
            big = torch.cat([x, x]).sum(0, keepdim=True)
        assert same is y and y.shape == (5, 4) and y.stride() == (1, 6) and y.storage_offset() == 1
        assert all(p.untyped_storage()._cdata == x.untyped_storage()._cdata for p in (y, *parts))
        assert parts[2].storage_offset() == 5 and big.device == x.device
        assert (counter.peak, counter.current) == (8 * 6 * 4 + 6 * 4, 6 * 4)


def test_what_has_no_layout_of_its_own_is_run() -> None:
    """Real tensors, other modes, constants, and what depends on values."""
    mode = FakeTensorMode(allow_non_fake_inputs=True)
    kernels, x = Kernels(mode), mode.from_tensor(torch.zeros(3))
    with PeakCounter(kernels=kernels):
        for _ in range(2):
            assert torch.equal(torch.arange(3) + 1, torch.tensor([1, 2, 3]))
            assert (x + torch.arange(3)).shape == (3,)
            assert nn.functional.dropout(x, 0.5).fake_mode is mode
            with pytest.raises(Exception, match=r"aten\."):
                x[x > 0]
            assert (x * 1).dtype == torch.float32 and (x.long() * 1.5).dtype == torch.float32
            assert (x.long() * 1).dtype == torch.int64 and (x.long() * True).dtype == torch.int64
