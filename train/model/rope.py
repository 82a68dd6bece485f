"""Rotary position embedding: from positions to cosines and sines, with the scalings that pretrained models and
long-context stages use.

A model may have a scaling of its own (`model.rope_scaling`, in Hugging Face's format: default, linear, yarn, llama3,
dynamic). `dynamic` has no effect up to the model's own length, and beyond it the base depends on the current length, so
that a position has no fixed angle: such a model is used within its length, or a stage's RoPE replaces the scaling. A
stage of training may change the base and put `linear` (position interpolation), `ntk`, `yarn` or `llama3` on top. The
order is always: base, the model's own scaling, then the stage's. No parameters: swapping the Rope of a model touches no
weight.

Shape suffixes: T tokens, D head size (the frequencies appear twice, for the two halves of a head).
"""

from __future__ import annotations

import math

import torch

from conf.build import ConfigError
from conf.checks import NEED_ORIGINAL_LENGTH, ROPE_SCALINGS
from conf.schema import ModelConfig, RopeConfig, RunConfig
from train.model.sizes import head_dim, ntk_theta

_REFUSED = {
    "longrope": "its per-frequency factors switch with the length at hand",
    "proportional": "it rotates only a part of each head",
    "axial": "it is for images",
}
# Keys beside rope_type that a type reads; those of the first tuple are required.
_KEYS = {
    "default": ((), ()),
    "linear": (("factor",), ()),
    "dynamic": (("factor",), ()),
    "llama3": (("factor", "low_freq_factor", "high_freq_factor", "original_max_position_embeddings"), ()),
    "yarn": (
        ("factor", "original_max_position_embeddings"),
        ("attention_factor", "beta_fast", "beta_slow", "mscale", "mscale_all_dim", "truncate"),
    ),
}
# Llama 3.1's frequency band, in turns within the old context; a stage's llama3 scaling uses it.
LLAMA3_BAND = {"low_freq_factor": 1.0, "high_freq_factor": 4.0}
_DYNAMIC = (
    "its angles depend on the length at hand. Train a stage of that length with rope.scaling=ntk, the same formula at "
    "a fixed length (or another scaling, or rope.theta), and use what comes out"
)


class Rope:
    """Turns positions into `cos`, `sin` for one model in one stage.

    `inv_freq` is float32 `[D / 2]` in radians per token; `attention_factor` multiplies both cos and sin (yarn; 1
    otherwise); `longest` is the longest document that it supports, None for no limit. Raises ValueError, naming the
    key, for a scaling that is unknown, refused or incomplete.
    """

    def __init__(self, model: ModelConfig, stage: RopeConfig | None = None):
        stage = stage or RopeConfig()
        size = head_dim(model)
        if size % 2:
            raise ValueError(f"model.head_dim={size}: rotary position embedding needs an even head size")
        theta = float(model.rope_theta if stage.theta is None else stage.theta)
        if theta <= 1:
            raise ValueError(f"rope theta={theta:g}: must be greater than 1, such as 10000")
        own = check_rope_scaling(model.rope_scaling, model.rope_theta)
        _check_stage(stage, own["rope_type"], size)

        # Float32 step by step, as Hugging Face's models compute it: weights come from there and go back there.
        plain = _frequencies(theta, size)
        inv_freq, own_factor = _scale(plain, theta, own)
        on_top = stage_scaling(stage)
        if stage.scaling == "ntk":
            # The model's own scaling of each frequency (none: a ratio of exactly 1) is kept.
            inv_freq = inv_freq / plain * _frequencies(ntk_theta(theta, stage.factor, size), size)
        inv_freq, stage_factor = _scale(inv_freq, theta, on_top)
        self.inv_freq = inv_freq
        self.attention_factor = own_factor * stage_factor
        self.longest = None
        if own["rope_type"] == "dynamic" and not changes_rope(stage):
            if not model.pretrained_length:
                raise ValueError("model.rope_scaling of type dynamic needs model.pretrained_length, which it begins at")
            self.longest = model.pretrained_length
        parts = [f"theta {theta:g}"]
        if own["rope_type"] not in ("default", "dynamic"):
            parts.append(f"{own['rope_type']} x{own['factor']:g}")
        parts += [f"{stage.scaling} x{stage.factor:g}"] if stage.scaling != "none" else []
        self._text = ", then ".join(parts)

    def cos_sin(self, positions_T: torch.Tensor, dtype: torch.dtype, device: torch.device | str):
        """`(cos, sin)`, each `[T, D]` of `dtype` on `device`, for int64 positions (counted from the document's start).

        Angles are products in float32, bit for bit those of Hugging Face's models: a model then scores the same here
        and there at any position. Their rounding reaches 0.03 radians at a million tokens, in the fastest frequencies
        only. ValueError for positions from `longest` on (read on the host, if there is such a limit)."""
        if self.longest is not None and positions_T.numel() and int(positions_T.max()) >= self.longest:
            raise ValueError(
                f"a text of {int(positions_T.max()) + 1} tokens for a model whose dynamic RoPE scaling begins at "
                f"{self.longest}: beyond, {_DYNAMIC}"
            )
        self.inv_freq = self.inv_freq.to(device)
        angles = positions_T.to(device=device, dtype=torch.float32)[:, None] * self.inv_freq
        angles_TD = torch.cat((angles, angles), dim=-1)
        return tuple((f(angles_TD) * self.attention_factor).to(dtype) for f in (torch.cos, torch.sin))

    def __str__(self) -> str:
        """Base and scalings in the order applied, for the plan: `theta 500000, then llama3 x8, then linear x4`."""
        return self._text


