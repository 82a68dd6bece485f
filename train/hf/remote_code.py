"""One Python file that gives a Hugging Face checkpoint its MoBA attention and needs only torch and transformers,
generated from this project's sources.

Starting from moba/remote_code.py and moba/transformers.py it includes each definition that another one needs, with its
comments. Imports between the project's modules are resolved; a name that two modules define is prefixed with the second
one's name. Code that needs Triton is conditional. A constant computed from a class that is not included is written as
its value.
"""

from __future__ import annotations

import ast
import builtins
import functools
import importlib.util
import textwrap
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path

import moba

FILE = "modeling_moba.py"
ROOT = "moba.remote_code"
MODEL = "RemoteModel"
PACKAGE = moba.__name__
OPTIONAL = "triton"
Scope = frozenset[str]


def model_class(architecture: str) -> str:
    """The name of the class that the file has for a model of this class of transformers."""
    return f"Moba{architecture}"


def auto_map(architecture: str) -> dict[str, str]:
    """config.json's `auto_map`, by which transformers finds the class with trust_remote_code=True."""
    return {"AutoModelForCausalLM": f"{Path(FILE).stem}.{model_class(architecture)}"}


def source(architecture: str) -> str:
    """The text of the file for a model of this class of transformers, such as "LlamaForCausalLM"."""
    bundle = _Bundle()
    bundle.take(ROOT, MODEL)
    sections = [bundle.section(name) for name in bundle.order()]
    name = model_class(architecture)
    sections.append(
        f'class {name}({MODEL}, {architecture}):\n    """{architecture} with MoBA, as config.moba["plan"] says of each '
        'layer."""\n'
    )
    bundle.outside[architecture] = f"from transformers import {architecture}"
    return "\n\n".join([bundle.head(), *sections])


# -------------------- one module


@dataclass
class _Definition:
    """A statement at the top of a module, with what it needs."""

    first_line: int
    """From 0, its decorators and comments included."""
    end_line: int
    node: ast.stmt
    uses: list[ast.Name]
    """Global names that it reads."""
    imports: list[ast.ImportFrom]
    """Imports from the project inside it."""


@dataclass
class _Module:
    name: str
    lines: list[str]
    definitions: dict[str, _Definition] = field(default_factory=dict)
    ours: dict[str, tuple[str, str]] = field(default_factory=dict)
    """Name -> (module of the project, name there)."""
    outside: dict[str, str] = field(default_factory=dict)
    """Name -> the import that gives it."""

    @property
    def is_optional(self) -> bool:
        """Whether it needs Triton."""
        return OPTIONAL in self.outside


@functools.cache
def _module(name: str) -> _Module:
    """The module, parsed but not executed."""
    found = importlib.util.find_spec(name)
    assert found is not None and found.origin is not None, name
    text = Path(found.origin).read_text(encoding="utf-8")
    module = _Module(name, text.splitlines())
    body = ast.parse(text).body
    for i, node in enumerate(body):
        if isinstance(node, ast.Import | ast.ImportFrom):
            _add_import(module, node)
        elif isinstance(node, ast.If):  # of TYPE_CHECKING
            for one in node.body:
                assert isinstance(one, ast.ImportFrom), f"{name}:{one.lineno}"
                _add_import(module, one)
        else:
            follows = body[i + 1] if i + 1 < len(body) else None
            definition = _definition(module.lines, node, follows)
            module.definitions |= dict.fromkeys(_names(node), definition)
    return module


def _add_import(module: _Module, node: ast.Import | ast.ImportFrom) -> None:
    for alias in node.names:
        bound = alias.asname or alias.name.partition(".")[0]
        renamed = f" as {alias.asname}" if alias.asname else ""
        if isinstance(node, ast.Import):
            assert not alias.name.startswith(PACKAGE), f"{module.name}:{node.lineno}: import names from our modules"
            module.outside[bound] = f"import {alias.name}{renamed}"
        elif _is_ours(node):
            assert node.module is not None
            module.ours[bound] = (node.module, alias.name)
        elif node.module != "__future__":
            module.outside[bound] = f"from {node.module} import {alias.name}{renamed}"


def _is_ours(node: ast.ImportFrom) -> bool:
    return node.module is not None and node.module.partition(".")[0] == PACKAGE


def _definition(lines: list[str], node: ast.stmt, follows: ast.stmt | None) -> _Definition:
    first = min([node.lineno, *(one.lineno for one in getattr(node, "decorator_list", []))]) - 1
    while first and lines[first - 1].startswith("# ") and not lines[first - 1].startswith("# ---"):
        first -= 1
    end = node.end_lineno or node.lineno
    text = follows if isinstance(follows, ast.Expr) and isinstance(follows.value, ast.Constant) else None
    if isinstance(node, ast.Assign | ast.AnnAssign) and text is not None:  # the text below an attribute
        end = text.end_lineno or text.lineno
    inside = [one for one in ast.walk(node) if isinstance(one, ast.ImportFrom) and _is_ours(one)]
    return _Definition(first, end, node, list(_global_names(node, frozenset())), inside)


