"""How much memory a step takes at its peak: measured while it runs, or predicted without running it.

Counted are the bytes of all tensors that are alive, at the moment when most are: parameters, gradients, optimizer
state, activations, temporaries. Not counted is the workspace that a kernel allocates inside itself, nor what an
allocator loses to fragments.
"""

from __future__ import annotations

import contextlib
import copy
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn
from torch._subclasses import FakeTensorMode  # the documented home of fake tensors; there is no public alias
from torch.utils._pytree import tree_iter, tree_map_only

from .counting import LABELS, FlopTotal, PeakCounter
from .rules import Batch, Rule, Site

if TYPE_CHECKING:
    from .network import DecoupledNetwork
    from .schedule import GuidedPlan

__all__ = ["LABELS", "Measurement", "PeakCounter", "Prediction", "measure", "predict"]


@dataclass(frozen=True, kw_only=True)
class Measurement:
    """Peak of one call, in bytes.

    Attributes:
        peak_bytes: beyond what was allocated when the call began.
        process_bytes: the largest part of the process that was in main memory during the call, workspace of the kernels
            and Python included; None where the system does not tell.
    """

    peak_bytes: int
    process_bytes: int | None = None


def measure(function: Callable[[], object], *, device: torch.device | str = "cpu") -> Measurement:
    """Run ``function`` once and measure the peak of the memory that it allocates.

    Args:
        function: what to run, for example one training step.
        device: on CUDA the caching allocator's own count is read, elsewhere tensors are counted at the dispatcher.

    Returns:
        The peak in bytes, beyond what was allocated before.
    """
    _reset_process_peak()
    if torch.device(device).type == "cuda":
        torch.cuda.synchronize(device)
        before = torch.cuda.memory_allocated(device)
        torch.cuda.reset_peak_memory_stats(device)
        function()
        torch.cuda.synchronize(device)
        peak = torch.cuda.max_memory_allocated(device) - before
    else:
        with PeakCounter() as counter:
            function()
        peak = counter.peak
    return Measurement(peak_bytes=peak, process_bytes=_process_peak())


def _reset_process_peak() -> None:
    with contextlib.suppress(OSError), open("/proc/self/clear_refs", "w") as file:  # Linux
        file.write("5")


def _process_peak() -> int | None:
    with contextlib.suppress(OSError), open("/proc/self/status") as file:
        return next((int(line.split()[1]) * 1024 for line in file if line.startswith("VmHWM")), None)
    return None


@dataclass(frozen=True, kw_only=True)
class Prediction:
    """What a step takes at its peak, in bytes.

    Attributes:
        peak_bytes: beyond what exists before the step; what :func:`measure` measures.
        resident_bytes: what exists before the step: parameters, buffers, optimizer state and the batch.
        breakdown: both together at the peak, by ``LABELS``: "parameters" (with buffers), "gradients", "optimizer",
            "boundaries" (the batch, and what one module or segment hands to the next), "auxiliary" (parameters,
            gradients and activations of the auxiliary networks), "activations" (the rest, gradients of activations
            among it). Workspace inside kernels is not included.
        flops: floating-point operations of the step (matrix products and convolutions).
    """

    peak_bytes: int
    resident_bytes: int
    breakdown: dict[str, int]
    flops: int

    @property
    def total_bytes(self) -> int:
        """Everything that is alive at the peak."""
        return self.resident_bytes + self.peak_bytes


def predict(
    net: DecoupledNetwork,
    x: Tensor | Sequence[int] | None = None,
    target: Any = None,
    *,
    step: str = "local",
    optimizer: Callable[[Iterable[nn.Parameter]], torch.optim.Optimizer] | None = None,
    **options: Any,
) -> Prediction:
    """Predict the peak of one training step: the step's own code runs on fake tensors, which have no memory.

    Neither the network nor any random generator is touched, and no GPU is needed: the counting is that of CPU kernels.

    Args:
        net: the decoupled network.
        x: a batch (N, ...), or its shape; by default the shape of the sample that the network was decoupled with.
        target: what the criterion takes; by default class indices (N,), or where the criterion refuses those, a tensor
            of the shape of the network's output.
        step: ``"local"``, ``"guided"``, or ``"plain"`` for an ordinary step of the backbone, without torchlocal.
        optimizer: makes the optimizer of given parameters, for example ``torch.optim.AdamW``; its state is counted, and
            so is its update after the step. By default neither is.
        options: those of the step, for example ``memory="exact"`` or ``autocast=torch.bfloat16``.

    Raises:
        ValueError: the step is unknown, or its options are; or the network does not run on such a batch.
    """
    if step not in ("local", "guided", "plain"):
        raise ValueError(f"step: must be 'local', 'guided' or 'plain', not {step!r}")
    fake = FakeStep(net, x, target)
    search = {name: value for name, value in options.items() if name in ("autocast", "recompute")}
    if step == "guided":  # plans are looked for outside of fake mode, and remembered by the network itself
        for name in ("auxiliary", "memory", "optimizers"):
            search |= {name: options[name]} if name in options else {}
        options |= {"memory": net.guided_plan(fake.x, target, **search), "recompute": None}
    elif step == "local" and options.get("recompute") is not None:
        options["recompute"] = net.local_plans(fake.x, target, **search)
    return fake.run(step, optimizer=optimizer, count_flops=True, **options)


