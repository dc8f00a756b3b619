"""The network's own forward, run as a whole or from one cut point to another.

[Note: from one cut point to another] To run some units only, the network itself is called with the batch. The calls of
modules that come before the first unit are not made: stand-ins return tensors without memory (fake tensors) of the
right shape, until the call whose output is the cut point, which returns the features that are given. From there on the
forward runs as ever, and ends when it comes to the last cut point. What makes masks, positions and tables needs none of
the modules that were left out, so it runs for real. Whatever an operation makes of a fake tensor is fake again: if what
comes out is fake, something before the first unit is used later beside the features, and the step is refused.

[Note: who holds the features] While a module runs, the frames of those who called it hold what they gave it: a ResNet's
forward holds the output of its first stage during all of the second. A local step has no use for it any more. When the
network is rehearsed on fake tensors, the references to the features of every cut are counted at the next cut; where a
step finds just as many, only waiting frames hold them, nobody reads them later, and their memory is given back: the
frames then hold NaN in that shape, which takes none.
"""

from __future__ import annotations

import contextlib
import copy
import sys
import weakref
from collections import OrderedDict
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any, Protocol

import torch
from torch import Tensor, nn
from torch._subclasses import FakeTensor, FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode, _disable_current_modes
from torch.utils._pytree import tree_flatten, tree_iter, tree_map_only, tree_unflatten
from torch.utils.weak import WeakTensorKeyDictionary

from ..recompute import RandomState, Stages, by_itself, held, started_from
from .batches import Batch, call, device_of, key_of, tensors_of
from .facts import Facts
from .intercept import Original, around, eagerly
from .kernels import Kernels
from .observe import Key, fake_batch, fake_twins
from .read_out import layer_of
from .untouched import swapped, untouched

__all__ = ["Forward", "Pass", "UnitStages", "emptied", "filled"]

_MOST_BLANKS = 256  # tensors without memory that are kept
_MOST_LAYOUTS = 8  # of batches that are remembered


def _uncompiled(model: nn.Module, paths: Iterable[str]) -> list[tuple[nn.Module, Any]]:
    """What has the modules around others run in Python, though they are compiled: a cut is made in between."""
    around_them = {""}
    for path in paths:
        parts = path.split(".")
        around_them |= {".".join(parts[:i]) for i in range(1, len(parts))}
    found: list[tuple[nn.Module, Any]] = []
    for path in around_them - set(paths):
        module = model.get_submodule(path)
        inner = module.__dict__["_modules"].get("_orig_mod") if type(module).__name__ == "OptimizedModule" else None
        if inner is not None:
            found.append((module, lambda _, args, kwargs, inner=inner: inner(*args, **kwargs)))
        elif module.__dict__.get("_compiled_call_impl") is not None:
            found.append((module, lambda _, args, kwargs, module=module: module._call_impl(*args, **kwargs)))
    return found


class _Stop(BaseException):
    """The forward has come to the last cut point; no ordinary handler of the network's shall catch it."""


class UnitStages(Stages, Protocol):
    """The inside of a unit as a chain of stages."""

    @property
    def num_stages(self) -> int:
        """Number of stages."""
        ...


class Insides(Protocol):
    """What knows the inside of units, see :class:`torchlocal.cut.inside.Inside`."""

    def is_stale(self) -> bool:
        """Whether the network has changed since it was looked at."""

    def refresh(self, sample: Any) -> None:
        """Look at the network anew, if it has changed."""

    def unit(self, unit: int) -> UnitStages | None:
        """The inside of one unit, where it is known."""


class _Closed:
    """Knows nothing."""

    def is_stale(self) -> bool:
        """There is nothing to know."""
        return False

    def refresh(self, sample: Any) -> None:
        """Nothing to do."""

    def unit(self, unit: int) -> None:
        """It is not known."""


