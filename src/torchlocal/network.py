"""The decoupled network: the user's backbone, its local modules and their auxiliary networks."""

from __future__ import annotations

import contextlib
from collections import OrderedDict
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from typing import TYPE_CHECKING, Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils._pytree import tree_map_only

from . import steps
from .cut.batches import Batch, as_prediction, fits_into, key_of, plain, shaped, size_of, tensors_of
from .cut.forward import Facts, Forward, Pass
from .cut.units import Partition, Unit, Units, balance
from .recompute import Plan, in_segments
from .rules import Rule, Site, make_rule
from .rules.downstream import Downstream
from .schedule import GuidedPlan, find_guided_plan, find_local_plans

if TYPE_CHECKING:
    from .plan import MemoryPlan

_NO_LARGER = 1.02  # peaks that differ by less count as the same
_MOST_PLANS = 32  # that are remembered, of the latest layouts of batches
_MOST_SEARCHES = 4  # with the same options, before plans of larger batches are used again
COSTS = ("activation_bytes", "flops", "num_parameters")


class DecoupledNetwork(nn.Module):
    """A backbone as K gradient-isolated local modules; made by :func:`decouple`.

    Called like the backbone, it is the backbone. ``parameters()`` are the backbone's, then the auxiliary networks'.

    Attributes:
        backbone: the user's network, trained in place.
        auxiliary: K - 1 auxiliary networks, thrown away after training.
        partition: the units and their grouping.
        rule: the local rule.
        criterion: loss of the task, ``criterion(output, target)``.
        sites: the places that the auxiliary networks were made for.
        chain: the network's own forward, as a chain of units.
        sample: a batch of the layout that the network was decoupled with; its floating-point tensors are empty.
        carry: what happens with tensors that carry gradients and cross a cut beside the features.
    """

    def __init__(
        self,
        backbone: nn.Module,
        auxiliary: Iterable[nn.Module],
        *,
        chain: Forward,
        partition: Partition,
        rule: Rule,
        criterion: Callable[[Tensor, Any], Tensor],
        sites: Sequence[Site],
        sample: Batch,
        carry: str | None = None,
    ) -> None:
        super().__init__()
        self.backbone = backbone
        self.auxiliary = nn.ModuleList(auxiliary)
        self.chain = chain
        self.partition = partition
        self.rule = rule
        self.criterion = criterion
        self.sites = tuple(sites)
        self.sample, self.carry = sample, carry
        self._plans: OrderedDict[tuple[Any, ...], Any] = OrderedDict()

    @property
    def num_modules(self) -> int:
        """Number K of local modules."""
        return len(self.partition.groups)

    @property
    def input_shape(self) -> torch.Size:
        """Shape of the first tensor of the sample."""
        return tensors_of(self.sample)[0].shape

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        """The backbone's own forward."""
        return self.backbone(*args, **kwargs)

    def local_step(self, batch: Batch, target: Any = None, **options: Any) -> list[Tensor]:
        """See :func:`torchlocal.local_step`."""
        return steps.local_step(self, batch, target, **options)

    def guided_step(self, batch: Batch, target: Any = None, **options: Any) -> list[Tensor]:
        """See :func:`torchlocal.guided_step`."""
        return steps.guided_step(self, batch, target, **options)

    def compile(self, **options: Any) -> None:
        """Compile every local module and auxiliary network by itself, in place; keys stay as they are.

        Args:
            options: passed to :func:`torch.compile`.
        """
        self.compile_parts(range(len(self.auxiliary)), **options)

    def compile_parts(self, modules: Iterable[int], **options: Any) -> None:
        """Compile what runs of the backbone, and the auxiliary networks of these local modules."""
        # Auxiliary networks run the same forward functions; counted together they would pass the limit of recompiles,
        # and the last of them silently run uncompiled.
        options = {"isolate_recompiles": True, **options}
        self.chain.compile(**options)
        for k in modules:
            if k < len(self.auxiliary):
                self.auxiliary[k].compile(**options)

    def module_parameters(self) -> list[list[nn.Parameter]]:
        """For each local module its parameters and its auxiliary network's, to give each an optimizer of its own.

        A parameter that several modules use (tied ones) belongs to the last of them, whose optimizer finds the sum of
        what they all give.
        """
        lists: list[list[nn.Parameter]] = [[] for _ in self.partition.groups]
        owners, seen = self.module_owners(), set()
        for parameters, group in zip(lists, self.partition.groups, strict=True):
            parameters += [p for p in self.chain.parameters(group.start, group.stop) if owners[id(p)] == group.start]
            seen |= {id(p) for p in parameters}
        starts = {group.start: k for k, group in enumerate(self.partition.groups)}
        for parameter in self.backbone.parameters():  # those that the forward was not seen to use
            if id(parameter) not in seen:
                lists[starts[owners[id(parameter)]]].append(parameter)
        for parameters, network in zip(lists, self.auxiliary, strict=False):
            parameters += network.parameters()
        return lists

    def module_owners(self) -> dict[int, int]:
        """For every tensor of the backbone, by ``id``, the first unit of the local module that it belongs to."""
        start_of = {unit: group.start for group in self.partition.groups for unit in group}
        return {key: start_of[unit] for key, unit in self.chain.owners().items()}

    def complete_at(self) -> list[int | None]:
        """For each local module the unit whose backward pass completes the gradients of its parameters."""
        first, owners = self.chain.first_users(), self.module_owners()
        complete: list[int | None] = []
        for group in self.partition.groups:
            users = [unit for key, unit in first.items() if owners.get(key) == group.start]
            complete.append(min([group.start, *users]))
        return complete

    @torch.no_grad()
    def depth_outputs(self, batch: Batch) -> list[Tensor]:
        """What each local module predicts, through its auxiliary network; the last is the backbone's prediction.

        Args:
            batch: what the network is called with.

        Returns:
            K tensors, each of the shape of the network's prediction.
        """
        batch = plain(batch)
        outputs: list[Tensor] = []
        ends = {group.stop: k for k, group in enumerate(self.partition.groups[:-1])}

        def passing(unit: int, features: Tensor) -> Tensor:
            k = ends[unit]
            outputs.append(self.rule.predict(self.sites[k], self.auxiliary[k], features))
            return features

        pass_ = Pass(self.chain, batch)
        with pass_.opened(tuple(ends)):
            outputs += pass_.run(0, self.chain.num_units, [], boundary=passing, stops=tuple(ends))
        return outputs

    def recompute_segments(self, recompute: str | int | None) -> list[range]:
        """The segments, as ranges of units, that a guided step with ``recompute`` runs twice.

        Raises:
            ValueError: ``recompute`` is not None, ``"modules"`` or a number from 1 to the number of units.
        """
        units = self.partition.units
        if recompute is None:
            segments = [range(len(units))]
        elif recompute == "modules":
            segments = list(self.partition.groups)
        elif isinstance(recompute, int) and not isinstance(recompute, bool) and 1 <= recompute <= len(units):
            sizes = [unit.activation_bytes for unit in units]
            segments = balance(len(units), recompute, lambda first, last: sum(sizes[first:last]))
        else:
            raise ValueError(
                f"recompute: must be None, 'modules' or a number of segments from 1 to {len(units)}, not {recompute!r}"
            )
        return segments

    def guided_plan(
        self,
        batch: Batch,
        target: Any = None,
        *,
        recompute: str | int | None = None,
        memory: str | int | GuidedPlan | None = None,
        auxiliary: str = "follow",
        autocast: torch.dtype | None = None,
        optimizers: object = None,
    ) -> GuidedPlan:
        """How a guided step of such a batch runs; found once for each layout of batch and options."""
        if memory is not None and recompute is not None:
            raise ValueError(f"recompute: memory={memory!r} chooses what is recomputed; leave recompute out")
        if isinstance(memory, GuidedPlan):
            return memory
        if memory is None or memory == "full":
            return GuidedPlan(tree=in_segments(self._without_carry(self.recompute_segments(recompute))))
        if isinstance(memory, bool) or not (memory in ("local", "exact") or (isinstance(memory, int) and memory > 0)):
            raise ValueError(f"memory: must be 'local', 'exact', 'full', a number of bytes or None, not {memory!r}")
        self._without_carry([range(0), range(0)])
        plan: GuidedPlan = self._found(
            find_guided_plan,
            batch,
            target,
            memory=memory,
            auxiliary=auxiliary,
            autocast=autocast,
            optimizers=optimizers is not None or None,
        )
        return plan

    def _without_carry(self, segments: list[range]) -> list[range]:
        """Refuse to run from cut to cut where more than the features cross."""
        if self.carry is not None and len(segments) > 1:
            raise ValueError(
                'recompute: a network that was decoupled with carry="collect" cannot run from one cut to another, so '
                "nothing can be recomputed; leave recompute and memory out, or use the network's own checkpointing"
            )
        return segments

    def local_plans(
        self,
        batch: Batch,
        target: Any = None,
        recompute: str | dict[int, Plan] | None = None,
        *,
        autocast: torch.dtype | None = None,
    ) -> dict[int, Plan]:
        """By module, how those of a local step run that recompute something; found once for each layout of batch."""
        if recompute is None or isinstance(recompute, dict):
            return recompute or {}
        if recompute != "largest":
            raise ValueError(f"recompute: must be None or 'largest' in a local step, not {recompute!r}")
        self._without_carry([range(0), range(0)])
        plans: dict[int, Plan] = self._found(find_local_plans, batch, target, autocast=autocast)
        return plans

    def _found(self, find: Callable[..., Any], batch: Batch, target: Any, **options: Any) -> Any:
        """What a search finds, which is looked for once for each layout of batch and target, and options."""
        flags = tuple(module.training for module in self.modules())
        key = (find, key_of(batch), key_of(target), flags, *options.values())
        # A search takes seconds: where batches come in many sizes, one that was found for a larger one has to do.
        others = [known for known in self._plans if known[0] is find and known[3:] == key[3:]]
        if key not in self._plans and len(others) >= _MOST_SEARCHES:
            larger = [known for known in others if fits_into(key[1], known[1]) and fits_into(key[2], known[2])]
            key = min(larger, key=lambda known: size_of(known[1]), default=key)
        if key in self._plans:
            self._plans.move_to_end(key)
            return self._plans[key]
        if not self.chain.fake:
            self.chain.inside.refresh(batch)
        # A thread of its own has none of the caller's modes: autocast, no_grad, a counter.
        with ThreadPoolExecutor(1) as executor:
            self._plans[key] = executor.submit(find, self, batch, target, **options).result()
        while len(self._plans) > _MOST_PLANS:
            self._plans.popitem(last=False)
        return self._plans[key]

    def extra_repr(self) -> str:
        """Names of the local modules."""
        return f"local modules: {', '.join(self.partition.names)}; rule={self.rule!r}"


