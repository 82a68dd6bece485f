"""The house rules that a machine can check: who imports whom, who reads the environment, what text may contain.

docs/design.md says what the rules are for.
"""

import ast
import re
import subprocess
import sys
import tomllib
from pathlib import Path

import pytest

from moba.kinds import KINDS

ROOT = Path(__file__).resolve().parents[1]
MAY_IMPORT = {
    "conf": {"moba.kinds"},
    "moba": set(),
    "data": {"conf", "moba.documents"},
    "train": {"conf", "moba", "data"},
    "evals": {"conf", "moba", "data", "train"},
    "launch": {"conf", "moba", "data", "train", "evals"},
}
SOURCES = sorted(path for package in MAY_IMPORT for path in (ROOT / package).rglob("*.py"))
TEXT_SUFFIXES = {".py", ".yaml", ".md", ".toml", ".sh", ""}
# What lies below one of these belongs to somebody's machine.
MACHINE_PATH = re.compile(r"(?<![\w.~$}/-])/(?:root|home|work|mnt|tmp|Users)/[\w.]+")


def imports(path: Path) -> set[str]:
    """Dotted names of every module a file imports, wherever in it."""
    names = set()
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            names |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{path}: relative import; write the package's name"
            names |= {node.module} | {f"{node.module}.{alias.name}" for alias in node.names}
    return names


def tops(path: Path) -> set[str]:
    return {name.split(".")[0] for name in imports(path)}


def reads_environment(path: Path) -> bool:
    """True if a file touches os.environ or os.getenv, however it imported them."""
    tree = ast.parse(path.read_text(encoding="utf-8"))
    names = {"environ", "environb", "getenv", "putenv", "unsetenv"}
    for node in ast.walk(tree):
        if isinstance(node, ast.Attribute) and node.attr in names:
            return True
        if isinstance(node, ast.ImportFrom) and node.module == "os" and names & {alias.name for alias in node.names}:
            return True
    return False


def tracked_files() -> list[Path]:
    """Files of the project: what git tracks, or, outside a checkout, what lies in its folders."""
    listed = subprocess.run(["git", "ls-files", "-z"], cwd=ROOT, capture_output=True, text=True)
    if listed.returncode == 0 and listed.stdout:
        paths = [ROOT / name for name in listed.stdout.split("\0") if name]
    else:
        folders = [*MAY_IMPORT, "tests", "docs", "benchmarks", ".ci"]
        paths = [path for folder in folders for path in (ROOT / folder).rglob("*")]
        paths += [ROOT / "README.md", ROOT / "pyproject.toml"]
    return [path for path in paths if path.is_file() and "__pycache__" not in path.parts]


def test_the_walk_sees_imports_wherever_they_are(tmp_path):
    """Catches a checker that misses imports inside functions, or environment access under another name."""
    path = tmp_path / "x.py"
    path.write_text("import a.b\ndef f():\n    from c import d\n    from os import getenv as g\n")
    assert {"a.b", "c", "c.d"} <= imports(path) and reads_environment(path)
    path.write_text("import os\nx = os.environ['A']\n")
    assert reads_environment(path)
    path.write_text("import os\nos.replace('a', 'b')\n")
    assert not reads_environment(path)
    assert len(SOURCES) > 30


@pytest.mark.parametrize("path", SOURCES, ids=lambda path: str(path.relative_to(ROOT)))
def test_imports_follow_the_rule(path):
    """Catches an import against the direction in which a run flows, and Hydra below launch/ and conf/."""
    package = path.relative_to(ROOT).parts[0]
    allowed = MAY_IMPORT[package] | {package}
    ours = {name for name in imports(path) if name.split(".")[0] in MAY_IMPORT.keys() | {"tests", "benchmarks"}}
    assert not {name for name in ours if not any(f"{name}.".startswith(f"{one}.") for one in allowed)}
    if package not in ("launch", "conf"):
        assert not tops(path) & {"hydra", "omegaconf"}, "configuration arrives as frozen dataclasses"
    if package == "conf":
        assert "torch" not in tops(path), "conf stays importable in a moment"


KIND_NAMES = {kind.name for kind in KINDS.values()} | {kind.letter for kind in KINDS.values()}
# Words that are no kind there: a suffix of numbers, the name that transformers knows us by.
NO_KIND = {"conf/numbers.py": {"M"}, "moba/transformers.py": {"moba"}}


