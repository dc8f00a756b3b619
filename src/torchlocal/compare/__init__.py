"""Methods side by side: what is trained, their costs, the report."""

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from .comparison import compare
    from .methods import CompareConfig

__all__ = ["CompareConfig", "compare"]

if not TYPE_CHECKING:  # the command reads the options of a comparison without loading torch

    def __getattr__(name: str) -> Any:
        if name not in __all__:
            raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
        return getattr(import_module(f"{__name__}.{'comparison' if name == 'compare' else 'methods'}"), name)
