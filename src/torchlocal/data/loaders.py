"""Data of the user's own: a DataLoader, or anything else that can be iterated over and over, as a split.

A run has to go on after a stop with the batches that would have come. So each pass over a loader draws from random
generators of its own: while it is asked for a batch, torch's, numpy's and Python's global ones are set to a state that
depends on the seed and the epoch alone, and put back afterwards; a generator that the loader holds is seeded likewise,
and `set_epoch` is called where there is one.
"""

from __future__ import annotations

import contextlib
import itertools
import random
import signal
import threading
import zlib
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.utils._pytree import tree_flatten

from torchlocal.cut.batches import num_examples
from torchlocal.data.bundles import DataBundle
from torchlocal.data.splits import LOADER_STREAM, make_generator

__all__ = ["LoaderBundle", "LoaderSplit", "bundle"]

_PARTS = ("train", "validation", "test")


class LoaderSplit:
    """A loader of `(batch, target)` pairs as a split: it has a length, and passes that can start anywhere.

    Args:
        loader: what is iterated once per pass.
        part: what it is for, for errors: "train", "validation" or "test".

    Raises:
        ValueError: it cannot be iterated several times, has no length although it is to be trained on, or gives
            something else than pairs.
    """

    def __init__(self, loader: Any, part: str) -> None:
        self._loader, self._told = loader, f'data["{part}"]'
        if isinstance(loader, Iterator):
            raise ValueError(
                f"{self._told} gives its batches only once, and every epoch reads it anew: give a DataLoader, a list, "
                "or an object whose __iter__ begins a new pass"
            )
        try:
            self._num_batches = len(loader)
        except TypeError as error:  # also of a DataLoader over an IterableDataset
            if part == "train":
                raise ValueError(
                    f"{self._told} has no length, over which learning rate and guidance are spread: give a DataLoader, "
                    "a list, or an object whose len() is its number of batches"
                ) from error
            self._num_batches = 0
        self.sample = next(self._pass(0, 0), None)
        if self.sample is None:
            raise ValueError(f"{self._told} gives no batch: see what it reads")
        size = getattr(loader, "batch_size", None)
        self.batch_size = size if isinstance(size, int) else num_examples(self.sample[0])
        self.checksum = ""  # of the first batch of the pass that was begun last, as far as it is trained on

    def __len__(self) -> int:
        """As many examples as its batches hold when they are full."""
        return self._num_batches * self.batch_size

    def batches(
        self, batch_size: int, *, epoch: int = 0, train: bool, seed: int = 0, start: int = 0
    ) -> Iterator[tuple[Any, Any]]:
        """One pass, from batch `start` on; those before it are read and left out.

        Args:
            batch_size: not used: the loader decides.
            epoch: the pass. One that is not to be trained on is always the same.
            train: whether it is to be trained on.
            seed: the run's.
            start: index of the first batch.

        Raises:
            ValueError: something else than pairs comes, or fewer than `len()` of the loader says.
        """
        if not train:
            return self._pass(0, 0)
        pairs = self._pass(seed, epoch)
        first = next(pairs, None)
        self.checksum = _checksum(first)
        return self._from(start, first, pairs)

    def _from(self, start: int, first: Any, pairs: Iterator[Any]) -> Iterator[Any]:
        count = 0
        for count, pair in enumerate(itertools.chain(() if first is None else (first,), pairs), start=1):
            if count > start:
                yield pair
        if count < self._num_batches:
            raise ValueError(
                f"{self._told} gave {count} batches, and its len() says {self._num_batches}: let them agree"
            )

    def _pass(self, seed: int, epoch: int) -> Iterator[Any]:
        generators = _Generators(seed, epoch)
        with generators, _workers_ignore_interrupt():
            self._begin(seed, epoch)
            try:
                items = iter(self._loader)
            except TypeError as error:
                raise ValueError(
                    f"{self._told} is of the kind {type(self._loader).__name__}, which gives no batches: give a "
                    "DataLoader, or a list of (batch, target)"
                ) from error
        while True:
            with generators:
                try:
                    item = next(items)
                except StopIteration:
                    return
            if not isinstance(item, tuple | list) or len(item) != 2:
                kind = f"{len(item)} values" if isinstance(item, tuple | list) else f"a {type(item).__name__}"
                raise ValueError(
                    f"{self._told} gives {kind} where (batch, target) is expected: pair them, for example in a "
                    "collate_fn; a batch may be a tensor, a tuple of arguments or a mapping of keyword arguments"
                )
            yield item[0], item[1]

    def _begin(self, seed: int, epoch: int) -> None:
        holders = [getattr(self._loader, name, None) for name in ("batch_sampler", "sampler", "dataset")]
        for holder in [self._loader, *holders]:
            if callable(begin := getattr(holder, "set_epoch", None)):
                begin(epoch)
        for holder in [self._loader, *holders[:2]]:
            if isinstance(generator := getattr(holder, "generator", None), torch.Generator):
                generator.set_state(make_generator(LOADER_STREAM, seed=seed, epoch=epoch).get_state())


