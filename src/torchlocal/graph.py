"""The backbone's forward graph: traced, observed once on fake tensors, run piece by piece on the original submodules.

The traced graph only ever runs training segments. Inference, ``state_dict`` and ``parameters()`` go through the
backbone itself, so tracing leaves no mark on it.
"""

from __future__ import annotations

import contextlib
import operator
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, fx, nn
from torch._subclasses import FakeTensorMode  # the documented home of fake tensors; there is no public alias
from torch.utils.flop_counter import FlopCounterMode

if TYPE_CHECKING:
    from .nodes import NodeStages

_ADVICE = "pass a list of modules, or an nn.Sequential, that does the same"


class _Untraceable(Exception):
    """The submodule at ``path`` cannot be traced."""

    def __init__(self, path: str) -> None:
        super().__init__(path)
        self.path = path


class _Tracer(fx.Tracer):
    """Keeps modules without children whole, so that their ``self.training`` is read when they run, not when traced."""

    proxy_buffer_attributes = True  # else an in-place operation on a buffer would run while tracing, and never again

    def __init__(self, opaque: frozenset[str]) -> None:
        super().__init__()
        self._opaque = opaque

    def is_leaf_module(self, m: nn.Module, module_qualified_name: str) -> bool:
        if module_qualified_name in self._opaque or next(m.children(), None) is None or "running_mean" in m._buffers:
            return True
        return super().is_leaf_module(m, module_qualified_name)

    def call_module(self, m: nn.Module, forward: Callable[..., Any], args: tuple[Any, ...], kwargs: Any) -> Any:
        try:
            return super().call_module(m, forward, args, kwargs)
        except _Untraceable:
            raise
        except Exception as error:
            raise _Untraceable(self.path_of_module(m)) from error


@dataclass(frozen=True)
class Trace:
    """A traced forward: its graph, the tensors it made on the way, and the submodules that were kept whole."""

    graph: fx.Graph
    constants: dict[str, Any]
    opaque: frozenset[str]
    nodes: list[fx.Node] = field(init=False)

    def __post_init__(self) -> None:
        skipped = {"placeholder", "get_attr", "output"}
        object.__setattr__(self, "nodes", [n for n in self.graph.nodes if n.op not in skipped])

    def identities(self) -> list[tuple[str, str, str, int]]:
        """What each node does, in which module and for which time: it survives tracing again in another mode."""
        seen: dict[tuple[str, str, str], int] = {}
        found = []
        for node in self.nodes:
            key = (node.op, str(node.target), ["", *module_paths(node)][-1])
            seen[key] = seen.get(key, 0) + 1
            found.append((*key, seen[key]))
        return found


def module_paths(node: fx.Node) -> list[str]:
    """Qualified names of the modules that ``node`` runs in, outermost first."""
    return [path for path, _ in node.meta.get("nn_module_stack", {}).values()]


def trace(model: nn.Module, *, opaque: frozenset[str] = frozenset()) -> Trace:
    """Trace ``model`` with torch.fx, keeping submodules whole that cannot be traced.

    Args:
        model: any module whose forward maps one tensor to one tensor.
        opaque: qualified names of submodules that are kept whole in any case.

    Raises:
        ValueError: the forward of ``model`` itself cannot be traced, or does not take one tensor.
    """
    attributes: tuple[dict[str, Any], ...] = (model.__dict__, model._parameters, model._buffers)
    before = [set(names) for names in attributes]
    constants: dict[str, Any] = {}
    try:
        while True:
            try:
                graph = _Tracer(opaque).trace(model)
                break
            except _Untraceable as error:
                opaque |= {error.path}
            except Exception as error:
                reason = str(error).strip().split("\n")[0]
                raise ValueError(
                    f"model: the forward of {type(model).__name__} cannot be traced ({reason}); {_ADVICE}"
                ) from error
    finally:  # tracing stows the tensors that it meets in attributes of the model: take them out again
        for names, known in zip(attributes, before, strict=True):
            for name in set(names) - known:
                value = names.pop(name)
                if name.startswith("_") and isinstance(value, Tensor):
                    constants[name] = value
    placeholders = [n for n in graph.nodes if n.op == "placeholder"]
    required = [n for n in placeholders if not n.args and not str(n.target).startswith("*")]
    if len(required) != 1 and not (placeholders and not required):
        raise ValueError(
            f"model: the forward of {type(model).__name__} takes {len(required)} inputs, but must take one tensor; "
            "wrap it in a module that does"
        )
    for node in placeholders[1:]:  # optional arguments keep their defaults
        node.replace_all_uses_with(node.args[0] if node.args else None)
        graph.erase_node(node)
    return Trace(graph, constants, opaque)


