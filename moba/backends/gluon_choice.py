"""Whether long blocks run on the Gluon kernels or on those in Triton, which compute the same."""

from __future__ import annotations

import os
from functools import cache
from importlib import import_module
from types import ModuleType

import torch

from moba.backends.triton_tiles import is_short

ENABLED = os.environ.get("MOBA_GLUON", "1") != "0"
"""For debugging and comparisons."""
GLUON_ITEM_ROWS = 128
"""Rows of a work item of the forward and of dQ: 64 for each of a program's two consumers."""


def gluon_kernels(direction: str, block_size: int, *tensors: torch.Tensor) -> ModuleType | None:
    """gluon_forward.py or gluon_backward.py for long blocks of half-precision inputs [T, H, 128] on Hopper, if this
    Triton has what they need; else None.

    TMA and cp.async take addresses that are multiples of 16 bytes; contiguous tensors hardly ever have others.
    """
    x = tensors[0]
    suits = (
        ENABLED
        and x.device.type == "cuda"
        and x.shape[-1] == 128
        and x.dtype in (torch.bfloat16, torch.float16)
        and not is_short(block_size, 128, x.dtype)
        and all(y.data_ptr() % 16 == 0 for y in tensors)
        and torch.cuda.get_device_capability(x.device) == (9, 0)
    )
    return _module(f"moba.backends.gluon_{direction}") if suits else None


@cache
def _module(name: str) -> ModuleType | None:
    try:
        return import_module(name)
    except ImportError:
        return None
