"""Networks, data and criteria that are handed in: any module, any loader, with all that a run promises."""

import copy
import csv
import json
import random
import signal
import sys
import types
import warnings
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from networks import SmallNet
from test_trainer import after_steps, assert_same_run, stop
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils.data import DataLoader, Dataset, TensorDataset

import torchlocal as tl
from torchlocal.compare import CompareConfig, compare
from torchlocal.data import load_data
from torchlocal.run import checkpoint
from torchlocal.run.callbacks import RunState
from torchlocal.run.export import export
from torchlocal.run.trackers import MLflow, WandB
from torchlocal.run.trainer import Interrupted


def config(out: Path, **changes: Any) -> tl.FitConfig:
    """Two epochs of 5 steps."""
    values: dict[str, Any] = {
        "out": str(out), "modules": 3, "guidance": tl.GuidanceConfig(period=3, length=2), "memory": "full", "epochs": 2,
        "lr": 0.05, "precision": "fp32", "device": "cpu", "num_threads": 1, "log_every": 2, "tensorboard": False,
    }  # fmt: skip
    return tl.FitConfig.of(**(values | changes))


class Noisy(Dataset[tuple[Tensor, Tensor]]):
    """Images that are augmented with torch's, numpy's and Python's global generators."""

    def __getitem__(self, index: int) -> tuple[Tensor, Tensor]:
        image = torch.full((1, 8, 8), index / 100) + torch.rand(1, 8, 8)
        image = image + float(np.random.rand()) + random.random()
        return image, torch.tensor(index % 10)

    def __len__(self) -> int:
        return 40


def loaders(num_workers: int = 0) -> dict[str, Any]:
    held_out = TensorDataset(
        torch.randn(20, 1, 8, 8, generator=torch.Generator().manual_seed(0)), torch.arange(20) % 10
    )
    return {
        "train": DataLoader(Noisy(), batch_size=8, shuffle=True, num_workers=num_workers),
        "validation": DataLoader(held_out, batch_size=8),
        "test": DataLoader(held_out, batch_size=20),
    }


# --- what a run promises ---


@pytest.mark.parametrize("num_workers", [0, 2])
def test_stop_inside_of_an_epoch_and_resume(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, num_workers: int) -> None:
    """The order and the augmentation are a function of the epoch, though they come from the global generators."""

    def fit(out: str, **options: Any) -> nn.Module:
        torch.manual_seed(1)
        model = SmallNet(10, 1)
        torch.manual_seed(hash(out) % 1000), random.seed(out), np.random.seed(len(out))  # whatever was drawn before
        tl.fit(config(tmp_path / out), model=model, data=loaders(num_workers), progress=False, **options)
        return model

    whole = fit("whole")
    after_steps(monkeypatch, 3, stop(signal.SIGTERM))
    with pytest.raises(Interrupted, match="after step 3 of 10"):
        fit("parts")
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        parts = fit("parts", resume=True)
    assert_same_run(tmp_path / "whole", tmp_path / "parts")
    assert all(torch.equal(a, b) for a, b in zip(whole.state_dict().values(), parts.state_dict().values(), strict=True))


def test_other_epochs_have_other_batches_and_global_generators_are_left_alone() -> None:
    split = tl.data.bundle(loaders()).train
    torch.manual_seed(5), np.random.seed(5), random.seed(5)
    before = torch.rand(1).item(), np.random.rand(), random.random()
    torch.manual_seed(5), np.random.seed(5), random.seed(5)
    first, again, second = ([x for x, _ in split.batches(8, epoch=epoch, train=True)] for epoch in (0, 0, 1))
    assert (torch.rand(1).item(), np.random.rand(), random.random()) == before
    assert all(map(torch.equal, first, again)) and not any(map(torch.equal, first, second))
    rest = [x for x, _ in split.batches(8, epoch=1, train=True, start=3)]
    assert len(rest) == 2 and all(map(torch.equal, rest, second[3:]))


