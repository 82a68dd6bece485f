"""Logs a run to wandb: online if logged in, else an offline run beside the other outputs.

It never prompts, never waits long for a network and never stops a run: a failure of wandb gives one line of warning.
metrics.jsonl is the record of a run; wandb shows it, under the names of series.py and over tokens. Only rank 0 makes a
Tracker.
"""

from __future__ import annotations

import re
import secrets
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any, Literal

from conf.schema import LoggingConfig
from train.engine.world import check_variable, drop_if_empty
from train.record.dashboard import Sample
from train.record.series import AXIS, SUMMARIES

WANDB_MODES = ("online", "offline", "disabled", "dryrun", "run", "shared")
"""Of the environment variable WANDB_MODE."""

ID_FILE = "wandb_id.txt"
INIT_SECONDS = 20.0
FINISH_SECONDS = 60.0
ALERT_SECONDS = 600
TAG_CHARACTERS = 64  # wandb refuses longer ones


class Tracker:
    """One wandb run, the same one after a resume: a train.record.dashboard.Sink. With logging.wandb=disabled every
    method does nothing."""

    def __init__(
        self,
        run_dir: Path | str,
        logging: LoggingConfig,
        *,
        name: str,
        config: Mapping[str, Any],
        job_type: str = "train",
        tags: Sequence[str] = (),
        notes: str | None = None,
        warn: Callable[[str], None] = print,
        fresh: bool = False,
    ) -> None:
        """Opens the run.

        run_dir: where the offline files (`wandb/`) and the run's id are kept. config: plain nested dicts, shown as the
        run's configuration. tags: besides those of `logging`; notes: where `logging` has none. warn: gets at most one
        line for what goes wrong, and one that says where the run can be seen. fresh: a new wandb run, not the
        directory's own.
        """
        self._run_dir = Path(run_dir)
        self._warn, self._fresh = warn, fresh
        self._run: Any = None
        if logging.wandb == "disabled":
            return
        self._shown = {
            "project": logging.project,
            "entity": logging.entity,
            "name": name,
            "config": dict(config),
            "job_type": job_type,
            "group": logging.group,
            "tags": list(dict.fromkeys(tag[:TAG_CHARACTERS] for tag in (*tags, *logging.tags) if tag)),
            "notes": logging.notes or notes,
        }
        self._run = self._open(logging)
        self._call(self._define)

    def _define(self) -> None:
        """Tokens as the x axis of all series, and summary rules of some."""
        self._run.define_metric(AXIS, hidden=True)
        self._run.define_metric("*", step_metric=AXIS)
        for name, summary in SUMMARIES.items():
            self._run.define_metric(name, step_metric=AXIS, summary=summary)

    def scalars(self, values: Mapping[str, float], tokens: int) -> None:
        """Adds a point to each series."""
        # The step is passed always: a resumed offline run would start counting at zero again.
        self._call(lambda: self._run.log({AXIS: tokens, **values}, step=tokens))

    def constants(self, values: Mapping[str, Any]) -> None:
        """Stores constants: `machine/` in the configuration, the rest in the summary."""
        machine = {name.partition("/")[2]: value for name, value in values.items() if name.startswith("machine/")}
        rest = {name: value for name, value in values.items() if not name.startswith("machine/")}

        def send() -> None:
            if machine:
                self._run.config.update({"machine": machine}, allow_val_change=True)
            if rest:
                self._run.summary.update(rest)

        self._call(send)

    def curve(self, name: str, title: str, positions: Sequence[float], losses: Sequence[float], tokens: int) -> None:
        """Draws losses (nats; NaN is left out) over context positions."""

        def send() -> None:
            import wandb

            points: list[Iterable[float]] = [(x, y) for x, y in zip(positions, losses) if y == y]
            table = wandb.Table(columns=["context position", "loss"], data=points)
            chart = wandb.plot.line(table, "context position", "loss", title=title)
            self._run.log({AXIS: tokens, name: chart}, step=tokens)

        self._call(send)

    def image(self, name: str, path: Path | str, tokens: int, caption: str | None = None) -> None:
        """Sends a picture (PNG), such as the heat map of the loss by context position over training."""

        def send() -> None:
            import wandb

            self._run.log({AXIS: tokens, name: wandb.Image(str(path), caption=caption)}, step=tokens)

        self._call(send)

    def samples(self, samples: Sequence[Sample], tokens: int) -> None:
        """Sends texts as a table."""

        def send() -> None:
            import wandb

            table = wandb.Table(columns=[AXIS, *Sample._fields], data=[[tokens, *sample] for sample in samples])
            self._run.log({AXIS: tokens, "samples/held_out": table}, step=tokens)

        self._call(send)

    def alert(self, title: str, text: str, *, severe: bool = False) -> None:
        """Sends a message to the owner, by mail or Slack as wandb is set up; at most one per title in ALERT_SECONDS."""
        level = "ERROR" if severe else "WARN"
        self._call(lambda: self._run.alert(title, text, level=level, wait_duration=ALERT_SECONDS))

    def finish(self, exit_code: int = 0) -> None:
        """Closes the run; waits at most FINISH_SECONDS for an upload. The rest stays on disk for `wandb sync`."""
        self._call(lambda: self._run.finish(exit_code=exit_code))
        self._run = None

    def _call(self, action: Callable[[], Any]) -> None:
        """Acts on the open run; if wandb fails, warns once and is off from then on."""
        if self._run is None:
            return
        _, error = _attempt(action)
        if error:
            self._warn(f"wandb failed and is off from now on, training continues: {error}")
            self._run = None

    def _open(self, logging: LoggingConfig) -> Any:
        """The open wandb run: as asked for, else offline, else None; each fallback with a line that says why."""
        mode, error = _attempt(lambda: wandb_mode(logging.wandb))
        if error:
            self._warn(f"wandb is off: {error}")
            return None
        if mode == "disabled":
            return None
        if mode == "not logged in":
            self._warn("wandb: not logged in (logging.wandb=online); writing an offline run instead")
            mode = "offline"
        for attempt in dict.fromkeys((mode, "offline")):
            run, error = _attempt(lambda attempt=attempt: self._init(attempt))
            if error is None:
                kept = f"offline run in {self._run_dir / 'wandb'} (`wandb sync` uploads it)"
                self._warn(f"wandb: {run.url if attempt == 'online' else kept}")
                return run
            self._warn(f"wandb {attempt} did not start: {error}")
            _attempt(_teardown)  # a failed start would keep the run's id occupied
        return None

    def _init(self, mode: Literal["online", "offline"]) -> Any:
        import wandb

        settings = wandb.Settings(
            silent=True, console="off", init_timeout=INIT_SECONDS, finish_timeout=FINISH_SECONDS, disable_code=True
        )
        return wandb.init(
            id=None if self._fresh else run_id(self._run_dir),
            resume="allow",
            dir=str(self._run_dir),
            mode=mode,
            settings=settings,
            **self._shown,
        )


