"""Documents to token shards, in parallel and restartable: what launch/prepare_data.py and the training cache both call.

One process reads and cuts the documents into groups of about `shard_chars` characters; each group becomes one shard,
tokenised by a worker process. Which documents a shard holds depends on the text alone, so a restart keeps the finished
shards, and any number of workers gives the same bytes.
"""

from __future__ import annotations

import fcntl
import json
import multiprocessing
import os
import signal
import threading
import time
from collections import deque
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import Executor, Future, ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from contextlib import ExitStack, contextmanager
from pathlib import Path

import numpy as np

from conf.files import Object, read_json
from conf.words import cut, listed, show
from data.conversations import from_json
from data.errors import DataError
from data.sft import ChatEncoder, ChatTemplate
from data.shards import META, TokenShards, finished_shard, trim_shard, write_atomic, write_meta, write_shard
from data.tokenizer import Tokenizer, load_tokenizer

SHARD_CHARS = 16_000_000
PLAN = "plan.json"
Encode = Callable[[str], "tuple[np.ndarray, np.ndarray | None]"]


def prepare(
    documents: Iterable[tuple[str, str]],
    tokenizer: Tokenizer,
    directory: str | Path,
    *,
    origin: dict,
    title: str,
    workers: int = 0,
    max_tokens: int | None = None,
    shard_chars: int = SHARD_CHARS,
    template: ChatTemplate | None = None,
    log: Callable[[str], None] = lambda line: None,
) -> dict:
    """Tokenise (id, text) pairs into `directory`, or finish what an interrupted call began; returns its meta.json.

    template: the texts are conversations (data.conversations), rendered and masked by it; None = plain text.
    origin: JSON-able, says what the documents are and must change with them; a directory begun from something else is
    refused. title: what to call them in messages. workers: processes, 0 = this one. max_tokens: stop after the document
    that reaches it. Raises DataError for empty input, a directory of something else, a damaged finished directory, or a
    worker that was killed.
    """
    directory = Path(directory)
    try:
        directory.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise DataError(f"{directory} cannot be made ({error.strerror}): choose another (data.cache_dir)") from error
    plan = origin | {"tokenizer": tokenizer.fingerprint, "max_tokens": max_tokens, "shard_chars": shard_chars}
    with _locked(directory, log):
        _check_plan(directory, plan)
        if (directory / META).exists():
            log(f"{directory} is complete: checking it")
            return TokenShards(directory, check_tokens=True).meta
        for leftover in directory.glob(".*.tmp"):
            leftover.unlink()
        groups = _groups(documents, shard_chars)
        try:
            encode = encoder(tokenizer, template)
            with _pool(tokenizer, template, workers) as pool:
                shards = _write_shards(directory, groups, encode, pool, backlog=2 * workers)
                records = _collect(directory, shards, tokenizer, max_tokens, log)
        except BrokenProcessPool as error:
            raise DataError(
                "a tokenising process was killed (out of memory?). The finished shards are kept: run the same again "
                "with fewer workers"
            ) from error
        if not records:
            raise DataError(f"{title}: there is no text in it (no document, or every one is empty)")
        _remove_from(directory, len(records))
        return write_meta(directory, tokenizer, records, plan | {"title": title})


def _write_shards(
    directory, groups, encode: Encode, pool: Executor | None, backlog: int
) -> Iterator[tuple[dict, bool]]:
    """Write the shards that are not there yet; yields every shard's record, in order, and if it was there before."""
    pending: deque[tuple[Future, bool]] = deque()
    for number, group in enumerate(groups):
        kept = finished_shard(directory, number)
        record = _submit(pool, directory, number, group, encode) if kept is None else _done(kept)
        pending.append((record, kept is not None))
        if len(pending) > backlog:
            yield _result(*pending.popleft())
    while pending:
        yield _result(*pending.popleft())


def _result(record: Future, kept: bool) -> tuple[dict, bool]:
    return record.result(), kept


def _collect(directory: Path, shards, tokenizer: Tokenizer, max_tokens: int | None, log) -> list[dict]:
    """The records of the shards as they come, up to max_tokens; the shard that reaches it is cut there."""
    records: list[dict] = []
    total = new = 0
    began = time.monotonic()
    for record, kept in shards:
        number = len(records)
        done = False
        if max_tokens is not None and total + record["tokens"] >= max_tokens:
            done, record = True, trim_shard(directory, number, max_tokens - total, tokenizer)
        records.append(record)
        total += record["tokens"]
        new += 0 if kept else record["tokens"]
        speed = "kept from before" if kept else f"{new / (time.monotonic() - began):,.0f} tokens/s"
        counts = f"{record['documents']:,} documents, {record['tokens']:,} tokens; {total:,} so far"
        log(f"shard {number:05d}: {counts}, {speed}")
        if done:
            break
    return records


