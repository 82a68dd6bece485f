"""Results of evals/tuning.py as numbers, text and plain values for the plan's file.

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
"""The loss is over the last 1/TRAILING of a document."""

LOSS, RETRIEVAL, BOTH = OBJECTIVES = ("loss", "retrieval", "both")
"""What a plan preserves: predictions late in documents, answers with evidence far back, or both with equal weight."""

Plan = tuple[AttentionSpec, ...]


class Paired(NamedTuple):
    """A mean over documents and the half-width of its 95 % interval; NaN where there is none."""

    mean: float
    width: float

    def __str__(self) -> str:
        return f"{self.mean:+.4f}" + (f" +- {self.width:.4f}" if np.isfinite(self.width) else "")

    @property
    def share(self) -> str:
        """As text without a sign, for values that are no differences."""
        return str(self).removeprefix("+")

    def record(self) -> dict[str, float | None]:
        """Plain values."""
        return {
            "mean": round(self.mean, 6),
            "interval_95": round(self.width, 6) if np.isfinite(self.width) else None,
        }


@dataclass(frozen=True, eq=False)
class Judged:
    """Costs of plans on test documents, or probes: nats per token, and shares of right answers."""

    number: int
    full_loss: float
    """Of full attention."""
    regret: Paired
    kl: float
    alike_regret: Paired
    alike_kl: float
    minus_alike: Paired
    full_right: float
    right: Paired
    alike_right: Paired


@dataclass(frozen=True, eq=False)
class Tuning:
    """A plan and its measurements; dictionaries are by the objective's parts, LOSS and RETRIEVAL."""

    seq_len: int
    budget: float
    objective: str
    plan: Plan
    alike: AttentionSpec
    """The best attention with all layers alike."""
    how: str
    """Which kind of plan that is."""
    reference: Plan
    """Each layer's attention when it alone was sparse."""
    regret_L: list[Paired]
    """In the loss, if it is part of the objective, else in answers."""
    kl_L: dict[str, np.ndarray]
    captured_L: dict[str, np.ndarray]
    """Share of full attention's probability that each layer captures under the plan."""
    expected_L: np.ndarray
    """Predicted cost of the plan in each layer, nats, summed over the objective's parts."""
    chosen_kl: dict[str, float]
    """Of every plan tried, on the documents that chose: the divergence with all layers at once, summed likewise."""
    num_chose: int
    judged: dict[str, Judged]

    @property
    def pairs(self) -> float:
        """The plan's share of the causal pairs."""
        return float(np.mean([pairs_share(spec, self.seq_len) for spec in self.plan]))

    def table(self) -> str:
        """One line per layer, and what the plan costs."""
        width = max(len(str(spec)) for spec in (*self.plan, *self.reference))
        head = f"{'layer':>5}  {'attention':<{width}}  {'pairs':>6}"
        head += "".join(f"  {f'captured, {name}':>19}" for name in self.captured_L) + f"  {'expected':>8}"
        head += f"    {'sparse alone, as':<{width}}  {'regret':>17}"
        lines = [head + "".join(f"  {f'kl, {name}':>13}" for name in self.kl_L)]
        for layer, spec in enumerate(self.plan):
            own = f"{layer:>5}  {spec!s:<{width}}  {pairs_share(spec, self.seq_len):>6.3f}"
            own += "".join(f"  {captured_L[layer]:>19.3f}" for captured_L in self.captured_L.values())
            own += f"  {self.expected_L[layer]:>8.5f}"
            own += f"    {self.reference[layer]!s:<{width}}  {self.regret_L[layer]!s:>17}"
            lines.append(own + "".join(f"  {kl_L[layer]:>13.5f}" for kl_L in self.kl_L.values()))
        found = ", ".join(f"{name} {kl:.4f}" for name, kl in self.chosen_kl.items())
        lines += [
            f"{self.pairs:.3f} of the causal pairs at {format_length(self.seq_len)} (budget {self.budget:g}); "
            f"objective {self.objective}; taken: {self.how}",
            f"kl on the {self.num_chose} documents that chose, all layers at once: {found}; "
            f"expected of the plan's single layers {self.expected_L.sum():.4f}",
        ]
        for name, part in self.judged.items():
            of = "other documents" if name == LOSS else "probes in other documents, their answers"
            lines += [
                f"loss on {part.number} {of}: full {part.full_loss:.4f}",
                f"  plan minus full {part.regret} (kl {part.kl:.4f})",
                f"  all layers {self.alike} minus full {part.alike_regret} (kl {part.alike_kl:.4f})",
                f"  plan minus all layers alike {part.minus_alike}",
            ]
            if name == RETRIEVAL:
                shares = (
                    f"full {part.full_right:.3f}, plan {part.right.share}, all layers alike {part.alike_right.share}"
                )
                lines.append(f"  answers right: {shares}")
        return "\n".join(lines)

    def record(self) -> dict[str, Any]:
        """Plain values for the plan's file."""
        layers = [
            {
                **{f"captured_{name}": round(float(found_L[i]), 4) for name, found_L in self.captured_L.items()},
                "expected": round(float(self.expected_L[i]), 6),
                "alone": str(self.reference[i]),
                **{f"alone_{k}": v for k, v in zip(("regret", "interval_95"), self.regret_L[i].record().values())},
                **{f"alone_kl_{name}": round(float(found_L[i]), 6) for name, found_L in self.kl_L.items()},
            }
            for i in range(len(self.plan))
        ]
        return {
            "seq_len": self.seq_len,
            "budget": self.budget,
            "objective": self.objective,
            "pairs": round(self.pairs, 4),
            "taken": self.how,
            "documents_that_chose": self.num_chose,
            "alike": str(self.alike),
            **{name: self._record_of(name, part) for name, part in self.judged.items()},
            "kl_where_chosen": {name: round(kl, 6) for name, kl in self.chosen_kl.items()},
            "layers": layers,
        }

    def _record_of(self, name: str, part: Judged) -> dict[str, Any]:
        """The costs on test documents, or probes, as plain values."""
        what = f"last 1/{TRAILING} of other documents" if name == LOSS else "answers in other documents"
        found = {
            "of": f"{what}, nats per token",
            "number": part.number,
            "dense_loss": round(part.full_loss, 6),
            "plan_minus_dense": part.regret.record(),
            "kl": round(part.kl, 6),
            "alike_minus_dense": part.alike_regret.record(),
            "alike_kl": round(part.alike_kl, 6),
            "plan_minus_alike": part.minus_alike.record(),
        }
        if name == RETRIEVAL:
            found |= {
                "dense_right": round(part.full_right, 4),
                "plan_right": part.right.record(),
                "alike_right": part.alike_right.record(),
            }
        return found
