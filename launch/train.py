"""Trains: `torchrun launch/train.py +exp=quickstart`, or with plain python for one process.

The same command again continues from the newest checkpoint of its run directory. In order: read the configuration,
print the plan, start the processes, open the data, build the trainer, train.
"""

from __future__ import annotations

import errno
import os
import signal
import sys
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any, NoReturn

ROOT = Path(__file__).resolve().parents[1]
# Python puts launch/ itself first, where `train` would be this file.
sys.path[:] = [str(ROOT)] + [p for p in sys.path if Path(p or ".").resolve() != ROOT / "launch"]

from train.engine.world import init_world, launch_environment, leave, shutdown  # noqa: E402 - first: decides what torch reads

# isort: split
import yaml  # noqa: E402

from conf.build import ConfigError  # noqa: E402
from conf.files import FileError, user_path  # noqa: E402
from conf.numbers import format_count, format_length  # noqa: E402
from conf.schema import RunConfig  # noqa: E402
from conf.trajectory import to_dict, trajectory_diff  # noqa: E402
from conf.validate import from_yaml  # noqa: E402
from data.errors import DataError  # noqa: E402
from data.sources import Source, open_sources, open_validation  # noqa: E402
from data.tokenizer import Tokenizer, load_tokenizer  # noqa: E402
from launch.config import EXIT_USER_ERROR, detect_hardware, load_asked, run_command  # noqa: E402
from launch.inputs import refuse_missing  # noqa: E402
from launch.observe import FIGURES, HeldOutEvaluator, draw_figures  # noqa: E402
from launch.stopping import ParentWatch, Peer, PeerWatch, exit_code, peers_here, stop_reasons  # noqa: E402
from moba.attention import BackendUnavailable  # noqa: E402
from train.checkpoint import checkpoint_dir, store  # noqa: E402
from train.checkpoint.run_lock import RunLock, RunLocked, lock_run  # noqa: E402
from train.engine import collectives, signals  # noqa: E402
from train.engine.signals import PreemptionFlag  # noqa: E402
from train.hf import pretrained, source_files  # noqa: E402
from train.loop import Observers, Trainer  # noqa: E402
from train.model.rope import check_stages  # noqa: E402
from train.model.sizes import embedding_rows  # noqa: E402
from train.non_finite import NonFiniteError  # noqa: E402
from train.plan.automatic import settle  # noqa: E402
from train.plan.plan import Plan, make_plan  # noqa: E402
from train.record.dashboard import Dashboard  # noqa: E402
from train.record.metrics import MetricsError, describe_plan  # noqa: E402
from train.record.position_loss import PositionCurve  # noqa: E402
from train.record.progress import Progress  # noqa: E402
from train.record.tensorboard import open_tensorboard  # noqa: E402
from train.record.tracking import Tracker  # noqa: E402
from train.schedule import Schedule, build_schedule  # noqa: E402
from train.spikes import SpikeError  # noqa: E402

USAGE = """\
usage: torchrun [--nproc_per_node=N] launch/train.py +exp=<name> [group=choice ...] [key=value ...]

Trains, or continues the run in run.dir. Plain python in place of torchrun starts one process."""

# What a user can put right; anything else is a bug and keeps its traceback. ConfigError is one too.
MISTAKES = (
    BackendUnavailable,
    DataError,
    FileError,
    MetricsError,
    NonFiniteError,
    RunLocked,
    SpikeError,
    store.CheckpointError,
)
EXIT_LOST = 1
# Figures for dashboards, which have charts of their own for the others: name there, and caption.
SHOWN_FIGURES = {
    "heat_map": ("heat_map", "Held-out per-token loss by context position over training"),
    "loss_by_position": ("by_stage", "Per-token loss by context position, by stage"),
}
# After this long torchrun has seen which process ended first, and has ended the others; its report names that one.
TORCHRUN_SECONDS = 2
# Of the system's errors: no room, no permission, or not the kind of file it has to be.
FILE_ERRORS = {
    getattr(errno, name)
    for name in ("ENOSPC", "EDQUOT", "EFBIG", "EROFS", "EACCES", "EPERM", "EEXIST", "ENOTDIR", "EISDIR", "ENAMETOOLONG")
}


