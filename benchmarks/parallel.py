"""Throughput of training on several processes, and on network namespaces behind slow links.

Everything is measured in one run: in every round all methods take turns, one CPU thread per process (but where it says
two), on the same stages of the same network, two unless ``--stages`` says otherwise. A method's time per step is taken
on the last stage from the end of one step to the end of a later one, so that the pipeline is full; the medians over the
rounds are told.

    one               one process, local steps
    one end-to-end    one process, every step guided, without auxiliary networks
    both cores        one process with two threads, which is what a user of one machine has anyway; local steps
    both end-to-end   the same, every step guided, without auxiliary networks
    local             a process for each stage, local steps
    pgl               the same, every tenth step guided (exact), the others local
    1f1b, gpipe       the same, end-to-end by torch.distributed.pipelining, 4 micro-batches, on the same stages
    1f1b balanced     the same on stages that are balanced without the auxiliary networks

    python benchmarks/parallel.py                                        # four networks on this machine
    python benchmarks/parallel.py --links loopback 10gbit 1gbit 100mbit 20ms 100mbit+20ms   # needs root, ip and tc
    python benchmarks/parallel.py --links 100mbit --boundary int8 --weigh-link   # in fewer bytes, cut where fewer cross
    python benchmarks/parallel.py --networks gpt --stages 3              # three processes
    python benchmarks/parallel.py --networks gpt --stages 3 --cores 0.6  # on two cores, each .6 of one (needs root)
    python benchmarks/parallel.py --tiny                                 # a trial of everything, of no meaning

The networks are three for images and ``gpt``, a decoder (gpt-tiny, its read-out not tied, which would make the first
stage wait for the last one in every step; local losses read copies of the read-out that are refreshed every ten steps).

A link is ``loopback`` (no namespaces), or a rate (``1gbit``) and a one-way delay (``20ms``), joined by ``+``; there is
one from each stage to the next. Rates are tc's token bucket on a veth pair. Delays are netem's where the kernel has it,
otherwise two TUN devices and a relay.

More stages than cores are honest with ``--cores``: a quota (cgroup v1 or v2) gives each process that share of one core,
in slices of a few milliseconds. One process has the share of one as well, and methods with two threads are left out.
"""

from __future__ import annotations

import argparse
import collections
import contextlib
import fcntl
import json
import math
import os
import resource
import select
import signal
import statistics
import struct
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from datetime import timedelta
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
import torchvision
from matplotlib.figure import Figure
from torch import Tensor, nn

import torchlocal as tl
from torchlocal import parallel
from torchlocal.models import build_language_model, build_model
from torchlocal.rules import SoloRule
from torchlocal.tokens import TokenCrossEntropy

ALONE = ("one", "one end-to-end", "both cores", "both end-to-end")
METHODS = (*ALONE, "local", "pgl", "1f1b", "gpipe", "1f1b balanced")
NETWORKS = {"resnet32": 16, "vgg11b": 8, "vit": 12, "gpt": 8}  # and their local modules
BATCH_SIZES = {"gpt": 8}  # rows of text; others take 64 images
VOCABULARY, CONTEXT = 1024, 256  # of gpt
PERIOD = 10  # of the guided steps of PGL
MICRO_BATCHES = 4


# --- what is measured ---


def batch_size_of(network: str, options: argparse.Namespace) -> int:
    """Images or rows of text in a batch."""
    return int(options.batch_size or BATCH_SIZES.get(network, 64))


def unit_of(network: str, options: argparse.Namespace) -> tuple[str, int]:
    """In what throughput is told, and how many of these a batch has."""
    size = batch_size_of(network, options)
    return ("token", size * CONTEXT) if network == "gpt" else ("image", size)


