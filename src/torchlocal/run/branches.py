"""What the runs of a comparison have in common, so that it is trained once."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from torchlocal.run.build import count_steps, learning_rate
from torchlocal.run.checkpoint import fixed_fields
from torchlocal.run.config import FitConfig, build_guidance, fit_options

__all__ = ["Branch", "find_branches", "first_alike"]

_MOST_STEPS = 1_000_000  # of a run that is looked through, step by step


@dataclass(frozen=True, kw_only=True)
class Branch:
    """A run whose first steps are those of another one: it starts at `step`, from that one's state."""

    step: int
    config: FitConfig


def first_alike(configs: Mapping[str, FitConfig], out: Path) -> dict[str, str]:
    """For every method the one trained in its place, of all with the same result: one already begun, or the first."""
    keys = {method: json.dumps(_trained_fields(config), sort_keys=True) for method, config in configs.items()}
    firsts: dict[str, str] = {}
    for method in sorted(configs, key=lambda method: not any((out / method).glob("seed*/config.yaml"))):
        firsts.setdefault(keys[method], method)
    return {method: firsts[key] for method, key in keys.items()}


def find_branches(runs: Mapping[str, FitConfig], num_images: int) -> dict[str, tuple[str, int]]:
    """For runs that can start from an earlier one's state: which one, and at which step (as late as possible).

    Runs have those steps in common that are local in both, at the same learning rate, before anything else, whatever
    the seed. Less than an epoch is not worth a checkpoint. Compiled runs are left alone: what a step is compiled to
    depends on the shapes of steps before it.

    Args:
        runs: the configurations by name, in the order in which they are trained.
        num_images: number of training images.
    """
    found: dict[str, tuple[str, int]] = {}
    earlier: dict[str, FitConfig] = {}
    for name, config in runs.items():
        steps_per_epoch, num_steps = count_steps(config, num_images)
        common = {
            other: _common_steps(config, trained, steps_per_epoch, num_steps) for other, trained in earlier.items()
        }
        trunk = max(common, key=lambda other: common[other], default=None)
        if trunk is not None and steps_per_epoch <= common[trunk] < num_steps:
            found[name] = trunk, common[trunk]
        earlier[name] = config
    return found


def _trained_fields(config: FitConfig) -> dict[str, Any]:
    """The options on which the trained weights depend, those that only change rounding included."""
    rounding = {name: config.value(name) for name, one in fit_options().items() if one.rounds}
    return fixed_fields(config.plain()) | rounding


def _local_fields(config: FitConfig) -> dict[str, Any]:
    """The options on which local steps depend, the learning rate left out."""
    guided = {name for name, one in fit_options().items() if one.guided}
    fields = _trained_fields(config)
    return {name: fields[name] for name in fields if not name.startswith("guidance.") and name not in guided}


def _common_steps(a: FitConfig, b: FitConfig, steps_per_epoch: int, num_steps: int) -> int:
    if a.run.compile or num_steps > _MOST_STEPS or _local_fields(a) != _local_fields(b):
        return 0
    if "random" in (a.guidance.name, b.guidance.name):  # which steps are guided depends on the seed
        return 0
    guidances = [build_guidance(config).bind(num_steps=num_steps, steps_per_epoch=steps_per_epoch) for config in (a, b)]
    for step in range(num_steps):
        rates = {
            learning_rate(config, step, steps_per_epoch=steps_per_epoch, num_steps=num_steps, guidance=guidance)
            for config, guidance in zip((a, b), guidances, strict=True)
        }
        if len(rates) > 1 or any(guidance(step) for guidance in guidances):
            return step
    return num_steps
