"""What cannot work: every rule that ties keys to each other, one function a section.

Each rule records key, value and what would work, and skips quantities that are None because they were unreadable (which
is recorded already). Rules about data on disk or checkpoints live where those are read.
"""

from __future__ import annotations

import math
from collections.abc import Iterable
from dataclasses import replace
from pathlib import Path

from conf.build import Problems
from conf.exchange import BLOCKS, HEADS, SEQUENCE_BY, exchange, refusal
from conf.formats import FORMATS, all_format_options, formats_with
from conf.hardware import Hardware, check_device, check_world, divisors, refuse_bf16_at_stage_0
from conf.numbers import format_length, format_tokens
from conf.rates import RATES
from conf.schema import (
    AUTO,
    OFFLOAD,
    OFFLOAD_HEADS,
    AttentionConfig,
    LongDocumentsConfig,
    LRConfig,
    ModelConfig,
    RopeConfig,
    RunConfig,
    ScheduleConfig,
    SourceConfig,
    StageConfig,
    SyntheticConfig,
)
from conf.words import show
from moba.kinds import BACKENDS, KINDS, BadOption, Moba, Sliding, all_options, from_entry, stage_kinds

SYNTHETIC_TASKS = ("mqar", "passkey", "multi_key", "multi_query", "straddle", "copy")
EVAL_SUITES = ("loss", "mini", "swap")
KEY_CONVOLUTIONS = (0, 3, 5)
ROPE_SCALINGS = ("none", "linear", "ntk", "yarn", "llama3")
NEED_ORIGINAL_LENGTH = ("yarn", "llama3")
MODEL_ROPE_TYPES = ("default", "linear", "llama3", "yarn", "dynamic")
PRECISIONS = ("auto", "bf16", "fp32")
DEVICES = ("auto", "cuda", "cpu")
MOST_WORKERS = 1024
# What deepspeed.extra must not say, because other keys say it: there would be two answers.
OWN_KEYS = {
    "optimizer": "optim.*",
    "scheduler": "optim.lr.*",
    "train_batch_size": "schedule.batch_tokens",
    "train_micro_batch_size_per_gpu": "schedule.micro_tokens",
    "gradient_accumulation_steps": "schedule.micro_tokens",
    "bf16": "deepspeed.precision",
    "fp16": "deepspeed.precision",
    "torch_autocast": "deepspeed.precision",
    "gradient_clipping": "optim.grad_clip",
    "activation_checkpointing": "model.activation_checkpointing",
    "sequence_parallel_size": "parallel.sequence",
    "data_parallel_size": "parallel.sequence",
}
# Of DeepSpeed, and not covered here: each would be taken for something else.
NOT_COVERED = {
    "tensor_parallel": "tensor parallelism",
    "pipeline": "pipeline parallelism",
    "autotuning": "DeepSpeed's autotuning",
    "compression_training": "compression",
    "data_efficiency": "DeepSpeed's data sampling",
    "curriculum_learning": "DeepSpeed's curriculum",
    "sparse_attention": "DeepSpeed's attention",
}
ON_SPIKE = ("off", "skip", "rollback", "stop")
WANDB_MODES = ("auto", "online", "offline", "disabled")


def check(config: RunConfig, hardware: Hardware | None, problems: Problems) -> None:
    """Record everything in `config` (quantities parsed, gaps filled) that could not run."""
    _check_model(config, problems)
    _check_data(config, problems)
    _check_schedule(config, problems)
    _check_optim(config, problems)
    _check_engine(config, problems)
    _check_parallel(config, problems)
    _check_rest(config, problems)
    if hardware is not None and config.run.device in DEVICES:
        check_device(config, hardware, problems)
    if hardware is not None:
        check_world(config, hardware.world_size, problems)


def check_inherited(schedule: ScheduleConfig, problems: Problems) -> ScheduleConfig:
    """`schedule` without what is wrong in the keys that stages take from it, once recorded under their own names."""
    good = {}
    for name in ("seq_len", "batch_tokens", "block_size", "top_k"):
        value = getattr(schedule, name)
        good[name] = value if _at_least(f"schedule.{name}", value, 1, problems) else None
    return replace(schedule, **good)


