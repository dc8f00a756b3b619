"""What grows with the number of stages, the model of docs/parallel.md against stages that sleep, and its predictions.

    python benchmarks/stages.py --stages 2 4 8      # what grows with the number of stages, and seconds per step
    python benchmarks/stages.py --predict           # the model for 8, 64 and 512 machines; measures nothing
    python benchmarks/stages.py --tiny              # a trial of everything, of no meaning

Each stage is one tiny local module that sleeps for a given time in its forward and twice as long in its backward pass,
in proportion to the images that it is given, as if it computed on a machine of its own: so eight stages fit on two
cores, and what is measured is who waits for whom. Each process has one thread. What is told of each number of stages:

    start        seconds from the start of a process, which finds its imports done, to the end of its first step
    memory       MiB that a process has taken from the end of its imports to its end (resident, largest of all stages)
    threads      of a process; descriptors: files and sockets that it has open (largest of all stages)
    messages     that a stage sends per local step, and bytes (of the stage that sends most)
    processor    milliseconds of processor time per local step and stage, beside the sleep

and seconds per step of local steps, exact guided steps, 1F1B with eight micro-batches, and PGL with every tenth step
guided (exact), each beside what the model says.
"""

from __future__ import annotations

import argparse
import json
import multiprocessing
import os
import resource
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
import torch.distributed.pipelining  # here rather than in each stage
from torch import Tensor, nn

import torchlocal as tl
from torchlocal import parallel

BATCH, WIDTH = 16, 64  # two images in each of eight micro-batches, for BatchNorm
PERIOD, MICRO_BATCHES, IN_FLIGHT = 10, 8, 4
METHODS = ("local", "guided", "1f1b", "pgl")


# --- the model, see docs/parallel.md ---


def local_seconds(c: float, volume: float, rate: float, latency: float, in_flight: int = IN_FLIGHT) -> float:
    """Of a local step: c seconds of computing per stage, volume in bytes, rate in bytes per second, latency one way."""
    return max(c, volume / rate, (3 * latency + volume / rate) / in_flight)


def pipelined_seconds(c: float, volume: float, rate: float, latency: float, stages: int, parts: int) -> float:
    """Of a 1F1B step in so many micro-batches."""
    return (parts + stages - 1) * (c / parts + 3 * latency + volume / (parts * rate))


def exact_seconds(c: float, volume: float, rate: float, latency: float, stages: int) -> float:
    """Of an exact guided step: forward through all stages, and backward."""
    return stages * c + 2 * (stages - 1) * (3 * latency + volume / rate)


def periodic_seconds(local: float, guided: float, stages: int, period: int, length: int) -> float:
    """Of a step of PGL on average, with one guided phase of so many steps in each period."""
    return ((period - length) * local + (stages - 1) * local + length * guided) / period


def predict() -> None:
    """Print the share of the time in which a stage computes, by link, number of stages and compression."""
    c, volume, compressed = 0.1, 8e6, {"fp32": 1, "int8": 4, "int4": 8}
    links = {"1 Gbit/s, 0.1 ms": (1.25e8, 1e-4), "100 Mbit/s, 20 ms": (1.25e7, 0.02), "20 Mbit/s, 50 ms": (2.5e6, 0.05)}
    names = [f"{method} {name}" for method in ("local", "1F1B", "PGL") for name in compressed]
    print(f"| link | N | {' | '.join(names)} |\n|---|---:|{'---:|' * len(names)}")
    for link, (rate, latency) in links.items():
        for stages in (8, 64, 512):
            local = [local_seconds(c, volume / factor, rate, latency) for factor in compressed.values()]
            piped = [  # with what number of micro-batches is best, as one would choose it
                min(pipelined_seconds(c, volume / factor, rate, latency, stages, 2**k) for k in range(6))
                for factor in compressed.values()
            ]
            pgl = [periodic_seconds(a, b, stages, 1000, 100) for a, b in zip(local, piped, strict=True)]
            print(f"| {link} | {stages} | {' | '.join(percent(c / seconds) for seconds in (*local, *piped, *pgl))} |")


def percent(share: float) -> str:
    """With two digits."""
    return f"{100 * share:.{0 if share > 0.095 else 1 if share > 0.0095 else 2}f} %"


