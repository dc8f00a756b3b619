"""The parts of a run: its device, data, network, optimizer and learning rate, and one training step."""

import contextlib
import dataclasses
import inspect
import platform
import re
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_map_only

from torchlocal.data import DataBundle, LoaderBundle
from torchlocal.data.images import send
from torchlocal.graphs import CapturedStep, capture
from torchlocal.guidance import Guidance, cosine_factor
from torchlocal.micro import divisor
from torchlocal.network import DecoupledNetwork, decouple
from torchlocal.parallel.network import ParallelNetwork
from torchlocal.parallel.setup import distribute, round_boundaries
from torchlocal.parallel.team import Elsewhere, RemoteSplit, ShareOfSplit, Team
from torchlocal.run.config import MOST_STEPS, FitConfig, build_guidance, build_rule, guided_options
from torchlocal.run.own import Own

__all__ = [
    "CapturedSteps",
    "Execution",
    "build_network",
    "build_optimizer",
    "count_steps",
    "learning_rate",
    "load_shared_data",
    "make_optimizer",
    "resolve_execution",
    "share_out",
    "train_step",
]

_NAMED = Own()
_UNFIT_OPTIMIZERS = (torch.optim.Optimizer, torch.optim.LBFGS, torch.optim.SparseAdam)  # another step, other gradients


@dataclass(frozen=True, kw_only=True)
class Execution:
    """Where and in which precision a step runs; made by `resolve_execution`."""

    device: torch.device
    precision: str
    channels_last: bool

    @property
    def autocast(self) -> torch.dtype | None:
        """What the step computes in, beside float32."""
        return {"fp32": None, "bf16": torch.bfloat16, "fp16": torch.float16}[self.precision]

    @property
    def hardware(self) -> str:
        """What the device calls itself; of a CPU also the number of threads."""
        if self.device.type == "cuda":
            return torch.cuda.get_device_name(self.device)
        return f"{_processor()}, {torch.get_num_threads()} threads" if self.device.type == "cpu" else self.device.type

    def make_scaler(self) -> torch.amp.GradScaler | None:
        """Return the GradScaler that fp16 needs."""
        return torch.amp.GradScaler(self.device.type) if self.precision == "fp16" else None

    def place(self, batch: Any) -> Any:
        """Move a batch, or its target, to the device, images in its memory layout; what another rank reads is None."""

        def placed(tensor: Tensor) -> Tensor:
            images = self.channels_last and tensor.ndim == 4 and tensor.is_floating_point()
            layout = torch.channels_last if images else torch.preserve_format
            return send(tensor, self.device).to(memory_format=layout)

        return tree_map_only(Tensor, placed, batch)


def resolve_execution(config: FitConfig) -> Execution:
    """Choose the device, the precision and the memory layout that the configuration leaves open.

    Raises:
        ValueError: if the device does not exist here, or cannot compute in the precision.
    """
    try:
        device = torch.device(_best_device() if config.run.device == "auto" else config.run.device)
        torch.empty(0, device=device)
    except (RuntimeError, AssertionError) as error:
        raise ValueError(f'device={config.run.device!r} is not available here: give "auto" or "cpu"') from error
    precision = config.run.precision
    if precision == "auto":
        precision = "bf16" if _has_fast_bf16(device) else "fp32"
    if precision != "fp32" and not torch.amp.is_autocast_available(device.type):
        raise ValueError(f'precision={precision!r} does not exist on {device}: give "fp32" or "auto"')
    channels_last = precision == "bf16" if config.run.channels_last is None else config.run.channels_last
    return Execution(device=device, precision=precision, channels_last=channels_last)


