"""Token shards: a directory of tokenised documents that can be read at random through memory maps, and how it is
written.

    00000.bin     the tokens of its documents, one after another, little-endian uint16 or uint32
    00000.idx     int64 [documents + 1]: where each document starts in 00000.bin, in tokens
    00000.mask    conversations only: one byte per token, 1 where it is supervised (data/sft.py)
    00000.json    counts, checksums and the documents' ids; written last, so that it marks the shard as finished
    meta.json     format version, tokenizer, the list of shards, fingerprint; written when all shards are finished

Every file is written beside its place and renamed, so a killed writer leaves finished shards or none, and the bytes
depend on the documents and the tokenizer alone.
"""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Annotated, Literal

import numpy as np
from pydantic import Field

from conf.files import Count, Object, parse_json, parse_object, read_text
from data.errors import DataError
from data.tokenizer import Tokenizer

VERSION, VERSION_WITH_MASKS = 1, 2  # a program that knows no masks must not train on everything
META = "meta.json"


def write_atomic(path: Path, data: bytes) -> None:
    """Write `path` so that it holds all of `data` or does not exist, whatever happens in between."""
    temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    try:
        with open(temporary, "wb") as file:
            file.write(data)
            file.flush()
            os.fsync(file.fileno())
        os.replace(temporary, path)
    finally:
        temporary.unlink(missing_ok=True)


def write_shard(
    directory: Path,
    number: int,
    documents: Sequence[np.ndarray],
    ids: Sequence[str],
    masks: Sequence[np.ndarray] | None = None,
) -> dict:
    """Write one shard; returns its record (also kept as NNNNN.json). documents: token arrays with BOS/EOS, all one
    dtype. masks: bool arrays of the same lengths, True where a token is supervised; None = everywhere."""
    stem = f"{number:05d}"
    tokens = np.concatenate(documents)
    offsets = np.concatenate([[0], np.cumsum([len(d) for d in documents])]).astype("<i8")
    mask = None if masks is None else np.concatenate(masks).astype(np.uint8)
    assert mask is None or len(mask) == len(tokens), (len(mask), len(tokens))
    return _write_files(directory, stem, tokens, offsets, list(ids), mask)


def _write_files(
    directory: Path, stem: str, tokens: np.ndarray, offsets: np.ndarray, ids: list[str], mask: np.ndarray | None
) -> dict:
    raw, index = tokens.tobytes(), offsets.tobytes()
    record = {
        "documents": len(ids),
        "tokens": len(tokens),
        "bin_sha256": hashlib.sha256(raw).hexdigest(),
        "idx_sha256": hashlib.sha256(index).hexdigest(),
    }
    if mask is not None:
        record |= {"learnt": int(mask.sum()), "mask_sha256": hashlib.sha256(mask.tobytes()).hexdigest()}
        write_atomic(directory / f"{stem}.mask", mask.tobytes())
    write_atomic(directory / f"{stem}.bin", raw)
    write_atomic(directory / f"{stem}.idx", index)
    write_atomic(directory / f"{stem}.json", json.dumps(record | {"ids": ids}).encode())
    return record


def finished_shard(directory: Path, number: int) -> dict | None:
    """The record of shard `number` if it was finished (see the module's text), else None."""
    if not (directory / f"{number:05d}.json").exists():
        return None
    return _written_record(directory, number)[0]


def trim_shard(directory: Path, number: int, max_tokens: int, tokenizer: Tokenizer) -> dict:
    """Cut shard `number` after the document with which it reaches `max_tokens`; returns its new record."""
    stem = f"{number:05d}"
    offsets = np.fromfile(directory / f"{stem}.idx", "<i8")
    keep = int(np.searchsorted(offsets, max_tokens, side="left"))
    if keep >= len(offsets) - 1:
        return _written_record(directory, number)[0]
    ids = _written_record(directory, number)[1][:keep]
    tokens = np.fromfile(directory / f"{stem}.bin", tokenizer.dtype, count=int(offsets[keep]))
    mask = directory / f"{stem}.mask"
    mask = np.fromfile(mask, np.uint8, count=int(offsets[keep])) if mask.exists() else None
    (directory / f"{stem}.json").unlink()  # from here to the new record, the shard is unfinished
    return _write_files(directory, stem, tokens, offsets[: keep + 1], ids, mask)


