"""Continues a pretrained model on long documents, once with MoBA and once with full attention, and measures the loss by
position on held-out documents before and after.

    python benchmarks/continual.py model=models/SmolLM2-135M data=shards/train validation=shards/validation \\
        to=results runs=runs/continual tokens=20M model.compile=true schedule.micro_tokens=64K optim.lr.peak=3e-4

Each arm is `launch/train.py +exp=continual_smollm2` with the same budget and documents: `moba` as the experiment stands
(MoBA, then full attention), `full` with full attention throughout. Arguments with a dot go to both as they are. `to`
gets results.json, continual.png and the runs' metrics. Everything measured is written down at once, and the same
command goes on where it was stopped.
"""

from __future__ import annotations

import json
import shutil
import statistics
import subprocess
import sys
import time
from collections.abc import Sequence
from itertools import pairwise
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))

import numpy as np  # noqa: E402
from matplotlib.axes import Axes  # noqa: E402
from matplotlib.figure import Figure  # noqa: E402

from benchmarks.pretrained import machine  # noqa: E402
from conf.build import ConfigError  # noqa: E402
from conf.numbers import format_count, format_length  # noqa: E402
from conf.schema import RopeConfig  # noqa: E402
from data.errors import DataError  # noqa: E402
from data.sources import open_validation  # noqa: E402
from data.validation import HeldOut, held_out_documents  # noqa: E402
from evals.context import Context, clusters_by  # noqa: E402
from evals.figures import length_axis, save, token_axis  # noqa: E402
from evals.loading import TrainedModel, load_trained, portable  # noqa: E402
from evals.position_loss import evaluate  # noqa: E402
from evals.results import commit  # noqa: E402
from evals.statistics import clustered_mean, half_width  # noqa: E402
from launch.cli import exits_on, key_values  # noqa: E402
from launch.config import load  # noqa: E402
from moba.kinds import Full  # noqa: E402
from train.checkpoint.checkpoint_dir import CheckpointError, checkpoints  # noqa: E402
from train.record.metrics import FILE_NAME, describe_plan, read_metrics  # noqa: E402
from train.schedule import build_schedule  # noqa: E402

KEYS = {
    "model": "Hugging Face directory of the model",
    "data": "training documents: token shards of launch/prepare_data.py with the model's tokenizer, or text",
    "validation": "held-out documents, likewise",
    "to": "folder of the results",
    "runs": "folder of the two runs and their checkpoints (default: runs/ in `to`)",
    "tokens": "budget of each run (default 20M)",
    "documents": "held-out documents at most (default 16)",
    "arms": "which runs, comma-separated (default moba,full)",
    "cluster": "regular expression; ids with the same match are one cluster of the errors (default: the whole id)",
    "commit": "commit of the code, where this is no git checkout",
}
COLORS = {"before": "0.45", "moba": "C0", "full": "C1"}
PLACES = ("model", "data", "validation", "to", "runs", "commit")  # not worth keeping: they differ by machine
ARMS = {"moba": [], "full": ["schedule.stages.sparse.attention.kind=full"]}


@exits_on(ConfigError, DataError, CheckpointError, subprocess.CalledProcessError)
def main() -> None:
    """The command; see the module's text."""
    arguments = sys.argv[1:]
    overrides = [text for text in arguments if "." in text.partition("=")[0]]
    values = key_values(
        [text for text in arguments if text not in overrides],
        KEYS,
        about=__doc__,
        required=["model", "data", "validation", "to"],
    )
    study = Study(values, overrides)
    study.measure_before()
    for arm in values.get("arms", "moba,full").split(","):
        study.train(arm)
        study.measure_after(arm)
    print(table(study.results))
    draw(study.results, study.to / "continual.png")


