"""Text as data: tokens that are the text's, rows that hold every token once, parts that share no document."""

from __future__ import annotations

import json
import sys
import types
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from torchlocal.data import TextBundle, corpora, load_data, write_tokens
from torchlocal.data.corpora import encoded, read_tokens, stdlib_documents, text_documents
from torchlocal.data.tokenizers import read_tokenizer, shipped_tokenizer

WORDS = [
    "def", "return", "self", "None", "import", "for", "in", "if", "else", "x", "y", "0", "1", "(", ")", ":", "=", "+",
    "#", "äöü", "東京",
]  # fmt: skip


def write_folder(folder: Path, count: int = 40) -> Path:
    """Files of random words, of different lengths."""
    draw = torch.Generator().manual_seed(0)
    for i in range(count):
        words = [WORDS[k] for k in torch.randint(len(WORDS), (20 + 7 * i,), generator=draw).tolist()]
        path = folder / f"package{i % 3}" / f"file{i}.py"
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text("".join(f"{'    ' * (k % 3)}{word}\n" for k, word in enumerate(words)), encoding="utf-8")
    return folder


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_folder(tmp_path_factory.mktemp("texts"))


def load(name: str, root: Path, **options: Any) -> TextBundle:
    data = load_data(name, root=root, **options)
    assert isinstance(data, TextBundle)
    return data


def tokens_of(split: Any, batch_size: int = 3) -> list[int]:
    """The tokens of a part, put together from its batches: first token, then all targets that count."""
    pairs = list(split.batches(batch_size, train=False))
    targets = torch.cat([y for _, y in pairs]).flatten()
    return [int(pairs[0][0][0, 0]), *targets[targets != -100].tolist()]


# --- tokenizers ---


def test_the_shipped_tokenizer_is_that_of_the_library() -> None:
    """Byte-pair encoding of our own against the library's, on the library's reading of the same file."""
    library = pytest.importorskip("tokenizers")
    own = shipped_tokenizer()
    other = library.Tokenizer.from_str(own.content)
    assert own.vocabulary == other.get_vocab_size() == 1024
    texts = [document.read() for document in stdlib_documents()[::60]]
    texts += ["  \t\n x  \r\n\n  y_1 = 'äöü 東京 \U0001f600'  \x1c\x85\u2003z\f \n".encode(), b"", b" ", b"\n\n"]
    assert len(texts) > 10
    for text in texts:
        ids = own.encode(text).tolist()
        assert ids == other.encode(text.decode(), add_special_tokens=False).ids
        assert own.decode(ids) == text.decode() == other.decode(ids)


def test_any_bytes_come_back() -> None:
    own = shipped_tokenizer()
    text = bytes(range(256)) * 2
    assert b"".join(own._bytes[token] for token in own.encode(text).tolist()) == text  # type: ignore[attr-defined]
    assert own.decode([own.end_of_text, *own.encode(b"x = 1").tolist()]) == "x = 1"
    assert own.end_of_text not in own.encode(b"<|end_of_text|>").tolist()  # in a text it is text


def test_a_tokenizer_of_the_library(tmp_path: Path, folder: Path) -> None:
    library = pytest.importorskip("tokenizers")
    model = library.models.WordLevel({"<unk>": 0, "def": 1, "</s>": 2, "x": 3}, unk_token="<unk>")
    made = library.Tokenizer(model)
    made.pre_tokenizer = library.pre_tokenizers.Whitespace()
    made.add_special_tokens(["</s>"])
    made.save(str(tmp_path / "tokenizer.json"))
    read = read_tokenizer(tmp_path)
    assert (read.vocabulary, read.end_of_text) == (4, 2)
    assert read.encode(b"def x y </s>").tolist()[:3] == [1, 3, 0] and 2 not in read.encode(b"</s>").tolist()
    data = load(f"text:{folder}", tmp_path, context=8, tokenizer=tmp_path / "tokenizer.json")
    assert data.vocabulary == 4 and data.tokenizer == (tmp_path / "tokenizer.json").read_text()
    assert set(tokens_of(data.test)) == {0, 1, 2, 3}


