"""One ordinary forward of the network, watched: which modules are called, what they cost, and the autograd graph.

[Note: fake parameters, real masks] The forward runs on parameters and floating-point inputs that have no memory (fake
tensors), while integers and masks stay what they are. What depends on a fake tensor is fake, everything else is really
computed; so a forward may look at the values of its masks. Only one that looks at the values of features, such as a
router's, is run on real tensors, whose saved activations are dropped at once.
"""

from __future__ import annotations

import contextlib
import logging
import weakref
from collections.abc import Callable, Hashable, Iterator
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn
from torch._subclasses import (  # the documented home of fake tensors; there is no public alias
    FakeTensor,
    FakeTensorMode,
)
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_flatten, tree_iter, tree_map_only
from torch.utils.flop_counter import flop_registry
from torch.utils.weak import WeakTensorKeyDictionary

from ..recompute import RandomState
from .batches import Batch, call, describe, device_of
from .intercept import Original, around, eagerly
from .untouched import swapped, training_mode, untouched

__all__ = ["Call", "Crossing", "Key", "Observation", "Operation", "fake_batch", "fake_twins", "is_sharded", "observe"]

Key = tuple[str, int]  # a call: path of the module, which of its calls
Node = Any  # torch.autograd.graph.Node
Value = tuple[Node, int]  # one output of a node
STATISTICS = ("running_mean", "running_var", "num_batches_tracked")  # kernels write them unseen
_HEAVY = ("embedding", "rnn", "lstm", "gru")  # beside what has a formula for FLOPs; of ids, not of positions alone


@dataclass
class Call:
    """One call of a module.

    Attributes:
        path: qualified name of the module.
        number: which of its calls, counted from 1.
        depth: how many other calls it is inside of.
        first: the first operation that ran inside.
        last: the operation after the last one.
        begin: autograd's count of nodes when it began.
        end: that when it returned.
        parent: the call that it is inside of, if any.
        values: for every tensor that it returned, its place among the leaves of what it returned, and the value in the
            autograd graph that it was when it returned.
        tensors: the same tensors, or, of a run on real tensors, fake ones of the same layout.
        references: weak ones to the tensors that were returned.
        versions: how often each of them had been written to by then.
        fed: for each of them, whether it depends on the batch.
        mixed: whether it returned anything beside tensors that carry gradients, and None.
        hidden: it was made inside of a checkpoint, or of ``torch.no_grad``.
        inputs: storage and shape of every tensor that it was given.
    """

    path: str
    number: int
    depth: int
    first: int
    begin: int
    parent: Call | None
    module: nn.Module
    last: int = 0
    end: int = 0
    values: list[tuple[int, Value]] = field(default_factory=list)
    tensors: list[Any] = field(default_factory=list)
    references: list[Any] = field(default_factory=list)
    versions: list[int] = field(default_factory=list)
    fed: list[bool] = field(default_factory=list)
    mixed: bool = False
    hidden: bool = False
    inputs: list[tuple[int, torch.Size]] = field(default_factory=list)

    def overwritten(self, index: int) -> bool:
        """Whether a tensor that it returned, if it is still there, has been written to since."""
        tensor = self.references[index]()
        return tensor is not None and tensor._version != self.versions[index]

    @property
    def key(self) -> tuple[str, int]:
        """What tells it apart from the other calls of a forward."""
        return self.path, self.number


@dataclass(frozen=True, slots=True)
class Operation:
    """One operation of the forward: what it is, in whose call, what it costs, which of the network's tensors it reads.

    ``reads`` and ``makes`` are the storages of its inputs and outputs.
    """

    kind: Hashable
    path: str
    flops: int
    heavy: bool
    parameters: tuple[str, ...]
    buffers: tuple[str, ...]
    draws: bool
    saved: dict[int, int]
    reads: tuple[int, ...] = ()
    makes: tuple[int, ...] = ()


@dataclass(frozen=True)
class Crossing:
    """A value that is used on both sides of a moment: who made it, and who uses it first afterwards."""

    value: Value
    made: int
    used: int


