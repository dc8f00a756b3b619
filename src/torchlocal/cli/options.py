"""Options of the command: declared ones as flags, recipes, and mistakes as one sentence."""

from __future__ import annotations

import argparse
import contextlib
import difflib
import os
import types
import typing
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from importlib import resources
from pathlib import Path
from typing import Any, NoReturn

import yaml

from torchlocal.checks import check_plain, shorten
from torchlocal.run.config import Option

__all__ = [
    "Parser",
    "read_recipe",
    "recipe_names",
    "recipe_options",
    "recipe_path",
    "suggestion",
    "with_dashes",
]

_CONFIG_HELP = (
    "Recipe: a YAML file with any of the options below, in sections (optimisation: {lr: 0.1}) or flat (lr: 0.1), or "
    "the name of a shipped one (see `torchlocal recipes`); options on the command line win over it."
)
_KINDS = {int: "a whole number", float: "a number", bool: "true or false", str: "text", types.NoneType: "null"}


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
    name: str, *, section: str | None, known: Mapping[str, Option], ignored: Collection[str] = ()
) -> dict[str, Any]:
    """Options of a recipe by short name, as one command reads them.

    Args:
        name: File, or name of a shipped recipe.
        section: Section (`compare:`) whose options win over the others; every other section is skipped.
        known: Options the command has.
        ignored: Short names and paths of options of other commands, which are left out without a word.

    Raises:
        ValueError: an option is unknown, or its value is of another kind.
    """
    content = read_recipe(name)
    own = content.pop("compare", None) or {}
    if not isinstance(own, Mapping):
        raise ValueError(f"recipe {name}: compare must be a section of `name: value` lines, got {own!r}")
    paths = {one.path: one.name for one in known.values() if one.path} | {key: key for key in known}
    sections = {path.partition(".")[0] for path in [*paths, *ignored] if "." in path}
    found: dict[str, Any] = {}
    for given, skips in ((content, ignored), (own if section == "compare" else {}, ())):
        for key, value in _flat(given, sections, paths, name):
            if key in paths:
                one = known[paths[key]]
                found[one.name] = read_value(one, value)
            elif key not in skips:
                raise ValueError(f"recipe {name}: unknown option {key}{suggestion(key, list(paths))}")
    return found


def _flat(
    content: Mapping[Any, Any], sections: Collection[str], paths: Collection[str], name: str
) -> Iterator[tuple[str, Any]]:
    for key, value in content.items():
        if key in sections and isinstance(value, Mapping):
            yield from ((f"{key}.{inner}", it) for inner, it in value.items())
        elif key in sections and key not in paths:
            raise ValueError(
                f"recipe {name}: {key} must hold `name: value` lines such as "
                f"`{next((path.partition('.')[2] for path in paths if path.startswith(f'{key}.')), 'name')}: 5`, "
                f"got {value!r}"
            )
        else:
            yield str(key), value


def suggestion(name: str, names: Sequence[str]) -> str:
    """` (did you mean ...?)` if a name comes close, else nothing."""
    close = difflib.get_close_matches(name, names, n=1)
    return f" (did you mean {close[0]}?)" if close else ""


# --- values ---


def read_value(one: Option, value: Any) -> Any:
    """A value as its option declares it: from text, or as YAML has read it.

    Raises:
        ValueError: it is of another kind.
    """
    item, members = _item_kind(one.kind), _members(one.kind)
    if item is not None:
        if value is None and types.NoneType in members:
            return None
        values = value if isinstance(value, list) else [value]  # a list of one may be written without brackets
        try:
            return [read_value(Option(name=one.name, kind=item), each) for each in values]
        except ValueError as error:
            several = "," in str(values[-1])
            raise ValueError(f"{error}{'; several are separated by spaces' if several else ''}") from error
    for member in members:
        with contextlib.suppress(ValueError, TypeError, OverflowError):
            return _converted(member, value)
    kinds = " or ".join(_KINDS.get(member, "options as {name: value}") for member in members)
    raise ValueError(f"{flag(one.name)} expects {kinds}, got {shorten(str(value))!r}")


def _converted(kind: Any, value: Any) -> Any:
    read = value
    if isinstance(value, str) and kind is not str:
        try:
            read = yaml.safe_load(value)
        except (yaml.YAMLError, RecursionError) as error:
            raise ValueError from error
        if kind is float and isinstance(read, str):
            read = float(read)  # 1e-4, which YAML takes for a word
    if kind is float and isinstance(read, int) and not isinstance(read, bool):
        read = float(read)
    wanted = dict if typing.get_origin(kind) in (dict, Mapping) or kind is dict else kind
    if not isinstance(read, wanted) or (isinstance(read, bool) and kind is not bool) or read != read:
        raise ValueError
    return read


def _members(kind: Any) -> tuple[Any, ...]:
    """The kinds of a union, text last, since every word is one."""
    found = typing.get_args(kind) if isinstance(kind, types.UnionType) else (kind,)
    return tuple(sorted(found, key=lambda member: member is str))


