"""Series and panels: each column under its group and standard name, and no panel without its series."""

from __future__ import annotations

import math
import re
from types import SimpleNamespace

import numpy as np
import pytest
import torch

from train.record import series
from train.record.dashboard import Dashboard, Sample
from train.record.position_loss import PositionLoss

STAGES = [
    SimpleNamespace(start=0, end=4000, batch_tokens=1000, mix={"books": 0.75, "code": 0.25}),
    SimpleNamespace(start=4000, end=8000, batch_tokens=4000, mix={"books": 1.0}),
]
STAGE = {"stage": "sparse", "stage_index": 0, "seq_len": 256, "attention": "moba 16x3"}
TRAIN = {
    "kind": "train", "tokens": 2000, "step": 2, **STAGE, "loss": 2.0, "supervised_tokens": 1500, "trailing_loss": None,
    "grad_norm": 1.5, "lr": 1e-3, "skipped_steps": 0, "tokens_per_second": 500.0, "tflops": 0.1, "mfu": 0.25,
    "mfu_dense_equivalent": 0.5, "attended_share": 0.3, "seconds": 4.0, "peak_memory_gib": 2.0, "eta_seconds": 1800.0,
    "wall_seconds": 5.0, "new_number": 7,
}  # fmt: skip
EVAL = {
    "kind": "eval", "tokens": 2000, **STAGE, "eval_seq_len": 256, "loss": 1.0, "trailing_loss": 0.5, "trailing_se": 0.1,
    "trailing_freedom": 3.0, "documents": 4, "route/captured": 0.8, "route/oracle_share": 0.9,
    "route/random_share": 0.1, "route/distance": 3.0, "route/load_entropy": 0.7, "recall_all": 0.5,
    "trailing_local": 0.75, "seconds": 3.0,
}  # fmt: skip


class Recorder:
    """A sink that remembers, also what it was not told by name."""

    def __init__(self):
        self.series, self.calls = {}, []

    def scalars(self, values, tokens):
        for name, value in values.items():
            self.series.setdefault(name, []).append((tokens, value))

    def __getattr__(self, name):
        return lambda *args, **options: self.calls.append((name, *args))


@pytest.fixture
def curve():
    losses = PositionLoss(256, "cpu")
    positions = torch.arange(256)
    losses.add(2 - positions / 256, positions, torch.zeros(256, dtype=torch.int64), torch.tensor([0, 256]))
    return losses.curve()


@pytest.fixture
def shown(curve):
    recorder = Recorder()
    dashboard = Dashboard([recorder], STAGES, source_tokens={"books": 3000, "code": 1000})
    dashboard.record({"kind": "stage", "tokens": 0, **STAGE, "end": 4000, "batch_tokens": 1000})
    dashboard.record(TRAIN)
    layers = {3: {"captured": 0.9, "distance": 2.0, "load_entropy": math.nan}, 4: {"load_entropy": 0.5}}
    dashboard.record(EVAL, routing=layers, samples=[Sample("d", "a", "b", "c")])
    dashboard.curve("eval", curve, 2000)
    dashboard.curve("train/sparse", curve, 2000)
    dashboard.image("heat_map", "x.png", 2000, "caption")
    return recorder


