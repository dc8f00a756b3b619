"""Corpora: documents by name, and what their tokens are once encoded: a file that is mapped into memory."""

from __future__ import annotations

import contextlib
import hashlib
import json
import os
import platform
import sysconfig
import uuid
import zlib
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from itertools import accumulate, pairwise
from pathlib import Path
from typing import Any

import numpy as np

from torchlocal.data.folders import is_clutter
from torchlocal.data.tokenizers import Tokenizer

__all__ = ["Document", "TokenFile", "encoded", "read_tokens", "stdlib_documents", "text_documents", "write_tokens"]

_FORMAT = "torchlocal tokens"
_PIECES = 20  # that a text which is a single document is cut into
_CHUNK = 2**22


@dataclass(frozen=True)
class Document:
    """A text by name; `read` gives its bytes."""

    name: str
    read: Callable[[], bytes]


@dataclass(frozen=True, kw_only=True)
class TokenFile:
    """Encoded documents, one after the other, the token that ends a text after each.

    Args:
        tokens: of all documents `(T,)`, uint16 or uint32, mapped into memory.
        ends: for each document the index after its last token `(D,)`.
        vocabulary: number of tokens that there may be.
        end_of_text: the token that ends a document; None where that is not known.
        num_bytes: of the text of each document `(D,)`; None where that is not known.
        tokenizer: path of the tokenizer.json, if it is known.
        checksum: of the tokens.
    """

    tokens: np.ndarray
    ends: np.ndarray
    vocabulary: int
    end_of_text: int | None
    num_bytes: np.ndarray | None
    tokenizer: Path | None
    checksum: str


# --- documents ---


def stdlib_documents() -> list[Document]:
    """Python's standard library: every .py file of this installation without site-packages, in order of names."""
    root = Path(sysconfig.get_paths()["stdlib"])
    outside = ("site-packages", "dist-packages", "__pycache__")
    names = (path.relative_to(root) for path in root.rglob("*.py") if path.is_file())
    kept = sorted(name.as_posix() for name in names if not set(outside) & set(name.parts))
    if len(kept) < 100:
        raise ValueError(f"text:stdlib: {root} does not hold the source of Python {platform.python_version()}")
    return [Document(name, (root / name).read_bytes) for name in kept]


def text_documents(path: Path) -> list[Document]:
    """A text file, or every file of a folder, in order of their names; hidden ones are passed over.

    A file by itself is cut at ends of lines into 20 pieces of about the same length, each a document.

    Raises:
        ValueError: there is no text, or a file is something else than text in UTF-8.
    """
    if path.is_file():
        return _pieces(path)
    if not path.is_dir():
        raise ValueError(f"text:{path} does not exist: give a text file, or a folder of them")
    names = []
    for folder, inner, files in os.walk(path):
        inner[:] = [name for name in inner if not is_clutter(name)]
        names += [Path(folder, name).relative_to(path).as_posix() for name in files if not is_clutter(name)]
    if not names:
        raise ValueError(f"text:{path} holds no file: give a text file, or a folder of them")
    return [Document(name, partial(_text, path / name)) for name in sorted(names)]


