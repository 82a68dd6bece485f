"""Trains with sequences over several processes, for test_sequence_training.py: sequence_worker.py REPORT

For each arrangement of four processes along data x sequence and each ZeRO stage: what `reference` gives of one.
"""

from __future__ import annotations

import json
import sys
from pathlib import Path

import torch

from conf.exchange import BLOCKS, HEADS
from conf.schema import OFFLOAD, OFFLOAD_HEADS, DeepSpeedConfig, LRConfig, ModelConfig, OptimConfig, RunConfig
from data.packing import IGNORED, Batch
from moba.documents import Documents
from moba.kinds import Full, Moba, Sliding
from train.engine.optim import build_engine
from train.engine.world import World, init_world, leave, shutdown
from train.model.decoder import Decoder
from train.record.position_loss import PositionLoss
from train.step import train_step

VOCAB, LENGTH, STEPS, PACKS = 61, 96, 3, 2
ARRANGEMENTS = {
    "1x4": (4, HEADS),
    "2x2": (2, HEADS),
    "4x1": (1, HEADS),
    "1x4 by blocks": (4, BLOCKS),
    "2x2 by blocks": (2, BLOCKS),
}
"""Data x sequence -> processes per sequence, and what they exchange."""
PACK_LENGTHS = ([96], [1, 23, 72], [48, 48], [24, 1, 47, 24], [90, 5, 1], [25, 46, 25])
"""Documents that end at, before and after slices of 12, 24 or 48 tokens, one over all, some of one token."""


def build_model(mode: bool | str = False) -> Decoder:
    """Every kind of layer, blocks that are dropped, grouped heads that no slice of heads divides, key convolution, a
    layer without RoPE."""
    config = ModelConfig(
        hidden_size=18,
        num_layers=3,
        num_heads=6,
        num_kv_heads=3,
        head_dim=4,
        ffn_size=24,
        qk_norm=True,
        key_conv=3,
        rope_pattern="RRN",
        loss_tile=32,
        activation_checkpointing=mode,
    )
    model = Decoder(config, VOCAB)
    model.init_weights(seed=1)
    model.set_attention([Moba(8, 2, first_blocks=1), Full(), Sliding(11)])
    return model


def pack(step: int, index: int) -> Batch:
    number = step * PACKS + index
    generator = torch.Generator().manual_seed(number)
    tokens = torch.randint(0, VOCAB, (LENGTH + 1,), generator=generator)
    labels, lengths = tokens[1:].clone(), PACK_LENGTHS[number]
    labels[: 7 * number] = IGNORED
    positions = torch.cat([torch.arange(length) for length in lengths])
    return Batch(tokens[:-1], labels, positions, Documents.from_lengths(lengths))


def config_of(zero_stage: int, mode: bool | str) -> RunConfig:
    zero = {"reduce_bucket_size": 2000, "stage3_param_persistence_threshold": 17, "sub_group_size": 300}
    return RunConfig(
        model=ModelConfig(activation_checkpointing=mode),
        deepspeed=DeepSpeedConfig(zero_stage=zero_stage, precision="fp32", extra={"zero_optimization": zero}),
        optim=OptimConfig(lr=LRConfig(peak=1.0), weight_decay=0.1, grad_clip=0.3),
    )


def train(zero_stage: int, world: World, by: str, mode: bool | str = False) -> dict:
    """Three steps: the mean loss and gradient norm of each, and the curve of them all by position."""
    model = build_model(mode)
    model.set_sequence_axis(world.sequence_axis(by))
    engine = build_engine(model, config_of(zero_stage, mode), world)
    by_position, records = PositionLoss(LENGTH, world.device), []
    # With more processes than packs along the data axis some would have nothing: each step then has its packs twice.
    packs = max(PACKS, world.data_size)
    for step in range(STEPS):
        mine = [pack(step, i % PACKS) for i in range(world.data_rank, packs, world.data_size)]

        def observe(losses, batch):
            by_position.add(losses, batch.positions, batch.labels, batch.cu_seqlens)

        result = train_step(engine, mine, lr=0.01, world=world, on_losses=observe)
        loss = float(world.sum_over_data(result.loss_sum.clone())) / result.num_tokens
        records.append({"loss": loss, "grad_norm": float(result.grad_norm)})
    curve = by_position.all_reduce(world.data_group).curve()
    engine.destroy()
    return {"steps": records, "curve": curve.mean.tolist(), "se": curve.se.tolist()}


def main(report: Path) -> None:
    found = {}
    for name, (sequence_size, by) in ARRANGEMENTS.items():
        world = init_world("cpu", sequence_size)
        found[name] = {f"zero{stage}": train(stage, world, by) for stage in (0, 1, 2, 3)}
        found[name] |= {
            f"zero{stage} {mode}": train(stage, world, by, mode) for stage, mode in ((1, OFFLOAD), (3, OFFLOAD_HEADS))
        }
    if world.is_main:
        report.write_text(json.dumps(found))


if __name__ == "__main__":
    main(Path(sys.argv[1]))
    shutdown()
    leave(0)