@dataclass
class Observation:
    """What one forward pass in training mode showed.

    Attributes:
        operations: in order.
        calls: of modules, in the order in which they returned.
        output: what the network returned.
        prediction: the tensor that the criterion gets.
        spans: for every value of the autograd graph that reaches the prediction, when it was made, and the last and all
            other times that it is used, in autograd's count of nodes.
        used: for every parameter, by name, the first and last operation that reads it.
        changes: attributes and buffers that the forward assigned: path of the module, name, whether it is a buffer.
        written: buffers that it changed in place, as (path of the module, name).
        input_written: it changed its own input in place.
        fake: it ran on fake tensors.
        reason: why it did not.
        draws: Python code drew from Python's or numpy's random generator.
        leaves: for every floating-point tensor of the batch its place among the leaves, and its storage.
        reentrant: it has checkpoints whose inside learns only if an input carries a gradient.
        mode: of the fake tensors.
        names: of the parameters, by ``id`` of what stood for them.
    """

    operations: list[Operation] = field(default_factory=list)
    calls: list[Call] = field(default_factory=list)
    output: Any = None
    prediction: Any = None
    spans: dict[Value, tuple[int, list[int]]] = field(default_factory=dict)
    changes: list[tuple[str, str, bool]] = field(default_factory=list)
    written: dict[tuple[str, str], int] = field(default_factory=dict)
    input_written: bool = False
    fake: bool = True
    reason: str = ""
    reentrant: bool = False
    draws: bool = False
    leaves: list[tuple[int, int]] = field(default_factory=list)
    mode: FakeTensorMode = field(default_factory=lambda: FakeTensorMode(allow_non_fake_inputs=True))
    names: dict[int, str] = field(default_factory=dict)

    def alive(self, moment: int) -> list[Crossing]:
        """The values that were made by a moment and are used after it."""
        found = []
        for value, (made, uses) in self.spans.items():
            later = [use for use in uses if use >= moment]
            if made < moment and later:
                found.append(Crossing(value, made, min(later)))
        return found

    def place(self, moment: int) -> str:
        """The innermost call that a node was made in, by its number in autograd's count."""
        call = self.innermost(moment)
        return call.path if call is not None else ""

    def innermost(self, moment: int) -> Call | None:
        """That call itself, if it was made in any."""
        inside = [c for c in self.calls if c.begin <= moment < c.end]
        return min(inside, key=lambda c: c.end - c.begin, default=None)


def clock() -> int:
    """Autograd's count of nodes, which every node carries as the number of its making."""
    return int(torch._C._autograd._get_sequence_nr())


def fake_twins(
    model: nn.Module, mode: FakeTensorMode, *, learn: bool, known: WeakTensorKeyDictionary | None = None
) -> dict[int, Tensor]:
    """For every parameter and floating-point buffer, by ``id``, one without memory; other buffers are copied.

    Args:
        model: the network.
        mode: of the fake tensors.
        learn: have all floating-point parameters ask for gradients, frozen ones too.
        known: those that were made before, which are used again where they still are alike, and to which others are
            added.
    """
    twins: dict[int, Tensor] = {}
    for tensor in [*model.parameters(), *model.buffers()]:
        if id(tensor) in twins:
            continue
        parameter = isinstance(tensor, nn.Parameter)
        wanted = parameter and (tensor.is_floating_point() if learn else tensor.requires_grad)
        twin = known.get(tensor) if known is not None else None
        if twin is not None and twin.requires_grad == wanted and _looks(twin) == _looks(tensor):
            twin.grad = None
        elif parameter:
            twin = nn.Parameter(_fake(tensor.detach(), mode), wanted)
        else:
            twin = _fake(tensor, mode) if tensor.is_floating_point() else tensor.clone()
        if known is not None and isinstance(twin, FakeTensor):  # numbers may be others by then
            known[tensor] = twin
        twins[id(tensor)] = twin
    return twins


def _looks(tensor: Tensor) -> tuple[Any, ...]:
    return tensor.shape, tensor.stride(), tensor.dtype, tensor.device