# --- a stage that sleeps ---


class _Sleep(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, features: Tensor, seconds: float) -> Tensor:
        ctx.seconds = seconds
        time.sleep(seconds * len(features) / BATCH)
        return features.view_as(features)

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, None]:
        time.sleep(2 * ctx.seconds * len(gradient) / BATCH)
        return gradient, None


class Sleeper(nn.Module):
    """A layer that takes its time; not while the network is being cut."""

    def __init__(self) -> None:
        super().__init__()
        self.layer = nn.Linear(WIDTH, WIDTH)
        self.seconds = 0.0

    def forward(self, features: Tensor) -> Tensor:
        return torch.relu(_Sleep.apply(self.layer(features), self.seconds))


def make_network(stages: int) -> tuple[tl.DecoupledNetwork, list[Sleeper]]:
    """One local module per stage."""
    torch.manual_seed(0)
    sleepers = [Sleeper() for _ in range(stages)]
    backbone = nn.Sequential(*sleepers, nn.Linear(WIDTH, 4))
    net = tl.decouple(backbone, cuts=[str(i) for i in range(stages - 1)], sample=(BATCH, WIDTH))
    return net, sleepers


class Worker:
    """One stage."""

    def __init__(self, options: argparse.Namespace) -> None:
        self.options = options
        begun, memory = time.perf_counter(), resident()
        store = dist.FileStore(options.store, options.world)
        dist.init_process_group("gloo", store=store, rank=options.rank, world_size=options.world)
        network, sleepers = make_network(options.world)
        self.net = parallel.distribute(network, assignment=[1] * options.world, in_flight=IN_FLIGHT)
        self.batch = (torch.randn(BATCH, WIDTH), torch.randint(4, (BATCH,))) if self.net.is_first else ()
        self.optimizer = torch.optim.SGD(self.net.parameters(), lr=0.01)
        for kind in METHODS:
            self.run(kind, 2)
            if kind == "local":
                self.start = time.perf_counter() - begun
        self.idle = self.cost()
        for sleeper in sleepers:
            sleeper.seconds = options.sleep / 3  # forward, twice as much backward
        self.seconds = {method: self.time(method) for method in METHODS}
        # All that serves a step is there: a longer run opens nothing more.
        self.memory = resident() - memory
        self.threads, self.files = threads(), len(os.listdir("/proc/self/fd"))
        self.net.close()

    def run(self, method: str, count: int) -> None:
        steps: dict[str, Callable[[int], Any]] = {
            "local": lambda i: self.net.local_step(*self.batch),
            "guided": lambda i: self.net.guided_step(*self.batch, auxiliary="frozen"),
            "1f1b": lambda i: self.net.guided_step(*self.batch, auxiliary="frozen", micro_batches=MICRO_BATCHES),
            "pgl": lambda i: steps["guided" if i % PERIOD == PERIOD - 1 else "local"](i),
        }
        for i in range(count):
            steps[method](i)
            self.optimizer.step()
            self.optimizer.zero_grad()

    def cost(self) -> dict[str, float]:
        """Of a local step without sleep, on this stage."""
        dist.barrier()
        count, data, sent = self.options.steps, self.net.bytes_sent, 0
        real = dist.isend

        def counted(*arguments: Any, **named: Any) -> Any:
            nonlocal sent
            sent += 1
            return real(*arguments, **named)

        dist.isend = counted
        cpu = time.process_time()
        self.run("local", count)
        cpu = time.process_time() - cpu
        dist.isend = real
        return {
            "processor": 1e3 * cpu / count,
            "messages": sent / count,
            "bytes": (self.net.bytes_sent - data) / count,
        }

    def time(self, method: str) -> float:
        """Seconds per step, from the end of one to the end of a later one."""
        dist.barrier()
        count = max(PERIOD, self.options.steps // PERIOD * PERIOD)
        self.run(method, PERIOD)
        start = time.perf_counter()
        self.run(method, count)
        return (time.perf_counter() - start) / count


def resident() -> float:
    """MiB that this process has had in memory at most."""
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024


def threads() -> int:
    """Threads of this process."""
    lines = Path("/proc/self/status").read_text().splitlines()
    return int(next(line.split()[1] for line in lines if line.startswith("Threads")))


def work(options: argparse.Namespace) -> None:
    """Be one of the stages."""
    torch.set_num_threads(1)
    worker = Worker(options)
    own = {"start": worker.start, "memory": worker.memory, "threads": worker.threads, "descriptors": worker.files}
    gathered: list[Any] = [None] * options.world
    dist.all_gather_object(gathered, (own | worker.idle, worker.seconds))
    if options.rank == 0:
        found = {name: max(each[name] for each, _ in gathered) for name in gathered[0][0]}
        Path(options.result).write_text(json.dumps(found | {"seconds": gathered[-1][1]}))
    dist.destroy_process_group()


def measure(stages: int, options: argparse.Namespace) -> dict[str, Any]:
    """Start the stages, and wait for what they measure."""
    context = multiprocessing.get_context("fork")  # what is imported here need not be imported by each
    with tempfile.TemporaryDirectory() as folder:
        processes = []
        for rank in range(stages):
            own = {"rank": rank, "world": stages, "store": f"{folder}/store", "result": f"{folder}/result"}
            told = argparse.Namespace(**vars(options) | own)
            processes.append(context.Process(target=work, args=(told,), daemon=True))
            processes[-1].start()
        for process in processes:
            process.join()
        if any(process.exitcode for process in processes):
            raise RuntimeError(f"the stages ended with {[process.exitcode for process in processes]}")
        result: dict[str, Any] = json.loads(Path(f"{folder}/result").read_text())
        return result


def modelled(stages: int, c: float) -> dict[str, float]:
    """What the model says of links that take no time."""
    far = (0.0, 1.0, 0.0)
    local, exact = local_seconds(c, *far), exact_seconds(c, *far, stages)
    piped = pipelined_seconds(c, *far, stages, MICRO_BATCHES)
    return {"local": local, "guided": exact, "1f1b": piped, "pgl": periodic_seconds(local, exact, stages, PERIOD, 1)}


def tell(results: dict[int, dict[str, Any]], c: float) -> None:
    """Print two tables."""
    print("| stages | start, s | memory, MiB | threads | descriptors | messages | bytes | processor, ms |")
    print("|---:|---:|---:|---:|---:|---:|---:|---:|")
    for stages, found in results.items():
        print(
            f"| {stages} | {found['start']:.1f} | {found['memory']:.0f} | {found['threads']} | {found['descriptors']} "
            f"| {found['messages']:.0f} | {found['bytes']:,.0f} | {found['processor']:.1f} |"
        )
    print(f"\n| stages | {' | '.join(f'{method}: model | measured' for method in METHODS)} |")
    print(f"|---:|{'---:|' * 2 * len(METHODS)}")
    for stages, found in results.items():
        model = modelled(stages, c)
        cells = " | ".join(f"{model[method]:.3f} | {found['seconds'][method]:.3f}" for method in METHODS)
        print(f"| {stages} | {cells} |")


def main() -> int:
    """Measure, or predict."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--stages", type=int, nargs="+", default=[2, 4, 8])
    parser.add_argument("--sleep", type=float, default=0.06, help="seconds per stage and step (default: 0.06)")
    parser.add_argument("--steps", type=int, default=10, help="timed steps (default: 10)")
    parser.add_argument("--predict", action="store_true", help="print what the model says of many machines")
    parser.add_argument("--tiny", action="store_true", help="small numbers, to see whether everything runs")
    parser.add_argument("--json", default=None, help="also write the numbers to this file")
    options = parser.parse_args()
    if options.predict:
        predict()
        return 0
    if options.tiny:
        options.stages, options.sleep, options.steps = [2], 0.003, 10
    os.environ |= {"OMP_NUM_THREADS": "1", "GLOO_SOCKET_IFNAME": "lo"}
    torch.set_num_threads(1)
    results = {}
    for stages in options.stages:
        results[stages] = measure(stages, options)
        print(f"{stages} stages are measured", file=sys.stderr)
    tell(results, options.sleep)
    if options.json:
        Path(options.json).write_text(json.dumps(results, indent=2))
    return 0


if __name__ == "__main__":
    sys.exit(main())
