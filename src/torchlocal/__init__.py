"""Train any network as gradient-isolated local modules, and reinstate the global objective periodically."""

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from . import guidance, memory, parallel, rules
    from .budget import MemoryPlan, plan
    from .cut.units import Partition, Unit
    from .graphs import capture
    from .guidance import (
        AlwaysGuidance,
        AnnealedGuidance,
        NeverGuidance,
        PeriodicGuidance,
        PhasedGuidance,
        RandomGuidance,
    )
    from .network import DecoupledNetwork, decouple
    from .parallel import ParallelNetwork, distribute
    from .rules import DGLRule, GreedyRule, Rule
    from .run.callbacks import Callback
    from .run.config import FitConfig, GuidanceConfig
    from .run.evaluation import evaluate
    from .run.trainer import fit
    from .steps import guided_step, local_step

__version__ = "0.1.0"

__all__ = [
    "AlwaysGuidance",
    "AnnealedGuidance",
    "Callback",
    "DGLRule",
    "DecoupledNetwork",
    "FitConfig",
    "GreedyRule",
    "GuidanceConfig",
    "MemoryPlan",
    "NeverGuidance",
    "ParallelNetwork",
    "Partition",
    "PeriodicGuidance",
    "PhasedGuidance",
    "RandomGuidance",
    "Rule",
    "Unit",
    "capture",
    "decouple",
    "distribute",
    "evaluate",
    "fit",
    "guidance",
    "guided_step",
    "local_step",
    "memory",
    "parallel",
    "plan",
    "rules",
]

# Public names are imported when they are first asked for, so that the command answers without loading torch.
_MODULES = {
    "guidance": (
        "AlwaysGuidance",
        "AnnealedGuidance",
        "NeverGuidance",
        "PeriodicGuidance",
        "PhasedGuidance",
        "RandomGuidance",
    ),
    "network": ("DecoupledNetwork", "decouple"),
    "parallel": ("ParallelNetwork", "distribute"),
    "budget": ("MemoryPlan", "plan"),
    "graphs": ("capture",),
    "cut.units": ("Partition", "Unit"),
    "rules": ("DGLRule", "GreedyRule", "Rule"),
    "run.callbacks": ("Callback",),
    "run.config": ("FitConfig", "GuidanceConfig"),
    "run.evaluation": ("evaluate",),
    "run.trainer": ("fit",),
    "steps": ("guided_step", "local_step"),
}
_HOMES = {name: module for module, names in _MODULES.items() for name in names}

if not TYPE_CHECKING:  # a type checker would take it for a promise that every name exists

    def __getattr__(name: str) -> Any:
        if name in _HOMES:
            value = getattr(import_module(f"{__name__}.{_HOMES[name]}"), name)
        elif name in __all__:
            value = import_module(f"{__name__}.{name}")
        else:
            raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
        globals()[name] = value
        return value

    def __dir__() -> list[str]:
        return sorted({*globals(), *__all__})
