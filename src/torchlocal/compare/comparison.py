"""End-to-end, checkpointing, local and PGL side by side: the same network by several methods and seeds."""

from __future__ import annotations

import csv
import datetime
import io
import json
import math
import platform
import re
import statistics
import sys
import warnings
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import asdict, replace
from functools import partial
from pathlib import Path
from typing import Any

import torch
import yaml
from torch import Tensor, nn

from torchlocal import __version__ as torchlocal_version
from torchlocal.compare.circumstances import Measured, check_parts
from torchlocal.compare.costs import StepCosts, measure_costs
from torchlocal.compare.measures import Measure, measure_of
from torchlocal.compare.methods import METHODS, RIVALS, CompareConfig, Subject, method_configs
from torchlocal.compare.report import write_report
from torchlocal.compare.results import Comparison, MethodResult
from torchlocal.data import DataBundle, LoaderBundle, TextBundle
from torchlocal.run.branches import Branch, find_branches, first_alike
from torchlocal.run.build import resolve_execution
from torchlocal.run.checkpoint import check_same_config, write_config, write_file, write_json
from torchlocal.run.config import FitConfig, build_guidance, build_rule, guided_memory
from torchlocal.run.folder import Ownership, expand
from torchlocal.run.own import Own
from torchlocal.run.trainer import Diverged, train

__all__ = ["METHODS", "CompareConfig", "Subject", "compare", "method_configs"]


def compare(
    config: CompareConfig,
    *,
    model: nn.Module | Callable[[], nn.Module] | None = None,
    data: Any = None,
    criterion: Callable[[Tensor, Any], Tensor] | None = None,
    prediction: Callable[[Any], Tensor] | None = None,
    progress: bool = True,
) -> Comparison:
    """Train one network by several methods and seeds and write a report of how they compare.

    The network and the data are made by the names in the configuration, or handed in, as to
    :func:`torchlocal.fit`. They are judged by accuracy where targets are classes, else by the loss, of text also by
    perplexity: the epoch is chosen on validation data, and test data tell what it is worth.

    Finished runs are not repeated and an interrupted one is resumed, so calling it again completes it. Runs follow each
    other; all methods with one seed come before the next seed. What methods have in common is trained once: of those
    that differ only in what they recompute, such as end-to-end and checkpointing, the first; and the local steps with
    which methods begin that differ only in their guidance, such as local and PGL with the guided steps at the end
    (but what had passed them before). The results are those of each run by itself, bit for bit.

    Args:
        config: What to compare.
        model: A function that makes the network, called for each run after its seed is set; or a network, of which
            every run trains a copy, so that all begin with its weights.
        data: Loaders for "train", "validation" and "test".
        criterion: The loss; cross-entropy by default.
        prediction: Takes the prediction from what the network returns.
        progress: Whether to say on the standard error stream what is going on.

    Returns:
        The comparison; its report is `report.html`, `.md` and `.csv` in `config.out`.

    Raises:
        ValueError: a value cannot work, `config.out` holds runs of another configuration, or another process writes
            there.
    """
    out = expand(config.out)
    own = Own(model=model, data=data, criterion=criterion, prediction=prediction).copied()
    if own.model is not None:
        named = [name for name, options in {"grid": config.grid, **config.variants}.items() if "model" in options]
        if named:
            raise ValueError(f"{named[0]}: the network was handed in, so model means nothing there: leave it out")
    config = replace(config, fit=own.named(config.fit))
    with Ownership(out, config.out, inside=["figures"]):
        return _compare(config, own, out, progress)


