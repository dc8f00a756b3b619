"""Faults of image files and folders that other libraries pass over: the right value, or one sentence."""

from __future__ import annotations

import gzip
import io
import math
import multiprocessing
import os
import re
import shutil
import signal
import socket
import struct
from collections.abc import Callable, Iterator
from pathlib import Path
from types import FrameType
from typing import Any

import numpy as np
import pytest
import torch
import torchvision
from PIL import Image

from torchlocal.data import load_data, sources, splits
from torchlocal.data.folders import read_folders, read_image
from torchlocal.data.sources import read_idx
from torchlocal.run.config import FitConfig
from torchlocal.run.own import Own

RAMP = np.arange(256, dtype=np.uint8).reshape(16, 16)  # every grey level once
COLOURS = np.random.default_rng(0).integers(0, 256, (5, 7, 3), dtype=np.uint8)


def read(path: Path) -> np.ndarray:
    image = read_image(str(path))
    assert image.mode == "RGB"
    return np.asarray(image)


def grey(values: np.ndarray) -> np.ndarray:
    return np.repeat(values[..., None], 3, axis=2)


def refusal(function: Callable[[], Any]) -> str:
    with pytest.raises(ValueError) as caught:
        function()
    sentence = str(caught.value)
    assert "\n" not in sentence and ": " in sentence
    return sentence


def tiff(
    path: Path, data: bytes, *, width: int, bits: int, photometric: int = 1, form: int = 1, order: str = "<"
) -> Path:
    """Writes an uncompressed grey TIFF of one row by hand: Pillow does not write these kinds."""
    tags = {256: width, 257: 1, 258: bits, 259: 1, 262: photometric, 273: 8, 277: 1, 278: 1, 279: len(data), 339: form}
    content = (b"II" if order == "<" else b"MM") + struct.pack(order + "HI", 42, 8 + len(data) + len(data) % 2)
    content += data + b"\0" * (len(data) % 2) + struct.pack(order + "H", len(tags))
    content += b"".join(struct.pack(order + "HHII", tag, 4, 1, value) for tag, value in tags.items())
    path.write_bytes(content + struct.pack(order + "I", 0))
    return path


# ------------------------------------------------------------------------------------------------- more than 8 bits


@pytest.mark.parametrize("ending", ["png", "tif", "pgm", "jp2"])
def test_16_bits_are_scaled_from_their_full_range(ending: str, tmp_path: Path) -> None:
    path = tmp_path / f"x.{ending}"
    deep = np.append(RAMP.astype(np.uint16) * 257, np.full((1, 16), 32768, np.uint16), axis=0)
    Image.fromarray(deep).save(path)
    expected = np.append(RAMP, np.full((1, 16), 128, np.uint8), axis=0)  # 257 * 128 = 32896 is nearest
    assert np.array_equal(read(path), grey(expected))


def test_other_deep_tiffs(tmp_path: Path) -> None:
    def values(*args: Any, **options: Any) -> list[int]:
        return read(tiff(tmp_path / "x.tif", *args, **options))[0, :, 0].tolist()

    assert values(struct.pack(">3H", 0, 32896, 65535), width=3, bits=16, order=">") == [0, 128, 255]
    assert values(struct.pack("<3H", 0, 257 * 55, 65535), width=3, bits=16, photometric=0) == [255, 200, 0]
    assert values(bytes([0xFF, 0xF0, 0x00]), width=2, bits=12) == [255, 0]
    assert values(bytes([0xFF, 0x37]), width=2, bits=8, photometric=0) == [0, 200]
    assert values(struct.pack("<2f", 0.25, 1), width=2, bits=32, form=3) == [64, 255]
    assert values(struct.pack("<2f", 0.2, 1), width=2, bits=32, form=3, photometric=0) == [204, 0]


def test_float_images_of_0_to_1_are_scaled(tmp_path: Path) -> None:
    Image.fromarray(RAMP.astype(np.float32) / 255).save(tmp_path / "x.tif")
    assert np.array_equal(read(tmp_path / "x.tif"), grey(RAMP))


