"""Draws the rooms of the library from its imports, and counts their lines.

    python scripts/architecture.py             # writes docs/figures/architecture.svg, and prints the lines by room
    python scripts/architecture.py --visits    # the files that a local and a guided step visit

A room is a folder or a file of src/torchlocal. Rooms stand above all that they import; arrows that follow from others
are left out.
"""

from __future__ import annotations

import argparse
import ast
import sys
from collections import defaultdict
from collections.abc import Callable
from pathlib import Path

SOURCE = Path(__file__).resolve().parents[1] / "src" / "torchlocal"
TARGET = SOURCE.parents[1] / "docs" / "figures" / "architecture.svg"
APART = ("__init__", "__main__", "reference")  # the public names; the command's entry; what imports torch alone


def rooms() -> dict[str, list[Path]]:
    """The files of every room."""
    found: dict[str, list[Path]] = defaultdict(list)
    for path in sorted(SOURCE.rglob("*.py")):
        found[path.relative_to(SOURCE).with_suffix("").parts[0]].append(path)
    return dict(found)


def imported(path: Path) -> set[str]:
    """The rooms that a file imports from."""
    parts, found = ["torchlocal", *path.relative_to(SOURCE).with_suffix("").parts], set()
    for node in ast.walk(ast.parse(path.read_text())):
        if not isinstance(node, ast.ImportFrom):
            continue
        base = parts[: len(parts) - node.level] if node.level else []
        module = [*base, *(node.module or "").split(".")] if node.module else base
        if module[:1] == ["torchlocal"]:
            found |= {module[1]} if len(module) > 1 else {alias.name for alias in node.names}
    return found


def levels(below: dict[str, set[str]]) -> dict[str, int]:
    """How far from the top a room stands: one below the lowest of those that import it."""
    known: dict[str, int] = {}

    def level(room: str) -> int:
        if room not in known:
            known[room] = 1 + max((level(other) for other, others in below.items() if room in others), default=-1)
        return known[room]

    for room in below:
        level(room)
    return known


def draw(below: dict[str, set[str]]) -> None:
    """The rooms as boxes, and an arrow from each to those that it imports and none of which imports another."""
    from matplotlib.figure import Figure

    reach: dict[str, set[str]] = {}
    depth = levels(below)
    for room in sorted(below, key=depth.__getitem__, reverse=True):
        reach[room] = below[room].union(*(reach[other] for other in below[room]))
    rows: dict[int, list[str]] = defaultdict(list)
    for room in below:
        rows[depth[room]].append(room)
    figure = Figure(figsize=(8, 0.62 * len(rows) + 0.4), layout="constrained")
    axes = figure.subplots()
    place: dict[str, tuple[float, float]] = {}
    for level in sorted(rows):
        # Rooms of a row in the order of those that import them.
        users = {r: [place[o][0] for o, others in below.items() if r in others] for r in rows[level]}
        wish = {room: sum(xs) / max(1, len(xs)) for room, xs in users.items()}
        ordered = sorted(rows[level], key=lambda room: (wish[room], room))
        for i, room in enumerate(ordered):
            place[room] = 1.9 * (i - (len(ordered) - 1) / 2), -float(level)
    for room, others in below.items():
        for other in others - set().union(*(reach[o] for o in others)):
            arrow = {"arrowstyle": "-|>", "color": "0.55", "shrinkA": 11, "shrinkB": 11}
            axes.annotate("", xy=place[other], xytext=place[room], arrowprops=arrow)
    for room, (x, y) in place.items():
        box = {"boxstyle": "round,pad=0.35", "facecolor": "#e8f1fa", "edgecolor": "#0072B2"}
        axes.text(x, y, room, ha="center", va="center", fontsize=9, bbox=box)
    width = max(abs(x) for x, _ in place.values()) + 1.1
    axes.set_xlim(-width, width)
    axes.set_ylim(0.5 - len(rows), 0.5)
    axes.axis("off")
    figure.savefig(TARGET, metadata={"Date": None})


def visits() -> None:
    """Print the files that steps visit, and their functions."""
    import torch

    import torchlocal as tl
    from torchlocal.models import build_model

    net = tl.decouple(build_model("resnet20", num_classes=10), 4, sample=(8, 3, 32, 32))
    x, y = torch.randn(8, 3, 32, 32), torch.randint(10, (8,))
    steps: dict[str, Callable[[], object]] = {
        "local step": lambda: net.local_step(x, y),
        "guided step": lambda: net.guided_step(x, y),
        'guided step, memory="local"': lambda: net.guided_step(x, y, memory="local"),
    }
    for name, step in steps.items():
        step()  # what is found once
        seen: dict[str, set[str]] = defaultdict(set)

        def note(frame: object, event: str, _: object, seen: dict[str, set[str]] = seen) -> None:
            code = frame.f_code  # type: ignore[attr-defined]
            if event == "call" and code.co_filename.startswith(str(SOURCE)) and code.co_name[0] != "<":
                seen[str(Path(code.co_filename).relative_to(SOURCE))].add(code.co_name)

        sys.setprofile(note)
        try:
            step()
        finally:
            sys.setprofile(None)
        print(f"{name}: {len(seen)} files")
        for file, functions in seen.items():
            print(f"  {file}: {', '.join(sorted(functions))}")


def main() -> None:
    """Draw, or tell."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--visits", action="store_true", help="print the files that steps visit")
    if parser.parse_args().visits:
        visits()
        return
    found = {room: files for room, files in rooms().items() if room not in APART}
    lines = {room: sum(len(file.read_text().splitlines()) for file in files) for room, files in found.items()}
    below = {room: set().union(*map(imported, files)) & set(found) - {room} for room, files in found.items()}
    draw(below)
    for room, count in sorted(lines.items(), key=lambda item: -item[1]):
        print(f"{count:6,}  {room}")
    print(f"{sum(lines.values()):6,}  all")


if __name__ == "__main__":
    main()
