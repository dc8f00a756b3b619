"""Accuracy against wall-clock over a given link, local modules on several machines: one resumable command.

Ranks compute bit for bit what one process computes, so nothing is trained twice. The command

1. trains every row once per seed in one process (folder OUT/TASK/ROW/seedN; finished ones are passed over, begun ones
   go on), which gives accuracy by step and says which steps were guided;
2. measures seconds and bytes of each kind of step over each link, on network namespaces (``benchmarks/parallel.py``),
   all kinds in turns; medians over the rounds (OUT/steps.json; what is there is passed over);
3. joins the two: the time of a step is the sum of the medians of the kinds of steps up to it. Evaluation is left out;
4. with ``--verify LINK METHOD`` trains some steps on real ranks over the link, and tells their seconds beside the
   joined ones, and whether losses and weights are, bit for bit, those of one process.

The methods, and what a step of theirs is:

    one core, all cores   one process, end-to-end, with one thread and with as many as there are cores
    1f1b, gpipe           end-to-end through all ranks in 4 micro-batches that overlap, on stages that are balanced
                          without auxiliary networks
    local                 local steps
    periodic              every fifth step is guided, exactly: the ranks work one after the other
    pgl                   the last fifth of the steps is guided, exactly
    pgl 1f1b              the same, guided steps in 4 micro-batches that overlap

Guided steps among local ones drain the pipeline, and are measured in that pattern; those that follow each other, in a
phase. Every rank has one thread. With ``--cores`` a quota gives each a part of a core, so that three stages on two
cores are three honest machines; one core is such a part then, and all cores are left out. All tasks over five links, on
two stages, need root, ip and tc:

    python benchmarks/wallclock.py
    python benchmarks/wallclock.py --tasks text --only measure    # or train, or report
    python benchmarks/wallclock.py --verify 100mbit pgl --tasks pairs
    python benchmarks/wallclock.py --stages 3 --cores 0.6 --only measure  # three machines on two cores
    python benchmarks/wallclock.py --tiny --out trial             # a trial of everything, of no meaning
"""

from __future__ import annotations

import argparse
import csv
import itertools
import json
import os
import signal
import statistics
import sys
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from datetime import timedelta
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from matplotlib.figure import Figure
from torch import Tensor, nn

import torchlocal as tl
from torchlocal import parallel
from torchlocal.cli.options import read_recipe
from torchlocal.recompute import GuidedPlan, Tape
from torchlocal.run.build import (
    build_network,
    build_optimizer,
    count_steps,
    learning_rate,
    resolve_execution,
    train_step,
)
from torchlocal.run.checkpoint import check_same_config, write_json
from torchlocal.run.config import build_guidance
from torchlocal.run.own import Own
from torchlocal.run.trainer import Interrupted

sys.path.insert(0, str(Path(__file__).parent))
from parallel import check_cores, run_ranks, told_others

LINKS = ("loopback", "10gbit", "1gbit", "100mbit", "100mbit+20ms")
WARM = 5  # steps of a real run that are not timed: in the first ones the network is watched
PERIOD = 5  # steps from one guided step to the next, where they lie among local ones
MICRO_BATCHES = 4
KINDS = ("one core", "all cores", "local", "phase", "spread", "phase 1f1b", "spread 1f1b", "1f1b", "gpipe")


@dataclass(frozen=True, kw_only=True)
class Method:
    """A line of the figure.

    Args:
        row: what was trained.
        label: in the figure and the tables.
        colour: Okabe and Ito's.
        guided: kind of its guided steps: of those in a phase, and of those among local ones.
        alone: needs one machine only.
    """

    row: str
    label: str
    colour: str
    guided: tuple[str, str]
    alone: bool = False


METHODS = {
    "one core": Method(
        row="end-to-end", label="one machine, one core", colour="#5F5F5F", guided=("one core",) * 2, alone=True
    ),
    "all cores": Method(
        row="end-to-end", label="one machine, all cores", colour="#000000", guided=("all cores",) * 2, alone=True
    ),
    "1f1b": Method(row="micro-batches", label="1F1B", colour="#D55E00", guided=("1f1b",) * 2),
    "gpipe": Method(row="micro-batches", label="GPipe", colour="#CC79A7", guided=("gpipe",) * 2),
    "local": Method(row="local", label="local", colour="#009E73", guided=("phase", "spread")),
    "periodic": Method(row="periodic", label="PGL, every fifth", colour="#56B4E9", guided=("phase", "spread")),
    "pgl": Method(row="pgl", label="PGL, last fifth", colour="#0072B2", guided=("phase", "spread")),
    "pgl 1f1b": Method(
        row="pgl-micro-batches", label="PGL, 1F1B", colour="#E69F00", guided=("phase 1f1b", "spread 1f1b")
    ),
}


