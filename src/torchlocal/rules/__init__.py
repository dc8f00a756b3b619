"""Local rules: from what each local module learns. One paper, one file."""

from __future__ import annotations

from .auglocal import AugLocalRule
from .base import Batch, Rule, Site
from .dense import dense
from .downstream import Downstream
from .greedy import AUXILIARY_NETWORKS, DGLRule, GreedyRule
from .infopro import InfoProRule, published_weights
from .lopt import LoptRule
from .man import ManRule
from .names import RULES, make_rule
from .predsim import PredSimRule
from .solo import SoloRule

__all__ = [
    "AUXILIARY_NETWORKS",
    "RULES",
    "AugLocalRule",
    "Batch",
    "DGLRule",
    "Downstream",
    "GreedyRule",
    "InfoProRule",
    "LoptRule",
    "ManRule",
    "PredSimRule",
    "Rule",
    "Site",
    "SoloRule",
    "dense",
    "make_rule",
    "published_weights",
]

RULES.update(
    {
        "greedy": GreedyRule,
        "dgl": DGLRule,
        "predsim": PredSimRule,
        "infopro": InfoProRule,
        "auglocal": AugLocalRule,
        "man": ManRule,
        "solo": SoloRule,
        "lopt": LoptRule,
    }
)
