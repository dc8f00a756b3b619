"""The configuration of a training run, in sections: every option is declared once, with its check and its help.

Each option has a short name as well, by which the command, flat recipes, variants and grids of comparisons, and errors
call it: `lr` for `optimisation.lr`. It is the option's own name, where its declaration says no other.
"""

from __future__ import annotations

import contextlib
import dataclasses
import inspect
import itertools
import json
import re
import typing
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from functools import cache, partial
from typing import TYPE_CHECKING, Any, ClassVar

from torchlocal.checks import check_plain, number, one_of, parse_link, parse_size, text, whole
from torchlocal.guidance import GUIDANCES, Guidance, make_guidance
from torchlocal.names import BOUNDARIES
from torchlocal.run.folder import expand

if TYPE_CHECKING:
    from torchlocal.rules import Rule

__all__ = [
    "MOST_STEPS",
    "CutConfig",
    "DataConfig",
    "FitConfig",
    "GuidanceConfig",
    "MemoryConfig",
    "ModelConfig",
    "OptimisationConfig",
    "Option",
    "RuleConfig",
    "RunConfig",
    "build_guidance",
    "build_rule",
    "check",
    "declared",
    "fit_options",
    "folder",
    "guided_memory",
    "guided_options",
    "option",
    "sections",
    "short_names",
]

MOST_STEPS = 100_000_000
_RULES = (
    "greedy",
    "dgl",
    "predsim",
    "infopro",
    "auglocal",
    "man",
    "solo",
    "lopt",
)  # of torchlocal.rules, which loads torch


# --- declaring options ---


@dataclass(frozen=True, kw_only=True)
class Option:
    """One option of a configuration.

    Args:
        name: short name.
        path: section and name in it, with a dot between.
        kind: type of its value.
        default: what it is by default.
        help: one sentence for people at a prompt.
        free: whether a run may be resumed with another value: where things are, and how often they are written.
        rounds: whether it changes how results are rounded.
        guided: whether guided steps alone depend on it; of the learning rate, what is compared by itself.
        common: whether all runs of a comparison have it in common.
        metavar: what stands for its value in the help.
    """

    name: str
    path: str = ""
    kind: Any = str
    default: Any = None
    help: str = ""
    free: bool = False
    rounds: bool = False
    guided: bool = False
    common: bool = False
    metavar: str = ""


def option(default: Any, told: str, checked: Callable[[str, Any], None], short: str = "", **flags: bool) -> Any:
    """A field of a configuration.

    Args:
        default: its default.
        told: one sentence for people at a prompt.
        checked: called with the short name and the value; refuses a value that cannot work.
        short: short name, if it is not the field's own.
        flags: `free`, `rounds`, `guided`, `common` of :class:`Option`.
    """
    metadata = {"help": told, "check": checked, "short": short, "flags": flags}
    if isinstance(default, list | dict):
        return field(default_factory=partial(type(default), default), metadata=metadata)
    return field(default=default, metadata=metadata)


def declared(kind: type, section: str = "") -> Iterator[Option]:
    """The options that a dataclass declares."""
    hints = typing.get_type_hints(kind)
    for one in dataclasses.fields(kind):
        if "check" in one.metadata:
            default = one.default if one.default_factory is dataclasses.MISSING else one.default_factory()
            yield Option(
                name=one.metadata["short"] or one.name,
                path=f"{section}.{one.name}" if section else one.name,
                kind=hints[one.name],
                default=default,
                help=one.metadata["help"],
                **one.metadata["flags"],
            )


def check(config: Any) -> None:
    """Check the options of a dataclass by their declarations."""
    for one in dataclasses.fields(config):
        if "check" in one.metadata:
            one.metadata["check"](one.metadata["short"] or one.name, getattr(config, one.name))


