"""Loss and gradient-norm spikes, detected on the device before the optimizer steps.

A step is a spike if its mean loss or its gradient norm, before clipping, lies more than `deviations` standard
deviations above the mean of the last `window` good steps of its stage, and there have been at least half as many. A
good step is one that the optimizer took: spikes never enter the statistics. All ranks compare the same values, the
global loss and the global norm.
"""

from __future__ import annotations

from typing import Any

import torch

MAX_ROLLBACKS = 3  # to one checkpoint


class SpikeError(Exception):
    """A run that ends because of a spike; the message says where it can resume."""


class Spikes:
    """The last good steps, and how many spikes there were."""

    def __init__(self, deviations: float, window: int, device: torch.device) -> None:
        self._deviations, self._window = deviations, window
        # A row per good step, (loss, gradient norm), the latest last; NaN where there was none yet.
        self._recent = torch.full((window, 2), torch.nan, dtype=torch.float64, device=device)
        self.total = 0
        """Spikes so far, those before a rollback included."""

    def is_spike(self, loss: torch.Tensor, norm: torch.Tensor) -> torch.Tensor:
        """Whether a step of this mean loss and gradient norm (each [], on the device) is a spike: bool [], on the
        device. A non-finite step is none: it is skipped as such (train/step.py)."""
        known = ~self._recent.isnan()
        count = known.sum(0)
        mean = self._recent.nansum(0) / count
        variance = ((self._recent - mean) ** 2).nansum(0) / (count - 1)
        high = _pair(loss, norm) > mean + self._deviations * variance.sqrt()
        return (high & (count >= max(2, self._window // 2))).any()

    def add(self, loss: torch.Tensor, norm: torch.Tensor) -> None:
        """Adds a good step to the statistics."""
        self._recent = torch.cat([self._recent[1:], _pair(loss, norm)[None]])

    def forget(self) -> None:
        """Clears the statistics: another stage's losses may differ."""
        self._recent = torch.full_like(self._recent, torch.nan)

    def state_dict(self) -> dict[str, Any]:
        """`total`, and `recent`: float64 on the host."""
        return {"total": self.total, "recent": self._recent.to("cpu", copy=True)}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Restores a state_dict, also one of another window."""
        self.total = state["total"]
        recent = state["recent"][-self._window :].to(self._recent.device)
        self.forget()
        self._recent[self._window - len(recent) :] = recent


def _pair(loss: torch.Tensor, norm: torch.Tensor) -> torch.Tensor:
    return torch.stack([loss.double(), norm.double()])
