"""The trainer: the same bits however often it is stopped, and one sentence for whatever cannot work."""

import csv
import errno
import json
import math
import os
import resource
import signal
import subprocess
import sys
import threading
from collections.abc import Callable
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from networks import SmallNet
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils._python_dispatch import TorchDispatchMode

import torchlocal as tl
from torchlocal.data import DataBundle
from torchlocal.data.images import MemorySource
from torchlocal.memory import plans
from torchlocal.run import build as assembly
from torchlocal.run import checkpoint, trainer
from torchlocal.run.build import (
    Execution,
    build_optimizer,
    count_steps,
    learning_rate,
    make_optimizer,
    resolve_execution,
    train_step,
)
from torchlocal.run.callbacks import RunState
from torchlocal.run.config import (
    FitConfig,
    GuidanceConfig,
    build_guidance,
    guided_memory,
)
from torchlocal.run.own import Own
from torchlocal.run.progress import Progress, compact
from torchlocal.run.trainer import Diverged, Interrupted

PARTS = ("train", "validation", "test")
TIMES = ("seconds", "train_seconds", "epoch_seconds", "images_per_second", "run")


def small_net() -> nn.Module:
    return SmallNet(10, 1)


def small(config: FitConfig) -> Own:
    """The small network, where the configuration says so, in place of one by name."""
    return Own(model=small_net if config.model.name == "own:small_net" else None)


def fit(config: FitConfig, **options: Any) -> dict[str, Any]:
    return trainer.fit(config, model=small(config).model, **options)


def build_network(config: FitConfig, data: Any, execution: Execution) -> tl.DecoupledNetwork:
    return assembly.build_network(config, data, execution, small(config))


def evaluate(run: Path, split: str = "test") -> dict[str, Any]:
    return tl.evaluate(run, split, model=small_net)


def small_config(out: Path, **changes: Any) -> FitConfig:
    """Two epochs of 5 steps with augmentation, dropout, BatchNorm and periodic guidance."""
    values: dict[str, Any] = {
        "out": str(out),
        "model": "own:small_net",
        "modules": 3,
        "guidance": GuidanceConfig(period=3, length=2),
        "num_train": 160,
        "num_validation": 64,
        "epochs": 2,
        "batch_size": 32,
        "precision": "fp32",
        "num_threads": 1,
        "log_every": 2,
        "tensorboard": False,
    }
    return FitConfig.of(**(values | changes))


def after_steps(monkeypatch: pytest.MonkeyPatch, num_steps: int, action: Callable[[Any], None]) -> None:
    """Call action with the network after so many training steps of this process."""
    count = 0

    def counted(net: Any, *arguments: Any, **options: Any) -> list[Tensor]:
        nonlocal count
        losses = train_step(net, *arguments, **options)
        count += 1
        if count == num_steps:
            action(net)
        return losses

    monkeypatch.setattr(trainer, "train_step", counted)


def stop(signum: int = signal.SIGTERM) -> Callable[[Any], None]:
    return lambda _: os.kill(os.getpid(), signum)


def assert_equal(a: Any, b: Any, where: str = "") -> None:
    """Compare nested values bit for bit, apart from times."""
    assert type(a) is type(b), where
    if isinstance(a, dict):
        assert a.keys() == b.keys(), where
        for key in a:
            if key not in (*TIMES, "out"):
                assert_equal(a[key], b[key], f"{where}.{key}")
    elif isinstance(a, list | tuple):
        assert len(a) == len(b), where
        for i, (x, y) in enumerate(zip(a, b, strict=True)):
            assert_equal(x, y, f"{where}[{i}]")
    elif isinstance(a, Tensor):
        assert a.dtype == b.dtype and torch.equal(a, b), where
    else:
        assert a == b or (a != a and b != b), where


def assert_same_run(a: Path, b: Path) -> None:
    for name in ("last.pt", "best.pt"):
        assert_equal(checkpoint.load_checkpoint(a / name), checkpoint.load_checkpoint(b / name), name)
    assert_equal(json.loads((a / "result.json").read_text()), json.loads((b / "result.json").read_text()))
    assert_equal(read_metrics(a), read_metrics(b))


def read_metrics(out: Path) -> list[dict[str, str]]:
    with open(out / "metrics.csv", newline="") as file:
        return list(csv.DictReader(file))


# --- stop and resume (invariant 6) ---


@pytest.mark.parametrize("num_steps", [1, 4, 5, 7, 10])
def test_stop_anywhere_and_resume(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, num_steps: int) -> None:
    """In the middle of an epoch and of a guided phase, at the end of an epoch and before the test split."""
    whole, parts = small_config(tmp_path / "whole"), small_config(tmp_path / "parts")
    fit(whole, progress=False)
    after_steps(monkeypatch, num_steps, stop())
    with pytest.raises(Interrupted, match=f"stopped by SIGTERM after step {num_steps} of 10") as stopped:
        fit(parts, progress=False)
    assert stopped.value.signum == signal.SIGTERM
    assert checkpoint.load_checkpoint(tmp_path / "parts/last.pt")["step"] == num_steps
    torch.randn(3)  # what happens in between does not matter
    fit(parts, resume=True, progress=False)
    assert_same_run(tmp_path / "whole", tmp_path / "parts")


VARIANTS: dict[str, dict[str, Any]] = {
    "accumulate": {
        "accumulate": 2,
        "batch_size": 16,
        "optimizer": "adamw",
        "lr": 0.01,
        "clip": 0.5,
        "warmup_epochs": 0.5,
    },
    "recompute": {
        "guidance": GuidanceConfig(period=2, auxiliary="frozen"),
        "recompute": "modules",
        "schedule": "step",
        "milestones": [0.5, 1.2],
    },
    "memory": {"guidance": GuidanceConfig(period=2), "memory": "1.5MB", "batch_size": 32},
    "fp16": {"precision": "fp16", "label_smoothing": 0.1, "optimizer": "RMSprop", "lr": 0.001},
    "bf16": {"precision": "bf16", "guidance": GuidanceConfig(name="random", share=0.5), "schedule": "constant"},
    "steps": {
        "steps": 8,
        "guidance": GuidanceConfig(name="annealed", share=0.0, end_share=1.0),
        "data": "pairs:digits",
    },
    "phased": {"guidance": GuidanceConfig(name="phased", share=0.5, periods=2)},
    "epochs": {"guidance": GuidanceConfig(period=2, unit="epochs"), "data": "digits", "model": "resnet20", "steps": 7},
}


