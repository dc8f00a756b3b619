"""The inside of a unit as a chain of its own, so that parts of a unit can be recomputed.

[Note: a trace is only trusted where it was seen to be right] The parts are those of a torch.fx trace, and what Python
decided while tracing stays in it. So a trace serves only to save memory inside of one unit, and only where it gave, on
random numbers, bit for bit the output, the gradients, the buffers and the random state of the network's own forward;
it is made and tried again whenever a module, a hook, a flag or a plain attribute of the network has changed; and where
it cannot be had the unit runs in one piece.
"""

from __future__ import annotations

import contextlib
import operator
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, fx, nn
from torch.utils._pytree import tree_flatten

from ..recompute import RandomState, Replay
from .batches import as_prediction
from .forward import Forward, Pass
from .intercept import eagerly
from .observe import STATISTICS, Key, fake_batch, fake_twins
from .untouched import swapped, untouched

__all__ = ["Inside", "NodeStages"]

_MOST_STAGES = 32  # the search takes the cube of it


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
        self._numbers: dict[str, int] = {}
        self.returned: dict[Key, tuple[list[Any], int]] = {}  # by call: what it returned, and how many nodes there were

    def is_leaf_module(self, m: nn.Module, module_qualified_name: str) -> bool:
        if module_qualified_name in self._opaque or next(m.children(), None) is None or "running_mean" in m._buffers:
            return True
        return super().is_leaf_module(m, module_qualified_name)

    def call_module(self, m: nn.Module, forward: Callable[..., Any], args: tuple[Any, ...], kwargs: Any) -> Any:
        path = self.path_of_module(m)
        self._numbers[path] = number = self._numbers.get(path, 0) + 1
        try:
            result = super().call_module(m, forward, args, kwargs)
        except _Untraceable:
            raise
        except Exception as error:
            raise _Untraceable(path) from error
        leaves = [leaf.node if isinstance(leaf, fx.Proxy) else None for leaf in tree_flatten(result)[0]]
        self.returned[path, number] = leaves, len(self.graph.nodes)
        return result


def _get(model: nn.Module, target: str) -> Any:
    return operator.attrgetter(target)(model)


@dataclass
class _Trace:
    """A traced forward, and what its nodes do."""

    graph: fx.Graph
    constants: dict[str, Any]
    nodes: list[fx.Node]
    ends: list[int]  # for every unit but the last the index of its last node
    crossing: list[fx.Node]  # what it hands on
    written: dict[fx.Node, set[fx.Node]] = field(default_factory=dict)  # values that the node changes in place
    composite: set[fx.Node] = field(default_factory=set)  # values that are no single tensor
    mutated: dict[fx.Node, list[tuple[str, str]]] = field(default_factory=dict)  # buffers that the node writes