@pytest.mark.parametrize(
    ("data", "options", "sentence"),
    [
        (
            struct.pack("<2f", 0, 255),
            {"bits": 32, "form": 3},
            "floating-point values from 0 to 255, not 0 .black. to 1",
        ),
        (struct.pack("<2f", -0.5, 0.5), {"bits": 32, "form": 3}, "floating-point values from -0.5 to 0.5"),
        (struct.pack("<2f", 0, float("nan")), {"bits": 32, "form": 3}, "values that are not finite"),
        (struct.pack("<2f", 0, float("inf")), {"bits": 32, "form": 3}, "values that are not finite"),
        (struct.pack("<2I", 0, 65535), {"bits": 32}, "32-bit whole numbers"),
        (struct.pack("<2i", 0, 200), {"bits": 32, "form": 2}, "signed numbers"),
        (struct.pack("<2h", -5, 5), {"bits": 16, "form": 2}, "signed numbers"),
        (bytes([0xFF, 1]), {"bits": 8, "form": 2}, "signed numbers"),
    ],
)
def test_values_of_unknown_meaning_are_refused(
    data: bytes, options: dict[str, int], sentence: str, tmp_path: Path
) -> None:
    path = tiff(tmp_path / "x.tif", data, width=2, **options)
    with pytest.raises(ValueError, match=f"the image {path} holds {sentence}") as caught:
        read(path)
    assert str(caught.value).endswith("save it with 8 or 16 bits per channel")


# ---------------------------------------------------------------------------------------------- modes, transparency


def test_modes_without_transparency(tmp_path: Path) -> None:
    def saved(image: Image.Image, ending: str = "png", **options: Any) -> np.ndarray:
        image.save(tmp_path / f"x.{ending}", **options)
        return read(tmp_path / f"x.{ending}")

    grey_image, colour_image = Image.fromarray(RAMP), Image.fromarray(COLOURS)
    assert np.array_equal(saved(grey_image), grey(RAMP))
    assert np.array_equal(saved(grey_image.convert("LA")), grey(RAMP))
    assert np.array_equal(saved(colour_image.convert("RGBA")), COLOURS)
    bits = RAMP % 3 == 0
    assert np.array_equal(saved(Image.fromarray(bits)), grey(255 * bits.astype(np.uint8)))
    assert np.array_equal(saved(Image.fromarray(bits), "tif", compression="group4"), grey(255 * bits.astype(np.uint8)))
    palette = Image.fromarray(np.arange(3, dtype=np.uint8)[None])
    palette.putpalette([10, 20, 30, 40, 50, 60, 70, 80, 90])
    for ending in ("png", "gif", "tif", "bmp"):
        assert saved(palette, ending).tolist() == [[[10, 20, 30], [40, 50, 60], [70, 80, 90]]]
    ink = Image.fromarray(np.array([[[255, 0, 0, 0], [0, 255, 0, 0], [0, 0, 0, 255]]], np.uint8), mode="CMYK")
    assert saved(ink, "tif").tolist() == [[[0, 255, 255], [255, 0, 255], [0, 0, 0]]]
    flat = Image.fromarray(np.full((16, 16, 4), [0, 255, 255, 0], np.uint8), mode="CMYK")
    red = saved(flat, "jpg", quality=95).astype(int)
    assert abs(red - [255, 0, 0]).max() <= 3


