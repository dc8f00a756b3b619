"""How a network learns from one batch: the local step and the guided step.

Both leave the gradients in ``.grad``, as ``loss.backward()`` would, for any optimizer. Neither reads a value back from
the device.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from .cut.batches import Batch
from .engine import SupportsStep, check_arguments, follows, run_guided, run_local
from .memory.plans import local_plans, plan_and_parts
from .modules import LocalModules
from .recompute import GuidedPlan, Plan

__all__ = ["guided_step", "local_step"]


def local_step(
    net: LocalModules,
    batch: Batch,
    target: Any = None,
    *,
    recompute: str | dict[int, Plan] | None = None,
    autocast: torch.dtype | None = None,
    backward: Callable[[Tensor], Any] | None = None,
    scale: float = 1.0,
    optimizers: Sequence[SupportsStep] | None = None,
) -> list[Tensor]:
    """Train every local module on its own loss: forward, local loss, backward at once, detach, next module.

    One module's activations live at a time (Belilovsky et al., ICML 2020, algorithm 1, run in sequence).

    Args:
        net: the decoupled network.
        batch: what the network is called with: a tensor (N, ...), a tuple of arguments, or a mapping of keyword
            arguments.
        target: whatever the criterion takes, for cross-entropy class indices (N,) or probabilities (N, C).
        recompute: ``"largest"``: recompute inside the local modules that take most, as far as that lowers the peak; the
            results stay the same, bit for bit.
        autocast: run forward passes in this dtype, for example ``torch.bfloat16``.
        backward: called with each loss instead of ``loss.backward()``, for example
            ``lambda loss: scaler.scale(loss).backward()`` or ``fabric.backward``.
        scale: factor on every loss before backward; ``1 / n`` accumulates the mean gradient of n batches.
        optimizers: one per local module (see :meth:`LocalModules.module_parameters`); each is stepped, and its
            gradients freed, right after the backward pass of its module. Not with ``backward`` or ``scale``, which
            leave gradients that are not yet those of an update.

    Returns:
        The K losses, detached 0-dim tensors; the last is the global loss.

    Raises:
        ValueError: the batch does not fit the network, gradients are switched off, options do not go together, or the
            number of optimizers is not K.
    """
    batch = check_arguments(net, batch, optimizers, backward, scale)
    plans = local_plans(net, batch, target, recompute, autocast=autocast)
    return run_local(
        net, batch, target, plans, autocast=autocast, backward=backward, scale=scale, optimizers=optimizers
    )


def guided_step(
    net: LocalModules,
    batch: Batch,
    target: Any = None,
    *,
    auxiliary: str = "follow",
    recompute: str | int | None = None,
    memory: str | int | GuidedPlan | None = None,
    micro_batches: int | None = None,
    autocast: torch.dtype | None = None,
    backward: Callable[[Tensor], Any] | None = None,
    scale: float = 1.0,
    optimizers: Sequence[SupportsStep] | None = None,
) -> list[Tensor]:
    """Train the network on the global loss, with gradients through all modules.

    Args:
        net: the decoupled network.
        batch: as in :func:`local_step`.
        target: whatever the criterion takes.
        auxiliary: ``"follow"``: the auxiliary networks learn too, from their own loss on detached features, which
            leaves the backbone's gradients untouched; ``"match"``: they also learn to give the gradient that the global
            loss gives at their features (1 - cosine of the angle between the two, the mean over the examples, is added
            to their loss), so that later local steps go where the global objective would; ``"frozen"``: they are left
            alone, and go stale.
        recompute: run the forward pass twice to keep the activations of one segment at a time (Chen et al., "Training
            Deep Nets with Sublinear Memory Cost", 2016): ``"modules"`` takes the local modules as segments, a number
            cuts the units into that many, balanced by activation bytes. Parameters and buffers come out bit for bit as
            without, dropout and BatchNorm statistics included.
        memory: instead of ``recompute``, lets a search choose what is recomputed, once per shape of batch: ``"local"``:
            the cheapest way whose predicted peak is not above the local step's, the batch cut into micro-batches where
            it takes that and the gradient of the whole batch comes out (BatchNorm then sees the parts); ``"exact"``:
            the smallest peak without micro-batches, that is bit for bit the plain guided step; ``"full"``: nothing is
            recomputed; or a number of bytes that the step may take.
        micro_batches: the most that ``memory="local"``, or a number of bytes, may cut the batch into; with 1 it stays
            in one piece, and the results are those of the plain guided step, bit for bit.
        autocast: run forward passes in this dtype.
        backward: called with each loss instead of ``loss.backward()``.
        scale: factor on every loss before backward.
        optimizers: one per local module; each is stepped, and its gradients freed, as soon as its module's gradients
            are complete. Not with ``backward`` or ``scale``.

    Returns:
        Detached 0-dim losses, the last one global: K of them when the auxiliary networks follow, else one.

    Raises:
        ValueError: an option is unknown, the batch does not fit the network, gradients are switched off, options do not
            go together, or the number of optimizers is not K.
    """
    batch = check_arguments(net, batch, optimizers, backward, scale)
    follows(net, auxiliary)  # refuses another word
    plan, parts = plan_and_parts(
        net,
        batch,
        target,
        auxiliary=auxiliary,
        recompute=recompute,
        memory=memory,
        micro_batches=micro_batches,
        autocast=autocast,
        optimizers=optimizers,
    )
    return run_guided(
        net,
        plan,
        parts,
        auxiliary=auxiliary,
        autocast=autocast,
        backward=backward,
        scale=scale,
        optimizers=optimizers,
    )
