"""What benchmarks/study.py makes of the study `small`: numbers, tables, and figures in the MoBA paper's format.

Gaps are differences of the same held-out documents, averaged over seeds, with clusters of documents as the draws of
their 95 % intervals; the differences of single seeds are listed beside them. `recovered` is the part of MoBA's trailing
gap to full attention that a last stage of full attention closes, 1 - gap / gap of MoBA, its interval from draws of the
clusters. `falls_by` is how much the loss falls from the first bucket behind REACH tokens, which is
what MoBA attends to at most, to the last; `far_context` how much more the last bucket's tokens lose in the same weights
where the document is cut off 1K tokens before them, or further away. `tuned` has what was fine-tuned: losses of the
answers, and, conversation by conversation, minus those with no full layer.

Shapes: N documents, B buckets of positions, C clusters, D draws.
"""

from __future__ import annotations

import hashlib
import statistics
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from benchmarks.common import read_json
from benchmarks.panels import centres, known, measured_on, prepared, spread, tables
from benchmarks.studies import CUTS
from benchmarks.study_results import Measured, Task, of_run, over_seeds, training_losses
from conf.numbers import format_count, format_length, parse_length
from evals.context import clusters_by
from evals.figures import length_axis, mark_dense, token_axis
from evals.paired import difference
from evals.position_loss import Evaluation, load_evaluation
from evals.routing_numbers import model_hit_rate
from evals.routing_report import HEAD, RoutingReport
from evals.statistics import clustered_sums
from evals.style import LOSS, POSITION, color, look, marker, save
from evals.swap import document_mean, with_error
from train.record.metrics import FILE_NAME, read_metrics

DRAWS, REACH = 4000, 1024
"""REACH: block x top_k of the arms that most are about."""
START, TUNED = "start", "sft"
REFERENCE, SPARSE, SWITCHED, FIRST, BEST = "full", "moba", "moba, then full", "moba, first block", "best"
GRAIN = ("1024x2", "64x32")
MINUS_FULL = "minus full (nats per token)"
GATES = {"mean": "the gate's", "local": "latest", "random": "random", "oracle": "best"}
Runs = Mapping[str, Mapping[int, Path]]
"""Arm -> seed -> folder of the run."""


class Held:
    """The evaluations during training of all runs, and what is asked of their weights in the end."""

    def __init__(self, runs: Runs, found: Sequence[Measured], cluster: str):
        self.runs, self._found, self._cluster_of = runs, found, clusters_by(cluster)

    def asked(self, arm: str, what: str) -> dict[int, Path]:
        """Seed -> the result of an evaluation, named by the beginning of its line."""
        return {seed: path for name, seed, line, path in self._found if name == arm and line.startswith(what)}

    def common(self, *arms: str) -> tuple[list[int], int]:
        """(seeds, tokens): the seeds that all of them have, and the last evaluation that all of these have; no seeds
        where there is none."""
        seeds = [s for s in self.runs.get(arms[0], {}) if all(s in self.runs.get(arm, {}) for arm in arms)]
        names = [{path.name for path in evaluations(self.runs[arm][seed])} for arm in arms for seed in seeds]
        shared = set.intersection(*names) if seeds else set()
        return (seeds, int(max(shared)[5:-4])) if shared else ([], 0)

    def at(self, arm: str, seed: int, tokens: int) -> Evaluation:
        """One of them, with the clusters that were asked for."""
        found = load_evaluation(self.runs[arm][seed] / "position_loss" / f"eval_{tokens:015d}.npz")
        return replace(found, document_clusters=[self._cluster_of(one) for one in found.document_ids])

    def each(self, arm: str, seeds: Sequence[int], tokens: int) -> list[Evaluation]:
        """Of each seed."""
        return [self.at(arm, seed, tokens) for seed in seeds]


def evaluations(folder: Path) -> list[Path]:
    """The evaluations during training, eval_<tokens>.npz. One that was killed may have left an array whose .json was
    not written yet."""
    return [path.with_suffix(".npz") for path in (folder / "position_loss").glob("eval_*.json")]


