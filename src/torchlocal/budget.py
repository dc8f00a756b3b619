"""Which way of training fits into a memory budget: predictions for all of them, side by side."""

from __future__ import annotations

import json
import math
import warnings
from collections.abc import Callable, Iterable, Sequence
from dataclasses import asdict, dataclass
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_map_only

from .checks import check_share, parse_size
from .cut.batches import Batch, num_examples
from .memory import LABELS, Prediction, predict
from .memory.fakes import FakeStep
from .memory.prediction import predict_on
from .network import SGD_WITH_MOMENTUM, DecoupledNetwork, prepare

if TYPE_CHECKING:
    from matplotlib.figure import Figure

__all__ = ["MemoryPlan", "PlanRow", "parse_size", "plan"]

_MOST_SEGMENTS = 3  # numbers of segments of uniform checkpointing that are predicted
_MOST_TRIALS = 6  # predictions per row, to find its largest batch


@dataclass(frozen=True, kw_only=True)
class PlanRow:
    """One way to train.

    Attributes:
        method: "end-to-end", "checkpointing" (uniform), "checkpointing, searched" (every step guided with
            ``memory="exact"``), "local" or "pgl".
        modules: number K of local modules.
        total_bytes: predicted peak of everything: parameters, optimizer state, batch and step.
        breakdown: that, by what it is; workspace inside kernels is not included.
        flops_ratio: FLOPs of a step relative to end-to-end, auxiliary networks and recomputation included; for pgl the
            mean over guided and local steps.
        largest_batch: examples that are predicted to fit into the budget, at most a few per cent fewer than really do;
            None where there is no budget.
        fits: whether the batch of the sample does.
        note: what is recomputed.
    """

    method: str
    modules: int
    total_bytes: int
    breakdown: dict[str, int]
    flops_ratio: float
    largest_batch: int | None
    fits: bool
    note: str = ""


@dataclass(frozen=True, kw_only=True)
class MemoryPlan:
    """What :func:`plan` found; :func:`torchlocal.decouple` takes it for ``modules``.

    Attributes:
        rows: all ways to train that were looked at.
        budget: in bytes, or None.
        batch_size: examples of the sample.
        modules: number K of local modules of the recommended row.
        method: method of the recommended row.
        recommendation: one sentence.
    """

    rows: tuple[PlanRow, ...]
    budget: int | None
    batch_size: int
    modules: int
    method: str
    recommendation: str

    def to_json(self) -> str:
        """Everything as JSON."""
        return json.dumps(asdict(self), indent=2)

    def figure(self) -> Figure:
        """The breakdowns as stacked bars, with the budget as a line."""
        from matplotlib.figure import Figure

        figure = Figure(figsize=(8, 0.45 * len(self.rows) + 1.6), layout="constrained")
        axes = figure.subplots()
        names = [row.method + (f" K={row.modules}" if row.method in ("local", "pgl") else "") for row in self.rows]
        largest = max(row.total_bytes for row in self.rows)
        scale, unit = (2**30, "GiB") if largest >= 2**30 else (2**20, "MiB")
        left = [0.0] * len(self.rows)
        for label in LABELS:
            widths = [row.breakdown[label] / scale for row in self.rows]
            axes.barh(names, widths, left=left, label=label)
            left = [a + b for a, b in zip(left, widths, strict=True)]
        for i, row in enumerate(self.rows):
            text = f" {row.total_bytes / scale:.2f}, ×{row.flops_ratio:.2f} FLOPs"
            box = {"facecolor": "white", "edgecolor": "none", "pad": 1}  # the budget's line may run through it
            axes.text(left[i], i, text, va="center", size=8, bbox=box)
        if self.budget is not None:
            axes.axvline(self.budget / scale, color="black", linestyle="--", label="budget")
        axes.set_xlim(0, 1.35 * max(left))
        axes.set_xlabel(f"predicted peak in {unit} at batch size {self.batch_size} (kernel workspace not included)")
        axes.invert_yaxis()
        figure.legend(loc="outside upper center", ncols=4, fontsize=8)
        return figure


