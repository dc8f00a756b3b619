"""A unit with weights of its own: a part of the network's forward that runs by itself.

[Note: the skeleton of a copy] A copy runs the network's own forward, too, from the cut point before its unit to the one
after. What it calls is a skeleton: the unit's modules are the copy's own; the modules whose code runs around them (the
network itself, lists of blocks, what makes masks and tables) are there a second time, with the backbone's tensors, so
that the backbone does not notice; all others are the backbone's, of which none is called. The skeleton is made when the
copy is first called, from whatever modules the copy holds then.
"""

from __future__ import annotations

import copy
import dataclasses
import functools
import sys
import types
from collections import OrderedDict
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, nullcontext
from typing import Any, cast

import torch
from torch import Tensor, nn
from torch._subclasses import FakeTensor
from torch.utils._pytree import tree_map_only

from .batches import Batch, num_examples
from .forward import Forward, Pass
from .intercept import around
from .observe import fake_batch
from .within import Key, Within

__all__ = ["UnitCopy"]


class UnitCopy(nn.Module):
    """A unit of a network, or its last without the head, with copies of its parameters and buffers, which all learn.

    They have the names that they have in the network. The copy takes features and returns what the unit hands on. While
    the network runs, a copy is called with the batch that it runs on; else with one like the sample, without values.

    Args:
        chain: the network.
        within: what was seen in the unit.
    """

    def __init__(self, chain: Forward, within: Within) -> None:
        super().__init__()
        self._chain, self._within = (chain,), within  # in a tuple, since none of the network belongs to the copy
        self._direct: tuple[str, ...] = ()
        self._skeleton: _Skeleton | None = None
        backbone = chain.backbone
        inside = [backbone.get_submodule(path) for path in within.modules]
        memo = _clones(backbone, inside)
        loose = [name for name in within.tensors if not _covered(name, backbone, inside)]
        for path, module in zip(within.modules, inside, strict=True):
            self._put(path, copy.deepcopy(module, memo))
        for name in loose:
            tensor = _held(backbone, name)
            if tensor is not None:
                path, _, leaf = name.rpartition(".")
                own = self._container(path)
                kind: dict[str, Any] = own._parameters if isinstance(tensor, nn.Parameter) else own._buffers
                kind[leaf] = _clone(tensor)
        self._loose = tuple(loose)
        self.train()

    def _container(self, path: str) -> nn.Module:
        """The module of that name, made where there is none."""
        module: nn.Module = self
        for name in path.split(".") if path else ():
            if module._modules.get(name) is None:
                module._modules[name] = nn.Module()
            module = module._modules[name]  # type: ignore[assignment]
        return module

    def _put(self, path: str, module: nn.Module) -> None:
        parent, _, name = path.rpartition(".")
        self._container(parent)._modules[name] = module

    def __deepcopy__(self, memo: dict[int, Any]) -> UnitCopy:
        twin = type(self).__new__(type(self))
        memo[id(self)] = twin
        (chain,) = self._chain
        for name, value in self.__dict__.items():
            if name == "_skeleton":
                value = None
            elif name == "_chain":  # by itself, a copy stays one of a unit of the same network
                value = (copy.deepcopy(chain, memo) if id(chain.backbone) in memo else chain,)
            else:
                value = copy.deepcopy(value, memo)
            twin.__dict__[name] = value
        return twin

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "_skeleton": None}

    # --- for rules ---

    @property
    def readers(self) -> tuple[str, ...]:
        """By use of what the copy is given, the innermost module that uses it; ``""`` for code that is in none."""
        return self._within.readers

    @property
    def last(self) -> str:
        """The module that is called last, of those that call no others."""
        return self._within.last

    def owns(self, path: str) -> bool:
        """Whether a module is one of the unit's."""
        return any(path == outer or path.startswith(f"{outer}.") for outer in self._within.modules)

    def replace(self, path: str, module: nn.Module) -> None:
        """Have another module do the work of one of the unit's."""
        self._skeleton = None
        self._put(path, module)

    def project(self, shortcut: nn.Module, direct: list[str]) -> None:
        """Hand all but some of the modules what another module makes of the features.

        Args:
            shortcut: it becomes part of the copy.
            direct: the modules that go on taking the features themselves.
        """
        self._skeleton = None
        self._modules["shortcut"], self._direct = shortcut, tuple(direct)

    def compile(self, *args: Any, **kwargs: Any) -> None:
        """Compile the outermost modules of the unit, each by itself."""
        for path in self._within.modules:
            self.get_submodule(path).compile(*args, **kwargs)
        if self._direct:
            self.get_submodule("shortcut").compile(*args, **kwargs)

    # --- running ---

    def forward(self, features: Tensor) -> Tensor:
        return _uncompiled(self._run)(features)

    def _run(self, features: Tensor) -> Tensor:
        (chain,) = self._chain
        if self._skeleton is None:
            self._skeleton = _Skeleton(self, chain, self._within, self._loose)
        forward = self._skeleton.refreshed()
        forward.fake = isinstance(features, FakeTensor)
        batch = self._batch(features)
        given, intercepted = features, cast(AbstractContextManager[None], nullcontext())
        if self._direct:
            given = self.get_submodule("shortcut")(features)
            modules = [self.get_submodule(path) for path in self._direct]
            intercepted = around((m, lambda original, args, kwargs: original(features)) for m in modules)
        pass_ = Pass(forward, batch, outputs=chain.empty_outputs(batch))
        with pass_.opened(), intercepted:
            try:
                (result,) = pass_.run(1, 2, [given])
            except ValueError as error:
                raise self._explained(error) or error from error
        self._skeleton.hand_back()
        return result

    def _explained(self, error: ValueError) -> ValueError | None:
        if "cannot run from the cut point after" not in str(error):
            return None
        (chain,) = self._chain
        path = chain.facts.points[self._within.unit - 1][0][0]
        return ValueError(
            f"rule: what comes after {path!r} cannot be copied, since something that was computed before is used in it "
            "beside the features; use a rule that does not copy units, such as dgl or predsim, or other cuts"
        )

    def _batch(self, features: Tensor) -> Batch:
        """What the skeleton is called with: the batch that the network runs on, or a stand-in of as many examples."""
        (chain,) = self._chain
        rows, seen = num_examples(chain.sample), self._within.entry[0]
        if chain.batch is not None and num_examples(chain.batch) * seen == features.shape[0] * rows:
            return chain.batch
        wanted = features.shape[0] * rows // seen

        def resized(tensor: Tensor) -> Tensor:
            if tensor.ndim == 0 or tensor.shape[0] != rows or wanted == rows:
                return tensor
            if tensor.is_floating_point():
                return tensor[:1].expand(wanted, *tensor.shape[1:])
            return tensor[torch.arange(wanted, device=tensor.device) % rows]

        return fake_batch(tree_map_only(Tensor, resized, chain.sample), chain.mode)


