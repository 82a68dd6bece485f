"""Which document comes next: a deterministic sequence of draws from weighted sources.

Draw i picks a pool by a counter-based random number of (seed, i) and then takes that pool's next document in its
shuffled order, which is a permutation of its documents for each pass (epoch). A pool is a source or, in a stage that
asks for a share of long documents, the long or the short documents of one. So the sequence depends on the seed, the
sources and the mix alone, and its state is the number of draws and the count taken from each pool.

Only raw Philox output is used, which numpy keeps the same between versions (its distributions and shuffles may change).
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Collection, Mapping
from typing import NamedTuple

import numpy as np

from conf.schema import LongDocumentsConfig
from data.packing import Window

BLOCK = 1024  # draws that are worked out at once; a multiple of 4, the words of a Philox counter step


class Pool(NamedTuple):
    """Documents of one source that are drawn alike."""

    source: str
    share: float
    """Of the tokens, relative to the other pools."""
    documents: np.ndarray
    """int64, their numbers in the source."""
    inputs: np.ndarray
    """int64, the inputs of each of them: a token less than it has."""
    used: np.ndarray
    """int64, how many of these are trained on at the length in force: fewer where a conversation is cut or left out."""


class Draws(NamedTuple):
    """Draws one after another: the number of the pool each takes from, and its document."""

    pools: np.ndarray
    documents: np.ndarray
    inputs: np.ndarray


NO_DRAWS = Draws(*[np.zeros(0, np.int64)] * 3)


class Mixture:
    """The sequence of draws. lengths: source name -> int64 tokens of each document (with BOS and EOS).

    draws: how many were made. counts: documents taken from each pool, by its name (a source's own where it is whole).
    """

    def __init__(self, lengths: Mapping[str, np.ndarray], seed: int):
        self._lengths, self.seed = dict(lengths), seed
        self.draws = 0
        self.counts = dict.fromkeys(self._lengths, 0)
        self._pools: dict[str, Pool] = {}
        self._names: list[str] = []
        self._edges = np.zeros(0)
        self._ahead = NO_DRAWS  # what is to come, to the end of a block; self._made of it was drawn already
        self._made = 0
        self._orders: dict[str, tuple[int, np.ndarray]] = {}

    def set_mix(
        self,
        mix: Mapping[str, float],
        long_documents: LongDocumentsConfig | None = None,
        used: Mapping[str, np.ndarray] | None = None,
    ) -> None:
        """From the next draw on, source s gives the share mix[s] / sum(mix) of training tokens; with `long_documents`,
        that share of each source's tokens comes from its long documents. used: source -> inputs of each document that
        are trained on, where they are not all. Raises ValueError."""
        self._pools = make_pools(self._lengths, mix, long_documents, used)
        weights = draw_weights(self._pools)
        self._names = list(weights)
        self._edges = np.cumsum(list(weights.values()))[:-1]
        self._ahead, self._made, self._orders = NO_DRAWS, 0, {}

    def num_documents(self, length: int, sources: Collection[str]) -> int:
        """How many documents of at least `length` inputs can be drawn from these sources."""
        return sum(int((pool.inputs >= length).sum()) for pool in self._pools.values() if pool.source in sources)

    def seek(self, draws: int, counts: Mapping[str, int]) -> None:
        """Go on from where a mixture of the same lengths and seed had these draws and counts."""
        if (draws, counts) != (self.draws, self.counts):
            self.draws, self.counts = draws, dict(counts)
            self._ahead, self._made = NO_DRAWS, 0

    def draw(self) -> Window:
        """The next document, whole."""
        self._look_ahead()
        pools, documents, inputs = self._ahead
        place, name = self._made, self._names[pools.item(self._made)]
        self.counts[name] = self.counts.get(name, 0) + 1
        self.draws += 1
        self._made += 1
        return Window(self._pools[name].source, documents.item(place), 0, inputs.item(place))

    def ahead(self, length: int, without: Collection[str]) -> np.ndarray:
        """The inputs of some documents to come, int64 [n]: up to the first that has `length` or is of a source in
        `without`, or fewer."""
        self._look_ahead()
        left_out = [self._pools[name].source in without for name in self._names]
        pools, _, inputs = (column[self._made :] for column in self._ahead)
        if left_out[pools[0]] or inputs[0] >= length:  # often so, and not worth a look at the others
            return inputs[:0]
        stops = np.flatnonzero((inputs >= length) | np.array(left_out)[pools])
        return inputs[: stops[0]] if len(stops) else inputs

    def ahead_of(self, used: Mapping[str, np.ndarray]) -> tuple[list[int], Callable[[int], Window]]:
        """What `used` says of some documents to come, up to the first that is of another source, or fewer; and what
        gives the i-th of them, whole. used: source -> int64, a number for each of its documents."""
        self._look_ahead()
        owners = [self._pools[name].source for name in self._names]
        pools, documents, inputs = (column[self._made :] for column in self._ahead)

        def window(i: int) -> Window:
            return Window(owners[pools.item(i)], documents.item(i), 0, inputs.item(i))

        if owners[pools[0]] not in used:  # often so, and not worth a look at the others
            return [], window
        stops = np.flatnonzero(np.array([owner not in used for owner in owners])[pools])
        found = np.zeros(stops[0] if len(stops) else len(pools), np.int64)
        for number, owner in enumerate(owners):
            places = np.flatnonzero(pools[: len(found)] == number)
            if len(places):
                found[places] = used[owner][documents[places]]
        return found.tolist(), window

    def skip(self, count: int) -> None:
        """Pass over `count` documents, of those that `ahead` or `ahead_of` gave."""
        taken = np.bincount(self._ahead.pools[self._made : self._made + count], minlength=len(self._names))
        for name, number in zip(self._names, taken.tolist()):
            if number:
                self.counts[name] = self.counts.get(name, 0) + number
        self.draws += count
        self._made += count

    def _look_ahead(self) -> None:
        """Have a draw ahead."""
        if self._made < len(self._ahead.pools):
            return
        block, offset = divmod(self.draws, BLOCK)
        raw = _philox("choice", self.seed, counter=block * (BLOCK // 4)).random_raw(BLOCK)[offset:]
        uniform = (raw >> np.uint64(11)) * 2.0**-53
        pools = np.searchsorted(self._edges, uniform, side="right")
        documents, inputs = np.empty_like(pools), np.empty_like(pools)
        for number, name in enumerate(self._names):
            places = np.flatnonzero(pools == number)
            indices = self._next(name, len(places))
            documents[places], inputs[places] = self._pools[name].documents[indices], self._pools[name].inputs[indices]
        self._ahead, self._made = Draws(pools, documents, inputs), 0

    def _next(self, name: str, count: int) -> np.ndarray:
        """Which of a pool's documents its next `count` draws take."""
        parts, first, size = [], self.counts.get(name, 0), len(self._pools[name].documents)
        last = first + count
        while first < last:
            epoch, place = divmod(first, size)
            parts.append(self._order(name, epoch)[place : place + last - first])
            first += len(parts[-1])
        return np.concatenate(parts) if parts else np.zeros(0, np.int64)

    def _order(self, name: str, epoch: int) -> np.ndarray:
        """The shuffled order of a pool in an epoch; the latest is kept."""
        if self._orders.get(name, (-1,))[0] != epoch:
            raw = _philox(f"order {epoch} {name}", self.seed).random_raw(len(self._pools[name].documents))
            self._orders[name] = (epoch, np.argsort(raw, kind="stable"))
        return self._orders[name][1]


def make_pools(
    lengths: Mapping[str, np.ndarray],
    mix: Mapping[str, float],
    long_documents: LongDocumentsConfig | None = None,
    used: Mapping[str, np.ndarray] | None = None,
) -> dict[str, Pool]:
    """The pools of a mix by name, sorted by source: one per source, or its long and its short documents. used: as
    Mixture.set_mix takes it.

    A source whose documents are all long or all short is one pool, with all of its share. Raises ValueError for names
    that are no source, negative shares, or no positive one.
    """
    unknown = sorted(set(mix) - set(lengths))
    if unknown:
        raise ValueError(f"mix names {', '.join(unknown)}: no such source; there are {', '.join(sorted(lengths))}")
    wrong = {name: share for name, share in mix.items() if not 0 <= share < float("inf")}
    if wrong or not any(mix.values()):
        raise ValueError(f"mix={dict(mix)}: shares are numbers of at least 0, and one of them is above 0")
    pools = {}
    for name in (name for name in sorted(mix) if mix[name] > 0):
        inputs = lengths[name] - 1
        whole = Pool(name, mix[name], np.arange(len(inputs)), inputs, (used or {}).get(name, inputs))
        pools |= {name: whole} if long_documents is None else _split(whole, long_documents)
    if not pools:
        raise ValueError(f"mix={dict(mix)}: no document of these sources has a token to train on")
    return pools


def _split(whole: Pool, long_documents: LongDocumentsConfig) -> dict[str, Pool]:
    """The long and the short documents of a source as pools of their own, without what gives no token."""
    is_long, share = whole.inputs >= long_documents.length, long_documents.share
    parts = {
        f"{whole.source} >= {long_documents.length}": (share, is_long),
        f"{whole.source} < {long_documents.length}": (1 - share, ~is_long & (whole.inputs > 0)),
    }
    kept = {name: part for name, part in parts.items() if part[0] > 0 and part[1].any()}
    kept = kept or {name: (1, part) for name, (_, part) in parts.items() if part.any()}
    total = sum(share for share, _ in kept.values())
    return {
        name: Pool(whole.source, whole.share * share / total, *(one[part] for one in whole[2:]))
        for name, (share, part) in kept.items()
    }


def draw_weights(pools: Mapping[str, Pool]) -> dict[str, float]:
    """Probability of drawing each pool, so that its documents make up its share of the inputs trained on."""
    weights = {name: pool.share / float(np.mean(pool.used)) for name, pool in pools.items() if pool.used.any()}
    total = sum(weights.values())
    return {name: weight / total for name, weight in weights.items()}


def long_share(pools: Mapping[str, Pool], length: int) -> float:
    """Share of the tokens trained on that come from documents of at least `length` inputs."""
    shares = {
        name: pool.share * pool.inputs[pool.inputs >= length].sum() / max(pool.inputs.sum(), 1)
        for name, pool in pools.items()
    }
    return float(sum(shares.values()) / sum(pool.share for pool in pools.values()))


def passes(pools: Mapping[str, Pool], num_tokens: int) -> dict[str, float]:
    """How often training on `num_tokens` reads the documents of each pool."""
    total = sum(pool.share for pool in pools.values())
    return {name: num_tokens * pool.share / total / max(int(pool.inputs.sum()), 1) for name, pool in pools.items()}


def _philox(purpose: str, seed: int, counter: int = 0) -> np.random.Philox:
    key = hashlib.sha256(f"{purpose}|{seed}".encode()).digest()[:16]
    return np.random.Philox(key=int.from_bytes(key, "little"), counter=counter)
