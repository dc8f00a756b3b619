"""The units after a local module: what rules read of them, and fresh copies of their architecture."""

from __future__ import annotations

import copy
from collections.abc import Sequence
from typing import TYPE_CHECKING

import torch
from torch import Tensor, fx, nn

if TYPE_CHECKING:
    from ..graph import Chain
    from ..partition import Unit

__all__ = ["Downstream", "reinitialise"]


class Downstream:
    """The units of the backbone that come after a local module, counted from 0.

    Args:
        chain: all units as something that runs.
        units: all units, described.
        first: index of the first unit after the module.
    """

    def __init__(self, chain: Chain, units: Sequence[Unit], first: int) -> None:
        self._chain, self._units, self.first = chain, tuple(units), first

    def __len__(self) -> int:
        return len(self._units) - self.first

    @property
    def units(self) -> tuple[Unit, ...]:
        """The units after the module, with their shapes and costs."""
        return self._units[self.first :]

    def further(self, num_units: int) -> Downstream:
        """The units after the first ``num_units`` of these."""
        return Downstream(self._chain, self._units, self.first + num_units)

    def input_layout(self, unit: int) -> tuple[torch.Size, int]:
        """Shape of what a unit takes, batch included, and which of its dimensions holds the channels."""
        before = self._units[self.first + unit - 1]
        return before.output_shape, before.channel_dim

    def copy(self, unit: int, *, head: bool = True) -> tuple[fx.GraphModule, torch.Size]:
        """A unit's architecture with weights of its own, drawn anew, and the shape of what it returns.

        Args:
            unit: which one, from 0.
            head: without it, the last unit ends before the head of the network (pooling and classifier).
        """
        module, shape = self._unit(unit, head=head)
        fresh = _copy(module)
        reinitialise(fresh)
        return fresh, shape

    def replica(self, unit: int) -> fx.GraphModule:
        """A copy of a unit without the head, weights included."""
        return _copy(self._unit(unit, head=False)[0])

    def _unit(self, unit: int, *, head: bool) -> tuple[fx.GraphModule, torch.Size]:
        index = self.first + unit
        if head or index < len(self._units) - 1:
            return self._chain.segment(index, index + 1), self._units[index].output_shape
        return self._chain.body(self._units[index - 1].output_shape)

    def parameters(self, names: Sequence[str]) -> list[Tensor]:
        """Parameters of the backbone by their names in a copy, the backbone's own, to be read only."""
        return [self._chain.backbone.get_parameter(name) for name in names]


def _copy(module: fx.GraphModule) -> fx.GraphModule:
    """A copy in training mode, all of whose parameters learn; on fake tensors where a mode makes these."""
    copies: dict[int, object] = {}
    for tensor in [*module.parameters(), *module.buffers()]:
        twin = tensor.detach().clone()
        copies[id(tensor)] = nn.Parameter(twin) if isinstance(tensor, nn.Parameter) else twin
    return copy.deepcopy(module, copies).train()


@torch.no_grad()
def reinitialise(module: nn.Module) -> None:
    """Draw all parameters anew, in place, and forget the statistics of the norms.

    Norms get the values that they are made with. Any other parameter is drawn from a normal distribution with the mean
    and spread that it has now, so that the initialisation that the backbone was given is kept, whatever it is, and a
    constant stays one.
    """
    for child in module.modules():
        if isinstance(child, (nn.modules.batchnorm._NormBase, nn.GroupNorm, nn.LayerNorm)):
            child.reset_parameters()
            continue
        for parameter in child.parameters(recurse=False):
            spread, mean = torch.std_mean(parameter, correction=0)
            parameter.copy_(torch.randn_like(parameter) * spread + mean)
