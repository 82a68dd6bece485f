"""train/spikes.py against numpy: which steps are spikes, whatever came before."""

import numpy as np
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from train.spikes import Spikes

CPU = torch.device("cpu")


def walk(spikes: Spikes, steps) -> list[bool]:
    """Which of these (loss, norm) are spikes; the others are taken into account."""
    found = []
    for step in steps:
        pair = [torch.tensor(value, dtype=torch.float32) for value in step]
        found.append(bool(spikes.is_spike(*pair)))
        if not found[-1] and np.isfinite(step).all():
            spikes.add(*pair)
    return found


def by_numpy(steps, deviations: float, window: int) -> list[bool]:
    good, found = [], []
    for step in np.float64(np.float32(steps)):
        recent = np.array(good[-window:])
        judged = len(recent) >= max(2, window // 2)
        found.append(judged and bool((step > recent.mean(0) + deviations * recent.std(0, ddof=1) * (1 + 1e-12)).any()))
        if not found[-1] and np.isfinite(step).all():
            good.append(step)
    return found


def noisy(seed: int, length: int, jumps) -> np.ndarray:
    steps = 3 + np.random.default_rng(seed).normal(0, 0.1, (length, 2))
    for at, column in jumps:
        steps[at % length, column] += 5
    return steps


@settings(deadline=None, max_examples=60)
@given(
    seed=st.integers(0, 10**6),
    window=st.integers(2, 20),
    jumps=st.lists(st.tuples(st.integers(0, 59), st.integers(0, 1)), max_size=5),
)
def test_spikes_are_those_of_the_definition(seed, window, jumps):
    """Catches a window that is off by one, spikes that raise the level, a population's deviation, and a test that sees
    one column only."""
    steps = noisy(seed, 60, jumps)
    assert walk(Spikes(4.0, window, CPU), steps) == by_numpy(steps, 4.0, window)


def test_only_what_rises_is_a_spike_and_only_after_half_a_window():
    """Catches a drop taken for a spike, a judgement on too few steps, and numbers that are not finite."""
    assert not any(walk(Spikes(6.0, 16, CPU), noisy(0, 40, []) - 50 * (np.arange(40) == 20)[:, None]))
    for at, is_spike in ((7, False), (8, True)):
        assert walk(Spikes(6.0, 16, CPU), noisy(0, 9, [(at, 0)]))[at] == is_spike
    spikes = Spikes(6.0, 4, CPU)
    walk(spikes, noisy(1, 10, []))
    assert walk(spikes, [(np.nan, 3.0), (3.0, np.nan)]) == [False, False]


def test_state_goes_on_exactly_and_into_another_window():
    """Catches sums that are rounded on the way, and a window that cannot change."""
    steps = noisy(3, 40, [(30, 0), (31, 1)])
    first = Spikes(4.0, 8, CPU)
    found = walk(first, steps[:25])
    first.total = 2
    state = first.state_dict()
    again = Spikes(4.0, 8, CPU)
    again.load_state_dict(state)
    assert again.total == 2 and torch.equal(again.state_dict()["recent"], state["recent"])
    assert found + walk(again, steps[25:]) == by_numpy(steps, 4.0, 8)
    for window in (4, 12):
        other = Spikes(4.0, window, CPU)
        other.load_state_dict(state)
        kept = other.state_dict()["recent"]
        common = min(window, 8)
        assert len(kept) == window and torch.equal(kept[-common:], state["recent"][-common:])
        assert kept[:-common].isnan().all()
    again.forget()
    assert walk(again, [(1e9, 1e9), (2.0, 2.0)]) == [False, False]
