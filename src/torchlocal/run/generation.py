"""Text from a trained network: token by token, by the plain network, without local modules or auxiliary networks."""

from __future__ import annotations

import zlib
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from torchlocal.checks import number, whole
from torchlocal.cut.batches import as_prediction
from torchlocal.data.tokenizers import Tokenizer, read_tokenizer
from torchlocal.models import build_language_model
from torchlocal.run import checkpoint
from torchlocal.run.build import resolve_execution
from torchlocal.run.config import FitConfig
from torchlocal.run.own import OWN

__all__ = ["continued", "generate"]


@torch.no_grad()
def generate(
    run: str | Path,
    prompt: str = "",
    *,
    length: int = 200,
    temperature: float = 1.0,
    top_k: int | None = None,
    seed: int = 0,
    model: nn.Module | Callable[[], nn.Module] | None = None,
    prediction: Callable[[Any], Tensor] = as_prediction,
    device: str = "auto",
) -> str:
    """Continue a text with the network of a run on text, until it ends the document or `length` tokens are there.

    Args:
        run: a run folder, whose best checkpoint is taken, or a checkpoint.
        prompt: how the text begins.
        length: largest number of tokens after it.
        temperature: scores are divided by it; 0 always takes the most likely token.
        top_k: draw from so many most likely tokens only.
        seed: of the draws.
        model: the network, if it has no name.
        prediction: what takes the scores from what the network returns.
        device: where to compute.

    Returns:
        The prompt and what follows it.

    Raises:
        ValueError: an argument is wrong, or the run is not one on text.
        FileNotFoundError: there is no checkpoint.
    """
    if not isinstance(prompt, str):
        raise ValueError(f"prompt={prompt!r} must be text")
    whole("length", length, 1)
    number("temperature", temperature)
    whole("top_k", top_k, 1, none=True)
    whole("seed", seed, 0)
    path = checkpoint.find_checkpoint(run)
    saved = checkpoint.load_checkpoint(path)
    told, config = saved["data"], FitConfig.of(**saved["config"])
    if "vocabulary" not in told:
        raise ValueError(f"{path} was not trained on text, so it has nothing to tell: give a run with data=text:...")
    tokenizer = _tokenizer(path, told)
    if model is None and config.model.name.startswith(OWN):
        raise ValueError(f"{path} is of a network of your own: call torchlocal.run.generation.generate with model=")
    network = model if model is None or isinstance(model, nn.Module) else model()
    if network is None:
        with torch.random.fork_rng(devices=[]):  # the weights drawn here are overwritten
            network = build_language_model(
                config.model.name,
                vocabulary=told["vocabulary"],
                context=told["context"],
                options=config.model.options,
            )
    checkpoint.load_backbone(network, saved, path)
    network = network.to(resolve_execution(FitConfig.of(device=device)).device).eval()
    begun = [tokenizer.end_of_text, *tokenizer.encode(prompt.encode()).tolist()]
    tokens = continued(
        lambda ids: prediction(network(ids)),
        begun,
        length=length,
        context=told["context"],
        temperature=temperature,
        top_k=top_k,
        end=tokenizer.end_of_text,
        generator=torch.Generator().manual_seed(seed),
        device=next(network.parameters(), torch.empty(0)).device,
    )
    return prompt + tokenizer.decode(tokens)


def continued(
    scores: Callable[[Tensor], Tensor],
    begun: list[int],
    *,
    length: int,
    context: int,
    temperature: float,
    top_k: int | None,
    end: int,
    generator: torch.Generator,
    device: torch.device,
) -> list[int]:
    """The tokens that follow, each drawn by the scores at the last place of the `context` tokens before it.

    Args:
        scores: maps ids `(1, T)` to scores `(1, T, V)`.
        begun: the tokens that there are, at least one.
        length: largest number of tokens.
        context: largest T.
        temperature: see :func:`generate`.
        top_k: see :func:`generate`.
        end: the token after which nothing follows.
        generator: for the draws, on the CPU.
        device: where the network is.
    """
    tokens: list[int] = []
    while len(tokens) < length:
        ids = torch.tensor([[*begun, *tokens][-context:]], device=device)
        last = scores(ids)[0, -1].float().cpu()
        if top_k is not None and top_k < len(last):
            last[last < last.topk(top_k).values[-1]] = -torch.inf
        if temperature == 0:
            token = int(last.argmax())
        else:
            token = int(torch.multinomial((last / temperature).softmax(0), 1, generator=generator))
        if token == end:
            break
        tokens.append(token)
    return tokens


def _tokenizer(path: Path, told: dict[str, Any]) -> Tokenizer:
    beside = path.parent / "tokenizer.json"
    if not beside.is_file():
        raise ValueError(f"there is no {beside}: put the tokenizer.json of the tokens that {path.name} knows there")
    tokenizer = read_tokenizer(beside)
    if f"{zlib.crc32(tokenizer.content.encode()):08x}" != told["tokenizer"] and told["tokenizer"] != f"{0:08x}":
        raise ValueError(f"{beside} is another than the one of {path.name}: put the right one there")
    return tokenizer
