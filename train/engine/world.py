"""This process in the run: its device, the process group and DeepSpeed's communication. The one module that reads
environment variables.

Import it before torch: it sets variables that torch and its libraries read when they are imported.
"""

from __future__ import annotations

import atexit
import os
import re
import sys
import warnings
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple, NoReturn

# Before torch loads OpenMP: threads that wait for each other give their core away instead of spinning. On a CPU that
# something else uses too, spinning makes a run ten times slower.
os.environ.setdefault("OMP_WAIT_POLICY", "passive")
# Otherwise NCCL's heartbeat monitor asks torchrun's store every second whether to dump its flight recorder, and fills
# the screen once torchrun is gone. Its other work, ending a process that hangs, does not depend on this.
os.environ.setdefault("TORCH_NCCL_DUMP_ON_TIMEOUT", "0")

import torch
import torch.distributed as dist

from conf.build import ConfigError
from conf.exchange import BLOCKS
from conf.words import cut
from moba.sequence import BlockAxis, SequenceAxis


@dataclass(frozen=True)
class World:
    """This process among the ranks of the run, which form a grid of two axes: data x sequence."""

    rank: int
    world_size: int
    local_rank: int
    device: torch.device
    sequence_size: int = 1
    """Number of ranks that share a sequence; they are consecutive."""
    sequence_group: dist.ProcessGroup | None = None
    """Those ranks, if there are several."""
    data_group: dist.ProcessGroup | None = None
    """Ranks that hold the same slice of different sequences; None: all."""

    @property
    def data_size(self) -> int:
        """Size of the data axis: groups of ranks with different sequences."""
        return self.world_size // self.sequence_size

    @property
    def data_rank(self) -> int:
        """Index of this process's group on the data axis."""
        return self.rank // self.sequence_size

    @property
    def sequence_rank(self) -> int:
        """Index of this process's slice of its group's sequences."""
        return self.rank % self.sequence_size

    def sequence_axis(self, by: str) -> SequenceAxis | None:
        """The ranks that share a sequence with this one, by heads or blocks (conf/exchange.py), for the model; None if
        there is none."""
        if self.sequence_group is None:
            return None
        axis = BlockAxis if by == BLOCKS else SequenceAxis
        return axis(self.sequence_group, self.sequence_rank, self.sequence_size)

    def sum_over_data(self, tensor: torch.Tensor) -> torch.Tensor:
        """`tensor`, summed in place over the data axis; all ranks of a sequence must hold the same."""
        dist.all_reduce(tensor, group=self.data_group)
        return tensor

    @property
    def is_main(self) -> bool:
        """True on the one process that prints and writes what is not per rank."""
        return self.rank == 0


class Launched(NamedTuple):
    """torchrun's variables for this process; a single process without torchrun."""

    rank: int
    world_size: int
    local_rank: int
    local_world_size: int


def launch_environment() -> Launched:
    """Returns this process's ranks, before anything is started. Exits with a message and code 2 where the variables
    contradict each other."""
    defaults = {"RANK": "0", "WORLD_SIZE": "1", "LOCAL_RANK": "0", "LOCAL_WORLD_SIZE": "1"}
    given = {key: os.environ.get(key, default) for key, default in defaults.items()}
    if all(re.fullmatch(r"\d{1,9}", text) for text in given.values()):
        launched = Launched(*map(int, given.values()))
        if launched.rank < launched.world_size and launched.local_world_size > 0:
            return launched
    found = " ".join(f"{key}={text[:20]}" for key, text in given.items())
    hint = "torchrun sets these for several processes; for one, unset them"
    print(f"error: {found} in the environment: {hint}", file=sys.stderr, flush=True)
    raise SystemExit(2)


