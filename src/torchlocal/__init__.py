"""Train any network as gradient-isolated local modules, and reinstate the global objective periodically."""

from . import guidance, memory, parallel, rules
from .guidance import AlwaysGuidance, AnnealedGuidance, NeverGuidance, PeriodicGuidance, PhasedGuidance, RandomGuidance
from .network import DecoupledNetwork, decouple
from .parallel import ParallelNetwork, distribute
from .partition import Partition, Unit
from .plan import MemoryPlan, plan
from .rules import DGLRule, GreedyRule, Rule
from .steps import guided_step, local_step

__version__ = "0.1.0"

__all__ = [
    "AlwaysGuidance",
    "AnnealedGuidance",
    "DGLRule",
    "DecoupledNetwork",
    "GreedyRule",
    "MemoryPlan",
    "NeverGuidance",
    "ParallelNetwork",
    "Partition",
    "PeriodicGuidance",
    "PhasedGuidance",
    "RandomGuidance",
    "Rule",
    "Unit",
    "decouple",
    "distribute",
    "guidance",
    "guided_step",
    "local_step",
    "memory",
    "parallel",
    "plan",
    "rules",
]
