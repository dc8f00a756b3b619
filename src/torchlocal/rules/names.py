"""Rules by name."""

from __future__ import annotations

import difflib
import inspect
from collections.abc import Mapping
from typing import Any

from .base import Rule

__all__ = ["RULES", "make_rule"]

RULES: dict[str, type[Rule]] = {}  # filled where the package brings all rules together


def make_rule(name: str, options: Mapping[str, Any] | None = None) -> Rule:
    """Make a rule by name.

    Args:
        name: one of ``RULES``.
        options: keyword arguments of the rule.

    Raises:
        ValueError: there is no such rule, it has no such option, or an option is out of range.
    """
    if not isinstance(name, str) or name not in RULES:
        raise ValueError(f"rule: no rule named {name!r}; choose one of {', '.join(RULES)}, or pass a Rule")
    known = list(inspect.signature(RULES[name]).parameters)
    for option in options or {}:
        if option not in known:
            close = difflib.get_close_matches(str(option), known, n=1)
            hint = f"did you mean {close[0]!r}?" if close else f"it has {', '.join(known)}"
            raise ValueError(f"rule: {name!r} has no option {option!r}; {hint}")
    return RULES[name](**(options or {}))
