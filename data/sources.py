"""What a run reads: every configured source as random access to tokenised documents.

A source is a directory of token shards. Text (files, hub sets, the shipped books) is tokenised once into such a
directory under data.cache_dir, named by the content and the tokenizer, by the run's first process while the others
wait.
"""

from __future__ import annotations

import hashlib
import json
import re
from collections.abc import Callable
from dataclasses import asdict, replace
from pathlib import Path
from typing import Protocol

import numpy as np

from conf.files import read_text, user_path
from conf.formats import FORMATS
from conf.numbers import parse_length
from conf.schema import DataConfig, SourceConfig
from data import chat_set
from data.conversations import ConversationReader
from data.errors import DataError
from data.prepare import PLAN, prepare
from data.sft import ChatEncoder, load_template, usable_inputs
from data.shards import META, TokenShards, write_atomic
from data.synthetic import SyntheticSource
from data.text import Documents, content_hash, find_files
from data.tokenizer import EMBEDDED, Tokenizer, load_tokenizer

SHIPPED_TEXT = {"embedded": EMBEDDED / "train.jsonl.xz", "embedded-validation": EMBEDDED / "validation.jsonl.xz"}
# Conversations made of the same books: <name>:<length> (data/chat_set.py).
SHIPPED_CHAT = {
    f"{name}-chat": books for name, books in (("embedded", "embedded"), ("validation", "embedded-validation"))
}
# Shards up to this size have their tokens' checksums verified at every start (a second or two); larger ones only by
# launch/prepare_data.py, on being run again. Sizes and indices are always verified.
CHECKED_BYTES = 1 << 30


class Source(Protocol):
    """Documents of one source. Document numbers run from 0 to num_documents - 1.

    lengths: int64 [num_documents], tokens with BOS and EOS. fingerprint: 16 hex digits, changes with any token or
    selection. is_chat: only some tokens are supervised.
    """

    name: str
    lengths: np.ndarray
    num_documents: int
    num_tokens: int
    fingerprint: str
    is_chat: bool

    @property
    def ids(self) -> list[str]:
        """The documents' ids in order."""
        ...

    def window(self, document: int, start: int, length: int) -> np.ndarray:
        """The tokens of `length` inputs from `start` and of their labels: [length + 1]; fewer where a conversation ends
        before."""
        ...

    def supervised(self, document: int, start: int, length: int) -> np.ndarray | None:
        """Which tokens of `window` are supervised: bool, as many as it gives; None for text, where all are."""
        ...

    def usable_inputs(self, seq_len: int) -> np.ndarray:
        """Of conversations: how many inputs of each are trained on at this length, int64."""
        ...


class ShardSource:
    """A Source of token shards, or of some of their documents."""

    def __init__(self, name: str, shards: TokenShards, selection: np.ndarray | None = None):
        """selection: int64, the shards' documents that belong to the source; None = all."""
        self.name, self._shards, self._selection = name, shards, selection
        self.lengths = shards.lengths if selection is None else shards.lengths[selection]
        self.num_documents, self.num_tokens = len(self.lengths), int(self.lengths.sum())
        self.fingerprint = shards.fingerprint
        if selection is not None:
            chosen = np.ascontiguousarray(selection, "<i8").tobytes()
            self.fingerprint = hashlib.sha256(shards.fingerprint.encode() + chosen).hexdigest()[:16]
        self.is_chat = shards.has_masks
        self._usable: dict[int, np.ndarray] = {}

    @property
    def ids(self) -> list[str]:
        """The documents' ids in order."""
        ids = self._shards.ids
        return ids if self._selection is None else [ids[i] for i in self._selection]

    def tokens(self, document: int, start: int, stop: int) -> np.ndarray:
        """Tokens [start, stop) of a document: uint16 or uint32 [stop - start], a view of the file."""
        return self._shards.tokens(self._place(document), start, stop)

    def window(self, document: int, start: int, length: int) -> np.ndarray:
        """The tokens of `length` inputs from `start` and of their labels: [length + 1]; fewer where a conversation ends
        before."""
        return self.tokens(document, start, self._stop(document, start, length))

    def supervised(self, document: int, start: int, length: int) -> np.ndarray | None:
        """Which tokens of `window` are supervised: bool, as many as it gives; None for text, where all are."""
        if not self.is_chat:
            return None
        return self._shards.supervised(self._place(document), start, self._stop(document, start, length))

    def usable_inputs(self, seq_len: int) -> np.ndarray:
        """Of conversations: how many inputs of each are trained on at this length (data.sft.usable_inputs)."""
        assert self.is_chat
        if seq_len not in self._usable:
            self._usable[seq_len] = usable_inputs(
                self.lengths, seq_len, lambda d, start, stop: self._shards.supervised(self._place(d), start, stop)
            )
        return self._usable[seq_len]

    def _place(self, document: int) -> int:
        return document if self._selection is None else int(self._selection[document])

    def _stop(self, document: int, start: int, length: int) -> int:
        stop = start + length + 1
        return min(stop, int(self.lengths[document])) if self.is_chat else stop


