"""Who waits for whom, shares by measured times, and ranks that stand still for a while."""

from __future__ import annotations

import itertools
import os
import signal
import subprocess
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import test_parallel_run as runs
import test_readers as readers
import torch
import torch.distributed as dist
from processes import Pool
from torch import Tensor, nn

import torchlocal as tl
from torchlocal.parallel import network
from torchlocal.parallel.load import Load, Meter, describe, slowest
from torchlocal.parallel.shares import better_shares, shares_by_speed
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


def test_shares_by_speed_are_the_best_of_all() -> None:
    generator = torch.Generator().manual_seed(0)
    for num_modules, num_stages in ((1, 1), (5, 2), (6, 3), (7, 4), (4, 4)):
        costs = (0.1 + torch.rand(num_modules, generator=generator)).tolist()
        slowness = (0.1 + torch.rand(num_stages, generator=generator)).tolist()

        def time_of(stages: Sequence[range], costs: list[float] = costs, slowness: list[float] = slowness) -> float:
            return max(f * sum(costs[k] for k in stage) for f, stage in zip(slowness, stages, strict=True))

        every = [
            [range(a, b) for a, b in itertools.pairwise((0, *cuts, num_modules))]
            for cuts in itertools.combinations(range(1, num_modules), num_stages - 1)
        ]
        found = shares_by_speed(costs, slowness)
        assert found in every and time_of(found) == pytest.approx(min(map(time_of, every)), rel=1e-12)


def test_shares_stay_where_little_is_won() -> None:
    halves, costs = [range(2), range(2, 4)], [1.0, 1.0, 1.0, 1.0]
    assert better_shares(costs, halves, [2.0, 2.0]) is None
    assert better_shares(costs, halves, [6.0, 2.0]) == [range(1), range(1, 4)]  # 3 and 3 seconds in place of 6
    assert better_shares(costs, halves, [6.0, 5.8]) is None  # any other share takes longer
    assert better_shares([1.0, 0.04, 1.0, 1.0], halves, [1.04, 2.0]) is None


# --- in steps ---


def build(slow: int | None = None) -> tuple[tl.DecoupledNetwork, Any]:
    """Six modules with dropout; on one rank each takes longer."""
    torch.manual_seed(0)
    layers = [nn.Sequential(nn.Linear(8, 8), nn.Dropout(0.3), nn.ReLU()) for _ in range(6)]
    net = tl.decouple(nn.Sequential(*layers, nn.Linear(8, 4)), 6, sample=(4, 8))
    if slow is not None and dist.get_rank() == slow:
        for layer in layers:
            layer.register_forward_pre_hook(lambda *_: time.sleep(0.01))
    generator = torch.Generator().manual_seed(1)
    batches = [(torch.randn(4, 8, generator=generator), torch.randint(4, (4,), generator=generator)) for _ in range(12)]
    return net, batches


def train(net: Any, batches: Any, rebalance_after: int | None = None) -> list[list[list[int]]]:
    """Local and guided steps with momentum; returns the shares that there were."""
    make = lambda: torch.optim.SGD(net.parameters(), lr=0.1, momentum=0.9)  # noqa: E731
    optimizer, shares = make(), [[list(stage) for stage in getattr(net, "stages", [])]]
    net.train()
    for i, batch in enumerate(batches):
        given = batch if getattr(net, "is_first", True) else ()
        _ = net.guided_step(*given) if i % 4 == 3 else net.local_step(*given)
        optimizer.step()
        optimizer.zero_grad()
        if rebalance_after is not None and (i + 1) % rebalance_after == 0:
            states = net.rebalance(optimizer)
            if states is not None:
                optimizer = make()
                net.load_optimizer_state(optimizer, states[0])
                shares.append([list(stage) for stage in net.stages])
    return shares


@pytest.mark.parametrize("slow", [0, 1])
def test_modules_leave_a_slow_rank_and_nothing_else_changes(pool: Pool, tmp_path: Path, slow: int) -> None:
    told = pool.run(2, tmp_path, _rebalanced, slow)
    alone, batches = build()
    train(alone, batches)
    expected = alone.state_dict()
    for shares, state, _ in told:
        assert len(shares[0][slow]) == 3 > len(shares[1][slow]) and [k for s in shares[1] for k in s] == list(range(6))
        assert state.keys() == expected.keys()
        assert all(torch.equal(state[name], expected[name]) for name in state)
    loads = told[-1][-1]
    assert [load.batches for load in loads] == [12, 12] and slowest(loads) == f"stage {slow + 1} of 2"


def _rebalanced(slow: int) -> Any:
    net, batches = build(slow)
    parallel = tl.distribute(net, assignment=[3, 3], timeout=60)
    shares = train(parallel, batches, rebalance_after=4)
    loads = parallel.loads()
    state = {name: tensor.clone() for name, tensor in parallel.state_dict().items()}
    parallel.close()
    return shares, state, loads


