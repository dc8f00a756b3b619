"""What a comparison trains: methods, variants of them, and grids of options, as one configuration per row."""

from __future__ import annotations

import itertools
import math
import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

from torchlocal.run.config import FitConfig, GuidanceConfig, build_guidance, config_from_dict, config_to_dict

__all__ = ["METHODS", "CompareConfig", "Subject", "method_configs"]


def _same_rate(config: FitConfig) -> FitConfig:
    """With the learning rate that phased guidance would choose: it is the same for every method."""
    phased = config.guidance.name == "phased" and config.guidance.periods in (None, 1)
    if not phased or config.decay is not None or config.schedule != "cosine":
        return config
    return replace(config, decay=build_guidance(config).share or None)


def _end_to_end(config: FitConfig, num_units: int) -> FitConfig:
    plain = FitConfig()  # what says nothing about one module is the same in every comparison
    return replace(
        _same_rate(config),
        modules=1,
        cuts=None,
        rule=plain.rule,
        auxiliary=plain.auxiliary,
        rule_options={},
        memory=None,
        recompute=None,
        guidance=GuidanceConfig(name="always"),
    )


def _checkpointing(config: FitConfig, num_units: int) -> FitConfig:
    # About sqrt(n) segments keep the fewest activations alive (Chen et al., "Training Deep Nets with Sublinear Memory
    # Cost", 2016, section 4.3).
    return replace(_end_to_end(config, num_units), recompute=max(1, round(math.sqrt(num_units))))


def _local(config: FitConfig, num_units: int) -> FitConfig:
    return replace(_same_rate(config), memory=None, recompute=None, guidance=GuidanceConfig(name="never"))


def _pgl(config: FitConfig, num_units: int) -> FitConfig:
    if config.guidance.name in ("never", "always"):
        raise ValueError(
            f"guidance.name={config.guidance.name!r} leaves method pgl nothing to do: give another schedule"
        )
    return config


# A method turns the common configuration into its own; the second argument is the number of units of the backbone.
METHODS: dict[str, Callable[[FitConfig, int], FitConfig]] = {
    "end-to-end": _end_to_end,
    "checkpointing": _checkpointing,
    "local": _local,
    "pgl": _pgl,
}


@dataclass(frozen=True, kw_only=True)
class CompareConfig:
    """Which methods and seeds to compare, on top of one common configuration.

    Args:
        out: Folder of the comparison: report, and one run per method and seed in METHOD/seedN.
        methods: Methods to compare, in the order of the table: end-to-end, checkpointing, local, pgl, or a variant.
        seeds: Seeds; every method is trained once with each.
        variants: Further methods, as NAME: {method: pgl, OPTION: VALUE, ...}: a method with other options of the run.
            `baseline: NAME` names the method from which on its share of the gap closed is counted, if it is not local.
        timing_rounds: Rounds in which the steps of all methods take turns for time per step; 0 measures no costs:
            neither time nor memory nor FLOPs.
        grid: Options to vary, as OPTION: [VALUE, ...]: every method is trained with every combination of them that
            makes a difference to it, and measured against local and end-to-end training with the same.
        fit: The common configuration of the runs; its `out` and `seed` are not used.
    """

    out: str = "runs/compare"
    methods: tuple[str, ...] = tuple(METHODS)
    seeds: tuple[int, ...] = (0,)
    variants: Mapping[str, Mapping[str, Any]] = field(default_factory=dict)
    timing_rounds: int = 10
    grid: Mapping[str, Sequence[Any]] = field(default_factory=dict)
    fit: FitConfig = field(default_factory=FitConfig)

    def __post_init__(self) -> None:
        for name in ("methods", "seeds"):
            values = getattr(self, name)
            if isinstance(values, str) or not isinstance(values, Sequence) or not values:
                raise ValueError(f"{name}={values!r} must be a list with at least one element")
            if len(set(values)) < len(values):
                raise ValueError(f"{name}={list(values)} holds an element twice: name each once")
        for name in ("variants", "grid"):
            if not isinstance(getattr(self, name), Mapping):
                raise ValueError(f"{name}={getattr(self, name)!r} must be `name: value` pairs: fill it or leave it out")
        known = [*METHODS, *self.variants]
        for method in self.methods:
            if method not in known:
                raise ValueError(f"methods: {method!r} is unknown, choose from {', '.join(known)}")
        for seed in self.seeds:
            if isinstance(seed, bool) or not isinstance(seed, int) or not 0 <= seed < 2**32:
                raise ValueError(f"seeds={list(self.seeds)} must be whole numbers of at least 0 and below 2**32")
        if not isinstance(self.timing_rounds, int) or self.timing_rounds < 0:
            raise ValueError(f"timing_rounds={self.timing_rounds!r} must be a whole number of at least 0")
        if self.timing_rounds > 1_000_000:
            raise ValueError(f"timing_rounds={self.timing_rounds} is more than 1,000,000: make it smaller")
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
        for name, values in self.grid.items():
            if not isinstance(name, str):
                raise ValueError(f"grid: {name!r} must be the name of an option, such as modules")
            if isinstance(values, str) or not isinstance(values, Sequence) or not values:
                raise ValueError(f"grid: {name} must be a list of at least one value, not {values!r}")
            if any(isinstance(value, Mapping | list | tuple) for value in values):
                raise ValueError(f"grid: the values of {name} must be numbers, words or null, not {list(values)!r}")
        method_configs(self, lambda model: 4)  # refuses what cannot work now, not after hours


