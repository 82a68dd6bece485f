"""Keys and options of other programs, and what is meant by them here."""

from __future__ import annotations

from dataclasses import fields, is_dataclass
from typing import Any, get_type_hints

from conf.build import collected
from conf.schema import RunConfig

# Other programs' word -> what to write instead.
MEANT = {
    "lr": "optim.lr.peak=<rate>",
    "learning_rate": "optim.lr.peak=<rate>",
    "lr_scheduler": "optim.lr.kind=cosine|wsd|linear|constant",
    "lr_scheduler_type": "optim.lr.kind=cosine|wsd|linear|constant",
    "warmup_steps": "optim.lr.warmup_tokens=<tokens or share> (in tokens, not steps)",
    "warmup_ratio": "optim.lr.warmup_tokens=<share> such as 1%",
    "clip_grad": "optim.grad_clip=<norm>",
    "max_grad_norm": "optim.grad_clip=<norm>",
    "gradient_clipping": "optim.grad_clip=<norm>",
    "batch_size": "schedule.batch_tokens=<tokens> (tokens per step over all processes, not sequences)",
    "global_batch_size": "schedule.batch_tokens=<tokens> (tokens per step over all processes, not sequences)",
    "train_batch_size": "schedule.batch_tokens=<tokens> (tokens per step over all processes, not sequences)",
    "per_device_train_batch_size": "schedule.micro_tokens=<tokens> (tokens a process computes at a time)",
    "micro_batch_size": "schedule.micro_tokens=<tokens> (tokens a process computes at a time)",
    "gradient_accumulation_steps": "schedule.micro_tokens=<tokens>: the number of accumulation steps is "
    "batch_tokens / micro_tokens / processes",
    "max_steps": "schedule.tokens=<tokens> (progress is counted in tokens)",
    "train_steps": "schedule.tokens=<tokens> (progress is counted in tokens)",
    "num_steps": "schedule.tokens=<tokens> (progress is counted in tokens)",
    "epochs": "schedule.tokens=<tokens> (the plan shows the number of epochs)",
    "num_train_epochs": "schedule.tokens=<tokens> (the plan shows the number of epochs)",
    "max_length": "schedule.seq_len=<length>",
    "max_seq_len": "schedule.seq_len=<length>",
    "max_seq_length": "schedule.seq_len=<length>",
    "seq_length": "schedule.seq_len=<length>",
    "context_length": "schedule.seq_len=<length>",
    "topk": "schedule.top_k=<blocks>",
    "moba_topk": "schedule.top_k=<blocks>",
    "moba_chunk_size": "schedule.block_size=<tokens>",
    "wandb": "logging.wandb=auto|online|offline|disabled",
    "report_to": "logging.wandb=auto|online|offline|disabled",
    "wandb_project": "logging.project=<name>",
    "output_dir": "run.dir=<directory>",
    "out_dir": "run.dir=<directory>",
    "save_dir": "run.dir=<directory>",
    "run_name": "run.name=<name>",
    "experiment": "+exp=<name>",
    "config": "+exp=<name>; your own files: hydra.searchpath=[file:///<folder>] +exp=<name>",
    "config_file": "+exp=<name>; your own files: hydra.searchpath=[file:///<folder>] +exp=<name>",
    "resume": "the same command again: it continues from the newest checkpoint in run.dir",
    "resume_from_checkpoint": "the same command again: it continues from the newest checkpoint in run.dir",
    "model_name_or_path": "model=from_source init.source=<directory or hub id>",
    "pretrained": "model=from_source init.source=<directory or hub id>",
    "dataset": "data=files data.path=<files>, or data=hub data.name=<owner/name>",
    "dataset_name": "data=hub data.name=<owner/name>",
    "train_file": "data=files data.path=<files>",
    "save_steps": "checkpoint.every_tokens=<tokens or share>",
    "eval_steps": "eval.every_tokens=<tokens or share>",
    "logging_steps": "logging.every_tokens=<tokens>",
    "save_total_limit": "checkpoint.keep=<number>",
    "gradient_checkpointing": "model.activation_checkpointing=true",
    "bf16": "deepspeed.precision=bf16",
    "fp16": "deepspeed.precision=bf16 or fp32",
    "dtype": "deepspeed.precision=bf16|fp32",
    "zero": "deepspeed=zero1|zero2|zero3",
    "zero_stage": "deepspeed=zero1|zero2|zero3",
    "num_gpus": "torchrun --nproc_per_node=<GPUs> launch/train.py (num_gpus= is an argument of launch/plan.py)",
    "gpu_memory": "launch/plan.py gpu_memory=80GB (it describes a machine for the plan)",
    "host_memory": "launch/plan.py host_memory=1TB (it describes a machine for the plan)",
    "gpu_name": "launch/plan.py gpu_name=H100 (it describes a machine for the plan)",
    "sequence_parallel_size": "parallel.sequence=<GPUs that share a sequence>",
    "context_parallel_size": "parallel.sequence=<GPUs that share a sequence>",
    "num_nodes": "torchrun --nnodes=<hosts>",
    "nproc_per_node": "torchrun --nproc_per_node=<GPUs> launch/train.py",
}


def meant_by(name: str) -> str | None:
    """What is meant by a key that is none here, as a user would write it; None if nobody knows."""
    name = name.strip().lstrip("-+").replace("-", "_").lower()
    if name in MEANT:
        return MEANT[name]
    same = [key for key in leaves(RunConfig) if key.rpartition(".")[2] == name]
    return " or ".join(f"{key}=..." for key in same[:3]) or None


def leaves(cls: type, path: str = "") -> list[str]:
    """Every key of a configuration below `cls` that needs no name of the user's: schedule.tokens, optim.lr.peak."""
    hints: dict[str, Any] = get_type_hints(cls)
    collector, options = collected(cls)
    keys = [path + name for name in options]
    for field in fields(cls):
        hint = hints[field.name]
        if field.name == collector:
            continue
        if isinstance(hint, type) and is_dataclass(hint):
            keys += leaves(hint, f"{path}{field.name}.")
        else:
            keys.append(path + field.name)
    return keys
