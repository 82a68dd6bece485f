"""The training studies, declared: what benchmarks/study.py trains and evaluates for each.

An arm is a run of launch/train.py for each seed, by the overrides of its study and its own, or the model that was
given, untrained (`train` None); then each line of `evals` is a call of launch/evaluate.py for its checkpoints. Names in
braces are the command's arguments.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field

QUIET = "logging.wandb=disabled logging.figures=false checkpoint.every_tokens=0"
GIVEN = (
    f"{QUIET} model=from_source init.source={{model}} data=files data.path={{data}} "
    "data.validation.path={validation} eval.documents={documents}"
)


@dataclass(frozen=True)
class Arm:
    """One of the things that are compared."""

    train: str | None = ""
    """Overrides besides the study's; None: the given model as it is."""
    start: str | None = None
    """The arm from whose run's weights, of the same seed, it starts."""
    branch: str | None = None
    """The arm whose run, of the same seed, it goes on with as if it were its own: from the end of that one's last
    stage, or, where that one has a `branch` too, of the stage before it."""
    evals: tuple[str, ...] | None = None
    """None: those of the study."""

    @property
    def base(self) -> str | None:
        """The arm that has to be trained before."""
        return self.start or self.branch


@dataclass(frozen=True)
class Study:
    """What is compared, and how it is drawn."""

    about: str
    """For the figure's title."""
    common: str
    """Overrides of all its runs."""
    arms: Mapping[str, Arm]
    panels: tuple[str, ...]
    """Functions of benchmarks/panels.py. None: numbers and figures are those of benchmarks/small_results.py."""
    evals: tuple[str, ...] = ()
    every_stage: bool = False
    """Evaluates the end of each stage, not only the last."""
    reference: str | None = None
    """The arm that others are held against, document by document, in its first evaluation."""
    switch: tuple[str, str] | None = None
    """(an arm, another that reads the same batches with the first one's first attention to the end): how their training
    losses differ right after the switch."""
    seeds: int = 1
    defaults: Mapping[str, str] = field(default_factory=dict)
    """Values of the command's arguments where it does not say."""

    def chain(self, name: str) -> list[str]:
        """The arm, behind all that have to be trained before."""
        base = self.arms[name].base
        return [*(self.chain(base) if base else []), name]


def at_stages(lengths: Mapping[str, str], **settings: list[object]) -> str:
    """Overrides of one stage per length (name -> its tokens), each setting having a value per stage."""
    found = []
    for i, (length, tokens) in enumerate(lengths.items()):
        key = f"schedule.stages.at_{length}"
        found += [f"+{key}.tokens={tokens}", f"{key}.seq_len={length}"]
        found += [f"{key}.{name.replace('__', '.')}={values[i]}" for name, values in settings.items() if values[i]]
    return " ".join(found)


# -------------------- a pretrained model, continued at twice its length


THETA = "schedule.stages.{}.rope.theta=400000"
AT_16K = (
    f"{GIVEN} schedule.tokens=3932160 schedule.seq_len=16K schedule.batch_tokens=64K schedule.block_size=512 "
    "schedule.top_k=3 optim.lr.peak=3e-4 optim.lr.warmup_tokens=10% eval.every_tokens=0 logging.every_tokens=65536"
)
RECIPES = {
    "moba": Arm(f"schedule=moba_only {THETA.format('sparse')}"),
    "moba, then full": Arm(f"schedule=moba_then_full {THETA.format('sparse')} {THETA.format('full')}"),
    "full": Arm(f"schedule=full_only {THETA.format('full')}"),
}
BOTH = ("position_loss attention=full", "position_loss attention=512x3")
CONTINUAL = (
    f"+exp=continual_smollm2 {GIVEN} schedule.batch_tokens=128K schedule.micro_tokens=64K optim.lr.peak=3e-4 "
    # The recipe always selects the first block; this study has the paper's gate.
    "model.compile=true eval.every_tokens=25% schedule.stages.sparse.attention.first_blocks=0"
)


