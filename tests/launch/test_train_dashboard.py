"""What a real run shows: its offline wandb files, decoded and listed by group."""

from __future__ import annotations

from collections import defaultdict

import pytest
from launch_runs import END, SWITCH
from wandb_files import history, kinds_of, summary_of

from train.record.metrics import read_metrics


@pytest.fixture(scope="module")
def groups(whole) -> dict[str, dict[str, list]]:
    """group -> rest of the name -> [(tokens, value)]; numbers alone."""
    found = defaultdict(lambda: defaultdict(list))
    for row in history(whole):
        for name, value in row.items():
            group, slash, rest = name.partition("/")
            if slash and isinstance(value, (int, float)) and "/size" not in name:
                found[group][rest].append((row["tokens"], value))
    return found


def without_media(names) -> set[str]:
    media = ("/width", "/height", "/ncols", "/nrows")
    return {name for name in names if not name.endswith(media)}


def test_series_by_group(groups):
    """Catches a group or a series that a run does not reach, and columns of ours that go to wandb as they are."""
    assert set(groups) == {"train", "eval", "perf", "data", "schedule", "routing", "position_loss"}
    losses = {"loss", "trailing_loss", "perplexity"}
    assert set(groups["train"]) == losses | {"learning_rate", "gradient_norm", "skipped_steps"}
    assert set(groups["eval"]) == losses | {"trailing_se"}
    # mfu and memory are a GPU's
    speed = {"tokens_per_second", "tflops", "step_seconds", "eta_hours", "evaluation_seconds"}
    speed |= {"save_wait_seconds", "save_write_seconds"}
    assert set(groups["perf"]) - {"idle_share"} == speed
    assert set(groups["data"]) == {"supervised_tokens", "supervised_share", "epochs/main"}
    assert set(groups["schedule"]) == {"stage", "context_length", "batch_tokens", "attended_share"}
    layers = {f"{what}/layer_{n:02}" for what in ("mass_recall", "distance_blocks", "load_entropy") for n in (0, 1)}
    assert layers | {"mass_recall", "mass_recall_best", "mass_recall_random"} <= set(groups["routing"])
    buckets = without_media(groups["position_loss"])
    assert {name for name in buckets if name < "257"} >= {"001-016", "241-256", "001-032", "225-256"}
    assert len(buckets) == 16 + 16, "of each of two lengths"


def test_the_values_are_those_of_the_record(groups, whole):
    """Catches values at other tokens than they belong to, and a schedule that is no step at the switch."""
    train = [record for record in read_metrics(whole / "metrics.jsonl") if record["kind"] == "train"]
    assert groups["train"]["loss"] == [(record["tokens"], record["loss"]) for record in train]
    assert groups["data"]["supervised_tokens"] == [(r["tokens"], r["supervised_tokens"]) for r in train]
    stages = dict(groups["schedule"]["stage"])
    assert {tokens: stage for tokens, stage in stages.items() if tokens in (0, SWITCH - 512, SWITCH, END)} == {
        0: 0,
        SWITCH - 512: 0,
        SWITCH: 1,
        END: 1,
    }
    shares = [share for _, share in groups["schedule"]["attended_share"]]
    assert shares[0] < 0.4 and shares[-1] == 1.0
    epochs = [epoch for _, epoch in groups["data"]["epochs/main"]]
    assert epochs == sorted(epochs) and 0 < epochs[0] < epochs[-1]


def test_what_is_no_series_is_configuration_or_summary(whole):
    """Catches a run that is not found among others, and one-point charts."""
    kinds = kinds_of(whole)
    run = kinds["run"][0]
    assert (run.display_name, run.run_group, run.job_type) == ("quickstart", "quickstart", "train")
    assert list(run.tags) == ["tiny", "main", "512"]
    assert run.notes.splitlines() == [
        "sparse: moba 16x3, context 256, 4.1K tokens",
        "full: full, context 512, 3.07K tokens",
    ]
    assert any("convention" in item.value_json for record in kinds["config"] for item in record.update)
    summary = summary_of(kinds)
    assert summary["eval/documents"] == 3 and set(summary["train/loss"]) == {"min", "last"}
