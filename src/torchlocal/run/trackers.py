"""Experiment trackers as callbacks: Weights & Biases and MLflow, which are optional extras."""

from __future__ import annotations

from collections.abc import Mapping
from importlib import import_module
from typing import Any

from torchlocal.run.callbacks import Callback, RunState, validation
from torchlocal.run.config import short_names

__all__ = ["MLflow", "WandB"]


class WandB(Callback):
    """Weights & Biases: losses, validation and the result; a run that is resumed goes on as the same run there.

    Args:
        project: the project.
        options: what else `wandb.init` takes, such as `entity`, `tags` or `mode="offline"`.
    """

    def __init__(self, project: str | None = None, **options: Any) -> None:
        self._options = {"project": project, **options}
        self._wandb = _import("wandb", "WandB")
        self._run: Any = None

    def on_start(self, state: RunState) -> None:
        told = {"id": state.run, "name": str(state.out), "resume": "allow", "dir": str(state.out)}
        self._run = self._wandb.init(config=state.config.plain(), **(told | self._options))

    def on_step(self, state: RunState, values: Mapping[str, float]) -> None:
        self._run.log(dict(values), step=state.step)

    def on_epoch(self, state: RunState, row: Mapping[str, float]) -> None:
        self._run.log(validation(row), step=state.step)

    def on_end(self, state: RunState, result: Mapping[str, Any] | None) -> None:
        if self._run is None:
            return
        if result is not None:
            self._run.summary.update(_numbers(result))
        self._run.finish(exit_code=0 if result is not None else 1)


class MLflow(Callback):
    """MLflow: options as parameters, losses and validation as metrics; a resumed run goes on as the same run there.

    Args:
        experiment: the experiment; None: the one that is set.
        tracking_uri: where to log to; None: what is set (`MLFLOW_TRACKING_URI`).
        options: what else `mlflow.start_run` takes, such as `run_name` or `tags`.
    """

    def __init__(self, experiment: str | None = None, *, tracking_uri: str | None = None, **options: Any) -> None:
        self._experiment, self._uri, self._options = experiment, tracking_uri, options
        self._mlflow = _import("mlflow", "MLflow")
        self._started = False

    def on_start(self, state: RunState) -> None:
        mlflow = self._mlflow
        if self._uri is not None:
            mlflow.set_tracking_uri(self._uri)
        if self._experiment is not None:
            mlflow.set_experiment(self._experiment)
        found = mlflow.search_runs(filter_string=f"tags.torchlocal = '{state.run}'", output_format="list")
        if found:
            mlflow.start_run(run_id=found[0].info.run_id)
        else:
            options = {"run_name": str(state.out), **self._options}
            mlflow.start_run(**(options | {"tags": {**options.get("tags", {}), "torchlocal": state.run}}))
            mlflow.log_params(short_names(state.config.plain()))
        self._started = True

    def on_step(self, state: RunState, values: Mapping[str, float]) -> None:
        self._mlflow.log_metrics(dict(values), step=state.step)

    def on_epoch(self, state: RunState, row: Mapping[str, float]) -> None:
        self._mlflow.log_metrics(validation(row), step=state.step)

    def on_end(self, state: RunState, result: Mapping[str, Any] | None) -> None:
        if not self._started:
            return
        if result is not None:
            self._mlflow.log_metrics(_numbers(result), step=state.step)
        self._mlflow.end_run("FINISHED" if result is not None else "KILLED")


def _import(name: str, kind: str) -> Any:
    try:
        return import_module(name)
    except ImportError as error:  # of the package itself, or of one that it needs
        raise ValueError(f"{kind} needs {name} ({error}): pip install 'torchlocal[{name}]'") from error


def _numbers(result: Mapping[str, Any]) -> dict[str, float]:
    return {name: value for name, value in result.items() if isinstance(value, int | float)}
