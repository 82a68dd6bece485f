"""What a run is: every key a user can set, with its type, default, meaning and unit.

These dataclasses type the YAML files beside them and the command line. `conf.validate.freeze` turns a composed
configuration into a RunConfig whose quantities ("32K", "1.5B", "90%") have become ints and whose nulls that mean "as
given elsewhere" are filled in; everything below `launch/` sees only that. Lengths, block sizes and batches read K as
1024; token budgets and cadences read K as 1000 (conf/numbers.py).
"""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from conf.formats import FORMATS, all_format_options
from conf.rates import all_rate_options
from moba.kinds import Moba, all_options

AUTO = "auto"
OFFLOAD = "offload"
OFFLOAD_HEADS = "offload_heads"
OFFLOADED = (OFFLOAD, OFFLOAD_HEADS)
"""As fits the machine: what train/plan/automatic.py or the kinds' backends choose."""

# Quantities are typed by hand in many ways (32768, "32K", 2.7e10, "27B"); `freeze` parses them by their metadata.
LENGTH = {"unit": "length"}  # binary K, becomes int
TOKENS = {"unit": "tokens"}  # decimal K, becomes int
SHARE = {"unit": "tokens or share"}  # "27B" or "90%": becomes int tokens
OFF = {"null": 0}  # of a cadence: null is as good as 0


@dataclass(frozen=True)
class ModelConfig:
    """The decoder. Llama-style; the options cover Llama-, Qwen- and SmolLM-shaped checkpoints."""

    name: str = "tiny"
    """Label, for plots and the plan."""
    hidden_size: int = 128
    """Width of the residual stream."""
    num_layers: int = 4
    """Decoder layers."""
    num_heads: int = 4
    """Query heads."""
    num_kv_heads: int | None = None
    """Key/value heads (GQA); null = num_heads."""
    head_dim: int | None = None
    """Size of one head; null = hidden_size / num_heads."""
    ffn_size: int = 384
    """Width of the SwiGLU hidden layer."""
    vocab_size: int | None = None
    """Rows of the embedding; null = the tokenizer's size rounded up to a multiple of 128 (train/model/sizes.py)."""
    tie_embeddings: bool = True
    """One matrix for the embedding and the output projection."""
    qkv_bias: bool = False
    """Biases on the q, k, v projections (Qwen2)."""
    qk_norm: bool = False
    """RMSNorm on each head's queries and keys before RoPE (Qwen3)."""
    norm_eps: float = 1e-5
    """Epsilon of every RMSNorm."""
    rope_theta: float = 10000.0
    """RoPE base; a stage may override it (schedule.stages.*.rope.theta)."""
    rope_scaling: dict[str, Any] | None = None
    """The model's own RoPE scaling in Hugging Face's `rope_scaling` format (llama3, linear, yarn, dynamic); null =
    none."""
    rope_pattern: str | None = None
    """One letter per layer, R (RoPE) or N (NoPE: no positional encoding), repeated if shorter than the model; null =
    RoPE everywhere."""
    key_conv: int = 0
    """Width in tokens (3 or 5) of a causal convolution over each channel of the keys; 0 = none (docs/design.md)."""
    key_conv_pattern: str | None = None
    """With key_conv: one letter per layer, K (convolution) or - (none), repeated if shorter than the model; null = in
    every layer."""
    pretrained_length: int | None = None
    """Longest context of the model that the weights come from; null = none. Handed on by launch/export.py; where a
    dynamic RoPE scaling begins."""
    init_std: float = 0.02
    """Standard deviation of the initial weights; output projections use init_std / sqrt(2 * num_layers)."""
    activation_checkpointing: Any = AUTO
    """What of a layer is computed again in the backward pass instead of being kept: nothing (false); `mlp`, the MLP and
    the norm before it, at the cost of two of a layer's seven products, so that attention is computed once; all (true);
    all with the layers' inputs in host memory and the MLP by tiles (`offload`); or that and attention by groups of
    heads, which is then computed three times (`offload_heads`, for the longest contexts). `auto`: the first of these
    that the plan estimates to fit the GPU; on a CPU nothing (train/plan/automatic.py)."""
    loss_tile: Any = field(default="2K", metadata=LENGTH)
    """Tokens whose logits exist at a time in the cross-entropy."""
    compile: Any = AUTO
    """torch.compile what stands before and after attention in each layer: true, false, or `auto`, which is true on GPUs
    but with ZeRO 3, run.deterministic or no triton (train/plan/automatic.py). Needs triton on a GPU, a C++ compiler on
    a CPU; not with ZeRO 3. The first steps, and the first of another length, take longer."""