def decouple(
    model: nn.Module | Sequence[nn.Module],
    modules: int | str | MemoryPlan | None = None,
    *,
    sample: Batch | Sequence[int],
    cuts: Sequence[str] | None = None,
    rule: str | Rule = "dgl",
    criterion: Callable[[Tensor, Any], Tensor] = F.cross_entropy,
    prediction: Callable[[Any], Tensor] = as_prediction,
    carry: str | None = None,
    cost: str = "activation_bytes",
) -> DecoupledNetwork:
    """Cut a network into K local modules and attach an auxiliary network to each but the last.

    The network itself is not changed: its parameters are trained in place, and it works as before at any time; a step
    calls it as you do. To find where it can be cut, its forward runs once on tensors without memory (on real ones where
    it looks at the values of its features), and whatever it stores in its modules then is put back. The auxiliary
    networks are initialised from torch's global random generator, on the device of the network and in the dtype of the
    features that they take.

    Args:
        model: any ``nn.Module``; or a list of modules that run one after another, each of which becomes a local module
            (as do the children of an ``nn.Sequential`` when neither ``modules`` nor ``cuts`` is given).
        modules: number K of local modules, balanced by ``cost``; ``"all"`` for one per unit; ``"fewest"`` for as few as
            take no more memory than one per unit: later units are smaller, and accuracy falls with the number of
            modules; or what :func:`torchlocal.plan` returned.
        sample: a batch, as the steps will be given it: a tensor (N, ...) for ``model(x)``, a tuple for
            ``model(*batch)``, a mapping for ``model(**batch)``; or the shape of a tensor. ``"fewest"`` is for its size.
        cuts: instead of ``modules``, qualified names of the submodules to cut after.
        rule: a local rule, or its name.
        criterion: loss of the task, ``criterion(prediction, target)`` returns a 0-dim tensor.
        prediction: takes the tensor for the criterion from what the network returns; by default that is the tensor
            itself, or its ``logits``.
        carry: ``"collect"``: cut also where other tensors that carry gradients cross beside the features (an encoder's
            output that every layer of a decoder takes, a conditioning). They become leaves after the cut, and the
            gradients that gather there are handed back at the end of the step, so what makes them learns from all
            modules that use them; that part of the graph is kept until then. Without, such a place is no cut point.
        cost: what is balanced over the local modules: ``"activation_bytes"`` (with those of the auxiliary network),
            ``"flops"`` or ``"num_parameters"``.

    Returns:
        The decoupled network. It holds the model itself, not a copy.

    Raises:
        ValueError: an argument is wrong, or the model cannot be cut as asked; the message says what to do.
    """
    if modules is not None and not isinstance(modules, int | str) and hasattr(modules, "recommendation"):
        modules = modules.modules
    make = prepare(
        model,
        modules,  # type: ignore[arg-type]
        sample=sample,
        cuts=cuts,
        rule=rule,
        criterion=criterion,
        prediction=prediction,
        carry=carry,
        cost=cost,
    )
    return make(modules)


