"""Runs on text on several ranks: the bits of one process, and means over the tokens of all replicas."""

from __future__ import annotations

import json
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from networks import Decoder
from processes import Pool
from torch import Tensor
from torch.nn import functional as F

import torchlocal as tl
from torchlocal.parallel import distribute
from torchlocal.run import trainer
from torchlocal.run.config import FitConfig
from torchlocal.tokens import TokenCrossEntropy

TIMES = ("seconds", "train_seconds", "epoch_seconds", "tokens_per_second", "out", "run")


@pytest.fixture(scope="module")
def texts(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("texts")
    draw = torch.Generator().manual_seed(0)
    for i in range(30):
        names = torch.randint(9, (30,), generator=draw).tolist()
        (folder / f"file{i:02}.py").write_text("".join(f"x_{name} = {name}\n" for name in names))
    return folder


def config(texts: Path, out: Path, **changes: Any) -> FitConfig:
    """Two epochs of four steps: tied read-out, groups, clipping, accumulation, guided steps."""
    values: dict[str, Any] = {
        "out": str(out), "model": "gpt-nano", "model_options": {"layers": 4, "width": 16, "heads": 2},
        "data": f"text:{texts}", "data_root": str(texts.parent / "root"),
        "context": 16, "num_validation": 9, "epoch_rows": 36, "epochs": 2, "batch_size": 4, "accumulate": 2,
        "optimizer": "adamw", "lr": 0.01, "weight_decay": 0.1, "weight_decay_of": "matrices", "auxiliary_lr": 0.02,
        "warmup_steps": 2, "clip": 0.3, "cuts": ["blocks.0", "blocks.2"], "rule": "greedy", "auxiliary": "linear",
        "memory": "full", "precision": "fp32", "device": "cpu", "num_threads": 1, "tensorboard": False,
        "guidance": tl.GuidanceConfig(period=3, length=1),
    }  # fmt: skip
    return FitConfig.of(**(values | changes))


def fit(settings: FitConfig, **options: Any) -> dict[str, Any]:
    return trainer.fit(settings, progress=False, **options)


def assert_same(a: Any, b: Any, path: str = "") -> None:
    """Equal in every bit, but for times and places."""
    if isinstance(a, dict):
        assert list(a) == list(b), path
        for name in a:
            if name not in TIMES:
                assert_same(a[name], b[name], f"{path}.{name}")
    elif isinstance(a, list):
        assert len(a) == len(b), path
        for i, (x, y) in enumerate(zip(a, b, strict=True)):
            assert_same(x, y, f"{path}[{i}]")
    elif isinstance(a, Tensor):
        assert torch.equal(a, b), path
    else:
        assert a == b, path


@pytest.mark.parametrize("world", [2, 3])
def test_two_ranks_are_one(pool: Pool, texts: Path, tmp_path: Path, world: int) -> None:
    fit(config(texts, tmp_path / "alone"))
    pool.run(world, tmp_path, fit, config(texts, tmp_path / "run"))
    for name in ("last.pt", "best.pt"):
        assert_same(*(torch.load(tmp_path / out / name, weights_only=True) for out in ("alone", "run")))
    one, other = (json.loads((tmp_path / out / "result.json").read_text()) for out in ("alone", "run"))
    assert_same(one, other)
    groups = torch.load(tmp_path / "run" / "last.pt", weights_only=True)["optimizer"]["param_groups"]
    assert [group["weight_decay"] for group in groups] == [0.1, 0.0, 0.1, 0.0]
    assert (tmp_path / "run" / "tokenizer.json").exists() and one["guided_steps"] == 2


def test_groups_are_loaded_on_other_ranks(pool: Pool, texts: Path, tmp_path: Path) -> None:
    """Begun by two ranks and stopped, ended by one, and the other way round."""
    fit(config(texts, tmp_path / "alone"))
    for name, worlds in (("a", (2, 1)), ("b", (1, 2))):
        settings = config(texts, tmp_path / name)
        for i, world in enumerate(worlds):
            folder = tmp_path / f"{name}{i}"
            folder.mkdir()
            job = partial(stopped, settings) if i == 0 else partial(fit, settings, resume=True)
            if world == 1:
                job()
            else:
                pool.run(world, folder, job)
        assert_same(*(torch.load(tmp_path / out / "last.pt", weights_only=True) for out in ("alone", name)))


def stopped(settings: FitConfig) -> None:
    """Stop after the fifth step, inside of the second epoch."""
    import os
    import signal

    import torch.distributed as dist

    from torchlocal.parallel.team import Elsewhere
    from torchlocal.run import build
    from torchlocal.run.trainer import Interrupted

    steps = 0

    def train_step(*arguments: Any, **options: Any) -> list[Tensor]:
        nonlocal steps
        steps += 1
        losses = build.train_step(*arguments, **options)
        if steps == 5 and (not dist.is_initialized() or dist.get_rank() == 0):
            os.kill(os.getpid(), signal.SIGTERM)
        return losses

    trainer.train_step = train_step
    try:
        fit(settings)
        raise AssertionError("it was not stopped")
    except (Interrupted, Elsewhere):
        pass
    finally:
        trainer.train_step = build.train_step


# --- replicas ---


def ignored() -> tuple[Tensor, Tensor]:
    """Rows whose targets count in very different numbers."""
    draw = torch.Generator().manual_seed(1)
    ids, target = (torch.randint(11, (4, 8), generator=draw) for _ in range(2))
    for row, count in enumerate((8, 5, 1, 0)):
        target[row, count:] = -100
    return ids, target


def make_net(criterion: Any) -> tl.DecoupledNetwork:
    torch.manual_seed(0)
    model = Decoder(11, 8, dropout=0.0)
    cuts = ["blocks.0", "blocks.2"]
    return tl.decouple(model, cuts=cuts, sample=ignored()[0][:2], rule=tl.GreedyRule("linear"), criterion=criterion)


def replica(guided: bool) -> list[Tensor]:
    import torch.distributed as dist

    net = distribute(make_net(TokenCrossEntropy()), replicas=2)
    ids, target = (part.chunk(2)[dist.get_rank()] for part in ignored())
    (net.guided_step if guided else net.local_step)(ids, target)
    return [parameter.grad for parameter in net.net.parameters() if parameter.grad is not None]


@pytest.mark.parametrize("guided", [False, True])
def test_replicas_count_by_their_tokens(pool: Pool, tmp_path: Path, guided: bool) -> None:
    """The mean over the tokens of both, though one has thirteen and the other one."""
    net = make_net(lambda scores, target: F.cross_entropy(scores.reshape(-1, 11), target.reshape(-1)))
    (net.guided_step if guided else net.local_step)(*ignored())
    expected = [parameter.grad for parameter in net.parameters()]
    for found in pool.run(2, tmp_path, replica, guided):
        assert len(found) == len(expected)
        for one, other in zip(found, expected, strict=True):
            torch.testing.assert_close(one, other)
