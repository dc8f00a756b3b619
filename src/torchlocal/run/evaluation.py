"""What a trained network is worth: accuracy and loss of a split, of text perplexity, also by depth."""

import math
from collections.abc import Callable, Sequence
from functools import partial
from itertools import zip_longest
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from torchlocal.cut.batches import num_examples as count_examples
from torchlocal.data import DataBundle, Split, TextBundle
from torchlocal.data.text import IGNORED
from torchlocal.network import DecoupledNetwork
from torchlocal.parallel.network import ParallelNetwork
from torchlocal.recompute import undisturbed
from torchlocal.run import checkpoint
from torchlocal.run.build import Execution, build_network, resolve_execution
from torchlocal.run.config import FitConfig
from torchlocal.run.own import Own
from torchlocal.tokens import TokenCrossEntropy

__all__ = ["are_classes", "evaluate", "load_run", "measure_split", "plain", "quality"]

_NAMED = Own()


@torch.no_grad()
def evaluate(
    run: str | Path,
    split: str = "test",
    *,
    model: nn.Module | Callable[[], nn.Module] | None = None,
    data: Any = None,
    criterion: Callable[[Tensor, Any], Tensor] | None = None,
    prediction: Callable[[Any], Tensor] | None = None,
    device: str = "auto",
    data_root: str | None = None,
) -> dict[str, Any]:
    """Measure a trained network, also at the depth of every auxiliary network.

    A network or data of the user's own are handed in as they were to :func:`fit`; the network gets the weights.

    Args:
        run: a run folder, whose best checkpoint is taken, or a checkpoint.
        split: "train" (not augmented), "validation" or "test".
        model: the network, if it has no name.
        data: the data, if they have no name.
        criterion: the loss, if it was not cross-entropy.
        prediction: what takes the prediction from what the network returns.
        device: where to compute.
        data_root: folder of the data set's files, if it is not the run's.

    Returns:
        What :func:`measure_split` returns, with the checkpoint and the split; of text, whose examples are tokens, with
        perplexity and bits per byte in place of accuracy.

    Raises:
        ValueError: if the split is unknown or the checkpoint does not fit.
        FileNotFoundError: if there is no checkpoint.
    """
    if split not in ("train", "validation", "test"):
        raise ValueError(f'split={split!r} is unknown: give "train", "validation" or "test"')
    path = checkpoint.find_checkpoint(run)
    own = Own(model=model, data=data, criterion=criterion, prediction=prediction)
    config, execution, found, net = load_run(path, device=device, data_root=data_root, own=own)
    part = getattr(found, split)
    if part is None:
        raise ValueError(f"split={split!r}: the data that were handed in have no such part: give another split")
    text = isinstance(found, TextBundle)
    measured = measure_split(net, part, config, execution, criterion=criterion, by_depth=True, text=text)
    size = {"num_tokens" if text else "num_images": measured["num_examples"]}
    told = {**size, **quality(measured, found, split), **quality(measured, found, split, depth=True)}
    return {"checkpoint": str(path), "split": split, **{name: plain(value) for name, value in told.items()}}


