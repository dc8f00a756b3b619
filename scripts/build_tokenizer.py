"""Trains the tokenizer that is shipped: byte-pair encoding of 1,024 tokens, on the source of Python's standard library.

The same version of Python and of the `tokenizers` library gives the same bytes:

    python scripts/build_tokenizer.py             # writes src/torchlocal/data/stdlib_tokenizer.json
    python scripts/build_tokenizer.py --check     # compares with it and writes nothing
"""

from __future__ import annotations

import argparse
import os
import platform
import sys
from pathlib import Path

import tokenizers
from tokenizers import Regex, decoders, models, pre_tokenizers, trainers

SOURCE = Path(__file__).resolve().parents[1] / "src"
sys.path.insert(0, str(SOURCE))

from torchlocal.data.corpora import stdlib_documents  # noqa: E402
from torchlocal.data.tokenizers import END_OF_TEXT, PATTERN  # noqa: E402

TARGET = SOURCE / "torchlocal" / "data" / "stdlib_tokenizer.json"


def build(size: int) -> str:
    """Trains on all documents of `text:stdlib` and returns the tokenizer.json."""
    tokenizer = tokenizers.Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Split(Regex(PATTERN), behavior="isolated"),
            pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
        ]
    )
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=size,
        special_tokens=[END_OF_TEXT],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    texts = (document.read().decode("utf-8", errors="replace") for document in stdlib_documents())
    tokenizer.train_from_iterator(texts, trainer)
    content: str = tokenizer.to_str(pretty=True)
    return content + "\n"


def main() -> int:
    """Builds or checks the tokenizer."""
    assert __doc__ is not None
    summary, _, details = __doc__.partition("\n")
    parser = argparse.ArgumentParser(
        description=summary, epilog=details, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--size", type=int, default=1024, help="number of tokens")
    parser.add_argument("--out", type=Path, default=TARGET, help="file to write or to check")
    parser.add_argument("--check", action="store_true", help="compare with the file instead of writing it")
    options = parser.parse_args()
    content = build(options.size).encode()
    told = f"Python {platform.python_version()}, tokenizers {tokenizers.__version__}"
    if options.check:
        same = options.out.read_bytes() == content
        print(f"{options.out} {'is' if same else 'differs from'} what {told} make of it")
        return 0 if same else 1
    partial = options.out.with_suffix(".partial")
    partial.write_bytes(content)
    os.replace(partial, options.out)
    print(f"{options.out}: {len(content)} bytes, by {told}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
