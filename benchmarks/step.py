"""Time per step of local, guided and recomputed guided steps against hand-written plain PyTorch.

The library's steps are timed in one run, interleaved, against an ordinary end-to-end step and against a local loop
written by hand for the same network and the same auxiliary networks. Medians over the rounds; the ratio is the median
of the per-round ratios, so that a slow moment of the machine hits both sides. Below the table stands what a sceptic
asks: PGL (a fifth of the steps guided) against end-to-end training in the same memory, in micro-batches and bit for
bit.

    python benchmarks/step.py                      # ResNet-32, K = 16, batch 128, 32×32, fp32
    python benchmarks/step.py --model resnet110 --modules 55 --precision bf16

With ``--rules`` the local step of every local rule is timed instead, in fp32 and in bf16 with channels_last, each
against the end-to-end step in the same precision; its peak is measured, its FLOPs are counted, too. "auglocal-by-hand"
is a loop over the same networks as "auglocal", built of residual blocks in plain PyTorch.

    python benchmarks/step.py --rules                # all rules
    python benchmarks/step.py --rules dgl predsim
    python benchmarks/step.py --rules auglocal auglocal-apart auglocal-by-hand
"""

from __future__ import annotations

import argparse
import copy
import json
import statistics
import time
from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.flop_counter import FlopCounterMode

import torchlocal as tl
from torchlocal.models import build_model
from torchlocal.models.images import BasicBlock
from torchlocal.rules import make_rule


def children_in_order(model: nn.Module) -> list[nn.Module]:
    """The CIFAR ResNet by hand: stem, one residual block per module, the head with the last block."""
    names = [name for name, _ in model.named_children() if not name.startswith("layer")]
    blocks = [block for name in ("layer1", "layer2", "layer3") for block in model.get_submodule(name).children()]
    before = [model.get_submodule(name) for name in names if name not in ("pool", "avgpool", "flatten", "fc", "head")]
    after = [model.get_submodule(name) for name in names if name in ("pool", "avgpool", "flatten", "fc", "head")]
    flat = [] if any(isinstance(m, nn.Flatten) for m in after) else [nn.Flatten()]
    *inner, last = blocks
    return [nn.Sequential(*before), *inner, nn.Sequential(last, *after[:-1], *flat, after[-1])]


WITHIN = "guided step, in the local step's memory"
PARTED = "end-to-end in PGL's memory, micro-batches"
EXACT = "end-to-end in PGL's memory, bit for bit"

# Published code for comparison: time and activation peak of its step relative to its own end-to-end step, for
# ResNet-32, K = 16, batch 128, fp32, 2 threads. (That of AugLocal trains the last d + 1 = 3 blocks as one module, as
# "auglocal" does here.)
RULES: dict[str, tuple[str, dict[str, object], tuple[float, float] | None]] = {
    "greedy": ("greedy", {}, None),
    "dgl": ("dgl", {}, (1.22, 0.21)),
    "predsim": ("predsim", {}, (1.50, 0.26)),
    "infopro": ("infopro", {"weights": [[5, 0.05], [0.2, 0.5]]}, (4.40, 0.43)),
    "infopro-contrast": ("infopro", {"task": "contrast", "weights": [[5, 0.05], [0.2, 0.5]]}, None),
    "auglocal": ("auglocal", {"depth": 2, "together": True}, (2.47, 0.28)),
    "auglocal-apart": ("auglocal", {"depth": 2}, None),
    "auglocal-by-hand": ("auglocal", {"depth": 2, "together": True}, None),
    "man": ("man", {}, None),
}


