"""Image files in class folders: which of them count, and every one as upright RGB of 8 bits."""

from __future__ import annotations

import os
import stat
import warnings
from collections.abc import Iterator
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

if TYPE_CHECKING:
    from PIL.Image import Image

__all__ = ["ImageFolders", "is_clutter", "read_folders", "read_image"]

# torchvision's, and others that Pillow opens.
_ENDINGS = (
    ".jpg", ".jpeg", ".png", ".ppm", ".bmp", ".pgm", ".tif", ".tiff", ".webp", ".gif", ".jfif", ".jp2", ".avif",
)  # fmt: skip
# Images all the same: leaving them out without a word would train on fewer images than the folder holds.
_UNREAD_ENDINGS = (".heic", ".heif", ".jxl", ".tga", ".exr", ".dcm", ".dng", ".cr2", ".cr3", ".nef", ".arw", ".svg")
# Left by operating systems and tools; like hidden names (.git, .ipynb_checkpoints, ._x.png) they are no one's data.
_CLUTTER = ("__MACOSX", "__pycache__", "lost+found", "$RECYCLE.BIN", "System Volume Information", "@eaDir", "#recycle")
# Names under which held-out images would be passed over.
_OTHER_NAMES = {"train": ("training",), "val": ("valid", "validation", "dev", "eval"), "test": ("testing",)}
_LAYOUT = "root must hold train/CLASS/IMAGE files and val/CLASS/IMAGE or test/CLASS/IMAGE files"


@dataclass(frozen=True, kw_only=True)
class ImageFolders:
    """Class folders of image files: `(path, label)` of every image of the parts `train`, `val`, `test` that exist."""

    classes: list[str]
    parts: dict[str, list[tuple[str, int]]]


def read_folders(root: Path) -> ImageFolders:
    """Lists the class folders under `root/train` and `root/val` and/or `root/test` (ImageNet layout).

    Hidden files and folders, and what operating systems leave behind, are passed over. The order is torchvision's
    `ImageFolder`'s.

    Raises:
        ValueError: a folder is missing or empty, the held-out classes are not those of the training folder, or
            something with the name of an image cannot be one.
    """
    parts: dict[str, list[tuple[str, int]]] = {}
    classes: list[str] = []
    for part in ("train", "val", "test"):
        folder = root / part
        if not folder.is_dir():
            _check_names(root, part)
            if part == "train":
                raise ValueError(f"the folder {folder} does not exist: {_LAYOUT}")
            continue
        for other in parts:
            if folder.samefile(root / other):
                raise ValueError(f"{folder} and {root / other} are one folder: hold out other images than those")
        try:
            listing = _list_part(folder)
        except OSError as error:
            raise ValueError(
                f"{error.filename or folder} cannot be read ({error.strerror or error}): see to its permissions"
            ) from error
        # Held-out images of a class may be missing; a training class without images is a mistake.
        empty = [name for name, paths in listing.items() if not paths]
        if part == "train" and (empty or not listing):
            reason = f"none in {', '.join(empty)}" if empty else "it has no folders"
            raise ValueError(f"the folder {folder} holds no class folders with images ({reason}): {_LAYOUT}")
        if not any(listing.values()):
            raise ValueError(f"the folder {folder} holds no images: {_LAYOUT}")
        classes = classes or list(listing)
        unknown = sorted(set(listing) - set(classes))
        if unknown:
            raise ValueError(f"the class {unknown[0]!r} of {folder} is not in {root / 'train'}: add or remove it")
        # Labels by the training folder's classes: a held-out folder may lack some.
        parts[part] = [(path, classes.index(name)) for name, paths in listing.items() for path in paths]
    if len(parts) < 2:
        raise ValueError(f"{root} has neither a folder val nor a folder test: {_LAYOUT}")
    return ImageFolders(classes=classes, parts=parts)