def load_shared_data(config: FitConfig, own: Own, team: Team, device: torch.device) -> DataBundle:
    """Load the data where they are read; the other ranks only learn how many there are, and of what shape."""
    if not team.parallel:
        return own.load(config).to(device)
    if isinstance(own.bundle, LoaderBundle):
        raise ValueError(
            "data: loaders of your own are read by one process: train on a single rank, or hand in what "
            "torchlocal.data.load_data returns"
        )
    if config.optimisation.batch_size % team.replicas:
        raise ValueError(
            f"batch_size={config.optimisation.batch_size} cannot be shared by replicas={config.run.replicas}: make it "
            "a multiple"
        )
    loaded: DataBundle | None = None

    def load() -> DataBundle:
        nonlocal loaded
        loaded = own.load(config)
        splits: Any = {name: RemoteSplit(len(getattr(loaded, name))) for name in ("train", "validation", "test")}
        return dataclasses.replace(loaded, **splits)

    told: DataBundle = team.at_reader(load)
    if loaded is None and team.reads:  # the first stage of another replica
        loaded = own.load(config)
    if loaded is None:
        return told
    loaded = loaded.to(device)
    share: Any = ShareOfSplit(loaded.train, team.replica, team.replicas)
    return dataclasses.replace(loaded, train=share)


def share_out(
    net: DecoupledNetwork, config: FitConfig, data: DataBundle, execution: Execution, team: Team
) -> ParallelNetwork:
    """Share the local modules out to the ranks, balanced by the time that they take on the first batch, or as given."""
    if execution.precision == "fp16":
        raise ValueError(
            'precision="fp16" needs one scale for all modules, so not several ranks: give "bf16" or "fp32"'
        )
    if config.run.balance == "epoch":
        if execution.device.type != "cpu":
            raise ValueError(
                'balance="epoch" goes by the clock of the host, which does not tell how long '
                f'{execution.device.type} computes: give "start"'
            )
        if config.run.compile:
            raise ValueError(
                'balance="epoch" moves modules, and compiled ones cannot move: give "start" or leave compile out'
            )
    _check_devices(execution, team)
    sample = None
    if team.rank == 0:
        sample = execution.place(
            next(data.train.batches(config.optimisation.batch_size, train=True, seed=config.run.seed))
        )
    _check_stages(config, net, team.num_stages)
    net.boundaries = {}  # what one process rounds, ranks send
    return distribute(
        net,
        replicas=team.replicas,
        assignment=config.run.stages or "time",
        sample=sample,
        autocast=execution.autocast,
        boundary=config.run.boundary,
        link=config.run.link,
        timeout=team.timeout,
    )


def _check_devices(execution: Execution, team: Team) -> None:
    """Refuse devices that ranks cannot send from: neither CPU nor CUDA, or one GPU for several, which NCCL refuses."""
    if execution.device.type == "cpu":
        return
    if execution.device.type != "cuda":
        told = "ranks send to each other from a CPU or from GPUs of CUDA only"
    else:
        found = team.gather(str(torch.cuda.get_device_properties(execution.device).uuid))
        if len(set(found)) == len(found):
            return
        told = (
            f"{len(found)} ranks have {len(set(found))} GPUs between them, and each needs one of its own; start as "
            'many ranks as there are GPUs, with device="cuda"'
        )
    told = f'device="{execution.device}": {told}: give device="cpu", or train on a single rank'
    raise ValueError(told) if team.writes else Elsewhere(told)


def _check_stages(config: FitConfig, net: DecoupledNetwork, count: int) -> None:
    stages = config.run.stages
    if stages is not None and (len(stages) != count or sum(stages) != net.num_modules):
        raise ValueError(
            f"stages={stages!r} does not give {net.num_modules} local modules to {count} stages: give {count} numbers "
            f"that add up to {net.num_modules}"
        )