def _one_of(key: str, value: object, choices: tuple[str, ...], problems: Problems) -> bool:
    if value not in choices:
        problems.add(key, value, f"choose one of {', '.join(choices)}")
    return value in choices


def _either(choices: tuple[str, ...]) -> str:
    return f"{', '.join(choices[:-1])} or {choices[-1]}"


def _at_least(key: str, value: float | None, least: float, problems: Problems, open_end: bool = False) -> bool:
    """True if `value` is a finite number of at least `least` (above it with `open_end`); False and recorded if not."""
    if value is None:
        return False
    good = math.isfinite(value) and (value > least if open_end else value >= least)
    if not good:
        problems.add(key, value, f"must be {'above' if open_end else 'at least'} {least}")
    return good


def _check_model(config: RunConfig, problems: Problems) -> None:
    model = config.model
    sizes = ("hidden_size", "num_layers", "num_heads", "num_kv_heads", "ffn_size", "loss_tile")
    if False in [_at_least(f"model.{name}", getattr(model, name), 1, problems) for name in sizes]:
        return
    recomputed = model.activation_checkpointing
    if not isinstance(recomputed, bool) and recomputed not in (AUTO, "mlp", OFFLOAD, OFFLOAD_HEADS):
        hint = "choose one of auto, false, mlp, true, offload, offload_heads"
        problems.add("model.activation_checkpointing", recomputed, hint)
    if not isinstance(model.compile, bool) and model.compile != AUTO:
        problems.add("model.compile", model.compile, "choose one of auto, false, true")
    if model.vocab_size is not None:
        _at_least("model.vocab_size", model.vocab_size, 1, problems)
    assert model.num_kv_heads is not None  # filled
    if model.num_heads % model.num_kv_heads:
        problems.add(
            "model.num_kv_heads",
            model.num_kv_heads,
            f"must divide model.num_heads={model.num_heads}: {divisors(model.num_heads)}",
        )
    if model.head_dim is None:
        below = model.hidden_size // model.num_heads * model.num_heads
        problems.add(
            "model.hidden_size",
            model.hidden_size,
            f"is not a multiple of model.num_heads={model.num_heads}; use {below or model.num_heads} or"
            f" {below + model.num_heads}, or set model.head_dim",
        )
    elif model.head_dim < 2 or model.head_dim % 2:
        problems.add(
            "model.head_dim",
            model.head_dim,
            f"RoPE rotates pairs of channels, so it must be even and positive; use {max(2, model.head_dim + 1)}",
        )
    _check_layer_options(model, problems)
    _at_least("model.rope_theta", model.rope_theta, 0, problems, open_end=True)
    _at_least("model.norm_eps", model.norm_eps, 0, problems, open_end=True)
    _at_least("model.init_std", model.init_std, 0, problems)
    if model.rope_scaling is not None:
        kind = model.rope_scaling.get("rope_type", model.rope_scaling.get("type"))
        _one_of("model.rope_scaling.rope_type", kind, MODEL_ROPE_TYPES, problems)


def _check_layer_options(model: ModelConfig, problems: Problems) -> None:
    """Options that some layers have and others have not."""
    if model.rope_pattern is not None:
        known = "R (RoPE) or N (NoPE), such as RN"
        _check_letters("model.rope_pattern", model.rope_pattern, "RN", known, model.num_layers, problems)
    if model.key_conv not in KEY_CONVOLUTIONS:
        problems.add("model.key_conv", model.key_conv, "choose 0 (none), 3 or 5")
    if model.key_conv_pattern is not None:
        known = "K (convolution) or - (none), such as -K"
        _check_letters("model.key_conv_pattern", model.key_conv_pattern, "K-", known, model.num_layers, problems)
        if not model.key_conv:
            problems.add(
                "model.key_conv_pattern", model.key_conv_pattern, "has no effect without model.key_conv=3 or 5"
            )


