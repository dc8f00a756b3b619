"""Peak memory of every way to train, predicted for all networks and measured where it fits; time per step beside it.

Bytes are those of a step on top of parameters, optimizer state and batch, gradients among them. Predictions come from
the steps' own code on fake tensors; measurements from a counter at the dispatcher while the step really runs.

    python benchmarks/memory.py                           # predictions only, some minutes on one core
    python benchmarks/memory.py --only "resnet110 K=55" vgg11b --measure --rounds 3   # on a quiet machine: run and time
    python benchmarks/memory.py --in-all --rule dgl       # parameters and optimizer state, too, against checkpointing
"""

from __future__ import annotations

import argparse
import json
import statistics
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import nn

import torchlocal as tl
from torchlocal.memory import measure, predict
from torchlocal.models import build_model
from torchlocal.network import SGD_WITH_MOMENTUM, prepare
from torchlocal.rules import Rule, make_rule

NETWORKS: list[tuple[str, int | str, tuple[int, ...]]] = [
    ("resnet32", 16, (1024, 3, 32, 32)),
    ("resnet110", 16, (1024, 3, 32, 32)),
    ("resnet110", 55, (1024, 3, 32, 32)),
    ("vgg11b", 6, (256, 3, 32, 32)),
    ("torchvision:resnet50", 16, (64, 3, 224, 224)),
    ("torchvision:vit_b_16", "all", (64, 3, 224, 224)),
]
IN_ALL: list[tuple[str, int | str, tuple[int, ...], int]] = [  # the last: number of classes
    ("vgg11b", "all", (128, 3, 32, 32), 10),
    ("vgg11b", "all", (256, 3, 32, 32), 10),
    ("torchvision:resnet50", 16, (64, 3, 224, 224), 10),
    ("torchvision:resnet50", 16, (64, 3, 224, 224), 1000),
    ("torchvision:vit_b_16", "all", (64, 3, 224, 224), 10),
]


def methods(net: tl.DecoupledNetwork) -> dict[str, tuple[str, dict[str, Any]]]:
    """Every step by name: which one, and its options."""
    units = len(net.partition.units)
    segments = sorted({s for s in (*range(2, 3 * int(units**0.5) + 3), units) if s <= units})
    frozen = {s: {"auxiliary": "frozen", "recompute": s} for s in segments}
    best = min(segments, key=lambda s: predict(net, step="guided", **frozen[s]).peak_bytes)
    largest = predict(net, step="local", recompute="largest").peak_bytes
    return {
        "end-to-end": ("plain", {}),
        f"checkpointing, best uniform ({best} segments)": ("guided", frozen[best]),
        "local": ("local", {}),
        'local, recompute="largest"': ("local", {"recompute": "largest"}),
        'guided, memory="full"': ("guided", {"memory": "full"}),
        'guided, recompute="modules"': ("guided", {"recompute": "modules"}),
        'guided, memory="local"': ("guided", {"memory": "local"}),
        'guided, memory="exact"': ("guided", {"memory": "exact"}),
        'guided, within local "largest"': ("guided", {"memory": largest}),
    }


def stepper(model: nn.Module, net: tl.DecoupledNetwork, step: str, options: dict[str, Any]) -> Callable[[], None]:
    """The step on real tensors."""
    x, y = torch.randn(net.input_shape), torch.randint(10, (net.input_shape[0],))

    def run() -> None:
        net.zero_grad()
        if step == "plain":
            F.cross_entropy(model(x), y).backward()
        else:
            (net.local_step if step == "local" else net.guided_step)(x, y, **options)

    return run


def predicted_rows(net: tl.DecoupledNetwork, name: str) -> list[dict[str, Any]]:
    """What every method takes, by prediction."""
    rows: list[dict[str, Any]] = []
    for label, (step, arguments) in methods(net).items():
        prediction = predict(net, step=step, **arguments)
        row: dict[str, Any] = {"network": name, "modules": net.num_modules, "batch": net.input_shape, "method": label}
        row |= {"predicted": prediction.peak_bytes, "flops": prediction.flops}
        if isinstance(arguments.get("memory"), str | int) and arguments["memory"] != "full":
            plan = net.guided_plan(net.sample, **arguments)
            row |= {"micro_batches": plan.micro_batches, "recomputed": plan.recomputed}
        rows.append(row)
    return rows


def in_all(rule: Rule) -> None:
    """Parameters, auxiliary networks, optimizer state (SGD with momentum) and step of local learning, by prediction."""
    print("| network | batch | classes | method | MiB in all | × searched checkpointing | auxiliary MiB | FLOPs |")
    print("|---|---|---|---|---|---|---|---|")
    for name, modules, shape, num_classes in IN_ALL:
        model = build_model(name, num_classes=num_classes, in_channels=3, image_size=(shape[2], shape[3]))
        make = prepare(model, 1, sample=shape, rule=rule)
        whole, net = make(1, fake=True), make(modules, fake=True)
        local, largest, each = f"local, K={net.num_modules}", {"recompute": "largest"}, {"optimizers": "each"}
        rows: dict[str, tuple[tl.DecoupledNetwork, dict[str, Any]]] = {
            "end-to-end": (whole, {"step": "plain"}),
            "checkpointing, searched": (whole, {"step": "guided", "memory": "exact"}),
            local: (net, {"step": "local"}),
            f"{local}, an optimizer per module": (net, {"step": "local", **each}),
            f'{local}, recompute="largest"': (net, {"step": "local", **largest}),
            f'{local}, recompute="largest", an optimizer per module': (net, {"step": "local", **largest, **each}),
        }
        found = {
            label: predict(step_of, optimizer=SGD_WITH_MOMENTUM, **options)
            for label, (step_of, options) in rows.items()
        }
        plain, searched = found["end-to-end"], found["checkpointing, searched"]
        for label, prediction in found.items():
            print(
                f"| {name} | {shape[0]} | {num_classes} | {label} | {prediction.total_bytes / 2**20:.1f} "
                f"| {prediction.total_bytes / searched.total_bytes:.3f} "
                f"| {sum(p.nbytes for p in rows[label][0].auxiliary.parameters()) / 2**20:.1f} "
                f"| ×{prediction.flops / plain.flops:.2f} |",
                flush=True,
            )


