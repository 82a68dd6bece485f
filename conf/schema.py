"""The configuration of a run: every key a user can set, with its type, default, meaning and unit.

These dataclasses type the YAML files beside them and the command line. `conf.validate.freeze` turns a composed
configuration into a RunConfig, in which quantities ("32K", "1.5B", "90%") are ints and nulls that stand for another
key's value are filled in; everything below `launch/` sees only that. Lengths, block sizes and batches read K as 1024;
token budgets and cadences read K as 1000 (conf/numbers.py).
"""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from conf.formats import FORMATS, all_format_options
from conf.rates import all_rate_options
from moba.kinds import Moba, all_options

AUTO = "auto"
"""Chosen for the machine by train/plan/automatic.py, or by the kinds' backends."""
OFFLOAD = "offload"
OFFLOAD_HEADS = "offload_heads"
OFFLOADED = (OFFLOAD, OFFLOAD_HEADS)

# Users may write quantities as 32768, "32K", 2.7e10 or "27B"; `freeze` parses them according to this metadata.
LENGTH = {"unit": "length"}  # binary K, becomes int
TOKENS = {"unit": "tokens"}  # decimal K, becomes int
SHARE = {"unit": "tokens or share"}  # "27B" or "90%": becomes int tokens
OFF = {"null": 0}  # null means 0


@dataclass(frozen=True)
class ModelConfig:
    """The decoder. Llama-style; the options cover Llama-, Qwen- and SmolLM-shaped checkpoints."""

    name: str = "tiny"
    """Name shown in figures and in the plan."""
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
    """Longest context of the pretrained model that the weights come from; null = not pretrained. Written by
    launch/export.py; the length beyond which a dynamic RoPE scaling takes effect."""
    init_std: float = 0.02
    """Standard deviation of the initial weights; output projections use init_std / sqrt(2 * num_layers)."""
    activation_checkpointing: Any = AUTO
    """Which activations are recomputed in the backward pass instead of being stored: `false`, none; `mlp`, those of the
    MLP and the norm before it (two of a layer's seven matrix products); `true`, those of whole layers; `offload`, like
    true, with the layers' inputs in host memory and the MLP computed by tiles; `offload_heads`, like offload, with
    attention by groups of heads, computed three times (for the longest contexts). `auto`: the first of these that the
    plan estimates to fit the GPU; `false` on a CPU (train/plan/automatic.py)."""
    loss_tile: Any = field(default="2K", metadata=LENGTH)
    """Tokens per tile of the cross-entropy: logits exist for one tile at a time."""
    compile: Any = AUTO
    """Use torch.compile for the parts of each layer before and after attention: true, false, or `auto`: true on GPUs,
    unless ZeRO 3 or run.deterministic is set or triton is missing (train/plan/automatic.py). Needs triton on a GPU, a
    C++ compiler on a CPU. With ZeRO 3 a layer's weights are then gathered together. The first steps, and the first with
    another length, take longer."""


@dataclass(frozen=True)
class SyntheticConfig:
    """A generated recall task (data/synthetic.py): token ids with something to look up; only answers are supervised."""

    task: str = "mqar"
    """`mqar`, `passkey`, `multi_key`, `multi_query`, `straddle` or `copy`."""
    length: Any = field(default=None, metadata=LENGTH)
    """Tokens of a document, which is never cut: at most a stage's seq_len; null = schedule.seq_len."""
    pairs: int = 8
    """mqar, multi_query: largest number of key-value pairs, and of questions, in a document."""
    min_pairs: int | None = None
    """mqar, multi_query: smallest number of pairs (documents with few are easier to learn); null = pairs."""
    repeats: int = 1
    """mqar, multi_query: questions per pair. With several the task is learned faster."""
    key_tokens: int | None = None
    """Tokens of a key, or of the start of a copy; null = the default of the task."""
    value_tokens: int | None = None
    """Tokens of a value, or of a copy; null = the default of the task."""
    block_size: Any = field(default=None, metadata=LENGTH)
    """straddle: block size; a block boundary lies between key and value. null = schedule.block_size."""
    symbols: int = 256
    """Number of token ids in use, from 0: half of them keys, a quarter values, a quarter filler. At most the vocabulary
    size of the tokenizer."""
    num_documents: int = 1_000_000
    """Documents per epoch."""
    seed: int = 0
    """Seed of the documents. Held-out documents differ from training documents of the same seed."""


