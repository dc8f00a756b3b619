"""The schedules: which steps are guided, and how often."""

from __future__ import annotations

import itertools
import math
from dataclasses import replace

import pytest

import torchlocal as tl
from torchlocal.guidance import GUIDANCES, Guidance, make_guidance


def guided(guidance: Guidance, num_steps: int) -> list[int]:
    return [step for step in range(num_steps) if guidance(step)]


def test_never_and_always() -> None:
    assert guided(tl.NeverGuidance(), 50) == [] and tl.NeverGuidance().share == 0
    assert guided(tl.AlwaysGuidance(), 50) == list(range(50)) and tl.AlwaysGuidance().share == 1


def test_periodic_guides_the_end_of_each_period() -> None:
    assert guided(tl.PeriodicGuidance(period=5), 20) == [4, 9, 14, 19]
    assert guided(tl.PeriodicGuidance(period=4, length=2, start=3), 12) == [5, 6, 9, 10]
    assert guided(tl.PeriodicGuidance(period=3, length=3), 7) == list(range(7))
    assert tl.PeriodicGuidance(period=10, length=3).share == 0.3


def test_periods_in_epochs() -> None:
    guidance = tl.PeriodicGuidance(period=2, length=1, start=1, unit="epochs").bind(num_steps=40, steps_per_epoch=4)
    assert guided(guidance, 24) == [8, 9, 10, 11, 16, 17, 18, 19]
    with pytest.raises(ValueError, match="has to be bound first"):
        tl.PeriodicGuidance(unit="epochs")(0)


def test_random_is_a_function_of_seed_and_step() -> None:
    guidance = tl.RandomGuidance(share=0.3, seed=4)
    first = guided(guidance, 5000)
    assert first == guided(tl.RandomGuidance(share=0.3, seed=4), 5000)  # in any order, from any start
    assert first != guided(tl.RandomGuidance(share=0.3, seed=5), 5000)
    assert abs(len(first) / 5000 - 0.3) < 0.03 and guidance.share == 0.3
    gaps = {b - a for a, b in itertools.pairwise(first)}
    assert len(gaps) > 5


@pytest.mark.parametrize(("start", "end"), [(0.0, 0.4), (0.5, 0.1), (0.2, 0.2), (0.0, 1.0), (1.0, 0.0)])
def test_annealed_share_moves_linearly(start: float, end: float) -> None:
    guidance = tl.AnnealedGuidance(start_share=start, end_share=end).bind(num_steps=1000, steps_per_epoch=10)
    steps = guided(guidance, 1000)
    assert abs(len(steps) - 1000 * guidance.share) <= 1
    for begin in range(0, 1000, 250):
        middle = start + (end - start) * (begin + 125) / 1000
        assert abs(sum(begin <= s < begin + 250 for s in steps) - 250 * middle) <= 1
    assert abs(len(guided(guidance, 2000)) - len(steps) - 1000 * end) <= 1  # afterwards the share stays


def test_every_schedule_has_a_share_a_repr_and_a_state() -> None:
    for name, kind in GUIDANCES.items():
        guidance = make_guidance(name)
        assert type(guidance) is kind and 0 <= guidance.share <= 1
        assert eval(repr(guidance), {k.__name__: k for k in GUIDANCES.values()}) == guidance
        state = guidance.state_dict()
        assert state.pop("name") == name and make_guidance(name, **state) == guidance
    assert repr(tl.PeriodicGuidance(period=10)) == "PeriodicGuidance(period=10, length=1, start=0, unit='steps')"


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"name": "sometimes"}, "no schedule named 'sometimes'"),
        ({"name": "periodic", "period": 0}, "period: must be a whole number of at least 1, not 0"),
        ({"name": "periodic", "period": 2.5}, "period: must be a whole number"),
        ({"name": "periodic", "period": 5, "length": 6}, r"length: must be at most the period \(5\), not 6"),
        ({"name": "periodic", "start": -1}, "start: must be a whole number of at least 0, not -1"),
        ({"name": "periodic", "unit": "days"}, "unit: must be 'steps' or 'epochs', not 'days'"),
        ({"name": "periodic", "share": 0.5}, "'periodic' takes period, length, start, unit, but was given 'share'"),
        ({"name": "random", "share": 1.5}, "share: must be a number from 0 to 1, not 1.5"),
        ({"name": "annealed", "end_share": -0.1}, "end_share: must be a number from 0 to 1, not -0.1"),
        ({"name": "annealed", "num_steps": 0}, "num_steps: must be a whole number of at least 1"),
        ({"name": "phased", "share": 2}, "share: must be a number from 0 to 1, not 2"),
        ({"name": "phased", "spread": 2}, "spread: must be a number from 0 to 1, not 2"),
        ({"name": "phased", "periods": 0}, "periods: must be a whole number of at least 1, not 0"),
        ({"name": "never", "period": 3}, "'never' takes no arguments, but was given 'period'"),
    ],
)
def test_wrong_arguments_get_one_clear_sentence(options: dict[str, object], message: str) -> None:
    name = str(options.pop("name"))
    with pytest.raises(ValueError, match=message):
        make_guidance(name, **options)


