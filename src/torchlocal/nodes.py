"""The inside of a unit as a chain of its own, so that parts of a unit can be recomputed."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

from torch import Tensor, fx

from .graph import read_tensors

if TYPE_CHECKING:
    from .graph import Chain

__all__ = ["NodeStages"]

_MOST_STAGES = 32  # the search takes the cube of it


class NodeStages:
    """The nodes of one unit as a chain whose states are all the values that are still needed.

    No state is taken where a value would be a tuple, or where a parameter or buffer is used on both sides.

    Args:
        chain: the chain of units.
        nodes: the unit's.
        entry: the node of its input.
        result: the node of its output.
        identities: of all nodes.
        mutated: the buffers that it writes.
    """

    def __init__(
        self,
        chain: Chain,
        nodes: Sequence[fx.Node],
        entry: fx.Node,
        result: fx.Node,
        identities: dict[fx.Node, Any],
        mutated: list[tuple[str, str]],
    ) -> None:
        self._chain, self._nodes, self._mutated, self._entry = chain, list(nodes), mutated, entry
        self._pieces: dict[tuple[int, int], fx.GraphModule] = {}
        of = {identities.get(node): node for node in [entry, *nodes]}
        self._written = [{of[w] for w in chain.written.get(identities[n], ()) if w in of} for n in nodes]
        tensors = [{id(t) for t in read_tensors(chain.backbone, node)} for node in nodes]
        self._points, self._live = [0], [[entry]]
        for point in range(1, len(nodes)):
            later = nodes[point:]
            live = [n for n in [entry, *nodes[:point]] if n is result or any(user in later for user in n.users)]
            shared = set().union(*tensors[:point]) & set().union(*tensors[point:])
            together = any(len(written & set(live)) > 1 for written in self._written[point:])
            if not shared and not together and not any(identities.get(n) in chain.composite for n in live):
                self._points.append(point)
                self._live.append(live)
        window = -(-len(self._points) // _MOST_STAGES)
        if window > 1:  # of neighbours the state with the fewest values
            kept = [0]
            for start in range(1, len(self._points), window):
                choices = range(start, min(start + window, len(self._points)))
                kept.append(min(choices, key=lambda i: len(self._live[i])))
            self._points, self._live = [self._points[i] for i in kept], [self._live[i] for i in kept]
        self._points.append(len(nodes))
        self._live.append([result])

    @property
    def num_stages(self) -> int:
        """Number of stages."""
        return len(self._points) - 1

    def kind(self) -> tuple[str, ...]:
        """What tells units of different build apart: their operations, by type and settings."""
        return tuple(
            str(self._chain.backbone.get_submodule(str(n.target))) if n.op == "call_module" else f"{n.target}{n.kwargs}"
            for n in self._nodes
        )

    def run(self, first: int, last: int, state: list[Any]) -> tuple[Any, ...]:
        """Run stages ``first`` to ``last - 1``; ``state`` is taken out of its list."""
        result: tuple[Any, ...] = self._piece(first, last)(state)
        return result

    def buffers(self, first: int, last: int) -> list[tuple[dict[str, Tensor | None], str]]:
        """The buffers that these stages write: where each is looked up."""
        piece = self._piece(first, last)
        present = {name for name, _ in piece.named_buffers(remove_duplicate=False)}
        return [
            (piece.get_submodule(owner)._buffers, leaf)
            for owner, leaf in self._mutated
            if (f"{owner}.{leaf}" if owner else leaf) in present
        ]

    def entry_index(self, stage: int) -> int | None:
        """Where the unit's input is in the state before a stage."""
        live = self._live[stage]
        return live.index(self._entry) if self._entry in live else None

    def inside(self, stage: int) -> NodeStages:
        """A stage of nodes is not a chain itself."""
        raise AssertionError(stage)

    def _piece(self, first: int, last: int) -> fx.GraphModule:
        if (first, last) not in self._pieces:
            nodes = self._nodes[self._points[first] : self._points[last]]
            inputs = self._live[first]
            written = set().union(*self._written[self._points[first] : self._points[last]])
            module = self._chain.build(nodes, inputs, tuple(self._live[last]), written)
            self._pieces[first, last] = module
        return self._pieces[first, last]
