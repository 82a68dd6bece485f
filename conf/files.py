"""Files that somebody else may have written, truncated or damaged: one way to read them, checked against a shape.

A shape is a type: a dataclass whose fields are what has to be there (more may be), or dict[str, FileName] and the like.
Whatever a file holds, reading it gives that shape or one error line: the file, what is wrong with it, what to do.
"""

from __future__ import annotations

import os
from collections.abc import Callable
from functools import lru_cache
from pathlib import Path
from typing import Annotated, Any

import yaml
from pydantic import AfterValidator, BeforeValidator, Field, TypeAdapter, ValidationError

from conf.numbers import LARGEST
from conf.words import cut, first_line, listed


class FileError(ValueError):
    """A file that does not hold what it should; the text is a complete message."""


def user_path(text: str | os.PathLike) -> Path:
    """The path with ~ as the home directory; a user that does not exist stays as written, and no such file is there."""
    return Path(os.path.expanduser(text))


def _own_name(name: str) -> str:
    if name in ("", ".", "..") or "/" in name or "\\" in name or "\0" in name:
        raise ValueError(f"{cut(name)!r} is not the name of a file beside it")
    return name


def _json_only(value: Any) -> Any:
    if not isinstance(value, dict):
        raise ValueError("not an object {...}")
    return value


Count = Annotated[int, Field(ge=0, le=LARGEST)]
"""A whole number from 0 that fits 64 bits."""
FileName = Annotated[str, AfterValidator(_own_name)]
"""The name of a file in the same directory: no path, so nothing outside can be meant."""
Object = Annotated[dict[str, Any], BeforeValidator(_json_only)]
"""Any JSON object."""


def read_text(path: Path, *, error: Callable[[str], Exception] = FileError, remedy: str = "") -> str:
    """The text of a UTF-8 file; `error` with one line if there is none, it cannot be read, or it is not text."""
    try:
        return path.read_text(encoding="utf-8")
    except FileNotFoundError:
        raise error(_line(path, "is missing", remedy)) from None
    except OSError as problem:
        raise error(_line(path, f"cannot be read ({problem.strerror or first_line(problem)})", remedy)) from None
    except UnicodeDecodeError as problem:
        raise error(_line(path, f"is not text in UTF-8 (byte {problem.start:,})", remedy)) from None


def read_json(path: Path, shape: Any, *, error: Callable[[str], Exception] = FileError, remedy: str = "") -> Any:
    """The content of a JSON file as `shape`; `error` with one line for anything else."""
    return parse_json(read_text(path, error=error, remedy=remedy), shape, where=path, error=error, remedy=remedy)


def parse_json(
    text: str | bytes,
    shape: Any,
    *,
    where: object,
    error: Callable[[str], Exception] = FileError,
    remedy: str = "",
) -> Any:
    """JSON text as `shape`, types taken strictly (true is no number, 3.0 no whole one); `where` names it in errors."""
    try:
        return _adapter(shape).validate_json(text, strict=True)
    except ValidationError as problem:
        raise error(_line(where, _problems(problem), remedy)) from None


def parse_object(text: str | bytes, shape: Any, **options: Any) -> dict[str, Any]:
    """The JSON object with all that it holds, checked to have what `shape` says; options as of `parse_json`."""
    parse_json(text, shape, **options)
    return parse_json(text, Object, **options)


def parse_yaml(text: str, *, where: object, error: Callable[[str], Exception] = FileError, remedy: str = "") -> dict:
    """YAML text that holds keys; `error` with one line for anything else."""
    try:
        values = yaml.safe_load(text)
    except (yaml.YAMLError, ValueError, RecursionError) as problem:
        raise error(_line(where, f"is not YAML ({cut(problem)})", remedy)) from None
    if not isinstance(values, dict):
        raise error(_line(where, f"holds {type(values).__name__}, not keys with values", remedy))
    return values


@lru_cache(maxsize=64)
def _adapter(shape: Any) -> TypeAdapter:
    return TypeAdapter(shape)


def _problems(error: ValidationError) -> str:
    """What is wrong with a file: it is no JSON, or each place and what is wrong there."""
    found = []
    for one in error.errors(include_url=False, include_context=False, include_input=False):
        if one["type"] == "json_invalid":
            return f"is not JSON ({one['msg'].removeprefix('Invalid JSON: ')})"
        place, message = ".".join(map(str, one["loc"])), one["msg"].removeprefix("Value error, ")
        found.append(f"{cut(place, 100)}: {message}" if place else message)
    return "is damaged or of another kind: " + listed(found, separator="; ", most=3)


def _line(where: object, what: str, remedy: str) -> str:
    return f"{where} {what}" + (f". {remedy}" if remedy else "")