def collect(folders: Mapping[Task, Path], found: Sequence[Measured], cluster: str) -> dict:
    """What results.json has besides where it comes from. `folders`: of the runs. ValueError where none was
    evaluated."""
    every: dict[str, dict[int, Path]] = {}
    for (arm, seed), folder in folders.items():
        if not arm.startswith(START) and evaluations(folder):
            every.setdefault(arm, {})[seed] = folder
    runs = {arm: own for arm, own in every.items() if not arm.startswith(TUNED)}
    if not runs:
        raise ValueError("no run has an evaluation")
    held = Held(runs, found, cluster)
    record = {
        "runs": [
            {"arm": arm, "seed": seed, **of_run(at_length(read_metrics(folder / FILE_NAME)))}
            for arm, own in every.items()
            for seed, folder in own.items()
        ],
        "final": {arm: final(held, arm) for arm in runs},
        "gaps": [gap for arm in runs for reference in references(arm) if (gap := gap_of(held, arm, reference))],
        "recovered": recovered(held),
        "router": [*gates_of(held), *routing_of(held)],
        "tuned": list(tuned({arm: own for arm, own in every.items() if arm not in runs})),
    }
    return record | {"device": ", ".join(sorted({run["device"] for run in record["runs"]}))}


def at_length(metrics: Sequence[dict]) -> list[dict]:
    """Of a run's metrics, what is of its last stage's length, and of stages that were logged."""
    stages = [record for record in metrics if record["kind"] == "stage"]
    logged = {record["stage"] for record in metrics if record["kind"] == "train"}
    length = stages[-1]["seq_len"]
    return [
        record
        for record in metrics
        if record.get("eval_seq_len", length) == length and (record["kind"] != "stage" or record["stage"] in logged)
    ]


def final(held: Held, arm: str) -> dict:
    """Of an arm: its losses by position, and how much they fall."""
    seeds, tokens = held.common(arm)
    each = held.each(arm, seeds, tokens)
    mean = over_seeds(each)
    edges, loss_NB = mean.curve.edges, mean.document_loss
    start = int(np.searchsorted(edges, REACH))
    fall_N = loss_NB[:, start] - loss_NB[:, -1]
    return {
        "tokens": tokens,
        "seeds": seeds,
        "num_documents": len(loss_NB),
        "num_clusters": len(set(mean.document_clusters)),
        "edges": edges.tolist(),
        "mean": loss_NB.mean(0).tolist(),
        "by_seed": [one.document_loss.mean(0).tolist() for one in each],
        "loss": float(loss_NB.mean()),
        "trailing": float(loss_NB[:, -1].mean()),
        "falls_from": int(edges[start]),
        "falls_by": document_mean(fall_N, mean.document_clusters),
        "far_context": far_context(held, arm, seeds, each),
    }


def far_context(held: Held, arm: str, seeds: Sequence[int], whole: Sequence[Evaluation]) -> dict | None:
    """How much more the last bucket's tokens lose where all but so many before them are cut off, by how many are left;
    None where some seed was not asked."""
    found = {}
    for line in CUTS:
        paths = held.asked(arm, line)
        if not {*seeds} <= paths.keys():
            continue
        cut = [load_evaluation(paths[seed]) for seed in seeds]
        name = format_length(int(cut[0].curve.edges[-2]))
        assert all(a.document_ids == b.document_ids for a, b in zip(cut, whole))
        gap_SN = np.array([a.document_loss[:, -1] - b.document_loss[:, -1] for a, b in zip(cut, whole)])
        found[name] = document_mean(gap_SN.mean(0), whole[0].document_clusters) | {"by_seed": gap_SN.mean(1).tolist()}
    return found or None


def tuned(runs: Runs) -> Iterator[dict]:
    """What was fine-tuned, by the number of full layers and the tokens of the evaluation: losses of each seed, and how
    far they are above those with no full layer and those with most."""
    found: dict[tuple[int, int], dict[int, tuple[Mapping, Evaluation]]] = {}
    for arm, own in runs.items():
        for seed, folder in own.items():
            for row in read_metrics(folder / FILE_NAME):
                if row["kind"] == "eval":
                    held_out = load_evaluation(folder / "position_loss" / f"eval_{row['tokens']:015d}.npz")
                    found.setdefault((int(arm.split()[1]), row["tokens"]), {})[seed] = row, held_out
    most = max((layers for layers, _ in found), default=0)
    for (layers, tokens), own in sorted(found.items()):
        row = {"layers": layers, "tokens": tokens, "seeds": list(own)}
        row |= {key: [losses[key] for losses, _ in own.values()] for key in ("loss", "trailing_loss")}
        for name, others in {"minus_none": 0, "minus_most": most}.items():
            theirs = found.get((others, tokens), {})
            pairs = [(ours, theirs[seed][1]) for seed, (_, ours) in own.items() if seed in theirs]
            if pairs and layers != others:
                gap_SNB = np.array([a.document_loss - b.document_loss for a, b in pairs])
                row["num_documents"] = gap_SNB.shape[1]
                row[name] = document_mean(np.nanmean(gap_SNB.mean(0), 1), pairs[0][0].document_clusters)
        yield row


