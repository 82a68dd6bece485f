"""Tasks of lm-evaluation-harness (extra lm-eval), its own or those of a folder, under one or several attentions.

The harness provides prompts, metrics and their standard errors; evals/lm_eval_model.py answers. Most of its tasks are
far shorter than block size x top k, where MoBA is full attention: they test the weights only. Every result says how
many requests were longer.
"""

from __future__ import annotations

import logging
import math
from collections.abc import Mapping
from dataclasses import dataclass
from functools import partial
from importlib import import_module
from importlib.metadata import version
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import numpy as np
from matplotlib.figure import Figure

from conf.files import user_path
from conf.numbers import format_length, given_length
from conf.words import listed
from data.tokenizer import load_tokenizer
from evals.answering import ABOUT_ARMS, ABOUT_BESIDE, chosen_arms
from evals.ledger import Ledger
from evals.page import image, note
from evals.page import table as html_table
from evals.protocol import Eval, Job, Result
from evals.style import color, marker, save
from evals.swap import OWN

PACKAGE, SEED = "lm_eval", 1234


def run(job: Job) -> Result:
    """The tasks under each arm."""
    if find_spec(PACKAGE) is None:
        raise ValueError("evals=[lm_eval] needs lm-evaluation-harness: pip install 'moba-train[lm-eval]'")
    from evals.lm_eval_model import RunLM  # needs the package

    logging.getLogger(PACKAGE).setLevel(logging.ERROR)
    manager, tasks = _tasks(job)
    arms = chosen_arms(job, OWN)
    tokenizer = load_tokenizer(job.trained.config.data.tokenizer)
    max_length = given_length(job.values, "max_length") if "max_length" in job.values else job.trained.stage.seq_len
    samples = job.integer("samples", 1) if "samples" in job.values else None
    shots = _shots(job)
    job.say(f"lm_eval: {listed(tasks)}, up to {format_length(max_length)} tokens, under {listed(a.name for a in arms)}")
    ledger = Ledger(job, "lm_eval", {"tokenizer": tokenizer.fingerprint})
    scores: dict[str, list[Score]] = {}
    lengths: list[int] = []
    details: Mapping[str, Any] = {}
    for arm in arms:
        model = RunLM(job.context, arm, tokenizer, max_length, ledger)
        found = import_module(PACKAGE).simple_evaluate(
            model=model,
            tasks=tasks,
            num_fewshot=shots,
            limit=samples,
            task_manager=manager,
            log_samples=False,
            bootstrap_iters=1000,
        )
        if found is not None:  # on the first process of each host
            scores[arm.name] = _scores(found["results"])
            details = {name: _plain(found[name]) for name in ("versions", "n-shot", "n-samples", "higher_is_better")}
            lengths = model.lengths
    beyond = sum(length > (job.dense_up_to or math.inf) for length in lengths)
    report = LmEvalReport(scores, details, max_length, len(lengths), beyond, max(lengths, default=0), job.title)
    return report.result(job.dense_up_to)


def _tasks(job: Job) -> tuple[Any, list[str]]:
    """(the harness's TaskManager, names of tasks). ValueError for unknown tasks."""
    manager_of = import_module(f"{PACKAGE}.tasks").TaskManager
    folder = user_path(job.values["tasks_folder"]) if "tasks_folder" in job.values else None
    if folder is not None and not folder.is_dir():
        raise ValueError(f"tasks_folder={job.values['tasks_folder']}: no such folder")
    own = manager_of(include_path=str(folder), include_defaults=False) if folder is not None else None
    if "tasks" not in job.values:
        if own is None or not own.all_subtasks:
            raise ValueError(
                "evals=[lm_eval] needs tasks=[...] of lm-evaluation-harness, or a tasks_folder= with yaml files"
            )
        return own, list(own.all_subtasks)
    asked = [name.strip() for name in job.values["tasks"].strip("[]").split(",")]
    if own is not None and set(asked) <= set(own.all_tasks):
        return own, asked
    manager = manager_of(include_path=None if folder is None else str(folder))
    if unknown := [name for name in asked if name not in manager.all_tasks]:
        known = "" if own is None else f"; tasks_folder has {listed(own.all_subtasks)}"
        raise ValueError(f"tasks={listed(unknown)}: lm-evaluation-harness {version('lm-eval')} has no such task{known}")
    return manager, asked


def _shots(job: Job) -> int | None:
    text = job.values.get("num_fewshot")
    if text is not None and not text.isdecimal():
        raise ValueError(f"num_fewshot={text}: must be a whole number")
    return None if text is None else int(text)


@dataclass(frozen=True)
class Score:
    """A metric of a task."""

    task: str
    metric: str
    """As the harness names it, with the answers' filter after a comma."""
    value: float
    stderr: float | None


def _scores(results: Mapping[str, Mapping[str, Any]]) -> list[Score]:
    found = []
    for task, values in results.items():
        for key, value in values.items():
            metric, _, how = key.partition(",")
            if metric.endswith("_stderr") or isinstance(value, str) or key in ("alias", "sample_len"):
                continue
            stderr = values.get(f"{metric}_stderr,{how}")
            error = float(stderr) if isinstance(stderr, (int, float)) and math.isfinite(stderr) else None
            name = metric if how in ("none", "") else f"{metric} ({how})"
            found.append(Score(task, name, float(value), error))
    return found


def _plain(value: Any) -> Any:
    """JSON values of what the harness returns."""
    if isinstance(value, Mapping):
        return {str(key): _plain(item) for key, item in value.items()}
    return value if isinstance(value, (int, str, bool, type(None))) else str(value)