class Forward:
    """A backbone's own forward, as a chain of units.

    Args:
        backbone: the user's network.
        facts: where it is cut, and what was seen.
        prediction: takes the prediction from what the network returns.
        inside: makes what knows the inside of its units; None: nobody does.
        mode: of the fake tensors that stand in.
    """

    def __init__(
        self,
        backbone: nn.Module,
        facts: Facts,
        prediction: Callable[[Any], Tensor],
        inside: Callable[[Forward], Insides] | None = None,
        mode: FakeTensorMode | None = None,
    ) -> None:
        self.backbone, self.facts, self.prediction = backbone, facts, prediction
        self.mode = mode or FakeTensorMode(allow_non_fake_inputs=True)
        self.kernels = Kernels(self.mode)
        self.twins = WeakTensorKeyDictionary()  # without memory, of parameters and buffers
        self.fake = False  # everything is fake, since a step is being predicted
        self.watch: Callable[[Tensor], None] | None = None  # is told of the features at every cut
        self.sample: Batch = None  # a batch of the layout that the network was cut with
        self.batch: Batch = None  # what the network is being called with now
        self.num_units = len(facts.points) + 1
        self.ends = {key: unit + 1 for unit, (key, _) in enumerate(facts.points)}  # by call, the unit that follows
        self.recorded: frozenset[Key] = frozenset().union(*facts.before)  # calls that may have to be left out
        self.compiled: dict[str, Any] | None = None
        self._inside = inside
        self.inside = inside(self) if inside is not None else _Closed()
        self._measured: OrderedDict[Any, dict[Any, Any]] = OrderedDict()
        self._blanks: dict[_Layout, Tensor] = {}
        self._layouts: OrderedDict[Any, dict[Key, Any]] = OrderedDict()
        self._made: dict[Any, dict[Key, Any]] = {}
        self._counts: OrderedDict[Any, dict[tuple[int, int], int]] = OrderedDict()

    def __deepcopy__(self, memo: dict[int, Any]) -> Forward:
        twin = Forward(
            copy.deepcopy(self.backbone, memo), self.facts, copy.deepcopy(self.prediction, memo), self._inside
        )
        twin.compiled, twin.sample = self.compiled, self.sample
        return twin

    # --- what belongs to units ---

    def parameters(self, first: int, last: int) -> list[nn.Parameter]:
        """The parameters that units ``first`` to ``last - 1`` read, as they are now."""
        names = dict.fromkeys(name for unit in self.facts.parameters[first:last] for name in unit)
        found = [p for name in names if (p := _tensor(self.backbone, name, "_parameters")) is not None]
        return list(dict.fromkeys(found))  # type: ignore[arg-type]

    def owners(self) -> dict[int, int]:
        """For every parameter and buffer, by ``id``, the last unit that uses it.

        One that no unit was seen to read, such as an adapter that came later, belongs to the unit of the module that it
        is in; what is in none, to the last unit.
        """
        owner: dict[int, int] = {}
        for unit, names in enumerate(self.facts.parameters):
            for name in names:
                if (tensor := _tensor(self.backbone, name, "_parameters")) is not None:
                    owner[id(tensor)] = unit
        for unit, names in enumerate(self.facts.buffers):
            for name in names:
                if (tensor := _tensor(self.backbone, name, "_buffers")) is not None:
                    owner[id(tensor)] = unit
        places = {path: unit for unit, paths in enumerate(self.facts.modules) for path in paths}
        named = [*self.backbone.named_parameters(), *self.backbone.named_buffers()]
        for name, tensor in named:
            if id(tensor) not in owner:
                parts = name.split(".")
                inside = (".".join(parts[:i]) for i in range(len(parts) - 1, 0, -1))
                owner[id(tensor)] = next((places[path] for path in inside if path in places), self.num_units - 1)
        return owner

    def first_users(self) -> dict[int, int]:
        """For every parameter, by ``id``, the first unit that reads it."""
        first: dict[int, int] = {}
        for unit, names in enumerate(self.facts.parameters):
            for name in names:
                if (tensor := _tensor(self.backbone, name, "_parameters")) is not None:
                    first.setdefault(id(tensor), unit)
        return first

    def written(self, first: int, last: int) -> list[tuple[dict[str, Tensor | None], str]]:
        """The buffers that these units write in place: where each is looked up."""
        places = dict.fromkeys(place for unit in self.facts.written[first:last] for place in unit)
        return _holders(self.backbone, places)

    def loose(self) -> list[tuple[dict[str, Tensor | None], str]]:
        """The buffers that code between the units writes in place."""
        return _holders(self.backbone, self.facts.loose)

    def compile(self, **options: Any) -> None:
        """Compile the outermost modules of every unit, each by itself; ``options`` go to :func:`torch.compile`."""
        self.compiled = options
        for paths in self.facts.modules:
            for path in paths:
                self.backbone.get_submodule(path).compile(**options)

    def look_inside(self, batch: Batch) -> None:
        """Trace the units where that has not been done since a module changed, outside of any mode of the caller's."""
        if not self.fake and self.inside.is_stale():
            by_itself(partial(self.inside.refresh, batch), device_of(batch, self.backbone))

    def stages_of(self, unit: int, *, to_read_out: bool) -> UnitStages | None:
        """The inside of one unit, where it is known; not of the last one in front of the read-out.

        Its trace goes on to the scores.
        """
        return None if to_read_out and unit == self.num_units - 1 else self.inside.unit(unit)

    # --- running ---

    def call(self, batch: Batch) -> Tensor:
        """The prediction, by an ordinary call of the network."""
        return self.prediction(call(self.backbone, batch))

    def needs_leaves(self) -> bool:
        """Whether features have to ask for a gradient, so that the inside of a checkpoint learns."""
        if self.facts.reentrant:
            return True
        return any(m.__dict__.get("gradient_checkpointing") is True for m in self.backbone.modules())

    def prediction_layout(self, batch: Batch) -> tuple[torch.Size, torch.dtype, torch.device]:
        """Shape, dtype and device of the prediction for such a batch."""
        with self._without_memory(batch) as fake, torch.no_grad():
            found = self.call(fake)
        return found.shape, found.dtype, found.device

    def expected(self, batch: Batch, stops: tuple[int, ...]) -> dict[tuple[int, int], int]:
        """By cut and next cut, how many references to the features there are when only waiting frames hold them."""
        if not self.facts.fake or len(stops) < 2:
            return {}
        flags = tuple(m.training for m in self.backbone.modules())
        key = stops, key_of(batch)[0], tuple(t.ndim for t in tensors_of(batch)), flags  # type: ignore[index]
        if key not in self._counts:
            self._counts[key] = by_itself(partial(self._count, batch, stops), device_of(batch, self.backbone))
            while len(self._counts) > _MOST_LAYOUTS:
                self._counts.popitem(last=False)
        return self._counts[key]

    def _count(self, batch: Batch, stops: tuple[int, ...]) -> dict[tuple[int, int], int]:
        """Rehearse a local step on fake tensors."""
        counts: dict[tuple[int, int], int] = {}
        handed: dict[int, Any] = {}
        storages: dict[int, int] = {}
        alive: list[Any] = []  # they are told apart by address
        last_used: dict[int, int] = {}
        here = 0

        class _Uses(TorchDispatchMode):
            def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
                for t in tree_iter((args, kwargs)):
                    if isinstance(t, Tensor) and (made := storages.get(t.untyped_storage()._cdata)) is not None:
                        last_used[made] = here
                return func(*args, **(kwargs or {}))

        def boundary(unit: int, features: Tensor) -> Tensor:
            nonlocal here
            here = unit
            handing = features.detach()
            alive.append(handing.untyped_storage())
            storages[alive[-1]._cdata] = unit
            handed[unit] = weakref.ref(handing)
            return handing

        try:
            with self._without_memory(batch) as fake:
                pass_ = Pass(self, fake, counts=counts)
                with torch.no_grad(), _Uses(), pass_.opened(stops):
                    pass_.run(0, self.num_units, [], boundary=boundary, stops=stops)
                pass_.close()
                kept = {made for made, reference in handed.items() if reference() is not None}  # in some attribute
        except Exception:  # it looks at values: nothing is given back early
            return {}
        return {
            (made, unit): count
            for (made, unit), count in counts.items()
            if made not in kept and last_used.get(made, 0) < unit
        }

    @contextlib.contextmanager
    def _without_memory(self, batch: Batch) -> Iterator[Batch]:
        """The network and a batch on fake tensors; in a prediction they are already."""
        if self.fake:
            with untouched(self.backbone), eagerly(self.backbone):
                yield batch
            return
        state = RandomState.get(device_of(batch, self.backbone))
        twins = fake_twins(self.backbone, self.mode, learn=False, known=self.twins)
        self.fake = True
        try:
            with eagerly(self.backbone), swapped(self.backbone, twins), torch.enable_grad():
                yield fake_batch(batch, self.mode)
        finally:
            self.fake = False
            state.set()

    def outputs(self, batch: Batch) -> dict[Key, Any]:
        """What the calls return that are left out when the network runs from a cut point on; tensors without memory.

        For a process that does not run the units before its own.
        """
        key = key_of(batch), self.fake
        if key not in self._layouts:
            self._layouts[key] = by_itself(partial(self._rehearse, batch), device_of(batch, self.backbone))
            while len(self._layouts) > _MOST_LAYOUTS:
                self._layouts.popitem(last=False)
        return self._layouts[key]

    def _rehearse(self, batch: Batch) -> dict[Key, Any]:
        with self._without_memory(batch) as fake, torch.no_grad():
            pass_ = Pass(self, fake)
            with pass_.opened():
                pass_.run(0, self.num_units, [])
        return pass_.outputs

    def measured(self, batch: Batch, what: str) -> dict[Any, Any]:
        """Where to keep what parts of the network take on a batch of this layout."""
        flags = tuple(m.training for m in self.backbone.modules())
        key = key_of(batch), flags, what
        if key not in self._measured:
            self._measured[key] = {}
            while len(self._measured) > _MOST_LAYOUTS:
                self._measured.popitem(last=False)
        return self._measured[key]

    def blank(self, layout: _Layout) -> Tensor:
        """A tensor without memory, which a counter of memory does not see; nobody reads it, so one does for all."""
        if layout not in self._blanks:
            if len(self._blanks) > _MOST_BLANKS:
                self._blanks.clear()
            with _disable_current_modes(), self.mode:
                self._blanks[layout] = torch.empty_strided(
                    layout.shape, layout.stride, dtype=layout.dtype, device=layout.device
                )
        return self._blanks[layout]

    def empty_outputs(self, batch: Batch) -> dict[Key, Any]:
        """``outputs`` as tensors without memory, made once for each layout, not seen by counters of memory."""
        key = key_of(batch), self.fake
        if key not in self._made:
            outputs = self.outputs(batch)
            if len(self._made) > _MOST_LAYOUTS:
                self._made.clear()
            self._made[key] = {
                call: ([self.blank(x) if isinstance(x, _Layout) else x for x in leaves], structure)
                for call, (leaves, structure) in outputs.items()
            }
        return self._made[key]


