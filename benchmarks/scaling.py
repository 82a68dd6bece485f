"""Measures what several GPUs of one host give: data parallelism and ZeRO, through launch/train.py under torchrun.

    python benchmarks/scaling.py to=results/scaling gpus=1,2,4,8
    python benchmarks/scaling.py to=runs/scaling_cpu device=cpu gpus=1,2 models=tiny seq_len=512 tokens_per_gpu=1K \\
        steps=3 warmup=1 loss_steps=10 schedule.block_size=64 data.tokenizer=bytes

The second tries it on a CPU with a tiny model, in ten minutes or so; what it measures means nothing. Parts (parts=):

throughput  tokens/s, efficiency, MFU, peak memory and communication of each model, attention, ZeRO stage and number of
            GPUs; what fails is listed with its reason.
losses      the first model with the same batch on one process and on the most: are the losses the same?
kill        the first model and attention: one process is killed with SIGKILL on the way, then torchrun itself. How long
            until all have ended, what is said, and does the run, continued on one process and then on all again, have
            the losses of one that was not disturbed?

The longest context that trains is a matter of benchmarks/longest_context.py.

Runs are stopped when their steps are done, before they save a model. A measurement that was made is kept in `runs`, so
the same command goes on after an interruption. Writes results.json, table.md and scaling.png into `to`. Arguments with
a dot go to all runs.
"""

from __future__ import annotations

import importlib.metadata
import json
import os
import platform
import shutil
import signal
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))

import psutil  # noqa: E402
import torch  # noqa: E402

from benchmarks.common import (  # noqa: E402
    ENDED_SECONDS,
    QUIET,
    kept,
    origin,
    plain,
    refuse_own,
    speeds,
    split,
    started,
    steps_logged,
    train_lines,
    wait,
    whole_numbers,
)
from benchmarks.scaling_tables import add_efficiency, communication, publish  # noqa: E402
from conf.numbers import parse_length  # noqa: E402
from launch.cli import UsageError, exits_on, key_values  # noqa: E402
from launch.config import detect_hardware, load  # noqa: E402
from train.checkpoint.checkpoint_dir import newest  # noqa: E402
from train.record.metrics import FILE_NAME, read_metrics  # noqa: E402

KEYS = {
    "to": "folder of the results",
    "runs": "folder of the runs (default: runs/ in it)",
    "parts": "which, comma-separated (default throughput,losses,kill)",
    "gpus": "numbers of GPUs (default 1,2,4,8 as far as there are)",
    "models": "files of conf/model (default paper_545m,paper_1_5b,llama3_8b)",
    "attentions": "files of conf/exp, of which the first stage is run (default moba_32k,full_32k)",
    "zero": "ZeRO stages (default 1,2,3)",
    "device": "cuda (default), or cpu: processes on the CPU in place of GPUs",
    "seq_len": "context (default 32K)",
    "tokens_per_gpu": "tokens a step and GPU (default 128K)",
    "warmup": "steps not counted (default 3)",
    "steps": "steps measured (default 8)",
    "loss_steps": "steps compared in losses and kill (default 50)",
    "commit": "commit of the code, where this is no git checkout",
}
PARTS = ("throughput", "losses", "kill")
# What a GPU of 80 GB cannot hold otherwise: only this ZeRO stage, and from so many GPUs on.
LARGE = {"llama3_8b": (3, 4)}
PROFILED_STEPS = 2
# bf16 rounds at 2^-8; sums over processes are taken in another order, and 50 steps carry that on.
TOLERANCE = {"cuda": 1e-2, "cpu": 1e-4}
CONVENTION = (
    "Weak scaling: a step has tokens_per_gpu tokens for each GPU, in sequences of seq_len, one at a time. tokens/s is "
    "the median over the measured steps, all GPUs together. efficiency = tokens/s a GPU over tokens/s a GPU of the "
    "fewest GPUs measured with the same model, attention and ZeRO stage (`against`). Peak memory: what torch held at "
    "most on rank 0. communication: the share of the time of further steps, profiled on rank 0, in which an NCCL "
    "kernel runs (it waits for slower ranks, too); exposed: in which nothing but NCCL runs. On a CPU: gloo. "
    "Activations are recomputed unless overridden, which MFU does not count."
)
RECOMPUTED = "model.activation_checkpointing=true"


