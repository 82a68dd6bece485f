"""README.md, docs/ and .ci/run: the commands a newcomer copies exist, compose, and are the ones that CI runs."""

import os
import re
import shlex
from pathlib import Path

import pytest

from conf.numbers import parse_length, parse_tokens
from launch.config import load
from moba.flops import attended_pairs, causal_pairs
from train.schedule import build_schedule

ROOT = Path(__file__).resolve().parents[1]
README = (ROOT / "README.md").read_text(encoding="utf-8")
CI = (ROOT / ".ci" / "run").read_text(encoding="utf-8")


def bash_lines(text: str) -> list[str]:
    """Lines of the bash blocks of a page."""
    blocks = re.findall(r"^```bash\n(.*?)^```", text, flags=re.MULTILINE | re.DOTALL)
    return [line for block in blocks for line in block.splitlines() if line.strip()]


def ci_commands() -> list[str]:
    return [line.strip() for line in CI.splitlines() if line.strip() and not line.lstrip().startswith("#")]


PAGES = [ROOT / "docs" / name for name in ("data.md", "runs.md", "recipes.md", "evals.md")]
COMMANDS = bash_lines(README)
OF_PAGES = [line for page in PAGES for line in bash_lines(page.read_text(encoding="utf-8"))]
CONFIGURED = [line for line in COMMANDS + OF_PAGES if "launch/train.py" in line or "launch/plan.py" in line]


def test_ci_runs_the_readmes_install_quickstart_and_tests():
    """Catches a README whose commands are no longer the ones that are known to work."""
    install, quickstart, *_ = COMMANDS
    assert install == "pip install -e '.[dev]'" and install in ci_commands()
    assert quickstart == "torchrun launch/train.py +exp=quickstart"
    assert any(line.startswith(quickstart + " schedule.tokens=") for line in ci_commands()), (
        "smaller budget, else the same"
    )
    tests = next(command for command in COMMANDS if command.startswith("python -m pytest"))
    assert any(line.startswith(tests) for line in ci_commands())


def test_ci_stops_at_failures_and_can_be_started():
    """Catches a CI script that goes on after a failure, also behind a pipe, or that is not executable."""
    assert os.access(ROOT / ".ci" / "run", os.X_OK)
    assert "set -euo pipefail" in CI and "trap 'rm -rf" in CI
    for check in ("ruff check .", "ruff format --check .", "pyright"):
        assert check in ci_commands() and f"`{check}`" in README


@pytest.mark.parametrize("command", CONFIGURED)
def test_configured_commands_compose(command):
    """Catches an experiment, choice or key in the README that does not exist any more."""
    words = shlex.split(command)
    script = next(index for index, word in enumerate(words) if word.startswith("launch/"))
    overrides = [word for word in words[script + 1 :] if word.split("=")[0] not in ("num_gpus", "gpu_memory")]
    config = load(overrides)
    assert config.schedule.stages
    assert len(CONFIGURED) >= 12


def test_scripts_and_files_of_the_readme_exist():
    """Catches a command or link that points nowhere, and a page for users that the README does not lead to."""
    assert [page.name for page in PAGES if f"](docs/{page.name})" not in README] == []
    for page in (ROOT / "docs").glob("*.md"):
        links = re.findall(r"\]\(([^)#]+)\)", page.read_text(encoding="utf-8"))
        assert [link for link in links if "://" not in link and not (page.parent / link).exists()] == []
    named = set(re.findall(r"\b(?:launch|train|conf|docs|tests)/[\w./]*\w\.(?:py|md|yaml)", README))
    named |= {target for target in re.findall(r"\]\(([^)#]+)\)", README) if "://" not in target}
    assert len(named) >= 8
    assert [name for name in sorted(named) if not (ROOT / name).exists()] == []


def test_the_stage_table_is_true():
    """Catches a table of stages, lengths and attended shares that the experiments have outgrown."""
    rows = re.findall(
        r"^\| (`\w+`)? ?\| `(\w+)` \| (\S+) \| (\S+) \| (.*?) \| ([\d.]+) % \|$", README, flags=re.MULTILINE
    )
    seen: dict[str, list] = {}
    name = ""
    for experiment, *row in rows:
        name = experiment.strip("`") or name
        seen.setdefault(name, []).append(row)
    assert list(seen) == ["quickstart", "moba_32k", "full_32k", "moba_only_32k"]
    for experiment, table in seen.items():
        stages = build_schedule(load([f"+exp={experiment}"])).stages
        assert [row[0] for row in table] == [stage.name for stage in stages]
        for (_, tokens, length, attention, share), stage in zip(table, stages):
            (spec,) = set(stage.attention)
            assert 0 <= stage.end - stage.start - parse_tokens(tokens) < stage.batch_tokens, "rounded up to whole steps"
            assert stage.seq_len == parse_length(length)
            if spec.routing is not None:
                size, top_k = re.fullmatch(r"MoBA, blocks of (\w+), top (\d+)", attention).groups()
                assert (spec.block_size, spec.top_k) == (parse_length(size), int(top_k))
            else:
                assert attention == "full"
            exact = 100 * attended_pairs(spec, [stage.seq_len]) / causal_pairs([stage.seq_len])
            assert float(share) == round(exact, 1)
