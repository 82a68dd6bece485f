"""From a configuration to sources: every format, the cache, selections, held-out documents, and each error message."""

import bz2
import gzip
import json
import lzma
from dataclasses import replace
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from conf.schema import DataConfig, SourceConfig
from data import sources as sources_module
from data.errors import DataError
from data.sources import known_sources, open_sources, open_validation
from data.tokenizer import load_tokenizer
from data.validation import held_out_documents

TEXTS = ["first document\nwith two lines", "zweites: \u00e4\u00f6\u00fc", "third"]
BYTES = load_tokenizer("bytes")


def jsonl(texts=TEXTS):
    return "".join(json.dumps({"id": f"d{i}", "text": t}) + "\n" for i, t in enumerate(texts)).encode()


def texts_of(source):
    return [BYTES.decode(source.tokens(d, 0, n)) for d, n in enumerate(source.lengths)]


def write_formats(directory):
    """One file of each kind with the same documents; name -> expected ids."""
    (directory / "a.jsonl").write_bytes(jsonl())
    (directory / "a.jsonl.gz").write_bytes(gzip.compress(jsonl()))
    (directory / "a.jsonl.xz").write_bytes(lzma.compress(jsonl()))
    (directory / "a.jsonl.bz2").write_bytes(bz2.compress(jsonl()))
    (directory / "a.json").write_text(json.dumps([json.loads(line) for line in jsonl().splitlines()]))
    pq.write_table(pa.table({"id": ["d0", "d1", "d2"], "text": TEXTS, "n": [1, 2, 3]}), directory / "a.parquet")


@pytest.mark.parametrize("name", ["a.jsonl", "a.jsonl.gz", "a.jsonl.xz", "a.jsonl.bz2", "a.json", "a.parquet"])
def test_tables(name, tmp_path, config_of):
    """Catches a format that loses documents, line ends, ids or characters beyond ASCII."""
    write_formats(tmp_path)
    source = open_sources(config_of(path=str(tmp_path / name)))["main"]
    assert texts_of(source) == TEXTS and source.ids == ["d0", "d1", "d2"]
    assert source.num_tokens == sum(len(t.encode()) + 2 for t in TEXTS) == source.lengths.sum()


def test_text_files_are_one_document_each(tmp_path, config_of):
    """Catches documents split at blank lines, and names with brackets taken for patterns."""
    folder = tmp_path / "books [1]"
    folder.mkdir()
    (folder / "1.txt").write_text(TEXTS[0] + "\n\n" + TEXTS[0])
    (folder / "2.txt.xz").write_bytes(lzma.compress(TEXTS[1].encode()))
    (folder / "3.py").write_text(TEXTS[2])
    (folder / ".hidden.txt").write_text("no")
    (folder / "empty.txt").write_text("")
    everything = open_sources(config_of(path=str(folder)))["main"]
    assert texts_of(everything) == [TEXTS[0] + "\n\n" + TEXTS[0], TEXTS[1]]  # a directory: known endings only
    assert texts_of(open_sources(config_of(path=str(tmp_path / "*" / "*.py")))["main"]) == [TEXTS[2]]
    assert texts_of(open_sources(config_of(path=str(folder / "3.py")))["main"]) == [TEXTS[2]]


def test_mixed_directory_and_rows_without_text(tmp_path, config_of, write_jsonl):
    """Catches one kind of file hiding another, and ids that shift where a row is empty."""
    write_jsonl("x.jsonl", [{"text": ""}, {"text": "a"}, {"text": None}, {"text": "b"}])
    (tmp_path / "sub").mkdir()
    (tmp_path / "sub" / "y.txt").write_text("c")
    (tmp_path / "zero.jsonl").write_text("")
    source = open_sources(config_of(path=str(tmp_path)))["main"]
    assert texts_of(source) == ["a", "b", "c"] and source.ids == ["1", "3", "4"]


def test_field_names(write_jsonl, config_of):
    """Catches text_field or id_field that are not heeded."""
    path = write_jsonl("x.jsonl", [{"body": "abc", "key": 7}, {"body": "de", "key": 9}])
    source = open_sources(config_of(path=str(path), options={"text_field": "body"}, id_field="key"))["main"]
    assert texts_of(source) == ["abc", "de"] and source.ids == ["7", "9"]


def test_cache_goes_by_content(tmp_path, config_of, monkeypatch):
    """Catches tokenising twice, and stale tokens after the text, the tokenizer or the fields changed."""
    calls = []
    prepare = sources_module.prepare
    monkeypatch.setattr(sources_module, "prepare", lambda *a, **k: calls.append(1) or prepare(*a, **k))
    path = tmp_path / "a.jsonl"
    path.write_bytes(jsonl())
    first = open_sources(config_of(path=str(path)))["main"]
    open_sources(config_of(path=str(path)))
    (tmp_path / "moved.jsonl").write_bytes(jsonl())
    moved = open_sources(config_of(path=str(tmp_path / "moved.jsonl")))["main"]
    assert len(calls) == 1 and moved.fingerprint == first.fingerprint
    path.write_bytes(jsonl(["other", *TEXTS[1:]]))
    changed = open_sources(config_of(path=str(path)))["main"]
    bpe = open_sources(config_of(path=str(path), tokenizer="bpe-4k"))["main"]
    assert len(calls) == 3 and len({first.fingerprint, changed.fingerprint, bpe.fingerprint}) == 3
    config = config_of(path=str(path))
    memos = list((Path(config.cache_dir) / "content").iterdir())
    for memo in memos:  # damage there costs a reading, no more
        memo.write_bytes(b"\xff\xfe")
    assert memos and open_sources(config)["main"].fingerprint == changed.fingerprint and len(calls) == 3


