"""The configuration of a training run: frozen dataclasses that refuse, in one sentence, a value that cannot work."""

import contextlib
import dataclasses
import inspect
import json
import math
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

from torchlocal.guidance import Guidance, make_guidance
from torchlocal.run.folder import expand
from torchlocal.sizes import check_plain, parse_size

if TYPE_CHECKING:
    from torchlocal.rules import Rule

__all__ = [
    "MOST_STEPS",
    "FitConfig",
    "GuidanceConfig",
    "build_guidance",
    "build_rule",
    "config_from_dict",
    "config_to_dict",
    "guided_memory",
    "guided_options",
]

_SCHEDULES = ("cosine", "step", "constant")
# The options of each schedule; never and always take none, and leave those of the schedule that they stand in for.
_OPTIONS = {
    "periodic": ("period", "length", "start", "unit"),
    "phased": ("share", "periods"),
    "random": ("share",),
    "annealed": ("share", "end_share"),
}
MOST_STEPS = 100_000_000
_LARGEST = 2**40  # of whole numbers; torch has 64 bits for what is made of several
_NUMBER = 1e38  # which a float32 holds
_PRECISIONS = ("auto", "fp32", "bf16", "fp16")
_RULES = ("greedy", "dgl", "predsim", "infopro", "auglocal", "man")  # those of `rules.RULES`, which loads torch


@dataclass(frozen=True, kw_only=True)
class GuidanceConfig:
    """Which steps are guided, and what the auxiliary networks do in them.

    What is left out has the default of the schedule, given in brackets.

    Args:
        name: "never" (local learning), "always" (end-to-end), "phased" or "periodic" (PGL), "random" or "annealed";
            None: "periodic" if a period, length, start or unit is given, else "phased".
        period: periodic: one guided phase per so many steps or epochs [5].
        length: periodic: length of the guided phase, in the same unit [1].
        start: periodic: where the first period begins [0].
        unit: periodic: "steps" or "epochs" ["steps"].
        share: phased, random: share of guided steps [0.2]; annealed: share at the start of training [0.4].
        end_share: annealed: share at the end of training [0].
        periods: phased: number of periods, each of which ends with a guided phase [1].
        auxiliary: "follow": in a guided step the auxiliary networks go on learning; "frozen": they stand still.
    """

    name: str | None = None
    period: int | None = None
    length: int | None = None
    start: int | None = None
    unit: str | None = None
    share: float | None = None
    end_share: float | None = None
    periods: int | None = None
    auxiliary: str = "follow"

    def __post_init__(self) -> None:
        _check_choice("guidance.auxiliary", self.auxiliary, ("follow", "frozen"))
        if self.name is None:
            periodic = any(value is not None for value in (self.period, self.length, self.start, self.unit))
            object.__setattr__(self, "name", "periodic" if periodic else "phased")
        for option in dict.fromkeys(option for taken in _OPTIONS.values() for option in taken):
            value, names = getattr(self, option), [name for name, taken in _OPTIONS.items() if option in taken]
            if value is not None and self.name in _OPTIONS and self.name not in names:
                raise ValueError(
                    f"guidance.{option}={value!r} means nothing to guidance.name={self.name!r}: leave it out, or give "
                    f"guidance.name={' or '.join(names)}"
                )
        try:
            _make_guidance(self, seed=0)
        except ValueError as error:
            told = str(error).replace("guidance: ", "name: ", 1).replace("start_share: ", "share: ", 1)
            raise ValueError(f"guidance.{told}") from error