@dataclass(frozen=True)
class SyntheticConfig:
    """A generated recall task (data/synthetic.py): token numbers with something to look up; only answers are learnt."""

    task: str = "mqar"
    """`mqar`, `passkey`, `multi_key`, `multi_query`, `straddle` or `copy`."""
    length: Any = field(default=None, metadata=LENGTH)
    """Inputs of a document, which is never cut: at most a stage's seq_len; null = schedule.seq_len."""
    pairs: int = 8
    """mqar, multi_query: pairs in a document, at most; as many questions."""
    min_pairs: int | None = None
    """mqar, multi_query: pairs at least (few are learnt first); null = pairs."""
    repeats: int = 1
    """mqar, multi_query: questions for each pair. Several make the task quicker to learn."""
    key_tokens: int | None = None
    """Tokens of a key, or of the start of a copy; null = the task's."""
    value_tokens: int | None = None
    """Tokens of a value, or of a copy; null = the task's."""
    block_size: Any = field(default=None, metadata=LENGTH)
    """straddle: the blocks whose boundary lies between key and value; null = schedule.block_size."""
    symbols: int = 256
    """Token numbers in use, from 0: half of them keys, a quarter values, a quarter filler. At most the tokenizer's."""
    num_documents: int = 1_000_000
    """Documents of an epoch."""
    seed: int = 0
    """Of the documents. Held-out ones are others than training's of the same seed."""


@dataclass(frozen=True)
class SourceConfig:
    """One collection of documents. Beside these keys stand the options of the formats (text: text_field; chat:
    messages_field, prompt_field, response_field; conf/formats.py)."""

    path: str | None = None
    """File, glob or directory: text, jsonl, parquet (also compressed), token shards of launch/prepare_data.py; or
    `embedded`, or `embedded-chat:<length>` with format=chat (data/chat_set.py)."""
    name: str | None = None
    """Hugging Face hub data set, instead of path."""
    synthetic: SyntheticConfig | None = None
    """Generated documents, instead of path (data=synthetic/mqar and others)."""
    subset: str | None = None
    """Configuration name of the hub data set."""
    split: str = "train"
    """Split of the hub data set."""
    streaming: bool = False
    """Read the hub data set as a stream, up to max_tokens, instead of downloading it whole (max_tokens: null then means
    the run's budget)."""
    format: str = "text"
    """`text`, or `chat`: conversations, of which the assistant's turns alone are learnt (data/sft.py); or another of
    conf/formats.py."""
    options: dict[str, Any] = field(default_factory=dict, metadata={"collects": all_format_options})
    """What is said of the formats' options, each written beside these keys; frozen, all of them."""
    id_field: str | None = "id"
    """Column that names a document; null or absent = its running number."""
    weight: float = 1.0
    """Share of training tokens drawn from this source (normalised over the sources)."""
    max_tokens: Any = field(default=None, metadata=TOKENS)
    """Stop reading after this many tokens; null = all of it."""
    exclude_ids: str | None = None
    """Text file with one document id per line to leave out (a held-out set)."""

    @property
    def is_chat(self) -> bool:
        """Its documents are conversations."""
        return FORMATS[self.format].is_chat

    @property
    def columns(self) -> dict[str, Any]:
        """Every option of its format, by name."""
        known = FORMATS[self.format].options
        given = {name: value for name, value in self.options.items() if name in known and value is not None}
        return {name: option.default for name, option in known.items()} | given


@dataclass(frozen=True)
class DataConfig:
    """Where tokens come from."""

    tokenizer: str = "bytes"
    """`bytes`, `bpe-4k` or `bpe-32k` (shipped), a tokenizer.json, or a Hugging Face tokenizer directory."""
    path: str | None = None
    """Short for data.sources.main.path, with data=files."""
    name: str | None = None
    """Short for data.sources.main.name, with data=hub."""
    chat_template: str | None = None
    """How conversations are written: `chatml`, `llama3`, `plain`, a jinja file, or null for the tokenizer's own."""
    sources: dict[str, SourceConfig] = field(default_factory=dict)
    """Named training sources."""
    validation: SourceConfig | None = None
    """Held-out documents for the per-position loss; null = no evaluation."""
    cache_dir: str = "~/.cache/moba-train"
    """Where tokenised copies of raw text are kept (token shards, keyed by content and tokenizer)."""
    interleave: int = 16
    """Documents longer than the context that are read side by side, so that a step's sequences come from different
    ones."""
    num_workers: int = 0
    """Processes for tokenising raw text; 0 = in this one."""
    seed: int | None = None
    """Seed of the document order; null = run.seed."""
    notice: str | None = None
    """A line of advice printed with the plan while a training source is one that ships with the project."""