def changes_rope(stage: RopeConfig) -> bool:
    """True if a stage has a RoPE of its own; it then replaces a model's dynamic scaling."""
    return stage.theta is not None or stage.scaling != "none"


def stage_scaling(stage: RopeConfig) -> dict:
    """A stage's scaling in Hugging Face's format; `default` for none, and for ntk, which is another base."""
    if stage.scaling in ("none", "ntk"):
        return {"rope_type": "default"}
    scaling = {"rope_type": stage.scaling, "factor": stage.factor}
    if stage.scaling != "linear":
        scaling["original_max_position_embeddings"] = stage.original_length
    return scaling | (LLAMA3_BAND if stage.scaling == "llama3" else {})


def _frequencies(theta: float, size: int) -> torch.Tensor:
    """float32 [size / 2], radians per token, without any scaling."""
    return 1.0 / theta ** (torch.arange(0, size, 2, dtype=torch.float32) / size)


def check_stages(config: RunConfig) -> None:
    """Raises ConfigError at the start for what Rope would refuse in any stage."""
    problems = []
    for name, stage in config.schedule.stages.items():
        try:
            longest = Rope(config.model, stage.rope).longest
        except ValueError as error:
            problems.append(f"schedule.stages.{name}: {error}")
            continue
        for key, length in ((f"schedule.stages.{name}.seq_len", stage.seq_len), ("eval.seq_len", config.eval.seq_len)):
            if longest is not None and (length or 0) > longest:
                problems.append(
                    f"{key}={length}: the model's dynamic RoPE scaling begins at {longest}: beyond, {_DYNAMIC}"
                )
    if problems:
        raise ConfigError(problems)


def check_rope_scaling(scaling: dict | None, rope_theta: float) -> dict:
    """A copy of a Hugging Face `rope_scaling` with `rope_type` filled in; ValueError for what would be wrong or
    ignored.

    Both spellings of the type (`rope_type`, `type`) are read. `rope_theta`, which newer files keep in the same
    dictionary, must agree with `model.rope_theta`; `partial_rotary_factor` must be 1.
    """
    scaling = {key: value for key, value in (scaling or {}).items() if value is not None}
    kind, old_kind = scaling.pop("rope_type", None), scaling.pop("type", None)
    kind = kind or old_kind or "default"
    if kind not in _KEYS:
        why = f" is refused: {_REFUSED[kind]}" if kind in _REFUSED else f" is unknown; choose one of {', '.join(_KEYS)}"
        raise ValueError(f"model.rope_scaling.rope_type={kind}{why}")
    theta = scaling.pop("rope_theta", rope_theta)
    if theta != rope_theta:
        raise ValueError(f"model.rope_scaling.rope_theta={theta} contradicts model.rope_theta={rope_theta}")
    partial = scaling.pop("partial_rotary_factor", 1.0)
    if partial != 1.0:
        raise ValueError(f"model.rope_scaling.partial_rotary_factor={partial}: only 1, rotating whole heads, works")
    required, optional = _KEYS[kind]
    missing = [key for key in required if key not in scaling]
    if missing:
        raise ValueError(f"model.rope_scaling of type {kind} lacks {', '.join(missing)}")
    if kind == "default":
        # Hugging Face keeps a factor or a length beside `default` at times, and reads neither.
        return {"rope_type": kind}
    unknown = sorted(set(scaling) - {*required, *optional})
    if unknown:
        known = ", ".join((*required, *optional))
        raise ValueError(f"model.rope_scaling of type {kind} has unknown keys {', '.join(unknown)}; it reads {known}")
    for key in required:
        if not scaling[key] > 0:
            raise ValueError(f"model.rope_scaling.{key}={scaling[key]}: must be positive")
    if kind == "llama3" and scaling["high_freq_factor"] <= scaling["low_freq_factor"]:
        raise ValueError("model.rope_scaling: high_freq_factor must be greater than low_freq_factor")
    return {"rope_type": kind, **scaling}


