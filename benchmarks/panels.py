"""What benchmarks/study.py makes of its results.json: tables, and the panels of its figure. Each panel is drawn from
the record alone, so that a figure can be made again without a run."""

from __future__ import annotations

import statistics
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure, SubFigure
from matplotlib.ticker import NullFormatter

from benchmarks.common import row_table
from conf.numbers import format_count, format_length
from evals.figures import length_axis, mark_dense, token_axis
from evals.routing_numbers import model_hit_rate
from evals.style import LOSS, POSITION, color, look, marker, save

Record = Mapping[str, Any]


def draw(record: Record, panels: Sequence[str], path: Path) -> None:
    """The study's panels beside each other, with what it is and where it was measured."""
    height = max(HEIGHTS.get(name, 5) for name in panels)
    figure = Figure(figsize=(1.5 + 5.5 * sum(WIDTHS.get(name, 1) for name in panels), height), layout="constrained")
    parts = figure.subfigures(1, len(panels), squeeze=False, width_ratios=[WIDTHS.get(name, 1) for name in panels])[0]
    for part, name in zip(parts, panels):
        PANELS[name](part, record)
    figure.suptitle(f"{record['about']}\n{measured_on(record)}", fontsize="medium")
    save(figure, path)


def measured_on(record: Record) -> str:
    """Device and commit."""
    return f"{record['device']}, commit {(record['commit'] or 'unknown')[:7]}"


def prepared(axes: Axes, title: str, ylabel: str) -> Axes:
    """The axes, with a title, a label and a grid."""
    axes.set_title(title, fontsize="medium")
    axes.set_ylabel(ylabel)
    axes.grid(alpha=0.3)
    return axes


def one(figure: SubFigure, title: str, ylabel: str) -> Axes:
    """A panel with one pair of axes."""
    return prepared(figure.add_subplot(), title, ylabel)


def known(widths: Sequence[float | None]) -> list[float]:
    """Half-widths of error bars, NaN where there is no interval."""
    return [np.nan if width is None else width for width in widths]


def centres(edges: Sequence[int]) -> np.ndarray:
    """The middle of each bucket."""
    return (np.array(edges[:-1]) + edges[1:]) / 2


def spread(axes: Axes, x: Sequence[float], values_XS: np.ndarray, label: str, style: Mapping, alpha: float) -> None:
    """A line through the means over seeds, the range of seeds shaded."""
    axes.plot(x, values_XS.mean(1), label=label, **style)
    if values_XS.shape[1] > 1:
        low, high = values_XS.min(1), values_XS.max(1)
        axes.fill_between(x, low, high, color=style["color"], alpha=alpha, linewidth=0)


def arms(rows: Sequence[Record]) -> list[str]:
    """The names of the arms in their order."""
    return list(dict.fromkeys(row["arm"] for row in rows))


def training(figure: SubFigure, record: Record) -> None:
    """Held-out trailing loss, or the share of right answers, over training. An arm that is the one before it up to a
    switch is drawn from there on."""
    recalled = any(row["recall_all"] is not None for row in record["runs"][0]["held_out"])
    key, title = ("recall_all", "Right answers") if recalled else ("trailing_loss", "Held-out trailing loss")
    axes = one(figure, f"{title} over training, own attention", "share of right answers" if recalled else LOSS)
    names = [name for name in arms(record["runs"]) if len(_course(record, name, key)) > 2]
    drawn: list[dict[int, tuple[float, ...]]] = []
    for i, name in enumerate(names):
        course = _course(record, name, key)
        same = [[t for t in course if other.get(t) == course[t]] for other in drawn]
        start = max((max(tokens) for tokens in same if len(tokens) > 1), default=0)
        drawn.append(course)
        course = {tokens: values for tokens, values in course.items() if tokens >= start}
        spread(axes, [*course], np.array([*course.values()]), shown(name), look(i, len(names)), alpha=0.15)
    axes.set_xlim(left=0)
    token_axis(axes)
    figure.legend(loc="outside lower center", ncols=3, fontsize="small")


def _course(record: Record, name: str, key: str) -> dict[int, tuple[float, ...]]:
    """Tokens -> the value of each seed."""
    seeds = [run["held_out"] for run in record["runs"] if run["arm"] == name]
    return {rows[0]["tokens"]: tuple(row[key] for row in rows) for rows in zip(*seeds)}


def own_differences(record: Record) -> list[Record]:
    """The differences of arms under the attention that they were trained with at that place; all of untrained ones."""
    stages = {(run["arm"], stage["stage"]): stage["attention"] for run in record["runs"] for stage in run["stages"]}
    return [d for d in record["differences"] if stages.get((d["arm"], d["stage"]), d["attention"]) == d["attention"]]


