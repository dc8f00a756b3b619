"""What crosses from one stage to the next: values by hand, no bias, bytes, numbers that are not finite."""

from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor

from torchlocal.boundary import Original, decode, encode, encoded_bytes, rounded

WHOLE = ["int8", "int4"]
MOST = {"int8": 255, "int4": 15}


def through(tensor: Tensor, boundary: str) -> Tensor:
    return decode(encode(tensor, boundary), Original.of(tensor), boundary)


def draw(*shape: int) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(0))


def steps_by_hand(block: list[float], most: int) -> tuple[float, int]:
    """The step and the zero of a block, number by number."""
    below, above = max(0.0, -min(block)), max(0.0, max(block))
    zero = round(most * below / (below + above)) if below + above else 0
    if below > 0:
        zero = max(zero, 1)
    if above > 0:
        zero = min(zero, most - 1)
    step = max(below / zero if below else 0.0, above / (most - zero) if above else 0.0)
    return step, zero


@pytest.mark.parametrize("boundary", WHOLE)
def test_every_number_goes_to_a_neighbour_on_the_grid_of_its_block(boundary: str) -> None:
    """Blocks of both signs, of one sign, of tiny and of huge numbers."""
    scales = torch.tensor([1.0, 1e-30, 1e30, 0.3, 5.0])[:, None]
    x = draw(5, 64) * scales
    x[3], x[4] = x[3].abs(), -x[4].abs()
    found = through(x, boundary)
    for row, came in zip(x.tolist(), found.tolist(), strict=True):
        least, zero = steps_by_hand(row, MOST[boundary])
        step = max(abs(value) for value in came) / max(1, round(max(abs(value) for value in came) / least / 1.008))
        assert least <= step * 1.0001 <= 1.018 * least  # rounded up to bf16
        for value, rounded_to in zip(row, came, strict=True):
            level = rounded_to / step
            assert abs(level - round(level)) < 1e-3 and -zero <= round(level) <= MOST[boundary] - zero
            assert abs(value - rounded_to) < step * 1.0001


@pytest.mark.parametrize("boundary", WHOLE)
def test_no_bias(boundary: str) -> None:
    """The mean over many roundings of one number is the number; the variance that of rounding to a neighbour."""
    row = draw(64)
    row[0], row[1] = 0.0, row.max() / 3
    x = row.repeat(40_000, 1)
    found = through(x, boundary).double()
    step, _ = steps_by_hand(row.tolist(), MOST[boundary])
    error = (found - x).mean(0).abs()
    assert error.max() < 5 * 0.51 * step / math.sqrt(40_000)
    chance = torch.remainder(row.double() / (found[found != 0].abs().min()), 1)  # of the upper neighbour
    step_used = found[found != 0].abs().min()
    expected = step_used**2 * chance * (1 - chance)
    torch.testing.assert_close(found.var(0), expected, rtol=0.05, atol=1e-3 * float(step_used) ** 2)


@pytest.mark.parametrize("boundary", WHOLE)
def test_places_are_rounded_apart_and_tensors_alike(boundary: str) -> None:
    x = draw(1000, 64)
    assert torch.equal(through(x, boundary), through(x.clone(), boundary))
    changed = x.clone()
    changed[-1, -1] += 1e-3
    assert not torch.equal(through(x, boundary)[:-1], through(changed, boundary)[:-1])
    same = through(torch.full((200, 64), 0.3).index_fill_(1, torch.tensor([0]), 1.0), boundary)[:, 1:]
    ups = (same > 0.3).double()
    assert ups.mean(0).std() < 0.05 and ups.mean(1).std() < 0.1 and 0 < ups.mean() < 1
    pairs = torch.corrcoef(torch.stack([ups.flatten()[:-1], ups.flatten()[1:]]))[0, 1]
    assert abs(pairs) < 0.05


@pytest.mark.parametrize("boundary", ["bf16", *WHOLE])
def test_zeros_and_random_generators_stay(boundary: str) -> None:
    x = torch.relu(draw(4, 8, 10, 10)) - 0.5 * torch.relu(draw(4, 8, 10, 10).flip(0))
    x[1] = 0.0
    before = torch.get_rng_state()
    found = through(x, boundary)
    assert torch.equal(torch.get_rng_state(), before)
    assert (found[x == 0] == 0).all() and (x == 0).sum() > 800
    assert torch.equal(through(torch.zeros(3, 5), boundary), torch.zeros(3, 5))


@pytest.mark.parametrize("boundary", WHOLE)
def test_what_is_not_finite_arrives_as_such(boundary: str) -> None:
    for bad in (math.nan, math.inf, -math.inf):
        x = draw(3, 64)
        x[1, 7] = bad
        found = through(x, boundary)
        assert not found[1].isfinite().any()
        assert found[[0, 2]].isfinite().all()


@pytest.mark.parametrize("boundary", ["bf16", *WHOLE])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64])
@pytest.mark.parametrize("shape", [(2, 3, 5, 7), (64,), (1,), (0, 4), ()])
def test_shapes_layouts_dtypes_and_bytes(boundary: str, dtype: torch.dtype, shape: tuple[int, ...]) -> None:
    x = draw(*shape).to(dtype)
    layouts = [x, x.to(memory_format=torch.channels_last)] if x.ndim == 4 else [x]
    for given in layouts:
        block = encode(given, boundary)
        assert block.nbytes == encoded_bytes(x.numel(), boundary, dtype)
        found = decode(block, Original.of(given), boundary)
        assert (found.shape, found.dtype, found.stride()) == (given.shape, dtype, given.stride())
        assert torch.equal(found, through(x, boundary))


def test_bytes_per_number() -> None:
    count = 64 * 1000
    bytes_of = {how: encoded_bytes(count, how) / count for how in ("bf16", "int8", "int4", None)}
    assert bytes_of == {"bf16": 2, "int8": 67 / 64, "int4": 35 / 64, None: 4}
    assert encoded_bytes(count, "int8", torch.int64) == 8 * count  # whole numbers are not rounded
    assert torch.equal(encode(torch.arange(9), "int4"), torch.arange(9))


@pytest.mark.parametrize("boundary", ["bf16", *WHOLE])
def test_the_gradient_is_rounded_on_its_way_back(boundary: str) -> None:
    x, gradient = draw(4, 100).requires_grad_(), draw(4, 100).flip(1) * 1e-3
    found = rounded(x, boundary)
    found.backward(gradient)
    assert torch.equal(found, through(x.detach(), boundary))
    assert torch.equal(x.grad, through(gradient, boundary)) and not torch.equal(x.grad, gradient)
    assert torch.equal(rounded(x.detach(), boundary), found)
