"""What was seen inside of every unit, as far as a copy of the unit needs it; without any tensor."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import nn

from .observe import Call, Key, Observation
from .units import Units

__all__ = ["Within", "body", "within"]

_PERMUTING = ("aten.permute.default", "aten.transpose.int", "prim.device.default")  # the last: a question, no operation


@dataclass(frozen=True, kw_only=True)
class Within:
    """A piece of the forward from a cut point on.

    Attributes:
        unit: the unit.
        entry: shape of what it takes, for the sample.
        shape: shape of what it hands on.
        end: the call that ends it, and the place of the tensor in what that returns; None: the unit's own end.
        modules: the outermost modules that are called in it alone, in a fixed order.
        around: the other modules whose own code runs from the beginning of the piece to its end.
        tensors: names of the parameters and buffers that it reads.
        readers: by use of what it takes, the innermost module that uses it; ``""`` for code that is in none.
        last: the innermost module that is called last.
        cut: a module whose input ends the piece.
    """

    unit: int
    entry: torch.Size
    shape: torch.Size
    end: tuple[Key, int] | None
    modules: tuple[str, ...]
    around: tuple[str, ...]
    tensors: tuple[str, ...]
    readers: tuple[str, ...]
    last: str
    cut: str = ""


def within(units: Units, before: Sequence[frozenset[Key]]) -> tuple[Within, ...]:
    """Every unit but the first, of which there are no copies.

    Args:
        units: the network, observed and cut.
        before: for each of these the calls that are not made when the network runs from there on.
    """
    seen, cuts = units.seen, units.cuts
    place = {c.key: i for i, c in enumerate(seen.calls)}
    found = []
    for unit in range(1, len(cuts) + 1):
        end = place[cuts[unit].key] if unit < len(cuts) else len(seen.calls) - 1
        stop = cuts[unit].end if unit < len(cuts) else len(seen.operations)
        shape = cuts[unit].shape if unit < len(cuts) else seen.prediction.shape
        found.append(_piece(units, unit, before[unit - 1], end, stop, shape))
    return tuple(found)


def body(units: Units, before: Sequence[frozenset[Key]]) -> Within | None:
    """The last unit without the network's head, or None where it is all head.

    The head follows the last tensor of as many dimensions as the unit's input has (pooled maps apart, and the scores
    that a linear layer makes for each position), or, where there is none, the input of the last linear layer.
    """
    seen, cuts = units.seen, units.cuts
    if not cuts:
        return None
    extent, begin = cuts[-1].shape, cuts[-1].end
    place = {c.key: i for i, c in enumerate(seen.calls)}
    calls = [c for c in seen.calls[place[cuts[-1].key] + 1 :] if c.last > begin and not c.hidden]
    scores = (seen.prediction.grad_fn, seen.prediction.output_nr)
    makers = [c for c in calls if any(value == scores for _, value in c.values)]
    linear_head = any(isinstance(c.module, nn.Linear) for c in makers)
    for c in reversed(calls):
        if not c.values or (linear_head and any(c is maker for maker in makers)):
            continue
        if all(op.kind[0] in _PERMUTING for op in seen.operations[c.first : c.last]):  # type: ignore[index]
            continue  # it makes a pooling layer's map of what comes before
        tensor = c.tensors[0] if isinstance(c.tensors[0], torch.Tensor) else c.tensors[0]()
        shape = tensor.shape if tensor is not None else torch.Size()
        if len(shape) > 2 and (len(shape), _sides(shape)) == (len(extent), _sides(extent)):
            end = c.key, c.values[0][0]
            return _piece(units, len(cuts), before[-1], place[c.key], c.last, shape, end=end)
    linear = [c for c in calls if isinstance(c.module, nn.Linear) and c.first > begin and c.inputs]
    if not linear:
        return None
    c = linear[-1]
    earlier = max(place[other.key] for other in seen.calls if other.last <= c.first and place[other.key] < place[c.key])
    return _piece(units, len(cuts), before[-1], earlier, c.first, c.inputs[0][1], end=(c.key, 0), cut=c.path)


def _sides(shape: torch.Size) -> bool:
    """Whether more than one dimension beside the batch's has an extent."""
    return sum(side > 1 for side in shape[1:]) > 1


def _piece(
    units: Units,
    unit: int,
    before: frozenset[Key],
    last_call: int,
    stop: int,
    shape: torch.Size,
    *,
    end: tuple[Key, int] | None = None,
    cut: str = "",
) -> Within:
    """The piece from the beginning of a unit to the operation before ``stop``, which ``last_call`` completes."""
    seen, point = units.seen, units.cuts[unit - 1]
    begin_call = next(i for i, c in enumerate(seen.calls) if c.key == point.key)
    inside = [c for c in seen.calls[begin_call + 1 : last_call + 1] if c.first >= point.end]
    counts: dict[str, int] = {}
    for c in seen.calls:
        counts[c.path] = counts.get(c.path, 0) + 1
    for c in inside:
        counts[c.path] -= 1
    whole = {c.path for c in inside if not counts[c.path]}
    first = {c.path: c.first for c in reversed(inside)}
    called = {id(c.parent) for c in seen.calls}
    leaves = [c for c in inside if id(c) not in called]
    outermost = [p for p in whole if not _is_under(p, whole)]
    # The order decides which random numbers a copy is drawn from: by the dots of what they call, then as they run.
    dots = {p: min(c.path.count(".") for c in leaves if f"{c.path}.".startswith(f"{p}.")) for p in outermost}
    modules = sorted(outermost, key=lambda p: (dots[p], first[p]))
    around: dict[str, None] = {}
    skipped: set[int] = set()
    for i in range(len(seen.calls) - 1, -1, -1):  # callers before those they call
        c = seen.calls[i]
        if c.key in before or id(c.parent) in skipped:
            skipped.add(id(c))
        elif (i <= last_call or c.first < stop) and c.path not in whole and not _is_under(c.path, whole):
            around[c.path] = None
    operations = seen.operations[point.end : stop]
    value = point.features.grad_fn, point.features.output_nr
    uses = sorted(set(seen.spans[value][1])) if value in seen.spans else []
    return Within(
        unit=unit,
        entry=point.shape,
        shape=shape,
        end=end,
        modules=tuple(modules),
        around=tuple(around),
        tensors=tuple(dict.fromkeys(name for op in operations for name in (*op.parameters, *op.buffers))),
        readers=tuple(_innermost(seen, use) for use in uses),
        last=leaves[-1].path if leaves else "",
        cut=cut,
    )


def _is_under(path: str, others: set[str]) -> bool:
    """Whether a module is inside of one of others."""
    parts = path.split(".")
    return any(".".join(parts[:i]) in others for i in range(1, len(parts)))


def _innermost(seen: Observation, moment: int) -> str:
    """The path of the innermost call that a node was made in, if that is the only call of it."""
    inside: list[Call] = [c for c in seen.calls if c.begin <= moment < c.end]
    if not inside:
        return ""
    found = max(inside, key=lambda c: c.depth)
    return found.path if sum(c.path == found.path for c in seen.calls) == 1 else ""