def _fake(tensor: Tensor, mode: FakeTensorMode) -> Tensor:
    return tensor.detach() if isinstance(tensor, FakeTensor) else mode.from_tensor(tensor)


def fake_batch(batch: Batch, mode: FakeTensorMode) -> Batch:
    """A batch whose floating-point tensors have no memory."""

    def fake(tensor: Tensor) -> Tensor:
        if isinstance(tensor, FakeTensor):
            return tensor
        return mode.from_tensor(tensor.detach()) if tensor.is_floating_point() else tensor

    return tree_map_only(Tensor, fake, batch)


def observe(model: nn.Module, sample: Batch, prediction: Callable[[Any], Tensor]) -> Observation:
    """Run the network once in training mode, and leave it, its buffers and all random generators as they were.

    Args:
        model: the backbone.
        sample: a batch.
        prediction: takes the prediction from what the network returns.

    Raises:
        ValueError: the network does not run on the sample, or has uninitialised parameters.
    """
    tensors = [*model.parameters(), *model.buffers()]
    if any(isinstance(t, (nn.UninitializedParameter, nn.UninitializedBuffer)) for t in tensors):
        raise ValueError("model: it has uninitialised (lazy) parameters; run one forward pass before decoupling it")
    try:
        if any(is_sharded(t) for t in tensors):
            raise ValueError("its parameters are sharded")
        with quietly():
            seen = _watched(model, sample, fake=True)
    except Exception as missing:  # a forward that looks at the values of its features needs real ones
        try:
            seen = _watched(model, sample, fake=False)
            seen.reason = _first_line(missing)
        except Exception as error:
            raise ValueError(
                f"sample: {type(model).__name__} does not run on {_input(sample)}: {_first_line(error)}"
            ) from error
    seen.prediction = prediction(seen.output)
    _follow_graph(seen)
    return seen


def is_sharded(tensor: Tensor) -> bool:
    """Whether a tensor is spread over processes (a DTensor), which its module gathers by hooks."""
    return type(tensor).__name__ == "DTensor" or any(c.__name__ == "DTensor" for c in type(tensor).__mro__)


def _first_line(error: Exception) -> str:
    lines = str(error).strip().splitlines()
    return f"{type(error).__name__}: {lines[0]}" if lines else type(error).__name__


@contextlib.contextmanager
def quietly() -> Iterator[None]:
    """Without what torch logs of an operation that does not run on fake tensors: there is another way."""
    logger = logging.getLogger("torch._subclasses.fake_tensor")
    before, logger.disabled = logger.disabled, True
    try:
        yield
    finally:
        logger.disabled = before


def _input(sample: Batch) -> str:
    return f"an input of shape {tuple(sample.shape)}" if isinstance(sample, Tensor) else describe(sample)