def difference(figure: SubFigure, record: Record) -> None:
    """Loss by position minus the reference's, document by document."""
    rows = own_differences(record)
    longest = max(row["seq_len"] for row in rows)
    rows = [row for row in rows if row["seq_len"] == longest]
    axes = one(
        figure, "Loss by position, document by document", f"minus {shown(rows[0]['reference'])} (nats per token)"
    )
    names = [row["arm"] for row in rows]
    for i, row in enumerate(rows):
        x = centres(row["edges"]) + (i - (len(rows) - 1) / 2) * np.diff(row["edges"]).min() / 10
        label = f"{shown(row['arm'])} at {format_count(row['tokens'])} tokens, under {shown(row['attention'])}"
        style = {"capsize": 2, "label": label if names.count(row["arm"]) > 1 else shown(row["arm"])}
        axes.errorbar(x, row["difference"], yerr=known(row["interval_95"]), **look(i), **style)
    mark_dense(axes, next((row["dense_up_to"] for row in rows if row["dense_up_to"]), None), longest)
    axes.axhline(0, color="black", linewidth=0.8)
    length_axis(axes.xaxis, longest)
    axes.set_xlabel(POSITION)
    axes.legend(fontsize="small", title="bars: 95 % intervals over documents", title_fontsize="small")


def stages(figure: SubFigure, record: Record) -> None:
    """Loss by position at the end of each stage, a panel per stage; what the stage added to the context is shaded."""
    ends = {stage["stage"]: stage["seq_len"] for stage in record["runs"][0]["stages"]}
    names = list(ends)[1:]
    panels = np.atleast_1d(figure.subplots(1, len(names), sharey=True))
    for axes, before, name in zip(panels, list(ends), names):
        rows = [row for row in record["measured"] if row["stage"] == name]
        for i, row in enumerate(rows):
            axes.plot(centres(row["edges"]), row["mean"], label=row["arm"], **look(i, len(rows)))
        axes.axvspan(ends[before], ends[name], color="0.9", zorder=0)
        length_axis(axes.xaxis, row["seq_len"])
        axes.set(title=f"after {format_length(ends[before])} to {format_length(ends[name])}", xlabel=POSITION)
        axes.set_ylim(top=1.02 * max(max(row["mean"][1:]) for row in record["measured"]))
        axes.grid(alpha=0.3)
    panels[0].set_ylabel(LOSS)
    panels[0].legend(fontsize="small", title="shaded: what was added", title_fontsize="small")


def trailing(figure: SubFigure, record: Record) -> None:
    """The trailing loss minus the reference's at each length, document by document."""
    rows = own_differences(record)
    axes = one(figure, "Trailing loss, document by document", f"minus {shown(rows[0]['reference'])} (nats per token)")
    for i, name in enumerate(arms(rows)):
        own = [row for row in rows if row["arm"] == name]
        gaps, widths = ([row[key][-1] for row in own] for key in ("difference", "interval_95"))
        axes.errorbar(range(len(own)), gaps, yerr=known(widths), capsize=4, label=shown(name), **look(i))
    axes.axhline(0, color="black", linewidth=0.8)
    axes.set_xticks(range(len(own)), [format_length(row["seq_len"]) for row in own])
    axes.set_xlabel("length in training and evaluation (bars: 95 %)")
    axes.legend(fontsize="small")


def speed(figure: SubFigure, record: Record) -> None:
    """tokens/s at each length."""
    axes = one(figure, "Speed", "tokens/s")
    for i, name in enumerate(arms(record["runs"])):
        own = next(run for run in record["runs"] if run["arm"] == name)["stages"]
        axes.plot(range(len(own)), [stage["tokens_per_second"] for stage in own], label=shown(name), **look(i, 2))
    axes.set_xticks(range(len(own)), [format_length(stage["seq_len"]) for stage in own])
    axes.yaxis.set_major_formatter(lambda value, _: format_count(value))
    axes.set_xlabel("length in training")
    axes.set_ylim(bottom=0)
    axes.legend(fontsize="small")


