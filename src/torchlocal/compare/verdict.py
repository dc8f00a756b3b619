"""Who wins: PGL against what a sceptic would train in its memory and in its time, in one sentence each."""

from __future__ import annotations

from torchlocal.compare.results import Comparison, MethodResult, can_tell

__all__ = ["verdict"]

_MORE = 1.02  # times the memory of PGL, and still equal
_AT_EQUAL_MEMORY = {"recomputed": "end-to-end bit for bit", "micro-batches": "end-to-end in micro-batches"}


def verdict(comparison: Comparison) -> list[str]:
    """What guidance gives, who wins at PGL's memory and in its time, by how much, and whether the seeds can tell.

    Returns:
        At most one sentence or two for each: of every row of PGL, and the rivals of it that were trained.
    """
    found, by_name = [], {result.method: result for result in comparison.results}
    for pgl in comparison.results:
        # The options of a grid follow the method's name.
        rivals = {r.method.partition(",")[0]: r for r in comparison.results if r.method in pgl.rivals}
        local = by_name.get(pgl.baseline) if pgl.method.partition(",")[0] == "pgl" else None
        told = (_guidance(pgl, local), _at_equal_memory(pgl, rivals), _in_equal_time(pgl, rivals))
        found += [sentence for sentence in told if sentence]
    return found


def _guidance(pgl: MethodResult, local: MethodResult | None) -> str | None:
    if local is None:
        return None
    rows = f"{pgl.method} {_accuracy(pgl)}, {local.method} {_accuracy(local)}"
    return f"What guidance gives: {rows}. {_winner(pgl, {local.method: local})}"


def _at_equal_memory(pgl: MethodResult, rivals: dict[str, MethodResult]) -> str | None:
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
    rows = [f"{words} {_accuracy(row)}{_time(row, whole)}" for words, row in {pgl.method: pgl, **held}.items()]
    rows[0] += " the time of end-to-end" if _time(pgl, whole) else ""
    size = f"{pgl.peak_bytes / 2**20:.1f} MiB"
    if whole is not None and whole.peak_bytes:
        size += f", {pgl.peak_bytes / whole.peak_bytes:.2f} × end-to-end"
    return f"At equal memory ({size}): {'; '.join(rows + beyond)}. {_winner(pgl, held)}".strip()


def _in_equal_time(pgl: MethodResult, rivals: dict[str, MethodResult]) -> str | None:
    longer = rivals.get("equal-time")
    if longer is None:
        return None
    rows = f"{pgl.method} {_accuracy(pgl)} in {pgl.steps:,} steps; end-to-end {_accuracy(longer)} in {longer.steps:,}"
    return f"In equal time: {rows}. {_winner(pgl, {'end-to-end': longer})}"


def _accuracy(row: MethodResult) -> str:
    spread = "" if row.accuracy_std is None else f" ± {100 * row.accuracy_std:.1f}"
    return f"{100 * row.accuracy:.1f}{spread} %"


def _time(row: MethodResult, whole: MethodResult | None) -> str:
    if row.step_seconds is None or whole is None or not whole.step_seconds:
        return ""
    return f" in {row.step_seconds / whole.step_seconds:.2f} ×"


def _winner(pgl: MethodResult, rivals: dict[str, MethodResult]) -> str:
    """Who is most accurate, by how much, and whether that can be told."""
    if not rivals:
        return ""
    rows = {pgl.method: pgl, **rivals}
    words = max(rows, key=lambda each: rows[each].accuracy)
    # The best rival is PGL's measure; PGL is that of a rival.
    other = max(rivals.values(), key=lambda each: each.accuracy) if words == pgl.method else pgl
    points = 100 * (rows[words].accuracy - other.accuracy)
    seeds = min(len(rows[words].accuracies), len(other.accuracies))
    if seeds == 1:
        return f"Of a single seed, {words} is ahead by {points:.1f} points, which one seed cannot tell from chance."
    if not can_tell(rows[words], other):
        return f"Nobody wins that {seeds} seeds could tell: {words} is ahead by {points:.1f} points, within the spread."
    wins = f"{words} wins by {points:.1f} points, more than the spread of {seeds} seeds."
    return wins[0].upper() + wins[1:]
