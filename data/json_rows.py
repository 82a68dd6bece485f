"""Rows of .jsonl and .json files, compressed or not: one JSON object per line, or a list of objects.

Read line by line with Python's own parser, so that a damaged line is named by its number, rows may differ in their
keys, and nesting of any depth is an error of one line.
"""

from __future__ import annotations

import bz2
import gzip
import json
import lzma
from collections.abc import Iterator
from pathlib import Path
from typing import Any, BinaryIO

from conf.words import cut, first_line
from data.errors import DataError

MARK = b"\xef\xbb\xbf"  # of UTF-8, as some programs write it


def json_rows(path: Path) -> Iterator[dict[str, Any]]:
    """The objects in a file, in order. Raises DataError for what is none, and what decompressing raises."""
    with opened(path) as file:
        first = file.readline()
        if first.removeprefix(MARK).lstrip().startswith(b"["):
            yield from _list_of(first.removeprefix(MARK) + file.read(), path)
            return
        number = 1
        line = first.removeprefix(MARK)
        while line:
            if line.strip():
                yield _object(_parsed(line, path, number), path, number)
            line = file.readline()
            number += 1


def _list_of(text: bytes, path: Path) -> Iterator[dict[str, Any]]:
    """A file that is one list; one line may be one, too, and then it is no object."""
    rows = _parsed(text, path, 1)
    for number, row in enumerate(rows, 1):
        yield _object(row, path, number)


def _parsed(text: bytes, path: Path, number: int) -> Any:
    try:
        return json.loads(text.decode("utf-8", "surrogatepass"))  # of bytes it would guess UTF-16 or UTF-32
    except RecursionError:
        raise DataError(f"{path} cannot be read as json: line {number} is nested too deep") from None
    except ValueError as error:
        raise DataError(f"{path} cannot be read as json: line {number}: {first_line(error)}") from None


def _object(row: Any, path: Path, number: int) -> dict[str, Any]:
    if not isinstance(row, dict):
        found = f"{type(row).__name__} ({cut(repr(row), 60)})"
        raise DataError(f"{path} cannot be read as json: row {number} is {found}, not an object {{...}}")
    return row


def opened(path: Path) -> BinaryIO:
    """A file to read, decompressed by its ending. Raises ImportError where .zst cannot be."""
    ending = path.suffix.lower()
    if ending == ".zst":
        # ImportError: said with a hint by the caller
        import zstandard  # pyright: ignore[reportMissingImports] - optional

        return zstandard.open(path, "rb")
    return {".xz": lzma.open, ".gz": gzip.open, ".bz2": bz2.open}.get(ending, open)(path, "rb")