def layers(figure: SubFigure, record: Record) -> None:
    """Held-out loss in the end over the number of full layers: means, and a dot per seed."""
    axes = one(figure, "Held-out answers after fine-tuning", "loss (nats per supervised token)")
    runs = [run for run in record["runs"] if run["arm"].endswith(" full")]
    counts = sorted({int(run["arm"].split()[0]) for run in runs})
    for i, (key, label) in enumerate({"loss": "all answers", "trailing_loss": "in the last sixteenth"}.items()):
        values = [[run["held_out"][-1][key] for run in runs if run["arm"] == f"{n} full"] for n in counts]
        axes.plot(counts, [statistics.fmean(v) for v in values], label=label, **look(i, 2))
        for n, seeds in zip(counts, values):
            axes.plot([n] * len(seeds), seeds, ".", color=color(i), markersize=3)
    axes.set_xticks(
        counts, [f"{n}\n(MoBA)" if n == 0 else f"{n}\n(all)" if n == counts[-1] else str(n) for n in counts]
    )
    axes.set_xlabel("full-attention layers, counted from the last (dots: seeds)")
    axes.set_ylim(bottom=0)
    axes.legend(fontsize="small")


def recall(figure: SubFigure, record: Record) -> None:
    """Right answers of far evidence, of the weights of each arm under each attention."""
    axes = one(
        figure, "The same weights under other blocks: answers that only the gate reaches", "share of right answers"
    )
    names, variants = arms(record["measured"]), list(record["measured"][0]["right"])
    for v, variant in enumerate(variants):
        for a, name in enumerate(names):
            seeds = [row["right"][variant]["far"] for row in record["measured"] if row["arm"] == name]
            place, label = a + 0.14 * (v - (len(variants) - 1) / 2), shown(variant) if a == 0 else None
            axes.plot([place] * 2, [min(seeds), max(seeds)], color=color(v), linewidth=1)
            axes.plot(place, statistics.fmean(seeds), marker(v), markersize=6, color=color(v), label=label)
    axes.set_xticks(range(len(names)), [shown(name).replace(", ", ",\n") for name in names], fontsize="small")
    axes.set_xlabel("trained with (lines: least to most of the seeds)")
    axes.set_ylim(0, 1.05)
    figure.legend(fontsize="small", title="evaluated with", loc="outside lower center", ncols=len(variants))


def needle(figure: SubFigure, record: Record) -> None:
    """Exact answers over context length, an axes per attention of the evaluation, a line per training."""
    names, attentions = arms(record["measured"]), list(record["measured"][0]["right"])
    for axes, attention in zip(figure.subplots(1, len(attentions), sharey=True), attentions):
        prepared(axes, f"evaluated with {shown(attention)}", "")
        for i, name in enumerate(names):
            by_length = [row["right"][attention] for row in record["measured"] if row["arm"] == name]
            lengths = [length for length in by_length[0] if length != "all"]
            means = [statistics.fmean(row[length] for row in by_length) for length in lengths]
            axes.plot(lengths, means, label=shown(name), **look(i, len(names)))
        axes.set_ylim(-0.02, 1.05)
    figure.supylabel("share of right answers", fontsize="medium")
    figure.supxlabel("context length (tokens)", fontsize="medium")
    axes.legend(fontsize="small", title="trained with", title_fontsize="small")


def gates(figure: SubFigure, record: Record) -> None:
    """What each gate's loss is above full attention's, how much of full attention's probability its blocks hold, and
    the answers that are right with it; a colour per arm."""
    found = [(row["arm"], {_gate_of(one): one for one in row["settings"][1:]}, row) for row in record["measured"]]
    names = list(dict.fromkeys(name for _, own, _ in found for name in own))
    names.sort(key=lambda name: -np.mean([own[name]["minus_full"]["mean"] for _, own, _ in found if name in own]))
    tasks = list(record["measured"][0]["settings"][0]["right"])
    has_captured = all("captured" in one for _, own, _ in found for one in own.values())
    every = figure.subplots(1, 1 + has_captured + len(tasks), sharey=True, squeeze=False)[0]
    titles = ["Loss of the last eighth", *["Probability held"] * has_captured]
    for axes, title in zip(every, [*titles, *(f"Retrieval: {task.replace('_', ' ')}" for task in tasks)]):
        prepared(axes, title, "")
    for a, (arm, own, row) in enumerate(found):
        style = {"fmt": marker(a), "color": color(a), "capsize": 3, "label": arm}
        places = [names.index(name) + 0.1 * (a - (len(found) - 1) / 2) for name in own]
        gaps = [one["minus_full"] for one in own.values()]
        every[0].errorbar(
            [gap["mean"] for gap in gaps], places, xerr=known([gap["interval_95"] for gap in gaps]), **style
        )
        if has_captured:
            every[1].errorbar([one["captured"] for one in own.values()], places, **style)
        for axes, task in zip(every[1 + has_captured :], tasks):
            gaps = [one.get("right_minus_full", {}).get(task, {}).get("interval_95") for one in own.values()]
            axes.errorbar(known([one["right"][task] for one in own.values()]), places, xerr=known(gaps), **style)
            axes.axvline(row["settings"][0]["right"][task], color=color(a), linewidth=0.8, linestyle=":")
    every[0].set_yticks(range(len(names)), names)
    every[0].set_xscale("log")
    every[0].xaxis.set_minor_formatter(NullFormatter())
    every[0].set_xlabel("minus full attention (nats per token, log scale)")
    every[-1].set_xlabel("share of right answers")
    figure.supxlabel(
        "bars: 95 % of the difference from full attention (dotted), document by document", fontsize="small"
    )
    if len(found) > 1:
        every[0].legend(fontsize="small")