def get_attribute(model: nn.Module, target: str) -> Any:
    """The submodule, parameter or buffer of ``model`` that a graph calls ``target``."""
    return operator.attrgetter(target)(model)


@contextlib.contextmanager
def training_mode(model: nn.Module) -> Iterator[None]:
    """Put ``model`` in training mode, and every submodule back as it was."""
    flags = [(module, module.training) for module in model.modules()]
    model.train()
    try:
        yield
    finally:
        for module, flag in flags:
            module.training = flag


@dataclass
class Observation:
    """What one forward pass on fake tensors showed, node by node."""

    flops: list[int] = field(default_factory=list)
    saved: list[dict[int, int]] = field(default_factory=list)  # bytes by storage, kept for backward
    crossing: list[fx.Node | None] = field(default_factory=list)  # the one tensor alive after the node
    values: dict[fx.Node, Any] = field(default_factory=dict)
    mutated: list[list[tuple[str, str]]] = field(default_factory=list)  # (module, buffer) that the node writes
    written: list[list[fx.Node]] = field(default_factory=list)  # values that the node changes in place
    output: Any = None
    mode: FakeTensorMode = field(default_factory=lambda: FakeTensorMode(allow_non_fake_inputs=True))


def _crossing_nodes(traced: Trace) -> list[fx.Node | None]:
    """For every node, the only value that is alive after it, or None where several are."""
    position = {node: i for i, node in enumerate(traced.nodes)}
    last_use: dict[fx.Node, int] = {}
    made_at: dict[fx.Node, int] = {}
    for node in traced.graph.nodes:
        if node.op == "get_attr":  # parameters and constants are read where they are needed
            continue
        made_at[node] = position.get(node, -1)
        uses = [position.get(user, len(traced.nodes)) for user in node.users]
        last_use[node] = max(uses, default=-1)
    crossing: list[fx.Node | None] = []
    alive: set[fx.Node] = {n for n in made_at if made_at[n] < 0 and last_use[n] >= 0}
    for i, node in enumerate(traced.nodes):
        if last_use[node] > i:
            alive.add(node)
        alive = {n for n in alive if last_use[n] > i}
        crossing.append(next(iter(alive)) if len(alive) == 1 else None)
    return crossing


def read_tensors(model: nn.Module, node: fx.Node) -> list[Tensor]:
    """The parameters and buffers of ``model`` that ``node`` reads."""
    found: list[Tensor] = []
    if node.op == "call_module":
        module = model.get_submodule(str(node.target))
        found += [*module.parameters(), *module.buffers()]
    for argument in node.all_input_nodes:
        if argument.op == "get_attr":
            with contextlib.suppress(AttributeError):  # a constant of the trace
                found.append(get_attribute(model, str(argument.target)))
    return found


