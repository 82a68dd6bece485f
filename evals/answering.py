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
from itertools import accumulate, chain, zip_longest

import torch
from torch import Tensor

from conf.numbers import format_length, parse_length
from evals.context import Context
from evals.loading import attention_label, attention_plan
from evals.protocol import Job, names
from evals.swap import DENSE, OWN, under
from moba.documents import Documents
from moba.kinds import AttentionSpec
from moba.kv_cache import MIN_CAPACITY
from moba.layer import KVCache, MoBAAttention
from train.model.decoder import Decoder

HYBRID = "hybrid"
ARMS = (OWN, HYBRID, DENSE)
ABOUT_BESIDE = "more arms, prompt and answer with this attention, each as attention= takes it: 128x16+1,plan.yaml"
ABOUT_ARMS = f"{OWN} (prompt and answer with the attention in force), {HYBRID} (the answer with full), {DENSE}"
BATCH_TOKENS, BATCH_TOKENS_CUDA = 1 << 16, 1 << 18
"""Prompt tokens that are cached at a time, or one prompt where that is longer, on the CPU and on a GPU at most."""
CACHE_SHARE = 0.5
"""Of the GPU's memory beside the weights, which the cache may take."""
READ_TOKENS, READ_TOKENS_CUDA = 1 << 14, 1 << 16
"""Tokens of all texts together in a pass over prompts, on the CPU and on a GPU."""
SCORED_TOKENS = 2048
"""Tokens of answers whose scores over the whole vocabulary are kept at a time."""
UNSEEN_TOKENS = 8
"""Tokens that are written to each text before any of them is looked at, which waits for the device."""


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


def work_kind(arms: Sequence[Arm], length: int) -> str:
    """What has a rate of its own in an estimate of the time left: texts of a length under the arms that share a
    prompt."""
    return f"{arms[0].name} {length}"


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
    """How many tokens of prompts, with their answers, to cache at a time: the same on every process."""
    if torch.device(context.device).type != "cuda":
        return BATCH_TOKENS
    model, device = context.model, context.model.model.embed_tokens.weight.device
    layers = [module for module in model.modules() if isinstance(module, MoBAAttention)]
    bytes_each = sum(2 * layer.k_proj.out_features * layer.k_proj.weight.element_size() for layer in layers)
    weights = sum(parameter.numel() * parameter.element_size() for parameter in model.parameters())
    fit = int(CACHE_SHARE * (torch.cuda.get_device_properties(device).total_memory - weights) / bytes_each)
    tokens = torch.tensor(max(1, min(fit, BATCH_TOKENS_CUDA)), device=device)
    return int(context.reduce(tokens)) // context.world_size