def _check_data(config: RunConfig, problems: Problems) -> None:
    data = config.data
    if not data.tokenizer:
        problems.add("data.tokenizer", data.tokenizer, "name one: bytes, bpe-32k, or the path of a tokenizer.json")
    if not data.sources:
        problems.add(
            "data.sources",
            {},
            "no training data; set data=embedded, data=files data.path=..., or data=hub data.name=...",
        )
    for name, source in data.sources.items():
        _check_source(f"data.sources.{name}", source, problems)
    weights = [source.weight for source in data.sources.values()]
    if weights and all(w >= 0 and math.isfinite(w) for w in weights) and sum(weights) <= 0:
        problems.add("data.sources", list(data.sources), "all weights are 0; give one source a weight above 0")
    if data.validation is not None:
        _check_source("data.validation", data.validation, problems)
    every = [*data.sources.values(), *([] if data.validation is None else [data.validation])]
    if data.chat_template is not None and not any(source.format in FORMATS and source.is_chat for source in every):
        problems.add("data.chat_template", data.chat_template, "no source has format=chat; use null, or data=sft")
    _at_least("data.num_workers", data.num_workers, 0, problems)
    if data.num_workers > MOST_WORKERS:
        problems.add("data.num_workers", data.num_workers, f"at most {MOST_WORKERS} processes, about one per core")
    _at_least("data.interleave", data.interleave, 1, problems)


def _check_synthetic(key: str, source: SourceConfig, synthetic: SyntheticConfig, problems: Problems) -> None:
    for field, default in (
        ("path", None),
        ("name", None),
        ("format", "text"),
        ("max_tokens", None),
        ("exclude_ids", None),
    ):
        if getattr(source, field) != default:
            problems.add(f"{key}.{field}", getattr(source, field), f"has no effect with {key}.synthetic; leave it out")
    key = f"{key}.synthetic"
    _one_of(f"{key}.task", synthetic.task, SYNTHETIC_TASKS, problems)
    counts = ("length", "pairs", "min_pairs", "repeats", "key_tokens", "value_tokens", "block_size", "num_documents")
    for field in counts:
        _at_least(f"{key}.{field}", getattr(synthetic, field), 1, problems)
    _at_least(f"{key}.symbols", synthetic.symbols, 4, problems)
    if synthetic.min_pairs is not None and synthetic.min_pairs > synthetic.pairs:
        problems.add(f"{key}.min_pairs", synthetic.min_pairs, f"must be at most {key}.pairs={synthetic.pairs}")


def _check_source(key: str, source: SourceConfig, problems: Problems) -> None:
    _at_least(f"{key}.weight", source.weight, 0, problems)
    if source.synthetic is not None:
        _check_synthetic(key, source, source.synthetic, problems)
        return
    shorthand = key == "data.sources.main"
    if source.path is None and source.name is None:
        hint = f"where is it? Set {key}.path=<file, glob or directory> or {key}.name=<hub data set>"
        short = "data.path=<file, glob or directory> with data=files, data.name=<hub data set> with data=hub"
        problems.add(f"{key}.path", None, f"where is the data? Set {short}" if shorthand else hint)
    if source.path is not None and source.name is not None:
        problems.add(f"{key}.path", source.path, f"{key}.name={show(source.name)} is set too; set one of them to null")
    if _one_of(f"{key}.format", source.format, tuple(FORMATS), problems):
        for name, option in all_format_options().items():
            if name not in FORMATS[source.format].options and source.options.get(name) not in (None, option.default):
                problems.add(f"{key}.{name}", source.options[name], f"only with {key}.format={formats_with(name)}")
        if not source.is_chat and source.path is not None and source.path.startswith("embedded-chat"):
            problems.add(
                f"{key}.format", source.format, f"{key}.path={show(source.path)} holds conversations; use chat"
            )
    if source.name is None:
        for field, default in (("subset", None), ("split", "train"), ("streaming", False)):
            if getattr(source, field) != default:
                problems.add(f"{key}.{field}", getattr(source, field), f"only for hub data sets ({key}.name)")
    if source.max_tokens is not None:
        _at_least(f"{key}.max_tokens", source.max_tokens, 1, problems)


