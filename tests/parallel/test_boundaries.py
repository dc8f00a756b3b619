"""Boundaries in fewer bytes: ranks give the bits of one process that rounds in the same way; links are weighed."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from processes import Pool
from test_parallel import STEPS, assert_same, batches, build, run_steps
from test_parallel import compare as same_as_single

import torchlocal as tl
from torchlocal import parallel
from torchlocal.boundary import encoded_bytes, rounded
from torchlocal.recompute import GuidedPlan, Inner, Tape, leaves


def compare(
    pool: Pool,
    folder: Path,
    boundary: str,
    assignment: list[int],
    build_options: dict[str, Any],
    *,
    steps: list[str] = STEPS,
    options: dict[str, Any] | None = None,
    guided: dict[str, Any] | None = None,
    alone: dict[str, Any] | None = None,
) -> list[Any]:
    """Train on ranks and on one process: losses, parameters, buffers and random state must be the same."""
    options, guided = options or {}, guided or {}
    alone = guided if alone is None else alone
    exact = run_steps(build(**build_options), steps, options, alone)
    single = build(**build_options)
    parallel.round_boundaries(single, boundary, assignment=assignment)
    how = {"boundary": boundary, "assignment": assignment, "single": single}
    world, trained = len(assignment), {"steps": steps, "options": options, "guided": guided, "alone": alone}
    results = same_as_single(pool, folder, world, build_options, **trained, **how)
    assert results[-1][0] != exact
    return results


@pytest.mark.parametrize("boundary", ["bf16", "int8", "int4"])
@pytest.mark.parametrize("backbone", ["convolutions", "transformer"])
def test_mixed_steps_equal_the_single_process(pool: Pool, tmp_path: Path, backbone: str, boundary: str) -> None:
    compare(pool, tmp_path, boundary, [1, 1, 2] if backbone == "convolutions" else [2, 3], {"backbone": backbone})


@pytest.mark.parametrize("guided", [{"recompute": "modules"}, {"memory": "exact"}, {"recompute": 2}])
def test_recomputing_guided_steps_equal_the_single_process(pool: Pool, tmp_path: Path, guided: dict[str, Any]) -> None:
    compare(
        pool, tmp_path, "int8", [3, 1], {"backbone": "convolutions"}, guided=guided, steps=["guided", "local", "match"]
    )


@pytest.mark.parametrize("boundary", ["bf16", "int8", "int4"])
@pytest.mark.parametrize("schedule", ["1f1b", "gpipe"])
def test_overlapping_micro_batches_equal_the_single_process(
    pool: Pool, tmp_path: Path, schedule: str, boundary: str
) -> None:
    compare(
        pool,
        tmp_path,
        boundary,
        [1, 2, 1],
        {"backbone": "convolutions"},
        steps=["guided", "local", "frozen", "guided"],
        guided={"micro_batches": 4, "schedule": schedule},
        alone={"memory": GuidedPlan(tree=Tape(0, 4), micro_batches=4)},
    )


def test_autocast_and_channels_last_equal_the_single_process(pool: Pool, tmp_path: Path) -> None:
    options = {"autocast": torch.bfloat16, "layout": torch.channels_last, "scale": 0.5}
    build_options = {"backbone": "convolutions", "layout": torch.channels_last}
    compare(pool, tmp_path, "int4", [1, 3], build_options, options=options)


@pytest.mark.parametrize("guided", [{}, {"recompute": "modules"}, {"memory": "exact"}])
def test_one_process_rounds_as_a_loop_by_hand(guided: dict[str, Any]) -> None:
    """A local and a guided step of a network without random numbers, in plain PyTorch."""
    net, model = build("convolutions", dropout=0.0), build("convolutions", dropout=0.0)
    parallel.round_boundaries(net, "int4", assignment=[2, 1, 1])
    (x, y), (x2, y2) = batches(2)
    if guided.get("memory"):  # its plan runs inside of a unit that begins at a boundary
        assert any(
            isinstance(leaf, Inner) and leaf.first == 3 for leaf in leaves(net.guided_plan(x2, y2, **guided).tree)
        )
    units, auxiliary = list(model.backbone), list(model.auxiliary)
    h = x
    for k, unit in enumerate(units):
        h = unit(rounded(h.detach(), "int4") if k in (2, 3) else h.detach())
        (model.criterion(auxiliary[k](h), y) if k < 3 else model.criterion(h, y)).backward()
    net.local_step(x, y)
    assert_same(gradients(net), gradients(model))
    h = x2
    for k, unit in enumerate(units):
        h = unit(rounded(h, "int4") if k in (2, 3) else h)
        if k < 3:
            model.criterion(auxiliary[k](h.detach()), y2).backward()
    model.criterion(h, y2).backward()
    net.guided_step(x2, y2, **guided)
    assert_same(gradients(net), gradients(model))


def test_a_local_step_that_recomputes_rounds_alike() -> None:
    nets = [build("convolutions", dropout=0.0) for _ in range(2)]
    x, y = batches(1)[0]
    for net, recompute in zip(nets, (None, "largest"), strict=True):
        parallel.round_boundaries(net, "int4", assignment=[1, 2, 1])
        net.local_step(x, y, recompute=recompute)
    assert nets[1].local_plans(x, y, "largest")
    assert_same(gradients(nets[0]), gradients(nets[1]))


def gradients(net: Any) -> dict[str, torch.Tensor]:
    return {name: parameter.grad.clone() for name, parameter in net.named_parameters()}


@pytest.mark.parametrize("boundary", [None, "bf16", "int8", "int4"])
def test_bytes_are_those_of_the_formats(pool: Pool, tmp_path: Path, boundary: str | None) -> None:
    """Local steps send features, guided ones their gradients as well, piped or not; evaluation sends them exact."""
    sizes = pool.run(2, tmp_path, _bytes, boundary)
    count = 8 * 6 * 8 * 8
    size = encoded_bytes(count, boundary)
    rest = sizes[0][0] - size  # target, loss, share
    assert 0 < rest < 200
    assert sizes[1][0] == 0
    assert sizes[0][1] - size == pytest.approx(rest, abs=100) and sizes[1][1] == size
    assert sizes[0][2] >= size and sizes[1][2] == 4 * encoded_bytes(count // 4, boundary)
    assert 0 < sizes[0][3] - 4 * count < 200 and sizes[1][3] == 0


def _bytes(boundary: str | None) -> list[int]:
    net = parallel.distribute(build("convolutions", dropout=0.0), boundary=boundary, assignment=[2, 2], timeout=60)
    sent = []
    x, y = batches(1)[0]
    kinds: list[Any] = [
        net.local_step,
        net.guided_step,
        lambda *given: net.guided_step(*given, micro_batches=4),
        lambda *given: net.depth_outputs(*given),
    ]
    for step in kinds:
        before = net.bytes_sent
        step(*((x, y) if net.is_first else ()))
        sent.append(net.bytes_sent - before)
    net.close()
    return sent


def test_a_loss_that_is_not_finite_is_noticed() -> None:
    net = build("convolutions", dropout=0.0)
    parallel.round_boundaries(net, "int4", assignment=[2, 2])
    x, y = batches(1)[0]
    x[0] = float("inf")
    assert not net.local_step(x, y)[-1].isfinite()


def test_what_cannot_be_rounded_is_refused() -> None:
    net = build("convolutions")
    with pytest.raises(ValueError, match="boundary: must be None or one of bf16, int8, int4, not 'int2'"):
        parallel.round_boundaries(net, "int2", assignment=[2, 2])
    with pytest.raises(ValueError, match=r"assignment: .* does not give 4 local modules to 2 stages"):
        parallel.round_boundaries(net, "int8", assignment=[2, 3])
    assert net.boundaries == {}


# --- links ---


def test_bytes_over_a_link_are_weighed_by_hand() -> None:
    """Six modules of 1 s; the cut in the middle of time is the dearest to send over."""
    costs, sending = [1.0] * 6, [9.0, 8.0, 7.0, 5.0, 4.5]
    assert parallel.assign(costs, 2) == [range(0, 3), range(3, 6)]
    # Cut after module: 1 max(1, 9, 5) = 9; 2: 8; 3: 7; 4: max(4, 5, 2) = 5; 5: max(5, 4.5, 1) = 5.
    # Of two that are as slow, the stages whose squares add up to less, without the link: 16 + 4 against 25 + 1.
    assert parallel.assign(costs, 2, sending) == [range(0, 4), range(4, 6)]
    # Three are as slow beside a link that takes 7; what is even of them has 9 + 9, not 16 + 4 or 25 + 1.
    assert parallel.assign(costs, 2, [9.0, 8.0, 7.0, 7.0, 7.0]) == [range(0, 3), range(3, 6)]
    assert parallel.assign(costs, 2, [9.0, 8.0, 7.0, 5.0, 4.0]) == [range(0, 4), range(4, 6)]
    assert parallel.assign(costs, 2, [9.0, 8.0, 7.0, 6.0, 4.5]) == [range(0, 5), range(5, 6)]
    assert parallel.assign(costs, 2, [9.0, 8.0, 7.0, 4.0, 4.5]) == [range(0, 4), range(4, 6)]
    assert parallel.assign(costs, 2, [0.1] * 5) == [range(0, 3), range(3, 6)]


def test_seconds_of_a_message_by_hand() -> None:
    # 4.2 MB are 0.336 s at 100 Mbit/s; with 20 ms, (60 ms + 0.336 s) / 4 is less. 1 kB: 80 µs, and (60 ms + 80 µs) / 4.
    seconds = parallel.setup.sending_seconds
    assert seconds(4_200_000, "100mbit") == pytest.approx(0.336)
    assert seconds(4_200_000, "100mbit+20ms") == pytest.approx(0.336)
    assert seconds(1000, "100mbit+20ms") == pytest.approx((0.06 + 80e-6) / 4)
    assert seconds(1000, 1e8, in_flight=2) == pytest.approx(80e-6)
    assert seconds(10**9, "20ms", in_flight=2) == pytest.approx(0.03)


def test_stages_follow_the_link(pool: Pool, tmp_path: Path) -> None:
    """A slow link is crossed where little crosses; the stages are weighed with the bytes that are really sent."""
    fast, slow, cheap = pool.run(2, tmp_path, _stages)[1]
    assert fast[0].stop < 3 and slow == [range(0, 3), range(3, 4)] and cheap == slow


def _stages() -> Any:
    found = []
    x, y = torch.zeros(4, 3, 16, 16), torch.zeros(4, dtype=torch.int64)
    for link, boundary in (("100gbit", None), ("10kbit", None), (1e4, "int8")):
        torch.manual_seed(0)
        layers = [torch.nn.Conv2d(3 if i == 0 else 8, 8, 3, padding=1) for i in range(2)]
        layers.append(torch.nn.Sequential(torch.nn.Conv2d(8, 8, 3), torch.nn.AdaptiveAvgPool2d(1)))
        layers.append(torch.nn.Sequential(torch.nn.Flatten(), torch.nn.Linear(8, 5)))
        net = parallel.distribute(
            tl.decouple(layers, sample=x), assignment="time", sample=(x, y), link=link, boundary=boundary, timeout=60
        )
        found.append(net.stages)
        net.close()
    return found


def test_a_link_needs_seconds(pool: Pool, tmp_path: Path) -> None:
    told = pool.run(2, tmp_path, _refused)[0]
    assert told == [
        "link: only assignment='time' weighs it; give that, or leave link out",
        "link='fast' is no link: give a rate such as 100mbit or 1gbit, a delay, or 100mbit+20ms",
        "boundary: must be None or one of bf16, int8, int4, not 'int2'",
    ]


def _refused() -> list[str]:
    told = []
    for options in ({"link": "1gbit"}, {"link": "fast", "assignment": "time"}, {"boundary": "int2"}):
        try:
            parallel.distribute(build("convolutions"), **options)
        except ValueError as error:
            told.append(str(error))
    return told
