"""An estimate of the memory one process needs, from the configuration alone.

Model states follow ZeRO's own accounting; activations are counted tensor by tensor for train/model/decoder.py.
Allocator fragmentation, NCCL and CUDA's own share are not in it: VERDICT_SHARE leaves them room. No torch.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from conf.schema import AUTO, OFFLOAD, DeepSpeedConfig, ModelConfig, RunConfig
from moba.kinds import AttentionSpec
from train.model.sizes import HEAD_GROUPS, head_dim, key_conv_widths, num_kv_heads, num_parameters
from train.schedule import Stage

VERDICT_SHARE = 0.92
REDUCE_BUCKET = 500_000_000
MASTER_AND_MOMENTS = 12
MOMENTS = 8


@dataclass(frozen=True)
class Memory:
    """Bytes a process needs on its device, and on the host where offloading puts some there."""

    weights: int
    gradients: int
    optimizer: int
    activations: int
    logits: int
    host: int

    @property
    def total(self) -> int:
        """Bytes on the device."""
        return self.weights + self.gradients + self.optimizer + self.activations + self.logits


def estimate_memory(
    model: ModelConfig,
    vocab_size: int,
    engine: DeepSpeedConfig,
    *,
    bf16: bool,
    world_size: int,
    micro_tokens: int,
    attention: tuple[AttentionSpec, ...],
    sequence_size: int = 1,
) -> Memory:
    """The memory of training `micro_tokens` tokens at a time with this plan of attention, a process of `world_size`, of
    which `sequence_size` share each sequence."""
    own_tokens = -(-micro_tokens // sequence_size)
    weights, gradients, optimizer = _states(num_parameters(model, vocab_size)["total"], engine, bf16, world_size)
    host = (optimizer if engine.offload_optimizer else 0) + (weights if engine.offload_params else 0)
    host += own_tokens * offloaded_bytes_per_token(model, bf16)
    return Memory(
        weights=0 if engine.offload_params else weights,
        gradients=gradients,
        optimizer=0 if engine.offload_optimizer else optimizer,
        activations=own_tokens * activation_bytes_per_token(model, attention, bf16),
        logits=_logits(model, vocab_size, min(model.loss_tile, own_tokens)),
        host=host,
    )


def most_memory(
    config: RunConfig,
    stages: Sequence[Stage],
    vocab_size: int,
    *,
    bf16: bool,
    world_size: int,
    one_sequence: bool = False,
) -> Memory:
    """The memory of the stage that needs most; with `one_sequence`, as if a micro-batch were no more than that."""
    estimates = (
        estimate_memory(
            config.model,
            vocab_size,
            config.deepspeed,
            bf16=bf16,
            world_size=world_size,
            micro_tokens=stage.seq_len if one_sequence else stage.micro_tokens,
            attention=stage.attention,
            sequence_size=config.parallel.sequence,
        )
        for stage in stages
    )
    return max(estimates, key=lambda memory: memory.total)


def room(gpu_memory: int) -> int:
    """Bytes of a GPU's memory that an estimate may fill."""
    return int(VERDICT_SHARE * gpu_memory)


def _states(parameters: int, engine: DeepSpeedConfig, bf16: bool, world_size: int) -> tuple[int, int, int]:
    """Bytes of (weights, gradients, optimizer) a process: ZeRO 1 splits the last, 2 the gradients, 3 the weights too.

    In bf16 gradients are summed in float32 beside the bf16 ones of the running backward pass, which ZeRO 2 and 3 keep
    no longer than one bucket. The optimizer is a float32 copy of the weights (none at stage 0) and two moments.
    """
    width, stage = (2 if bf16 else 4), engine.zero_stage
    shard = -(-parameters // world_size)
    weights = width * (shard if stage == 3 else parameters)
    passing = min(parameters, REDUCE_BUCKET) if stage >= 2 else parameters
    gradients = 4 * (shard if stage >= 2 else parameters) + (width * passing if bf16 or stage >= 2 else 0)
    return weights, gradients, (MASTER_AND_MOMENTS * shard if stage else MOMENTS * parameters)


def activation_bytes_per_token(model: ModelConfig, attention: tuple[AttentionSpec, ...], bf16: bool) -> int:
    """Bytes a token keeps on the device for the backward pass, plus the working set of the layer being computed.

    A layer keeps the residual stream before each norm, both normed inputs before and after their weight, rotated q and
    k, v, the attention's output and four FFN-wide tensors (compiled, fewer), and k as it was before a key convolution.
    With checkpointing of the MLP neither that nor its normed input, with checkpointing of all only a layer's input, and
    one layer at a time all of that; with offload nothing, and eight tensors of the residual stream's size and a group
    of heads at a time. Sparse attention works on a gathered copy of each query and a partial output (float32) for each
    of its blocks.
    """
    width = 2 if bf16 else 4
    q_size, kv_size = model.num_heads * head_dim(model), num_kv_heads(model) * head_dim(model)
    blocks = max(spec.partial_outputs for spec in attention)
    if model.activation_checkpointing == OFFLOAD:
        groups = min(HEAD_GROUPS, num_kv_heads(model))
        heads = width * 4 * (q_size + kv_size) + blocks * q_size * (width + 4)
        return width * 8 * model.hidden_size + heads // groups
    layer = width * (6 * model.hidden_size + 2 * q_size + 2 * kv_size + 4 * model.ffn_size)
    mlp = width * (2 * model.hidden_size + 4 * model.ffn_size)
    recomputed = {False: 0, AUTO: 0, "mlp": mlp, True: layer - width * model.hidden_size}[
        model.activation_checkpointing
    ]
    kept = model.num_layers * (layer - recomputed)
    if model.activation_checkpointing is not True:
        kept += sum(size > 0 for size in key_conv_widths(model)) * width * kv_size
    working = layer + blocks * q_size * (width + 4)
    return kept + working + 2 * width * model.hidden_size


def offloaded_bytes_per_token(model: ModelConfig, bf16: bool) -> int:
    """Bytes a token keeps on the host: layers' inputs, where they are offloaded."""
    is_offloaded = model.activation_checkpointing == OFFLOAD
    return model.num_layers * model.hidden_size * (2 if bf16 else 4) if is_offloaded else 0


def _logits(model: ModelConfig, vocab_size: int, tile: int) -> int:
    """Bytes of the cross-entropy: logits, probabilities and their gradient of one tile, and the weight's gradient."""
    return 4 * (3 * tile * vocab_size + vocab_size * model.hidden_size)
