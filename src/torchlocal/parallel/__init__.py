"""Local modules on several processes and machines, started with torchrun, bit for bit as on one."""

from .channels import PeerLost
from .network import ParallelNetwork
from .rehearsal import measure_seconds
from .setup import assign, check_same, distribute, round_boundaries

__all__ = ["ParallelNetwork", "PeerLost", "assign", "check_same", "distribute", "measure_seconds", "round_boundaries"]
