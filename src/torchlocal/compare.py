"""End-to-end, checkpointing, local and PGL side by side: the same network by several methods and seeds."""

from __future__ import annotations

import csv
import io
import itertools
import json
import math
import platform
import re
import statistics
import sys
import warnings
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, field, replace
from functools import cache, partial
from pathlib import Path
from typing import Any

import torch
import yaml

from torchlocal import __version__ as torchlocal_version
from torchlocal.assembly import build_network, build_optimizer, count_steps, load_run_data, resolve_execution
from torchlocal.checkpoint import check_same_config, write_config, write_file, write_json
from torchlocal.config import (
    FitConfig,
    GuidanceConfig,
    build_guidance,
    build_rule,
    config_from_dict,
    config_to_dict,
    guided_memory,
)
from torchlocal.costs import StepCosts, measure_costs
from torchlocal.data import DataBundle
from torchlocal.models import build_model
from torchlocal.network import decouple
from torchlocal.report import Comparison, MethodResult, write_report
from torchlocal.sharing import Branch, find_branches, first_alike
from torchlocal.trainer import Diverged, fit

__all__ = ["METHODS", "CompareConfig", "Subject", "compare", "method_configs"]


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


def compare(config: CompareConfig, *, progress: bool = True) -> Comparison:
    """Train one network by several methods and seeds and write a report of how they compare.

    Finished runs are not repeated and an interrupted one is resumed, so calling it again completes it. Runs follow each
    other; all methods with one seed come before the next seed. What methods have in common is trained once: of those
    that differ only in what they recompute, such as end-to-end and checkpointing, the first; and the local steps with
    which methods begin that differ only in their guidance, such as local and PGL with the guided steps at the end
    (but what had passed them before). The results are those of each run by itself, bit for bit.

    Args:
        config: What to compare.
        progress: Whether to say on the standard error stream what is going on.

    Returns:
        The comparison; its report is `report.html`, `.md` and `.csv` in `config.out`.

    Raises:
        ValueError: a value cannot work, or `config.out` holds runs of another configuration.
    """
    out = Path(config.out).expanduser()
    data = load_run_data(config.fit)
    subjects = method_configs(config, cache(partial(_count_units, data)))
    configs = {method: subject.config for method, subject in subjects.items()}
    firsts = first_alike(configs, out)
    runs = {
        (method, seed): replace(configs[method], out=str(out / method / f"seed{seed}"), seed=seed)
        for seed in config.seeds
        for method in configs
        if firsts[method] == method
    }
    for run in runs.values():  # before anything is written or takes time
        _check_run_folder(run, data.checksum)
    if not all((Path(run.out) / "result.json").exists() for run in runs.values()):
        _check_parts(configs, data)
    _make_folder(out)
    _say(progress, f"comparing {', '.join(configs)} in {out}")
    alike = [f"{method} as {first}" for method, first in firsts.items() if first != method]
    if alike:
        _say(progress, f"trained once, since recomputation changes no result: {', '.join(alike)}")
    trunks = find_branches(
        {method: runs[method, config.seeds[0]] for method in configs if firsts[method] == method}, len(data.train)
    )
    begun = [f"{method} and {trunk} ({step:,} steps)" for method, (trunk, step) in trunks.items()]
    if begun:
        _say(progress, f"first steps in common: {', '.join(begun)}")
    write_config(out / "compare.yaml", _plain(config), [f"torchlocal compare --config {out / 'compare.yaml'}"])
    costs = _costs(out / "costs.json", configs, data, config, progress) if config.timing_rounds else {}
    trained: dict[str, dict[int, dict[str, Any]]] = {}
    diverged: list[str] = []
    for number, ((method, seed), run) in enumerate(runs.items(), start=1):
        finished = (Path(run.out) / "result.json").exists()
        _say(progress, f"run {number} of {len(runs)}: {method}, seed {seed}{' (finished before)' if finished else ''}")
        branches = [
            Branch(step=step, config=runs[other, seed]) for other, (trunk, step) in trunks.items() if trunk == method
        ]
        try:
            trained.setdefault(method, {})[seed] = fit(run, resume=True, progress=progress, branches=branches)
        except Diverged as error:  # a result too, and no reason to lose the other runs
            diverged.append(f"{method}, seed {seed}")
            warnings.warn(f"{method}, seed {seed}: {error}; it is left out of the table", stacklevel=2)
        except ValueError as error:
            raise ValueError(f"{method}, seed {seed}: {error}") from error
    results = {method: trained[firsts[method]] for method in configs if firsts[method] in trained}
    if not results:
        raise Diverged(f"every run diverged ({'; '.join(diverged)}): lower lr={config.fit.lr:g}, or train in fp32")
    comparison = Comparison(
        title=f"{_several(config, 'model')} on {data.name}, {_modules_text(config)}",
        results=tuple(
            _method_result(method, subjects[method], found, out / firsts[method], costs.get(method))
            for method, found in results.items()
        ),
        facts=tuple(_facts(config, data, trained, diverged, alike, begun).items()),
        configuration=yaml.safe_dump(_plain(config, public=True), sort_keys=False),
        command="torchlocal compare --config compare.yaml --out NEW_FOLDER",
        rounds=config.timing_rounds,
        device=resolve_execution(config.fit).device.type,
    )
    write_report(comparison, out)
    write_file(out / "runs.csv", _runs_table(trained, costs))
    return comparison


