"""Data sets by name or from folders, split and augmented; and loaders of the user's own."""

from .loaders import LoaderBundle, bundle
from .named import DataBundle, Split, data_names, load_data

__all__ = ["DataBundle", "LoaderBundle", "Split", "bundle", "data_names", "load_data"]
