"""Rebuilds the embedded sample from the original Fashion-MNIST files.

The first 10,000 training and the first 2,000 test images, each 2x2 pixels averaged into one (14x14, 8 bit, halves
rounded up), with their labels, as one compressed .npz file. The same files give the same bytes:

    python scripts/build_sample.py FOLDER             # writes src/torchlocal/data/fashion_mnist_small.npz
    python scripts/build_sample.py FOLDER --check     # compares with it and writes nothing

FOLDER holds train-images-idx3-ubyte, train-labels-idx1-ubyte, t10k-images-idx3-ubyte and t10k-labels-idx1-ubyte, plain
or gzipped (https://github.com/zalandoresearch/fashion-mnist, MIT licence, Zalando SE).
"""

from __future__ import annotations

import argparse
import os
import sys
from pathlib import Path

import numpy as np

SOURCE = Path(__file__).resolve().parents[1] / "src"
sys.path.insert(0, str(SOURCE))

from torchlocal.data.sources import read_idx  # noqa: E402

TARGET = SOURCE / "torchlocal" / "data" / "fashion_mnist_small.npz"


def halve(images: np.ndarray) -> np.ndarray:
    """Averages 2x2 pixels: `(N, 2H, 2W)` uint8 to `(N, H, W)` uint8, halves rounded up."""
    count, height, width = images.shape
    blocks = images.reshape(count, height // 2, 2, width // 2, 2).astype(np.uint16)
    return ((blocks.sum(axis=(2, 4)) + 2) // 4).astype(np.uint8)


def build(folder: Path) -> dict[str, np.ndarray]:
    """Reads the original files and returns the arrays of the sample."""
    arrays = {}
    for part, prefix, count in (("train", "train", 10_000), ("test", "t10k", 2_000)):
        for kind, suffix in (("images", "images-idx3-ubyte"), ("labels", "labels-idx1-ubyte")):
            path = folder / f"{prefix}-{suffix}"
            array = read_idx(path if path.is_file() else path.with_name(f"{path.name}.gz"))[:count]
            if len(array) < count:
                raise ValueError(f"{path} holds {len(array)} {kind}, but {count} are needed: give the original files")
            arrays[f"{part}_{kind}"] = halve(array) if kind == "images" else array
    return arrays


def main() -> int:
    """Builds or checks the sample."""
    assert __doc__ is not None
    summary, _, details = __doc__.partition("\n")
    parser = argparse.ArgumentParser(
        description=summary, epilog=details, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("folder", type=Path, help="folder of the four original IDX files")
    parser.add_argument("--out", type=Path, default=TARGET, help="file to write or to check")
    parser.add_argument("--check", action="store_true", help="compare with the file instead of writing it")
    options = parser.parse_args()
    try:
        arrays = build(options.folder)
    except ValueError as error:
        parser.exit(1, f"{error}\n")
    if options.check:
        with np.load(options.out, allow_pickle=False) as stored:
            same = set(stored) == set(arrays) and all(np.array_equal(stored[key], arrays[key]) for key in arrays)
        print(f"{options.out} {'holds the sample' if same else 'differs from the sample'}")
        return 0 if same else 1
    partial = options.out.with_suffix(".partial")
    with open(partial, "wb") as file:
        np.savez_compressed(file, allow_pickle=False, **arrays)
    os.replace(partial, options.out)
    print(f"{options.out}: {options.out.stat().st_size} bytes")
    return 0


if __name__ == "__main__":
    sys.exit(main())
