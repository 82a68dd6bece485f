"""The interface of an eval: an `Eval` takes a `Job` and returns a `Result`. evals/table.py lists them all.

launch/evaluate.py does the rest: arguments and their help, the model, folder and names of files, wandb.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import numpy as np

from conf.files import user_path
from conf.numbers import given_length
from conf.schema import SourceConfig
from conf.words import listed
from data.sources import open_validation
from data.validation import HeldOut, held_out_documents
from evals.context import Context
from evals.loading import TrainedModel
from evals.results import dense_up_to, write_json
from train.engine import collectives
from train.record.metrics import describe_plan


@dataclass(frozen=True, eq=False)
class Job:
    """The input of an eval: a trained model, and the arguments of the command."""

    context: Context
    trained: TrainedModel
    values: Mapping[str, str]
    """Arguments as strings, the eval's own and those of all evals."""
    folder: Path
    """Where results go."""

    @property
    def attention(self) -> str:
        """The current attention, in words."""
        return describe_plan(self.context.model.attention)

    @property
    def title(self) -> str:
        """Run and attention, for figures."""
        return f"{self.trained.config.run.name}, {self.attention}"

    @property
    def dense_up_to(self) -> int | None:
        """B * k of the current attention, as evals.results.dense_up_to."""
        return dense_up_to(self.context.model.attention)

    @property
    def seq_len(self) -> int:
        """Length of the held-out documents."""
        if "seq_len" in self.values:
            return given_length(self.values, "seq_len")
        return self.trained.config.eval.seq_len or self.trained.stage.seq_len

    def integer(self, key: str, default: int) -> int:
        """The integer given for a key; ValueError unless it is at least 1."""
        text = self.values.get(key, str(default))
        if not text.isdecimal() or int(text) < 1:
            raise ValueError(f"{key}={text}: must be a whole number of at least 1")
        return int(text)

    def held_out(self, edges: np.ndarray | None = None) -> HeldOut:
        """The documents to measure on, of the cohort that `edges` means to data.validation. ValueError or DataError
        where there are none."""
        config = self.trained.config.data
        if "data" in self.values:
            path, id_field = user_path(self.values["data"]), self.values.get("id_field", "id")
            config = replace(config, validation=SourceConfig(path=str(path), id_field=id_field))
        elif "id_field" in self.values:
            raise ValueError("id_field is for documents named by data=")
        barrier = collectives.barrier if self.context.world_size > 1 else None
        source = open_validation(config, rank_zero=self.context.rank == 0, barrier=barrier, log=self.say)
        if source is None:
            raise ValueError(f"{self.trained.checkpoint} was trained without held-out documents; name some: data=...")
        limit = self.integer("documents", self.trained.config.eval.documents)
        found = held_out_documents(source, self.seq_len, limit, edges)
        pattern = self.values.get("cluster")
        if pattern is not None and not any(re.match(pattern, name) for name in found.ids):
            raise ValueError(f"cluster={pattern}: no document's id begins so; they are {listed(found.ids, most=3)}")
        return found

    def say(self, line: str) -> None:
        """Prints on rank 0."""
        if self.context.rank == 0:
            print(line, flush=True)


@dataclass(frozen=True, eq=False)
class Result:
    """The output of an eval, for files, the console and wandb."""

    length: int
    """Tokens of the longest context; part of the files' name."""
    record: Mapping[str, Any]
    """Plain JSON values, NaN as null."""
    text: str
    """For the console: a line, or a table."""
    numbers: Mapping[str, float] = field(default_factory=dict)
    """Scalars for wandb."""
    arrays: Mapping[str, Any] = field(default_factory=dict)
    """Arguments of numpy.savez; no .npz where there are none."""
    figures: Mapping[str, Callable[[Path], None]] = field(default_factory=dict)
    """Suffix of the file's name, such as "" or "_heads" -> draws a PNG file. wandb gets the first."""
    suffix: str = ""
    """Last part of the files' name, where one attention and length can be measured in two ways."""
    seed: int | None = None
    """Of the random numbers of the evaluation, if any."""

    def write(self, folder: Path, stem: str, **info: Any) -> Path:
        """Writes `stem`.json, with `info` in front, .npz and figures into `folder` (made if missing); returns the path
        of the .json, which is written last, when the rest is complete."""
        folder.mkdir(parents=True, exist_ok=True)
        if self.arrays:
            np.savez_compressed(folder / f"{stem}.npz", **self.arrays)
        for path, draw in zip(self.figure_paths(folder, stem), self.figures.values()):
            draw(path)
        return write_json(folder / f"{stem}.json", {**info, **self.record})

    def figure_paths(self, folder: Path, stem: str) -> list[Path]:
        """The files that `write` draws."""
        return [folder / f"{stem}{ending}.png" for ending in self.figures]


@dataclass(frozen=True)
class Eval:
    """One kind of evaluation of a trained model."""

    name: str
    """As in evals=[...], and the prefix of its files' names."""
    about: str
    """What it measures, for --help."""
    run: Callable[[Job], Result]
    """Runs on every process; rank 0's Result is used. ValueError for user errors: a wrong value, a model or a length
    that it does not support."""
    keys: Mapping[str, str] = field(default_factory=dict)
    """Its own arguments -> help. Two evals may share a key."""
    choices: Mapping[str, tuple[str, ...]] = field(default_factory=dict)
    """The allowed values of some of its keys, checked before anything is loaded."""
    heading: str = ""
    """Its section in a report."""
    page: Callable[[Mapping[str, Any], Path], str] | None = None
    """(record of a .json, its path) -> HTML for a report, by evals/page.py; None: not in reports."""


def names(values: Mapping[str, str], key: str, choices: Iterable[str], default: str) -> list[str]:
    """The names given for a key, such as [a,b]; ValueError if one is not among the choices."""
    found, choices = [name.strip() for name in values.get(key, default).strip("[]").split(",")], list(choices)
    if unknown := [name for name in found if name not in choices]:
        raise ValueError(f"{key}={','.join(unknown)}: choose from {', '.join(choices)}")
    return found
