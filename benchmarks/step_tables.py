"""What benchmarks/step_profile.py makes of its measurements: results.json, a table and a figure of stacked bars."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

from matplotlib.figure import Figure

from benchmarks.kernel_kinds import KINDS
from conf.numbers import format_length
from evals.figures import save
from evals.results import write_json

COLUMNS = {
    "tokens_per_second": ("tokens/s", "{:,.0f}"),
    "mfu": ("MFU attended", "{:.1%}"),
    "peak_memory_gib": ("peak GiB", "{:.1f}"),
    "step_milliseconds": ("step ms", "{:.0f}"),
    "idle_share": ("idle", "{:.1%}"),
    "pairs_share": ("share of pairs", "{:.0%}"),
    "start_seconds": ("start s", "{:.0f}"),
    "first_step_seconds": ("first step s", "{:.1f}"),
}
LONGEST = 6
WORKLOADS = {
    "long": "one document of the full length a sequence",
    "packs": "packs of the shipped books; share of pairs: causal pairs as a share of those of full documents",
}


def publish(record: Mapping, to: Path) -> str:
    """Writes results.json, table.md and figure.png; returns the table's text."""
    write_json(to / "results.json", dict(record))
    text = table(record)
    (to / "table.md").write_text(text + "\n", encoding="utf-8")
    if any("milliseconds" in row for row in record["rows"]):
        draw(record, to / "figure.png")
    return text


def table(record: Mapping) -> str:
    """Markdown: where it was measured, a row a variant, and what took longest."""
    setting = record["setting"]
    lengths = {key: format_length(setting[key]) for key in ("seq_len", "batch_tokens")}
    lines = [
        f"{record['device']}; torch {record['torch']}, commit {record['commit']}",
        "",
        f"`{record['command']}`",
        "",
        f"Sequences of {lengths['seq_len']}, {lengths['batch_tokens']} tokens a step: {WORKLOADS[record['workload']]}. "
        f"Medians over {setting['steps']} steps after {setting['warmup']}. Milliseconds by kind are the sums of "
        f"kernels in {setting['profiled']} further steps (benchmarks/kernel_kinds.py says what belongs to a kind); "
        "idle: the share of the time in which no kernel ran, in other steps. start: from the start of the process "
        "to the first step; caches of compiled code are empty for the first run of a model. "
        f"{record['convention']}",
        "",
    ]
    heads = ["variant", *(head for head, _ in COLUMNS.values()), *(f"{kind} ms" for kind in KINDS)]
    lines += [f"| {' | '.join(heads)} |", "|" + "---|" * len(heads)]
    for row in record["rows"]:
        failed = [f"failed: {row.get('failed')}", *[""] * (len(heads) - 2)]
        cells = failed if "failed" in row else [_cell(row.get(key), form) for key, (_, form) in COLUMNS.items()]
        if "failed" not in row:
            cells += [_cell(row.get("milliseconds", {}).get(kind), "{:.0f}") for kind in KINDS]
        lines.append(f"| {' | '.join([row['variant'], *cells])} |")
    for kind in ("attention", "elementwise", "other"):
        lines += ["", f"Longest of {kind}, ms a step:", ""]
        for row in record["rows"]:
            kernels = row.get("longest", {}).get(kind, [])
            names = "; ".join(f"{name} {ms:.1f}" for name, ms in kernels[:LONGEST] if ms >= 0.1)
            lines += [f"- {row['variant']} ({row['attention']}): {names}"] if names else []
    return "\n".join(lines)


def _cell(value: float | None, form: str) -> str:
    return "-" if value is None else form.format(value)


def draw(record: Mapping, path: Path) -> None:
    """A bar a variant, of the milliseconds of each kind of kernel on top of each other, and a tick where the step
    ended."""
    rows = [row for row in record["rows"] if "milliseconds" in row]
    figure = Figure(figsize=(11, 1.5 + 0.55 * len(rows)), layout="constrained")
    axes = figure.subplots()
    names = [row["variant"].replace("activation_checkpointing=true", "recomputed") for row in rows]
    left = [0.0] * len(rows)
    for index, kind in enumerate(KINDS):
        widths = [row["milliseconds"][kind] for row in rows]
        axes.barh(names, widths, left=left, color=f"C{index}", label=kind)
        left = [a + b for a, b in zip(left, widths)]
    for place, row in enumerate(rows):
        axes.plot([row["step_milliseconds"]] * 2, [place - 0.4, place + 0.4], color="black", linewidth=1.5)
        axes.annotate(
            f" {row['tokens_per_second']:,.0f} tokens/s",
            (max(row["step_milliseconds"], left[place]), place),
            va="center",
            fontsize="small",
        )
    axes.invert_yaxis()
    axes.set_xlim(0, 1.2 * max(*left, *(row["step_milliseconds"] for row in rows)))
    axes.set_xlabel("milliseconds a step (black: the step as measured without a profiler)")
    figure.legend(loc="outside right upper", fontsize="small")
    length = format_length(record["setting"]["seq_len"])
    figure.suptitle(
        f"{record['device']}, {length}, {WORKLOADS[record['workload']].split(';')[0]}, commit "
        f"{(record['commit'] or 'unknown')[:7]}",
        fontsize="small",
    )
    save(figure, path)
