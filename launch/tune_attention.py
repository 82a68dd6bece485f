"""Proposes which attention each layer should have under a budget of attended pairs, says what that costs, and writes
it into a plan file.

    python launch/tune_attention.py run=models/SmolLM2-135M data=held_out.parquet budget=0.25 seq_len=2K to=plan.yaml
    python launch/tune_attention.py run=runs/quickstart budget=0.25 block_sizes=32,64

A quarter of the documents chooses, the others say what the plan costs: in loss, and in answers that stand far back.
Interrupted, the same command goes on.
The file is read by attention=<file> of launch/evaluate.py and launch/export.py, attn=<file> of launch/generate.py,
schedule.stages.<name>.attention.plan=<file> of launch/train.py, and moba.transformers.configure(model, plan="<file>").
"""

from __future__ import annotations

import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
sys.path[:] = [str(ROOT)] + [p for p in sys.path if Path(p or ".").resolve() != ROOT / "launch"]

from conf.files import user_path  # noqa: E402
from conf.numbers import format_length, given_length  # noqa: E402
from data.errors import DataError  # noqa: E402
from evals.context import Context, clusters_by  # noqa: E402
from evals.loading import load_trained  # noqa: E402
from evals.plan_search import LEAST_BLOCK, candidates  # noqa: E402
from evals.protocol import Job  # noqa: E402
from evals.results import Stopwatch, provenance  # noqa: E402
from evals.tuning import tune  # noqa: E402
from launch.cli import OF_HELD_OUT, UsageError, exits_on, key_values  # noqa: E402
from moba.kinds.plan_file import write_plan  # noqa: E402
from train.checkpoint.store import CheckpointError  # noqa: E402
from train.hf.source_files import run_directory  # noqa: E402

KEYS = {
    "run": "run directory (its newest checkpoint), a checkpoint, or, with data=, a Hugging Face directory",
    "budget": "share of the causal pairs that all layers together may attend to, above 0 and below 1, such as 0.25",
    "seq_len": "length of the held-out documents (default: eval.seq_len of the run, else its stage's length)",
    "documents": "largest number of held-out documents, a quarter of which is used to choose (default: "
    "eval.documents of the run)",
    "data": "held-out documents instead of the run's: embedded, a file, a glob or a directory",
    "id_field": "column of data= with the document id (default: id)",
    "cluster": "regular expression; ids with the same match are one cluster, which stays whole (default: the id)",
    "block_sizes": f"block sizes to choose from (default: 1/512 to 1/64 of the length, from {LEAST_BLOCK})",
    "first_blocks": "numbers of first blocks to choose from (default 0,1)",
    "device": "auto (default), cpu or cuda",
    "objective": "what the plan is to keep: loss (the last predictions of documents), retrieval (numbers said far back "
    "in them and asked for at the end), or both (default; below 1K tokens loss)",
    "to": "the plan file to write (default: evals/attention_<length>_<budget>.yaml in the run directory)",
}


@exits_on(CheckpointError, DataError, ValueError, OSError, typed=OF_HELD_OUT)
def main(argv: list[str] | None = None) -> None:
    """The command; see the module's text."""
    values = key_values(sys.argv[1:] if argv is None else argv, KEYS, about=__doc__, required=["run", "budget"])
    budget = _budget(values["budget"])
    if not values.get("to", ".yaml").endswith(".yaml"):
        raise UsageError(f"to={values['to']}: a plan file ends in .yaml")
    cluster_of = clusters_by(values.get("cluster"))
    trained = load_trained(values["run"], values.get("device", "auto"))
    context = Context(trained.model, trained.device, cluster_of=cluster_of)
    folder = run_directory(trained.checkpoint) / "evals"
    job = Job(context, trained, values, folder)
    length = job.seq_len
    choice = candidates(length, budget, _block_sizes(values, length), _first_blocks(values))
    if not choice:
        raise UsageError(
            f"block_sizes: none leaves 3 blocks per query within budget={budget:g} at {format_length(length)}"
        )
    watch = Stopwatch()
    found = tune(job, choice, budget)
    print(found.table())
    default = folder / f"attention_{format_length(length)}_{budget:g}.yaml"
    to = user_path(values["to"]) if "to" in values else default
    source = provenance(trained, watch)
    names = ("run", "checkpoint", "tokens", "commit", "date", "device", "seconds")
    told = {name: source[name] for name in names if source[name] is not None}
    write_plan(to, found.plan, told | found.record())
    print(f"{source['seconds']:.0f} s, wrote {to}")


def _budget(text: str) -> float:
    try:
        budget = float(text)
    except ValueError:
        budget = 0.0
    if not 0 < budget < 1:
        raise UsageError(f"budget={text}: a share of the causal pairs above 0 and below 1, such as 0.25")
    return budget


def _block_sizes(values: dict[str, str], length: int) -> list[int]:
    if "block_sizes" not in values:
        return sorted({max(LEAST_BLOCK, length // parts) for parts in (512, 256, 128, 64)})
    return [given_length({"block_sizes": text}, "block_sizes") for text in values["block_sizes"].strip("[]").split(",")]


def _first_blocks(values: dict[str, str]) -> list[int]:
    texts = [text.strip() for text in values.get("first_blocks", "0,1").strip("[]").split(",")]
    if not all(text.isdecimal() for text in texts):
        raise UsageError(f"first_blocks={values['first_blocks']}: whole numbers from 0, such as 0,1")
    return [int(text) for text in texts]


if __name__ == "__main__":
    main()