@pytest.mark.parametrize(
    ("content", "told"),
    [("{", "is damaged or no tokenizer.json"), ("[1]", "is damaged or no tokenizer.json"), (None, "cannot be read")],
)
def test_a_tokenizer_that_is_none(content: str | None, told: str, tmp_path: Path) -> None:
    if content is not None:
        (tmp_path / "tokenizer.json").write_text(content)
    with pytest.raises(ValueError, match=told):
        read_tokenizer(tmp_path / "tokenizer.json")


def test_a_tokenizer_without_an_end_or_without_its_library(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    library = pytest.importorskip("tokenizers")
    library.Tokenizer(library.models.WordLevel({"a": 0}, unk_token="a")).save(str(tmp_path / "tokenizer.json"))
    with pytest.raises(ValueError, match=r"has no token that ends a text: add one of <\|end_of_text\|>"):
        read_tokenizer(tmp_path)
    monkeypatch.setitem(sys.modules, "tokenizers", None)
    with pytest.raises(ValueError, match=r"needs the package tokenizers .*torchlocal\[text\]"):
        read_tokenizer(tmp_path)
    assert shipped_tokenizer().vocabulary == 1024  # without it


# --- documents ---


def test_the_standard_library() -> None:
    documents = stdlib_documents()
    names = [document.name for document in documents]
    assert names == sorted(names) and len(set(names)) == len(names) > 500 and "asyncio/events.py" in names
    assert not any("site-packages" in name or not name.endswith(".py") for name in names)
    import abc

    assert abc.__file__ and documents[names.index("abc.py")].read() == Path(abc.__file__).read_bytes()


def test_a_file_is_cut_at_ends_of_lines(tmp_path: Path) -> None:
    path = tmp_path / "text.txt"
    path.write_bytes(b"".join(b"line %d\n" % i for i in range(1000)) + b"no end")
    parts = [document.read() for document in text_documents(path)]
    assert len(parts) == 20 and b"".join(parts) == path.read_bytes()
    assert all(part.endswith(b"\n") for part in parts[:-1]) and max(map(len, parts)) < 1.1 * min(map(len, parts))


def test_hidden_files_and_clutter_are_passed_over(tmp_path: Path) -> None:
    for name in ("b.txt", ".hidden", ".git/config", "__pycache__/x", "a/c.md"):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_text(name)
    assert [document.name for document in text_documents(tmp_path)] == ["a/c.md", "b.txt"]


@pytest.mark.parametrize(
    ("content", "told"),
    [(b"\xff\xfe", "is not text in UTF-8 .byte 0.: convert it"), (b"a\0b", "is not text: it holds zeros")],
)
def test_what_is_no_text_is_refused(content: bytes, told: str, tmp_path: Path) -> None:
    (tmp_path / "a.txt").write_text("text")
    (tmp_path / "b.bin").write_bytes(content)
    with pytest.raises(ValueError, match=f"b.bin {told}"):
        load(f"text:{tmp_path}", tmp_path / "root")
    assert not list(tmp_path.glob("root/tokens/*"))


def test_a_saved_data_set(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Against a stand-in for the package, which is large and optional."""

    class Rows(list[dict[str, str]]):
        column_names = ("text", "url")

    rows = Rows({"text": f"row {i} " * 40, "url": ""} for i in range(30))
    package: Any = types.ModuleType("datasets")
    package.load_from_disk = lambda path: {"train": rows, "test": Rows()}
    monkeypatch.setitem(sys.modules, "datasets", package)
    data = load(f"dataset:{tmp_path}", tmp_path, context=16)
    assert data.told.startswith("30 documents") and "row 1" in shipped_tokenizer().decode(tokens_of(data.train))
    package.load_from_disk = lambda path: {"all": rows}
    with pytest.raises(ValueError, match="has the parts all, but no train"):
        load(f"dataset:{tmp_path}", tmp_path)
    monkeypatch.setitem(sys.modules, "datasets", None)
    with pytest.raises(ValueError, match="needs the package datasets"):
        load(f"dataset:{tmp_path}", tmp_path)


# --- tokens on disk ---


def test_text_is_encoded_once(folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    tokenizer, documents = shipped_tokenizer(), text_documents(folder)
    first = encoded(documents, tokenizer, tmp_path)
    expected = [
        token for document in documents for token in [*tokenizer.encode(document.read()), tokenizer.end_of_text]
    ]
    assert first.tokens.tolist() == expected and first.tokens.dtype == np.uint16
    assert first.num_bytes is not None
    assert first.num_bytes.tolist() == [len(document.read()) for document in documents]
    assert sorted(path.suffix for path in tmp_path.iterdir()) == [".bin", ".json"]  # and nothing half written

    calls = []
    real = type(tokenizer).encode
    monkeypatch.setattr(type(tokenizer), "encode", lambda self, text: calls.append(1) or real(self, text))
    again = encoded(documents, tokenizer, tmp_path)
    assert not calls and again.tokens.tolist() == expected and again.checksum == first.checksum

    path = next(tmp_path.glob("*.bin"))  # a bit that flips is noticed, and mended
    content = bytearray(path.read_bytes())
    content[100] ^= 1
    del first, again
    path.write_bytes(content)
    assert encoded(documents, tokenizer, tmp_path).tokens.tolist() == expected and len(calls) == len(documents)
    assert encoded(documents[1:], tokenizer, tmp_path).tokens.tolist() != expected  # other text, other file
    assert len(list(tmp_path.glob("*.bin"))) == 2


def test_where_nothing_can_be_written_text_is_encoded_in_memory(folder: Path, tmp_path: Path) -> None:
    (tmp_path / "file").write_text("in the way")
    kept = load(f"text:{folder}", tmp_path / "root", context=16)
    held = load(f"text:{folder}", tmp_path / "file", context=16)
    assert (held.checksum, held.tokens, held.bytes_per_token) == (kept.checksum, kept.tokens, kept.bytes_per_token)
    assert tokens_of(held.validation) == tokens_of(kept.validation)


@pytest.mark.parametrize("vocabulary", [300, 70_000])
def test_tokens_that_were_written(vocabulary: int, tmp_path: Path) -> None:
    draw = np.random.default_rng(0)
    documents = [np.append(draw.integers(1, vocabulary, size), 0) for size in (30, 7, 90, 4, 25, 60, 31, 33)]
    write_tokens(tmp_path / "a.bin", documents, vocabulary=vocabulary, end_of_text=0)
    data = load(f"tokens:{tmp_path / 'a.bin'}", tmp_path, context=8)
    assert data.vocabulary == vocabulary and data.bytes_per_token == {} and data.tokenizer == ""
    assert read_tokens(tmp_path / "a.bin").tokens.tolist() == np.concatenate(documents).tolist()
    told = json.loads((tmp_path / "a.json").read_text())
    assert told["dtype"] == ("uint16" if vocabulary < 2**16 else "uint32")
    del told["ends"], told["checksum"]  # as others may write it
    (tmp_path / "a.json").write_text(json.dumps(told | {"num_bytes": 1000}))
    other = load(f"tokens:{tmp_path / 'a.bin'}", tmp_path, context=8)
    assert tokens_of(other.test) == tokens_of(data.test)
    assert other.bytes_per_token == dict.fromkeys(("train", "validation", "test"), 1000 / sum(map(len, documents)))


@pytest.mark.parametrize(
    ("change", "told"),
    [
        ({"dtype": "int64"}, 'must hold "dtype": "uint16" or "uint32"'),
        ({"vocabulary": 20}, r"holds the token 2\d, and .* says vocabulary=20"),
        ({"vocabulary": None}, "must hold"),
        ({"ends": None}, 'does not say where documents end: give "ends", or "end_of_text"'),
        ({"ends": [5, 3, 30]}, "ends must rise to the 30 tokens"),
        ({"ends": [10, 20]}, "ends must rise to the 30 tokens"),
        ({"num_bytes": [1, 2]}, "num_bytes must be one number, or one for each of the 3 documents"),
        ({"checksum": "00000000"}, "is damaged: its checksum is"),
        ({"dtype": "uint32"}, "is damaged|holds the token"),
        (None, "is damaged: write it anew"),
    ],
)
def test_tokens_that_are_damaged(change: dict[str, Any] | None, told: str, tmp_path: Path) -> None:
    write_tokens(tmp_path / "a.bin", np.arange(30).reshape(3, 10), vocabulary=30)
    values = json.loads((tmp_path / "a.json").read_text())
    (tmp_path / "a.json").write_text("{" if change is None else json.dumps(values | change))
    with pytest.raises(ValueError, match=told):
        read_tokens(tmp_path / "a.bin")


def test_tokens_that_are_absent(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"needs a.bin and a.json beside it, and .* cannot be read"):
        read_tokens(tmp_path / "a.bin")
    with pytest.raises(ValueError, match="the token 30 is not below vocabulary=30"):
        write_tokens(tmp_path / "a.bin", [np.array([30])], vocabulary=30)
    assert not list(tmp_path.iterdir())


# --- parts and rows ---


def test_no_document_is_in_two_parts_and_none_is_lost(folder: Path, tmp_path: Path) -> None:
    data = load(f"text:{folder}", tmp_path, context=5)
    tokenizer = shipped_tokenizer()
    whole = {part: tokens_of(getattr(data, part)) for part in ("validation", "test")}
    # Of the part to be trained on the rest that does not fill a row is left out.
    train = data.train._between(0, data.train.num_tokens).tolist()
    whole["train"] = train
    seen = tokens_of(data.train)
    assert seen == train[: len(seen)] and 0 <= len(train) - len(seen) < 5
    documents: dict[str, list[list[int]]] = {}
    for part, tokens in whole.items():
        assert tokens[-1] == tokenizer.end_of_text and len(tokens) == data.tokens[part]
        ends = [0, *(i + 1 for i, token in enumerate(tokens) if token == tokenizer.end_of_text)]
        documents[part] = [tokens[a:b] for a, b in pairwise(ends)]
    expected = [
        [*tokenizer.encode(document.read()).tolist(), tokenizer.end_of_text] for document in text_documents(folder)
    ]
    found = [document for part in documents.values() for document in part]
    assert sorted(found) == sorted(expected)  # all different, each once
    total = sum(map(len, expected))
    for part in ("validation", "test"):
        assert 0.5 * total / 20 < data.tokens[part] <= 1.5 * total / 20
        places = sorted(map(expected.index, documents[part]))
        assert places[-1] - places[0] >= len(places)  # drawn, and not cut off at an end
        size = sum(len(tokenizer.decode(document).encode()) for document in documents[part])
        assert data.bytes_per_token[part] == size / data.tokens[part]


def test_a_document_that_is_most_of_all_is_trained_on(tmp_path: Path) -> None:
    sizes = [5, 2000, 6, 7]
    write_tokens(tmp_path / "a.bin", [np.full(size, i) for i, size in enumerate(sizes)], vocabulary=4)
    data = load(f"tokens:{tmp_path / 'a.bin'}", tmp_path, context=4)
    assert set(tokens_of(data.train)) == {1}
    assert sum(data.tokens.values()) == sum(sizes) and min(data.tokens.values()) >= 5


def test_rows_hold_every_token_once(tmp_path: Path) -> None:
    """By hand: numbered tokens, and where each of them is."""
    write_tokens(tmp_path / "a.bin", [np.arange(i, i + 10) for i in range(0, 400, 10)], vocabulary=400)
    data = load(f"tokens:{tmp_path / 'a.bin'}", tmp_path, context=7)
    text = data.validation._between(0, 20).tolist()
    assert data.tokens["validation"] == 20 and len(data.validation) == 3  # 19 targets in rows of 7
    (x, y), *rest = data.validation.batches(8, train=False)
    assert not rest and x.dtype == y.dtype == torch.int64 and x.shape == y.shape == (3, 7)
    assert x.flatten()[:19].tolist() == text[:19] and y.flatten()[:19].tolist() == text[1:]
    assert y.flatten()[19:].tolist() == [-100, -100] and 0 <= int(x.min()) <= int(x.max()) < 400
    few = load(f"tokens:{tmp_path / 'a.bin'}", tmp_path, context=7, num_validation=2, num_train=4)
    assert tokens_of(few.validation) == text[:15] and len(few.train) == few.train.num_rows == 4


def rows(split: Any, **options: Any) -> list[Tensor]:
    return [torch.cat([x, y], 1) for x, y in split.batches(4, train=True, **options)]


def test_epochs_are_pure_and_shuffled(folder: Path, tmp_path: Path) -> None:
    split = load(f"text:{folder}", tmp_path, context=16).train
    first, second, other = rows(split, epoch=0, seed=1), rows(split, epoch=1, seed=1), rows(split, epoch=0, seed=2)
    assert len(first) == len(split) // 4 and all(map(torch.equal, first, rows(split, epoch=0, seed=1)))
    assert not torch.equal(torch.cat(first), torch.cat(second)) and not torch.equal(torch.cat(first), torch.cat(other))
    for start in (1, len(first) - 1, len(first)):
        rest = rows(split, epoch=1, seed=1, start=start)
        assert len(rest) == len(first) - start and all(map(torch.equal, rest, second[start:]))
    before = torch.get_rng_state()
    rows(split)
    assert torch.equal(before, torch.get_rng_state())


@pytest.mark.parametrize("epoch_rows", [5, 24, 40])
def test_short_epochs_go_through_all_rows(epoch_rows: int, tmp_path: Path) -> None:
    """One after the other they are the passes over all rows, cut elsewhere."""
    write_tokens(tmp_path / "a.bin", [np.arange(i, i + 10) for i in range(0, 400, 10)], vocabulary=400)
    name = f"tokens:{tmp_path / 'a.bin'}"
    whole = load(name, tmp_path, context=14, num_train=24).train
    parts = load(name, tmp_path, context=14, num_train=24, epoch_rows=epoch_rows).train
    assert len(parts) == epoch_rows and parts.num_rows == 24

    def order(split: Any, epochs: int) -> list[Tensor]:
        return [x for epoch in range(epochs) for x, _ in split.batches(1, epoch=epoch, train=True, seed=3)]

    expected = order(whole, 5)
    found = order(parts, 120 // epoch_rows)
    assert len(found) == 120 // epoch_rows * epoch_rows
    assert all(map(torch.equal, found, expected))
    assert len({int(x[0, 0]) for x in expected[:24]}) == 24


@pytest.mark.parametrize(
    ("name", "options", "told"),
    [
        ("text:{}/nowhere", {}, "does not exist: give a text file, or a folder"),
        ("text:{}", {"context": 0}, "context=0 must be a whole number of at least 1"),
        ("text:{}", {"context": 100_000}, "make 0 rows of context=100000 and not num_train=1"),
        ("text:{}", {"num_train": 10**6}, "and not num_train=1000000: lower one of them"),
        ("text:{}", {"epoch_rows": 0}, "epoch_rows=0 must be"),
        ("text:{}", {"image_size": 8}, "image_size=8 means nothing to text"),
        ("text:{}", {"tokenizer": "/nowhere.json"}, "tokenizer /nowhere.json cannot be read"),
        ("digits", {"context": 8}, "context=8 is for text, and data='digits' is none"),
        ("words", {}, "data 'words' is unknown.* or text: text:stdlib, text:PATH"),
    ],
)
def test_wrong_arguments(name: str, options: dict[str, Any], told: str, folder: Path, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=told):
        load_data(name.format(folder), root=tmp_path, **options)


def test_too_few_documents(tmp_path: Path) -> None:
    (tmp_path / "texts").mkdir()
    for name in "ab":
        (tmp_path / "texts" / name).write_text("some text\n" * 50)
    with pytest.raises(ValueError, match=r"has 2 documents .*need one each: give more"):
        load(f"text:{tmp_path / 'texts'}", tmp_path)
    (tmp_path / "texts" / "empty").write_text("")
    assert corpora.text_documents(tmp_path / "texts")[2].read() == b""
    with pytest.raises(ValueError, match="has 2 documents"):
        load(f"text:{tmp_path / 'texts'}", tmp_path)


@pytest.mark.parametrize(
    ("options", "told"),
    [
        ({"batch_size": 0}, "batch_size=0"),
        ({"batch_size": 10**6}, "is larger than"),
        ({"batch_size": 4, "start": 10**6}, "is not a batch of this pass"),
    ],
)
def test_wrong_batches(options: dict[str, int], told: str, folder: Path, tmp_path: Path) -> None:
    split = load(f"text:{folder}", tmp_path, context=16).train
    with pytest.raises(ValueError, match=told):
        split.batches(**options, train=True)
