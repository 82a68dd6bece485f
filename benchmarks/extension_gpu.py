"""Extends the 125m model from 8K to 32K to 128K on one GPU, MoBA with the last three layers full beside full attention.

    python benchmarks/extension_gpu.py corpus=<folder of train-*.parquet and validation.parquet> data=.ext
    python benchmarks/extension_gpu.py data=.ext to=docs/results minutes=9

The first command, once and on any machine, tokenises the longest documents into `data`. The second prints how long it
will take, makes two runs of launch/train.py with the same tokens, three stages each, and writes
extension_gpu.{json,png} into `to`: trailing loss, tokens/s and peak memory at each length (the most that was held up
to its end: it grows with the length). Arguments with a dot go to both runs as they are. Budgets are in the ratio of
TOKENS and fill `minutes`, by the plan's FLOPs and `tflops`.
"""

from __future__ import annotations

import json
import statistics
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))

import numpy as np  # noqa: E402
import pyarrow.parquet as pq  # noqa: E402
from matplotlib.figure import Figure  # noqa: E402

from benchmarks.extension import command_line  # noqa: E402
from conf.build import ConfigError  # noqa: E402
from conf.numbers import format_length, parse_length  # noqa: E402
from data.errors import DataError  # noqa: E402
from data.prepare import prepare  # noqa: E402
from data.shards import TokenShards  # noqa: E402
from data.tokenizer import load_tokenizer  # noqa: E402
from evals.figures import save  # noqa: E402
from evals.results import short_commit  # noqa: E402
from evals.statistics import half_width  # noqa: E402
from launch.cli import UsageError, exits_on, key_values  # noqa: E402
from launch.config import detect_hardware, load  # noqa: E402
from train.plan.plan import make_plan  # noqa: E402
from train.record.metrics import FILE_NAME, read_metrics  # noqa: E402
from train.record.position_loss import PositionCurve  # noqa: E402

KEYS = {
    "corpus": "folder of parquet files: prepare the documents and stop",
    "data": "folder of the prepared documents (default .ext)",
    "to": "folder of the results",
    "runs": "folder of the runs, checkpoints included (default .ext/runs)",
    "minutes": "wall time of the whole measurement (default 9)",
    "lengths": "three lengths (default 8K,32K,128K)",
    "tflops": "model TFLOP/s that the estimate of the wall time counts on (default 180: one H100)",
    "commit": "commit of the code, where this is no git checkout",
}
TOKENS = (30, 8, 4)  # of the three stages, relative
SEQUENCES = (4, 2, 1)  # a step
THETAS = (1e4, 1e5, 1e6)
PEAKS = (6e-4, 3e-4, 3e-4)
TRAIN_TOKENS = 25_000_000
# Loading, the first steps, and evaluating and saving three times: a run.
SECONDS_BESIDE = 75
SKIP_INTERVALS = 3
KINDS = {"moba": "MoBA, last 3 layers full", "full": "full attention"}


@exits_on(DataError, ConfigError, OSError)
def main() -> None:
    """The command; see the module's text."""
    arguments = sys.argv[1:]
    overrides = [text for text in arguments if "." in text.partition("=")[0]]
    values = key_values([text for text in arguments if text not in overrides], KEYS, about=__doc__)
    data = Path(values.get("data", ".ext"))
    lengths = [parse_length(text) for text in values.get("lengths", "8K,32K,128K").split(",")]
    if "corpus" in values:
        prepare_documents(Path(values["corpus"]), data, min_tokens=lengths[-1])
        return
    if "to" not in values:
        raise UsageError("to=<folder of the results> or corpus=<folder of parquet files>: say one of them")
    to, runs = Path(values["to"]), Path(values.get("runs", ".ext/runs"))
    common = stages_of(lengths, data) + overrides
    seconds = 60 * float(values.get("minutes", 9)) - SECONDS_BESIDE * len(KINDS)
    budgets = fit_budgets(lengths, common, seconds, 1e12 * float(values.get("tflops", 180)))
    results = {"commit": values.get("commit") or short_commit(), "command": command_line(), "runs": {}}
    for kind in KINDS:
        folder = runs / kind
        command = [sys.executable, str(ROOT / "launch" / "train.py"), *common, *budgets, *attention_of(kind, lengths)]
        subprocess.run([*command, f"run.dir={folder}", f"run.name=extension_{kind}"], check=True)
        results |= {key: run_line(folder)[key] for key in ("device", "convention")}
        results["runs"][kind] = summary(folder)
        to.mkdir(parents=True, exist_ok=True)
        (to / "extension_gpu.json").write_text(json.dumps(results, indent=1) + "\n", encoding="utf-8")
    print_table(results)
    draw(results, to / "extension_gpu.png")


