"""Peak memory of a run's start: how much each rank holds at most until the engine stands, before the first step.

    torchrun --nproc_per_node=2 benchmarks/start_memory.py deepspeed=zero3 [to=benchmarks/results/start_memory]

Overrides are those of launch/train.py, on top of a model of 1.0 billion parameters in float32 on the CPU. Memory is the
process's peak resident set (getrusage), of which what it held before the model was made is given apart.
"""

from __future__ import annotations

import json
import resource
import sys
import time
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))

from train.engine.world import init_world, leave, shutdown  # noqa: E402 - first: decides what torch reads

# isort: split
from benchmarks.pretrained import machine  # noqa: E402
from benchmarks.study import origin  # noqa: E402
from launch.config import load  # noqa: E402
from train.engine.collectives import gather_objects  # noqa: E402
from train.engine.optim import build_engine, build_model  # noqa: E402
from train.model.sizes import num_parameters  # noqa: E402

VOCAB = 32768
SHAPE = ["+exp=moba_32k", "model.hidden_size=2048", "model.num_layers=20", "model.num_heads=16", "model.ffn_size=5632",
         "model.num_kv_heads=4", "deepspeed.precision=fp32", "run.device=cpu"]  # fmt: skip


def peak_gib() -> float:
    """The most that was resident so far."""
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20


def main() -> None:
    given = dict(argument.split("=", 1) for argument in sys.argv[1:])
    target = Path(given.pop("to", ROOT / "benchmarks" / "results" / "start_memory"))
    world = init_world("cpu")
    config = load([*SHAPE, *(f"{key}={value}" for key, value in given.items())])
    before, start = peak_gib(), time.perf_counter()
    build_engine(build_model(config, VOCAB), config, world)
    ranks = gather_objects({"before_gib": before, "peak_gib": peak_gib(), "seconds": time.perf_counter() - start})
    if world.is_main:
        total = num_parameters(config.model, VOCAB)["total"]
        whole = total * 4 / 2**30
        stage, where = config.deepspeed.zero_stage, machine()
        print(f"{total:,} parameters in float32 ({whole:.2f} GiB), ZeRO {stage}, {where}")
        for rank, one in enumerate(ranks):
            extra = one["peak_gib"] - one["before_gib"]
            print(
                f"rank {rank}: peak {one['peak_gib']:.2f} GiB; the start took {extra:.2f}, {extra / whole:.2f} models"
            )
        body = {**origin(sys.argv[1:], None), "machine": where, "convention": __doc__}
        target.mkdir(parents=True, exist_ok=True)
        results = {"parameters": total, "world_size": world.world_size, "ranks": ranks}
        name = f"zero{stage}.json"
        (target / name).write_text(json.dumps(body | results, indent=1) + "\n")
    shutdown()


if __name__ == "__main__":
    main()
    leave(0)