class _Generators:
    """The random states of a pass, which the global generators have while in this context."""

    def __init__(self, seed: int, epoch: int) -> None:
        generator = make_generator(LOADER_STREAM, seed=seed, epoch=epoch, index=1)
        words = torch.randint(2**32, (2,), generator=generator).tolist()
        numpy_state = np.random.RandomState(words[0]).get_state()
        self._own = generator.get_state(), numpy_state, random.Random(words[1]).getstate()

    def __enter__(self) -> None:
        self._outer = _states()
        _set_states(self._own)

    def __exit__(self, *_: object) -> None:
        self._own = _states()
        _set_states(self._outer)


def _states() -> tuple[Any, Any, Any]:
    return torch.get_rng_state(), np.random.get_state(), random.getstate()


def _set_states(states: tuple[Any, Any, Any]) -> None:
    torch.set_rng_state(states[0])
    np.random.set_state(states[1])
    random.setstate(states[2])


@contextlib.contextmanager
def _workers_ignore_interrupt() -> Iterator[None]:
    """Worker processes that are started in this context ignore Ctrl-C, which the main one answers."""
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    previous = signal.signal(signal.SIGINT, signal.SIG_IGN)
    try:
        yield
    finally:
        signal.signal(signal.SIGINT, signal.SIG_DFL if previous is None else previous)


def _checksum(pair: Any) -> str:
    value = 0
    for leaf in tree_flatten(pair)[0]:
        if isinstance(leaf, Tensor):
            value = zlib.crc32(leaf.detach().cpu().contiguous().view(-1).view(torch.uint8).numpy().data, value)
    return f"{value:08x}"


@dataclass(frozen=True, kw_only=True)
class LoaderBundle(DataBundle):
    """Loaders of the user's own as the data of a run: no classes, no shape of images, no checksum."""

    name: str = "own"
    train: Any
    validation: Any
    test: Any = None
    num_classes: int = 0
    shape: Any = ()

    def sample(self, batch_size: int) -> Any:
        """The first batch."""
        return self.train.sample[0]


def bundle(data: Any) -> DataBundle:
    """What the user hands in as `data=`, as the data of a run.

    Raises:
        ValueError: it is neither a bundle nor loaders by part.
    """
    if isinstance(data, DataBundle):
        return data
    if not isinstance(data, Mapping) or not {"train", "validation"} <= set(data) <= set(_PARTS):
        told = f"the parts {', '.join(map(repr, data))}" if isinstance(data, Mapping) else type(data).__name__
        raise ValueError(
            f'data={told} cannot be used: give {{"train": loader, "validation": loader, "test": loader}} (test may be '
            "left out), or what torchlocal.data.load_data returns"
        )
    splits: dict[str, Any] = {part: LoaderSplit(loader, part) for part, loader in data.items()}
    return LoaderBundle(**splits)
