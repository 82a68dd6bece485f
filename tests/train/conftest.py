"""The engine runs of engine_worker.py, made once for all tests: four launches, two of them torchrun."""

from __future__ import annotations

from typing import Any

import pytest
from engine_runs import launch


@pytest.fixture(scope="session")
def runs_dir(tmp_path_factory):
    return tmp_path_factory.mktemp("engines")


@pytest.fixture(scope="session")
def first_runs(runs_dir) -> dict[int, dict[str, Any]]:
    """World size -> report of steps 0 to 6, uninterrupted."""
    return launch("first", runs_dir)


@pytest.fixture(scope="session")
def second_runs(runs_dir, first_runs) -> dict[int, dict[str, Any]]:
    """World size -> report of steps 3 to 6, continued in new processes from checkpoints."""
    return launch("second", runs_dir)
