"""What the methods of a comparison that depend on others are given: PGL's memory and time, measured once."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from functools import cache
from pathlib import Path
from typing import Any

import torch

from torchlocal.compare.costs import StepCosts, measure_costs
from torchlocal.data import DataBundle, TextBundle
from torchlocal.network import decouple
from torchlocal.run.build import build_network, build_optimizer, count_steps, resolve_execution
from torchlocal.run.checkpoint import write_json
from torchlocal.run.config import FitConfig, fit_options, short_names
from torchlocal.run.own import Own

__all__ = ["Measured", "check_parts"]


def check_parts(configs: Mapping[str, FitConfig], data: DataBundle, own: Own) -> None:
    """Refuse a method whose network or optimizer cannot be made: now, not after the runs of other methods."""
    for config in configs.values():
        count_steps(config, len(data.train), "rows of text" if isinstance(data, TextBundle) else "training images")
        build_optimizer(config, build_network(config, data, resolve_execution(config), own))


class Measured:
    """Memory and time of PGL's steps and of end-to-end ones, side by side.

    What was found is kept in a file and read from there, so that a comparison that goes on, be it on another machine,
    trains what it has begun to train.

    Args:
        path: the file.
        config: the common configuration.
        data: where the batches come from.
        own: what was handed in.
        rounds: how often steps are timed; 0: not at all.
        say: told what is measured.
    """

    def __init__(
        self, path: Path, config: FitConfig, data: DataBundle, own: Own, *, rounds: int, say: Callable[[str], object]
    ) -> None:
        self._path, self._config, self._data, self._own = path, config, data, own
        self._rounds, self._say = rounds, say
        self.num_units = cache(self._count_units)
        try:
            saved: dict[str, dict[str, float]] = json.loads(path.read_text(encoding="utf-8"))
            if not all(isinstance(found, dict) for found in saved.values()):
                raise TypeError
            self._found = {_told_now(key): found for key, found in saved.items()}
        except (OSError, ValueError, AttributeError, TypeError):  # absent, or damaged
            self._found = {}

    def bytes_of_a_step(self, pgl: FitConfig, end_to_end: FitConfig) -> int:
        """Bytes that a step of end-to-end training may take to need no more than PGL in all."""
        return int(self._of(pgl, end_to_end, "bytes"))

    def steps_in_time(self, pgl: FitConfig, end_to_end: FitConfig) -> int:
        """Number of steps that end-to-end training takes in the time of PGL's whole training."""
        return int(self._of(pgl, end_to_end, "steps"))

    def _count_units(self, name: str) -> int:
        with torch.random.fork_rng(devices=[]):
            model = self._own.make_model(self._config.changed(model=name), self._data)
            sample = self._data.sample(2)
            return len(decouple(model, 1, sample=sample, prediction=self._own.make_prediction()).partition.units)

    def _of(self, pgl: FitConfig, end_to_end: FitConfig, what: str) -> float:
        key = _key(pgl.changed(seed=0).plain(), end_to_end.plain())
        known = self._found.get(key, {}).get(what)
        if isinstance(known, int | float) and known > 0:
            return known
        check_parts({"pgl": pgl, "end-to-end": end_to_end}, self._data, self._own)
        self._say("measuring the memory and time of pgl that its rivals get")
        with torch.random.fork_rng(devices=[]):
            costs = measure_costs(
                {"pgl": pgl, "end-to-end": end_to_end}, self._data, self._own, rounds=self._rounds, flops=False
            )
        self._found[key] = self._decided(costs["pgl"], costs["end-to-end"], pgl)
        write_json(self._path, self._found)
        return self._found[key][what]

    def _decided(self, pgl: StepCosts, whole: StepCosts, config: FitConfig) -> dict[str, float]:
        found: dict[str, float] = {"bytes": pgl.total_peak_bytes - whole.resident_bytes}
        if self._rounds:
            _, num_steps = count_steps(config, len(self._data.train))
            found["steps"] = max(1, int(num_steps * pgl.mean_seconds / whole.mean_seconds))
        return found


def _key(*configs: Mapping[str, Any]) -> str:
    """What these configurations are found by: the options on which costs depend, but for those at their default.

    So an option that comes later leaves the keys of comparisons that were begun before it as they are.
    """
    defaults, absent = short_names({}), object()
    names = [name for name, one in fit_options().items() if one.rounds or not one.free]
    told = []
    for config in configs:
        given = short_names(config)
        told.append({name: given[name] for name in names if given.get(name, absent) != defaults.get(name, absent)})
    return json.dumps(told, sort_keys=True)


def _told_now(key: str) -> str:
    """A key of a file in this form; earlier versions wrote all options. One that is not understood is left as it is."""
    try:
        return _key(*json.loads(key))
    except (ValueError, TypeError, AttributeError):
        return key