class Section:
    """A part of the configuration, whose options are checked as they are declared."""

    title: ClassVar[str]

    def __post_init__(self) -> None:
        check(self)

    def plain(self) -> dict[str, Any]:
        """As plain values."""
        return dataclasses.asdict(self)  # type: ignore[call-overload]

    def changed(self, values: Mapping[str, Any]) -> Any:
        """With other values."""
        return dataclasses.replace(self, **values)  # type: ignore[type-var]


def folder(name: str, value: Any, *, none: bool = False) -> None:
    """The name of a folder."""
    if none and value is None:
        return
    text(name, value, "the name of a folder, or None" if none else "a string that is not empty")
    expand(value)  # refuses the home folder of nobody


# --- the sections ---


def _choice(*choices: Any) -> Callable[[str, Any], None]:
    return lambda name, value: one_of(name, value, *choices)


_COUNT, _COUNT_OR_NONE, _SWITCH = partial(whole, least=1), partial(whole, least=1, none=True), _choice(True, False)
_POSITIVE = partial(number, what="a number above 0", above=0, single=True)
_FRACTION = partial(number, what="a number of at least 0 and below 1", below=1)


def _options(name: str, value: Any, *, example: str, own: str) -> None:
    if not isinstance(value, dict) or not all(isinstance(key, str) for key in value):
        raise ValueError(f"{name}={value!r} must be `name: value` pairs, such as {example}")
    try:
        check_plain(name, value)
    except ValueError as error:
        raise ValueError(f"{error}; {own}") from error


@dataclass(frozen=True, kw_only=True)
class ModelConfig(Section):
    """The network by name."""

    title: ClassVar[str] = "network"

    name: str = option(
        "resnet20",
        "Name of the backbone: resnet20, torchvision:resnet18, timm:vit_tiny_patch16_224, gpt-tiny, hf:PATH, ...",
        text,
        "model",
    )
    options: dict[str, Any] = option(
        {},
        "Options of the network as {name: value}: layers, width, heads and tied of gpt-..., pretrained of hf:PATH, "
        "config of hf:TYPE.",
        partial(_options, example="{'layers': 6}", own="a network of your own is given to torchlocal.fit"),
        "model_options",
    )


def _modules(name: str, value: Any) -> None:
    if value not in ("all", "fewest"):
        whole(name, value, 1, other=', "all" or "fewest"')


def _cuts(name: str, value: Any) -> None:
    if value is not None and (not isinstance(value, list | tuple) or not all(isinstance(cut, str) for cut in value)):
        raise ValueError(f"{name}={value!r} must be a list of names of submodules, or None")


@dataclass(frozen=True, kw_only=True)
class CutConfig(Section):
    """Where the network is cut into local modules."""

    title: ClassVar[str] = "local modules"

    modules: int | str = option(
        4, "Number of local modules, all for one per unit, or fewest for as few as take no more memory.", _modules
    )
    after: list[str] | None = option(
        None, "Names of the units to cut after, instead of the balanced grouping.", _cuts, "cuts"
    )


def _rule(name: str, value: Any) -> None:
    if value not in _RULES:
        raise ValueError(f"{name}={value!r} is unknown: give one of {', '.join(_RULES)}")


@dataclass(frozen=True, kw_only=True)
class RuleConfig(Section):
    """From what each local module learns."""

    title: ClassVar[str] = "local rule"

    name: str = option(
        "dgl",
        f"Local rule, which makes auxiliary networks and losses: {', '.join(_RULES)}.",
        _rule,
        "rule",
    )
    auxiliary: str | None = option(
        None,
        "Auxiliary network of greedy, dgl or the task's branch of infopro: linear, conv or mlp_sr; else its own.",
        partial(text, none=True),
    )
    options: dict[str, Any] = option(
        {},
        "Options of the local rule as {name: value}, for example '{depth: 3}' for auglocal.",
        partial(_options, example="{'depth': 3}", own="a rule of your own is given to torchlocal.decouple"),
        "rule_options",
    )