@dataclass(frozen=True, kw_only=True)
class FitConfig:
    """Everything that decides a training run.

    Args:
        out: folder of the run.
        model: name of the backbone: "resnet20", "torchvision:resnet18", "timm:vit_tiny_patch16_224", ...
        modules: number of local modules, "all" for one per unit, or "fewest" for as few as take no more memory.
        cuts: names of the units to cut after, instead of the balanced grouping.
        rule: local rule: "greedy", "dgl", "predsim", "infopro", "auglocal" or "man".
        auxiliary: auxiliary network of "greedy", "dgl" or the task's branch of "infopro": "linear", "conv" or
            "mlp_sr"; None: the rule's own.
        rule_options: options of the local rule by name, such as {"depth": 3} for "auglocal" (see docs/rules.md).
        label_smoothing: label smoothing of every loss, in [0, 1).
        guidance: which steps are guided.
        memory: what a guided step may take: "local": no more than a local step (recomputes, and cuts the batch into
            micro-batches where it takes that); "exact": the least without micro-batches; "full": whatever it takes; or
            a size such as "8GiB". None: "local", but "full" with guidance "always".
        recompute: instead of memory: guided steps keep only the inputs of segments: "modules", or a number of segments.
        data: name of the data set.
        data_root: folder of the data set's files.
        num_train: use only the first so many training images.
        num_validation: number of validation images; None: a tenth of the training images.
        augment: augment the training images as the literature does for the data set.
        image_size: side in pixels that the images of data="folder" are brought to; None: 224.
        num_workers: processes that read data="folder"; None: as many as there are cores, up to a few.
        epochs: passes over the training images.
        steps: number of optimizer steps, instead of epochs.
        batch_size: images in a batch of the loader.
        accumulate: loader batches per optimizer step; guidance is asked once per optimizer step.
        optimizer: "sgd" (with Nesterov momentum), "adamw", or the name of a class in torch.optim.
        lr: learning rate at the top of the schedule.
        momentum: for optimizers that have one.
        weight_decay: for optimizers that have one.
        schedule: of the learning rate: "cosine" (falls to zero), "step" (times gamma at each milestone) or "constant".
        decay: cosine: share of training, at its end, over which it falls; before that it stays at lr. None: all of it,
            or with phased guidance each guided phase.
        warmup_epochs: epochs over which the learning rate rises linearly.
        milestones: epochs of the "step" schedule, increasing.
        gamma: factor of the "step" schedule.
        clip: largest norm of the gradient of each loss; None: not clipped.
        device: "auto", "cpu", "cuda", "cuda:1", "mps".
        precision: "fp32", "bf16", "fp16", or "auto": bf16 where the device has it in hardware.
        replicas: data-parallel copies among the ranks that torchrun started; each takes an equal part of every batch.
        channels_last: memory layout of the images; None: where bf16 is used.
        compile: compile the network with torch.compile.
        seed: seed of weights, data order, augmentation, dropout and random guidance.
        num_threads: CPU threads; None: torch's own choice.
        log_every: steps between two readings of the losses.
        checkpoint_every: steps between two checkpoints, beside the one at the end of each epoch.
        tensorboard: write TensorBoard events.
    """

    out: str = "runs/fit"
    model: str = "resnet20"
    modules: int | str = 4
    cuts: list[str] | None = None
    rule: str = "dgl"
    auxiliary: str | None = None
    rule_options: dict[str, Any] = field(default_factory=dict)
    label_smoothing: float = 0.0
    guidance: GuidanceConfig = field(default_factory=GuidanceConfig)
    memory: int | str | None = None
    recompute: int | str | None = None
    data: str = "fashion-mnist-small"
    data_root: str | None = None
    num_train: int | None = None
    num_validation: int | None = None
    augment: bool = True
    image_size: int | None = None
    num_workers: int | None = None
    epochs: int = 10
    steps: int | None = None
    batch_size: int = 128
    accumulate: int = 1
    optimizer: str = "sgd"
    lr: float = 0.1
    momentum: float = 0.9
    weight_decay: float = 1e-4
    schedule: str = "cosine"
    decay: float | None = None
    warmup_epochs: float = 0.0
    milestones: list[float] = field(default_factory=list)
    gamma: float = 0.1
    clip: float | None = None
    device: str = "auto"
    precision: str = "auto"
    replicas: int = 1
    channels_last: bool | None = None
    compile: bool = False
    seed: int = 0
    num_threads: int | None = None
    log_every: int = 10
    checkpoint_every: int | None = None
    tensorboard: bool = True

    def __post_init__(self) -> None:
        for name in ("out", "model", "rule", "auxiliary", "data", "optimizer", "device"):
            value = getattr(self, name)
            if name == "auxiliary" and value is None:
                continue
            if not isinstance(value, str) or not value:
                raise ValueError(f"{name}={value!r} must be a string that is not empty")
        expand(self.out)  # refuses the home folder of nobody
        if self.data_root is not None:
            if not isinstance(self.data_root, str) or not self.data_root:
                raise ValueError(f"data_root={self.data_root!r} must be the name of a folder, or None")
            expand(self.data_root)
        for name in ("epochs", "batch_size", "accumulate", "log_every", "replicas"):
            _check_whole(name, getattr(self, name), 1)
        _check_whole("seed", self.seed, 0)
        if self.seed >= 2**32:
            raise ValueError(f"seed={self.seed} must be below 2**32")
        for name in ("steps", "num_train", "num_validation", "checkpoint_every", "num_threads", "image_size"):
            _check_whole(name, getattr(self, name), 1, optional=True)
        _check_whole("num_workers", self.num_workers, 0, optional=True)
        for name, most in (("steps", MOST_STEPS), ("num_threads", 4096), ("num_workers", 1024)):
            value = getattr(self, name)
            if value is not None and value > most:
                raise ValueError(f"{name}={value} is more than {most:,}: make it smaller")
        for name in ("augment", "compile", "tensorboard"):
            _check_choice(name, getattr(self, name), (True, False))
        _check_choice("channels_last", self.channels_last, (None, True, False))
        _check_choice("schedule", self.schedule, _SCHEDULES)
        _check_choice("precision", self.precision, _PRECISIONS)
        if self.modules not in ("all", "fewest"):
            _check_whole("modules", self.modules, 1, other=', "all" or "fewest"')
        if self.recompute not in (None, "modules"):
            _check_whole("recompute", self.recompute, 1, other=' (segments), "modules" or None')
        if self.memory is not None:
            if self.recompute is not None:
                raise ValueError(f"memory={self.memory!r} and recompute={self.recompute!r}: give one of them, not both")
            _memory(self.memory)
        if self.cuts is not None and (
            not isinstance(self.cuts, list | tuple) or not all(isinstance(cut, str) for cut in self.cuts)
        ):
            raise ValueError(f"cuts={self.cuts!r} must be a list of names of submodules, or None")
        _check_number("lr", self.lr, 0, math.inf, "a number above 0", open_low=True)
        _check_number("momentum", self.momentum, 0, 1, "a number of at least 0 and below 1")
        _check_number("weight_decay", self.weight_decay, 0, math.inf, "a number of at least 0")
        _check_number("label_smoothing", self.label_smoothing, 0, 1, "a number of at least 0 and below 1")
        _check_number("warmup_epochs", self.warmup_epochs, 0, math.inf, "a number of at least 0")
        _check_number("gamma", self.gamma, 0, math.inf, "a number above 0", open_low=True)
        if self.clip is not None:
            _check_number("clip", self.clip, 0, math.inf, "a number above 0, or None", open_low=True)
        for name in ("lr", "weight_decay", "gamma", "clip"):
            value = getattr(self, name)
            if value is not None and value > _NUMBER:
                raise ValueError(f"{name}={value!r} is more than a float32 holds: make it smaller")
        self._check_schedule()
        _check_rule(self)
        if self.auxiliary is not None or self.rule_options:  # a rule with its defaults has nothing to refuse
            build_rule(self)
        if not isinstance(self.guidance, GuidanceConfig):
            raise ValueError(f"guidance={self.guidance!r} must be a GuidanceConfig, such as GuidanceConfig(period=10)")

    def _check_schedule(self) -> None:
        if self.decay is not None:
            _check_number(
                "decay", self.decay, 0, math.nextafter(1, 2), "a number above 0 and at most 1, or None", open_low=True
            )
            if self.schedule != "cosine":
                raise ValueError(
                    f"decay={self.decay} means nothing to schedule={self.schedule!r}: leave it out, or give "
                    'schedule="cosine"'
                )
        if not isinstance(self.milestones, list | tuple):
            raise ValueError(f"milestones={self.milestones!r} must be a list of epochs, such as [5, 8]")
        for milestone in self.milestones:
            _check_number("milestones", milestone, 0, math.inf, "a list of epochs above 0", open_low=True)
        if any(a >= b for a, b in zip(self.milestones, self.milestones[1:], strict=False)):
            raise ValueError(f"milestones={self.milestones!r} must increase, such as [5, 8]")
        if (self.schedule == "step") != bool(self.milestones):
            raise ValueError(
                f'milestones={self.milestones!r} and schedule={self.schedule!r} do not fit: give schedule="step" with '
                "at least one milestone, and another schedule without milestones"
            )
        if self.steps is None and self.warmup_epochs >= self.epochs:
            raise ValueError(
                f"warmup_epochs={self.warmup_epochs} leaves nothing of epochs={self.epochs}: "
                "make it smaller than epochs"
            )


