"""What the data costs a rank: planning a step of 256 sequences as one rank of 256, and making batches while it trains.

    python benchmarks/loader.py to=benchmarks/results/loader

Needs no GPU and no other process: a rank plans from lengths alone and is told nothing by the others, so one process
costs what each of 256 does. Prints two tables and writes them with the raw numbers into `to`.
"""

from __future__ import annotations

import os
import platform
import statistics
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import numpy as np
import torch

from benchmarks.study import origin
from conf.schema import DataConfig, SourceConfig
from data.loader import Loader
from data.mixture import Mixture
from data.packing import Packer
from data.sources import Source, open_sources
from evals.results import write_json
from launch.cli import exits_on, key_values

RANKS, SEQUENCES, INTERLEAVE = 256, 256, 16
CONVENTION = (
    f"Planning: {SEQUENCES} sequences a step, interleave {INTERLEAVE}, medians over {{steps}} steps after the first, "
    "wall time. 'all' makes the windows of every sequence; 'own' those of one sequence and skips the others, as the "
    f"slowest of ranks 0, {RANKS // 2} and {RANKS - 1} of {RANKS}. 'first' also shuffles the sources, done once "
    "a stage and an epoch. Making, with the shipped books: 'asked for' is next_step with nothing made ahead, 'waited' "
    "next_step after a step of training, for which matrix products stand in; their time without and with a loader at "
    "work beside them is 'training'. next_step also starts the thread that makes the step after it, and has to share "
    "Python with it from then on."
)
KEYS = {
    "to": "folder of the results",
    "steps": "steps of each row (default 30)",
    "commit": "commit of the code, where this is no git checkout",
}


@exits_on(ValueError, OSError)
def main() -> None:
    """The command; see the module's text."""
    values = key_values(sys.argv[1:], KEYS, about=__doc__, required=["to"])
    to, steps = Path(values["to"]), int(values.get("steps", 30))
    with tempfile.TemporaryDirectory() as cache:
        config = DataConfig(sources={"main": SourceConfig(path="embedded")}, cache_dir=cache)
        books = open_sources(config, log=print)["main"]
        planning = [
            {"corpus": name, "seq_len": seq_len, **planned(lengths, is_chat, seq_len, steps)}
            for name, (lengths, is_chat) in corpora(books).items()
            for seq_len in (8192, 32768)
        ]
        making = [made(books, world_size, batch, steps) for world_size, batch in ((RANKS, SEQUENCES), (1, 8))]
    record = {
        **origin(sys.argv[1:], values.get("commit")),
        "hardware": f"{platform.machine()} CPU, {os.cpu_count()} cores, {torch.get_num_threads()} thread(s)",
        "versions": f"python {platform.python_version()}, numpy {np.__version__}, torch {torch.__version__}",
        "convention": CONVENTION.format(steps=steps),
        "planning": planning,
        "making": making,
    }
    write_json(to / "results.json", record)
    text = tables(record)
    (to / "table.md").write_text(text + "\n", encoding="utf-8")
    print(text)


def corpora(books: Source) -> dict[str, tuple[np.ndarray, bool]]:
    """Name -> (tokens of each document, whether they are conversations)."""
    rng = np.random.default_rng(0)

    def log_normal(count: int, mean: float, sigma: float) -> np.ndarray:
        return np.maximum(2, rng.lognormal(mean, sigma, count).astype(np.int64))

    return {
        "the shipped books, bytes": (books.lengths, False),
        "100K long documents, log-normal": (log_normal(100_000, 11, 1), False),
        "1M documents, log-normal": (log_normal(1_000_000, 6.5, 1.2), False),
        "1M conversations, log-normal": (log_normal(1_000_000, 6.2, 0.8), True),
    }


def planned(lengths: np.ndarray, is_chat: bool, seq_len: int, steps: int) -> dict:
    """Milliseconds of planning a step, and what is in one."""
    conversations = {"main": np.minimum(lengths - 1, seq_len)} if is_chat else None

    def plan(ours: range) -> tuple[float, float, float]:
        mixture = Mixture({"main": lengths}, seed=0)
        mixture.set_mix({"main": 1.0})
        pieces, times = [], []
        for _ in range(steps + 1):
            began = time.perf_counter()
            packer = Packer(seq_len, mixture, pieces, INTERLEAVE, conversations)
            packer.skip(ours.start)
            for _ in ours:
                packer.next_pack()
            packer.skip(SEQUENCES - ours.stop)
            pieces = packer.pieces
            times.append(1e3 * (time.perf_counter() - began))
        return times[0], statistics.median(times[1:]), mixture.draws / (steps + 1)

    first, everything, draws = plan(range(SEQUENCES))
    own = [plan(range(rank, rank + 1))[1] for rank in (0, RANKS // 2, RANKS - 1)]
    return {"documents": round(draws, 1), "first_ms": first, "all_ms": everything, "own_ms": max(own)}


def made(books: Source, world_size: int, num_packs: int, steps: int) -> dict:
    """Milliseconds of making a rank's batches of 32K tokens each, when asked for and ahead."""
    loader = Loader({"main": books}, seed=0, rank=world_size // 2, world_size=world_size, interleave=INTERLEAVE)
    loader.set_stage(seq_len=32768, batch_tokens=32768 * num_packs, micro_tokens=32768, mix={"main": 1.0})
    x, asked, waited, alone, beside = torch.randn(256, 256), [], [], [], []

    def train() -> None:
        for _ in range(200):
            (x @ x).tanh_()

    loader.next_step()
    for _ in range(steps):
        loader.load_state_dict(loader.state_dict())  # throws away what was made ahead
        alone.append(milliseconds(train))
        asked.append(milliseconds(loader.next_step))
        beside.append(milliseconds(train))
        waited.append(milliseconds(loader.next_step))
    medians = {"asked_ms": asked, "waited_ms": waited, "alone_ms": alone, "beside_ms": beside}
    return {"ranks": world_size, "batches": num_packs // world_size} | {
        key: statistics.median(times) for key, times in medians.items()
    }


def milliseconds(work: Callable[[], object]) -> float:
    """How long it took, in wall time."""
    began = time.perf_counter()
    work()
    return 1e3 * (time.perf_counter() - began)


def tables(record: dict) -> str:
    """The results as markdown."""
    lines = [f"{record['hardware']}; {record['versions']}; commit {record['commit']}", "", f"`{record['command']}`", ""]
    lines += [record["convention"], "", "| corpus | length | documents a step | first, ms | all, ms | own, ms |"]
    lines += ["|---|---|---|---|---|---|"]
    for row in record["planning"]:
        times = " | ".join(f"{row[key]:.2f}" for key in ("first_ms", "all_ms", "own_ms"))
        lines.append(f"| {row['corpus']} | {row['seq_len'] // 1024}K | {row['documents']:,.0f} | {times} |")
    lines += [
        "",
        "| ranks | batches of 32K a step and rank | asked for, ms | waited, ms | training without, with, ms |",
    ]
    lines += ["|---|---|---|---|---|"]
    for row in record["making"]:
        lines.append(
            f"| {row['ranks']} | {row['batches']} | {row['asked_ms']:.2f} | {row['waited_ms']:.2f} | "
            f"{row['alone_ms']:.1f}, {row['beside_ms']:.1f} |"
        )
    return "\n".join(lines)


if __name__ == "__main__":
    main()
