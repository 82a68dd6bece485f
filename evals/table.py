"""All evals: name -> `EVAL` of evals/<name>.py."""

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
