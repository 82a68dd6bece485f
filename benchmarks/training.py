"""Trains the 32K experiments side by side on this machine and keeps what was measured.

    python benchmarks/training.py to=benchmarks/results/training_h100 tokens=12M batch_tokens=64K eval.documents=8 \\
        moba_32k:schedule.stages.sparse.attention.backend=flash

Runs `+exp=moba_32k` (killed with SIGKILL on the way and started again) and `+exp=full_32k`, the same model, data and
budget, one after the other, and writes a table, results.json, the report of the two runs and their metrics into `to`.
Arguments with a dot go to the runs as they are, to one alone behind its name and a colon. Every figure is read from the
runs' own metrics.jsonl; speeds are medians over a stage's log intervals without the first three.
"""

from __future__ import annotations

import json
import shutil
import signal
import statistics
import subprocess
import sys
import time
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))

from benchmarks.study import speeds  # noqa: E402
from evals.results import short_commit  # noqa: E402
from launch.cli import exits_on, key_values  # noqa: E402
from train.record.metrics import FILE_NAME, read_metrics  # noqa: E402

KEYS = {
    "to": "folder of the results",
    "tokens": "budget of each run (default 12M)",
    "batch_tokens": "tokens a step (default 64K)",
    "experiments": "which, comma-separated (default moba_32k,full_32k)",
    "kill": "true (default): kill the first one with SIGKILL on the way and start it again",
    "commit": "commit of the code, where this is no git checkout",
}
SKIP_INTERVALS = 3


@exits_on()
def main() -> None:
    """The command; see the module's text."""
    arguments = sys.argv[1:]
    overrides = [text for text in arguments if "." in text.partition("=")[0]]
    values = key_values([text for text in arguments if text not in overrides], KEYS, about=__doc__, required=["to"])
    to = Path(values["to"])
    to.mkdir(parents=True, exist_ok=True)
    tokens, batch = values.get("tokens", "12M"), values.get("batch_tokens", "64K")
    shared = [text for text in overrides if ":" not in text.partition("=")[0]]
    common = [f"schedule.tokens={tokens}", f"schedule.batch_tokens={batch}", *shared]
    results = {
        "commit": values.get("commit") or short_commit(),
        "command": " ".join(a for a in arguments if not a.startswith(("to=", "data.cache_dir=", "commit="))),
        "runs": {},
    }
    folders, kill = [], values.get("kill", "true") == "true"
    for index, experiment in enumerate(values.get("experiments", "moba_32k,full_32k").split(",")):
        folder = to / "runs" / experiment
        shutil.rmtree(folder, ignore_errors=True)
        own = [text.partition(":")[2] for text in overrides if text.startswith(f"{experiment}:")]
        command = [sys.executable, str(ROOT / "launch" / "train.py"), f"+exp={experiment}", f"run.dir={folder}"]
        command += common + own
        killed_at = _run_and_kill(command, folder) if index == 0 and kill else None
        subprocess.run(command, check=True)
        folders.append(folder)
        results["runs"][experiment] = _summary(folder) | {"killed_at_tokens": killed_at}
        (to / "results.json").write_text(json.dumps(results, indent=1) + "\n", encoding="utf-8")
    _table(results)
    report = [sys.executable, str(ROOT / "launch" / "report.py"), *map(str, folders), f"to={to / 'report'}"]
    subprocess.run(report, check=True)
    for folder in folders:
        shutil.copy(folder / FILE_NAME, to / f"{folder.name}.metrics.jsonl")


def _run_and_kill(command: list[str], folder: Path) -> int:
    """Starts a run and kills it with SIGKILL a little after its first checkpoint; returns the tokens it had logged."""
    process = subprocess.Popen(command)
    latest = folder / "checkpoints" / "latest"
    while process.poll() is None and not latest.exists():
        time.sleep(0.2)
    time.sleep(3)
    if process.poll() is None:
        process.send_signal(signal.SIGKILL)
    process.wait()
    records = [r for r in read_metrics(folder / FILE_NAME) if r["kind"] == "train"]
    print(
        f"\nkilled at {records[-1]['tokens']:,} tokens; checkpoint {latest.read_text().strip()}; starting again\n",
        flush=True,
    )
    # What the killed process had logged, to be compared with what the resumed one logs for the same steps.
    shutil.copy(folder / FILE_NAME, folder.parent / f"{folder.name}.before_kill.jsonl")
    return records[-1]["tokens"]


def _summary(folder: Path) -> dict:
    """What a finished run measured, by stage."""
    records = read_metrics(folder / FILE_NAME)
    run = next(r for r in records if r["kind"] == "run")
    stages = {}
    for stage in (r for r in records if r["kind"] == "stage"):
        train = [r for r in records if r["kind"] == "train" and r["stage"] == stage["stage"]]
        steady = train[SKIP_INTERVALS:] or train
        evaluations = [r for r in records if r["kind"] == "eval" and r["stage"] == stage["stage"]]
        stages[stage["stage"]] = {
            "attention": stage["attention"],
            "seq_len": stage["seq_len"],
            "steps": len(train),
            **speeds(steady),
            "loss_first": train[0]["loss"],
            "loss_last": statistics.fmean(r["loss"] for r in train[-10:]),
            "held_out": evaluations[-1]["loss"] if evaluations else None,
            "held_out_trailing": evaluations[-1]["trailing_loss"] if evaluations else None,
            "skipped_steps": train[-1]["skipped_steps"],
        }
    return {
        "device": run["device"],
        "convention": run["convention"],
        "stages": stages,
        "resumed": _resumed(folder, records),
    }


def _resumed(folder: Path, records: list[dict]) -> dict | None:
    """How the steps that were run twice, before the kill and after it, compare."""
    before = folder.parent / f"{folder.name}.before_kill.jsonl"
    if not before.exists():
        return None
    after = {r["tokens"]: r["loss"] for r in records if r["kind"] == "train"}
    starts = [r["tokens"] for r in records if r["kind"] == "run"]
    pairs = [
        (r["loss"], after[r["tokens"]])
        for r in read_metrics(before)
        if r["kind"] == "train" and r["tokens"] > starts[-1] and r["tokens"] in after
    ]
    return {
        "continued_from_tokens": starts[-1],
        "steps_run_twice": len(pairs),
        "largest_loss_difference": max((abs(a - b) for a, b in pairs), default=None),
    }


def _table(results: dict) -> None:
    """Prints the results."""
    first = next(iter(results["runs"].values()))
    print(f"\n{first['device']}, commit {results['commit']}\n{first['convention']}\n")
    columns = (
        "tokens_per_second",
        "tflops",
        "mfu",
        "mfu_dense_equivalent",
        "peak_memory_gib",
        "loss_last",
        "held_out_trailing",
    )
    print("| run, stage | attention | steps | " + " | ".join(columns) + " |\n|" + "---|" * (3 + len(columns)))
    for name, run in results["runs"].items():
        for stage, row in run["stages"].items():
            cells = ["-" if row[c] is None else f"{row[c]:,.0f}" if row[c] > 1000 else f"{row[c]:.3g}" for c in columns]
            print(f"| {name}, {stage} | {row['attention']} | {row['steps']} | " + " | ".join(cells) + " |")
        if run["resumed"]:
            print(f"\nresumed after SIGKILL: {run['resumed']}\n")


if __name__ == "__main__":
    main()
