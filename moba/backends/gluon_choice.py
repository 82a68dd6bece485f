"""What runs on the Gluon kernels and what on those in Triton, which compute the same."""

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


def gluon_kernels(name: str, block_size: int, *tensors: torch.Tensor) -> ModuleType | None:
    """For half-precision inputs [T, H, 128] on Hopper: gluon_forward.py or gluon_backward.py ("forward", "backward")
    for long blocks, gluon_short.py ("short") for blocks of 65 to 128 keys. None otherwise, and if this Triton lacks
    what they need.

    TMA and cp.async take addresses that are multiples of 16 bytes; contiguous tensors hardly ever have others.
    """
    x = tensors[0]
    suits = (
        ENABLED
        and x.device.type == "cuda"
        and x.shape[-1] == 128
        and x.dtype in (torch.bfloat16, torch.float16)
        and (64 < block_size <= 128 if name == "short" else not is_short(block_size, 128, x.dtype))
        and all(y.data_ptr() % 16 == 0 for y in tensors)
        and torch.cuda.get_device_capability(x.device) == (9, 0)
    )
    return _module(f"moba.backends.gluon_{name}") if suits else None


@cache
def _module(name: str) -> ModuleType | None:
    try:
        return import_module(name)
    except ImportError:
        return None