def write_meta(directory: Path, tokenizer: Tokenizer, records: Sequence[dict], origin: dict) -> dict:
    """Finish a directory of shards: write and return its meta.json. origin: what it was made from, for people to
    read."""
    content = "".join(r["bin_sha256"] + r["idx_sha256"] + r.get("mask_sha256", "") for r in records)
    content += tokenizer.fingerprint
    has_masks = any("mask_sha256" in r for r in records)
    meta = {
        "version": VERSION_WITH_MASKS if has_masks else VERSION,
        "tokenizer": {
            "name": tokenizer.name,
            "fingerprint": tokenizer.fingerprint,
            "vocab_size": tokenizer.vocab_size,
            "bos_id": tokenizer.bos_id,
            "eos_id": tokenizer.eos_id,
        },
        "dtype": tokenizer.dtype.str,
        "documents": sum(r["documents"] for r in records),
        "tokens": sum(r["tokens"] for r in records),
        "fingerprint": hashlib.sha256(content.encode()).hexdigest()[:16],
        **({"learnt": sum(r["learnt"] for r in records)} if has_masks else {}),
        "origin": origin,
        "shards": list(records),
    }
    write_atomic(directory / META, json.dumps(meta, indent=1, ensure_ascii=False).encode())
    return meta


@dataclass(frozen=True)
class _Record:
    """What is known of a shard."""

    documents: Count
    tokens: Count
    bin_sha256: str
    idx_sha256: str


@dataclass(frozen=True)
class _Written(_Record):
    """NNNNN.json."""

    ids: list[str]


@dataclass(frozen=True)
class _MaskedRecord(_Record):
    """Of a shard of conversations."""

    learnt: Count
    mask_sha256: str


@dataclass(frozen=True)
class _MadeWith:
    """The tokenizer of a directory."""

    name: str
    fingerprint: str


@dataclass(frozen=True)
class _Version:
    """Of meta.json, what says how to read the rest."""

    version: int


@dataclass(frozen=True)
class _Meta(_Version):
    """Of meta.json, what is read."""

    tokenizer: _MadeWith
    dtype: Literal["<u2", "<u4"]
    documents: Count
    tokens: Count
    fingerprint: str
    origin: Object
    shards: Annotated[Sequence[_Record], Field(min_length=1)]


@dataclass(frozen=True)
class _MetaWithMasks(_Meta):
    """The same of conversations."""

    shards: Annotated[Sequence[_MaskedRecord], Field(min_length=1)]