@pytest.mark.parametrize("options", [{"tied": True}, {"tied": False, "lag": 3, "depth": 0}])
def test_modules_move_with_what_ties_the_ranks(pool: Pool, tmp_path: Path, options: dict[str, Any]) -> None:
    """A tied embedding, and a read-out that all read: other channels, over the connections that there are."""
    alone = readers.build(**options)
    train(alone, readers.texts(12))
    expected = alone.state_dict()
    for shares, state in pool.run(3, tmp_path, _moved, options):
        assert [[len(stage) for stage in stages] for stages in shares] == [[2, 1, 1], [1, 1, 2], [1, 2, 1], [2, 1, 1]]
        assert all(torch.equal(state[name], expected[name]) for name in expected)


def _stages(*counts: int) -> list[range]:
    return [range(end - count, end) for count, end in zip(counts, itertools.accumulate(counts), strict=True)]


def _moved(options: dict[str, Any]) -> Any:
    every = iter([_stages(1, 1, 2), _stages(1, 2, 1), _stages(2, 1, 1)])
    real = network.better_shares
    network.better_shares = lambda *_: next(every)
    try:
        parallel = tl.distribute(readers.build(**options), assignment=[2, 1, 1], timeout=60)
        shares = train(parallel, readers.texts(12), rebalance_after=4)
    finally:
        network.better_shares = real
    state = {name: tensor.clone() for name, tensor in parallel.state_dict().items()}
    parallel.close()
    return shares, state


def test_shares_are_not_measured_where_the_result_depends_on_them(pool: Pool, tmp_path: Path) -> None:
    for told in pool.run(2, tmp_path, _bf16):
        assert told.startswith("rebalance: with a boundary that rounds, the result depends on where stages meet")


def _bf16() -> str:
    net, batches = build()
    parallel = tl.distribute(net, boundary="bf16", timeout=60)
    try:
        train(parallel, batches[:1], rebalance_after=1)
    except ValueError as error:
        parallel.close()
        return str(error)
    return "nothing"


@pytest.mark.parametrize(
    ("device", "compile", "message"),
    [
        ("cuda", False, "goes by the clock of the host, which does not tell how long cuda computes"),
        ("cpu", True, "moves modules, and compiled ones cannot move"),
    ],
)
def test_what_cannot_move_is_refused(device: str, compile: bool, message: str) -> None:
    config = runs.small_config(Path("run"), balance="epoch", compile=compile)
    execution: Any = SimpleNamespace(precision="fp32", device=torch.device(device))
    nothing: Any = None
    with pytest.raises(ValueError, match=message):
        assembly.share_out(nothing, config, nothing, execution, nothing)


# --- whole runs ---


class Listener(Callback):
    """What a run tells about its stages."""

    def __init__(self) -> None:
        self.values: list[Mapping[str, float]] = []
        self.loads: list[Sequence[Load]] = []
        self.shares: list[list[int]] = []

    def on_step(self, state: RunState, values: Mapping[str, float]) -> None:
        self.values.append(values)

    def on_epoch(self, state: RunState, row: Mapping[str, float]) -> None:
        self.loads.append(state.loads)

    def on_share(self, state: RunState, shares: Sequence[range]) -> None:
        self.shares.append([len(stage) for stage in shares])


def test_a_run_whose_shares_move_is_that_of_one_process(pool: Pool, tmp_path: Path) -> None:
    """The rank that has two of the three modules is slow, so after every epoch the other one gets two."""
    config = runs.small_config(tmp_path / "alone", balance="epoch", epochs=3)
    runs.fit(config, progress=False)
    _, told = pool.run(2, tmp_path, _moving, runs.small_config(tmp_path / "run", balance="epoch", epochs=3))
    runs.assert_same_run(tmp_path / "run", tmp_path / "alone")
    assert told.shares in ([[1, 2]], [[2, 1]], [[1, 2], [2, 1]], [[2, 1], [1, 2]])  # a busy machine may hide the second
    for loads, slow in zip(told.loads, [stage.index(1) for stage in told.shares], strict=False):
        assert slowest(loads) == f"stage {slow + 1} of 2"  # who has one module of the next shares had two
    assert all(set(values) > {"busy/stage_1", "busy/stage_2", "queue/stage_2"} for values in told.values)
    assert all(0 <= values["busy/stage_1"] <= 1 and 0 <= values["queue/stage_2"] <= 4 for values in told.values)


def _moving(config: Any) -> Listener:
    real, listener = assembly.train_step, Listener()

    def train_step(net: Any, *arguments: Any, **options: Any) -> list[Tensor]:
        if len(net.modules) == 2:
            time.sleep(0.3)  # much more than a step takes on a busy machine
        return real(net, *arguments, **options)

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