def make_network(name: str, auxiliary: str, options: argparse.Namespace) -> tl.DecoupledNetwork:
    """The network, cut, with auxiliary networks as one trains with (``conv``) or of next to no cost (``linear``).

    It is the same on every rank.
    """
    torch.manual_seed(0)
    if name == "gpt":
        gpt = build_language_model("gpt-tiny", vocabulary=VOCABULARY, context=CONTEXT, options={"tied": False})
        rule = SoloRule(0, lag=PERIOD) if auxiliary == "conv" else SoloRule(0, read_out="private", rank=1)
        sample = torch.zeros(batch_size_of(name, options), CONTEXT, dtype=torch.int64)
        return tl.decouple(gpt, NETWORKS[name], sample=sample, rule=rule, criterion=TokenCrossEntropy(), cost="flops")
    if name == "vit":
        model: nn.Module = torchvision.models.VisionTransformer(
            image_size=32, patch_size=4, num_layers=12, num_heads=3, hidden_dim=192, mlp_dim=768, num_classes=10
        )
    else:
        model = build_model(name, num_classes=10, in_channels=3, image_size=(32, 32))
    shape = (batch_size_of(name, options), 3, 32, 32)
    return tl.decouple(model, NETWORKS[name], sample=shape, rule=tl.GreedyRule(auxiliary), cost="flops")


def make_batches(name: str, options: argparse.Namespace) -> list[tuple[Tensor, Tensor]]:
    """A few batches of noise."""
    generator = torch.Generator().manual_seed(0)
    size = batch_size_of(name, options)
    if name == "gpt":
        tokens = torch.randint(VOCABULARY, (4, size, CONTEXT + 1), generator=generator)
        return [(ids[:, :-1].contiguous(), ids[:, 1:].contiguous()) for ids in tokens]
    return [
        (torch.randn(size, 3, 32, 32, generator=generator), torch.randint(10, (size,), generator=generator))
        for _ in range(4)
    ]


class Worker:
    """One of the processes."""

    def __init__(self, network: str, options: argparse.Namespace) -> None:
        self.options, self.batches = options, make_batches(network, options)
        self.unit = unit_of(network, options)
        net = make_network(network, "conv", options)
        self.alone = make_network(network, "conv", options) if dist.get_rank() == 0 else None
        self.seconds = parallel.measure_seconds(net, *self.batches[0])
        how: dict[str, Any] = {
            "assignment": "time", "sample": self.batches[0], "timeout": 600, "boundary": options.boundary,
            "link": options.weigh,
        }  # fmt: skip
        self.net = parallel.distribute(net, **how)
        # With the other auxiliary networks, which cost next to nothing, the time of a local step is the backbone's.
        self.bare = parallel.distribute(make_network(network, "linear", options), **how)
        self.optimizers = {id(n): self._optimizer(n) for n in (self.net, self.bare, self.alone) if n is not None}

    @staticmethod
    def _optimizer(net: Any) -> torch.optim.Optimizer:
        return torch.optim.SGD(net.parameters(), lr=1e-3, momentum=0.9)

    def steps(self, method: str) -> tuple[Any, Callable[[int], Any]]:
        """The network of a method, and what runs its i-th step."""
        pipelined: dict[str, Any] = {"auxiliary": "frozen", "micro_batches": MICRO_BATCHES}
        if method in ALONE:
            alone = self.alone
            if alone is None:
                return None, lambda i: None
            if not method.endswith("end-to-end"):
                return alone, lambda i: alone.local_step(*self._batch(i))
            return alone, lambda i: alone.guided_step(*self._batch(i), auxiliary="frozen")
        net = self.bare if method == "1f1b balanced" else self.net

        def given(i: int) -> tuple[Any, ...]:
            return self._batch(i) if net.is_first else ()

        def pgl(i: int) -> Any:
            return net.guided_step(*given(i)) if i % PERIOD == 0 else net.local_step(*given(i))

        kinds: dict[str, Callable[[int], Any]] = {
            "local": lambda i: net.local_step(*given(i)),
            "pgl": pgl,
            "gpipe": lambda i: net.guided_step(*given(i), schedule="gpipe", **pipelined),
        }
        return net, kinds.get(method, lambda i: net.guided_step(*given(i), schedule="1f1b", **pipelined))

    def _batch(self, i: int) -> tuple[Tensor, Tensor]:
        return self.batches[i % len(self.batches)]

    def time(self, method: str) -> float:
        """Seconds per step; known to the rank that ends the steps."""
        net, step = self.steps(method)
        optimizer = self.optimizers.get(id(net))
        dist.barrier()
        torch.set_num_threads(2 if method.startswith("both") else 1)  # the other process waits, and computes nothing
        start, count = 0.0, self.options.steps
        for i in range(-PERIOD if method == "pgl" else -2, count):
            if i == 0:
                start = time.perf_counter()
            if optimizer is not None:
                step(i)
                optimizer.step()
                optimizer.zero_grad()
        seconds = (time.perf_counter() - start) / count
        dist.barrier()
        return seconds

    def measure(self) -> dict[str, Any] | None:
        """Everything; on the first rank."""
        times: dict[str, list[float]] = {method: [] for method in self.options.methods}
        for number in range(self.options.rounds):
            first = number % len(times)
            order = [*times, *times][first : first + len(times)]
            for method in order:
                gathered: list[Any] = [None] * dist.get_world_size()
                dist.all_gather_object(gathered, self.time(method))
                times[method].append(gathered[0 if method in ALONE else -1])
        before = self.net.bytes_sent
        for i in range(PERIOD):  # in which a read-out travels back once
            self.net.local_step(*(self._batch(i) if self.net.is_first else ()))
        sent: list[Any] = [None] * dist.get_world_size()
        dist.all_gather_object(sent, self.net.bytes_sent - before)
        self.net.close()
        self.bare.close()
        if dist.get_rank():
            return None
        stages = [sum(self.seconds[k] for k in stage) for stage in self.net.stages]
        return {
            "seconds": {method: statistics.median(values) for method, values in times.items()},
            "all_seconds": times,
            "stages": [[stage.start, stage.stop] for stage in self.net.stages],
            "possible": sum(stages) / max(stages),
            f"bytes_per_{self.unit[0]}": sum(sent) / PERIOD / self.unit[1],
        }


