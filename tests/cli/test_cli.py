"""The command: every subcommand on a tiny run, and one line on the standard error stream for whatever is wrong."""

import csv
import json
import os
import re
import shutil
import signal
import struct
import subprocess
import sys
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from safetensors.torch import load_file
from torch import nn

from torchlocal import models
from torchlocal.cli import commands as cli
from torchlocal.cli.commands import main
from torchlocal.cli.options import recipe_names, recipe_options, recipe_path
from torchlocal.compare.comparison import CompareConfig
from torchlocal.data import TextBundle
from torchlocal.memory import predict
from torchlocal.models import build_language_model, build_model
from torchlocal.names import check_names
from torchlocal.network import DecoupledNetwork, decouple
from torchlocal.run import trainer
from torchlocal.run.build import build_network, resolve_execution, train_step
from torchlocal.run.config import (
    FitConfig,
    GuidanceConfig,
    build_guidance,
    build_rule,
    declared,
    fit_options,
    guided_memory,
)
from torchlocal.tokens import TokenCrossEntropy

COMMANDS = ["fit", "evaluate", "generate", "compare", "partition", "plan", "export", "recipes"]
TINY = [
    "--data=digits", "--num-train=128", "--num-validation=32", "--model=small", "--modules=3", "--guidance.period=2",
    "--epochs=2", "--batch-size=32", "--precision=fp32", "--num-threads=1", "--tensorboard=false",
]  # fmt: skip


def small_net(num_classes: int, in_channels: int, size: tuple[int, int]) -> nn.Module:
    layers: list[nn.Module] = []
    for before, after in ((in_channels, 8), (8, 16), (16, 16)):
        layers += [nn.Conv2d(before, after, 3, 1, 1), nn.BatchNorm2d(after), nn.ReLU()]
    return nn.Sequential(*layers, nn.AdaptiveAvgPool2d(2), nn.Flatten(), nn.Linear(64, num_classes))


@pytest.fixture(scope="module", autouse=True)
def _small() -> Iterator[None]:
    """The small network under a name of its own."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setitem(models.images._OWN, "small", small_net)
        yield


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder of a finished run."""
    out = tmp_path_factory.mktemp("cli") / "run"
    assert main(["fit", *TINY, f"--out={out}", "--quiet"]) == 0
    return out


def backbone(run: Path) -> nn.Module:
    """The best weights of a run in a fresh network, without torchlocal's own loading."""
    saved = torch.load(run / "best.pt", weights_only=True)["net"]
    model = small_net(10, 1, (8, 8))
    model.load_state_dict({key.removeprefix("backbone."): v for key, v in saved.items() if key.startswith("backbone.")})
    return model.eval()


# --- every command works ---


