"""Recall tasks made of token numbers: data to train on and to measure, where what to look up, and where it stands, is
known.

A document is filler with keys and values in it, and questions: a key that occurred before, whose value has to follow.
Only the values behind a question are supervised. Keys come from the lower half of the symbols, values from the third
quarter, filler from the last: which tokens can be answers is learned first, and which of them is one, after that.
Documents are made when they are read, from (task, seed, number): nothing is stored.

    mqar         pairs all over the first half, questions all over the second (multi-query associative recall); with
                 `repeats` each is asked for that often
    passkey      one pair somewhere, one question at the end
    multi_key    nothing but pairs, of keys that share tokens; one question at the end
    multi_query  pairs all over, all questions together at the end: one block of queries, many blocks of keys
    straddle     passkey, with the key at the end of a block and its value in the next
    copy         a random segment, repeated at the end; the first tokens of the repetition are the question
"""

from __future__ import annotations

import functools
import hashlib
import json
from dataclasses import asdict, dataclass
from typing import Any, NamedTuple, overload

import numpy as np

from conf.schema import SyntheticConfig
from data.errors import DataError

VERSION = 2
HELD_OUT = 4096  # held-out documents, at most
# key tokens, value tokens where the configuration says nothing
SIZES = {
    "mqar": (1, 1),
    "passkey": (1, 4),
    "multi_key": (2, 2),
    "multi_query": (1, 1),
    "straddle": (1, 4),
    "copy": (4, 32),
}


class Answer(NamedTuple):
    """What has to be recalled: tokens [start, start + length) of a document, which last stood at `needle` before."""

    start: int
    length: int
    needle: int


@dataclass(frozen=True)
class Sample:
    """A document: tokens int64 [length + 1], and its answers in order."""

    tokens: np.ndarray
    answers: tuple[Answer, ...]

    @property
    def supervised(self) -> np.ndarray:
        """bool [length + 1]: the tokens of answers."""
        mask = np.zeros(len(self.tokens), dtype=bool)
        for start, length, _ in self.answers:
            mask[start : start + length] = True
        return mask


@dataclass(frozen=True)
class Filled(SyntheticConfig):
    """A configuration without nulls."""

    min_pairs: int = 1
    key_tokens: int = 1
    value_tokens: int = 1


class SyntheticSource:
    """A data.sources.Source of generated documents, kept whole and masked as conversations are."""

    is_chat = True

    def __init__(self, name: str, config: SyntheticConfig, vocab_size: int, *, held_out: bool = False):
        """`held_out`: other documents than training's of the same seed. Raises DataError for what does not fit."""
        self.name = name
        self.config = filled(config, vocab_size)
        self.num_documents = min(self.config.num_documents, HELD_OUT) if held_out else self.config.num_documents
        self.lengths = np.full(self.num_documents, self.config.length + 1, dtype=np.int64)
        self.num_tokens = int(self.lengths.sum())
        self._salt = json.dumps([VERSION, asdict(self.config) | {"num_documents": 0}, held_out], sort_keys=True)
        self.fingerprint = hashlib.sha256(f"{self._salt} {self.num_documents}".encode()).hexdigest()[:16]
        self._make = functools.lru_cache(maxsize=256)(self._generate)

    @property
    def ids(self) -> list[str]:
        """The documents' ids in order."""
        return [f"{self.config.task}-{i}" for i in range(self.num_documents)]

    def sample(self, document: int) -> Sample:
        """A document and its answers."""
        return self._make(document)

    def window(self, document: int, start: int, length: int) -> np.ndarray:
        """The tokens of up to `length` inputs from `start`, and of their labels."""
        return self._make(document).tokens[start : start + length + 1]

    def supervised(self, document: int, start: int, length: int) -> np.ndarray:
        """Which tokens of `window` are supervised: bool."""
        return self._make(document).supervised[start : start + length + 1]

    def usable_inputs(self, seq_len: int) -> np.ndarray:
        """Inputs of each document that are used at this length, int64: all, or none if it is longer (it would lose its
        questions)."""
        return np.where(self.lengths - 1 <= seq_len, self.lengths - 1, 0)

    def _generate(self, document: int) -> Sample:
        draw = _Draw(f"{self._salt} {document}")
        return _TASKS[self.config.task](self.config, draw)


