"""The MoBA paper's pretraining figures in small: models of 12M parameters from nothing, 8K, 64 blocks of 128.

    python benchmarks/small.py to=results/small data=shards/train validation=shards/validation jobs=10 minutes=9
    python benchmarks/small.py to=results/small collect=true

Every run has three stages. The first, at 1K tokens, is the same for all arms of a seed and a model and is trained once
(`start`): 128x8 attends to everything there, and a model that has not learned to copy from its context has no use for
8K. The arms go on from its end, weights, moments and data, at 8K; `moba, then full` goes on from the end of `moba`'s
second stage. The learning rate falls in the last stage, a tenth of the tokens at 8K. `sft, n full` fine-tunes the
weights of `moba, first block` on the shipped conversations with full attention in the last n layers.

Small models leave a GPU idle between their launches, so `jobs` runs at a time share it. After `minutes` what still runs
is stopped, and what has been evaluated by then is kept: losses by position at every fifth of the tokens at 8K, and what
is asked of the weights in the end. `collect` makes results.json, table.md and the figures of these alone. `data` and
`validation` may be `embedded`, the shipped books.
"""

from __future__ import annotations

import json
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
from contextlib import suppress
from dataclasses import dataclass, replace
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))

import numpy as np  # noqa: E402

from benchmarks.common import split, steps_logged, whole_numbers  # noqa: E402
from benchmarks.small_results import collect  # noqa: E402
from conf.numbers import parse_tokens  # noqa: E402
from data.shards import META, TokenShards, write_meta, write_shard  # noqa: E402
from data.sources import open_sources, open_validation  # noqa: E402
from data.tokenizer import load_tokenizer  # noqa: E402
from launch.cli import UsageError, exits_on, key_values  # noqa: E402
from launch.config import load  # noqa: E402
from train.checkpoint.checkpoint_dir import checkpoints  # noqa: E402
from train.record.metrics import FILE_NAME  # noqa: E402

KEYS = {
    "to": "folder of the results",
    "runs": "folder of the runs (default: runs/ in it)",
    "data": "training documents: shards of launch/prepare_data.py, text, or embedded (default)",
    "validation": "held-out documents, likewise",
    "documents": "of them, at most (default 124)",
    "arms": "which, separated by ';', with what they go on from (default: the smallest set)",
    "seeds": "comma-separated, of the arms that are not named otherwise by <arm>@<seed> (default 0,1)",
    "tokens": "of an arm at 8K (default 29.4912M: 900 steps)",
    "start_tokens": "at 1K before (default 32.768M: 2,000 steps)",
    "sft_tokens": "of fine-tuning (default 7.8M: 240 steps)",
    "jobs": "runs at a time (default 10)",
    "minutes": "after which everything is stopped (default 9)",
    "collect": "true: only makes the results of what is there",
    "cluster": "regular expression; held-out ids with the same match are one cluster (default: up to the first ':')",
    "commit": "commit of the code, where this is no git checkout",
}
LENGTH, BATCH, START_BATCH, MOST_SEEDS, CLUSTER = 8192, 32 * 1024, 16 * 1024, 10, "[^:]*"
COMMON = (
    "model=tiny model.num_layers=6 model.hidden_size=384 model.num_heads=6 model.num_kv_heads=6 model.ffn_size=1024 "
    "model.qk_norm=true model.rope_theta=200000 model.key_conv=3 model.activation_checkpointing=false "
    "data.tokenizer=bpe-4k data.interleave=64 schedule=custom schedule.block_size=128 schedule.top_k=8 "
    "optim.lr.peak=2e-3 optim.lr.warmup_tokens=1M eval.suite=loss checkpoint.every_tokens=0 logging.wandb=disabled "
    "logging.figures=false logging.progress=false logging.every_tokens=327680 "
    "+schedule.stages.short.tokens={start} schedule.stages.short.seq_len=1K schedule.stages.short.batch_tokens=16K "
    "schedule.stages.short.micro_tokens=16K schedule.stages.short.attention.kind=full"
)
AT_8K = (
    "+schedule.stages.first.tokens={first} +schedule.stages.last.tokens={last} schedule.seq_len=8K "
    "schedule.batch_tokens=32K schedule.micro_tokens=32K optim.lr.kind=wsd optim.lr.decay_tokens={last} "
    "eval.every_tokens={fifth}"
)
FIRST_STAGE = "optim.lr.kind=constant eval.every_tokens=0"
SFT = (
    "model=from_source init.source={base} data=sft data.path=embedded-chat:8K data.chat_template=plain "
    "data.tokenizer=bpe-4k 'data.validation={{path: embedded-chat:8K, format: chat}}' data.cache_dir={cache} "
    "schedule=moba_only schedule.tokens={sft} schedule.seq_len=8K schedule.batch_tokens=32K schedule.micro_tokens=32K "
    "schedule.block_size=128 schedule.top_k=8 schedule.stages.sparse.attention.first_blocks=1 optim.lr.peak=1e-3 "
    "optim.lr.warmup_tokens=10% eval.documents=128 eval.suite=loss eval.every_tokens=50% checkpoint.every_tokens=0 "
    "logging.wandb=disabled logging.figures=false logging.progress=false logging.every_tokens=327680"
)
MOST, LAST = 124, 512
CUTS = {"cut_1K": 1024, "cut_2K": 2048, "cut_4K": 4096}
"""The last LAST tokens of each held-out document are also evaluated with so many before them in place of all."""
EVALS = {
    **{name: f"position_loss data={{cuts}}/{name} seq_len={n + LAST} bucket={LAST}" for name, n in CUTS.items()},
    "sweep": "sweep block_sizes={block} top_k={top} gates=[mean,local,random,oracle] first_blocks={first}",
    "routing": "routing",
}
"""What is asked of the weights in the end."""
FEWER = {"sweep": 44, "routing": 22}
"""Documents at most, where not all are asked."""


