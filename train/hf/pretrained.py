"""Import from Hugging Face: which model a directory holds, and its weights into a Decoder.

Reads dense Llama-, Mistral-, Qwen2- and Qwen3-shaped models in safetensors, in one file or several. Tensors have the
Decoder's names and layout, so nothing is converted: each rank reads the ranges it holds. Features that the Decoder
lacks are refused by name. train/hf/hf_export.py exports.
"""

from __future__ import annotations

import math
import re
from collections.abc import Mapping
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any

import torch
from pydantic import Field
from torch import nn

from conf.build import ConfigError
from conf.files import Object, parse_json, read_json, read_text, user_path
from conf.schema import ModelConfig
from conf.words import cut, first_line, listed, show
from moba.kinds import AttentionSpec, Full, Moba, from_entry
from train.checkpoint.store import (
    MODEL_INDEX,
    CheckpointError,
    TensorFiles,
    compare_parameters,
    open_tensors,
    read_index,
)
from train.engine.collectives import barrier
from train.engine.engine import Engine, Slot
from train.model.rope import check_rope_scaling

CONFIG, SINGLE_FILE = "config.json", "model.safetensors"
PLAN_KEY = Moba.name
"""The key of config.json that holds the attention of each layer."""
HUB_ID = re.compile(r"[\w.-]+/[\w.-]+")
DESCRIPTION = ["*.json", "*.jinja", "*.model", "*.txt"]
DTYPES = ("F32", "BF16", "F16")


@dataclass(frozen=True)
class Family:
    """An architecture of transformers, and the ModelConfig options that give it."""

    architecture: str
    qkv_bias: bool
    qk_norm: bool


FAMILIES = {
    "llama": Family("LlamaForCausalLM", qkv_bias=False, qk_norm=False),
    "mistral": Family("MistralForCausalLM", qkv_bias=False, qk_norm=False),
    "qwen2": Family("Qwen2ForCausalLM", qkv_bias=True, qk_norm=False),
    "qwen3": Family("Qwen3ForCausalLM", qkv_bias=False, qk_norm=True),
}
# Fields of ModelConfig that the weights fix; the rest says how to train.
SHAPE = (
    "hidden_size",
    "num_layers",
    "num_heads",
    "num_kv_heads",
    "head_dim",
    "ffn_size",
    "vocab_size",
    "tie_embeddings",
    "qkv_bias",
    "qk_norm",
    "norm_eps",
    "rope_theta",
    "rope_scaling",
    "rope_pattern",
    "key_conv",
    "key_conv_pattern",
)


Size = Annotated[int, Field(ge=1, le=2**40)]


@dataclass(frozen=True)
class _Description:
    """Fields of config.json that are checked if present; transformers fills in the rest."""

    model_type: str
    architectures: list[str] | None = None
    vocab_size: Size = 1
    hidden_size: Size = 1
    intermediate_size: Size = 1
    num_hidden_layers: Size = 1
    num_attention_heads: Size = 1
    num_key_value_heads: Size | None = None
    head_dim: Size | None = None
    max_position_embeddings: Size = 1
    rms_norm_eps: Annotated[float, Field(gt=0, lt=1)] = 1e-6
    rope_theta: Annotated[float, Field(gt=0)] | None = None
    rope_scaling: Object | None = None
    rope_parameters: Object | None = None
    tie_word_embeddings: bool | None = None


def _config_error(text: str) -> ConfigError:
    return ConfigError([text])


# Where it is


def is_model(source: Path | str) -> bool:
    """True if `source` is a Hugging Face model directory, or no directory but spelt like a hub id."""
    path = user_path(source)
    return (path / CONFIG).is_file() or (not path.exists() and bool(HUB_ID.fullmatch(str(source))))


def locate(source: Path | str, *, weights: bool = True) -> Path:
    """The local directory of a model: `source` itself, or the hub's files in Hugging Face's cache, downloaded if
    missing.

    With `weights=False` only its configuration and tokenizer are downloaded. ConfigError if it is unavailable.
    """
    path = user_path(source)
    if path.is_dir():
        return path
    from huggingface_hub import snapshot_download

    wanted = DESCRIPTION + ["*.safetensors"] * weights
    try:
        return Path(snapshot_download(str(source), allow_patterns=wanted, ignore_patterns=["*/*", "consolidated*"]))
    except (OSError, ValueError) as error:
        reason = first_line(error)
        raise ConfigError(
            [
                f"init.source={source}: there is no such directory here, and it cannot be had as a hub id ({reason}). "
                f"Give a local one: a run directory, a checkpoint, or a Hugging Face model with {CONFIG} and "
                f"*.safetensors (where the hub is reachable: hf download {source} --local-dir <directory>)"
            ]
        ) from error


# What it is


