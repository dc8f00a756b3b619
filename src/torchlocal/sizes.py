"""What people write, as plain values: sizes of memory, and what a YAML file may hold."""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import Any

__all__ = ["check_plain", "parse_size", "shorten"]


def parse_size(text: str) -> int:
    """Bytes of a size such as ``8GiB``, ``500MB`` or ``1000000``.

    Raises:
        ValueError: it is none.
    """
    match = re.fullmatch(r"\s*(\d{1,30}(?:\.\d+)?)\s*(?:([kmgt]?)(i?)b?)\s*", text.lower())
    size = 0
    if match:
        size = int(float(match[1]) * (1024 if match[3] else 1000) ** " kmgt".index(match[2] or " "))
    if size >= 2**60:
        raise ValueError(f"budget: {text!r} is more than any memory has; give a size such as 8GiB or 500MB")
    if size < 1:
        raise ValueError(f"budget: {text!r} is not a size; give one such as 8GiB, 500MB or a number of bytes")
    return size


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


def shorten(text: str, most: int = 60) -> str:
    """The text, or its beginning."""
    return text if len(text) <= most else f"{text[: most - 3]}..."
