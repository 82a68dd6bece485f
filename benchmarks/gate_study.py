"""What could pick the blocks of a model that was never trained with MoBA: trailing loss and retrieval under each gate
at the same budget, without training.

    python benchmarks/gate_study.py model=models/SmolLM2-135M to=results/gate_study seconds=1500
    python benchmarks/gate_study.py model=models/SmolLM2-135M to=/tmp/try lengths=1K block_sizes=64 budgets=1/4 \\
        documents=2 device=cpu

Gates, all of top_k blocks: mean (MoBA), mean+first (the document's first block is one of them), latest+first (a window
with a sink), random+first, oracle+first (the blocks of largest attention). full is what they are held against, document
by document. Two measurements: the loss of the last eighth of held-out documents; and whether a number that was said
once (pass_key), or one of eight (key_value), is known again at the end, where all digits that should follow are given
and each has to be the likeliest token.

The lists are worked through from their beginnings: what stands first in each is measured first, and after `seconds`
nothing new is begun. results.json, table.md and figure.png in `to` are written anew after each measurement.
"""

from __future__ import annotations

import sys
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from fractions import Fraction
from itertools import product
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))

import numpy as np  # noqa: E402
import torch  # noqa: E402
from matplotlib.figure import Figure  # noqa: E402
from matplotlib.ticker import FuncFormatter  # noqa: E402

from benchmarks.gate_probes import TASKS, Probe, probes, score  # noqa: E402
from benchmarks.pretrained import machine  # noqa: E402
from conf.build import ConfigError  # noqa: E402
from conf.numbers import format_length, parse_length  # noqa: E402
from conf.schema import DataConfig, SourceConfig  # noqa: E402
from data.errors import DataError  # noqa: E402
from data.sources import Source, open_validation  # noqa: E402
from data.tokenizer import load_tokenizer  # noqa: E402
from data.validation import held_out_documents  # noqa: E402
from evals.context import Context, clusters_by  # noqa: E402
from evals.figures import save  # noqa: E402
from evals.loading import TrainedModel, attention_plan, load_trained  # noqa: E402
from evals.position_loss import evaluate  # noqa: E402
from evals.results import commit, write_json  # noqa: E402
from evals.statistics import clustered_mean, half_width, wilson  # noqa: E402
from evals.swap import under  # noqa: E402
from launch.cli import UsageError, exits_on, key_values  # noqa: E402
from moba.kinds import AttentionSpec  # noqa: E402
from train.checkpoint.store import CheckpointError  # noqa: E402

KEYS = {
    "model": "Hugging Face directory, run directory or checkpoint",
    "to": "folder of the results",
    "lengths": "of the documents, the most important first (default 8K,4K,16K)",
    "block_sizes": "the most important first (default 128,64,256,512)",
    "budgets": "shares of the length that a query attends to, the most important first (default 1/8,1/16,1/4)",
    "gates": "those to measure, in this order (default: all, full first)",
    "parts": "of loss and retrieval (default both)",
    "documents": "held-out documents at each length, at most (default 16)",
    "data": "held-out documents: a file, a glob, a directory (default embedded: the books that ship)",
    "cluster": "regular expression; ids with the same match are one cluster of the errors (default: the whole id)",
    "seconds": "after which nothing new is begun (default: no limit)",
    "device": "auto (default), cpu or cuda",
    "commit": "commit of the code, where this is no git checkout",
}
FULL = "full"
GATES = {
    "mean": ("mean", 0),
    "mean+first": ("mean", 1),
    "latest+first": ("local", 1),
    "oracle+first": ("oracle", 1),
    "random+first": ("random", 1),
}
"""Name -> (gate, first_blocks) of the MoBA layers."""
PARTS = ("loss", "retrieval")
TRAILING = 8
"""The trailing loss is that of the last one of so many equal pieces of the length."""
LEAST_TOP_K = 3
"""With fewer the first block and the query's own leave a gate nothing to pick."""
CONVENTION = (
    "Loss in nats a token, mean over the last eighth of each document; `minus full` is paired by document. A budget is "
    "block_size * top_k / length. Retrieval: share of probes whose answer's tokens are all the likeliest ones, "
    "the text before each given, and the mean nats of those tokens. +-: 95 % Student intervals, documents as clusters."
)


