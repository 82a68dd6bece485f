"""How long a context trains on a given number of GPUs, how fast, and whether the plan knew: a few steps of each case.

    python benchmarks/longest_context.py to=long cases=paper_1_1b/1M/1/model.activation_checkpointing=offload
    python benchmarks/longest_context.py to=long cases=paper_1_5b/128K/1,paper_1_5b/128K/2/parallel.sequence=2

A case is model/context/GPUs, and overrides behind further slashes. Among them `steps=20` takes another number of steps,
`limit=90` another number of seconds, and `batch=64K` several sequences per step where one is shorter: the same for data
parallelism and a shared sequence. The context `>=128K` is doubled until a run fails; 32K+128K+256K are stages of one
run, which pays for its start once. Every sequence is one document of the full length, one per step and group of
processes unless `batch` says more; the attention is that of +exp=moba_32k (2048x3) unless overrides say otherwise.

Measured: median tokens/s and MFU of the steps after the first, rank 0's peak of GPU memory as torch allocates it, the
peak of resident memory of all processes together, the share of a step in communication, and that in
which nothing else runs, and the losses. The plan's
estimates stand beside it.
"""

from __future__ import annotations

import shutil
import signal
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
from benchmarks.kernel_kinds import communication  # noqa: E402
from benchmarks.step_profile import write_documents  # noqa: E402
from conf.numbers import format_length, parse_length  # noqa: E402
from data.tokenizer import load_tokenizer  # noqa: E402
from launch.cli import UsageError, exits_on, key_values  # noqa: E402
from launch.config import detect_hardware, load  # noqa: E402
from train.model.sizes import embedding_rows  # noqa: E402
from train.plan.plan import make_plan  # noqa: E402
from train.record.throughput import CONVENTION  # noqa: E402

KEYS = {
    "to": "folder of the results",
    "cases": "comma-separated; see above",
    "steps": "steps of a case that does not say (default 3)",
    "seconds": "seconds for all cases together (default 540)",
    "limit": "seconds for one run at most, of a case that does not say (default 200)",
    "commit": "commit of the code, where this is no git checkout",
}
LEAST_SECONDS = 30
DOCUMENTS = 4
OF_A_CASE = ("steps", "batch", "limit")


@dataclass(frozen=True)
class Case:
    """One run."""

    model: str
    lengths: tuple[int, ...]
    num_gpus: int
    overrides: tuple[str, ...]
    steps: int
    batch: int
    limit: float
    doubles: bool

    @classmethod
    def parse(cls, text: str, steps: int, limit: float) -> Case:
        """The case that is written model/context/GPUs/overrides."""
        if text.count("/") < 2 or not text.split("/")[2].isdecimal():
            raise UsageError(f"cases={text}: <model>/<context>/<GPUs>[/<override>...], such as paper_1_5b/128K/1")
        model, seq_len, num_gpus, *more = text.split("/")
        own = [part for part in more if part.partition("=")[0] not in OF_A_CASE]
        given = dict(part.split("=", 1) for part in more if part not in own)
        doubles = seq_len.startswith(">=")
        lengths = tuple(map(parse_length, seq_len.removeprefix(">=").split("+")))
        batch = parse_length(given["batch"]) if "batch" in given else 0
        amounts = (int(given.get("steps", steps)), batch, float(given.get("limit", limit)))
        return cls(model, lengths, int(num_gpus), tuple(own), *amounts, doubles)

    @property
    def name(self) -> str:
        """A name for files."""
        parts = [self.model, "+".join(map(format_length, self.lengths)), str(self.num_gpus), *self.overrides]
        return "_".join(parts).replace("=", "-").replace(".", "-")

    def batch_tokens(self, length: int) -> int:
        """Tokens per step at a length: a sequence for each group of processes, or as many as were asked for."""
        size = next((int(p.partition("=")[2]) for p in self.overrides if p.startswith("parallel.sequence=")), 1)
        return max(length * (self.num_gpus // size), self.batch)

    def arguments(self, shared: list[str]) -> list[str]:
        """The overrides of its run, without its directory."""
        stages = ["schedule=custom"]
        for length in self.lengths:
            batch = self.batch_tokens(length)
            # The last is long enough not to end while its trace is written.
            tokens = (self.steps + 1) * (8 if length == self.lengths[-1] else 1) * batch
            own = {"seq_len": length, "batch_tokens": batch, "tokens": tokens, "attention.kind": "moba"}
            stages += [f"+schedule.stages.at_{format_length(length)}.{key}={value}" for key, value in own.items()]
        model = ["+exp=moba_32k", f"model={self.model}", "optim.lr.peak=1e-4"]
        return [*model, *QUIET, *stages, *shared, *self.overrides]


@exits_on(ValueError, OSError)
def main() -> None:
    """The command; see the module's text."""
    shared, arguments = split(sys.argv[1:])
    values = key_values(arguments, KEYS, about=__doc__, required=["to", "cases"])
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))  # ends the processes of a run, too
    to = Path(values["to"])
    default = (int(values.get("steps", 3)), float(values.get("limit", 200)))
    cases = [Case.parse(text, *default) for text in values["cases"].split(",")]
    ends = time.monotonic() + float(values.get("seconds", 540))
    record = {
        **origin(sys.argv[1:], values.get("commit")),
        "device": device_name(),
        "cores": detect_hardware().cores,
        "torch": torch.__version__,
        "convention": CONVENTION,
        "rows": [],
    }
    while cases:
        case = cases.pop(0)
        left = ends - time.monotonic()
        print(f"== {case.name}, {left:.0f} s left", flush=True)
        rows = _measured(case, to, shared, min(left, case.limit))
        if case.doubles and "failed" not in rows[-1]:
            cases.insert(0, replace(case, lengths=(2 * case.lengths[-1],)))
        record["rows"] += rows
        text = write(record, _table(record), to)
    print(text)