def says_a_kind(path: Path) -> list[str]:
    """Lines with a literal that is a kind's name or letter, or a comparison with an attribute `kind` of one."""
    found = []
    tree = ast.parse(path.read_text(encoding="utf-8"))
    docstrings = {id(node.value) for node in ast.walk(tree) if isinstance(node, ast.Expr)}
    for node in ast.walk(tree):
        literal = isinstance(node, ast.Constant) and isinstance(node.value, str) and id(node) not in docstrings
        if literal and node.value in KIND_NAMES - NO_KIND.get(str(path.relative_to(ROOT)), set()):
            found.append(f"{path.relative_to(ROOT)}:{node.lineno}: {node.value!r}")
        if isinstance(node, ast.Call) and getattr(node.func, "id", "") == "isinstance":
            names = {one.id for one in ast.walk(node.args[1]) if isinstance(one, ast.Name)}
            if names & {kind.__name__ for kind in KINDS.values()}:
                found.append(f"{path.relative_to(ROOT)}:{node.lineno}: isinstance")
    return found


def test_kinds_are_known_to_their_package_alone():
    """Catches the first branch on a kind of attention outside moba/kinds, from where the next ones are copied."""
    lines = [line for path in SOURCES if path.parent != ROOT / "moba" / "kinds" for line in says_a_kind(path)]
    assert not lines, "\n".join(lines)


def test_hydra_is_used_by_train_and_plan_alone():
    """Catches a command that grows a second argument grammar: the others take key=value as it is typed."""
    users = {path.name for path in (ROOT / "launch").glob("*.py") if tops(path) & {"hydra", "omegaconf"}}
    assert users <= {"config.py", "train.py", "plan.py"}


def test_only_distributed_reads_the_environment():
    """Catches configuration that comes in through the back door. gluon_choice.py reads MOBA_GLUON, for debugging, which
    changes no result beyond rounding."""
    readers = {str(path.relative_to(ROOT)) for path in SOURCES if reads_environment(path)}
    assert readers == {"train/engine/world.py", "moba/backends/gluon_choice.py"}


def test_all_packages_are_installed():
    """Catches a new folder that works in the checkout and is missing from a wheel."""
    listed = set(tomllib.loads((ROOT / "pyproject.toml").read_text())["tool"]["setuptools"]["packages"])
    found = {".".join(path.parent.relative_to(ROOT).parts) for path in SOURCES if path.name == "__init__.py"}
    assert listed == found
    assert {".".join(path.parent.relative_to(ROOT).parts) for path in SOURCES} == found


def test_text_is_ascii_and_names_no_machine():
    """Catches typographic characters, and paths that exist on one machine only."""
    wrong = []
    for path in tracked_files():
        if path.suffix not in TEXT_SUFFIXES or path.name == "LICENSE":
            continue
        for number, line in enumerate(path.read_text(encoding="utf-8").splitlines(), 1):
            if not line.isascii() or MACHINE_PATH.search(line):
                wrong.append(f"{path.relative_to(ROOT)}:{number}: {line.strip()!a}")
    assert not wrong, "\n".join(wrong)


def test_machine_paths_are_recognised():
    """Catches a pattern that lets machine paths through or refuses ordinary ones."""
    for text in ("{}root/venv/bin", "'{}home/me/x'", "cd {}work/main", "to={}tmp/out"):
        assert MACHINE_PATH.search(text.format("/")), text
    for text in ("runs/home/x", "~/.cache/x", "https://x.org/home/a", "$HOME/data/x", "../data/x", "a /data folder"):
        assert not MACHINE_PATH.search(text), text


def test_moba_needs_torch_alone():
    """Catches a kernel package, or Hydra, that `import moba` cannot do without."""
    code = (
        "import sys\n"
        "for name in 'triton flash_attn hydra omegaconf deepspeed datasets transformers wandb numpy'.split():\n"
        "    sys.modules[name] = None\n"
        "import moba\n"
        "print(moba.moba_attention.__name__, moba.Full())\n"
    )
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert done.stdout == "moba_attention full\n"


def test_conf_imports_without_torch():
    """Catches a plan or --help that takes seconds because something in conf/ pulls in torch."""
    code = "import sys, conf.schema, conf.numbers, conf.validate; assert 'torch' not in sys.modules"
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
