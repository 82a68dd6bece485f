"""How long a context trains on a given number of GPUs, how fast, and whether the plan knew: a few steps of each case.

    python benchmarks/longest_context.py to=long cases=paper_1_1b/1M/1/model.activation_checkpointing=offload
    python benchmarks/longest_context.py to=long cases=paper_1_5b/128K/1,paper_1_5b/128K/2/parallel.sequence=2

A case is model/context/GPUs, and overrides behind further slashes; `steps=20` among them takes another number of steps,
and `>=128K` as the context doubles it until a run fails. Every step is one document of the full length a
group of processes; the attention is that of +exp=moba_32k (2048x3) unless overrides say otherwise.

Measured: median tokens/s and MFU of the steps after the first, rank 0's peak of GPU memory as torch allocates it, the
peak of resident memory of all processes together, the share of a step in communication, and that in
which nothing else runs, and the losses. The plan's
estimates stand beside it.
"""

from __future__ import annotations

import shutil
import sys
import threading
import time
from contextlib import suppress
from dataclasses import dataclass, replace
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))

import psutil  # noqa: E402
import torch  # noqa: E402

from benchmarks.common import (  # noqa: E402
    QUIET,
    Failed,
    cell,
    device_name,
    failure_reason,
    markdown,
    origin,
    read_json,
    speeds,
    split,
    started,
    steps_logged,
    train_lines,
    write,
)
from benchmarks.scaling_tables import communication  # noqa: E402
from benchmarks.step_profile import write_documents  # noqa: E402
from conf.numbers import format_length, parse_length  # noqa: E402
from data.tokenizer import load_tokenizer  # noqa: E402
from launch.cli import exits_on, key_values  # noqa: E402
from launch.config import detect_hardware, load  # noqa: E402
from train.model.sizes import embedding_rows  # noqa: E402
from train.plan.plan import make_plan  # noqa: E402
from train.record.throughput import CONVENTION  # noqa: E402

KEYS = {
    "to": "folder of the results",
    "cases": "comma-separated; see above",
    "steps": "steps of a case that does not say (default 3)",
    "seconds": "seconds for all cases together (default 540)",
    "limit": "seconds for one run at most (default 200)",
    "commit": "commit of the code, where this is no git checkout",
}
LEAST_SECONDS = 30
DOCUMENTS = 4


@dataclass(frozen=True)
class Case:
    """One run."""

    model: str
    seq_len: int
    num_gpus: int
    overrides: tuple[str, ...]
    steps: int
    doubles: bool

    @classmethod
    def parse(cls, text: str, steps: int) -> Case:
        """The case that is written model/context/GPUs/overrides."""
        model, seq_len, num_gpus, *more = text.split("/")
        own = [part for part in more if not part.startswith("steps=")]
        counts = [int(part.partition("=")[2]) for part in more if part.startswith("steps=")]
        doubles = seq_len.startswith(">=")
        length = parse_length(seq_len.removeprefix(">="))
        return cls(model, length, int(num_gpus), tuple(own), *(counts or [steps]), doubles)

    @property
    def name(self) -> str:
        """A name for files."""
        parts = [self.model, format_length(self.seq_len), str(self.num_gpus), *self.overrides]
        return "_".join(parts).replace("=", "-").replace(".", "-")

    def arguments(self, shared: list[str]) -> list[str]:
        """The overrides of its run, without its directory."""
        size = next((int(p.partition("=")[2]) for p in self.overrides if p.startswith("parallel.sequence=")), 1)
        batch = self.seq_len * self.num_gpus // size
        lengths = [f"schedule.seq_len={self.seq_len}", f"schedule.batch_tokens={batch}"]
        budget = f"schedule.tokens={8 * (self.steps + 4) * batch}"
        model = ["+exp=moba_32k", f"model={self.model}"]
        return [*model, *QUIET, "optim.lr.peak=1e-4", *lengths, budget, *shared, *self.overrides]


@exits_on(ValueError, OSError)
def main() -> None:
    """The command; see the module's text."""
    shared, arguments = split(sys.argv[1:])
    values = key_values(arguments, KEYS, about=__doc__, required=["to", "cases"])
    to = Path(values["to"])
    cases = [Case.parse(text, int(values.get("steps", 3))) for text in values["cases"].split(",")]
    ends = time.monotonic() + float(values.get("seconds", 540))
    record = {
        **origin(sys.argv[1:], values.get("commit")),
        "device": device_name(),
        "torch": torch.__version__,
        "convention": CONVENTION,
        "rows": [],
    }
    while cases:
        case = cases.pop(0)
        left = ends - time.monotonic()
        print(f"== {case.name}, {left:.0f} s left", flush=True)
        row = {"case": case.name, "model": case.model, "seq_len": case.seq_len, "num_gpus": case.num_gpus}
        row |= {"overrides": list(case.overrides)}
        try:
            row |= _measured(case, to, shared, min(left, float(values.get("limit", 200))))
            if case.doubles:
                cases.insert(0, replace(case, seq_len=2 * case.seq_len))
        except Failed as error:
            row["failed"] = str(error)
        record["rows"].append(row)
        text = write(record, _table(record), to)
    print(text)


