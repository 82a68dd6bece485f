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
from conf.formats import FORMATS, all_format_options, formats_with  # noqa: E402
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
    "to": "directory for the shards: a new one, or an unfinished one of this command",
    "tokenizer": "bytes, bpe-4k, bpe-32k, a tokenizer.json or a Hugging Face tokenizer directory",
    "format": "text (default); chat: conversations, of which only assistant turns are supervised; or another format "
    "of conf/formats.py",
    "chat_template": "conversations: chatml, llama3, plain or a jinja file (default: the tokenizer's own)",
    "id_field": "column with the document id (default id; without such a column the document's number)",
    "workers": "worker processes (default 0: this process does it)",
    "max_tokens": "stop after this many tokens, e.g. 2B (default: all)",
    "subset": "configuration of a hub data set",
    "split": "split of a hub data set (default train)",
    "streaming": "true: read a hub data set as a stream instead of downloading it first; needs max_tokens",
    "shard_mb": f"millions of characters per shard, the unit of restarts and workers (default {SHARD_CHARS // 10**6})",
}


@exits_on(
    DataError,
    OSError,
    typed={
        "path=": "source=",
        "data.tokenizer=": "tokenizer=",
        "data.cache_dir": "to=",
        "Set text_field": "Set text_field=",
    },
)
def main(argv: list[str] | None = None) -> None:
    """The command; see the module's text."""
    values = key_values(
        sys.argv[1:] if argv is None else argv, keys(), about=__doc__, required=("source", "to", "tokenizer")
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


def keys() -> dict[str, str]:
    """The arguments of the command -> help, those of formats behind their names."""
    own = {
        name: f"{formats_with(name)}: {option.help} (default {option.default})"
        for name, option in all_format_options().items()
    }
    return KEYS | own


def _source(values: dict[str, str]) -> SourceConfig:
    """The source that the arguments describe: a path if it can be one, else the name of a hub data set."""
    text = values["source"]
    there = is_shipped(text) or user_path(text).exists() or glob.has_magic(text)
    is_hub = not there and re.fullmatch(r"[\w-]+/[\w.-]+", text) is not None and not Path(text).suffix
    if is_hub:
        _say(f"{text} is not a local path, so it is read as a hub data set")
    max_tokens = values.get("max_tokens")
    streaming = values.get("streaming", "false")
    if streaming not in ("true", "false"):
        raise UsageError(f"streaming={streaming!r}: true or false")
    try:
        limit = None if max_tokens is None else parse_tokens(max_tokens)
    except ValueError as error:
        raise UsageError(f"max_tokens={cut(repr(max_tokens))}: {error}") from error
    if limit == 0:
        raise UsageError(f"max_tokens={max_tokens}: must be at least 1")
    name = values.get("format", "text")
    if name not in FORMATS:
        raise UsageError(f"format={cut(name)!r}: choose one of {', '.join(FORMATS)}")
    for key in values.keys() & all_format_options().keys() - FORMATS[name].options.keys():
        raise UsageError(f"{key}: only with format={formats_with(key)}")
    if "chat_template" in values and not FORMATS[name].is_chat:
        raise UsageError("chat_template: only with conversations (format=chat)")
    return SourceConfig(
        path=None if is_hub else text,
        name=text if is_hub else None,
        subset=values.get("subset"),
        split=values.get("split", "train"),
        streaming=streaming == "true",
        format=name,
        options={key: values[key] for key in FORMATS[name].options if key in values},
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