def build_guidance(config: FitConfig) -> Guidance:
    """Make the guidance of a run, not yet bound to its number of steps."""
    return _make_guidance(config.guidance, seed=config.seed)


def guided_options(config: FitConfig) -> dict[str, Any]:
    """The options of the guided steps of a run."""
    return {"auxiliary": config.guidance.auxiliary, **guided_memory(config)}


def guided_memory(config: FitConfig) -> dict[str, int | str | None]:
    """The options `memory` and `recompute` of the guided steps of a run."""
    if config.recompute is not None:
        return {"recompute": config.recompute}
    if config.memory is None:
        return {"memory": "full" if config.guidance.name == "always" else "local"}
    return {"memory": _memory(config.memory)}


def build_rule(config: FitConfig) -> "Rule":
    """Make the local rule of a run, with its auxiliary network."""
    from torchlocal.rules import RULES, make_rule

    given = config.rule_options
    options: dict[str, Any] = {}
    takes = inspect.signature(RULES[config.rule]).parameters
    if config.auxiliary is not None:
        if "auxiliary" not in takes:
            raise ValueError(f"auxiliary={config.auxiliary!r} means nothing to rule={config.rule!r}: leave it out")
        options["auxiliary"] = config.auxiliary
    published = {"published": [config.data, config.model]}
    if "published" in takes:
        options |= published
    base = given.get("base")
    if "base_options" in takes and base in tuple(RULES) and "published" in inspect.signature(RULES[base]).parameters:
        base_options = given.get("base_options") or {}
        if isinstance(base_options, dict):
            given = given | {"base_options": published | base_options}
    try:
        return make_rule(config.rule, options | given)
    except ValueError as error:
        known = str(error).partition(":")[0] in given
        raise ValueError(f"rule_options.{error}" if known else str(error)) from error


