"""What a stage is given to do, and how it is written down for the next one."""

from __future__ import annotations

from collections.abc import Collection, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor
from torch._subclasses import FakeTensorMode
from torch.utils._pytree import tree_flatten, tree_unflatten

from ..recompute import Again, Keep, Plan, RandomState, Tape, leaves
from ..rules import Batch

__all__ = ["Task", "crossing", "pack", "random_state", "restrict", "set_random_state", "stack", "unpack"]


@dataclass
class Task:
    """A batch as a stage sees it.

    Attributes:
        batch: input and target; stand-ins without memory are in the input where this stage has no use for a tensor.
        state: the features that the stage's first module takes, or nothing on the first stage.
        losses: of the modules before.
        plan: how the step runs, from the first stage.
        random: the random state that the step began with.
        share: of this part of a batch in the loss of the whole.
        weight: of the batch among those of other replicas, 1 on average; None: they count the same.
        beside: by place, what the last module before returned beside the features.
    """

    batch: Batch
    state: list[Tensor] = field(default_factory=list)
    losses: list[Tensor] = field(default_factory=list)
    plan: Any = None
    random: list[Tensor] = field(default_factory=list)
    share: Any = 1.0
    weight: Tensor | None = None
    beside: dict[int, Tensor] = field(default_factory=dict)


@dataclass(frozen=True)
class _Given:
    """A leaf that is no tensor."""

    value: Any


@dataclass(frozen=True)
class _Sent:
    """A tensor that is sent; ``cpu``: it is on the CPU, wherever the network is."""

    cpu: bool


@dataclass(frozen=True)
class _Left:
    """A tensor that is not sent: its layout."""

    shape: tuple[int, ...]
    stride: tuple[int, ...]
    dtype: torch.dtype


def pack(value: Any, device: torch.device, wanted: Collection[int] | None = None) -> tuple[list[Tensor], Any]:
    """A batch or target as tensors to send, and how it is put together again.

    Args:
        value: the batch or target.
        device: what is sent is there.
        wanted: the floating-point tensors to be sent, by their place among the leaves; None: all.
    """
    found, structure = tree_flatten(value)
    tensors: list[Tensor] = []
    written: list[Any] = []
    for place, leaf in enumerate(found):
        if not isinstance(leaf, Tensor):
            written.append(_Given(leaf))
        elif leaf.is_floating_point() and wanted is not None and place not in wanted:
            written.append(_Left(tuple(leaf.shape), leaf.stride(), leaf.dtype))
        else:
            tensors.append(leaf.detach().to(device))
            written.append(_Sent(leaf.device.type == "cpu"))
    return tensors, (structure, written)


def unpack(packed: Any, tensors: list[Tensor], device: torch.device, mode: FakeTensorMode) -> Any:
    """What was packed; its tensors are taken from the front of the list, others have no memory."""
    structure, written = packed
    found: list[Any] = []
    for leaf in written:
        if isinstance(leaf, _Given):
            found.append(leaf.value)
        elif isinstance(leaf, _Sent):
            tensor = tensors.pop(0)
            found.append(tensor.cpu() if leaf.cpu else tensor)
        else:
            with mode:
                found.append(torch.empty_strided(leaf.shape, leaf.stride, dtype=leaf.dtype, device=device))
    return tree_unflatten(found, structure)


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


def crossing(plan: Plan, unit: int) -> bool:
    """Whether units on both sides of a cut go backward together."""
    return any(leaf.first < unit < leaf.last for leaf in leaves(plan))


def stack(losses: Sequence[Tensor]) -> Tensor:
    """The losses as one vector."""
    return torch.stack(list(losses)) if losses else torch.empty(0)


def random_state(device: torch.device) -> list[Tensor]:
    """The state of torch's random generators of the CPU and of a device, as tensors that can be sent."""
    state = RandomState.get(device)
    return [state.cpu.to(device), *(s.to(device) for s in state.devices[1])]


def set_random_state(states: list[Tensor], device: torch.device) -> None:
    """Go back to a random state."""
    own = RandomState.get(device)
    RandomState(states[0].cpu(), (own.devices[0], [s.cpu() for s in states[1:]])).set()
