"""Measures a trained model: json, arrays and figures into its run directory.

    python launch/evaluate.py run=runs/quickstart evals=[position_loss]
    python launch/evaluate.py run=runs/moba_32k attention=full seq_len=32K documents=64
    torchrun --nproc_per_node=8 launch/evaluate.py run=runs/moba_32k data=held_out.parquet id_field=package

position_loss: the loss by position on held-out documents, those of the run's own data unless others are named. The
same weights can be measured under another attention, and on documents of another length; launch/compare.py puts two
results beside each other.
routing: what the gate of each MoBA layer and head picks, and what it misses.
swap: the same weights under full attention, the gate's, the best, random and the latest blocks; prefill x decode.
recall: the share of right answers in generated tasks, of those that need the gate, under the same attentions.
Several processes share the documents; position_loss then gives the same bits as one.
"""

from __future__ import annotations

import re
import sys
from dataclasses import replace
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
sys.path[:] = [str(ROOT)] + [p for p in sys.path if Path(p or ".").resolve() != ROOT / "launch"]

from train.engine.world import init_world, launch_environment, shutdown  # noqa: E402 - first: decides what torch reads

# isort: split

from conf.numbers import format_length, parse_length  # noqa: E402
from conf.schema import SyntheticConfig  # noqa: E402
from data.errors import DataError  # noqa: E402
from data.synthetic import SIZES, SyntheticSource  # noqa: E402
from data.tokenizer import load_tokenizer  # noqa: E402
from data.validation import COHORTS  # noqa: E402
from evals.loading import attention_plan, load_trained  # noqa: E402
from evals.position_loss import evaluate  # noqa: E402
from evals.recall import recall, save_recall  # noqa: E402
from evals.recall import table as recall_table  # noqa: E402
from evals.results import Stopwatch, provenance  # noqa: E402
from evals.routing import HEAD, diagnose  # noqa: E402
from evals.routing_figures import draw_routing  # noqa: E402
from evals.statistics import half_width  # noqa: E402
from evals.swap import swap  # noqa: E402
from launch.cli import UsageError, exits_on, key_values  # noqa: E402
from launch.job import Job, open_tracker  # noqa: E402
from train.checkpoint.store import CheckpointError  # noqa: E402
from train.engine.collectives import all_reduce_sum  # noqa: E402
from train.record.position_loss import bucket_edges, default_num_buckets  # noqa: E402

KEYS = {
    "run": "run directory (its newest checkpoint), a checkpoint, or, with data=, a Hugging Face directory",
    "evals": "which, such as [position_loss,routing] (default: position_loss)",
    "attention": "stage (as trained, default), moba (the last trained with), full, or <block size>x<top_k> (512x3)",
    "seq_len": "length of the held-out documents (default: eval.seq_len of the run, else its stage's length)",
    "documents": "held-out documents at most (default: eval.documents of the run)",
    "data": "held-out documents instead of the run's: embedded, a file, a glob or a directory",
    "id_field": "column of data= that names a document (default: id)",
    "cluster": "regular expression; ids with the same match are one cluster of the errors (default: the whole id)",
    "cohort": "position_loss: fixed (default: documents of full length) or available (each bucket: all that fill it)",
    "bucket": "position_loss: tokens a bucket, a divisor of the length (default: 2K; a sixteenth below 32K)",
    "queries": "routing: queries of each document and layer whose blocks are measured one by one (default 256)",
    "last_tokens": "swap: tokens at the end that count as decoded (default 256, at most a quarter of the length)",
    "tasks": "recall: such as [mqar,passkey] (default: the run's own, else all)",
    "samples": "recall: documents of each task (default 64)",
    "device": "auto (default), cpu or cuda",
    "wandb": "disabled (default), auto, online or offline: also send the results there, as a run of their own",
    "to": "folder of the results (default: evals/ in the run directory)",
}


@exits_on(CheckpointError, DataError, ValueError, OSError, speaks=lambda: launch_environment().rank == 0)
def main(argv: list[str] | None = None) -> None:
    """The command; see the module's text."""
    values = key_values(sys.argv[1:] if argv is None else argv, KEYS, about=__doc__, required=["run"])
    chosen = _choices(values)
    launched = launch_environment()
    device, reduce = values.get("device", "auto"), lambda tensor: tensor
    if launched.world_size > 1:
        device, reduce = init_world(device).device, all_reduce_sum
    trained = load_trained(values["run"], device)
    trained.model.set_attention(attention_plan(values.get("attention", "stage"), trained))
    tracker = open_tracker(trained, values) if launched.rank == 0 else None
    job = Job(trained, values, launched.rank, launched.world_size, reduce, tracker)
    for name in chosen:
        EVALS[name](job)
    if tracker is not None:
        tracker.finish()
    if launched.world_size > 1:
        shutdown()