@dataclass(frozen=True, kw_only=True)
class Task:
    """A network, and what it learns.

    Args:
        told: in words.
        recipe: what is shipped.
        changes: of the recipe, for all rows.
        rows: what is trained, by name, with its changes.
        same: rows that are another one, up to rounding: without BatchNorm micro-batches change nothing.
        bare: changes that make auxiliary networks cost next to nothing.
        column: of metrics.csv.
        stated: the accuracy, or loss, to which time is told.
        pipes: whether auxiliary networks can learn in guided steps whose micro-batches overlap.
        tiny: changes of a trial.
    """

    told: str
    recipe: str
    changes: dict[str, Any]
    rows: dict[str, dict[str, Any]]
    same: dict[str, str] = field(default_factory=dict)
    bare: dict[str, Any]
    column: str
    stated: float
    pipes: bool
    tiny: dict[str, Any]

    @property
    def unit(self) -> str:
        """What the column is."""
        return "validation accuracy, %" if self.is_accuracy else "validation loss"

    @property
    def is_accuracy(self) -> bool:
        """Whether more is better."""
        return self.column.endswith("accuracy")


END_TO_END = {"modules": 1, "guidance": {"name": "always"}}
LAST_FIFTH = {"guidance": {"name": "phased", "share": 1 / PERIOD}}
PARTS = {"memory": "local", "micro_batches": MICRO_BATCHES}
TASKS = {
    "pairs": Task(
        told="ResNet-20, pairs of Fashion-MNIST images",
        recipe="pairs-resnet20",
        changes={"decay": 0.2},
        rows={
            "end-to-end": {**END_TO_END, "memory": None},
            "micro-batches": {**END_TO_END, **PARTS},
            "local": {"guidance": {"name": "never"}, "memory": None},
            "periodic": {"guidance": {"name": "periodic", "period": PERIOD}},
            "pgl": LAST_FIFTH,
            "pgl-micro-batches": {**LAST_FIFTH, **PARTS},
        },
        bare={"rule": "greedy", "auxiliary": "linear"},
        column="validation_accuracy",
        stated=0.74,
        pipes=True,
        tiny={"num_train": 80, "num_validation": 16, "batch_size": 8, "epochs": 2},
    ),
    "text": Task(
        told="gpt-tiny, the source of Python's library",
        recipe="text-gpt",
        # Copies of the read-out are refreshed every ten steps, so that the first stage waits for the last one seldom.
        # The learning rate falls over the last fifth, in which PGL is guided, whatever the method.
        changes={
            "decay": 1 / PERIOD, "steps": 900, "epoch_rows": 600, "precision": "fp32",
            "rule_options": {"depth": 0, "lag": 10},
        },
        rows={
            "end-to-end": END_TO_END,
            "local": {"guidance": {"name": "never"}},
            "periodic": {"guidance": {"name": "phased", "share": 1 / PERIOD, "spread": 1.0}},
            "pgl": LAST_FIFTH,
        },
        same={"micro-batches": "end-to-end"},
        bare={"rule_options": {"depth": 0, "read_out": "private", "rank": 1}},
        column="validation_loss",
        stated=3.45,
        pipes=False,
        tiny={
            "model": "gpt-nano", "modules": 2, "context": 32, "batch_size": 4, "epoch_rows": 20, "num_validation": 2,
            "warmup_steps": 1, "data": f"text:{Path(__file__)}", "steps": 10,
        },
    ),
}  # fmt: skip
TASKS["pairs32"] = replace(
    TASKS["pairs"],
    told="ResNet-32, pairs of Fashion-MNIST images",
    changes={**TASKS["pairs"].changes, "model": "resnet32"},
    stated=0.76,
)


def config_of(name: str, row: str, seed: int, options: argparse.Namespace) -> tl.FitConfig:
    """The configuration of a run."""
    task = TASKS[name]
    recipe = {key: value for key, value in read_recipe(task.recipe).items() if key != "compare"}
    given = {"num_threads": 1, "device": "cpu", "tensorboard": False, **task.changes}
    given |= task.tiny if options.tiny else {}
    if name == "text":
        given["data_root"] = str(options.out / "data") if options.tiny else options.data_root
    base = tl.FitConfig.of(**recipe).changed(**given)
    tiny = {"modules": 1} if options.tiny and row in ("end-to-end", "micro-batches") else {}
    return base.changed(**task.rows[row]).changed(**tiny, seed=seed, out=str(folder_of(name, row, seed, options)))


def folder_of(name: str, row: str, seed: int, options: argparse.Namespace) -> Path:
    """Of a run."""
    out: Path = options.out / name / row / f"seed{seed}"
    return out


# --- 1: training ---


def is_finished(name: str, row: str, seed: int, options: argparse.Namespace) -> bool:
    """Whether a run is finished.

    Raises:
        ValueError: it is of another configuration.
    """
    path = folder_of(name, row, seed, options) / "result.json"
    if not path.exists():
        return False
    saved, config = json.loads(path.read_text())["config"], config_of(name, row, seed, options)
    if row == "micro-batches":  # which is held to bytes that a search has found
        config = config.changed(memory=saved["memory"]["limit"], micro_batches=saved["memory"]["micro_batches"])
    check_same_config(path, saved, config.plain())
    return True


def train(name: str, options: argparse.Namespace) -> None:
    """Train what is not finished."""
    for seed, row in itertools.product(options.seeds, TASKS[name].rows):
        if row not in options.rows or is_finished(name, row, seed, options):
            continue
        print(f"{name}: {row}, seed {seed}", flush=True)
        config = config_of(name, row, seed, options)
        if row == "micro-batches" and not options.tiny:  # whose batches have too few examples
            config = in_parts(config)
        tl.fit(config, resume=True, progress=False)


