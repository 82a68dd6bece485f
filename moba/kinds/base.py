"""What every kind of attention has to say of itself. Pure data, no tensors: torch is imported where a kind runs.

A kind is a frozen dataclass in a file of its own: its sizes and their checks, its text, the pairs it attends, where it
is dense, what takes its place in a dense evaluation, its backends, and what configurations may say of it. Nothing
outside this package asks which kind it has before it.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, fields, replace
from typing import TYPE_CHECKING, Any, ClassVar, NamedTuple

if TYPE_CHECKING:
    from torch import Tensor

    from moba.documents import Documents
    from moba.kv_cache import SequenceCache

BACKENDS = ("auto", "reference", "torch", "flash", "triton", "cudnn")
AUTO = "auto"


class QueryShape(NamedTuple):
    """What a backend has to know of the tensors before it runs, without having them."""

    device: str
    """Type of the device: "cpu", "cuda"."""
    dtype: str
    """Such as "bfloat16"."""
    num_tokens: int
    num_heads: int
    num_kv_heads: int
    head_dim: int
    softmax_scale: float | None = None
    longest: int | None = None
    """Tokens of the longest document of packs that are planned; None: as many as the pack."""
    deterministic: bool = False
    """Gradients have to repeat bit for bit."""
    has_slices: bool = False
    """Packs that are planned have slices of documents, whose queries are not all of the keys."""
    has_cudnn: bool = True
    """On CUDA: torch comes with cuDNN, and the GPU's compute capability is 8.0 or newer."""


class Backend(NamedTuple):
    """One way to compute a kind."""

    name: str
    refuses: Callable[[Any, QueryShape, Documents | None], str | None]
    """refuses(kind, q, documents): why it cannot do that, or None. `documents` is None where packs of whole documents
    are planned that do not exist yet."""
    device: str | None = None
    """The only type of device it is for; None: any."""
    pays: Callable[[QueryShape, Documents | None], bool] | None = None
    """pays(q, documents): whether `auto` considers it; None: always."""


class Option(NamedTuple):
    """A setting of a kind in the configuration (schedule.stages.*.attention.<name>)."""

    type: type
    """int, float or str; lengths and shares are typed by hand in many ways and become ints."""
    help: str
    default: Any = None
    is_length: bool = False
    is_share: bool = False
    """Tokens, or a share of those that a learning rate spans ("10%"; conf/rates.py)."""


class Routing(NamedTuple):
    """How a kind picks blocks, for those that measure it."""

    block_size: int
    top_k: int
    gate: str
    first_blocks: int = 0
    """Blocks at the start of a document that are always picked."""


class BadOption(NamedTuple):
    """What is wrong with an option: `hint` says what would work, with `{key}.` before the names of other options."""

    name: str
    value: Any
    hint: str


