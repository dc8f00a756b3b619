"""Where to cut: the units of a backbone, what each costs, and their balanced grouping into K local modules."""

from __future__ import annotations

import bisect
import difflib
import heapq
import itertools
import operator
from collections import defaultdict
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn
from torch._subclasses import FakeTensor

from .batches import Batch
from .observe import Call, Observation, observe

__all__ = ["Partition", "Point", "Unit", "Units", "balance"]


@dataclass(frozen=True, kw_only=True)
class Unit:
    """The smallest piece that a backbone can be cut into.

    Attributes:
        name: qualified name of the submodule it is, or ``first…last`` of those that it spans.
        output_shape: shape of the tensor that it hands on, batch included.
        channel_dim: which dimension of that tensor holds the channels, 1 or -1.
        activation_bytes: bytes that one forward pass of the sample keeps for backward in this unit.
        flops: floating-point operations of one forward pass of the sample (matrix products and convolutions).
        num_parameters: number of parameters, those that an earlier unit uses too left out.
    """

    name: str
    output_shape: torch.Size
    channel_dim: int
    activation_bytes: int
    flops: int
    num_parameters: int


@dataclass(frozen=True, kw_only=True)
class Partition:
    """Units of a backbone and their grouping into K consecutive local modules.

    Attributes:
        units: the units in order.
        groups: one range of unit indices per local module.
        costs: what each local module costs under the cost that was balanced (by default activation bytes of the
            sample, auxiliary network included).
    """

    units: tuple[Unit, ...]
    groups: tuple[range, ...]
    costs: tuple[float, ...]

    @property
    def names(self) -> list[str]:
        """One readable name per local module."""
        return [
            _span(self.units[g[0]].name.split("…")[0], self.units[g[-1]].name.split("…")[-1])
            if len(g) > 1
            else self.units[g[0]].name
            for g in self.groups
        ]


def _span(first: str, last: str) -> str:
    return first if first == last else f"{first}…{last}"


@dataclass(frozen=True)
class Point:
    """A cut point: a tensor among what the call of a module returns.

    Attributes:
        path: qualified name of the outermost module that returns the tensor.
        number: which of its calls, counted from 1.
        place: of the tensor among the leaves of what the call returns.
        names: of all modules whose calls return it.
        end: the operation after the last one before it.
        moment: autograd's count of nodes there.
        shape: of the tensor, for the sample.
        features: the tensor itself, or one of the same layout, without memory.
        value: what it is in the autograd graph.
    """

    path: str
    number: int
    place: int
    names: tuple[str, ...]
    end: int
    moment: int
    shape: torch.Size
    features: Any = field(repr=False, compare=False)
    value: Any = field(repr=False, compare=False)

    @property
    def key(self) -> tuple[str, int]:
        """The call."""
        return self.path, self.number


