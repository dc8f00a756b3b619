"""Readers: every data set as uint8 images and int64 labels, checked, from its original files."""

from __future__ import annotations

import gzip
import os
import socket
import stat
import struct
import sys
import zlib
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from importlib import resources
from pathlib import Path
from typing import Any, BinaryIO, cast

import numpy as np
import torch
from torch import Tensor

from torchlocal.data.images import Augmentation
from torchlocal.data.splits import DIGITS_STREAM, make_generator

__all__ = ["READERS", "Images", "default_root", "read_idx"]


@dataclass(frozen=True)
class Images:
    """A data set in memory: official training and test images, and what the literature does with them.

    Args:
        train: images `(N, C, H, W)`, uint8, and labels `(N,)`, int64.
        test: the same of the test set.
        num_classes: number of classes.
        mean: per channel, on the scale 0..1, over the training images.
        std: per channel, on the scale 0..1, over the training images.
        augmentation: what the literature does to training images; None for nothing.
    """

    train: tuple[Tensor, Tensor]
    test: tuple[Tensor, Tensor]
    num_classes: int
    mean: tuple[float, ...]
    std: tuple[float, ...]
    augmentation: Augmentation | None


def default_root() -> Path:
    """Returns the folder that data sets are downloaded into."""
    return Path.home() / ".cache" / "torchlocal"


def _checked(images: Any, labels: Any, num_classes: int, what: str) -> tuple[Tensor, Tensor]:
    """Returns images and labels as tensors once they fit together."""
    # Copies: arrays over a file's bytes are read-only, which tensors cannot be.
    image_tensor = torch.from_numpy(_whole(images, np.uint8, f"{what} holds pixels"))
    label_tensor = torch.from_numpy(_whole(labels, np.int64, f"{what} holds labels").reshape(-1))
    if image_tensor.dim() != 4:
        raise ValueError(f"{what} holds images of shape {tuple(image_tensor.shape[1:])}: get the files anew")
    if len(image_tensor) != len(label_tensor):
        raise ValueError(f"{what} holds {len(image_tensor)} images but {len(label_tensor)} labels: get the files anew")
    if len(image_tensor) == 0:
        raise ValueError(f"{what} holds no images: get the files anew")
    low, high = int(label_tensor.min()), int(label_tensor.max())
    if low < 0 or high >= num_classes:
        wrong = low if low < 0 else high
        raise ValueError(f"{what} holds the label {wrong}, outside 0 to {num_classes - 1}: get the files anew")
    return image_tensor, label_tensor


def _whole(values: Any, kind: type[np.integer[Any]], what: str) -> np.ndarray:
    """Copies values into an array of integers of a kind that holds them all: numpy would wrap or cut them off."""
    given, limits = np.asarray(values), np.iinfo(kind)
    with np.errstate(invalid="ignore"):
        fits = given.dtype.kind in "biuf" and (given.dtype == kind or bool(np.all(given == given.astype(kind))))
    if not fits:
        raise ValueError(f"{what} that are not whole numbers from {limits.min} to {limits.max}: get the files anew")
    return np.array(given, dtype=kind, order="C")


# ---------------------------------------------------------------------------------------------- embedded and digits


def _read_fashion_mnist_small(root: Path | None, download: bool) -> Images:
    file = resources.files("torchlocal.data") / "fashion_mnist_small.npz"
    with file.open("rb") as stream, np.load(stream, allow_pickle=False) as arrays:
        train = _checked(arrays["train_images"][:, None], arrays["train_labels"], 10, "the embedded sample")
        test = _checked(arrays["test_images"][:, None], arrays["test_labels"], 10, "the embedded sample")
    # Nøkland & Eidnes pad the 28x28 images by 2 pixels, which is 1 pixel at half the resolution.
    augmentation = Augmentation(padding=1, flip=True)
    return Images(train, test, 10, (0.2866,), (0.3313,), augmentation)


