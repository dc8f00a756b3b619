"""Options of the command: recipes, configuration dataclasses as command line options, and mistakes as one sentence."""

from __future__ import annotations

import dataclasses
import difflib
import json
import os
import re
import types
import typing
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from importlib import resources
from pathlib import Path
from typing import Any

import yaml
from jsonargparse import SUPPRESS, ActionConfigFile, ArgumentError, ArgumentParser, Namespace
from jsonargparse import DefaultHelpFormatter as _HelpFormatter

from torchlocal.sizes import check_plain, shorten

__all__ = [
    "Option",
    "add_config_option",
    "add_option",
    "build_config",
    "config_options",
    "inline_recipes",
    "make_parser",
    "parse",
    "read_recipe",
    "recipe_names",
    "recipe_options",
    "recipe_path",
    "suggestion",
    "with_dashes",
]

_CONFIG_HELP = (
    "Recipe: a YAML file with any of the options below (underscores for dashes), or the name of a shipped one (see "
    "`torchlocal recipes`); options on the command line win over it."
)
_KINDS = {int: "a whole number", float: "a number", bool: "true or false", str: "text", type(None): "null"}


# --- recipes ---


def recipe_names() -> list[str]:
    """Names of the recipes shipped with the package."""
    folder = resources.files("torchlocal") / "recipes"
    return sorted(entry.name.removesuffix(".yaml") for entry in folder.iterdir() if entry.name.endswith(".yaml"))


def recipe_path(name: str) -> Path:
    """Path of a recipe given as a file or as the name of a shipped one.

    Raises:
        ValueError: there is neither such a file nor such a recipe.
    """
    try:
        if Path(name).is_file():
            return Path(name)
    except OSError as error:
        raise ValueError(f"recipe {shorten(name)} cannot be read ({error.strerror}): give another name") from error
    names = recipe_names()
    if name in names:
        return Path(str(resources.files("torchlocal") / "recipes" / f"{name}.yaml"))
    if Path(name).is_dir():
        raise ValueError(f"recipe {name} is a folder: give a YAML file or a shipped recipe ({', '.join(names)})")
    raise ValueError(
        f"recipe {name} is neither a file nor shipped{suggestion(name, names)}: give a YAML file or {', '.join(names)}"
    )


def read_recipe(name: str) -> dict[str, Any]:
    """Content of a recipe given as a file or as the name of a shipped one.

    Raises:
        ValueError: it does not exist, or is not YAML that holds options.
    """
    path = recipe_path(name)
    try:
        content = yaml.safe_load(path.read_text(encoding="utf-8"))
    except RecursionError as error:
        raise ValueError(f"recipe {name} holds brackets in brackets without end: correct the file") from error
    except (yaml.YAMLError, ValueError, OverflowError) as error:  # a date that does not exist is a ValueError
        mark = getattr(error, "problem_mark", None)
        where = f" (line {mark.line + 1})" if mark else ""
        raise ValueError(f"recipe {name} is not valid YAML{where}: correct the file") from error
    if content is None:
        return {}
    if not isinstance(content, dict):
        raise ValueError(f"recipe {name} must hold options as `name: value` lines, not a {type(content).__name__}")
    for key, value in content.items():
        check_plain(f"recipe {name}: {key}", value)
    return content


def recipe_options(
    name: str, *, section: str | None, known: Mapping[str, Option], ignored: Sequence[str]
) -> dict[str, Any]:
    """Options of a recipe, nested ones with dots, as one command reads them.

    Args:
        name: File, or name of a shipped recipe.
        section: Section (`compare:`) whose options win over the others; every other section is skipped.
        known: Options the command has.
        ignored: Options other commands have, which are left out without a word.

    Raises:
        ValueError: an option is unknown.
    """
    content = read_recipe(name)
    own = content.pop("compare", None) or {}
    if not isinstance(own, Mapping):
        raise ValueError(f"recipe {name}: compare must be a section of `name: value` lines, got {own!r}")
    options = _flatten(content, name)
    if section == "compare":
        options |= _flatten(own, name)
    for key in options:
        if key not in known and (key not in ignored or (section == "compare" and key in own)):
            raise ValueError(f"recipe {name}: unknown option {key}{suggestion(key, list(known))}")
    # A list of one may be written without brackets.
    return {
        key: [value] if _item_kind(known[key].kind) and not isinstance(value, list | None) else value
        for key, value in options.items()
        if key in known
    }


def _flatten(content: Mapping[Any, Any], name: str, prefix: str = "") -> dict[str, Any]:
    flat: dict[str, Any] = {}
    for key, value in content.items():
        if prefix + str(key) == "guidance":  # the only nested configuration
            if not isinstance(value, Mapping):
                raise ValueError(
                    f"recipe {name}: guidance must hold `name: value` lines such as `period: 5`, got {value!r}"
                )
            flat |= _flatten(value, name, "guidance.")
        else:
            flat[prefix + str(key)] = value
    return flat