class Units:
    """A backbone found to be a chain of units, with what is needed to cost any group of them.

    Args:
        model: the backbone.
        sample: a batch.
        prediction: takes the prediction from what the network returns.
        given: the children of ``model`` are the units, and nothing else is looked for.
        carry: also cut between the members of lists of blocks where other tensors cross beside the features.

    Raises:
        ValueError: the network does not run on the sample.
    """

    def __init__(
        self,
        model: nn.Module,
        sample: Batch,
        prediction: Callable[[Any], Tensor],
        *,
        given: bool = False,
        carry: bool = False,
    ) -> None:
        self.model, self.sample, self.carry = model, sample, carry
        self.seen: Observation = observe(model, sample, prediction)
        self._operations = self.seen.operations
        # A module that returns what it was given hands a leaf to its caller, who may still hold the tensor itself.
        self._candidates = _candidates(self.seen, again=given)
        self._valid = _cut_points(self.seen, self._candidates)
        if carry:
            self._valid = _with_carried(self.seen, self._candidates, self._valid, model)
        self.cuts = self._given() if given else self._find_cuts()
        self.embedding = self.cuts[0] if self.cuts else None  # stays, wherever else it is cut
        self.output_shape: torch.Size = self.seen.prediction.shape

    # --- where ---

    def _given(self) -> list[Point]:
        children = [name for name, _ in self.model.named_children()]
        found = []
        for name in children[:-1]:
            point = next((p for p in self._valid if name in p.names), None)
            if point is None:
                raise ValueError(
                    f"model: module {name!r} of the list cannot end a local module: {self._why_not(name)}; its output "
                    "must be one floating-point tensor with a gradient, through which alone everything before it "
                    "reaches the loss, and which the next module does not change in place"
                )
            found.append(point)
        return found

    def _heavy(self, first: int, last: int) -> int:
        return sum(op.heavy for op in self._operations[first:last])

    def _weights(self, first: int, last: int) -> bool:
        return any(op.parameters for op in self._operations[first:last])

    def _find_cuts(self) -> list[Point]:
        cuts: list[Point] = []
        for i, point in enumerate(self._valid):
            following = self._valid[i + 1] if i + 1 < len(self._valid) else None
            # Move late: what follows without a matrix product (norm, activation, pool) stays with what made the tensor.
            if following is not None and not self._heavy(point.end, following.end):
                continue
            if self._weights(cuts[-1].end if cuts else 0, point.end):
                cuts.append(point)
        while cuts and self._heavy(cuts[-1].end, len(self._operations)) <= 1:  # the head stays with the last unit
            cuts.pop()
        return cuts

    def cut_after(self, names: Sequence[str]) -> None:
        """Cut after the named submodules, or units as :meth:`describe` names them, and nowhere else.

        Raises:
            ValueError: a name is unknown, or no cut is possible there.
        """
        called = {call.path for call in self.seen.calls}
        told = self._names()[:-1]
        units = {name: cut for name, cut in zip(told, self.cuts, strict=True) if told.count(name) == 1}
        possible = ", ".join(told) or "none"
        cuts: list[Point] = []
        for name in names:
            if name not in called and name in units:
                cuts.append(units[name])
                continue
            if name not in called:
                close = difflib.get_close_matches(name, called, n=1)
                hint = f"did you mean {close[0]!r}" if close else f"the model has cut points after: {possible}"
                raise ValueError(f"cuts: the model runs no submodule named {name!r}; {hint}")
            here = [p for p in self._valid if name in p.names]
            if self.carry and not here:
                here = [p for p in self._candidates if name in p.names]
            if not here:
                raise ValueError(
                    f"cuts: no cut is possible after {name!r}, since {self._why_not(name)}; possible cut points are "
                    f"after: {possible}"
                )
            if len(here) > 1:
                raise ValueError(
                    f"cuts: {name!r} runs {len(here)} times in one forward, and a cut is possible after each; cut "
                    "after a submodule that runs once"
                )
            cuts.append(here[0])
        if any(a.end >= b.end for a, b in itertools.pairwise(cuts)):
            raise ValueError(f"cuts: {list(names)} must be different places in the order in which the model runs them")
        self.cuts = cuts

    def _why_not(self, name: str) -> str:
        """Why there is no cut point after a submodule: the true cause, in a clause."""
        seen = self.seen
        calls = [c for c in seen.calls if c.path == name]
        if not calls:
            return f"{name!r} is not called by the forward"
        last = calls[-1]
        if last.hidden:
            return "it runs inside of a checkpoint, which would run it again in backward"
        made = [
            c
            for c in seen.calls
            if c.end <= last.first and not set(v for _, v in c.values).isdisjoint(v for _, v in last.values)
        ]
        if made:
            return f"it returns what it was given, made by {made[0].path!r}; cut there"
        if not last.values:
            return "nothing that it returns carries a gradient"
        root = getattr(seen.prediction, "grad_fn", None)
        if any(node is root for _, (node, _) in last.values):
            return "it returns the prediction itself, and nothing comes after"
        own = {value for _, value in last.values}
        alive = seen.alive(last.end)
        others = [crossing for crossing in alive if crossing.value not in own]
        if len(alive) > len(others) and others:
            other = others[0]
            maker = seen.place(other.made) or type(self.model).__name__
            user = seen.place(other.used) or type(self.model).__name__
            return (
                f"a second tensor that carries a gradient crosses there: made in {maker!r}, used next in {user!r} "
                '(carry="collect" hands its gradient back at the end of the step)'
            )
        if not alive or len(alive) == len(others):
            return "what it returns does not reach the loss by itself, but mixed with other tensors"
        if len(alive) > 1:
            return "it returns several tensors that carry gradients and are used later"
        if any(last.overwritten(i) for i in range(len(last.values))):
            return "the next operation works in place on what it returns"
        return "what it returns does not depend on the batch"

    def explain(self, wanted: int) -> str:
        """Why there are no more units, as the end of a sentence."""
        if self.carry or len(self.cuts) + 1 >= wanted:
            return ""
        crossing: dict[str, int] = {}
        for point in _with_carried(self.seen, self._candidates, [], self.model):
            others = [c for c in self.seen.alive(point.moment) if c.value != point.value]
            if len(others) == 1:
                maker = self.seen.place(others[0].made)
                if maker and not any(name == maker or name.startswith(f"{maker}.") for name in point.names):
                    crossing[maker] = crossing.get(maker, 0) + 1
        often = max(crossing, key=crossing.__getitem__, default="")
        if often and crossing[often] > 1:
            return (
                f", since what {often!r} returns is used beside the features by {crossing[often]} later submodules "
                '(carry="collect" cuts there all the same, and hands its gradient back at the end of the step)'
            )
        return ""

    # --- names ---

    def _spans(self) -> list[tuple[int, int]]:
        """The operations of every unit."""
        starts = [0, *(cut.end for cut in self.cuts)]
        return list(zip(starts, [*starts[1:], len(self._operations)], strict=True))

    def _paths(self, first: int, last: int) -> list[str]:
        """The submodules whose parameters are read by some operations."""
        operations = self._operations[first:last]
        paths = [op.path or op.parameters[0] for op in operations if op.parameters]
        return paths or [op.path for op in operations if op.path] or [type(self.model).__name__]

    def _ends(self, first: int, last: int) -> tuple[str, str]:
        paths = self._paths(first, last)
        return paths[0], paths[-1]

    def modules(self) -> list[list[str]]:
        """For every unit the outermost modules that run in it alone and read parameters."""
        operations, spans = self._operations, self._spans()
        reads = list(itertools.accumulate((bool(op.parameters) for op in operations), initial=0))
        extents: dict[str, tuple[int, int]] = {}
        for call in self.seen.calls:
            first, last = extents.get(call.path, (call.first, call.last))
            extents[call.path] = min(first, call.first), max(last, call.last)
        starts = [first for first, _ in spans]
        found: list[list[str]] = [[] for _ in spans]
        outer: set[str] = set()
        for path, (first, last) in sorted(extents.items(), key=lambda item: (item[0].count("."), item[1])):
            unit = bisect.bisect_right(starts, first) - 1
            parts = path.split(".")
            if last > spans[unit][1] or reads[last] == reads[first]:
                continue
            if not any(".".join(parts[:i]) in outer for i in range(1, len(parts))):
                outer.add(path)
                found[unit].append(path)
        return found

    def _names(self) -> list[str]:
        common = []
        for span, own in zip(self._spans(), self.modules(), strict=True):
            parts = [path.split(".") for path in self._paths(*span)]
            same = ".".join(level[0] for level in zip(*parts, strict=False) if len(set(level)) == 1)
            common.append(own[0] if len(own) == 1 and f"{same}.".startswith(f"{own[0]}.") else same)
        spans = self._spans()
        return [c if c and common.count(c) == 1 else _span(*self._ends(*s)) for c, s in zip(common, spans, strict=True)]

    # --- costs ---

    def activation_bytes(self, first: int, last: int) -> int:
        """Bytes that units ``first`` to ``last - 1`` keep for backward, shared storages counted once."""
        spans = self._spans()[first:last]
        kept: dict[int, int] = {}
        for operation in self._operations[spans[0][0] : spans[-1][1]]:
            kept.update(operation.saved)
        return sum(kept.values())

    def boundary(self, unit: int) -> Tensor:
        """What unit ``unit`` hands on: a tensor without memory."""
        tensor = self.seen.prediction if unit == len(self.cuts) else self.cuts[unit].features
        return tensor if isinstance(tensor, FakeTensor) else self.seen.mode.from_tensor(tensor.detach())

    def parameters(self) -> list[list[str]]:
        """For every unit the names of the parameters that it reads."""
        return [
            list(dict.fromkeys(name for op in self._operations[a:b] for name in op.parameters))
            for a, b in self._spans()
        ]

    def buffers(self) -> list[list[str]]:
        """For every unit the names of the buffers that it reads."""
        return [
            list(dict.fromkeys(name for op in self._operations[a:b] for name in op.buffers)) for a, b in self._spans()
        ]

    def kinds(self) -> list[int]:
        """For every unit a number that is the same for those of the same build."""
        numbers: dict[Any, int] = {}
        return [
            numbers.setdefault(tuple(op.kind for op in self._operations[a:b]), len(numbers)) for a, b in self._spans()
        ]

    def describe(self) -> tuple[Unit, ...]:
        """The units with their costs."""
        sizes = {name: p.numel() for name, p in self.model.named_parameters()}
        counted: set[str] = set()
        units = []
        for i, (name, (first, last), read) in enumerate(
            zip(self._names(), self._spans(), self.parameters(), strict=True)
        ):
            cut = self.cuts[i] if i < len(self.cuts) else None
            units.append(
                Unit(
                    name=name,
                    output_shape=cut.shape if cut else self.output_shape,
                    channel_dim=_channel_dim(self.seen, cut) if cut else 1,
                    activation_bytes=self.activation_bytes(i, i + 1),
                    flops=sum(op.flops for op in self._operations[first:last]),
                    num_parameters=sum(sizes[n] for n in read if n not in counted),
                )
            )
            counted.update(read)
        return tuple(units)


