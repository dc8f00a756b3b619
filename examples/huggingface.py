"""A small Llama, trained by the transformers Trainer as local modules with guidance; text is Python's own source.

    pip install '.[transformers]'
    python examples/huggingface.py                               # 250 steps, one to two minutes on two CPU cores
    python examples/huggingface.py --steps 10 --out runs/trial   # see that it runs

The network reads bytes and predicts the next one. It ends as a folder that ``from_pretrained`` loads, without a trace
of how it was trained. Three things differ from an ordinary Trainer:

- Its ``training_step`` calls ``local_step`` or ``guided_step``, which run the network and go backward themselves. With
  ``gradient_accumulation_steps=n`` each batch counts 1/n; ``global_step`` counts updates, so that all batches of one
  update are of the same kind.
- The optimizer gets ``net.parameters()``: the network's own and those of the auxiliary networks.
- One process and one device: the Trainer's wrapper for several expects one backward pass. And its checkpoints do not
  hold the auxiliary networks: to resume from one, save ``net.auxiliary.state_dict()`` beside it.
"""

from __future__ import annotations

import argparse
import sysconfig
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.data import Dataset

import torchlocal as tl
from torchlocal.guidance import Guidance

try:
    import accelerate  # noqa: F401, since the Trainer needs it, too
    from transformers import LlamaConfig, LlamaForCausalLM, Trainer, TrainingArguments
except ModuleNotFoundError as error:
    raise SystemExit(
        "this example needs transformers and accelerate, of which one is not installed: "
        "pip install 'torchlocal[transformers]'"
    ) from error

LENGTH = 128  # bytes that the network sees at once
BATCH_SIZE = 16


class LocalTrainer(Trainer):
    """A Trainer whose steps are local or guided.

    Args:
        net: the decoupled network.
        guidance: says which steps are guided.
        options: those of a Trainer.
    """

    def __init__(self, net: tl.DecoupledNetwork, guidance: Guidance, **options: Any) -> None:
        super().__init__(model=net.backbone, **options)
        self.net, self.guidance = net, guidance

    def training_step(self, model: nn.Module, inputs: dict[str, Any], num_items_in_batch: Any = None) -> Tensor:
        """Leave the gradients of one batch, and return the global loss."""
        self.net.train()
        batch = self._prepare_inputs(inputs)
        target = batch.pop("labels")
        step = self.net.guided_step if self.guidance(self.state.global_step) else self.net.local_step
        share = 1 / self.current_gradient_accumulation_steps
        losses = step(batch, target, scale=share, backward=self.accelerator.backward)
        return losses[-1] * share


class Text(Dataset[dict[str, Tensor]]):
    """Bytes in pieces of equal length; the Trainer has the network shift the labels."""

    def __init__(self, text: bytes) -> None:
        self.pieces = torch.frombuffer(bytearray(text), dtype=torch.uint8).long()
        self.pieces = self.pieces[: len(text) // LENGTH * LENGTH].view(-1, LENGTH)

    def __len__(self) -> int:
        return len(self.pieces)

    def __getitem__(self, index: int) -> dict[str, Tensor]:
        return {"input_ids": self.pieces[index], "labels": self.pieces[index]}


def source_code() -> tuple[Text, Text]:
    """The standard library's modules, one of ten for validation."""
    files = sorted(Path(sysconfig.get_paths()["stdlib"]).glob("*.py"))
    texts = [path.read_bytes() for path in files]
    validation = b"".join(texts[::10])[: 128 * LENGTH]
    return Text(b"".join(text for i, text in enumerate(texts) if i % 10)), Text(validation)


def next_token(logits: Tensor, labels: Tensor) -> Tensor:
    """Cross-entropy of each prediction with the token after it, as the network's own loss has it."""
    return F.cross_entropy(logits[:, :-1].flatten(0, 1), labels[:, 1:].flatten())


def main() -> None:
    """Train, save, and load again."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--steps", type=int, default=250, help="training steps of 16 × 128 bytes (default: 250)")
    parser.add_argument("--seed", type=int, default=0, help="of weights and batches (default: 0)")
    parser.add_argument("--out", type=Path, default=Path("runs/huggingface"), help="folder (default: runs/huggingface)")
    options = parser.parse_args()
    if options.steps < 1:
        parser.error(f"--steps: must be at least 1, not {options.steps}")

    torch.manual_seed(options.seed)
    config = LlamaConfig(
        vocab_size=256,
        hidden_size=128,
        intermediate_size=384,
        num_hidden_layers=4,
        num_attention_heads=4,
        max_position_embeddings=LENGTH,
        tie_word_embeddings=True,
        use_cache=False,  # else every layer's keys and values stay alive until the end of the step
        bos_token_id=None,
        eos_token_id=None,
    )
    model = LlamaForCausalLM(config)
    train, validation = source_code()
    sample = {"input_ids": train.pieces[:BATCH_SIZE]}
    net = tl.decouple(model, modules=4, sample=sample, criterion=next_token)
    guidance = tl.PhasedGuidance(num_steps=options.steps)  # the last fifth of the steps is guided
    optimizer = torch.optim.AdamW(net.parameters(), lr=2e-3, weight_decay=0.1)
    # Stays high over the local steps and falls to zero over the guided ones.
    scheduler = torch.optim.lr_scheduler.LambdaLR(
        optimizer, lambda step: guidance.cosine(step, options.steps, warmup=20)
    )
    trainer = LocalTrainer(
        net,
        guidance,
        args=TrainingArguments(
            output_dir=str(options.out),
            max_steps=options.steps,
            per_device_train_batch_size=BATCH_SIZE,
            per_device_eval_batch_size=BATCH_SIZE,
            seed=options.seed,
            logging_steps=50,
            save_strategy="no",
            report_to="none",
            disable_tqdm=True,
            dataloader_pin_memory=torch.cuda.is_available(),
        ),
        train_dataset=train,
        eval_dataset=validation,
        optimizers=(optimizer, scheduler),
    )
    before = trainer.evaluate()["eval_loss"]
    trainer.train()
    after = trainer.evaluate()["eval_loss"]
    print(f"validation loss {before:.3f} before, {after:.3f} after {options.steps} steps")

    model.save_pretrained(options.out)
    loaded = LlamaForCausalLM.from_pretrained(options.out, device_map=model.device).eval()
    ids = validation.pieces[:2].to(model.device)
    with torch.no_grad():
        same = torch.equal(loaded(ids).logits, model.eval()(ids).logits)
    print(f"saved in {options.out}; loaded again it gives {'the same' if same else 'OTHER'} logits")


if __name__ == "__main__":
    main()
