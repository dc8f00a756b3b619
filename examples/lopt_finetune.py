"""Fine-tune a causal model of transformers in two halves (LoPT), with guidance on top; by hand or by the Trainer.

    pip install '.[transformers]'                                            # and peft for --lora: '.[peft]'
    python examples/lopt_finetune.py --model FOLDER --text FILE              # your model, your text
    python examples/lopt_finetune.py --model FOLDER --text FILE --trainer    # the same by the Trainer of transformers
    python examples/lopt_finetune.py --model FOLDER --text FILE --lora       # adapters of peft instead of all weights
    python examples/lopt_finetune.py                                         # see that it runs: random weights, bytes

LoPT (arXiv 2605.04913) cuts the network at its midpoint. The upper half learns the task. The lower half learns to keep
what the embedding said: a small network, thrown away afterwards, makes the embedding again from its output. What that
saves: a step keeps the activations of one half at a time, since the lower half's backward pass is over before the upper
half begins; and no gradient crosses the middle, so that the halves may lie on two processes, with traffic one way
(``torchlocal.distribute``). It saves nothing of weights, gradients and optimizer, which is what adapters are for: the
two add up. What it costs: the lower half never hears of the task. So the last steps are guided, with gradients through
the whole network (``--share 0``: LoPT alone); with ``memory="local"`` they recompute, so that they take no more memory
than the others, or where that is not possible a warning says how much. What the others take is told at the start, as
predicted.

It ends as a folder that ``from_pretrained`` loads, with adapters merged, without a trace of how it was trained.
"""

from __future__ import annotations

import argparse
import itertools
import sysconfig
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.data import DataLoader, Dataset

import torchlocal as tl
from torchlocal.guidance import Guidance

try:
    import accelerate  # noqa: F401, since the Trainer needs it, too
    from transformers import (
        AutoModelForCausalLM,
        AutoTokenizer,
        LlamaConfig,
        LlamaForCausalLM,
        Trainer,
        TrainingArguments,
    )
except ModuleNotFoundError as error:
    raise SystemExit(
        "this example needs transformers and accelerate, of which one is not installed: "
        "pip install 'torchlocal[transformers]'"
    ) from error


