"""An estimate of the memory one process needs, from the configuration alone.

Model states follow ZeRO's own accounting; activations are counted tensor by tensor for train/model/decoder.py.
Allocator fragmentation, NCCL and CUDA's own share are not counted: VERDICT_SHARE leaves them room. No torch.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from conf.exchange import by_blocks
from conf.schema import AUTO, OFFLOAD_HEADS, OFFLOADED, DeepSpeedConfig, ModelConfig, RunConfig
from moba.kinds import AttentionSpec
from train.model.sizes import HEAD_GROUPS, TILE_TOKENS, head_dim, key_conv_widths, num_kv_heads, num_parameters
from train.schedule import Stage

VERDICT_SHARE = 0.92
LIVE_PARAMETERS = 10**9  # gathered weights that stay on the device: DeepSpeed's stage3_max_live_parameters
REDUCE_BUCKET = 500_000_000
MASTER_AND_MOMENTS = 12
MOMENTS = 8
OFFLOADED_OPTIMIZER = 22  # bytes per parameter on the host, measured (benchmarks/results/longest_context_h100)
WORKSPACE_BYTES = 5 << 28  # as moba/backends/triton_attention.py has it


@dataclass(frozen=True)
class Memory:
    """Bytes a process needs on its device, and on the host where offloading puts some there."""

    weights: int
    gradients: int
    optimizer: int
    activations: int
    working: int
    """Of the layer being computed, or of a tile of logits, whichever is more."""
    host: int

    @property
    def total(self) -> int:
        """Bytes on the device."""
        return self.weights + self.gradients + self.optimizer + self.activations + self.working


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
    by_blocks: bool = False,
) -> Memory:
    """The memory of one of `world_size` processes that trains `micro_tokens` tokens at a time with this attention plan;
    `sequence_size` processes share each sequence, by heads or `by_blocks`."""
    own_tokens = -(-micro_tokens // sequence_size)
    total, width = num_parameters(model, vocab_size)["total"], 2 if bf16 else 4
    weights, gradients, optimizer = _states(total, engine, bf16, world_size)
    # The optimizer on the host brings its gradients and transfer buffers with it.
    moved = optimizer * OFFLOADED_OPTIMIZER // MASTER_AND_MOMENTS if engine.offload_optimizer else 0
    host = moved + (weights if engine.offload_params else 0)
    host += offloaded_bytes(model, own_tokens, bf16=bf16)
    compiled = bf16 and is_compiled(model, engine)
    exchanged = sequence_size > 1 and not by_blocks
    kept, working = activation_bytes(model, attention, own_tokens, bf16=bf16, compiled=compiled, exchanged=exchanged)
    if by_blocks and sequence_size > 1:
        held, gradients_of_keys = gathered_bytes(model, micro_tokens, own_tokens, bf16=bf16)
        kept, working = kept + held, working + gradients_of_keys
    gathered = width * min(total, LIVE_PARAMETERS) if engine.zero_stage == 3 else 0
    return Memory(
        weights=(0 if engine.offload_params else weights) + gathered,
        gradients=gradients,
        optimizer=0 if engine.offload_optimizer else optimizer,
        activations=kept,
        working=max(working, _logits(model, vocab_size, min(model.loss_tile, own_tokens))),
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
            by_blocks=by_blocks(config),
        )
        for stage in stages
    )
    return max(estimates, key=lambda memory: memory.total)


def room(gpu_memory: int) -> int:
    """Bytes of a GPU's memory that an estimate may fill."""
    return int(VERDICT_SHARE * gpu_memory)