def _measured(case: Case, to: Path, shared: list[str], limit: float) -> list[dict]:
    """What its run did, a row for each length; `failed` says why one could not be reached in time or at all."""
    about = {"model": case.model, "num_gpus": case.num_gpus, "overrides": list(case.overrides)}
    rows = [
        {"case": case.name, "seq_len": length, "batch_tokens": case.batch_tokens(length)} | about
        for length in case.lengths
    ]
    documents = to / f"documents_{case.lengths[-1]}"
    arguments = [*case.arguments(shared), "data=files", f"data.path={documents}"]
    hardware = detect_hardware(case.num_gpus, case.num_gpus)
    config = load(arguments, hardware)
    tokenizer = load_tokenizer(config.data.tokenizer)
    if not documents.exists():
        write_documents(documents, tokenizer, DOCUMENTS, case.lengths[-1], "benchmarks/longest_context.py")
    plan = make_plan(config, embedding_rows(config.model, tokenizer.vocab_size), hardware)
    planned = {
        "gpu_gib": plan.memory.total / 2**30,
        "host_gib": None if plan.host is None else plan.host.running / 2**30,
    }
    rows[-1] |= {"planned": planned, "automatic": list(plan.automatic)}
    folder = to / "runs" / case.name
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir(parents=True)
    hosts, reason = _run(case, arguments, folder, limit) if limit >= LEAST_SECONDS else ([], "no time left")
    every = train_lines(folder) if hosts else []
    for row, host in zip(rows, hosts):
        lines = [line for line in every if line["seq_len"] == row["seq_len"]]
        row |= {
            "seconds_a_step": [line["seconds"] for line in lines],
            "losses": [line["loss"] for line in lines],
            "grad_norms": [line["grad_norm"] for line in lines],
            "skipped": lines[-1]["skipped_steps"],
            **speeds(lines[1 : case.steps + 1] or lines),
            "host_gib": host,
        }
        trace = _trace(folder, row["seq_len"])
        if trace.exists():
            row |= communication(read_json(trace)["traceEvents"])
            trace.unlink()
    for row in rows[len(hosts) :]:
        row["failed"] = reason
    shutil.rmtree(folder / "checkpoints", ignore_errors=True)
    return rows


def _trace(folder: Path, length: int) -> Path:
    """The profile of the last step at a length."""
    return folder / f"trace_{length}.json"


def _run(case: Case, arguments: list[str], folder: Path, limit: float) -> tuple[list[float], str]:
    """Runs a case for `limit` seconds at most: the peak of host memory up to the end of each length that two or more
    steps were made at, in GiB, and what became of the others."""
    ends = [(case.steps + 1) * count for count in range(1, len(case.lengths) + 1)]
    traces = [_trace(folder, length) for length in case.lengths]
    windows = [f"{trace}:device:{end - 1}:{end}" for trace, end in zip(traces, ends)]
    peak, began, hosts = [0.0], time.monotonic(), []
    with started(["benchmarks/profiled_train.py", ",".join(windows)], arguments, case.num_gpus, folder) as process:
        threading.Thread(target=_watch_host, args=(process, peak), daemon=True).start()
        while len(hosts) < len(ends):
            if traces[len(hosts)].exists():
                hosts.append(peak[0])
            elif process.poll() is not None:
                return hosts, failure_reason(folder.with_name(f"{folder.name}.log").read_text(errors="replace"))
            elif time.monotonic() - began > limit:
                made = steps_logged(folder) - (case.steps + 1) * len(hosts)
                return [*hosts, peak[0]] if made > 1 else hosts, f"{max(made, 0)} steps within {limit:.0f} s"
            time.sleep(0.2)
    return hosts, ""


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


HEADS = ("model", "context", "GPUs", "sequences per step", "with", "tokens/s", "MFU attended", "step s")
HEADS += ("GPU GiB (plan)", "host GiB (plan)", "in communication, exposed", "losses")


ABOUT = (
    "Every sequence is one document of the full length. Peak GPU: rank 0's, as torch allocates; host: "
    "resident memory of all processes together."
)


def _table(record: dict) -> list[str]:
    lines = [f"{record['device']}; torch {record['torch']}, commit {record['commit']}", "", f"`{record['command']}`"]
    return [*lines, "", f"{ABOUT} {record['convention']}", "", *markdown(HEADS, map(_cells, record["rows"]))]


def _cells(row: dict) -> list[str]:
    sequences = row["batch_tokens"] // row["seq_len"]
    start = [row["model"], format_length(row["seq_len"]), str(row["num_gpus"]), str(sequences)]
    start.append(" ".join(row["overrides"]))
    if "failed" in row:
        return [*start, row["failed"], *[""] * (len(HEADS) - len(start) - 1)]
    memory, plan = (("peak_memory_gib", "gpu_gib"), ("host_gib", "host_gib")), row.get("planned")
    shares = (row.get("communication"), row.get("communication_exposed"))
    return [
        *start,
        f"{row['tokens_per_second']:,.0f}",
        cell(row["mfu"], "{:.1%}"),
        f"{row['seconds_a_step'][-1]:.1f}",
        *(cell(row[key], "{:.1f}") + (f" ({plan[of]:.1f})" if plan and plan[of] else "") for key, of in memory),
        ", ".join(cell(share, "{:.1%}") for share in shares),
        ", ".join(f"{loss:.4f}" for loss in row["losses"][:3]),
    ]


if __name__ == "__main__":
    main()
