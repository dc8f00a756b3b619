"""The `torchlocal` command: fit, evaluate, compare, partition, plan, export, recipes."""

from __future__ import annotations

import contextlib
import io
import json
import math
import os
import re
import shlex
import signal
import sys
import traceback
import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import replace
from importlib import metadata
from pathlib import Path
from types import FrameType
from typing import TYPE_CHECKING, Any

from torchlocal.cli.options import (
    Option,
    add_config_option,
    add_option,
    build_config,
    config_options,
    inline_recipes,
    make_parser,
    parse,
    read_recipe,
    recipe_names,
    recipe_options,
    recipe_path,
    suggestion,
    with_dashes,
)
from torchlocal.lifetime import STOPPING, end_with_parent, unbroken_streams
from torchlocal.names import check_names
from torchlocal.run.folder import expand
from torchlocal.sizes import parse_size, shorten

if TYPE_CHECKING:
    from jsonargparse import ArgumentParser
    from rich.console import Console

    from torchlocal.network import DecoupledNetwork
    from torchlocal.run.config import FitConfig

__all__ = ["main"]

# torch is imported inside the commands, so that wrong options are told at once.

_DESCRIPTION = "Train a network as gradient-isolated local modules, with the global objective reinstated periodically."
_COMMANDS = {
    "fit": "Train one network: end-to-end, locally, or with periodic guidance.",
    "evaluate": "Tell the accuracy of a run, also by depth through every auxiliary network.",
    "compare": "Train by several methods and seeds; report accuracy, memory and time side by side.",
    "partition": "Show where a network is cut into local modules and what each unit costs.",
    "plan": "Predict what every way to train takes, and recommend one that fits into a memory budget.",
    "export": "Write the trained backbone as safetensors, .pt or a torch.export program.",
    "recipes": "List the shipped recipes, or print one.",
}
# The options of a run by topic, in the order of the help; one that is in no topic joins the last.
_TOPICS: dict[str, tuple[str, ...]] = {
    "network and local modules": (
        "model", "modules", "cuts", "rule", "auxiliary", "rule_options", "label_smoothing",
    ),
    "guidance (which steps train on the global loss through all modules)": ("guidance", "memory", "recompute"),
    "data": ("data", "data_root", "num_train", "num_validation", "augment", "image_size", "num_workers"),
    "training": (
        "epochs", "steps", "batch_size", "accumulate", "optimizer", "lr", "momentum", "weight_decay", "schedule",
        "decay", "warmup_epochs", "milestones", "gamma", "clip", "seed",
    ),
    "machine": ("device", "precision", "replicas", "channels_last", "compile", "num_threads"),
    "run folder": ("out", "log_every", "checkpoint_every", "tensorboard"),
}  # fmt: skip


# Where the docstring, which speaks to a programmer, is too short for a reader of --help.
_HELP = {
    "rule": "Local rule, which makes auxiliary networks and losses: greedy, dgl, predsim, infopro, auglocal or man.",
    "rule_options": "Options of the local rule as {name: value}, for example '{depth: 3}' for auglocal.",
    "data": "Data set: fashion-mnist-small (shipped), digits, fashion-mnist, cifar10, cifar100, svhn, stl10, folder "
    "(class folders under --data-root), or pairs:NAME for pairs of images labelled with the sum of their classes.",
    "data_root": "Folder of the data set's files; by default ~/.cache/torchlocal, where absent ones are downloaded to.",
    "momentum": "Momentum, of optimizers that have it.",
    "weight_decay": "Weight decay, of optimizers that have it.",
    "device": "Where to compute: auto, cpu, cuda, cuda:1 or mps.",
    "precision": "What to compute in: fp32, bf16, fp16, or auto for bf16 where the device has it in hardware.",
    "channels_last": "Keep images channels last in memory; by default where bf16 is used.",
    "num_threads": "Number of CPU threads; by default torch's own choice.",
}
# Classes, channels, height and width, so that `partition` need not download what it only wants the shape of.
_SHAPES = {
    "fashion-mnist-small": (10, 1, 14, 14),
    "digits": (10, 1, 8, 8),
    "fashion-mnist": (10, 1, 28, 28),
    "cifar10": (10, 3, 32, 32),
    "cifar100": (100, 3, 32, 32),
    "svhn": (10, 3, 32, 32),
    "stl10": (10, 3, 96, 96),
}


