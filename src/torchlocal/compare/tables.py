"""Tables of the terminal: accuracy, or perplexity, by depth, where a network is cut, and what fits a memory budget."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

from torchlocal.compare.columns import format_bytes, format_count
from torchlocal.compare.report import new_table
from torchlocal.memory import LABELS

if TYPE_CHECKING:
    from rich.table import Table

    from torchlocal.budget import MemoryPlan
    from torchlocal.network import DecoupledNetwork

__all__ = ["depth_table", "partition_tables", "perplexity_table", "plan_table"]


def depth_table(result: Mapping[str, Any], *, split: str) -> Table:
    """What `evaluate` found, as a rich table: accuracy through every auxiliary network."""
    title = (
        f"{result['checkpoint']}: {split} accuracy {100 * result['accuracy']:.2f} %, loss {result['loss']:.4f} "
        f"({result['num_images']:,} images)"
    )
    table = new_table(title)
    table.add_column("Local module", justify="right")
    table.add_column("Accuracy, %", justify="right")
    table.add_column("Predicted by")
    depths = result["depth_accuracy"]
    for k, accuracy in enumerate(depths, start=1):
        by = "the backbone" if k == len(depths) else "its auxiliary network"
        table.add_row(f"{k} of {len(depths)}", f"{100 * accuracy:.2f}", by)
    return table


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


def partition_tables(net: DecoupledNetwork, *, batch_size: int, title: str, example: str = "image") -> list[Table]:
    """Where a network is cut, as rich tables: its units with the cuts drawn between, and its local modules.

    Args:
        net: Decoupled with a sample of `batch_size` inputs.
        batch_size: Number of inputs that the activation bytes are of.
        title: Name of the network.
        example: What FLOPs are told of.
    """
    partition = net.partition
    units = new_table(
        f"{title}: {len(partition.units)} units, {net.num_modules} local modules",
        f"Activations kept for backward: of a batch of {batch_size}. FLOPs: forward, of one {example}.",
    )
    for header in ("k", "Unit", "Output", "Activations", "FLOPs", "Parameters"):
        units.add_column(header, justify="left" if header in ("Unit", "Output") else "right", no_wrap=True)
    for k, group in enumerate(partition.groups, start=1):
        for index in group:
            unit = partition.units[index]
            units.add_row(
                str(k) if index == group.start else "",
                unit.name,
                " x ".join(map(str, unit.output_shape[1:])),
                format_bytes(unit.activation_bytes),
                format_count(unit.flops / batch_size),
                format_count(unit.num_parameters),
            )
        if k < net.num_modules:
            units.add_row("", "- - - cut - - -", *[""] * 4, style="red")
    modules = new_table("Local modules, with their auxiliary networks")
    for header in ("k", "Units", "Activations", "FLOPs", "Parameters", "Auxiliary parameters"):
        modules.add_column(header, justify="left" if header == "Units" else "right")
    largest = max(partition.costs)
    for k, (group, name, cost) in enumerate(zip(partition.groups, partition.names, partition.costs, strict=True)):
        chosen = [partition.units[index] for index in group]
        auxiliary = net.auxiliary[k] if k < len(net.auxiliary) else None
        modules.add_row(
            str(k + 1),
            name,
            format_bytes(cost) + (" (largest)" if cost == largest and net.num_modules > 1 else ""),
            format_count(sum(unit.flops for unit in chosen) / batch_size),
            format_count(sum(unit.num_parameters for unit in chosen)),
            "-" if auxiliary is None else format_count(sum(p.numel() for p in auxiliary.parameters())),
        )
    return [units, modules]


def plan_table(result: MemoryPlan, *, title: str) -> Table:
    """What `plan` predicts, one way to train per row."""
    largest = max(row.total_bytes for row in result.rows)
    name, unit, digits = ("GiB", 2**30, 2) if largest >= 10 * 2**30 else ("MiB", 2**20, 1)
    table = new_table(
        f"{title}: predicted peak memory in {name} at batch size {result.batch_size}",
        "Workspace inside kernels is not included. FLOPs: of a step, relative to end-to-end.",
    )
    columns = ["Method", "K", "Peak", *(label.capitalize() for label in LABELS), "FLOPs"]
    columns += ["Largest batch", "Fits"] if result.budget is not None else []
    for header in columns:
        text = header if len(header) < 10 or " " in header else f"{header[:6]}-\n{header[6:]}"  # for narrow terminals
        table.add_column(text, justify="left" if header == "Method" else "right", no_wrap=True)
    for row in result.rows:
        cells = [row.method, str(row.modules), f"{row.total_bytes / unit:.{digits}f}"]
        cells += [f"{row.breakdown[label] / unit:.{digits}f}" for label in LABELS] + [f"x {row.flops_ratio:.2f}"]
        cells += [str(row.largest_batch), "yes" if row.fits else "no"] if result.budget is not None else []
        table.add_row(*cells)
    return table
