"""Steps that are made ahead: the same as made when asked for, and nothing of the thread that makes them is seen."""

import json
import multiprocessing
import subprocess
import sys
import threading
import time
from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from test_loader import LAYOUTS, LENGTHS, LONG, MIX, CountingSource, two

from data.errors import DataError
from data.loader import Loader
from data.mixture import Mixture
from data.packing import Packer, make_batch

ROOT = Path(__file__).resolve().parents[2]
FIELDS = ("tokens", "labels", "positions", "cu_seqlens")
STAGES = st.lists(
    st.tuples(st.integers(1, 24), st.sampled_from([4, 8]), LONG, st.integers(0, 3)), min_size=1, max_size=4
)


def plain_steps(sources, seed, stages, interleave=2):
    """The packs of every step of these stages, and (draws, counts, pieces) behind it: one mixture and a packer per
    stage, nothing ahead, nothing started again in between."""
    mixture, pieces, steps = Mixture({name: s.lengths for name, s in sources.items()}, seed), [], []
    for seq_len, num_packs, long_documents, num_steps in stages:
        mixture.set_mix(MIX, long_documents)
        documents = mixture.num_documents(seq_len, list(sources))
        packer = Packer(seq_len, mixture, pieces, max(1, min(interleave, documents)))
        for _ in range(num_steps):
            packs = [packer.next_pack() for _ in range(num_packs)]
            steps.append((packs, (mixture.draws, dict(mixture.counts), packer.pieces)))
        pieces = packer.pieces if num_steps else pieces  # a packer that makes nothing still puts them in order
    return steps


def enter(loader, stage, packs_per_micro=1):
    seq_len, num_packs, long_documents, _ = stage
    loader.set_stage(
        seq_len=seq_len,
        batch_tokens=num_packs * seq_len,
        micro_tokens=packs_per_micro * seq_len,
        mix=MIX,
        long_documents=long_documents,
    )


def assert_equal(batch, wanted):
    assert batch.windows == wanted.windows
    for field in FIELDS:
        assert torch.equal(getattr(batch, field), getattr(wanted, field)), field


@settings(deadline=None, max_examples=60)
@given(LENGTHS, LENGTHS, STAGES, LAYOUTS, st.integers(0, 2**63), st.data())
def test_ahead_is_what_plain_mixture_and_packer_give(a, b, stages, layout, seed, data):
    """Catches a batch, or a state, that what was made ahead has touched: over stages, ranks and saves at any steps, the
    batches and the state behind each are those of a mixture and a packer that nobody runs ahead of."""
    sources, (num_ranks, size) = two(a, b), layout
    wanted = iter(plain_steps(sources, seed, stages))
    rank = data.draw(st.integers(0, num_ranks - 1))

    def new():
        return Loader(sources, seed=seed, rank=rank, world_size=num_ranks, interleave=2)

    loader = new()
    for stage in stages:
        enter(loader, stage, size)
        for _ in range(stage[3]):
            if data.draw(st.booleans()):
                state = json.loads(json.dumps(loader.state_dict()))
                loader = new() if data.draw(st.booleans()) else loader  # another process, or the same one set back
                enter(loader, stage, size)
                loader.load_state_dict(state)
            packs, (draws, counts, pieces) = next(wanted)
            micro = [packs[i : i + size] for i in range(rank * size, len(packs), num_ranks * size)]
            batches = loader.next_step()
            assert len(batches) == len(micro)
            for batch, own in zip(batches, micro):
                windows = [window for pack in own for window in pack]
                assert_equal(batch, make_batch(windows, lambda w: sources[w.source].window(*w[1:])))
            state = loader.state_dict()
            assert (state["draws"], state["counts"]) == (draws, counts)
            assert state["pieces"] == [list(piece) for piece in pieces]


class WatchedSource(CountingSource):
    """Notes the thread of every read; waits before it, or fails at it, when told to."""

    def __init__(self, *arguments):
        super().__init__(*arguments)
        self.readers, self.gate, self.error = [], threading.Event(), None
        self.gate.set()

    def window(self, document, start, length):
        self.readers.append(threading.current_thread())
        assert self.gate.wait(60)
        if self.error is not None:
            raise self.error
        return super().window(document, start, length)


def watched(seq_len=4):
    source = WatchedSource("a", [9] * 50)
    loader = Loader({"a": source}, seed=0)
    loader.set_stage(seq_len=seq_len, batch_tokens=4 * seq_len, micro_tokens=seq_len, mix={"a": 1.0})
    return source, loader


