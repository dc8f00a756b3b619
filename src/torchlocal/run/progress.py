"""How a run goes, for who watches: a progress bar on a terminal, or else one line per epoch."""

from __future__ import annotations

import contextlib
import math
import sys
import time
from collections.abc import Mapping, Sequence
from typing import Any

from rich.console import Console
from rich.progress import BarColumn, ProgressColumn, Task, TextColumn
from rich.progress import Progress as Bar
from rich.text import Text

from torchlocal.parallel.load import describe
from torchlocal.run.callbacks import Callback, RunState

__all__ = ["Progress", "compact"]

_BARS = "▁▂▃▄▅▆▇█"


def compact(losses: Sequence[float]) -> str:
    """Return the losses of the local modules in little room: up to four as numbers, more as bars with first and last.

    >>> compact([2.0, 1.5])
    '2.00 1.50'
    >>> compact([2.0, 1.8, 1.6, 1.4, 1.2])
    '2.00 █▆▅▃▁ 1.20'
    """
    known = [loss for loss in losses if loss == loss]
    if len(known) <= 4:
        return " ".join(f"{loss:.2f}" for loss in known)
    low, high = min(known), max(known)
    bars = "".join(_BARS[round((loss - low) / ((high - low) or 1) * (len(_BARS) - 1))] for loss in known)
    return f"{known[0]:.2f} {bars} {known[-1]:.2f}"


def _speed(values: Mapping[str, float]) -> str:
    """Images or tokens per second."""
    name = next(name for name in values if name.endswith("_per_second"))
    return f"{values[name]:.0f} {name.removesuffix('_per_second')}/s"


def _numbered(modules: range) -> str:
    """Local modules as people count them."""
    return f"{modules.start + 1} to {modules.stop}" if len(modules) > 1 else f"{modules.stop}"


class Progress(Callback):
    """Shows the progress of one run on the standard error stream."""

    _bar: Bar | None = None

    def on_start(self, state: RunState) -> None:
        self._first_step, self._num_steps, self._started = state.step, state.num_steps, time.perf_counter()
        console = Console(stderr=True)
        if not console.is_terminal:
            return
        self._bar = Bar(
            TextColumn("{task.description}"),
            BarColumn(bar_width=20),
            TextColumn("{task.completed:.0f}/{task.total:.0f}"),
            TextColumn("{task.fields[told]}"),
            _Remaining(self),
            console=console,
            refresh_per_second=4,
        )
        self._task = self._bar.add_task("", total=state.num_steps, completed=state.step, told="")
        self._bar.start()

    def advance(self, step: int, epoch: str) -> None:
        """Move the bar, after every step; costs nothing without one."""
        if self._bar is not None:
            self._bar.update(self._task, completed=step, description=epoch)

    def on_step(self, state: RunState, values: Mapping[str, float]) -> None:
        if self._bar is None:
            return
        told = f"loss {values['loss/global']:.3f}"
        losses = [value for name, value in values.items() if name.startswith("loss/module_")]
        if losses:
            told += f" · modules {compact([*losses, values['loss/global']])}"
        told += f" · guided {values['guided_share']:.0%} · {_speed(values)}"
        if stages := describe(state.loads):
            told += f" · {stages}"
        self._bar.update(self._task, told=told)

    def on_epoch(self, state: RunState, row: Mapping[str, float]) -> None:
        """Tell one epoch: into the scroll-back above a bar, as a plain line otherwise."""
        losses = [value for name, value in row.items() if name.startswith("loss_")]
        accuracy = row.get("validation_accuracy", math.nan)
        told = (
            f"epoch {row['epoch']}/{state.num_epochs}  loss {row['train_loss']:.3f}"
            + (f"  modules {compact(losses)}" if len(losses) > 1 else "")
            + (f"  validation accuracy {accuracy:.4f}" if accuracy == accuracy else "")
            + (f"  validation loss {row['validation_loss']:.4f}" if accuracy != accuracy else "")
            + (f"  perplexity {row['validation_perplexity']:.2f}" if "validation_perplexity" in row else "")
            + f"  guided {row['guided_share']:.0%}  lr {row['lr']:.2g}  {_speed(row)}"
        )
        if stages := describe(state.loads):
            told += f"  {stages}"
        self._print(told, state)

    def on_share(self, state: RunState, shares: Sequence[range]) -> None:
        self._print(f"local modules shared out anew: {', '.join(map(_numbered, shares))}", state)

    def _print(self, told: str, state: RunState) -> None:
        if self._bar is not None:
            self._bar.console.print(Text(told))
            return
        remaining = self.remaining(state.step)
        with contextlib.suppress(OSError):  # nobody reads it any more, which is no reason to end a run
            print(f"{told}  ETA {remaining}" if remaining else told, file=sys.stderr, flush=True)

    def on_end(self, state: RunState, result: Mapping[str, Any] | None) -> None:
        if self._bar is not None:
            self._bar.stop()

    def remaining(self, step: float) -> str:
        """Return the time the rest of the run will take, or nothing while it is unknown or over."""
        done = step - self._first_step
        if done <= 0 or step >= self._num_steps:
            return ""
        seconds = (time.perf_counter() - self._started) / done * (self._num_steps - step)
        minutes, seconds = divmod(int(seconds), 60)
        hours, minutes = divmod(minutes, 60)
        return f"{hours}:{minutes:02}:{seconds:02}"


class _Remaining(ProgressColumn):
    def __init__(self, progress: Progress) -> None:
        super().__init__()
        self._progress = progress

    def render(self, task: Task) -> Text:
        remaining = self._progress.remaining(task.completed)
        return Text(f"ETA {remaining}" if remaining else "")
