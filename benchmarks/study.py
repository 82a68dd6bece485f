"""Runs one of the training studies of benchmarks/studies.py: its arms, their evaluations, one table, one figure.

    python benchmarks/study.py mqar to=docs/results/mqar_cpu jobs=2 run.device=cpu
    python benchmarks/study.py recipes to=results/recipes model=models/SmolLM2-135M data=shards/train \\
        validation=shards/validation documents=16 'cluster=[^:(]*' jobs=3

Arguments with a dot go to all runs of launch/train.py. `to` gets results.json, table.md and figures. Runs and
evaluations that are finished are not made again: the same command goes on where it was interrupted. Small models leave
a GPU idle between their launches: `jobs` runs at a time, on all GPUs there are, fill it; what a run says goes to
<run>.log beside it. Those named first in `arms` come first. After `minutes` what still runs is stopped, and the results
are those of what there is.

Documents are averaged over seeds before they are compared; the differences of single seeds are listed.
"""

from __future__ import annotations

import json
import platform
import re
import shlex
import shutil
import sys
import threading
import time
from collections.abc import Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))

from benchmarks import panels, small_results  # noqa: E402
from benchmarks.common import Places, launch, origin, read_json, split, steps_logged, stop_all, write  # noqa: E402
from benchmarks.studies import STUDIES, Arm, Study  # noqa: E402
from benchmarks.study_results import READ, Measured, Task, after_switch, differences, of_run, sweep_differences  # noqa: E402
from launch.cli import UsageError, exits_on, key_values  # noqa: E402
from launch.config import load  # noqa: E402
from train.checkpoint.checkpoint_dir import STATE, checkpoints  # noqa: E402
from train.record.metrics import FILE_NAME, read_metrics  # noqa: E402

KEYS = {
    "to": "folder of the results",
    "runs": "folder of the runs (default: runs/ in it)",
    "model": "Hugging Face directory of the model that is continued or evaluated, where the study takes one",
    "data": "training documents: shards of launch/prepare_data.py, or text",
    "validation": "held-out documents, likewise",
    "documents": "held-out documents at most (default 16)",
    "cluster": "regular expression; held-out ids with the same match are one cluster of the errors",
    "plan": "plan file of launch/tune_attention.py, where the study takes one",
    "cuts": "the ends of the held-out documents (benchmarks/windows.py), where the study takes them",
    "seeds": "comma-separated (default: as many as the study has, from 0)",
    "arms": "which, separated by ';', of one seed alone as <arm>@<seed>, in this order (default: all)",
    "jobs": "runs at a time, if several with as many evaluations beside them (default 1)",
    "minutes": "after which all is stopped; then a run that fails does not end the others either (default: none)",
    "collect": "true: only makes the results of what is there",
    "commit": "commit of the code, where this is no git checkout",
}
BRACES = re.compile(r"\{(model|data|validation|documents|plan|cuts)\}")


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
        start += ["run.allow_changes=true"] if arm.branch else []
        words = [*self.filled(f"{self.study.common} {arm.train}"), *start, *self.overrides]
        return [*words, f"run.dir={self.folder(name, seed)}", f"run.seed={seed}"]

    def folder(self, name: str, seed: int) -> Path:
        """The directory of a run."""
        return self.runs / f"{named(name)}_seed{seed}"

    def evals(self, arm: Arm) -> tuple[str, ...]:
        """The evaluations of an arm."""
        return self.study.evals if arm.evals is None else arm.evals


@exits_on(ValueError, OSError)
def main() -> None:
    """The command; see the module's text."""
    began = time.monotonic()
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
    asked = [text.strip() for text in values.get("arms", ";".join(study.arms)).split(";")]
    chosen = list(dict.fromkeys(text.partition("@")[0] for text in asked))
    if unknown := [arm for arm in chosen if arm not in study.arms]:
        raise UsageError(f"arms={';'.join(unknown)}: there are {'; '.join(study.arms)}")
    if study.reference and study.reference not in chosen:
        raise UsageError(f"arms={';'.join(chosen)}: the others are held against {study.reference!r}; add it")
    seeds = [int(seed) for seed in values["seeds"].split(",")] if "seeds" in values else list(range(study.seeds))
    tasks = tasks_of(study, asked, seeds)
    if values.get("collect") != "true":
        check(command, chosen)
        run_all(command, tasks, began)
    found = [one for task in tasks for one in measured(command, *task)]
    record = {"study": name, "about": study.about, **origin([name, *arguments], values.get("commit")), "seeds": seeds}
    if not study.panels:
        folders = {task: command.folder(*task) for task in tasks}
        record |= small_results.collect(folders, found, values["cluster"])
        text, figures = write(record, small_results.table(record), to), small_results.figures(record)
    else:
        record |= collect(command, tasks, found)
        if not record["runs"] and not record["measured"]:
            raise ValueError("nothing is finished yet; the same command goes on where it was")
        text = write(record, panels.table(record), to)
        figures = {"figure": lambda path: panels.draw(record, study.panels, path)}
    for figure, draw in figures.items():
        draw(to / f"{figure}.png")
    print(text)