# -------------------- data


def prepare_documents(corpus: Path, to: Path, min_tokens: int) -> None:
    """Tokenises the longest training documents, up to TRAIN_TOKENS, and the held-out ones longer than `min_tokens`."""
    tokenizer = load_tokenizer("bpe-32k")
    tables = {path.stem: pq.read_table(path, columns=["id", "text"]) for path in sorted(corpus.glob("*.parquet"))}
    train = [
        (row["id"], row["text"])
        for name, table in tables.items()
        if name.startswith("train")
        for row in table.to_pylist()
    ]
    train.sort(key=lambda pair: (-len(pair[1]), pair[0]))
    held_out = [(row["id"], row["text"]) for row in tables["validation"].to_pylist()]
    held_out = [(name, text) for name, text in held_out if len(tokenizer.document(text)) > min_tokens]
    for name, documents, limit in (("train", train, TRAIN_TOKENS), ("validation", held_out, None)):
        origin = {"corpus": sorted(tables), "rule": "longest first" if limit else f"over {min_tokens} tokens"}
        prepare(documents, tokenizer, to / name, origin=origin, title=str(corpus), max_tokens=limit, log=print)
        lengths = TokenShards(to / name).lengths
        long = lengths[lengths > min_tokens]
        print(f"{to / name}: {len(lengths)} documents, {lengths.sum():,} tokens; longer than {min_tokens:,} tokens:")
        print(f"  {len(long)} documents, {long.sum():,} tokens")


# -------------------- the runs


def stages_of(lengths: list[int], data: Path) -> list[str]:
    """What both runs have in common, without budgets and attention."""
    overrides = ["model=125m", "data=files", f"data.path={data / 'train'}", "data.tokenizer=bpe-32k"]
    overrides += [f"data.validation.path={data / 'validation'}", "eval.documents=8", "eval.every_tokens=0"]
    overrides += ["checkpoint.every_tokens=0", "checkpoint.keep_stage_ends=false", "checkpoint.keep=1"]
    overrides += ["logging.wandb=disabled", "logging.figures=false", "optim.lr.warmup_tokens=5%"]
    for index, (length, sequences, theta, peak) in enumerate(zip(lengths, SEQUENCES, THETAS, PEAKS)):
        key = f"schedule.stages.s{index}"
        overrides += [f"+{key}.seq_len={length}", f"{key}.batch_tokens={sequences * length}"]
        overrides += [f"{key}.rope.theta={theta}", f"{key}.lr.peak={peak}"]
    return overrides