@dataclass(frozen=True)
class SourceConfig:
    """One collection of documents. The options of its format are keys of this section too (text: text_field; chat:
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
    """Stream the hub data set, up to max_tokens, instead of downloading all of it (max_tokens: null then means the
    token budget of the run)."""
    format: str = "text"
    """`text`; `chat`: conversations, of which only the assistant's turns are supervised (data/sft.py); or another
    format of conf/formats.py."""
    options: dict[str, Any] = field(default_factory=dict, metadata={"collects": all_format_options})
    """Not written by users: collects the options of the format that are set in this section; once frozen, all of
    them."""
    id_field: str | None = "id"
    """Column with the id of a document; null or absent = the document's number."""
    weight: float = 1.0
    """Share of the training tokens that come from this source (normalised over the sources)."""
    max_tokens: Any = field(default=None, metadata=TOKENS)
    """Stop reading after this many tokens; null = all of it."""
    exclude_ids: str | None = None
    """Text file with the ids of documents to leave out, one per line (a held-out set)."""

    @property
    def is_chat(self) -> bool:
        """Whether the documents are conversations."""
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
    """Held-out documents for the loss by context position; null = no evaluation."""
    cache_dir: str = "~/.cache/moba-train"
    """Where tokenised copies of raw text are kept (token shards, keyed by content and tokenizer)."""
    interleave: int = 16
    """Number of documents longer than the context that are read side by side, so that the sequences of a step come from
    different documents."""
    num_workers: int = 0
    """Worker processes for tokenising raw text; 0 = the main process does it."""
    seed: int | None = None
    """Seed of the document order; null = run.seed."""
    notice: str | None = None
    """Advice printed with the plan if a training source ships with the project."""


@dataclass(frozen=True)
class AttentionConfig:
    """The attention of a stage, by layer. The options of the kinds of attention (block_size, num_blocks, top_k, gate,
    first_blocks, window: moba/kinds/) are keys of this section too."""

    kind: str = Moba.name
    """`moba`, `full`, or another kind of attention of moba/kinds/."""
    full_last: int = 0
    """With kind=moba: the last n layers use full attention (layer-wise hybrid)."""
    pattern: str | None = None
    """Instead of full_last: one letter per layer, M (moba; only with kind=moba), F (full) or S (sliding window),
    repeated if shorter than the model, such as MMMF or SM, or with kind=full SF."""
    plan: Any = None
    """Instead of all other keys of this section except backend: the attention of each layer, as a file written by
    launch/tune_attention.py (moba/kinds/plan_file.py) or as a list of entries, one [kind, block_size, top_k,
    first_blocks] per layer. Once frozen, the entries."""
    backend: str = "auto"
    """Kernels of the layers of this kind: `auto` (the fastest that supports the shapes and the device), `reference`,
    `torch`, `flash`, `triton` (MoBA only) or `cudnn` (full attention only). Layers of another kind use it too if they
    have it, else `auto`."""
    options: dict[str, Any] = field(default_factory=dict, metadata={"collects": all_options})
    """Not written by users: collects the options of the kinds that are set in this section; once frozen, all of
    them."""


@dataclass(frozen=True)
class RopeConfig:
    """The rotary position embedding of a stage, on top of that of the model."""

    theta: float | None = None
    """RoPE base; null = model.rope_theta. The model's own scaling is then computed from this base."""
    scaling: str = "none"
    """Scaling applied after the model's own: `none`, `linear` (position interpolation: positions divided by
    factor), `ntk` (the base times factor**(head_dim / (head_dim - 2))), `yarn` or `llama3` (as in Llama 3.1:
    frequencies with at most one turn within original_length are divided by factor, those with four turns or more are
    kept)."""
    factor: float = 1.0
    """Extension factor of the scaling, relative to the model's own RoPE, not to the previous stage: a later stage
    repeats or raises it."""
    original_length: Any = field(default=None, metadata=LENGTH)
    """Required by yarn and llama3: the context length the model was trained at before."""


@dataclass(frozen=True)
class StageLRConfig:
    """A learning-rate schedule over the tokens of one stage, with its own warm-up. null keys are taken from optim.lr;
    once frozen, all are filled in and this is an LRConfig."""

    kind: str | None = None
    """null = optim.lr.kind."""
    peak: float | None = None
    """null = optim.lr.peak."""
    min_ratio: float | None = None
    """null = optim.lr.min_ratio."""
    warmup_tokens: Any = field(default=None, metadata=SHARE)
    """Tokens of linear warm-up, or a share of the stage's tokens ("5%"); null = optim.lr.warmup_tokens as written there
    (a share then is a share of the stage)."""
    options: dict[str, Any] = field(default_factory=dict, metadata={"collects": all_rate_options})
    """Not written by users: collects the options of the kind that are set in this section; those left out are taken
    from optim.lr. Once frozen, all of them."""


