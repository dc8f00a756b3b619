"""What a step does in the modules of other ranks, as far as this rank has to know: the random numbers that it draws.

All ranks start a step with the same random state, the one that a single process would have. Each draws by itself what
the modules of the others draw, on empty tensors, and so comes to the state in which its own modules begin, and to
the state at the end of the step. Nothing is sent, and no rank waits for another.
"""

from __future__ import annotations

import copy
import statistics
import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_iter, tree_map_only
from torch.utils.flop_counter import FlopCounterMode

from ..cut.batches import Batch as Inputs
from ..cut.batches import device_of, plain
from ..cut.forward import Pass, emptied
from ..engine import Step
from ..modules import LocalModules
from ..recompute import RandomState

__all__ = ["Rehearsal", "count_flops", "layouts", "measure_seconds", "rehearse"]


@dataclass(frozen=True)
class _Empty:
    """A tensor without its numbers."""

    shape: torch.Size
    stride: tuple[int, ...]
    dtype: torch.dtype

    @classmethod
    def like(cls, tensor: Tensor) -> _Empty:
        return cls(tensor.shape, tensor.stride(), tensor.dtype)

    def make(self, device: torch.device) -> Tensor:
        """Fresh memory of this layout."""
        return torch.empty_strided(self.shape, self.stride, dtype=self.dtype, device=device)


@dataclass(frozen=True)
class _Draw:
    """An operation that draws random numbers."""

    operation: Callable[..., Any]
    arguments: Any

    def repeat(self, device: torch.device) -> None:
        """Draw the same again, into nothing."""
        args, kwargs = tree_map_only(_Empty, lambda empty: empty.make(device), self.arguments)
        self.operation(*args, **kwargs)


_VALUES = (torch.ops.aten._local_scalar_dense.default, torch.ops.aten.nonzero.default, torch.ops.aten.equal.default)


class _Recorder(TorchDispatchMode):
    """Notes the operations that change the random state, and whether any looks at numbers that depend on it.

    Args:
        device: where the network runs.
    """

    def __init__(self, device: torch.device) -> None:
        super().__init__()
        self._device = device
        self._draws: list[_Draw] = []
        self._drawn: set[int] = set()  # storages
        self.decides = False

    def take(self) -> list[_Draw]:
        """The draws since the last call."""
        taken, self._draws = self._draws, []
        return taken

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        drawn = any(t.untyped_storage()._cdata in self._drawn for t in tree_iter((args, kwargs)) if _is_tensor(t))
        self.decides |= drawn and func in _VALUES
        if torch.Tag.nondeterministic_seeded in func.tags:
            before = RandomState.get(self._device)
            arguments = tree_map_only(Tensor, _Empty.like, (args, kwargs))
            result = func(*args, **kwargs)
            after = RandomState.get(self._device)
            pairs = zip([before.cpu, *before.devices[1]], [after.cpu, *after.devices[1]], strict=True)
            if any(not torch.equal(a, b) for a, b in pairs):
                self._draws.append(_Draw(func, arguments))
                drawn = True
        else:
            result = func(*args, **kwargs)
        keys = {t.untyped_storage()._cdata for t in tree_iter(result) if _is_tensor(t)}
        self._drawn = self._drawn | keys if drawn else self._drawn - keys  # also the address of one that was freed
        return result


def _is_tensor(value: Any) -> bool:
    return isinstance(value, Tensor)


@dataclass(frozen=True, kw_only=True)
class Rehearsal:
    """What a step of one layout of batch does.

    Attributes:
        draws: for every unit the random numbers of its forward pass, where code between the units draws some, or else
            for the last unit of every local module all of the module's.
        losses: for every local module those of its loss.
        features: for every local module what it hands on, without memory (``device="meta"``).
        outputs: what the calls return that are left out when the network runs from a cut point on.
        decides: what the forward does depends on random numbers.
    """

    draws: list[list[_Draw]]
    losses: list[list[_Draw]]
    features: list[Tensor]
    outputs: dict[Any, Any]
    decides: bool

    @property
    def random(self) -> bool:
        """Whether a step draws random numbers."""
        return any(self.draws) or any(self.losses)

    def skip(self, net: LocalModules, modules: range, device: torch.device, *, follow: bool) -> dict[int, RandomState]:
        """Draw what these modules draw; with ``follow`` also the losses of those that have an auxiliary network.

        Returns:
            By unit, the random state before it, and that after the last.
        """
        if not modules:
            return {}
        groups = net.partition.groups
        states = {groups[modules.start].start: RandomState.get(device)}
        with torch.no_grad():
            for k in modules:
                for unit in groups[k]:
                    _repeat(self.draws[unit], device)
                    if unit + 1 == groups[k].stop and (follow or k == len(self.losses) - 1):
                        _repeat(self.losses[k], device)
                    if net.chain.facts.draws or unit + 1 == groups[modules.stop - 1].stop:
                        states[unit + 1] = RandomState.get(device)
        return states


def _repeat(draws: list[_Draw], device: torch.device) -> None:
    for draw in draws:
        draw.repeat(device)


