"""What launch/train.py hands to the training loop: the evaluation on held-out documents, and the figures of a run.

Both only observe: they change neither weights nor random state, and a run without them has the same losses.
"""

from __future__ import annotations

import re
from contextlib import nullcontext
from pathlib import Path

from conf.schema import RunConfig
from data.sources import Source
from data.synthetic import SyntheticSource
from data.tokenizer import load_tokenizer
from data.validation import held_out_documents
from evals.context import Context
from evals.figures import plot_curves, plot_heatmap, plot_history
from evals.position_loss import Evaluation, evaluate
from evals.recall import recall
from evals.results import Stopwatch
from evals.swap import OWN, VARIANTS, under, variant
from launch.samples import continued
from moba.stats import mean_stats, record_routing
from train.engine.engine import Engine
from train.engine.world import World
from train.loop import CURVES
from train.record.dashboard import Sample
from train.record.metrics import FILE_NAME, read_metrics
from train.record.position_loss import PositionCurve
from train.schedule import Schedule, Stage

FIGURES = "figures"


class HeldOutEvaluator:
    """What `eval.suite` asks for, on held-out documents, at the stage's length and with its attention: a
    train.loop.Evaluator."""

    def __init__(self, source: Source, config: RunConfig, schedule: Schedule, world: World):
        """Finds the documents of every length now: a length that none reaches is a DataError before training."""
        self._source, self._world, self._folder = source, world, config.run.folder / CURVES
        self._length, self._suite = config.eval.seq_len, config.eval.suite
        lengths = {self._length or stage.seq_len for stage in schedule.stages}
        self._documents = {length: held_out_documents(source, length, config.eval.documents) for length in lengths}
        self._num_samples = config.logging.samples if world.is_main else 0
        self._tokenizer = load_tokenizer(config.data.tokenizer) if self._num_samples else None
        self.routing: dict[int, dict[str, float]] = {}
        """The router's numbers of the last evaluation by layer."""
        self.samples: list[Sample] = []
        """Texts of the last evaluation (logging.samples), on rank 0."""

    def __call__(self, engine: Engine, stage: Stage, tokens: int) -> tuple[PositionCurve, dict[str, float]]:
        """The curve, scalars of the suite and the seconds it took; rank 0 also writes them into the run directory."""
        watch, length = Stopwatch(), self._length or stage.seq_len
        context = self._context(engine)
        with record_routing(engine.model) if self._suite != "loss" else nullcontext([]) as routing:
            found = self._evaluate(context, length)
        scalars = {f"route/{name}": value for name, value in mean_stats(routing).items()}
        routed = [i for i, spec in enumerate(context.model.attention) if spec.routing is not None]
        self.routing = {i: mean_stats([stats]) for i, stats in zip(routed, routing)}
        if self._suite != "loss" and isinstance(self._source, SyntheticSource):
            scalars |= self._recall(context, self._source, length)
        if self._suite == "swap":
            scalars |= self._swap(context, length)
        if self._tokenizer is not None:
            documents = self._documents[length][: self._num_samples]
            self.samples = [continued(context.model, self._tokenizer, name, batch) for name, batch in documents]
        if self._world.is_main:
            stem = f"eval_{tokens:015d}"
            found.result(stem).write(self._folder, stem, tokens=tokens, stage=stage.name, scalars=scalars)
        return found.curve, scalars | {"seconds": watch.seconds}

    def _context(self, engine: Engine) -> Context:
        world = self._world
        return Context(
            engine.model,
            world.device,
            engine=engine,
            rank=world.data_rank,
            world_size=world.data_size,
            reduce=world.sum_over_data,
        )

    def _evaluate(self, context: Context, length: int) -> Evaluation:
        return evaluate(context, self._documents[length], seq_len=length)

    def _recall(self, context: Context, source: SyntheticSource, length: int) -> dict[str, float]:
        """The share of right answers to the held-out recall task."""
        count = len(self._documents[length])
        report = recall(context, source, samples=count, variants=(OWN,))
        found = report.rows()[0]
        return {f"recall_{what}": found[what]["accuracy"] for what in ("all", "far") if found[what]["answers"]}

    def _swap(self, context: Context, length: int) -> dict[str, float]:
        """The trailing loss under each other variant of the attention in force."""
        plan, scalars = context.model.attention, {}
        for name in VARIANTS if any(spec.variants() for spec in plan) else ():
            if name != OWN:
                with under(context.model, variant(plan, name)):
                    scalars[f"trailing_{name}"] = self._evaluate(context, length).curve.trailing.value
        return scalars

    def forget_after(self, tokens: int) -> None:
        """Removes the files of evaluations beyond `tokens`."""
        for path, at in evaluation_files(self._folder, "*"):
            if at > tokens:
                path.unlink()


def evaluation_files(folder: Path, suffix: str) -> list[tuple[Path, int]]:
    """(file, tokens) of the evaluations in `folder`, in order of tokens."""
    found = [(path, re.fullmatch(r"eval_(\d{15})", path.stem)) for path in folder.glob(f"eval_*.{suffix}")]
    return sorted(((path, int(match[1])) for path, match in found if match), key=lambda pair: pair[1])


def draw_figures(run_dir: Path) -> dict[str, Path]:
    """The figures of a run as far as it has come, from its files alone: name -> PNG in run_dir/figures."""
    folder = run_dir / FIGURES
    folder.mkdir(parents=True, exist_ok=True)
    records = read_metrics(run_dir / FILE_NAME)
    boundaries = [(record["tokens"], record["stage"]) for record in records if record["kind"] == "stage"]
    drawn = {}

    series = {}
    for label, kind, key in (
        ("training", "train", "loss"),
        ("training, trailing", "train", "trailing_loss"),
        ("held out", "eval", "loss"),
        ("held out, trailing", "eval", "trailing_loss"),
    ):
        points = [(r["tokens"], r[key]) for r in records if r["kind"] == kind and r.get(key) is not None]
        if points:
            series[label] = tuple(zip(*points))
    if series:
        drawn["loss_over_tokens"] = folder / "loss_over_tokens.png"
        plot_history(series, drawn["loss_over_tokens"], boundaries)

    evaluations = [(at, PositionCurve.from_npz(path)) for path, at in evaluation_files(run_dir / CURVES, "npz")]
    if evaluations:
        drawn["heat_map"] = folder / "loss_by_position_over_training.png"
        plot_heatmap(evaluations, drawn["heat_map"], boundaries)
    ends = {record["end"]: record["stage"] for record in records if record["kind"] == "stage"}
    by_stage = {f"{ends[at]}, held out at its end": curve for at, curve in evaluations if at in ends}
    for path in sorted((run_dir / CURVES).glob("train_*.npz")):
        by_stage[f"{path.stem.split('_', 2)[2]}, training, all of it"] = PositionCurve.from_npz(path)
    if by_stage:
        drawn["loss_by_position"] = folder / "loss_by_position.png"
        plot_curves(by_stage, drawn["loss_by_position"], "Loss by position, by stage")
    return drawn