def build_network(config: FitConfig, data: DataBundle, execution: Execution, own: Own = _NAMED) -> DecoupledNetwork:
    """Build and cut the network of a run, on its device.

    The seed decides the weights: torch's global generators are set to it. The backbone's are drawn first, so that they
    are the same whatever its modules and auxiliary networks are.
    """
    torch.manual_seed(config.run.seed)
    model = own.make_model(config, data)
    anchor = next(model.parameters(), torch.empty(0))
    net = decouple(
        model,
        modules=config.cut.modules if config.cut.after is None else None,
        cuts=config.cut.after,
        sample=tree_map_only(
            Tensor, lambda tensor: tensor.to(anchor.device), data.sample(config.optimisation.batch_size)
        ),
        rule=build_rule(config),
        criterion=own.make_criterion(config, data),
        prediction=own.make_prediction(),
        optimizer=partial(make_optimizer, config),
        autocast=execution.autocast,
    )
    net.recompute_segments(config.memory.recompute)  # refuses a number of segments that it cannot be cut into
    if config.run.boundary is not None and config.run.stages is not None:
        _check_stages(config, net, len(config.run.stages))
        round_boundaries(net, config.run.boundary, assignment=config.run.stages)
    layout = torch.channels_last if execution.channels_last else torch.preserve_format
    return net.to(execution.device, memory_format=layout)  # type: ignore[call-overload]


def build_optimizer(config: FitConfig, net: nn.Module | ParallelNetwork) -> torch.optim.Optimizer:
    """Build the optimizer of a run over all parameters (of this rank), those of the auxiliary networks among them.

    They are one group, or where the configuration tells them apart, four, some of which may be empty: of the backbone
    and of the auxiliary networks those that decay and those that do not (see :func:`_groups`).
    """
    return make_optimizer(config, _groups(config, net))


def make_optimizer(config: FitConfig, parameters: Iterable[Any]) -> torch.optim.Optimizer:
    """Make the optimizer that the configuration asks for.

    Raises:
        ValueError: if torch.optim has no such optimizer, or it does not take the configuration's values.
    """
    chosen = config.optimisation
    options: dict[str, Any] = {"lr": chosen.lr}
    if chosen.optimizer == "sgd":
        kind: type[torch.optim.Optimizer] = torch.optim.SGD
        options |= {"nesterov": chosen.momentum > 0}
    elif chosen.optimizer == "adamw":
        kind = torch.optim.AdamW
    else:
        kind = getattr(torch.optim, chosen.optimizer, torch.optim.Optimizer)
        if not (isinstance(kind, type) and issubclass(kind, torch.optim.Optimizer)) or kind in _UNFIT_OPTIMIZERS:
            names = [name for name in sorted(vars(torch.optim)) if _is_optimizer(name)]
            raise ValueError(f'optimizer={chosen.optimizer!r} cannot be used: give "sgd", "adamw", {", ".join(names)}')
    arguments = inspect.signature(kind).parameters
    options |= {name: getattr(chosen, name) for name in ("momentum", "weight_decay") if name in arguments}
    if chosen.betas is not None:
        if "betas" not in arguments:
            raise ValueError(f"betas={chosen.betas!r} are unknown to optimizer={chosen.optimizer!r}: leave them out")
        options["betas"] = tuple(chosen.betas)
    for name in ("weight_decay", "auxiliary_weight_decay"):
        if getattr(chosen, name) and "weight_decay" not in arguments:
            raise ValueError(
                f"{name}={getattr(chosen, name)} is unknown to optimizer={chosen.optimizer!r}: give {name}=0"
            )
    try:
        return kind(parameters, **options)
    except (TypeError, ValueError) as error:
        given = ", ".join(f"{name}={value}" for name, value in options.items())
        raise ValueError(
            f"optimizer={chosen.optimizer!r} does not take this network with {given} ({error}): change these, or "
            "choose another optimizer"
        ) from error