def compare_rules(parser: argparse.ArgumentParser, options: argparse.Namespace) -> None:
    """Time the local step of every rule against the end-to-end step, and measure the peaks."""
    chosen = options.rules or list(RULES)
    if unknown := [name for name in chosen if name not in RULES]:
        parser.error(f"--rules: {unknown[0]!r} is unknown; choose {', '.join(RULES)}")
    y = torch.randint(10, (options.batch_size,))
    steps: dict[tuple[str, str], Callable[[], None]] = {}
    peaks: dict[tuple[str, str], int] = {}
    flops: dict[tuple[str, str], int] = {}
    parameters: dict[str, int] = {}
    for precision in ("fp32", "bf16"):
        dtype = torch.bfloat16 if precision == "bf16" else None
        layout = torch.channels_last if dtype else torch.contiguous_format
        x = torch.randn(options.batch_size, 3, options.size, options.size).to(memory_format=layout)
        for name in ("end-to-end", *chosen):
            torch.manual_seed(0)
            model = build_model(options.model, num_classes=10, in_channels=3, image_size=(options.size, options.size))
            net: nn.Module = model
            if name != "end-to-end":
                kind, arguments, _ = RULES[name]
                rule = make_rule(kind, arguments)
                local = tl.decouple(model, options.modules - rule.units_at_end + 1, sample=x, rule=rule)
                parameters[name] = sum(p.numel() for p in local.auxiliary.parameters())
                net = ByHand(local) if name.endswith("by-hand") else local
            key = precision, name
            steps[key], peaks[key], flops[key] = rule_step(net.to(memory_format=layout), x, y, dtype)
    times: dict[tuple[str, str], list[float]] = {key: [] for key in steps}
    for index in range(options.rounds + 2):
        for key in steps if index % 2 == 0 else reversed(steps):
            begin = time.perf_counter()
            steps[key]()
            if index >= 2:  # two rounds to warm up
                times[key].append(time.perf_counter() - begin)
    print(
        f"{options.model}, K = {options.modules}, batch {options.batch_size}, {options.size}×{options.size}, "
        f"{torch.get_num_threads()} threads, median of {options.rounds} interleaved rounds, torch {torch.__version__}\n"
    )
    print("| precision | local step | ms | × end-to-end | FLOPs | peak × end-to-end | published code | auxiliary |")
    print("|---|---|---:|---:|---:|---:|---:|---:|")
    rows = []
    for (precision, name), measured in times.items():
        base = times[precision, "end-to-end"]
        row = {
            "precision": precision,
            "rule": name,
            "ms": 1000 * statistics.median(measured),
            "time": statistics.median(a / b for a, b in zip(measured, base, strict=True)),
            "flops": flops[precision, name] / flops[precision, "end-to-end"],
            "peak": peaks[precision, name] / peaks[precision, "end-to-end"],
            "auxiliary_parameters": parameters.get(name, 0),
        }
        rows.append(row)
        published = RULES[name][2] if name in RULES and precision == "fp32" else None
        told = f"{published[0]:.2f} / {published[1]:.2f}" if published else "–"
        print(
            f"| {precision} | {name} | {row['ms']:.0f} | {row['time']:.2f} | {row['flops']:.2f} "
            f"| {row['peak']:.3f} | {told} "
            f"| {row['auxiliary_parameters']:,} |"
        )
    if options.json:
        with open(options.json, "w") as file:
            json.dump({"options": vars(options), "rows": rows}, file, indent=1)


class ByHand(nn.Module):
    """AugLocal on a CIFAR ResNet in plain PyTorch: residual blocks as auxiliary networks, a loop as the step."""

    def __init__(self, net: tl.DecoupledNetwork) -> None:
        super().__init__()
        blocks = children_in_order(net.backbone)
        self.parts = nn.ModuleList(
            blocks[g.start] if len(g) == 1 else nn.Sequential(*blocks[g.start : g.stop]) for g in net.partition.groups
        )
        self.auxiliary = nn.ModuleList()
        for network in net.auxiliary:
            layers: list[nn.Module] = []
            for unit in network.children():
                weights = [p for p in unit.parameters() if p.ndim == 4]  # with that of a shortcut, the stride is 2
                layers.append(BasicBlock(weights[0].shape[1], weights[0].shape[0], 2 if len(weights) == 3 else 1))
            classifier = nn.Linear(weights[0].shape[0], net.sites[0].num_outputs)
            self.auxiliary.append(nn.Sequential(*layers, nn.AdaptiveAvgPool2d(1), nn.Flatten(), classifier))
        counts = [sum(p.numel() for p in networks.parameters()) for networks in (self.auxiliary, net.auxiliary)]
        if counts[0] != counts[1]:
            raise ValueError(f"--rules: the networks by hand have {counts[0]} parameters, not {counts[1]}")

    def learn(self, x: Tensor, y: Tensor, dtype: torch.dtype | None) -> None:
        """A local step."""
        features = x
        for k, part in enumerate(self.parts):
            with torch.autocast("cpu", dtype=torch.bfloat16, enabled=dtype is not None):
                features = part(features)
                output = self.auxiliary[k](features) if k < len(self.auxiliary) else features
                loss = F.cross_entropy(output, y)
            loss.backward()
            features = features.detach()


