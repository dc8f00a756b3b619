"""The data: what is read, that batches are pure, and one sentence for every damaged file and wrong argument."""

from __future__ import annotations

import gzip
import hashlib
import importlib.util
import pickle
import random
import struct
import urllib.error
from collections.abc import Callable
from importlib import resources
from pathlib import Path
from types import ModuleType
from typing import Any

import numpy as np
import pytest
import scipy.io
import torch
import torchvision
from PIL import Image
from torch import Tensor

from torchlocal.data import DataBundle, Split, data_names, load_data
from torchlocal.data.images import Augmentation, MemorySource
from torchlocal.data.splits import make_generator

IDX_NAMES = ("train-images-idx3-ubyte", "train-labels-idx1-ubyte", "t10k-images-idx3-ubyte", "t10k-labels-idx1-ubyte")


def pack_idx(array: np.ndarray) -> bytes:
    return struct.pack(f">BBBB{array.ndim}I", 0, 0, 8, array.ndim, *array.shape) + array.tobytes()


def write_fashion_mnist(folder: Path, *, train: int = 40, test: int = 20, zipped: bool = False) -> list[np.ndarray]:
    """Writes four small files in the genuine format and returns their arrays."""
    rng = np.random.default_rng(0)
    folder.mkdir(parents=True, exist_ok=True)
    arrays = []
    for name, count in zip(IDX_NAMES, (train, train, test, test), strict=True):
        shape = (count, 28, 28) if "images" in name else (count,)
        array = rng.integers(0, 256 if "images" in name else 10, shape, dtype=np.uint8)
        content = pack_idx(array)
        if zipped:
            (folder / f"{name}.gz").write_bytes(gzip.compress(content))
        else:
            (folder / name).write_bytes(content)
        arrays.append(array)
    return arrays


def write_folders(root: Path, parts: dict[str, dict[str, int]]) -> None:
    """Writes `parts[part][class]` images of various sizes, PNG and JPEG, colour and grey."""
    rng = np.random.default_rng(0)
    for part, classes in parts.items():
        for name, count in classes.items():
            (root / part / name).mkdir(parents=True)
            for index in range(count):
                height, width = rng.integers(20, 60, 2)
                shape = (height, width) if index % 3 == 0 else (height, width, 3)
                image = Image.fromarray(rng.integers(0, 256, shape, dtype=np.uint8))
                image.save(root / part / name / f"{index}.{'png' if index % 2 else 'jpg'}")


def raw(split: Split) -> np.ndarray:
    """Returns the stored uint8 images of an in-memory split."""
    assert isinstance(split._source, MemorySource)
    return split._source.images.numpy()


def normalised(images: np.ndarray, mean: tuple[float, ...], std: tuple[float, ...]) -> np.ndarray:
    shape = (1, -1, 1, 1)
    return (images.astype(np.float64) / 255 - np.reshape(mean, shape)) / np.reshape(std, shape)


def all_batches(split: Split, batch_size: int, **options: Any) -> tuple[Tensor, Tensor]:
    batches = list(split.batches(batch_size, **options))
    return torch.cat([x for x, _ in batches]), torch.cat([y for _, y in batches])


@pytest.fixture
def folder_root(tmp_path: Path) -> Path:
    write_folders(tmp_path, {"train": {"cat": 9, "dog": 8, "eel": 7}, "val": {"dog": 4, "eel": 3}})
    return tmp_path


# ------------------------------------------------------------------------------------------------- embedded, digits


def test_embedded_sample() -> None:
    data = load_data()
    assert (data.name, data.num_classes, data.shape) == ("fashion-mnist-small", 10, (1, 14, 14))
    assert (len(data.train), len(data.validation), len(data.test)) == (9000, 1000, 2000)
    folder = resources.files("torchlocal.data")
    assert "Copyright © 2017 Zalando SE" in (folder / "LICENSE-fashion-mnist.txt").read_text(encoding="utf-8")
    with (folder / "fashion_mnist_small.npz").open("rb") as file, np.load(file, allow_pickle=False) as arrays:
        images, labels = arrays["train_images"] / 255, arrays["train_labels"]
        test_images, test_labels = arrays["test_images"], arrays["test_labels"]
    assert images.shape == (10_000, 14, 14) and np.bincount(labels).min() > 900
    x, y = all_batches(data.test, 300, train=False)
    mean, std = (0.2866,), (0.3313,)
    np.testing.assert_allclose((images.mean(), images.std()), (*mean, *std), atol=5e-5)
    np.testing.assert_allclose(x, normalised(test_images[:, None], mean, std), atol=1e-5)
    assert y.tolist() == test_labels.tolist()
    # The full data set's first labels, published with it: the sample is the original's beginning.
    assert labels[:10].tolist() == [9, 0, 0, 3, 0, 2, 7, 2, 5, 5]
    assert test_labels[:10].tolist() == [9, 2, 1, 1, 6, 1, 4, 6, 5, 7]


