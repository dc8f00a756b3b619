"""The decoupled network: the user's backbone, its local modules and their auxiliary networks."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import TYPE_CHECKING, Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from . import steps
from .graph import Chain, training_mode
from .partition import Partition, Unit, Units, balance
from .recompute import Plan, in_segments
from .rules import Rule, Site, make_rule
from .rules.downstream import Downstream
from .schedule import GuidedPlan, find_guided_plan, find_local_plans

if TYPE_CHECKING:
    from .plan import MemoryPlan

_NO_LARGER = 1.02  # peaks that differ by less count as the same
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
        chain: the units as something that runs.
        input_shape: shape of the sample that the network was decoupled with.
    """

    def __init__(
        self,
        backbone: nn.Module,
        auxiliary: Iterable[nn.Module],
        *,
        chain: Chain,
        partition: Partition,
        rule: Rule,
        criterion: Callable[[Tensor, Any], Tensor],
        sites: Sequence[Site],
        input_shape: torch.Size,
    ) -> None:
        super().__init__()
        self.backbone = backbone
        self.auxiliary = nn.ModuleList(auxiliary)
        self.chain = chain
        self.partition = partition
        self.rule = rule
        self.criterion = criterion
        self.sites = tuple(sites)
        self.input_shape = input_shape
        self._plans: dict[tuple[Any, ...], Any] = {}

    @property
    def num_modules(self) -> int:
        """Number K of local modules."""
        return len(self.partition.groups)

    def forward(self, x: Tensor) -> Tensor:
        """The backbone's own forward."""
        return self.backbone(x)

    def local_step(self, x: Tensor, target: Any, **options: Any) -> list[Tensor]:
        """See :func:`torchlocal.local_step`."""
        return steps.local_step(self, x, target, **options)

    def guided_step(self, x: Tensor, target: Any, **options: Any) -> list[Tensor]:
        """See :func:`torchlocal.guided_step`."""
        return steps.guided_step(self, x, target, **options)

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
        """For each local module its parameters and its auxiliary network's, to give each an optimizer of its own."""
        self.chain.refresh(next(iter(self.parameters()), torch.empty(0)).device)
        lists = [list(self.chain.segment(g.start, g.stop).parameters()) for g in self.partition.groups]
        for parameters, network in zip(lists, self.auxiliary, strict=False):
            parameters += network.parameters()
        listed = {id(p) for parameters in lists for p in parameters}
        lists[-1] += [p for p in self.parameters() if id(p) not in listed]  # those that the forward does not use
        return lists

    @torch.no_grad()
    def depth_outputs(self, x: Tensor) -> list[Tensor]:
        """What each local module predicts, through its auxiliary network; the last is the backbone's output.

        Args:
            x: input batch (N, ...).

        Returns:
            K tensors, each of the shape of the network's output.
        """
        self.chain.refresh(x.device)
        outputs = []
        for k, group in enumerate(self.partition.groups):
            x = self.chain.segment(group.start, group.stop)(x)
            last = k == self.num_modules - 1
            outputs.append(x if last else self.rule.predict(self.sites[k], self.auxiliary[k], x))
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
        x: Tensor,
        target: Any = None,
        *,
        recompute: str | int | None = None,
        memory: str | int | GuidedPlan | None = None,
        auxiliary: str = "follow",
        autocast: torch.dtype | None = None,
        optimizers: object = None,
    ) -> GuidedPlan:
        """How a guided step of such a batch runs; found once for each shape of batch and options."""
        if memory is not None and recompute is not None:
            raise ValueError(f"recompute: memory={memory!r} chooses what is recomputed; leave recompute out")
        if isinstance(memory, GuidedPlan):
            return memory
        if memory is None or memory == "full":
            key = ("recompute", type(recompute), recompute)
            if key not in self._plans:
                self._plans[key] = GuidedPlan(tree=in_segments(self.recompute_segments(recompute)))
            known: GuidedPlan = self._plans[key]
            return known
        if isinstance(memory, bool) or not (memory in ("local", "exact") or (isinstance(memory, int) and memory > 0)):
            raise ValueError(f"memory: must be 'local', 'exact', 'full', a number of bytes or None, not {memory!r}")
        plan: GuidedPlan = self._found(
            find_guided_plan,
            x,
            target,
            memory=memory,
            auxiliary=auxiliary,
            autocast=autocast,
            optimizers=optimizers is not None or None,
        )
        return plan

    def local_plans(
        self,
        x: Tensor,
        target: Any = None,
        recompute: str | dict[int, Plan] | None = None,
        *,
        autocast: torch.dtype | None = None,
    ) -> dict[int, Plan]:
        """By module, how those of a local step run that recompute something; found once for each shape of batch."""
        if recompute is None or isinstance(recompute, dict):
            return recompute or {}
        if recompute != "largest":
            raise ValueError(f"recompute: must be None or 'largest' in a local step, not {recompute!r}")
        plans: dict[int, Plan] = self._found(find_local_plans, x, target, autocast=autocast)
        return plans

    def _found(self, find: Callable[..., Any], x: Tensor, target: Any, **options: Any) -> Any:
        """What a search finds, which is looked for once for each shape of batch and options."""
        flags = tuple(module.training for module in self.modules())
        key = (find, x.shape, x.stride(), x.dtype, flags, *options.values())
        if key not in self._plans:
            # A thread of its own has none of the caller's modes: autocast, no_grad, a counter.
            with ThreadPoolExecutor(1) as executor:
                self._plans[key] = executor.submit(find, self, x, target, **options).result()
        return self._plans[key]

    def extra_repr(self) -> str:
        """Names of the local modules."""
        return f"local modules: {', '.join(self.partition.names)}; rule={self.rule!r}"


