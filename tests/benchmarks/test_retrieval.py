"""data/retrieval_set.py and benchmarks/retrieval.py: what the texts repeat, and what is told of the grids."""

import re

import numpy as np
from PIL import Image

from benchmarks.retrieval import draw, lengths, table, trainings
from data import retrieval_set
from data.retrieval_set import document
from evals.needle_text import CITIES
from evals.probes import NAMES
from evals.statistics import wilson
from launch.config import load

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


def test_trainings_differ_in_attention_alone():
    """Catches a training that is named after another attention."""
    plans = {}
    for name, own in trainings("64x4").items():
        config = load(["model=tiny", "schedule.tokens=64K", "schedule.seq_len=1K", "schedule.batch_tokens=4K", *own])
        (stage,) = config.schedule.stages.values()
        plans[name] = (stage.attention.kind, stage.attention.options.get("first_blocks"))
    assert {name: kind for name, (kind, _) in plans.items()} == {"full": "full", "moba": "moba", "moba_first": "moba"}
    assert plans["moba"][1] == 0 and plans["moba_first"][1] == 1
    assert lengths(8192) == "1024,2048,4096,8192"


def test_the_table_and_the_figure_show_every_grid(tmp_path):
    """Catches shares under another training's or attention's name."""
    shares = {("full", "full"): 1.0, ("full", "8x2"): 0.5, ("moba", "full"): 0.75, ("moba", "8x2"): 0.25}
    found = {}
    for trained in ("full", "moba"):
        rows, cells = [], {}
        for arm in ("full", "8x2"):
            share = shares[trained, arm]
            score = {"share": share, "interval_95": list(wilson(share, 8))}
            rows.append({"form": "key_value", "arm": arm, "length": None, "exact": score, "ranked": score})
            cells[arm] = [
                {"length": length, "depth": depth, "exact": score} for length in (512, 1024) for depth in (0.0, 100.0)
            ]
        found[trained] = {"shares": rows, "cells": {"key_value": cells}, "samples": 8}
    lines = table(found)
    assert [re.findall(r"(\d+) \(", line)[::2] for line in lines[2:]] == [["100", "50"], ["75", "25"]]
    draw(found, tmp_path / "grid.png")
    with Image.open(tmp_path / "grid.png") as drawn:
        assert min(drawn.size) > 300 and np.asarray(drawn.convert("L")).std() > 10
