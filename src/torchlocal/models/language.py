"""Networks for text by name: they take token ids (N, T), and predict the token after each, (N, T, V)."""

from __future__ import annotations

import inspect
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import nn

from torchlocal.checks import suggestion, whole
from torchlocal.models.gpt import GPT, SIZES
from torchlocal.names import DECODERS, NETWORKS, unknown_network

__all__ = ["build_language_model"]

_GPT_OPTIONS = tuple(name for name in inspect.signature(GPT).parameters if name not in ("vocabulary", "context"))
_HF_OPTIONS = ("pretrained", "config")


def build_language_model(
    name: str, *, vocabulary: int, context: int, options: Mapping[str, Any] | None = None
) -> nn.Module:
    """Builds a causal language model by name, with random weights unless it is said otherwise.

    Names: `gpt-nano`, `gpt-tiny`, `gpt-mini`, `gpt-small`, `gpt-medium`, `gpt-large`, `gpt-xl` (see `SIZES`), with the
    options `layers`, `width`, `heads` and `tied`; `hf:PATH` for any causal model of the transformers library: a folder
    with its `config.json`, or the name of one in the library's cache, with the option `pretrained` for the weights
    that lie there. `hf:TYPE` with the option `config` is a network of that type (`hf:llama`) with random weights, and
    of these sizes, named as in its `config.json`. Nothing is downloaded.

    Args:
        name: see above.
        vocabulary: number of tokens V.
        context: the most tokens of a sequence.
        options: see above.

    Returns:
        A network that maps token ids (N, T) to scores (N, T, V), or to an output that has them as its `logits`.

    Raises:
        ValueError: the name or an option is unknown, a library or a file is missing, or the sizes do not fit.
    """
    options = dict(options or {})
    whole("vocabulary", vocabulary, 2)
    whole("context", context, 1)
    if name.startswith("hf:"):
        _refuse_unknown(name, options, _HF_OPTIONS)
        return _of_transformers(name, vocabulary, context, **options)
    if name in NETWORKS or name.startswith(("torchvision:", "timm:")):
        raise ValueError(f"model {name!r} is for images, and these are tokens: choose {', '.join(SIZES)} or hf:PATH")
    if name not in SIZES:
        raise ValueError(unknown_network(name, DECODERS))
    _refuse_unknown(name, options, _GPT_OPTIONS)
    layers, width, heads = SIZES[name]
    try:
        return GPT(vocabulary, context, **{"layers": layers, "width": width, "heads": heads, **options})
    except ValueError as error:
        raise ValueError(f"model_options.{error}") from error


def _refuse_unknown(name: str, options: Mapping[str, Any], known: tuple[str, ...]) -> None:
    for option in options:
        if option not in known:
            hint = suggestion(str(option), known) or f": it has {', '.join(known)}"
            raise ValueError(f"model_options: {name!r} has no option {option!r}{hint}")


def _of_transformers(
    name: str, vocabulary: int, context: int, pretrained: bool = False, config: Mapping[str, Any] | None = None
) -> nn.Module:
    if not isinstance(pretrained, bool):
        raise ValueError(f"model_options.pretrained: must be true or false, not {pretrained!r}")
    if config is not None and pretrained:
        raise ValueError("model_options.pretrained: a network that is made of a config has no weights; leave one out")
    try:
        import transformers
    except ImportError as error:
        raise ValueError(
            f"model {name!r} needs transformers, which is not installed: pip install 'torchlocal[transformers]'"
        ) from error
    found = _configured(name, config) if config is not None else _read_config(name)
    longest = getattr(found, "max_position_embeddings", None)
    if longest is not None and longest < context:
        raise ValueError(
            f"model {name!r} takes sequences of {longest} tokens at most, not of {context}: give a smaller context"
        )
    found.use_cache = False  # keys and values for generation would be held until the end of a step
    auto = transformers.AutoModelForCausalLM
    try:
        if not pretrained:
            found.vocab_size = vocabulary
            for token in ("pad_token_id", "bos_token_id", "eos_token_id"):
                value = getattr(found, token, None)
                if isinstance(value, int) and value >= vocabulary:
                    setattr(found, token, None)
            model: nn.Module = auto.from_config(found, dtype=torch.float32)
            return model
        if found.vocab_size < vocabulary:
            raise ValueError(f"its weights are for {found.vocab_size} tokens, and the data have {vocabulary}")
        model = auto.from_pretrained(
            _place(name), config=found, dtype=torch.float32, local_files_only=True, use_safetensors=True
        )
        return model.train()
    except (OSError, ValueError, KeyError, AssertionError) as error:
        raise ValueError(
            f"model {name!r} cannot be made ({_first_line(error)}): give a causal language model"
            + (" whose weights are beside its config.json as .safetensors" if pretrained else "")
        ) from error


def _place(name: str) -> str:
    """Folder, or name in the library's cache."""
    place = name.removeprefix("hf:")
    folder = Path(place).expanduser()
    return str(folder) if folder.is_dir() else place


def _read_config(name: str) -> Any:
    """The configuration that lies in a folder or in the library's cache."""
    import transformers

    where = _place(name)
    if not where or (Path(where).is_dir() and not (Path(where) / "config.json").is_file()):
        raise ValueError(f"model {name!r} has no config.json: give hf: and a folder that holds one")
    try:
        return transformers.AutoConfig.from_pretrained(where, local_files_only=True)
    except (OSError, ValueError, KeyError) as error:
        raise ValueError(
            f"model {name!r} is neither a folder with a config.json that transformers reads nor in its cache "
            f"({_first_line(error)}): nothing is downloaded here, so put it there first, or give sizes as "
            "model_options.config to a type such as hf:llama"
        ) from error


def _configured(name: str, config: Mapping[str, Any]) -> Any:
    """The configuration of a type of network, with sizes that are given."""
    import transformers

    kind = name.removeprefix("hf:")
    if not isinstance(config, Mapping):
        raise ValueError(f"model_options.config: must be `name: value` pairs, not {config!r}")
    if kind not in transformers.CONFIG_MAPPING:
        raise ValueError(
            f"model {name!r}: transformers has no type {kind!r}{suggestion(kind, list(transformers.CONFIG_MAPPING))}"
        )
    plain = transformers.AutoConfig.for_model(kind)
    for option in config:
        if not hasattr(plain, str(option)):  # which transformers would pass over
            hint = suggestion(str(option), list(plain.to_dict()))
            raise ValueError(f"model_options.config: {kind!r} has no {option!r}{hint}")
    try:
        return transformers.AutoConfig.for_model(kind, **config)
    except Exception as error:  # of whatever kind the library's checks raise
        raise ValueError(f"model_options.config: {_first_line(error)}") from error


def _first_line(error: Exception) -> str:
    text = str(error).strip() or type(error).__name__
    return " ".join(text.splitlines()[0].split()).rstrip(".:")