def main(overrides: list[str]) -> None:
    """Trains as these overrides say. ConfigError for the user's mistakes; SystemExit with the code of a run that was
    saved and stopped."""
    watch = ParentWatch().start()
    launched = launch_environment()
    hardware = detect_hardware(launched.world_size, launched.local_world_size)
    config, asked = load_asked(overrides, hardware)
    check_stages(config)
    with _mistakes_in_words(config):
        tokenizer = load_tokenizer(config.data.tokenizer)
        run_dir = config.run.folder
        refuse_missing(config, overrides, continues=store.newest(run_dir) is not None)
        vocab_size = embedding_rows(config.model, tokenizer.vocab_size)
        plan = partial(make_plan, config, vocab_size, hardware, asked_tokens=asked)
        saved = _saved_run(run_dir)
        if saved is not None and not config.run.allow_changes:
            _refuse_another_trajectory(config, saved)
        if launched.rank == 0:
            print(plan().text(), flush=True)
        if saved is not None and saved.state["watched"] and saved.tokens >= config.schedule.tokens:
            if launched.rank == 0:
                _tidy(run_dir)
                print(
                    f"\n{run_dir} is finished. To train further from its weights, set another run.dir and "
                    f"init.source={run_dir}"
                )
            return
        _train(config, settle(config, vocab_size, hardware).config, tokenizer, plan, watch)


def _tidy(run_dir: Path) -> None:
    """Puts right what a kill after the last step left of a finished run, unless another process holds it."""
    with suppress(RunLocked):
        lock = RunLock(run_dir)
        store.clean_stale(run_dir)
        lock.release()


@contextmanager
def _mistakes_in_words(config: RunConfig, peers: PeerWatch | None = None) -> Iterator[None]:
    """Turns what a user can put right into a ConfigError; ends the process where a collective failed because another
    process is gone, which `peers` can name."""
    try:
        yield
    except MISTAKES as error:
        raise ConfigError([str(error)]) from error
    except RuntimeError as error:
        if not signals.lost_peer(error):
            raise
        _leave_lost_run(config, None if peers is None else peers.gone())
    except OSError as error:
        if error.errno not in FILE_ERRORS:
            raise
        places = f"The run writes into {config.run.dir} and {config.data.cache_dir}"
        raise ConfigError([f"{error}. {places}. Saved checkpoints are unchanged"]) from error


def _leave_lost_run(config: RunConfig, peer: Peer | None = None) -> NoReturn:
    """Ends this process: another one is gone, and nothing that all take part in can be done any more."""
    if threading.current_thread() is threading.main_thread():
        signal.signal(signal.SIGTERM, signal.SIG_IGN)  # torchrun's comes at this moment, and nothing would be said
    which = "another process" if peer is None else f"the process of rank {peer.rank} (pid {peer.pid})"
    _report_once(
        f"{which} of this run has ended, so all processes end. If it did not say why, torchrun's report names it and "
        f"its signal. What was done after the newest checkpoint in {config.run.dir} is lost; run the same "
        "command again "
        "to continue from there, or from the start if there is none"
    )
    sys.stdout.flush()
    time.sleep(TORCHRUN_SECONDS)
    os._exit(EXIT_LOST)  # the usual way out waits for the others, and with NCCL for a long time


def _say_stuck(config: RunConfig, name: str) -> None:
    """What is known of a process that does not come to an end after a signal."""
    _report_once(
        f"{name} came {signals.STUCK_SECONDS} s ago; the current step has not ended or is not saved yet. If another "
        "process of this run has died, which torchrun reports, it never will: the same command then continues from the "
        f"newest checkpoint in {config.run.dir}, if there is one",
        title="waiting",
    )


def _report_once(text: str, title: str = "error") -> None:
    """Says it, unless another process of the run has reported something."""
    if signals.first_to_report():
        print(f"{title}: {text}", file=sys.stderr, flush=True)


