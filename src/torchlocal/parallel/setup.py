"""Sharing the local modules out over the ranks."""

from __future__ import annotations

import hashlib
from collections.abc import Mapping, Sequence
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn

from ..boundary import check_boundary, encoded_bytes
from ..checks import check_whole, parse_link
from ..cut.batches import Batch, device_of, plain
from ..cut.units import balance
from ..modules import LocalModules
from .network import ParallelNetwork
from .rehearsal import count_flops, measure_seconds, rehearse
from .shares import shared_buffer

__all__ = ["assign", "check_same", "distribute", "round_boundaries", "sending_seconds"]


_CARRY = (
    'carry: a network that was decoupled with carry="collect" hands gradients back across its cuts, which several '
    "ranks cannot; cut elsewhere, or use one rank per replica"
)


def assign(costs: Sequence[float], num_stages: int, sending: Sequence[float] | None = None) -> list[range]:
    """Consecutive local modules for every stage, so that the slowest of the stages, and of the links, costs least.

    A stage computes while it sends, so it costs the larger of what its modules cost together and of what it costs to
    send what its last one hands on. Where a link is the slowest, stages that are shared out as evenly as can be beside
    it leave each of them the most time to spare.

    Args:
        costs: of each of the K local modules, in any unit: seconds, FLOPs.
        num_stages: number of stages, at most K.
        sending: of each but the last, what it costs to send what it hands on, in the same unit; None: nothing.

    Returns:
        One range of local modules per stage.

    Raises:
        ValueError: there are more stages than local modules.
    """
    if not 1 <= num_stages <= len(costs):
        raise ValueError(
            f"ranks: {num_stages} processes cannot share {len(costs)} local modules, of which each needs at least one; "
            "start fewer, or cut the network into more"
        )

    def computing(first: int, last: int) -> float:
        return sum(costs[first:last])

    def price(first: int, last: int) -> float:
        return max(computing(first, last), sending[last - 1] if sending is not None and last < len(costs) else 0.0)

    return balance(len(costs), num_stages, price, squared=computing)


def sending_seconds(num_bytes: int, link: str | float, in_flight: int = 4) -> float:
    """Seconds between two messages of a size over a link: max(V/B, (3L + V/B)/F).

    gloo asks before it sends, which takes the latency L three times, and F messages are on their way at once.

    Args:
        num_bytes: size V of a message.
        link: as in :func:`distribute`; its bytes per second are B, its one-way delay is L.
        in_flight: number F of messages that are on their way at once.
    """
    bits, delay = parse_link(link)
    seconds = 8 * num_bytes / bits
    return max(seconds, (3 * delay + seconds) / in_flight)


def round_boundaries(net: LocalModules, boundary: str, *, assignment: Sequence[int]) -> None:
    """Have one process train as so many stages would that send each other ``boundary``: the same numbers, bit for bit.

    Features, and in guided steps their gradients, are rounded where a stage would end (``net.boundaries``); those of
    evaluation are not.

    Args:
        net: the network.
        boundary: ``"bf16"``, ``"int8"`` or ``"int4"``, as in :func:`distribute`.
        assignment: how many local modules each stage has.

    Raises:
        ValueError: an argument is wrong, or the network cannot be shared out to several ranks.
    """
    check_boundary("boundary", boundary)
    stages = _assigned(net, assignment, len(assignment))
    if net.carry is not None:
        raise ValueError(_CARRY)
    groups = net.partition.groups
    net.boundaries = {groups[stage.start].start: boundary for stage in stages[1:]}


def check_same(values: Mapping[str, Any]) -> None:
    """Refuse to go on, on all ranks, if these values are not the same on all ranks of the default group.

    Args:
        values: anything that can be pickled and compared, by name.

    Raises:
        ValueError: naming the first rank and the value that differ from rank 0's.
    """
    gathered: list[Any] = [None] * dist.get_world_size()
    dist.all_gather_object(gathered, dict(values))
    for rank, theirs in enumerate(gathered):
        for name in dict.fromkeys([*gathered[0], *theirs]):
            here, there = gathered[0].get(name), theirs.get(name)
            if here != there:
                raise ValueError(
                    f"{name} is {_short(there)} on rank {rank} and {_short(here)} on rank 0: start all ranks with the "
                    "same configuration, seed and code"
                )