def work(rank: int, options: argparse.Namespace) -> None:
    """Be one of the processes."""
    torch.set_num_threads(1)
    store, size = dist.FileStore(options.store, options.stages), options.stages
    dist.init_process_group("gloo", store=store, rank=rank, world_size=size, timeout=timedelta(seconds=600))
    result = Worker(options.networks[0], options).measure()
    if result is not None:
        Path(options.result).write_text(json.dumps(result))
    dist.destroy_process_group()


# --- links ---


def run_command(*command: str) -> None:
    """Run a command; its message is the error's."""
    done = subprocess.run(command, capture_output=True, text=True)
    if done.returncode:
        raise OSError(f"{' '.join(command)}: {(done.stderr or done.stdout).strip()}")


def parse_link(link: str) -> tuple[str | None, float]:
    """Rate as tc writes it, or None, and one-way delay in seconds."""
    rate, delay = None, 0.0
    for part in link.split("+"):
        if part.endswith("ms"):
            delay = float(part.removesuffix("ms")) / 1e3
        else:
            rate = part
    return rate, delay


@contextlib.contextmanager
def namespaces(link: str, count: int = 2) -> Iterator[list[list[str]]]:
    """Network namespaces in a row, each joined to the next by a link; what to put before a command to run it in each.

    The devices are called ``left`` and ``right``; what is not for a neighbour is passed on.

    Raises:
        OSError: the rights, or the tools, are missing.
    """
    names = [f"torchlocal{os.getpid()}-{i}" for i in range(count)]
    relays: list[subprocess.Popen[bytes]] = []
    made: list[str] = []
    try:
        for name in names:
            run_command("ip", "netns", "add", name)
            made.append(name)
        prefixes = [["ip", "netns", "exec", name] for name in names]
        for prefix in prefixes:
            run_command(*prefix, "ip", "link", "set", "lo", "up")
            run_command(*prefix, "sh", "-c", "echo 1 > /proc/sys/net/ipv4/ip_forward")
        for i in range(count - 1):
            join(names[i : i + 2], i, link, relays)
        for here, prefix in enumerate(prefixes):
            for i in range(count - 1):
                if i not in (here - 1, here):
                    via = f"10.231.{here - 1}.1" if i < here else f"10.231.{here}.2"
                    run_command(*prefix, "ip", "route", "add", f"10.231.{i}.0/30", "via", via)
        yield prefixes
    finally:
        for relay in relays:
            relay.kill()
            relay.wait()
        for name in made:
            run_command("ip", "netns", "del", name)


