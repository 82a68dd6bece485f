"""Runs one of the training studies of benchmarks/studies.py: its arms, their evaluations, one table, one figure.

    python benchmarks/study.py mqar to=docs/results/mqar_cpu jobs=2 run.device=cpu
    python benchmarks/study.py recipes to=results/recipes model=models/SmolLM2-135M data=shards/train \\
        validation=shards/validation documents=16 'cluster=[^:(]*' jobs=3

Arguments with a dot go to all runs of launch/train.py. `to` gets results.json, table.md and figure.png. Runs and
evaluations that are finished are not made again: the same command goes on where it was interrupted. Small models leave
a GPU idle between their launches: `jobs` runs at a time fill it; what a run says goes to <run>.log beside it.

Documents are averaged over seeds before they are compared; the differences of single seeds are listed.
"""

from __future__ import annotations

import re
import shlex
import sys
from collections.abc import Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))

import numpy as np  # noqa: E402

from benchmarks.common import launch, origin, read_json, speeds, split, write  # noqa: E402
from benchmarks.panels import draw, table  # noqa: E402
from benchmarks.studies import STUDIES, Arm, Study  # noqa: E402
from evals.paired import difference  # noqa: E402
from evals.position_loss import Evaluation, load_evaluation, plain  # noqa: E402
from evals.statistics import half_width  # noqa: E402
from evals.swap import document_mean  # noqa: E402
from launch.cli import UsageError, exits_on, key_values  # noqa: E402
from launch.config import load  # noqa: E402
from train.checkpoint.checkpoint_dir import checkpoints  # noqa: E402
from train.record.metrics import FILE_NAME, read_metrics  # noqa: E402

KEYS = {
    "to": "folder of the results",
    "runs": "folder of the runs (default: runs/ in it)",
    "model": "Hugging Face directory of the model that is continued or evaluated, where the study takes one",
    "data": "training documents: shards of launch/prepare_data.py, or text",
    "validation": "held-out documents, likewise",
    "documents": "held-out documents at most (default 16)",
    "cluster": "regular expression; held-out ids with the same match are one cluster of the errors",
    "seeds": "comma-separated (default: as many as the study has, from 0)",
    "arms": "which, separated by ';' (default: all)",
    "jobs": "runs at a time (default 1)",
    "commit": "commit of the code, where this is no git checkout",
}
BRACES = re.compile(r"\{(model|data|validation|documents)\}")
AFTER_SWITCH = 10
"""Log intervals after a switch of which the largest difference is given."""


@dataclass(frozen=True)
class Command:
    """A study and what was asked for."""

    study: Study
    values: Mapping[str, str]
    overrides: tuple[str, ...]
    runs: Path

    def filled(self, text: str) -> list[str]:
        """The words of a declared line, with the command's arguments in the place of names in braces."""

        def value(match: re.Match) -> str:
            if match[1] not in self.values:
                raise UsageError(f"{match[1]}=... is missing: {KEYS[match[1]]}")
            return self.values[match[1]]

        return [BRACES.sub(value, word) for word in shlex.split(text)]

    def training(self, name: str, seed: int) -> list[str]:
        """The overrides of a run."""
        arm = self.study.arms[name]
        start = [f"init.source={self.folder(arm.start, seed)}"] if arm.start else []
        words = [*self.filled(f"{self.study.common} {arm.train}"), *start, *self.overrides]
        return [*words, f"run.dir={self.folder(name, seed)}", f"run.seed={seed}"]

    def folder(self, name: str, seed: int) -> Path:
        """The directory of a run."""
        return self.runs / f"{re.sub(r'[^A-Za-z0-9.]+', '_', name)}_seed{seed}"

    def evals(self, arm: Arm) -> tuple[str, ...]:
        """The evaluations of an arm."""
        return self.study.evals if arm.evals is None else arm.evals


