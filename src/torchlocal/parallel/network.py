"""A decoupled network on several processes: every rank trains some of its local modules."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from datetime import timedelta
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor
from torch.utils._pytree import tree_flatten, tree_unflatten

from ..network import DecoupledNetwork
from ..recompute import Plan, Recomputation
from ..rules import Batch
from ..schedule import GuidedPlan
from ..steps import Run, SupportsStep, apply, check_arguments, split_batch
from .channels import Channel, Message, watched
from .pipelined import Schedule
from .rehearsal import Rehearsal, rehearse
from .stage import Stage
from .tasks import Task, cast, layout_of, random_state, restrict, set_random_state, stack, stand_in

__all__ = ["ParallelNetwork"]

_LOCAL, _GUIDED, _PIPED, _LOSSES, _OUTPUTS = 1, 2, 3, 4, 5  # kinds of messages
_SCHEDULES = ("1f1b", "gpipe")


class ParallelNetwork(Stage):
    """A decoupled network whose local modules live on several ranks; made by :func:`distribute`.

    It has the steps of :class:`DecoupledNetwork`. On all stages but the first, batches are left out. Every rank holds
    the whole network, but trains its own local modules: ``parameters()`` are theirs, for the optimizer of this rank.

    Random numbers are those of a single process: the random state that a step begins with on the first stage travels
    along, and every rank draws what the modules of the others draw (see :mod:`torchlocal.parallel.rehearsal`).

    Attributes:
        net: the decoupled network. The parameters of other ranks' modules are out of date until
            :meth:`synchronize`.
        mesh: the device mesh (replicas × modules).
        replica: row of this rank.
        stage: column of this rank.
        stages: the local modules of every stage.
        modules: the local modules of this stage.
        stop_requested: set to a number other than 0 on the first stage, for example by a signal handler, it travels
            with the batches.
        stopping: what it was when the last step began; the same on all ranks after the same step.
    """

    def __init__(
        self,
        net: DecoupledNetwork,
        stages: Sequence[range],
        replicas: int = 1,
        *,
        boundary_dtype: torch.dtype | None = None,
        in_flight: int = 4,
        timeout: float = 300.0,
    ) -> None:
        super().__init__(net, stages, replicas, timeout)
        self.boundary_dtype = boundary_dtype
        self.stop_requested = self.stopping = 0
        self._rehearsals: dict[tuple[Any, ...], Rehearsal] = {}
        self._schedules: dict[tuple[Any, ...], Schedule] = {}
        self._to_next: Channel | None = None
        self._from_previous: Channel | None = None
        self._to_previous: Channel | None = None
        self._from_next: Channel | None = None
        self._make_channels(in_flight)

    @property
    def bytes_sent(self) -> int:
        """Bytes of tensors that this rank has sent to its neighbours in local and exact guided steps."""
        return sum(c.num_bytes for c in (self._to_next, self._to_previous) if c is not None)

    # --- steps ---

    def local_step(
        self,
        x: Tensor | None = None,
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
            x: input batch (N, ...), on the first stage.
            target: its target, on the first stage.
            recompute: as there.
            autocast: as there.
            backward: as there.
            scale: as there.
            optimizers: as there, but one for each local module of this rank.

        Returns:
            The losses of the local modules up to the last one of this rank; on the last stage all K.
        """
        self._check(optimizers)
        task = self._begin(_LOCAL, x, target, (str(autocast), scale))
        if self.is_first:
            task.plan = self.net.local_plans(task.layout, target, recompute, autocast=autocast)
        rehearsal = self._rehearse(task.layout, task.batch.target, autocast)
        self._enter(task, rehearsal)
        self._skip_before(rehearsal, follow=True)
        run = Run(self.net, task.batch, autocast, backward, scale)
        features, losses = task.features, task.losses
        for i, k in enumerate(self.modules):
            loss, features = run.local(k, task.plan.get(k), [features])
            losses.append(loss)
            self._average([k])
            if optimizers is not None:
                self._finish_averages()
                apply(optimizers[i])
        self._hand_on(_LOCAL, task, features, losses, (str(autocast), scale))
        self._skip_after(rehearsal, follow=True)
        self._finish_averages()
        return losses

    def guided_step(
        self,
        x: Tensor | None = None,
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
            x: input batch (N, ...), on the first stage.
            target: its target, on the first stage.
            auxiliary: as there.
            recompute: as there.
            memory: as there.
            micro_batches: number of equal parts that the batch is cut into; nothing is recomputed then.
            schedule: order of the parts: ``"1f1b"`` or ``"gpipe"``.
            autocast: as there.
            backward: as there; not with ``micro_batches``.
            scale: as there.
            optimizers: as there, but one for each local module of this rank.

        Returns:
            The losses known to this rank, on the last stage what :func:`torchlocal.guided_step` returns.
        """
        self._check(optimizers)
        if auxiliary not in ("follow", "frozen"):
            raise ValueError(f"auxiliary: must be 'follow' or 'frozen', not {auxiliary!r}")
        follow = auxiliary == "follow"
        options = (auxiliary, str(autocast), scale)
        if micro_batches is not None:
            if schedule not in _SCHEDULES:
                raise ValueError(f"schedule: must be one of {', '.join(_SCHEDULES)}, not {schedule!r}")
            if backward is not None or recompute is not None or memory not in (None, "full"):
                raise ValueError(
                    "micro_batches: backward, recompute and memory cannot be given with it; leave them out"
                )
            return self._piped(x, target, micro_batches, schedule, follow, autocast, scale, optimizers, options)
        parts: list[tuple[Any, Any]] = [(None, None)]
        plan = None
        if self.is_first:
            check_arguments(self.net, x, target, None)  # type: ignore[arg-type]
            plan = self.net.guided_plan(
                layout_of(x),  # type: ignore[arg-type]
                target,
                auxiliary=auxiliary,
                recompute=recompute,
                memory=memory,
                autocast=autocast,
                optimizers=optimizers,
            )
            parts = split_batch(x, target, plan.micro_batches)  # type: ignore[arg-type]
        total: list[Tensor] = []
        size = 0 if x is None else x.shape[0]
        i = 0
        while i < len(parts):
            task = self._begin(_GUIDED, *parts[i], options)
            if self.is_first:
                task.plan = plan, size
            plan, size = task.plan
            parts = parts if self.is_first else [(None, None)] * plan.micro_batches
            share = task.layout.shape[0] / size
            run = Run(self.net, task.batch, autocast, backward, scale * share)
            run.optimizers = optimizers if i == len(parts) - 1 else None
            losses = self._guided(run, task, plan.tree, follow, len(parts) == 1, options)
            if share != 1:
                losses = [loss * share for loss in losses]
            total = [a + b for a, b in zip(total, losses, strict=True)] if total else losses
            i += 1
        if self._replicas_group is not None:
            self._average(self.modules)
            self._finish_averages()
            for optimizer in optimizers or ():
                apply(optimizer)
        return total

    def _guided(
        self, run: Run, task: Task, plan: Plan, follow: bool, whole: bool, options: tuple[Any, ...]
    ) -> list[Tensor]:
        """One micro-batch of an exact guided step, forward and backward through this stage's modules."""
        groups, losses = self.net.partition.groups, task.losses
        first, last = groups[self.modules[0]].start, groups[self.modules[-1]].stop
        rehearsal = self._rehearse(task.layout, task.batch.target, run.dtype)
        self._enter(task, rehearsal)
        self._skip_before(rehearsal, follow=follow)
        ends = {groups[k].stop: k for k in self.modules if k < self.num_modules - 1} if follow else {}
        waiting = list(self.modules)
        # Gradients of replicas have to be averaged before they are used.
        optimizers = None if self._replicas_group is not None else run.optimizers

        def passed(unit: int, state: tuple[Any, ...]) -> None:
            if unit in ends:
                losses.append(run.follow(ends[unit], state[0]))
                if optimizers is not None and whole:
                    apply(optimizers[ends[unit] - self.modules[0]])

        def then(outputs: list[Any]) -> list[Tensor | None]:
            if self.is_last:
                loss, gradient = run.learn(self.num_modules - 1, outputs)
                losses.append(loss)
                return [gradient]
            assert self._from_next is not None
            self._hand_on(_GUIDED, task, outputs.pop(), losses, options)
            message = self._from_next.receive(_GUIDED)
            return [cast(message.tensors[0], message.extra)]

        def done(unit: int) -> None:
            while optimizers is not None and waiting and groups[waiting[-1]].start >= unit:
                apply(optimizers[waiting.pop() - self.modules[0]])

        recomputation = Recomputation(
            self.net.chain, task.features, context=run.autocast, stops=frozenset(ends), passed=passed, done=done
        )
        (gradient,) = recomputation.run(
            restrict(plan, first, last), [task.features.detach()], then, differentiable=not self.is_first
        )
        if self._to_previous is not None:
            assert gradient is not None, "the features of every stage have a gradient"
            block, dtype = self._as_sent(gradient)
            self._to_previous.send(_GUIDED, [block], extra=dtype)
        self._skip_after(rehearsal, follow=follow)
        return losses

    def _piped(
        self,
        x: Tensor | None,
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
        if self.is_first:
            check_arguments(self.net, x, target, None)  # type: ignore[arg-type]
            assert x is not None
            if isinstance(count, bool) or not isinstance(count, int) or count < 1 or x.shape[0] % count:
                raise ValueError(f"micro_batches: {x.shape[0]} examples cannot be cut into {count!r} equal parts")
        options = (*options, count, schedule)
        task = self._begin(_PIPED, x, target, options)
        parts = split_batch(task.batch.input, task.batch.target, count)
        size = (task.layout.shape[0] // count, *task.layout.shape[1:])
        layout = torch.empty_strided(size, task.layout.stride(), dtype=task.layout.dtype, device="meta")
        rehearsal = self._rehearse(layout, parts[0][1], autocast)
        self._enter(task, rehearsal)
        self._hand_on(_PIPED, task, torch.empty(0), [], options)
        runs = [
            Run(self.net, Batch(input=part, target=labels, criterion=self.net.criterion), autocast, None, scale / count)
            for part, labels in parts
        ]
        key = (layout.shape, layout.stride(), layout.dtype, autocast, count, schedule)
        if key not in self._schedules:
            self._schedules[key] = Schedule(
                net=self.net,
                stage=self.stage,
                stages=self.stages,
                layout=layout,
                rehearsal=rehearsal,
                count=count,
                schedule=schedule,
                device=self.device,
                group=self._pipe_group,
            )
        with watched(self._others, self._timeout):
            losses: list[Tensor] = self._schedules[key].step(runs, rehearsal, follow=follow)
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
        self, x: Tensor | None = None, target: Any = None, *, all_depths: bool = True
    ) -> tuple[dict[int, Tensor], Any]:
        """What the local modules of this rank predict, and the target, which travels along.

        Args:
            x: input batch (N, ...), on the first stage.
            target: its target, on the first stage.
            all_depths: also through the auxiliary networks; else only the network's output, on the last stage.

        Returns:
            The outputs by local module, and the target.
        """
        task = self._begin(_OUTPUTS, x, target, ())
        features, outputs = task.features, {}
        self.net.chain.refresh(self.device)
        for k in self.modules:
            group = self.net.partition.groups[k]
            features = self.net.chain.segment(group.start, group.stop)(features)
            if k == self.num_modules - 1:
                outputs[k] = features
            elif all_depths:
                outputs[k] = self.net.rule.predict(self.net.sites[k], self.net.auxiliary[k], features)
        self._hand_on(_OUTPUTS, task, features, [], ())
        return outputs, task.batch.target

    def close(self) -> None:
        """Wait until all that was sent has arrived, and end the background threads; every rank has to call it."""
        for channel in (self._from_previous, self._to_next, self._to_previous, self._from_next):
            if channel is not None:
                channel.close()

    # --- inside ---

    def _make_channels(self, in_flight: int) -> None:
        limit = timedelta(seconds=self._timeout)
        for replica in range(self.num_replicas):  # all ranks make all groups, in the same order
            ranks = self.row(replica)
            pipe: Any = dist.new_group(ranks, timeout=limit)
            forward, backward = (self._new_groups(ranks, limit) for _ in range(2))
            if replica != self.replica:
                continue
            self._pipe_group, me = pipe, dist.get_rank()
            if not self.is_last:
                self._to_next = self._channel(me, me + 1, forward, in_flight)
                self._from_next = self._channel(me + 1, me, backward, in_flight)
            if not self.is_first:
                self._from_previous = self._channel(me - 1, me, forward, in_flight)
                self._to_previous = self._channel(me, me - 1, backward, in_flight)

    def _new_groups(self, ranks: list[int], limit: timedelta) -> tuple[Any, Any]:
        headers = dist.new_group(ranks, backend="gloo", timeout=limit)
        return (headers if self.device.type == "cpu" else dist.new_group(ranks, timeout=limit)), headers

    def _channel(self, source: int, destination: int, groups: tuple[Any, Any], depth: int) -> Channel:
        me = dist.get_rank()
        peer = destination if source == me else source
        return Channel(
            source,
            destination,
            group=groups[0],
            headers=groups[1],
            device=self.device,
            depth=depth,
            timeout=self._timeout,
            peer=self.named(peer),
        )

    def _check(self, optimizers: Sequence[SupportsStep] | None) -> None:
        if optimizers is not None and len(optimizers) != len(self.modules):
            raise ValueError(
                f"optimizers: {len(optimizers)} given for the {len(self.modules)} local modules of this rank; make one "
                "for each list of parameters that module_parameters() returns"
            )

    def _begin(self, kind: int, x: Tensor | None, target: Any, options: tuple[Any, ...]) -> Task:
        """The next batch: on the first stage the one that is given, elsewhere the one that arrives."""
        criterion = self.net.criterion
        if self.is_first:
            if x is None:
                raise ValueError("x: the first stage has to be given the batch")
            check_arguments(self.net, x, target, None)
            self.stopping = self._largest_of_replicas(self.stop_requested)
            return Task(Batch(input=x, target=target, criterion=criterion), x, [], layout_of(x))
        if x is not None:
            raise ValueError(f"x: rank {dist.get_rank()} is no first stage, leave the batch out; it comes from there")
        assert self._from_previous is not None
        message: Message = self._from_previous.receive(kind)
        dtype, others, structure, leaves, layout, plan, given = message.extra
        if given != options:
            raise RuntimeError(
                f"the step was called with {options} here and with {given} on the first stage: give the same options "
                "on every rank"
            )
        self.stopping = message.flag
        tensors = iter(message.tensors)
        features, losses = cast(next(tensors), dtype), list(next(tensors).unbind())
        target = tree_unflatten([next(tensors) if leaf is None else leaf[0] for leaf in leaves], structure)
        layout = torch.empty_strided(*layout[:2], dtype=layout[2], device="meta")
        x = next(tensors) if others["input"] else stand_in(layout, self.device)
        return Task(Batch(input=x, target=target, criterion=criterion), features, losses, layout, plan, list(tensors))

    def _hand_on(self, kind: int, task: Task, features: Tensor, losses: list[Tensor], options: tuple[Any, ...]) -> None:
        """Send a batch to the next stage."""
        if self._to_next is None:
            return
        block, dtype = self._as_sent(features)
        leaves, structure = tree_flatten(task.batch.target)
        tensors = [block, stack(losses), *(leaf for leaf in leaves if isinstance(leaf, Tensor))]
        uses_input = self.net.rule.reads_input and kind != _OUTPUTS
        tensors += [task.batch.input] if uses_input else []
        tensors += task.random
        layout = (tuple(task.layout.shape), task.layout.stride(), task.layout.dtype)
        others = [None if isinstance(leaf, Tensor) else (leaf,) for leaf in leaves]
        extra = (dtype, {"input": uses_input}, structure, others, layout, task.plan, options)
        self._to_next.send(kind, tensors, flag=self.stopping, extra=extra)

    def _as_sent(self, tensor: Tensor) -> tuple[Tensor, torch.dtype]:
        """A boundary tensor in the dtype that it is sent in, and its own dtype."""
        if self.boundary_dtype is None or not tensor.is_floating_point():
            return tensor, tensor.dtype
        return tensor.to(self.boundary_dtype), tensor.dtype

    def _rehearse(self, layout: Tensor, target: Any, autocast: torch.dtype | None) -> Rehearsal:
        """What a step of such a batch draws; found once for each shape of batch."""
        flags = tuple(module.training for module in self.net.modules())
        key = (layout.shape, layout.stride(), layout.dtype, autocast, flags)
        if key not in self._rehearsals:
            if len(self._rehearsals) > 8:
                self._rehearsals.clear()
            self._rehearsals[key] = rehearse(self.net, layout, target, device=self.device, autocast=autocast)
            if self._rehearsals[key].random and self.net.chain.compiled is not None:
                raise ValueError(
                    "compile: a network that draws random numbers (dropout) cannot be compiled on several ranks, since "
                    "compiled modules draw others; leave compile out"
                )
        return self._rehearsals[key]

    def _enter(self, task: Task, rehearsal: Rehearsal) -> None:
        """Come to the random state that the step begins with on the first stage."""
        if rehearsal.random and self.is_first:
            task.random = random_state(self.device)
        elif rehearsal.random:
            set_random_state(task.random, self.device)

    def _skip_before(self, rehearsal: Rehearsal, *, follow: bool) -> None:
        """Draw what the modules before this stage draw."""
        rehearsal.skip(range(self.modules.start), self.device, follow=follow)

    def _skip_after(self, rehearsal: Rehearsal, *, follow: bool) -> None:
        """Come to the random state at the end of the step; only the first stage goes on from there."""
        if self.is_first:
            rehearsal.skip(range(self.modules.stop, self.num_modules), self.device, follow=follow)