# -------------------- a pretrained model, continued with sparse attention in place of full


DROP_IN = (
    f"{GIVEN} schedule.tokens=3932160 schedule.seq_len=8K schedule.batch_tokens=64K schedule.micro_tokens=16K "
    # Two stages in every arm: what full attention takes over is the end of the first, and the overrides of another
    # length (schedule.seq_len, schedule.stages.<stage>.rope) are the same for all.
    "schedule=custom +schedule.stages.first.tokens=90% +schedule.stages.last.tokens=10% schedule.block_size=128 "
    # Several runs share a GPU: what fits one alone, and what waits for a compiler, is not for them.
    "schedule.top_k=8 model.activation_checkpointing=false model.compile=false optim.lr.peak=1e-4 "
    "optim.lr.warmup_tokens=10% eval.suite=loss eval.every_tokens=0 logging.every_tokens=65536 logging.progress=false"
)


def in_stages(attention: str, *stages: str) -> str:
    """Overrides of these stages' attention."""
    return " ".join(f"schedule.stages.{at}.attention.{word}" for word in attention.split() for at in stages)


def drop_in(attention: str, evaluated: str) -> Arm:
    """An arm with one attention throughout, evaluated under full attention and these, with retrieval."""
    line = f"sweep attention=full attentions={evaluated} probes=[pass_key,key_value] data={{validation}}"
    return Arm(in_stages(attention, "first", "last"), evals=(line,))


def then_full(arm: str, attention: str, evaluated: str) -> Arm:
    """That arm until its last stage, which has full attention in its place: the loss under both."""
    train = f"{in_stages(attention, 'first')} {in_stages('kind=full', 'last')}"
    return Arm(train, branch=arm, evals=(f"sweep attention=full attentions={evaluated} data={{validation}}",))


# Name of an arm -> its attention, as training and as evaluations take it.
SPARSE = {
    "plan": ("plan={plan}", "{plan}"),
    "128x8, first block": ("first_blocks=1", "128x8+1"),
    "128x8": ("first_blocks=0", "128x8"),
}


# -------------------- gates of a pretrained model


AT_EQUAL_BUDGET = (
    # A query sees a quarter of the length at most.
    ("8K", "128x16"),
    ("8K", "64x32"),
    ("8K", "512x4"),
    ("4K", "128x8"),
    ("4K", "64x16"),
    # An eighth.
    ("8K", "128x8"),
    ("4K", "128x4"),
)
GATES = "[mean,variance,covariance,bounds,shared,local,random,oracle,sinks]"


def gated(length: str, size: str) -> Arm:
    """MoBA of this size at this length: as published, with other gates and the first block, and with a few first
    tokens."""
    block, top = size.split("x")
    sizes = f"block_sizes={block} top_k={top} gates={GATES} first_blocks=1 attentions={size}"
    probes = "captured=true probes=[pass_key,key_value] data={validation}"
    return Arm(None, evals=(f"sweep seq_len={length} {sizes} {probes}",))


# -------------------- recall, on a CPU


MQAR = (
    f"{QUIET} model=tiny model.num_layers=2 model.hidden_size=64 model.num_heads=1 model.num_kv_heads=1 "
    # With a key convolution a value's own key says whose it is; without, two layers have to find the look-up together.
    "model.head_dim=64 model.ffn_size=64 model.init_std=0.06 model.key_conv=3 model.rope_pattern=N data=synthetic/mqar "
    "'data.sources.mqar.synthetic={task: mqar, pairs: 8, min_pairs: 4, symbols: 128, repeats: 7}' "
    "'data.validation.synthetic={task: mqar, pairs: 8, min_pairs: 4, symbols: 128}' "
    # 400 steps, of which 90 % are whole too. 32 blocks, of which 4 are seen: with fewer, random ones do as well.
    "schedule.tokens=1638400 schedule.seq_len=256 schedule.batch_tokens=4K schedule.micro_tokens=4K "
    "schedule.block_size=8 schedule.top_k=4 optim.lr.peak=5e-3 optim.lr.warmup_tokens=2% optim.weight_decay=0.01 "
    "eval.documents=64 eval.every_tokens=5% logging.every_tokens=100K"
)
OF_SPARSE = "schedule=moba_only schedule.stages.sparse.attention"
# An eighth of the keys in blocks of several sizes: at the length of training, and where there is room for large blocks.
IN_256 = tuple(f"recall samples=128 attention={size}x{32 // size}" for size in (2, 4, 8, 16))
IN_2K = tuple(f"recall samples=48 attention={size}x{256 // size} seq_len=2K" for size in (8, 16, 32, 64, 128))


