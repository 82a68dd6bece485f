"""A file that gives each layer its attention: written by launch/tune_attention.py or by hand, read wherever a plan is.

YAML (JSON is YAML too) with a key `plan`, one entry per layer as in the "moba" section of an exported config.json:

    plan:
    - [full, null, null]
    - [moba, 128, 8, 1]   # block_size, top_k (which counts the query's own block), first_blocks (0 if left out)

Beside it may stand `measured`, which says where the plan comes from and is read by nobody.
"""

from __future__ import annotations

import os
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

import yaml

from moba.kinds import AttentionSpec, from_entry

PLAN, MEASURED = "plan", "measured"
HEAD = """\
# The attention of each layer: [moba, block_size, top_k, first_blocks] or [full, null, null]. top_k counts the query's
# own block and the first_blocks of the text, which are always seen. Read by attention=<file> of launch/evaluate.py and
# launch/export.py, attn=<file> of launch/generate.py, schedule.stages.<name>.attention.plan=<file> of launch/train.py,
# and moba.transformers.configure(model, plan="<file>").
"""
SUFFIXES = (".yaml", ".yml", ".json")


def names_a_file(text: str) -> bool:
    """Whether this is meant as a plan file, by its ending."""
    return text.lower().endswith(SUFFIXES)


def read_plan(path: str | os.PathLike, num_layers: int | None = None) -> tuple[AttentionSpec, ...]:
    """The attention of each layer that a file gives, for a model of `num_layers` if that is said. ValueError, one line
    with file, key and value, for a file that is missing or holds anything else."""
    try:
        values = yaml.safe_load(Path(os.path.expanduser(path)).read_text(encoding="utf-8"))
    except OSError as error:
        raise ValueError(f"{path}: {error.strerror or error}; launch/tune_attention.py writes a plan file") from None
    except (yaml.YAMLError, ValueError, RecursionError) as error:
        raise ValueError(f"{path}: is not YAML ({' '.join(str(error).split())[:200]})") from None
    if not isinstance(values, dict) or PLAN not in values:
        raise ValueError(f"{path}: has no key {PLAN}, a list of one [kind, block_size, top_k, first_blocks] a layer")
    if unknown := sorted(str(key) for key in values.keys() - {PLAN, MEASURED}):
        raise ValueError(f"{path}: unknown key {', '.join(unknown)[:200]}; it takes {PLAN} and {MEASURED}")
    try:
        return plan_of(values[PLAN], num_layers)
    except ValueError as error:
        raise ValueError(f"{path}: {error}") from None


def plan_of(entries: Any, num_layers: int | None = None) -> tuple[AttentionSpec, ...]:
    """The attention of each layer by its entries, as of `read_plan`; ValueError names the one that is none."""
    if not isinstance(entries, list | tuple) or not entries:
        raise ValueError(
            f"{PLAN}={entries!r:.100}: needs a list of one [kind, block_size, top_k, first_blocks] a layer"
        )
    specs = []
    for layer, entry in enumerate(entries):
        try:
            if not isinstance(entry, list | tuple) or not entry or not isinstance(entry[0], str):
                raise ValueError("needs [moba, block_size, top_k, first_blocks] or [full, null, null]")
            specs.append(from_entry(entry))
        except ValueError as error:
            raise ValueError(f"{PLAN}[{layer}]={entry!r:.100}: {error}") from None
    if num_layers is not None and len(specs) != num_layers:
        raise ValueError(f"{PLAN} has {len(specs)} entries for a model of {num_layers} layers")
    return tuple(specs)


def entries_of(plan: Iterable[AttentionSpec]) -> list[list[Any]]:
    """The entries of a plan; ValueError for attention that has none."""
    return [spec.entry() for spec in plan]


def write_plan(path: Path, plan: Sequence[AttentionSpec], measured: dict[str, Any]) -> None:
    """Writes a plan and where it comes from (plain values), so that a file that is there is whole."""
    rows = "".join(f"- {_flow(entry)}\n" for entry in entries_of(plan))
    rest = yaml.safe_dump({MEASURED: measured}, sort_keys=False, width=110, default_flow_style=None)
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(f".{path.name}.partial")
    temporary.write_text(f"{HEAD}{PLAN}:\n{rows}{rest}", encoding="utf-8")
    temporary.replace(path)


def _flow(entry: list[Any]) -> str:
    return yaml.safe_dump(entry, default_flow_style=True, width=1000).strip()
