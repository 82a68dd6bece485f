"""train/record/position_loss.py against loops over documents, and its standard errors against what really varies."""

import math

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from data.packing import IGNORED
from train.record.position_loss import PositionCurve, PositionLoss, bucket_edges, default_num_buckets


def make_pack(windows, rng, share_ignored=0.2):
    """One packed batch `(losses, positions, labels, cu_seqlens)` of windows of these lengths, with random losses and
    labels."""
    total = sum(windows)
    losses = torch.tensor(rng.gamma(2.0, size=total), dtype=torch.float32)
    positions = torch.cat([torch.arange(n) for n in windows]) if windows else torch.zeros(0, dtype=torch.long)
    labels = torch.tensor(rng.integers(0, 50, total))
    labels[torch.tensor(rng.random(total) < share_ignored)] = IGNORED
    cu_seqlens = torch.tensor([0, *np.cumsum(windows)], dtype=torch.int32)
    return losses, positions, labels, cu_seqlens


def loop_over_documents(packs, max_length, num_buckets):
    """The definition, one document and one token at a time: by_position {p: losses}, and per bucket the list of each
    document's losses there; trailing only for windows of full length."""
    by_position = {}
    buckets = [[] for _ in range(num_buckets)]
    trailing = []
    for losses, _, labels, cu_seqlens in packs:
        for start, end in zip(cu_seqlens.tolist(), cu_seqlens.tolist()[1:]):
            mine = [[] for _ in range(num_buckets)]
            for p in range(1, end - start + 1):  # visible tokens
                token = start + p - 1
                if labels[token] != IGNORED:
                    by_position.setdefault(p, []).append(float(losses[token]))
                    mine[((p - 1) * num_buckets) // max_length].append(float(losses[token]))
            for bucket, values in zip(buckets, mine):
                bucket += [values] if values else []
            if end - start == max_length and mine[-1]:
                trailing.append(mine[-1])
    return by_position, buckets, trailing


def clustered(documents):
    """Mean, standard error, tokens, clusters of a list of documents' losses, by the textbook formula."""
    count, n = sum(map(len, documents)), len(documents)
    if n == 0:
        return math.nan, math.nan, 0, 0
    mean = sum(map(sum, documents)) / count
    squares = sum((sum(d) - mean * len(d)) ** 2 for d in documents)
    return mean, math.sqrt(n / (n - 1) * squares) / count if n > 1 else math.nan, count, n


packs_strategy = st.integers(3, 40).flatmap(
    lambda length: st.tuples(
        st.just(length),
        st.integers(1, min(length, 6)),
        # A full window (a cut one) appears often; zero is an empty document.
        st.lists(st.lists(st.one_of(st.integers(0, length), st.just(length)), max_size=6), min_size=1, max_size=4),
        st.integers(0, 2**32 - 1),
    )
)


@settings(deadline=None, max_examples=40)
@given(packs_strategy)
def test_random_packs_equal_a_loop_over_documents(case):
    """Catches positions of the pack instead of the document, wrong bucket edges, empty documents that shift the rest,
    ignored tokens that count, short documents in the trailing loss, and a wrong standard error."""
    length, num_buckets, windows, seed = case
    rng = np.random.default_rng(seed)
    packs = [make_pack(w, rng) for w in windows]
    tracker = PositionLoss(length, "cpu", num_buckets)
    for pack in packs:
        tracker.add(*pack)
    curve = tracker.curve()
    by_position, buckets, trailing = loop_over_documents(packs, length, num_buckets)

    for p in range(1, length + 1):
        values = by_position.get(p, [])
        assert curve.position_count[p - 1] == len(values)
        assert values == [] or curve.position_mean[p - 1] == pytest.approx(np.mean(values), rel=1e-12)
    for b, documents in enumerate([*buckets, trailing]):
        actual = curve.trailing if b == num_buckets else (curve.mean[b], curve.se[b], curve.count[b], curve.clusters[b])
        # The error comes from a difference of sums of squares: exact to about 1e-8 of the mean.
        assert actual == pytest.approx(clustered(documents), rel=1e-9, abs=1e-6, nan_ok=True)


def test_trailing_counts_only_what_reaches_the_length():
    """Catches a trailing loss that takes in documents ending inside the last bucket (they are easier or harder)."""
    tracker = PositionLoss(32, "cpu")
    positions = torch.cat([torch.arange(32), torch.arange(31)])
    losses = torch.cat([torch.full((32,), 1.0), torch.full((31,), 5.0)])
    tracker.add(losses, positions, torch.zeros(63, dtype=torch.long), torch.tensor([0, 32, 63], dtype=torch.int32))
    curve = tracker.curve()
    assert curve.trailing[0] == 1.0 and curve.trailing.tokens == 2 and curve.trailing.clusters == 1
    assert math.isnan(curve.trailing.se)
    assert curve.mean[-1] == pytest.approx(7 / 3) and curve.clusters[-1] == 2


def test_buckets_are_2k_or_a_sixteenth():
    """Catches buckets that differ from the paper's 2K at 32K and above, and edges that disagree with the bucket
    rule."""
    assert [default_num_buckets(n) for n in (5, 64, 2048, 32768, 65536, 131072)] == [5, 16, 16, 16, 32, 64]
    assert bucket_edges(16, 32768)[:3].tolist() == [0, 2048, 4096]
    for num_buckets, length in ((16, 100), (7, 50), (19, 40000)):
        edges = bucket_edges(num_buckets, length)
        rule = (np.arange(length) * num_buckets) // length
        assert edges.tolist() == [*np.searchsorted(rule, np.arange(num_buckets)), length]


def test_standard_error_is_that_of_redrawn_documents():
    """Catches errors of independent tokens: over redrawn sets of documents the mean must vary as the error says."""
    rng = np.random.default_rng(0)
    length, num_documents = 64, 40

    def draw():
        lengths = rng.integers(20, length + 1, num_documents)
        levels = np.repeat(rng.normal(3.0, 0.8, num_documents), lengths)  # documents differ, tokens of one do not
        losses = torch.tensor(levels + rng.normal(0, 1.0, lengths.sum()), dtype=torch.float32)
        tracker = PositionLoss(length, "cpu", 4)
        cu_seqlens = torch.tensor([0, *np.cumsum(lengths)], dtype=torch.int32)
        positions = torch.cat([torch.arange(n) for n in lengths.tolist()])
        tracker.add(losses, positions, torch.zeros_like(positions), cu_seqlens)
        return tracker.curve()

    curves = [draw() for _ in range(400)]
    spread = np.std([c.mean for c in curves], axis=0)
    claimed = np.sqrt(np.mean([c.se**2 for c in curves], axis=0))
    np.testing.assert_allclose(claimed, spread, rtol=0.15)
    of_tokens = 1.3 / np.sqrt(np.mean([c.count for c in curves], axis=0))
    assert (spread > 2 * of_tokens).all()


def test_sum_over_ranks_equals_one_rank():
    """Catches moments that do not add (means of means), and an all-reduce that changes the running sums."""
    rng = np.random.default_rng(1)
    packs = [make_pack([16, 7, 16, 3], rng) for _ in range(6)]
    one, ranks = PositionLoss(16, "cpu", 4), [PositionLoss(16, "cpu", 4) for _ in range(2)]
    for i, pack in enumerate(packs):
        one.add(*pack)
        ranks[i % 2].add(*pack)
    before = ranks[0].state_dict()["state"]
    total = ranks[0].all_reduce(reduce=lambda state: state + ranks[1].state_dict()["state"]).curve()
    assert torch.equal(ranks[0].state_dict()["state"], before)
    expected = one.curve()
    for name in ("mean", "se", "count", "clusters", "trailing", "position_mean", "position_count"):
        np.testing.assert_allclose(getattr(total, name), getattr(expected, name), rtol=1e-12, err_msg=name)


def test_all_reduce_uses_the_process_group(tmp_path):
    """Catches a call that torch.distributed refuses (a group of one process: the sum is the state itself)."""
    tracker = PositionLoss(16, "cpu", 4)
    tracker.add(*make_pack([16, 7], np.random.default_rng(2)))
    store = torch.distributed.FileStore(str(tmp_path / "store"), 1)
    torch.distributed.init_process_group("gloo", store=store, rank=0, world_size=1)
    try:
        total = tracker.all_reduce()
    finally:
        torch.distributed.destroy_process_group()
    assert torch.equal(total.state_dict()["state"], tracker.state_dict()["state"])


def test_resume_is_exact(tmp_path):
    """Catches state that is lost or rounded when saved: continuing gives the same bits as never stopping."""
    rng = np.random.default_rng(3)
    packs = [make_pack([16, 9], rng) for _ in range(4)]
    whole, first, second = (PositionLoss(16, "cpu", 4) for _ in range(3))
    for pack in packs:
        whole.add(*pack)
    for pack in packs[:2]:
        first.add(*pack)
    torch.save(first.state_dict(), tmp_path / "state.pt")
    first.add(*packs[3])  # must not reach what was saved
    second.load_state_dict(torch.load(tmp_path / "state.pt", weights_only=True))
    for pack in packs[2:]:
        second.add(*pack)
    assert torch.equal(second.state_dict()["state"], whole.state_dict()["state"])
    second.reset()
    assert not second.state_dict()["state"].any()
    with pytest.raises(ValueError, match="max_length=16, expected 32"):
        PositionLoss(32, "cpu", 4).load_state_dict(whole.state_dict())


def test_npz_round_trip(tmp_path):
    """Catches a field that is lost, renamed or changed in the file."""
    tracker = PositionLoss(64, "cpu")
    tracker.add(*make_pack([64, 64, 20], np.random.default_rng(4)))
    curve = tracker.curve()
    curve.to_npz(tmp_path / "curve.npz")
    back = PositionCurve.from_npz(tmp_path / "curve.npz")
    assert back.max_length == 64 and back.trailing == curve.trailing
    for name in ("edges", "mean", "se", "count", "clusters", "position_mean", "position_count"):
        np.testing.assert_array_equal(getattr(back, name), getattr(curve, name))


def test_a_non_finite_loss_spoils_nothing():
    """Catches one bad step that turns the curve of a whole stage into NaN."""
    losses, positions, labels, cu_seqlens = make_pack([8, 8], np.random.default_rng(5), share_ignored=0.0)
    losses[3], losses[9] = math.nan, math.inf
    tracker = PositionLoss(8, "cpu", 4)
    tracker.add(losses, positions, labels, cu_seqlens)
    curve = tracker.curve()
    assert np.isfinite(curve.mean).all() and curve.count.sum() == 14
    assert tracker.curve().position_count.tolist() == [2, 1, 2, 1, 2, 2, 2, 2]


def test_long_sums_stay_exact():
    """Catches float32 sums: after 2000 additions at one position the mean is still exact to 1e-12."""
    tracker = PositionLoss(4, "cpu", 2)
    losses = torch.tensor([0.1, 1e4, 0.3, 0.4])
    pack = (losses, torch.arange(4), torch.zeros(4, dtype=torch.long), torch.tensor([0, 4], dtype=torch.int32))
    for _ in range(2000):
        tracker.add(*pack)
    np.testing.assert_allclose(tracker.curve().position_mean, losses.double().numpy(), rtol=1e-12)


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
def test_cuda_equals_cpu_and_never_synchronises():
    """Catches a wait for the device in the training step, and results that depend on the device."""
    pack = make_pack([1024, 300, 0, 1024], np.random.default_rng(6))
    cpu, cuda = PositionLoss(1024, "cpu"), PositionLoss(1024, "cuda")
    cpu.add(*pack)
    on_device = [x.cuda() for x in pack]
    torch.cuda.set_sync_debug_mode("error")
    try:
        cuda.add(*on_device)
    finally:
        torch.cuda.set_sync_debug_mode("default")
    np.testing.assert_allclose(cuda.curve().mean, cpu.curve().mean, rtol=1e-12)
    np.testing.assert_allclose(cuda.curve().trailing, cpu.curve().trailing, rtol=1e-9)
