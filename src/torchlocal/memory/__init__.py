"""How much memory a step takes at its peak, measured or predicted, and the search for steps that take less.

Counted are the bytes of all tensors that are alive, at the moment when most are: parameters, gradients, optimizer
state, activations, temporaries. Not counted is the workspace that a kernel allocates inside itself, nor what an
allocator loses to fragments.
"""

from .counter import LABELS, PeakCounter
from .fakes import Prediction
from .measurement import Measurement, measure
from .prediction import predict

__all__ = ["LABELS", "Measurement", "PeakCounter", "Prediction", "measure", "predict"]
