"""Plans: which parts of a chain of stages run twice, so that fewer activations are alive at a time.

A plan is a tree. Any tree gives the same gradients, buffers and random numbers, bit for bit; they differ in what is
alive at a time and in how often a stage runs forward (Beaumont et al., "Optimal checkpointing for heterogeneous chains:
how to train deep neural networks with limited memory", 2019).
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TypeAlias

__all__ = ["Again", "GuidedPlan", "Inner", "Keep", "Plan", "Tape", "in_segments", "leaves", "recomputes"]


@dataclass(frozen=True)
class Tape:
    """Stages ``first`` to ``last - 1`` run forward with their graph, then backward."""

    first: int
    last: int


@dataclass(frozen=True)
class Inner:
    """Stage ``first`` is a chain itself, and runs by a plan of its own."""

    first: int
    plan: Plan

    @property
    def last(self) -> int:
        """The stage after it."""
        return self.first + 1


@dataclass(frozen=True)
class _Pair:
    """Two plans, one after the other."""

    left: Plan
    right: Plan

    @property
    def first(self) -> int:
        """First stage."""
        return self.left.first

    @property
    def last(self) -> int:
        """Stage after the last."""
        return self.right.last


@dataclass(frozen=True)
class Keep(_Pair):
    """``left`` runs forward with its graph, which is kept while ``right`` runs forward and backward."""

    left: Tape


@dataclass(frozen=True)
class Again(_Pair):
    """``left`` runs forward without a graph; then ``right``, forward and backward; then ``left`` again by its plan."""


Plan: TypeAlias = Tape | Inner | Keep | Again


def in_segments(segments: list[range]) -> Plan:
    """The plan that keeps the input of each segment and runs all but the last one twice."""
    plan: Plan = Tape(segments[-1].start, segments[-1].stop)
    for segment in reversed(segments[:-1]):
        plan = Again(Tape(segment.start, segment.stop), plan)
    return plan


def leaves(plan: Plan) -> list[Tape | Inner]:
    """The parts of a plan that run with a graph, in the order of their stages."""
    return [plan] if isinstance(plan, Tape | Inner) else [*leaves(plan.left), *leaves(plan.right)]


def recomputes(plan: Plan) -> bool:
    """Whether a plan runs anything twice."""
    return recomputes(plan.right) if isinstance(plan, Keep) else not isinstance(plan, Tape)


@dataclass(frozen=True, kw_only=True)
class GuidedPlan:
    """How a guided step runs.

    Attributes:
        tree: what is recomputed.
        micro_batches: in how many parts the batch is cut.
        peak_bytes: predicted peak; None where it was not asked for.
        recomputed: FLOPs that are recomputed, as a share of one forward pass of the backbone.
    """

    tree: Plan
    micro_batches: int = 1
    peak_bytes: int | None = None
    recomputed: float = 0.0

    @property
    def bytes(self) -> int:
        """The predicted peak of a plan that a search has found."""
        assert self.peak_bytes is not None
        return self.peak_bytes