class Inside:
    """The units of a network, each as a chain of nodes, as far as a trace was seen to reproduce them.

    Args:
        forward: the network's own.
    """

    def __init__(self, forward: Forward) -> None:
        self._forward = forward
        self._key: Any = None
        self._held: list[Any] = []  # what the key tells apart by identity must not be replaced unseen
        self._trace: _Trace | None = None
        self._stages: dict[tuple[int, Any], NodeStages] = {}
        self._tried: dict[Any, bool] = {}

    def is_stale(self) -> bool:
        """Whether a module has changed since the last trace."""
        return bool(_fingerprint(self._forward.backbone)[0] != self._key)

    def refresh(self, sample: Any) -> None:
        """Trace anew if a module has changed, and try the parts of every kind of unit on random numbers.

        Args:
            sample: a batch, of which only the layout is used; there are no parts unless it is a single tensor.
        """
        forward = self._forward
        key, held = _fingerprint(forward.backbone)
        if key == self._key:
            return
        self._key, self._held = key, held
        self._trace, self._stages, self._tried = None, {}, {}
        if not isinstance(sample, Tensor) or not sample.is_floating_point() or forward.facts.changes:
            return
        with contextlib.suppress(Exception):  # whatever is wrong with a trace, the units run in one piece
            self._trace = self._make(sample)
        if self._trace is not None:
            self._try(sample)

    def unit(self, unit: int) -> NodeStages | None:
        """The nodes of one unit as a chain, if it was seen to reproduce the unit; call :meth:`refresh` before."""
        if self._trace is None:
            return None
        stages = self._chain(unit)
        if stages is None or not self._tried.get(self._kind(unit, stages)):
            return None
        return stages

    def _kind(self, unit: int, stages: NodeStages) -> Any:
        last = unit == self._forward.num_units - 1
        return self._forward.facts.kinds[unit], unit == 0, last, stages.kind()

    def _chain(self, unit: int) -> NodeStages | None:
        trace, forward = self._trace, self._forward
        assert trace is not None
        begin = trace.ends[unit - 1] + 1 if unit else 0
        end = trace.ends[unit] + 1 if unit < len(trace.ends) else len(trace.nodes)
        entry = trace.crossing[unit - 1] if unit else next(n for n in trace.graph.nodes if n.op == "placeholder")
        output = next(n for n in trace.graph.nodes if n.op == "output").args[0]
        result = trace.crossing[unit] if unit < len(trace.ends) else output
        if not isinstance(result, fx.Node) or begin >= end:
            return None
        nodes = trace.nodes[begin:end]
        raw = tuple(
            id(_get(forward.backbone, str(n.target)))
            for node in nodes
            for n in node.all_input_nodes
            if n.op == "get_attr" and str(n.target) not in trace.constants
        )
        if (unit, raw) not in self._stages:
            self._stages[unit, raw] = NodeStages(forward.backbone, trace, nodes, entry, result)
        return self._stages[unit, raw]

    # --- the trace ---

    def _make(self, sample: Tensor) -> _Trace | None:
        forward = self._forward
        backbone = forward.backbone
        if forward.prediction is not as_prediction:
            return None
        opaque: frozenset[str] = frozenset()
        before = RandomState.get(sample.device)
        with untouched(backbone) as attributes, eagerly(backbone):
            known = {name for own in (backbone.__dict__, backbone._parameters, backbone._buffers) for name in own}
            while True:
                tracer = _Tracer(opaque)
                try:
                    graph = tracer.trace(backbone)
                    break
                except _Untraceable as error:
                    opaque |= {error.path}
            constants = {
                name: value
                for own in (backbone.__dict__, backbone._buffers)
                for name, value in own.items()
                if name not in known and isinstance(value, Tensor)
            }
            changed = [name for _, name, _ in attributes.changed() if name not in constants]
        drawn = before.differs()
        before.set()
        if drawn or changed:  # it decided something by chance, or keeps something
            return None
        placeholders = [n for n in graph.nodes if n.op == "placeholder"]
        for node in placeholders[1:]:  # optional arguments keep their defaults
            if not node.args and not str(node.target).startswith("*"):
                return None
            node.replace_all_uses_with(node.args[0] if node.args else None)
            graph.erase_node(node)
        skipped = {"placeholder", "get_attr", "output"}
        everything = list(tracer.graph.nodes)
        nodes = [n for n in graph.nodes if n.op not in skipped]
        position = {node: i for i, node in enumerate(nodes)}
        del everything
        ends, crossing = [], []
        counts = _counts(graph)
        for key, place in forward.facts.points:
            leaves, count = tracer.returned[key]
            node = leaves[place]
            end = max(i for i, n in enumerate(nodes) if counts[n] < count)
            if node is None or _alive(graph, position, end) != {node}:
                return None
            ends.append(end)
            crossing.append(node)
        trace = _Trace(graph, constants, nodes, ends, crossing)
        self._probe(trace, sample)
        return trace

    def _probe(self, trace: _Trace, sample: Tensor) -> None:
        """Run the trace node by node on fake tensors, and note what is changed in place."""
        forward = self._forward
        backbone = forward.backbone
        with contextlib.ExitStack() as stack:
            if forward.fake:
                stack.enter_context(untouched(backbone))
                x: Any = sample
            else:
                stack.enter_context(
                    swapped(backbone, fake_twins(backbone, forward.mode, learn=False, known=forward.twins))
                )
                x = fake_batch(sample, forward.mode)
            stack.enter_context(torch.no_grad())
            stack.enter_context(torch.random.fork_rng(devices=[]))
            environment: dict[fx.Node, Any] = {}
            for node in trace.graph.nodes:
                args, kwargs = fx.node.map_arg((node.args, node.kwargs), environment.__getitem__)
                if node.op == "placeholder":
                    environment[node] = x
                elif node.op == "get_attr":
                    name = str(node.target)
                    environment[node] = trace.constants[name] if name in trace.constants else _get(backbone, name)
                elif node.op != "output":
                    before = {n: v._version for n, v in environment.items() if isinstance(v, Tensor)}
                    buffers = _buffers(backbone, node)
                    versions = {place: b._version for place, b in buffers.items()}
                    environment[node] = _execute(backbone, node, args, kwargs)
                    trace.written[node] = {n for n, version in before.items() if environment[n]._version != version}
                    trace.mutated[node] = [
                        place for place, b in buffers.items() if b._version != versions[place] or place[1] in STATISTICS
                    ]
                    if isinstance(environment[node], (tuple, list, dict)):
                        trace.composite.add(node)

    # --- whether it is right ---

    def _try(self, sample: Tensor) -> None:
        """Compare one unit of every kind with the network's own forward on two examples of random numbers."""
        forward = self._forward
        if forward.fake:
            return
        generator = torch.Generator().manual_seed(0)
        batch = torch.randn((min(2, sample.shape[0]), *sample.shape[1:]), generator=generator).to(sample)
        state = RandomState.get(sample.device)
        kept = [(own, name, tensor) for own, name, tensor in _all_buffers(forward.backbone)]
        try:
            outputs = forward.outputs(batch)
            for unit in range(forward.num_units):
                stages = self._chain(unit)
                if stages is None:
                    continue
                kind = self._kind(unit, stages)
                if kind not in self._tried:
                    self._tried[kind] = False
                    with contextlib.suppress(Exception):
                        self._tried[kind] = self._agrees(unit, stages, batch, outputs, state, kept)
        finally:
            for own, name, tensor in kept:
                own[name] = tensor
            state.set()

    def _agrees(
        self, unit: int, stages: NodeStages, batch: Tensor, outputs: Any, state: RandomState, kept: list[Any]
    ) -> bool:
        forward = self._forward
        if unit:
            layout = next(leaf for leaf in outputs[forward.facts.points[unit - 1][0]][0] if hasattr(leaf, "stride"))
            generator = torch.Generator().manual_seed(unit)
            features = torch.randn(layout.shape, generator=generator).to(device=layout.device, dtype=layout.dtype)
            features = torch.empty_strided(layout.shape, layout.stride, dtype=layout.dtype, device=layout.device).copy_(
                features
            )
        else:
            features = batch
        parameters = [p for p in forward.parameters(unit, unit + 1) if p.requires_grad]
        found = []
        for traced in (False, True):
            for own, name, tensor in kept:
                own[name] = tensor.clone()
            state.set()
            entry = features.clone().requires_grad_(unit > 0)
            with torch.enable_grad(), untouched(forward.backbone):
                if traced:
                    result = list(stages.run(0, stages.num_stages, [entry]))
                else:
                    pass_ = Pass(forward, batch.clone(), replay=True, outputs=outputs)
                    with pass_.opened():
                        result = list(pass_.run(unit, unit + 1, [entry] if unit else []))
                random = RandomState.get(batch.device)
                wanted = [*([entry] if unit else []), *parameters]
                gradients = list(torch.autograd.grad(result[0].sum(), wanted, allow_unused=True)) if wanted else []
            drawn = random.cpu, *random.devices[1]
            found.append([*result, *gradients, *drawn, *(own[name].clone() for own, name, _ in kept)])
        return all(_same(a, b) for a, b in zip(*found, strict=True))