def _candidates(seen: Observation, *, again: bool) -> list[Point]:
    """The outputs of module calls that reach the prediction, in order; ``again``: also where one returns its input."""
    root = getattr(seen.prediction, "grad_fn", None)
    found: dict[Any, list[tuple[Call, Point]]] = defaultdict(list)  # by value; calls inside of each other count once
    for call in seen.calls:
        if call.hidden or ".parametrizations." in f".{call.path}.":
            continue
        for i, (place, value) in enumerate(call.values):
            if value not in seen.spans or value[0] is root or not call.fed[i] or call.overwritten(i):
                continue
            inner = [point for other, point in found[value] if _is_inside(other, call)]
            if found[value] and not inner and not again:
                continue
            found[value] = [(other, point) for other, point in found[value] if not _is_inside(other, call)]
            point = Point(
                path=call.path,
                number=call.number,
                place=place,
                names=(*(name for other in inner for name in other.names), call.path),
                end=call.last,
                moment=call.end,
                shape=call.tensors[i].shape,
                features=call.tensors[i],
                value=value,
            )
            found[value].append((call, point))
    return sorted((point for points in found.values() for _, point in points), key=lambda p: (p.end, p.moment))


def _is_inside(inner: Call, outer: Call) -> bool:
    """Whether a call was made inside of another."""
    parent = inner.parent
    while parent is not None and parent is not outer:
        parent = parent.parent
    return parent is outer