def _saved_run(run_dir: Path) -> store.Saved | None:
    """The newest checkpoint of the run in this directory, or None if it has none."""
    checkpoint_dir.refuse_incomplete(run_dir)
    newest = store.newest(run_dir)
    return None if newest is None else store.read(newest)


def _refuse_another_trajectory(config: RunConfig, saved: store.Saved) -> None:
    """ConfigError if this configuration would change the losses of the run that was saved."""
    differences = trajectory_diff(from_yaml(saved.config_yaml, saved.path / store.CONFIG), config)
    if differences:
        problem = (
            f"{config.run.dir} contains a run that this configuration would change. Choose another run.dir, "
            "restore its "
            "settings, or set run.allow_changes=true. It differs in:"
        )
        raise ConfigError(["\n      ".join([problem, *differences])])


def _train(
    config: RunConfig, settled: RunConfig, tokenizer: Tokenizer, plan: Callable[..., Plan], watch: ParentWatch
) -> None:
    """Trains as `settled` says; `config`, which may leave more to the machine, is what is kept."""
    world = init_world(config.run.device, config.parallel.sequence)
    # Rank 0's choices on all ranks: their collectives have to fit, whatever GPUs they have.
    model, stages = collectives.broadcast_object((settled.model, settled.schedule))
    settled = replace(settled, model=model, schedule=stages)
    run_dir, schedule = config.run.folder, build_schedule(settled)
    lock = lock_run(run_dir, world)
    if world.is_main:
        store.clean_stale(run_dir)

    progress = None

    def say(line: str) -> None:
        if world.is_main:
            print(line, flush=True) if progress is None else progress.say(line)

    opening = {"rank_zero": world.is_main, "barrier": collectives.barrier, "log": say}
    sources = open_sources(config.data, **opening)
    held_out = open_validation(config.data, **opening)
    known = plan(sources=sources)
    say("\n".join(known.data))
    observers = Observers(say=say)
    evaluator = None if held_out is None else HeldOutEvaluator(held_out, config, schedule, world)
    observers.evaluate = evaluator
    config_yaml = yaml.safe_dump(to_dict(config), sort_keys=False)
    trainer = Trainer(settled, schedule, sources, tokenizer, world, observers, config_yaml=config_yaml)
    dashboard = None
    if world.is_main:
        (run_dir / "config.yaml").write_text(config_yaml, encoding="utf-8")
        if trainer.tokens == 0:
            _keep_source(config)
        (run_dir / "plan.txt").write_text(known.text() + "\n", encoding="utf-8")
        dashboard = _open_dashboard(config, schedule, sources, trainer, say)
        progress = Progress(schedule.total_tokens, tokens=trainer.tokens, bar=config.logging.progress)
        _watch(observers, config, trainer, evaluator, dashboard, progress)
    watch.flag = preemption = PreemptionFlag(stuck=partial(_say_stuck, config)).install()
    peers = PeerWatch(peers_here(), partial(_leave_lost_run, config)).start()
    try:
        # In here as well: torchrun's SIGTERM must not end a process that is about to say that another one is lost.
        with _mistakes_in_words(config, peers):
            try:
                finished = trainer.fit(preemption)
            except NonFiniteError as error:
                if dashboard is not None:
                    dashboard.failed(str(error))
                    dashboard.finish(exit_code=EXIT_USER_ERROR)
                raise
            finally:
                if progress is not None:
                    progress.close()
    finally:
        peers.stop()
        preemption.uninstall()
    reasons = [] if finished else stop_reasons(preemption)
    if dashboard is not None:
        _say_goodbye(finished, reasons, config, trainer)
        dashboard.finish()
        assert lock is not None
        lock.release()
    shutdown()
    if not finished:
        raise SystemExit(exit_code(reasons))


def _keep_source(config: RunConfig) -> None:
    """Copies tokenizer and config.json of what the run starts from into its directory."""
    source = None
    if config.init.source is not None:
        given = user_path(config.init.source)
        source = pretrained.locate(given, weights=False) if pretrained.is_model(given) else given
    source_files.keep(config, config.run.folder, source)