def _check_schedule(config: RunConfig, problems: Problems) -> None:
    schedule = config.schedule
    if not schedule.stages:
        problems.add(
            "schedule.stages",
            {},
            "no stages; choose an experiment (+exp=quickstart) or a schedule (schedule=moba_then_full)",
        )
    if schedule.window is not None and _at_least("schedule.window", schedule.window, 1, problems):
        patterns = [stage.attention.pattern or "" for stage in schedule.stages.values()]
        letter = Sliding.letter
        if patterns and not any(letter in pattern.upper() for pattern in patterns):
            hint = f"has no effect without an {letter} in a stage's attention.pattern, such as {letter}{Moba.letter}"
            problems.add("schedule.window", schedule.window, hint)
    for name, stage in schedule.stages.items():
        key = f"schedule.stages.{name}"
        _check_batch(key, stage, problems)
        _check_attention(f"{key}.attention", stage.attention, stage.seq_len, config.model.num_layers, problems)
        _check_rope(f"{key}.rope", stage.rope, problems)
        _check_mix(f"{key}.mix", stage.mix, list(config.data.sources), problems)
        _check_long_documents(f"{key}.long_documents", stage.long_documents, problems)
        if stage.own_lr is not None:
            _check_lr(f"{key}.lr", stage.own_lr, stage.tokens, problems)
    name, first = next(iter(schedule.stages.items()), (None, None))
    if first is not None and first.reset_optimizer and config.init.optimizer:
        hint = "the first stage would discard the moments that init.optimizer=true loads; set only one of them"
        problems.add(f"schedule.stages.{name}.reset_optimizer", True, hint)


def _check_batch(key: str, stage: StageConfig, problems: Problems) -> None:
    seq_len, batch = stage.seq_len, stage.batch_tokens
    good = _at_least(f"{key}.seq_len", seq_len, 1, problems)
    if not (_at_least(f"{key}.batch_tokens", batch, 1, problems) and good):
        return
    if batch % seq_len:
        below = batch // seq_len * seq_len
        near = [format_length(n) for n in (below, below + seq_len) if n]
        problems.add(
            f"{key}.batch_tokens",
            format_length(batch),
            f"must be a multiple of seq_len={format_length(seq_len)}; use {' or '.join(near)}",
        )
        return
    micro = seq_len if stage.micro_tokens is None else stage.micro_tokens
    if not _at_least(f"{key}.micro_tokens", micro, 1, problems):
        return
    if micro % seq_len:
        problems.add(
            f"{key}.micro_tokens",
            format_length(micro),
            f"must be a multiple of {key}.seq_len={format_length(seq_len)}; use null (one sequence) or"
            f" {format_length(-(-micro // seq_len) * seq_len)}",
        )
    elif batch % micro:
        problems.add(
            f"{key}.micro_tokens",
            format_length(micro),
            f"must divide {key}.batch_tokens={format_length(batch)}; use null (one sequence) or set batch_tokens to"
            f" {format_length(-(-batch // micro) * micro)}",
        )


def _check_attention(
    key: str, attention: AttentionConfig, seq_len: int | None, layers: int, problems: Problems
) -> None:
    _one_of(f"{key}.backend", attention.backend, BACKENDS, problems)
    if attention.plan is not None:
        _check_attention_plan(key, attention, problems)
        return
    letters = (attention.pattern or "").upper()
    for kind in KINDS.values():
        used = kind.name == attention.kind or kind.letter in letters
        _add_bad_options(key, seq_len, kind.check_options(attention.options, seq_len, used), problems)
    if not _one_of(f"{key}.kind", attention.kind, stage_kinds(), problems):
        return
    kind = KINDS[attention.kind]
    _add_bad_options(key, seq_len, kind.check_backend(attention.options, attention.backend), problems)
    if attention.full_last and not kind.replaces_full:
        problems.add(f"{key}.full_last", attention.full_last, f"only with {key}.kind={Moba.name}")
    elif not 0 <= attention.full_last <= layers:
        problems.add(f"{key}.full_last", attention.full_last, f"must lie between 0 and model.num_layers={layers}")
    if attention.pattern is not None:
        _check_attention_pattern(key, attention, attention.pattern, layers, problems)


