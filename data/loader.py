"""The batches of one rank: mixture -> packer -> this rank's micro-batches, with a state that is small and exact.

A step is a function of a position: the draws made so far and the pieces of documents left over. The packs of a step
depend neither on the number of ranks nor on the size of micro-batches, and the position is the same on every rank. A
rank makes its own packs and skips the others' (Packer.skip).

While a step is trained on, a thread makes the next one. It starts from the position behind the step that was handed
out, which alone is the loader's state: what was made ahead can be thrown away at any time.
"""

from __future__ import annotations

import hashlib
from collections.abc import Mapping
from concurrent.futures import Future, ThreadPoolExecutor, wait
from contextlib import nullcontext
from typing import NamedTuple

import numpy as np
import torch

from conf.schema import LongDocumentsConfig
from conf.words import listed
from data.errors import DataError
from data.mixture import Mixture
from data.packing import Batch, Packer, Window, make_batch
from data.sources import Source

STATE_VERSION = 1


class Position(NamedTuple):
    """Where in the data a run is. draws, counts: as Mixture has them; pieces: drawn, and not trained on."""

    draws: int
    counts: dict[str, int]
    pieces: list[Window]


class Stage(NamedTuple):
    """What a stage asks of the loader, worked out."""

    seq_len: int
    interleave: int
    conversations: dict[str, np.ndarray]
    """As Packer takes them."""
    num_packs: int
    packs_per_micro: int


