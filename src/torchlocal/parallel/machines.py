"""Several machines meet before any of them starts its ranks, so that whoever is missing or different is named."""

from __future__ import annotations

import contextlib
import json
import os
import platform
import select
import socket
import sys
import time
from dataclasses import dataclass
from importlib import metadata
from typing import Any

from .channels import PeerLost
from .meet import misleads

__all__ = ["Machines", "roll_call"]

_SOON = 3.0  # seconds, after which it is told for whom we wait
_AGAIN = 0.5  # seconds between two tries
_MOST = 4096  # bytes of what a machine says


@dataclass(frozen=True, kw_only=True)
class Machines:
    """The machines of a run, each of which starts the same command.

    Attributes:
        count: how many.
        number: this one's, from 0.
        host: an address of the first one, by which the others reach it.
        port: a free TCP port there.
    """

    count: int
    number: int
    host: str
    port: int

    @classmethod
    def of(cls, count: int, number: int, meet: str | None) -> Machines:
        """As it is given on the command line.

        Raises:
            ValueError: it cannot be.
        """
        if count < 1 or not 0 <= number < count:
            raise ValueError(f"--machine {number} must be from 0 to {count - 1}, since --machines is {count}")
        host, _, port = (meet or "").rpartition(":")
        host = host.removeprefix("[").removesuffix("]")
        if not host or not port.isdecimal() or not 0 < int(port) < 65536:
            raise ValueError(
                f"--meet {meet}: give an address of machine 0 and a TCP port that is free there, such as 10.0.0.1:29500"
            )
        return cls(count=count, number=number, host=host, port=int(port))

    @property
    def place(self) -> str:
        """Where they meet."""
        return f"{self.host}:{self.port}"


def roll_call(machines: Machines, num_ranks: int, timeout: float) -> None:
    """Wait for all machines, and see whether they are of one mind.

    Args:
        machines: who meets where.
        num_ranks: of the whole run.
        timeout: longest time to wait, in seconds.

    Raises:
        ValueError: the place is no good, or the machines differ, on all of them.
        PeerLost: a machine has not come.
    """
    own = {"machine": machines.number, "machines": machines.count, "ranks": num_ranks, **_versions()}
    end = time.monotonic() + timeout
    if machines.number:
        _come(machines, own, end, timeout)
    else:
        _wait_for_all(machines, own, end, timeout)


def _versions() -> dict[str, str]:
    found = {"python": platform.python_version()}
    for name in ("torch", "torchlocal"):
        with contextlib.suppress(metadata.PackageNotFoundError):
            found[name] = metadata.version(name)
    return found


def _wait_for_all(machines: Machines, own: dict[str, Any], end: float, timeout: float) -> None:
    with _listen(machines) as listening, contextlib.ExitStack() as open_:
        here: dict[int, socket.socket] = {}
        told = time.monotonic() + _SOON
        while len(here) < machines.count - 1:
            missing = min(set(range(1, machines.count)) - set(here))
            if time.monotonic() > end:
                sentence = (
                    f"machine {missing} has not come to {machines.place} for {timeout:g} s: start the same command "
                    f"there with --machine {missing}, and have the firewall here let it through"
                )
                _answer(here, sentence)
                raise PeerLost(sentence)
            if time.monotonic() > told:
                told = end + 1
                _tell(f"waiting at {machines.place} for machine {missing} of {machines.count} (from 0)")
            if not select.select([listening], [], [], _AGAIN)[0]:
                continue
            connection, (address, *_) = listening.accept()
            open_.enter_context(connection)
            theirs = _hear(connection, 5.0)
            if theirs is None:  # someone else, such as a port scanner
                continue
            if sentence := _difference(own, theirs, here, address):
                _answer({**here, -1: connection}, sentence)
                raise ValueError(sentence)
            here[theirs["machine"]] = connection
        _answer(here, "")


def _listen(machines: Machines) -> socket.socket:
    try:
        family, _, _, _, place = socket.getaddrinfo(machines.host, machines.port, type=socket.SOCK_STREAM)[0]
    except OSError as error:
        raise ValueError(_unknown(machines, error)) from error
    if misleads(machines.host, str(place[0])):
        raise ValueError(
            f"--meet {machines.place}: {machines.host} is {place[0]} on this machine, where no other finds it; give "
            "its address in the network"
        )
    try:
        return socket.create_server(place[:2], family=family, backlog=128)
    except OSError as error:
        why = os.strerror(error.errno or 0)
        raise ValueError(
            f"--meet {machines.place}: machine 0, this one, cannot listen there ({why}); give one of its own addresses "
            "and a port that is free"
        ) from error


def _difference(own: dict[str, Any], theirs: dict[str, Any], here: dict[int, socket.socket], address: str) -> str:
    """What another machine has that does not fit, in a sentence."""
    number = theirs.get("machine")
    for name, value in own.items():
        if name != "machine" and theirs.get(name) != value:
            return (
                f"{name} is {theirs.get(name)} on machine {number} ({address}) and {value} on machine 0: give the same "
                "on all machines"
            )
    if not isinstance(number, int) or not 0 < number < own["machines"] or number in here:
        return f"{address} comes as machine {number}, which is another one: give every machine its own --machine"
    return ""


def _come(machines: Machines, own: dict[str, Any], end: float, timeout: float) -> None:
    told, last = time.monotonic() + _SOON, "no answer"
    while True:
        try:
            with socket.create_connection((machines.host, machines.port), timeout=5) as connection:
                connection.sendall(json.dumps(own).encode() + b"\n")
                answer = _hear(connection, max(0.1, end - time.monotonic()))
        except socket.gaierror as error:
            raise ValueError(_unknown(machines, error)) from error
        except OSError as error:
            last = "no answer: another address, or a firewall?" if isinstance(error, TimeoutError) else _reason(error)
        else:
            if answer is None:
                raise PeerLost(f"machine 0 at {machines.place} has gone: see what it said last")
            if answer.get("error"):
                raise ValueError(answer["error"])
            return
        if time.monotonic() > end:
            raise PeerLost(f"machine 0 cannot be reached at {machines.place} for {timeout:g} s ({last})")
        if time.monotonic() > told:
            told = end + 1
            _tell(f"waiting for machine 0 at {machines.place} ({last})")
        time.sleep(_AGAIN)


def _reason(error: OSError) -> str:
    if isinstance(error, ConnectionRefusedError):
        return "connection refused: not started yet, or at another port?"
    return error.strerror or type(error).__name__


def _unknown(machines: Machines, error: OSError) -> str:
    return f"--meet {machines.place}: no machine of the name {machines.host} is known here ({error.strerror})"


def _hear(connection: socket.socket, seconds: float) -> dict[str, Any] | None:
    """One line of JSON; None if that is not what comes."""
    connection.settimeout(seconds)
    said = b""
    try:
        while not said.endswith(b"\n") and len(said) < _MOST and (part := connection.recv(_MOST)):
            said += part
        found = json.loads(said)
    except (OSError, ValueError):
        return None
    return found if isinstance(found, dict) else None


def _answer(here: dict[int, socket.socket], sentence: str) -> None:
    for connection in here.values():
        with contextlib.suppress(OSError):
            connection.sendall(json.dumps({"error": sentence}).encode() + b"\n")


def _tell(text: str) -> None:
    print(f"torchlocal: {text}", file=sys.stderr, flush=True)