def _watched(model: nn.Module, sample: Batch, *, fake: bool) -> Observation:
    seen = Observation(fake=fake)
    if fake:
        twins, batch = fake_twins(model, seen.mode, learn=True), fake_batch(sample, seen.mode)
    else:
        twins = {
            id(t): nn.Parameter(t.detach(), t.is_floating_point()) if isinstance(t, nn.Parameter) else t.clone()
            for t in [*model.parameters(), *model.buffers()]
            if not is_sharded(t)
        }
        batch = tree_map_only(Tensor, torch.clone, sample)
    random = RandomState.get(device_of(sample, model))
    with contextlib.ExitStack() as stack:
        stack.enter_context(eagerly(model))
        stack.enter_context(swapped(model, twins))
        before = stack.enter_context(untouched(model))
        stack.enter_context(training_mode(model))
        stack.enter_context(torch.enable_grad())
        checkpointed = set()
        for path, module in model.named_modules():  # what a checkpoint hides is to be seen
            if module.__dict__.get("gradient_checkpointing") is True:
                module.gradient_checkpointing = False
                seen.reentrant = True
                if any(c.__name__ == "GradientCheckpointingLayer" for c in type(module).__mro__):  # of transformers
                    checkpointed.add(path)
        watch = _Watch(model, seen, batch)
        stack.callback(random.set)
        versions = [(t, t._version) for t in tree_iter(batch) if isinstance(t, Tensor)]
        with watch, around(watch.handlers()), torch.autograd.graph.saved_tensors_hooks(watch.pack, watch.unpack):
            watch.baseline()
            seen.output = call(model, batch)
        for module in model.modules():  # FSDP's, which hold what they have gathered until a backward pass
            if any(c.__name__ == "FSDPModule" for c in type(module).__mro__):
                module.reshard()  # type: ignore[operator]
        for c in seen.calls:
            c.hidden |= any(parent.path in checkpointed for parent in _parents(c))
        seen.draws = random.differs_in_python()
        seen.input_written = any(t._version != version for t, version in versions)
        seen.names = {id(parameter): name for name, parameter in model.named_parameters()}
        paths = {module: path for path, module in model.named_modules()}
        seen.changes = [
            (paths[module], name, is_buffer)
            for module, name, is_buffer in before.changed()
            if name not in ("training", "gradient_checkpointing", "_flat_weights", "_compiled_call_impl")
        ]
        watch.finish()
        watch.release()
    return seen


def _layout(tensor: Tensor, mode: FakeTensorMode) -> Tensor:
    with mode:
        return torch.empty_strided(tensor.shape, tensor.stride(), dtype=tensor.dtype, device=tensor.device)


def _parents(call: Call) -> Iterator[Call]:
    while call.parent is not None:
        call = call.parent
        yield call


