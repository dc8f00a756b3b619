"""How much memory a step takes at its peak, measured at the dispatcher on any device.

Counted are the bytes of all tensors that come to life during the call, at the moment when most are alive: activations,
gradients, temporaries. Not counted are what existed before the call and what a kernel allocates inside itself.
"""

from __future__ import annotations

import weakref
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode  # the documented home; there is no public alias
from torch.utils._pytree import tree_iter

__all__ = ["Measurement", "PeakCounter", "measure"]


class PeakCounter(TorchDispatchMode):
    """Counts the bytes of tensors that are made inside the context, from their birth to their death.

    Attributes:
        current: bytes alive now.
        peak: bytes alive when most were.
    """

    def __init__(self) -> None:
        super().__init__()
        self.current = 0
        self.peak = 0
        self._known: set[int] = set()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        for tensor in tree_iter((args, kwargs)):  # what an operation is given existed before it
            if isinstance(tensor, Tensor) and tensor.untyped_storage()._cdata not in self._known:
                self._note(tensor, new=False)
        result = func(*args, **(kwargs or {}))
        for tensor in tree_iter(result):
            if isinstance(tensor, Tensor) and tensor.untyped_storage()._cdata not in self._known:
                self._note(tensor, new=True)
        self.peak = max(self.peak, self.current)
        return result

    def _note(self, tensor: Tensor, *, new: bool) -> None:
        storage = tensor.untyped_storage()
        key, size = storage._cdata, storage.nbytes() if new else 0
        self._known.add(key)
        self.current += size
        weakref.finalize(storage, self._release, key, size).atexit = False

    def _release(self, key: int, size: int) -> None:
        self._known.discard(key)
        self.current -= size


@dataclass(frozen=True, kw_only=True)
class Measurement:
    """Peak of one call, in bytes beyond what was allocated when it began."""

    peak_bytes: int


def measure(function: Callable[[], object], *, device: torch.device | str = "cpu") -> Measurement:
    """Run ``function`` once and measure the peak of the memory that it allocates.

    Args:
        function: what to run, for example one training step.
        device: on CUDA the caching allocator's own count is read, elsewhere tensors are counted at the dispatcher.

    Returns:
        The peak in bytes, beyond what was allocated before.
    """
    if torch.device(device).type == "cuda":
        torch.cuda.synchronize(device)
        before = torch.cuda.memory_allocated(device)
        torch.cuda.reset_peak_memory_stats(device)
        function()
        torch.cuda.synchronize(device)
        return Measurement(peak_bytes=torch.cuda.max_memory_allocated(device) - before)
    with PeakCounter() as counter:
        function()
    return Measurement(peak_bytes=counter.peak)