class Pieces(Dataset[dict[str, Tensor]]):
    """Tokens in pieces of equal length; labels are the tokens themselves, as transformers has it."""

    def __init__(self, tokens: Tensor, length: int) -> None:
        self.pieces = tokens[: len(tokens) // length * length].view(-1, length)

    def __len__(self) -> int:
        return len(self.pieces)

    def __getitem__(self, index: int) -> dict[str, Tensor]:
        return {"input_ids": self.pieces[index], "labels": self.pieces[index]}


class LocalTrainer(Trainer):
    """A Trainer whose steps are local or guided; more about it: examples/huggingface.py."""

    def __init__(self, net: tl.DecoupledNetwork, guidance: Guidance, **options: Any) -> None:
        super().__init__(model=net.backbone, **options)
        self.net, self.guidance = net, guidance

    def training_step(self, model: nn.Module, inputs: dict[str, Any], num_items_in_batch: Any = None) -> Tensor:
        """Leave the gradients of one batch, and return the global loss."""
        self.net.train()
        batch = self._prepare_inputs(inputs)
        target, share = batch.pop("labels"), 1 / self.current_gradient_accumulation_steps
        options: dict[str, Any] = {"scale": share, "backward": self.accelerator.backward}
        if self.guidance(self.state.global_step):
            return self.net.guided_step(batch, target, memory="local", **options)[-1] * share
        return self.net.local_step(batch, target, **options)[-1] * share


def next_token(logits: Tensor, labels: Tensor) -> Tensor:
    """Cross-entropy of each prediction with the token after it, as the network's own loss has it."""
    return F.cross_entropy(logits[:, :-1].flatten(0, 1), labels[:, 1:].flatten())


def midpoint(model: nn.Module) -> str:
    """Name of the block after which the lower half ends."""
    lists = [(name, module) for name, module in model.named_modules() if isinstance(module, nn.ModuleList)]
    name, blocks = max(lists, key=lambda found: len(found[1]))
    return f"{name}.{len(blocks) // 2 - 1}"


def with_adapters(model: Any, rank: int) -> Any:
    """The model with LoRA (Hu et al. 2021) on its linear layers; all else is frozen."""
    try:
        import peft
    except ModuleNotFoundError as error:
        raise SystemExit("--lora needs peft, which is not installed: pip install 'torchlocal[peft]'") from error
    return peft.get_peft_model(model, peft.LoraConfig(r=rank, lora_alpha=2 * rank, target_modules="all-linear"))


@torch.no_grad()
def mean_loss(model: Any, data: Pieces, batch_size: int) -> float:
    """Loss of the next token over all pieces, which are equally long."""
    model.eval()
    device = next(model.parameters()).device
    losses = [
        next_token(model(input_ids=x.to(device)).logits, x.to(device)) * len(x) for x in data.pieces.split(batch_size)
    ]
    return float(torch.stack(losses).sum()) / len(data)


def load(options: argparse.Namespace) -> tuple[Any, Any, Tensor]:
    """The model, its tokenizer or None, and the tokens of the text."""
    if options.text is not None:
        text = options.text.read_bytes()
    else:
        files = sorted(Path(sysconfig.get_paths()["stdlib"]).glob("*.py"))[::8]
        text = b"".join(path.read_bytes() for path in files)
    if options.model is not None:
        # use_cache would hold every layer's keys and values until the end of the step.
        model = AutoModelForCausalLM.from_pretrained(options.model, local_files_only=True, use_cache=False)
        tokenizer = AutoTokenizer.from_pretrained(options.model, local_files_only=True)
        return model, tokenizer, torch.tensor(tokenizer(text.decode(errors="replace"))["input_ids"])
    config = LlamaConfig(
        vocab_size=256, hidden_size=64, intermediate_size=192, num_hidden_layers=4, num_attention_heads=4,
        max_position_embeddings=options.length, tie_word_embeddings=True, use_cache=False,
        bos_token_id=None, eos_token_id=None,
    )  # fmt: skip
    return LlamaForCausalLM(config), None, torch.frombuffer(bytearray(text), dtype=torch.uint8).long()


def main() -> None:
    """Fine-tune, save, and load again."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", type=Path, help="folder with weights, configuration and tokenizer (default: none)")
    parser.add_argument("--text", type=Path, help="file to fine-tune on, UTF-8 (default: some of Python's own source)")
    parser.add_argument("--trainer", action="store_true", help="by the Trainer of transformers")
    parser.add_argument("--lora", action="store_true", help="train adapters of peft, and merge them at the end")
    parser.add_argument("--rank", type=int, default=8, help="of the adapters (default: 8)")
    parser.add_argument("--steps", type=int, default=100, help="training steps (default: 100)")
    parser.add_argument(
        "--share", type=float, default=0.2, help="of the steps, at the end, that is guided (default: 0.2)"
    )
    parser.add_argument("--batch-size", type=int, default=8, help="pieces of text per step (default: 8)")
    parser.add_argument("--length", type=int, default=128, help="tokens of a piece (default: 128)")
    parser.add_argument("--lr", type=float, default=1e-4, help="learning rate (default: 1e-4)")
    parser.add_argument("--seed", type=int, default=0, help="of adapters and batches (default: 0)")
    parser.add_argument("--out", type=Path, default=Path("runs/lopt"), help="folder (default: runs/lopt)")
    options = parser.parse_args()
    if options.steps < 1:
        parser.error(f"--steps: must be at least 1, not {options.steps}")
    try:
        guidance = tl.PhasedGuidance(share=options.share, num_steps=options.steps)
    except ValueError as error:
        parser.error(f"--{error}")

    torch.manual_seed(options.seed)
    model, tokenizer, tokens = load(options)
    if options.lora:
        model = with_adapters(model, options.rank)
    pieces = Pieces(tokens, options.length)
    held_out = max(1, len(pieces) // 20)
    if len(pieces) < options.batch_size + held_out:
        parser.error(f"--text: {len(pieces)} pieces of {options.length} tokens are too few for a batch and a test")
    validation = Pieces(tokens[-held_out * options.length :], options.length)
    train = Pieces(tokens[: -held_out * options.length], options.length)

    model.to("cuda" if torch.cuda.is_available() else "cpu")
    ids = train.pieces[: options.batch_size].to(next(model.parameters()).device)
    net = tl.decouple(model, cuts=[midpoint(model)], sample={"input_ids": ids}, rule="lopt", criterion=next_token)
    for told, step in (("end-to-end", "plain"), ("LoPT", "local")):
        peak = tl.memory.predict(net, {"input_ids": ids}, ids, step=step).peak_bytes
        print(f"a step takes {peak / 2**20:.1f} MiB beyond weights and optimizer: {told}")
    optimizer = torch.optim.AdamW([p for p in net.parameters() if p.requires_grad], lr=options.lr)
    # Stays high over the local steps and falls to zero over the guided ones.
    scheduler = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: guidance.cosine(step, options.steps))
    before = mean_loss(model, validation, options.batch_size)
    if options.trainer:
        arguments = TrainingArguments(
            output_dir=str(options.out), max_steps=options.steps, per_device_train_batch_size=options.batch_size,
            seed=options.seed, logging_steps=50, save_strategy="no", report_to="none", disable_tqdm=True,
            dataloader_pin_memory=torch.cuda.is_available(),
        )  # fmt: skip
        LocalTrainer(net, guidance, args=arguments, train_dataset=train, optimizers=(optimizer, scheduler)).train()
    else:
        passes = itertools.repeat(DataLoader(train, options.batch_size, shuffle=True, drop_last=True))
        for number, batch in zip(range(options.steps), itertools.chain.from_iterable(passes), strict=False):
            target = batch["labels"].to(ids.device)
            net.train()
            if guidance(number):
                net.guided_step({"input_ids": target}, target, memory="local")
            else:
                net.local_step({"input_ids": target}, target)
            optimizer.step()
            optimizer.zero_grad()
            scheduler.step()
    after = mean_loss(model, validation, options.batch_size)
    print(f"validation loss {before:.3f} before, {after:.3f} after {options.steps} steps")

    if options.lora:
        model = model.merge_and_unload()
    model.save_pretrained(options.out)
    if tokenizer is not None:
        tokenizer.save_pretrained(options.out)
    loaded = AutoModelForCausalLM.from_pretrained(options.out, device_map=model.device).eval()
    with torch.no_grad():
        same = torch.equal(loaded(ids).logits, model.eval()(ids).logits)
    print(f"saved in {options.out}; loaded again it gives {'the same' if same else 'OTHER'} logits")


if __name__ == "__main__":
    main()
