"""data/retrieval_set.py and benchmarks/retrieval.py: what the texts repeat; what the study shows of the grids."""

import json
import re
import sys

import numpy as np
from PIL import Image

from benchmarks import panels, retrieval
from benchmarks.studies import STUDIES
from benchmarks.study_results import of_needle
from data import retrieval_set
from data.retrieval_set import document
from evals.needle_text import CITIES
from evals.probes import NAMES

BOOKS = [" ".join(f"w{i % 97}" for i in range(40_000)), " ".join(f"v{i % 89}" for i in range(40_000))]


def test_half_of_the_pairs_stood_before():
    """Catches keys that come to mean another value, pairs that never come again, or only nearby, and texts that are
    others when they are made again."""
    name, text = document(3, BOOKS)
    assert name == "pairs-3" and document(3, BOOKS) == (name, text) != document(6, BOOKS)
    pairs = re.findall(r"^(\w{8}): (\w{8})$", text, re.MULTILINE)
    assert len(pairs) * 19 == len(text) - len("Each line is a key and its value.\n")
    assert len(dict(pairs)) == len(set(pairs)), "one value a key"
    last, back = {}, []
    for i, pair in enumerate(pairs):
        if pair in last:
            back.append(i - last[pair])
        last[pair] = i
    assert 0.4 < len(back) / len(pairs) < 0.6
    assert np.mean(np.array(back) <= 30) > 0.2 and np.mean(np.array(back) >= 300) > 0.1


def test_sentences_stand_between_the_words_of_a_book():
    """Catches sentences that are told once, contradict each other, or are those that evaluations ask for."""
    name, text = document(4, BOOKS)
    assert name == "told-4"
    keys = re.findall(r"\nThe pass key of (\w+) is (\d{5})\. Remember it\.\n", text)
    towns = re.findall(r"The best thing to do in (\w+) is ([^.]*)\.", text)
    for told in (keys, towns):
        assert len(told) > len(set(told)) == len(dict(told)) > 5
    assert not set(dict(keys)) & set(NAMES) and not set(dict(towns)) & set(CITIES)
    rest = re.sub(r"\nThe pass key of \w+ is \d{5}\. Remember it\.\n| The best thing to do in \w+ is [^.]*\.", "", text)
    assert rest in BOOKS[0] or rest in BOOKS[1]
    assert document(5, BOOKS)[1] in BOOKS[0] + BOOKS[1] and retrieval_set.KINDS[5 % 3] == "book"


def test_the_table_and_the_figure_show_every_grid(tmp_path):
    """Catches shares under another training's, attention's or length's name."""
    shares = {("full", "full"): 1.0, ("full", "8x2"): 0.5, ("moba", "full"): 0.75, ("moba", "8x2"): 0.25}
    measured = []
    for trained in ("full", "moba"):
        rows = [
            {"arm": arm, "length": length, "exact": {"share": shares[trained, arm] - (0 if length is None else 0.125)}}
            for arm in ("full", "8x2")
            for length in (None, 512, 1024)
        ]
        (tmp_path / "needle.json").write_text(json.dumps({"tokens": 7, "shares": rows}))
        measured.append({"arm": trained, **of_needle(tmp_path / "needle.json")})
    assert measured[0]["right"]["8x2"] == {"all": 0.5, "512": 0.375, "1K": 0.375}
    about = {"about": "x", "device": "a CPU", "commit": "abc", "command": "y"}
    record = {**about, "runs": [], "measured": measured}
    assert any("0.7500 | 0.6250 | 0.6250 | 0.2500" in line for line in panels.table(record))
    panels.draw(record, STUDIES["retrieval"].panels, tmp_path / "grid.png")
    with Image.open(tmp_path / "grid.png") as drawn:
        assert min(drawn.size) > 300 and np.asarray(drawn.convert("L")).std() > 10


def test_texts_are_made_once(tmp_path, monkeypatch):
    """Catches documents that are left out, made twice, or made again by a second start."""
    monkeypatch.setattr(sys, "argv", ["retrieval.py", f"to={tmp_path}", "documents=3", "workers=2"])
    retrieval.main()
    names = [json.loads(line)["id"] for file in sorted(tmp_path.glob("*.jsonl")) for line in file.open()]
    assert names == ["pairs-0", "told-1", "book-2"] and (tmp_path / "shards").is_dir()
    times = {file: file.stat().st_mtime_ns for file in tmp_path.glob("*.jsonl")}
    retrieval.main()
    assert times == {file: file.stat().st_mtime_ns for file in tmp_path.glob("*.jsonl")}
