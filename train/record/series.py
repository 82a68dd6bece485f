"""Names of a run's series as dashboards show them, and their panels. No wandb, no torch.

metrics.jsonl keeps its columns; here each gets a group (`train/`, `perf/`, ...), a standard name and a unit. All series
are over tokens. Constants of a run are no series: `constants` gives them for a configuration or a summary.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from train.record.position_loss import PositionCurve

AXIS = "tokens"
MAX_BUCKETS = 16

_SCHEDULE = {
    "stage_index": "schedule/stage",
    "seq_len": "schedule/context_length",
    "batch_tokens": "schedule/batch_tokens",
}
# Columns of each kind of line. A column that is not here is a series of its kind's group; None: not a series.
_NAMES: dict[str, dict[str, str | None]] = {
    "train": {
        "lr": "train/learning_rate",
        "grad_norm": "train/gradient_norm",
        "tokens_per_second": "perf/tokens_per_second",
        "tflops": "perf/tflops",
        "mfu": "perf/mfu",
        "mfu_dense_equivalent": "perf/mfu_dense_equivalent",
        "idle_share": "perf/idle_share",
        "peak_memory_gib": "perf/peak_memory_gib",
        "save_wait_seconds": "perf/save_wait_seconds",
        "save_write_seconds": "perf/save_write_seconds",
        "supervised_tokens": "data/supervised_tokens",
        "attended_share": "schedule/attended_share",
        "eta_seconds": None,
        "seconds": None,
        "step": None,
    },
    "eval": {"seconds": "perf/evaluation_seconds", "documents": None, "eval_seq_len": None, "trailing_freedom": None},
    "stage": {"end": None},
    "run": {},
    "rollback": {"loss": "train/spike_loss", "grad_norm": "train/spike_gradient_norm", "in_a_row": None},
}
_ROUTING = {
    "captured": "mass_recall",
    "oracle_share": "mass_recall_best",
    "random_share": "mass_recall_random",
    "distance": "distance_blocks",
}
LAYER_STATS = ("captured", "distance", "load_entropy")
# How the runs table of wandb sums up a series; others show their last value.
SUMMARIES = {
    "train/loss": "min,last",
    "train/trailing_loss": "last",
    "eval/loss": "min,last",
    "eval/trailing_loss": "min,last",
    "perf/tokens_per_second": "mean,last",
    "perf/mfu": "mean,last",
    "perf/peak_memory_gib": "max",
}


def scalars(record: Mapping[str, Any], stages: Sequence[Any] = ()) -> dict[str, float]:
    """The series that a line of metrics.jsonl adds to, by name. stages: train.schedule.Stage."""
    kind, names = record["kind"], _SCHEDULE | _NAMES[record["kind"]]
    found: dict[str, float] = {}
    for key, value in record.items():
        if isinstance(value, bool) or not isinstance(value, (int, float)) or key in (AXIS, "wall_seconds"):
            continue
        group, _, rest = key.rpartition("/")
        name = f"routing/{_ROUTING.get(rest, rest)}" if group == "route" else names.get(key, f"{kind}/{key}")
        if name is not None and kind != "run":
            found[name] = value
    if kind in ("train", "eval") and found.get(f"{kind}/loss", math.inf) < 100:
        found[f"{kind}/perplexity"] = math.exp(found[f"{kind}/loss"])
    if kind == "train":
        found |= _derived(record, stages)
    return found


def _derived(record: Mapping[str, Any], stages: Sequence[Any]) -> dict[str, float]:
    """Series computed from several columns of a train line."""
    found, rate = {}, record.get("tokens_per_second")
    if record.get("eta_seconds") is not None:
        found["perf/eta_hours"] = record["eta_seconds"] / 3600
    if not rate:
        return found
    if record.get("seconds") and record.get("supervised_tokens") is not None:
        found["data/supervised_share"] = record["supervised_tokens"] / (rate * record["seconds"])
    if stages:
        stage = stages[record["stage_index"]]
        found |= {"perf/step_seconds": stage.batch_tokens / rate, "schedule/batch_tokens": stage.batch_tokens}
        if len(stage.mix) > 1:
            found |= {f"data/share/{name}": share for name, share in stage.mix.items()}
    return found


def epochs(tokens: int, stages: Sequence[Any], source_tokens: Mapping[str, int]) -> dict[str, float]:
    """`data/epochs/<source>` after `tokens` tokens, as the plan counts them: by the stages' mixtures and the sources'
    sizes. (Counting documents drawn would overstate it: several long ones are partly used at a time.)"""
    read = {
        name: sum(max(min(tokens, stage.end) - stage.start, 0) * stage.mix.get(name, 0.0) for stage in stages)
        for name in source_tokens
    }
    return {f"data/epochs/{name}": read[name] / max(source_tokens[name], 1) for name in read if read[name]}


def constants(record: Mapping[str, Any]) -> dict[str, Any]:
    """Constants of a line, whose charts would be flat: the machine and conventions, the size of an evaluation."""
    if record["kind"] == "run":
        return {f"machine/{key}": value for key, value in record.items() if key not in ("kind", AXIS, "wall_seconds")}
    if record["kind"] == "eval":
        names = {"documents": "eval/documents", "eval_seq_len": "eval/context_length"}
        return {name: record[key] for key, name in names.items() if key in record}
    return {}


def buckets(curve: PositionCurve) -> dict[str, float]:
    """One series per bucket of context positions, `position_loss/<first>-<last>`: mean per-token loss in nats.

    More than MAX_BUCKETS buckets are joined. The names depend on the length alone, so that runs overlay.
    """
    groups = np.array_split(np.arange(len(curve.mean)), min(MAX_BUCKETS, len(curve.mean)))
    width, found = len(str(curve.max_length)), {}
    for group in groups:
        count = curve.count[group]
        if count.sum():
            first, last = curve.edges[group[0]] + 1, curve.edges[group[-1] + 1]
            mean = np.where(count > 0, curve.mean[group] * count, 0.0).sum() / count.sum()
            found[f"position_loss/{first:0{width}}-{last:0{width}}"] = float(mean)
    return found


def routing_by_layer(layers: Mapping[int, Mapping[str, float]]) -> dict[str, float]:
    """`routing/<what>/layer_<number>` of LAYER_STATS, from each routed layer's own numbers."""
    return {
        f"routing/{_ROUTING.get(name, name)}/layer_{number:02}": stats[name]
        for number, stats in layers.items()
        for name in LAYER_STATS
        if name in stats and math.isfinite(stats[name])
    }