def _groups(config: FitConfig, net: nn.Module | ParallelNetwork) -> Iterable[Any]:
    """The parameters, or groups of them, each in the network's order, so that those of several ranks can be joined.

    Matrices decay. Vectors (norms, biases, a temperature) do not, nor does what an embedding holds, which may be the
    read-out as well: its rows are moved by few batches, and decay would pull them to zero in all others.
    """
    chosen = config.optimisation
    if chosen.weight_decay_of == "all" and chosen.auxiliary_lr is None and chosen.auxiliary_weight_decay is None:
        return net.parameters()
    whole: Any = net.net if isinstance(net, ParallelNetwork) else net
    auxiliary = {id(parameter) for parameter in whole.auxiliary.parameters()}
    still: set[int] = set()
    if chosen.weight_decay_of == "matrices":
        embeddings = (m for m in whole.modules() if isinstance(m, nn.Embedding | nn.EmbeddingBag))
        still = {id(m.weight) for m in embeddings} | {id(p) for p in whole.parameters() if p.ndim < 2}
    groups: list[dict[str, Any]] = []
    other = chosen.auxiliary_weight_decay
    given = (chosen.weight_decay, chosen.weight_decay if other is None else other)
    for apart, decay in enumerate(given):
        rate = chosen.auxiliary_lr if apart and chosen.auxiliary_lr is not None else chosen.lr
        for decaying in (True, False):
            found = [p for p in net.parameters() if (id(p) in auxiliary) == apart and (id(p) not in still) == decaying]
            options = {"weight_decay": decay if decaying else 0.0} if any(given) else {}
            groups.append({"params": found, "lr": rate, "lr_factor": rate / chosen.lr, **options})
    return groups


def count_steps(config: FitConfig, num_images: int, what: str = "training images") -> tuple[int, int]:
    """Count the optimizer steps of an epoch and of the whole run.

    An optimizer step never spans two epochs: the batches that do not fill an accumulation are dropped, as is an
    incomplete batch.

    Raises:
        ValueError: if the images do not fill one step.
    """
    chosen = config.optimisation
    steps_per_epoch = num_images // chosen.batch_size // chosen.accumulate
    if steps_per_epoch == 0:
        accumulated = f" times accumulate={chosen.accumulate}" if chosen.accumulate > 1 else ""
        raise ValueError(
            f"batch_size={chosen.batch_size}{accumulated} is more than the {num_images} {what}: make it smaller"
        )
    num_steps = chosen.steps or chosen.epochs * steps_per_epoch
    if num_steps > MOST_STEPS:
        raise ValueError(f"epochs={chosen.epochs} make {num_steps:,} steps, more than {MOST_STEPS:,}: make it smaller")
    if chosen.warmup_steps is not None and chosen.warmup_steps >= num_steps:
        raise ValueError(f"warmup_steps={chosen.warmup_steps} leaves nothing of the {num_steps} steps: make it smaller")
    if chosen.warmup_epochs * steps_per_epoch >= num_steps:
        raise ValueError(
            f"warmup_epochs={chosen.warmup_epochs} leaves nothing of the {num_steps} steps: make it smaller than "
            f"{num_steps / steps_per_epoch:g}"
        )
    return steps_per_epoch, num_steps


def learning_rate(
    config: FitConfig, step: int, *, steps_per_epoch: int, num_steps: int, guidance: Guidance | None = None
) -> float:
    """Return the learning rate of a step (counted from 0): a function of the step alone.

    Warm-up rises linearly, ending at lr; cosine falls to 0 over the last share `decay` of training, or as guidance says
    (:meth:`Guidance.decay`). `guidance` is the configuration's, bound to this run; without it, it is made.
    """
    chosen = config.optimisation
    warmup = chosen.warmup_steps or round(chosen.warmup_epochs * steps_per_epoch)
    if chosen.schedule == "cosine":
        if chosen.decay is not None:
            decay = range(min(num_steps - round(chosen.decay * num_steps), num_steps - 1), max(num_steps, step + 1))
        else:
            guidance = guidance or build_guidance(config).bind(num_steps=num_steps, steps_per_epoch=steps_per_epoch)
            decay = guidance.decay(step, num_steps)
        return chosen.lr * cosine_factor(step, decay, warmup)
    if step < warmup:
        return chosen.lr * (step + 1) / warmup
    if chosen.schedule == "step":
        return chosen.lr * chosen.gamma ** sum(step >= milestone * steps_per_epoch for milestone in chosen.milestones)
    return chosen.lr