def join(names: list[str], number: int, link: str, relays: list[subprocess.Popen[bytes]]) -> None:
    """Join two namespaces by the link of a number; a relay that it takes is added to the list."""
    rate, delay = parse_link(link)
    prefixes, devices = [["ip", "netns", "exec", name] for name in names], ["right", "left"]
    run_command("ip", "link", "add", "right", "netns", names[0], "type", "veth", "peer", "left", "netns", names[1])
    rate_only = ("tbf", "rate", rate, "burst", "1mb", "latency", "1s") if rate else None
    if delay:
        delayed = ("netem", "delay", f"{delay * 1e3:g}ms", "limit", "100000", *(("rate", rate) if rate else ()))
        try:
            for prefix, device in zip(prefixes, devices, strict=True):
                run_command(*prefix, "tc", "qdisc", "add", "dev", device, "root", *delayed)
            rate_only = None
        except OSError:  # a kernel without netem
            run_command(*prefixes[0], "ip", "link", "del", "right")
            relays.append(start_relay(names, devices, delay))
    for i, (prefix, device) in enumerate(zip(prefixes, devices, strict=True)):
        run_command(*prefix, "ip", "addr", "add", f"10.231.{number}.{i + 1}/30", "dev", device)
        run_command(*prefix, "ip", "link", "set", device, "up")
        if rate_only:
            run_command(*prefix, "tc", "qdisc", "add", "dev", device, "root", *map(str, rate_only))


def interface(link: str, rank: int) -> str:
    """The device that gloo shall use in the namespace of a rank."""
    return "lo" if link == "loopback" else "left" if rank else "right"


def start_relay(names: list[str], devices: list[str], delay: float) -> subprocess.Popen[bytes]:
    """Two TUN devices, one in each namespace, and a process that carries packets over after a while."""
    tunsetiff, tun_without_header = 0x400454CA, 0x1001
    files = []
    for name, device in zip(names, devices, strict=True):
        file = os.open("/dev/net/tun", os.O_RDWR)
        fcntl.ioctl(file, tunsetiff, struct.pack("16sH", device.encode(), tun_without_header))
        run_command("ip", "link", "set", device, "netns", name)
        # Large packets: the relay shall not compete with the training for the processor.
        run_command("ip", "netns", "exec", name, "ip", "link", "set", device, "mtu", "60000", "txqueuelen", "10000")
        files.append(file)
    command = [sys.executable, __file__, "--relay", *map(str, files), str(delay)]
    relay = subprocess.Popen(command, pass_fds=files)
    for file in files:
        os.close(file)
    return relay


def carry(first: int, second: int, delay: float) -> None:
    """Carry packets between two TUN devices, each after a delay in seconds."""
    other = {first: second, second: first}
    waiting: collections.deque[tuple[float, int, bytes]] = collections.deque()
    while True:
        pause = max(0.0, waiting[0][0] - time.monotonic()) if waiting else None
        for file in select.select([first, second], [], [], pause)[0]:
            waiting.append((time.monotonic() + delay, other[file], os.read(file, 65536)))
        while waiting and waiting[0][0] <= time.monotonic():
            _, file, packet = waiting.popleft()
            with contextlib.suppress(OSError):  # the device is not up yet
                os.write(file, packet)


# --- shares of a core ---


