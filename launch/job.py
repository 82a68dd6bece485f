"""What launch/evaluate.py hands to each eval: the model, the arguments, the documents, and where results go."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable
from dataclasses import dataclass, replace
from pathlib import Path

import torch
from tqdm import tqdm

from conf.numbers import parse_length
from conf.schema import SourceConfig
from data.sources import open_validation
from data.validation import HeldOut, held_out_documents
from evals.loading import TrainedModel
from launch.cli import UsageError
from train.engine import collectives
from train.hf.source_files import run_directory
from train.record.tracking import Tracker


@dataclass
class Job:
    """What every eval is given."""

    trained: TrainedModel
    values: dict[str, str]
    rank: int
    world_size: int
    reduce: Callable[[torch.Tensor], torch.Tensor]
    tracker: Tracker | None

    @property
    def folder(self) -> Path:
        """Where results go."""
        return folder_of(self.trained, self.values)

    def say(self, line: str) -> None:
        """Prints on rank 0."""
        if self.rank == 0:
            print(line, flush=True)

    def watch(self, what: str) -> Callable[[Iterable], Iterable]:
        """A progress bar around a loop, on rank 0 and a terminal."""
        return lambda items: tqdm(items, desc=what, leave=False, disable=True if self.rank else None)

    def log(self, name: str, numbers: dict[str, float], figure: Path) -> None:
        """Sends numbers and a figure to wandb, if asked for."""
        if self.tracker is not None:
            self.tracker.log({"kind": name, "tokens": self.trained.tokens, **numbers})
            self.tracker.image(f"figures/{name}", figure, self.trained.tokens)

    def integer(self, key: str, default: int) -> int:
        """The whole number given for a key, at least 1."""
        text = self.values.get(key, str(default))
        if not text.isdecimal() or int(text) < 1:
            raise UsageError(f"{key}={text}: must be a whole number of at least 1")
        return int(text)

    @property
    def seq_len(self) -> int:
        """Length of the held-out documents."""
        if "seq_len" in self.values:
            return parse_length(self.values["seq_len"])
        return self.trained.config.eval.seq_len or self.trained.stage.seq_len

    def held_out(self, edges=None) -> HeldOut:
        """The documents to measure on, of the cohort that `edges` means to data.validation."""
        config = self.trained.config.data
        if "data" in self.values:
            config = replace(config, validation=_given_source(self.values))
        elif "id_field" in self.values:
            raise UsageError("id_field is for documents named by data=")
        barrier = collectives.barrier if self.world_size > 1 else None
        source = open_validation(config, rank_zero=self.rank == 0, barrier=barrier, log=self.say)
        if source is None:
            raise UsageError(f"{self.trained.checkpoint} was trained without held-out documents; name some: data=...")
        limit = self.integer("documents", self.trained.config.eval.documents)
        return held_out_documents(source, self.seq_len, limit, edges)

    def cluster_of(self, document_id: str) -> str:
        """The cluster of a document."""
        found = re.match(self.values["cluster"], document_id) if "cluster" in self.values else None
        return found[found.re.groups and 1] if found else document_id


def _given_source(values: dict[str, str]) -> SourceConfig:
    return SourceConfig(path=str(Path(values["data"]).expanduser()), id_field=values.get("id_field", "id"))


def folder_of(trained: TrainedModel, values: dict[str, str]) -> Path:
    """Where results go."""
    return Path(values["to"]).expanduser() if "to" in values else run_directory(trained.checkpoint) / "evals"


def open_tracker(trained: TrainedModel, values: dict[str, str]) -> Tracker | None:
    """A wandb run of its own for these results; None unless asked for."""
    if values.get("wandb", "disabled") == "disabled":
        return None
    folder = folder_of(trained, values)
    folder.mkdir(parents=True, exist_ok=True)
    logging = replace(trained.config.logging, wandb=values["wandb"])
    name = f"{trained.config.run.name} evals"
    return Tracker(folder, logging, name=name, config={"evaluate": values, "run": trained.config.run.name}, fresh=True)
