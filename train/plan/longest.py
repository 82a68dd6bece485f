"""The longest context that fits a model, a number of GPUs and a way to share sequences: `launch/plan.py longest`. No
torch.
"""

from __future__ import annotations

import textwrap
from collections.abc import Sequence
from dataclasses import dataclass, replace

from conf.hardware import Hardware
from conf.numbers import format_length, format_memory
from conf.schema import RunConfig
from train.plan.automatic import needs, settle_for
from train.plan.host import HostMemory, lacks
from train.plan.memory import Memory, room
from train.schedule import build_schedule

SHORTEST, LONGEST = 32 * 1024, 2**30
WIDTH = 118
HEADS = ("model", "GPUs", "sequence", "longest", "engine", "activations", "GPU", "host")


@dataclass(frozen=True)
class Longest:
    """A row of the table: the longest context, and the first of the engines with which it fits."""

    model: str
    num_gpus: int
    sequence: int
    """GPUs that share a sequence."""
    seq_len: int | None
    """None: not even SHORTEST fits."""
    engine: str = ""
    recomputation: bool | str = False
    """What model.activation_checkpointing becomes."""
    memory: Memory | None = None
    host: HostMemory | None = None

    def cells(self) -> tuple[str, ...]:
        """The row as text."""
        start = (self.model, str(self.num_gpus), str(self.sequence))
        if self.seq_len is None or self.memory is None or self.host is None:
            return (*start, f"below {format_length(SHORTEST)}", "", "", "", "")
        sizes = (format_memory(self.memory.total), format_memory(self.host.total))
        return (*start, format_length(self.seq_len), self.engine, str(self.recomputation).lower(), *sizes)


def longest(
    model: str, engines: dict[str, RunConfig], num_gpus: int, sequence: int, vocab_size: int, hardware: Hardware
) -> Longest:
    """The longest context, doubled from SHORTEST on, at which one of the `engines` (name -> frozen configuration, the
    cheapest first) fits, with one sequence per `sequence` of `num_gpus` GPUs on a host like that of `hardware`, whose
    gpu_memory is known."""
    there = replace(hardware, num_gpus=num_gpus, world_size=num_gpus, local_world_size=num_gpus)
    best, seq_len = Longest(model, num_gpus, sequence, None), SHORTEST
    while seq_len <= LONGEST:
        tried = (_fits(name, config, sequence, seq_len, vocab_size, there) for name, config in engines.items())
        found = next(filter(None, tried), None)
        if found is None:
            break
        best = replace(best, seq_len=seq_len, **found)
        seq_len *= 2
    return best


def _fits(
    name: str, config: RunConfig, sequence: int, seq_len: int, vocab_size: int, hardware: Hardware
) -> dict | None:
    """What was chosen and what it takes, if all stages of the run fit at this length."""
    config = replace(config, parallel=replace(config.parallel, sequence=sequence))
    stages = [replace(stage, seq_len=seq_len, micro_tokens=seq_len) for stage in build_schedule(config).stages]
    config, _ = settle_for(config, stages, vocab_size, hardware)
    memory, host = needs(config, stages, vocab_size, hardware)
    assert hardware.gpu_memory is not None
    if memory.total > room(hardware.gpu_memory) or lacks(host.total, hardware):
        return None
    recomputation = config.model.activation_checkpointing
    return {"engine": name, "recomputation": recomputation, "memory": memory, "host": host}


def table(rows: Sequence[Longest], hardware: Hardware) -> str:
    """The rows as a Markdown table, and what it assumes."""
    assert hardware.gpu_memory is not None
    gpu = format_memory(hardware.gpu_memory)
    host = "any" if hardware.host_memory is None else format_memory(hardware.host_memory)
    cells = [HEADS, *(row.cells() for row in rows)]
    widths = [max(len(row[i]) for row in cells) for i in range(len(HEADS))]
    lines = ["| " + " | ".join(cell.ljust(width) for cell, width in zip(row, widths)) + " |" for row in cells]
    lines.insert(1, "|" + "|".join("-" * (width + 2) for width in widths) + "|")
    about = (
        f"Estimates for GPUs of {gpu} and {host} of main memory on one host, a factor of two apart: one sequence at a "
        "time, shared by `sequence` GPUs (parallel.sequence); activations as model.activation_checkpointing=auto "
        "chooses; `engine` is deepspeed=; GPU: of one, host: of all processes, with what asynchronous saves take."
    )
    return "\n".join([*lines, "", *textwrap.wrap(about, WIDTH)])
