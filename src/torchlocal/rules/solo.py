"""SOLO: local modules of a transformer that all predict through the read-out of the last one, which they only read.

Yin et al., "SOLO" (arXiv 2609.35440, 2026).
"""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ..checks import check_whole
from .auglocal import Units
from .base import Batch, Rule, Site
from .downstream import Downstream

__all__ = ["SoloRule"]

_READ_OUTS = ("shared", "private")


class _MLP(nn.Module):
    """A norm and two linear layers with a GELU between them, and a shortcut around them; at first the shortcut alone.

    Args:
        width: of the features, (N, T, C) or (N, C).
        hidden: number of features between the two layers.
    """

    def __init__(self, width: int, hidden: int) -> None:
        super().__init__()
        self.norm, self.up, self.down = nn.RMSNorm(width), nn.Linear(width, hidden), nn.Linear(hidden, width)
        nn.init.zeros_(self.down.weight)
        nn.init.zeros_(self.down.bias)

    def forward(self, features: Tensor) -> Tensor:
        changed: Tensor = self.down(F.gelu(self.up(self.norm(features))))
        return features + changed


class _SoloNetwork(nn.Module):
    """Fresh blocks, a norm, and a temperature: what comes before the read-out, and a bias after it.

    Args:
        blocks: take and return features; an MLP may be the last of them.
        width: of the features.
        vocabulary: number of tokens, or classes.
        pooled: one prediction is made for all positions, of their mean.
    """

    def __init__(self, blocks: list[nn.Module], width: int, vocabulary: int, *, pooled: bool) -> None:
        super().__init__()
        self.blocks, self.norm = Units(*blocks), nn.RMSNorm(width)
        self.log_temperature = nn.Parameter(torch.zeros(()))
        self.bias = nn.Parameter(torch.zeros(vocabulary))
        self.pooled = pooled
        self.read_out: nn.Module | None = None  # private
        self.steps: Tensor | None  # that the copies of a shared one have seen
        self.register_buffer("steps", None)

    def hold(self, read_out: list[Tensor]) -> None:
        """Have copies of a shared read-out, as buffers: the checkpoint holds them, and no optimizer sees them."""
        self.steps = torch.zeros((), dtype=torch.long)
        for name, value in zip(("weight", "offset"), read_out, strict=False):
            for when in ("held", "coming"):
                self.register_buffer(f"{when}_{name}", value.detach().clone())

    def held(self) -> list[Tensor]:
        """The copies that are read in this step."""
        return [buffer for name, buffer in self.named_buffers(recurse=False) if name.startswith("held_")]

    @torch.no_grad()
    def advance(self, read_out: list[Tensor], lag: int) -> None:
        """Go on by one step; without asking what number it is, which would wait for the device."""
        assert self.steps is not None
        noted, due = (self.steps - 1) % lag == 0, (self.steps > 0) & (self.steps % lag == 0)
        for name, value in zip(("weight", "offset"), read_out, strict=False):
            held, coming = self.get_buffer(f"held_{name}"), self.get_buffer(f"coming_{name}")
            held.copy_(torch.where(due, coming, held))
            coming.copy_(torch.where(noted, value.to(coming.dtype), coming))
        self.steps += 1

    def compile(self, *args: Any, **kwargs: Any) -> None:
        """Compile the blocks, each by itself."""
        self.blocks.compile(*args, **kwargs)

    def forward(self, features: Tensor) -> Tensor:
        """What the read-out takes, (N, T, C) or (N, C)."""
        features = self.blocks(features)
        features = features.mean(1) if self.pooled else features
        ready: Tensor = self.norm(features) * (-self.log_temperature).exp()
        return ready


