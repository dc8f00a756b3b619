"""Features and gradients in fewer bits: the quantisers by hand, and ranks that send what a hook would round."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import pytest
import torch
from processes import Pool
from test_parallel import assert_same, build, run_steps, state_of, train_in_parallel
from torch import Tensor, nn

import torchlocal as tl
from torchlocal import parallel
from torchlocal.checks import link_rate
from torchlocal.parallel.boundary import KINDS, Boundary
from torchlocal.parallel.setup import seconds_to_send
from torchlocal.recompute import GuidedPlan, Tape

QUANTISED = [("int8", 255), ("int4", 15)]


def rounded(kind: str, tensor: Tensor) -> Tensor:
    boundary = Boundary(kind)
    return boundary.decode(*boundary.encode(tensor))


@pytest.mark.parametrize(("kind", "levels"), QUANTISED)
def test_numbers_are_one_of_the_two_levels_around_them(kind: str, levels: int) -> None:
    """By hand, block by block of 128 numbers in the order of memory, of which the last is not full."""
    generator = torch.Generator().manual_seed(1)
    tensor = torch.randn(3, 5, 20, generator=generator)
    found = rounded(kind, tensor)
    numbers, results = tensor.flatten().tolist(), found.flatten().tolist()
    ups = 0
    for start in range(0, len(numbers), 128):
        block = numbers[start : start + 128]
        low, high = min(block), max(block)
        step = (high - low) / levels
        for number, result in zip(block, results[start : start + 128], strict=True):
            level = (result - low) / step
            assert abs(level - round(level)) < 1e-3
            exact = (number - low) / step
            assert math.floor(exact) - 1e-3 <= level <= math.ceil(exact) + 1e-3
            ups += level > exact
    assert 0.4 < ups / len(numbers) < 0.6


@pytest.mark.parametrize(("kind", "levels"), QUANTISED)
def test_the_mean_is_what_was_rounded(kind: str, levels: int) -> None:
    """Over tensors that differ in a number of another block, each number comes out as itself in the mean."""
    tensor = torch.rand(128, generator=torch.Generator().manual_seed(2))
    count = 3000
    found = torch.stack([rounded(kind, torch.cat([tensor, torch.full((128,), float(i))]))[:128] for i in range(count)])
    step = (tensor.max() - tensor.min()) / levels
    deviation = step / 2 / math.sqrt(count)  # at most, of the mean
    assert (found.mean(0) - tensor).abs().max() < 5 * deviation
    assert (found.std(0) > 0.05 * step).float().mean() > 0.9  # both levels are taken


@pytest.mark.parametrize("kind", ["int8", "int4"])
def test_zeros_and_constants_are_exact(kind: str) -> None:
    features = torch.randn(4, 64, generator=torch.Generator().manual_seed(3)).relu()
    assert torch.equal(rounded(kind, features)[features == 0], features[features == 0])
    assert torch.equal(rounded(kind, torch.full((3, 100), -2.7)), torch.full((3, 100), -2.7))
    assert rounded(kind, torch.empty(0, 7)).shape == (0, 7)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64])
def test_layout_and_dtype_come_back(kind: str, dtype: torch.dtype) -> None:
    image = torch.randn(2, 6, 5, 3).to(dtype).to(memory_format=torch.channels_last)
    for tensor in (image, image.transpose(0, 3), image[:, :1].expand(2, 6, 5, 3)):
        found = rounded(kind, tensor)
        assert (found.shape, found.dtype) == (tensor.shape, tensor.dtype)
        assert found.stride() == tensor.stride() or 0 in tensor.stride()
    ids = torch.arange(5)
    assert rounded(kind, ids) is ids


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("value", [math.nan, math.inf])
def test_what_is_not_finite_stays_so(kind: str, value: float) -> None:
    """So that a run that diverges is told."""
    tensor = torch.zeros(300)
    tensor[200] = value
    assert not rounded(kind, tensor)[200].isfinite()
    assert rounded(kind, tensor)[:128].isfinite().all()


@pytest.mark.parametrize(("kind", "each"), [("bf16", 2.0), ("int8", 1.0625), ("int4", 0.5625), (None, 4.0)])
def test_bytes_are_counted(kind: str | None, each: float) -> None:
    boundary = Boundary(kind)
    assert boundary.encode(torch.randn(1280))[0].nbytes == boundary.num_bytes(1280, 4) == 1280 * each
    assert boundary.encode(torch.randn(7))[0].nbytes == boundary.num_bytes(7, 4)


def test_rounding_depends_on_the_tensor_alone() -> None:
    """Not on what was rounded before, nor on the random state, which stays."""
    tensor, state = torch.randn(1000, generator=torch.Generator().manual_seed(4)), torch.get_rng_state()
    used = Boundary("int4")
    used.encode(torch.ones(100_000))
    assert torch.equal(used.encode(tensor)[0], Boundary("int4").encode(tensor)[0])
    assert torch.equal(torch.get_rng_state(), state)


def test_other_words_are_refused() -> None:
    with pytest.raises(ValueError, match="boundary: must be one of bf16, int8, int4, or None, not 'int2'"):
        Boundary("int2")


class _Round(torch.autograd.Function):
    """What a link does to features, and to their gradient."""

    @staticmethod
    def forward(ctx: Any, features: Tensor, kind: str) -> Tensor:
        ctx.kind = kind
        return rounded(kind, features)

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor, None]:
        return rounded(ctx.kind, gradients[0]), None


def build_rounding(kind: str, before: tuple[int, ...]) -> tl.DecoupledNetwork:
    """One process, in which the inputs of some modules are rounded as they would be on their way."""
    net = build("convolutions")
    assert isinstance(net.backbone, nn.Sequential)
    for index in before:
        net.backbone[index].register_forward_pre_hook(lambda _, given: (_Round.apply(given[0], kind),))
    torch.manual_seed(5)
    return net


@pytest.mark.parametrize(
    ("kind", "assignment", "guided", "alone"),
    [
        ("int8", [2, 2], {}, {}),
        ("int4", [1, 2, 1], {"memory": "exact"}, {"memory": "exact"}),
        ("bf16", [2, 2], {"recompute": "modules"}, {"recompute": "modules"}),
        ("int8", [1, 2, 1], {"micro_batches": 4}, {"memory": GuidedPlan(tree=Tape(0, 4), micro_batches=4)}),
        ("int4", [2, 2], {"micro_batches": 2}, {"memory": GuidedPlan(tree=Tape(0, 4), micro_batches=2)}),
        ("bf16", [2, 2], {"micro_batches": 2}, {"memory": GuidedPlan(tree=Tape(0, 4), micro_batches=2)}),
    ],
)
def test_ranks_send_what_a_hook_would_round(
    pool: Pool, tmp_path: Path, kind: str, assignment: list[int], guided: dict[str, Any], alone: dict[str, Any]
) -> None:
    """Local and guided steps, plain, recomputing, and overlapping: bit for bit, and the losses too."""
    steps = ["local", "guided", "local", "frozen", "guided", "local"]
    ends = [sum(assignment[: i + 1]) for i in range(len(assignment) - 1)]
    net = build_rounding(kind, tuple(ends))
    losses = run_steps(net, steps, {}, alone)
    how = {"boundary": kind, "assignment": assignment}
    results = pool.run(
        len(assignment), tmp_path, train_in_parallel, {"backbone": "convolutions"}, steps, {}, guided, how
    )
    for _, state, _, _ in results:
        assert_same(state, state_of(net))
    assert results[-1][0] == losses


def test_bytes_sent_and_evaluation(pool: Pool, tmp_path: Path) -> None:
    """A local step in int4 sends a seventh of the features' bytes; an evaluation sends them as they are."""
    for sent, same in pool.run(2, tmp_path, _evaluate):
        assert same
        assert sent in (0, Boundary("int4").num_bytes(8 * 6 * 8 * 8, 4))


