"""Loads a trained model from a run directory, one of its checkpoints or a Hugging Face directory, for evaluation in one
process.

The attention and RoPE are those of the stage that the checkpoint was trained in, so a model is evaluated as it was
trained unless the caller swaps the attention. A Hugging Face model has full attention, unless its config.json has a
MoBA plan (launch/export.py writes one).
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from pathlib import Path

import torch

from conf.files import user_path
from conf.numbers import parse_length
from conf.schema import AttentionConfig, DataConfig, RunConfig, RunSection, ScheduleConfig, StageConfig
from conf.validate import from_yaml
from data.tokenizer import load_tokenizer
from moba.kinds import AttentionSpec, Full, Moba
from moba.kinds.plan_file import names_a_file, read_plan
from train.checkpoint.checkpoint_dir import find
from train.checkpoint.store import CONFIG, load_weights, read
from train.engine.optim import resolve_precision
from train.hf import pretrained, source_files
from train.model.decoder import Decoder
from train.model.sizes import embedding_rows
from train.schedule import Stage, build_schedule, last_sparse

SPARSE, DENSE = Moba.name, Full.name  # names of plans


@dataclass
class TrainedModel:
    """A model with the attention and RoPE of its stage, and where it came from."""

    model: Decoder
    """In evaluation mode, on `device`, in its training precision there (bf16 on a GPU, unless fp32 was configured)."""
    config: RunConfig
    """The configuration it was trained with; for a Hugging Face model, only its directory's name, model and
    tokenizer."""
    stage: Stage
    """The stage of its last step."""
    tokens: int
    """Training tokens."""
    checkpoint: Path
    device: torch.device


def load_trained(source: Path | str, device: str | torch.device = "auto") -> TrainedModel:
    """The model of a checkpoint directory, of the newest checkpoint of a run directory, or of a Hugging Face directory.

    `device` is "auto", "cpu", "cuda" or a torch device. Raises CheckpointError, DataError or ValueError for user
    errors.
    """
    target = device if isinstance(device, torch.device) else resolve_device(device)
    if (user_path(source) / pretrained.CONFIG).is_file():
        return _load_pretrained(user_path(source), target)
    checkpoint = find(user_path(source))
    saved = read(checkpoint)
    config = from_yaml(saved.config_yaml, checkpoint / CONFIG)
    tokenizer = source_files.tokenizer_name(config, checkpoint)
    config = replace(config, data=replace(config.data, tokenizer=tokenizer))
    plain = replace(config.model, compile=False)  # the machine that evaluates may have no compiler
    model = Decoder(plain, embedding_rows(config.model, load_tokenizer(tokenizer).vocab_size))
    load_weights(model, checkpoint)
    is_bf16 = target.type == "cuda" and resolve_precision(config.deepspeed, target) == "bf16"
    model.to(device=target, dtype=torch.bfloat16 if is_bf16 else torch.float32).eval()
    # A checkpoint at a stage's end belongs to that stage, though the next step would be of the next one.
    stage = build_schedule(config).lookup(saved.tokens - 1)
    model.set_attention(portable(stage.attention))
    model.set_rope(stage.rope)
    return TrainedModel(model, config, stage, saved.tokens, checkpoint, target)


def _load_pretrained(directory: Path, device: torch.device) -> TrainedModel:
    """The model and tokenizer of a Hugging Face directory, as if trained in one stage."""
    shape = pretrained.read_shape(directory)
    shape = replace(shape, loss_tile=parse_length(shape.loss_tile))
    assert shape.vocab_size is not None
    model = Decoder(shape, shape.vocab_size)
    pretrained.load_weights(model, shape, directory)
    model.to(device=device, dtype=torch.bfloat16 if device.type == "cuda" else torch.float32).eval()
    length = shape.pretrained_length
    only = StageConfig(tokens=length, seq_len=length, batch_tokens=length, attention=AttentionConfig(kind=Full.name))
    config = RunConfig(
        run=RunSection(name=directory.resolve().name),
        model=shape,
        data=DataConfig(tokenizer=str(directory)),
        schedule=ScheduleConfig(tokens=length, stages={"pretrained": only}),
    )
    stage = replace(build_schedule(config).stages[0], attention=pretrained.read_plan(directory, shape.num_layers))
    model.set_attention(stage.attention)
    return TrainedModel(model, config, stage, tokens=0, checkpoint=directory, device=device)


def resolve_device(device: str) -> torch.device:
    """The torch device of "auto", "cpu" or "cuda"; ValueError for another value, or without a GPU."""
    if device not in ("auto", "cpu", "cuda"):
        raise ValueError(f"device={device!r}: choose one of auto, cpu, cuda")
    if device == "cuda" and not torch.cuda.is_available():
        raise ValueError("device=cuda: torch sees no CUDA device here; use device=cpu or auto")
    return torch.device("cuda" if torch.cuda.is_available() and device != "cpu" else "cpu")


def portable(plan: tuple[AttentionSpec, ...]) -> tuple[AttentionSpec, ...]:
    """The same attention with automatic backends: the run's own choice may need another device."""
    return tuple(replace(spec, backend="auto") for spec in plan)


def attention_label(text: str) -> str:
    """The argument of `attention_plan` as part of a file's name; for a plan file, its stem."""
    return Path(text).stem if names_a_file(text) else text


def attention_plan(text: str, trained: TrainedModel) -> tuple[AttentionSpec, ...]:
    """The attention of each layer that `text` names: "stage" (as trained), "moba" (of its stage, or of the last earlier
    stage with MoBA), "full" in place of MoBA, or "<block size>x<top_k>" for MoBA in the layers that the stage gives
    MoBA (in the full ones, if it gives it to none); "+1" after it: with the document's first block always attended.
    Sliding windows, which belong to the model, stay. A plan file (.yaml, .json; moba/kinds/plan_file.py) is for models
    without them. ValueError for anything else."""
    own = portable(trained.stage.attention)
    if names_a_file(text):
        fixed = [layer for layer, spec in enumerate(own) if not spec.replaces_full and spec != Full()]
        if fixed:
            raise ValueError(f"{text}: layer {fixed[0]} has {own[fixed[0]]}, which no plan file can say; use 512x3")
        return read_plan(text, len(own))
    if text == "stage":
        return own
    if text == SPARSE:
        sparse = last_sparse([*build_schedule(trained.config).stages[: trained.stage.index], trained.stage])
        if sparse is None:
            raise ValueError("attention=moba: it was not trained with MoBA; say <block size>x<top_k> such as 512x3")
        return portable(sparse)
    if text == DENSE:
        return tuple(spec.dense() for spec in own)
    block, times, rest = text.partition("x")
    top_k, plus, first = rest.partition("+")
    if not times or not top_k.isdecimal() or (plus and not first.isdecimal()):
        hint = (
            "choose stage, moba, full, <block size>x<top_k> such as 512x3, 512x3+1 with the first block always seen, "
            "or a plan file (.yaml)"
        )
        raise ValueError(f"attention={text!r}: {hint}")
    return with_moba(own, Moba(parse_length(block), int(top_k), first_blocks=int(first or 0)))


def with_moba(plan: tuple[AttentionSpec, ...], spec: Moba) -> tuple[AttentionSpec, ...]:
    """A plan with this MoBA in the layers that have MoBA; in the full ones, if none has."""
    sparse = any(s.replaces_full for s in plan)
    return tuple(spec if (s.replaces_full if sparse else s == Full()) else s for s in plan)
