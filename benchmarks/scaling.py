"""Do several GPUs of one host train as one does, and what follows when a process is killed? Through launch/train.py.

    python benchmarks/scaling.py to=results/scaling gpus=8
    python benchmarks/scaling.py to=runs/scaling_cpu device=cpu models=tiny seq_len=512 zero=1 loss_steps=10 \\
        schedule.block_size=64 data.tokenizer=bytes

The second tries it on a CPU with a tiny model, in some minutes. Parts (parts=):

losses  the same batch on one process and on all: are the losses the same?
kill    one process is killed with SIGKILL on the way, then torchrun itself. How long until all have ended, what is
        said, and does the run, continued on one process and then on all again, have the losses of one that was not
        disturbed?

Speed, memory and communication on several GPUs are a matter of benchmarks/longest_context.py.

Runs are stopped when their steps are done, before they save a model. A measurement that was made is kept in `runs`, so
the same command goes on after an interruption. Arguments with a dot go to all runs.
"""

from __future__ import annotations

import importlib.metadata
import os
import platform
import shutil
import signal
import sys
import time
from collections.abc import Callable, Iterator, Mapping
from dataclasses import asdict, dataclass, replace
from itertools import product
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))

import psutil  # noqa: E402
import torch  # noqa: E402

from benchmarks.common import (  # noqa: E402
    ENDED_SECONDS,
    QUIET,
    heading,
    kept,
    origin,
    plain,
    refuse_own,
    row_table,
    split,
    started,
    steps_logged,
    train_lines,
    wait,
    whole_numbers,
    write,
)
from conf.numbers import given_length  # noqa: E402
from launch.cli import UsageError, exits_on, key_values  # noqa: E402
from launch.config import detect_hardware, load  # noqa: E402
from train.checkpoint.checkpoint_dir import newest  # noqa: E402
from train.record.metrics import FILE_NAME, read_metrics  # noqa: E402

KEYS = {
    "to": "folder of the results",
    "runs": "folder of the runs (default: runs/ in it)",
    "parts": "which, comma-separated (default losses,kill)",
    "gpus": "numbers of GPUs, each of which is compared with one (default: as many as there are)",
    "models": "files of conf/model (default paper_545m)",
    "attentions": "files of conf/exp, of which the first stage is run (default moba_32k,full_32k)",
    "zero": "ZeRO stages (default 1,2,3)",
    "sequence": "numbers of GPUs that share each sequence (default 1)",
    "device": "cuda (default), or cpu: processes on the CPU in place of GPUs",
    "seq_len": "context (default 32K)",
    "loss_steps": "steps compared (default 50)",
    "commit": "commit of the code, where this is no git checkout",
}
# bf16 rounds at 2^-8; sums over processes are taken in another order, and 50 steps carry that on.
TOLERANCE = {"cuda": 1e-2, "cpu": 1e-4}
CONVENTION = (
    "A step has one sequence for each GPU; the same batch is given to one process. Largest difference of the losses of "
    "all steps, relative to the loss. Activations are recomputed unless overridden."
)


@dataclass(frozen=True)
class Study:
    """What all measurements share."""

    runs: Path
    overrides: tuple[str, ...]
    device: str
    seq_len: int
    loss_steps: int


@dataclass(frozen=True)
class Setup:
    """One configuration that is compared."""

    model: str
    attention: str
    zero: int
    gpus: int
    sequence: int

    @property
    def name(self) -> str:
        """For folders and the screen."""
        shared = f"_sequence{self.sequence}" if self.sequence > 1 else ""
        return f"{self.model}_{self.attention}_zero{self.zero}_{self.gpus}{shared}"

    def batch(self, study: Study) -> int:
        """Tokens per step: a sequence for each GPU."""
        return self.gpus * study.seq_len

    def arguments(self, study: Study) -> list[str]:
        """Overrides of a run that is stopped after its steps; its budget is twice that, so that it does not end
        first."""
        own = [f"+exp={self.attention}", f"model={self.model}", f"deepspeed=zero{self.zero}", *QUIET]
        own += ["model.activation_checkpointing=true", f"run.device={study.device}", *study.overrides]
        own += [f"parallel.sequence={self.sequence}"]
        own += [f"schedule.seq_len={study.seq_len}", f"schedule.batch_tokens={self.batch(study)}"]
        return [*own, f"schedule.tokens={2 * study.loss_steps * self.batch(study)}"]