def _check_attention_plan(key: str, attention: AttentionConfig, problems: Problems) -> None:
    """A plan says all of every layer: nothing else may say it too."""
    default = AttentionConfig()
    defaults = {name: getattr(default, name) for name in ("kind", "full_last", "pattern")}
    given = {name: getattr(attention, name) for name in defaults} | attention.options
    defaults |= {name: option.default for name, option in all_options().items()}
    for name, value in given.items():
        if value != defaults[name]:
            hint = f"{key}.plan sets it for each layer; set {name}={show(defaults[name])}, or leave the plan out"
            problems.add(f"{key}.{name}", value, hint)
    specs = [from_entry(entry) for entry in attention.plan]
    taken = {spec.on(attention.backend).backend for spec in specs}
    if specs and attention.backend in BACKENDS and attention.backend not in taken:
        names = sorted({one.name for spec in specs for one in spec.backends})
        problems.add(
            f"{key}.backend", attention.backend, f"the layers of {key}.plan support {', '.join(names)} or auto"
        )


def _check_attention_pattern(
    key: str, attention: AttentionConfig, pattern: str, layers: int, problems: Problems
) -> None:
    """The layers' letters: the stage's kind, and those that may stand beside any."""
    if attention.full_last:
        problems.add(f"{key}.pattern", pattern, f"{key}.full_last={attention.full_last} is set too; set one")
    main = KINDS[attention.kind]
    other = [kind for kind in KINDS.values() if kind.replaces_full and kind.name != attention.kind]
    if any(kind.letter in pattern.upper() for kind in other):
        wrong = "".join(kind.letter for kind in other if kind.letter in pattern.upper())
        hint = f"with {key}.kind={attention.kind}, write {main.letter} instead of {wrong}"
        problems.add(f"{key}.pattern", pattern, hint)
    every = [f"{kind.letter} ({kind.in_patterns})" for kind in KINDS.values()]
    letters = "".join(kind.letter for kind in KINDS.values())
    known = f"{', '.join(every[:-1])} or {every[-1]}, such as MMMF or SM"
    _check_letters(f"{key}.pattern", pattern, letters, known, layers, problems)


def _add_bad_options(key: str, seq_len: int | None, found: Iterable[BadOption], problems: Problems) -> None:
    """What a kind says of its options, with the keys as a user writes them."""
    for name, value, hint in found:
        words = {"key": key}
        if seq_len is not None and seq_len >= 1:
            words |= {"seq_len": format_length(seq_len), "divisors": divisors(seq_len)}
        problems.add(f"{key}.{name}", value, hint.format(**words))


def _check_letters(key: str, pattern: str, letters: str, known: str, layers: int, problems: Problems) -> None:
    """A pattern of one letter per layer, out of `letters`, which `known` explains."""
    if not pattern or set(pattern.upper()) - set(letters):
        problems.add(key, pattern, f"one letter per layer, {known}")
    elif len(pattern) > layers:
        problems.add(key, pattern, f"has {len(pattern)} letters for model.num_layers={layers}")


