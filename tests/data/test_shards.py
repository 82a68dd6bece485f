"""Token shards: what is written is read, and damage is found and named."""

import json

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from data.errors import DataError
from data.shards import TokenShards, trim_shard, write_meta, write_shard
from data.tokenizer import load_tokenizer

BYTES = load_tokenizer("bytes")


def write(directory, shards):
    """shards: a list of lists of texts; ids are "shard.place"."""
    directory.mkdir(parents=True, exist_ok=True)
    records = [
        write_shard(directory, n, [BYTES.document(t) for t in texts], [f"{n}.{i}" for i in range(len(texts))])
        for n, texts in enumerate(shards)
    ]
    return write_meta(directory, BYTES, records, {})


@settings(deadline=None, max_examples=8)
@given(st.lists(st.lists(st.text(max_size=20), min_size=1, max_size=5), min_size=1, max_size=4), st.data())
def test_round_trip(tmp_path_factory, shards, data):
    """Catches offsets that slip across documents or shards."""
    directory = tmp_path_factory.mktemp("shards")
    write(directory, shards)
    read = TokenShards(directory, check_tokens=True)
    texts = [text for texts in shards for text in texts]
    wanted = [BYTES.document(text) for text in texts]
    assert read.lengths.tolist() == [len(w) for w in wanted]
    assert read.ids == [f"{n}.{i}" for n, texts in enumerate(shards) for i in range(len(texts))]
    for document, tokens in enumerate(wanted):
        stop = data.draw(st.integers(0, len(tokens)))
        start = data.draw(st.integers(0, stop))
        assert np.array_equal(read.tokens(document, start, stop), tokens[start:stop])


def test_large_vocabularies_take_four_bytes(tmp_path, monkeypatch):
    """Catches ids above 65,535 cut to 16 bits."""
    monkeypatch.setattr(BYTES, "vocab_size", 65_537)
    write_meta(tmp_path, BYTES, [write_shard(tmp_path, 0, [np.array([65_536, 1], BYTES.dtype)], ["x"])], {})
    assert TokenShards(tmp_path).tokens(0, 0, 2).tolist() == [65_536, 1]


@pytest.mark.parametrize(("limit", "kept"), [(1, 1), (4, 1), (5, 2), (8, 2), (9, 3), (99, 3)])
def test_trim_keeps_the_document_that_reaches_the_limit(tmp_path, limit, kept):
    """Catches a limit off by one document. Three documents of 4 tokens; cutting again changes nothing."""
    write_shard(tmp_path, 0, [BYTES.document(t) for t in ("ab", "cd", "ef")], ["a", "c", "e"])
    record = trim_shard(tmp_path, 0, limit, BYTES)
    assert record["documents"] == kept and trim_shard(tmp_path, 0, limit, BYTES) == record
    write_meta(tmp_path, BYTES, [record], {})
    read = TokenShards(tmp_path, check_tokens=True)
    assert read.ids == ["a", "c", "e"][:kept] and read.lengths.tolist() == [4] * kept


def test_fingerprint_is_of_the_content(tmp_path):
    """Catches a fingerprint that is blind to a changed token, or that changes with the directory."""
    metas = [write(tmp_path / str(i), s) for i, s in enumerate([[["ab"]], [["ab"]], [["ac"]], [["a", "b"]]])]
    first, same, changed, other = (meta["fingerprint"] for meta in metas)
    assert first == same and len({first, changed, other}) == 3


def truncate(directory):
    path = directory / "00001.bin"
    path.write_bytes(path.read_bytes()[:-2])


def flip(name):
    def damage(directory):
        raw = bytearray((directory / name).read_bytes())
        raw[2] ^= 1
        (directory / name).write_bytes(raw)

    return damage


def edit_meta(directory):
    meta = json.loads((directory / "meta.json").read_text())
    (directory / "meta.json").write_text(json.dumps(meta | {"version": 9}))


@pytest.mark.parametrize(
    ("damage", "named"),
    [
        (truncate, "00001.bin has 12 bytes; meta.json says 14"),
        (lambda d: (d / "00000.bin").unlink(), "00000.bin is missing"),
        (flip("00000.idx"), "00000.idx is missing or damaged"),
        (flip("00001.bin"), "00001.bin is damaged: its checksum"),
        (edit_meta, "version 9, this program reads versions 1 and 2"),
        (lambda d: (d / "meta.json").write_text("{"), "meta.json is not JSON"),
        (lambda d: (d / "meta.json").unlink(), "unfinished token shards"),
    ],
)
def test_damage_is_named(tmp_path, damage, named):
    """Catches training on damaged tokens; each message names the file and what to do."""
    write(tmp_path, [["abc", "d"], ["efghi"]])
    damage(tmp_path)
    with pytest.raises(DataError, match=named):
        TokenShards(tmp_path, check_tokens=True)
