"""Running a network without leaving a mark on it: its modules' attributes, its training flags, its tensors."""

from __future__ import annotations

import copy
from collections import OrderedDict, deque
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any

from torch import Tensor, nn

__all__ = ["Attributes", "swapped", "training_mode", "untouched"]

_CONTAINERS = (list, dict, OrderedDict, set, deque)


@contextmanager
def training_mode(model: nn.Module) -> Iterator[None]:
    """Put ``model`` in training mode, and every submodule back as it was."""
    flags = [(module, module.training) for module in model.modules()]
    model.train()
    try:
        yield
    finally:
        for module, flag in flags:
            module.training = flag


class Attributes:
    """What the modules of a network hold in their attributes, buffers among them, at one moment."""

    def __init__(self, model: nn.Module) -> None:
        self._kept: list[tuple[nn.Module, dict[str, Any], dict[str, Any]]] = []
        for module in model.modules():
            values = dict(module.__dict__)
            contents = {name: copy.copy(v) for name, v in values.items() if type(v) in _CONTAINERS}
            self._kept.append((module, values, contents))

    def restore(self) -> None:
        """Put everything back: attributes that were set, and built-in containers that were filled."""
        for module, values, contents in self._kept:
            present = module.__dict__
            if present.keys() != values.keys() or any(present[name] is not v for name, v in values.items()):
                present.clear()
                present.update(values)
            for name, content in contents.items():
                _refill(values[name], content)

    def changed(self) -> list[tuple[nn.Module, str, bool]]:
        """The attributes that differ now: module, name, and whether it is a buffer."""
        found: list[tuple[nn.Module, str, bool]] = []
        for module, values, contents in self._kept:
            present = module.__dict__
            for name in [*values, *(n for n in present if n not in values)]:
                before, after = values.get(name), present.get(name)
                if name == "_buffers" and isinstance(after, dict):
                    old = contents[name]
                    found += [(module, b, True) for b, t in after.items() if old.get(b) is not t]
                elif name in ("_parameters", "_modules") or name.endswith("_hooks"):
                    continue
                elif before is not after or (name in contents and not _alike(after, contents[name])):
                    found.append((module, name, False))
        return found


def _alike(a: Any, b: Any) -> bool:
    """Whether two containers hold the very same things in the same order."""
    if len(a) != len(b):
        return False
    if isinstance(a, dict):
        return all(k == j and v is w for (k, v), (j, w) in zip(a.items(), b.items(), strict=True))
    return a == b if isinstance(a, set) else all(v is w for v, w in zip(a, b, strict=True))


def _refill(container: Any, content: Any) -> None:
    """Give a built-in container the content that it had."""
    if _alike(container, content):
        return
    container.clear()
    (container.extend if isinstance(container, (list, deque)) else container.update)(content)


@contextmanager
def untouched(model: nn.Module) -> Iterator[Attributes]:
    """Put back the attributes of all modules at the end, whatever the forward has stored in them."""
    before = Attributes(model)
    try:
        yield before
    finally:
        before.restore()


@contextmanager
def swapped(model: nn.Module, twins: Mapping[int, Tensor]) -> Iterator[None]:
    """Have the modules of ``model`` hold other tensors for a while.

    Args:
        model: the network.
        twins: the tensor to hold instead, by the ``id`` of the parameter or buffer.
    """
    with untouched(model):
        for module in model.modules():
            for own in (module._parameters, module._buffers):
                for name, tensor in own.items():
                    if tensor is not None and id(tensor) in twins:
                        own[name] = twins[id(tensor)]  # type: ignore[assignment]
            if isinstance(module, nn.RNNBase):  # it keeps its weights in a list beside
                module._flat_weights = [getattr(module, name, None) for name in module._flat_weights_names]
        yield