def in_parts(config: tl.FitConfig) -> tl.FitConfig:
    """Where every step is guided, in so many bytes that it is in ``MICRO_BATCHES`` parts, and nothing is recomputed.

    Raises:
        RuntimeError: the search of plans finds another one for so many bytes.
    """
    data, execution = Own().load(config), resolve_execution(config)
    net = build_network(config, data, execution).train()
    batches = data.train.batches(config.optimisation.batch_size, train=True, seed=config.run.seed)
    x, y = execution.place(next(iter(batches)))
    how: dict[str, Any] = {"auxiliary": config.guidance.auxiliary, "autocast": execution.autocast}
    size = tl.memory.predict(net, x, y, step="guided", memory=plain_parts(net), **how).step_bytes
    found = net.guided_plan(x, y, memory=size, micro_batches=MICRO_BATCHES, **how)
    if replace(found, peak_bytes=None) != plain_parts(net):
        raise RuntimeError(f"{size} bytes, which {MICRO_BATCHES} micro-batches take, made the search find {found}")
    return config.changed(memory=size, micro_batches=MICRO_BATCHES)


def plain_parts(net: tl.DecoupledNetwork) -> GuidedPlan:
    """Micro-batches one after another, and nothing recomputed."""
    return GuidedPlan(tree=Tape(0, len(net.partition.units)), micro_batches=MICRO_BATCHES)


# --- 2: seconds of steps ---