def read_shape(directory: Path) -> ModelConfig:
    """The model in a Hugging Face directory: every field of SHAPE, its length and its name; the rest is default.

    ConfigError lists everything that the Decoder lacks.
    """
    path = directory / CONFIG
    text = read_text(path, error=_config_error)
    raw = parse_json(text, Object, where=path, error=_config_error)
    if isinstance(raw.get("model_type"), str):
        _raise(directory, _refusals(raw))
    parse_json(text, _Description, where=path, error=_config_error)
    from transformers import AutoConfig

    # transformers fills in what a config.json leaves out, which differs from family to family and over the years.
    try:
        config = AutoConfig.from_pretrained(str(directory), local_files_only=True, trust_remote_code=False)
        problems = windows(config)
        theta, scaling = _rope(config, problems)
    except Exception as error:  # whatever the values of a config.json make transformers stumble over
        raise ConfigError([f"{path} is not one that transformers can read ({cut(error)})"]) from error
    _raise(directory, problems)
    family = FAMILIES[config.model_type]
    head_dim = getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads
    return ModelConfig(
        name=directory.resolve().name,
        hidden_size=config.hidden_size,
        num_layers=config.num_hidden_layers,
        num_heads=config.num_attention_heads,
        num_kv_heads=config.num_key_value_heads,
        head_dim=head_dim,
        ffn_size=config.intermediate_size,
        vocab_size=config.vocab_size,
        tie_embeddings=config.tie_word_embeddings,
        qkv_bias=family.qkv_bias,
        qk_norm=family.qk_norm,
        norm_eps=config.rms_norm_eps,
        rope_theta=theta,
        rope_scaling=scaling,
        pretrained_length=config.max_position_embeddings,
    )


def read_plan(directory: Path, num_layers: int) -> tuple[AttentionSpec, ...]:
    """The attention of each layer by the MoBA plan in a config.json; full attention where there is none.

    ConfigError if the plan is not one of `num_layers` entries [kind, block_size, top_k].
    """
    settings = read_json(directory / CONFIG, Object, error=_config_error).get(PLAN_KEY)
    if settings is None:
        return (Full(),) * num_layers
    try:
        plan = tuple(from_entry(entry) for entry in settings["plan"])
    except (TypeError, KeyError, ValueError) as error:
        what = f"{PLAN_KEY}={show(settings)} has no plan that can be read ({first_line(error)})"
        raise ConfigError([f"{directory / CONFIG}: {what}"]) from error
    if len(plan) != num_layers:
        raise ConfigError([f"{directory / CONFIG}: a MoBA plan of {len(plan)} layers for a model of {num_layers}"])
    return plan


def differences(given: Mapping[str, Any], shape: ModelConfig) -> list[str]:
    """A line for each field of SHAPE in `given` that contradicts a source's; None in `given` contradicts nothing."""
    lines = []
    for name in SHAPE:
        ours, theirs = given.get(name), getattr(shape, name)
        if name == "rope_scaling" and name in given:
            theta = shape.rope_theta
            is_same = check_rope_scaling(ours, theta) == check_rope_scaling(theirs, theta)
        elif name in ("rope_pattern", "key_conv_pattern") and name in given:
            is_same = ours == theirs  # null is one of the choices
        elif name == "norm_eps" and ours is not None:
            is_same = math.isclose(ours, theirs, rel_tol=1e-7)  # used in float32, and rounded to it by some converters
        else:
            is_same = ours is None or ours == theirs
        if not is_same:
            lines.append(f"model.{name}={show(ours)}: the source has {show(theirs)}")
    return lines


def _raise(directory: Path, problems: list[str]) -> None:
    if problems:
        raise ConfigError([f"init.source: {directory.name} cannot be used: {problem}" for problem in problems])


def _refusals(raw: dict[str, Any]) -> list[str]:
    """A line for each feature in a config.json that the Decoder lacks."""
    kind = raw.get("model_type")
    for key in ("quantization_config", "compression_config"):
        if raw.get(key):
            method = raw[key].get("quant_method", "unknown method") if isinstance(raw[key], dict) else show(raw[key])
            return [f"its weights are quantised ({key}, {method}); take the checkpoint it was made from"]
    if kind not in FAMILIES:
        experts = [key for key in raw if re.fullmatch(r"(num|n)_.*experts.*", key)]
        why = f"mixture of experts ({experts[0]})" if experts else "not an architecture that this project has"
        return [f"model_type={cut(kind)} is {why}; it reads dense {', '.join(FAMILIES)}"]
    problems = []
    expected = FAMILIES[kind].architecture
    named = raw.get("architectures")
    architecture = named[0] if isinstance(named, list) and named else expected
    if architecture != expected:
        problems.append(f"it is a {cut(architecture)}; a language model of this family is a {expected}")
    if raw.get("hidden_act", "silu") not in ("silu", "swish"):
        problems.append(f"hidden_act={show(raw['hidden_act'])}; the MLP here is gated by silu")
    if raw.get("attention_bias"):
        problems.append("attention_bias=true puts a bias on the attention's output projection, which ours has not")
    if raw.get("mlp_bias"):
        problems.append("mlp_bias=true puts biases on the MLP, which ours has not")
    return problems