def filled(config: SyntheticConfig, vocab_size: int) -> Filled:
    """The configuration without nulls. DataError names what does not fit."""
    key_tokens, value_tokens = SIZES[config.task]
    given: dict[str, Any] = vars(config) | {
        "key_tokens": config.key_tokens or key_tokens,
        "value_tokens": config.value_tokens or value_tokens,
        "min_pairs": config.min_pairs or config.pairs,
    }
    config = Filled(**given)
    item, where = config.key_tokens + config.value_tokens, f"synthetic {config.task}"
    if config.symbols > vocab_size:
        raise DataError(f"{where}: symbols={config.symbols}, but the tokenizer has {vocab_size} ids")
    pairs = config.pairs if config.task in ("mqar", "multi_query") else 1
    if config.task == "multi_key":
        pairs = config.length // item
    if pairs > (config.symbols // 2) ** config.key_tokens:
        raise DataError(f"{where}: {pairs} pairs need as many keys; raise symbols={config.symbols} or key_tokens")
    many = config.task in ("mqar", "multi_query")
    needed = 2 * item * (config.pairs * config.repeats + 1) if many else 4 * item
    if config.task == "straddle":
        needed = max(needed, 2 * config.block_size + 2 * item)
    if config.length < needed:
        raise DataError(f"{where}: length={config.length} is too short for it; at least {needed}")
    return config


class _Draw:
    """Random numbers of one document, from raw Philox output, which numpy keeps the same between versions."""

    def __init__(self, salt: str):
        digest = hashlib.sha256(salt.encode()).digest()
        self._bits = np.random.Philox(key=int.from_bytes(digest[:16], "little"))

    @overload
    def below(self, high: int) -> int: ...

    @overload
    def below(self, high: int, count: int) -> np.ndarray: ...

    def below(self, high: int, count: int | None = None) -> int | np.ndarray:
        """An int, or int64 [count], from 0 to high - 1."""
        if count is None:
            return int(self._bits.random_raw() >> 11) % high
        return ((self._bits.random_raw(count) >> np.uint64(11)) % np.uint64(high)).astype(np.int64)

    def distinct(self, high: int, count: int) -> np.ndarray:
        """int64 [count] different numbers below `high`, in random order."""
        if high > 1 << 16:  # then repetitions are few
            found: dict[int, None] = {}
            while len(found) < count:
                found.update(dict.fromkeys(self.below(high, count).tolist()))
            return np.array(list(found)[:count], dtype=np.int64)
        return np.argsort(self._bits.random_raw(high), kind="stable")[:count]


def _filler(config: Filled, draw: _Draw) -> np.ndarray:
    """int64 [length + 1] of the last quarter of the symbols."""
    count = config.symbols // 4
    return config.symbols - count + draw.below(count, config.length + 1)


def _pairs(config: Filled, draw: _Draw, count: int) -> np.ndarray:
    """int64 [count, key + value tokens] with different keys."""
    base, low = config.symbols // 2, config.symbols // 2
    numbers = draw.distinct(base**config.key_tokens, count)
    keys = numbers[:, None] // base ** np.arange(config.key_tokens) % base
    values = low + draw.below(config.symbols // 4, count * config.value_tokens).reshape(count, -1)
    return np.concatenate([keys, values], axis=1)


def _slots(draw: _Draw, start: int, stop: int, item: int, count: int) -> np.ndarray:
    """Where `count` items may stand in [start, stop) without touching each other, in order; shifted at random, so that
    they stand anywhere relative to blocks."""
    start += draw.below(item)
    return start + np.sort(draw.distinct((stop - start) // item, count)) * item


def _ask(config: Filled, tokens: np.ndarray, pair: np.ndarray, needle: int, at: int) -> Answer:
    """Puts a question for a pair that stands at `needle` to the place `at`."""
    tokens[at : at + len(pair)] = pair
    return Answer(at + config.key_tokens, config.value_tokens, needle + config.key_tokens)


def _mqar(config: Filled, draw: _Draw, together: bool = False) -> Sample:
    tokens, item = _filler(config, draw), config.key_tokens + config.value_tokens
    count = config.min_pairs + draw.below(config.pairs - config.min_pairs + 1)
    pairs, end, num_asked = _pairs(config, draw, count), len(tokens), count * config.repeats
    border = end - num_asked * item if together else end // 2
    places = _slots(draw, 0, border, item, count)
    asked = border + np.arange(num_asked) * item if together else _slots(draw, border, end, item, num_asked)
    order = np.concatenate([draw.distinct(count, count) for _ in range(config.repeats)])
    tokens[places[:, None] + np.arange(item)] = pairs
    tokens[asked[:, None] + np.arange(item)] = pairs[order]
    latest, answers = (places + config.key_tokens).tolist(), []
    for start, which in zip((asked + config.key_tokens).tolist(), order.tolist()):
        answers.append(Answer(start, config.value_tokens, latest[which]))
        latest[which] = start
    return Sample(tokens, tuple(answers))


def _one_pair(config: Filled, draw: _Draw) -> Sample:
    tokens, item = _filler(config, draw), config.key_tokens + config.value_tokens
    (pair,), at = _pairs(config, draw, 1), len(tokens) - item
    if config.task == "straddle":
        block = 1 + draw.below((at - item) // config.block_size)
        place = block * config.block_size - config.key_tokens
    else:
        place = draw.below(at - item + 1)
    tokens[place : place + item] = pair
    return Sample(tokens, (_ask(config, tokens, pair, place, at),))


def _multi_key(config: Filled, draw: _Draw) -> Sample:
    tokens, item = _filler(config, draw), config.key_tokens + config.value_tokens
    at = len(tokens) - item
    pairs = _pairs(config, draw, at // item)
    first = at - len(pairs) * item
    tokens[first:at] = pairs.flatten()
    chosen = draw.below(len(pairs))
    return Sample(tokens, (_ask(config, tokens, pairs[chosen], first + chosen * item, at),))


def _copy(config: Filled, draw: _Draw) -> Sample:
    tokens, size = draw.below(config.symbols, config.length + 1), config.key_tokens + config.value_tokens
    at = len(tokens) - size
    place = draw.below(at - size + 1)
    return Sample(tokens, (_ask(config, tokens, tokens[place : place + size].copy(), place, at),))


_TASKS = {
    "mqar": _mqar,
    "passkey": _one_pair,
    "multi_key": _multi_key,
    "multi_query": functools.partial(_mqar, together=True),
    "straddle": _one_pair,
    "copy": _copy,
}