class Worker:
    """One of the ranks.

    Args:
        name: of the task.
        options: the command's.
    """

    def __init__(self, name: str, options: argparse.Namespace) -> None:
        self.task, self.options, self.name = TASKS[name], options, name
        self.config = config_of(name, "pgl", options.seeds[0], options).changed(memory="full")
        self.whole_config = config_of(name, "end-to-end", options.seeds[0], options)
        self.data = Own().load(self.config)
        self.execution = resolve_execution(self.config)
        batches = self.data.train.batches(self.config.optimisation.batch_size, train=True, seed=0)
        self.batches = [self.execution.place(batch) for batch in itertools.islice(batches, 4)]
        self.first, self.last = dist.get_rank() == 0, dist.get_rank() == dist.get_world_size() - 1

    def build(self, config: tl.FitConfig, *, alone: bool = False) -> Any:
        """A network, on one rank or shared out by what takes longer, computing or sending."""
        net = build_network(config, self.data, self.execution).train()
        if alone:
            return net
        return parallel.distribute(
            net,
            assignment=self.options.modules or "time",
            sample=self.batches[0] if self.first else None,
            autocast=self.execution.autocast,
            boundary=self.options.boundary,
            link=None if self.options.link == "loopback" or self.options.modules else self.options.link,
            timeout=600,
        )

    def take(self, kind: str, net: Any, optimizer: torch.optim.Optimizer, batch: Any) -> list[Tensor]:
        """One step of a kind, and of the optimizer."""
        if not kind.endswith(("1f1b", "gpipe")):
            config = self.config if net.num_modules > 1 else self.whole_config
            return train_step(net, optimizer, [batch], config=config, execution=self.execution, guided=kind != "local")
        parts: dict[str, Any] = {"micro_batches": MICRO_BATCHES, "schedule": kind.split()[-1]}
        if isinstance(net, tl.DecoupledNetwork):  # what one process does that shall come to the same
            parts = {"memory": plain_parts(net)}
        auxiliary = "follow" if " " in kind else "frozen"
        losses: list[Tensor] = net.guided_step(
            *self.execution.place(batch), auxiliary=auxiliary, autocast=self.execution.autocast, **parts
        )
        clip = self.config.optimisation.clip
        if clip is not None and isinstance(net, parallel.ParallelNetwork):
            net.clip_guided(clip)
        elif clip is not None:
            nn.utils.clip_grad_norm_(net.backbone.parameters(), clip)
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        return losses

    def time(self, kind: str, net: Any, optimizer: torch.optim.Optimizer | None, count: int) -> tuple[float, float]:
        """Seconds per step, known to the rank that ends the steps, and bytes that this rank has put on its links."""
        dist.barrier()
        cores = os.cpu_count() or 1
        torch.set_num_threads(cores if kind == "all cores" else 1)  # the other ranks wait, and compute nothing
        start, sent = 0.0, bytes_on_links()
        for i in range(-PERIOD, count):
            if i == 0:
                start = time.perf_counter()
            step = kind
            if kind.startswith("spread"):
                step = kind.replace("spread", "phase") if i % PERIOD == PERIOD - 1 else "local"
            if optimizer is not None:
                given = self.batches[i % len(self.batches)] if self.first else (None, None)
                self.take(step, net, optimizer, given)
        seconds = (time.perf_counter() - start) / count
        dist.barrier()
        torch.set_num_threads(1)
        # Bytes are those of all steps: the first stages run ahead, by more when the last one has come to its first.
        return seconds, (bytes_on_links() - sent) / (PERIOD + count)

    def measure(self) -> dict[str, Any] | None:
        """Everything, in turns; on the first rank."""
        nets = {"ranks": self.build(self.config), "bare": self.build(self.config.changed(**self.task.bare))}
        if self.first:
            nets["whole"] = self.build(self.whole_config, alone=True)
        optimizers = {where: build_optimizer(self.config, net) for where, net in nets.items()}
        for optimizer in optimizers.values():
            for group in optimizer.param_groups:
                group["lr"] = 1e-5  # so that thousands of steps on few batches stay finite
        kinds = [kind for kind in KINDS if self.task.pipes or kind not in ("phase 1f1b", "spread 1f1b")]
        kinds = [kind for kind in kinds if self.options.cores is None or kind != "all cores"]
        found: dict[str, list[float]] = {kind: [] for kind in kinds}
        sent: dict[str, float] = {}
        for number in range(self.options.rounds):
            first = number % len(kinds)
            for kind in [*kinds, *kinds][first : first + len(kinds)]:
                where = "whole" if kind.endswith("cores") or kind == "one core" else "ranks"
                where = "bare" if kind in ("1f1b", "gpipe") else where
                mine = self.time(kind, nets.get(where), optimizers.get(where), self.options.steps)
                gathered: list[Any] = [None] * dist.get_world_size()
                dist.all_gather_object(gathered, mine)
                found[kind].append(gathered[0 if where == "whole" else -1][0])
                sent[kind] = 0.0 if where == "whole" else sum(one[1] for one in gathered)
        stages = {w: [[s.start, s.stop] for s in nets[w].stages] for w in ("ranks", "bare")}
        for where in ("ranks", "bare"):
            nets[where].close()
        if not self.first:
            return None
        return {
            "seconds": {kind: statistics.median(values) for kind, values in found.items()},
            "all_seconds": found,
            "bytes": sent,
            "stages": stages,
            "precision": self.execution.precision,
            "torch": torch.__version__,
        }

    # --- 4: a real run ---

    def verify(self, method: str) -> dict[str, Any] | None:
        """Train on the ranks, then on the first one alone, and compare; on the first rank."""
        chosen = METHODS[method]
        config = self.config
        if chosen.row in ("end-to-end", "micro-batches"):
            config = config.changed(**self.task.bare, guidance={"name": "always"})
        elif chosen.row != "pgl-micro-batches":
            config = config_of(self.name, chosen.row, self.options.seeds[0], self.options)
            config = config if config.guidance.name == "never" else config.changed(memory="full")
        config = config.changed(steps=self.options.verify_steps)
        net = self.build(config)
        shares = self.real(config, method, net)
        gathered: list[Any] = [None] * dist.get_world_size()
        dist.all_gather_object(gathered, shares)
        if not self.first:
            return None
        seconds, losses, _ = gathered[-1]
        state = shares[2]
        _, losses_alone, state_alone = self.real(config, method, self.build(config, alone=True))
        return {
            "seconds": seconds,
            "losses": len(losses),
            "same_losses": [len(a) == len(b) and torch.equal(a, b) for a, b in zip(losses, losses_alone, strict=True)],
            "tensors": len(state),
            "same_tensors": sum(torch.equal(state[key], state_alone[key]) for key in state),
            "largest_difference": max(float((state[k].double() - state_alone[k].double()).abs().max()) for k in state),
            "kinds": self.kinds(config, method),
            "stages": [[stage.start, stage.stop] for stage in net.stages],
        }

    def kinds(self, config: tl.FitConfig, method: str) -> list[str]:
        """The kinds of steps of a run."""
        per_epoch, num_steps = count_steps(config, len(self.data.train))
        guidance = build_guidance(config).bind(num_steps=num_steps, steps_per_epoch=per_epoch)
        return kinds_of([guidance(step) for step in range(num_steps)], METHODS[method])

    def real(self, config: tl.FitConfig, method: str, net: Any) -> tuple[list[float], list[Tensor], dict[str, Tensor]]:
        """Train as a run does; returns the seconds of each step, losses and, on the first rank, weights."""
        optimizer, kinds = build_optimizer(config, net), self.kinds(config, method)
        per_epoch, num_steps = count_steps(config, len(self.data.train))
        size, reads = config.optimisation.batch_size, not isinstance(net, parallel.ParallelNetwork) or net.is_first
        batches = itertools.chain.from_iterable(
            self.data.train.batches(size, epoch=epoch, train=True, seed=config.run.seed) for epoch in itertools.count()
        )
        torch.manual_seed(config.run.seed)
        losses, ends = [], [time.perf_counter()]
        for step, kind in enumerate(kinds):
            rate = learning_rate(config, step, steps_per_epoch=per_epoch, num_steps=num_steps)
            for group in optimizer.param_groups:
                group["lr"] = rate * group.get("lr_factor", 1.0)
            kind = kind.replace("spread", "phase")
            found = self.take(kind, net, optimizer, next(batches) if reads else (None, None))
            losses.append(torch.stack([loss.detach() for loss in found]) if found else torch.empty(0))
            ends.append(time.perf_counter())
        seconds = [end - start for start, end in itertools.pairwise(ends)]
        if isinstance(net, parallel.ParallelNetwork):
            net.synchronize()
            state = {key: tensor.clone() for key, tensor in net.net.state_dict().items() if isinstance(tensor, Tensor)}
            net.close()
        else:
            state = {key: tensor for key, tensor in net.state_dict().items() if isinstance(tensor, Tensor)}
        return seconds, losses, state if dist.get_rank() == 0 else {}


