"""Host memory that checkpoints are copied into, reused from save to save.

Fresh memory is mapped page by page, and a copy from a GPU into pageable memory is synchronous: at 545M parameters a
step with a save waited 7.3 s on an H100 for its 6.7 GB. So the memory is allocated once, in a thread, while training
begins, and pinned: copies are then asynchronous, and the stream orders them before the optimizer's next step.
"""

from __future__ import annotations

import weakref
from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor

import torch
from torch import Tensor

from train.engine.pinned import pin, unpin


class HostBuffer:
    """Room for this process's part of a checkpoint. Pageable where CUDA cannot pin it: saves are then slower."""

    def __init__(self, elements: int, device: torch.device, say: Callable[[str], None] = lambda line: None) -> None:
        """Starts to allocate `elements` float32 for copies from `device`; on first use `say` gets a line if it could
        not be pinned."""
        self._device, self._say, self._used = device, say, 0
        executor = ThreadPoolExecutor(1, thread_name_prefix="host-buffer")
        self._memory: Future[tuple[Tensor, int]] | None = executor.submit(_take, elements, device)
        executor.shutdown(wait=False)
        self._buffer = torch.empty(0)

    def rewind(self) -> None:
        """Makes the memory free for the next save, which overwrites the last one. Waits until it is allocated."""
        self._used = 0
        if self._memory is None:
            return
        self._buffer, code = self._memory.result()
        self._memory = None
        if self._buffer.is_pinned():
            weakref.finalize(self, unpin, self._buffer).atexit = False
        elif code:
            size = self._buffer.nbytes / 2**30
            self._say(
                f"{size:.1f} GiB of host memory cannot be pinned (CUDA error {code}): each save holds up training"
            )

    def take(self, numel: int) -> Tensor:
        """float32 `[numel]`, to be filled with a non-blocking copy."""
        start, self._used = self._used, self._used + numel
        assert self._used <= len(self._buffer), (self._used, len(self._buffer))
        return self._buffer[start : self._used]

    def copied(self) -> Callable[[], None]:
        """A function, for any thread, that waits for the copies launched until now."""
        if self._device.type != "cuda":
            return lambda: None
        event = torch.cuda.Event()
        event.record(torch.cuda.current_stream(self._device))
        return event.synchronize


def _take(elements: int, device: torch.device) -> tuple[Tensor, int]:
    """(memory, CUDA's error code: 0 if it is pinned)."""
    buffer = torch.empty(elements).zero_()  # the system gives it page by page as it is written first
    if device.type != "cuda":
        return buffer, 0
    torch.cuda.set_device(device)  # a new thread is on device 0
    return buffer, pin(buffer)
