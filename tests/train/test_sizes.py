"""Closed-form model sizes, against transformers' own modules built on the meta device."""

import pytest
import torch
from transformers import LlamaConfig, LlamaForCausalLM, Qwen3Config, Qwen3ForCausalLM

from conf.schema import ModelConfig
from train.model.sizes import matmul_flops_per_token, num_parameters, padded_vocab_size

SHAPES = [
    {"hidden_size": 64, "num_layers": 3, "num_heads": 4, "num_kv_heads": 2, "ffn_size": 176, "tie_embeddings": True},
    {"hidden_size": 64, "num_layers": 2, "num_heads": 4, "num_kv_heads": None, "ffn_size": 96, "tie_embeddings": False},
    {
        "hidden_size": 48,
        "num_layers": 1,
        "num_heads": 2,
        "num_kv_heads": 1,
        "head_dim": 32,
        "ffn_size": 96,
        "tie_embeddings": False,
    },
    {
        "hidden_size": 48,
        "num_layers": 2,
        "num_heads": 3,
        "num_kv_heads": 1,
        "head_dim": 32,
        "ffn_size": 96,
        "qk_norm": True,
    },
]


def reference_model(config: ModelConfig, vocab_size: int):
    """The same shape from transformers, holding no memory."""
    arguments = {
        "vocab_size": vocab_size,
        "hidden_size": config.hidden_size,
        "num_hidden_layers": config.num_layers,
        "num_attention_heads": config.num_heads,
        "num_key_value_heads": config.num_kv_heads or config.num_heads,
        "head_dim": config.head_dim or config.hidden_size // config.num_heads,
        "intermediate_size": config.ffn_size,
        "tie_word_embeddings": config.tie_embeddings,
    }
    with torch.device("meta"):
        if config.qk_norm:
            return Qwen3ForCausalLM(Qwen3Config(**arguments))
        return LlamaForCausalLM(LlamaConfig(**arguments))


@pytest.mark.parametrize("shape", SHAPES)
def test_counts_equal_a_built_model(shape):
    """Catches a forgotten matrix, a norm counted twice, GQA or tied embeddings counted as if absent."""
    config = ModelConfig(**shape)
    model = reference_model(config, 256)
    counts = num_parameters(config, 256)
    assert counts["total"] == sum(p.numel() for p in model.parameters())
    embedding = {id(p): p.numel() for p in (model.model.embed_tokens.weight, model.lm_head.weight)}
    assert counts["embedding"] == sum(embedding.values())
    assert counts["non_embedding"] + counts["embedding"] == counts["total"]


@pytest.mark.parametrize("shape", SHAPES)
def test_flops_equal_six_per_linear_weight(shape):
    """Catches the embedding lookup counted as a product, or the output projection forgotten when it is tied."""
    config = ModelConfig(**shape)
    model = reference_model(config, 256)
    weights = sum(m.weight.numel() for m in model.modules() if isinstance(m, torch.nn.Linear))
    assert matmul_flops_per_token(config, 256) == 6 * weights
    assert matmul_flops_per_token(config, 256, backward=False) == 2 * weights


def test_qkv_bias_is_counted():
    """Catches a bias on the output projection too: Qwen2 has q, k and v biases only."""
    plain = ModelConfig(hidden_size=64, num_heads=4, num_kv_heads=2)
    biased = ModelConfig(hidden_size=64, num_heads=4, num_kv_heads=2, qkv_bias=True)
    assert num_parameters(biased, 128)["total"] - num_parameters(plain, 128)["total"] == 4 * (4 + 2 * 2) * 16


@pytest.mark.parametrize("size, rows", [(1, 128), (128, 128), (258, 384), (32768, 32768)])
def test_vocabulary_is_padded_up(size, rows):
    """Catches rounding to nearest, which would leave tokens without a row."""
    assert padded_vocab_size(size) == rows