@dataclass(frozen=True)
class AttentionConfig:
    """The attention of a stage, and of which layers. Beside these keys stand the options of the kinds of attention
    (block_size, num_blocks, top_k, gate, window: moba/kinds/)."""

    kind: str = Moba.name
    """`moba` or `full`, or another kind of moba/kinds/ that a stage can have."""
    full_last: int = 0
    """With kind=moba: the last n layers use full attention (layer-wise hybrid)."""
    pattern: str | None = None
    """Instead of full_last: one letter per layer, M (moba; only with kind=moba), F (full) or S (sliding window),
    repeated if shorter than the model. MMMF, SM; and with kind=full SF, its full twin."""
    plan: Any = None
    """Instead of all other keys here but backend: what each layer has, as a file of launch/tune_attention.py
    (moba/kinds/plan_file.py), or its entries themselves, one [kind, block_size, top_k, first_blocks] a layer. Frozen,
    the entries."""
    backend: str = "auto"
    """Kernels of the layers of this kind: `auto` (the fastest that can), `reference`, `torch`, `flash`, `triton` (MoBA
    alone) or `cudnn` (full attention alone). Other layers take it too where they have it, else `auto`."""
    options: dict[str, Any] = field(default_factory=dict, metadata={"collects": all_options})
    """What is said of the kinds' options, each written beside the keys above; frozen, all of them."""


@dataclass(frozen=True)
class RopeConfig:
    """What a stage changes about rotary position embedding, on top of the model's own."""

    theta: float | None = None
    """RoPE base; null = model.rope_theta. The model's own scaling is then computed from this base."""
    scaling: str = "none"
    """What is put on top of the model's own scaling: `none`, `linear` (position interpolation: positions divided by
    factor), `ntk` (the base times factor**(head_dim / (head_dim - 2))), `yarn` or `llama3` (with Llama 3.1's band:
    waves that turn once or less within original_length are slowed by factor, those of four turns or more kept)."""
    factor: float = 1.0
    """Extension factor of the scaling, counted from the model as it is: a later stage repeats or raises it."""
    original_length: Any = field(default=None, metadata=LENGTH)
    """yarn and llama3, which need it: the length the model was trained at before."""


@dataclass(frozen=True)
class StageLRConfig:
    """A stage's own learning rate, over the stage's tokens: it warms up again. What is null is as in optim.lr;
    once frozen nothing is, and it is an LRConfig."""

    kind: str | None = None
    """null = optim.lr.kind."""
    peak: float | None = None
    """null = optim.lr.peak."""
    min_ratio: float | None = None
    """null = optim.lr.min_ratio."""
    warmup_tokens: Any = field(default=None, metadata=SHARE)
    """Tokens of linear warm-up, or a share of the stage's ("5%"); null = as optim.lr.warmup_tokens is written."""
    options: dict[str, Any] = field(default_factory=dict, metadata={"collects": all_rate_options})
    """What is said of the kinds' options, each written beside the keys above; those left out are as in optim.lr.
    Frozen, all of them."""


@dataclass(frozen=True)
class LRConfig(StageLRConfig):
    """Learning rate as a function of tokens. Beside these keys stand the options of the kinds (wsd: decay_tokens;
    conf/rates.py)."""

    kind: str = "cosine"
    """`cosine`, `wsd` (constant, then linear decay over decay_tokens), `linear` or `constant`, or another of
    conf/rates.py, each after a linear warm-up."""
    peak: float = 3e-4
    """Highest learning rate."""
    min_ratio: float = 0.1
    """Final learning rate / peak."""
    warmup_tokens: Any = field(default="1%", metadata=SHARE)
    """Tokens of linear warm-up from 0 ("1%" of the tokens this schedule spans, or "20M")."""


@dataclass(frozen=True)
class LongDocumentsConfig:
    """How much of a stage's tokens comes from long documents, by drawing them more or less often."""

    share: float = 0.5
    """Share of the tokens of each source of the mix, 0 to 1, that comes from its documents of at least `length`; a
    source without any gives what it has."""
    length: Any = field(default=None, metadata=LENGTH)
    """Tokens from which on a document counts as long; null = the stage's seq_len."""


