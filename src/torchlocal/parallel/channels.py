"""Messages between two ranks: tensors in order, sent and received while both sides go on computing."""

from __future__ import annotations

import pickle
import queue
import threading
from collections import deque
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from datetime import timedelta
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from .load import Waits

__all__ = ["CLOSE", "Channel", "Message", "PeerLost", "watched"]

CLOSE = 0  # the kind of message after which nothing follows
# Tags; backends without tags rely on the order, which is the same. From _EXPECTED on, those of expected layouts.
_HEADER, _DESCRIPTION, _PAYLOAD, _EXPECTED = 1, 2, 3, 4
_WORDS = ("gloo", "Gloo", "NCCL", "onnection", "ocket")  # of errors that the network is to blame for
_MOST_KNOWN = 64  # descriptions that both sides keep; a target may hold a number that is another in every batch
_MOST_EXPECTED = 2  # layouts of messages that memory waits for: batches of training, and those of another size
_FOR_EVER = timedelta(days=365)


class PeerLost(RuntimeError):
    """Another rank is gone, or silent."""


@contextmanager
def watched(peer: str, timeout: float) -> Iterator[None]:
    """Name the rank that an operation waits for in the error that it ends with."""
    try:
        yield
    except queue.Empty:
        raise PeerLost(_silent(peer, timeout)) from None
    except RuntimeError as error:
        text = str(error)
        ours = isinstance(error, dist.DistError) or any(word in text for word in _WORDS)
        if isinstance(error, PeerLost) or not ours:
            raise
        if "timed out" in text.lower() or "timeout" in text.lower():
            raise PeerLost(_silent(peer, timeout)) from error
        how = next((word for word in ("closed", "reset", "refused") if word in text.lower()), "lost")
        raise PeerLost(f"{peer} is gone (connection {how}): see what it said last") from error


def _silent(peer: str, timeout: float) -> str:
    return f"{peer} has been silent for {timeout:g} s: see whether it hangs, or give a longer timeout"


@dataclass(frozen=True)
class Message:
    """What arrives.

    Attributes:
        kind: a number that tells what the message is about.
        flag: a number that may differ from message to message.
        tensors: the tensors, in the memory layout they were sent in.
        extra: whatever else was said; meant to stay the same from message to message.
        notes: further numbers that may differ, as many as the channel carries.
    """

    kind: int
    flag: int
    tensors: list[Tensor]
    extra: Any
    notes: list[int]


@dataclass(frozen=True)
class _Layout:
    """How a tensor is written into one dense block, and read from it."""

    dtype: torch.dtype
    sizes: tuple[int, ...]  # of the tensor
    order: tuple[int, ...]  # its dimensions, from the one with the largest stride
    repeated: tuple[bool, ...]  # dimensions along which the same numbers repeat

    @classmethod
    def of(cls, tensor: Tensor) -> _Layout:
        strides, sizes = tensor.stride(), tuple(tensor.shape)
        repeated = tuple(stride == 0 and size > 1 for stride, size in zip(strides, sizes, strict=True))
        order = tuple(sorted(range(tensor.ndim), key=lambda dim: (-strides[dim], dim)))
        return cls(tensor.dtype, sizes, order, repeated)

    @property
    def empty(self) -> bool:
        """Whether the tensor holds nothing, so that nothing is sent."""
        return 0 in self.sizes

    def pack(self, tensor: Tensor) -> Tensor:
        """The dense block; a view of the tensor unless it has gaps."""
        for dim, repeated in enumerate(self.repeated):
            if repeated:
                tensor = tensor.narrow(dim, 0, 1)
        return tensor.permute(self.order).contiguous()

    def allocate(self, device: torch.device) -> Tensor:
        """An empty block."""
        sizes = [1 if self.repeated[dim] else self.sizes[dim] for dim in self.order]
        return torch.empty(sizes, dtype=self.dtype, device=device)

    def unpack(self, block: Tensor) -> Tensor:
        """The tensor, on the memory of the block."""
        inverse = sorted(range(len(self.order)), key=self.order.__getitem__)
        return block.permute(inverse).expand(self.sizes)


