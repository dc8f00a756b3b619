"""Networks by name: the field's small networks for images, a decoder for text, and those of other libraries."""

from .gpt import GPT, SIZES
from .images import CifarResNet, LocalVGG, build_model, mlp, model_names
from .language import build_language_model

__all__ = ["GPT", "SIZES", "CifarResNet", "LocalVGG", "build_language_model", "build_model", "mlp", "model_names"]