@pytest.mark.parametrize("variant", VARIANTS)
def test_stop_and_resume_variants(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, variant: str) -> None:
    whole = small_config(tmp_path / "whole", **VARIANTS[variant])
    parts = small_config(tmp_path / "parts", **VARIANTS[variant])
    fit(whole, progress=False)
    after_steps(monkeypatch, 3, stop(signal.SIGINT))
    with pytest.raises(Interrupted, match="SIGINT"):
        fit(parts, progress=False)
    after_steps(monkeypatch, 3, stop(signal.SIGTERM))
    with pytest.raises(Interrupted, match="SIGTERM after step 6"):
        fit(parts, resume=True, progress=False)
    monkeypatch.setattr(trainer, "train_step", train_step)
    fit(parts, resume=True, progress=False)
    assert_same_run(tmp_path / "whole", tmp_path / "parts")


@pytest.mark.parametrize("epoch", [1, 3])
def test_stop_while_measuring(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, epoch: int) -> None:
    """In the validation of the first epoch, and in the one evaluation of the test split."""
    whole, parts = small_config(tmp_path / "whole"), small_config(tmp_path / "parts")
    fit(whole, progress=False)
    count = 0
    real = trainer.measure_split

    def measured(*arguments: Any, **options: Any) -> dict[str, Any]:
        nonlocal count
        count += 1
        if count == epoch:
            os.kill(os.getpid(), signal.SIGTERM)
        return real(*arguments, **options)

    monkeypatch.setattr(trainer, "measure_split", measured)
    with pytest.raises(Interrupted):
        fit(parts, progress=False)
    fit(parts, resume=True, progress=False)
    assert_same_run(tmp_path / "whole", tmp_path / "parts")


CHILD = """
import sys
from pathlib import Path
sys.path[:0] = {paths!r}
import test_trainer as t
t.fit(t.small_config(Path({out!r}), **t.LONG), progress=True)
"""
LONG: dict[str, Any] = {"epochs": 30, "checkpoint_every": 1}


@pytest.fixture(scope="module")
def long_run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("long") / "whole"
    fit(small_config(out, **LONG), progress=False)
    return out


@pytest.mark.parametrize("signum", [signal.SIGTERM, signal.SIGKILL])
def test_stop_another_process(tmp_path: Path, long_run: Path, signum: signal.Signals) -> None:
    """SIGTERM saves; SIGKILL finds the last checkpoint whole, whatever was being written."""
    out = tmp_path / "parts"
    script = CHILD.format(paths=[str(p) for p in Path(__file__).parents[:2]], out=str(out))
    child = subprocess.Popen([sys.executable, "-c", script], stderr=subprocess.PIPE, text=True)
    assert child.stderr is not None
    told = ""
    while "epoch 1/30" not in told and (line := child.stderr.readline()):
        told += line
    child.send_signal(signum)
    told += child.stderr.read()
    child.wait(timeout=60)
    assert "epoch 1/30" in told
    assert not (out / "result.json").exists()
    if signum == signal.SIGTERM:
        assert child.returncode == 1 and "Interrupted: stopped by SIGTERM after step" in told
    fit(small_config(out, **LONG), resume=True, progress=False)
    assert_same_run(long_run, out)


def test_second_signal_acts_at_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    before = signal.getsignal(signal.SIGINT), signal.getsignal(signal.SIGTERM)

    def twice(_: Any) -> None:
        os.kill(os.getpid(), signal.SIGINT)
        os.kill(os.getpid(), signal.SIGINT)

    after_steps(monkeypatch, 3, twice)
    with pytest.raises(KeyboardInterrupt):
        fit(small_config(tmp_path), progress=False)
    assert not (tmp_path / "last.pt").exists()
    assert before == (signal.getsignal(signal.SIGINT), signal.getsignal(signal.SIGTERM))
    fit(small_config(tmp_path), progress=False)
    assert before == (signal.getsignal(signal.SIGINT), signal.getsignal(signal.SIGTERM))


def test_fits_in_another_thread(tmp_path: Path) -> None:
    thread = threading.Thread(target=fit, args=(small_config(tmp_path, steps=2),), kwargs={"progress": False})
    thread.start()
    thread.join()
    assert (tmp_path / "result.json").exists()


# --- the same as a plain loop (invariant 1) ---


@pytest.mark.parametrize(
    ("modules", "guidance", "changes"),
    [
        (1, GuidanceConfig(name="never"), {}),
        (1, GuidanceConfig(name="always"), {"recompute": 3}),
        (3, GuidanceConfig(name="always", auxiliary="frozen"), {"clip": 0.5}),
        (3, GuidanceConfig(name="always", auxiliary="follow"), {"accumulate": 2, "batch_size": 16}),
    ],
)
def test_end_to_end_equals_a_plain_loop(
    tmp_path: Path, modules: int, guidance: GuidanceConfig, changes: dict[str, Any]
) -> None:
    config = small_config(tmp_path, modules=modules, guidance=guidance, **changes)
    fit(config, progress=False)

    data = Own().load(config)
    torch.manual_seed(config.run.seed)
    model = SmallNet(data.num_classes, data.shape[0])
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9, weight_decay=1e-4, nesterov=True)
    torch.manual_seed(config.run.seed + 2**32)
    model.train()
    step = 0
    for epoch in range(2):
        batches = data.train.batches(config.optimisation.batch_size, epoch=epoch, train=True, seed=config.run.seed)
        for i, (x, y) in enumerate(batches, start=1):
            (F.cross_entropy(model(x), y) / config.optimisation.accumulate).backward()
            if i % config.optimisation.accumulate == 0:
                if config.optimisation.clip:
                    nn.utils.clip_grad_norm_(model.parameters(), config.optimisation.clip)
                for group in optimizer.param_groups:
                    group["lr"] = 0.1 * 0.5 * (1 + math.cos(math.pi * step / 10))
                optimizer.step()
                optimizer.zero_grad()
                step += 1
    assert step == 10
    trained = checkpoint.load_checkpoint(tmp_path / "last.pt")["net"]
    for key, value in model.state_dict().items():
        assert torch.equal(trained[f"backbone.{key}"], value), key


def test_a_step_never_waits_for_the_device(tmp_path: Path) -> None:
    """No value is read from a tensor in a step: on a GPU that would wait."""

    class NoReading(TorchDispatchMode):
        def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
            assert func is not torch.ops.aten._local_scalar_dense.default
            return func(*args, **(kwargs or {}))

    config = small_config(tmp_path, clip=1.0, log_every=1000)
    data, execution = Own().load(config), resolve_execution(config)
    net = build_network(config, data, execution)
    optimizer = build_optimizer(config, net)
    batches = list(data.train.batches(32, train=True))
    for guided in (False, True):
        with NoReading():
            losses = train_step(net, optimizer, batches[:1], config=config, execution=execution, guided=guided)
        assert len(losses) == 3 and not any(loss.requires_grad for loss in losses)


