"""What benchmarks/small.py makes of its runs: numbers, tables, and figures in the MoBA paper's format.

Gaps are differences of the same held-out documents, averaged over seeds, with clusters of documents as the draws of
their 95 % intervals; the differences of single seeds are listed beside them. `recovered` is the part of MoBA's trailing
gap to full attention that a last stage of full attention closes, 1 - gap / gap of MoBA, its interval from draws of the
clusters. `falls_by` is how much the loss falls from the first bucket behind block x top_k to the last.

Shapes: N documents, B buckets of positions, C clusters, D draws.
"""

from __future__ import annotations

import statistics
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import replace
from pathlib import Path

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from benchmarks.common import markdown, origin, read_json, write
from benchmarks.study import of_run, over_seeds
from conf.numbers import format_count, format_length
from evals.context import clusters_by
from evals.figures import length_axis, mark_dense, token_axis
from evals.paired import difference
from evals.position_loss import Evaluation, load_evaluation
from evals.statistics import clustered_sums
from evals.style import LOSS, POSITION, color, look, marker, save
from evals.swap import document_mean
from train.record.metrics import FILE_NAME, read_metrics

DRAWS = 4000
REFERENCE, SPARSE, SWITCHED, FIRST = "full", "moba", "moba, then full", "moba, first block"
GRAIN = ("1024x2", "512x4", "256x8", "128x16", "64x32")
PLAIN = ", no key convolution"
GATES = {"mean": "the gate's", "local": "latest", "random": "random", "oracle": "best"}
Runs = Mapping[str, Mapping[int, Path]]
"""Arm -> seed -> folder of the run."""


def collect(work: Path, to: Path, arguments: Sequence[str], label: str | None, cluster: str, names) -> str:
    """Writes results.json, table.md and figures; returns the table. `names`: (arm, seed) of each run's folder."""
    runs: dict[str, dict[int, Path]] = {}
    for (arm, seed), folder in names.items():
        if list((work / folder / "position_loss").glob("eval_*.npz")):
            runs.setdefault(arm, {})[seed] = work / folder
    if not runs:
        raise ValueError(f"{work} has no run with an evaluation")
    record = {**origin(arguments, label), "runs": list(of_runs(runs)), "final": {}, "gaps": []}
    record["device"] = ", ".join(sorted({run["device"] for run in record["runs"]}))
    ends = {arm: last_of(arm, own, cluster) for arm, own in runs.items()}
    for arm, own in ends.items():
        record["final"][arm] = final(own, read_metrics(next(iter(runs[arm].values())) / FILE_NAME))
    record["gaps"] = list(gaps(ends))
    record["recovered"] = recovered(ends)
    record["router"] = list(routers(runs, ends))
    text = write(record, table(record), to)
    draw(record, to)
    return text


def of_runs(runs: Runs) -> Iterator[dict]:
    """Each run's speed, and its losses over training."""
    for arm, own in runs.items():
        for seed, folder in own.items():
            metrics = read_metrics(folder / FILE_NAME)
            if any(record["kind"] == "train" for record in metrics):
                yield {"arm": arm, "seed": seed, **of_run(metrics)}


def last_of(arm: str, own: Mapping[int, Path], cluster: str) -> dict[int, tuple[int, Evaluation]]:
    """Seed -> (tokens, the last evaluation that all seeds of the arm have)."""
    tokens = set.intersection(*({tokens_of(path) for path in files(folder)} for folder in own.values()))
    at = max(tokens)
    return {
        seed: (at, clustered(folder / "position_loss" / f"eval_{at:015d}.npz", cluster)) for seed, folder in own.items()
    }


def files(folder: Path) -> list[Path]:
    """The evaluations of a run, in order."""
    return sorted((folder / "position_loss").glob("eval_*.npz"))


def tokens_of(path: Path) -> int:
    """Of an evaluation."""
    return int(path.stem.removeprefix("eval_"))


def clustered(path: Path, cluster: str) -> Evaluation:
    """An evaluation whose documents are in the clusters that the expression makes."""
    found, name = load_evaluation(path), clusters_by(cluster)
    return replace(found, document_clusters=[name(one) for one in found.document_ids])