def suggestion(name: str, names: Sequence[str]) -> str:
    """` (did you mean ...?)` if a name comes close, else nothing."""
    close = difflib.get_close_matches(name, names, n=1)
    return f" (did you mean {close[0]}?)" if close else ""


# --- configuration dataclasses as options ---


@dataclass(frozen=True)
class Option:
    """One field of a configuration: its name with dots (`guidance.period`), type, default and one sentence of help."""

    name: str
    kind: Any
    default: Any
    help: str


def config_options(cls: type, prefix: str = "") -> dict[str, Option]:
    """The fields of a configuration dataclass by name, with the help of its docstring's `Args:`."""
    hints, texts = typing.get_type_hints(cls), _argument_help(cls)
    options: dict[str, Option] = {}
    for field in dataclasses.fields(cls):
        kind, name = hints[field.name], prefix + field.name
        if dataclasses.is_dataclass(kind):
            assert isinstance(kind, type)
            options |= config_options(kind, f"{name}.")
            continue
        default = field.default if field.default_factory is dataclasses.MISSING else field.default_factory()
        options[name] = Option(name, kind, default, texts.get(field.name, ""))
    return options


def _argument_help(cls: type) -> dict[str, str]:
    lines = (cls.__doc__ or "").splitlines()
    start = next((i for i, line in enumerate(lines) if line.strip() == "Args:"), len(lines))
    texts: dict[str, str] = {}
    name, level = "", None
    for line in lines[start + 1 :]:
        indent = len(line) - len(line.lstrip())
        if not line.strip() or (level is not None and indent < level):
            break
        level = indent if level is None else level
        match = re.match(r"\s*(\w+): (.*)", line)
        if match and indent == level:
            name, texts[match[1]] = match[1], match[2]
        else:
            texts[name] += " " + line.strip()
    # A sentence for people at a prompt: null is what they write for None.
    return {key: text[:1].upper() + re.sub(r"\bNone\b", "null", text[1:]) for key, text in texts.items()}


def add_config_option(parser: ArgumentParser) -> None:
    """Add `--config`, whose recipe `inline_recipes` has replaced by its content."""
    parser.add_argument("--config", action=ActionConfigFile, metavar="RECIPE", help=_CONFIG_HELP)


def add_option(group: Any, option: Option) -> None:
    """Add one field of a configuration; a list takes its elements one after the other."""
    flag, item = with_dashes("--" + option.name), _item_kind(option.kind)
    text = option.help or SUPPRESS
    if item is not None:
        default = None if option.default is None else list(option.default)
        group.add_argument(flag, type=item, nargs="+", default=default, metavar=_metavar(item), help=text)
    else:
        kind = dict if typing.get_origin(option.kind) in (Mapping, dict) else option.kind
        group.add_argument(flag, type=kind, default=option.default, metavar=_metavar(kind), help=text)


def _members(kind: Any) -> tuple[Any, ...]:
    return typing.get_args(kind) if isinstance(kind, types.UnionType) else (kind,)


def _item_kind(kind: Any) -> Any | None:
    """Element type of a list (`list[str] | None` gives `str`), None for anything else."""
    for member in _members(kind):
        origin = typing.get_origin(member)
        if isinstance(origin, type) and issubclass(origin, Sequence):
            return typing.get_args(member)[0]
    return None


def _describe_kind(kind: Any) -> str:
    if item := _item_kind(kind):
        return _KINDS[item] if item is not str else "names"
    return " or ".join(_KINDS.get(member, "options as {name: value}") for member in _members(kind))


def _metavar(kind: Any) -> str:
    members = _members(kind)
    if bool in members:
        return "true|false"
    names = ["N"] if int in members or float in members else []
    names += ["TEXT"] if str in members else []
    return "|".join(names) or "{...}"


def build_config(cls: type, values: Mapping[str, Any]) -> Any:
    """An instance of a configuration dataclass from parsed values; what is absent keeps its default."""
    hints = typing.get_type_hints(cls)
    arguments: dict[str, Any] = {}
    for field in dataclasses.fields(cls):
        if field.name not in values:
            continue
        value, kind = values[field.name], hints[field.name]
        if dataclasses.is_dataclass(kind):
            assert isinstance(kind, type)
            value = build_config(kind, value)
        elif isinstance(value, list) and typing.get_origin(kind) is tuple:
            value = tuple(value)
        arguments[field.name] = value
    return cls(**arguments)


# --- parsing ---