# -------------------- retrieval in a small model


RETRIEVAL = (
    f"{QUIET} data=files data.path={{data}} data.tokenizer=bpe-4k schedule.batch_tokens=32K optim.lr.warmup_tokens=5% "
    "eval.documents=16 eval.every_tokens=0 logging.every_tokens=1M"
)
# The key convolution: 48M tokens were too few without it.
MODEL_28M = (
    "model=tiny model.hidden_size=512 model.num_layers=8 model.num_heads=8 model.num_kv_heads=4 model.head_dim=64 "
    "model.ffn_size=1408 model.qk_norm=true model.rope_theta=200000 model.key_conv=3"
)
BLOCKS_8K = "schedule=moba_only schedule.block_size=128 schedule.top_k=8"
FROM_2K = "model=from_source schedule.seq_len=8K schedule.tokens=24M optim.lr.peak=1e-3"


# -------------------- longer contexts


EXTENSION_CPU = {"2K": "240K", "4K": "24K", "8K": "24K", "16K": "32K"}
EXTENSION_GPU = {"8K": "37.1M", "32K": "9.9M", "128K": "5M"}
# Two layers on bytes, the first sparse and the second full: so that 16K is affordable on a CPU.
SMALL = (
    f"{QUIET} model=tiny model.hidden_size=128 model.num_layers=2 model.num_heads=2 model.num_kv_heads=1 "
    "model.ffn_size=384 data=embedded data.tokenizer=bytes optim.lr.warmup_tokens=5% eval.every_tokens=0 "
    "eval.documents=2 run.device=cpu"
)


def extended(**ways: list[object]) -> Arm:
    """The small model over its lengths."""
    attention = {"attention__num_blocks": [32] * 4, "attention__top_k": [4] * 4, "attention__full_last": [1] * 4}
    rates = {"batch_tokens": [*EXTENSION_CPU], "lr__peak": ["3e-3", "1e-3", "1e-3", "1e-3"]}
    return Arm(at_stages(EXTENSION_CPU, **attention, **rates, **ways))


def over_lengths(**attention: list[object]) -> Arm:
    """The 125m model over its lengths."""
    rates = {"rope__theta": ["1e4", "1e5", "1e6"], "lr__peak": ["6e-4", "3e-4", "3e-4"]}
    return Arm(at_stages(EXTENSION_GPU, batch_tokens=["32K", "64K", "128K"], **rates, **attention))


# -------------------- the MoBA paper's pretraining figures in small


def sized(layers: int, heads: int, rate: str) -> str:
    """Overrides of a model of heads of 64, and of its learning rate."""
    width = f"model.hidden_size={64 * heads} model.ffn_size={64 * heads * 8 // 3 // 32 * 32}"
    return f"model.num_layers={layers} model.num_heads={heads} model.num_kv_heads={heads} {width} optim.lr.peak={rate}"


SIZES = {
    "": (sized(6, 6, "2e-3"), 1.0),
    ", 6.1M": (sized(5, 5, "2.4e-3"), 0.575),
    ", 16.9M": (sized(7, 7, "1.7e-3"), 1.59),
}
"""End of an arm's name -> (overrides of its model, its tokens relative to the others'): parameters without embeddings,
beside 10.6M, tokens in proportion."""