def _choices(values: dict[str, str]) -> list[str]:
    """The evals asked for; UsageError for what can be seen to be wrong before anything is loaded."""
    chosen = [name.strip() for name in values.get("evals", "position_loss").strip("[]").split(",")]
    unknown = [name for name in chosen if name not in EVALS]
    if unknown:
        raise UsageError(f"evals={','.join(unknown)}: choose from {', '.join(EVALS)}")
    modes = ("disabled", "auto", "online", "offline")
    for key, choices in (("cohort", COHORTS), ("wandb", modes)):
        if key in values and values[key] not in choices:
            raise UsageError(f"{key}={values[key]}: choose one of {', '.join(choices)}")
    try:
        re.compile(values.get("cluster", ""))
    except re.error as error:
        raise UsageError(f"cluster={values['cluster']}: not a regular expression ({error})") from error
    return chosen


def position_loss(job: Job) -> None:
    """Writes position_loss_<tokens>_<length>_<attention>[_available] as .json, .npz and .png; prints the trailing
    loss."""
    watch, seq_len = Stopwatch(), job.seq_len
    num_buckets, cohort = _num_buckets(job, seq_len), job.values.get("cohort", "fixed")
    documents = job.held_out(bucket_edges(num_buckets, seq_len) if cohort == "available" else None)
    model = job.trained.model
    info = provenance(job.trained, watch, world_size=job.world_size)
    job.say(f"position_loss: {len(documents)} documents, {format_length(seq_len)} tokens, {info['attention']}")
    found = evaluate(
        model,
        documents,
        seq_len=seq_len,
        device=job.trained.device,
        num_buckets=num_buckets,
        cohort=cohort,
        cluster_of=job.cluster_of,
        rank=job.rank,
        world_size=job.world_size,
        reduce=job.reduce,
        watch=job.watch("position_loss"),
    )
    if job.rank:
        return
    kind = job.values.get("attention", "stage") + ("_available" if cohort == "available" else "")
    stem = f"position_loss_{job.trained.tokens:015d}_{format_length(seq_len)}_{kind}"
    info["seconds"] = watch.seconds
    path = found.save(job.folder, stem, **info)
    value, se, _, clusters = found.curve.trailing
    error = f"+- {half_width(se, clusters):.4f} (95 %, {clusters:.0f} clusters)"
    known = error if se == se else "(one cluster: no error estimate)"
    job.log("position_loss", {"trailing_loss": value, "trailing_se": se}, path.with_suffix(".png"))
    job.say(f"trailing loss {value:.4f} {known}, {info['seconds']:.0f} s\nwrote {path}")


def routing(job: Job) -> None:
    """Writes routing_<tokens>_<length>_<attention>.json, .npz and three .png, and prints the means."""
    watch, seq_len, trained = Stopwatch(), job.seq_len, job.trained
    documents = job.held_out()
    queries = job.integer("queries", 256)
    info = provenance(trained, watch, world_size=job.world_size)
    title = f"{info['run']}, {info['attention']}: routing at {format_length(seq_len)}, {len(documents)} documents"
    job.say(title)
    report = diagnose(
        trained.model,
        documents,
        device=trained.device,
        queries=queries,
        cluster_of=job.cluster_of,
        rank=job.rank,
        world_size=job.world_size,
        reduce=job.reduce,
        watch=job.watch("routing"),
    )
    if job.rank:
        return
    stem = f"routing_{trained.tokens:015d}_{format_length(seq_len)}_{job.values.get('attention', 'stage')}"
    info["seconds"] = watch.seconds
    path = report.save(job.folder, stem, **info, queries=queries)
    figures = draw_routing(report, job.folder, stem, title)
    job.log("routing", {name: float(report.overall(name).mean) for name in HEAD}, figures[0])
    job.say(f"{report.table()}\n{info['seconds']:.0f} s, wrote {path}")