def check(command: Command, chosen: Sequence[str]) -> None:
    """ConfigError or ValueError for mistakes that would show in a run: overrides, and budgets that are not equal
    because stages are rounded up to whole steps."""
    arms, tokens = command.study.arms, {}
    bases = {base for name in chosen if (base := arms[name].base)}
    for name in chosen:
        if arms[name].train is None or arms[name].start:  # what it starts from is not there yet
            continue
        budget = load(command.training(name, 0)).schedule.tokens
        if "schedule.tokens=" not in (arms[name].train or "") and not arms[name].branch and name not in bases:
            tokens[name] = budget
    if len(set(tokens.values())) > 1:
        budgets = ", ".join(f"{name} {count:,}" for name, count in tokens.items())
        raise ValueError(f"not equal tokens: {budgets}; choose schedule.tokens so that 90 % and 10 % are whole steps")


# -------------------- runs and evaluations


def tasks_of(study: Study, asked: Sequence[str], seeds: Sequence[int]) -> list[Task]:
    """What is to be done, in the order that was asked for, each behind what it begins from; an arm that is not trained
    has one seed."""
    found: dict[Task, None] = {}
    for text in asked:
        name, _, only = text.partition("@")
        trained = study.arms[name].train is not None
        for seed in [int(only)] if only else seeds if trained else seeds[:1]:
            found |= {(link, seed): None for link in study.chain(name)}
    return list(found)


def run_all(command: Command, tasks: Sequence[Task], began: float) -> None:
    """Makes all runs, `jobs` at a time, the first of those that can begin first, and as many evaluations beside them;
    one after the other where it is one job. ValueError when one fails, what was not begun is dropped; but where time is
    limited, from `began` on, the others go on, and what is not made when it is up is left out."""
    jobs, timed = int(command.values.get("jobs", 1)), "minutes" in command.values
    failed: list[Exception] = []
    trained, runs = {task: threading.Event() for task in tasks}, Places(jobs)
    evaluations = Places(jobs) if jobs > 1 else runs
    timer = threading.Timer(began + 60 * float(command.values.get("minutes", 0)) - time.monotonic(), stop_all)
    timer.daemon = True
    if timed:
        timer.start()

    def work(task: Task) -> None:
        base, turn = command.study.arms[task[0]].base, tasks.index(task)
        try:
            if base is not None:
                trained[base, task[1]].wait()
            with runs.taken(turn) as gpu:
                if timed or not failed:
                    train(command, *task, jobs > 1, gpu)
            trained[task].set()
            with evaluations.taken(turn) as gpu:
                if timed or not failed:
                    evaluate(command, *task, jobs > 1, gpu)
        except (OSError, ValueError) as error:
            failed.append(error)
            print(f"== {error}", flush=True)
        finally:
            trained[task].set()

    with ThreadPoolExecutor(max(1, len(tasks))) as pool:
        list(pool.map(work, tasks))
    timer.cancel()
    if failed and not timed:
        raise failed[0]


def train(command: Command, name: str, seed: int, quiet: bool, gpu: str) -> None:
    """Trains an arm, if it is one that is trained."""
    arm, folder = command.study.arms[name], command.folder(name, seed)
    if arm.train is None:
        return
    if arm.branch:
        branch_off(command.folder(arm.branch, seed), folder, len(command.study.chain(arm.branch)))
    launch("train.py", command.training(name, seed), folder, quiet, gpu)


