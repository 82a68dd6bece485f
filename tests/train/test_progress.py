"""train/record/progress.py: readable on a terminal and in a log file alike."""

import io
import os
import re

import pytest

from train.record import progress
from train.record.progress import Progress, clock, describe


class Terminal(io.StringIO):
    """A stream that says it is a terminal."""

    def isatty(self):
        return True

    def fileno(self):
        return 1


@pytest.fixture
def lines_of_terminal(monkeypatch):
    """Sets how many lines the terminal says it has; 30 to begin with."""

    def set_lines(lines):
        monkeypatch.setattr("train.record.progress.os.get_terminal_size", lambda fd: os.terminal_size((100, lines)))

    set_lines(30)
    return set_lines


def record(tokens, **values):
    return {"kind": "train", "tokens": tokens, "stage": "sparse", "loss": 2.5, "tokens_per_second": 5200.0, **values}


def run(stream, steps=1000, **options):
    progress = Progress(1000 * steps, stream=stream, **options)
    progress.say("stage 1/2 sparse")
    for step in range(1, steps + 1):
        progress.update(
            record(1000 * step, trailing_loss=2.25, eta_seconds=60.0 * (steps - step), tflops=41.2, mfu=0.412)
        )
    progress.close()
    progress.say("done")
    return stream.getvalue()


def test_a_log_file_gets_a_line_for_each_tenth():
    """Catches a log flooded with a line per step, control characters in it, and a run that says nothing for long."""
    lines = run(io.StringIO()).splitlines()
    assert lines[0] == "stage 1/2 sparse" and lines[-1] == "done"
    shares = [int(line.split("%")[0]) for line in lines[1:-1]]
    assert shares == [0, 10, 20, 30, 40, 50, 60, 70, 80, 90, 100]
    assert all("\r" not in line and "\x1b" not in line for line in lines)
    assert re.sub(" +", " ", lines[2]).strip() == (
        "10% 100K tokens sparse loss 2.500 trailing 2.250 ETA 15:00:00 5.2K tok/s MFU 41.2% 41.2 TFLOP/s"
    )


def test_a_slow_run_speaks_every_half_minute(monkeypatch):
    """Catches a long run whose log stays silent between two tenths."""
    now = 0.0
    monkeypatch.setattr("train.record.progress.time.monotonic", lambda: now)
    stream = io.StringIO()
    progress = Progress(1_000_000, stream=stream)
    for step in range(100):
        now += 10.0
        progress.update(record(step + 1))
    assert len(stream.getvalue().splitlines()) == 34, "at once, then at every third update"


def test_a_resumed_run_does_not_repeat_the_tenths_behind_it():
    """Catches a bar or log that starts at zero again after a resume."""
    stream = io.StringIO()
    progress = Progress(1000, tokens=500, stream=stream)
    for tokens in (510, 520, 600):
        progress.update(record(tokens))
    assert [line.split("%")[0].strip() for line in stream.getvalue().splitlines()] == ["51", "60"]


def test_a_terminal_gets_a_bar_and_keeps_what_was_said(lines_of_terminal):
    """Catches a bar that eats the lines between, or stays on the screen after the run."""
    text = run(Terminal())
    assert "%|" in text and "loss 2.500" in text and "ETA" in text
    assert re.search(r"(^|\r *\r?)stage 1/2 sparse\n", text), "on a line of its own"
    assert text.endswith("done\n") and text.count("\n") < 10


def test_a_terminal_without_a_size_gets_plain_lines(lines_of_terminal):
    """Catches a run that shows nothing at all under `script` or in a container: tqdm draws on no lines."""
    lines_of_terminal(0)
    text = run(Terminal())
    assert "%|" not in text and len(text.splitlines()) > 10


def test_progress_can_be_plain_or_silent(lines_of_terminal):
    """Catches logging.progress=false that still draws a bar, and output from ranks other than 0."""
    assert "%|" not in run(Terminal(), bar=False)
    assert run(Terminal(), enabled=False) == ""


def test_unknown_values_are_left_out():
    """Catches `None` or `nan` on the screen where a value is not known yet."""
    line = describe(record(10, loss=None, trailing_loss=None, mfu=None, tflops=None, skipped_steps=2))
    assert line == "sparse  5.2K tok/s  2 skipped"


@pytest.mark.parametrize(
    ("seconds", "text"), [(0.2, "0:00"), (59.6, "1:00"), (725, "12:05"), (11400, "3:10:00"), (2.125 * 86400, "2d 3h")]
)
def test_clock(seconds, text):
    """Catches sixty seconds in a minute's place and unreadable long durations."""
    assert clock(seconds) == text


def test_a_long_step_is_heard_of(monkeypatch):
    """Catches minutes of silence within a step, and a line for every micro-batch of a fast one."""
    now, out = [1000.0], io.StringIO()
    monkeypatch.setattr(progress.time, "monotonic", lambda: now[0])
    shown = Progress(1000, stream=out)
    for done in range(1, 5):
        now[0] += 20
        shown.heartbeat(done, 4)
    now[0] += 1
    shown.update({"tokens": 100, "stage": "sparse", "loss": 2.0})
    for done in range(1, 5):
        now[0] += 1
        shown.heartbeat(done, 4)
    lines = out.getvalue().splitlines()
    assert lines[0] == "micro-batch 2 of 4 of this step after 0:40, about 0:40 left"
    assert len(lines) == 2 and "sparse" in lines[1]
