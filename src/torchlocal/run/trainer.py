"""The trainer: one loop for end-to-end, local and periodically guided training, which differ only in their guidance."""

import contextlib
import dataclasses
import json
import math
import os
import signal
import time
import uuid
import warnings
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from functools import partial
from itertools import islice
from pathlib import Path
from typing import Any, cast

import torch
from torch import Tensor, nn

from torchlocal.data import TextBundle
from torchlocal.guidance import Guidance
from torchlocal.lifetime import on_signals
from torchlocal.network import DecoupledNetwork
from torchlocal.parallel.load import Load
from torchlocal.parallel.network import ParallelNetwork
from torchlocal.parallel.team import Elsewhere, Team
from torchlocal.recompute import RandomState
from torchlocal.run import checkpoint
from torchlocal.run.branches import Branch
from torchlocal.run.build import (
    CapturedSteps,
    build_network,
    build_optimizer,
    count_steps,
    find_plan,
    learning_rate,
    load_shared_data,
    resolve_execution,
    share_out,
    train_step,
)
from torchlocal.run.callbacks import CSV, Callback, RunState, TensorBoard
from torchlocal.run.config import FitConfig, build_guidance
from torchlocal.run.evaluation import measure_split, plain, quality
from torchlocal.run.folder import Owned, Ownership, expand
from torchlocal.run.own import Own
from torchlocal.run.progress import Progress

_PATIENCE = 3.0  # seconds
_RESULT = (
    "steps", "epochs", "guided_share", "validation_accuracy", "test_accuracy", "depth_accuracy", "seconds",
    "num_parameters", "device", "precision",
)  # fmt: skip
_MOST_LOOKED_AT = 100_000  # steps

__all__ = ["Diverged", "Interrupted", "fit", "train"]


class Interrupted(Exception):
    """A signal stopped the run; it is saved and can be resumed."""

    def __init__(self, message: str, signum: int) -> None:
        super().__init__(message)
        self.signum = signum


class Diverged(ValueError):
    """A loss or a parameter became NaN or infinite."""


def fit(
    config: FitConfig,
    *,
    model: nn.Module | Callable[[], nn.Module] | None = None,
    data: Any = None,
    criterion: Callable[[Tensor, Any], Tensor] | None = None,
    prediction: Callable[[Any], Tensor] | None = None,
    callbacks: Sequence[Callback] = (),
    resume: bool = False,
    progress: bool = True,
    timeout: float = 300.0,
) -> dict[str, Any]:
    """Train a network and write everything about it into its run folder.

    The network and the data are made by the names in the configuration, or handed in. A network that is handed in is
    trained in place: afterwards it holds the weights that were best on the validation data, and is in evaluation mode.
    So it does if the run had already ended.

    The first SIGINT (Ctrl-C), SIGTERM, SIGHUP or SIGUSR1 finishes the current step, saves and leaves; the second one
    acts at once.
    Sets torch's global random number generators.

    Where torch.distributed is initialised, the local modules are shared out to the ranks, each of which calls this. The
    result is that of a single process, bit for bit (with as many threads per process), and so are the checkpoints.

    Args:
        config: what to do.
        model: a network of your own; or a function that makes one, called after the seed is set, so that its weights
            are the seed's.
        data: data of your own: `{"train": ..., "validation": ..., "test": ...}`, each a DataLoader or another iterable
            of `(batch, target)` (without "test" the last evaluation is left out), or what
            :func:`torchlocal.data.load_data` returns. A batch is a tensor, a tuple of arguments or a mapping of keyword
            arguments of the network. Loaders decide how large batches are, and every batch that they give is trained
            on. For each pass the global random generators, and that of the loader, are set by seed and epoch, and
            `set_epoch` is called where there is one, so a run that is resumed inside of an epoch gets the batches that
            would have come; if the first one is another (of a loader with a random state of its own), a warning says
            so.
        criterion: called with prediction and target, returns the loss; cross-entropy by default. The best epoch is
            that of the highest accuracy, or where targets are no classes, of the lowest loss.
        prediction: takes the prediction from what the network returns; by default that is the tensor itself, or its
            `.logits`.
        callbacks: are told how it goes, beside metrics.csv, TensorBoard and the progress.
        resume: continue the run in that folder, bit for bit; without one there, start it.
        progress: show a progress bar on a terminal, or else one line per epoch.
        timeout: longest time in seconds that a rank waits for another one in a step.

    Returns:
        What result.json holds: test accuracy and loss of the weights that were best on the validation split, both by
        depth, and how the run went.

    Raises:
        ValueError: if a value cannot work, the folder holds another run, or another process writes there.
        Diverged: if a loss or a parameter is no longer finite; the checkpoint before stays.
        Interrupted: after a signal.
        OSError: if something cannot be written; the checkpoint before stays.
    """
    own = Own(model=model, data=data, criterion=criterion, prediction=prediction)
    return train(config, own, callbacks=callbacks, resume=resume, progress=progress, timeout=timeout)


