"""MoBA as an attention implementation of Hugging Face transformers: `attn_implementation="moba"`.

    import moba.transformers
    model = AutoModelForCausalLM.from_pretrained(name)
    moba.transformers.configure(model, block_size=4096, top_k=12, full_last=3)

Importing this module registers it. A checkpoint whose config.json has `"moba": {"plan": [[kind, block_size, top_k], one
entry per layer]}` needs no `configure`: `from_pretrained(..., attn_implementation="moba")` is enough.

Generation reads the prompt with MoBA and decodes, by default, with full attention, as the paper evaluates (section
3.3). `decode="moba"` routes new tokens like any others; block means are then recomputed from the cached keys at every
step, so that a step reads all keys (but not all values); on CUDA the Triton kernels do the rest. With decode="full" it
matters what is prompt: `with prompt(tokens):` says so. Without it, it is what was read into the empty cache, tokens
that follow one by one are decoded, and several at a time over a cache are refused, since they may be either. So
generate() needs prompt() for a prompt in chunks, speculative decoding and use_cache=False.

Padding, left or right, is taken out before attention and put back as zeros, so blocks start at each row's first real
token. Documents packed into rows are kept apart where transformers says that there are any: by position_ids without
attention_mask and cache (its own rule), or by `cu_seq_lens_q` and `cu_seq_lens_k`. Grouped keys and values are not
repeated; values may have a smaller head size than keys. Whatever would be ignored or wrong raises ValueError with its
name: models with an attention of their own, masks that are not causal (bidirectional, prefix-LM), dropout,
output_attentions, sliding windows shorter than the text, 4-D masks and masks of other values than 0 and 1,
static and paged caches, score caps and sinks, position_ids that start anew where transformers does not look for
packing. docs/transformers.md lists the families of models. Not for torch.compile.

Shapes: B rows, Q new tokens and S keys per row, T tokens in all, H query heads, G key/value heads, D head size (Dv of
values).
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from contextvars import ContextVar
from os import PathLike

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers import AttentionInterface, AttentionMaskInterface, PreTrainedModel

from moba.attention import attend
from moba.documents import Documents
from moba.hf_layout import OTHERWISE, REFUSES, TokenLayout, padded_rows, rows_alone, token_layout
from moba.hf_refusals import (
    Calls,
    refuse_ignored_packing,
    refuse_unless_switched,
    refuse_unsupported,
    watch_all,
    watch_what_is_made,
)
from moba.kinds import AttentionSpec, Full, Moba, from_entry
from moba.kinds.plan_file import read_plan
from moba.kv_cache import DECODE_DENSE, DECODE_MODES, DECODE_OWN

NAME = Moba.name
"""What transformers calls it."""
KEY = Moba.name
"""Where a config has the settings."""
SETTINGS = ("plan", "decode")
SET_PLAN = "call moba.transformers.configure(model, block_size=..., top_k=...), or put"
TELL_PROMPT = "moba.transformers.prompt(tokens)"
"""How a plan is set, and the prompt told, in messages."""


def register() -> None:
    """Makes "moba" known to transformers; done when this module is imported. With the attention function alone, models
    would hand it no mask, and padding would be lost."""
    AttentionInterface.register(NAME, attention_forward)
    AttentionMaskInterface.register(NAME, token_layout)
    watch_what_is_made(NAME)


def configure(
    model: PreTrainedModel,
    *,
    block_size: int | None = None,
    top_k: int | None = None,
    first_blocks: int = 0,
    full_last: int = 0,
    plan: Sequence[AttentionSpec | Sequence] | str | PathLike | None = None,
    decode: str = DECODE_DENSE,
) -> None:
    """Switches a loaded transformers model to MoBA; weights do not change, and `save_pretrained` saves the setting.

    Either `block_size` and `top_k` (which includes the query's own block) for all layers but the last `full_last`,
    which keep full attention, or `plan`: one AttentionSpec or (kind, block_size, top_k) per layer, for MoBA optionally
    with first_blocks as a fourth entry, or the path of a plan file (moba/kinds/plan_file.py). `first_blocks` of the
    top_k blocks are always the first ones of the text: 0 as in the paper; 1 keeps the attention sink of a model that
    was not trained with MoBA. `decode`: "full" or "moba". May be called again. Raises ValueError for arguments that do
    not fit.
    """
    config = model.config.get_text_config()
    num_layers = getattr(config, "decoder_layers", None) or config.num_hidden_layers
    if (plan is None) == (block_size is None and top_k is None):
        raise ValueError("give block_size and top_k, or plan with one entry per layer")
    if plan is None:
        if not 0 <= full_last <= num_layers:
            raise ValueError(f"full_last={full_last}: the model has {num_layers} layers")
        sparse = [Moba.name, block_size, top_k, *([first_blocks] if first_blocks else [])]
        plan = [sparse] * (num_layers - full_last) + [Full().entry()] * full_last
    elif full_last or first_blocks:
        name, value = ("full_last", full_last) if full_last else ("first_blocks", first_blocks)
        raise ValueError(f"{name}={value} with plan: the plan says it of each layer")
    assert plan is not None
    if isinstance(plan, str | PathLike):
        plan = read_plan(plan, num_layers)
    entries = [e.entry() if isinstance(e, AttentionSpec) else list(e) for e in plan]
    settings = {"plan": entries, "decode": decode}
    if len(entries) != num_layers:
        raise ValueError(f"a MoBA plan of {len(entries)} layers for a model of {num_layers}")
    for layer in range(num_layers):
        _layer_spec(settings, layer)
    watch_all(model, NAME)
    before, settings_before = model.config._attn_implementation, getattr(config, KEY, None)
    setattr(config, KEY, settings)
    model.set_attn_implementation(NAME)
    try:
        refuse_unless_switched(model, NAME)
    except ValueError:
        delattr(config, KEY) if settings_before is None else setattr(config, KEY, settings_before)
        model.set_attn_implementation(before or "eager")
        raise


# -------------------- what is prompt


_PROMPT: ContextVar[int | None] = ContextVar("prompt", default=None)


@contextmanager
def prompt(tokens: int) -> Iterator[None]:
    """Context in which the first `tokens` columns of each row, padding included, are the prompt and later ones are
    decoded.

    With it, decode="full" gives the same results however a text is cut: prompts in chunks, several new tokens per step
    (speculative decoding), or rereading everything at each step (use_cache=False).

        with moba.transformers.prompt(ids.shape[1]):
            model.generate(ids, prompt_lookup_num_tokens=4)

    Applies to the current thread. Raises ValueError unless `tokens` is an integer of at least 1.
    """
    if not isinstance(tokens, int) or isinstance(tokens, bool) or tokens < 1:
        raise ValueError(f"prompt({tokens!r}): needs the number of the prompt's tokens, such as ids.shape[1]")
    token = _PROMPT.set(tokens)
    try:
        yield
    finally:
        _PROMPT.reset(token)


def _first_decoded(num_queries: int, num_keys: int) -> int:
    """The column from which on tokens are decoded, between those of the first query and of none."""
    earlier = num_keys - num_queries
    told = _PROMPT.get()
    if told is not None:
        return min(max(told, earlier), num_keys)
    if earlier and num_queries > 1:
        raise ValueError(
            f"{num_queries} new tokens over {earlier} in the cache may be a chunk of the prompt or several decoded "
            "tokens, which attn_implementation='moba' computes differently: run it within "
            f"`with {TELL_PROMPT}:`, or set config.moba['decode']={DECODE_OWN!r}"
        )
    return earlier or num_keys


# -------------------- what transformers calls


def attention_forward(
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: TokenLayout | None,
    dropout: float = 0.0,
    scaling: float | None = None,
    **kwargs,
) -> tuple[Tensor, None]:
    """(attention output [B, Q, H, Dv] in query's dtype, None), zero for padding; the layer's plan entry says how.

    query is [B, H, Q, D], key [B, G, S, D] and value [B, G, S, Dv], S >= Q, Dv <= D: queries are the last tokens.
    `attention_mask` is what `token_layout` made of the mask. Raises ValueError for what is not supported, naming it.
    """
    Calls.number += 1
    num_rows, num_queries, num_keys = query.shape[0], query.shape[2], key.shape[2]
    refuse_unsupported(module, attention_mask, dropout, (num_rows, num_queries, num_keys), kwargs)
    settings = getattr(module.config, KEY, None)
    spec = _layer_spec(settings, getattr(module, "layer_idx", None))
    assert settings is not None
    layout = _packed_layout(query, key, kwargs, attention_mask)
    if layout is None:
        refuse_ignored_packing(kwargs.get("position_ids"), attention_mask)
        layout = attention_mask
    if layout is None:
        layout = TokenLayout(rows_alone(num_rows, num_queries, num_keys, query.device))
    dense = spec.dense() if settings.get("decode", DECODE_DENSE) == DECODE_DENSE else spec
    first = num_keys if dense == spec else _first_decoded(num_queries, num_keys)
    read = first - (num_keys - num_queries)
    if read in (0, num_queries):
        return _attend(query, key, value, layout, spec if read else dense, scaling), None
    if layout.is_packed:
        raise ValueError(f"prompt({first}) within packed documents: give it one text per row, or leave prompt() out")
    whole_BS = layout.real_BS
    if whole_BS is None:
        head = TokenLayout(rows_alone(num_rows, read, first, query.device))
        tail = TokenLayout(rows_alone(num_rows, num_queries - read, num_keys, query.device))
    else:
        head, tail = padded_rows(whole_BS[:, :first], read), padded_rows(whole_BS, num_queries - read)
    parts = [
        _attend(query[:, :, :read], key[:, :, :first], value[:, :, :first], head, spec, scaling),
        _attend(query[:, :, read:], key, value, tail, dense, scaling),
    ]
    return torch.cat(parts, dim=1), None


def _attend(
    query: Tensor, key: Tensor, value: Tensor, layout: TokenLayout, spec: AttentionSpec, scaling: float | None
) -> Tensor:
    """Attention [B, Q, H, Dv] by a layout; zeros where there was padding."""
    size, size_k = value.shape[3], key.shape[3]
    if size > size_k:
        raise ValueError(f"{REFUSES} values of head size {size} with keys of {size_k}: at most the keys'{OTHERWISE}")
    q_THD = _pack(query, layout.query_index_T)
    if q_THD.shape[0] == 0:
        return query.new_zeros(query.shape[0], query.shape[2], query.shape[1], size)
    out_THD, _ = attend(
        q_THD,
        _pack(key, layout.key_index_T),
        _pack(F.pad(value, (0, size_k - size)) if size < size_k else value, layout.key_index_T),
        spec,
        layout.documents.to(query.device),
        softmax_scale=scaling,
        deterministic=torch.are_deterministic_algorithms_enabled(),
    )
    return _unpack(out_THD[..., :size], layout.query_index_T, query.shape[0], query.shape[2])


# -------------------- settings


def _layer_spec(settings: dict | None, layer: int | None) -> AttentionSpec:
    """The plan's entry for a layer; ValueError, naming the key, if the settings (`config.moba`) are not in order."""
    if not isinstance(settings, dict) or "plan" not in settings:
        raise ValueError(
            f"config.moba={settings!r} has no plan: {SET_PLAN} "
            '{"plan": [[kind, block_size, top_k], ...]} with one entry per layer into the config'
        )
    unknown = sorted(settings.keys() - set(SETTINGS))
    if unknown:
        raise ValueError(f"config.moba has {', '.join(unknown)}: it takes {', '.join(SETTINGS)}")
    if settings.get("decode", DECODE_DENSE) not in DECODE_MODES:
        raise ValueError(f"decode={settings['decode']!r}: choose one of {', '.join(DECODE_MODES)}")
    plan = settings["plan"]
    if layer is None or layer >= len(plan):
        raise ValueError(
            f"config.moba has a plan of {len(plan)} layers, and attention is asked of layer {layer}: "
            "attn_implementation='moba' needs one entry for each numbered layer that attends"
        )
    entry = plan[layer]
    try:
        return from_entry(entry)
    except ValueError as error:
        raise ValueError(f"plan[{layer}]={entry!r}: {error}") from error


# -------------------- batches to packs and back


def _packed_layout(query: Tensor, key: Tensor, kwargs: dict, layout: TokenLayout | None) -> TokenLayout | None:
    """The layout that the caller gave as flash attention's arguments, None without them."""
    cu_seqlens, cu_seqlens_k = kwargs.get("cu_seq_lens_q"), kwargs.get("cu_seq_lens_k")
    if cu_seqlens is None and cu_seqlens_k is None:
        return None
    padded = layout is not None and layout.query_index_T is not None
    if cu_seqlens is None or cu_seqlens_k is None or query.shape[0] != 1 or query.shape[2] != key.shape[2] or padded:
        raise ValueError(
            f"cu_seq_lens_q, cu_seq_lens_k with {query.shape[0]} rows, {query.shape[2]} tokens, {key.shape[2]} keys: "
            "attn_implementation='moba' needs both, and one row without padding and without earlier tokens in a cache"
        )
    bounds, bounds_k = (given.to(torch.int32) for given in (cu_seqlens, cu_seqlens_k))
    documents = Documents.from_bounds(bounds, bounds_k, query.shape[2], key.shape[2], query.device)
    return TokenLayout(documents, is_packed=documents.number > 1)


def _pack(x_BHSD: Tensor, index_T: Tensor | None) -> Tensor:
    """[T, H, D]: the tokens at these places of the flattened batch, or all."""
    x_THD = x_BHSD.transpose(1, 2).flatten(0, 1)
    return x_THD if index_T is None else x_THD[index_T.to(x_THD.device)]


def _unpack(out_THD: Tensor, index_T: Tensor | None, num_rows: int, length: int) -> Tensor:
    """[B, Q, H, D], contiguous; zeros where there was padding."""
    if index_T is not None:
        zeros = out_THD.new_zeros(num_rows * length, *out_THD.shape[1:])
        out_THD = zeros.index_copy(0, index_T.to(out_THD.device), out_THD)
    return out_THD.unflatten(0, (num_rows, length)).contiguous()


register()
