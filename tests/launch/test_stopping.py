"""launch/stopping.py: processes that are gone."""

import subprocess
import sys
import time
from pathlib import Path

from launch.stopping import Peer, _state_of

ROOT = Path(__file__).resolve().parents[2]
STUCK = """
import sys, os, time
sys.path.insert(0, {root!r})
from launch.stopping import Peer, PeerWatch
import launch.stopping

def lost(peer):
    print("lost", peer.rank, flush=True)
    os._exit(1)

pid = int(sys.argv[1])
watch = PeerWatch([Peer(3, pid, launch.stopping._state_of(pid)[1])], lost, seconds=0.2).start()
print("watching", flush=True)
if sys.argv[2] == "stopped":
    watch.stop()
time.sleep(float(sys.argv[3]))  # as in a collective that waits for it
"""


def watched(mode: str, seconds: float) -> tuple[int, str]:
    """Exit code and words of a process that hangs while a peer of it is killed."""
    peer = subprocess.Popen([sys.executable, "-c", "import time; time.sleep(100)"])
    code = STUCK.format(root=str(ROOT))
    stuck = subprocess.Popen(
        [sys.executable, "-c", code, str(peer.pid), mode, str(seconds)], stdout=subprocess.PIPE, text=True
    )
    assert stuck.stdout is not None and stuck.stdout.readline() == "watching\n"
    time.sleep(1.5)
    assert stuck.poll() is None, "ended while its peer was there"
    peer.kill()  # it stays as a zombie until this process looks after it
    out = stuck.communicate(timeout=60)[0]
    peer.wait()
    return stuck.returncode, out


def test_a_process_that_hangs_ends_with_its_peer():
    """Catches a survivor that waits, as NCCL does, for a process that was killed, and a zombie that passes for one that
    lives."""
    assert watched("watching", 100) == (1, "lost 3\n")


def test_peers_may_end_when_the_run_has_ended():
    """Catches a run that ended well and is declared lost since another process was faster to leave."""
    assert watched("stopped", 4) == (0, "")


def test_another_process_with_the_same_number_is_another():
    """Catches a pid that was given to somebody else."""
    child = subprocess.Popen([sys.executable, "-c", "import time; time.sleep(100)"])
    peer = Peer(0, child.pid, _state_of(child.pid)[1])
    assert not peer.is_gone and peer._replace(began="1").is_gone
    child.kill()
    child.wait()
    assert peer.is_gone
