"""Host memory that saves copy into, one after the other.

Fresh memory comes a page at a time, and a copy from a GPU into pageable memory is waited for: at 545M parameters a
step with a save waited 7.3 s on an H100 for its 6.7 GB. So the memory is taken once, in a thread, while training
begins, and pinned for CUDA: then copies are launched and not waited for, and the device's stream keeps them ahead of
the optimizer's next step.
"""

from __future__ import annotations

import weakref
from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor

import torch
from torch import Tensor

from train.engine.pinned import pin, unpin


class HostBuffer:
    """Room for this process's part of a checkpoint. Pageable where CUDA cannot pin it: saves are right, and slower."""

    def __init__(self, elements: int, device: torch.device, say: Callable[[str], None] = lambda line: None) -> None:
        """Starts to take memory for so many float32 `elements`, copied from `device`; `say` gets a line if it could not
        be pinned, once it is used."""
        self._device, self._say, self._used = device, say, 0
        executor = ThreadPoolExecutor(1, thread_name_prefix="host-buffer")
        self._memory: Future[tuple[Tensor, int]] | None = executor.submit(_take, elements, device)
        executor.shutdown(wait=False)
        self._buffer = torch.empty(0)

    def rewind(self) -> None:
        """Gives the memory to the next save: what the last one took may be written over. Waits until there is any."""
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
        """Waits, when called from whichever thread, for the copies launched until now."""
        if self._device.type != "cuda":
            return lambda: None
        event = torch.cuda.Event()
        event.record(torch.cuda.current_stream(self._device))
        return event.synchronize


def _take(elements: int, device: torch.device) -> tuple[Tensor, int]:
    """(memory that exists, CUDA's error code if it could not be pinned)."""
    buffer = torch.empty(elements).zero_()  # the system gives it page by page as it is written first
    if device.type != "cuda":
        return buffer, 0
    torch.cuda.set_device(device)  # each thread begins with the first one
    return buffer, pin(buffer)