def bytes_on_links() -> int:
    """Bytes that this namespace has sent so far, with all headers; 0 without a link."""
    total = 0
    for line in Path("/proc/net/dev").read_text().splitlines()[2:]:
        device, _, numbers = line.partition(":")
        if device.strip() in ("left", "right"):
            total += int(numbers.split()[8])
    return total


def work(options: argparse.Namespace) -> None:
    """Be one of the ranks."""
    torch.set_num_threads(1)
    size = options.stages
    store = dist.FileStore(options.store, size)
    dist.init_process_group("gloo", store=store, rank=options.rank, world_size=size, timeout=timedelta(seconds=600))
    worker = Worker(options.tasks[0], options)
    result = worker.verify(options.method) if options.method else worker.measure()
    if result is not None:
        Path(options.result).write_text(json.dumps(result))
    dist.destroy_process_group()


def command(name: str, link: str, options: argparse.Namespace) -> list[str]:
    """What every rank is started with."""
    found = [sys.executable, __file__, "--tasks", name, "--link", link, "--out", str(options.out)]
    found += ["--stages", str(options.stages), "--steps", str(options.steps), "--rounds", str(options.rounds)]
    found += ["--seeds", str(options.seeds[0]), "--verify-steps", str(options.verify_steps)]
    found += ["--boundary", options.boundary] if options.boundary else []
    found += ["--cores", str(options.cores)] if options.cores is not None else []
    found += ["--data-root", options.data_root] if options.data_root else []
    return found + (["--tiny"] if options.tiny else [])


def key_of(name: str, link: str, options: argparse.Namespace) -> str:
    """Under which the steps of a task over a link are kept."""
    share = [] if options.cores is None else [told_cores(options)]
    return ", ".join(
        [name, link, f"{options.stages} stages", *([options.boundary] if options.boundary else []), *share]
    )


def told_cores(options: argparse.Namespace) -> str:
    """What every rank has."""
    return f"{options.cores:g} of a core each"


def network_of(name: str, options: argparse.Namespace) -> dict[str, Any]:
    """What the seconds of steps depend on."""
    config = config_of(name, "pgl", 0, options).plain()
    found = {section: config[section] for section in ("model", "cut", "rule")}
    return {**found, "batch_size": config["optimisation"]["batch_size"]}


def measure(name: str, options: argparse.Namespace) -> None:
    """Measure steps over the links over which they are not yet, or were those of another network."""
    path = options.out / "steps.json"
    for link in options.links:
        if measured_steps(name, link, options) is not None:
            continue
        steps, key = read_steps(options), key_of(name, link, options)
        print(f"{key}: measured", flush=True)
        try:
            steps[key] = run_ranks(link, options.stages, command(name, link, options), options.cores)
        except OSError as error:
            print(f"  left out, since namespaces or tc are not to be had here: {error}", flush=True)
            continue
        print(f"  {told_others(steps[key])}", flush=True)
        steps[key]["network"] = network_of(name, options)
        options.out.mkdir(parents=True, exist_ok=True)
        write_json(path, steps)


def read_steps(options: argparse.Namespace) -> dict[str, Any]:
    """What was measured so far."""
    path = options.out / "steps.json"
    return json.loads(path.read_text()) if path.exists() else {}


def measured_steps(name: str, link: str, options: argparse.Namespace) -> dict[str, Any] | None:
    """What was measured of a task over a link; None if nothing was, or of another network."""
    found: dict[str, Any] | None = read_steps(options).get(key_of(name, link, options))
    return found if found is not None and found.get("network") == network_of(name, options) else None


# --- 3: both joined ---


def kinds_of(guided: Sequence[bool], method: Method) -> list[str]:
    """The kind of each step: a guided one with a guided neighbour is in a phase, any other lies among local steps."""
    kinds = []
    for i, one in enumerate(guided):
        beside = (i > 0 and guided[i - 1]) or (i + 1 < len(guided) and guided[i + 1])
        kinds.append(method.guided[0 if beside else 1] if one else "local")
    return kinds


def prices(seconds: Mapping[str, float]) -> dict[str, float]:
    """Seconds of one step of each kind.

    Guided steps among local ones were measured as the mean over a period, all but one of whose steps are local: what it
    takes more than these is the guided step's.
    """
    local = seconds["local"]
    return {
        kind: PERIOD * mean - (PERIOD - 1) * local if kind.startswith("spread") else mean
        for kind, mean in seconds.items()
    }


def joined(kinds: Sequence[str], price: Mapping[str, float]) -> list[float]:
    """Seconds at the end of each step."""
    return list(itertools.accumulate(price[kind] for kind in kinds))


def time_to(curve: Sequence[tuple[float, float]], stated: float, *, more: bool) -> float | None:
    """Seconds to the first validation that is as good as stated; None if there is none."""
    return next((at for at, value in curve if (value >= stated if more else value <= stated)), None)


