"""A process at its edges: it goes on when nobody reads what it says, and ends with the one that started it."""

from __future__ import annotations

import contextlib
import errno
import os
import signal
import sys
import threading
import time
from collections.abc import Callable, Iterator
from types import FrameType
from typing import Any, TextIO, cast

__all__ = ["STOPPING", "end_with_parent", "on_signals", "unbroken_streams"]

# What asks a process to leave, on systems that have it: Ctrl-C, a scheduler, a terminal that is closed, a warning that
# time is up.
STOPPING = tuple(getattr(signal, name) for name in ("SIGINT", "SIGTERM", "SIGHUP", "SIGUSR1") if hasattr(signal, name))
_GONE = (errno.EPIPE, errno.EIO, errno.EBADF)  # of a pipe that is closed (`| head -1`), of a terminal that is gone
_LOOK_EVERY = 0.5  # seconds
_TO_SAVE = 30.0  # seconds


class _Unbroken:
    """A stream whose reader may leave: what is written from then on is dropped."""

    def __init__(self, stream: TextIO) -> None:
        self._stream = stream

    def write(self, text: str) -> int:
        try:
            return self._stream.write(text)
        except OSError as error:
            self._drop(error)
            return len(text)

    def flush(self) -> None:
        try:
            self._stream.flush()
        except OSError as error:
            self._drop(error)

    def _drop(self, error: OSError) -> None:
        if error.errno not in _GONE:
            raise error
        nowhere = os.open(os.devnull, os.O_WRONLY)  # also for what is still in the buffer
        with contextlib.suppress(OSError, ValueError):
            os.dup2(nowhere, self._stream.fileno())
        os.close(nowhere)

    def __getattr__(self, name: str) -> Any:
        return getattr(self._stream, name)


@contextlib.contextmanager
def unbroken_streams() -> Iterator[None]:
    """Go on with the work when a reader of the standard output or error stream has left."""
    streams = {name: getattr(sys, name) for name in ("stdout", "stderr")}
    proxies = {name: _Unbroken(stream) for name, stream in streams.items() if stream is not None}
    for name, proxy in proxies.items():
        setattr(sys, name, cast(TextIO, proxy))
    try:
        yield
    finally:
        for name, proxy in proxies.items():
            with contextlib.suppress(ValueError):  # closed by somebody
                proxy.flush()
            if getattr(sys, name) is proxy:
                setattr(sys, name, streams[name])


@contextlib.contextmanager
def on_signals(handle: Callable[[signal.Signals], None], *, once: bool = False) -> Iterator[None]:
    """Hand what asks the process to leave to a function; nothing in threads other than the main one, which has signals.

    Args:
        handle: called with the signal.
        once: with the first signal only: the next one acts as if nobody had listened.
    """
    previous: dict[signal.Signals, Any] = {}

    def restore() -> None:
        while previous:
            signum, handler = previous.popitem()
            signal.signal(signum, signal.SIG_DFL if handler is None else handler)

    def receive(signum: int, frame: FrameType | None) -> None:
        if once:
            restore()
        handle(signal.Signals(signum))

    if threading.current_thread() is threading.main_thread():
        for signum in STOPPING:
            if signal.getsignal(signum) is not signal.SIG_IGN:  # ignored on purpose, as under nohup
                previous[signum] = signal.signal(signum, receive)
    try:
        yield
    finally:
        restore()


def end_with_parent(parent: int | None = None) -> None:
    """Ask this process to leave, as SIGTERM does, once the process that started it is gone, and see that it does.

    A launcher that is killed cannot tell its ranks, which would train on with nobody to stop them.

    Args:
        parent: process that started this one; None: the one that is the parent now.
    """
    first = os.getppid() if parent is None else parent

    def watch() -> None:
        while os.getppid() == first:
            time.sleep(_LOOK_EVERY)
        os.kill(os.getpid(), signal.SIGTERM)
        time.sleep(_TO_SAVE)
        os._exit(128 + signal.SIGTERM)

    threading.Thread(target=watch, name="watch of the parent", daemon=True).start()
