"""What could pick the blocks of a model that was never trained with MoBA: trailing loss and retrieval under each gate
at the same budget, without training.

    python benchmarks/gate_study.py model=models/SmolLM2-135M to=results/gate_study seconds=1500
    python benchmarks/gate_study.py model=models/SmolLM2-135M to=results/try lengths=1K block_sizes=64 budgets=1/4 \\
        documents=2 device=cpu

Gates, all of top_k blocks: mean (MoBA), mean+first (the document's first block is one of them), latest+first (a window
with a sink), random+first, oracle+first (the blocks of largest attention). full is what they are held against, document
by document. Two measurements: the loss of the last eighth of held-out documents; and whether a number that was said
once (pass_key), or one of eight (key_value), is known again at the end, where all digits that should follow are given
and each has to be the likeliest token.

The lists are worked through from their beginnings: what stands first in each is measured first, and after `seconds`
nothing new is begun. results.json, table.md and figure.png in `to` are written anew after each measurement.
"""

from __future__ import annotations

import sys
import time
from collections.abc import Sequence
from dataclasses import dataclass, replace
from fractions import Fraction
from itertools import product
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))

import numpy as np  # noqa: E402
import torch  # noqa: E402

from benchmarks.gate_tables import FULL, GATES, draw, loss_summary, retrieval_summary, table  # noqa: E402
from benchmarks.pretrained import machine  # noqa: E402
from conf.build import ConfigError  # noqa: E402
from conf.numbers import parse_length  # noqa: E402
from conf.schema import DataConfig, SourceConfig  # noqa: E402
from data.errors import DataError  # noqa: E402
from data.sources import Source, open_validation  # noqa: E402
from data.tokenizer import load_tokenizer  # noqa: E402
from data.validation import held_out_documents  # noqa: E402
from evals.context import Context, clusters_by  # noqa: E402
from evals.loading import TrainedModel, attention_plan, load_trained  # noqa: E402
from evals.position_loss import evaluate  # noqa: E402
from evals.probes import Probe, probes, score  # noqa: E402
from evals.results import commit, write_json  # noqa: E402
from evals.swap import under  # noqa: E402
from launch.cli import UsageError, exits_on, key_values  # noqa: E402
from moba.kinds import AttentionSpec  # noqa: E402
from train.checkpoint.store import CheckpointError  # noqa: E402

KEYS = {
    "model": "Hugging Face directory, run directory or checkpoint",
    "to": "folder of the results",
    "lengths": "of the documents, the most important first (default 8K,4K,16K)",
    "block_sizes": "the most important first (default 128,64,256,512)",
    "budgets": "shares of the length that a query attends to, the most important first (default 1/8,1/16,1/4)",
    "gates": "those to measure, in this order (default: all, full first)",
    "parts": "of loss and retrieval (default both)",
    "documents": "held-out documents at each length, at most (default 16)",
    "data": "held-out documents: a file, a glob, a directory (default embedded: the books that ship)",
    "cluster": "regular expression; ids with the same match are one cluster of the errors (default: the whole id)",
    "seconds": "after which nothing new is begun (default: no limit)",
    "device": "auto (default), cpu or cuda",
    "commit": "commit of the code, where this is no git checkout",
}
PARTS = ("loss", "retrieval")
TRAILING = 8
"""The trailing loss is that of the last one of so many equal pieces of the length."""
LEAST_TOP_K = 3
"""With fewer the first block and the query's own leave a gate nothing to pick."""
CONVENTION = (
    "Loss in nats a token, mean over the last eighth of each document; `minus full` is paired by document. A budget is "
    "block_size * top_k / length. Retrieval: share of probes whose answer's tokens are all the likeliest ones, "
    "the text before each given, and the mean nats of those tokens. +-: 95 % Student intervals, documents as clusters."
)


@dataclass(frozen=True)
class Setting:
    """How much of what a query attends to."""

    length: int
    block_size: int
    budget: Fraction

    @property
    def top_k(self) -> int:
        """Blocks within the budget."""
        return int(self.budget * self.length / self.block_size)


def settings(lengths: Sequence[int], block_sizes: Sequence[int], budgets: Sequence[Fraction]) -> list[Setting]:
    """Those that leave a gate a choice, the most important first: what stands early in every list."""
    ranked = product(*(list(enumerate(values)) for values in (lengths, block_sizes, budgets)))
    ordered = sorted(ranked, key=lambda row: (sum(rank for rank, _ in row), [rank for rank, _ in row]))
    found = [Setting(*(value for _, value in row)) for row in ordered]
    return [one for one in found if one.top_k >= LEAST_TOP_K]


def plan_of(gate: str, setting: Setting, trained: TrainedModel) -> tuple[AttentionSpec, ...]:
    """The attention of each layer under a gate; layers that MoBA does not take the place of stay as they are."""
    if gate == FULL:
        return attention_plan(FULL, trained)
    name, first_blocks = GATES[gate]
    plan = attention_plan(f"{setting.block_size}x{setting.top_k}", trained)
    return tuple(s if s.routing is None else replace(s, gate=name, first_blocks=first_blocks) for s in plan)


@exits_on(ConfigError, DataError, CheckpointError, UsageError)
def main() -> None:
    """The command; see the module's text."""
    values = key_values(sys.argv[1:], KEYS, about=__doc__, required=["model", "to"])
    lengths, block_sizes, budgets, gates, parts = lists(values)
    trained = load_trained(values["model"], values.get("device", "auto"))
    study = Study(trained, values, started=time.monotonic())
    chosen = settings(lengths, block_sizes, budgets)
    if not chosen:
        raise UsageError(f"no setting has {LEAST_TOP_K} blocks or more; give smaller block_sizes or larger budgets")
    print(f"{study.results['model']} on {study.results['machine']}, commit {study.results['commit']}", flush=True)
    for setting, part, gate in product(chosen, parts, gates):
        if study.has(setting, part, gate):
            continue
        if study.is_over():
            print(f"seconds={values['seconds']} are over; not begun: {setting} {part} {gate} and what follows")
            break
        study.measure(setting, part, gate)
        study.write(Path(values["to"]).expanduser())
    else:
        study.results["finished"] = True
    study.write(Path(values["to"]).expanduser())
    print(table(study.results))