class Study:
    """The measurements so far, which `to`/results.json holds too, and what adds to them."""

    def __init__(self, values: dict[str, str], overrides: Sequence[str]):
        self.values, self.began = values, time.monotonic()
        self.to = Path(values["to"]).expanduser()
        self.runs = Path(values["runs"]).expanduser() if "runs" in values else self.to / "runs"
        self.to.mkdir(parents=True, exist_ok=True)
        self.overrides = [
            "+exp=continual_smollm2",
            "model=from_source",
            f"init.source={values['model']}",
            "data=files",
            f"data.path={values['data']}",
            f"data.validation.path={values['validation']}",
            f"schedule.tokens={values.get('tokens', '20M')}",
            f"eval.documents={values.get('documents', '16')}",
            "checkpoint.every_tokens=0",
            "logging.wandb=disabled",
            *overrides,
        ]
        config = load(self.overrides)
        self.stage = build_schedule(config).stages[0]
        self.documents: HeldOut = held_out_documents(
            open_validation(config.data, log=print), self.stage.seq_len, config.eval.documents
        )
        plan = portable(self.stage.attention)
        self.plans = {"moba": plan, "full": (Full(),) * len(plan)}
        path = self.to / "results.json"
        self.results = json.loads(path.read_text()) if path.exists() else {"runs": {}, "measured": []}
        self.results |= {
            "machine": machine(),
            "commit": values.get("commit") or commit() or "unknown",
            "command": " ".join(a for a in sys.argv[1:] if a.partition("=")[0] not in PLACES),
            "seq_len": self.stage.seq_len,
            "moba": describe_plan(plan),
        }
        print(
            f"{self.results['machine']}, commit {self.results['commit']}; {len(self.documents)} documents", flush=True
        )

    def measure_before(self) -> None:
        """The model as it came, under its own RoPE, the run's, and position interpolation to the same length."""
        trained = load_trained(self.values["model"])
        ratio = self.stage.seq_len / trained.stage.seq_len
        ropes = {"as it came": RopeConfig(), "of the run": self.stage.rope}
        if ratio > 1:
            ropes["interpolated"] = RopeConfig(scaling="linear", factor=ratio)
        for name, rope in ropes.items():
            trained.model.set_rope(rope)
            for attention in self.plans:
                self._measure(trained, arm="before", tokens=0, rope=name, attention=attention)

    def train(self, arm: str) -> None:
        """One arm, from the model or from its newest checkpoint; nothing if it is finished."""
        folder = self.runs / arm
        command = [sys.executable, str(ROOT / "launch" / "train.py"), *self.overrides, *ARMS[arm]]
        began = time.monotonic()
        subprocess.run([*command, f"run.dir={folder}", f"run.name={arm}"], check=True)
        shutil.copy(folder / FILE_NAME, self.to / f"{arm}.metrics.jsonl")
        records = read_metrics(folder / FILE_NAME)
        stages = {}
        for stage in (r for r in records if r["kind"] == "stage"):
            steps = [r for r in records if r["kind"] == "train" and r["stage"] == stage["stage"]]
            stages[stage["stage"]] = {
                "attention": stage["attention"],
                "steps": len(steps),
                "tokens_per_second": statistics.median(r["tokens_per_second"] for r in steps),
                "peak_memory_gib": max(r["peak_memory_gib"] or 0 for r in steps),
            }
        self.results["runs"][arm] = {
            "seconds": round(time.monotonic() - began),
            "stages": stages,
            "held_out": [[r["tokens"], r["trailing_loss"], r["stage"]] for r in records if r["kind"] == "eval"],
        }
        self._write()

    def measure_after(self, arm: str) -> None:
        """The arm at each stage's end, under MoBA and under full attention."""
        for path in checkpoints(self.runs / arm):
            trained = load_trained(path)
            for attention in self.plans:
                self._measure(trained, arm=arm, tokens=trained.tokens, rope="of the run", attention=attention)

    def _measure(self, trained: TrainedModel, *, attention: str, **what: Any) -> None:
        what["attention"] = attention
        if any(what.items() <= record.items() for record in self.results["measured"]):
            return
        trained.model.set_attention(self.plans[attention])
        context = Context(trained.model, trained.device, cluster_of=clusters_by(self.values.get("cluster", ".*")))
        found = evaluate(context, self.documents, seq_len=self.documents.seq_len)
        self.results["measured"].append(what | found.summary())
        self._write()
        value, se, _, count = found.curve.trailing
        at, error = f"{time.monotonic() - self.began:.0f} s", half_width(se, count - 1)
        print(f"[{at}] {what}: trailing {value:.4f} +- {error:.4f}", flush=True)

    def _write(self) -> None:
        self.results["seconds"] = round(time.monotonic() - self.began)
        (self.to / "results.json").write_text(json.dumps(self.results, indent=1) + "\n", encoding="utf-8")


def table(results: dict) -> str:
    """The measurements as a Markdown table."""
    length = results["measured"][0]["seq_len"]
    lines = [
        f"Held-out documents of {format_length(length)}: {results['measured'][0]['num_documents']}. MoBA: "
        f"{results['moba']}. Nats a token; +-: 95 %, {results['measured'][0]['num_clusters']} clusters.",
        "",
        "| model | tokens | RoPE | attention | loss | trailing |",
        "|---|---|---|---|---|---|",
    ]
    for record in results["measured"]:
        mean = statistics.fmean(record["mean"])
        trailing = record["trailing"]
        error = "" if trailing["se"] is None else f" +- {half_width(trailing['se'], trailing['clusters'] - 1):.4f}"
        cells = [record["arm"], format_count(record["tokens"]), record["rope"], record["attention"], f"{mean:.4f}"]
        lines.append(f"| {' | '.join(cells)} | {trailing['value']:.4f}{error} |")
    if {"moba", "full"} <= results["runs"].keys():
        first, *_, last = sorted({record["tokens"] for record in results["measured"] if record["arm"] == "moba"})
        lines += ["", *(_difference(results, tokens, own) for tokens, own in ((first, "moba"), (last, "full")))]
    for arm, run in results["runs"].items():
        for name, stage in run["stages"].items():
            lines.append(
                f"\n{arm}, {name}: {stage['attention']}, {stage['steps']} steps, "
                f"{stage['tokens_per_second']:,.0f} tokens/s, {stage['peak_memory_gib']:.1f} GiB"
            )
    return "\n".join(lines)