@exits_on(ValueError, OSError)
def main() -> None:
    """The command; see the module's text."""
    overrides, arguments = split(sys.argv[1:])
    values = key_values(arguments, KEYS, about=__doc__, required=["to"])
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))  # ends the processes of a run, too
    to, parts = Path(values["to"]), values.get("parts", ",".join(PARTS)).split(",")
    if wrong := [part for part in parts if part not in PARTS]:
        raise UsageError(f"parts={','.join(wrong)}: choose from {', '.join(PARTS)}")
    refuse_own(overrides, KEYS)
    device, gpus = _processes(values)
    steps = whole_numbers(values, "loss_steps", "50", least=5)[0]
    runs, seq_len = Path(values.get("runs", to / "runs")), given_length({"seq_len": "32K"} | values, "seq_len")
    study = Study(runs, tuple(overrides), device, seq_len, steps)
    models = values.get("models", "paper_545m").split(",")
    attentions = values.get("attentions", "moba_32k,full_32k").split(",")
    zero, sequence = whole_numbers(values, "zero", "1,2,3"), whole_numbers(values, "sequence", "1")
    setups = [Setup(*each) for each in product(models, attentions, zero, gpus, sequence)]
    for setup in setups:  # mistakes now, not in each run
        load(setup.arguments(study), detect_hardware(setup.gpus, setup.gpus))
    record, text = {**origin(sys.argv[1:], values.get("commit")), **_about(study)}, ""
    for part in parts:
        record[part] = []
        for setup in setups:
            print(f"== {part}: {setup.name}", flush=True)
            row = asdict(setup) | PARTS[part](study, setup)
            record[part].append(row)
            print(f"   {row.get('failed') or 'done'}", flush=True)
            text = write(record, list(table(record)), to)  # after each, so that what was measured is not lost
    print(text)


def _processes(values: Mapping[str, str]) -> tuple[str, list[int]]:
    """(device, numbers of processes that are compared with one). UsageError."""
    there, device = torch.cuda.device_count(), values.get("device", "cuda")
    if device not in TOLERANCE:
        raise UsageError(f"device={device}: choose cuda or cpu")
    if device == "cuda" and not there:
        raise UsageError("device=cuda: torch sees no GPU here; device=cpu measures processes on the CPU")
    gpus = whole_numbers(values, "gpus", str(there) if device == "cuda" else "2")
    if device == "cuda" and max(gpus) > there:
        fit = ",".join(str(n) for n in gpus if n <= there) or there
        raise UsageError(f"gpus={values['gpus']}: GPUs on this host: {there}; use gpus={fit}, or device=cpu")
    if max(gpus) < 2:
        raise UsageError(f"gpus={gpus[0]}: processes are compared with one; give 2 or more")
    return device, [n for n in gpus if n > 1]


def _about(study: Study) -> dict:
    """What the results carry besides figures."""
    cpu = f"{platform.machine()} CPU, {os.cpu_count()} cores, processes in place of GPUs"
    there = torch.cuda.device_count()
    return {
        "device": f"{there} x {torch.cuda.get_device_name()}" if study.device == "cuda" else cpu,
        "torch": torch.__version__,
        "deepspeed": importlib.metadata.version("deepspeed"),
        "convention": CONVENTION,
        "setting": {"device": study.device, "seq_len": study.seq_len, "loss_steps": study.loss_steps},
    }


# -------------------- parts


def losses(study: Study, setup: Setup) -> dict:
    """How the losses of one process, which splits nothing, and of all compare, the same batch given."""
    alone, together = _curve(study, replace(setup, zero=1, sequence=1), 1), _curve(study, setup, setup.gpus)
    return alone if "failed" in alone else together if "failed" in together else _compared(study, together, alone)


def kill(study: Study, setup: Setup) -> dict:
    """What follows when one process and then torchrun itself is killed, and how the losses of a run that was continued
    after each, the second time on one process and then on all again, compare with those of an undisturbed run."""
    whole = _curve(study, setup, setup.gpus)
    if "failed" in whole:
        return whole
    batch, fifth = setup.batch(study), study.loss_steps // 5
    arguments = [*setup.arguments(study), f"checkpoint.every_tokens={fifth * batch}", "checkpoint.keep=2"]

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
        before = newest(folder)
        with started(["launch/train.py"], arguments, 1, folder) as process:
            wait(process, folder, lambda: newest(folder) != before)  # so that all go on from what one has saved
        with started(["launch/train.py"], arguments, setup.gpus, folder) as process:
            wait(process, folder, lambda: _reached(folder, batch, study.loss_steps))
        shutil.rmtree(folder / "checkpoints")
        lines = read_metrics(folder / FILE_NAME)
        by_tokens = {r["tokens"]: r["loss"] for r in lines if r["kind"] == "train"}  # the last word on each step
        course = [by_tokens[tokens] for tokens in sorted(by_tokens)][: study.loss_steps]
        starts = [r["tokens"] // batch for r in lines if r["kind"] == "run"]
        if not starts[-2] < starts[-1] < study.loss_steps:
            return {"failed": f"started from steps {starts}: none compared is from a checkpoint of one process"}
        return {
            **{f"{name}_{key}": value for name, end in ends.items() for key, value in end.items()},
            "started_from_steps": starts,
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
    """The losses on so many processes."""
    arguments = setup.arguments(study)

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


PARTS: dict[str, Callable[[Study, Setup], dict]] = {"losses": losses, "kill": kill}


def table(record: Mapping) -> Iterator[str]:
    """Markdown: where it was measured, and a row per setup of each part."""
    yield from heading(record)
    for part in (part for part in PARTS if part in record):
        yield from (f"{part}:", "", *row_table(record[part]), "")


if __name__ == "__main__":
    main()