def _check_rule(config: FitConfig) -> None:
    if config.rule not in _RULES:
        raise ValueError(f"rule={config.rule!r} is unknown: give one of {', '.join(_RULES)}")
    given = config.rule_options
    if not isinstance(given, dict) or not all(isinstance(name, str) for name in given):
        raise ValueError(f"rule_options={given!r} must be `name: value` pairs, such as {{'depth': 3}}")
    try:
        check_plain("rule_options", given)
    except ValueError as error:
        raise ValueError(f"{error}; a rule of your own is given to torchlocal.decouple") from error


def config_to_dict(config: FitConfig) -> dict[str, Any]:
    """Return the configuration as plain values, as config.yaml, result.json and the checkpoints hold it."""
    plain: dict[str, Any] = json.loads(json.dumps(dataclasses.asdict(config)))  # tuples become lists
    return plain


def config_from_dict(values: dict[str, Any]) -> FitConfig:
    """Make the configuration from plain values.

    Raises:
        ValueError: if a field is unknown or a value cannot work.
    """
    values = dict(values)
    guidance = values.pop("guidance", {})
    if not isinstance(guidance, dict):
        raise ValueError(f"guidance={guidance!r} must be `name: value` pairs, such as {{'period': 10}}")
    for given, kind, prefix in ((values, FitConfig, ""), (guidance, GuidanceConfig, "guidance.")):
        unknown = sorted(set(given) - {f.name for f in dataclasses.fields(kind)})
        if unknown:
            raise ValueError(f"the configuration has unknown fields: {', '.join(prefix + name for name in unknown)}")
    return FitConfig(guidance=GuidanceConfig(**guidance), **values)


def _make_guidance(config: GuidanceConfig, *, seed: int) -> Guidance:
    given = {name: value for name, value in dataclasses.asdict(config).items() if value is not None}
    name = given.pop("name")
    del given["auxiliary"]
    if name in ("never", "always"):
        given = {}
    elif name == "random":
        given["seed"] = seed
    elif name == "annealed" and "share" in given:
        given["start_share"] = given.pop("share")
    return make_guidance(name, **given)


def _memory(value: object) -> int | str:
    """A memory mode, or the bytes of a size."""
    if value in ("local", "exact", "full"):
        return str(value)
    with contextlib.suppress(ValueError):
        if isinstance(value, int | str) and not isinstance(value, bool):
            return parse_size(str(value))
    raise ValueError(f'memory={value!r} is unknown: give "local", "exact", "full" or a size such as "8GiB"')


def _check_choice(name: str, value: object, choices: tuple[object, ...]) -> None:
    if not any(value is choice or (isinstance(value, str) and value == choice) for choice in choices):
        *others, last = map(repr, choices)
        raise ValueError(f"{name}={value!r} is unknown: give {', '.join(others)} or {last}")


def _check_whole(name: str, value: object, least: int, *, optional: bool = False, other: str = "") -> None:
    if optional and value is None:
        return
    if isinstance(value, bool) or not isinstance(value, int) or value < least:
        other = other or (" or None" if optional else "")
        raise ValueError(f"{name}={value!r} must be a whole number of at least {least}{other}")
    if value > _LARGEST:
        raise ValueError(f"{name}={value} is larger than anything that could be counted: make it smaller")


def _check_number(name: str, value: object, low: float, high: float, what: str, *, open_low: bool = False) -> None:
    """Refuse what is not a finite number in [low, high), or (low, high) with open_low."""
    is_number = isinstance(value, int | float) and not isinstance(value, bool)
    if not is_number or not (low <= value < high) or (open_low and value == low):  # type: ignore[operator]
        raise ValueError(f"{name}={value!r} must be {what}")
