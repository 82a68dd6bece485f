"""What transformers' attention masks say, as documents: MoBA's mask function, whose result takes the mask's place.

transformers gives a mask as a 2-D tensor of real tokens and a function of indices that it composes itself. Documents
can say only some of these: causal attention, packed by position_ids, and windows and chunks that hide nothing of their
document. The parts of a composed function are known by the name of the function in transformers that made them; with
any other part the layout carries the reason, and attention that is handed it refuses. It is not refused when it is
made: models make masks that none of their layers uses.

Models that read their mask themselves, rather than hand it to their attention, would compute something else with it
(or, given None, without any mask). So there always is a layout, and whoever takes it for a tensor gets the reason too.

Shapes: B rows, Q new tokens and S keys per row, T tokens in all.
"""

from __future__ import annotations

import functools
import inspect
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from itertools import chain

import torch
import torch.nn.functional as F
from torch import Tensor
from transformers import masking_utils
from transformers.masking_utils import causal_mask_function

from moba.documents import Documents

REFUSES = "attn_implementation='moba' does not support"
OTHERWISE = "; transformers' own attention, such as attn_implementation='eager', does"
# The functions of transformers.masking_utils that make a part of a pattern: those of which each query sees the keys
# from some first one up to itself, so that their intersection does, and what the others are called in messages.
INTERVALS = {
    "causal_mask_function",
    "sliding_window_overlay",
    "chunked_overlay",
    "packed_sequence_mask_function",
}
JOINTS = {
    "and_masks": "mask_functions",
    "or_masks": "mask_functions",
    "remap_positions_for_packed_sequence": "mask_function",
}
BLOCKS = "blockwise_overlay"
OTHERS = {
    "bidirectional_mask_function": "bidirectional attention (is_causal=False, an encoder)",
    "sliding_window_bidirectional_overlay": "bidirectional attention",
    BLOCKS: "tokens that see later ones (block_sequence_ids, as for images)",
    "": "a mask pattern without a causal part",
    "or_masks": "tokens that may see later ones (or_masks)",
}


class NotATensor(ValueError, AttributeError):
    """A layout was taken for a tensor. An AttributeError too, so that hasattr(layout, ...) is False."""


@dataclass(frozen=True, eq=False)
class TokenLayout:
    """Where the real tokens of a padded or packed batch are, and which belong together.

    `documents` are those of the batch once padding is out; the indices (int64) say where their queries and keys were in
    the flattened batch, None: everywhere, there was no padding.
    """

    documents: Documents
    query_index_T: Tensor | None = None
    key_index_T: Tensor | None = None
    real_BS: Tensor | None = None
    """Bool, the real tokens of a batch with padding whose rows are one document each; else None."""
    size: tuple[int, int, int] | None = None
    """(B, Q, S) that it was made for."""
    is_packed: bool = False
    """Rows hold several documents."""
    problem: str | None = None
    """Why attention that is handed it cannot be MoBA's."""
    seen: set[str] = field(default_factory=set)
    """What has been checked once for all layers."""

    @classmethod
    def __torch_function__(cls, function, types, args=(), kwargs=None):
        problems = [one.problem for one in (*args, *(kwargs or {}).values()) if isinstance(one, cls)]
        raise _taken_for_a_tensor(next(iter(problems), None), getattr(function, "__name__", "an operation"))

    def __getattr__(self, name: str):
        if name.startswith("__"):
            raise AttributeError(name)
        raise _taken_for_a_tensor(self.problem, f".{name}")

    def _refused_operator(self, *_):
        raise _taken_for_a_tensor(self.problem, "an operator")

    __getitem__ = __iter__ = __len__ = __bool__ = __invert__ = _refused_operator
    __add__ = __radd__ = __sub__ = __rsub__ = __mul__ = __rmul__ = __and__ = __or__ = _refused_operator
    __lt__ = __gt__ = __le__ = __ge__ = _refused_operator


def _taken_for_a_tensor(problem: str | None, how: str) -> NotATensor:
    own = f"{REFUSES} models that use their attention mask outside of their attention (here: {how}){OTHERWISE}"
    return NotATensor(problem or own)


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
) -> TokenLayout:
    """The layout of a batch, made once for all layers.

    This is MoBA's mask function: transformers hands what it returns to `attention_forward` as `attention_mask`. Takes
    the 2-D mask (bool [B, S], true for real tokens) and the causal, packed or windowed pattern as a function of
    indices. Reads the mask on the host. What documents cannot say becomes the layout's `problem`.
    """
    size = (batch_size, q_length, kv_length)
    rows = rows_alone(batch_size, q_length, max(kv_length, q_length), torch.device(device))
    problem = _problem(size, int(q_offset), kv_offset, mask_function, attention_mask, use_vmap)
    if problem is not None:
        return TokenLayout(rows, size=size, problem=problem)
    padded = attention_mask is not None and not bool(attention_mask.all())
    real_BS = attention_mask.bool() if attention_mask is not None and padded else None
    starts_BQ = None
    if mask_function is not causal_mask_function:
        starts_BQ, hides = _document_starts(mask_function, real_BS, size, int(q_offset), device)
        if hides:
            return TokenLayout(rows, size=size, problem=hides)
    if starts_BQ is not None:
        query_index_T = None if real_BS is None else real_BS.flatten().nonzero().flatten()
        starts_T = starts_BQ.flatten() if query_index_T is None else starts_BQ.flatten()[query_index_T]
        bounds = F.pad(starts_T, (0, 1), value=True).nonzero().flatten()
        documents = Documents.from_lengths(bounds.diff().tolist(), device=device)
        return TokenLayout(documents, query_index_T, query_index_T, size=size, is_packed=True)
    if real_BS is None:
        return TokenLayout(rows, size=size)
    return padded_rows(real_BS, q_length)


