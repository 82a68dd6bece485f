"""What ends a run from outside: signals to stop, and processes that have ended."""

from __future__ import annotations

import re
import signal
import socket
import threading
from collections.abc import Callable
from typing import Any

import torch.distributed as dist

STOPS = (signal.SIGTERM, signal.SIGINT, signal.SIGUSR1)  # schedulers send the last ahead of a time limit
SIGNALS_TO_FORCE = 3
STUCK_SECONDS = 20  # torchrun kills 30 s after its SIGTERM
# How gloo and NCCL say that the process at the other end is gone. No type of error stands for that alone.
PEER_GONE = re.compile(r"(closed|reset) by (remote )?peer|Broken pipe|remote process exited|ncclRemoteError")


class PreemptionFlag:
    """Remembers that one of STOPS arrived, so that a run can end at the next step boundary with a checkpoint.

    `train_step` carries `requested` in its first all-reduce, so all ranks stop after the same step whichever got the
    signal. Under torchrun one Ctrl-C arrives twice (from the terminal and from the agent), so only a third signal
    interrupts at once.
    """

    def __init__(self, stuck: Callable[[str], None] = lambda name: None, seconds: float = STUCK_SECONDS) -> None:
        """`stuck(name of the signal)` is called from a thread if the flag is still installed `seconds` later: NCCL may
        wait for a process that has ended, and Python's handlers do not run meanwhile."""
        self.received: str | None = None
        self._count = 0
        self._previous: dict[int, Any] = {}
        self._stuck, self._seconds = stuck, seconds

    @property
    def requested(self) -> bool:
        """True once a signal arrived in this process."""
        return self.received is not None

    def install(self) -> PreemptionFlag:
        """Returns self, having replaced the handlers of STOPS (main thread only)."""
        for number in STOPS:
            self._previous[number] = signal.signal(number, self._handle)
        bell, self._ring = socket.socketpair()
        self._ring.setblocking(False)
        signal.set_wakeup_fd(self._ring.fileno(), warn_on_full_buffer=False)
        threading.Thread(target=self._watch, args=(bell,), daemon=True).start()
        return self

    def uninstall(self) -> None:
        """Puts the earlier handlers back."""
        for number, handler in self._previous.items():
            signal.signal(number, handler)
        if self._previous:
            signal.set_wakeup_fd(-1)
            self._ring.close()
        self._previous.clear()

    def _watch(self, bell: socket.socket) -> None:
        """Waits for a signal, then for `uninstall`. C code writes the byte that wakes it as the signal arrives."""
        with bell:
            if number := bell.recv(1):
                bell.settimeout(self._seconds)
                try:
                    while bell.recv(64):
                        pass
                except TimeoutError:
                    self._stuck(signal.Signals(number[0]).name)

    def _handle(self, number: int, frame: Any) -> None:
        self.received = self.received or signal.Signals(number).name
        self._count += 1
        if self._count >= SIGNALS_TO_FORCE:
            self.uninstall()
            raise KeyboardInterrupt


def lost_peer(error: RuntimeError) -> bool:
    """Whether this is a collective that failed because another process of the run has ended.

    gloo raises a plain RuntimeError that names its source file, NCCL a DistBackendError. NCCL raises that for memory
    and mistaken use as well, so the text has to say it, too.
    """
    text = str(error)
    return (isinstance(error, dist.DistError) or "gloo/" in text) and PEER_GONE.search(text) is not None


def first_to_report() -> bool:
    """True in the first process of the run that calls it, even if others, rank 0 included, have ended: torchrun's store
    holds the counter. Without torchrun rank 0 would hold it, so there it is True in each process."""
    if not (dist.is_initialized() and dist.is_torchelastic_launched()):
        return True
    try:
        return dist.distributed_c10d._get_default_store().add("reports", 1) == 1
    except RuntimeError:  # torchrun is gone, too
        return True
