"""What a row says of a conversation: its messages, which of them are to be learnt, the tools it may call.

Message keys beside role and content: `weight` (0 or 1) and `train` (true or false) say whether an assistant's turn is
learnt; reasoning_content, tool_calls, tool_call_id and name go to the chat template, and so do the row's `tools`. What
the template has no place for, and any other key, is left out, counted and said.

Rows of other shapes that are common are recognised: ShareGPT's (`conversations`, each turn `from` and `value`) and
Alpaca's (`instruction`, `input`, `output`).
"""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from typing import Any

from conf.schema import SourceConfig
from conf.words import cut, listed, show
from data.errors import DataError

FOR_TEMPLATES = ("reasoning_content", "tool_calls", "tool_call_id", "name")
FLAGS = ("weight", "train")
SHAREGPT = "conversations"
SHAREGPT_ROLES = {
    "human": "user",
    "user": "user",
    "gpt": "assistant",
    "chatgpt": "assistant",
    "assistant": "assistant",
    "model": "assistant",
    "system": "system",
    "tool": "tool",
}
LEARN = "learn"  # in the JSON of a message: false where a turn of the assistant is not learnt


class ConversationReader:
    """Reads rows as conversations and counts what it leaves out."""

    def __init__(self, config: SourceConfig, template: str, key: str = ""):
        """template: the jinja text. key: what stands before a field's name in messages, `data.sources.main.` say."""
        self._config, self._template, self._key = config, template, key
        self._left_out: Counter[str] = Counter()
        self._shapes: Counter[str] = Counter()

    def read(self, row: Mapping[str, Any], where: str) -> str | None:
        """The row's conversation as JSON text, or None for one that nothing is learnt of. Raises DataError."""
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
        config = self._config
        if row.get(config.messages_field) is not None:
            messages = row[config.messages_field]
        elif {config.prompt_field, config.response_field} <= row.keys():
            roles = {"user": config.prompt_field, "assistant": config.response_field}
            messages = [{"role": role, "content": row[field]} for role, field in roles.items()]
        elif isinstance(row.get(SHAREGPT), list):
            messages = [_from_sharegpt(turn, where) for turn in row[SHAREGPT]]
            self._shapes["ShareGPT conversations (from, value)"] += 1
        elif {"instruction", "output"} <= row.keys():
            asked = "\n\n".join(text for text in (row["instruction"], row.get("input")) if text)
            messages = [{"role": "user", "content": asked}, {"role": "assistant", "content": row["output"]}]
            self._shapes["Alpaca instructions (instruction, input, output)"] += 1
        else:
            fields = f"{self._key}messages_field, or {self._key}prompt_field and {self._key}response_field"
            raise DataError(
                f"{where}: a row has neither {config.messages_field!r} nor {config.prompt_field!r} and "
                f"{config.response_field!r}; it has {listed(row)}. Set {fields}"
            )
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
        if not _is_learnt(message, where):
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


def _from_sharegpt(turn: Any, where: str) -> Mapping[str, Any]:
    """A turn with `from` and `value` as a message; one with a role already as it is."""
    if not isinstance(turn, Mapping) or "from" not in turn:
        return turn
    if turn["from"] not in SHAREGPT_ROLES:
        raise DataError(f"{where}: from={show(turn['from'])}: known are {', '.join(SHAREGPT_ROLES)}")
    rest = {key: value for key, value in turn.items() if key not in ("from", "value")}
    return {"role": SHAREGPT_ROLES[turn["from"]], "content": turn.get("value")} | rest


_EXPECTED = "a conversation is a list of messages with a role and a content, both text"


def _is_learnt(message: Mapping[str, Any], where: str) -> bool:
    """What `weight` and `train` say."""
    flags = []
    for key, value in ((key, message[key]) for key in FLAGS if key in message):
        if value not in (0, 1):
            raise DataError(f"{where}: {key}={show(value)}: a turn is learnt (1, true) or not (0, false)")
        flags.append(bool(value))
    return all(flags)


def from_json(text: str) -> tuple[list[dict[str, Any]], list[Any] | None]:
    """(messages, tools or None) of a conversation that `ConversationReader.read` wrote."""
    content = json.loads(text)
    return (content, None) if isinstance(content, list) else (content["messages"], content["tools"])