def _read_digits(root: Path | None, download: bool) -> Images:
    from sklearn.datasets import load_digits

    digits = load_digits()
    # 17 grey levels (0..16); 15 is the largest whole factor that keeps them inside 8 bits.
    images, labels = _checked(digits.images[:, None] * 15, digits.target, 10, "scikit-learn's digits")
    # The file is ordered by writer; a fixed shuffle puts every writer into both splits.
    order = torch.randperm(len(images), generator=make_generator(DIGITS_STREAM))
    train, test = order[:1437], order[1437:]
    # A mirrored digit is another sign, and at 8x8 a shift by one pixel cuts strokes off: no augmentation.
    return Images((images[train], labels[train]), (images[test], labels[test]), 10, (0.2875,), (0.3539,), None)


# ---------------------------------------------------------------------------------------------------- Fashion-MNIST


def read_idx(path: str | os.PathLike[str]) -> np.ndarray:
    """Reads an IDX file of unsigned bytes, plain or gzipped (told by its content, not by its name).

    Args:
        path: the file; images have three dimensions, labels one.

    Returns:
        The array, uint8.

    Raises:
        ValueError: the file is missing, truncated, too long, or not such a file.
    """
    with _open_idx(path) as (file, shape):
        size = int(np.prod(shape, dtype=object))
        content = _read_up_to(file, size + 1)  # one more byte shows a file that is too long
    if len(content) != size:
        short = len(content) < size
        raise ValueError(_wrong_size(path, size, f"only {len(content)}" if short else "more", short))
    return np.frombuffer(content, dtype=np.uint8).reshape(shape)


def _read_idx_shape(path: Path) -> tuple[int, ...]:
    """Returns the shape that the header of an IDX file announces, without reading what follows."""
    with _open_idx(path) as (_, shape):
        return shape


@contextmanager
def _open_idx(path: str | os.PathLike[str]) -> Iterator[tuple[BinaryIO, tuple[int, ...]]]:
    """Opens an IDX file behind its header, which is believed only where the file can be as long as it says."""
    try:
        status = os.stat(path)
        if not stat.S_ISREG(status.st_mode):  # opening a fifo would wait for ever
            raise ValueError(f"{path} is no file: check the path")
        with open(path, "rb") as raw:
            zipped = raw.read(2) == b"\x1f\x8b"
        with gzip.open(path, "rb") if zipped else open(path, "rb") as file:
            magic = file.read(4)
            if len(magic) < 4 or magic[:3] != b"\0\0\x08" or not 1 <= magic[3] <= 4:
                raise ValueError(
                    f"{path} is not an IDX file of bytes (it begins with {magic.hex() or 'nothing'}): get it anew"
                )
            header = file.read(4 * magic[3])
            if len(header) < 4 * magic[3]:
                raise ValueError(f"{path} is truncated (it ends inside its header): get it anew")
            shape = struct.unpack(f">{magic[3]}I", header)
            size = int(np.prod(shape, dtype=object))
            most = _MOST_PER_BYTE * status.st_size if zipped else status.st_size - len(magic) - len(header)
            if most < size:
                raise ValueError(_wrong_size(path, size, f"{'at most' if zipped else 'only'} {most}", True))
            yield cast(BinaryIO, file), shape
    except (EOFError, zlib.error, gzip.BadGzipFile) as error:
        raise ValueError(f"{path} is a damaged or truncated gzip file ({error}): get it anew") from error
    except OSError as error:
        raise ValueError(f"{path} cannot be read ({error.strerror or error}): check the path") from error


_MOST_PER_BYTE = 1032  # bytes that a byte of a gzip file can stand for (zlib's technical notes)


def _wrong_size(path: str | os.PathLike[str], size: int, found: str, short: bool) -> str:
    return (
        f"{path} is {'truncated' if short else 'too long'} (its header announces {size} bytes of data, "
        f"there are {found}): get it anew"
    )


def _read_up_to(file: BinaryIO, size: int) -> bytearray:
    """Reads at most `size` bytes, piece by piece: a damaged header must not reserve terabytes."""
    content = bytearray()
    while len(content) < size and (piece := file.read(min(size - len(content), 1 << 24))):
        content += piece
    return content


_IDX_NAMES = ("train-images-idx3-ubyte", "train-labels-idx1-ubyte", "t10k-images-idx3-ubyte", "t10k-labels-idx1-ubyte")


