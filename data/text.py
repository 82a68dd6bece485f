"""Documents as text: finds the files a path means and reads them, or a hub data set, through the `datasets` library.

One document is one row of jsonl or parquet, or one whole text file. Reading streams, so that nothing is held or copied
beside the token shards that come out of it.
"""

from __future__ import annotations

import glob
import hashlib
import lzma
import zlib
from collections.abc import Callable, Iterable, Iterator, Mapping
from functools import partial
from itertools import groupby
from pathlib import Path
from typing import Any, NamedTuple

from conf.files import user_path
from conf.formats import FORMATS
from conf.schema import SourceConfig
from conf.words import cut, first_line, listed
from data.conversations import ConversationReader, document_of
from data.errors import DataError
from data.json_rows import json_rows

COMPRESSED = (".xz", ".gz", ".bz2", ".zst")


class Reader(NamedTuple):
    """What reads files of an ending."""

    kind: str
    """Files of a kind are read together; a change of it means other content."""
    rows: Callable[[Path], Iterable[dict[str, Any]]] | None
    """The rows of a table, for its source's format (conf/formats.py); None: the file is one text. Raises one of
    READ_ERRORS for a damaged file."""


def _parquet_rows(path: Path) -> Iterable[dict[str, Any]]:
    return _load("parquet", [path])


JSON, TEXT = Reader("json", json_rows), Reader("text", None)
READERS = {
    ".jsonl": JSON,
    ".ndjson": JSON,
    ".json": JSON,
    ".parquet": Reader("parquet", _parquet_rows),
    ".txt": TEXT,
    ".text": TEXT,
    ".md": TEXT,
}
# Endings of what is no text, however it was named, where no reader is for them.
FOREIGN = (
    *(".csv", ".tsv", ".xls", ".xlsx", ".ods", ".db", ".sqlite", ".arrow", ".feather", ".orc", ".avro"),
    *(".pdf", ".ps", ".doc", ".docx", ".odt", ".rtf", ".epub", ".mobi", ".djvu", ".ppt", ".pptx"),
    *(".zip", ".tar", ".tgz", ".7z", ".rar", ".whl", ".jar", ".exe", ".so", ".dll", ".o", ".pyc"),
    *(".png", ".jpg", ".jpeg", ".gif", ".webp", ".mp3", ".mp4", ".wav", ".npy", ".npz", ".pt", ".pth", ".safetensors"),
)
LOOK_FOR_TEXT = 1000  # rows of a table, of which one has to have the column with the text
PLAIN_FILE = SourceConfig(id_field=None)  # how a whole text file is read
# What a damaged or foreign file makes the readers below raise (pyarrow's and Unicode's errors are ValueErrors).
READ_ERRORS = (ValueError, OSError, EOFError, lzma.LZMAError, zlib.error, ImportError)


def find_files(path: str) -> list[Path]:
    """The text files that `path` (a file, a glob with **, or a directory) means, sorted by kind and name.

    A directory gives its files with known endings, at any depth, hidden ones left out. A file named outright or by a
    glob is read as text whatever its ending (source code, say). Raises DataError if nothing matches.
    """
    root = user_path(path)
    if root.is_dir() and (root / "plan.json").is_file() and not (root / "meta.json").is_file():
        raise DataError(f"path={cut(path)!r}: shards that are not finished: run their launch/prepare_data.py again")
    if root.is_dir():
        files = [
            f
            for f in root.rglob("*")
            if _ending(f) in READERS and not any(p.startswith(".") for p in f.relative_to(root).parts)
        ]
        wanted = ", ".join(READERS) + " (also with " + ", ".join(COMPRESSED) + ")"
        problem = f"the directory holds no files ending in {wanted} and is no directory of token shards"
    else:
        files = [root] if root.exists() else [Path(f) for f in glob.glob(str(root), recursive=True)]
        problem = "no file matches" if glob.has_magic(str(root)) else "no such file or directory"
    files = sorted((f.resolve() for f in files if f.is_file()), key=lambda f: (_reader(f).kind, str(f)))
    if not files:
        raise DataError(f"path={cut(path)!r}: {problem} (looked in {Path.cwd()})")
    foreign = [f for f in files if _ending(f) in FOREIGN and _ending(f) not in READERS]
    if foreign:
        raise DataError(
            f"path={cut(path)!r}: {listed(foreign)} cannot be read: documents are jsonl, parquet or text. Convert "
            "tables to parquet or jsonl and others to text, or leave them out of the pattern"
        )
    return files


def content_hash(files: list[Path]) -> str:
    """Hex digest of the files' kinds and bytes, in order; their names do not matter."""
    digest = hashlib.sha256()
    for path in files:
        with open(path, "rb") as file:
            digest.update(f"{_reader(path).kind}:{hashlib.file_digest(file, 'sha256').hexdigest()};".encode())
    return digest.hexdigest()