class FakeStep:
    """A copy of a network and a batch, both without memory, to be stepped and counted.

    Args:
        net: the network, which is left alone.
        x: see :func:`predict`.
        target: see :func:`predict`.
    """

    def __init__(self, net: DecoupledNetwork, x: Tensor | Sequence[int] | None = None, target: Any = None) -> None:
        self.mode = FakeTensorMode(allow_non_fake_inputs=True)
        shape = net.input_shape if x is None else x.shape if isinstance(x, Tensor) else torch.Size(x)
        dtype = x.dtype if isinstance(x, Tensor) else next((p.dtype for p in net.parameters()), torch.float32)
        if len(shape) != len(net.input_shape) or min(shape) < 1:
            expected = ", ".join(str(n) for n in net.input_shape[1:])
            raise ValueError(f"x: must be a batch of shape (N, {expected}), or that shape, not {tuple(shape)}")
        with self.mode:
            self.net = self._copy(net)
            self.x = torch.empty(shape, dtype=dtype)
            if isinstance(x, Tensor) and x.shape == self.x.shape:
                self.x = torch.empty_strided(x.shape, x.stride(), dtype=dtype)
            self.target = self._target(target)

    def run(
        self,
        step: str,
        *,
        optimizer: Callable[[Iterable[nn.Parameter]], torch.optim.Optimizer] | None = None,
        optimizers: object = None,
        autocast: torch.dtype | None = None,
        backward: object = None,
        count_flops: bool = False,
        **options: Any,
    ) -> Prediction:
        """Step once, and count.

        Args:
            step: ``"local"``, ``"guided"`` or ``"plain"``.
            optimizer: see :func:`predict`.
            optimizers: not None: one for each local module is made by ``optimizer``; without that, gradients are freed
                as they would be then.
            autocast: the step's option.
            backward: of no effect.
            count_flops: whether FLOPs are counted, too.
            options: the step's options.
        """
        with self.mode, torch.random.fork_rng(devices=[]):
            net = self.net
            for parameter in net.parameters():
                parameter.grad = None
            groups = [list(net.parameters())] if optimizers is None else net.module_parameters()
            states = [_with_state(optimizer(group)) for group in groups] if optimizer is not None else []
            counter = PeakCounter(self._resident(states))
            flops, parts = FlopTotal(), 1.0
            with counter, flops if count_flops else contextlib.nullcontext(), self._labels(counter):
                if step == "plain":
                    self._plain(autocast)
                else:
                    run = net.local_step if step == "local" else net.guided_step
                    x, target = self.x, self.target
                    if step == "guided":
                        chosen = {name: options.pop(name, None) for name in ("memory", "recompute")}
                        plan = net.guided_plan(x, target, **chosen)
                        options["memory"], x, target = self._fewer_parts(plan, 1 if optimizers is None else 3)
                        parts = self.x.shape[0] / x.shape[0]
                        if plan.micro_batches > options["memory"].micro_batches == 1:
                            self._add_gradients(counter, auxiliary=options.get("auxiliary") != "frozen")
                    if optimizers is not None:
                        options["optimizers"] = states or [_Free(group) for group in groups]
                    run(x, target, autocast=autocast, **options)
                if optimizers is None and states:
                    with counter.labelling("optimizer"):
                        states[0].step()
        return Prediction(
            peak_bytes=counter.peak,
            resident_bytes=counter.resident,
            breakdown=counter.breakdown,
            flops=round(flops.total * parts),
        )

    def _fewer_parts(self, plan: GuidedPlan, most: int) -> tuple[GuidedPlan, Tensor, Any]:
        """The plan with at most so many micro-batches, and the part of the batch that these are.

        One does for all where the gradients of those before are there already; with an optimizer per module there are
        a first, some in the middle and a last one, after which gradients are freed.
        """
        num_examples = self.x.shape[0]
        rows = most * -(-num_examples // plan.micro_batches)
        if plan.micro_batches <= most or rows > num_examples:
            return plan, self.x, self.target

        def first(tensor: Tensor) -> Tensor:
            return tensor[:rows] if tensor.ndim and tensor.shape[0] == num_examples else tensor

        return replace(plan, micro_batches=most), first(self.x), tree_map_only(Tensor, first, self.target)

    def _add_gradients(self, counter: PeakCounter, *, auxiliary: bool) -> None:
        """Gradients as an earlier micro-batch leaves them."""
        chain = self.net.chain
        chain.refresh(self.x.device)
        used = chain.segment(0, chain.num_units).parameters()
        for label, parameters in (("gradients", used), ("auxiliary", self.net.auxiliary.parameters())):
            with counter.labelling(label):
                for parameter in parameters:
                    if parameter.requires_grad and (auxiliary or label == "gradients"):
                        parameter.grad = torch.empty_like(parameter)

    def _plain(self, autocast: torch.dtype | None) -> None:
        with contextlib.nullcontext() if autocast is None else torch.autocast(self.x.device.type, dtype=autocast):
            loss = self.net.criterion(self.net.backbone(self.x), self.target)
        loss.backward()

    def _resident(self, states: Sequence[torch.optim.Optimizer]) -> dict[str, list[Tensor]]:
        backbone, auxiliary = self.net.backbone, self.net.auxiliary
        return {
            "parameters": [*backbone.parameters(), *backbone.buffers()],
            "auxiliary": [*auxiliary.parameters(), *auxiliary.buffers()],
            "optimizer": [t for s in states for t in tree_iter(list(s.state.values())) if isinstance(t, Tensor)],
            "boundaries": [t for t in tree_iter((self.x, self.target)) if isinstance(t, Tensor)],
        }

    @staticmethod
    def _copy(net: DecoupledNetwork) -> DecoupledNetwork:
        copies: dict[int, Any] = {}
        for tensor in [*net.parameters(), *net.buffers()]:
            fake = torch.empty_strided(tensor.size(), tensor.stride(), dtype=tensor.dtype)
            is_parameter = isinstance(tensor, nn.Parameter)
            copies[id(tensor)] = nn.Parameter(fake, tensor.requires_grad) if is_parameter else fake
        copies[id(net._plans)] = {}
        fake_net = copy.deepcopy(net, copies)
        for module in fake_net.modules():
            module._compiled_call_impl = None  # what is compiled makes other tensors
        fake_net.chain.compiled = None
        return fake_net

    def _target(self, target: Any) -> Any:
        if target is not None:
            return tree_map_only(Tensor, lambda t: torch.empty_like(t, device="cpu"), target)
        with torch.no_grad(), torch.random.fork_rng(devices=[]):
            output = self.net.backbone(self.x)
            for guess in (torch.empty(output.shape[0], dtype=torch.int64), torch.empty_like(output)):
                try:
                    self.net.criterion(output, guess)
                    return guess
                except Exception as error:
                    reason = str(error).strip().split("\n")[0]
        raise ValueError(
            f"target: the criterion takes neither class indices (N,) nor a tensor like the output ({reason}); give one"
        )

    @contextlib.contextmanager
    def _labels(self, counter: PeakCounter) -> Iterator[None]:
        """Have the network tell the counter what it makes."""
        net, rule, chain = self.net, self.net.rule, self.net.chain

        def hook(label: str) -> Callable[[Tensor], None]:
            return lambda parameter: counter.relabel(parameter.grad, label) if parameter.grad is not None else None

        def run(first: int, last: int, state: list[Any]) -> tuple[Tensor]:
            (features,) = type(chain).run(chain, first, last, state)
            if last < chain.num_units:
                counter.relabel(features, "boundaries")
            return (features,)

        handles = [
            parameter.register_post_accumulate_grad_hook(hook(label))
            for label, module in (("gradients", net.backbone), ("auxiliary", net.auxiliary))
            for parameter in module.parameters()
            if parameter.requires_grad
        ]
        net.rule, chain.run = _LabellingRule(rule, counter), run  # type: ignore[method-assign]
        try:
            yield
        finally:
            net.rule = rule
            del chain.run
            for handle in handles:
                handle.remove()


class _LabellingRule(Rule):
    """A rule whose losses are counted as the auxiliary networks'."""

    def __init__(self, rule: Rule, counter: PeakCounter) -> None:
        self._rule, self._counter = rule, counter

    def loss(self, site: Site, auxiliary: nn.Module, features: Tensor, batch: Batch) -> Tensor:
        with self._counter.labelling("auxiliary"):
            return self._rule.loss(site, auxiliary, features, batch)


class _Free:
    """Stands in for an optimizer of which only the freeing of gradients counts."""

    def __init__(self, parameters: list[nn.Parameter]) -> None:
        self._parameters = parameters

    def step(self) -> None:
        """Nothing."""

    def zero_grad(self) -> None:
        """Free the gradients."""
        for parameter in self._parameters:
            parameter.grad = None


def _with_state(optimizer: torch.optim.Optimizer) -> torch.optim.Optimizer:
    """``optimizer`` with the state that it makes in its first step."""
    for group in optimizer.param_groups:
        for parameter in group["params"]:
            parameter.grad = torch.empty_like(parameter)
    optimizer.step()
    optimizer.zero_grad()
    return optimizer
