"""What a configuration must know of the machine, and the rules that depend on it.

launch/ fills in `Hardware`; conf stays free of torch.
"""

from __future__ import annotations

from dataclasses import dataclass

from conf.build import Problems
from conf.numbers import format_length
from conf.schema import RunConfig

GPU_BACKENDS = ("flash", "triton", "cudnn")


@dataclass(frozen=True)
class Hardware:
    """What a run finds on the machine, as far as the configuration must know. launch/ fills it in."""

    num_gpus: int = 0
    """CUDA devices of this host."""
    world_size: int = 1
    """Processes of the run, one per GPU."""
    local_world_size: int = 1
    """Processes of the run on this host."""
    gpu_name: str | None = None
    """Name of the first CUDA device."""
    gpu_memory: int | None = None
    """Bytes of memory of one GPU; None = not known."""
    host_memory: int | None = None
    """Bytes of this host's memory; None = not known."""
    cores: int | None = None
    """Cores of this host that a run may use; None = not known."""
    cpu_flops: float | None = None
    """FLOP/s that large float32 matrix products make on this host, where a run is on its CPU; None = not known."""
    has_bf16: bool = True
    """The GPUs compute in bfloat16."""
    has_triton: bool = True
    """Triton can be imported."""

    def device(self, requested: str) -> str:
        """ "cuda" or "cpu": what run.device=`requested` means here."""
        return ("cuda" if self.num_gpus else "cpu") if requested == "auto" else requested


def divisors(number: int) -> str:
    """The divisors of `number`, for a message: all of them if few, else the first and the last."""
    found = [n for n in range(1, number + 1) if number % n == 0] if number <= 65536 else [1, number]
    return ", ".join(map(str, found if len(found) <= 12 else [*found[:10], "...", found[-1]]))


def refuse_bf16_at_stage_0(key: str, value: object, problems: Problems) -> None:
    hint = "DeepSpeed takes a step of its own before training in bf16 at ZeRO stage 0"
    problems.add(key, value, f"{hint}; use deepspeed=zero1, or deepspeed.precision=fp32")


def check_device(config: RunConfig, hardware: Hardware, problems: Problems) -> None:
    """Record choices that this machine does not have."""
    device = hardware.device(config.run.device)
    if device == "cuda" and hardware.num_gpus == 0:
        problems.add("run.device", "cuda", "no CUDA device was found; use run.device=cpu, or auto")
        return
    for name, stage in config.schedule.stages.items():
        key, backend = f"schedule.stages.{name}.attention.backend", stage.attention.backend
        if device == "cpu" and backend in GPU_BACKENDS:
            problems.add(key, backend, "needs a GPU and this run is on a CPU; use auto or torch")
        elif backend == "triton" and not hardware.has_triton:
            problems.add(key, backend, "triton is not installed; use flash or auto, or pip install triton")
        elif backend == "cudnn" and config.run.deterministic:
            problems.add(key, backend, "its gradients do not repeat, as run.deterministic=true asks; use flash or auto")
        elif backend == "cudnn" and not hardware.has_bf16:
            problems.add(key, backend, f"not on {hardware.gpu_name}, which is too old for it; use flash or auto")
    if device == "cpu":
        return
    if config.model.compile is True and not hardware.has_triton:
        problems.add("model.compile", True, "triton is not installed; use model.compile=false, or pip install triton")
    if hardware.local_world_size > hardware.num_gpus:
        problems.add(
            "nproc_per_node",
            hardware.local_world_size,
            f"this host has {hardware.num_gpus} GPUs, one per process; use --nproc_per_node={hardware.num_gpus}",
        )
    if config.deepspeed.precision == "bf16" and not hardware.has_bf16:
        problems.add(
            "deepspeed.precision", "bf16", f"{hardware.gpu_name} has no bfloat16; use deepspeed.precision=fp32"
        )
    if config.deepspeed.precision == "auto" and config.deepspeed.zero_stage == 0 and hardware.has_bf16:
        refuse_bf16_at_stage_0("deepspeed.zero_stage", 0, problems)


def check_world(config: RunConfig, world_size: int, problems: Problems) -> None:
    """The processes must divide into groups that share sequences, and each group must get the same number of whole
    micro-batches of every step."""
    shared = config.parallel.sequence
    if shared < 1:
        return  # said elsewhere
    if world_size % shared:
        alone = "; torchrun --nproc_per_node=N starts several, launch/plan.py num_gpus=N plans for them"
        hint = f"must divide the number of processes, {world_size}: {divisors(world_size)}"
        problems.add("parallel.sequence", shared, hint + (alone if world_size == 1 else ""))
        return
    groups = world_size // shared
    each = f" of {shared} processes" if shared > 1 else ""
    for name, stage in config.schedule.stages.items():
        seq_len, batch = stage.seq_len, stage.batch_tokens
        micro = seq_len if stage.micro_tokens is None else stage.micro_tokens
        if None in (seq_len, batch) or min(seq_len, batch, micro) < 1 or batch % micro or micro % seq_len:
            continue
        if batch // micro % groups:
            unit = micro * groups
            problems.add(
                f"schedule.stages.{name}.batch_tokens",
                format_length(batch),
                f"makes {batch // micro} micro-batches of {format_length(micro)} tokens, which {groups} "
                f"{'groups' + each if each else 'processes'} cannot share evenly; use "
                f"batch_tokens={format_length(-(-batch // unit) * unit)}, or {divisors(batch // micro)} "
                f"{'groups' if each else 'processes'}",
            )


def data_size(config: RunConfig, hardware: Hardware) -> int:
    """Groups of processes that have sequences of their own."""
    return max(hardware.world_size // config.parallel.sequence, 1)
