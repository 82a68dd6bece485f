"""What the engine tests share: a small model, batches as a function of (step, rank), a reference, launches."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from functools import lru_cache
from pathlib import Path
from typing import Any

import torch

from conf.schema import DeepSpeedConfig, LRConfig, ModelConfig, OptimConfig, RunConfig, RunSection
from data.packing import IGNORED, Batch
from moba.documents import Documents
from moba.kinds import Moba
from train.model.decoder import Decoder

ROOT = Path(__file__).resolve().parents[2]
VOCAB, LENGTH = 61, 48
SAVE_AT, SWITCH_AT, LAST = 3, 5, 6
GRAD_CLIP = 0.3

BAD = ("nan", "inf", "gradient", "spike of the loss", "spike of the norm")

# name -> stage, precision, optimizer state in host memory
ENGINES = {
    "z0": (0, "fp32", False),
    "z1": (1, "fp32", False),
    "z2": (2, "fp32", False),
    "z3": (3, "fp32", False),
    "z1-bf16": (1, "bf16", False),
    "z1-bf16-spikes": (1, "bf16", False),
    "z2-bf16": (2, "bf16", False),
    "z3-bf16": (3, "bf16", False),
    "z2-offload": (2, "fp32", True),
    "z3-bf16-offload": (3, "bf16", True),
    "z3-compiled": (3, "fp32", False),
}
COMPILED = "z3-compiled"
ON_DEVICE = "z1-bf16"  # the one that is not asked about spikes, and decides about a step on the device


def bad_kinds(name: str) -> tuple[str, ...]:
    return BAD[:3] if name == ON_DEVICE else BAD


def build_model(compile: bool = False) -> Decoder:
    """A decoder with every kind of parameter: tied embeddings, biases, norms, grouped keys, a key convolution."""
    shape = {"hidden_size": 16, "num_layers": 1, "num_heads": 2, "num_kv_heads": 1, "head_dim": 8, "ffn_size": 24}
    config = ModelConfig(**shape, qkv_bias=True, key_conv=3, loss_tile=32, compile=compile)
    model = Decoder(config, VOCAB)
    model.init_weights(seed=1)
    model.set_attention([Moba(block_size=8, top_k=2)])
    return model


def config_of(name: str) -> RunConfig:
    stage, precision, offload = ENGINES[name]
    # Thresholds and buckets below the model's size, or nothing would be partitioned at stage 3 and no bucket be full.
    zero = {"reduce_bucket_size": 500, "allgather_bucket_size": 500}
    if stage == 3:
        zero = {"reduce_bucket_size": 2000, "stage3_param_persistence_threshold": 17, "sub_group_size": 300}
    deepspeed = DeepSpeedConfig(
        zero_stage=stage, precision=precision, offload_optimizer=offload, extra={"zero_optimization": zero}
    )
    return RunConfig(
        run=RunSection(on_spike="off" if name == ON_DEVICE else "skip"),  # skip: the optimizer that takes a veto
        model=ModelConfig(compile=name == COMPILED),
        deepspeed=deepspeed,
        optim=OptimConfig(lr=LRConfig(peak=1.0), weight_decay=0.1, grad_clip=GRAD_CLIP),
    )


def learning_rate(step: int) -> float:
    return 0.01 * (1 - step / 16)


def pack(step: int, index: int) -> Batch:
    """Pack `index` of a step; packs have different numbers of valid labels, so a mean of means would be wrong."""
    generator = torch.Generator().manual_seed(1000 * step + index)
    tokens = torch.randint(0, VOCAB, (LENGTH + 1,), generator=generator)
    labels = tokens[1:].clone()
    labels[: (7 * step + 11 * index) % (LENGTH - 1)] = IGNORED
    positions = torch.arange(LENGTH)
    return Batch(tokens[:-1], labels, positions, Documents.from_lengths([LENGTH]))


def num_packs(step: int) -> int:
    """Packs of a step: the batch changes on the way, as between stages."""
    return 4 if step < SWITCH_AT else 2


def micro_batches(step: int, rank: int, world_size: int) -> list[Batch]:
    return [pack(step, m * world_size + rank) for m in range(num_packs(step) // world_size)]


@lru_cache
def reference(reset: bool = True) -> list[dict[str, float]]:
    """Loss, gradient norm and valid tokens of each step in a plain torch loop over the whole batch at once; behind LAST
    two more steps, with `reset` from a new optimizer."""
    model = build_model()
    matrices = [p for p in model.parameters() if p.ndim >= 2]
    others = [p for p in model.parameters() if p.ndim < 2]
    records = []
    for step in range(LAST + 3):
        if step == 0 or (reset and step == LAST + 1):
            groups = [{"params": matrices, "weight_decay": 0.1}, {"params": others, "weight_decay": 0.0}]
            optimizer = torch.optim.AdamW(groups, betas=(0.9, 0.95))
        packs = [pack(step, i) for i in range(num_packs(step))]
        losses = torch.cat([model(b.tokens, b.positions, b.documents, b.labels) for b in packs])
        num_tokens = sum(int((b.labels != IGNORED).sum()) for b in packs)
        loss = losses.sum() / num_tokens
        loss.backward()
        norm = torch.nn.utils.clip_grad_norm_(model.parameters(), GRAD_CLIP)
        for group in optimizer.param_groups:
            group["lr"] = learning_rate(step)
        optimizer.step()
        optimizer.zero_grad()
        records.append({"loss": loss.item(), "grad_norm": float(norm), "num_tokens": num_tokens})
    return records


def launch(role: str, directory: Path, world_sizes: tuple[int, ...] = (1, 2)) -> dict[int, dict[str, Any]]:
    """Returns world size -> report of engine_worker.py, run at once: one rank in plain python, more by torchrun."""
    clean = {k: v for k, v in os.environ.items() if k not in ("RANK", "WORLD_SIZE", "LOCAL_RANK", "MASTER_PORT")}
    env = clean | {"PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
    started = {}
    for world_size in world_sizes:
        command = [sys.executable, str(Path(__file__).with_name("engine_worker.py")), role, str(directory)]
        if world_size > 1:
            torchrun = ["-m", "torch.distributed.run", "--standalone", f"--nproc_per_node={world_size}"]
            command[1:1] = torchrun
        pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE, "text": True}
        started[world_size] = subprocess.Popen(command, env=env, **pipes)
    reports = {}
    for world_size, process in started.items():
        stdout, stderr = process.communicate(timeout=280)
        report = directory / f"{role}-{world_size}.json"
        # The report, written before the process group ends, is what counts: rarely a rank aborts in its teardown.
        assert report.exists(), f"{stdout[-3000:]}\n{stderr[-6000:]}"
        reports[world_size] = json.loads(report.read_text()) | {"stdout": stdout, "stderr": stderr}
    return reports


def other_stage(name: str) -> str | None:
    """An engine of another ZeRO stage and the same precision, whose checkpoint the engine `name` shall continue."""
    return {"z1": "z3", "z3": "z1", "z0": "z2", "z2-bf16": "z3-bf16", "z3-bf16": "z1-bf16"}.get(name)
