"""The peak of a step, predicted without running it: the step's own code runs on tensors without memory."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch

from ..cut.batches import Batch
from ..engine import follows
from ..modules import LocalModules
from ..recompute import GuidedPlan, Plan
from .fakes import FakeStep, MakesOptimizer, Prediction
from .plans import guided_plan, local_plans

__all__ = ["predict", "predict_on"]

_OPTIONS = ("recompute", "memory", "micro_batches", "optimizers")  # of some steps only


def predict(
    net: LocalModules,
    batch: Batch | Sequence[int] | None = None,
    target: Any = None,
    *,
    step: str = "local",
    optimizer: MakesOptimizer | None = None,
    auxiliary: str = "follow",
    recompute: str | int | dict[int, Plan] | None = None,
    memory: str | int | GuidedPlan | None = None,
    micro_batches: int | None = None,
    autocast: torch.dtype | None = None,
    optimizers: object = None,
) -> Prediction:
    """Predict the peak of one training step: the step's own code runs on fake tensors, which have no memory.

    Neither the network nor any random generator is touched, and no GPU is needed: the counting is that of the kernels
    of the device that the network is on. Integers and masks of the batch stay what they are.

    Args:
        net: the decoupled network.
        batch: a batch, or the shape of one that is a tensor; by default the sample that the network was decoupled with.
        target: what the criterion takes; by default class indices, one for each example or position, or where the
            criterion refuses those, a tensor of the shape of the prediction.
        step: ``"local"``, ``"guided"``, or ``"plain"`` for an ordinary step of the backbone, without torchlocal.
        optimizer: makes the optimizer of given parameters, for example ``torch.optim.AdamW``; its state is counted, and
            so is its update after the step. By default neither is.
        auxiliary: the guided step's option.
        recompute: the step's option.
        memory: the guided step's option.
        micro_batches: the guided step's option.
        autocast: the step's option.
        optimizers: not None: each local module has an optimizer of its own, made by ``optimizer``, which is stepped as
            soon as its gradients are there; without that one the gradients are freed as they would be then.

    Raises:
        ValueError: the step is unknown, or an option is; the network does not run on such a batch, or it cannot run
            without values, since its forward looks at those of its features.
    """
    if step not in ("local", "guided", "plain"):
        raise ValueError(f"step: must be 'local', 'guided' or 'plain', not {step!r}")
    return predict_on(
        FakeStep(net, batch, target, optimizer=optimizer),
        step=step,
        target=target,
        auxiliary=auxiliary,
        recompute=recompute,
        memory=memory,
        micro_batches=micro_batches,
        autocast=autocast,
        optimizers=optimizers,
    )


def predict_on(
    fake: FakeStep,
    *,
    step: str,
    target: Any = None,
    auxiliary: str = "follow",
    recompute: str | int | dict[int, Plan] | None = None,
    memory: str | int | GuidedPlan | None = None,
    micro_batches: int | None = None,
    autocast: torch.dtype | None = None,
    optimizers: object = None,
) -> Prediction:
    """:func:`predict` on a network without memory, which takes no step twice; ``target`` as it was given."""
    net = fake.net
    takes = {"plain": (), "local": ("recompute", "optimizers")}.get(step, ("auxiliary", *_OPTIONS))
    given = {"recompute": recompute, "memory": memory, "micro_batches": micro_batches, "optimizers": optimizers}
    meant = [name for name in _OPTIONS if given[name] is not None and name not in takes]
    follows(net, auxiliary)  # refuses another word
    if (auxiliary != "follow" and "auxiliary" not in takes) or meant:
        name = meant[0] if meant else "auxiliary"
        raise ValueError(f"{name}: means nothing to step={step!r}; leave it out")
    # Plans are looked for with the batch as it is given, and remembered for the steps.
    if step == "plain":
        return fake.plain(autocast)
    if step == "local":
        plans = local_plans(net, fake.given, target, recompute, autocast=autocast)  # type: ignore[arg-type]
        return fake.local(plans, autocast=autocast, optimizers=optimizers)
    plan = guided_plan(
        net,
        fake.given,
        target,
        auxiliary=auxiliary,
        recompute=recompute,  # type: ignore[arg-type]
        memory=memory,
        micro_batches=micro_batches,
        autocast=autocast,
        optimizers=optimizers,
        fake=fake if optimizers is None else None,  # a search frees gradients as soon as optimizers would
    )
    return fake.guided(plan, auxiliary=auxiliary, autocast=autocast, optimizers=optimizers)