@dataclass(frozen=True)
class Setup:
    """One configuration that is measured."""

    model: str
    attention: str
    zero: int
    gpus: int

    @property
    def name(self) -> str:
        """For folders and the screen."""
        return f"{self.model}_{self.attention}_zero{self.zero}_{self.gpus}"


@dataclass(frozen=True)
class Study:
    """What all measurements share."""

    runs: Path
    overrides: tuple[str, ...]
    device: str
    models: tuple[str, ...]
    attentions: tuple[str, ...]
    zero: tuple[int, ...]
    gpus: tuple[int, ...]
    seq_len: int
    tokens_per_gpu: int
    warmup: int
    steps: int
    loss_steps: int

    def setups(self, gpus: Sequence[int]) -> list[Setup]:
        """Those that can be run on these numbers of GPUs."""
        every = [Setup(m, a, z, g) for m in self.models for a in self.attentions for z in self.zero for g in gpus]
        limits = [LARGE.get(setup.model, (setup.zero, 1)) for setup in every]
        return [s for s, (zero, least) in zip(every, limits) if s.zero == zero and s.gpus >= least]

    def arguments(self, setup: Setup, steps: int, batch_tokens: int, seq_len: int) -> list[str]:
        """Overrides of a run that is stopped after `steps`; its budget is twice that, so that it does not end first."""
        own = [f"+exp={setup.attention}", f"model={setup.model}", f"deepspeed=zero{setup.zero}", *QUIET]
        own += [RECOMPUTED, f"run.device={self.device}", *self.overrides]
        own += [f"schedule.seq_len={seq_len}", f"schedule.batch_tokens={batch_tokens}"]
        return [*own, f"schedule.tokens={2 * steps * batch_tokens}"]


@exits_on(ValueError, OSError)
def main() -> None:
    """The command; see the module's text."""
    overrides, arguments = split(sys.argv[1:])
    values = key_values(arguments, KEYS, about=__doc__, required=["to"])
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))  # ends the processes of a run, too
    to = Path(values["to"])
    study = _study(values, to, overrides)
    parts = values.get("parts", ",".join(PARTS)).split(",")
    if wrong := [part for part in parts if part not in PARTS]:
        raise UsageError(f"parts={','.join(wrong)}: choose from {', '.join(PARTS)}")
    if max(study.gpus) < 2 and {"losses", "kill"} & {*parts}:
        raise UsageError(f"gpus={study.gpus[0]}: losses and kill compare processes; give 2 or more, or other parts=")
    most = max(study.gpus)
    first = [s for s in study.setups([most]) if s.model == study.models[0]]
    tasks = {
        "throughput": (throughput, study.setups(study.gpus)),
        "losses": (losses, first),
        "kill": (kill, [s for s in first if s.attention == study.attentions[0]]),
    }
    for model in sorted({*study.models} - {setup.model for setup in study.setups(study.gpus)}):
        zero, least = LARGE[model]
        print(f"left out: {model}, which takes zero={zero} and {least} GPUs or more", flush=True)
    record = _origin(values, study)
    for part in parts:
        measure, setups = tasks[part]
        record[part] = []
        for setup in setups:
            print(f"== {part}: {setup.name}", flush=True)
            row = asdict(setup) | measure(study, setup)
            record[part].append(row)
            print(f"   {row.get('failed') or 'done'}", flush=True)
            if part == "throughput":
                add_efficiency(record[part])
            text = publish(record, to)  # after each, so that what was measured is not lost
    print(text)


