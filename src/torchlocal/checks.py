"""What people write, checked: each function refuses a value in one sentence that names it and says what to give."""

from __future__ import annotations

import difflib
import math
import re
from collections.abc import Mapping, Sequence
from typing import Any

__all__ = [
    "check_plain",
    "check_share",
    "check_whole",
    "number",
    "one_of",
    "parse_link",
    "parse_size",
    "shorten",
    "suggestion",
    "text",
    "whole",
]

_LARGEST = 2**40  # of whole numbers; torch has 64 bits for what is made of several
_SINGLE = 1e38  # which a float32 holds


def whole(
    name: str, value: Any, least: int = 0, most: int | None = None, *, none: bool = False, other: str = ""
) -> None:
    """A whole number from ``least`` to ``most``; with ``none`` also None; ``other`` names what else there is."""
    if none and value is None:
        return
    if isinstance(value, bool) or not isinstance(value, int) or value < least:
        other = other or (" or None" if none else "")
        raise ValueError(f"{name}={value!r} must be a whole number of at least {least}{other}")
    if most is not None and value > most:
        raise ValueError(f"{name}={value} is more than {most:,}: make it smaller")
    if value > _LARGEST:
        raise ValueError(f"{name}={value} is larger than anything that could be counted: make it smaller")


def number(
    name: str,
    value: Any,
    what: str = "a number of at least 0",
    *,
    above: float | None = None,
    below: float = math.inf,
    most: float = math.inf,
    none: bool = False,
    single: bool = False,
) -> None:
    """A finite number of at least 0, or above ``above``; below ``below``, and at most ``most``.

    Args:
        name: whose value it is.
        value: it.
        what: what it must be, in words.
        above: lower end, which is not allowed itself.
        below: upper end, which is not allowed itself.
        most: upper end, which is.
        none: whether None is allowed.
        single: whether a float32 has to hold it.
    """
    if none and value is None:
        return
    fits = isinstance(value, int | float) and not isinstance(value, bool) and value < below and value <= most
    if not fits or not (value >= 0 if above is None else value > above):
        raise ValueError(f"{name}={value!r} must be {what}{', or None' if none else ''}")
    if single and value > _SINGLE:
        raise ValueError(f"{name}={value!r} is more than a float32 holds: make it smaller")


def check_whole(name: str, value: object, least: int = 1) -> None:
    """An argument in Python that is a whole number of at least ``least``."""
    if isinstance(value, bool) or not isinstance(value, int) or value < least:
        raise ValueError(f"{name}: must be a whole number of at least {least}, not {value!r}")


def check_share(name: str, value: object) -> None:
    """An argument in Python that is a number from 0 to 1."""
    if isinstance(value, bool) or not isinstance(value, int | float) or not 0 <= value <= 1:
        raise ValueError(f"{name}: must be a number from 0 to 1, not {value!r}")


def one_of(name: str, value: Any, *choices: Any) -> None:
    """One of a few values."""
    if not any(value is choice or (isinstance(value, str) and value == choice) for choice in choices):
        *others, last = map(repr, choices)
        raise ValueError(f"{name}={value!r} is unknown: give {', '.join(others)} or {last}")


def text(name: str, value: Any, what: str = "a string that is not empty", *, none: bool = False) -> None:
    """Text that is not empty."""
    if (not none or value is not None) and (not isinstance(value, str) or not value):
        raise ValueError(f"{name}={value!r} must be {what}")


def parse_size(size: str) -> int:
    """Bytes of a size such as ``8GiB``, ``500MB`` or ``1000000``.

    Raises:
        ValueError: it is none.
    """
    match = re.fullmatch(r"\s*(\d{1,30}(?:\.\d+)?)\s*(?:([kmgt]?)(i?)b?)\s*", size.lower())
    found = 0
    if match:
        found = int(float(match[1]) * (1024 if match[3] else 1000) ** " kmgt".index(match[2] or " "))
    if found >= 2**60:
        raise ValueError(f"budget: {size!r} is more than any memory has; give a size such as 8GiB or 500MB")
    if found < 1:
        raise ValueError(f"budget: {size!r} is not a size; give one such as 8GiB, 500MB or a number of bytes")
    return found


def parse_link(link: str | float) -> tuple[float, float]:
    """Bits per second and one-way delay in seconds of a link such as ``100mbit``, ``1gbit+20ms``, ``20ms`` or ``1e8``.

    Raises:
        ValueError: it is none.
    """
    rate, delay = math.inf, 0.0
    for part in str(link).lower().split("+"):
        match = re.fullmatch(r"(\d{1,20}(?:\.\d{1,20})?)([kmg]?bit|ms)?", part.strip())
        if match is None or not float(match[1]):
            raise ValueError(
                f"link={link!r} is no link: give a rate such as 100mbit or 1gbit, a delay, or 100mbit+20ms"
            )
        if match[2] == "ms":
            delay = float(match[1]) / 1e3
        else:
            rate = float(match[1]) * {"k": 1e3, "m": 1e6, "g": 1e9}.get((match[2] or "b")[0], 1.0)
    return rate, delay


_MOST_VALUES, _MOST_LEVELS = 10_000, 20


def check_plain(told: str, value: Any) -> None:
    """Refuse what is not made of numbers, words, true, false and null in lists and `name: value` pairs.

    A YAML file can also hold dates, sets and bytes, lists that hold themselves, and by its aliases, in a few lines,
    more values than there is memory.

    Args:
        told: what the value is of, as the error begins.
        value: it.
    """
    left = [(value, 0)]
    count = 0
    while left:
        item, level = left.pop()
        count += 1
        if count > _MOST_VALUES or level > _MOST_LEVELS:
            raise ValueError(f"{told} holds too many values, or one inside the other: write fewer, level by level")
        if isinstance(item, Mapping):
            wrong = [key for key in item if not isinstance(key, str | int | float | None)]
            left += [(inner, level + 1) for inner in item.values()]
        elif isinstance(item, list | tuple):
            wrong = []
            left += [(inner, level + 1) for inner in item]
        else:
            wrong = [] if isinstance(item, str | int | float | None) else [item]
        if wrong:
            kind = type(wrong[0]).__name__
            raise ValueError(
                f"{told} holds {shorten(str(wrong[0]))}, which is of the kind {kind}: give numbers and words, with "
                "quotes around what only looks like something else"
            )


def suggestion(name: str, names: Sequence[str], *, most: int = 1, cutoff: float = 0.6, prefix: str = "") -> str:
    """` (did you mean ...?)` with the names that come close, at most so many, or nothing."""
    close = difflib.get_close_matches(name, names, n=most, cutoff=cutoff)
    return f" (did you mean {' or '.join(prefix + match for match in close)}?)" if close else ""


def shorten(words: str, most: int = 60) -> str:
    """The text, or its beginning."""
    return words if len(words) <= most else f"{words[: most - 3]}..."
