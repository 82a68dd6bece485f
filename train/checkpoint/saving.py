"""Asynchronous saves: each process writes its files in a thread, the ranks synchronise in the training thread.

The writing thread touches only files and host memory and runs no collective: collectives of two threads could be
ordered differently on another rank. `poll` and `wait`, in the training thread, exchange whether all ranks wrote, and
the entries of the manifest.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from typing import Any, TypeVar

from safetensors import SafetensorError
from torch import distributed as dist

from train.checkpoint import checkpoint_dir
from train.checkpoint.checkpoint_dir import CheckpointError, Entry
from train.engine.collectives import barrier, gather_objects

T = TypeVar("T")


class Saving:
    """A checkpoint that is being written. `poll` and `wait` are collectives, and raise as `attempt` does."""

    def __init__(
        self, temporary: Path, write: Callable[[], dict[str, Entry]], finish: Callable[[dict[str, Entry]], None]
    ) -> None:
        """Starts `write`, which writes this process's files and returns their manifest entries. When all ranks have
        finished it, rank 0 calls `finish` with the entries of all. Both run in a thread."""
        self.path = temporary.with_name(temporary.name.removeprefix(checkpoint_dir.SAVING))
        self.seconds = 0.0
        """Seconds that this process's thread has worked so far."""
        self._temporary, self._finish = temporary, finish
        self._finishing = False
        self._work: Future[Any] = self._start(write)

    def poll(self) -> bool:
        """True, on all ranks, once the checkpoint exists; does not wait for files."""
        return all(gather_objects(self._work.done())) and self._next()

    def wait(self) -> Path:
        """Waits for the checkpoint; returns its directory."""
        while not self._next():
            pass
        return self.path

    def _next(self) -> bool:
        """Waits for the work in progress on all ranks; True if it was the last."""
        done = attempt(self._temporary, self._work.result)
        if self._finishing:
            return True
        entries = {file: entry for part in gather_objects(done) for file, entry in part.items()}
        self._finishing = True
        self._work = self._start(lambda: self._finish(entries) if dist.get_rank() == 0 else None)
        return False

    def _start(self, work: Callable[[], Any]) -> Future[Any]:
        def timed() -> Any:
            began = time.perf_counter()
            try:
                return work()
            finally:
                self.seconds += time.perf_counter() - began

        executor = ThreadPoolExecutor(1, thread_name_prefix="saving")
        future = executor.submit(timed)
        executor.shutdown(wait=False)
        return future


def attempt(temporary: Path, action: Callable[[], T]) -> T:
    """Returns action(). If it could not write, here or on any other rank, all remove `temporary` and raise together."""
    done: list[T] = []
    failure = None
    try:
        done.append(action())
    except (OSError, SafetensorError) as error:
        failure = str(error) or repr(error)  # an error may have no text
    failures = [f"rank {rank}: {text}" for rank, text in enumerate(gather_objects(failure)) if text]
    if failures:
        if dist.get_rank() == 0:
            checkpoint_dir.discard(temporary)
        barrier()
        raise CheckpointError(
            f"could not save {temporary.name.removeprefix(checkpoint_dir.SAVING)} in {temporary.parent}: "
            f"{'; '.join(failures)}. Earlier checkpoints are unchanged"
        )
    return done[0]
