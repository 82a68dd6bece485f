"""How values stand in messages: a value at most 200 characters long, a list at most 10 entries.

Everything that a message quotes may be of any size: a number of 5,000 digits, a prompt, the 30,000 tensors of a model.
"""

from __future__ import annotations

from collections.abc import Collection, Iterable, Mapping

LONGEST, MOST = 200, 10
LONGEST_MESSAGE = 2000


def cut(text: object, longest: int = LONGEST) -> str:
    """`text` on one line, of at most about `longest` characters: the beginning, and how many were left out."""
    line = " ".join(_text(text).split())
    if len(line) <= longest:
        return line
    return f"{line[: longest - 20].rstrip()}... ({len(line):,} characters)"


def show(value: object) -> str:
    """`value` as the user would write it on the command line, cut."""
    return cut(_written(value))


def listed(items: Iterable[object], separator: str = ", ", most: int = MOST, longest: int = LONGEST) -> str:
    """The items, each cut to `longest`, and after `most` of them how many more there are; "none" without any."""
    entries = items if isinstance(items, Collection) else list(items)
    shown = [cut(item, longest) for item, _ in zip(entries, range(most))]
    rest = len(entries) - len(shown)
    return separator.join(shown) + (f" and {rest:,} more" if rest else "") if shown else "none"


def first_line(error: BaseException) -> str:
    """The first line of an exception's text, cut, or its type if it has none."""
    lines = str(error).strip().splitlines()
    return cut(lines[0]) if lines else type(error).__name__


def _written(value: object) -> str:
    if value is None or isinstance(value, bool):
        return {None: "null", True: "true", False: "false"}[value]
    if isinstance(value, Mapping):
        return "{" + listed(f"{show(k)}: {show(v)}" for k, v in value.items()) + "}" if value else "{}"
    if isinstance(value, list | tuple):
        return "[" + listed(show(v) for v in value) + "]" if value else "[]"
    return _text(value)


def _text(value: object) -> str:
    """str(value); Python refuses that for whole numbers beyond 4300 digits."""
    if isinstance(value, int) and not isinstance(value, bool) and value.bit_length() > 4096:
        return f"a number of {int(value.bit_length() * 0.30103) + 1:,} digits"
    return str(value)
