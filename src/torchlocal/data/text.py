"""Text as data: documents in three parts, packed into rows of tokens that can be read from anywhere on."""

from __future__ import annotations

import os
import platform
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from torchlocal.checks import whole
from torchlocal.data.bundles import TextBundle
from torchlocal.data.corpora import (
    Document,
    TokenFile,
    dataset_documents,
    encoded,
    read_tokens,
    stdlib_documents,
    text_documents,
)
from torchlocal.data.splits import DOCUMENT_STREAM, SHUFFLE_STREAM, make_generator
from torchlocal.data.tokenizers import Tokenizer, read_tokenizer, shipped_tokenizer

__all__ = ["IGNORED", "TextSplit", "load_text", "text_sizes"]

IGNORED = -100  # a target that does not count, by PyTorch's convention
_CONTEXT = 256
_HELD_OUT = 20  # one part in so many for validation, and for testing


class TextSplit:
    """Documents one after the other, cut into rows: a batch is ids `(B, T)`, its target the ids that follow `(B, T)`.

    Row i begins with the token i T of all and its target is one token further, so every token but the first is a target
    exactly once. What does not fill a row is left out of training; elsewhere it is filled up, with targets that do not
    count.

    Args:
        tokens: of the whole corpus.
        documents: which are in this part, in order: `(first, after the last)` token of each, `(D, 2)`.
        context: T.
        vocabulary: number of tokens.
        fill: also the rest that does not fill a row: not to be trained on.
        most: use only the first so many rows.
        epoch_rows: rows of an epoch; by default all. Epochs follow each other on passes that are shuffled anew, each
            over all rows, so that one after the other they show every row as often as any other.
    """

    def __init__(
        self,
        tokens: np.ndarray,
        documents: np.ndarray,
        *,
        context: int,
        vocabulary: int,
        fill: bool,
        most: int | None = None,
        epoch_rows: int | None = None,
    ) -> None:
        self._tokens, self._starts = tokens, documents[:, 0]
        self._bounds = np.concatenate([[0], np.cumsum(documents[:, 1] - documents[:, 0])])
        self.context, self.vocabulary, self._fill = context, vocabulary, fill
        num_targets = max(0, self.num_tokens - 1)
        rows = -(-num_targets // context) if fill else num_targets // context
        self.num_rows = rows if most is None else min(rows, most)
        self.epoch_rows = epoch_rows or self.num_rows

    @property
    def num_tokens(self) -> int:
        """Number of tokens of all documents."""
        return int(self._bounds[-1])

    def __len__(self) -> int:
        """Rows of an epoch."""
        return self.epoch_rows

    def __repr__(self) -> str:
        return f"TextSplit({self.num_rows} rows of {self.context} tokens, {self.vocabulary} kinds of them)"

    def batches(
        self, batch_size: int, *, epoch: int = 0, train: bool, seed: int = 0, start: int = 0
    ) -> Iterator[tuple[Tensor, Tensor]]:
        """Reads one epoch, beginning at batch `start`, exactly as an uninterrupted one would have gone on.

        Args:
            batch_size: rows per batch.
            epoch: which.
            train: shuffle, and drop the last incomplete batch; otherwise all rows in order.
            seed: the run's, from 0 to 2**64 - 1.
            start: index of the first batch.

        Returns:
            Batches of ids and targets, both int64 `(B, T)`; a target that does not count is -100.

        Raises:
            ValueError: a number is out of range.
        """
        whole("batch_size", batch_size, 1)
        if train and batch_size > len(self):
            raise ValueError(
                f"batch_size={batch_size} is larger than the {len(self)} rows of text: lower it, or context"
            )
        count = len(self) // batch_size if train else -(-self.num_rows // batch_size)
        if not 0 <= start <= count:
            raise ValueError(f"start={start} is not a batch of this pass: choose 0 to {count}")
        if not 0 <= epoch < 2**32 or not 0 <= seed < 2**64:
            raise ValueError(f"epoch={epoch} must be below 2**32, and seed={seed} below 2**64")
        return self._read(batch_size, epoch if train else None, seed, range(start, count))

    def _read(self, batch_size: int, epoch: int | None, seed: int, batches: range) -> Iterator[tuple[Tensor, Tensor]]:
        order = range(self.num_rows) if epoch is None else self._order(epoch, seed)
        for index in batches:
            rows = [self._row(row) for row in order[index * batch_size : (index + 1) * batch_size]]
            yield torch.stack([ids for ids, _ in rows]), torch.stack([target for _, target in rows])

    def _order(self, epoch: int, seed: int) -> list[int]:
        """The rows of an epoch: those places of the endless row of shuffled passes."""
        order: list[int] = []
        at, end = epoch * self.epoch_rows, (epoch + 1) * self.epoch_rows
        while at < end:
            number, place = divmod(at, self.num_rows)
            generator = make_generator(SHUFFLE_STREAM, seed=seed, epoch=number)
            found = torch.randperm(self.num_rows, generator=generator)[place : place + end - at].tolist()
            order += found
            at += len(found)
        return order

    def _row(self, index: int) -> tuple[Tensor, Tensor]:
        first = index * self.context
        found = torch.from_numpy(self._between(first, min(first + self.context + 1, self.num_tokens)).astype(np.int64))
        ids, target = found[:-1], found[1:]
        if missing := self.context - len(ids):
            ids = torch.cat([ids, ids.new_zeros(missing)])
            target = torch.cat([target, target.new_full((missing,), IGNORED)])
        return ids, target

    def _between(self, first: int, last: int) -> np.ndarray:
        """Tokens of the documents one after the other, from one place to before another."""
        parts = []
        document = int(np.searchsorted(self._bounds, first, side="right")) - 1
        while first < last:
            stop = min(last, int(self._bounds[document + 1]))
            at = int(self._starts[document]) + first - int(self._bounds[document])
            parts.append(self._tokens[at : at + stop - first])
            first, document = stop, document + 1
        return np.concatenate(parts)


def load_text(
    name: str,
    *,
    root: Path,
    context: int | None = None,
    tokenizer: str | os.PathLike[str] | None = None,
    num_train: int | None = None,
    num_validation: int | None = None,
    epoch_rows: int | None = None,
) -> TextBundle:
    """Loads text by name; see :func:`torchlocal.data.load_data`.

    Args:
        name: `text:stdlib`, `text:PATH`, `tokens:PATH` or `dataset:PATH`.
        root: folder that encoded text is kept in.
        context: tokens of a row, 256 by default.
        tokenizer: a tokenizer.json; by default the one that is shipped.
        num_train: use only the first so many rows.
        num_validation: use only the first so many rows of the validation documents.
        epoch_rows: rows of an epoch; by default all that are trained on.

    Raises:
        ValueError: an argument is wrong, or files are missing or damaged.
    """
    context = _CONTEXT if context is None else context
    whole("context", context, 1, 2**24)
    for argument, number in (("num_train", num_train), ("num_validation", num_validation), ("epoch_rows", epoch_rows)):
        whole(argument, number, 1, none=True, other=", or left out")
    kind, _, place = name.partition(":")
    path = Path(os.path.expanduser(place))
    used: Tokenizer | None = None if tokenizer is None else read_tokenizer(Path(os.path.expanduser(tokenizer)))
    if kind == "tokens":
        corpus = read_tokens(path)
        if used is None and corpus.tokenizer is not None and corpus.tokenizer.exists():
            used = read_tokenizer(corpus.tokenizer)
        if used is not None and used.vocabulary > corpus.vocabulary:
            raise ValueError(
                f"{name} has vocabulary={corpus.vocabulary}, and its tokenizer {used.vocabulary}: give the one that "
                "the tokens were made by"
            )
        told = f"{len(corpus.ends):,} documents"
    else:
        used = used or shipped_tokenizer()
        documents, told = _documents(kind, place, path)
        corpus = encoded(documents, used, root / "tokens")
    parts = _divide(corpus.ends, name)
    splits = {}
    for part, most in (("train", num_train), ("validation", num_validation), ("test", None)):
        splits[part] = TextSplit(
            corpus.tokens,
            parts[part],
            context=context,
            vocabulary=corpus.vocabulary,
            fill=part != "train",
            most=most,
            epoch_rows=epoch_rows if part == "train" else None,
        )
    rows = splits["train"].num_rows
    if rows < (num_train or 1):
        raise ValueError(
            f"{name} has {splits['train'].num_tokens:,} tokens to train on, which make {rows} rows of "
            f"context={context} and not num_train={num_train or 1}: lower one of them, or give more text"
        )
    told += f", {len(corpus.tokens):,} tokens of {corpus.vocabulary:,} kinds"
    return TextBundle(
        name=name,
        train=splits["train"],
        validation=splits["validation"],
        test=splits["test"],
        vocabulary=corpus.vocabulary,
        context=context,
        told=told,
        tokens={part: split.num_tokens for part, split in splits.items()},
        bytes_per_token=_bytes_per_token(corpus, parts),
        tokenizer="" if used is None else used.content,
        checksum=corpus.checksum,
    )


def text_sizes(name: str, *, context: int | None = None, tokenizer: str | os.PathLike[str] | None = None) -> TextBundle:
    """What a network and its batches need to know of text: vocabulary and context, without encoding it.

    Args:
        name: see :func:`load_text`.
        context: see :func:`load_text`.
        tokenizer: see :func:`load_text`.

    Returns:
        A bundle without splits.

    Raises:
        ValueError: an argument is wrong, or files are missing.
    """
    kind, _, place = name.partition(":")
    path = Path(os.path.expanduser(place))
    used = None if tokenizer is None else read_tokenizer(Path(os.path.expanduser(tokenizer)))
    if kind == "tokens":
        vocabulary, told = read_tokens(path).vocabulary, ""
    else:
        _, told = _documents(kind, place, path)
        vocabulary = (used or shipped_tokenizer()).vocabulary
    return TextBundle(
        name=name,
        train=None,
        validation=None,
        test=None,
        vocabulary=vocabulary,
        context=_CONTEXT if context is None else context,
        told=told,
        tokens={},
    )


def _documents(kind: str, place: str, path: Path) -> tuple[list[Document], str]:
    if kind == "dataset":
        documents = dataset_documents(path)
        return documents, f"{len(documents):,} documents"
    if place == "stdlib":
        documents = stdlib_documents()
        return documents, f"{len(documents):,} files of the standard library of Python {platform.python_version()}"
    documents = text_documents(path)
    return documents, f"{len(documents):,} documents"


def _divide(ends: np.ndarray, name: str) -> dict[str, np.ndarray]:
    """The documents of each part, by their tokens, `(first, after the last)`: no document is in two of them.

    A twentieth of the tokens is held out for testing and another for validation, document by document in an order that
    depends on nothing but their number. One that is much larger than that is trained on.

    Raises:
        ValueError: there are not three documents.
    """
    starts = np.concatenate([[0], ends[:-1]])
    sizes = ends - starts
    filled = np.flatnonzero(sizes)
    if len(filled) < 3:
        raise ValueError(
            f"{name} has {len(filled)} documents (a text file by itself: parts that end with a line), and training, "
            "validation and test need one each: give more"
        )
    order = filled[torch.randperm(len(filled), generator=make_generator(DOCUMENT_STREAM)).numpy()].tolist()
    share = int(sizes.sum()) / _HELD_OUT
    chosen: dict[str, list[int]] = {}
    for part, others in (("test", 2), ("validation", 1)):
        total, found = 0, list[int]()
        for document in order:
            fits = total < 0.75 * share and total + sizes[document] <= 1.5 * share
            if fits and len(found) + others < len(order):
                found.append(document)
                total += int(sizes[document])
        chosen[part] = found or [min(order, key=lambda document: sizes[document])]
        taken = set(chosen[part])
        order = [document for document in order if document not in taken]
    chosen["train"] = order
    return {part: np.stack([starts[found], ends[found]], axis=1) for part, found in chosen.items()}


def _bytes_per_token(corpus: TokenFile, parts: dict[str, np.ndarray]) -> dict[str, float]:
    """Of each part, or where only the sum is known, of all."""
    if corpus.num_bytes is None:
        return {}
    if len(corpus.num_bytes) < len(corpus.ends):
        return dict.fromkeys(parts, int(corpus.num_bytes.sum()) / len(corpus.tokens))
    found = {}
    for part, spans in parts.items():
        documents = np.searchsorted(corpus.ends, spans[:, 0], side="right")
        found[part] = int(corpus.num_bytes[documents].sum()) / int((spans[:, 1] - spans[:, 0]).sum())
    return found