class CapturedSteps:
    """The steps of a run as CUDA graphs; each kind is recorded when it is first taken.

    Args:
        config: the run's.
        execution: where it runs.
        net: what is trained.

    Raises:
        ValueError: something is asked for that a graph cannot do.
    """

    def __init__(self, config: FitConfig, execution: Execution, net: DecoupledNetwork | ParallelNetwork) -> None:
        refused = {
            f"device={execution.device.type!r}, and graphs are CUDA's": execution.device.type != "cuda",
            "several ranks, whose steps wait for messages": isinstance(net, ParallelNetwork),
            "precision='fp16', whose scale changes": execution.precision == "fp16",
            f"accumulate={config.optimisation.accumulate}, since a graph overwrites gradients": (
                config.optimisation.accumulate > 1
            ),
            "compile, which has modes with graphs of its own": config.run.compile,
        }
        for why, holds in refused.items():
            if holds:
                raise ValueError(f"capture: cannot be used with {why}; leave one of the two out")
        self._found: dict[str, CapturedStep] = {}

    def take(self, step: Any, x: Any, y: Any, **options: Any) -> list[Tensor]:
        """A step; its losses and gradients are good until the next one."""
        name = step.__name__
        if name not in self._found:
            first = next(iter(self._found.values()), None)
            self._found[name] = capture(step, x, y, share=first, **options)
        return self._found[name](x, y)


def train_step(
    net: DecoupledNetwork | ParallelNetwork,
    optimizer: torch.optim.Optimizer,
    batches: Iterable[tuple[Any, Any]],
    *,
    config: FitConfig,
    execution: Execution,
    guided: bool,
    scaler: torch.amp.GradScaler | None = None,
    captured: CapturedSteps | None = None,
) -> list[Tensor]:
    """Run one optimizer step, on as many batches as are accumulated. Waits for the device with fp16 only, whose
    GradScaler has to know whether gradients are finite.

    Args:
        net: the network, in training mode.
        optimizer: over its parameters.
        batches: as many batches as are accumulated, with their targets; None where another rank reads them.
        config: the run's.
        execution: where it runs.
        guided: whether this is a guided step, or else a local one.
        scaler: for fp16.
        captured: takes the step as a CUDA graph.

    Returns:
        The mean loss of each local module as 0-dim tensors, the last being the global loss; the global loss alone in a
        guided step with frozen auxiliary networks.
    """
    chosen = config.optimisation
    options: dict[str, Any] = {"autocast": execution.autocast}
    if scaler is not None:
        options["backward"] = lambda loss: scaler.scale(loss).backward()
    if guided:
        options |= guided_options(config)
    step = net.guided_step if guided else net.local_step
    total: list[Tensor] = []
    with _enough_for_batch_norm(chosen.batch_size):
        for x, y, share in _shared(net, batches, chosen.accumulate):
            x, y, options["scale"] = execution.place(x), execution.place(y), share
            losses = step(x, y, **options) if captured is None else captured.take(step, x, y, **options)
            losses = [share * loss for loss in losses] if chosen.accumulate > 1 else losses
            total = [a + b for a, b in zip(total, losses, strict=True)] if total else losses
    if chosen.clip is not None:
        if scaler is not None:
            scaler.unscale_(optimizer)
        _clip(net, chosen.clip, guided)
    if scaler is None:
        optimizer.step()
    else:
        scaler.step(optimizer)
        scaler.update()
    optimizer.zero_grad(set_to_none=True)
    return total