def _compare(config: CompareConfig, own: Own, out: Path, progress: bool) -> Comparison:
    data = own.load(config.fit)
    if data.test is None:
        raise ValueError('data: a comparison reports what test data tell: give "test" as well')
    if config.reach is not None and config.reach > 1 and not isinstance(data, TextBundle | LoaderBundle):
        raise ValueError(f"reach={config.reach:g} must be an accuracy, above 0 and at most 1, such as 0.75")
    measured = Measured(
        out / "rivals.json", config.fit, data, own, rounds=config.timing_rounds, say=partial(_say, progress)
    )
    # Before anything is written or takes time; what the rivals get is measured first.
    known = [m for m in config.methods if config.variants.get(m, {}).get("method", m) not in RIVALS]
    for method, subject in method_configs(replace(config, methods=tuple(known)), measured).items() if known else ():
        for seed in config.seeds:
            folder = out / method / f"seed{seed}"
            _check_run_folder(subject.config.changed(out=str(folder), seed=seed), data.checksum)
    subjects = method_configs(config, measured)
    configs = {method: subject.config for method, subject in subjects.items()}
    firsts = first_alike(configs, out)
    runs = {
        (method, seed): configs[method].changed(out=str(out / method / f"seed{seed}"), seed=seed)
        for seed in config.seeds
        for method in configs
        if firsts[method] == method
    }
    for run in runs.values():
        _check_run_folder(run, data.checksum)
    if not all((Path(run.run.out) / "result.json").exists() for run in runs.values()):
        check_parts(configs, data, own)
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
    costs = _costs(out / "costs.json", configs, data, own, config, progress) if config.timing_rounds else {}
    trained: dict[str, dict[int, dict[str, Any]]] = {}
    diverged: list[str] = []
    for number, ((method, seed), run) in enumerate(runs.items(), start=1):
        finished = (Path(run.run.out) / "result.json").exists()
        _say(progress, f"run {number} of {len(runs)}: {method}, seed {seed}{' (finished before)' if finished else ''}")
        branches = [
            Branch(step=step, config=runs[other, seed]) for other, (trunk, step) in trunks.items() if trunk == method
        ]
        try:
            result = train(run, own, resume=True, progress=progress, branches=branches)
            if result[f"test_{measure_of(result).name}"] is None:
                raise Diverged("the loss on test data is NaN or infinite")
            trained.setdefault(method, {})[seed] = result
        except Diverged as error:  # a result too, and no reason to lose the other runs
            diverged.append(f"{method}, seed {seed}")
            warnings.warn(f"{method}, seed {seed}: {error}; it is left out of the table", stacklevel=2)
        except ValueError as error:
            raise ValueError(f"{method}, seed {seed}: {error}") from error
    results = {method: trained[firsts[method]] for method in configs if firsts[method] in trained}
    if not results:
        raise Diverged(
            f"every run diverged ({'; '.join(diverged)}): lower lr={config.fit.optimisation.lr:g}, or train in fp32"
        )
    measure = measure_of(next(iter(next(iter(trained.values())).values())))
    comparison = Comparison(
        title=f"{_several(config, 'model')} on {data.name}, {_modules_text(config)}",
        results=tuple(
            _method_result(method, subjects[method], found, measure, out / firsts[method], costs.get(method))
            for method, found in results.items()
        ),
        measure=measure,
        reach=config.reach,
        facts=(
            *_facts(config, data, trained, diverged, alike, begun).items(),
            ("Trained until", _last_day(runs.values())),
        ),
        configuration=yaml.safe_dump(_differing(config), sort_keys=False),
        command=_command(own),
        rounds=config.timing_rounds,
        device=resolve_execution(config.fit).device.type,
    )
    write_report(comparison, out)
    write_file(out / "runs.csv", _runs_table(trained, measure, costs))
    return comparison


def _say(progress: bool, text: str) -> None:
    if progress:
        print(text, file=sys.stderr, flush=True)


def _several(config: CompareConfig, name: str) -> str:
    """An option of all runs, or its values in the grid."""
    return ", ".join(map(str, config.grid.get(name, [config.fit.value(name)])))


def _modules_text(config: CompareConfig) -> str:
    if config.fit.cut.after is not None:
        return f"cut after {', '.join(config.fit.cut.after)}"
    words = {"all": "one local module per unit", "fewest": "as few local modules as take no more memory"}
    modules = _several(config, "modules")
    return words.get(modules, f"K = {modules}")


def _command(own: Own) -> str:
    if own == Own():
        return "torchlocal compare --config compare.yaml --out NEW_FOLDER"
    return "torchlocal.compare.compare(config, ...), handing in the same objects,"


def _check_run_folder(config: FitConfig, checksum: str) -> None:
    """Refuse a folder with a run of another configuration, or a finished one on data that have changed since.

    `fit` would refuse the first, too, but only when its turn comes; of a finished run it reads no data.
    """
    path = Path(config.run.out) / "config.yaml"
    if not path.is_file():
        return
    try:
        saved = yaml.safe_load(path.read_text(encoding="utf-8"))
    except (yaml.YAMLError, ValueError, RecursionError) as error:
        raise ValueError(f"{path} is damaged: delete the folder {path.parent} to train it again") from error
    if not isinstance(saved, dict) or not saved:
        raise ValueError(f"{path} is damaged: delete the folder {path.parent} to train it again")
    check_same_config(path, saved, config.plain())
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