@dataclass(frozen=True)
class Panel:
    """A chart of a dashboard."""

    title: str
    series: tuple[str, ...] = ()
    """Names of its series; or:"""
    regex: str | None = None
    """All series whose name matches."""
    media: tuple[str, ...] = ()
    """Pictures, instead of series; or:"""
    table: str | None = None
    """A curve over context positions."""
    y: str | None = None
    """Label of the vertical axis."""
    log_y: bool = False


_NATS = "nats per token"
PANELS: dict[str, tuple[Panel, ...]] = {
    "train": (
        Panel("Per-token loss", ("train/loss", "train/trailing_loss"), y=_NATS),
        Panel("Perplexity", ("train/perplexity",), log_y=True),
        Panel("Learning rate", ("train/learning_rate",)),
        Panel("Gradient norm before clipping", ("train/gradient_norm",), log_y=True),
        Panel("Skipped steps", ("train/skipped_steps",)),
    ),
    "eval": (
        Panel("Held-out per-token loss", ("eval/loss", "eval/trailing_loss"), y=_NATS),
        Panel("Held-out perplexity", ("eval/perplexity",), log_y=True),
        Panel("Held-out trailing loss under other gates", regex=r"^eval/trailing_(?!loss$|se$)", y=_NATS),
        Panel("Right answers to the recall task", regex=r"^eval/recall_"),
    ),
    "position_loss": (
        Panel("Held-out per-token loss by context position", regex=r"^position_loss/[0-9]+-[0-9]+$", y=_NATS),
        Panel("Held-out per-token loss by context position, latest evaluation", table="position_loss/curve_eval"),
        Panel(
            "Loss by context position over training, and by stage",
            media=("position_loss/heat_map", "position_loss/by_stage"),
        ),
    ),
    "routing": (
        Panel(
            "Recall of attention mass: routed, best and random blocks",
            ("routing/mass_recall", "routing/mass_recall_best", "routing/mass_recall_random"),
        ),
        Panel("Recall of attention mass by layer", regex=r"^routing/mass_recall/layer_"),
        Panel("Distance to the routed blocks by layer", regex=r"^routing/distance_blocks/layer_", y="blocks"),
        Panel("Entropy of the load by layer (1: even)", regex=r"^routing/load_entropy/layer_"),
    ),
    "perf": (
        Panel("Tokens per second, whole run", ("perf/tokens_per_second",)),
        Panel("MFU of the attended pairs", ("perf/mfu",), y="share of the dense bf16 peak"),
        Panel("MFU as if attention were full", ("perf/mfu_dense_equivalent",), y="share of the dense bf16 peak"),
        Panel("Seconds an optimizer step", ("perf/step_seconds",)),
        Panel("Peak memory of rank 0", ("perf/peak_memory_gib",), y="GiB"),
        Panel("Time left", ("perf/eta_hours",), y="hours"),
        Panel("Seconds an evaluation", ("perf/evaluation_seconds",)),
    ),
    "data": (
        Panel("Epochs by source", regex=r"^data/epochs/"),
        Panel("Mixture: share of tokens by source", regex=r"^data/share/"),
        Panel("Supervised tokens of a log interval", ("data/supervised_tokens",)),
        Panel("Supervised share of the tokens", ("data/supervised_share",)),
    ),
    "schedule": (
        Panel("Stage", ("schedule/stage",)),
        Panel("Context length", ("schedule/context_length",), y="tokens"),
        Panel("Tokens per step", ("schedule/batch_tokens",)),
        Panel("Attended share of the causal pairs", ("schedule/attended_share",)),
    ),
}