def train(
    config: FitConfig,
    own: Own,
    *,
    callbacks: Sequence[Callback] = (),
    resume: bool = False,
    progress: bool = True,
    timeout: float = 300.0,
    branches: Sequence[Branch] = (),
) -> dict[str, Any]:
    """See :func:`fit`; for comparisons also `branches`.

    Args:
        config: what to do.
        own: what is handed in.
        callbacks: see :func:`fit`.
        resume: see :func:`fit`.
        progress: see :func:`fit`.
        timeout: see :func:`fit`.
        branches: runs that are the same as this one up to a step; in the folders of those that have not begun, this
            run leaves its state at that step, for them to be resumed from there.
    """
    config = own.named(config)
    out = expand(config.run.out)
    team = Team(config.run.replicas, timeout)
    modes = {"resume": resume, "memory": config.memory.limit, "recompute": config.memory.recompute}
    team.check_same(checkpoint.fixed_fields(config.plain()) | modes)
    if config.run.boundary is not None and config.run.stages is None and team.num_stages == 1:
        raise ValueError(
            f"boundary={config.run.boundary!r}: one process sends nothing to other stages; say with stages which local "
            "modules they would have (stages=[5, 5]), start several ranks, or leave boundary out"
        )
    num_threads = torch.get_num_threads()
    with contextlib.ExitStack() as owned:
        result, saved = team.at_writer(partial(_enter, owned, out, config, resume))
        if result is not None:
            if isinstance(own.model, nn.Module) and (out / "best.pt").exists():
                checkpoint.load_backbone(own.model.eval(), checkpoint.load_checkpoint(out / "best.pt"), out / "best.pt")
            return cast(dict[str, Any], result)
        torch.set_num_threads(config.run.num_threads or num_threads)
        try:
            _compare_threads(team)
            return _Run(config, own, saved, progress, team, callbacks, branches).train()
        finally:
            torch.set_num_threads(num_threads)


def _compare_threads(team: Team) -> None:
    """Say so where ranks have other numbers of threads, as machines of unequal size do by themselves."""
    counts = team.gather(torch.get_num_threads())
    if team.writes and len(set(counts)) > 1:
        warnings.warn(
            f"ranks compute with {min(counts)} to {max(counts)} threads each, so the result is no single process's bit "
            "for bit: give num_threads for one that is",
            stacklevel=3,
        )


def _enter(
    owned: contextlib.ExitStack, out: Path, config: FitConfig, resume: bool
) -> tuple[dict[str, Any] | None, dict[str, Any] | None]:
    """Take the run folder (not if its run has ended), and read what is there to resume from."""
    if resume and (out / "result.json").exists():  # only read, and perhaps where nothing can be written
        if any(out.glob(".*")):  # of one that was killed at its very end
            with contextlib.suppress(ValueError, OSError):
                Ownership(out, config.run.out).release()
        return _look(out, config, resume)
    # One that was killed may be about to end: its ranks, or the process that torchrun has replaced.
    owned.enter_context(Ownership(out, config.run.out, patience=_PATIENCE if resume else 0.0))
    return _look(out, config, resume)


def _look(out: Path, config: FitConfig, resume: bool) -> tuple[dict[str, Any] | None, dict[str, Any] | None]:
    """The result of a run that has ended in the folder, or the checkpoint to resume from; (None, None) begins anew."""
    if resume:
        if (out / "result.json").exists():
            return _finished_result(out / "result.json", config), None
        if (out / "last.pt").exists():
            return None, checkpoint.load_checkpoint(out / "last.pt", resumable=True)
    elif _holds_run(out):
        raise ValueError(f"out={config.run.out!r} already holds a run: resume it, or choose another folder")
    return None, None


def _holds_run(out: Path) -> bool:
    return (out / "last.pt").exists() or (out / "result.json").exists()