def open_sources(
    config: DataConfig,
    *,
    rank_zero: bool = True,
    barrier: Callable[[], None] | None = None,
    log: Callable[[str], None] = lambda line: None,
) -> dict[str, Source]:
    """The training sources by name. One process a file system passes rank_zero=True and tokenises what is not in the
    cache; the others wait in `barrier`. Raises DataError."""
    if not config.sources:
        raise DataError(
            "data.sources is empty: choose data=embedded, data=files data.path=... or data=hub data.name=..."
        )
    return _open(config, config.sources, rank_zero, barrier, log)


def open_validation(
    config: DataConfig,
    *,
    rank_zero: bool = True,
    barrier: Callable[[], None] | None = None,
    log: Callable[[str], None] = lambda line: None,
) -> Source | None:
    """The held-out documents, or None if the configuration has none. As open_sources, but that `embedded` here means
    the shipped books that training on `embedded` leaves out."""
    if config.validation is None:
        return None
    source = config.validation
    if source.path == "embedded":
        source = replace(source, path="embedded-validation")
    elif source.path is not None and source.path.startswith("embedded-chat:"):
        source = replace(source, path="validation-chat:" + source.path.partition(":")[2])
    if source.synthetic is not None:
        vocab_size = load_tokenizer(config.tokenizer).vocab_size
        return SyntheticSource("validation", source.synthetic, vocab_size, held_out=True)
    return _open(config, {"validation": source}, rank_zero, barrier, log)["validation"]


def known_sources(config: DataConfig) -> dict[str, Source]:
    """The training sources that are tokenised already, by name; for the plan.

    Reads indices only, writes nothing and asks no network. Raises DataError for shards of another tokenizer.
    """
    tokenizer = load_tokenizer(config.tokenizer)
    known: dict[str, Source] = {}
    for name, source in config.sources.items():
        if source.synthetic is not None:
            known[name] = SyntheticSource(name, source.synthetic, tokenizer.vocab_size)
            continue
        directory = shard_directory(source)
        prepared = directory is None
        if directory is None:
            directory = _cached_text(source, config, tokenizer)
        if directory is not None and (directory / META).exists():
            shards = TokenShards(directory)
            _check_tokenizer(name, shards, tokenizer)
            selection = _selection(name, source, shards, prefix=not prepared, log=lambda line: None)
            known[name] = ShardSource(name, shards, selection)
    return known


def _cached_text(source: SourceConfig, config: DataConfig, tokenizer: Tokenizer) -> Path | None:
    """Where the source's token shards are if a run has tokenised it; None if its text is not there or was not read."""
    cache = user_path(config.cache_dir)
    try:
        is_set = source.path is not None and is_shipped(source.path) and source.path not in SHIPPED_TEXT
        if source.name is None and not is_set and not _content_memo(_text_files(source), cache).is_file():
            return None
        encoder = chat_encoder(source, config.chat_template, tokenizer)
        origin, _ = text_origin("", source, cache, lambda line: None, encoder)
    except DataError:
        return None
    return _cache_directory(origin, source, config, tokenizer)


def _open(config: DataConfig, sources: dict[str, SourceConfig], rank_zero, barrier, log) -> dict[str, Source]:
    tokenizer = load_tokenizer(config.tokenizer)
    opened: dict[str, Source] = {}
    try:
        if rank_zero:
            opened = {name: _open_one(name, source, config, tokenizer, True, log) for name, source in sources.items()}
    finally:
        if barrier is not None:
            barrier()  # also after an error: nobody is left waiting for a process that gave up
    return opened or {name: _open_one(name, source, config, tokenizer, False, log) for name, source in sources.items()}


def _open_one(name: str, source: SourceConfig, config: DataConfig, tokenizer: Tokenizer, make: bool, log) -> Source:
    """One source; `make` = tokenise text that is not in the cache, and check tokens."""
    if source.synthetic is not None:
        return SyntheticSource(name, source.synthetic, tokenizer.vocab_size)
    directory = shard_directory(source)
    prepared = directory is None
    if directory is None:
        directory = prepare_text(name, source, config, tokenizer, make, log)
    shards = TokenShards(directory)
    _check_tokenizer(name, shards, tokenizer)
    _check_format(name, source, shards, config, tokenizer)
    if make and shards.num_bytes <= CHECKED_BYTES:
        shards.check_tokens()
    return ShardSource(name, shards, _selection(name, source, shards, prefix=not prepared, log=log))