def lists(values: dict[str, str]) -> tuple[list[int], list[int], list[Fraction], list[str], list[str]]:
    """(lengths, block sizes, budgets, gates, parts) of the arguments, gates with `full` in front. UsageError for what
    cannot be read."""
    try:
        lengths = [parse_length(text) for text in values.get("lengths", "8K,4K,16K").split(",")]
        block_sizes = [parse_length(text) for text in values.get("block_sizes", "128,64,256,512").split(",")]
        budgets = [Fraction(text) for text in values.get("budgets", "1/8,1/16,1/4").split(",")]
        float(values.get("seconds", 0)), int(values.get("documents", 16))
    except (ValueError, ZeroDivisionError) as error:
        raise UsageError(f"{error}; say lengths=8K,4K block_sizes=128,64 budgets=1/8,1/4 documents=16") from error
    gates = [gate for gate in values.get("gates", ",".join(GATES)).split(",") if gate != FULL]
    parts = values.get("parts", ",".join(PARTS)).split(",")
    for key, given, known in (("gates", gates, GATES), ("parts", parts, PARTS)):
        if unknown := [name for name in given if name not in known]:
            raise UsageError(f"{key}={','.join(unknown)}: choose of {', '.join(known)}")
    if any(length < TRAILING or length % TRAILING for length in lengths):
        raise UsageError(f"lengths={values['lengths']}: each must be a multiple of {TRAILING}")
    return lengths, block_sizes, budgets, [FULL, *gates], parts


class Study:
    """The model, its documents, and what has been measured so far."""

    def __init__(self, trained: TrainedModel, values: dict[str, str], started: float):
        self.trained, self.values, self.started = trained, values, started
        data = DataConfig(
            tokenizer=trained.config.data.tokenizer, validation=SourceConfig(path=values.get("data", "embedded"))
        )
        self.source: Source = open_validation(data, log=print)
        self.tokenizer = load_tokenizer(data.tokenizer)
        self.limit = int(values.get("documents", 16))
        self.context = Context(trained.model, trained.device, cluster_of=clusters_by(values.get("cluster")))
        self.full: dict[tuple[str, int], dict[str, Any]] = {}
        self.results = {
            "model": trained.checkpoint.resolve().name,
            "tokens": trained.tokens,
            "native_length": trained.config.model.pretrained_length or trained.stage.seq_len,
            "machine": machine() if trained.device.type == "cuda" else f"CPU ({machine()})",
            "precision": str(next(trained.model.parameters()).dtype).removeprefix("torch."),
            "commit": values.get("commit") or commit() or "unknown",
            "data": values.get("data", "embedded"),
            "convention": CONVENTION,
            "finished": False,
            "records": [],
        }

    def is_over(self) -> bool:
        """Whether the time is spent."""
        return "seconds" in self.values and time.monotonic() - self.started > float(self.values["seconds"])

    def has(self, setting: Setting, part: str, gate: str) -> bool:
        """Whether this is known; full attention is the same at every budget."""
        return gate == FULL and (part, setting.length) in self.full

    def measure(self, setting: Setting, part: str, gate: str) -> None:
        """Appends one record."""
        began = time.monotonic()
        with torch.no_grad(), under(self.trained.model, plan_of(gate, setting, self.trained)):
            found = self._loss(setting) if part == "loss" else self._retrieval(setting)
        if gate == FULL:
            self.full[part, setting.length] = found
        full = self.full[part, setting.length]
        sizes = {} if gate == FULL else {"block_size": setting.block_size, "top_k": setting.top_k}
        record = {"part": part, "length": setting.length, **sizes, "budget": str(setting.budget), "gate": gate}
        record["seconds"] = round(time.monotonic() - began, 1)
        summarise = loss_summary if part == "loss" else retrieval_summary
        record |= summarise(found, full)
        self.results["records"].append(record)
        print(f"{setting} {part} {gate}: {record['text']}, {record['seconds']} s", flush=True)

    def _loss(self, setting: Setting) -> dict[str, Any]:
        documents = held_out_documents(self.source, setting.length, self.limit)
        found = evaluate(self.context, documents, seq_len=setting.length, num_buckets=TRAILING)
        return {"values": found.document_loss[:, -1], "clusters": found.document_clusters, "ids": found.document_ids}

    def _retrieval(self, setting: Setting) -> dict[str, Any]:
        documents = held_out_documents(self.source, setting.length, self.limit)
        asked: list[Probe] = list(probes(documents, self.tokenizer, setting.length))
        scores = [found for probe in asked for found in score(self.trained.model, [probe], self.trained.device)]
        return {
            "tasks": [probe.task for probe in asked],
            "depths": [probe.depth for probe in asked],
            "clusters": [self.context.cluster_of(probe.document) for probe in asked],
            "right": np.array([right for right, _ in scores]),
            "nats": np.array([nats for _, nats in scores]),
        }

    def write(self, to: Path) -> None:
        """results.json, table.md and figure.png."""
        write_json(to / "results.json", self.results)
        (to / "table.md").write_text(table(self.results) + "\n", encoding="utf-8")
        draw(self.results, to / "figure.png")


if __name__ == "__main__":
    main()
