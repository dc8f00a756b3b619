"""One thread per test process: small networks gain nothing from more, and two processes share the two cores."""

from __future__ import annotations

import os
import signal

os.environ["OMP_NUM_THREADS"] = "1"  # read when torch is imported, here and in the subprocesses of the tests

# Started in the background by a script, processes ignore Ctrl-C, which some tests send.
signal.signal(signal.SIGINT, signal.default_int_handler)