@dataclass(frozen=True)
class Setting:
    """How much of what a query attends to."""

    length: int
    block_size: int
    budget: Fraction

    @property
    def top_k(self) -> int:
        """Blocks within the budget."""
        return int(self.budget * self.length / self.block_size)


def settings(lengths: Sequence[int], block_sizes: Sequence[int], budgets: Sequence[Fraction]) -> list[Setting]:
    """Those that leave a gate a choice, the most important first: what stands early in every list."""
    ranked = product(*(list(enumerate(values)) for values in (lengths, block_sizes, budgets)))
    ordered = sorted(ranked, key=lambda row: (sum(rank for rank, _ in row), [rank for rank, _ in row]))
    found = [Setting(*(value for _, value in row)) for row in ordered]
    return [one for one in found if one.top_k >= LEAST_TOP_K]


def plan_of(gate: str, setting: Setting, trained: TrainedModel) -> tuple[AttentionSpec, ...]:
    """The attention of each layer under a gate; layers that MoBA does not take the place of stay as they are."""
    if gate == FULL:
        return attention_plan(FULL, trained)
    name, first_blocks = GATES[gate]
    plan = attention_plan(f"{setting.block_size}x{setting.top_k}", trained)
    return tuple(s if s.routing is None else replace(s, gate=name, first_blocks=first_blocks) for s in plan)


@exits_on(ConfigError, DataError, CheckpointError, UsageError)
def main() -> None:
    """The command; see the module's text."""
    values = key_values(sys.argv[1:], KEYS, about=__doc__, required=["model", "to"])
    lengths, block_sizes, budgets, gates, parts = lists(values)
    trained = load_trained(values["model"], values.get("device", "auto"))
    study = Study(trained, values, started=time.monotonic())
    chosen = settings(lengths, block_sizes, budgets)
    if not chosen:
        raise UsageError(f"no setting has {LEAST_TOP_K} blocks or more; give smaller block_sizes or larger budgets")
    print(f"{study.results['model']} on {study.results['machine']}, commit {study.results['commit']}", flush=True)
    for setting, part, gate in product(chosen, parts, gates):
        if study.has(setting, part, gate):
            continue
        if study.is_over():
            print(f"seconds={values['seconds']} are over; not begun: {setting} {part} {gate} and what follows")
            break
        study.measure(setting, part, gate)
        study.write(Path(values["to"]).expanduser())
    else:
        study.results["finished"] = True
    study.write(Path(values["to"]).expanduser())
    print(table(study.results))


def lists(values: dict[str, str]) -> tuple[list[int], list[int], list[Fraction], list[str], list[str]]:
    """(lengths, block sizes, budgets, gates, parts) of the arguments, gates with `full` in front. UsageError for what
    cannot be read."""
    try:
        lengths = [parse_length(text) for text in values.get("lengths", "8K,4K,16K").split(",")]
        block_sizes = [parse_length(text) for text in values.get("block_sizes", "128,64,256,512").split(",")]
        budgets = [Fraction(text) for text in values.get("budgets", "1/8,1/16,1/4").split(",")]
        float(values.get("seconds", 0)), int(values.get("documents", 16))
    except (ValueError, ZeroDivisionError) as error:
        raise UsageError(f"{error}; say lengths=8K,4K block_sizes=128,64 budgets=1/8,1/4 documents=16") from error
    gates = [gate for gate in values.get("gates", ",".join(GATES)).split(",") if gate != FULL]
    parts = values.get("parts", ",".join(PARTS)).split(",")
    for key, given, known in (("gates", gates, GATES), ("parts", parts, PARTS)):
        if unknown := [name for name in given if name not in known]:
            raise UsageError(f"{key}={','.join(unknown)}: choose of {', '.join(known)}")
    if any(length < TRAILING or length % TRAILING for length in lengths):
        raise UsageError(f"lengths={values['lengths']}: each must be a multiple of {TRAILING}")
    return lengths, block_sizes, budgets, [FULL, *gates], parts


