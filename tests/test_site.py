"""docs/ and mkdocs.yml: pages that are led to, messages that the code really says, a table of all keys, and, with
`-m docs` and `pip install -e '.[docs]'`, the site itself and the notebook."""

from __future__ import annotations

import ast
import importlib.util
import re
import subprocess
import sys
from functools import cache
from pathlib import Path

import pytest
import yaml

from conf.schema import RunConfig
from launch.foreign import leaves

ROOT = Path(__file__).resolve().parents[1]
DOCS = ROOT / "docs"
PACKAGES = ("conf", "data", "launch", "moba", "train")
NOTEBOOK = DOCS / "notebooks" / "moba.ipynb"
MESSAGES = re.findall(r"```text\n(.*?)\n```", (DOCS / "troubleshooting.md").read_text(encoding="utf-8"), re.DOTALL)
BETWEEN = "\0"


def site_hooks():
    """docs/tools/site_hooks.py as a module."""
    spec = importlib.util.spec_from_file_location("site_hooks", DOCS / "tools" / "site_hooks.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def nav_pages(entries: list) -> list[str]:
    """The pages of a navigation, in order."""
    pages = []
    for entry in entries:
        (value,) = entry.values()
        pages += [value] if isinstance(value, str) else nav_pages(value)
    return pages


@cache
def said() -> dict[str, str]:
    """What each package says: its texts, with BETWEEN where something is filled in, without docstrings."""
    texts = {}
    for package in PACKAGES:
        parts = []
        for path in sorted((ROOT / package).rglob("*.py")):
            tree = ast.parse(path.read_text(encoding="utf-8"))
            skipped = {id(node.value) for node in ast.walk(tree) if isinstance(node, ast.Expr)}
            for node in ast.walk(tree):
                if isinstance(node, ast.JoinedStr):
                    skipped |= {id(value) for value in node.values}
                    parts.append("".join(v.value if isinstance(v, ast.Constant) else BETWEEN for v in node.values))
                elif isinstance(node, ast.Constant) and isinstance(node.value, str) and id(node) not in skipped:
                    parts.append(node.value)
        texts[package] = "\n".join(parts)
    return texts


@pytest.mark.parametrize("message", MESSAGES, ids=lambda message: message[:50])
def test_a_quoted_message_is_one_of_the_code(message):
    """Catches a page that explains a message which nobody can meet any more: all that stands between the placeholders
    has to be in the texts of one package."""
    text = re.sub(r"^\S+?=\{\w+\}: ", "", message)  # the key and its value, which stand in front of every problem
    text = text.removeprefix("write ")  # launch/config.py puts it before what launch/foreign.py says
    fragments = [part.strip(" =.:;,()") for part in re.split(r"\{[^}]*\}", text)]
    fragments = [part for part in fragments if len(part) > 3]
    assert max(map(len, fragments)) >= 9, "a message of its own, not only punctuation"
    assert any(all(part in text for part in fragments) for text in said().values()), fragments


def test_there_are_messages_each_explained():
    """Catches a pattern that finds none, and a message without cause and remedy."""
    assert len(MESSAGES) >= 20 and len(set(MESSAGES)) == len(MESSAGES)
    page = (DOCS / "troubleshooting.md").read_text(encoding="utf-8")
    assert len(re.findall(r"```\n\n[A-Z`]", page)) == len(MESSAGES)


def test_every_page_is_in_the_navigation():
    """Catches a page that the site does not lead to, and a navigation that names none."""
    text = (ROOT / "mkdocs.yml").read_text(encoding="utf-8")
    pages = nav_pages(yaml.safe_load(text)["nav"])
    assert sorted(pages) == sorted(str(path.relative_to(DOCS)) for path in DOCS.rglob("*.md"))
    index = (DOCS / "index.md").read_text(encoding="utf-8")
    assert [page for page in pages if page != "index.md" and f"]({page})" not in index] == []


def test_the_table_has_every_key_with_its_meaning():
    """Catches keys of the configuration that the reference leaves out or says nothing about."""
    keys = {key.path: key for key in site_hooks().all_keys()}
    missing = set(leaves(RunConfig)) - keys.keys()
    assert not missing
    assert [path for path, key in keys.items() if not key.text] == []
    assert keys["schedule.stages.<stage>.attention.block_size"].unit == "tokens, K = 1024"
    assert keys["schedule.stages.<stage>.lr.peak"].text.startswith("null = optim.lr.peak")
    assert keys["optim.lr.peak"].default == "0.0003" and keys["data.sources.<source>.weight"].type == "float"


def test_links_out_of_the_pages_become_paths():
    """Catches a link to a file that the site does not have, and a picture or a link within it that is lost."""
    inside = site_hooks().inside
    assert inside("see [the keys](../conf/schema.py).", "data.md") == "see the keys (`conf/schema.py`)."
    assert inside("[conf/schema.py](../../conf/schema.py)", "reference/x.md") == "conf/schema.py"
    assert inside("![a](../benchmarks/x.png)", "long.md") == "![a](benchmarks/x.png)"
    assert inside("[a](../data.md#b)", "results/README.md") == "[a](../data.md#b)"


def test_the_notebook_has_no_outputs():
    """Catches outputs, counts and machines' names in git."""
    cells = yaml.safe_load(NOTEBOOK.read_text(encoding="utf-8"))["cells"]
    assert [cell for cell in cells if cell.get("outputs") or cell.get("execution_count")] == []
    assert sum(cell["cell_type"] == "code" for cell in cells) >= 5


@pytest.mark.docs
def test_the_site_builds(tmp_path):
    """Catches broken links, anchors and references, and pages that fetch something from elsewhere."""
    command = [sys.executable, "-m", "mkdocs", "build", "--strict", "--site-dir", tmp_path]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-5000:]
    pages = list(tmp_path.rglob("*.html"))
    assert len(pages) > 15
    fetched = r"""<(?:script|img|iframe)[^>]+src=["']?https?:|<link[^>]+stylesheet[^>]+href=["']?https?:"""
    assert [page.name for page in pages if re.search(fetched, page.read_text(encoding="utf-8"))] == []
    assert (
        "schedule.<wbr>stages.<wbr>&lt;stage&gt;.<wbr>attention.<wbr>top_k"
        in (tmp_path / "reference/configuration.html").read_text()
    )
    assert "block_size" in (tmp_path / "reference/api.html").read_text()


@pytest.mark.docs
def test_the_notebook_runs():
    """Catches a notebook that the code has outgrown."""
    command = [sys.executable, "-m", "pytest", "--nbmake", "--nbmake-timeout=300", "-p", "no:cacheprovider", NOTEBOOK]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0 and "1 passed" in done.stdout, done.stdout[-5000:]