@pytest.mark.parametrize("command", COMMANDS)
def test_help(command: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert main([command, "--help"]) == 0
    out, err = capsys.readouterr()
    assert out.startswith(f"usage: torchlocal {command}") and not err
    assert max(map(len, out.splitlines())) <= 110
    assert not re.search(r"\(type: |NoneType|Union\[|typing|\['|True", out)


def test_help_of_the_command_lists_all(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["--help"]) == 0
    with_nothing = main([])
    out = capsys.readouterr().out
    assert with_nothing == 0
    assert list(cli._RUNNERS) == COMMANDS
    assert all(re.search(rf"^  {command} +\w", out, re.M) for command in COMMANDS)
    assert main(["--version"]) == 0
    assert re.fullmatch(r"torchlocal \d+\.\d+\S*\n", capsys.readouterr().out)


def test_help_names_every_option(capsys: pytest.CaptureFixture[str]) -> None:
    for command, absent in (("fit", set()), ("compare", {"seed"})):
        assert main([command, "--help"]) == 0
        out = capsys.readouterr().out
        for name in set(fit_options()) - absent:
            assert f"--{name.replace('_', '-')} " in out, (command, name)


def test_fit(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    out = tmp_path / "run"
    assert main(["fit", *TINY, f"--out={out}", "--epochs", "1", "--lr", "0.02"]) == 0
    stdout, stderr = capsys.readouterr()
    result = json.loads((out / "result.json").read_text())
    assert result["config"]["optimisation"]["lr"] == 0.02 and result["steps"] == 4 and result["guided_steps"] == 2
    assert stdout == (
        f"Test accuracy {100 * result['test_accuracy']:.2f} % after 4 steps, 50 % of them guided, in "
        f"{result['seconds']:.0f} s. Run folder: {out}\n"
    )
    assert len(stderr.splitlines()) == 1  # one epoch, no terminal
    assert main(["fit", f"--config={out / 'config.yaml'}", "--resume", "--quiet"]) == 0
    assert capsys.readouterr() == (stdout, "")
    assert main(["fit", f"--config={out / 'config.yaml'}", "--quiet"]) == 2
    assert "already holds a run: resume it" in capsys.readouterr().err


def test_options_win_over_recipes(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    recipe = tmp_path / "r.yaml"
    recipe.write_text("data: digits\nlr: 0.3\nguidance: {period: 4}\nepochs: 9\nmilestones: 2\nschedule: step\n")
    parser = cli.Parser("fit", "", "")
    parser.recipes()
    options = cli._add_run_options(parser)
    for argv in (["--config", str(recipe), "--lr=0.5"], ["--optimisation.lr=0.5", f"--config={recipe}", "--lr", "0.5"]):
        config = cli._config(cli._parse_run(parser, argv, options))
        chosen = config.optimisation
        assert (chosen.lr, config.guidance.options["period"], chosen.epochs, chosen.milestones) == (0.5, 4, 9, [2.0])
        assert config.data.name == "digits"


@pytest.mark.parametrize(
    "text",
    [
        "lr: 0.3\ndata: digits\nmemory: 8GiB\nguidance: {name: periodic, period: 4}\n",
        "optimisation: {lr: 0.3}\ndata: {name: digits}\nmemory: {limit: 8GiB}\nguidance: {period: 4}\n",
        "optimisation.lr: 0.3\ndata: {name: digits}\nmemory: 8GiB\nguidance.period: 4\n",
    ],
    ids=["flat", "sections", "paths"],
)
def test_a_recipe_in_sections_and_flat_is_the_same(text: str, tmp_path: Path) -> None:
    (tmp_path / "r.yaml").write_text(text)
    values = recipe_options(str(tmp_path / "r.yaml"), section=None, known=fit_options())
    expected = FitConfig.of(lr=0.3, data="digits", memory="8GiB", guidance=GuidanceConfig(period=4))
    assert FitConfig.of(**values) == expected == FitConfig.of(**yaml.safe_load(text))


def test_evaluate(run: Path, capsys: pytest.CaptureFixture[str]) -> None:
    result = json.loads((run / "result.json").read_text())
    assert main(["evaluate", str(run), "--json"]) == 0
    told = json.loads(capsys.readouterr().out)
    assert told["accuracy"] == result["test_accuracy"]
    assert told["depth_accuracy"] == result["depth_accuracy"] and len(told["depth_accuracy"]) == 3
    assert main(["evaluate", str(run / "best.pt"), "--split", "validation"]) == 0
    out = capsys.readouterr().out
    assert f"validation accuracy {100 * result['validation_accuracy']:.2f} %" in out
    assert out.count("its auxiliary network") == 2 and out.count("the backbone") == 1


def test_compare(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    out = tmp_path / "c"
    recipe = tmp_path / "r.yaml"
    recipe.write_text("epochs: 50\ncompare:\n  epochs: 1\n  seeds: 3\n  methods: [local, pgl]\n  timing_rounds: 1\n")
    tiny = [option for option in TINY if not option.startswith("--epochs")]
    assert main(["compare", f"--config={recipe}", *tiny, f"--out={out}"]) == 0
    stdout, stderr = capsys.readouterr()
    assert "small on digits, K = 3" in stdout and stdout.endswith(f"Report: {out / 'report.html'}\n")
    assert "run 2 of 2: pgl, seed 3" in stderr and (out / "pgl" / "seed3" / "result.json").is_file()
    before = (out / "report.md").read_bytes()
    assert main(["compare", "--config", str(out / "compare.yaml"), "--quiet"]) == 0
    again, stderr = capsys.readouterr()
    assert again == stdout and not stderr
    assert (out / "report.md").read_bytes() == before


def test_partition(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["partition", "--model=resnet20", "--modules=10", "--data=pairs:fashion-mnist-small"]) == 0
    out = capsys.readouterr().out
    assert "resnet20: 10 units, 10 local modules" in out and out.count("- - - cut - - -") == 9
    assert "64 x 4 x 7" in out  # two images of 14 x 14 side by side
    assert main(["partition", "--model=small", "--modules=2", "--shape", "3", "16", "24", "--num-classes=7"]) == 0
    out = capsys.readouterr().out
    assert out.count("- - - cut - - -") == 1 and "16 x 16 x 24" in out
    assert "2.81 k" in out  # 9 * 16 * 16 + 16 + 2 * 16 of the last convolution, 64 * 7 + 7 of the head


def test_plan(capsys: pytest.CaptureFixture[str]) -> None:
    argv = ["plan", "--model=small", "--input=1x8x8", "--batch-size=16", "--modules", "2", "--json"]
    assert main(argv) == 0
    dgl = json.loads(capsys.readouterr().out)
    assert main([*argv, "--rule=man", "--rule-options={base: predsim}"]) == 0
    man = json.loads(capsys.readouterr().out)
    assert [row["method"] for row in dgl["rows"]] == [row["method"] for row in man["rows"]]
    for few, many in zip(dgl["rows"], man["rows"], strict=True):
        larger = few["method"] in ("local", "pgl")  # what a rule costs, it costs them alone
        assert (many["flops_ratio"] > few["flops_ratio"], many["total_bytes"] > few["total_bytes"]) == (larger, larger)


def test_plan_takes_the_precision_of_a_recipe(capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    recipe, argv = tmp_path / "recipe.yaml", ["plan", "--input=1x8x8", "--batch-size=16", "--modules", "2", "--json"]
    recipe.write_text("model: {name: small}\nrun: {precision: bf16}\n")
    found = []
    for given in (["--config", str(recipe)], ["--model=small", "--precision=bf16"], ["--model=small"]):
        assert main([*argv, *given]) == 0
        found.append(json.loads(capsys.readouterr().out))
    assert found[0] == found[1] != found[2]


def test_plan_by_default_and_with_a_figure(capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    argv = ["plan", "--model=small", "--input=1x8x8", "--batch-size=16"]
    assert main([*argv, "--budget=1GiB"]) == 0
    assert "Use end-to-end" in capsys.readouterr().out
    assert main([*argv, "--modules", "fewest", "400", f"--figure={tmp_path / 'plan.png'}"]) == 0
    out, err = capsys.readouterr()
    assert "pgl" in out and err == "left out, since small has fewer units: 400\n"
    assert (tmp_path / "plan.png").read_bytes().startswith(b"\x89PNG")


@pytest.mark.parametrize("suffix", [".safetensors", ".pt", ".pt2"])
def test_export(suffix: str, run: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path, expected = tmp_path / f"model{suffix}", backbone(run)
    assert main(["export", str(run), "--to", str(path)]) == 0
    out = capsys.readouterr().out
    assert out == f"Wrote {path} ({path.stat().st_size:,} bytes); loaded back, its outputs are the backbone's.\n"
    assert [file.name for file in tmp_path.iterdir()] == [path.name]  # no temporary file
    if suffix == ".pt2":
        model: Callable[..., Any] = torch.export.load(path).module()
    else:
        state = load_file(path) if suffix == ".safetensors" else torch.load(path, weights_only=True)
        assert state.keys() == expected.state_dict().keys()
        assert all(torch.equal(state[key], value) for key, value in expected.state_dict().items())
        model = small_net(10, 1, (8, 8)).eval()
        model.load_state_dict(state)
    for num_images in (1, 5):
        images = torch.randn(num_images, 1, 8, 8, generator=torch.Generator().manual_seed(num_images))
        with torch.no_grad():
            torch.testing.assert_close(model(images), expected(images), rtol=1e-5, atol=1e-5)
    content = path.read_bytes()
    assert main(["export", str(run), "--to", str(path)]) == 2
    assert "exists already" in capsys.readouterr().err and path.read_bytes() == content
    assert main(["export", str(run / "last.pt"), "--to", str(path), "--overwrite"]) == 0


def test_recipes(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["recipes"]) == 0
    out = capsys.readouterr().out
    assert len(recipe_names()) >= 9 and all(re.search(rf"^{name} +\S", out, re.M) for name in recipe_names())
    assert main(["recipes", "demo"]) == 0
    assert yaml.safe_load(capsys.readouterr().out)["data"]["name"] == "pairs:fashion-mnist-small"


# --- recipes ---

TEXTS = ("text-gpt", "text-gpt-local", "hf-llama-tiny", "lopt-finetune")
_NETWORKS: dict[Any, DecoupledNetwork] = {}  # recipes that differ in their length only share one


@pytest.mark.parametrize("command", ["fit", "compare"])
@pytest.mark.parametrize("name", recipe_names())
def test_a_command_takes_a_recipe(name: str, command: str, capsys: pytest.CaptureFixture[str]) -> None:
    """As a whole: what it refuses is not the recipe's."""
    assert "epochs=0 must be" in refused([command, "--config", name, "--epochs", "0"], capsys)


@pytest.mark.filterwarnings("ignore:memory='local'. no guided step")  # of a batch of four
@pytest.mark.parametrize("name", [name for name in recipe_names() if name not in TEXTS])
def test_a_recipe_trains(name: str) -> None:
    own = {one.name: one for one in declared(CompareConfig)}
    config = FitConfig.of(**recipe_options(name, section=None, known=fit_options()))
    section = recipe_options(name, section="compare", known=own | fit_options())
    comparison = CompareConfig(
        **{key: value for key, value in section.items() if key in own},
        fit=FitConfig.of(**{key: value for key, value in section.items() if key not in own}),
    )
    assert {"end-to-end", "local", "pgl"} <= set(comparison.methods)
    assert comparison.out != config.run.out

    num_classes, channels, height, width = cli._SHAPES[config.data.name.removeprefix("pairs:")]
    width *= 2 if config.data.name.startswith("pairs:") else 1
    images = torch.randn(4, channels, height, width, generator=torch.Generator().manual_seed(0))
    targets = torch.tensor([0, 1, 2, 3])
    key = (config.model.name, config.cut.modules, images.shape)
    if key not in _NETWORKS:
        torch.manual_seed(0)
        model = build_model(
            config.model.name, num_classes=num_classes, in_channels=channels, image_size=(height, width)
        )
        sample = (config.optimisation.batch_size, *images.shape[1:])
        _NETWORKS[key] = decouple(model, config.cut.modules, sample=sample, rule=build_rule(config))
    net = _NETWORKS[key]
    assert config.cut.modules in (net.num_modules, "fewest") and net.num_modules > 1
    for step in (
        net.local_step,
        lambda x, y: net.guided_step(x, y, auxiliary=config.guidance.auxiliary, **guided_memory(config)),
    ):
        net.zero_grad(set_to_none=True)
        losses = step(images, targets)
        assert len(losses) == net.num_modules and all(torch.isfinite(loss) for loss in losses)
        parameters = [p for p in net.parameters() if p.requires_grad]
        assert all(p.grad is not None and torch.isfinite(p.grad).all() for p in parameters)
        assert sum(bool(p.grad.any()) for p in parameters if p.grad is not None) > 0.9 * len(parameters)


@pytest.mark.parametrize("name", TEXTS)
def test_a_recipe_for_text_trains(name: str, tmp_path: Path) -> None:
    if "gpt" not in name:
        pytest.importorskip("transformers")
    config = FitConfig.of(**recipe_options(name, section=None, known=fit_options()))
    check_names(model=config.model.name, data=config.data.name)
    text = TextBundle(
        name="", train=(), validation=(), test=(), vocabulary=1024, context=32, told="", tokens={}
    )  # shorter, and no text at all
    torch.manual_seed(0)
    assert (config.data.epoch_rows, config.optimisation.batch_size) == (1200, 8)
    config = config.changed(batch_size=2, device="cpu", precision="fp32")
    if name == "lopt-finetune":  # goes on with what another recipe was exported as
        before = FitConfig.of(**recipe_options("hf-llama-tiny", section=None, known=fit_options()))
        model: Any = build_language_model("hf:llama", vocabulary=1024, context=32, options=before.model.options)
        assert config.cut.after == [f"model.layers.{model.config.num_hidden_layers // 2 - 1}"]
        model.save_pretrained(tmp_path)
        config = config.changed(model=f"hf:{tmp_path}")
    net = build_network(config, text, resolve_execution(config))
    expected = {"lopt-finetune": (2, 300, 0.2), "text-gpt-local": (8, 900, 0.0)}.get(name, (8, 900, 0.2))
    num_modules, num_steps, share = expected
    assert net.num_modules == num_modules and isinstance(net.criterion, TokenCrossEntropy)
    steps_per_epoch = 1200 // 8
    guidance = build_guidance(config).bind(num_steps=num_steps, steps_per_epoch=steps_per_epoch)
    assert steps_per_epoch * config.optimisation.epochs == num_steps and guidance.share == share
    first = num_steps - round(share * num_steps)
    assert [guidance(step) for step in range(num_steps)] == [step >= first for step in range(num_steps)]
    ids = torch.randint(1024, (2, 33), generator=torch.Generator().manual_seed(0))
    for step in (net.local_step, partial(net.guided_step, **guided_memory(config))):
        net.zero_grad(set_to_none=True)
        losses = step(ids[:, :-1], ids[:, 1:])
        assert len(losses) == num_modules and 6 < losses[-1] < 8  # ln 1024 = 6.9
        assert name == "lopt-finetune" or all(6 < loss < 8 for loss in losses)  # which reconstructs
        assert all(p.grad is not None and torch.isfinite(p.grad).all() for p in net.parameters())


@pytest.fixture(scope="module")
def text_recipe(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A recipe like text-gpt, of a small network, on a text of its own."""
    folder = tmp_path_factory.mktemp("text")
    (folder / "text.txt").write_text("".join(f"def name_{i % 7}(x):\n    return x + {i}\n" for i in range(400)))
    values = yaml.safe_load(recipe_path("text-gpt").read_text())
    values["model"] |= {"name": "gpt-nano", "options": {"layers": 3, "width": 16, "heads": 2, "tied": False}}
    values["data"] = {"name": f"text:{folder / 'text.txt'}", "root": str(folder / "root"), "context": 16}
    values["data"] |= {"epoch_rows": 16, "num_validation": 4}
    values["cut"] = {"modules": 3}
    values["guidance"]["share"] = 0.5
    values["optimisation"] |= {"epochs": 2, "warmup_steps": 1}
    values["compare"] |= {"out": str(folder / "out"), "methods": ["end-to-end", "local", "pgl"], "timing_rounds": 1}
    (folder / "recipe.yaml").write_text(yaml.safe_dump(values))
    return folder / "recipe.yaml"


def test_texts_are_compared(text_recipe: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["compare", "--config", str(text_recipe), "--reach=7.5", "--quiet", "--tensorboard=false"]) == 0
    out, err = capsys.readouterr()
    assert "What guidance gives: pgl loss " in out and "Report: " in out and not err
    with (text_recipe.parent / "out" / "report.csv").open(newline="") as file:
        rows = {row["method"]: row for row in csv.DictReader(file)}
    assert list(rows) == ["end-to-end", "local", "pgl"] and float(rows["pgl"]["guided_share"]) == 0.5  # 2 of 4 steps
    assert all(5 < float(row["loss_mean"]) < 7 and float(row["reach_seconds"]) > 0 for row in rows.values())


def test_texts_are_planned(text_recipe: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Every number is that of a step of the run, and the share of guided steps is the recipe's."""
    assert main(["plan", "--config", str(text_recipe), "--modules", "3", "--json"]) == 0
    out, err = capsys.readouterr()
    rows, ids = {row["method"]: row for row in json.loads(out)["rows"]}, torch.zeros(8, 16, dtype=torch.int64)
    assert not err
    nets = []
    for modules in (1, 3):
        model = build_language_model(
            "gpt-nano", vocabulary=1024, context=16, options={"layers": 3, "width": 16, "heads": 2, "tied": False}
        )
        rule = build_rule(FitConfig.of(rule="solo", rule_options={"depth": 0, "hidden": 96}))
        nets.append(decouple(model, modules, sample=ids, rule=rule, criterion=TokenCrossEntropy()))
    whole, cut = nets
    steps: dict[str, Any] = {
        "end-to-end": predict(whole, step="plain", optimizer=torch.optim.AdamW),
        "checkpointing, searched": predict(whole, step="guided", memory="exact", optimizer=torch.optim.AdamW),
        "local": predict(cut, step="local", optimizer=torch.optim.AdamW),
        "pgl": predict(cut, step="guided", memory="local", optimizer=torch.optim.AdamW),
    }
    plain, local, guided = (steps[name].flops for name in ("end-to-end", "local", "pgl"))
    for name in ("end-to-end", "checkpointing, searched", "local"):
        assert rows[name]["total_bytes"] == steps[name].total_bytes
    assert rows["pgl"]["total_bytes"] == max(steps["local"].total_bytes, steps["pgl"].total_bytes)
    assert rows["pgl"]["flops_ratio"] == pytest.approx((0.5 * local + 0.5 * guided) / plain)
    assert rows["pgl"]["modules"] == 3
    assert main(["plan", "--config", str(text_recipe), "--modules", "2", "--optimizer=sgd", "--batch-size=4"]) == 0
    assert "gpt-nano on rows of 16 tokens: predicted peak memory in MiB at batch size 4" in capsys.readouterr().out


def test_texts_are_shown_cut_as_they_are_trained(text_recipe: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["partition", "--config", str(text_recipe)]) == 0
    out = capsys.readouterr().out
    assert out.count("- - - cut - - -") == 2 and "16 x 1024" in out and "of one row of text." in " ".join(out.split())
    assert "gpt-nano: 4 units, 3 local modules" in out


# --- wrong input ---


def refused(argv: list[str], capsys: pytest.CaptureFixture[str]) -> str:
    """The one line that tells what is wrong with a command line."""
    capsys.readouterr()
    code = main(argv)
    out, err = capsys.readouterr()
    print(f"{' '.join(argv)}\n    {err}", end="")
    assert code == 2, err
    assert not out
    lines = err.splitlines()
    assert len(lines) == 1 and err.endswith("\n"), err
    assert (
        lines[0].startswith("torchlocal: ")
        and lines[0].endswith((".", "?"))
        and "?." not in err
        and "Traceback" not in err
    )
    return lines[0].removeprefix("torchlocal: ")


@pytest.mark.parametrize(
    ("argv", "message"),
    [
        ("bogus", "unknown command 'bogus'"),
        ("comprae", "did you mean compare?"),
        ("--bogus", "unknown option '--bogus'"),
        ("fit --bogus 1", "unknown option --bogus"),
        ("fit --epoch 1", "unknown option --epoch (did you mean --epochs?)"),
        ("fit stray", "unexpected argument 'stray'"),
        ("fit --lr", "--lr needs a value"),
        ("fit --config", "--config needs a value"),
        ("fit --lr fast", "--lr expects a number, got 'fast'"),
        ("fit --batch-size 2.5", "--batch-size expects a whole number, got '2.5'"),
        ("fit --augment maybe", "--augment expects true or false, got 'maybe'"),
        ("fit TINY --lr -0.1", "lr=-0.1 must be a number above 0"),
        ("fit TINY --lr nan", "--lr expects a number, got 'nan'"),
        ("fit TINY --lr 0", "lr=0.0 must be a number above 0"),
        ("fit TINY --modules 0", "modules=0 must be a whole number of at least 1"),
        ("fit TINY --modules some", 'modules=\'some\' must be a whole number of at least 1, "all" or "fewest"'),
        ("fit TINY --modules 99", "99"),
        ("compare TINY --modules 99", "99"),
        ("fit TINY --cuts 5 nowhere", "nowhere"),
        ("fit TINY --model resnet21", "model 'resnet21' is unknown (did you mean"),
        ("compare TINY --model resnet21", "model 'resnet21' is unknown (did you mean"),
        ("partition --model resnet21", "model 'resnet21' is unknown (did you mean"),
        ("fit TINY --data digit", "data 'digit' is unknown (did you mean digits"),
        ("compare TINY --data pairs:digit", "data 'pairs:digit' is unknown (did you mean pairs:digits"),
        ("partition --data digit", "data 'digit' is unknown (did you mean digits"),
        ("fit TINY --rule bogus", "rule='bogus' is unknown"),
        ("fit TINY --auxiliary bogus", "bogus"),
        ("fit TINY --optimizer sdg", "optimizer='sdg' cannot be used"),
        ("fit TINY --schedule linear", "schedule='linear' is unknown"),
        ("fit TINY --guidance.name sometimes", "sometimes"),
        ("fit TINY --guidance.period 0", "guidance.period: must be a whole number of at least 1, not 0"),
        ("fit TINY --recompute 99", "99"),
        ("fit TINY --memory lots", "memory='lots' is unknown: give"),
        ("fit TINY --memory 1GiB --recompute 2", "memory='1GiB' and recompute=2: give one of them, not both"),
        ("compare TINY --recompute 99", "99"),
        ("compare TINY --optimizer sdg", "optimizer='sdg' cannot be used"),
        ("fit TINY --batch-size 500", "batch_size=500 is more than the 128 training images"),
        ("fit TINY --num-train 9999", "num_train=9999 is more than the"),
        ("fit TINY --warmup-epochs 2", "warmup_epochs=2.0 leaves nothing of epochs=2"),
        ("fit TINY --device tpu", "device='tpu' is not available here"),
        ("compare TINY --methods local bogus", "methods: 'bogus' is unknown"),
        ("compare TINY --seeds 1 1", "holds an element twice"),
        ("fit TINY --optimisation.lr=fast", "--lr expects a number, got 'fast'"),
        ("fit TINY --quiet=yes", "--quiet takes no value"),
        ("fit TINY --ranks few", "--ranks expects a whole number, got 'few'"),
        ("fit TINY --timeout soon", "--timeout expects a number, got 'soon'"),
        ("compare TINY --seeds one", "--seeds expects a whole number, got 'one'"),
        ("compare TINY --guidance.name never", "leaves method pgl nothing to do"),
        ("compare TINY --resume", "--resume: a comparison always goes on where it was; leave it out"),
        ("compare TINY --seeds 0,1", "got '0,1'; several are separated by spaces"),
        ("compare TINY --grid modules=2", "--grid expects options as {name: value}"),
        ("fit TINY --ranks 9", "processes cannot share 3 local modules"),
        ("plan --figure TMP/none/x.png", "there is no folder"),
        ("plan --figure TMP/x.abc", "must end in .png, .pdf or .svg"),
        ("compare TINY --seed 3", "unknown option --seed (did you mean --seeds?)"),
        ("fit --config demos", "recipe demos is neither a file nor shipped (did you mean demo?)"),
        ("recipes demos", "recipe demos is neither a file nor shipped (did you mean demo?)"),
        ("fit --config TMP", "is a folder"),
        ("evaluate", "RUN is missing"),
        ("evaluate TMP/absent", "absent"),
        ("evaluate TMP", "holds no checkpoint (best.pt, last.pt): give the folder of a run"),
        ("export TMP", "--to is missing"),
        ("export TMP/absent --to TMP/x.pt", "absent"),
        ("partition --shape 3 32", "--shape 3 32 must be channels, height and width"),
        ("partition --modules 999", "999"),
        ("plan --input 3x32", "--input 3x32 must be"),
        ("plan --model gpt-tiny", "model 'gpt-tiny' predicts tokens: say of what text, such as --data text:stdlib"),
        ("plan --config text-gpt --input 3x32x32", "--input is the shape of images, and data 'text:stdlib' is text"),
        ("plan --config text-gpt --num-classes 5", "--num-classes means nothing to data 'text:stdlib'"),
        ("plan --config text-gpt --model resnet20 --model-options {}", "model 'resnet20' is for images"),
        ("plan --config text-gpt --modules 99", "--modules 99: gpt-tiny can be cut into 9 at most"),
        ("plan --config text-gpt --image-size 8", "image_size=8 is for images: leave it out"),
        ("plan --context 8", "context=8 is for text: leave it out, or give data such as text:stdlib"),
        ("plan --model gpt-nano --data text:TMP/none", "none does not exist: give a text file"),
        ("plan --model resnet20 --model-options {d:3}", "means nothing to model='resnet20': leave it out"),
        ("compare TINY --reach 7", "reach=7 must be an accuracy, above 0 and at most 1"),
        ("compare TINY --reach 0.5 --timing-rounds 0", "reach=0.5 needs the time of steps"),
        ("plan --budget much", "much"),
        ("fit TINY --data folder", "data='folder' needs a root"),
        ("fit TINY --data folder --data-root TMP", "does not exist: root must hold"),
    ],
)
def test_wrong_input(argv: str, message: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    words = argv.replace("TMP", str(tmp_path)).split()
    full = [word for given in words for word in (TINY if given == "TINY" else [given])]
    out = [f"--out={tmp_path / 'out'}"] if words[0] in ("fit", "compare") and "--help" not in words else []
    told = refused([*full[:1], *out, *full[1:]], capsys)
    assert message in told
    assert not (tmp_path / "out" / "last.pt").exists()


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("lr: [1\nepochs: 2\n", "is not valid YAML (line 2)"),
        ("\tlr: 1\n", "is not valid YAML"),
        ("- lr\n", "must hold options as `name: value` lines, not a list"),
        ("learning_rate: 1\n", "unknown option learning_rate"),
        ("epoch: 1\n", "unknown option epoch (did you mean epochs?)"),
        ("guidance: periodic\n", "guidance must hold `name: value` lines"),
        ("guidance: {perod: 1}\n", "unknown option guidance.perod (did you mean guidance.period?)"),
        ("lr: quick\n", "--lr expects a number, got"),
        ("compare: 3\n", "compare must be a section"),
    ],
)
def test_wrong_recipes(text: str, message: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    recipe = tmp_path / "mine.yaml"
    recipe.write_text(text)
    assert message in refused(["fit", "--config", str(recipe)], capsys)
    assert message in refused(["compare", f"--config={recipe}", "--quiet"], capsys)


def test_unknown_key_of_compare(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    recipe = tmp_path / "mine.yaml"
    recipe.write_text("compare: {method: [pgl]}\n")
    assert "unknown option method (did you mean methods?)" in refused(["compare", f"--config={recipe}"], capsys)
    recipe.write_text("compare: {seed: 3}\n")
    assert "unknown option seed (did you mean seeds?)" in refused(["compare", f"--config={recipe}"], capsys)


def test_evaluate_of_a_comparison_names_a_run(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "pgl" / "seed0").mkdir(parents=True)
    (tmp_path / "pgl" / "seed0" / "best.pt").touch()
    assert f"such as {tmp_path / 'pgl' / 'seed0'}" in refused(["evaluate", str(tmp_path)], capsys)


def test_binary_recipe(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    recipe = tmp_path / "mine.yaml"
    recipe.write_bytes(b"\xff\xfe\x00lr")
    assert "is not valid YAML" in refused(["fit", "--config", str(recipe)], capsys)


def test_damaged_runs(run: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    copy = tmp_path / "run"
    shutil.copytree(run, copy)
    (copy / "best.pt").write_bytes((run / "best.pt").read_bytes()[:-2000])
    assert "best.pt is damaged or not a checkpoint" in refused(["evaluate", str(copy)], capsys)
    to = tmp_path / "x.pt"
    assert "best.pt is damaged or not a checkpoint" in refused(["export", str(copy), "--to", str(to)], capsys)
    assert not to.exists()
    (copy / "result.json").unlink()
    (copy / "last.pt").write_bytes(b"nothing of use")
    message = refused(["fit", *TINY, f"--out={copy}", "--resume"], capsys)
    assert "last.pt is damaged or not a checkpoint" in message
    torch.save({"weights": torch.zeros(2)}, copy / "best.pt")
    assert "is not a checkpoint of torchlocal" in refused(["evaluate", str(copy)], capsys)


def test_another_configuration_is_refused(run: Path, capsys: pytest.CaptureFixture[str]) -> None:
    message = refused(["fit", *TINY, f"--out={run}", "--resume", "--lr=0.5"], capsys)
    assert "is of another configuration: lr (0.1 there, 0.5 now)" in message


def test_wrong_exports(run: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    for to, message in (
        (tmp_path / "m.onnx", "has an unknown ending: give .safetensors, .pt, .pt2"),
        (tmp_path / "nowhere" / "m.pt", "in a folder that does not exist"),
    ):
        assert message in refused(["export", str(run), "--to", str(to)], capsys)
    folder = tmp_path / "m.pt"
    folder.mkdir()
    assert "is a folder" in refused(["export", str(run), "--to", str(folder), "--overwrite"], capsys)
    message = refused(["export", str(run), "--to", str(tmp_path / "a.pt"), "--weights=worst"], capsys)
    assert "weights='worst' is unknown" in message


def test_wrong_split(run: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert "--split tset is unknown" in refused(["evaluate", str(run), "--split=tset"], capsys)


def test_a_file_in_the_way(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "file").write_text("")
    for command in ("fit", "compare"):
        for out in (tmp_path / "file", tmp_path / "file" / "inside"):
            message = refused([command, *TINY, f"--out={out}"], capsys)
            assert "cannot be made a folder" in message
    assert (tmp_path / "file").read_text() == ""


def test_empty_data_folder(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    for part in ("train", "val"):
        (tmp_path / part).mkdir()
    argv = ["fit", *TINY, "--data=folder", f"--data-root={tmp_path}", f"--out={tmp_path / 'out'}"]
    assert "train holds no class folders with images" in refused(argv, capsys)


def test_truncated_idx_file(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    for name, shape in (("train-images-idx3", (20, 28, 28)), ("t10k-images-idx3", (4, 28, 28))):
        content = struct.pack(">4BI", 0, 0, 8, 3, shape[0]) + struct.pack(">2I", *shape[1:]) + bytes(shape[0] * 784)
        (tmp_path / f"{name}-ubyte").write_bytes(content)
    for name, size in (("train-labels-idx1", 20), ("t10k-labels-idx1", 4)):
        (tmp_path / f"{name}-ubyte").write_bytes(struct.pack(">4BI", 0, 0, 8, 1, size) + bytes(size))
    path = tmp_path / "train-images-idx3-ubyte"
    path.write_bytes(path.read_bytes()[:-10])
    argv = ["compare", *TINY, "--data=fashion-mnist", f"--data-root={tmp_path}", f"--out={tmp_path / 'out'}"]
    assert "train-images-idx3-ubyte is truncated" in refused(argv, capsys)


def test_diverging_run(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    message = refused(["fit", *TINY, "--lr=1e30", f"--out={tmp_path / 'out'}", "--quiet"], capsys)
    assert "is NaN or infinite at step" in message and "lower lr=1e+30" in message


def test_an_error_of_ours_is_one_line_with_code_1(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def broken(argv: Any) -> int:
        raise KeyError("a\nb")

    monkeypatch.setitem(cli._RUNNERS, "recipes", broken)
    assert main(["recipes"]) == 1
    assert capsys.readouterr().err == "torchlocal: KeyError: 'a\\nb' (--debug shows the traceback).\n"
    assert main(["recipes", "--debug"]) == 1
    assert "Traceback" in capsys.readouterr().err


def test_warnings_are_one_line(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    argv = [sys.executable, "-m", "torchlocal", "fit", *TINY, "--model=mlp", "--modules=2", "--guidance.period=99"]
    environment = os.environ | {"PYTHONPATH": str(Path(cli.__file__).parents[2])}
    told = subprocess.run(
        [*argv, f"--out={tmp_path}", "--steps=2", "--quiet"], capture_output=True, text=True, env=environment
    )
    assert told.returncode == 0, told.stderr
    assert re.fullmatch(r"torchlocal: warning: PeriodicGuidance\(.*\) guides none of the 2 steps\n", told.stderr)


# --- signals ---


def after_steps(monkeypatch: pytest.MonkeyPatch, num_steps: int, signum: int) -> None:
    count = 0

    def counted(*arguments: Any, **options: Any) -> Any:
        nonlocal count
        losses = train_step(*arguments, **options)
        count += 1
        if count == num_steps:
            os.kill(os.getpid(), signum)
        return losses

    monkeypatch.setattr(trainer, "train_step", counted)


@pytest.mark.parametrize(("signum", "code"), [(signal.SIGINT, 130), (signal.SIGTERM, 143)])
def test_signals_save_and_tell_how_to_go_on(
    signum: signal.Signals,
    code: int,
    run: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    out = tmp_path / "run"
    with monkeypatch.context() as patch:
        after_steps(patch, 3, signum)
        assert main(["fit", *TINY, f"--out={out}", "--quiet"]) == code
    stdout, stderr = capsys.readouterr()
    assert not stdout and len(stderr.splitlines()) == 1
    assert f"stopped by {signum.name} after step 3 of 8" in stderr
    command = re.search(r"Continue with `torchlocal (.*?)`", stderr)
    assert command is not None
    assert main([*command[1].split(), "--quiet"]) == 0
    results = [json.loads((folder / "result.json").read_text()) for folder in (out, run)]
    for result in results:
        for name in ("seconds", "images_per_second"):
            del result[name]
        del result["config"]["run"]["out"]
    assert results[0] == results[1]


def test_an_interrupted_comparison_tells_how_to_go_on(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    argv = ["compare", *TINY, "--methods", "local", "--timing-rounds=0", "--epochs=1", f"--out={tmp_path}", "--quiet"]
    with monkeypatch.context() as patch:
        after_steps(patch, 2, signal.SIGTERM)
        assert main(argv) == 143
    command = re.search(r"Continue with `torchlocal (.*?)`", capsys.readouterr().err)
    assert command is not None
    assert main([*command[1].split(), "--quiet"]) == 0
    assert (tmp_path / "report.html").is_file()


@pytest.mark.parametrize(("signum", "code"), [(signal.SIGINT, 130), (signal.SIGTERM, 143)])
def test_signals_where_there_is_no_run(
    signum: signal.Signals, code: int, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def waiting(argv: Any) -> int:
        os.kill(os.getpid(), signum)
        signal.pause()
        return 0

    before = signal.getsignal(signal.SIGTERM)
    monkeypatch.setitem(cli._RUNNERS, "recipes", waiting)
    assert main(["recipes"]) == code
    assert capsys.readouterr().err in ("torchlocal: Interrupted.\n", "torchlocal: Terminated.\n")
    assert signal.getsignal(signal.SIGTERM) == before


def test_the_process_ends_with_the_code_of_the_signal(tmp_path: Path) -> None:
    argv = [sys.executable, "-m", "torchlocal", "fit", *TINY, "--model=mlp", "--modules=2", "--epochs=100000"]
    environment = os.environ | {"PYTHONPATH": str(Path(cli.__file__).parents[2])}
    with subprocess.Popen(
        [*argv, f"--out={tmp_path / 'out'}"], stderr=subprocess.PIPE, text=True, env=environment
    ) as process:
        assert process.stderr is not None
        assert process.stderr.readline().startswith("epoch 1/")
        process.send_signal(signal.SIGTERM)
        rest = process.stderr.read()
        assert process.wait(timeout=60) == 143
    assert "Traceback" not in rest
    assert "stopped by SIGTERM" in rest.splitlines()[-1] and "--resume " in rest.splitlines()[-1]
    assert (tmp_path / "out" / "last.pt").is_file()