def _uncompiled(function: Callable[[Tensor], Tensor]) -> Callable[[Tensor], Tensor]:
    """A function that stays as it is where what calls it is compiled; see ``UnitCopy.compile`` for its parts."""
    return torch.compiler.disable(function) if "torch._dynamo" in sys.modules else function


class _Skeleton:
    """What a copy runs; see the note above.

    Args:
        own: the copy.
        chain: the network.
        within: what was seen in the unit.
        loose: names of the copy's tensors that are in none of its modules.
    """

    def __init__(self, own: UnitCopy, chain: Forward, within: Within, loose: tuple[str, ...]) -> None:
        backbone, facts = chain.backbone, chain.facts
        twins: dict[int, Any] = {}
        for path in within.modules:
            copied = own.get_submodule(path)
            for name, module in backbone.get_submodule(path).named_modules():
                found = _submodule(copied, name)
                if found is not None:
                    twins.setdefault(id(module), found)
        if within.cut:
            twins[id(backbone.get_submodule(within.cut))] = nn.Identity()
        paths: dict[str, None] = {"": None}
        for path in [*within.around, *within.modules, *(name.rpartition(".")[0] for name in loose)]:
            parts = path.split(".") if path else []
            paths.update({".".join(parts[:i]): None for i in range(1, len(parts))})
        paths.update(dict.fromkeys([*within.around, *(name.rpartition(".")[0] for name in loose)]))
        second = [(path, module) for path in paths if id(module := backbone.get_submodule(path)) not in twins]
        for _, module in second:
            twins[id(module)] = type(module).__new__(type(module))
        written = {place for places in facts.written for place in places} | set(facts.loose)
        self._own = own
        self._pairs: list[tuple[nn.Module, nn.Module]] = []
        self._values: list[tuple[nn.Module, nn.Module, str]] = []
        self._clones: list[tuple[nn.Module, nn.Module, str]] = []
        self._tensors: list[tuple[nn.Module, nn.Module, str]] = []
        self._flags: list[nn.Module] = []
        for path, module in second:
            twin = twins[id(module)]
            mine = [name.rpartition(".")[2] for name in loose if name.rpartition(".")[0] == path]
            changed = [name for place, name, is_buffer in facts.changes if place == path and is_buffer]
            cloned = [name for place, name in written if place == path and name not in mine]
            for name, value in module.__dict__.items():
                if name == "_modules":
                    value = {key: twins.get(id(child), child) for key, child in value.items()}
                elif name in ("_parameters", "_buffers"):
                    value = dict(value) if mine or changed or cloned else value
                else:
                    value = _mapped(value, twins)
                twin.__dict__[name] = value
            twin.__dict__.pop("_compiled_call_impl", None)
            if mine or changed or cloned:
                self._pairs.append((module, twin))
            self._clones += [(module, twin, name) for name in cloned]
            self._tensors += [(own._container(path), twin, name) for name in mine]
            self._values += [
                (module, twin, name) for place, name, is_buffer in facts.changes if place == path and not is_buffer
            ]
            self._flags.append(twin)
        points = [facts.points[within.unit - 1]]
        end = within.end or (facts.points[within.unit] if within.unit < len(facts.points) else None)
        before: tuple[frozenset[Key], ...] = (frozenset(), facts.before[within.unit], frozenset())
        if end is not None:
            points.append(end)
        narrowed = dataclasses.replace(facts, points=tuple(points), before=before[: len(points) + 1])
        self._forward = Forward(twins[id(backbone)], narrowed, chain.prediction, mode=chain.mode)

    def refreshed(self) -> Forward:
        """Bring what is the backbone's, and may have been replaced there, up to date."""
        training = self._own.training
        for twin in self._flags:
            twin.__dict__["training"] = training
        for module, twin in self._pairs:
            twin._parameters.update(module._parameters)
            twin._buffers.update(module._buffers)
        for module, twin, name in self._clones:
            buffer = module._buffers.get(name)
            twin._buffers[name] = None if buffer is None else buffer.clone()
        for module, twin, name in self._values:
            if name in module.__dict__:
                twin.__dict__[name] = copy.copy(module.__dict__[name])
            else:
                twin.__dict__.pop(name, None)
        for own, twin, name in self._tensors:
            if name in own._parameters:
                twin._parameters[name] = own._parameters[name]
            else:
                twin._parameters.pop(name, None)
                twin._buffers[name] = own._buffers[name]
        return self._forward

    def hand_back(self) -> None:
        """Keep buffers that the forward has assigned."""
        for own, twin, name in self._tensors:
            if name in own._buffers:
                own._buffers[name] = twin._buffers[name]