def _check_rope(key: str, rope: RopeConfig, problems: Problems) -> None:
    if rope.theta is not None:
        _at_least(f"{key}.theta", rope.theta, 0, problems, open_end=True)
    if not _one_of(f"{key}.scaling", rope.scaling, ROPE_SCALINGS, problems):
        return
    if _at_least(f"{key}.factor", rope.factor, 1, problems) and rope.factor == 1 and rope.scaling != "none":
        problems.add(
            f"{key}.factor",
            rope.factor,
            f"{rope.scaling} with factor 1 changes nothing; set the extension factor, such as 4",
        )
    if rope.scaling == "none" and rope.factor != 1:
        problems.add(f"{key}.factor", rope.factor, f"has no effect without {key}.scaling={_either(ROPE_SCALINGS[1:])}")
    needed = rope.scaling in NEED_ORIGINAL_LENGTH
    if needed and rope.original_length is None:
        hint = f"{rope.scaling} needs the length the model was trained at before, such as 8K"
        problems.add(f"{key}.original_length", None, hint)
    if rope.original_length is not None:
        _at_least(f"{key}.original_length", rope.original_length, 1, problems)
        if not needed:
            hint = f"has no effect without {key}.scaling={_either(NEED_ORIGINAL_LENGTH)}"
            problems.add(f"{key}.original_length", rope.original_length, hint)


def _check_mix(key: str, mix: dict[str, float] | None, sources: list[str], problems: Problems) -> None:
    if mix is None:
        return
    good = True
    for name, share in mix.items():
        if name not in sources:
            problems.add(f"{key}.{name}", share, f"no such source; data.sources has {', '.join(sources) or 'none'}")
        good &= _at_least(f"{key}.{name}", share, 0, problems)
    if good and sum(mix.values()) <= 0:
        problems.add(key, mix, "no source has a share above 0; use null for the sources' own weights")


def _check_long_documents(key: str, long: LongDocumentsConfig | None, problems: Problems) -> None:
    if long is None:
        return
    if not 0 <= long.share <= 1:
        problems.add(f"{key}.share", long.share, "a share of the tokens: from 0 to 1, such as 0.5")
    _at_least(f"{key}.length", long.length, 1, problems)


def _check_optim(config: RunConfig, problems: Problems) -> None:
    optim = config.optim
    shared = [stage.tokens for stage in config.schedule.stages.values() if stage.lr is None]
    if shared:
        _check_lr("optim.lr", optim.lr, None if None in shared else sum(shared), problems)
    if len(optim.betas) != 2 or not all(0 <= beta < 1 for beta in optim.betas):
        problems.add("optim.betas", optim.betas, "two numbers from 0 to below 1, such as [0.9, 0.95]")
    _at_least("optim.eps", optim.eps, 0, problems, open_end=True)
    _at_least("optim.weight_decay", optim.weight_decay, 0, problems)
    _at_least("optim.grad_clip", optim.grad_clip, 0, problems)
    _at_least("optim.max_bad_steps", optim.max_bad_steps, 1, problems)


def _check_lr(key: str, lr: LRConfig, span: int | None, problems: Problems) -> None:
    is_known = _one_of(f"{key}.kind", lr.kind, tuple(RATES), problems)
    _at_least(f"{key}.peak", lr.peak, 0, problems, open_end=True)
    if not 0 <= lr.min_ratio <= 1:
        problems.add(f"{key}.min_ratio", lr.min_ratio, "final learning rate / peak: from 0 to 1")
    if span is None or lr.warmup_tokens is None:
        return
    if lr.warmup_tokens > span:
        problems.add(
            f"{key}.warmup_tokens",
            format_tokens(lr.warmup_tokens),
            f"is longer than the {format_tokens(span)} tokens of this learning-rate schedule; use a share such as 1%",
        )
    elif is_known:
        for name, value, hint in RATES[lr.kind].check(lr, span):
            problems.add(f"{key}.{name}", value, hint)


def _check_engine(config: RunConfig, problems: Problems) -> None:
    engine = config.deepspeed
    _one_of("deepspeed.precision", engine.precision, PRECISIONS, problems)
    for key, value in engine.extra.items():
        if key in OWN_KEYS:
            problems.add(f"deepspeed.extra.{key}", value, f"set by {OWN_KEYS[key]}; use that key")
        if key in NOT_COVERED:
            hint = f"{NOT_COVERED[key]} is not supported; several GPUs share a run by ZeRO and parallel.sequence"
            problems.add(f"deepspeed.extra.{key}", value, hint)
    if engine.zero_stage not in (0, 1, 2, 3):
        problems.add("deepspeed.zero_stage", engine.zero_stage, "choose 0, 1, 2 or 3 (deepspeed=zero1 and so on)")
        return
    if engine.zero_stage == 0 and engine.precision == "bf16":
        refuse_bf16_at_stage_0("deepspeed.precision", "bf16", problems)
    if engine.offload_optimizer and engine.zero_stage == 0:
        problems.add("deepspeed.offload_optimizer", True, "needs ZeRO 1, 2 or 3, such as deepspeed=zero1_offload")
    if engine.offload_params and engine.zero_stage != 3:
        problems.add("deepspeed.offload_params", True, "needs ZeRO 3: deepspeed=zero3_offload")