@pytest.mark.parametrize("changes", [{}, {"accumulate": 2, "data": "pairs:digits"}, {"channels_last": True}])
def test_a_run_whose_batches_are_made_on_its_device(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, changes: dict[str, Any]
) -> None:
    """Their images are those of the host, so the run is the same; also when it is stopped and resumed there."""

    def there(bundle: DataBundle, device: torch.device) -> DataBundle:
        assert device.type == "cpu"
        return replace(bundle, **{name: getattr(bundle, name).to(device) for name in PARTS})

    def fetch(source: MemorySource, *given: Any) -> Tensor:
        made.append(len(given[1]))
        return fetch_there(source, *given)

    fetch_there, made = MemorySource._fetch_there, list[int]()
    monkeypatch.setattr(MemorySource, "_fetch_there", fetch)
    with monkeypatch.context() as patched:
        patched.setattr(DataBundle, "to", there)
        after_steps(patched, 2, stop())
        with pytest.raises(Interrupted):
            fit(small_config(tmp_path / "there", epochs=1, **changes))
        patched.setattr(trainer, "train_step", train_step)
        fit(small_config(tmp_path / "there", epochs=1, **changes), resume=True)
    num_made = len(made)
    fit(small_config(tmp_path / "host", epochs=1, **changes))
    assert num_made > 5 and len(made) == num_made
    assert_same_run(tmp_path / "there", tmp_path / "host")