def _plain(config: CompareConfig, *, public: bool = False) -> dict[str, Any]:
    """The configuration as a recipe: options of the runs, and the section that only `compare` reads.

    `public` leaves out where the data lie on this machine.
    """
    run = config.fit.plain()
    del run["run"]["out"], run["run"]["seed"]
    if public:
        del run["data"]["root"]
    section = {
        "out": config.out,
        "methods": list(config.methods),
        "seeds": list(config.seeds),
        "timing_rounds": config.timing_rounds,
    }
    if config.reach is not None:
        section["reach"] = config.reach
    if config.grid:
        section["grid"] = {name: list(values) for name, values in config.grid.items()}
    if config.variants:
        section["variants"] = json.loads(json.dumps({name: dict(value) for name, value in config.variants.items()}))
    return {**run, "compare": section}


def _differing(config: CompareConfig) -> dict[str, Any]:
    """What differs from the defaults, where the data lie on this machine left out."""
    told, defaults = _plain(config, public=True), _plain(CompareConfig())
    chosen = {}
    for section, options in told.items():
        # What lies in guidance depends on the schedule, whose name is told with it.
        kept = {key: value for key, value in options.items() if value != defaults[section].get(key, _ABSENT)}
        chosen[section] = {"name": options["name"], **kept} if section == "guidance" and kept else kept
    return {section: options for section, options in chosen.items() if options}


_ABSENT = object()


