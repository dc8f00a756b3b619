"""The read-out of a network: the matrix from features to classes or tokens, where it is the last that is applied."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from torch import nn

from .observe import Key, Observation

__all__ = ["ReadOut", "find_read_out", "layer_of"]

# Nodes of the autograd graph that hand on the same numbers, in another shape or precision.
_PASSING = ("ViewBackward", "UnsafeViewBackward", "ReshapeAliasBackward", "AliasBackward", "ToCopyBackward")
_TURNING = ("TBackward", "TransposeBackward", "PermuteBackward", "ToCopyBackward")
_PRODUCTS = ("MmBackward", "AddmmBackward", "LinearBackward")


_HOOKS = ("_forward_hooks", "_forward_pre_hooks", "_backward_hooks", "_backward_pre_hooks")


@dataclass(frozen=True, kw_only=True)
class ReadOut:
    """A linear layer whose output is the network's prediction.

    Attributes:
        weight: name of the parameter (V, C) in the network; tied, its first name.
        bias: name of the parameter (V,), if there is one.
        call: the innermost call of a module that it was applied in.
    """

    weight: str
    bias: str | None
    call: Key


def find_read_out(seen: Observation) -> ReadOut | str:
    """The read-out of a network that was watched, or why it has none, as a clause."""
    node = getattr(seen.prediction, "grad_fn", None)
    while node is not None and _is(node, _PASSING):
        node = node.next_functions[0][0]
    node, added = _without_bias(seen, node)
    if node is None or not _is(node, _PRODUCTS):
        made = seen.place(seen.prediction.grad_fn._sequence_nr()) if node is not None else ""
        last = type(node).__name__.rstrip("0123456789").removesuffix("Backward") if node is not None else "nothing"
        where = f" in {made!r}" if made else ""
        return f"the last operation of its forward is no matrix product but {last}{where}"
    inputs = [_source(following) for following, _ in (*node.next_functions, *added) if following is not None]
    names = [seen.names[id(leaf)] for leaf in inputs if leaf is not None and id(leaf) in seen.names]
    shapes = {seen.names[id(leaf)]: leaf.shape for leaf in inputs if leaf is not None and id(leaf) in seen.names}
    matrices = [name for name in names if len(shapes[name]) == 2]
    if len(matrices) != 1 or shapes[matrices[0]][0] != seen.prediction.shape[-1]:
        return "the matrix of its last product is no parameter by itself"
    biases = [name for name in names if len(shapes[name]) == 1]
    call = seen.innermost(node._sequence_nr())
    return ReadOut(
        weight=matrices[0], bias=biases[0] if biases else None, call=call.key if call is not None else ("", 1)
    )


def _without_bias(seen: Observation, node: Any) -> tuple[Any, tuple[Any, ...]]:
    """The product that a layer adds its bias to by itself, since its input has gaps, and what hands the bias on."""
    if node is None or not _is(node, ("AddBackward",)) or node._saved_alpha != 1:
        return node, ()
    (product, _), added = node.next_functions
    while product is not None and _is(product, _PASSING):
        product = product.next_functions[0][0]
    bias = _source(added[0]) if added[0] is not None else None
    if product is None or not _is(product, _PRODUCTS) or bias is None or bias.shape != seen.prediction.shape[-1:]:
        return node, ()
    calls = [seen.innermost(one._sequence_nr()) for one in (node, product)]
    return (product, (added,)) if calls[0] is calls[1] else (node, ())


def layer_of(model: nn.Module, read_out: ReadOut | str) -> nn.Linear:
    """The layer that a network's read-out is, where the network calls it and nothing else is done in that call.

    Raises:
        ValueError: there is no such layer.
    """
    if isinstance(read_out, str):
        reason = read_out
    else:
        path, _ = read_out.call
        layer = model.get_submodule(path)
        kind = f"no nn.Linear but {type(layer).__name__}"
        if type(layer) is nn.Linear:
            hooks, own = any(getattr(layer, name, None) for name in _HOOKS), "forward" in vars(layer)
            if layer.weight is model.get_parameter(read_out.weight) and not hooks and not own:
                return layer
            kind = "an nn.Linear with " + ("hooks" if hooks else "a forward of its own" if own else "another matrix")
        reason = f"{read_out.weight!r} is applied in {path or type(model).__name__!r}, which is {kind}"
    raise ValueError(
        f"criterion: scores='chunked' needs a network that ends in a call of an nn.Linear, and {type(model).__name__} "
        f"does not: {reason}; give scores='whole'"
    )


def _source(node: Any) -> Any:
    """The parameter that a node hands on, turned at most."""
    while _is(node, _TURNING):
        node = node.next_functions[0][0]
        if node is None:
            return None
    return node.variable if type(node).__name__ == "AccumulateGrad" else None


def _is(node: Any, kinds: tuple[str, ...]) -> bool:
    return type(node).__name__.rstrip("0123456789") in kinds
