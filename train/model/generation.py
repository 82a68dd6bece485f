"""Text from a trained decoder, token by token: a prompt is read into a KV cache, then tokens are sampled and fed back.

Prefill and decoding may each use an attention of their own. As in the MoBA paper's evaluation (section 3.3), new tokens
attend to everything by default, while the prompt is read with the model's own attention.
"""

from __future__ import annotations

from collections.abc import Collection, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass

import torch
from torch import Tensor

from conf.words import cut
from data.tokenizer import Tokenizer
from moba.documents import one_document
from moba.kinds import AttentionSpec
from moba.layer import KVCache
from train.model.decoder import Decoder

CHUNK_TOKENS = 8192
COLDEST = 1e-30  # logits divided by less overflow in float32; far above, sampling is already greedy
CONTEXT_TOKENS = 8
"""Preceding tokens that decide how a token decodes to text (leading spaces, characters of several tokens)."""


@dataclass(frozen=True)
class Sampling:
    """How a token is sampled. Applied in this order: temperature, top_k, top_p."""

    temperature: float = 1.0
    """Logits are divided by it; 0 is greedy decoding (the first of equals)."""
    top_k: int = 0
    """Samples from that many of the most likely tokens; 0: from all."""
    top_p: float = 1.0
    """Samples from the fewest most likely tokens whose probabilities sum to at least this."""
    seed: int = 0

    def __post_init__(self):
        if not 0 <= self.temperature < float("inf"):
            raise ValueError(f"temperature={self.temperature}: needs a number of at least 0 (0: the likeliest token)")
        if self.top_k < 0:
            raise ValueError(f"top_k={self.top_k}: needs a whole number of at least 0 (0: all tokens)")
        if not 0 < self.top_p <= 1:
            raise ValueError(f"top_p={self.top_p}: needs a number above 0 and at most 1")
        if not 0 <= self.seed < 2**63:
            raise ValueError(f"seed={cut(str(self.seed))}: needs a whole number from 0 to 2^63 - 1")


def generate(
    model: Decoder,
    prompt: Sequence[int],
    *,
    max_new_tokens: int,
    sampling: Sampling | None = None,
    vocab_size: int | None = None,
    stop: Collection[int] = (),
    prefill: Sequence[AttentionSpec] | None = None,
    decode: Sequence[AttentionSpec] | None = None,
    chunk_tokens: int = CHUNK_TOKENS,
) -> Iterator[int]:
    """Yields the ids of new tokens as they are sampled; ends after `max_new_tokens`, or before a token in `stop`.

    `prompt`: at least one id (BOS where the model was trained with it). `vocab_size`: ids from there on are never
    sampled; embeddings may have more rows than the tokenizer has ids. `prefill`: the attention of each layer while the
    prompt is read, None: the model's; `decode`: for new tokens, None: the model's with full attention in place of MoBA.
    The model has its own attention whenever this yields. The prompt is read `chunk_tokens` at a time, to save memory;
    room for it and all new tokens is made at once.
    The same seed and logits give the same tokens. ValueError for arguments out of range.
    """
    if len(prompt) == 0:
        raise ValueError("the prompt is empty: give at least one token, such as BOS or EOS")
    if max_new_tokens < 0:
        raise ValueError(f"max_new_tokens={max_new_tokens}: needs a whole number of at least 0")
    sampling = sampling or Sampling()
    generator = torch.Generator().manual_seed(sampling.seed)
    decode = decode or tuple(spec.dense() for spec in model.attention)
    cache = KVCache(len(model.attention), capacity=len(prompt) + max_new_tokens)
    pending = torch.as_tensor(list(prompt), dtype=torch.int64)
    plan = prefill or model.attention
    for _ in range(max_new_tokens):
        *earlier, last = pending.split(chunk_tokens)
        for chunk in earlier:
            _read(model, chunk, cache, plan)
        scores_V = _read(model, last, cache, plan)
        token = draw(scores_V[:vocab_size], sampling, generator)
        if token in stop:
            return
        yield token
        pending, plan = torch.tensor([token]), decode


def draw(scores_V: Tensor, sampling: Sampling, generator: torch.Generator) -> int:
    """A token sampled from logits [V], on the CPU in float32, so that a seed means the same on every device."""
    scores_V = scores_V.float().cpu()
    if sampling.temperature == 0:
        return int(scores_V.argmax())
    temperature = max(sampling.temperature, COLDEST)
    probability_V, token_V = (scores_V / temperature).softmax(-1).sort(descending=True, stable=True)
    if sampling.top_k:
        probability_V = probability_V[: sampling.top_k] / probability_V[: sampling.top_k].sum()
    before_V = probability_V.cumsum(-1) - probability_V
    probability_V = probability_V * (before_V < sampling.top_p)
    return int(token_V[torch.multinomial(probability_V, 1, generator=generator)])


@torch.inference_mode()
def _read(model: Decoder, tokens_T: Tensor, cache: KVCache, plan: Sequence[AttentionSpec]) -> Tensor:
    """Adds tokens to the cache; returns the next token's logits, [V]."""
    device = model.model.embed_tokens.weight.device
    num_tokens, start = len(tokens_T), cache.lengths[0]
    positions_T = torch.arange(start, start + num_tokens, device=device)
    documents = one_document(num_tokens, num_tokens, device)
    last = torch.tensor([num_tokens - 1], device=device)
    with _attending(model, plan):
        return model.logits(tokens_T.to(device), positions_T, documents, cache, rows=last)[0]


@contextmanager
def _attending(model: Decoder, plan: Sequence[AttentionSpec]) -> Iterator[None]:
    """Context in which the model attends by `plan`."""
    own = model.attention
    model.set_attention(plan)
    try:
        yield
    finally:
        model.set_attention(own)


class TextStream:
    """Decodes tokens that come one by one to text, in pieces of whole characters."""

    def __init__(self, tokenizer: Tokenizer, before: Sequence[int] = ()):
        """`before`: the tokens that the text continues, which decide whether it begins with a space."""
        self._decode = tokenizer.decode
        self._ids = list(before)[-CONTEXT_TOKENS:]
        self._start, self._done = 0, len(self._ids)

    def add(self, token: int) -> str:
        """The text that this token completes; empty while a character lacks bytes."""
        self._ids.append(token)
        text = self.rest()
        if not text or text.endswith("\ufffd"):
            return ""
        self._start, self._done = self._done, len(self._ids)
        return text

    def rest(self) -> str:
        """The text that is still held back."""
        known = self._decode(self._ids[self._start : self._done])
        return self._decode(self._ids[self._start :])[len(known) :]
