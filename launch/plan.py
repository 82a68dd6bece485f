"""Prints what a run will do, and stops: `python launch/plan.py +exp=moba_32k`. Or how long a context can be, for models
and numbers of GPUs: `python launch/plan.py longest +exp=moba_32k num_gpus=1,2,4,8 gpu_memory=80GB`.

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
from conf.exchange import most_processes  # noqa: E402
from conf.hardware import Hardware  # noqa: E402
from conf.numbers import parse_memory  # noqa: E402
from conf.words import cut  # noqa: E402
from data.errors import DataError  # noqa: E402
from data.sources import known_sources  # noqa: E402
from data.tokenizer import load_tokenizer  # noqa: E402
from launch.config import detect_hardware, load, load_asked, run_command  # noqa: E402
from launch.init_source import missing_source  # noqa: E402
from train.model.rope import check_stages  # noqa: E402
from train.model.sizes import embedding_rows  # noqa: E402
from train.plan.longest import longest, table  # noqa: E402
from train.plan.plan import make_plan  # noqa: E402
from train.record.throughput import peak_tflops  # noqa: E402

LONGEST = "longest"
COUNT = r"[1-9]\d{0,5}"
SMALLEST_MEMORY = 2**30
MACHINE = ("num_gpus", "gpu_memory", "host_memory", "gpu_name")
ENGINES = ("zero1", "zero3", "zero1_offload", "zero3_offload")  # the cheapest first
SET_BY_LONGEST = (
    "run.device",
    "parallel.sequence",
    "schedule.seq_len",
    "schedule.batch_tokens",
    "schedule.micro_tokens",
)
USAGE = """\
usage: python launch/plan.py +exp=<name> [group=choice ...] [key=value ...]
           [num_gpus=8] [gpu_memory=80GB] [host_memory=1TB] [gpu_name=H100]
       python launch/plan.py longest +exp=<name> num_gpus=1,2,4,8 gpu_memory=80GB [models=<name>,<name>] [...]

Prints stages, tokens, steps, attended share, FLOPs and memory of a run, and stops. num_gpus, gpu_memory, host_memory
(of a host with all of its GPUs) and gpu_name describe the machine it is meant for; without them it is one process on
this machine.

longest prints the longest context (32K, doubled) that fits each number of GPUs of one host and each way to share
sequences among them, for one model or several (files of conf/model), with the first of deepspeed=zero1, zero3,
zero1_offload, zero3_offload that allows it, or the one that is given."""


def main(arguments: list[str]) -> None:
    """Prints the plan of a command line. ConfigError for the user's mistakes."""
    if arguments[:1] == [LONGEST]:
        print(longest_table(arguments[1:]))
        return
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
    machine, overrides = _machine(arguments)
    problems = Problems()
    num_gpus = machine.pop("num_gpus", None)
    if num_gpus is not None and not re.fullmatch(COUNT, num_gpus):
        problems.add("num_gpus", num_gpus, "how many GPUs the run will have, such as num_gpus=8")
    sizes = _sizes(machine, problems)
    problems.raise_if_any()
    hardware = detect_hardware()
    if num_gpus is not None or machine:
        hardware = _elsewhere(hardware, int(num_gpus or 1), sizes, machine.get("gpu_name"))
    return overrides, hardware


def _machine(arguments: list[str]) -> tuple[dict[str, str], list[str]]:
    """What describes the machine, and the rest. ConfigError for what is given twice."""
    machine, overrides, problems = {}, [], Problems()
    for text in arguments:
        key, _, value = text.partition("=")
        if key not in MACHINE:
            overrides.append(text)
        elif key in machine:
            problems.add(key, value, f"is given twice: {key}={cut(machine[key])} and this")
        else:
            machine[key] = value
    problems.raise_if_any()
    return machine, overrides


def _sizes(machine: dict[str, str], problems: Problems) -> dict[str, int]:
    """Bytes of the memories that are given."""
    sizes = {}
    for key, what in (("gpu_memory", "a GPU's, such as 80GB"), ("host_memory", "a host's, such as 1TB")):
        size = quantity(parse_memory, key, machine.get(key), problems)
        if size is not None and size < SMALLEST_MEMORY:
            problems.add(key, machine[key], f"is {size:,} bytes; write {what}")
        elif size is not None:
            sizes[key] = size
    if "gpu_name" in machine and peak_tflops(machine["gpu_name"]) is None:
        problems.add("gpu_name", machine["gpu_name"], "its speed is not known; H100, H200, A100 and others are")
    return sizes


def _elsewhere(here: Hardware, num_gpus: int, sizes: dict[str, int], gpu_name: str | None) -> Hardware:
    """Another machine: so many GPUs on one host. What is not said of the GPUs is as here."""
    # Triton comes with torch on Linux GPU machines; whether this one has it says nothing about that one.
    counts = {"num_gpus": num_gpus, "world_size": num_gpus, "local_world_size": num_gpus, "has_triton": True}
    there = replace(here, **counts, host_memory=sizes.get("host_memory"), cores=None)
    if "gpu_memory" in sizes or gpu_name is not None:
        there = replace(there, gpu_memory=sizes.get("gpu_memory", there.gpu_memory), gpu_name=gpu_name)
    return there


def longest_table(arguments: list[str]) -> str:
    """The table of the longest contexts. ConfigError for the user's mistakes."""
    machine, overrides = _machine(arguments)
    problems, models = Problems(), [text for text in overrides if text.startswith("models=")]
    overrides = [text for text in overrides if text not in models]
    counts = machine.pop("num_gpus", None)
    if counts is None or not re.fullmatch(f"{COUNT}(,{COUNT})*", counts):
        problems.add("num_gpus", counts, "numbers of GPUs of one host, such as num_gpus=1,2,4,8")
    sizes = _sizes(machine, problems)
    if "gpu_memory" not in machine:
        problems.add("gpu_memory", None, "the memory of one GPU, such as gpu_memory=80GB")
    for text in overrides:
        key, _, value = text.partition("=")
        if key in SET_BY_LONGEST or (key == "model" and models):
            problems.add(key, value, "is set by this command" if key != "model" else "is one of models=")
    problems.raise_if_any()
    assert counts is not None
    hardware = _elsewhere(detect_hardware(), 1, sizes, machine.get("gpu_name"))
    engines = [] if any(text.startswith("deepspeed=") for text in overrides) else list(ENGINES)
    rows = []
    for model in models[0].removeprefix("models=").split(",") if models else [None]:
        chosen = [*overrides, *([f"model={model}"] if model else [])]
        configs = {name: load([*chosen, f"deepspeed={name}"], hardware) for name in engines}
        if not engines:
            named = next(text for text in reversed(overrides) if text.startswith("deepspeed="))
            configs = {named.removeprefix("deepspeed="): load(chosen, hardware)}
        config = next(iter(configs.values()))
        vocab_size = embedding_rows(config.model, load_tokenizer(config.data.tokenizer).vocab_size)
        for count in sorted({int(text) for text in counts.split(",")}):
            shares = [2**n for n in range(count.bit_length()) if count % 2**n == 0 and 2**n <= most_processes(config)]
            rows += [longest(config.model.name, configs, count, share, vocab_size, hardware) for share in shares]
    return table(rows, hardware)


def command() -> int:
    """The command, with the process's arguments; returns the exit code."""
    return run_command(main, sys.argv[1:], USAGE)


if __name__ == "__main__":
    sys.exit(command())
