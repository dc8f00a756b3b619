"""Data sets by name or from folders, split and augmented; text as tokens; and loaders of the user's own."""

from .bundles import DataBundle, TextBundle
from .corpora import write_tokens
from .loaders import LoaderBundle, bundle
from .named import data_names, load_data
from .splits import Split

__all__ = [
    "DataBundle",
    "LoaderBundle",
    "Split",
    "TextBundle",
    "bundle",
    "data_names",
    "load_data",
    "write_tokens",
]
