"""The shipped corpus: public domain, held out for real, long enough, and small."""

import json
import lzma

import pytest

from conf.schema import DataConfig, SourceConfig
from data.sources import SHIPPED_TEXT, open_validation
from data.tokenizer import EMBEDDED, load_tokenizer

BOOKS = {
    name: [json.loads(line) for line in lzma.decompress(path.read_bytes()).decode().split("\n")[:-1]]
    for name, path in SHIPPED_TEXT.items()
}
TRAIN, HELD_OUT = BOOKS["embedded"], BOOKS["embedded-validation"]


def shingles(text, words=20):
    """Every run of 20 words, without case and punctuation at their ends."""
    parts = [w.strip(".,;:!?'\"()_-[]").lower() for w in text.split()]
    return {hash(tuple(parts[i : i + words])) for i in range(0, len(parts) - words)}


def test_held_out_documents_are_not_in_training():
    """Catches a held-out work in training, by id, by title or by its text under another id."""
    for key in ("id", "title", "text"):
        assert not {b[key] for b in TRAIN} & {b[key] for b in HELD_OUT}
    assert len({b["id"] for b in TRAIN + HELD_OUT}) == len(TRAIN + HELD_OUT) == 59
    trained = set().union(*(shingles(b["text"]) for b in TRAIN))
    for book in HELD_OUT:
        own = shingles(book["text"])
        assert len(own) > 10_000 and len(own & trained) < 0.002 * len(own), book["title"]


def test_everything_is_public_domain_and_small():
    """Catches a text that may not be shipped, and a corpus that bloats the package."""
    assert all(book["license"].startswith("public domain") and book["source"] for book in TRAIN + HELD_OUT)
    assert sum(path.stat().st_size for path in SHIPPED_TEXT.values()) < 6e6


@pytest.mark.parametrize("path", ["embedded", "embedded-validation"])
def test_validation_on_embedded_never_means_the_training_text(path, tmp_path):
    """Catches a held-out loss that is measured on the books of the training set."""
    source = open_validation(DataConfig(validation=SourceConfig(path=path), cache_dir=str(tmp_path)))
    assert source.ids == [b["id"] for b in HELD_OUT]


@pytest.mark.parametrize(("tokenizer", "long"), [("bytes", 17), ("bpe-4k", 16)])
def test_enough_held_out_documents_reach_32k(tokenizer, long):
    """Catches a held-out set too small for its purpose: at least 16 works at 32K tokens, all at 8K."""
    encode = load_tokenizer(tokenizer).document
    lengths = [len(encode(book["text"][:200_000])) for book in HELD_OUT]
    assert sum(n > 32_768 for n in lengths) == long >= 16
    assert min(lengths) > 8_192


def test_the_readme_counts_what_is_there():
    """Catches a table that was not brought up to date with the files."""
    readme = (EMBEDDED / "README.md").read_text()
    for name, books in BOOKS.items():
        size = sum(len(b["text"].encode()) for b in books)
        assert f"| `{SHIPPED_TEXT[name].name}` | {len(books)} | {size / 1e6:.1f} MB |" in readme
        tokens = sum(len(load_tokenizer("bytes").document(b["text"])) for b in books)
        assert f"{tokens:,}" in readme