def attention_of(kind: str, lengths: list[int]) -> list[str]:
    """The attention of each stage: a sixteenth of the length is a block, but no longer at the last extension."""
    if kind == "full":
        return [f"schedule.stages.s{index}.attention.kind=full" for index in range(len(lengths))]
    blocks = [length // 16 for length in lengths[:-1]]
    settings = []
    for index, block in enumerate([*blocks, blocks[-1]]):
        key = f"schedule.stages.s{index}.attention"
        settings += [f"{key}.block_size={block}", f"{key}.top_k=3", f"{key}.full_last=3"]
    return settings


def fit_budgets(lengths: list[int], common: list[str], seconds: float, flops_per_second: float) -> list[str]:
    """The stages' budgets such that both runs together train for `seconds`; prints the estimate."""
    shares = [f"schedule.stages.s{index}.tokens={share * 10**6}" for index, share in enumerate(TOKENS)]
    stages = {kind: plan_stages(common + shares + attention_of(kind, lengths)) for kind in KINDS}
    need = sum(stage.flops for plan in stages.values() for stage in plan) / flops_per_second
    scale = seconds / need
    if scale <= 0:
        raise UsageError(f"minutes: starting, evaluating and saving alone take {SECONDS_BESIDE * len(KINDS)} seconds")
    budgets = [f"schedule.stages.s{index}.tokens={int(share * 10**6 * scale)}" for index, share in enumerate(TOKENS)]
    print(f"estimated at {flops_per_second / 1e12:g} TFLOP/s, and {SECONDS_BESIDE} seconds a run beside training:")
    for kind in KINDS:
        for stage in plan_stages(common + budgets + attention_of(kind, lengths)):
            at = f"{KINDS[kind]}, {format_length(stage.seq_len)}: {stage.tokens:,} tokens in {stage.steps} steps"
            print(f"  {at}, {stage.flops / flops_per_second:.0f} s ({stage.attended_share:.1%} of the pairs)")
    print(flush=True)
    return budgets


def plan_stages(overrides: list[str]):
    """The plan's stages of these overrides."""
    hardware = detect_hardware()
    return make_plan(load(overrides, hardware), 32768, hardware).stages


# -------------------- results


def run_line(folder: Path) -> dict:
    """The first line of a run's metrics: device and convention."""
    return next(r for r in read_metrics(folder / FILE_NAME) if r["kind"] == "run")


def summary(folder: Path) -> list[dict]:
    """What a run measured at each length."""
    records = read_metrics(folder / FILE_NAME)
    rows = []
    for stage in (r for r in records if r["kind"] == "stage"):
        of_stage = [r for r in records if r.get("stage") == stage["stage"]]
        train = [r for r in of_stage if r["kind"] == "train"]
        steady = train[SKIP_INTERVALS:] or train
        last = [r for r in of_stage if r["kind"] == "eval"][-1]
        evaluation = folder / "position_loss" / f"eval_{last['tokens']:015d}.npz"
        curve = PositionCurve.from_npz(evaluation)
        trailing = [r["trailing_loss"] for r in train[-10:] if r["trailing_loss"] is not None]
        rows.append(
            {
                "seq_len": stage["seq_len"],
                "attention": stage["attention"],
                "attended_share": train[-1]["attended_share"],
                "tokens": stage["end"] - stage["tokens"],
                "steps": len(train),
                "tokens_per_second": statistics.median(r["tokens_per_second"] for r in steady),
                "tflops": statistics.median(r["tflops"] for r in steady),
                "peak_memory_gib": train[-1]["peak_memory_gib"],
                "train_loss": statistics.fmean(r["loss"] for r in train[-10:]),
                "train_trailing_loss": statistics.fmean(trailing) if trailing else None,
                "held_out": last["loss"],
                "held_out_trailing": last["trailing_loss"],
                "documents_trailing": [round(float(row[-1]), 6) for row in np.load(evaluation)["document_loss"]],
                "edges": curve.edges.tolist(),
                "mean": [round(float(value), 5) for value in curve.mean],
                "seconds": train[-1]["wall_seconds"] - stage["wall_seconds"],
            }
        )
    return rows


def interval_95(documents: list[float] | np.ndarray) -> tuple[float, float]:
    """Mean over documents, and the half-width of its 95 % interval."""
    values = np.array(documents)
    error = values.std(ddof=1) / np.sqrt(len(values)) if len(values) > 1 else np.nan
    return float(values.mean()), float(np.nan_to_num(half_width(np.array([error]), np.array([len(values) - 1])))[0])


def print_table(results: dict) -> None:
    """Prints the results as a table for documents."""
    print(f"\n{results['device']}, commit {results['commit']}\n{results['convention']}\n")
    columns = ("attended_share", "tokens", "tokens_per_second", "tflops", "peak_memory_gib")
    columns += ("train_trailing_loss", "held_out", "held_out_trailing")
    print("| length | attention | " + " | ".join(columns) + " |\n|" + "---|" * (2 + len(columns)))
    for kind, rows in results["runs"].items():
        for row in rows:
            cells = ["-" if row[c] is None else f"{row[c]:,.0f}" if row[c] > 1000 else f"{row[c]:.4g}" for c in columns]
            print(f"| {format_length(row['seq_len'])} | {KINDS[kind]} | " + " | ".join(cells) + " |")
    for sparse, full in zip(*(results["runs"][kind] for kind in KINDS)):
        gaps = np.array(sparse["documents_trailing"]) - np.array(full["documents_trailing"])
        gap, error = interval_95(gaps)
        length = format_length(full["seq_len"])
        print(f"held-out trailing loss at {length}, MoBA minus full: {gap:+.4f} +- {error:.4f} ({len(gaps)} documents)")


def draw(results: dict, path: Path) -> None:
    """One figure: loss by position at each length, and trailing loss, tokens/s and memory over the length."""
    figure = Figure(figsize=(13, 8), layout="constrained")
    grid = figure.add_gridspec(2, 3)
    curves = figure.add_subplot(grid[0, :])
    below = [figure.add_subplot(grid[1, i]) for i in range(3)]
    styles = {"moba": ("C0", "o"), "full": ("C1", "s")}
    for kind, rows in results["runs"].items():
        color, marker = styles[kind]
        for row, dashes in zip(rows, ((1, 1), (4, 2), ())):
            edges = np.array(row["edges"])
            centres, label = (edges[:-1] + edges[1:]) / 2, f"{KINDS[kind]}, trained to {format_length(row['seq_len'])}"
            curves.plot(centres, row["mean"], color=color, label=label, dashes=dashes)
        x = range(len(rows))
        errors = [interval_95(row["documents_trailing"])[1] for row in rows]
        below[0].errorbar(x, [r["held_out_trailing"] for r in rows], yerr=errors, color=color, marker=marker, capsize=3)
        below[1].plot(x, [r["tokens_per_second"] / 1000 for r in rows], color=color, marker=marker, label=KINDS[kind])
        below[2].plot(x, [r["peak_memory_gib"] or 0 for r in rows], color=color, marker=marker)
    longest = max(row["seq_len"] for row in rows)
    ticks = [longest >> n for n in range(8)][::-1]
    curves.set_xscale("log", base=2)
    curves.set_xticks(ticks, [format_length(tick) for tick in ticks])
    curves.set_xlim(right=longest)
    curves.set(xlabel="visible tokens of the own document (log scale)", ylabel="held-out loss (nats a token)")
    curves.set_title(f"125m model extended over three lengths, {results['device']}, commit {results['commit']}")
    curves.legend(fontsize="small", ncols=2)
    titles = ("held-out trailing loss (nats a token)", "thousand tokens/s", "peak memory (GiB)")
    for axes, title in zip(below, titles):
        axes.set_xticks(range(len(rows)), [format_length(row["seq_len"]) for row in rows])
        axes.set(xlabel="length", ylabel=title)
        axes.grid(alpha=0.3)
    curves.grid(alpha=0.3)
    below[1].set_ylim(bottom=0)
    below[2].set_ylim(bottom=0)
    below[1].legend(fontsize="small")
    figure.supxlabel("Bars: 95 % intervals over documents. Same tokens in both runs.", fontsize="x-small")
    save(figure, path)


if __name__ == "__main__":
    main()