def test_every_column_has_its_group_name_and_unit(shown):
    """Catches a column that is lost, stands in two groups, keeps a name of ours or comes in another unit."""
    found = {name: points[-1][1] for name, points in shown.series.items() if not name.startswith("position_loss/")}
    assert found == {
        "train/loss": 2.0,
        "train/perplexity": math.exp(2.0),
        "train/gradient_norm": 1.5,
        "train/learning_rate": 1e-3,
        "train/skipped_steps": 0,
        "train/new_number": 7,
        "perf/tokens_per_second": 500.0,
        "perf/tflops": 0.1,
        "perf/mfu": 0.25,
        "perf/mfu_dense_equivalent": 0.5,
        "perf/peak_memory_gib": 2.0,
        "perf/eta_hours": 0.5,
        "perf/step_seconds": 2.0,
        "perf/evaluation_seconds": 3.0,
        "data/supervised_tokens": 1500,
        "data/supervised_share": 0.75,
        "data/share/books": 0.75,
        "data/share/code": 0.25,
        "data/epochs/books": 0.5,
        "data/epochs/code": 0.5,
        "eval/loss": 1.0,
        "eval/perplexity": math.exp(1.0),
        "eval/trailing_loss": 0.5,
        "eval/trailing_se": 0.1,
        "eval/recall_all": 0.5,
        "eval/trailing_local": 0.75,
        "routing/mass_recall": 0.8,
        "routing/mass_recall_best": 0.9,
        "routing/mass_recall_random": 0.1,
        "routing/distance_blocks": 3.0,
        "routing/load_entropy": 0.7,
        "routing/mass_recall/layer_03": 0.9,
        "routing/distance_blocks/layer_03": 2.0,
        "routing/load_entropy/layer_04": 0.5,
        "schedule/stage": 0,
        "schedule/context_length": 256,
        "schedule/batch_tokens": 1000,
        "schedule/attended_share": 0.3,
    }


def test_a_bucket_is_a_series_and_constants_are_none(shown, curve):
    """Catches buckets at the wrong positions or values, names that change from run to run, and charts of one level."""
    buckets = {name: points for name, points in shown.series.items() if name.startswith("position_loss/")}
    assert len(buckets) == 16 and buckets["position_loss/241-256"] == [(2000, pytest.approx(2 - 248.5 / 256 + 1 / 256))]
    assert ("constants", {"eval/documents": 4, "eval/context_length": 256}) in shown.calls
    names = [call[0] for call in shown.calls]
    assert names.count("curve") == 2 and names.count("image") == names.count("samples") == 1


def test_epochs_follow_the_mixture_of_each_stage():
    """Catches a later stage's mixture that is applied to the tokens before it."""
    sizes = {"books": 1000, "code": 1000, "unread": 1000}
    found = series.epochs(6000, STAGES, sizes)
    assert found == {"data/epochs/books": 3 + 2, "data/epochs/code": 1}


def test_many_buckets_are_joined_by_their_tokens(curve):
    """Catches 512 charts for a context of a million, and a joined mean that forgets how many tokens are behind it."""
    counts = np.arange(1, 513)
    long = SimpleNamespace(
        max_length=512, mean=np.arange(512.0), count=counts, edges=np.arange(513)
    )  # fmt: skip
    found = series.buckets(long)
    assert len(found) == 16 and next(iter(found)) == "position_loss/001-032"
    assert found["position_loss/001-032"] == pytest.approx(np.average(np.arange(32), weights=counts[:32]))


def test_every_panel_shows_something(shown):
    """Catches a panel of a series that no run has, and a group without a panel."""
    skipped = {"train/trailing_loss"}  # null in this line
    names = set(shown.series) | skipped | {call[1] for call in shown.calls if call[0] in ("image", "curve")}
    names |= {"position_loss/by_stage"}
    for panels in series.PANELS.values():
        for panel in panels:
            wanted = {*panel.series, *panel.media, *filter(None, [panel.table])}
            assert wanted <= names, panel
            assert wanted or any(re.search(panel.regex, name) for name in names), panel
    assert {name.partition("/")[0] for name in names} == set(series.PANELS)


def test_skipped_steps_and_a_bad_end_alert(curve):
    """Catches silence about skipped steps, an alert each interval about old ones, and none at the end of a run."""
    recorder = Recorder()
    dashboard = Dashboard([recorder], STAGES, skipped_steps=2)
    for skipped in (2, 3, 3, 5):
        dashboard.record({**TRAIN, "skipped_steps": skipped})
    dashboard.failed("5 steps in a row")
    alerts = [call[1:] for call in recorder.calls if call[0] == "alert"]
    assert [title for title, _ in alerts] == ["Skipped steps"] * 2 + ["Run ended: loss not finite"]
    assert (
        alerts[0][1].startswith("1 step") and alerts[1][1].startswith("2 step") and alerts[2][1] == "5 steps in a row"
    )