def prepare(
    model: nn.Module | Sequence[nn.Module],
    modules: int | str | None,
    *,
    sample: Batch | Sequence[int],
    cuts: Sequence[str] | None = None,
    rule: str | Rule = "dgl",
    criterion: Callable[[Tensor, Any], Tensor] = F.cross_entropy,
    prediction: Callable[[Any], Tensor] = as_prediction,
    carry: str | None = None,
    cost: str = "activation_bytes",
) -> Callable[..., DecoupledNetwork]:
    """The work of :func:`decouple` that is the same for every number of local modules.

    Returns:
        What makes the decoupled network of a number of local modules, of ``"all"`` or ``"fewest"``; all that it makes
        share what was observed and measured. With ``fake=True`` the auxiliary networks have no memory: for predictions.
    """
    backbone, given = _backbone(model, modules, cuts)
    batch = _sample(sample, backbone)
    if isinstance(rule, str):
        rule = make_rule(rule)
    elif not isinstance(rule, Rule):
        raise ValueError(f"rule: must be a name or a Rule, not {type(rule).__name__}")
    if not callable(criterion):
        raise ValueError(f"criterion: must be callable as criterion(output, target), not {type(criterion).__name__}")
    if not callable(prediction):
        raise ValueError(f"prediction: must be callable on what the network returns, not {type(prediction).__name__}")
    if carry not in (None, "collect"):
        raise ValueError(f"carry: must be None or 'collect', not {carry!r}")
    if cost not in COSTS:
        raise ValueError(f"cost: must be one of {', '.join(COSTS)}, not {cost!r}")

    found = Units(backbone, batch, prediction, given=given, carry=carry is not None)
    if cuts is not None:
        found.cut_after(cuts)
    units = found.describe()
    if isinstance(modules, int) and modules > len(units):
        raise ValueError(
            f"modules: {modules} local modules were asked for, but {type(backbone).__name__} can be cut into "
            f"{len(units)} units at most ({', '.join(u.name for u in units)}){found.explain(modules)}; ask for fewer, "
            "or pass a list of modules"
        )
    chain = Forward(backbone, Facts.of(found), prediction, found.seen.mode)
    anchor = next((p for p in backbone.parameters() if p.is_floating_point()), torch.empty(0))
    chain.sample = kept = tree_map_only(Tensor, _without_values, batch)

    def assemble(num_modules: int, *, fake: bool = False) -> DecoupledNetwork:
        auxiliary_bytes = _AuxiliaryBytes(found, units, rule, num_modules, chain)

        def price(first: int, last: int) -> float:
            if cost != "activation_bytes":
                return sum(getattr(unit, cost) for unit in units[first:last])
            return found.activation_bytes(first, last) + (auxiliary_bytes(last - 1) if last < len(units) else 0)

        groups = balance(len(units), num_modules, price)
        costs = tuple(float(price(group.start, group.stop)) for group in groups)
        stops = [group.stop for group in groups[:-1]]
        sites = [_site(k, num_modules, units, stop, found, chain) for k, stop in enumerate(stops)]
        auxiliary = []
        for site, stop in zip(sites, stops, strict=True):
            dtype = found.boundary(stop - 1).dtype
            if fake:
                with found.seen.mode, _made_as(dtype, anchor.device):
                    auxiliary.append(rule.auxiliary(site))
            else:
                with torch.device(anchor.device):
                    auxiliary.append(rule.auxiliary(site).to(device=anchor.device, dtype=dtype))
        return DecoupledNetwork(
            backbone,
            auxiliary,
            chain=chain,
            partition=Partition(units=units, groups=tuple(groups), costs=costs),
            rule=rule,
            criterion=criterion,
            sites=sites,
            sample=kept,
            carry=carry,
        )

    def make(modules: int | str | None, *, fake: bool = False) -> DecoupledNetwork:
        if modules != "fewest":
            return assemble(modules if isinstance(modules, int) else len(units), fake=fake)
        with ThreadPoolExecutor(1) as executor:  # a thread of its own has none of the caller's modes, such as no_grad
            try:
                fewest = executor.submit(_fewest, partial(assemble, fake=True), len(units), anchor.device).result()
                return assemble(fewest, fake=fake)
            except ValueError as error:
                if not str(error).startswith("target:"):
                    raise
                raise ValueError(
                    'modules: "fewest" takes a criterion of class indices (N,) or of a tensor like the output; give a '
                    "number of modules with this one"
                ) from error

    return make