class _Probe(nn.Module):
    """Runs the graph node by node on fake tensors and notes what it sees."""

    def __init__(self, backbone: nn.Module, traced: Trace, seen: Observation) -> None:
        super().__init__()
        self.backbone = backbone
        self._traced, self._seen = traced, seen

    def forward(self, x: Tensor) -> Any:
        traced, seen = self._traced, self._seen
        ignored = {_storage_key(t) for t in [*self.backbone.parameters(), *self.backbone.buffers()]}
        buffers = {name: (b, b._version) for name, b in self.backbone.named_buffers()}
        alive: list[Tensor] = []  # storages are told apart by address, so none may be freed before the end
        saved: dict[int, int] = {}

        def note(tensor: Tensor) -> Tensor:
            alive.append(tensor)
            key = _storage_key(tensor)
            if key not in ignored:
                saved[key] = tensor.untyped_storage().nbytes()
            return tensor

        versions: list[int] = []
        crossing = _crossing_nodes(traced)
        environment: dict[fx.Node, Any] = {}
        counter = FlopCounterMode(display=False)
        counted = 0
        with counter, torch.autograd.graph.saved_tensors_hooks(note, lambda tensor: tensor):
            for node in traced.graph.nodes:
                args, kwargs = fx.node.map_arg((node.args, node.kwargs), environment.__getitem__)
                if node.op == "placeholder":
                    environment[node] = x
                    continue
                if node.op == "get_attr":
                    name = str(node.target)
                    value = traced.constants.get(name)
                    environment[node] = get_attribute(self.backbone, name) if value is None else value
                    continue
                if node.op == "output":
                    seen.output = args[0]
                    break
                saved = {}
                before = {n: v._version for n, v in environment.items() if isinstance(v, Tensor)}
                if node.op == "call_module":
                    value = self.backbone.get_submodule(str(node.target))(*args, **kwargs)
                elif node.op == "call_method":
                    value = getattr(args[0], str(node.target))(*args[1:], **kwargs)
                else:
                    assert callable(node.target)
                    value = node.target(*args, **kwargs)
                seen.written.append([n for n, version in before.items() if environment[n]._version != version])
                environment[node] = value
                if isinstance(value, Tensor):
                    alive.append(value)
                total = counter.get_total_flops()
                seen.flops.append(total - counted)
                counted = total
                seen.saved.append(saved)
                seen.mutated.append(self._mutated(node, buffers))
                crosser = crossing[len(versions)]
                value = environment.get(crosser) if crosser is not None else None
                versions.append(value._version if isinstance(value, Tensor) else -1)
        for i, crosser in enumerate(crossing):
            value = environment.get(crosser) if crosser is not None else None
            usable = isinstance(value, Tensor) and value.is_floating_point() and value.requires_grad
            # A later in-place operation would overwrite the boundary that the next module reads.
            seen.crossing.append(crosser if usable and value._version == versions[i] else None)  # type: ignore[union-attr]
        seen.values = environment
        return seen.output

    def _mutated(self, node: fx.Node, buffers: dict[str, tuple[Tensor, int]]) -> list[tuple[str, str]]:
        """Buffers that ``node`` writes: their version moved, or they are running statistics (written unseen)."""
        names = [str(n.target) for n in node.all_input_nodes if n.op == "get_attr"]
        if node.op == "call_module":
            path = str(node.target)
            names += [f"{path}.{name}" for name, _ in self.backbone.get_submodule(path).named_buffers()]
        found = []
        for full in names:
            if full not in buffers:
                continue
            owner, _, leaf = full.rpartition(".")
            buffer, version = buffers[full]
            if buffer._version != version or leaf in ("running_mean", "running_var", "num_batches_tracked"):
                found.append((owner, leaf))
        return found


def _sides(shape: torch.Size) -> bool:
    """Whether more than one dimension beside the batch's has an extent."""
    return sum(side > 1 for side in shape[1:]) > 1


def _storage_key(tensor: Tensor) -> int:
    return tensor.untyped_storage()._cdata


