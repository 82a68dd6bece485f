"""Three recipes on equal tokens, data and seeds: MoBA alone, full attention, and MoBA with full attention at the end.

    python benchmarks/recipes.py to=results/recipes seeds=0,1,2 model=125m data.tokenizer=bpe-32k \\
        schedule.tokens=209715200 schedule.seq_len=32K schedule.batch_tokens=256K schedule.block_size=512 \\
        schedule.top_k=3 eval_documents=64

Trains each recipe with each seed through launch/train.py, evaluates the last checkpoint on held-out documents (eval_*
arguments go to launch/evaluate.py without the prefix), and writes into `to`: results.json, a table, figure 5a of the
MoBA paper (loss by position with intervals, and the paired differences from full attention), and the training loss
around the switch. An argument stage.<key>=<value> goes to every stage of each recipe, as stage.rope.theta=400000 for a
model that is continued at a greater length (model=from_source init.source=<model>). Documents are averaged over seeds
before they are compared; how far seeds differ is listed. An interrupted study goes on where it was.
"""

from __future__ import annotations

import sys
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import numpy as np

from benchmarks.study import check_equal_tokens, evaluate, origin, read_json, run_all, split, train
from evals.comparison import plot_losses, plot_positions
from evals.paired import difference
from evals.position_loss import Evaluation, load_evaluation
from evals.results import write_json
from evals.statistics import clustered_mean
from launch.cli import exits_on, key_values
from train.record.metrics import FILE_NAME, read_metrics

RECIPES = {"moba": "moba_only", "moba_then_full": "moba_then_full", "full": "full_only"}
STAGES = {"moba": ["sparse"], "moba_then_full": ["sparse", "full"], "full": ["full"]}
KEYS = {
    "to": "folder of the results",
    "runs": "folder of the runs (default: runs/ in it)",
    "seeds": "comma-separated (default 0,1,2)",
    "jobs": "runs at a time (default 1)",
    "eval_data": "held-out documents (default: the run's own)",
    "eval_id_field": "column that names them",
    "eval_documents": "how many, at most",
    "eval_cluster": "regular expression of their clusters",
    "eval_device": "auto, cpu or cuda",
    "commit": "commit of the code, where this is no git checkout",
}


@exits_on(ValueError, OSError)
def main() -> None:
    """The command; see the module's text."""
    overrides, arguments = split(sys.argv[1:])
    values = key_values(arguments, KEYS, about=__doc__, required=["to"])
    to, seeds = Path(values["to"]), [int(seed) for seed in values.get("seeds", "0,1,2").split(",")]
    runs = Path(values.get("runs", to / "runs"))
    options = [f"{key.removeprefix('eval_')}={value}" for key, value in values.items() if key.startswith("eval_")]
    recipes, jobs = {name: _overrides(name, overrides) for name in RECIPES}, int(values.get("jobs", 1))
    check_equal_tokens(recipes)

    def one(task: tuple[int, str]) -> Path:
        seed, name = task
        run = train(runs / f"{name}_seed{seed}", recipes[name], seed, log=jobs > 1)
        return evaluate(run, "position_loss", *options, log=jobs > 1)

    paths = run_all(one, [(seed, name) for seed in seeds for name in RECIPES], jobs)
    evaluations = [load_evaluation(path) for path in paths]
    found = {name: evaluations[i :: len(RECIPES)] for i, name in enumerate(RECIPES)}
    sample = read_json(paths[0])
    means = {name: over_seeds(evaluations) for name, evaluations in found.items()}
    plot_positions(means, to / "figure_5a.png", _dense_up_to(runs, seeds[0]))
    losses = {name: read_metrics(runs / f"{name}_seed{seeds[0]}" / FILE_NAME) for name in RECIPES}
    stages = [(r["tokens"], r["stage"]) for r in losses["moba_then_full"] if r["kind"] == "stage"]
    train_losses = {name: [r for r in records if r["kind"] == "train"] for name, records in losses.items()}
    plot_losses(train_losses, to / "training_loss.png", stages)
    record = {
        **origin(sys.argv[1:], values.get("commit")),
        "device": sample["device"],
        "seeds": seeds,
        "num_documents": sample["num_documents"],
        "num_clusters": sample["num_clusters"],
        "recipes": {name: _recipe(means[name], found[name]) for name in RECIPES},
        "minus_full": {name: _minus_full(name, found, means) for name in RECIPES if name != "full"},
        "switch": [_switch(runs, seed) for seed in seeds],
    }
    write_json(to / "results.json", record)
    text = _table(record)
    (to / "table.md").write_text(text + "\n", encoding="utf-8")
    print(text)


