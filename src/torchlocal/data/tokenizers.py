"""Tokenizers: byte-pair encoding of our own for the one that is shipped, the `tokenizers` library for all others."""

from __future__ import annotations

import json
import re
import zlib
from collections.abc import Iterable, Sequence
from importlib import resources
from itertools import pairwise
from pathlib import Path
from typing import Any, Protocol

import numpy as np

__all__ = ["END_OF_TEXT", "PATTERN", "BytePairs", "Tokenizer", "read_tokenizer", "shipped_tokenizer"]

END_OF_TEXT = "<|end_of_text|>"
# The words that pairs are merged in: names, numbers, signs, each with one blank before; white space. In ASCII alone,
# so that bytes are divided as the characters of a text are, by Python's engine as by that of `tokenizers`.
PATTERN = r" ?[A-Za-z_]+| ?[0-9]+| ?[^ \t\n\r\fA-Za-z0-9_]+|[ \t\n\r\f]+(?![^ \t\n\r\f])|[ \t\n\r\f]+"
_ENDS = (END_OF_TEXT, "<|endoftext|>", "</s>", "<eos>", "<|eot_id|>", "<|im_end|>", "[SEP]")
_MOST_WORDS = 1_000_000  # whose tokens are remembered


class Tokenizer(Protocol):
    """Text to tokens and back.

    Attributes:
        vocabulary: number of tokens.
        end_of_text: the token that ends a document.
        content: the tokenizer.json that it was read from.
        checksum: of that.
    """

    vocabulary: int
    end_of_text: int
    content: str
    checksum: str

    def encode(self, text: bytes) -> np.ndarray:
        """The tokens of a text in UTF-8, uint16 or uint32 `(T,)`; none of them is special."""
        ...

    def decode(self, tokens: Sequence[int]) -> str:
        """The text of tokens, without special ones."""
        ...


def shipped_tokenizer() -> Tokenizer:
    """Byte-pair encoding of 1,024 tokens, trained on Python's standard library by scripts/build_tokenizer.py."""
    return _read((resources.files("torchlocal.data") / "stdlib_tokenizer.json").read_text(encoding="utf-8"), "shipped")


def read_tokenizer(path: Path) -> Tokenizer:
    """A tokenizer.json, the format of the `tokenizers` library, or a folder that holds one.

    Raises:
        ValueError: there is none, it is damaged, no token ends a text, or the library is absent and needed.
    """
    path = path / "tokenizer.json" if path.is_dir() else path
    try:
        content = path.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        reason = getattr(error, "strerror", None) or "it is no text"
        raise ValueError(f"tokenizer {path} cannot be read ({reason}): give a tokenizer.json") from error
    return _read(content, str(path))


