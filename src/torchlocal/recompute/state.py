"""What a second run has to start from, and what passes run under: random numbers, buffers, autocast, saved tensors."""

from __future__ import annotations

import random
import sys
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import AbstractContextManager, contextmanager, nullcontext
from typing import Any, TypeVar

import torch
from torch import Tensor, nn

__all__ = [
    "RandomState",
    "Replay",
    "by_itself",
    "held",
    "keeping_nothing",
    "put_aside",
    "started_from",
    "undisturbed",
    "without_autocast",
]

_Result = TypeVar("_Result")


class RandomState:
    """The state of the random generators: torch's of the CPU and of a device, Python's, and numpy's where it is loaded.

    Args:
        cpu: torch's state of the CPU.
        devices: devices beside it, and their states.
        python: Python's and numpy's states; None: they are left alone.
    """

    def __init__(
        self, cpu: Tensor, devices: tuple[list[torch.device], list[Tensor]], python: tuple[Any, Any] | None = None
    ) -> None:
        self.cpu, self.devices, self.python = cpu, devices, python

    @classmethod
    def get(cls, device: torch.device, *, numpy: bool = True) -> RandomState:
        """The state now; numpy's takes longer than all others, so it may be left out."""
        devices: tuple[list[torch.device], list[Tensor]] = ([], [])
        if device.type == "cuda" and torch.cuda.is_current_stream_capturing():
            pass  # a CUDA graph that recomputes draws nothing, see torchlocal.capture
        elif device.type not in ("cpu", "meta"):
            devices = [device], [_device_state(device)]
        return cls(torch.get_rng_state(), devices, _python_state(numpy=numpy))

    def set(self) -> None:
        """Go back to it."""
        torch.set_rng_state(self.cpu)
        for device, state in zip(*self.devices, strict=True):
            _set_device_state(device, state)
        if self.python is not None:
            random.setstate(self.python[0])
            if self.python[1] is not None:
                sys.modules["numpy"].random.set_state(self.python[1])

    def differs(self) -> bool:
        """Whether any generator has drawn since."""
        now = [torch.get_rng_state(), *map(_device_state, self.devices[0])]
        then = [self.cpu, *self.devices[1]]
        return self.differs_in_python() or not all(map(torch.equal, now, then))

    def differs_in_python(self) -> bool:
        """Whether Python's or numpy's generator has drawn since."""
        assert self.python is not None
        (now, numpy_now), (then, numpy_then) = _python_state(numpy=True), self.python
        return now != then or (numpy_then is not None and repr(numpy_now[2:]) != repr(numpy_then[2:]))


def by_itself(function: Callable[[], _Result], device: torch.device) -> _Result:
    """Call in a thread of its own, which has none of the caller's modes: autocast, no_grad, a counter.

    Which device is the current one is also said for each thread, and a network may say ``"cuda"`` and mean that one.
    """
    accelerator = None if device.type == "cpu" else torch.accelerator.current_accelerator(check_available=True)
    known = accelerator is not None and accelerator.type == device.type
    current = torch.accelerator.current_device_index() if known else None

    def run() -> _Result:
        if current is not None:
            torch.accelerator.set_device_index(current)
        return function()

    with ThreadPoolExecutor(1) as executor:
        return executor.submit(run).result()


@contextmanager
def undisturbed(device: torch.device) -> Iterator[None]:
    """Have all generators be afterwards what they were; also of other devices, which ``torch.manual_seed`` seeds."""
    devices = {device, *_in_use()}
    states = [RandomState.get(one) for one in devices]
    try:
        yield
    finally:
        for state in states:
            state.set()


def _in_use() -> list[torch.device]:
    """All devices of the accelerator, if it has been woken."""
    accelerator = torch.accelerator.current_accelerator(check_available=True)
    if accelerator is None or not getattr(torch.get_device_module(accelerator), "is_initialized", lambda: True)():
        return []
    return [torch.device(accelerator.type, index) for index in range(torch.accelerator.device_count())]


def _device_state(device: torch.device) -> Tensor:
    module: Any = torch.get_device_module(device)
    state: Tensor = module.get_rng_state() if device.type == "mps" else module.get_rng_state(device)  # there is one MPS
    return state


def _set_device_state(device: torch.device, state: Tensor) -> None:
    module: Any = torch.get_device_module(device)
    module.set_rng_state(state) if device.type == "mps" else module.set_rng_state(state, device)


def _python_state(*, numpy: bool) -> tuple[Any, Any]:
    module = sys.modules.get("numpy") if numpy else None
    return random.getstate(), None if module is None else module.random.get_state()


class Replay:
    """Replays stages that are told apart by the random state and the buffers that they start from.

    Args:
        written: the buffers that stages write in place, where each is looked up.
        device: that they run on.
    """

    def __init__(
        self, written: Callable[[int, int], list[tuple[dict[str, Tensor | None], str]]], device: torch.device
    ) -> None:
        self._written, self._device = written, device
        self._starts: dict[int, tuple[RandomState, list[Tensor]]] = {}  # of every piece, at its first run

    @contextmanager
    def replaying(self, first: int, last: int, *, new: bool, again: bool) -> Iterator[None]:
        """See :class:`Replaying`."""
        if new and not again:
            yield
            return
        places = self._written(first, last)
        if new:
            self._starts[first] = RandomState.get(self._device, numpy=False), [held(*place).clone() for place in places]
            yield
            return
        random_state, clones = self._starts[first] if again else self._starts.pop(first)
        random_state.set()
        with started_from(places, clones, again=again):
            yield


@contextmanager
def started_from(
    places: list[tuple[dict[str, Tensor | None], str]], clones: list[Tensor], *, again: bool
) -> Iterator[None]:
    """Have buffers hold for a while what they held at the start of a first run, whose result they hold already."""
    current = [held(*place) for place in places]
    for (own, name), clone in zip(places, clones, strict=True):
        own[name] = clone.clone() if again else clone
    try:
        yield
    finally:
        for (own, name), tensor in zip(places, current, strict=True):
            own[name] = tensor


@contextmanager
def put_aside(module: nn.Module) -> Iterator[None]:
    """Have a module write into copies of its buffers for a while."""
    places = [(m._buffers, name) for m in module.modules() for name, value in m._buffers.items() if value is not None]
    with started_from(places, [held(*place).clone() for place in places], again=False):
        yield


def held(own: dict[str, Tensor | None], name: str) -> Tensor:
    """A buffer that is there."""
    tensor = own[name]
    assert tensor is not None
    return tensor


def without_autocast(device: torch.device) -> AbstractContextManager[Any]:
    """For backward passes, which autocast would have compute in another dtype; and casts of weights are dropped.

    [Note: autocast and its cache] Under autocast the low-precision copies of weights are kept until the outermost
    autocast ends, with the graph that they have, or with none where they were made without gradients. A step goes
    backward several times, and forward without gradients, so the copies are dropped after each.
    """
    if not torch.is_autocast_enabled(device.type):
        return nullcontext()
    torch.clear_autocast_cache()
    return torch.autocast(device.type, enabled=False)


@contextmanager
def keeping_nothing() -> Iterator[None]:
    """For a forward pass that will be run again: with gradients asked for, as ever, but nothing is kept for backward.

    Under ``torch.no_grad`` the same operations may run other kernels (attention with a mask that learns, for example),
    whose results differ in their last bits.
    """
    with torch.enable_grad(), torch.autograd.graph.saved_tensors_hooks(_keep_nothing, _never):
        yield


def _keep_nothing(_: Tensor) -> None:
    return None


def _never(_: Any) -> Tensor:
    raise AssertionError("there is no backward pass through it")
