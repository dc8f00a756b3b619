"""The rooms of the house: imports run downwards only, and no file is in a circle."""

from __future__ import annotations

import ast
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

import torchlocal

SOURCE = Path(torchlocal.__file__).parent
# From the ground up. A room is a folder or a file; its files import from rooms that come before it, and from itself.
ROOMS = (
    "lifetime", "checks", "names", "reference", "tokens", "boundary",
    "recompute", "cut", "rules", "guidance", "modules", "micro", "engine", "memory", "steps", "network",
    "graphs", "budget",
    "parallel", "models", "data", "run", "compare", "cli", "__main__",
)  # fmt: skip
CORE = ROOMS[ROOMS.index("tokens") : ROOMS.index("parallel") + 1]  # what `import torchlocal` may load
FILES = {
    ".".join(path.relative_to(SOURCE).with_suffix("").parts).removesuffix(".__init__"): path
    for path in sorted(SOURCE.rglob("*.py"))
}


def imports(name: str) -> Iterator[tuple[str, int]]:
    """What a file imports, wherever in it, also for types only: dotted names in full, and their lines."""
    package = FILES[name].name == "__init__.py"
    for node in ast.walk(ast.parse(FILES[name].read_text())):
        if isinstance(node, ast.Import):
            yield from ((alias.name, node.lineno) for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            parts = ["torchlocal", *name.split(".")]
            base = ".".join(parts[: len(parts) - node.level + package]) if node.level else ""
            module = ".".join(part for part in (base, node.module) if part)
            for alias in node.names:
                inside = f"{module}.{alias.name}".removeprefix("torchlocal.")
                yield (f"torchlocal.{inside}" if inside in FILES else module), node.lineno


def inside(name: str) -> list[tuple[str, int]]:
    """Those of this package, without its name; the package itself gives its version only."""
    found = [(target.removeprefix("torchlocal."), line) for target, line in imports(name) if target in OWN]
    return [(target, line) for target, line in found if target in FILES]


OWN = {f"torchlocal.{name}" for name in FILES}
INNER = [name for name in FILES if name != "__init__"]


@pytest.mark.parametrize("name", INNER)
def test_imports_run_downwards(name: str) -> None:
    room = name.split(".")[0]
    assert room in ROOMS, f"{room} has no place in the house"
    for target, line in inside(name):
        other = target.split(".")[0]
        assert ROOMS.index(other) <= ROOMS.index(room), f"{FILES[name].name}:{line} imports {target}, which is above it"
        assert other == room or not other.startswith("_")


def test_no_file_is_in_a_circle() -> None:
    # A package's own file stands for what it brings together, so files inside of it may not import from it.
    edges = {name: {target for target, _ in inside(name)} - {name} for name in INNER}
    done: set[str] = set()

    def visit(name: str, path: list[str]) -> None:
        assert name not in path, " imports ".join([*path[path.index(name) :], name])
        if name not in done:
            for target in sorted(edges[name]):
                visit(target, [*path, name])
            done.add(name)

    for name in INNER:
        visit(name, [])


@pytest.mark.parametrize("name", [name for name in INNER if name.split(".")[0] in CORE])
def test_the_core_imports_torch_alone(name: str) -> None:
    allowed = {"torch", "torchlocal", *sys.stdlib_module_names}
    for target, line in imports(name):
        optional = name == "budget" and target.startswith("matplotlib")  # the figure of a plan, when it is asked for
        assert target.split(".")[0] in allowed or optional, f"{FILES[name].name}:{line} imports {target}"
