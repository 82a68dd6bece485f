"""Measures a trained model: json, arrays and figures into its run directory.

    python launch/evaluate.py run=runs/quickstart evals=[position_loss]
    python launch/evaluate.py run=runs/moba_32k attention=full seq_len=32K documents=64
    torchrun --nproc_per_node=8 launch/evaluate.py run=runs/moba_32k data=held_out.parquet id_field=package

Several processes share the documents; position_loss then gives the same bits as one.
"""

from __future__ import annotations

import sys
import textwrap
from dataclasses import replace
from pathlib import Path
from typing import NoReturn

ROOT = Path(__file__).resolve().parents[1]
sys.path[:] = [str(ROOT)] + [p for p in sys.path if Path(p or ".").resolve() != ROOT / "launch"]

from train.engine.world import init_world, launch_environment, leave, shutdown  # noqa: E402 - first: decides what torch reads

# isort: split

from conf.numbers import format_length  # noqa: E402
from data.errors import DataError  # noqa: E402
from evals.context import Context, clusters_by  # noqa: E402
from evals.loading import TrainedModel, attention_label, attention_plan, load_trained  # noqa: E402
from evals.protocol import Eval, Job, names  # noqa: E402
from evals.results import Stopwatch, provenance  # noqa: E402
from evals.table import EVALS  # noqa: E402
from launch.cli import OF_HELD_OUT, UsageError, exits_on, key_values, result_folder  # noqa: E402
from train.checkpoint.store import CheckpointError  # noqa: E402
from train.engine.collectives import all_reduce_sum  # noqa: E402
from train.hf.source_files import run_directory  # noqa: E402
from train.record.tracking import Tracker  # noqa: E402

MODEL_AND_DOCUMENTS = {
    "run": "run directory (its newest checkpoint), a checkpoint, or, with data=, a Hugging Face directory",
    "evals": "which, such as [position_loss,routing] (default: position_loss)",
    "attention": "stage (of the checkpoint's stage, default), moba (of the last stage with MoBA), full, "
    "<block size>x<top_k> (512x3), "
    "512x3+1 with the first block always selected, or a file of launch/tune_attention.py",
    "seq_len": "length of the held-out documents (default: eval.seq_len of the run, else its stage's length)",
    "documents": "largest number of held-out documents (default: eval.documents of the run)",
    "data": "held-out documents instead of the run's: embedded, a file, a glob or a directory",
    "id_field": "column of data= with the document id (default: id)",
    "cluster": "regular expression; ids with the same match form one cluster for standard errors (default: "
    "the whole id)",
}
DEVICE_AND_RESULTS = {
    "device": "auto (default), cpu or cuda",
    "wandb": "disabled (default), auto, online or offline: also send the results there, as a separate run",
    "to": "folder of the results (default: evals/ in the run directory)",
}


@exits_on(
    CheckpointError, DataError, ValueError, OSError, speaks=lambda: launch_environment().rank == 0, typed=OF_HELD_OUT
)
def main(argv: list[str] | None = None) -> None:
    """The command; see the module's text."""
    values = key_values(sys.argv[1:] if argv is None else argv, keys(), about=about(), required=["run"])
    chosen, cluster_of = _choices(values), clusters_by(values.get("cluster"))
    launched = launch_environment()
    device, reduce = values.get("device", "auto"), lambda tensor: tensor
    if launched.world_size > 1:
        device, reduce = init_world(device).device, all_reduce_sum
    trained = load_trained(values["run"], device)
    trained.model.set_attention(attention_plan(values.get("attention", "stage"), trained))
    context = Context(
        trained.model,
        trained.device,
        rank=launched.rank,
        world_size=launched.world_size,
        reduce=reduce,
        cluster_of=cluster_of,
        bars=True,
    )
    folder = result_folder(values, run_directory(trained.checkpoint) / "evals")
    job = Job(context, trained, values, folder)
    tracker = _open_tracker(trained, values, folder) if launched.rank == 0 else None
    for one in chosen:
        measure(one, job, tracker)
    if tracker is not None:
        tracker.finish()
    if launched.world_size > 1:
        shutdown()


def keys() -> dict[str, str]:
    """The arguments of the command -> help, those of single evals behind their names."""
    own: dict[str, str] = {}
    for one in EVALS.values():
        for key, text in one.keys.items():
            assert key not in MODEL_AND_DOCUMENTS | DEVICE_AND_RESULTS, f"{one.name}: {key} is an argument of all evals"
            own[key] = "; ".join(filter(None, (own.get(key), f"{one.name}: {text}")))
    return MODEL_AND_DOCUMENTS | own | DEVICE_AND_RESULTS


def about() -> str:
    """The text of --help above the arguments: the module's, the evals before its last line."""
    usage, _, last = (__doc__ or "").strip().rpartition("\n")
    return "\n".join([usage, *(textwrap.fill(f"{one.name}: {one.about}", 119) for one in EVALS.values()), last])


def _choices(values: dict[str, str]) -> list[Eval]:
    """The evals asked for; UsageError or ValueError for what can be seen to be wrong before anything is loaded."""
    chosen = [EVALS[name] for name in names(values, "evals", EVALS, default="position_loss")]
    words = [pair for one in EVALS.values() for pair in one.choices.items()]
    for key, choices in (*words, ("wandb", ("disabled", "auto", "online", "offline"))):
        if key in values and values[key] not in choices:
            raise UsageError(f"{key}={values[key]}: choose one of {', '.join(choices)}")
    return chosen


def measure(one: Eval, job: Job, tracker: Tracker | None) -> None:
    """Runs an eval; rank 0 writes <eval>_<tokens>_<length>_<attention>[_<suffix>] into the job's folder, sends the
    numbers to wandb, if asked for, and prints what was found."""
    watch, tokens = Stopwatch(), job.trained.tokens
    info = provenance(job.trained, watch, world_size=job.context.world_size)
    result = one.run(job)
    if job.context.rank:
        return
    info |= {"seed": result.seed, "seconds": watch.seconds}
    attention = attention_label(job.values.get("attention", "stage")) + (f"_{result.suffix}" if result.suffix else "")
    stem = f"{one.name}_{tokens:015d}_{format_length(result.length)}_{attention}"
    path = result.write(job.folder, stem, **info)
    if tracker is not None:
        numbers = {name if "/" in name else f"{one.name}/{name}": value for name, value in result.numbers.items()}
        tracker.scalars(numbers, tokens)
        for figure in result.figure_paths(job.folder, stem)[:1]:
            tracker.image(f"figures/{one.name}", figure, tokens)
    took, wrote = f"{info['seconds']:.0f} s", f"wrote {path}"
    is_table = "\n" in result.text
    job.say(f"{result.text}\n{took}, {wrote}" if is_table else f"{result.text}, {took}\n{wrote}")


def _open_tracker(trained: TrainedModel, values: dict[str, str], folder: Path) -> Tracker | None:
    """A wandb run of its own for these results; None unless asked for."""
    if values.get("wandb", "disabled") == "disabled":
        return None
    logging = replace(trained.config.logging, wandb=values["wandb"])
    name = f"{trained.config.run.name} evals"
    about = {"evaluate": values, "run": trained.config.run.name}
    return Tracker(folder, logging, name=name, config=about, job_type="evaluate", fresh=True)


def command() -> NoReturn:
    """The command, with the process's arguments; does not return."""
    main()
    leave(0)


if __name__ == "__main__":
    command()