@dataclass(frozen=True)
class LRConfig(StageLRConfig):
    """Learning rate as a function of tokens. The options of its kind are keys of this section too (wsd: decay_tokens;
    conf/rates.py)."""

    kind: str = "cosine"
    """`cosine`, `wsd` (constant, then linear decay over decay_tokens), `linear`, `constant`, or another kind of
    conf/rates.py, each after a linear warm-up."""
    peak: float = 3e-4
    """Highest learning rate."""
    min_ratio: float = 0.1
    """Final learning rate / peak."""
    warmup_tokens: Any = field(default="1%", metadata=SHARE)
    """Tokens of linear warm-up from 0: a number ("20M"), or a share of the tokens that this schedule spans ("1%")."""


@dataclass(frozen=True)
class LongDocumentsConfig:
    """The share of a stage's tokens that comes from long documents, which are drawn more or less often to reach it."""

    share: float = 0.5
    """Share, from 0 to 1, of the tokens of each source of the mix that comes from documents of at least `length`; a
    source without any uses the documents it has."""
    length: Any = field(default=None, metadata=LENGTH)
    """Smallest number of tokens of a long document; null = the stage's seq_len."""


@dataclass(frozen=True)
class StageConfig:
    """One stretch of training with fixed attention, length, RoPE and data mix."""

    tokens: Any = field(default="100%", metadata=SHARE)
    """Budget: "27B" or a share of schedule.tokens such as "90%". Rounded up to whole steps."""
    seq_len: Any = field(default=None, metadata=LENGTH)
    """Context length; null = schedule.seq_len."""
    batch_tokens: Any = field(default=None, metadata=LENGTH)
    """Tokens per optimizer step over all ranks (global batch), binary K, a multiple of seq_len; null =
    schedule.batch_tokens."""
    micro_tokens: Any = field(default=None, metadata=LENGTH)
    """Tokens a rank processes at a time; null = schedule.micro_tokens."""
    attention: AttentionConfig = field(default_factory=AttentionConfig)
    """Attention of this stage."""
    rope: RopeConfig = field(default_factory=RopeConfig)
    """RoPE changes of this stage."""
    mix: dict[str, float] | None = None
    """Source name -> share of tokens (normalised; a source left out gets none); null = the sources' own weights."""
    long_documents: LongDocumentsConfig | None = None
    """A share of the tokens from long documents; null = documents are drawn regardless of length."""
    lr: StageLRConfig | None = None
    """A separate learning-rate schedule for this stage; null = optim.lr, which spans all stages that do not set `lr`.
    `{}` restarts optim.lr from its warm-up for this stage."""
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
    """Token budget of the run, which the shares of stages refer to; null = the sum of the stages. Once frozen, that
    sum."""
    seq_len: Any = field(default="2K", metadata=LENGTH)
    """Context length of stages that do not set one."""
    batch_tokens: Any = field(default="16K", metadata=LENGTH)
    """Tokens per optimizer step over all ranks, of stages that do not set it."""
    micro_tokens: Any = field(default=None, metadata=LENGTH)
    """Micro-batch: tokens a rank processes at a time, a multiple of seq_len. It changes the number of
    gradient-accumulation steps, not the global batch. null = one sequence on a CPU; on GPUs as many sequences as divide
    the batch and fit, up to 64K tokens: short sequences one at a time leave a GPU waiting for its host."""
    block_size: Any = field(default=512, metadata=LENGTH)
    """Tokens per MoBA block, of stages that set neither block_size nor num_blocks."""
    top_k: int = 3
    """Blocks a query attends to, including its own, of stages that do not set it."""
    window: Any = field(default=None, metadata=LENGTH)
    """Tokens a query attends to in sliding-window layers, including itself, of stages that do not set it."""
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
    """DeepSpeed."""

    zero_stage: int = 1
    """ZeRO stage 0-3."""
    precision: str = "auto"
    """`bf16`, `fp32`, or `auto`: bf16 on GPU, fp32 on CPU."""
    offload_optimizer: bool = False
    """Keep optimizer state in host memory (ZeRO 1-3)."""
    offload_params: bool = False
    """Keep parameters in host memory (ZeRO 3)."""
    extra: dict[str, Any] = field(default_factory=dict)
    """Raw DeepSpeed configuration, merged last (for example bucket sizes)."""


@dataclass(frozen=True)
class ParallelConfig:
    """How processes share the work: groups of `sequence` processes share sequences; different groups train on different
    sequences."""

    sequence: int = 1
    """Processes that share each sequence: its activations are split among them. Must divide the number of processes;
    may change when a run is continued."""
    sequence_by: str = "auto"
    """What they exchange for attention. `heads`: each attends with its share of the heads to all tokens (at most
    model.num_heads processes). `blocks`: each attends from its own tokens, with all heads, to the keys and values of
    all, which it holds for the time of a layer. `auto`: heads, but blocks beyond the number of heads, or where
    key/value heads would be repeated and blocks send less. May change when a run is continued."""


