"""Starting several ranks on this machine, as torchrun does."""

from __future__ import annotations

import logging
import os
import signal
import sys
import uuid
from collections.abc import Sequence

from ..lifetime import STOPPING
from .machines import Machines, roll_call

__all__ = ["LAUNCHER", "Stopped", "launch"]

LAUNCHER = "TORCHLOCAL_LAUNCHER"  # environment variable that tells the ranks who has started them


class Stopped(Exception):
    """A signal has stopped the launcher, and with it the ranks, which have saved."""

    def __init__(self, signum: int) -> None:
        super().__init__()
        self.signum = signum


def launch(
    arguments: Sequence[str],
    num_ranks: int,
    *,
    num_threads: int | None = None,
    machines: Machines | None = None,
    timeout: float = 300.0,
) -> int:
    """Run ``python -m torchlocal`` on several ranks of this machine, or its share of several machines', and wait.

    Args:
        arguments: of the command.
        num_ranks: number of processes, on all machines.
        num_threads: CPU threads of each; None: the cores shared out to them.
        machines: that take part, each with as many ranks; None: this one alone.
        timeout: longest time in seconds to wait for other machines.

    Returns:
        The exit code: 0, or that of the rank that failed first.

    Raises:
        Stopped: by a signal, which was handed on to the ranks.
        ChildProcessError: a rank was killed.
        ValueError: the machines do not fit together.
        PeerLost: another machine has not come.
    """
    if machines is not None:
        roll_call(machines, num_ranks, timeout)
    from torch.distributed.elastic.multiprocessing.api import DefaultLogsSpecs, SignalException
    from torch.distributed.elastic.multiprocessing.errors import ChildFailedError
    from torch.distributed.launcher.api import LaunchConfig, elastic_launch

    for name in ("agent.server.api", "multiprocessing.api"):  # what has to be told is told below
        logging.getLogger(f"torch.distributed.elastic.{name}").setLevel(logging.CRITICAL)
    here = num_ranks // (machines.count if machines is not None else 1)
    threads = num_threads or max(1, _num_cores() // here)
    os.environ["OMP_NUM_THREADS"] = str(threads)
    os.environ[LAUNCHER] = str(os.getpid())
    config = LaunchConfig(
        min_nodes=1 if machines is None else machines.count,
        max_nodes=1 if machines is None else machines.count,
        nproc_per_node=here,
        run_id=uuid.uuid4().hex if machines is None else "torchlocal",
        rdzv_backend="c10d" if machines is None else "static",
        rdzv_endpoint="localhost:0" if machines is None else machines.place,  # any free port
        rdzv_configs={} if machines is None else {"rank": machines.number, "timeout": timeout},
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