@dataclass(frozen=True, init=False)
class GuidanceConfig(Section):
    """Which steps are guided, and what the auxiliary networks do in them.

    Args:
        name: "never" (local learning), "always" (end-to-end), "phased" or "periodic" (PGL), "random" or "annealed";
            None: "phased", or "periodic" if an option of that alone is given.
        auxiliary: "follow": in a guided step the auxiliary networks go on learning; "match": and learn to give the
            gradient that the global loss gives; "frozen": they stand still.
        options: arguments of the schedule (see :mod:`torchlocal.guidance`); what is left out has its default. The
            share of an annealed one at the start of training is `share`, as that of the others; the seed of a random
            one is the run's.
    """

    title: ClassVar[str] = "guidance (which steps train on the global loss through all modules)"

    name: str
    auxiliary: str
    options: dict[str, Any]

    def __init__(self, name: str | None = None, *, auxiliary: str = "follow", **options: Any) -> None:
        given = {key: value for key, value in options.items() if value is not None}
        takes = _schedule_options()
        if name is None:
            name = "periodic" if any(takes.get(key, {}).keys() == {"periodic"} for key in given) else "phased"
        for key, value in (("name", name), ("auxiliary", auxiliary), ("options", given)):
            object.__setattr__(self, key, value)
        one_of("guidance.auxiliary", auxiliary, "follow", "match", "frozen")
        if unknown := [key for key in given if key not in takes]:
            raise ValueError(f"the configuration has unknown fields: guidance.{unknown[0]}")
        for key, value in given.items():
            if name in {schedule for known in takes.values() for schedule in known} and name not in takes[key]:
                raise ValueError(
                    f"guidance.{key}={value!r} means nothing to guidance.name={name!r}: leave it out, or give "
                    f"guidance.name={' or '.join(takes[key])}"
                )
        try:
            self.make(seed=0)
        except ValueError as error:
            told = str(error).replace("guidance: ", "name: ", 1).replace("start_share: ", "share: ", 1)
            raise ValueError(f"guidance.{told}") from error

    def make(self, *, seed: int) -> Guidance:
        """The schedule, not yet bound to a number of steps."""
        given = dict(self.options) if self.name not in ("never", "always") else {}  # which leave the options of others
        if self.name == "random":
            given["seed"] = seed
        if self.name == "annealed" and "share" in given:
            given["start_share"] = given.pop("share")
        return make_guidance(self.name, **given)

    def plain(self) -> dict[str, Any]:
        return {"name": self.name, "auxiliary": self.auxiliary, **self.options}

    def changed(self, values: Mapping[str, Any]) -> GuidanceConfig:
        kept = self.plain()
        if values.get("name", self.name) != self.name:  # the options of one schedule are not another's
            kept = {"auxiliary": self.auxiliary}
        return GuidanceConfig(**{**kept, **values})


@cache
def _schedule_options() -> dict[str, dict[str, tuple[Any, Any, str]]]:
    """Options of all schedules: for each the schedules that take it, with type, default and help."""
    found: dict[str, dict[str, tuple[Any, Any, str]]] = {}
    for name, kind in GUIDANCES.items():
        told = dict(re.findall(r"^ {4}(\w+): (.+(?:\n {8}.+)*)", inspect.getdoc(kind) or "", re.MULTILINE))
        hints = typing.get_type_hints(kind)
        for one in dataclasses.fields(kind):
            if one.name not in ("seed", "num_steps"):  # the run's
                key = one.name.removeprefix("start_") if one.name != "start" else one.name
                text_of = (
                    re.sub(r"\s+", " ", told[one.name]).replace("``", "").partition(";")[0].replace('"', "").rstrip(".")
                )
                found.setdefault(key, {})[name] = hints[one.name], one.default, text_of
    return found


