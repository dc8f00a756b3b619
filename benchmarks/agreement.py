"""Whether local gradients point where the global loss wants to go: their cosine, module by module.

Takes finished runs of `torchlocal fit` or `compare`. On the same training batches, each local module's gradient of its
local loss is compared with its gradient of the global loss (of the whole network).

    python benchmarks/agreement.py runs/compare-pairs-resnet20/local/seed0 runs/compare-pairs-resnet20/pgl/seed0
"""

from __future__ import annotations

import argparse
import itertools
import statistics
from pathlib import Path

import torch
from torch import Tensor

import torchlocal as tl
from torchlocal.run.evaluation import load_run


def module_gradients(net: tl.DecoupledNetwork) -> list[Tensor]:
    """The gradients of the backbone's parameters, one flat vector per local module; they are taken away."""
    auxiliary = {id(p) for p in net.auxiliary.parameters()}
    own = [[p for p in parameters if id(p) not in auxiliary] for parameters in net.module_parameters()]
    vectors = [torch.cat([p.grad.flatten() for p in group if p.grad is not None]) for group in own]
    net.zero_grad()
    return vectors


def agreement(run: Path, num_batches: int, data_root: str | None) -> list[float]:
    """Mean cosine over batches, from the first local module to the last (whose local loss is the global one)."""
    config, execution, data, net = load_run(run / "last.pt", device="auto", data_root=data_root)
    net.train()
    found: list[list[float]] = []
    for x, y in itertools.islice(data.train.batches(config.optimisation.batch_size, train=True, seed=1), num_batches):
        placed, target = execution.place(x), execution.place(y)
        net.guided_step(placed, target, auxiliary="frozen", autocast=execution.autocast)
        guided = module_gradients(net)
        net.local_step(placed, target, autocast=execution.autocast)
        pairs = zip(module_gradients(net), guided, strict=True)
        found.append([torch.nn.functional.cosine_similarity(a, b, dim=0).item() for a, b in pairs])
    return [statistics.fmean(values) for values in zip(*found, strict=True)]


def main() -> None:
    """Print one line per run."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("runs", nargs="+", type=Path, help="folders of runs")
    parser.add_argument("--batches", type=int, default=16, help="training batches to average over (default: 16)")
    parser.add_argument("--data-root", default=None, help="folder of the data set's files")
    options = parser.parse_args()
    print("| run | cosine of local and global gradient, module 1 to K |")
    print("|---|---|")
    for run in options.runs:
        values = agreement(run, options.batches, options.data_root)
        print(f"| {run} | {' '.join(f'{value:.2f}' for value in values)} |", flush=True)


if __name__ == "__main__":
    main()
