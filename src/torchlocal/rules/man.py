"""MAN: a module looks one unit ahead, through a moving average of the weights that come next.

Su et al., "Momentum Auxiliary Network for Supervised Local Learning" (ECCV 2024).
"""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import torch
from torch import Tensor, nn

from ..checks import check_share
from .base import Batch, Rule, Site
from .names import make_rule

__all__ = ["ManRule"]


class _Ahead(nn.Module):
    """The unit that comes next, twice: with averaged weights, with weights that learn; then the base rule's network.

    The averaged weights are buffers: no optimizer sees them, and the checkpoint holds them.
    """

    def __init__(self, average: nn.Module, learnable: nn.Module, base: nn.Module) -> None:
        super().__init__()
        self.average, self.learnable, self.base = average, learnable, base
        self.names = _freeze(average)

    def compile(self, *args: Any, **kwargs: Any) -> None:
        """Compile what looks ahead and the base rule's network, each by itself."""
        for module in (self.average, self.learnable, self.base):
            module.compile(*args, **kwargs)

    def forward(self, features: Tensor) -> Tensor:
        ahead: Tensor = self.average(features) + self.learnable(features)
        return ahead

    @torch.no_grad()
    def advance(self, current: list[Tensor], momentum: float) -> None:
        """Move the averages towards the current weights."""
        for name, value in zip(self.names, current, strict=True):
            self.average.get_buffer(name).lerp_(value, 1 - momentum)


def _freeze(module: nn.Module) -> list[str]:
    """Turn the parameters of a module into buffers, in place, and return their names."""
    names = [name for name, _ in module.named_parameters()]
    for name in names:
        owner, _, leaf = name.rpartition(".")
        child = module.get_submodule(owner)
        value = child._parameters.pop(leaf)
        assert value is not None
        child.register_buffer(leaf, value.detach())
    return names


class ManRule(Rule):
    """Another rule, applied to what the next unit makes of the features.

    The features pass two copies of the unit that follows the module, whose outputs are added: one whose weights are an
    exponential moving average of the unit's own, and one that learns. The base rule's auxiliary network and loss take
    the sum. The averages move once per loss, before it is computed; they only read the next module, so no gradient
    crosses a cut.

    Args:
        base: the rule on top of which this works, or its name.
        momentum: share of the average that is kept in each step.
        base_options: options of the base rule, if it is given by name.

    Raises:
        ValueError: an option is out of range, or there is no such rule.
    """

    reads_next_module = True

    def __init__(
        self, base: str | Rule = "dgl", *, momentum: float = 0.995, base_options: dict[str, Any] | None = None
    ) -> None:
        check_share("momentum", momentum)
        if isinstance(base, Rule):
            if base_options:
                raise ValueError("base_options: they go with the name of a rule, and base is a rule already")
        elif base_options is not None and not isinstance(base_options, dict):
            raise ValueError(f"base_options: must be `name: value` pairs, not {base_options!r}")
        else:
            base = make_rule(base, base_options)
        if isinstance(base, ManRule):
            raise ValueError("base: must be another rule, not MAN itself")
        self._base, self._momentum = base, float(momentum)
        self.reads_input, self.reads_embedding = base.reads_input, base.reads_embedding  # type: ignore[misc]
        self.compares_examples = base.compares_examples  # type: ignore[misc]

    def __repr__(self) -> str:
        return f"ManRule({self._base!r}, momentum={self._momentum:g})"

    def auxiliary(self, site: Site) -> nn.Module:
        if site.downstream is None:
            raise ValueError("rule: MAN copies the unit after the module; use it through decouple")
        learnable, shape = site.downstream.copy(0, head=False)
        average = site.downstream.replica(0)
        return _Ahead(average, learnable, self._base.auxiliary(_ahead(site, shape)))

    def rehearse(self, site: Site, auxiliary: nn.Module, features: Tensor) -> Any:
        ahead = auxiliary(features)
        return self._base.rehearse(_ahead(site, ahead.shape), auxiliary.base, ahead), ahead  # type: ignore[arg-type]

    def loss(self, site: Site, auxiliary: nn.Module, features: Tensor, batch: Batch) -> Tensor:
        assert isinstance(auxiliary, _Ahead) and site.downstream is not None
        auxiliary.advance(site.downstream.parameters(auxiliary.names), self._momentum)
        ahead = auxiliary(features)
        return self._base.loss(_ahead(site, ahead.shape), auxiliary.base, ahead, batch)

    def predict(self, site: Site, auxiliary: nn.Module, features: Tensor) -> Tensor:
        ahead = auxiliary(features)
        return self._base.predict(_ahead(site, ahead.shape), auxiliary.base, ahead)  # type: ignore[arg-type]


def _ahead(site: Site, shape: torch.Size) -> Site:
    """The site as the base rule sees it: one unit further."""
    assert site.downstream is not None
    unit = site.downstream.units[0]
    last = len(site.downstream) == 1  # the features before the head then, laid out as the unit's input
    channel_dim = (site.channel_dim if len(shape) == len(site.feature_shape) else 1) if last else unit.channel_dim
    return replace(site, feature_shape=shape, channel_dim=channel_dim, downstream=site.downstream.further(1))
