"""How long steps take around a checkpoint: written while the training goes on, and with training waiting for it.

    python benchmarks/save_steps.py [to=benchmarks/results/save_steps] [runs=runs/save_steps] [commit=LABEL]

Two runs of launch/train.py, which differ in checkpoint.asynchronous alone: STEPS steps with a save behind the one in
the middle (and one at the end, which every run waits for). Arguments with a dot, and groups such as model=tiny, go to
both as overrides. Under two minutes on one H100.
"""

from __future__ import annotations

import shutil
import statistics
import sys
from itertools import pairwise
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))

import torch  # noqa: E402

from benchmarks.common import markdown, origin, split, train, write  # noqa: E402
from conf.numbers import format_length  # noqa: E402
from launch.cli import exits_on, key_values  # noqa: E402
from launch.config import load  # noqa: E402
from train.checkpoint import store  # noqa: E402
from train.record.metrics import FILE_NAME, read_metrics  # noqa: E402

STEPS, WARMUP = 12, 2
ARMS = {"asynchronous": "true", "synchronous": "false"}
SHAPE = ["+exp=moba_32k", "model=paper_545m", "schedule=moba_only", "schedule.seq_len=32K", "schedule.batch_tokens=64K",
         "eval.every_tokens=0", "eval.documents=1", "logging=quiet"]  # fmt: skip
KEYS = {"to": "folder of the results", "runs": "folder of the runs, emptied first", "commit": "label of the code"}
CONVENTION = (
    "Milliseconds from the log line of a step to that of the next, with all that happens between them. before: median "
    f"of steps {WARMUP + 1} to {STEPS // 2}; next: the step behind the save, with the save; after: median of the later "
    "ones. Seconds for which training stood still for this save, and which its writing took."
)


def measure(folder: Path, overrides: list[str]) -> dict:
    """What one run's lines say of its steps around the save behind step STEPS // 2."""
    run = train(folder, overrides, seed=0)
    records = read_metrics(run / FILE_NAME)
    lines = [r for r in records if r["kind"] == "train"]
    ms = [round(1000 * (b["wall_seconds"] - a["wall_seconds"])) for a, b in pairwise(lines)]  # of step 2 on
    middle = STEPS // 2
    size = sum(path.stat().st_size for path in store.newest(run).rglob("*") if path.is_file())
    shutil.rmtree(run / "checkpoints")
    return {
        "device": next(r for r in records if r["kind"] == "run")["device"],
        "gigabytes": size / 1e9,
        "milliseconds_of_steps_2_on": ms,
        "before": statistics.median(ms[WARMUP - 1 : middle - 1]),
        "next": ms[middle - 1],
        "after": statistics.median(ms[middle:]),
        "waited": sum(r["save_wait_seconds"] for r in lines),
        "written": sum(r["save_write_seconds"] for r in lines),
    }


@exits_on(ValueError, OSError)
def main() -> None:
    overrides, own = split(sys.argv[1:])
    given = key_values(own, KEYS, about=__doc__)
    to = Path(given.get("to", ROOT / "benchmarks" / "results" / "save_steps"))
    runs = Path(given.get("runs", "runs/save_steps"))
    shutil.rmtree(runs, ignore_errors=True)
    shape = [*SHAPE, f"data.cache_dir={runs}/cache", *overrides]
    batch = next(iter(load(shape).schedule.stages.values())).batch_tokens
    shape += [f"schedule.tokens={STEPS * batch}", f"checkpoint.every_tokens={STEPS // 2 * batch}"]
    arms = {arm: measure(runs / arm, [*shape, f"checkpoint.asynchronous={word}"]) for arm, word in ARMS.items()}

    record = {**origin(sys.argv[1:], given.get("commit")), "torch": torch.__version__, "convention": CONVENTION, **arms}
    device, size = (arms["asynchronous"][key] for key in ("device", "gigabytes"))
    head = [f"{device}, torch {torch.__version__}, commit {record['commit']}", "", f"`{record['command']}`", ""]
    head += [f"A checkpoint of {size:.2f} GB, steps of {format_length(batch)} tokens. {CONVENTION}", ""]
    forms = {"before": "{:.0f}", "next": "{}", "after": "{:.0f}", "waited": "{:.2f}", "written": "{:.2f}"}
    rows = [[arm, *(form.format(own[key]) for key, form in forms.items())] for arm, own in arms.items()]
    heads = ("save", "before ms", "next ms", "after ms", "waited s", "written s")
    print(write(record, [*head, *markdown(heads, rows)], to))


if __name__ == "__main__":
    main()
