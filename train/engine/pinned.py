"""Pinned (page-locked) host memory, for asynchronous copies.

Registered directly: torch's pinned allocator rounds up to powers of two, up to twice what is needed.
"""

from __future__ import annotations

from torch import Tensor, cuda


def pin(buffer: Tensor) -> int:
    """Pins a tensor's memory for all devices; returns CUDA's error code, 0 if it is pinned. `unpin` it before it is
    freed."""
    return int(_runtime().cudaHostRegister(buffer.data_ptr(), buffer.nbytes, 1))  # 1: for every device


def unpin(buffer: Tensor) -> None:
    """Makes pinned memory pageable again."""
    _runtime().cudaHostUnregister(buffer.data_ptr())


def _runtime():
    runtime = cuda.cudart()
    assert runtime is not None
    return runtime
