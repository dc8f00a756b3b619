"""What a step does in the modules of other ranks, as far as this rank has to know: the random numbers that it draws.

All ranks start a step with the same random state, the one that a single process would have. Each draws by itself what
the modules of the others draw, on empty tensors, and so comes to the state in which its own modules begin, and to
the state at the end of the step. Nothing is sent, and no rank waits for another.
"""

from __future__ import annotations

import copy
import statistics
import time
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_map_only
from torch.utils.flop_counter import FlopCounterMode

from ..recompute import RandomState
from ..rules import Batch
from ..steps import Run

if TYPE_CHECKING:
    from ..network import DecoupledNetwork

__all__ = ["Rehearsal", "count_flops", "measure_seconds", "rehearse"]


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


class _Recorder(TorchDispatchMode):
    """Notes the operations that change the random state."""

    def __init__(self, x: Tensor) -> None:
        super().__init__()
        self._x = x
        self._draws: list[_Draw] = []

    def take(self) -> list[_Draw]:
        """The draws since the last call."""
        taken, self._draws = self._draws, []
        return taken

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        if torch.Tag.nondeterministic_seeded not in func.tags:
            return func(*args, **kwargs)
        before = RandomState.get(self._x)
        arguments = tree_map_only(Tensor, _Empty.like, (args, kwargs))
        result = func(*args, **kwargs)
        after = RandomState.get(self._x)
        pairs = zip([before.cpu, *before.devices[1]], [after.cpu, *after.devices[1]], strict=True)
        if any(not torch.equal(a, b) for a, b in pairs):
            self._draws.append(_Draw(func, arguments))
        return result


@dataclass(frozen=True, kw_only=True)
class Rehearsal:
    """What a step of one shape of batch does.

    Attributes:
        draws: for every local module the random numbers of its forward pass, and of its loss.
        outputs: for every local module what it hands on, without memory (``device="meta"``).
    """

    draws: list[tuple[list[_Draw], list[_Draw]]]
    outputs: list[Tensor]

    @property
    def random(self) -> bool:
        """Whether a step draws random numbers."""
        return any(forward or loss for forward, loss in self.draws)

    def skip(self, modules: Iterable[int], device: torch.device, *, follow: bool) -> None:
        """Draw what these modules draw; with ``follow`` also the losses of those that have an auxiliary network."""
        with torch.no_grad():
            for k in modules:
                forward, loss = self.draws[k]
                for draw in forward + (loss if follow or k == len(self.draws) - 1 else []):
                    draw.repeat(device)


def _twin(net: DecoupledNetwork) -> DecoupledNetwork:
    twin = copy.deepcopy(net)
    twin.chain.compiled = None
    return twin


def _blank(x: Tensor, device: torch.device) -> Tensor:
    """A batch of zeros in the layout of ``x``."""
    return torch.empty_strided(x.shape, x.stride(), dtype=x.dtype, device=device).zero_()


def rehearse(
    net: DecoupledNetwork, x: Tensor, target: Any, *, device: torch.device, autocast: torch.dtype | None
) -> Rehearsal:
    """Run a copy of the network once on zeros, and note what it draws; random state and network stay as they are.

    Args:
        net: the network.
        x: a batch; only its layout is used.
        target: the batch's.
        device: where to run.
        autocast: the step's option.
    """
    twin, random = _twin(net), RandomState.get(next(net.parameters(), torch.empty(0)))
    batch = Batch(input=_blank(x, device), target=target, criterion=net.criterion)
    run = Run(twin, batch, autocast)
    draws, outputs = [], []
    features = batch.input
    twin.chain.refresh(device)
    with torch.enable_grad(), _Recorder(batch.input) as recorder:
        for k, group in enumerate(twin.partition.groups):
            with run.autocast():
                (features,) = twin.chain.run(group.start, group.stop, [features])
                forward = recorder.take()
                run.loss(k, features)
            draws.append((forward, recorder.take()))
            features = features.detach()
            outputs.append(torch.empty_strided(features.shape, features.stride(), dtype=features.dtype, device="meta"))
    random.set()
    return Rehearsal(draws=draws, outputs=outputs)


def measure_seconds(
    net: DecoupledNetwork,
    x: Tensor,
    target: Any,
    *,
    autocast: torch.dtype | None = None,
    rounds: int = 3,
) -> list[float]:
    """Seconds that the local step of every local module takes, on a copy of the network.

    Args:
        net: the network.
        x: a batch (N, ...).
        target: its target.
        autocast: the step's option.
        rounds: the median of so many steps is taken, after one that does not count.

    Returns:
        K medians.
    """
    twin, random = _twin(net), RandomState.get(x)
    run = Run(twin, Batch(input=x, target=target, criterion=net.criterion), autocast)
    times: list[list[float]] = [[] for _ in range(net.num_modules)]
    twin.chain.refresh(x.device)
    for _ in range(rounds + 1):
        features = x
        for k in range(net.num_modules):
            _wait(x.device)
            start = time.perf_counter()
            _, features = run.local(k, None, [features])
            _wait(x.device)
            times[k].append(time.perf_counter() - start)
    random.set()
    return [statistics.median(taken[1:]) for taken in times]


def count_flops(net: DecoupledNetwork) -> list[float]:
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
