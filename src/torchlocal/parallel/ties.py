"""Parameters that local modules of several ranks use, such as an embedding that is the output layer's matrix, too.

[Note: the order of a sum] A tied parameter is updated by the rank of the last local module that uses it. The others
send what they add to its gradient, and get its new value at the beginning of the next step; so the first stage cannot
begin a step before the last one has ended the step before. For the same bits as in one process, gradients are added
in the order in which autograd adds them there. In a local step each module goes backward by itself, so that is the
order of the modules. In a guided step all that goes backward together, one leaf of the plan, is summed before it is
added to what was there, from the last use to the first. Where a leaf spans ranks the sum so far goes backward along
with the gradient of the features, and a node at the end of the next rank's graph, which is the first to run backward,
has autograd begin its sum with it.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from ..modules import LocalModules
from ..recompute import Plan, Replaying, Stages, leaves
from .channels import Channel
from .tasks import crossing, restrict

__all__ = ["Tie", "Ties", "find_ties"]

Partial = dict[int, Tensor]  # by number of the tie, a sum that is not complete


@dataclass(frozen=True)
class Tie:
    """A parameter that several stages use.

    Attributes:
        name: of the parameter.
        parameter: the parameter.
        units: that read it.
        users: stages that read it, in order.
    """

    name: str
    parameter: nn.Parameter
    units: frozenset[int]
    users: tuple[int, ...]

    @property
    def owner(self) -> int:
        """The stage that updates it."""
        return self.users[-1]

    @property
    def between(self) -> range:
        """The stages from the first one that reads it, without the owner."""
        return range(self.users[0], self.owner)


def find_ties(net: LocalModules, stages: Sequence[range]) -> list[Tie]:
    """The parameters that modules of several stages use."""
    groups = net.partition.groups
    stage_of = {unit: stage for stage, modules in enumerate(stages) for k in modules for unit in groups[k]}
    units: dict[str, set[int]] = {}
    for unit, names in enumerate(net.chain.facts.parameters):
        for name in names:
            units.setdefault(name, set()).add(unit)
    named = dict(net.backbone.named_parameters(remove_duplicate=False))
    found = []
    for name, reading in units.items():
        users = sorted({stage_of[unit] for unit in reading})
        if len(users) > 1 and name in named:
            found.append(Tie(name, named[name], frozenset(reading), tuple(users)))
    return found


class Ties:
    """What one stage does about tied parameters.

    Args:
        ties: all of them.
        stage: number of this one.
        connect: makes the channel from one stage to another, one of which is this one, for values or for gradients.
    """

    def __init__(self, ties: Sequence[Tie], stage: int, connect: Callable[[int, int, bool], Channel]) -> None:
        self._ties, self._stage = list(ties), stage
        self._values_to: dict[int, Channel] = {}
        self._values_from: dict[int, Channel] = {}
        self._gradients_to: dict[int, Channel] = {}
        self._gradients_from: dict[int, Channel] = {}
        self._made: dict[int, list[Tensor]] = {}
        pairs = sorted({(tie.owner, user) for tie in ties for user in tie.users[:-1]})
        for owner, user in pairs:
            if stage == owner:
                self._values_to[user] = connect(owner, user, True)
            elif stage == user:
                self._values_from[owner] = connect(owner, user, True)
        for owner, other in sorted({(tie.owner, between) for tie in ties for between in tie.between}):
            if stage == owner:
                self._gradients_from[other] = connect(other, owner, False)
            elif stage == other:
                self._gradients_to[owner] = connect(other, owner, False)

    @property
    def channels(self) -> list[Channel]:
        """All of them, those that receive first."""
        receiving = [*self._values_from.values(), *self._gradients_from.values()]
        return [*self._values_to.values(), *self._gradients_to.values(), *receiving]

    def owned(self) -> bool:
        """Whether this stage updates a parameter that others use, too."""
        return any(self._learning(i) and tie.owner == self._stage for i, tie in enumerate(self._ties))

    def learning(self) -> list[str]:
        """The names of all that are being trained."""
        return [tie.name for i, tie in enumerate(self._ties) if self._learning(i)]

    def _learning(self, index: int) -> bool:
        return self._ties[index].parameter.requires_grad

    def share_values(self, kind: int) -> None:
        """Before a step: give the others the values of what this stage updates, and take theirs."""
        for user, channel in self._values_to.items():
            tensors = [self._ties[i].parameter.detach().clone() for i in self._of(self._stage, user)]
            channel.send(kind, tensors)
        for owner, channel in self._values_from.items():
            message = channel.receive(kind)
            with torch.no_grad():
                for i, value in zip(self._of(owner, self._stage), message.tensors, strict=True):
                    self._ties[i].parameter.copy_(value)

    def _of(self, owner: int, user: int) -> list[int]:
        return [i for i, tie in enumerate(self._ties) if tie.owner == owner and user in tie.users and self._learning(i)]

    # --- local steps ---

    def take(self) -> None:
        """A module has gone backward: what it adds to gradients that belong to other stages is kept for them."""
        for i, tie in enumerate(self._ties):
            if tie.owner != self._stage and self._stage in tie.users and tie.parameter.grad is not None:
                self._made.setdefault(i, []).append(tie.parameter.grad)
                tie.parameter.grad = None

    def send_gradients(self, kind: int) -> None:
        """Send what belongs to others."""
        for owner, channel in self._gradients_to.items():
            mine = [i for i, tie in enumerate(self._ties) if tie.owner == owner]
            numbers = tuple(i for i in mine for _ in self._made.get(i, ()))
            channel.send(kind, [gradient for i in mine for gradient in self._made.pop(i, ())], extra=numbers)

    def add_gradients(self, kind: int, *, backward: bool = False) -> None:
        """Add what the other stages send, in their order, or from the last to the first."""
        for stage in sorted(self._gradients_from, reverse=backward):
            message = self._gradients_from[stage].receive(kind)
            for i, gradient in zip(message.extra, message.tensors, strict=True):
                _accumulate(self._ties[i].parameter, gradient)

    # --- guided steps ---

    def guided(self, plan: Plan, first: int, last: int) -> Backward:
        """For one guided step through the units ``first`` to ``last - 1`` of this stage."""
        return Backward(self._ties, self._stage, plan, first, last)

    def end_guided(self, kind: int, made: dict[int, list[Tensor]]) -> None:
        """Bring the gradients to where they belong."""
        for i, tie in enumerate(self._ties):
            if tie.owner == self._stage:
                for gradient in made.pop(i, ()):
                    _accumulate(tie.parameter, gradient)
        self._made = made
        self.send_gradients(kind)
        self.add_gradients(kind, backward=True)


class Backward:
    """The gradients of tied parameters in one guided step through one stage.

    Args:
        ties: all of them.
        stage: number of the stage.
        plan: of the whole network.
        first: first unit of the stage.
        last: the one after its last.
    """

    def __init__(self, ties: Sequence[Tie], stage: int, plan: Plan, first: int, last: int) -> None:
        self._stage = stage
        self._ties = {i: tie for i, tie in enumerate(ties) if tie.parameter.requires_grad}
        own = leaves(restrict(plan, first, last))
        self._head, self._tail = (range(leaf.first, leaf.last) for leaf in (own[0], own[-1]))
        self._reaches_down, self._last = crossing(plan, first), last
        reaches_up = crossing(plan, last)
        self._begun = [i for i, tie in self._ties.items() if reaches_up and not tie.units.isdisjoint(self._tail)]
        self._held: Partial = {}
        self.made: dict[int, list[Tensor]] = {}

    @contextmanager
    def watching(self) -> Iterator[None]:
        """Keep what goes into the gradients of tied parameters apart from what is there."""
        mine = {i: tie.parameter for i, tie in self._ties.items() if self._stage in tie.users}
        before = {i: parameter.grad for i, parameter in mine.items()}
        handles = []

        def hook(i: int) -> Callable[[Tensor], None]:
            def take(parameter: Tensor) -> None:
                assert parameter.grad is not None
                self.made.setdefault(i, []).append(parameter.grad)
                parameter.grad = None

            return take

        for i, parameter in mine.items():
            parameter.grad = None
            handles.append(parameter.register_post_accumulate_grad_hook(hook(i)))
        try:
            yield
        finally:
            for handle in handles:
                handle.remove()
            for i, parameter in mine.items():
                parameter.grad = before[i]

    def around(self, stages: Stages) -> Stages:
        """The chain, with the beginning of the sums at its end."""
        parameters = [self._ties[i].parameter for i in self._begun]
        return _Begun(stages, self._last, self._begun, parameters, self._held) if parameters else stages

    def arrived(self, partial: Partial) -> None:
        """What the next stage has of sums that this one goes on with."""
        for i, value in partial.items():
            if i in self._begun:
                self._held[i] = value
            else:
                self.made.setdefault(i, []).insert(0, value)

    def to_hand_on(self) -> Partial:
        """The sums that the stage before goes on with."""
        found: Partial = {}
        for i, made in self.made.items():
            tie = self._ties[i]
            passes = self._head == self._tail or not tie.units.isdisjoint(self._head)
            if self._reaches_down and made and passes and self._stage > tie.users[0]:
                found[i] = made.pop()
        return found


class _Begun:
    """A chain whose last stage ends in a node that starts sums of gradients."""

    def __init__(
        self, stages: Stages, last: int, numbers: Sequence[int], parameters: Sequence[nn.Parameter], held: Partial
    ) -> None:
        self._stages, self._last, self._numbers = stages, last, numbers
        self._parameters, self._held = parameters, held

    def run(self, first: int, last: int, state: list[Any]) -> tuple[Any, ...]:
        """See :class:`torchlocal.recompute.Stages`."""
        result = self._stages.run(first, last, state)
        if last != self._last or not torch.is_grad_enabled():
            return result
        return (_Begin.apply(result[0], self._held, self._numbers, *self._parameters),)

    def replay(self) -> Replaying:
        """See there."""
        return self._stages.replay()

    def inside(self, stage: int, state: list[Any]) -> Stages | None:
        """See there."""
        return self._stages.inside(stage, state)

    def entry_index(self, stage: int) -> int | None:
        """See there."""
        return self._stages.entry_index(stage)


class _Begin(torch.autograd.Function):
    """Hands features on; backward, gives parameters what their gradients begin with."""

    @staticmethod
    def forward(ctx: Any, features: Tensor, held: Partial, numbers: Sequence[int], *_: Tensor) -> Tensor:
        ctx.held, ctx.numbers = held, numbers
        return features.view_as(features)

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor | None, ...]:
        return gradient, None, None, *(ctx.held.pop(i, None) for i in ctx.numbers)


def _accumulate(parameter: nn.Parameter, gradient: Tensor) -> None:
    if parameter.grad is None:
        parameter.grad = gradient
    else:
        parameter.grad += gradient
