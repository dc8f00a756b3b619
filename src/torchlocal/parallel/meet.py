"""Ranks of several machines see whether they can reach each other, before anything waits for a connection."""

from __future__ import annotations

import ipaddress
import json
import os
import socket
import struct
from datetime import timedelta
from pathlib import Path
from typing import Any

import torch.distributed as dist

try:
    import fcntl
except ImportError:  # Windows
    fcntl = None  # type: ignore[assignment]

from .channels import PeerLost

__all__ = ["addresses", "interface_to", "meet", "misleads", "way_to"]

_NAMED = "GLOO_SOCKET_IFNAME"  # the environment variable that says which interface gloo uses
_PATIENCE = 5.0  # seconds to wait for an answer of another machine, which is up: it has told us its address
_SIOCGIFADDR = 0x8915


def meet(store: dist.Store, rank: int, world: int, limit: timedelta) -> None:
    """Choose the network interface, and see whether all ranks can be reached, on every rank.

    gloo looks its own address up by the machine's name, which on many machines is one of the loopback interface, where
    no other machine finds it. Unless ``GLOO_SOCKET_IFNAME`` says otherwise, the interface that leads to ``MASTER_ADDR``
    is taken. Ranks of one machine only see whether the interface exists.

    Args:
        store: that all ranks have.
        rank: of this process.
        world: number of ranks.
        limit: longest time to wait for the others.

    Raises:
        ValueError: the interface of this rank is wrong.
        PeerLost: that of another one is, or ranks cannot reach each other; the same sentence everywhere.
    """
    own: dict[str, Any] = {"host": socket.gethostname(), "error": None}
    apart = int(os.environ.get("LOCAL_WORLD_SIZE", "0")) != world
    listening: socket.socket | None = None
    try:
        address = _choose(apart)
        if apart and address is not None:
            family = socket.AF_INET6 if ":" in address else socket.AF_INET
            listening = socket.create_server((address, 0), family=family, backlog=max(128, world))
            own |= {"address": address, "port": listening.getsockname()[1]}
    except ValueError as error:
        own["error"] = str(error)
    except OSError as error:
        own["error"] = f"{_NAMED}={os.environ.get(_NAMED)}: no rank can listen there ({error.strerror})"
    try:
        others = _exchange(store, "place", rank, world, own, limit)
        for number, other in enumerate(others):
            if other["error"] is not None:
                if number == rank:
                    raise ValueError(other["error"])
                raise PeerLost(f"rank {number} on {other['host']} cannot take part: {other['error']}")
        found = _exchange(store, "reach", rank, world, _unreached(others, rank), limit) if apart else []
    finally:
        if listening is not None:
            listening.close()
    for sentence in found:
        if sentence is not None:
            raise PeerLost(sentence)


def _choose(apart: bool) -> str | None:
    """Have gloo use the right interface; returns its address, if that is known."""
    known = addresses()
    if named := os.environ.get(_NAMED):
        for name in filter(None, named.split(",")):
            if known and name not in known:
                raise ValueError(
                    f"{_NAMED}={named}: this machine has no interface {name!r} with an address, it has "
                    f"{', '.join(known)}; give one of them, or leave it out"
                )
        return next(iter(known.get(named.split(",")[0], [])), None)
    host = os.environ.get("MASTER_ADDR", "localhost")
    if not apart:
        return None
    address = way_to(host)
    if address is not None and misleads(host, address):
        raise ValueError(
            f"the address {host} (MASTER_ADDR) is one of this machine's loopback ({address}), where no other machine "
            f"finds it: give the first machine's address in the network, or name the interface in {_NAMED}"
        )
    interface = interface_to(address) if address is not None else None
    if interface is not None:
        os.environ[_NAMED] = interface  # read whenever a group is made
    return address


def misleads(host: str, address: str) -> bool:
    """Whether a name stands for this machine's loopback interface, as its own name often does in /etc/hosts."""
    try:
        ipaddress.ip_address(host)  # given as such, it is meant: a trial on one machine
    except ValueError:
        return host != "localhost" and ipaddress.ip_address(address).is_loopback
    return False


def way_to(host: str) -> str | None:
    """The own address from which packets go to a host; no packet is sent. None: there is no way."""
    try:
        for family, kind, protocol, _, place in socket.getaddrinfo(host, 9, type=socket.SOCK_DGRAM):
            with socket.socket(family, kind, protocol) as probe:
                probe.connect(place)
                return str(probe.getsockname()[0])
    except OSError:
        pass
    return None


def interface_to(address: str) -> str | None:
    """The interface that has an address of this machine, if it can be told."""
    return next((name for name, found in addresses().items() if address in found), None)


def addresses() -> dict[str, list[str]]:
    """The addresses of this machine by interface, as far as Linux tells them."""
    found: dict[str, list[str]] = {}
    if fcntl is None:
        return found
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as probe:
        for _, name in socket.if_nameindex():
            try:
                answer = fcntl.ioctl(probe, _SIOCGIFADDR, struct.pack("256s", name.encode()[:15]))
            except OSError:  # it has none
                continue
            found.setdefault(name, []).append(socket.inet_ntoa(answer[20:24]))
    try:
        lines = Path("/proc/net/if_inet6").read_text().split("\n")
    except OSError:
        lines = []
    for number, *_, label in filter(None, map(str.split, lines)):
        found.setdefault(label, []).append(str(ipaddress.IPv6Address(bytes.fromhex(number))))
    return found


def _exchange(store: dist.Store, what: str, rank: int, world: int, own: Any, limit: timedelta) -> list[Any]:
    """What this is on every rank."""
    store.set(f"torchlocal/{what}/{rank}", json.dumps(own))
    names = [f"torchlocal/{what}/{other}" for other in range(world)]
    store.wait(names, limit)
    return [json.loads(store.get(name)) for name in names]


def _unreached(others: list[dict[str, Any]], rank: int) -> str | None:
    """The first machine that this rank cannot reach, in a sentence."""
    own, seen = others[rank], set()
    for number, other in enumerate(others):
        if "address" not in other or other["address"] in seen or other["host"] == own["host"]:
            continue
        seen.add(other["address"])
        try:
            socket.create_connection((other["address"], other["port"]), timeout=_PATIENCE).close()
        except OSError as error:
            why = "no answer" if isinstance(error, TimeoutError) else error.strerror
            return (
                f"rank {rank} on {own['host']} cannot reach rank {number} on {other['host']} at {other['address']} "
                f"({why}): have the firewall there let all TCP ports through from this machine, or name the "
                f"interface that leads here in {_NAMED}"
            )
    return None