def stages(text: str) -> str:
    """Overrides of the attention of both stages at 8K."""
    return " ".join(f"schedule.stages.{name}.attention.{word}" for word in text.split() for name in ("first", "last"))


def sizes(layers: int, heads: int, rate: str) -> str:
    """Overrides of another size of model, of heads of 64."""
    sizes = f"model.num_layers={layers} model.hidden_size={64 * heads} model.ffn_size={64 * heads * 8 // 3 // 32 * 32}"
    return f"{sizes} model.num_heads={heads} model.num_kv_heads={heads} optim.lr.peak={rate}"


START = "start"
MODELS = {
    "": ("", 1.0),
    ", no key convolution": ("model.key_conv=0", 1.0),
    ", 6.1M": (sizes(5, 5, "2.4e-3"), 0.575),
    ", 16.9M": (sizes(7, 7, "1.7e-3"), 1.59),
}
"""End of an arm's name -> (overrides of its model, its tokens relative to the others'): parameters without embeddings,
beside 10.6M, tokens in proportion."""


@dataclass(frozen=True)
class Arm:
    """One of the things that are compared."""

    train: str = ""
    """Overrides besides those of all."""
    branch: str | None = None
    """The arm whose run, of the same seed, it goes on with where the stages part."""
    block: int = 128
    top: int = 8
    first: int = 0
    evals: tuple[str, ...] = ("cut_1K",)
    """Of EVALS."""
    tunes: bool = False
    """It fine-tunes the weights of `branch`."""


def moba(block: int, top: int, first: int = 0) -> Arm:
    """MoBA in both stages."""
    text = stages(f"block_size={block} top_k={top} first_blocks={first}")
    return Arm(text, START, block=block, top=top, first=first, evals=("cut_1K", "sweep", "routing"))