@dataclass(frozen=True, eq=False)
class LmEvalReport:
    """What one model scored."""

    scores: Mapping[str, list[Score]]
    """By arm, the same tasks and metrics in each."""
    details: Mapping[str, Any]
    max_length: int
    requests: int
    beyond: int
    """Requests longer than block size x top k."""
    longest: int
    title: str

    def rows(self) -> list[dict[str, Any]]:
        """One row per task and metric, as JSON values."""
        first = next(iter(self.scores.values()), [])
        return [
            {
                "task": one.task,
                "metric": one.metric,
                "arms": {
                    arm: {"value": _finite(scores[i].value), "stderr": scores[i].stderr}
                    for arm, scores in self.scores.items()
                },
            }
            for i, one in enumerate(first)
        ]

    def about_length(self, dense_up_to: int | None) -> str:
        """Whether sparsity was tested."""
        if dense_up_to is None:
            return f"{self.requests} requests, up to {self.longest} tokens; full attention"
        size = f"block size x top_k = {format_length(dense_up_to)}"
        said = (
            f"{self.beyond} of {self.requests} requests, the longest of {self.longest} tokens, are longer than {size}"
        )
        return said if self.beyond else f"{said}: MoBA was full attention throughout"

    def result(self, dense_up_to: int | None) -> Result:
        """The scores as files and text."""
        rows, arms = self.rows(), list(self.scores)
        lines = [f"{'task':<28}{'metric':<28}" + "".join(f"{arm:>22}" for arm in arms)]
        for row in rows:
            lines.append(
                f"{row['task']:<28}{row['metric']:<28}" + "".join(f"{_cell(row['arms'][a]):>22}" for a in arms)
            )
        values = {f"{r['task']}_{r['metric']}_{a}": r["arms"][a]["value"] for r in rows for a in arms}
        return Result(
            length=self.max_length,
            record={
                "lm_eval": version("lm-eval") if find_spec(PACKAGE) else None,
                "arms": ABOUT_ARMS,
                "about_length": self.about_length(dense_up_to),
                "requests": self.requests,
                "longer_than_dense": self.beyond,
                "longest": self.longest,
                "scores": rows,
                **self.details,
            },
            text="\n".join([*lines, self.about_length(dense_up_to)]),
            numbers={name: value for name, value in values.items() if value is not None},
            figures={"": partial(self.draw, dense_up_to)},
            seed=SEED,
        )

    def draw(self, dense_up_to: int | None, path: Path) -> None:
        """Draws a panel per metric: tasks below each other, a point per arm."""
        rows = self.rows()
        metrics = list(dict.fromkeys(row["metric"] for row in rows))
        tasks = list(dict.fromkeys(row["task"] for row in rows))
        figure = Figure(figsize=(2.5 + 3.2 * len(metrics), 1.8 + 0.4 * len(tasks)), layout="constrained")
        grid = figure.subplots(1, len(metrics), squeeze=False, sharey=True)[0]
        for axes, metric in zip(grid, metrics):
            for a, arm in enumerate(self.scores):
                own = [row for row in rows if row["metric"] == metric and row["arms"][arm]["value"] is not None]
                places = np.array([tasks.index(row["task"]) for row in own]) + 0.15 * (a - (len(self.scores) - 1) / 2)
                found = [row["arms"][arm] for row in own]
                widths = [1.96 * (one["stderr"] or 0) for one in found]
                values = [one["value"] for one in found]
                axes.errorbar(
                    values, places, xerr=widths, fmt=marker(a), color=color(a), markersize=4, capsize=2, label=arm
                )
            axes.set_title(metric, fontsize="small")
            axes.set_yticks(range(len(tasks)), tasks, fontsize="small")
            axes.tick_params(axis="x", labelsize="x-small")
            axes.grid(alpha=0.3)
        grid[0].invert_yaxis()
        grid[0].legend(fontsize="x-small")
        figure.suptitle(f"lm-evaluation-harness: {self.title}", fontsize="medium")
        figure.supxlabel(f"Bars: 1.96 of its standard errors. {self.about_length(dense_up_to)}", fontsize="x-small")
        save(figure, path)


def _finite(value: float) -> float | None:
    return value if math.isfinite(value) else None


def _cell(found: Mapping[str, float | None]) -> str:
    if found["value"] is None:
        return "-"
    return f"{found['value']:.4f}" + ("" if found["stderr"] is None else f" +- {found['stderr']:.4f}")


def page(record: Mapping[str, Any], path: Path) -> str:
    """The table and the figure."""
    arms = list(record["scores"][0]["arms"])
    rows = [(row["task"], row["metric"], *(_cell(row["arms"][arm]) for arm in arms)) for row in record["scores"]]
    text = f"lm-evaluation-harness {record['lm_eval']}; +-: its standard errors. {record['about_length']}."
    return html_table(("task", "metric", *arms), rows) + note(text) + image(path.with_suffix(".png"))


EVAL = Eval(
    name="lm_eval",
    about="tasks of lm-evaluation-harness, its own or those of a folder (extra lm-eval).",
    run=run,
    keys={
        "tasks": "such as [hellaswag,my_task] (default: all of tasks_folder)",
        "tasks_folder": "folder with tasks of your own, as its yaml files",
        "num_fewshot": "examples before each question (default: as the task says)",
        "samples": "of each task at most (default all)",
        "max_length": "tokens that the model is shown at most (default: the length of the run's last stage)",
        "arms": f"of {ABOUT_ARMS} (default: {OWN})",
        "beside": ABOUT_BESIDE,
    },
    heading="lm-evaluation-harness",
    page=page,
)