def references(arm: str) -> list[str]:
    """What an arm is held against: full attention of the same size of model, MoBA without and with the first block, and
    the coarsest blocks."""
    kind, _, size = arm.partition(", ")
    if size.endswith("M"):
        return [f"{REFERENCE}, {size}"] if kind != REFERENCE else []
    others = [REFERENCE, SPARSE, *([FIRST] if arm == BEST else []), *(GRAIN[:1] if arm in GRAIN else [])]
    return others[: others.index(arm)] if arm in others else others


def gap_of(held: Held, arm: str, reference: str) -> dict | None:
    """How far an arm's losses are above those of what it is held against after as many tokens; None where they have
    nothing in common."""
    seeds, tokens = held.common(arm, reference)
    if not seeds:
        return None
    ours, theirs = held.each(arm, seeds, tokens), held.each(reference, seeds, tokens)
    a, b = over_seeds(ours), over_seeds(theirs)
    gap_NB = a.document_loss - b.document_loss
    each = [x.document_loss - y.document_loss for x, y in zip(ours, theirs)]
    return {
        "arm": arm,
        "reference": reference,
        "seeds": seeds,
        "tokens": tokens,
        "mean_loss": document_mean(gap_NB.mean(1), a.document_clusters),
        "by_position": document_mean(late(gap_NB, a), a.document_clusters),
        "by_seed": [
            {"mean": float(one.mean()), "trailing": float(one[:, -1].mean()), "by_position": float(late(one, a).mean())}
            for one in each
        ],
        **difference(a, b).summary(),
    }


def late(loss_NB: np.ndarray, held_out: Evaluation) -> np.ndarray:
    """[N] what is added from positions up to REACH to the last bucket."""
    return loss_NB[:, -1] - loss_NB[:, : int(np.searchsorted(held_out.curve.edges, REACH))].mean(1)


def recovered(held: Held) -> dict | None:
    """The part of MoBA's gap to full attention that the last stage closes, in the last bucket and behind REACH; None
    where an arm is missing."""
    arms = (REFERENCE, SPARSE, SWITCHED)
    seeds, tokens = held.common(*arms)
    if not seeds:
        return None
    loss_ASNB = np.array([[one.document_loss for one in held.each(arm, seeds, tokens)] for arm in arms])
    if np.array_equal(loss_ASNB[1], loss_ASNB[2]):
        return None  # not switched yet
    first = held.at(REFERENCE, seeds[0], tokens)
    behind = int(np.searchsorted(first.curve.edges, REACH))
    losses = {
        "trailing": loss_ASNB[..., -1],
        "behind the reach": loss_ASNB[..., behind:].mean(-1),
        "trailing minus up to the reach": loss_ASNB[..., -1] - loss_ASNB[..., :behind].mean(-1),
    }
    parts = {name: _recovered(loss_ASN, first.document_clusters) for name, loss_ASN in losses.items()}
    switches = [after_switch(*(held.runs[arm][seed] for arm in (SWITCHED, SPARSE))) for seed in seeds]
    return {"seeds": seeds, "tokens": tokens, "parts": parts, "after_switch": switches}


def after_switch(switched: Path, sparse: Path) -> list[float]:
    """The training loss minus that of the run that was not switched, on the same batches: every logged one since."""
    ours, theirs = (training_losses(read_metrics(folder / FILE_NAME)) for folder in (switched, sparse))
    gaps = [ours[tokens] - theirs[tokens] for tokens in sorted(ours.keys() & theirs.keys())]
    start = next((i for i, gap in enumerate(gaps) if gap != 0), len(gaps))
    return gaps[start:]


