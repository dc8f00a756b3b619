"""Guided steps in micro-batches that overlap, by torch.distributed.pipelining."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn

from ..boundary import Original, decode, encode, encoded_bytes
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
        boundary: how features and their gradients are sent, see :mod:`torchlocal.boundary`.

    Attributes:
        num_bytes: that this stage sends in a step, features and gradients.
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
        boundary: str | None,
    ) -> None:
        from torch.distributed.pipelining import PipelineStage, Schedule1F1B, ScheduleGPipe  # slow to import

        modules, self._last = stages[stage], stage == len(stages) - 1
        self._first = stage == 0
        self._body = _Body(net, modules, device, rehearsal, boundary)
        entry = torch.empty(1, device="meta")  # of the first stage, whose batch is at hand
        if not self._first:
            entry = _message(rehearsal.features[modules.start - 1], boundary)
        result = _message(rehearsal.features[modules.stop - 1], None if self._last else boundary)
        self.num_bytes = count * ((0 if self._first else entry.nbytes) + (0 if self._last else result.nbytes))
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


# torch.distributed.pipelining sends what a stage takes and returns, and their gradients, which have to be of the same
# layout: messages are contiguous, and bytes of int8 and int4 in the guise of float32, with which nobody computes.


def _message(features: Tensor, boundary: str | None) -> Tensor:
    """What is sent of features, without numbers."""
    if boundary in (None, "bf16"):
        found = encode(features.contiguous().clone(), boundary)
    else:
        size = encoded_bytes(features.numel(), boundary, features.dtype)
        found = torch.empty(size // torch.float32.itemsize, device="meta")
    return found.requires_grad_()


def _written(tensor: Tensor, boundary: str | None) -> Tensor:
    block = encode(tensor, boundary)
    return block.view(torch.float32) if block.dtype == torch.uint8 else block.contiguous()


def _read(message: Tensor, original: Original, boundary: str | None) -> Tensor:
    if boundary in (None, "bf16"):
        return original.laid_out(message.view(-1))
    return decode(message.view(torch.uint8), original, boundary)


class _Arrive(torch.autograd.Function):
    """Reads the features from a message, and writes their gradient into one."""

    @staticmethod
    def forward(ctx: Any, message: Tensor, original: Original, boundary: str | None) -> Tensor:
        ctx.boundary = boundary
        found = _read(message, original, boundary)
        return found.view_as(message) if found.data_ptr() == message.data_ptr() else found

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, None, None]:
        return _written(gradient, ctx.boundary), None, None


class _Leave(torch.autograd.Function):
    """Writes features into a message, and reads their gradient from one."""

    @staticmethod
    def forward(ctx: Any, features: Tensor, boundary: str | None) -> Tensor:
        ctx.original, ctx.boundary = Original.of(features), boundary
        return _written(features, boundary)

    @staticmethod
    def backward(ctx: Any, message: Tensor) -> tuple[Tensor, None]:
        return _read(message, ctx.original, ctx.boundary), None


class _Body(nn.Module):
    """The local modules of a stage as one module, which trains their auxiliary networks on the way."""

    def __init__(
        self, net: LocalModules, modules: range, device: torch.device, rehearsal: Rehearsal, boundary: str | None
    ) -> None:
        super().__init__()
        self._original = Original.of(rehearsal.features[modules.start - 1]) if modules.start else None
        self._boundary = boundary
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
        if self._original is not None:
            features = _Arrive.apply(features, self._original, self._boundary)
            step.entering = entering
        state, losses = [features] if self._original is not None else [], list[Tensor]()
        del features
        with step.autocast():
            result = step.forward(modules, state, losses, follow=self._follow)
        for k, loss in zip(modules, losses, strict=False):
            self._losses.setdefault(k, []).append(loss)
        self._rehearsal.skip(net, range(modules.stop, net.num_modules), device, follow=self._follow)
        if self._boundary is None or modules.stop == net.num_modules:
            return result.contiguous()
        return _Leave.apply(result, self._boundary)

    def global_loss(self, prediction: Tensor, number: int) -> Tensor:
        """The loss of a micro-batch as it goes backward, on the last stage."""
        net, step = self._held[0], self._steps[number]
        with step.autocast():
            loss = step.loss(net.num_modules - 1, prediction)
        self._losses.setdefault(net.num_modules - 1, []).append(step.told(loss))
        return step.weighed(loss)
