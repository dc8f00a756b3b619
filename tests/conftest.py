"""One thread per test process: small networks gain nothing from more, and two processes share the two cores."""

from __future__ import annotations

import os
import signal
from collections.abc import Iterator
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