def test_what_is_transparent_is_white(tmp_path: Path) -> None:
    def saved(image: Image.Image, **options: Any) -> list[Any]:
        image.save(tmp_path / "x.png", **options)
        pixels: list[Any] = read(tmp_path / "x.png").tolist()
        return pixels

    # Black strokes on nothing, as icons and drawings have them: without the alpha they would be all black.
    strokes = np.zeros((1, 2, 4), np.uint8)
    strokes[0, 1, 3] = 255
    assert saved(Image.fromarray(strokes)) == [[[255] * 3, [0] * 3]]
    assert saved(Image.fromarray(strokes[..., 2:])) == [[[255] * 3, [0] * 3]]  # grey and alpha
    half = np.array([[[200, 100, 0, 128]]], np.uint8)
    assert saved(Image.fromarray(half)) == [[[227, 177, 127]]]
    palette = Image.fromarray(np.arange(2, dtype=np.uint8)[None])
    palette.putpalette([10, 20, 30, 40, 50, 60])
    assert saved(palette, transparency=0) == [[[255] * 3, [40, 50, 60]]]
    levels = np.array([[0, 7, 255]], np.uint8)
    assert saved(Image.fromarray(levels), transparency=7) == grey(np.array([[0, 255, 255]])).tolist()
    deep = Image.fromarray(levels.astype(np.uint16) * 257)
    assert saved(deep, transparency=7 * 257) == grey(np.array([[0, 255, 255]])).tolist()


# ------------------------------------------------------------------------------------------------------ orientation


@pytest.mark.parametrize("orientation", range(1, 9))
@pytest.mark.parametrize("ending", ["png", "tif", "webp", "jpg"])
def test_orientation_is_applied(ending: str, orientation: int, tmp_path: Path) -> None:
    exif = Image.Exif()
    exif[274] = orientation
    colours = COLOURS if ending != "jpg" else np.kron(np.eye(2, dtype=np.uint8), np.full((16, 32), 255))[:, :48]
    options = {"webp": {"lossless": True}, "jpg": {"quality": 100}}.get(ending, {})
    Image.fromarray(colours.astype(np.uint8)).save(tmp_path / f"x.{ending}", exif=exif, **options)
    expected = colours if colours.ndim == 3 else grey(colours)
    # What the standard says of row 0 and column 0 of the file: where they lie in the picture.
    upright = {
        1: expected,  # top, left
        2: expected[:, ::-1],  # top, right
        3: expected[::-1, ::-1],  # bottom, right
        4: expected[::-1],  # bottom, left
        5: expected.transpose(1, 0, 2),  # left, top
        6: expected.transpose(1, 0, 2)[:, ::-1],  # right, top
        7: expected.transpose(1, 0, 2)[::-1, ::-1],  # right, bottom
        8: expected.transpose(1, 0, 2)[::-1],  # left, bottom
    }[orientation]
    pixels = read(tmp_path / f"x.{ending}")
    assert pixels.shape == upright.shape
    assert np.abs(pixels.astype(int) - upright).max() <= (2 if ending == "jpg" else 0)


def test_damaged_notes_of_the_camera_are_no_reason_to_refuse(tmp_path: Path) -> None:
    for notes in (b"Exif\0\0", b"Exif\0\0II*\0\xff\xff\xff\xff", b"Exif\0\0garbage"):
        Image.fromarray(COLOURS).save(tmp_path / "x.png", exif=notes)
        assert np.array_equal(read(tmp_path / "x.png"), COLOURS)


def test_files_are_known_by_their_content(tmp_path: Path) -> None:
    Image.fromarray(COLOURS).save(tmp_path / "x", "PNG")
    (tmp_path / "x").rename(tmp_path / "x.jpg")
    assert np.array_equal(read(tmp_path / "x.jpg"), COLOURS)
    Image.fromarray(COLOURS).save(tmp_path / "x", "EPS")  # a program, which Pillow would have run
    (tmp_path / "x").rename(tmp_path / "x.png")
    assert refusal(lambda: read(tmp_path / "x.png")) == (
        f"the image {tmp_path / 'x.png'} cannot be read (no known format): replace or remove it"
    )