def _pieces(path: Path) -> list[Document]:
    text = _text(path)
    marks = [0, *(len(text) * i // _PIECES for i in range(1, _PIECES))]
    cuts = sorted({text.find(b"\n", mark) + 1 if mark else 0 for mark in marks} | {len(text)})
    found = [text[a:b] for a, b in pairwise(cuts) if b > a]
    return [Document(f"{path.name}, part {i}", partial(bytes, part)) for i, part in enumerate(found, start=1)]


def _text(path: Path) -> bytes:
    if not path.is_file():  # a fifo, a socket, a device, a link to nothing
        raise ValueError(f"{path} is no file: remove it")
    try:
        text = path.read_bytes()
        text.decode("utf-8")
    except OSError as error:
        raise ValueError(f"{path} cannot be read ({error.strerror}): see to its permissions") from error
    except UnicodeDecodeError as error:
        raise ValueError(f"{path} is not text in UTF-8 (byte {error.start}): convert it, or take it away") from error
    if b"\0" in text:
        raise ValueError(f"{path} is not text: it holds zeros; take it away")
    return text


def dataset_documents(path: Path) -> list[Document]:
    """The column `text` of a data set that `datasets` saved to disk; of one in parts, the part `train`.

    Raises:
        ValueError: the package is absent, or there is no such data set.
    """
    try:
        import datasets
    except ImportError as error:
        raise ValueError(f"dataset:{path} needs the package datasets ({error}): pip install datasets") from error
    try:
        found: Any = datasets.load_from_disk(str(path))
    except Exception as error:  # of many kinds there
        reason = str(error).strip().split("\n")[0][:160]
        raise ValueError(
            f"dataset:{path} is none that save_to_disk wrote ({reason}): give the folder of one"
        ) from error
    if not hasattr(found, "column_names") or isinstance(found, dict):
        if "train" not in found:
            raise ValueError(f"dataset:{path} has the parts {', '.join(found)}, but no train: save that part by itself")
        found = found["train"]
    if "text" not in found.column_names:
        raise ValueError(
            f"dataset:{path} has the columns {', '.join(found.column_names)}, but no text: rename the one that is"
        )
    return [Document(str(i), partial(_row, found, i)) for i in range(len(found))]


def _row(rows: Any, index: int) -> bytes:
    return str(rows[index]["text"]).encode("utf-8", errors="replace")


# --- tokens ---


def encoded(documents: Sequence[Document], tokenizer: Tokenizer, folder: Path) -> TokenFile:
    """The tokens of documents, encoded once and kept in a folder; where that cannot be written, in memory.

    What is kept is found by the content of documents and tokenizer, and believed by its checksum only.

    Raises:
        ValueError: nothing is in the documents, or one cannot be read.
    """
    key = hashlib.sha256(f"{_FORMAT} {tokenizer.checksum}".encode())
    for document in documents:
        text = document.read()
        key.update(f"\0{document.name}\0{len(text)}\0".encode() + text)
    path = folder / f"{key.hexdigest()[:32]}.bin"
    if path.exists():
        with contextlib.suppress(ValueError, OSError):  # damaged: it is made anew
            return read_tokens(path)
    dtype = np.uint16 if tokenizer.vocabulary <= 2**16 else np.uint32
    sizes: list[int] = []

    def encode() -> Iterator[np.ndarray]:
        for document in documents:
            if text := document.read():
                sizes.append(len(text))
                yield np.append(tokenizer.encode(text), tokenizer.end_of_text).astype(dtype)

    vocabulary, end_of_text = tokenizer.vocabulary, tokenizer.end_of_text
    try:
        folder.mkdir(parents=True, exist_ok=True)
        write_tokens(path, encode(), vocabulary=vocabulary, end_of_text=end_of_text, num_bytes=sizes)
        return read_tokens(path)
    except OSError:
        sizes.clear()
        parts = list(encode())
        if not parts:
            raise ValueError("there is no text in any of the documents: give others") from None
        tokens = np.concatenate(parts)
        return TokenFile(
            tokens=tokens,
            ends=np.cumsum([len(part) for part in parts]),
            vocabulary=vocabulary,
            end_of_text=end_of_text,
            num_bytes=np.array(sizes),
            tokenizer=None,
            checksum=f"{zlib.crc32(tokens.tobytes()):08x}",
        )


def write_tokens(
    path: str | os.PathLike[str],
    documents: Iterable[np.ndarray],
    *,
    vocabulary: int,
    end_of_text: int | None = None,
    num_bytes: Sequence[int] | None = None,
    tokenizer: str | None = None,
) -> None:
    """Write tokens as `tokens:PATH` reads them: PATH, which ends in .bin, and a JSON beside it, whole or not at all.

    Args:
        path: the file.
        documents: the tokens of each document, the one that ends it included.
        vocabulary: number of tokens that there may be: uint16 if they are at most 65,536, else uint32.
        end_of_text: the token that ends a document.
        num_bytes: of the text of each document, read when all documents are.
        tokenizer: path of the tokenizer.json, as seen from the folder of the file.

    Raises:
        ValueError: there are no tokens, or one is not below `vocabulary`.
        OSError: something cannot be written.
    """
    path = Path(path)
    dtype = np.dtype("<u2" if vocabulary <= 2**16 else "<u4")
    checksum, lengths = 0, list[int]()
    partials = [path.with_name(f".{path.stem}-{uuid.uuid4().hex}{ending}") for ending in (".bin", ".json")]
    try:
        with open(partials[0], "xb") as file:
            for tokens in documents:
                if len(tokens) and int(tokens.max()) >= vocabulary:
                    raise ValueError(f"{path}: the token {int(tokens.max())} is not below vocabulary={vocabulary}")
                content = np.asarray(tokens).astype(dtype).tobytes()
                checksum = zlib.crc32(content, checksum)
                lengths.append(len(tokens))
                file.write(content)
            file.flush()
            os.fsync(file.fileno())
        if not sum(lengths):
            raise ValueError("there is no text in any of the documents: give others")
        values = {
            "format": _FORMAT,
            "dtype": dtype.name,
            "vocabulary": vocabulary,
            "end_of_text": end_of_text,
            "ends": list(accumulate(lengths)),
            "num_bytes": None if num_bytes is None else list(num_bytes),
            "tokenizer": tokenizer,
            "checksum": f"{checksum:08x}",
        }
        partials[1].write_text(json.dumps(values) + "\n", encoding="utf-8")
        os.replace(partials[1], path.with_suffix(".json"))
        os.replace(partials[0], path)  # last: what is found by its name has its JSON
    finally:
        for partial_ in partials:
            partial_.unlink(missing_ok=True)


def read_tokens(path: Path) -> TokenFile:
    """A file of tokens, mapped into memory, with what the JSON beside it says.

    The JSON says `dtype` ("uint16" or "uint32", little-endian) and `vocabulary`, and where documents end: `ends`, a
    list, or `end_of_text`, the token that ends each. It may say `num_bytes` (of the text, of each document or of all),
    `tokenizer` (path of the tokenizer.json, from the folder of the file) and `checksum` (CRC-32 of the file, in hex).

    Raises:
        ValueError: a file is absent or damaged, or the JSON lacks something.
    """
    told = path.with_suffix(".json")
    try:
        values = json.loads(told.read_text(encoding="utf-8"))
        size = path.stat().st_size
    except OSError as error:
        raise ValueError(
            f"tokens:{path} needs {path.name} and {told.name} beside it, and {error.filename} cannot be read "
            f"({error.strerror}): torchlocal.data.write_tokens writes both"
        ) from error
    except (ValueError, RecursionError) as error:
        raise ValueError(f"{told} is damaged: write it anew") from error
    try:
        dtype: np.dtype[Any] = np.dtype({"uint16": "<u2", "uint32": "<u4"}[values["dtype"]])
        vocabulary, end_of_text = int(values["vocabulary"]), values.get("end_of_text")
        ends, num_bytes = values.get("ends"), values.get("num_bytes")
        ends = None if ends is None else np.array(ends, np.int64).reshape(-1)
        num_bytes = None if num_bytes is None else np.atleast_1d(np.array(num_bytes, np.int64))
        tokenizer = values.get("tokenizer")
        tokenizer = None if tokenizer is None else told.parent / str(tokenizer)
        end_of_text = None if end_of_text is None else int(end_of_text)
    except (KeyError, TypeError, ValueError, OverflowError, AttributeError) as error:
        raise ValueError(
            f'{told} must hold "dtype": "uint16" or "uint32", "vocabulary": a number, and "ends": a list or '
            f'"end_of_text": a number ({type(error).__name__}: {error})'
        ) from error
    if not size or size % dtype.itemsize:
        raise ValueError(f"{path} holds {size} bytes, which are no tokens of {dtype.name}: see what {told} says")
    tokens = np.memmap(path, dtype, mode="r")
    checksum, largest = 0, 0
    for start in range(0, len(tokens), _CHUNK):
        chunk = tokens[start : start + _CHUNK]
        checksum, largest = zlib.crc32(chunk.tobytes(), checksum), max(largest, int(chunk.max()))
    if values.get("checksum") not in (None, f"{checksum:08x}"):
        raise ValueError(f"{path} is damaged: its checksum is {checksum:08x}, and {told} says {values['checksum']}")
    if largest >= vocabulary:
        raise ValueError(f"{path} holds the token {largest}, and {told} says vocabulary={vocabulary}: correct one")
    if ends is None and end_of_text is None:
        raise ValueError(f'{told} does not say where documents end: give "ends", or "end_of_text"')
    if ends is None:
        ends = np.flatnonzero(tokens == end_of_text) + 1
        ends = ends if len(ends) and ends[-1] == len(tokens) else np.append(ends, len(tokens))
    if not len(ends) or ends[-1] != len(tokens) or (np.diff(ends, prepend=0) < 0).any():
        raise ValueError(f"{told}: ends must rise to the {len(tokens):,} tokens of {path.name}")
    if num_bytes is not None and len(num_bytes) not in (1, len(ends)):
        raise ValueError(f"{told}: num_bytes must be one number, or one for each of the {len(ends)} documents")
    return TokenFile(
        tokens=tokens,
        ends=ends,
        vocabulary=vocabulary,
        end_of_text=end_of_text,
        num_bytes=num_bytes,
        tokenizer=tokenizer,
        checksum=f"{checksum:08x}",
    )
