"""From the command line to a RunConfig: what launch/train.py and launch/plan.py share; nothing else uses Hydra.

The grammar is Hydra's (groups, +exp=..., key=value, ~key, quoting), composed through its API: nothing is written, no
directory is changed, and every mistake becomes a ConfigError. It is more forgiving in three places. A key needs no `+`
for being absent from the YAML files (conf/schema.py says which keys there are). All wrong keys are reported at once. A
value that Hydra's grammar cannot read (~/books/*.txt, a name with a comma) is text. Only a new *name*, of a stage or
a source, needs its `+`, once: otherwise a slip of the pen would make a stage.
"""

from __future__ import annotations

import errno
import functools
import importlib.util
import os
import re
import sys
import time
from collections.abc import Callable
from dataclasses import fields, replace
from pathlib import Path
from typing import Any

import yaml
from hydra import compose as hydra_compose
from hydra import initialize_config_dir
from hydra.core.override_parser.overrides_parser import OverridesParser
from hydra.errors import HydraException
from omegaconf import DictConfig, OmegaConf
from omegaconf.errors import OmegaConfBaseException

from conf.build import Problems, build, suggestion
from conf.numbers import parse_tokens
from conf.schema import RunConfig
from conf.trajectory import to_dict
from conf.validate import ConfigError, Hardware, freeze
from conf.words import LONGEST_MESSAGE, cut
from launch.foreign import meant_by
from launch.init_source import with_source

CONF = Path(__file__).resolve().parents[1] / "conf"
NAMED = (("schedule", "stages"), ("data", "sources"))
KEY = re.compile(r"[\w./@:-]+")
EXIT_USER_ERROR, EXIT_INTERRUPTED = 2, 130
PATIENCE_SECONDS = 30.0
CONTAINER_LIMITS = (  # of cgroups, version 2 and 1
    Path("/sys/fs/cgroup/memory.max"),
    Path("/sys/fs/cgroup/memory/memory.limit_in_bytes"),
)


def compose(overrides: list[str]) -> dict[str, Any]:
    """The configuration of these command-line overrides as plain dictionaries, unchecked. ConfigError if there is none.

    run.name and logging.group are the experiment's name where nothing else set them.
    """
    _refuse_unreadable(overrides)
    choices = [text for text in overrides if not _is_value(text)]
    values = [text for text in overrides if _is_value(text)]
    _refuse_new_names(values, choices)
    config, experiment = _hydra(choices + [_forced(text) for text in values])
    plain: Any = OmegaConf.to_container(config, resolve=True)
    run = plain.setdefault("run", {})
    if isinstance(run, dict) and run.get("name") is None:
        run["name"] = experiment
    logging = plain.setdefault("logging", {})
    if isinstance(logging, dict) and logging.get("group") is None:
        logging["group"] = experiment
    return plain


def load(overrides: list[str], hardware: Hardware | None = None) -> RunConfig:
    """The checked RunConfig of these overrides, with what it takes from init.source. ConfigError lists everything that
    is wrong."""
    return load_asked(overrides, hardware)[0]


def load_asked(overrides: list[str], hardware: Hardware | None = None) -> tuple[RunConfig, int | None]:
    """As `load`, and the budget that was asked for (schedule.tokens, which is the stages' sum once it is frozen)."""
    plain = compose(overrides)
    config = freeze(with_source(plain, overrides), hardware)
    asked = plain.get("schedule", {}).get("tokens")
    return config, None if asked is None else parse_tokens(asked)


def composed_yaml(overrides: list[str]) -> str:
    """The whole configuration as composed (what `--cfg job` prints): every key, quantities as they were written."""
    problems = Problems()
    config = build(RunConfig, compose(overrides), problems)
    problems.raise_if_any()
    return yaml.safe_dump(to_dict(config), sort_keys=False, width=100)


def choices_of(group: str) -> list[str]:
    """The choices of a configuration group, such as `model` or `exp`, sorted."""
    return sorted(path.relative_to(CONF / group).with_suffix("").as_posix() for path in (CONF / group).rglob("*.yaml"))


def detect_hardware(world_size: int = 1, local_world_size: int = 1) -> Hardware:
    """What this machine offers, without starting anything on its GPUs but the driver's query."""
    import torch

    num_gpus = torch.cuda.device_count()
    has_triton = importlib.util.find_spec("triton") is not None
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()
    counts = Hardware(num_gpus, world_size, local_world_size, host_memory=_host_memory(), cores=cores)
    if num_gpus == 0:
        return replace(counts, has_triton=has_triton, cpu_flops=_cpu_flops())
    properties = torch.cuda.get_device_properties(0)
    return replace(
        counts,
        gpu_name=properties.name,
        gpu_memory=properties.total_memory,
        has_bf16=properties.major >= 8,
        has_triton=has_triton,
    )


