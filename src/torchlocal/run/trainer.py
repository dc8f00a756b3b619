"""The trainer: one loop for end-to-end, local and periodically guided training, which differ only in their guidance."""

import contextlib
import dataclasses
import json
import math
import os
import signal
import threading
import time
import uuid
import warnings
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from itertools import islice
from pathlib import Path
from types import FrameType, TracebackType
from typing import Any, cast

import torch
from torch import Tensor

from torchlocal.guidance import Guidance
from torchlocal.lifetime import STOPPING
from torchlocal.network import DecoupledNetwork
from torchlocal.parallel.network import ParallelNetwork
from torchlocal.parallel.team import Elsewhere, Team
from torchlocal.run import checkpoint
from torchlocal.run.branches import Branch
from torchlocal.run.build import (
    Execution,
    build_network,
    build_optimizer,
    count_steps,
    learning_rate,
    load_run_data,
    load_shared_data,
    resolve_execution,
    share_out,
    train_step,
)
from torchlocal.run.config import FitConfig, GuidanceConfig, build_guidance, config_to_dict
from torchlocal.run.evaluation import evaluate, measure_split
from torchlocal.run.folder import Owned, Ownership, expand
from torchlocal.run.progress import Reporter

_PATIENCE = 3.0  # seconds
_RESULT = (
    "steps", "epochs", "guided_share", "validation_accuracy", "test_accuracy", "depth_accuracy", "seconds",
    "num_parameters", "device", "precision",
)  # fmt: skip
_MOST_LOOKED_AT = 100_000  # steps

__all__ = [
    "Diverged",
    "Execution",
    "FitConfig",
    "GuidanceConfig",
    "Interrupted",
    "build_network",
    "build_optimizer",
    "count_steps",
    "evaluate",
    "fit",
    "learning_rate",
    "load_run_data",
    "resolve_execution",
    "train_step",
]


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
    resume: bool = False,
    progress: bool = True,
    timeout: float = 300.0,
    branches: Sequence[Branch] = (),
) -> dict[str, Any]:
    """Train a network and write everything about it into the folder config.out.

    The first SIGINT (Ctrl-C), SIGTERM, SIGHUP or SIGUSR1 finishes the current step, saves and leaves; the second one
    acts at once.
    Sets torch's global random number generators.

    Where torch.distributed is initialised, the local modules are shared out to the ranks, each of which calls this. The
    result is that of a single process, bit for bit (with as many threads per process), and so are the checkpoints.

    Args:
        config: what to do.
        resume: continue the run in config.out, bit for bit; without one there, start it.
        progress: show a progress bar on a terminal, or else one line per epoch.
        timeout: longest time in seconds that a rank waits for another one in a step.
        branches: runs that are the same as this one up to a step; in the folders of those that have not begun, this
            run leaves its state at that step, for them to be resumed from there.

    Returns:
        What result.json holds: test accuracy and loss of the weights that were best on the validation split, the
        accuracy by depth, and how the run went.

    Raises:
        ValueError: if a value cannot work, config.out holds another run, or another process writes there.
        Diverged: if a loss or a parameter is no longer finite; the checkpoint before stays.
        Interrupted: after a signal.
        OSError: if something cannot be written; the checkpoint before stays.
    """
    out = expand(config.out)
    team = Team(config.replicas, timeout)
    modes = {"resume": resume, "memory": config.memory, "recompute": config.recompute}
    team.check_same(checkpoint.fixed_fields(config_to_dict(config)) | modes)
    num_threads = torch.get_num_threads()
    with contextlib.ExitStack() as owned:
        result, saved = team.at_writer(partial(_enter, owned, out, config, resume))
        if result is not None:
            return cast(dict[str, Any], result)
        torch.set_num_threads(config.num_threads or num_threads)
        try:
            return _Run(config, saved, progress and team.writes, team, branches).train()
        finally:
            torch.set_num_threads(num_threads)


