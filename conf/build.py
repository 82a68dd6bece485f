"""From a plain dictionary to the typed configuration: every wrong key, wrong type and unreadable quantity, all at once.

`build` knows nothing of what the values mean together; that is conf/validate.py.
"""

from __future__ import annotations

import difflib
from collections.abc import Callable, Mapping
from dataclasses import fields, is_dataclass, replace
from types import UnionType
from typing import Any, Union, get_args, get_origin, get_type_hints

from conf.numbers import LARGEST, parse_length, parse_tokens
from conf.words import cut, listed, show

LONGEST_HINT = 800  # characters
SCALARS = {int: "a whole number", float: "a number", bool: "true or false", str: "text"}


class ConfigError(ValueError):
    """What is wrong with a configuration. `problems` holds one line each: key, value and what would work."""

    def __init__(self, problems: list[str]):
        self.problems = list(problems)
        super().__init__("\n".join(self.problems))


class Problems:
    """The list that checks add to, so that a user sees every mistake in one go."""

    def __init__(self):
        self.lines: list[str] = []
        self.typed: dict[str, str] = {}
        """Key -> the key that its value was given under, where that is another (schedule.top_k for every stage)."""

    def add(self, key: str, value: object, hint: str) -> None:
        """Record that `key` = `value` will not do; `hint` says what would. Keys are named as they were typed."""
        for filled, typed in self.typed.items():
            hint = hint.replace(f"{filled}=", f"{typed}=")
        self.lines.append(f"{self.typed.get(key, key)}={show(value)}: {cut(hint, LONGEST_HINT)}")

    def about(self, key: str) -> bool:
        """True if `key` itself was found wrong: what only follows from that needs no line of its own."""
        return any(line.startswith(f"{self.typed.get(key, key)}=") for line in self.lines)

    def raise_if_any(self) -> None:
        """Raise ConfigError if anything was recorded, each line once."""
        if self.lines:
            raise ConfigError(list(dict.fromkeys(self.lines)))


def suggestion(name: str, known: list[str]) -> str:
    """ "did you mean ...?" with close matches of `name`, else the list of what is known."""
    close = difflib.get_close_matches(name, known, n=3, cutoff=0.6)
    if close:
        return f"did you mean {' or '.join(close)}?"
    return f"known here: {listed(known, most=40)}" if known else "nothing is known by that name"


def build(cls: type, values: Mapping[str, Any], problems: Problems, path: str = "") -> Any:
    """An instance of the dataclass `cls` from `values`; missing keys take their defaults, quantities stay as written.

    Mistakes go to `problems`, and the key keeps its default so that the other keys can still be checked.
    """
    hints = get_type_hints(cls)
    collector, options = collected(cls)
    known = [f.name for f in fields(cls) if f.name != collector] + list(options)
    arguments: dict[str, Any] = {}
    for name, value in values.items():
        key = f"{path}.{cut(name)}" if path else cut(name)
        if name not in known:
            problems.add(key, value, f"unknown key; {suggestion(str(name), known)}")
            continue
        try:
            if name in options:
                is_quantity = options[name].is_length or options[name].is_share
                hint = Any if is_quantity else options[name].type | None
                arguments.setdefault(collector, {})[name] = _convert(hint, value, problems, key)
            else:
                arguments[name] = _convert(hints[name], value, problems, key)
        except TypeError as error:
            problems.add(key, value, str(error))
    return cls(**arguments)


def collected(cls: Any) -> tuple[str, Mapping[str, Any]]:
    """(field, name -> moba.kinds.Option) of a dataclass one field of which collects options that are written beside its
    keys; ("", {}) for others."""
    for one in fields(cls):
        if "collects" in one.metadata:
            return one.name, one.metadata["collects"]()
    return "", {}


