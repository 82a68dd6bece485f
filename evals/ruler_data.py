"""RULER's samples, task list and scorers, from NVIDIA's package nvidia-long-context-eval (extra `ruler`).

Samples are made by its generators, each in a process of its own (evals/ruler_generate.py), once per tokenizer, length
and number of samples, and kept as its jsonl files; where these are, the package's dependencies are not needed. Scorers
are its own functions. Its evaluate.py, which cannot be imported without a download, defines how a prediction is
cleaned: `cleaned` does the same.
"""

from __future__ import annotations

import json
import re
import shutil
import subprocess
import sys
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import cached_property
from importlib import import_module
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import yaml

from conf.words import cut
from data.tokenizer import Tokenizer
from evals.ruler_generate import TOO_SHORT, splits_exactly

ROOT = Path(__file__).resolve().parents[1]
PACKAGE, GENERATORS_NEED = "long_context_eval", ("wonderwords", "nltk", "scipy")
SEED, FILE = 42, "validation.jsonl"
STAND_IN = "sentences split by Punkt without nltk's English model, which is not installed: not NVIDIA-exact"


@dataclass(frozen=True)
class RulerSample:
    """One prompt."""

    prompt: str
    answers: list[str]
    exact: bool = True
    """False where its sentences were split by the stand-in (STAND_IN)."""


@dataclass(frozen=True)
class Task:
    """One of the 13."""

    name: str
    script: str
    """The generator's file."""
    arguments: Mapping[str, Any]
    """The generator's arguments."""
    template: str
    tokens_to_generate: int
    scores: Callable[[list[str], list[list[str]]], list[float]]
    """(predictions, answers) -> percent of each sample."""

    @property
    def splits_sentences(self) -> bool:
        """Whether its samples depend on how sentences are split."""
        return self.arguments.get("type_haystack") == "essay"


class Ruler:
    """The package. ValueError without it."""

    def __init__(self) -> None:
        _require("evals=ruler", PACKAGE)

    @cached_property
    def tasks(self) -> dict[str, Task]:
        """All tasks, in the package's order."""
        folder = Path(str(import_module(PACKAGE).__path__[0]))
        listed = yaml.safe_load((folder / "synthetic.yaml").read_text(encoding="utf-8"))
        kinds = import_module(f"{PACKAGE}.data.synthetic.constants").TASKS
        scorers = import_module(f"{PACKAGE}.eval.synthetic.constants").TASKS
        tasks = {}
        for name, entry in listed.items():
            kind = kinds[entry["task"]]
            tasks[name] = Task(
                name=name,
                script=str(folder / "data" / "synthetic" / f"{entry['task']}.py"),
                arguments=entry["args"],
                template=kind["template"] + kind.get("answer_prefix", ""),
                tokens_to_generate=kind["tokens_to_generate"],
                scores=scorers[entry["task"]]["metric_fn_per_sample"],
            )
        return tasks

    def samples(self, task: str, tokenizer: Tokenizer, length: int, number: int, folder: Path) -> list[RulerSample]:
        """A task's samples whose prompts and answers fit `length` tokens; generated if not in `folder`. Empty if the
        task does not fit the length. ValueError if generation fails."""
        stem = f"{tokenizer.fingerprint}_{length}_{number}"
        exact, stand_in = (folder / f"{stem}_{sentences}" / task / FILE for sentences in ("punkt", "stand_in"))
        if exact.is_file() or not self.tasks[task].splits_sentences or splits_exactly():
            file = exact
        else:
            file = stand_in
        if not file.is_file():
            self._generate(self.tasks[task], tokenizer, length, number, file.parent)
        rows = map(json.loads, file.read_text(encoding="utf-8").splitlines())
        return [RulerSample(row["input"], row["outputs"], file == exact) for row in rows]

    def _generate(self, task: Task, tokenizer: Tokenizer, length: int, number: int, place: Path) -> None:
        """Runs the generator; its folder is renamed into place when complete."""
        _require(f"evals=ruler: no samples in {place}; making them", *GENERATORS_NEED)
        unfinished = place.with_name(f"{task.name}.unfinished")
        shutil.rmtree(unfinished, ignore_errors=True)
        options = {
            "save_dir": unfinished.resolve(),
            "save_name": task.name,
            "max_seq_length": length,
            "tokens_to_generate": task.tokens_to_generate,
            "num_samples": number,
            "random_seed": SEED,
            "template": task.template,
            **task.arguments,
        }
        arguments = [word for key, value in options.items() for word in (f"--{key}", str(value))]
        start = f"import sys; sys.path.insert(0, {str(ROOT)!r}); from evals.ruler_generate import main"
        command = [sys.executable, "-c", f"{start}; main(*sys.argv[1:])", tokenizer.name, task.script, *arguments]
        done = subprocess.run(command, capture_output=True, text=True, check=False)
        made = unfinished / task.name
        if done.returncode == TOO_SHORT:
            made.mkdir(parents=True, exist_ok=True)
            (made / FILE).write_text("", encoding="utf-8")
        elif done.returncode or not (made / FILE).is_file():
            last = (done.stderr.strip().splitlines() or ["no message"])[-1]
            raise ValueError(f"RULER's generator of {task.name} failed at {length} tokens: {cut(last)}")
        made.rename(place)
        shutil.rmtree(unfinished, ignore_errors=True)


def _require(what: str, *names: str) -> None:
    """ValueError unless these modules are installed."""
    if missing := [name for name in names if find_spec(name) is None]:
        raise ValueError(f"{what} needs {', '.join(missing)}: pip install 'moba-train[ruler]'")


def cleaned(prediction: str) -> str:
    """A prediction as the package's evaluate.py scores it: control characters are line breaks, no space around it."""
    return re.sub(r"[\x00-\x1f]", "\n", prediction.strip()).strip()
