"""How a run ends before its time: the signals that ask it to, its exit code then, and a torchrun that is gone.

SIGTERM, SIGINT and SIGUSR1 (as schedulers send ahead of a time limit) save a checkpoint after the step in hand and end
the run. It ends with 128 + the signal's number, as a shell would say; 0 means that what was asked for is done.
"""

from __future__ import annotations

import os
import signal
import threading
import time
from collections.abc import Callable

import torch.distributed as dist

from train.engine.collectives import gather_objects
from train.engine.signals import STUCK_SECONDS, PreemptionFlag

EXIT_FAILED = 1
PARENT_GONE = "the end of torchrun"
PARENT = os.getppid()
LOOK_SECONDS = 1.0


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