@dataclass(kw_only=True)
class _Position:
    """Where a run is and what it has counted; saved in every checkpoint, beside tensors and metrics."""

    step: int = 0
    num_guided: int = 0
    seconds: float = 0.0
    train_seconds: float = 0.0
    best_epoch: int = 0
    best_score: float = -math.inf  # of the validation split: accuracy, or without one the negative loss
    epoch_checksum: str = ""  # of the first batch of the current epoch, where data are the user's own
    # Of the current epoch: steps that gave a loss of every local module, guided steps, seconds.
    epoch_full: int = 0
    epoch_guided: int = 0
    epoch_seconds: float = 0.0

    @classmethod
    def of(cls, saved: dict[str, Any], num_steps: int) -> "_Position":
        """That of a checkpoint.

        Raises:
            ValueError: it is none that a run comes to.
        """
        found = cls(**saved["position"])
        values, step = vars(found), found.step
        absent = [name for name in values if name not in saved["position"]]
        counted = {name: value for name, value in values.items() if name not in ("best_score", "epoch_checksum")}
        numbers = all(isinstance(value, int | float) for value in (*counted.values(), found.best_score))
        sound = numbers and all(0 <= value < math.inf for value in counted.values()) and found.best_score < math.inf
        if absent or not sound or not isinstance(found.epoch_checksum, str):
            raise ValueError(f"position is {saved['position']}")
        begun = saved["rows"][-1]["step"] if saved["rows"] else 0
        ranges = {
            "step": (saved["step"], saved["step"]), "num_guided": (0, step), "best_epoch": (0, len(saved["rows"])),
            "epoch_full": (0, step - begun), "epoch_guided": (0, min(step - begun, found.num_guided)),
        }  # fmt: skip
        for name, (least, most) in ranges.items():
            if not isinstance(values[name], int) or not least <= values[name] <= most:
                raise ValueError(f"position.{name} is {values[name]!r}")
        if not begun <= step <= num_steps:
            raise ValueError(f"position.step is {step} of {num_steps}")
        return found