class Study:
    """The model, its documents, and what has been measured so far."""

    def __init__(self, trained: TrainedModel, values: dict[str, str], started: float):
        self.trained, self.values, self.started = trained, values, started
        data = DataConfig(
            tokenizer=trained.config.data.tokenizer, validation=SourceConfig(path=values.get("data", "embedded"))
        )
        self.source: Source = open_validation(data, log=print)
        self.tokenizer = load_tokenizer(data.tokenizer)
        self.limit = int(values.get("documents", 16))
        self.context = Context(trained.model, trained.device, cluster_of=clusters_by(values.get("cluster")))
        self.full: dict[tuple[str, int], dict[str, Any]] = {}
        self.results = {
            "model": trained.checkpoint.resolve().name,
            "tokens": trained.tokens,
            "native_length": trained.config.model.pretrained_length or trained.stage.seq_len,
            "machine": machine() if trained.device.type == "cuda" else f"CPU ({machine()})",
            "precision": str(next(trained.model.parameters()).dtype).removeprefix("torch."),
            "commit": values.get("commit") or commit() or "unknown",
            "data": values.get("data", "embedded"),
            "convention": CONVENTION,
            "finished": False,
            "records": [],
        }

    def is_over(self) -> bool:
        """Whether the time is spent."""
        return "seconds" in self.values and time.monotonic() - self.started > float(self.values["seconds"])

    def has(self, setting: Setting, part: str, gate: str) -> bool:
        """Whether this is known; full attention is the same at every budget."""
        return gate == FULL and (part, setting.length) in self.full

    def measure(self, setting: Setting, part: str, gate: str) -> None:
        """Appends one record."""
        began = time.monotonic()
        with torch.no_grad(), under(self.trained.model, plan_of(gate, setting, self.trained)):
            found = self._loss(setting) if part == "loss" else self._retrieval(setting)
        if gate == FULL:
            self.full[part, setting.length] = found
        full = self.full[part, setting.length]
        sizes = {} if gate == FULL else {"block_size": setting.block_size, "top_k": setting.top_k}
        record = {"part": part, "length": setting.length, **sizes, "budget": str(setting.budget), "gate": gate}
        record["seconds"] = round(time.monotonic() - began, 1)
        summarise = loss_summary if part == "loss" else retrieval_summary
        record |= summarise(found, full)
        self.results["records"].append(record)
        print(f"{setting} {part} {gate}: {record['text']}, {record['seconds']} s", flush=True)

    def _loss(self, setting: Setting) -> dict[str, Any]:
        documents = held_out_documents(self.source, setting.length, self.limit)
        found = evaluate(self.context, documents, seq_len=setting.length, num_buckets=TRAILING)
        return {"values": found.document_loss[:, -1], "clusters": found.document_clusters, "ids": found.document_ids}

    def _retrieval(self, setting: Setting) -> dict[str, Any]:
        documents = held_out_documents(self.source, setting.length, self.limit)
        asked: list[Probe] = list(probes(documents, self.tokenizer, setting.length))
        scores = [score(self.trained.model, probe, self.trained.device) for probe in asked]
        return {
            "tasks": [probe.task for probe in asked],
            "depths": [probe.depth for probe in asked],
            "clusters": [self.context.cluster_of(probe.document) for probe in asked],
            "right": np.array([right for right, _ in scores]),
            "nats": np.array([nats for _, nats in scores]),
        }

    def write(self, to: Path) -> None:
        """results.json, table.md and figure.png."""
        write_json(to / "results.json", self.results)
        (to / "table.md").write_text(table(self.results) + "\n", encoding="utf-8")
        draw(self.results, to / "figure.png")


# -------------------- numbers


