"""Who wins: PGL against what a sceptic would train in its memory and in its time, in one sentence each."""

from __future__ import annotations

from torchlocal.compare.measures import Measure
from torchlocal.compare.results import Comparison, MethodResult, can_tell

__all__ = ["verdict"]

_MORE = 1.02  # times the memory of PGL, and still equal
_AT_EQUAL_MEMORY = {"recomputed": "end-to-end bit for bit", "micro-batches": "end-to-end in micro-batches"}


def verdict(comparison: Comparison) -> list[str]:
    """What guidance gives, who wins at PGL's memory and in its time, by how much, and whether the seeds can tell.

    Returns:
        At most one sentence or two for each: of every row of PGL, and the rivals of it that were trained.
    """
    measure, found, by_name = comparison.measure, [], {result.method: result for result in comparison.results}
    for pgl in comparison.results:
        # The options of a grid follow the method's name.
        rivals = {r.method.partition(",")[0]: r for r in comparison.results if r.method in pgl.rivals}
        local = by_name.get(pgl.baseline) if pgl.method.partition(",")[0] == "pgl" else None
        told = (
            _guidance(measure, pgl, local),
            _at_equal_memory(measure, pgl, rivals),
            _in_equal_time(measure, pgl, rivals),
        )
        found += [sentence for sentence in told if sentence]
    return found


def _guidance(measure: Measure, pgl: MethodResult, local: MethodResult | None) -> str | None:
    if local is None:
        return None
    rows = f"{pgl.method} {measure.told(pgl.mean, pgl.std)}, {local.method} {measure.told(local.mean, local.std)}"
    return f"What guidance gives: {rows}. {_winner(measure, pgl, {local.method: local})}"


def _at_equal_memory(measure: Measure, pgl: MethodResult, rivals: dict[str, MethodResult]) -> str | None:
    if pgl.peak_bytes is None:
        return None
    whole = rivals.get("end-to-end")
    held, beyond = {}, []
    for name, words in _AT_EQUAL_MEMORY.items():
        rival = rivals.get(name)
        if rival is not None and rival.peak_bytes is not None:
            if rival.peak_bytes <= _MORE * pgl.peak_bytes:
                held[words] = rival
            else:
                beyond.append(f"{words} takes at least {rival.peak_bytes / pgl.peak_bytes:.2f} × that")
    if not held and not beyond:
        return None
    rows = [
        f"{words} {measure.told(row.mean, row.std)}{_time(row, whole)}"
        for words, row in {pgl.method: pgl, **held}.items()
    ]
    rows[0] += " the time of end-to-end" if _time(pgl, whole) else ""
    size = f"{pgl.peak_bytes / 2**20:.1f} MiB"
    if whole is not None and whole.peak_bytes:
        size += f", {pgl.peak_bytes / whole.peak_bytes:.2f} × end-to-end"
    return f"At equal memory ({size}): {'; '.join(rows + beyond)}. {_winner(measure, pgl, held)}".strip()


def _in_equal_time(measure: Measure, pgl: MethodResult, rivals: dict[str, MethodResult]) -> str | None:
    longer = rivals.get("equal-time")
    if longer is None:
        return None
    ours, theirs = (measure.told(row.mean, row.std) for row in (pgl, longer))
    rows = f"{pgl.method} {ours} in {pgl.steps:,} steps; end-to-end {theirs} in {longer.steps:,}"
    return f"In equal time: {rows}. {_winner(measure, pgl, {'end-to-end': longer})}"


def _time(row: MethodResult, whole: MethodResult | None) -> str:
    if row.step_seconds is None or whole is None or not whole.step_seconds:
        return ""
    return f" in {row.step_seconds / whole.step_seconds:.2f} ×"


def _winner(measure: Measure, pgl: MethodResult, rivals: dict[str, MethodResult]) -> str:
    """Who is best, by how much, and whether that can be told."""
    if not rivals:
        return ""
    rows = {pgl.method: pgl, **rivals}
    words = measure.best({name: row.mean for name, row in rows.items()})
    # PGL is held against its best rival, a rival against PGL.
    best = measure.best({name: row.mean for name, row in rivals.items()})
    other = rivals[best] if words == pgl.method else pgl
    points = f"{measure.number(measure.gain(rows[words].mean, other.mean))}{measure.points}"
    seeds = min(len(rows[words].test), len(other.test))
    if seeds == 1:
        return f"Of a single seed, {words} is ahead by {points}, which one seed cannot tell from chance."
    if not can_tell(rows[words], other):
        return f"Nobody wins that {seeds} seeds could tell: {words} is ahead by {points}, within the spread."
    wins = f"{words} wins by {points}, more than the spread of {seeds} seeds."
    return wins[0].upper() + wins[1:]