def evaluate(command: Command, name: str, seed: int, quiet: bool, gpu: str) -> None:
    """Makes the evaluations of an arm's checkpoints that are not there yet."""
    arm, folder = command.study.arms[name], command.folder(name, seed)
    if arm.train is None:
        sources = [(Path(command.filled("{model}")[0]), "as_it_came")]
    else:
        ends = stage_ends(folder)
        sources = [(path, path.name) for path in (ends if command.study.every_stage else ends[-1:])]
    for source, label in sources:
        for line in command.evals(arm):
            what, *words = command.filled(line)
            words += [f"documents={command.values['documents']}"] if arm.train is None else []
            words += [f"cluster={command.values['cluster']}"] if "cluster" in command.values else []
            to = folder / "evals" / f"{label}_{named(line)}"
            if not list(to.glob("*.json")):
                launch("evaluate.py", [f"run={source}", f"evals=[{what}]", *words, f"to={to}"], folder, quiet, gpu)


def measured(command: Command, name: str, seed: int) -> list[Measured]:
    """The evaluations of an arm that there are, checkpoint by checkpoint."""
    found = [
        (path.parent.name.removesuffix(named(line)), (name, seed, line, path))
        for line in command.evals(command.study.arms[name])
        for path in sorted((command.folder(name, seed) / "evals").glob(f"*_{named(line)}/*.json"))
    ]
    return [one for _, one in sorted(found, key=lambda found: found[0])]


def named(text: str) -> str:
    """A text as part of a folder's name."""
    return re.sub(r"[^A-Za-z0-9.]+", "_", text)


def branch_off(base: Path, folder: Path, ended: int) -> None:
    """Makes a run of what another one had when `ended` of its stages were over. ValueError where it is not finished."""
    if folder.exists():
        return
    ends = stage_ends(base)
    if len(ends) < ended:
        raise ValueError(f"{base.name} did not come to the end of its stage {ended}")
    end = ends[ended - 1]
    tokens, making = int(end.name.removeprefix("tokens_")), folder.with_name(f".{folder.name}")
    shutil.rmtree(making, ignore_errors=True)  # of a study that was killed
    shutil.copytree(end, making / "checkpoints" / end.name)
    if ended > 1:  # what the first stage was evaluated on is shorter
        (making / "position_loss").mkdir()
        for path in (base / "position_loss").glob("eval_*"):
            if int(path.stem.removeprefix("eval_")) <= tokens:
                shutil.copy(path, making / "position_loss")
    rows = (base / FILE_NAME).read_text(encoding="utf-8").splitlines(keepends=True)
    # The stage that begins here is the branch's own.
    kept = [text for text in rows if (row := json.loads(text))["tokens"] < tokens + (row["kind"] != "stage")]
    (making / FILE_NAME).write_text("".join(kept), encoding="utf-8")
    making.rename(folder)


def stage_ends(folder: Path) -> list[Path]:
    """A run's checkpoints at the ends of stages; one that was stopped has others."""
    return [path for path in checkpoints(folder) if read_json(path / STATE)["stage_end"]]


# -------------------- results


def collect(command: Command, tasks: Sequence[Task], found: Sequence[Measured]) -> dict:
    """What results.json has besides where it comes from."""
    study = command.study
    paths = {task: command.folder(*task) / FILE_NAME for task in tasks if study.arms[task[0]].train is not None}
    # Where time is limited, some are not begun, or stopped before their first step.
    metrics = {task: read_metrics(path) for task, path in paths.items() if steps_logged(path.parent)}
    runs = [{"arm": name, "seed": seed, **of_run(records)} for (name, seed), records in metrics.items()]
    measured = [{"arm": name, "seed": seed, "eval": line, **READ[line.split()[0]](p)} for name, seed, line, p in found]
    devices = {read_json(path)["device"] for *_, path in found} | {run["device"] for run in runs}
    hardware = {f"{platform.machine()} CPU" if device == "cpu" else device for device in devices}
    record = {"device": ", ".join(sorted(hardware)), "runs": runs, "measured": measured}
    if study.reference:
        losses = [(name, seed, line, path) for name, seed, line, path in found if line.startswith("position_loss")]
        sweeps = [(name, seed, line, path) for name, seed, line, path in found if line.startswith("sweep")]
        record["differences"] = [*differences(losses, study.reference), *sweep_differences(sweeps, study.reference)]
    if study.switch and {*study.switch} <= {name for name, _ in metrics}:
        record["switches"] = [
            after_switch(metrics, study.switch, seed) for seed in dict.fromkeys(seed for _, seed in metrics)
        ]
    return record


if __name__ == "__main__":
    main()
