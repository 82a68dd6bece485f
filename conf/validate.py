"""From a composed configuration to a RunConfig that can run: quantities become ints, gaps are filled, and everything
that could not work is said at once.

What the machine offers comes in as `Hardware`, so that nothing here needs torch. Freezing a frozen configuration
changes nothing, so config.yaml in a run directory is read by the same function.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from typing import Any

from omegaconf import DictConfig, OmegaConf

from conf.build import ConfigError, Problems, build, parse_quantities, quantity
from conf.checks import check, check_inherited
from conf.files import FileError, parse_yaml, user_path
from conf.formats import all_format_options
from conf.hardware import Hardware
from conf.numbers import format_tokens, is_share, parse_share
from conf.rates import all_rate_options
from conf.schema import (
    AttentionConfig,
    DataConfig,
    LongDocumentsConfig,
    LRConfig,
    ModelConfig,
    RunConfig,
    ScheduleConfig,
    SourceConfig,
    StageConfig,
    StageLRConfig,
)
from conf.trajectory import to_dict, trajectory_diff
from conf.words import listed, show
from moba.kinds import KINDS, all_options
from moba.kinds.plan_file import entries_of, plan_of, read_plan

__all__ = ["ConfigError", "Hardware", "freeze", "from_yaml", "to_dict", "trajectory_diff"]


def freeze(config: DictConfig | Mapping[str, Any], hardware: Hardware | None = None) -> RunConfig:
    """The RunConfig of a composed configuration (or of to_dict's), checked against `hardware` where that is given.

    ConfigError lists every problem.
    """
    problems = Problems()
    values: Any = OmegaConf.to_container(config, resolve=True) if isinstance(config, DictConfig) else config
    run_config = parse_quantities(build(RunConfig, values, problems), problems)
    _name_as_typed(run_config, problems)
    data = _fill_sources(run_config.data, run_config.run.seed, problems)
    schedule = _fill_mixes(check_inherited(run_config.schedule, problems), run_config.data, data)
    run_config = replace(
        run_config,
        run=_fill_run(run_config),
        model=_fill_model(run_config.model),
        data=_fill_documents(data, schedule),
        schedule=_fill_schedule(schedule, run_config.model.num_layers, problems),
    )
    run_config = _fill_shares(run_config, problems)
    check(run_config, hardware, problems)
    problems.raise_if_any()
    return run_config


def _name_as_typed(config: RunConfig, problems: Problems) -> None:
    """What the keys of `config` that are filled in from other keys are called in messages."""
    if config.data.path is not None or config.data.name is not None:
        problems.typed |= {f"data.sources.main.{key}": f"data.{key}" for key in ("path", "name")}
    for name, stage in config.schedule.stages.items():
        at = f"schedule.stages.{name}"
        for key in ("seq_len", "batch_tokens", "micro_tokens"):
            if getattr(stage, key) is None:
                problems.typed[f"{at}.{key}"] = f"schedule.{key}"
        for key in all_options():
            if stage.attention.options.get(key) is None and getattr(config.schedule, key, None) is not None:
                problems.typed[f"{at}.attention.{key}"] = f"schedule.{key}"


def from_yaml(text: str, where: object) -> RunConfig:
    """The RunConfig in the YAML of a config.yaml. ConfigError, each line naming `where`, for anything else."""
    try:
        return freeze(parse_yaml(text, where=where))
    except ConfigError as error:
        raise ConfigError([f"{where}: {problem}" for problem in error.problems]) from error
    except FileError as error:
        raise ConfigError([str(error)]) from error


def _fill_run(config: RunConfig) -> Any:
    name = "run" if config.run.name is None else config.run.name
    return replace(config.run, name=name, dir=str(user_path(config.run.dir or f"runs/{name}")))


def _fill_model(model: ModelConfig) -> ModelConfig:
    head_dim = model.head_dim
    if head_dim is None and model.num_heads > 0 and model.hidden_size % model.num_heads == 0:
        head_dim = model.hidden_size // model.num_heads
    num_kv_heads = model.num_heads if model.num_kv_heads is None else model.num_kv_heads
    return replace(model, head_dim=head_dim, num_kv_heads=num_kv_heads)


def _fill_sources(data: DataConfig, seed: int, problems: Problems) -> DataConfig:
    """`data` with the shorthands data.path and data.name moved to the source `main`, in place of those that ship with
    the project."""
    sources = dict(data.sources)
    for key, choice in (("path", "files"), ("name", "hub")):
        value = getattr(data, key)
        if value is None:
            continue
        shipped = {name for name, source in sources.items() if (source.path or "").startswith("embedded")}
        if set(sources) - shipped - {"main"}:
            hint = f"data.sources has {listed(sources)} already; say data={choice} data.{key}={show(value)}"
            problems.add(f"data.{key}", value, hint)
            continue
        formats = {source.format for source in sources.values()}
        default = SourceConfig(format=formats.pop() if len(formats) == 1 else "text")
        main = sources.get("main", default)
        main = replace(main, path=None) if "main" in shipped else main
        if getattr(main, key) not in (None, value):
            problems.add(f"data.{key}", value, f"data.sources.main.{key}={getattr(main, key)} says otherwise; set one")
        sources = {"main": replace(main, **{key: value})}
    return replace(data, path=None, name=None, sources=sources, seed=seed if data.seed is None else data.seed)


def _fill_mixes(schedule: ScheduleConfig, before: DataConfig, data: DataConfig) -> ScheduleConfig:
    """`schedule` without the mixes of sources that gave way to data.path or data.name."""
    gone = set(before.sources) - set(data.sources)
    stages = {
        name: replace(stage, mix=None) if set(stage.mix or ()) & gone else stage
        for name, stage in schedule.stages.items()
    }
    return replace(schedule, stages=stages)


def _fill_documents(data: DataConfig, schedule: ScheduleConfig) -> DataConfig:
    """`data` with every option of every format, and with generated documents as long as the context, and blocks as the
    schedule's, where nothing is said."""
    defaults = {name: option.default for name, option in all_format_options().items()}

    def fill(source: SourceConfig | None) -> SourceConfig | None:
        if source is None:
            return None
        given = {name: value for name, value in source.options.items() if value is not None}
        source = replace(source, options=defaults | given)
        if source.synthetic is None:
            return source
        own = source.synthetic
        length = schedule.seq_len if own.length is None else own.length
        block_size = schedule.block_size if own.block_size is None else own.block_size
        return replace(source, synthetic=replace(own, length=length, block_size=block_size))

    return replace(
        data,
        sources={name: fill(source) for name, source in data.sources.items()},
        validation=fill(data.validation),
    )


def _fill_schedule(schedule: ScheduleConfig, num_layers: int, problems: Problems) -> ScheduleConfig:
    """`schedule` with each stage's length, batch, block size and exact tokens, and the total they make."""
    stages = {}
    for name, stage in schedule.stages.items():
        seq_len = stage.seq_len if stage.seq_len is not None else schedule.seq_len
        stages[name] = replace(
            stage,
            seq_len=seq_len,
            batch_tokens=stage.batch_tokens if stage.batch_tokens is not None else schedule.batch_tokens,
            micro_tokens=stage.micro_tokens if stage.micro_tokens is not None else schedule.micro_tokens,
            attention=_fill_attention(stage.attention, schedule, seq_len)
            if stage.attention.plan is None
            else _fill_plan(f"schedule.stages.{name}.attention.plan", stage.attention, num_layers, problems),
            long_documents=_fill_long_documents(stage.long_documents, seq_len),
            tokens=_stage_tokens(f"schedule.stages.{name}.tokens", stage.tokens, schedule.tokens, problems),
        )
    _check_budget(schedule, {name: stage.tokens for name, stage in stages.items()}, problems)
    stages = {name: replace(stage, tokens=_whole_steps(stage)) for name, stage in stages.items()}
    total = sum(stage.tokens or 0 for stage in stages.values())
    return replace(schedule, stages=stages, tokens=total)


def _check_budget(schedule: ScheduleConfig, asked: dict[str, int | None], problems: Problems) -> None:
    """Record stages that ask for more than schedule.tokens, and the total at which they would fit."""
    known = {name: tokens for name, tokens in asked.items() if tokens is not None}
    if schedule.tokens is None or sum(known.values()) <= schedule.tokens:
        return
    budgets = {name: schedule.stages[name].tokens for name in known}
    absolute = sum(tokens for name, tokens in known.items() if not is_share(budgets[name]))
    million = 10**6
    free = million - sum(parse_share(budget, million) for budget in budgets.values() if is_share(budget))
    if free > 0:
        hint = f"set schedule.tokens={format_tokens(-(-absolute * million // free))}, or lower the stages"
    else:
        hint = "lower the stages; shares and tokens together may come to 100%"
    parts = " + ".join(f"{name} {show(budget)}" for name, budget in budgets.items())
    problems.add("schedule.tokens", format_tokens(schedule.tokens), f"less than the stages ask for ({parts}); {hint}")


def _fill_attention(attention: AttentionConfig, schedule: ScheduleConfig, seq_len: int | None) -> AttentionConfig:
    """`attention` with every option of every kind: as given, as the schedule or the length say, or the default."""
    values = {name: option.default for name, option in all_options().items()} | attention.options
    letters = (attention.pattern or "").upper()
    for kind in KINDS.values():
        if kind.is_stage_kind or kind.letter in letters:
            values |= kind.fill_options(values, schedule, seq_len)
    return replace(attention, options=values)


def _fill_plan(key: str, attention: AttentionConfig, num_layers: int, problems: Problems) -> AttentionConfig:
    """`attention` with its plan as entries, those of the file that was named. Options stay open: the plan says them."""
    values = {name: option.default for name, option in all_options().items()} | attention.options
    given = attention.plan
    try:
        plan = read_plan(given, num_layers) if isinstance(given, str) else plan_of(given, num_layers)
    except ValueError as error:
        problems.add(key, given, str(error))
        return replace(attention, options=values, plan=[])
    return replace(attention, options=values, plan=entries_of(plan))


def _fill_long_documents(long: LongDocumentsConfig | None, seq_len: int | None) -> LongDocumentsConfig | None:
    return long if long is None or long.length is not None else replace(long, length=seq_len)


def _stage_tokens(key: str, value: Any, total: int | None, problems: Problems) -> int | None:
    """A stage's budget in tokens, not yet in whole steps."""
    if value is None:
        return None
    if is_share(value) and total is None:
        if not problems.about("schedule.tokens"):
            problems.add(key, value, "a share of what? Set schedule.tokens, or give the stage a number of tokens")
        return None
    if value is not None and problems.about(key):
        return None
    tokens = quantity(parse_share, key, value, problems, total or 0)
    if tokens == 0:
        problems.add(key, value, "a stage of no tokens; remove it with ~" + key.removesuffix(".tokens"))
        return None
    return tokens


def _whole_steps(stage: Any) -> int | None:
    """The stage's tokens rounded up to whole optimizer steps."""
    if stage.tokens is None or not stage.batch_tokens:
        return stage.tokens
    return -(-stage.tokens // stage.batch_tokens) * stage.batch_tokens


def _fill_shares(config: RunConfig, problems: Problems) -> RunConfig:
    """`config` with the remaining shares (warm-up, decay, cadences, a stream's length) as tokens of exact totals."""
    schedule = config.schedule
    stages = {
        name: stage
        if stage.lr is None
        else replace(stage, lr=_fill_stage_lr(f"schedule.stages.{name}.lr", stage, stage.lr, config.optim.lr, problems))
        for name, stage in schedule.stages.items()
    }
    span = sum(stage.tokens or 0 for stage in schedule.stages.values() if stage.lr is None)
    sections = {}
    for section in ("eval", "checkpoint"):
        values = getattr(config, section)
        tokens = quantity(parse_share, f"{section}.every_tokens", values.every_tokens, problems, schedule.tokens)
        sections[section] = replace(values, every_tokens=tokens)
    sources = {
        name: replace(source, max_tokens=schedule.tokens) if source.streaming and source.max_tokens is None else source
        for name, source in config.data.sources.items()
    }
    return replace(
        config,
        schedule=replace(schedule, stages=stages),
        optim=replace(config.optim, lr=_fill_lr("optim.lr", config.optim.lr, span, problems)),
        data=replace(config.data, sources=sources),
        **sections,
    )


def _fill_stage_lr(key: str, stage: StageConfig, own: StageLRConfig, run: LRConfig, problems: Problems) -> LRConfig:
    """The stage's own learning rate with what it leaves open as in `run`, a share of the run's now one of the
    stage's."""
    given = {name: value for name, value in vars(own).items() if value is not None}
    given["options"] = run.options | {name: value for name, value in own.options.items() if value is not None}
    return _fill_lr(key, replace(run, **given), stage.tokens or 0, problems)


def _fill_lr(key: str, lr: LRConfig, span: int, problems: Problems) -> LRConfig:
    """`lr` with every option of every kind, and shares in tokens, where it spans `span` tokens."""
    known = all_rate_options()
    given = {name: value for name, value in lr.options.items() if value is not None}
    options = {name: option.default for name, option in known.items()} | given
    for name in (name for name, option in known.items() if option.is_share):
        options[name] = quantity(parse_share, f"{key}.{name}", options[name], problems, span)
    warmup = quantity(parse_share, f"{key}.warmup_tokens", lr.warmup_tokens, problems, span)
    return replace(lr, warmup_tokens=warmup, options=options)
