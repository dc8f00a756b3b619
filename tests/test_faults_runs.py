"""Faults of runs and of the command: one owner per folder, nothing lost, and an answer at once."""

from __future__ import annotations

import subprocess
import sys
from typing import Any

import pytest

import torchlocal
from torchlocal import config, rules

# --- the command answers ---


def python(code: str, *arguments: str) -> subprocess.CompletedProcess[str]:
    """What a fresh Python that imports this torchlocal says."""
    code = f"import sys; sys.path.insert(0, {str(torchlocal.__path__[0]) + '/..'!r})\n{code}"
    return subprocess.run([sys.executable, "-c", code, *arguments], capture_output=True, text=True, timeout=120)


@pytest.mark.parametrize(
    ("argv", "code"),
    [
        ("--help", 0),
        ("fit --help", 0),
        ("compare --help", 0),
        ("plan --help", 0),
        ("recipes", 0),
        ("fit --bogus", 2),
        ("fit --lr fast", 2),
        ("fit --lr -1", 2),
        ("fit --rule bogus", 2),
        ("compare --methods local bogus", 2),
        ("plan --budget much", 2),
        ("evaluate", 2),
        ("bogus", 2),
    ],
)
def test_the_command_answers_without_torch(argv: str, code: int) -> None:
    told = python(
        "from torchlocal.cli import main\n"
        f"code = main({argv.split()!r})\n"
        "print('torch', 'torch' in sys.modules, file=sys.stderr)\n"
        "sys.exit(code)\n"
    )
    assert told.returncode == code, told.stderr
    assert told.stderr.splitlines()[-1] == "torch False"


def test_public_names_are_there_when_asked_for() -> None:
    told = python(
        "import torchlocal as tl\n"
        "assert 'torch' not in sys.modules and set(tl.__all__) <= set(dir(tl))\n"
        "import torchlocal.plan\n"  # the file, whose name is that of the function
        "assert tl.plan.__name__ == 'plan' and callable(tl.plan), tl.plan\n"
        "from torchlocal import *\n"
        "assert plan is tl.plan and local_step.__module__ == 'torchlocal.steps' and memory.measure\n"
        "print(hasattr(tl, 'bogus'))\n"
    )
    assert (told.returncode, told.stdout) == (0, "False\n"), told.stderr


@pytest.mark.parametrize("module", ["sizes", "config", "methods", "plan", "network", "rules", "parallel", "guidance"])
def test_every_room_can_be_entered_first(module: str) -> None:
    told = python(f"import torchlocal.{module}")
    assert told.returncode == 0, told.stderr


def test_names_of_rules_are_those_of_the_rules() -> None:
    assert tuple(rules.RULES) == config._RULES
    with pytest.raises(ValueError, match="auxiliary"):
        config.FitConfig(auxiliary="bogus")


def refused(argv: list[str], capsys: Any) -> str:
    """The one line that tells what is wrong with a command line."""
    from torchlocal.cli import main

    capsys.readouterr()
    code = main(argv)
    out, err = capsys.readouterr()
    assert (code, out) == (2, "") and len(err.splitlines()) == 1, (code, out, err)
    assert err.startswith("torchlocal: ") and err.endswith(".\n")
    return err.removeprefix("torchlocal: ").rstrip("\n")