def _submit(pool: Executor | None, directory: Path, number: int, group, encode: Encode) -> Future:
    if pool is not None:
        return pool.submit(_tokenise_in_worker, directory, number, group)
    return _done(_tokenise(directory, number, group, encode))


def _done(record: dict) -> Future:
    future: Future = Future()
    future.set_result(record)
    return future


def encoder(tokenizer: Tokenizer, template: ChatTemplate | None) -> Encode:
    """text -> (tokens, None), or with a template: a conversation as JSON -> (tokens, mask of what is supervised)."""
    if template is None:
        return lambda text: (tokenizer.document(text), None)
    chat = ChatEncoder(tokenizer, template)
    return lambda text: chat.encode(*from_json(text))


def _tokenise(directory: Path, number: int, group: list[tuple[str, str]], encode: Encode) -> dict:
    documents, masks = [], []
    for name, text in group:
        try:
            tokens, mask = encode(text)
        except DataError as error:
            raise DataError(f"conversation {cut(name)}: {error}") from error
        documents.append(tokens)
        masks.append(mask)
    is_text = masks[0] is None
    return write_shard(directory, number, documents, [name for name, _ in group], None if is_text else masks)


def _groups(documents: Iterable[tuple[str, str]], shard_chars: int) -> Iterator[list[tuple[str, str]]]:
    """Consecutive documents, as few as reach `shard_chars` characters."""
    group, chars = [], 0
    for name, text in documents:
        group.append((name, text))
        chars += len(text)
        if chars >= shard_chars:
            yield group
            group, chars = [], 0
    if group:
        yield group


def _remove_from(directory: Path, number: int) -> None:
    """Remove shards from `number` on: workers ran ahead of max_tokens."""
    for path in directory.glob("[0-9][0-9][0-9][0-9][0-9]*.*"):
        if int(path.name.split(".")[0]) >= number:
            path.unlink()


def _check_plan(directory: Path, plan: dict) -> None:
    """Leave `plan` in the directory, or raise if it was begun with another one."""
    path = directory / PLAN
    remedy = "Delete the directory and prepare it again"
    old = read_json(path, Object, error=DataError, remedy=remedy) if path.exists() else None
    if old is None:
        others = sorted(p.name for p in directory.iterdir() if not p.name.startswith("."))
        if others:
            raise DataError(
                f"{directory} is not empty ({', '.join(others[:3])}) and holds no token shards: choose a new directory"
            )
    elif old != plan and any(directory.glob("[0-9]*.json")):
        keys = sorted(k for k in old.keys() | plan.keys() if old.get(k) != plan.get(k))
        changes = listed((f"{k} was {show(old.get(k))}, now {show(plan.get(k))}" for k in keys), "; ")
        raise DataError(
            f"{directory} holds token shards of something else: {changes}. Choose another directory, or delete this one"
        )
    if old != plan:
        write_atomic(path, json.dumps(plan, indent=1).encode())


@contextmanager
def _locked(directory: Path, log):
    """Only one process writes a directory at a time; a second one waits, and then usually finds the work done."""
    with open(directory / ".lock", "w") as file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            log(f"waiting for another process that is writing {directory}")
            fcntl.flock(file, fcntl.LOCK_EX)
        yield


# --- worker processes

_worker_encode: Encode | None = None


@contextmanager
def _pool(tokenizer: Tokenizer, template: ChatTemplate | None, workers: int):
    """Yields a pool of `workers` tokenising processes, or None for none. Leaving it drops the work not yet begun."""
    with ExitStack() as stack:
        pool = None
        if workers > 0:
            # spawn: forking a process that runs threads (torch, tokenizers, pyarrow) can deadlock
            context = multiprocessing.get_context("spawn")
            pool = ProcessPoolExecutor(
                workers, mp_context=context, initializer=_start_worker, initargs=(tokenizer.name, template)
            )
            stack.callback(pool.shutdown, wait=True, cancel_futures=True)
        yield pool


def _start_worker(tokenizer_name: str, template: ChatTemplate | None) -> None:
    global _worker_encode
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C is for the parent, which ends the workers
    _worker_encode = encoder(load_tokenizer(tokenizer_name), template)
    threading.Thread(target=_end_with_parent, daemon=True).start()


def _end_with_parent() -> None:
    """A pool's process would wait for ever for work from a parent that was killed."""
    parent = multiprocessing.parent_process()
    assert parent is not None
    parent.join()
    os._exit(1)


def _tokenise_in_worker(directory: Path, number: int, group: list[tuple[str, str]]) -> dict:
    assert _worker_encode is not None  # set by _start_worker
    return _tokenise(directory, number, group, _worker_encode)