@contextlib.contextmanager
def _made_as(dtype: torch.dtype, device: torch.device) -> Iterator[None]:
    """Have layers made in this dtype: fake parameters cannot be converted afterwards."""
    default = torch.get_default_dtype()
    torch.set_default_dtype(dtype)
    try:
        with torch.device(device):
            yield
    finally:
        torch.set_default_dtype(default)


def _without_values(tensor: Tensor) -> Tensor:
    """A tensor of the same layout that takes no memory; integers and masks are kept, since a forward may read them."""
    if not tensor.is_floating_point():
        return tensor.detach().clone()
    return torch.zeros(1, dtype=tensor.dtype, device=tensor.device).expand(tensor.shape)


def _fewest(assemble: Callable[[int], DecoupledNetwork], most: int, device: torch.device) -> int:
    """The smallest number of local modules whose local step is predicted to take no more than ``most`` modules do."""
    from .memory import predict

    def peak(num_modules: int) -> int:
        with torch.random.fork_rng([device] if device.type == "cuda" else []):  # for auxiliary networks to throw away
            return predict(assemble(num_modules), step="local").peak_bytes

    limit = _NO_LARGER * peak(most)
    enough, too_few = most, 0  # peaks fall with the number of modules
    while enough - too_few > 1:
        middle = (enough + too_few) // 2
        enough, too_few = (middle, too_few) if peak(middle) <= limit else (enough, middle)
    return enough


