"""Running part of a network forward and backward while keeping few activations: plans, what carries them out, and a
solver that finds the cheapest for a given memory."""

from .plan import Again, GuidedPlan, Inner, Keep, Plan, Tape, in_segments, leaves
from .run import Recomputation, Replaying, Stages
from .state import (
    RandomState,
    Replay,
    by_itself,
    held,
    keeping_nothing,
    put_aside,
    started_from,
    undisturbed,
    without_autocast,
)

__all__ = [
    "Again",
    "GuidedPlan",
    "Inner",
    "Keep",
    "Plan",
    "RandomState",
    "Recomputation",
    "Replay",
    "Replaying",
    "Stages",
    "Tape",
    "by_itself",
    "held",
    "in_segments",
    "keeping_nothing",
    "leaves",
    "put_aside",
    "started_from",
    "undisturbed",
    "without_autocast",
]
