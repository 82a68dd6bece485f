"""torch's AdamW with a veto, to skip a step by the gradient norm that DeepSpeed computes within its own step."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch


class VetoedAdamW(torch.optim.AdamW):
    """Skips a step where `veto` returns True.

    DeepSpeed's ZeRO optimizers reduce the gradients, check, store and apply their norm, and then call this, once or
    once per parameter group; what they do afterwards copies unchanged weights.
    """

    veto: Callable[[], bool] | None = None

    def step(self, closure: Any = None) -> Any:
        """One step, or none."""
        if self.veto is not None and self.veto():
            return None
        return super().step(closure)