def _guidance_options() -> Iterator[Option]:
    names = ", ".join(GUIDANCES)
    yield Option(
        name="guidance.name",
        path="guidance.name",
        kind=str | None,
        help=f"Schedule: {names}; by default phased, or periodic if an option of that alone is given.",
    )
    for key, schedules in _schedule_options().items():
        told = "; ".join(f"{name}: {text} [{default}]" for name, (_, default, text) in schedules.items())
        kind = next(iter(schedules.values()))[0]
        yield Option(name=f"guidance.{key}", path=f"guidance.{key}", kind=kind | None, help=f"{told}.")
    yield Option(
        name="guidance.auxiliary",
        path="guidance.auxiliary",
        default="follow",
        help="In guided steps auxiliary networks follow (go on learning), match (and learn to give the gradient of the "
        "global loss), or are frozen.",
    )


def _limit(name: str, value: Any) -> None:
    if value is not None:
        _memory(value)


def _recompute(name: str, value: Any) -> None:
    if value not in (None, "modules"):
        whole(name, value, 1, other=' (segments), "modules" or None')


@dataclass(frozen=True, kw_only=True)
class MemoryConfig(Section):
    """What a step may take."""

    title: ClassVar[str] = "memory"

    limit: int | str | None = option(
        None,
        "local: no more than a local step (recomputes, and cuts the batch into micro-batches where it takes that); "
        "exact: the least without micro-batches; full: whatever it takes; or a size such as 8GiB. By default local, "
        "but full with guidance always.",
        _limit,
        "memory",
        guided=True,
    )
    recompute: int | str | None = option(
        None,
        "Instead of memory: guided steps keep only the inputs of segments: modules, or a number of segments.",
        _recompute,
    )
    micro_batches: int | None = option(
        None,
        "The most micro-batches that memory local, or a size, may cut a batch into; with 1 it stays whole.",
        _COUNT_OR_NONE,
        guided=True,
    )
    scores: str = option(
        "whole",
        "Of text: the scores of the last module over all tokens are made as a whole, or chunked: a few positions at a "
        "time, as those of rule solo always are. The loss is the same up to rounding.",
        _choice("whole", "chunked"),
    )

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.limit is not None and self.recompute is not None:
            raise ValueError(f"memory={self.limit!r} and recompute={self.recompute!r}: give one of them, not both")
        if self.micro_batches is not None and (self.recompute is not None or self.limit in ("exact", "full")):
            given = "recompute" if self.limit is None else "memory"
            raise ValueError(
                f"micro_batches={self.micro_batches} means nothing to {given}={self.recompute or self.limit!r}, which "
                "leaves batches whole: leave it out, or give memory=local or a size"
            )


@dataclass(frozen=True, kw_only=True)
class DataConfig(Section):
    """The data by name."""

    title: ClassVar[str] = "data"

    name: str = option(
        "fashion-mnist-small",
        "Data set: fashion-mnist-small (shipped), digits, fashion-mnist, cifar10, cifar100, svhn, stl10, folder (class "
        "folders under --data-root), or pairs:NAME for pairs of images labelled with the sum of their classes. Text: "
        "text:stdlib (the source of Python's library), text:PATH (a file or folder), tokens:PATH.bin or dataset:PATH.",
        text,
        "data",
        common=True,
    )
    root: str | None = option(
        None,
        "Folder of the data set's files; by default ~/.cache/torchlocal, where absent ones are downloaded to.",
        partial(folder, none=True),
        "data_root",
        free=True,
        common=True,
    )
    num_train: int | None = option(
        None, "Use only the first so many training images, or rows of text.", _COUNT_OR_NONE, common=True
    )
    num_validation: int | None = option(
        None,
        "Number of validation images, by default a tenth of the training images; or of rows of text, by default all.",
        _COUNT_OR_NONE,
        common=True,
    )
    augment: bool = option(True, "Augment the training images as the literature does for the data set.", _SWITCH)
    image_size: int | None = option(
        None,
        "Side in pixels that the images of data folder are brought to; by default 224.",
        _COUNT_OR_NONE,
        common=True,
    )
    num_workers: int | None = option(
        None,
        "Processes that read data folder; by default as many as there are cores, up to a few.",
        partial(whole, most=1024, none=True),
        free=True,
    )
    context: int | None = option(
        None, "Text: tokens of a row, by default 256.", partial(_COUNT_OR_NONE, most=2**24), common=True
    )
    tokenizer: str | None = option(
        None,
        "Text: a tokenizer.json; by default byte-pair encoding of 1,024 tokens, which is shipped.",
        partial(text, none=True),
        free=True,
        common=True,
    )
    epoch_rows: int | None = option(
        None,
        "Text: rows of an epoch, after which is validated; by default all that are trained on.",
        _COUNT_OR_NONE,
        common=True,
    )