def _gate_of(setting: Record) -> str:
    gate = "mean" if setting["gate"] == setting["attention"] else setting["gate"]  # of a named attention
    return shown(gate) + ("\nand the first" if setting["first_blocks"] else "")


def kept(figure: SubFigure, record: Record) -> None:
    """Trailing loss and right answers of each arm under each attention, beside the reference's under full attention."""
    rows = record["differences"]
    attentions = list(dict.fromkeys(row["attention"] for row in rows))
    tasks = [key for key in rows[0] if key not in ("loss", "trailing") and isinstance(rows[0][key], Mapping)]
    of = shown(rows[0]["reference"])
    for axes, what in zip(figure.subplots(1, 1 + len(tasks)), ("trailing", *tasks)):
        title = "Trailing loss" if what == "trailing" else f"Retrieval: {what.replace('_', ' ')}"
        asked = [row for row in rows if what in row]  # arms that end with full attention have the loss alone
        names = arms(asked)
        prepared(axes, title, f"minus {of} (nats per token)" if what == "trailing" else "share of right answers")
        for a, attention in enumerate(attentions):
            own = [row for row in asked if row["attention"] == attention]
            places = [names.index(row["arm"]) + 0.14 * (a - (len(attentions) - 1) / 2) for row in own]
            gaps = [row[what]["minus_reference"] for row in own]
            values = [gap["mean"] if what == "trailing" else row[what]["value"] for row, gap in zip(own, gaps)]
            style = {"fmt": marker(a), "color": color(a), "capsize": 2, "label": f"under {shown(attention)}"}
            axes.errorbar(places, values, yerr=known([gap["interval_95"] for gap in gaps]), **style)
        level = rows[0][what]["value"] - rows[0][what]["minus_reference"]["mean"]
        axes.axhline(0 if what == "trailing" else level, color="black", linewidth=0.8)
        axes.set_xticks(range(len(names)), [shown(name).replace(", ", ",\n") for name in names], fontsize="small")
    title = f"line: {of}, trained alike; bars: 95 % of the difference from it"
    handles = axes.get_legend_handles_labels()
    figure.legend(*handles, fontsize="small", title=title, loc="outside lower center", ncols=len(attentions))


