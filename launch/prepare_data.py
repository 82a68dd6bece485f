"""Tokenise text into token shards, which a run then reads with `data=files data.path=<to>`.

    python launch/prepare_data.py source='corpus/**/*.parquet' to=shards/corpus tokenizer=bpe-32k workers=16

Run the same command again after an interruption and it goes on behind the last finished shard; run on a finished
directory, it verifies every checksum.
"""

from __future__ import annotations

import glob
import re
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
sys.path[:] = [str(ROOT)] + [p for p in sys.path if Path(p or ".").resolve() != ROOT / "launch"]

from conf.files import user_path  # noqa: E402
from conf.numbers import parse_tokens  # noqa: E402
from conf.schema import SourceConfig  # noqa: E402
from conf.words import cut  # noqa: E402
from data.errors import DataError  # noqa: E402
from data.prepare import SHARD_CHARS, prepare  # noqa: E402
from data.sources import chat_encoder, is_shipped, text_origin  # noqa: E402
from data.tokenizer import load_tokenizer  # noqa: E402
from launch.cli import UsageError, exits_on, key_values  # noqa: E402

KEYS = {
    "source": "text, jsonl or parquet (also .xz, .gz, .zst): a file, a quoted glob or a directory; or a hub data set "
    "(owner/name)",
    "to": "directory for the shards, new or begun by this command before",
    "tokenizer": "bytes, bpe-4k, bpe-32k, a tokenizer.json or a Hugging Face tokenizer directory",
    "format": "text (default), or chat: conversations, of which only the assistant's turns are learnt",
    "chat_template": "chat: chatml, llama3, plain or a jinja file (default: the tokenizer's own)",
    "text_field": "column that holds the document (default text)",
    "messages_field": "chat: column with the messages (default messages)",
    "prompt_field": "chat, in rows without messages: column with the user's turn (default prompt)",
    "response_field": "chat, in rows without messages: column with the assistant's turn (default response)",
    "id_field": "column that names a document (default id; its running number where there is none)",
    "workers": "tokenising processes (default 0: none beside this one)",
    "max_tokens": "stop after this many tokens, e.g. 2B (default: all)",
    "subset": "configuration of a hub data set",
    "split": "split of a hub data set (default train)",
    "streaming": "true: read a hub data set as a stream instead of downloading it first; needs max_tokens",
    "shard_mb": f"millions of characters a shard, the unit of restarts and workers (default {SHARD_CHARS // 10**6})",
}


@exits_on(DataError, OSError)
def main(argv: list[str] | None = None) -> None:
    """The command; see the module's text."""
    values = key_values(
        sys.argv[1:] if argv is None else argv, KEYS, about=__doc__, required=("source", "to", "tokenizer")
    )
    source = _source(values)
    tokenizer = load_tokenizer(values["tokenizer"])
    encoder = chat_encoder(source, values.get("chat_template"), tokenizer)
    origin, documents = text_origin("source", source, None, _say, encoder)
    meta = prepare(
        documents(),
        tokenizer,
        user_path(values["to"]),
        origin=origin,
        title=values["source"],
        workers=_whole_number(values, "workers", 0, at_least=0),
        max_tokens=source.max_tokens,
        template=None if encoder is None else encoder.template,
        shard_chars=_whole_number(values, "shard_mb", SHARD_CHARS // 10**6, at_least=1) * 10**6,
        log=_say,
    )
    print(
        f"{values['to']}: {meta['documents']:,} documents, {meta['tokens']:,} tokens of {tokenizer.name} in "
        f"{len(meta['shards'])} "
        f"shard(s), fingerprint {meta['fingerprint']}\nuse: data=files data.path={values['to']} "
        f"data.tokenizer={values['tokenizer']}"
    )


def _source(values: dict[str, str]) -> SourceConfig:
    """The source that the arguments describe: a path if it can be one, else the name of a hub data set."""
    text = values["source"]
    there = is_shipped(text) or user_path(text).exists() or glob.has_magic(text)
    is_hub = not there and re.fullmatch(r"[\w-]+/[\w.-]+", text) is not None and not Path(text).suffix
    if is_hub:
        _say(f"{text} is no path here, so it is taken for a hub data set")
    max_tokens = values.get("max_tokens")
    streaming = values.get("streaming", "false")
    if streaming not in ("true", "false"):
        raise UsageError(f"streaming={streaming!r}: true or false")
    try:
        limit = None if max_tokens is None else parse_tokens(max_tokens)
    except ValueError as error:
        raise UsageError(f"max_tokens={cut(repr(max_tokens))}: {error}") from error
    if limit == 0:
        raise UsageError(f"max_tokens={max_tokens}: takes 1 at least")
    if values.get("format", "text") not in ("text", "chat"):
        raise UsageError(f"format={values['format']!r}: text or chat")
    chat_keys = ("chat_template", "messages_field", "prompt_field", "response_field")
    if values.get("format") != "chat" and any(key in values for key in chat_keys):
        raise UsageError(f"{', '.join(key for key in chat_keys if key in values)}: only with format=chat")
    return SourceConfig(
        path=None if is_hub else text,
        name=text if is_hub else None,
        subset=values.get("subset"),
        split=values.get("split", "train"),
        streaming=streaming == "true",
        format=values.get("format", "text"),
        text_field=values.get("text_field", "text"),
        messages_field=values.get("messages_field", "messages"),
        prompt_field=values.get("prompt_field", "prompt"),
        response_field=values.get("response_field", "response"),
        id_field=values.get("id_field", "id"),
        max_tokens=limit,
    )


def _whole_number(values: dict[str, str], key: str, default: int, *, at_least: int) -> int:
    text = values.get(key, str(default))
    if not text.isdecimal() or int(text) < at_least:
        raise UsageError(f"{key}={text!r}: a whole number of at least {at_least}")
    return int(text)


def _say(line: str) -> None:
    print(line, flush=True)


if __name__ == "__main__":
    main()
