"""What evals/tuning.py finds out, as numbers, text and plain values for the plan's file.

Shapes: L layers.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, NamedTuple

import numpy as np

from conf.numbers import format_length
from evals.plan_search import pairs_share
from moba.kinds import AttentionSpec

TRAILING = 8
"""The loss is that of the last one of so many equal pieces of a document."""

Plan = tuple[AttentionSpec, ...]


class Paired(NamedTuple):
    """A mean over documents and half of its 95 % interval, which is NaN where none holds."""

    mean: float
    width: float

    def __str__(self) -> str:
        return f"{self.mean:+.4f}" + (f" +- {self.width:.4f}" if np.isfinite(self.width) else "")

    def record(self) -> dict[str, float | None]:
        """Plain values."""
        return {
            "mean": round(self.mean, 6),
            "interval_95": round(self.width, 6) if np.isfinite(self.width) else None,
        }


@dataclass(frozen=True, eq=False)
class Tuning:
    """A plan, and what was measured on the way."""

    seq_len: int
    budget: float
    plan: Plan
    alike: AttentionSpec
    """What all layers would have, if they had to have the same."""
    how: str
    """Which kind of plan that is."""
    reference: Plan
    """What each layer had when it alone was sparse."""
    regret_L: list[Paired]
    kl_L: np.ndarray
    captured_L: np.ndarray
    """Share of full attention's probability that each layer holds under the plan."""
    expected_L: np.ndarray
    """Nats that the plan is expected to cost in each layer."""
    chosen_kl: dict[str, float]
    """Of both kinds of plan, on the documents that chose: the divergence with all layers at once."""
    full_loss: float
    """Of full attention, on the documents that did not choose, like all below."""
    regret: Paired
    kl: float
    alike_regret: Paired
    alike_kl: float
    minus_alike: Paired
    num_documents: tuple[int, int]
    """Those that chose, and those that did not."""

    @property
    def pairs(self) -> float:
        """The plan's share of the causal pairs."""
        return float(np.mean([pairs_share(spec, self.seq_len) for spec in self.plan]))

    def table(self) -> str:
        """One line per layer, and what the plan costs."""
        width = max(len(str(spec)) for spec in (*self.plan, *self.reference))
        head = f"{'layer':>5}  {'attention':<{width}}  {'pairs':>6}  {'captured':>8}  {'expected':>8}"
        lines = [f"{head}    {'sparse alone, as':<{width}}  {'regret':>17}  {'kl':>8}"]
        for layer, spec in enumerate(self.plan):
            own = f"{layer:>5}  {spec!s:<{width}}  {pairs_share(spec, self.seq_len):>6.3f}"
            costs = f"{self.captured_L[layer]:>8.3f}  {self.expected_L[layer]:>8.5f}"
            alone = f"{self.reference[layer]!s:<{width}}  {self.regret_L[layer]!s:>17}  {self.kl_L[layer]:>8.5f}"
            lines.append(f"{own}  {costs}    {alone}")
        chose, rest = self.num_documents
        found = ", ".join(f"{name} {kl:.4f}" for name, kl in self.chosen_kl.items())
        at = format_length(self.seq_len)
        return "\n".join(
            [
                *lines,
                f"{self.pairs:.3f} of the causal pairs at {at} (budget {self.budget:g}); taken: {self.how}",
                f"kl on the {chose} documents that chose, all layers at once: {found}; "
                f"expected of the plan's single layers {self.expected_L.sum():.4f}",
                f"loss on {rest} other documents: full {self.full_loss:.4f}",
                f"  plan minus full {self.regret} (kl {self.kl:.4f})",
                f"  all layers {self.alike} minus full {self.alike_regret} (kl {self.alike_kl:.4f})",
                f"  plan minus all layers alike {self.minus_alike}",
            ]
        )

    def record(self) -> dict[str, Any]:
        """Plain values for the plan's file."""
        layers = [
            {
                "captured": round(float(self.captured_L[i]), 4),
                "expected": round(float(self.expected_L[i]), 6),
                "alone": str(self.reference[i]),
                **{f"alone_{k}": v for k, v in zip(("regret", "interval_95"), self.regret_L[i].record().values())},
                "alone_kl": round(float(self.kl_L[i]), 6),
            }
            for i in range(len(self.plan))
        ]
        return {
            "seq_len": self.seq_len,
            "budget": self.budget,
            "pairs": round(self.pairs, 4),
            "taken": self.how,
            "documents_that_chose": self.num_documents[0],
            "other_documents": self.num_documents[1],
            "loss_of": f"last 1/{TRAILING} of other documents, nats per token",
            "dense_loss": round(self.full_loss, 6),
            "plan_minus_dense": self.regret.record(),
            "kl": round(self.kl, 6),
            "alike": str(self.alike),
            "alike_minus_dense": self.alike_regret.record(),
            "alike_kl": round(self.alike_kl, 6),
            "plan_minus_alike": self.minus_alike.record(),
            "kl_where_chosen": {name: round(kl, 6) for name, kl in self.chosen_kl.items()},
            "layers": layers,
        }