def _enter(
    owned: contextlib.ExitStack, out: Path, config: FitConfig, resume: bool
) -> tuple[dict[str, Any] | None, dict[str, Any] | None]:
    """Become the owner of the run folder, unless its run has ended, and look what is there."""
    if resume and (out / "result.json").exists():  # only read, and perhaps where nothing can be written
        return _look(out, config, resume)
    # One that was killed may be about to end: its ranks, or the process that torchrun has replaced.
    owned.enter_context(Ownership(out, config.out, patience=_PATIENCE if resume else 0.0))
    return _look(out, config, resume)


def _look(out: Path, config: FitConfig, resume: bool) -> tuple[dict[str, Any] | None, dict[str, Any] | None]:
    """The result and the checkpoint that are in the run folder, if the run may go on there."""
    if resume:
        if (out / "result.json").exists():
            return _finished_result(out / "result.json", config), None
        if (out / "last.pt").exists():
            return None, checkpoint.load_checkpoint(out / "last.pt", resumable=True)
    elif _holds_run(out):
        raise ValueError(f"out={config.out!r} already holds a run: resume it, or choose another folder")
    return None, None


def _holds_run(out: Path) -> bool:
    return (out / "last.pt").exists() or (out / "result.json").exists()


@dataclass(kw_only=True)
class _Position:
    """How far a run is; with the rows of the metrics all there is to know beside tensors."""

    step: int = 0
    num_guided: int = 0
    seconds: float = 0.0
    train_seconds: float = 0.0
    best_epoch: int = 0
    best_accuracy: float = -1.0
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
        numbers = all(isinstance(v, int | float) and not isinstance(v, bool) for v in values.values())
        if absent or not numbers or not all(-1 <= value < float("inf") for value in values.values()):
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
        self, config: FitConfig, saved: dict[str, Any] | None, progress: bool, team: Team, branches: Sequence[Branch]
    ) -> None:
        self.progress, self.team, self.branches = progress, team, branches
        self.config, self.out = config, expand(config.out)
        self.run = (
            uuid.uuid4().hex if saved is None else saved.get("run")
        )  # None: of a torchlocal that had no such name
        self.clock = time.perf_counter()
        self.execution = resolve_execution(config)
        if saved is not None:
            self._check_config(saved)
        self.data = load_shared_data(config, team)
        self.steps_per_epoch, self.num_steps = count_steps(config, len(self.data.train))
        self.num_epochs = -(-self.num_steps // self.steps_per_epoch)
        self.network = build_network(config, self.data, self.execution)
        self.parallel = share_out(self.network, config, self.data, self.execution, team) if team.parallel else None
        self.net: DecoupledNetwork | ParallelNetwork = self.network if self.parallel is None else self.parallel
        if config.compile:
            self.net.compile()
        self.optimizer = build_optimizer(config, self.net)
        self.scaler = self.execution.make_scaler()
        self.guidance = build_guidance(config).bind(num_steps=self.num_steps, steps_per_epoch=self.steps_per_epoch)
        if config.guidance.name != "never" and not _guides_any(self.guidance, self.num_steps):
            warnings.warn(f"{self.guidance} guides none of the {self.num_steps} steps", stacklevel=3)
        self.position, self.rows = _Position(), list[dict[str, float]]()
        self.loss_sums = torch.zeros(self.net.num_modules, device=self.execution.device)
        self.stopped_by: signal.Signals | None = None
        # Not the seed of the weights, which has been used up to a point that depends on the auxiliary networks:
        # dropout is the same whatever they are.
        torch.manual_seed(config.seed + 2**32 * (1 + team.replica))
        if saved is not None:
            self._restore(saved)
        self.logged = (self.position.step, self.position.epoch_full, self.loss_sums.tolist(), time.perf_counter())

    def train(self) -> dict[str, Any]:
        """Train from where the run is to its end."""
        config, position = self.config, self.position
        self._write_folder()
        events = self.out / "tensorboard" if config.tensorboard and self.team.writes else None
        with (
            Reporter(self.num_steps, position.step, enabled=self.progress, events=events) as self.reporter,
            _Signals(self._stop),
        ):
            for epoch in range(len(self.rows), self.num_epochs):  # an epoch is over once it has its row
                self._train_epoch(epoch)
                self._finish_epoch(epoch)
            result = self._finish()
        if self.parallel is not None:
            self.parallel.close()
        return result

    def _train_epoch(self, epoch: int) -> None:
        config, position = self.config, self.position
        first = epoch * self.steps_per_epoch
        start = (position.step - first) * config.accumulate
        batches = iter(
            self.data.train.batches(config.batch_size, epoch=epoch, train=True, seed=config.seed, start=start)
        )
        self.net.train()
        self._read_clock(training=False)
        for step in range(position.step, min(first + self.steps_per_epoch, self.num_steps)):
            for branch in self.branches:
                if branch.step == step:
                    self._begin(branch.config)
            for group in self.optimizer.param_groups:
                group["lr"] = self._learning_rate(step)
            guided = self.guidance(step)
            losses = train_step(
                self.net,
                self.optimizer,
                islice(batches, config.accumulate),
                config=config,
                execution=self.execution,
                guided=guided,
                scaler=self.scaler,
            )
            self._count(losses, guided)
            self.reporter.advance(position.step, f"epoch {epoch + 1}/{self.num_epochs}")
            if position.step % config.log_every == 0:
                self._log()
            if config.checkpoint_every and position.step % config.checkpoint_every == 0:
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
            images = (position.step - step) * self.config.batch_size * self.config.accumulate
            self.reporter.losses(
                position.step,
                losses,
                guided_share=position.num_guided / position.step,
                lr=self._learning_rate(position.step - 1),
                speed=images / (now - clock),
            )
        self.logged = (position.step, position.epoch_full, sums, now)

    def _finish_epoch(self, epoch: int) -> None:
        """Validate, add the epoch's row, save."""
        config, position = self.config, self.position
        self._log()
        self._read_clock(training=True)
        num_steps = position.step - epoch * self.steps_per_epoch
        losses = _means(self.logged[2], position.epoch_full, num_steps)
        measured = measure_split(
            self.net, self.data.validation, config, self.execution, check=partial(self._leave, save=True)
        )
        if self.team.replicas > 1:  # BatchNorm statistics are each replica's own: what is best is for one to say
            measured = self.team.at_writer(partial(dict, measured))
        self._read_clock(training=False)
        row = {
            "epoch": epoch + 1,
            "step": position.step,
            "seconds": round(position.seconds, 3),
            "train_loss": losses[-1],
            **{f"loss_{k}": loss for k, loss in enumerate(losses, start=1)},
            "guided_share": position.epoch_guided / num_steps,
            "lr": self._learning_rate(position.step - 1),
            "images_per_second": round(
                num_steps * config.batch_size * config.accumulate / max(position.epoch_seconds, 1e-9), 1
            ),
            "validation_loss": measured["loss"],
            "validation_accuracy": measured["accuracy"],
        }
        self.rows.append(row)
        position.epoch_full, position.epoch_guided, position.epoch_seconds = 0, 0, 0.0
        self.loss_sums.zero_()
        self.logged = (position.step, 0, [0.0] * len(self.loss_sums), time.perf_counter())
        if measured["accuracy"] > position.best_accuracy:
            position.best_epoch, position.best_accuracy = epoch + 1, measured["accuracy"]
            self._check_parameters()
            self._write(checkpoint.save_checkpoint, self.out / "best.pt", self._identity())
        # After best.pt: killed in between, the resumed run comes here again and writes best.pt again (`_restore`).
        self._save()
        self._write(checkpoint.write_metrics, self.out / "metrics.csv", list(row), self.rows)
        self.reporter.scalars(position.step, {f"validation/{name}": measured[name] for name in ("loss", "accuracy")})
        self.reporter.epoch(self.num_epochs, row, losses)

    def _finish(self) -> dict[str, Any]:
        """Evaluate the test split, this once, with the best weights."""
        config, position = self.config, self.position
        best = self.team.at_writer(partial(self._load_best, self.out / "best.pt"))
        checkpoint.load_network(self.network, best, self.out / "best.pt")
        measured = measure_split(
            self.net,
            self.data.test,
            config,
            self.execution,
            by_depth=True,
            check=partial(self._leave, save=False),  # last.pt is complete, and the weights are not its own any more
        )
        self._read_clock(training=False)
        images = position.step * config.batch_size * config.accumulate
        result = {
            "config": config_to_dict(config),
            "data_checksum": self.data.checksum,
            "steps": position.step,
            "epochs": len(self.rows),
            "guided_steps": position.num_guided,
            "guided_share": position.num_guided / position.step,
            "best_epoch": position.best_epoch,
            "validation_accuracy": position.best_accuracy,
            "test_accuracy": measured["accuracy"],
            "test_loss": measured["loss"],
            "depth_accuracy": measured["depth_accuracy"],
            "seconds": round(position.seconds, 3),
            "images_per_second": round(images / max(position.train_seconds, 1e-9), 1),
            "num_parameters": {
                "backbone": sum(parameter.numel() for parameter in self.net.backbone.parameters()),
                "auxiliary": sum(parameter.numel() for parameter in self.net.auxiliary.parameters()),
            },
            "device": str(self.execution.device),
            "precision": self.execution.precision,
        }
        self._write(checkpoint.write_json, self.out / "result.json", result)
        return result

    def _identity(self) -> dict[str, Any]:
        """What every checkpoint holds: the weights, and what they belong to."""
        return {
            "run": self.run,
            "config": config_to_dict(self.config),
            "precision": self.execution.precision,
            "data": {
                "num_train": len(self.data.train),
                "num_validation": len(self.data.validation),
                "num_classes": self.data.num_classes,
                "shape": list(self.data.shape),
                "checksum": self.data.checksum,
                "classes": list(self.data.classes),
            },
            "modules": [[group.start, group.stop] for group in self.net.partition.groups],
            "step": self.position.step,
            "net": self.net.state_dict(),
        }

    def _save(self, *, training: bool = False) -> None:
        """Write last.pt, unless what it would hold is not finite; `training`: the time until now went into steps."""
        self._write(checkpoint.save_checkpoint, self.out / "last.pt", self._state(training))
        self._read_clock(training=False)

    def _begin(self, config: FitConfig) -> None:
        """Begin another run with the state of this one; last.pt, which says that it began, comes last."""
        out = expand(config.out)
        state = self._state(training=True)  # every rank has a part of it
        if not self.team.writes:
            return
        with contextlib.suppress(Owned), Ownership(out, config.out):  # what another process writes is left to it
            if not _holds_run(out):
                self._begin_in(out, config, state)
        self._read_clock(training=False)

    def _begin_in(self, out: Path, config: FitConfig, state: dict[str, Any]) -> None:
        other = {"config": config_to_dict(config), "run": uuid.uuid4().hex}
        best = self._load_best(self.out / "best.pt") if self.position.best_epoch else None
        if best is not None and best["step"] > self.rows[-1]["step"]:
            return  # killed between best.pt and last.pt: the best until here is gone, and that run trains by itself
        self._write_config(out, config)
        if best is not None:
            checkpoint.save_checkpoint(out / "best.pt", best | other)
        if self.config.tensorboard and config.tensorboard:
            self.reporter.copy_events(out / "tensorboard")
        checkpoint.save_checkpoint(out / "last.pt", state | other)

    def _state(self, training: bool) -> dict[str, Any]:
        """All that a run needs to go on; refused if it is not finite."""
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
        current = config_to_dict(self.config) | {"precision": self.execution.precision}
        old = saved["config"] | {"precision": saved["precision"]}
        checkpoint.check_same_config(self.out / "last.pt", old, current)

    def _restore(self, saved: dict[str, Any]) -> None:
        path, identity = self.out / "last.pt", self._identity()
        for name, here in identity["data"].items():
            if saved["data"].get(name, here) != here:  # older checkpoints hold no checksum
                raise ValueError(
                    f"{path} was trained on other data: {name} is {saved['data'][name]} there and {here} here; bring "
                    "the same data back, or choose another out"
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
                self.position.best_accuracy = -1.0
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

    def _write(self, write: Callable[..., None], *arguments: Any) -> None:
        """Write a file of the run folder, on the rank that does so."""
        if self.team.writes:
            write(*arguments)

    def _optimizer_state(self) -> dict[str, Any] | None:
        if self.parallel is None:
            return self.optimizer.state_dict()
        return self.parallel.optimizer_state(self.optimizer)

    def _loss_sums(self) -> Tensor:
        return self.loss_sums if self.parallel is None else self.parallel.average_over_replicas(self.loss_sums)

    def _write_folder(self) -> None:
        self.team.at_writer(partial(self._write_config, self.out, self.config))

    def _write_config(self, out: Path, config: FitConfig) -> None:
        execution = self.execution
        chosen = f"{execution.device}, {execution.precision}{', channels_last' if execution.channels_last else ''}"
        checkpoint.write_config(
            out / "config.yaml", config_to_dict(config), [f"ran on {chosen}, torch {torch.__version__}"]
        )
        if self.rows:  # a run that was killed may have written a row that its last.pt does not know
            checkpoint.write_metrics(out / "metrics.csv", list(self.rows[0]), self.rows)

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
            f"lower lr={self.config.lr:g}, or give warmup_epochs or clip; {kept}"
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
        if self.progress:  # not by print, which this signal may have interrupted
            told = f"\n{signum.name}: finishing the step, then saving; once more to leave at once\n"
            with contextlib.suppress(OSError):
                os.write(2, told.encode())

    def _leave(self, *, save: bool, training: bool = False) -> None:
        """Leave if a signal asked for it; several ranks after the same step, which the first stage decides."""
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


class _Signals:
    """Hands the first signal that asks to leave to a function; the second one acts as if nobody had listened."""

    def __init__(self, handle: Callable[[signal.Signals], None]) -> None:
        self._handle = handle
        self._previous: dict[signal.Signals, Any] = {}

    def __enter__(self) -> None:
        if threading.current_thread() is not threading.main_thread():
            return  # Python delivers signals to the main thread only
        for signum in STOPPING:
            if signal.getsignal(signum) is not signal.SIG_IGN:  # ignored on purpose, as under nohup
                self._previous[signum] = signal.signal(signum, self._receive)

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._restore()

    def _receive(self, signum: int, frame: FrameType | None) -> None:
        self._restore()
        self._handle(signal.Signals(signum))

    def _restore(self) -> None:
        while self._previous:
            signum, handler = self._previous.popitem()
            signal.signal(signum, signal.SIG_DFL if handler is None else handler)


def _finished_result(path: Path, config: FitConfig) -> dict[str, Any]:
    try:
        result: dict[str, Any] = json.loads(path.read_text())
        saved = result["config"]
        if not isinstance(saved, dict) or not set(_RESULT) <= set(result):
            raise ValueError
    except (ValueError, KeyError, TypeError) as error:
        raise ValueError(f"{path} is damaged: delete it, and resume to write it again") from error
    checkpoint.check_same_config(path, saved, config_to_dict(config))
    return result


def _guides_any(guidance: Guidance, num_steps: int) -> bool:
    """Whether a step is guided; of a long run some are looked at, from its end on, where a phase ends."""
    looked_at = range(num_steps - 1, max(-1, num_steps - 1 - _MOST_LOOKED_AT), -1)
    return any(map(guidance, looked_at)) or (len(looked_at) < num_steps and guidance.share > 0)


def _means(sums: Sequence[float], num_full: int, num_steps: int) -> list[float]:
    """Return mean losses; of the modules before the last NaN, if no step measured them."""
    first = [value / num_full if num_full else math.nan for value in sums[:-1]]
    return [*first, sums[-1] / num_steps]


def _random_states(device: torch.device) -> dict[str, Tensor]:
    states = {"cpu": torch.get_rng_state()}
    if device.type == "cuda":
        states["cuda"] = torch.cuda.get_rng_state(device)
    if device.type == "mps":
        states["mps"] = torch.mps.get_rng_state()
    return states


def _set_random_states(states: dict[str, Tensor], device: torch.device) -> None:
    torch.set_rng_state(states["cpu"])
    if device.type == "cuda" and "cuda" in states:
        torch.cuda.set_rng_state(states["cuda"], device)
    if device.type == "mps" and "mps" in states:
        torch.mps.set_rng_state(states["mps"])
