"""Which plan a step runs by: asked for by name, or searched for, once for each layout of batch and options."""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Callable
from typing import Any
from weakref import WeakKeyDictionary

import torch

from ..checks import check_whole
from ..cut.batches import Batch, device_of, fits_into, key_of, size_of
from ..cut.units import balance
from ..micro import NotCut, Parts, cut_batch
from ..modules import LocalModules
from ..recompute import GuidedPlan, Plan, by_itself, in_segments
from .fakes import FakeStep
from .search import find_guided_plan, find_local_plans

__all__ = ["guided_plan", "local_plans", "plan_and_parts", "recompute_segments"]

_MOST_PLANS = 32  # of a network that are remembered, of the latest layouts of batches
_MOST_SEARCHES = 4  # with the same options, before plans of larger batches are used again

_FOUND: WeakKeyDictionary[LocalModules, OrderedDict[tuple[Any, ...], Any]] = WeakKeyDictionary()


def recompute_segments(net: LocalModules, recompute: str | int | None) -> list[range]:
    """The segments, as ranges of units, that a guided step with ``recompute`` runs twice.

    Raises:
        ValueError: ``recompute`` is not None, ``"modules"`` or a number from 1 to the number of units.
    """
    units = net.partition.units
    if recompute is None:
        segments = [range(len(units))]
    elif recompute == "modules":
        segments = list(net.partition.groups)
    elif isinstance(recompute, int) and not isinstance(recompute, bool) and 1 <= recompute <= len(units):
        sizes = [unit.activation_bytes for unit in units]
        segments = balance(len(units), recompute, lambda first, last: sum(sizes[first:last]))
    else:
        raise ValueError(
            f"recompute: must be None, 'modules' or a number of segments from 1 to {len(units)}, not {recompute!r}"
        )
    return segments


def guided_plan(
    net: LocalModules,
    batch: Batch,
    target: Any = None,
    *,
    recompute: str | int | None = None,
    memory: str | int | GuidedPlan | None = None,
    micro_batches: int | None = None,
    auxiliary: str = "follow",
    autocast: torch.dtype | None = None,
    optimizers: object = None,
    fake: FakeStep | None = None,
) -> GuidedPlan:
    """How a guided step of such a batch runs; found once for each layout of batch and options.

    ``fake`` is the network and that batch without memory, where they are there.
    """
    if memory is not None and recompute is not None:
        raise ValueError(f"recompute: memory={memory!r} chooses what is recomputed; leave recompute out")
    if micro_batches is not None:
        check_whole("micro_batches", micro_batches, 1)
        if isinstance(memory, GuidedPlan) or memory in (None, "full", "exact"):
            raise ValueError(
                f"micro_batches: {micro_batches} bounds what a search for memory='local' or a number of bytes may cut "
                "the batch into; leave it out, or give such a memory"
            )
    if isinstance(memory, GuidedPlan):
        return memory
    if memory is None or memory == "full":
        return GuidedPlan(tree=in_segments(_without_carry(net, recompute_segments(net, recompute))))
    if isinstance(memory, bool) or not (memory in ("local", "exact") or (isinstance(memory, int) and memory > 0)):
        raise ValueError(f"memory: must be 'local', 'exact', 'full', a number of bytes or None, not {memory!r}")
    _without_carry(net, [range(0), range(0)])
    plan: GuidedPlan = _found(
        net,
        find_guided_plan,
        fake,
        batch,
        target,
        memory=memory,
        micro_batches=micro_batches,
        auxiliary=auxiliary,
        autocast=autocast,
        optimizers=optimizers is not None or None,
    )
    return plan


def _without_carry(net: LocalModules, segments: list[range]) -> list[range]:
    """Refuse to run from cut to cut where more than the features cross."""
    if net.carry is not None and len(segments) > 1:
        raise ValueError(
            'recompute: a network that was decoupled with carry="collect" cannot run from one cut to another, so '
            "nothing can be recomputed; leave recompute and memory out, or use the network's own checkpointing"
        )
    return segments


def plan_and_parts(net: LocalModules, batch: Batch, target: Any, **options: Any) -> tuple[GuidedPlan, Parts]:
    """The plan of a guided step, by the options of :func:`guided_plan`, and the parts that it cuts the batch into."""
    plan, follow = guided_plan(net, batch, target, **options), options.get("auxiliary") != "frozen"
    try:
        return plan, cut_batch(net, batch, target, plan.micro_batches, follow=follow)
    except NotCut:
        if not isinstance(options["memory"], str | int):
            raise
    # The plan was found for a batch that could be cut, and this one's target cannot.
    plan = guided_plan(net, batch, target, **{**options, "memory": "exact", "micro_batches": None})
    return plan, [(batch, target, 1.0)]


def local_plans(
    net: LocalModules,
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
    _without_carry(net, [range(0), range(0)])
    plans: dict[int, Plan] = _found(net, find_local_plans, None, batch, target, autocast=autocast)
    return plans


def _found(
    net: LocalModules, find: Callable[..., Any], fake: FakeStep | None, batch: Batch, target: Any, **options: Any
) -> Any:
    """What a search finds, which is looked for once for each layout of batch and target, and options."""
    known = _FOUND.setdefault(net, OrderedDict())
    flags = net.to_read_out, *(module.training for module in net.modules())
    key = (find, key_of(batch), key_of(target), flags, *options.values())
    # A search takes seconds: where batches come in many sizes, one that was found for a larger one has to do.
    others = [other for other in known if other[0] is find and other[3:] == key[3:]]
    if key not in known and len(others) >= _MOST_SEARCHES:
        larger = [other for other in others if fits_into(key[1], other[1]) and fits_into(key[2], other[2])]
        key = min(larger, key=lambda other: size_of(other[1]), default=key)
    if key in known:
        known.move_to_end(key)
        return known[key]
    net.chain.look_inside(batch)
    device = device_of(batch, net.backbone)
    known[key] = by_itself(lambda: find(fake or FakeStep(net, batch, target), target, **options), device)
    while len(known) > _MOST_PLANS:
        known.popitem(last=False)
    return known[key]
