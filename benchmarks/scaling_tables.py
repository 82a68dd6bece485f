"""What benchmarks/scaling.py makes of its measurements: efficiency, share of communication, tables and the figure."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path

from matplotlib.figure import Figure
from matplotlib.ticker import FuncFormatter, NullLocator, PercentFormatter

from benchmarks.common import markdown, write
from conf.numbers import format_count, format_length
from evals.style import color, save

COLUMNS = {
    "throughput": {
        "tokens_per_second": "tokens/s",
        "efficiency": "efficiency",
        "mfu": "MFU",
        "mfu_dense_equivalent": "MFU, dense equivalent",
        "peak_memory_gib": "peak GiB",
        "communication": "communication",
        "communication_exposed": "exposed",
    },
    "losses": {
        "steps": "steps",
        "loss_first": "first loss",
        "loss_last": "last loss",
        "largest_relative_difference": "largest relative difference",
        "tolerance": "tolerance",
        "same": "same",
    },
    "kill": {
        "rank_seconds": "a rank killed: seconds until all ended",
        "rank_said": "said",
        "rank_lines": "lines in all",
        "torchrun_seconds": "torchrun killed: seconds until all ended",
        "torchrun_said": "said",
        "torchrun_lines": "lines in all",
        "started_from_steps": "started from steps",
        "largest_relative_difference": "largest relative difference",
        "tolerance": "tolerance",
        "same": "same",
    },
}
SHARES = {"efficiency", "mfu", "mfu_dense_equivalent", "communication", "communication_exposed"}
LABELS = ("model", "attention", "zero")


def add_efficiency(rows: Sequence[dict]) -> None:
    """Adds `efficiency` and `against` to the rows that were measured: tokens/s a GPU over that of the fewest GPUs with
    the same model, attention and ZeRO stage, and that number of GPUs."""
    measured = [row for row in rows if "failed" not in row]
    for row in measured:
        alike = [other for other in measured if all(other[key] == row[key] for key in LABELS)]
        fewest = min(alike, key=lambda other: other["gpus"])
        each, reference = (one["tokens_per_second"] / one["gpus"] for one in (row, fewest))
        row |= {"efficiency": each / reference, "against": fewest["gpus"]}


def communication(events: Iterable[Mapping]) -> dict[str, float | None]:
    """Shares of the time that a profiler's trace spans, from its `traceEvents`: in which communication runs, and in
    which nothing else does (None on a CPU, where gloo's threads run beside the trainer's)."""
    events = [e for e in events if e.get("ph") == "X" and e.get("cat") != "Trace"]
    on_gpu = [e for e in events if e["cat"] in ("kernel", "gpu_memcpy", "gpu_memset")]
    name, everything = ("nccl", on_gpu) if on_gpu else ("gloo:", events)
    everything_else = [e for e in everything if not e["name"].startswith(name)]
    whole = max(e["ts"] + e["dur"] for e in everything) - min(e["ts"] for e in everything)
    busy, without = _covered(everything), _covered(everything_else)
    share = _covered(e for e in everything if e["name"].startswith(name)) / whole
    return {"communication": share, "communication_exposed": (busy - without) / whole if on_gpu else None}


def _covered(events: Iterable[Mapping]) -> float:
    """Microseconds in which at least one of the events runs."""
    total, until = 0.0, float("-inf")
    for begin, end in sorted((e["ts"], e["ts"] + e["dur"]) for e in events):
        total += max(0.0, end - max(begin, until))
        until = max(until, end)
    return total


def publish(record: Mapping, to: Path) -> str:
    """Writes results.json, table.md and, of more than one number of GPUs, scaling.png; returns the tables' text."""
    if len({row["gpus"] for row in record.get("throughput", ()) if "failed" not in row}) > 1:
        draw(record, to / "scaling.png")
    versions = f"torch {record['torch']}, DeepSpeed {record['deepspeed']}, commit {record['commit']}"
    lines = [f"{record['hardware']}; {versions}", "", f"`{record['command']}`", "", record["convention"]]
    for part in (part for part in COLUMNS if part in record):
        heads = ["model", "attention", "ZeRO", "GPUs", *COLUMNS[part].values()]
        lines += ["", f"{part}:", "", *markdown(heads, [_cells(row, COLUMNS[part]) for row in record[part]])]
    return write(record, lines, to)


def _cells(row: Mapping, columns: Mapping[str, str]) -> list[str]:
    failed = [f"failed: {row.get('failed')}", *[""] * (len(columns) - 1)]
    measured = failed if "failed" in row else [_cell(key, row[key], row) for key in columns]
    return [row["model"], row["attention"], str(row["zero"]), str(row["gpus"]), *measured]


def _cell(key: str, value, row: Mapping) -> str:
    if value is None:
        return "-"
    if isinstance(value, bool):
        return "yes" if value else "no"
    if key in SHARES:
        beside = f" (against {row['against']} GPUs)" if key == "efficiency" and row["against"] > 1 else ""
        return f"{value:.1%}{beside}"
    if isinstance(value, float):
        return f"{value:,.0f}" if value > 1000 else f"{value:.3g}"
    if isinstance(value, list):
        value = "; ".join(str(one) for one in value) or "-"
    return str(value).replace("|", "/")


def draw(record: Mapping, path: Path) -> None:
    """tokens/s and efficiency over the number of GPUs: colour is model and attention, line style the ZeRO stage."""
    rows = [row for row in record["throughput"] if "failed" not in row]
    figure = Figure(figsize=(12, 5), layout="constrained")
    speed, efficiency = figure.subplots(1, 2)
    colours = {kind: color(i) for i, kind in enumerate(dict.fromkeys((r["model"], r["attention"]) for r in rows))}
    for label in dict.fromkeys(tuple(row[key] for key in LABELS) for row in rows):
        points = [row for row in rows if tuple(row[key] for key in LABELS) == label]
        gpus, style = [row["gpus"] for row in points], {1: "o-", 2: "s--", 3: "^:"}[label[2]]
        looks = {"color": colours[label[:2]], "label": f"{label[0]}, {label[1]}, ZeRO-{label[2]}", "markersize": 4}
        speed.plot(gpus, [row["tokens_per_second"] for row in points], style, **looks)
        efficiency.plot(gpus, [row["efficiency"] for row in points], style, **looks)
    efficiency.axhline(1, color="0.6", linewidth=0.8, zorder=0)
    efficiency.set_ylim(bottom=0)
    efficiency.yaxis.set_major_formatter(PercentFormatter(1))
    speed.set_ylim(bottom=0)
    speed.yaxis.set_major_formatter(FuncFormatter(lambda value, _: format_count(value)))
    counts = sorted({row["gpus"] for row in rows})
    for axes, title in ((speed, "tokens/s, all together"), (efficiency, "efficiency (weak scaling)")):
        axes.set_xscale("log", base=2)
        axes.set_xticks(counts, [str(n) for n in counts])
        axes.xaxis.set_minor_locator(NullLocator())
        axes.set_xlabel("GPUs, or processes on a CPU")
        axes.set_title(title)
        axes.grid(alpha=0.3)
    figure.legend(*speed.get_legend_handles_labels(), loc="outside right center", fontsize="x-small")
    length = format_length(record["setting"]["seq_len"])
    figure.suptitle(
        f"{record['hardware']}, context {length}, commit {(record['commit'] or 'unknown')[:7]}", fontsize="small"
    )
    save(figure, path)