@dataclass(frozen=True)
class LoggingConfig:
    """What is written while training."""

    every_tokens: Any = field(default="0", metadata=TOKENS | OFF)
    """Write a line of metrics every so many tokens; 0 = every step."""
    wandb: str = "auto"
    """`auto` (online if logged in, else offline), `online`, `offline` or `disabled`. Never prompts for a login."""
    project: str = "moba-train"
    """wandb project."""
    entity: str | None = None
    """wandb entity."""
    group: str | None = None
    """wandb group; null = the experiment's name."""
    tags: list[str] = field(default_factory=list)
    """wandb tags, in addition to the model, the sources and the longest context."""
    notes: str | None = None
    """wandb notes; null = a description of the stages."""
    tensorboard: bool = False
    """Also write the series for TensorBoard (needs the extra `tensorboard`)."""
    samples: int = 0
    """Number of held-out documents that the model continues at each evaluation, shown as a table; each costs the
    evaluation of one document and 64 decoding steps. Not with ZeRO 3 or parallel.sequence."""
    progress: bool = True
    """Show a progress bar on a terminal."""
    figures: bool = True
    """Write figures into the run directory."""


@dataclass(frozen=True)
class EvalConfig:
    """Evaluation on held-out documents during training."""

    suite: str = "mini"
    """What is measured: `loss` (by context position); `mini` (also the router's statistics on the first document, and
    the share of right answers if the held-out documents are a recall task); `swap` (also the loss under every gate of
    evals/swap.py, which takes five times as long)."""
    every_tokens: Any = field(default="20%", metadata=SHARE | OFF)
    """Evaluate every so many tokens ("20%" of the run) and at the end of each stage; 0 = only at the end of each
    stage."""
    documents: int = 16
    """Largest number of held-out documents, all of full length."""
    seq_len: Any = field(default=None, metadata=LENGTH)
    """Context length of the evaluation; null = that of the stage."""


@dataclass(frozen=True)
class CheckpointConfig:
    """When the run is saved."""

    every_tokens: Any = field(default="10%", metadata=SHARE | OFF)
    """Save every so many tokens, at the end of each stage, and on SIGTERM, SIGUSR1 or Ctrl-C; 0 = none at token
    counts."""
    keep: int = 2
    """Number of newest checkpoints to keep, in addition to those at the end of a stage."""
    keep_stage_ends: bool = True
    """Keep the checkpoint at the end of each stage."""
    asynchronous: bool = True
    """Write checkpoints in the background while training continues, from a copy in host memory (divided among the
    processes; pinned on GPUs, and held throughout the run). With `false`, and when the run is stopped, training waits,
    and one shard at a time is copied."""


@dataclass(frozen=True)
class InitConfig:
    """What the weights start from."""

    source: str | None = None
    """Run directory, checkpoint directory, Hugging Face directory or hub id; null = random weights."""
    optimizer: bool = False
    """Also load the optimizer's moments (same shapes; runs of this project only)."""
    data: bool = False
    """Also load the position in the data and the random state."""


@dataclass(frozen=True)
class RunSection:
    """The run itself."""

    name: str | None = None
    """Name in wandb and in plots; null = the experiment's name, or `run` without one."""
    dir: str | None = None
    """Run directory; null = runs/<name> under the current directory. The same command again resumes from its newest
    checkpoint."""
    seed: int = 0
    """Random seed, of the weights and everything else."""
    device: str = "auto"
    """`auto`, `cuda` or `cpu`."""
    deterministic: bool = False
    """Use bitwise reproducible kernels on GPUs, which are slower (CPU runs are always reproducible)."""
    allow_changes: bool = False
    """Resume even if the configuration has changed in a way that changes the losses."""
    on_spike: str = "off"
    """What to do about a step whose loss or gradient norm is a spike; its update is never applied: `skip` (continue),
    `rollback` (continue from the newest checkpoint with the data after the spike; skip if there is no checkpoint yet),
    `stop` (end the run); `off`: do not look for spikes."""
    spike_deviations: float = 6.0
    """A step is a spike if it is more than this many standard deviations above the mean of the last good steps."""
    spike_window: int = 128
    """Number of good steps, within a stage, from which the mean and the deviation are computed; at least half as many
    are needed."""
    notice: str | None = None
    """Advice printed with the plan."""

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
