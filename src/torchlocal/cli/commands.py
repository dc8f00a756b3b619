"""The `torchlocal` command: fit, evaluate, generate, compare, partition, plan, export, recipes."""

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
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from dataclasses import replace
from functools import partial
from importlib import metadata
from pathlib import Path
from typing import TYPE_CHECKING, Any

from torchlocal.checks import parse_size, shorten, suggestion
from torchlocal.cli.options import (
    Parser,
    read_recipe,
    recipe_names,
    recipe_options,
    recipe_path,
    with_dashes,
)
from torchlocal.lifetime import end_with_parent, on_signals, unbroken_streams
from torchlocal.names import DECODERS, TEXT, check_names
from torchlocal.run.config import FitConfig, Option, declared, fit_options, sections
from torchlocal.run.folder import expand

if TYPE_CHECKING:
    from rich.console import Console

    from torchlocal.data import DataBundle

__all__ = ["main"]

# torch is imported inside the commands, so that wrong options are told at once.

_DESCRIPTION = "Train a network as gradient-isolated local modules, with the global objective reinstated periodically."
_COMMANDS = {
    "fit": "Train one network: end-to-end, locally, or with periodic guidance.",
    "evaluate": "Tell the accuracy of a run, on text its perplexity, also by depth through every auxiliary network.",
    "generate": "Continue a text with a network that was trained on text.",
    "compare": "Train by several methods and seeds; report accuracy, of text loss, memory and time side by side.",
    "partition": "Show where a network is cut into local modules and what each unit costs.",
    "plan": "Predict what every way to train takes, and recommend one that fits into a memory budget.",
    "export": "Write the trained backbone as safetensors, .pt, a torch.export program, or a folder for transformers.",
    "recipes": "List the shipped recipes, or print one.",
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
_NETWORK, _RULE = ("model", "model_options"), ("rule", "auxiliary", "rule_options")
_DATA = ("data", "data_root", "image_size", "context", "tokenizer")
_TIMEOUT = 300.0  # seconds
_OF_A_RUN = ("last.pt", "result.json")
_LAUNCHER = "TORCHLOCAL_LAUNCHER"  # set by `parallel.launch`, which is not imported for --help


class _Terminated(BaseException):
    """A signal ended a command that has nothing to save."""

    def __init__(self, signum: int) -> None:
        super().__init__()
        self.signum = signum


def _add_run_options(
    parser: Parser, names: Collection[str] | None = None, changed: Mapping[str, Option] | None = None
) -> dict[str, Option]:
    """Add the options of a run, or some of them, section by section; some of them with another default or help."""
    chosen = {name: one for name, one in fit_options().items() if names is None or name in names} | dict(changed or {})
    for section, kind in sections().items():
        if found := [one for one in chosen.values() if one.path.startswith(f"{section}.")]:
            parser.add(*found, title=kind.title)
    return chosen


def _parse_run(
    parser: Parser, argv: Sequence[str], options: Mapping[str, Option], *, section: str | None = None
) -> dict[str, Any]:
    """Parse options that may come from recipes; those of other commands in a recipe are left out."""
    known = {one.path for one in options.values()}
    others = [one for one in fit_options().values() if one.path not in known]
    # A command's own option may bear the short name of a run's, as that of a folder does.
    ignored = {one.path for one in others} | {one.name for one in others if one.name not in options}
    return parser.parse(argv, lambda name: recipe_options(name, section=section, known=options, ignored=ignored))


def _config(values: Mapping[str, Any]) -> FitConfig:
    """The configuration of a run from parsed values, others left out."""
    return FitConfig.of(**{name: value for name, value in values.items() if name in fit_options()})


def _console() -> Console:
    from rich.console import Console

    return Console(width=None if sys.stdout.isatty() else 140)


# --- commands ---


def _fit(argv: Sequence[str]) -> int:
    parser = Parser("fit", "[--config RECIPE] [options]", _COMMANDS["fit"])
    parser.recipes()
    parser.switch(
        "resume",
        "Continue the interrupted run in --out where it stopped; --resume FOLDER: the run in that folder, with the "
        "configuration that lies there.",
    )
    parser.switch("quiet", "Show no progress.")
    parser.add(
        Option(name="ranks", kind=int, help="Share the local modules out to N processes (torchrun)."),
        Option(name="machines", kind=int, default=1, help="Machines that share the ranks, each with this command."),
        Option(name="machine", kind=int, default=0, help="Number of this machine, from 0."),
        Option(name="meet", help="Address of machine 0 and a free port there, such as 10.0.0.1:29500."),
        Option(name="timeout", kind=float, default=_TIMEOUT, help="Seconds that a process waits for a silent one."),
    )
    values = _parse_run(parser, _at_folder(argv), _add_run_options(parser))
    config = _config(values)
    _check_names(config)
    out = expand(config.run.out)
    begins = values["resume"] and not any((out / name).exists() for name in _OF_A_RUN)
    if begins:
        _refuse_moved(argv, out, "config.yaml", _OF_A_RUN, "fit --resume {}")
    if values["machines"] > 1 and values["ranks"] is None:
        raise ValueError(f"--machines {values['machines']}: give the number of all their processes as --ranks")
    if values["ranks"] is not None and "TORCHELASTIC_RUN_ID" not in os.environ:
        if values["ranks"] < 1 or values["ranks"] % config.run.replicas:
            raise ValueError(
                f"--ranks {values['ranks']} must be a multiple of --replicas {config.run.replicas}, at least 1"
            )
        if values["ranks"] > 1:
            os.environ.setdefault("TORCH_CPP_LOG_LEVEL", "FATAL")  # else tries to connect are told beside the sentence
            from torchlocal.parallel.launch import launch
            from torchlocal.parallel.setup import assign

            machines = _machines(values)
            num_modules = len(config.cut.after) + 1 if config.cut.after else config.cut.modules
            if isinstance(num_modules, int):  # too many ranks are refused here, and not by each of them
                assign([1.0] * num_modules, values["ranks"] // config.run.replicas)
            with _continue_with(lambda: _resume_command(config, values), ChildProcessError):
                return launch(
                    ["fit", *argv],
                    values["ranks"],
                    num_threads=config.run.num_threads,
                    machines=machines,
                    timeout=values["timeout"],
                )

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
        writes = Team(config.run.replicas).writes
    if not writes:
        return 0
    test = f"accuracy {100 * result['test_accuracy']:.2f} %" if "text" not in result else _perplexity(result)
    print(
        f"Test {test} after {result['steps']} steps, "
        f"{100 * result['guided_share']:.0f} % of them guided, in {result['seconds']:.0f} s. "
        f"Run folder: {config.run.out}"
    )
    return 0


def _machines(values: Mapping[str, Any]) -> Any:
    """The machines that share the ranks; None if it is this one alone."""
    count = values["machines"]
    if count == 1 and values["meet"] is None and values["machine"] == 0:
        return None
    from torchlocal.parallel.machines import Machines

    machines = Machines.of(count, values["machine"], values["meet"])
    if values["ranks"] % count:
        raise ValueError(f"--ranks {values['ranks']} must be a multiple of --machines {count}, which have as many each")
    return machines


def _perplexity(result: Mapping[str, Any]) -> str:
    """What a run on text has come to, in words."""
    bits = result.get("test_bits_per_byte")
    told = "beyond counting" if result["test_perplexity"] is None else f"{result['test_perplexity']:.2f}"
    return f"perplexity {told}" + (f" ({bits:.3f} bits per byte)" if bits is not None else "")


def _check_names(config: FitConfig) -> None:
    if "torch" not in sys.modules:  # else what looks them up tells it as fast
        check_names(
            model=config.model.name,
            data=config.data.name,
            device=config.run.device,
            optimizer=config.optimisation.optimizer,
        )


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
    """The command that resumes a run, if it has begun; None in ranks that a launcher started, which tells it itself."""
    out = expand(config.run.out)
    try:
        if FitConfig.of(**read_recipe(str(out / "config.yaml"))) != config:
            return None
    except (ValueError, OSError, TypeError):
        return None
    command = f"fit --resume {_quoted(out)}"
    if _rank() is not None:
        return None if _LAUNCHER in os.environ else f"`-m torchlocal {command}` in the same torchrun command"
    if (values["ranks"] or 1) > 1:
        command += f" --ranks {values['ranks']}"
        if values["machines"] > 1:
            names = ("machines", "machine", "meet")
            command += "".join(f" --{name} {shlex.quote(str(values[name]))}" for name in names)
        command += f" --timeout {values['timeout']:g}" if values["timeout"] != _TIMEOUT else ""
    return f"`torchlocal {command}`"


def _compare(argv: Sequence[str]) -> int:
    from torchlocal.compare.methods import CompareConfig

    if "--resume" in argv:
        raise ValueError("--resume: a comparison always goes on where it was; leave it out")
    parser = Parser("compare", "[--config RECIPE] [options]", _COMMANDS["compare"])
    parser.recipes()
    parser.switch("quiet", "Show no progress.")
    own = {one.name: one for one in declared(CompareConfig)}
    parser.add(*own.values(), title="comparison")
    run = _add_run_options(parser, set(fit_options()) - {"out", "seed"})
    values = _parse_run(parser, argv, own | run, section="compare")
    chosen: dict[str, Any] = {name: values[name] for name in own}
    chosen |= {name: tuple(value) for name, value in chosen.items() if isinstance(value, list)}
    config = CompareConfig(**chosen, fit=_config({name: values[name] for name in run}))
    _check_names(config.fit)

    from torchlocal.compare.comparison import compare
    from torchlocal.compare.report import terminal_table
    from torchlocal.compare.verdict import verdict

    out = expand(config.out)
    if not (out / "compare.yaml").exists():
        _refuse_moved(argv, out, "compare.yaml", ("*/seed*/last.pt",), "compare --config {}/compare.yaml --out {}")
    path = out / "compare.yaml"
    with _continue_with(lambda: f"`torchlocal compare --config {_quoted(path)}`" if path.is_file() else None):
        comparison = compare(config, progress=not values["quiet"])
    for sentence in verdict(comparison):
        _console().print(sentence, style="bold")
    _console().print(terminal_table(comparison))
    print(f"Report: {out / 'report.html'}")
    return 0


def _evaluate(argv: Sequence[str]) -> int:
    parser = Parser("evaluate", "RUN [options]", _COMMANDS["evaluate"])
    parser.word("run", "Folder of a run, or one of its checkpoints.")
    parser.add(
        Option(name="split", default="test", help="test, validation or train."),
        fit_options()["device"],
        Option(name="data_root", kind=str | None, help="Folder of the data set's files; by default the run's."),
    )
    parser.switch("json", "Print JSON instead of the table.")
    values = parser.parse(argv)
    split = values["split"]
    if split not in ("test", "validation", "train"):
        raise ValueError(f"--split {split} is unknown: choose test, validation or train")

    from torchlocal.compare.tables import depth_table, perplexity_table
    from torchlocal.run.evaluation import evaluate

    result = evaluate(expand(values["run"]), split, device=values["device"], data_root=values["data_root"])
    if values["json"]:
        print(json.dumps(result, indent=2))
    else:
        table = perplexity_table if "perplexity" in result else depth_table
        _console().print(table(result, split=split))
    return 0


def _generate(argv: Sequence[str]) -> int:
    parser = Parser("generate", "RUN [options]", _COMMANDS["generate"])
    parser.word("run", "Folder of a run on text, or one of its checkpoints.")
    parser.add(
        Option(name="prompt", default="", help="How the text begins."),
        Option(name="length", kind=int, default=200, help="Largest number of tokens that follow."),
        Option(name="temperature", kind=float, default=1.0, help="Scores are divided by it; 0: the most likely token."),
        Option(name="top_k", kind=int | None, help="Draw from so many most likely tokens only."),
        Option(name="seed", kind=int, default=0, help="Seed of the draws."),
        fit_options()["device"],
    )
    values = parser.parse(argv)

    from torchlocal.run.generation import generate

    run, prompt = expand(values.pop("run")), values.pop("prompt")
    print(generate(run, prompt, **values))
    return 0


def _partition(argv: Sequence[str]) -> int:
    parser = Parser("partition", "[--config RECIPE] [options]", _COMMANDS["partition"])
    parser.recipes()
    options = _add_run_options(parser, {*_NETWORK, *_RULE, *_DATA, "modules", "cuts", "batch_size"})
    parser.add(
        Option(name="shape", kind=list[int] | None, help="Channels, height and width in pixels."),
        Option(name="num_classes", kind=int, default=10, help="Number of classes, used with --shape."),
        title="images (in place of --data, which need not be there then)",
    )
    values = _parse_run(parser, argv, options)
    shape, num_classes = values["shape"], values["num_classes"]
    if shape is not None and (len(shape) != 3 or min(shape) < 1):
        raise ValueError(f"--shape {' '.join(map(str, shape))} must be channels, height and width, such as 3 32 32")
    config = _config(values)
    _check_names(config)
    batch_size = config.optimisation.batch_size
    _check_sizes(num_classes, shape or [], batch_size)

    from torchlocal.compare.tables import partition_tables
    from torchlocal.data import TextBundle
    from torchlocal.network import decouple
    from torchlocal.run.build import make_optimizer, resolve_execution
    from torchlocal.run.config import build_rule
    from torchlocal.run.own import Own

    data = _sizes(config, shape, num_classes)
    net = decouple(
        Own().make_model(config, data),
        modules=None if config.cut.after else config.cut.modules,
        cuts=config.cut.after,
        sample=_sample(data, batch_size),
        rule=build_rule(config),
        optimizer=partial(make_optimizer, config),
        autocast=resolve_execution(config).autocast,
    )
    example = "row of text" if isinstance(data, TextBundle) else "image"
    console = _console()
    for table in partition_tables(net, batch_size=batch_size, title=config.model.name, example=example):
        console.print(table)
    return 0


def _sizes(config: FitConfig, shape: Sequence[int] | None, num_classes: int) -> DataBundle:
    """What a network and its batches need to know of data, which are read only where their name does not tell it."""
    from torchlocal.data import DataBundle
    from torchlocal.data.text import text_sizes
    from torchlocal.run.own import Own

    name = config.data.name.removeprefix("pairs:")
    text = shape is None and name.startswith(TEXT)
    for option in ("image_size",) if text else ("context", "tokenizer"):
        if config.value(option) is not None:
            kind = "images: leave it out" if text else "text: leave it out, or give data such as text:stdlib"
            raise ValueError(f"{option}={config.value(option)!r} is for {kind}")
    if text:
        return text_sizes(name, context=config.data.context, tokenizer=config.data.tokenizer)
    if shape is None and name in _SHAPES:
        num_classes, *shape = _SHAPES[name]
        shape[2] *= 2 if name != config.data.name else 1
    elif shape is None:
        return Own().load(config)
    channels, height, width = shape
    nothing: Any = None
    return DataBundle(
        name="images",
        train=nothing,
        validation=nothing,
        test=nothing,
        num_classes=num_classes,
        shape=(channels, height, width),
    )


def _sample(data: DataBundle, batch_size: int) -> Any:
    """A batch of exactly that size, or the shape of one."""
    sample = data.sample(batch_size)  # of two examples at least
    return (batch_size, *sample[1:]) if isinstance(sample, tuple) else sample[:batch_size]


def _plan(argv: Sequence[str]) -> int:
    parser = Parser("plan", "[--config RECIPE] [--model NAME --input 3x224x224] [options]", _COMMANDS["plan"])
    parser.recipes()
    of_run = fit_options()
    own = (
        Option(
            name="input",
            kind=str | None,
            metavar="CxHxW",
            help="Images: channels, height and width, in place of --data (default: 3x32x32).",
        ),
        Option(name="num_classes", kind=int | None, help="Images: number of classes, with --input (default: 10)."),
        Option(name="budget", kind=str | None, metavar="SIZE", help="Memory there is, such as 8GiB or 500MB."),
        Option(name="modules", kind=list[str] | None, help="Numbers of modules, fewest or all."),
        Option(
            name="guided_share", path="guidance.share", kind=float, default=0.2, help="Share of guided steps of PGL."
        ),
        Option(name="precision", path="run.precision", default="fp32", help="fp32, bf16, or auto: that of a run here."),
        Option(name="figure", kind=str | None, metavar="FILE", help="Draw the breakdowns as stacked bars."),
    )
    parser.add(*own)
    parser.switch("json", "Print JSON instead of the table.")
    run = _add_run_options(
        parser,
        {*_NETWORK, *_RULE, *_DATA, "scores", "batch_size", "optimizer"},
        changed={
            "model": replace(of_run["model"], default="resnet32"),
            "data": replace(of_run["data"], default=None, kind=str | None),
            "optimizer": replace(
                of_run["optimizer"],
                default=None,
                kind=str | None,
                help="Whose state is counted: sgd, adamw, or a class of torch.optim; by default SGD with momentum.",
            ),
        },
    )
    values = _parse_run(parser, argv, {one.name: one for one in own} | run)
    config = _config({name: values[name] for name in run if values[name] is not None})
    _check_names(config)
    name, batch_size = config.model.name, config.optimisation.batch_size
    shape = None
    if values["data"] is not None and values["input"] is None:
        if values["num_classes"] is not None:
            raise ValueError(f"--num-classes means nothing to data {config.data.name!r}, which tell it: leave it out")
    elif values["data"] is not None and config.data.name.startswith(TEXT):
        raise ValueError(
            f"--input is the shape of images, and data {config.data.name!r} is text: leave one of them out"
        )
    else:
        shape = _image_shape(values["input"] or "3x32x32")
    if shape is not None and (name in DECODERS or name.startswith("hf:")):
        raise ValueError(f"model {name!r} predicts tokens: say of what text, such as --data text:stdlib --context 256")
    num_classes = 10 if values["num_classes"] is None else values["num_classes"]
    context = config.data.context or 1
    _check_sizes(num_classes, shape or [context], batch_size)
    if values["precision"] not in ("fp32", "bf16", "auto"):
        raise ValueError(f"--precision {values['precision']} is not for plan: choose fp32, bf16 or auto")
    words = ("fewest", "all")
    numbers = values["modules"] or ["2", "4", "8", "16", *words]
    wrong = [number for number in numbers if number not in words and not (number.isdigit() and int(number) > 1)]
    if wrong:
        raise ValueError(f"--modules {wrong[0]} must be a whole number of at least 2, fewest or all")
    budget = None if values["budget"] is None else parse_size(values["budget"])
    figure = None if values["figure"] is None else expand(values["figure"])
    if figure is not None:
        _check_figure(figure)

    import torch

    from torchlocal.budget import plan
    from torchlocal.compare.tables import plan_table
    from torchlocal.data import TextBundle
    from torchlocal.network import SGD_WITH_MOMENTUM, decouple
    from torchlocal.run.build import make_optimizer, resolve_execution
    from torchlocal.run.checkpoint import write_file
    from torchlocal.run.config import build_rule
    from torchlocal.run.own import Own

    data = _sizes(config, shape, num_classes)
    model = Own().make_model(config, data)
    decay = {"weight_decay": 0.0}  # takes no memory, and some optimizers refuse it
    counted = SGD_WITH_MOMENTUM if values["optimizer"] is None else partial(make_optimizer, config.changed(**decay))
    given: dict[str, Any] = {"rule": build_rule(config), "criterion": Own().make_criterion(config, data)}
    size = sum(parameter.nbytes for parameter in model.parameters())
    if budget is not None and budget < size:
        raise ValueError(
            f"--budget {values['budget']} is less than the {size / 2**20:.1f} MiB that the parameters of {name} "
            "take by themselves: give more, or a smaller network"
        )
    counts = [int(number) for number in numbers if number not in words]
    if values["modules"] and len(counts) == len(numbers):
        num_units = len(decouple(model, 1, sample=_sample(data, 2), **given).partition.units)
        if min(counts) > num_units:
            raise ValueError(
                f"--modules {' '.join(numbers)}: {name} can be cut into {num_units} at most; give fewer, or all"
            )
    with _bar(name) as progress:
        result = plan(
            model,
            _sample(data, batch_size),
            budget=budget,
            modules=[number if number in words else int(number) for number in numbers],
            guided_share=values["guided_share"],
            autocast={"fp32": None, "bf16": torch.bfloat16, "auto": resolve_execution(config).autocast}[
                values["precision"]
            ],
            progress=progress,
            optimizer=counted,
            **given,
        )
    absent = set(counts) - {row.modules for row in result.rows}
    if values["modules"] and absent:
        print(f"left out, since {name} has fewer units: {', '.join(map(str, sorted(absent)))}", file=sys.stderr)
    if values["json"]:
        print(result.to_json())
    else:
        rows = f" on rows of {data.context} tokens" if isinstance(data, TextBundle) else ""
        _console().print(plan_table(result, title=name + rows))
        print(result.recommendation)
    if figure is not None:
        image = io.BytesIO()
        result.figure().savefig(image, format=figure.suffix[1:].lower(), dpi=150)
        write_file(figure, image.getvalue())
    return 0


def _image_shape(text: str) -> list[int]:
    parts = text.lower().split("x")
    if len(parts) != 3 or not all(part.isdigit() and int(part) > 0 for part in parts):
        raise ValueError(f"--input {text} must be channels, height and width, such as 3x224x224")
    return [int(part) for part in parts]


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
    parser = Parser("export", "RUN --to FILE [options]", _COMMANDS["export"])
    parser.word("run", "Folder of a run, or one of its checkpoints.")
    parser.add(
        Option(
            name="to",
            kind=str | None,
            metavar="FILE",
            help="File to write: .safetensors or .pt for the backbone's state_dict, .pt2 for a torch.export program; "
            "or a folder, in the form of save_pretrained, for networks of transformers.",
        ),
        Option(name="weights", default="best", help="best (on validation images) or last, of a folder."),
    )
    parser.switch("overwrite", "Replace a file that exists.")
    values = parser.parse(argv)
    if values["to"] is None:
        raise ValueError("--to is missing: give the file to write, such as model.safetensors")

    from torchlocal.run.export import export

    path = export(
        expand(values["run"]), to=expand(values["to"]), weights=values["weights"], overwrite=values["overwrite"]
    )
    files = [file for file in path.iterdir() if file.is_file()] if path.is_dir() else [path]
    size = sum(file.stat().st_size for file in files)
    print(f"Wrote {path} ({size:,} bytes); loaded back, its outputs are the backbone's.")
    return 0


def _recipes(argv: Sequence[str]) -> int:
    parser = Parser("recipes", "[NAME]", _COMMANDS["recipes"])
    parser.word("name", "Recipe to print, to copy and change.", needed=False)
    name = parser.parse(argv)["name"]
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
    "generate": _generate,
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

    def leave(signum: int) -> None:  # by an exception, so that files are closed and temporary ones removed
        received.append(signum)
        raise KeyboardInterrupt if signum == signal.SIGINT else _Terminated(signum)

    with unbroken_streams():
        try:
            with on_signals(leave), _short_warnings():
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
    """Add the command that resumes to the message of an interruption, or of other exceptions, if there is one."""
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
        if os.environ.get("LOCAL_WORLD_SIZE") != os.environ.get("WORLD_SIZE") and os.environ.get("LOCAL_RANK") == "0":
            # Its terminal may be another machine's.
            print(f"torchlocal (rank {rank}): another rank has ended the run: {error}", file=sys.stderr, flush=True)
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
    text = text.strip().rstrip(".")
    end = "" if text.endswith("?") else "."
    print(f"torchlocal{f' (rank {rank})' if rank else ''}: {text}{end}", file=sys.stderr, flush=True)
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