def _host_memory() -> int:
    """Bytes of main memory that this process may use: the host's, or its container's where that is less."""
    memory = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    for path in CONTAINER_LIMITS:
        if path.exists() and (text := path.read_text(encoding="ascii").strip()).isdigit():
            memory = min(memory, int(text))
    return memory


@functools.cache
def _cpu_flops() -> float:
    """The best of a few matrix products, which take some hundredth of a second each."""
    import torch

    size, best = 768, 0.0
    x = torch.ones(size, size)
    for _ in range(4):
        began = time.perf_counter()
        torch.mm(x, x)
        best = max(best, 2 * size**3 / (time.perf_counter() - began))
    return best


def run_command(main: Callable[[list[str]], None], arguments: list[str], usage: str, *, quiet: bool = False) -> int:
    """Runs main(overrides), or `--help` or `--cfg job` in its place; returns the exit code, 2 for a user's mistake.

    A ConfigError is printed as a list, without a traceback; any other exception but Ctrl-C is a bug and passes through.

    `quiet` is for all processes but one, which speaks for them: torchrun ends the others as soon as the first exits, so
    with a mistake they wait to be ended, lest the speaker be ended before it has spoken. One that is still there after
    PATIENCE_SECONDS has met a mistake of its own (a data folder that only other hosts have) and says so.
    """
    flags = [text for text in arguments if text.startswith("-")]
    say = (lambda *_, **__: None) if quiet else print
    try:
        if "--help" in flags or "-h" in flags:
            say(help_text(usage))
        elif "--cfg" in flags:
            say(composed_yaml([text for text in arguments if text not in ("--cfg", "job", "--resolve")]))
        elif flags:
            meant = meant_by(flags[0].partition("=")[0])
            hint = (
                f"write {meant}"
                if meant
                else "unknown option; the options are --help and --cfg job. Settings are written key=value"
            )
            raise ConfigError([f"{cut(flags[0])}: {hint}"])
        else:
            main(arguments)
    except ConfigError as error:
        if quiet:
            time.sleep(PATIENCE_SECONDS)
        print(error_text(error), file=sys.stderr, flush=True)
        return EXIT_USER_ERROR
    except KeyboardInterrupt:
        say("interrupted", file=sys.stderr, flush=True)
        return EXIT_INTERRUPTED
    except BrokenPipeError:  # `| head` has read enough
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
    except OSError as error:
        if error.errno not in (errno.ENOSPC, errno.EDQUOT):
            raise
        print(f"error: {error}", file=sys.stderr, flush=True)
        return EXIT_USER_ERROR
    except SystemExit as end:
        return end.code if isinstance(end.code, int) else EXIT_USER_ERROR
    return 0


def error_text(error: ConfigError) -> str:
    """What a user sees of a ConfigError."""
    count = len(error.problems)
    title = "1 problem" if count == 1 else f"{count} problems"
    return f"{title}:\n" + "\n".join(f"  - {_within(problem)}" for problem in error.problems)


def _within(problem: str) -> str:
    """A message of bounded length, whatever was quoted in it."""
    return problem if len(problem) <= LONGEST_MESSAGE else f"{problem[:LONGEST_MESSAGE]}..."


def help_text(usage: str) -> str:
    """The help of a command: its usage, the groups and their choices, and where the keys are described."""
    groups = ("model", "data", "schedule", "optim", "deepspeed", "logging")
    lines = [usage.strip(), "", "Experiments (+exp=<name>):", "  " + "\n  ".join(choices_of("exp")), "", "Groups:"]
    lines += [f"  {group}=" + "|".join(choices_of(group)) for group in groups]
    lines += [
        "",
        "Every key can be set, for example schedule.tokens=1B, schedule.stages.sparse.attention.top_k=4, "
        "~data.validation.",
        f"Their meaning, unit and default: {CONF / 'schema.py'}",
        "--cfg job prints the composed configuration.",
        "Your own files, in folders named as in conf/: hydra.searchpath=[file:///<folder>] +exp=<name>",
    ]
    return "\n".join(lines)


def _is_value(override: str) -> bool:
    """True for key=value and ~key of the configuration itself, False for choices of groups and Hydra's own keys."""
    key = override.lstrip("+~").split("=", 1)[0]
    return "." in key.split("@", 1)[0] and not key.startswith("hydra.")


