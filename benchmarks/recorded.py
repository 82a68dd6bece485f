"""q, k and v of a real model for benchmarks/attention.py: a pack of documents, read with full attention.

The model (a Hugging Face directory, a run or a checkpoint) and the text are read as by the commands in launch/.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

import torch
from torch import Tensor

from benchmarks.common import whole_numbers
from conf.numbers import format_length, given_length
from data.errors import DataError
from evals.context import Context
from evals.loading import load_trained
from evals.protocol import Job
from evals.routing import observed
from launch.cli import UsageError, exits_on
from moba.documents import Documents
from moba.kinds import Full
from train.checkpoint.store import CheckpointError

PACK_TOKENS = 64 * 1024
OPTIONS = {"init.source": "--model", "data=": "--text ", "path=": "--text ", "data.validation": "--text"}
OPTIONS |= {"seq_len=": "--length ", "eval.seq_len": "--length"}
"""Keys in messages -> the options of the benchmark."""


class Recorded(NamedTuple):
    """What the attention of some layers is given for a pack of equally long documents."""

    model: str
    ids: Sequence[str]
    length: int
    qkv: dict[int, tuple[Tensor, Tensor, Tensor]]
    """layer -> q [T, H, D], after RoPE, and k, v [T, G, D]; bf16 on a GPU."""


@exits_on(CheckpointError, DataError, ValueError, OSError, typed=OPTIONS)
@torch.no_grad()
def record_layers(
    model: str, text: str, length: str | None = None, layers: str | None = None, pack_tokens: int = PACK_TOKENS
) -> Recorded:
    """As many documents of `text` as fill a pack of `pack_tokens`, each cut to `length` (default: what the model was
    trained for), through `model` with full attention. `layers`: by commas, from 0 (default: first, middle, last).

    Exits with one message for what cannot be read, for too little text, and for layers without full attention.
    """
    trained = load_trained(model)
    plan = [spec.dense() for spec in trained.stage.attention]
    default = f"0,{len(plan) // 2},{len(plan) - 1}"
    chosen = whole_numbers({"--layers": layers or default}, "--layers", default, least=0)
    if wrong := [layer for layer in chosen if layer >= len(plan) or plan[layer] != Full()]:
        has = f"has {plan[wrong[0]]}" if wrong[0] < len(plan) else f"is none of the {len(plan)}, counted from 0"
        raise UsageError(
            f"--layers={layers or default}: layer {wrong[0]} of {model} {has}; choose layers with full attention"
        )
    values = {"data": text, "seq_len": length or str(min(trained.stage.seq_len, pack_tokens))}
    size = given_length(values, "seq_len")
    number = max(1, pack_tokens // size)
    values["documents"] = str(number)
    found = Job(Context(trained.model, trained.device), trained, values, Path()).held_out()
    if len(found) < number:
        has = f"{len(found)} documents have more than {format_length(size)} tokens"
        raise UsageError(f"--text {text}: {has}, the pack needs {number}; give more text or a shorter --length")
    batches = [batch.to(trained.device) for _, batch in found]
    tokens, positions = (torch.cat([getattr(b, name) for b in batches]) for name in ("tokens", "positions"))
    qkv = {}

    def keep(place, spec, q, k, v, documents) -> None:
        qkv[chosen[place]] = (q.contiguous(), k.contiguous(), v.contiguous())

    trained.model.set_attention(plan)
    documents = Documents.from_lengths([size] * number, device=trained.device)
    with observed(trained.model, chosen, keep):
        trained.model.logits(tokens, positions, documents, rows=tokens.new_zeros(1))
    return Recorded(trained.config.run.name, found.ids, size, qkv)