def test_an_annealed_schedule_falls_by_default() -> None:
    guidance = tl.AnnealedGuidance(num_steps=100)
    assert guidance.share == 0.2 and len(guided(guidance, 50)) == 15 and len(guided(guidance, 100)) == 20


def test_an_annealed_schedule_needs_the_length_of_training() -> None:
    with pytest.raises(ValueError, match="needs the length of training"):
        tl.AnnealedGuidance()(3)


def test_phased_guides_the_end_of_each_part_of_training() -> None:
    guidance = tl.PhasedGuidance(share=0.2, spread=0).bind(num_steps=50, steps_per_epoch=5)
    assert guided(guidance, 50) == list(range(40, 50)) and guidance.share == 0.2
    assert guided(tl.PhasedGuidance(share=0.25, periods=2, spread=0, num_steps=16), 16) == [6, 7, 14, 15]
    assert guided(tl.PhasedGuidance(share=0.5, periods=2, spread=0, num_steps=7), 7) == [
        2,
        3,
        5,
        6,
    ]  # periods of 4 and 3
    assert guided(tl.PhasedGuidance(share=0.0, num_steps=9), 12) == []
    assert guided(tl.PhasedGuidance(share=1.0, periods=3, num_steps=9), 12) == list(range(12))
    assert guided(tl.PhasedGuidance(share=0.2, periods=5, num_steps=10), 10) == [1, 3, 5, 7, 9]  # at least one
    half = tl.PhasedGuidance(share=0.4, spread=0.5, num_steps=20)
    assert guided(half, 20) == [3, 7, 11, 15, *range(16, 20)]
    assert guided(replace(half, periods=2), 20) == [3, 7, 8, 9, 13, 17, 18, 19]
    assert guided(replace(half, spread=1.0), 25) == [2, 4, 7, 9, 12, 14, 17, 19, 22, 24]  # later steps, too
    assert guided(tl.PhasedGuidance(share=1.0, spread=0.5, num_steps=5), 7) == list(range(7))
    with pytest.raises(ValueError, match="needs the length of training"):
        tl.PhasedGuidance()(3)
    with pytest.raises(ValueError, match=r"periods: must be at most the number of steps \(2\), not 3"):
        tl.PhasedGuidance(periods=3, num_steps=2)


def test_the_learning_rate_falls_in_guided_phases() -> None:
    """Half a cosine written out for each of them; that of other schedules falls over all of training."""
    guidance = tl.PhasedGuidance(share=0.25, periods=2, num_steps=16)
    fall = [1.0, (1 + math.cos(math.pi / 2)) / 2]
    assert [guidance.cosine(step, 16) for step in range(16)] == pytest.approx([*[1] * 6, *fall, *[1] * 6, *fall])
    assert [guidance.cosine(step, 16, warmup=2) for step in range(8)] == pytest.approx([0.5, 1, *[1] * 4, *fall])
    assert [guidance.cosine(step, 16, warmup=7) for step in (5, 6, 7)] == pytest.approx([6 / 7, 1, 1])
    assert tl.PhasedGuidance(share=0.25, periods=2).cosine(7, 16) == guidance.cosine(7, 16)
    for spread in (0.5, 1.0):  # wherever the guided steps lie
        assert replace(guidance, spread=spread).cosine(7, 16) == guidance.cosine(7, 16)
    # Where all steps are guided, or none, it is that of plain training.
    whole = [(1 + math.cos(math.pi * i / 16)) / 2 for i in range(16)]
    for share in (0.0, 1.0):
        assert [tl.PhasedGuidance(share=share).cosine(step, 16) for step in range(16)] == pytest.approx(whole)
    for name in GUIDANCES.keys() - {"phased"}:
        assert [make_guidance(name).cosine(step, 16) for step in range(16)] == pytest.approx(whole)
