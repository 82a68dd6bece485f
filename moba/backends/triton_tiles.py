"""Tile sizes, warps and pipeline stages of the Triton kernels, by kernel and head size.

The table holds what was fastest on an H100 (`merge_own`: an H200) among the variants in docs/kernels.md. Change an
entry to tune for another card: every value that fits the card's shared memory gives the same results up to rounding.
"""

# Triton's stubs: next_power_of_2 of an int is no int.
# pyright: reportReturnType=false

from __future__ import annotations

from dataclasses import dataclass, replace
from functools import cache

import torch
import triton


@dataclass(frozen=True)
class Tile:
    """One program's share."""

    rows: int
    """Query rows of a tile."""
    keys: int
    """Keys of a tile (blocks, in the routing kernel)."""
    warps: int
    stages: int
    tiles: int = 1
    """Row tiles of a work item: how far a list is followed before another program takes over."""
    registers: int | None = None
    """Most registers of a thread: the fewer, the more programs a multiprocessor runs at once. None: as many as the
    compiler likes."""


MULTIPROCESSORS = 132
"""Of an H100. What depends on it needs its order of magnitude only."""

# (kernel, padded head size) -> tile
TILES: dict[tuple[str, int], Tile] = {
    ("select", 64): Tile(rows=64, keys=64, warps=4, stages=1, registers=80),
    ("select", 128): Tile(rows=64, keys=64, warps=4, stages=1, registers=96),
    ("select", 256): Tile(rows=64, keys=64, warps=4, stages=2),
    ("forward_short", 64): Tile(rows=64, keys=128, warps=4, stages=3, tiles=32),
    ("forward_short", 128): Tile(rows=64, keys=128, warps=4, stages=3, tiles=32),
    ("forward_short", 256): Tile(rows=64, keys=64, warps=4, stages=3, tiles=16),
    ("merge_own", 128): Tile(rows=64, keys=32, warps=4, stages=2, registers=168),
    ("forward_long", 64): Tile(rows=128, keys=128, warps=4, stages=3),
    ("forward_long", 128): Tile(rows=128, keys=64, warps=8, stages=3),
    ("forward_long", 256): Tile(rows=64, keys=64, warps=4, stages=2),
    ("backward_short", 64): Tile(rows=128, keys=128, warps=8, stages=3, tiles=32),
    ("backward_short", 128): Tile(rows=64, keys=128, warps=8, stages=3, tiles=128),
    ("backward_short", 256): Tile(rows=64, keys=64, warps=8, stages=2, tiles=128),
    ("backward_kv", 64): Tile(rows=64, keys=64, warps=4, stages=3),
    ("backward_kv", 128): Tile(rows=64, keys=64, warps=4, stages=2),
    ("backward_kv", 256): Tile(rows=64, keys=64, warps=8, stages=2),
    ("backward_q", 64): Tile(rows=128, keys=64, warps=4, stages=3),
    ("backward_q", 128): Tile(rows=128, keys=64, warps=8, stages=3),
    ("backward_q", 256): Tile(rows=64, keys=32, warps=4, stages=2),
}


def cdiv(x: int, y: int) -> int:
    """x / y, rounded up. On the host triton.cdiv takes some microseconds, of the twenty of a launch."""
    return -(-x // y)


@cache
def padded(head_dim: int) -> int:
    """The head size the kernels compute with: the next power of two, at least 16."""
    return max(16, triton.next_power_of_2(head_dim))


def tile_for(kernel: str, head_dim: int, width: int, dtype: torch.dtype) -> Tile:
    """The tile of a kernel. `width` is the block size (for routing: the number of best blocks that a row keeps)."""
    if dtype == torch.float32:
        # Only the interpreter computes in float32; small tiles show more of the logic on small inputs.
        tile = Tile(rows=16, keys=16, warps=4, stages=1, tiles=2)
    else:
        tile = TILES[kernel, min(256, max(64, padded(head_dim)))]
    if kernel == "select":
        return replace(tile, registers=None) if width >= 32 else tile
    if kernel.endswith("short"):
        return replace(tile, keys=max(16, triton.next_power_of_2(width)))
    return tile


def is_short(block_size: int, head_dim: int, dtype: torch.dtype) -> bool:
    """True if a whole block fits on chip as one key tile: then the short kernels are used, else the long ones."""
    limit = 32 if dtype == torch.float32 else TILES["backward_short", min(256, max(64, padded(head_dim)))].keys
    return block_size <= limit


def merges_own(block_size: int, head_dim: int, dtype: torch.dtype) -> bool:
    """Whether the own block of a short block's rows is attended to where their partial results are merged, and takes
    no slot: where that was measured, and faster."""
    return dtype != torch.float32 and head_dim == 128 and 64 < block_size <= 128
