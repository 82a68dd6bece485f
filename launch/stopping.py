"""How a run ends before its time: the signals that ask it to, its exit code then, and a torchrun or a process that is
gone.

SIGTERM, SIGINT and SIGUSR1 (as schedulers send ahead of a time limit) save a checkpoint after the step in hand and end
the run. It ends with 128 + the signal's number, as a shell would say; 0 means that what was asked for is done.
"""

from __future__ import annotations

import os
import signal
import threading
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import NamedTuple

import torch.distributed as dist

from train.engine.collectives import gather_objects
from train.engine.signals import STUCK_SECONDS, PreemptionFlag

EXIT_FAILED = 1
PARENT_GONE = "the end of torchrun"
PARENT = os.getppid()
LOOK_SECONDS = 1.0
LOST_SECONDS = 5.0  # in which a collective that notices for itself ends the process first


def stop_reasons(flag: PreemptionFlag) -> list[str]:
    """What asked the run to stop, of all its processes; a collective."""
    return list(dict.fromkeys(reason for reason in gather_objects(flag.received) if reason))


def exit_code(reasons: list[str]) -> int:
    """The exit code of a run that was saved and stopped for these reasons."""
    numbers = [signal.Signals[name].value for name in reasons if name in signal.Signals.__members__]
    return 128 + numbers[0] if numbers else EXIT_FAILED


class ParentWatch:
    """Ends this process when the torchrun that started it is gone: killed outright, it ends none of its workers.

    Until `flag` is set there is nothing to save, and the process ends at once; from then on the run is asked to save
    and stop, and is ended where that takes longer than `seconds`.
    """

    def __init__(self, parent: int = PARENT, seconds: float = STUCK_SECONDS):
        self.flag: PreemptionFlag | None = None
        self._parent, self._seconds = parent, seconds

    def start(self) -> ParentWatch:
        """Returns self, watching where torchrun started this process."""
        if dist.is_torchelastic_launched():
            threading.Thread(target=self._watch, daemon=True).start()
        return self

    def _watch(self, leave: Callable[[int], None] = os._exit) -> None:
        while os.getppid() == self._parent:
            time.sleep(LOOK_SECONDS)
        if self.flag is not None:
            self.flag.received = self.flag.received or PARENT_GONE
            time.sleep(self._seconds)
        leave(EXIT_FAILED)


class Peer(NamedTuple):
    """A process of the run."""

    rank: int
    pid: int
    began: str
    """When it was started, as the system counts: another one may have the same pid later, or elsewhere."""

    @property
    def is_gone(self) -> bool:
        """Whether it has ended, or is on another host."""
        state, began = _state_of(self.pid)
        return state in ("", "Z", "X") or began != self.began


def _state_of(pid: int) -> tuple[str, str]:
    """(state, start time) of a process as /proc has them; ("", "") for none, ("?", "") where there is no /proc."""
    if not Path("/proc/self/stat").exists():
        return "?", ""
    try:
        # What stands before the last bracket is its name, which may hold anything.
        words = Path(f"/proc/{pid}/stat").read_text(encoding="utf-8", errors="replace").rpartition(")")[2].split()
    except OSError:
        return "", ""
    return words[0], words[19]


def peers_here() -> list[Peer]:
    """The other processes of the run that can be seen from this one: those of its host, whatever hosts are called. A
    collective."""
    own = Peer(dist.get_rank(), os.getpid(), _state_of(os.getpid())[1])
    return [peer for peer in gather_objects(own) if peer != own and not peer.is_gone]


class PeerWatch:
    """Ends this process when another one of this host has ended in the middle of the run.

    With gloo a collective notices that by itself. With NCCL it waits, and what came after the newest checkpoint is lost
    either way.
    """

    def __init__(self, peers: Sequence[Peer], lost: Callable[[Peer], None], seconds: float = LOST_SECONDS):
        """lost(peer) is called from a thread, `seconds` after one of `peers` was seen to be gone; it has to end the
        process."""
        self._peers, self._lost, self._seconds, self._stopped = peers, lost, seconds, threading.Event()

    def start(self) -> PeerWatch:
        """Returns self, watching."""
        threading.Thread(target=self._watch, daemon=True).start()
        return self

    def stop(self) -> None:
        """From now on they may end."""
        self._stopped.set()

    def gone(self, seconds: float = LOOK_SECONDS) -> Peer | None:
        """The first of them that has ended, or ends within so many seconds; None if none does."""
        deadline = time.monotonic() + seconds
        while (found := next((peer for peer in self._peers if peer.is_gone), None)) is None:
            if time.monotonic() > deadline:
                return None
            time.sleep(0.05)
        return found

    def _watch(self) -> None:
        while self._peers and not self._stopped.wait(LOOK_SECONDS):
            gone = self.gone(0.0)
            if gone is not None and not self._stopped.wait(self._seconds):
                self._lost(gone)
                return