def _open_dashboard(
    config: RunConfig, schedule: Schedule, sources: dict[str, Source], trainer: Trainer, say: Callable[[str], None]
) -> Dashboard:
    """wandb, and TensorBoard if asked for, with what tells this run from others."""
    assert config.run.name is not None  # filled in
    shown = to_dict(config)
    longest = max(stage.seq_len for stage in schedule.stages)
    in_words = [
        f"{stage.name}: {describe_plan(stage.attention)}, context {format_length(stage.seq_len)}, "
        f"{format_count(stage.tokens)} tokens"
        for stage in schedule.stages
    ]
    tracker = Tracker(
        config.run.folder,
        config.logging,
        name=config.run.name,
        config={**shown, "stages": [stage.name for stage in schedule.stages]},
        tags=[config.model.name, *config.data.sources, format_length(longest)],
        notes="\n".join(in_words),
        warn=say,
    )
    board = None
    if config.logging.tensorboard:
        board = open_tensorboard(config.run.folder, config=shown, tokens=trainer.tokens, warn=say)
    sinks = [tracker] if board is None else [tracker, board]
    sizes = {name: source.num_tokens for name, source in sources.items()}
    return Dashboard(sinks, schedule.stages, source_tokens=sizes, skipped_steps=trainer.guard.total)


def _watch(
    observers: Observers,
    config: RunConfig,
    trainer: Trainer,
    evaluator: HeldOutEvaluator | None,
    dashboard: Dashboard,
    progress: Progress,
) -> None:
    """Connects console, dashboards and figures to the run (rank 0)."""

    def show(record: dict) -> None:
        kind = record["kind"]
        beside: dict[str, Any] = {}
        if kind == "train":
            progress.update(record)
        elif kind == "stage":
            progress.say(
                f"stage {record['stage']}: {record['attention']}, context {record['seq_len']}, "
                f"until {record['end']:,} tokens"
            )
        elif kind == "eval":
            trailing = f"trailing {_figure(record['trailing_loss'])} ({record['documents']} documents"
            trailing = (
                trailing if record["documents"] else "no supervised token in the last part of the context (0 documents"
            )
            progress.say(
                f"evaluation at {record['tokens']:,} tokens: loss {_figure(record['loss'])}, {trailing} of "
                f"{record['eval_seq_len']}){_cost(record)}"
            )
            assert evaluator is not None
            beside = {"routing": evaluator.routing, "samples": evaluator.samples}
        dashboard.record(record, **beside)

    def send_curve(name: str, curve: PositionCurve, tokens: int) -> None:
        dashboard.curve(name, curve, tokens)
        if config.logging.figures:
            drawn = draw_figures(trainer.run_dir)
            for figure, (shown, caption) in SHOWN_FIGURES.items():
                if figure in drawn:
                    dashboard.image(shown, drawn[figure], tokens, caption)

    observers.heartbeat = progress.heartbeat
    observers.record.append(show)
    observers.curve.append(send_curve)


def _cost(record: dict) -> str:
    """The time an evaluation took."""
    return f", {record['seconds']:.1f} s" if "seconds" in record else ""


def _figure(value: float | None) -> str:
    return "not finite" if value is None else f"{value:.4f}"


def _say_goodbye(finished: bool, reasons: list[str], config: RunConfig, trainer: Trainer) -> None:
    if not finished:
        print(
            f"stopped by {' and '.join(reasons) or 'a signal'} at {trainer.tokens:,} tokens, checkpoint saved: "
            f"{trainer.last_checkpoint}. Run the same command again to continue"
        )
        return
    figures = f" Figures are in {trainer.run_dir / FIGURES}." if config.logging.figures else ""
    print(f"finished: {trainer.tokens:,} tokens. The model is in {trainer.last_checkpoint}.{figures}")


def command() -> NoReturn:
    """The command, with the process's arguments; does not return."""
    leave(run_command(main, sys.argv[1:], USAGE, quiet=launch_environment().rank > 0))


if __name__ == "__main__":
    command()
