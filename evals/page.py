"""A self-contained HTML file: sections of tables, pictures and text."""

from __future__ import annotations

import base64
import html
import re
from collections.abc import Sequence
from pathlib import Path

_STYLE = """
body { font: 15px/1.5 system-ui, sans-serif; max-width: 72rem; margin: 2rem auto; padding: 0 1rem; color: #222; }
h2 { margin-top: 2.5rem; border-bottom: 1px solid #ddd; }
table { border-collapse: collapse; margin: 1rem 0; font-size: 14px; display: block; overflow-x: auto; }
th, td { padding: .3rem .7rem; border-bottom: 1px solid #ddd; text-align: right; font-variant-numeric: tabular-nums; }
th:first-child, td:first-child, td.text { text-align: left; }
img { max-width: 100%; display: block; margin: 1rem 0; }
pre { font-size: 12px; line-height: 1.35; overflow-x: auto; background: #f6f6f6; padding: .7rem; }
nav a { margin-right: 1rem; }
.note { color: #555; font-size: 13px; }
"""


def page(title: str, sections: Sequence[tuple[str, str]]) -> str:
    """The whole file. `sections` are (heading, html made by the functions below); empty ones are left out."""
    shown = [(heading, body) for heading, body in sections if body]
    links = " ".join(f'<a href="#s{i}">{html.escape(heading)}</a>' for i, (heading, _) in enumerate(shown))
    parts = "\n".join(f'<h2 id="s{i}">{html.escape(heading)}</h2>\n{body}' for i, (heading, body) in enumerate(shown))
    title = html.escape(title)
    return f"""<!doctype html>
<html lang="en"><head><meta charset="utf-8"><title>{title}</title><style>{_STYLE}</style></head><body>
<h1>{title}</h1>
<nav>{links}</nav>
{parts}
</body></html>
"""


def image(path: Path) -> str:
    """A PNG file, embedded."""
    data = base64.b64encode(path.read_bytes()).decode("ascii")
    return f'<img alt="{html.escape(path.stem)}" src="data:image/png;base64,{data}">'


def table(columns: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    """A table; numbers aligned right, words left."""
    head = "".join(f"<th>{html.escape(name)}</th>" for name in columns)
    body = "\n".join(
        "<tr>" + "".join(f"<td{_kind(cell)}>{html.escape(cell)}</td>" for cell in row) + "</tr>" for row in rows
    )
    return f"<table><thead><tr>{head}</tr></thead><tbody>\n{body}\n</tbody></table>"


def _kind(cell: str) -> str:
    return "" if re.match(r"[-+]?[\d.]|$", cell) else ' class="text"'


def note(text: str) -> str:
    """A line of small print."""
    return f'<p class="note">{html.escape(text)}</p>'


def folded(heading: str, text: str) -> str:
    """Plain text in a collapsed section."""
    return f"<details><summary>{html.escape(heading)}</summary><pre>{html.escape(text)}</pre></details>"