@dataclass(frozen=True, kw_only=True)
class Trained:
    """The finished runs of a row: the steps of their validations, what these found by seed, and what was guided."""

    steps: list[int]
    values: list[list[float]]
    guided: list[bool]

    def curve(self, method: Method, seconds: Mapping[str, float]) -> list[tuple[float, float]]:
        """Seconds of each validation, and the mean over the seeds."""
        at = joined(kinds_of(self.guided, method), prices(seconds))
        means = [statistics.fmean(column) for column in zip(*self.values, strict=True)]
        return [(at[step - 1], mean) for step, mean in zip(self.steps, means, strict=True)]


def read_trained(name: str, row: str, options: argparse.Namespace) -> Trained | None:
    """The finished runs of a row; None without one."""
    task = TASKS[name]
    row = task.same.get(row, row)
    if row not in task.rows:
        return None
    steps, values = [], []
    for seed in options.seeds:
        if not is_finished(name, row, seed, options):
            continue
        with open(folder_of(name, row, seed, options) / "metrics.csv", newline="") as file:
            rows = list(csv.DictReader(file))
        steps = [int(one["step"]) for one in rows]
        values.append([float(one[task.column]) for one in rows])
    if not values:
        return None
    guidance = build_guidance(config_of(name, row, options.seeds[0], options))
    guidance = guidance.bind(num_steps=steps[-1], steps_per_epoch=steps[0])
    return Trained(steps=steps, values=values, guided=[guidance(step) for step in range(steps[-1])])


def curves(name: str, options: argparse.Namespace) -> dict[str, dict[str, list[tuple[float, float]]]]:
    """By link and method, what is trained and measured."""
    found = dict[str, dict[str, list[tuple[float, float]]]]()
    trained = {row: read_trained(name, row, options) for row in {method.row for method in METHODS.values()}}
    for link in options.links:
        measured = measured_steps(name, link, options)
        if measured is None:
            continue
        for method, chosen in METHODS.items():
            one = trained[chosen.row]
            if one is not None and set(kinds_of(one.guided, chosen)) <= measured["seconds"].keys():
                found.setdefault(link, {})[method] = one.curve(chosen, measured["seconds"])
    return found


def report(name: str, options: argparse.Namespace) -> list[str]:
    """The tables of a task, as Markdown."""
    task, found = TASKS[name], curves(name, options)
    if not found:
        return []
    links = list(found)
    steps = {link: measured_steps(name, link, options) or {} for link in links}
    stated = f"{100 * task.stated:g} %" if task.is_accuracy else f"{task.stated:g}"
    lines = [f"### {', '.join([task.told, *key_of(name, links[0], options).split(', ')[2:]])}", ""]
    lines += [f"Minutes to a {task.unit.split(',')[0]} of {stated}, and of the whole training (in brackets):", ""]
    lines += [
        f"| | n | at the end | {' | '.join(links)} |",
        f"|---|---:|---:|{'---:|' * len(links)}",
    ]
    for method, chosen in METHODS.items():
        one = read_trained(name, chosen.row, options)
        if one is None or not any(method in found[link] for link in links):
            continue
        cells = []
        for link in links:
            curve = found[link].get(method)
            at = None if curve is None else time_to(curve, task.stated, more=task.is_accuracy)
            cells.append(
                "" if curve is None else f"{'never' if at is None else f'{at / 60:.2f}'} ({curve[-1][0] / 60:.2f})"
            )
        lines.append(
            f"| {told_method(method, options)} | {len(one.values)} | {told_end(one, task)} | {' | '.join(cells)} |"
        )
    base = measured_steps(name, "loopback", options)
    lines += ["", "Seconds of a step; MB on all links; share of its own throughput without a link (loopback):", ""]
    lines += [f"| kind of step | {' | '.join(links)} |", f"|---|{'---:|' * len(links)}"]
    undisturbed = prices(base["seconds"]) if base else {}
    for kind in KINDS:
        cells = []
        for link in links:
            measured = steps[link]
            if kind not in measured["seconds"]:
                continue
            seconds = prices(measured["seconds"])[kind]
            cell = f"{seconds:.3f}"
            if link != "loopback" and measured["bytes"][kind]:
                cell += f"; {told_megabytes(kind, measured['bytes'])}"
            if kind in undisturbed and link != "loopback":
                cell += f"; {100 * undisturbed[kind] / seconds:.0f} %"
            cells.append(cell)
        if cells:
            part = options.cores is not None and kind == "one core"
            lines.append(f"| {'end-to-end, one machine' if part else TOLD[kind]} | {' | '.join(cells)} |")
    shared = {link: steps[link]["stages"] for link in links}
    lines += ["", "Local modules of the stages: " + "; ".join(
        f"{link} {told_stages(stages['ranks'])}, 1F1B and GPipe {told_stages(stages['bare'])}"
        for link, stages in shared.items()
    ) + ".", ""]  # fmt: skip
    return lines


def told_method(method: str, options: argparse.Namespace) -> str:
    """In the tables and the figure."""
    return METHODS[method].label if method != "one core" or options.cores is None else "one machine"


