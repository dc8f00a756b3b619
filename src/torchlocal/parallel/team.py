"""The processes of one training run: this one alone, or the ranks that torchrun started."""

from __future__ import annotations

import os
import time
import uuid
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from datetime import timedelta
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from .channels import PeerLost, watched
from .meet import meet
from .setup import check_same

__all__ = ["Elsewhere", "RemoteSplit", "ShareOfSplit", "Team", "process_group", "restarted", "started_by_torchrun"]

_PATIENCE = 3600.0  # seconds; while data are fetched or a large checkpoint is read, all others wait


class Elsewhere(RuntimeError):
    """Another rank has run into a mistake, and tells it."""


def started_by_torchrun() -> bool:
    """Whether this process is one of several that torchrun started."""
    return int(os.environ.get("WORLD_SIZE", "1")) > 1 and "RANK" in os.environ


def restarted() -> bool:
    """Whether torchrun has started this process again, after one was lost."""
    return int(os.environ.get("TORCHELASTIC_RESTART_COUNT", "0")) > 0


@contextmanager
def process_group(timeout: float) -> Iterator[None]:
    """The process group of the ranks that torchrun started; without torchrun there is none.

    Args:
        timeout: longest time in seconds to wait for another rank.

    Raises:
        ValueError: the time-out is not above 0.
    """
    if not timeout > 0:
        raise ValueError(f"timeout={timeout} must be a number of seconds above 0")
    if not started_by_torchrun() or dist.is_initialized():
        yield
        return
    backend = "gloo"
    if torch.cuda.is_available():
        torch.cuda.set_device(int(os.environ.get("LOCAL_RANK", "0")) % torch.cuda.device_count())
        backend = "cpu:gloo,cuda:nccl"
    limit = timedelta(seconds=timeout)
    with _meeting(timeout):
        store, rank, world = next(dist.rendezvous("env://", timeout=limit))
        store = _fresh(store, rank, world, limit)
    with watched("another rank", timeout):
        meet(store, rank, world, limit)
    with _meeting(timeout):
        dist.init_process_group(backend, store=store, rank=rank, world_size=world, timeout=limit)
    with watched("another rank", timeout):
        yield
    with watched("another rank", timeout):
        dist.destroy_process_group()  # not after an error: it would wait for those who are gone


@contextmanager
def _meeting(timeout: float) -> Iterator[None]:
    """Tell in one sentence that the ranks have not met."""
    try:
        yield
    except (RuntimeError, ValueError) as error:  # in many lines of torch's own
        if isinstance(error, PeerLost):
            raise
        place = ":".join(os.environ.get(name, "?") for name in ("MASTER_ADDR", "MASTER_PORT"))
        raise PeerLost(
            f"the {os.environ['WORLD_SIZE']} ranks cannot meet at {place} (waited up to {timeout:g} s): see whether "
            "all have started, with the same MASTER_ADDR and a MASTER_PORT that is free"
        ) from error


def _fresh(store: dist.Store, rank: int, world: int, limit: timedelta) -> dist.Store:
    """A part of the store that nobody has used before.

    The agent of torchrun keeps one store over all restarts, in which the addresses of lost ranks are still to be found.
    Each rank leaves a number of its own, and rank 0 answers with the name of the new part until all have got it.
    """
    own = uuid.uuid4().hex
    if rank > 0:
        store.set(f"torchlocal/{rank}", own)
        store.wait([f"torchlocal/{rank}/{own}"], limit)
        own = store.get(f"torchlocal/{rank}/{own}").decode()
        store.set(f"torchlocal/{own}/{rank}", "here")
        return dist.PrefixStore(own, store)
    missing, end = set(range(1, world)), time.monotonic() + limit.total_seconds()
    while missing:
        for other in sorted(missing):
            if store.check([f"torchlocal/{own}/{other}"]):
                missing.remove(other)
            elif store.check([f"torchlocal/{other}"]):
                store.set(f"torchlocal/{other}/{store.get(f'torchlocal/{other}').decode()}", own)
        if time.monotonic() > end:
            raise PeerLost(f"rank {min(missing)} has not come for {limit.total_seconds():g} s: see whether it started")
        time.sleep(0.01)
    return dist.PrefixStore(own, store)


