"""What one training step of several methods costs: peak memory, and time with the methods taking turns."""

from __future__ import annotations

import statistics
import time
from collections.abc import Mapping
from dataclasses import dataclass
from functools import partial
from itertools import islice

import torch
from torch import Tensor

from torchlocal import memory
from torchlocal.data import DataBundle
from torchlocal.run.build import (
    CapturedSteps,
    build_network,
    build_optimizer,
    count_steps,
    resolve_execution,
    train_step,
)
from torchlocal.run.config import FitConfig, build_guidance, guided_options
from torchlocal.run.own import Own

__all__ = ["StepCosts", "measure_costs"]

_NUM_WARMUP_STEPS = 2  # the first allocates optimizer state, both fill the caches


@dataclass(frozen=True, kw_only=True)
class StepCosts:
    """What one optimizer step of one method costs.

    Args:
        num_modules: Number of local modules, K.
        guided_share: Guided steps / all steps of the whole run.
        resident_bytes: Parameters, buffers and optimizer state.
        peak_bytes: Highest number of bytes allocated during the step on top of these, for each kind of step
            ("local", "guided") the method takes.
        seconds: Median time of each kind of step.
        flops: Floating-point operations of each kind of step (matrix products and convolutions).
    """

    num_modules: int
    guided_share: float
    resident_bytes: int
    peak_bytes: dict[str, int]
    seconds: dict[str, float]
    flops: dict[str, int]

    @property
    def total_peak_bytes(self) -> int:
        """Resident bytes plus the peak of the kind of step that takes more."""
        return self.resident_bytes + max(self.peak_bytes.values())

    @property
    def mean_seconds(self) -> float:
        """Time per step, the kinds of steps weighted by the guided share."""
        return self._mean(self.seconds)

    @property
    def mean_flops(self) -> float:
        """FLOPs per step, the kinds of steps weighted by the guided share."""
        return self._mean(self.flops)

    def _mean(self, by_kind: Mapping[str, float]) -> float:
        if len(by_kind) == 1:
            return next(iter(by_kind.values()))
        return (1 - self.guided_share) * by_kind["local"] + self.guided_share * by_kind["guided"]


class _Subject:
    """One method's network, stepped as the trainer does it."""

    def __init__(self, config: FitConfig, data: DataBundle, own: Own) -> None:
        self.config, self.execution = config, resolve_execution(config)
        steps_per_epoch, num_steps = count_steps(config, len(data.train))
        guidance = build_guidance(config).bind(num_steps=num_steps, steps_per_epoch=steps_per_epoch)
        self.num_threads = config.run.num_threads or torch.get_num_threads()
        self.guided_share = sum(guidance(step) for step in range(num_steps)) / num_steps
        self.net = build_network(config, data, self.execution, own)
        if config.run.compile:
            self.net.compile()
        self.optimizer = build_optimizer(config, self.net)
        self.scaler = self.execution.make_scaler()
        self.captured: CapturedSteps | None = None
        self.net.train()
        shares = {"local": 1 - self.guided_share, "guided": self.guided_share}
        self.kinds = [kind for kind, share in shares.items() if share > 0]
        batches = data.train.batches(config.optimisation.batch_size, train=True)
        # Placed beforehand, so that neither loading nor copying is measured.
        self.batches = self.execution.place(list(islice(batches, config.optimisation.accumulate)))

    def step(self, kind: str) -> None:
        torch.set_num_threads(self.num_threads)
        train_step(
            self.net,
            self.optimizer,
            self.batches,
            config=self.config,
            execution=self.execution,
            guided=kind == "guided",
            scaler=self.scaler,
            captured=self.captured,
        )

    def capture(self) -> None:
        """Have the steps be CUDA graphs from here on, if those of the run are; a graph's memory is always taken."""
        if self.config.run.capture:
            self.captured = CapturedSteps(self.config, self.execution, self.net)
            for kind in self.kinds:
                self.step(kind)

    def flops(self, kind: str) -> int:
        """FLOPs of one optimizer step, counted on tensors without memory."""
        options = guided_options(self.config) if kind == "guided" else {}
        found = memory.predict(self.net, *self.batches[0], step=kind, autocast=self.execution.autocast, **options)
        return self.config.optimisation.accumulate * found.flops

    def wait(self) -> None:
        """Let the device finish, where it runs beside Python."""
        if self.execution.device.type == "cuda":
            torch.cuda.synchronize(self.execution.device)
        elif self.execution.device.type == "mps":
            torch.mps.synchronize()

    def resident_bytes(self) -> int:
        """Bytes of parameters, buffers and optimizer state."""
        states = [value for state in self.optimizer.state.values() for value in state.values()]
        tensors = [*self.net.parameters(), *self.net.buffers(), *(v for v in states if isinstance(v, Tensor))]
        return sum({t.untyped_storage().data_ptr(): t.untyped_storage().nbytes() for t in tensors}.values())


def measure_costs(
    configs: Mapping[str, FitConfig], data: DataBundle, own: Own, *, rounds: int, flops: bool = True
) -> dict[str, StepCosts]:
    """Measure a full optimizer step (forward, backward, update) of several methods on the same batches.

    Args:
        configs: The configuration of every method by name.
        data: Where the batches come from.
        own: What was handed in.
        rounds: How often every kind of step of every method is timed. In each round all take turns, starting with
            another one each time, so that what else the machine does meets all alike. With 0 no time is told.
        flops: Whether to count them.

    Returns:
        The costs by method.
    """
    num_threads = torch.get_num_threads()
    try:
        subjects = {name: _Subject(config, data, own) for name, config in configs.items()}
        peaks: dict[str, dict[str, int]] = {}
        for name, subject in subjects.items():
            peaks[name] = {}
            for kind in subject.kinds:
                for _ in range(_NUM_WARMUP_STEPS):
                    subject.step(kind)
            for kind in subject.kinds:
                measured = memory.measure(partial(subject.step, kind), device=subject.execution.device)
                peaks[name][kind] = measured.peak_bytes
        for subject in subjects.values():
            subject.capture()
        turns = [(name, kind) for name, subject in subjects.items() for kind in subject.kinds]
        times: dict[tuple[str, str], list[float]] = {turn: [] for turn in turns}
        for index in range(rounds):
            first = index % len(turns)
            for name, kind in turns[first:] + turns[:first]:
                subject = subjects[name]
                subject.wait()
                start = time.perf_counter()
                subject.step(kind)
                subject.wait()
                times[name, kind].append(time.perf_counter() - start)
    finally:
        torch.set_num_threads(num_threads)
    return {
        name: StepCosts(
            num_modules=subject.net.num_modules,
            guided_share=subject.guided_share,
            resident_bytes=subject.resident_bytes(),
            peak_bytes=peaks[name],
            seconds={kind: statistics.median(times[name, kind]) for kind in subject.kinds if rounds},
            flops={kind: subject.flops(kind) for kind in subject.kinds if flops},
        )
        for name, subject in subjects.items()
    }
