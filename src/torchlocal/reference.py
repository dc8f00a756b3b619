"""The whole method in plain PyTorch, for a list of modules that run one after another: the place to start reading.

The library does the same for any network, in less memory, on several processes; its tests compare it with this, bit for
bit. Periodically Guided Local Learning: Bhatti & Moon, "Locally Supervised Learning with Periodic Global Guidance",
2022. The local step is that of Belilovsky et al., "Decoupled Greedy Learning of CNNs", ICML 2020, algorithm 1.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence

import torch
from torch import Tensor, nn

__all__ = ["guided_step", "local_step", "train"]

Modules = Sequence[nn.Module]  # K local modules, and the K - 1 auxiliary networks that predict from what these hand on
Criterion = Callable[[Tensor, Tensor], Tensor]


def local_step(modules: Modules, auxiliary: Modules, criterion: Criterion, x: Tensor, y: Tensor) -> list[Tensor]:
    """Every module learns from its own loss at once; no gradient crosses into the module before."""
    losses = []
    for module, network in zip(modules, [*auxiliary, nn.Identity()], strict=True):
        x = module(x)
        loss = criterion(network(x), y)  # of the last module: the global loss
        loss.backward()
        losses.append(loss.detach())
        x = x.detach()
    return losses


def guided_step(modules: Modules, auxiliary: Modules, criterion: Criterion, x: Tensor, y: Tensor) -> list[Tensor]:
    """All modules learn from the global loss; the auxiliary networks follow, on features that they cannot change."""
    losses = []
    for module, network in zip(modules, [*auxiliary, None], strict=True):
        x = module(x)
        loss = criterion(x if network is None else network(x.detach()), y)
        loss.backward()
        losses.append(loss.detach())
    return losses


def train(
    modules: Modules,
    auxiliary: Modules,
    criterion: Criterion,
    batches: Iterable[tuple[Tensor, Tensor]],
    optimizer: torch.optim.Optimizer,
    is_guided: Callable[[int], bool] = lambda step: step % 5 == 4,
) -> None:
    """Local steps, and periodically a guided one that reinstates the global objective."""
    for step, (x, y) in enumerate(batches):
        optimizer.zero_grad()
        (guided_step if is_guided(step) else local_step)(modules, auxiliary, criterion, x, y)
        optimizer.step()