def blocks(figure: SubFigure, record: Record) -> None:
    """Right answers of far evidence over block size at an equal share of the keys, beside how often the gate picks the
    block of the evidence and how often the signal-to-noise model says it does; an axes per training and length."""
    groups: dict[tuple, list[Record]] = {}
    for row in by_block_size(record):
        groups.setdefault((-row["seq_len"], row["arm"], row["seed"]), []).append(row)
    grid = figure.subplots(-(-len(groups) // 3), 3, squeeze=False, sharey=True)
    for axes, ((length, arm, _), rows) in zip(grid.flat, sorted(groups.items(), key=lambda group: group[0][0])):
        prepared(axes, f"trained with {shown(arm)}, {format_length(-length)} tokens", "")
        sizes = np.array([row["block_size"] for row in rows], dtype=float)
        for place, (name, i) in enumerate(GATES.items()):
            share = np.array([row["right"][name]["far"] for row in rows])
            low, high = np.array([row["right"][name]["far_interval_95"] for row in rows]).T
            bars = np.clip([share - low, high - share], 0, None)
            label = f"right answers, {LABELS['mean' if name == 'moba' else name]}"
            style = {"color": color(i), "marker": marker(i), "markersize": 4, "capsize": 2, "label": label}
            axes.errorbar(sizes * 1.03 ** (place - 1.5), share, yerr=bars, linewidth=1, **style)
        axes.plot(sizes, [row["hit"] for row in rows], "kx", markersize=7, label="block of the evidence picked")
        axes.plot(sizes, [row["model_hit"] for row in rows], "k--", label="the same by the model, ratio measured")
        label = "the same, ratio of the smallest blocks by sqrt(1 / size)"
        axes.plot(sizes, [row["scaled_hit"] for row in rows], "k:", label=label)
        axes.set_xscale("log", base=2)
        names = [f"{row['block_size']}x{row['picks'] + 1}" for row in rows]
        axes.set_xticks(sizes, names, fontsize="small")
        axes.set_xticks([], minor=True)
        axes.set_xlabel("block size x top_k", fontsize="small")
        axes.set_ylim(-0.02, 1.05)
    for axes in grid.flat[len(groups) :]:
        axes.remove()
    figure.supylabel("share of far answers (bars: 95 %)", fontsize="medium")
    figure.legend(*grid.flat[0].get_legend_handles_labels(), fontsize="small", loc="outside lower center", ncols=3)


GATES = {"oracle": 0, "moba": 1, "random": 2, "local": 4}
"""Those of evals/swap.py, with the number of their colour: black is the model's."""


def by_block_size(record: Record) -> list[Record]:
    """A row per evaluation with `evidence`, block sizes ascending within an arm, seed and length. It has the numbers of
    the head whose gate finds the evidence best, `block_size`, and two hit rates of the model: `model_hit` for the
    head's own ratio, `scaled_hit` for that of the smallest blocks, which the model lets fall with the root of the size.
    """
    groups: dict[tuple, list[dict]] = {}
    for row in record["measured"]:
        size = int(row["attention"].split()[-1].partition("x")[0])
        groups.setdefault((row["arm"], row["seed"], row["seq_len"]), []).append(dict(row) | {"block_size": size})
    found = []
    for rows in groups.values():
        rows.sort(key=lambda row: row["block_size"])
        best = int(np.argmax(np.sum([[head["hit"] for head in row["evidence"]] for row in rows], axis=0)))
        first = rows[0]["evidence"][best]["snr"]
        for row in rows:
            own = row["evidence"][best]
            snr = first * (rows[0]["block_size"] / row["block_size"]) ** 0.5
            scaled = float(model_hit_rate(snr, own["candidates"], own["picks"]))
            found.append(row | own | {"scaled_snr": snr, "scaled_hit": scaled})
    return found


LABELS = {"mean": "MoBA's gate", "local": "latest blocks", "random": "random blocks", "oracle": "best blocks"}
LABELS |= {"variance": "variance", "covariance": "covariance", "bounds": "Quest's bound"}
LABELS |= {"shared": "one choice a group", "sinks": "MoBA's gate\nand 4 first tokens"}
LABELS |= {"moba": "MoBA", "full": "full attention"}


def shown(name: str) -> str:
    """An arm, an attention or a gate as a figure names it."""
    return LABELS.get(name, name.replace("moba", "MoBA"))


WIDTHS = {"stages": 2.4, "recall": 1.5, "needle": 2.4, "blocks": 2.2, "kept": 2.8, "gates": 2.8}
HEIGHTS = {"blocks": 8.5}
PANELS: dict[str, Callable[[SubFigure, Record], None]] = {
    f.__name__: f for f in (training, difference, stages, trailing, speed, layers, recall, needle, gates, kept, blocks)
}


# -------------------- tables


def table(record: Record) -> list[str]:
    """Markdown: where it was measured, and what was; of losses by position the last."""
    about = [({"arm": run["arm"], "seed": run["seed"]}, run) for run in record["runs"]]
    parts = {
        "measured": [_without(row, "evidence") for row in record["measured"] if "settings" not in row],
        "settings": [
            {"arm": row["arm"], "seed": row["seed"]} | setting
            for row in record["measured"]
            for setting in row.get("settings", ())
        ],
        "differences": record.get("differences", ()),
        "held out, in the end": [arm | run["held_out"][-1] for arm, run in about if run["held_out"]],
        "stages": [arm | stage for arm, run in about for stage in run["stages"]],
        "switches": record.get("switches", ()),
    }
    return tables(record, parts)


def _without(row: Record, key: str) -> Record:
    return {name: value for name, value in row.items() if name != key}


def tables(record: Record, parts: Mapping[str, Sequence[Record]]) -> list[str]:
    """Markdown: where it was measured, and the parts that have rows."""
    lines = [record["about"], "", f"{record['device']}, commit {record['commit']}", "", f"`{record['command']}`"]
    return lines + [line for name, rows in parts.items() if rows for line in ("", f"{name}:", "", *row_table(rows))]