def own_cores() -> int:
    """This process's share of the cores that its host lets it use; at least 1."""
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    return max(1, cores // launch_environment().local_world_size)


def init_world(device: str = "auto", sequence_size: int = 1) -> World:
    """Returns this process's World, with torch.distributed (nccl on CUDA, gloo on CPU) and DeepSpeed's communication
    ready.

    `device` is "auto", "cpu" or "cuda"; `sequence_size` ranks, a divisor of all, share each sequence. Raises
    ConfigError for a device that is not there. Without torchrun's variables it is a group of one process that opens no
    port.
    """
    kind = _device_kind(device)
    rank, world_size, local_rank, _ = launch_environment()
    target = torch.device("cpu")
    if kind == "cuda":
        if local_rank >= torch.cuda.device_count():
            raise ConfigError(
                [
                    f"local rank {local_rank} has no GPU of its own: torch sees {torch.cuda.device_count()} on this "
                    "host. Start at most that many processes per host (torchrun --nproc_per_node)"
                ]
            )
        target = torch.device("cuda", local_rank)
        torch.cuda.set_device(target)
    if not dist.is_initialized():
        _start_process_group(kind, target, alone="WORLD_SIZE" not in os.environ)
    _start_deepspeed(kind)
    if sequence_size == 1:
        return World(rank, world_size, local_rank, target)
    assert world_size % sequence_size == 0, (world_size, sequence_size)
    ranks = torch.arange(world_size).view(-1, sequence_size)
    groups = [_own_group(axis.tolist(), rank) for axis in (ranks, ranks.T)]
    return World(rank, world_size, local_rank, target, sequence_size, *groups)


def _own_group(parts: list[list[int]], rank: int) -> dist.ProcessGroup:
    """The group of the part with this rank; every rank creates all groups, in the same order."""
    groups = [dist.new_group(part) for part in parts]
    own = next(group for group, part in zip(groups, parts) if rank in part)
    assert isinstance(own, dist.ProcessGroup)
    return own


def _device_kind(device: str) -> str:
    if device not in ("auto", "cpu", "cuda"):
        raise ConfigError([f"run.device={device!r}: choose one of auto, cpu, cuda"])
    has_cuda = torch.cuda.is_available()
    if device == "cuda" and not has_cuda:
        raise ConfigError(["run.device=cuda: torch sees no CUDA device here; use run.device=cpu or auto"])
    return "cuda" if has_cuda and device != "cpu" else "cpu"


def _start_process_group(kind: str, target: torch.device, alone: bool) -> None:
    backend = "nccl" if kind == "cuda" else "gloo"
    # device_id tells NCCL which GPU a collective without tensors (barrier) belongs to.
    options: dict[str, Any] = {"device_id": target} if kind == "cuda" else {}
    if alone:
        store = dist.HashStore()  # pyright: ignore[reportPrivateImportUsage]  # documented, but not in __all__
        options |= {"store": store, "rank": 0, "world_size": 1}
    dist.init_process_group(backend, **options)


def _start_deepspeed(kind: str) -> None:
    """Imports deepspeed so that it neither compiles anything nor fills the screen, and hands it the process group."""
    if kind == "cpu":
        os.environ.setdefault("DS_ACCELERATOR", "cpu")
    os.environ.setdefault("LOCAL_RANK", "0")  # its engine requires it
    # It calls collectives that torch 2.13 deprecates, once per step and rank.
    warnings.filterwarnings("ignore", message=r"`torch\.distributed.*is deprecated", category=FutureWarning)
    import deepspeed
    import deepspeed.ops

    # On CPU it would build a shared-memory all-reduce with g++ (a minute, or an error without a compiler) that only its
    # inference path uses. Its table of compatible ops turns that off.
    deepspeed.ops.__compatible_ops__["deepspeed_shm_comm"] = False
    deepspeed.init_distributed(verbose=False)


def one_thread_each() -> None:
    """Lets processes started from this one compute in one thread each, unless the environment says otherwise."""
    os.environ.setdefault("OMP_NUM_THREADS", "1")


def check_variable(name: str, known: Sequence[str]) -> None:
    """ValueError if an environment variable is set to none of `known`, whatever its case."""
    value = os.environ.get(name, known[0])
    if value.lower() not in known:
        raise ValueError(f"{name}={cut(value)}: choose one of {', '.join(known)}, or unset it")


def drop_if_empty(*names: str) -> None:
    """Unsets empty environment variables, for libraries that mishandle them."""
    for name in names:
        if os.environ.get(name) == "":
            del os.environ[name]


def shutdown() -> None:
    """Ends the process group after all ranks arrived, with everything printed.

    Leaving it to the interpreter's exit lets a fast rank tear down connections that a slow one still waits on, which
    now and then aborts the process after all work was done.
    """
    if dist.is_initialized():
        dist.barrier()
        dist.destroy_process_group()
    sys.stdout.flush()
    sys.stderr.flush()


def leave(code: int) -> NoReturn:
    """Ends the process with this exit code: exit handlers run, the interpreter is not finalised.

    Threads of the process group may still be releasing tensors, and one that does so during finalisation aborts the
    process: now and then a finished run would fail.
    """
    atexit._run_exitfuncs()
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(code)
