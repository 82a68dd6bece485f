"""The loader: every token once, the same packs for any number of ranks, and resume that equals going on."""

import hashlib
import json
import multiprocessing
import queue
from collections import Counter
from itertools import pairwise

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from conf.schema import DataConfig, LongDocumentsConfig, SourceConfig
from data.errors import DataError
from data.loader import Loader
from data.mixture import Mixture
from data.sources import open_sources

# (seq_len, batch in packs): divisible by up to 4 ranks or micro-batches
STAGES = st.tuples(st.integers(1, 24), st.sampled_from([4, 8]))
LAYOUTS = st.sampled_from([(1, 1), (1, 2), (1, 4), (2, 1), (2, 2), (4, 1)])  # (ranks, packs a micro-batch)
LENGTHS = st.lists(st.integers(2, 90), min_size=1, max_size=12)
MIX = {"a": 1.0, "b": 2.0}
LONG = st.one_of(st.none(), st.builds(LongDocumentsConfig, st.floats(0, 1), st.sampled_from([1, 20, 60])))


class CountingSource:
    """Token j of document d is d * STRIDE + j, so that a batch's tokens alone tell which (document, offset) each one
    is."""

    STRIDE = 100_000

    def __init__(self, name, lengths, base=0):
        self.name, self.lengths, self.base = name, np.array(lengths, dtype=np.int64), base
        self.num_documents, self.num_tokens = len(lengths), int(sum(lengths))
        self.fingerprint = f"{name}-{base}-{'-'.join(map(str, lengths))}"
        self.ids = [f"{name}{i}" for i in range(len(lengths))]

    is_chat = False

    def window(self, document, start, length):
        return self.tokens(document, start, start + length + 1)

    def supervised(self, document, start, length):
        return None

    def tokens(self, document, start, stop):
        assert 0 <= start <= stop <= self.lengths[document]
        return np.arange(start, stop, dtype=np.uint32) + (self.base + document) * self.STRIDE


class Ranks:
    """All ranks of a run in one process; step() gives every rank's micro-batches."""

    def __init__(self, sources, seed, num_ranks):
        self.loaders = [
            Loader(sources, seed=seed, rank=r, world_size=num_ranks, interleave=2) for r in range(num_ranks)
        ]

    def set_stage(self, stage, packs_per_micro, long_documents=None):
        seq_len, packs = stage
        for loader in self.loaders:
            loader.set_stage(
                seq_len=seq_len,
                batch_tokens=seq_len * packs,
                micro_tokens=seq_len * packs_per_micro,
                mix=MIX,
                long_documents=long_documents,
            )

    def step(self):
        return [loader.next_step() for loader in self.loaders]

    def state(self):
        states = [json.dumps(loader.state_dict()) for loader in self.loaders]
        assert len(set(states)) == 1
        return json.loads(states[0])

    def load(self, state):
        for loader in self.loaders:
            loader.load_state_dict(state)


def in_order(ranks_batches):
    """The step's windows as lists of (token, label), in global pack order: micro-batch by micro-batch, rank by rank."""
    windows = []
    for micro in zip(*ranks_batches):
        for batch in micro:
            bounds = batch.cu_seqlens.tolist()
            pairs = list(zip(batch.tokens.tolist(), batch.labels.tolist()))
            windows += [pairs[i:j] for i, j in pairwise(bounds)]
            assert batch.positions.tolist() == [p for i, j in pairwise(bounds) for p in range(j - i)]
    return windows


def two(a, b):
    """Sources of documents with these lengths, whose tokens are all different."""
    return {"a": CountingSource("a", a), "b": CountingSource("b", b, base=100)}