def quota_folder() -> tuple[Path, int]:
    """Where cgroups with a quota of the CPU can be made, and the version of these: 1 or 2.

    Raises:
        OSError: nowhere.
    """
    for line in Path("/proc/mounts").read_text().splitlines():
        _, where, kind, options, *_ = line.split()
        if kind == "cgroup" and "cpu" in options.split(","):
            return Path(where), 1
        if kind == "cgroup2" and "cpu" in Path(where, "cgroup.controllers").read_text().split():
            return Path(where), 2
    raise OSError("no cgroup with the controller cpu is mounted")


@contextlib.contextmanager
def quotas(share: float | None, count: int) -> Iterator[list[list[str]]]:
    """Cgroups that give a share of one core each; what to put before a command to run it, with its threads, in each.

    Raises:
        OSError: the rights, or cgroups, are missing.
    """
    if share is None:
        yield [[] for _ in range(count)]
        return
    made: list[Path] = []
    try:
        folder, version = quota_folder()
        period = max(5000, math.ceil(1000 / share))  # microseconds; the kernel wants a quota of at least 1000
        if version == 2:
            (folder / "cgroup.subtree_control").write_text("+cpu")
        for i in range(count):
            group = folder / f"torchlocal{os.getpid()}-{i}"
            group.mkdir()
            made.append(group)
            quota = round(share * period)
            if version == 2:
                (group / "cpu.max").write_text(f"{quota} {period}")
            else:
                (group / "cpu.cfs_period_us").write_text(str(period))
                (group / "cpu.cfs_quota_us").write_text(str(quota))
        enter = 'echo $$ > "$0" && exec "$@"'
        yield [["sh", "-c", enter, str(group / "cgroup.procs")] for group in made]
    finally:
        for group in made:
            os.rmdir(group)


def check_cores(cores: float | None) -> str | None:
    """Why processes cannot have that share of a core each; None if they can."""
    if cores is None:
        return None
    if not 0 < cores <= 1:
        return f"--cores: must be a number above 0 and at most 1, not {cores}"
    try:
        with quotas(cores, 1):
            return None
    except OSError as error:
        return f"--cores: a quota of the CPU takes root and cgroups with the controller cpu: {error}"


# --- the run ---


def run_ranks(link: str, count: int, command: list[str], share: float | None = None) -> dict[str, Any]:
    """Start a process for each stage, and wait for what they measure.

    Args:
        link: between one stage and the next.
        count: number of stages.
        command: of every process; ``--rank``, ``--store`` and ``--result`` are added.
        share: of one core that every process gets; None: as much as there is.

    Returns:
        What they measure, and as ``others`` the share of all cores that other programs took meanwhile.

    Raises:
        OSError: namespaces, or quotas, cannot be had.
        RuntimeError: a process failed.
    """
    before = time.perf_counter(), *seconds_of_cores()
    result = _run_ranks(link, count, command, share)
    wall, busy, ours = (b - a for a, b in zip(before, (time.perf_counter(), *seconds_of_cores()), strict=True))
    return result | {"others": max(0.0, busy - ours) / (wall * (os.cpu_count() or 1))}


def seconds_of_cores() -> tuple[float, float]:
    """Seconds that all cores together have worked so far, and of these those of this process and its children."""
    user, nice, system, _, _, *rest = map(int, Path("/proc/stat").read_text().split("\n")[0].split()[1:9])
    busy = (user + nice + system + sum(rest)) / os.sysconf("SC_CLK_TCK")
    own = [resource.getrusage(who) for who in (resource.RUSAGE_SELF, resource.RUSAGE_CHILDREN)]
    return busy, sum(one.ru_utime + one.ru_stime for one in own)


