"""TensorBoard: what its files hold is what was shown; without the package one line, and the run goes on."""

from __future__ import annotations

import struct
import sys
from pathlib import Path

import pytest
from matplotlib.figure import Figure

from train.record.dashboard import Sample
from train.record.tensorboard import open_tensorboard


def events(folder: Path) -> list:
    """Events of all files, in order: records of length, its checksum, bytes, their checksum (TFRecord)."""
    from tensorboardX.proto.event_pb2 import Event

    found = []
    for path in sorted(folder.glob("events.*"), key=lambda path: path.stat().st_mtime_ns):
        data = path.read_bytes()
        while data:
            (length,) = struct.unpack("<Q", data[:8])
            event = Event()
            event.ParseFromString(data[12 : 12 + length])
            found.append(event)
            data = data[16 + length :]
    return found


def test_files_hold_what_was_shown_and_hide_what_a_resume_lost(tmp_path):
    """Catches series that are lost or stand at other steps than tokens, and two lines where a run went on from a
    checkpoint."""
    pytest.importorskip("tensorboardX")
    said = []
    board = open_tensorboard(tmp_path, config={"model": {"hidden_size": 8}}, warn=said.append)
    board.scalars({"train/loss": 2.5, "perf/mfu": 0.25}, 5_000_000_000)
    board.constants({"machine/device": "cpu"})
    picture = tmp_path / "heat.png"
    Figure(figsize=(1, 1)).savefig(picture)
    board.image("position_loss/heat_map", picture, 5_000_000_000)
    board.samples([Sample("book", "It was", " a night", " the best")], 5_000_000_000)
    board.alert("Skipped steps", "one")
    board.finish()
    board.scalars({"train/loss": 9.0}, 1)
    again = open_tensorboard(tmp_path, config={}, tokens=4_000_000_000, warn=said.append)
    again.scalars({"train/loss": 2.0}, 5_000_000_000)
    again.finish()
    assert len(said) == 2 and all(str(tmp_path / "tensorboard") in line for line in said)

    found = events(tmp_path / "tensorboard")
    values = [(v.tag, event.step, v) for event in found for v in event.summary.value]
    scalars = [(tag, step, v.simple_value) for tag, step, v in values if v.WhichOneof("value") == "simple_value"]
    assert scalars == [
        ("train/loss", 5_000_000_000, 2.5),
        ("perf/mfu", 5_000_000_000, 0.25),
        ("train/loss", 5_000_000_000, 2.0),
    ]
    ((_, step, image),) = [value for value in values if value[2].WhichOneof("value") == "image"]
    assert step == 5_000_000_000 and (image.image.width, image.image.height) == (100, 100)
    texts = {tag: v.tensor.string_val[0].decode() for tag, _, v in values if v.WhichOneof("value") == "tensor"}
    texts = {tag.removesuffix("/text_summary"): text for tag, text in texts.items()}
    assert texts["machine/device"] == "cpu" and " a night" in texts["samples/book"] and "one" in texts["alerts"]
    assert 4_000_000_001 in [event.step for event in found if event.WhichOneof("what") == "session_log"]


def test_without_the_package_it_is_one_line(tmp_path, monkeypatch):
    """Catches an ImportError that ends a run, and a line that does not say what to install."""
    monkeypatch.setitem(sys.modules, "tensorboardX", None)
    said = []
    assert open_tensorboard(tmp_path, config={}, warn=said.append) is None
    assert len(said) == 1 and "pip install 'moba-train[tensorboard]'" in said[0] and list(tmp_path.iterdir()) == []