def distribute(
    net: LocalModules,
    *,
    replicas: int = 1,
    assignment: str | Sequence[int] = "flops",
    sample: tuple[Batch, Any] | None = None,
    autocast: torch.dtype | None = None,
    boundary: str | None = None,
    link: str | float | None = None,
    in_flight: int = 4,
    timeout: float = 300.0,
) -> ParallelNetwork:
    """Give each of the processes that torchrun started some of the local modules.

    Called on every rank, each of which has built the same network with the same weights. The ranks form a mesh of
    ``replicas`` rows; the ranks of a row are its stages and hold consecutive local modules, those of a column hold the
    same modules and average their gradients.

    Local steps run as a one-way pipeline: a stage receives the features of the stage before it, trains its modules
    and hands their features on, so that no stage waits for a later one and the parameters are those of a single
    process, bit for bit. All ranks call the same steps in the same order; only the first stage is given batches, whose
    tensors must not be written to afterwards, since they may still be on their way. Of what a batch holds, integers and
    masks travel along, and those floating-point tensors that later modules read.

    Where modules of several ranks use the same parameter (a tied embedding), the rank of the last of them updates it,
    and those before wait for its new value at the beginning of every step, so they do not run ahead: give such modules
    to one rank with ``assignment``, or untie them, for speed.

    Args:
        net: the network, on the device of this rank, the same on every rank.
        replicas: number D of data-parallel rows; the number of ranks must be a multiple of it.
        assignment: ``"flops"``: local modules are balanced over the stages by FLOPs; ``"time"``: by the measured time
            of a local step on ``sample``; or how many local modules each stage gets.
        sample: for ``"time"``, a batch and its target; only rank 0 has to give it.
        autocast: for ``"time"``, the option that the steps will be given.
        boundary: what features and their gradients are sent in: ``"bf16"``, ``"int8"`` or ``"int4"`` (see
            :mod:`torchlocal.boundary`); None: as they are. The results are those of a single process that rounds them
            in the same way (:func:`round_boundaries`).
        link: for ``"time"``, what lies between two stages, such as ``"100mbit"`` or ``"1gbit+20ms"`` (one way), or bits
            per second: local modules are shared out so that the slowest of the stages and of the links is as fast as
            can be. By default sending takes no time.
        in_flight: batches that may wait on either side of a link between two stages.
        timeout: longest time in seconds that a rank waits for another one.

    Returns:
        What to call the steps of.

    Raises:
        ValueError: the ranks are not of one mind, or an argument is wrong.
    """
    if not dist.is_available() or not dist.is_initialized():
        raise ValueError("distribute: torch.distributed is not initialised; call init_process_group() first")
    world = dist.get_world_size()
    if isinstance(replicas, bool) or not isinstance(replicas, int) or replicas < 1 or world % replicas:
        raise ValueError(
            f"replicas: {world} ranks cannot be {replicas!r} rows of equal length; give a divisor of {world}"
        )
    check_whole("in_flight", in_flight)
    check_boundary("boundary", boundary)
    if link is not None:
        parse_link(link)
        if assignment != "time":
            raise ValueError("link: only assignment='time' weighs it; give that, or leave link out")
    if net.boundaries:
        raise ValueError(
            "boundary: the network rounds its boundaries in one process; set its attribute boundaries to {} first"
        )
    if not timeout > 0:
        raise ValueError(f"timeout: must be a number of seconds above 0, not {timeout!r}")
    num_stages = world // replicas
    if net.rule.reads_next_module and num_stages > 1:
        raise ValueError(
            f"rule: {net.rule!r} reads the parameters of the module that follows, which may be on another rank; choose "
            "another rule, or one rank per replica"
        )
    if num_stages > 1:
        _refuse(net)
    check_same(
        {
            "torch": torch.__version__,
            "the network": [(name, tuple(t.shape), str(t.dtype)) for name, t in _tensors(net)],
            "the list of local modules": [(g.start, g.stop) for g in net.partition.groups],
            "rule": f"{type(net.rule).__name__} {net.rule!r}"
            if "0x" not in repr(net.rule)
            else type(net.rule).__name__,
            "replicas": replicas,
            "assignment": assignment if isinstance(assignment, str) else list(assignment),
            "boundary": boundary,
            "link": link,
            "in_flight": in_flight,
            "timeout": timeout,
            "the checksum of the weights": _checksum(net),
        }
    )
    stages: list[range]
    costs: list[float] | None = None
    if isinstance(assignment, str):
        found: list[Any] = [None]
        if dist.get_rank() == 0:
            try:
                costs = _costs(net, assignment, sample, autocast)
                sending = None
                if link is not None and sample is not None:
                    sending = _sending(net, *sample, autocast, boundary, link, in_flight)
                found = [(assign(costs, num_stages, sending), costs)]
            except ValueError as error:
                found = [error]
        dist.broadcast_object_list(found)
        if isinstance(found[0], ValueError):
            raise found[0]
        stages, costs = found[0]
    else:
        stages = _assigned(net, assignment, num_stages)
    if name := shared_buffer(net, stages):
        raise ValueError(
            f"assignment: local modules on several ranks use the buffer {name!r}, which the forward writes; put them "
            "on one rank with assignment="
        )
    return ParallelNetwork(net, stages, replicas, costs=costs, boundary=boundary, in_flight=in_flight, timeout=timeout)