def _milestones(name: str, value: Any) -> None:
    if not isinstance(value, list | tuple):
        raise ValueError(f"{name}={value!r} must be a list of epochs, such as [5, 8]")
    for milestone in value:
        number(name, milestone, "a list of epochs above 0", above=0)
    if any(a >= b for a, b in itertools.pairwise(value)):
        raise ValueError(f"{name}={value!r} must increase, such as [5, 8]")


def _betas(name: str, value: Any) -> None:
    if value is None:
        return
    if not isinstance(value, list | tuple) or len(value) != 2:
        raise ValueError(f"{name}={value!r} must be two numbers, such as [0.9, 0.95], or None")
    for beta in value:
        number(name, beta, "two numbers of at least 0 and below 1", below=1)


@dataclass(frozen=True, kw_only=True)
class OptimisationConfig(Section):
    """How long, in what batches, and by what updates the network is trained."""

    title: ClassVar[str] = "optimisation"

    epochs: int = option(10, "Passes over the training images.", _COUNT)
    steps: int | None = option(
        None, "Number of optimizer steps, instead of epochs.", partial(_COUNT_OR_NONE, most=MOST_STEPS)
    )
    batch_size: int = option(128, "Images in a batch of the loader.", _COUNT)
    accumulate: int = option(1, "Loader batches per optimizer step; guidance is asked once per optimizer step.", _COUNT)
    optimizer: str = option("sgd", "sgd (with Nesterov momentum), adamw, or the name of a class in torch.optim.", text)
    lr: float = option(0.1, "Learning rate at the top of the schedule.", _POSITIVE)
    momentum: float = option(0.9, "Momentum, of optimizers that have it.", _FRACTION)
    betas: list[float] | None = option(
        None,
        "Of optimizers that have them, such as adamw: how slowly the means of gradients and of their squares forget, "
        "such as 0.9 0.95; by default the optimizer's own.",
        _betas,
    )
    weight_decay: float = option(1e-4, "Weight decay, of optimizers that have it.", partial(number, single=True))
    weight_decay_of: str = option(
        "all",
        "What weight_decay is of: all parameters, or matrices, without norms, biases, other vectors and embeddings.",
        _choice("all", "matrices"),
    )
    auxiliary_lr: float | None = option(
        None,
        "Learning rate of the auxiliary networks at the top of the schedule; by default lr.",
        partial(_POSITIVE, none=True),
    )
    auxiliary_weight_decay: float | None = option(
        None,
        "Weight decay of the auxiliary networks; by default weight_decay.",
        partial(number, single=True, none=True),
    )
    label_smoothing: float = option(0.0, "Label smoothing of every loss, at least 0 and below 1.", _FRACTION)
    schedule: str = option(
        "cosine",
        "Of the learning rate: cosine (falls to zero), step (times gamma at each milestone) or constant.",
        _choice("cosine", "step", "constant"),
    )
    decay: float | None = option(
        None,
        "Cosine: share of training, at its end, over which it falls; before that it stays at lr (warm-up, stable, "
        "decay: WSD). By default all of it, or with phased guidance each guided phase.",
        partial(number, what="a number above 0 and at most 1", above=0, most=1, none=True),
        guided=True,
    )
    warmup_epochs: float = option(0.0, "Epochs over which the learning rate rises linearly.", number)
    warmup_steps: int | None = option(None, "The same in steps, instead of warmup_epochs.", _COUNT_OR_NONE)
    milestones: list[float] = option([], "Epochs of the step schedule, increasing.", _milestones)
    gamma: float = option(0.1, "Factor of the step schedule.", _POSITIVE)
    clip: float | None = option(
        None,
        "Largest norm of the gradient of each loss: of each local module by itself, in guided steps of the whole "
        "network; by default it is not clipped.",
        partial(_POSITIVE, none=True),
    )

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.decay is not None and self.schedule != "cosine":
            raise ValueError(
                f"decay={self.decay} means nothing to schedule={self.schedule!r}: leave it out, or give "
                'schedule="cosine"'
            )
        if (self.schedule == "step") != bool(self.milestones):
            raise ValueError(
                f'milestones={self.milestones!r} and schedule={self.schedule!r} do not fit: give schedule="step" with '
                "at least one milestone, and another schedule without milestones"
            )
        if self.warmup_steps is not None and self.warmup_epochs:
            raise ValueError(
                f"warmup_steps={self.warmup_steps} and warmup_epochs={self.warmup_epochs}: give one of them, not both"
            )
        if self.steps is None and self.warmup_epochs >= self.epochs:
            raise ValueError(
                f"warmup_epochs={self.warmup_epochs} leaves nothing of epochs={self.epochs}: "
                "make it smaller than epochs"
            )


