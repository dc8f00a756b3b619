"""Runs on text: exact token means, what is measured, stop and resume, and text from what was trained."""

from __future__ import annotations

import csv
import json
import math
import re
import signal
from pathlib import Path
from typing import Any

import pytest
import torch
from networks import Decoder
from test_trainer import after_steps, assert_equal, stop
from torch import Tensor
from torch.nn import functional as F

import torchlocal as tl
from torchlocal.cli.commands import main
from torchlocal.data import load_data
from torchlocal.data.tokenizers import shipped_tokenizer
from torchlocal.models import GPT
from torchlocal.run import checkpoint, trainer
from torchlocal.run.build import build_network, build_optimizer, resolve_execution, train_step
from torchlocal.run.config import FitConfig
from torchlocal.run.generation import continued, generate
from torchlocal.run.own import Own
from torchlocal.run.trainer import Interrupted
from torchlocal.tokens import TokenCrossEntropy

TIMES = ("seconds", "train_seconds", "epoch_seconds", "tokens_per_second", "run", "out", "root")


SMALL = {"layers": 4, "width": 16, "heads": 2, "tied": False}


def config(texts: Path, out: Path, **changes: Any) -> FitConfig:
    """Two epochs of six steps with periodic guidance; an epoch is a part of a pass over the rows."""
    values: dict[str, Any] = {
        "out": str(out), "model": "gpt-nano", "model_options": SMALL, "data": f"text:{texts}",
        "data_root": str(texts.parent / "root"),
        "context": 16, "num_validation": 9, "epoch_rows": 50, "epochs": 2, "batch_size": 8, "optimizer": "adamw",
        "lr": 0.01, "modules": 3, "rule": "greedy", "auxiliary": "linear", "memory": "full", "precision": "fp32",
        "device": "cpu", "num_threads": 1, "log_every": 2, "tensorboard": False,
        "guidance": tl.GuidanceConfig(period=3, length=1),
    }  # fmt: skip
    return FitConfig.of(**(values | changes))


