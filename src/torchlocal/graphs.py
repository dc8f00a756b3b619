"""Steps as CUDA graphs: what a small network loses on a GPU is time in Python, and a graph has none.

A local step launches the kernels of all auxiliary networks beside those of the network, and each module goes backward
by itself; on networks whose kernels are short the device waits for Python. A captured step launches all of it at once.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_flatten, tree_map_only

from .cut.batches import Batch, describe, device_of
from .modules import LocalModules
from .recompute import RandomState

__all__ = ["CapturedStep", "capture"]

_WARM_UP = 3  # steps before the capture, in which kernels are chosen and plans are found


def capture(
    step: Callable[..., list[Tensor]],
    batch: Batch,
    target: Any = None,
    *,
    share: CapturedStep | None = None,
    **options: Any,
) -> CapturedStep:
    """Record a step as a CUDA graph, to be called with batches of the same layout.

    The step is taken a few times on ``batch``; buffers, gradients and random generators are put back. What Python does
    in it is done now, and never again: hooks, branches and attributes stay as they are, also ``train()``.

    Args:
        step: a method of a decoupled network: ``net.local_step`` or ``net.guided_step``.
        batch: a batch of the size of those that will come, on the device of the network.
        target: its target.
        share: another captured step, whose memory is used by this one, too; what either returns and leaves in ``.grad``
            is then good until the other is called.
        options: those of the step, but ``optimizers``.

    Returns:
        What takes the step: ``captured(batch, target)`` copies both, and returns the losses; they are overwritten by
        the next call. Gradients are left in ``.grad``; they replace what is there, so nothing accumulates.

    Raises:
        ValueError: the network is not on a CUDA device, or assigns buffers; ``optimizers`` is given; or a step that
            recomputes draws random numbers, which a graph cannot draw again.
    """
    net = getattr(step, "__self__", None)
    if not isinstance(net, LocalModules):
        raise ValueError("capture: step must be local_step or guided_step of a decoupled network")
    device = device_of(batch, net.backbone)
    if device.type != "cuda":
        raise ValueError(f"capture: a CUDA graph needs a CUDA device, and the network is on {device.type!r}")
    assigned = [name for _, name, is_buffer in net.chain.facts.changes if is_buffer]
    if assigned:
        raise ValueError(
            f"capture: the forward assigns its buffer {assigned[0]!r} instead of writing into it, which a CUDA graph "
            "would do once only; change it in place, or take the step itself"
        )
    if options.get("optimizers") is not None:
        raise ValueError("capture: optimizers cannot be given, since they would step while it is recorded; step after")
    return CapturedStep(net, step, batch, target, device, share, options)


class CapturedStep:
    """A recorded step; made by :func:`capture`."""

    def __init__(
        self,
        net: LocalModules,
        step: Callable[..., list[Tensor]],
        batch: Batch,
        target: Any,
        device: torch.device,
        share: CapturedStep | None,
        options: dict[str, Any],
    ) -> None:
        self._batch, self._target = (tree_map_only(Tensor, torch.clone, value) for value in (batch, target))
        self._given = self._layout(self._batch, self._target)
        self._graph = torch.cuda.CUDAGraph()

        def learn() -> list[Tensor]:
            return step(self._batch, self._target, **options)

        with torch.cuda.device(device), _put_back(net, device):
            stream = torch.cuda.Stream()
            stream.wait_stream(torch.cuda.current_stream())
            with torch.cuda.stream(stream):
                for _ in range(_WARM_UP):
                    net.zero_grad()
                    before = torch.cuda.get_rng_state(device)
                    learn()
                drawn = not torch.equal(before, torch.cuda.get_rng_state(device))
            torch.cuda.current_stream().wait_stream(stream)
            if drawn and any(options.get(name) not in (None, "full") for name in ("memory", "recompute")):
                raise ValueError(
                    "capture: the step recomputes, and random numbers are drawn in it (dropout), which a CUDA graph "
                    "cannot draw again; leave memory and recompute out, or dropout"
                )
            net.zero_grad()
            pool = None if share is None else share._graph.pool()
            with torch.cuda.graph(self._graph, pool=pool):
                self._losses = learn()
            self._gradients = [(parameter, parameter.grad) for parameter in net.parameters()]

    @staticmethod
    def _layout(batch: Any, target: Any) -> Any:
        leaves, structure = tree_flatten((batch, target))
        return [leaf.shape if isinstance(leaf, Tensor) else leaf for leaf in leaves], structure

    def __call__(self, batch: Batch, target: Any = None) -> list[Tensor]:
        """Take the step on another batch.

        Args:
            batch: of the sizes that were recorded.
            target: likewise.

        Raises:
            ValueError: a size differs.
        """
        if self._layout(batch, target) != self._given:
            raise ValueError(
                f"batch: {describe(batch)} does not fit; the step was captured with {describe(self._batch)}, and a "
                "graph takes batches of that size only; take the step itself for others"
            )
        fixed = tree_flatten((self._batch, self._target))[0]
        for own, given in zip(fixed, tree_flatten((batch, target))[0], strict=True):
            if isinstance(own, Tensor) and own is not given:
                own.copy_(given, non_blocking=True)
        for parameter, gradient in self._gradients:
            parameter.grad = gradient
        self._graph.replay()
        return list(self._losses)


@contextmanager
def _put_back(net: nn.Module, device: torch.device) -> Iterator[None]:
    """Have buffers, gradients and random generators be what they were before."""
    state = RandomState.get(device)
    buffers = [(buffer, buffer.clone()) for buffer in net.buffers()]
    gradients = [(p, p.grad) for p in net.parameters()]
    try:
        yield
    finally:
        with torch.no_grad():
            for buffer, kept in buffers:
                buffer.copy_(kept)
        for parameter, gradient in gradients:
            parameter.grad = gradient
        state.set()
