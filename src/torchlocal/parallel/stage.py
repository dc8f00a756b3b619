"""A rank's place among the others, and what they do together beside the steps."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from datetime import timedelta
from typing import Any, Self

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.utils._pytree import tree_map_only

from ..cut.units import Partition
from ..modules import LocalModules
from .channels import watched
from .load import Meter

__all__ = ["Stage"]


class Stage:
    """The local modules of one rank: their parameters, gradients and state among those of all ranks.

    Args:
        net: the decoupled network, the same on every rank.
        stages: the local modules of every stage.
        replicas: number of replicas.
        timeout: longest time to wait for another rank, in seconds.
    """

    def __init__(self, net: LocalModules, stages: Sequence[range], replicas: int, timeout: float) -> None:
        self.net, self.stages = net, list(stages)
        self._timeout, self.meter = timeout, Meter()
        self.device = next((p.device for p in net.parameters()), torch.device("cpu"))
        self.mesh = dist.init_device_mesh(
            self.device.type, (replicas, len(self.stages)), mesh_dim_names=("replicas", "modules")
        )
        self.replica, self.stage = self.mesh.get_local_rank("replicas"), self.mesh.get_local_rank("modules")
        self.modules = self.stages[self.stage]
        self._averages: list[tuple[Any, Tensor, list[Tensor]]] = []
        self._replicas_group = self.mesh.get_group("replicas") if replicas > 1 else None
        self._lists = net.module_parameters()
        self._owners = self._find_owners()
        limit = timedelta(seconds=timeout)
        for row in range(replicas):  # all ranks make all groups, in the same order
            group: Any = dist.new_group(self.row(row), backend="gloo", timeout=limit)
            if row == self.replica:
                self._control = group
        for stage in range(len(self.stages) if replicas > 1 else 0):
            ranks = [row * len(self.stages) + stage for row in range(replicas)]
            group = dist.new_group(ranks, backend="gloo", timeout=limit)
            if stage == self.stage:
                self._column = group

    def row(self, replica: int) -> list[int]:
        """The ranks of a replica."""
        return [replica * len(self.stages) + stage for stage in range(len(self.stages))]

    # --- who is who ---

    def named(self, rank: int) -> str:
        """A rank of this replica and its local modules, for messages."""
        modules = self.stages[rank % len(self.stages)]
        single = f"module {modules.stop}"
        found = single if len(modules) == 1 else f"modules {modules.start + 1} to {modules.stop}"
        return f"rank {rank} (local {found} of {self.num_modules})"

    @property
    def _others(self) -> str:
        """Whom a call waits for that all ranks of this replica make."""
        others = [rank for rank in self.row(self.replica) if rank != dist.get_rank()]
        return self.named(others[0]) if len(others) == 1 else "another rank of this replica"

    @property
    def num_modules(self) -> int:
        """Number K of local modules."""
        return self.net.num_modules

    @property
    def num_replicas(self) -> int:
        """Number of replicas."""
        return self.mesh.size(0)

    @property
    def is_first(self) -> bool:
        """Whether this is the first stage, which is given the batches."""
        return self.stage == 0

    @property
    def is_last(self) -> bool:
        """Whether this is the last stage, whose steps return all K losses."""
        return self.stage == len(self.stages) - 1

    @property
    def writer(self) -> int:
        """The rank that knows all losses, and should write: the last stage of the first replica."""
        return len(self.stages) - 1

    @property
    def is_writer(self) -> bool:
        """Whether this rank is the writer."""
        return dist.get_rank() == self.writer

    # What the decoupled network has, as far as a training loop asks for it.

    @property
    def backbone(self) -> nn.Module:
        """The user's network, see :attr:`net`."""
        return self.net.backbone

    @property
    def auxiliary(self) -> nn.ModuleList:
        """The auxiliary networks, see :attr:`net`."""
        return self.net.auxiliary

    @property
    def partition(self) -> Partition:
        """Units and local modules."""
        return self.net.partition

    def train(self, mode: bool = True) -> Self:
        """Put the network into training mode."""
        self.meter.pause()
        self.net.train(mode)
        return self

    def eval(self) -> Self:
        """Put the network into evaluation mode."""
        return self.train(False)

    def compile(self, **options: Any) -> None:
        """Compile the local modules of this rank; see :meth:`LocalModules.compile`."""
        self.net.compile_parts(self.modules, **options)

    def named_parameters(self) -> Iterator[tuple[str, nn.Parameter]]:
        """Names and parameters of this rank's local modules and auxiliary networks, in the network's order."""
        for name, parameter in self.net.named_parameters():
            if self._owners[name] == self.stage:
                yield name, parameter

    def parameters(self) -> Iterator[nn.Parameter]:
        """Parameters of this rank's local modules and auxiliary networks, in the network's order."""
        return (parameter for _, parameter in self.named_parameters())

    def module_parameters(self) -> list[list[nn.Parameter]]:
        """For each local module of this rank its parameters and its auxiliary network's."""
        return [list(self._lists[k]) for k in self.modules]

    def clip_guided(self, norm: float) -> None:
        """Clip the gradient of the global loss, whose norm all ranks share in, and that of each auxiliary network.

        Args:
            norm: largest norm.
        """
        names = [name for name, _ in self.net.backbone.named_parameters()]
        own = {name for name, _ in self.named_parameters()}
        found = [
            (i, p.grad)
            for i, (name, p) in enumerate(self.net.backbone.named_parameters())
            if f"backbone.{name}" in own and p.grad is not None
        ]
        norms = torch.zeros(2, len(names), dtype=torch.float64)
        if found:
            each = torch._foreach_norm([gradient for _, gradient in found], 2.0)
            values = torch.stack([value.to(torch.float64) for value in each]).cpu()  # together: each read waits
            norms[:, [i for i, _ in found]] = torch.stack([values, torch.ones_like(values)])
        with self.meter.others.clock(), watched(self._others, self._timeout):
            dist.all_reduce(norms, group=self._control)
        dtype = found[0][1].dtype if found else torch.float32
        total = torch.linalg.vector_norm(norms[0, norms[1] > 0].to(dtype), 2.0)
        mine = [p for name, p in self.named_parameters() if name.startswith("backbone.")]
        nn.utils.clip_grads_with_norm_(mine, norm, total.to(self.device))
        for k in self.modules:
            if k < len(self.net.auxiliary):
                nn.utils.clip_grad_norm_(self.net.auxiliary[k].parameters(), norm)

    # --- state ---

    def synchronize(self) -> None:
        """Bring the whole network up to date on every rank; every rank has to call it."""
        self.meter.pause()
        state = self.net.state_dict(keep_vars=True)
        first = self.replica * len(self.stages)
        with torch.no_grad(), watched(self._others, self._timeout):
            for name, tensor in state.items():
                if isinstance(tensor, Tensor):
                    # By hand, since a broadcast wants dense memory.
                    block = tensor.detach().contiguous()
                    dist.broadcast(block, first + self._owners[name], group=self._control)
                    if block.data_ptr() != tensor.data_ptr():
                        tensor.copy_(block)

    def state_dict(self) -> dict[str, Any]:
        """The decoupled network's ``state_dict``, up to date; every rank has to call it."""
        self.synchronize()
        return self.net.state_dict()

    def load_state_dict(self, state: Mapping[str, Any]) -> Any:
        """Load a ``state_dict`` of the decoupled network; every rank has to call it with the same."""
        return self.net.load_state_dict(state)

    def optimizer_state(self, optimizer: torch.optim.Optimizer) -> dict[str, Any] | None:
        """What the optimizer of a single process would have as its state; every rank has to call it.

        Args:
            optimizer: this rank's, over ``parameters()`` in one group; or in several, as many on every rank, each in
                the network's order, of which some may be empty.

        Returns:
            The state on the last stage, None elsewhere.
        """
        own, (numbers, groups) = optimizer.state_dict(), self._numbers(optimizer)
        part = {numbers[i]: tree_map_only(Tensor, Tensor.cpu, value) for i, value in own["state"].items()}
        first = self.replica * len(self.stages)
        parts: list[Any] | None = [None] * len(self.stages) if self.is_last else None
        with watched(self._others, self._timeout):
            dist.gather_object(part, parts, dst=first + len(self.stages) - 1, group=self._control)
        if parts is None:
            return None
        merged = {number: value for part in parts for number, value in part.items()}
        joined = [{**group, "params": params} for group, params in zip(own["param_groups"], groups, strict=True)]
        return {"state": {number: merged[number] for number in sorted(merged)}, "param_groups": joined}

    def load_optimizer_state(self, optimizer: torch.optim.Optimizer, state: Mapping[str, Any]) -> None:
        """Load what belongs to this rank of the state of a single process's optimizer; every rank has to call it."""
        numbers, _ = self._numbers(optimizer)
        own = {i: state["state"][number] for i, number in numbers.items() if number in state["state"]}
        groups = zip(state["param_groups"], optimizer.state_dict()["param_groups"], strict=True)
        joined = [{**theirs, "params": ours["params"]} for theirs, ours in groups]
        optimizer.load_state_dict({"state": own, "param_groups": joined})

    def sum_over_stages(self, values: Tensor) -> Tensor:
        """The sum of a tensor over the stages of this replica, on every one of them."""
        total = values.detach().cpu()
        with watched(self._others, self._timeout):
            dist.all_reduce(total, group=self._control)
        return total.to(values.device)

    def average_over_replicas(self, values: Tensor) -> Tensor:
        """The mean of a tensor over the ranks that hold the same modules."""
        if self._replicas_group is None:
            return values
        total = values.detach().clone()
        with watched("the same stage of another replica", self._timeout):
            dist.all_reduce(total, group=self._replicas_group)
        return total / self.num_replicas

    def _largest_of_replicas(self, value: int) -> int:
        """The largest of what the ranks that hold the same modules have."""
        if self._replicas_group is None:
            return value
        held = torch.tensor(value)  # on the CPU: reading it from a device would wait for all that is under way there
        with self.meter.others.clock(), watched("the same stage of another replica", self._timeout):
            dist.all_reduce(held, dist.ReduceOp.MAX, group=self._column)
        return int(held)

    def _average(self, modules: Sequence[int]) -> None:
        """Start to average the gradients of local modules over the replicas."""
        if self._replicas_group is None:
            return
        for k in modules:
            by_dtype: dict[torch.dtype, list[Tensor]] = {}
            for parameter in self._lists[k]:
                if parameter.grad is not None:
                    by_dtype.setdefault(parameter.grad.dtype, []).append(parameter.grad)
            for gradients in by_dtype.values():
                flat = torch.cat([gradient.reshape(-1) for gradient in gradients])
                work = dist.all_reduce(flat, group=self._replicas_group, async_op=True)
                self._averages.append((work, flat, gradients))

    def _finish_averages(self) -> None:
        with watched("the same stage of another replica", self._timeout):
            while self._averages:
                work, flat, gradients = self._averages.pop(0)
                with self.meter.others.clock():
                    work.wait()
                flat /= self.num_replicas
                parts = flat.split([gradient.numel() for gradient in gradients])
                for gradient, part in zip(gradients, parts, strict=True):
                    gradient.copy_(part.view(gradient.shape))

    def _find_owners(self) -> dict[str, int]:
        """For every tensor of the state the stage that it belongs to; those that no module uses go to the last one."""
        net, owner = self.net, dict[int, int]()
        starts = {net.partition.groups[k].start: stage for stage, modules in enumerate(self.stages) for k in modules}
        for key, unit in net.module_owners().items():
            owner[key] = starts[unit]
        for stage, modules in enumerate(self.stages):
            for network in (net.auxiliary[k] for k in modules if k < len(net.auxiliary)):
                for tensor in [*network.parameters(), *network.buffers()]:
                    owner.setdefault(id(tensor), stage)
        last = len(self.stages) - 1
        return {name: owner.get(id(tensor), last) for name, tensor in net.state_dict(keep_vars=True).items()}

    def _numbers(self, optimizer: torch.optim.Optimizer) -> tuple[dict[int, int], list[list[int]]]:
        """For every parameter of this rank's optimizer its number in that of a single process, and those by group."""
        places = {id(parameter): i for i, parameter in enumerate(self.net.parameters())}
        own = [[places[id(p)] for p in group["params"]] for group in optimizer.param_groups]
        parts: list[Any] = [None] * len(self.stages)
        with watched(self._others, self._timeout):
            dist.all_gather_object(parts, own, group=self._control)
        if len({len(part) for part in parts}) > 1 or any(places != sorted(places) for places in own):
            raise ValueError(
                "optimizer: its parameter groups cannot be joined over the ranks; make as many on every rank, each "
                "with its parameters in the network's order"
            )
        joined = [sorted(place for group in groups for place in group) for groups in zip(*parts, strict=True)]
        number = {place: i for i, place in enumerate(place for group in joined for place in group)}
        own_numbers = dict(enumerate(number[place] for group in own for place in group))
        return own_numbers, [[number[place] for place in group] for group in joined]
