"""Right, memory, time: everything that is claimed of an accelerator, measured in one script of at most eight minutes.

    PYTHONPATH=src python3 benchmarks/gpu.py --out runs/gpu                     # on one GPU
    PYTHONPATH=src python3 benchmarks/gpu.py --tiny                             # the same code on the CPU, tiny sizes
    PYTHONPATH=src python3 benchmarks/gpu.py --out runs/gpu --sections time --redo

Sections, in this order (``--sections`` chooses), each with a time limit of its own; one that fails or is out of time
keeps the rows that it has, and the next one gets its chance. Every row is printed and written (``results.json``,
``results.md``) as soon as it is known. A second run with the same ``--out`` skips sections that are finished.

    right            guided = plain, recomputation, isolation, autocast, GradScaler, channels_last
    blocks           compiled blocks against uncompiled ones, of GPT-2 and of a ResNet
    fit              runs of the trainer on images and on text: their steps called, and captured
    synchronisation  which call of a step waits for the device, if any
    memory           the allocator's peak against the prediction; what memory=BYTES holds
    time             all ways to train in turns; PGL against its rivals at equal memory; largest batch in 8 GiB
    captured         the same as CUDA graphs (torchlocal.capture): right, and their times
    host             how much of a small network's step is Python, and what CUDA graphs give
    streams          module k's backward beside module k + 1's forward
    accuracy         Fashion-MNIST (``--data FOLDER`` with the IDX files), as many epochs as there is time for
    compiled         torch.compile with an activation memory budget; compiled modules with CUDA graphs
    augmentation     batches of images made on the device against batches of the host: the same, and how fast a run is
    ranks            two processes, as stages and as replicas, against one (NCCL; needs two GPUs)

Times are medians over rounds in which the methods take turns; ``n`` is the number of rounds. Memory is in MiB above
what is there at rest. "Differing" counts tensors that are not equal bit for bit, of ``tensors`` compared.
"""

from __future__ import annotations

import argparse
import contextlib
import copy
import csv
import functools
import gc
import gzip
import itertools
import json
import math
import multiprocessing
import os
import signal
import statistics
import subprocess
import sys
import tempfile
import time
import traceback
import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import Future, ProcessPoolExecutor
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")  # read when CUDA starts; deterministic matrix products
os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

import torchlocal as tl
from torchlocal.data import Split
from torchlocal.data.images import Augmentation, MemorySource
from torchlocal.models import build_model
from torchlocal.recompute import GuidedPlan, Tape
from torchlocal.rules.greedy import WIDTH
from torchlocal.run.build import Execution
from torchlocal.run.callbacks import RunState

CUDA = torch.cuda.is_available() and "--tiny" not in sys.argv
DEVICE = torch.device("cuda" if CUDA else "cpu")
MIB = 2**20
BUDGET = 8 * 2**30  # of the largest batch

# name: seconds
LIMITS = {
    "right": 85.0,
    "blocks": 120.0,
    "fit": 60.0,
    "synchronisation": 30.0,
    "memory": 75.0,
    "time": 170.0,
    "captured": 150.0,
    "host": 30.0,
    "streams": 25.0,
    "accuracy": 75.0,
    "compiled": 90.0,
    "augmentation": 60.0,
    "ranks": 120.0,
}
Step = Callable[[], Any]


# ------------------------------------------------------------------------------------------------------------- report


class OutOfTime(BaseException):
    """A section's time is up; no handler of what it interrupts shall catch it."""


class Clock:
    """What is left of a section's time."""

    def __init__(self, limit: float) -> None:
        self.start = time.monotonic()
        self.limit = limit

    @property
    def left(self) -> float:
        """Seconds."""
        return self.start + self.limit - time.monotonic()

    def check(self, needed: float = 0.0) -> None:
        """Raise :class:`OutOfTime` where less is left than ``needed``."""
        if self.left < needed:
            raise OutOfTime


class Report:
    """Rows, kept in a folder and printed as they come."""

    def __init__(self, folder: Path | None, about: dict[str, Any]) -> None:
        self.folder = folder
        self.content: dict[str, Any] = {"about": about, "sections": {}}
        if folder is not None:
            folder.mkdir(parents=True, exist_ok=True)
            with contextlib.suppress(OSError, ValueError):
                self.content["sections"] = json.loads((folder / "results.json").read_text())["sections"]
        self.section: dict[str, Any] = {}
        self.name, self.begun = "", time.monotonic()

    def begin(self, name: str, limit: float) -> None:
        """A section begins; what an unfinished run of it has left stays beside the new rows."""
        before = self.content["sections"].pop(name, None)
        self.begun = time.monotonic()
        self.name, self.section = name, {"status": "running", "limit_s": round(limit, 1), "rows": []}
        if before is not None:
            self.section["earlier"] = {k: v for k, v in before.items() if k != "earlier"}
        self.content["sections"][name] = self.section
        self.save()

    def end(self, status: str, seconds: float) -> None:
        """A section is over."""
        self.section |= {"status": status, "seconds": round(seconds, 1)}
        print(f"--- {self.name}: {status}, {seconds:.1f} s", flush=True)
        self.save()

    def row(self, table: str, **values: Any) -> None:
        """One line of a table."""
        rounded = {k: (float(f"{v:.5g}") if isinstance(v, float) else v) for k, v in values.items()}
        self.section["rows"].append({"table": table, **rounded})
        at = time.monotonic() - self.begun
        print(f"[{self.name} {at:.1f} s] {table}: " + ", ".join(f"{k}={v}" for k, v in rounded.items()), flush=True)
        self.save()

    def failed(self, error: BaseException, **values: Any) -> None:
        """An exception, as a row."""
        text = " ".join(str(error).split())
        self.row("failures", **values, error=type(error).__name__, message=text[:400], at=location(error))

    def save(self) -> None:
        """Write both files anew."""
        if self.folder is None:
            return
        for name, text in (("results.json", json.dumps(self.content, indent=1)), ("results.md", self.markdown())):
            temporary = self.folder / f".{name}"
            temporary.write_text(text)
            temporary.replace(self.folder / name)

    def markdown(self) -> str:
        """All rows as tables."""
        about = "; ".join(f"{key}: {value}" for key, value in self.content["about"].items())
        lines = ["# Measured on an accelerator", "", about, ""]
        for name, section in self.content["sections"].items():
            spent = f", {section['seconds']} s" if "seconds" in section else ""
            lines += [f"## {name} ({section['status']}{spent})", ""]
            for table in dict.fromkeys(row["table"] for row in section["rows"]):
                rows = [row for row in section["rows"] if row["table"] == table]
                columns = list(dict.fromkeys(key for row in rows for key in row if key != "table"))
                lines += [f"**{table}**", "", "| " + " | ".join(columns) + " |", "|---" * len(columns) + "|"]
                lines += ["| " + " | ".join(_cell(row.get(column)) for column in columns) + " |" for row in rows]
                lines.append("")
        return "\n".join(lines)


def _cell(value: Any) -> str:
    if value is None:
        return "–"
    return f"{value:.4g}" if isinstance(value, float) else str(value).replace("|", "/")


def location(error: BaseException) -> str:
    """The innermost frame in torchlocal, or in this file."""
    frames = traceback.extract_tb(error.__traceback__)
    ours = [f for f in frames if "/torchlocal/" in f.filename] or [f for f in frames if f.filename == __file__]
    if not (ours or frames):
        return ""
    frame = (ours or list(frames))[-1]
    return f"{Path(frame.filename).name}:{frame.lineno} in {frame.name}"


@contextlib.contextmanager
def noting(report: Report, **values: Any) -> Iterator[None]:
    """What goes wrong inside becomes a row, and the section goes on."""
    try:
        yield
    except Exception as error:
        report.failed(error, **values)
        del error
        gc.collect()
        if CUDA:
            torch.cuda.empty_cache()


@dataclass
class Run:
    """What every section gets."""

    report: Report
    clock: Clock
    tiny: bool
    plans: Plans
    data: Path | None = None
    only: Sequence[str] = ()  # networks of the sections "right" and "blocks"


# ------------------------------------------------------------------------------------------------------------ networks


@dataclass(frozen=True)
class Case:
    """A network and what it is trained on.

    Attributes:
        name: what it is called.
        modules: K.
        make: makes the network.
        shape: of a batch, (N, C, H, W) or (N, T).
        outputs: classes or tokens.
        cuts: where the checks of the section "right" cut it, by hand.
        channels_last: network and images are laid out so.
    """

    name: str
    modules: int
    make: Callable[[], nn.Module]
    shape: tuple[int, ...]
    outputs: int = 10
    cuts: tuple[str, ...] = ()
    channels_last: bool = False

    @property
    def language(self) -> bool:
        """Whether it takes tokens."""
        return len(self.shape) == 2

    def model(self) -> nn.Module:
        """The network, on the device, in training mode; always the same."""
        torch.manual_seed(0)
        model = self.make().to(DEVICE).train()
        return model.to(memory_format=torch.channels_last) if self.channels_last else model

    def batch(self, count: int | None = None, *, seed: int = 1) -> tuple[Any, Tensor]:
        """A batch and its target, of random numbers."""
        generator = torch.Generator().manual_seed(seed)
        shape = (count or self.shape[0], *self.shape[1:])
        if self.language:
            ids = torch.randint(self.outputs, shape, generator=generator).to(DEVICE)
            return {"input_ids": ids}, ids
        target = torch.randint(self.outputs, shape[:1], generator=generator).to(DEVICE)
        images = torch.randn(shape, generator=generator).to(DEVICE)
        return images.to(memory_format=torch.channels_last) if self.channels_last else images, target

    @property
    def criterion(self) -> Callable[[Tensor, Any], Tensor]:
        """The loss."""
        return next_token if self.language else F.cross_entropy

    def decouple(self, model: nn.Module, modules: int | None = None, **options: Any) -> tl.DecoupledNetwork:
        """Its local modules."""
        options = {"criterion": self.criterion, "sample": self.batch(2)[0], **options}
        if "cuts" in options:
            return tl.decouple(model, **options)
        return tl.decouple(model, modules or self.modules, **options)

    def plain(self, model: nn.Module, batch: Any, target: Tensor, dtype: torch.dtype | None = None) -> Tensor:
        """The loss, as one would write it by hand."""
        with autocast(dtype):
            return self.criterion(logits(model(**batch) if self.language else model(batch)), target)


def next_token(prediction: Tensor, ids: Tensor) -> Tensor:
    """Mean cross-entropy of the next token."""
    return F.cross_entropy(prediction[:, :-1].flatten(0, 1), ids[:, 1:].flatten())


def logits(output: Any) -> Tensor:
    """The prediction in what a network returns."""
    found: Tensor = output if isinstance(output, Tensor) else output.logits
    return found


def autocast(dtype: torch.dtype | None) -> contextlib.AbstractContextManager[Any]:
    """Forward passes in another dtype."""
    return contextlib.nullcontext() if dtype is None else torch.autocast(DEVICE.type, dtype=dtype)


def with_dropout(model: nn.Module, name: str, p: float = 0.1) -> nn.Module:
    """Put a dropout after every module of a name, such as ``bn2``."""
    for module in list(model.modules()):
        inner = getattr(module, name, None)
        if isinstance(inner, nn.Module) and module is not model:
            setattr(module, name, nn.Sequential(inner, nn.Dropout(p)))
    return model