@exits_on(ValueError, OSError)
def main() -> None:
    """The command; see the module's text."""
    name, *arguments = sys.argv[1:] or [""]
    if name in ("--help", "-h", "") or name not in STUDIES:
        listed = "\n".join(f"  {key:<15}{one.about}" for key, one in STUDIES.items())
        if name in ("--help", "-h"):
            key_values(["--help"], KEYS, about=f"{__doc__}\n{listed}\n")
        raise UsageError(f"study {name!r}: there are {', '.join(STUDIES)}; say one of them first")
    overrides, own = split(arguments, KEYS)
    study = STUDIES[name]
    values = {"documents": "16", **study.defaults, **key_values(own, KEYS, about=__doc__, required=["to"])}
    to = Path(values["to"])
    command = Command(study, values, tuple(overrides), Path(values.get("runs", to / "runs")))
    chosen = values.get("arms", ";".join(study.arms)).split(";")
    if unknown := [arm for arm in chosen if arm not in study.arms]:
        raise UsageError(f"arms={';'.join(unknown)}: there are {'; '.join(study.arms)}")
    if study.reference and study.reference not in chosen:
        raise UsageError(f"arms={';'.join(chosen)}: the others are held against {study.reference!r}; add it")
    seeds = [int(seed) for seed in values["seeds"].split(",")] if "seeds" in values else list(range(study.seeds))
    check(command, chosen)
    rounds, jobs = tasks_of(study, chosen, seeds), int(values.get("jobs", 1))
    found = [measured for tasks in rounds for measured in run_all(command, tasks, jobs)]
    record = {"study": name, "about": study.about, **origin(arguments, values.get("commit")), "seeds": seeds}
    record |= collect(command, [task for tasks in rounds for task in tasks], found)
    text = write(record, table(record), to)
    draw(record, study.panels, to / "figure.png")
    print(text)


def check(command: Command, chosen: Sequence[str]) -> None:
    """ConfigError or ValueError for mistakes that would show in a run: overrides, and budgets that are not equal
    because stages are rounded up to whole steps."""
    tokens = {}
    for name in chosen:
        arm = command.study.arms[name]
        if arm.train is None or arm.start:  # what it starts from is not there yet
            continue
        budget = load(command.training(name, 0)).schedule.tokens
        if "schedule.tokens=" not in arm.train:
            tokens[name] = budget
    if len(set(tokens.values())) > 1:
        budgets = ", ".join(f"{name} {count:,}" for name, count in tokens.items())
        raise ValueError(f"not equal tokens: {budgets}; choose schedule.tokens so that 90 % and 10 % are whole steps")


# -------------------- runs and evaluations


Task = tuple[str, int]
"""(arm, seed)"""
Measured = tuple[str, int, str, Path]
"""(arm, seed, line of the evaluation, its .json)"""


def tasks_of(study: Study, chosen: Sequence[str], seeds: Sequence[int]) -> list[list[Task]]:
    """What is to be done, those that others start from first; an arm that is not trained has one seed."""
    bases = sorted({start for name in chosen if (start := study.arms[name].start)})
    rounds = [bases, [name for name in chosen if name not in bases]]
    every = [[(name, seed) for seed in seeds for name in names] for names in rounds]
    return [[task for task in tasks if is_trained(study, task) or task[1] == seeds[0]] for tasks in every]


def is_trained(study: Study, task: Task) -> bool:
    """Whether there is a run of the task."""
    return study.arms[task[0]].train is not None


def run_all(command: Command, tasks: Sequence[Task], jobs: int) -> list[Measured]:
    """Makes all runs and their evaluations, `jobs` at a time; what was not begun is dropped when one fails."""
    pool = ThreadPoolExecutor(jobs)
    try:
        found = pool.map(lambda task: list(one(command, *task, quiet=jobs > 1)), tasks)
        return [measured for every in found for measured in every]
    finally:
        pool.shutdown(cancel_futures=True)


