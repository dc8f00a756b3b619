"""Sizes of memory as people write them."""

from __future__ import annotations

import re

__all__ = ["parse_size"]


def parse_size(text: str) -> int:
    """Bytes of a size such as ``8GiB``, ``500MB`` or ``1000000``.

    Raises:
        ValueError: it is none.
    """
    match = re.fullmatch(r"\s*(\d{1,30}(?:\.\d+)?)\s*(?:([kmgt]?)(i?)b?)\s*", text.lower())
    size = 0
    if match:
        size = int(float(match[1]) * (1024 if match[3] else 1000) ** " kmgt".index(match[2] or " "))
    if size < 1:
        raise ValueError(f"budget: {text!r} is not a size; give one such as 8GiB, 500MB or a number of bytes")
    return size
