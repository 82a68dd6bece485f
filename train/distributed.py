"""Processes and devices: the one place that reads the environment and starts torch.distributed and DeepSpeed.

`init` works under torchrun and under plain python alike, and has to run before anything imports deepspeed: which
accelerator DeepSpeed picks, what it compiles and what it prints is decided at its import. The rest of the package
sees a `World` and the few collectives below. It also holds the flag that SIGTERM and Ctrl-C set.
"""

from __future__ import annotations

import os
import re
import signal
import socket
import sys
import threading
import warnings
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, NamedTuple

# Before torch loads OpenMP: threads that wait for each other give their core away instead of spinning. On a CPU that
# something else uses too, spinning makes a run ten times slower.
os.environ.setdefault("OMP_WAIT_POLICY", "passive")

import torch
import torch.distributed as dist

from conf.build import ConfigError

SIGNALS_TO_FORCE = 3
STUCK_SECONDS = 20  # torchrun kills 30 s after its SIGTERM
# How gloo and NCCL say that the process at the other end is gone. No type of error stands for that alone.
PEER_GONE = re.compile(r"(closed|reset) by (remote )?peer|Broken pipe|remote process exited|ncclRemoteError")


@dataclass(frozen=True)
class World:
    """This process among all of them."""

    rank: int
    world_size: int
    local_rank: int
    device: torch.device

    @property
    def is_main(self) -> bool:
        """True on the one process that prints and writes what is not per rank."""
        return self.rank == 0


class Launched(NamedTuple):
    """What torchrun says of this process; one process alone without torchrun."""

    rank: int
    world_size: int
    local_rank: int
    local_world_size: int


def launched() -> Launched:
    """Returns this process's place, before anything is started."""
    defaults = {"RANK": "0", "WORLD_SIZE": "1", "LOCAL_RANK": "0", "LOCAL_WORLD_SIZE": "1"}
    return Launched(*(int(os.environ.get(key, default)) for key, default in defaults.items()))


def init(device: str = "auto") -> World:
    """Returns this process's World, with torch.distributed (nccl on CUDA, gloo on CPU) and DeepSpeed's communication
    ready.

    `device` is "auto", "cpu" or "cuda". Raises ConfigError for a device that is not there. Without torchrun's
    variables it is a group of one process that opens no port.
    """
    kind = _device_kind(device)
    rank, world_size, local_rank, _ = launched()
    target = torch.device("cpu")
    if kind == "cuda":
        if local_rank >= torch.cuda.device_count():
            raise ConfigError(
                [
                    f"local rank {local_rank} has no GPU of its own: torch sees {torch.cuda.device_count()} on this "
                    "host. Start at most that many processes a host (torchrun --nproc_per_node)"
                ]
            )
        target = torch.device("cuda", local_rank)
        torch.cuda.set_device(target)
    if not dist.is_initialized():
        _start_process_group(kind, target, alone="WORLD_SIZE" not in os.environ)
    _start_deepspeed(kind)
    return World(rank, world_size, local_rank, target)


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
        options |= {"store": dist.HashStore(), "rank": 0, "world_size": 1}
    dist.init_process_group(backend, **options)


def _start_deepspeed(kind: str) -> None:
    """Imports deepspeed so that it neither compiles anything nor fills the screen, and hands it the process group."""
    if kind == "cpu":
        os.environ.setdefault("DS_ACCELERATOR", "cpu")
    os.environ.setdefault("LOCAL_RANK", "0")  # its engine insists on that one
    # It calls collectives that torch 2.13 deprecates, once a step and rank.
    warnings.filterwarnings("ignore", message=r"`torch\.distributed.*is deprecated", category=FutureWarning)
    import deepspeed
    import deepspeed.ops

    # On CPU it would build a shared-memory all-reduce with g++ (a minute, or an error without a compiler) that only its
    # inference path uses. Its own table of what can be built here is where to say no.
    deepspeed.ops.__compatible_ops__["deepspeed_shm_comm"] = False
    deepspeed.init_distributed(verbose=False)


def barrier() -> None:
    """Waits for all ranks."""
    dist.barrier()


def all_reduce_sum(tensor: torch.Tensor) -> torch.Tensor:
    """Returns `tensor`, summed over all ranks in place."""
    dist.all_reduce(tensor)
    return tensor