def _twin(net: LocalModules) -> LocalModules:
    twin = copy.deepcopy(net)
    twin.chain.compiled = None
    return twin


def _blank(batch: Inputs, device: torch.device) -> Inputs:
    """A batch in whose place zeros stand for floating-point numbers."""

    def blank(tensor: Tensor) -> Tensor:
        if not tensor.is_floating_point() and not tensor.is_complex():
            return tensor
        where = tensor.device if tensor.device.type != "meta" else device
        return torch.empty_strided(tensor.shape, tensor.stride(), dtype=tensor.dtype, device=where).zero_()

    return tree_map_only(Tensor, blank, batch)


def rehearse(
    net: LocalModules, batch: Inputs, target: Any, *, device: torch.device, autocast: torch.dtype | None
) -> Rehearsal:
    """Run a copy of the network once on zeros, and note what it draws; random state and network stay as they are.

    Args:
        net: the network.
        batch: a batch, of whose floating-point tensors only the layout is used.
        target: the batch's.
        device: where to run.
        autocast: the step's option.
    """
    twin, random = _twin(net), RandomState.get(device)
    chain, groups = twin.chain, twin.partition.groups
    batch = _blank(batch, device)
    step = Step.begin(twin, batch, target, autocast)
    draws: list[list[_Draw]] = [[] for _ in range(chain.num_units)]
    losses: list[list[_Draw]] = [[] for _ in groups]
    handed: list[Tensor] = []
    ends = {group.stop: k for k, group in enumerate(groups)}
    leaf = chain.needs_leaves()
    stops = tuple(range(1, chain.num_units)) if chain.facts.draws else tuple(ends)[:-1]
    recorder, decides = _Recorder(device), False

    def arrived(unit: int, features: Tensor) -> Tensor:
        nonlocal decides
        decides |= recorder.decides
        draws[unit - 1] = recorder.take()
        features = features if unit == chain.num_units else features.detach()
        if unit in ends:
            step.loss(ends[unit], features)
            losses[ends[unit]] = recorder.take()
            recorder.decides = False
            layout = torch.empty_strided(features.shape, features.stride(), dtype=features.dtype, device="meta")
            handed.append(layout)
        return features.requires_grad_() if leaf and unit < chain.num_units else features

    pass_ = step.run = Pass(chain, batch, embedding=step.reads_embedding, to_read_out=twin.to_read_out)
    try:
        with torch.enable_grad(), recorder, pass_.opened(), step.autocast():
            (prediction,) = pass_.run(0, chain.num_units, [], boundary=arrived, stops=stops)
            arrived(chain.num_units, prediction)
    finally:
        random.set()
    return Rehearsal(draws=draws, losses=losses, features=handed, outputs=emptied(pass_.outputs), decides=decides)


def layouts(net: LocalModules, batch: Inputs, *, device: torch.device) -> dict[Any, Any]:
    """What the calls return that are left out when the network runs from a cut point on."""
    if net.chain.facts.fake:
        return emptied(net.chain.outputs(batch))
    random = RandomState.get(device)
    batch = _blank(batch, device)
    pass_ = Pass(_twin(net).chain, batch)
    try:
        with torch.no_grad(), pass_.opened():
            pass_.run(0, net.chain.num_units, [])
    finally:
        random.set()
    return emptied(pass_.outputs)


def measure_seconds(
    net: LocalModules,
    batch: Inputs,
    target: Any,
    *,
    autocast: torch.dtype | None = None,
    rounds: int = 3,
) -> list[float]:
    """Seconds that the local step of every local module takes, on a copy of the network.

    Args:
        net: the network.
        batch: a batch.
        target: its target.
        autocast: the step's option.
        rounds: the median of so many steps is taken, after one that does not count.

    Returns:
        K medians.
    """
    device = device_of(batch, net.backbone)
    twin, random = _twin(net), RandomState.get(device)
    times: list[list[float]] = [[] for _ in range(net.num_modules)]
    start = 0.0

    def learnt(k: int) -> None:
        nonlocal start
        _wait(device)
        now = time.perf_counter()
        times[k].append(now - start)
        start = now

    for _ in range(rounds + 1):
        step = Step.begin(twin, plain(batch), target, autocast)
        step.learnt = learnt
        _wait(device)
        start = time.perf_counter()
        step.local(range(net.num_modules), {}, [])
    random.set()
    return [statistics.median(taken[1:]) for taken in times]


def count_flops(net: LocalModules) -> list[float]:
    """Floating-point operations of every local module and its auxiliary network, in one forward pass of the sample."""
    costs = []
    for k, group in enumerate(net.partition.groups):
        total = sum(net.partition.units[unit].flops for unit in group)
        if k < len(net.auxiliary):
            network = copy.deepcopy(net.auxiliary[k]).to("meta")
            dtype = next((p.dtype for p in network.parameters()), torch.float32)
            features = torch.empty(net.sites[k].feature_shape, dtype=dtype, device="meta")
            with torch.no_grad(), FlopCounterMode(display=False) as counter:
                net.rule.rehearse(net.sites[k], network, features)
            total += counter.get_total_flops()
        costs.append(float(max(total, 1)))
    return costs


def _wait(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)