def final(own: Mapping[int, tuple[int, Evaluation]], metrics: Sequence[Mapping]) -> dict:
    """Of an arm: its losses by position, and how much they fall."""
    tokens = next(iter(own.values()))[0]
    mean = over_seeds([evaluation for _, evaluation in own.values()])
    edges, loss_NB = mean.curve.edges, mean.document_loss
    stage = [record for record in metrics if record["kind"] == "stage"][-1]
    reach = dense_reach(stage["attention"]) or 1024
    start = int(np.searchsorted(edges, reach))
    fall_N = loss_NB[:, start] - loss_NB[:, -1] if start < len(edges) - 2 else np.full(len(loss_NB), np.nan)
    each = {seed: evaluation.document_loss for seed, (_, evaluation) in own.items()}
    return {
        "tokens": tokens,
        "attention": stage["attention"],
        "seeds": list(own),
        "num_documents": len(loss_NB),
        "num_clusters": len(set(mean.document_clusters)),
        "edges": edges.tolist(),
        "mean": loss_NB.mean(0).tolist(),
        "by_seed": {seed: loss.mean(0).tolist() for seed, loss in each.items()},
        "loss": float(loss_NB.mean()),
        "trailing": float(loss_NB[:, -1].mean()),
        "falls_from": int(edges[start]),
        "falls_by": document_mean(fall_N, mean.document_clusters),
    }


def dense_reach(attention: str) -> int | None:
    """Block size times top_k of an attention in words; None for full attention."""
    word = next((word for word in attention.replace("+", " ").split() if "x" in word and word[0].isdigit()), None)
    return None if word is None else int(np.prod([int("".join(filter(str.isdigit, part))) for part in word.split("x")]))


def references(arm: str, ends: Mapping) -> Iterator[str]:
    """What an arm is held against: full attention of its own kind of model, and what shows one thing more."""
    suffix = next((arm[len(name) :] for name in (SPARSE, REFERENCE) if arm.startswith(f"{name}, ")), "")
    is_other_model = suffix == PLAIN or suffix.endswith("M")
    yield REFERENCE + (suffix if is_other_model else "")
    if not is_other_model:
        yield SPARSE
        yield "1024x2"


def gaps(ends: Mapping[str, Mapping[int, tuple[int, Evaluation]]]) -> Iterator[dict]:
    """How far each arm's losses are above what it is held against, where both had as many tokens."""
    for arm, own in ends.items():
        for reference in references(arm, ends):
            seeds = [seed for seed in own if seed in ends.get(reference, {})]
            if reference == arm or not seeds or own[seeds[0]][0] != ends[reference][seeds[0]][0]:
                continue
            if reference == "1024x2" and arm not in GRAIN:
                continue
            ours, theirs = ([side[seed][1] for seed in seeds] for side in (own, ends[reference]))
            a, b = over_seeds(ours), over_seeds(theirs)
            gap_N = a.document_loss.mean(1) - b.document_loss.mean(1)
            by_seed = [
                {"seed": seed, "mean": float(np.mean(x.document_loss - y.document_loss)),
                 "trailing": float(np.mean((x.document_loss - y.document_loss)[:, -1]))}
                for seed, x, y in zip(seeds, ours, theirs)
            ]  # fmt: skip
            yield {
                "arm": arm,
                "reference": reference,
                "seeds": seeds,
                "mean_loss": document_mean(gap_N, a.document_clusters),
                "by_seed": by_seed,
                **difference(a, b).summary(),
            }