class Documents:
    """The (id, text) of every document of a source; once read, `report` says which rows were none."""

    def __init__(self, config: SourceConfig, chat: ConversationReader | None = None, key: str = ""):
        """chat: what reads conversations; None = text. key: what stands before a field's name in messages."""
        self._config, self._chat, self._key = config, chat, key
        self._rows = self._without_text = 0

    def of_files(self, files: list[Path]) -> Iterator[tuple[str, str]]:
        """Those in `files`, in order. Raises DataError naming the file that cannot be read."""
        for reader, group in groupby(files, key=_reader):
            if reader.rows is None:
                if self._chat is not None:
                    what = f"conversations (format={self._config.format})"
                    raise DataError(f"{next(group)}: {what} are read from jsonl or parquet")
                for row in _rows_of_texts(list(group)):
                    yield from self._document(row, PLAIN_FILE, "text file")
            else:
                for path in group:
                    yield from self._of_table(_rows_of_table(reader, path), str(path))

    def of_hub(self, log=lambda line: None) -> Iterator[tuple[str, str]]:
        """Those of a hub data set. Raises DataError, naming the alternatives, if it cannot be had."""
        import datasets

        _quieten()
        config = self._config
        assert config.name is not None
        log(f"looking for {config.name} on the Hugging Face hub (gives up after about half a minute without a network)")
        try:
            load = partial(datasets.load_dataset, config.name, config.subset, split=config.split)
            table = load(streaming=True) if config.streaming else load(streaming=False)
            yield from self._of_table(table, str(config.name))
        except READ_ERRORS as error:
            raise DataError(
                f"hub data set {config.name!r} (subset {config.subset}, split {config.split!r}) cannot be read from "
                f"the Hugging Face hub: {first_line(error)}. Without a network: data=files data.path=<your files>, or "
                "data=embedded for the shipped books"
            ) from error

    def report(self, log) -> None:
        """Says what was left out."""
        if self._without_text:
            what = "rows without text (missing, null, empty or only white space)"
            log(f"left out {self._without_text:,} of {self._rows:,} {what}")
        if self._chat is not None:
            self._chat.report(log)

    def _of_table(self, rows, where: str) -> Iterator[tuple[str, str]]:
        """The documents of a table, of whose first LOOK_FOR_TEXT rows one has to have the format's columns."""
        columns = self._config.columns
        missing = {name: columns[name] for name in FORMATS[self._config.format].required}
        first: Mapping[str, Any] | None = None
        for number, row in enumerate(rows, 1):
            if missing:
                first = row if first is None else first
                missing = {name: column for name, column in missing.items() if column not in row}
                if missing and number == LOOK_FOR_TEXT:
                    break
            yield from self._document(row, self._config, where)
        if missing and first is not None:
            name, column = next(iter(missing.items()))
            raise DataError(
                f"{where} has no column {column!r}; it has {listed(first)}. Set {self._key}{name} to the one that is "
                "meant"
            )

    def _document(self, row: dict, config: SourceConfig, where: str) -> Iterator[tuple[str, str]]:
        """The (id, text) of a row, or nothing if it has none; of a conversation, its messages as JSON."""
        name = row.get(config.id_field) if config.id_field else None
        name = str(self._rows if name is None else name)
        self._rows += 1
        if self._chat is not None:
            text = self._chat.read(row, f"{where}, conversation {cut(name)}")
            if text is not None:
                yield name, text
            return
        text = document_of(row, config, where, self._key)
        if text and not text.isspace():
            yield name, text
        else:
            self._without_text += 1


def _reader(path: Path) -> Reader:
    """The reader for a file by its ending, before any ending of compression."""
    return READERS.get(_ending(path), TEXT)


def _ending(path: Path) -> str:
    suffixes = [s.lower() for s in path.suffixes if s.lower() not in COMPRESSED]
    return suffixes[-1] if suffixes else ""


def _load(kind: str, files: list[Path], **options):
    """A streamed `datasets` table over local files, or () if they are empty."""
    import datasets

    _quieten()
    names = [glob.escape(str(f)) for f in files]
    try:
        return datasets.load_dataset(kind, data_files=names, split="train", streaming=True, **options)
    except StopIteration:  # what datasets raises where there is no row to look at
        return ()


def _rows_of_table(reader: Reader, path: Path) -> Iterator[dict]:
    assert reader.rows is not None
    if path.stat().st_size == 0:
        return
    try:
        yield from reader.rows(path)
    except READ_ERRORS as error:
        why = f"{first_line(error)}{_zstd_hint(path, error)}"
        raise DataError(f"{path} cannot be read as {reader.kind}: {why}") from error


def _rows_of_texts(files: list[Path]) -> Iterator[dict]:
    """One row per file, all in one `datasets` table: opening one for each of very many small files would dominate."""
    done = 0
    files = [f for f in files if f.stat().st_size > 0]
    try:
        for row in _load("text", files, sample_by="document") if files else ():
            yield row
            done += 1
    except READ_ERRORS as error:
        path = files[min(done, len(files) - 1)]
        raise DataError(f"{path} cannot be read as UTF-8 text: {first_line(error)}{_zstd_hint(path, error)}") from error


def _zstd_hint(path: Path, error: Exception) -> str:
    return "; .zst needs `pip install zstandard`" if path.suffix == ".zst" else ""


def _quieten() -> None:
    """Their retries and parse errors go to the log as warnings, before the exception that says the same."""
    import datasets
    import huggingface_hub

    datasets.logging.set_verbosity(datasets.logging.CRITICAL)
    huggingface_hub.logging.set_verbosity_error()
    datasets.disable_progress_bars()
