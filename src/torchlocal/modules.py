"""The local modules of a network, and their auxiliary networks."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Iterable, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from .cut.batches import Batch, plain, tensors_of
from .cut.forward import Forward, Pass
from .cut.units import Partition
from .rules import Rule, Site
from .tokens import chunks_scores

__all__ = ["LocalModules"]


class LocalModules(nn.Module):
    """A backbone, where it is cut into local modules, and their auxiliary networks: what steps work on.

    Called like the backbone, it is the backbone. ``parameters()`` are the backbone's, then the auxiliary networks'.

    Attributes:
        backbone: the user's network, trained in place.
        auxiliary: K - 1 auxiliary networks, thrown away after training.
        partition: the units and their grouping.
        rule: the local rule.
        criterion: loss of the task, ``criterion(output, target)``.
        sites: the places that the auxiliary networks were made for.
        chain: the network's own forward, as a chain of units.
        sample: a batch of the layout that the network was decoupled with; its floating-point tensors are empty.
        carry: what happens with tensors that carry gradients and cross a cut beside the features.
        boundaries: by unit, how the features that its module is handed, and their gradient, are rounded in a step, as
            if they came from another stage (see :mod:`torchlocal.boundary`); nothing by default.
    """

    def __init__(
        self,
        backbone: nn.Module,
        auxiliary: Iterable[nn.Module],
        *,
        chain: Forward,
        partition: Partition,
        rule: Rule,
        criterion: Callable[[Tensor, Any], Tensor],
        sites: Sequence[Site],
        sample: Batch,
        carry: str | None = None,
    ) -> None:
        super().__init__()
        self.backbone = backbone
        self.auxiliary = nn.ModuleList(auxiliary)
        self.chain = chain
        self.partition = partition
        self.rule = rule
        self.criterion = criterion
        self.sites = tuple(sites)
        self.sample, self.carry = sample, carry
        self.boundaries: dict[int, str] = {}

    @property
    def num_modules(self) -> int:
        """Number K of local modules."""
        return len(self.partition.groups)

    @property
    def to_read_out(self) -> bool:
        """Whether steps leave the network's read-out to the criterion, which never holds all scores."""
        return chunks_scores(self.criterion)

    @property
    def input_shape(self) -> torch.Size:
        """Shape of the first tensor of the sample."""
        return tensors_of(self.sample)[0].shape

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        """The backbone's own forward."""
        return self.backbone(*args, **kwargs)

    def compile(self, **options: Any) -> None:
        """Compile every local module and auxiliary network by itself, in place; keys stay as they are.

        Args:
            options: passed to :func:`torch.compile`.
        """
        self.compile_parts(range(len(self.auxiliary)), **options)

    def compile_parts(self, modules: Iterable[int], **options: Any) -> None:
        """Compile what runs of the backbone, and the auxiliary networks of these local modules."""
        options = _counted_apart(options, len(list(self.modules())))
        self.chain.compile(**options)
        for k in modules:
            if k < len(self.auxiliary):
                self.auxiliary[k].compile(**options)

    def module_parameters(self) -> list[list[nn.Parameter]]:
        """For each local module its parameters and its auxiliary network's, to give each an optimizer of its own.

        A parameter that several modules use (tied ones) belongs to the last of them, whose optimizer finds the sum of
        what they all give.
        """
        lists: list[list[nn.Parameter]] = [[] for _ in self.partition.groups]
        owners, seen = self.module_owners(), set()
        for parameters, group in zip(lists, self.partition.groups, strict=True):
            parameters += [p for p in self.chain.parameters(group.start, group.stop) if owners[id(p)] == group.start]
            seen |= {id(p) for p in parameters}
        starts = {group.start: k for k, group in enumerate(self.partition.groups)}
        for parameter in self.backbone.parameters():  # those that the forward was not seen to use
            if id(parameter) not in seen:
                lists[starts[owners[id(parameter)]]].append(parameter)
        for parameters, network in zip(lists, self.auxiliary, strict=False):
            parameters += network.parameters()
        return lists

    def module_owners(self) -> dict[int, int]:
        """For every tensor of the backbone, by ``id``, the first unit of the local module that it belongs to."""
        start_of = {unit: group.start for group in self.partition.groups for unit in group}
        return {key: start_of[unit] for key, unit in self.chain.owners().items()}

    def complete_at(self) -> list[int | None]:
        """For each local module the unit whose backward pass completes the gradients of its parameters."""
        first, owners = self.chain.first_users(), self.module_owners()
        complete: list[int | None] = []
        for group in self.partition.groups:
            users = [unit for key, unit in first.items() if owners.get(key) == group.start]
            complete.append(min([group.start, *users]))
        return complete

    @torch.no_grad()
    def depth_outputs(self, batch: Batch) -> list[Tensor]:
        """What each local module predicts, through its auxiliary network; the last is the backbone's prediction.

        Args:
            batch: what the network is called with.

        Returns:
            K tensors, each of the shape of the network's prediction.
        """
        batch = plain(batch)
        outputs: list[Tensor] = []
        ends = {group.stop: k for k, group in enumerate(self.partition.groups[:-1])}

        def passing(unit: int, features: Tensor) -> Tensor:
            k = ends[unit]
            outputs.append(self.rule.predict(self.sites[k], self.auxiliary[k], features))
            return features

        pass_ = Pass(self.chain, batch)
        with pass_.opened(tuple(ends)):
            outputs += pass_.run(0, self.chain.num_units, [], boundary=passing, stops=tuple(ends))
        return outputs

    def extra_repr(self) -> str:
        """Names of the local modules."""
        return f"local modules: {', '.join(self.partition.names)}; rule={self.rule!r}"


def _counted_apart(options: dict[str, Any], count: int) -> dict[str, Any]:
    """Options of :func:`torch.compile` by which modules that run the same forward function do not use up its limit.

    Auxiliary networks run the same forward functions; counted together they would pass the limit of recompiles, and the
    last of them silently run uncompiled.
    """
    if "isolate_recompiles" in inspect.signature(torch.compile).parameters:
        return {"isolate_recompiles": True, **options}
    limits: Any = torch._dynamo.config  # of older versions of torch, which only know one limit for all
    limits.recompile_limit = max(limits.recompile_limit, 8 * count)
    limits.accumulated_recompile_limit = max(limits.accumulated_recompile_limit, 8 * count)
    return options
