"""What operations on fake tensors give, remembered by what they were given.

[Note: a memory of kernels] A step on fake tensors is some thousand operations, nearly all of which were run before on
tensors of the same layout. torch remembers what they gave, too, but takes a fifth of a millisecond to look it up, since
it knows symbolic shapes, tracing and foreign tensors. Whatever is not plain here, goes that way.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from operator import itemgetter
from typing import Any

import torch
from torch import Tensor
from torch._ops import OpOverload  # the documented home; there is no public alias
from torch._subclasses import FakeTensor, FakeTensorMode
from torch.utils._pytree import tree_iter
from torch.utils.flop_counter import flop_registry

__all__ = ["DEVICE", "Kernels", "flops_of"]

_MOST = 20_000  # results that are remembered
DEVICE = torch.ops.prim.device.default
_SCALARS = frozenset((bool, int, float, str, type(None), torch.dtype, torch.device, torch.layout, torch.memory_format))
_UNSUITABLE = (torch.Tag.data_dependent_output, torch.Tag.dynamic_output_shape, torch.Tag.inplace_view)

Maker = Callable[[tuple[Any, ...]], Any]


class _Foreign(Exception):
    """An argument that says nothing about itself."""


@dataclass(slots=True)
class _Known:
    """An operation on arguments of one layout.

    Attributes:
        make: makes its result of the arguments; None: it has to be run.
        flops: once they were asked for.
    """

    make: Maker | None
    flops: int | None = None


class Kernels:
    """Runs operations on fake tensors of one mode; what an operation gave before is made anew without running it.

    Args:
        mode: of the fake tensors.
    """

    def __init__(self, mode: FakeTensorMode) -> None:
        self._mode = mode
        self._known: dict[tuple[Any, ...], _Known] = {}

    def device(self, tensor: Tensor) -> torch.device:
        """Of a tensor; what ``tensor.device`` comes to at the dispatcher."""
        if type(tensor) is FakeTensor and not tensor.fake_mode.in_kernel_invocation:
            return tensor.fake_device
        return DEVICE(tensor)

    def run(self, func: Any, args: tuple[Any, ...], kwargs: dict[str, Any], *, flops: bool) -> tuple[Any, int]:
        """What the operation returns, and its floating-point operations, if they are asked for."""
        key: list[Any] = [func, torch.get_default_dtype(), torch.is_inference_mode_enabled()]
        try:
            self._describe(args, key)
            for name, value in kwargs.items():
                key.append(name)
                self._describe((value,), key)
        except (_Foreign, RuntimeError):  # what is sparse has no strides
            result = func(*args, **kwargs)
            return result, flops_of(func, args, kwargs, result) if flops else 0
        place = tuple(key)
        known = self._known.get(place)
        if known is None:
            result = func(*args, **kwargs)
            if len(self._known) >= _MOST:
                self._known.clear()
            known = self._known[place] = _Known(self._maker(func, args, kwargs, result))
        else:
            result = known.make(args) if known.make is not None else func(*args, **kwargs)
        if flops and known.flops is None:
            known.flops = flops_of(func, args, kwargs, result)
        return result, known.flops or 0

    def _describe(self, values: Any, key: list[Any]) -> None:
        """Append everything that a result's layout depends on."""
        for value in values:
            kind = type(value)
            if kind is FakeTensor:
                if value.fake_mode is not self._mode or value.constant is not None:
                    raise _Foreign
                key += (value.shape, value.stride(), value.dtype, value.storage_offset(), value.fake_device)
            elif kind in _SCALARS:
                key += (kind, value)
            elif kind is list or kind is tuple:
                key += (kind, len(value))
                self._describe(value, key)
            else:  # a real tensor, a symbolic number, a generator
                raise _Foreign

    def _maker(self, func: Any, args: tuple[Any, ...], kwargs: dict[str, Any], result: Any) -> Maker | None:
        """What makes the result from the arguments; None: it has to be run."""
        if not isinstance(func, OpOverload) or func.namespace not in ("aten", "prims"):
            return None
        if any(tag in func.tags for tag in _UNSUITABLE):
            return None
        given = [(i, value) for i, value in enumerate(args) if isinstance(value, Tensor)]
        others = [t for t in tree_iter((args, kwargs)) if isinstance(t, Tensor)]
        if not given:
            return None
        many = type(result) in (tuple, list)
        makers = []
        for value in result if many else (result,):
            maker = self._one(value, given, others)
            if maker is None:
                return None
            makers.append(maker)
        tensors = [v for v in (result if many else (result,)) if isinstance(v, Tensor)]
        if len({id(t) for t in tensors}) < len(tensors):
            return None
        new = [t for t in tensors if not any(t.untyped_storage()._cdata == o.untyped_storage()._cdata for o in others)]
        if len({t.untyped_storage()._cdata for t in new}) < len(new):
            return None
        if not many:
            return makers[0]
        build = type(result)
        return lambda args: build([make(args) for make in makers])

    def _one(self, value: Any, given: list[tuple[int, Tensor]], others: list[Tensor]) -> Maker | None:
        """What makes one tensor of the result."""
        if value is None:
            return lambda _: None
        if type(value) is not FakeTensor or value.fake_mode is not self._mode or value.constant is not None:
            return None
        for i, tensor in given:
            if value is tensor:
                return itemgetter(i)
        plain = value.layout is torch.strided and not value.is_mkldnn and not value.is_complex()
        if not plain or value.requires_grad or any(value is other for other in others):
            return None
        mode, device, empty = self._mode, value.fake_device, torch.empty_strided
        layout, dtype = (tuple(value.shape), value.stride()), value.dtype
        storage = value.untyped_storage()
        if storage._cdata == given[0][1].untyped_storage()._cdata:
            place, first = value.storage_offset(), given[0][0]

            def view(args: tuple[Any, ...]) -> Tensor:
                elem = torch.empty(0, dtype=dtype, device="meta")
                elem.set_(args[first].untyped_storage(), place, *layout)
                return FakeTensor(mode, elem, device)

            return view
        if any(storage._cdata == other.untyped_storage()._cdata for other in others):
            return None
        if storage.nbytes() != empty(*layout, dtype=dtype, device="meta").untyped_storage().nbytes():
            return None
        if value.storage_offset():
            return None
        return lambda _: FakeTensor(mode, empty(*layout, dtype=dtype, device="meta"), device)


def flops_of(func: Any, args: tuple[Any, ...], kwargs: dict[str, Any], result: Any) -> int:
    """The floating-point operations of an operation: of matrix products and convolutions."""
    formula = flop_registry.get(func._overloadpacket) if isinstance(func, OpOverload) else None
    return 0 if formula is None else int(formula(*args, **kwargs, out_val=result))