def test_a_generator_and_a_sampler_of_the_loader(tmp_path: Path) -> None:
    class Epochs(torch.utils.data.Sampler[int]):
        epoch = 0

        def set_epoch(self, epoch: int) -> None:
            self.epoch = epoch

        def __iter__(self) -> Iterator[int]:
            return iter(torch.randperm(40, generator=torch.Generator().manual_seed(self.epoch)).tolist())

        def __len__(self) -> int:
            return 40

    data = TensorDataset(torch.arange(40).float(), torch.arange(40))
    for loader in (
        DataLoader(data, batch_size=8, shuffle=True, generator=torch.Generator().manual_seed(3)),
        DataLoader(data, batch_size=8, sampler=Epochs()),
    ):
        split = tl.data.bundle({"train": loader, "validation": loader}).train
        passes = [torch.cat([y for _, y in split.batches(8, epoch=epoch, train=True)]) for epoch in (0, 1, 0)]
        assert torch.equal(passes[0], passes[2]) and not torch.equal(passes[0], passes[1])
        rest = torch.cat([y for _, y in split.batches(8, epoch=1, train=True, start=3)])
        assert torch.equal(rest, passes[1][24:])


def test_a_loader_with_a_state_of_its_own_says_so(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    class Hidden:
        def __init__(self) -> None:
            self.numbers = np.random.default_rng()

        def __len__(self) -> int:
            return 5

        def __iter__(self) -> Iterator[tuple[Tensor, Tensor]]:
            for _ in range(5):
                yield torch.from_numpy(self.numbers.random((8, 1, 8, 8), np.float32)), torch.arange(8)

    data = loaders() | {"train": Hidden()}
    after_steps(monkeypatch, 3, stop(signal.SIGTERM))
    with pytest.raises(Interrupted):
        tl.fit(config(tmp_path), model=lambda: SmallNet(10, 1), data=data, progress=False)
    with pytest.warns(UserWarning, match="epoch 1 come in another order than before .* not bit for bit"):
        tl.fit(config(tmp_path), model=lambda: SmallNet(10, 1), data=data, progress=False, resume=True)


def test_the_module_holds_the_best_weights_also_of_a_run_that_had_ended(tmp_path: Path) -> None:
    model = SmallNet(10, 1)
    result = tl.fit(config(tmp_path), model=model, data=loaders(), progress=False)
    best = torch.load(tmp_path / "best.pt", weights_only=True)["net"]
    assert not model.training
    assert all(torch.equal(value, best[f"backbone.{name}"]) for name, value in model.state_dict().items())
    other = SmallNet(10, 1)
    assert tl.fit(config(tmp_path), model=other, data=loaders(), progress=False, resume=True) == result
    assert all(map(torch.equal, other.state_dict().values(), model.state_dict().values()))
    measured = tl.evaluate(tmp_path, model=SmallNet(10, 1), data=loaders())
    assert measured["accuracy"] == result["test_accuracy"] and measured["num_images"] == 20
    assert measured["depth_loss"] == result["depth_loss"] and len(measured["depth_loss"]) == 3


def test_the_seed_decides_the_weights_of_a_function(tmp_path: Path) -> None:
    states = []
    for name, seed in (("a", 0), ("b", 0), ("c", 1)):
        made: list[nn.Module] = []
        torch.manual_seed(len(states))
        tl.fit(
            config(tmp_path / name, seed=seed, steps=3),
            model=lambda made=made: made.append(SmallNet(10, 1)) or made[-1],  # type: ignore[func-returns-value,misc]
            data=loaders(),
            progress=False,
        )
        states.append(made[0].state_dict()["head.weight"])
    assert torch.equal(states[0], states[1]) and not torch.equal(states[0], states[2])


def test_a_network_of_ones_own_on_data_by_name_is_that_by_name(tmp_path: Path) -> None:
    named = {"data": "digits", "num_train": 160, "num_validation": 32, "batch_size": 32}
    results = []
    for name, own in (
        ("name", {}),
        ("own", {"model": lambda: tl.models.build_model("mlp", num_classes=10, in_channels=1, image_size=(8, 8))}),
    ):
        options = {"model": "mlp"} if not own else {}
        results.append(tl.fit(config(tmp_path / name, **named, **options), progress=False, **own))
    for key in ("test_accuracy", "test_loss", "depth_loss", "steps", "guided_steps"):
        assert results[0][key] == results[1][key]
    data = load_data("digits", num_train=160, num_validation=32)
    bundle = tl.fit(config(tmp_path / "bundle", model="mlp", batch_size=32), data=data, progress=False)
    assert bundle["test_loss"] == results[0]["test_loss"] and bundle["config"]["data"]["name"] == "own:digits"


# --- batches and targets of any kind ---


class Words(nn.Module):
    """A language model that is called with keyword arguments and returns more than its logits."""

    def __init__(self) -> None:
        super().__init__()
        self.embedding = nn.Embedding(16, 8)
        self.layers = nn.ModuleList(nn.Sequential(nn.Linear(8, 8), nn.Dropout(0.1), nn.GELU()) for _ in range(3))
        self.head = nn.Linear(8, 16)

    def forward(self, ids: Tensor, mask: Tensor) -> dict[str, Tensor]:
        x = self.embedding(ids)
        for layer in self.layers:
            x = x + layer(x).masked_fill(mask[..., None], 0)
        return {"logits": self.head(x), "length": mask.sum()}


def next_word(logits: Tensor, ids: Tensor) -> Tensor:
    return F.cross_entropy(logits[:, :-1].flatten(0, 1), ids[:, 1:].flatten())


def words(num_batches: int, seed: int) -> list[tuple[dict[str, Tensor], Tensor]]:
    draw = torch.Generator().manual_seed(seed)
    batches = [torch.randint(16, (4, 6), generator=draw) for _ in range(num_batches)]
    return [({"ids": ids, "mask": torch.zeros(4, 6, dtype=torch.bool)}, ids) for ids in batches]


def test_a_language_model_with_dict_batches(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Lists are loaders, too; without classes the best epoch is that of the lowest loss, and nothing is accurate."""
    data = {"train": words(5, 0), "validation": words(2, 1)}
    own: dict[str, Any] = {"model": Words, "data": data, "criterion": next_word}
    options = {"optimizer": "adamw", "lr": 0.01, "modules": 2, "epochs": 3}
    result = tl.fit(config(tmp_path / "whole", **options), progress=False, **own)
    with open(tmp_path / "whole" / "metrics.csv", newline="") as file:
        rows = list(csv.DictReader(file))
    losses = [float(row["validation_loss"]) for row in rows]
    assert result["validation_loss"] == min(losses) and losses.index(min(losses)) + 1 == result["best_epoch"]
    assert result["validation_accuracy"] is None and {row["validation_accuracy"] for row in rows} == {""}
    assert result["test_accuracy"] is None and result["test_loss"] is None
    assert json.loads((tmp_path / "whole" / "result.json").read_text()) == result
    after_steps(monkeypatch, 4, stop(signal.SIGTERM))
    with pytest.raises(Interrupted):
        tl.fit(config(tmp_path / "parts", **options), progress=False, **own)
    tl.fit(config(tmp_path / "parts", **options), progress=False, resume=True, **own)
    assert_same_run(tmp_path / "whole", tmp_path / "parts")
    measured = tl.evaluate(tmp_path / "whole", "validation", **own)
    assert measured["loss"] == result["validation_loss"] and measured["accuracy"] is None
    with pytest.raises(ValueError, match="have no such part"):
        tl.evaluate(tmp_path / "whole", "test", **own)


class TwoInputs(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.first, self.second, self.third = nn.Linear(4, 8), nn.Linear(8, 8), nn.Linear(8, 2)

    def forward(self, a: Tensor, b: Tensor) -> tuple[Tensor, Tensor]:
        x = torch.relu(self.first(a + b))
        return self.third(torch.relu(self.second(x))), x.detach()


def test_tuples_a_prediction_and_numbers_as_targets(tmp_path: Path) -> None:
    draw = torch.Generator().manual_seed(0)
    pairs = [
        ((torch.randn(8, 4, generator=draw), torch.ones(8, 4)), torch.randn(8, 2, generator=draw)) for _ in range(6)
    ]
    result = tl.fit(
        config(tmp_path, modules=2, rule="greedy", auxiliary="linear", lr=0.01),
        model=TwoInputs(),
        data={"train": pairs[:5], "validation": pairs[5:], "test": pairs[5:]},
        criterion=F.mse_loss,
        prediction=lambda output: output[0],
        progress=False,
    )
    assert result["test_accuracy"] is None and result["test_loss"] == result["validation_loss"] > 0


# --- comparisons ---


def test_compare_own_objects(tmp_path: Path) -> None:
    start = SmallNet(10, 1)
    before = copy.deepcopy(start.state_dict())
    options: dict[str, Any] = {"methods": ("end-to-end", "local", "pgl"), "timing_rounds": 1}
    made = CompareConfig(out=str(tmp_path / "made"), seeds=(0, 1), fit=config(tmp_path), **options)
    found = compare(made, model=lambda: SmallNet(10, 1), data=loaders(), progress=False)
    assert [result.method for result in found.results] == ["end-to-end", "local", "pgl"]
    assert all(len(result.test) == 2 and result.peak_bytes for result in found.results)
    assert "5 training batches of 8" in dict(found.facts)["Data"]
    copied = CompareConfig(out=str(tmp_path / "copied"), fit=config(tmp_path, steps=3), **options)
    assert "own:SmallNet" in compare(copied, model=start, data=loaders(), progress=False).title
    assert all(map(torch.equal, start.state_dict().values(), before.values()))  # copies were trained


def test_without_classes_the_loss_is_compared(tmp_path: Path) -> None:
    fit = config(tmp_path, modules=2, optimizer="adamw", lr=0.01, epochs=2)
    methods = ("end-to-end", "local")
    made = CompareConfig(out=str(tmp_path / "words"), methods=methods, timing_rounds=0, fit=fit)
    data = {part: words(5, number) for number, part in enumerate(("train", "validation", "test"))}
    own: dict[str, Any] = {"model": Words, "criterion": next_word, "progress": False}
    found = compare(made, data=data, **own)
    for result in found.results:
        run = json.loads((tmp_path / "words" / result.method / "seed0" / "result.json").read_text())
        assert result.test == (run["test_loss"],) and result.depth == (tuple(run["depth_loss"]),)
    text = (tmp_path / "words" / "report.md").read_text()
    assert "4 Test loss (n) | 5 Gap closed" in text and f"{found.results[0].mean:#.4g} (1)" in text
    assert "accuracy" not in text and "erplexity" not in text
    with pytest.raises(ValueError, match=r'^data: a comparison reports what test data tell: give "test" as well'):
        compare(made, data={"train": words(5, 0), "validation": words(2, 1)}, **own)


# --- what cannot work ---


@pytest.mark.parametrize(
    ("own", "changes", "told"),
    [
        ({"data": {"train": iter([]), "validation": []}}, {}, r'^data\["train"\] gives its batches only once'),
        ({"data": {"train": [], "validation": []}}, {}, r'^data\["train"\] gives no batch'),
        ({"data": {"train": 3, "validation": []}}, {}, r'^data\["train"\] has no length'),
        ({"data": {"train": [(torch.ones(2, 1, 8, 8), torch.ones(2), 1)], "validation": []}}, {}, "3 values where"),
        ({"data": {"train": [{"x": torch.ones(2)}], "validation": []}}, {}, "gives a dict where .* is expected"),
        ({"data": {"training": []}}, {}, "data=the parts 'training' cannot be used"),
        ({"data": loaders()}, {}, r"model='resnet20' is made for a number of classes, which loaders do not tell"),
        ({"data": loaders()}, {"num_train": 3}, r"^num_train=3 means nothing to data of your own: leave it out$"),
        ({"model": SmallNet(10, 1)}, {"model": "vgg8b"}, r"^model='vgg8b' names another than the one"),
        ({"model": 3}, {}, r"^model=3 must be an nn.Module"),
        ({"model": lambda: 3}, {}, r"^model\(\) returned int"),
        ({"criterion": F.mse_loss}, {"label_smoothing": 0.1}, r"^label_smoothing=0.1 means nothing to a criterion"),
    ],
)  # fmt: skip
def test_mistakes(tmp_path: Path, own: dict[str, Any], changes: dict[str, Any], told: str) -> None:
    with pytest.raises(ValueError, match=told):
        tl.fit(
            config(tmp_path, **({"num_train": 160, "num_validation": 20} if "data" not in own else {}) | changes),
            progress=False,
            **own,
        )


def test_a_loader_that_ends_too_early(tmp_path: Path) -> None:
    class Short(list):  # type: ignore[type-arg]
        def __len__(self) -> int:
            return 5

    pairs = Short([(torch.randn(8, 1, 8, 8), torch.arange(8))] * 2)
    with pytest.raises(ValueError, match=r'^data\["train"\] gave 2 batches, and its len\(\) says 5'):
        tl.fit(config(tmp_path), model=SmallNet(10, 1), data=loaders() | {"train": pairs}, progress=False)


def test_objects_are_asked_for_where_they_are_not_there(tmp_path: Path) -> None:
    tl.fit(config(tmp_path), model=SmallNet(10, 1), data=loaders(), progress=False)
    with pytest.raises(ValueError, match="data='own:own' is an object of the program that began this run"):
        tl.evaluate(tmp_path)
    with pytest.raises(ValueError, match="model='own:SmallNet' is an object of the program"):
        tl.evaluate(tmp_path, data=loaders())
    with pytest.raises(ValueError, match="network or data of your own, which are not there"):
        export(tmp_path, to=tmp_path / "model.pt")
    with pytest.raises(ValueError, match=r"another configuration: model \('own:SmallNet' there"):
        tl.fit(config(tmp_path), model=nn.Linear(2, 2), data=loaders(), resume=True, progress=False)
    (tmp_path / "result.json").unlink()
    with pytest.raises(ValueError, match=r"criterion is cross-entropy there and nll_loss here"):
        tl.fit(
            config(tmp_path), model=SmallNet(10, 1), data=loaders(), criterion=F.nll_loss, resume=True, progress=False
        )


# --- callbacks ---


class Told(tl.Callback):
    def __init__(self) -> None:
        self.calls: list[tuple[str, int, Any]] = []

    def on_start(self, state: RunState) -> None:
        self.calls.append(("start", state.step, state.num_steps))

    def on_step(self, state: RunState, values: Mapping[str, float]) -> None:
        self.calls.append(("step", state.step, sorted(values)))

    def on_epoch(self, state: RunState, row: Mapping[str, float]) -> None:
        self.calls.append(("epoch", state.step, len(state.rows)))

    def on_checkpoint(self, state: RunState, path: Path) -> None:
        self.calls.append(("checkpoint", state.step, path.name))

    def on_end(self, state: RunState, result: Mapping[str, Any] | None) -> None:
        self.calls.append(("end", state.step, None if result is None else result["steps"]))


def test_callbacks(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    told = Told()
    own: dict[str, Any] = {"model": lambda: SmallNet(10, 1), "data": loaders(), "progress": False, "callbacks": [told]}
    after_steps(monkeypatch, 3, stop(signal.SIGTERM))
    with pytest.raises(Interrupted):
        tl.fit(config(tmp_path, steps=6), **own)
    losses = ["images_per_second", "loss/global", "loss/module_1", "loss/module_2", "lr", "guided_share"]
    assert told.calls == [
        ("start", 0, 6), ("step", 2, sorted(losses)), ("checkpoint", 3, "last.pt"), ("end", 3, None),
    ]  # fmt: skip
    told.calls.clear()
    tl.fit(config(tmp_path, steps=6), resume=True, **own)
    kinds = [(kind, step) for kind, step, _ in told.calls]
    assert kinds[:6] == [("start", 3), ("step", 4), ("step", 5), ("checkpoint", 5), ("checkpoint", 5), ("epoch", 5)]
    assert kinds[-1] == ("end", 6) and told.calls[-1][2] == 6


def test_what_a_callback_raises_ends_the_run_and_every_other_is_told(tmp_path: Path) -> None:
    class Broken(tl.Callback):
        def on_step(self, state: RunState, values: Mapping[str, float]) -> None:
            raise RuntimeError("no connection")

    told = Told()
    with pytest.raises(RuntimeError, match="no connection"):
        tl.fit(config(tmp_path), model=SmallNet(10, 1), data=loaders(), progress=False, callbacks=[Broken(), told])
    assert told.calls[-1] == ("end", 2, None)


class Recorder(types.ModuleType):
    """Stands in for a package that cannot be reached here: notes what is called."""

    def __init__(self, name: str) -> None:
        super().__init__(name)
        self.calls: list[tuple[str, tuple[Any, ...], dict[str, Any]]] = []
        self.summary: dict[str, Any] = {}
        self.runs: list[Any] = []

    def __getattr__(self, name: str) -> Callable[..., Any]:
        if name.startswith("__"):
            raise AttributeError(name)

        def call(*arguments: Any, **options: Any) -> Any:
            self.calls.append((name, arguments, options))
            return self.runs if name == "search_runs" else self

        return call


def test_wandb(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "wandb", recorder := Recorder("wandb"))
    result = tl.fit(
        config(tmp_path), model=SmallNet(10, 1), data=loaders(), progress=False, callbacks=[WandB("mine", tags=["a"])]
    )
    name, _, options = recorder.calls[0]
    run = checkpoint.load_checkpoint(tmp_path / "last.pt")["run"]
    assert name == "init" and options["project"] == "mine" and options["tags"] == ["a"]
    assert options["id"] == run and options["resume"] == "allow" and options["config"]["optimisation"]["epochs"] == 2
    logged = [(arguments[0], options["step"]) for name, arguments, options in recorder.calls if name == "log"]
    assert [step for _, step in logged] == [2, 4, 5, 5, 6, 8, 10, 10] and "loss/global" in logged[0][0]
    assert set(logged[3][0]) == {"validation/loss", "validation/accuracy"}
    assert recorder.summary["test_accuracy"] == result["test_accuracy"]
    assert recorder.calls[-1] == ("finish", (), {"exit_code": 0})  # as tried with wandb 0.31 and mlflow 3.17


def test_mlflow(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "mlflow", recorder := Recorder("mlflow"))
    after_steps(monkeypatch, 3, stop(signal.SIGTERM))
    own: dict[str, Any] = {"model": lambda: SmallNet(10, 1), "data": loaders(), "progress": False}
    with pytest.raises(Interrupted):
        tl.fit(config(tmp_path), callbacks=[MLflow("mine", tracking_uri="file:here")], **own)
    names = [name for name, _, _ in recorder.calls]
    assert names == [
        "set_tracking_uri", "set_experiment", "search_runs", "start_run", "log_params", "log_metrics", "end_run",
    ]  # fmt: skip
    run = checkpoint.load_checkpoint(tmp_path / "last.pt")["run"]
    assert recorder.calls[3][2] == {"run_name": str(tmp_path), "tags": {"torchlocal": run}}
    assert recorder.calls[4][1][0]["guidance.period"] == 3 and recorder.calls[-1][1] == ("KILLED",)
    recorder.calls.clear()
    recorder.runs.append(types.SimpleNamespace(info=types.SimpleNamespace(run_id="first")))
    tl.fit(config(tmp_path), callbacks=[MLflow()], resume=True, **own)
    assert recorder.calls[1] == ("start_run", (), {"run_id": "first"}) and recorder.calls[-1][1] == ("FINISHED",)


@pytest.mark.parametrize("kind", [WandB, MLflow])
def test_a_tracker_that_is_not_installed(monkeypatch: pytest.MonkeyPatch, kind: Any) -> None:
    monkeypatch.setitem(sys.modules, kind.__name__.lower(), None)
    with pytest.raises(ValueError, match=rf"pip install 'torchlocal\[{kind.__name__.lower()}\]'"):
        kind()
