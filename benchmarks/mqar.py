"""Where routing, and not sparsity, costs recall: multi-query associative recall under several attentions.

    python benchmarks/mqar.py to=docs/results/mqar seeds=0,1,2 jobs=2

Trains a small model on data=synthetic/mqar with full attention, MoBA, MoBA with a full last layer, MoBA and then full
attention, and with random and local blocks in the gate's place; then gives each of them the same questions under every
attention of evals/swap.py. Writes results.json, a table, and a figure into `to`. The default setting, half an hour on
two CPU cores (jobs=2), has 32 blocks of 8 tokens, of which a query sees 4: with fewer blocks, or more of them seen,
random ones do as well, and nothing is learnt about the gate. An interrupted study goes on where it was.

The model has a key convolution of width 3 and no positional encoding. Without the convolution two layers have to find
the look-up together (the first tells each value its key), which takes many times the tokens; with it a value's own key
says whose it is. Each pair is asked for seven times in training, once in the final questions.
"""

from __future__ import annotations

import sys
from collections.abc import Mapping
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import numpy as np
from matplotlib.figure import Figure

from benchmarks.study import check_equal_tokens, evaluate, origin, read_json, run_all, split, train
from evals.figures import save, token_axis
from evals.results import write_json
from evals.swap import VARIANTS
from launch.cli import UsageError, exits_on, key_values
from train.record.metrics import FILE_NAME, read_metrics

GATE = "schedule.stages.sparse.attention.gate"
RECIPES = {
    "full": ["schedule=full_only"],
    "moba": ["schedule=moba_only"],
    "moba, last layer full": ["schedule=moba_only", "schedule.stages.sparse.attention.full_last=1"],
    "moba, then full": ["schedule=moba_then_full"],
    "random": ["schedule=moba_only", f"{GATE}=random"],
    "local": ["schedule=moba_only", f"{GATE}=local"],
}
SETTING = [
    "model=tiny",
    "model.num_layers=2",
    "model.hidden_size=64",
    "model.num_heads=1",
    "model.num_kv_heads=1",
    "model.head_dim=64",
    "model.ffn_size=64",
    "model.init_std=0.06",
    "model.key_conv=3",
    "model.rope_pattern=N",
    "data=synthetic/mqar",
    "data.sources.mqar.synthetic={task: mqar, pairs: 8, min_pairs: 4, symbols: 128, repeats: 7}",
    "data.validation.synthetic={task: mqar, pairs: 8, min_pairs: 4, symbols: 128}",
    "schedule.tokens=1638400",  # 400 steps, of which 90 % are whole too
    "schedule.seq_len=256",
    "schedule.batch_tokens=4K",
    "schedule.micro_tokens=4K",
    "schedule.block_size=8",
    "schedule.top_k=4",
    "optim.lr.peak=5e-3",
    "optim.lr.warmup_tokens=2%",
    "optim.weight_decay=0.01",
    "eval.documents=64",
    "eval.every_tokens=5%",
    "logging.every_tokens=100K",
    "logging.wandb=disabled",
    "logging.figures=false",
    "checkpoint.every_tokens=0",
]
KEYS = {
    "to": "folder of the results",
    "runs": "folder of the runs (default: runs/ in it)",
    "seeds": "comma-separated (default 0,1,2)",
    "recipes": f"which, comma-separated by ';' (default: all of {'; '.join(RECIPES)})",
    "samples": "documents of the final questions (default 256)",
    "jobs": "runs at a time (default 1)",
    "eval_device": "auto, cpu or cuda",
    "commit": "commit of the code, where this is no git checkout",
}


