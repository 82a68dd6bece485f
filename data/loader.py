"""The batches of one rank: mixture -> packer -> this rank's micro-batches, with a state that is small and exact.

Every rank plans all packs of a step from lengths alone, and reads tokens for its own only. So the packs of a step
depend neither on the number of ranks nor on the size of micro-batches, and the state is the same on every rank.
"""

from __future__ import annotations

import hashlib
from collections.abc import Mapping

from conf.schema import LongDocumentsConfig
from data.errors import DataError
from data.mixture import Mixture
from data.packing import Batch, Packer, Window, make_batch
from data.sources import Source

STATE_VERSION = 1


class Loader:
    """Batches from weighted sources. Call set_stage before the first step."""

    def __init__(
        self, sources: dict[str, Source], *, seed: int, rank: int = 0, world_size: int = 1, interleave: int = 1
    ):
        """interleave: long documents that are read side by side (data.interleave)."""
        assert sources and 0 <= rank < world_size, (len(sources), rank, world_size)
        self._sources, self.seed, self._rank, self._world_size = dict(sources), seed, rank, world_size
        self._mixture = Mixture({name: source.lengths for name, source in sources.items()}, seed)
        self._interleave = interleave
        self._pieces: list[Window] = []  # drawn, not trained on; lives in the packer while there is one
        self._packer: Packer | None = None
        self._num_packs = self._packs_per_micro = 0

    @property
    def fingerprint(self) -> str:
        """16 hex digits that change with the sources' names, tokens or selection of documents."""
        text = ";".join(f"{name}={source.fingerprint}" for name, source in sorted(self._sources.items()))
        return hashlib.sha256(text.encode()).hexdigest()[:16]

    @property
    def epochs(self) -> dict[str, float]:
        """Passes over each source so far; above 1, documents repeat."""
        return self._mixture.epochs

    def set_stage(
        self,
        *,
        seq_len: int,
        batch_tokens: int,
        micro_tokens: int,
        mix: Mapping[str, float],
        long_documents: LongDocumentsConfig | None = None,
    ) -> None:
        """Set the shape and mix of the steps to come. What was drawn and not yet trained on is packed anew at
        `seq_len`.

        Raises ValueError if batch_tokens or micro_tokens are no multiples of seq_len, or the micro-batches do not
        divide evenly among the ranks.
        """
        check_batch(seq_len, batch_tokens, micro_tokens, self._world_size)
        self._mixture.set_mix(mix, long_documents)
        # No more than there are: a document is not read twice at the same time.
        texts = [name for name, source in self._sources.items() if not source.is_chat]
        interleave = max(1, min(self._interleave, self._mixture.num_documents(seq_len, texts)))
        conversations = {name: one.usable_inputs(seq_len) for name, one in self._sources.items() if one.is_chat}
        for name, used in conversations.items():
            if mix.get(name, 0) > 0 and not used.any():
                raise DataError(
                    f"source {name!r}: none of its {len(used):,} conversations has an answer within the first "
                    f"{seq_len:,} tokens; train at a larger seq_len, or on shorter conversations"
                )
        self._packer = Packer(seq_len, self._mixture.draw, self._drop_packer(), interleave, conversations)
        self._num_packs, self._packs_per_micro = batch_tokens // seq_len, micro_tokens // seq_len

    def next_step(self) -> list[Batch]:
        """This rank's micro-batches of the next optimizer step, each of micro_tokens inputs.

        Of the step's packs, micro-batch m of rank r takes packs_per_micro from number (m * world_size + r) *
        packs_per_micro.
        """
        assert self._packer is not None, "set_stage comes first"
        packs = [self._packer.next_pack() for _ in range(self._num_packs)]
        size = self._packs_per_micro
        first = range(self._rank * size, self._num_packs, self._world_size * size)
        return [make_batch([w for pack in packs[i : i + size] for w in pack], self._fetch, self._learnt) for i in first]

    def state_dict(self) -> dict:
        """The position in the data, JSON-able; the same on every rank."""
        pieces = self._pieces if self._packer is None else self._packer.pieces
        return {
            "version": STATE_VERSION,
            "fingerprint": self.fingerprint,
            "sources": {name: source.fingerprint for name, source in self._sources.items()},
            "seed": self.seed,
            "draws": self._mixture.draws,
            "counts": dict(self._mixture.counts),
            "pieces": [list(piece) for piece in pieces],
        }

    def load_state_dict(self, state: dict) -> None:
        """Go on from `state`, under the present stage, rank and world size. Raises DataError if the data or the seed
        differ."""
        if state["version"] != STATE_VERSION:
            raise DataError(
                f"the checkpoint's data position has format {state['version']}, this program reads {STATE_VERSION}"
            )
        if state["fingerprint"] != self.fingerprint:
            was, now = state["sources"], {name: source.fingerprint for name, source in self._sources.items()}
            raise DataError(
                f"the data changed since the checkpoint: fingerprint was {state['fingerprint']} ({_listed(was)}), is "
                "now "
                f"{self.fingerprint} ({_listed(now)}). Give it the same sources and tokenizer, or start a new run "
                "from its weights"
            )
        if state["seed"] != self.seed:
            raise DataError(
                f"the checkpoint's data order has seed {state['seed']}, this run has {self.seed}: set "
                f"data.seed={state['seed']}"
            )
        self._mixture.draws, self._mixture.counts = state["draws"], dict(state["counts"])
        self._pieces = [Window(*piece) for piece in state["pieces"]]
        if self._packer is not None:
            last = self._packer
            self._packer = Packer(last.seq_len, self._mixture.draw, self._pieces, last.interleave, last.conversations)

    def _drop_packer(self) -> list[Window]:
        return self._pieces if self._packer is None else self._packer.pieces

    def _fetch(self, window: Window):
        return self._sources[window.source].window(window.document, window.start, window.length)

    def _learnt(self, window: Window):
        return self._sources[window.source].learnt(window.document, window.start, window.length)


def check_batch(seq_len: int, batch_tokens: int, micro_tokens: int, world_size: int) -> None:
    """Raise ValueError, naming values that work, unless a step of batch_tokens divides into micro-batches for every
    rank."""
    for name, value in (("batch_tokens", batch_tokens), ("micro_tokens", micro_tokens)):
        if value < seq_len or value % seq_len:
            near = max(value // seq_len, 1) * seq_len
            raise ValueError(
                f"{name}={value} is not a multiple of seq_len={seq_len}: {near} or {near + seq_len} would be"
            )
    share = micro_tokens * world_size
    if batch_tokens % share:
        near = max(batch_tokens // share, 1) * share
        raise ValueError(
            f"batch_tokens={batch_tokens} does not divide into micro-batches of micro_tokens={micro_tokens} for "
            f"{world_size} rank(s): "
            f"batch_tokens={near} or {near + share} would{_fitting_micro(seq_len, batch_tokens, world_size)}"
        )


def _fitting_micro(seq_len: int, batch_tokens: int, world_size: int) -> str:
    """The micro_tokens that would fit this batch, as the end of a sentence."""
    packs = batch_tokens // seq_len
    if packs % world_size:
        return f"; {packs} sequence(s) a step do not divide among {world_size} ranks at all"
    fits = [n * seq_len for n in range(1, packs // world_size + 1) if (packs // world_size) % n == 0]
    return f", or micro_tokens={' or '.join(map(str, fits[:6]))}"


def _listed(fingerprints: Mapping[str, str]) -> str:
    return ", ".join(f"{name} {fingerprint}" for name, fingerprint in sorted(fingerprints.items()))
