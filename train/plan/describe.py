"""A configuration's parts in words, for the plan. Pure functions, no torch."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from itertools import pairwise

import numpy as np

from conf.exchange import by_blocks, exchange
from conf.hardware import Hardware
from conf.numbers import format_count, format_length, format_memory, format_tokens
from conf.rates import RATES
from conf.schema import OFFLOADED, LRConfig, RopeConfig, RunConfig, SourceConfig
from data.mixture import long_share, make_pools, passes
from data.sources import Source
from moba.backends.choice import choose
from moba.backends.refusals import BackendUnavailable
from moba.kinds import AttentionSpec, QueryShape
from train.model.sizes import head_dim, key_conv_widths, ntk_theta, num_kv_heads, rope_layers
from train.plan.memory import MASTER_AND_MOMENTS, saving_bytes
from train.schedule import Stage

FEW_LONG = 0.05  # of a stage's tokens


def describe_layers(attention: tuple[AttentionSpec, ...]) -> str:
    """An attention plan in words: "moba 2048x3 (layers 0-8), full (layers 9-11)"."""
    layers: dict[str, list[int]] = {}
    for index, spec in enumerate(attention):
        layers.setdefault(str(spec), []).append(index)
    return ", ".join(f"{name} ({_layers(indices)})" for name, indices in layers.items())


def describe_kernels(config: RunConfig, stages: Sequence[Stage], hardware: Hardware, bf16: bool) -> tuple[str, ...]:
    """What will compute each kind of attention, and why nothing faster: one entry per kind and backend."""
    model, found = config.model, {}
    for stage in stages:
        shape = QueryShape(
            device=hardware.device(config.run.device),
            dtype="bfloat16" if bf16 else "float32",
            num_tokens=stage.micro_tokens,
            num_heads=model.num_heads,
            num_kv_heads=num_kv_heads(model),
            head_dim=head_dim(model),
            longest=stage.seq_len,
            deterministic=config.run.deterministic,
            has_slices=by_blocks(config),
            has_cudnn=hardware.has_bf16,  # from the same compute capability on
        )
        for spec in dict.fromkeys(stage.attention):
            kind = spec.at(stage.seq_len)
            try:
                choice = str(choose(kind, shape, None))
            except BackendUnavailable as error:
                choice = f"none: {error}"
            text = (
                f"{kind} on {choice}"
                if kind == spec
                else f"{spec} at {format_length(stage.seq_len)} as {kind} on {choice}"
            )
            found.setdefault(text)
    return tuple(found)


def _layers(indices: list[int]) -> str:
    """[0, 1, 2, 5] as "layers 0-2, 5"."""
    return f"{'layer' if len(indices) == 1 else 'layers'} {_ranges(indices)}"


def _ranges(indices: list[int]) -> str:
    """[0, 1, 2, 5] as "0-2, 5", and [1, 3, 5, 7, 9] as "1, 3, ..., 9"."""
    steps = {b - a for a, b in pairwise(indices)}
    if len(indices) > 4 and len(steps) == 1 and steps != {1}:
        return f"{indices[0]}, {indices[1]}, ..., {indices[-1]}"
    runs: list[list[int]] = []
    for index in indices:
        if runs and index == runs[-1][1] + 1:
            runs[-1][1] = index
        else:
            runs.append([index, index])
    return ", ".join(str(a) if a == b else f"{a}-{b}" for a, b in runs)


def describe_model(config: RunConfig) -> str:
    """The decoder's shape and options."""
    model = config.model
    nope = [i for i, has_rope in enumerate(rope_layers(model)) if not has_rope]
    convolved = [i for i, size in enumerate(key_conv_widths(model)) if size]
    options = {
        "tied embeddings": model.tie_embeddings,
        "biases on q, k, v": model.qkv_bias,
        "QK-norm": model.qk_norm,
        "activation checkpointing": model.activation_checkpointing is True,
        "activation checkpointing of the MLP": model.activation_checkpointing == "mlp",
        "activation checkpointing with layers' inputs on the host": model.activation_checkpointing in OFFLOADED,
        "torch.compile": model.compile is True,
        f"no RoPE in {_layers(nope)}": nope,
        f"key convolution over {model.key_conv} tokens in {_layers(convolved)}": convolved,
    }
    return (
        f"{model.name}: {model.num_layers} layers of {model.hidden_size}, {model.num_heads} heads of {head_dim(model)}"
        f" ({num_kv_heads(model)} for keys and values), SwiGLU of {model.ffn_size}"
        + "".join(f", {name}" for name, is_on in options.items() if is_on)
    )