@dataclass(frozen=True)
class StageConfig:
    """One stretch of training with fixed attention, length, RoPE and data mix."""

    tokens: Any = field(default="100%", metadata=SHARE)
    """Budget: "27B" or a share of schedule.tokens such as "90%". Rounded up to whole steps."""
    seq_len: Any = field(default=None, metadata=LENGTH)
    """Context length; null = schedule.seq_len."""
    batch_tokens: Any = field(default=None, metadata=LENGTH)
    """Tokens an optimizer step over all ranks, binary K, a multiple of seq_len; null = schedule.batch_tokens."""
    attention: AttentionConfig = field(default_factory=AttentionConfig)
    """Attention of this stage."""
    rope: RopeConfig = field(default_factory=RopeConfig)
    """RoPE changes of this stage."""
    mix: dict[str, float] | None = None
    """Source name -> share of tokens (normalised; a source left out gets none); null = the sources' own weights."""
    long_documents: LongDocumentsConfig | None = None
    """A share of the tokens from long documents; null = as they come, documents of any length alike."""
    lr: StageLRConfig | None = None
    """A learning-rate schedule of this stage's own; null = the run's (optim.lr), which spans all stages without their
    own. `{}` is optim.lr again from its warm-up."""
    reset_optimizer: bool = False
    """Begin the stage with fresh AdamW moments and step count instead of those of the stage before."""

    @property
    def own_lr(self) -> LRConfig | None:
        """`lr`, once it is filled in."""
        assert self.lr is None or isinstance(self.lr, LRConfig)
        return self.lr


@dataclass(frozen=True)
class ScheduleConfig:
    """The staged schedule, in tokens."""

    tokens: Any = field(default=None, metadata=TOKENS)
    """Budget of the run, which shares of stages refer to; null = the sum of the stages. Once frozen it is that sum."""
    seq_len: Any = field(default="2K", metadata=LENGTH)
    """Context length of stages that set none."""
    batch_tokens: Any = field(default="16K", metadata=LENGTH)
    """Tokens an optimizer step over all ranks, of stages that set none."""
    micro_tokens: Any = field(default=None, metadata=LENGTH)
    """Tokens a rank processes at a time, a multiple of seq_len; null = one sequence. More ranks or a smaller value mean
    fewer or more gradient-accumulation steps, never another batch."""
    block_size: Any = field(default=512, metadata=LENGTH)
    """Tokens per block, of stages that set neither block_size nor num_blocks."""
    top_k: int = 3
    """Blocks a query attends to, its own included, of stages that set none."""
    window: Any = field(default=None, metadata=LENGTH)
    """Tokens that a query sees in sliding-window layers, its own included, of stages that have some and set none."""
    stages: dict[str, StageConfig] = field(default_factory=dict)
    """Named stages, in order."""


@dataclass(frozen=True)
class OptimConfig:
    """AdamW (torch; fused on GPU)."""

    lr: LRConfig = field(default_factory=LRConfig)
    """Learning rate."""
    betas: list[float] = field(default_factory=lambda: [0.9, 0.95])
    """AdamW betas."""
    eps: float = 1e-8
    """AdamW epsilon."""
    weight_decay: float = 0.1
    """Decoupled weight decay; matrices only, not norms, biases or embeddings' norms."""
    grad_clip: float = 1.0
    """Largest global gradient norm; 0 = no clipping."""
    max_bad_steps: int = 5
    """Abort after this many consecutive steps with a non-finite loss or gradient; each is skipped."""


@dataclass(frozen=True)
class DeepSpeedConfig:
    """The engine."""

    zero_stage: int = 1
    """ZeRO stage 0-3."""
    precision: str = "auto"
    """`bf16`, `fp32`, or `auto`: bf16 on GPU, fp32 on CPU."""
    offload_optimizer: bool = False
    """Keep optimizer state in host memory (ZeRO 1-3)."""
    offload_params: bool = False
    """Keep parameters in host memory (ZeRO 3)."""
    extra: dict[str, Any] = field(default_factory=dict)
    """Raw DeepSpeed configuration merged last (communication sizes and the like)."""


@dataclass(frozen=True)
class ParallelConfig:
    """How processes share the work. Those along the data axis have sequences of their own."""

    sequence: int = 1
    """Processes that share each sequence, by attention heads (at most model.num_heads): activations of a sequence are
    split among them. Must divide the number of processes; may change when a run is continued."""