def _cut_points(seen: Observation, candidates: Sequence[Point]) -> list[Point]:
    """The candidates through which alone everything before them reaches the prediction."""
    spans = sorted(((made, max(uses), value) for value, (made, uses) in seen.spans.items()), key=lambda s: s[0])
    alive: dict[Any, int] = {}
    ends: list[tuple[int, int, Any]] = []
    found, position = [], 0
    for point in candidates:
        while position < len(spans) and spans[position][0] < point.moment:
            _, last, value = spans[position]
            alive[value] = last
            heapq.heappush(ends, (last, position, value))
            position += 1
        while ends and ends[0][0] < point.moment:
            del alive[heapq.heappop(ends)[2]]
        if len(alive) == 1 and point.value in alive:
            found.append(point)
    return found


def _with_carried(
    seen: Observation, candidates: Sequence[Point], valid: Sequence[Point], model: nn.Module
) -> list[Point]:
    """The cut points, and the outputs of the members of lists of like blocks, beside which other tensors cross."""
    members = {
        f"{path}.{name}" if path else name
        for path, module in model.named_modules()
        if isinstance(module, (nn.ModuleList, nn.Sequential))
        and len(module) > 1
        and len({type(m) for m in module}) == 1
        for name, _ in module.named_children()
    }
    known = {point.key for point in valid}
    more = [p for p in candidates if p.key not in known and any(name in members for name in p.names)]
    first: dict[Any, Point] = {}
    for point in more:  # of several tensors that one call returns the first are the features
        if point.key not in first or point.place < first[point.key].place:
            first[point.key] = point
    return sorted([*valid, *first.values()], key=lambda p: (p.end, p.moment))


