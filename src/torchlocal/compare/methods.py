"""What a comparison trains: methods, variants of them, and grids of options, as one configuration per row."""

from __future__ import annotations

import itertools
import math
import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from fractions import Fraction
from functools import partial
from typing import Any, Protocol

from torchlocal.checks import number, whole
from torchlocal.run.config import (
    MOST_STEPS,
    CutConfig,
    FitConfig,
    GuidanceConfig,
    MemoryConfig,
    RuleConfig,
    build_guidance,
    check,
    fit_options,
    folder,
    option,
    short_names,
)

__all__ = ["METHODS", "RIVALS", "Circumstances", "CompareConfig", "Subject", "method_configs"]


class Circumstances(Protocol):
    """What the configurations of some methods depend on, beside the common one."""

    def num_units(self, model: str) -> int:
        """Number of units of a backbone."""

    def bytes_of_a_step(self, pgl: FitConfig, end_to_end: FitConfig) -> int:
        """Bytes that a step of end-to-end training may take to need no more than PGL in all."""

    def steps_in_time(self, pgl: FitConfig, end_to_end: FitConfig) -> int:
        """Number of steps that end-to-end training takes in the time of PGL's whole training."""


def _same_rate(config: FitConfig) -> FitConfig:
    """With phased guidance: the decay of the learning rate that it implies, so that every method has the same."""
    phased = config.guidance.name == "phased" and config.guidance.options.get("periods", 1) == 1
    if not phased or config.optimisation.decay is not None or config.optimisation.schedule != "cosine":
        return config
    return config.changed(decay=build_guidance(config).share or None)


def _plain_memory(config: FitConfig) -> MemoryConfig:
    """Nothing is recomputed or cut; how the scores of text are made is common to all methods."""
    return replace(MemoryConfig(), scores=config.memory.scores)


def _end_to_end(config: FitConfig, found: Circumstances) -> FitConfig:
    # What says nothing about one module is the same in every comparison.
    if config.run.boundary is not None:  # which is rounded between the modules that the other methods have
        always = GuidanceConfig(name="always", auxiliary="frozen")
        return replace(_same_rate(config), memory=_plain_memory(config), guidance=always)
    always = GuidanceConfig(name="always")
    return replace(
        _same_rate(config),
        cut=CutConfig(modules=1),
        rule=RuleConfig(),
        memory=_plain_memory(config),
        guidance=always,
    )


def _checkpointing(config: FitConfig, found: Circumstances) -> FitConfig:
    # About sqrt(n) segments keep the fewest activations alive (Chen et al., "Training Deep Nets with Sublinear Memory
    # Cost", 2016, section 4.3).
    segments = max(1, round(math.sqrt(found.num_units(config.model.name))))
    return _end_to_end(config, found).changed(recompute=segments)


def _at_equal_memory(config: FitConfig, found: Circumstances, micro_batches: int | None) -> FitConfig:
    whole = _end_to_end(config, found)
    return whole.changed(memory=found.bytes_of_a_step(_pgl(config, found), whole), micro_batches=micro_batches)


def _micro_batches(config: FitConfig, found: Circumstances) -> FitConfig:
    return _at_equal_memory(config, found, None)


def _recomputed(config: FitConfig, found: Circumstances) -> FitConfig:
    return _at_equal_memory(config, found, 1)


def _equal_time(config: FitConfig, found: Circumstances) -> FitConfig:
    whole = _end_to_end(config, found)
    return whole.changed(steps=found.steps_in_time(_pgl(config, found), whole))


def _local(config: FitConfig, found: Circumstances) -> FitConfig:
    return replace(_same_rate(config), memory=_plain_memory(config), guidance=GuidanceConfig(name="never"))


def _periodic(config: FitConfig, found: Circumstances) -> FitConfig:
    pgl = _pgl(config, found)
    if pgl.guidance.name == "periodic":
        return pgl
    share = Fraction(build_guidance(pgl).share).limit_denominator(100)
    return replace(
        _same_rate(pgl),
        guidance=GuidanceConfig(
            name="periodic", period=share.denominator, length=share.numerator, auxiliary=pgl.guidance.auxiliary
        ),
    )


def _pgl(config: FitConfig, found: Circumstances) -> FitConfig:
    if config.guidance.name in ("never", "always"):
        raise ValueError(
            f"guidance.name={config.guidance.name!r} leaves method pgl nothing to do: give another schedule"
        )
    return config


# A method turns the common configuration into its own.
METHODS: dict[str, Callable[[FitConfig, Circumstances], FitConfig]] = {
    "end-to-end": _end_to_end,
    "checkpointing": _checkpointing,
    "recomputed": _recomputed,
    "micro-batches": _micro_batches,
    "equal-time": _equal_time,
    "local": _local,
    "periodic": _periodic,
    "pgl": _pgl,
}
# What a sceptic would train instead of PGL: end-to-end in its memory, bit for bit or in parts, and in its time.
RIVALS = ("recomputed", "micro-batches", "equal-time")
_DEFAULT = ("end-to-end", *RIVALS, "local", "periodic", "pgl")


