"""Data sets by name or from folders, split and augmented."""

from .named import DataBundle, Split, data_names, load_data

__all__ = ["DataBundle", "Split", "data_names", "load_data"]