def _costs(
    path: Path, configs: Mapping[str, FitConfig], data: DataBundle, own: Own, config: CompareConfig, progress: bool
) -> dict[str, StepCosts]:
    """Measure what the steps cost, or read it if it was measured before under the same conditions."""
    key = {
        "executions": {method: repr(resolve_execution(fit_config)) for method, fit_config in configs.items()},
        "num_threads": torch.get_num_threads(),
        "machine": platform.machine(),
        "configs": {
            method: fit_config.changed(out="runs/fit", seed=0).plain() for method, fit_config in configs.items()
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
    firsts: dict[str, str] = {}
    kinds = {method: firsts.setdefault(_kind_of_step(fit_config), method) for method, fit_config in configs.items()}
    found = measure_costs({first: configs[first] for first in firsts.values()}, data, own, rounds=config.timing_rounds)
    costs = {method: found[first] for method, first in kinds.items()}
    write_json(path, {"key": key, "costs": {method: asdict(cost) for method, cost in costs.items()}})
    return costs


def _kind_of_step(config: FitConfig) -> str:
    """The same for methods that take the same steps, but other numbers of them."""
    if config.guidance.name in ("never", "always"):
        config = config.changed(epochs=1, steps=None, decay=None, warmup_epochs=0)
    return json.dumps(config.changed(out="runs/fit", seed=0).plain())


def _last_day(runs: Iterable[FitConfig]) -> str:
    """The day on which the last of the runs ended."""
    ends = [path.stat().st_mtime for run in runs if (path := Path(run.run.out) / "result.json").exists()]
    return datetime.date.fromtimestamp(max(ends)).isoformat() if ends else "-"


def _versions() -> str:
    return f"torchlocal {torchlocal_version}, torch {torch.__version__}, Python {platform.python_version()}"


def _method_result(
    method: str,
    subject: Subject,
    by_seed: Mapping[int, Mapping[str, Any]],
    measure: Measure,
    folder: Path,
    cost: StepCosts | None,
) -> MethodResult:
    results = list(by_seed.values())
    parameters = results[0]["num_parameters"]
    validation = f"validation_{measure.name}"
    curves = [_curves(folder / f"seed{seed}" / "metrics.csv", validation) for seed in by_seed]
    return MethodResult(
        method=method,
        num_modules=results[0]["num_modules"],
        guided_share=statistics.fmean(result["guided_share"] for result in results),
        test=tuple(result[f"test_{measure.name}"] for result in results),
        validation=tuple(curve[validation] for curve in curves),
        losses=tuple(curve["train_loss"] for curve in curves),
        epoch_steps=tuple(map(int, curves[0]["step"])),
        depth=tuple(
            tuple(math.nan if value is None else value for value in result[f"depth_{measure.name}"])
            for result in results
        ),
        further={name: tuple(result.get(name) for result in results) for name in (validation, *measure.of_runs)},
        peak_bytes=None if cost is None else cost.total_peak_bytes,
        step_seconds=None if cost is None else cost.mean_seconds,
        step_flops=None if cost is None else cost.mean_flops,
        num_parameters=parameters["backbone"],
        num_auxiliary_parameters=parameters["auxiliary"],
        reference=subject.reference,
        baseline=subject.baseline,
        rivals=subject.rivals,
        steps=results[0]["steps"],
    )


def _runs_table(
    results: Mapping[str, Mapping[int, Mapping[str, Any]]], measure: Measure, costs: Mapping[str, StepCosts]
) -> str:
    """Every run as a line of CSV; the peak is empty where it was not measured."""
    name = measure.name
    columns = (f"validation_{name}", f"test_{name}", *measure.of_runs, "guided_share", "steps", "seconds")
    buffer = io.StringIO()
    writer = csv.writer(buffer, lineterminator="\n")
    writer.writerow(["method", "seed", *columns, "peak_bytes"])
    for method, by_seed in results.items():
        peak = costs[method].total_peak_bytes if method in costs else ""
        for seed, result in by_seed.items():
            writer.writerow([method, seed, *(result.get(column) for column in columns), peak])
    return buffer.getvalue()


def _curves(path: Path, validation: str) -> dict[str, tuple[float, ...]]:
    """What was measured in every epoch; without the file the report simply lacks the curves."""
    names = ("step", "train_loss", validation)
    try:
        with path.open(encoding="utf-8", newline="") as file:
            rows = list(csv.DictReader(file))
            return {name: tuple(float(row[name]) for row in rows) for name in names}
    except (OSError, ValueError, KeyError):
        return dict.fromkeys(names, ())


def _options_text(options: Mapping[str, Any]) -> str:
    told = [f"{name} {value}" for name, value in options.items() if name != "method"]
    return re.sub(r"[{}']", "", ", ".join([options["method"], *told]))


def _data_text(data: DataBundle) -> tuple[str, str]:
    """What the data are, and what their examples are called."""
    if isinstance(data, LoaderBundle):
        batches = f"{len(data.train) // data.train.batch_size:,} training batches of {data.train.batch_size}"
        return f"{data.name}: {batches}", "images"
    if isinstance(data, TextBundle):
        rows = f"rows of {data.context} tokens"
        train, validation, test = (f"{split.num_rows:,}" for split in (data.train, data.validation, data.test))
        epoch = f" ({len(data.train):,} in an epoch)" if len(data.train) != data.train.num_rows else ""
        parts = f"{train} training{epoch}, {validation} validation and {test} test {rows}"
        return f"{data.name}: {data.told}; {parts}", rows
    parts = f"{len(data.train):,} training, {len(data.validation):,} validation and {len(data.test):,} test images"
    return f"{data.name}: {parts} of {' x '.join(map(str, data.shape))}, {data.num_classes} classes", "images"


def _facts(
    config: CompareConfig,
    data: DataBundle,
    results: Mapping[str, Mapping[int, Mapping[str, Any]]],
    diverged: Sequence[str],
    alike: Sequence[str],
    begun: Sequence[str],
) -> dict[str, str]:
    chosen = config.fit.optimisation
    fit_config, first = config.fit, next(iter(next(iter(results.values())).values()))
    told, examples = _data_text(data)
    length = f"{first['epochs']} epochs, {first['steps']} steps of {chosen.batch_size * chosen.accumulate} {examples}"
    if "equal-time" in results:
        length += f" (equal-time: {next(iter(results['equal-time'].values()))['steps']})"
    seconds = sum(result["seconds"] for found in results.values() for result in found.values())
    shared = ", first steps in common counted for each" if begun else ""
    rule = _several(config, "rule") if "rule" in config.grid else repr(build_rule(fit_config))
    varied = [f"{name}: {', '.join(map(str, values))}" for name, values in config.grid.items()]
    varied += [f"{name} ({_options_text(config.variants[name])})" for name in config.methods if name in config.variants]
    device = first.get("hardware", first["device"])  # older runs do not tell it
    return {
        "Data": told,
        "Network": f"{_several(config, 'model')}, {_modules_text(config)}, local rule {rule}",
        "Guidance": f"{build_guidance(fit_config)!r}, auxiliary networks {fit_config.guidance.auxiliary}, "
        + ", ".join(f"{name} {value}" for name, value in guided_memory(fit_config).items()),
        "Training": f"{length}; {chosen.optimizer}, lr {chosen.lr:g}, weight decay {chosen.weight_decay:g}, "
        f"schedule {chosen.schedule}",
        **({"Varied": "; ".join(varied)} if varied else {}),
        "Seeds": ", ".join(map(str, config.seeds)),
        **(
            {"Compiled": "yes; memory, but for that on CUDA, and FLOPs are of the same steps without torch.compile"}
            if fit_config.run.compile
            else {}
        ),
        **({"Trained once": ", ".join(alike) + " (recomputation changes no result)"} if alike else {}),
        **({"First steps in common": ", ".join(begun)} if begun else {}),
        **({"Diverged": "; ".join(diverged)} if diverged else {}),
        "Device": f"{device}, {first['precision']}",
        "Versions": _versions(),
        "Time of all runs": (f"{seconds / 60:.1f} minutes" if seconds >= 60 else f"{seconds:.0f} seconds") + shared,
    }