def from_nothing(size: str, attention: str | None = None) -> str:
    """Overrides of 2,000 steps at 1K under full attention, or, with those of the attention of both further stages, of
    900 steps at 8K after them; in the last tenth of these the learning rate falls."""
    model, share = SIZES[size]
    start, last = int(2000 * share) * 16 * 1024, int(90 * share) * 32 * 1024
    text = (
        f"{QUIET} model=tiny model.qk_norm=true model.rope_theta=200000 model.key_conv=3 "
        f"model.activation_checkpointing=false {model} data=files data.path={{data}} data.tokenizer=bpe-4k "
        "data.validation.path={validation} data.interleave=64 schedule=custom schedule.block_size=128 schedule.top_k=8 "
        "optim.lr.warmup_tokens=1M eval.documents={documents} eval.suite=loss logging.progress=false "
        f"logging.every_tokens=327680 +schedule.stages.short.tokens={start} schedule.stages.short.seq_len=1K "
        "schedule.stages.short.batch_tokens=16K schedule.stages.short.micro_tokens=16K "
        "schedule.stages.short.attention.kind=full"
    )
    if attention is None:
        return f"{text} optim.lr.kind=constant eval.every_tokens=0"
    return (
        f"{text} +schedule.stages.first.tokens={9 * last} +schedule.stages.last.tokens={last} schedule.seq_len=8K "
        "schedule.batch_tokens=32K schedule.micro_tokens=32K optim.lr.kind=wsd "
        f"optim.lr.decay_tokens={last} eval.every_tokens={2 * last} {in_stages(attention, 'first', 'last')}"
    )


def at_8k(attention: str, size: str = "", evals: tuple[str, ...] = ()) -> Arm:
    """An arm that goes on from the start at 8K."""
    return Arm(from_nothing(size, attention), branch=f"start{size}", evals=evals)


def blocks(block: int, top: int, first: int = 0) -> str:
    """The words of MoBA."""
    return f"block_size={block} top_k={top} first_blocks={first}"


def asked(block: int, top: int, first: int = 0) -> tuple[str, ...]:
    """The evaluations of a router."""
    sweep = f"sweep block_sizes={block} top_k={top} gates=[mean,local,random,oracle] first_blocks={first} documents=44"
    return CUTS[0], sweep, "routing documents=22"


CUTS = tuple(
    f"position_loss data={{cuts}}/{n} seq_len={n + 512} bucket=512 documents={{documents}}" for n in (1024, 2048, 4096)
)
"""The last 512 tokens of each held-out document with so many before them in place of all."""
SFT_8K = (
    f"{QUIET} model=from_source data=sft data.path=embedded-chat:8K data.tokenizer=bpe-4k data.chat_template=plain "
    "'data.validation={path: embedded-chat:8K, format: chat}' schedule=moba_only schedule.tokens=7864320 "
    "schedule.seq_len=8K schedule.batch_tokens=32K schedule.micro_tokens=32K schedule.block_size=128 schedule.top_k=8 "
    "optim.lr.peak=1e-3 optim.lr.warmup_tokens=10% eval.suite=loss eval.documents=128 eval.every_tokens=50% "
    "logging.progress=false logging.every_tokens=327680 schedule.stages.sparse.attention.first_blocks=1"
)
FROM_NOTHING = {
    **{f"start{size}": Arm(from_nothing(size), evals=()) for size in SIZES},
    **{f"full{size}": at_8k("kind=full", size) for size in SIZES},
    **{f"moba{size}": at_8k(blocks(128, 8), size) for size in SIZES},
    "full": at_8k("kind=full", evals=(*CUTS, asked(128, 8)[1])),
    "moba": at_8k(blocks(128, 8), evals=(*CUTS, *asked(128, 8)[1:])),
    "moba, then full": Arm(
        from_nothing("", blocks(128, 8)) + " schedule.stages.last.attention.kind=full", branch="moba", evals=CUTS[:1]
    ),
    "moba, first block": at_8k(blocks(128, 8, 1), evals=asked(128, 8, 1)),
    "random": at_8k("gate=random", evals=asked(128, 8)[:2]),
    "latest": at_8k("gate=local", evals=asked(128, 8)[:2]),
    "best": at_8k("gate=oracle", evals=asked(128, 8)[:2]),
    "64x32": at_8k(blocks(64, 32), evals=asked(64, 32)),
    "1024x2": at_8k(blocks(1024, 2), evals=asked(1024, 2)),
    **{
        f"sft, {n} full": Arm(f"{SFT_8K} schedule.stages.sparse.attention.full_last={n}", "moba, first block", evals=())
        for n in (0, 1, 2, 3, 4, 6)
    },
}