def _stages(name: str, value: Any) -> None:
    if value is None:
        return
    if not isinstance(value, list | tuple) or not value:
        raise ValueError(
            f"{name}={value!r} must be the numbers of local modules of every stage, such as [5, 5], or None"
        )
    for count in value:
        whole(name, count, 1)


def _link(name: str, value: Any) -> None:
    if value is not None:
        text(name, value, "a link such as 100mbit or 1gbit+20ms, or None")
        parse_link(value)


def _seed(name: str, value: Any) -> None:
    whole(name, value)
    if value >= 2**32:
        raise ValueError(f"{name}={value} must be below 2**32")


@dataclass(frozen=True, kw_only=True)
class RunConfig(Section):
    """Where the run is written, and on what it runs."""

    title: ClassVar[str] = "run folder and machine"

    out: str = option("runs/fit", "Folder of the run.", folder, free=True, common=True)
    seed: int = option(0, "Seed of weights, data order, augmentation, dropout and random guidance.", _seed, common=True)
    device: str = option("auto", "Where to compute: auto, cpu, cuda, cuda:1 or mps.", text, free=True, rounds=True)
    precision: str = option(
        "auto",
        "What to compute in: fp32, bf16, fp16, or auto for bf16 where the device has it in hardware.",
        _choice("auto", "fp32", "bf16", "fp16"),
    )
    replicas: int = option(
        1,
        "Data-parallel copies among the ranks that torchrun started; each takes an equal part of every batch.",
        _COUNT,
    )
    boundary: str | None = option(
        None,
        "What features, and in guided steps their gradients, are sent in from stage to stage: bf16, int8 or int4; by "
        "default as they are. One process rounds them where those of `stages` meet.",
        _choice(None, *BOUNDARIES),
    )
    stages: list[int] | None = option(
        None,
        "Numbers of local modules of the stages, such as 5 5; by default ranks share them by the time that they take.",
        _stages,
    )
    link: str | None = option(
        None,
        "What lies between two stages, such as 100mbit or 1gbit+20ms: ranks weigh the bytes that cross it when they "
        "share the local modules.",
        _link,
        free=True,
    )
    balance: str = option(
        "start",
        "When local modules are shared out to ranks: once at the start, or anew after each epoch, by measured times.",
        _choice("start", "epoch"),
        free=True,
    )
    channels_last: bool | None = option(
        None,
        "Keep images channels last in memory; by default where bf16 is used.",
        _choice(None, True, False),
        free=True,
        rounds=True,
    )
    compile: bool = option(False, "Compile the network with torch.compile.", _SWITCH)
    capture: bool = option(
        False, "Record each kind of step as a CUDA graph: small networks then train several times faster.", _SWITCH,
        free=True, rounds=True,
    )  # fmt: skip
    num_threads: int | None = option(
        None,
        "Number of CPU threads; by default torch's own choice.",
        partial(_COUNT_OR_NONE, most=4096),
        free=True,
        rounds=True,
    )
    log_every: int = option(10, "Steps between two readings of the losses.", _COUNT, free=True)
    checkpoint_every: int | None = option(
        None, "Steps between two checkpoints, beside the one at the end of each epoch.", _COUNT_OR_NONE, free=True
    )
    tensorboard: bool = option(True, "Write TensorBoard events.", _SWITCH, free=True)

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.link is not None and self.stages is not None:
            raise ValueError(f"link={self.link!r} means nothing to stages={self.stages!r}: give one of them")
        for name in ("boundary", "stages", "link") if self.balance == "epoch" else ():
            if getattr(self, name) is not None:
                raise ValueError(
                    f'balance="epoch" moves modules by times alone, not next to {name}={getattr(self, name)!r}: give '
                    "one of them"
                )


