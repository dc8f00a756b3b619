"""Data sets by name, with the literature's augmentation and a validation split taken from the training images."""

from __future__ import annotations

import os
import zlib
from collections.abc import Iterable
from pathlib import Path

import torch
from torch import Tensor

from torchlocal.checks import whole
from torchlocal.data.bundles import DataBundle
from torchlocal.data.folders import read_folders
from torchlocal.data.images import MemorySource
from torchlocal.data.sources import READERS, default_root
from torchlocal.data.splits import FOLDER_STREAM, VALIDATION_STREAM, FolderSource, Split, make_generator
from torchlocal.data.text import load_text
from torchlocal.names import TEXT, unknown_data

__all__ = ["data_names", "load_data"]

_LONGEST_SIDE = 16_384  # of the images of a folder: a batch of one would take 3 GiB
_IMAGENET_MEAN, _IMAGENET_STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)


def data_names() -> list[str]:
    """Returns the names `load_data` knows; each can also be given as `pairs:NAME`."""
    return [*READERS, "folder"]


def load_data(
    name: str = "fashion-mnist-small",
    *,
    root: str | os.PathLike[str] | None = None,
    num_train: int | None = None,
    num_validation: int | None = None,
    augment: bool = True,
    download: bool = True,
    seed: int = 0,
    image_size: int | tuple[int, int] | None = None,
    num_workers: int | None = None,
    context: int | None = None,
    tokenizer: str | os.PathLike[str] | None = None,
    epoch_rows: int | None = None,
) -> DataBundle:
    """Loads a data set by name.

    Names: `fashion-mnist-small` (embedded, 14x14), `digits` (scikit-learn, 8x8), `fashion-mnist`, `cifar10`,
    `cifar100`, `svhn`, `stl10`, `folder` (class folders in ImageNet layout), and `pairs:NAME`: two images of NAME side
    by side, labelled with the sum of their classes modulo the number of classes. The partners of training images are
    redrawn every epoch, those of validation and test images are fixed.

    The images of a `folder` are brought to RGB of 8 bits: 16-bit values from their full range, floating-point values
    from 0..1, what is transparent as white, upright as the camera noted (EXIF). Hidden files and folders are passed
    over, and so is what operating systems leave behind.

    Text, as a :class:`TextBundle`: `text:stdlib` (the source of Python's standard library, on every machine),
    `text:PATH` (a file, or a folder of files), `tokens:PATH.bin` (see :func:`torchlocal.data.corpora.read_tokens`) and
    `dataset:PATH` (what `save_to_disk` of the package `datasets` wrote). Documents, the token that ends a text after
    each, are cut into rows of `context` tokens; a twentieth of them is for validation, another for testing.

    Training images are cropped at random after padding and mirrored at random, as in the literature:

    | name | padding | mirrored | source |
    |---|---|---|---|
    | `fashion-mnist` | 2, black | yes | Nøkland & Eidnes 2019 |
    | `fashion-mnist-small` | 1, black | yes | the same at half the resolution |
    | `cifar10`, `cifar100` | 4, reflected | yes | He et al. 2016; InfoPro (Wang et al. 2021) |
    | `svhn` | 2, black | no | InfoPro |
    | `stl10` | 4, black | yes | InfoPro |
    | `folder` | random resized crop | yes | Szegedy et al. 2015 |
    | `digits`, `pairs:NAME` | none | no | |

    Pairs are not augmented: crops and mirroring of the halves would be harmless to the label, but the new partners of
    every epoch (N² possible pairs) already are an augmentation, and without another one the task stays comparable
    between data sets.

    Args:
        name: see above.
        root: folder of the files. `fashion-mnist` looks for IDX files, plain or gzipped, in it and in
            `FashionMNIST/raw` under it; the others follow torchvision's layout. None for `~/.cache/torchlocal`.
            `fashion-mnist-small` and `digits` need none, `folder` must have one.
        num_train: take only the first images of the official training set (of a folder: of a fixed shuffle of it).
        num_validation: number of validation images, 10 % of `num_train` by default. They are drawn from the official
            training images after the first `num_train` if enough are left, else from among the first `num_train`. A
            folder that has both `val` and `test` brings its own: then all of `val` is used by default.
        augment: augment training images.
        download: fetch what is absent through torchvision, with a progress bar.
        seed: of the validation split. It is not the run's seed: leave it and all runs are judged by the same images.
        image_size: only for `folder`: side, or height and width, 224 by default.
        num_workers: only for `folder`: processes that decode images; None for one per core but at most four.
        context: only for text: tokens of a row, 256 by default. `num_train` and `num_validation` are of rows there, by
            default all; text is kept encoded in the folder `tokens` under `root`.
        tokenizer: only for text: a tokenizer.json, or a folder that holds one; by default byte-pair encoding of 1,024
            tokens, trained on `text:stdlib`.
        epoch_rows: only for text: rows of an epoch, after which a run validates; by default all.

    Returns:
        The data set, split.

    Raises:
        ValueError: an argument is wrong, or files are missing or damaged; one sentence says which and what to do.
    """
    if name.startswith(TEXT):
        if image_size is not None:
            raise ValueError(f"image_size={image_size} means nothing to text, such as {name!r}: leave it out")
        return load_text(
            name,
            root=default_root() if root is None else _path(root),
            context=context,
            tokenizer=tokenizer,
            num_train=num_train,
            num_validation=num_validation,
            epoch_rows=epoch_rows,
        )
    for argument, value in (("context", context), ("tokenizer", tokenizer), ("epoch_rows", epoch_rows)):
        if value is not None:
            raise ValueError(f"{argument}={value!r} is for text, and data={name!r} is none: leave it out")
    base, pairs = (name.removeprefix("pairs:"), True) if name.startswith("pairs:") else (name, False)
    if base not in data_names():
        raise ValueError(unknown_data(name))
    for argument, number, least in (
        ("num_train", num_train, 1),
        ("num_validation", num_validation, 1),
        ("num_workers", num_workers, 0),
    ):
        whole(argument, number, least, none=True, other=", or left out")
    if not _is_whole(seed, 0, 2**64 - 1):
        raise ValueError(f"seed={seed!r} must be a whole number of at least 0 and below 2**64")
    if base == "folder":
        return _load_folder(name, root, num_train, num_validation, augment, seed, image_size, num_workers, pairs)
    if image_size is not None:
        raise ValueError(f"image_size={image_size} applies to data='folder' only, not to {name!r}: leave it out")
    images = READERS[base](_path(root) if root is not None else None, download)
    train, validation = _divide(len(images.train[1]), num_train, num_validation, seed)
    augmentation = images.augmentation if augment and not pairs else None

    def split(pixels: Tensor, labels: Tensor, indices: Tensor | None) -> Split:
        if indices is not None:
            pixels, labels = pixels[indices], labels[indices]
        return Split(
            MemorySource(pixels, augmentation),
            labels,
            num_classes=images.num_classes,
            mean=images.mean,
            std=images.std,
            pairs=pairs,
        )

    test = split(*images.test, None)
    return DataBundle(
        name=name,
        train=split(*images.train, train),
        validation=split(*images.train, validation),
        test=test,
        num_classes=images.num_classes,
        shape=test.shape,
        checksum=_checksum(tensor.numpy().data for tensor in (*images.train, *images.test)),
    )


