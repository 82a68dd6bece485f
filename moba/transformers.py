"""MoBA as an attention implementation of Hugging Face transformers: `attn_implementation="moba"`.

    import moba.transformers
    model = AutoModelForCausalLM.from_pretrained(name)
    moba.transformers.configure(model, block_size=4096, top_k=12, full_last=3)

Importing this module registers it. A checkpoint whose config.json has `"moba": {"plan": [[kind, block_size, top_k], one
entry a layer]}` needs no `configure`: `from_pretrained(..., attn_implementation="moba")` is enough.

Generation reads the prompt with MoBA and decodes, by default, with full attention, as the paper evaluates (section
3.3). `decode="moba"` routes new tokens like any others; block means are then recomputed from the cached keys at every
step, so that a step reads all keys (but not all values). A step of one new token over a longer cache is decoding, and
a longer one is a chunk of prompt, which stays MoBA; so a prompt's last chunk should not be a single token.

Padding, left or right, is taken out before attention and put back as zeros, so blocks start at each row's first real
token. Documents packed into rows are kept apart where transformers says that there are any: by position_ids without
attention_mask and cache (its own rule), or by `cu_seq_lens_q` and `cu_seq_lens_k`. Grouped keys and values are not
repeated. Whatever would be ignored or wrong raises ValueError with its name: dropout, output_attentions, sliding
windows shorter than the text, 4-D masks, static and paged caches, score caps and sinks, position_ids that start anew
where transformers does not look for packing. Not for torch.compile.

Shapes: B rows, Q new tokens and S keys a row, T tokens in all, H query heads, G key/value heads, D head size.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Protocol

import torch
import torch.nn.functional as F
from torch import Tensor
from transformers import AttentionInterface, AttentionMaskInterface, PreTrainedModel
from transformers.masking_utils import causal_mask_function

from moba.attention import attend
from moba.documents import Documents
from moba.kinds import AttentionSpec, Full, Moba, from_entry
from moba.kv_cache import DECODE_DENSE, DECODE_MODES

NAME = Moba.name
"""What transformers, and the settings in a config, call it."""
SETTINGS = ("plan", "decode")
# Arguments some models pass to their attention, which MoBA would have to ignore.
UNSUPPORTED = {
    "softcap": "caps its scores",
    "s_aux": "has attention sinks",
    "position_bias": "adds a position bias to its scores",
    "cache": "runs with a paged cache (continuous batching)",
}


def register() -> None:
    """Makes "moba" known to transformers; done when this module is imported. With the attention function alone, models
    would hand it no mask, and padding would be lost."""
    AttentionInterface.register(NAME, attention_forward)
    AttentionMaskInterface.register(NAME, token_layout)


def configure(
    model: PreTrainedModel,
    *,
    block_size: int | None = None,
    top_k: int | None = None,
    first_blocks: int = 0,
    full_last: int = 0,
    plan: Sequence[AttentionSpec | Sequence] | None = None,
    decode: str = DECODE_DENSE,
) -> None:
    """Switches a loaded transformers model to MoBA; no weight is touched, and `save_pretrained` writes it down.

    Either `block_size` and `top_k` (which counts the query's own block) for all layers but the last `full_last`, which
    keep full attention, or `plan`: one AttentionSpec or (kind, block_size, top_k) a layer, MoBA's also with
    first_blocks behind. `first_blocks` of the top_k are always the first of the text: 0 as in the paper; 1 keeps the
    attention sink of a model that was not trained with MoBA. `decode`: "full" or "moba". May be called again. Raises
    ValueError for anything that does not fit.
    """
    config = model.config.get_text_config()
    num_layers: int = config.num_hidden_layers
    if (plan is None) == (block_size is None and top_k is None):
        raise ValueError("give block_size and top_k, or plan with one entry a layer")
    if plan is None:
        if not 0 <= full_last <= num_layers:
            raise ValueError(f"full_last={full_last}: the model has {num_layers} layers")
        sparse = [Moba.name, block_size, top_k, *([first_blocks] if first_blocks else [])]
        plan = [sparse] * (num_layers - full_last) + [Full().entry()] * full_last
    elif full_last or first_blocks:
        name, value = ("full_last", full_last) if full_last else ("first_blocks", first_blocks)
        raise ValueError(f"{name}={value} with plan: the plan says it of each layer")
    entries = [e.entry() if isinstance(e, AttentionSpec) else list(e) for e in plan]
    settings = {"plan": entries, "decode": decode}
    for layer in range(num_layers):
        _layer_spec(settings, layer, num_layers)
    setattr(config, NAME, settings)
    model.set_attn_implementation(NAME)


# -------------------- what transformers calls


class ModelSettings(Protocol):
    """Of a model's configuration, what is read besides `moba`."""

    num_hidden_layers: int


class AttentionModule(Protocol):
    """Of a model's attention module, what is read."""

    config: ModelSettings
    layer_idx: int


@dataclass(frozen=True)
class TokenLayout:
    """Where the real tokens of a padded or packed batch are, and which belong together.

    `documents` are those of the batch once padding is out; the indices (int64) say where their queries and keys were in
    the flattened batch, None: everywhere, there was no padding.
    """

    documents: Documents
    query_index_T: Tensor | None = None
    key_index_T: Tensor | None = None


def token_layout(
    batch_size: int,
    q_length: int,
    kv_length: int,
    q_offset: int | Tensor = 0,
    kv_offset: int = 0,
    mask_function: Callable = causal_mask_function,
    attention_mask: Tensor | None = None,
    use_vmap: bool = False,
    device: torch.device | str = "cpu",
    **_,
) -> TokenLayout | None:
    """The layout of a batch, made once for all layers; None if rows are single documents without padding.

    This is MoBA's mask function: transformers hands what it returns to `attention_forward` as `attention_mask`. Takes
    the 2-D mask ([B, S], true for real tokens) and the causal, packed or windowed pattern as a function of indices.
    Reads the mask on the host. Raises ValueError for patterns that are no packed causal documents.
    """
    if kv_offset or int(q_offset) + q_length != kv_length:
        raise ValueError(
            f"a cache that holds {kv_length} keys for {int(q_offset) + q_length} tokens (static or sliding, or a mask "
            "longer than the tokens): attn_implementation='moba' needs all keys and no others, as in a DynamicCache"
        )
    starts_BQ = None
    if use_vmap:
        raise ValueError("a custom mask pattern: attn_implementation='moba' knows causal documents only")
    if mask_function is not causal_mask_function:
        starts_BQ = _document_starts(mask_function, batch_size, int(q_offset), q_length, device)
    if attention_mask is not None and tuple(attention_mask.shape) != (batch_size, kv_length):
        raise ValueError(
            f"attention_mask has shape {list(attention_mask.shape)}: attn_implementation='moba' needs "
            f"[{batch_size}, {kv_length}], the cached tokens' part included"
        )
    padded = attention_mask is not None and not bool(attention_mask.all())
    if starts_BQ is not None:
        if padded:
            raise ValueError("attention_mask with padding over packed documents: leave one of them out")
        bounds = F.pad(starts_BQ.flatten(), (0, 1), value=True).nonzero().flatten()
        return TokenLayout(Documents.from_lengths(bounds.diff().tolist(), device=device))
    if attention_mask is None or not padded:
        return None
    key_BS = attention_mask.bool()
    query_BQ = key_BS[:, kv_length - q_length :]
    documents = Documents.from_lengths(*(real.sum(1).tolist() for real in (query_BQ, key_BS)), device=device)
    return TokenLayout(documents, *(real.flatten().nonzero().flatten() for real in (query_BQ, key_BS)))


def attention_forward(
    module: AttentionModule,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: TokenLayout | None,
    dropout: float = 0.0,
    scaling: float | None = None,
    **kwargs,
) -> tuple[Tensor, None]:
    """(attention output [B, Q, H, D] in query's dtype, None), zero for padding; the layer's plan entry says how.

    query is [B, H, Q, D], key and value are [B, G, S, D], S >= Q: queries are the last tokens. `attention_mask` is
    what `token_layout` made of the mask. Raises ValueError for what is not supported, naming it.
    """
    _refuse_unsupported(module, attention_mask, dropout, key.shape[2], kwargs)
    config = module.config
    settings = getattr(config, NAME, None)
    spec = _layer_spec(settings, module.layer_idx, config.num_hidden_layers)
    assert settings is not None
    if query.shape[2] == 1 < key.shape[2] and settings.get("decode", DECODE_DENSE) == DECODE_DENSE:
        spec = spec.dense()
    layout = _packed_layout(query, key, kwargs, attention_mask) or attention_mask
    if layout is None:
        if module.layer_idx == 0:
            _refuse_ignored_packing(kwargs.get("position_ids"))
        layout = TokenLayout(_rows(query.shape[0], query.shape[2], key.shape[2], query.device))
    q_THD = _pack(query, layout.query_index_T)
    if q_THD.shape[0] == 0:
        return torch.zeros_like(query.transpose(1, 2)), None
    out_THD, _ = attend(
        q_THD,
        _pack(key, layout.key_index_T),
        _pack(value, layout.key_index_T),
        spec,
        layout.documents.to(query.device),
        softmax_scale=scaling,
        deterministic=torch.are_deterministic_algorithms_enabled(),
    )
    return _unpack(out_THD, layout.query_index_T, query.shape[0], query.shape[2]), None


# -------------------- settings and refusals


def _layer_spec(settings: dict | None, layer: int, num_layers: int) -> AttentionSpec:
    """The plan's entry for a layer; ValueError, naming the key, if the settings (`config.moba`) are not in order."""
    if not isinstance(settings, dict) or "plan" not in settings:
        raise ValueError(
            f"config.moba={settings!r} has no plan: call moba.transformers.configure(model, block_size=..., top_k=...)"
            ', or put {"plan": [[kind, block_size, top_k], ...]} with one entry a layer into the config'
        )
    unknown = sorted(settings.keys() - set(SETTINGS))
    if unknown:
        raise ValueError(f"config.moba has {', '.join(unknown)}: it takes {', '.join(SETTINGS)}")
    if settings.get("decode", DECODE_DENSE) not in DECODE_MODES:
        raise ValueError(f"decode={settings['decode']!r}: choose one of {', '.join(DECODE_MODES)}")
    plan = settings["plan"]
    if len(plan) != num_layers:
        raise ValueError(f"a MoBA plan of {len(plan)} layers for a model of {num_layers}")
    entry = plan[layer]
    try:
        return from_entry(entry)
    except ValueError as error:
        raise ValueError(f"plan[{layer}]={entry!r}: {error}") from error


def _refuse_unsupported(module: AttentionModule, mask, dropout: float, num_keys: int, kwargs: dict) -> None:
    """Raises ValueError, by name, for what attention is asked to do beyond causal attention over packed documents."""
    problem = None
    window = kwargs.get("sliding_window")
    if dropout:
        problem = f"dropout={dropout}: set config.attention_dropout to 0"
    elif kwargs.get("output_attentions"):
        problem = "output_attentions=True: attention weights are never formed"
    elif window is not None and window < num_keys:
        problem = f"sliding_window={window} with {num_keys} keys: set config.sliding_window to None before loading"
    elif mask is not None and not isinstance(mask, TokenLayout):
        problem = f"an attention_mask of shape {list(mask.shape)}: give the model a 2-D mask, 1 for real tokens"
    elif kwargs.get("is_causal") is False or getattr(module, "is_causal", True) is False:
        problem = "is_causal=False: MoBA is causal"
    for name, what in UNSUPPORTED.items():
        if kwargs.get(name) is not None:
            problem = f"{name}: the model {what}"
    if problem:
        raise ValueError(f"attn_implementation='moba' does not support {problem}")


def _refuse_ignored_packing(positions: Tensor | None) -> None:
    """Raises ValueError if positions [B, Q] start anew within a row that is taken for one document. Reads them on the
    host, so one layer does it for all."""
    if positions is not None and positions.dim() == 2 and bool((positions.diff(dim=1) != 1).any()):
        raise ValueError(
            "position_ids start anew within a row, but with attention_mask or a cache transformers does not take that "
            "for packed documents: pass use_cache=False and no attention_mask, or cu_seq_lens_q and cu_seq_lens_k"
        )


# -------------------- batches to packs and back


def _document_starts(
    mask_function: Callable, batch_size: int, q_offset: int, q_length: int, device: torch.device | str
) -> Tensor | None:
    """Bool [B, Q], true where a document starts, for the pattern (row, head, query, key) -> may see; None if each row
    is one document.

    A document starts where a token does not see the one before. That it sees back to the start of its document rules
    out sliding windows that hide something; ValueError then.
    """
    row_B1 = torch.arange(batch_size, device=device)[:, None]
    head = torch.zeros((), dtype=torch.int64, device=device)
    query_1Q = torch.arange(q_offset, q_offset + q_length, device=device)[None]
    sees_previous = mask_function(row_B1, head, query_1Q, (query_1Q - 1).clamp(min=0)).expand(batch_size, -1)
    first_BQ = torch.where(sees_previous, 0, query_1Q).cummax(1).values
    if not bool(mask_function(row_B1, head, query_1Q, first_BQ).all()) or (q_offset and not bool(sees_previous.all())):
        raise ValueError(
            "a mask that hides part of a text (sliding window): attn_implementation='moba' does not support "
            "sliding_window shorter than the text; set config.sliding_window to None before loading"
        )
    if bool(sees_previous.all()):
        return None
    starts_BQ = ~sees_previous
    starts_BQ[:, 0] = True
    return starts_BQ


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
    return TokenLayout(Documents.from_bounds(bounds, bounds_k, query.shape[2], key.shape[2], query.device))


@functools.lru_cache(maxsize=16)
def _rows(num_rows: int, num_queries: int, num_keys: int, device: torch.device) -> Documents:
    """Rows that are single documents without padding."""
    return Documents.from_lengths([num_queries] * num_rows, [num_keys] * num_rows, device=device)


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