@dataclass(frozen=True)
class AttentionSpec(ABC):
    """The attention of one layer; the attention plan of a model has one per layer."""

    name: ClassVar[str]
    """What plans, configurations and config.json call it."""
    letter: ClassVar[str]
    """Its letter in layer patterns."""
    in_patterns: ClassVar[str]
    """What the letter stands for, in messages."""
    is_stage_kind: ClassVar[bool] = True
    """Whether a stage can be of this kind (attention.kind); if not, layers have it by their letter alone."""
    replaces_full: ClassVar[bool] = True
    """It stands in for full attention: a dense evaluation, and dense decoding, use full attention in its place. False
    for what belongs to the model, and for full attention itself."""
    backends: ClassVar[tuple[Backend, ...]]
    """The fastest first."""
    options: ClassVar[Mapping[str, Option]] = {}
    covers: ClassVar[str] = ""
    """The plan's warning where the kind hides nothing at a {length}; empty for full attention."""

    backend: str = field(default=AUTO, kw_only=True)

    def __post_init__(self):
        if self.backend not in BACKENDS:
            raise ValueError(f"backend={self.backend!r}: choose one of {', '.join(BACKENDS)}")

    # -------------------- what it is

    @abstractmethod
    def is_dense_at(self, length: int) -> bool:
        """Returns True if every query of a document of `length` tokens attends to all earlier tokens."""

    @abstractmethod
    def attended_pairs(self, length: int) -> int:
        """Returns the exact number of (query, key) pairs that one head computes over a document of `length` tokens."""

    @property
    def routing(self) -> Routing | None:
        """How it picks blocks; None if it does not."""
        return None

    @property
    def partial_outputs(self) -> int:
        """Gathered copies of a query, and partial outputs, that exist at a time."""
        return 1

    def variants(self) -> dict[str, AttentionSpec]:
        """Name -> what can stand in its place under the same budget, for comparisons; empty if there is nothing to
        compare."""
        return {}

    def dense(self) -> AttentionSpec:
        """Full attention in the place of what approximates it; itself otherwise."""
        from moba.kinds.full import Full

        return Full() if self.replaces_full else self

    def at(self, length: int) -> AttentionSpec:
        """What computes the same over documents of at most `length` tokens, the fastest: full attention where that
        hides nothing and no backend was asked for."""
        from moba.kinds.full import Full

        return Full() if self.backend == AUTO and self.is_dense_at(length) else self

    # -------------------- running it

    @abstractmethod
    def run(
        self,
        backend: str,
        q: Tensor,
        k: Tensor,
        v: Tensor,
        documents: Documents,
        *,
        softmax_scale: float | None,
        deterministic: bool,
        return_lse: bool,
        selection: Tensor | None = None,
    ) -> tuple[Tensor, Tensor | None]:
        """(output [T, H, D], log-sum-exp [H, T]) by a backend that did not refuse; the second may be None unless
        `return_lse`. `selection`: of blocks, instead of routing; only kinds that pick blocks are given one."""

    def decode(self, q: Tensor, sequences: Sequence[SequenceCache], documents: Documents, dense: bool) -> Tensor:
        """The attention [N, H, D] of the newest token of N cached sequences, which `documents` says are the last of all
        that is cached; `dense`: of all it replaces."""
        from moba.attention import attend
        from moba.kinds.full import Full
        from moba.kv_cache import decode_dense, joined

        kind = (self.dense() if dense else self).at(documents.longest_k)
        out = decode_dense(q, sequences) if kind == Full() else None
        return attend(q, *joined(sequences), kind, documents)[0] if out is None else out

    # -------------------- in configurations and checkpoints

    @classmethod
    def check_options(cls, values: Mapping[str, Any], seq_len: int | None, used: bool) -> Iterator[BadOption]:
        """What is wrong with the options of this kind; `used`: some layer of the stage has it."""
        yield from ()

    @classmethod
    def check_backend(cls, values: Mapping[str, Any], backend: str) -> Iterator[BadOption]:
        """What is wrong with asking for a backend, if this is the stage's kind."""
        if backend != AUTO and backend not in (own := [one.name for one in cls.backends]):
            yield BadOption("backend", backend, f"kind={cls.name} takes {', '.join([AUTO, *own])}")

    @classmethod
    def fill_options(cls, values: Mapping[str, Any], defaults: Any, seq_len: int | None) -> dict[str, Any]:
        """The options that are open in `values`, as the schedule (`defaults`) or the length say."""
        return {
            name: getattr(defaults, name, None)
            for name, option in cls.options.items()
            if values.get(name) is None and option.default is None
        }

    @classmethod
    def from_options(cls, values: Mapping[str, Any], backend: str) -> AttentionSpec:
        """The kind of frozen options; another backend than its own becomes "auto"."""
        names = [f.name for f in fields(cls) if f.name in cls.options]
        return cls(**{name: values[name] for name in names if values.get(name) is not None}).on(backend)

    def on(self, backend: str) -> AttentionSpec:
        """The same on this backend where it is one of the kind's, else on "auto"."""
        return replace(self, backend=backend if backend in [one.name for one in self.backends] else AUTO)

    @property
    def export_problem(self) -> str | None:
        """What a Hugging Face checkpoint would have to say of it and cannot; None if it can."""
        return f"{self.name} attention"

    def entry(self) -> list[Any]:
        """[name, block_size, top_k], and what else the kind has: the layer's entry in a config.json's plan. ValueError
        if it has none."""
        raise ValueError(f"{self}: transformers has no such attention here; say full or moba")

    @classmethod
    def from_entry(cls, sizes: Sequence[Any]) -> AttentionSpec:
        """The kind of what follows the name in its entry. ValueError if it is not this kind's, or has none."""
        raise ValueError(f"there are no layers of {cls.name} attention here; say full or moba")

    def __str__(self) -> str:
        return self.name


def check_counts(kind: str, **values: Any) -> None:
    """Raises ValueError unless all are integers of at least 1."""
    for name, value in values.items():
        if not isinstance(value, int) or isinstance(value, bool) or value < 1:
            raise ValueError(f"{name}={value!r}: kind={kind!r} needs an integer of at least 1")


def causal_pairs(length: int) -> int:
    """Number of (query, key) pairs of full causal attention over a document, per head."""
    return length * (length + 1) // 2


def at_least_one(values: Mapping[str, Any], *names: str) -> Iterator[BadOption]:
    """A problem for each of these options that is given and less than 1."""
    for name in names:
        if values.get(name) is not None and values[name] < 1:
            yield BadOption(name, values[name], "must be at least 1")