def plan(
    model: nn.Module,
    sample: Batch | Sequence[int],
    *,
    budget: int | None = None,
    modules: Sequence[int | str] = (2, 4, 8, 16, "all"),
    guided_share: float = 0.2,
    target: Any = None,
    optimizer: Callable[[Iterable[nn.Parameter]], torch.optim.Optimizer] = SGD_WITH_MOMENTUM,
    autocast: torch.dtype | None = None,
    progress: Callable[[float], object] | None = None,
    **options: Any,
) -> MemoryPlan:
    """Predict what every way to train ``model`` takes, and recommend one that fits into the budget.

    Nothing is allocated and no GPU is needed. Looked at are end-to-end training, uniform activation checkpointing, the
    least that it takes by searched recomputation with the batch in one piece, and local learning and PGL (guided steps
    with ``memory="local"``) with several numbers of local modules.

    Args:
        model: see :func:`torchlocal.decouple`.
        sample: a batch of the size to train with, as :func:`torchlocal.decouple` takes it.
        budget: bytes; None: no recommendation but the smallest.
        modules: numbers of local modules to look at, or words as :func:`torchlocal.decouple` takes them; those beyond
            what there can be are left out.
        guided_share: of PGL's steps.
        target: see :func:`torchlocal.memory.predict`.
        optimizer: makes the optimizer whose state is counted; by default SGD with momentum.
        autocast: dtype of forward passes.
        progress: called with the share of the work that is done, whenever a prediction or a row is.
        options: ``rule``, ``criterion``, ``prediction``, ``cost`` of :func:`torchlocal.decouple`.

    Raises:
        ValueError: an argument is wrong, or the model cannot be cut.
    """
    if budget is not None and (isinstance(budget, bool) or not isinstance(budget, int) or budget < 1):
        raise ValueError(f"budget: must be a whole number of bytes of at least 1, or None, not {budget!r}")
    check_share("guided_share", guided_share)
    for k in modules:
        if k not in ("all", "fewest") and (isinstance(k, bool) or not isinstance(k, int) or k < 1):
            raise ValueError(f'modules: must hold whole numbers of at least 1, "all" or "fewest", not {k!r}')
    make = prepare(model, 1, sample=sample, optimizer=optimizer, autocast=autocast, **options)
    whole = make(1, fake=True)
    most, size = max(1, len(whole.partition.units) - whole.rule.units_at_end + 1), num_examples(whole.sample)
    wanted = dict.fromkeys(most if k == "all" else k for k in modules if k != 1)
    made = [make(k, fake=True) for k in wanted if isinstance(k, str) or k <= most]
    nets = {net.num_modules: net for net in sorted(made, key=lambda net: net.num_modules) if net.num_modules > 1}
    fakes: dict[DecoupledNetwork, FakeStep] = {}

    def predicted(net: DecoupledNetwork, step: dict[str, Any], count: int = size) -> Prediction:
        batch, labels = (_resized(value, size, count) for value in (net.sample, target))
        if count != size:
            return predict(net, batch, labels, optimizer=optimizer, autocast=autocast, **step)
        if net not in fakes:
            fakes[net] = FakeStep(net, batch, labels, optimizer=optimizer)
        return predict_on(fakes[net], target=labels, autocast=autocast, **step)

    def recomputation(net: DecoupledNetwork, memory: str) -> str:
        chosen = net.guided_plan(net.sample, target, memory=memory, autocast=autocast)
        parts = f"{chosen.micro_batches} micro-batches, " if chosen.micro_batches > 1 else ""
        return f"{parts}{chosen.recomputed:.2f} forward passes recomputed"

    def row(
        method: str, net: DecoupledNetwork, steps: Sequence[dict[str, Any]], found: Sequence[Prediction], **rest: Any
    ) -> PlanRow:
        prediction = max(found, key=lambda p: p.total_bytes)
        largest = None
        if budget is not None:
            # Parameters and what belongs to them stay as they are, the rest grows with the batch.
            fixed = sum(prediction.breakdown[label] for label in ("parameters", "optimizer", "gradients"))

            def total_bytes(count: int) -> int:
                try:
                    with warnings.catch_warnings():  # what does not fit at another size is not told
                        warnings.simplefilter("ignore")
                        return max(predicted(net, step, count).total_bytes for step in steps)
                except ValueError:
                    if count > 1:
                        raise
                    return total_bytes(2)  # BatchNorm over vectors asks for two

            largest = _largest_batch(
                total_bytes,
                budget,
                points={0: fixed + sum(p.nbytes for p in net.auxiliary.parameters()), size: prediction.total_bytes},
            )
        return PlanRow(
            method=method,
            modules=net.num_modules,
            total_bytes=prediction.total_bytes,
            breakdown=prediction.breakdown,
            largest_batch=largest,
            fits=budget is None or prediction.total_bytes <= budget,
            **rest,
        )

    plain_step: dict[str, Any] = {"step": "plain"}
    segments = _likely_segments(whole)
    pieces, done = 2 + len(segments) + 2 * len(nets), 0

    def told() -> None:
        nonlocal done
        done += 1
        if progress is not None:
            progress(min(1.0, done / pieces))

    plain = predicted(whole, plain_step)
    rows = [row("end-to-end", whole, [plain_step], [plain], flops_ratio=1.0)]
    told()
    checkpointed: dict[str, Any] = {"step": "guided", "auxiliary": "frozen"}
    found = {}
    for s in segments:
        found[s] = predicted(whole, checkpointed | {"recompute": s})
        told()
    if found:
        best = min(found, key=lambda s: found[s].total_bytes)
        steps, flops = [checkpointed | {"recompute": best}], found[best].flops / plain.flops
        rows.append(row("checkpointing", whole, steps, [found[best]], flops_ratio=flops, note=f"{best} segments"))
    exact = {"step": "guided", "memory": "exact"}
    least = predicted(whole, exact)
    note = recomputation(whole, "exact")
    rows.append(
        row("checkpointing, searched", whole, [exact], [least], flops_ratio=least.flops / plain.flops, note=note)
    )
    told()
    for net in nets.values():
        steps = [{"step": "local"}, {"step": "guided", "memory": "local"}]
        local, guided = (predicted(net, step) for step in steps)
        rows.append(row("local", net, steps[:1], [local], flops_ratio=local.flops / plain.flops))
        told()
        mean = (1 - guided_share) * local.flops + guided_share * guided.flops
        note = recomputation(net, "local")
        rows.append(row("pgl", net, steps, [local, guided], flops_ratio=mean / plain.flops, note=note))
        told()
    return _recommend(rows, budget, size)