class Channel:
    """One-way messages from one rank to another, in order.

    The sender goes on at once, unless ``depth`` messages are still on their way out. The receiver has a thread that
    takes headers as they come and has the tensors written into memory ahead of their use, at most ``depth`` messages.

    Gloo asks whether the other side has memory before it sends, and waits for the answer, which takes two latencies.
    Where tensors of a message come in a layout for the second time, on CPUs, it is there already, and has been told of.

    Args:
        source: global rank that sends.
        destination: global rank that receives.
        group: process group for the tensors, of this channel alone.
        headers: process group on the CPU for what describes them, of this channel alone.
        device: where the tensors are.
        depth: number of messages that may wait on either side.
        timeout: longest time to wait for the other side, in seconds.
        peer: the other side as errors call it.
        num_notes: whole numbers that travel with each message.
        waits: counts the time that this side waits for the other one.
    """

    def __init__(
        self,
        source: int,
        destination: int,
        *,
        group: dist.ProcessGroup,
        headers: dist.ProcessGroup,
        device: torch.device,
        depth: int,
        timeout: float,
        peer: str,
        num_notes: int = 0,
        waits: Waits | None = None,
    ) -> None:
        self._source, self._destination, self._group, self._headers = source, destination, group, headers
        self._device, self._depth, self._timeout, self._peer = device, depth, timeout, peer
        self._num_notes, self._waits = num_notes, Waits() if waits is None else waits
        self._limit = timedelta(seconds=timeout)
        self.num_bytes = 0  # of tensors, sent so far
        self._on_their_way: deque[list[tuple[Any, Tensor]]] = deque()
        self._numbers: dict[bytes, int] = {}
        self._expected: dict[tuple[_Layout, ...], int] = {}  # both sides find the same, in the same order
        self._thread: threading.Thread | None = None
        self._room = threading.Semaphore(depth)
        self._arrived: queue.SimpleQueue[Any] = queue.SimpleQueue()
        if dist.get_rank() == destination:
            self._thread = threading.Thread(target=self._listen, name=f"from {peer}", daemon=True)
            self._thread.start()

    def send(
        self, kind: int, tensors: Sequence[Tensor] = (), *, flag: int = 0, extra: Any = None, notes: Sequence[int] = ()
    ) -> None:
        """Send tensors; they must not be written to afterwards. Notes that are not given are 0."""
        layouts = [_Layout.of(tensor) for tensor in tensors]
        description = pickle.dumps((extra, layouts))
        known = description in self._numbers
        if not known and len(self._numbers) < _MOST_KNOWN:
            self._numbers[description] = len(self._numbers)
        number = self._numbers.get(description, -1)  # -1: to be forgotten
        rest = [0] * (self._num_notes - len(notes))
        header = torch.tensor([kind, flag, number, 0 if known else len(description), *notes, *rest])
        with watched(self._peer, self._timeout):
            with self._waits.clock():
                while len(self._on_their_way) >= self._depth:
                    self._finish_oldest()
            works = [self._isend(header, _HEADER, self._headers)]
            if not known:
                block = torch.frombuffer(bytearray(description), dtype=torch.uint8)
                works.append(self._isend(block, _DESCRIPTION, self._headers))
            tag = self._tag(tuple(layouts))
            for layout, tensor in zip(layouts, tensors, strict=True):
                block = layout.pack(tensor.detach())
                self.num_bytes += block.nbytes
                if block.numel():
                    works.append(self._isend(block, tag, self._group))
            if kind == CLOSE:  # memory that still waits gets a byte
                byte = torch.zeros(1, dtype=torch.uint8)
                for expected, tag in self._expected.items():
                    works += [self._isend(byte, tag, self._group) for layout in expected if not layout.empty]
        self._on_their_way.append(works)

    def receive(self, kind: int) -> Message:
        """The next message, which must be of this kind."""
        self._waits.queued += self._arrived.qsize()
        with self._waits.clock(), watched(self._peer, self._timeout):
            arrived = self._arrived.get(timeout=self._timeout)
            if isinstance(arrived, BaseException):
                raise arrived
            message, works, layouts = arrived
            for work in works:
                self._await(work)
        self._room.release()
        if message.kind != kind:
            raise RuntimeError(
                f"{self._peer} is at another step (its message is of kind {message.kind}, expected was {kind}): call "
                "the same steps in the same order on every rank"
            )
        tensors = [layout.unpack(block) for layout, block in zip(layouts, message.tensors, strict=True)]
        return replace(message, tensors=tensors)

    def close(self) -> None:
        """Send what is on its way, and end the other side's thread; both sides have to call it."""
        if self._thread is None:
            self.send(CLOSE)
            with watched(self._peer, self._timeout):
                while self._on_their_way:
                    self._finish_oldest()
        elif self._thread.is_alive():
            self.receive(CLOSE)
            self._thread.join(self._timeout)

    def _tag(self, layouts: tuple[_Layout, ...]) -> int:
        """Of tensors of such layouts: when they come again one of their own, if few others have one."""
        if layouts in self._expected:
            return self._expected[layouts]
        fits = len(self._expected) < _MOST_EXPECTED and self._device.type == "cpu"
        if fits and not all(layout.empty for layout in layouts):
            self._expected[layouts] = _EXPECTED + len(self._expected)
        return _PAYLOAD

    def _isend(self, block: Tensor, tag: int, group: dist.ProcessGroup) -> tuple[Any, Tensor]:
        return dist.isend(block, self._destination, group=group, tag=tag), block

    def _finish_oldest(self) -> None:
        for work, block in self._on_their_way.popleft():
            if block.device.type == "cpu":
                work.wait(self._limit)
            else:
                self._await(work)

    def _await(self, work: Any) -> None:
        """Have what follows come after it: on the CPU by waiting here, on a device by having its stream wait.

        With a limit NCCL would have this thread wait for the device, and nothing would overlap; of a peer that is gone
        its own watchdog tells, after the timeout of the group.
        """
        if self._device.type == "cuda":
            work.wait()
        else:
            work.wait(self._limit)

    def _listen(self) -> None:
        """Take headers, and have tensors written into memory, until the channel is closed."""
        descriptions: list[tuple[Any, list[_Layout]]] = []
        waiting: dict[tuple[_Layout, ...], tuple[list[Tensor], list[Any]]] = {}
        try:
            while True:
                self._room.acquire()
                header = self._take(4 + self._num_notes, torch.int64, _HEADER).tolist()
                (kind, flag, number, length), notes = header[:4], header[4:]
                if length:
                    # Our own ranks, who could as well send us weights of their choice, are the ones who wrote it.
                    new = pickle.loads(self._take(length, torch.uint8, _DESCRIPTION).numpy().tobytes())
                    descriptions += [new] if number >= 0 else []
                extra, layouts = descriptions[number] if number >= 0 else new
                key = tuple(layouts)
                tag = self._tag(key)
                blocks, works = waiting.pop(key) if key in waiting else self._irecv(key, tag)
                if key in self._expected:
                    waiting[key] = self._irecv(key, self._expected[key])
                if kind == CLOSE:
                    for _, others in waiting.values():
                        for work in others:
                            work.wait(self._limit)
                self._arrived.put((Message(kind, flag, blocks, extra, notes), works, layouts))
                if kind == CLOSE:
                    return
        except BaseException as error:
            self._arrived.put(error)

    def _irecv(self, layouts: Sequence[_Layout], tag: int) -> tuple[list[Tensor], list[Any]]:
        """Memory for tensors of such layouts, and what writes into it."""
        blocks = [layout.allocate(self._device) for layout in layouts]
        works = [dist.irecv(block, self._source, group=self._group, tag=tag) for block in blocks if block.numel()]
        return blocks, works

    def _take(self, length: int, dtype: torch.dtype, tag: int) -> Tensor:
        block = torch.empty(length, dtype=dtype)
        # How long nobody sends anything is no matter here: only who waits for a message is impatient.
        work: Any = dist.irecv(block, self._source, group=self._headers, tag=tag)
        work.wait(_FOR_EVER)
        return block