def load_run(
    path: Path, *, device: str, data_root: str | None, own: Own = _NAMED
) -> tuple[FitConfig, Execution, DataBundle, DecoupledNetwork]:
    """What a checkpoint was trained with, and its network with the weights; the random generators are left alone.

    Args:
        path: the checkpoint.
        device: where to compute.
        data_root: folder of the data set's files, if it is not the run's.
        own: what has no name.

    Raises:
        ValueError: if the checkpoint does not fit.
        FileNotFoundError: if there is none.
    """
    saved = checkpoint.load_checkpoint(path)
    with checkpoint.reading(path):
        config = FitConfig.of(**saved["config"]).changed(device=device)
    config = own.named(config if data_root is None else config.changed(data_root=data_root))
    execution = resolve_execution(config)
    data = own.load(config).to(execution.device)
    _check_classes(path, saved["data"].get("classes", data.classes), data.classes)
    if isinstance(data, TextBundle):
        checkpoint.check_same_tokens(path, saved["data"], data)
    with undisturbed(execution.device):  # by a seed, and by weights that are overwritten
        net = build_network(config, data, execution, own)
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
    criterion: Callable[[Tensor, Any], Tensor] | None = None,
    by_depth: bool = False,
    text: bool = False,
    check: Callable[[], None] = lambda: None,
) -> dict[str, Any]:
    """Measure a network on a split.

    Args:
        net: the network, which is in evaluation mode afterwards.
        split: what to measure it on.
        config: the run's.
        execution: where it runs.
        criterion: gives the loss of a batch; None: cross-entropy without label smoothing.
        by_depth: also through the auxiliary networks.
        text: an example is a token, as far as its target counts.
        check: called after every batch.

    Returns:
        The number of examples, the accuracy (right predictions over all targets; NaN where targets are no classes) and
        the loss (mean over examples), and by depth both from the first local module to the whole network.
    """
    net.eval()
    last = net.num_modules - 1
    num_examples = torch.zeros((), dtype=torch.int64, device=execution.device)
    cross_entropy = TokenCrossEntropy(reduction="sum") if text else partial(F.cross_entropy, reduction="sum")
    right = torch.zeros(net.num_modules, dtype=torch.int64, device=execution.device)
    loss = torch.zeros(net.num_modules, device=execution.device)
    num_targets: int | None = None if text else 0  # also on ranks that predict nothing
    autocast = partial(
        torch.autocast, execution.device.type, execution.autocast, enabled=execution.autocast is not None
    )
    for x, y in split.batches(config.optimisation.batch_size, train=False):
        x, y = execution.place(x), execution.place(y)
        with autocast():
            if isinstance(net, ParallelNetwork):  # the modules of this rank alone
                outputs, y = net.depth_outputs(x, y, all_depths=by_depth)
            else:
                outputs = dict(enumerate(net.depth_outputs(x))) if by_depth else {last: net.chain.call(x)}
        size = len(y) if isinstance(y, Tensor) and y.ndim else count_examples(x)
        size = (y != IGNORED).sum() if text else size
        num_examples += size
        for k, output in outputs.items():
            if num_targets is not None and not are_classes(output.shape, y):
                num_targets = None
            if num_targets is not None:
                right[k] += (output.argmax(1) == y).sum()
            if criterion is not None:
                loss[k] += criterion(output.float() if output.is_floating_point() else output, y) * size
            else:
                loss[k] += cross_entropy(output.float(), y)
        if num_targets is not None:
            num_targets += y.numel()
        check()
    if isinstance(net, ParallelNetwork):
        right, loss = net.sum_over_stages(right), net.sum_over_stages(loss)
    accuracies = [int(number) / num_targets if num_targets else math.nan for number in right.tolist()]
    count = int(num_examples)
    losses = [value / count for value in loss.tolist()]
    measured: dict[str, Any] = {"num_examples": count, "accuracy": accuracies[-1], "loss": losses[-1]}
    return measured | {"depth_accuracy": accuracies, "depth_loss": losses} if by_depth else measured


def quality(measured: dict[str, Any], data: DataBundle, part: str, *, depth: bool = False) -> dict[str, Any]:
    """What was measured, in the terms of the data: loss, and accuracy, or of text perplexity and bits per byte.

    Args:
        measured: what :func:`measure_split` returned.
        data: what the split is of.
        part: "train", "validation" or "test".
        depth: by depth.
    """
    if not isinstance(data, TextBundle):
        names = ("depth_loss", "depth_accuracy") if depth else ("loss", "accuracy")
        return {name: measured[name] for name in names}
    losses = measured["depth_loss"] if depth else [measured["loss"]]
    found = {"loss": losses, "perplexity": [_exp(loss) for loss in losses]}
    if part in data.bytes_per_token:
        bits = math.log(2) * data.bytes_per_token[part]
        found["bits_per_byte"] = [loss / bits for loss in losses]
    return {f"depth_{name}": values for name, values in found.items()} if depth else {n: v[0] for n, v in found.items()}


def _exp(loss: float) -> float:
    """Of a loss that is too large for it, NaN."""
    return math.exp(loss) if loss < 700 else math.nan


def are_classes(shape: torch.Size, target: Any) -> bool:
    """Whether a target holds the class of each prediction, whose second dimension are the classes."""
    if not isinstance(target, Tensor) or target.is_floating_point() or len(shape) < 2:
        return False
    return target.shape == shape[:1] + shape[2:]


def plain(value: Any) -> Any:
    """NaN, which JSON does not know, as None."""
    if isinstance(value, list):
        return [plain(item) for item in value]
    return None if isinstance(value, float) and math.isnan(value) else value
