"""A decoupled network on several processes: every rank trains some of its local modules."""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping, Sequence
from datetime import timedelta
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor
from torch._subclasses import FakeTensor

from ..boundary import Original, decode, encode
from ..cut.batches import Batch as Inputs
from ..cut.batches import key_of, num_examples, plain
from ..cut.forward import Pass, filled
from ..engine import Step, SupportsStep, apply, check_arguments, check_optimizers, follows
from ..memory.plans import local_plans, plan_and_parts
from ..micro import cut_batch, divisor
from ..modules import LocalModules
from ..recompute import GuidedPlan, Plan
from ..rules import Batch
from .channels import Channel, Message, watched
from .load import NUM_NUMBERS, Load, Waits
from .pipelined import Schedule
from .readers import Readers
from .rehearsal import Rehearsal, count_flops, layouts, rehearse
from .shares import better_shares, shared_buffer
from .stage import Stage
from .tasks import Task, pack, random_state, restrict, set_random_state, stack, unpack
from .ties import Ties, find_ties

__all__ = ["ParallelNetwork"]

_LOCAL, _GUIDED, _PIPED, _LOSSES, _OUTPUTS = 1, 2, 3, 4, 5  # kinds of messages
_SCHEDULES = ("1f1b", "gpipe")
_LOOK_EVERY = 0.5  # seconds