def load_build_sample() -> ModuleType:
    path = Path(__file__).parents[2] / "scripts" / "build_sample.py"
    spec = importlib.util.spec_from_file_location("build_sample", path)
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def test_build_sample_averages_and_is_deterministic(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    script = load_build_sample()
    arrays = write_fashion_mnist(tmp_path / "idx", train=10_002, test=2_001)
    contents = []
    for name in ("one.npz", "two.npz"):
        monkeypatch.setattr("sys.argv", ["build_sample.py", str(tmp_path / "idx"), "--out", str(tmp_path / name)])
        assert script.main() == 0
        contents.append((tmp_path / name).read_bytes())
    assert contents[0] == contents[1]
    with np.load(tmp_path / "one.npz", allow_pickle=False) as sample:
        original = arrays[0][:10_000].astype(np.float64)
        mean = (original[:, ::2, ::2] + original[:, 1::2, ::2] + original[:, ::2, 1::2] + original[:, 1::2, 1::2]) / 4
        assert np.array_equal(sample["train_images"], np.floor(mean + 0.5))
        assert np.array_equal(sample["test_labels"], arrays[3][:2_000])
    monkeypatch.setattr("sys.argv", ["build_sample.py", str(tmp_path / "idx"), "--check"])
    assert script.main() == 1  # random images are not the embedded ones
    monkeypatch.setattr("sys.argv", ["build_sample.py", str(tmp_path / "nowhere")])
    with pytest.raises(SystemExit) as caught:
        script.main()
    assert caught.value.code == 1


def test_digits() -> None:
    data = load_data("digits", num_train=1200, num_validation=237)
    assert (data.num_classes, data.shape) == (10, (1, 8, 8))
    assert (len(data.train), len(data.validation), len(data.test)) == (1200, 237, 360)
    from sklearn.datasets import load_digits

    digits = load_digits()
    known = {
        image.astype(np.uint8).tobytes(): target for image, target in zip(digits.images, digits.target, strict=True)
    }
    pieces = [data.train, data.validation, data.test]
    seen = [(image // 15).tobytes() for piece in pieces for image in raw(piece)]
    assert sorted(seen) == sorted(image.astype(np.uint8).tobytes() for image in digits.images)
    assert [known[key] for key in seen] == [int(label) for piece in pieces for label in piece.labels]
    training = np.concatenate([raw(data.train), raw(data.validation)]) / 255
    np.testing.assert_allclose((training.mean(), training.std()), (0.2875, 0.3539), atol=5e-5)


# ---------------------------------------------------------------------------------------------------------- batches


@pytest.mark.parametrize("name", ["fashion-mnist-small", "digits", "pairs:digits", "folder", "pairs:folder", "workers"])
def test_batches_are_pure(name: str, folder_root: Path) -> None:
    options: dict[str, Any] = {"num_train": 400}
    if name in ("folder", "pairs:folder", "workers"):
        options = {"root": folder_root, "image_size": 12, "num_workers": 2 if name == "workers" else 0}
    split = load_data("folder" if name == "workers" else name, **options).train
    batch_size = len(split) // 4
    torch.manual_seed(7)
    before = torch.get_rng_state(), random.getstate(), str(np.random.get_state(legacy=False))
    whole = list(split.batches(batch_size, epoch=3, train=True, seed=5))
    assert torch.equal(torch.get_rng_state(), before[0])
    assert random.getstate() == before[1] and str(np.random.get_state(legacy=False)) == before[2]
    assert len(whole) == split.num_batches(batch_size, train=True) == 4

    torch.manual_seed(8)  # another global state, another start: the same batches
    for start in range(5):
        rest = list(split.batches(batch_size, epoch=3, train=True, seed=5, start=start))
        assert len(rest) == 4 - start
        for (x, y), (x_whole, y_whole) in zip(rest, whole[start:], strict=True):
            assert torch.equal(x, x_whole) and torch.equal(y, y_whole)

    x, y = whole[1]
    assert x.dtype == torch.float32 and y.dtype == torch.int64 and x.shape == (batch_size, *split.shape)
    for other in ({"epoch": 4, "seed": 5}, {"epoch": 3, "seed": 6}, {"epoch": 5, "seed": 3}):
        assert not torch.equal(next(split.batches(batch_size, train=True, **other))[0], whole[0][0])


def test_workers_change_nothing(folder_root: Path) -> None:
    for train in (True, False):
        batches = [
            all_batches(load_data("folder", root=folder_root, image_size=(10, 14), num_workers=n).train, 5, train=train)
            for n in (0, 2)
        ]
        assert torch.equal(batches[0][0], batches[1][0]) and torch.equal(batches[0][1], batches[1][1])


def test_training_pass_visits_every_image_once() -> None:
    split = load_data("digits", num_train=100, augment=False).train
    x, y = all_batches(split, 20, epoch=2, train=True)
    in_order, labels = all_batches(split, 33, train=False)
    assert not torch.equal(x, in_order)

    def as_set(images: Tensor, classes: Tensor) -> list[tuple[bytes, int]]:
        return sorted((image.numpy().tobytes(), int(c)) for image, c in zip(images, classes, strict=True))

    assert as_set(x, y) == as_set(in_order, labels)
    assert torch.equal(labels, split.labels)
    # An incomplete batch is dropped in training and kept in evaluation.
    assert [len(y) for _, y in split.batches(33, train=True)] == [33] * 3
    assert [len(y) for _, y in split.batches(33, train=False)] == [33] * 3 + [1]


@pytest.mark.parametrize(("mode", "padding", "flip"), [("black", 2, True), ("reflect", 3, True), ("black", 1, False)])
def test_augmentation_is_crop_and_flip(mode: str, padding: int, flip: bool) -> None:
    rng = np.random.default_rng(0)
    images = rng.integers(1, 256, (1000, 2, 6, 9), dtype=np.uint8)
    before = images.copy()
    augmented = Augmentation(padding=padding, mode=mode, flip=flip)(torch.from_numpy(images), make_generator(1)).numpy()
    assert np.array_equal(images, before) and augmented.dtype == np.uint8
    border = ((0, 0), (padding, padding), (padding, padding))
    drawn = set()
    for image, result in zip(images, augmented, strict=True):
        padded = np.pad(image, border, mode="reflect") if mode == "reflect" else np.pad(image, border)
        matches = [
            (top, left, mirrored)
            for top in range(2 * padding + 1)
            for left in range(2 * padding + 1)
            for mirrored in ((False, True) if flip else (False,))
            if np.array_equal(padded[:, top : top + 6, left : left + 9][..., :: -1 if mirrored else 1], result)
        ]
        assert len(matches) == 1
        drawn.add(matches[0])
    assert len(drawn) >= 0.95 * (2 * padding + 1) ** 2 * (2 if flip else 1)


def test_flip_without_crop_leaves_the_source_alone() -> None:
    images = torch.randint(0, 256, (50, 1, 3, 4), generator=make_generator(1), dtype=torch.uint8)
    before = images.clone()
    result = Augmentation(flip=True)(images, make_generator(2))
    assert torch.equal(images, before)
    mirrored = (result == images.flip(3)).flatten(1).all(1)
    assert (mirrored | (result == images).flatten(1).all(1)).all() and 10 < mirrored.sum() < 40


def test_random_streams_differ_by_every_word_of_the_key() -> None:
    keys: list[dict[str, int]] = [
        {"seed": s, "epoch": e, "index": i} for s in range(4) for e in range(4) for i in range(4)
    ]
    keys += [{"seed": 2**32}, {"seed": 2**63}]
    draws = {tuple(torch.rand(4, generator=make_generator(p, **key)).tolist()) for p in (1, 2, 3) for key in keys}
    assert len(draws) == 3 * len(keys)


def test_augmentation_of_the_data_sets() -> None:
    data = load_data("fashion-mnist-small", num_train=256, num_validation=10)
    plain = load_data("fashion-mnist-small", num_train=256, num_validation=10, augment=False)
    x, y = next(data.train.batches(256, train=True))
    x_plain, y_plain = next(plain.train.batches(256, train=True))
    assert torch.equal(y, y_plain)
    same = (x == x_plain).flatten(1).all(1)
    assert 0 < same.sum() < 64  # one crop in nine is the centre, half of those are mirrored
    for split in (data.train, data.validation, data.test):
        reference = normalised(raw(split), (0.2866,), (0.3313,))
        np.testing.assert_allclose(all_batches(split, 99, train=False)[0], reference, atol=1e-5)


# ------------------------------------------------------------------------------------------------------------ pairs


def labels_by_image(data: DataBundle) -> dict[bytes, int]:
    return {
        image.tobytes(): int(label)
        for split in (data.train, data.validation, data.test)
        for image, label in zip(raw(split), split._labels, strict=True)
    }


def halves(x: Tensor) -> list[tuple[bytes, bytes]]:
    """Recovers the two uint8 digits of every normalised pair."""
    pixels = ((x * 0.3539 + 0.2875) * 255).round().to(torch.uint8)
    width = pixels.shape[3] // 2
    return [(pair[..., :width].numpy().tobytes(), pair[..., width:].numpy().tobytes()) for pair in pixels]


def test_pair_labels_are_sums() -> None:
    data = load_data("pairs:digits", num_train=300, num_validation=100)
    assert data.shape == (1, 8, 16) and data.num_classes == 10 and data.name == "pairs:digits"
    known = labels_by_image(data)
    for split, options in (
        (data.train, {"train": True, "epoch": 0}),
        (data.train, {"train": True, "epoch": 1}),
        (data.validation, {"train": False}),
        (data.test, {"train": False}),
    ):
        x, y = all_batches(split, 60, **options)
        pairs = halves(x)
        assert [(known[a] + known[b]) % 10 for a, b in pairs] == y.tolist()
        own = sorted(image.tobytes() for image in raw(split))
        assert sorted(a for a, _ in pairs) == own  # every image once on the left ...
        assert sorted(b for _, b in pairs) == own  # ... and once on the right, none from another split
    assert torch.equal(all_batches(data.test, 60, train=False)[1], data.test.labels)


def test_other_partners() -> None:
    test = load_data("pairs:digits").test
    own, same, other = (
        halves(all_batches(split, 60, train=False)[0]) for split in (test, test.with_partners(0), test.with_partners(1))
    )
    assert own == same and [a for a, _ in own] == [a for a, _ in other]
    assert sorted(b for _, b in own) == sorted(b for _, b in other)
    assert sum(a == b for a, b in zip(own, other, strict=True)) < 0.05 * len(own)
    with pytest.raises(ValueError, match="this split has no pairs"):
        load_data("digits").test.with_partners(1)
    with pytest.raises(ValueError, match="index=-1 must be at least 0"):
        test.with_partners(-1)


def test_partners_are_redrawn_in_training_and_fixed_elsewhere() -> None:
    data = load_data("pairs:digits", num_train=300, num_validation=100)
    epochs = [dict(halves(all_batches(data.train, 100, train=True, epoch=e)[0])) for e in (0, 1)]
    assert sum(epochs[0][a] == epochs[1][a] for a in epochs[0]) < 15
    for split in (data.validation, data.test):
        first, labels = all_batches(split, 50, train=False)
        again, labels_again = all_batches(split, 70, train=False, epoch=3, seed=9)
        assert torch.equal(first, again) and torch.equal(labels, labels_again)


# ----------------------------------------------------------------------------------------------------------- splits


@pytest.mark.parametrize(
    ("num_train", "num_validation", "expected"),
    [
        (None, None, (54, 6)),  # carved out of all
        (None, 12, (48, 12)),
        (40, None, (40, 4)),  # from the images after the first 40
        (40, 20, (40, 20)),
        (40, 21, (19, 21)),  # too few are left: carved out of the first 40
        (58, None, (52, 6)),
        (5, None, (5, 1)),
    ],
)
def test_validation_split(
    tmp_path: Path, num_train: int | None, num_validation: int | None, expected: tuple[int, int]
) -> None:
    images = write_fashion_mnist(tmp_path, train=60)[0]
    data = load_data("fashion-mnist", root=tmp_path, num_train=num_train, num_validation=num_validation)
    assert (len(data.train), len(data.validation), len(data.test)) == (*expected, 20)
    position = {image.tobytes(): index for index, image in enumerate(images)}
    train = [position[image.tobytes()] for image in raw(data.train)]
    validation = [position[image.tobytes()] for image in raw(data.validation)]
    limit = num_train or 60
    assert not set(train) & set(validation)
    if limit + (num_validation or round(limit / 10)) <= 60:
        assert train == list(range(limit)) and min(validation) >= limit
    else:
        assert sorted(train + validation) == list(range(limit))
    again = load_data("fashion-mnist", root=tmp_path, num_train=num_train, num_validation=num_validation)
    assert np.array_equal(raw(again.validation), raw(data.validation))


def test_validation_images_are_drawn_not_cut() -> None:
    first, second = (raw(load_data("digits", num_train=1000, seed=seed).validation) for seed in (0, 1))
    assert first.shape == second.shape == (100, 1, 8, 8) and not np.array_equal(first, second)


# ------------------------------------------------------------------------------------------------------------ files


@pytest.mark.parametrize("zipped", [False, True])
@pytest.mark.parametrize("folder", [".", "FashionMNIST/raw"])
def test_fashion_mnist_files(tmp_path: Path, zipped: bool, folder: str) -> None:
    write_fashion_mnist(tmp_path / folder, zipped=zipped)
    data = load_data("fashion-mnist", root=tmp_path, num_train=30, download=False)
    assert data.shape == (1, 28, 28)
    # An independent reading: numpy on the plain bytes.
    content = [
        gzip.decompress((tmp_path / folder / f"{n}.gz").read_bytes())
        if zipped
        else (tmp_path / folder / n).read_bytes()
        for n in IDX_NAMES
    ]
    train = np.frombuffer(content[0], np.uint8, offset=16).reshape(-1, 1, 28, 28)
    test = np.frombuffer(content[2], np.uint8, offset=16).reshape(-1, 1, 28, 28)
    x, y = all_batches(data.train, 8, train=False)
    np.testing.assert_allclose(x, normalised(train[:30], (0.2860,), (0.3530,)), atol=1e-5)
    assert y.tolist() == list(content[1][8:38])
    np.testing.assert_allclose(
        all_batches(data.test, 8, train=False)[0], normalised(test, (0.2860,), (0.3530,)), atol=1e-5
    )


def replaced(position: int, value: int) -> Callable[[bytes], bytes]:
    return lambda content: content[:position] + bytes([value]) + content[position + 1 :]


@pytest.mark.parametrize(
    ("file", "damage", "message"),
    [
        (0, replaced(2, 9), r"train-images-idx3-ubyte is not an IDX file of bytes \(it begins with 00000903\)"),
        (0, lambda c: b"PK\3\4" + c[4:], r"train-images-idx3-ubyte is not an IDX file"),
        (0, lambda c: b"", r"is not an IDX file of bytes \(it begins with nothing\)"),
        (0, lambda c: c[:9], r"train-images-idx3-ubyte is truncated \(it ends inside its header\)"),
        (0, lambda c: c[:-1], r"train-images-idx3-ubyte is truncated \(.*announces 31360 .* only 31359\)"),
        (0, replaced(4, 255), r"train-images-idx3-ubyte is truncated"),
        (1, lambda c: c + b"\0", r"train-labels-idx1-ubyte is too long"),
        (2, lambda c: gzip.compress(c)[:-200], r"t10k-images-idx3-ubyte is a damaged or truncated gzip file"),
        (2, lambda c: gzip.compress(c)[:500] + b"xxxx" + gzip.compress(c)[504:], r"damaged or truncated gzip file"),
        (3, lambda c: pack_idx(np.zeros(19, np.uint8)), r"holds 20 images but 19 labels"),
        (
            1,
            replaced(8 + 5, 10),
            r"train-images-idx3-ubyte with train-labels-idx1-ubyte holds the label 10, outside 0 to 9",
        ),
        (
            1,
            lambda c: pack_idx(np.zeros((40, 28, 28), np.uint8)),
            r"holds an array of shape \(40, 28, 28\), not labels",
        ),
        (0, lambda c: pack_idx(np.zeros(40, np.uint8)), r"holds an array of shape \(40,\), not images"),
        (2, lambda c: pack_idx(np.zeros((20, 14, 14), np.uint8)), r"hold images of different sizes"),
    ],
)
def test_damaged_idx_files(tmp_path: Path, file: int, damage: Callable[[bytes], bytes], message: str) -> None:
    write_fashion_mnist(tmp_path)
    path = tmp_path / IDX_NAMES[file]
    path.write_bytes(damage(path.read_bytes()))
    with pytest.raises(ValueError, match=message) as caught:
        load_data("fashion-mnist", root=tmp_path, download=False)
    assert "\n" not in str(caught.value) and "anew" in str(caught.value)


def test_empty_idx_files(tmp_path: Path) -> None:
    write_fashion_mnist(tmp_path, test=0)
    with pytest.raises(ValueError, match="t10k-labels-idx1-ubyte holds no images"):
        load_data("fashion-mnist", root=tmp_path, download=False)


def test_missing_idx_file(tmp_path: Path) -> None:
    write_fashion_mnist(tmp_path)
    (tmp_path / IDX_NAMES[3]).unlink()
    with pytest.raises(ValueError, match=f"{tmp_path} lacks {IDX_NAMES[3]}"):
        load_data("fashion-mnist", root=tmp_path)


@pytest.mark.parametrize(
    ("name", "file"),
    [
        ("fashion-mnist", "train-images-idx3-ubyte"),
        ("cifar10", "cifar-10-python.tar.gz"),
        ("cifar100", "cifar-100-python.tar.gz"),
        ("svhn", "train_32x32.mat"),
        ("stl10", "stl10_binary.tar.gz"),
    ],
)
def test_absent_data_sets_say_where_to_put_the_files(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, name: str, file: str
) -> None:
    def offline(*_args: Any, **_options: Any) -> None:
        raise urllib.error.URLError("Name or service not known")

    monkeypatch.setattr("urllib.request.urlopen", offline)
    for download, message in ((True, "cannot be downloaded .*Name or service not known"), (False, "download is off")):
        with pytest.raises(ValueError, match=message) as caught:
            load_data(name, root=tmp_path / "data", download=download)
        sentence = str(caught.value)
        assert "\n" not in sentence and file in sentence and str(tmp_path / "data") in sentence


def md5(path: Path) -> str:
    return hashlib.md5(path.read_bytes()).hexdigest()


def write_cifar(root: Path, kind: Any, monkeypatch: pytest.MonkeyPatch, num_classes: int) -> list[dict[str, Any]]:
    """Writes small files in CIFAR's format and makes torchvision expect their checksums."""
    rng = np.random.default_rng(0)
    folder = root / kind.base_folder
    folder.mkdir()
    key = "labels" if num_classes == 10 else "fine_labels"
    contents, lists = [], []
    for entries in (kind.train_list, kind.test_list):
        sums = []
        for name, _ in entries:
            pixels = rng.integers(0, 256, (12, 3072), dtype=np.uint8)
            content = {"data": pixels, key: rng.integers(0, num_classes, 12).tolist()}
            (folder / name).write_bytes(pickle.dumps(content))
            sums.append([name, md5(folder / name)])
            contents.append(content)
        lists.append(sums)
    (folder / kind.meta["filename"]).write_bytes(pickle.dumps({kind.meta["key"]: [str(i) for i in range(num_classes)]}))
    monkeypatch.setattr(kind, "train_list", lists[0])
    monkeypatch.setattr(kind, "test_list", lists[1])
    monkeypatch.setattr(kind, "meta", {**kind.meta, "md5": md5(folder / kind.meta["filename"])})
    return contents


@pytest.mark.parametrize(
    ("name", "num_classes", "mean", "std"),
    [
        ("cifar10", 10, (0.4914, 0.4822, 0.4465), (0.2470, 0.2435, 0.2616)),
        ("cifar100", 100, (0.5071, 0.4865, 0.4409), (0.2673, 0.2564, 0.2762)),
    ],
)
def test_cifar(
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    name: str,
    num_classes: int,
    mean: tuple[float, ...],
    std: tuple[float, ...],
) -> None:
    kind = torchvision.datasets.CIFAR10 if num_classes == 10 else torchvision.datasets.CIFAR100
    contents = write_cifar(tmp_path, kind, monkeypatch, num_classes)
    for root in (tmp_path, tmp_path / kind.base_folder):  # the data set's own folder is understood too
        data = load_data(name, root=root, num_train=10, num_validation=2, download=False)
        assert (data.num_classes, data.shape, len(data.test)) == (num_classes, (3, 32, 32), 12)
        x, y = all_batches(data.train, 4, train=False)
        np.testing.assert_allclose(x, normalised(contents[0]["data"][:10].reshape(-1, 3, 32, 32), mean, std), atol=1e-5)
        assert y.tolist() == contents[0]["labels" if num_classes == 10 else "fine_labels"][:10]
        assert next(data.train.batches(5, train=True))[0].shape == (5, 3, 32, 32)
    # One wrong byte: the checksum fails before the pickle is opened.
    path = tmp_path / kind.base_folder / kind.test_list[0][0]
    path.write_bytes(path.read_bytes()[:-1] + b"!")
    with pytest.raises(ValueError, match=rf"{name} is not \(intact\) in {tmp_path} and download is off"):
        load_data(name, root=tmp_path, download=False)


def write_svhn(root: Path, monkeypatch: pytest.MonkeyPatch, labels: dict[str, np.ndarray]) -> dict[str, np.ndarray]:
    rng = np.random.default_rng(0)
    sums, pixels = {}, {}
    for part, digits in labels.items():
        pixels[part] = rng.integers(0, 256, (32, 32, 3, len(digits)), dtype=np.uint8)
        path = root / f"{part}_32x32.mat"
        scipy.io.savemat(path, {"X": pixels[part], "y": digits[:, None].astype(np.uint8)})
        sums[part] = ["http://nowhere.invalid/", path.name, md5(path)]
    monkeypatch.setattr(torchvision.datasets.SVHN, "split_list", sums)
    return pixels


def test_svhn(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    labels = {"train": np.arange(1, 11).repeat(2), "test": np.array([10, 3, 1])}
    pixels = write_svhn(tmp_path, monkeypatch, labels)
    data = load_data("svhn", root=tmp_path, num_train=18, num_validation=2, download=False)
    x, y = all_batches(data.test, 2, train=False)
    assert y.tolist() == [0, 3, 1]  # the files call the digit 0 "10"
    expected = pixels["test"].transpose(3, 2, 0, 1)
    np.testing.assert_allclose(x, normalised(expected, (0.4377, 0.4438, 0.4728), (0.1980, 0.2010, 0.1970)), atol=1e-5)
    write_svhn(tmp_path, monkeypatch, {**labels, "test": np.array([10, 12, 1])})
    with pytest.raises(ValueError, match=r"test_32x32.mat holds the label 12, outside 0 to 9"):
        load_data("svhn", root=tmp_path, download=False)


def test_stl10(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    rng = np.random.default_rng(0)
    kind, folder = torchvision.datasets.STL10, tmp_path / "stl10_binary"
    folder.mkdir()
    pixels = {}
    for part, count in (("train", 6), ("test", 4)):
        pixels[part] = rng.integers(0, 256, (count, 3, 96, 96), dtype=np.uint8)  # each channel column by column
        (folder / f"{part}_X.bin").write_bytes(pixels[part].tobytes())
        (folder / f"{part}_y.bin").write_bytes(bytes(range(1, count + 1)))
    # The unlabelled images stay absent: they are not needed.
    monkeypatch.setattr(
        kind, "train_list", [[n, md5(folder / n)] for n in ("train_X.bin", "train_y.bin")] + [["no", ""]]
    )
    monkeypatch.setattr(kind, "test_list", [[n, md5(folder / n)] for n in ("test_X.bin", "test_y.bin")])
    data = load_data("stl10", root=tmp_path, num_train=5, num_validation=1, download=False)
    assert data.shape == (3, 96, 96)
    x, y = all_batches(data.test, 3, train=False)
    expected = pixels["test"].transpose(0, 1, 3, 2)
    np.testing.assert_allclose(x, normalised(expected, (0.4467, 0.4398, 0.4066), (0.2603, 0.2566, 0.2713)), atol=1e-5)
    assert y.tolist() == [0, 1, 2, 3]


# ----------------------------------------------------------------------------------------------------------- folder

IMAGENET_MEAN, IMAGENET_STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)


def test_folder(folder_root: Path) -> None:
    data = load_data("folder", root=folder_root, image_size=(10, 14), num_train=20, num_validation=4, num_workers=0)
    assert (data.num_classes, data.shape) == (3, (3, 10, 14))
    assert (len(data.train), len(data.validation), len(data.test)) == (20, 4, 7)
    assert data.test.labels.tolist() == [1] * 4 + [2] * 3  # labels as in train, although val has no cats
    assert len(set(data.train.labels.tolist())) == 3  # the first images are not all of one class
    x, _ = next(data.train.batches(20, train=True))
    assert x.shape == (20, 3, 10, 14) and x.isfinite().all()
    assert not torch.equal(x, next(data.train.batches(20, train=True, epoch=1))[0])


def test_folder_centre_crop_is_exact(tmp_path: Path) -> None:
    rng = np.random.default_rng(0)
    pixels = rng.integers(0, 256, (32, 48, 3), dtype=np.uint8)
    for part in ("train", "val"):
        (tmp_path / part / "only").mkdir(parents=True)
        for index in range(3):
            Image.fromarray(pixels).save(tmp_path / part / "only" / f"{index}.png")
    # 28 = 32 * 224 / 256: at this size nothing is scaled, the middle of the image comes out unchanged.
    data = load_data("folder", root=tmp_path, image_size=28, num_workers=0)
    x, _ = next(data.test.batches(1, train=False))
    middle = pixels[2:30, 10:38].transpose(2, 0, 1)[None]
    np.testing.assert_allclose(x, normalised(middle, IMAGENET_MEAN, IMAGENET_STD), atol=1e-5)


def test_folder_training_crops_lie_inside_the_image(tmp_path: Path) -> None:
    # Red counts the rows and green the columns: a crop shows where it was taken.
    rows, columns = np.mgrid[0:200, 0:250]
    pixels = np.stack([rows, columns, np.zeros_like(rows)], axis=2).astype(np.uint8)
    for part in ("train", "val"):
        (tmp_path / part / "only").mkdir(parents=True)
        for index in range(50):
            Image.fromarray(pixels).save(tmp_path / part / "only" / f"{index}.png")
    data = load_data("folder", root=tmp_path, image_size=16, num_workers=0, num_validation=1)
    x, _ = next(data.train.batches(49, train=True))
    scale, shift = torch.tensor(IMAGENET_STD).view(3, 1, 1), torch.tensor(IMAGENET_MEAN).view(3, 1, 1)
    red, green, blue = ((x * scale + shift) * 255).round().unbind(1)
    assert (blue == 0).all()
    assert (red.diff(dim=1) >= 0).all() and (red.diff(dim=2) == 0).all()  # upright
    mirrored = green[:, 0, 0] > green[:, 0, -1]
    assert 10 < mirrored.sum() < 40
    heights, widths = (red[:, -1, 0] - red[:, 0, 0]) * 16 / 15, (green[:, 0, -1] - green[:, 0, 0]).abs() * 16 / 15
    share, aspect = heights * widths / (200 * 250), widths / heights
    assert share.min() > 0.06 and share.max() <= 1.02 and share.std() > 0.15
    assert aspect.min() > 0.7 and aspect.max() < 1.42 and aspect.std() > 0.1


def test_folder_with_val_and_test(tmp_path: Path) -> None:
    write_folders(tmp_path, {"train": {"a": 4, "b": 4}, "val": {"a": 3, "b": 2}, "test": {"a": 1, "b": 2}})
    data = load_data("folder", root=tmp_path, image_size=8, num_workers=0)
    assert (len(data.train), len(data.validation), len(data.test)) == (8, 5, 3)
    assert len(load_data("folder", root=tmp_path, num_validation=2).validation) == 2
    with pytest.raises(ValueError, match="num_validation=6 is more than the 5 images"):
        load_data("folder", root=tmp_path, num_validation=6)


@pytest.mark.parametrize("num_workers", [0, 2])
@pytest.mark.parametrize("damage", ["truncated", "text"])
def test_folder_unreadable_image(folder_root: Path, num_workers: int, damage: str) -> None:
    path = folder_root / "val" / "dog" / "1.png"
    path.write_bytes(path.read_bytes()[:300] if damage == "truncated" else b"no image")
    data = load_data("folder", root=folder_root, image_size=8, num_workers=num_workers)
    with pytest.raises(ValueError, match=f"the image {path} cannot be read") as caught:
        list(data.test.batches(3, train=False))
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("parts", "message"),
    [
        ({}, r"the folder .*train does not exist: root must hold train/CLASS/IMAGE"),
        ({"train": {"a": 2}}, r"has neither a folder val nor a folder test"),
        ({"train": {}, "val": {"a": 2}}, r"train holds no class folders with images"),
        ({"train": {"a": 2, "b": 0}, "val": {"a": 2}}, r"train holds no class folders with images \(.*b"),
        ({"train": {"a": 2}, "val": {"a": 0}}, r"val holds no images"),
        ({"train": {"a": 2}, "val": {"z": 1}}, r"the class 'z' of .*val is not in .*train"),
    ],
)
def test_folder_mistakes(tmp_path: Path, parts: dict[str, dict[str, int]], message: str) -> None:
    for part in parts:
        (tmp_path / part).mkdir()
    write_folders(tmp_path, parts)
    with pytest.raises(ValueError, match=message) as caught:
        load_data("folder", root=tmp_path)
    assert "\n" not in str(caught.value)


# -------------------------------------------------------------------------------------------------------- arguments


@pytest.mark.parametrize(
    ("name", "options", "message"),
    [
        ("fashion_mnist", {}, r"data 'fashion_mnist' is unknown \(did you mean fashion-mnist"),
        ("pairs:cifar", {}, r"did you mean pairs:cifar10 or pairs:cifar100\?"),
        ("pairs:pairs:digits", {}, r"data 'pairs:pairs:digits' is unknown"),
        ("", {}, r"data '' is unknown: choose fashion-mnist-small, digits"),
        ("digits", {"num_train": 0}, r"num_train=0 must be a whole number of at least 1"),
        (
            "digits",
            {"num_train": 1438},
            r"num_train=1438 is more than the 1437 training images there are: choose 1 to 1437",
        ),
        ("digits", {"num_validation": 0}, r"num_validation=0 must be"),
        ("digits", {"num_validation": 1437}, r"num_validation=1437 leaves nothing of the num_train=1437 images"),
        ("digits", {"num_train": 1437, "num_validation": 5000}, r"num_validation=5000 leaves nothing"),
        ("digits", {"seed": -1}, r"seed=-1 must be"),
        ("digits", {"image_size": 16}, r"image_size=16 applies to data='folder' only"),
        ("folder", {}, r"data='folder' needs a root"),
        ("folder", {"root": "/nonexistent"}, r"the folder /nonexistent/train does not exist"),
        ("folder", {"root": ".", "image_size": 0}, r"image_size=0 must be"),
        ("folder", {"root": ".", "num_workers": -1}, r"num_workers=-1 must be"),
    ],
)
def test_wrong_arguments(name: str, options: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message) as caught:
        load_data(name, **options)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"batch_size": 0}, r"batch_size=0 must be at least 1"),
        (
            {"batch_size": 101},
            r"batch_size=101 is larger than the 100 training images: lower batch_size to at most 100",
        ),
        ({"batch_size": 10, "start": 11}, r"start=11 is not a batch of this pass: choose 0 to 10"),
        ({"batch_size": 10, "epoch": -1}, r"epoch=-1 must be"),
        ({"batch_size": 10, "seed": -1}, r"seed=-1 must be"),
    ],
)
def test_wrong_batches(options: dict[str, int], message: str) -> None:
    split = load_data("digits", num_train=100).train
    with pytest.raises(ValueError, match=message):
        split.batches(train=True, **options)  # at the call, not at the first batch


def test_names_are_listed() -> None:
    assert data_names() == [
        "fashion-mnist-small",
        "digits",
        "fashion-mnist",
        "cifar10",
        "cifar100",
        "svhn",
        "stl10",
        "folder",
    ]