def _evaluate() -> tuple[int, bool]:
    alone, net = build("convolutions").eval(), parallel.distribute(build("convolutions"), boundary="int4").eval()
    x, y = torch.randn(8, 3, 8, 8, generator=torch.Generator().manual_seed(1)), torch.zeros(8, dtype=torch.long)
    outputs, _ = net.depth_outputs(*((x, y) if net.is_first else ()), all_depths=False)
    with torch.no_grad():
        expected = alone.backbone(x)
    same = not net.is_last or torch.equal(outputs[net.num_modules - 1], expected)
    before = net.bytes_sent
    net.train()
    net.local_step(*((x, y) if net.is_first else ()))
    sent = net.bytes_sent - before
    net.close()
    rest = 8 * 8 + 4 * 2 + 5056  # targets, losses, random state
    return (sent - rest if sent else 0), same


def test_a_slow_link_moves_the_cut() -> None:
    """By hand: computing takes 1, 1, 1, 1 s, sending after modules 1 to 3 takes so long; and by bytes."""
    assert parallel.assign([1.0] * 4, 2) == [range(0, 2), range(2, 4)]
    assert parallel.assign([1.0] * 4, 2, [5.0, 2.5, 0.2]) == [range(0, 2), range(2, 4)]  # 2.5 s, not 3
    assert parallel.assign([1.0] * 4, 2, [5.0, 3.5, 0.2]) == [range(0, 3), range(3, 4)]  # 3 s, not 3.5
    assert parallel.assign([1.0] * 4, 2, [0.1, 5.0, 5.0]) == [range(0, 1), range(1, 4)]
    net = build("convolutions")  # features of 6 x 8 x 8 numbers after each of three modules
    x = torch.zeros(16, 3, 8, 8)
    numbers = 16 * 6 * 8 * 8
    assert seconds_to_send(net, "100mbit", x, 4, None) == [numbers * 4 * 8 / 100e6] * 3
    assert seconds_to_send(net, 1e9, x, 2, "int8") == [numbers * 1.0625 * 8 / 1e9] * 3


@pytest.mark.parametrize("link", ["100", "fast", "1 gbit", 0, -1.0, True, math.inf])
def test_what_is_no_link_is_refused(link: Any) -> None:
    with pytest.raises(ValueError, match="link: must be bits per second, as a number or like '100mbit'"):
        link_rate(link)