_CHANNELS_FIRST = (
    nn.modules.conv._ConvNd, nn.BatchNorm1d, nn.BatchNorm2d, nn.BatchNorm3d, nn.GroupNorm,
    nn.InstanceNorm1d, nn.InstanceNorm2d, nn.InstanceNorm3d,
)  # fmt: skip


def _channel_dim(seen: Observation, cut: Point) -> int:
    """Which dimension of a boundary tensor holds the channels, told by the first layer that reads it."""
    shape = cut.shape
    if len(shape) < 3:
        return 1
    storage = cut.features.untyped_storage()._cdata
    after = sorted((c for c in seen.calls if c.first >= cut.end), key=lambda c: (c.first, c.depth))
    readers = [c for c in after if (storage, shape) in c.inputs]
    for call in [*readers, *after]:
        module: Any = call.module
        if isinstance(module, _CHANNELS_FIRST):
            return 1
        width = None
        if isinstance(module, nn.LayerNorm):
            width = module.normalized_shape[-1]
        elif isinstance(module, nn.Linear):
            width = module.in_features
        elif isinstance(module, nn.MultiheadAttention):
            width = module.embed_dim
        if width is not None and type(module) not in (nn.LayerNorm, nn.Linear) and width == shape[1] != shape[-1]:
            return 1  # a LayerNorm over channels that come first
        if width == shape[-1]:
            return -1
    return -1 if len(shape) == 3 else 1


def balance(
    num_units: int,
    num_groups: int,
    cost: Callable[[int, int], float],
    *,
    squared: Callable[[int, int], float] | None = None,
) -> list[range]:
    """Group units into consecutive groups so that the largest cost is smallest (exact dynamic programme).

    Among the groupings with the smallest largest cost, the one with the smallest sum of squares is taken.

    Args:
        num_units: number of units.
        num_groups: number of groups K, at most ``num_units``.
        cost: cost of the group of units ``first`` to ``last - 1``.
        squared: what of a group is squared; None: its cost.

    Returns:
        One range of unit indices per group.
    """
    assert 1 <= num_groups <= num_units
    if num_groups == num_units:
        return [range(i, i + 1) for i in range(num_units)]
    longest = num_units - num_groups + 1
    spans = [
        (first, last) for first in range(num_units) for last in range(first + 1, min(num_units, first + longest) + 1)
    ]
    table = {span: float(cost(*span)) for span in spans}
    squares = {span: (table[span] if squared is None else float(squared(*span))) ** 2 for span in spans}
    infinite = float("inf")

    def solve(
        prices: dict[tuple[int, int], float], combine: Callable[[float, float], float], limit: float
    ) -> tuple[float, list[int]]:
        best = [0.0] + [infinite] * num_units  # best[i]: the first i units in the groups so far
        choices: list[list[int]] = []
        for _ in range(num_groups):
            following, choice = [infinite] * (num_units + 1), [0] * (num_units + 1)
            for last in range(1, num_units + 1):
                for first in range(max(0, last - longest), last):
                    if best[first] == infinite or table[first, last] > limit:
                        continue
                    total = combine(best[first], prices[first, last])
                    if total < following[last]:
                        following[last], choice[last] = total, first
            best = following
            choices.append(choice)
        ends = [num_units]
        for choice in reversed(choices):
            ends.append(choice[ends[-1]])
        return best[num_units], ends[::-1]

    largest, _ = solve(table, max, infinite)
    _, ends = solve(squares, operator.add, largest)
    return [range(a, b) for a, b in itertools.pairwise(ends)]
