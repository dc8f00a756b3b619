"""The examples and the README's listings run as they are printed."""

import os
import re
import runpy
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from PIL import Image
from torchvision.models import resnet50

import torchlocal as tl
from torchlocal.models import build_model

ROOT = Path(__file__).resolve().parents[1]
SRC = str(ROOT / "src")


@pytest.fixture(autouse=True)
def _inside(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Let an example write where nothing is lost."""
    monkeypatch.chdir(tmp_path)


def run_example(monkeypatch: pytest.MonkeyPatch, name: str, *arguments: object) -> None:
    monkeypatch.setattr(sys, "argv", [name, *map(str, arguments)])
    runpy.run_path(str(ROOT / "examples" / name), run_name="__main__")


def refused(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], name: str, *arguments: object) -> str:
    """The last line that an example writes when it refuses its arguments."""
    with pytest.raises(SystemExit) as left:
        run_example(monkeypatch, name, *arguments)
    assert left.value.code == 2
    error = capsys.readouterr().err
    assert "Traceback" not in error
    return error.splitlines()[-1]


def load_weights(path: Path) -> dict[str, torch.Tensor]:
    weights: dict[str, torch.Tensor] = torch.load(path, weights_only=True)
    assert all(w.isfinite().all() for w in weights.values())
    return weights


def make_folder(root: Path, *, size: int = 40, num_images: int = 5) -> Path:
    """Two classes of noise in ImageNet's layout."""
    generator = torch.Generator().manual_seed(0)
    for part in ("train", "val"):
        for label in ("bright", "dark"):
            folder = root / part / label
            folder.mkdir(parents=True)
            for i in range(num_images):
                image = torch.randint(128, (size, size, 3), generator=generator) + 127 * (label == "bright")
                Image.fromarray(image.to(torch.uint8).numpy()).save(folder / f"{i}.png")
    return root


def test_own_loop(tmp_path: Path) -> None:
    command = [sys.executable, str(ROOT / "examples" / "own_loop.py"), "--steps", "3"]
    path = os.pathsep.join(filter(None, [SRC, os.environ.get("PYTHONPATH")]))
    done = subprocess.run(command, env=os.environ | {"PYTHONPATH": path}, capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr
    assert done.stderr == ""
    assert re.search(r"step 3/3 .*\ntest accuracy 0\.\d{3}\n$", done.stdout), done.stdout
    plain = build_model("resnet20", num_classes=10, in_channels=1, image_size=(14, 14))
    plain.load_state_dict(load_weights(tmp_path / "resnet20.pt"))


def test_own_loop_refuses_no_steps(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    assert "must be at least 1, not 0" in refused(monkeypatch, capsys, "own_loop.py", "--steps", 0)


def test_own_objects(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    run_example(monkeypatch, "own_objects.py", "--epochs", 1)
    told = capsys.readouterr().out
    assert "step 16 of 16: wrote best.pt\nstep 16 of 16: wrote last.pt\n" in told
    assert load_weights(Path("runs/own-objects/model.pt")).keys() >= {"embed.weight", "head.weight"}
    assert "already holds a run" in refused(monkeypatch, capsys, "own_objects.py", "--epochs", 1)
    run_example(monkeypatch, "own_objects.py", "--epochs", 1, "--resume")
    assert capsys.readouterr().out == told.splitlines()[-1] + "\n"


@pytest.mark.filterwarnings("ignore")  # Lightning's own, about workers and short epochs
def test_lightning_module_trains_and_resumes(monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("lightning")
    options = ["--modules", 3, "--period", 2, "--epochs", 2]
    name = "lightning_module.py"
    run_example(monkeypatch, name, *options, "--max-steps", 3, "--out", "first")
    (checkpoint,) = Path("first").rglob("*.ckpt")
    assert torch.load(checkpoint, weights_only=True)["global_step"] == 3  # one per batch, which guidance relies on
    before = load_weights(Path("first/resnet20.pt"))
    resumed = ["--max-steps", 5, "--resume", checkpoint, "--out", "second"]
    run_example(monkeypatch, name, *options, *resumed)
    (checkpoint,) = Path("second").rglob("*.ckpt")
    assert torch.load(checkpoint, weights_only=True)["global_step"] == 5
    after = load_weights(Path("second/resnet20.pt"))
    plain = build_model("resnet20", num_classes=10, in_channels=1, image_size=(14, 14))
    plain.load_state_dict(after)
    assert all(not torch.equal(before[key], after[key]) for key, _ in plain.named_parameters())


def test_lightning_module_says_that_lightning_is_missing(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "lightning", None)
    with pytest.raises(SystemExit, match=r"pip install 'torchlocal\[lightning\]'"):
        run_example(monkeypatch, "lightning_module.py")


def test_lightning_module_refuses_wrong_options(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    pytest.importorskip("lightning")
    name = "lightning_module.py"
    assert "there is no file nowhere.ckpt" in refused(monkeypatch, capsys, name, "--resume", "nowhere.ckpt")
    assert "10 units at most" in refused(monkeypatch, capsys, name, "--modules", 11)
    assert "period: must be a whole number" in refused(monkeypatch, capsys, name, "--period", 0)


@pytest.mark.parametrize("options", [[], ["--bf16", "--recompute"]], ids=["plain", "bf16-recompute"])
def test_imagefolder_resnet50(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], options: list[str]
) -> None:
    folder = make_folder(tmp_path / "images")
    budget = ["--image-size", 32, "--batch-size", 4, "--epochs", 1, "--period", 2]
    run_example(monkeypatch, "imagefolder_resnet50.py", folder, *budget, *options)
    printed = capsys.readouterr().out
    assert "9 training images, 2 classes, 2 steps an epoch" in printed  # one of ten was kept for validation
    assert re.search(r"epoch 1: loss \d+\.\d{3}, validation accuracy [01]\.\d{3}", printed), printed
    resnet50(num_classes=2).load_state_dict(load_weights(tmp_path / "resnet50.pt"))


def test_imagefolder_resnet50_refuses_what_cannot_work(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    folder = make_folder(tmp_path / "images", num_images=2)

    def answer(*arguments: object) -> str:
        return refused(monkeypatch, capsys, "imagefolder_resnet50.py", *arguments)

    assert "nowhere" in answer("nowhere")
    assert "--image-size: must be at least 32, not 8" in answer(folder, "--image-size", 8)
    assert "--out: nowhere/resnet50.pt cannot be written" in answer(folder, "--out", "nowhere/resnet50.pt")
    assert "batch_size" in answer(folder, "--batch-size", 64)
    small = [folder, "--image-size", 32, "--batch-size", 2]
    assert "ask for fewer" in answer(*small, "--modules", 99)
    (folder / "train" / "dark" / "0.png").write_bytes(b"no image")
    (folder / "train" / "dark" / "1.png").write_bytes(b"no image")
    assert "cannot be read" in answer(*small, "--epochs", 1)


def test_huggingface_trains_saves_and_loads(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    transformers = pytest.importorskip("transformers")
    pytest.importorskip("accelerate")
    run_example(monkeypatch, "huggingface.py", "--steps", 6, "--out", "llama")
    printed = capsys.readouterr().out
    found = re.search(r"validation loss (\d\.\d{3}) before, (\d\.\d{3}) after 6 steps\n", printed)
    assert found is not None and float(found[2]) < float(found[1]), printed
    assert printed.endswith("saved in llama; loaded again it gives the same logits\n")
    assert sorted(path.name for path in Path("llama").iterdir() if "config" not in path.name) == ["model.safetensors"]
    model = transformers.LlamaForCausalLM.from_pretrained("llama")
    assert model.lm_head.weight is model.model.embed_tokens.weight


def test_huggingface_accumulates_the_gradient_of_one_large_batch(monkeypatch: pytest.MonkeyPatch) -> None:
    transformers = pytest.importorskip("transformers")
    pytest.importorskip("accelerate")
    example = runpy.run_path(str(ROOT / "examples" / "huggingface.py"))
    results = []
    for batch_size, accumulated in ((4, 1), (2, 2)):
        torch.manual_seed(0)
        sizes = {"hidden_size": 16, "intermediate_size": 32, "num_hidden_layers": 3, "num_attention_heads": 2}
        config = transformers.LlamaConfig(vocab_size=256, use_cache=False, **sizes)
        text = example["Text"](bytes(range(256)) * 8)
        net = tl.decouple(
            transformers.LlamaForCausalLM(config),
            3,
            sample={"input_ids": text.pieces[:4]},
            criterion=example["next_token"],
        )
        optimizer = torch.optim.SGD(net.parameters(), lr=0.1)
        arguments = transformers.TrainingArguments(
            output_dir="out", max_steps=2, per_device_train_batch_size=batch_size, use_cpu=True, save_strategy="no",
            gradient_accumulation_steps=accumulated, report_to="none", disable_tqdm=True, dataloader_pin_memory=False,
        )  # fmt: skip
        trainer = example["LocalTrainer"](
            net,
            tl.PeriodicGuidance(period=2),
            args=arguments,
            train_dataset=text,
            optimizers=(optimizer, torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: 1.0)),
        )
        trainer.train()
        results.append([p.detach().clone() for p in net.parameters()])
    for one, other in zip(*results, strict=True):
        torch.testing.assert_close(one, other, rtol=1e-4, atol=1e-6)


def test_huggingface_says_that_transformers_is_missing(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "transformers", None)
    with pytest.raises(SystemExit, match=r"pip install 'torchlocal\[transformers\]'"):
        run_example(monkeypatch, "huggingface.py")


@pytest.mark.filterwarnings("ignore:memory='local'. no guided step")  # of a network this small
@pytest.mark.parametrize("options", [[], ["--trainer"], ["--lora"], ["--lora", "--trainer"]], ids=" ".join)
def test_lopt_finetunes_own_weights(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], options: list[str]
) -> None:
    transformers = pytest.importorskip("transformers")
    pytest.importorskip("accelerate")
    tokenizers = pytest.importorskip("tokenizers")
    if "--lora" in options:
        pytest.importorskip("peft")
    torch.manual_seed(0)
    sizes = {"hidden_size": 16, "intermediate_size": 32, "num_hidden_layers": 4, "num_attention_heads": 2}
    config = transformers.LlamaConfig(vocab_size=8, max_position_embeddings=16, **sizes)
    transformers.LlamaForCausalLM(config).save_pretrained("weights")
    words = {"<unk>": 0, **{word: i for i, word in enumerate("abcdef", start=1)}}
    tokenizer = tokenizers.Tokenizer(tokenizers.models.WordLevel(words, unk_token="<unk>"))
    tokenizer.pre_tokenizer = tokenizers.pre_tokenizers.Whitespace()
    transformers.PreTrainedTokenizerFast(tokenizer_object=tokenizer, unk_token="<unk>").save_pretrained("weights")
    Path("text.txt").write_text("a b c d e f " * 200)
    budget = ["--steps", 8, "--share", 0.25, "--length", 16, "--lr", 0.02, "--out", "tuned"]
    run_example(monkeypatch, "lopt_finetune.py", "--model", "weights", "--text", "text.txt", *budget, *options)
    printed = capsys.readouterr().out
    whole, lopt = (float(size) for size in re.findall(r"a step takes (\d+\.\d) MiB", printed))
    assert lopt < whole
    found = re.search(r"validation loss (\d\.\d{3}) before, (\d\.\d{3}) after 8 steps\n", printed)
    assert found is not None and float(found[2]) < float(found[1]), printed
    assert printed.endswith("saved in tuned; loaded again it gives the same logits\n")
    before = transformers.LlamaForCausalLM.from_pretrained("weights").state_dict()
    after = transformers.LlamaForCausalLM.from_pretrained("tuned").state_dict()
    assert before.keys() == after.keys()
    moved = {name for name in before if not torch.equal(before[name], after[name])}
    assert {name for name in before if "proj" in name} <= moved
    assert ("model.embed_tokens.weight" in moved) == ("--lora" not in options)
    assert transformers.AutoTokenizer.from_pretrained("tuned")("b a").input_ids == [2, 1]


def test_lopt_finetune_refuses_what_cannot_work(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    pytest.importorskip("transformers")
    pytest.importorskip("accelerate")
    Path("text.txt").write_text("short")
    name = "lopt_finetune.py"
    assert "--steps: must be at least 1, not 0" in refused(monkeypatch, capsys, name, "--steps", 0)
    assert "--share: must be" in refused(monkeypatch, capsys, name, "--share", 2)
    assert "0 pieces of 128 tokens are too few" in refused(monkeypatch, capsys, name, "--text", "text.txt")


def readme_listings() -> list[str]:
    listings = re.findall(r"^```python\n(.*?)^```", (ROOT / "README.md").read_text(), re.MULTILINE | re.DOTALL)
    return [listing for listing in listings if "import torchlocal as tl" in listing]


@pytest.mark.filterwarnings("ignore:memory='local'. no guided step")  # of a network this small
@pytest.mark.parametrize("index", [0, 1, 2], ids=["classifier", "trainer", "llama"])
def test_readme_listings_run(index: int) -> None:
    assert len(readme_listings()) == 3, "README.md has other python blocks that import torchlocal"
    listing = readme_listings()[index]
    if "import torch, transformers" in listing:
        pytest.importorskip("transformers")
    names: dict[str, Any] = {"__name__": "__main__"}
    exec(compile(listing, "README.md", "exec"), names)
    if index == 1:
        assert names["result"]["steps"] == 8 and not names["model"].training
        return
    assert all(loss.isfinite() for loss in names["losses"])
    names["net"].guided_step(*((names["batch"], names["ids"]) if index else (names["x"], names["y"])))