def _load_folder(
    name: str,
    root: str | os.PathLike[str] | None,
    num_train: int | None,
    num_validation: int | None,
    augment: bool,
    seed: int,
    image_size: int | tuple[int, int] | None,
    num_workers: int | None,
    pairs: bool,
) -> DataBundle:
    if root is None:
        raise ValueError(
            f"data={name!r} needs a root (data_root in recipes, --data-root): give the folder that holds train/ and "
            "val/ (or test/)"
        )
    height, width = _height_and_width(224 if image_size is None else image_size)
    folder = _path(root)
    listing = read_folders(folder)
    # ImageFolder lists class by class; a fixed shuffle makes the first num_train images a fair sample.
    samples = listing.parts["train"]
    order = torch.randperm(len(samples), generator=make_generator(FOLDER_STREAM)).tolist()
    samples = [samples[index] for index in order]
    if len(listing.parts) == 3:
        held_out = listing.parts["val"]
        if num_train is not None and num_train > len(samples):
            raise ValueError(_too_many_images(num_train, len(samples)))
        if num_validation is not None and num_validation > len(held_out):
            raise ValueError(
                f"num_validation={num_validation} is more than the {len(held_out)} images of {folder / 'val'}: "
                f"choose 1 to {len(held_out)}"
            )
        kept = torch.randperm(len(held_out), generator=make_generator(VALIDATION_STREAM, seed=seed))[:num_validation]
        train, validation = samples[:num_train], [held_out[index] for index in kept.sort().values.tolist()]
        test = listing.parts["test"]
    else:
        train_indices, validation_indices = _divide(len(samples), num_train, num_validation, seed)
        train = [samples[index] for index in train_indices.tolist()]
        validation = [samples[index] for index in validation_indices.tolist()]
        test = listing.parts["val"] if "val" in listing.parts else listing.parts["test"]

    def split(part: list[tuple[str, int]]) -> Split:
        return Split(
            FolderSource([path for path, _ in part], (height, width), augment and not pairs),
            torch.tensor([label for _, label in part], dtype=torch.int64),
            num_classes=len(listing.classes),
            mean=_IMAGENET_MEAN,
            std=_IMAGENET_STD,
            pairs=pairs,
            num_workers=num_workers,
        )

    bundle_test = split(test)
    return DataBundle(
        name=name,
        train=split(train),
        validation=split(validation),
        test=bundle_test,
        num_classes=len(listing.classes),
        shape=bundle_test.shape,
        classes=tuple(listing.classes),
        checksum=_checksum(
            os.fsencode(f"{os.path.relpath(path, folder)}\0{listing.classes[label]}\0")
            for part in listing.parts.values()
            for path, label in part
        ),
    )


