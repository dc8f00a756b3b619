"""Starting several ranks on this machine, as torchrun does."""

from __future__ import annotations

import logging
import os
import signal
import sys
import uuid
from collections.abc import Sequence

from ..lifetime import STOPPING

__all__ = ["LAUNCHER", "Stopped", "launch"]

LAUNCHER = "TORCHLOCAL_LAUNCHER"  # environment variable that tells the ranks who has started them


class Stopped(Exception):
    """A signal has stopped the launcher, and with it the ranks, which have saved."""

    def __init__(self, signum: int) -> None:
        super().__init__()
        self.signum = signum


def launch(arguments: Sequence[str], num_ranks: int, *, num_threads: int | None = None) -> int:
    """Run ``python -m torchlocal`` on several ranks of this machine, and wait for it.

    Args:
        arguments: of the command.
        num_ranks: number of processes.
        num_threads: CPU threads of each; None: the cores shared out to them.

    Returns:
        The exit code: 0, or that of the rank that failed first.

    Raises:
        Stopped: by a signal, which was handed on to the ranks.
        ChildProcessError: a rank was killed.
    """
    from torch.distributed.elastic.multiprocessing.api import DefaultLogsSpecs, SignalException
    from torch.distributed.elastic.multiprocessing.errors import ChildFailedError
    from torch.distributed.launcher.api import LaunchConfig, elastic_launch

    for name in ("agent.server.api", "multiprocessing.api"):  # what has to be told is told below
        logging.getLogger(f"torch.distributed.elastic.{name}").setLevel(logging.CRITICAL)
    threads = num_threads or max(1, _num_cores() // num_ranks)
    os.environ["OMP_NUM_THREADS"] = str(threads)
    os.environ[LAUNCHER] = str(os.getpid())
    config = LaunchConfig(
        min_nodes=1,
        max_nodes=1,
        nproc_per_node=num_ranks,
        run_id=uuid.uuid4().hex,
        rdzv_backend="c10d",
        rdzv_endpoint="localhost:0",  # any free port
        max_restarts=0,
        logs_specs=DefaultLogsSpecs(log_dir=os.devnull),  # else each start leaves a folder behind
        signals_to_handle=",".join(signum.name for signum in (*STOPPING, signal.SIGQUIT)),
    )
    try:
        elastic_launch(config, sys.executable)("-m", "torchlocal", *arguments)
    except SignalException as error:
        raise Stopped(int(error.sigval)) from None
    except ChildFailedError as error:
        failures = sorted(error.failures.items(), key=lambda item: item[1].timestamp)
        killed = [(rank, f.exitcode) for rank, f in failures if f.exitcode < 0 and f.exitcode != -signal.SIGTERM]
        if killed:
            rank, code = killed[0]
            raise ChildProcessError(
                f"rank {rank} of {num_ranks} was killed ({signal.Signals(-code).name}), which ended the run."
            ) from None
        return max((f.exitcode for _, f in failures), default=1)  # the rank has told why
    return 0


def _num_cores() -> int:
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
