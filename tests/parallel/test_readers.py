"""A read-out that all modules share, on several ranks: the same bits as on one, and nobody waits who need not."""

from __future__ import annotations

import copy
import time
from pathlib import Path
from typing import Any

import pytest
import torch
from processes import Pool
from test_parallel import assert_same, compare_any, state_of
from torch import Tensor, nn

import torchlocal as tl
from torchlocal import parallel
from torchlocal.models import GPT
from torchlocal.recompute import GuidedPlan, Tape
from torchlocal.rules import make_rule
from torchlocal.tokens import TokenCrossEntropy

V = 40


def texts(count: int, size: int = 4) -> list[tuple[Tensor, Tensor]]:
    generator = torch.Generator().manual_seed(7)
    found = []
    for _ in range(count):
        tokens = torch.randint(V, (size, 10), generator=generator)
        lengths = torch.randint(3, 11, (size, 1), generator=generator)
        found.append((tokens, tokens.roll(-1, 1).masked_fill(torch.arange(10) >= lengths, -100)))
    return found


def build(
    tied: bool = True, modules: int = 4, rule: str = "solo", dropout: float = 0.0, **options: Any
) -> tl.DecoupledNetwork:
    torch.manual_seed(0)
    model = GPT(V, 16, layers=5, width=16, heads=2, tied=tied)
    for block in model.blocks if dropout else ():
        block.mlp = nn.Sequential(block.mlp, nn.Dropout(dropout))
    net = tl.decouple(
        model, modules, sample=texts(1)[0][0], rule=make_rule(rule, options), criterion=TokenCrossEntropy()
    )
    torch.manual_seed(5)
    return net


@pytest.mark.parametrize("tied", [True, False])
@pytest.mark.parametrize(
    ("world", "options"),
    [
        (2, {}),
        (2, {"lag": 2, "depth": 1}),
        (2, {"lag": 3, "depth": 0}),
        (3, {"lag": 1, "depth": 1, "dropout": 0.1}),
        (3, {"lag": 3, "depth": 0}),
        (4, {"lag": 2, "depth": 0}),
    ],
)
def test_a_shared_read_out_equals_the_single_process(
    pool: Pool,
    tmp_path: Path,
    tied: bool,
    world: int,
    options: dict[str, Any],
) -> None:
    compare_any(pool, tmp_path, world, build, texts, make_options={"tied": tied, **options}, kinds="llgllgglll")


@pytest.mark.parametrize("lag", [1, 3])
def test_parts_of_a_batch_and_accumulated_batches(pool: Pool, tmp_path: Path, lag: int) -> None:
    """A local loss of each part counts."""
    guided = {"memory": GuidedPlan(tree=Tape(0, 6), micro_batches=2)}
    options = {"tied": False, "lag": lag, "depth": 0}
    compare_any(pool, tmp_path, 3, build, texts, guided=guided, accumulate=2, make_options=options)


def test_guided_steps_that_leave_the_auxiliary_networks_alone(pool: Pool, tmp_path: Path) -> None:
    options = {"tied": False, "lag": 2, "depth": 0}
    compare_any(pool, tmp_path, 2, build, texts, guided={"auxiliary": "frozen"}, make_options=options)


def test_steps_that_overlap(pool: Pool, tmp_path: Path) -> None:
    plan = GuidedPlan(tree=Tape(0, 6), micro_batches=2)
    options = {"tied": False, "depth": 0}
    compare_any(
        pool, tmp_path, 2, build, texts, guided={"micro_batches": 2}, alone={"memory": plan}, make_options=options
    )


def test_steps_that_overlap_do_not_go_with_a_lag(pool: Pool, tmp_path: Path) -> None:
    for told in pool.run(2, tmp_path, _overlapping_with_a_lag):
        assert told.startswith("micro_batches: SoloRule(depth=2, lag=2) counts local losses")