@exits_on(ValueError, OSError)
def main() -> None:
    """The command; see the module's text."""
    overrides, arguments = split(sys.argv[1:])
    values = key_values(arguments, KEYS, about=__doc__, required=["to"])
    to, seeds = Path(values["to"]), [int(seed) for seed in values.get("seeds", "0,1,2").split(",")]
    runs, chosen = Path(values.get("runs", to / "runs")), values.get("recipes", ";".join(RECIPES)).split(";")
    options = [f"samples={values.get('samples', '256')}", f"device={values.get('eval_device', 'auto')}"]
    names, jobs = [name.strip() for name in chosen], int(values.get("jobs", 1))
    if unknown := [name for name in names if name not in RECIPES]:
        raise UsageError(f"recipes={'; '.join(unknown)}: unknown; there are {'; '.join(RECIPES)}")
    check_equal_tokens({name: [*SETTING, *own, *overrides] for name, own in RECIPES.items()})

    def one(task: tuple[int, str]) -> dict:
        seed, name = task
        folder = runs / f"{name.replace(', ', '_').replace(' ', '_')}_seed{seed}"
        run = train(folder, [*SETTING, *RECIPES[name], *overrides], seed, log=jobs > 1)
        return _result(run, options, log=jobs > 1)

    results = run_all(one, [(seed, name) for seed in seeds for name in names], jobs)
    found = {name: results[i :: len(names)] for i, name in enumerate(names)}
    record = {**origin(sys.argv[1:], values.get("commit")), "seeds": seeds, "setting": SETTING, "recipes": found}
    write_json(to / "results.json", record)
    text = _table(found)
    (to / "table.md").write_text(text + "\n", encoding="utf-8")
    draw(found, to / "mqar.png")
    print(text)


def _result(run: Path, options: list[str], log: bool) -> dict:
    """What one run answers over training, and in the end under every attention. A run that ends with full attention is
    asked under the blocks of the setting."""
    records = read_metrics(run / FILE_NAME)
    curve = [(r["tokens"], r["recall_all"]) for r in records if r["kind"] == "eval" and r.get("recall_all") is not None]
    swapped = "moba" in [r for r in records if r["kind"] == "stage"][-1]["attention"]
    block_size, top_k = (_setting(run, key) for key in ("block_size", "top_k"))
    attention = "stage" if swapped else f"{block_size}x{top_k}"
    result = read_json(evaluate(run, "recall", f"attention={attention}", *options, log=log))
    task = result["tasks"]["mqar"]
    rows = {row["attention"]: {what: row[what]["accuracy"] for what in ("all", "far")} for row in task["variants"]}
    return {"curve": curve, "swap": rows, "device": result["device"], "gate_matters": task["gate_matters"]}


def _setting(run: Path, key: str) -> int:
    import yaml

    return yaml.safe_load((run / "config.yaml").read_text(encoding="utf-8"))["schedule"][key]


def _table(found: Mapping[str, list[dict]]) -> str:
    """Markdown: a row a training recipe; its share of right far answers under each attention, mean (least to most) of
    the seeds."""
    lines = [f"| trained with | {' | '.join(VARIANTS)} |", f"|---|{'---|' * len(VARIANTS)}"]
    for name, results in found.items():
        cells = []
        for kind in VARIANTS:
            values = [result["swap"][kind]["far"] for result in results]
            cells.append(f"{np.mean(values):.3f} ({min(values):.3f} to {max(values):.3f})")
        lines.append(f"| {name} | {' | '.join(cells)} |")
    return "\n".join(lines)


def draw(found: Mapping[str, list[dict]], path: Path) -> None:
    """Left: share of right answers over training, a line a seed. Right: the final weights under every attention."""
    figure = Figure(figsize=(12, 5), layout="constrained")
    curves, bars = figure.subplots(1, 2)
    width = 0.8 / len(VARIANTS)
    for i, (name, results) in enumerate(found.items()):
        for seed, result in enumerate(results):
            if result["curve"]:
                curves.plot(*zip(*result["curve"]), color=f"C{i}", linewidth=1.2, label=None if seed else name)
        for v, kind in enumerate(VARIANTS):
            values = [result["swap"][kind]["far"] for result in results]
            place = i + (v - 2) * width
            bars.bar(place, np.mean(values), width, color=f"C{v}", label=kind if i == 0 else None)
            bars.plot([place] * len(values), values, "k.", markersize=3)
    curves.set_xlim(left=0)
    token_axis(curves)
    curves.set_ylabel("share of right answers, own attention")
    curves.set_title("Over training (a line a seed)", fontsize="medium")
    bars.set_xticks(range(len(found)), found, rotation=15, fontsize="small")
    bars.set_title("The same weights under other blocks: far answers alone", fontsize="medium")
    bars.set_ylabel("share of right answers (dots: seeds)")
    for axes in (curves, bars):
        axes.set_ylim(0, 1.02)
        axes.grid(alpha=0.3)
        axes.legend(fontsize="small")
    save(figure, path)


if __name__ == "__main__":
    main()