class _Run:
    """One training run: its parts, and where it is."""

    def __init__(
        self,
        config: FitConfig,
        own: Own,
        saved: dict[str, Any] | None,
        progress: bool,
        team: Team,
        callbacks: Sequence[Callback],
        branches: Sequence[Branch],
    ) -> None:
        self.team, self.branches, self.own = team, branches, own
        self.config, self.out = config, expand(config.run.out)
        self.progress = Progress() if progress and team.writes else None
        self.tensorboard = TensorBoard() if config.run.tensorboard else None
        told: list[Callback | None] = [CSV(), self.tensorboard, self.progress, *callbacks]
        self.callbacks = [callback for callback in told if callback is not None and team.writes]
        self.run = uuid.uuid4().hex if saved is None else saved["run"]
        self.clock = time.perf_counter()
        self.execution = resolve_execution(config)
        if saved is not None:
            self._check_config(saved)
        self.data = load_shared_data(config, own, team, self.execution.device)
        self.text = isinstance(self.data, TextBundle)
        what = "rows of text" if self.text else "training images"
        self.steps_per_epoch, self.num_steps = count_steps(config, len(self.data.train), what)
        self.num_epochs = -(-self.num_steps // self.steps_per_epoch)
        self.network = build_network(config, self.data, self.execution, own)
        self.parallel = share_out(self.network, config, self.data, self.execution, team) if team.parallel else None
        self.net: DecoupledNetwork | ParallelNetwork = self.network if self.parallel is None else self.parallel
        if config.run.compile:
            self.net.compile()
        self.captured = CapturedSteps(config, self.execution, self.net) if config.run.capture else None
        self.optimizer = build_optimizer(config, self.net)
        self.scaler = self.execution.make_scaler()
        self.guidance = build_guidance(config).bind(num_steps=self.num_steps, steps_per_epoch=self.steps_per_epoch)
        self.plans = config.guidance.name != "never"  # whether guided steps have to be planned, before the first step
        if self.plans and not _guides_any(self.guidance, self.num_steps):
            self.plans = False
            warnings.warn(f"{self.guidance} guides none of the {self.num_steps} steps", stacklevel=3)
        self.position, self.rows = _Position(), list[dict[str, float]]()
        self.loss_sums = torch.zeros(self.net.num_modules, device=self.execution.device)
        self.stopped_by: signal.Signals | None = None
        # Not the seed of the weights, which has been used up to a point that depends on the auxiliary networks:
        # dropout is the same whatever they are.
        torch.manual_seed(config.run.seed + 2**32 * (1 + team.replica))
        if saved is not None:
            self._restore(saved)
        self.logged = (self.position.step, self.position.epoch_full, self.loss_sums.tolist(), time.perf_counter())
        self.epoch_loads = self.logged_loads = self._loads()

    def train(self) -> dict[str, Any]:
        """Train from where the run is to its end."""
        self.result: dict[str, Any] | None = None
        with contextlib.ExitStack() as ending:
            self.team.at_writer(partial(self._begin_telling, ending))
            with on_signals(self._stop, once=True):
                for epoch in range(len(self.rows), self.num_epochs):  # an epoch is over once it has its row
                    self._train_epoch(epoch)
                    self._finish_epoch(epoch)
                self.result = self._finish()
        if self.parallel is not None:
            self.parallel.close()
        return self.result

    def _begin_telling(self, ending: contextlib.ExitStack) -> None:
        self._write_config(self.out, self.config)
        self._write_tokenizer(self.out)
        for callback in self.callbacks:
            ending.callback(self._end_telling, callback)
            callback.on_start(self._told())

    def _end_telling(self, callback: Callback) -> None:
        callback.on_end(self._told(), self.result)

    def _told(self, loads: Sequence[Load] = ()) -> RunState:
        """Where the run is, for callbacks."""
        return RunState(
            config=self.config,
            out=self.out,
            run=self.run,
            step=self.position.step,
            num_steps=self.num_steps,
            epoch=min(self.position.step // self.steps_per_epoch + 1, self.num_epochs),
            num_epochs=self.num_epochs,
            rows=self.rows,
            loads=loads,
        )

    def _loads(self) -> list[Load]:
        """How busy the stages up to this one have been, where there are several."""
        return [] if self.parallel is None or self.team.num_stages == 1 else self.parallel.loads()

    def _train_epoch(self, epoch: int) -> None:
        config, position = self.config, self.position
        first = epoch * self.steps_per_epoch
        start = (position.step - first) * config.optimisation.accumulate
        batches = self.data.train.batches(
            config.optimisation.batch_size, epoch=epoch, train=True, seed=config.run.seed, start=start
        )
        checksum = getattr(self.data.train, "checksum", "")
        if start and checksum != position.epoch_checksum:
            warnings.warn(
                f"the batches of epoch {epoch + 1} come in another order than before the run was stopped, so it goes "
                "on, but not bit for bit: let the order depend on the global random generators or on set_epoch alone",
                stacklevel=2,
            )
        position.epoch_checksum = checksum
        self.net.train()
        self.epoch_loads = self.logged_loads = self._loads()
        self._read_clock(training=False)
        for step in range(position.step, min(first + self.steps_per_epoch, self.num_steps)):
            for branch in self.branches:
                if branch.step == step:
                    self._begin(branch.config)
            for group in self.optimizer.param_groups:
                group["lr"] = self._learning_rate(step) * group.get("lr_factor", 1.0)
            guided = self.guidance(step)
            parts: Iterable[tuple[Any, Any]] = islice(batches, config.optimisation.accumulate)
            if self.plans:
                self.plans, parts = False, list(parts)
                if parts and parts[0][0] is not None:  # else another rank reads the batches, and plans
                    find_plan(self.network, parts[0], config=config, execution=self.execution)
            losses = train_step(
                self.net,
                self.optimizer,
                parts,
                config=config,
                execution=self.execution,
                guided=guided,
                scaler=self.scaler,
                captured=self.captured,
            )
            self._count(losses, guided)
            if self.progress is not None:
                self.progress.advance(position.step, f"epoch {epoch + 1}/{self.num_epochs}")
            if position.step % config.run.log_every == 0:
                self._log()
            if config.run.checkpoint_every and position.step % config.run.checkpoint_every == 0:
                self._save(training=True)
            self._leave(save=True, training=True)

    def _count(self, losses: list[Tensor], guided: bool) -> None:
        """Add up the losses on the device: reading them would wait for it."""
        position = self.position
        position.step += 1
        position.num_guided += guided
        position.epoch_guided += guided
        if self.parallel is not None and not self.parallel.is_last:
            return  # the last stage knows the losses of all
        if len(losses) == len(self.loss_sums):
            self.loss_sums += torch.stack(losses)
            position.epoch_full += 1
        else:
            self.loss_sums[-1] += losses[-1]

    def _log(self) -> None:
        """Read the losses of the steps since the last time, and refuse to go on if one is not finite."""
        position = self.position
        sums = self._check_losses()
        step, full, sums_before, clock = self.logged
        now = time.perf_counter()
        if position.step > step:
            losses = _means(
                [a - b for a, b in zip(sums, sums_before, strict=True)],
                position.epoch_full - full,
                position.step - step,
            )
            values = {f"loss/module_{k}": loss for k, loss in enumerate(losses[:-1], start=1) if loss == loss} | {
                "loss/global": losses[-1],
                "lr": self._learning_rate(position.step - 1),
                "guided_share": position.num_guided / position.step,
                **self._speed(position.step - step, now - clock),
            }
            now_loads = self._loads()
            loads = _between(self.logged_loads, now_loads)
            self.logged_loads = now_loads
            values |= {f"busy/stage_{i}": load.busy for i, load in enumerate(loads, start=1)}
            values |= {f"queue/stage_{i}": load.queue for i, load in enumerate(loads, start=1) if i > 1}
            for callback in self.callbacks:
                callback.on_step(self._told(loads), values)
        self.logged = (position.step, position.epoch_full, sums, now)

    def _finish_epoch(self, epoch: int) -> None:
        """Validate, add the epoch's row, save."""
        config, position = self.config, self.position
        self._log()
        self._read_clock(training=True)
        loads = _between(self.epoch_loads, self._loads())
        num_steps = position.step - epoch * self.steps_per_epoch
        losses = _means(self.logged[2], position.epoch_full, num_steps)
        measured = measure_split(
            self.net,
            self.data.validation,
            config,
            self.execution,
            criterion=self.own.criterion,
            text=self.text,
            check=partial(self._leave, save=True),
        )
        if self.team.replicas > 1:  # BatchNorm statistics are each replica's own: what is best is for one to say
            measured = self.team.at_writer(partial(dict, measured))
        self._read_clock(training=False)
        row = {
            "epoch": epoch + 1,
            "step": position.step,
            **({"tokens": self._seen(position.step)} if self.text else {}),
            "seconds": round(position.seconds, 3),
            "train_loss": losses[-1],
            **{f"loss_{k}": loss for k, loss in enumerate(losses, start=1)},
            "guided_share": position.epoch_guided / num_steps,
            "lr": self._learning_rate(position.step - 1),
            **self._speed(num_steps, position.epoch_seconds, digits=1),
            **{f"validation_{name}": value for name, value in quality(measured, self.data, "validation").items()},
        }
        self.rows.append(row)
        position.epoch_full, position.epoch_guided, position.epoch_seconds = 0, 0, 0.0
        self.loss_sums.zero_()
        self.logged = (position.step, 0, [0.0] * len(self.loss_sums), time.perf_counter())
        score = measured["accuracy"] if measured["accuracy"] == measured["accuracy"] else -measured["loss"]
        if score > position.best_score or not position.best_epoch:
            position.best_epoch, position.best_score = epoch + 1, score if score == score else -math.inf
            self._check_parameters()
            self._write_checkpoint("best.pt", self._identity())
        # After best.pt: killed in between, the resumed run comes here again and writes best.pt again (`_restore`).
        self._save()
        for callback in self.callbacks:
            callback.on_epoch(self._told(loads), row)
        if config.run.balance == "epoch" and position.step < self.num_steps:
            self._share_anew()

    def _share_anew(self) -> None:
        """Share the local modules out to the ranks by the times of the epoch that is over."""
        if self.parallel is None:
            return
        states = self.parallel.rebalance(self.optimizer)
        if states is None:
            return
        self.optimizer = build_optimizer(self.config, self.parallel)
        self.parallel.load_optimizer_state(self.optimizer, states[0])
        for callback in self.callbacks:
            callback.on_share(self._told(), self.parallel.stages)

    def _finish(self) -> dict[str, Any]:
        """Evaluate the test split, this once, with the best weights."""
        config, position = self.config, self.position
        best = self.team.at_writer(partial(self._load_best, self.out / "best.pt"))
        checkpoint.load_network(self.network, best, self.out / "best.pt")
        measured: dict[str, Any] = {}
        if self.data.test is not None:
            measured = measure_split(
                self.net,
                self.data.test,
                config,
                self.execution,
                criterion=self.own.criterion,
                by_depth=True,
                text=self.text,
                check=partial(self._leave, save=False),  # last.pt is complete, and the weights are not its own any more
            )
        best_row = self.rows[position.best_epoch - 1]
        self._read_clock(training=False)
        result = {
            "config": config.plain(),
            "data_checksum": self.data.checksum,
            "steps": position.step,
            "epochs": len(self.rows),
            "guided_steps": position.num_guided,
            "guided_share": position.num_guided / position.step,
            "best_epoch": position.best_epoch,
            "num_modules": self.net.num_modules,
            "validation_accuracy": best_row.get("validation_accuracy"),
            "validation_loss": best_row["validation_loss"],
            "test_accuracy": measured.get("accuracy"),
            "test_loss": measured.get("loss"),
            "depth_accuracy": measured.get("depth_accuracy"),
            "depth_loss": measured.get("depth_loss"),
            "seconds": round(position.seconds, 3),
            **self._speed(position.step, position.train_seconds, digits=1),
            "num_parameters": {
                "backbone": sum(parameter.numel() for parameter in self.net.backbone.parameters()),
                "auxiliary": sum(parameter.numel() for parameter in self.net.auxiliary.parameters()),
            },
            "device": str(self.execution.device),
            "hardware": self.execution.hardware,
            "precision": self.execution.precision,
        }
        result |= self._text_result(best_row, measured)
        result = {name: plain(value) for name, value in result.items()}
        if self.team.writes:
            checkpoint.write_json(self.out / "result.json", result)
        return result

    def _text_result(self, best_row: dict[str, float], measured: dict[str, Any]) -> dict[str, Any]:
        """What result.json holds of text beside; nothing of other data."""
        if not isinstance(self.data, TextBundle):
            return {}
        found: dict[str, Any] = {
            "text": self.data.told,
            "tokens": self._seen(self.position.step),
            "bytes_per_token": dict(self.data.bytes_per_token),
        }
        found |= {name: value for name, value in best_row.items() if name.startswith("validation_")}
        if measured:
            found |= {f"test_{name}": value for name, value in quality(measured, self.data, "test").items()}
            found |= quality(measured, self.data, "test", depth=True)
        return found

    def _seen(self, num_steps: int) -> int:
        """Number of images, or tokens, that so many steps train on."""
        rows = num_steps * self.config.optimisation.batch_size * self.config.optimisation.accumulate
        return rows * self.data.context if isinstance(self.data, TextBundle) else rows

    def _speed(self, num_steps: int, seconds: float, digits: int | None = None) -> dict[str, float]:
        speed = self._seen(num_steps) / max(seconds, 1e-9)
        name = "tokens_per_second" if self.text else "images_per_second"
        return {name: speed if digits is None else round(speed, digits)}

    def _identity(self) -> dict[str, Any]:
        """What best.pt and last.pt both hold: weights, configuration, and what the data and the network are."""
        return {
            "run": self.run,
            "config": self.config.plain(),
            "precision": self.execution.precision,
            "criterion": self.own.criterion_name,
            "data": checkpoint.data_identity(self.data),
            "modules": [[group.start, group.stop] for group in self.net.partition.groups],
            "step": self.position.step,
            "net": self.net.state_dict(),
        }

    def _save(self, *, training: bool = False) -> None:
        """Write last.pt, unless what it would hold is not finite; `training`: the time until now went into steps."""
        self._write_checkpoint("last.pt", self._state(training))
        self._read_clock(training=False)

    def _begin(self, config: FitConfig) -> None:
        """Write the state of this run into another one's folder, as its start; last.pt comes last, so it is whole."""
        out = expand(config.run.out)
        state = self._state(training=True)  # every rank has a part of it
        if not self.team.writes:
            return
        with contextlib.suppress(Owned), Ownership(out, config.run.out):  # what another process writes is left to it
            if not _holds_run(out):
                self._begin_in(out, config, state)
        self._read_clock(training=False)

    def _begin_in(self, out: Path, config: FitConfig, state: dict[str, Any]) -> None:
        other = {"config": config.plain(), "run": uuid.uuid4().hex}
        best = self._load_best(self.out / "best.pt") if self.position.best_epoch else None
        if best is not None and best["step"] > self.rows[-1]["step"]:
            return  # killed between best.pt and last.pt: the best until here is gone, and that run trains by itself
        self._write_config(out, config)
        self._write_tokenizer(out)
        if self.rows:
            checkpoint.write_metrics(out / "metrics.csv", list(self.rows[0]), self.rows)
        if best is not None:
            checkpoint.save_checkpoint(out / "best.pt", best | other)
        if self.tensorboard is not None and config.run.tensorboard:
            self.tensorboard.copy_to(out / "tensorboard")
        checkpoint.save_checkpoint(out / "last.pt", state | other)

    def _state(self, training: bool) -> dict[str, Any]:
        """What last.pt holds: all that a run needs to go on; refused if a loss or a weight is not finite."""
        self._check_losses()
        self._check_parameters()
        self._read_clock(training=training)
        state = self._identity() | {
            "optimizer": self._optimizer_state(),
            "scaler": None if self.scaler is None else self.scaler.state_dict(),
            "random": None,
            "position": dataclasses.asdict(self.position),
            "loss_sums": None,
            "rows": self.rows,
        }
        # The random state of a single process is that of the first stage, and its losses are known to the last one.
        gathered = self.team.gather((_random_states(self.execution.device), self.loss_sums.cpu()))
        per_replica = [
            {"random": gathered[i][0], "loss_sums": gathered[i + self.team.num_stages - 1][1]}
            for i in range(0, self.team.size, self.team.num_stages)
        ]
        state |= per_replica[0]
        if self.team.replicas > 1:
            state["replicas"] = per_replica[1:]
        return state

    def _check_config(self, saved: dict[str, Any]) -> None:
        # "auto" precision that turns out differently here is another precision.
        current = self.config.changed(precision=self.execution.precision).plain()
        old = FitConfig.of(**saved["config"]).changed(precision=saved["precision"]).plain()
        checkpoint.check_same_config(self.out / "last.pt", old, current)

    def _restore(self, saved: dict[str, Any]) -> None:
        path, identity = self.out / "last.pt", self._identity()
        for name, here in identity["data"].items():
            if saved["data"].get(name, here) != here:  # older checkpoints hold no checksum
                raise ValueError(
                    f"{path} was trained on other data: {name} is {saved['data'][name]} there and {here} here; bring "
                    "the same data back, or choose another out"
                )
        if saved["criterion"] != identity["criterion"]:
            raise ValueError(
                f"{path} was trained on another loss: criterion is {saved['criterion']} there and "
                f"{identity['criterion']} here; hand in the same, or choose another out"
            )
        if saved["modules"] != identity["modules"]:
            raise ValueError(
                f"{path} is of a network that is cut elsewhere: use the torchlocal that wrote it, or choose another out"
            )
        checkpoint.load_network(self.network, saved, path)
        with checkpoint.reading(path, ValueError, RuntimeError):  # torch's own words are of its own parts
            if self.parallel is None:
                self.optimizer.load_state_dict(saved["optimizer"])
            else:
                self.parallel.load_optimizer_state(self.optimizer, saved["optimizer"])
            if self.scaler is not None:
                self.scaler.load_state_dict(saved["scaler"])
            self.rows = saved["rows"]
            self.position = _Position.of(saved, self.num_steps)
            own = [saved, *saved.get("replicas", [])][self.team.replica]
            self.loss_sums.copy_(own["loss_sums"])
            _set_random_states(own["random"], self.execution.device)
            ends = [row["step"] for row in self.rows]
            best_end = ends[self.position.best_epoch - 1] if self.position.best_epoch else 0
        if self.position.best_epoch:
            # Refuse a damaged one now and not at the end.
            step = self.team.at_writer(lambda: self._load_best(self.out / "best.pt")["step"])
            if step > ends[-1]:  # killed between best.pt and last.pt: the epoch that comes again writes it
                self.position.best_score = -math.inf
            elif step != best_end:
                raise ValueError(
                    f"{self.out / 'best.pt'} is of step {step}, but the best was epoch {self.position.best_epoch}: put "
                    "the right one back, or train again"
                )

    def _load_best(self, path: Path) -> dict[str, Any]:
        best = checkpoint.load_checkpoint(path)
        if best.get("run") != self.run:
            raise ValueError(f"{path} is of another run than last.pt beside it: put the right one back, or train again")
        return best

    def _write_checkpoint(self, name: str, state: dict[str, Any]) -> None:
        """Write a checkpoint, on the rank that does so."""
        if not self.team.writes:
            return
        checkpoint.save_checkpoint(self.out / name, state)
        for callback in self.callbacks:
            callback.on_checkpoint(self._told(), self.out / name)

    def _optimizer_state(self) -> dict[str, Any] | None:
        if self.parallel is None:
            return self.optimizer.state_dict()
        return self.parallel.optimizer_state(self.optimizer)

    def _loss_sums(self) -> Tensor:
        return self.loss_sums if self.parallel is None else self.parallel.average_over_replicas(self.loss_sums)

    def _write_config(self, out: Path, config: FitConfig) -> None:
        execution = self.execution
        chosen = f"{execution.device}, {execution.precision}{', channels_last' if execution.channels_last else ''}"
        checkpoint.write_config(out / "config.yaml", config.plain(), [f"ran on {chosen}, torch {torch.__version__}"])

    def _write_tokenizer(self, out: Path) -> None:
        """Beside the checkpoints, which mean nothing without it."""
        if isinstance(self.data, TextBundle) and self.data.tokenizer:
            checkpoint.write_file(out / "tokenizer.json", self.data.tokenizer)

    def _check_losses(self) -> list[float]:
        sums: list[float] = self._loss_sums().tolist()
        for k, value in enumerate(sums, start=1):
            if not math.isfinite(value):
                self._diverged(f"the loss of local module {k} of {len(sums)}")
        return sums

    def _check_parameters(self) -> None:
        finite = torch.stack([parameter.isfinite().all() for parameter in self.net.parameters()])
        if not finite.all():
            names = [name for name, _ in self.net.named_parameters()]
            self._diverged(f"the parameter {names[int(finite.int().argmin())]}")

    def _diverged(self, what: str) -> None:
        last = self.out / "last.pt"
        kept = f"{last} is the last good checkpoint" if last.exists() else "no checkpoint was written before"
        raise Diverged(
            f"{what} is NaN or infinite at step {self.position.step} (last seen finite at step {self.logged[0]}): "
            f"lower lr={self.config.optimisation.lr:g}, or give warmup_epochs or clip; {kept}"
        )

    def _learning_rate(self, step: int) -> float:
        return learning_rate(
            self.config,
            step,
            steps_per_epoch=self.steps_per_epoch,
            num_steps=self.num_steps,
            guidance=self.guidance,
        )

    def _read_clock(self, *, training: bool) -> None:
        now = time.perf_counter()
        seconds, self.clock = now - self.clock, now
        self.position.seconds += seconds
        if training:
            self.position.train_seconds += seconds
            self.position.epoch_seconds += seconds

    def _stop(self, signum: signal.Signals) -> None:
        self.stopped_by = signum
        if self.parallel is not None:
            self.parallel.stop_requested = int(signum)
        if self.progress is not None:  # not by print, which this signal may have interrupted
            told = f"\n{signum.name}: finishing the step, then saving; once more to leave at once\n"
            with contextlib.suppress(OSError):
                os.write(2, told.encode())

    def _leave(self, *, save: bool, training: bool = False) -> None:
        """End the run if a signal asked for it; on several ranks the first stage decides after which step."""
        if self.parallel is not None:
            self.stopped_by = signal.Signals(self.parallel.stopping) if self.parallel.stopping else None
        if self.stopped_by is None:
            return
        if save:
            self._save(training=training)
        if self.parallel is not None:
            self.parallel.close()
        if not self.team.writes:
            raise Elsewhere(f"stopped by {self.stopped_by.name}")
        raise Interrupted(
            f"stopped by {self.stopped_by.name} after step {self.position.step} of {self.num_steps}; saved in "
            f"{self.out / 'last.pt'}, to be resumed.",
            self.stopped_by,
        )


def _finished_result(path: Path, config: FitConfig) -> dict[str, Any]:
    try:
        result: dict[str, Any] = json.loads(path.read_text())
        saved = result["config"]
        if not isinstance(saved, dict) or not set(_RESULT) <= set(result):
            raise ValueError
    except (ValueError, KeyError, TypeError) as error:
        raise ValueError(f"{path} is damaged: delete it, and resume to write it again") from error
    checkpoint.check_same_config(path, saved, config.plain())
    return result


def _guides_any(guidance: Guidance, num_steps: int) -> bool:
    """Whether a step is guided; of a long run some are looked at, from its end on, where a phase ends."""
    looked_at = range(num_steps - 1, max(-1, num_steps - 1 - _MOST_LOOKED_AT), -1)
    return any(map(guidance, looked_at)) or (len(looked_at) < num_steps and guidance.share > 0)


def _between(before: Sequence[Load], now: Sequence[Load]) -> list[Load]:
    """What each stage did from one moment to another."""
    return [b - a for a, b in zip(before, now, strict=True)]


def _means(sums: Sequence[float], num_full: int, num_steps: int) -> list[float]:
    """Return mean losses; of the modules before the last NaN, if no step measured them."""
    first = [value / num_full if num_full else math.nan for value in sums[:-1]]
    return [*first, sums[-1] / num_steps]


def _random_states(device: torch.device) -> dict[str, Tensor]:
    """Torch's, by the kind of device; Python's and numpy's are the user's."""
    state = RandomState.get(device, numpy=False)
    return {"cpu": state.cpu} | {other.type: found for other, found in zip(*state.devices, strict=True)}


def _set_random_states(states: dict[str, Tensor], device: torch.device) -> None:
    others = [device] if device.type != "cpu" and device.type in states else []
    RandomState(states["cpu"], (others, [states[other.type] for other in others])).set()