def _shared(
    net: DecoupledNetwork | ParallelNetwork, batches: Iterable[tuple[Any, Any]], count: int
) -> Iterator[tuple[Any, Any, float]]:
    """The batches of one optimizer step, each with its share in the loss of all: by what the criterion divides by.

    That is known of torch's own criteria: targets that are not ignored, or the sum of class weights; under those that
    sum, each counts in full; one in which nothing counts is left out. Under any other criterion all count the same.
    """
    if count == 1:
        yield from ((x, y, 1.0) for x, y in batches)
        return
    parts = list(batches)
    whole = net if isinstance(net, DecoupledNetwork) else net.net
    found = [divisor(whole.criterion, y) for _, y in parts]
    known = torch.stack([d for d in found if d is not None]).tolist() if None not in found else []
    if len(set(known)) > 1 and isinstance(net, ParallelNetwork):
        raise ValueError(
            f"accumulate={count}: the criterion divides by other numbers in each of these batches, which ranks do not "
            "tell each other; use accumulate=1 with larger batches, or one process"
        )
    equal = 1.0 if known and not any(known) else 1 / count
    shares = [number / sum(known) for number in known] if any(known) else [equal] * len(parts)
    yield from ((x, y, share) for (x, y), share in zip(parts, shares, strict=True) if share)


def find_plan(network: DecoupledNetwork, batch: tuple[Any, Any], *, config: FitConfig, execution: Execution) -> None:
    """Search for the plan of guided steps of such batches, so that a run begins with it, and not when it is guided."""
    x, y = map(execution.place, batch)
    with _enough_for_batch_norm(config.optimisation.batch_size):
        network.guided_plan(x, y, autocast=execution.autocast, **guided_options(config))


@contextlib.contextmanager
def _enough_for_batch_norm(batch_size: int) -> Iterator[None]:
    try:
        yield
    except ValueError as error:
        if "more than 1 value per channel" not in str(error):
            raise
        raise ValueError(
            f"batch_size={batch_size} is too small for the BatchNorm layers, which need more than one value per "
            "channel: make it larger, or use accumulate with larger batches"
        ) from error


def _clip(net: DecoupledNetwork | ParallelNetwork, norm: float, guided: bool) -> None:
    """Clip the gradient of each loss by itself, so that no local module depends on another.

    In a local step that is the gradient of each local module with its auxiliary network: a norm over all of them would
    make each wait for all, and shrink the steps of one for the sake of another. In a guided step it is the gradient of
    the global loss, of the whole backbone as in ordinary training, and that of each auxiliary network.
    """
    if guided and isinstance(net, ParallelNetwork):
        net.clip_guided(norm)
        return
    if guided:
        groups = [list(net.backbone.parameters()), *(list(network.parameters()) for network in net.auxiliary)]
    else:
        groups = net.module_parameters()
    for parameters in groups:
        nn.utils.clip_grad_norm_(parameters, norm)


def _processor() -> str:
    """What the processor calls itself."""
    try:
        names = re.findall(r"^model name\s*: (.+)$", Path("/proc/cpuinfo").read_text(encoding="utf-8"), re.MULTILINE)
    except (OSError, ValueError):
        names = []
    return names[0].strip() if names else f"{platform.processor() or 'CPU'} ({platform.machine()})"


def _best_device() -> str:
    accelerator = torch.accelerator.current_accelerator(check_available=True)
    return "cpu" if accelerator is None else accelerator.type


def _has_fast_bf16(device: torch.device) -> bool:
    if device.type == "cuda":
        with torch.cuda.device(device):
            return torch.cuda.is_bf16_supported(including_emulation=False)
    if device.type == "cpu":  # either makes a ResNet's step 1.5 to 2.5 times faster than float32
        capabilities = torch.cpu.get_capabilities()
        return bool(capabilities.get("amx_bf16") or capabilities.get("avx512_bf16"))
    return False


def _is_optimizer(name: str) -> bool:
    kind = getattr(torch.optim, name)
    return isinstance(kind, type) and issubclass(kind, torch.optim.Optimizer) and kind not in _UNFIT_OPTIMIZERS
