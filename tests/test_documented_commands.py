"""Every launch/train.py and launch/plan.py command of the documentation composes and is planned as it stands."""

from __future__ import annotations

import re
import shlex
from dataclasses import replace
from pathlib import Path

import pytest

from conf.build import ConfigError
from launch.config import load_asked
from launch.plan import split_machine
from train.plan.plan import make_plan

ROOT = Path(__file__).resolve().parents[1]
PAGES = [ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md"))]
# What a reader has to have before: a model from the hub, or a tokenizer that came with it.
BROUGHT = re.compile(r"models/|init\.source=.*does not exist")


def commands() -> list[str]:
    """The lines of the pages' bash blocks that start or plan a run."""
    lines = []
    for page in PAGES:
        for block in re.findall(r"```bash\n(.*?)```", page.read_text(encoding="utf-8"), re.DOTALL):
            lines += [line for line in block.splitlines() if re.search(r"launch/(train|plan)\.py ", line)]
    return list(dict.fromkeys(lines))


@pytest.mark.parametrize("line", commands(), ids=lambda line: re.sub(r".*launch/", "", line)[:60])
def test_a_documented_command_is_accepted(line):
    """Catches a command in the documentation that is refused, which a reader meets first."""
    words = shlex.split(line, comments=True)
    script = next(i for i, word in enumerate(words) if word.endswith(("train.py", "plan.py")))
    processes = next((int(word.partition("=")[2]) for word in words if word.startswith("--nproc_per_node=")), 1)
    overrides, hardware = split_machine(words[script + 1 :])
    if processes > 1:
        hardware = replace(hardware, num_gpus=processes, world_size=processes, local_world_size=processes)
    try:
        config, asked = load_asked(overrides, hardware)
    except ConfigError as error:
        assert all(BROUGHT.search(problem) for problem in error.problems), error.problems
        return
    assert make_plan(config, 4096, hardware, asked_tokens=asked).text()


def test_there_are_commands():
    """Catches a walk that finds none."""
    assert len(commands()) > 20
