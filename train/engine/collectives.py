"""Small exchanges between processes, and between host and device: counts, flags and objects."""

from __future__ import annotations

from typing import Any

import torch
import torch.distributed as dist


class OnHost:
    """Copies of small tensors to the host, launched now and read later: `read` waits for the copies only, not for later
    work."""

    def __init__(self, *tensors: torch.Tensor) -> None:
        device = tensors[0].device
        on_gpu = device.type == "cuda"
        self._copies = [torch.empty(x.shape, dtype=x.dtype, pin_memory=on_gpu) for x in tensors]
        for copy, x in zip(self._copies, tensors):
            copy.copy_(x, non_blocking=on_gpu)
        self._done = None
        if on_gpu:
            self._done = torch.cuda.Event()
            self._done.record(torch.cuda.current_stream(device))

    def read(self) -> list[torch.Tensor]:
        """The tensors, on the host."""
        if self._done is not None:
            self._done.synchronize()
        return self._copies


def on_device(tensor: torch.Tensor, device: torch.device) -> torch.Tensor:
    """A host tensor on `device`, without a synchronisation."""
    if device.type != "cuda":
        return tensor.to(device)
    return tensor.pin_memory().to(device, non_blocking=True)


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