def _recovered(loss_ASN: np.ndarray, clusters: Sequence[str]) -> dict:
    gap_SN2 = (loss_ASN[1:] - loss_ASN[0]).transpose(1, 2, 0)
    sums_C2, counts_C2 = clustered_sums(gap_SN2.mean(0), np.ones(gap_SN2.shape[1:]), clusters)
    count = len(sums_C2)
    times_DC = np.random.default_rng(0).multinomial(count, np.full(count, 1 / count), DRAWS)
    drawn_D2 = (times_DC @ sums_C2) / (times_DC @ counts_C2)
    low, high = np.quantile(1 - drawn_D2[:, 1] / drawn_D2[:, 0], (0.025, 0.975))
    gap_S2 = gap_SN2.mean(1)
    gap, left = gap_S2.mean(0)
    return {
        "share": float(1 - left / gap),
        # The share of a gap that may be none has no interval.
        "interval_95": [float(low), float(high)] if (drawn_D2[:, 0] > 0).mean() > 0.975 else None,
        "gap": float(gap),
        "left": float(left),
        "by_seed": (1 - gap_S2[:, 1] / gap_S2[:, 0]).tolist(),
        "draws_with_a_gap": float((drawn_D2[:, 0] > 0).mean()),
    }


def gates_of(held: Held) -> Iterator[dict]:
    """Of each arm with a router: its loss in the last eighth under other blocks, minus full attention's and minus that
    under its gate's."""
    for arm in held.runs:
        paths = [*held.asked(arm, "sweep").values()]
        if not paths:
            continue
        names = ["full", *(row["gate"] for row in read_json(paths[0])["settings"][1:])]
        losses_SNB = np.mean([np.load(path.with_suffix(".npz"))["document_loss"] for path in paths], axis=0)
        last = dict(zip(names, losses_SNB[:, :, -(losses_SNB.shape[2] // 8) :].mean(-1)))
        seeds, tokens = held.common(arm)
        clusters = sampled(held.at(arm, seeds[0], tokens), losses_SNB.shape[1])
        yield {
            "arm": arm,
            "eval": "gates",
            "seeds": len(paths),
            "num_documents": losses_SNB.shape[1],
            "last_eighth": {name: float(loss_N.mean()) for name, loss_N in last.items()},
            "minus_full": {n: document_mean(loss_N - last["full"], clusters) for n, loss_N in last.items()},
            "minus_gate": {n: document_mean(loss_N - last["mean"], clusters) for n, loss_N in last.items()},
        }


def sampled(held_out: Evaluation, number: int) -> list[str]:
    """The clusters of the documents that an evaluation of so many takes (data.validation.held_out_documents)."""
    ids = held_out.document_ids
    by_hash = sorted(range(len(ids)), key=lambda i: hashlib.sha256(ids[i].encode()).digest())
    return [held_out.document_clusters[i] for i in sorted(by_hash[:number])]


def routing_of(held: Held) -> Iterator[dict]:
    """The statistics of each arm's gate, means over seeds; with the hits that FlashMoBA's model expects of the heads'
    ratios of signal to noise."""
    for arm in held.runs:
        paths = [*held.asked(arm, "routing").values()]
        if not paths:
            continue
        found: dict[str, list[float]] = {}
        for path in paths:
            report = RoutingReport.load(path)
            routings = [spec.routing for spec in report.specs if spec.routing is not None]
            picks = [routing.top_k - 1 - routing.first_blocks for routing in routings]
            snr_LH, hit_LH = report.head("snr").mean, report.head("hit").mean
            model_LH = np.stack([model_hit_rate(row, report.candidates, n) for row, n in zip(snr_LH, picks)])
            numbers = {name: float(report.overall(name).mean) for name in HEAD}
            numbers |= {"candidates": report.candidates, "model_hit": float(model_LH.mean())}
            numbers["model_error"] = float(np.abs(model_LH - hit_LH).mean())
            if hit_LH.size > 2:  # of two, any two correlate
                numbers["model_correlation"] = float(np.corrcoef(model_LH.ravel(), hit_LH.ravel())[0, 1])
            for name, value in numbers.items():
                found.setdefault(name, []).append(value)
        overall = {name: statistics.fmean(values) for name, values in found.items()}
        yield {"arm": arm, "eval": "routing", "seeds": len(paths), "overall": overall}


# -------------------- tables


def table(record: Mapping) -> list[str]:
    """Markdown."""
    recovered = record["recovered"] or {"parts": {}, "after_switch": []}
    parts = {
        "in the end": [
            {"arm": arm, **{key: own[key] for key in ("tokens", "loss", "trailing")}, "seeds": len(own["seeds"])}
            | {"falls from 1K": with_error(own["falls_by"])}
            | {f"more after {at} alone": with_error(value) for at, value in (own["far_context"] or {}).items()}
            for arm, own in record["final"].items()
        ],
        "differences": [
            {key: gap[key] for key in ("arm", "reference", "tokens")} | gap_cells(gap) for gap in record["gaps"]
        ],
        "recovered by the last stage": [
            {"of": name, "gap": part["gap"], "left": part["left"], "share": f"{part['share']:.0%}"}
            | {"95 %": " to ".join(f"{share:.0%}" for share in part["interval_95"] or ())}
            | {"seeds": ", ".join(f"{share:.0%}" for share in part["by_seed"])}
            for name, part in recovered["parts"].items()
        ],
        "training loss after the switch, same batches": [
            {"first": gaps[0], "most": max(gaps)} for gaps in recovered["after_switch"] if gaps
        ],
        "last eighth under other blocks, minus full": [
            {"trained as": row["arm"], "documents": row["num_documents"], "seeds": row["seeds"]}
            | {"full": row["last_eighth"]["full"]}
            | {label: with_error(row["minus_full"][name]) for name, label in GATES.items() if name in row["minus_full"]}
            for row in record["router"]
            if row["eval"] == "gates"
        ],
        "routers": [
            {"router of": row["arm"], "seeds": row["seeds"], **row["overall"]}
            for row in record["router"]
            if row["eval"] == "routing"
        ],
        "fine-tuned": [
            {key: row[key] for key in ("layers", "tokens")}
            | {"seeds": len(row["seeds"])}
            | {key: statistics.fmean(row[key]) for key in ("loss", "trailing_loss")}
            | {name: with_error(row[name]) if name in row else "" for name in ("minus_none", "minus_most")}
            for row in record["tuned"]
        ],
        "tokens/s, beside the others": [
            {"arm": run["arm"], "seed": run["seed"]} | {s["stage"]: s["tokens_per_second"] for s in run["stages"]}
            for run in record["runs"]
        ],
    }
    return tables(record, parts)


def gap_cells(gap: Mapping) -> dict[str, str]:
    """Of a table."""
    last = {"mean": gap["difference"][-1], "interval_95": gap["interval_95"][-1]}
    values = {"mean": gap["mean_loss"], "trailing": last, "by_position": gap["by_position"]}
    seeds = {key: ", ".join(f"{one[key]:+.4f}" for one in gap["by_seed"]) for key in values}
    return {key: f"{with_error(value)} ({seeds[key]})" for key, value in values.items()}


# -------------------- figures


def figures(record: Mapping) -> dict[str, Callable[[Path], None]]:
    """Name -> draws it into a PNG file; those for which there are runs."""
    finals = record["final"]
    main = [arm for arm in (REFERENCE, SPARSE, FIRST, SWITCHED) if {arm, REFERENCE} <= {*finals}]
    grain = [arm for arm in GRAIN if arm in finals]
    cut = {arm: finals[arm] for arm in (REFERENCE, SPARSE) if arm in finals and finals[arm].get("far_context")}
    gates = [row for row in record["router"] if row["eval"] == "gates"]
    every = {
        "loss_by_tokens": (main, over_tokens, "Held-out loss over training (the paper's figure 3a)"),
        "loss_by_position": (main, by_position, "Loss by position (the paper's figure 5a)"),
        "granularity": (grain[1:] and grain, by_grain, "The same sparsity in smaller blocks (the paper's figure 4)"),
        "context": (cut, by_context, "The same last 512 tokens of each document after less context"),
        "layers": (
            record.get("tuned"),
            by_layers,
            "Fine-tuning with full attention in the last layers (the paper's figure 5b)",
        ),
        "gates": (gates, by_gates, "Trained weights under other blocks, last eighth of the documents"),
    }
    return {name: partial(_draw, record, *about) for name, about in every.items() if about[0]}


def _draw(record: Mapping, shown: Any, plot: Callable[..., None], title: str, path: Path) -> None:
    figure = Figure(figsize=(12, 4.8), layout="constrained")
    plot(figure.subplots(1, 2), record, shown)
    figure.suptitle(f"{title}\n{measured_on(record)}", fontsize="medium")
    save(figure, path)


def over_tokens(axes: Sequence[Axes], record: Mapping, names: Sequence[str]) -> None:
    """Means over seeds, with the least and the most shaded."""
    for axis, key, title in zip(axes, ("loss", "trailing_loss"), ("all positions", "last sixteenth")):
        prepared(axis, title, LOSS)
        for i, name in enumerate(names):
            own = [run["held_out"] for run in record["runs"] if run["arm"] == name]
            runs = [{row["tokens"]: row[key] for row in rows} for rows in own]
            tokens = sorted(set.intersection(*map(set, runs)))
            if name == SWITCHED:  # before that it is MoBA's
                tokens = tokens[-2:]
            values = np.array([[run[at] for run in runs] for at in tokens])
            spread(axis, tokens, values, f"{name} ({count(runs)})", look(i, len(names)), alpha=0.2)
        axis.set_yscale("log")
        axis.yaxis.set_major_formatter("{x:.2f}")
        axis.yaxis.set_minor_formatter("{x:.2f}")
        axis.grid(alpha=0.3, which="both")
        token_axis(axis)
    axes[1].legend(fontsize="small", title="shaded: least to most of the seeds", title_fontsize="small")


def by_position(axes: Sequence[Axes], record: Mapping, names: Sequence[str]) -> None:
    """The curves, and what each is above full attention document by document."""
    prepared(axes[0], "means (shaded: least to most of the seeds)", LOSS)
    prepared(axes[1], "document by document (bars: 95 % of one place; shaded: of all)", MINUS_FULL)
    longest = record["final"][names[0]]["edges"][-1]
    for i, name in enumerate(names):
        own, style = record["final"][name], look(i, len(names))
        x = centres(own["edges"])
        axes[0].plot(x, own["mean"], label=name, **style)
        seeds = np.array(own["by_seed"])
        axes[0].fill_between(x, seeds.min(0), seeds.max(0), color=style["color"], alpha=0.2, linewidth=0)
        gap = next((g for g in record["gaps"] if g["arm"] == name and g["reference"] == REFERENCE), None)
        if gap is None:
            continue
        x = x + (i - len(names) / 2) * np.diff(own["edges"]).min() / 8
        axes[1].errorbar(x, gap["difference"], yerr=known(gap["interval_95"]), capsize=2, label=name, **style)
        if None not in gap["band_95"]:
            low, high = (np.array(gap["difference"]) + sign * np.array(gap["band_95"]) for sign in (-1, 1))
            axes[1].fill_between(x, low, high, color=style["color"], alpha=0.12, linewidth=0)
    axes[0].set_ylim(top=max(max(record["final"][name]["mean"][1:]) for name in names) * 1.06)
    axes[1].axhline(0, color="black", linewidth=0.8)
    for axis in axes:
        mark_dense(axis, REACH, longest)
        length_axis(axis.xaxis, longest)
        axis.set_xlabel(POSITION)
    axes[0].legend(fontsize="small", loc="upper right", ncols=2)
    axes[1].legend(fontsize="small", loc="upper left")


def by_grain(axes: Sequence[Axes], record: Mapping, names: Sequence[str]) -> None:
    """Losses of all positions, and what is added from 1K to the end, minus full attention's: means over the seeds of
    each arm with the documents' interval, and a dash per seed."""
    length = record["final"][names[0]]["edges"][-1]
    gaps = {gap["arm"]: gap for gap in record["gaps"] if gap["reference"] == REFERENCE and gap["arm"] in names}
    labels = []
    for name in (name for name in names if name in gaps):
        block, top = map(int, name.split("x"))
        labels.append(f"{top} of {length // block} blocks\n({name})\n{count(gaps[name]['seeds'])}")
    titles = {"mean": "all positions", "by_position": "last sixteenth minus first 1K"}
    for axis, (key, title) in zip(axes, titles.items()):
        prepared(axis, f"{title} (bars: 95 %; dashes: seeds)", MINUS_FULL)
        for place, gap in enumerate(gaps[name] for name in names if name in gaps):
            value = gap["mean_loss" if key == "mean" else key]
            axis.errorbar(place, value["mean"], yerr=value["interval_95"] or np.nan, capsize=4, **look(1, 2))
            dashes(axis, place, [one[key] for one in gap["by_seed"]])
        axis.axhline(0, color=color(0), label="full")
        axis.set_xticks(range(len(labels)), labels)
        axis.set_xlim(-0.6, len(labels) - 0.4)
    axes[0].legend(fontsize="small")


def dashes(axis: Axes, place: float, seeds: Sequence[float]) -> None:
    """A dash per seed."""
    axis.plot([place] * len(seeds), seeds, "_", color="black")


def count(seeds: Sequence) -> str:
    """In words."""
    return "1 seed" if len(seeds) == 1 else f"{len(seeds)} seeds"


def by_context(axes: Sequence[Axes], _: Mapping, finals: Mapping[str, Mapping]) -> None:
    """The loss of the same tokens by how many are before them, and what the missing ones cost in the same weights."""
    contexts: list[int] = []
    for i, (name, own) in enumerate(finals.items()):
        # In the last bucket of the whole document they have all that is before it.
        contexts = [parse_length(key) for key in own["far_context"]] + [own["edges"][-2]]
        gaps = [*own["far_context"].values(), {"mean": 0.0, "interval_95": None, "by_seed": []}]
        style = look(i, len(finals))
        axes[0].plot(contexts, [own["trailing"] + gap["mean"] for gap in gaps], label=name, **style)
        widths = [gap["interval_95"] or np.nan for gap in gaps]
        axes[1].errorbar(contexts, [gap["mean"] for gap in gaps], yerr=widths, capsize=3, label=name, **style)
        for context, gap in zip(contexts, gaps):
            dashes(axes[1], context, gap["by_seed"])
    prepared(axes[0], "", LOSS)
    prepared(axes[1], "same weights (bars: 95 %; dashes: seeds)", "minus all of the context (nats per token)")
    for axis in axes:
        axis.set_xscale("log", base=2)
        axis.set_xticks(contexts, [f"{context / 1024:g}K" for context in contexts])
        axis.set_xlabel("tokens before them (MoBA attends to 1K)")
    axes[1].axhline(0, color="black", linewidth=0.8)
    axes[0].legend(fontsize="small")


def by_layers(axes: Sequence[Axes], record: Mapping, tuned: Sequence[Mapping]) -> None:
    """The last held-out losses that all have by the number of full layers, and the training losses."""
    counts = sorted({row["layers"] for row in tuned})
    last = max(set.intersection(*({row["tokens"] for row in tuned if row["layers"] == n} for n in counts)))
    rows = [row for row in tuned if row["tokens"] == last]
    seeds = sorted({len(row["seeds"]) for row in rows})
    of_seeds = f"{seeds[0]} or {seeds[-1]} seeds" if seeds[1:] else count(rows[0]["seeds"])
    about = f"held-out conversations after {format_count(last)} tokens ({of_seeds})"
    for axis, title in zip(axes, (about, "training")):
        prepared(axis, title, "loss (nats per supervised token)")
    for i, (key, label) in enumerate({"loss": "all answers", "trailing_loss": "in the last sixteenth"}.items()):
        axes[0].plot(counts, [np.mean(row[key]) for row in rows], label=label, **look(i, 2))
        for row in rows:
            dashes(axes[0], row["layers"], row[key])
    axes[0].set_xticks(counts)
    axes[0].set_xlabel("full layers, counted from the last")
    for i, layers in enumerate(counts):
        run = next(run for run in record["runs"] if run["arm"] == f"{TUNED}, {layers} full")
        axes[1].plot(*zip(*run["train"]), color=color(i), marker=marker(i), markersize=3, label=f"{layers} full")
    token_axis(axes[1])
    for axis in axes:
        axis.set_ylim(bottom=0)
        axis.legend(fontsize="small")


def by_gates(axes: Sequence[Axes], _: Mapping, rows: Sequence[Mapping]) -> None:
    """What each gate's loss is above full attention's, and above the gate's own."""
    titles = {"minus_full": "minus full attention", "minus_gate": "minus the gate's blocks"}
    for axis, (key, title) in zip(axes, titles.items()):
        prepared(axis, f"{title} (bars: 95 %)", "nats per token")
        for g, (gate, label) in enumerate(GATES.items()):
            found = {r + 0.15 * (g - 1.5): row[key][gate] for r, row in enumerate(rows) if gate in row[key]}
            means, widths = ([value[what] for value in found.values()] for what in ("mean", "interval_95"))
            style = {"fmt": marker(g), "color": color(g), "capsize": 3, "label": label}
            axis.errorbar([*found], means, yerr=known(widths), **style)
        axis.set_xticks(range(len(rows)), [row["arm"].replace(", ", ",\n") for row in rows], fontsize="small")
        axis.axhline(0, color="black", linewidth=0.8)
        axis.set_xlabel("trained as")
        axis.margins(y=0.2)
    axes[0].legend(fontsize="small", title="blocks", title_fontsize="small", loc="upper center", ncols=len(GATES))