TOLD = {
    "one core": "end-to-end, one core",
    "all cores": "end-to-end, all cores",
    "local": "local",
    "phase": "guided, in a phase",
    "spread": "guided, every fifth",
    "phase 1f1b": "guided by 1F1B, in a phase",
    "spread 1f1b": "guided by 1F1B, every fifth",
    "1f1b": "1F1B",
    "gpipe": "GPipe",
}


def told_end(one: Trained, task: Task) -> str:
    """Mean and deviation of the last validation."""
    last = [values[-1] * (100 if task.is_accuracy else 1) for values in one.values]
    digits = 1 if task.is_accuracy else 3
    spread = f" ± {statistics.stdev(last):.{digits}f}" if len(last) > 1 else ""
    return f"{statistics.fmean(last):.{digits}f}{spread}"


def told_megabytes(kind: str, sent: Mapping[str, float]) -> str:
    """What one step of a kind puts on the links."""
    return f"{prices(sent)[kind] / 1e6:.2f} MB"


def told_stages(stages: Sequence[Sequence[int]]) -> str:
    """As people count."""
    return " | ".join(f"{start + 1}–{stop}" for start, stop in stages)


def draw(name: str, options: argparse.Namespace) -> Figure:
    """A panel for each chosen link, one below the other, so that it can be read on a telephone."""
    task, found = TASKS[name], curves(name, options)
    links = [link for link in options.panels if link in found]
    shown = [m for m in options.lines if links and all(m in found[link] for link in links)]
    figure = Figure(figsize=(5.2, 0.4 + 2.8 * max(1, len(links))), layout="constrained")
    longest = max((found[link][m][-1][0] / 60 for link in links for m in shown), default=1.0)
    for number, link in enumerate(links):
        axes = figure.add_subplot(len(links), 1, number + 1)
        scale = 100 if task.is_accuracy else 1
        ends = {}
        for method in shown:
            chosen = METHODS[method]
            times, values = zip(*((at / 60, scale * value) for at, value in found[link][method]), strict=True)
            style, width = ("--", 1.6) if chosen.alone else ("-", 2.4)
            axes.plot(times, values, color=chosen.colour, linestyle=style, lw=width)
            axes.plot(times[-1], values[-1], "o", color=chosen.colour, markersize=6)
            ends[method] = (times[-1], values[-1])
        axes.set_xlim(0, 1.04 * longest)
        if not task.is_accuracy:  # the first losses are of a network that knows nothing
            axes.set_ylim(top=statistics.median(v for m in shown for _, v in found[link][m]) * 1.25)
        label_ends(axes, ends, task, options)
        machines = {2: "Two", 3: "Three", 4: "Four"}.get(options.stages, str(options.stages))
        axes.set_title(f"{machines} machines, {TITLES.get(link, link)}", loc="left", fontsize=12, fontweight="bold")
        axes.set_ylabel(task.unit)
        axes.grid(True, color="#E5E5E5", linewidth=0.8)
        axes.spines[["top", "right"]].set_visible(False)
        if number == len(links) - 1:
            axes.set_xlabel("minutes of training")
    return figure


def label_ends(axes: Any, ends: Mapping[str, tuple[float, float]], task: Task, options: argparse.Namespace) -> None:
    """Names of the lines, in their colours, with where they end, in the corner that curves never come to."""
    for i, method in enumerate(sorted(ends, key=lambda m: ends[m][0])):
        at, value = ends[method]
        told = f"{value:.1f} %" if task.is_accuracy else f"{value:.2f}"
        height = 0.11 * (len(ends) - i) - 0.04 if task.is_accuracy else 1 - 0.04 - 0.11 * i
        name = axes.text(
            0.99, height, f"{told_method(method, options)}: {told} in {at:.1f} min", color=METHODS[method].colour,
            fontsize=10.5, fontweight="bold", ha="right", va="center", transform=axes.transAxes,
        )  # fmt: skip
        name.set_in_layout(False)


TITLES = {
    "loopback": "no link between them",
    "10gbit": "fast link: 10 Gbit/s",
    "1gbit": "1 Gbit/s",
    "100mbit": "100 Mbit/s",
    "100mbit+20ms": "slow link: 100 Mbit/s, 20 ms",
}


def tell_verified(name: str, link: str, method: str, options: argparse.Namespace) -> int:
    """Train on ranks over a link and print what came of it; 1 if what was promised bit for bit is not."""
    measured, extra = measured_steps(name, link, options), ["--method", method]
    if measured is not None:  # on the stages that were measured: others would have come of times that differ a little
        where = "bare" if METHODS[method].row in ("end-to-end", "micro-batches") else "ranks"
        extra += ["--modules", *(str(stop - start) for start, stop in measured["stages"][where])]
    result = run_ranks(link, options.stages, [*command(name, link, options), *extra], options.cores)
    same, kinds, seconds = all(result["same_losses"]), result["kinds"][WARM:], result["seconds"][WARM:]
    print(f"{name}, {link}, {method}: {len(result['kinds'])} steps, of which the first {WARM} are not timed")
    print(f"  local modules {told_stages(result['stages'])}; {told_others(result)}")
    for kind in [*dict.fromkeys(kinds), None]:
        chosen = [i for i in range(len(kinds)) if kind in (None, kinds[i])]
        taken = sum(seconds[i] for i in chosen)
        line = f"all {len(chosen)}" if kind is None else f"{len(chosen)} × {TOLD[kind]}"
        line += f": {taken:.1f} s, {taken / len(chosen):.3f} s each"
        if measured is not None:
            price = sum(prices(measured["seconds"])[kinds[i]] for i in chosen)
            line += f"; joined {price:.1f} s, {price / len(chosen):.3f} s each; measured / joined {taken / price:.2f}"
        print(f"  {line}")
    print(f"  losses of {result['losses']} steps equal those of one process bit for bit: {same}")
    print(f"  {result['same_tensors']} of {result['tensors']} parameters and buffers equal; ", end="")
    print(f"largest difference {result['largest_difference']:.2g}")
    exact = METHODS[method].guided[0] == "phase"
    return int(exact and not options.boundary and not (same and result["same_tensors"] == result["tensors"]))


