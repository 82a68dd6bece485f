"""The MoBA paper's pretraining figures in small: models of 12M parameters from nothing at 8K, 64 blocks of 128.

    python benchmarks/small.py to=results/small data=shards/train validation=shards/validation jobs=10 minutes=9
    python benchmarks/small.py to=results/small collect=true

Small models leave a GPU idle between their launches, so `jobs` runs at a time share it. Without `tokens` all arms are
first trained for a few steps beside each other, which also fills the compiler's cache, and the budget is what fits
`minutes`. When these are over, what still runs is stopped; what has been evaluated by then is kept: each run's losses
by position at every tenth of its tokens, and what is asked of its weights in the end. `collect` makes results.json,
table.md and the figures from these alone. `data` and `validation` may be `embedded`, the shipped books.

Arms have two stages, 90 and 10 % of the tokens, and a learning rate that is constant in the first and falls in the
second. `moba, then full` goes on with the weights, moments and data of `moba` at the end of its first stage.
"""

from __future__ import annotations

import os
import shlex
import shutil
import signal
import subprocess
import sys
import tarfile
import threading
import time
from collections.abc import Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))

from benchmarks.common import split, steps_logged, train_lines  # noqa: E402
from benchmarks.small_results import collect  # noqa: E402
from conf.numbers import parse_tokens  # noqa: E402
from launch.cli import UsageError, exits_on, key_values  # noqa: E402
from train.checkpoint.checkpoint_dir import checkpoints  # noqa: E402

KEYS = {
    "to": "folder of the results",
    "work": "folder of the runs (default: runs/ in it)",
    "data": "training documents: shards of launch/prepare_data.py, text, or embedded (default)",
    "validation": "held-out documents, likewise",
    "documents": "of them, at most (default 124)",
    "arms": "which, separated by ';' (default: the smallest set)",
    "seeds": "comma-separated, of the arms that are not named otherwise by <arm>@<seed> (default 0,1)",
    "tokens": "of a run (default: what fits)",
    "jobs": "runs at a time (default 10)",
    "minutes": "after which everything is stopped (default 9)",
    "collect": "true: only makes the results of what is there",
    "cluster": "regular expression; held-out ids with the same match are one cluster (default: up to the first ':')",
    "commit": "commit of the code, where this is no git checkout",
}
BATCH, MOST_SEEDS, CLUSTER = 32 * 1024, 10, "[^:]*"
COMMON = (
    "model=tiny model.num_layers=6 model.hidden_size=384 model.num_heads=6 model.num_kv_heads=6 model.ffn_size=1024 "
    "model.qk_norm=true model.rope_theta=200000 model.key_conv=3 model.activation_checkpointing=false "
    "data.tokenizer=bpe-4k schedule=custom +schedule.stages.first.tokens=90% +schedule.stages.last.tokens=10% "
    "schedule.seq_len=8K schedule.batch_tokens=32K schedule.micro_tokens=32K schedule.block_size=128 schedule.top_k=8 "
    "optim.lr.kind=wsd optim.lr.decay_tokens=10% optim.lr.peak=2e-3 optim.lr.warmup_tokens=3% eval.suite=loss "
    "eval.every_tokens=10% checkpoint.every_tokens=0 logging.wandb=disabled logging.figures=false "
    "logging.progress=false logging.every_tokens=327680"
)
ROUTER = (
    "sweep block_sizes={block} top_k={top} gates=[mean,local,random,oracle] first_blocks={first} documents=44",
    "routing documents=22",
)
CALIBRATION_STEPS, SKIPPED_STEPS = 60, 20
SAFETY = 0.75
"""Of the speed, for the evaluations during training and what is not known."""
START_SECONDS, END_SECONDS = 30, 85
"""What runs need before their first step, and what is done after their last: the stage of full attention and the
evaluations."""


def stages(text: str) -> str:
    """Overrides of the attention of both stages."""
    return " ".join(f"schedule.stages.{name}.attention.{word}" for word in text.split() for name in ("first", "last"))