def _submodule(module: nn.Module, name: str) -> nn.Module | None:
    try:
        return module.get_submodule(name)
    except AttributeError:
        return None


def _mapped(value: Any, twins: dict[int, Any]) -> Any:
    """An attribute of a module with other modules in place of some; containers are copied."""
    if id(value) in twins:
        return twins[id(value)]
    kind = type(value)
    if kind in (list, tuple, set):
        return kind(_mapped(item, twins) for item in value)
    if kind in (dict, OrderedDict):
        return kind((key, _mapped(item, twins)) for key, item in value.items())
    if kind is types.MethodType and id(value.__self__) in twins:
        return types.MethodType(value.__func__, twins[id(value.__self__)])
    if kind is functools.partial:
        args = _mapped(value.args, twins)
        return functools.partial(_mapped(value.func, twins), *args, **_mapped(value.keywords, twins))
    return value


def _clones(backbone: nn.Module, inside: list[nn.Module]) -> dict[int, Any]:
    """For a deep copy of some modules: clones of their tensors, and the rest of the backbone as it is."""
    memo: dict[int, Any] = {}
    own: set[int] = set()
    for outer in inside:
        for module in outer.modules():
            own.add(id(module))
            for tensor in [*module._parameters.values(), *module._buffers.values()]:
                if tensor is not None and id(tensor) not in memo:
                    memo[id(tensor)] = _clone(tensor)
            for value in module.__dict__.values():
                if isinstance(value, Tensor) and not value.is_leaf:  # which cannot be copied
                    memo[id(value)] = value.detach()
    memo.update({id(module): module for module in backbone.modules() if id(module) not in own})
    return memo


def _clone(tensor: Tensor) -> Tensor:
    """On fake tensors where a mode makes these."""
    twin = tensor.detach().clone()
    return nn.Parameter(twin, tensor.is_floating_point()) if isinstance(tensor, nn.Parameter) else twin


def _covered(name: str, backbone: nn.Module, inside: list[nn.Module]) -> bool:
    """Whether a tensor belongs to one of some modules."""
    tensor = _held(backbone, name)
    return tensor is None or any(tensor is other for other in _tensors(inside))


def _tensors(modules: list[nn.Module]) -> Iterator[Tensor]:
    for module in modules:
        yield from module.parameters()
        yield from module.buffers()


def _held(backbone: nn.Module, name: str) -> Tensor | None:
    """A parameter or buffer of the network by its name."""
    path, _, leaf = name.rpartition(".")
    module = _submodule(backbone, path)
    if module is None:
        return None
    found = module._parameters.get(leaf)
    return found if found is not None else module._buffers.get(leaf)
