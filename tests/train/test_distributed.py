"""Starting processes, their few collectives, and signals."""

import os
import signal
import subprocess
import sys
import threading

import pytest
import torch
import torch.distributed as dist
from engine_runs import ROOT

from train.engine import signals
from train.engine.signals import PreemptionFlag
from train.engine.world import init_world


def test_any_rank_is_seen_by_all(first_runs):
    """Catches a flag that stays on its rank (it is raised on the last rank and read on the first)."""
    assert first_runs[2]["any_rank"] == [True, False]


@pytest.mark.parametrize("world_size", [1, 2])
def test_a_run_prints_nothing_of_its_own(second_runs, world_size):
    """Catches noise of DeepSpeed and torch: builds, memory, deprecations (1: plain python, 2: torchrun)."""
    assert second_runs[world_size]["stdout"] == ""
    assert second_runs[world_size]["stderr"] == ""


def test_skipped_steps_are_announced(first_runs):
    """Catches output silenced altogether, for which the test above would pass."""
    assert "Skipping step" in first_runs[2]["stdout"]


@pytest.mark.skipif(torch.cuda.is_available(), reason="needs a machine without CUDA")
def test_a_missing_gpu_is_said_before_anything_starts():
    """Catches a traceback out of NCCL."""
    with pytest.raises(ValueError, match=r"run\.device=cuda.*cpu or auto"):
        init_world("cuda")


def test_an_unknown_device_is_refused():
    """Catches a typo that becomes the CPU."""
    with pytest.raises(ValueError, match="choose one of auto, cpu, cuda"):
        init_world("gpu")


def test_every_collective_knows_a_killed_peer(tmp_path):
    """Catches words of gloo that are not known, in the first collective after a real kill or in later ones, and the
    error of a wrong call that is taken for it."""
    code = """if True:
        import os, signal, sys
        import torch
        import torch.distributed as dist
        from train.engine import collectives, signals

        def said(call):
            try:
                call()
            except RuntimeError as error:
                return signals.lost_peer(error), str(error)

        rank = int(sys.argv[2])
        dist.init_process_group("gloo", init_method="file://" + sys.argv[1], rank=rank, world_size=2)
        wrong = said(lambda: dist.broadcast(torch.ones(2, 2).to_sparse(), src=0))
        assert wrong and not wrong[0], wrong
        collectives.barrier()
        if rank == 1:
            os.kill(os.getpid(), signal.SIGKILL)
        calls = {
            "large": lambda: collectives.all_reduce_sum(torch.ones(1 << 22)),
            "small": lambda: collectives.any_rank(torch.ones(1)),
            "barrier": collectives.barrier,
            "gather": lambda: collectives.gather_objects(rank),
            "receive": lambda: collectives.broadcast_object(rank, src=1),
            "send": lambda: collectives.broadcast_object(rank),
        }
        order = sys.argv[3:] + [name for name in calls if name not in sys.argv[3:]]
        for name in order:
            print(name, *said(calls[name]), flush=True)
        os._exit(0)  # as launch/train.py does: the usual way out takes gloo's threads down while they run
    """
    for first in ("large", "gather"):
        command = [sys.executable, "-c", code, str(tmp_path / first)]
        pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE, "text": True}
        ranks = [subprocess.Popen([*command, str(rank), first], cwd=ROOT, **pipes) for rank in range(2)]
        (out, err), _ = [rank.communicate(timeout=120) for rank in ranks]
        assert [rank.returncode for rank in ranks] == [0, -signal.SIGKILL], out + err
        lines = out.splitlines()
        assert len(lines) == 6 and lines[0].startswith(first) and all(line.split()[1] == "True" for line in lines), out


@pytest.mark.parametrize(
    ("error", "lost"),
    [
        (RuntimeError("[gloo/transport/tcp/pair.cc:537] Read error [127.0.0.1]:50870: Connection reset by peer"), True),
        (dist.DistBackendError("NCCL error in: ncclRemoteError: A call failed possibly due to a network error"), True),
        (dist.DistBackendError("ncclSystemError: socketProgress: Connection closed by remote peer host<5>"), True),
        (dist.DistBackendError("NCCL error in: ncclInvalidUsage: Duplicate GPU detected"), False),
        (dist.DistBackendError("ncclUnhandledCudaError: Last error: Cuda failure 2 'out of memory'"), False),
        (RuntimeError("[gloo/allreduce.cc:25] Enforce fail: size of inputs does not match"), False),
        (RuntimeError("the download failed: Connection reset by peer"), False),
        (RuntimeError("Broken pipe"), False),
        (torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB"), False),
    ],
)
def test_a_lost_peer_is_told_from_a_bug(error, lost):
    """Catches a bug whose traceback is taken for the end of another process, and the reverse, in words that no CPU run
    brings about."""
    assert signals.lost_peer(error) is lost


def test_the_end_of_a_process_can_be_reported_before_the_group_is_there():
    """Catches a traceback in place of the report."""
    assert signals.first_to_report()


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_a_signal_sets_the_flag_and_a_third_interrupts(number):
    """Catches a handler that kills at once, or one that can never be overruled."""
    before = signal.getsignal(number)
    flag = PreemptionFlag().install()
    try:
        assert not flag.requested
        os.kill(os.getpid(), number)
        os.kill(os.getpid(), number)
        assert flag.requested
        assert flag.received == signal.Signals(number).name
        with pytest.raises(KeyboardInterrupt):
            os.kill(os.getpid(), number)
    finally:
        flag.uninstall()
    assert signal.getsignal(number) == before


def test_a_process_that_waits_for_ever_says_so():
    """Catches a message that needs Python's handlers: they do not run in a process that waits in C, as NCCL does for
    one that is gone. Here that is a lock taken twice."""
    code = """if True:
        import ctypes, os, signal, threading
        from train.engine.signals import PreemptionFlag

        def stuck(name):
            print(name, flag.received, flush=True)
            os._exit(0)

        flag = PreemptionFlag(stuck, seconds=0.1).install()
        threading.Timer(0.1, os.kill, (os.getpid(), signal.SIGTERM)).start()
        libc, lock = ctypes.CDLL(None), ctypes.create_string_buffer(128)
        libc.pthread_mutex_lock(lock)
        libc.pthread_mutex_lock(lock)
    """
    ended = subprocess.run([sys.executable, "-c", code], cwd=ROOT, check=False, timeout=120, capture_output=True)
    assert (ended.returncode, ended.stdout) == (0, b"SIGTERM None\n"), ended


def test_a_process_that_stops_in_time_says_nothing():
    """Catches a message about a run that was saved."""
    said, before = [], set(threading.enumerate())  # a flag of another test may still have its thread
    flag = PreemptionFlag(said.append, seconds=0.2).install()
    (watcher,) = set(threading.enumerate()) - before
    os.kill(os.getpid(), signal.SIGTERM)
    assert flag.requested
    flag.uninstall()
    watcher.join(60)
    assert not watcher.is_alive() and not said


def test_importing_reads_no_environment_and_no_deepspeed():
    """Catches a module that imports deepspeed before `init` has told it which accelerator there is."""
    modules = (
        "train.engine.world, train.engine.optim, train.step, train.checkpoint.store, train.engine.deepspeed_engine"
    )
    code = f"import sys, {modules}; sys.exit('deepspeed' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], cwd=ROOT, check=False).returncode == 0