# --- the whole ---


@dataclass(frozen=True, kw_only=True)
class FitConfig:
    """Everything that decides a training run, in sections; :meth:`of` makes it from the options' short names.

    Args:
        model: the network by name.
        cut: where it is cut into local modules.
        rule: from what each of them learns.
        guidance: which steps are guided.
        memory: what a guided step may take.
        data: the data by name.
        optimisation: how long, in what batches, and by what updates.
        run: where it is written, and on what it runs.
    """

    model: ModelConfig = field(default_factory=ModelConfig)
    cut: CutConfig = field(default_factory=CutConfig)
    rule: RuleConfig = field(default_factory=RuleConfig)
    guidance: GuidanceConfig = field(default_factory=GuidanceConfig)
    memory: MemoryConfig = field(default_factory=MemoryConfig)
    data: DataConfig = field(default_factory=DataConfig)
    optimisation: OptimisationConfig = field(default_factory=OptimisationConfig)
    run: RunConfig = field(default_factory=RunConfig)

    def __post_init__(self) -> None:
        for name, kind in sections().items():
            if not isinstance(getattr(self, name), kind):
                raise ValueError(
                    f"{name}={getattr(self, name)!r} must be `name: value` pairs, in Python a {kind.__name__}"
                )
        if self.rule.auxiliary is not None or self.rule.options:  # a rule with its defaults has nothing to refuse
            build_rule(self)

    @classmethod
    def of(cls, **options: Any) -> FitConfig:
        """From options by short names (`lr=0.1`), by paths, or in sections (`optimisation={"lr": 0.1}`).

        Raises:
            ValueError: an option is unknown, or a value cannot work.
        """
        kinds = sections()
        return cls(
            **{
                name: kinds[name](**given) if isinstance(given, Mapping) else given
                for name, given in _nested(options).items()
            }
        )

    def plain(self) -> dict[str, Any]:
        """As plain values, as config.yaml, result.json and the checkpoints hold it."""
        values = {name: getattr(self, name).plain() for name in sections()}
        plain: dict[str, Any] = json.loads(json.dumps(values))  # tuples become lists
        return plain

    def value(self, name: str) -> Any:
        """The value of an option by its short name."""
        section, key = fit_options()[name].path.split(".")
        return getattr(self, section).plain().get(key)

    def changed(self, **options: Any) -> FitConfig:
        """With other options, given as to :meth:`of`."""
        return dataclasses.replace(
            self,
            **{
                name: getattr(self, name).changed(given) if isinstance(given, Mapping) else given
                for name, given in _nested(options).items()
            },
        )


@cache
def sections() -> dict[str, type[Any]]:
    """The sections by name."""
    return typing.get_type_hints(FitConfig)


@cache
def fit_options() -> dict[str, Option]:
    """The options of a run by short name, section by section."""
    found: dict[str, Option] = {}
    for section, kind in sections().items():
        options = _guidance_options() if kind is GuidanceConfig else declared(kind, section)
        found |= {one.name: one for one in options}
    return found