def _overlapping_with_a_lag() -> Any:
    net = parallel.distribute(build(tied=False, lag=2))
    try:
        net.guided_step(*(texts(1)[0] if net.is_first else ()), micro_batches=2)
    except ValueError as error:
        return str(error)
    finally:
        net.close()
    return "nothing"


@pytest.mark.parametrize("stop", [3, 4, 5])
@pytest.mark.parametrize("lag", [1, 3])
def test_a_checkpoint_goes_on_where_it_was(pool: Pool, tmp_path: Path, lag: int, stop: int) -> None:
    """Wherever values are on their way: in new processes, in others' number, and in the same ones."""
    net = build(tied=False, lag=lag, depth=0)
    run_plain(net, 0, stop)
    middle = copy.deepcopy(net.state_dict())
    run_plain(net, stop, 9)
    for found, again, last in pool.run(3, tmp_path, _stopped, lag, stop, middle):
        assert_same(found, middle)
        assert_same(again, net.state_dict())
        assert_same(last, net.state_dict())


def run_plain(net: Any, start: int, stop: int) -> None:
    optimizer = torch.optim.SGD(net.parameters(), lr=0.5)
    for batch in texts(9)[start:stop]:
        net.local_step(*(batch if getattr(net, "is_first", True) else ()))
        optimizer.step()
        optimizer.zero_grad()


def _stopped(lag: int, stop: int, middle: Any) -> Any:
    net = parallel.distribute(build(tied=False, lag=lag, depth=0))
    run_plain(net, 0, stop)
    found = state_of(net)
    run_plain(net, stop, 9)
    again = state_of(net)
    net.load_state_dict(middle)
    run_plain(net, stop, 9)
    last = state_of(net)
    net.close()
    return found, again, last


def test_with_a_lag_nobody_waits_for_the_last_rank(pool: Pool, tmp_path: Path) -> None:
    """The last rank does not begin its steps before the first has ended its own, up to the lag's length."""
    for state in pool.run(2, tmp_path, _ahead, tmp_path / "done"):
        net = build(tied=False, lag=4, depth=0)
        run_plain(net, 0, 8)
        assert_same(state, net.state_dict())


def _ahead(done: Path) -> Any:
    net = parallel.distribute(build(tied=False, lag=4, depth=0), in_flight=8)
    run_plain(net, 0, 5)  # what the first step has left behind is put to use in the fifth
    while not net.is_first and not done.exists():
        time.sleep(0.01)
    run_plain(net, 5, 8)  # what the fifth leaves behind, in the ninth
    done.touch()
    state = state_of(net)
    net.close()
    return state


def test_ranks_part_while_values_are_on_their_way(pool: Pool, tmp_path: Path) -> None:
    assert pool.run(2, tmp_path, _parted) == [0, 2 * V * 16 * 4]


def _parted() -> int:
    net = parallel.distribute(build(tied=False, lag=3, depth=0))
    run_plain(net, 0, 5)  # what the fifth step has sent would be put to use in the seventh
    net.close()
    return net.bytes_sent if net.is_last else 0


def test_the_read_out_travels_once_in_so_many_steps(pool: Pool, tmp_path: Path) -> None:
    assert pool.run(2, tmp_path, _sent)[1] == [9 * V * 16 * 4, 3 * V * 16 * 4]


def _sent() -> list[int]:
    sent = []
    for lag in (1, 3):
        net = parallel.distribute(build(tied=False, lag=lag, depth=0))
        run_plain(net, 0, 9)
        net.synchronize()
        net.close()
        sent.append(net.bytes_sent)
    return sent


@pytest.mark.parametrize("tied", [True, False])
def test_lopt_on_two_ranks(pool: Pool, tmp_path: Path, tied: bool) -> None:
    """The embedding is at hand where it is asked for."""
    options = {"rule": "lopt", "modules": 2, "tied": tied, "dropout": 0.1}
    compare_any(pool, tmp_path, 2, build, texts, make_options=options)