class _AuxiliaryBytes:
    """Bytes that the auxiliary network after a unit keeps for backward, found on fake tensors when first asked for."""

    def __init__(self, found: Units, units: Sequence[Unit], rule: Rule, num_modules: int, chain: Forward) -> None:
        self._found, self._units, self._rule = found, units, rule
        self._num_modules, self._chain = num_modules, chain
        self._known: dict[int, int] = {}

    def __call__(self, unit: int) -> int:
        if unit not in self._known:
            index = min(unit, self._num_modules - 2)
            site = _site(index, self._num_modules, self._units, unit + 1, self._found, self._chain)
            self._known[unit] = self._measure(site, self._found.boundary(unit))
        return self._known[unit]

    def _measure(self, site: Site, features: Tensor) -> int:
        kept: dict[int, int] = {}
        alive: list[Tensor] = []

        def note(tensor: Tensor) -> Tensor:
            alive.append(tensor)
            kept[tensor.untyped_storage()._cdata] = tensor.untyped_storage().nbytes()
            return tensor

        with self._found.seen.mode, torch.enable_grad():
            with _made_as(features.dtype, features.device):
                network = self._rule.auxiliary(site)
            network.train(features.shape[0] > 1)  # BatchNorm over vectors would refuse a single example
            features = features.detach().requires_grad_()
            with torch.autograd.graph.saved_tensors_hooks(note, lambda tensor: tensor):
                self._rule.rehearse(site, network, features)
        for tensor in [features, *network.parameters(), *network.buffers()]:
            kept.pop(tensor.untyped_storage()._cdata, None)
        return sum(kept.values())


