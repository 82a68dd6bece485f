"""Extends a very small model from 2K to 4K to 8K to 16K on a CPU: in one run, as four chained runs, and in three ways.

    python benchmarks/extension.py to=docs/results

The one run and the chain (init.source, init.optimizer, init.data) must train on the same tokens with the same losses
and end in the same weights, bit for bit: it stops if they do not. Both raise the RoPE base with the length. Two more
runs go on from the chain's 2K model, with positions interpolated and with nothing done. Every evaluation is at 16K, so
that it shows what a model does beyond the length it was trained at; writes extension_cpu.{json,png} into `to`.
Arguments with a dot go to all runs as they are.
"""

from __future__ import annotations

import json
import platform
import subprocess
import sys
import time
from itertools import pairwise
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))

import numpy as np  # noqa: E402
from matplotlib.figure import Figure  # noqa: E402

from conf.numbers import format_length  # noqa: E402
from evals.figures import length_axis, save  # noqa: E402
from evals.results import short_commit  # noqa: E402
from launch.cli import exits_on, key_values  # noqa: E402
from train.checkpoint import store  # noqa: E402
from train.record.metrics import FILE_NAME, read_metrics  # noqa: E402
from train.record.position_loss import PositionCurve  # noqa: E402

KEYS = {
    "to": "folder of the results",
    "runs": "folder of the runs; finished ones are not repeated (default runs/extension_cpu)",
    "tokens": "budgets of the four stages (default 240K,24K,24K,32K)",
    "lengths": "lengths of the four stages (default 2K,4K,8K,16K)",
    "commit": "commit of the code, where this is no git checkout",
}
# Two layers, the first sparse and the second full, on bytes: so that 16K is affordable on a CPU.
MODEL = ("hidden_size=128", "num_layers=2", "num_heads=2", "num_kv_heads=1", "ffn_size=384")
WAYS = {"theta": "RoPE base raised", "interpolation": "positions interpolated", "nothing": "nothing done"}
MUST_EQUAL = ("stage", "loss", "trailing_loss", "grad_norm", "lr")


@exits_on(OSError)
def main() -> None:
    """The command; see the module's text."""
    arguments = sys.argv[1:]
    overrides = [text for text in arguments if "." in text.partition("=")[0]]
    values = key_values([text for text in arguments if text not in overrides], KEYS, about=__doc__, required=["to"])
    to, runs = Path(values["to"]), Path(values.get("runs", "runs/extension_cpu"))
    lengths = values.get("lengths", "2K,4K,8K,16K").split(",")
    tokens = values.get("tokens", "240K,24K,24K,32K").split(",")
    common = common_settings(lengths[-1]) + overrides
    began = time.monotonic()

    def stages(way: str, indices: range) -> list[str]:
        return [text for index in indices for text in stage_settings(index, lengths[index], tokens[index], way)]

    everything = range(len(lengths))
    one = run(runs / "one", [*common, *stages("theta", everything)])
    chain: list[Path] = []
    for index in everything:
        chain.append(run(runs / f"chain_{index}", [*common, *stages("theta", range(index, index + 1)), *after(chain)]))
    compared = compare(one, chain)
    folders = {"theta": [one], "interpolation": [], "nothing": []}
    for way in ("interpolation", "nothing"):
        later = [*common, *stages(way, everything[1:]), *after(chain[:1])]
        folders[way] = [chain[0], run(runs / way, later)]
    results = {
        "commit": values.get("commit") or short_commit(),
        "command": command_line(),
        "machine": f"{platform.machine()} CPU, 1 process; {round(time.monotonic() - began)} s in all",
        "one_run_and_four_chained": compared,
        "ways": {way: evaluations(paths) for way, paths in folders.items()},
    }
    to.mkdir(parents=True, exist_ok=True)
    (to / "extension_cpu.json").write_text(json.dumps(results, indent=1) + "\n", encoding="utf-8")
    print_table(results)
    draw(results, to / "extension_cpu.png")


def common_settings(longest: str) -> list[str]:
    """What all runs share."""
    overrides = ["model=tiny", *(f"model.{text}" for text in MODEL), "data=embedded", "data.tokenizer=bytes"]
    overrides += ["optim.lr.warmup_tokens=5%", f"eval.seq_len={longest}", "eval.documents=2"]
    overrides += ["eval.every_tokens=0", "checkpoint.every_tokens=0"]
    return [*overrides, "logging.wandb=disabled", "logging.figures=false", "run.device=cpu"]


def stage_settings(index: int, length: str, tokens: str, way: str) -> list[str]:
    """The stage number `index` under one way of extending; the first is the same under all."""
    key = f"schedule.stages.at_{length}"
    settings = [f"+{key}.tokens={tokens}", f"{key}.seq_len={length}"]
    settings += [f"{key}.batch_tokens={length}"]
    settings += [f"{key}.attention.num_blocks=32", f"{key}.attention.top_k=4", f"{key}.attention.full_last=1"]
    settings += [f"{key}.lr.peak={3e-3 if index == 0 else 1e-3}"]
    if index and way == "theta":
        settings += [f"{key}.rope.theta={10000 * 4**index}"]
    if index and way == "interpolation":
        settings += [f"{key}.rope.scaling=linear", f"{key}.rope.factor={2**index}"]
    return settings


def after(chain: list[Path]) -> list[str]:
    """What makes a run the continuation of the chain's last."""
    return [f"init.source={chain[-1]}", "init.optimizer=true", "init.data=true"] if chain else []


