"""What a stage is given to do, and how it is written down for the next one."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from ..recompute import Again, Keep, Plan, RandomState, Tape
from ..rules import Batch

__all__ = ["Task", "cast", "layout_of", "random_state", "restrict", "set_random_state", "stack", "stand_in"]


@dataclass
class Task:
    """A batch as a stage sees it.

    Attributes:
        batch: input and target; the input is a stand-in where the rule does not read it.
        features: what the stage's first module takes.
        losses: of the modules before.
        layout: of the input, without memory.
        plan: how the step runs, from the first stage.
        random: the random state that the step began with.
    """

    batch: Batch
    features: Tensor
    losses: list[Tensor]
    layout: Tensor
    plan: Any = None
    random: list[Tensor] = field(default_factory=list)


def restrict(plan: Plan, first: int, last: int) -> Plan:
    """The part of a plan that lies in units ``first`` to ``last - 1``."""
    found = _inside(plan, first, last)
    assert found is not None
    return found


def _inside(plan: Plan, first: int, last: int) -> Plan | None:
    if plan.last <= first or plan.first >= last:
        return None
    if isinstance(plan, Tape):
        return Tape(max(plan.first, first), min(plan.last, last))
    if isinstance(plan, Again | Keep):
        left, right = _inside(plan.left, first, last), _inside(plan.right, first, last)
        if left is None or right is None:
            return left or right
        return Again(left, right) if isinstance(plan, Again) else Keep(left, right)  # type: ignore[arg-type]
    return plan


def layout_of(x: Tensor) -> Tensor:
    """A batch without memory."""
    return torch.empty_strided(x.shape, x.stride(), dtype=x.dtype, device="meta")


def stand_in(layout: Tensor, device: torch.device) -> Tensor:
    """In place of an input that the rule says it does not read: whoever does so gets no sensible number."""
    value = math.nan if layout.dtype.is_floating_point else -1
    return torch.full((), value, dtype=layout.dtype, device=device).expand(layout.shape)


def cast(tensor: Tensor, dtype: torch.dtype) -> Tensor:
    """The tensor in this dtype."""
    return tensor if tensor.dtype == dtype else tensor.to(dtype)


def stack(losses: Sequence[Tensor]) -> Tensor:
    """The losses as one vector."""
    return torch.stack(list(losses)) if losses else torch.empty(0)


def random_state(device: torch.device) -> list[Tensor]:
    """The state of the random generators of the CPU and of a device, as tensors that can be sent."""
    state = RandomState.get(torch.empty(0, device=device))
    return [state.cpu.to(device), *(s.to(device) for s in state.devices[1])]


def set_random_state(states: list[Tensor], device: torch.device) -> None:
    """Go back to a random state."""
    own = RandomState.get(torch.empty(0, device=device))
    RandomState(states[0].cpu(), (own.devices[0], [s.cpu() for s in states[1:]])).set()
