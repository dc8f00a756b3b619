"""The decoupled network: the user's backbone as local modules, with the steps that train it."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator, Mapping, Sequence
from functools import partial
from typing import Any, Protocol

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch._subclasses.fake_tensor import DataDependentOutputException
from torch.utils._pytree import tree_map_only

from .cut.batches import Batch, as_prediction, plain, shaped, tensors_of
from .cut.facts import Facts
from .cut.forward import Forward
from .cut.inside import Inside
from .cut.observe import is_sharded
from .cut.read_out import layer_of
from .cut.units import Partition, Unit, Units, balance
from .memory import plans, predict
from .memory.fakes import MakesOptimizer
from .modules import LocalModules
from .recompute import by_itself, undisturbed
from .rules import Rule, Site, make_rule
from .rules.downstream import Downstream
from .steps import guided_step, local_step
from .tokens import chunks_scores

__all__ = ["COSTS", "SGD_WITH_MOMENTUM", "DecoupledNetwork", "decouple", "prepare"]

_NO_LARGER = 1.02  # sizes that differ by less count as the same
SGD_WITH_MOMENTUM = partial(torch.optim.SGD, lr=0.1, momentum=0.9)  # an optimizer to be counted; the rate is arbitrary
COSTS = ("activation_bytes", "flops", "num_parameters")


class Recommended(Protocol):
    """What :func:`torchlocal.plan` returns, as far as it is asked here."""

    @property
    def modules(self) -> int:
        """Number of local modules."""
        ...

    @property
    def recommendation(self) -> str:
        """Why."""
        ...


class DecoupledNetwork(LocalModules):
    """A backbone as K gradient-isolated local modules; made by :func:`decouple`.

    See :class:`LocalModules` for what it holds; its methods are the functions of the same names.
    """

    local_step = local_step
    guided_step = guided_step
    local_plans = plans.local_plans
    guided_plan = plans.guided_plan
    recompute_segments = plans.recompute_segments


def decouple(
    model: nn.Module | Sequence[nn.Module],
    modules: int | str | Recommended | None = None,
    *,
    sample: Batch | Sequence[int],
    cuts: Sequence[str] | None = None,
    rule: str | Rule = "dgl",
    criterion: Callable[[Tensor, Any], Tensor] = F.cross_entropy,
    prediction: Callable[[Any], Tensor] = as_prediction,
    carry: str | None = None,
    cost: str = "activation_bytes",
    optimizer: MakesOptimizer = SGD_WITH_MOMENTUM,
    autocast: torch.dtype | None = None,
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
            take no more memory in all than one per unit (parameters, auxiliary networks, gradients, optimizer state and
            the local step, within 2 %), but two: later units are smaller, each module costs an auxiliary network, and
            accuracy falls with the number of modules; or what :func:`torchlocal.plan` returned.
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
        optimizer: makes the optimizer of given parameters whose state ``"fewest"`` counts; by default SGD with
            momentum, which keeps one number for each parameter.
        autocast: dtype of the steps' forward passes, as ``"fewest"`` counts them.

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
        optimizer=optimizer,
        autocast=autocast,
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
    optimizer: MakesOptimizer = SGD_WITH_MOMENTUM,
    autocast: torch.dtype | None = None,
) -> Callable[..., DecoupledNetwork]:
    """The work of :func:`decouple` that is the same for every number of local modules.

    Returns:
        What makes the decoupled network of a number of local modules, of ``"all"`` or ``"fewest"``; all that it makes
        share what was observed and measured. With ``fake=True`` the auxiliary networks have no memory: for predictions.
    """
    backbone, given = _backbone(model, modules, cuts)
    _check_device(backbone)
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
    at_end = min(rule.units_at_end, len(units))
    if rule.units_at_end > 1 and (given or cuts is not None):
        raise ValueError(
            f"rule: {rule!r} says itself that the last {rule.units_at_end} units are one module; say how many modules "
            "there are, and no cuts"
        )
    most = len(units) - at_end + 1
    if isinstance(modules, int) and most < modules <= len(units):
        raise ValueError(
            f"modules: {modules} local modules were asked for, but {rule!r} trains the last {at_end} of "
            f"{len(units)} units together, so there are {most} at most; ask for fewer"
        )
    if isinstance(modules, int) and modules > len(units):
        raise ValueError(
            f"modules: {modules} local modules were asked for, but {type(backbone).__name__} can be cut into "
            f"{len(units)} units at most ({', '.join(u.name for u in units)}){found.explain(modules)}; ask for fewer, "
            "or pass a list of modules"
        )
    chain = Forward(backbone, Facts.of(found), prediction, Inside, found.seen.mode)
    if chunks_scores(criterion):
        layer_of(backbone, chain.facts.read_out)
    anchor = next((p for p in backbone.parameters() if p.is_floating_point()), torch.empty(0))
    chain.sample = kept = tree_map_only(Tensor, _without_values, batch)

    auxiliary_bytes = _AuxiliaryBytes(found, units, rule, chain)

    def assemble(num_modules: int, *, fake: bool = False) -> DecoupledNetwork:
        def price(first: int, last: int) -> float:
            if cost != "activation_bytes":
                return sum(getattr(unit, cost) for unit in units[first:last])
            beside = auxiliary_bytes(last - 1, num_modules) if last < len(units) else 0
            return found.activation_bytes(first, last) + beside

        def end(unit: int) -> int:
            return len(units) if unit == most else unit

        groups = [
            range(g.start, end(g.stop)) for g in balance(most, num_modules, lambda first, last: price(first, end(last)))
        ]
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
            return assemble(modules if isinstance(modules, int) else most, fake=fake)
        counted = partial(_total_bytes, partial(assemble, fake=True), anchor.device, optimizer, autocast)
        try:
            fewest = by_itself(partial(_fewest, counted, most), anchor.device)
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


def _total_bytes(
    assemble: Callable[[int], DecoupledNetwork],
    device: torch.device,
    optimizer: MakesOptimizer,
    autocast: torch.dtype | None,
    num_modules: int,
) -> int:
    """What so many local modules take in all: parameters, optimizer state, batch and local step, by prediction."""
    with undisturbed(device):  # by auxiliary networks to throw away
        net = assemble(num_modules)
        try:
            return predict(net, step="local", optimizer=optimizer, autocast=autocast).total_bytes
        except DataDependentOutputException:  # the optimizer looks at values (Adafactor)
            return predict(net, step="local", optimizer=SGD_WITH_MOMENTUM, autocast=autocast).total_bytes


def _fewest(total_bytes: Callable[[int], int], most: int) -> int:
    """The smallest number of local modules, from 2 on, that take no more memory in all than ``most`` modules do."""
    limit = _NO_LARGER * total_bytes(most)
    # With the number of modules the step's peak falls, and the auxiliary networks grow: those that take too much are
    # the smallest numbers. One module would be no local learning, whatever it takes.
    enough, too_few = most, 1
    while enough - too_few > 1:
        middle = (enough + too_few) // 2
        enough, too_few = (middle, too_few) if total_bytes(middle) <= limit else (enough, middle)
    return enough


class _AuxiliaryBytes:
    """Bytes that the auxiliary network after a unit keeps for backward, found on fake tensors when first asked for."""

    def __init__(self, found: Units, units: Sequence[Unit], rule: Rule, chain: Forward) -> None:
        self._found, self._units, self._rule, self._chain = found, units, rule, chain
        self._known: dict[tuple[int, int | None], int] = {}  # by unit, and number of modules where that matters

    def __call__(self, unit: int, num_modules: int) -> int:
        for key in ((unit, None), (unit, num_modules)):
            if key in self._known:
                return self._known[key]
        index = min(unit, num_modules - 2)
        site = _AskedSite(**vars(_site(index, num_modules, self._units, unit + 1, self._found, self._chain)))
        size = self._measure(site, self._found.boundary(unit))
        self._known[unit, num_modules if "place" in vars(site) else None] = size
        return size

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


class _AskedSite(Site):
    """A site that notes, in an attribute ``place``, that it was asked where it is among the local modules."""

    def __getattribute__(self, name: str) -> Any:
        if name in ("index", "num_modules"):
            object.__setattr__(self, "place", True)
        return super().__getattribute__(name)


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


def _check_device(backbone: nn.Module) -> None:
    """Refuse a network on several devices: a step takes one to be where its losses and its random numbers are."""
    where: dict[str, str] = {}
    for name, parameter in backbone.named_parameters():
        if not parameter.is_meta and not is_sharded(parameter):
            where.setdefault(str(parameter.device), name)
    if len(where) > 1:
        told = " and ".join(f"{name} on {device}" for device, name in sorted(where.items()))
        raise ValueError(
            f"model: a decoupled network computes on one device, and this one has {told}; move it to one, or share the "
            "local modules out to ranks (torchlocal.distribute)"
        )


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
