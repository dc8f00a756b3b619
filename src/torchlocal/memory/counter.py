"""Counting what a piece of code does at the dispatcher: bytes that are alive, and floating-point operations."""

from __future__ import annotations

import contextlib
import weakref
from collections.abc import Iterable, Iterator, Mapping
from typing import Any

from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode  # the documented home; there is no public alias
from torch.utils._pytree import tree_iter
from torch.utils.flop_counter import flop_registry

__all__ = ["LABELS", "FlopTotal", "PeakCounter"]

LABELS = ("parameters", "gradients", "optimizer", "activations", "boundaries", "auxiliary")


class PeakCounter(TorchDispatchMode):
    """Counts the bytes of tensors that are made inside the context, from their birth to their death.

    Args:
        resident: tensors that exist before, by label; they belong to the breakdown alone.

    Attributes:
        current: bytes alive now.
        peak: bytes alive when most were.
        label: what is being made now, one of ``LABELS``.
        breakdown: bytes by label when most were alive, those of the resident tensors included.
    """

    def __init__(self, resident: Mapping[str, Iterable[Tensor]] | None = None) -> None:
        super().__init__()
        self.current = 0
        self.peak = 0
        self.label = "activations"
        self.resident = 0
        self._known: dict[int, tuple[int, str]] = {}
        self._bytes = dict.fromkeys(LABELS, 0)
        for label, tensors in (resident or {}).items():
            self.label = label
            for tensor in tensors:
                if tensor.untyped_storage()._cdata not in self._known:
                    self._note(tensor, new=True)
        self.label = "activations"
        self.resident, self.current = self.current, 0
        self.breakdown = dict(self._bytes)

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        for tensor in tree_iter((args, kwargs)):  # what an operation is given existed before it
            if isinstance(tensor, Tensor) and tensor.untyped_storage()._cdata not in self._known:
                self._note(tensor, new=False)
        result = func(*args, **(kwargs or {}))
        for tensor in tree_iter(result):
            if isinstance(tensor, Tensor) and tensor.untyped_storage()._cdata not in self._known:
                self._note(tensor, new=True)
        if self.current > self.peak:
            self.peak = self.current
            self.breakdown = dict(self._bytes)
        return result

    def relabel(self, tensor: Tensor, label: str) -> None:
        """Count ``tensor``, if it was made inside the context, under ``label`` from now on."""
        key = tensor.untyped_storage()._cdata
        if key in self._known:
            size, old = self._known[key]
            self._known[key] = size, label
            self._bytes[old] -= size
            self._bytes[label] += size

    @contextlib.contextmanager
    def labelling(self, label: str) -> Iterator[None]:
        """Count what is made inside under ``label``."""
        before, self.label = self.label, label
        try:
            yield
        finally:
            self.label = before

    def _note(self, tensor: Tensor, *, new: bool) -> None:
        storage = tensor.untyped_storage()
        key, size = storage._cdata, storage.nbytes() if new else 0
        self._known[key] = size, self.label
        self.current += size
        self._bytes[self.label] += size
        weakref.finalize(storage, self._release, key).atexit = False

    def _release(self, key: int) -> None:
        size, label = self._known.pop(key)
        self.current -= size
        self._bytes[label] -= size


class FlopTotal(TorchDispatchMode):
    """Counts floating-point operations like torch's FlopCounterMode, but without its hooks on modules."""

    def __init__(self) -> None:
        super().__init__()
        self.total = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        formula = flop_registry.get(func._overloadpacket)
        if formula is not None:
            self.total += formula(*args, **(kwargs or {}), out_val=result)
        return result