def attention_swap(job: Job) -> None:
    """Writes swap_<tokens>_<length>_<attention>.json, .npz and .png, and prints the two tables."""
    watch, seq_len, trained = Stopwatch(), job.seq_len, job.trained
    documents = job.held_out()
    info = provenance(trained, watch, world_size=job.world_size)
    job.say(
        f"swap: {len(documents)} documents of {format_length(seq_len)} tokens, {info['attention']} and its variants"
    )
    report = swap(
        trained.model,
        documents,
        device=trained.device,
        last_tokens=job.integer("last_tokens", min(256, seq_len // 4)),
        cluster_of=job.cluster_of,
        rank=job.rank,
        world_size=job.world_size,
        reduce=job.reduce,
        watch=job.watch,
    )
    if job.rank:
        return
    stem = f"swap_{trained.tokens:015d}_{format_length(seq_len)}_{job.values.get('attention', 'stage')}"
    info["seconds"] = watch.seconds
    path = report.save(job.folder, stem, **info)
    numbers = {f"trailing_{row['attention']}": row["trailing"]["mean"] for row in report.rows()}
    job.log("swap", numbers, path.with_suffix(".png"))
    job.say(f"{report.table()}\n{info['seconds']:.0f} s, wrote {path}")


def recall_tasks(job: Job) -> None:
    """Writes recall_<tokens>_<length>_<attention>.json, .npz and .png, and prints the shares of right answers."""
    watch, trained = Stopwatch(), job.trained
    sources = {config.task: _synthetic_source(job, config) for config in _tasks(job)}
    samples = job.integer("samples", 64)
    reports = {}
    for task, source in sources.items():
        job.say(f"recall: {samples} documents of {task}, {format_length(source.config.length)} tokens")
        reports[task] = recall(
            trained.model,
            source,
            samples=samples,
            device=trained.device,
            rank=job.rank,
            world_size=job.world_size,
            reduce=job.reduce,
            watch=job.watch(task),
        )
    if job.rank:
        return
    seeds = {source.config.seed for source in sources.values()}
    info = provenance(trained, watch, world_size=job.world_size, seed=min(seeds))
    lengths = {source.config.length for source in sources.values()}
    stem = f"recall_{trained.tokens:015d}_{format_length(max(lengths))}_{job.values.get('attention', 'stage')}"
    path = save_recall(reports, job.folder, stem, **info)
    numbers = {f"{t}_{row['attention']}": row["all"]["accuracy"] for t, r in reports.items() for row in r.rows()}
    job.log("recall", numbers, path.with_suffix(".png"))
    job.say(f"{recall_table(reports)}\n{info['seconds']:.0f} s, wrote {path}")


def _tasks(job: Job) -> list[SyntheticConfig]:
    """Those asked for by name; else what the run was trained or validated on; else all."""
    data = job.trained.config.data
    own = {
        one.synthetic.task: one.synthetic for one in (*data.sources.values(), data.validation) if one and one.synthetic
    }
    if "tasks" not in job.values and own and "seq_len" not in job.values:
        return list(own.values())
    names = [name.strip() for name in job.values.get("tasks", ",".join(own or SIZES)).strip("[]").split(",")]
    if unknown := [name for name in names if name not in SIZES]:
        raise UsageError(f"tasks={','.join(unknown)}: choose from {', '.join(SIZES)}")
    block_size = next((spec.block_size for spec in job.trained.model.attention if spec.kind == "moba"), 64)
    shape = {"length": job.seq_len, "block_size": block_size}
    return [replace(own.get(name, SyntheticConfig(task=name)), **shape) for name in names]


def _synthetic_source(job: Job, config: SyntheticConfig) -> SyntheticSource:
    vocab_size = load_tokenizer(job.trained.config.data.tokenizer).vocab_size
    return SyntheticSource(config.task, config, vocab_size, held_out=True)


def _num_buckets(job: Job, seq_len: int) -> int:
    if "bucket" not in job.values:
        return default_num_buckets(seq_len)
    bucket = parse_length(job.values["bucket"])
    if bucket < 1 or seq_len % bucket:
        raise UsageError(f"bucket={job.values['bucket']}: must divide the length, {format_length(seq_len)}")
    return seq_len // bucket


EVALS = {"position_loss": position_loss, "routing": routing, "swap": attention_swap, "recall": recall_tasks}

if __name__ == "__main__":
    main()
