"""Every eval there is: each line names a file of evals/, whose `EVAL` it is, and the eval itself."""

from __future__ import annotations

from importlib import import_module

from evals.protocol import Eval

NAMES = (
    "position_loss",
    "routing",
    "swap",
    "recall",
    "needle",
    "ruler",
    "sweep",
    "lm_eval",
)
EVALS: dict[str, Eval] = {name: import_module(f"evals.{name}").EVAL for name in NAMES}