def _nested(options: Mapping[str, Any]) -> dict[str, Any]:
    kinds = sections()
    paths = {path: path for path in (one.path for one in fit_options().values())}
    paths |= {name: one.path for name, one in fit_options().items()}
    nested: dict[str, Any] = {}
    unknown: list[str] = []
    for key, value in options.items():
        if key in kinds and (isinstance(value, Mapping | Section) or key not in paths):
            if isinstance(value, Mapping):
                unknown += [f"{key}.{name}" for name in value if f"{key}.{name}" not in paths]
                value = {**nested.get(key, {}), **value}
            nested[key] = value
        elif key in paths:
            section, name = paths[key].split(".")
            nested.setdefault(section, {})[name] = value
        else:
            unknown.append(str(key))
    if unknown:
        raise ValueError(f"the configuration has unknown fields: {', '.join(sorted(unknown))}")
    return nested


def short_names(values: Mapping[str, Any], *, defaults: bool = True) -> dict[str, Any]:
    """Options, in sections or not, as plain values by short names; with ``defaults`` also those that are not there."""
    short = {one.path: name for name, one in fit_options().items()}
    found = {name: one.default for name, one in fit_options().items() if not name.startswith("guidance.")}
    found = found if defaults else {}
    for section, given in _nested(values).items():
        plain = given.plain() if isinstance(given, Section) else given
        found |= {short[f"{section}.{name}"]: value for name, value in plain.items()}
    return found


# --- what is made of it ---


def build_guidance(config: FitConfig) -> Guidance:
    """Make the guidance of a run, not yet bound to its number of steps."""
    return config.guidance.make(seed=config.run.seed)


def guided_options(config: FitConfig) -> dict[str, Any]:
    """The options of the guided steps of a run."""
    return {"auxiliary": config.guidance.auxiliary, **guided_memory(config)}


def guided_memory(config: FitConfig) -> dict[str, int | str | None]:
    """The options `memory`, `micro_batches` and `recompute` of the guided steps of a run."""
    if config.memory.recompute is not None:
        return {"recompute": config.memory.recompute}
    if config.memory.limit is None and config.guidance.name == "always" and config.memory.micro_batches is None:
        return {"memory": "full"}
    found: dict[str, int | str | None] = {
        "memory": "local" if config.memory.limit is None else _memory(config.memory.limit)
    }
    if config.memory.micro_batches is not None and found["memory"] not in ("exact", "full"):
        found["micro_batches"] = config.memory.micro_batches
    return found


def build_rule(config: FitConfig) -> Rule:
    """Make the local rule of a run, with its auxiliary network."""
    from torchlocal.rules import RULES, make_rule

    name, auxiliary, given = config.rule.name, config.rule.auxiliary, config.rule.options
    options: dict[str, Any] = {}
    takes = inspect.signature(RULES[name]).parameters
    if auxiliary is not None:
        if "auxiliary" not in takes:
            raise ValueError(f"auxiliary={auxiliary!r} means nothing to rule={name!r}: leave it out")
        options["auxiliary"] = auxiliary
    published = {"published": [config.data.name, config.model.name]}
    if "published" in takes:
        options |= published
    base = given.get("base")
    if "base_options" in takes and base in tuple(RULES) and "published" in inspect.signature(RULES[base]).parameters:
        base_options = given.get("base_options") or {}
        if isinstance(base_options, dict):
            given = given | {"base_options": published | base_options}
    try:
        return make_rule(name, options | given)
    except ValueError as error:
        known = str(error).partition(":")[0] in given
        raise ValueError(f"rule_options.{error}" if known else str(error)) from error


def _memory(value: object) -> int | str:
    """A memory mode as it is, a size such as 8GiB in bytes."""
    if value in ("local", "exact", "full"):
        return str(value)
    with contextlib.suppress(ValueError):
        if isinstance(value, int | str) and not isinstance(value, bool):
            return parse_size(str(value))
    raise ValueError(f'memory={value!r} is unknown: give "local", "exact", "full" or a size such as "8GiB"')