_NO_MEMORY = re.compile(r"out of memory|[Cc]an't allocate memory|[Cc]annot allocate memory|not enough memory")
_MOST_OF_ONE, _MOST_BYTES = 2**24, 2**50  # of classes, channels, height or width; of the images of a batch
_TIMEOUT = 300.0  # seconds
_OF_A_RUN = ("last.pt", "result.json")
_LAUNCHER = "TORCHLOCAL_LAUNCHER"  # set by `parallel.launch`, which is not imported for --help


class _Terminated(BaseException):
    """A signal asked to leave where there was no run to save."""

    def __init__(self, signum: int) -> None:
        super().__init__()
        self.signum = signum


def _add_run_options(parser: ArgumentParser, options: Mapping[str, Option]) -> None:
    topics = {name: topic for topic, names in _TOPICS.items() for name in names}
    groups: dict[str, list[Option]] = {topic: [] for topic in _TOPICS}
    for name, option in options.items():
        groups[topics.get(name.split(".")[0], "run folder")].append(option)
    for topic, chosen in groups.items():
        group = parser.add_argument_group(topic) if chosen else None
        for option in chosen:
            add_option(group, replace(option, help=_HELP.get(option.name, option.help)))


def _parse_run(
    parser: ArgumentParser, argv: Sequence[str], options: Mapping[str, Option], *, section: str | None = None
) -> dict[str, Any]:
    """Parse options that may come from recipes; those of other commands in a recipe are left out."""
    from torchlocal.run.config import FitConfig

    ignored = [name for name in config_options(FitConfig) if name not in options]

    def load(name: str) -> dict[str, Any]:
        return recipe_options(name, section=section, known=options, ignored=ignored)

    values: dict[str, Any] = parse(parser, inline_recipes(argv, load), options).as_dict()
    return values


def _console() -> Console:
    from rich.console import Console

    return Console(width=None if sys.stdout.isatty() else 140)


# --- commands ---