BASE = "moba, first block"
SWEPT = ("cut_1K", "sweep")
FULL = Arm(stages("kind=full"), START, evals=(*CUTS, "sweep"))
ARMS: dict[str, Arm] = {
    **{f"{START}{model}": Arm(evals=()) for model in MODELS},
    **{f"full{model}": replace(FULL, branch=f"{START}{model}", evals=()) for model in MODELS},
    **{f"moba{model}": replace(moba(128, 8), branch=f"{START}{model}", evals=()) for model in MODELS},
    "full": FULL,
    "moba": replace(moba(128, 8), evals=tuple(EVALS)),
    "moba, then full": Arm("schedule.stages.last.attention.kind=full", "moba"),
    BASE: moba(128, 8, 1),
    **{f"{block}x{2048 // block}": moba(block, 2048 // block) for block in (1024, 512, 256, 128, 64)},
    "random": Arm(stages("gate=random"), START, evals=SWEPT),
    "latest": Arm(stages("gate=local"), START, evals=SWEPT),
    **{f"last {n} full": Arm(stages(f"full_last={n}"), START) for n in (1, 2, 3)},
    **{
        f"sft, {n} full": Arm(f"schedule.stages.sparse.attention.full_last={n}", BASE, evals=(), tunes=True)
        for n in range(7)
    },
}
SMALLEST = (
    "full;moba;moba, then full;moba, first block;random@0;latest@0;64x32@0;1024x2@0;"
    "sft, 0 full@0;sft, 6 full@0;sft, 1 full@0;sft, 2 full@0;sft, 3 full@0;sft, 4 full@0"
)
Task = tuple[str, int]
"""(arm, seed)"""


@exits_on(ValueError, OSError)
def main() -> None:
    """The command; see the module's text."""
    overrides, own = split(sys.argv[1:], KEYS)
    values = key_values(own, KEYS, about=__doc__, required=["to"])
    to = Path(values["to"])
    work = Path(values.get("runs", to / "runs"))
    to.mkdir(parents=True, exist_ok=True)
    if values.get("collect") != "true":
        Study(values, overrides, work, to / "kept.tar.gz").run()
    names = {(arm, seed): name_of((arm, seed)) for arm in ARMS for seed in range(MOST_SEEDS)}
    print(collect(work, to, sys.argv[1:], values.get("commit"), values.get("cluster", CLUSTER), names))


class Study:
    """Processes that are started, waited for, and stopped when time is up."""

    def __init__(self, values: Mapping[str, str], overrides: Sequence[str], work: Path, kept: Path):
        """`kept`: the file of what `keep` keeps, made anew after each task. ValueError for arms that there are not."""
        self.values, self.overrides, self.work, self.kept = values, list(overrides), work, kept
        self.end = time.monotonic() + 60 * float(values.get("minutes", 9))
        self.tasks = tasks_of(values.get("arms", SMALLEST), values.get("seeds", "0,1"))
        self.jobs = int(values.get("jobs", 10))
        self.tokens = [
            (parse_tokens(values.get(key, default)), least)
            for key, default, least in (
                ("start_tokens", "32.768M", START_BATCH),
                ("tokens", "29.4912M", 10 * BATCH),
                ("sft_tokens", "7.86432M", BATCH),
            )
        ]
        self.cut = False
        self.prepared = threading.Event()
        self.trained = {task: threading.Event() for task in self.tasks}
        self._running: set[subprocess.Popen] = set()
        self._lock, self._keeping = threading.Lock(), threading.Lock()
        self._stopped = False

    def run(self) -> None:
        """Trains and evaluates what there is time for."""
        self.work.mkdir(parents=True, exist_ok=True)
        for name, context in CUTS.items():
            self.cut = tails(Path(self.values.get("validation", "embedded")), self.work / "cuts" / name, context + LAST)
        timer = threading.Timer(self.end - time.monotonic(), self.stop)
        timer.daemon = True
        timer.start()
        try:
            with ThreadPoolExecutor(len(self.tasks) + 1) as pool:
                slots = threading.Semaphore(self.jobs)
                pool.submit(self.prepare)
                list(pool.map(lambda task: self.one(task, slots), self.tasks))
        finally:
            timer.cancel()
            self.stop()
            keep(self.work, self.kept)

    def one(self, task: Task, slots: threading.Semaphore) -> None:
        """Trains and evaluates a task; what goes wrong is said, and the others go on."""
        arm, folder = ARMS[task[0]], self.work / name_of(task)
        try:
            if arm.branch is not None:
                base = (arm.branch, task[1])
                self.trained[base].wait()
                if arm.tunes:
                    self.prepared.wait()
                    at_end(self.work / name_of(base), 3)
                else:
                    branch_off(self.work / name_of(base), folder, depth(task[0]))
            with slots:
                done = self.process("train.py", self.training(task), folder)
                self.trained[task].set()
                for what in arm.evals if done else ():
                    to = folder / "evals" / what
                    if not list(to.glob("*.json")) and (self.cut or what not in CUTS):
                        self.process("evaluate.py", [f"run={folder}", f"to={to}", *self.asked(arm, what)], folder)
        except (OSError, ValueError) as error:
            say(f"{name_of(task)}: {error}")
        finally:
            self.trained[task].set()
        with self._keeping:
            keep(self.work, self.kept)

    def asked(self, arm: Arm, what: str) -> list[str]:
        """Arguments of an evaluation."""
        filled = {"block": arm.block, "top": arm.top, "first": arm.first, "cuts": self.work / "cuts"}
        name, *words = shlex.split(EVALS[what].format(**filled))
        documents = min(FEWER.get(what, MOST), int(self.values.get("documents", MOST)))
        return [f"evals=[{name}]", *words, f"documents={documents}", f"cluster={self.values.get('cluster', CLUSTER)}"]

    def prepare(self) -> None:
        """Makes the conversations, once for all that are fine-tuned."""
        try:
            if any(ARMS[arm].tunes for arm, _ in self.tasks):
                words = f"{SFT} model=tiny init.source=null".format(base="null", cache=self.work / "cache", sft="1M")
                config = load([*shlex.split(words), *self.overrides]).data
                open_sources(config, log=say)
                open_validation(config, log=say)
        except (OSError, ValueError) as error:
            say(f"conversations: {error}")
        finally:
            self.prepared.set()

    def training(self, task: Task) -> list[str]:
        """The overrides of a run."""
        arm, (model, share) = ARMS[task[0]], model_of(task[0])
        start, tokens, sft = (max(least, int(share * asked) // least * least) for asked, least in self.tokens)
        if arm.tunes:
            base = self.work / name_of((arm.branch or "", task[1]))
            words = shlex.split(f"{SFT} {arm.train}".format(base=base, cache=self.work / "cache", sft=sft))
            words += [word for word in self.overrides if not word.startswith("model.")]  # it is the base's
            return [*words, f"run.dir={self.work / name_of(task)}", f"run.seed={task[1]}"]
        last = round(tokens / BATCH / 10) * BATCH
        parts = [COMMON, AT_8K if arm.branch else FIRST_STAGE, model, arm.train]
        text = " ".join(parts).format(start=start, first=tokens - last, last=last, fifth=tokens // 5)
        data, held_out = (self.values.get(key, "embedded") for key in ("data", "validation"))
        words = [*shlex.split(text), "data=files", f"data.path={data}", f"data.validation.path={held_out}"]
        words += [
            f"eval.documents={self.values.get('documents', MOST)}",
            f"run.allow_changes={str(bool(arm.branch)).lower()}",
        ]
        return [*words, *self.overrides, f"run.dir={self.work / name_of(task)}", f"run.seed={task[1]}"]

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
    """What `arms` and `seeds` name, with what they go on from, those first; UsageError for others."""
    own, found = whole_numbers({"seeds": seeds}, "seeds", "", least=0), []
    for text in arms.split(";"):
        name, at, seed = text.partition("@")
        if name not in ARMS:
            raise UsageError(f"arms={name}: there are {'; '.join(ARMS)}")
        for one in [int(seed)] if at else own:
            chain = [name]
            while (base := ARMS[chain[0]].branch) is not None:
                chain.insert(0, base)
            found += [(link, one) for link in chain]
    return sorted(dict.fromkeys(found), key=lambda task: (depth(task[0]), task[1]))


def depth(arm: str) -> int:
    """How many runs an arm goes on from."""
    base = ARMS[arm].branch
    return 0 if base is None else 1 + depth(base)


def model_of(arm: str) -> tuple[str, float]:
    """Of MODELS."""
    return next(model for end, model in reversed(MODELS.items()) if arm.endswith(end))


def name_of(task: Task) -> str:
    """Of a run's folder."""
    return f"{task[0].replace(', ', '-').replace(' ', '_')}_seed{task[1]}"


def at_end(base: Path, ended: int) -> Path:
    """The checkpoint of a run at the end of its stage of this number. ValueError where there is none."""
    ends = checkpoints(base)
    if len(ends) < ended:
        raise ValueError(f"{base.name} did not come to its end")
    return ends[ended - 1]


def branch_off(base: Path, folder: Path, ended: int) -> None:
    """Makes a run of what another one had when `ended` of its stages were over. ValueError where it is not finished."""
    if folder.exists():
        return
    end = at_end(base, ended)
    shutil.copytree(end, folder / "checkpoints" / end.name)
    if ended > 1:  # what the start was evaluated on is shorter
        shutil.copytree(base / "position_loss", folder / "position_loss")
    tokens = int(end.name.removeprefix("tokens_"))
    lines = (base / FILE_NAME).read_text(encoding="utf-8").splitlines(keepends=True)
    # The stage that begins here is the branch's own.
    kept = [line for line in lines if not ((row := json.loads(line))["kind"] == "stage" and row["tokens"] >= tokens)]
    (folder / FILE_NAME).write_text("".join(kept), encoding="utf-8")


def tails(held_out: Path, to: Path, length: int) -> bool:
    """Makes shards of the documents' tokens up to 8K, the last `length` of them; False where `held_out` are none."""
    if not (held_out / META).is_file():
        return False
    if not to.exists():
        shards = TokenShards(held_out)
        known = np.flatnonzero(shards.lengths > LENGTH).tolist()
        to.mkdir(parents=True)
        tokens = [np.array(shards.tokens(i, LENGTH - length, LENGTH + 1)) for i in known]
        record = write_shard(to, 0, tokens, [shards.ids[i] for i in known])
        write_meta(to, load_tokenizer("bpe-4k"), [record], {"title": f"ends of {held_out.name}"})
    return True


def keep(work: Path, path: Path) -> None:
    """Everything but tokens, weights and figures in one file. What is being written while others run is in the next."""
    with tarfile.open(path.with_suffix(".part"), "w:gz", compresslevel=3) as tar:
        for file in sorted(work.rglob("*")):
            if file.is_file() and not {"checkpoints", "cache", "cuts"} & {*file.parts} and file.suffix != ".png":
                with suppress(OSError):
                    tar.add(file, file.relative_to(work))
    path.with_suffix(".part").replace(path)


if __name__ == "__main__":
    main()