def windows(config: Any) -> list[str]:
    """Attention windows shorter than the model's own context, which would change its output."""
    window, length = getattr(config, "sliding_window", None), config.max_position_embeddings
    layers = getattr(config, "layer_types", None) or ["sliding_attention" if window else "full_attention"]
    others = sorted(set(layers) - {"full_attention", "sliding_attention"})
    if others:
        return [f"it has layers of {', '.join(others)}"]
    if window is None or window >= length or "sliding_attention" not in layers:
        return []
    return [f"sliding_window={window} is shorter than its context of {length}, and such windows are not read"]


def _rope(config: Any, problems: list[str]) -> tuple[float, dict[str, Any] | None]:
    """`(theta, scaling)` in the form of ModelConfig; errors are added to `problems`.

    transformers gives one layout, `rope_parameters`, whichever of the two the file has.
    """
    parameters = dict(config.rope_parameters)
    theta = parameters.pop("rope_theta", None)
    if theta is None or any(isinstance(value, dict) for value in parameters.values()):
        problems.append("its RoPE differs from layer to layer (rope_parameters)")
        return 0.0, None
    try:
        scaling = check_rope_scaling(parameters, theta)
    except ValueError as error:
        problems.append(str(error))
        return theta, None
    return float(theta), None if scaling["rope_type"] == "default" else scaling


# Its weights


def weight_map(directory: Path) -> dict[str, str]:
    """Tensor name -> safetensors file, for a model in one file or several. CheckpointError if there is neither.

    Pickled weights are refused: loading them runs code.
    """
    if (directory / MODEL_INDEX).is_file():
        files = read_index(directory)
        missing = sorted({file for file in files.values() if not (directory / file).is_file()})
        if missing:
            raise CheckpointError(f"{directory} lacks {listed(missing)}, which its {MODEL_INDEX} names")
        return files
    if (directory / SINGLE_FILE).is_file():
        with open_tensors(directory / SINGLE_FILE) as tensors:
            return dict.fromkeys(tensors.keys(), SINGLE_FILE)
    pickled = sorted(path.name for path in [*directory.glob("*.bin"), *directory.glob("*.pt*")])
    if pickled:
        raise CheckpointError(
            f"{directory} holds its weights as {pickled[0]}, a pickle, which is not loaded here because it can run "
            'code. If you trust it: python -c "from transformers import AutoModelForCausalLM as M; '
            "M.from_pretrained('<directory>').save_pretrained('<new directory>')\" writes safetensors"
        )
    raise CheckpointError(f"{directory} has neither {SINGLE_FILE} nor {MODEL_INDEX}")


def load_engine(engine: Engine, config: ModelConfig, source: Path | str) -> Path:
    """Loads a Hugging Face model's weights into an engine, exactly; returns the directory. A collective.

    Each rank reads its own ranges, tensor by tensor, at any ZeRO stage and number of ranks. Raises ConfigError or
    CheckpointError on all ranks if the model is not `config`'s.
    """
    directory, files = _open_checked(config, source, {s.name: s.shape for s in engine.slots()})
    with ExitStack() as stack:
        tensors = TensorFiles(directory, files, stack)

        def elements(_: str, slot: Slot) -> torch.Tensor:
            return tensors.elements(slot.name, slot.shape, slot.start, slot.size).float()

        engine.restore(elements, step=0)
    barrier()
    return directory


@torch.no_grad()
def load_weights(model: nn.Module, config: ModelConfig, source: Path | str) -> Path:
    """Loads a Hugging Face model's weights into a plain Decoder, one tensor at a time; returns the directory."""
    parameters = dict(model.named_parameters())
    directory, files = _open_checked(config, source, {name: p.shape for name, p in parameters.items()})
    with ExitStack() as stack:
        tensors = TensorFiles(directory, files, stack)
        for name, parameter in parameters.items():
            flat = tensors.elements(name, tuple(parameter.shape), 0, parameter.numel())
            parameter.copy_(flat.reshape(parameter.shape))
    return directory


def _open_checked(config: ModelConfig, source: Path | str, shapes: dict[str, Any]) -> tuple[Path, dict[str, str]]:
    """`(directory, weight map)` of a source whose shape, tensors and dtypes are those of a model with `shapes`."""
    directory = locate(source)
    problems = differences(vars(config), read_shape(directory))
    if problems:
        raise ConfigError(problems)
    files = weight_map(directory)
    saved, odd = {}, []
    for file in sorted(set(files.values())):
        with open_tensors(directory / file) as tensors:
            for name in tensors.keys():  # noqa: SIM118 - not a dict
                tensor = tensors.get_slice(name)
                saved[name] = tuple(tensor.get_shape())
                odd += [f"{name} is {tensor.get_dtype()}"] if tensor.get_dtype() not in DTYPES else []
    # Old Llama files keep the frequencies, which follow from the configuration; and a tied matrix may be there twice.
    ignored = {"lm_head.weight"} if config.tie_embeddings else set()
    saved = {k: v for k, v in saved.items() if k not in ignored and not k.endswith("rotary_emb.inv_freq")}
    compare_parameters(shapes, saved, directory)
    if odd:
        raise CheckpointError(f"{directory} holds dtypes that are not weights': {listed(odd)}")
    return directory, files
