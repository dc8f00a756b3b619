"""What an observation has shown of a network that is cut, as far as running it needs it."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Sequence
from dataclasses import dataclass

import torch

from .observe import Call, Key, Observation
from .read_out import ReadOut, find_read_out
from .units import Point, Units
from .within import Within, body, within

__all__ = ["Embedding", "Facts"]


@dataclass(frozen=True, kw_only=True)
class Embedding:
    """What the first unit hands on: the call that returns it, its place there, and its shape for the sample."""

    call: Key
    place: int
    shape: torch.Size


@dataclass(frozen=True, kw_only=True)
class Facts:
    """What an observation has shown of a network that is cut, without any tensor.

    Attributes:
        points: for every unit but the last, the call that ends it.
        places: by call, which leaves of what it returns carry gradients.
        before: for every unit but the first, the calls that are not made when the network runs from there on.
        inner: by call, how often the modules that are looked at are called inside of it.
        parameters: for every unit the names of the parameters that it reads.
        buffers: for every unit the names of the buffers that it reads.
        written: for every unit the buffers that it writes in place: path of the module, name.
        loose: buffers that are written by code between the units.
        changes: attributes and buffers that the forward assigns: path, name, whether it is a buffer.
        input_written: the forward changes its own input.
        reentrant: there are checkpoints whose inside learns only if an input carries a gradient.
        draws: code between the units draws random numbers.
        python: the forward draws from Python's or numpy's random generator.
        inputs: for every unit the floating-point tensors of the batch, by their place among its leaves, that are read
            when the network runs from there on.
        kinds: for every unit a number, the same for units of the same build.
        modules: for every unit the outermost modules that run in it alone and have parameters.
        fake: the forward runs on fake tensors.
        reason: why it does not.
        within: for every unit but the first what was seen inside, for copies.
        body: that of the last unit without the network's head; None where it is all head.
        read_out: the linear layer that makes the prediction, or why there is none.
        embedding: where what the first unit hands on is made, wherever the network is cut; None where it is one unit.
    """

    points: tuple[tuple[Key, int], ...]
    places: dict[Key, tuple[int, ...]]
    before: tuple[frozenset[Key], ...]
    inner: dict[Key, dict[str, int]]
    parameters: tuple[tuple[str, ...], ...]
    buffers: tuple[tuple[str, ...], ...]
    written: tuple[tuple[tuple[str, str], ...], ...]
    loose: tuple[tuple[str, str], ...]
    changes: tuple[tuple[str, str, bool], ...]
    input_written: bool
    reentrant: bool
    draws: bool
    python: bool
    inputs: tuple[tuple[int, ...], ...]
    kinds: tuple[int, ...]
    modules: tuple[tuple[str, ...], ...]
    fake: bool
    reason: str
    within: tuple[Within, ...]
    body: Within | None
    read_out: ReadOut | str
    embedding: Embedding | None

    @classmethod
    def of(cls, units: Units) -> Facts:
        """Gather them."""
        seen, cuts = units.seen, units.cuts
        known = {c.key: c for c in seen.calls}
        order = {id(c): i for i, c in enumerate(seen.calls)}
        before = [_standing_in(seen.calls[: order[id(known[cut.key])] + 1], known[cut.key]) for cut in cuts]
        watched = {path for keys in before for path, _ in keys} | {cut.path for cut in cuts}
        headless = body(units, before)
        watched |= {headless.end[0][0]} if headless is not None and headless.end is not None else set()
        read_out = find_read_out(seen)
        watched |= {read_out.call[0]} if isinstance(read_out, ReadOut) else set()
        spanning = _ancestors(cuts)
        starts = [0, *(cut.end for cut in cuts)]
        stops = [*starts[1:], len(seen.operations)]
        written: list[list[tuple[str, str]]] = [[] for _ in starts]
        for place, first in seen.written.items():
            for unit, (a, b) in enumerate(zip(starts, stops, strict=True)):
                name = f"{place[0]}.{place[1]}" if place[0] else place[1]
                if a <= first < b or any(name in op.buffers for op in seen.operations[max(a, first) : b]):
                    written[unit].append(place)
        return cls(
            points=tuple((cut.key, cut.place) for cut in cuts),
            places={c.key: tuple(place for place, _ in c.values) for c in seen.calls if c.path in watched},
            before=(frozenset(), *before),
            inner=_inner_calls(seen.calls, watched),
            parameters=tuple(tuple(names) for names in units.parameters()),
            buffers=tuple(tuple(names) for names in units.buffers()),
            written=tuple(tuple(places) for places in written),
            loose=tuple(place for place in seen.written if place[0] in spanning),
            changes=tuple(seen.changes),
            input_written=seen.input_written,
            reentrant=seen.reentrant,
            draws=seen.draws or any(op.draws and op.path in spanning for op in seen.operations),
            python=seen.draws,
            inputs=(
                tuple(place for place, _ in seen.leaves),
                *(_read_leaves(seen, cut.end, keys) for cut, keys in zip(cuts, before, strict=True)),
            ),
            kinds=tuple(units.kinds()),
            modules=tuple(tuple(paths) for paths in units.modules()),
            fake=seen.fake,
            reason=seen.reason,
            within=within(units, before),
            body=headless,
            read_out=read_out,
            embedding=None
            if units.embedding is None
            else Embedding(call=units.embedding.key, place=units.embedding.place, shape=units.embedding.shape),
        )


def _ancestors(cuts: Sequence[Point]) -> set[str]:
    """The paths of the modules whose own code runs around the cut points."""
    found = {""}
    for cut in cuts:
        parts = cut.path.split(".")
        found |= {".".join(parts[:i]) for i in range(1, len(parts))}
    return found


def _standing_in(completed: Sequence[Call], last: Call) -> frozenset[Key]:
    """Of calls that are over, those that have to be left out: the outermost that return nothing but features."""
    replaced = {id(c) for c in completed if c is last or (c.values and not c.mixed)}
    found = set()
    for c in completed:
        parent = c.parent
        while parent is not None and id(parent) not in replaced:
            parent = parent.parent
        if id(c) in replaced and parent is None:
            found.add(c.key)
    return frozenset(found)


def _read_leaves(seen: Observation, end: int, before: frozenset[Key]) -> tuple[int, ...]:
    """The floating-point tensors of the batch that reach operations after ``end`` by others than the calls left out."""
    if not seen.fake:  # tensors that are gone cannot be told apart
        return tuple(place for place, _ in seen.leaves)
    out = sorted((c.first, c.last) for c in seen.calls if c.key in before)
    sources: dict[int, set[int]] = defaultdict(set)  # by storage
    for place, key in seen.leaves:
        sources[key].add(place)
    found: set[int] = set()
    position = 0
    for index, operation in enumerate(seen.operations):
        while position < len(out) and out[position][1] <= index:
            position += 1
        if index < end and position < len(out) and out[position][0] <= index:
            continue
        read = set().union(*(sources[key] for key in operation.reads if key in sources))
        if read and index >= end:
            found |= read
        elif read:
            for key in operation.makes:
                sources[key] |= read
    return tuple(sorted(found))


def _inner_calls(calls: Sequence[Call], watched: set[str]) -> dict[Key, dict[str, int]]:
    """By call, how often watched modules that are called several times are called inside of it."""
    often = {c.path for c in calls if c.number > 1} & watched
    found: dict[Key, dict[str, int]] = defaultdict(dict)
    for c in calls:
        parent = c.parent if c.path in often else None
        while parent is not None:
            counts = found[parent.key]
            counts[c.path] = counts.get(c.path, 0) + 1
            parent = parent.parent
    return dict(found)