def _checksum(pieces: Iterable[bytes | memoryview]) -> str:
    value = 0
    for piece in pieces:
        value = zlib.crc32(piece, value)
    return f"{value:08x}"


def _divide(size: int, num_train: int | None, num_validation: int | None, seed: int) -> tuple[Tensor, Tensor]:
    """Returns the indices of the training and of the validation images among `size` official training images."""
    num_train = size if num_train is None else num_train
    if num_train > size:
        raise ValueError(_too_many_images(num_train, size))
    num_validation = max(1, round(num_train / 10)) if num_validation is None else num_validation
    generator = make_generator(VALIDATION_STREAM, seed=seed)
    if num_train + num_validation <= size:
        rest = num_train + torch.randperm(size - num_train, generator=generator)
        return torch.arange(num_train), rest[:num_validation].sort().values
    if num_validation >= num_train:
        raise ValueError(
            f"num_validation={num_validation} leaves nothing of the num_train={num_train} images (the training set has "
            f"{size}): lower num_validation"
        )
    order = torch.randperm(num_train, generator=generator)
    return order[num_validation:].sort().values, order[:num_validation].sort().values


def _height_and_width(image_size: int | tuple[int, int]) -> tuple[int, int]:
    sides = tuple(image_size) if isinstance(image_size, tuple | list) else (image_size, image_size)
    if len(sides) != 2 or not all(_is_whole(side, 1, _LONGEST_SIDE) for side in sides):
        raise ValueError(
            f"image_size={image_size!r} must be of 1 to {_LONGEST_SIDE:,} pixels: give a side or (height, width)"
        )
    return sides


def _is_whole(value: object, least: int, most: int) -> bool:
    return isinstance(value, int) and not isinstance(value, bool) and least <= value <= most


def _path(root: str | os.PathLike[str]) -> Path:
    return Path(os.path.expanduser(root))  # Path's own fails on a folder that begins with ~ and is no user's


def _too_many_images(num_train: int, size: int) -> str:
    return f"num_train={num_train} is more than the {size} training images there are: choose 1 to {size}"