@settings(deadline=None, max_examples=40)
@given(LENGTHS, LENGTHS, STAGES, STAGES, st.integers(0, 5), st.integers(0, 3))
def test_every_token_once_an_epoch_also_across_a_change_of_length(a, b, first, second, steps, seed):
    """Catches lost or repeated tokens, labels that are not the document's next token, windows that cross documents."""
    sources = two(a, b)
    run = Ranks(sources, seed, 1)
    run.set_stage(first, 1)
    windows = [w for _ in range(steps) for w in in_order(run.step())]
    run.set_stage(second, 1)
    windows += [w for _ in range(3) for w in in_order(run.step())]
    stride = sources["a"].STRIDE
    for window in windows:
        assert all(label == token + 1 for token, label in window)
        assert [token for token, _ in window] == list(range(window[0][0], window[0][0] + len(window)))
    state = run.state()
    seen = Counter(token for window in windows for token, _ in window)
    for name, document, start, length in state["pieces"]:
        seen.update((sources[name].base + document) * stride + start + i for i in range(length))
    for name, source in sources.items():
        epochs, rest = divmod(state["counts"][name], source.num_documents)
        counts = [{seen[(source.base + d) * stride + i] for i in range(n - 1)} for d, n in enumerate(source.lengths)]
        assert all(len(c) == 1 for c in counts)  # all inputs of a document were used equally often
        assert sorted(c.pop() for c in counts) == [epochs] * (source.num_documents - rest) + [epochs + 1] * rest


@settings(deadline=None, max_examples=40)
@given(LENGTHS, LENGTHS, STAGES, LAYOUTS, st.integers(0, 3))
def test_ranks_share_out_the_packs_of_one_rank(a, b, stage, layout, seed):
    """Catches ranks that see each other's data, or a step that depends on how many ranks or micro-batches there are."""
    num_ranks, packs_per_micro = layout
    sources = two(a, b)
    alone, together = Ranks(sources, seed, 1), Ranks(sources, seed, num_ranks)
    alone.set_stage(stage, 1)
    together.set_stage(stage, packs_per_micro)
    for _ in range(3):
        assert in_order(together.step()) == in_order(alone.step())
        assert together.state() == alone.state()


@settings(deadline=None, max_examples=40)
@given(LENGTHS, LENGTHS, STAGES, STAGES, LAYOUTS, LAYOUTS, st.integers(0, 6), st.integers(0, 3), LONG, LONG)
def test_resume_equals_going_on(a, b, first, second, layout, new_layout, steps, seed, long, new_long):
    """Catches any state that is not saved: resumed with other ranks, micro-batches, length and share of long documents
    = never stopped."""
    sources = two(a, b)
    run = Ranks(sources, seed, layout[0])
    run.set_stage(first, layout[1], long)
    for _ in range(steps):
        run.step()
    resumed = Ranks(sources, seed, new_layout[0])
    if seed % 2:  # the state may come before or after the stage
        resumed.set_stage(second, new_layout[1], new_long)
        resumed.load(run.state())
    else:
        resumed.load(run.state())
        assert resumed.state() == run.state()
        resumed.set_stage(second, new_layout[1], new_long)
    run.set_stage(second, layout[1], new_long)
    for _ in range(3):
        assert in_order(resumed.step()) == in_order(run.step())
    assert resumed.state() == run.state()