def _same(a: Tensor | None, b: Tensor | None) -> bool:
    if a is None or b is None:
        return a is b
    if not a.is_floating_point():
        return torch.equal(a, b)
    return a.stride() == b.stride() and bool(
        torch.equal(a.isnan(), b.isnan()) and torch.equal(a.nan_to_num(), b.nan_to_num())
    )


def _all_buffers(model: nn.Module) -> Iterator[tuple[dict[str, Any], str, Tensor]]:
    for module in model.modules():
        for name, tensor in module._buffers.items():
            if tensor is not None:
                yield module._buffers, name, tensor


def _counts(graph: fx.Graph) -> dict[fx.Node, int]:
    return {node: i for i, node in enumerate(graph.nodes)}


def _alive(graph: fx.Graph, position: dict[fx.Node, int], end: int) -> set[fx.Node]:
    """The values that are made up to a node and used after it; parameters are read where they are needed."""
    found = set()
    for node in graph.nodes:
        made = position.get(node, -1)
        if node.op in ("get_attr", "output") or made > end:
            continue
        if any(position.get(user, len(position)) > end for user in node.users):
            found.add(node)
    return found


def _execute(model: nn.Module, node: fx.Node, args: Any, kwargs: Any) -> Any:
    if node.op == "call_module":
        return model.get_submodule(str(node.target))(*args, **kwargs)
    if node.op == "call_method":
        return getattr(args[0], str(node.target))(*args[1:], **kwargs)
    assert callable(node.target)
    return node.target(*args, **kwargs)