def _elements(name: str, value: Any) -> None:
    if isinstance(value, str) or not isinstance(value, Sequence) or not value:
        raise ValueError(f"{name}={value!r} must be a list with at least one element")
    if len(set(value)) < len(value):
        raise ValueError(f"{name}={list(value)} holds an element twice: name each once")


def _seeds(name: str, value: Any) -> None:
    _elements(name, value)
    for seed in value:
        if isinstance(seed, bool) or not isinstance(seed, int) or not 0 <= seed < 2**32:
            raise ValueError(f"{name}={list(value)} must be whole numbers of at least 0 and below 2**32")


def _pairs(name: str, value: Any) -> None:
    if not isinstance(value, Mapping):
        raise ValueError(f"{name}={value!r} must be `name: value` pairs: fill it or leave it out")


def _grid(name: str, value: Any) -> None:
    _pairs(name, value)
    for key, values in value.items():
        if not isinstance(key, str):
            raise ValueError(f"{name}: {key!r} must be the name of an option, such as modules")
        if isinstance(values, str) or not isinstance(values, Sequence) or not values:
            raise ValueError(f"{name}: {key} must be a list of at least one value, not {values!r}")
        if any(isinstance(each, Mapping | list | tuple) for each in values):
            raise ValueError(f"{name}: the values of {key} must be numbers, words or null, not {list(values)!r}")


@dataclass(frozen=True, kw_only=True)
class CompareConfig:
    """Which methods and seeds to compare, on top of one common configuration, whose folder and seed are not used."""

    out: str = option(
        "runs/compare", "Folder of the comparison: report, and one run per method and seed in METHOD/seedN.", folder
    )
    methods: tuple[str, ...] = option(
        _DEFAULT,
        "Methods to compare, in the order of the table: end-to-end; checkpointing (in uniform segments); at pgl's "
        "memory end-to-end recomputed (bit for bit the same) or in micro-batches, and for equal-time; local; periodic "
        "(as many guided steps as pgl, spread evenly); pgl; or a variant.",
        _elements,
    )
    seeds: tuple[int, ...] = option((0,), "Seeds; every method is trained once with each.", _seeds)
    variants: Mapping[str, Mapping[str, Any]] = option(
        {},
        "Further methods, as NAME: {method: pgl, OPTION: VALUE, ...}: a method with other options of the run. "
        "`baseline: NAME` names the method from which on its share of the gap closed is counted, if it is not local.",
        _pairs,
    )
    timing_rounds: int = option(
        10,
        "Rounds in which the steps of all methods take turns for time per step; 0 measures no costs: neither time nor "
        "memory nor FLOPs. Then equal-time cannot be trained, and is left out unless it is asked for.",
        partial(whole, most=1_000_000),
    )
    reach: float | None = option(
        None,
        "A validation accuracy (0.75), of text a validation loss (3.4): also tell after how much time each method "
        "reaches it.",
        partial(number, what="a number above 0", above=0, none=True),
    )
    grid: Mapping[str, Sequence[Any]] = option(
        {},
        "Options to vary, as OPTION: [VALUE, ...]: every method is trained with every combination of them that makes a "
        "difference to it, and measured against local and end-to-end training with the same.",
        _grid,
    )
    fit: FitConfig = field(default_factory=FitConfig)

    def __post_init__(self) -> None:
        check(self)
        if self.reach is not None and not self.timing_rounds:
            raise ValueError(f"reach={self.reach!r} needs the time of steps: give timing_rounds above 0")
        if not self.timing_rounds and self.methods == _DEFAULT:
            object.__setattr__(self, "methods", tuple(method for method in _DEFAULT if method != "equal-time"))
        known = [*METHODS, *self.variants]
        for method in self.methods:
            if method not in known:
                raise ValueError(f"methods: {method!r} is unknown, choose from {', '.join(known)}")
        for name, options in self.variants.items():
            if not isinstance(name, str) or name in METHODS or not name or name.strip(".") != name:
                raise ValueError(f"variants: {name!r} must be a new name that can be the name of a folder")
            if set(name) & set('/\\:*?"<>|'):
                raise ValueError(f"variants: {name!r} must be the name of a folder: use letters, digits and -")
            if not isinstance(options, Mapping) or options.get("method") not in tuple(METHODS):
                raise ValueError(f"variants: {name} must name the method that it changes, one of {', '.join(METHODS)}")
            others = [other for other in known if other != name]
            if options.get("baseline", "local") not in others:
                raise ValueError(
                    f"variants: {name}: baseline {options['baseline']!r} must be one of {', '.join(others)}"
                )
        for method in self.methods:
            if "equal-time" in (method, self.variants.get(method, {}).get("method")) and not self.timing_rounds:
                raise ValueError(f"methods: {method!r} needs the time of steps: give timing_rounds above 0")
        method_configs(self, _Unknown())  # refuses what cannot work now, not after hours


