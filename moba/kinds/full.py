"""Full attention: every query sees all earlier tokens of its document."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from moba.backends import refusals
from moba.kinds.base import AttentionSpec, Backend, BadOption, causal_pairs


@dataclass(frozen=True)
class Full(AttentionSpec):
    """Dense causal attention within each document."""

    name = "full"
    letter = "F"
    in_patterns = "full"
    replaces_full = False
    backends = (
        Backend("cudnn", refusals.cudnn, device="cuda", pays=refusals.long_documents),
        Backend("flash", refusals.flash, device="cuda"),
        Backend("torch", refusals.nothing),
        Backend("reference", refusals.past_only, pays=refusals.never),
    )

    def is_dense_at(self, length: int) -> bool:
        return True

    def attended_pairs(self, length: int) -> int:
        return causal_pairs(length)

    def run(self, backend, q, k, v, documents, *, softmax_scale, deterministic, return_lse, selection=None):
        if backend == "reference":
            from moba.reference import reference_attention

            whole = {"block_size": max(1, documents.longest_k), "top_k": 1, "softmax_scale": softmax_scale}
            out, lse = reference_attention(q, k, v, **documents.bounds, **whole, return_lse=True)
            return out, lse
        from moba.backends.dense import dense_cudnn, dense_flash, dense_torch

        options = {"softmax_scale": softmax_scale, "return_lse": return_lse}
        if backend == "cudnn":
            return dense_cudnn(q, k, v, documents, **options)
        dense = dense_flash if backend == "flash" else dense_torch
        return dense(q, k, v, documents, **options, deterministic=deterministic)

    @classmethod
    def check_backend(cls, values: Mapping[str, Any], backend: str) -> Iterator[BadOption]:
        if backend == "triton":
            yield BadOption(
                "backend", backend, "is for MoBA; full attention takes auto, cudnn, flash, torch or reference"
            )

    @property
    def export_problem(self) -> None:
        return None

    def entry(self) -> list[Any]:
        return [self.name, None, None]

    @classmethod
    def from_entry(cls, sizes: Sequence[Any]) -> Full:
        if list(sizes) != [None, None]:
            raise ValueError("needs [full, null, null]")
        return cls()