def _buffers(model: nn.Module, node: fx.Node) -> dict[tuple[str, str], Tensor]:
    """The buffers that a node may write, by path of the module and name."""
    found: dict[tuple[str, str], Tensor] = {}
    if node.op == "call_module":
        path = str(node.target)
        for name, buffer in model.get_submodule(path).named_buffers():
            owner, _, leaf = f"{path}.{name}".rpartition(".")
            found[owner, leaf] = buffer
    for argument in node.all_input_nodes:
        owner, _, leaf = str(argument.target).rpartition(".")
        if argument.op == "get_attr" and (tensor := model.get_submodule(owner)._buffers.get(leaf)) is not None:
            found[owner, leaf] = tensor
    return found


def _fingerprint(model: nn.Module) -> tuple[Any, list[Any]]:
    """What a trace depends on, and what it tells apart by identity."""
    key: list[Any] = []
    held: list[Any] = []
    for module in model.modules():
        held.append(module)
        key.append(id(module))
        for name, value in module.__dict__.items():
            if name in ("_parameters", "_buffers", "_modules", "_compiled_call_impl"):
                continue
            if name.endswith("_hooks"):
                key.append(tuple(value))
            elif isinstance(value, (bool, int, float, str, type(None), torch.dtype, torch.device)):
                key.append(value)
            elif isinstance(value, (tuple, list)):
                key.append(repr(value) if all(isinstance(v, (bool, int, float, str)) for v in value) else id(value))
            elif not isinstance(value, (dict, set)):
                held.append(value)
                key.append(id(value))
    return tuple(key), held


def _read(model: nn.Module, node: fx.Node) -> set[int]:
    """The parameters and buffers that a node reads, by ``id``."""
    found: set[int] = set()
    if node.op == "call_module":
        module = model.get_submodule(str(node.target))
        found |= {id(t) for t in [*module.parameters(), *module.buffers()]}
    for argument in node.all_input_nodes:
        if argument.op == "get_attr":
            with contextlib.suppress(AttributeError):  # a constant of the trace
                found.add(id(_get(model, str(argument.target))))
    return found


