"""Counting what a piece of code does at the dispatcher: bytes that are alive, and floating-point operations."""

from __future__ import annotations

import contextlib
import weakref
from collections.abc import Iterable, Iterator, Mapping
from functools import partial
from typing import Any

from torch import Tensor, UntypedStorage
from torch.utils._python_dispatch import (  # the documented home; there is no public alias
    TorchDispatchMode,
    _get_current_dispatch_mode,
)

from ..cut.kernels import DEVICE, Kernels, flops_of

__all__ = ["LABELS", "PeakCounter"]

LABELS = ("parameters", "gradients", "optimizer", "activations", "boundaries", "auxiliary")


class PeakCounter(TorchDispatchMode):
    """Counts the bytes of tensors that are made inside the context, from their birth to their death.

    Args:
        resident: tensors that exist before, by label; they belong to the breakdown alone.
        kernels: what remembers operations on fake tensors, where those are counted.
        flops: count floating-point operations, too.

    Attributes:
        current: bytes alive now.
        peak: bytes alive when most were.
        label: what is being made now, one of ``LABELS``.
        breakdown: bytes by label when most were alive, those of the resident tensors included.
        flops: floating-point operations, of matrix products and convolutions.
    """

    def __init__(
        self,
        resident: Mapping[str, Iterable[Tensor]] | None = None,
        *,
        kernels: Kernels | None = None,
        flops: bool = False,
    ) -> None:
        super().__init__()
        self.current = 0
        self.peak = 0
        self.flops = 0
        self.label = "activations"
        self.resident = 0
        self._kernels, self._count_flops = kernels, flops
        self._known: dict[int, tuple[int, str, weakref.ref[UntypedStorage]]] = {}
        self._bytes = dict.fromkeys(LABELS, 0)
        for label, tensors in (resident or {}).items():
            self.label = label
            for tensor in tensors:
                if (storage := tensor.untyped_storage())._cdata not in self._known:
                    self._note(storage, storage.nbytes())
        self.label = "activations"
        self.resident, self.current = self.current, 0
        self.breakdown = dict(self._bytes)

    def __enter__(self) -> PeakCounter:
        if _get_current_dispatch_mode() is not None:  # which would not see what is not run
            self._kernels = None
        super().__enter__()
        return self

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func is DEVICE:  # which autograd asks for twice as often as anything is computed
            return func(*args) if self._kernels is None else self._kernels.device(*args)
        kwargs = kwargs or {}
        known = self._known
        for tensor in _tensors((args, kwargs)):  # what an operation is given existed before it
            if (storage := tensor.untyped_storage())._cdata not in known:
                self._note(storage, 0)
        if self._kernels is not None:
            result, flops = self._kernels.run(func, args, kwargs, flops=self._count_flops)
            self.flops += flops
        else:
            result = func(*args, **kwargs)
            if self._count_flops:
                self.flops += flops_of(func, args, kwargs, result)
        for tensor in _tensors((result,)):
            if (storage := tensor.untyped_storage())._cdata not in known:
                self._note(storage, storage.nbytes())
        if self.current > self.peak:
            self.peak = self.current
            self.breakdown = dict(self._bytes)
        return result

    def relabel(self, tensor: Tensor, label: str) -> None:
        """Count ``tensor``, if it was made inside the context, under ``label`` from now on."""
        key = tensor.untyped_storage()._cdata
        if key in self._known:
            size, old, reference = self._known[key]
            self._known[key] = size, label, reference
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

    def _note(self, storage: UntypedStorage, size: int) -> None:
        key = storage._cdata
        self._known[key] = size, self.label, weakref.ref(storage, partial(self._release, key))
        self.current += size
        self._bytes[self.label] += size

    def _release(self, key: int, _: weakref.ref[UntypedStorage]) -> None:
        size, label, _ = self._known.pop(key)
        self.current -= size
        self._bytes[label] -= size


def _tensors(values: Any) -> Iterator[Tensor]:
    """The tensors in what operations take and return, which is nested in lists, tuples and dictionaries alone."""
    for value in values:
        if isinstance(value, Tensor):
            yield value
        elif isinstance(value, (list, tuple)):
            yield from _tensors(value)
        elif isinstance(value, dict):
            yield from _tensors(value.values())