def _check_names(root: Path, part: str) -> None:
    """Refuse held-out images under a name that is not looked for."""
    other_names = (part, *_OTHER_NAMES[part])
    found = sorted(path for path in root.glob("*") if path.name.lower() in other_names and path.is_dir())
    if found:
        raise ValueError(f"the folder {found[0]} is not read under this name: rename it to {part}")


def _list_part(folder: Path) -> dict[str, list[str]]:
    """Returns the images of every class folder."""
    listing = {}
    with os.scandir(folder) as found:
        entries = sorted((entry for entry in found if not is_clutter(entry.name)), key=lambda entry: entry.name)
    for entry in entries:
        if entry.is_dir():
            files = sorted(_walk(entry.path, ()))  # folder by folder
            listing[entry.name] = [os.path.join(where, name) for where, name in files]
        elif entry.name.lower().endswith(_ENDINGS):
            raise ValueError(f"the image {entry.path} is in no class folder: move it into one, or remove it")
    return listing


def _walk(folder: str, above: tuple[tuple[int, int], ...]) -> Iterator[tuple[str, str]]:
    """Yields folder and name of every image in a folder and the folders in it; links are followed."""
    status = os.stat(folder)
    identity = (status.st_dev, status.st_ino)
    if identity in above:
        raise ValueError(f"the folder {folder} is a link to a folder that it is in: remove the link")
    with os.scandir(folder) as entries:
        for entry in entries:
            name = entry.name.lower()
            if is_clutter(entry.name):
                continue
            if entry.is_dir():
                yield from _walk(entry.path, (*above, identity))
            elif name.endswith(_UNREAD_ENDINGS):
                raise ValueError(
                    f"the image {entry.path} is of a kind that is not read: convert it to PNG or JPEG, or remove it"
                )
            elif name.endswith(_ENDINGS):
                if not entry.is_file():  # a fifo, a socket, a device, a link to nothing
                    raise ValueError(f"{entry.path} has the name of an image but is no file: remove it")
                yield folder, entry.name


def is_clutter(name: str) -> bool:
    """Whether a file or folder is hidden, or left behind by operating systems and tools."""
    return name.startswith(".") or name in _CLUTTER


# --------------------------------------------------------------------------------------------------------- decoding


def read_image(path: str) -> Image:
    """Decodes an image file to RGB of 8 bits: the first picture in it, upright.

    16-bit values are scaled from their full range, floating-point values from 0..1; what is transparent shows white,
    as in most viewers; the orientation that a camera noted (EXIF) is applied.

    Raises:
        ValueError: the file cannot be read, or does not say which of its values is white.
    """
    from PIL import Image, UnidentifiedImageError

    try:
        if not stat.S_ISREG(os.stat(path).st_mode):  # opening a fifo would wait for ever
            raise ValueError("it is no file")
        with Image.open(path, formats=_formats()) as file:
            tags = _tiff_tags(file)
            file.load()
            orientation = _orientation(file)
            if file.mode.startswith(("I", "F")) or tags.get(_SAMPLE_FORMAT) == _SIGNED:
                image = _scale(file, tags, path)
            else:
                image = _flatten(file)
    except (_Refused, MemoryError):
        raise
    except UnidentifiedImageError as error:
        raise ValueError(f"the image {path} cannot be read (no known format): replace or remove it") from error
    except Exception as error:  # a damaged file can raise nearly anything
        reason = error.strerror if isinstance(error, OSError) and error.strerror else " ".join(str(error).split())
        raise ValueError(
            f"the image {path} cannot be read ({reason or type(error).__name__}): replace or remove it"
        ) from error
    if not image.width or not image.height:
        raise ValueError(f"the image {path} cannot be read (it is empty): replace or remove it")
    turn = {
        2: Image.Transpose.FLIP_LEFT_RIGHT,
        3: Image.Transpose.ROTATE_180,
        4: Image.Transpose.FLIP_TOP_BOTTOM,
        5: Image.Transpose.TRANSPOSE,
        6: Image.Transpose.ROTATE_270,
        7: Image.Transpose.TRANSVERSE,
        8: Image.Transpose.ROTATE_90,
    }.get(orientation)
    return image if turn is None else image.transpose(turn)