def any_rank(flag: torch.Tensor) -> torch.Tensor:
    """Returns a bool tensor on the flag's device: whether it is non-zero on any rank. No host synchronisation."""
    seen = flag.to(torch.int32)
    dist.all_reduce(seen, op=dist.ReduceOp.MAX)
    return seen.bool()


def broadcast_object(value: Any, src: int = 0) -> Any:
    """Returns rank `src`'s value on every rank (pickled between our own processes; small things only)."""
    box = [value]
    dist.broadcast_object_list(box, src=src)
    return box[0]


def gather_objects(value: Any) -> list[Any]:
    """Returns every rank's value, in order of rank, on every rank (small things only)."""
    values: list[Any] = [None] * dist.get_world_size()
    dist.all_gather_object(values, value)
    return values


def drop_if_empty(*names: str) -> None:
    """Unsets environment variables that are set to nothing, for libraries that stumble over that."""
    for name in names:
        if os.environ.get(name) == "":
            del os.environ[name]


def lost_peer(error: RuntimeError) -> bool:
    """Whether this is a collective that failed because another process of the run has ended.

    gloo raises a plain RuntimeError that names its source file, NCCL a DistBackendError. NCCL raises that for memory
    and mistaken use as well, so the text has to say it, too.
    """
    text = str(error)
    return (isinstance(error, dist.DistError) or "gloo/" in text) and PEER_GONE.search(text) is not None


def first_to_report() -> bool:
    """True in the first process of the run that asks, also when others, rank 0 among them, are gone: what counts is
    kept by torchrun. Without torchrun rank 0 would keep it, so there it is True in each."""
    if not (dist.is_initialized() and dist.is_torchelastic_launched()):
        return True
    try:
        return dist.distributed_c10d._get_default_store().add("reports", 1) == 1
    except RuntimeError:  # torchrun is gone, too
        return True


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


class PreemptionFlag:
    """Remembers that SIGTERM or SIGINT arrived, so that a run can end at the next step boundary with a checkpoint.

    `train_step` carries `requested` in its first all-reduce, so all ranks stop after the same step whichever got the
    signal. Under torchrun one Ctrl-C arrives twice (from the terminal and from the agent), so only a third signal is
    taken as impatience and interrupts at once.
    """

    def __init__(self, stuck: Callable[[str], None] = lambda name: None, seconds: float = STUCK_SECONDS) -> None:
        """`stuck(name of the signal)` is called from a thread where the flag is still installed `seconds` later. NCCL
        lets a process wait for one that is gone, and while it waits Python's handlers do not run."""
        self.received: str | None = None
        self._count = 0
        self._previous: dict[int, Any] = {}
        self._stuck, self._seconds = stuck, seconds

    @property
    def requested(self) -> bool:
        """True once a signal arrived in this process."""
        return self.received is not None

    def install(self) -> PreemptionFlag:
        """Returns self, having replaced the handlers of SIGTERM and SIGINT (main thread only)."""
        for number in (signal.SIGTERM, signal.SIGINT):
            self._previous[number] = signal.signal(number, self._handle)
        bell, self._ring = socket.socketpair()
        self._ring.setblocking(False)
        signal.set_wakeup_fd(self._ring.fileno(), warn_on_full_buffer=False)
        threading.Thread(target=self._watch, args=(bell,), daemon=True).start()
        return self

    def uninstall(self) -> None:
        """Puts the earlier handlers back."""
        for number, handler in self._previous.items():
            signal.signal(number, handler)
        if self._previous:
            signal.set_wakeup_fd(-1)
            self._ring.close()
        self._previous.clear()

    def _watch(self, bell: socket.socket) -> None:
        """Waits for a signal, then for the end. What wakes it is written by C code the moment a signal arrives."""
        with bell:
            if number := bell.recv(1):
                bell.settimeout(self._seconds)
                try:
                    while bell.recv(64):
                        pass
                except TimeoutError:
                    self._stuck(signal.Signals(number[0]).name)

    def _handle(self, number: int, frame: Any) -> None:
        self.received = self.received or signal.Signals(number).name
        self._count += 1
        if self._count >= SIGNALS_TO_FORCE:
            self.uninstall()
            raise KeyboardInterrupt
