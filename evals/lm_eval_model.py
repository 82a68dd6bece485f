"""A run's model as an LM of lm-evaluation-harness (extra lm-eval), over the project's own KV cache.

Requests are encoded as by its HFLM: with BOS, if the run's tokenizer has one, and too long ones truncated from the
left. Requests that share their context read it once; nothing is padded, so blocks start where texts start.
Log-probabilities are float32 over all vocabulary rows, as in training.

Every process gets all requests, works on its share and returns all answers: to the harness there is one process.
Answers are kept (evals/ledger.py), so that an interrupted evaluation resumes.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterator, Sequence
from typing import Any

import torch
from lm_eval.api.model import TemplateLM  # pyright: ignore[reportMissingImports]
from lm_eval.models.utils import (  # pyright: ignore[reportMissingImports]
    handle_stop_sequences,
    normalize_gen_kwargs,
    postprocess_generated_text,
)
from lm_eval.utils import get_rolling_token_windows, make_disjoint_window  # pyright: ignore[reportMissingImports]

from data.tokenizer import Tokenizer
from evals.answering import Arm, Reader, batch_tokens
from evals.context import Context
from evals.ledger import Ledger

BATCH_TEXTS = 256
"""Texts of a batch, at most: each has scores over the whole vocabulary, and work of its own in every pass."""


class RunLM(TemplateLM):
    """A run's model under one arm."""

    def __init__(self, context: Context, arm: Arm, tokenizer: Tokenizer, max_length: int, ledger: Ledger):
        """`max_length`: tokens of a request at most."""
        super().__init__()
        self._ledger = ledger
        self._context, self._arm, self._tokens, self.max_length = context, arm, tokenizer, max_length
        self._batch_tokens = batch_tokens(context)
        self.lengths: list[int] = []
        """Tokens of each request, as read."""

    @property
    def eot_token_id(self) -> int:
        """EOS."""
        return self._tokens.eos_id

    @property
    def prefix_token_id(self) -> int:
        """The token before a text without context."""
        return self._tokens.eos_id if self._tokens.bos_id is None else self._tokens.bos_id

    def tok_encode(self, string: str, add_special_tokens: bool | None = None, **_: Any) -> list[int]:
        """Token ids, with BOS first by default."""
        bos = self._tokens.bos_id
        head = [] if bos is None or add_special_tokens is False else [bos]
        return head + self._tokens.encode(string).tolist()

    def loglikelihood_rolling(self, requests, disable_tqdm: bool = False) -> list[float]:
        """The log-likelihood of whole texts, in windows of max_length that do not overlap."""
        windows, owners = [], []
        for i, (text,) in enumerate(request.args for request in requests):
            for pair in get_rolling_token_windows(
                token_list=self.tok_encode(text),
                prefix_token=self.prefix_token_id,
                max_seq_len=self.max_length,
                context_len=1,
            ):
                windows.append((None, *make_disjoint_window(pair)))
                owners.append(i)
        totals = [0.0] * len(requests)
        for i, (total, _) in zip(owners, self._loglikelihood_tokens(windows)):
            totals[i] += total
        return totals

    def _loglikelihood_tokens(self, requests, **_: Any) -> list[tuple[float, bool]]:
        wanted = []
        for _text, before, answer in requests:
            if len(answer) > self.max_length:
                raise ValueError(f"an answer of {len(answer)} tokens does not fit max_length={self.max_length}")
            before = before[max(0, len(before) + len(answer) - self.max_length - 1) :]
            wanted.append((tuple(before), tuple(answer)))
            self.lengths.append(len(before) + len(answer) - 1)
        by_context: dict[tuple[int, ...], dict[tuple[int, ...], None]] = {}
        for before, answer in wanted:
            by_context.setdefault(before, {})[answer] = None
        contexts = list(by_context)
        places = {pair: i for i, pair in enumerate((c, a) for c in contexts for a in by_context[c])}
        found = torch.zeros(len(places), 2, dtype=torch.float64, device=self._context.device)
        rows = self._context.model.model.embed_tokens.weight.shape[0]
        for batch in self._batches([len(c) + max(map(len, by_context[c])) for c in contexts], "log-likelihoods"):
            missing = [
                i for i in batch if not all(self._key(contexts[i], a) in self._ledger for a in by_context[contexts[i]])
            ]
            if missing:
                self._read_answers([(contexts[i], list(by_context[contexts[i]])) for i in missing], rows)
            for context in (contexts[i] for i in batch):
                for answer in by_context[context]:
                    score = self._ledger[self._key(context, answer)]
                    found[places[context, answer]] = torch.tensor(score, dtype=torch.float64)
        values = self._context.reduce(found).tolist()
        return [(values[places[pair]][0], values[places[pair]][1] > 0) for pair in wanted]

    def _read_answers(self, asked: Sequence[tuple[tuple[int, ...], list[tuple[int, ...]]]], rows: int) -> None:
        """Puts (log-likelihood, whether greedy) of answers behind their contexts into the ledger."""
        # The longest answer's room behind every context: shorter answers are filled up.
        capacity = max(len(c) for c, _ in asked) + max(len(a) for _, answers in asked for a in answers)
        reader = Reader(self._context.model, len(asked), rows, capacity)
        reader.read([context for context, _ in asked], self._arm.prefill)
        scores = reader.score([answers for _, answers in asked], self._arm.decode)
        self._ledger.put(
            {
                self._key(context, answer): score
                for (context, answers), own in zip(asked, scores)
                for answer, score in zip(answers, own)
            }
        )

    def _key(self, before: Sequence[int], *what: Any) -> tuple[str, ...]:
        """The ledger's key of an answer, or of generated text, after these tokens."""
        return (
            self._arm.key,
            *(hashlib.sha256(repr(part).encode()).hexdigest()[:16] for part in (tuple(before), *what)),
        )

    def generate_until(self, requests, disable_tqdm: bool = False) -> list[str]:
        """Greedy answers, up to their stop sequences."""
        by_options: dict[str, list[int]] = {}
        for i, request in enumerate(requests):
            by_options.setdefault(repr(request.args[1]), []).append(i)
        texts = [""] * len(requests)
        for indices in by_options.values():
            options = normalize_gen_kwargs(requests[indices[0]].args[1])
            if options.get("do_sample") or options.get("temperature"):
                raise ValueError(f"a task asks for sampled answers, {options}: only greedy ones are written here")
            until, length = handle_stop_sequences(options.get("until"), eos=None), options["max_gen_toks"]
            if length >= self.max_length:
                raise ValueError(f"answers of {length} tokens leave no room for a context in {self.max_length}")
            encoded = [self.tok_encode(requests[i].args[0]) or [self.prefix_token_id] for i in indices]
            prompts = [prompt[-(self.max_length - length) :] for prompt in encoded]
            self.lengths += [len(prompt) + length for prompt in prompts]
            for i, written in zip(indices, self._written(prompts, until, length)):
                text = postprocess_generated_text(self._tokens.decode(written), until, None)
                texts[i] = text
        return texts

    def _written(self, prompts: Sequence[list[int]], until: Sequence[str], length: int) -> list[list[int]]:
        """The tokens generated after each prompt."""

        def done(written: list[int]) -> bool:
            text = self._tokens.decode(written)
            return any(stop and stop in text for stop in until)

        found = torch.zeros(len(prompts), length, dtype=torch.int64, device=self._context.device)  # token + 1
        for batch in self._batches([len(prompt) + length for prompt in prompts], "answers"):
            keys = {i: self._key(prompts[i], "written", list(until), length) for i in batch}
            missing = [i for i in batch if keys[i] not in self._ledger]
            if missing:
                capacity = max(len(prompts[i]) for i in missing) + length
                reader = Reader(self._context.model, len(missing), self._tokens.vocab_size, capacity)
                reader.read([prompts[i] for i in missing], self._arm.prefill)
                written = reader.greedy(length, self._arm.decode, stop={self._tokens.eos_id}, done=done)
                self._ledger.put({keys[i]: tokens for i, tokens in zip(missing, written)})
            for i in batch:
                tokens = self._ledger[keys[i]]
                found[i, : len(tokens)] = torch.tensor(tokens, dtype=torch.int64) + 1
        return [[token - 1 for token in row if token] for row in self._context.reduce(found).tolist()]

    def _batches(self, lengths: Sequence[int], what: str) -> Iterator[list[int]]:
        """Indices of texts of these lengths that this process reads together, long ones first."""
        batches: list[list[int]] = []
        for i in sorted(range(len(lengths)), key=lambda i: -lengths[i]):
            number = len(batches[-1]) + 1 if batches else 0
            if batches and number <= BATCH_TEXTS and lengths[batches[-1][0]] * number <= self._batch_tokens:
                batches[-1].append(i)
            else:
                batches.append([i])
        mine = batches[self._context.rank :: self._context.world_size]
        yield from self._context.watch(mine, what)
