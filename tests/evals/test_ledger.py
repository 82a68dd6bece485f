"""evals/ledger.py: the time that is left."""

from types import SimpleNamespace

import pytest

from evals import ledger
from evals.ledger import Countdown


def test_each_kind_of_work_has_its_own_rate(monkeypatch):
    """Catches an estimate that takes slow and fast measurements for alike (two slow ones of 100 s, then ten of 2 s),
    that counts what was known before as work of no time, and one for a kind of which none is done yet."""
    now, said = [0.0], []
    monkeypatch.setattr(ledger.time, "monotonic", lambda: now[0])
    countdown = Countdown(SimpleNamespace(say=said.append), "toy", {"slow": 3, "fast": 20, "last": 1}, unit="things")
    countdown.skip(1, "slow")
    for seconds, kind in [(100, "slow")] * 2 + [(2, "fast")] * 10:
        now[0] += seconds
        countdown.step(1, 1, kind)
    # After the first slow one: 1 slow, 20 fast and 1 last at its rate, 100 s.
    assert said[0] == "toy: 8%, 1 things so far, about 36:40 left"
    # After eight fast ones, said every 15 s: 12 fast at 2 s, and the last at the mean of ten.
    assert said[-1] == "toy: 46%, 10 things so far, about 0:46 left"
    assert len(said) == 3 and pytest.approx(12 * 2 + 216 / 10) == 45.6
