"""What `pip install .` gives: a wheel with everything the commands read, in a folder that is no checkout."""

from __future__ import annotations

import os
import subprocess
import sys
import sysconfig
import tomllib
import zipfile
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
SCRIPTS = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]["scripts"]


def call(*words: str | Path, cwd: Path) -> str:
    """What the command prints; an assertion with all of it if it fails."""
    # Without the PYTHONPATH of the tests: what is imported has to come out of the wheel.
    env = {key: value for key, value in os.environ.items() if not key.startswith("PYTHON")}
    done = subprocess.run([str(word) for word in words], cwd=cwd, env=env, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


@pytest.fixture(scope="module")
def wheel(tmp_path_factory) -> Path:
    """The wheel of a copy of the files that git tracks, so that nothing is left in the tree."""
    folder = tmp_path_factory.mktemp("wheel")
    source = folder / "source"
    listed = subprocess.run(["git", "ls-files", "-z", "-co", "--exclude-standard"], cwd=ROOT, capture_output=True)
    if listed.returncode != 0:
        pytest.skip("not a git checkout")
    for name in filter(None, listed.stdout.decode().split("\0")):
        if (ROOT / name).is_file() and not name.startswith(("docs/", "benchmarks/", "tests/")):
            (source / name).parent.mkdir(parents=True, exist_ok=True)
            (source / name).write_bytes((ROOT / name).read_bytes())
    pip = [sys.executable, "-m", "pip", "--disable-pip-version-check", "wheel", "-q", "--no-deps"]
    call(*pip, "--no-build-isolation", "-w", folder, source, cwd=folder)
    (built,) = folder.glob("*.whl")
    return built


@pytest.fixture(scope="module")
def installed(wheel, tmp_path_factory) -> Path:
    """bin/ of a fresh virtual environment that holds the wheel, and sees the dependencies of this one."""
    folder = tmp_path_factory.mktemp("venv")
    call(sys.executable, "-m", "venv", "--without-pip", folder, cwd=folder)
    python = folder / "bin" / "python"
    site = Path(call(python, "-c", "import sysconfig; print(sysconfig.get_path('purelib'))", cwd=folder).strip())
    pip = [sys.executable, "-m", "pip", "--disable-pip-version-check", "--python", python]
    call(*pip, "install", "-q", "--no-deps", wheel, cwd=folder)
    (site / "dependencies.pth").write_text(sysconfig.get_path("purelib") + "\n", encoding="utf-8")
    return folder / "bin"


def test_the_wheel_has_all_that_is_read(wheel):
    """Catches YAML files, shipped books, the type marker or the SLURM script that stay behind."""
    names = set(zipfile.ZipFile(wheel).namelist())
    read = [*(ROOT / "conf").rglob("*.yaml"), *(ROOT / "data" / "embedded").iterdir()]
    read += [ROOT / "moba" / "py.typed", ROOT / "launch" / "slurm.sbatch"]
    assert len(read) > 50
    assert sorted({str(path.relative_to(ROOT)) for path in read} - names) == []


def test_the_plan_of_the_quickstart_works_anywhere(installed, tmp_path):
    """Catches a command that needs the checkout or the current directory."""
    assert "Plan of quickstart" in call(installed / "moba-plan", "+exp=quickstart", cwd=tmp_path)
    assert list(tmp_path.iterdir()) == []


def test_every_command_is_there(installed, tmp_path):
    """Catches an entry point that names no function, or one that imports what the wheel does not have."""
    code = """if True:
        from importlib.metadata import distribution
        for point in distribution("moba-train").entry_points:
            assert callable(point.load())
            print(point.name)
        """
    names = call(installed / "python", "-c", code, cwd=tmp_path).split()
    assert sorted(names) == sorted(SCRIPTS) and all((installed / name).is_file() for name in names)


def test_training_under_torchrun_works_anywhere(installed, tmp_path):
    """Catches books or tokenizers that are looked for in a checkout, and processes that do not find each other."""
    asked = ["+exp=quickstart", "schedule.tokens=4K", "eval.documents=1", "logging.wandb=disabled"]
    asked += ["data.cache_dir=cache", "schedule.batch_tokens=4K", "model.num_layers=1", "logging.figures=false"]
    run = [sys.executable, "-m", "torch.distributed.run", "--nproc_per_node=2", "--no-python", installed / "moba-train"]
    assert "finished" in call(*run, *asked, cwd=tmp_path)
    assert (tmp_path / "runs" / "quickstart" / "metrics.jsonl").is_file()