def shard_directory(source: SourceConfig) -> Path | None:
    """The directory of token shards that source.path names, or None if it names text or a hub set."""
    if source.path is None or is_shipped(source.path):
        return None
    path = user_path(source.path)
    return path if (path / META).exists() or (path / PLAN).exists() else None


def prepare_text(name: str, source: SourceConfig, config: DataConfig, tokenizer: Tokenizer, make: bool, log) -> Path:
    """The cache directory with the source's token shards, written first if `make` and it is not there."""
    cache = user_path(config.cache_dir)
    encoder = chat_encoder(source, config.chat_template, tokenizer)
    key = "data.validation." if name == "validation" else f"data.sources.{name}."
    origin, documents = text_origin(name, source, cache, log, encoder, key)
    directory = _cache_directory(origin, source, config, tokenizer)
    if not (directory / META).exists():
        if not make:
            raise DataError(
                f"source {name!r}: the first process left no tokens in {directory}. It failed (see its message), "
                f"or data.cache_dir={config.cache_dir!r} is not a directory that all processes see"
            )
        log(f"source {name!r}: tokenising {_title(source)} with {tokenizer.name} into {directory} (once)")
        prepare(
            documents(),
            tokenizer,
            directory,
            origin=origin,
            title=_title(source),
            workers=config.num_workers,
            max_tokens=source.max_tokens,
            template=None if encoder is None else encoder.template,
            log=log,
        )
    return directory


def _cache_directory(origin: dict, source: SourceConfig, config: DataConfig, tokenizer: Tokenizer) -> Path:
    key = json.dumps([origin, tokenizer.fingerprint, source.max_tokens], sort_keys=True)
    return user_path(config.cache_dir) / hashlib.sha256(key.encode()).hexdigest()[:24]


def _text_files(source: SourceConfig) -> list[Path]:
    assert source.path is not None
    return [SHIPPED_TEXT[source.path]] if source.path in SHIPPED_TEXT else find_files(source.path)


def is_shipped(path: str) -> bool:
    """True if `path` names what the project ships, not files."""
    return path in SHIPPED_TEXT or path.partition(":")[0] in SHIPPED_CHAT


def chat_encoder(source: SourceConfig, template: str | None, tokenizer: Tokenizer) -> ChatEncoder | None:
    """What encodes the source's conversations; None for text."""
    return ChatEncoder(tokenizer, load_template(template, tokenizer)) if source.is_chat else None


def text_origin(
    name: str, source: SourceConfig, cache: Path | None, log, encoder: ChatEncoder | None = None, key: str = ""
) -> tuple[dict, Callable]:
    """(what identifies the source's text, a function that gives its (id, text) pairs). encoder: of conversations. key:
    what stands before the name of one of the source's keys in messages.

    Local files are identified by their content, a hub set by its name: it is not asked again once it is in the cache.
    """
    if (source.path is None) == (source.name is None):
        raise DataError(
            f"source {name!r} needs either path (files, a glob, a directory, embedded) or name (a hub data set); it "
            f"has path={source.path!r}, name={source.name!r}"
        )
    fields = source.columns | {"id_field": source.id_field}
    version = FORMATS[source.format].version
    if version is not None:
        fields["format"] = f"{source.format} {version}"
    if encoder is not None:
        fields["template"] = encoder.template.fingerprint
    if source.path is not None and source.path.partition(":")[0] in SHIPPED_CHAT:
        return _chat_set_origin(name, source.path, encoder)
    if source.name is not None:
        if source.streaming and source.max_tokens is None:
            raise DataError(f"source {name!r}: streaming=true needs max_tokens (how much of {source.name} to take)")
        hub = {key: asdict(source)[key] for key in ("name", "subset", "split")}
        return hub | fields, lambda: _documents(source, encoder, key, log, None)
    files = _text_files(source)
    content = {"content": _cached_content_hash(files, cache)}
    return content | fields, lambda: _documents(source, encoder, key, log, files)


def _documents(source: SourceConfig, encoder: ChatEncoder | None, key: str, log, files: list[Path] | None):
    """The documents of these files, or of the hub data set for None; then what was left out is said."""
    chat = None if encoder is None else ConversationReader(source, encoder.template.source, key)
    documents = Documents(source, chat, key)
    yield from documents.of_hub(log) if files is None else documents.of_files(files)
    documents.report(log)