def _study(values: dict[str, str], to: Path, overrides: list[str]) -> Study:
    """The arguments, checked. UsageError or ConfigError."""
    there = torch.cuda.device_count()
    device = values.get("device", "cuda")
    if device not in TOLERANCE:
        raise UsageError(f"device={device}: choose cuda or cpu")
    if device == "cuda" and not there:
        raise UsageError("device=cuda: torch sees no GPU here; device=cpu measures processes on the CPU")
    default = ",".join(str(n) for n in (1, 2, 4, 8) if n <= there) if device == "cuda" else "1,2"
    gpus = whole_numbers(values, "gpus", default)
    if device == "cuda" and max(gpus) > there:
        fit = ",".join(str(n) for n in gpus if n <= there) or there
        raise UsageError(f"gpus={values['gpus']}: GPUs on this host: {there}; use gpus={fit}, or device=cpu")
    refuse_own(overrides, KEYS)
    study = Study(
        runs=Path(values.get("runs", to / "runs")),
        overrides=tuple(overrides),
        device=device,
        models=tuple(values.get("models", "paper_545m,paper_1_5b,llama3_8b").split(",")),
        attentions=tuple(values.get("attentions", "moba_32k,full_32k").split(",")),
        zero=whole_numbers(values, "zero", "1,2,3"),
        gpus=gpus,
        seq_len=parse_length(values.get("seq_len", "32K")),
        tokens_per_gpu=parse_length(values.get("tokens_per_gpu", "128K")),
        **{
            key: whole_numbers(values, key, n, least=5 if key == "loss_steps" else 1)[0]
            for key, n in (("warmup", "3"), ("steps", "8"), ("loss_steps", "50"))
        },
    )
    for setup in {(s.model, s.attention): s for s in study.setups(gpus)}.values():  # mistakes now, not in each run
        batch = study.tokens_per_gpu * setup.gpus
        load(study.arguments(setup, 1, batch, study.seq_len), detect_hardware(setup.gpus, setup.gpus))
    return study


def _origin(values: dict[str, str], study: Study) -> dict:
    """What the results carry besides figures."""
    cpu = f"{platform.machine()} CPU, {os.cpu_count()} cores, processes in place of GPUs"
    there = torch.cuda.device_count()
    return {
        **origin(sys.argv[1:], values.get("commit")),
        "hardware": f"{there} x {torch.cuda.get_device_name()}" if study.device == "cuda" else cpu,
        "torch": torch.__version__,
        "deepspeed": importlib.metadata.version("deepspeed"),
        "convention": CONVENTION,
        "setting": {k: v for k, v in asdict(study).items() if k not in ("runs", "overrides")},
    }


# -------------------- parts


def throughput(study: Study, setup: Setup) -> dict:
    """Speed, memory and communication, or why it failed."""
    counted = study.warmup + study.steps
    batch = study.tokens_per_gpu * setup.gpus
    arguments = study.arguments(setup, counted + PROFILED_STEPS, batch, study.seq_len)

    def make(folder: Path) -> dict:
        trace = folder / "trace.json"
        script = ["benchmarks/profiled_train.py", f"{trace}:device:{counted}:{counted + PROFILED_STEPS}"]
        with started(script, arguments, setup.gpus, folder) as process:
            wait(process, folder, trace.exists)
        events = json.loads(trace.read_text(encoding="utf-8"))["traceEvents"]
        trace.unlink()
        train = train_lines(folder)[study.warmup : counted]
        about = {"attention_in_force": train[0]["attention"], "seq_len": study.seq_len, "batch_tokens": batch}
        return about | speeds(train) | communication(events)

    return kept(study.runs / "throughput" / setup.name, [*arguments, study.warmup], make)


def losses(study: Study, setup: Setup) -> dict:
    """How the losses of one process and of all compare, the same batch given."""
    alone, together = (_curve(study, setup, gpus) for gpus in (1, setup.gpus))
    return alone if "failed" in alone else together if "failed" in together else _compared(study, together, alone)