def wait_for(condition):
    end = time.monotonic() + 60
    while not condition():
        assert time.monotonic() < end
        time.sleep(0.001)


def wait_for_threads():
    """Until no step is in the making, and no thread is left."""
    wait_for(lambda: not any(thread.name.startswith("loader") for thread in threading.enumerate()))


def test_the_next_step_is_read_while_this_one_is_used():
    """Catches a loader that reads only when asked, one that reads in the caller's thread, and a thread that outlives
    its step."""
    source, loader = watched()
    loader.next_step()
    wait_for_threads()
    source.readers.clear()
    loader.next_step()
    wait_for_threads()
    assert source.readers and threading.current_thread() not in source.readers


def test_the_state_and_a_new_stage_do_not_see_what_is_half_made():
    """Catches a state that waits for, or takes up, the step in the making; and a stage that begins behind it."""
    source, loader = watched()
    _, undisturbed = watched()
    undisturbed.next_step()
    loader.next_step()
    wait_for_threads()
    source.gate.clear()
    read = len(source.readers)
    loader.next_step()
    undisturbed.next_step()
    wait_for(lambda: len(source.readers) > read)
    assert loader.state_dict() == undisturbed.state_dict()
    threading.Timer(0.05, source.gate.set).start()
    for one in (loader, undisturbed):
        one.set_stage(seq_len=6, batch_tokens=12, micro_tokens=12, mix={"a": 1.0})
    for batch, wanted in zip(loader.next_step(), undisturbed.next_step(), strict=True):
        assert_equal(batch, wanted)


def test_an_error_ahead_reaches_who_asks_for_that_step():
    """Catches errors that are lost, wrapped, or raised a step too early, and steps that are passed over by them."""
    source, loader = watched()
    _, undisturbed = watched()
    loader.next_step()
    undisturbed.next_step()
    wait_for_threads()
    source.error = DataError("the disk is gone")
    second = loader.next_step()
    for batch, wanted in zip(second, undisturbed.next_step(), strict=True):
        assert_equal(batch, wanted)
    state = loader.state_dict()
    for _ in range(2):
        with pytest.raises(DataError) as caught:
            loader.next_step()
        assert caught.value is source.error
    assert loader.state_dict() == state
    source.error = None
    for batch, wanted in zip(loader.next_step(), undisturbed.next_step(), strict=True):
        assert_equal(batch, wanted)


EXITS = """
import sys, time
sys.path.insert(0, sys.argv[1])
from test_loader_ahead import watched
source, loader = watched()
loader.next_step()
window, source.window = source.window, lambda *where: (time.sleep(0.05), window(*where))[1]
loader.next_step()
print("done", flush=True)
if sys.argv[2] == "error":
    raise RuntimeError("in training")
"""


@pytest.mark.parametrize(("way", "code"), [("return", 0), ("error", 1)])
def test_an_interpreter_ends_with_a_step_in_the_making(way, code):
    """Catches a thread that keeps a process from ending, or brings it down as it ends."""
    command = [sys.executable, "-c", EXITS, str(Path(__file__).parent), way]
    ended = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=120)
    assert (ended.stdout, ended.returncode) == ("done\n", code), ended.stderr
    assert ("in training" in ended.stderr) == (way == "error") and "terminate" not in ended.stderr


def test_a_forked_child_ends_with_a_step_in_the_making():
    """Catches a child process that waits for the thread that only its parent has."""
    source, loader = watched()
    loader.next_step()
    loader.next_step()
    source.gate.clear()
    child = multiprocessing.get_context("fork").Process(target=loader.state_dict)
    child.start()
    child.join(60)
    source.gate.set()
    assert child.exitcode == 0


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
def test_batches_for_a_gpu_are_pinned():
    """Catches copies to the GPU that wait for the device, in the first step or in those made ahead."""
    source, plain = watched()
    loader = Loader({"a": source}, seed=0, pin_for=torch.device("cuda", torch.cuda.current_device()))
    loader.set_stage(seq_len=4, batch_tokens=16, micro_tokens=4, mix={"a": 1.0})
    for _ in range(3):
        for batch, wanted in zip(loader.next_step(), plain.next_step(), strict=True):
            assert all(getattr(batch, field).is_pinned() for field in FIELDS)
            assert_equal(batch, wanted)
