"""What guidance gives back to local modules of a language model, and what it costs: one resumable command.

Trains the recipe text-gpt (gpt-tiny on the source of Python's library, 900 steps of 2,048 tokens) as a grid:

- K = 2, 4 or 8 local modules;
- their heads: no block, an MLP as wide as the network, or one block, in front of the read-out that all share, of a
  private one, or of a private one of rank 12 (the MLP: of a shared one, and with eight modules of one of rank 12);
- guidance: local (none), pgl (the last steps), halves (half of that share is spread over training, half at the end), or
  periodic (all of it is spread evenly);
- and what a sceptic would train instead: end-to-end for as many tokens, and for as many FLOPs as each of these takes.

Each run lies in a folder of its own, ROW/seedN; finished ones are passed over, begun ones go on, and those that another
process trains are left to it: two cores are used by two of these commands side by side, and so is a GPU
(``--device cuda``) by several. Ctrl-C saves. All runs see the
same tokens in the same order, and the learning rate falls over the same steps, whatever the guidance.

    python benchmarks/language.py --list                           # the rows, and about how long they take here
    python benchmarks/language.py                                  # all of them: some 35 core-hours
    python benchmarks/language.py --rows end-to-end 'k8-shared-d0-*' --seeds 0 1 2
    python benchmarks/language.py --share 0.4 --out runs/language40 # two fifths of the steps guided
    python benchmarks/language.py --times 20                       # at equal memory: steps of all, taking turns
    python benchmarks/language.py --report                         # report.md, loss.svg and depth.svg in the folder
    python benchmarks/language.py --tiny --out trial               # a trial of everything, of no meaning
"""

from __future__ import annotations

import argparse
import csv
import fnmatch
import json
import math
import statistics
import sys
import time
import warnings
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from functools import cached_property, partial
from pathlib import Path
from typing import Any

import torch
from matplotlib.figure import Figure

import torchlocal as tl
from torchlocal.cli.options import recipe_options
from torchlocal.compare.results import MethodResult, can_tell
from torchlocal.models import build_language_model
from torchlocal.run.callbacks import Callback, RunState
from torchlocal.run.checkpoint import check_same_config, write_json
from torchlocal.run.config import build_rule, fit_options
from torchlocal.run.folder import Owned
from torchlocal.run.trainer import Diverged, Interrupted
from torchlocal.tokens import TokenCrossEntropy

HEADS: dict[str, dict[str, Any]] = {
    "shared": {"read_out": "shared"},
    "private": {"read_out": "private"},
    "rank12": {"read_out": "private", "rank": 12},
}
FRONTS: dict[str, tuple[str, dict[str, Any]]] = {
    "d0": ("no block", {"depth": 0}),
    "mlp": ("MLP", {"depth": 0, "hidden": 96}),
    "d1": ("one block", {"depth": 1}),
}
SPREADS = {"pgl": 0.0, "halves": 0.5, "periodic": 1.0}  # share of the guided steps that lie before the end
EPOCHS = 6  # of a run of the usual length: so often is validated
PARTS = 18  # runs of equal FLOPs are a whole number of such parts of the usual length long, rounded up
MOST_TIMES = 10  # as many FLOPs as end-to-end no row takes
VOCABULARY = 1024
MOST_LINES = 8  # in a figure


@dataclass(frozen=True, kw_only=True)
class Row:
    """What is trained once per seed.

    Args:
        name: of its folder.
        told: what it is.
        changes: of the recipe.
        baseline: name of the row of local learning alone, of which its share of the gap is counted.
        bare: name of the row of local learning without anything in front of the read-out, for the same.
    """

    name: str
    told: str
    changes: dict[str, Any] = field(default_factory=dict)
    baseline: str | None = None
    bare: str | None = None


