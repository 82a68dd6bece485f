"""Prints what a run will do, and stops: `python launch/plan.py +exp=moba_32k`.

Allocates nothing, and reads of the data only how long the documents are, where they are tokenised already.
"""

from __future__ import annotations

import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
# Python puts launch/ itself first, where `train` would be launch/train.py.
sys.path[:] = [str(ROOT)] + [p for p in sys.path if Path(p or ".").resolve() != ROOT / "launch"]

import re  # noqa: E402
from dataclasses import replace  # noqa: E402

from conf.build import ConfigError, Problems, quantity  # noqa: E402
from conf.hardware import Hardware  # noqa: E402
from conf.numbers import parse_memory  # noqa: E402
from conf.words import cut  # noqa: E402
from data.errors import DataError  # noqa: E402
from data.sources import known_sources  # noqa: E402
from data.tokenizer import load_tokenizer  # noqa: E402
from launch.config import detect_hardware, load_asked, run_command  # noqa: E402
from launch.init_source import missing_source  # noqa: E402
from train.model.rope import check_stages  # noqa: E402
from train.model.sizes import embedding_rows  # noqa: E402
from train.plan.plan import make_plan  # noqa: E402

SMALLEST_GPU = 2**30
USAGE = """\
usage: python launch/plan.py +exp=<name> [group=choice ...] [key=value ...] [num_gpus=8] [gpu_memory=80GB]

Prints stages, tokens, steps, attended share, FLOPs and memory of a run, and stops. num_gpus and gpu_memory describe the
machine it is meant for; without them it is one process on this machine."""


def main(arguments: list[str]) -> None:
    """Prints the plan of a command line. ConfigError for the user's mistakes."""
    overrides, hardware = split_machine(arguments)
    config, asked = load_asked(overrides, hardware)
    check_stages(config)
    try:
        vocab_size = embedding_rows(config.model, load_tokenizer(config.data.tokenizer).vocab_size)
        sources = known_sources(config.data)
    except DataError as error:
        raise ConfigError([str(error)]) from error
    plan = make_plan(config, vocab_size, hardware, sources, asked)
    missing = missing_source(config.init.source)
    print(plan.text() + (f"\n\n{missing}" if missing else ""))


def split_machine(arguments: list[str]) -> tuple[list[str], Hardware]:
    """The overrides of the run, and the machine it is planned for."""
    machine: dict[str, str | None] = {"num_gpus": None, "gpu_memory": None}
    overrides, problems = [], Problems()
    for text in arguments:
        key, _, value = text.partition("=")
        if key in machine:
            if machine[key] is not None:
                problems.add(key, value, f"is given twice: {key}={cut(machine[key])} and this")
            machine[key] = value
        else:
            overrides.append(text)
    num_gpus = machine["num_gpus"]
    if num_gpus is not None and not re.fullmatch(r"[1-9]\d{0,5}", num_gpus):
        problems.add("num_gpus", num_gpus, "how many GPUs the run will have, such as num_gpus=8")
    memory = quantity(parse_memory, "gpu_memory", machine["gpu_memory"], problems)
    if memory is not None and memory < SMALLEST_GPU:
        problems.add("gpu_memory", machine["gpu_memory"], f"is {memory:,} bytes; write a GPU's, such as 80GB")
    problems.raise_if_any()
    hardware = detect_hardware()
    if num_gpus is not None or memory is not None:
        count = int(num_gpus or 1)
        # Triton comes with torch on Linux GPU machines; whether this one has it says nothing about that one.
        counts = {"num_gpus": count, "world_size": count, "local_world_size": count}
        hardware = replace(hardware, **counts, has_triton=True, host_memory=None)
    if memory is not None:
        hardware = replace(hardware, gpu_memory=memory, gpu_name=None)
    return overrides, hardware


def command() -> int:
    """The command, with the process's arguments; returns the exit code."""
    return run_command(main, sys.argv[1:], USAGE)


if __name__ == "__main__":
    sys.exit(command())