def one(command: Command, name: str, seed: int, quiet: bool) -> Iterator[Measured]:
    """Trains an arm, evaluates its checkpoints, and yields what there is."""
    arm, folder = command.study.arms[name], command.folder(name, seed)
    if arm.train is None:
        sources = [(Path(command.filled("{model}")[0]), "as_it_came")]
    else:
        launch("train.py", command.training(name, seed), folder, quiet)
        ends = checkpoints(folder)
        sources = [(path, path.name) for path in (ends if command.study.every_stage else ends[-1:])]
    for source, label in sources:
        for line in command.evals(arm):
            what, *words = command.filled(line)
            words += [f"documents={command.values['documents']}"] if arm.train is None else []
            words += [f"cluster={command.values['cluster']}"] if "cluster" in command.values else []
            to = folder / "evals" / re.sub(r"[^A-Za-z0-9.]+", "_", f"{label} {line}")
            if not list(to.glob("*.json")):
                launch("evaluate.py", [f"run={source}", f"evals=[{what}]", *words, f"to={to}"], folder, quiet)
            yield name, seed, line, next(iter(sorted(to.glob("*.json"))))


# -------------------- results


def collect(command: Command, tasks: Sequence[Task], found: Sequence[Measured]) -> dict:
    """What results.json has besides where it comes from."""
    study = command.study
    metrics = {task: read_metrics(command.folder(*task) / FILE_NAME) for task in tasks if is_trained(study, task)}
    runs = [{"arm": name, "seed": seed, **of_run(records)} for (name, seed), records in metrics.items()]
    measured = [{"arm": name, "seed": seed, "eval": line, **READ[line.split()[0]](p)} for name, seed, line, p in found]
    devices = {read_json(path)["device"] for *_, path in found} | {run["device"] for run in runs}
    record = {"device": ", ".join(sorted(devices)), "runs": runs, "measured": measured}
    if study.reference:
        losses = [(name, seed, line, path) for name, seed, line, path in found if line.startswith("position_loss")]
        record["differences"] = list(differences(losses, study.reference))
    if study.switch and {*study.switch} <= {name for name, _ in metrics}:
        record["switches"] = [
            after_switch(metrics, study.switch, seed) for seed in dict.fromkeys(seed for _, seed in metrics)
        ]
    return record


def of_run(records: Sequence[Mapping]) -> dict:
    """Speed and memory of each stage, and the losses over training."""
    stages = []
    for stage in (r for r in records if r["kind"] == "stage"):
        own = [r for r in records if r["kind"] == "train" and r["stage"] == stage["stage"]]
        about = {key: stage[key] for key in ("stage", "seq_len", "attention")}
        stages.append({**about, "tokens": stage["end"] - stage["tokens"], "steps": len(own), **speeds(own[3:] or own)})
    held_out = [{key: r.get(key) for key in ("tokens", *HELD_OUT)} for r in records if r["kind"] == "eval"]
    train = [[r["tokens"], r["loss"]] for r in records if r["kind"] == "train"]
    device = next(r["device"] for r in records if r["kind"] == "run")
    return {"device": device, "stages": stages, "held_out": held_out, "train": train}


HELD_OUT = ("loss", "trailing_loss", "recall_all")


def of_position_loss(path: Path) -> dict:
    """Of an evaluation: the loss by position, and the trailing loss with its interval."""
    record, curve = read_json(path), load_evaluation(path).curve
    width = half_width(curve.trailing.se, curve.trailing_interval_freedom)
    kept = ("tokens", "stage", "attention", "seq_len", "num_documents", "num_clusters", "edges", "mean")
    loss = float(np.nanmean(curve.mean))
    trailing = {"trailing": curve.trailing.value, "interval_95": plain([width])[0]}
    return {key: record[key] for key in kept} | {"loss": loss, **trailing}


