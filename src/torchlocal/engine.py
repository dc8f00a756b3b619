"""The engine of both steps, on one process or on the share that a rank has of one: what runs, and in which order.

[Note: one forward, and who backward is outside of] A step calls the network itself, ``model(batch)``, so that what the
network does, a step does: hooks, branches, random numbers, attributes that change. A local step is one such call; where
the forward comes to a cut, the module before it learns at once, and hands its output on without its graph. All forward
passes and losses are under the step's autocast, all backward passes outside of any.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, field, replace
from functools import partial
from typing import Any, Protocol

import torch
import torch.nn.functional as F
from torch import Tensor
from torch._subclasses import FakeTensor

from .boundary import rounded
from .cut.batches import Batch as Inputs
from .cut.batches import describe, device_of, num_examples, plain, same_layout
from .cut.carry import Carried
from .cut.forward import Pass
from .micro import Parts, criterion_of_parts
from .modules import LocalModules
from .recompute import (
    GuidedPlan,
    Inner,
    Plan,
    RandomState,
    Recomputation,
    Stages,
    Tape,
    leaves,
    put_aside,
    without_autocast,
)
from .rules import Batch

__all__ = [
    "Step",
    "SupportsStep",
    "apply",
    "check_arguments",
    "check_optimizers",
    "follows",
    "run_guided",
    "run_local",
]


# Of what torch says where an operation, or a loss, can be differentiated once only.
_ONCE = ("once_differentiable", "is not implemented")


class SupportsStep(Protocol):
    """What a step needs of an optimizer."""

    def step(self) -> Any: ...

    def zero_grad(self) -> Any: ...


def run_local(
    net: LocalModules,
    batch: Inputs,
    target: Any,
    plans: dict[int, Plan],
    *,
    autocast: torch.dtype | None = None,
    backward: Callable[[Tensor], Any] | None = None,
    scale: float = 1.0,
    optimizers: Sequence[SupportsStep] | None = None,
) -> list[Tensor]:
    """A local step of all modules, of which some recompute by a plan; returns the K losses."""
    step = Step.begin(net, batch, target, autocast, backward, scale)
    step.optimizers, step.boundaries = optimizers, _rounding(net)
    losses, _ = step.local(range(net.num_modules), plans, [])
    return losses


def run_guided(
    net: LocalModules,
    plan: GuidedPlan,
    parts: Parts,
    *,
    auxiliary: str = "follow",
    autocast: torch.dtype | None = None,
    backward: Callable[[Tensor], Any] | None = None,
    scale: float = 1.0,
    optimizers: Sequence[SupportsStep] | None = None,
) -> list[Tensor]:
    """A guided step of all modules by a plan, one part of the batch after another; returns the losses."""
    follow, total = follows(net, auxiliary), list[Tensor]()
    for i, (part, labels, share) in enumerate(parts):
        step = Step.begin(net, part, labels, autocast, backward, scale)
        step.part_of(parts, share, follow=follow)
        step.matches, step.boundaries = auxiliary == "match", _rounding(net)
        step.optimizers = optimizers if i == len(parts) - 1 else None
        losses = step.guided(plan.tree, follow=follow)
        total = [a + b for a, b in zip(total, losses, strict=True)] if total else losses
    return total


def _rounding(net: LocalModules) -> dict[int, str]:
    """What one process rounds between its modules; nothing in a prediction, so that plans are those of ranks."""
    return {} if net.chain.fake else net.boundaries


@dataclass
class Step:
    """One step's options, and what both kinds of steps do, on one process or on the share that a rank has of one."""

    net: LocalModules
    batch: Batch
    device: torch.device
    dtype: torch.dtype | None = None
    backward_with: Callable[[Tensor], Any] | None = None
    scale: float = 1.0
    share: Tensor | float = 1.0  # of this part in the loss of the whole batch
    weight: Tensor | None = None  # of this batch among those of other replicas, 1 on average
    parts: Parts | None = None
    optimizers: Sequence[SupportsStep] | None = None
    outputs: dict[Any, Any] | None = None  # of modules that another process runs
    entering: dict[int, RandomState] | None = None  # by unit, where another process runs those before
    matches: bool = False  # whether auxiliary networks also learn to give the gradient that the global loss gives
    learnt: Callable[[int], None] | None = None  # called with every module that has its gradients, before its update
    carried: Carried | None = field(default=None)
    boundaries: dict[int, str] = field(default_factory=dict)  # by unit, how what it takes is rounded
    run: Pass | None = None  # the latest of the network's forward

    @classmethod
    def begin(
        cls,
        net: LocalModules,
        inputs: Inputs,
        target: Any,
        dtype: torch.dtype | None = None,
        backward: Callable[[Tensor], Any] | None = None,
        scale: float = 1.0,
    ) -> Step:
        """A step on a batch."""
        batch = Batch(input=inputs, target=target, criterion=net.criterion)
        return cls(net, batch, device_of(inputs, net.backbone), dtype, backward, scale)

    def part_of(self, parts: Parts, share: Tensor | float, *, follow: bool) -> None:
        """Be a step on one of the parts of a batch."""
        if len(parts) > 1:
            self.parts, self.share = parts, share
            criterion = criterion_of_parts(self.net, self.batch.target, follow=follow)
            self.batch = replace(self.batch, criterion=criterion)

    @property
    def reads_embedding(self) -> bool:
        """Whether a pass has to note what the network's first unit hands on."""
        return self.net.rule.reads_embedding and self.net.num_modules > 1

    def autocast(self) -> AbstractContextManager[Any]:
        """What forward passes and losses run under."""
        if self.dtype is None:
            return nullcontext()
        return torch.autocast(self.device.type, dtype=self.dtype)

    def loss(self, k: int, features: Tensor) -> Tensor:
        """Local loss of module ``k``, for the last module the global loss."""
        try:
            if k == self.net.num_modules - 1:
                layer = None if self.run is None else self.run.read_out
                assert (layer is not None) == self.net.to_read_out  # else features would be taken for scores
                if layer is not None:
                    criterion: Any = self.batch.criterion
                    found: Tensor = criterion.from_features(features, layer.weight, layer.bias, self.batch.target)
                    return found
                return self.batch.criterion(features, self.batch.target)
            batch = self.batch
            if k == 0 and self.reads_embedding:
                assert self.run is not None
                batch = replace(batch, embedding=self.run.embedding.pop())
            return self.net.rule.loss(self.net.sites[k], self.net.auxiliary[k], features, batch)
        except ValueError as error:
            raise self._explained(error) or error from error

    def _explained(self, error: ValueError) -> ValueError | None:
        """In place of what torch says of a batch of one, or of a target whose rows are not the batch's."""
        target, count = self.batch.target, num_examples(self.batch.input)
        if count == 1 and "more than 1 value per channel" in str(error):
            return ValueError(
                "batch: a single example is too few for BatchNorm, which expects more than 1 value per channel; leave "
                "an incomplete last batch out (drop_last=True)"
            )
        if "match" in str(error) and isinstance(target, Tensor) and target.ndim and target.shape[0] != count:
            return ValueError(
                f"target: it has {target.shape[0]} rows, but the batch has {count}, and the criterion does not take "
                f"that: {error}"
            )
        return None

    def backward(self, loss: Tensor, share: Tensor | float | None = None) -> None:
        """Backward from a loss, outside of autocast; ``share``: in the loss of the whole batch, if not the step's."""
        if not loss.requires_grad:  # a module with nothing to train
            return
        if self.outputs is not None and isinstance(loss, FakeTensor) and not self.net.chain.fake:
            raise ValueError(
                f"rule: the loss of {self.net.rule!r} reads the network's input, which is not sent to this rank; set "
                "reads_input = True in its class"
            )
        loss = self.weighed(loss, share)
        with without_autocast(self.device):
            if self.backward_with is not None:
                self.backward_with(loss)
            elif self.carried is not None:
                loss.backward(retain_graph=True)  # what crosses the cut beside the features needs its part later
            else:
                loss.backward()

    def weighed(self, loss: Tensor, share: Tensor | float | None = None) -> Tensor:
        """A loss as it goes backward."""
        share = self.share if share is None else share
        if isinstance(share, Tensor) or share != 1.0:
            loss = loss * share
        if self.weight is not None:  # where nothing counts, the loss is 0 / 0
            loss = torch.where(self.weight > 0, loss * self.weight, 0.0)
        return loss * self.scale if self.scale != 1.0 else loss

    def told(self, loss: Tensor) -> Tensor:
        """A loss as it is returned: of a part, its share."""
        loss = loss.detach()
        return loss * self.share if self.parts is not None else loss

    def follow(self, k: int, features: Tensor) -> Tensor:
        """Train the auxiliary network of module ``k`` alone."""
        with torch.enable_grad():
            with self.autocast():
                loss = self.loss(k, features.detach())
            self.backward(loss)
        return self.told(loss)

    def match(self, k: int, features: Tensor, gradient: Tensor | None) -> None:
        """Have the auxiliary network of module ``k`` learn to give the gradient that has arrived at its features.

        One more loss for it alone: 1 - the cosine of the angle between the gradient of its local loss with respect to
        the features and that of the global loss, in the mean over the examples. Its buffers, and the random state,
        are what they were.
        """
        network = self.net.auxiliary[k]
        if gradient is None or not any(parameter.requires_grad for parameter in network.parameters()):
            return
        features, batch = features.detach().requires_grad_(), self.batch
        random = RandomState.get(self.device, numpy=False)
        if hasattr(batch.criterion, "from_features"):  # whose gradient cannot be differentiated
            batch = replace(batch, criterion=partial(_call, batch.criterion))
        try:
            with torch.enable_grad(), put_aside(network):
                with self.autocast():
                    loss = self.net.rule.loss(self.net.sites[k], network, features, batch)
                with without_autocast(self.device):
                    (own,) = torch.autograd.grad(loss, features, create_graph=True)
                    ours, theirs = (g.flatten(1).float() for g in (own, gradient))
                    miss = (1 - F.cosine_similarity(ours, theirs, dim=1)).mean()
                # A criterion that sums has another share in the whole.
                self.backward(miss, 1 / len(self.parts) if self.parts is not None else 1.0)
        except (NotImplementedError, RuntimeError) as error:
            if not any(words in str(error) for words in _ONCE):
                raise
            raise ValueError(
                f"auxiliary: 'match' takes gradients of the gradient of the loss of {self.net.rule!r}, and one of its "
                "operations has none; give 'follow', or use another rule"
            ) from error
        random.set()

    def watch(self, k: int, features: Tensor) -> None:
        """Match as soon as the gradient of these features arrives."""
        if self.matches and features.requires_grad:
            features.register_hook(partial(self.match, k, features.detach()))

    def learn(self, k: int, outputs: list[Any]) -> tuple[Tensor, Tensor | None]:
        """Loss of module ``k`` on its output alone, which is taken out of its list, and the gradient of the output."""
        features = outputs.pop().requires_grad_()
        with torch.enable_grad():
            with self.autocast():
                loss = self.loss(k, features)
            self.backward(loss)
        return self.told(loss), features.grad

    def units(self, modules: range) -> tuple[int, int]:
        """The units of consecutive local modules: the first, and the one after the last."""
        groups = self.net.partition.groups
        return groups[modules.start].start, groups[modules.stop - 1].stop

    # --- the local step ---

    def local(self, modules: range, plans: dict[int, Plan], state: list[Tensor]) -> tuple[list[Tensor], list[Tensor]]:
        """Local step of consecutive modules.

        Args:
            modules: which ones.
            plans: by module, what is recomputed.
            state: the features that the first one takes, or nothing where it begins with the batch; taken out.

        Returns:
            Their losses, and a list with the features that the last of them hands on, if it is not the network's last.
        """
        losses: list[Tensor] = []
        if plans:
            self._look_inside(plans.values())
            pass_ = self._pass(replay=True)
            with pass_.opened():
                for k in modules:
                    loss, state = self._local_by_plan(pass_, k, plans.get(k), state)
                    state = [self._crossing(self.net.partition.groups[k].stop, features) for features in state]
                    losses.append(loss)
                    self._update(k, modules)
            return losses, state
        first, last = self.units(modules)
        ends = {self.net.partition.groups[k].stop: k for k in modules}
        chain = self.net.chain
        stops = tuple(unit for unit in ends if unit < chain.num_units)
        leaf = chain.needs_leaves()
        handed: list[Tensor] = []

        def learn(unit: int, features: Tensor) -> Tensor:
            loss = self.loss(ends[unit], features)
            handing = features.detach()
            del features
            self._learn(ends[unit], loss)
            losses.append(self.told(loss))
            del loss
            self._update(ends[unit], modules)
            if unit == last:
                handed.append(handing)
            handing = self._crossing(unit, handing)
            if self.carried is not None:
                self.carried.cut()
            return handing.requires_grad_() if leaf else handing

        if self.net.carry == "collect":
            if self.backward_with is not None:
                raise ValueError('backward: cannot be given with carry="collect", which goes backward in its own way')
            self.carried = Carried()
        inner = tuple(unit for unit in stops if unit != last)
        pass_ = self._pass(expected=None if first else chain.expected(self.batch.input, inner), replay=first > 0)
        with pass_.opened(stops if first == 0 else None), self.carried or nullcontext(), self.autocast():
            (features,) = pass_.run(first, last, state, boundary=learn, stops=inner)
            if last == chain.num_units:
                loss = self.loss(self.net.num_modules - 1, features)
                del features
                self._learn(self.net.num_modules - 1, loss)
                losses.append(self.told(loss))
                del loss
                self._update(self.net.num_modules - 1, modules)
            else:
                learn(last, features)
                del features
        if self.carried is not None:
            with without_autocast(self.device):
                self.carried.hand_back()
        return losses, handed

    def _crossing(self, unit: int, features: Tensor) -> Tensor:
        """What a unit takes of the features that the one before hands on."""
        return rounded(features, self.boundaries.get(unit))

    def _learn(self, k: int, loss: Tensor) -> None:
        try:
            self.backward(loss)
        except RuntimeError as error:
            if "backward through the graph a second time" not in str(error):
                raise
            raise ValueError(
                f"model: local module {k + 1} uses a tensor that carries a gradient from an earlier module, beside the "
                'features that are handed to it; decouple with carry="collect", or cut elsewhere'
            ) from error

    def _local_by_plan(
        self, pass_: Pass, k: int, plan: Plan | None, state: list[Tensor]
    ) -> tuple[Tensor, list[Tensor]]:
        group = self.net.partition.groups[k]
        kept: list[Tensor] = []

        def learn(outputs: list[Any]) -> list[Tensor | None]:
            features: Tensor = outputs[0].detach()  # a tensor of its own: learn() asks for the other's gradient
            loss, gradient = self.learn(k, outputs)
            kept.extend((loss, features))
            return [gradient]

        plan = plan or Tape(group.start, group.stop)
        Recomputation(pass_, self.device, context=self.autocast).run(plan, state, learn)
        loss, features = kept
        return loss, [features]

    def _update(self, k: int, modules: range) -> None:
        if self.learnt is not None:
            self.learnt(k)
        if self.optimizers is not None:
            apply(self.optimizers[k - modules.start])

    def _look_inside(self, plans: Iterable[Plan]) -> None:
        """Have the traces of units at hand, which cannot be made while something stands in for modules."""
        if any(isinstance(leaf, Inner) for plan in plans for leaf in leaves(plan)):
            self.net.chain.look_inside(self.batch.input)

    def _pass(self, *, replay: bool = False, expected: dict[Any, int] | None = None) -> Pass:
        self.run = Pass(
            self.net.chain,
            self.batch.input,
            replay=replay,
            outputs=self.outputs,
            expected=expected,
            entering=self.entering,
            embedding=self.reads_embedding,
            to_read_out=self.net.to_read_out,
        )
        return self.run

    # --- the guided step ---

    def guided(self, plan: Plan, *, follow: bool) -> list[Tensor]:
        """Guided step of the whole network, by a plan."""
        modules, losses = range(self.net.num_modules), list[Tensor]()
        if not isinstance(plan, Tape):
            self.through(modules, plan, [], losses, follow=follow)
            return losses
        with self.autocast():
            prediction = self.forward(modules, [], losses, follow=follow)
            loss = self.loss(modules[-1], prediction)
            del prediction
        losses.append(self.told(loss))
        self.backward(loss)
        for optimizer in reversed(self.optimizers or ()):
            apply(optimizer)
        return losses

    def forward(self, modules: range, state: list[Tensor], losses: list[Tensor], *, follow: bool) -> Tensor:
        """Forward through consecutive local modules with their graph, as the network does it.

        Args:
            modules: which ones.
            state: the features that the first one takes, or nothing where it begins with the batch; taken out.
            losses: gets those of the auxiliary networks, if they learn on the way.
            follow: whether they do.

        Returns:
            What the last one hands on, or the network's prediction.
        """
        first, last = self.units(modules)
        end, groups = self.net.chain.num_units, self.net.partition.groups
        ends = {groups[k].stop: k for k in modules if groups[k].stop < end} if follow else {}

        def passing(unit: int, features: Tensor) -> Tensor:
            if unit in ends:
                losses.append(self.follow(ends[unit], features))
                self.watch(ends[unit], features)
            return self._crossing(unit, features)

        pass_ = self._pass(replay=first > 0)
        inner = tuple({*ends, *self.boundaries} - {last})
        with pass_.opened(tuple({*inner, last} - {end}) if first == 0 else None):
            (result,) = pass_.run(first, last, state, boundary=passing, stops=inner)
        if last in ends:
            passing(last, result)
        return result

    def through(
        self,
        modules: range,
        plan: Plan,
        state: list[Tensor],
        losses: list[Tensor],
        *,
        follow: bool,
        onward: Callable[[list[Any]], list[Tensor | None]] | None = None,
        around: Callable[[Stages], Stages] = lambda stages: stages,
    ) -> list[Tensor | None]:
        """Forward and backward through consecutive local modules, from one cut point to another, by a plan.

        Args:
            modules: which ones.
            plan: over their units.
            state: the features that the first one takes, or nothing where it begins with the batch; taken out.
            losses: gets their losses.
            follow: whether the auxiliary networks learn.
            onward: takes the features that the last one hands on out of a list, and returns their gradient; None: it is
                the network's last.
            around: makes the chain that the plan runs on of the network's.

        Returns:
            The gradient of ``state``.
        """
        net = self.net
        first, _ = self.units(modules)
        groups = net.partition.groups
        ends = {groups[k].stop: k for k in modules if k < net.num_modules - 1} if follow else {}

        def passed(unit: int, state: tuple[Any, ...]) -> None:
            if unit in ends:
                losses.append(self.follow(ends[unit], state[0]))

        def learn(outputs: list[Any]) -> list[Tensor | None]:
            loss, gradient = self.learn(net.num_modules - 1, outputs)
            losses.append(loss)
            return [gradient]

        def arrived(unit: int, features: Tensor, gradient: Tensor | None) -> None:
            self.match(ends[unit], features, gradient)

        complete = net.complete_at()[modules.start : modules.stop] if self.optimizers is not None else []
        waiting = [None if unit is None else max(unit, first) for unit in complete]
        self._look_inside([plan])
        pass_ = self._pass(replay=True)
        with pass_.opened():
            return Recomputation(
                around(pass_),
                self.device,
                context=self.autocast,
                stops=frozenset(ends),
                passed=passed,
                arrived=arrived if self.matches else None,
                watched=frozenset(ends),
                done=lambda unit: self._finish(unit, waiting),
                boundaries=self.boundaries,
            ).run(plan, state, onward or learn, differentiable=first > 0)

    def _finish(self, unit: int, waiting: list[int | None]) -> None:
        """Update the modules whose gradients are complete when all units from ``unit`` on have run backward."""
        for k in reversed(range(len(self.optimizers or ()))):
            complete = waiting[k]
            if complete is not None and complete >= unit:
                assert self.optimizers is not None
                apply(self.optimizers[k])
                waiting[k] = None