def _measured(case: Case, to: Path, shared: list[str], limit: float) -> dict:
    """What its run did. Failed if it could not, or not in time."""
    documents = to / f"documents_{case.seq_len}"
    arguments = [*case.arguments(shared), "data=files", f"data.path={documents}"]
    hardware = detect_hardware(case.num_gpus, case.num_gpus)
    config = load(arguments, hardware)
    tokenizer = load_tokenizer(config.data.tokenizer)
    if not documents.exists():
        write_documents(documents, tokenizer, DOCUMENTS, case.seq_len, "benchmarks/longest_context.py")
    plan = make_plan(config, embedding_rows(config.model, tokenizer.vocab_size), hardware)
    planned = {"gpu_gib": plan.memory.total / 2**30, "host_gib": plan.memory.host * case.num_gpus / 2**30}
    if limit < LEAST_SECONDS:
        raise Failed("no time left")
    folder = to / "runs" / case.name
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir(parents=True)
    trace = folder / "trace.json"
    script = ["benchmarks/profiled_train.py", f"{trace}:device:{case.steps}:{case.steps + 1}"]
    peak, began = [0.0], time.monotonic()
    with started(script, arguments, case.num_gpus, folder) as process:
        watching = threading.Thread(target=_watch_host, args=(process, peak), daemon=True)
        watching.start()
        while not trace.exists():
            if process.poll() is not None and not trace.exists():
                raise Failed(failure_reason(folder.with_name(f"{folder.name}.log").read_text(errors="replace")))
            if time.monotonic() - began > limit:
                if steps_logged(folder) < 2:
                    raise Failed(f"{steps_logged(folder)} steps within {limit:.0f} s")
                break
            time.sleep(0.2)
    lines = train_lines(folder)
    row = {
        "planned": planned,
        "automatic": list(plan.automatic),
        "seconds_a_step": [line["seconds"] for line in lines],
        "losses": [line["loss"] for line in lines],
        "grad_norms": [line["grad_norm"] for line in lines],
        "skipped": lines[-1]["skipped_steps"],
        **speeds(lines[1 : case.steps + 1] or lines),
        "host_gib": peak[0],
    }
    if trace.exists():
        row |= communication(read_json(trace)["traceEvents"])
        trace.unlink()
    shutil.rmtree(folder / "checkpoints", ignore_errors=True)
    return row


def _watch_host(process: psutil.Popen, peak: list[float]) -> None:
    """Keeps the largest sum of resident memory of the process and its children, in GiB."""
    with suppress(psutil.NoSuchProcess):
        while process.is_running():
            total = 0
            for one in [process, *process.children(recursive=True)]:
                with suppress(psutil.NoSuchProcess):
                    total += one.memory_info().rss
            peak[0] = max(peak[0], total / 2**30)
            time.sleep(0.5)


HEADS = ("model", "context", "GPUs", "with", "tokens/s", "MFU attended", "step s", "GPU GiB (plan)", "host GiB (plan)")
HEADS += ("in communication, exposed", "losses")


ABOUT = (
    "One document of the full length a step and group of processes. Peak GPU: rank 0's, as torch allocates; host: "
    "resident memory of all processes together."
)


def _table(record: dict) -> list[str]:
    lines = [f"{record['device']}; torch {record['torch']}, commit {record['commit']}", "", f"`{record['command']}`"]
    return [*lines, "", f"{ABOUT} {record['convention']}", "", *markdown(HEADS, map(_cells, record["rows"]))]


def _cells(row: dict) -> list[str]:
    start = [row["model"], format_length(row["seq_len"]), str(row["num_gpus"]), " ".join(row["overrides"])]
    if "failed" in row:
        return [*start, row["failed"], *[""] * (len(HEADS) - len(start) - 1)]
    memory = (("peak_memory_gib", "gpu_gib"), ("host_gib", "host_gib"))
    shares = (row.get("communication"), row.get("communication_exposed"))
    return [
        *start,
        f"{row['tokens_per_second']:,.0f}",
        cell(row["mfu"], "{:.1%}"),
        f"{row['seconds_a_step'][-1]:.1f}",
        *(f"{cell(row[key], '{:.1f}')} ({row['planned'][plan]:.1f})" for key, plan in memory),
        ", ".join(cell(share, "{:.1%}") for share in shares),
        ", ".join(f"{loss:.4f}" for loss in row["losses"][:3]),
    ]


if __name__ == "__main__":
    main()
