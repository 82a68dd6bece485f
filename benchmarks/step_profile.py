"""Where the time of a training step goes, for each of several runs on one GPU: a table, a figure, and what is behind.

    python benchmarks/step_profile.py to=results/step_profile
    python benchmarks/step_profile.py to=runs/step_cpu variants=moba_32k/tiny,full_32k/tiny steps=3 warmup=1 \\
        profiled=1 seq_len=1K batch_tokens=2K schedule.block_size=128 data.tokenizer=bytes

The second tries it on a CPU with a tiny model, in a minute; what it measures means nothing. A variant is
<experiment>/<model>[/<option>...]: a file of conf/exp, whose first stage is run, one of conf/model, and overrides,
where `compile=true` stands for model.compile=true; without such options nothing is compiled or recomputed.
Arguments with a dot go to all runs.

With before=<checkout> each variant is run there first, on the same data and with the same caches.

Sequences are one document of the full length each, of random tokens (Zipf's law) made here.

Each run is a process of its own; caches of compiled code are empty at the beginning and shared by the runs of one
model, so that the first of a model starts cold. A run is killed after `limit` seconds, and at the end of `seconds` for
all; what was not measured by then is said. Writes results.json, table.md and figure.png into `to`, after each run.
"""

from __future__ import annotations

import os
import shutil
import statistics
import subprocess
import sys
import time
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import product
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))

import numpy as np  # noqa: E402
import torch  # noqa: E402

from benchmarks.common import (  # noqa: E402
    QUIET,
    device_name,
    failure_reason,
    origin,
    read_json,
    refuse_own,
    speeds,
    split,
    train_lines,
    whole_numbers,
)
from benchmarks.kernel_kinds import idle_share, longest_kernels, milliseconds_by_kind  # noqa: E402
from benchmarks.profiled_train import START_FILE  # noqa: E402
from benchmarks.step_tables import publish  # noqa: E402
from conf.build import ConfigError  # noqa: E402
from conf.numbers import given_length  # noqa: E402
from data.shards import META, write_meta, write_shard  # noqa: E402
from data.tokenizer import Tokenizer, load_tokenizer  # noqa: E402
from launch.cli import UsageError, exits_on, key_values  # noqa: E402
from launch.config import detect_hardware, load  # noqa: E402
from train.record.throughput import CONVENTION  # noqa: E402

VARIANTS = (
    "moba_32k/paper_545m",
    "moba_32k/paper_545m/compile=true",
    "full_32k/paper_545m/compile=true",
    "moba_32k/paper_1_5b/activation_checkpointing=true/compile=true",
    "moba_32k/125m/compile=true",
    "full_32k/paper_545m",
    "full_32k/125m/compile=true",
    "moba_32k/125m",
)
KEYS = {
    "to": "folder of the results",
    "variants": "which, comma-separated (default: those of the module)",
    "before": "another checkout, whose run of each variant comes before this one's",
    "seq_len": "context (default 32K)",
    "batch_tokens": "tokens per step (default 64K)",
    "warmup": "steps not counted (default 5)",
    "steps": "steps whose median is taken (default 20)",
    "profiled": "steps of each of the two profiles that follow (default 2)",
    "limit": "seconds for one run at most (default 170)",
    "seconds": "seconds for all runs together (default 540)",
    "commit": "commit of the code, where this is no git checkout",
}
PLAIN = ("model.compile=false", "model.activation_checkpointing=false")
DOCUMENTS = 64
LEAST_SECONDS = 30


@dataclass(frozen=True)
class Study:
    """What all runs share."""

    to: Path
    overrides: tuple[str, ...]
    seq_len: int
    batch_tokens: int
    warmup: int
    steps: int
    profiled: int
    limit: float

    def arguments(self, variant: str) -> list[str]:
        """The overrides of a run, without its directory."""
        experiment, model, *options = variant.split("/")
        own = [f"+exp={experiment}", f"model={model}", *PLAIN]
        own += [text if "." in text.partition("=")[0] else f"model.{text}" for text in options]
        own += [*QUIET, f"schedule.seq_len={self.seq_len}", f"schedule.batch_tokens={self.batch_tokens}"]
        total = self.warmup + self.steps + 2 * self.profiled
        return [*own, *self.overrides, f"schedule.tokens={4 * total * self.batch_tokens}"]


@exits_on(ConfigError, ValueError, OSError)
def main() -> None:
    """The command; see the module's text."""
    overrides, arguments = split(sys.argv[1:])
    values = key_values(arguments, KEYS, about=__doc__, required=["to"])
    variants = values["variants"].split(",") if "variants" in values else VARIANTS
    if short := [variant for variant in variants if "/" not in variant]:
        raise UsageError(f"variants={short[0]}: <experiment>/<model>[/<option>...], such as {VARIANTS[0]}")
    study = _study(values, overrides)
    configs = [load(study.arguments(variant), detect_hardware()) for variant in variants]
    data = _data(study, load_tokenizer(configs[0].data.tokenizer))
    shutil.rmtree(study.to / "caches", ignore_errors=True)
    record = _origin(values, study)
    ends = time.monotonic() + float(values.get("seconds", 540))
    roots = {"before: ": Path(values["before"]).resolve()} if "before" in values else {}
    for variant, (mark, root) in product(variants, (roots | {"": ROOT}).items()):
        left = ends - time.monotonic()
        print(f"== {mark}{variant}, {left:.0f} s left", flush=True)
        if left < LEAST_SECONDS:
            measured = {"failed": "no time left"}
        else:
            measured = _measured(study, variant, root, data, min(left, study.limit))
        record["rows"].append({"variant": mark + variant} | measured)
        text = publish(record, study.to)
    shutil.rmtree(study.to / "caches", ignore_errors=True)
    print(text)