def mean_of(values: np.ndarray, clusters: Sequence[str]) -> dict[str, float | None]:
    """Mean and 95 % half-width (None for one cluster) as JSON values."""
    found = clustered_mean(values, np.ones(len(values)), clusters)
    width = half_width(found.se, found.clusters)
    return {"mean": float(found.mean), "interval_95": float(width) if np.isfinite(width) else None}


def loss_summary(found: dict[str, Any], full: dict[str, Any]) -> dict[str, Any]:
    """The trailing loss and its difference from full attention's, document by document."""
    gap = mean_of(found["values"] - full["values"], found["clusters"])
    trailing = mean_of(found["values"], found["clusters"])
    return {
        "num_documents": len(found["ids"]),
        "trailing": trailing,
        "minus_full": gap,
        "documents": dict(zip(found["ids"], found["values"].tolist())),
        "text": f"{trailing['mean']:.4f}, minus full {with_error(gap)}",
    }


def retrieval_summary(found: dict[str, Any], full: dict[str, Any]) -> dict[str, Any]:
    """For each task the share of right answers and the nats, overall and by depth, and the difference from full."""
    tasks: dict[str, Any] = {}
    for task in TASKS:
        of_task = np.array([name == task for name in found["tasks"]])
        right, nats = found["right"][of_task], found["nats"][of_task]
        clusters = [c for c, own in zip(found["clusters"], of_task) if own]
        depths = np.array(found["depths"])[of_task]
        tasks[task] = {
            "num_probes": len(right),
            "right": float(right.mean()),
            "right_wilson_95": wilson(float(right.mean()), len(right)),
            "right_minus_full": mean_of(right.astype(float) - full["right"][of_task], clusters),
            "nats": mean_of(nats, clusters),
            "nats_minus_full": mean_of(nats - full["nats"][of_task], clusters),
            "right_by_depth": {f"{d:.3f}": float(right[depths == d].mean()) for d in np.unique(depths)},
        }
    text = ", ".join(f"{name} {one['right']:.0%} ({one['nats']['mean']:.2f} nats)" for name, one in tasks.items())
    return {"tasks": tasks, "text": text}


def with_error(value: dict[str, float | None]) -> str:
    """+1.234 +- 0.056"""
    return f"{value['mean']:+.3f}" + ("" if value["interval_95"] is None else f" +- {value['interval_95']:.3f}")


# -------------------- what is shown


def rows(results: dict[str, Any]) -> Iterator[tuple[dict[str, Any], dict[str, Any] | None, dict[str, Any] | None]]:
    """(settings, loss record or None, retrieval record or None) of each gate, by length, size and budget."""
    names = ("length", "block_size", "top_k", "gate")
    found: dict[tuple, dict[str, Any]] = {}
    for record in results["records"]:
        found.setdefault(tuple(record.get(name, 0) for name in names), {})[record["part"]] = record
    order = [FULL, *GATES]
    for key in sorted(found, key=lambda key: (*key[:3], order.index(key[3]))):
        parts = found[key]
        yield next(iter(parts.values())), parts.get("loss"), parts.get("retrieval")


def table(results: dict[str, Any]) -> str:
    """One Markdown table, with what it was measured on and how."""
    heads = ["length", "MoBA", "budget", "gate", "trailing loss", "minus full", "of mean's gap"]
    heads += [f"{task}{what}" for task in TASKS for what in (" right", " nats")]
    lines = [f"| {' | '.join(heads)} |", "|---" * len(heads) + "|"]
    gap_of_mean: dict[tuple, float] = {}
    for what, loss, retrieval in rows(results):
        is_full, sizes = what["gate"] == FULL, (what["length"], what.get("block_size"), what.get("top_k"))
        cells = [format_length(what["length"]), "" if is_full else f"{sizes[1]}x{sizes[2]}"]
        cells += ["1" if is_full else what["budget"], what["gate"]]
        if loss is None:
            cells += [""] * 3
        else:
            gap = loss["minus_full"]["mean"]
            if what["gate"] == "mean":
                gap_of_mean[sizes] = gap
            cells += [f"{loss['trailing']['mean']:.4f}", "" if is_full else with_error(loss["minus_full"])]
            cells += [f"{gap / gap_of_mean[sizes]:.0%}" if gap_of_mean.get(sizes, 0) > 0 else ""]
        for task in TASKS:
            one = None if retrieval is None else retrieval["tasks"][task]
            cells += ["", ""] if one is None else [f"{one['right']:.0%}", f"{one['nats']['mean']:.2f}"]
        lines.append(f"| {' | '.join(cells)} |")
    documents = max((record.get("num_documents", 0) for record in results["records"]), default=0)
    cut = "" if results["finished"] else " Not finished."
    about = (
        f"{results['model']} ({results['precision']}, native length {format_length(results['native_length'])}), not "
        f"trained for this; up to {documents} documents of {results['data']}. {results['machine']}, commit "
        f"{results['commit']}.{cut} {results['convention']}"
    )
    return "\n".join([*lines, "", about])