def _tensor(model: nn.Module, name: str, kind: str) -> Tensor | None:
    """A parameter or buffer as it is now, or None where there is none of that name any more."""
    path, _, leaf = name.rpartition(".")
    with contextlib.suppress(AttributeError):
        found: Tensor | None = getattr(model.get_submodule(path), kind).get(leaf)
        return found
    return None


def _holders(model: nn.Module, places: Iterable[tuple[str, str]]) -> list[tuple[dict[str, Tensor | None], str]]:
    holders = [(model.get_submodule(path)._buffers, name) for path, name in places]
    return [(own, name) for own, name in holders if own.get(name) is not None]


class _State:
    """The random generators, and the attributes that the forward assigns, at one moment."""

    def __init__(self, forward: Forward, device: torch.device) -> None:
        self.random = RandomState.get(device, numpy=forward.facts.python)
        self._values: list[tuple[Any, str, Any, Any]] = []
        for path, name, is_buffer in forward.facts.changes:
            module = forward.backbone.get_submodule(path)
            own: Any = module._buffers if is_buffer else module.__dict__
            value = own.get(name, _State)
            self._values.append((own, name, value, copy.copy(value) if isinstance(value, (list, dict, set)) else None))

    def restore(self) -> None:
        """Go back to it."""
        self.random.set()
        for own, name, value, content in self._values:
            if value is _State:
                own.pop(name, None)
                continue
            own[name] = value
            if content is not None:
                value.clear()
                (value.extend if isinstance(value, list) else value.update)(content)


