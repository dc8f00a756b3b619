"""Batches made on a device: the very images that the host makes, without a value being read there."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import Tensor
from torch._subclasses import FakeTensorMode

from torchlocal.data import DataBundle, Split, bundle, images, load_data
from torchlocal.data.images import Augmentation, MemorySource, send
from torchlocal.data.splits import make_generator

CPU, CUDA = torch.device("cpu"), torch.device("cuda", 0)
MEAN, STD = (0.25, 0.5), (0.3, 0.7)
AUGMENTATIONS = {
    "none": None,
    "black": Augmentation(padding=2, flip=True),
    "reflect": Augmentation(padding=3, mode="reflect", flip=True),
    "crop": Augmentation(padding=1),
    "flip": Augmentation(flip=True),
}


def make_split(augmentation: Augmentation | None, *, pairs: bool = False) -> Split:
    """67 images of 2 channels, 5 × 7."""
    generator = make_generator(1)
    pixels = torch.randint(0, 256, (67, 2, 5, 7), generator=generator, dtype=torch.uint8)
    labels = torch.randint(0, 4, (67,), generator=generator)
    return Split(MemorySource(pixels, augmentation), labels, num_classes=4, mean=MEAN, std=STD, pairs=pairs)


def by_hand(image: np.ndarray, augmentation: Augmentation, top: int, left: int, mirrored: bool) -> np.ndarray:
    """One image, padded, cropped and mirrored."""
    padding = augmentation.padding
    border = ((0, 0), (padding, padding), (padding, padding))
    padded = np.pad(image, border, mode="reflect") if augmentation.mode == "reflect" else np.pad(image, border)
    crop = padded[:, top : top + image.shape[1], left : left + image.shape[2]]
    return crop[..., ::-1] if augmentation.flip and mirrored else crop


@pytest.mark.parametrize("held", [True, False])
@pytest.mark.parametrize("pairs", [False, True])
@pytest.mark.parametrize("name", list(AUGMENTATIONS))
def test_a_device_makes_the_batches_of_the_host(
    monkeypatch: pytest.MonkeyPatch, name: str, pairs: bool, held: bool
) -> None:
    if not held:
        monkeypatch.setattr(images, "_MOST_HELD", 0)
    host = make_split(AUGMENTATIONS[name], pairs=pairs)
    there = host.to(CPU)
    assert (there._source._held is None) and there._source._device == CPU  # type: ignore[attr-defined]
    for train in (True, False):
        for epoch, start in ((0, 0), (3, 2)):
            options: dict[str, Any] = {"train": train, "epoch": epoch, "seed": 5, "start": start}
            ours, theirs = list(there.batches(16, **options)), list(host.batches(16, **options))
            assert len(ours) == len(theirs) == (4 if train else 5) - start
            for (x, y), (expected, labels) in zip(ours, theirs, strict=True):
                assert torch.equal(x, expected) and torch.equal(y, labels)
                assert x.dtype == torch.float32 and x.is_contiguous()
    assert (there._source._held is not None) == held  # type: ignore[attr-defined]


@pytest.mark.parametrize("device", [None, CPU])
@pytest.mark.parametrize("name", list(AUGMENTATIONS))
def test_batches_are_what_their_draws_say(name: str, device: torch.device | None) -> None:
    """Image by image, from the random streams as they have always been."""
    augmentation, split = AUGMENTATIONS[name], make_split(AUGMENTATIONS[name])
    assert isinstance(split._source, MemorySource)
    pixels, epoch, seed, index = split._source.images.numpy(), 2, 9, 1
    order = torch.randperm(67, generator=make_generator(1, seed=seed, epoch=epoch))[16:32]
    generator = make_generator(2, seed=seed, epoch=epoch, index=index)
    padding = 0 if augmentation is None else augmentation.padding
    offsets = torch.randint(0, 2 * padding + 1, (2, 16), generator=generator).tolist()
    flipped = (torch.rand(16, generator=generator) < 0.5).tolist()
    scale = 1 / (255 * torch.tensor(STD)).view(-1, 1, 1)
    shift = -(torch.tensor(MEAN) / torch.tensor(STD)).view(-1, 1, 1)
    made = split if device is None else split.to(device)
    x, y = next(made.batches(16, epoch=epoch, train=True, seed=seed, start=index))
    for row, image in enumerate(order.tolist()):
        expected = pixels[image]
        if augmentation is not None:
            expected = by_hand(expected, augmentation, offsets[0][row], offsets[1][row], flipped[row])
        assert torch.equal(x[row], torch.from_numpy(expected.copy()).float() * scale + shift)
        assert y[row] == split.labels[image]


@pytest.mark.parametrize("size", [(1, 4), (2, 3), (4, 4)])
def test_reflection_beyond_the_other_edge(size: tuple[int, int]) -> None:
    """As numpy reflects: to and fro."""
    pixels = torch.randint(0, 256, (9, 1, *size), generator=make_generator(1), dtype=torch.uint8)
    source = MemorySource(pixels, Augmentation(padding=5, mode="reflect", flip=True))
    order = torch.tensor([3, 1, 8, 1])
    found, expected = (made.fetch(order, make_generator(2)) for made in (source.to(CPU), source))
    assert torch.equal(found, expected)


@pytest.mark.parametrize("held", [True, False])
@pytest.mark.parametrize("name", list(AUGMENTATIONS))
def test_nothing_is_read_from_the_device(monkeypatch: pytest.MonkeyPatch, name: str, held: bool) -> None:
    """On fake tensors of a CUDA device, of which a value cannot be read, nor one mixed with the CPU's."""
    pinned = []

    def pin(tensor: Tensor) -> Tensor:
        pinned.append(tensor)
        return tensor

    monkeypatch.setattr(Tensor, "pin_memory", pin)
    # What is done on the host, by numpy, which knows no fake tensors.
    monkeypatch.setattr(Augmentation, "pad", lambda self, images: F.pad(images, (self.padding,) * 4))
    if not held:
        monkeypatch.setattr(images, "_MOST_HELD", 0)
    with FakeTensorMode(allow_non_fake_inputs=True):
        split = make_split(AUGMENTATIONS[name], pairs=True).to(CUDA)
        batches = list(split.batches(16, train=True))
        with pytest.raises(Exception, match=r"aten\._local_scalar_dense"):
            batches[0][0].sum().item()
    assert [(x.device, y.device) for x, y in batches] == [(CUDA, CPU)] * 4
    # A batch of pairs is made of two, each of which takes one transfer, or one of images and one of draws.
    each = 1 if held or AUGMENTATIONS[name] is None else 2
    assert len(pinned) == 4 * 2 * each