def add_measurements(
    rows: list[dict[str, Any]], model: nn.Module, net: tl.DecoupledNetwork, options: argparse.Namespace
) -> None:
    """Run every step that fits, count its bytes, and time all in turns."""
    runs: dict[int, Callable[[], None]] = {}
    for i, (step, arguments) in enumerate(methods(net).values()):
        predicted = predict(net, step=step, **arguments).peak_bytes
        if predicted <= options.largest * 1e9:
            runs[i] = stepper(model, net, step, arguments)
            measured = measure(runs[i]).peak_bytes  # the first run of all, so none is timed that fills a cache
            rows[i] |= {"run_batch": net.input_shape[0], "measured": measured, "predicted_run": predicted}
    times: dict[int, list[float]] = {i: [] for i in runs}
    for _ in range(options.rounds):
        for i, run in runs.items():
            start = time.perf_counter()
            run()
            times[i].append(time.perf_counter() - start)
    for i, taken in times.items():
        rows[i]["seconds"] = statistics.median(taken) if taken else None


def main() -> None:
    """Predict, measure and print the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument(
        "--only", nargs="+", default=[""], help='only networks whose name ("resnet110 K=55") has one in it'
    )
    parser.add_argument("--batch-size", type=int, default=None, help="another batch size than the table's")
    parser.add_argument("--measure", action="store_true", help="also run every step, count its bytes and time it")
    parser.add_argument("--run-batch-size", type=int, default=None, help="batch size of the steps that are run")
    parser.add_argument(
        "--largest", type=float, default=12.0, help="run only steps of at most so many GB (default: 12)"
    )
    parser.add_argument("--rounds", type=int, default=3, help="timed rounds, the methods taking turns (default: 3)")
    parser.add_argument("--rule", default="greedy", help="local rule (default: greedy, that of the published tables)")
    parser.add_argument("--rule-options", type=json.loads, default={}, help="as JSON, such as '{\"width\": null}'")
    parser.add_argument("--in-all", action="store_true", help="only what local learning takes in all, by prediction")
    parser.add_argument("--threads", type=int, default=None, help="torch threads (default: all cores)")
    parser.add_argument("--json", default=None, help="also write the numbers to this file")
    options = parser.parse_args()
    if options.threads:
        torch.set_num_threads(options.threads)
    rule = make_rule(options.rule, options.rule_options)
    if options.in_all:
        in_all(rule)
        return
    results: list[dict[str, Any]] = []
    for name, modules, shape in NETWORKS:
        if not any(part in f"{name} K={modules}" for part in options.only):
            continue
        shape = (options.batch_size or shape[0], *shape[1:])
        torch.manual_seed(0)
        model = build_model(name, num_classes=10, in_channels=3, image_size=(shape[2], shape[3]))
        net = tl.decouple(model, modules, sample=shape, rule=rule)
        rows = predicted_rows(net, name)
        if options.measure:
            run_shape = (options.run_batch_size or shape[0], *shape[1:])
            add_measurements(rows, model, tl.decouple(model, modules, sample=run_shape, rule=rule), options)
        print_table(f"{name} K={net.num_modules}, batch {'×'.join(map(str, shape))}", rows)
        results += rows
    if options.json:
        Path(options.json).write_text(json.dumps(results, indent=2))


def print_table(title: str, rows: list[dict[str, Any]]) -> None:
    """One network's rows as a Markdown table."""
    plain = rows[0]
    local = next(row for row in rows if row["method"] == "local")
    batch = next((row["run_batch"] for row in rows if "measured" in row), plain["batch"][0])
    note = "" if batch == plain["batch"][0] else f" (of predicted) at batch {batch}"
    print(f"\n**{title}**\n")
    print(
        f"| method | predicted MB | × end-to-end | × local | FLOPs | measured MB{note} | "
        "s per step (× end-to-end) | micro-batches |"
    )
    print("|---|---|---|---|---|---|---|---|")
    for row in rows:
        measured = f"{row['measured'] / 1e6:.1f}" if "measured" in row else "–"
        if note and "measured" in row:
            measured += f" ({row['predicted_run'] / 1e6:.1f})"
        seconds = f"{row['seconds']:.2f}" if row.get("seconds") else "–"
        if row.get("seconds") and plain.get("seconds"):
            seconds += f" (×{row['seconds'] / plain['seconds']:.2f})"
        print(
            f"| {row['method']} | {row['predicted'] / 1e6:.1f} | {row['predicted'] / plain['predicted']:.4f} "
            f"| {row['predicted'] / local['predicted']:.2f} | ×{row['flops'] / plain['flops']:.2f} | {measured} "
            f"| {seconds} | {row.get('micro_batches', 1)} |",
            flush=True,
        )


if __name__ == "__main__":
    main()
