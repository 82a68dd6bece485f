"""What mkdocs does to the pages while it builds the site: the table of configuration keys is filled in from
conf/schema.py, and links to files of the repository that are no pages become their paths.

Needs no mkdocs to be imported, so that tests can ask for the table.
"""

from __future__ import annotations

import ast
import html
import inspect
import posixpath
import re
import sys
from collections.abc import Iterator
from dataclasses import MISSING, Field, fields, is_dataclass
from pathlib import Path
from types import UnionType
from typing import Any, NamedTuple, Union, get_args, get_origin, get_type_hints

ROOT = Path(__file__).resolve().parents[2]
sys.path.insert(0, str(ROOT))

from conf import schema  # noqa: E402
from conf.build import collected  # noqa: E402

KEYS = "<!-- keys -->"
UNITS = {
    "length": "tokens, K = 1024",
    "tokens": "tokens, K = 1000",
    "tokens or share": "tokens, K = 1000, or a share such as 10%",
}
NAMES = {"sources": "<source>", "stages": "<stage>"}
"""How an entry of a dictionary with names of the user's is called."""


class Key(NamedTuple):
    """A line of the table."""

    path: str
    type: str
    default: str
    unit: str
    text: str


def all_keys(cls: type = schema.RunConfig, path: str = "") -> Iterator[Key]:
    """Every key below a section of the configuration, in the order of conf/schema.py."""
    hints, said = get_type_hints(cls), docstrings(cls)
    collector, options = collected(cls)
    for field in fields(cls):
        if field.name == collector:
            for name, option in options.items():
                unit = UNITS["length"] if option.is_length else ""
                kind = "length" if option.is_length else option.type.__name__
                yield Key(f"{path}{name}", kind, shown(option.default), unit, option.help)
            continue
        hint = hints[field.name]
        key = f"{path}{field.name}"
        nested = section_of(hint)
        if nested is None or field.name in said:
            unit = UNITS.get(field.metadata.get("unit", ""), "")
            yield Key(key, type_name(hint, field), default_of(field), unit, said.get(field.name, ""))
        if nested is not None:
            yield from all_keys(nested, f"{key}.{NAMES[field.name]}." if get_origin(hint) is dict else f"{key}.")


def section_of(hint: Any) -> type | None:
    """The dataclass that a key holds, alone, or null, or one for each name; None for other types."""
    inner = [arg for arg in get_args(hint) if arg is not type(None)]
    if get_origin(hint) in (UnionType, Union) or get_origin(hint) is dict:
        return section_of(inner[-1])
    return hint if isinstance(hint, type) and is_dataclass(hint) else None


def type_name(hint: Any, field: Field) -> str:
    """The type as a user thinks of it."""
    unit = field.metadata.get("unit")
    if unit is not None:
        return {"length": "length", "tokens": "tokens"}.get(unit, "tokens or share")
    if section_of(hint) is not None:
        return "names" if get_origin(hint) is dict else "section"
    if hint is Any:
        return "any"
    if get_origin(hint) in (UnionType, Union):
        return " or ".join("null" if arg is type(None) else type_name(arg, field) for arg in get_args(hint))
    return hint.__name__ if isinstance(hint, type) and not get_args(hint) else str(hint).replace("typing.", "")


def default_of(field: Field) -> str:
    """The default as it would be typed."""
    if field.default_factory is not MISSING:
        value = field.default_factory()
        return "" if is_dataclass(value) else shown(value)
    return shown(field.default)


def shown(value: Any) -> str:
    """A value as in YAML."""
    return {"None": "null", "True": "true", "False": "false", "{}": "{}"}.get(str(value), str(value))


def docstrings(cls: type) -> dict[str, str]:
    """The string behind each field, those of base classes where the class says nothing itself."""
    said: dict[str, str] = {}
    for one in reversed(cls.__mro__[:-1]):
        (body,) = ast.parse(inspect.getsource(one)).body
        assert isinstance(body, ast.ClassDef)
        for field, text in zip(body.body, body.body[1:]):
            if isinstance(field, ast.AnnAssign) and isinstance(text, ast.Expr) and isinstance(text.value, ast.Constant):
                said[ast.unparse(field.target)] = " ".join(str(text.value.value).split())
    return said


def section_text(cls: type) -> str:
    """The docstring of a section's class, as one paragraph."""
    return " ".join((cls.__doc__ or "").split())


def table() -> str:
    """The page's text: a heading and a table a section."""
    lines = []
    for field in fields(schema.RunConfig):
        cls = get_type_hints(schema.RunConfig)[field.name]
        lines += ["", f"## {field.name}", "", section_text(cls), "", "| key | type | default | meaning |"]
        lines += ["|---|---|---|---|"]
        for key in all_keys(cls, f"{field.name}."):
            kind = f"{key.type} ({key.unit})" if key.unit and key.type == "any" else key.type
            default = f"`{key.default}`" if key.default else ""
            path = html.escape(key.path).replace(".", ".<wbr>")  # where a line may break
            cells = [f"<code>{path}</code>", kind, default, outside_code(key.text)]
            lines.append("| " + " | ".join(cell.replace("|", "\\|") for cell in cells) + " |")
    return "\n".join(lines)


def outside_code(text: str) -> str:
    """The text with < and > as letters, not as HTML, where it is no code."""
    parts = text.split("`")
    return "`".join(html.escape(part, quote=False) if i % 2 == 0 else part for i, part in enumerate(parts))


# -------------------- links out of docs/

LINK = re.compile(r"(!?)\[([^\]]*)\]\((\.\./[^)\s]*)\)")


def inside(text: str, page: str) -> str:
    """The page with links that leave docs/ as text and path: the site has no such file. Pictures come along."""

    def replaced(match: re.Match) -> str:
        label, path = match[2], in_repository(match[3], page)
        if path.startswith("docs/"):
            return match[0]
        if match[1]:
            return f"![{label}]({posixpath.relpath(path, posixpath.dirname(page) or '.')})"
        return label if path in label else f"{label} (`{path}`)"

    return LINK.sub(replaced, text)


def in_repository(target: str, page: str) -> str:
    """Where a link of a page leads, from the top of the repository."""
    return posixpath.normpath(posixpath.join("docs", posixpath.dirname(page), target.partition("#")[0]))


def pictures_outside() -> set[str]:
    """Pictures that pages show from elsewhere in the repository."""
    found = set()
    for page in (ROOT / "docs").rglob("*.md"):
        name = page.relative_to(ROOT / "docs").as_posix()
        shown = (in_repository(m[3], name) for m in LINK.finditer(page.read_text(encoding="utf-8")) if m[1])
        found |= {path for path in shown if not path.startswith("docs/")}
    return found


def on_files(files: Any, *, config: Any) -> Any:
    """mkdocs' event: the files of the site."""
    from mkdocs.structure.files import File

    for path in sorted(pictures_outside()):
        files.append(File.generated(config, path, abs_src_path=str(ROOT / path)))
    return files


def on_page_markdown(markdown: str, *, page: Any, **_: Any) -> str:
    """mkdocs' event: a page's text before it is rendered."""
    return inside(markdown.replace(KEYS, table()) if KEYS in markdown else markdown, page.file.src_uri)