def rule_step(net: nn.Module, x: Tensor, y: Tensor, dtype: torch.dtype | None) -> tuple[Callable[[], None], int, int]:
    """A training step, local for a decoupled network and ordinary for any other, its peak in bytes, and its FLOPs."""
    optimizer = torch.optim.SGD(net.parameters(), lr=1e-3, momentum=0.9, nesterov=True)

    def learn() -> None:
        if isinstance(net, tl.DecoupledNetwork):
            net.local_step(x, y, autocast=dtype)
            return
        if isinstance(net, ByHand):
            net.learn(x, y, dtype)
            return
        with torch.autocast("cpu", dtype=torch.bfloat16, enabled=dtype is not None):
            loss = F.cross_entropy(net(x), y)
        loss.backward()

    def run() -> None:
        learn()
        optimizer.step()
        optimizer.zero_grad()

    peak = tl.memory.measure(learn).peak_bytes
    optimizer.zero_grad()
    with FlopCounterMode(display=False) as counter:
        learn()
    optimizer.zero_grad()
    return run, peak, counter.get_total_flops()


def main() -> None:
    """Time the steps and print the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="resnet32", help="CIFAR ResNet of the library (default: resnet32)")
    parser.add_argument("--modules", type=int, default=16, help="local modules K, one per unit (default: 16)")
    parser.add_argument("--auxiliary", default="mlp_sr", help="auxiliary network (default: mlp_sr, that of DGL)")
    parser.add_argument("--batch-size", type=int, default=128, help="images per step (default: 128)")
    parser.add_argument("--size", type=int, default=32, help="image side in pixels (default: 32)")
    parser.add_argument("--precision", choices=("fp32", "bf16"), default="fp32", help="bf16 also uses channels_last")
    parser.add_argument("--rounds", type=int, default=15, help="timed rounds (default: 15)")
    parser.add_argument("--threads", type=int, default=None, help="torch threads (default: all cores)")
    parser.add_argument("--rules", nargs="*", default=None, help="compare these local rules; no name: all of them")
    parser.add_argument("--json", default=None, help="also write the numbers to this file")
    options = parser.parse_args()
    if options.threads:
        torch.set_num_threads(options.threads)
    if options.rules is not None:
        compare_rules(parser, options)
        return
    torch.manual_seed(0)
    dtype = torch.bfloat16 if options.precision == "bf16" else None
    layout = torch.channels_last if dtype else torch.contiguous_format
    model = build_model(options.model, num_classes=10, in_channels=3, image_size=(options.size, options.size))
    model = model.to(memory_format=layout)
    x = torch.randn(options.batch_size, 3, options.size, options.size).to(memory_format=layout)
    y = torch.randint(10, (options.batch_size,))
    net = tl.decouple(model, options.modules, sample=x, rule=tl.GreedyRule(options.auxiliary))
    parts = children_in_order(copy.deepcopy(model))
    auxiliary = copy.deepcopy(net.auxiliary)
    if len(parts) != net.num_modules:
        parser.error(f"--modules: the loop by hand has {len(parts)} modules, not {net.num_modules}; use that number")

    def autocast() -> torch.autocast:
        return torch.autocast("cpu", dtype=torch.bfloat16, enabled=dtype is not None)

    def trained(parameters: list[nn.Parameter], step: Callable[[], object]) -> Callable[[], None]:
        optimizer = torch.optim.SGD(parameters, lr=1e-3, momentum=0.9, nesterov=True)

        def run() -> None:
            step()
            optimizer.step()
            optimizer.zero_grad()

        return run

    ordinary = copy.deepcopy(model)

    def end_to_end() -> None:
        with autocast():
            loss = F.cross_entropy(ordinary(x), y)
        loss.backward()

    def local_by_hand() -> None:
        features: Tensor = x
        for k, part in enumerate(parts):
            with autocast():
                features = part(features)
                output = auxiliary[k](features) if k < len(parts) - 1 else features
                loss = F.cross_entropy(output, y)
            loss.backward()
            features = features.detach()

    # What PGL takes in all, its auxiliary networks and their momentum included, end-to-end training may take, too.
    whole = tl.decouple(copy.deepcopy(model), 1, sample=x)
    peaks = [tl.memory.predict(net, step="local", autocast=dtype)]
    peaks.append(tl.memory.predict(net, step="guided", memory="local", autocast=dtype))
    budget = max(peak.step_bytes for peak in peaks) + 2 * sum(p.nbytes for p in net.auxiliary.parameters())
    parted, exact = (whole.guided_plan(x, y, memory=budget, micro_batches=n, autocast=dtype) for n in (None, 1))
    own = list(net.parameters())
    hand = [p for m in [*parts, *auxiliary] for p in m.parameters()]
    steps: dict[str, Callable[[], None]] = {
        "end-to-end, by hand": trained(list(ordinary.parameters()), end_to_end),
        "guided step, frozen": trained(own, lambda: net.guided_step(x, y, auxiliary="frozen", autocast=dtype)),
        "local loop, by hand": trained(hand, local_by_hand),
        "local step": trained(own, lambda: net.local_step(x, y, autocast=dtype)),
        "guided step, following": trained(own, lambda: net.guided_step(x, y, autocast=dtype)),
        "guided step, following, recomputed": trained(
            own, lambda: net.guided_step(x, y, recompute="modules", autocast=dtype)
        ),
        WITHIN: trained(own, lambda: net.guided_step(x, y, memory="local", autocast=dtype)),
        PARTED: trained(list(whole.parameters()), lambda: whole.guided_step(x, y, memory=parted, autocast=dtype)),
        EXACT: trained(list(whole.parameters()), lambda: whole.guided_step(x, y, memory=exact, autocast=dtype)),
    }
    times: dict[str, list[float]] = {name: [] for name in steps}
    for index in range(options.rounds + 2):
        order = list(steps) if index % 2 == 0 else list(reversed(steps))
        for name in order:
            begin = time.perf_counter()
            steps[name]()
            if index >= 2:  # two rounds to warm up
                times[name].append(time.perf_counter() - begin)

    def ratio(name: str, base: str) -> float:
        return statistics.median(a / b for a, b in zip(times[name], times[base], strict=True))

    print(
        f"{options.model}, K = {net.num_modules}, {options.auxiliary} auxiliary networks, batch {options.batch_size}, "
        f"{options.size}×{options.size}, {options.precision}, {torch.get_num_threads()} threads, "
        f"median of {options.rounds} interleaved rounds, torch {torch.__version__}\n"
    )
    print("| step | ms | × end-to-end by hand | × local loop by hand |\n|---|---:|---:|---:|")
    rows = []
    for name in steps:
        row = {
            "step": name,
            "ms": 1000 * statistics.median(times[name]),
            "to_end_to_end": ratio(name, "end-to-end, by hand"),
            "to_local_loop": ratio(name, "local loop, by hand"),
        }
        rows.append(row)
        print(f"| {name} | {row['ms']:.1f} | {row['to_end_to_end']:.3f} | {row['to_local_loop']:.3f} |")
    times["pgl"] = [
        0.8 * local + 0.2 * guided for local, guided in zip(times["local step"], times[WITHIN], strict=True)
    ]
    plain = tl.memory.predict(whole, step="plain", autocast=dtype).step_bytes
    print(
        f"\nIn {budget / 2**20:.1f} MiB a step, of {plain / 2**20:.1f} MiB (predicted), a fifth of the steps guided: "
        f"PGL takes {ratio('pgl', 'end-to-end, by hand'):.2f} × end-to-end without a limit, "
        f"{ratio('pgl', PARTED):.2f} × end-to-end in {parted.micro_batches} "
        f"micro-batches, {ratio('pgl', EXACT):.2f} × end-to-end bit for bit "
        f"({exact.bytes / 2**20:.1f} MiB)."
    )
    if options.json:
        with open(options.json, "w") as file:
            json.dump({"options": vars(options), "rows": rows}, file, indent=1)


if __name__ == "__main__":
    main()