def _states(parameters: int, engine: DeepSpeedConfig, bf16: bool, world_size: int) -> tuple[int, int, int]:
    """Bytes per process of (weights, gradients, optimizer): ZeRO 1 shards the last, 2 the gradients, 3 the weights too.

    In bf16 gradients are summed in float32 beside the bf16 ones of the running backward pass, which ZeRO 2 and 3 keep
    no longer than one bucket; the sums lie on the host where ZeRO 3 offloads the optimizer. The optimizer is a float32
    copy of the weights (none at stage 0) and two moments.
    """
    width, stage = (2 if bf16 else 4), engine.zero_stage
    shard = -(-parameters // world_size)
    weights = width * (shard if stage == 3 else parameters)
    passing = min(parameters, REDUCE_BUCKET) if stage >= 2 else parameters
    sums = 0 if stage == 3 and engine.offload_optimizer else 4 * (shard if stage >= 2 else parameters)
    gradients = sums + (width * passing if bf16 or stage >= 2 else 0)
    return weights, gradients, (MASTER_AND_MOMENTS * shard if stage else MOMENTS * parameters)


def activation_bytes(
    model: ModelConfig,
    attention: tuple[AttentionSpec, ...],
    num_tokens: int,
    *,
    bf16: bool,
    compiled: bool,
    exchanged: bool = False,
) -> tuple[int, int]:
    """Bytes that `num_tokens` tokens keep on the device for the backward pass, and the working set of the layer being
    computed.

    A layer keeps the residual stream before each norm, both normed inputs (eager: before and after their weight), the
    rotated q and k, v, the attention's output and four FFN-wide tensors (compiled: three), and k as it was before a key
    convolution. MLP checkpointing keeps neither its tensors nor its normed input; full checkpointing keeps a layer's
    input only, and all of that for one layer at a time. With offload nothing is kept; some tensors of the residual
    stream's size and one layer's heads, or a group of them, exist with their gradients, as many as were measured.
    Sparse attention holds partial results of each block, for as many heads as WORKSPACE_BYTES allow. `exchanged`: the
    sequence is shared, so that the attention's output is kept in two layouts, and gradients pass from one to the other.
    """
    width, recomputed = (2 if bf16 else 4), model.activation_checkpointing
    hidden, ffn, num_kv = model.hidden_size, model.ffn_size, num_kv_heads(model)
    heads = model.num_heads * head_dim(model) + num_kv * head_dim(model)
    partial = num_tokens * max(spec.partial_outputs for spec in attention) * model.num_heads * head_dim(model) * width
    partial = min(partial, max(WORKSPACE_BYTES, partial // num_kv))
    again = model.num_heads * head_dim(model) if exchanged else 0
    passing = 2 * heads if exchanged else 0
    if recomputed in OFFLOADED:
        tile = width * TILE_TOKENS * 8 * ffn + 4 * 2 * 3 * hidden * ffn
        groups = min(HEAD_GROUPS, num_kv) if recomputed == OFFLOAD_HEADS else 1
        # q, k, v, the output and their gradients.
        streams = 8 if groups > 1 else 6
        own = (5 * heads // 2 + again + passing // 2) // groups
        return 0, num_tokens * width * (streams * hidden + own) + partial + tile
    mlp = (1 if compiled else 2) * hidden + (3 if compiled else 4) * ffn
    layer = (3 if compiled else 4) * hidden + 2 * heads + again + mlp
    kept = {False: layer, AUTO: layer, "mlp": layer - mlp, True: hidden}[recomputed] * model.num_layers
    if recomputed is not True:
        kept += sum(size > 0 for size in key_conv_widths(model)) * num_kv * head_dim(model)
    return num_tokens * width * (kept + 2 * hidden), num_tokens * width * (layer + passing) + partial


def gathered_bytes(model: ModelConfig, num_tokens: int, own_tokens: int, *, bf16: bool) -> tuple[int, int]:
    """Bytes of the keys and values of all processes that share `num_tokens` tokens by blocks: those kept for the
    backward pass, in place of the process's own, and those of the layer, or its group of heads, that is computed.
    There, they have gradients of each of a process's two slices, and their sum."""
    width, recomputed = (2 if bf16 else 4), model.activation_checkpointing
    one = num_tokens * 2 * num_kv_heads(model) * head_dim(model) * width
    if recomputed is True or recomputed in OFFLOADED:
        groups = min(HEAD_GROUPS, num_kv_heads(model)) if recomputed == OFFLOAD_HEADS else 1
        return 0, 4 * one // groups
    return model.num_layers * (one - one * own_tokens // num_tokens), 3 * one


def is_compiled(model: ModelConfig, engine: DeepSpeedConfig) -> bool:
    """Whether layers of a run on GPUs are compiled, as `auto` would have it where that is not settled yet."""
    return model.compile is True or (model.compile is not False and engine.zero_stage != 3)


def offloaded_bytes(model: ModelConfig, num_tokens: int, *, bf16: bool) -> int:
    """Bytes that `num_tokens` tokens keep on the host: layers' inputs, where they are offloaded."""
    is_offloaded = model.activation_checkpointing in OFFLOADED
    return num_tokens * model.num_layers * model.hidden_size * (2 if bf16 else 4) if is_offloaded else 0


def saving_bytes(config: RunConfig, num_parameters: int, world_size: int) -> int:
    """Bytes of a process's host memory that asynchronous saves copy into, held throughout."""
    return MASTER_AND_MOMENTS * -(-num_parameters // world_size) if config.checkpoint.asynchronous else 0


def _logits(model: ModelConfig, vocab_size: int, tile: int) -> int:
    """Bytes of the cross-entropy: logits, probabilities and their gradient of one tile, and the weight's gradient."""
    return 4 * (3 * tile * vocab_size + vocab_size * model.hidden_size)