def test_lengths_are_known_once_a_run_has_tokenised(tmp_path, config_of):
    """Catches a plan that tokenises, writes or asks the network, and one that shows lengths of another text, tokenizer
    or selection."""
    file = tmp_path / "a.jsonl"
    file.write_bytes(jsonl())
    sources = {
        "all": SourceConfig(path=str(file)),
        "first": SourceConfig(path=str(file), max_tokens=1),
        "missing": SourceConfig(path=str(tmp_path / "nowhere")),
        "hub": SourceConfig(name="nobody/knows", streaming=True),
    }
    config = replace(config_of(), sources=sources)
    assert known_sources(config) == {} and [path.name for path in tmp_path.iterdir()] == ["a.jsonl"]
    here = replace(config, sources={name: sources[name] for name in ("all", "first")})
    opened = open_sources(here)
    known = known_sources(config)
    assert {name: source.lengths.tolist() for name, source in known.items()} == {
        name: source.lengths.tolist() for name, source in opened.items()
    }
    assert known["all"].num_documents == 3 and known["first"].num_documents == 1
    assert known_sources(replace(config, tokenizer="bpe-4k")) == {}
    file.write_bytes(jsonl(TEXTS[:2]))
    assert known_sources(config) == {}


def test_ready_shards_with_selections(tmp_path, config_of):
    """Catches selections that shift document numbers: max_tokens takes a prefix, exclude_ids leaves documents out."""
    (tmp_path / "a.jsonl").write_bytes(jsonl())
    cached = open_sources(config_of(path=str(tmp_path / "a.jsonl")))["main"]
    shards = str(next(p.parent for p in (tmp_path / "cache").glob("*/meta.json")))
    assert texts_of(open_sources(config_of(path=shards))["main"]) == TEXTS
    limit = int(cached.lengths[0]) + 1
    prefix = open_sources(config_of(path=shards, max_tokens=limit))["main"]
    assert texts_of(prefix) == TEXTS[:2]
    assert texts_of(open_sources(config_of(path=shards, max_tokens=limit - 1))["main"]) == TEXTS[:1]
    assert texts_of(open_sources(config_of(path=str(tmp_path / "a.jsonl"), max_tokens=limit))["main"]) == TEXTS[:2]
    (tmp_path / "held").write_text("d1\nunknown\n")
    without = open_sources(config_of(path=shards, exclude_ids=str(tmp_path / "held")))["main"]
    assert texts_of(without) == [TEXTS[0], TEXTS[2]] and without.ids == ["d0", "d2"]
    assert len({cached.fingerprint, prefix.fingerprint, without.fingerprint}) == 3
    (tmp_path / "held").write_text("d0\nd1\nd2")
    with pytest.raises(DataError, match=r"no document is left of 3"):
        open_sources(config_of(path=shards, exclude_ids=str(tmp_path / "held")))
    with pytest.raises(DataError, match=r"exclude_ids='/nowhere/ids': no such file"):
        open_sources(config_of(path=shards, exclude_ids="/nowhere/ids"))


def test_held_out_documents(write_jsonl, tmp_path):
    """Catches documents that fall short by one, windows from the middle, and a choice that is not stable."""
    lengths = [9, 10, 11, 30, 12]
    rows = [
        {"id": f"d{i}", "text": "abcdefghij" * 3} | {"text": ("abcdefghij" * 3)[: n - 2]} for i, n in enumerate(lengths)
    ]
    path = str(write_jsonl("v.jsonl", rows))
    config = DataConfig(validation=SourceConfig(path=path), cache_dir=str(tmp_path / "cache"))
    source = open_validation(config)
    held = held_out_documents(source, 10, 16)
    assert held.ids == ["d2", "d3", "d4"] == [name for name, _ in held]  # 11 tokens give 10 predictions
    for _, batch in held:
        assert batch.tokens.tolist() == [256, *b"abcdefghi"] and batch.positions.tolist() == list(range(10))
        assert batch.labels[:-1].tolist() == [*b"abcdefghi"] and batch.lengths == (10,)
    assert held[0][1].labels[-1] == 257 and held[1][1].labels[-1] == ord("j")
    assert set(held_out_documents(source, 10, 2).ids) < set(held.ids)
    assert [name for name, _ in held[-2:]] == held.ids[-2:]
    with pytest.raises(DataError, match=r"0 of 5 documents have the 31 tokens .* longest has 30"):
        held_out_documents(source, 30, 16)
    assert open_validation(replace(config, validation=None)) is None


