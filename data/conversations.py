"""What a row says of a conversation: its messages, which of them are to be supervised, the tools it may call.

Message keys beside role and content: `weight` (0 or 1) and `train` (true or false) say whether an assistant's turn is
supervised; reasoning_content, tool_calls, tool_call_id and name go to the chat template, and so do the row's `tools`.
What the template has no place for, and any other key, is left out, counted and said.
"""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from typing import Any

from conf.formats import FORMATS, BadRow, common_shape
from conf.schema import SourceConfig
from conf.words import cut, show
from data.errors import DataError

FOR_TEMPLATES = ("reasoning_content", "tool_calls", "tool_call_id", "name")
FLAGS = ("weight", "train")
LEARN = "learn"  # in the JSON of a message: false where a turn of the assistant is not supervised


def document_of(row: Mapping[str, Any], config: SourceConfig, where: str, key: str) -> Any:
    """What the source's format makes of a row (conf/formats.py). Raises DataError."""
    try:
        return FORMATS[config.format].document(row, config.columns)
    except BadRow as error:
        raise DataError(f"{where}: {error}. {error.hint.format(key=key)}") from error


class ConversationReader:
    """Reads rows as conversations and counts what it leaves out."""

    def __init__(self, config: SourceConfig, template: str, key: str = ""):
        """template: the jinja text. key: what stands before a field's name in messages, `data.sources.main.` say."""
        self._config, self._template, self._key = config, template, key
        self._left_out: Counter[str] = Counter()
        self._shapes: Counter[str] = Counter()

    def read(self, row: Mapping[str, Any], where: str) -> str | None:
        """The row's conversation as JSON text, or None for one that nothing is supervised of. Raises DataError."""
        messages = [self._message(one, where) for one in self._messages(row, where)]
        if not any(one["role"] == "assistant" and one.get(LEARN, True) for one in messages):
            self._left_out["conversations without an assistant's turn to learn"] += 1
            return None
        tools = self._tools(row, where)
        return json.dumps(messages if tools is None else {"messages": messages, "tools": tools}, ensure_ascii=False)

    def report(self, log: Callable[[str], None]) -> None:
        """Says which shapes were recognised, and what was left out."""
        for shape, count in sorted(self._shapes.items()):
            log(f"{count:,} rows read as {shape}")
        for what, count in sorted(self._left_out.items()):
            log(f"left out {count:,} {what}")

    def _messages(self, row: Mapping[str, Any], where: str) -> Sequence[Mapping[str, Any]]:
        messages = document_of(row, self._config, where, self._key)
        if (shape := common_shape(row, self._config.columns)) is not None:
            self._shapes[shape] += 1
        if not (isinstance(messages, list) and messages and all(isinstance(m, Mapping) for m in messages)):
            raise DataError(f"{where}: {_EXPECTED}; found {show(messages)}")
        return messages

    def _message(self, message: Mapping[str, Any], where: str) -> dict[str, Any]:
        """role, content, what the template takes, and `learn` where it is false."""
        message = {key: value for key, value in message.items() if value is not None}
        if message.get("tool_calls"):
            message.setdefault("content", "")
            if "tool_calls" not in self._template:
                raise DataError(
                    f"{where}: messages with tool_calls cannot be trained on with this chat template, which does not "
                    f"write them: {show(message)}. Choose one that does (data.chat_template)"
                )
        if not all(isinstance(message.get(key), str) for key in ("role", "content")):
            raise DataError(f"{where}: {_EXPECTED}; found {show(message)}")
        kept = {"role": message["role"], "content": message["content"]}
        for key, value in message.items():
            if key in kept or key in FLAGS:
                continue
            if key in FOR_TEMPLATES and key in self._template:
                kept[key] = value
            elif key != "tool_calls":
                why = "the chat template has no place for it" if key in FOR_TEMPLATES else "no key of a message here"
                self._left_out[f"times {cut(key, 40)!r} of a message: {why}"] += 1
        if not _is_supervised(message, where):
            kept[LEARN] = False
        return kept

    def _tools(self, row: Mapping[str, Any], where: str) -> list | None:
        tools = row.get("tools")
        if not tools:
            return None
        if isinstance(tools, str):
            with suppress(ValueError, RecursionError):
                tools = json.loads(tools)
        if not isinstance(tools, list):
            raise DataError(f"{where}: tools are a list of descriptions, or that as JSON text; found {show(tools)}")
        if "tools" not in self._template:
            self._left_out["times 'tools' of a conversation: the chat template has no place for them"] += 1
            return None
        return tools


_EXPECTED = "a conversation is a list of messages with a role and a content, both text"


def _is_supervised(message: Mapping[str, Any], where: str) -> bool:
    """What `weight` and `train` say."""
    flags = []
    for key, value in ((key, message[key]) for key in FLAGS if key in message):
        if value not in (0, 1):
            raise DataError(f"{where}: {key}={show(value)}: a turn is supervised (1, true) or not (0, false)")
        flags.append(bool(value))
    return all(flags)


def from_json(text: str) -> tuple[list[dict[str, Any]], list[Any] | None]:
    """(messages, tools or None) of a conversation that `ConversationReader.read` wrote."""
    content = json.loads(text)
    return (content, None) if isinstance(content, list) else (content["messages"], content["tools"])