def _convert(hint: Any, value: Any, problems: Problems, key: str) -> Any:
    """`value` as the annotation `hint` wants it; TypeError saying what is expected."""
    if hint is Any:
        return value
    if get_origin(hint) in (UnionType, Union):
        if value is None:
            return None
        return _convert(next(a for a in get_args(hint) if a is not type(None)), value, problems, key)
    if isinstance(hint, type) and is_dataclass(hint):
        if not isinstance(value, Mapping):
            raise TypeError(f"expected keys below it: {', '.join(f.name for f in fields(hint))}")
        return build(hint, value, problems, key)
    if get_origin(hint) is dict:
        if not isinstance(value, Mapping):
            raise TypeError("expected names with a value each")
        return _entries(get_args(hint)[1], value, problems, key)
    if get_origin(hint) is list:
        if not isinstance(value, list | tuple):
            raise TypeError("expected a list such as [0.9, 0.95]")
        return [_convert(get_args(hint)[0], item, problems, key) for item in value]
    return _scalar(hint, value)


def _entries(hint: Any, values: Mapping[str, Any], problems: Problems, path: str) -> dict[str, Any]:
    """A dictionary of named things; one that is wrong is recorded under its own key and left out."""
    entries = {}
    for name, value in values.items():
        try:
            entries[str(name)] = _convert(hint, value, problems, f"{path}.{name}")
        except TypeError as error:
            problems.add(f"{path}.{cut(name)}", value, str(error))
    return entries


def _scalar(kind: type, value: Any) -> Any:
    """`value` as int, float, bool or str without losing anything (3 is a float, "1e-4" too; 3.5 is no int)."""
    if kind is not bool and isinstance(value, int) and abs(value) > LARGEST:
        raise TypeError(f"expected {SCALARS[kind]} that fits 64 bits")
    if kind is str and isinstance(value, int | float | str) and not isinstance(value, bool):
        if "\0" in str(value):
            raise TypeError("expected text without null characters")
        return str(value)
    if isinstance(value, bool) == (kind is bool) and isinstance(value, kind):
        return value
    if kind is float and isinstance(value, int | str) and not isinstance(value, bool):
        try:
            return float(value)
        except ValueError:
            pass
    raise TypeError(f"expected {SCALARS[kind]}")


def parse_quantities(config: Any, problems: Problems, path: str = "") -> Any:
    """`config` with its lengths and budgets (fields with "length" or "tokens" as unit) read as ints, at every depth.

    An unreadable one is recorded and becomes None, which later checks take as "not known"; so does a null where the
    default is no null, unless the field's metadata says what it means. Shares stay as written: they need a total.
    """
    changes = {}
    collector, options = collected(config)
    for field in fields(config):
        key = f"{path}.{field.name}" if path else field.name
        value = getattr(config, field.name)
        if field.name == collector:
            changes[field.name] = {
                name: quantity(parse_length, f"{path}.{name}", given, problems) if options[name].is_length else given
                for name, given in value.items()
            }
            continue
        unit = field.metadata.get("unit")
        parse = None if unit is None else {"length": parse_length, "tokens": parse_tokens}.get(unit)
        if unit is not None and value is None and field.default is not None:
            if "null" in field.metadata:
                changes[field.name] = field.metadata["null"]
            else:
                problems.add(key, None, f"needs a value, such as {show(field.default)}")
        elif parse is not None:
            changes[field.name] = quantity(parse, key, value, problems)
        elif is_dataclass(value):
            changes[field.name] = parse_quantities(value, problems, key)
        elif isinstance(value, dict):
            changes[field.name] = {
                k: parse_quantities(v, problems, f"{key}.{k}") if is_dataclass(v) else v for k, v in value.items()
            }
    return replace(config, **changes)


def quantity(parse: Callable[..., int], key: str, value: Any, problems: Problems, *arguments: Any) -> int | None:
    """parse(value, *arguments), or None with the problem recorded; None stays None."""
    if value is None:
        return None
    try:
        return parse(value, *arguments)
    except ValueError as error:
        problems.add(key, value, str(error))
        return None