@pytest.mark.filterwarnings("ignore")
def test_damaged_images_are_refused_in_one_sentence(tmp_path: Path) -> None:
    rng = np.random.default_rng(0)
    path, told = tmp_path / "x", 0
    for kind in ("PNG", "TIFF", "GIF", "BMP", "PPM", "WEBP", "JPEG2000", "JPEG"):
        file = io.BytesIO()
        Image.fromarray(COLOURS).save(file, kind)
        for _ in range(20):
            content = bytearray(file.getvalue()[: rng.integers(0, len(file.getvalue())) + 1])
            for position in rng.integers(0, len(content), rng.integers(0, 4)):
                content[position] = rng.integers(0, 256)
            path.write_bytes(content)
            try:
                read(path)
            except ValueError as error:
                told += 1
                assert str(error).startswith(f"the image {path} ") and "\n" not in str(error)
    assert told > 80


# ---------------------------------------------------------------------------------------------------------- folders


@pytest.fixture
def root(tmp_path: Path) -> Path:
    """A small data set: two classes, of four training and two held-out images each."""
    for part, count in (("train", 4), ("val", 2)):
        for name in ("a", "b"):
            (tmp_path / part / name).mkdir(parents=True)
            for index in range(count):
                Image.fromarray(COLOURS).save(tmp_path / part / name / f"{index}.png")
    return tmp_path


@pytest.fixture
def _no_waiting() -> Iterator[None]:
    """Whoever opens a fifo waits for ever: fail instead."""

    def give_up(signum: int, frame: FrameType | None) -> None:
        pytest.fail("waited")  # no Exception, which a reader may take for a damaged file's

    previous = signal.signal(signal.SIGALRM, give_up)
    signal.alarm(20)
    yield
    signal.alarm(0)
    signal.signal(signal.SIGALRM, previous)


def test_hidden_files_and_clutter_are_no_data(root: Path) -> None:
    before = read_folders(root)
    assert before.classes == ["a", "b"] and [len(part) for part in before.parts.values()] == [8, 4]
    image = (root / "train" / "a" / "0.png").read_bytes()
    for name in (".ipynb_checkpoints", "__MACOSX", ".git", "@eaDir", "lost+found", "$RECYCLE.BIN"):
        for folder in (root / "train", root / "train" / "a", root / "val"):
            (folder / name).mkdir()
            (folder / name / "0.png").write_bytes(image)
    for name in ("._0.png", ".hidden.jpg", "Thumbs.db", ".DS_Store", "desktop.ini", "boxes.txt"):
        for folder in (root, root / "train", root / "train" / "a"):
            (folder / name).write_bytes(image)
    assert read_folders(root) == before


def test_images_are_listed_in_the_order_of_torchvision(root: Path) -> None:
    image = (root / "train" / "a" / "0.png").read_bytes()
    for name in ("a/z/1.PNG", "a/B/x.jpeg", "a/z.png", "a/z/y/2.Tiff", "a/z-/3.webp", "a/\u00e9.bmp", "Z/0.pgm"):
        (root / "train" / name).parent.mkdir(exist_ok=True, parents=True)
        (root / "train" / name).write_bytes(image)
    theirs = torchvision.datasets.ImageFolder(str(root / "train"))
    ours = read_folders(root)
    assert ours.classes == theirs.classes == ["Z", "a", "b"] and ours.parts["train"] == theirs.samples
    assert [label for _, label in ours.parts["val"]] == [1, 1, 2, 2]  # as in train, although val has no Z


