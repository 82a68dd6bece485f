"""Collectives over all processes of a run, small ones: counts, flags and objects."""

from __future__ import annotations

from typing import Any

import torch
import torch.distributed as dist


def barrier() -> None:
    """Waits for all ranks."""
    dist.barrier()


def all_reduce_sum(tensor: torch.Tensor) -> torch.Tensor:
    """Returns `tensor`, summed over all ranks in place."""
    dist.all_reduce(tensor)
    return tensor


def any_rank(flag: torch.Tensor) -> torch.Tensor:
    """Returns a bool tensor on the flag's device: whether it is non-zero on any rank. No host synchronisation."""
    seen = flag.to(torch.int32)
    dist.all_reduce(seen, op=dist.ReduceOp.MAX)
    return seen.bool()


def broadcast_object(value: Any, src: int = 0) -> Any:
    """Returns rank `src`'s value on every rank (pickled between our own processes; small things only)."""
    box = [value]
    dist.broadcast_object_list(box, src=src)
    return box[0]


def gather_objects(value: Any) -> list[Any]:
    """Returns every rank's value, in order of rank, on every rank (small things only)."""
    values: list[Any] = [None] * dist.get_world_size()
    dist.all_gather_object(values, value)
    return values