def _check_stage(stage: RopeConfig, own_kind: str, size: int) -> None:
    """ValueError if a stage's scaling is unknown, incomplete, without effect, or does not compose with the model's
    own."""
    if stage.scaling not in ROPE_SCALINGS:
        raise ValueError(f"rope.scaling={stage.scaling}: choose one of {', '.join(ROPE_SCALINGS)}")
    if stage.scaling == "none" and stage.factor != 1:
        raise ValueError(f"rope.factor={stage.factor:g} has no effect with rope.scaling=none: choose a scaling")
    if stage.factor < 1:
        raise ValueError(f"rope.factor={stage.factor:g}: an extension factor is at least 1")
    if stage.scaling in NEED_ORIGINAL_LENGTH and not stage.original_length:
        raise ValueError(
            f"rope.scaling={stage.scaling} needs rope.original_length, the length the model was trained at before"
        )
    if stage.scaling == "yarn" and own_kind == "yarn":
        raise ValueError("rope.scaling=yarn on a model that has yarn: raise model.rope_scaling.factor, or use linear")
    if stage.scaling == "ntk" and size < 4:
        raise ValueError(f"rope.scaling=ntk with model.head_dim={size}: one frequency cannot be both kept and slowed")


def _scale(inv_freq: torch.Tensor, theta: float, scaling: dict) -> tuple[torch.Tensor, float]:
    """`(inv_freq, attention_factor)` after one checked scaling in Hugging Face's format."""
    kind = scaling["rope_type"]
    if kind in ("default", "dynamic"):
        return inv_freq, 1.0
    if kind == "linear":
        return inv_freq / scaling["factor"], 1.0
    return {"llama3": _llama3, "yarn": _yarn}[kind](inv_freq, theta, scaling)


def _llama3(inv_freq: torch.Tensor, theta: float, scaling: dict) -> tuple[torch.Tensor, float]:
    """Llama 3.1: frequencies with wavelengths beyond the old context are divided by `factor`, high ones kept, those
    between blended linearly in the number of turns within the old context."""
    low, high = scaling["low_freq_factor"], scaling["high_freq_factor"]
    turns = scaling["original_max_position_embeddings"] / (2 * math.pi / inv_freq)
    kept = ((turns - low) / (high - low)).clamp(0, 1)
    return (1 - kept) * inv_freq / scaling["factor"] + kept * inv_freq, 1.0


def _yarn(inv_freq: torch.Tensor, theta: float, scaling: dict) -> tuple[torch.Tensor, float]:
    """YaRN (arXiv 2309.00071, sections 3.2 and 3.4): frequencies that turn often within the old context are kept,
    slow ones divided by `factor`, with a linear ramp over the frequency's index between; cos and sin grow by 0.1
    ln(factor) + 1."""
    factor, num_freqs = scaling["factor"], inv_freq.numel()

    def index_of(num_turns):
        length = scaling["original_max_position_embeddings"]
        return num_freqs * math.log(length / (num_turns * 2 * math.pi)) / math.log(theta)

    first, last = index_of(scaling.get("beta_fast") or 32), index_of(scaling.get("beta_slow") or 1)
    if scaling.get("truncate", True):
        first, last = math.floor(first), math.ceil(last)
    # The upper bound counts head dimensions, twice the frequencies, in Hugging Face's code; so it does here.
    first, last = max(first, 0), min(last, 2 * num_freqs - 1)
    width = last - first or 0.001
    slowed = ((torch.arange(num_freqs, dtype=torch.float32) - first) / width).clamp(0, 1)
    scaled = inv_freq / factor * slowed + inv_freq * (1 - slowed)

    if "attention_factor" in scaling:
        return scaled, float(scaling["attention_factor"])

    def growth(weight):
        return 0.1 * weight * math.log(factor) + 1.0 if factor > 1 else 1.0

    mscale, mscale_all = scaling.get("mscale"), scaling.get("mscale_all_dim")
    return scaled, growth(mscale) / growth(mscale_all) if mscale and mscale_all else growth(1.0)
