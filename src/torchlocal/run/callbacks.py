"""What is told about a run while it trains: metrics.csv, TensorBoard events, and whatever a user attaches."""

from __future__ import annotations

import shutil
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from torchlocal.parallel.load import Load
from torchlocal.run.checkpoint import write_metrics
from torchlocal.run.config import FitConfig

__all__ = ["CSV", "Callback", "RunState", "TensorBoard", "validation"]


@dataclass(frozen=True, kw_only=True)
class RunState:
    """Where a run is when a callback is called.

    Args:
        config: its configuration.
        out: its folder.
        run: a name that no other run has; it stays the same when the run is resumed.
        step: optimizer steps done.
        num_steps: those of the whole run.
        epoch: epochs begun, so that the first one is 1.
        num_epochs: those of the whole run.
        rows: what metrics.csv holds, a row for each epoch that is over.
        loads: on several ranks how busy every stage was: in `on_step` since the last one, in `on_epoch` in that epoch.
    """

    config: FitConfig
    out: Path
    run: str
    step: int
    num_steps: int
    epoch: int
    num_epochs: int
    rows: Sequence[Mapping[str, float]]
    loads: Sequence[Load] = ()


class Callback:
    """Is told how a run goes; override what is of interest.

    On several ranks only the one that writes the run folder calls. What a callback raises ends the run, whose last
    checkpoint stays.
    """

    def on_start(self, state: RunState) -> None:
        """The run begins, or goes on, at `state.step`."""

    def on_step(self, state: RunState, values: Mapping[str, float]) -> None:
        """`log_every` steps are done: reading the losses of each would wait for the device.

        Args:
            state: where the run is.
            values: means since the last call: `loss/global`, `loss/module_1` to `loss/module_{K-1}` (without those
                that no step measured), `lr`, `guided_share`, `images_per_second` (of text `tokens_per_second`);
                on several ranks for every stage the share of the time in which it did not wait, `busy/stage_1`, and the
                batches that lay ready in front of it, `queue/stage_2`.
        """

    def on_epoch(self, state: RunState, row: Mapping[str, float]) -> None:
        """An epoch is over and saved; `row` is its line of metrics.csv, NaN where nothing was measured."""

    def on_share(self, state: RunState, shares: Sequence[range]) -> None:
        """The local modules are shared out to the stages anew, counted from 0 (`balance="epoch"`)."""

    def on_checkpoint(self, state: RunState, path: Path) -> None:
        """A checkpoint, `last.pt` or `best.pt`, has been written."""

    def on_end(self, state: RunState, result: Mapping[str, Any] | None) -> None:
        """The run is over, with what result.json holds, or was stopped or failed (None)."""


def validation(row: Mapping[str, float]) -> dict[str, float]:
    """What was measured on the validation data, by names such as `validation/loss`."""
    found = {name.replace("validation_", "validation/"): row[name] for name in row if name.startswith("validation_")}
    return {name: value for name, value in found.items() if value == value}


class CSV(Callback):
    """metrics.csv in the run folder: a row for each epoch."""

    def on_start(self, state: RunState) -> None:
        if state.rows:  # one that was killed may have written a row that its last.pt does not know
            self._write(state)

    def on_epoch(self, state: RunState, row: Mapping[str, float]) -> None:
        self._write(state)

    def _write(self, state: RunState) -> None:
        write_metrics(state.out / "metrics.csv", list(state.rows[0]), state.rows)


class TensorBoard(Callback):
    """TensorBoard events in the folder `tensorboard` of the run folder."""

    _writer: Any = None

    def on_start(self, state: RunState) -> None:
        from torch.utils.tensorboard import SummaryWriter  # slow to import, and not always wanted

        self._folder = state.out / "tensorboard"
        try:
            self._writer = SummaryWriter(self._folder, purge_step=state.step + 1)
        except OSError as error:
            raise self._unwritten(error) from error

    def on_step(self, state: RunState, values: Mapping[str, float]) -> None:
        self._write(state.step, values)

    def on_epoch(self, state: RunState, row: Mapping[str, float]) -> None:
        self._write(state.step, validation(row))

    def on_end(self, state: RunState, result: Mapping[str, Any] | None) -> None:
        if self._writer is None:
            return
        try:
            self._writer.close()
        except OSError as error:
            if result is not None:  # else what ended the run is what has to be told
                raise self._unwritten(error) from error

    def copy_to(self, folder: Path) -> None:
        """Copy what was written until now."""
        try:
            self._writer.flush()
            shutil.copytree(self._folder, folder, dirs_exist_ok=True)
        except OSError as error:  # shutil's lists every file
            raise OSError(f"{folder} could not be written: make room on the disk, or see who may write") from error

    def _write(self, step: int, values: Mapping[str, float]) -> None:
        try:
            for name, value in values.items():
                if value == value:
                    self._writer.add_scalar(name, value, step)
        except OSError as error:
            raise self._unwritten(error) from error

    def _unwritten(self, error: OSError) -> OSError:
        return OSError(
            f"{self._folder} could not be written ({error.strerror or type(error).__name__}): make room, or give "
            "tensorboard=False; the checkpoint before is untouched"
        )