def _forced(override: str) -> str:
    """`override` such that it sets its key whether or not a YAML file has it; what Hydra cannot read becomes text."""
    if override.startswith("~"):
        return override
    key, equals, value = override.lstrip("+").partition("=")
    try:
        plain = not OverridesParser.create().parse_override(f"{key}={value}").is_sweep_override()
    except (HydraException, ValueError, RecursionError):  # ValueError: a number of thousands of digits
        plain = False
    if not plain:
        escaped = value.replace("\\", "\\\\").replace('"', '\\"')
        value = f'"{escaped}"'
    return f"++{key}{equals}{value}"


def _hydra(overrides: list[str]) -> tuple[DictConfig, str | None]:
    """Hydra's composition without its own section, and the experiment's name; its errors as ConfigError."""
    try:
        with initialize_config_dir(version_base="1.3", config_dir=str(CONF)):
            config = hydra_compose(config_name="train", overrides=overrides, return_hydra_config=True)
            experiment = config.hydra.runtime.choices.get("exp")
            OmegaConf.set_struct(config, False)
            del config["hydra"]
            OmegaConf.resolve(config)
    except (HydraException, OmegaConfBaseException, ValueError, RecursionError) as error:
        raise ConfigError([_explain(str(error))]) from error
    return config, experiment


def _refuse_unreadable(overrides: list[str]) -> None:
    """ConfigError for what is neither a choice of a group nor a key, before Hydra guesses."""
    groups = [path.name for path in CONF.iterdir() if path.is_dir() and not path.name.startswith("_")]
    sections = [field.name for field in fields(RunConfig)]
    problems = []
    for text in overrides:
        key = text.lstrip("+~").partition("=")[0]
        value = cut(text.partition("=")[2].strip())
        if "=" not in text and not text.startswith("~"):
            meant = meant_by(text)
            problems.append(f"{cut(text)}: " + (f"write {meant}" if meant else "settings are written key=value"))
        elif not KEY.fullmatch(key):
            near = "".join(key.split())
            how = f"without spaces: {near}={value}" if KEY.fullmatch(near) else "and keys are words joined by dots"
            problems.append(f"{cut(text)}: settings are written key=value, {how}")
        elif key.removeprefix("schedule.").startswith("attention."):
            written = f"schedule.stages.<stage>.{key.removeprefix('schedule.')}={value}"
            problems.append(f"{cut(text)}: attention is a matter of stages: write {written}")
        elif _is_value(text) or key.startswith("hydra"):
            continue
        elif key == "exp" and not text.startswith("+"):
            problems.append(f"{cut(text)}: an experiment needs a plus: +{text}")
        elif key in sections and key not in groups:
            problems.append(f"{cut(text)}: {key} is a section; set its keys, such as {key}.<key>=<value>")
        elif key.partition("@")[0] not in groups:
            meant = meant_by(key)
            hint = suggestion(key, sorted({*groups, *sections}))
            hint = f"write {meant}" if meant else f"unknown key ({hint}); keys are written section.key=value"
            problems.append(f"{cut(text)}: {hint}")
    if problems:
        raise ConfigError(problems)


def _refuse_new_names(values: list[str], choices: list[str]) -> None:
    """ConfigError for stages and sources that are set without `+` although neither the chosen files nor a `+` on the
    same command line has one of that name."""
    named, added = [], []
    for text in values:
        section, kind, name = [*text.lstrip("+").partition("=")[0].split("."), "", ""][:3]
        if (section, kind) in NAMED and name:
            (added if text.startswith("+") else named).append((f"{section}.{kind}", name, text))
    if not named:
        return
    base, _ = _hydra(choices)
    problems = []
    for path, name, text in named:
        known = [*(OmegaConf.select(base, path) or {}), *(other for at, other, _ in added if at == path)]
        if name not in known:
            hint = f"no {path.rpartition('.')[2].removesuffix('s')} is called {name} ({suggestion(name, known)})"
            problems.append(f"{cut(text)}: {hint}; a new one needs a plus: +{text}")
    if problems:
        raise ConfigError(problems)


def _explain(message: str) -> str:
    """Hydra's message in one line that says what would work."""
    line = cut(message, 500)
    missing = re.search(r"Could not find '([\w-]+)/([^']*)'", line)
    if missing and (CONF / missing[1]).is_dir():
        group, name = missing.groups()
        return f"{'+' if group == 'exp' else ''}{group}={name}: no such choice; {suggestion(name, choices_of(group))}"
    return line