def bad_parquet(directory):
    (directory / "x.parquet").write_bytes(b"not parquet")


def bad_json(directory):
    (directory / "x.jsonl").write_text('{"text": "a"}\n{"text": \n')


def bad_utf8(directory):
    (directory / "a.txt").write_text("fine")
    (directory / "b.txt").write_bytes(b"\xff\xfe\x00")


def bad_gzip(directory):
    (directory / "x.jsonl.gz").write_bytes(gzip.compress(jsonl())[:-9])


def rows(directory, *given):
    (directory / "x.jsonl").write_text("".join(json.dumps(row) + "\n" for row in given))


@pytest.mark.parametrize(
    ("make", "source", "named"),
    [
        (None, {"path": "{}/nope"}, "nope': no such file or directory"),
        (None, {"path": "{}/*.txt"}, r"\*.txt': no file matches"),
        (None, {"path": "{}"}, "holds no files ending in .jsonl, .ndjson, .json, .parquet, .txt"),
        (None, {}, "needs either path .* or name"),
        (None, {"path": "x", "name": "a/b"}, "needs either path .* it has path='x', name='a/b'"),
        (None, {"name": "a/b", "streaming": True}, "streaming=true needs max_tokens"),
        (bad_parquet, {"path": "{}"}, "x.parquet cannot be read as parquet"),
        (bad_json, {"path": "{}"}, "x.jsonl cannot be read as json"),
        (bad_utf8, {"path": "{}"}, "b.txt cannot be read as UTF-8 text"),
        (bad_gzip, {"path": "{}"}, "x.jsonl.gz cannot be read as json"),
        (lambda d: rows(d, {"body": "a", "n": 1}), {"path": "{}"}, "no column 'text'; it has body, n"),
        (lambda d: rows(d, {"text": 5}), {"path": "{}"}, "column 'text' holds int, not text"),
        (lambda d: rows(d, {"text": ""}, {"text": None}), {"path": "{}"}, "there is no text in it"),
        (lambda d: (d / "x.jsonl").write_text(""), {"path": "{}"}, "there is no text in it"),
        (lambda d: (d / "plan.json").write_text("{}"), {"path": "{}"}, "holds no token shards"),
    ],
)
def test_one_message_for_each_mistake(make, source, named, tmp_path, config_of):
    """Catches tracebacks of libraries; and the barrier is passed all the same, so that no other rank waits for ever."""
    folder = tmp_path / "given"
    folder.mkdir()
    if make is not None:
        make(folder)
    source = {k: v.format(folder) if isinstance(v, str) else v for k, v in source.items()}
    passed = []
    with pytest.raises(DataError, match=named):
        open_sources(config_of(**source), barrier=lambda: passed.append(1))
    assert passed == [1]


def test_wrong_tokenizer_for_shards(tmp_path, config_of):
    """Catches ids of one vocabulary read as another's."""
    (tmp_path / "a.jsonl").write_bytes(jsonl())
    open_sources(config_of(path=str(tmp_path / "a.jsonl")))
    shards = str(next(p.parent for p in (tmp_path / "cache").glob("*/meta.json")))
    with pytest.raises(DataError, match=rf"made with tokenizer 'bytes' .{BYTES.fingerprint}.*the run uses 'bpe-4k'"):
        open_sources(config_of(path=shards, tokenizer="bpe-4k"))


def test_other_ranks_say_where_they_looked(tmp_path, config_of):
    """Catches ranks that tokenise beside the first one, or read a cache that is not there."""
    (tmp_path / "a.jsonl").write_bytes(jsonl())
    with pytest.raises(DataError, match=r"left no tokens in .*data.cache_dir="):
        open_sources(config_of(path=str(tmp_path / "a.jsonl")), rank_zero=False)


def test_no_sources(tmp_path):
    """Catches an empty run."""
    with pytest.raises(DataError, match=r"data.sources is empty: choose data=embedded"):
        open_sources(DataConfig(cache_dir=str(tmp_path)))


def test_unreachable_hub_set_names_the_alternatives(config_of, monkeypatch):
    """Catches a silent substitute for a hub set, and a second download of one that is in the cache."""
    import datasets

    def unreachable(*args, **kwargs):
        raise ConnectionError("Couldn't reach 'someone/books' on the Hub")

    monkeypatch.setattr(datasets, "load_dataset", unreachable)
    config = config_of(name="someone/books", max_tokens=20, streaming=True)
    with pytest.raises(DataError, match=r"(?s)someone/books.*Couldn't reach.*data=files data.path=.*data=embedded"):
        open_sources(config)
    asked = []
    rows = [{"text": t, "id": i} for i, t in enumerate(TEXTS)]
    monkeypatch.setattr(datasets, "load_dataset", lambda *a, **k: asked.append((a, k)) or iter(rows))
    assert texts_of(open_sources(config)["main"]) == TEXTS[:1]
    assert asked == [(("someone/books", None), {"split": "train", "streaming": True})]
    monkeypatch.setattr(datasets, "load_dataset", unreachable)
    assert texts_of(open_sources(config)["main"]) == TEXTS[:1]