def padded_rows(real_BS: Tensor, q_length: int) -> TokenLayout:
    """The layout of rows that are one document each, of these real tokens, the last `q_length` of them queries."""
    real_BQ = real_BS[:, real_BS.shape[1] - q_length :]
    lengths, lengths_k = (real.sum(1).tolist() for real in (real_BQ, real_BS))
    documents = Documents.from_lengths(lengths, lengths_k, device=real_BS.device)
    index_T, index_k_T = (real.flatten().nonzero().flatten() for real in (real_BQ, real_BS))
    return TokenLayout(documents, index_T, index_k_T, real_BS, (real_BS.shape[0], q_length, real_BS.shape[1]))


@functools.lru_cache(maxsize=16)
def rows_alone(num_rows: int, num_queries: int, num_keys: int, device: torch.device) -> Documents:
    """Rows that are single documents without padding."""
    return Documents.from_lengths([num_queries] * num_rows, [num_keys] * num_rows, device=device)


def _problem(size, q_offset: int, kv_offset: int, mask_function, attention_mask, use_vmap: bool) -> str | None:
    """Why documents cannot say it, as far as no mask has to be read; None if they can."""
    batch_size, q_length, kv_length = size
    if use_vmap:
        return f"{REFUSES} a custom mask pattern (prefix-LM or image tokens): it knows causal documents only{OTHERWISE}"
    parts = list(_parts(mask_function))
    for part in parts if causal_mask_function.__name__ in parts else [*parts, ""]:
        if part not in INTERVALS:
            return f"{REFUSES} {OTHERS.get(part, f'the mask pattern {part}')}: it is causal{OTHERWISE}"
    if kv_offset or q_offset + q_length != kv_length:
        return (
            f"{REFUSES} a cache that holds {kv_length} keys for {q_offset + q_length} tokens (static or sliding, or a "
            "mask longer than the tokens): give it all keys and no others, as in a DynamicCache"
        )
    if attention_mask is not None and tuple(attention_mask.shape) != (batch_size, kv_length):
        return (
            f"attention_mask has shape {list(attention_mask.shape)}: attn_implementation='moba' needs "
            f"[{batch_size}, {kv_length}], the cached tokens' part included"
        )
    return None


def _parts(mask_function: Callable) -> Iterator[str]:
    """The names of a pattern's parts, those of transformers' functions that made them; all are joined by `and_masks`
    unless "or_masks" is among them."""
    if getattr(mask_function, "__module__", None) != masking_utils.__name__:
        yield getattr(mask_function, "__qualname__", repr(mask_function))
        return
    name = mask_function.__qualname__.partition(".")[0]
    if name not in JOINTS and name != BLOCKS:
        yield name
        return
    given = inspect.getclosurevars(mask_function).nonlocals
    if name == BLOCKS:
        if bool((given["block_sequence_ids"] >= 0).any()):  # else it adds nothing
            yield name
        return
    inner = given[JOINTS[name]]
    found = [list(_parts(one)) for one in (inner if isinstance(inner, tuple) else (inner,))]
    yield from chain(*found)
    if name == "or_masks" and sum(map(bool, found)) > 1:
        yield name


def _document_starts(
    mask_function: Callable, real_BS: Tensor | None, size: tuple[int, int, int], q_offset: int, device
) -> tuple[Tensor | None, str | None]:
    """(bool [B, Q], true where a document starts, None if each row is one; why there are no documents or None).

    For a pattern (row, head, query, key) -> may see, whose queries see the keys from some first one up to themselves.
    A document starts where a token does not see the real one before. If it sees back to the start of its document it
    sees all between.
    """
    batch_size, q_length, kv_length = size
    row_B1 = torch.arange(batch_size, device=device)[:, None]
    head = torch.zeros((), dtype=torch.int64, device=device)
    key_1S = torch.arange(kv_length, device=device)[None]
    real_BS = torch.ones(batch_size, kv_length, dtype=torch.bool, device=device) if real_BS is None else real_BS
    latest_BS = torch.where(real_BS, key_1S, -1).cummax(1).values
    previous_BQ = F.pad(latest_BS, (1, -1), value=-1)[:, q_offset:]
    query_1Q, real_BQ = key_1S[:, q_offset:], real_BS[:, q_offset:]
    sees_BQ = mask_function(row_B1, head, query_1Q, previous_BQ.clamp(min=0)).expand(batch_size, -1)
    starts_BQ = real_BQ & (~sees_BQ | (previous_BQ < 0))
    first_in_row_B1 = torch.where(real_BS, key_1S, kv_length).amin(1, keepdim=True).clamp(max=kv_length - 1)
    first_BQ = torch.where(starts_BQ, query_1Q, first_in_row_B1.expand(-1, q_length)).cummax(1).values
    sees_first_BQ = mask_function(row_B1, head, query_1Q, first_BQ).expand(batch_size, -1)
    inside_BQ = starts_BQ & (previous_BQ >= 0)
    if not bool((sees_first_BQ | ~real_BQ).all()) or (q_offset and bool(inside_BQ.any())):
        return None, (
            f"{REFUSES} a mask that hides part of a text (sliding_window or chunks shorter than the text); set "
            "config.sliding_window to None before loading"
        )
    return (starts_BQ if bool(inside_BQ.any()) else None), None