def _overrides(name: str, overrides: Sequence[str]) -> list[str]:
    """A recipe's overrides of the configuration."""
    own = [f"schedule={RECIPES[name]}"]
    for text in overrides:
        is_stage = text.startswith("stage.")
        own += [f"schedule.stages.{stage}.{text[6:]}" for stage in STAGES[name]] if is_stage else [text]
    return own


def over_seeds(evaluations: Sequence[Evaluation]) -> Evaluation:
    """The evaluation whose documents have the mean loss of those of all seeds."""
    first = evaluations[0]
    assert all(one.document_keys == first.document_keys for one in evaluations)
    loss_NB = np.mean([one.document_loss for one in evaluations], axis=0)
    mean = clustered_mean(loss_NB, np.ones_like(loss_NB), first.document_clusters)
    trailing = first.curve.trailing._replace(value=float(mean.mean[-1]), se=float(mean.se[-1]))
    return replace(
        first, curve=replace(first.curve, mean=mean.mean, se=mean.se, trailing=trailing), document_loss=loss_NB
    )


def _dense_up_to(runs: Path, seed: int) -> int | None:
    """B * k of the MoBA runs."""
    return read_json(next((runs / f"moba_seed{seed}" / "evals" / "position_loss").glob("*.json")))["dense_up_to"]


def _recipe(mean: Evaluation, evaluations: Sequence[Evaluation]) -> dict:
    trailing = [one.curve.trailing.value for one in evaluations]
    return {
        "trailing": float(mean.curve.trailing.value),
        "trailing_se_of_documents": float(mean.curve.trailing.se),
        "trailing_by_seed": trailing,
        "loss": float(mean.document_loss.mean()),
    }


def _minus_full(name: str, found: Mapping[str, Sequence[Evaluation]], means: Mapping[str, Evaluation]) -> dict:
    """The paired difference from full attention, of the means over seeds and of each seed."""
    by_seed = [float(difference(a, b).by_bucket.mean[-1]) for a, b in zip(found[name], found["full"])]
    return {**difference(means[name], means["full"]).summary(), "trailing_by_seed": by_seed}


def _switch(runs: Path, seed: int) -> dict:
    """Training loss around the switch: the hybrid and MoBA alone read the same batches, and have the same weights up to
    it where both budgets are whole steps, so that their difference right after it is the attention's doing."""
    hybrid, moba = (read_metrics(runs / f"{name}_seed{seed}" / FILE_NAME) for name in ("moba_then_full", "moba"))
    at = next(r["tokens"] for r in hybrid if r["kind"] == "stage" and r["stage_index"] == 1)
    series = [{r["tokens"]: r["loss"] for r in records if r["kind"] == "train"} for records in (hybrid, moba)]
    after = [t for t in series[0] if t > at and t in series[1]][:10]
    before = [t for t in series[0] if t <= at][-10:]
    gap = [series[0][t] - series[1][t] for t in after]
    return {
        "seed": seed,
        "tokens": at,
        "loss_before": float(np.mean([series[0][t] for t in before])),
        "loss_after": float(np.mean([series[0][t] for t in after])),
        "largest_after": float(np.max([series[0][t] for t in after])),
        "minus_moba_on_the_same_batches": {"first": gap[0], "largest": float(np.max(gap)), "mean": float(np.mean(gap))},
        "sd_from_step_to_step": float(np.std([series[0][t] for t in before], ddof=1)) if len(before) > 1 else None,
    }


def _table(record: Mapping) -> str:
    """Markdown: recipes, differences from full attention, the switch."""
    lines = [
        "| recipe | loss | trailing loss | minus full (95 %, documents) | minus full, by seed |",
        "|---|---|---|---|---|",
    ]
    for name, own in record["recipes"].items():
        gap = record["minus_full"].get(name)
        text = "" if gap is None else f"{gap['difference'][-1]:+.4f} +- {gap['interval_95'][-1] or float('nan'):.4f}"
        seeds = "" if gap is None else ", ".join(f"{x:+.4f}" for x in gap["trailing_by_seed"])
        lines.append(f"| {name} | {own['loss']:.4f} | {own['trailing']:.4f} | {text} | {seeds} |")
    for one in record["switch"]:
        gap = one["minus_moba_on_the_same_batches"]
        lines.append(
            f"\nSwitch, seed {one['seed']}, at {one['tokens']:,} tokens: loss {one['loss_before']:.4f} before, "
            f"{one['loss_after']:.4f} after (largest {one['largest_after']:.4f}); against MoBA on the same batches "
            f"{gap['first']:+.4f} in the first interval, {gap['largest']:+.4f} at most."
        )
    return "\n".join(lines)


if __name__ == "__main__":
    main()