def run(folder: Path, overrides: list[str]) -> Path:
    """The folder, with a finished run in it; one that is there already is not repeated."""
    command = [sys.executable, str(ROOT / "launch" / "train.py"), *overrides, f"run.dir={folder}"]
    subprocess.run([*command, f"run.name={folder.name}"], check=True)
    return folder


# -------------------- one run against the chain


def compare(one: Path, chain: list[Path]) -> dict:
    """How many steps were compared; SystemExit if the chain is not the one run, bit for bit."""
    records = [r for r in read_metrics(one / FILE_NAME) if r["kind"] in ("train", "eval")]
    chained, start = [], 0
    for folder in chain:
        own = [r for r in read_metrics(folder / FILE_NAME) if r["kind"] in ("train", "eval")]
        chained += [r | {"tokens": r["tokens"] + start} for r in own]
        start = chained[-1]["tokens"]
    ours, theirs = ([{k: r.get(k) for k in ("kind", "tokens", *MUST_EQUAL)} for r in log] for log in (records, chained))
    if ours != theirs:
        first = next((a, b) for a, b in zip(ours, theirs) if a != b)
        raise SystemExit(f"the chain is not the one run: {first[0]} against {first[1]}")
    ends = [store.newest(folder) for folder in (one, chain[-1])]
    loaders = [store.read(path).state["loader"] for path in ends]
    if loaders[0] != loaders[1]:
        raise SystemExit(f"the chain stands elsewhere in the data: {loaders[0]} against {loaders[1]}")
    files = sorted(path.name for path in ends[0].glob("*-of-*.safetensors"))
    for name in files:
        if (ends[0] / name).read_bytes() != (ends[1] / name).read_bytes():
            raise SystemExit(f"the chain's {name} differs from the one run's")
    steps = sum(r["kind"] == "train" for r in ours)
    documents = loaders[0]["draws"]
    print(f"\none run and {len(chain)} chained runs: {steps} steps, every loss, gradient norm and evaluation equal;")
    print(f"the same {documents} documents drawn; {', '.join(files)} equal byte for byte\n", flush=True)
    return {"steps_equal": steps, "documents_drawn": documents, "files_equal": files}


# -------------------- the three ways


def evaluations(folders: list[Path]) -> list[dict]:
    """The evaluation at the end of each stage, over the runs in order."""
    found = []
    for folder in folders:
        records = read_metrics(folder / FILE_NAME)
        for record in (r for r in records if r["kind"] == "eval"):
            curve = PositionCurve.from_npz(folder / "position_loss" / f"eval_{record['tokens']:015d}.npz")
            found.append(
                {
                    "seq_len": record["seq_len"],
                    "edges": curve.edges.tolist(),
                    "mean": [round(float(value), 5) for value in curve.mean],
                }
            )
    return found


def within(evaluation: dict, low: int, high: int) -> float:
    """Mean loss over the buckets between two positions."""
    edges = np.array(evaluation["edges"])
    inside = (edges[:-1] >= low) & (edges[1:] <= high)
    return float(np.array(evaluation["mean"])[inside].mean())


def print_table(results: dict) -> None:
    """Held-out loss in the half of the context that an extension adds, before and after it."""
    print(f"{results['machine']}, commit {results['commit']}")
    print("held-out loss (nats a token) in the second half of the new length, before and after each extension:")
    for way, curves in results["ways"].items():
        for before, later in pairwise(curves):
            old, new = before["seq_len"], later["seq_len"]
            change = f"{within(before, old, new):.3f} -> {within(later, old, new):.3f}"
            print(f"  {format_length(old):>3} to {format_length(new):<3}  {WAYS[way]:<22}  {change}")


def draw(results: dict, path: Path) -> None:
    """One panel an extension: loss by position before it (dashed) and after it (solid), for the three ways."""
    ways = results["ways"]
    count = len(ways["theta"]) - 1
    figure = Figure(figsize=(5 * count, 4.8), layout="constrained")
    panels = figure.subplots(1, count, sharey=True)
    for index, axes in enumerate(panels):
        for color, (way, curves) in zip(("C0", "C1", "C2"), ways.items()):
            before, later = curves[index], curves[index + 1]
            for curve, dash, when in ((before, "--", "before"), (later, "-", "after")):
                edges = np.array(curve["edges"])
                label = f"{WAYS[way]}, {when}"
                axes.plot((edges[:-1] + edges[1:]) / 2, curve["mean"], dash, color=color, label=label, linewidth=1.4)
        longest = max(edges)
        axes.axvspan(before["seq_len"], later["seq_len"], color="0.9", zorder=0)
        axes.set_xlim(0, longest)
        length_axis(axes.xaxis, longest)
        axes.set_title(f"{format_length(before['seq_len'])} to {format_length(later['seq_len'])}")
        axes.set_xlabel("visible tokens of the own document")
        axes.grid(alpha=0.3)
    panels[0].set_ylabel("held-out loss (nats a token)")
    panels[0].legend(fontsize="x-small")
    figure.suptitle(f"Two-layer model on bytes, commit {results['commit']}", fontsize="medium")
    figure.supxlabel(
        "Shaded: what the extension adds. 2 held-out books, all at the longest length.", fontsize="x-small"
    )
    save(figure, path)


def command_line() -> str:
    """What was asked for, without the places of this machine."""
    places = ("to=", "runs=", "data=", "data.cache_dir=", "commit=")
    return " ".join(text for text in sys.argv[1:] if not text.startswith(places))


if __name__ == "__main__":
    main()