def _item_kind(kind: Any) -> Any | None:
    """Element type of a list (`list[str] | None` gives `str`), None for anything else."""
    return next(
        (typing.get_args(m)[0] for m in _members(kind) if typing.get_origin(m) in (list, tuple, Sequence)), None
    )


def flag(name: str) -> str:
    """How an option is written on the command line."""
    return "--" + name.replace("_", "-")


def with_dashes(token: str) -> str:
    """`--batch_size=3` as `--batch-size=3`: recipes and Python write the underscore, so the command takes both."""
    if not token.startswith("--"):
        return token
    name, equals, value = token.partition("=")
    return name.replace("_", "-") + equals + value


# --- the command line ---


class _Formatter(argparse.HelpFormatter):
    """Help in the width of the terminal, up to 110 columns."""

    def __init__(self, prog: str) -> None:
        try:
            columns = int(os.environ.get("COLUMNS") or os.get_terminal_size().columns)
        except (OSError, ValueError):  # not a terminal
            columns = 100
        super().__init__(prog, max_help_position=30, width=min(110, columns) - 2)


class Parser:
    """The options of one command.

    Args:
        command: its name.
        usage: what comes after it.
        description: what it does.
    """

    def __init__(self, command: str, usage: str, description: str) -> None:
        self._parser = _Quiet(
            prog=f"torchlocal {command}",
            usage=f"torchlocal {command} {usage}",
            description=description,
            formatter_class=_Formatter,
            add_help=False,
            exit_on_error=False,
            allow_abbrev=False,  # else `compare --seed 3` is `--seeds 3`
        )
        self._parser.add_argument("-h", "--help", action="help", help="Show this.")
        self._options: dict[str, Option] = {}
        self._switches: list[str] = []

    def word(self, name: str, told: str, *, needed: bool = True) -> None:
        """A word that is no option."""
        self._parser.add_argument(name, nargs="?", metavar=name.upper(), help=told)
        self._needed = name if needed else None

    _needed: str | None = None

    def switch(self, name: str, told: str) -> None:
        """An option without a value."""
        self._parser.add_argument(flag(name), action="store_true", dest=name, help=told)
        self._switches.append(name)

    def recipes(self) -> None:
        """`--config`, which may be given several times."""
        self._parser.add_argument("--config", action="append", default=[], metavar="RECIPE", help=_CONFIG_HELP)

    def add(self, *options: Option, title: str | None = None) -> None:
        """Options with values, in a group of the help that has a title, or among the first."""
        group: Any = self._parser.add_argument_group(title) if title else self._parser
        for one in options:
            self._options[one.name] = one
            flags = dict.fromkeys([flag(one.name), flag(one.path or one.name)])
            several = _item_kind(one.kind) is not None
            shown = group.add_argument(
                *flags,
                dest=one.name,
                nargs="+" if several else None,
                default=argparse.SUPPRESS,
                metavar=one.metavar or _metavar(one.kind),
                help=(one.help + _default(one.default)).replace("%", "%%"),
            )
            shown.option_strings = list(flags)[:1]  # the help shows the short one

    def parse(self, argv: Sequence[str], load: Callable[[str], dict[str, Any]] = lambda name: {}) -> dict[str, Any]:
        """What was given, by short name: the defaults, what recipes say, what the command line says.

        Args:
            argv: the arguments.
            load: reads the options of a recipe.

        Raises:
            ValueError: a mistake in them, told in one sentence.
        """
        flags = [name for name in self._parser._option_string_actions if name.startswith("--")]
        try:
            found, rest = self._parser.parse_known_args(list(argv))
        except argparse.ArgumentError as error:
            name = (error.argument_name or "").partition("/")[0]
            if "expected" not in error.message:
                raise ValueError(f"{name} takes no value: leave out what follows the equals sign") from error
            remedy = ": a YAML file or the name of a shipped recipe" if name == "--config" else ""
            raise ValueError(f"{name} needs a value{remedy}") from error
        if rest:
            name = shorten(rest[0].partition("=")[0])
            if name.startswith("-"):
                raise ValueError(f"unknown option {name}{suggestion(name, flags)}; --help lists all")
            raise ValueError(f"unexpected argument {name!r}: options start with --")
        given = vars(found)
        if self._needed is not None and given[self._needed] is None:
            raise ValueError(f"{self._needed.upper()} is missing; --help shows the usage")
        values = {one.name: one.default for one in self._options.values()}
        for recipe in given.pop("config", []):
            values |= load(recipe)
        typed = {name: read_value(self._options[name], value) for name, value in given.items() if name in self._options}
        return {**given, **values, **typed}


class _Quiet(argparse.ArgumentParser):
    def error(self, message: str) -> NoReturn:
        raise ValueError(message)


def _default(value: Any) -> str:
    if value is None or value is False or value == [] or value == {}:
        return ""
    if isinstance(value, list | tuple):
        value = " ".join(map(str, value))
    return f" (default: {str(value).lower() if value is True else value})"


def _metavar(kind: Any) -> str:
    item = _item_kind(kind)
    members = _members(kind) if item is None else (item,)
    if bool in members:
        return "true|false"
    names = ["N"] if int in members or float in members else []
    names += ["TEXT"] if str in members else []
    return "|".join(names) or "{...}"
