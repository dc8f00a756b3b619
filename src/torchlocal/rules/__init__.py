"""Local rules: from what each local module learns. One paper, one file."""

from .base import Batch, Rule, Site
from .greedy import AUXILIARY_NETWORKS, GreedyRule

__all__ = ["AUXILIARY_NETWORKS", "RULES", "Batch", "GreedyRule", "Rule", "Site"]

RULES: dict[str, type[Rule]] = {"greedy": GreedyRule}