def _say(progress: bool, text: str) -> None:
    if progress:
        print(text, file=sys.stderr, flush=True)


def _several(config: CompareConfig, name: str) -> str:
    """An option of all runs, or its values in the grid."""
    return ", ".join(map(str, config.grid.get(name, [getattr(config.fit, name)])))


def _modules_text(config: CompareConfig) -> str:
    if config.fit.cuts is not None:
        return f"cut after {', '.join(config.fit.cuts)}"
    words = {"all": "one local module per unit", "fewest": "as few local modules as take no more memory"}
    modules = _several(config, "modules")
    return words.get(modules, f"K = {modules}")


def _count_units(data: DataBundle, name: str) -> int:
    channels, height, width = data.shape
    model = build_model(name, num_classes=data.num_classes, in_channels=channels, image_size=(height, width))
    return len(decouple(model, 1, sample=(2, channels, height, width)).partition.units)


def _check_run_folder(config: FitConfig, checksum: str) -> None:
    """Refuse a folder with a run of another configuration, or a finished one on data that have changed since.

    `fit` would refuse the first, too, but only when its turn comes; of a finished run it reads no data.
    """
    path = Path(config.out) / "config.yaml"
    if not path.is_file():
        return
    try:
        saved = yaml.safe_load(path.read_text(encoding="utf-8"))
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        raise ValueError(f"{path} is damaged: delete the folder {path.parent} to train it again") from error
    if not isinstance(saved, dict) or not saved:
        raise ValueError(f"{path} is damaged: delete the folder {path.parent} to train it again")
    check_same_config(path, saved, config_to_dict(config))
    finished = path.with_name("result.json")
    try:
        result = json.loads(finished.read_text(encoding="utf-8"))
    except (OSError, ValueError):  # absent; a damaged one is told by `fit`
        result = None
    there = result.get("data_checksum", checksum) if isinstance(result, dict) else checksum  # older ones hold none
    if there != checksum:
        raise ValueError(
            f"{finished} is of a run on other data: checksum is {there} there and {checksum} here; bring the same data "
            "back, or choose another out"
        )


def _check_parts(configs: Mapping[str, FitConfig], data: DataBundle) -> None:
    """Refuse a method whose network or optimizer cannot be made: now, not after the runs of other methods."""
    for config in configs.values():
        count_steps(config, len(data.train))
        build_optimizer(config, build_network(config, data, resolve_execution(config)))


def _make_folder(path: Path) -> None:
    try:
        path.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise ValueError(f"out={str(path)!r} cannot be made a folder ({error.strerror}): choose another") from error


def _plain(config: CompareConfig, *, public: bool = False) -> dict[str, Any]:
    """The configuration as a recipe: options of the runs, and the section that only `compare` reads.

    `public` leaves out where the data lie on this machine.
    """
    run = {name: value for name, value in config_to_dict(config.fit).items() if name not in ("out", "seed")}
    if public:
        del run["data_root"]
    section = {
        "out": config.out,
        "methods": list(config.methods),
        "seeds": list(config.seeds),
        "timing_rounds": config.timing_rounds,
    }
    if config.grid:
        section["grid"] = {name: list(values) for name, values in config.grid.items()}
    if config.variants:
        section["variants"] = json.loads(json.dumps({name: dict(value) for name, value in config.variants.items()}))
    return {**run, "compare": section}


def _costs(
    path: Path, configs: Mapping[str, FitConfig], data: DataBundle, config: CompareConfig, progress: bool
) -> dict[str, StepCosts]:
    """Measure what the steps cost, or read it if it was measured before under the same conditions."""
    key = {
        "executions": {method: repr(resolve_execution(fit_config)) for method, fit_config in configs.items()},
        "num_threads": torch.get_num_threads(),
        "machine": platform.machine(),
        "configs": {
            method: {name: value for name, value in config_to_dict(fit_config).items() if name not in ("out", "seed")}
            for method, fit_config in configs.items()
        },
        "timing_rounds": config.timing_rounds,
        "versions": _versions(),
    }
    try:
        saved = json.loads(path.read_text(encoding="utf-8"))
        if saved["key"] == key:
            return {method: StepCosts(**values) for method, values in saved["costs"].items()}
    except (OSError, ValueError, KeyError, TypeError):  # absent, damaged or of another version: measure anew
        pass
    _say(progress, f"measuring memory and time of the steps ({config.timing_rounds} rounds)")
    costs = measure_costs(configs, data, rounds=config.timing_rounds)
    write_json(path, {"key": key, "costs": {method: asdict(cost) for method, cost in costs.items()}})
    return costs