def decouple(
    model: nn.Module | Sequence[nn.Module],
    modules: int | str | MemoryPlan | None = None,
    *,
    sample: Tensor | Sequence[int],
    cuts: Sequence[str] | None = None,
    rule: str | Rule = "dgl",
    criterion: Callable[[Tensor, Any], Tensor] = F.cross_entropy,
    cost: str = "activation_bytes",
) -> DecoupledNetwork:
    """Cut a network into K local modules and attach an auxiliary network to each but the last.

    The network itself is not changed: its parameters are trained in place, and it works as before at any time. The
    auxiliary networks are initialised from torch's global random generator, on the device and in the dtype of the
    network's first parameter.

    Args:
        model: any ``nn.Module`` whose forward maps one tensor to one tensor; or a list of modules that run one after
            another, each of which becomes a local module (as do the children of an ``nn.Sequential`` when neither
            ``modules`` nor ``cuts`` is given).
        modules: number K of local modules, balanced by ``cost``; ``"all"`` for one per unit; ``"fewest"`` for as few as
            take no more memory than one per unit: later units are smaller, and accuracy falls with the number of
            modules; or what :func:`torchlocal.plan` returned.
        sample: an input batch (N, ...), or its shape; nothing is computed with it. ``"fewest"`` is for its batch size.
        cuts: instead of ``modules``, qualified names of the submodules to cut after.
        rule: a local rule, or its name.
        criterion: loss of the task, ``criterion(output, target)`` returns a 0-dim tensor.
        cost: what is balanced over the local modules: ``"activation_bytes"`` (with those of the auxiliary network),
            ``"flops"`` or ``"num_parameters"``.

    Returns:
        The decoupled network. It holds the model itself, not a copy.

    Raises:
        ValueError: an argument is wrong, or the model cannot be cut as asked; the message says what to do.
    """
    if modules is not None and not isinstance(modules, int | str) and hasattr(modules, "recommendation"):
        modules = modules.modules
    backbone, given = _backbone(model, modules, cuts)  # type: ignore[arg-type]
    shape = _sample(sample, backbone)
    if isinstance(rule, str):
        rule = make_rule(rule)
    elif not isinstance(rule, Rule):
        raise ValueError(f"rule: must be a name or a Rule, not {type(rule).__name__}")
    if not callable(criterion):
        raise ValueError(f"criterion: must be callable as criterion(output, target), not {type(criterion).__name__}")
    if cost not in COSTS:
        raise ValueError(f"cost: must be one of {', '.join(COSTS)}, not {cost!r}")

    found = Units(backbone, shape, given=given)
    if cuts is not None:
        found.cut_after(cuts)
    units = found.describe()
    if isinstance(modules, int) and modules > len(units):
        raise ValueError(
            f"modules: {modules} local modules were asked for, but {type(backbone).__name__} can be cut into "
            f"{len(units)} units at most ({', '.join(u.name for u in units)}); ask for fewer, or pass a list of modules"
        )
    chain = found.chain()
    anchor = next(backbone.parameters(), torch.empty(0))
    with training_mode(backbone):
        chain.refresh(anchor.device)  # rules may copy units, here or, for their cost, on fake tensors

    def assemble(num_modules: int) -> DecoupledNetwork:
        auxiliary_bytes = _AuxiliaryBytes(found, units, rule, num_modules, shape, chain)

        def price(first: int, last: int) -> float:
            if cost != "activation_bytes":
                return sum(getattr(unit, cost) for unit in units[first:last])
            return found.activation_bytes(first, last) + (auxiliary_bytes(last - 1) if last < len(units) else 0)

        groups = balance(len(units), num_modules, price)
        costs = tuple(float(price(group.start, group.stop)) for group in groups)
        stops = [group.stop for group in groups[:-1]]
        sites = [_site(k, num_modules, units, stop, shape, found.output_shape, chain) for k, stop in enumerate(stops)]
        with torch.device(anchor.device):
            auxiliary = [rule.auxiliary(site).to(device=anchor.device, dtype=anchor.dtype) for site in sites]
        return DecoupledNetwork(
            backbone,
            auxiliary,
            chain=chain,
            partition=Partition(units=units, groups=tuple(groups), costs=costs),
            rule=rule,
            criterion=criterion,
            sites=sites,
            input_shape=shape.shape,
        )

    if modules == "fewest":
        with ThreadPoolExecutor(1) as executor:  # a thread of its own has none of the caller's modes, such as no_grad
            try:
                modules = executor.submit(_fewest, assemble, len(units), anchor.device).result()
            except ValueError as error:
                if not str(error).startswith("target:"):
                    raise
                raise ValueError(
                    'modules: "fewest" takes a criterion of class indices (N,) or of a tensor like the output; give a '
                    "number of modules with this one"
                ) from error
    return assemble(modules if isinstance(modules, int) else len(units))


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

    def __init__(
        self, found: Units, units: Sequence[Unit], rule: Rule, num_modules: int, sample: Tensor, chain: Chain
    ) -> None:
        self._found, self._units, self._rule, self._sample = found, units, rule, sample
        self._num_modules, self._chain = num_modules, chain
        self._known: dict[int, int] = {}

    def __call__(self, unit: int) -> int:
        if unit not in self._known:
            index = min(unit, self._num_modules - 2)
            output_shape = self._found.output_shape
            site = _site(index, self._num_modules, self._units, unit + 1, self._sample, output_shape, self._chain)
            self._known[unit] = self._measure(site, self._found.boundary(unit))
        return self._known[unit]

    def _measure(self, site: Site, features: Tensor) -> int:
        kept: dict[int, int] = {}
        alive: list[Tensor] = []

        def note(tensor: Tensor) -> Tensor:
            alive.append(tensor)
            kept[tensor.untyped_storage()._cdata] = tensor.untyped_storage().nbytes()
            return tensor

        with self._found.mode, torch.enable_grad():
            default = torch.get_default_dtype()
            torch.set_default_dtype(features.dtype)  # fake parameters cannot be converted afterwards
            try:
                with torch.device(features.device):
                    network = self._rule.auxiliary(site)
            finally:
                torch.set_default_dtype(default)
            network.train(features.shape[0] > 1)  # BatchNorm over vectors would refuse a single example
            features = features.detach().requires_grad_()
            with torch.autograd.graph.saved_tensors_hooks(note, lambda tensor: tensor):
                self._rule.rehearse(site, network, features)
        for tensor in [features, *network.parameters(), *network.buffers()]:
            kept.pop(tensor.untyped_storage()._cdata, None)
        return sum(kept.values())


def _site(
    index: int,
    num_modules: int,
    units: Sequence[Unit],
    stop: int,
    sample: Tensor,
    output_shape: torch.Size,
    chain: Chain,
) -> Site:
    unit = units[stop - 1]
    return Site(
        index=index,
        num_modules=num_modules,
        feature_shape=unit.output_shape,
        channel_dim=unit.channel_dim,
        input_shape=sample.shape,
        output_shape=output_shape,
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


def _sample(sample: Tensor | Sequence[int], backbone: nn.Module) -> Tensor:
    """A batch without memory of the shape of ``sample``."""
    if isinstance(sample, Tensor):
        if sample.ndim == 0 or sample.shape[0] == 0:
            raise ValueError(f"sample: must be a batch (N, ...) of at least one example, not {tuple(sample.shape)}")
        return sample
    if not isinstance(sample, Sequence) or not all(isinstance(n, int) and n > 0 for n in sample) or len(sample) < 2:
        raise ValueError(f"sample: must be an input batch or its shape (N, ...), not {sample!r}")
    anchor = next(backbone.parameters(), torch.empty(0))
    # One number seen as a whole batch: no memory, whatever the shape.
    return torch.zeros(1, dtype=anchor.dtype, device=anchor.device).expand(tuple(sample))
