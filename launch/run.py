"""Trains on the GPUs of this machine, as torchrun does, but without torchrun's own report after an error.

    python launch/run.py --gpus 8 +exp=quickstart

Processes are started by torchrun's own machinery, with its options (`--name=value`, before the settings) for several
hosts. What ends a run is said in at most a few lines, and its exit code is the run's own: 2 for a user's mistake, 128 +
a signal's number for a run that was stopped, 0 for one that is finished.
"""

from __future__ import annotations

import logging
import sys
from argparse import ArgumentParser
from functools import partial
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
sys.path[:] = [str(ROOT)] + [p for p in sys.path if Path(p or ".").resolve() != ROOT / "launch"]

from train.engine.world import one_thread_each  # noqa: E402 - first: decides what torch reads

# isort: split
import torch  # noqa: E402
from torch.distributed.elastic.multiprocessing import SignalException  # noqa: E402
from torch.distributed.elastic.multiprocessing.errors import ChildFailedError, ProcessFailure  # noqa: E402
from torch.distributed.run import get_args_parser, run  # noqa: E402

from conf.build import ConfigError  # noqa: E402
from launch.config import run_command  # noqa: E402

SCRIPT = ROOT / "launch" / "train.py"
USAGE = """\
usage: python launch/run.py [--gpus N] [--<torchrun option>=<value> ...] +exp=<name> [group=choice ...] [key=value ...]

Trains with N processes, by default one for each GPU of this machine, or one without GPUs. Several hosts: torchrun's
--nnodes, --node_rank, --rdzv_backend, --rdzv_endpoint."""
HANDED_ON = ["SIGTERM", "SIGINT", "SIGHUP", "SIGQUIT", "SIGUSR1"]


def main(arguments: list[str]) -> int:
    """Starts the processes and returns the exit code."""
    options, overrides = split_options(arguments)
    return run_command(partial(start, options), overrides, USAGE)


def start(options: list[str], overrides: list[str]) -> None:
    """Runs launch/train.py in the processes that the options ask for; SystemExit with its code unless it is 0."""
    options = [_process_count(option) for option in options]
    one_thread_each()
    logging.disable(logging.CRITICAL)  # of this process alone, whose errors are exceptions
    try:
        run(_parser().parse_args([*options, str(SCRIPT), *overrides]))
    except ChildFailedError as error:
        rank, failure = error.get_first_failure()
        if failure.exitcode < 0:
            print(f"error: {_killed(rank, failure)}", file=sys.stderr)
        raise SystemExit(_exit_code(failure)) from None
    except SignalException as error:
        raise SystemExit(128 + error.sigval) from None


def split_options(arguments: list[str]) -> tuple[list[str], list[str]]:
    """(options for torchrun, settings): the first setting, --help or --cfg ends the options."""
    options, rest = [], list(arguments)
    while rest and rest[0].startswith("-") and rest[0] not in ("-h", "--help", "--cfg"):
        option = rest.pop(0)
        options.append(f"{option}={rest.pop(0)}" if option == "--gpus" and rest else option)
    return options, rest


def _process_count(option: str) -> str:
    """`--gpus` in torchrun's words; other options as they are."""
    name, _, value = option.partition("=")
    if name != "--gpus":
        return option
    if not value.isdecimal() or int(value) < 1:
        raise ConfigError([f"--gpus {value}: needs a number of processes, at least 1"])
    return f"--nproc_per_node={value}"


def _parser() -> ArgumentParser:
    """torchrun's, with our usage, defaults and signals."""
    parser = get_args_parser()
    parser.usage = USAGE.partition("\n")[0].removeprefix("usage: ")
    number = str(torch.cuda.device_count() or 1)
    parser.set_defaults(nproc_per_node=number, signals_to_handle=",".join(HANDED_ON))
    return parser


def _killed(rank: int, failure: ProcessFailure) -> str:
    """What is known of a process that ended without a word."""
    hint = ", perhaps because memory ran out" if failure.signal_name() == "SIGKILL" else ""
    return f"rank {rank} (process {failure.pid}) was ended by {failure.signal_name()}{hint}"


def _exit_code(failure: ProcessFailure) -> int:
    """As a shell says it."""
    return failure.exitcode if failure.exitcode >= 0 else 128 - failure.exitcode


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
