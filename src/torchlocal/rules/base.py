"""What a local rule is given and what it has to return."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from .downstream import Downstream


@dataclass(frozen=True, kw_only=True)
class Site:
    """The place of a local module in the network.

    Attributes:
        index: k, counted from 0.
        num_modules: K.
        feature_shape: shape of the features h_k that the module hands on, batch included.
        channel_dim: dimension of the features that holds the channels, 1 or -1.
        input_shape: shape of the network's input, batch included.
        output_shape: shape of the network's output, batch included.
        downstream: the units of the backbone that come after the module; they can be copied, and their parameters read.
    """

    index: int
    num_modules: int
    feature_shape: torch.Size
    channel_dim: int
    input_shape: torch.Size
    output_shape: torch.Size
    downstream: Downstream | None = field(default=None, repr=False, compare=False)

    @property
    def channels(self) -> int:
        """Number of channels of the features."""
        return self.feature_shape[self.channel_dim]

    @property
    def depth(self) -> float:
        """Where the module is among those with an auxiliary network: 0 for the first, 1 for the last of them."""
        return self.index / (self.num_modules - 2) if self.num_modules > 2 else 0.0

    @property
    def spatial(self) -> tuple[int, ...]:
        """Extent of the features: (H, W) of a map, (T,) of a sequence, () of vectors."""
        inner = self.feature_shape[2:] if self.channel_dim == 1 else self.feature_shape[1:-1]
        return tuple(inner)

    @property
    def per_position(self) -> bool:
        """Whether the network predicts something at each position of a sequence, (N, T, V)."""
        return len(self.output_shape) == 3

    @property
    def num_outputs(self) -> int:
        """Size of the network's output vector, for a classifier the number of classes.

        Raises:
            ValueError: the output of the network is not one vector per example.
        """
        if len(self.output_shape) != 2:
            raise ValueError(
                f"rule: the network's output has shape {tuple(self.output_shape)}, but the auxiliary networks of the "
                "library predict one vector per example; pass a callable that builds a fitting one"
            )
        return self.output_shape[1]


@dataclass(frozen=True, kw_only=True)
class Batch:
    """What the network is being trained on: what it is called with, the target y and the criterion of the task.

    ``embedding`` is what the network's first unit made of the input, without its graph, for rules that read it.
    """

    input: Any
    target: Any
    criterion: Callable[[Tensor, Any], Tensor]
    embedding: Tensor | None = None


class Rule:
    """How the auxiliary network and the local loss of a module are made. Subclass it to write your own.

    ``auxiliary`` is called once per module but the last, ``loss`` in every local step.

    Attributes:
        reads_input: the loss reads ``batch.input``, so it must be at hand where the module is.
        reads_next_module: the loss reads the parameters of the module that follows.
        reads_embedding: the loss of the first module reads ``batch.embedding``, which no other is given.
        compares_examples: the loss is not a mean over examples, so a batch cannot be cut into micro-batches.
        lag: for how many losses what ``parameters_read`` names stays as it is; with 1 its present values are read.
        criterion_only: ``loss``, where it is the rule's own, is still the criterion's on a prediction and nothing else.
    """

    reads_input: ClassVar[bool] = False
    reads_next_module: ClassVar[bool] = False
    reads_embedding: ClassVar[bool] = False
    compares_examples: ClassVar[bool] = False
    criterion_only: ClassVar[bool] = False

    @property
    def lag(self) -> int:
        """See above."""
        return 1

    def auxiliary(self, site: Site) -> nn.Module:
        """Make the auxiliary network for the features at ``site``."""
        raise NotImplementedError

    def parameters_read(self, site: Site) -> list[str]:
        """Names of the backbone's parameters that the loss at ``site`` reads without training them."""
        return []

    def take_in(self, site: Site, auxiliary: nn.Module, name: str, value: Tensor) -> None:
        """With a lag, keep values of one of these that arrive from another rank, in place of those to be read next."""
        raise NotImplementedError

    def losses_counted(self, auxiliary: nn.Module) -> int:
        """With a lag, how many losses there have been."""
        raise NotImplementedError

    def loss(self, site: Site, auxiliary: nn.Module, features: Tensor, batch: Batch) -> Tensor:
        """The local loss, a 0-dim tensor, of ``features`` (shape ``site.feature_shape``)."""
        return batch.criterion(self.predict(site, auxiliary, features), batch.target)

    def predict(self, site: Site, auxiliary: nn.Module, features: Tensor) -> Tensor:
        """What the module predicts by itself, of the shape of the network's output."""
        return auxiliary(features)

    def rehearse(self, site: Site, auxiliary: nn.Module, features: Tensor) -> Any:
        """Run as much of the auxiliary network as ``loss`` does, to count what it keeps; by default ``predict``."""
        return self.predict(site, auxiliary, features)