class Recorded:
    """In place of a tensor of the CPU, which cannot be sent here: what is asked of it."""

    device = CPU

    def __init__(self, *, pinned: bool = False) -> None:
        self.pinned, self.asked = pinned, list[Any]()

    def is_pinned(self) -> bool:
        return self.pinned

    def pin_memory(self) -> Recorded:
        self.asked.append("pin")
        return self

    def to(self, device: torch.device, **options: Any) -> Recorded:
        self.asked.append((device.type, options))
        return self


@pytest.mark.parametrize(
    ("device", "pinned", "asked"),
    [
        ("cuda", False, ["pin", ("cuda", {"non_blocking": True})]),
        ("cuda", True, [("cuda", {"non_blocking": True})]),
        # Without waiting, MPS reads memory that is somebody else's by then (github.com/pytorch/pytorch/issues/189690).
        ("mps", False, [("mps", {})]),
        ("cpu", False, [("cpu", {})]),
    ],
)
def test_how_a_tensor_is_sent(device: str, pinned: bool, asked: list[Any]) -> None:
    recorded: Any = Recorded(pinned=pinned)
    assert send(recorded, torch.device(device)) is recorded
    assert recorded.asked == asked


def test_images_of_files_are_sent_in_eight_bits(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    from PIL import Image

    for part in ("train", "val"):
        for index in range(5):
            (tmp_path / part / str(index % 2)).mkdir(parents=True, exist_ok=True)
            pixels = np.random.default_rng(index).integers(0, 256, (20, 24, 3), dtype=np.uint8)
            Image.fromarray(pixels).save(tmp_path / part / str(index % 2) / f"{index}.png")
    data = load_data("folder", root=tmp_path, image_size=8, num_workers=0, num_validation=1)
    sent: list[torch.dtype] = []
    send_it = send

    def counted(tensor: Tensor, device: torch.device) -> Tensor:
        sent.append(tensor.dtype)
        return send_it(tensor, device)

    monkeypatch.setattr("torchlocal.data.splits.send", counted)
    ours, theirs = (list(part.batches(2, train=True)) for part in (data.train.to(CPU), data.train))
    assert len(ours) == len(theirs) == 2 and sent == [torch.uint8] * 4
    for (x, y), (expected, labels) in zip(ours, theirs, strict=True):
        assert torch.equal(x, expected) and torch.equal(y, labels)


def test_a_cpu_makes_its_batches_as_ever() -> None:
    data = load_data("fashion-mnist-small", num_train=40, num_validation=10)
    assert data.to(CPU) is data
    there: DataBundle = data.to(torch.device("meta"))
    assert [getattr(there, name)._device.type for name in ("train", "validation", "test")] == ["meta"] * 3
    assert data.train._device == CPU and len(there.train) == len(data.train)


def test_loaders_of_ones_own_are_left_alone() -> None:
    loader = [(torch.zeros(2, 3), torch.zeros(2))]
    data = bundle({"train": loader, "validation": loader})
    there = data.to(torch.device("meta"))
    assert type(there) is type(data) and there.train is data.train and there.validation is data.validation
    assert there.test is None
    assert next(there.train.batches(2, train=True))[0].device == CPU
