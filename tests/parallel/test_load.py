"""Who waits for whom, and ranks that stand still for a while."""

from __future__ import annotations

import os
import signal
import subprocess
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import pytest
import test_parallel_run as runs
import torch.distributed as dist
from processes import Pool
from torch import Tensor

from torchlocal.parallel.load import Load, Meter, describe, slowest
from torchlocal.run import build as assembly
from torchlocal.run import trainer
from torchlocal.run.callbacks import Callback, RunState


def test_the_slowest_stage_or_link_is_named() -> None:
    slow = [Load(10, held=5), Load(10, queued=39, batches=10), Load(10, starved=4, batches=10)]
    assert slowest(slow) == "stage 2 of 3"
    assert describe(slow) == "stages busy 50 100 60 %, queues 3.9 0.0, slowest: stage 2 of 3"
    link = [Load(10), Load(10, held=6), Load(10, starved=7, queued=2, batches=8)]
    assert slowest([Load(10, held=5), *link[1:]]) == "the link from stage 2 to stage 3"
    assert slowest(link) == "stage 1 of 3"  # which never waits
    even = [Load(10, held=0.3), Load(10, starved=0.5, batches=4)]
    assert slowest(even) == "" and describe(even) == "stages busy 97 95 %, queues 0.0"
    waiting = [Load(10, others=6), Load(10, others=5, batches=4)]  # for gradients of guided steps: no link's fault
    assert slowest(waiting) == "stage 2 of 2"
    assert describe([Load(), Load()]) == "" == describe([])
    many = [Load(10, others=k, queued=k, batches=1) for k in range(9)]
    assert describe(many) == "stages busy 20 to 100 %, queues 1.0 to 8.0, slowest: stage 1 of 9"


def test_loads_travel_as_whole_numbers() -> None:
    load = Load(1.5, 0.25, 0.125, 0.0625, 7.0, 3.0)
    assert Load.of(load.numbers()) == load and all(isinstance(value, int) for value in load.numbers())
    assert load.seconds_busy == 1.5 - 0.25 - 0.125 - 0.0625 and load.queue == 7 / 3


def test_a_meter_counts_what_happens_while_it_trains(monkeypatch: pytest.MonkeyPatch) -> None:
    now = 0.0
    monkeypatch.setattr(time, "perf_counter", lambda: now)
    meter = Meter()
    for training in (True, False, True):
        if training:
            meter.begin()
        else:
            meter.pause()
        now += 1
        for seconds, waits in zip((2, 3, 4), (meter.previous, meter.next, meter.others), strict=True):
            with waits.clock():
                now += seconds
        meter.previous.queued += 1
    assert meter.total() == Load(20, 4, 6, 8, 2, 2)
    meter.pause()
    now += 5
    assert meter.total() == Load(20, 4, 6, 8, 2, 2)


# --- whole runs ---


class Listener(Callback):
    """What a run tells about its stages."""

    def __init__(self) -> None:
        self.values: list[Mapping[str, float]] = []
        self.loads: list[Sequence[Load]] = []

    def on_step(self, state: RunState, values: Mapping[str, float]) -> None:
        self.values.append(values)

    def on_epoch(self, state: RunState, row: Mapping[str, float]) -> None:
        self.loads.append(state.loads)


def test_a_run_tells_how_busy_its_stages_are(pool: Pool, tmp_path: Path) -> None:
    _, told = pool.run(2, tmp_path, _slow, runs.small_config(tmp_path / "run"))
    assert [slowest(loads) for loads in told.loads] == ["stage 1 of 2"] * 2
    assert all(set(values) > {"busy/stage_1", "busy/stage_2", "queue/stage_2"} for values in told.values)
    assert all(0 <= values["busy/stage_1"] <= 1 and 0 <= values["queue/stage_2"] <= 4 for values in told.values)


def _slow(config: Any) -> Listener:
    real, listener = assembly.train_step, Listener()

    def train_step(*arguments: Any, **options: Any) -> list[Tensor]:
        if dist.get_rank() == 0:
            time.sleep(0.05)
        return real(*arguments, **options)

    trainer.train_step = train_step
    try:
        runs.fit(config, progress=False, timeout=60, callbacks=[listener])
    finally:
        trainer.train_step = real
    return listener


@pytest.mark.parametrize("rank", [0, 1])
def test_a_rank_that_stands_still_for_a_while_loses_nothing(pool: Pool, tmp_path: Path, rank: int) -> None:
    runs.fit(runs.small_config(tmp_path / "alone"), progress=False)
    pool.run(2, tmp_path, _standing_still, runs.small_config(tmp_path / "run"), rank)
    runs.assert_same_run(tmp_path / "run", tmp_path / "alone")


def _standing_still(config: Any, rank: int) -> None:
    """The kernel stops the whole process, as when its machine is suspended: its connections stay, and are silent."""
    real, steps = assembly.train_step, 0

    def train_step(*arguments: Any, **options: Any) -> list[Tensor]:
        nonlocal steps
        steps += 1
        if steps == 4 and dist.get_rank() == rank:
            with subprocess.Popen(["sh", "-c", f"sleep 1.5; kill -CONT {os.getpid()}"]):
                os.kill(os.getpid(), signal.SIGSTOP)
        return real(*arguments, **options)

    trainer.train_step = train_step
    try:
        runs.fit(config, progress=False, timeout=30)
    finally:
        trainer.train_step = real