def _names(node: ast.stmt) -> Iterator[str]:
    """What a statement at the top of a module defines."""
    if isinstance(node, ast.FunctionDef | ast.ClassDef):
        yield node.name
    elif isinstance(node, ast.Assign | ast.AnnAssign):
        targets = node.targets if isinstance(node, ast.Assign) else [node.target]
        for target in targets:
            yield from (one.id for one in ast.walk(target) if isinstance(one, ast.Name))


def _global_names(node: ast.AST, local: Scope) -> Iterator[ast.Name]:
    """Names below `node` that are read and bound in none of the functions around them, in annotations too."""
    if isinstance(node, ast.Name):
        if isinstance(node.ctx, ast.Load) and node.id not in local:
            yield node
    elif isinstance(node, ast.FunctionDef | ast.Lambda):
        arguments = ast.walk(node.args)
        outer = [one for one in ast.iter_child_nodes(node) if one not in _inner(node)]
        for one in outer:
            yield from _global_names(one, local)
        bound = {one.arg for one in arguments if isinstance(one, ast.arg)}
        for one in _inner(node):
            bound |= set(_bound(one))
        for one in _inner(node):
            yield from _global_names(one, local | bound)
    elif isinstance(node, ast.ClassDef):
        own = {name for one in node.body for name in _bound(one)}
        for one in ast.iter_child_nodes(node):
            inside = one in node.body and not isinstance(one, ast.FunctionDef)
            yield from _global_names(one, local | own if inside else local)
    else:
        for one in ast.iter_child_nodes(node):
            yield from _global_names(one, local)


def _inner(node: ast.FunctionDef | ast.Lambda) -> list[ast.AST]:
    """What runs in a function's own scope."""
    return [node.body] if isinstance(node, ast.Lambda) else list(node.body)


def _bound(node: ast.AST) -> Iterator[str]:
    """Names that a statement binds in its scope; those of comprehensions too. Imports from the project bind nothing:
    what they name is global in the file."""
    if isinstance(node, ast.FunctionDef | ast.ClassDef):
        yield node.name
        return
    if isinstance(node, ast.Lambda):
        return
    if isinstance(node, ast.Import) or (isinstance(node, ast.ImportFrom) and not _is_ours(node)):
        yield from (alias.asname or alias.name.partition(".")[0] for alias in node.names)
    if isinstance(node, ast.Name) and isinstance(node.ctx, ast.Store):
        yield node.id
    if isinstance(node, ast.ExceptHandler) and node.name is not None:
        yield node.name
    for one in ast.iter_child_nodes(node):
        yield from _bound(one)


# -------------------- all of them