class Reader:
    """N texts that a model reads and continues as a batch."""

    def __init__(
        self, model: Decoder, number: int, vocab_size: int, capacity: int = 0, chunk_tokens: int | None = None
    ):
        """`vocab_size`: ids from there on are never written; `capacity`: tokens of the longest text and of the longest
        answer together, as far as they are known, which saves memory; `chunk_tokens`: read at a time, of all texts
        together, which changes nothing but the memory (None: as the device can)."""
        self._model, self._vocab_size, self._number = model, vocab_size, number
        self._device = model.model.embed_tokens.weight.device
        self._chunk = chunk_tokens or (READ_TOKENS_CUDA if self._device.type == "cuda" else READ_TOKENS)
        self._cache = KVCache(len(model.attention), number, capacity=capacity or MIN_CAPACITY)
        self._scores_NV: Tensor | None = None
        """Of the next token of each text."""

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
            lengths = [len(chunk) for chunk in chunks]
            read = [i for i, length in enumerate(lengths) if length]
            lasts = [end - 1 for end, length in zip(accumulate(lengths), lengths) if length]
            scores = self._forward(self._moved(list(chain(*chunks))), lengths, plan, self._moved(lasts))
            if len(read) < self._number:
                known = self._scores_NV
                known = scores.new_zeros(self._number, self._vocab_size) if known is None else known
                scores = known.index_copy(0, self._moved(read), scores)  # a new tensor: a mark may have the old one
            self._scores_NV = scores

    def mark(self) -> tuple:
        """What `rewind` takes to come back to here."""
        return self._cache.mark(), self._scores_NV

    def rewind(self, mark: tuple) -> None:
        """Forgets what was read since."""
        marks, self._scores_NV = mark
        self._cache.rewind(marks)

    def greedy(
        self,
        length: int,
        plan: Sequence[AttentionSpec],
        stop: Collection[int] = (),
        done: Callable[[list[int]], bool] = lambda written: False,
    ) -> list[list[int]]:
        """Up to `length` of the likeliest tokens after each text, which end before one of `stop`, or with those of
        which `done` is true; the texts stay as they are. Texts that have ended go on, unseen, until all have, or until
        that is looked at."""
        mark, written, going = self.mark(), [[] for _ in range(self._number)], [True] * self._number
        unseen: list[Tensor] = []
        each = self._moved(list(range(self._number)))
        for left in reversed(range(length)):
            newest = self._scores.argmax(-1)
            unseen.append(newest)
            if not left or len(unseen) == UNSEEN_TOKENS:
                for i, tokens in enumerate(torch.stack(unseen, 1).tolist()):
                    going[i] = going[i] and _goes_on(written[i], tokens, stop, done)
                if not any(going):
                    break
                unseen = []
            if left:
                self._scores_NV = self._forward(newest, [1] * self._number, plan, each)
        self.rewind(mark)
        return written

    @property
    def _scores(self) -> Tensor:
        assert self._scores_NV is not None, "nothing was read"
        return self._scores_NV

    def score(
        self, answers: Sequence[Sequence[Sequence[int]]], plan: Sequence[AttentionSpec]
    ) -> list[list[tuple[float, bool]]]:
        """(log-likelihood in nats of all tokens together, whether every token is the likeliest) of each of some answers
        to each text; the texts stay as they are. As many answers as SCORED_TOKENS allow are read in one pass."""
        longest = max(len(answer) for own in answers for answer in own)
        at_once = SCORED_TOKENS // (self._number * max(1, longest))
        limit = self._model.rope.longest
        if limit is not None and max(self._cache.lengths) + longest > limit:
            at_once = 0  # what is filled up would have no positions
        ways = list(zip_longest(*answers, fillvalue=()))
        if at_once:
            batches = [ways[i : i + at_once] for i in range(0, len(ways), at_once)]
            found = [way for batch in batches for way in self._score_ways(batch, plan)]
        else:
            found = [self._score_long(way, plan) for way in ways]
        return [list(own[: len(given)]) for own, given in zip(zip(*found), answers)]

    def _score_ways(
        self, ways: Sequence[Sequence[Sequence[int]]], plan: Sequence[AttentionSpec]
    ) -> list[list[tuple[float, bool]]]:
        """`score` of an answer to each text, in several ways; in one pass, filled up to the length of the longest
        behind each, where none of its tokens looks."""
        size = max(1, max(len(answer) for way in ways for answer in way))
        shape = (len(ways), self._number, size)
        filled = self._moved([[*answer, *[0] * (size - len(answer))] for way in ways for answer in way]).view(shape)
        lengths_WN1 = self._moved([len(answer) for way in ways for answer in way]).view(*shape[:2], 1)
        counts = torch.arange(size, device=self._device) < lengths_WN1
        tokens, rows = filled[:, :, :-1].flatten(), torch.arange(filled[:, :, :-1].numel(), device=self._device)
        lengths = [size - 1] * (len(ways) * self._number)
        mark = self.mark()
        behind = self._forward(tokens, lengths, plan, rows, len(ways)).view(*shape[:2], size - 1, self._vocab_size)
        self.rewind(mark)  # of a single way
        totals, greedy = [], []
        for wanted, counted, rest in zip(filled, counts, behind):
            log_probs = torch.cat([self._scores[:, None], rest], 1).float().log_softmax(-1)
            own = log_probs.gather(-1, wanted[:, :, None])[:, :, 0]
            totals.append(own.masked_fill(~counted, 0).sum(-1))
            greedy.append(((log_probs.argmax(-1) == wanted) | ~counted).all(-1))
        return [list(zip(*pair)) for pair in zip(torch.stack(totals).tolist(), torch.stack(greedy).tolist())]

    def _score_long(self, answers: Sequence[Sequence[int]], plan: Sequence[AttentionSpec]) -> list[tuple[float, bool]]:
        """`score` of one answer to each text, read in parts, so that their scores need not be kept."""
        mark = self.mark()
        totals = torch.zeros(len(answers), dtype=torch.float64, device=self._device)
        greedy = torch.ones(len(answers), dtype=torch.bool, device=self._device)
        step = max(1, SCORED_TOKENS // len(answers))
        for start in range(0, max(map(len, answers)), step):
            parts = [answer[start : start + step] for answer in answers]
            lasts = [part[-1:] if start + step < len(answer) else [] for part, answer in zip(parts, answers)]
            sizes = [max(0, len(part) - 1) for part in parts]
            tokens = self._moved(list(chain(*(part[:-1] for part in parts))))
            rows = torch.arange(sum(sizes), device=self._device)
            behind = self._forward(tokens, sizes, plan, rows).split(sizes)
            for i, (first, rest, part) in enumerate(zip(self._scores, behind, parts)):
                if part:
                    wanted = self._moved(part)
                    log_probs = torch.cat([first[None], rest]).float().log_softmax(-1)
                    totals[i] += log_probs.gather(1, wanted[:, None]).sum().double()
                    greedy[i] &= (log_probs.argmax(-1) == wanted).all()
            if any(lasts):
                self.read(lasts, plan)
        self.rewind(mark)
        return list(zip(totals.tolist(), greedy.tolist()))

    def _moved(self, values: Sequence) -> Tensor:
        """Integers on the device, without waiting for it."""
        return torch.tensor(values, dtype=torch.int64).to(self._device, non_blocking=True)

    @torch.inference_mode()
    def _forward(
        self, tokens: Tensor, lengths: Sequence[int], plan: Sequence[AttentionSpec], rows: Tensor, ways: int = 1
    ) -> Tensor:
        """Reads so many tokens of each text, in several ways (`KVCache.in_ways`); [len(rows), V] scores behind these
        rows of what is read."""
        if not len(tokens):
            return self._scores.new_empty(0, self._vocab_size)
        before = self._cache.lengths * ways
        places = [torch.arange(start, start + length) for start, length in zip(before, lengths)]
        positions = torch.cat(places).to(self._device, non_blocking=True)
        after = [start + length for start, length in zip(before, lengths)]
        documents = Documents.from_lengths(lengths, after, device=self._device)
        with under(self._model, plan), self._cache.in_ways(ways):
            scores = self._model.logits(tokens, positions, documents, self._cache, rows=rows)
        return scores[:, : self._vocab_size]


def _goes_on(
    written: list[int], tokens: Sequence[int], stop: Collection[int], done: Callable[[list[int]], bool]
) -> bool:
    """Puts tokens behind what is written, up to the end of the text; whether it has not come."""
    for token in tokens:
        if token in stop:
            return False
        written.append(token)
        if done(written):
            return False
    return True
