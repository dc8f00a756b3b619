"""What a local rule is given and what it has to return."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn


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
    """

    index: int
    num_modules: int
    feature_shape: torch.Size
    channel_dim: int
    input_shape: torch.Size
    output_shape: torch.Size

    @property
    def channels(self) -> int:
        """Number of channels of the features."""
        return self.feature_shape[self.channel_dim]

    @property
    def spatial(self) -> tuple[int, ...]:
        """Extent of the features: (H, W) of a map, (T,) of a sequence, () of vectors."""
        inner = self.feature_shape[2:] if self.channel_dim == 1 else self.feature_shape[1:-1]
        return tuple(inner)

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
    """What the network is being trained on: the input x, the target y and the criterion of the task."""

    input: Tensor
    target: Any
    criterion: Callable[[Tensor, Any], Tensor]


class Rule:
    """How the auxiliary network and the local loss of a module are made. Subclass it to write your own.

    ``auxiliary`` is called once per module but the last, ``loss`` in every local step.
    """

    def auxiliary(self, site: Site) -> nn.Module:
        """Make the auxiliary network for the features at ``site``."""
        raise NotImplementedError

    def loss(self, site: Site, auxiliary: nn.Module, features: Tensor, batch: Batch) -> Tensor:
        """The local loss, a 0-dim tensor, of ``features`` (shape ``site.feature_shape``)."""
        return batch.criterion(self.predict(site, auxiliary, features), batch.target)

    def predict(self, site: Site, auxiliary: nn.Module, features: Tensor) -> Tensor:
        """What the module predicts by itself, of the shape of the network's output."""
        return auxiliary(features)