_BITS_PER_SAMPLE, _PHOTOMETRIC, _ORIENTATION, _SAMPLE_FORMAT = 258, 262, 274, 339  # tags of TIFF and EXIF
_WHITE_IS_ZERO, _SIGNED = 0, 2


@cache
def _formats() -> tuple[str, ...]:
    """What a file may be, whatever its name says; others that Pillow knows would run other programs (EPS)."""
    from PIL import Image

    Image.init()
    wanted = ("JPEG", "PNG", "TIFF", "WEBP", "BMP", "PPM", "GIF", "JPEG2000", "AVIF")
    return tuple(name for name in wanted if name in Image.OPEN)


class _Refused(ValueError):
    """The file is whole, but what its values mean is not known."""


def _tiff_tags(file: Image) -> dict[int, int]:
    """The tags of a TIFF that say what its values mean, those of the first channel; none of other files."""
    found = {tag: getattr(file, "tag_v2", {}).get(tag) for tag in (_BITS_PER_SAMPLE, _PHOTOMETRIC, _SAMPLE_FORMAT)}
    firsts = {
        tag: value[0] if isinstance(value, tuple) else value for tag, value in found.items() if value not in (None, ())
    }
    return {tag: int(value) for tag, value in firsts.items()}


def _orientation(file: Image) -> int:
    """The orientation that the camera noted, 1 (upright) where the notes are damaged: viewers take it so, too."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        try:
            return int(file.getexif().get(_ORIENTATION, 1))
        except Exception:
            return 1


def _scale(file: Image, tags: dict[int, int], path: str) -> Image:
    """Brings grey values of more than 8 bits to 8; Pillow's own conversion would cut them off at 255."""
    from PIL import Image

    remedy = "save it with 8 or 16 bits per channel"
    if tags.get(_SAMPLE_FORMAT) == _SIGNED:
        raise _Refused(f"the image {path} holds signed numbers, which do not say what is white: {remedy}")
    if file.mode == "F":
        values = np.asarray(file)
        if not np.isfinite(values).all():
            raise _Refused(f"the image {path} holds values that are not finite: {remedy}")
        low, high = (float(values.min()), float(values.max())) if values.size else (0.0, 0.0)
        if low < 0 or high > 1:
            raise _Refused(
                f"the image {path} holds floating-point values from {low:g} to {high:g}, not 0 (black) to 1 (white): "
                f"scale them, or {remedy}"
            )
        grey = np.floor(255 * values + np.float32(0.5))
    else:
        # Pillow scales 16-bit PGM, and older versions of it 16-bit PNG, to 0..65535 under the name of 32 bits.
        if file.mode == "I" and file.format not in ("PPM", "PNG"):
            raise _Refused(f"the image {path} holds 32-bit whole numbers, which do not say what is white: {remedy}")
        white = 2 ** tags.get(_BITS_PER_SAMPLE, 16) - 1
        values = np.asarray(file).astype(np.uint32)  # 255 times 65535 fits
        grey = (255 * values + white // 2) // white
        transparent = file.info.get("transparency")
        if isinstance(transparent, int):
            grey[values == transparent] = 255
    if tags.get(_PHOTOMETRIC) == _WHITE_IS_ZERO:
        grey = 255 - grey
    return Image.fromarray(grey.astype(np.uint8)).convert("RGB")


def _flatten(file: Image) -> Image:
    """Converts to RGB, on white where the image is transparent; dropping the alpha would show what it hides."""
    from PIL import Image

    image = file.convert("LA") if file.mode == "La" else file
    if image.mode not in ("LA", "PA", "RGBA", "RGBa") and "transparency" not in image.info:
        return image.convert("RGB")
    image = image.convert("RGBA")
    return Image.alpha_composite(Image.new("RGBA", image.size, "white"), image).convert("RGB")