@pytest.mark.parametrize("seq_len", [8, 32, 200])
def test_the_length_does_not_change_which_documents_come_next(seq_len):
    """Catches a length that reaches into the mixture: what was used or is waiting is what a bare mixture draws."""
    sources = two([20] * 30, [50] * 30)
    run = Ranks(sources, 7, 1)
    run.set_stage((seq_len, 4), 1)
    used = {window[0][0] // CountingSource.STRIDE for _ in range(5) for window in in_order(run.step())}
    state = run.state()
    used |= {sources[name].base + document for name, document, _, _ in state["pieces"]}
    mixture = Mixture({name: source.lengths for name, source in sources.items()}, 7)
    mixture.set_mix(MIX)
    drawn = [mixture.draw() for _ in range(state["draws"])]
    assert len(drawn) >= 5 and used == {sources[w.source].base + w.document for w in drawn}


def test_resume_refuses_other_data_and_another_seed():
    """Catches a run that silently goes on with other documents or another order; both fingerprints are shown."""
    old, new = Loader(two([9], [9]), seed=1), Loader(two([9], [10]), seed=1)
    with pytest.raises(DataError, match=r"source 'b' has other documents or tokens .b-100-9 -> b-100-10"):
        new.load_state_dict(old.state_dict())
    assert [line[:10] for line in new.load_state_dict(old.state_dict(), allow_changes=True)] == ["source 'b'"]
    with pytest.raises(DataError, match=r"seed 1, this run has 2: set data.seed=1"):
        Loader(two([9], [9]), seed=2).load_state_dict(old.state_dict())


@pytest.mark.parametrize(
    ("batch", "micro", "ranks", "named"),
    [
        (100, 8, 1, "batch_tokens=100 is not a multiple of seq_len=8: 96 or 104"),
        (96, 12, 1, "micro_tokens=12 is not a multiple of seq_len=8: 8 or 16"),
        (4, 8, 1, "batch_tokens=4 is not a multiple"),
        (96, 40, 2, "96 .* micro_tokens=40 for 2 rank.*: batch_tokens=80 or 160 would, or micro_tokens=8 or 16"),
        (96, 8, 5, "12 sequence.* do not divide among 5 ranks"),
    ],
)  # fmt: skip
def test_impossible_batches(batch, micro, ranks, named):
    """Catches a batch that is rounded silently; the message says what would work."""
    with pytest.raises(ValueError, match=named):
        Loader(two([9], [9]), seed=0, world_size=ranks).set_stage(
            seq_len=8, batch_tokens=batch, micro_tokens=micro, mix=MIX
        )


def test_documents_without_inputs_are_passed_over():
    """Catches endless loops on documents of one token, which have no inputs at all."""
    run = Ranks(two([1, 1, 5], [1, 9]), 0, 1)
    run.set_stage((4, 4), 1)
    assert sum(len(w) for w in in_order(run.step())) == 16


def _rank_process(rank, barrier, path, cache, results):
    """One rank: tokenises or waits, and reports a digest of each of its micro-batches."""
    config = DataConfig(sources={"main": SourceConfig(path=path)}, cache_dir=cache)
    loader = Loader(open_sources(config, rank_zero=rank == 0, barrier=barrier.wait), seed=3, rank=rank, world_size=2)
    loader.set_stage(seq_len=64, batch_tokens=512, micro_tokens=128, mix={"main": 1.0})
    results.put([_digest(b) for _ in range(4) for b in loader.next_step()])


def _digest(batch):
    parts = (batch.tokens, batch.labels, batch.positions, batch.cu_seqlens)
    return hashlib.sha256(b"".join(p.numpy().tobytes() for p in parts)).hexdigest()


def test_two_processes_see_what_one_sees(write_jsonl, tmp_path):
    """Catches an order that depends on the process (hash seeds), and a second rank that does not wait for the
    tokens."""
    path = str(write_jsonl("d.jsonl", [{"text": f"document {i} " * (i + 1)} for i in range(40)]))
    context = multiprocessing.get_context("spawn")
    barrier, results = context.Barrier(2), context.Queue()
    args = (barrier, path, str(tmp_path / "shared"), results)
    other = context.Process(target=_rank_process, args=(1, *args))
    other.start()
    _rank_process(0, barrier, path, str(tmp_path / "shared"), own := queue.SimpleQueue())
    first, second = own.get(), results.get(timeout=120)
    other.join()
    config = DataConfig(sources={"main": SourceConfig(path=path)}, cache_dir=str(tmp_path / "own"))
    loader = Loader(open_sources(config), seed=3)
    loader.set_stage(seq_len=64, batch_tokens=512, micro_tokens=128, mix={"main": 1.0})
    alone = [_digest(b) for _ in range(4) for b in loader.next_step()]
    assert len(set(alone)) == 16
    assert first == alone[0::2] and second == alone[1::2]
