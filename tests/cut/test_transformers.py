"""Networks of the transformers library as their users call them: exact, and cut where one would cut them by hand."""

from __future__ import annotations

import copy
import importlib
from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from networks import gradients
from torch import Tensor, nn

import torchlocal as tl

transformers = pytest.importorskip("transformers")

IDS = torch.randint(5, 90, (4, 16), generator=torch.Generator().manual_seed(0))
MASK = torch.ones_like(IDS)
MASK[1, 10:] = 0
BATCH = {"input_ids": IDS, "attention_mask": MASK}
LABELS = IDS.masked_fill(MASK == 0, -100)
CLASSES = torch.tensor([0, 1, 2, 3])
SMALL: dict[str, Any] = {
    "vocab_size": 100, "hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 6, "num_attention_heads": 4,
}  # fmt: skip
SPECIAL: dict[str, Any] = {"pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2}
WHISPER: dict[str, Any] = {
    "vocab_size": 100, "d_model": 32, "encoder_layers": 3, "decoder_layers": 3, "encoder_attention_heads": 4,
    "decoder_attention_heads": 4, "encoder_ffn_dim": 64, "decoder_ffn_dim": 64, "num_mel_bins": 8,
    "max_source_positions": 16, "max_target_positions": 16,
}  # fmt: skip
SOUND = torch.randn(4, 8, 32, generator=torch.Generator().manual_seed(2))
IMAGES = torch.randn(4, 3, 32, 32, generator=torch.Generator().manual_seed(1))


def next_token(logits: Tensor, labels: Tensor) -> Tensor:
    return F.cross_entropy(logits[:, :-1].flatten(0, 1).float(), labels[:, 1:].flatten())


def each_token(logits: Tensor, labels: Tensor) -> Tensor:
    return F.cross_entropy(logits.flatten(0, 1), labels.flatten())


Case = tuple[str, dict[str, Any], Any, Any, Any, str | None]
CASES: dict[str, Case] = {
    "llama": ("Llama*ForCausalLM", SMALL | {"num_key_value_heads": 2}, next_token, BATCH, LABELS, None),
    "llama, tied": (
        "Llama*ForCausalLM", SMALL | {"num_key_value_heads": 2, "tie_word_embeddings": True}, next_token, BATCH,
        LABELS, None,
    ),
    "qwen3": ("Qwen3*ForCausalLM", SMALL | {"num_key_value_heads": 2, "head_dim": 8}, next_token, BATCH, LABELS, None),
    "mistral": ("Mistral*ForCausalLM", SMALL | {"num_key_value_heads": 2}, next_token, BATCH, LABELS, None),
    "mixtral": (
        "Mixtral*ForCausalLM", SMALL | {"num_key_value_heads": 2, "num_local_experts": 4}, next_token, BATCH, LABELS,
        None,
    ),
    "gpt2, tied": (
        "GPT2*LMHeadModel",
        {
            "vocab_size": 100, "n_embd": 32, "n_layer": 4, "n_head": 4, "n_positions": 32, "bos_token_id": 0,
            "eos_token_id": 0,
        },
        next_token, BATCH, LABELS, None,
    ),
    "bert": ("Bert*ForSequenceClassification", SMALL | {"num_labels": 5}, F.cross_entropy, BATCH, CLASSES, None),
    "modernbert": (
        "ModernBert*ForSequenceClassification",
        SMALL | SPECIAL | {"num_labels": 5, "cls_token_id": 1, "sep_token_id": 2},
        F.cross_entropy, BATCH, CLASSES, None,
    ),
    "vit": (
        "ViT*ForImageClassification",
        {
            "hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 4, "num_attention_heads": 4,
            "image_size": 32, "patch_size": 8, "num_labels": 5,
        },
        F.cross_entropy, {"pixel_values": IMAGES}, CLASSES, None,
    ),
    "t5": (
        "T5*ForConditionalGeneration",
        {
            "vocab_size": 100, "d_model": 32, "d_kv": 8, "d_ff": 64, "num_layers": 3, "num_decoder_layers": 3,
            "num_heads": 4, "decoder_start_token_id": 0,
        },
        each_token, BATCH | {"decoder_input_ids": IDS[:, :8]}, IDS[:, :8].clone(), "collect",
    ),
    "whisper": (
        "Whisper*ForConditionalGeneration", WHISPER | SPECIAL | {"decoder_start_token_id": 1}, each_token,
        {"input_features": SOUND, "decoder_input_ids": IDS[:, :8]},
        IDS[:, :8].clone(), "collect",
    ),
}  # fmt: skip
BLOCKS = {
    "llama": "model.layers", "llama, tied": "model.layers", "qwen3": "model.layers", "mistral": "model.layers",
    "mixtral": "model.layers", "gpt2, tied": "transformer.h", "modernbert": "model.layers", "vit": "vit.layers",
}  # fmt: skip


def build(name: str, **changes: Any) -> nn.Module:
    family, options = CASES[name][0], CASES[name][1] | changes
    config = getattr(transformers, family.split("*")[0] + "Config")(**options)
    torch.manual_seed(0)
    model: nn.Module = getattr(transformers, family.replace("*", ""))(config)
    return model.train()


def assert_same(first: dict[str, Tensor | None], second: dict[str, Tensor | None]) -> None:
    for name, a in first.items():
        b = second[name]
        assert (a is None) == (b is None), name
        assert a is None or b is None or torch.equal(a, b), name


def plain_gradients(model: nn.Module, criterion: Callable[..., Tensor], batch: Any, target: Any) -> dict[str, Any]:
    model.zero_grad()
    torch.manual_seed(1)
    criterion(model(**batch).logits, target).backward()
    found = gradients(model)
    model.zero_grad()
    return found


@pytest.mark.parametrize("name", CASES)
def test_guided_steps_are_exact_and_local_steps_train_everything(name: str) -> None:
    _, _, criterion, batch, target, carry = CASES[name]
    model = build(name)
    before = [dict(vars(m)) for m in model.modules()]
    expected = plain_gradients(model, criterion, batch, target)
    for modules in (2, 3, "all"):
        net = tl.decouple(model, modules, sample=batch, criterion=criterion, carry=carry)
        assert net.num_modules == (modules if isinstance(modules, int) else len(net.partition.units))
        for recompute in (None, "modules") if carry is None else (None,):
            net.zero_grad()
            torch.manual_seed(1)
            net.guided_step(batch, target, auxiliary="frozen", recompute=recompute)
            assert_same(gradients(model), expected)
        net.zero_grad()
        losses = net.local_step(batch, target)
        assert len(losses) == net.num_modules and all(loss.isfinite() for loss in losses)
        trained = {n for n, p in model.named_parameters() if p.grad is not None}
        assert trained == {n for n, g in expected.items() if g is not None}
        assert all(p.grad is not None for p in net.auxiliary.parameters())
        net.zero_grad()
    if name in BLOCKS:  # every block is a unit: the last one with the norm and the head behind it
        count = len(model.get_submodule(BLOCKS[name]))  # type: ignore[arg-type]
        names = [unit.name for unit in net.partition.units]
        assert [n for n in names if n.startswith(BLOCKS[name])][: count - 1] == [
            f"{BLOCKS[name]}.{i}" for i in range(count - 1)
        ]
    assert [vars(m).keys() for m in model.modules()] == [v.keys() for v in before]


@pytest.mark.parametrize("modules", [2, 4, "all"])
def test_a_local_step_of_a_tied_llama_is_the_hand_written_one(modules: int | str) -> None:
    model: Any = build("llama, tied", attention_dropout=0.1)
    net = tl.decouple(model, modules, sample=BATCH, criterion=next_token)
    torch.manual_seed(1)
    losses = net.local_step(BATCH, LABELS)
    found = gradients(net)
    net.zero_grad()
    torch.manual_seed(1)
    inner = model.model
    states = inner.embed_tokens(IDS)
    positions = torch.arange(IDS.shape[1])[None]
    masking = importlib.import_module("transformers.masking_utils")
    mask = masking.create_causal_mask(
        config=model.config, inputs_embeds=states, attention_mask=MASK, past_key_values=None, position_ids=positions
    )
    tables = inner.rotary_emb(states, position_ids=positions)
    ends = {net.partition.units[group[-1]].name: k for k, group in enumerate(net.partition.groups[:-1])}
    by_hand = []

    def learn(name: str, states: Tensor) -> Tensor:
        if name not in ends:
            return states
        loss = next_token(net.auxiliary[ends[name]](states), LABELS)
        loss.backward()
        by_hand.append(loss.detach())
        return states.detach()

    states = learn("model.embed_tokens", states)
    for i, layer in enumerate(inner.layers):
        states = layer(states, attention_mask=mask, position_embeddings=tables, position_ids=positions)
        states = learn(f"model.layers.{i}", states)
    loss = next_token(model.lm_head(inner.norm(states)), LABELS)
    loss.backward()
    assert all(torch.equal(a, b) for a, b in zip(losses, [*by_hand, loss.detach()], strict=True))
    assert_same(found, gradients(net))
    # The tied matrix belongs to the last module, which has the sum of what embedding and head give.
    owner = [k for k, ps in enumerate(net.module_parameters()) if any(p is inner.embed_tokens.weight for p in ps)]
    assert owner == [net.num_modules - 1]


@pytest.mark.parametrize("reentrant", [False, True])
@pytest.mark.parametrize("name", ["llama", "bert"])
def test_gradient_checkpointing_of_the_model_goes_on_working(name: str, reentrant: bool) -> None:
    _, _, criterion, batch, target, _ = CASES[name]
    results = []
    for checkpointing in (False, True):
        model: Any = build(name)
        if checkpointing:
            model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": reentrant})
        torch.manual_seed(2)
        net = tl.decouple(model, 3, sample=batch, criterion=criterion, rule=tl.GreedyRule("linear"))
        torch.manual_seed(1)
        net.local_step(batch, target)
        results.append(gradients(net))
        net.zero_grad()
        torch.manual_seed(1)
        net.guided_step(batch, target, auxiliary="frozen")
        results.append(gradients(model))
    assert_same(results[0], results[2])
    assert_same(results[1], results[3])


def test_adapters_of_peft() -> None:
    peft = pytest.importorskip("peft")
    model = build("llama")
    adapted = peft.get_peft_model(model, peft.LoraConfig(r=4, target_modules=["q_proj", "v_proj"], lora_dropout=0.1))
    plain = copy.deepcopy(adapted)
    net = tl.decouple(adapted, 3, sample=BATCH, criterion=next_token)
    assert [unit.name.split(".")[-1] for unit in net.partition.units[1:-1]] == ["0", "1", "2", "3", "4"]
    torch.manual_seed(1)
    net.guided_step(BATCH, LABELS, auxiliary="frozen")
    assert_same(gradients(adapted), plain_gradients(plain, next_token, BATCH, LABELS))
    net.zero_grad()
    net.local_step(BATCH, LABELS)
    assert all((p.grad is not None) == p.requires_grad for p in net.parameters())
    lists = net.module_parameters()
    places = {id(p): k for k, ps in enumerate(lists) for p in ps}
    assert [places[id(p)] for n, p in adapted.named_parameters() if n.endswith("lora_B.default.weight")] == sorted(
        places[id(p)] for n, p in adapted.named_parameters() if n.endswith("lora_B.default.weight")
    )


def test_adapters_that_come_after_decouple_belong_to_their_module() -> None:
    model: Any = build("llama")
    net = tl.decouple(model, 3, sample=BATCH, criterion=next_token)

    class Adapter(nn.Module):
        def __init__(self, base: nn.Linear) -> None:
            super().__init__()
            self.base, self.a, self.b = base, nn.Linear(32, 2, bias=False), nn.Linear(2, base.out_features, bias=False)

        def forward(self, x: Tensor) -> Tensor:
            return self.base(x) + self.b(self.a(x))

    for layer in model.model.layers:
        layer.self_attn.q_proj = Adapter(layer.self_attn.q_proj)
    lists = net.module_parameters()
    places = {id(p): k for k, ps in enumerate(lists) for p in ps}
    for group, k in zip(net.partition.groups, range(3), strict=True):
        for unit in group:
            if unit:
                layer = model.model.layers[unit - 1]
                assert {places[id(p)] for p in layer.parameters()} == {k}
    net.local_step(BATCH, LABELS)
    assert all(p.grad is not None for p in model.parameters())


def test_a_llama_takes_batches_of_any_length_in_every_memory_mode() -> None:
    model = build("llama, tied")
    net = tl.decouple(model, 3, sample=BATCH, criterion=next_token)
    for length in (16, 9, 12):
        batch = {name: t[:, :length] for name, t in BATCH.items()}
        expected = plain_gradients(model, next_token, batch, LABELS[:, :length])
        for options in ({"memory": "exact"}, {"recompute": 4}, {"memory": "full"}):
            net.zero_grad()
            torch.manual_seed(1)
            net.guided_step(batch, LABELS[:, :length], auxiliary="frozen", **options)
            assert_same(gradients(model), expected)
        net.zero_grad()
        assert len(net.local_step(batch, LABELS[:, :length])) == 3
        assert [tuple(o.shape) for o in net.depth_outputs(batch)] == [(4, length, 100)] * 3
    assert tl.plan(model, BATCH, modules=(2, 3), criterion=next_token).rows
    assert tl.decouple(model, "fewest", sample=BATCH, criterion=next_token).num_modules >= 2
