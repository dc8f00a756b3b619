"""The folder of a run or a comparison: it has one owner, as long as that process lives."""

from __future__ import annotations

import contextlib
import json
import os
import re
import socket
import time
import uuid
import warnings
import weakref
from collections.abc import Sequence
from pathlib import Path
from types import TracebackType
from typing import Any

try:
    import fcntl
except ImportError:  # Windows
    fcntl = None  # type: ignore[assignment]

__all__ = ["Owned", "Ownership", "expand", "temporary_name"]

_LOCK = ".lock"
_TEMPORARY = re.compile(r"\..+\.[0-9a-f]{32}\.tmp")
_MOST_TRIES = 100  # to make a folder that others remove at the same time
_WAIT = 0.05  # seconds between two attempts
_held: weakref.WeakSet[Ownership] = weakref.WeakSet()


def expand(path: str | Path) -> Path:
    """A path with the home folder in place of `~`.

    Raises:
        ValueError: there is no such user.
    """
    try:
        return Path(path).expanduser()
    except RuntimeError as error:
        user = Path(path).parts[0]
        raise ValueError(f"{path}: there is no user {user[1:]!r}: write ./{path} for a folder of that name") from error


def temporary_name(path: Path) -> Path:
    """A unique hidden name beside a file, under which its next version is written before it is renamed."""
    return path.with_name(f".{path.name}.{uuid.uuid4().hex}.tmp")


class Owned(ValueError):
    """Another process writes into the folder."""


class Ownership:
    """The sole right to write into a folder, which is made; it ends with the process, however that ends.

    The lock is the kernel's (flock) on a file in the folder, so nothing is left to clean up after a process that was
    killed, and it holds among the machines that share a file system which locks across them. What a killed owner has
    left half written is removed.

    Args:
        folder: the folder.
        given: what the user calls it, for errors.
        patience: seconds to wait for another owner to leave.
        inside: folders in it that only its owner writes to.

    Raises:
        Owned: by another process.
        ValueError: it cannot be made.
        OSError: it cannot be written to.
    """

    def __init__(self, folder: Path, given: str, *, patience: float = 0.0, inside: Sequence[str] = ()) -> None:
        self._folder, self._given = folder, given
        self._made: list[Path] = []
        self._file: int | None = None
        end = time.monotonic() + patience
        try:
            while not self._acquire():
                if time.monotonic() >= end:
                    raise Owned(
                        f"out={given!r} is being written by {_told(folder / _LOCK)}: wait until it has ended, stop it, "
                        "or choose another out"
                    )
                time.sleep(_WAIT)
        except BaseException:
            self._remove_made()
            raise
        _held.add(self)
        for path in (path for place in (".", *inside) for path in (folder / place).glob(".*")):
            if _TEMPORARY.fullmatch(path.name):
                with contextlib.suppress(OSError):
                    path.unlink()

    def _acquire(self) -> bool:
        """Whether the folder is now ours."""
        self._make()
        path = self._folder / _LOCK
        try:
            file = os.open(path, os.O_RDWR | os.O_CREAT, 0o666)
        except FileNotFoundError:  # another owner has just left and taken the empty folder along
            return False
        except OSError as error:
            raise OSError(
                f"{self._folder} cannot be written to ({error.strerror}): see who may, or choose another out"
            ) from error
        try:
            if not _lock(file, path):
                os.close(file)
                return False
            owner = {"host": socket.gethostname(), "pid": os.getpid(), "start": time.strftime("%Y-%m-%d %H:%M:%S")}
            with contextlib.suppress(OSError):  # a full disk; that it is locked is what matters
                os.ftruncate(file, 0)
                os.write(file, json.dumps(owner).encode())
        except BaseException:
            with contextlib.suppress(OSError):
                os.close(file)
            raise
        self._file = file
        return True

    def _make(self) -> None:
        for left in reversed(range(_MOST_TRIES)):
            missing = [path for path in (self._folder, *self._folder.parents) if not path.exists()]
            try:
                self._folder.mkdir(parents=True, exist_ok=True)
                break
            except OSError as error:
                # An owner who leaves takes empty folders along, one after another, also while these are made.
                if not left or not isinstance(error, FileNotFoundError):
                    raise ValueError(
                        f"out={self._given!r} cannot be made a folder ({error.strerror}): choose another"
                    ) from error
        self._made = missing or self._made

    def _remove_made(self) -> None:
        """Remove the folders that were made for nothing."""
        for path in self._made:
            try:
                path.rmdir()
            except OSError:  # not empty: it serves
                break

    def release(self) -> None:
        """Give the folder back."""
        if self._file is None:
            return
        _held.discard(self)
        with contextlib.suppress(OSError):
            (self._folder / _LOCK).unlink()  # while it is ours; who waits sees that its name is gone
        with contextlib.suppress(OSError):
            os.close(self._file)
        self._file = None
        self._remove_made()

    def __enter__(self) -> Ownership:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.release()

    def _forget(self) -> None:
        """Close the lock in a process forked from the owner, which would else hold it after the owner's end."""
        if self._file is not None:
            os.close(self._file)
            self._file = None


def _lock(file: int, path: Path) -> bool:
    """Whether the file is locked, and still the one that has the name."""
    if fcntl is None:
        return True
    try:
        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        return False
    except OSError as error:
        warnings.warn(
            f"{path.parent} has no locks ({error.strerror}): see that no other process writes there",
            stacklevel=5,
        )
        return True
    try:
        return os.path.samestat(os.fstat(file), os.stat(path))
    except FileNotFoundError:
        return False


def _told(path: Path) -> str:
    """Who holds a lock, as far as its file says."""
    try:
        owner: dict[str, Any] = json.loads(path.read_text())
        return f"process {owner['pid']} on {owner['host']}, since {owner['start']}"
    except (OSError, ValueError, KeyError, TypeError):
        return "another process"


def _forget_all() -> None:
    for ownership in list(_held):
        ownership._forget()
    _held.clear()


if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=_forget_all)
