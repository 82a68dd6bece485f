"""Export to Hugging Face: a model as a plain Llama, Qwen2 or Qwen3 checkpoint that transformers loads.

The weights keep their names; config.json holds the rest: the stage's RoPE in the layout that every version of
transformers reads, and under `moba` the attention of each layer, which plain transformers ignores.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from transformers import AutoConfig

from conf.build import ConfigError
from conf.schema import ModelConfig, RopeConfig
from conf.words import first_line
from moba.kinds import AttentionSpec
from train.checkpoint.store import MODEL_INDEX, TensorFiles, read_index
from train.hf.pretrained import FAMILIES, PLAN_KEY, SINGLE_FILE, windows
from train.model.rope import Rope, changes_rope, check_rope_scaling, stage_scaling
from train.model.sizes import head_dim, ntk_theta, num_kv_heads, rope_layers

SHARD_BYTES = 4 * 2**30
DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16}
_DTYPE_NAMES = {"fp32": "float32", "bf16": "bfloat16"}


def config_json(
    model: ModelConfig,
    *,
    num_embeddings: int,
    rope: RopeConfig,
    attention: Sequence[AttentionSpec],
    plan: Sequence[AttentionSpec],
    max_length: int,
    dtype: str,
    bos_id: int | None,
    eos_id: int,
) -> dict[str, Any]:
    """The content of config.json for `model` under a stage's RoPE and attention.

    `plan` is what attn_implementation="moba" is to do; `max_length` tokens is the longest document trained on.
    ConfigError if transformers has no such architecture or no such RoPE.
    """
    _refuse_own_layers(model, (*attention, *plan))
    kind = _family(model)
    theta, scaling = merged_rope(model, rope)
    config = {
        "architectures": [FAMILIES[kind].architecture],
        "model_type": kind,
        "torch_dtype": _DTYPE_NAMES[dtype],
        "vocab_size": num_embeddings,
        "hidden_size": model.hidden_size,
        "intermediate_size": model.ffn_size,
        "num_hidden_layers": model.num_layers,
        "num_attention_heads": model.num_heads,
        "num_key_value_heads": num_kv_heads(model),
        "head_dim": head_dim(model),
        "hidden_act": "silu",
        "rms_norm_eps": model.norm_eps,
        "initializer_range": model.init_std,
        "tie_word_embeddings": model.tie_embeddings,
        "max_position_embeddings": max(max_length, model.pretrained_length or 0),
        "rope_theta": theta,
        "rope_scaling": scaling,
        "bos_token_id": bos_id,
        "eos_token_id": eos_id,
        "use_cache": True,
        PLAN_KEY: {"plan": [spec.entry() for spec in plan]},
    }
    if kind in ("llama", "qwen3"):
        config["attention_bias"] = False
    return config


def as_it_came(original: dict[str, Any], ours: dict[str, Any]) -> dict[str, Any]:
    """`ours` merged into the config.json that the model came with: model_type, spelling and unknown keys stay as they
    were; what training has changed is taken from `ours`.

    A value has changed if transformers parses it differently from the two.
    """
    if not isinstance(original.get("model_type"), str):
        raise ConfigError(["the config.json kept in the run's source/ folder has no model_type: remove it"])
    try:
        was, now = (
            AutoConfig.for_model(**(config | {"model_type": original["model_type"]})) for config in (original, ours)
        )
    except Exception as error:  # whatever the values of a config.json make transformers stumble over
        what = "the config.json kept in the run's source/ folder is not one that transformers can read"
        raise ConfigError([f"{what} ({first_line(error)}): remove it"]) from error
    result = {key: value for key, value in original.items() if key not in ("auto_map", PLAN_KEY)}
    result[PLAN_KEY] = ours[PLAN_KEY]
    if was.rope_parameters != now.rope_parameters:
        result = {key: value for key, value in result.items() if key != "rope_parameters"}
        result |= {"rope_theta": ours["rope_theta"], "rope_scaling": ours["rope_scaling"]}
    if was.dtype != now.dtype:
        result = {key: value for key, value in result.items() if key != "dtype"} | {"torch_dtype": ours["torch_dtype"]}
    for key in ("vocab_size", "max_position_embeddings"):
        result[key] = ours[key]
    if windows(AutoConfig.for_model(**result)):  # they were as long as the context, which is now longer
        result |= {"sliding_window": None} | {key: False for key in ("use_sliding_window",) if key in result}
        result.pop("layer_types", None)
    return result


def _family(model: ModelConfig) -> str:
    """The model_type whose architecture has exactly `model`'s options."""
    for kind, family in FAMILIES.items():
        if (family.qkv_bias, family.qk_norm) == (model.qkv_bias, model.qk_norm):
            return kind
    raise ConfigError(
        [
            "model.qkv_bias=true with model.qk_norm=true: no plain architecture of transformers has both, so this "
            "model cannot be exported"
        ]
    )