class _Bundle:
    """The definitions included, and their names in the file."""

    def __init__(self):
        self.taken: dict[tuple[str, str], str] = {}
        """(module, name) -> name in the file."""
        self.values: dict[tuple[str, str], object] = {}
        """Constants that are written as their values."""
        self.outside: dict[str, str] = {}
        """Name -> the import that gives it."""
        replaces = importlib.import_module(ROOT).REPLACES
        self.replaced = {(where, name) for where, names in replaces.items() for name in names}

    def take(self, where: str, name: str) -> str:
        """Includes a definition and all that it needs; returns its name in the file."""
        where, name = self.resolve(where, name)
        if (where, name) in self.taken:
            return self.taken[where, name]
        module = _module(where)
        assert name in module.definitions, f"{where} has no {name} that could be taken"
        clash = name in self.taken.values() or name == OPTIONAL
        short = f"{where.rpartition('.')[2]}_{name}" if clash else name
        assert short not in self.taken.values() and not hasattr(builtins, short), short
        self.taken[where, name] = short
        definition = module.definitions[name]
        needs = {used.id for used in definition.uses}
        if isinstance(definition.node, ast.Assign) and any(self._is_class(module, one) for one in needs):
            self.values[where, name] = getattr(importlib.import_module(where), name)
            return short
        for alias, target in self._imported(definition).items():
            assert alias == target[1], f"{where}: {name} imports {target[1]} under another name"
        for one in sorted(needs):
            self._need(module, definition, one)
        return short

    def _need(self, module: _Module, definition: _Definition, name: str) -> None:
        target = self._imported(definition).get(name) or module.ours.get(name)
        if target is not None:
            self.take(*target)
        elif name in module.definitions:
            self.take(module.name, name)
        elif name in module.outside:
            given = self.outside.setdefault(name, module.outside[name])
            assert given == module.outside[name], f"{module.name}: {name} is something else elsewhere: {given}"
        else:
            assert hasattr(builtins, name) or name == "__name__", f"{module.name}: where does {name} come from?"

    def _imported(self, definition: _Definition) -> dict[str, tuple[str, str]]:
        """The imports from the project inside a definition."""
        return {
            alias.asname or alias.name: (node.module or "", alias.name)
            for node in definition.imports
            for alias in node.names
        }

    def resolve(self, where: str, name: str) -> tuple[str, str]:
        """(module, name) where a module's name is defined, following re-exports and replacements."""
        if (where, name) in self.replaced:
            return ROOT, name
        module = _module(where)
        return self.resolve(*module.ours[name]) if name in module.ours else (where, name)

    def _is_class(self, module: _Module, name: str) -> bool:
        """Whether a name of a module is a class of the project."""
        where, name = self.resolve(module.name, name)
        definition = _module(where).definitions.get(name)
        return definition is not None and isinstance(definition.node, ast.ClassDef)

    def order(self) -> list[str]:
        """The modules included, each after those that it imports."""
        found: list[str] = []
        used = {where for where, _ in self.taken}

        def visit(name: str) -> None:
            if name in visited:
                return
            visited.add(name)
            for where, _ in _module(name).ours.values():
                visit(where)
            if name in used:
                found.append(name)

        visited: set[str] = set()
        for name in (ROOT, *sorted(used)):
            visit(name)
        return found

    def head(self) -> str:
        """The text of the file up to its first definition."""
        optional = [line for line in sorted(set(self.outside.values())) if OPTIONAL in line]
        others = sorted(set(self.outside.values()) - set(optional), key=lambda line: (line.split()[1], line))
        sources = ", ".join(f"{name.replace('.', '/')}.py" for name in self.order())
        about = (
            f"Written by launch/export.py of moba-train (Apache-2.0) from its definitions in "
            f"{sources}. Export again rather than edit it."
        )
        return "\n".join(
            [
                '"""MoBA attention for this checkpoint, with torch and transformers alone:',
                "",
                "    AutoModelForCausalLM.from_pretrained(folder, trust_remote_code=True)",
                "",
                textwrap.fill(about, 120),
                '"""',
                "",
                "from __future__ import annotations",
                "",
                *others,
                "",
                "try:",
                *(f"    {line}" for line in optional),
                "except ImportError:  # then torch computes everything",
                f"    {OPTIONAL} = None",
                "",
            ]
        )

    def section(self, where: str) -> str:
        """The definitions included from one module."""
        module = _module(where)
        names = [name for one, name in self.taken if one == where]
        kept = {module.definitions[name].first_line: module.definitions[name] for name in names}
        text, was_constant = "", False
        for _, one in sorted(kept.items()):
            values = [name for name in names if module.definitions[name] is one and (where, name) in self.values]
            lines = [f"{self.taken[where, name]} = {self.values[where, name]!r}" for name in values]
            is_constant = isinstance(one.node, ast.Assign | ast.AnnAssign)
            gap = "" if not text else "\n" if is_constant and was_constant else "\n\n\n"
            text += gap + ("\n".join(lines) or self._text(module, one))
            was_constant = is_constant
        if module.is_optional:
            indented = "\n".join(f"    {line}" if line else "" for line in text.splitlines())
            text = f"if {OPTIONAL} is not None:\n{indented}"
        return f"# -------------------- {where.replace('.', '/')}.py\n\n\n{text}\n"

    def _text(self, module: _Module, definition: _Definition) -> str:
        """A definition's lines, without imports from the project and with the file's names."""
        lines = list(module.lines)
        edits = [
            (used.lineno - 1, used.col_offset, used.id, self._name(module, definition, used.id))
            for used in definition.uses
        ]
        node = definition.node
        if isinstance(node, ast.FunctionDef | ast.ClassDef):
            keyword = "def" if isinstance(node, ast.FunctionDef) else "class"
            edits.append((node.lineno - 1, len(keyword) + 1, node.name, self.taken[module.name, node.name]))
        else:
            for one in ast.walk(node):
                if isinstance(one, ast.Name) and isinstance(one.ctx, ast.Store):
                    edits.append(
                        (one.lineno - 1, one.col_offset, one.id, self.taken.get((module.name, one.id), one.id))
                    )
        for line, column, old, new in sorted(set(edits), reverse=True):
            assert lines[line][column:].startswith(old), lines[line]
            lines[line] = lines[line][:column] + new + lines[line][column + len(old) :]
        dropped = {i for one in definition.imports for i in range(one.lineno - 1, one.end_lineno or one.lineno)}
        dropped |= {i + 1 for i in dropped if i + 1 not in dropped and not lines[i + 1].strip()}
        return "\n".join(lines[i] for i in range(definition.first_line, definition.end_line) if i not in dropped)

    def _name(self, module: _Module, definition: _Definition, name: str) -> str:
        where, own = self._imported(definition).get(name) or (module.name, name)
        return self.taken.get(self.resolve(where, own), name)
