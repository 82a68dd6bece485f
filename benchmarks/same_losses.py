"""Do two commits train alike? A fixed set of short runs on a CPU, whose losses are then compared bit for bit.

    python benchmarks/same_losses.py root=<checkout> to=old.json
    python benchmarks/same_losses.py compare old.json new.json

The first runs the set by the commands of the checkout `root` alone, whatever its modules are called, and writes every
step's loss, gradient norm and learning rate and the losses by position: quickstart on 1 and 2 processes and ZeRO 0 to
3; and, from its model, fine-tuning on conversations, an extension from 2K to 8K with moments and data going on, and
training from its Hugging Face export. `compare` prints a row per run and exits 1 if any value differs. One thread per
process: the same machine and libraries give the same bits.
"""

from __future__ import annotations

import json
import math
import os
import platform
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from importlib.metadata import version
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))

import numpy as np  # noqa: E402

from launch.cli import UsageError, exits_on, key_values  # noqa: E402

KEYS = {
    "root": "checkout to run (default: this one)",
    "to": "JSON file of the values of the set",
    "runs": "folder of the runs; finished ones are not made again (default: a temporary one)",
}
COMMON = "run.device=cpu logging=quiet eval.suite=loss eval.every_tokens=0 eval.documents=2 checkpoint.every_tokens=0"
RECIPES = {
    "quickstart": "+exp=quickstart schedule.tokens=16K",
    "sft": "+exp=sft_quickstart schedule.tokens=12K",
    "extension": (
        "+exp=extend_64k model=tiny data.tokenizer=bytes schedule.seq_len=8K schedule.batch_tokens=16K "
        "schedule.stages.at_64k.tokens=32K schedule.stages.at_64k.attention.full_last=1 "
        "schedule.stages.at_64k.rope.theta=40000 eval.documents=1"
    ),
    "hugging_face": "+exp=quickstart model=from_source schedule.tokens=8K",
}
CONVENTION = (
    "each step's loss, trailing loss, gradient norm and learning rate; losses of each evaluation; mean loss of each "
    "bucket of positions; float64 as the run wrote them, null if not finite"
)
COLUMNS = {"train": ("loss", "trailing_loss", "grad_norm", "lr"), "eval": ("loss", "trailing_loss")}
FIRST, EXPORT = "quickstart_1p_zero1", "export"
SOURCES = {"sft": FIRST, "extension": FIRST, "hugging_face": EXPORT}
ALL = [f"quickstart_{n}p_zero{z}" for n in (1, 2) for z in (1, 0, 2, 3)]
ALL += [f"{recipe}_{how}" for recipe in SOURCES for how in ("1p_zero1", "2p_zero3")] + ["extension_2p_zero2"]


@dataclass(frozen=True)
class Checkout:
    """A checkout and the folder its runs go to, of which some start from the first, or from its export."""

    root: Path
    runs: Path

    @property
    def commit(self) -> str:
        """Its commit, with "-dirty" behind it if tracked files were changed."""
        command = ["git", "describe", "--always", "--dirty", "--abbrev=40", "--exclude=*"]
        return subprocess.run(command, cwd=self.root, capture_output=True, text=True, check=True).stdout.strip()

    def run(self, name: str, script: str, *arguments: str, num_processes: int = 1) -> None:
        """A command to its end; what it says goes to <name>.log. ValueError with the end of that if it fails."""
        python = [sys.executable]
        if num_processes > 1:
            python += ["-m", "torch.distributed.run", "--standalone", f"--nproc_per_node={num_processes}"]
        environment = {**os.environ, "PYTHONPATH": str(self.root), "OMP_NUM_THREADS": "1", "MKL_NUM_THREADS": "1"}
        self.runs.mkdir(parents=True, exist_ok=True)
        path = self.runs / f"{name}.log"
        with path.open("wb") as log:
            command = [*python, f"launch/{script}", *arguments]
            done = subprocess.run(command, cwd=self.root, env=environment, stdout=log, stderr=subprocess.STDOUT)
        if done.returncode != 0:
            tail = path.read_text(errors="replace")[-2000:]
            raise ValueError(f"{name} at {self.root} failed ({done.returncode}):\n{tail}")

    def train(self, name: str) -> None:
        """The run of this name, in a folder of this name."""
        recipe, processes, zero = name.rsplit("_", 2)
        arguments = f"{COMMON} {RECIPES[recipe]} deepspeed={zero}".split()
        arguments += [f"run.dir={self.runs / name}", f"data.cache_dir={self.runs / 'cache'}"]
        if recipe in SOURCES:
            arguments.append(f"init.source={self.runs / SOURCES[recipe]}")
        self.run(name, "train.py", *arguments, num_processes=int(processes[:-1]))

    def make(self, name: str) -> dict:
        """`{commit, seconds, values}` of a run, made unless this commit has made it here."""
        known, folder = self.runs / f"{name}.json", self.runs / name
        if known.exists():
            record = json.loads(known.read_text(encoding="utf-8"))
            if record["commit"] != self.commit or self.commit.endswith("-dirty"):
                raise ValueError(f"{known} is not of {self.root} as it is ({self.commit}): choose another folder")
            return record
        shutil.rmtree(folder, ignore_errors=True)
        began = time.monotonic()
        self.train(name)
        if name == FIRST:
            shutil.rmtree(self.runs / EXPORT, ignore_errors=True)
            self.run(EXPORT, "export.py", f"run={folder}", f"to={self.runs / EXPORT}", "dtype=fp32")
        record = {"commit": self.commit, "seconds": round(time.monotonic() - began, 1), "values": dict(values(folder))}
        known.write_text(json.dumps(record, indent=1) + "\n", encoding="utf-8")
        if name != FIRST:
            shutil.rmtree(folder)
        print(f"  {name:<24}{len(record['values']):>4} values {record['seconds']:>6.1f} s", flush=True)
        return record