def sizes(layers: int, hidden: int) -> str:
    """Overrides of another size of model, of heads of 64."""
    heads = f"model.num_heads={hidden // 64} model.num_kv_heads={hidden // 64}"
    return f"model.num_layers={layers} model.hidden_size={hidden} {heads} model.ffn_size={hidden * 8 // 3}"


@dataclass(frozen=True)
class Arm:
    """One of the things that are compared."""

    train: str = ""
    """Overrides besides COMMON."""
    branch: str | None = None
    """The arm whose run, of the same seed, it goes on with from the end of the first stage."""
    block: int = 128
    top: int = 8
    first: int = 0
    routed: bool = True
    """Whether its router is measured in the end."""
    share: float = 1.0
    """Of the tokens."""
    cost: float = 1.0
    """Time of a token, relative to the others'; a guess."""

    @property
    def evals(self) -> list[list[str]]:
        """Arguments of launch/evaluate.py."""
        filled = {"block": self.block, "top": self.top, "first": self.first}
        return [shlex.split(line.format(**filled)) for line in ROUTER] if self.routed else []


def moba(block: int, top: int, first: int = 0, more: str = "", **options) -> Arm:
    """MoBA in both stages."""
    text = f"{stages(f'block_size={block} top_k={top} first_blocks={first}')} {more}".strip()
    return Arm(text, block=block, top=top, first=first, **options)


FULL = stages("kind=full")
PLAIN = "model.key_conv=0"
SMALLER = {"1.3M": (3, 192, 0.25, 0.25), "3.1M": (4, 256, 0.5, 0.45)}
"""Size -> layers, width, share of the tokens, cost."""
ARMS: dict[str, Arm] = {
    "full": Arm(FULL, routed=False),
    "moba": moba(128, 8),
    "moba, then full": Arm("schedule.stages.last.attention.kind=full", branch="moba", routed=False, share=0.1),
    "moba, first block": moba(128, 8, 1),
    "1024x2": moba(1024, 2),
    "512x4": moba(512, 4),
    "256x8": moba(256, 8),
    "128x16": moba(128, 16),
    "64x32": moba(64, 32),
    "full, no key convolution": Arm(f"{FULL} {PLAIN}", routed=False),
    "moba, no key convolution": moba(128, 8, more=PLAIN),
    "random": Arm(stages("gate=random")),
    "latest": Arm(stages("gate=local")),
    **{f"last {n} full": Arm(stages(f"full_last={n}"), routed=False) for n in (1, 2, 3)},
    **{
        f"{name}, {size}": Arm(f"{text} {sizes(layers, hidden)}", routed=False, share=share, cost=cost)
        for size, (layers, hidden, share, cost) in SMALLER.items()
        for name, text in (("full", FULL), ("moba", ""))
    },
}
SMALLEST = (
    "full;moba;moba, then full;moba, first block;1024x2@0;64x32@0;full, no key convolution@0;moba, no key convolution@0"
)
Task = tuple[str, int]
"""(arm, seed)"""


@exits_on(ValueError, OSError)
def main() -> None:
    """The command; see the module's text."""
    overrides, own = split(sys.argv[1:], KEYS)
    values = key_values(own, KEYS, about=__doc__, required=["to"])
    to = Path(values["to"])
    work = Path(values.get("work", to / "runs"))
    if values.get("collect") != "true":
        study = Study(values, overrides, work)
        study.run()
        keep(work, to / "kept.tar.gz")
    names = {(arm, seed): name_of((arm, seed)) for arm in ARMS for seed in range(MOST_SEEDS)}
    print(collect(work, to, sys.argv[1:], values.get("commit"), values.get("cluster", CLUSTER), names))


