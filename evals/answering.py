"""Batched prefill and decoding: each batch of prompts is read once for all arms that share its prefill.

An arm is a pair of attention plans: prefill for the prompt and decode for the answer. The first token of an answer is
predicted by the prompt's last one, so it comes from the prefill plan; the paper and its released code read with MoBA
and answer with full attention (`hybrid`).

Shapes: N sequences of a batch, V vocabulary rows.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Collection, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from conf.numbers import format_length, parse_length
from evals.context import Context
from evals.loading import attention_label, attention_plan
from evals.protocol import Job, names
from evals.swap import DENSE, OWN, under
from moba.documents import Documents
from moba.kinds import AttentionSpec
from moba.layer import KVCache, MoBAAttention
from train.model.decoder import Decoder

HYBRID = "hybrid"
ARMS = (OWN, HYBRID, DENSE)
ABOUT_BESIDE = "more arms, prompt and answer with this attention, each as attention= takes it: 128x16+1,plan.yaml"
ABOUT_ARMS = f"{OWN} (prompt and answer with the attention in force), {HYBRID} (the answer with full), {DENSE}"
BATCH_TOKENS, MOST_BATCH_TOKENS = 1 << 16, 1 << 18
"""Prompt tokens cached at a time (at least one prompt); up to the second number where the cache then takes at most
CACHE_SHARE of the GPU's memory."""
CACHE_SHARE = 0.25
READ_TOKENS = 1 << 14
"""Tokens of all texts together in one forward pass of prefill."""
SCORED_TOKENS = 2048
"""Answer tokens whose logits are kept at a time."""


@dataclass(frozen=True)
class Arm:
    """Attention of the prompt and of the answer."""

    name: str
    prefill: tuple[AttentionSpec, ...]
    """Per layer, for the prompt."""
    decode: tuple[AttentionSpec, ...]
    """Per layer, for the answer."""

    @property
    def key(self) -> str:
        """Its name in a ledger, with a hash of its plans where the name alone (of a plan file, say) does not fix
        them."""
        plan = hashlib.sha256(repr((self.prefill, self.decode)).encode()).hexdigest()[:8]
        return self.name if self.name in ARMS else f"{self.name} {plan}"


def chosen_arms(job: Job, default: str) -> list[Arm]:
    """The arms of arms=, in the order of ARMS, and one per attention of beside=. Without a sparse layer arms= gives
    `full` only. ValueError for an unknown or repeated name."""
    asked = names(job.values, "arms", ARMS, default)
    own = job.context.model.attention
    dense = tuple(spec.dense() for spec in own)
    plans = {OWN: (own, own), HYBRID: (own, dense), DENSE: (dense, dense)}
    if own == dense:
        if "arms" in job.values and asked != [DENSE]:
            raise ValueError(f"arms={job.values['arms']}: no layer is sparse here; choose attention such as 512x3")
        asked = [DENSE]
    arms = [Arm(name, *plans[name]) for name in ARMS if name in asked]
    for word in filter(None, (word.strip() for word in job.values.get("beside", "").strip("[]").split(","))):
        plan = attention_plan(word, job.trained)
        arms.append(Arm(attention_label(word), plan, plan))
    found = [arm.name for arm in arms]
    if len(set(found)) < len(found):
        raise ValueError(f"beside: {', '.join(found)}: two have the same name; rename a plan's file")
    return arms


def by_prompt(arms: Sequence[Arm]) -> dict[tuple[AttentionSpec, ...], list[Arm]]:
    """The arms by prefill plan: those that share one read the prompt once."""
    groups: dict[tuple[AttentionSpec, ...], list[Arm]] = {}
    for arm in arms:
        groups.setdefault(arm.prefill, []).append(arm)
    return groups


def chosen_lengths(job: Job, default: Sequence[str]) -> list[int]:
    """The lengths of lengths=, ascending; else those of the default up to the context of the run's last stage, or that
    context if it is shorter than all."""
    context = job.trained.stage.seq_len
    if "lengths" not in job.values:
        return [length for length in map(parse_length, default) if length <= context] or [context]
    found = []
    for word in job.values["lengths"].strip("[]").split(","):
        try:
            found.append(parse_length(word))
        except ValueError as error:
            raise ValueError(f"lengths={job.values['lengths']}: {word.strip()!r} {error}") from None
    if min(found) < 1:
        raise ValueError(f"lengths={job.values['lengths']}: must be at least 1")
    if max(found) > context:
        job.say(f"note: up to {format_length(max(found))} tokens for a model trained on {format_length(context)}")
    return sorted(set(found))


def batch_tokens(context: Context) -> int:
    """Prompt tokens to cache at a time, the same on every process."""
    if torch.device(context.device).type != "cuda":
        return BATCH_TOKENS
    weight = context.model.model.embed_tokens.weight
    layers = [module for module in context.model.modules() if isinstance(module, MoBAAttention)]
    bytes_each = sum(2 * layer.k_proj.out_features for layer in layers) * weight.element_size()
    memory = torch.cuda.get_device_properties(weight.device).total_memory
    fit = int(CACHE_SHARE * memory / (2 * bytes_each))  # a cache doubles when it is full
    tokens = torch.tensor(max(BATCH_TOKENS, min(fit, MOST_BATCH_TOKENS)), device=weight.device)
    return int(context.reduce(tokens)) // context.world_size


