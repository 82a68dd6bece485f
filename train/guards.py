"""What keeps a run from harming itself: the limit on bad steps in a row, and the lock on its directory."""

from __future__ import annotations

import fcntl
import os
import socket
from pathlib import Path

from train.distributed import World, broadcast_object


class NonFiniteError(Exception):
    """Too many steps in a row had a loss or a gradient that was not finite."""


class RunLocked(Exception):
    """Another live process writes to the run directory."""


class NonFiniteGuard:
    """Counts skipped steps and ends the run after `limit` in a row (0 = never)."""

    def __init__(self, limit: int) -> None:
        self.limit = limit
        self.streak = 0
        self.total = 0

    def update(self, skipped: bool, *, tokens: int, last_checkpoint: Path | None) -> None:
        """Counts one step that ended at `tokens`. Raises NonFiniteError, naming what to go back to, at the limit."""
        self.streak = self.streak + 1 if skipped else 0
        self.total += int(skipped)
        if self.limit and self.streak >= self.limit:
            kept = f"The last checkpoint is {last_checkpoint}" if last_checkpoint else "There is no checkpoint yet"
            raise NonFiniteError(
                f"{self.streak} steps in a row had a non-finite loss or gradient, up to {tokens:,} tokens (skipped). "
                f"{kept}. A lower optim.lr.peak, a longer optim.lr.warmup_tokens or a smaller optim.grad_clip may help "
                f"(the limit is optim.max_bad_steps={self.limit})"
            )

    def state_dict(self) -> dict[str, int]:
        """Returns the counts, for a checkpoint."""
        return {"streak": self.streak, "total": self.total}

    def load_state_dict(self, state: dict[str, int]) -> None:
        """Takes counts of an earlier process."""
        self.streak, self.total = state["streak"], state["total"]


class RunLock:
    """An exclusive lock on a run directory, held until `release` or the end of the process, however it ends.

    It is an flock on `.lock` (on shared file systems too, where they support it); the text inside only says who holds
    it.
    """

    def __init__(self, run_dir: Path) -> None:
        """Takes the lock. Raises RunLocked, naming the holder, if another live process has it."""
        run_dir.mkdir(parents=True, exist_ok=True)
        self._file = open(run_dir / ".lock", "a+", encoding="utf-8")  # noqa: SIM115 - held for the life of the run
        try:
            fcntl.flock(self._file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            self._file.seek(0)
            holder = self._file.read().strip() or "another process"
            self._file.close()
            raise RunLocked(
                f"{run_dir} is in use by {holder}: wait for it, stop it, or choose another run.dir"
            ) from None
        self._file.truncate(0)
        self._file.write(f"process {os.getpid()} on {socket.gethostname()}\n")
        self._file.flush()

    def release(self) -> None:
        """Gives the lock up."""
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