def _difference(results: dict, tokens: int, attention: str) -> str:
    """How much worse the MoBA run is than its twin in the last bucket, document by document."""
    ours = _find(results, "moba", tokens, attention, "of the run")
    theirs = _find(results, "full", tokens, "full", "of the run")
    gaps = np.array([[a[-1] - b[-1]] for a, b in zip(ours["document_loss"], theirs["document_loss"])])
    found = clustered_mean(gaps, np.ones_like(gaps), [document["cluster"] for document in ours["documents"]])
    error = half_width(found.se, found.freedom)[0]
    return (
        f"After {format_count(tokens)} tokens the run `moba` under {attention} attention is {found.mean[0]:+.4f} +- "
        f"{error:.4f} above the run `full`, trailing, document by document."
    )


def draw(results: dict, path: Path) -> None:
    """Left: trailing loss over training, each run with its own attention. Right: loss by position before and after."""
    figure = Figure(figsize=(13, 5.5), layout="constrained")
    over_tokens, by_position = figure.subplots(1, 2)
    _draw_over_tokens(over_tokens, results)
    _draw_by_position(by_position, results)
    for axes in (over_tokens, by_position):
        axes.set_ylabel("loss (nats a token)")
        axes.grid(alpha=0.3)
        axes.legend(fontsize="small")
    count, length = results["measured"][0]["num_documents"], format_length(results["seq_len"])
    figure.supxlabel(
        f"{count} held-out documents of {length}; MoBA: {results['moba']}; {results['machine']}, commit "
        f"{results['commit']}",
        fontsize="x-small",
    )
    save(figure, path)


def _draw_over_tokens(axes: Axes, results: dict) -> None:
    for arm, run in results["runs"].items():
        start = _find(results, "before", 0, arm, "of the run")
        points = [[0, start["trailing"]["value"]], *([at, value] for at, value, _ in run["held_out"])]
        axes.plot(*zip(*points), color=COLORS[arm], marker="o", markersize=4, label=f"run `{arm}`")
        before_switch = [at for at, _, stage in run["held_out"] if stage != run["held_out"][-1][2]]
        if arm == "moba" and before_switch:
            axes.axvline(before_switch[-1], color="black", linestyle="--", linewidth=1)
            where = (before_switch[-1], 0.5)
            text = {"xytext": (-4, 0), "textcoords": "offset points", "ha": "right", "rotation": 90}
            axes.annotate("both full from here", where, xycoords=("data", "axes fraction"), fontsize="small", **text)
    token_axis(axes)
    axes.set_title("Trailing loss, each run with its own attention")


def _draw_by_position(axes: Axes, results: dict) -> None:
    chosen = [("before", 0, attention, rope) for rope in ("as it came", "of the run") for attention in ("full", "moba")]
    for arm in results["runs"]:
        ends = sorted(record["tokens"] for record in results["measured"] if record["arm"] == arm)
        chosen += [(arm, ends[0], "moba", "of the run")] * (arm == "moba") + [(arm, ends[-1], "full", "of the run")]
    for arm, tokens, attention, rope in chosen:
        record = _find(results, arm, tokens, attention, rope)
        name = f"before, RoPE {rope}" if arm == "before" else f"run `{arm}`, {format_count(tokens)} tokens"
        axes.plot(
            [(a + b) / 2 for a, b in pairwise(record["edges"])],
            record["mean"],
            color=COLORS[arm],
            linestyle={"full": "-", "moba": "--"}[attention],
            marker={"as it came": "x", "of the run": "o"}[rope],
            markersize=4,
            label=f"{name}, under {attention}",
        )
    # A model beyond its native length can be far above all others, whose differences are what matters.
    shown = [mean for *what, rope in chosen if rope == "of the run" for mean in _find(results, *what, rope)["mean"]]
    room = max(shown) - min(shown)
    axes.set_ylim(min(shown) - 0.05 * room, max(shown) + 0.5 * room)
    length_axis(axes.xaxis, results["seq_len"])
    axes.set_xlim(0, results["seq_len"])
    axes.set_xlabel("visible tokens of the own document")
    axes.set_title("Loss by position, before and after")


def _find(results: dict, arm: str, tokens: int, attention: str, rope: str) -> dict:
    what = {"arm": arm, "tokens": tokens, "attention": attention, "rope": rope}
    return next(record for record in results["measured"] if what.items() <= record.items())


if __name__ == "__main__":
    main()