@dataclass(frozen=True)
class _Layout:
    """A tensor without its numbers."""

    shape: torch.Size
    stride: tuple[int, ...]
    dtype: torch.dtype
    device: torch.device


Boundary = Callable[[int, Tensor], Tensor]


class Pass:
    """The forward passes of one step on one batch; a chain of stages (see :mod:`torchlocal.recompute`).

    Args:
        forward: the network's.
        batch: what it is called with.
        replay: it may run from any cut point to any other, and more than once; the random state is noted now.
        outputs: what the calls before this process's units return, where it does not run them itself.
        counts: is filled with the references to features, see ``Forward.expected``.
        expected: their numbers in a step, by which memory may be given back.
        entering: by unit, the random state there, for units up to the first that this process runs; others run those
            before it.
        embedding: what the network's first unit hands on is noted, without its graph, in a list of this name.
        to_read_out: the forward ends in front of the network's read-out, and gives what that would take.
    """

    def __init__(
        self,
        forward: Forward,
        batch: Batch,
        *,
        replay: bool = False,
        outputs: dict[Key, Any] | None = None,
        counts: dict[tuple[int, int], int] | None = None,
        expected: dict[tuple[int, int], int] | None = None,
        entering: dict[int, RandomState] | None = None,
        embedding: bool = False,
        to_read_out: bool = False,
    ) -> None:
        self.forward, self.batch = forward, batch
        self.read_out: nn.Linear | None = None  # the layer in front of which the forward ends
        self._ending: Key | None = None
        if to_read_out:
            self.read_out = layer_of(forward.backbone, forward.facts.read_out)  # which may have become another
            assert not isinstance(forward.facts.read_out, str)
            self._ending = forward.facts.read_out.call
        self.embedding: list[Tensor] = []
        self._noted = forward.facts.embedding if embedding else None
        self.outputs: dict[Key, Any] = dict(outputs or {})
        self.device = device_of(batch, forward.backbone)
        self._kept = tree_map_only(Tensor, torch.clone, batch) if forward.facts.input_written else None
        self._runs = 0
        self._counts, self._expected = counts, expected or {}
        self._replay = replay
        self._states: dict[int, _State] = {0: _State(forward, self.device)} if replay else {}
        self._entering = entering or {}
        if replay and 0 in self._entering:
            self._states[0].random = self._entering[0]
        self._clones: dict[int, list[Tensor]] = {}
        self._stubs: dict[Key, Any] = {}
        self._record: frozenset[Key] = frozenset()
        self._count: dict[str, int] = {}
        self._first = self._last = 0
        self._features: list[Tensor] = []
        self._boundary: Boundary | None = None
        self._stops: tuple[int, ...] = ()
        self._reached = 0
        self._ended = False
        self._arrived = True
        self._busy = True
        self._result: list[Tensor] = []
        self.beside: dict[int, Tensor] = {}  # by place, what the last cut's call returned without gradients
        self._handed: tuple[Any, int] | None = None
        self._loose: list[tuple[dict[str, Tensor | None], str, Tensor]] = []
        self._grad, self._hooks = True, None

    @contextlib.contextmanager
    def opened(self, stops: tuple[int, ...] | None = None) -> Iterator[Pass]:
        """Stand between the modules and their callers for a while.

        Args:
            stops: the only units whose ends matter, where the network runs as a whole; None: it may run from any cut
                point to any other.
        """
        facts = self.forward.facts
        if stops is None:
            self._record = self.forward.recorded
            paths = dict.fromkeys([*(path for path, _ in self._record), *(key[0] for key, _ in facts.points)])
        else:
            paths = dict.fromkeys(facts.points[unit - 1][0][0] for unit in stops)
        if self._noted is not None:
            paths[self._noted.call[0]] = None
        if self._ending is not None:
            paths[self._ending[0]] = None
        modules: list[tuple[nn.Module, Any]] = [
            (self.forward.backbone.get_submodule(path), partial(self._call, path)) for path in paths
        ]
        modules += _uncompiled(self.forward.backbone, paths) if paths else []
        before, self.forward.batch = self.forward.batch, self.batch
        # In evaluation torch's transformer layers may call none of their modules, and so come to no cut point inside.
        fast = torch.backends.mha.get_fastpath_enabled()
        torch.backends.mha.set_fastpath_enabled(False)
        try:
            with around(modules) if modules else contextlib.nullcontext():
                yield self
        finally:
            torch.backends.mha.set_fastpath_enabled(fast)
            self.forward.batch = before

    def close(self) -> None:
        """Let go of everything."""
        self._handed = None
        self._features.clear()
        self._result.clear()
        self.embedding.clear()

    # --- a run ---

    def run(
        self,
        first: int,
        last: int,
        state: list[Any],
        *,
        boundary: Boundary | None = None,
        stops: tuple[int, ...] = (),
    ) -> tuple[Tensor]:
        """Run units ``first`` to ``last - 1`` on the features in ``state``, which are taken out of it.

        Args:
            first: with 0 the network runs from its beginning, and ``state`` is empty.
            last: after the last unit comes the prediction.
            state: of one tensor.
            boundary: called with every unit of ``stops`` that the run passes and the features there, returns what is
                handed on.
            stops: see ``boundary``.

        Raises:
            ValueError: the forward does not come to a cut point, or cannot run from ``first``.
        """
        forward = self.forward
        if any(key not in self.outputs for key in forward.facts.before[first]):  # of units that others, or parts, ran
            self.outputs = forward.outputs(self.batch) | self.outputs
        self._first, self._last, self._count = first, last, {}
        self._boundary, self._stops, self._reached, self._ended = boundary, stops, 0, False
        self._features, self._arrived = ([state.pop()] if first else []), first == 0
        self._grad, self._hooks = torch.is_grad_enabled(), _saving()
        self._handed = None
        batch = self.batch
        if self._kept is not None:  # its own forward changes it
            batch = batch if self._runs == 0 and first == 0 else tree_map_only(Tensor, torch.clone, self._kept)
        if self._replay:
            if first and first not in self._entering:
                self._states.setdefault(first, _State(forward, self.device))
            if first or self._runs:
                self._states[0].restore()
            self._shield()
        self._runs += 1
        self._busy = False
        try:
            result = forward.call(batch)
        except _Stop as stop:
            stop.__traceback__ = None
            result = self._result.pop()
        finally:
            self._busy = True
            self._boundary = None  # it knows the step, which knows this pass: nothing shall wait for the collector
            self._unshield()
            self._result.clear()
            self._features.clear()
        self._check(result)
        return (result,)

    def _check(self, result: Tensor) -> None:
        forward = self.forward
        missed = [unit for unit in self._stops if unit > self._reached]
        if self._last < forward.num_units and self._reached != self._last:
            missed = missed or [self._last]
        if not self._arrived:
            missed = [self._first]
        if missed:
            path = forward.facts.points[missed[0] - 1][0][0]
            raise ValueError(
                f"model: the forward has not come to the cut point after {path!r} in this step (layers left out at "
                "random, or by a setting that has changed?); cut where it always comes, or decouple the network anew"
            )
        if self._ending is not None and self._last == forward.num_units and not self._ended:
            raise ValueError(
                f"model: the forward has not come to its read-out {self._ending[0]!r} in this step, or not as often as "
                "when it was decoupled; give scores='whole', or decouple the network anew"
            )
        self._refuse_fake(result)

    def _refuse_fake(self, result: Tensor) -> None:
        if self._first and isinstance(result, FakeTensor) and not self.forward.fake:
            path = self.forward.facts.points[self._first - 1][0][0]
            raise ValueError(
                f"model: it cannot run from the cut point after {path!r} on, since something that was computed before "
                "is used after it beside the features, though without a gradient; cut elsewhere, or take steps without "
                "recomputation in one process"
            )

    def _call(self, path: str, original: Original, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        """Stands in for the call of a module, or looks at what it returns."""
        if self._busy:  # not part of the forward: a checkpoint that runs again in backward
            return original(*args, **kwargs)
        number = self._count.get(path, 0) + 1
        self._count[path] = number
        key = path, number
        if not self._arrived and key in self.forward.facts.before[self._first]:
            del args, kwargs
            for inner, times in self.forward.facts.inner.get(key, {}).items():
                self._count[inner] = self._count.get(inner, 0) + times
            return self._stand_in(key)
        if key == self._ending:
            self._result.append(args[0] if args else kwargs["input"])
            self._ended = True
            del args, kwargs
            raise _Stop
        result = original(*args, **kwargs)
        del args, kwargs
        if not self._arrived:
            return result
        if key in self._record and key not in self.outputs:
            self.outputs[key] = _described(result, self.forward.facts.places[key])
        if self._noted is not None and key == self._noted.call:
            self.embedding[:] = [tree_flatten(result)[0][self._noted.place].detach()]
        unit = self.forward.ends.get(key)
        return result if unit is None else self._pass(unit, result)

    def _stand_in(self, key: Key) -> Any:
        facts = self.forward.facts
        unit = self.forward.ends.get(key)
        if unit == self._first:
            place = facts.points[unit - 1][1]
            leaves, structure = tree_flatten(self._stub(key))
            leaves[place] = self._features.pop()
            self._arrived = True
            self._unshield()
            if unit in self._states:
                self._states[unit].restore()
            elif unit in self._entering:  # code before it has run in this step for the first time here
                self._entering[unit].set()
                self._states[unit] = _State(self.forward, self.device)
            return tree_unflatten(leaves, structure)
        if facts.draws and unit in self._states:
            self._states[unit].restore()
        elif facts.draws and unit in self._entering:
            self._entering[unit].set()
        return self._stub(key)

    def _stub(self, key: Key) -> Any:
        """What a call returned, with tensors that have no memory."""
        if key not in self._stubs:
            leaves, structure = self.outputs[key]
            blank = self.forward.blank
            self._stubs[key] = [blank(leaf) if isinstance(leaf, _Layout) else leaf for leaf in leaves], structure
        leaves, structure = self._stubs[key]
        return tree_unflatten(list(leaves), structure)

    def _pass(self, unit: int, result: Any) -> Any:
        """The forward has come to a cut point."""
        self._reached = unit
        place = self.forward.facts.points[unit - 1][1]
        if unit == self._last:
            leaves = tree_flatten(result)[0]
            self._result.append(leaves[place])
            places = {place, *self.forward.facts.places[self.forward.facts.points[unit - 1][0]]}
            self.beside = {i: t for i, t in enumerate(leaves) if i not in places and isinstance(t, Tensor)}
            del result, leaves
            if self.forward.watch is not None:
                self.forward.watch(self._result[0])
            raise _Stop
        if self._boundary is None or unit not in self._stops:
            return result
        if torch.is_grad_enabled() != self._grad or _saving() != self._hooks:
            raise ValueError(
                f"model: the cut point after {self.forward.facts.points[unit - 1][0][0]!r} is inside of a checkpoint "
                "or of torch.no_grad, where a local loss cannot be learned; cut elsewhere, or leave the checkpoint "
                "around it out, since a local step keeps one module's activations anyway"
            )
        leaves, structure = tree_flatten(result)
        del result
        features = leaves[place]
        leaves[place] = None
        self._refuse_fake(features)
        if self.forward.watch is not None:
            self.forward.watch(features)
        self._busy = True
        handed = self._boundary(unit, features)
        self._busy = False
        if handed is features:
            del features
            leaves[place] = handed
            return tree_unflatten(leaves, structure)
        del features
        self._let_go(unit)
        self._handed = weakref.ref(handed), unit
        leaves = [leaf.detach() if isinstance(leaf, Tensor) and leaf.requires_grad else leaf for leaf in leaves]
        leaves[place] = handed
        return tree_unflatten(leaves, structure)

    def _let_go(self, unit: int) -> None:
        """Give the memory of the features before back, if only waiting frames hold them; see the note above."""
        if self._handed is None:
            return
        reference, made = self._handed
        features = reference()
        if features is None:
            return
        count = sys.getrefcount(features)
        if self._counts is not None:
            self._counts[made, unit] = count
        elif self._expected.get((made, unit)) == count and not features.requires_grad:
            features.data = features.new_full((1,), float("nan")).expand(features.shape)

    # --- running again ---

    @contextlib.contextmanager
    def replaying(self, first: int, last: int, *, new: bool, again: bool) -> Iterator[None]:
        """Note what these units start from when they run for the first time, and start from the same later on.

        Args:
            first: the first unit.
            last: the unit after the last.
            new: they run for the first time.
            again: they will run again.
        """
        if new and not again:
            yield
            return
        written = self.forward.written(first, last)
        if new:
            self._clones[first] = [held(*place).clone() for place in written]
            yield
            return
        now = _State(self.forward, self.device)
        self._states[first].restore()
        clones = self._clones[first] if again else self._clones.pop(first)
        try:
            with started_from(written, clones, again=again):
                yield
        finally:
            now.restore()

    def replay(self) -> Pass:
        """It replays its own units."""
        return self

    def inside(self, unit: int, state: list[Any]) -> UnitStages | None:
        """The nodes of one unit, as far as a trace reproduces it, and the network's input put into ``state``."""
        inside = self.forward.inside
        if not self.forward.fake:
            inside.refresh(self.batch)
        stages = self.forward.stages_of(unit, to_read_out=self.read_out is not None)
        if stages is not None and unit == 0:
            state.append(self.batch if self._kept is None else self._kept.clone())
        return stages

    def entry_index(self, unit: int) -> int | None:
        """Units hand on one tensor, which is never the network's input."""
        return None

    def _shield(self) -> None:
        """Have code before the first unit write into copies of buffers."""
        if self._first and self.forward.facts.loose:
            self._loose = [(own, name, held(own, name)) for own, name in self.forward.loose()]
            for own, name, tensor in self._loose:
                own[name] = tensor.clone()

    def _unshield(self) -> None:
        for own, name, tensor in self._loose:
            own[name] = tensor
        self._loose = []


def _saving() -> Any:
    """The hooks that saved tensors go to now; a checkpoint sets its own."""
    return torch._C._autograd._top_saved_tensors_default_hooks(True)


def _described(result: Any, places: Sequence[int]) -> tuple[list[Any], Any]:
    """What a call returned, tensors that carry gradients without their numbers."""
    leaves, structure = tree_flatten(result)
    for place in places:
        if place < len(leaves) and isinstance(t := leaves[place], Tensor):
            leaves[place] = _Layout(t.shape, t.stride(), t.dtype, t.device)
    return leaves, structure


def emptied(outputs: dict[Key, Any]) -> dict[Key, Any]:
    """``Pass.outputs`` for another batch of the layout, without the numbers of any tensor."""
    found = {}
    for key, (leaves, structure) in outputs.items():
        laid = [_Layout(t.shape, t.stride(), t.dtype, t.device) if isinstance(t, Tensor) else t for t in leaves]
        found[key] = laid, structure
    return found


def filled(outputs: dict[Key, Any], key: Key, beside: dict[int, Tensor]) -> dict[Key, Any]:
    """``Pass.outputs`` with what one call returned beside the features (``Pass.beside``)."""
    leaves, structure = outputs[key]
    return outputs | {key: ([beside.get(i, leaf) for i, leaf in enumerate(leaves)], structure)}
