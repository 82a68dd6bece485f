"""torch's AdamW with a veto, for steps that are judged by a norm which DeepSpeed works out within its own step."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch


class VetoedAdamW(torch.optim.AdamW):
    """Leaves a step out, as if it had not been called, where `veto` says so.

    DeepSpeed's ZeRO optimizers reduce the gradients, test, note and apply their norm, and then call this, once or once
    a group of parameters; what they do behind it copies weights that have not changed.
    """

    veto: Callable[[], bool] | None = None

    def step(self, closure: Any = None) -> Any:
        """One step, or none."""
        if self.veto is not None and self.veto():
            return None
        return super().step(closure)