class Reader:
    """N texts that a model reads and continues as a batch."""

    def __init__(self, model: Decoder, number: int, vocab_size: int, chunk_tokens: int = READ_TOKENS):
        """`vocab_size`: ids from there on are never generated; `chunk_tokens`: of all texts together, read at a time to
        save memory."""
        self._model, self._vocab_size, self._chunk = model, vocab_size, chunk_tokens
        self._device = model.model.embed_tokens.weight.device
        self._cache = KVCache(len(model.attention), number)
        self._scores: list[Tensor] = [torch.empty(0)] * number

    def read(self, parts: Sequence[Sequence[int]], plan: Sequence[AttentionSpec]) -> None:
        """Appends a part, which may be empty, to each text. Long parts are read one after the other, so that a pass has
        few pieces; short ones together."""
        done = [0] * len(parts)
        while any(start < len(part) for start, part in zip(done, parts)):
            room, chunks = self._chunk, []
            for i, part in enumerate(parts):
                chunks.append(part[done[i] : done[i] + room])
                done[i] += len(chunks[-1])
                room -= len(chunks[-1])
            ends = [sum(map(len, chunks[: i + 1])) - 1 for i, chunk in enumerate(chunks) if chunk]
            scores = iter(self._forward(chunks, plan, ends))
            self._scores = [next(scores) if chunk else old for chunk, old in zip(chunks, self._scores)]

    def mark(self) -> tuple:
        """The present state, for `rewind`."""
        return self._cache.mark(), list(self._scores)

    def rewind(self, mark: tuple) -> None:
        """Removes what was read since `mark`."""
        marks, self._scores = mark
        self._cache.rewind(marks)

    def greedy(
        self,
        length: int,
        plan: Sequence[AttentionSpec],
        stop: Collection[int] = (),
        done: Callable[[list[int]], bool] = lambda written: False,
    ) -> list[list[int]]:
        """Greedy decoding of up to `length` tokens after each text, which end before a token of `stop`, or once `done`
        is true; the texts stay as they are."""
        mark, written, going = self.mark(), [[] for _ in self._scores], [True] * len(self._scores)
        for left in reversed(range(length)):
            tokens = torch.stack(self._scores).argmax(-1).tolist()
            going = [on and token not in stop for on, token in zip(going, tokens)]
            for text, token, on in zip(written, tokens, going):
                text += [token] * on
            going = [on and not done(text) for on, text in zip(going, written)]
            if not left or not any(going):
                break
            self.read([[token] * on for token, on in zip(tokens, going)], plan)
        self.rewind(mark)
        return written

    def log_likelihood(self, answers: Sequence[Sequence[int]], plan: Sequence[AttentionSpec]) -> list[float]:
        """The summed log-probability, in nats, of one answer per text; the texts stay as they are."""
        return [total for total, _ in self.score(answers, plan)]

    def score(self, answers: Sequence[Sequence[int]], plan: Sequence[AttentionSpec]) -> list[tuple[float, bool]]:
        """(log_likelihood, whether greedy decoding gives it) of one answer per text; the texts stay as they are. Long
        answers are read in parts, so that their logits need not be kept."""
        mark = self.mark()
        totals = torch.zeros(len(answers), dtype=torch.float64, device=self._device)
        greedy = torch.ones(len(answers), dtype=torch.bool, device=self._device)
        step = max(1, SCORED_TOKENS // len(answers))
        for start in range(0, max(map(len, answers)), step):
            parts = [answer[start : start + step] for answer in answers]
            lasts = [part[-1:] if start + step < len(answer) else [] for part, answer in zip(parts, answers)]
            sizes = [max(0, len(part) - 1) for part in parts]
            behind = self._forward([part[:-1] for part in parts], plan, range(sum(sizes))).split(sizes)
            for i, (first, rest, part) in enumerate(zip(self._scores, behind, parts)):
                if part:
                    wanted = torch.tensor(part, device=self._device)
                    log_probs = torch.cat([first[None], rest]).float().log_softmax(-1)
                    totals[i] += log_probs.gather(1, wanted[:, None]).sum().double()
                    greedy[i] &= (log_probs.argmax(-1) == wanted).all()
            if any(lasts):
                self.read(lasts, plan)
        self.rewind(mark)
        return list(zip(totals.tolist(), greedy.tolist()))

    @torch.inference_mode()
    def _forward(self, parts: Sequence[Sequence[int]], plan: Sequence[AttentionSpec], rows: Sequence[int]) -> Tensor:
        """Reads tokens of some texts; returns the next-token logits, [len(rows), V], of these rows of what is read."""
        lengths, before = [len(part) for part in parts], self._cache.lengths
        if not sum(lengths):
            return self._scores[0].new_empty(0, self._vocab_size)
        tokens = torch.tensor([token for part in parts for token in part], device=self._device)
        places = [torch.arange(start, start + length) for start, length in zip(before, lengths)]
        after = [start + length for start, length in zip(before, lengths)]
        documents = Documents.from_lengths(lengths, after, device=self._device)
        wanted = torch.tensor(list(rows), dtype=torch.int64, device=self._device)
        with under(self._model, plan):
            scores = self._model.logits(tokens, torch.cat(places).to(self._device), documents, self._cache, rows=wanted)
        return scores[:, : self._vocab_size]
