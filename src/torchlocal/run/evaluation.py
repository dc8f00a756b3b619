"""What a trained network is worth: accuracy and loss of a split, also by depth."""

import dataclasses
from collections.abc import Callable, Sequence
from functools import partial
from itertools import zip_longest
from pathlib import Path
from typing import Any

import torch
from torch.nn import functional as F

from torchlocal.data import DataBundle, Split
from torchlocal.network import DecoupledNetwork
from torchlocal.parallel.network import ParallelNetwork
from torchlocal.run import checkpoint
from torchlocal.run.build import Execution, build_network, load_run_data, resolve_execution
from torchlocal.run.config import FitConfig, config_from_dict

__all__ = ["evaluate", "load_run", "measure_split"]


@torch.no_grad()
def evaluate(
    run: str | Path, split: str = "test", *, device: str = "auto", data_root: str | None = None
) -> dict[str, Any]:
    """Measure a trained network, also at the depth of every auxiliary network.

    Args:
        run: a run folder, whose best checkpoint is taken, or a checkpoint.
        split: "train" (not augmented), "validation" or "test".
        device: where to compute.
        data_root: folder of the data set's files, if it is not the run's.

    Returns:
        The checkpoint, the split, the number of images, the accuracy, the loss (cross-entropy without label smoothing)
        and the accuracies by depth, from the first local module to the whole network.

    Raises:
        ValueError: if the split is unknown or the checkpoint does not fit.
        FileNotFoundError: if there is no checkpoint.
    """
    if split not in ("train", "validation", "test"):
        raise ValueError(f'split={split!r} is unknown: give "train", "validation" or "test"')
    path = Path(run).expanduser()
    if path.is_dir():
        found = [path / name for name in ("best.pt", "last.pt") if (path / name).exists()]
        if not found:
            runs = sorted(path.glob("*/seed*/best.pt"))
            such = f", such as {runs[0].parent}" if runs else ""
            raise FileNotFoundError(f"{path} holds no checkpoint (best.pt, last.pt): give the folder of a run{such}")
        path = found[0]
    config, execution, data, net = load_run(path, device=device, data_root=data_root)
    images = getattr(data, split)
    measured = measure_split(net, images, config, execution, by_depth=True)
    return {"checkpoint": str(path), "split": split, "num_images": len(images), **measured}


def load_run(
    path: Path, *, device: str, data_root: str | None
) -> tuple[FitConfig, Execution, DataBundle, DecoupledNetwork]:
    """What a checkpoint was trained with, and its network with the weights; the random generator is left alone.

    Args:
        path: the checkpoint.
        device: where to compute.
        data_root: folder of the data set's files, if it is not the run's.

    Raises:
        ValueError: if the checkpoint does not fit.
        FileNotFoundError: if there is none.
    """
    saved = checkpoint.load_checkpoint(path)
    with checkpoint.reading(path):
        config = dataclasses.replace(config_from_dict(saved["config"]), device=device)
    config = config if data_root is None else dataclasses.replace(config, data_root=data_root)
    execution = resolve_execution(config)
    data = load_run_data(config)
    _check_classes(path, saved["data"].get("classes", data.classes), data.classes)
    with torch.random.fork_rng(devices=[]):  # the weights drawn here are overwritten
        net = build_network(config, data, execution)
    checkpoint.load_network(net, saved, path)
    return config, execution, data, net


def _check_classes(path: Path, there: Sequence[str], here: Sequence[str]) -> None:
    """Refuse images of other classes, of which there may be as many: their labels would mean something else."""
    for index, names in enumerate(zip_longest(there, here)):
        if names[0] != names[1]:
            raise ValueError(
                f"{path} was trained on other classes: number {index} is {names[0]!r} there and {names[1]!r} here; "
                "give a data_root with class folders of the same names"
            )


@torch.no_grad()
def measure_split(
    net: DecoupledNetwork | ParallelNetwork,
    split: Split,
    config: FitConfig,
    execution: Execution,
    *,
    by_depth: bool = False,
    check: Callable[[], None] = lambda: None,
) -> dict[str, Any]:
    """Return accuracy and cross-entropy of a split; check is called after every batch."""
    net.eval()
    last = net.num_modules - 1
    correct = torch.zeros(net.num_modules, dtype=torch.int64, device=execution.device)
    loss = torch.zeros((), device=execution.device)
    autocast = partial(
        torch.autocast, execution.device.type, execution.autocast, enabled=execution.autocast is not None
    )
    for x, y in split.batches(config.batch_size, train=False):
        x, y = execution.place_batch(x, y)
        with autocast():
            if isinstance(net, ParallelNetwork):  # the modules of this rank alone
                outputs, y = net.depth_outputs(x, y, all_depths=by_depth)
            else:
                outputs = dict(enumerate(net.depth_outputs(x))) if by_depth else {last: net(x)}
        for k, output in outputs.items():
            correct[k] += (output.argmax(1) == y).sum()
        if last in outputs:
            loss += F.cross_entropy(outputs[last].float(), y, reduction="sum")
        check()
    if isinstance(net, ParallelNetwork):
        correct, loss = net.sum_over_stages(correct), net.sum_over_stages(loss)
    accuracies = [int(number) / len(split) for number in correct.tolist()]
    measured: dict[str, Any] = {"accuracy": accuracies[-1], "loss": loss.item() / len(split)}
    return measured | {"depth_accuracy": accuracies} if by_depth else measured