def main() -> int:
    """Train, measure, report, or verify."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--tasks", nargs="+", default=list(TASKS), choices=TASKS, help="default: all")
    parser.add_argument("--links", nargs="+", default=list(LINKS), metavar="LINK", help=f"default: {' '.join(LINKS)}")
    parser.add_argument("--stages", type=int, default=2, help="processes that share the local modules (default: 2)")
    parser.add_argument("--cores", type=float, default=None, help="that every rank gets, such as 0.6 (default: all)")
    parser.add_argument("--boundary", default=None, help="what features are sent in: bf16, int8, int4 (default: as is)")
    rows = list(dict.fromkeys(row for task in TASKS.values() for row in task.rows))
    parser.add_argument("--rows", nargs="+", default=rows, choices=rows, help="what is trained (default: all)")
    parser.add_argument("--seeds", nargs="+", type=int, default=[0, 1, 2], help="default: 0 1 2")
    parser.add_argument("--steps", type=int, default=10, help="timed steps of a kind in a round, a multiple of 5")
    parser.add_argument("--rounds", type=int, default=3, help="default: 3")
    parser.add_argument("--only", choices=("train", "measure", "report"), default=None, help="one of the three parts")
    parser.add_argument("--verify", nargs=2, default=None, metavar=("LINK", "METHOD"), help="a real run over a link")
    parser.add_argument("--verify-steps", type=int, default=80, help="of which it consists (default: 80)")
    parser.add_argument("--panels", nargs="+", default=["10gbit", "100mbit+20ms"], help="links of the figure")
    parser.add_argument(
        "--lines", nargs="+", default=["one core", "1f1b", "local", "pgl"], choices=METHODS, help="of the figure"
    )
    parser.add_argument("--out", type=Path, default=Path("runs/wallclock"), help="folder (default: runs/wallclock)")
    parser.add_argument("--data-root", default=None, help="folder that encoded text is kept in")
    parser.add_argument("--tiny", action="store_true", help="a trial of a few steps")
    for hidden in ("--rank", "--store", "--result", "--link", "--method"):
        parser.add_argument(hidden, default=None, type=int if hidden == "--rank" else str, help=argparse.SUPPRESS)
    parser.add_argument("--modules", nargs="+", default=None, type=int, help=argparse.SUPPRESS)  # of each stage
    options = parser.parse_args()
    if options.stages < 2:
        parser.error(f"--stages: must be at least 2, not {options.stages}")
    if options.steps < 1 or options.steps % PERIOD:
        parser.error(f"--steps: must be a multiple of {PERIOD}, not {options.steps}")
    if options.tiny:
        options.steps, options.rounds, options.verify_steps = PERIOD, 2, 10
        options.seeds = options.seeds[:1]
    if options.rank is not None:
        work(options)
        return 0
    if options.only in (None, "measure") and (refused := check_cores(options.cores)):
        parser.error(refused)
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))  # so that namespaces are taken down
    if options.verify:
        if options.verify[1] not in METHODS or METHODS[options.verify[1]].alone:
            several = ", ".join(method for method, chosen in METHODS.items() if not chosen.alone)
            parser.error(f"--verify: must be a link and one of {several}, not {' '.join(options.verify)}")
        link, method = options.verify
        return max(tell_verified(name, link, method, options) for name in options.tasks)
    try:
        for name in options.tasks:  # a run of another configuration is told at once
            for row, seed in itertools.product(TASKS[name].rows, options.seeds):
                is_finished(name, row, seed, options)
    except ValueError as error:
        parser.error(str(error))
    try:
        for part, run in (("train", train), ("measure", measure)):
            for name in options.tasks if options.only in (None, part) else ():
                run(name, options)
    except Interrupted as stopped:
        print(stopped, file=sys.stderr)
        return 128 + stopped.signum
    if options.only in (None, "report"):
        text = "\n".join(line for name in options.tasks for line in report(name, options))
        options.out.mkdir(parents=True, exist_ok=True)
        (options.out / "report.md").write_text(text + "\n", encoding="utf-8")
        print(text)
        for name in options.tasks:
            if curves(name, options):
                figure = draw(name, options)
                for ending in ("svg", "png"):
                    figure.savefig(options.out / f"{name}.{ending}", dpi=150)
    return 0


if __name__ == "__main__":
    sys.exit(main())
