"""The peak of a step, measured while it runs."""

from __future__ import annotations

import contextlib
from collections.abc import Callable
from dataclasses import dataclass

import torch

from .counter import PeakCounter

__all__ = ["Measurement", "measure"]


@dataclass(frozen=True, kw_only=True)
class Measurement:
    """Peak of one call, in bytes.

    Attributes:
        peak_bytes: beyond what was allocated when the call began.
        process_bytes: the largest part of the process that was in main memory during the call, workspace of the kernels
            and Python included; None where the system does not tell.
    """

    peak_bytes: int
    process_bytes: int | None = None


def measure(function: Callable[[], object], *, device: torch.device | str = "cpu") -> Measurement:
    """Run ``function`` once and measure the peak of the memory that it allocates.

    Args:
        function: what to run, for example one training step.
        device: on CUDA the caching allocator's own count is read, elsewhere tensors are counted at the dispatcher.

    Returns:
        The peak in bytes, beyond what was allocated before.
    """
    _reset_process_peak()
    if torch.device(device).type == "cuda":
        torch.cuda.synchronize(device)
        before = torch.cuda.memory_allocated(device)
        torch.cuda.reset_peak_memory_stats(device)
        function()
        torch.cuda.synchronize(device)
        peak = torch.cuda.max_memory_allocated(device) - before
    else:
        with PeakCounter() as counter:
            function()
        peak = counter.peak
    return Measurement(peak_bytes=peak, process_bytes=_process_peak())


def _reset_process_peak() -> None:
    with contextlib.suppress(OSError), open("/proc/self/clear_refs", "w") as file:  # Linux
        file.write("5")


def _process_peak() -> int | None:
    with contextlib.suppress(OSError), open("/proc/self/status") as file:
        return next((int(line.split()[1]) * 1024 for line in file if line.startswith("VmHWM")), None)
    return None
