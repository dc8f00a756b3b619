"""Standing between a module and whoever calls it."""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager, nullcontext
from typing import Any

import torch
from torch import nn

__all__ = ["around", "eagerly"]

Original = Callable[..., Any]
Handler = Callable[[Original, tuple[Any, ...], dict[str, Any]], Any]

# [Note: why not forward hooks]
# A forward hook runs inside of the module's call. Where the call is compiled, hooks that come later are silently left
# out; where a library wraps the call in a checkpoint, they run inside of that, and again in backward; and a stand-in
# for a module must not run the user's hooks at all. What a module looks for first when it is called is the attribute
# that ``Module.compile`` sets, ``_compiled_call_impl``: whatever is there replaces all of the call. It is set here for
# the length of a step, and put back after it.


@contextmanager
def around(modules: Iterable[tuple[nn.Module, Handler]]) -> Iterator[None]:
    """Have every call of these modules go to a handler, ``handler(original, args, kwargs)``, for a while.

    Args:
        modules: each with its handler, which returns what the caller gets; ``original`` is the call as it would be.
    """
    kept: list[tuple[dict[str, Any], str, bool, Any]] = []

    def put(module: nn.Module, name: str, value: Any) -> None:
        own = module.__dict__
        kept.append((own, name, name in own, own.get(name)))
        own[name] = value

    try:
        for module, handler in modules:
            if _is_checkpointed(module):
                # The library's layer calls this with its own call, to be run inside of a checkpoint: stay outside.
                put(module, "_gradient_checkpointing_func", _outside(module._gradient_checkpointing_func, handler))
            else:
                put(module, "_compiled_call_impl", _replaced(module._compiled_call_impl or module._call_impl, handler))
        yield
    finally:
        for own, name, was_there, value in reversed(kept):
            if was_there:
                own[name] = value
            else:
                own.pop(name, None)


def _replaced(original: Original, handler: Handler) -> Original:
    return lambda *args, **kwargs: handler(original, args, kwargs)


def _outside(checkpoint: Any, handler: Handler) -> Original:
    return lambda function, *args, **kwargs: handler(lambda *a, **k: checkpoint(function, *a, **k), args, kwargs)


def _is_checkpointed(module: nn.Module) -> bool:
    """Whether a transformers layer will run itself inside of a checkpoint."""
    return (
        module.training
        and getattr(module, "gradient_checkpointing", False) is True
        and type(module).__call__ is not nn.Module.__call__
        and callable(getattr(module, "_gradient_checkpointing_func", None))
    )


@contextmanager
def eagerly(model: nn.Module) -> Iterator[None]:
    """Run everything that is compiled as it was before, for a while: cuts and fake tensors want Python to run."""
    kept = [(m, m.__dict__.pop("_compiled_call_impl")) for m in model.modules() if "_compiled_call_impl" in m.__dict__]
    try:
        compiled = "torch._dynamo" in sys.modules  # which takes seconds to import, and is, where something is compiled
        with torch.compiler.set_stance("force_eager") if compiled else nullcontext():
            yield
    finally:
        for module, compiled in kept:
            module.__dict__["_compiled_call_impl"] = compiled