def _refuse(net: LocalModules) -> None:
    """Refuse what works in one process only."""
    facts, kind = net.chain.facts, type(net.backbone).__name__
    if net.carry is not None:
        raise ValueError(_CARRY)
    if facts.python:
        raise ValueError(
            f"model: {kind} draws from Python's or numpy's random generator in its forward, and a rank cannot tell "
            "what the modules of the others draw there; draw from torch's, or use one rank per replica"
        )
    if facts.loose:
        name = ".".join(part for part in facts.loose[0] if part)
        raise ValueError(
            f"model: code of {kind} between its units writes the buffer {name!r}, of which every rank would have "
            "another; write it in a submodule that belongs to one unit, or use one rank per replica"
        )


def _tensors(net: nn.Module) -> list[tuple[str, Tensor]]:
    return [(name, tensor) for name, tensor in net.state_dict().items() if isinstance(tensor, Tensor)]


def _checksum(net: nn.Module) -> str:
    digest = hashlib.sha256()
    for _, tensor in _tensors(net):
        digest.update(tensor.detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy().tobytes())
    return digest.hexdigest()


def _costs(
    net: LocalModules, assignment: str, sample: tuple[Batch, Any] | None, autocast: torch.dtype | None
) -> list[float]:
    if assignment == "flops":
        return count_flops(net)
    if assignment != "time":
        raise ValueError(f"assignment: must be 'flops', 'time' or a list of numbers, not {assignment!r}")
    if sample is None:
        raise ValueError("sample: assignment='time' needs a batch and its target on rank 0")
    return measure_seconds(net, *sample, autocast=autocast)


def _assigned(net: LocalModules, counts: Sequence[int], num_stages: int) -> list[range]:
    """The local modules of every stage, of their numbers."""
    if len(counts) != num_stages or sum(counts) != net.num_modules or min(counts) < 1:
        raise ValueError(
            f"assignment: {list(counts)} does not give {net.num_modules} local modules to {num_stages} stages; "
            "give one number of at least 1 per stage that add up to it"
        )
    ends = [sum(counts[: i + 1]) for i in range(num_stages)]
    return [range(end - count, end) for end, count in zip(ends, counts, strict=True)]


def _sending(
    net: LocalModules,
    batch: Batch,
    target: Any,
    autocast: torch.dtype | None,
    boundary: str | None,
    link: str | float,
    in_flight: int,
) -> list[float]:
    """For each local module but the last, the seconds in which what it hands on crosses the link in a local step."""
    found = rehearse(net, plain(batch), target, device=device_of(batch, net.backbone), autocast=autocast)
    sizes = [encoded_bytes(features.numel(), boundary, features.dtype) for features in found.features[:-1]]
    return [sending_seconds(size, link, in_flight) for size in sizes]


def _short(value: Any) -> str:
    text = repr(value)
    return text if len(text) <= 60 else f"{text[:57]}..."
