"""What one layer's attention is: full or MoBA, and with which blocks. Pure data, no tensors.

A model holds one AttentionSpec per layer (its "plan"). Because MoBA has no parameters, replacing the plan switches a
model between full and sparse attention without touching a weight.
"""

from __future__ import annotations

from dataclasses import dataclass

KINDS = ("full", "moba")
GATES = ("mean", "local", "random", "oracle")
BACKENDS = ("auto", "reference", "torch", "flash", "triton")


@dataclass(frozen=True)
class AttentionSpec:
    """The attention of one layer.

    `top_k` counts the query's own block (MoBA paper, footnote 3): `top_k=1` is block-local attention, and
    `block_size * top_k >= length` is full attention.
    """

    kind: str = "full"
    block_size: int | None = None
    top_k: int | None = None
    backend: str = "auto"
    gate: str = "mean"
    """What picks a MoBA layer's blocks: "mean" is MoBA, the others are controls (moba/gates.py)."""

    def __post_init__(self):
        if self.kind not in KINDS:
            raise ValueError(f"kind={self.kind!r}: choose one of {', '.join(KINDS)}")
        if self.backend not in BACKENDS:
            raise ValueError(f"backend={self.backend!r}: choose one of {', '.join(BACKENDS)}")
        if self.gate not in GATES:
            raise ValueError(f"gate={self.gate!r}: choose one of {', '.join(GATES)}")
        if self.kind == "moba":
            for name in ("block_size", "top_k"):
                value = getattr(self, name)
                if not isinstance(value, int) or isinstance(value, bool) or value < 1:
                    raise ValueError(f"{name}={value!r}: MoBA needs an integer of at least 1")

    def is_dense_at(self, length: int) -> bool:
        """True if every query of a document of `length` tokens attends to all earlier tokens."""
        return self.kind == "full" or self.block_size * self.top_k >= length

    def __str__(self) -> str:
        gate = "" if self.gate == "mean" else f" ({self.gate} gate)"
        return "full" if self.kind == "full" else f"moba {self.block_size}x{self.top_k}{gate}"