def _refuse_own_layers(model: ModelConfig, attention: Sequence[AttentionSpec]) -> None:
    """ConfigError for layers that the plain architectures lack, each by name."""
    parts = {
        f"model.key_conv={model.key_conv}": model.key_conv,
        f"model.rope_pattern={model.rope_pattern}": not all(rope_layers(model)),
    }
    named = [part for part, is_on in parts.items() if is_on]
    named += dict.fromkeys(spec.export_problem for spec in attention if spec.export_problem is not None)
    if named:
        hint = "use this project's own commands (launch/evaluate.py, launch/generate.py)"
        raise ConfigError([f"{part}: no Llama, Qwen2 or Qwen3 of transformers has it; {hint}" for part in named])


def merged_rope(model: ModelConfig, stage: RopeConfig) -> tuple[float, dict[str, Any] | None]:
    """`(rope_theta, rope_scaling)` that reproduce the angles of `model` in a stage.

    ConfigError if a model's own scaling and the stage's do not make one that transformers has.
    """
    theta = model.rope_theta if stage.theta is None else stage.theta
    own: dict[str, Any] = check_rope_scaling(model.rope_scaling, model.rope_theta)
    if own["rope_type"] == "dynamic" and changes_rope(stage):
        own = {"rope_type": "default"}
    is_even = own["rope_type"] in ("default", "linear")  # all frequencies alike, so another base commutes with it
    if stage.scaling == "ntk" and is_even:
        theta = ntk_theta(theta, stage.factor, head_dim(model))
    if stage.scaling == "none" or (stage.scaling == "ntk" and is_even):
        return theta, None if own["rope_type"] == "default" else own
    on_top = stage_scaling(stage)
    if own["rope_type"] == "default":
        return theta, on_top
    if own["rope_type"] == stage.scaling == "linear":
        return theta, on_top | {"factor": own["factor"] * stage.factor}
    raise ConfigError(
        [
            f"the RoPE of this stage ({Rope(model, stage)}) is not to be had in transformers, which applies one "
            "scaling; a stage that changes rope.theta instead can be exported"
        ]
    )


def write_weights(checkpoint: Path, to: Path, shapes: dict[str, Sequence[int]], dtype: str) -> list[str]:
    """Writes the weights of one of our checkpoints (name -> shape) into `to`; returns the file names.

    One file, or several of SHARD_BYTES with an index; one of them is in memory at a time.
    """
    size = DTYPES[dtype].itemsize
    groups = _groups({name: size * torch.Size(shape).numel() for name, shape in shapes.items()})
    total = len(groups)
    names = [f"model-{i:05d}-of-{total:05d}.safetensors" for i in range(1, total + 1)] if total > 1 else [SINGLE_FILE]
    with ExitStack() as stack:
        tensors = TensorFiles(checkpoint, read_index(checkpoint), stack)
        for file, group in zip(names, groups):
            content = {}
            for name in group:
                shape = torch.Size(shapes[name])
                whole = tensors.elements(name, tuple(shape), 0, shape.numel()).reshape(shape)
                content[name] = whole.to(DTYPES[dtype]).contiguous()
            save_file(content, to / file, metadata={"format": "pt"})
    if total > 1:
        files = {name: file for file, group in zip(names, groups) for name in group}
        sizes = sum(size * torch.Size(shape).numel() for shape in shapes.values())
        index = {"metadata": {"total_size": sizes}, "weight_map": files}
        (to / MODEL_INDEX).write_text(json.dumps(index, indent=2) + "\n", encoding="utf-8")
    return names


def _groups(sizes: dict[str, int]) -> list[list[str]]:
    """Names in order, cut where a group would exceed SHARD_BYTES."""
    groups: list[list[str]] = [[]]
    filled = 0
    for name, size in sizes.items():
        if groups[-1] and filled + size > SHARD_BYTES:
            groups.append([])
            filled = 0
        groups[-1].append(name)
        filled += size
    return groups
