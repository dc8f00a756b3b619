"""CUDA graphs of steps: what is refused; that they are right is measured by benchmarks/gpu.py, on a GPU."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, nn

import torchlocal as tl
from torchlocal.run import build


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


CUDA = build.Execution(device=torch.device("cuda"), precision="fp32", channels_last=False)


@pytest.mark.parametrize(
    ("changes", "device", "precision", "message"),
    [
        ({}, "cpu", "fp32", "device='cpu', and graphs are CUDA's"),
        ({}, "cuda", "fp16", "precision='fp16', whose scale changes"),
        ({"accumulate": 2}, "cuda", "fp32", "accumulate=2, since a graph overwrites gradients"),
        ({"compile": True}, "cuda", "fp32", "compile, which has modes with graphs of its own"),
    ],
)
def test_what_a_run_refuses(changes: dict[str, Any], device: str, precision: str, message: str) -> None:
    net = tl.decouple(nn.Sequential(nn.Linear(4, 4), nn.Linear(4, 3)), sample=(2, 4))
    execution = build.Execution(device=torch.device(device), precision=precision, channels_last=False)
    with pytest.raises(ValueError, match=message) as error:
        build.CapturedSteps(tl.FitConfig.of(capture=True, **changes), execution, net)
    assert "\n" not in str(error.value)


def test_a_run_records_each_kind_of_step_once(monkeypatch: pytest.MonkeyPatch) -> None:
    """In place of graphs, which need a device: the steps themselves, with the options that they were recorded with."""
    recorded: list[tuple[str, Any]] = []

    def record(step: Any, x: Tensor, y: Tensor, *, share: Any, **options: Any) -> Any:
        def replay(x: Tensor, y: Tensor) -> list[Tensor]:
            losses: list[Tensor] = step(x, y, **options)
            return losses

        recorded.append((step.__name__, share))
        return replay

    monkeypatch.setattr(build, "capture", record)
    config = tl.FitConfig.of(batch_size=4, device="cpu", precision="fp32", modules=2, clip=1.0, memory="full")
    weights = []
    for captures in (False, True):
        torch.manual_seed(0)
        layers = [nn.Linear(4, 4), nn.ReLU(), nn.Linear(4, 4), nn.ReLU(), nn.Linear(4, 3)]
        net = tl.decouple(nn.Sequential(*layers), 2, sample=(4, 4)).train()
        captured = build.CapturedSteps(config, CUDA, net) if captures else None
        optimizer = build.build_optimizer(config, net)
        for guided in (False, True, False, True):
            batch = torch.randn(4, 4), torch.randint(3, (4,))
            execution = build.resolve_execution(config)
            build.train_step(
                net, optimizer, [batch], config=config, execution=execution, guided=guided, captured=captured
            )
        weights.append(net.state_dict())
    assert recorded[0] == ("local_step", None)
    assert recorded[1][0] == "guided_step" and recorded[1][1] is not None
    assert len(recorded) == 2
    assert all(torch.equal(weights[0][name], weights[1][name]) for name in weights[0])
