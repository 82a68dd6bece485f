"""Documents as text: finds the files a path means and reads them, or a hub data set, through the `datasets` library.

One document is one row of jsonl or parquet, or one whole text file. Reading streams, so that nothing is held or copied
beside the token shards that come out of it.
"""

from __future__ import annotations

import glob
import hashlib
import lzma
import zlib
from collections.abc import Iterator
from itertools import groupby
from pathlib import Path

from conf.schema import SourceConfig
from data.errors import DataError
from data.sft import read_conversation

COMPRESSED = (".xz", ".gz", ".bz2", ".zst")
KINDS = {
    ".jsonl": "json",
    ".ndjson": "json",
    ".json": "json",
    ".parquet": "parquet",
    ".txt": "text",
    ".text": "text",
    ".md": "text",
}
PLAIN_FILE = SourceConfig(text_field="text", id_field=None)  # how a whole text file is read
# What a damaged or foreign file makes the readers below raise (pyarrow's and Unicode's errors are ValueErrors).
READ_ERRORS = (ValueError, OSError, EOFError, lzma.LZMAError, zlib.error, ImportError)


def find_files(path: str) -> list[Path]:
    """The text files that `path` (a file, a glob with **, or a directory) means, sorted by kind and name.

    A directory gives its files with known endings, at any depth, hidden ones left out. A file named outright or by a
    glob is read as text whatever its ending (source code, say). Raises DataError if nothing matches.
    """
    root = Path(path).expanduser()
    if root.is_dir():
        files = [
            f
            for f in root.rglob("*")
            if _kind(f, None) and not any(p.startswith(".") for p in f.relative_to(root).parts)
        ]
        wanted = ", ".join(KINDS) + " (also with " + ", ".join(COMPRESSED) + ")"
        problem = f"the directory holds no files ending in {wanted} and is no directory of token shards"
    else:
        files = [root] if root.exists() else [Path(f) for f in glob.glob(str(root), recursive=True)]
        problem = "no file matches" if glob.has_magic(str(root)) else "no such file or directory"
    files = sorted((f.resolve() for f in files if f.is_file()), key=lambda f: (_kind(f, "text"), str(f)))
    if not files:
        raise DataError(f"path={path!r}: {problem} (looked in {Path.cwd()})")
    return files


def content_hash(files: list[Path]) -> str:
    """Hex digest of the files' kinds and bytes, in order; their names do not matter."""
    digest = hashlib.sha256()
    for path in files:
        with open(path, "rb") as file:
            digest.update(f"{_kind(path, 'text')}:{hashlib.file_digest(file, 'sha256').hexdigest()};".encode())
    return digest.hexdigest()


def read_files(files: list[Path], config: SourceConfig) -> Iterator[tuple[str, str]]:
    """(id, text) of every non-empty document in `files`, in order. Raises DataError naming the file that cannot be
    read."""
    rows = 0
    for kind, group in groupby(files, key=lambda f: _kind(f, "text")):
        if kind == "text":
            if config.format == "chat":
                raise DataError(f"{next(group)}: conversations (format=chat) are read from jsonl or parquet, not text")
            for row in _rows_of_texts(list(group)):
                rows += 1
                yield from _document(row, rows - 1, PLAIN_FILE, "text file")
        else:
            for path in group:
                for row in _rows_of_table(kind, path):
                    rows += 1
                    yield from _document(row, rows - 1, config, str(path))


def read_hub(config: SourceConfig, log=lambda line: None) -> Iterator[tuple[str, str]]:
    """(id, text) of every non-empty document of a hub data set. Raises DataError, naming the alternatives, if it cannot
    be had."""
    import datasets

    _quieten()
    log(f"looking for {config.name} on the Hugging Face hub (gives up after about half a minute without a network)")
    try:
        table = datasets.load_dataset(config.name, config.subset, split=config.split, streaming=config.streaming)
        for number, row in enumerate(table):
            yield from _document(row, number, config, config.name)
    except READ_ERRORS as error:
        raise DataError(
            f"hub data set {config.name!r} (subset {config.subset}, split {config.split!r}) cannot be read from the "
            f"Hugging Face hub: {first_line(error)}. Without a network: data=files data.path=<your files>, or "
            "data=embedded for the shipped books"
        ) from error


def _kind(path: Path, default: str | None) -> str | None:
    """The reader for a file by its ending, before any ending of compression."""
    suffixes = [s for s in path.suffixes if s.lower() not in COMPRESSED]
    return KINDS.get(suffixes[-1].lower() if suffixes else "", default)


def _load(kind: str, files: list[Path], **options):
    """A streamed `datasets` table over local files, or () if they are empty."""
    import datasets

    _quieten()
    names = [glob.escape(str(f)) for f in files]
    try:
        return datasets.load_dataset(kind, data_files=names, split="train", streaming=True, **options)
    except StopIteration:  # what datasets raises where there is no row to look at
        return ()


def _rows_of_table(kind: str, path: Path) -> Iterator[dict]:
    if path.stat().st_size == 0:
        return
    try:
        yield from _load(kind, [path])
    except READ_ERRORS as error:
        raise DataError(f"{path} cannot be read as {kind}: {first_line(error)}{_zstd_hint(path, error)}") from error


def _rows_of_texts(files: list[Path]) -> Iterator[dict]:
    """One row a file, all in one `datasets` table: opening one for each of very many small files would dominate."""
    done = 0
    files = [f for f in files if f.stat().st_size > 0]
    try:
        for row in _load("text", files, sample_by="document") if files else ():
            yield row
            done += 1
    except READ_ERRORS as error:
        path = files[min(done, len(files) - 1)]
        raise DataError(f"{path} cannot be read as UTF-8 text: {first_line(error)}{_zstd_hint(path, error)}") from error


def _document(row: dict, number: int, config: SourceConfig, where: str) -> Iterator[tuple[str, str]]:
    """The (id, text) of a row, or nothing if its text is empty; of a conversation, its messages as JSON."""
    name = row.get(config.id_field) if config.id_field else None
    name = str(number if name is None else name)
    if config.format == "chat":
        yield name, read_conversation(row, config, f"{where}, conversation {name}")
        return
    text_field = config.text_field
    if text_field not in row:
        raise DataError(
            f"{where} has no column {text_field!r}; it has {', '.join(row)}. Set text_field to the one with the text"
        )
    text = row[text_field]
    if text is not None and not isinstance(text, str):
        raise DataError(
            f"{where}: column {text_field!r} holds {type(text).__name__}, not text; columns: {', '.join(row)}"
        )
    if text:
        yield name, text


def _zstd_hint(path: Path, error: Exception) -> str:
    return "; .zst needs `pip install zstandard`" if path.suffix == ".zst" else ""


def first_line(error: Exception) -> str:
    """The first line of an exception's text, or its type if it has none."""
    return str(error).strip().splitlines()[0] if str(error).strip() else type(error).__name__


def _quieten() -> None:
    """Their retries and parse errors go to the log as warnings, before the exception that says the same."""
    import datasets
    import huggingface_hub

    datasets.logging.set_verbosity(datasets.logging.CRITICAL)
    huggingface_hub.logging.set_verbosity(huggingface_hub.logging.ERROR)
    datasets.disable_progress_bars()
