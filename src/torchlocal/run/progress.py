"""What a run tells while it trains: a progress bar or plain lines, and TensorBoard events."""

import contextlib
import shutil
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from types import TracebackType
from typing import Any

from rich.console import Console
from rich.progress import BarColumn, Progress, ProgressColumn, Task, TextColumn
from rich.text import Text

__all__ = ["Reporter", "compact"]

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


class Reporter:
    """Shows the progress of one run on the standard error stream.

    Args:
        num_steps: optimizer steps of the whole run.
        step: step it starts from.
        enabled: whether to show anything.
        events: folder for TensorBoard events, or None.
    """

    def __init__(self, num_steps: int, step: int, *, enabled: bool, events: Path | None) -> None:
        self._num_steps, self._first_step, self._started = num_steps, step, time.perf_counter()
        self._enabled = enabled
        self._console = Console(stderr=True)
        self._bar: Progress | None = None
        if enabled and self._console.is_terminal:
            self._bar = Progress(
                TextColumn("{task.description}"),
                BarColumn(bar_width=20),
                TextColumn("{task.completed:.0f}/{task.total:.0f}"),
                TextColumn("{task.fields[told]}"),
                _Remaining(self),
                console=self._console,
                refresh_per_second=4,
            )
            self._task = self._bar.add_task("", total=num_steps, completed=step, told="")
        self._writer: Any = None
        self._events = events
        if events is not None:
            from torch.utils.tensorboard import SummaryWriter  # slow to import, and not always wanted

            try:
                self._writer = SummaryWriter(events, purge_step=step + 1)
            except OSError as error:
                raise self._unwritten(error) from error

    def __enter__(self) -> "Reporter":
        if self._bar is not None:
            self._bar.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if self._bar is not None:
            self._bar.stop()
        if self._writer is not None:
            try:
                self._writer.close()
            except OSError as failed:
                if error is None:  # else that one is what has to be told
                    raise self._unwritten(failed) from failed

    def advance(self, step: int, epoch: str) -> None:
        """Move the bar; costs nothing without one."""
        if self._bar is not None:
            self._bar.update(self._task, completed=step, description=epoch)

    def losses(self, step: int, losses: Sequence[float], *, guided_share: float, lr: float, speed: float) -> None:
        """Tell the mean losses per local module since the last call, the last being the global loss."""
        if self._bar is not None:
            told = f"loss {losses[-1]:.3f}"
            if len(losses) > 1:
                told += f" · modules {compact(losses)}"
            self._bar.update(self._task, told=f"{told} · guided {guided_share:.0%} · {speed:.0f} images/s")
        scalars = {"loss/global": losses[-1], "lr": lr, "guided_share": guided_share, "images_per_second": speed}
        scalars |= {f"loss/module_{k}": loss for k, loss in enumerate(losses[:-1], start=1)}
        self.scalars(step, scalars)

    def scalars(self, step: int, values: dict[str, float]) -> None:
        """Write numbers, without those that were not measured (NaN), to TensorBoard."""
        if self._writer is not None:
            for name, value in values.items():
                if value == value:
                    try:
                        self._writer.add_scalar(name, value, step)
                    except OSError as error:
                        raise self._unwritten(error) from error

    def _unwritten(self, error: OSError) -> OSError:
        return OSError(
            f"{self._events} could not be written ({error.strerror or type(error).__name__}): make room, or give "
            "tensorboard=False; the checkpoint before is untouched"
        )

    def copy_events(self, folder: Path) -> None:
        """Copy what was written to TensorBoard until now."""
        if self._events is not None:
            try:
                self._writer.flush()
                shutil.copytree(self._events, folder, dirs_exist_ok=True)
            except OSError as error:  # shutil's lists every file
                raise OSError(f"{folder} could not be written: make room on the disk, or see who may write") from error

    def epoch(self, num_epochs: int, row: dict[str, float], losses: Sequence[float]) -> None:
        """Tell one epoch: into the scroll-back above a bar, as a plain line otherwise."""
        told = (
            f"epoch {row['epoch']}/{num_epochs}  loss {row['train_loss']:.3f}"
            + (f"  modules {compact(losses)}" if len(losses) > 1 else "")
            + f"  validation accuracy {row['validation_accuracy']:.4f}  guided {row['guided_share']:.0%}"
            f"  lr {row['lr']:.2g}  {row['images_per_second']:.0f} images/s"
        )
        remaining = self.remaining(int(row["step"]))
        self.say(told if self._bar is not None or not remaining else f"{told}  ETA {remaining}")

    def remaining(self, step: float) -> str:
        """Return the time the rest of the run will take, or nothing while it is unknown or over."""
        done = step - self._first_step
        if done <= 0 or step >= self._num_steps:
            return ""
        seconds = (time.perf_counter() - self._started) / done * (self._num_steps - step)
        minutes, seconds = divmod(int(seconds), 60)
        hours, minutes = divmod(minutes, 60)
        return f"{hours}:{minutes:02}:{seconds:02}"

    def say(self, text: str) -> None:
        """Show one line."""
        if self._bar is not None:
            self._bar.console.print(Text(text))
        elif self._enabled:
            with contextlib.suppress(OSError):  # nobody reads it any more, which is no reason to end a run
                print(text, file=sys.stderr, flush=True)


class _Remaining(ProgressColumn):
    def __init__(self, reporter: Reporter) -> None:
        super().__init__()
        self._reporter = reporter

    def render(self, task: Task) -> Text:
        remaining = self._reporter.remaining(task.completed)
        return Text(f"ETA {remaining}" if remaining else "")