class Study:
    """Processes that are started, waited for, and stopped when time is up."""

    def __init__(self, values: Mapping[str, str], overrides: Sequence[str], work: Path):
        """ValueError for arms that there are not."""
        self.values, self.overrides, self.work = values, list(overrides), work
        self.end = time.monotonic() + 60 * float(values.get("minutes", 9))
        self.tasks = tasks_of(values.get("arms", SMALLEST), values.get("seeds", "0,1"))
        self.jobs = int(values.get("jobs", 10))
        self.trained = {task: threading.Event() for task in self.tasks}
        self._running: set[subprocess.Popen] = set()
        self._lock = threading.Lock()
        self._stopped = False

    def run(self) -> None:
        """Trains and evaluates what there is time for."""
        self.work.mkdir(parents=True, exist_ok=True)
        timer = threading.Timer(self.end - time.monotonic(), self.stop)
        timer.daemon = True
        timer.start()
        try:
            tokens = parse_tokens(self.values["tokens"]) if "tokens" in self.values else self.calibrated()
            say(f"{tokens:,} tokens a run")
            with ThreadPoolExecutor(max(self.jobs, len(self.tasks))) as pool:
                slots = threading.Semaphore(self.jobs)
                list(pool.map(lambda task: self.one(task, tokens, slots), self.tasks))
        finally:
            timer.cancel()
            self.stop()

    def calibrated(self) -> int:
        """Tokens that each run can have, from the speed of all beside each other."""
        folder = self.work.with_name("calibration")
        tasks = [task for task in self.tasks if ARMS[task[0]].branch is None]
        began = time.monotonic()
        with ThreadPoolExecutor(self.jobs) as pool:
            list(pool.map(lambda task: self.calibration(folder, task), tasks))
        rates = []
        for task in tasks:
            lines = [line for line in train_lines(folder / name_of(task)) if line["step"] > SKIPPED_STEPS]
            rates += [line["tokens_per_second"] for line in lines[-1:]]
        if not rates:
            raise ValueError(f"no run of the calibration came to its end; see {folder}/*.log")
        rate = sum(rates) / len(rates) * min(self.jobs, len(tasks))
        work = sum(ARMS[name].share * ARMS[name].cost for name, _ in self.tasks)
        left = self.end - time.monotonic() - START_SECONDS - END_SECONDS
        say(
            f"calibration: {time.monotonic() - began:.0f} s; {rate:,.0f} tokens/s of {len(rates)} runs together, "
            f"{min(rates):,.0f} to {max(rates):,.0f} each; {left:.0f} s left for {work:.1f} runs"
        )
        return max(10 * BATCH, int(SAFETY * rate * left / work) // (10 * BATCH) * 10 * BATCH)

    def calibration(self, folder: Path, task: Task) -> None:
        """A few steps of a task, without evaluations."""
        few = [
            f"schedule.tokens={CALIBRATION_STEPS * BATCH}",
            "data.validation=null",
            f"logging.every_tokens={20 * BATCH}",
        ]
        self.process("train.py", [*self.training(task, folder), *few], folder / name_of(task))

    def one(self, task: Task, tokens: int, slots: threading.Semaphore) -> None:
        """Trains and evaluates a task; what goes wrong is said, and the others go on."""
        arm, folder = ARMS[task[0]], self.work / name_of(task)
        try:
            if arm.branch is not None:
                base = (arm.branch, task[1])
                if base in self.trained:
                    self.trained[base].wait()
                branch_off(self.work / name_of(base), folder)
            with slots:
                own = tokens if arm.branch else max(1, round(tokens * arm.share / BATCH / 10)) * 10 * BATCH
                documents = f"eval.documents={self.values.get('documents', 124)}"
                words = [*self.training(task, self.work), f"schedule.tokens={own}", documents]
                done = self.process("train.py", [*words, f"run.allow_changes={str(bool(arm.branch)).lower()}"], folder)
                self.trained[task].set()
                for what, *more in arm.evals if done else ():
                    to = folder / "evals" / what
                    if not list(to.glob("*.json")):
                        words = [
                            f"run={folder}",
                            f"evals=[{what}]",
                            f"to={to}",
                            f"cluster={self.values.get('cluster', CLUSTER)}",
                            *more,
                        ]
                        self.process("evaluate.py", words, folder)
        except (OSError, ValueError) as error:
            say(f"{name_of(task)}: {error}")
        finally:
            self.trained[task].set()

    def training(self, task: Task, work: Path) -> list[str]:
        """The overrides of a run."""
        data, held_out = (self.values.get(key, "embedded") for key in ("data", "validation"))
        words = [*shlex.split(f"{COMMON} {ARMS[task[0]].train}"), "data=files", f"data.path={data}"]
        words += [f"data.validation.path={held_out}", *self.overrides]
        return [*words, f"run.dir={work / name_of(task)}", f"run.seed={task[1]}"]

    def process(self, script: str, words: Sequence[str], folder: Path) -> bool:
        """Whether a script of launch/ came to its end; its words are in <folder>.log."""
        log = folder.with_name(f"{folder.name}.log")
        log.parent.mkdir(parents=True, exist_ok=True)
        environment = os.environ | {"OMP_NUM_THREADS": "1", "TORCHINDUCTOR_COMPILE_THREADS": "1"}
        began = time.monotonic()
        with log.open("ab") as file, self._lock:
            if self._stopped:
                return False
            command = [sys.executable, str(ROOT / "launch" / script), *words]
            process = subprocess.Popen(command, stdout=file, stderr=file, env=environment)
            self._running.add(process)
        code = process.wait()
        with self._lock:
            self._running.discard(process)
        tail = "" if code == 0 else "\n   ".join(["", *log.read_text(errors="replace").splitlines()[-4:]])
        say(f"{folder.name}: {script} {code}, {time.monotonic() - began:.0f} s, {steps_logged(folder)} lines{tail}")
        return code == 0

    def stop(self) -> None:
        """Ends what runs, and lets nothing else begin."""
        with self._lock:
            self._stopped, running = True, list(self._running)
        for process in running:
            process.send_signal(signal.SIGTERM)
        until = time.monotonic() + 8
        while time.monotonic() < until and any(process.poll() is None for process in running):
            time.sleep(0.1)
        for process in running:
            if process.poll() is None:
                process.kill()


STARTED = time.monotonic()


def say(text: str) -> None:
    """With the time since the start."""
    print(f"[{time.monotonic() - STARTED:5.0f} s] {text}", flush=True)


def tasks_of(arms: str, seeds: str) -> list[Task]:
    """What `arms` and `seeds` name, each seed's in their order; ValueError for others."""
    own, found = [int(seed) for seed in seeds.split(",")], []
    for text in arms.split(";"):
        name, at, seed = text.partition("@")
        if name not in ARMS:
            raise UsageError(f"arms={name}: there are {'; '.join(ARMS)}")
        found += [(name, one) for one in ([int(seed)] if at else own)]
    return sorted(found, key=lambda task: (ARMS[task[0]].branch is not None, task[1]))


def name_of(task: Task) -> str:
    """Of a run's folder."""
    return f"{task[0].replace(', ', '-').replace(' ', '_')}_seed{task[1]}"


def branch_off(base: Path, folder: Path) -> None:
    """Makes a run of what another one had at the end of its first stage. ValueError where it did not come so far."""
    if folder.exists():
        return
    ends = checkpoints(base)
    if len(ends) < 2:
        raise ValueError(f"{base.name} did not come to its end")
    shutil.copytree(ends[0], folder / "checkpoints" / ends[0].name)
    for name in ("metrics.jsonl", "position_loss"):
        (shutil.copytree if (base / name).is_dir() else shutil.copy2)(base / name, folder / name)


def keep(work: Path, path: Path) -> None:
    """Everything but weights and figures in one file."""
    with tarfile.open(path, "w:gz") as tar:
        for file in sorted(work.rglob("*")):
            if file.is_file() and "checkpoints" not in file.parts and file.suffix != ".png":
                tar.add(file, file.relative_to(work))


if __name__ == "__main__":
    main()
