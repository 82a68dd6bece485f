"""The small run that tests of launch/train.py are about: its corpus, its command, and the uninterrupted original."""

from __future__ import annotations

import random
from pathlib import Path
from types import SimpleNamespace

import pytest

pytest.register_assert_rewrite("launch_runs")

from launch_runs import FORK_PATH, TINY, Launcher, finish_real, start_real  # noqa: E402


@pytest.fixture(scope="session")
def house(tmp_path_factory) -> SimpleNamespace:
    """Where everything lies: a corpus of long and short documents, and a cache of its tokens."""
    root = tmp_path_factory.mktemp("train")
    words = [
        "the",
        "river",
        "of",
        "stone",
        "in",
        "long",
        "light",
        "walked",
        "a",
        "night",
        "sparse",
        "and",
        "full",
        "moba",
    ]
    rng = random.Random(0)
    (root / "books").mkdir()
    for number, length in enumerate([700, 600, 500, 400, 300, 200, 60, 30, 8, 3]):
        text = " ".join(rng.choice(words) for _ in range(length))
        (root / "books" / f"{number}.txt").write_text(text)
    data = ["data=files", f"data.path={root}/books", f"data.cache_dir={root}/cache"]
    return SimpleNamespace(root=root, data=[*data, f"data.validation.path={root}/books"], runs=root / "runs")


@pytest.fixture(scope="session")
def launcher(house) -> Launcher:
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("PYTHONPATH", FORK_PATH)
        launcher = Launcher(house.root / "streams")
        ended = launcher.run(["model=nope"])  # starts the server, which imports from that path
    assert ended.code == 2 and "+exp=" not in ended.out, ended
    return launcher


@pytest.fixture(scope="session")
def command(house):
    """run name, more overrides -> the arguments of launch/train.py."""

    def arguments(name: str, *more: str) -> list[str]:
        return [*TINY, *house.data, f"run.dir={house.runs / name}", *more]

    return arguments


@pytest.fixture(scope="session")
def whole(house, command) -> Path:
    """The run directory of the uninterrupted run, made by the real command with all its outputs."""
    house.runs.mkdir(exist_ok=True)
    ended = finish_real(start_real(command("whole", "logging.figures=true", "logging.wandb=offline"), house.root))
    assert ended.code == 0 and "Traceback" not in ended.err, ended
    (house.root / "whole.txt").write_text(ended.out)
    return house.runs / "whole"
