"""How big a model is, in closed form: parameters and matrix-product FLOPs from its ModelConfig, without building it.

Used by the plan (which allocates nothing), by MFU and evals. No torch. A test compares the counts with a built module.
"""

from __future__ import annotations

from conf.build import ConfigError
from conf.schema import ModelConfig

VOCAB_MULTIPLE = 128
HEAD_GROUPS = 4
"""Groups of heads that an offload_heads layer computes one by one (train/model/offload.py)."""
TILE_TOKENS = 16384
"""Tokens in a tile of the MLP of an offloaded layer."""


def padded_vocab_size(tokenizer_size: int) -> int:
    """The embedding rows a tokenizer gets by default: its size rounded up to a multiple of 128 (tensor-core tiles)."""
    return -(-tokenizer_size // VOCAB_MULTIPLE) * VOCAB_MULTIPLE


def head_dim(config: ModelConfig) -> int:
    """Size of one attention head, by default hidden_size / num_heads."""
    return config.head_dim if config.head_dim is not None else config.hidden_size // config.num_heads


def num_kv_heads(config: ModelConfig) -> int:
    """Key/value heads, by default as many as query heads."""
    return config.num_kv_heads if config.num_kv_heads is not None else config.num_heads


def layer_letters(pattern: str, num_layers: int) -> str:
    """The letter of each layer: the pattern, in capitals, repeated."""
    return (pattern.upper() * num_layers)[:num_layers]


def rope_layers(config: ModelConfig) -> tuple[bool, ...]:
    """Whether each layer has RoPE."""
    return tuple(letter == "R" for letter in layer_letters(config.rope_pattern or "R", config.num_layers))


def key_conv_widths(config: ModelConfig) -> tuple[int, ...]:
    """The width of each layer's key convolution, 0 for none."""
    letters = layer_letters(config.key_conv_pattern or "K", config.num_layers)
    return tuple(config.key_conv if letter == "K" else 0 for letter in letters)


def _layer_matmul_parameters(config: ModelConfig) -> int:
    """Weights of one decoder layer that take part in matrix products: q, k, v, o, gate, up, down."""
    q_size = config.num_heads * head_dim(config)
    kv_size = num_kv_heads(config) * head_dim(config)
    return 2 * config.hidden_size * (q_size + kv_size) + 3 * config.hidden_size * config.ffn_size


def _layer_vector_parameters(config: ModelConfig) -> int:
    """The rest of one layer: two norms, and the optional biases and head norms."""
    size = 2 * config.hidden_size
    if config.qkv_bias:
        size += (config.num_heads + 2 * num_kv_heads(config)) * head_dim(config)
    if config.qk_norm:
        size += 2 * head_dim(config)
    return size


def num_parameters(config: ModelConfig, vocab_size: int) -> dict[str, int]:
    """Parameter counts {"total", "non_embedding", "embedding"} of a model with `vocab_size` embedding rows.

    "embedding" holds the input embedding and, where it is not tied, the output projection; "non_embedding" is the N of
    the paper's Table 1 and of scaling laws.
    """
    layers = config.num_layers * (_layer_matmul_parameters(config) + _layer_vector_parameters(config))
    convolutions = sum(key_conv_widths(config)) * num_kv_heads(config) * head_dim(config)
    non_embedding = layers + convolutions + config.hidden_size
    embedding = vocab_size * config.hidden_size * (1 if config.tie_embeddings else 2)
    return {"total": non_embedding + embedding, "non_embedding": non_embedding, "embedding": embedding}


def matmul_flops_per_token(config: ModelConfig, vocab_size: int, backward: bool = True) -> int:
    """FLOPs per token of all matrix products with weights, the output projection included, attention pairs excluded.

    A multiply-add counts as 2 and the backward pass as twice the forward (so 6 per weight in training). The embedding
    lookup, norms, RoPE, key convolutions and what activation checkpointing recomputes are not counted. Attention is
    moba.flops.attention_flops.
    """
    weights = config.num_layers * _layer_matmul_parameters(config) + vocab_size * config.hidden_size
    return (6 if backward else 2) * weights


def embedding_rows(config: ModelConfig, tokenizer_size: int) -> int:
    """Rows of the embedding for a tokenizer of `tokenizer_size` ids: model.vocab_size, or the padded size where that is
    null.

    ConfigError if model.vocab_size is too small for the tokenizer.
    """
    if config.vocab_size is None:
        return padded_vocab_size(tokenizer_size)
    if config.vocab_size < tokenizer_size:
        hint = f"the tokenizer has {tokenizer_size} ids; use null, or at least {padded_vocab_size(tokenizer_size)}"
        raise ConfigError([f"model.vocab_size={config.vocab_size}: {hint}"])
    return config.vocab_size


def ntk_theta(theta: float, factor: float, head_size: int) -> float:
    """The base of NTK-aware scaling: the slowest frequency is divided by `factor` exactly, the fastest kept.

    The formula of transformers' `dynamic` scaling (bloc97) at `factor` times the model's length.
    """
    return theta * factor ** (head_size / (head_size - 2))