def _check_parallel(config: RunConfig, problems: Problems) -> None:
    key, shared, model = "parallel.sequence", config.parallel.sequence, config.model
    is_known = _one_of("parallel.sequence_by", config.parallel.sequence_by, SEQUENCE_BY, problems)
    if not _at_least(key, shared, 1, problems) or shared == 1 or not is_known:
        return
    if model.num_heads is None or model.num_heads < 1 or model.num_kv_heads is None or model.num_kv_heads < 1:
        return  # said elsewhere
    by = exchange(config).by
    if by == HEADS and shared > model.num_heads:
        hint = (
            f"at most model.num_heads={model.num_heads}: each process computes whole attention heads; or "
            "parallel.sequence_by=blocks"
        )
        problems.add(key, shared, hint)
    if by == BLOCKS and (refused := refusal(config)) is not None:
        problems.add(*refused)
    needed = max(1, model.key_conv - 1) * (2 if by == BLOCKS else 1)
    for name, stage in config.schedule.stages.items():
        gate = None if stage.attention is None else stage.attention.options.get("gate")
        if gate == "shared" and by == HEADS and model.num_kv_heads % shared:
            hint = (
                f"needs the heads that share keys in one process; {key} a divisor of model.num_kv_heads="
                f"{model.num_kv_heads}, or parallel.sequence_by=blocks"
            )
            problems.add(f"schedule.stages.{name}.attention.gate", gate, hint)
        if stage.seq_len is not None and stage.seq_len < shared * needed:
            problems.add(
                f"schedule.stages.{name}.seq_len",
                stage.seq_len,
                f"too short for {key}={shared}: each process needs at least {needed} tokens",
            )


def _check_rest(config: RunConfig, problems: Problems) -> None:
    name = str(config.run.name)
    if Path(name).is_absolute() or {"", ".", ".."} & set(name.split("/")):
        problems.add("run.name", name, "a name, such as books or books/first; run.dir=<directory> is for the place")
    _one_of("run.device", config.run.device, DEVICES, problems)
    _at_least("run.seed", config.run.seed, 0, problems)
    _one_of("run.on_spike", config.run.on_spike, ON_SPIKE, problems)
    _at_least("run.spike_deviations", config.run.spike_deviations, 0, problems, open_end=True)
    _at_least("run.spike_window", config.run.spike_window, 2, problems)
    _at_least("data.seed", config.data.seed, 0, problems)
    _one_of("logging.wandb", config.logging.wandb, WANDB_MODES, problems)
    split = config.deepspeed.zero_stage == 3 or config.parallel.sequence > 1
    if _at_least("logging.samples", config.logging.samples, 0, problems) and config.logging.samples and split:
        hint = "needs a process that holds the whole model: deepspeed.zero_stage 0 to 2, parallel.sequence=1; or 0"
        problems.add("logging.samples", config.logging.samples, hint)
    _one_of("eval.suite", config.eval.suite, EVAL_SUITES, problems)
    _at_least("eval.documents", config.eval.documents, 1, problems)
    if config.eval.seq_len is not None:
        _at_least("eval.seq_len", config.eval.seq_len, 1, problems)
    _at_least("checkpoint.keep", config.checkpoint.keep, 1, problems)
    if config.init.source is None:
        for name in ("optimizer", "data"):
            if getattr(config.init, name):
                problems.add(f"init.{name}", True, "has no effect without init.source=<run directory>")