def _run_ranks(link: str, count: int, command: list[str], share: float | None) -> dict[str, Any]:
    here: list[list[str]] = [[] for _ in range(count)]
    around: Any = contextlib.nullcontext(here) if link == "loopback" else namespaces(link, count)
    with tempfile.TemporaryDirectory() as folder, quotas(share, count) as enters, around as prefixes:
        processes = []
        for rank, prefix in enumerate(prefixes):
            environment = {**os.environ, "OMP_NUM_THREADS": "1", "GLOO_SOCKET_IFNAME": interface(link, rank)}
            own = ["--rank", str(rank), "--store", f"{folder}/store", "--result", f"{folder}/result"]
            # A quota is entered first: a network namespace has another /sys.
            processes.append(subprocess.Popen([*enters[rank], *prefix, *command, *own], env=environment))
        try:
            codes = [process.wait() for process in processes]
        finally:
            for process in processes:
                process.kill()
                process.wait()
        if any(codes):
            raise RuntimeError(f"the processes ended with {codes}")
        result: dict[str, Any] = json.loads(Path(f"{folder}/result").read_text())
        return result


def measure(network: str, link: str, options: argparse.Namespace) -> dict[str, Any]:
    """What the processes measure of a network over a link."""
    command = [sys.executable, __file__, "--networks", network, "--stages", str(options.stages)]
    command += ["--batch-size", str(batch_size_of(network, options)), "--steps", str(options.steps)]
    command += ["--rounds", str(options.rounds), "--methods", *options.methods]
    command += ["--boundary", options.boundary] if options.boundary else []
    command += ["--weigh", link] if options.weigh_link and link != "loopback" else []
    return run_ranks(link, options.stages, command, options.cores)


def tell(
    network: str, link: str, result: dict[str, Any], unit: tuple[str, int], undisturbed: dict[str, Any] | None
) -> None:
    """Print what was measured of one network over one link, also as a share of what it is without one."""
    seconds, (what, size) = result["seconds"], unit
    stages = " | ".join(f"{start + 1}–{stop}" for start, stop in result["stages"])
    print(f"\n{network}, {link}: local modules {stages}, {result[f'bytes_per_{what}']:,.0f} bytes per {what}")
    print(f"  {told_others(result)}")
    for method, value in seconds.items():
        ratio = f"  {seconds['one'] / value:5.2f} × one process" if "one" in seconds else ""
        share = ""
        if undisturbed is not None and link != "loopback":
            share = f"  {100 * undisturbed['seconds'][method] / value:4.0f} % of itself on loopback"
        print(f"  {method:<16}{size / value:9.1f} {what}s/s{ratio}{share}")
    if {"one", "local"} <= seconds.keys():
        speedup = seconds["one"] / seconds["local"]
        print(f"  local: {speedup:.2f} × one process, {speedup / result['possible']:.2f} of the", end=" ")
        print(f"{result['possible']:.2f} that the balance of the stages allows (aim .95)")
    if {"both cores", "local"} <= seconds.keys():
        print(f"  local: {seconds['both cores'] / seconds['local']:.2f} × one process with both cores")
    if {"1f1b", "local"} <= seconds.keys():
        print(f"  local: {seconds['1f1b'] / seconds['local']:.2f} × 1f1b with {MICRO_BATCHES} micro-batches (aim 1.3)")


def told_others(result: dict[str, Any]) -> str:
    """Whether the machine was quiet."""
    return f"other programs took {100 * result['others']:.0f} % of all cores meanwhile"


def draw(results: dict[str, Any], options: argparse.Namespace) -> Figure:
    """Throughput relative to one process, by link: a panel for each network."""
    networks = list(dict.fromkeys(key.split(", ")[0] for key in results))
    figure = Figure(figsize=(4.2 * len(networks), 3.6), layout="constrained")
    for column, network in enumerate(networks, start=1):
        axes = figure.add_subplot(1, len(networks), column)
        links = [key.split(", ")[1] for key in results if key.split(", ")[0] == network]
        shown = [m for m in ("local", "pgl", "1f1b") if all(m in results[f"{network}, {k}"]["seconds"] for k in links)]
        for i, (method, hatch) in enumerate(zip(shown, ("", "//", ".."), strict=False)):
            found = [results[f"{network}, {link}"]["seconds"] for link in links]
            at = [position + (i - 1) * 0.27 for position in range(len(links))]
            heights = [seconds["one"] / seconds[method] for seconds in found]
            colour = ("#0072B2", "#E69F00", "#D55E00")[i]
            axes.bar(at, heights, width=0.25, label=method, hatch=hatch, color=colour, edgecolor="white")
        axes.axhline(1, color="black", lw=1, linestyle="--")
        axes.set_xticks(range(len(links)), [link.replace("+", "\n+ ") for link in links], fontsize="small")
        axes.set_title(f"{network}, batch {batch_size_of(network, options)}", loc="left", fontsize="medium")
        axes.set_ylabel("throughput, × one process" if column == 1 else "")
        axes.spines[["top", "right"]].set_visible(False)
    figure.legend(*axes.get_legend_handles_labels(), loc="outside lower center", ncols=3, frameon=False)
    return figure