def describe_rope(rope: RopeConfig, config: RunConfig) -> str:
    """A stage's RoPE; the model's own scaling is applied before the stage's."""
    theta = config.model.rope_theta if rope.theta is None else rope.theta
    text = f"theta {theta:g}"
    own = config.model.rope_scaling
    if own is not None:
        times = f" x{own['factor']:g}" if "factor" in own else ""
        text += f", the model's own {own.get('rope_type', own.get('type'))}{times}"
    if rope.scaling != "none":
        text += f"{', then' if own is not None else ','} {rope.scaling} x{rope.factor:g}"
        text += f" from {format_length(rope.original_length)}" if rope.original_length else ""
    if rope.scaling == "ntk":
        text += f" (theta {ntk_theta(theta, rope.factor, head_dim(config.model)):.4g})"
    return text


def describe_lr(config: RunConfig) -> str:
    """The run's learning rate and those of stages with their own."""
    own = {name: lr for name, stage in config.schedule.stages.items() if (lr := stage.own_lr) is not None}
    parts = []
    if len(own) < len(config.schedule.stages):
        parts.append(_one_lr(config.optim.lr) + (" over the stages that do not set one" if own else ""))
    parts += [f"{name}: {_one_lr(lr)}" for name, lr in own.items()]
    return "; ".join(parts)


def describe_stage_lr(config: RunConfig, name: str) -> str:
    """The learning rate of one stage, and whether it begins with the stage."""
    own = config.schedule.stages[name].own_lr
    if own is not None:
        return f"set by this stage: {_one_lr(own)}"
    return "set by optim.lr" if len(config.schedule.stages) > 1 else _one_lr(config.optim.lr)


def _one_lr(lr: LRConfig) -> str:
    text = f"{lr.kind}, peak {lr.peak:g}, warm-up {format_tokens(lr.warmup_tokens)} tokens"
    rate = RATES[lr.kind]
    for name, option in rate.options.items():
        value, word = lr.options[name], name.removesuffix("_tokens").replace("_", " ")
        text += f", {word} {format_tokens(value)} tokens" if option.is_share else f", {word} {value}"
    return text if rate.is_constant else f"{text}, down to {lr.peak * lr.min_ratio:g}"


def uses_bf16(config: RunConfig, hardware: Hardware) -> bool:
    """True if the run computes in bfloat16 on this hardware."""
    on_gpu = hardware.device(config.run.device) == "cuda"
    return config.deepspeed.precision == "bf16" or (config.deepspeed.precision == "auto" and on_gpu)


def describe_engine(config: RunConfig, hardware: Hardware) -> str:
    """Processes, ZeRO stage, precision and offloading."""
    engine = config.deepspeed
    device = "GPU" if hardware.device(config.run.device) == "cuda" else "CPU process"
    plural = "" if hardware.world_size == 1 else ("es" if device.endswith("s") else "s")
    shared = config.parallel.sequence
    offload = [what for what in ("optimizer", "params") if getattr(engine, f"offload_{what}")]
    return (
        f"{hardware.world_size} {device}{plural}"
        + (f" ({hardware.gpu_name})" if hardware.gpu_name and device == "GPU" else "")
        + f", ZeRO {engine.zero_stage}, {'bf16' if uses_bf16(config, hardware) else 'fp32'}"
        + (f", {' and '.join(offload)} on the host" if offload else "")
        + (f"; each sequence over {shared} {device}{plural}, {_describe_exchange(config)}" if shared > 1 else "")
    )


def _describe_exchange(config: RunConfig) -> str:
    by, reason = exchange(config)
    return f"by {by} ({reason})"