def _versions() -> str:
    return f"torchlocal {torchlocal_version}, torch {torch.__version__}, Python {platform.python_version()}"


def _method_result(
    method: str, subject: Subject, by_seed: Mapping[int, Mapping[str, Any]], folder: Path, cost: StepCosts | None
) -> MethodResult:
    results = list(by_seed.values())
    parameters = results[0]["num_parameters"]
    return MethodResult(
        method=method,
        num_modules=len(results[0]["depth_accuracy"]),
        guided_share=statistics.fmean(result["guided_share"] for result in results),
        accuracies=tuple(result["test_accuracy"] for result in results),
        validation=tuple(_validation_curve(folder / f"seed{seed}" / "metrics.csv") for seed in by_seed),
        depth_accuracies=tuple(tuple(result["depth_accuracy"]) for result in results),
        peak_bytes=None if cost is None else cost.total_peak_bytes,
        step_seconds=None if cost is None else cost.mean_seconds,
        step_flops=None if cost is None else cost.mean_flops,
        num_parameters=parameters["backbone"],
        num_auxiliary_parameters=parameters["auxiliary"],
        reference=subject.reference,
        baseline=subject.baseline,
    )


def _runs_table(results: Mapping[str, Mapping[int, Mapping[str, Any]]], costs: Mapping[str, StepCosts]) -> str:
    """Every run as a line of CSV; the peak is empty where it was not measured."""
    columns = ("validation_accuracy", "test_accuracy", "guided_share", "steps", "seconds")
    buffer = io.StringIO()
    writer = csv.writer(buffer, lineterminator="\n")
    writer.writerow(["method", "seed", *columns, "peak_bytes"])
    for method, by_seed in results.items():
        peak = costs[method].total_peak_bytes if method in costs else ""
        for seed, result in by_seed.items():
            writer.writerow([method, seed, *(result[column] for column in columns), peak])
    return buffer.getvalue()


def _validation_curve(path: Path) -> tuple[float, ...]:
    """Validation accuracy after every epoch; without the file the report simply lacks the curve."""
    try:
        with path.open(encoding="utf-8", newline="") as file:
            return tuple(float(row["validation_accuracy"]) for row in csv.DictReader(file))
    except (OSError, ValueError, KeyError):
        return ()


def _options_text(options: Mapping[str, Any]) -> str:
    told = [f"{name} {value}" for name, value in options.items() if name != "method"]
    return re.sub(r"[{}']", "", ", ".join([options["method"], *told]))


def _facts(
    config: CompareConfig,
    data: DataBundle,
    results: Mapping[str, Mapping[int, Mapping[str, Any]]],
    diverged: Sequence[str],
    alike: Sequence[str],
    begun: Sequence[str],
) -> dict[str, str]:
    fit_config, first = config.fit, next(iter(next(iter(results.values())).values()))
    shape = " x ".join(map(str, data.shape))
    length = (
        f"{first['epochs']} epochs, {first['steps']} steps of {fit_config.batch_size * fit_config.accumulate} images"
    )
    seconds = sum(result["seconds"] for found in results.values() for result in found.values())
    shared = ", first steps in common counted for each" if begun else ""
    rule = _several(config, "rule") if "rule" in config.grid else repr(build_rule(fit_config))
    varied = [f"{name}: {', '.join(map(str, values))}" for name, values in config.grid.items()]
    varied += [f"{name} ({_options_text(config.variants[name])})" for name in config.methods if name in config.variants]
    device = first["device"]
    if device == "cpu":
        device += f" ({fit_config.num_threads or torch.get_num_threads()} threads, {platform.machine()})"
    return {
        "Data": f"{data.name}: {len(data.train):,} training, {len(data.validation):,} validation and "
        f"{len(data.test):,} test images of {shape}, {data.num_classes} classes",
        "Network": f"{_several(config, 'model')}, {_modules_text(config)}, local rule {rule}",
        "Guidance": f"{build_guidance(fit_config)!r}, auxiliary networks {fit_config.guidance.auxiliary}, "
        + ", ".join(f"{name} {value}" for name, value in guided_memory(fit_config).items()),
        "Training": f"{length}; {fit_config.optimizer}, lr {fit_config.lr:g}, "
        f"weight decay {fit_config.weight_decay:g}, schedule {fit_config.schedule}",
        **({"Varied": "; ".join(varied)} if varied else {}),
        "Seeds": ", ".join(map(str, config.seeds)),
        **(
            {"Compiled": "yes; memory, but for that on CUDA, and FLOPs are of the same steps without torch.compile"}
            if fit_config.compile
            else {}
        ),
        **({"Trained once": ", ".join(alike) + " (recomputation changes no result)"} if alike else {}),
        **({"First steps in common": ", ".join(begun)} if begun else {}),
        **({"Diverged": "; ".join(diverged)} if diverged else {}),
        "Device": f"{device}, {first['precision']}",
        "Versions": _versions(),
        "Time of all runs": (f"{seconds / 60:.1f} minutes" if seconds >= 60 else f"{seconds:.0f} seconds") + shared,
    }