def run_id(run_dir: Path) -> str:
    """The wandb id of a run directory, created and stored there the first time."""
    path = run_dir / ID_FILE
    text = path.read_text(encoding="ascii", errors="replace").strip() if path.is_file() else ""
    if not re.fullmatch(r"[0-9a-z]{4,64}", text):  # none yet, or incomplete
        text = secrets.token_hex(4)
        path.write_text(text + "\n", encoding="ascii")
    return text


def wandb_mode(asked: str) -> str:
    """`online`, `offline`, `disabled` or `not logged in`, from what was asked for and wandb's own settings.

    Looks at wandb's environment variables, settings and key files, of which WANDB_MODE=offline or disabled wins; never
    prompts or opens a connection. ValueError for a WANDB_MODE that wandb does not know.
    """
    import wandb

    drop_if_empty("WANDB_MODE")  # wandb takes "" for an unknown mode
    check_variable("WANDB_MODE", WANDB_MODES)
    own = wandb.setup(wandb.Settings(silent=True)).settings.mode
    if own == "disabled":
        return own
    if asked == "offline" or own == "offline":
        return "offline"
    if wandb.login(prompt=False, verify=False):
        return "online"
    return "offline" if asked == "auto" else "not logged in"


def _teardown() -> None:
    import wandb

    wandb.teardown()


def _attempt(action: Callable[[], Any]) -> tuple[Any, str | None]:
    """What `action` returns and None, or None and its error in a line.

    Catches Exception on purpose: wandb raises a dozen private classes that share no other base (a dead service, a
    closed mailbox, a refused setting), and none of them may end a training run.
    """
    try:
        return action(), None
    except Exception as error:
        return None, " ".join(str(error).split())[:300] or type(error).__name__
