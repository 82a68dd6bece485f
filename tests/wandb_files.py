"""Reads what wandb wrote offline, without wandb's own reader."""

from __future__ import annotations

import json
import struct
from collections.abc import Iterator
from pathlib import Path

import wandb
from wandb.proto.wandb_internal_pb2 import Record

HEADER = 7  # bytes before the first block of a .wandb file, and of each chunk's checksum, length and type
BLOCK = 32 * 1024


def records(path: Path) -> Iterator[Record]:
    """The records of a .wandb file: 32 KiB blocks of chunks, whole (1) or first (2), middle (3), last (4) parts."""
    data = path.read_bytes()[HEADER:]
    at, parts = 0, b""
    offset = HEADER  # the file's header counts towards the first block
    while at + HEADER <= len(data):
        room = BLOCK - (at + offset) % BLOCK
        if room < HEADER:
            at += room
            continue
        _, length, kind = struct.unpack("<IHB", data[at : at + HEADER])
        parts += data[at + HEADER : at + HEADER + length]
        at += HEADER + length
        if kind in (1, 4):
            record = Record()
            record.ParseFromString(parts)
            parts = b""
            yield record


def history(run_dir: Path) -> list[dict]:
    """Rows of all offline runs below a run directory, in order of time."""
    wandb.teardown()  # the service process writes the last records when it ends
    rows = []
    for path in sorted(run_dir.glob("wandb/offline-run-*/*.wandb"), key=lambda path: path.stat().st_mtime_ns):
        for record in records(path):
            if record.WhichOneof("record_type") == "history":
                row = {"/".join(item.nested_key) or item.key: item.value_json for item in record.history.item}
                rows.append({key: json.loads(value) for key, value in row.items()})
    return rows


def kinds_of(run_dir: Path) -> dict[str, list]:
    """All records of the one offline run, by kind."""
    wandb.teardown()
    (path,) = run_dir.glob("wandb/offline-run-*/*.wandb")
    kinds = {}
    for record in records(path):
        kind = record.WhichOneof("record_type")
        kinds.setdefault(kind, []).append(getattr(record, kind))
    return kinds


def summary_of(kinds: dict[str, list]) -> dict:
    """What the runs table shows in the end."""
    updates = [item for record in kinds["summary"] for item in record.update]
    return {"/".join(item.nested_key) or item.key: json.loads(item.value_json) for item in updates}