def _chat_set_origin(name: str, path: str, encoder: ChatEncoder | None) -> tuple[dict, Callable]:
    """As text_origin, for a shipped chat set."""
    kind, _, text = path.partition(":")
    if encoder is None:
        raise DataError(f"source {name!r}: path={path!r} is a chat set: say format=chat")
    try:
        length = parse_length(text)
    except ValueError as error:
        raise DataError(
            f"source {name!r}: path={path!r}: {error}; say embedded-chat:2K, for up to 2K tokens"
        ) from error
    if length < chat_set.LEAST_LENGTH:
        raise DataError(f"source {name!r}: path={path!r}: takes {chat_set.LEAST_LENGTH} tokens at least")
    books = SHIPPED_TEXT[SHIPPED_CHAT[kind]]
    identity = {"chat_set": chat_set.VERSION, "length": length, "content": content_hash([books])}
    documents = lambda: chat_set.conversations(books, length, encoder)  # noqa: E731
    return identity | {"format": "chat", "template": encoder.template.fingerprint}, documents


def _cached_content_hash(files: list[Path], cache: Path | None) -> str:
    """content_hash, remembered in the cache under the files' names, sizes and times: large corpora take minutes to
    read."""
    if cache is None:
        return content_hash(files)
    memo = _content_memo(files, cache)
    known = memo.read_bytes() if memo.is_file() else b""
    if not re.fullmatch(rb"[0-9a-f]{64}", known):  # none, or not ours: it costs only the reading
        known = content_hash(files).encode()
        try:
            memo.parent.mkdir(parents=True, exist_ok=True)
            write_atomic(memo, known)
        except OSError as error:
            raise DataError(f"data.cache_dir={cache} cannot be written ({error.strerror}): choose another") from error
    return known.decode()


def _content_memo(files: list[Path], cache: Path) -> Path:
    """The file that remembers the content hash of `files` as they are now."""
    stats = [(str(f), f.stat().st_size, f.stat().st_mtime_ns) for f in files]
    return cache / "content" / hashlib.sha256(json.dumps(stats).encode()).hexdigest()[:24]


def _check_tokenizer(name: str, shards: TokenShards, tokenizer: Tokenizer) -> None:
    theirs = shards.meta["tokenizer"]
    if theirs["fingerprint"] != tokenizer.fingerprint:
        raise DataError(
            f"source {name!r}: the shards in {shards.directory} were made with tokenizer {theirs['name']!r} "
            f"({theirs['fingerprint']}), "
            f"the run uses {tokenizer.name!r} ({tokenizer.fingerprint}). Set data.tokenizer to the first, or prepare "
            "the data again"
        )


def _check_format(name: str, source: SourceConfig, shards: TokenShards, config: DataConfig, tokenizer) -> None:
    """DataError unless the shards hold what source.format says, conversations in the run's own template."""
    if shards.has_masks != source.is_chat:
        held = ("text", "conversations")[shards.has_masks]
        raise DataError(
            f"source {name!r}: the shards in {shards.directory} hold {held}, and format={source.format} is not that"
        )
    if not shards.has_masks:
        return
    theirs, ours = shards.meta["origin"].get("template"), load_template(config.chat_template, tokenizer)
    if theirs != ours.fingerprint:
        raise DataError(
            f"source {name!r}: the conversations in {shards.directory} were written with another chat template "
            f"({theirs}) than data.chat_template gives ({ours.name}, {ours.fingerprint}): choose theirs, or prepare "
            "the data again"
        )


def _selection(name: str, source: SourceConfig, shards: TokenShards, *, prefix: bool, log) -> np.ndarray | None:
    """The documents that max_tokens (of ready-made shards) and exclude_ids leave; None = all."""
    keep = np.ones(len(shards.lengths), dtype=bool)
    if prefix and source.max_tokens is not None:
        before = np.cumsum(shards.lengths) - shards.lengths
        keep &= before < source.max_tokens
    if source.exclude_ids is not None:
        path = user_path(source.exclude_ids)
        if not path.is_file():
            raise DataError(
                f"source {name!r}: exclude_ids={source.exclude_ids!r}: no such file (one document id per line)"
            )
        excluded = set(read_text(path, error=DataError, remedy="It takes one document id per line").split("\n")) - {""}
        hit = np.array([i in excluded for i in shards.ids])
        log(f"source {name!r}: {int(hit.sum())} documents left out by the {len(excluded)} ids of {path}")
        keep &= ~hit
    if not keep.any():
        raise DataError(f"source {name!r}: no document is left of {len(keep)} after max_tokens and exclude_ids")
    return None if keep.all() else np.flatnonzero(keep)


def _title(source: SourceConfig) -> str:
    return source.path or f"{source.name} ({source.split})"


__all__ = ["DataError", "ShardSource", "Source", "known_sources", "open_sources", "open_validation"]