def draw(results: dict[str, Any], path: Path) -> None:
    """Loss above full attention's, and right answers, over the budget: a column a length and block size."""
    found = [row for row in rows(results) if row[0]["gate"] != FULL]
    columns = sorted({(what["length"], what["block_size"]) for what, _, _ in found})
    if not columns:
        return
    figure = Figure(figsize=(max(5, 3.2 * len(columns)), 9), layout="constrained")
    panels = figure.subplots(1 + len(TASKS), len(columns), squeeze=False, sharex=True, sharey="row")
    for column, (length, block_size) in enumerate(columns):
        here = [row for row in found if (row[0]["length"], row[0]["block_size"]) == (length, block_size)]
        for i, gate in enumerate(GATES):
            of_gate = [row for row in here if row[0]["gate"] == gate]
            draw_gate([axes[column] for axes in panels], of_gate, gate, f"C{i}")
        for task, axes in zip(TASKS, panels[1:, column]):
            for what, _, retrieval in rows(results):
                if what["gate"] == FULL and what["length"] == length and retrieval is not None:
                    axes.axhline(retrieval["tasks"][task]["right"], color="black", linestyle="--", label=FULL)
        panels[0, column].set_title(f"{format_length(length)}, blocks of {block_size}", fontsize="medium")
        panels[0, column].axhline(0, color="black", linestyle="--", linewidth=1)
        panels[-1, column].set_xlabel("budget")
    for axes, name in zip(panels[:, 0], ("trailing loss minus full (nats)", *(f"{task}: right" for task in TASKS))):
        axes.set_ylabel(name)
    for axes in panels.flat:
        axes.set_xscale("log", base=2)
        axes.xaxis.set_major_formatter(FuncFormatter(lambda x, _: str(Fraction(x).limit_denominator(64))))
        axes.grid(alpha=0.3)
    panels[0, 0].legend(fontsize="small")
    figure.supxlabel(
        f"{results['model']}, not trained with MoBA; bars: 95 % intervals, paired by document.\n"
        f"{results['machine']}, commit {results['commit']}",
        fontsize="x-small",
    )
    save(figure, path)


def draw_gate(panels: Sequence[Any], found: Sequence[tuple], gate: str, color: str) -> None:
    """One gate's lines in the panels of a column: the loss, then each task."""
    style = {"color": color, "marker": "o", "markersize": 4, "label": gate}
    points = [(float(Fraction(what["budget"])), loss["minus_full"]) for what, loss, _ in found if loss is not None]
    if points:
        x, gaps = zip(*sorted(points, key=lambda point: point[0]))
        errors = [gap["interval_95"] or 0 for gap in gaps]
        panels[0].errorbar(x, [gap["mean"] for gap in gaps], yerr=errors, capsize=2, **style)
    for task, axes in zip(TASKS, panels[1:]):
        points = sorted((float(Fraction(what["budget"])), r["tasks"][task]["right"]) for what, _, r in found if r)
        if points:
            axes.plot(*zip(*points), **style)


if __name__ == "__main__":
    main()