def _read(content: str, told: str) -> Tokenizer:
    try:
        values = json.loads(content)
        if _is_byte_pairs(values):
            return BytePairs(values, content)
    except (ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
        raise ValueError(f"tokenizer {told} is damaged or no tokenizer.json: get it anew") from error
    return _OfLibrary(content, told)


def _is_byte_pairs(values: Any) -> bool:
    """Whether it is of the kind that scripts/build_tokenizer.py trains."""
    steps = (values["pre_tokenizer"] or {}).get("pretokenizers", [])
    return (
        values["model"]["type"] == "BPE"
        and [step["type"] for step in steps] == ["Split", "ByteLevel"]
        and steps[0]["pattern"] == {"Regex": PATTERN}
        and not any(values.get(name) for name in ("normalizer", "truncation", "padding"))
        and [token["content"] for token in values["added_tokens"]] == [END_OF_TEXT]
    )


class BytePairs:
    """Byte-pair encoding (Sennrich et al. 2016) of bytes, which needs no other package.

    Args:
        values: what the tokenizer.json holds.
        content: its text.
    """

    def __init__(self, values: Any, content: str) -> None:
        vocabulary, letters = values["model"]["vocab"], _letters()
        self.content, self.checksum = content, _checksum(content)
        self.vocabulary, self.end_of_text = len(vocabulary), vocabulary[END_OF_TEXT]
        if sorted(vocabulary.values()) != list(range(len(vocabulary))) or len(vocabulary) > 2**16:
            raise ValueError("its tokens are not numbered one by one")
        self._of_byte = [vocabulary[letters[byte]] for byte in range(256)]
        bytes_of = {letter: byte for byte, letter in enumerate(letters)}
        self._bytes = {
            number: bytes(bytes_of[letter] for letter in token)
            for token, number in vocabulary.items()
            if number != self.end_of_text
        }
        pairs = [tuple(pair.split(" ") if isinstance(pair, str) else pair) for pair in values["model"]["merges"]]
        self._merged = {
            (vocabulary[left], vocabulary[right]): (rank, vocabulary[left + right])
            for rank, (left, right) in enumerate(pairs)
        }
        self._words = re.compile(PATTERN.encode()).findall
        self._known: dict[bytes, bytes] = {}

    def encode(self, text: bytes) -> np.ndarray:
        """See :class:`Tokenizer`; takes any bytes."""
        if len(self._known) > _MOST_WORDS:
            self._known.clear()
        words, known = self._words(text), self._known
        for word in set(words) - known.keys():
            known[word] = np.array(self._merge([self._of_byte[byte] for byte in word]), np.uint16).tobytes()
        return np.frombuffer(b"".join(map(known.__getitem__, words)), np.uint16)

    def _merge(self, word: list[int]) -> list[int]:
        """Merge, again and again, all places of the pair that was learnt first."""
        while len(word) > 1:
            pairs = {pair for pair in pairwise(word) if pair in self._merged}
            if not pairs:
                break
            first = min(pairs, key=lambda pair: self._merged[pair][0])
            merged, i = [], 0
            while i < len(word):
                if tuple(word[i : i + 2]) == first:
                    merged.append(self._merged[first][1])
                    i += 2
                else:
                    merged.append(word[i])
                    i += 1
            word = merged
        return word

    def decode(self, tokens: Sequence[int]) -> str:
        """See :class:`Tokenizer`; bytes that are no UTF-8 become the sign for it."""
        return b"".join(self._bytes.get(token, b"") for token in tokens).decode("utf-8", errors="replace")


class _OfLibrary:
    """A tokenizer of the `tokenizers` library."""

    def __init__(self, content: str, told: str) -> None:
        try:
            from tokenizers import Tokenizer as Library
        except ImportError as error:
            raise ValueError(
                f"tokenizer {told} needs the package tokenizers ({error}): pip install 'torchlocal[text]', or leave "
                "tokenizer out for the one that is shipped"
            ) from error
        try:
            self._library = Library.from_str(content)
        except Exception as error:  # the library raises Exception itself
            reason = str(error).strip().split("\n")[0][:160]
            raise ValueError(f"tokenizer {told} is damaged or no tokenizer.json ({reason}): get it anew") from error
        self._library.no_truncation()
        self._library.no_padding()
        self._library.encode_special_tokens = True  # what looks like one in a text is text
        self.content, self.checksum = content, _checksum(content)
        self.vocabulary = max(self._library.get_vocab(with_added_tokens=True).values(), default=-1) + 1
        found = (self._library.token_to_id(name) for name in _ENDS)
        end = next((number for number in found if number is not None), None)
        if end is None:
            raise ValueError(
                f"tokenizer {told} has no token that ends a text: add one of {', '.join(_ENDS)} to its special tokens"
            )
        self.end_of_text: int = end

    def encode(self, text: bytes) -> np.ndarray:
        """See :class:`Tokenizer`."""
        ids = self._library.encode(text.decode("utf-8", errors="replace"), add_special_tokens=False).ids
        return np.array(ids, np.uint16 if self.vocabulary <= 2**16 else np.uint32)

    def decode(self, tokens: Sequence[int]) -> str:
        """See :class:`Tokenizer`."""
        found: str = self._library.decode(list(tokens), skip_special_tokens=True)
        return found


def _checksum(content: str) -> str:
    return f"{zlib.crc32(content.encode()):08x}"


def _letters() -> list[str]:
    """The letter that stands for each byte in the vocabulary (Radford et al. 2019: those that print are themselves)."""
    printing = [*range(33, 127), *range(161, 173), *range(174, 256)]
    others: Iterable[int] = (byte for byte in range(256) if byte not in printing)
    letters = {byte: chr(byte) for byte in printing} | {byte: chr(256 + i) for i, byte in enumerate(others)}
    return [letters[byte] for byte in range(256)]
