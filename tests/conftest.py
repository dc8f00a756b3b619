"""One thread per test process: small networks gain nothing from more, and two processes share the two cores."""

from __future__ import annotations

import os

os.environ["OMP_NUM_THREADS"] = "1"  # read when torch is imported, here and in the subprocesses of the tests