def _study(values: dict[str, str], overrides: Sequence[str]) -> Study:
    refuse_own(overrides, KEYS)
    return Study(
        to=Path(values["to"]),
        overrides=tuple(overrides),
        seq_len=given_length({"seq_len": "32K"} | values, "seq_len"),
        batch_tokens=given_length({"batch_tokens": "64K"} | values, "batch_tokens"),
        limit=float(values.get("limit", 170)),
        **{
            key: whole_numbers(values, key, default)[0]
            for key, default in (("warmup", "5"), ("steps", "20"), ("profiled", "2"))
        },
    )


def _origin(values: dict[str, str], study: Study) -> dict:
    return {
        **origin(sys.argv[1:], values.get("commit")),
        "device": device_name(),
        "torch": torch.__version__,
        "convention": CONVENTION,
        "setting": {key: getattr(study, key) for key in ("seq_len", "batch_tokens", "warmup", "steps", "profiled")},
        "rows": [],
    }


def _data(study: Study, tokenizer: Tokenizer) -> list[str]:
    """The overrides that give the documents, made first, so that no run's start contains it."""
    folder = study.to / "documents"
    shutil.rmtree(folder, ignore_errors=True)
    write_documents(folder, tokenizer, DOCUMENTS, study.seq_len, "benchmarks/step_profile.py")
    return ["data=files", f"data.path={folder}"]


def write_documents(folder: Path, tokenizer: Tokenizer, number: int, seq_len: int, made_by: str) -> None:
    """Shards of `number` documents of seq_len inputs each, of tokens that are as frequent as words are (Zipf)."""
    folder.mkdir(parents=True)
    generator = np.random.default_rng(0)
    cumulated = np.cumsum(1 / np.arange(1, tokenizer.vocab_size + 1))
    draws = generator.random((number, seq_len + 1)) * cumulated[-1]
    tokens = np.searchsorted(cumulated, draws).astype(tokenizer.dtype)
    shard = write_shard(folder, 0, list(tokens), [f"zipf-{i}" for i in range(number)])
    write_meta(folder, tokenizer, [shard], {"made_by": made_by})
    assert (folder / META).exists()


def _measured(study: Study, variant: str, root: Path, data: Sequence[str], limit: float) -> dict:
    """Speed, memory and milliseconds of one variant by the code in `root`, or why it failed."""
    folder = study.to / "runs" / variant.replace("/", "_").replace("=", "_")
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir(parents=True)
    first = study.warmup + study.steps
    last = first + study.profiled
    # The first step of a profile pays for its start.
    device, both = folder / "device.json", folder / "both.json"
    windows = f"{device}:device:{first}:{last},{both}:both:{last + 1}:{last + 1 + study.profiled}"
    command = [sys.executable, str(root / "benchmarks" / "profiled_train.py"), windows, f"run.dir={folder}"]
    cache = study.to.resolve() / "caches" / variant.split("/")[1]
    environment = os.environ | {f"{name}_CACHE_DIR": str(cache / name) for name in ("TORCHINDUCTOR", "TRITON")}
    log = folder.with_name(f"{folder.name}.log")
    with log.open("wb") as file:
        try:
            arguments = [*study.arguments(variant), *data]
            subprocess.run([*command, *arguments], stdout=file, stderr=file, env=environment, timeout=limit)
        except subprocess.TimeoutExpired:
            pass  # what was measured until then counts
    return _read(study, folder, log, limit)


def _read(study: Study, folder: Path, log: Path, limit: float) -> dict:
    """What a run left behind."""
    lines = train_lines(folder) if (folder / "metrics.jsonl").exists() else []
    counted = lines[study.warmup : study.warmup + study.steps]
    if len(counted) < study.steps:
        reason = failure_reason(log.read_text(encoding="utf-8", errors="replace"))
        return {"failed": f"{len(lines)} steps within {limit:.0f} s; {reason}"}
    row = {
        "attention": lines[0]["attention"],
        "start_seconds": float((folder / START_FILE).read_text(encoding="utf-8")),
        "first_step_seconds": lines[0]["seconds"],
        "step_milliseconds": 1000 * statistics.median(line["seconds"] for line in counted),
        **speeds(counted),
        "last_loss": counted[-1]["loss"],
    }
    both, device = folder / "both.json", folder / "device.json"
    if both.exists():
        events = read_json(both)["traceEvents"]
        row["milliseconds"] = milliseconds_by_kind(events, study.profiled)
        row["longest"] = longest_kernels(events, study.profiled)
    if device.exists():
        row["idle_share"] = idle_share(read_json(device)["traceEvents"])
    for trace in (both, device):
        trace.unlink(missing_ok=True)
    return row


if __name__ == "__main__":
    main()