class SoloRule(Rule):
    """Each module minimises the criterion of the task through the network's own read-out, which it does not move.

    The auxiliary network is made of copies of the blocks that follow the module, with weights of their own, drawn anew,
    an RMSNorm, a learned temperature and a learned bias over the vocabulary. In front of the read-out of the network
    they predict: ``W norm(blocks(h)) / temperature + bias`` (with ``hidden`` an MLP is the last of the blocks). Only
    the global loss moves ``W``. It takes any decoder or encoder whose last operation is a linear read-out, tied to the
    embedding or not. Where the criterion has ``from_features`` (see :class:`torchlocal.tokens.TokenCrossEntropy`) the
    scores are never held as a whole.

    With ``lag`` L the matrix that step t reads, counted from 0 in local losses of a module, is the one that step
    ``L (⌊t / L⌋ - 1)`` left behind (or the first). With L = 1 that is the step before, and the network's own matrix is
    read; else every module has a copy of it, and one that is to come, both in the checkpoint. So that a process which
    is ahead by less than L steps does not wait, a matrix is that much older than it would have to be on one.

    Args:
        depth: number of blocks (units between cut points) in front of the read-out; with 0 the features themselves.
        hidden: number of hidden features of an MLP behind the blocks, which changes the features of each position
            on its own (an addition to what is published; docs/language.md); None: there is none.
        lag: number of steps for which one copy of the read-out serves.
        read_out: ``"shared"``, or ``"private"``: each module learns one of its own.
        rank: of a private read-out, which is then the product of two matrices.

    Raises:
        ValueError: an option is out of range.
    """

    criterion_only = True

    def __init__(
        self,
        depth: int = 2,
        *,
        hidden: int | None = None,
        lag: int = 1,
        read_out: str = "shared",
        rank: int | None = None,
    ) -> None:
        check_whole("depth", depth, 0)
        if hidden is not None:
            check_whole("hidden", hidden)
        check_whole("lag", lag)
        if read_out not in _READ_OUTS:
            raise ValueError(f"read_out: must be 'shared' or 'private', not {read_out!r}")
        if rank is not None:
            check_whole("rank", rank)
        if read_out == "private" and lag > 1:
            raise ValueError(f"lag: a private read-out is no copy of another, so lag={lag} means nothing to it")
        if read_out == "shared" and rank is not None:
            raise ValueError(f"rank: a shared read-out is the network's, so rank={rank} means nothing to it")
        self._depth, self._hidden = depth, hidden
        self._lag, self._shared, self._rank = lag, read_out == "shared", rank

    def __repr__(self) -> str:
        more = "" if self._hidden is None else f"hidden={self._hidden}, "
        more += f"lag={self._lag}" if self._shared else "read_out='private'"
        more += "" if self._rank is None else f", rank={self._rank}"
        return f"SoloRule(depth={self._depth}, {more})"

    def auxiliary(self, site: Site) -> nn.Module:
        downstream = _downstream(site)
        read_out = downstream.parameters(_names(downstream)) if self._shared else []
        _refuse_layout(site)
        width, vocabulary = site.channels, site.output_shape[-1]
        if read_out and read_out[0].shape[1] != width:
            raise ValueError(
                f"rule: the read-out of the network takes {read_out[0].shape[1]} features, and there are {width} "
                "here; give read_out='private', or use another rule"
            )
        blocks = self._blocks(site) + ([] if self._hidden is None else [_MLP(width, self._hidden)])
        network = _SoloNetwork(blocks, width, vocabulary, pooled=len(site.output_shape) < _ndim(site))
        if not self._shared:
            layers = [nn.Linear(width, self._rank, bias=False)] if self._rank is not None else []
            network.read_out = nn.Sequential(*layers, nn.Linear(self._rank or width, vocabulary, bias=False))
        elif self._lag > 1:
            network.hold(read_out)
        return network

    def _blocks(self, site: Site) -> list[nn.Module]:
        """Copies of units between the first, which may be all embedding, and the last, which has the read-out.

        They are those that come next; where there are too few of these, of the module itself.
        """
        downstream = _downstream(site)
        first, last = downstream.first, downstream.first + len(downstream) - 1
        start = max(1, min(first, last - self._depth))
        chosen = [start + i % (last - start) for i in range(self._depth)] if last > start else [first] * self._depth
        blocks: list[nn.Module] = []
        for unit in chosen:
            layout = downstream.input_layout(unit - first)
            block, shape = downstream.copy(unit - first, head=unit != last)
            if (layout[0], layout[1], shape) != (site.feature_shape, site.channel_dim, site.feature_shape):
                raise ValueError(
                    f"rule: SOLO puts blocks in front of the read-out that take and return features of shape "
                    f"{tuple(site.feature_shape)}, and one that follows makes {tuple(shape)} of {tuple(layout[0])}; "
                    "give depth=0, or use another rule"
                )
            blocks.append(block)
        return blocks

    @property
    def lag(self) -> int:
        return self._lag

    def parameters_read(self, site: Site) -> list[str]:
        return _names(_downstream(site)) if self._shared else []

    def take_in(self, site: Site, auxiliary: nn.Module, name: str, value: Tensor) -> None:
        which = "weight" if name == _names(_downstream(site))[0] else "offset"
        auxiliary.get_buffer(f"coming_{which}").copy_(value)

    def losses_counted(self, auxiliary: nn.Module) -> int:
        return int(auxiliary.get_buffer("steps"))

    def loss(self, site: Site, auxiliary: nn.Module, features: Tensor, batch: Batch) -> Tensor:
        assert isinstance(auxiliary, _SoloNetwork)
        if auxiliary.steps is not None:
            downstream = _downstream(site)
            auxiliary.advance(downstream.parameters(_names(downstream)), self._lag)
        given = self._ready(site, auxiliary, features)
        from_features: Any = getattr(batch.criterion, "from_features", None)
        if from_features is not None:
            loss: Tensor = from_features(*given, batch.target)
            return loss
        return batch.criterion(F.linear(*given), batch.target)

    def predict(self, site: Site, auxiliary: nn.Module, features: Tensor) -> Tensor:
        assert isinstance(auxiliary, _SoloNetwork)
        return F.linear(*self._ready(site, auxiliary, features))

    def _ready(self, site: Site, auxiliary: _SoloNetwork, features: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """What is read, and by what matrix and bias."""
        ready: Tensor = auxiliary(features)
        if auxiliary.read_out is not None:
            *before, last = auxiliary.read_out.children()
            for layer in before:
                ready = layer(ready)
            return ready, last.weight, auxiliary.bias  # type: ignore[return-value]
        downstream = _downstream(site)
        read_out = auxiliary.held() or [p.detach() for p in downstream.parameters(_names(downstream))]
        weight, *offset = (value.to(ready.device) for value in read_out)  # which differs where FLOPs are counted
        bias: Tensor = auxiliary.bias
        if offset:
            bias = bias + offset[0] * (-auxiliary.log_temperature).exp()
        return ready, weight, bias


def _downstream(site: Site) -> Downstream:
    if site.downstream is None:
        raise ValueError("rule: SOLO reads the network's read-out; use it through decouple")
    return site.downstream


def _names(downstream: Downstream) -> list[str]:
    weight, bias = downstream.read_out()
    return [weight] if bias is None else [weight, bias]


def _ndim(site: Site) -> int:
    return len(site.feature_shape)


def _refuse_layout(site: Site) -> None:
    """Refuse what is laid out otherwise than in a decoder or encoder, or predicts otherwise than for each or all."""
    tokens = _ndim(site) == 3 and site.channel_dim == -1
    each = site.per_position and tokens and site.output_shape[1] == site.feature_shape[1]
    if not each and not (len(site.output_shape) == 2 and (tokens or _ndim(site) == 2)):
        raise ValueError(
            f"rule: SOLO predicts at each position of a sequence (N, T, C), or once for all, and here features of "
            f"shape {tuple(site.feature_shape)} meet an output of shape {tuple(site.output_shape)}; use another rule"
        )