class _Formatter(_HelpFormatter):
    """Help in the width of the terminal, up to 110 columns, without Python's type names."""

    def __init__(self, prog: str) -> None:
        super().__init__(prog, max_help_position=30, width=min(110, _num_columns()) - 2)

    def _expand_help(self, action: Any) -> str:
        text = super()._expand_help(action)
        text = re.sub(r"\((?:required, )?type: .*?(?:, default: (.*))?\)$", r"(default: \1)", text)
        text = re.sub(r" ?\(default: (null|False|\[\]|\{\}|)\)$", "", text)
        # As they are typed on the command line: a list without brackets, true in lower case.
        return re.sub(r"\(default: (\[.*\]|True)\)$", lambda match: _as_typed(match[0]), text)


def _as_typed(text: str) -> str:
    return text.replace("True", "true") if "[" not in text else re.sub(r"[\[\]',]", "", text)


def _num_columns() -> int:
    try:
        return int(os.environ.get("COLUMNS") or os.get_terminal_size().columns)
    except (OSError, ValueError):  # not a terminal
        return 100


def make_parser(command: str, usage: str, description: str) -> ArgumentParser:
    """A parser for one command."""
    parser = ArgumentParser(
        prog=f"torchlocal {command}",
        usage=f"torchlocal {command} {usage}",
        description=description,
        formatter_class=_Formatter,
        exit_on_error=False,
        add_help=False,
        print_config=None,
        allow_abbrev=False,  # else `compare --seed 3` is `--seeds 3`
    )
    parser.add_argument("-h", "--help", action="help", help="Show this.")
    return parser


def with_dashes(token: str) -> str:
    """`--batch_size=3` as `--batch-size=3`: recipes and Python write the underscore, so the command takes both."""
    if not token.startswith("--"):
        return token
    name, equals, value = token.partition("=")
    return name.replace("_", "-") + equals + value


def inline_recipes(argv: Sequence[str], load: Callable[[str], dict[str, Any]]) -> list[str]:
    """Replace the name after every `--config` by the options that `load` reads from it, as JSON."""
    result: list[str] = []
    tokens = iter(argv)
    for token in tokens:
        name = None
        if token == "--config":
            name = next(tokens, None)
            if name is None:
                raise ValueError("--config needs a value: a YAML file or the name of a shipped recipe")
        elif token.startswith("--config="):
            name = token.removeprefix("--config=")
        if name is None:
            result.append(token)
        elif options := load(name):
            result += ["--config", json.dumps(_nest(options))]
    return result


def _nest(options: Mapping[str, Any]) -> dict[str, Any]:
    nested: dict[str, Any] = {}
    for key, value in options.items():
        *stems, last = key.split(".")
        target = nested
        for stem in stems:
            target = target.setdefault(stem, {})
        target[last] = value
    return nested


def parse(parser: ArgumentParser, argv: Sequence[str], options: Mapping[str, Option] | None = None) -> Namespace:
    """Parse the arguments of one command.

    Raises:
        ValueError: a mistake in them, told in one sentence.
    """
    try:
        return parser.parse_args(list(argv))
    except RecursionError as error:
        raise ValueError("an option holds brackets in brackets without end: write it in fewer levels") from error
    except (ArgumentError, TypeError) as error:
        flags = [flag for action in parser._actions for flag in action.option_strings if flag.startswith("--")]
        raise ValueError(_explain(str(error), options or {}, flags)) from error


def _explain(message: str, options: Mapping[str, Option], flags: Sequence[str]) -> str:
    """The parser's complaint, which may take many lines, in one sentence of ours."""
    if match := re.search(r'Parser key "([\w.-]+)"(?: element \d+)?:', message):
        name = match[1]
        values = re.findall(r"(?:Got|Given) value: (.*)", message)
        if name in options:
            kind = _describe_kind(options[name].kind)
        else:
            expected = re.search(r"Expected an? <class '(\w+)'>", message)
            told = {kind.__name__: text for kind, text in _KINDS.items()}
            kind = told.get(expected[1] if expected else "", "another value")
        several = name in options and _item_kind(options[name].kind) and values and "," in values[-1]
        hint = "; several are separated by spaces" if several else ""
        return (
            f"{with_dashes('--' + name)} expects {kind}" + (f", got {shorten(values[-1])!r}" if values else "") + hint
        )
    if match := re.search(r"unrecognized arguments: (\S+)", message):
        flag = match[1].partition("=")[0]
        flag = shorten(flag)
        if flag.startswith("-"):
            return f"unknown option {flag}{suggestion(flag, flags)}; --help lists all"
        return f"unexpected argument {flag!r}: options start with --"
    if match := re.search(r"argument (--[\w.-]+)[^:]*: expected (?:one|at least one) argument", message):
        return f"{match[1]} needs a value"
    if match := re.search(r'Key "(\w+)" is required|arguments are required: (\w+)', message):
        return f"{(match[1] or match[2]).upper()} is missing; --help shows the usage"
    return " ".join(message.split())
