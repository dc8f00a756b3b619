"""Tables of the terminal for runs on text."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

from torchlocal.compare.report import new_table

if TYPE_CHECKING:
    from rich.table import Table

__all__ = ["perplexity_table"]


def perplexity_table(result: Mapping[str, Any], *, split: str) -> Table:
    """What `evaluate` found of text, as a rich table: perplexity through every auxiliary network."""
    bits = "" if "bits_per_byte" not in result else f", {result['bits_per_byte']:.4f} bits per byte"
    table = new_table(
        f"{result['checkpoint']}: {split} perplexity {_told(result['perplexity'])}, loss {result['loss']:.4f}{bits} "
        f"({result['num_tokens']:,} tokens)"
    )
    table.add_column("Local module", justify="right")
    table.add_column("Perplexity", justify="right")
    table.add_column("Loss", justify="right")
    table.add_column("Predicted by")
    depths = list(zip(result["depth_perplexity"], result["depth_loss"], strict=True))
    for k, (perplexity, loss) in enumerate(depths, start=1):
        by = "the backbone" if k == len(depths) else "its auxiliary network"
        table.add_row(f"{k} of {len(depths)}", _told(perplexity), f"{loss:.4f}", by)
    return table


def _told(perplexity: float | None) -> str:
    return "beyond counting" if perplexity is None else f"{perplexity:.2f}"