def _likely_segments(net: DecoupledNetwork) -> list[int]:
    """The numbers of segments whose peak is likely the smallest, by the bytes that units keep and hand on."""
    units = net.partition.units
    estimates = {}
    for count in range(2, len(units) + 1):
        if count <= 2 * math.isqrt(len(units)) + 2:
            segments = net.recompute_segments(count)
            kept = max(sum(units[i].activation_bytes for i in segment) for segment in segments)
            estimates[count] = kept + sum(4 * math.prod(units[segment[-1]].output_shape) for segment in segments[:-1])
    return sorted(sorted(estimates, key=estimates.__getitem__)[:_MOST_SEGMENTS])


def _resized(target: Any, before: int, after: int) -> Any:
    """A batch or target for another number of examples, all of which are the first."""
    return tree_map_only(Tensor, lambda t: t[:1].expand(after, *t.shape[1:]) if t.shape[:1] == (before,) else t, target)


def _largest_batch(total_bytes: Callable[[int], int], budget: int, points: dict[int, int]) -> int:
    """The largest batch that is predicted to fit, 0 where none does.

    Args:
        total_bytes: predicted peak by batch size.
        budget: in bytes.
        points: what is known: an estimate for a batch of 0, and the peak for another.
    """
    points = dict(points)
    if points[0] >= budget:  # an estimate
        points = {0: 0, 1: total_bytes(1), **{n: size for n, size in points.items() if n}}
    for _ in range(_MOST_TRIALS):
        fitting = max((n for n, size in points.items() if size <= budget), default=0)
        failing = min((n for n, size in points.items() if size > budget), default=None)
        if (failing is not None and failing <= fitting + 1) or (fitting and points[fitting] >= 0.98 * budget):
            break
        # Peaks lie on a straight line, nearly: through the nearest points around the budget, or the last two below.
        other = failing if failing is not None else max(n for n in points if n != fitting)
        slope = (points[other] - points[fitting]) / (other - fitting)
        guess = fitting + math.floor((budget - points[fitting]) / max(slope, 1.0))
        guess = max(guess, fitting + 1) if failing is None else min(max(guess, fitting + 1), failing - 1)
        points[guess] = total_bytes(guess)
    return max((n for n, size in points.items() if n and size <= budget), default=0)