def recovered(ends: Mapping[str, Mapping[int, tuple[int, Evaluation]]]) -> dict | None:
    """The part of the trailing gap of MoBA that the last stage closes; None where an arm is missing."""
    arms = (REFERENCE, SPARSE, SWITCHED)
    seeds = [seed for seed in ends.get(REFERENCE, {}) if all(seed in ends.get(arm, {}) for arm in arms)]
    if not seeds or len({ends[arm][seed][0] for arm in arms for seed in seeds}) > 1:
        return None
    parts = {}
    for name, columns in (("trailing", slice(-1, None)), ("behind_reach", None)):
        full, sparse, switched = (over_seeds([ends[arm][seed][1] for seed in seeds]) for arm in arms)
        if columns is None:
            columns = slice(int(np.searchsorted(full.curve.edges, 1024)), None)
        if np.array_equal(sparse.document_loss[:, columns], full.document_loss[:, columns]):
            continue
        gap_N2 = np.stack(
            [(one.document_loss - full.document_loss)[:, columns].mean(1) for one in (sparse, switched)], axis=1
        )
        sums_C2, counts_C2 = clustered_sums(gap_N2, np.ones_like(gap_N2), full.document_clusters)
        times_DC = np.random.default_rng(0).multinomial(len(sums_C2), np.full(len(sums_C2), 1 / len(sums_C2)), DRAWS)
        drawn_D2 = (times_DC @ sums_C2) / (times_DC @ counts_C2)
        low, high = np.quantile(1 - drawn_D2[:, 1] / drawn_D2[:, 0], (0.025, 0.975))
        each = []
        for seed in seeds:
            own = [ends[arm][seed][1].document_loss[:, columns].mean() for arm in arms]
            each.append(float(1 - (own[2] - own[0]) / (own[1] - own[0])))
        parts[name] = {
            "share": float(1 - gap_N2[:, 1].mean() / gap_N2[:, 0].mean()),
            "interval_95": [float(low), float(high)],
            "gap": float(gap_N2[:, 0].mean()),
            "left": float(gap_N2[:, 1].mean()),
            "by_seed": each,
            "draws_with_gap_above_0": float((drawn_D2[:, 0] > 0).mean()),
        }
    return {"seeds": seeds, **parts}