class Loader:
    """Batches from weighted sources. Call set_stage before the first step."""

    def __init__(
        self,
        sources: dict[str, Source],
        *,
        seed: int,
        rank: int = 0,
        world_size: int = 1,
        interleave: int = 1,
        pin_for: torch.device | None = None,
    ):
        """interleave: long documents that are read side by side (data.interleave). pin_for: the CUDA device that the
        batches will be copied to; their tensors then lie in pinned memory."""
        assert sources and 0 <= rank < world_size, (len(sources), rank, world_size)
        assert pin_for is None or pin_for.type == "cuda", pin_for
        self._sources, self.seed, self._rank, self._world_size = dict(sources), seed, rank, world_size
        self._mixture = Mixture({name: source.lengths for name, source in sources.items()}, seed)
        self._interleave, self._pin_for = interleave, pin_for
        self._position = Position(self._mixture.draws, dict(self._mixture.counts), [])
        self._stage: Stage | None = None
        self._ahead: Future[tuple[list[Batch], Position]] | None = None  # while there is one, the mixture is its

    @property
    def fingerprint(self) -> str:
        """16 hex digits that change with the sources' names, tokens or selection of documents."""
        text = ";".join(f"{name}={source.fingerprint}" for name, source in sorted(self._sources.items()))
        return hashlib.sha256(text.encode()).hexdigest()[:16]

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
        self._drop_ahead()
        conversations = {name: one.usable_inputs(seq_len) for name, one in self._sources.items() if one.is_chat}
        for name, used in conversations.items():
            if mix.get(name, 0) > 0 and not used.any():
                raise DataError(
                    f"source {name!r}: none of its {len(used):,} conversations has an answer within the first "
                    f"{seq_len:,} tokens; train at a larger seq_len, or on shorter conversations"
                )
        self._mixture.set_mix(mix, long_documents, conversations)
        # No more than there are: a document is not read twice at the same time.
        texts = [name for name, source in self._sources.items() if not source.is_chat]
        interleave = max(1, min(self._interleave, self._mixture.num_documents(seq_len, texts)))
        self._stage = Stage(seq_len, interleave, conversations, batch_tokens // seq_len, micro_tokens // seq_len)

    def next_step(self) -> list[Batch]:
        """This rank's micro-batches of the next optimizer step, each of micro_tokens inputs.

        Of the step's packs, micro-batch m of rank r takes packs_per_micro from number (m * world_size + r) *
        packs_per_micro. Raises DataError, as the sources do; the position then stays what it was.
        """
        assert self._stage is not None, "set_stage comes first"
        ahead, self._ahead = self._ahead, None
        batches, self._position = self._make_step(self._position) if ahead is None else ahead.result()
        # An executor per step: its thread ends with the step, so that none is left to be closed.
        executor = ThreadPoolExecutor(1, thread_name_prefix="loader")
        self._ahead = executor.submit(self._make_step, self._position)
        executor.shutdown(wait=False)
        return batches

    def state_dict(self) -> dict:
        """The position in the data behind the last step that was handed out, JSON-able; the same on every rank."""
        return {
            "version": STATE_VERSION,
            "fingerprint": self.fingerprint,
            "sources": {name: source.fingerprint for name, source in self._sources.items()},
            "seed": self.seed,
            "draws": self._position.draws,
            "counts": dict(sorted(self._position.counts.items())),
            "pieces": [list(piece) for piece in self._position.pieces],
        }

    def load_state_dict(self, state: dict, *, allow_changes: bool = False) -> list[str]:
        """Go on from `state`, under the present stage, rank and world size; returns what is lost, a line each.

        Raises DataError if the data or the seed differ. With `allow_changes` sources may: those that are the same go on
        where they were, others begin anew.
        """
        if state["version"] != STATE_VERSION:
            raise DataError(
                f"the checkpoint's data position has format {state['version']}, this program reads {STATE_VERSION}"
            )
        was, now = state["sources"], {name: source.fingerprint for name, source in self._sources.items()}
        changed = sorted(name for name in was.keys() | now.keys() if was.get(name) != now.get(name))
        if changed and not allow_changes:
            raise DataError(
                f"the data changed since the checkpoint: {listed(_change(name, was, now) for name in changed)}. Give "
                "it the same sources and tokenizer, say run.allow_changes=true to go on with the new, or start a new "
                "run from its weights"
            )
        if state["seed"] != self.seed:
            raise DataError(
                f"the checkpoint's data order has seed {state['seed']}, this run has {self.seed}: set "
                f"data.seed={state['seed']}"
            )
        self._drop_ahead()
        pieces = [Window(*piece) for piece in state["pieces"]]
        counts = dict(state["counts"])
        if changed:
            pieces = [piece for piece in pieces if piece.source not in changed]
            counts = {name: count for name, count in counts.items() if name.split(" ")[0] not in changed}
            counts = dict.fromkeys(self._sources, 0) | counts
        self._position = Position(state["draws"], counts, pieces)
        return [f"{_change(name, was, now)}: what was read of it is not known any more" for name in changed]

    def _drop_ahead(self) -> None:
        """Throw away what was made ahead; the mixture is nobody else's then."""
        if self._ahead is not None:
            wait([self._ahead])
            self._ahead = None

    def _make_step(self, position: Position) -> tuple[list[Batch], Position]:
        """This rank's micro-batches of the step at `position`, and the position behind it."""
        assert self._stage is not None
        seq_len, interleave, conversations, num_packs, size = self._stage
        self._mixture.seek(position.draws, position.counts)
        packer = Packer(seq_len, self._mixture, position.pieces, interleave, conversations)
        micros, at = [], 0
        for first in range(self._rank * size, num_packs, self._world_size * size):
            packer.skip(first - at)
            micros.append([window for _ in range(size) for window in packer.next_pack()])
            at = first + size
        packer.skip(num_packs - at)
        behind = Position(self._mixture.draws, dict(self._mixture.counts), packer.pieces)
        # A new thread is on the first GPU, where pinning would make a context that is never used.
        with nullcontext() if self._pin_for is None else torch.cuda.device(self._pin_for):
            return [self._batch(windows) for windows in micros], behind

    def _batch(self, windows: list[Window]) -> Batch:
        batch = make_batch(windows, self._fetch, self._supervised)
        return batch if self._pin_for is None else batch.pin()

    def _fetch(self, window: Window):
        return self._sources[window.source].window(window.document, window.start, window.length)

    def _supervised(self, window: Window):
        return self._sources[window.source].supervised(window.document, window.start, window.length)


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
        return f"; {packs} sequence(s) per step do not divide among {world_size} ranks"
    fits = [n * seq_len for n in range(1, packs // world_size + 1) if (packs // world_size) % n == 0]
    return f", or micro_tokens={' or '.join(map(str, fits[:6]))}"


def _change(name: str, was: Mapping[str, str], now: Mapping[str, str]) -> str:
    """What became of a source between two sets of fingerprints."""
    if name not in now:
        return f"source {name!r} is gone"
    if name not in was:
        return f"source {name!r} is new"
    return f"source {name!r} has other documents or tokens ({was[name]} -> {now[name]})"