def kill(study: Study, setup: Setup) -> dict:
    """What follows when one process and then torchrun itself is killed, and how the losses of a run that was continued
    after each, the second time on one process and then on all again, compare with those of an undisturbed run."""
    whole = _curve(study, setup, setup.gpus)
    if "failed" in whole:
        return whole
    batch = study.seq_len * setup.gpus
    fifth = study.loss_steps // 5
    arguments = study.arguments(setup, study.loss_steps, batch, study.seq_len)
    arguments += [f"checkpoint.every_tokens={fifth * batch}", "checkpoint.keep=2"]

    def make(folder: Path) -> dict:
        def lost_rank(process: psutil.Popen, ranks: list[psutil.Process]) -> psutil.Process:
            rank_0 = int((folder / ".lock").read_text(encoding="utf-8").split()[1])
            return next(rank for rank in ranks if rank.pid != rank_0)

        def lost_torchrun(process: psutil.Popen, ranks: list[psutil.Process]) -> psutil.Process:
            return process

        ends = {}
        for name, fifths, victim in (("rank", 1.5, lost_rank), ("torchrun", 2.5, lost_torchrun)):
            with started(["launch/train.py"], arguments, setup.gpus, folder) as process:
                wait(process, folder, lambda at=fifths * fifth: _reached(folder, batch, at) and newest(folder))
                ends[name] = _killed(process, folder, victim)
        for gpus, last in ((1, int(3.5 * fifth)), (setup.gpus, study.loss_steps)):
            with started(["launch/train.py"], arguments, gpus, folder) as process:
                wait(process, folder, lambda at=last: _reached(folder, batch, at))
        shutil.rmtree(folder / "checkpoints")
        lines = read_metrics(folder / FILE_NAME)
        by_tokens = {r["tokens"]: r["loss"] for r in lines if r["kind"] == "train"}  # the last word on each step
        course = [by_tokens[tokens] for tokens in sorted(by_tokens)][: study.loss_steps]
        return {
            **{f"{name}_{key}": value for name, end in ends.items() for key, value in end.items()},
            "started_from_steps": [r["tokens"] // batch for r in lines if r["kind"] == "run"],
            **_compared(study, {"losses": course}, whole),
        }

    return kept(study.runs / "kill" / setup.name, arguments, make)


def _killed(process: psutil.Popen, folder: Path, victim: Callable) -> dict:
    """What follows when the process that victim(torchrun, workers) names gets SIGKILL."""
    ranks = process.children()
    log = folder.with_name(f"{folder.name}.log")
    size, began = log.stat().st_size, time.monotonic()
    victim(process, ranks).kill()
    _, alive = psutil.wait_procs([process, *ranks], timeout=ENDED_SECONDS)
    seconds = time.monotonic() - began
    for one in alive:
        one.kill()
    said = log.read_bytes()[size:].decode(errors="replace").splitlines()
    ours = [text for line in said if (text := plain(line)).startswith(("error: ", "stopped", "waiting: "))]
    return {"seconds": None if alive else round(seconds, 1), "said": ours, "lines": len(said)}


def _reached(folder: Path, batch: int, step: float) -> bool:
    """Whether a run's newest step is that or a later one."""
    return steps_logged(folder) > 0 and train_lines(folder)[-1]["tokens"] >= step * batch


def _curve(study: Study, setup: Setup, gpus: int) -> dict:
    """The losses on so many processes of the batch that gives each process of the setup one sequence."""
    arguments = study.arguments(setup, study.loss_steps, study.seq_len * setup.gpus, study.seq_len)

    def make(folder: Path) -> dict:
        with started(["launch/train.py"], arguments, gpus, folder) as process:
            wait(process, folder, lambda: steps_logged(folder) >= study.loss_steps)
        return {"losses": [r["loss"] for r in train_lines(folder)[: study.loss_steps]]}

    return kept(study.runs / "losses" / f"{setup.name}_on_{gpus}", arguments, make)


def _compared(study: Study, ours: dict, theirs: dict) -> dict:
    """The largest difference of two courses of the loss, beside how far the loss moved."""
    pairs = list(zip(ours["losses"], theirs["losses"], strict=True))
    if None in sum(pairs, ()):
        return {"failed": "a loss is not finite"}
    worst, tolerance = max(abs(a - b) / b for a, b in pairs), TOLERANCE[study.device]
    first, last = theirs["losses"][0], theirs["losses"][-1]
    about = {"steps": len(pairs), "loss_first": first, "loss_last": last}
    return about | {"largest_relative_difference": worst, "tolerance": tolerance, "same": worst <= tolerance}


if __name__ == "__main__":
    main()