class TokenShards:
    """Random access to a finished directory of token shards.

    lengths: int64 [num_documents], tokens of each document with BOS and EOS. fingerprint: 16 hex digits of the content.
    has_masks: the documents are conversations, of which only a part is supervised.
    Raises DataError if a file is missing or of the wrong size, an index is damaged, or (check_tokens) a token file is.
    """

    def __init__(self, directory: str | Path, *, check_tokens: bool = False):
        self.directory = Path(directory)
        self.meta = _read_meta(self.directory)
        self.fingerprint: str = self.meta["fingerprint"]
        self.dtype = np.dtype(self.meta["dtype"])
        self.has_masks = self.meta["version"] == VERSION_WITH_MASKS
        self._maps: dict[tuple[int, str], np.ndarray] = {}
        indices = [self._read_index(number, record) for number, record in enumerate(self.meta["shards"])]
        self.lengths = np.concatenate([np.diff(i) for i in indices])
        self._starts = np.concatenate([i[:-1] for i in indices])  # within the shard
        self._first = np.cumsum([0] + [len(i) - 1 for i in indices])  # number of each shard's first document
        if check_tokens:
            self.check_tokens()

    @property
    def num_bytes(self) -> int:
        return self.meta["tokens"] * self.dtype.itemsize

    @cached_property
    def ids(self) -> list[str]:
        """The documents' ids, read when first asked for: training does not need them."""
        ids = []
        for number in range(len(self.meta["shards"])):
            ids += _written_record(self.directory, number)[1]
        if len(ids) != len(self.lengths):
            raise DataError(f"{self.directory} names {len(ids):,} of {len(self.lengths):,} documents. {_REMEDY}")
        return ids

    def tokens(self, document: int, start: int, stop: int) -> np.ndarray:
        """Tokens [start, stop) of a document, a view into the memory map."""
        return self._view(document, start, stop, "bin", self.dtype)

    def supervised(self, document: int, start: int, stop: int) -> np.ndarray:
        """Which of tokens [start, stop) of a conversation are supervised: bool [stop - start]. Only with has_masks."""
        return self._view(document, start, stop, "mask", np.dtype(bool))

    def _view(self, document: int, start: int, stop: int, kind: str, dtype: np.dtype) -> np.ndarray:
        assert 0 <= start <= stop <= self.lengths[document], (document, start, stop)
        shard = int(np.searchsorted(self._first, document, side="right")) - 1
        if (shard, kind) not in self._maps:
            self._maps[shard, kind] = np.memmap(self.directory / f"{shard:05d}.{kind}", dtype=dtype, mode="r")
        offset = int(self._starts[document])
        return self._maps[shard, kind][offset + start : offset + stop]

    def check_tokens(self) -> None:
        """Read every token and mask file and compare its checksum; raises DataError naming the first damaged one."""
        for number, record in enumerate(self.meta["shards"]):
            for kind in ("bin", "mask") if self.has_masks else ("bin",):
                path = self.directory / f"{number:05d}.{kind}"
                with open(path, "rb") as file:
                    if hashlib.file_digest(file, "sha256").hexdigest() != record[f"{kind}_sha256"]:
                        raise DataError(f"{path} is damaged: its checksum differs from {META}. {_REMEDY}")

    def _read_index(self, number: int, record: dict) -> np.ndarray:
        path = self.directory / f"{number:05d}.bin"
        sizes = {path: record["tokens"] * self.dtype.itemsize}
        if self.has_masks:
            sizes[path.with_suffix(".mask")] = record["tokens"]
        for file, wanted in sizes.items():
            size = file.stat().st_size if file.exists() else None
            if size != wanted:
                found = "is missing" if size is None else f"has {size:,} bytes"
                raise DataError(f"{file} {found}; {META} says {wanted:,} bytes. {_REMEDY}")
        raw = path.with_suffix(".idx").read_bytes() if path.with_suffix(".idx").exists() else b""
        if hashlib.sha256(raw).hexdigest() != record["idx_sha256"]:
            raise DataError(
                f"{path.with_suffix('.idx')} is missing or damaged: its checksum differs from {META}. {_REMEDY}"
            )
        index = np.frombuffer(raw, "<i8") if len(raw) % 8 == 0 else np.zeros(0, "<i8")
        if not len(index) or index[0] != 0 or index[-1] != record["tokens"] or (np.diff(index) < 1).any():
            raise DataError(
                f"{path.with_suffix('.idx')} is no index of the {record['tokens']:,} tokens of {META}. {_REMEDY}"
            )
        return index


_REMEDY = "Copy the directory again, or delete it and run launch/prepare_data.py again"


def _read_meta(directory: Path) -> dict:
    path = directory / META
    if not path.exists():
        if any(directory.glob("[0-9]*.json")):
            raise DataError(
                f"{directory} holds unfinished token shards: run the same launch/prepare_data.py command again"
            )
        raise DataError(f"{directory} holds no token shards (no {META})")
    text = read_text(path, error=DataError, remedy=_REMEDY)
    version = parse_json(text, _Version, where=path, error=DataError, remedy=_REMEDY).version
    if version not in (VERSION, VERSION_WITH_MASKS):
        known = f"versions {VERSION} and {VERSION_WITH_MASKS}"
        raise DataError(f"{path}: format version {version}, this program reads {known}. {_REMEDY}")
    shape = _MetaWithMasks if version == VERSION_WITH_MASKS else _Meta
    return parse_object(text, shape, where=path, error=DataError, remedy=_REMEDY)


def _written_record(directory: Path, number: int) -> tuple[dict, list[str]]:
    """(record, ids of the documents) of a finished shard, as its NNNNN.json says."""
    path = directory / f"{number:05d}.json"
    text = read_text(path, error=DataError, remedy=_REMEDY)
    record = parse_object(text, _Written, where=path, error=DataError, remedy=_REMEDY)
    return record, record.pop("ids")