def lines(folder: Path, kind: str) -> list[dict]:
    """The lines of this kind in a run's metrics.jsonl so far, without one that is half written."""
    path = folder / "metrics.jsonl"
    text = path.read_text(encoding="utf-8") if path.exists() else ""
    records = [json.loads(line) for line in text.splitlines(keepends=True) if line.endswith("\n")]
    return [record for record in records if record["kind"] == kind]


def values(folder: Path) -> Iterator[tuple[str, float | None]]:
    """What a run says of its losses, by a name for each (CONVENTION)."""
    for kind, columns in COLUMNS.items():
        for record in lines(folder, kind):
            yield from ((f"{kind} at {record['tokens']}: {column}", record[column]) for column in columns)
    for path in sorted((folder / "position_loss").glob("*.npz")):
        with np.load(path) as arrays:
            for bucket, loss in enumerate(arrays["mean"].tolist()):
                yield f"{path.stem}: bucket {bucket}", loss if math.isfinite(loss) else None


def table(old: Mapping[str, dict], new: Mapping[str, dict]) -> int:
    """Prints a row per run, and returns 1 if any value differs or is in one of the two only, else 0."""
    verdicts = []
    for name in dict.fromkeys([*old, *new]):
        a, b = (side.get(name, {"values": {}, "seconds": math.nan}) for side in (old, new))
        verdicts.append(differences(a["values"], b["values"]))
        line = f"{name:<24}{len(b['values']):>4} values {a['seconds']:>6.1f} s {b['seconds']:>6.1f} s"
        print(f"{line}  {verdicts[-1] or 'equal bit for bit'}")
    return int(any(verdicts) or not verdicts)


def differences(a: Mapping[str, float | None], b: Mapping[str, float | None]) -> str | None:
    """What differs between the values of a run, in words; None if nothing does."""
    unequal = [name for name in dict.fromkeys([*a, *b]) if a.get(name, "") != b.get(name, "")]
    if not unequal:
        return None
    sizes = {name: math.inf if None in (a.get(name), b.get(name)) else abs(a[name] - b[name]) for name in unequal}
    most = max(unequal, key=sizes.get)
    return f"{len(unequal)} differ: first {unequal[0]}; most {most}, {a.get(most)} and {b.get(most)}"


def origin(checkout: Checkout) -> dict[str, str]:
    """Commit, machine, versions and convention of the values."""
    return {
        "commit": checkout.commit,
        "hardware": f"{platform.machine()} CPU, {os.cpu_count()} cores, 1 thread per process",
        "versions": ", ".join(f"{name} {version(name)}" for name in ("torch", "deepspeed", "numpy")),
        "convention": CONVENTION,
    }


@exits_on(ValueError, OSError, subprocess.CalledProcessError)
def main() -> int:
    """The command; see the module's text."""
    if sys.argv[1:2] == ["compare"]:
        return compare(sys.argv[2:])
    with tempfile.TemporaryDirectory() as temporary:
        return run_all(sys.argv[1:], Path(temporary))


def run_all(arguments: Sequence[str], temporary: Path) -> int:
    """Makes the runs and writes their values."""
    given = key_values(arguments, KEYS, about=__doc__, required=["to"])
    checkout = Checkout(Path(given.get("root", ROOT)).resolve(), Path(given.get("runs", temporary)).resolve())
    record = origin(checkout)
    print("\n".join(record.values()), flush=True)
    record["runs"] = {name: checkout.make(name) for name in ALL}
    Path(given["to"]).write_text(json.dumps(record, indent=1) + "\n", encoding="utf-8")
    return 0


def compare(files: Sequence[str]) -> int:
    """Compares two files of values."""
    if len(files) != 2:
        raise UsageError("compare takes two files: compare old.json new.json")
    old, new = (json.loads(Path(file).read_text(encoding="utf-8")) for file in files)
    print("\n".join(f"{old[key]}  ->  {new[key]}" for key in ("commit", "hardware", "versions")))
    return table(old["runs"], new["runs"])


if __name__ == "__main__":
    sys.exit(main())
