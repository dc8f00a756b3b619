"""Processes for tests that need several."""

from __future__ import annotations

import time
import traceback
from collections.abc import Callable
from datetime import timedelta
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist


def _serve(rank: int, connection: Any) -> None:
    """Do one job after another, each in a process group of its own."""
    torch.set_num_threads(1)
    while True:
        world, store, job, arguments = connection.recv()
        try:
            dist.init_process_group(
                "gloo",
                store=dist.FileStore(store, world),
                rank=rank,
                world_size=world,
                timeout=timedelta(seconds=60),
            )
            result = (True, job(*arguments))
        except BaseException as error:
            traceback.print_exc()
            result = (False, f"{type(error).__name__}: {error}")
        # A job that failed may leave threads that wait for a peer: the parent starts new processes then.
        connection.send(result)
        if result[0]:
            dist.destroy_process_group()


class Pool:
    """Processes that stay, since importing torch takes longer than what they are to do."""

    def __init__(self) -> None:
        self.context = torch.multiprocessing.get_context("spawn")
        self.workers: list[tuple[Any, Any]] = []

    def run(self, world: int, folder: Path, job: Callable[..., Any], *arguments: Any, fails: bool = False) -> list[Any]:
        """The results of a job on so many ranks, or what it failed with; a hang is a failure."""
        while len(self.workers) < world:
            ours, theirs = self.context.Pipe()
            process = self.context.Process(target=_serve, args=(len(self.workers), theirs), daemon=True)
            process.start()
            self.workers.append((process, ours))
        workers = self.workers[:world]
        for _, connection in workers:
            connection.send((world, str(folder / "store"), job, arguments))
        end = time.monotonic() + 120
        answers = [self._answer(connection, end) for _, connection in workers]
        if not all(well for well, _ in answers):
            self.close()
        assert all(well != fails for well, _ in answers), answers
        return [result for _, result in answers]

    def _answer(self, connection: Any, end: float) -> tuple[bool, Any]:
        try:
            return connection.recv() if connection.poll(max(0.1, end - time.monotonic())) else (False, "it hangs")
        except EOFError:
            return False, "it was killed"

    def close(self) -> None:
        for process, _ in self.workers:
            process.kill()
        self.workers.clear()