def _find_idx(root: Path) -> list[Path] | None:
    """Returns the four files, or None when there is none of them.

    Raises:
        ValueError: some are there and some are missing.
    """
    for folder in (root, root / "FashionMNIST" / "raw"):
        found = [next((p for p in (folder / n, folder / f"{n}.gz") if p.is_file()), None) for n in _IDX_NAMES]
        if all(found):
            return [path for path in found if path is not None]
        if any(found):
            missing = ", ".join(n for n, path in zip(_IDX_NAMES, found, strict=True) if path is None)
            raise ValueError(f"{folder} lacks {missing} (plain or .gz): put the missing files there")
    return None


def _check_idx_headers(paths: list[Path]) -> None:
    """Refuse files that are not those of Fashion-MNIST by what their headers announce, before reading what follows."""
    shapes = [_read_idx_shape(path) for path in paths]
    for path, shape, dimensions in zip(paths, shapes, (3, 1, 3, 1), strict=True):
        if len(shape) != dimensions:
            kind = "images (3 dimensions)" if dimensions == 3 else "labels (1 dimension)"
            raise ValueError(f"{path} holds an array of shape {shape}, not {kind}: get it anew")
    if shapes[0][1:] != shapes[2][1:]:
        raise ValueError(f"{paths[0]} and {paths[2]} hold images of different sizes: get them anew")
    for part in (0, 2):
        count, height, width = shapes[part]
        if count != shapes[part + 1][0]:
            what = f"{paths[part]} with {paths[part + 1].name}"
            raise ValueError(f"{what} holds {count} images but {shapes[part + 1][0]} labels: get the files anew")
        if (height, width) != (28, 28) or count > 70_000:  # 70,000: both parts together
            raise ValueError(
                f"{paths[part]} announces {count} images of {height}x{width} pixels, and fashion-mnist has at most "
                "70,000 of 28x28: get it anew, or give your own images as data='folder'"
            )


def _read_fashion_mnist(root: Path | None, download: bool) -> Images:
    root = root or default_root()
    paths = _find_idx(root)
    if paths is None:
        from torchvision.datasets import FashionMNIST

        remedy = f"put the four files {_IDX_NAMES[0]} ... {_IDX_NAMES[3]} (plain or .gz) into {root}"
        with _one_sentence("fashion-mnist", root, download, remedy):
            FashionMNIST(str(root), train=True, download=True)
        paths = _find_idx(root)
        assert paths is not None
    _check_idx_headers(paths)
    arrays = [read_idx(path) for path in paths]
    train = _checked(arrays[0][:, None], arrays[1], 10, f"{paths[0]} with {paths[1].name}")
    test = _checked(arrays[2][:, None], arrays[3], 10, f"{paths[2]} with {paths[3].name}")
    # Crop and mirror as Nøkland & Eidnes 2019 (their code: RandomCrop(28, padding=2), RandomHorizontalFlip).
    return Images(train, test, 10, (0.2860,), (0.3530,), Augmentation(padding=2, flip=True))


# ------------------------------------------------------------------------------------------------------ torchvision


@contextmanager
def _one_sentence(name: str, root: Path, download: bool, remedy: str) -> Iterator[None]:
    """Turns whatever goes wrong while torchvision downloads or opens files into one sentence with a remedy."""
    if not download:
        raise ValueError(f"{name} is not (intact) in {root} and download is off: {remedy}")
    timeout = socket.getdefaulttimeout()
    socket.setdefaulttimeout(30)  # torchvision sets none and would wait for ever
    try:
        print(f"{name} is not (intact) in {root}: downloading it", file=sys.stderr)
        yield
    except (RuntimeError, OSError, EOFError, ValueError) as error:
        reason = " ".join(str(error).split()) or type(error).__name__
        raise ValueError(f"{name} is not (intact) in {root} and cannot be downloaded ({reason}): {remedy}") from error
    finally:
        socket.setdefaulttimeout(timeout)


