"""Guided steps in micro-batches that overlap, by torch.distributed.pipelining."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn

from ..engine import Step
from ..modules import LocalModules
from .rehearsal import Rehearsal

__all__ = ["Schedule"]


class Schedule:
    """What one stage does in a guided step of one shape of micro-batch.

    Args:
        net: the network.
        stage: number of this rank's stage.
        stages: the local modules of every stage.
        rehearsal: of a micro-batch.
        count: number of micro-batches.
        schedule: ``"1f1b"`` or ``"gpipe"``.
        device: of this rank.
        group: the stages' ranks.
    """

    def __init__(
        self,
        *,
        net: LocalModules,
        stage: int,
        stages: Sequence[range],
        rehearsal: Rehearsal,
        count: int,
        schedule: str,
        device: torch.device,
        group: dist.ProcessGroup,
    ) -> None:
        from torch.distributed.pipelining import PipelineStage, Schedule1F1B, ScheduleGPipe  # slow to import

        modules, self._last = stages[stage], stage == len(stages) - 1
        self._first = stage == 0
        self._body = _Body(net, modules, device, rehearsal)
        # Messages are contiguous, whatever the layout of the features that they stand for.
        if self._first:  # whose batch is at hand
            entry = torch.empty(1, device="meta")
        else:
            entry = rehearsal.features[modules.start - 1].contiguous().clone().requires_grad_()
        result = rehearsal.features[modules.stop - 1].contiguous().clone().requires_grad_()
        pipeline_stage = PipelineStage(
            self._body,
            stage,
            len(stages),
            device,
            input_args=(entry,),
            output_args=(result,),
            group=group,
        )
        kind = Schedule1F1B if schedule == "1f1b" else ScheduleGPipe
        # Every loss is scaled by itself: scaling gradients would scale again what is being accumulated.
        # The loss is called on the last stage only, but tells all of them that there is a backward pass.
        self._schedule = kind(pipeline_stage, count, loss_fn=self._body.global_loss, scale_grads=False)

    def step(self, steps: Sequence[Step], rehearsal: Rehearsal, *, follow: bool) -> list[Tensor]:
        """Run every micro-batch forward and backward; returns the losses of this stage's modules."""
        self._body.begin(steps, rehearsal, follow=follow)
        inputs = [(torch.empty(1, device=step.device),) for step in steps] if self._first else None
        targets = list(range(len(steps))) if self._last else None
        self._schedule.step(arg_mbs=inputs, target_mbs=targets, return_outputs=False)
        return self._body.finish()


class _Arrive(torch.autograd.Function):
    """Gives features the memory layout that they had, and sends their gradient back contiguous."""

    @staticmethod
    def forward(ctx: Any, features: Tensor, strides: tuple[int, ...]) -> Tensor:
        if features.stride() == strides:
            return features.view_as(features)
        return torch.empty_strided(features.shape, strides, dtype=features.dtype, device=features.device).copy_(
            features
        )

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, None]:
        return gradient.contiguous(), None


class _Body(nn.Module):
    """The local modules of a stage as one module, which trains their auxiliary networks on the way."""

    def __init__(self, net: LocalModules, modules: range, device: torch.device, rehearsal: Rehearsal) -> None:
        super().__init__()
        self._strides = rehearsal.features[modules.start - 1].stride() if modules.start else None
        self._held = (net, modules, device)  # in a tuple: the network is no submodule of it

    def begin(self, steps: Sequence[Step], rehearsal: Rehearsal, *, follow: bool) -> None:
        """Be ready for the micro-batches of ``steps``."""
        self._steps, self._rehearsal, self._follow, self._number = steps, rehearsal, follow, 0
        self._losses: dict[int, list[Tensor]] = {}

    def finish(self) -> list[Tensor]:
        """The losses of the whole batch."""
        return [sum(losses[1:], losses[0]) for _, losses in sorted(self._losses.items())]

    def forward(self, features: Tensor) -> Tensor:
        """The next micro-batch; as in a single process, its random numbers come after those of the one before."""
        net, modules, device = self._held
        step, self._number = self._steps[self._number], self._number + 1
        entering = self._rehearsal.skip(net, range(modules.start), device, follow=self._follow)
        if self._strides is not None:
            features = _Arrive.apply(features, self._strides)
            step.entering = entering
        state, losses = [features] if self._strides is not None else [], list[Tensor]()
        del features
        with step.autocast():
            result = step.forward(modules, state, losses, follow=self._follow)
        for k, loss in zip(modules, losses, strict=False):
            self._losses.setdefault(k, []).append(loss)
        self._rehearsal.skip(net, range(modules.stop, net.num_modules), device, follow=self._follow)
        return result.contiguous()

    def global_loss(self, prediction: Tensor, number: int) -> Tensor:
        """The loss of a micro-batch as it goes backward, on the last stage."""
        net, step = self._held[0], self._steps[number]
        with step.autocast():
            loss = step.loss(net.num_modules - 1, prediction)
        self._losses.setdefault(net.num_modules - 1, []).append(step.told(loss))
        return step.weighed(loss)
