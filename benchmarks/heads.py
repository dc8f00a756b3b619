"""What the heads of a language model's local modules cost: operations and memory of a step against end-to-end.

Operations are counted in one real step, peaks predicted; both are exact for the versions of torch at hand, and do not
depend on the machine. Tokens are random.

    python benchmarks/heads.py
    python benchmarks/heads.py --model gpt-small --vocabulary 50257 --context 512 --batch-size 8 --modules 4
"""

from __future__ import annotations

import argparse

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.utils.flop_counter import FlopCounterMode

import torchlocal as tl
from torchlocal.models import build_language_model
from torchlocal.rules import SoloRule
from torchlocal.tokens import TokenCrossEntropy


def all_scores(scores: Tensor, target: Tensor) -> Tensor:
    """Cross-entropy of scores that are held as a whole."""
    return F.cross_entropy(scores.flatten(0, -2), target.flatten())


def cost(net: tl.DecoupledNetwork, tokens: Tensor, target: Tensor, step: str) -> tuple[int, int]:
    """FLOPs and peak bytes of a step."""
    with FlopCounterMode(display=False) as counter:
        net.local_step(tokens, target)
    net.zero_grad()
    return counter.get_total_flops(), tl.memory.predict(net, tokens, target, step=step).peak_bytes


def main() -> None:
    """Print one line per head."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="gpt-tiny", help="name of a language model (default: gpt-tiny)")
    parser.add_argument("--vocabulary", type=int, default=1024, help="number of tokens (default: 1024)")
    parser.add_argument("--context", type=int, default=256, help="tokens of a sequence (default: 256)")
    parser.add_argument("--batch-size", type=int, default=8, help="sequences (default: 8)")
    parser.add_argument("--modules", type=int, default=8, help="local modules (default: 8)")
    options = parser.parse_args()
    generator = torch.Generator().manual_seed(0)
    tokens = torch.randint(options.vocabulary, (options.batch_size, options.context), generator=generator)
    target = tokens.roll(-1, 1)

    def build(modules: int, rule: tl.Rule | str, criterion: object) -> tl.DecoupledNetwork:
        torch.manual_seed(0)
        model = build_language_model(options.model, vocabulary=options.vocabulary, context=options.context)
        return tl.decouple(model, modules, sample=tokens, rule=rule, criterion=criterion)  # type: ignore[arg-type]

    whole = cost(build(1, "greedy", all_scores), tokens, target, "plain")
    width = build(2, "greedy", all_scores).sites[0].channels
    heads = {f"shared, {depth} block{'s' if depth != 1 else ''}": SoloRule(depth) for depth in (0, 1, 2)}
    heads[f"shared, MLP of {width}"] = SoloRule(0, hidden=width)
    heads["private, 0 blocks"] = SoloRule(0, read_out="private")
    for part in (4, 8):
        heads[f"private, 0 blocks, rank {width // part}"] = SoloRule(0, read_out="private", rank=width // part)
    heads[f"private, MLP of {width}, rank {width // 4}"] = SoloRule(
        0, hidden=width, read_out="private", rank=width // 4
    )
    print(f"{options.model}, {options.modules} modules, {tokens.numel()} tokens of {options.vocabulary}")
    chunked = cost(build(1, "greedy", TokenCrossEntropy(scores="chunked")), tokens, target, "local")
    print(f"end-to-end: {whole[0] / 1e9:.1f} GFLOP, {whole[1] / 2**20:.1f} MiB; × that:")
    print(f"end-to-end, scores in chunks: peak {chunked[1] / whole[1]:.3f}; local steps:\n")
    print("| head | FLOPs | peak, all scores | peak, those of heads in chunks | peak, all in chunks |")
    print("|---|---:|---:|---:|---:|")
    for name, rule in heads.items():
        found = [
            cost(build(options.modules, rule, criterion), tokens, target, "local")
            for criterion in (all_scores, TokenCrossEntropy(), TokenCrossEntropy(scores="chunked"))
        ]
        assert found[0][0] == found[1][0] == found[2][0]
        peaks = " | ".join(f"{peak / whole[1]:.3f}" for _, peak in found)
        print(f"| {name} | {found[0][0] / whole[0]:.2f} | {peaks} |", flush=True)


if __name__ == "__main__":
    main()