class NodeStages:
    """The nodes of one unit as a chain whose states are all the values that are still needed.

    No state is taken where a value would be a tuple, or where a parameter or buffer is used on both sides.

    Args:
        backbone: the network.
        trace: of the whole network.
        nodes: the unit's.
        entry: the node of its input.
        result: the node of its output.
    """

    def __init__(
        self, backbone: nn.Module, trace: _Trace, nodes: Sequence[fx.Node], entry: fx.Node, result: fx.Node
    ) -> None:
        self._backbone, self._trace, self._nodes, self._entry = backbone, trace, list(nodes), entry
        self._pieces: dict[tuple[int, int], fx.GraphModule] = {}
        self._written = [trace.written.get(n, set()) for n in nodes]
        tensors = [_read(backbone, node) for node in nodes]
        self._points, self._live = [0], [[entry]]
        for point in range(1, len(nodes)):
            later = set(nodes[point:])
            live = [n for n in [entry, *nodes[:point]] if n is result or any(user in later for user in n.users)]
            shared = set().union(*tensors[:point]) & set().union(*tensors[point:])
            together = any(len(written & set(live)) > 1 for written in self._written[point:])
            if not shared and not together and not any(n in trace.composite for n in live):
                self._points.append(point)
                self._live.append(live)
        window = -(-len(self._points) // _MOST_STAGES)
        if window > 1:  # of neighbours the state with the fewest values
            kept = [0]
            for start in range(1, len(self._points), window):
                choices = range(start, min(start + window, len(self._points)))
                kept.append(min(choices, key=lambda i: len(self._live[i])))
            self._points, self._live = [self._points[i] for i in kept], [self._live[i] for i in kept]
        self._points.append(len(nodes))
        self._live.append([result])

    @property
    def num_stages(self) -> int:
        """Number of stages."""
        return len(self._points) - 1

    def kind(self) -> tuple[str, ...]:
        """What tells units of different build apart: their operations, by type and settings."""
        return tuple(
            str(self._backbone.get_submodule(str(n.target))) if n.op == "call_module" else f"{n.target}{n.kwargs}"
            for n in self._nodes
        )

    def run(self, first: int, last: int, state: list[Any]) -> tuple[Any, ...]:
        """Run stages ``first`` to ``last - 1``; ``state`` is taken out of its list."""
        result: tuple[Any, ...] = self._piece(first, last)(state)
        return result

    def written(self, first: int, last: int) -> list[tuple[dict[str, Tensor | None], str]]:
        """The buffers that these stages write: where each is looked up."""
        nodes = self._nodes[self._points[first] : self._points[last]]
        places = dict.fromkeys(place for node in nodes for place in self._trace.mutated.get(node, ()))
        return [(self._backbone.get_submodule(path)._buffers, name) for path, name in places]

    def replay(self) -> Replay:
        """What has them run again, for one step."""
        return Replay(self.written, next((p.device for p in self._backbone.parameters()), torch.device("cpu")))

    def inside(self, stage: int, state: list[Any]) -> None:
        """A stage of nodes is not a chain itself."""
        raise AssertionError(stage)

    def entry_index(self, stage: int) -> int | None:
        """Where the unit's input is in the state before a stage."""
        live = self._live[stage]
        return live.index(self._entry) if self._entry in live else None

    def _piece(self, first: int, last: int) -> fx.GraphModule:
        if (first, last) not in self._pieces:
            nodes = self._nodes[self._points[first] : self._points[last]]
            written = set().union(*self._written[self._points[first] : self._points[last]])
            self._pieces[first, last] = self._build(nodes, self._live[first], tuple(self._live[last]), written)
        return self._pieces[first, last]

    def _build(
        self, nodes: Sequence[fx.Node], entry: Sequence[fx.Node], result: Any, cloned: set[fx.Node]
    ) -> fx.GraphModule:
        """A module that runs ``nodes`` on a list of the values of ``entry``, which it empties; copies of ``cloned``."""
        constants = self._trace.constants
        graph = fx.Graph()
        state = graph.placeholder("state")
        copies = {node: graph.call_method("pop", (state,)) for node in reversed(entry)}
        copies |= {node: graph.call_method("clone", (copies[node],)) for node in entry if node in cloned}
        root: dict[str, Any] = {}

        def copy(node: fx.Node) -> fx.Node:
            if node in copies:
                return copies[node]
            if node.op == "get_attr":
                name = str(node.target)
                root[name] = constants[name] if name in constants else _get(self._backbone, name)
                copies[node] = graph.node_copy(node)
            else:
                if node.op == "call_module":
                    root[str(node.target)] = self._backbone.get_submodule(str(node.target))
                copies[node] = graph.node_copy(node, copy)
            return copies[node]

        for node in nodes:
            copy(node)
        graph.output(fx.node.map_arg(result, copy))
        return fx.GraphModule(root, graph, class_name="Part")
