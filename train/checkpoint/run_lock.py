"""The lock on a run directory, so that two live processes never write to one."""

from __future__ import annotations

import fcntl
import os
import socket
from pathlib import Path

from conf.words import cut
from train.engine.collectives import broadcast_object
from train.engine.world import World


class RunLocked(Exception):
    """The run directory cannot be locked: another live process writes to it, or it cannot be created."""


class RunLock:
    """An exclusive lock on a run directory, held until `release` or the end of the process, however it ends.

    It is an flock on `.lock` (on shared file systems too, where they support it); the text inside only says who holds
    it.
    """

    def __init__(self, run_dir: Path) -> None:
        """Takes the lock. Raises RunLocked, naming the holder if another live process has it."""
        try:
            run_dir.mkdir(parents=True, exist_ok=True)
            self._file = open(run_dir / ".lock", "a+", encoding="utf-8", errors="replace")  # noqa: SIM115 - held for the life of the run
        except OSError as error:
            raise RunLocked(f"run.dir={run_dir} cannot be written ({error.strerror}): choose another") from None
        try:
            fcntl.flock(self._file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            self._file.seek(0)
            holder = cut(self._file.read()) or "another process"
            self._file.close()
            raise RunLocked(
                f"{run_dir} is in use by {holder}: wait for it, stop it, or choose another run.dir"
            ) from None
        self._file.truncate(0)
        self._file.write(f"process {os.getpid()} on {socket.gethostname()}\n")
        self._file.flush()

    def release(self) -> None:
        """Releases the lock."""
        self._file.close()


def lock_run(run_dir: Path, world: World) -> RunLock | None:
    """Returns rank 0's lock (None on other ranks). Raises RunLocked on all ranks alike."""
    lock = message = None
    if world.is_main:
        try:
            lock = RunLock(run_dir)
        except RunLocked as error:
            message = str(error)
    message = broadcast_object(message)
    if message is not None:
        raise RunLocked(message)
    return lock