class _Watch(TorchDispatchMode):
    """Notes every operation and every call of a module."""

    def __init__(self, model: nn.Module, seen: Observation, batch: Batch) -> None:
        super().__init__()
        self._fed = {t.untyped_storage()._cdata for t in tree_iter(batch) if isinstance(t, Tensor)}
        self._model, self._seen = model, seen
        seen.leaves = [
            (place, leaf.untyped_storage()._cdata)
            for place, leaf in enumerate(tree_flatten(batch)[0])
            if isinstance(leaf, Tensor) and leaf.is_floating_point()
        ]
        self._parameters = {id(p): n for n, p in model.named_parameters()}
        self._buffers = {id(b): n for n, b in model.named_buffers()}
        own = [*model.parameters(), *model.buffers()]
        self._own = {t.untyped_storage()._cdata for t in own}
        self._versions = {n: (b, b._version) for n, b in model.named_buffers()}
        self._stack: list[Call] = []
        self._count: dict[str, int] = {}
        self._saved: dict[int, int] = {}
        self._alive: list[Any] = []  # storages are told apart by address, so none may be freed before the end

    def baseline(self) -> None:
        """The hooks that saved tensors go to outside of any checkpoint."""
        self._hooks = torch._C._autograd._top_saved_tensors_default_hooks(True)

    def release(self) -> None:
        """Let go of the network: the graph keeps this, as the hooks of what it would have saved."""
        del self._model, self._seen, self._versions, self._alive

    def handlers(self) -> list[tuple[nn.Module, Any]]:
        """For every module but the root, what notes its calls."""
        named = [(path, module) for path, module in self._model.named_modules() if path]
        return [
            (module, lambda original, args, kwargs, p=path, m=module: self._call(p, m, original, args, kwargs))
            for path, module in named
        ]

    def _call(self, path: str, module: nn.Module, original: Original, args: Any, kwargs: Any) -> Any:
        seen = self._seen
        self._count[path] = number = self._count.get(path, 0) + 1
        parent = self._stack[-1] if self._stack else None
        made = Call(path, number, len(self._stack), len(seen.operations), clock(), parent, module)
        made.inputs = [
            (t.untyped_storage()._cdata, t.shape) for t in tree_iter((args, kwargs)) if isinstance(t, Tensor)
        ]
        self._stack.append(made)
        try:
            result = original(*args, **kwargs)
        finally:
            self._stack.pop()
        self.finish()  # outputs are saved after it, and before the call that it is in returns
        made.last, made.end = len(seen.operations), clock()
        hooks = torch._C._autograd._top_saved_tensors_default_hooks(True)
        made.hidden = hooks != self._hooks or not torch.is_grad_enabled()
        for place, leaf in enumerate(tree_flatten(result)[0]):
            if isinstance(leaf, Tensor) and leaf.grad_fn is not None and leaf.is_floating_point():
                made.values.append((place, (leaf.grad_fn, leaf.output_nr)))
                made.tensors.append(leaf if seen.fake else _layout(leaf, seen.mode))
                made.references.append(weakref.ref(leaf))
                made.versions.append(leaf._version)
                made.fed.append(leaf.untyped_storage()._cdata in self._fed)
            elif leaf is not None:
                made.mixed = True
        seen.calls.append(made)
        return result

    def pack(self, tensor: Tensor) -> Any:
        """Note what autograd keeps for backward, and keep nothing."""
        key = tensor.untyped_storage()._cdata
        if key not in self._own:
            self._saved[key] = tensor.untyped_storage().nbytes()
        if self._seen.fake:
            self._alive.append(tensor)

    def unpack(self, _: Any) -> Any:
        """There is no backward pass."""
        raise AssertionError

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        result = func(*args, **kwargs)
        formula = flop_registry.get(func._overloadpacket)
        flops = 0
        if formula is not None:
            with contextlib.suppress(Exception):  # a formula that does not know these arguments
                flops = int(formula(*args, **kwargs, out_val=result))
        inputs = [t for t in tree_iter((args, kwargs)) if isinstance(t, Tensor)]
        parameters = tuple(self._parameters[id(t)] for t in inputs if id(t) in self._parameters)
        buffers = tuple(self._buffers[id(t)] for t in inputs if id(t) in self._buffers)
        name = str(func)
        reads = tuple(t.untyped_storage()._cdata for t in inputs)
        fed = any(key in self._fed for key in reads)
        made = [t for t in tree_iter(result) if isinstance(t, Tensor)]
        keys = {t.untyped_storage()._cdata for t in made}
        self._seen.operations.append(
            Operation(
                kind=(name, tuple((t.shape, t.dtype) for t in inputs)),
                path=self._stack[-1].path if self._stack else "",
                flops=flops,
                heavy=flops > 0 or (fed and any(word in name for word in _HEAVY)),
                parameters=parameters,
                buffers=buffers,
                draws=torch.Tag.nondeterministic_seeded in func.tags,
                saved={},
                reads=reads,
                makes=tuple(keys),
            )
        )
        for full in buffers:
            owner, _, leaf = full.rpartition(".")
            buffer, version = self._versions[full]
            if buffer._version != version or leaf in STATISTICS or (func._schema.is_mutable and args[0] is buffer):
                self._seen.written.setdefault((owner, leaf), len(self._seen.operations) - 1)
        if fed:
            self._fed |= keys
        else:  # the address of one that was freed
            self._fed -= keys
        self._alive.extend(made if self._seen.fake else ())
        self.finish()  # inputs are saved before an operation runs
        return result

    def finish(self) -> None:
        """What was saved since belongs to the last operation."""
        if self._saved and self._seen.operations:
            self._seen.operations[-1].saved.update(self._saved)
            self._saved.clear()


def _follow_graph(seen: Observation) -> None:
    """Find when every value that reaches the prediction is made and used."""
    root = getattr(seen.prediction, "grad_fn", None)
    if root is None:
        return
    todo, known = [root], {root}
    while todo:
        node = todo.pop()
        when = node._sequence_nr()
        seen.reentrant |= type(node).__name__ == "CheckpointFunctionBackward"
        for following, output in node.next_functions:
            if following is None or type(following).__name__ == "AccumulateGrad":
                continue
            value = (following, output)
            if value not in seen.spans:
                seen.spans[value] = (following._sequence_nr(), [])
            seen.spans[value][1].append(when)
            if following not in known:
                known.add(following)
                todo.append(following)
