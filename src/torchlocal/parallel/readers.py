"""Parameters that local losses read on ranks that do not train them: a read-out that all modules share.

[Note: against the traffic] The rank that trains the parameter sends its values backward, to those that come before it.
With a lag of L losses between two sendings it sends, when it begins step n·L + 1, what step n·L left behind, and the
others put that to use when they begin step (n + 1)·L. A rank that is ahead by less than L steps finds the values there
and does not wait. With a lag of 1 every step waits for the one before, as tied parameters do.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch

from ..modules import LocalModules
from .channels import Channel

__all__ = ["Readers"]

_VALUES = 1  # the only kind of message


class Readers:
    """What one stage does about the parameters that local losses read.

    Args:
        net: the decoupled network.
        stages: the local modules of every stage.
        stage: number of this one.
    """

    def __init__(self, net: LocalModules, stages: Sequence[range], stage: int) -> None:
        self._net, self._stage, self._modules = net, stage, stages[stage]
        self._lag = net.rule.lag
        groups = net.partition.groups
        stage_of = {unit: s for s, modules in enumerate(stages) for k in modules for unit in groups[k]}
        users: dict[str, list[int]] = {}
        for unit, names in enumerate(net.chain.facts.parameters):
            for name in names:
                users.setdefault(name, []).append(stage_of[unit])
        self._routes: dict[tuple[int, int], list[str]] = {}  # by the stages that send and receive, what is sent
        for s, modules in enumerate(stages):
            reading = dict.fromkeys(
                name for k in modules if k < len(net.sites) for name in net.rule.parameters_read(net.sites[k])
            )
            for name in reading:
                if s not in users[name]:  # else it is trained here, or a tied one, which is at hand
                    self._routes.setdefault((users[name][-1], s), []).append(name)
        self._to: dict[int, Channel] = {}
        self._from: dict[int, Channel] = {}
        self.restart()

    def __bool__(self) -> bool:
        """Whether any stage reads what it does not train."""
        return bool(self._routes)

    def connect(self, connect: Callable[[int, int], Channel]) -> None:
        """Make the channels; ``connect`` makes the one between two stages, one of which is this one."""
        for source, destination in sorted(self._routes):
            if self._stage == source:
                self._to[destination] = connect(source, destination)
            elif self._stage == destination:
                self._from[source] = connect(source, destination)

    @property
    def channels(self) -> list[Channel]:
        """All of them, those that receive last."""
        return [*self._to.values(), *self._from.values()]

    @property
    def lags(self) -> bool:
        """Whether copies that are older than a step are read."""
        return bool(self._routes) and self._lag > 1

    def begin(self, *, new: bool, learns: bool) -> None:
        """Before a step, or one of its parts.

        Args:
            new: it is the first part.
            learns: it makes local losses.
        """
        if not self._routes:
            return
        if self._lag == 1:
            if new:
                self._send()
                self._receive(self._overwrite)
            return
        if not learns:
            return
        if self._steps % self._lag == 1:
            self._send()
            self._awaited = bool(self._from)
        if self._steps % self._lag == 0:
            self.settle()
        self._steps += 1

    def settle(self) -> None:
        """Have what is on its way here arrive."""
        if self._awaited:
            self._receive(self._put)
            self._awaited = False

    def restart(self) -> None:
        """Go on from the state that the network has now."""
        networks = self._net.auxiliary
        self._steps = self._net.rule.losses_counted(networks[0]) if self._lag > 1 and len(networks) else 0
        self._awaited = False

    def _send(self) -> None:
        for destination, channel in self._to.items():
            names = self._routes[self._stage, destination]
            channel.send(_VALUES, [self._net.backbone.get_parameter(name).detach().clone() for name in names])

    def _receive(self, take: Callable[[str, torch.Tensor], None]) -> None:
        for source, channel in self._from.items():
            message = channel.receive(_VALUES)
            with torch.no_grad():
                for name, value in zip(self._routes[source, self._stage], message.tensors, strict=True):
                    take(name, value)

    def _overwrite(self, name: str, value: torch.Tensor) -> None:
        self._net.backbone.get_parameter(name).copy_(value)

    def _put(self, name: str, value: torch.Tensor) -> None:
        for k in self._modules:
            if k < len(self._net.sites):
                self._net.rule.take_in(self._net.sites[k], self._net.auxiliary[k], name, value)