@dataclass(frozen=True)
class LoggingConfig:
    """What is written while training."""

    every_tokens: Any = field(default="0", metadata=TOKENS | OFF)
    """A metrics line each so many tokens; 0 = every step."""
    wandb: str = "auto"
    """`auto` (online if logged in, else offline), `online`, `offline` or `disabled`. Never asks."""
    project: str = "moba-train"
    """wandb project."""
    entity: str | None = None
    """wandb entity."""
    group: str | None = None
    """wandb group, which runs of one kind share; null = the experiment's name."""
    tags: list[str] = field(default_factory=list)
    """wandb tags, besides those of the model, the sources and the longest context."""
    notes: str | None = None
    """wandb notes; null = the stages in words."""
    tensorboard: bool = False
    """Write the same series for TensorBoard (the extra `tensorboard`)."""
    samples: int = 0
    """Held-out documents that the model goes on with at each evaluation, for a table of texts; each costs an
    evaluation of its document and 64 decoding steps. Not at ZeRO 3 or with parallel.sequence."""
    progress: bool = True
    """Progress bar on a terminal."""
    figures: bool = True
    """Write figures into the run directory."""


@dataclass(frozen=True)
class EvalConfig:
    """Measuring on held-out documents during training."""

    suite: str = "mini"
    """What is measured: `loss` (by position), `mini` (also the router on the first document, and the right answers
    where the held-out documents are a recall task), or `swap` (also the loss under every gate of evals/swap.py, at five
    times the time)."""
    every_tokens: Any = field(default="20%", metadata=SHARE | OFF)
    """Evaluate each so many tokens ("20%" of the run) and at each stage's end; 0 = only at stage ends."""
    documents: int = 16
    """Held-out documents of full length to use at most."""
    seq_len: Any = field(default=None, metadata=LENGTH)
    """Length of the evaluation; null = the stage's."""


@dataclass(frozen=True)
class CheckpointConfig:
    """When the run is saved."""

    every_tokens: Any = field(default="10%", metadata=SHARE | OFF)
    """Save each so many tokens, and at each stage's end, and on SIGTERM or Ctrl-C; 0 = only those."""
    keep: int = 2
    """Newest checkpoints kept, besides the ends of stages."""
    keep_stage_ends: bool = True
    """Keep the checkpoint at each stage's end."""
    asynchronous: bool = True
    """Train on while a checkpoint is written: a copy of it, shared by the processes, is in host memory meanwhile. When
    the run is stopped, and with `false`, training waits, and only a shard at a time is copied."""


@dataclass(frozen=True)
class InitConfig:
    """Where the weights start."""

    source: str | None = None
    """Run directory, checkpoint directory, Hugging Face directory or hub id; null = random weights."""
    optimizer: bool = False
    """Also take the optimizer's moments (same shapes; runs of this project only)."""
    data: bool = False
    """Also take the loader's position and the random state."""


@dataclass(frozen=True)
class RunSection:
    """The run itself."""

    name: str | None = None
    """Name in wandb and in plots; null = the experiment's name, or `run` without one."""
    dir: str | None = None
    """Run directory; null = runs/<name> under the current directory. The same command again continues from its newest
    checkpoint."""
    seed: int = 0
    """Seed of the weights and of everything random."""
    device: str = "auto"
    """`auto`, `cuda` or `cpu`."""
    deterministic: bool = False
    """Bitwise repeatable kernels on GPU, at some cost (CPU runs always repeat)."""
    allow_changes: bool = False
    """Resume even though the configuration would change the trajectory."""
    on_spike: str = "off"
    """What is done about a step whose loss or gradient norm is a spike, in which nothing is updated: `skip` (go on),
    `rollback` (go on from the newest checkpoint with the data behind the spike; skip before the first one), `stop` (end
    the run); `off`: nothing is looked for."""
    spike_deviations: float = 6.0
    """Standard deviations above the mean of the last good steps from which on a step is a spike."""
    spike_window: int = 128
    """Good steps that the mean and the deviation are taken of, within a stage; half as many are needed."""
    notice: str | None = None
    """A line of advice printed with the plan."""

    @property
    def folder(self) -> Path:
        """`dir`, once it is filled in."""
        assert self.dir is not None
        return Path(self.dir)


@dataclass(frozen=True)
class RunConfig:
    """A complete run."""

    run: RunSection = field(default_factory=RunSection)
    model: ModelConfig = field(default_factory=ModelConfig)
    data: DataConfig = field(default_factory=DataConfig)
    schedule: ScheduleConfig = field(default_factory=ScheduleConfig)
    optim: OptimConfig = field(default_factory=OptimConfig)
    deepspeed: DeepSpeedConfig = field(default_factory=DeepSpeedConfig)
    parallel: ParallelConfig = field(default_factory=ParallelConfig)
    logging: LoggingConfig = field(default_factory=LoggingConfig)
    eval: EvalConfig = field(default_factory=EvalConfig)
    checkpoint: CheckpointConfig = field(default_factory=CheckpointConfig)
    init: InitConfig = field(default_factory=InitConfig)