def routers(runs: Runs, ends: Mapping[str, Mapping[int, tuple[int, Evaluation]]]) -> Iterator[dict]:
    """Of each arm with a router: its loss behind `reach` under other gates minus that under its own and under full
    attention, and the statistics of its gate."""
    for arm, own in runs.items():
        sweeps = [path for folder in own.values() for path in sorted((folder / "evals" / "sweep").glob("*.json"))]
        numbers = [path for folder in own.values() for path in sorted((folder / "evals" / "routing").glob("*.json"))]
        if sweeps:
            records = [read_json(path) for path in sweeps]
            losses_SNB = np.mean([np.load(path.with_suffix(".npz"))["document_loss"] for path in sweeps], axis=0)
            names = [row["gate"] if row.get("gate") else "full" for row in records[0]["settings"]]
            last_SN = losses_SNB[:, :, -(losses_SNB.shape[2] // 8) :].mean(-1)
            clusters = next(iter(ends[arm].values()))[1].document_clusters[: last_SN.shape[1]]  # the same, in order
            gate_SN = last_SN[names.index("mean")]
            yield {
                "arm": arm,
                "eval": "gates",
                "seeds": len(sweeps),
                "num_documents": last_SN.shape[1],
                "last_eighth": dict(zip(names, last_SN.mean(1).tolist())),
                "minus_full": {n: document_mean(own - last_SN[0], clusters) for n, own in zip(names, last_SN)},
                "minus_gate": {n: document_mean(own - gate_SN, clusters) for n, own in zip(names, last_SN)},
            }
        if numbers:
            records = [read_json(path) for path in numbers]
            overall = {
                name: {"mean": statistics.fmean(record["overall"][name]["mean"] for record in records),
                       "se": max(record["overall"][name]["se"] or 0 for record in records)}
                for name in records[0]["overall"]
            }  # fmt: skip
            yield {"arm": arm, "eval": "routing", "seeds": len(numbers), "overall": overall}


# -------------------- tables


def table(record: Mapping) -> list[str]:
    """Markdown."""
    lines = [f"{record['device']}, commit {record['commit']}", "", f"`{record['command']}`", ""]
    heads = [
        "arm",
        "tokens",
        "seeds",
        "loss",
        "trailing loss",
        "falls behind the reach by",
        "minus",
        "loss",
        "trailing",
    ]
    rows = []
    for arm, own in record["final"].items():
        found = [gap for gap in record["gaps"] if gap["arm"] == arm] or [None]
        for i, gap in enumerate(found):
            start = [
                arm,
                format_count(own["tokens"]),
                len(own["seeds"]),
                f"{own['loss']:.4f}",
                f"{own['trailing']:.4f}",
            ]
            start += [f"{of(own['falls_by'])} from {format_length(own['falls_from'])}"]
            rows.append([*(start if i == 0 else [""] * len(start)), *gap_cells(gap)])
    lines += markdown(heads, rows)
    if found := record["recovered"]:
        for name, part in found.items():
            if name != "seeds":
                low, high = part["interval_95"]
                each = ", ".join(f"{100 * share:.0f} %" for share in part["by_seed"])
                share = f"{100 * part['share']:.0f} % (95 %: {100 * low:.0f} to {100 * high:.0f}; seeds {each})"
                lines += [
                    "",
                    f"Recovered by the last stage, {name}: {share} of {part['gap']:+.4f}; left {part['left']:+.4f}",
                ]
    gates = [row for row in record["router"] if row["eval"] == "gates"]
    if gates:
        heads = ["trained as", "documents", "seeds", "full", *(f"{GATES[name]} - full" for name in GATES)]
        rows = [
            [row["arm"], row["num_documents"], row["seeds"], f"{row['last_eighth']['full']:.4f}",
             *(of(row["minus_full"][name]) if name in row["minus_full"] else "-" for name in GATES)]
            for row in gates
        ]  # fmt: skip
        lines += ["", *markdown(heads, rows)]
    numbers = [row for row in record["router"] if row["eval"] == "routing"]
    if numbers:
        kept = ("captured", "oracle", "local", "random", "own", "recall", "hit", "snr")
        rows = [
            [row["arm"], row["seeds"], *(f"{row['overall'][name]['mean']:.3f}" for name in kept)] for row in numbers
        ]
        lines += ["", *markdown(["router of", "seeds", *kept], rows)]
    speeds = [
        [run["arm"], run["seed"], *(f"{stage['tokens_per_second']:,.0f}" for stage in run["stages"])]
        for run in record["runs"]
    ]
    return [*lines, "", *markdown(["arm", "seed", "tokens/s, first stage", "last stage"], speeds)]


def of(value: Mapping) -> str:
    """A mean with its interval."""
    width = value["interval_95"]
    return f"{value['mean']:+.4f}" + ("" if width is None else f" +- {width:.4f}")


def gap_cells(gap: Mapping | None) -> list[str]:
    """Of a table."""
    if gap is None:
        return ["", "", ""]
    last = {"mean": gap["difference"][-1], "interval_95": gap["interval_95"][-1]}
    seeds = [", ".join(f"{one[key]:+.4f}" for one in gap["by_seed"]) for key in ("mean", "trailing")]
    return [gap["reference"], f"{of(gap['mean_loss'])} ({seeds[0]})", f"{of(last)} ({seeds[1]})"]


# -------------------- figures


def draw(record: Mapping, to: Path) -> None:
    """Those for which there are runs."""
    where = f"{record['device']}, commit {(record['commit'] or 'unknown')[:7]}"
    main = [arm for arm in (REFERENCE, SPARSE, FIRST, SWITCHED) if arm in record["final"]]
    grain = [arm for arm in GRAIN if arm in record["final"]]
    layers = [arm for arm in record["final"] if arm.startswith("last ")]
    gates = [row for row in record["router"] if row["eval"] == "gates"]
    for name, things, plot, title in (
        ("loss_by_tokens", main, over_tokens, "Held-out loss over training (the paper's figure 3a)"),
        ("loss_by_position", main, by_position, "Loss by position (the paper's figure 5a)"),
        ("granularity", grain, granularity, "The same sparsity in smaller blocks (the paper's figure 4)"),
        ("layers", layers, by_layers, "Full attention in the last layers (the paper's figure 5b)"),
        ("gates", gates, by_gates, "Trained weights under other blocks, last eighth of the documents"),
    ):
        if len(things) > (1 if name == "granularity" else 0):
            figure = Figure(figsize=(12, 4.8), layout="constrained")
            plot(figure.subplots(1, 2), record, things)
            figure.suptitle(f"{title}\n{where}", fontsize="medium")
            save(figure, to / f"{name}.png")


def over_tokens(axes: Sequence[Axes], record: Mapping, names: Sequence[str]) -> None:
    """Means over seeds, with the least and the most shaded."""
    for axis, key, title in zip(axes, ("loss", "trailing_loss"), ("all positions", "last sixteenth")):
        for i, name in enumerate(names):
            runs = [
                {row["tokens"]: row[key] for row in run["held_out"]} for run in record["runs"] if run["arm"] == name
            ]
            tokens = sorted(set.intersection(*(set(run) for run in runs)))
            if name == SWITCHED:  # before that it is MoBA's
                tokens = tokens[-2:]
            values = np.array([[run[at] for run in runs] for at in tokens])
            style = look(i, len(names))
            axis.plot(tokens, values.mean(1), label=f"{name} ({len(runs)} seeds)", **style)
            axis.fill_between(tokens, values.min(1), values.max(1), color=style["color"], alpha=0.2, linewidth=0)
        axis.set_title(title, fontsize="medium")
        axis.set_ylabel(LOSS)
        axis.set_yscale("log")
        axis.yaxis.set_major_formatter("{x:.2f}")
        axis.yaxis.set_minor_formatter("{x:.2f}")
        axis.grid(alpha=0.3, which="both")
        token_axis(axis)
    axes[1].legend(fontsize="small", title="shaded: least to most of the seeds", title_fontsize="small")


def by_position(axes: Sequence[Axes], record: Mapping, names: Sequence[str]) -> None:
    """The curves, and what each is above full attention document by document."""
    longest = record["final"][names[0]]["edges"][-1]
    for i, name in enumerate(names):
        own, style = record["final"][name], look(i, len(names))
        edges = np.array(own["edges"])
        centres = (edges[:-1] + edges[1:]) / 2
        axes[0].plot(centres, own["mean"], label=name, **style)
        seeds = np.array([*own["by_seed"].values()])
        axes[0].fill_between(centres, seeds.min(0), seeds.max(0), color=style["color"], alpha=0.2, linewidth=0)
        gap = next((g for g in record["gaps"] if g["arm"] == name and g["reference"] == REFERENCE), None)
        if gap is None:
            continue
        aside = (i - len(names) / 2) * np.diff(edges).min() / 8
        widths = [np.nan if width is None else width for width in gap["interval_95"]]
        axes[1].errorbar(centres + aside, gap["difference"], yerr=widths, capsize=2, label=name, **style)
        for one in [width for width in [gap["band_95"]] if None not in width]:
            low, high = (np.array(gap["difference"]) + sign * np.array(one, dtype=float) for sign in (-1, 1))
            axes[1].fill_between(centres + aside, low, high, color=style["color"], alpha=0.12, linewidth=0)
    axes[0].set_ylabel(LOSS)
    axes[0].set_ylim(top=max(max(record["final"][name]["mean"][1:]) for name in names) * 1.03)
    axes[0].set_title("means (shaded: least to most of the seeds)", fontsize="medium")
    axes[1].set_ylabel("minus full (nats per token)")
    axes[1].set_title("document by document (bars: 95 % of one place; shaded: of all)", fontsize="medium")
    axes[1].axhline(0, color="black", linewidth=0.8)
    for axis in axes:
        mark_dense(axis, 1024, longest)
        length_axis(axis.xaxis, longest)
        axis.set_xlabel(POSITION)
        axis.grid(alpha=0.3)
        axis.legend(fontsize="small")


def granularity(axes: Sequence[Axes], record: Mapping, names: Sequence[str]) -> None:
    """Losses of all positions and of the last, with a dot a seed; the bars are of the differences from full."""
    full = record["final"].get(REFERENCE)
    for axis, key, title in zip(axes, ("loss", "trailing"), ("all positions", "last sixteenth")):
        gap = [next((g for g in record["gaps"] if (g["arm"], g["reference"]) == (n, REFERENCE)), None) for n in names]
        values = [record["final"][name][key] for name in names]
        widths = [
            np.nan
            if g is None
            else (g["mean_loss"]["interval_95"] if key == "loss" else g["interval_95"][-1]) or np.nan
            for g in gap
        ]
        axis.errorbar(range(len(names)), values, yerr=widths, capsize=4, label="MoBA", **look(1, 2))
        for place, name in enumerate(names):
            seeds = [np.mean(mean) if key == "loss" else mean[-1] for mean in record["final"][name]["by_seed"].values()]
            axis.plot([place] * len(seeds), seeds, ".", color="black", markersize=4)
        if full is not None:
            axis.axhline(full[key], color=color(0), label="full")
        labels = [f"{name.split('x')[1]} of {full_blocks(record, name)}" for name in names]
        axis.set_xticks(range(len(names)), [f"{label}\n({name})" for label, name in zip(labels, names)])
        axis.set_xlabel("selected blocks (block size x top k)")
        axis.set_ylabel(LOSS)
        axis.set_title(title, fontsize="medium")
        axis.grid(alpha=0.3)
    axes[0].legend(
        fontsize="small", title="bars: 95 % of the difference from full; dots: seeds", title_fontsize="small"
    )


def full_blocks(record: Mapping, name: str) -> int:
    """Blocks of a whole document."""
    return record["final"][name]["edges"][-1] // int(name.split("x")[0])


def by_layers(axes: Sequence[Axes], record: Mapping, names: Sequence[str]) -> None:
    """Losses over the number of full layers."""
    order = {SPARSE: "0\n(MoBA)"} | {name: name.split()[1] for name in sorted(names)} | {REFERENCE: "all\n(full)"}
    order = {name: label for name, label in order.items() if name in record["final"]}
    for axis, key, title in zip(axes, ("loss", "trailing"), ("all positions", "last sixteenth")):
        axis.plot(range(len(order)), [record["final"][name][key] for name in order], **look(0))
        for place, name in enumerate(order):
            seeds = [np.mean(mean) if key == "loss" else mean[-1] for mean in record["final"][name]["by_seed"].values()]
            axis.plot([place] * len(seeds), seeds, ".", color="black", markersize=4)
        axis.set_xticks(range(len(order)), list(order.values()))
        axis.set_xlabel("full-attention layers, counted from the last (dots: seeds)")
        axis.set_ylabel(LOSS)
        axis.set_title(title, fontsize="medium")
        axis.grid(alpha=0.3)


def by_gates(axes: Sequence[Axes], record: Mapping, rows: Sequence[Mapping]) -> None:
    """What each gate's loss is above full attention's, and above the gate's own."""
    for axis, key, title in zip(
        axes, ("minus_full", "minus_gate"), ("minus full attention", "minus the gate's blocks")
    ):
        for g, (gate, label) in enumerate(GATES.items()):
            known = [(r, row[key][gate]) for r, row in enumerate(rows) if gate in row[key]]
            places = [r + 0.15 * (g - 1.5) for r, _ in known]
            widths = [value["interval_95"] or np.nan for _, value in known]
            style = {"fmt": marker(g), "color": color(g), "capsize": 3, "label": label}
            axis.errorbar(places, [value["mean"] for _, value in known], yerr=widths, **style)
        axis.set_xticks(range(len(rows)), [row["arm"].replace(", ", ",\n") for row in rows], fontsize="small")
        axis.axhline(0, color="black", linewidth=0.8)
        axis.set_ylabel("nats per token")
        axis.set_xlabel("trained as")
        axis.set_title(f"{title} (bars: 95 %)", fontsize="medium")
        axis.grid(alpha=0.3)
    axes[0].legend(fontsize="small", title="blocks", title_fontsize="small")