def observe(model: nn.Module, traced: Trace, sample: Tensor) -> Observation:
    """Run ``traced`` once on fake tensors: no memory, no arithmetic, no random numbers drawn.

    Only a forward that looks at the values of its tensors is run on real ones.

    Args:
        model: the backbone that was traced.
        traced: its trace.
        sample: an input batch (N, ...); only its shape, dtype and device are used.

    Raises:
        ValueError: the model does not run on an input of this shape, or does not return one tensor.
    """
    tensors = [*model.named_parameters(remove_duplicate=False), *model.named_buffers(remove_duplicate=False)]
    if any(isinstance(t, (nn.UninitializedParameter, nn.UninitializedBuffer)) for _, t in tensors):
        raise ValueError("model: it has uninitialised (lazy) parameters; run one forward pass before decoupling it")
    try:
        seen = _run_probe(model, traced, sample, fake=True)
    except Exception:  # a forward that looks at the values of its tensors needs real ones
        try:
            seen = _run_probe(model, traced, sample, fake=False)
        except Exception as error:
            reason = str(error).strip().split("\n")[0]
            raise ValueError(
                f"sample: {type(model).__name__} does not run on an input of shape {tuple(sample.shape)} ({reason}); "
                "give a batch of the shape that it is made for"
            ) from error
    if not isinstance(seen.output, Tensor):
        raise ValueError(
            f"model: {type(model).__name__} returns {type(seen.output).__name__}, but must return one tensor; "
            "wrap it in a module that does"
        )
    owners = [{id(t) for t in read_tensors(model, node)} for node in traced.nodes]
    later: set[int] = set()
    for i in range(len(owners) - 1, 0, -1):  # a parameter used on both sides of a cut would get two modules' gradients
        later |= owners[i]
        if any(owners[j] & later for j in range(i)):
            seen.crossing[i - 1] = None
    return seen


def _run_probe(model: nn.Module, traced: Trace, sample: Tensor, *, fake: bool) -> Observation:
    """One observed forward pass in training mode that leaves parameters, buffers and random state as they are."""
    seen = Observation()
    copies: dict[int, Tensor] = {}  # tied parameters stay tied
    state = {}
    tensors = [*model.named_parameters(remove_duplicate=False), *model.named_buffers(remove_duplicate=False)]
    for name, tensor in tensors:
        if id(tensor) not in copies:
            kept = tensor if isinstance(tensor, nn.Parameter) else tensor.clone()
            copies[id(tensor)] = seen.mode.from_tensor(tensor) if fake else kept
        state[f"backbone.{name}"] = copies[id(tensor)]
    batch = seen.mode.from_tensor(sample) if fake else sample.clone()
    with contextlib.ExitStack() as stack:
        stack.enter_context(seen.mode if fake else torch.random.fork_rng())
        stack.enter_context(torch.enable_grad())
        stack.enter_context(training_mode(model))
        torch.func.functional_call(_Probe(model, traced, seen), state, (batch,))
    return seen


