"""Test accuracy of methods on pairs of images, over several pairings: one pairing of 2,000 test images is coarse.

Takes the folders of methods that `torchlocal compare` trained on `pairs:NAME`. The first pairing is the one of the
report; the weights are those that the report is of.

    python benchmarks/pairings.py runs/compare-guidance-pairs/end-to-end runs/compare-guidance-pairs/pgl
"""

from __future__ import annotations

import argparse
import statistics
from pathlib import Path

from torchlocal.run.evaluation import load_run, measure_split


def mean_accuracy(run: Path, num_pairings: int, data_root: str | None) -> float:
    """Test accuracy in per cent of a run's best weights, mean over pairings."""
    config, execution, data, net = load_run(run / "best.pt", device="auto", data_root=data_root)
    splits = [data.test.with_partners(index) for index in range(num_pairings)]
    return 100 * statistics.fmean(measure_split(net, split, config, execution)["accuracy"] for split in splits)


def main() -> None:
    """Print one line per method."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("methods", nargs="+", type=Path, help="folders of methods, which hold seed0, seed1, ...")
    parser.add_argument("--pairings", type=int, default=8, help="pairings to average over (default: 8)")
    parser.add_argument("--data-root", default=None, help="folder of the data set's files")
    options = parser.parse_args()
    print(f"| method | test accuracy over {options.pairings} pairings, % | by seed |")
    print("|---|---|---|")
    for method in options.methods:
        runs = sorted(path.parent for path in method.glob("seed*/best.pt"))
        if not runs:
            parser.error(f"{method} holds no finished run seed*/best.pt: give METHOD of a comparison")
        found = [mean_accuracy(run, options.pairings, options.data_root) for run in runs]
        spread = f" ± {statistics.stdev(found):.1f}" if len(found) > 1 else ""
        seeds = ", ".join(f"{value:.2f}" for value in found)
        print(f"| {method} | {statistics.fmean(found):.1f}{spread} | {seeds} |", flush=True)


if __name__ == "__main__":
    main()