def _open_torchvision(
    name: str, make: Callable[..., Any], root: Path, download: bool, remedy: str, **options: Any
) -> Any:
    """Opens one part of a torchvision data set, downloading it if it is absent or its checksum is wrong."""
    try:
        return make(str(root), download=False, **options)
    except RuntimeError:  # absent, incomplete, or with a wrong md5 sum
        pass
    except (OSError, EOFError, ValueError, KeyError) as error:
        raise ValueError(f"{name} in {root} cannot be read ({error}): {remedy}") from error
    with _one_sentence(name, root, download, remedy):
        return make(str(root), download=True, **options)


def _inside(root: Path | None, folder: str) -> Path:
    """Returns the folder torchvision wants, also when the user names the data set's own folder."""
    root = root or default_root()
    return root.parent if root.name == folder and root.is_dir() else root


def _read_cifar(root: Path | None, download: bool, name: str, num_classes: int) -> Images:
    from torchvision.datasets import CIFAR10, CIFAR100

    kind = CIFAR10 if name == "cifar10" else CIFAR100
    root = _inside(root, kind.base_folder)
    remedy = f"put {kind.url} into {root} (torchvision unpacks it), or its folder {kind.base_folder}"
    # The official files are pickles, which could run code; torchvision opens them only if their md5 sums are right.
    train = _open_torchvision(name, kind, root, download, remedy, train=True)
    test = _open_torchvision(name, kind, root, download, remedy, train=False)
    if name == "cifar10":
        mean, std = (0.4914, 0.4822, 0.4465), (0.2470, 0.2435, 0.2616)
    else:
        mean, std = (0.5071, 0.4865, 0.4409), (0.2673, 0.2564, 0.2762)
    return Images(
        _checked(train.data.transpose(0, 3, 1, 2), train.targets, num_classes, f"{name} (training) in {root}"),
        _checked(test.data.transpose(0, 3, 1, 2), test.targets, num_classes, f"{name} (test) in {root}"),
        num_classes,
        mean,
        std,
        # 4 pixels and mirroring: He et al. 2016; reflected instead of black borders: InfoPro (Wang et al. 2021).
        Augmentation(padding=4, mode="reflect", flip=True),
    )


def _read_svhn(root: Path | None, download: bool) -> Images:
    from torchvision.datasets import SVHN

    root = root or default_root()
    parts = []
    for split in ("train", "test"):
        url, file = SVHN.split_list[split][:2]
        data = _open_torchvision("svhn", SVHN, root, download, f"put {url} into {root} as {file}", split=split)
        parts.append(_checked(data.data, data.labels, 10, f"{root / file}"))
    # InfoPro (Wang et al. 2021): crop after padding by 2, no mirroring, for digits are not symmetric.
    augmentation = Augmentation(padding=2)
    return Images(parts[0], parts[1], 10, (0.4377, 0.4438, 0.4728), (0.1980, 0.2010, 0.1970), augmentation)


def _read_stl10(root: Path | None, download: bool) -> Images:
    from torchvision.datasets import STL10

    class LabelledSTL10(STL10):
        # Only labelled images are used: without this torchvision wants, and hashes, 2.8 GB of unlabelled ones too.
        train_list = STL10.train_list[:2]

    root = _inside(root, STL10.base_folder)
    remedy = f"put {STL10.url} into {root} (torchvision unpacks it), or its folder {STL10.base_folder}"
    parts = []
    for split in ("train", "test"):
        data = _open_torchvision("stl10", LabelledSTL10, root, download, remedy, split=split)
        parts.append(_checked(data.data, data.labels, 10, f"stl10 ({split}) in {root}"))
    # InfoPro (Wang et al. 2021): RandomCrop(96, padding=4), RandomHorizontalFlip.
    augmentation = Augmentation(padding=4, flip=True)
    return Images(parts[0], parts[1], 10, (0.4467, 0.4398, 0.4066), (0.2603, 0.2566, 0.2713), augmentation)


READERS: dict[str, Callable[[Path | None, bool], Images]] = {
    "fashion-mnist-small": _read_fashion_mnist_small,
    "digits": _read_digits,
    "fashion-mnist": _read_fashion_mnist,
    "cifar10": lambda root, download: _read_cifar(root, download, "cifar10", 10),
    "cifar100": lambda root, download: _read_cifar(root, download, "cifar100", 100),
    "svhn": _read_svhn,
    "stl10": _read_stl10,
}
