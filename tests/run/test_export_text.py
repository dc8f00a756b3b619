"""Export of networks for text: the plain files, and the form of save_pretrained."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

import torchlocal as tl
from torchlocal.cli.commands import main
from torchlocal.models import GPT
from torchlocal.run import checkpoint
from torchlocal.run.config import FitConfig
from torchlocal.run.generation import generate

SMALL = {"layers": 3, "width": 16, "heads": 2}


@pytest.fixture(scope="module")
def texts(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("texts")
    for i in range(30):
        (folder / f"file{i:02}.py").write_text("".join(f"x_{i * k % 7} = {k}\n" for k in range(30)))
    return folder


def trained(texts: Path, out: Path, **changes: Any) -> Path:
    values: dict[str, Any] = {
        "out": str(out), "data": f"text:{texts}", "data_root": str(texts.parent / "root"), "context": 16,
        "num_validation": 4, "steps": 2, "batch_size": 4, "optimizer": "adamw", "lr": 0.01, "modules": 2,
        "rule": "greedy", "auxiliary": "linear", "memory": "full", "precision": "fp32", "device": "cpu",
        "num_threads": 1, "tensorboard": False, "guidance": tl.GuidanceConfig(name="never"),
    }  # fmt: skip
    tl.fit(FitConfig.of(**(values | changes)), progress=False)
    return out


@pytest.fixture(scope="module")
def own(texts: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return trained(texts, tmp_path_factory.mktemp("own"), model="gpt-nano", model_options=SMALL)


@pytest.fixture(scope="module")
def llama(texts: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    transformers = pytest.importorskip("transformers")
    folder = tmp_path_factory.mktemp("llama")
    transformers.LlamaConfig(
        vocab_size=1024, hidden_size=16, intermediate_size=32, num_hidden_layers=3, num_attention_heads=2,
        num_key_value_heads=1, max_position_embeddings=64, tie_word_embeddings=True,
    ).save_pretrained(folder / "config")  # fmt: skip
    return trained(texts, folder / "run", model=f"hf:{folder / 'config'}")


@pytest.mark.parametrize("suffix", [".safetensors", ".pt", ".pt2"])
def test_files(suffix: str, own: Path, tmp_path: Path) -> None:
    path = tmp_path / f"model{suffix}"
    assert main(["export", str(own), "--to", str(path)]) == 0
    model = GPT(1024, 16, **SMALL).eval()
    checkpoint.load_backbone(model, checkpoint.load_checkpoint(own / "best.pt"), own)
    ids = torch.randint(1024, (5, 16), generator=torch.Generator().manual_seed(1))
    if suffix == ".pt2":
        program: Any = torch.export.load(path).module()
        torch.testing.assert_close(program(ids), model(ids))
        return
    state = load_file(path) if suffix == ".safetensors" else torch.load(path, weights_only=True)
    assert state.keys() == model.state_dict().keys()
    assert all(torch.equal(state[name], value) for name, value in model.state_dict().items())


def test_a_folder_for_transformers(llama: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    transformers = pytest.importorskip("transformers")
    folder = tmp_path / "exported"
    assert main(["export", str(llama), "--to", str(folder)]) == 0
    assert "loaded back, its outputs are the backbone's" in capsys.readouterr().out
    assert {"config.json", "model.safetensors", "tokenizer.json"} <= {file.name for file in folder.iterdir()}
    assert [path.name for path in tmp_path.iterdir()] == ["exported"]  # nothing half written beside it
    assert json.loads((folder / "config.json").read_text())["use_cache"] is True
    loaded = transformers.AutoModelForCausalLM.from_pretrained(folder).eval()
    saved = checkpoint.load_checkpoint(llama / "best.pt")["net"]
    state = loaded.state_dict()
    assert all(torch.equal(saved[f"backbone.{name}"], value) for name, value in state.items())

    # The library's own greedy generation says what `generate` says.
    tokenizer = transformers.PreTrainedTokenizerFast(tokenizer_file=str(folder / "tokenizer.json"))
    ids = torch.tensor([[0, *tokenizer("x_1")["input_ids"]]])
    options = {"max_new_tokens": 6, "do_sample": False, "eos_token_id": 0, "pad_token_id": 0}
    found = loaded.generate(ids, attention_mask=torch.ones_like(ids), **options)[0, ids.shape[1] :].tolist()
    assert generate(llama, "x_1", length=6, temperature=0, device="cpu") == "x_1" + tokenizer.decode(
        [token for token in found if token]
    )

    assert main(["export", str(llama), "--to", str(folder)]) == 2
    assert "exists already" in capsys.readouterr().err
    (folder / "notes.txt").write_text("mine")
    (folder / "model.safetensors").write_bytes(b"old")
    assert main(["export", str(llama), "--to", str(folder), "--overwrite"]) == 0
    assert (folder / "notes.txt").read_text() == "mine" and len((folder / "model.safetensors").read_bytes()) > 1000
    assert [path.name for path in tmp_path.iterdir()] == ["exported"]


def test_what_cannot_be_a_folder(own: Path, llama: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["export", str(own), "--to", str(tmp_path / "folder")]) == 2
    told = capsys.readouterr().err
    assert "a folder for the transformers library is meant, and GPT is none of its networks" in told
    (tmp_path / "folder").mkdir()
    assert main(["export", str(llama), "--to", str(tmp_path / "folder"), "--overwrite"]) == 2
    assert "is something else than an export of before" in capsys.readouterr().err
    assert [path.name for path in tmp_path.iterdir()] == ["folder"] and not list((tmp_path / "folder").iterdir())
