"""What one layer's attention is: full, MoBA with which blocks, or a sliding window. Pure data, no tensors.

A model holds one AttentionSpec per layer (its "plan"). Because MoBA has no parameters, replacing the plan switches a
model between full and sparse attention without touching a weight.
"""

from __future__ import annotations

from dataclasses import dataclass

KINDS = ("full", "moba", "sliding")
GATES = ("mean", "local", "random", "oracle")
BACKENDS = ("auto", "reference", "torch", "flash", "triton")


@dataclass(frozen=True)
class AttentionSpec:
    """The attention of one layer: "full", "moba" (`block_size`, `top_k`) or "sliding" (`window`).

    `top_k` counts the query's own block (MoBA paper, footnote 3): `top_k=1` is block-local attention, and
    `block_size * top_k >= length` is full attention. `window` counts the query's own token: a query sees it and the
    window - 1 tokens before it, of its own document.
    """

    kind: str = "full"
    block_size: int | None = None
    top_k: int | None = None
    backend: str = "auto"
    gate: str = "mean"
    """What picks a MoBA layer's blocks: "mean" is MoBA, the others are controls (moba/gates.py)."""
    window: int | None = None

    def __post_init__(self):
        if self.kind not in KINDS:
            raise ValueError(f"kind={self.kind!r}: choose one of {', '.join(KINDS)}")
        if self.backend not in BACKENDS:
            raise ValueError(f"backend={self.backend!r}: choose one of {', '.join(BACKENDS)}")
        if self.gate not in GATES:
            raise ValueError(f"gate={self.gate!r}: choose one of {', '.join(GATES)}")
        needed = {"moba": ("block_size", "top_k"), "sliding": ("window",)}.get(self.kind, ())
        for name in needed:
            value = getattr(self, name)
            if not isinstance(value, int) or isinstance(value, bool) or value < 1:
                raise ValueError(f"{name}={value!r}: kind={self.kind!r} needs an integer of at least 1")

    def is_dense_at(self, length: int) -> bool:
        """True if every query of a document of `length` tokens attends to all earlier tokens."""
        if self.kind == "full":
            return True
        return (self.window if self.kind == "sliding" else self.block_size * self.top_k) >= length

    def without_moba(self) -> AttentionSpec:
        """Full attention in place of MoBA; full attention and sliding windows stay as they are.

        MoBA approximates full attention, a window is part of the model.
        """
        return AttentionSpec("full") if self.kind == "moba" else self

    def __str__(self) -> str:
        gate = "" if self.gate == "mean" else f" ({self.gate} gate)"
        sizes = {"moba": f" {self.block_size}x{self.top_k}{gate}", "sliding": f" {self.window}"}
        return self.kind + sizes.get(self.kind, "")
