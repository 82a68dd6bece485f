"""Formats of data: what a row of a source's table says, a text or a conversation, and the columns that say it.

A format is a function of a row and an entry in FORMATS (docs/extending.md). Which files are tables, and what reads
them, is in data/text.py. No torch.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

from conf.words import listed, show
from moba.kinds import Option


class BadRow(ValueError):
    """A row that is not of its format."""

    def __init__(self, problem: str, hint: str):
        """problem: what the row has. hint: what would work, with `{key}` before the names of a source's keys."""
        super().__init__(problem)
        self.hint = hint


class Format(NamedTuple):
    """One format."""

    document: Callable[[Mapping[str, Any], Mapping[str, Any]], Any]
    """document(row, columns): the text of a row, None for one without; or with `is_chat` a list of messages, each a
    mapping with a role and a content. columns: option -> value, of all the format's. Raises BadRow."""
    is_chat: bool = False
    """Documents are conversations, of which the assistant's turns alone are supervised (data/sft.py)."""
    options: Mapping[str, Option] = {}
    """Keys of a source (data.sources.<name>.<option>): mostly the columns it reads. Two formats may share one."""
    required: tuple[str, ...] = ()
    """Options that name a column which not every row has, but one of a table's first."""
    version: int | None = 1
    """To be raised when documents come out otherwise: tokens in the cache are made anew. None: plain text, since ever.
    """


def column(row: Mapping[str, Any], columns: Mapping[str, Any], option: str) -> Any:
    """What a row has in the column that an option names; BadRow if it has no such column."""
    name = columns[option]
    if name not in row:
        raise BadRow(f"a row has no {name!r}; it has {listed(row)}", f"Set {{key}}{option}")
    return row[name]


def _text(row: Mapping[str, Any], columns: Mapping[str, Any]) -> Any:
    """One column."""
    field = columns["text_field"]
    text = row.get(field)
    if text is not None and not isinstance(text, str):
        problem = f"column {field!r} holds {type(text).__name__}, not text; columns: {listed(row)}"
        raise BadRow(problem, "Set {key}text_field")
    return text


def common_shape(row: Mapping[str, Any], columns: Mapping[str, Any]) -> str | None:
    """Which of COMMON_SHAPES a row of conversations has that has none of the columns; None if none."""
    if row.get(columns.get("messages_field", "")) is not None:
        return None
    if {columns.get("prompt_field"), columns.get("response_field")} <= row.keys():
        return None
    if isinstance(row.get("conversations"), list):
        return "ShareGPT conversations (from, value)"
    return "Alpaca instructions (instruction, input, output)" if {"instruction", "output"} <= row.keys() else None


def _sharegpt(row: Mapping[str, Any]) -> list[Any]:
    return [_turn(turn) for turn in row["conversations"]]


def _turn(turn: Any) -> Any:
    """A turn with `from` and `value` as a message; one with a role already as it is."""
    if not isinstance(turn, Mapping) or "from" not in turn:
        return turn
    if turn["from"] not in SHAREGPT_ROLES:
        raise BadRow(f"from={show(turn['from'])} in a row of conversations", f"Known are {', '.join(SHAREGPT_ROLES)}")
    rest = {key: value for key, value in turn.items() if key not in ("from", "value")}
    return {"role": SHAREGPT_ROLES[turn["from"]], "content": turn.get("value")} | rest


def _alpaca(row: Mapping[str, Any]) -> list[Any]:
    parts = (row["instruction"], row.get("input"))
    asked = "\n\n".join(text for text in parts if text) if all(isinstance(p, str | None) for p in parts) else None
    return [{"role": "user", "content": asked}, {"role": "assistant", "content": row["output"]}]


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
COMMON_SHAPES = {
    "ShareGPT conversations (from, value)": _sharegpt,
    "Alpaca instructions (instruction, input, output)": _alpaca,
}


def _chat(row: Mapping[str, Any], columns: Mapping[str, Any]) -> Any:
    """A column with all messages, or one per turn; or what other projects have."""
    messages, prompt, response = (columns[name] for name in ("messages_field", "prompt_field", "response_field"))
    if row.get(messages) is not None:
        return row[messages]
    if {prompt, response} <= row.keys():
        return [{"role": "user", "content": row[prompt]}, {"role": "assistant", "content": row[response]}]
    if (shape := common_shape(row, columns)) is not None:
        return COMMON_SHAPES[shape](row)
    raise BadRow(
        f"a row has neither {messages!r} nor {prompt!r} and {response!r}; it has {listed(row)}",
        "Set {key}messages_field, or {key}prompt_field and {key}response_field",
    )


FORMATS: dict[str, Format] = {
    "text": Format(
        _text,
        options={"text_field": Option(str, "column or JSON key that holds the document", default="text")},
        required=("text_field",),
        version=None,
    ),
    "chat": Format(
        _chat,
        is_chat=True,
        options={
            "messages_field": Option(str, "column with the list of {role, content}", default="messages"),
            "prompt_field": Option(str, "in rows without messages: column with the user's turn", default="prompt"),
            "response_field": Option(
                str, "in rows without messages: column with the assistant's turn", default="response"
            ),
        },
        version=2,
    ),
}


def all_format_options() -> dict[str, Option]:
    """Every option of every format, by name."""
    return {name: option for one in FORMATS.values() for name, option in one.options.items()}


def formats_with(option: str) -> str:
    """The formats that have an option, in words."""
    return " or ".join(name for name, one in FORMATS.items() if option in one.options)