def of_recall(path: Path) -> dict:
    """Of an evaluation: the share of right answers under each attention, of all and of far evidence."""
    record = read_json(path)
    (task,) = record["tasks"].values()
    right = {row["attention"]: {key: row[key]["accuracy"] for key in ("all", "far")} for row in task["variants"]}
    return {"tokens": record["tokens"], "attention": record["attention"], "right": right}


def of_sweep(path: Path) -> dict:
    """Of an evaluation: each setting's loss in the last eighth of the documents, minus full attention's, and the share
    of right answers of each probe."""
    record, loss_SNB = read_json(path), np.load(path.with_suffix(".npz"))["document_loss"]
    last_SN = loss_SNB[:, :, -(loss_SNB.shape[2] // 8) :].mean(-1)
    clusters = list(range(last_SN.shape[1]))
    settings = [
        {key: row[key] for key in ("attention", "gate", "first_blocks", "attended_share") if key in row}
        | {"last_eighth": float(own.mean()), "minus_full": document_mean(own - last_SN[0], clusters)}
        | {"right": {task: found["right"] for task, found in row["recall"].items()}}
        for row, own in zip(record["settings"], last_SN)
    ]
    kept = ("tokens", "seq_len", "num_documents", "num_clusters")
    return {key: record[key] for key in kept} | {"settings": settings}


READ = {"position_loss": of_position_loss, "recall": of_recall, "sweep": of_sweep}


def over_seeds(evaluations: Sequence[Evaluation]) -> Evaluation:
    """The evaluation whose documents have the mean loss of those of all seeds."""
    first = evaluations[0]
    assert all(one.document_keys == first.document_keys for one in evaluations)
    loss_NB = np.mean([one.document_loss for one in evaluations], axis=0)
    return Evaluation.of_documents(
        first.curve.edges, first.document_ids, first.document_keys, first.document_clusters, loss_NB
    )


def differences(found: Sequence[Measured], reference: str) -> Iterator[dict]:
    """How far each arm's losses are above the reference's first evaluation after as many tokens and of the same
    length."""
    groups: dict[tuple, list[tuple[dict, Evaluation]]] = {}
    for name, _, line, path in found:
        record = read_json(path)
        key = (name, line, record["tokens"], record["seq_len"])
        groups.setdefault(key, []).append((record, load_evaluation(path)))
    standard: dict[tuple, list[tuple[dict, Evaluation]]] = {}
    for (name, _, *place), own in groups.items():
        if name == reference:
            standard.setdefault(tuple(place), own)
    for (name, line, *place), own in groups.items():
        against = standard.get(tuple(place), own)
        if against is own:
            continue
        ours, theirs = ([evaluation for _, evaluation in side] for side in (own, against))
        by_seed = [float(difference(a, b).by_bucket.mean[-1]) for a, b in zip(ours, theirs)]
        about = {key: own[0][0][key] for key in ("tokens", "seq_len", "stage", "attention", "dense_up_to")}
        gap = difference(over_seeds(ours), over_seeds(theirs)).summary()
        yield {"arm": name, "reference": reference, "eval": line, **about, **gap, "by_seed": by_seed}


def after_switch(metrics: Mapping[tuple[str, int], Sequence[Mapping]], arms: tuple[str, str], seed: int) -> dict:
    """How the training losses of the first arm differ from the second's on the same batches once it has switched: up to
    the switch both have the same weights, so that the first difference is the attention's doing."""
    ours, theirs = ({r["tokens"]: r["loss"] for r in metrics[arm, seed] if r["kind"] == "train"} for arm in arms)
    at = next(r["tokens"] for r in metrics[arms[0], seed] if r["kind"] == "stage" and r["stage_index"] == 1)
    gaps = [ours[t] - theirs[t] for t in sorted(ours) if t > at and t in theirs][:AFTER_SWITCH]
    return {"seed": seed, "arm": arms[0], "against": arms[1], "tokens": at, "first": gaps[0], "largest": max(gaps)}


if __name__ == "__main__":
    main()