def _resnet(depth: int) -> Callable[[], nn.Module]:
    from torchlocal.models import CifarResNet

    return lambda: CifarResNet((depth - 2) // 6)


def _resnet50(tiny: bool) -> nn.Module:
    import torchvision

    if tiny:
        model = torchvision.models.ResNet(torchvision.models.resnet.Bottleneck, [3, 1, 1, 1])
        model.layer3, model.layer4, model.fc = nn.Sequential(), nn.Sequential(), nn.Linear(512, 10)
        return model
    return torchvision.models.resnet50(num_classes=10)


def _vit(tiny: bool, **options: Any) -> nn.Module:
    import timm

    sizes: dict[str, Any] = (
        {"img_size": 32, "patch_size": 8, "embed_dim": 48, "num_heads": 3, "depth": 4} if tiny else {}
    )
    sizes |= options
    model: nn.Module = timm.create_model("vit_small_patch16_224", num_classes=10, **sizes)
    return model


def _gpt2(layers: int, width: int, length: int, vocabulary: int, dropout: float) -> nn.Module:
    import transformers

    config = transformers.GPT2Config(
        vocab_size=vocabulary,
        n_positions=length,
        n_embd=width,
        n_layer=layers,
        n_head=max(2, width // 64),
        use_cache=False,
        resid_pdrop=dropout,
        embd_pdrop=dropout,
        attn_pdrop=dropout,
        bos_token_id=0,
        eos_token_id=0,
    )
    model: nn.Module = transformers.GPT2LMHeadModel(config)
    return model


def _llama(layers: int) -> nn.Module:
    import transformers

    config = transformers.LlamaConfig(
        vocab_size=256,
        hidden_size=64,
        intermediate_size=128,
        num_hidden_layers=layers,
        num_attention_heads=4,
        tie_word_embeddings=True,
        attention_dropout=0.1,
        use_cache=False,
    )
    model: nn.Module = transformers.LlamaForCausalLM(config)
    return model


def small_cases(tiny: bool) -> list[Case]:
    """For the section "right": five networks with dropout, at small sizes."""
    depth, blocks = (8, ("layer1.0", "layer2.0")) if tiny else (32, ("layer1.1", "layer2.1", "layer3.1"))
    side, count = (32, 4) if tiny else (64, 8)
    stages = ("layer1.0", "layer1.1", "layer1.2") if tiny else ("layer1.2", "layer2.3", "layer3.5")
    vit = ("blocks.0", "blocks.1", "blocks.2") if tiny else ("blocks.2", "blocks.5", "blocks.8")
    drops: dict[str, Any] = {"proj_drop_rate": 0.1, "attn_drop_rate": 0.1}
    layers = ("0", "1", "2")
    drops |= {} if tiny else {"img_size": side}
    return [
        Case("resnet32", 4, lambda: with_dropout(_resnet(depth)(), "relu1"), (count, 3, 32, 32), cuts=blocks),
        Case("resnet50", 4, lambda: with_dropout(_resnet50(tiny), "bn2"), (count, 3, side, side), cuts=stages),
        Case("vit_small", 4, lambda: _vit(tiny, **drops), (8, 3, side, side), cuts=vit),
        Case(
            "gpt2",
            4,
            lambda: _gpt2(4, 64, 32, 256, 0.1),
            (8, 32),
            outputs=256,
            cuts=tuple(f"transformer.h.{i}" for i in layers),
        ),
        Case(
            "llama, tied",
            4,
            lambda: _llama(4),
            (8, 32),
            outputs=256,
            cuts=tuple(f"model.layers.{i}" for i in layers),
        ),
    ]


def large_case(name: str, tiny: bool, precision: str = "fp32") -> Case:
    """For the other sections: the networks at the size at which they are measured; ResNets in bf16 channels_last."""
    cases = {
        "resnet32": Case("resnet32", 16, _resnet(32), (1024, 3, 32, 32)),
        "resnet110": Case("resnet110", 55, _resnet(110), (1024, 3, 32, 32)),
        "resnet50": Case("resnet50", 16, lambda: _resnet50(False), (128, 3, 224, 224)),
        "resnet50 b256": Case("resnet50", 16, lambda: _resnet50(False), (256, 3, 224, 224)),
        "vit_small": Case("vit_small", 12, lambda: _vit(False), (128, 3, 224, 224)),
        "gpt2": Case("gpt2", 12, lambda: _gpt2(12, 768, 1024, 8192, 0.0), (8, 1024), outputs=8192),
    }
    if tiny:
        cases = {
            "resnet32": Case("resnet32", 3, _resnet(8), (32, 3, 16, 16)),
            "resnet110": Case("resnet110", 4, _resnet(8), (32, 3, 16, 16)),
            "resnet50": Case("resnet50", 3, lambda: _resnet50(True), (4, 3, 32, 32)),
            "resnet50 b256": Case("resnet50", 3, lambda: _resnet50(True), (8, 3, 32, 32)),
            "vit_small": Case("vit_small", 3, lambda: _vit(True), (4, 3, 32, 32)),
            "gpt2": Case("gpt2", 2, lambda: _gpt2(2, 32, 32, 64, 0.0), (4, 32), outputs=64),
        }
    return replace(cases[name], channels_last=precision == "bf16" and name.startswith("resnet"))


def parts_of(model: nn.Module) -> list[nn.Module]:
    """A ResNet by hand: the stem with the first block, a block each, the last block with the head."""
    names = [name for name, _ in model.named_children()]
    stages = [name for name in names if name.startswith("layer")]
    blocks = [block for name in stages for block in model.get_submodule(name).children()]
    before = [model.get_submodule(n) for n in names[: names.index(stages[0])]]
    after = [model.get_submodule(n) for n in names[names.index(stages[-1]) + 1 :]]
    if not any(isinstance(m, nn.Flatten) for m in after):
        after.insert(-1, nn.Flatten())
    return [nn.Sequential(*before, blocks[0]), *blocks[1:-1], nn.Sequential(blocks[-1], *after)]


# -------------------------------------------------------------------------------------- predictions, in other processes

DTYPES: dict[str, torch.dtype | None] = {"fp32": None, "bf16": torch.bfloat16}
# What is asked for of which network: (case, dtype, wanted); the first are needed first.
JOBS = [
    ("resnet110", "fp32", ("full", "exact")),
    ("resnet50 b256", "fp32", ("full", "exact")),
    ("vit_small", "fp32", ("full", "exact", "rival")),
    ("gpt2", "fp32", ("full", "exact", "rival")),
    ("resnet32", "bf16", ("rival", "largest")),
    ("resnet50", "bf16", ("rival", "largest")),
    ("vit_small", "bf16", ("rival", "largest")),
    ("gpt2", "bf16", ("rival", "largest")),
    ("resnet32", "fp32", ("rival",)),
    ("resnet50", "fp32", ("rival",)),
]
OF_SECTION = {"memory": range(0, 4), "time": range(2, 10), "captured": range(2, 10)}


@dataclass(frozen=True)
class Whole:
    """A criterion that takes only whole batches, so that no search cuts them: the rival that is exact."""

    criterion: Callable[[Tensor, Any], Tensor]
    count: int

    def __call__(self, prediction: Tensor, target: Any) -> Tensor:
        if prediction.shape[0] != self.count:
            raise ValueError("a part of a batch")
        return self.criterion(prediction, target)


def search(name: str, precision: str, wanted: Sequence[str], tiny: bool) -> dict[str, Any]:
    """Peaks that are predicted, plans that are found, and the seconds that each took, for one network and dtype.

    Returns:
        By method a dict with ``peak``, ``seconds`` and for guided steps ``plan``; or ``error``.
    """
    torch.set_num_threads(1 if not tiny else torch.get_num_threads())
    case = large_case(name, tiny, precision)
    batch, target = case.batch()
    options: dict[str, Any] = {} if DTYPES[precision] is None else {"autocast": DTYPES[precision]}
    model = case.model()
    start = time.perf_counter()
    net = case.decouple(model)
    found: dict[str, Any] = {"decouple": {"seconds": time.perf_counter() - start}}

    def find(method: str, work: Callable[[], dict[str, Any]]) -> None:
        start = time.perf_counter()
        try:
            result = work()
        except Exception as error:
            result = {"error": f"{type(error).__name__}: {' '.join(str(error).split())[:200]} ({location(error)})"}
        found[method] = {**result, "seconds": time.perf_counter() - start}

    def predicted(net: tl.DecoupledNetwork, step: str) -> dict[str, Any]:
        return {"peak": tl.memory.predict(net, batch, target, step=step, **options).peak_bytes}

    def planned(net: tl.DecoupledNetwork, memory: str | int) -> dict[str, Any]:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            plan = net.guided_plan(batch, target, memory=memory, **options)
        return {"peak": plan.peak_bytes, "plan": plan}

    find("local", lambda: predicted(net, "local"))
    find("plain", lambda: predicted(net, "plain"))
    if "full" in wanted:
        find("guided full", lambda: predicted(net, "guided"))
    if "rival" in wanted and "peak" in found["local"]:
        single = case.decouple(model, 1, criterion=Whole(case.criterion, case.shape[0]), sample=batch)
        find("rival", lambda: planned(single, found["local"]["peak"]))
    find("guided local", lambda: planned(net, "local"))
    if "exact" in wanted:
        find("guided exact", lambda: planned(net, "exact"))
    if "largest" in wanted:
        for step in ("plain", "local"):
            find(f"largest {step}", functools.partial(largest_batch, case, net, step, options))
    return found


def largest_batch(case: Case, net: tl.DecoupledNetwork, step: str, options: dict[str, Any]) -> dict[str, Any]:
    """The largest batch whose step fits into the budget with parameters and the state of SGD with momentum."""

    def predicted(count: int) -> tuple[int, int]:
        optimizer = functools.partial(torch.optim.SGD, lr=0.1, momentum=0.9)
        found = tl.memory.predict(net, *case.batch(count), step=step, optimizer=optimizer, **options)
        return found.total_bytes, found.resident_bytes

    few, more = max(2, case.shape[0] // 2), max(4, case.shape[0])
    (low, _), (high, _) = predicted(few), predicted(more)
    slope = (high - low) / (more - few)
    count = few + int((BUDGET - low) / slope)
    count = max(1, count if count < 32 else count // 8 * 8)
    return {"batch": count, "bytes": int(low + slope * (count - few))}


class Plans:
    """Results of :func:`search`, made in other processes beside the first sections, or here when they are asked for."""

    def __init__(self, tiny: bool, workers: int, jobs: Sequence[int], *, largest: bool = True) -> None:
        self.tiny, self.largest = tiny, largest
        self.known: dict[tuple[str, str], dict[str, Any]] = {}
        self.futures: dict[tuple[str, str], Future[dict[str, Any]]] = {}
        self.pool: ProcessPoolExecutor | None = None
        if workers and jobs:
            context = multiprocessing.get_context("spawn")
            self.pool = ProcessPoolExecutor(min(workers, len(jobs)), mp_context=context)
            for name, precision, wanted in (JOBS[i] for i in jobs):
                self.futures[name, precision] = self.pool.submit(search, name, precision, self.wanted(wanted), tiny)

    def wanted(self, names: Sequence[str]) -> list[str]:
        """Without the search for the largest batches, where nobody asks for them."""
        return [name for name in names if self.largest or name != "largest"]

    def get(self, name: str, precision: str, clock: Clock) -> dict[str, Any]:
        """What was found."""
        key = name, precision
        if key not in self.known:
            clock.check()
            wanted = next(w for n, p, w in JOBS if (n, p) == key)
            try:
                if key not in self.futures:
                    raise LookupError
                self.known[key] = self.futures[key].result(timeout=clock.left)
            except TimeoutError:
                raise OutOfTime from None
            except Exception as error:  # a process that died
                if not isinstance(error, LookupError):
                    print(f"search in another process: {type(error).__name__}: {error}", flush=True)
                self.known[key] = search(name, precision, self.wanted(wanted), self.tiny)
        return self.known[key]

    def settle(self, seconds: float) -> int:
        """Wait until nothing runs beside what is timed now, at most so long; returns how many were given up."""
        until = time.monotonic() + seconds
        given_up = 0
        for key, future in self.futures.items():
            try:
                if key not in self.known:
                    self.known[key] = future.result(timeout=max(0.0, until - time.monotonic()))
            except Exception:  # it is tried here when it is asked for
                given_up += 1
        self.close()
        return given_up

    def close(self) -> None:
        """End the processes."""
        if self.pool is not None:
            processes = list((self.pool._processes or {}).values())
            self.pool.shutdown(wait=False, cancel_futures=True)
            for process in processes:
                process.terminate()
            self.pool = None
        self.futures = {k: f for k, f in self.futures.items() if f.done() and not f.cancelled()}


# ----------------------------------------------------------------------------------------------------------- measuring


def synchronize() -> None:
    """Wait for the device."""
    if CUDA:
        torch.cuda.synchronize()


def clear(*modules: nn.Module) -> None:
    """Let go of all gradients."""
    for module in modules:
        for parameter in module.parameters():
            parameter.grad = None


def peak_of(step: Step) -> int:
    """Bytes above what is there at rest, by the allocator; on the CPU by the library's counter."""
    if not CUDA:
        return tl.memory.measure(step).peak_bytes
    synchronize()
    before = torch.cuda.memory_allocated()
    torch.cuda.reset_peak_memory_stats()
    step()
    synchronize()
    return torch.cuda.max_memory_allocated() - before


def counted(step: Step) -> int:
    """Bytes of tensors, without what kernels take inside themselves."""
    with tl.memory.PeakCounter() as counter:
        step()
    return counter.peak


def milliseconds(step: Step, times: int) -> float:
    """Per step, of several in a row, until the device is done."""
    if not CUDA:
        start = time.perf_counter()
        for _ in range(times):
            step()
        return (time.perf_counter() - start) * 1e3 / times
    begin, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
    begin.record()
    for _ in range(times):
        step()
    end.record()
    end.synchronize()
    return begin.elapsed_time(end) / times


def in_turns(
    methods: Mapping[str, Step], run: Run, *, rounds: int, seconds: float = 12.0, enough: float = 50.0, **labels: Any
) -> dict[str, list[float]]:
    """Milliseconds per step of every method, in rounds; every other round goes the other way round.

    Args:
        methods: the steps, which have run before.
        run: for the clock and failures.
        rounds: at most; fewer, but five, after ``seconds``, and but three where the section's time is up.
        seconds: for all rounds.
        enough: milliseconds that a measurement shall last at least, by several steps in a row.
        labels: for the rows of failures.
    """
    alive = dict(methods)
    repeat: dict[str, int] = {}
    times: dict[str, list[float]] = {name: [] for name in methods}
    until = time.monotonic() + seconds
    for index in range(-1, rounds):
        if (index >= 5 and time.monotonic() > until) or (index >= 3 and run.clock.left < 0):
            break
        for name in list(alive) if index % 2 else list(reversed(alive)):
            try:
                taken = milliseconds(alive[name], repeat.get(name, 1))
            except Exception as error:
                run.report.failed(error, method=name, **labels)
                del alive[name]
                continue
            if index < 0:  # to warm up
                repeat[name] = 1 if run.tiny else max(1, min(8, math.ceil(enough / taken)))
            else:
                times[name].append(taken)
    return {name: taken for name, taken in times.items() if taken}


def spread(times: Sequence[float]) -> tuple[float, float]:
    """Median, and half the distance between the quartiles relative to it."""
    median = statistics.median(times)
    if len(times) < 4:
        return median, (max(times) - min(times)) / 2 / median
    low, _, high = statistics.quantiles(times, n=4)
    return median, (high - low) / 2 / median


# --------------------------------------------------------------------------------------------------------------- right

Named = dict[str, "Tensor | None"]


def snapshot(model: nn.Module, *, gradients: bool = True) -> Named:
    """Parameters, buffers and gradients as they are."""
    found: Named = {name: p.detach().clone() for name, p in model.named_parameters()}
    found |= {name: b.detach().clone() for name, b in model.named_buffers()}
    if gradients:
        found |= {f"{n}.grad": None if p.grad is None else p.grad.clone() for n, p in model.named_parameters()}
    return found


def compared(ours: Named, theirs: Named) -> dict[str, Any]:
    """How many tensors differ, and by how much at most; ``relative`` is the largest ‖a − b‖ / ‖b‖."""
    differing, largest, relative = 0, 0.0, 0.0
    for name, b in theirs.items():
        a = ours[name]
        if a is None or b is None:
            if a is not b:
                differing, largest, relative = differing + 1, math.inf, math.inf
            continue
        if torch.equal(a, b):
            continue
        difference = a.double() - b.double()
        differing += 1
        largest = max(largest, difference.abs().max().item()) if difference.isfinite().all() else math.inf
        norm = b.double().norm().item()
        relative = max(relative, difference.norm().item() / norm if norm else math.inf)
    return {"tensors": len(theirs), "differing": differing, "largest": largest, "relative": relative}


@contextlib.contextmanager
def deterministic() -> Iterator[list[str]]:
    """One order of every sum, no TF32; what has no deterministic kernel is listed."""
    flags = torch.backends.cudnn.allow_tf32, torch.backends.cuda.matmul.allow_tf32, torch.backends.cudnn.benchmark
    heard: list[str] = []
    torch.backends.cudnn.allow_tf32 = torch.backends.cuda.matmul.allow_tf32 = torch.backends.cudnn.benchmark = False
    torch.use_deterministic_algorithms(True, warn_only=True)
    try:
        with warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("always")
            yield heard
        heard += sorted({str(w.message).split(".")[0][:120] for w in caught if "determinis" in str(w.message)})
    finally:
        torch.use_deterministic_algorithms(False)
        torch.backends.cudnn.allow_tf32, torch.backends.cuda.matmul.allow_tf32, torch.backends.cudnn.benchmark = flags


def hand_local(
    net: tl.DecoupledNetwork, case: Case, batch: Any, target: Tensor, dtype: torch.dtype | None, only: int | None = None
) -> None:
    """A local step by hand: hooks at the cuts detach, and every module learns from its own loss, or one of them does.

    Uses of the library only where the cuts are and the auxiliary networks.
    """
    last = len(case.cuts)

    def learn(k: int, features: Tensor, network: Callable[[Tensor], Tensor]) -> None:
        loss = case.criterion(network(features), target)
        if only in (None, k):
            with torch.autocast(DEVICE.type, enabled=False):
                loss.backward()

    def at(k: int) -> Callable[..., Any]:
        def hook(_: nn.Module, __: Any, output: Any) -> Any:
            features = output[0] if isinstance(output, tuple) else output
            learn(k, features, net.auxiliary[k])
            return (features.detach(), *output[1:]) if isinstance(output, tuple) else features.detach()

        return hook

    hooks = [net.backbone.get_submodule(cut).register_forward_hook(at(k)) for k, cut in enumerate(case.cuts)]
    try:
        with autocast(dtype):
            output = net.backbone(**batch) if case.language else net.backbone(batch)
            learn(last, logits(output), lambda prediction: prediction)
    finally:
        for hook in hooks:
            hook.remove()


def train(model: nn.Module, step: Callable[[int], Any], count: int = 2) -> None:
    """A few steps of SGD, from the same random numbers each; the last gradients stay."""
    optimizer = torch.optim.SGD(model.parameters(), lr=0.01, momentum=0.9)
    for i in range(count):
        optimizer.zero_grad()
        torch.manual_seed(10 + i)
        step(i)
        optimizer.step()


class Checks:
    """The checks of one network."""

    def __init__(self, run: Run, case: Case) -> None:
        self.run, self.case = run, case
        self.model = case.model()
        self.batches = [case.batch(seed=1), case.batch(seed=2)]
        self.reference: Named = {}  # ordinary training
        self.nets: dict[int | None, tl.DecoupledNetwork] = {}  # by number of modules; None: cut by hand
        self.heard: set[str] = set()

    def net(self, *, channels_last: bool = False, modules: int | None = None) -> tl.DecoupledNetwork:
        """The network anew, cut."""
        if modules not in self.nets:
            torch.manual_seed(3)
            how: dict[str, Any] = {"cuts": self.case.cuts} if modules is None else {"modules": modules}
            self.nets[modules] = self.case.decouple(copy.deepcopy(self.model), **how)
        net = copy.deepcopy(self.nets[modules])
        return net.to(memory_format=torch.channels_last) if channels_last else net

    def row(self, check: str, ours: Named, theirs: Named, *, equal: bool = True, close: float = 0.0) -> None:
        """Tell what differs."""
        found = compared(ours, theirs)
        holds = found["differing"] == 0 if equal else found["relative"] <= close
        self.run.report.row("right", network=self.case.name, check=check, **found, holds=holds)

    def plain(self, dtype: torch.dtype | None = None, *, channels_last: bool = False) -> Named:
        """Ordinary training."""
        model = copy.deepcopy(self.model)
        if channels_last:
            model = model.to(memory_format=torch.channels_last)
        train(model, lambda i: self.case.plain(model, *self._batch(i, channels_last), dtype).backward())
        return snapshot(model)

    def _batch(self, i: int, channels_last: bool) -> tuple[Any, Tensor]:
        batch, target = self.batches[i]
        return (batch.to(memory_format=torch.channels_last) if channels_last else batch), target

    def stepped(
        self, step: str, *, modules: int | None = None, channels_last: bool = False, **options: Any
    ) -> tuple[Named, tl.DecoupledNetwork]:
        """The backbone after the library's steps."""
        net = self.net(modules=modules, channels_last=channels_last)
        method = net.local_step if step == "local" else net.guided_step
        train(net, lambda i: method(*self._batch(i, channels_last), **options))
        return snapshot(net.backbone), net

    def local_by_hand(self, dtype: torch.dtype | None) -> tuple[Named, Named]:
        """Backbone and auxiliary networks after local steps, the library's and by hand."""
        ours, theirs = self.net(), self.net()
        train(ours, lambda i: ours.local_step(*self.batches[i], autocast=dtype))
        train(theirs, lambda i: hand_local(theirs, self.case, *self.batches[i], dtype))
        return snapshot(ours), snapshot(theirs)

    def isolation(self) -> None:
        """The gradients of module k come from the loss of module k alone."""
        net = self.net()
        torch.manual_seed(4)
        net.local_step(*self.batches[0])
        ours = {name: p.grad for name, p in net.named_parameters()}
        found: Named = {}
        for k in range(net.num_modules):
            twin = self.net()
            torch.manual_seed(4)
            hand_local(twin, self.case, *self.batches[0], None, only=k)
            for name, p in twin.named_parameters():
                before = found.get(name)  # tied parameters learn from every loss whose module uses them
                found[name] = p.grad if before is None else (before if p.grad is None else before + p.grad)
        self.row("gradients of module k = those of loss k alone", {n: ours[n] for n in found}, found)

    def basics(self) -> dict[str, Callable[[], None]]:
        """The checks that matter most."""

        def control() -> None:
            self.reference = self.plain()
            self.row("plain twice (control)", self.plain(), self.reference)

        def bf16() -> None:
            dtype = torch.bfloat16
            self.row("bf16 guided = plain", self.stepped("guided", autocast=dtype)[0], self.plain(dtype))
            self.row("bf16 local = by hand", *self.local_by_hand(dtype))

        return {
            "plain twice (control)": control,
            "guided = plain": lambda: self.row("guided = plain", self.stepped("guided")[0], self.reference),
            "K=1": lambda: self.row("K=1 local = plain", self.stepped("local", modules=1)[0], self.reference),
            "local = by hand": lambda: self.row("local = by hand", *self.local_by_hand(None)),
            "isolation": self.isolation,
            "bf16": bf16,
            "GradScaler": lambda: self.row("fp16 with GradScaler, guided = plain", *self.scaled()),
        }

    def recomputation(self) -> dict[str, Callable[[], None]]:
        """Those that recompute, and other layouts."""

        def recomputed(how: dict[str, str]) -> None:
            plan = self.net().guided_plan(*self.batches[0], **how)  # type: ignore[arg-type]
            found, _ = self.stepped("guided", memory=plan)
            label = "guided " + ", ".join(f"{k}={v}" for k, v in how.items()) + " = plain"
            if plan.recomputed:
                label += f" ({plan.recomputed:.2f} forward recomputed)"
            if plan.micro_batches > 1:  # BatchNorm sees the parts
                label += f", {plan.micro_batches} micro-batches"
                self.row(label, found, self.reference, equal=False, close=0.3)
            else:
                self.row(label, found, self.reference)

        def bf16() -> None:
            dtype = torch.bfloat16
            ours = self.stepped("guided", autocast=dtype, memory="exact")[0]
            self.row('bf16 guided memory="exact" = plain', ours, self.plain(dtype))

        def largest() -> None:
            ours = self.stepped("local", recompute="largest")[0]
            self.row('local recompute="largest" = local', ours, self.stepped("local")[0])

        def channels_last() -> None:
            ours = self.stepped("guided", channels_last=True)[0]
            self.row("channels_last guided = plain", ours, self.plain(channels_last=True))

        checks: dict[str, Callable[[], None]] = {"exact": lambda: recomputed({"memory": "exact"})}
        if self.case.name.startswith("resnet"):
            checks["channels_last"] = channels_last
        checks["modules"] = lambda: recomputed({"recompute": "modules"})
        checks["local"] = lambda: recomputed({"memory": "local"})
        if self.run.tiny and not self.case.language:  # searches take long
            return checks
        return checks | {"bf16 exact": bf16, "largest": largest}

    def run_all(self, checks: Mapping[str, Callable[[], None]]) -> None:
        """Run checks; one that fails does not keep the next from running."""
        start = time.perf_counter()
        try:
            with deterministic() as heard:
                for name, work in checks.items():
                    self.run.clock.check()
                    with noting(self.run.report, network=self.case.name, check=name):
                        work()
        finally:
            for message in sorted(set(heard) - self.heard):
                self.run.report.row("without a deterministic kernel", network=self.case.name, message=message)
            self.heard |= set(heard)
            what = f"{next(iter(checks))} to {list(checks)[-1]}"
            self.run.report.row("seconds", network=self.case.name, what=what, seconds=time.perf_counter() - start)

    def scaled(self) -> tuple[Named, Named]:
        """Steps in fp16 with a scaler, guided and plain."""

        def go(model: nn.Module, step: Callable[[int, torch.amp.GradScaler], Any]) -> None:
            optimizer = torch.optim.SGD(model.parameters(), lr=0.01, momentum=0.9)
            scaler = torch.amp.GradScaler(DEVICE.type, init_scale=2.0**10)
            for i in range(2):
                optimizer.zero_grad()
                torch.manual_seed(10 + i)
                step(i, scaler)
                scaler.step(optimizer)
                scaler.update()

        half, case = torch.float16, self.case
        net, model = self.net(), copy.deepcopy(self.model)
        go(net, lambda i, s: net.guided_step(*self.batches[i], autocast=half, backward=lambda x: s.scale(x).backward()))
        go(model, lambda i, s: s.scale(case.plain(model, *self.batches[i], half)).backward())
        return snapshot(net.backbone), snapshot(model)


def compiled_blocks(run: Run) -> None:
    """Compiled blocks, without dropout: against the same steps uncompiled, and among themselves."""
    backend = {"backend": "inductor"} if CUDA else {"backend": "aot_eager"}
    vision = Case("resnet8", 3, _resnet(8), (8, 3, 32, 32), cuts=("layer1.0", "layer2.0"))
    cuts = ("transformer.h.0",)
    text = Case("gpt2", 2, lambda: _gpt2(2, 64, 32, 256, 0.0), (8, 32), outputs=256, cuts=cuts)
    for case in (text, vision):  # which takes nearly a minute to compile
        if run.only and case.name not in run.only:
            continue
        with noting(run.report, network=case.name, check="compiled"):
            run.clock.check(10.0)
            checks = Checks(run, case)
            results: dict[str, Named] = {}
            for name, compile_ in (("eager", False), ("compiled", True)):
                net = checks.net()
                state = copy.deepcopy(net.state_dict())
                start = time.perf_counter()
                if compile_:
                    net.compile(**backend)
                steps: dict[str, Callable[..., Any]] = {
                    "guided": net.guided_step,
                    "local": net.local_step,
                    "exact": functools.partial(net.guided_step, memory="exact"),
                }
                for step, work in steps.items():
                    net.load_state_dict(state)
                    clear(net)
                    work(*checks.batches[0])
                    results[f"{name} {step}"] = snapshot(net.backbone)
                run.report.row(
                    "seconds", network=case.name, what=f"three steps, {name}", seconds=time.perf_counter() - start
                )
            for step in ("local", "guided"):
                found, expected = results[f"compiled {step}"], results[f"eager {step}"]
                checks.row(f"compiled {step} = eager, within 1 %", found, expected, equal=False, close=1e-2)
            found, full = results["compiled exact"], results["compiled guided"]
            checks.row('compiled guided memory="exact" = full, within 1e-4', found, full, equal=False, close=1e-4)


def right(run: Run) -> None:
    """The invariants on the device."""
    settings = {"cublas": os.environ["CUBLAS_WORKSPACE_CONFIG"], "tf32": "off", "deterministic": "on"}
    run.report.row("settings", **settings, steps="2 of SGD with momentum", compared="parameters, buffers, gradients")
    everything: list[Checks] = []
    for case in small_cases(run.tiny):
        if run.only and case.name not in run.only:
            continue
        with noting(run.report, network=case.name):
            try:
                everything.append(Checks(run, case))
            except ImportError as error:
                run.report.row("right", network=case.name, check=f"skipped: {error}")
    for checks in everything:
        checks.run_all(checks.basics())
    for checks in everything:
        checks.run_all(checks.recomputation())


def blocks(run: Run) -> None:
    """Compiled blocks, with deterministic kernels."""
    with deterministic():
        compiled_blocks(run)


# ---------------------------------------------------------------------------------------------------------------- fit


class Speeds(tl.Callback):
    """Notes how fast a run is, between two readings of its losses."""

    def __init__(self) -> None:
        self.seen: list[float] = []

    def on_step(self, state: RunState, values: Mapping[str, float]) -> None:
        """One reading."""
        self.seen.append(next(value for name, value in values.items() if name.endswith("_per_second")))


def fit(run: Run) -> None:
    """Runs of the trainer: what they end with, their steps called and captured, and how fast they are."""
    common = {"device": DEVICE.type, "tensorboard": False, "log_every": 5, "memory": "full", "precision": "fp32"}
    kinds: dict[str, dict[str, Any]] = {
        "pairs, resnet20, K=10": {
            "model": "resnet20", "modules": 10, "data": "pairs:fashion-mnist-small", "num_train": 10000,
            "num_validation": 500, "batch_size": 128, "lr": 0.1,
        },
        "text, gpt-tiny, K=8, solo": {
            "model": "gpt-tiny", "modules": 8, "rule": "solo", "rule_options": {"depth": 0}, "data": "text:stdlib",
            "epoch_rows": 4000, "num_validation": 8, "batch_size": 8, "optimizer": "adamw", "lr": 0.003,
            "weight_decay": 0.1, "weight_decay_of": "matrices", "clip": 1.0,
        },
    }  # fmt: skip
    steps = 4 if run.tiny else 60
    with tempfile.TemporaryDirectory() as folder:
        for name, options in kinds.items():
            if run.tiny:
                options |= {"model": {"resnet20": "resnet20", "gpt-tiny": "gpt-nano"}[options["model"]], "modules": 2}
            nets: dict[str, Named] = {}
            for how in ("called", "captured") if CUDA else ("called",):
                run.clock.check(5.0)
                speeds, out = Speeds(), Path(folder) / name / how
                with noting(run.report, run=name, how=how):
                    with deterministic():
                        config = tl.FitConfig.of(
                            **common, **options, steps=steps, guidance={"name": "phased", "share": 0.5}, out=str(out),
                            data_root=str(Path(folder) / "data"), capture=how == "captured",
                        )  # fmt: skip
                        start = time.perf_counter()
                        result = tl.fit(config, callbacks=[speeds], progress=False)
                    nets[how] = torch.load(out / "last.pt", weights_only=True)["net"]
                    kinds_of = {"local": speeds.seen[1 : len(speeds.seen) // 2], "guided": speeds.seen[-3:]}
                    size = options["batch_size"] * (result.get("tokens", 0) // (steps * options["batch_size"]) or 1)
                    ms = {f"{kind} ms": 1e3 * size / statistics.median(s) for kind, s in kinds_of.items() if s}
                    run.report.row("runs", run=name, how=how, seconds=time.perf_counter() - start, **ms)
            if len(nets) == 2:
                run.report.row("weights after the run", run=name, **compared(nets["captured"], nets["called"]))


# ----------------------------------------------------------------------------------------------------- synchronisation


def synchronisation(run: Run) -> None:
    """Steps under torch.cuda.set_sync_debug_mode."""
    bf16 = {"autocast": torch.bfloat16}
    steps: list[tuple[str, dict[str, Any]]] = [
        ("local", {}),
        ("local", bf16),
        ("guided", {}),
        ("guided", bf16),
        ("guided", {"memory": "local"}),
        ("guided", {"memory": "exact"}),
        ("guided", {"memory": "exact", **bf16}),
        ("local", {"recompute": "largest"}),
        ("guided", {"recompute": "modules"}),
    ]
    cases = [
        Case("resnet20", 3 if run.tiny else 10, _resnet(8 if run.tiny else 20), (64, 3, 32, 32)),
        Case("gpt2", 4, lambda: _gpt2(4, 64, 64, 256, 0.1), (16, 64), outputs=256),
    ]
    for case in cases:
        with noting(run.report, network=case.name):
            net = case.decouple(case.model())
            batch, target = case.batch()
            for step, options in steps:
                run.clock.check()
                label = {
                    "network": case.name,
                    "step": step,
                    "options": ", ".join(f"{k}={v}" for k, v in options.items()),
                }
                with noting(run.report, **label):
                    method: Any = net.local_step if step == "local" else net.guided_step
                    work = functools.partial(method, batch, target, **options)
                    work()  # what is found once for a layout of batch is found here
                    places = waits_of(work)
                    if places is None:
                        run.report.row("synchronisation", **label, holds="skipped: no CUDA device")
                    else:
                        row = {"holds": not places, "calls": len(places), "first": places[0] if places else "none"}
                        run.report.row("synchronisation", **label, **row)
                        for place in sorted(set(places)):
                            run.report.row("waits", **label, times=places.count(place), at=place)


def waits_of(step: Step) -> list[str] | None:
    """Where a step waits for the device: first by the error that it raises then, and all places by the warnings."""
    if not CUDA:
        step()
        return None
    synchronize()
    torch.cuda.set_sync_debug_mode("error")
    try:
        step()
        return []
    except RuntimeError as error:
        if "synchroniz" not in str(error):
            raise
        first = location(error)
    finally:
        torch.cuda.set_sync_debug_mode("default")
    places: list[str] = []

    def heard(message: Warning | str, *_: Any, **__: Any) -> None:
        if "synchroniz" in str(message):
            frames = [f for f in traceback.extract_stack() if "/torchlocal/" in f.filename]
            places.append(f"{Path(frames[-1].filename).name}:{frames[-1].lineno}" if frames else "?")

    with warnings.catch_warnings():
        warnings.simplefilter("always")
        before, warnings.showwarning = warnings.showwarning, heard
        torch.cuda.set_sync_debug_mode("warn")
        try:
            step()
        finally:
            torch.cuda.set_sync_debug_mode("default")
            warnings.showwarning = before
    return places or [first]


# -------------------------------------------------------------------------------------------------------------- memory


def memory(run: Run) -> None:
    """Measured against predicted peaks."""
    worst: dict[str, tuple[float, int]] = {}
    for index in OF_SECTION["memory"]:
        name, precision, _ = JOBS[index]
        run.clock.check()
        with noting(run.report, network=name):
            case = large_case(name, run.tiny, precision)
            found = run.plans.get(name, precision, run.clock)
            memory_of(run, case, precision, found, worst)
    for method, (ratio, excess) in worst.items():
        run.report.row("worst over networks", method=method, of_prediction=ratio, excess_MiB=excess / MIB)


def memory_of(run: Run, case: Case, precision: str, found: dict[str, Any], worst: dict[str, tuple[float, int]]) -> None:
    """One network."""
    net = case.decouple(case.model())
    batch, target = case.batch()
    labels = {"network": case.name, "K": net.num_modules, "batch": case.shape[0], "dtype": precision}

    def plain() -> None:
        case.plain(net.backbone, batch, target).backward()

    methods: dict[str, Step] = {"local": lambda: net.local_step(batch, target), "plain": plain}
    methods["guided full"] = lambda: net.guided_step(batch, target)
    for method in ("guided local", "guided exact"):
        plan = found.get(method, {}).get("plan")
        methods[method] = functools.partial(net.guided_step, batch, target, memory=plan)
    for method, step in methods.items():
        run.clock.check()
        prediction = found.get(method, {"error": "not predicted"})
        with noting(run.report, **labels, method=method):
            if "peak" not in prediction:
                run.report.row("failures", **labels, method=method, error="prediction", message=prediction.get("error"))
                if method in ("guided local", "guided exact"):
                    continue
            step()  # libraries take their workspaces at the first call
            clear(net)
            measured = peak_of(step)
            clear(net)
            row: dict[str, Any] = {"measured_MiB": measured / MIB}
            expected = prediction.get("peak")
            if expected:
                excess = measured - expected
                row = {"predicted_MiB": expected / MIB, **row, "of_prediction": measured / expected}
                row |= {"excess_MiB": excess / MIB, "prediction_s": prediction["seconds"]}
                before = worst.get(method, (0.0, 0))
                worst[method] = max(before[0], measured / expected), max(before[1], excess)
            plan = prediction.get("plan")
            if plan is not None:
                row |= {"micro_batches": plan.micro_batches, "recomputed": plan.recomputed}
            if run.clock.left > 15:
                row["counted_MiB"] = counted(step) / MIB
                clear(net)
            run.report.row("peaks above rest", **labels, method=method, **row)
            if (
                method == "guided local" and "peak" in found["local"]
            ):  # the plan that memory=BYTES finds for that number
                budget = found["local"]["peak"]
                run.report.row(
                    'memory=BYTES, set to 1.0 × the predicted local peak (the plan of "local")',
                    **labels,
                    budget_MiB=budget / MIB,
                    predicted_MiB=plan.peak_bytes / MIB,
                    measured_MiB=measured / MIB,
                    holds=measured <= budget,
                    margin_needed=measured / plan.peak_bytes,
                )


# ---------------------------------------------------------------------------------------------------------------- time


class Contest:
    """All ways to train one network in one precision."""

    def __init__(self, run: Run, name: str, precision: str) -> None:
        self.run, self.case = run, large_case(name, run.tiny, precision)
        self.dtype = DTYPES[precision]
        self.options: dict[str, Any] = {} if self.dtype is None else {"autocast": self.dtype}
        self.found = run.plans.get(name, precision, run.clock)
        case = self.case
        self.batch, self.target = case.batch()
        self.model = case.model()
        self.net = case.decouple(case.model())
        self.labels: dict[str, Any] = {
            "network": case.name,
            "K": self.net.num_modules,
            "batch": case.shape[0],
            "dtype": precision,
        }
        self.peaks: dict[str, int] = {}
        self.steps: dict[str, Step] = {}
        self.notes: dict[str, str] = {}
        self.results: dict[str, list[float]] = {}

    def add(self, name: str, owner: nn.Module, learn: Step, note: str = "") -> int | None:
        """A method: its peak is measured in its second step; returned is that."""
        optimizer = torch.optim.SGD(owner.parameters(), lr=1e-4, momentum=0.9)

        def step() -> None:
            learn()
            optimizer.step()
            optimizer.zero_grad()

        with noting(self.run.report, **self.labels, method=name):
            self.run.clock.check()
            step()
            clear(owner)
            self.peaks[name] = peak_of(learn)
            step()
            clear(owner)
            self.steps[name], self.notes[name] = step, note
            return self.peaks[name]
        return None

    def plain(self, model: nn.Module, batch: Any = None, target: Tensor | None = None, share: float = 1.0) -> None:
        """An ordinary step by hand."""
        batch = self.batch if batch is None else batch
        loss = self.case.plain(model, batch, self.target if target is None else target, self.dtype)
        (loss * share if share != 1.0 else loss).backward()

    def in_parts(self, model: nn.Module, count: int) -> Step:
        """An ordinary step in micro-batches, by hand."""
        pieces: list[tuple[Any, Tensor]] = []
        for i, rows in enumerate(torch.arange(self.target.shape[0]).chunk(count)):
            part = slice(int(rows[0]), int(rows[-1]) + 1)
            inputs = {k: v[part] for k, v in self.batch.items()} if self.case.language else self.batch[part]
            pieces.append((inputs, self.target[part]))
            del i

        def learn() -> None:
            for inputs, target in pieces:
                self.plain(model, inputs, target, 1 / len(pieces))

        return learn

    def checkpointed(self, model: nn.Module) -> tuple[Step, str]:
        """An ordinary step with torch.utils.checkpoint, or with the network's own use of it."""
        if self.case.language:
            model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})  # type: ignore[operator]
            return lambda: self.plain(model), "gradient_checkpointing_enable(), every block"
        if hasattr(model, "set_grad_checkpointing"):
            model.set_grad_checkpointing(True)  # type: ignore[operator]
            return lambda: self.plain(model), "set_grad_checkpointing(), every block"
        parts = parts_of(model)
        size = max(1, round(math.sqrt(len(parts))))
        segments = [nn.Sequential(*parts[i : i + size]) for i in range(0, len(parts), size)]

        def learn() -> None:
            with autocast(self.dtype):
                features = self.batch
                for segment in segments[:-1]:
                    features = checkpoint(segment, features, use_reentrant=False)
                loss = self.case.criterion(segments[-1](features), self.target)
            loss.backward()

        return learn, f"{len(segments)} segments, all but the last run twice"

    def gather(self) -> None:
        """Every method that can run."""
        case, net, found, run = self.case, self.net, self.found, self.run
        batch, target, options = self.batch, self.target, self.options
        self.add("end-to-end", self.model, lambda: self.plain(self.model))
        local = self.add("local", net, lambda: net.local_step(batch, target, **options))
        plan = found.get("guided local", {}).get("plan")
        if plan is not None:
            note = f"{plan.micro_batches} micro-batches, {plan.recomputed:.2f} of a forward recomputed"
            guided = functools.partial(net.guided_step, batch, target, memory=plan, **options)
            self.add("guided local", net, guided, note)
        else:
            run.report.row("failures", **self.labels, method="guided local", message=str(found.get("guided local")))
        if local is not None:
            self.micro_batched(local)
        plan = found.get("rival", {}).get("plan")
        if plan is not None:
            twin = copy.deepcopy(self.model)
            single = case.decouple(twin, 1, criterion=Whole(case.criterion, case.shape[0]), sample=batch)
            note = f"{plan.micro_batches} micro-batches, {plan.recomputed:.2f} of a forward recomputed"
            if plan.peak_bytes > found["local"]["peak"]:
                note += f"; smallest plan found, predicted {plan.peak_bytes / found['local']['peak']:.2f} × local"
            exact = functools.partial(single.guided_step, batch, target, memory=plan, **options)
            self.add("end-to-end, exact, local peak", single, exact, note)
        else:
            run.report.row("failures", **self.labels, method="exact rival", message=str(found.get("rival")))
        with noting(run.report, **self.labels, method="checkpoint"):
            twin = copy.deepcopy(self.model)
            learn, note = self.checkpointed(twin)
            self.add("torch.utils.checkpoint", twin, learn, note)
        self.add("guided full", net, lambda: net.guided_step(batch, target, **options))

    def micro_batched(self, local: int) -> None:
        """The fewest micro-batches, of powers of two, in which end-to-end takes no more than the local step."""
        count = 2
        while count <= self.case.shape[0]:
            learn = self.in_parts(self.model, count)
            clear(self.model)
            with noting(self.run.report, **self.labels, method=f"{count} micro-batches"):
                self.run.clock.check()
                taken = peak_of(learn)
                clear(self.model)
                if taken <= local or 2 * count > self.case.shape[0]:
                    fits = "" if taken <= local else f", which do not fit ({taken / local:.2f} × the local peak)"
                    self.add("end-to-end, micro-batches", self.model, learn, f"{count} micro-batches{fits}")
                    return
            count *= 2

    def measure(self, rounds: int) -> None:
        """Time all in turns, and tell."""
        self.results = in_turns(self.steps, self.run, rounds=rounds, **self.labels)
        base = self.results.get("end-to-end")
        for name, times in self.results.items():
            median, width = spread(times)
            row: dict[str, Any] = {"ms": median, "iqr_half": width, "n": len(times)}
            if base:
                row["of_end_to_end"] = median / statistics.median(base)
            row |= {"peak_MiB": self.peaks[name] / MIB, "note": self.notes[name]}
            if "local" in self.peaks:
                row["peak_of_local"] = self.peaks[name] / self.peaks["local"]
            self.run.report.row("time and peak of a step", **self.labels, method=name, **row)
        if "local" in self.results and "guided local" in self.results:
            self.ratios()

    def ratios(self) -> None:
        """PGL at 20 % against its rivals, by rounds."""
        local, guided = self.results["local"], self.results["guided local"]
        pgl = [0.8 * a + 0.2 * b for a, b in zip(local, guided, strict=False)]
        row: dict[str, Any] = {"pgl_ms": statistics.median(pgl), "n": len(pgl)}
        rivals = {
            "pgl/micro-batched (≤ .90)": "end-to-end, micro-batches",
            "pgl/exact (≤ .60)": "end-to-end, exact, local peak",
            "pgl/checkpoint": "torch.utils.checkpoint",
            "pgl/end-to-end": "end-to-end",
        }
        for label, rival in rivals.items():
            if rival in self.results:
                row[label] = statistics.median(a / b for a, b in zip(pgl, self.results[rival], strict=False))
        if "end-to-end" in self.results:
            row["local/end-to-end"] = statistics.median(
                a / b for a, b in zip(local, self.results["end-to-end"], strict=False)
            )
        self.run.report.row("PGL at 20 % guided, of its rivals", **self.labels, **row)

    def largest(self) -> None:
        """The largest batches into 8 GiB, by prediction, tried once."""
        for method, owner in (("plain", self.model), ("local", self.net)):
            entry = self.found.get(f"largest {method}")
            if not entry or "batch" not in entry:
                continue
            self.run.clock.check()
            with noting(self.run.report, **self.labels, method=f"largest batch, {method}"):
                count = min(entry["batch"], 64) if self.run.tiny else entry["batch"]
                row: dict[str, Any] = {"method": method, "largest_batch": entry["batch"]}
                row["predicted_GiB"] = entry["bytes"] / 2**30
                if CUDA:
                    row |= self.tried(method, owner, count)
                labels = {k: v for k, v in self.labels.items() if k != "batch"}
                self.run.report.row("largest batch into 8 GiB", **labels, **row)

    def tried(self, method: str, owner: nn.Module, count: int) -> dict[str, Any]:
        """A step of so many examples, and all that it takes with parameters and momentum."""
        batch, target = self.case.batch(count)
        clear(owner)
        if method == "plain":
            taken = peak_of(lambda: self.case.plain(owner, batch, target, self.dtype).backward())
        else:
            taken = peak_of(lambda: self.net.local_step(batch, target, **self.options))
        clear(owner)
        tensors = [*owner.parameters(), *owner.parameters(), *owner.buffers(), target]
        tensors += list(batch.values()) if isinstance(batch, dict) else [batch]
        total = taken + sum(t.numel() * t.element_size() for t in tensors)
        return {"measured_GiB": total / 2**30, "holds": total <= BUDGET}


def time_(run: Run) -> None:
    """All ways to train, in turns."""
    given_up = run.plans.settle(min(60.0, run.clock.left / 3))
    run.report.row(
        "settings",
        cudnn_tf32=torch.backends.cudnn.allow_tf32,
        matmul_tf32=torch.backends.cuda.matmul.allow_tf32,
        cudnn_benchmark=torch.backends.cudnn.benchmark,
        bf16="autocast, ResNets channels_last",
        rule="dgl",
        searches_given_up=given_up,
        optimizer="SGD with momentum, its step timed too",
    )
    order = [
        (name, precision) for precision in ("bf16", "fp32") for name in ("resnet32", "resnet50", "vit_small", "gpt2")
    ]
    for name, precision in order[:5] if run.tiny else order:
        run.clock.check(4.0)
        contest = None
        with noting(run.report, network=name, dtype=precision):
            contest = Contest(run, name, precision)
            contest.gather()
            contest.measure(2 if run.tiny else 12)
            contest.largest()
        del contest
        gc.collect()
        if CUDA:
            torch.cuda.empty_cache()


# ------------------------------------------------------------------------------------------------------------ captured


def captured(run: Run) -> None:
    """All ways to train as CUDA graphs (``torchlocal.capture``): right, and their times in turns."""
    order = [(name, "bf16") for name in ("resnet32", "vit_small", "gpt2", "resnet50")]
    order += [(name, "fp32") for name, _ in order]
    if CUDA:
        run.report.row("settings", searches_given_up=run.plans.settle(min(90.0, run.clock.left / 2)))
    for name, precision in order[:2] if run.tiny else order:
        run.clock.check(3.0)
        with noting(run.report, network=name, dtype=precision):
            captured_of(run, name, precision)
        gc.collect()
        if CUDA:
            torch.cuda.empty_cache()


def captured_of(run: Run, name: str, precision: str) -> None:
    """One network in one precision."""
    case, dtype = large_case(name, run.tiny, precision), DTYPES[precision]
    options: dict[str, Any] = {} if dtype is None else {"autocast": dtype}
    found = run.plans.get(name, precision, run.clock)
    batch, target = case.batch()
    net, single = case.decouple(case.model()), case.decouple(case.model(), 1)
    labels: dict[str, Any] = {"network": name, "K": net.num_modules, "batch": case.shape[0], "dtype": precision}
    peak = peak_of(lambda: net.local_step(batch, target, **options))
    parts = fewest_parts(single, batch, target, peak, options)
    methods: dict[str, tuple[tl.DecoupledNetwork, str, dict[str, Any]]] = {
        "end-to-end": (single, "guided_step", {}),
        "local": (net, "local_step", {}),
        "guided full": (net, "guided_step", {}),
        f"end-to-end, {parts.micro_batches} micro-batches": (single, "guided_step", {"memory": parts}),
    }
    for label, owner, key in (("guided local", net, "guided local"), ("end-to-end, exact", single, "rival")):
        if "plan" in found.get(key, {}):
            methods[label] = owner, "guided_step", {"memory": found[key]["plan"]}
    steps: dict[str, Step] = {}
    for label, (owner, kind, more) in methods.items():
        run.clock.check()
        with noting(run.report, **labels, method=f"{label}, captured"):
            step = getattr(owner, kind)
            called = functools.partial(step, batch, target, **options, **more)
            steps[label] = functools.partial(_cleared, owner, called)
            if not CUDA:
                continue
            with deterministic():
                clear(owner)
                state = {n: t.clone() for n, t in owner.state_dict().items()}
                graph = tl.capture(step, batch, target, **options, **more)
                graph(batch, target)
                theirs = {n: None if p.grad is None else p.grad.clone() for n, p in owner.named_parameters()}
                buffers = {n: b.clone() for n, b in owner.named_buffers()}
                owner.load_state_dict(state)
                clear(owner)
                called()
                result = compared({**theirs, **buffers}, {**dict(_gradients(owner)), **dict(owner.named_buffers())})
            run.report.row("captured against called: gradients and buffers", **labels, method=label, **result)
            del graph
            clear(owner)
            steps[f"{label}, captured"] = functools.partial(
                tl.capture(step, batch, target, **options, **more), batch, target
            )
    times = in_turns(steps, run, rounds=2 if run.tiny else 12, seconds=8.0, **labels)
    base = statistics.median(times["end-to-end"])
    for label, measured in times.items():
        median, width = spread(measured)
        row = {"ms": median, "iqr_half": width, "n": len(measured), "of_end_to_end": median / base}
        run.report.row("captured and called", **labels, method=label, **row)
    for suffix in ("", ", captured"):
        if not {f"local{suffix}", f"guided local{suffix}"} <= set(times):
            continue
        pgl = 0.8 * statistics.median(times[f"local{suffix}"]) + 0.2 * statistics.median(times[f"guided local{suffix}"])
        ratios = {"how": suffix.strip(", ") or "called", "pgl_ms": pgl}
        for label in ("end-to-end", f"end-to-end, {parts.micro_batches} micro-batches", "end-to-end, exact"):
            if f"{label}{suffix}" in times:
                rival = label if "micro" not in label else "micro-batches"
                ratios[f"pgl / {rival}"] = pgl / statistics.median(times[f"{label}{suffix}"])
        run.report.row("PGL at 20 % guided, captured and called, of its rivals", **labels, **ratios)


def _gradients(module: nn.Module) -> Iterator[tuple[str, Tensor | None]]:
    return ((name, parameter.grad) for name, parameter in module.named_parameters())


def _cleared(module: nn.Module, step: Step) -> None:
    step()
    clear(module)


def fewest_parts(
    single: tl.DecoupledNetwork, batch: Any, target: Tensor, peak: int, options: dict[str, Any]
) -> GuidedPlan:
    """The fewest micro-batches, of powers of two, in which one module's step takes no more than this."""
    count = 2
    while True:
        plan = GuidedPlan(tree=Tape(0, len(single.partition.units)), micro_batches=count)
        clear(single)
        taken = peak_of(functools.partial(single.guided_step, batch, target, memory=plan, **options))
        clear(single)
        if taken <= peak or 2 * count > target.shape[0]:
            return plan
        count *= 2


# ---------------------------------------------------------------------------------------------------------------- host


class Captured:
    """A step on fixed tensors as a CUDA graph; the network is as before, but for the gradients."""

    def __init__(self, learn: Step, module: nn.Module) -> None:
        state = {name: t.clone() for name, t in module.state_dict().items()}
        side = torch.cuda.Stream()
        side.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(side):
            for _ in range(3):
                clear(module)
                learn()
        torch.cuda.current_stream().wait_stream(side)
        clear(module)
        self.graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(self.graph):
            self.losses = learn()
        self.parameters = [p for p in module.parameters() if p.grad is not None]
        self.gradients = [p.grad for p in self.parameters]
        with torch.no_grad():
            module.load_state_dict(state)

    def adopt(self) -> None:
        """Have the parameters' gradients be those of this graph."""
        for parameter, gradient in zip(self.parameters, self.gradients, strict=True):
            parameter.grad = gradient

    def __call__(self) -> None:
        self.graph.replay()


def host(run: Run) -> None:
    """How long the call of a step takes, and how long until the device is done; CUDA graphs."""
    count = 8 if run.tiny else 128
    for precision in ("fp32", "bf16"):
        run.clock.check()
        case = large_case("resnet32", run.tiny, precision)
        case = replace(case, shape=(count, *case.shape[1:]))
        dtype = DTYPES[precision]
        options: dict[str, Any] = {} if dtype is None else {"autocast": dtype}
        batch, target = case.batch()
        model, net = case.model(), case.decouple(case.model())

        def plain() -> list[Tensor]:
            loss = case.plain(model, batch, target, dtype)  # noqa: B023  # called in this turn of the loop
            loss.backward()
            return [loss.detach()]

        steps: dict[str, tuple[nn.Module, Callable[[], list[Tensor]]]] = {
            "end-to-end": (model, plain),
            "local": (net, functools.partial(net.local_step, batch, target, **options)),
            "guided full": (net, functools.partial(net.guided_step, batch, target, **options)),
            "guided, modules again": (
                net,
                functools.partial(net.guided_step, batch, target, recompute="modules", **options),
            ),
        }
        labels: dict[str, Any] = {"network": case.name, "K": net.num_modules, "batch": count, "dtype": precision}
        times = host_times({name: step for name, (_, step) in steps.items()}, (model, net), 3 if run.tiny else 20)
        for name, (call, whole) in times.items():
            row = {"call_ms": statistics.median(call), "done_ms": statistics.median(whole), "n": len(call)}
            row["host_share"] = statistics.median(a / b for a, b in zip(call, whole, strict=True))
            run.report.row("until the call returns, until the device is done", **labels, method=name, **row)
        if not CUDA:
            run.report.row("CUDA graphs", **labels, method="all", note="skipped: no CUDA device")
            continue
        graphs(run, {name: steps[name] for name in ("end-to-end", "local", "guided full")}, labels)


def host_times(
    steps: Mapping[str, Step], modules: Sequence[nn.Module], rounds: int
) -> dict[str, list[tuple[float, ...]]]:
    """By method the milliseconds of the calls and of the whole, in rounds."""
    found: dict[str, list[tuple[float, float]]] = {name: [] for name in steps}
    for index in range(-2, rounds):
        for name, step in steps.items():
            clear(*modules)
            synchronize()
            start = time.perf_counter()
            step()
            called = time.perf_counter()
            synchronize()
            done = time.perf_counter()
            if index >= 0:
                found[name].append(((called - start) * 1e3, (done - start) * 1e3))
    clear(*modules)
    return {name: list(zip(*pairs, strict=True)) for name, pairs in found.items()}


def graphs(run: Run, steps: Mapping[str, tuple[nn.Module, Callable[[], list[Tensor]]]], labels: dict[str, Any]) -> None:
    """Steps as CUDA graphs: do they capture, are they right, what do they give."""
    contest: dict[str, Step] = {}
    for name, (owner, step) in steps.items():
        run.clock.check()
        with noting(run.report, **labels, method=f"{name}, captured"):
            clear(owner)
            with deterministic():  # the kernels that the graph repeats are chosen here, too
                captured = Captured(step, owner)
                state = {n: t.clone() for n, t in owner.state_dict().items()}
                captured()
                synchronize()
                theirs = {n: None if p.grad is None else p.grad.clone() for n, p in owner.named_parameters()}
                owner.load_state_dict(state)
                clear(owner)
                step()
                ours = {n: p.grad for n, p in owner.named_parameters()}
                found = compared(theirs, ours)
            run.report.row("captured against called, gradients", **labels, method=name, **found)
            del captured
            clear(owner)
            graph = Captured(step, owner)
            clear(owner)

            def called(owner: nn.Module = owner, step: Step = step) -> None:
                step()
                clear(owner)

            contest |= {name: called, f"{name}, captured": graph}
    for name, times in in_turns(contest, run, rounds=15, **labels).items():
        median, width = spread(times)
        run.report.row("CUDA graphs", **labels, method=name, ms=median, iqr_half=width, n=len(times))


# ------------------------------------------------------------------------------------------------------------- streams


class TwoStreams:
    """A local step by hand whose modules take turns on two streams.

    Module k's forward, loss and backward are queued on stream k mod 2. Module k + 1's forward waits for module k's
    output alone, so it runs beside module k's backward; it comes after module k - 1's, which is on its own stream, so
    no more than two modules are alive.
    """

    def __init__(self, parts: Sequence[nn.Module], auxiliary: Sequence[nn.Module], dtype: torch.dtype | None) -> None:
        self.parts, self.auxiliary, self.dtype = parts, auxiliary, dtype
        self.streams = [torch.cuda.Stream(), torch.cuda.Stream()]

    def __call__(self, features: Tensor, target: Tensor) -> None:
        main = torch.cuda.current_stream()
        ready = torch.cuda.Event()
        ready.record(main)
        for stream in self.streams:
            stream.wait_stream(main)
        last = len(self.parts) - 1
        waiting: Tensor | None = None  # the loss of the module before: its backward is queued after this forward
        for k, part in enumerate(self.parts):
            stream = self.streams[k % 2]
            with torch.cuda.stream(stream):
                stream.wait_event(ready)
                features.record_stream(stream)
                with autocast(self.dtype):
                    output = part(features)
                ready = torch.cuda.Event()
                ready.record(stream)
                features = output.detach()
                with autocast(self.dtype):
                    loss = F.cross_entropy(self.auxiliary[k](output) if k < last else output, target)
                del output
            if waiting is not None:
                with torch.cuda.stream(self.streams[1 - k % 2]):
                    waiting.backward()
            waiting = loss
            del loss
        assert waiting is not None
        with torch.cuda.stream(self.streams[last % 2]):
            waiting.backward()
        for stream in self.streams:
            main.wait_stream(stream)


def one_stream(
    parts: Sequence[nn.Module], auxiliary: Sequence[nn.Module], dtype: torch.dtype | None, x: Tensor, y: Tensor
) -> None:
    """The same by hand, as ever."""
    features = x
    for k, part in enumerate(parts):
        with autocast(dtype):
            output = part(features)
            loss = F.cross_entropy(auxiliary[k](output) if k < len(parts) - 1 else output, y)
        features = output.detach()
        del output
        loss.backward()
        del loss


def streams(run: Run) -> None:
    """Is a local step on two streams right, and faster?"""
    sizes = {"resnet32": (8, 1024), "resnet32, small batch": (8, 128), "resnet50": (4, 128)}
    if not CUDA:
        run.report.row("two streams", network="all", note="skipped: no CUDA device; the loop by hand is run on one")
    for name, (few, many) in sizes.items():
        for precision in ("bf16", "fp32"):
            run.clock.check()
            if run.tiny and precision == "fp32":
                continue
            with noting(run.report, network=name, dtype=precision):
                base = large_case(name.split(",")[0], run.tiny, precision)
                case = replace(base, name=name, shape=(few if run.tiny else many, *base.shape[1:]))
                two_streams(run, case, precision)


def two_streams(run: Run, case: Case, precision: str) -> None:
    """One network."""
    dtype = DTYPES[precision]
    parts = parts_of(case.model())
    x, y = case.batch()
    net = tl.decouple(parts, sample=x)
    options: dict[str, Any] = {} if dtype is None else {"autocast": dtype}
    auxiliary = list(net.auxiliary)
    labels: dict[str, Any] = {"network": case.name, "K": len(parts), "batch": case.shape[0], "dtype": precision}
    model = case.model()
    learns: dict[str, tuple[nn.Module, Step]] = {
        "end-to-end": (model, lambda: case.plain(model, x, y, dtype).backward()),
        "local step": (net, lambda: net.local_step(x, y, **options)),
        "by hand, one stream": (net, lambda: one_stream(parts, auxiliary, dtype, x, y)),
    }
    if CUDA:
        twice = TwoStreams(parts, auxiliary, dtype)
        learns["by hand, two streams"] = (net, lambda: twice(x, y))
    with deterministic():
        gradients: dict[str, Named] = {}
        for name, (owner, learn) in learns.items():
            clear(owner)
            learn()
            synchronize()
            gradients[name] = {n: None if p.grad is None else p.grad.clone() for n, p in owner.named_parameters()}
            clear(owner)
    for name in list(learns)[2:]:
        found = compared(gradients[name], gradients["local step"])
        run.report.row("gradients against the local step's", **labels, method=name, **found)
    peaks = {}
    for name, (owner, learn) in learns.items():
        learn()
        clear(owner)
        peaks[name] = peak_of(learn)
        clear(owner)

    def cleared(owner: nn.Module, learn: Step) -> Step:
        def step() -> None:
            learn()
            clear(owner)

        return step

    methods = {name: cleared(*pair) for name, pair in learns.items()}
    times = in_turns(methods, run, rounds=2 if run.tiny else 10, **labels)
    for name, taken in times.items():
        median, width = spread(taken)
        row = {"ms": median, "iqr_half": width, "n": len(taken), "peak_MiB": peaks[name] / MIB}
        if "local step" in times:
            row["of_local_step"] = median / statistics.median(times["local step"])
        run.report.row("two streams", **labels, method=name, **row)


# ------------------------------------------------------------------------------------------------------------ accuracy


def read_idx(folder: Path, name: str) -> Tensor:
    """An IDX file of bytes, plain or gzipped."""
    path = next(p for p in (folder / name, folder / f"{name}.gz") if p.is_file())
    content = path.read_bytes()
    if content[:2] == b"\x1f\x8b":
        content = gzip.decompress(content)
    shape = [int.from_bytes(content[4 + 4 * i : 8 + 4 * i], "big") for i in range(content[3])]
    values = np.frombuffer(content, dtype=np.uint8, offset=4 + 4 * len(shape)).reshape(shape)
    return torch.from_numpy(values.copy())


class Images:
    """Fashion-MNIST on the device; crops and mirrored there."""

    def __init__(self, folder: Path, most: int | None = None) -> None:
        names = (
            "train-images-idx3-ubyte",
            "train-labels-idx1-ubyte",
            "t10k-images-idx3-ubyte",
            "t10k-labels-idx1-ubyte",
        )
        train, labels, test, test_labels = (read_idx(folder, name)[:most].to(DEVICE) for name in names)
        self.padded = F.pad(train, (2, 2, 2, 2))
        self.labels, self.test_labels = labels.long(), test_labels.long()
        self.test = self._normal(test)

    @staticmethod
    def _normal(images: Tensor) -> Tensor:
        return (images.float().unsqueeze(1) / 255 - 0.286) / 0.353

    def batch(self, index: Tensor, generator: torch.Generator) -> tuple[Tensor, Tensor]:
        """Random 28 × 28 crops of images padded by 2, half of them mirrored."""
        count, side = len(index), torch.arange(28, device=DEVICE)
        shift = torch.randint(5, (2, count, 1), device=DEVICE, generator=generator)
        mirrored = torch.rand(count, 1, device=DEVICE, generator=generator) < 0.5
        rows, columns = shift[0] + side, shift[1] + torch.where(mirrored, 27 - side, side)
        images = self.padded[index[:, None, None], rows[:, :, None], columns[:, None, :]]
        return self._normal(images), self.labels[index]


class Training:
    """A network that is trained on fixed tensors, into which batches are copied; captured where that is possible."""

    def __init__(self, images: Images, seed: int, modules: int, depth: int, size: int, tiny: bool) -> None:
        torch.manual_seed(seed)
        options = {"num_classes": 10, "in_channels": 1, "image_size": (28, 28)}
        model = _resnet(8)() if tiny else build_model("resnet32", **options)  # type: ignore[arg-type]
        if tiny:
            model.conv1 = nn.Conv2d(1, 16, 3, padding=1, bias=False)
        model = model.to(DEVICE).train()
        self.images, self.seed, self.size, self.dtype = images, seed, size, torch.bfloat16
        self.x = torch.zeros(size, 1, 28, 28, device=DEVICE)
        self.y = torch.zeros(size, dtype=torch.long, device=DEVICE)
        self.net = tl.decouple(model, modules, sample=self.x)
        self.model = model
        self.start = {name: t.clone() for name, t in self.net.state_dict().items()}
        self.steps: dict[str, Step] = {}
        self.not_captured = "no CUDA device"  # why not

    def plain(self) -> list[Tensor]:
        """An ordinary step."""
        with autocast(self.dtype):
            loss = F.cross_entropy(self.model(self.x), self.y)
        loss.backward()
        return [loss.detach()]

    def step(self, kind: str) -> Step:
        """A step of one kind, which leaves its gradients; captured if that works."""
        if kind not in self.steps:
            learn: Step = {
                "plain": self.plain,
                "local": lambda: self.net.local_step(self.x, self.y, autocast=self.dtype),
                "guided": lambda: self.net.guided_step(self.x, self.y, autocast=self.dtype),
            }[kind]
            self.steps[kind] = self._captured(learn)
        return self.steps[kind]

    def _captured(self, learn: Step) -> Step:
        def called() -> None:
            clear(self.net)
            learn()

        if not CUDA:
            return called
        try:
            graph = Captured(learn, self.net)
        except Exception as error:
            self.not_captured = f"{type(error).__name__}: {error}"[:200]
            torch.cuda.synchronize()
            return called
        self.not_captured = ""

        def replayed() -> None:
            clear(self.net)  # of parameters that this kind of step does not reach
            graph.adopt()
            graph()

        return replayed

    def run(self, kinds: Callable[[int], str], epochs: int, steps: int | None = None) -> float:
        """Train from the start; returns seconds."""
        with torch.no_grad():
            self.net.load_state_dict(self.start)
        self.net.train()
        optimizer = torch.optim.SGD(self.net.parameters(), lr=0.1, momentum=0.9, weight_decay=5e-4, foreach=True)
        count = len(self.images.labels) // self.size
        total = steps or epochs * count
        generator = torch.Generator(DEVICE).manual_seed(self.seed)
        order = torch.empty(0)
        synchronize()
        start = time.perf_counter()
        for step in range(total):
            if step % count == 0:
                order = torch.randperm(len(self.images.labels), device=DEVICE, generator=generator)
            index = order[step % count * self.size :][: self.size]
            x, y = self.images.batch(index, generator)
            self.x.copy_(x)
            self.y.copy_(y)
            begun = (step - 0.8 * total) / (0.2 * total)  # high, and falling to zero over the last fifth
            optimizer.param_groups[0]["lr"] = 0.1 * (1.0 if begun < 0 else 0.5 * (1 + math.cos(math.pi * begun)))
            self.step(kinds(step))()
            optimizer.step()
        synchronize()
        return time.perf_counter() - start

    @torch.no_grad()
    def accuracy(self) -> float:
        """On the test images, in per cent."""
        self.net.eval()
        with autocast(self.dtype):
            parts = [self.model(x).argmax(1) for x in self.images.test.split(1000)]
        self.net.train()
        return 100.0 * (torch.cat(parts) == self.images.test_labels).float().mean().item()


def accuracy(run: Run) -> None:
    """ResNet-32 in 16 modules on Fashion-MNIST: as many epochs as the time lets, the same for every method."""
    if run.data is None:
        run.report.row("test accuracy", method="all", note="skipped: no --data FOLDER with the IDX files")
        return
    images = Images(run.data, 512 if run.tiny else None)
    size = 64 if run.tiny else 128
    modules = 3 if run.tiny else 16

    def kinds(method: str, total: int) -> Callable[[int], str]:
        return {
            "end-to-end": lambda step: "plain",
            "local": lambda step: "local",
            "PGL, last fifth": lambda step: "guided" if step >= 0.8 * total else "local",
            "PGL, every 5th": lambda step: "guided" if step % 5 == 4 else "local",
        }[method]

    methods = ("end-to-end", "local", "PGL, last fifth", "PGL, every 5th")
    trainings = {0: Training(images, 0, modules, 32, size, run.tiny)}
    per_step = 0.0
    for kind, share in (("plain", 1.0), ("local", 1.0 + 0.8 + 0.8), ("guided", 0.2 + 0.2)):
        trainings[0].run(lambda step, kind=kind: kind, 1, steps=3)  # type: ignore[misc]
        number = 3 if run.tiny else 30
        seconds = trainings[0].run(lambda step, kind=kind: kind, 1, steps=number) / number  # type: ignore[misc]
        run.report.row("time of a step", kind=kind, ms=seconds * 1e3, n=number, not_captured=trainings[0].not_captured)
        per_step += share * seconds
    per_epoch = per_step * (len(images.labels) // size)
    affordable = int(0.85 * (run.clock.left - 2) / per_epoch)
    seeds = [0, 1] if affordable >= 12 else [0]
    epochs = min(1 if run.tiny else 20, max(1, affordable // len(seeds)))
    run.report.row(
        "length", epochs=epochs, seeds=len(seeds), batch=size, images=len(images.labels), seconds_each_epoch=per_epoch
    )
    total = epochs * (len(images.labels) // size)
    for seed in seeds:
        if seed not in trainings:
            trainings.clear()
            trainings[seed] = Training(images, seed, modules, 32, size, run.tiny)
        for method in methods:
            with noting(run.report, method=method, seed=seed):
                run.clock.check()
                seconds = trainings[seed].run(kinds(method, total), epochs)
                found = trainings[seed].accuracy()
                run.report.row(
                    "test accuracy", method=method, seed=seed, epochs=epochs, accuracy=found, seconds=seconds
                )


# ------------------------------------------------------------------------------------------------------------ compiled


def compiled(run: Run) -> None:
    """torch.compile of a whole network with a budget of activations; compiled modules with CUDA graphs."""
    if not CUDA:
        run.report.row("compiled", method="all", note="skipped: no CUDA device")
        return
    import torch._functorch.config as functorch_config

    case, dtype = large_case("vit_small", run.tiny), torch.bfloat16
    batch, target = case.batch()
    net = case.decouple(case.model())
    eager = case.model()
    steps: dict[str, Step] = {}
    peaks: dict[str, int] = {}
    seconds: dict[str, float] = {}

    def add(name: str, owner: nn.Module, learn: Step) -> None:
        def step() -> None:
            learn()
            clear(owner)

        run.clock.check(5.0)
        with noting(run.report, network=case.name, method=name):
            start = time.perf_counter()
            step()
            synchronize()
            seconds[name] = time.perf_counter() - start
            step()
            peaks[name] = peak_of(step)
            steps[name] = step

    add("end-to-end", eager, lambda: case.plain(eager, batch, target, dtype).backward())
    add("local", net, lambda: net.local_step(batch, target, autocast=dtype))
    share = min(0.99, peaks["local"] / peaks["end-to-end"]) if len(peaks) == 2 else 0.15
    for budget in (share, 1.0):
        with noting(run.report, network=case.name, method=f"budget {budget:.2f}"):
            run.clock.check(30.0)
            torch._dynamo.reset()
            model = case.model()
            whole = torch.compile(model)
            with functorch_config.patch(activation_memory_budget=budget):
                add(
                    f"torch.compile, activation_memory_budget={budget:.2f}",
                    model,
                    lambda whole=whole: case.plain(whole, batch, target, dtype).backward(),  # type: ignore[misc]
                )
    tell_compiled(run, steps, peaks, seconds, network=case.name, batch=case.shape[0], dtype="bf16")
    small = replace(large_case("resnet32", run.tiny, "bf16"), shape=(128, 3, 32, 32))
    batch, target = small.batch()
    steps, peaks, seconds = {}, {}, {}
    for name, mode in (("local", None), ("local, compile()", "default"), ("local, reduce-overhead", "reduce-overhead")):
        with noting(run.report, network="resnet32", method=name):
            run.clock.check(20.0)
            own = small.decouple(small.model())
            if mode is not None:
                torch._dynamo.reset()
                own.compile(mode=mode)
            add(name, own, lambda own=own: own.local_step(batch, target, autocast=dtype))  # type: ignore[misc]
            tell_compiled(run, steps, peaks, seconds, network="resnet32", batch=128, dtype="bf16")
            if mode == "default":
                steps.pop(name, None)


def tell_compiled(
    run: Run, steps: Mapping[str, Step], peaks: Mapping[str, int], seconds: Mapping[str, float], **labels: Any
) -> None:
    """Time these in turns, and tell."""
    for name, times in in_turns(steps, run, rounds=10, **labels).items():
        median, width = spread(times)
        row = {"ms": median, "iqr_half": width, "n": len(times), "peak_MiB": peaks[name] / MIB}
        run.report.row("compiled", **labels, method=name, **row, first_call_s=seconds[name])


# -------------------------------------------------------------------------------------------------------- augmentation


def endless(split: Split, size: int) -> Iterator[tuple[Tensor, Tensor]]:
    """Batches to train on, one epoch after another."""
    for epoch in itertools.count():
        yield from split.batches(size, epoch=epoch, train=True)


def augmentation(run: Run) -> None:
    """Batches of images like CIFAR's, made on the host and on the device; and what a run does with them in a second."""
    count, size = (512, 16) if run.tiny else (50_000, 128)
    generator = torch.Generator().manual_seed(0)
    pixels = torch.randint(0, 256, (count, 3, 32, 32), generator=generator, dtype=torch.uint8)
    labels = torch.randint(10, (count,), generator=generator)
    source = MemorySource(pixels, Augmentation(padding=4, mode="reflect", flip=True))
    host = Split(source, labels, num_classes=10, mean=(0.49, 0.48, 0.45), std=(0.25, 0.24, 0.26))
    execution = Execution(device=DEVICE, precision="fp32", channels_last=False)
    there, differing, compared_ = host.to(DEVICE), 0, 8
    for (x, y), (expected, target) in itertools.islice(
        zip(endless(there, size), endless(host, size), strict=True), compared_
    ):
        differing += not (torch.equal(x.cpu(), expected) and torch.equal(y, target))
    places = waits_of(lambda: execution.place(next(endless(there, size))))
    waits = "skipped: no CUDA device" if places is None else ", ".join(sorted(set(places))) or "nowhere"
    run.report.row("batches of the device", batches=compared_, differing=differing, waits=waits)

    def made(split: Split, place: Callable[[Any], Any]) -> Callable[[], tuple[Tensor, Tensor]]:
        batches = endless(split, size)
        return lambda: place(next(batches))

    def unpinned(batch: tuple[Tensor, Tensor]) -> tuple[Tensor, ...]:
        return tuple(tensor.to(DEVICE, non_blocking=True) for tensor in batch)

    ways = {
        "host": made(host, unpinned), "host, pinned": made(host, execution.place),
        "device": made(there, execution.place),
    }  # fmt: skip
    tell_speeds(run, ways, size, network="none", step="none")
    x, y = ways["device"]()
    ways["one batch, over and over"] = lambda: (x, y)
    for depth, modules in ((8, 3),) if run.tiny else ((20, 10), (32, 16)):
        case = Case(f"resnet{depth}", modules, _resnet(depth), (size, 3, 32, 32))
        for kind in ("local", "guided"):
            with noting(run.report, network=case.name, step=kind):
                run.clock.check(5.0)
                net = case.decouple(case.model())
                optimizer = torch.optim.SGD(net.parameters(), lr=0.01, momentum=0.9)
                called: Any = net.local_step if kind == "local" else net.guided_step
                learn = tl.capture(called, x, y) if CUDA else called

                def train_on(
                    way: Callable[[], tuple[Tensor, Tensor]],
                    learn: Any = learn,
                    optimizer: torch.optim.Optimizer = optimizer,
                ) -> None:
                    learn(*way())
                    optimizer.step()
                    if not CUDA:  # a graph overwrites gradients
                        optimizer.zero_grad()

                steps = {name: functools.partial(train_on, way) for name, way in ways.items()}
                tell_speeds(run, steps, size, network=case.name, step=kind)


def tell_speeds(run: Run, steps: Mapping[str, Step], size: int, **labels: Any) -> None:
    """Time these in turns, and tell how many images they take in a second."""
    for step in steps.values():
        step()
    for name, times in in_turns(steps, run, rounds=3 if run.tiny else 15, seconds=6.0, **labels).items():
        median, width = spread(times)
        row = {"ms": median, "iqr_half": width, "n": len(times), "images_per_s": 1e3 * size / median}
        run.report.row("images per second", **labels, batches=name, **row)


# --------------------------------------------------------------------------------------------------------------- ranks


def ranks(run: Run) -> None:
    """Runs of the trainer on two processes, each with a device of its own, against one."""
    if CUDA and torch.cuda.device_count() < 2:
        run.report.row("ranks", run="all", note="skipped: one device")
        return
    options = {
        "model": "resnet20", "modules": 2 if run.tiny else 10, "data": "pairs:fashion-mnist-small",
        "num_train": 128 if run.tiny else 10_000, "num_validation": 64, "batch_size": 32 if run.tiny else 128,
        "device": DEVICE.type, "lr": 0.1, "epochs": 2, "precision": "fp32", "tensorboard": False,
        "memory": "full", "guidance": {"period": 5},
    }  # fmt: skip
    ways: dict[str, tuple[int, dict[str, Any]]] = {
        "one process": (1, {}), "two stages": (2, {}), "two replicas": (2, {"replicas": 2}),
    }  # fmt: skip
    nets: dict[str, Named] = {}
    with tempfile.TemporaryDirectory() as folder:
        for name, (count, changes) in ways.items():
            run.clock.check(10.0)
            with noting(run.report, run=name):
                out, recipe = Path(folder) / name, Path(folder) / f"{name}.yaml"
                recipe.write_text(json.dumps(options | changes | {"out": str(out)}))
                command = [sys.executable, "-m", "torchlocal", "fit", "--config", str(recipe), "--quiet"]
                command += ["--ranks", str(count)] if count > 1 else []
                finished = subprocess.run(command, capture_output=True, text=True, timeout=max(10.0, run.clock.left))
                if finished.returncode:
                    raise RuntimeError(finished.stderr.strip()[-400:])
                rows = list(csv.DictReader((out / "metrics.csv").open()))
                speed = float(rows[-1]["images_per_second"])  # of the second epoch: the first one warms up
                nets[name] = torch.load(out / "last.pt", weights_only=True, map_location="cpu")["net"]
                row = {"images_per_s": speed, "steps": int(rows[-1]["step"]), "loss": float(rows[-1]["train_loss"])}
                run.report.row("ranks", run=name, processes=count, **row)
    if {"one process", "two stages"} <= set(nets):
        run.report.row("weights after the run", run="two stages", **compared(nets["two stages"], nets["one process"]))


# ---------------------------------------------------------------------------------------------------------------- main

SECTIONS: dict[str, Callable[[Run], None]] = {
    "right": right,
    "blocks": blocks,
    "fit": fit,
    "synchronisation": synchronisation,
    "memory": memory,
    "time": time_,
    "captured": captured,
    "host": host,
    "streams": streams,
    "accuracy": accuracy,
    "compiled": compiled,
    "augmentation": augmentation,
    "ranks": ranks,
}


@contextlib.contextmanager
def at_most(seconds: float) -> Iterator[None]:
    """Break off what does not look at its clock."""

    def ring(*_: Any) -> None:
        raise OutOfTime

    before = signal.signal(signal.SIGALRM, ring)
    signal.setitimer(signal.ITIMER_REAL, max(0.1, seconds), 5.0)
    try:
        yield
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)
        signal.signal(signal.SIGALRM, before)


def about() -> dict[str, Any]:
    """The machine and the libraries."""
    found: dict[str, Any] = {"torch": torch.__version__, "python": sys.version.split()[0], "device": "CPU"}
    if CUDA:
        found |= {"device": torch.cuda.get_device_name(), "cuda": torch.version.cuda}
        found |= {"cudnn": torch.backends.cudnn.version()}
        found["memory_GiB"] = round(torch.cuda.mem_get_info()[1] / 2**30, 1)
    else:
        found["threads"] = torch.get_num_threads()
    return found | {"torchlocal": tl.__version__, "cores": os.cpu_count(), "rule": f"{tl.DGLRule()!r}, width {WIDTH}"}


def main() -> None:
    """Run the sections."""
    begin = time.monotonic()
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--tiny", action="store_true", help="on the CPU, with tiny sizes")
    parser.add_argument("--out", type=Path, default=None, help="folder for results.json and results.md")
    parser.add_argument("--sections", nargs="+", choices=list(SECTIONS), default=list(SECTIONS), help="only these")
    parser.add_argument("--redo", action="store_true", help="also sections that are finished")
    parser.add_argument("--minutes", type=float, default=8.0, help="limit for everything (default: 8)")
    parser.add_argument("--data", type=Path, default=None, help="folder with the IDX files of Fashion-MNIST")
    parser.add_argument("--only", nargs="+", default=(), help='only these networks in "right" and "blocks"')
    parser.add_argument(
        "--workers", type=int, default=None, help="processes that search for plans (default: 10; CPU: 0)"
    )
    parser.add_argument("--threads", type=int, default=None, help="torch threads")
    options = parser.parse_args()
    if not CUDA and not options.tiny:
        parser.error("no CUDA device was found; --tiny runs on the CPU")
    if options.threads:
        torch.set_num_threads(options.threads)
    report = Report(options.out, about())
    print(json.dumps(report.content["about"]), flush=True)
    known = report.content["sections"]
    chosen = [
        name
        for name in SECTIONS
        if name in options.sections and (options.redo or known.get(name, {}).get("status") != "finished")
    ]
    jobs = sorted({i for name in chosen for i in OF_SECTION.get(name, ())})
    workers = options.workers if options.workers is not None else (min(10, (os.cpu_count() or 2) - 2) if CUDA else 0)
    plans = Plans(options.tiny, workers, jobs, largest="time" in chosen)
    try:
        for name in chosen:
            left = 60 * options.minutes - (time.monotonic() - begin)
            limit = min(LIMITS[name] * (3 if options.tiny else 1), left)
            if limit < 3:
                print(f"--- {name}: no time left", flush=True)
                continue
            run_section(name, Run(report, Clock(limit), options.tiny, plans, options.data, options.only))
    finally:
        plans.close()
    print(f"--- all: {time.monotonic() - begin:.1f} s", flush=True)


def run_section(name: str, run: Run) -> None:
    """One section; nothing that goes wrong in it goes further."""
    run.report.begin(name, run.clock.limit)
    status = "finished"
    try:
        with at_most(run.clock.limit + 8):
            SECTIONS[name](run)
    except OutOfTime:
        status = "out of time"
    except Exception as error:
        status = "failed"
        run.report.failed(error, where=name)
    run.report.end(status, run.clock.limit - run.clock.left)
    gc.collect()
    if CUDA:
        with contextlib.suppress(Exception):
            torch.cuda.set_sync_debug_mode("default")
            torch.cuda.empty_cache()


if __name__ == "__main__":
    main()