class _Unknown:
    """Circumstances before anything is there."""

    def num_units(self, model: str) -> int:
        return 4

    def bytes_of_a_step(self, pgl: FitConfig, end_to_end: FitConfig) -> int:
        return 2**40

    def steps_in_time(self, pgl: FitConfig, end_to_end: FitConfig) -> int:
        return end_to_end.optimisation.steps or MOST_STEPS


@dataclass(frozen=True, kw_only=True)
class Subject:
    """One row of a comparison: what is trained, and the names of the rows that it is measured against.

    ``rivals`` are those of PGL: what a sceptic would train instead, and end-to-end training.
    """

    config: FitConfig
    reference: str
    baseline: str
    rivals: tuple[str, ...] = ()


def _changed(config: FitConfig, changes: Mapping[str, Any], told: str) -> FitConfig:
    """The configuration with other options, by short names or in sections; ``told`` begins an error."""
    if not isinstance(changes.get("guidance", {}), Mapping):
        raise ValueError(f"{told}: guidance must hold options such as {{share: 0.1}}, not one value")
    try:
        given = short_names(changes, defaults=False)
        for key in given:
            if key in fit_options() and fit_options()[key].common:
                raise ValueError(f"{key} is common to all methods: leave it out")
        if "modules" in given and config.cut.after is not None and given.get("cuts", config.cut.after) is not None:
            raise ValueError(f"modules means nothing next to cuts={config.cut.after}: give one of them")
        return config.changed(**given)
    except (ValueError, TypeError) as error:
        raise ValueError(f"{told}: {error}") from error


_RECOMPUTING = ("memory", "recompute", "micro_batches")


def _points(grid: Mapping[str, Sequence[Any]]) -> list[dict[str, Any]]:
    return [dict(zip(grid, values, strict=True)) for values in itertools.product(*grid.values())]


def _method_config(
    config: CompareConfig, method: str, point: Mapping[str, Any], circumstances: Circumstances
) -> FitConfig:
    common = _changed(config.fit, point, "grid")
    if method in METHODS:
        return METHODS[method](common, circumstances)
    changes = {key: value for key, value in config.variants[method].items() if key not in ("method", "baseline")}
    changed, base = _changed(common, changes, f"variants: {method}"), config.variants[method]["method"]
    made = METHODS[base](changed, circumstances)
    if made.guidance.name == "always":  # how much it recomputes is what a variant of these may change
        given = short_names(changes, defaults=False)
        made = made.changed(**{key: changed.value(key) for key in _RECOMPUTING if key in given})
    for key in changes:
        named = [
            one.name for one in fit_options().values() if key in (one.name, one.path) or one.path.startswith(f"{key}.")
        ]
        if any(made.value(name) != changed.value(name) for name in named):
            raise ValueError(f"variants: {method}: {key} means nothing to method {base}: leave it out")
    return made


def method_configs(config: CompareConfig, circumstances: Circumstances) -> dict[str, Subject]:
    """What is trained, by the name of its row, still without `out` and `seed`.

    A row's name is its method's, followed by the options of the grid that make a difference to it.

    Args:
        config: What to compare.
        circumstances: What some methods depend on.
    """
    points = _points(config.grid)
    names: dict[str, list[str]] = {}
    found: dict[str, list[FitConfig]] = {}
    baselines = {m: str(config.variants.get(m, {}).get("baseline", "local")) for m in config.methods}
    for method in dict.fromkeys([*config.methods, "end-to-end", *baselines.values()]):
        found[method] = [_method_config(config, method, point, circumstances) for point in points]
        matters = [key for key in config.grid if _matters(key, points, found[method])]
        names[method] = [",".join([method, *(_label(key, point[key]) for key in matters)]) for point in points]
    subjects: dict[str, Subject] = {}
    for method in config.methods:
        for index, name in enumerate(names[method]):
            peers = {"reference": names["end-to-end"][index], "baseline": names[baselines[method]][index]}
            rivals = [names[rival][index] for rival in ("end-to-end", *RIVALS) if method == "pgl" and rival in names]
            subjects.setdefault(name, Subject(config=found[method][index], rivals=tuple(rivals), **peers))
    return subjects


def _matters(key: str, points: Sequence[Mapping[str, Any]], configs: Sequence[FitConfig]) -> bool:
    """Whether two points that differ in this option alone have different configurations."""
    first: dict[str, FitConfig] = {}
    for point, config in zip(points, configs, strict=True):
        others = repr([value for name, value in point.items() if name != key])
        if first.setdefault(others, config) != config:
            return True
    return False


def _label(key: str, value: object) -> str:
    return re.sub(r'[/\\:*?"<>|]', "-", f"{key.removeprefix('guidance.')}={value}")
