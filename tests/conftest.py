"""One thread per test process: small networks gain nothing from more, and two processes share the two cores."""

from __future__ import annotations

import os
import signal
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING

import pytest

if TYPE_CHECKING:
    from processes import Pool

os.environ["OMP_NUM_THREADS"] = "1"  # read when torch is imported, here and in the subprocesses of the tests

# Started in the background by a script, processes ignore Ctrl-C, and by nohup a hang-up; some tests send both.
signal.signal(signal.SIGINT, signal.default_int_handler)
signal.signal(signal.SIGHUP, signal.SIG_DFL)


@pytest.fixture(scope="module")
def pool() -> Iterator[Pool]:
    """Processes for the ranks of a test file."""
    from processes import Pool  # which loads torch

    pool = Pool()
    yield pool
    pool.close()


@pytest.fixture(scope="module")
def texts(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with 40 documents that follow a rule: short functions with names from a few."""
    import torch

    folder = tmp_path_factory.mktemp("data") / "texts"
    folder.mkdir()
    draw = torch.Generator().manual_seed(0)
    for i in range(40):
        names = [f"name_{k}" for k in torch.randint(5, (12,), generator=draw).tolist()]
        lines = [f"def {name}(self, x):\n    return self.{name} + x\n\n\n" for name in names]
        (folder / f"file{i:02}.py").write_text("".join(lines))
    return folder