@dataclass(frozen=True, kw_only=True)
class Subject:
    """One row of a comparison: what is trained, and the names of the rows that it is measured against."""

    config: FitConfig
    reference: str
    baseline: str


def _changed(config: FitConfig, changes: Mapping[str, Any], told: str) -> FitConfig:
    """The configuration with other options, those of guidance in a mapping or with a dot; ``told`` begins an error."""
    values = config_to_dict(config)
    changes = dict(changes)
    guidance = changes.pop("guidance", {})
    if not isinstance(guidance, Mapping):
        raise ValueError(f"{told}: guidance must hold options such as {{share: 0.1}}, not one value")
    dotted = {key.removeprefix("guidance."): changes.pop(key) for key in list(changes) if key.startswith("guidance.")}
    for key in ("out", "seed", "data", "data_root", "num_train", "num_validation", "image_size"):
        if key in changes:
            raise ValueError(f"{told}: {key} is common to all methods: leave it out")
    if "modules" in changes and config.cuts is not None and changes.get("cuts", config.cuts) is not None:
        raise ValueError(f"{told}: modules means nothing next to cuts={config.cuts}: give one of them")
    guidance = {**guidance, **dotted}
    common = values["guidance"]
    if guidance.get("name", common["name"]) != common["name"]:  # the options of one schedule are not another's
        common = {"auxiliary": common["auxiliary"]}
    try:
        return config_from_dict({**values, **changes, "guidance": {**common, **guidance}})
    except (ValueError, TypeError) as error:
        raise ValueError(f"{told}: {error}") from error


def _points(grid: Mapping[str, Sequence[Any]]) -> list[dict[str, Any]]:
    return [dict(zip(grid, values, strict=True)) for values in itertools.product(*grid.values())]


def _method_config(
    config: CompareConfig, method: str, point: Mapping[str, Any], num_units: Callable[[str], int]
) -> FitConfig:
    common = _changed(config.fit, point, "grid")
    if method in METHODS:
        return METHODS[method](common, num_units(common.model))
    changes = {key: value for key, value in config.variants[method].items() if key not in ("method", "baseline")}
    changed, base = _changed(common, changes, f"variants: {method}"), config.variants[method]["method"]
    made = METHODS[base](changed, num_units(changed.model))
    if made.guidance.name == "always":  # how much it recomputes is what a variant of these may change
        made = replace(made, **{key: getattr(changed, key) for key in ("memory", "recompute") if key in changes})
    for key in changes:
        field_name = key.partition(".")[0]
        if getattr(made, field_name) != getattr(changed, field_name):
            raise ValueError(f"variants: {method}: {key} means nothing to method {base}: leave it out")
    return made


def method_configs(config: CompareConfig, num_units: Callable[[str], int]) -> dict[str, Subject]:
    """What is trained, by the name of its row, still without `out` and `seed`.

    A row's name is its method's, followed by the options of the grid that make a difference to it.

    Args:
        config: What to compare.
        num_units: Number of units of a backbone by name, from which checkpointing takes its number of segments.
    """
    points = _points(config.grid)
    names: dict[str, list[str]] = {}
    found: dict[str, list[FitConfig]] = {}
    baselines = {m: str(config.variants.get(m, {}).get("baseline", "local")) for m in config.methods}
    for method in dict.fromkeys([*config.methods, "end-to-end", *baselines.values()]):
        found[method] = [_method_config(config, method, point, num_units) for point in points]
        matters = [key for key in config.grid if _matters(key, points, found[method])]
        names[method] = [",".join([method, *(_label(key, point[key]) for key in matters)]) for point in points]
    subjects: dict[str, Subject] = {}
    for method in config.methods:
        for index, name in enumerate(names[method]):
            peers = {"reference": names["end-to-end"][index], "baseline": names[baselines[method]][index]}
            subjects.setdefault(name, Subject(config=found[method][index], **peers))
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
