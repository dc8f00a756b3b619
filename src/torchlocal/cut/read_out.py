"""The read-out of a network: the matrix from features to classes or tokens, where it is the last that is applied."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from .observe import Observation

__all__ = ["ReadOut", "find_read_out"]

# Nodes of the autograd graph that hand on the same numbers, in another shape or precision.
_PASSING = ("ViewBackward", "UnsafeViewBackward", "ReshapeAliasBackward", "AliasBackward", "ToCopyBackward")
_TURNING = ("TBackward", "TransposeBackward", "PermuteBackward", "ToCopyBackward")
_PRODUCTS = ("MmBackward", "AddmmBackward", "LinearBackward")


@dataclass(frozen=True, kw_only=True)
class ReadOut:
    """A linear layer whose output is the network's prediction.

    Attributes:
        weight: name of the parameter (V, C) in the network; tied, its first name.
        bias: name of the parameter (V,), if there is one.
    """

    weight: str
    bias: str | None = None


def find_read_out(seen: Observation) -> ReadOut | str:
    """The read-out of a network that was watched, or why it has none, as a clause."""
    node = getattr(seen.prediction, "grad_fn", None)
    while node is not None and _is(node, _PASSING):
        node = node.next_functions[0][0]
    if node is None or not _is(node, _PRODUCTS):
        made = seen.place(seen.prediction.grad_fn._sequence_nr()) if node is not None else ""
        last = type(node).__name__.rstrip("0123456789").removesuffix("Backward") if node is not None else "nothing"
        where = f" in {made!r}" if made else ""
        return f"the last operation of its forward is no matrix product but {last}{where}"
    inputs = [_source(following) for following, _ in node.next_functions if following is not None]
    names = [seen.names[id(leaf)] for leaf in inputs if leaf is not None and id(leaf) in seen.names]
    shapes = {seen.names[id(leaf)]: leaf.shape for leaf in inputs if leaf is not None and id(leaf) in seen.names}
    matrices = [name for name in names if len(shapes[name]) == 2]
    if len(matrices) != 1 or shapes[matrices[0]][0] != seen.prediction.shape[-1]:
        return "the matrix of its last product is no parameter by itself"
    biases = [name for name in names if len(shapes[name]) == 1]
    return ReadOut(weight=matrices[0], bias=biases[0] if biases else None)


def _source(node: Any) -> Any:
    """The parameter that a node hands on, turned at most."""
    while _is(node, _TURNING):
        node = node.next_functions[0][0]
        if node is None:
            return None
    return node.variable if type(node).__name__ == "AccumulateGrad" else None


def _is(node: Any, kinds: tuple[str, ...]) -> bool:
    return type(node).__name__.rstrip("0123456789") in kinds
