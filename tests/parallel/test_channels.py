"""Messages from one rank to another, in order, whatever their tensors look like."""

from __future__ import annotations

import itertools
import random
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from processes import Pool
from torch import Tensor

from torchlocal.parallel import channels
from torchlocal.parallel.channels import Channel

LAYOUTS: list[list[tuple[int, ...]]] = [
    [(5, 3)], [(5, 3), (0, 2), (7,)], [(0,)], [], [(2, 2)], [(3, 1, 2), (3, 1, 2)], [(300, 200)],
]  # fmt: skip


def make(order: list[int]) -> list[list[Tensor]]:
    """Messages, no number in which comes twice."""
    counter = itertools.count()
    found = []
    for which in order:
        tensors = [torch.full(shape, float(next(counter))) for shape in LAYOUTS[which]]
        found.append([tensor.transpose(0, -1) if which == 5 else tensor for tensor in tensors])
    return found


def channel(group: Any, headers: Any) -> Channel:
    return Channel(0, 1, group=group, headers=headers, device=torch.device("cpu"), depth=3, timeout=30, peer="a rank")


def exchange(orders: list[list[int]]) -> int:
    """Send messages through one channel after another, all of the same groups; tells how many arrived as they were."""
    groups = [dist.new_group(range(2), backend="gloo") for _ in range(2)]
    same = 0
    for order in orders:
        one, messages = channel(*groups), make(order)
        for number, tensors in enumerate(messages):
            if dist.get_rank() == 0:
                one.send(1 + number % 2, tensors, flag=number)
            else:
                message = one.receive(1 + number % 2)
                same += message.flag == number and len(message.tensors) == len(tensors)
                assert all(torch.equal(a, b) for a, b in zip(message.tensors, tensors, strict=True))
        one.close()
    return same


def test_messages_of_many_layouts_arrive_in_order(pool: Pool, tmp_path: Path) -> None:
    generator = random.Random(0)
    orders = [[generator.randrange(len(LAYOUTS)) for _ in range(count)] for count in (60, 1, 30, 0, 2)]
    assert pool.run(2, tmp_path, exchange, orders) == [0, 93]


def awaited(order: list[int]) -> list[int]:
    """Send messages one at a time; how many receives the destination has begun before each is sent, headers aside."""
    groups, begun, real, found = [dist.new_group(range(2), backend="gloo") for _ in range(2)], [], dist.irecv, []

    def irecv(block: Tensor, *arguments: Any, tag: int = 0, **options: Any) -> Any:
        begun.append(tag)
        return real(block, *arguments, tag=tag, **options)

    dist.irecv = irecv
    try:
        one, taken = channel(*groups), 0
        for tensors in make(order):
            dist.barrier()
            found.append(len([tag for tag in begun if tag not in (channels._HEADER, channels._DESCRIPTION)]) - taken)
            dist.barrier()
            if dist.get_rank() == 0:
                one.send(1, tensors)
            else:
                taken += len([tensor for tensor in one.receive(1).tensors if tensor.numel()])
        one.close()
    finally:
        dist.irecv = real
    return found


def test_memory_waits_for_tensors_that_come_again(pool: Pool, tmp_path: Path) -> None:
    """Of the first two layouts, which have one tensor and two that hold something; not of the third."""
    assert pool.run(2, tmp_path, awaited, [0, 0, 1, 2, 0, 4, 4, 1])[1] == [0, 1, 1, 3, 3, 3, 3, 3]


def test_one_layout_after_another_takes_no_more_memory(pool: Pool, tmp_path: Path) -> None:
    order = [number % len(LAYOUTS) for number in range(40)]
    assert max(pool.run(2, tmp_path, awaited, order)[1]) == 3
