"""What a run is trained and measured on: a data set, split."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from typing import Any, Self

import torch

from torchlocal.data.splits import Split

__all__ = ["DataBundle", "TextBundle"]


@dataclass(frozen=True, kw_only=True)
class DataBundle:
    """A data set, split.

    Args:
        name: the name it was loaded by.
        train: to train on.
        validation: to decide by; never part of the test set.
        test: to evaluate once, at the end.
        num_classes: number of classes.
        shape: of one image, `(C, H, W)`.
        classes: names of the class folders, in the order of their labels; empty for other data sets.
        checksum: of all images and labels that were found (of a folder: of the files' names), so that a run can tell
            that they have changed.
    """

    name: str
    train: Split
    validation: Split
    test: Split
    num_classes: int
    shape: tuple[int, int, int]
    classes: tuple[str, ...] = ()
    checksum: str = ""

    def to(self, device: torch.device) -> Self:
        """The same data, of whose images batches are made on this device, see :meth:`Split.to`; on a CPU as ever."""
        if device.type == "cpu":
            return self
        parts: dict[str, Any] = {name: getattr(self, name) for name in ("train", "validation", "test")}
        parts = {name: part.to(device) if isinstance(part, Split) else part for name, part in parts.items()}
        return replace(self, **parts)

    def sample(self, batch_size: int) -> Any:
        """What a network is cut for: a batch of the training images, or the shape of one."""
        return max(2, batch_size), *self.shape  # BatchNorm asks for two


@dataclass(frozen=True, kw_only=True)
class TextBundle(DataBundle):
    """Text, as rows of tokens: a batch is ids `(N, T)`, its target the ids that follow, -100 where none is known.

    Args:
        vocabulary: number of tokens.
        context: T, the number of tokens of a row.
        told: what the text is, for people.
        tokens: number of tokens by part.
        bytes_per_token: bytes of text by token, by part; empty where that is not known.
        tokenizer: content of the tokenizer.json; empty where that is not known.
    """

    train: Any
    validation: Any
    test: Any
    num_classes: int = 0
    shape: Any = ()
    vocabulary: int
    context: int
    told: str
    tokens: Mapping[str, int]
    bytes_per_token: Mapping[str, float] = field(default_factory=dict)
    tokenizer: str = ""

    def sample(self, batch_size: int) -> Any:
        """What a network is cut for: ids `(N, T)`."""
        return torch.zeros(max(2, batch_size), self.context, dtype=torch.int64)