def apply(optimizer: SupportsStep) -> None:
    """Update, and free the gradients."""
    optimizer.step()
    optimizer.zero_grad()


def check_arguments(
    net: LocalModules,
    batch: Inputs,
    optimizers: Sequence[SupportsStep] | None = None,
    backward: Callable[[Tensor], Any] | None = None,
    scale: float = 1.0,
    *,
    count: int | None = None,
) -> Inputs:
    """Refuse a batch that does not fit the network, and options that do not go together.

    Returns:
        The batch, as a tensor, a tuple or a dict.
    """
    batch = plain(batch)
    if not same_layout(batch, net.sample):
        raise ValueError(
            f"batch: {describe(batch)} does not fit; the network was decoupled with {describe(net.sample)}, of which "
            "the number of examples may differ"
        )
    if not torch.is_grad_enabled():
        raise ValueError(
            "step: gradients are switched off here (torch.no_grad), so nothing would learn; take it outside"
        )
    check_optimizers(optimizers, net.num_modules if count is None else count, backward, scale)
    return batch


def follows(net: LocalModules, auxiliary: str) -> bool:
    """Whether the auxiliary networks learn in a guided step; refuses what is no word for it, or not with this rule."""
    if auxiliary not in ("follow", "match", "frozen"):
        raise ValueError(f"auxiliary: must be 'follow', 'match' or 'frozen', not {auxiliary!r}")
    if auxiliary == "match" and net.rule.reads_embedding and net.num_modules > 1:
        raise ValueError(
            "auxiliary: 'match' comes when the gradient arrives, and the embedding that the loss of "
            f"{net.rule!r} reads is gone by then; give 'follow', or use another rule"
        )
    return auxiliary != "frozen"


def _call(criterion: Callable[..., Tensor], *given: Any) -> Tensor:
    """What a criterion returns, without its other ways."""
    return criterion(*given)


def check_optimizers(
    optimizers: Sequence[SupportsStep] | None, count: int, backward: Callable[[Tensor], Any] | None, scale: float
) -> None:
    """Refuse a wrong number of optimizers, and options that leave gradients which are not those of an update."""
    if optimizers is None:
        return
    if len(optimizers) != count:
        raise ValueError(
            f"optimizers: {len(optimizers)} given for {count} local modules; make one for each list of "
            "parameters that module_parameters() returns"
        )
    if backward is not None:
        raise ValueError(
            "optimizers: they would step on the gradients that backward= leaves, which a scaler has multiplied; leave "
            "one of the two out, and step after the step"
        )
    if scale != 1.0:
        raise ValueError(
            f"optimizers: they step at every call, so gradients scaled by {scale:g} would not be accumulated; leave "
            "scale out, or step yourself after the last batch"
        )
