"""Routing scalars on selections whose values are known by hand, and on a random one counted in plain Python."""

import math
from collections import Counter

import pytest
import torch

from moba.routing import route
from moba.stats import routing_stats


def test_counts_by_hand():
    """Catches own blocks or padding counted as picks. Blocks of 2; the last two queries pick 0 and 1 of blocks 0 to
    2."""
    none, own = -1, [0, 0, 1, 1, 2, 2, 3, 3]
    picks = [(none, none), (none, none), (none, 0), (none, 0), (0, 1), (0, 1), (0, 1), (0, 1)]
    selection = torch.tensor([[(*p, o) for p, o in zip(picks, own)]], dtype=torch.int32)
    stats = {name: value.item() for name, value in routing_stats(selection, block_size=2).items()}
    assert stats["history_blocks"] == pytest.approx(10 / 8)
    assert stats["first_share"] == pytest.approx(6 / 10)
    assert stats["previous_share"] == pytest.approx(4 / 10)  # block 0 from 1, block 1 from 2
    assert stats["distance"] == pytest.approx((2 * 1 + 2 * (2 + 1) + 2 * (3 + 2)) / 10)
    assert stats["entropy"] == pytest.approx(-0.6 * math.log(0.6) - 0.4 * math.log(0.4))


def test_random_selection_counted_in_python():
    """Catches errors that only several heads and documents show."""
    torch.manual_seed(0)
    q, k = torch.randn(90, 4, 8), torch.randn(90, 2, 8)
    cu_seqlens = torch.tensor([0, 50, 50, 90], dtype=torch.int32)
    selection = route(q, k, block_size=8, top_k=3, cu_seqlens=cu_seqlens)
    stats = routing_stats(selection, block_size=8)
    entropies, distances = [], []
    for head in selection.tolist():
        picks = [(b, own) for *history, own in head for b in history if b >= 0]
        counts = Counter(b for b, _ in picks)
        entropies.append(-sum(c / len(picks) * math.log(c / len(picks)) for c in counts.values()))
        distances += [own - b for b, own in picks]
    assert len(distances) > 100
    assert stats["entropy"].item() == pytest.approx(sum(entropies) / 4, rel=1e-5)
    assert stats["distance"].item() == pytest.approx(sum(distances) / len(distances), rel=1e-5)
    assert stats["previous_share"].item() == pytest.approx(distances.count(1) / len(distances), rel=1e-5)
    assert stats["history_blocks"].item() == pytest.approx(len(distances) / (4 * 90), rel=1e-5)


def test_no_history_is_nan_and_not_an_error():
    """Catches a crash where no query can pick: documents within a block, or top_k=1."""
    q = torch.randn(6, 2, 8)
    for top_k in (1, 3):
        stats = routing_stats(route(q, q, block_size=8, top_k=top_k), block_size=8)
        assert stats["history_blocks"] == 0
        assert all(stats[name].isnan() for name in ("previous_share", "first_share", "distance", "entropy"))
