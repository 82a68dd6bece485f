"""The one training loop: a staged run from its first token, or from a checkpoint, to its last.

`Trainer.fit` is the run, to be read top to bottom. Everything that decides the trajectory happens in it or in
`train_step`; what is passed in (evaluation, figures, wandb, the progress bar) only observes. Progress is counted in
tokens, so the state of a run is: weights and moments (engine), tokens and steps, the loader's position, the loss sums
by position, the spike statistics, and the random state. A checkpoint is copied to the host in the loop and written
asynchronously (train/checkpoint/saving.py), one at a time.

Host synchronisations: those of the step (train/step.py). Whether a step was skipped, and a log interval's sums, are
copied to the host and, on a GPU, read once the next step's first micro-batch is queued, so that the device never waits
for it; and always before anything else is written.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Protocol

import torch

from conf.exchange import exchange
from conf.files import user_path
from conf.schema import RunConfig
from data.loader import Loader
from data.packing import Batch
from data.sources import Source
from data.tokenizer import Tokenizer
from train.checkpoint import store
from train.checkpoint.rng import load_rng, seed_rank
from train.engine.collectives import OnHost, on_device
from train.engine.engine import Engine
from train.engine.optim import build_engine, build_model
from train.engine.signals import PreemptionFlag
from train.engine.world import World
from train.hf import pretrained
from train.model.sizes import embedding_rows
from train.non_finite import NonFiniteGuard
from train.record.metrics import FILE_NAME, MetricsLog, stage_columns
from train.record.position_loss import PositionCurve, PositionLoss
from train.record.throughput import Throughput, Work
from train.schedule import Schedule, Stage
from train.spikes import MAX_ROLLBACKS, SpikeError, Spikes
from train.step import StepResult, train_step

CURVES = "position_loss"


class Evaluator(Protocol):
    """Measures the model on held-out documents. Called on all ranks alike; must not change weights or random state."""

    def __call__(self, engine: Engine, stage: Stage, tokens: int) -> tuple[PositionCurve, dict[str, float]] | None:
        """The held-out curve, and scalars to be logged beside it; None without held-out documents."""

    def forget_after(self, tokens: int) -> None:
        """Removes what was written beyond `tokens` before a resume."""


@dataclass
class Observers:
    """What watches a run on rank 0; each is a callable so that a test, a script or launch/ can hand in its own."""

    evaluate: Evaluator | None = None
    record: list[Callable[[dict[str, Any]], None]] = field(default_factory=list)
    """Get every line of metrics.jsonl."""
    curve: list[Callable[[str, PositionCurve, int], None]] = field(default_factory=list)
    """Get (name, curve, tokens) of every evaluation and of each stage's training losses."""
    heartbeat: Callable[[int, int], None] | None = None
    """Gets (k, n) after micro-batch k of the n of a step."""
    say: Callable[[str], None] = lambda line: None
    """Gets lines for people."""


