"""Which document comes next: a deterministic sequence of draws from weighted sources.

Draw i picks a source by a counter-based random number of (seed, i) and then takes that source's next document in its
shuffled order, which is a permutation of its document numbers for each pass (epoch). So the sequence depends on the
seed, the sources and the mix alone, and its state is the number of draws and the count taken from each source.

Only raw Philox output is used, which numpy keeps the same between versions (its distributions and shuffles may change).
"""

from __future__ import annotations

import hashlib
from collections.abc import Mapping

import numpy as np

from data.packing import Window

BLOCK = 4096  # draws whose random numbers are made at once; a multiple of 4, the words of a Philox counter step


class Mixture:
    """The sequence of draws. lengths: source name -> int64 tokens of each document (with BOS and EOS).

    draws: how many were made. counts: documents taken from each source.
    """

    def __init__(self, lengths: Mapping[str, np.ndarray], seed: int):
        self._lengths, self.seed = dict(lengths), seed
        self.draws = 0
        self.counts = dict.fromkeys(self._lengths, 0)
        self._names: list[str] = []
        self._edges = np.zeros(0)
        self._block: tuple[int, list[int]] = (-1, [])  # number of a block of draws, and the sources they pick
        self._orders: dict[str, tuple[int, np.ndarray]] = {}

    def set_mix(self, mix: Mapping[str, float]) -> None:
        """From the next draw on, source s gives the share mix[s] / sum(mix) of training tokens. Raises ValueError."""
        weights = draw_weights(self._lengths, mix)
        self._names = list(weights)
        self._edges = np.cumsum(list(weights.values()))[:-1]
        self._block = (-1, [])

    def draw(self) -> Window:
        """The next document, whole."""
        name = self._names[self._choice(self.draws)]
        epoch, place = divmod(self.counts[name], len(self._lengths[name]))
        document = self._order(name, epoch).item(place)
        self.draws += 1
        self.counts[name] += 1
        return Window(name, document, 0, self._lengths[name].item(document) - 1)

    @property
    def epochs(self) -> dict[str, float]:
        """Passes over each source so far."""
        return {name: count / len(self._lengths[name]) for name, count in self.counts.items()}

    def _choice(self, index: int) -> int:
        """Which of the mix's sources draw `index` takes from."""
        block, offset = divmod(index, BLOCK)
        if self._block[0] != block:
            raw = _philox("choice", self.seed, counter=block * (BLOCK // 4)).random_raw(BLOCK)
            uniform = (raw >> np.uint64(11)) * 2.0**-53
            self._block = (block, np.searchsorted(self._edges, uniform, side="right").tolist())
        return self._block[1][offset]

    def _order(self, name: str, epoch: int) -> np.ndarray:
        """The shuffled document numbers of a source in an epoch; the latest is kept."""
        if self._orders.get(name, (-1,))[0] != epoch:
            raw = _philox(f"order {epoch} {name}", self.seed).random_raw(len(self._lengths[name]))
            self._orders[name] = (epoch, np.argsort(raw, kind="stable"))
        return self._orders[name][1]


def draw_weights(lengths: Mapping[str, np.ndarray], mix: Mapping[str, float]) -> dict[str, float]:
    """Probability of drawing each source, sorted by name, so that its documents make up mix[name] of the inputs.

    Raises ValueError for names that are no source, negative shares, or no positive one.
    """
    unknown = sorted(set(mix) - set(lengths))
    if unknown:
        raise ValueError(f"mix names {', '.join(unknown)}: no such source; there are {', '.join(sorted(lengths))}")
    wrong = {name: share for name, share in mix.items() if not 0 <= share < float("inf")}
    if wrong or not any(mix.values()):
        raise ValueError(f"mix={dict(mix)}: shares are numbers of at least 0, and one of them is above 0")
    weights = {name: mix[name] / float(np.mean(lengths[name] - 1)) for name in sorted(mix) if mix[name] > 0}
    total = sum(weights.values())
    return {name: weight / total for name, weight in weights.items()}


def expected_epochs(lengths: Mapping[str, np.ndarray], mix: Mapping[str, float], num_tokens: int) -> dict[str, float]:
    """Passes over each source that training on `num_tokens` with this mix takes, for the plan."""
    total = sum(mix.values())
    return {name: num_tokens * share / total / int(np.sum(lengths[name] - 1)) for name, share in mix.items()}


def long_share(lengths: Mapping[str, np.ndarray], mix: Mapping[str, float], length: int) -> float:
    """Share of the tokens trained on with this mix that come from documents of at least `length` inputs."""
    shares = {name: _tokens_of_long(lengths[name], length) for name, share in mix.items() if share > 0}
    return sum(mix[name] * share for name, share in shares.items()) / sum(mix.values())


def _tokens_of_long(lengths: np.ndarray, length: int) -> float:
    inputs = lengths - 1
    return float(inputs[inputs >= length].sum() / max(inputs.sum(), 1))


def _philox(purpose: str, seed: int, counter: int = 0) -> np.random.Philox:
    key = hashlib.sha256(f"{purpose}|{seed}".encode()).digest()[:16]
    return np.random.Philox(key=int.from_bytes(key, "little"), counter=counter)
