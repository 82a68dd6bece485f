"""Sliding windows: every query sees the latest tokens of its document. A part of the model, no approximation."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from moba.backends import refusals
from moba.kinds.base import AttentionSpec, Backend, BadOption, Option, at_least_one, causal_pairs, check_counts


@dataclass(frozen=True)
class Sliding(AttentionSpec):
    """Attention to the last `window` tokens of the query's document, including the query itself."""

    name = "sliding"
    letter = "S"
    in_patterns = "sliding window"
    is_stage_kind = False
    replaces_full = False
    covers = "sliding windows hide nothing at this length: a window covers all of {length}"
    backends = (
        Backend("flash", refusals.flash, device="cuda"),
        Backend("torch", refusals.past_only),
        Backend("reference", refusals.past_only, pays=refusals.never),
    )
    options = {
        "window": Option(
            int,
            "Window length of an S layer: the latest tokens, the query's own included; null = schedule.window.",
            is_length=True,
        )
    }

    window: int

    def __post_init__(self):
        super().__post_init__()
        check_counts(self.name, window=self.window)

    def is_dense_at(self, length: int) -> bool:
        return self.window >= length

    def attended_pairs(self, length: int) -> int:
        """A query at position p sees min(p + 1, window) keys."""
        growing = min(length, self.window)
        return causal_pairs(growing) + (length - growing) * self.window

    def run(self, backend, q, k, v, documents, *, softmax_scale, deterministic, return_lse, selection=None):
        options = {"window": self.window, "softmax_scale": softmax_scale}
        if backend == "reference":
            from moba.reference import reference_sliding

            out, lse = reference_sliding(q, k, v, **documents.bounds, **options, return_lse=True)
            return out, lse
        if backend == "torch":
            from moba.backends.torch_sliding import sliding_torch

            return sliding_torch(q, k, v, documents, **options)
        from moba.backends.dense import dense_flash

        return dense_flash(q, k, v, documents, **options, deterministic=deterministic, return_lse=True)

    def decode(self, q, sequences, documents, dense):
        """The cache keeps all keys, so that a window may be widened; a new token reads the last ones."""
        import torch

        from moba.attention import attend
        from moba.documents import last_tokens
        from moba.kinds.full import Full

        seen = tuple(min(self.window, sequence.length) for sequence in sequences)
        k, v = (torch.cat([x[-n:] for x, n in zip(xs, seen)]) for xs in zip(*((s.k, s.v) for s in sequences)))
        return attend(q, k, v, Full(), last_tokens((1,) * len(seen), seen, q.device))[0]

    @classmethod
    def check_options(cls, values: Mapping[str, Any], seq_len: int | None, used: bool) -> Iterator[BadOption]:
        if used and values.get("window") is None:
            hint = "how many tokens does an S layer see? Set it, or schedule.window, such as 256"
            yield BadOption("window", None, hint)
        yield from at_least_one(values, "window")
        if values.get("window") is not None and not used:
            hint = "has no effect without an S in {key}.pattern, such as SM"
            yield BadOption("window", values["window"], hint)

    @property
    def export_problem(self) -> str:
        return "sliding windows (S in attention.pattern)"

    @classmethod
    def from_entry(cls, sizes: Sequence[Any]) -> AttentionSpec:
        raise ValueError("there are no sliding windows here; say full or moba")

    def __str__(self) -> str:
        return f"{self.name} {self.window}"