def describe_data(config: RunConfig, stages: tuple[Stage, ...], sources: Mapping[str, Source]) -> tuple[str, ...]:
    """Each source with the tokens drawn from it, the documents that reach each stage's length, and those held out.

    `sources` are those that are tokenised already, for the epochs.
    """
    lines, lengths = [], {name: source.lengths for name, source in sources.items()}
    for name, source in config.data.sources.items():
        wanted = sum(stage.tokens * stage.mix.get(name, 0.0) for stage in stages)
        line = f"{name}: {_where(source)}, {format_count(wanted)} training tokens"
        if name in lengths:
            count, tokens = len(lengths[name]), int(lengths[name].sum())
            line += f" = {wanted / max(tokens, 1):.3g} epochs of {count:,} documents, {format_count(tokens)} tokens"
        lines.append(line)
    for name in (name for name, source in sources.items() if config.data.sources[name].is_chat):
        used_at = dict.fromkeys(stage.seq_len for stage in stages if stage.mix.get(name, 0) > 0)
        lines += [_describe_cuts(name, sources[name], seq_len) for seq_len in used_at]
    texts = {name for name, source in config.data.sources.items() if not (source.is_chat or source.synthetic)}
    lines += dict.fromkeys(_describe_reach(stage, lengths) for stage in stages if set(stage.mix) <= texts)
    if config.data.validation is not None:
        lines.append(f"held out: {_where(config.data.validation)}, up to {config.eval.documents} documents")
    return tuple(lines)


def _describe_cuts(name: str, source: Source, seq_len: int) -> str:
    """How training at a length treats longer conversations (data.sft.usable_inputs)."""
    usable, length = source.usable_inputs(seq_len), format_length(seq_len)
    left_out, cut = int((usable == 0).sum()), int(((usable > 0) & (usable < source.lengths - 1)).sum())
    return (
        f"{name} at {length}: of {len(usable):,} conversations {cut:,} are cut to their first {length} tokens, and "
        f"{left_out:,} are left out, having no answer within them"
    )


def reach(stage: Stage, lengths: Mapping[str, np.ndarray]) -> float | None:
    """Share of a stage's tokens that come from documents of at least its length; None if a source is not known."""
    if not set(stage.mix) <= set(lengths):
        return None
    return long_share(make_pools(lengths, stage.mix, stage.long_documents), stage.seq_len)


def _describe_reach(stage: Stage, lengths: Mapping[str, np.ndarray]) -> str:
    share, length = reach(stage, lengths), format_length(stage.seq_len)
    if share is None:
        return "the share of tokens from documents that reach a stage's length is known once the data is tokenised"
    text = f"{stage.name}: {share:.1%} of the tokens come from documents that reach {length}"
    if stage.long_documents is not None:
        natural = long_share(make_pools(lengths, stage.mix), stage.seq_len)
        reads = passes(make_pools(lengths, stage.mix, stage.long_documents), stage.tokens)
        name, most = max(reads.items(), key=lambda item: item[1])
        text += f" ({natural:.1%} without long_documents); documents of {name} are read up to {most:.2g} times"
    return text if share >= FEW_LONG else f"{text}. Warning: the trailing loss of this stage is not meaningful"


def _where(source: SourceConfig) -> str:
    """Where a source's documents come from."""
    if source.synthetic is not None:
        return f"generated, {source.synthetic.task} of {format_length(source.synthetic.length)} inputs"
    if source.path == "embedded":
        return "the shipped books"
    return source.path or f"hub data set {source.name}" + (f" ({source.subset})" if source.subset else "")


def describe_outputs(config: RunConfig, hardware: Hardware, num_parameters: int) -> tuple[str, ...]:
    """When the run is saved, in how many bytes, and when it is evaluated."""
    stage_ends = " and at stage ends"
    save, test = config.checkpoint.every_tokens, config.eval.every_tokens
    when = f"every {format_count(save)} tokens{stage_ends}" if save else "at stage ends"
    size = MASTER_AND_MOMENTS * num_parameters
    lines = [f"checkpoints {when}, {format_memory(size)} each"]
    if config.checkpoint.asynchronous:
        share = format_memory(saving_bytes(config, num_parameters, hardware.world_size))
        pinned = "" if hardware.device(config.run.device) == "cpu" else "pinned "
        lines[0] += f", written in the background ({share} of {pinned}host memory per process)"
    if config.data.validation is None:
        lines.append("no evaluation (data.validation is null)")
    else:
        lines.append("evaluation " + (f"every {format_count(test)} tokens{stage_ends}" if test else "at stage ends"))
    return tuple(lines)