def _fit(argv: Sequence[str]) -> int:
    from torchlocal.run.config import FitConfig

    options = config_options(FitConfig)
    parser = make_parser("fit", "[--config RECIPE] [options]", _COMMANDS["fit"])
    add_config_option(parser)
    parser.add_argument(
        "--resume",
        action="store_true",
        help="Continue the interrupted run in --out where it stopped; --resume FOLDER: the run in that folder, with "
        "the configuration that lies there.",
    )
    parser.add_argument("--quiet", action="store_true", help="Show no progress.")
    parser.add_argument("--ranks", type=int, metavar="N", help="Share the local modules out to N processes (torchrun).")
    parser.add_argument(
        "--timeout", type=float, default=_TIMEOUT, metavar="N", help="Seconds that a process waits for a silent one."
    )
    _add_run_options(parser, options)
    values = _parse_run(parser, _at_folder(argv), options)
    config = build_config(FitConfig, values)
    _check_names(config)
    out = expand(config.out)
    begins = values["resume"] and not any((out / name).exists() for name in _OF_A_RUN)
    if begins:
        _refuse_moved(argv, out, "config.yaml", _OF_A_RUN, "fit --resume {}")
    if values["ranks"] is not None and "TORCHELASTIC_RUN_ID" not in os.environ:
        if values["ranks"] < 1 or values["ranks"] % config.replicas:
            raise ValueError(
                f"--ranks {values['ranks']} must be a multiple of --replicas {config.replicas}, at least 1"
            )
        if values["ranks"] > 1:
            from torchlocal.parallel.launch import launch
            from torchlocal.parallel.setup import assign

            num_modules = len(config.cuts) + 1 if config.cuts else config.modules
            if isinstance(num_modules, int):  # too many ranks are refused here, and not by each of them
                assign([1.0] * num_modules, values["ranks"] // config.replicas)
            with _continue_with(lambda: _resume_command(config, values), ChildProcessError):
                return launch(["fit", *argv], values["ranks"], num_threads=config.num_threads)

    if begins and not values["quiet"] and _rank() in (None, "0"):
        print(f"nothing to resume in {out}: starting", file=sys.stderr)

    from torchlocal.parallel.team import Team, process_group, restarted
    from torchlocal.run.trainer import fit

    with (
        _continue_with(lambda: _resume_command(config, values)),
        process_group(values["timeout"]),
    ):
        result = fit(
            config,
            resume=values["resume"] or restarted(),
            progress=not values["quiet"],
            timeout=values["timeout"],
        )
        writes = Team(config.replicas).writes
    if not writes:
        return 0
    print(
        f"Test accuracy {100 * result['test_accuracy']:.2f} % after {result['steps']} steps, "
        f"{100 * result['guided_share']:.0f} % of them guided, in {result['seconds']:.0f} s. Run folder: {config.out}"
    )
    return 0


def _check_names(config: FitConfig) -> None:
    if "torch" not in sys.modules:  # else what looks them up tells it as fast
        check_names(model=config.model, data=config.data, device=config.device, optimizer=config.optimizer)


def _at_folder(argv: Sequence[str]) -> list[str]:
    """`--resume FOLDER` as the options of the run that lies there, wherever it was trained."""
    words = list(argv)
    for i, word in enumerate(words):
        name = word.removeprefix("--resume=") if word.startswith("--resume=") else None
        if word == "--resume" and i + 1 < len(words) and not words[i + 1].startswith("-"):
            name = words.pop(i + 1)
        if name is None:
            continue
        words[i] = "--resume"
        folder = expand(name)
        if any(other == "--out" or other.startswith("--out=") for other in words):
            raise ValueError(f"--resume {name} and --out: the run goes on in the folder where it lies; leave --out out")
        if not (folder / "config.yaml").is_file():
            if (folder / "compare.yaml").is_file():
                command = f"torchlocal compare --config {_quoted(folder / 'compare.yaml')} --out {_quoted(folder)}"
                raise ValueError(f"--resume {name} is the folder of a comparison: go on with `{command}`")
            raise ValueError(
                f"--resume {name}: there is no {folder / 'config.yaml'}; give the folder of a run, or the options of "
                "the run beside --out"
            )
        return ["--config", str(folder / "config.yaml"), *words, "--out", str(folder)]
    return words


def _refuse_moved(argv: Sequence[str], out: Path, name: str, of_a_run: Sequence[str], command: str) -> None:
    """Refuse to begin anew in a folder where nothing is, with the configuration of a run that has been moved."""
    given = [after.removeprefix("--config=") for word, after in _pairs(argv) if word == "--config"]
    if not given or any(word == "--out" for word, _ in _pairs(argv)):
        return
    path = Path(given[-1])
    if path.name != name or path.parent.resolve() == out.resolve():
        return
    if any(found for pattern in of_a_run for found in path.parent.glob(pattern)):
        told = command.format(*[_quoted(path.parent)] * command.count("{}"))
        raise ValueError(f"{path} is of a run that was moved here from {out}: go on with `torchlocal {told}`")


def _pairs(argv: Sequence[str]) -> list[tuple[str, str]]:
    """Every option with the word that follows it, or its value behind the equals sign."""
    return [
        (word.partition("=")[0], word.partition("=")[2] if "=" in word else after)
        for word, after in zip(argv, [*argv[1:], ""], strict=True)
    ]


def _quoted(path: Path) -> str:
    return shlex.quote(str(path))


def _resume_command(config: FitConfig, values: Mapping[str, Any]) -> str | None:
    """How to go on with a run, if it has begun; the ranks that a launcher started leave it to that to say."""
    from torchlocal.run.config import config_to_dict

    out = expand(config.out)
    try:
        saved = read_recipe(str(out / "config.yaml"))
    except (ValueError, OSError):
        return None
    if saved != config_to_dict(config):
        return None
    command = f"fit --resume {_quoted(out)}"
    if _rank() is not None:
        return None if _LAUNCHER in os.environ else f"`-m torchlocal {command}` in the same torchrun command"
    if (values["ranks"] or 1) > 1:
        command += f" --ranks {values['ranks']}"
        command += f" --timeout {values['timeout']:g}" if values["timeout"] != _TIMEOUT else ""
    return f"`torchlocal {command}`"


def _compare(argv: Sequence[str]) -> int:
    from torchlocal.compare.methods import CompareConfig
    from torchlocal.run.config import FitConfig

    if "--resume" in argv:
        raise ValueError("--resume: a comparison always goes on where it was; leave it out")
    own = {name: option for name, option in config_options(CompareConfig).items() if not name.startswith("fit.")}
    run = {name: option for name, option in config_options(FitConfig).items() if name not in ("out", "seed")}
    parser = make_parser("compare", "[--config RECIPE] [options]", _COMMANDS["compare"])
    add_config_option(parser)
    parser.add_argument("--quiet", action="store_true", help="Show no progress.")
    group = parser.add_argument_group("comparison")
    for option in own.values():
        add_option(group, option)
    _add_run_options(parser, run)
    values = _parse_run(parser, argv, own | run, section="compare")
    fit_values = {name: value for name, value in values.items() if name != "out"}
    config = build_config(CompareConfig, {**values, "fit": fit_values})
    _check_names(config.fit)

    from torchlocal.compare.comparison import compare
    from torchlocal.compare.report import terminal_table

    out = expand(config.out)
    if not (out / "compare.yaml").exists():
        _refuse_moved(argv, out, "compare.yaml", ("*/seed*/last.pt",), "compare --config {}/compare.yaml --out {}")
    path = out / "compare.yaml"
    with _continue_with(lambda: f"`torchlocal compare --config {_quoted(path)}`" if path.is_file() else None):
        comparison = compare(config, progress=not values["quiet"])
    _console().print(terminal_table(comparison))
    print(f"Report: {out / 'report.html'}")
    return 0


def _evaluate(argv: Sequence[str]) -> int:
    parser = make_parser("evaluate", "RUN [options]", _COMMANDS["evaluate"])
    parser.add_argument("run", type=str, metavar="RUN", help="Folder of a run, or one of its checkpoints.")
    parser.add_argument("--split", type=str, default="test", metavar="NAME", help="test, validation or train.")
    parser.add_argument("--device", type=str, default="auto", metavar="NAME", help=_HELP["device"])
    parser.add_argument(
        "--data-root", type=str, metavar="FOLDER", help="Folder of the data set's files; by default the run's."
    )
    parser.add_argument("--json", action="store_true", help="Print JSON instead of the table.")
    values = parse(parser, argv)
    if values.split not in ("test", "validation", "train"):
        raise ValueError(f"--split {values.split} is unknown: choose test, validation or train")

    from torchlocal.compare.tables import depth_table
    from torchlocal.run.trainer import evaluate

    result = evaluate(expand(values.run), split=values.split, device=values.device, data_root=values.data_root)
    if values.json:
        print(json.dumps(result, indent=2))
    else:
        _console().print(depth_table(result, split=values.split))
    return 0


def _partition(argv: Sequence[str]) -> int:
    from torchlocal.run.config import FitConfig

    stems = {"model", "modules", "cuts", "rule", "auxiliary", "rule_options"}
    stems |= {"data", "data_root", "image_size", "batch_size"}
    options = {name: option for name, option in config_options(FitConfig).items() if name in stems}
    parser = make_parser("partition", "[--config RECIPE] [options]", _COMMANDS["partition"])
    add_config_option(parser)
    _add_run_options(parser, options)
    group = parser.add_argument_group("images (in place of --data, which need not be there then)")
    group.add_argument("--shape", type=int, nargs="+", metavar="N", help="Channels, height and width in pixels.")
    group.add_argument("--num-classes", type=int, default=10, metavar="N", help="Number of classes, used with --shape.")
    values = _parse_run(parser, argv, options)
    shape = values["shape"]
    if shape is not None and (len(shape) != 3 or min(shape) < 1):
        raise ValueError(f"--shape {' '.join(map(str, shape))} must be channels, height and width, such as 3 32 32")

    config = build_config(FitConfig, {name: value for name, value in values.items() if name in options})
    _check_names(config)
    _check_sizes(values["num_classes"], shape or [], config.batch_size)

    from torchlocal.compare.tables import partition_tables

    net = _decouple(config, shape, values["num_classes"])
    console = _console()
    for table in partition_tables(net, batch_size=config.batch_size, title=config.model):
        console.print(table)
    return 0


def _decouple(config: FitConfig, shape: Sequence[int] | None, num_classes: int) -> DecoupledNetwork:
    """The network of a run, for a batch that is never made; data are read only if their shape is not known."""
    from torchlocal.data import load_data
    from torchlocal.models import build_model
    from torchlocal.network import decouple
    from torchlocal.run.config import build_rule

    name = config.data.removeprefix("pairs:")
    if shape is None and name in _SHAPES:
        num_classes, *shape = _SHAPES[name]
        shape[2] *= 2 if name != config.data else 1
    elif shape is None:
        data = load_data(config.data, root=config.data_root, image_size=config.image_size)
        num_classes, shape = data.num_classes, data.shape
    channels, height, width = shape
    model = build_model(config.model, num_classes=num_classes, in_channels=channels, image_size=(height, width))
    return decouple(
        model,
        modules=None if config.cuts else config.modules,
        cuts=config.cuts,
        sample=(config.batch_size, channels, height, width),
        rule=build_rule(config),
    )


def _plan(argv: Sequence[str]) -> int:
    from torchlocal.run.config import FitConfig

    options = {
        n: option for n, option in config_options(FitConfig).items() if n in ("rule", "auxiliary", "rule_options")
    }
    parser = make_parser("plan", "--model NAME --input 3x224x224 [options]", _COMMANDS["plan"])
    parser.add_argument("--model", type=str, default="resnet32", metavar="NAME", help="Network, as in fit.")
    parser.add_argument("--input", type=str, default="3x32x32", metavar="CxHxW", help="Channels, height and width.")
    parser.add_argument("--num-classes", type=int, default=10, metavar="N", help="Number of classes.")
    parser.add_argument("--batch-size", type=int, default=128, metavar="N", help="Examples per step.")
    parser.add_argument("--budget", type=str, metavar="SIZE", help="Memory there is, such as 8GiB or 500MB.")
    parser.add_argument("--modules", type=str, nargs="+", metavar="N", help="Numbers of modules, fewest or all.")
    parser.add_argument("--guided-share", type=float, default=0.2, metavar="N", help="Share of guided steps of PGL.")
    parser.add_argument("--precision", type=str, default="fp32", metavar="NAME", help="fp32 or bf16.")
    parser.add_argument("--json", action="store_true", help="Print JSON instead of the table.")
    parser.add_argument("--figure", type=str, metavar="FILE", help="Draw the breakdowns as stacked bars.")
    _add_run_options(parser, options)
    values = parse(parser, argv, options)
    config = build_config(FitConfig, {"model": values.model, **{name: values[name] for name in options}})
    _check_names(config)
    parts = values.input.lower().split("x")
    if len(parts) != 3 or not all(part.isdigit() and int(part) > 0 for part in parts):
        raise ValueError(f"--input {values.input} must be channels, height and width, such as 3x224x224")
    if values.batch_size < 1:
        raise ValueError(f"--batch-size {values.batch_size} must be at least 1")
    _check_sizes(values.num_classes, [int(part) for part in parts], values.batch_size)
    if values.precision not in ("fp32", "bf16"):
        raise ValueError(f"--precision {values.precision} is unknown: choose fp32 or bf16")
    words = ("fewest", "all")
    numbers = values.modules or ["2", "4", "8", "16", *words]
    wrong = [number for number in numbers if number not in words and not (number.isdigit() and int(number) > 1)]
    if wrong:
        raise ValueError(f"--modules {wrong[0]} must be a whole number of at least 2, fewest or all")
    budget = None if values.budget is None else parse_size(values.budget)
    if values.figure is not None:
        _check_figure(expand(values.figure))

    import torch

    from torchlocal.budget import plan
    from torchlocal.compare.tables import plan_table
    from torchlocal.models import build_model
    from torchlocal.network import decouple
    from torchlocal.run.checkpoint import write_file
    from torchlocal.run.config import build_rule

    channels, height, width = map(int, parts)
    model = build_model(values.model, num_classes=values.num_classes, in_channels=channels, image_size=(height, width))
    size = sum(parameter.nbytes for parameter in model.parameters())
    if budget is not None and budget < size:
        raise ValueError(
            f"--budget {values.budget} is less than the {size / 2**20:.1f} MiB that the parameters of {values.model} "
            "take by themselves: give more, or a smaller network"
        )
    counts = [int(number) for number in numbers if number not in words]
    if values.modules and len(counts) == len(numbers):
        sample = (2, channels, height, width)
        num_units = len(decouple(model, 1, sample=sample, rule=build_rule(config)).partition.units)
        if min(counts) > num_units:
            raise ValueError(
                f"--modules {' '.join(numbers)}: {values.model} can be cut into {num_units} at most; give fewer, or all"
            )
    with _bar(values.model) as progress:
        result = plan(
            model,
            (values.batch_size, channels, height, width),
            budget=budget,
            modules=[number if number in words else int(number) for number in numbers],
            guided_share=values.guided_share,
            autocast=torch.bfloat16 if values.precision == "bf16" else None,
            progress=progress,
            rule=build_rule(config),
        )
    absent = set(map(int, set(numbers) - set(words))) - {row.modules for row in result.rows}
    if values.modules and absent:
        print(f"left out, since {values.model} has fewer units: {', '.join(map(str, sorted(absent)))}", file=sys.stderr)
    if values.json:
        print(result.to_json())
    else:
        _console().print(plan_table(result, title=values.model))
        print(result.recommendation)
    if values.figure is not None:
        path, image = Path(expand(values.figure)), io.BytesIO()
        result.figure().savefig(image, format=path.suffix[1:].lower(), dpi=150)
        write_file(path, image.getvalue())
    return 0


def _check_sizes(num_classes: int, shape: Sequence[int], batch_size: int) -> None:
    """Refuse what no machine holds: now, and not after torch has tried."""
    for what, sizes in (("--num-classes", [num_classes]), ("channels, height and width", shape)):
        if max(sizes, default=1) > _MOST_OF_ONE:
            raise ValueError(f"{what}: {max(sizes)} is more than {_MOST_OF_ONE:,}: make it smaller")
    if batch_size * math.prod(shape or [1]) * 4 > _MOST_BYTES:
        raise ValueError(f"--batch-size {batch_size} makes a batch of more than a pebibyte: make it smaller")


@contextlib.contextmanager
def _bar(title: str) -> Iterator[Callable[[float], object] | None]:
    """A progress bar on the standard error stream, where that is a terminal, as a function of the share done."""
    from rich.console import Console
    from rich.progress import BarColumn, Progress, TaskProgressColumn, TextColumn, TimeElapsedColumn

    console = Console(stderr=True)
    if not console.is_terminal:
        yield None
        return
    columns = TextColumn("{task.description}"), BarColumn(), TaskProgressColumn(), TimeElapsedColumn()
    with Progress(*columns, console=console, transient=True) as bar:
        task = bar.add_task(f"predicting {title}", total=1.0)
        yield lambda share: bar.update(task, completed=share)


def _check_figure(path: Path) -> None:
    """Refuse a figure that cannot be written: now, not after the work."""
    if path.suffix.lower() not in (".png", ".pdf", ".svg"):
        raise ValueError(f"--figure {path} must end in .png, .pdf or .svg")
    if path.is_dir():
        raise ValueError(f"--figure {path} is a folder: give the name of a file")
    if not path.parent.is_dir():
        raise ValueError(f"--figure {path}: there is no folder {path.parent}; make it first")


def _export(argv: Sequence[str]) -> int:
    parser = make_parser("export", "RUN --to FILE [options]", _COMMANDS["export"])
    parser.add_argument("run", type=str, metavar="RUN", help="Folder of a run, or one of its checkpoints.")
    parser.add_argument(
        "--to",
        type=str,
        metavar="FILE",
        help="File to write: .safetensors or .pt for the backbone's state_dict, .pt2 for a torch.export program.",
    )
    parser.add_argument(
        "--weights", type=str, default="best", metavar="NAME", help="best (on validation images) or last, of a folder."
    )
    parser.add_argument("--overwrite", action="store_true", help="Replace a file that exists.")
    values = parse(parser, argv)
    if values.to is None:
        raise ValueError("--to is missing: give the file to write, such as model.safetensors")

    from torchlocal.run.export import export

    path = export(expand(values.run), to=expand(values.to), weights=values.weights, overwrite=values.overwrite)
    print(f"Wrote {path} ({path.stat().st_size:,} bytes); loaded back, its outputs are the backbone's.")
    return 0


def _recipes(argv: Sequence[str]) -> int:
    parser = make_parser("recipes", "[NAME]", _COMMANDS["recipes"])
    parser.add_argument("name", type=str, nargs="?", metavar="NAME", help="Recipe to print, to copy and change.")
    name = parse(parser, argv).name
    if name:
        print(recipe_path(name).read_text(encoding="utf-8"), end="")
        return 0
    names = recipe_names()
    width = max(map(len, names))
    for name in names:
        title = recipe_path(name).read_text(encoding="utf-8").splitlines()[0].removeprefix("# ")
        print(f"{name:<{width}}  {title}")
    print("\nRun one with `torchlocal compare --config NAME` or `torchlocal fit --config NAME`.")
    return 0


_RUNNERS: dict[str, Callable[[Sequence[str]], int]] = {
    "fit": _fit,
    "evaluate": _evaluate,
    "compare": _compare,
    "partition": _partition,
    "plan": _plan,
    "export": _export,
    "recipes": _recipes,
}


# --- entry ---


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command.

    Args:
        argv: arguments after the program's name, `sys.argv[1:]` by default.

    Returns:
        The exit code: 0; 2 after a mistake of the user's; 128 and the number of a signal that ended it (130 after
        Ctrl-C); 1 after other errors.
    """
    arguments = [with_dashes(token) for token in (sys.argv[1:] if argv is None else argv)]
    debug = "--debug" in arguments
    arguments = [argument for argument in arguments if argument != "--debug"]
    if _rank() is not None:
        if not debug:
            os.environ.setdefault("TORCH_CPP_LOG_LEVEL", "FATAL")  # else stacks of C++ beside the sentence
        end_with_parent(int(os.environ[_LAUNCHER]) if _LAUNCHER in os.environ else None)
    received: list[int] = []
    with unbroken_streams():
        try:
            with _signals(received), _short_warnings():
                return _run(arguments)
        except SystemExit as error:  # --help
            return error.code if isinstance(error.code, int) else 0
        except BaseException as error:
            if debug:
                traceback.print_exc()
            code = _report_error(error, received)
    if _rank() is not None:  # a thread that waits for a rank that is lost would keep the process
        os._exit(code)
    return code


def _rank() -> str | None:
    """The number of this process among several that torchrun started."""
    return os.environ.get("RANK") if int(os.environ.get("WORLD_SIZE", "1")) > 1 else None


def _run(arguments: Sequence[str]) -> int:
    if not arguments or arguments[0] in ("--help", "-h"):
        print(_help())
        return 0
    command = arguments[0]
    if command == "--version":
        print(f"torchlocal {_version()}")
        return 0
    if command not in _RUNNERS:
        what = "option" if command.startswith("-") else "command"
        raise ValueError(
            f"unknown {what} {command!r}{suggestion(command, list(_RUNNERS))}: choose a command, {', '.join(_RUNNERS)}"
        )
    if _rank() is not None and command != "fit":
        raise ValueError(f"{command} runs as one process: start it without torchrun")
    return _RUNNERS[command](arguments[1:])


def _help() -> str:
    width = max(map(len, _COMMANDS))
    return "\n".join(
        [
            "usage: torchlocal COMMAND [options]",
            "",
            _DESCRIPTION,
            "",
            "commands:",
            *(f"  {name:<{width}}  {text}" for name, text in _COMMANDS.items()),
            "",
            "options:",
            "  --help     Show this, or after a command its options.",
            "  --version  Show the version.",
            "  --debug    Show the traceback of an error.",
            "",
            "A first run, in a few minutes and without a download: torchlocal compare --config demo",
        ]
    )


def _version() -> str:
    try:
        return metadata.version("torchlocal")
    except metadata.PackageNotFoundError:  # run from a checkout
        import torchlocal

        return torchlocal.__version__


@contextlib.contextmanager
def _signals(received: list[int]) -> Iterator[None]:
    """Leave by an exception at a signal, so that files are closed and temporary ones removed; notes which came."""

    def leave(signum: int, frame: FrameType | None) -> None:
        received.append(signum)
        raise KeyboardInterrupt if signum == signal.SIGINT else _Terminated(signum)

    previous = {}
    for signum in STOPPING:
        with contextlib.suppress(ValueError):  # not the main thread: signals are not ours
            if signal.getsignal(signum) not in (signal.SIG_IGN, None):  # ignored on purpose, as under nohup
                previous[signum] = signal.signal(signum, leave)
    try:
        yield
    finally:
        for signum, handler in previous.items():
            signal.signal(signum, handler)


@contextlib.contextmanager
def _short_warnings() -> Iterator[None]:
    """Show a warning as one line without the place in our source, which says nothing to a reader at a prompt."""
    previous = warnings.formatwarning
    warnings.formatwarning = lambda message, *rest, **options: f"torchlocal: warning: {message}\n"
    try:
        yield
    finally:
        warnings.formatwarning = previous


@contextlib.contextmanager
def _continue_with(command: Callable[[], str | None], *others: type[BaseException]) -> Iterator[None]:
    """Add to an interruption, and to other exceptions, how to go on, where there is something to go on with."""
    try:
        yield
    except BaseException as error:
        if (_interruption(error) or isinstance(error, others)) and (told := command()):
            error.add_note(f"Continue with {told}.")
        raise


def _interruption(error: BaseException) -> int | None:
    """Exit code of an interruption, None for an error."""
    if isinstance(error, KeyboardInterrupt):
        return 130
    if isinstance(error, _Terminated) or type(error).__name__ in (
        "Interrupted",
        "Stopped",
    ):  # the trainer's, launcher's
        return 128 + int(getattr(error, "signum", signal.SIGINT))
    return None


def _report_error(error: BaseException, received: Sequence[int] = ()) -> int:
    """Tell an error in one sentence on the standard error stream, and choose the exit code.

    Args:
        error: what ended the command.
        received: signals before: an import that is interrupted may fail with another error.
    """
    code = _interruption(error)
    rank = _rank()
    if type(error).__name__ == "Elsewhere":  # of several ranks, the one that made the mistake tells it
        return 2
    text = " ".join(" ".join([str(error), *getattr(error, "__notes__", [])]).split())
    if code is None and received and not isinstance(error, (ValueError, OSError)):
        code, text = 128 + received[0], ""
    if code is not None and not str(error):
        if rank not in (None, "0") or (rank and _LAUNCHER in os.environ):
            return code  # one of all tells it
        signum = signal.Signals(code - 128)
        told = {signal.SIGINT: "Interrupted", signal.SIGTERM: "Terminated"}.get(signum, f"Stopped by {signum.name}")
        text = f"{told}. {text}"
    elif code is not None:
        pass
    elif foreign := _foreign(error):
        code, text = 2, foreign
    elif isinstance(error, (ValueError, OSError)) or type(error).__name__ == "PeerLost":
        code = 2
    else:
        code = 1
        text = f"{type(error).__name__}: {text or 'no message'} (--debug shows the traceback)"
    print(f"torchlocal{f' (rank {rank})' if rank else ''}: {text.strip().rstrip('.')}.", file=sys.stderr, flush=True)
    return code


def _foreign(error: BaseException) -> str | None:
    """What an error of Python or of torch means, in words of ours; None: it is told as it is."""
    if isinstance(error, OSError) and error.strerror and str(error).startswith("[Errno"):
        return f"{shorten(str(error.filename), 100)}: {error.strerror}" if error.filename else error.strerror
    text = str(error)
    if isinstance(error, (RuntimeError, TypeError, OverflowError)) and "verflow" in text:
        return "a number is larger than torch can count: make the sizes smaller"
    if isinstance(error, MemoryError) or (isinstance(error, RuntimeError) and _NO_MEMORY.search(text)):
        asked = re.search(r"allocate (\d[\d.]* ?\w+)", text)
        return (
            f"there is not enough memory{f' for another {asked[1]}' if asked else ''}: make the batch or the network "
            "smaller, or see what `torchlocal plan` recommends"
        )
    return None
