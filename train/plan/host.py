"""An estimate of host memory for the processes of one host; train/plan/memory.py says what is offloaded. No torch.

The constants are fitted to runs of benchmarks/longest_context.py on hosts of 16 and 32 cores, and within 10 % of them.
Their causes are inferred from differences: ZeRO 3, not compiled, used 3 GiB per process, all else 9 GiB on 16 cores and
15 on 32, whatever the model. Resident memory counts shared pages in every process, so a host needs somewhat less.
"""

from __future__ import annotations

from dataclasses import dataclass

from conf.hardware import Hardware
from conf.schema import OFFLOADED, RunConfig
from train.plan.memory import Memory, is_compiled, room, saving_bytes

PROCESS = 3 << 30  # torch, CUDA, libraries, data
COMPILER_WORKER = 3 << 27  # torch.compile starts one per core in each process, up to
MOST_WORKERS = 32
# Per token that a process computes at a time, where no activations are offloaded.
KEPT_TOKEN = 8 << 10
RECOMPUTED_TOKEN = 14 << 10


@dataclass(frozen=True)
class HostMemory:
    """Bytes of main memory for all processes of one host."""

    offloaded: int
    """Weights, optimizer and layers' inputs that the configuration puts there."""
    own: int
    """Of the processes themselves; while weights are initialised, before anything is offloaded, if that is more."""
    saving: int
    """What asynchronous saves copy into."""

    @property
    def running(self) -> int:
        """Before the first checkpoint."""
        return self.offloaded + self.own

    @property
    def total(self) -> int:
        """From then on."""
        return self.running + self.saving


def host_memory(config: RunConfig, memory: Memory, parameters: int, tokens: int, hardware: Hardware) -> HostMemory:
    """The main memory of a run on GPUs: a settled configuration, of `parameters` in all, with the `memory` of one
    process, which computes `tokens` tokens at a time."""
    model, zero3 = config.model, config.deepspeed.zero_stage == 3
    workers = min(hardware.cores or MOST_WORKERS, MOST_WORKERS) if is_compiled(model, config.deepspeed) else 0
    own = PROCESS + workers * COMPILER_WORKER
    if model.activation_checkpointing not in OFFLOADED:
        own += tokens * (RECOMPUTED_TOKEN if model.activation_checkpointing is True else KEPT_TOKEN)
    drawn = PROCESS + (0 if zero3 else 4 * parameters)
    local, save = hardware.local_world_size, saving_bytes(config, parameters, hardware.world_size)
    return HostMemory(local * memory.host, local * max(own, drawn - memory.host), local * save)


def lacks(host: int, hardware: Hardware) -> bool:
    """Whether `host` bytes are known to exceed the host's memory."""
    return hardware.host_memory is not None and host > room(hardware.host_memory)