class Chain:
    """The backbone as a chain of units that run one after another, each on the backbone's own submodules.

    Args:
        backbone: the user's network.
        traced: its trace in training mode.
        cuts: for every unit but the last, the index of its last node in ``traced.nodes``.
        mutated: for every unit, the buffers that its forward writes, as (module, buffer) names.
        seen: what the trace's nodes did.
    """

    def __init__(
        self,
        backbone: nn.Module,
        traced: Trace,
        cuts: Sequence[int],
        mutated: Sequence[list[tuple[str, str]]],
        seen: Observation,
    ) -> None:
        self.backbone = backbone
        self.num_units = len(cuts) + 1
        identities = traced.identities()
        self._opaque, self._ends = traced.opaque, [identities[cut] for cut in cuts]
        self._mutated = [list(names) for names in mutated]
        known = dict(zip(traced.nodes, identities, strict=True))
        # By node, since each trace makes its own: the values that it changes in place; those that are no single value.
        self.written = {known[n]: {known.get(w) for w in seen.written[i]} for i, n in enumerate(traced.nodes)}
        self.composite = {known.get(n) for n, value in seen.values.items() if isinstance(value, (tuple, list, dict))}
        self.shapes = {known.get(n): value.shape for n, value in seen.values.items() if isinstance(value, Tensor)}
        self.compiled: dict[str, Any] | None = None
        self._trace: Trace | None = None
        self._key: object = None
        self._attributes: list[tuple[str, Any]] = []
        self._segments: dict[object, dict[tuple[int, int], fx.GraphModule]] = {}
        self._inside: dict[object, dict[int, NodeStages]] = {}
        self._cuts: list[int] = []
        self._crossing: list[fx.Node] = []

    def __getstate__(self) -> dict[str, Any]:
        # Copies trace their own backbone again.
        return {
            **self.__dict__,
            "_trace": None,
            "_key": None,
            "_segments": {},
            "_inside": {},
            "_cuts": [],
            "_crossing": [],
            "_attributes": [],
        }

    def compile(self, **options: Any) -> None:
        """Compile every segment from now on; ``options`` go to :func:`torch.compile`."""
        self.compiled = options
        self._segments.clear()
        self._key = None

    def refresh(self, device: torch.device) -> None:
        """Trace again if a submodule, its training flag, a plain tensor or the device changed since the last call."""
        key = (device, *((id(m), m.training) for m in self.backbone.modules()))
        if key == self._key and all(get_attribute(self.backbone, name) is t for name, t in self._attributes):
            return
        traced = trace(self.backbone, opaque=self._opaque)
        position = {identity: i for i, identity in enumerate(traced.identities())}
        crossing = _crossing_nodes(traced)
        cuts = [position.get(end, -1) for end in self._ends]
        if any(cut < 0 or crossing[cut] is None for cut in cuts) or cuts != sorted(cuts):
            raise ValueError(
                "model: in this mode its forward runs other operations around the cut points than in training mode; "
                "call train() first, or pass a list of modules"
            )
        if len(self._segments) > 8:
            self._segments.clear()
            self._inside.clear()
        self._trace, self._key = traced, key
        self._cuts, self._crossing = cuts, [node for cut in cuts if (node := crossing[cut]) is not None]
        names = {str(n.target) for n in traced.graph.nodes if n.op == "get_attr"} - traced.constants.keys()
        self._attributes = [(name, get_attribute(self.backbone, name)) for name in names]
        self._segments[key] = {}

    def segment(self, first: int, last: int) -> fx.GraphModule:
        """The module that runs units ``first`` to ``last - 1``; call :meth:`refresh` before."""
        cache = self._segments[self._key]
        if (first, last) not in cache:
            cache[first, last] = self._build(first, last)
        return cache[first, last]

    def body(self, extent: torch.Size) -> tuple[fx.GraphModule, torch.Size]:
        """What runs the last unit without the network's head, and the shape of the features that it returns.

        The head follows the last value of as many dimensions as the unit's input has (pooled maps apart), or, where
        there is none, the input of the last linear layer. Call :meth:`refresh` before.

        Args:
            extent: shape of the unit's input.

        Raises:
            ValueError: the unit is all head.
        """
        assert self._trace is not None
        unit = self.num_units - 1
        begin, end = self._span(unit, unit + 1)
        nodes, identities = self._trace.nodes, self._trace.identities()
        shapes = [self.shapes.get(identities[i], torch.Size()) for i in range(begin, end)]
        stops = [i for i, s in enumerate(shapes) if len(s) > 2 and (len(s), _sides(s)) == (len(extent), _sides(extent))]
        if not stops:
            linear = [i for i, n in enumerate(nodes[begin:end]) if self._is_linear(n)]
            stops = [linear[-1] - 1] if linear and linear[-1] > 0 else []
        if not stops:
            raise ValueError(
                f"rule: the last unit of {type(self.backbone).__name__} holds only the head, so nothing of it can "
                "be copied without; choose other cuts, or another rule"
            )
        stop = begin + stops[-1]
        return self.build(nodes[begin : stop + 1], self._entry(unit), nodes[stop]), shapes[stops[-1]]

    def _is_linear(self, node: fx.Node) -> bool:
        return node.op == "call_module" and isinstance(self.backbone.get_submodule(str(node.target)), nn.Linear)

    def run(self, first: int, last: int, state: list[Any]) -> tuple[Tensor]:
        """Run units ``first`` to ``last - 1`` on the features in ``state``, which are taken out of it."""
        return (self.segment(first, last)(state.pop()),)

    def entry_index(self, unit: int) -> int | None:
        """Units hand on one tensor, which is never the network's input."""
        return None

    def inside(self, unit: int) -> NodeStages:
        """The nodes of one unit as a chain of their own; call :meth:`refresh` before."""
        from .nodes import NodeStages

        cache = self._inside.setdefault(self._key, {})
        if unit not in cache:
            assert self._trace is not None
            nodes = self._trace.nodes
            begin, end = self._span(unit, unit + 1)
            outputs = next(n for n in self._trace.graph.nodes if n.op == "output").all_input_nodes
            result = self._crossing[unit] if unit < self.num_units - 1 else outputs[0]
            identities = dict(zip(nodes, self._trace.identities(), strict=True))
            cache[unit] = NodeStages(self, nodes[begin:end], self._entry(unit), result, identities, self._mutated[unit])
        return cache[unit]

    def _span(self, first: int, last: int) -> tuple[int, int]:
        """The nodes of units ``first`` to ``last - 1``."""
        assert self._trace is not None
        begin = self._cuts[first - 1] + 1 if first else 0
        return begin, self._cuts[last - 1] + 1 if last < self.num_units else len(self._trace.nodes)

    def _entry(self, unit: int) -> fx.Node:
        """The node that unit ``unit`` takes its input from."""
        assert self._trace is not None
        return self._crossing[unit - 1] if unit else next(n for n in self._trace.graph.nodes if n.op == "placeholder")

    def buffers(self, first: int, last: int) -> list[tuple[dict[str, Tensor | None], str]]:
        """Buffers that units ``first`` to ``last - 1`` write in a forward pass: where the segment looks each up."""
        segment = self.segment(first, last)
        names = dict.fromkeys(name for unit in self._mutated[first:last] for name in unit)
        return [(segment.get_submodule(owner)._buffers, leaf) for owner, leaf in names]

    def _build(self, first: int, last: int) -> fx.GraphModule:
        assert self._trace is not None and 0 <= first < last <= self.num_units
        begin, end = self._span(first, last)
        output = next(n for n in self._trace.graph.nodes if n.op == "output")
        result: Any = self._crossing[last - 1] if last < self.num_units else output.args[0]
        module = self.build(self._trace.nodes[begin:end], self._entry(first), result)
        if self.compiled is not None:
            module.compile(**self.compiled)
        return module

    def build(
        self,
        nodes: Sequence[fx.Node],
        entry: fx.Node | Sequence[fx.Node],
        result: Any,
        cloned: set[fx.Node] | None = None,
    ) -> fx.GraphModule:
        """A module that runs ``nodes`` on the value of ``entry``.

        With several entries it takes a list of their values, which it empties, and copies those of ``cloned`` first.
        """
        assert self._trace is not None
        constants = self._trace.constants
        graph = fx.Graph()
        if isinstance(entry, fx.Node):
            copies = {entry: graph.placeholder("features")}
        else:
            state = graph.placeholder("state")
            copies = {node: graph.call_method("pop", (state,)) for node in reversed(entry)}
            copies |= {node: graph.call_method("clone", (copies[node],)) for node in entry if node in (cloned or ())}
        root: dict[str, Any] = {}

        def copy(node: fx.Node) -> fx.Node:
            if node in copies:
                return copies[node]
            if node.op == "get_attr":
                name = str(node.target)
                root[name] = constants[name] if name in constants else get_attribute(self.backbone, name)
                copies[node] = graph.node_copy(node)
            else:
                if node.op == "call_module":
                    root[str(node.target)] = self.backbone.get_submodule(str(node.target))
                copies[node] = graph.node_copy(node, copy)
            return copies[node]

        for node in nodes:
            copy(node)
        graph.output(fx.node.map_arg(result, copy))
        return fx.GraphModule(root, graph, class_name="Segment")