@pytest.mark.parametrize("guided", [False, True])
@pytest.mark.parametrize(
    "criterion",
    [
        nn.CrossEntropyLoss(weight=torch.tensor([1.0, 5.0, 0.2]), ignore_index=2),
        nn.CrossEntropyLoss(reduction="sum"),
        partial(F.cross_entropy, ignore_index=0),
        F.cross_entropy,
    ],
)
def test_accumulated_batches_count_by_what_the_criterion_divides_by(criterion: Any, guided: bool) -> None:
    torch.manual_seed(0)
    x, y = (
        torch.randn(12, 6),
        torch.tensor([0, 0, 0, 0, 1, 1, 1, 2, 2, 2, 2, 1]),
    )  # in the first part all may be ignored
    found = []
    for parts in (1, 3):
        torch.manual_seed(1)
        model = nn.Sequential(nn.Sequential(nn.Linear(6, 5), nn.Tanh()), nn.Linear(5, 3))
        net = tl.decouple(model, sample=x, rule=tl.GreedyRule("linear"), criterion=criterion)
        config = FitConfig.of(accumulate=parts, batch_size=12 // parts, memory="full", precision="fp32")
        batches = list(zip(x.chunk(parts), y.chunk(parts), strict=True))
        optimizer = torch.optim.SGD(net.parameters(), lr=0.1)
        execution = resolve_execution(config)
        losses = train_step(net, optimizer, batches, config=config, execution=execution, guided=guided)
        found.append([*losses, *net.parameters()])
    for one, parted in zip(*found, strict=True):
        torch.testing.assert_close(parted, one)


# --- what a run writes ---


def test_run_folder(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    config = small_config(tmp_path, tensorboard=True, guidance=GuidanceConfig(period=2, auxiliary="frozen"))
    result = fit(config)
    told = capsys.readouterr().err.splitlines()
    assert len(told) == 2 and told[0].startswith("epoch 1/2  loss ") and "images/s  ETA 0:0" in told[0]
    assert sorted(path.name for path in tmp_path.iterdir()) == [
        "best.pt", "config.yaml", "last.pt", "metrics.csv", "result.json", "tensorboard",
    ]  # fmt: skip
    assert list((tmp_path / "tensorboard").iterdir())
    assert json.loads((tmp_path / "result.json").read_text()) == result
    assert FitConfig.of(**result["config"]) == config
    assert (result["steps"], result["epochs"], result["guided_steps"], result["guided_share"]) == (10, 2, 5, 0.5)
    assert len(result["depth_accuracy"]) == 3 and result["depth_accuracy"][-1] == result["test_accuracy"]
    backbone = SmallNet(10, 1)
    assert result["num_parameters"]["backbone"] == sum(p.numel() for p in backbone.parameters())
    assert result["num_parameters"]["auxiliary"] > 0
    rows = read_metrics(tmp_path)
    assert list(rows[0]) == [
        "epoch", "step", "seconds", "train_loss", "loss_1", "loss_2", "loss_3", "guided_share", "lr",
        "images_per_second", "validation_loss", "validation_accuracy",
    ]  # fmt: skip
    assert [(row["epoch"], row["step"], row["guided_share"]) for row in rows] == [("1", "5", "0.4"), ("2", "10", "0.6")]
    assert all(row["train_loss"] == row["loss_3"] for row in rows)
    best = max(range(2), key=lambda i: float(rows[i]["validation_accuracy"]))
    assert result["validation_accuracy"] == float(rows[best]["validation_accuracy"])
    assert result["best_epoch"] == best + 1

    test = evaluate(tmp_path)
    assert test["accuracy"] == result["test_accuracy"] and test["depth_accuracy"] == result["depth_accuracy"]
    assert test["loss"] == result["test_loss"] and test["num_images"] == 2000
    assert evaluate(tmp_path / "best.pt", "validation")["accuracy"] == result["validation_accuracy"]
    assert evaluate(tmp_path / "last.pt", "train")["num_images"] == 160

    assert fit(config, resume=True) == result  # finished: nothing is trained again
    plain = SmallNet(10, 1)
    weights = checkpoint.load_checkpoint(tmp_path / "best.pt")["net"]
    plain.load_state_dict({k.removeprefix("backbone."): v for k, v in weights.items() if k.startswith("backbone.")})


def test_module_losses_that_no_step_measured_are_empty(tmp_path: Path) -> None:
    fit(small_config(tmp_path, epochs=1, guidance=GuidanceConfig(name="always", auxiliary="frozen")), progress=False)
    row = read_metrics(tmp_path)[0]
    assert (row["loss_1"], row["loss_2"]) == ("", "") and float(row["loss_3"]) > 0


def test_backbone_and_dropout_do_not_depend_on_the_modules(tmp_path: Path) -> None:
    """So that methods differ by their training alone, not by their start."""
    data = Own().load(small_config(tmp_path))
    states = []
    for modules in (1, 3):
        config = small_config(tmp_path, modules=modules)
        states.append(build_network(config, data, resolve_execution(config)).backbone.state_dict())
    assert_equal(dict(states[0]), dict(states[1]))


def test_progress_bar(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.setenv("FORCE_COLOR", "1")  # what rich takes for a terminal
    monkeypatch.setenv("COLUMNS", "160")
    progress = Progress()
    state = RunState(config=FitConfig(), out=tmp_path, run="", step=4, num_steps=10, epoch=1, num_epochs=2, rows=[])
    progress.on_start(state)
    progress.advance(6, "epoch 1/2")
    values = {"loss/module_1": 2.0, "loss/global": 1.0, "guided_share": 0.25, "lr": 0.1, "images_per_second": 1234.5}
    progress.on_step(replace(state, step=6), values)
    progress.on_end(state, None)
    told = capsys.readouterr().err
    for part in ("epoch 1/2", "6/10", "loss 1.000", "modules 2.00 1.00", "guided 25%", "1234 images/s", "ETA 0:00:"):
        assert part in told


def test_compact_losses() -> None:
    assert compact([2.0, 1.5]) == "2.00 1.50"
    assert compact([2.0, 1.8, 1.6, 1.4, 1.2]) == "2.00 █▆▅▃▁ 1.20"
    assert compact([1.0] * 16) == "1.00 ▁▁▁▁▁▁▁▁▁▁▁▁▁▁▁▁ 1.00"
    assert compact([math.nan, 1.0]) == "1.00"


# --- schedules ---


def rates(config: FitConfig, steps_per_epoch: int, num_steps: int) -> list[float]:
    return [
        learning_rate(config, step, steps_per_epoch=steps_per_epoch, num_steps=num_steps) for step in range(num_steps)
    ]


def torch_rates(make: Callable[[torch.optim.Optimizer], Any], num_steps: int, lr: float) -> list[float]:
    optimizer = torch.optim.SGD([nn.Parameter(torch.zeros(1))], lr=lr)
    scheduler = make(optimizer)
    values = []
    for _ in range(num_steps):
        values.append(optimizer.param_groups[0]["lr"])
        optimizer.step()
        scheduler.step()
    return values


def test_schedules_equal_torch(tmp_path: Path) -> None:
    schedulers = torch.optim.lr_scheduler
    cosine = small_config(tmp_path, epochs=6, lr=0.8)
    assert rates(cosine, 10, 60) == pytest.approx(
        torch_rates(lambda o: schedulers.CosineAnnealingLR(o, 60), 60, 0.8), abs=1e-12
    )
    step = small_config(tmp_path, epochs=6, lr=0.8, schedule="step", milestones=[2, 4.5], gamma=0.2)
    assert rates(step, 10, 60) == pytest.approx(
        torch_rates(lambda o: schedulers.MultiStepLR(o, [20, 45], 0.2), 60, 0.8), abs=1e-12
    )
    assert rates(small_config(tmp_path, schedule="constant"), 10, 60) == [0.1] * 60
    phased = small_config(tmp_path, epochs=6, lr=0.8, guidance=GuidanceConfig(name="phased", share=0.25))
    late = [0.8] * 45 + torch_rates(lambda o: schedulers.CosineAnnealingLR(o, 15), 15, 0.8)
    assert rates(phased, 10, 60) == pytest.approx(late, abs=1e-12)
    assert rates(phased.changed(decay=1.0), 10, 60) == rates(cosine, 10, 60)
    assert rates(cosine.changed(decay=0.25), 10, 60) == rates(phased, 10, 60)
    assert rates(cosine.changed(decay=1e-9), 10, 60) == [0.8] * 60


def test_warmup(tmp_path: Path) -> None:
    config = small_config(tmp_path, epochs=6, lr=0.8, warmup_epochs=1.5)
    values = rates(config, 10, 60)
    assert values[:15] == pytest.approx([0.8 * (i + 1) / 15 for i in range(15)])
    assert values[15:] == pytest.approx([0.4 * (1 + math.cos(math.pi * i / 45)) for i in range(45)])


def test_steps_of_an_epoch(tmp_path: Path) -> None:
    assert count_steps(small_config(tmp_path), 160) == (5, 10)
    assert count_steps(small_config(tmp_path, accumulate=2), 160) == (2, 4)  # the fifth batch fills no step
    assert count_steps(small_config(tmp_path, steps=7), 160) == (5, 7)


# --- optimizers ---


@pytest.mark.parametrize("name", ["sgd", "adamw", *(n for n in sorted(vars(torch.optim)) if assembly._is_optimizer(n))])
def test_every_optimizer(tmp_path: Path, name: str) -> None:
    decay = 0.0 if name == "Rprop" else 1e-4
    config = small_config(tmp_path, optimizer=name, lr=0.01, weight_decay=decay)
    data, execution = Own().load(config), resolve_execution(config)
    net = build_network(config, data, execution)
    if name == "Muon":
        with pytest.raises(ValueError, match=r"^optimizer='Muon' does not take this network .*2D"):
            build_optimizer(config, net)
        return
    optimizer = build_optimizer(config, net)
    assert optimizer.defaults["lr"] == 0.01 and optimizer.defaults.get("weight_decay", 0.0) == decay
    if name in ("sgd", "SGD"):
        assert optimizer.defaults["nesterov"] == (name == "sgd") and optimizer.defaults["momentum"] == 0.9
    before = [parameter.clone() for parameter in net.parameters()]
    batch = next(iter(data.train.batches(32, train=True)))
    train_step(net, optimizer, [batch], config=config, execution=execution, guided=False)
    assert not any(torch.equal(a, b) for a, b in zip(before, net.parameters(), strict=True) if b.dim() > 1)


def test_betas_are_those_of_the_optimizer(tmp_path: Path) -> None:
    parameters = [nn.Parameter(torch.zeros(2))]
    own = make_optimizer(small_config(tmp_path, optimizer="adamw"), parameters)
    assert own.defaults["betas"] == (0.9, 0.999)
    given = make_optimizer(small_config(tmp_path, optimizer="adamw", betas=[0.8, 0.95], lr=0.1), parameters)
    # By hand, with gradients of 1 and then 3: v = .95 * .05 + .05 * 9, m = .8 * .2 + .2 * 3, both corrected.
    for gradient in (1.0, 3.0):
        parameters[0].grad = torch.full((2,), gradient)
        given.step()
    m, v = (0.8 * 0.2 + 0.2 * 3) / (1 - 0.8**2), (0.95 * 0.05 + 0.05 * 9) / (1 - 0.95**2)
    torch.testing.assert_close(parameters[0].detach(), torch.full((2,), -0.1 - 0.1 * m / v**0.5), rtol=1e-4, atol=0)


# --- what cannot work: one sentence ---


def sentence(error: pytest.ExceptionInfo[BaseException]) -> str:
    text = str(error.value)
    assert "\n" not in text and 20 < len(text) < 500
    return text


@pytest.mark.parametrize(
    ("changes", "told"),
    [
        ({"lr": -0.1}, r"^lr=-0.1 must be a number above 0$"),
        ({"lr": math.nan}, r"^lr=nan must be"),
        ({"lr": "0.1"}, r"^lr='0.1' must be"),
        ({"epochs": 0}, r"^epochs=0 must be a whole number of at least 1$"),
        ({"epochs": True}, r"^epochs=True must be"),
        ({"steps": 0}, r"^steps=0 must be a whole number of at least 1 or None$"),
        ({"batch_size": 0}, r"^batch_size=0 must"),
        ({"accumulate": 0}, r"^accumulate=0 must"),
        ({"modules": 0}, r'^modules=0 must be a whole number of at least 1, "all" or "fewest"$'),
        ({"modules": "most"}, r"^modules='most' must"),
        ({"cuts": "layer1"}, r"^cuts='layer1' must be a list of names"),
        ({"rule": "predsim2"}, r"^rule='predsim2' is unknown: give one of greedy"),
        ({"auxiliary": "huge"}, r"^auxiliary: no network named 'huge'"),
        (
            {"rule_options": {"auxiliary": len}},
            r"^rule_options holds .*len>, which is of the kind builtin_function_or_method: give numbers and words",
        ),
        ({"label_smoothing": 1.0}, r"^label_smoothing=1.0 must"),
        (
            {"recompute": "all"},
            r"^recompute='all' must be a whole number of at least 1 \(segments\), \"modules\" or None$",
        ),
        ({"recompute": 0}, r"^recompute=0 must"),
        ({"memory": "most"}, r"^memory='most' is unknown: give \"local\", \"exact\", \"full\" or a size such as"),
        ({"memory": 0}, r"^memory=0 is unknown"),
        ({"memory": True}, r"^memory=True is unknown"),
        ({"memory": "exact", "recompute": 3}, r"^memory='exact' and recompute=3: give one of them, not both$"),
        ({"num_train": 0}, r"^num_train=0 must"),
        ({"num_validation": -1}, r"^num_validation=-1 must"),
        ({"augment": "yes"}, r"^augment='yes' is unknown: give True or False$"),
        ({"momentum": 1.0}, r"^momentum=1.0 must"),
        ({"weight_decay": -1e-4}, r"^weight_decay=-0.0001 must"),
        ({"schedule": "linear"}, r"^schedule='linear' is unknown: give 'cosine', 'step' or 'constant'$"),
        ({"betas": [0.9]}, r"^betas=\[0.9\] must be two numbers, such as \[0.9, 0.95\], or None"),
        ({"betas": [0.9, 1.0]}, r"^betas=1.0 must be two numbers of at least 0 and below 1"),
        ({"schedule": "step"}, r"^milestones=\[\] and schedule='step' do not fit"),
        ({"milestones": [1.0]}, r"^milestones=\[1.0\] and schedule='cosine' do not fit"),
        ({"schedule": "step", "milestones": [3, 2]}, r"^milestones=\[3, 2\] must increase"),
        ({"schedule": "step", "milestones": [0]}, r"^milestones=0 must be a list of epochs above 0"),
        ({"warmup_epochs": 2}, r"^warmup_epochs=2 leaves nothing of epochs=2"),
        ({"warmup_epochs": -1}, r"^warmup_epochs=-1 must"),
        ({"gamma": 0}, r"^gamma=0 must"),
        ({"clip": 0}, r"^clip=0 must be a number above 0, or None$"),
        ({"precision": "fp8"}, r"^precision='fp8' is unknown"),
        ({"channels_last": 1}, r"^channels_last=1 is unknown"),
        ({"seed": -1}, r"^seed=-1 must"),
        ({"seed": 2**32}, r"^seed=4294967296 must be below 2\*\*32$"),
        ({"log_every": 0}, r"^log_every=0 must"),
        ({"checkpoint_every": 0}, r"^checkpoint_every=0 must"),
        ({"num_threads": 0}, r"^num_threads=0 must"),
        ({"boundary": "int2"}, r"^boundary='int2' is unknown: give None, 'bf16', 'int8' or 'int4'$"),
        ({"stages": [2, 0]}, r"^stages=0 must be a whole number of at least 1$"),
        ({"stages": []}, r"^stages=\[\] must be the numbers of local modules of every stage"),
        (
            {"link": "fast"},
            r"^link='fast' is no link: give a rate such as 100mbit or 1gbit, a delay, or 100mbit\+20ms$",
        ),
        ({"link": "1gbit", "stages": [1, 1]}, r"^link='1gbit' means nothing to stages=\[1, 1\]: give one of them$"),
        ({"data": ""}, r"^data='' must be a string that is not empty$"),
        ({"guidance": "periodic"}, r"^guidance='periodic' must be `name: value` pairs, in Python a Gui"),
        ({"decay": 0}, r"^decay=0 must be a number above 0 and at most 1, or None$"),
        ({"decay": 1.5}, r"^decay=1.5 must be a number above 0 and at most 1"),
        (
            {"decay": 0.1, "schedule": "constant"},
            r"^decay=0.1 means nothing to schedule='constant': leave it out, or give schedule=\"cosine\"$",
        ),
    ],
    ids=str,
)
def test_refused_configurations(tmp_path: Path, changes: dict[str, Any], told: str) -> None:
    with pytest.raises(ValueError, match=told) as error:
        small_config(tmp_path, **changes)
    sentence(error)


@pytest.mark.parametrize(
    ("changes", "told"),
    [
        ({"name": "annealed", "share": -1}, r"^guidance.share: must"),
        ({"name": "sometimes"}, r"^guidance.name: no schedule named 'sometimes'"),
        ({"period": 0}, r"^guidance.period: must"),
        ({"length": 6}, r"^guidance.length: must"),
        ({"unit": "days"}, r"^guidance.unit: must"),
        ({"name": "random", "share": 1.5}, r"^guidance.share: must"),
        (
            {"name": "phased", "period": 3},
            r"^guidance.period=3 means nothing to guidance.name='phased': leave it out, or give guidance.name=periodic",
        ),
        (
            {"period": 3, "share": 0.1},
            r"^guidance.share=0.1 means nothing to guidance.name='periodic': leave it out, or give "
            r"guidance.name=random or annealed or phased$",
        ),
        ({"auxiliary": "ignore"}, r"^guidance.auxiliary='ignore' is unknown: give 'follow', 'match' or 'frozen'$"),
    ],
    ids=str,
)
def test_refused_guidance(changes: dict[str, Any], told: str) -> None:
    with pytest.raises(ValueError, match=told) as error:
        GuidanceConfig(**changes)
    sentence(error)


def test_what_is_left_out_of_guidance() -> None:
    assert build_guidance(FitConfig()) == tl.PhasedGuidance()
    assert build_guidance(FitConfig.of(guidance=GuidanceConfig(length=2))) == tl.PeriodicGuidance(length=2)
    assert build_guidance(FitConfig.of(guidance=GuidanceConfig(name="annealed", share=0.6))) == tl.AnnealedGuidance(
        start_share=0.6, end_share=0.0
    )
    random = GuidanceConfig(name="random", share=0.1)
    assert build_guidance(FitConfig.of(guidance=random, seed=3)) == tl.RandomGuidance(share=0.1, seed=3)
    never = GuidanceConfig(name="never", period=3)  # a recipe's period, with which the command says never
    assert build_guidance(FitConfig.of(guidance=never)) == tl.NeverGuidance()


def test_memory_of_guided_steps() -> None:
    always = GuidanceConfig(name="always")
    assert guided_memory(FitConfig()) == {"memory": "local"}
    assert guided_memory(FitConfig.of(guidance=always)) == {"memory": "full"}
    assert guided_memory(FitConfig.of(guidance=always, memory="exact")) == {"memory": "exact"}
    assert guided_memory(FitConfig.of(memory="2KiB")) == {"memory": 2048}
    assert guided_memory(FitConfig.of(recompute="modules")) == {"recompute": "modules"}
    whole = {"memory": 2048, "micro_batches": 1}
    assert guided_memory(FitConfig.of(memory="2KiB", micro_batches=1)) == whole
    assert guided_memory(FitConfig.of(guidance=always, micro_batches=1)) == {"memory": "local", "micro_batches": 1}
    # Whole batches give the same results, however much is recomputed; parts do not.
    alike = [{}, {"memory": "exact"}, {"memory": 2048, "micro_batches": 1}, {"recompute": 3}]
    fields = [checkpoint.fixed_fields(FitConfig.of(guidance=always, **each).plain()) for each in alike]
    assert all(each == fields[0] for each in fields)
    parted = [checkpoint.fixed_fields(FitConfig.of(memory=2048, micro_batches=parts).plain()) for parts in (None, 2)]
    assert parted[0] != parted[1]
    for wrong in ({"recompute": 3}, {"memory": "exact"}):
        with pytest.raises(ValueError, match=r"^micro_batches=2 means nothing to (recompute=3|memory='exact')"):
            FitConfig.of(micro_batches=2, **wrong)


@pytest.mark.parametrize(
    ("changes", "told"),
    [
        ({"batch_size": 161}, r"^batch_size=161 is more than the 160 training images"),
        ({"accumulate": 6}, r"^batch_size=32 times accumulate=6 is more than the 160 training images"),
        ({"steps": 4, "warmup_epochs": 1}, r"^warmup_epochs=1 leaves nothing of the 4 steps"),
        ({"device": "cuda:9"}, r"^device='cuda:9' is not available here"),
        ({"device": "gpu"}, r"^device='gpu' is not available here"),
        ({"optimizer": "lion"}, r"^optimizer='lion' cannot be used: give \"sgd\", \"adamw\", ASGD, "),
        ({"optimizer": "LBFGS"}, r"^optimizer='LBFGS' cannot be used"),
        ({"optimizer": "lr_scheduler"}, r"^optimizer='lr_scheduler' cannot be used"),
        ({"optimizer": "Rprop"}, r"^weight_decay=0.0001 is unknown to optimizer='Rprop': give weight_decay=0"),
        ({"betas": [0.9, 0.95]}, r"^betas=\[0.9, 0.95\] are unknown to optimizer='sgd': leave them out"),
        ({"modules": 99}, r"^modules: 99 local modules were asked for"),
        ({"cuts": ["block7"]}, r"block7"),
        ({"recompute": 99}, r"^recompute: "),
        ({"model": "resnet21"}, r"resnet21"),
        ({"data": "mnist3"}, r"mnist3"),
    ],
    ids=str,
)
def test_refused_before_training(tmp_path: Path, changes: dict[str, Any], told: str) -> None:
    with pytest.raises(ValueError, match=told) as error:
        fit(small_config(tmp_path / "run", **changes), progress=False)
    sentence(error)
    assert not (tmp_path / "run").exists()


def test_batch_of_one_is_too_small_for_batch_norm(tmp_path: Path) -> None:
    config = small_config(tmp_path, model="mlp", modules=1, batch_size=1, steps=2)
    with pytest.raises(ValueError, match=r"^batch_size=1 is too small for the BatchNorm layers") as error:
        fit(config, progress=False)
    sentence(error)


def test_guidance_without_effect_warns(tmp_path: Path) -> None:
    with pytest.warns(UserWarning, match="guides none of the 2 steps"):
        fit(small_config(tmp_path, steps=2, guidance=GuidanceConfig(period=50)), progress=False)


def test_out_that_is_a_file(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(ValueError, match="cannot be made a folder") as error:
        fit(small_config(tmp_path / "file" / "run"), progress=False)
    sentence(error)


# --- checkpoints that are refused ---


@pytest.fixture(scope="module")
def stopped_run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run that was stopped after step 3."""
    out = tmp_path_factory.mktemp("stopped")
    with pytest.MonkeyPatch.context() as monkeypatch:
        after_steps(monkeypatch, 3, stop())
        with pytest.raises(Interrupted):
            fit(small_config(out), progress=False)
    return out


def truncate(path: Path) -> None:
    path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])


def flip_a_bit(path: Path) -> None:
    content = bytearray(path.read_bytes())
    content[len(content) // 2] ^= 4
    path.write_bytes(content)


def tamper(change: Callable[[dict[str, Any]], Any]) -> Callable[[Path], None]:
    def apply(path: Path) -> None:
        state = checkpoint.load_checkpoint(path)
        change(state)
        torch.save(state, path)

    return apply


class Evil:
    def __reduce__(self) -> Any:
        return os.mkdir, ("evil",)


@pytest.mark.parametrize(
    ("damage", "told"),
    [
        (truncate, r"last.pt is damaged or not a checkpoint \(.*\): delete it and train again, or use a copy"),
        (flip_a_bit, r"last.pt is damaged or not a checkpoint \(wrong checksum"),
        (lambda path: path.write_bytes(b""), r"damaged or not a checkpoint"),
        (lambda path: path.write_text("not a checkpoint"), r"damaged or not a checkpoint"),
        (lambda path: torch.save(Evil(), path), r"damaged or not a checkpoint"),
        (lambda path: torch.save(torch.zeros(3), path), r"is not a checkpoint of torchlocal"),
        (lambda path: torch.save({"net": {}}, path), r"is not a checkpoint of torchlocal"),
        (tamper(lambda state: state.update(version=99)), r"has checkpoint version 99"),
        (tamper(lambda state: state.pop("optimizer")), r"holds weights only and cannot be resumed"),
        (
            tamper(lambda state: state["net"].pop("backbone.head.bias")),
            r"another network: backbone.head.bias is absent in the checkpoint and of shape \(10,\) in this network",
        ),
        (
            tamper(lambda state: state["net"].update({"backbone.head.bias": torch.zeros(7)})),
            r"is of another network: backbone.head.bias is of shape \(7,\) in the checkpoint and of shape \(10,\)",
        ),
        (
            tamper(lambda state: state["net"].update(extra=torch.zeros(1))),
            r"extra is of shape \(1,\) .* absent in this",
        ),
        (tamper(lambda state: state["modules"].pop()), r"is of a network that is cut elsewhere"),
        (
            tamper(lambda state: state["data"].update(num_train=150)),
            r"was trained on other data: num_train is 150 there and 160 here",
        ),
    ],
)
def test_refused_checkpoints(
    tmp_path: Path, stopped_run: Path, monkeypatch: pytest.MonkeyPatch, damage: Callable[[Path], None], told: str
) -> None:
    monkeypatch.chdir(tmp_path)
    last = tmp_path / "last.pt"
    last.write_bytes((stopped_run / "last.pt").read_bytes())
    damage(last)
    content = last.read_bytes()
    with pytest.raises(ValueError, match=told) as error:
        fit(small_config(tmp_path), resume=True, progress=False)
    sentence(error)
    assert last.read_bytes() == content and not (tmp_path / "evil").exists()


@pytest.mark.parametrize(
    ("changes", "told"),
    [
        (
            {"lr": 0.2},
            r"another configuration: lr \(0.1 there, 0.2 now\); resume with the same values, or choose another",
        ),
        ({"seed": 1, "epochs": 3}, r"configuration: epochs \(2 there, 3 now\), seed \(0 there, 1 now\);"),
        ({"guidance": GuidanceConfig(period=4, length=2)}, r"configuration: guidance.period \(3 there, 4 now\);"),
        ({"model": "resnet20"}, r"configuration: model \('own:small_net' there, 'resnet20' now\);"),
        ({"precision": "bf16"}, r"configuration: precision \('fp32' there, 'bf16' now\);"),
    ],
    ids=str,
)
def test_refused_configuration_of_a_checkpoint(stopped_run: Path, changes: dict[str, Any], told: str) -> None:
    with pytest.raises(ValueError, match=told) as error:
        fit(small_config(stopped_run, **changes), resume=True, progress=False)
    sentence(error)


def test_what_may_differ(tmp_path: Path, stopped_run: Path) -> None:
    (tmp_path / "last.pt").write_bytes((stopped_run / "last.pt").read_bytes())
    changes: dict[str, Any] = {"log_every": 3, "checkpoint_every": 4, "num_threads": None, "device": "cpu"}
    config = small_config(tmp_path, data_root=str(tmp_path), **changes)
    assert fit(config, resume=True, progress=False)["steps"] == 10


def test_recomputation_may_differ_as_long_as_batches_are_whole(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    whole = small_config(tmp_path / "whole", memory="full")
    fit(whole, progress=False)
    parts = tmp_path / "parts"
    after_steps(monkeypatch, 4, stop())
    with pytest.raises(Interrupted):
        fit(small_config(parts, memory="full"), progress=False)
    with pytest.raises(ValueError, match=r"configuration: memory \('full' there, 'local' now\);"):
        fit(small_config(parts, memory="local"), resume=True, progress=False)
    with pytest.raises(Interrupted):
        after_steps(monkeypatch, 3, stop())
        fit(small_config(parts, memory="exact"), resume=True, progress=False)
    monkeypatch.setattr(trainer, "train_step", train_step)
    fit(small_config(parts, recompute=2), resume=True, progress=False)
    nets = [checkpoint.load_checkpoint(out / "last.pt")["net"] for out in (tmp_path / "whole", parts)]
    assert_equal(*nets, "net")
    assert_equal(read_metrics(tmp_path / "whole"), read_metrics(parts))


def test_a_run_that_is_older_than_an_option_has_its_default(tmp_path: Path) -> None:
    config = small_config(tmp_path, steps=2)
    result = fit(config, progress=False)
    del result["config"]["optimisation"]["clip"]
    checkpoint.write_json(tmp_path / "result.json", result)
    assert fit(config, resume=True, progress=False) == result
    changed = config.changed(guidance=config.guidance.changed({"start": 1}))
    with pytest.raises(ValueError, match=r"configuration: guidance.start \(absent there, 1 now\);"):
        fit(changed, resume=True, progress=False)


def test_a_run_is_not_overwritten(stopped_run: Path) -> None:
    with pytest.raises(ValueError, match="already holds a run: resume it, or choose another folder") as error:
        fit(small_config(stopped_run), progress=False)
    sentence(error)


def test_a_finished_run_of_another_configuration(tmp_path: Path) -> None:
    fit(small_config(tmp_path, steps=2), progress=False)
    with pytest.raises(ValueError, match=r"result.json is of another configuration: steps \(2 there, 3 now\)"):
        fit(small_config(tmp_path, steps=3), resume=True, progress=False)
    told = r"configuration: memory \('1GiB' there, no micro-batches by recompute='modules' now\);"
    parts, whole = (
        small_config(tmp_path, **option).plain() for option in ({"memory": "1GiB"}, {"recompute": "modules"})
    )
    with pytest.raises(ValueError, match=told):
        checkpoint.check_same_config(tmp_path, parts, whole)
    (tmp_path / "result.json").write_text("{")
    with pytest.raises(ValueError, match=r"result.json is damaged"):
        fit(small_config(tmp_path, steps=2), resume=True, progress=False)
    (tmp_path / "result.json").unlink()
    (tmp_path / "best.pt").unlink()
    with pytest.raises(FileNotFoundError, match=r"there is no checkpoint .*best.pt"):
        fit(small_config(tmp_path, steps=2), resume=True, progress=False)


def test_damaged_best_checkpoint_is_refused_before_training(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    after_steps(monkeypatch, 7, stop())
    with pytest.raises(Interrupted):
        fit(small_config(tmp_path), progress=False)
    truncate(tmp_path / "best.pt")
    with pytest.raises(ValueError, match=r"best.pt is damaged"):
        fit(small_config(tmp_path), resume=True, progress=False)


def test_killed_between_best_and_last_checkpoint(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The repeated epoch may be worse (another machine, another rounding): its weights are kept all the same."""
    real_measure, real_save = trainer.measure_split, checkpoint.save_checkpoint
    accuracies = [0.1, 0.2]

    def measure(*arguments: Any, **options: Any) -> dict[str, Any]:
        measured = real_measure(*arguments, **options)
        return measured if options.get("by_depth") else measured | {"accuracy": accuracies.pop(0)}

    def save(path: Path, state: dict[str, Any]) -> None:
        if path.name == "last.pt" and len(state["rows"]) == 2:
            raise KeyboardInterrupt
        real_save(path, state)

    monkeypatch.setattr(trainer, "measure_split", measure)
    monkeypatch.setattr(checkpoint, "save_checkpoint", save)
    with pytest.raises(KeyboardInterrupt):
        fit(small_config(tmp_path), progress=False)
    monkeypatch.setattr(checkpoint, "save_checkpoint", real_save)
    accuracies[:] = [0.09] * 10
    result = fit(small_config(tmp_path), resume=True, progress=False)
    assert (result["best_epoch"], result["validation_accuracy"]) == (2, 0.09)
    assert checkpoint.load_checkpoint(tmp_path / "best.pt")["step"] == int(read_metrics(tmp_path)[1]["step"])


def test_best_checkpoint_of_another_step_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    after_steps(monkeypatch, 7, stop())
    with pytest.raises(Interrupted):
        fit(small_config(tmp_path), progress=False)
    best = checkpoint.load_checkpoint(tmp_path / "best.pt")
    checkpoint.save_checkpoint(tmp_path / "best.pt", best | {"step": 1})
    with pytest.raises(ValueError, match=r"best.pt is of step 1, but the best was epoch 1: put the right one back"):
        fit(small_config(tmp_path), resume=True, progress=False)


def test_resume_without_a_checkpoint_starts(tmp_path: Path) -> None:
    assert fit(small_config(tmp_path, steps=2), resume=True, progress=False)["steps"] == 2


def test_refused_evaluations(tmp_path: Path, stopped_run: Path) -> None:
    with pytest.raises(ValueError, match=r"^split='holdout' is unknown") as error:
        evaluate(stopped_run, "holdout")
    sentence(error)
    with pytest.raises(FileNotFoundError, match=r"holds no checkpoint \(best.pt, last.pt\)"):
        evaluate(tmp_path)
    with pytest.raises(ValueError, match=r"unknown fields: guidance.phase"):
        FitConfig.of(**{"guidance": {"phase": 1}})


# --- writing ---


def test_full_disk_keeps_the_checkpoint(tmp_path: Path) -> None:
    """A file-size limit makes a real write fail in the middle of the file."""
    path = tmp_path / "last.pt"
    checkpoint.save_checkpoint(path, {"step": 1})
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (20_000, hard))
    try:
        with pytest.raises(OSError, match=r"last.pt could not be written: File too large; make room") as error:
            checkpoint.save_checkpoint(path, {"step": 2, "net": torch.zeros(100_000)})
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
    sentence(error)
    assert torch.load(path, weights_only=True)["step"] == 1
    assert [file.name for file in tmp_path.iterdir()] == ["last.pt"]


@pytest.mark.parametrize("function", ["os.replace", "os.fsync", "torch.save"])
def test_failed_save_keeps_the_checkpoint(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, function: str) -> None:
    """In a run: the sentence, and a resume from the checkpoint before that ends as if nothing had happened."""
    whole, parts = (small_config(tmp_path / name, checkpoint_every=2) for name in ("whole", "parts"))
    fit(whole, progress=False)
    module, name = function.split(".")

    def fail(*_: Any, **__: Any) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    with monkeypatch.context() as patch:
        after_steps(patch, 4, lambda _: patch.setattr(sys.modules[module], name, fail))
        with pytest.raises(OSError, match=r"last.pt could not be written: No space left on device; make room") as error:
            fit(parts, progress=False)
    sentence(error)
    assert checkpoint.load_checkpoint(tmp_path / "parts/last.pt")["step"] == 2
    assert not list((tmp_path / "parts").glob(".*"))
    fit(parts, resume=True, progress=False)
    assert_same_run(tmp_path / "whole", tmp_path / "parts")


def test_folder_that_cannot_be_written(tmp_path: Path) -> None:
    with pytest.raises(OSError, match="could not be written: No such file or directory; see whether the folder"):
        checkpoint.write_json(tmp_path / "absent" / "result.json", {})


# --- losses that are not finite ---


def test_diverged_loss(tmp_path: Path) -> None:
    with pytest.raises(Diverged, match=r"module . of 3 is NaN or infinite at step .*: lower lr=1e\+30, or") as error:
        fit(small_config(tmp_path, lr=1e30), progress=False)
    assert "no checkpoint was written before" in sentence(error)
    assert not (tmp_path / "last.pt").exists()


@pytest.mark.parametrize("stopping", [False, True])
def test_diverged_parameter_is_never_saved(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, stopping: bool) -> None:
    def poison(net: Any) -> None:
        with torch.no_grad():
            net.backbone.head.weight[0, 0] = math.nan
        if stopping:
            os.kill(os.getpid(), signal.SIGTERM)

    after_steps(monkeypatch, 6, poison)
    with pytest.raises(Diverged, match=r"the parameter backbone.head.weight is NaN or infinite at step 6") as error:
        fit(small_config(tmp_path, checkpoint_every=1), progress=False)
    assert "last.pt is the last good checkpoint" in sentence(error)
    assert checkpoint.load_checkpoint(tmp_path / "last.pt")["step"] == 5


def test_diverged_module_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def poison(net: Any) -> None:
        with torch.no_grad():
            net.auxiliary[1][-1].weight[0, 0] = math.inf

    after_steps(monkeypatch, 3, poison)
    with pytest.raises(Diverged, match=r"loss of local module 2 of 3 is NaN or infinite at step 4 \(last .* step 2\)"):
        fit(small_config(tmp_path), progress=False)


def test_configuration_survives_being_written(tmp_path: Path) -> None:
    config = small_config(tmp_path, schedule="step", milestones=[1, 1.5], cuts=["stem", "block1"], clip=1e-5)
    assert FitConfig.of(**config.plain()) == config


def test_the_plan_of_guided_steps_is_found_before_the_first_step(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    order: list[str] = []
    real_search, real_step = plans.find_guided_plan, trainer.train_step

    def search(*arguments: Any, **options: Any) -> Any:
        order.append("search")
        return real_search(*arguments, **options)

    def step(*arguments: Any, **options: Any) -> Any:
        order.append("guided" if options["guided"] else "local")
        return real_step(*arguments, **options)

    monkeypatch.setattr(plans, "find_guided_plan", search)
    monkeypatch.setattr(trainer, "train_step", step)
    fit(small_config(tmp_path, guidance=GuidanceConfig(name="phased", share=0.25), memory="local"), progress=False)
    assert order[:2] == ["search", "local"] and "guided" in order and order.count("search") == 1
