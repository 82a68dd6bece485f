"""How long steps take around a checkpoint: written while training goes on, from memory that is kept or from fresh
memory, and with training waiting for it.

    python benchmarks/save_steps.py [to=benchmarks/results/save_steps] [runs=runs/save_steps] [arms=kept,fresh,waits]
        [steps=5] [seconds=150] [commit=LABEL]

One process trains on, with the steps and saves of launch/train.py; each arm is some steps, a save, and steps until it
is written. After `seconds` no further arm begins. Arguments with a dot, and groups such as model=tiny, are overrides.
Some two minutes on one H100; with model=tiny and short sequences it can be tried on a CPU.
"""

from __future__ import annotations

import shutil
import statistics
import sys
import time
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
sys.path[:] = [str(ROOT)] + [p for p in sys.path if Path(p or ".").resolve() != ROOT / "benchmarks"]

from benchmarks.profiled_train import build_trainer  # noqa: E402 - first: decides what torch reads

# isort: split
import torch  # noqa: E402

from benchmarks.common import cell, device_name, markdown, origin, split, whole_numbers, write  # noqa: E402
from conf.build import ConfigError  # noqa: E402
from conf.numbers import format_length  # noqa: E402
from launch.cli import UsageError, exits_on, key_values  # noqa: E402
from train.checkpoint import store  # noqa: E402
from train.engine.world import leave, shutdown  # noqa: E402
from train.loop import Trainer  # noqa: E402
from train.step import train_step  # noqa: E402

ARMS = {
    "kept": "in the background, from memory kept between saves (pinned for a GPU)",
    "fresh": "in the background, from fresh memory",
    "waits": "checkpoint.asynchronous=false",
}
WARMUP = 3  # steps
SHAPE = ["+exp=moba_32k", "model=paper_545m", "schedule=moba_only", "schedule.seq_len=32K", "schedule.batch_tokens=64K",
         "data.validation=null", "checkpoint.keep=1", "schedule.tokens=1B"]  # fmt: skip
KEYS = {
    "to": "folder of the results",
    "runs": "folder of the run, emptied first",
    "arms": "which, in order, comma-separated",
    "steps": "steps before a save, and after it is written",
    "seconds": "no arm begins after so many",
    "commit": "label of the code",
}
CONVENTION = (
    "Milliseconds of a step, from an idle device to an idle device. before: median of the steps ahead of the save; "
    "next: the save and the step behind it; writing: median of those while it is written, with their number; after: "
    "median of the later ones. Seconds for which the host stood still for the save, and that its writing took."
)


def step(trainer: Trainer) -> float:
    """Milliseconds of one step of training."""
    began, stage = time.perf_counter(), trainer.stage
    assert stage is not None
    batches = trainer.loader.next_step()
    result = train_step(trainer.engine, batches, lr=1e-5, world=trainer.world, on_losses=trainer._count)
    trainer._after_step(stage, batches, result)
    trainer._log(stage)
    trainer._settle()  # waits for the device
    return 1000 * (time.perf_counter() - began)


def measure(trainer: Trainer, arm: str, steps: int, buffer: store.HostBuffer) -> dict:
    """The steps around one save."""
    assert trainer.stage is not None
    before = [step(trainer) for _ in range(steps)]
    trainer._host_buffer = buffer if arm == "kept" else None
    began = time.perf_counter()
    trainer._save(trainer.stage, ends=False, watched=False, at_once=arm == "waits")
    waited = time.perf_counter() - began
    following, writing = 1000 * waited + step(trainer), []
    while trainer._saving is not None and not trainer._saving.poll():
        writing.append(step(trainer))
    trainer._finish_save()
    written = trainer._save_write or waited
    after = [step(trainer) for _ in range(steps)]
    return {
        "steps": {"before": before, "next": following, "writing": writing, "after": after},
        "before": statistics.median(before),
        "next": following,
        "writing": statistics.median(writing) if writing else None,
        "after": statistics.median(after),
        "waited": waited,
        "written": written,
    }


@exits_on(ConfigError, ValueError, OSError)
def main() -> None:
    """The command; see the module's text."""
    began = time.monotonic()
    overrides, own = split(sys.argv[1:])
    given = key_values(own, KEYS, about=__doc__)
    arms = given.get("arms", ",".join(ARMS)).split(",")
    if unknown := sorted({*arms} - {*ARMS}):
        raise UsageError(f"arms={given['arms']}: {unknown[0]!r} is none of {', '.join(ARMS)}")
    (steps,), (limit,) = (whole_numbers(given, key, least) for key, least in (("steps", "5"), ("seconds", "150")))
    to = Path(given.get("to", ROOT / "benchmarks" / "results" / "save_steps"))
    runs = Path(given.get("runs", "runs/save_steps"))
    shutil.rmtree(runs, ignore_errors=True)
    trainer = build_trainer([*SHAPE, f"data.cache_dir={runs}/cache", f"run.dir={runs}/run", *overrides])
    stage = trainer._enter(trainer.schedule.lookup(0))
    memory_began = time.perf_counter()
    buffer = store.host_buffer(trainer.engine, trainer.world.device, print)
    for _ in range(WARMUP):
        step(trainer)
    buffer.rewind()
    memory = time.perf_counter() - memory_began

    record = {**origin(sys.argv[1:], given.get("commit")), "device": device_name(), "torch": torch.__version__}
    record |= {"convention": CONVENTION, "warmup_seconds": memory, "arms": {}}
    text = "nothing was measured"
    for number, arm in enumerate(arms):
        if time.monotonic() - began > limit:
            print(f"{limit} s are over: {', '.join(arms[number:])} not measured", flush=True)
            break
        record["arms"][f"{number + 1} {arm}"] = measure(trainer, arm, steps, buffer)
        newest = trainer.last_checkpoint
        assert newest is not None
        record["gigabytes"] = sum(path.stat().st_size for path in newest.iterdir()) / 1e9
        text = publish(record, format_length(stage.batch_tokens), to)
        print(f"{arm}: {time.monotonic() - began:.0f} s since the start", flush=True)
    print(text)
    shutil.rmtree(runs / "run" / "checkpoints")
    shutdown()
    leave(0)


def publish(record: dict, batch: str, to: Path) -> str:
    """Writes what was measured so far; returns its table."""
    head = [f"{record['device']}, torch {record['torch']}, commit {record['commit']}", "", f"`{record['command']}`", ""]
    head += [f"A checkpoint of {record['gigabytes']:.2f} GB, steps of {batch} tokens. {record['convention']}", ""]
    heads = ("save", "before ms", "next ms", "writing ms", "after ms", "waited s", "written s")
    rows = []
    for name, own in record["arms"].items():
        writing = f"{cell(own['writing'], '{:.0f}')} ({len(own['steps']['writing'])})"
        times = [f"{own[key]:.0f}" for key in ("before", "next", "after")]
        rows.append([name, *times[:2], writing, times[2], f"{own['waited']:.2f}", f"{own['written']:.2f}"])
    kinds = [f"- {arm}: {text}" for arm, text in ARMS.items()]
    return write(record, [*head, *markdown(heads, rows), "", *kinds], to)


if __name__ == "__main__":
    main()