@pytest.fixture(scope="module")
def run(texts: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("run")
    tl.fit(config(texts, out), progress=False)
    return out


# --- the loss ---


def test_the_loss_is_the_mean_over_tokens_that_count() -> None:
    draw = torch.Generator().manual_seed(0)
    scores, target = torch.randn(3, 5, 7, generator=draw), torch.randint(7, (3, 5), generator=draw)
    target[0, 2:], target[2] = -100, -100
    losses = [-scores[n, t].log_softmax(0)[target[n, t]] for n in range(3) for t in range(5) if target[n, t] != -100]
    assert len(losses) == 7
    torch.testing.assert_close(TokenCrossEntropy()(scores, target), torch.stack(losses).mean())
    torch.testing.assert_close(TokenCrossEntropy(reduction="sum")(scores, target), torch.stack(losses).sum())


def ignored(vocabulary: int = 11) -> tuple[Tensor, Tensor]:
    """Six rows whose targets count in very different numbers; in two of them none does."""
    draw = torch.Generator().manual_seed(1)
    ids, target = (torch.randint(vocabulary, (6, 8), generator=draw) for _ in range(2))
    for row, count in enumerate((8, 1, 0, 5, 0, 3)):
        target[row, count:] = -100
    return ids, target


def make_net(**options: Any) -> tl.DecoupledNetwork:
    torch.manual_seed(0)
    criterion = options.pop("criterion", TokenCrossEntropy())
    model = Decoder(11, 8, dropout=0.0, **options)
    rule = tl.GreedyRule("linear")
    return tl.decouple(model, cuts=["blocks.0", "blocks.2"], sample=ignored()[0], rule=rule, criterion=criterion)


def by_hand(ids: Tensor, target: Tensor, guided: bool) -> list[Tensor]:
    """Gradients by one backward pass of plain PyTorch over the sum of all losses, each detached from the next."""
    net = make_net()
    model: Any = net.backbone
    x, losses = model.tokens(ids) + model.places.weight[: ids.shape[1]], []
    for i, block in enumerate(model.blocks):
        x = block(x)
        if i in (0, 2):
            losses.append(flat(net.auxiliary[i // 2](x.detach() if guided else x), target))
            x = x if guided else x.detach()
    torch.stack([*losses, flat(model.head(model.norm(x)), target)]).sum().backward()
    return [parameter.grad for parameter in net.parameters() if parameter.grad is not None]


def flat(scores: Tensor, target: Tensor) -> Tensor:
    return F.cross_entropy(scores.reshape(-1, scores.shape[-1]), target.reshape(-1))


@pytest.mark.parametrize("guided", [False, True])
@pytest.mark.parametrize("accumulate", [1, 2, 3, 6])
def test_accumulated_rows_count_by_their_tokens(accumulate: int, guided: bool) -> None:
    ids, target = ignored()
    net, found = make_net(), []
    settings = FitConfig.of(accumulate=accumulate, batch_size=6 // accumulate, memory="full", precision="fp32")
    optimizer = torch.optim.SGD(net.parameters(), lr=0.0)
    optimizer.register_step_pre_hook(lambda *_: found.extend(p.grad.clone() for p in net.parameters()))
    batches = list(zip(ids.chunk(accumulate), target.chunk(accumulate), strict=True))
    losses = train_step(net, optimizer, batches, config=settings, execution=resolve_execution(settings), guided=guided)
    expected = by_hand(ids, target, guided)
    assert len(found) == len(expected) > 40
    for one, other in zip(found, expected, strict=True):
        torch.testing.assert_close(one, other)
    torch.testing.assert_close(losses[-1], flat(make_net().backbone(ids), target))


@pytest.mark.parametrize("parts", [2, 3, 6])
def test_micro_batches_count_by_their_tokens(parts: int) -> None:
    """A guided step whose batch is cut, and a criterion that divides by what counts."""
    from torchlocal.recompute import GuidedPlan

    ids, target = ignored()
    net = make_net()
    whole = net.guided_plan(ids, target, memory="full")
    plan = GuidedPlan(**{**vars(whole), "micro_batches": parts})
    losses = net.guided_step(ids, target, memory=plan)
    for parameter, expected in zip(net.parameters(), by_hand(ids, target, True), strict=True):
        torch.testing.assert_close(parameter.grad, expected)
    torch.testing.assert_close(losses[-1], flat(make_net().backbone(ids), target))


def test_runs_with_chunked_scores_are_those_of_whole_ones(
    texts: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    seen: list[int] = []
    real = TokenCrossEntropy.from_features

    def noted(self: TokenCrossEntropy, features: Tensor, *given: Any) -> Tensor:
        seen.append(features.shape[-1])
        return real(self, features, *given)

    monkeypatch.setattr(TokenCrossEntropy, "from_features", noted)
    whole, chunked = (
        tl.fit(config(texts, tmp_path / scores, scores=scores), progress=False) for scores in ("whole", "chunked")
    )
    assert len(seen) == chunked["steps"]  # of rule greedy, which makes all its scores, the last module alone
    assert chunked["validation_loss"] == pytest.approx(whole["validation_loss"], rel=1e-3)


# --- the optimizer ---


def test_what_decays(texts: Path, tmp_path: Path) -> None:
    """By names: matrices of linear layers; the auxiliary networks apart, at a learning rate of their own."""
    changes = {
        "model_options": SMALL | {"tied": True}, "weight_decay": 0.1, "weight_decay_of": "matrices",
        "auxiliary_lr": 0.002, "auxiliary_weight_decay": 0.03,
    }  # fmt: skip
    net, optimizer = built(config(texts, tmp_path, **changes))
    told = {name: (g["weight_decay"], g["lr"]) for name, g in group_of(net, optimizer).items()}
    expected = {}
    for name, parameter in net.named_parameters():
        inner = name.startswith("auxiliary.")
        matrix = parameter.ndim == 2 and name != "backbone.embedding.weight"
        expected[name] = ((0.03 if inner else 0.1) if matrix else 0.0, 0.002 if inner else 0.01)
    assert told == expected and len(told) > 30 and "backbone.read_out.weight" not in told
    assert {name for name, (decay, _) in told.items() if decay == 0.1} == {
        f"backbone.blocks.{i}.{part}.weight"
        for i in range(4)
        for part in ("attention.qkv", "attention.out", "mlp.up", "mlp.down")
    }
    net, optimizer = built(config(texts, tmp_path, weight_decay=0.1, auxiliary_weight_decay=0.0))
    told = {name: (g["weight_decay"], g["lr"]) for name, g in group_of(net, optimizer).items()}
    assert told == {name: (0.0 if name.startswith("auxiliary.") else 0.1, 0.01) for name, _ in net.named_parameters()}
    net, optimizer = built(config(texts, tmp_path, weight_decay=0.1))
    assert len(optimizer.param_groups) == 1


def built(settings: FitConfig) -> tuple[tl.DecoupledNetwork, torch.optim.Optimizer]:
    execution = resolve_execution(settings)
    net = build_network(settings, Own().load(settings), execution)
    return net, build_optimizer(settings, net)


def group_of(net: tl.DecoupledNetwork, optimizer: torch.optim.Optimizer) -> dict[str, Any]:
    names = {id(parameter): name for name, parameter in net.named_parameters()}
    found = [(names[id(parameter)], group) for group in optimizer.param_groups for parameter in group["params"]]
    assert len(found) == len(dict(found)) == len(names)
    return dict(found)


def test_every_group_follows_the_schedule(texts: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Warm-up, stable, decay."""
    rates: list[list[float]] = []
    real = trainer.train_step

    def noted(net: Any, optimizer: Any, *arguments: Any, **options: Any) -> list[Tensor]:
        rates.append([group["lr"] for group in optimizer.param_groups])
        return real(net, optimizer, *arguments, **options)

    monkeypatch.setattr(trainer, "train_step", noted)
    changes = {"auxiliary_lr": 0.002, "schedule": "cosine", "decay": 0.5, "warmup_steps": 3}
    tl.fit(config(texts, tmp_path, **changes), progress=False)
    top = [1 / 3, 2 / 3, 1.0, 1.0, 1.0, 1.0] + [0.5 * (1 + math.cos(math.pi * i / 6)) for i in range(6)]
    for found, factor in zip(rates, top, strict=True):
        assert found == pytest.approx([0.01 * factor] * 2 + [0.002 * factor] * 2, rel=1e-9)


@pytest.mark.parametrize(
    ("changes", "told"),
    [
        ({"weight_decay_of": "some"}, "weight_decay_of='some' is unknown: give 'all' or 'matrices'"),
        ({"auxiliary_lr": 0}, "auxiliary_lr=0 must be a number above 0, or None"),
        ({"auxiliary_weight_decay": -1}, "auxiliary_weight_decay=-1 must be"),
        ({"warmup_steps": 3, "warmup_epochs": 1}, "warmup_steps=3 and warmup_epochs=1: give one of them"),
        ({"warmup_steps": 12}, "warmup_steps=12 leaves nothing of the 12 steps"),
        (
            {"optimizer": "Rprop", "weight_decay": 0.0, "auxiliary_weight_decay": 0.1},
            "auxiliary_weight_decay=0.1 is unknown to optimizer='Rprop': give auxiliary_weight_decay=0",
        ),
    ],
)
def test_options_that_cannot_work(changes: dict[str, Any], told: str, texts: Path, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=told):
        tl.fit(config(texts, tmp_path, **changes), progress=False)


@pytest.mark.parametrize("guided", [False, True])
def test_gradients_are_clipped_loss_by_loss(guided: bool) -> None:
    """By hand: each local module with its auxiliary network by itself; guided the whole backbone, each auxiliary."""
    ids, target = ignored()
    net, found = make_net(), []
    settings = FitConfig.of(batch_size=6, memory="full", precision="fp32", clip=0.05)
    optimizer = torch.optim.SGD(net.parameters(), lr=0.0)
    optimizer.register_step_pre_hook(lambda *_: found.extend(p.grad.clone() for p in net.parameters()))
    train_step(net, optimizer, [(ids, target)], config=settings, execution=resolve_execution(settings), guided=guided)
    module = {"tokens": 0, "places": 0, "blocks.0": 0, "blocks.1": 1, "blocks.2": 1}

    def belongs(name: str) -> Any:
        room, _, rest = name.partition(".")
        if room == "auxiliary":
            return f"auxiliary {rest[0]}" if guided else int(rest[0])
        return "backbone" if guided else next((k for start, k in module.items() if rest.startswith(start)), 2)

    gradients = dict(zip((name for name, _ in net.named_parameters()), by_hand(ids, target, guided), strict=True))
    squares: dict[Any, float] = {}
    for name, gradient in gradients.items():
        squares[belongs(name)] = squares.get(belongs(name), 0.0) + float(gradient.double().square().sum())
    assert len(squares) == 3 and min(squares.values()) > 0.05**2  # every one of them is clipped
    for one, (name, gradient) in zip(found, gradients.items(), strict=True):
        torch.testing.assert_close(one, gradient * (0.05 / squares[belongs(name)] ** 0.5), rtol=1e-4, atol=1e-8)


# --- what is measured ---


def test_what_a_run_writes(run: Path, texts: Path) -> None:
    with open(run / "metrics.csv", newline="") as file:
        rows = list(csv.DictReader(file))
    assert [row["tokens"] for row in rows] == [str(6 * 8 * 16), str(12 * 8 * 16)]
    assert not any("accuracy" in name or "images" in name for name in rows[0])
    result = json.loads((run / "result.json").read_text())
    data = load_data(f"text:{texts}", root=texts.parent / "root", context=16)
    losses = [float(row["validation_loss"]) for row in rows]
    assert result["validation_loss"] == min(losses) and result["best_epoch"] == losses.index(min(losses)) + 1
    for row in rows:
        assert float(row["validation_perplexity"]) == math.exp(float(row["validation_loss"]))
        bits = float(row["validation_loss"]) / math.log(2) / data.bytes_per_token["validation"]
        assert float(row["validation_bits_per_byte"]) == pytest.approx(bits, rel=1e-12)
    assert result["tokens"] == 12 * 8 * 16 and result["tokens_per_second"] > 0
    assert result["test_accuracy"] is None and result["depth_perplexity"][-1] == result["test_perplexity"]
    assert result["text"].startswith("40 documents, ") and losses[-1] < math.log(1024)
    assert (run / "tokenizer.json").read_text() == shipped_tokenizer().content


def test_evaluate_is_the_mean_over_all_tokens(run: Path, texts: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """By hand: one row at a time, its losses added up; bits per byte from the bytes of the documents themselves."""
    result = tl.evaluate(run)
    data = load_data(f"text:{texts}", root=texts.parent / "root", context=16)
    model = GPT(1024, 16, **SMALL).eval()
    saved = checkpoint.load_checkpoint(run / "best.pt")
    checkpoint.load_backbone(model, saved, run)
    total, count = 0.0, 0
    with torch.no_grad():
        for x, y in data.test.batches(1, train=False):
            for scores, token in zip(model(x)[0], y[0].tolist(), strict=True):
                if token != -100:
                    total, count = total - float(scores.double().log_softmax(0)[token]), count + 1
    assert count == data.tokens["test"] - 1 == result["num_tokens"]
    assert result["loss"] == pytest.approx(total / count, rel=1e-5)
    assert result["perplexity"] == math.exp(result["loss"]) and len(result["depth_perplexity"]) == 3
    ends = [0, *(i + 1 for i, token in enumerate(whole_tokens(data.test)) if token == shipped_tokenizer().end_of_text)]
    text = shipped_tokenizer().decode(whole_tokens(data.test))
    assert len(ends) > 2
    bits = total / count / math.log(2) * data.tokens["test"] / len(text.encode())
    assert result["bits_per_byte"] == pytest.approx(bits, rel=1e-5)

    assert main(["evaluate", str(run), "--device=cpu"]) == 0
    told = capsys.readouterr().out
    assert f"test perplexity {result['perplexity']:.2f}, loss {result['loss']:.4f}" in " ".join(told.split())
    for k, perplexity in enumerate(result["depth_perplexity"], start=1):
        assert re.search(rf"{k} of 3 +{perplexity:.2f} ", told)
    assert main(["evaluate", str(run), "--device=cpu", "--split=validation", "--json"]) == 0
    validation = json.loads(capsys.readouterr().out)
    assert validation["loss"] == json.loads((run / "result.json").read_text())["validation_loss"]


def whole_tokens(split: Any) -> list[int]:
    tokens: list[int] = split._between(0, split.num_tokens).tolist()
    return tokens


def test_as_many_tokens_as_places_are_no_classes(texts: Path, tmp_path: Path) -> None:
    """Scores (N, T, V) with T = V could be taken for classes at T places."""
    from torchlocal.data import write_tokens

    draw = torch.Generator().manual_seed(0)
    documents = [torch.randint(8, (40,), generator=draw).numpy() for _ in range(20)]
    write_tokens(tmp_path / "a.bin", documents, vocabulary=8)
    changes = {"data": f"tokens:{tmp_path / 'a.bin'}", "context": 8, "epoch_rows": None, "num_validation": None}
    result = tl.fit(config(texts, tmp_path / "run", epochs=1, **changes), progress=False)
    assert result["test_accuracy"] is None and 6 < result["test_perplexity"] < 12
    assert "test_bits_per_byte" not in result and not (tmp_path / "run" / "tokenizer.json").exists()


def test_progress_tells_tokens(texts: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    tl.fit(config(texts, tmp_path / "run", epochs=1, tensorboard=True), progress=True)
    told = capsys.readouterr().err
    assert re.search(r"validation loss \d\.\d{4}  perplexity \d+\.\d\d  guided .* \d+ tokens/s", told), told
    assert "images" not in told and "accuracy" not in told and list((tmp_path / "run" / "tensorboard").iterdir())


def test_the_command(texts: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    options = ["--model=gpt-nano", f"--data=text:{texts}", f"--data-root={texts.parent / 'root'}", "--context=16"]
    options += ["--batch-size=4", "--rule=greedy", "--auxiliary=linear"]
    run = ["--steps=2", "--modules=2", "--precision=fp32", "--device=cpu", "--tensorboard=false", "--optimizer=adamw"]
    assert main(["fit", *options, *run, "--lr=0.001", "--quiet", f"--out={tmp_path / 'run'}"]) == 0
    result = json.loads((tmp_path / "run" / "result.json").read_text())
    bits = f"{result['test_bits_per_byte']:.3f} bits per byte"
    assert f"Test perplexity {result['test_perplexity']:.2f} ({bits}) after 2 steps" in capsys.readouterr().out
    for modules in ("3", "fewest"):
        assert main(["partition", *options, f"--modules={modules}"]) == 0
        told = capsys.readouterr().out
        assert "gpt-nano: 5 units" in told and "16 x 64" in told and "16 x 1024" in told


# --- stop and resume ---


def assert_same_run(a: Path, b: Path) -> None:
    def without_times(value: Any) -> Any:
        if isinstance(value, dict):
            return {name: without_times(inner) for name, inner in value.items() if name not in TIMES}
        return [without_times(inner) for inner in value] if isinstance(value, list) else value

    for name in ("last.pt", "best.pt"):
        one, other = (without_times(checkpoint.load_checkpoint(folder / name)) for folder in (a, b))
        assert_equal(one, other, name)
    one, other = (without_times(json.loads((folder / "result.json").read_text())) for folder in (a, b))
    assert_equal(one, other)


@pytest.mark.parametrize("num_steps", [2, 6, 9])
def test_stop_anywhere_and_resume(
    texts: Path, run: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, num_steps: int
) -> None:
    """Inside of an epoch and of a pass over the rows, bit for bit."""
    after_steps(monkeypatch, num_steps, stop(signal.SIGTERM))
    with pytest.raises(Interrupted):
        tl.fit(config(texts, tmp_path), progress=False)
    tl.fit(config(texts, tmp_path), progress=False, resume=True)
    assert_same_run(tmp_path, run)


def test_other_text_or_tokens_are_refused(texts: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    folder = tmp_path / "texts"
    folder.mkdir()
    for path in texts.iterdir():
        (folder / path.name).write_text(path.read_text())
    settings = config(folder, tmp_path / "run", data_root=str(tmp_path / "root"))
    after_steps(monkeypatch, 3, stop(signal.SIGTERM))
    with pytest.raises(Interrupted):
        tl.fit(settings, progress=False)
    path = next(iter(sorted(folder.iterdir())))
    path.write_text(path.read_text().replace("x", "y"))
    with pytest.raises(ValueError, match="was trained on other data: checksum is"):
        tl.fit(settings, progress=False, resume=True)
    with pytest.raises(ValueError, match=r"another configuration: context \(16 there, 8 now\)"):
        tl.fit(settings.changed(context=8), progress=False, resume=True)
    library = pytest.importorskip("tokenizers")
    made = library.Tokenizer(library.models.WordLevel({"</s>": 0} | {str(i): i for i in range(1, 1024)}, unk_token="1"))
    made.add_special_tokens(["</s>"])
    made.save(str(tmp_path / "tokenizer.json"))
    saved = checkpoint.load_checkpoint(tmp_path / "run" / "last.pt")
    del saved["format"], saved["version"]
    saved["config"]["data"]["tokenizer"] = str(tmp_path / "tokenizer.json")
    checkpoint.save_checkpoint(tmp_path / "other.pt", saved)
    with pytest.raises(ValueError, match="was trained on other tokens: tokenizer is"):
        tl.evaluate(tmp_path / "other.pt")


def test_a_network_of_images_is_refused(texts: Path, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="model 'resnet20' is for images, and these are tokens"):
        tl.fit(config(texts, tmp_path, model="resnet20", model_options={}), progress=False)
    with pytest.raises(ValueError, match="is more than the 50 rows of text: make it smaller"):
        tl.fit(config(texts, tmp_path, batch_size=64), progress=False)


# --- text from what was trained ---


def test_continued_draws_by_the_scores_of_the_last_place() -> None:
    """A network that knows what follows, and how often: by counting."""
    table = torch.tensor([[0.0, 0.7, 0.2, 0.1], [0.1, 0.1, 0.1, 0.7], [0.3, 0.3, 0.3, 0.1], [0.5, 0.2, 0.2, 0.1]])
    seen: list[Tensor] = []

    def scores(ids: Tensor) -> Tensor:
        seen.append(ids)
        return table.log()[ids]

    options: dict[str, Any] = {"context": 3, "end": -1, "device": torch.device("cpu"), "generator": torch.Generator()}
    found = continued(scores, [0], length=4, temperature=0, top_k=None, **options)
    assert found == [1, 3, 0, 1] and [ids.tolist() for ids in seen] == [[[0]], [[0, 1]], [[0, 1, 3]], [[1, 3, 0]]]
    assert continued(scores, [0], length=9, temperature=0, top_k=None, **(options | {"end": 3})) == [1]
    options["generator"].manual_seed(0)
    drawn = [continued(scores, [3], length=1, temperature=1.0, top_k=None, **options)[0] for _ in range(4000)]
    shares = torch.bincount(torch.tensor(drawn), minlength=4) / 4000
    torch.testing.assert_close(shares, table[3], atol=0.03, rtol=0)
    drawn = [continued(scores, [0], length=1, temperature=2.0, top_k=2, **options)[0] for _ in range(4000)]
    shares = torch.bincount(torch.tensor(drawn), minlength=4) / 4000
    expected = torch.tensor([0.0, 0.7, 0.2, 0.0]).sqrt()
    torch.testing.assert_close(shares, expected / expected.sum(), atol=0.03, rtol=0)


def test_generate(run: Path, capsys: pytest.CaptureFixture[str]) -> None:
    text = generate(run, "def name_1(", length=12, temperature=0)
    model = GPT(1024, 16, **SMALL).eval()
    checkpoint.load_backbone(model, checkpoint.load_checkpoint(run / "best.pt"), run)
    tokenizer = shipped_tokenizer()
    tokens = [tokenizer.end_of_text, *tokenizer.encode(b"def name_1(").tolist()]
    start = len(tokens)
    with torch.no_grad():
        for _ in range(12):
            tokens.append(int(model(torch.tensor([tokens[-16:]]))[0, -1].argmax()))
            if tokens[-1] == tokenizer.end_of_text:
                break
    assert text == "def name_1(" + tokenizer.decode(tokens[start:])
    options = ["--prompt", "def name_1(", "--length=12", "--device=cpu"]
    assert main(["generate", str(run), *options, "--temperature=0"]) == 0
    assert capsys.readouterr().out == text + "\n"
    drawn = []
    for seed in (0, 0, 1):
        assert main(["generate", str(run), *options, f"--seed={seed}", "--temperature=0.7", "--top-k=20"]) == 0
        drawn.append(capsys.readouterr().out)
    assert drawn[0] == drawn[1] != drawn[2] and all(each.startswith("def name_1(") for each in drawn)


@pytest.mark.parametrize(
    ("options", "told"),
    [
        ("--length=0", "length=0 must be a whole number of at least 1"),
        ("--temperature=-1", "temperature=-1.0 must be a number of at least 0"),
        ("--top-k=0", "top_k=0 must be a whole number of at least 1"),
        ("--length=many", "--length expects a whole number, got 'many'"),
    ],
)
def test_wrong_wishes(run: Path, options: str, told: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["generate", str(run), options]) == 2
    assert told in capsys.readouterr().err


def test_images_tell_nothing(tmp_path: Path, run: Path, capsys: pytest.CaptureFixture[str]) -> None:
    options = "--data=digits --num-train=64 --num-validation=16 --model=mlp --modules=2 --steps=1 --batch-size=32"
    out = tmp_path / "images"
    assert main(["fit", *options.split(), "--out", str(out), "--tensorboard=false", "--precision=fp32", "--quiet"]) == 0
    capsys.readouterr()
    assert main(["generate", str(out)]) == 2
    assert "best.pt was not trained on text, so it has nothing to tell" in capsys.readouterr().err
    content = (run / "best.pt").read_bytes()
    (tmp_path / "best.pt").write_bytes(content)
    assert main(["generate", str(tmp_path / "best.pt")]) == 2
    assert "tokenizer.json: put the tokenizer.json of the tokens" in capsys.readouterr().err
    (tmp_path / "tokenizer.json").write_text((run / "tokenizer.json").read_text() + "\n")
    assert main(["generate", str(tmp_path / "best.pt")]) == 2
    assert "tokenizer.json is another than the one of best.pt" in capsys.readouterr().err
