"""Networks for text: what the decoder computes, where it is cut, and what is refused."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import torchlocal as tl
from torchlocal.data import TextBundle
from torchlocal.models import GPT, SIZES, build_language_model, build_model
from torchlocal.names import DECODERS, check_names
from torchlocal.run.config import FitConfig
from torchlocal.run.own import Own

TOKENS = torch.randint(50, (3, 12), generator=torch.Generator().manual_seed(0))


def each_token(scores: Tensor, target: Tensor) -> Tensor:
    return F.cross_entropy(scores.flatten(0, 1), target.flatten())


def gpt(*, tied: bool = True, layers: int = 3) -> GPT:
    torch.manual_seed(0)
    return GPT(50, 16, layers=layers, width=16, heads=2, tied=tied)


@pytest.mark.parametrize("tied", [True, False])
def test_it_computes_what_llama_computes(tied: bool) -> None:
    transformers = pytest.importorskip("transformers")
    model = gpt(tied=tied)
    for parameter in model.parameters():  # norms among them
        nn.init.normal_(parameter, std=0.3)
    hidden = model.blocks[0].mlp.down.in_features  # type: ignore[union-attr]
    llama = transformers.LlamaForCausalLM(
        transformers.LlamaConfig(
            vocab_size=50, hidden_size=16, intermediate_size=hidden, num_hidden_layers=3, num_attention_heads=2,
            max_position_embeddings=16, rms_norm_eps=torch.finfo(torch.float32).eps, tie_word_embeddings=tied,
            attn_implementation="eager",
        )
    )  # fmt: skip
    state = {"model.embed_tokens.weight": model.embedding.weight, "model.norm.weight": model.norm.weight}
    state["lm_head.weight"] = model.read_out.weight
    for i, block in enumerate(model.blocks):
        own: Any = block
        q, k, v = own.attention.qkv.weight.chunk(3)
        gate, up = own.mlp.up.weight.chunk(2)
        named = {
            "input_layernorm": own.norm1.weight, "post_attention_layernorm": own.norm2.weight,
            "self_attn.q_proj": q, "self_attn.k_proj": k, "self_attn.v_proj": v,
            "self_attn.o_proj": own.attention.out.weight, "mlp.gate_proj": gate, "mlp.up_proj": up,
            "mlp.down_proj": own.mlp.down.weight,
        }  # fmt: skip
        state |= {f"model.layers.{i}.{name}.weight": tensor for name, tensor in named.items()}
    llama.load_state_dict(state)
    torch.testing.assert_close(model(TOKENS), llama(TOKENS).logits, rtol=1e-5, atol=1e-5)


def test_no_token_sees_a_later_one() -> None:
    model = gpt()
    changed = TOKENS.clone()
    changed[:, 7:] = 0
    assert torch.equal(model(TOKENS)[:, :7], model(changed)[:, :7])
    assert not torch.equal(model(TOKENS)[:, 7], model(changed)[:, 7])


def test_it_draws_its_weights_as_it_says() -> None:
    model = build_language_model("gpt-nano", vocabulary=500, context=8, options={"layers": 2})
    deviations = {name: p.std().item() for name, p in model.named_parameters() if p.ndim > 1}
    for name, deviation in deviations.items():
        expected = 0.02 / 2 if name.endswith(("out.weight", "down.weight")) else 0.02
        assert deviation == pytest.approx(expected, rel=0.05), name


@pytest.mark.parametrize("name", SIZES)
def test_sizes_by_name(name: str) -> None:
    layers, width, heads = SIZES[name]
    with torch.device("meta"):
        model: Any = build_language_model(name, vocabulary=100, context=8)
        free: Any = build_language_model(name, vocabulary=100, context=8, options={"tied": False})
    hidden = model.blocks[0].mlp.down.in_features
    assert hidden % 32 == 0 and 0 <= hidden - 8 * width / 3 < 32
    assert len(model.blocks) == layers and model.blocks[0].attention.heads == heads
    by_hand = 100 * width + width + layers * (4 * width**2 + 3 * width * hidden + 2 * width)
    assert sum(p.numel() for p in model.parameters()) == by_hand
    assert sum(p.numel() for p in free.parameters()) == by_hand + 100 * width
    assert model.state_dict().keys() == free.state_dict().keys()
    check_names(model=name)


def test_the_names_are_those_that_there_are() -> None:
    assert tuple(SIZES) == DECODERS
    assert SIZES["gpt-tiny"][:2] == (8, 96)


@pytest.mark.parametrize("tied", [True, False])
def test_it_is_cut_between_its_blocks(tied: bool) -> None:
    model = gpt(tied=tied, layers=4)
    target = TOKENS.roll(-1, 1)
    each_token(model(TOKENS), target).backward()
    expected = {name: p.grad for name, p in model.named_parameters()}
    model.zero_grad()
    for modules in (1, 2, 4, "all"):
        net = tl.decouple(model, modules, sample=TOKENS, criterion=each_token)
        units = [unit.name for unit in net.partition.units]
        assert units == ["embedding", "blocks.0", "blocks.1", "blocks.2", "blocks.3.norm1…read_out"]
        net.guided_step(TOKENS, target, auxiliary="frozen")
        assert all(torch.equal(p.grad, expected[name]) for name, p in model.named_parameters())  # type: ignore[arg-type]
        model.zero_grad()
        assert all(loss.isfinite() for loss in net.local_step(TOKENS, target))
        assert all(p.grad is not None for p in net.parameters())
        net.zero_grad()


def test_a_run_makes_it_for_its_data() -> None:
    config = FitConfig.of(model="gpt-nano", model_options={"layers": 2, "tied": False})
    text = TextBundle(name="", train=(), validation=(), test=(), vocabulary=50, context=16, told="", tokens={})
    model: Any = Own().make_model(config, text)
    assert len(model.blocks) == 2 and model.read_out.weight.shape == (50, 64) and model.context == 16
    images: Any = SimpleNamespace(num_classes=10, shape=(1, 8, 8))
    with pytest.raises(ValueError, match=r"^model_options={'layers': 2} means nothing to model='mlp'"):
        Own().make_model(FitConfig.of(model="mlp", model_options={"layers": 2}), images)
    with pytest.raises(ValueError, match="means nothing to a network of your own"):
        Own(model=nn.Linear(2, 2)).named(FitConfig.of(model_options={"layers": 2}))


@pytest.mark.parametrize(
    ("name", "options", "message"),
    [
        ("gpt-tyny", {}, "^model 'gpt-tyny' is unknown .did you mean gpt-tiny"),
        ("resnet20", {}, "^model 'resnet20' is for images, and these are tokens"),
        ("gpt-tiny", {"layer": 2}, "^model_options: 'gpt-tiny' has no option 'layer' .did you mean layers"),
        ("gpt-tiny", {"heads": 5}, "^model_options.width: 96 cannot be shared by 5 heads of even width"),
        ("gpt-tiny", {"tied": 1}, "^model_options.tied: must be True or False"),
        ("gpt-tiny", {"layers": 0}, "^model_options.layers: must be a whole number of at least 1"),
        ("hf:somewhere", {"layers": 2}, "^model_options: 'hf:somewhere' has no option 'layers'"),
    ],
)
def test_what_is_refused(name: str, options: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        build_language_model(name, vocabulary=50, context=8, options=options)


def test_images_and_texts_are_told_apart() -> None:
    for name in ("gpt-tiny", "hf:somewhere"):
        with pytest.raises(ValueError, match=rf"^model '{name}' predicts tokens, and these are images"):
            build_model(name, num_classes=10)
    with pytest.raises(ValueError, match=r"^tokens: sequences of 17 are longer than the context of 16"):
        gpt()(torch.zeros(1, 17, dtype=torch.long))


# --- transformers ---

LLAMA = {
    "architectures": ["LlamaForCausalLM"], "model_type": "llama", "vocab_size": 300, "hidden_size": 16,
    "intermediate_size": 32, "num_hidden_layers": 3, "num_attention_heads": 2, "max_position_embeddings": 16,
    "pad_token_id": 299, "torch_dtype": "bfloat16",
}  # fmt: skip


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    pytest.importorskip("transformers")
    (tmp_path / "config.json").write_text(json.dumps(LLAMA))
    return tmp_path


def test_a_network_of_transformers_by_its_configuration(folder: Path) -> None:
    torch.manual_seed(0)
    model: Any = build_language_model(f"hf:{folder}", vocabulary=50, context=16)
    assert model.training and model.config.use_cache is False and model(TOKENS).logits.shape == (3, 12, 50)
    assert all(p.dtype == torch.float32 for p in model.parameters())
    net = tl.decouple(model, 3, sample=TOKENS, criterion=each_token)
    assert len(net.partition.units) == 4 and len(net.local_step(TOKENS, TOKENS)) == 3


def test_a_network_of_transformers_by_its_type_and_sizes(folder: Path) -> None:
    sizes = {name: value for name, value in LLAMA.items() if name not in ("model_type", "architectures")}
    found = []
    for name, options in ((f"hf:{folder}", {}), ("hf:llama", {"config": sizes})):
        torch.manual_seed(0)
        found.append(build_language_model(name, vocabulary=50, context=16, options=options).state_dict())
    assert found[0].keys() == found[1].keys()
    assert all(torch.equal(found[0][name], found[1][name]) for name in found[0])
    for name, options, message in [
        ("hf:lama", {"config": sizes}, "transformers has no type 'lama' .did you mean llama"),
        ("hf:llama", {"config": {"hiden_size": 8}}, "config: 'llama' has no 'hiden_size' .did you mean hidden_size"),
        ("hf:llama", {"config": {"hidden_size": "x"}}, "^model_options.config: .*hidden_size"),
        ("hf:llama", {"config": [8]}, r"^model_options.config: must be `name: value` pairs, not \[8\]"),
        ("hf:llama", {"config": sizes, "pretrained": True}, "^model_options.pretrained: a network that is made of a"),
        ("hf:llama", {}, "or give sizes as model_options.config to a type such as hf:llama"),
    ]:
        with pytest.raises(ValueError, match=message):
            build_language_model(name, vocabulary=50, context=16, options=options)


def test_its_weights_where_they_are(folder: Path) -> None:
    torch.manual_seed(0)
    made: Any = build_language_model(f"hf:{folder}", vocabulary=50, context=16)
    there = folder / "saved"
    made.save_pretrained(there)
    read: Any = build_language_model(f"hf:{there}", vocabulary=40, context=16, options={"pretrained": True})
    assert read.training and read.config.use_cache is False
    assert all(torch.equal(a, b) for a, b in zip(made.parameters(), read.parameters(), strict=True))
    with pytest.raises(ValueError, match=r"cannot be made \(its weights are for 50 tokens, and the data have 51\)"):
        build_language_model(f"hf:{there}", vocabulary=51, context=16, options={"pretrained": True})
    with pytest.raises(ValueError, match=r"cannot be made .*beside its config.json as .safetensors"):
        build_language_model(f"hf:{folder}", vocabulary=50, context=16, options={"pretrained": True})


def test_what_is_refused_of_transformers(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (folder / "empty").mkdir()
    (folder / "t5").mkdir()
    (folder / "t5" / "config.json").write_text(json.dumps({"model_type": "t5", "vocab_size": 50, "d_model": 16}))
    cases = [
        (f"hf:{folder}", 17, "takes sequences of 16 tokens at most, not of 17"),
        (f"hf:{folder / 'empty'}", 8, "has no config.json"),
        ("hf:nobody/has-this", 8, "neither a folder .* nor in its cache .*: nothing is downloaded here"),
        (f"hf:{folder / 't5'}", 8, "cannot be made .*: give a causal language model"),
    ]
    for name, context, message in cases:
        with pytest.raises(ValueError, match=message):
            build_language_model(name, vocabulary=50, context=context)
    monkeypatch.setitem(sys.modules, "transformers", None)
    with pytest.raises(ValueError, match="needs transformers, which is not installed: pip install"):
        build_language_model(f"hf:{folder}", vocabulary=50, context=8)