class ParallelNetwork(Stage):
    """A decoupled network whose local modules live on several ranks; made by :func:`distribute`.

    It has the steps of :class:`LocalModules`. On all stages but the first, batches are left out. Every rank holds
    the whole network, but trains its own local modules: ``parameters()`` are theirs, for the optimizer of this rank.

    Random numbers are those of a single process: the random state that a step begins with on the first stage travels
    along, and every rank draws what the modules of the others draw (see :mod:`torchlocal.parallel.rehearsal`).

    A parameter that modules of several ranks use (tied ones) is updated by the last of them, see
    :mod:`torchlocal.parallel.ties`; one that local losses only read, by its own module, see
    :mod:`torchlocal.parallel.readers`.

    Attributes:
        net: the decoupled network. The parameters of other ranks' modules are out of date until
            :meth:`synchronize`.
        mesh: the device mesh (replicas × modules).
        replica: row of this rank.
        stage: column of this rank.
        stages: the local modules of every stage.
        modules: the local modules of this stage.
        stop_requested: set to a number other than 0, for example by a signal handler, it travels with the batches from
            the first stage on, which learns of it within half a second where another stage was asked.
        stopping: what it was when the last step began; the same on all ranks after the same step.
        meter: how busy this stage is, see :meth:`loads`.
    """

    def __init__(
        self,
        net: LocalModules,
        stages: Sequence[range],
        replicas: int = 1,
        *,
        costs: Sequence[float] | None = None,
        boundary: str | None = None,
        in_flight: int = 4,
        timeout: float = 300.0,
    ) -> None:
        super().__init__(net, stages, replicas, timeout)
        self._costs = costs  # of each local module, by which they were shared out
        # The loads of the stages before this one, as of the batch that came last.
        self._told = [0] * (self.stage * NUM_NUMBERS)
        self._measured_from = Load()
        self.boundary = boundary
        self._piped_bytes = 0
        self.stop_requested = self.stopping = 0
        self._looked = 0.0  # when this stage last looked whether another was asked to stop
        self._rehearsals: dict[tuple[Any, ...], Rehearsal] = {}
        self._layouts: dict[Any, dict[Any, Any]] = {}
        self._schedules: dict[tuple[Any, ...], Schedule] = {}
        self._to_next: Channel | None = None
        self._from_previous: Channel | None = None
        self._to_previous: Channel | None = None
        self._from_next: Channel | None = None
        self._make_groups()
        self._in_flight = in_flight
        self._connect()

    @property
    def bytes_sent(self) -> int:
        """Bytes of tensors that this rank has sent to its neighbours."""
        channels = (self._to_next, self._to_previous, *self._ties.channels, *self._readers.channels)
        return self._piped_bytes + sum(c.num_bytes for c in channels if c is not None)

    def loads(self) -> list[Load]:
        """How busy the stages up to this one have been; on the last stage, all of them.

        The difference of two is what was in between. The numbers of the others are as of the batch that this stage had
        last, with which they came. Guided steps in micro-batches that overlap are left out: what waits there is not to
        be seen from outside.
        """
        before = [self._told[i : i + NUM_NUMBERS] for i in range(0, len(self._told), NUM_NUMBERS)]
        return [*map(Load.of, before), self.meter.total()]

    # --- steps ---

    def local_step(
        self,
        batch: Inputs | None = None,
        target: Any = None,
        *,
        recompute: str | dict[int, Plan] | None = None,
        autocast: torch.dtype | None = None,
        backward: Callable[[Tensor], Any] | None = None,
        scale: float = 1.0,
        optimizers: Sequence[SupportsStep] | None = None,
    ) -> list[Tensor]:
        """A local step of this rank's modules; see :func:`torchlocal.local_step`.

        Args:
            batch: what the network is called with, on the first stage.
            target: its target, on the first stage.
            recompute: as there.
            autocast: as there.
            backward: as there.
            scale: as there.
            optimizers: as there, but one for each local module of this rank.

        Returns:
            The losses of the local modules up to the last one of this rank; on the last stage all K.
        """
        self._check(optimizers, backward, scale)
        options = (str(autocast), scale)
        task = self._begin(_LOCAL, batch, target, options, weight=self._weight(target))
        if self.is_first:
            task.plan = local_plans(self.net, task.batch.input, target, recompute, autocast=autocast)
        rehearsal = self._rehearse(task.batch.input, task.batch.target, autocast)
        self._enter(task, rehearsal)
        step = self._step(task, rehearsal, autocast, backward, scale, follow=True)
        step.optimizers = optimizers

        def learnt(k: int) -> None:
            self._ties.take()
            self._average([k])
            if optimizers is not None:
                self._finish_averages()

        step.learnt = learnt
        self._ties.add_gradients(_LOCAL)
        plans = {k: plan for k, plan in task.plan.items() if k in self.modules}
        found, state = step.local(self.modules, plans, task.state)
        self._ties.send_gradients(_LOCAL)
        losses = [*task.losses, *found]
        self._hand_on(_LOCAL, task, state, losses, options, step.run)
        self._skip_after(rehearsal, follow=True)
        self._finish_averages()
        return losses

    def guided_step(
        self,
        batch: Inputs | None = None,
        target: Any = None,
        *,
        auxiliary: str = "follow",
        recompute: str | int | None = None,
        memory: str | int | GuidedPlan | None = None,
        micro_batches: int | None = None,
        schedule: str = "1f1b",
        autocast: torch.dtype | None = None,
        backward: Callable[[Tensor], Any] | None = None,
        scale: float = 1.0,
        optimizers: Sequence[SupportsStep] | None = None,
    ) -> list[Tensor]:
        """A guided step through the modules of all ranks; see :func:`torchlocal.guided_step`.

        By default the batch goes forward through the stages and its gradient back, one stage at a time: bit for bit
        what a single process does with the same options. With ``micro_batches`` the stages overlap, as scheduled by
        ``torch.distributed.pipelining`` (Huang et al., "GPipe", 2019; Narayanan et al., "PipeDream", 2019): what a
        single process does with that many micro-batches, of which BatchNorm then sees one at a time.

        Args:
            batch: what the network is called with, on the first stage.
            target: its target, on the first stage.
            auxiliary: as there.
            recompute: as there.
            memory: as there.
            micro_batches: number of equal parts that the batch is cut into; nothing is recomputed then. With ``memory``
                it is as there, and nothing overlaps.
            schedule: order of the parts: ``"1f1b"`` or ``"gpipe"``.
            autocast: as there.
            backward: as there; not with ``micro_batches``.
            scale: as there.
            optimizers: as there, but one for each local module of this rank.

        Returns:
            The losses known to this rank, on the last stage what :func:`torchlocal.guided_step` returns.
        """
        self._check(optimizers, backward, scale)
        follow = follows(self.net, auxiliary)
        options = (auxiliary, str(autocast), scale)
        if micro_batches is not None and memory in (None, "full"):
            if schedule not in _SCHEDULES:
                raise ValueError(f"schedule: must be one of {', '.join(_SCHEDULES)}, not {schedule!r}")
            if backward is not None or recompute is not None:
                raise ValueError("micro_batches: backward and recompute cannot be given with it; leave them out")
            return self._piped(batch, target, micro_batches, schedule, follow, autocast, scale, optimizers, options)
        parts: list[Any] = [(None, None, 1.0)]
        plan, weight = None, self._weight(target)
        if self.is_first:
            batch = self._fitting(batch)
            plan, parts = plan_and_parts(
                self.net,
                batch,
                target,
                auxiliary=auxiliary,
                recompute=recompute,
                memory=memory,
                micro_batches=micro_batches,
                autocast=autocast,
                optimizers=optimizers,
            )
        # Gradients of replicas have to be averaged before they are used, and those of tied parameters to be complete.
        early = optimizers if self._replicas_group is None and not self._ties.owned() else None
        total: list[Tensor] = []
        i = 0
        while i < len(parts):
            inputs, labels, share = parts[i]
            task = self._begin(_GUIDED, inputs, labels, options, share=share, weight=weight, new=i == 0, learns=follow)
            if self.is_first:
                task.plan = plan
            plan = task.plan
            parts = parts if self.is_first else [(None, None, 1.0)] * plan.micro_batches
            rehearsal = self._rehearse(task.batch.input, task.batch.target, autocast)
            self._enter(task, rehearsal)
            step = self._step(task, rehearsal, autocast, backward, scale, follow=follow)
            step.part_of(parts, task.share, follow=follow)
            step.matches = auxiliary == "match"
            step.optimizers = early if i == len(parts) - 1 else None
            losses = self._guided(step, task, plan.tree, follow, options)
            self._skip_after(rehearsal, follow=follow)
            total = [a + b for a, b in zip(total, losses, strict=True)] if total else losses
            i += 1
        if early is None:
            self._average(self.modules)
            self._finish_averages()
            for optimizer in optimizers or ():
                apply(optimizer)
        return total

    def _guided(self, step: Step, task: Task, plan: Plan, follow: bool, options: tuple[Any, ...]) -> list[Tensor]:
        """One micro-batch of an exact guided step, forward and backward through this stage's modules."""
        losses = task.losses
        first, last = step.units(self.modules)
        ties = self._ties.guided(plan, first, last)

        def onward(outputs: list[Any]) -> list[Tensor | None]:
            assert self._from_next is not None
            self._hand_on(_GUIDED, task, outputs, losses, options, step.run)
            message = self._from_next.receive(_GUIDED)
            original, numbers = message.extra
            gradient, *sums = message.tensors
            ties.arrived(dict(zip(numbers, sums, strict=True)))
            return [decode(gradient, original, self.boundary)]

        with ties.watching():
            gradients = step.through(
                self.modules,
                restrict(plan, first, last),
                task.state,
                losses,
                follow=follow,
                onward=None if self.is_last else onward,
                around=ties.around,
            )
        if self._to_previous is not None:
            assert gradients[0] is not None, "the features of every stage have a gradient"
            original, block = Original.of(gradients[0]), encode(gradients[0], self.boundary)
            partial = ties.to_hand_on()
            self._to_previous.send(_GUIDED, [block, *partial.values()], extra=(original, tuple(partial)))
        self._ties.end_guided(_GUIDED, ties.made)
        return losses

    def _piped(
        self,
        batch: Inputs | None,
        target: Any,
        count: int,
        schedule: str,
        follow: bool,
        autocast: torch.dtype | None,
        scale: float,
        optimizers: Sequence[SupportsStep] | None,
        options: tuple[Any, ...],
    ) -> list[Tensor]:
        """A guided step by torch.distributed.pipelining."""
        if tied := self._ties.learning():
            raise ValueError(
                f"micro_batches: {tied[0]!r} is used by local modules on several ranks, and schedules that overlap do "
                "not add its gradients up in the order of a single process; leave micro_batches out, or put those "
                "modules on one rank with assignment="
            )
        if schedule == "1f1b" and isinstance(count, int) and 1 <= count < len(self.stages):
            raise ValueError(
                f"micro_batches: 1f1b wants no fewer parts than there are stages, {len(self.stages)}, not {count};"
                ' give more, or schedule="gpipe"'
            )
        if self.is_first:
            batch = self._fitting(batch)
            size = num_examples(batch)
            if isinstance(count, bool) or not isinstance(count, int) or count < 1 or size % count:
                raise ValueError(f"micro_batches: {size} examples cannot be cut into {count!r} equal parts")
            cut_batch(self.net, batch, target, count, follow=follow)  # refuses before anything is sent
        if follow and self._readers.lags:
            raise ValueError(
                f"micro_batches: {self.net.rule!r} counts local losses, of which schedules that overlap make several "
                "at a time; leave micro_batches out, give auxiliary='frozen', or a lag of 1"
            )
        options = (*options, count, schedule)
        task = self._begin(_PIPED, batch, target, options, weight=self._weight(target), learns=follow)
        parts = cut_batch(self.net, task.batch.input, task.batch.target, count, follow=follow)
        part, labels, _ = parts[0]
        rehearsal = self._rehearse(part, labels, autocast, always=True)
        self._enter(task, rehearsal)
        self._hand_on(_PIPED, task, [torch.empty(0)], [], options)
        steps = []
        for part, labels, share in parts:
            step = Step.begin(self.net, part, labels, autocast, None, scale)
            step.weight = task.weight
            step.part_of(parts, share, follow=follow)
            step.matches = options[0] == "match"
            step.outputs = None if self.is_first else rehearsal.outputs
            steps.append(step)
        key = (key_of(part), autocast, count, schedule)
        if key not in self._schedules:
            self._schedules[key] = Schedule(
                net=self.net,
                stage=self.stage,
                stages=self.stages,
                rehearsal=rehearsal,
                count=count,
                schedule=schedule,
                device=self.device,
                group=self._pipe_group,
                boundary=self.boundary,
            )
        with watched(self._others, self._timeout):
            losses: list[Tensor] = self._schedules[key].step(steps, rehearsal, follow=follow)
        self._piped_bytes += self._schedules[key].num_bytes
        if self._from_previous is not None:
            losses = [*self._from_previous.receive(_LOSSES).tensors[0].unbind(), *losses]
        if self._to_next is not None:
            self._to_next.send(_LOSSES, [stack(losses)])
        self._average(self.modules)
        self._finish_averages()
        for optimizer in optimizers or ():
            apply(optimizer)
        return losses

    @torch.no_grad()
    def depth_outputs(
        self, batch: Inputs | None = None, target: Any = None, *, all_depths: bool = True
    ) -> tuple[dict[int, Tensor], Any]:
        """What the local modules of this rank predict, and the target, which travels along.

        Args:
            batch: what the network is called with, on the first stage.
            target: its target, on the first stage.
            all_depths: also through the auxiliary networks; else only the network's prediction, on the last stage.

        Returns:
            The predictions by local module, and the target.
        """
        task = self._begin(_OUTPUTS, batch, target, (), learns=False)
        net, inputs, outputs = self.net, task.batch.input, dict[int, Tensor]()
        groups = net.partition.groups
        first, last = groups[self.modules[0]].start, groups[self.modules[-1]].stop
        ends = {groups[k].stop: k for k in self.modules if k < self.num_modules - 1}

        def passing(unit: int, features: Tensor) -> Tensor:
            k = ends[unit]
            outputs[k] = net.rule.predict(net.sites[k], net.auxiliary[k], features)
            return features

        pass_ = Pass(net.chain, inputs, outputs=self._beside(self._layout(inputs), task))
        inner = tuple(unit for unit in ends if unit != last) if all_depths else ()
        with pass_.opened(tuple(ends) if first == 0 else None):
            (result,) = pass_.run(first, last, task.state, boundary=passing, stops=inner)
        if self.is_last:
            outputs[self.num_modules - 1] = result
        elif all_depths:
            passing(last, result)
        self._hand_on(_OUTPUTS, task, [result], [], (), pass_)
        return outputs, task.batch.target

    def close(self) -> None:
        """Wait until all that was sent has arrived, and end the background threads; every rank has to call it."""
        self.meter.pause()
        self._readers.settle()
        neighbours = (self._from_previous, self._to_next, self._to_previous, self._from_next)
        for channel in (*neighbours, *self._ties.channels, *self._readers.channels):
            if channel is not None:
                channel.close()

    def synchronize(self) -> None:
        """Bring the whole network up to date on every rank; every rank has to call it."""
        self._readers.settle()
        super().synchronize()

    def rebalance(self, *optimizers: torch.optim.Optimizer) -> list[dict[str, Any]] | None:
        """Share the local modules out anew, by the time that every stage took for a batch since the last call.

        Every rank has to call it, between two steps; what is trained stays the same, bit for bit. A stage is taken to
        be slower or faster than the others by the same factor for every module. Nothing changes unless that promises
        to make the slowest stage at least 5 % faster, nor where the new shares would tie ranks to each other that are
        not (by a parameter, or a buffer, that two modules use).

        Args:
            optimizers: of this rank; see :meth:`optimizer_state`.

        Returns:
            None, where nothing has changed. Otherwise ``modules`` and ``parameters()`` are others: what each optimizer
            of a single process would have as its state, for :meth:`load_optimizer_state` of a new one.

        Raises:
            ValueError: the result would depend on the shares, or times are not to be had, on every rank.
        """
        if self.boundary is not None:
            raise ValueError(
                "rebalance: with a boundary that rounds, the result depends on where stages meet, so it would depend "
                "on measured times; leave one of them out"
            )
        if self.device.type != "cpu":
            raise ValueError(
                f"rebalance: the clock of the host does not tell how long {self.device.type} computes; give the number "
                "of modules of each stage as assignment= instead"
            )
        now = self.meter.total()
        taken, self._measured_from = now - self._measured_from, now
        gathered: list[Any] = [None] * dist.get_world_size()
        with watched("another rank", self._timeout):
            dist.all_gather_object(gathered, (taken.seconds_busy, taken.batches))
        by_stage = [gathered[stage :: len(self.stages)] for stage in range(len(self.stages))]
        if not all(batches and seconds for row in by_stage for seconds, batches in row):
            return None
        costs = count_flops(self.net) if self._costs is None else self._costs
        stages = better_shares(costs, self.stages, [max(s / n for s, n in row) for row in by_stage])
        return None if stages is None or self._binds(stages) else self._move(stages, optimizers)

    def _binds(self, stages: Sequence[range]) -> bool:
        """Whether stages would share what these do not."""
        names = {tie.name for tie in find_ties(self.net, self.stages)}
        if any(tie.name not in names for tie in find_ties(self.net, stages)):
            return True
        return shared_buffer(self.net, stages) is not None

    def _move(self, stages: Sequence[range], optimizers: Sequence[torch.optim.Optimizer]) -> list[dict[str, Any]]:
        """Have other modules on every rank; returns the optimizers' states."""
        self.synchronize()
        states: list[Any] = [self.optimizer_state(optimizer) for optimizer in optimizers]
        with watched(self._others, self._timeout):
            dist.broadcast_object_list(states, src=self._rank(len(self.stages) - 1), group=self._control)
        self.close()
        self.stages = list(stages)
        self.modules = self.stages[self.stage]
        self._owners = self._find_owners()
        self._schedules.clear()
        self._connect()
        return states

    def load_state_dict(self, state: Mapping[str, Any]) -> Any:
        """Load a ``state_dict`` of the decoupled network; every rank has to call it with the same."""
        self._readers.settle()
        loaded = super().load_state_dict(state)
        self._readers.restart()
        return loaded

    # --- inside ---

    def _make_groups(self) -> None:
        """Connections that serve however the modules are shared out."""
        limit = timedelta(seconds=self._timeout)
        each = [range(k, k + 1) for k in range(self.num_modules)]
        tied, read = bool(find_ties(self.net, each)), bool(Readers(self.net, each, 0))
        for replica in range(self.num_replicas):  # all ranks make all groups, in the same order
            ranks = self.row(replica)
            pipe: Any = dist.new_group(ranks, timeout=limit)
            kinds = ("forward", "backward", *(("values", "gradients") if tied else ()), *(("read",) if read else ()))
            groups = {kind: self._new_groups(ranks, limit) for kind in kinds}
            if replica == self.replica:
                self._pipe_group, self._groups = pipe, groups

    def _connect(self) -> None:
        """Make the channels between the stages as they are now."""
        me, meter = dist.get_rank(), self.meter
        self._ties = Ties(
            find_ties(self.net, self.stages),
            self.stage,
            lambda source, destination, values: self._channel(
                self._rank(source), self._rank(destination), "values" if values else "gradients", meter.others
            ),
        )
        self._readers = Readers(self.net, self.stages, self.stage)
        self._readers.connect(
            lambda source, destination: self._channel(self._rank(source), self._rank(destination), "read", meter.others)
        )
        if not self.is_last:
            self._to_next = self._channel(me, me + 1, "forward", meter.next, (self.stage + 1) * NUM_NUMBERS)
            self._from_next = self._channel(me + 1, me, "backward", meter.others)
        if not self.is_first:
            self._from_previous = self._channel(me - 1, me, "forward", meter.previous, self.stage * NUM_NUMBERS)
            self._to_previous = self._channel(me, me - 1, "backward", meter.others)

    def _rank(self, stage: int) -> int:
        """The rank of a stage of this replica."""
        return self.row(self.replica)[stage]

    def _new_groups(self, ranks: list[int], limit: timedelta) -> tuple[Any, Any]:
        headers = dist.new_group(ranks, backend="gloo", timeout=limit)
        return (headers if self.device.type == "cpu" else dist.new_group(ranks, timeout=limit)), headers

    def _channel(self, source: int, destination: int, kind: str, waits: Waits, num_notes: int = 0) -> Channel:
        groups, me = self._groups[kind], dist.get_rank()
        peer = destination if source == me else source
        return Channel(
            source,
            destination,
            group=groups[0],
            headers=groups[1],
            device=self.device,
            depth=self._in_flight,
            timeout=self._timeout,
            peer=self.named(peer),
            num_notes=num_notes,
            waits=waits,
        )

    def _check(
        self, optimizers: Sequence[SupportsStep] | None, backward: Callable[[Tensor], Any] | None, scale: float
    ) -> None:
        if not torch.is_grad_enabled():
            raise ValueError(
                "step: gradients are switched off here (torch.no_grad), so nothing would learn; take it outside"
            )
        if optimizers is not None and len(optimizers) != len(self.modules):
            raise ValueError(
                f"optimizers: {len(optimizers)} given for the {len(self.modules)} local modules of this rank; make one "
                "for each list of parameters that module_parameters() returns"
            )
        check_optimizers(optimizers, len(self.modules), backward, scale)

    def _weight(self, target: Any) -> Tensor | None:
        """How much the first stage's batch counts in the mean over the replicas: as in the loss of all their batches.

        What the criterion of the replicas' batches together divides by is the sum of what it divides each by. The loss
        of one that is not known counts the same in every replica.
        """
        if self._replicas_group is None or (count := divisor(self.net.criterion, target)) is None:
            return None
        count = count.to(self.device)
        total = count.clone()
        with self.meter.others.clock(), watched("the same stage of another replica", self._timeout):
            dist.all_reduce(total, group=self._replicas_group)
        return torch.where(total > 0, count / total, 1.0) * self.num_replicas

    def _fitting(self, batch: Inputs | None) -> Inputs:
        """The batch of a step, on the first stage."""
        if batch is None:
            raise ValueError("batch: the first stage has to be given the batch")
        return check_arguments(self.net, batch)

    def _begin(
        self,
        kind: int,
        batch: Inputs | None,
        target: Any,
        options: tuple[Any, ...],
        *,
        share: Any = 1.0,
        weight: Tensor | None = None,
        new: bool = True,
        learns: bool = True,
    ) -> Task:
        """The next batch: on the first stage the one that is given, elsewhere the one that arrives."""
        criterion = self.net.criterion
        if kind in (_LOCAL, _GUIDED):
            self.meter.begin()
        else:
            self.meter.pause()
        if self.is_first:
            batch = plain(batch) if kind == _OUTPUTS and batch is not None else self._fitting(batch)
            self._hear_of_stop()
            self.stopping = self._largest_of_replicas(self.stop_requested)
        elif batch is not None:
            raise ValueError(
                f"batch: rank {dist.get_rank()} is no first stage, leave the batch out; it comes from there"
            )
        else:
            self._tell_of_stop()
        if new:
            self._ties.share_values(kind)
        self._readers.begin(new=new, learns=learns)
        if self.is_first:
            return Task(Batch(input=batch, target=target, criterion=criterion), share=share, weight=weight)
        assert self._from_previous is not None
        message: Message = self._from_previous.receive(kind)
        original, packed, labels, plan, given, places = message.extra
        if given != options:
            raise RuntimeError(
                f"the step was called with {options} here and with {given} on the first stage: give the same options "
                "on every rank"
            )
        self.stopping, self._told = message.flag, message.notes
        features, losses, *tensors = message.tensors
        batch = unpack(packed, tensors, self.device, self.net.chain.mode)
        target, share, weight = unpack(labels, tensors, self.device, self.net.chain.mode)
        arrived = Batch(input=batch, target=target, criterion=criterion)
        beside = {place: tensors.pop(0) for place in places}
        state = [decode(features, original, self._boundary_of(kind))]
        return Task(arrived, state, list(losses.unbind()), plan, tensors, share, weight, beside)

    def _tell_of_stop(self) -> None:
        """Leave word for the first stage, since batches travel one way only."""
        if self.stop_requested and not self.stopping:
            self._store.set(self._stop_key, str(self.stop_requested))

    def _hear_of_stop(self) -> None:
        """Look for word of another stage, now and then: the store is another process."""
        if len(self.stages) > 1 and not self.stop_requested and time.monotonic() > self._looked + _LOOK_EVERY:
            if self._store.check([self._stop_key]):
                self.stop_requested = int(self._store.get(self._stop_key))
            self._looked = time.monotonic()

    @property
    def _store(self) -> dist.Store:
        return dist.distributed_c10d._get_default_store()  # there is no public name

    @property
    def _stop_key(self) -> str:
        return f"torchlocal/stop/{self._pipe_group.group_name}"

    def _hand_on(
        self,
        kind: int,
        task: Task,
        state: list[Tensor],
        losses: list[Tensor],
        options: tuple[Any, ...],
        run: Pass | None = None,
    ) -> None:
        """Send a batch, and the features that are taken out of their list, to the next stage."""
        if self._to_next is None:
            return
        features = state.pop()
        original, block = Original.of(features), encode(features, self._boundary_of(kind))
        del features
        wanted = None if self.net.rule.reads_input and kind != _OUTPUTS else self._read_later
        inputs, packed = pack(task.batch.input, self.device, wanted)
        targets, labels = pack((task.batch.target, task.share, task.weight), self.device)
        # What the last module returned beside the features; what depends on a stand-in is one, too.
        beside = {i: t for i, t in run.beside.items() if not isinstance(t, FakeTensor)} if run is not None else {}
        tensors = [block, stack(losses), *inputs, *targets, *beside.values(), *task.random]
        extra = (original, packed, labels, task.plan, options, tuple(beside))
        notes = [*self._told, *self.meter.total().numbers()]
        self._to_next.send(kind, tensors, flag=self.stopping, extra=extra, notes=notes)

    def _beside(self, outputs: dict[Any, Any], task: Task) -> dict[Any, Any] | None:
        """What the calls return that are left out here."""
        if self.is_first:
            return None
        first = self.net.partition.groups[self.modules.start].start
        facts = self.net.chain.facts
        before = {key: value for key, value in outputs.items() if key in facts.before[first]}
        return filled(before, facts.points[first - 1][0], task.beside)

    @property
    def _read_later(self) -> set[int]:
        """The floating-point tensors of the batch that later stages read."""
        groups, inputs = self.net.partition.groups, self.net.chain.facts.inputs
        return {leaf for modules in self.stages[self.stage + 1 :] for leaf in inputs[groups[modules.start].start]}

    def _boundary_of(self, kind: int) -> str | None:
        """How features are sent in a message: those of evaluation as they are, so that it is that of one process."""
        return self.boundary if kind in (_LOCAL, _GUIDED) else None

    def _rehearse(self, batch: Inputs, target: Any, autocast: torch.dtype | None, *, always: bool = False) -> Rehearsal:
        """What a step of such a batch draws; found once for each layout of batch, and not where nobody asks."""
        if len(self.stages) == 1 and not always:
            return Rehearsal(draws=[], losses=[], features=[], outputs={}, decides=False)
        flags = tuple(module.training for module in self.net.modules())
        key = (key_of(batch), autocast, flags)
        if key not in self._rehearsals:
            if len(self._rehearsals) > 8:
                self._rehearsals.clear()
            found = rehearse(self.net, batch, target, device=self.device, autocast=autocast)
            if len(self.stages) > 1 and found.random:
                self._refuse_random(found)
            self._rehearsals[key] = found
        return self._rehearsals[key]

    def _layout(self, batch: Inputs) -> dict[Any, Any]:
        """What the calls return that are left out; found once for each layout of batch."""
        key = key_of(batch)
        if not self.is_first and key not in self._layouts:
            if len(self._layouts) > 8:
                self._layouts.clear()
            self._layouts[key] = layouts(self.net, batch, device=self.device)
        return self._layouts.get(key, {})

    def _refuse_random(self, rehearsal: Rehearsal) -> None:
        chain = self.net.chain
        if chain.compiled is not None or any(m.__dict__.get("_compiled_call_impl") for m in self.net.modules()):
            raise ValueError(
                "compile: a network that draws random numbers (dropout) cannot be compiled on several ranks, since "
                "compiled modules draw others; leave compile out"
            )
        if rehearsal.decides or not chain.facts.fake:
            reason = "random numbers (layers left out at random?)" if rehearsal.decides else "its features"
            raise ValueError(
                f"model: its forward draws random numbers and decides by the values of {reason} what it does, so a "
                "rank cannot tell what the modules of the others draw; switch that off, or use one rank per replica"
            )

    def _enter(self, task: Task, rehearsal: Rehearsal) -> None:
        """Come to the random state that the step begins with on the first stage."""
        if rehearsal.random and self.is_first:
            task.random = random_state(self.device)
        elif rehearsal.random:
            set_random_state(task.random, self.device)

    def _step(
        self,
        task: Task,
        rehearsal: Rehearsal,
        autocast: torch.dtype | None,
        backward: Callable[[Tensor], Any] | None,
        scale: float,
        *,
        follow: bool,
    ) -> Step:
        """A step that knows what comes before this stage; what the modules there draw is drawn."""
        step = Step.begin(self.net, task.batch.input, task.batch.target, autocast, backward, scale)
        step.weight = task.weight
        if not self.is_first:
            step.outputs = self._beside(rehearsal.outputs, task)
            step.entering = rehearsal.skip(self.net, range(self.modules.start), self.device, follow=follow)
        return step

    def _skip_after(self, rehearsal: Rehearsal, *, follow: bool) -> None:
        """Come to the random state at the end of the step; only the first stage goes on from there."""
        if self.is_first and rehearsal.random:
            rehearsal.skip(self.net, range(self.modules.stop, self.num_modules), self.device, follow=follow)