def _recommend(rows: Sequence[PlanRow], budget: int | None, batch_size: int) -> MemoryPlan:
    fitting = [row for row in rows if row.fits]
    smallest = min(rows, key=lambda row: row.total_bytes)
    if budget is None:
        chosen = smallest
        text = f"The least is {_size(smallest.total_bytes)}, by {_name(smallest)}."
    elif not fitting:
        chosen = smallest
        label, size = max(smallest.breakdown.items(), key=lambda item: item[1])
        advice = "no batch size would fit"
        if smallest.largest_batch:
            advice = f"batches of {smallest.largest_batch} would fit, whose gradients can be accumulated"
        text = (
            f"Nothing fits into {_size(budget)} at batch size {batch_size}: the least is "
            f"{_size(smallest.total_bytes)}, by {_name(smallest)}, of which {_size(size)} are {label}; {advice}."
        )
    else:
        # Where ordinary training fits, with checkpointing or without, nothing is gained by cutting.
        order = ("end-to-end", "checkpointing", "checkpointing, searched", "pgl", "local")
        chosen = min(fitting, key=lambda row: (order.index(row.method), row.flops_ratio))
        reason = {
            "end-to-end": "ordinary training fits, and nothing has to be recomputed or cut",
            "checkpointing": "gradient checkpointing fits, and gives the results of ordinary training",
            "checkpointing, searched": "with every step guided and memory='exact', ordinary training fits, bit for bit",
            "pgl": "of what fits and keeps a share of the steps guided it costs least",
            "local": "of what fits it costs least",
        }[chosen.method]
        text = (
            f"Use {_name(chosen)}: {reason} ({_size(chosen.total_bytes)} of {_size(budget)}, "
            f"{chosen.flops_ratio:.2f} × the FLOPs of end-to-end training)."
        )
        cheaper = [row for row in fitting if row.method == "pgl" and row.flops_ratio < chosen.flops_ratio]
        if cheaper:
            other = min(cheaper, key=lambda row: row.flops_ratio)
            text += f" {_name(other)} fits too, at {other.flops_ratio:.2f} ×, but may cost accuracy."
    return MemoryPlan(
        rows=tuple(rows),
        budget=budget,
        batch_size=batch_size,
        modules=chosen.modules,
        method=chosen.method,
        recommendation=text,
    )


def _name(row: PlanRow) -> str:
    return f"{row.method} with K={row.modules}" if row.method in ("local", "pgl") else row.method


def _size(num_bytes: int) -> str:
    if num_bytes < 2**20:
        return f"{num_bytes / 2**10:.1f} KiB"
    return f"{num_bytes / 2**30:.2f} GiB" if num_bytes >= 2**30 else f"{num_bytes / 2**20:.1f} MiB"
