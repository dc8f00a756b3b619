"""Where to cut: the units of a backbone, what each costs, and their balanced grouping into K local modules."""

from __future__ import annotations

import difflib
import itertools
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, fx, nn

from .graph import Chain, Observation, module_paths, observe, read_tensors, trace


@dataclass(frozen=True, kw_only=True)
class Unit:
    """The smallest piece that a backbone can be cut into.

    Attributes:
        name: qualified name of the submodule it is, or ``first…last`` of those that it spans.
        output_shape: shape of the tensor that it hands on, batch included.
        channel_dim: which dimension of that tensor holds the channels, 1 or -1.
        activation_bytes: bytes that one forward pass of the sample keeps for backward in this unit.
        flops: floating-point operations of one forward pass of the sample (matrix products and convolutions).
        num_parameters: number of parameters.
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


class Units:
    """A backbone found to be a chain of units, with what is needed to cost any group of them.

    Args:
        model: the backbone.
        sample: an input batch (N, ...); only its shape, dtype and device are used.
        given: the children of ``model`` are the units, and nothing else is looked for.

    Raises:
        ValueError: the model cannot be traced, or does not run on the sample.
    """

    def __init__(self, model: nn.Module, sample: Tensor, *, given: bool = False) -> None:
        self.model = model
        opaque = frozenset(name for name, _ in model.named_children()) if given else frozenset()
        self._trace = trace(model, opaque=opaque)
        self._seen = observe(model, self._trace, sample)
        self._nodes = self._trace.nodes
        self._valid = [i for i, node in enumerate(self._seen.crossing[:-1]) if node is not None]
        self._weights = [len(_parameters(model, node)) for node in self._nodes]
        self._heavy = [f > 0 or _has_matrix(model, n) for f, n in zip(self._seen.flops, self._nodes, strict=True)]
        if given:
            self._check_given()
        self.cuts = self._valid if given else self._find_cuts()
        self.mode = self._seen.mode
        self.output_shape: torch.Size = self._seen.output.shape

    def _check_given(self) -> None:
        missing = [n for i, n in enumerate(self._nodes[:-1]) if i not in self._valid]
        if missing:
            raise ValueError(
                f"model: module {str(missing[0].target)!r} of the list cannot end a local module: its output must be "
                "one floating-point tensor with a gradient, which the next module does not change in place, and no two "
                "modules may share parameters"
            )

    def _find_cuts(self) -> list[int]:
        cuts: list[int] = []
        for cut, following in zip(self._valid, [*self._valid[1:], None], strict=True):
            # Move late: what follows without a matrix product (norm, activation, pool) stays with what made the tensor.
            if following is not None and not any(self._heavy[cut + 1 : following + 1]):
                continue
            start = cuts[-1] + 1 if cuts else 0
            if any(self._weights[start : cut + 1]):
                cuts.append(cut)
        while cuts and sum(self._heavy[cuts[-1] + 1 :]) <= 1:  # the head stays with the last unit
            cuts.pop()
        return cuts

    def cut_after(self, names: Sequence[str]) -> None:
        """Cut after the named submodules and nowhere else.

        Raises:
            ValueError: a name is unknown, or no cut is possible there.
        """
        ends: dict[str, int] = {}
        for i, node in enumerate(self._nodes):
            for path in [*module_paths(node), str(node.target) if node.op == "call_module" else ""]:
                if path:
                    ends[path] = i
        possible = [_span(*self._ends(a, b)) for a, b in self._spans()][:-1]
        cuts: list[int] = []
        for name in names:
            if name not in ends:
                close = difflib.get_close_matches(name, ends, n=1)
                hint = (
                    f"did you mean {close[0]!r}" if close else f"the model has cut points after: {', '.join(possible)}"
                )
                raise ValueError(f"cuts: the model runs no submodule named {name!r}; {hint}")
            end = ends[name]
            late = [v for v in self._valid if v >= end and not any(self._heavy[end + 1 : v + 1])]
            if not late:
                raise ValueError(
                    f"cuts: no cut is possible after {name!r}, since more than one tensor crosses there or the next "
                    f"operation works in place; possible cut points are after: {', '.join(possible)}"
                )
            cuts.append(end if end in late else late[0])
        if any(a >= b for a, b in itertools.pairwise(cuts)):
            raise ValueError(f"cuts: {list(names)} must be different places in the order in which the model runs them")
        self.cuts = cuts

    def _spans(self) -> list[tuple[int, int]]:
        starts = [0, *(cut + 1 for cut in self.cuts)]
        return list(zip(starts, [*starts[1:], len(self._nodes)], strict=True))

    def _paths(self, begin: int, end: int) -> list[str]:
        """The submodules with parameters that run between two nodes."""
        pairs = zip(self._nodes[begin:end], self._weights[begin:end], strict=True)
        paths = [str(n.target) if n.op == "call_module" else ["", *module_paths(n)][-1] for n, w in pairs if w]
        return [p for p in paths if p] or [self._nodes[begin].name]

    def _ends(self, begin: int, end: int) -> tuple[str, str]:
        paths = self._paths(begin, end)
        return paths[0], paths[-1]

    def _names(self) -> list[str]:
        common = []
        for span in self._spans():
            parts = [path.split(".") for path in self._paths(*span)]
            same = [level[0] for level in zip(*parts, strict=False) if len(set(level)) == 1]
            common.append(".".join(same))
        spans = self._spans()
        return [c if c and common.count(c) == 1 else _span(*self._ends(*s)) for c, s in zip(common, spans, strict=True)]

    def activation_bytes(self, first: int, last: int) -> int:
        """Bytes that units ``first`` to ``last - 1`` keep for backward, shared storages counted once."""
        spans = self._spans()[first:last]
        kept: dict[int, int] = {}
        for saved in self._seen.saved[spans[0][0] : spans[-1][1]]:
            kept.update(saved)
        return sum(kept.values())

    def boundary(self, unit: int) -> Tensor:
        """The fake tensor that unit ``unit`` hands on."""
        if unit == len(self.cuts):
            return self._seen.output
        node = self._seen.crossing[self.cuts[unit]]
        assert node is not None
        return self._seen.values[node]

    def describe(self) -> tuple[Unit, ...]:
        """The units with their costs."""
        units = []
        for i, (name, (begin, end)) in enumerate(zip(self._names(), self._spans(), strict=True)):
            node = self._seen.crossing[self.cuts[i]] if i < len(self.cuts) else None
            parameters = {id(p): p for n in self._nodes[begin:end] for p in _parameters(self.model, n)}
            units.append(
                Unit(
                    name=name,
                    output_shape=self.boundary(i).shape,
                    channel_dim=_channel_dim(self.model, node, self._seen) if node is not None else 1,
                    activation_bytes=self.activation_bytes(i, i + 1),
                    flops=sum(self._seen.flops[begin:end]),
                    num_parameters=sum(p.numel() for p in parameters.values()),
                )
            )
        return tuple(units)

    def chain(self) -> Chain:
        """The units as something that runs."""
        mutated = [[pair for m in self._seen.mutated[begin:end] for pair in m] for begin, end in self._spans()]
        return Chain(self.model, self._trace, self.cuts, mutated, self._seen)


def _parameters(model: nn.Module, node: fx.Node) -> list[nn.Parameter]:
    return [t for t in read_tensors(model, node) if isinstance(t, nn.Parameter)]


def _has_matrix(model: nn.Module, node: fx.Node) -> bool:
    """Whether ``node`` is a module with a weight matrix (an embedding or a recurrent layer counts no FLOPs)."""
    if node.op != "call_module":
        return False
    module = model.get_submodule(str(node.target))
    return not isinstance(module, nn.LayerNorm) and any(p.ndim >= 2 and min(p.shape) > 1 for p in module.parameters())


_CHANNELS_FIRST = (
    nn.modules.conv._ConvNd, nn.BatchNorm1d, nn.BatchNorm2d, nn.BatchNorm3d, nn.GroupNorm,
    nn.InstanceNorm1d, nn.InstanceNorm2d, nn.InstanceNorm3d,
)  # fmt: skip


def _channel_dim(model: nn.Module, node: fx.Node, seen: Observation) -> int:
    """Which dimension of a boundary tensor holds the channels, told by the first layer that reads it."""
    shape = seen.values[node].shape
    if len(shape) < 3:
        return 1
    queue, visited = list(node.users), set()
    while queue:
        user = queue.pop(0)
        if user in visited:
            continue
        visited.add(user)
        if user.op == "call_module":
            module = model.get_submodule(str(user.target))
            if isinstance(module, _CHANNELS_FIRST):
                return 1
            width = module.normalized_shape[-1] if isinstance(module, nn.LayerNorm) else None
            width = module.in_features if isinstance(module, nn.Linear) else width
            if isinstance(module, nn.MultiheadAttention):
                width = module.embed_dim
            if width is not None and type(module) not in (nn.LayerNorm, nn.Linear) and width == shape[1]:
                return 1  # a LayerNorm over channels that come first
            if width is not None:
                return -1
        if user.target in ("permute", torch.permute, "transpose", torch.transpose):
            continue
        queue += list(user.users)
    return -1 if len(shape) == 3 else 1


def balance(num_units: int, num_groups: int, cost: Callable[[int, int], float]) -> list[range]:
    """Group units into consecutive groups so that the largest cost is smallest (exact dynamic programme).

    Among the groupings with the smallest largest cost, the one with the smallest sum of squares is taken.

    Args:
        num_units: number of units.
        num_groups: number of groups K, at most ``num_units``.
        cost: cost of the group of units ``first`` to ``last - 1``.

    Returns:
        One range of unit indices per group.
    """
    assert 1 <= num_groups <= num_units
    if num_groups == num_units:
        return [range(i, i + 1) for i in range(num_units)]
    longest = num_units - num_groups + 1
    table = {
        (first, last): float(cost(first, last))
        for first in range(num_units)
        for last in range(first + 1, min(num_units, first + longest) + 1)
    }
    infinite = float("inf")

    def solve(combine: Callable[[float, float], float], limit: float) -> tuple[float, list[int]]:
        best = [0.0] + [infinite] * num_units  # best[i]: the first i units in the groups so far
        choices: list[list[int]] = []
        for _ in range(num_groups):
            following, choice = [infinite] * (num_units + 1), [0] * (num_units + 1)
            for last in range(1, num_units + 1):
                for first in range(max(0, last - longest), last):
                    price = table[first, last]
                    if best[first] == infinite or price > limit:
                        continue
                    total = combine(best[first], price)
                    if total < following[last]:
                        following[last], choice[last] = total, first
            best = following
            choices.append(choice)
        ends = [num_units]
        for choice in reversed(choices):
            ends.append(choice[ends[-1]])
        return best[num_units], ends[::-1]

    largest, _ = solve(max, infinite)
    _, ends = solve(lambda total, price: total + price * price, largest)
    return [range(a, b) for a, b in itertools.pairwise(ends)]