# -------------------- fine-tuning


LAYERS = (0, 1, 3, 5, 10, 20, 30)
SFT = (
    f"{QUIET} data=sft data.path=embedded-chat:16K data.chat_template=plain "
    "'data.validation={path: embedded-chat:16K, format: chat}' schedule=moba_only schedule.tokens=2M "
    "schedule.seq_len=16K schedule.batch_tokens=64K schedule.micro_tokens=16K schedule.block_size=512 "
    f"schedule.top_k=3 {THETA.format('sparse')} optim.lr.peak=2e-4 optim.lr.warmup_tokens=10% eval.documents=48 "
    "eval.every_tokens=0 model=from_source"
)
UNTRAINED = [f"position_loss attention={{}} seq_len={length} bucket=2K data={{validation}}" for length in ("8K", "16K")]

STUDIES: dict[str, Study] = {
    "recipes": Study(
        "MoBA, full attention, and MoBA with full attention for the last tenth, on the same tokens",
        AT_16K,
        RECIPES,
        panels=("difference",),
        evals=("position_loss",),
        reference="full",
        switch=("moba, then full", "moba"),
        seeds=3,
    ),
    "continual": Study(
        "A pretrained model continued at twice its length, with MoBA and then full attention, or full throughout",
        CONTINUAL,
        {
            # The larger RoPE base without any training: one step that moves nothing.
            "as it came": Arm(None, evals=tuple(f"{line} seq_len=16K data={{validation}}" for line in BOTH)),
            "larger RoPE base": Arm("schedule.tokens=128K optim.lr.peak=1e-30"),
            "moba": Arm("schedule.tokens=20M"),
            "full": Arm("schedule.tokens=20M schedule.stages.sparse.attention.kind=full"),
        },
        panels=("training", "difference"),
        evals=BOTH,
        every_stage=True,
        reference="full",
    ),
    "drop_in": Study(
        "A pretrained model continued with a plan, MoBA or full attention, and with full attention for the last tenth",
        DROP_IN,
        {
            "full": drop_in("kind=full", "{plan}"),
            **{name: drop_in(*attention) for name, attention in SPARSE.items()},
            **{f"{name}, then full": then_full(name, *attention) for name, attention in SPARSE.items()},
            "as it came": Arm(None, evals=drop_in("", "{plan},128x8+1,128x8").evals),
        },
        panels=("kept",),
        reference="full",
        seeds=3,
    ),
    "small": Study(
        "The MoBA paper's pretraining figures in small: from nothing, 8K, 64 blocks of 128",
        "",
        FROM_NOTHING,
        panels=(),
        seeds=2,
        defaults={"documents": "124", "cluster": "[^:]*"},
    ),
    "sft_layers": Study(
        "Fine-tuning with full attention in the last layers, 30 layers, 16K, MoBA 512x3",
        "",
        {"base": Arm(f"{AT_16K} {RECIPES['moba'].train}")}
        | {f"{n} full": Arm(f"{SFT} schedule.stages.sparse.attention.full_last={n}", "base") for n in LAYERS},
        panels=("layers",),
        seeds=3,
    ),
    "mqar": Study(
        "Multi-query recall in 256 tokens, 32 blocks of 8, of which a query sees 4",
        MQAR,
        {
            "full": Arm("schedule=full_only"),
            "moba": Arm("schedule=moba_only"),
            "moba, last layer full": Arm(f"{OF_SPARSE}.full_last=1"),
            "moba, then full": Arm("schedule=moba_then_full"),
            "random": Arm(f"{OF_SPARSE}.gate=random", evals=("recall samples=256",)),
            "local": Arm(f"{OF_SPARSE}.gate=local", evals=("recall samples=256",)),
        },
        panels=("training", "recall"),
        evals=("recall samples=256 attention=8x4",),
        seeds=3,
    ),
    "mqar_blocks": Study(
        "Multi-query recall by block size, a query attending to an eighth of the keys",
        MQAR,
        {
            "full": Arm("schedule=full_only", evals=(*IN_256, *IN_2K)),
            "moba 8x4": Arm("schedule=moba_only", evals=(*IN_256, *IN_2K)),
            "moba 4x8": Arm("schedule=moba_only schedule.block_size=4 schedule.top_k=8"),
            "moba 16x2": Arm("schedule=moba_only schedule.block_size=16 schedule.top_k=2"),
        },
        panels=("blocks",),
        evals=IN_256,
    ),
    "retrieval": Study(
        "A needle grid at 8K after training on retrieval, from the same start at 2K",
        RETRIEVAL,
        {
            "start": Arm(
                f"{MODEL_28M} schedule=full_only schedule.seq_len=2K schedule.tokens=48M optim.lr.peak=2e-3", evals=()
            ),
            "full": Arm(f"{FROM_2K} schedule=full_only", "start"),
            "moba": Arm(f"{FROM_2K} {BLOCKS_8K}", "start"),
            "moba, first block": Arm(f"{FROM_2K} {BLOCKS_8K} {OF_SPARSE.split()[1]}.first_blocks=1", "start"),
        },
        panels=("needle",),
        evals=("needle lengths=1K,2K,4K,8K forms=key_value arms=full attention=full beside=128x8,128x8+1",),
    ),
    "extension_cpu": Study(
        "A two-layer model on bytes from 2K to 16K on a CPU",
        SMALL,
        {
            "RoPE base raised": extended(rope__theta=[None, 40000, 160000, 640000]),
            "positions interpolated": extended(rope__scaling=[None, *["linear"] * 3], rope__factor=[None, 2, 4, 8]),
            "nothing done": extended(),
        },
        panels=("stages",),
        evals=("position_loss seq_len=16K",),
        every_stage=True,
    ),
    "extension": Study(
        "The 125m model from scratch through 8K, 32K and 128K",
        f"{QUIET} model=125m data=files data.path={{data}} data.tokenizer=bpe-32k data.validation.path={{validation}} "
        "eval.documents=8 eval.every_tokens=0 optim.lr.warmup_tokens=5% model.compile=true",
        {
            "MoBA, last 3 layers full": over_lengths(
                attention__block_size=[512, "2K", "2K"], attention__top_k=[3] * 3, attention__full_last=[3] * 3
            ),
            "full": over_lengths(attention__kind=["full"] * 3),
        },
        panels=("trailing", "speed"),
        evals=("position_loss",),
        every_stage=True,
        reference="full",
    ),
    "pretrained": Study(
        "MoBA switched on in a model that was not trained with it",
        "",
        {
            name: Arm(None, evals=tuple(line.replace("{}", name.split()[-1]) for line in UNTRAINED))
            for name in ("full", "MoBA 128x8", "MoBA 512x3")
        },
        panels=("difference",),
        reference="full",
    ),
    "gates": Study(
        "What picks the blocks of a model that was not trained with MoBA",
        "",
        {f"{length} {size}": gated(length, size) for length, size in AT_EQUAL_BUDGET},
        panels=("gates",),
        defaults={"validation": "embedded"},
    ),
}