class Trainer:
    """A run. Build it on every rank, then call `fit`."""

    def __init__(
        self,
        config: RunConfig,
        schedule: Schedule,
        sources: dict[str, Source],
        tokenizer: Tokenizer,
        world: World,
        observers: Observers,
        *,
        config_yaml: str,
    ):
        """Builds model, engine and loader, and loads the newest checkpoint of `run.dir`, else `init.source`.

        `config_yaml` goes into every checkpoint. Raises CheckpointError, DataError or ValueError for user errors.
        """
        self.config, self.schedule, self.world, self.observers = config, schedule, world, observers
        assert config.run.dir is not None and config.data.seed is not None  # filled in when frozen
        self.run_dir = Path(config.run.dir)
        self._config_yaml = config_yaml
        self._tokenizer = {"name": tokenizer.name, "fingerprint": tokenizer.fingerprint}
        self.tokens = self.step = 0
        self.stage: Stage | None = None
        self.last_checkpoint: Path | None = None
        seed_rank(config.run.seed)
        torch.use_deterministic_algorithms(config.run.deterministic, warn_only=True)
        vocab_size = embedding_rows(config.model, tokenizer.vocab_size)
        model = build_model(config, vocab_size)
        first = schedule.stages[0]
        model.set_attention(first.attention)
        model.set_rope(first.rope)
        model.set_sequence_axis(world.sequence_axis(exchange(config).by))
        self.engine: Engine = build_engine(model, config, world)
        self.model = self.engine.model
        self.loader = Loader(
            sources,
            seed=config.data.seed,
            rank=world.data_rank,
            world_size=world.data_size,
            interleave=config.data.interleave,
            pin_for=world.device if world.device.type == "cuda" else None,
        )
        self.guard = NonFiniteGuard(config.optim.max_bad_steps)
        self.spikes = None
        if config.run.on_spike != "off":
            self.spikes = Spikes(config.run.spike_deviations, config.run.spike_window, world.device)
        self._rollbacks = 0  # since a checkpoint was saved
        self.metrics = MetricsLog(self.run_dir / FILE_NAME if world.is_main else None)
        name = torch.cuda.get_device_name(world.device) if world.device.type == "cuda" else None
        self.throughput = Throughput(config.model, vocab_size, num_devices=world.world_size, device_name=name)
        self._stage_loss = PositionLoss(first.seq_len, world.device)
        self._interval_loss = PositionLoss(first.seq_len, world.device)
        self._saved: store.Saved | None = None  # until its sums are restored
        self._saving: store.Saving | None = None  # until it is known to be complete
        self._host_buffer: store.HostBuffer | None = None  # for the copies of asynchronous saves
        self._save_wait = self._save_write = 0.0
        self._watch_missing = False
        self._unknown: OnHost | None = None  # whether the last step was skipped
        self._line: Callable[[], None] | None = None
        self._can_wait = world.device.type == "cuda"
        self._reset_interval()
        self._start()

    # -------------------- the run

    def fit(self, preemption: PreemptionFlag) -> bool:
        """Trains until the schedule ends (returns True) or a signal asked to stop (returns False, saved)."""
        config = self.config
        self._emit(self.metrics.write("run", self.tokens, **self.throughput.describe()))
        if config.checkpoint.asynchronous:
            self._host_buffer = store.host_buffer(self.engine, self.world.device, self.observers.say)
        self.throughput.lap()  # starts the clock
        if self._watch_missing:
            last = self._enter(self.schedule.lookup(min(self.tokens, self.schedule.total_tokens) - 1))
            ends = self.tokens >= last.end
            self._watch(last, ends)
            self._save(last, ends, watched=True, at_once=True)
        while self.tokens < self.schedule.total_tokens:
            stage = self._enter(self.schedule.lookup(self.tokens))
            batches = self.loader.next_step()
            result = train_step(
                self.engine,
                batches,
                lr=self.schedule.learning_rate(self.tokens),
                world=self.world,
                stop=preemption.requested,
                on_losses=self._count,
                on_micro_batch=self._micro_batch_done,
                spikes=self.spikes,
            )
            if result.spike and self._go_back(stage, result):
                if result.stop:
                    return False
                continue
            self._after_step(stage, batches, result)
            if self._saving is not None and self._saving.poll():
                self._finish_save()

            ends = self.tokens >= stage.end
            watch_due = ends or self._due(config.eval.every_tokens, stage)
            save_due = ends or self._due(config.checkpoint.every_tokens, stage)
            at_once = watch_due or save_due or result.stop or not self._can_wait
            if at_once:
                self._settle()
            if watch_due or save_due or self._due(config.logging.every_tokens or 1, stage):
                self._log(stage)
            if at_once:
                self._write_line()
            # A stop does not wait for an evaluation: the next start makes up for it.
            if watch_due and not result.stop:
                self._watch(stage, ends)
            if save_due or result.stop:
                self._save(stage, ends, watched=not (watch_due and result.stop), at_once=result.stop)
            if result.stop:
                return False
        self._finish_save()
        return True

    def _micro_batch_done(self, index: int, number: int) -> None:
        self._settle()
        self._write_line()
        if self.observers.heartbeat is not None:
            self.observers.heartbeat(index, number)

    def _enter(self, stage: Stage) -> Stage:
        """Switches to `stage`. All that changes: attention plan, RoPE, length, batch and data mix; and at its start,
        where the stage says so, the optimizer is reset."""
        if stage is self.stage:
            return stage
        if stage.reset_optimizer and self.tokens == stage.start:
            self.engine.reset_moments()
        if self.spikes is not None and self.tokens == stage.start:
            self.spikes.forget()
        self.model.set_attention(stage.attention)
        self.model.set_rope(stage.rope)
        with self.throughput.paused():
            self.model.prepare_attention(stage.seq_len, self.world.device)
        self.loader.set_stage(
            seq_len=stage.seq_len,
            batch_tokens=stage.batch_tokens,
            micro_tokens=stage.micro_tokens,
            mix=stage.mix,
            long_documents=stage.long_documents,
        )
        self._stage_loss = PositionLoss(stage.seq_len, self.world.device)
        self._interval_loss = PositionLoss(stage.seq_len, self.world.device)
        self._take_up_sums(stage)
        self.stage = stage
        line = self.metrics.stage(stage)
        if line is not None:
            self._emit(line)
        return stage

    def _count(self, losses: torch.Tensor, batch: Batch) -> None:
        for position_loss in (self._stage_loss, self._interval_loss):
            position_loss.add(losses, batch.positions, batch.labels, batch.cu_seqlens)

    def _after_step(self, stage: Stage, batches: list[Batch], result: StepResult) -> None:
        self.tokens += stage.batch_tokens
        self.step += 1
        for batch in batches:
            self.throughput.add(stage.attention, batch.lengths)
        self._interval_sum += result.loss_sum.masked_fill(result.skipped, 0)
        self._interval_tokens += result.num_tokens * ~result.skipped
        self._grad_norm = result.grad_norm
        self._unknown = OnHost(result.skipped)

    def _settle(self) -> None:
        """Counts the last step as taken or skipped, if not yet done; waits for its end."""
        unknown, self._unknown = self._unknown, None
        if unknown is None:
            return
        skipped = bool(unknown.read()[0])
        if skipped:
            self._finish_save()  # the guard may name it
        self.guard.update(skipped, tokens=self.tokens, last_checkpoint=self.last_checkpoint)

    def _due(self, every: int, stage: Stage) -> bool:
        """True if the step that just ended crossed a multiple of `every` tokens (0 = never)."""
        return every > 0 and self.tokens // every > (self.tokens - stage.batch_tokens) // every

    # -------------------- watching

    def _reset_interval(self) -> None:
        """Starts a log interval."""
        self._interval_sum = torch.zeros((), dtype=torch.float64, device=self.world.device)
        self._interval_tokens = torch.zeros((), dtype=torch.int64, device=self.world.device)
        self._interval_loss.reset()
        self._save_wait = self._save_write = 0.0

    def _log(self, stage: Stage) -> None:
        """Closes the log interval that ends here; `_write_line` writes its line."""
        losses = self._interval_loss.all_reduce(self.world.data_group)
        loss_sum = self.world.sum_over_data(self._interval_sum)
        work = on_device(torch.tensor(self.throughput.take(), dtype=torch.int64), self.world.device)
        work = self.world.sum_over_data(work)
        on_host = OnHost(losses.sums, loss_sum, work, self._grad_norm, self._interval_tokens)
        tokens = self.tokens
        known = {
            "step": self.step,
            **stage_columns(stage),
            "lr": self.schedule.learning_rate(tokens - stage.batch_tokens),
            **({} if self.spikes is None else {"spikes": self.spikes.total}),
            "save_wait_seconds": self._save_wait,
            "save_write_seconds": self._save_write,
            "peak_memory_gib": self._peak_memory(),
        }

        def line() -> None:
            sums, loss_sum, work, grad_norm, interval_tokens = on_host.read()
            supervised = int(interval_tokens)
            rates = self.throughput.rates(Work(*work.tolist()), self.throughput.lap())
            record = self.metrics.write(
                "train",
                tokens,
                **known,
                supervised_tokens=supervised,
                skipped_steps=self.guard.total,
                loss=loss_sum.item() / supervised if supervised else float("nan"),
                trailing_loss=losses.with_sums(sums).curve().trailing.value,
                grad_norm=grad_norm.item(),
                **rates,
                eta_seconds=self.throughput.eta_seconds(self.schedule.stages, tokens, rates["tokens_per_second"]),
            )
            self._emit(record)

        self._line = line
        self._reset_interval()

    def _write_line(self) -> None:
        """Writes the line of the last log interval, if that is still to be done."""
        line, self._line = self._line, None
        if line is not None:
            line()

    def _peak_memory(self) -> float | None:
        """Peak device memory allocated so far on this rank, GiB; None on a CPU."""
        if self.world.device.type != "cuda":
            return None
        return torch.cuda.max_memory_allocated(self.world.device) / 2**30

    def _watch(self, stage: Stage, ends: bool) -> None:
        """Evaluates, and at the end of a stage writes its training losses by position."""
        self._finish_save()
        with self.throughput.paused():
            self._evaluate(stage)
            if ends:
                self._finish_stage(stage)

    def _evaluate(self, stage: Stage) -> None:
        if self.observers.evaluate is None:
            return
        self.engine.eval()
        found = self.observers.evaluate(self.engine, stage, self.tokens)
        self.engine.train()
        if found is None:
            return
        curve, scalars = found
        record = self.metrics.write(
            "eval",
            self.tokens,
            **stage_columns(stage),
            eval_seq_len=curve.max_length,
            loss=curve.total_mean,
            trailing_loss=curve.trailing.value,
            trailing_se=curve.trailing.se,
            trailing_freedom=curve.trailing_interval_freedom,
            documents=int(curve.trailing.clusters),
            **scalars,
        )
        self._emit(record)
        self._show_curve("eval", curve)

    def _finish_stage(self, stage: Stage) -> None:
        """Writes the training losses by position of a stage that ended here."""
        curve = self._stage_loss.all_reduce(self.world.data_group).curve()
        if self.world.is_main:
            folder = self.run_dir / CURVES
            folder.mkdir(parents=True, exist_ok=True)
            curve.to_npz(folder / f"train_{stage.index}_{stage.name}.npz")
        self._show_curve(f"train/{stage.name}", curve)

    def _show_curve(self, name: str, curve: PositionCurve) -> None:
        if self.world.is_main:
            for observer in self.observers.curve:
                observer(name, curve, self.tokens)

    def _emit(self, record: dict[str, Any]) -> None:
        if self.world.is_main:
            for observer in self.observers.record:
                observer(record)

    # -------------------- saving and resuming

    def _save(self, stage: Stage, ends: bool, watched: bool, at_once: bool) -> None:
        """Saves a checkpoint here; a collective. Not `watched`: `_watch` is still to be called here. `at_once`: it is
        complete on return, whatever checkpoint.asynchronous says."""
        self._finish_save()
        self._rollbacks = 0
        group = self.world.data_group
        sums = {"stage": self._stage_loss.all_reduce(group), "interval": self._interval_loss.all_reduce(group)}
        state = {
            "step": self.step,
            "stage": stage.name,
            "watched": watched,
            "tokenizer": self._tokenizer,
            "loader": self.loader.state_dict(),
            "guard": self.guard.state_dict(),
            "interval_tokens": int(self._interval_tokens),
            "max_length": sums["stage"].max_length,
            "num_buckets": sums["stage"].num_buckets,
        }
        tensors = {name: total.state_dict()["state"] for name, total in sums.items()}
        tensors["interval_sum"] = self.world.sum_over_data(self._interval_sum.clone())
        if self.spikes is not None:
            spikes = self.spikes.state_dict()
            state["spikes"], tensors["spikes"] = spikes["total"], spikes["recent"]
        at_once = at_once or not self.config.checkpoint.asynchronous
        with self._waiting_for_save():
            self._saving = store.start_save(
                self.run_dir,
                self.engine,
                tokens=self.tokens,
                state=state,
                tensors=tensors,
                config_yaml=self._config_yaml,
                stage_end=ends and self.config.checkpoint.keep_stage_ends,
                keep=self.config.checkpoint.keep,
                at_once=at_once,
                buffer=None if at_once else self._host_buffer,
            )
        if at_once:
            self._finish_save()

    def _finish_save(self) -> None:
        """Waits for the unfinished save, if there is one; a collective. CheckpointError if it failed."""
        if self._saving is not None:
            with self._waiting_for_save():
                self.last_checkpoint = self._saving.wait()
            self._save_write += self._saving.seconds
            self._saving = None

    @contextmanager
    def _waiting_for_save(self) -> Iterator[None]:
        """Measures the time that training waits for a save, and excludes it from throughput."""
        began = time.perf_counter()
        with self.throughput.paused():
            yield
        self._save_wait += time.perf_counter() - began

    def _start(self) -> None:
        """Loads the newest checkpoint of this run, else the weights of init.source, else starts from scratch."""
        newest = store.newest(self.run_dir)
        if newest is not None:
            self._resume(newest)
        elif self.config.init.source is not None:
            self._start_from(user_path(self.config.init.source))
        self.metrics.cut_back(self.tokens, evaluated=not self._watch_missing)
        if self.observers.evaluate is not None and self.world.is_main:
            self.observers.evaluate.forget_after(self.tokens)

    def _resume(self, path: Path) -> None:
        saved = self._take_up(path)
        self.last_checkpoint = path
        self._watch_missing = not saved.state["watched"]
        for line in self.loader.load_state_dict(saved.state["loader"], allow_changes=self.config.run.allow_changes):
            self.observers.say(f"run.allow_changes=true: {line}")
        self.observers.say(f"continuing from {path}: {self.tokens:,} of {self.schedule.total_tokens:,} tokens")

    def _take_up(self, path: Path) -> store.Saved:
        """Restores a checkpoint of this run except the position in the data; its sums when the stage is entered."""
        store.load_engine(self.engine, path)
        self._saved = saved = store.read(path)
        self.tokens, self.step = saved.tokens, saved.state["step"]
        self.guard.load_state_dict(saved.state["guard"])
        if self.spikes is not None and "spikes" in saved.state:  # not if run.on_spike was off until then
            self.spikes.load_state_dict({"total": saved.state["spikes"], "recent": saved.tensors["spikes"]})
        load_rng(path, seed=self.config.run.seed)
        return saved

    def _go_back(self, stage: Stage, result: StepResult) -> bool:
        """Applies run.on_spike to the step just skipped as a spike: True if the run went back to a checkpoint;
        SpikeError if it ends here. The data continues after the step in any case.

        A process that resumes from that checkpoint meets the same spike in the same data and does the same, so nothing
        of this is saved before the next checkpoint.
        """
        assert self.spikes is not None
        self.spikes.total += 1
        action, total, at = self.config.run.on_spike, self.spikes.total, self.tokens + stage.batch_tokens
        if action == "skip":
            return False
        self._finish_save()
        loss = self.world.sum_over_data(result.loss_sum.clone()).item() / max(result.num_tokens, 1)
        norm = result.grad_norm.item()
        found = f"the step up to {at:,} tokens is a spike (loss {loss:.4f}, gradient norm {norm:.4g})"
        path = self.last_checkpoint
        if action == "stop" or self._rollbacks == MAX_ROLLBACKS:
            often = f", the {MAX_ROLLBACKS + 1}th since the newest checkpoint" if action == "rollback" else ""
            kept = f"The newest checkpoint is {path}" if path else "There is no checkpoint yet"
            raise SpikeError(
                f"{found}{often}: run.on_spike={action} ends the run; the step was not applied. {kept}. The same "
                "command with run.on_spike=skip (or rollback) and run.allow_changes=true continues past the spike"
            )
        if path is None:
            self.observers.say(f"{found}: skipped, since there is no checkpoint to go back to yet")
            return False
        self._rollbacks += 1
        self.engine.reset_moments()  # a checkpoint of no steps has none
        self._take_up(path)
        self.spikes.total = total
        self.stage = None  # to be entered again
        self._reset_interval()
        self.throughput.take()
        self.throughput.lap()
        self.metrics.cut_back(self.tokens, restarted=False)
        if self.observers.evaluate is not None and self.world.is_main:
            self.observers.evaluate.forget_after(self.tokens)
        where = {"stage": stage.name, "from_tokens": at, "loss": loss, "grad_norm": norm, "in_a_row": self._rollbacks}
        self._emit(self.metrics.write("rollback", self.tokens, **where))
        self.observers.say(f"{found}: going back to {path} and continuing with the data after the spike")
        return True

    def _take_up_sums(self, stage: Stage) -> None:
        """Restores a checkpoint's sums, if it was saved within this stage.

        They are sums over the data axis: ranks at its index 0 restore them, the others start from zero.
        """
        saved, self._saved = self._saved, None
        if saved is None or self.tokens == stage.start or saved.state["stage"] != stage.name:
            return
        if saved.state["max_length"] != stage.seq_len:  # changed by hand (run.allow_changes)
            return
        self._interval_tokens.fill_(saved.state["interval_tokens"])
        if self.world.data_rank == 0:
            shape = {key: saved.state[key] for key in ("max_length", "num_buckets")}
            self._stage_loss.load_state_dict(shape | {"state": saved.tensors["stage"]})
            self._interval_loss.load_state_dict(shape | {"state": saved.tensors["interval"]})
            self._interval_sum.copy_(saved.tensors["interval_sum"])

    def _start_from(self, source: Path) -> None:
        """Loads weights from a Hugging Face model, or from a run or a checkpoint with what else init.* asks for."""
        if pretrained.is_model(source):
            path = pretrained.load_engine(self.engine, self.config.model, source)
            self.observers.say(f"starting from {path}: weights")
            return
        path = store.find(source)
        saved = store.read(path)
        theirs = saved.state["tokenizer"]
        if theirs["fingerprint"] != self._tokenizer["fingerprint"]:
            raise store.CheckpointError(
                f"init.source={source} was trained with another tokenizer, {theirs['name']!r}; here data.tokenizer is "
                f"{self._tokenizer['name']!r}, which has other token ids"
            )
        store.load_engine(self.engine, path, optimizer=self.config.init.optimizer)
        taken = ["weights"] + ["optimizer state"] * self.config.init.optimizer
        if self.config.init.data:
            self.loader.load_state_dict(saved.state["loader"])
            load_rng(path, seed=self.config.run.seed)
            taken.append("data position")
        self.observers.say(f"starting from {path}: {', '.join(taken)}")
