"""Tensors that cross a cut beside the features: one leaf for all later modules, whose gradient is handed back."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.overrides import TorchFunctionMode
from torch.utils._pytree import tree_map_only

from .observe import clock

__all__ = ["Carried"]


class Carried(TorchFunctionMode):
    """Has every operation after a cut take leaves in place of tensors with a graph from before the cut.

    The gradients that gather in the leaves go back into the graphs that the tensors came from when the step is over.
    So what makes such a tensor (an encoder, a network for the conditioning) learns from all modules that use it, as in
    one backward pass of the sum of their losses; its part of the graph is kept until then.
    """

    def __init__(self) -> None:
        super().__init__()
        self._cut = 0
        self._leaves: dict[int, tuple[Tensor, Tensor]] = {}

    def cut(self) -> None:
        """What was made up to now is on the other side."""
        self._cut = clock()

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if self._cut:
            args, kwargs = tree_map_only(Tensor, self._leaf, (args, kwargs or {}))
        return func(*args, **(kwargs or {}))

    def _leaf(self, tensor: Tensor) -> Tensor:
        if tensor.grad_fn is None or tensor.grad_fn._sequence_nr() >= self._cut:
            return tensor
        if id(tensor) not in self._leaves:
            self._leaves[id(tensor)] = tensor, tensor.detach().requires_grad_()
        return self._leaves[id(tensor)][1]

    def hand_back(self) -> None:
        """Send the gradients of the leaves where they belong, the latest first: one may have been made from another."""
        for tensor, leaf in reversed(self._leaves.values()):
            if leaf.grad is not None:
                torch.autograd.backward(tensor, leaf.grad, retain_graph=True)
        self._leaves.clear()
