"""MoBA: every query sees its own block and the best of the complete blocks before it (MoBA paper, section 2.2)."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any, ClassVar

from moba.backends import refusals
from moba.kinds.base import AttentionSpec, Backend, BadOption, Option, Routing, at_least_one, causal_pairs, check_counts
from moba.kinds.full import Full

if TYPE_CHECKING:
    from torch import Tensor

    from moba.documents import Documents

MEAN = "mean"
GATES = (MEAN, "variance", "covariance", "bounds", "shared", "local", "random", "oracle")


@dataclass(frozen=True)
class Moba(AttentionSpec):
    """Attention to `top_k` blocks of `block_size` tokens, including the query's own block.

    `top_k=1` is block-local attention, and `block_size * top_k >= length` is full attention. `gate` selects the blocks:
    "mean" is MoBA; the others, most of them controls, are in moba/gates.py. The first `first_blocks` blocks of the
    query's document are always selected, and `top_k` includes them, like the query's own block. 0 is MoBA as in the
    paper; 1 keeps the attention sink of a pretrained model, which a gate by block means misses.
    """

    name = "moba"
    letter = "M"
    in_patterns = "moba"
    covers = "MoBA is dense at this length: block_size * top_k covers all of {length}"
    backends = (
        Backend("triton", refusals.triton, device="cuda"),
        Backend("flash", refusals.moba_flash, device="cuda"),
        Backend("torch", refusals.nothing),
        Backend("reference", refusals.reference, pays=refusals.never),
    )
    options = {
        "block_size": Option(
            int,
            "Tokens per block; null = seq_len / num_blocks, or schedule.block_size where num_blocks is null too.",
            is_length=True,
        ),
        "num_blocks": Option(int, "Blocks a full-length context is cut into, instead of block_size."),
        "top_k": Option(int, "Blocks a query attends to, including its own; null = schedule.top_k."),
        "gate": Option(
            str,
            "What picks the blocks of MoBA layers: `mean` (MoBA), another gate (moba/gates.py): `variance`, "
            "`covariance` (also how far keys lie from their block's mean), `bounds` (Quest's), `shared` (one selection "
            "for the heads of a group), or a control: `local` (the latest), `random`, `oracle` (those of largest "
            "attention; costs full attention). Only `mean` can be exported.",
            default=MEAN,
        ),
        "first_blocks": Option(
            int,
            "Blocks at the start of a document that all its queries attend to, counted in top_k (fewer than it); 0 = "
            "MoBA as published, 1 keeps the attention sink of pretrained models.",
            default=0,
        ),
    }
    VARIANTS: ClassVar[tuple[str, ...]] = (name, "oracle", "random", "local", Full.name)
    """What a comparison of gates puts in the place of MoBA layers."""

    block_size: int
    top_k: int
    gate: str = MEAN
    first_blocks: int = 0

    def __post_init__(self):
        super().__post_init__()
        if self.gate not in GATES:
            raise ValueError(f"gate={self.gate!r}: choose one of {', '.join(GATES)}")
        check_counts(self.name, block_size=self.block_size, top_k=self.top_k)
        check_first_blocks(self.first_blocks, self.top_k)

    def is_dense_at(self, length: int) -> bool:
        return self.block_size * self.top_k >= length

    def attended_pairs(self, length: int) -> int:
        """A query at position p sees min(p // B, top_k - 1) blocks of B keys, and the p % B + 1 keys of its own block
        up to itself: exact whatever the gate picks."""
        num_complete, tail = divmod(length, self.block_size)
        own = num_complete * causal_pairs(self.block_size) + causal_pairs(tail)
        # Queries of block i see min(i, top_k - 1) earlier blocks: a triangle while history is short, then a band.
        growing = min(num_complete, self.top_k)
        history_blocks = growing * (growing - 1) // 2 + (num_complete - growing) * (self.top_k - 1)
        history = history_blocks * self.block_size**2 + tail * min(num_complete, self.top_k - 1) * self.block_size
        return own + history

    @property
    def routing(self) -> Routing:
        return Routing(self.block_size, self.top_k, self.gate, self.first_blocks)

    @property
    def partial_outputs(self) -> int:
        return self.top_k

    def variants(self) -> dict[str, AttentionSpec]:
        others = {name: replace(self, gate=name) for name in self.VARIANTS[1:-1]}
        return {self.name: self, **others, Full.name: Full()}

    def run(self, backend, q, k, v, documents, *, softmax_scale, deterministic, return_lse, selection=None):
        options: dict[str, Any] = {
            "block_size": self.block_size,
            "top_k": self.top_k,
            "softmax_scale": softmax_scale,
        }
        if selection is not None:
            options["selection"] = selection
        if backend == "reference":
            from moba.reference import reference_attention

            options["first_blocks"] = self.first_blocks
            out, lse = reference_attention(q, k, v, **documents.bounds, **options, return_lse=True)
            return out, lse
        if selection is None and (self.gate != MEAN or (self.first_blocks and backend != "triton")):
            from moba.gates import select

            options["selection"] = select(self.routing, q, k, documents=documents, softmax_scale=softmax_scale)
        if backend == "triton" and documents.cu_seqlens_k is not None and _only_decodes(documents, q, k, v):
            from moba.backends.triton_decode import moba_of_last_tokens

            return moba_of_last_tokens(q, k, v, documents, **options, first_blocks=self.first_blocks)
        if backend == "triton":
            from moba.backends.triton_attention import moba_triton

            return moba_triton(q, k, v, documents, **options, first_blocks=self.first_blocks)
        if backend == "torch":
            from moba.backends.torch_blocks import moba_torch

            return moba_torch(q, k, v, documents, **options)
        from moba.backends.flash import moba_flash

        return moba_flash(q, k, v, documents, **options, deterministic=deterministic)

    def decode(self, q, sequences, documents, dense):
        if dense or self.gate != MEAN:
            return super().decode(q, sequences, documents, dense)
        from moba.kv_cache import decode_moba, decode_triton

        out = decode_triton(q, sequences, documents, self)
        if out is not None:
            return out
        return decode_moba(q, sequences, documents, self.block_size, self.top_k, self.first_blocks)

    @classmethod
    def check_options(cls, values: Mapping[str, Any], seq_len: int | None, used: bool) -> Iterator[BadOption]:
        yield from at_least_one(values, "block_size", "num_blocks", "top_k")
        gate = values.get("gate")
        if gate not in GATES:
            yield BadOption("gate", gate, f"choose one of {', '.join(GATES)}")
        elif gate != MEAN and not used:
            yield BadOption("gate", gate, f"only with {{key}}.kind={cls.name}")
        first_blocks, top_k = values.get("first_blocks"), values.get("top_k")
        if first_blocks and not used:
            yield BadOption("first_blocks", first_blocks, f"only with {{key}}.kind={cls.name}")
        elif (problem := first_blocks_problem(first_blocks, top_k)) is not None:
            yield BadOption("first_blocks", first_blocks, problem)
        yield from cls._check_num_blocks(values, seq_len)

    @classmethod
    def _check_num_blocks(cls, values: Mapping[str, Any], seq_len: int | None) -> Iterator[BadOption]:
        num_blocks, block_size = values.get("num_blocks"), values.get("block_size")
        if num_blocks is None or num_blocks < 1 or seq_len is None or seq_len < 1:
            return
        if seq_len % num_blocks:
            yield BadOption("num_blocks", num_blocks, "must divide seq_len={seq_len}: {divisors}")
        elif block_size is not None and block_size * num_blocks != seq_len:
            hint = f"{{key}}.block_size={block_size} says otherwise at seq_len={{seq_len}}; set {{key}}.block_size=null"
            yield BadOption("num_blocks", num_blocks, hint)

    @classmethod
    def check_backend(cls, values: Mapping[str, Any], backend: str) -> Iterator[BadOption]:
        if values.get("gate") != MEAN and values.get("gate") in GATES and backend == "reference":
            yield BadOption("backend", backend, "knows gate=mean alone; {key}.gate takes auto, triton, flash or torch")
        if backend == "cudnn":
            yield BadOption(
                "backend", backend, "is for full attention; MoBA takes auto, triton, flash, torch or reference"
            )

    @classmethod
    def fill_options(cls, values: Mapping[str, Any], defaults: Any, seq_len: int | None) -> dict[str, Any]:
        block_size, num_blocks = values.get("block_size"), values.get("num_blocks")
        if block_size is None and num_blocks is None:
            block_size = defaults.block_size
        if block_size is None and seq_len and num_blocks and num_blocks >= 1 and seq_len % num_blocks == 0:
            block_size = seq_len // num_blocks
        top_k = values.get("top_k")
        return {"block_size": block_size, "top_k": defaults.top_k if top_k is None else top_k}

    @property
    def export_problem(self) -> str | None:
        return None if self.gate == MEAN else f"attention.gate={self.gate}"

    def entry(self) -> list[Any]:
        return [self.name, self.block_size, self.top_k, *([self.first_blocks] if self.first_blocks else [])]

    @classmethod
    def from_entry(cls, sizes: Sequence[Any]) -> Moba:
        block_size, top_k, *more = sizes
        return cls(block_size, top_k, first_blocks=more[0] if more else 0)

    def __str__(self) -> str:
        notes = [f"{self.gate} gate"] if self.gate != MEAN else []
        notes += [f"first {self.first_blocks}"] if self.first_blocks else []
        return f"{self.name} {self.block_size}x{self.top_k}" + (f" ({', '.join(notes)})" if notes else "")


def _only_decodes(documents: Documents, *tensors: Tensor) -> bool:
    import torch

    needs_gradient = torch.is_grad_enabled() and any(x.requires_grad for x in tensors)
    return refusals.decodes(documents) and not needs_gradient


def first_blocks_problem(first_blocks: Any, top_k: int | None) -> str | None:
    """What would have to hold of first_blocks and does not, or None; `top_k` None is not known yet."""
    if not isinstance(first_blocks, int) or isinstance(first_blocks, bool) or first_blocks < 0:
        return "needs an integer of at least 0"
    if first_blocks and top_k is not None and first_blocks >= top_k:
        return f"must be less than top_k={top_k}, which counts the first blocks and the query's own"
    return None


def check_first_blocks(first_blocks: Any, top_k: int) -> None:
    """Raises ValueError unless that many blocks fit into top_k beside the query's own."""
    if (problem := first_blocks_problem(first_blocks, top_k)) is not None:
        raise ValueError(f"first_blocks={first_blocks!r}: {problem}")
