"""The limit on steps in a row whose loss or gradient is not finite."""

from __future__ import annotations

from pathlib import Path


class NonFiniteError(Exception):
    """Too many steps in a row had a loss or a gradient that was not finite."""


class NonFiniteGuard:
    """Counts skipped steps and ends the run after `limit` in a row (0 = never)."""

    def __init__(self, limit: int) -> None:
        self.limit = limit
        self.streak = 0
        self.total = 0

    def update(self, skipped: bool, *, tokens: int, last_checkpoint: Path | None) -> None:
        """Counts one step that ended at `tokens`. Raises NonFiniteError, naming what to go back to, at the limit."""
        self.streak = self.streak + 1 if skipped else 0
        self.total += int(skipped)
        if self.limit and self.streak >= self.limit:
            kept = f"The last checkpoint is {last_checkpoint}" if last_checkpoint else "There is no checkpoint yet"
            raise NonFiniteError(
                f"{self.streak} steps in a row had a non-finite loss or gradient, or a spike, up to {tokens:,} tokens "
                f"(skipped). {kept}. A lower optim.lr.peak, a longer optim.lr.warmup_tokens or a smaller "
                f"optim.grad_clip may help (the limit is optim.max_bad_steps={self.limit})"
            )

    def state_dict(self) -> dict[str, int]:
        """Returns the counts, for a checkpoint."""
        return {"streak": self.streak, "total": self.total}

    def load_state_dict(self, state: dict[str, int]) -> None:
        """Takes counts of an earlier process."""
        self.streak, self.total = state["streak"], state["total"]