class CpuTime(Callback):
    """Counts what a run takes of the processor, over all the times that it was stopped and went on."""

    def __init__(self, folder: Path) -> None:
        self.path = folder / "cpu.json"

    def on_start(self, state: RunState) -> None:
        before: float = json.loads(self.path.read_text())["seconds"] if self.path.exists() and state.step else 0.0
        self.start: float = time.process_time() - before

    def on_checkpoint(self, state: RunState, path: Path) -> None:
        write_json(self.path, {"seconds": round(time.process_time() - self.start, 2)})

    def on_end(self, state: RunState, result: Any) -> None:
        if result is not None:  # the last evaluation as well
            self.on_checkpoint(state, self.path)


# --- the rows ---


class Grid:
    """The rows, in the order of their importance, and what a step of each costs.

    Args:
        options: the command's.
    """

    def __init__(self, options: argparse.Namespace) -> None:
        self.options, self.costs_path = options, options.out / "costs.json"
        recipe = tl.FitConfig.of(**recipe_options("text-gpt", section=None, known=fit_options()))
        steps = options.steps
        self.base = recipe.changed(
            num_threads=1, device=options.device, capture=options.device.startswith("cuda"), precision="fp32",
            tensorboard=False, data_root=options.data_root, steps=steps, decay=options.share,
            epoch_rows=max(1, steps // EPOCHS) * recipe.optimisation.batch_size,
        )  # fmt: skip
        self.sizes: tuple[int, ...] = (8, 4, 2)
        if options.tiny:
            self.sizes = (2,)
            self.base = self.base.changed(
                model="gpt-nano", context=32, batch_size=2, epoch_rows=4, num_validation=2, warmup_steps=1,
                data=f"text:{Path(__file__)}", data_root=str(options.out / "data"),
            )  # fmt: skip
        self._costs = json.loads(self.costs_path.read_text()) if self.costs_path.exists() else {}
        # The cheapest heads of the most modules first: there is the most to give back. And what is ready beside them.
        first, *others = self.sizes
        self.groups: list[tuple[int, str, tuple[str, ...]]] = [
            (first, "mlp", ("shared",)),
            (first, "d0", ("shared", "rank12")),
            (first, "d1", tuple(HEADS)),
            (first, "mlp", ("rank12",)),
            (first, "d0", ("private",)),
        ]
        for k in others:
            self.groups += [(k, "mlp", ("shared",)), (k, "d0", tuple(HEADS)), (k, "d1", tuple(HEADS))]

    def all(self) -> list[Row]:
        """Every row: a group, then end-to-end for as many FLOPs; what several groups ask for comes once."""
        rows: dict[str, Row] = {}
        for group in self.grouped():
            rows |= {row.name: row for row in group}
            rows |= {row.name: row for row in map(self.equal_flops, group) if row.name not in rows}
        return list(rows.values())

    def grouped(self) -> list[list[Row]]:
        """End-to-end, and the grid, for the same number of tokens."""
        whole = {"modules": 1, "rule_options": {"depth": 0}, "guidance": {"name": "always"}}
        groups = [[Row(name="end-to-end", told="end-to-end", changes=whole)]]
        for modules, front, heads in self.groups:
            groups.append([row for head in heads for row in self._of(modules, head, front)])
        return groups

    @cached_property
    def plain(self) -> Row:
        """End-to-end."""
        return self.grouped()[0][0]

    def _of(self, modules: int, head: str, front: str) -> Iterator[Row]:
        name = f"k{modules}-{head}-{front}"
        told = f"K={modules}, {head}, {FRONTS[front][0]}"
        bare = f"k{modules}-{head}-d0-local"
        common = {"modules": modules, "rule_options": {**FRONTS[front][1], **HEADS[head]}}
        yield Row(
            name=f"{name}-local",
            told=f"{told}, local",
            changes={**common, "guidance": {"name": "never"}},
            bare=None if front == "d0" else bare,
        )
        share = self.options.share
        for kind, spread in SPREADS.items():
            guidance = {"name": "phased", "share": share, "spread": spread}
            yield Row(
                name=f"{name}-{kind}{100 * share:g}",
                told=f"{told}, {kind}",
                changes={**common, "guidance": guidance},
                baseline=f"{name}-local",
                bare=bare,
            )

    def equal_flops(self, row: Row) -> Row:
        """End-to-end for as many FLOPs; rows that take about as many have it in common."""
        part = max(1, self.options.steps // PARTS)
        steps = math.ceil(self.options.steps * self.flops(row) / self.flops(self.plain) / part) * part
        if steps == self.options.steps:
            return self.plain
        changes = {**self.plain.changes, "steps": steps}
        return Row(name=f"end-to-end-{steps}", told=f"end-to-end, {steps:,} steps", changes=changes)

    def chosen(self) -> list[Row]:
        """The rows that were asked for.

        Raises:
            ValueError: a pattern fits none.
        """
        patterns = self.options.rows
        if not patterns:
            return self.all()

        def wanted(name: str) -> bool:
            return any(fnmatch.fnmatchcase(name, pattern) for pattern in patterns)

        rows = [row for group in self.grouped() for row in group]
        if any(wanted(f"end-to-end-{steps}") for steps in range(1, MOST_TIMES * self.options.steps)):
            rows = self.all()  # for which all FLOPs have to be counted
        for pattern in patterns:
            if not any(fnmatch.fnmatchcase(row.name, pattern) for row in rows):
                raise ValueError(f"--rows: no row is named {pattern!r}: --list names them")
        return [row for row in rows if wanted(row.name)]

    def config(self, row: Row, seed: int) -> tl.FitConfig:
        """The configuration of a run."""
        return self.base.changed(**row.changes).changed(seed=seed, out=str(self.folder(row, seed)))

    def folder(self, row: Row, seed: int) -> Path:
        """Of a run."""
        out: Path = self.options.out / row.name / f"seed{seed}"
        return out

    # --- what a step costs ---

    def network(self, row: Row) -> tl.DecoupledNetwork:
        """A network as a run of the row has it."""
        config = self.base.changed(**row.changes)
        torch.manual_seed(0)
        model = build_language_model(
            config.model.name, vocabulary=VOCABULARY, context=self.context, options=config.model.options
        )
        sample, _ = self.batch()
        return tl.decouple(
            model, config.cut.modules, sample=sample, rule=build_rule(config), criterion=TokenCrossEntropy()
        )

    @property
    def context(self) -> int:
        """Tokens of a row of text."""
        assert self.base.data.context is not None
        return self.base.data.context

    def batch(self) -> tuple[torch.Tensor, torch.Tensor]:
        """Tokens at random."""
        shape = (self.base.optimisation.batch_size, self.context)
        tokens = torch.randint(VOCABULARY, shape, generator=torch.Generator().manual_seed(0))
        return tokens, tokens.roll(-1, 1)

    def costs(self, row: Row) -> dict[str, dict[str, int]]:
        """FLOPs and predicted peak, in bytes, of a local and of a guided step; end-to-end takes "guided" ones."""
        config = self.base.changed(**row.changes)
        rule = config.rule.options if config.cut.modules != 1 else None
        key = json.dumps(
            [
                config.model.name,
                config.model.options,
                config.cut.modules,
                rule,
                *self.batch()[0].shape,
                torch.__version__,
            ]
        )
        if key not in self._costs:
            net = self.network(row)
            kinds = {"guided": {"step": "plain"}}
            if net.num_modules > 1:
                kinds = {"local": {"step": "local"}, "guided": {"step": "guided", "memory": "full"}}
            found = {kind: tl.memory.predict(net, *self.batch(), **given) for kind, given in kinds.items()}  # type: ignore[arg-type]
            self._costs[key] = {kind: {"flops": p.flops, "peak": p.peak_bytes} for kind, p in found.items()}
            self.options.out.mkdir(parents=True, exist_ok=True)
            write_json(self.costs_path, self._costs)
        costs: dict[str, dict[str, int]] = self._costs[key]
        return costs

    def flops(self, row: Row) -> float:
        """FLOPs of a step, the mean of local and guided ones."""
        costs, share = self.costs(row), self.guided_share(row)
        if "local" not in costs:
            return costs["guided"]["flops"]
        return (1 - share) * costs["local"]["flops"] + share * costs["guided"]["flops"]

    def peak(self, row: Row) -> int:
        """The largest of the peaks of its steps."""
        costs, share = self.costs(row), self.guided_share(row)
        return max(costs[kind]["peak"] for kind in costs if kind == "local" or share)

    def guided_share(self, row: Row) -> float:
        """Guided steps / all steps."""
        name = row.changes["guidance"]["name"]
        return {"always": 1.0, "never": 0.0}.get(name, self.options.share)


# --- training ---


def is_finished(grid: Grid, row: Row, seed: int) -> bool:
    """Whether a run is finished.

    Raises:
        ValueError: it is of another configuration, such as another share, by which the learning rate falls.
    """
    path = grid.folder(row, seed) / "result.json"
    if not path.exists():
        return False
    check_same_config(path, json.loads(path.read_text())["config"], grid.config(row, seed).plain())
    return True


def train(grid: Grid, rows: Sequence[Row], seeds: Sequence[int]) -> None:
    """Train what is not finished, row after row."""
    for row in rows:
        for seed in seeds:
            folder = grid.folder(row, seed)
            if is_finished(grid, row, seed):
                continue
            print(f"{row.name}, seed {seed}", flush=True)
            try:
                result = tl.fit(grid.config(row, seed), callbacks=[CpuTime(folder)], resume=True, progress=False)
            except (Owned, Diverged) as error:
                print(f"  passed over: {error}", flush=True)
                continue
            print(f"  validation loss {result['validation_loss']:.4f}", flush=True)


def tell_rows(grid: Grid, rows: Sequence[Row], seeds: Sequence[int]) -> None:
    """Print the rows, and about how long each takes: by its FLOPs, at the rate of an end-to-end step here and now."""
    plain = grid.plain
    net, batch = grid.network(plain), grid.batch()
    torch.set_num_threads(1)
    seconds = min(_seconds(lambda: net.local_step(*batch), time.process_time) for _ in range(4))
    rate = grid.flops(plain) / seconds
    total = 0.0
    print("| row | FLOPs of a step × | steps | finished | core-minutes of training, about |")
    print("|---|---:|---:|---:|---:|")
    for row in rows:
        config = grid.config(row, 0)
        steps = config.optimisation.steps or 0
        minutes = steps * grid.flops(row) / rate / 60
        done = sum(is_finished(grid, row, seed) for seed in seeds)
        total += (len(seeds) - done) * minutes
        ratio = grid.flops(row) / grid.flops(plain)
        print(f"| {row.name} | {ratio:.2f} | {steps:,} | {done} of {len(seeds)} | {minutes:.1f} |")
    print(f"\n{total / 60:.1f} core-hours for what is not finished of these, seeds {', '.join(map(str, seeds))}")


def _seconds(function: Callable[[], Any], clock: Callable[[], float]) -> float:
    start = clock()
    function()
    return clock() - start


# --- at equal memory ---


def measure_times(grid: Grid, rounds: int) -> dict[str, Any]:
    """Steps that take no more memory than a local one: end-to-end, whose result is the same, and PGL.

    For each K (shared read-out, MLP): end-to-end in the peak of the local step, the batch cut into micro-batches,
    and without these, by recomputation alone; the guided step with ``memory="local"``. All steps take turns.
    """
    torch.set_num_threads(1)
    batch, whole = grid.batch(), grid.network(grid.plain)
    by_name = {row.name: row for row in grid.all()}
    nets = [whole]
    steps: dict[str, Callable[[], Any]] = {"end-to-end": partial(whole.guided_step, *batch, memory="full")}
    costs: dict[str, Any] = {"end-to-end": grid.costs(grid.plain)["guided"]}

    def add(name: str, net: tl.DecoupledNetwork, **given: Any) -> None:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # where nothing is small enough: the table has the peak
            predicted = tl.memory.predict(net, *batch, step="guided", **given)
            net.guided_plan(*batch, **given)  # looked for before anything is timed
        costs[name] = {"flops": predicted.flops, "peak": predicted.peak_bytes}
        steps[name] = partial(net.guided_step, *batch, **given)

    for modules in grid.sizes:
        row = by_name[f"k{modules}-shared-mlp-local"]
        limit, net = grid.costs(row)["local"]["peak"], grid.network(row)
        add(f"end-to-end in the peak of K={modules}, micro-batches", whole, memory=limit)
        add(f"end-to-end in the peak of K={modules}, recomputation", whole, memory=limit, micro_batches=1)
        costs[f"K={modules}, local"] = grid.costs(row)["local"]
        steps[f"K={modules}, local"] = partial(net.local_step, *batch)
        add(f"K={modules}, guided in the peak of local", net, memory="local")
        nets.append(net)
    times: dict[str, list[float]] = {name: [] for name in steps}
    for number in range(-1, rounds):
        turns = [*steps, *steps][max(0, number) % len(steps) :][: len(steps)]
        for name in turns:
            seconds = _seconds(steps[name], time.perf_counter)
            if number >= 0:  # the first round fills caches
                times[name].append(seconds)
        for net in nets:
            net.zero_grad()
    found = {name: {**costs[name], "seconds": statistics.median(times[name])} for name in steps}
    write_json(grid.options.out / "times.json", found)
    return found


# --- the report ---


@dataclass(frozen=True, kw_only=True)
class Finished:
    """What the runs of a row ended with."""

    row: Row
    seeds: list[int]
    results: list[dict[str, Any]]
    curves: list[list[tuple[float, float]]]  # tokens and validation loss of each seed
    minutes: list[float]  # of the processor

    @property
    def losses(self) -> list[float]:
        """Test loss of each seed, of the weights that were best on the validation rows."""
        return [result["test_loss"] for result in self.results]

    @property
    def loss(self) -> float:
        """Their mean."""
        return statistics.fmean(self.losses)

    def over(self, seeds: Iterable[int]) -> float:
        """Their mean over some of the seeds."""
        return statistics.fmean(loss for seed, loss in zip(self.seeds, self.losses, strict=True) if seed in seeds)

    def spread(self) -> MethodResult:
        """For the same judgement as of comparisons."""
        return MethodResult(method=self.row.name, num_modules=0, guided_share=0, test=tuple(self.losses))


def read_finished(grid: Grid, rows: Sequence[Row], seeds: Sequence[int]) -> dict[str, Finished]:
    """The rows that have a finished run."""
    found = {}
    for row in rows:
        ready = [seed for seed in seeds if is_finished(grid, row, seed)]
        folders = [grid.folder(row, seed) for seed in ready]
        if not folders:
            continue
        curves, minutes = [], []
        for folder in folders:
            with open(folder / "metrics.csv", newline="") as file:
                curves.append([(float(r["tokens"]), float(r["validation_loss"])) for r in csv.DictReader(file)])
            minutes.append(json.loads((folder / "cpu.json").read_text())["seconds"] / 60)
        results = [json.loads((folder / "result.json").read_text()) for folder in folders]
        found[row.name] = Finished(row=row, seeds=ready, results=results, curves=curves, minutes=minutes)
    return found


def gap_closed(one: Finished, baseline: str | None, found: dict[str, Finished]) -> float | None:
    """Share of what a row of local learning loses to end-to-end that another has not lost.

    Of the seeds that all three have; None where those of the two others cannot tell that it loses.
    """
    whole, local = found.get("end-to-end"), found.get(baseline or "")
    if whole is None or local is None or local.loss <= whole.loss or not can_tell(whole.spread(), local.spread()):
        return None
    common = set(one.seeds) & set(whole.seeds) & set(local.seeds)
    if not common or local.over(common) <= whole.over(common):
        return None
    return (local.over(common) - one.over(common)) / (local.over(common) - whole.over(common))


def report(grid: Grid, rows: Sequence[Row], seeds: Sequence[int]) -> str:
    """The tables, as Markdown; writes them and the figures into the folder."""
    found = read_finished(grid, grid.all(), seeds)
    shown = [found[row.name] for row in rows if row.name in found]
    plain = grid.plain
    lines = [
        f"{grid.base.model.name}, {grid.base.data.name}, {grid.options.steps:,} steps of "
        f"{grid.batch()[0].numel():,} tokens, torch {torch.__version__}",
        "",
        "| | n | test loss | perplexity | validation loss | gap closed | of the gap without a block | guided "
        "| FLOPs × | peak × | core-minutes | end-to-end for as many FLOPs |",
        "|---|---:|---:|---:|---:|---:|---:|---:|---:|---:|---:|---:|",
    ]
    for one in shown:
        row = one.row
        closed = [gap_closed(one, baseline, found) for baseline in (row.baseline, row.bare)]
        equal = None if row.changes["modules"] == 1 else found.get(grid.equal_flops(row).name)
        cells = [
            row.told,
            str(len(one.losses)),
            _mean(one.losses, 3),
            f"{math.exp(one.loss):.2f}",
            _mean([result["validation_loss"] for result in one.results], 3),
            *("-" if share is None else f"{100 * share:.0f} %" for share in closed),
            f"{100 * statistics.fmean(result['guided_share'] for result in one.results):.0f} %",
            f"{grid.flops(row) / grid.flops(plain):.2f}",
            f"{grid.peak(row) / grid.peak(plain):.2f}",
            _mean(one.minutes, 1),
            "-" if equal is None else _mean(equal.losses, 3),
        ]
        lines.append("| " + " | ".join(cells) + " |")
    lines += [
        "",
        "Test loss: of the weights that were best on the validation rows, mean over n seeds ± sample standard "
        "deviation; perplexity: of that mean. Gap closed: of what the same network loses by local learning alone, "
        "and of what it loses so with nothing in front of the read-out, with the same seeds; “-” where the seeds "
        "cannot tell that it loses. FLOPs (of a step) and peak (predicted, of the larger of its steps, nothing "
        "recomputed, beyond parameters and optimizer) are relative to end-to-end. Core-minutes: of the processor, "
        "evaluation included.",
    ]
    times = grid.options.out / "times.json"
    if times.exists():
        lines += ["", *equal_memory(json.loads(times.read_text()))]
    text = "\n".join(lines) + "\n"
    (grid.options.out / "report.md").write_text(text, encoding="utf-8")
    if shown:
        lines_shown = shown[:MOST_LINES]
        _draw(lines_shown, grid.options.out / "loss.svg", "tokens", "validation loss", _loss_curve)
        _draw(lines_shown, grid.options.out / "depth.svg", "share of the depth", "perplexity (test)", _depth_curve)
    return text


def equal_memory(found: dict[str, Any]) -> list[str]:
    """The table of steps in the peak of local ones."""
    whole = found["end-to-end"]
    lines = ["| step | FLOPs × | peak × | time × |", "|---|---:|---:|---:|"]
    for name, one in found.items():
        ratios = " | ".join(f"{one[what] / whole[what]:.2f}" for what in ("flops", "peak", "seconds"))
        lines.append(f"| {name} | {ratios} |")
    return [
        *lines,
        "",
        "Shared read-out, MLP. End-to-end at equal memory ends as end-to-end does: recomputed bit for bit, in "
        "micro-batches to rounding.",
    ]


def _mean(values: Sequence[float], digits: int) -> str:
    spread = f" ± {statistics.stdev(values):.{digits}f}" if len(values) > 1 else ""
    return f"{statistics.fmean(values):.{digits}f}{spread}"


def _loss_curve(one: Finished) -> list[tuple[float, float]]:
    """Tokens, and the mean of the loss over the seeds."""
    steps = zip(*one.curves, strict=True)
    return [(at[0][0], statistics.fmean(loss for _, loss in at)) for at in steps]


def _depth_curve(one: Finished) -> list[tuple[float, float]]:
    """By local module: how deep it ends, and the perplexity of the mean loss over the seeds."""
    depths = list(zip(*(result["depth_loss"] for result in one.results), strict=True))
    return [((k + 1) / len(depths), math.exp(statistics.fmean(losses))) for k, losses in enumerate(depths)]


def _draw(
    shown: Sequence[Finished],
    path: Path,
    across: str,
    up: str,
    curve: Callable[[Finished], list[tuple[float, float]]],
) -> None:
    figure = Figure(figsize=(6.4, 4.4), layout="constrained")
    axes = figure.add_subplot()
    colours = ("#000000", "#D55E00", "#0072B2", "#009E73", "#CC79A7", "#E69F00", "#56B4E9", "#7F7F7F")  # Okabe and Ito
    for one, colour, marker in zip(shown, colours, "sDo^vPX*", strict=False):
        axes.plot(*zip(*curve(one), strict=True), color=colour, marker=marker, markersize=5, label=one.row.told)
    axes.set_xlabel(across)
    axes.set_ylabel(up)
    axes.grid(True, color="#DDDDDD", linewidth=0.8)
    axes.spines[["top", "right"]].set_visible(False)
    axes.legend(frameon=False, fontsize="small")
    figure.savefig(path)


def main() -> int:
    """Train, list or report."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rows", nargs="+", default=[], metavar="ROW", help="names or patterns (default: all)")
    parser.add_argument("--seeds", nargs="+", type=int, default=[0, 1, 2], help="default: 0 1 2")
    parser.add_argument("--steps", type=int, default=900, help="of 2,048 tokens (default: 900)")
    parser.add_argument("--share", type=float, default=0.2, help="guided share of the guided rows (default: 0.2)")
    parser.add_argument("--out", type=Path, default=Path("runs/language"), help="folder (default: runs/language)")
    parser.add_argument("--device", default="cpu", help="cpu (default) or cuda, where steps are captured")
    parser.add_argument("--data-root", default=None, help="folder that encoded text is kept in")
    parser.add_argument("--list", action="store_true", help="name the rows, and tell about how long they take")
    parser.add_argument("--times", type=int, default=0, metavar="ROUNDS", help="time steps at equal memory")
    parser.add_argument("--report", action="store_true", help="write report.md and the figures of what is finished")
    parser.add_argument("--tiny", action="store_true", help="a trial of a few steps of a small network")
    options = parser.parse_args()
    if options.tiny:
        options.steps = 4
    if options.steps < 2:
        parser.error(f"--steps: must be at least 2, not {options.steps}")
    if not 0 < options.share < 1:
        parser.error(f"--share: must be between 0 and 1, not {options.share}")
    grid = Grid(options)
    try:
        rows = grid.chosen()
        if options.list:
            tell_rows(grid, rows, options.seeds)
        elif options.times:
            print("\n".join(equal_memory(measure_times(grid, options.times))))
        elif options.report:
            print(report(grid, rows, options.seeds), end="")
        else:
            train(grid, rows, options.seeds)
    except ValueError as error:  # a row that is none, or a folder with runs of another configuration
        parser.error(str(error))
    except Interrupted as stopped:
        print(stopped, file=sys.stderr)
        return 128 + stopped.signum
    except KeyboardInterrupt:  # between two runs
        return 130
    return 0


if __name__ == "__main__":
    sys.exit(main())
