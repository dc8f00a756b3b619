"""The units after a local module: what rules read of them, and fresh copies of their architecture."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor, nn

from ..cut.copies import UnitCopy
from ..cut.forward import Forward
from ..cut.units import Unit
from ..cut.within import Within

__all__ = ["Downstream", "reinitialise"]


class Downstream:
    """The units of the backbone that come after a local module, counted from 0.

    Args:
        chain: the network's forward.
        units: all units, described.
        first: index of the first unit after the module.
    """

    def __init__(self, chain: Forward, units: Sequence[Unit], first: int) -> None:
        self._chain, self._units, self.first = chain, tuple(units), first

    def __len__(self) -> int:
        return len(self._units) - self.first

    @property
    def units(self) -> tuple[Unit, ...]:
        """The units after the module, with their shapes and costs."""
        return self._units[self.first :]

    @property
    def embedding_shape(self) -> torch.Size:
        """Shape of what the first unit of the network hands on, wherever it is cut, batch included."""
        found = self._chain.facts.embedding
        assert found is not None, "there is a cut before what is downstream"
        return found.shape

    def further(self, num_units: int) -> Downstream:
        """The units after the first ``num_units`` of these."""
        return Downstream(self._chain, self._units, self.first + num_units)

    def input_layout(self, unit: int) -> tuple[torch.Size, int]:
        """Shape of what a unit takes, batch included, and which of its dimensions holds the channels."""
        before = self._units[self.first + unit - 1]
        return before.output_shape, before.channel_dim

    def copy(self, unit: int, *, head: bool = True) -> tuple[UnitCopy, torch.Size]:
        """A unit's architecture with weights of its own, drawn anew, and the shape of what it returns.

        Args:
            unit: which one, from 0; those of the module itself count backward from -1.
            head: without it, the last unit ends before the head of the network (pooling and classifier).

        Raises:
            ValueError: there is nothing in the last unit but the head.
        """
        within = self._within(unit, head=head)
        fresh = UnitCopy(self._chain, within)
        reinitialise(fresh)
        return fresh, within.shape

    def replica(self, unit: int) -> UnitCopy:
        """A copy of a unit without the head, weights included."""
        return UnitCopy(self._chain, self._within(unit, head=False))

    def _within(self, unit: int, *, head: bool) -> Within:
        index, facts = self.first + unit, self._chain.facts
        if head or index < len(self._units) - 1:
            return facts.within[index - 1]
        if facts.body is None:
            raise ValueError(
                f"rule: the last unit of {type(self._chain.backbone).__name__} holds only the head, so nothing of it "
                "can be copied without; choose other cuts, or another rule"
            )
        return facts.body

    def read_out(self) -> tuple[str, str | None]:
        """Names of the matrix and the bias of the linear layer that makes the network's prediction.

        Raises:
            ValueError: the network does not end in one.
        """
        found = self._chain.facts.read_out
        if isinstance(found, str):
            raise ValueError(
                f"rule: {type(self._chain.backbone).__name__} does not end in a linear read-out: {found}; use a rule "
                "that does not share it"
            )
        return found.weight, found.bias

    def parameters(self, names: Sequence[str]) -> list[Tensor]:
        """Parameters of the backbone by their names in a copy, the backbone's own, to be read only."""
        return [self._chain.backbone.get_parameter(name) for name in names]


@torch.no_grad()
def reinitialise(module: nn.Module) -> None:
    """Draw all parameters anew, in place, and forget the statistics of the norms.

    Norms get the values that they are made with. Any other parameter is drawn from a normal distribution with the mean
    and spread that it has now, so that the initialisation that the backbone was given is kept, whatever it is, and a
    constant stays one.
    """
    for child in module.modules():
        if isinstance(child, (nn.modules.batchnorm._NormBase, nn.GroupNorm, nn.LayerNorm, nn.RMSNorm)):
            child.reset_parameters()
            continue
        for parameter in child.parameters(recurse=False):
            spread, mean = torch.std_mean(parameter, correction=0)
            parameter.copy_(torch.randn_like(parameter) * spread + mean)