class RemoteSplit:
    """A split that another rank reads: it has a length, and batches of nothing.

    Args:
        num_images: number of images.
    """

    def __init__(self, num_images: int) -> None:
        self._num_images = num_images

    def __len__(self) -> int:
        return self._num_images

    def batches(
        self, batch_size: int, *, epoch: int = 0, train: bool, seed: int = 0, start: int = 0
    ) -> Iterator[tuple[None, None]]:
        """As many empty batches as the one who reads has full ones."""
        count = len(self) // batch_size if train else -(-len(self) // batch_size)
        return iter([(None, None)] * (count - start))


class ShareOfSplit:
    """A split of whose batches every replica takes a part.

    Args:
        split: the split.
        replica: which part.
        num_replicas: number of parts.
    """

    def __init__(self, split: Any, replica: int, num_replicas: int) -> None:
        self._split, self._replica, self._num_replicas = split, replica, num_replicas

    def __len__(self) -> int:
        return len(self._split)

    def batches(self, batch_size: int, *, train: bool, **options: Any) -> Iterator[tuple[Tensor, Tensor]]:
        """The parts of the batches that are trained on; the whole ones to measure."""
        for x, y in self._split.batches(batch_size, train=train, **options):
            if train:
                yield x.chunk(self._num_replicas)[self._replica], y.chunk(self._num_replicas)[self._replica]
            else:
                yield x, y


class Team:
    """Who does what in a run: the first stage of each replica reads the data, the last one of the first replica writes.

    Args:
        replicas: number of replicas.
        timeout: longest time in seconds that a rank waits for another one in a step.

    Raises:
        ValueError: the ranks cannot be shared out to the replicas.
    """

    def __init__(self, replicas: int = 1, timeout: float = 300.0) -> None:
        self.timeout = timeout
        self.size = dist.get_world_size() if dist.is_available() and dist.is_initialized() else 1
        self.rank = dist.get_rank() if self.size > 1 else 0
        if self.size % replicas:
            raise ValueError(f"replicas={replicas} needs a number of ranks that it divides, not {self.size}")
        self.num_stages = self.size // replicas
        self.replicas, self.replica = replicas, self.rank // self.num_stages
        self._group: Any = None
        if self.size > 1:
            self._group = dist.new_group(backend="gloo", timeout=timedelta(seconds=_PATIENCE))

    @property
    def parallel(self) -> bool:
        """Whether there are others."""
        return self.size > 1

    @property
    def writer(self) -> int:
        """The rank that writes the run folder, and tells how it goes: it knows all losses."""
        return self.num_stages - 1

    @property
    def writes(self) -> bool:
        """Whether that is this rank."""
        return self.rank == self.writer

    @property
    def reads(self) -> bool:
        """Whether this rank reads the data."""
        return self.rank % self.num_stages == 0

    def check_same(self, values: Mapping[str, Any]) -> None:
        """Refuse ranks that were started with other values.

        Raises:
            ValueError: naming the rank and the value, on the writer.
            Elsewhere: on the other ranks.
        """
        if not self.parallel:
            return
        try:
            check_same(values)
        except ValueError as error:
            if self.writes:
                raise
            raise Elsewhere(str(error)) from None

    def at(self, rank: int, function: Callable[[], Any]) -> Any:
        """Call a function on one rank; all get its result.

        Raises:
            Exception: whatever the function raises, on that rank.
            Elsewhere: on the others.
        """
        if not self.parallel:
            return function()
        held: list[Any] = [None, None]
        failed: Exception | None = None
        if self.rank == rank:
            try:
                held[0] = function()
            except Exception as error:
                failed, held[1] = error, str(error)
        with watched(f"rank {rank}", _PATIENCE):
            dist.broadcast_object_list(held, src=rank, group=self._group)
        if failed is not None:
            raise failed
        if held[1] is not None:
            raise Elsewhere(held[1])
        return held[0]

    def at_writer(self, function: Callable[[], Any]) -> Any:
        """Call a function on the rank that writes; see :meth:`at`."""
        return self.at(self.writer, function)

    def at_reader(self, function: Callable[[], Any]) -> Any:
        """Call a function on the first rank, which reads; see :meth:`at`."""
        return self.at(0, function)

    def gather(self, value: Any) -> list[Any]:
        """What this is on every rank."""
        if not self.parallel:
            return [value]
        gathered: list[Any] = [None] * self.size
        with watched("another rank", _PATIENCE):
            dist.all_gather_object(gathered, value, group=self._group)
        return gathered
