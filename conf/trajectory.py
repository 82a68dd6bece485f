"""Which keys decide the losses of a run, and so may not change when it is resumed.

Everything counts unless it is listed in EXEMPT, so that a new key is safe by default. Exempt are: what is only written
or watched (names, logging, evaluation, checkpoints); where things lie (directories, paths of data, whose content a
fingerprint guards); and how the same sums are computed (device and number of processes, how
they share sequences, ZeRO stage and offload,
micro-batches, kernels, recomputation), which moves losses by rounding only.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import fields, is_dataclass
from fnmatch import fnmatchcase
from typing import Any

from conf.build import collected
from conf.formats import all_format_options
from conf.schema import RunConfig, SourceConfig
from conf.words import listed, show

EXEMPT = (
    "run.name",
    "run.dir",
    "run.device",
    "run.deterministic",
    "run.allow_changes",
    "run.notice",
    "logging.*",
    "eval.*",
    "checkpoint.*",
    "model.name",
    "model.pretrained_length",
    "model.activation_checkpointing",
    "model.loss_tile",
    "model.compile",
    "data.cache_dir",
    "data.notice",
    "data.num_workers",
    "data.validation",
    "data.validation.*",
    "data.sources.*.path",
    "data.sources.*.streaming",
    "schedule.micro_tokens",
    "schedule.stages.*.micro_tokens",
    # Every stage holds its own copy of these.
    "schedule.tokens",
    "schedule.seq_len",
    "schedule.batch_tokens",
    "schedule.block_size",
    "schedule.top_k",
    "schedule.window",
    "schedule.stages.*.attention.backend",
    # Says again what block_size says.
    "schedule.stages.*.attention.num_blocks",
    "deepspeed.zero_stage",
    "deepspeed.offload_*",
    "parallel.*",
)


def to_dict(config: RunConfig) -> dict[str, Any]:
    """`config` as plain dictionaries, lists and scalars; conf.validate.freeze(to_dict(config)) == config."""
    return _written(config)


def trajectory_diff(old: RunConfig, new: RunConfig) -> list[str]:
    """One line "key: old -> new" for each difference that would change the losses of `old` if it went on as `new`."""
    before, after = _flat(to_dict(old)), _flat(to_dict(new))
    lines = []
    if list(old.schedule.stages) != list(new.schedule.stages):
        lines.append(f"schedule.stages: {listed(old.schedule.stages)} -> {listed(new.schedule.stages)}")
    sources = old.data.sources, new.data.sources
    for name in dict.fromkeys(name for side in sources for name in side):
        if any(name not in side for side in sources):
            lines.append(f"data.sources.{name}: " + " -> ".join(_in_brief(side.get(name)) for side in sources))
    one_sided = [f"data.sources.{name}." for name in sources[0].keys() ^ sources[1].keys()]
    one_sided += [f"schedule.stages.{name}." for name in old.schedule.stages.keys() ^ new.schedule.stages.keys()]
    for key in dict.fromkeys([*before, *after]):
        was, now = before.get(key), after.get(key)
        is_exempt = any(fnmatchcase(key, pattern) for pattern in EXEMPT) or key.startswith(tuple(one_sided))
        if was != now and not is_exempt:
            lines.append(f"{key}: {show(was)} -> {show(now)}")
    return lines


def _written(value: Any) -> Any:
    """As a user writes it: collected options stand beside the keys of their section."""
    if isinstance(value, Mapping):
        return {key: _written(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [_written(item) for item in value]
    if not is_dataclass(value):
        return value
    collector, _ = collected(value)
    section = {one.name: _written(getattr(value, one.name)) for one in fields(value)}
    return section | section.pop(collector) if collector else section


def _in_brief(source: SourceConfig | None) -> str:
    """What a source says that is not default."""
    if source is None:
        return "none"
    options = {name: option.default for name, option in all_format_options().items()}
    given, default = _written(source), _written(SourceConfig(options=options))
    return show({key: value for key, value in given.items() if value != default[key]})


def _flat(values: dict[str, Any], path: str = "") -> dict[str, Any]:
    """Nested dictionaries as one, with dotted keys; an empty one stays a value."""
    flat = {}
    for name, value in values.items():
        key = f"{path}{name}"
        flat |= _flat(value, key + ".") if isinstance(value, dict) and value else {key: value}
    return flat