def _site(index: int, num_modules: int, units: Sequence[Unit], stop: int, found: Units, chain: Forward) -> Site:
    unit = units[stop - 1]
    return Site(
        index=index,
        num_modules=num_modules,
        feature_shape=unit.output_shape,
        channel_dim=unit.channel_dim,
        input_shape=tensors_of(found.sample)[0].shape,
        output_shape=found.output_shape,
        downstream=Downstream(chain, units, stop),
    )


def _backbone(
    model: nn.Module | Sequence[nn.Module], modules: int | str | None, cuts: Sequence[str] | None
) -> tuple[nn.Module, bool]:
    """The network as one module, and whether its children are the local modules."""
    if isinstance(model, nn.ModuleList):
        model = list(model)
    if isinstance(model, (list, tuple)):
        wrong = [type(m).__name__ for m in model if not isinstance(m, nn.Module)]
        if wrong or not model:
            raise ValueError(f"model: a list of modules must hold at least one nn.Module and nothing else, not {wrong}")
        if modules not in (None, "all", len(model)) or cuts is not None:
            raise ValueError(
                f"modules: the {len(model)} modules of the list are the local modules; leave modules and cuts out"
            )
        return nn.Sequential(*model), True
    if not isinstance(model, nn.Module):
        raise ValueError(f"model: must be an nn.Module or a list of them, not {type(model).__name__}")
    kind = type(model).__name__
    if kind in ("DistributedDataParallel", "DataParallel") or any(
        c.__name__ == "FSDPModule" for c in type(model).__mro__
    ):
        raise ValueError(
            f"model: {kind} around the whole network expects one backward pass, and a local step makes one for each "
            "module; wrap each block by itself, or use distribute(replicas=...)"
        )
    if modules is None and cuts is None:
        if type(model) is nn.Sequential and len(model) > 0:
            return model, True
        raise ValueError(
            "modules: say how many local modules, 'all', 'fewest', or give cuts=[names of submodules to cut after]"
        )
    if modules is not None and cuts is not None:
        raise ValueError("cuts: give either modules or cuts, not both")
    if isinstance(cuts, str) or (cuts is not None and (not cuts or not all(isinstance(c, str) for c in cuts))):
        raise ValueError(f"cuts: must be a list of at least one name of a submodule, not {cuts!r}")
    if modules not in (None, "all", "fewest") and (not isinstance(modules, int) or isinstance(modules, bool)):
        raise ValueError(f"modules: must be a whole number, 'all' or 'fewest', not {modules!r}")
    if isinstance(modules, int) and modules < 1:
        raise ValueError(f"modules: must be at least 1, not {modules}")
    return model, False


def _sample(sample: Batch | Sequence[int], backbone: nn.Module) -> Batch:
    """A batch, of a shape one without memory."""
    if isinstance(sample, (Tensor, Mapping)) or (
        isinstance(sample, (tuple, list)) and any(isinstance(value, (Tensor, Mapping)) for value in sample)
    ):
        if isinstance(sample, Tensor) and sample.ndim == 0:
            raise ValueError("sample: must be a batch (N, ...) of at least one example, not a single number")
        return plain(sample, "sample")
    if not isinstance(sample, Sequence) or not all(isinstance(n, int) and n > 0 for n in sample) or len(sample) < 2:
        raise ValueError(f"sample: must be an input batch or its shape (N, ...), not {sample!r}")
    return shaped(sample, backbone)
