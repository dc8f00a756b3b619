"""Sharing local modules out anew, by the time that every stage was seen to take."""

from __future__ import annotations

from collections.abc import Sequence

from ..modules import LocalModules

__all__ = ["better_shares", "shared_buffer", "shares_by_speed"]


def shares_by_speed(costs: Sequence[float], slowness: Sequence[float]) -> list[range]:
    """Consecutive local modules for every stage, so that the stage that takes longest takes least.

    Args:
        costs: of each of the K local modules, in any unit.
        slowness: of each stage, seconds for one unit of cost; at most K stages.

    Returns:
        One range of at least one local module per stage; of several that are as good, that with the earliest cuts.
    """
    num_modules, num_stages = len(costs), len(slowness)
    sums = [0.0]
    for cost in costs:
        sums.append(sums[-1] + cost)
    # best[end]: least time of the slowest of the stages so far, which hold the modules before `end`, and its last cut.
    best: dict[int, tuple[float, tuple[int, ...]]] = {0: (0.0, ())}
    for stage, factor in enumerate(slowness):
        left = num_stages - stage - 1
        best = {
            end: min(
                (max(time, factor * (sums[end] - sums[start])), (*cuts, end))
                for start, (time, cuts) in best.items()
                if start < end
            )
            for end in range(stage + 1, num_modules - left + 1)
        }
    ends = best[num_modules][1]
    return [range(start, end) for start, end in zip((0, *ends), ends, strict=False)]


def better_shares(
    costs: Sequence[float], stages: Sequence[range], seconds: Sequence[float], *, least_gain: float = 0.05
) -> list[range] | None:
    """Other shares, if they promise to take less time than these.

    Args:
        costs: of each local module, in any unit.
        stages: the local modules of every stage.
        seconds: that each stage took for a batch, without waiting.
        least_gain: share of the slowest stage's time that has to be won.

    Returns:
        The shares, or None where these are as good.
    """
    slowness = [taken / sum(costs[k] for k in stage) for taken, stage in zip(seconds, stages, strict=True)]
    found = shares_by_speed(costs, slowness)
    expected = max(factor * sum(costs[k] for k in stage) for factor, stage in zip(slowness, found, strict=True))
    return found if expected < (1 - least_gain) * max(seconds) else None


def shared_buffer(net: LocalModules, stages: Sequence[range]) -> str | None:
    """The name of a buffer that one stage writes and another one uses, if there is any."""
    facts, groups = net.chain.facts, net.partition.groups
    written: dict[str, int] = {}
    for number, modules in enumerate(stages):
        for unit in (unit for k in modules for unit in groups[k]):
            for path, name in facts.written[unit]:
                written.setdefault(f"{path}.{name}" if path else name, number)
    for number, modules in enumerate(stages):
        for name in (name for k in modules for unit in groups[k] for name in facts.buffers[unit]):
            if written.get(name, number) != number:
                return name
    return None