@pytest.mark.usefixtures("_no_waiting")
@pytest.mark.parametrize("kind", ["fifo", "socket", "link to nothing"])
def test_what_is_no_file_is_never_opened(kind: str, root: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(root)  # the name of a socket may not be long
    path = root / "train" / "b" / "9.png"
    with socket.socket(socket.AF_UNIX) as listener:
        if kind == "fifo":
            os.mkfifo(path)
        elif kind == "socket":
            listener.bind(str(path.relative_to(root)))
        else:
            path.symlink_to("nowhere.png")
        assert refusal(lambda: load_data("folder", root=root)) == (
            f"{path} has the name of an image but is no file: remove it"
        )
        if kind != "link to nothing":
            assert "cannot be read (it is no file)" in refusal(lambda: read_image(str(path)))


def test_links_to_images_are_followed_and_circles_refused(root: Path) -> None:
    (root / "train" / "c").symlink_to(root / "train" / "a")
    (root / "train" / "a" / "more.png").symlink_to(root / "train" / "b" / "0.png")
    assert len(read_folders(root).parts["train"]) == 5 + 4 + 5
    (root / "train" / "b" / "up").symlink_to(root / "train" / "b")
    assert "b/up is a link to a folder that it is in: remove" in refusal(lambda: read_folders(root))


def test_images_are_not_left_out_without_a_word(root: Path) -> None:
    loose = root / "val" / "5.jpg"
    loose.write_bytes(b"")
    assert refusal(lambda: read_folders(root)) == (
        f"the image {loose} is in no class folder: move it into one, or remove it"
    )
    loose.unlink()
    other = root / "train" / "b" / "photo.HEIC"
    other.write_bytes(b"")
    assert refusal(lambda: read_folders(root)) == (
        f"the image {other} is of a kind that is not read: convert it to PNG or JPEG, or remove it"
    )


def test_held_out_images_under_another_name_are_refused(root: Path) -> None:
    for name in ("validation", "valid", "Val"):
        (root / "val").rename(root / name)
        (root / "test").mkdir()
        assert f"{root / name} is not read under this name: rename it to val" in refusal(lambda: read_folders(root))
        (root / "test").rmdir()
        (root / name).rename(root / "val")
    (root / "Testing").mkdir()
    assert f"{root / 'Testing'} is not read under this name: rename it to test" in refusal(lambda: read_folders(root))


def test_training_images_are_not_held_out(root: Path) -> None:
    (root / "test").symlink_to(root / "train")
    assert refusal(lambda: read_folders(root)) == (
        f"{root / 'test'} and {root / 'train'} are one folder: hold out other images than those"
    )


def test_unreadable_folders_are_refused(root: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    scandir = os.scandir

    def forbidden(path: str) -> Any:
        if Path(path).name == "b":
            raise PermissionError(13, "Permission denied", path)
        return scandir(path)

    monkeypatch.setattr(os, "scandir", forbidden)  # root may read all
    assert f"{root / 'train' / 'b'} cannot be read (Permission denied)" in refusal(lambda: read_folders(root))


# --------------------------------------------------------------------------------------------------------- IDX files


def write_idx(folder: Path, name: str, shape: tuple[int, ...], content: bytes, *, zipped: bool = True) -> Path:
    """Writes a file whose header and content need not agree."""
    packed = struct.pack(f">BBBB{len(shape)}I", 0, 0, 8, len(shape), *shape) + content
    path = folder / (f"{name}.gz" if zipped else name)
    path.write_bytes(gzip.compress(packed, 1) if zipped else packed)
    return path


def write_idx_set(folder: Path, count: int = 3, size: tuple[int, int] = (28, 28)) -> None:
    for part in ("train", "t10k"):
        write_idx(folder, f"{part}-images-idx3-ubyte", (count, *size), bytes(count * size[0] * size[1]))
        write_idx(folder, f"{part}-labels-idx1-ubyte", (count,), bytes(count))


@pytest.mark.parametrize(
    ("images", "labels", "sentence"),
    [
        ((80_000, 28, 28), 80_000, "announces 80000 images of 28x28 pixels, and fashion-mnist has at most 70,000"),
        ((80_000, 28, 28), 3, "holds 80000 images but 3 labels: get the files anew"),
        ((2, 5600, 5600), 2, "hold images of different sizes"),
    ],
)
def test_headers_are_checked_before_anything_is_read(
    images: tuple[int, int, int], labels: int, sentence: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    write_idx_set(tmp_path)
    bomb = write_idx(tmp_path, "train-images-idx3-ubyte", images, bytes(math.prod(images)))
    write_idx(tmp_path, "train-labels-idx1-ubyte", (labels,), bytes(labels))
    assert bomb.stat().st_size < math.prod(images) / 200

    def read_up_to(file: Any, size: int) -> bytearray:
        pytest.fail(f"{size} bytes were to be read")

    monkeypatch.setattr(sources, "_read_up_to", read_up_to)
    told = refusal(lambda: load_data("fashion-mnist", root=tmp_path, download=False))
    assert sentence in told and str(bomb) in told


@pytest.mark.parametrize("zipped", [True, False])
def test_headers_that_no_such_file_can_keep_are_not_believed(
    zipped: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = write_idx(tmp_path, "x", (2**22, 32, 32), bytes(2**20), zipped=zipped)
    monkeypatch.setattr(sources, "_read_up_to", lambda file, size: pytest.fail("read"))
    told = refusal(lambda: read_idx(path))
    most = 1032 * path.stat().st_size if zipped else 2**20
    there = f"{'at most' if zipped else 'only'} {most}"
    assert told == (
        f"{path} is truncated (its header announces 4294967296 bytes of data, there are {there}): get it anew"
    )


def test_zeros_that_gzip_packs_best_are_read(tmp_path: Path) -> None:
    packed = gzip.compress(struct.pack(">BBBBI", 0, 0, 8, 1, 10**7) + bytes(10**7), 9)
    assert 1000 * len(packed) < 10**7  # near the bound on what a byte can stand for
    (tmp_path / "x").write_bytes(packed)
    assert read_idx(tmp_path / "x").shape == (10**7,)


def test_other_images_are_not_taken_for_fashion_mnist(tmp_path: Path) -> None:
    write_idx_set(tmp_path)
    assert load_data("fashion-mnist", root=tmp_path, num_train=2, download=False).shape == (1, 28, 28)
    write_idx_set(tmp_path, size=(32, 32))
    assert "announces 3 images of 32x32 pixels" in refusal(
        lambda: load_data("fashion-mnist", root=tmp_path, download=False)
    )


@pytest.mark.usefixtures("_no_waiting")
def test_an_idx_fifo_is_not_opened(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "x")
    assert refusal(lambda: read_idx(tmp_path / "x")) == f"{tmp_path / 'x'} is no file: check the path"


# ------------------------------------------------------------------------------------------------ arrays of a reader


@pytest.mark.parametrize(
    ("images", "labels", "sentence"),
    [
        (np.full((2, 1, 4, 4), 0.5), [0, 1], "pixels that are not whole numbers from 0 to 255"),
        (np.full((2, 1, 4, 4), 256), [0, 1], "pixels that are not whole numbers from 0 to 255"),
        (np.full((2, 1, 4, 4), -1, np.int8), [0, 1], "pixels that are not whole numbers from 0 to 255"),
        (np.full((2, 1, 4, 4), np.nan, np.float32), [0, 1], "pixels that are not whole numbers from 0 to 255"),
        (np.zeros((2, 4, 4), np.uint8), [0, 1], r"images of shape \(4, 4\)"),
        (np.zeros((2, 1, 4, 4), np.uint8), [0.0, 1.5], "labels that are not whole numbers"),
        (np.zeros((2, 1, 4, 4), np.uint8), ["0", "1"], "labels that are not whole numbers"),
        (np.zeros((2, 1, 4, 4), np.uint8), [0, 2], "the label 2, outside 0 to 1"),
        (np.zeros((2, 1, 4, 4), np.uint8), [0, -1], "the label -1, outside 0 to 1"),
        (np.zeros((2, 1, 4, 4), np.uint8), [[0, 1], [1, 0]], "2 images but 4 labels"),
    ],
)
def test_arrays_that_would_be_cut_off_or_wrapped_are_refused(images: Any, labels: Any, sentence: str) -> None:
    with pytest.raises(ValueError, match=f"the file holds {sentence}.*: get the files anew"):
        sources._checked(images, labels, 2, "the file")


def test_arrays_of_other_types_keep_their_values() -> None:
    values = np.arange(32).reshape(2, 1, 4, 4)
    for kind in (np.uint8, np.int64, np.float32):
        images, labels = sources._checked(values.astype(kind), np.array([[1.0], [0.0]]), 2, "the file")
        assert images.dtype == torch.uint8 and images.tolist() == values.tolist() and labels.tolist() == [1, 0]


# ------------------------------------------------------------------------------------------------ arguments, changes


@pytest.mark.parametrize(
    ("options", "sentence"),
    [
        ({"num_train": True}, "num_train=True must be a whole number of at least 1, or left out"),
        ({"num_validation": 2.0}, "num_validation=2.0 must be a whole number of at least 1, or left out"),
        ({"seed": 0.5}, "seed=0.5 must be a whole number of at least 0 and below 2**64"),
        ({"seed": True}, "seed=True must be a whole number of at least 0 and below 2**64"),
        *(
            ({"image_size": size}, f"image_size={size!r} must be of 1 to 16,384 pixels: give a side or (height, width)")
            for size in (True, 8.5, (8,), (8, 0), (8, 8, 3), "8", 16_385)
        ),
    ],
)
def test_arguments_that_are_no_whole_numbers_are_refused(options: dict[str, Any], sentence: str, root: Path) -> None:
    with pytest.raises(ValueError, match=re.escape(sentence)):
        load_data("folder", root=root, **options)


def test_a_single_class_is_nothing_to_train_on(root: Path) -> None:
    for part in ("train", "val"):  # one folder too many: all images would be of one class, and all networks right
        (root / part).rename(root / "b")
        (root / part).mkdir()
        (root / "b").rename(root / part / "images")
    assert load_data("folder", root=root, num_validation=1).num_classes == 1
    assert "has a single class (images), of which nothing can be learned: give every class a folder" in refusal(
        lambda: Own().load(FitConfig.of(data="folder", data_root=str(root)))
    )


def test_a_root_that_looks_like_a_user_is_a_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    assert "the folder ~nobody-of-this-name/train does not exist" in refusal(
        lambda: load_data("folder", root="~nobody-of-this-name")
    )


def test_checksums_tell_other_data(root: Path, tmp_path_factory: pytest.TempPathFactory) -> None:
    def checksum() -> str:
        return load_data("folder", root=root, num_validation=1).checksum

    first = checksum()
    assert load_data("folder", root=root, num_validation=2, image_size=8).checksum == first  # what was found, not used
    moved = tmp_path_factory.mktemp("moved") / "root"
    shutil.copytree(root, moved)
    assert load_data("folder", root=moved, num_validation=1).checksum == first
    (root / "train" / "a" / "0.png").rename(root / "train" / "a" / "x.png")
    renamed = checksum()
    (root / "train" / "a" / "x.png").rename(root / "train" / "b" / "x.png")
    second = checksum()
    (root / "train" / "b").rename(root / "train" / "c")
    (root / "val" / "b").rename(root / "val" / "c")
    assert len({first, renamed, second, checksum()}) == 4

    write_idx_set(root)
    third = load_data("fashion-mnist", root=root, num_train=2, download=False).checksum
    write_idx(root, "t10k-labels-idx1-ubyte", (3,), b"\0\1\0")
    assert load_data("fashion-mnist", root=root, num_train=2, download=False).checksum != third


@pytest.mark.skipif(multiprocessing.get_start_method() != "fork", reason="the process would not know the broken reader")
def test_a_lost_worker_is_told_in_one_sentence(root: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(splits, "read_image", lambda path: os.kill(os.getpid(), signal.SIGKILL))
    data = load_data("folder", root=root, image_size=8, num_workers=1)
    with pytest.raises(OSError, match=r"a process that decodes images was ended from outside.*give num_workers=0$"):
        list(data.test.batches(2, train=False))