def main() -> None:
    """Measure everything, and print and save it."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--networks", nargs="+", default=list(NETWORKS), choices=NETWORKS, help="default: all")
    parser.add_argument("--links", nargs="+", default=["loopback"], metavar="LINK", help="default: loopback")
    parser.add_argument("--methods", nargs="+", default=list(METHODS), choices=METHODS, help="default: all")
    parser.add_argument("--stages", type=int, default=2, help="processes that share the local modules (default: 2)")
    parser.add_argument(
        "--batch-size", type=int, default=None, help="images per step (default: 64), or rows of 256 tokens (8)"
    )
    parser.add_argument("--boundary", choices=["bf16", "int8", "int4"], help="what features and gradients are sent in")
    parser.add_argument("--weigh-link", action="store_true", help="choose the stages by the bytes over the link, too")
    parser.add_argument("--cores", type=float, default=None, help="that every process gets, such as 0.6 (default: all)")
    parser.add_argument("--steps", type=int, default=10, help="timed steps of a method in a round, a multiple of 10")
    parser.add_argument("--rounds", type=int, default=5, help="default: 5")
    parser.add_argument("--tiny", action="store_true", help="small numbers, to see whether everything runs")
    parser.add_argument("--json", default=None, help="also write the numbers to this file")
    parser.add_argument("--figure", default=None, help="also draw throughput by link into this file; needs method one")
    parser.add_argument("--rank", type=int, default=None, help=argparse.SUPPRESS)
    parser.add_argument("--store", default=None, help=argparse.SUPPRESS)
    parser.add_argument("--weigh", default=None, help=argparse.SUPPRESS)
    parser.add_argument("--result", default=None, help=argparse.SUPPRESS)
    parser.add_argument("--relay", nargs=3, default=None, help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.stages < 2:
        parser.error(f"--stages: must be at least 2, not {options.stages}")
    if options.figure and "one" not in options.methods:
        parser.error("--figure needs the method one: give it among --methods")
    if options.relay is not None:
        carry(int(options.relay[0]), int(options.relay[1]), float(options.relay[2]))
    if options.tiny:
        options.batch_size, options.steps, options.rounds = 8, 10, 2
    if options.rank is not None:
        work(options.rank, options)
        return
    if refused := check_cores(options.cores):
        parser.error(refused)
    if options.cores is not None:
        options.methods = [method for method in options.methods if not method.startswith("both")]
        if not options.methods:
            parser.error("--cores: every process has one core or less, and these methods take two: leave them out")
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))  # so that namespaces are taken down
    results: dict[str, Any] = {}
    for link in options.links:
        for network in options.networks:
            try:
                results[f"{network}, {link}"] = result = measure(network, link, options)
            except OSError as error:
                print(f"\n{link} is skipped, since namespaces or tc are not to be had here: {error}")
                break
            tell(network, link, result, unit_of(network, options), results.get(f"{network}, loopback"))
            sys.stdout.flush()
            if options.json:
                Path(options.json).write_text(json.dumps(results, indent=2))
    if options.figure and results:
        draw(results, options).savefig(options.figure, dpi=150)


if __name__ == "__main__":
    main()
