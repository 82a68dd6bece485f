"""The Gluon kernels without a GPU: their source in an emulator, against the definition in float64; and
compiled for Hopper. test_triton_gpu.py runs them on a GPU.
"""

from __future__ import annotations

import os
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from packs import Pack, by_bounds

pytest.importorskip("triton", reason="the triton backend needs triton")

import triton
from gluon_compile import arrivals
from gluon_emulator import emulated

from moba.backends import triton_attention as backend
from moba.backends import triton_backward, triton_forward, triton_tiles
from moba.reference import reference_attention

moba_triton = by_bounds(backend.moba_triton)


def interpreted(test):
    """The kernels around those in Gluon run in Triton's interpreter, which computes masked lanes too."""
    test = pytest.mark.filterwarnings("ignore::RuntimeWarning")(test)
    return pytest.mark.skipif(not backend.INTERPRETED, reason="needs the interpreter")(test)


def run(pack, inputs, monkeypatch, edit=lambda name, source: source, item_rows=None):
    """[out, lse, dq, dk, dv] of the Gluon kernels."""
    modules = emulated(edit)
    with monkeypatch.context() as patch:
        for module in (triton_forward, triton_backward):
            patch.setattr(
                module, "gluon_kernels", lambda name, *_: modules[f"gluon_{name}"] if uses(name, pack) else None
            )
        if item_rows is not None:
            patch.setattr(triton_backward, "_long_item_rows", lambda *_: item_rows)
            short = triton_tiles.TILES["backward_short", 128]
            patch.setitem(triton_tiles.TILES, ("backward_short", 128), replace(short, tiles=item_rows // short.rows))
        return gradients(moba_triton, inputs, pack.options)


def uses(name, pack):
    return name == "short" or pack.block_size > 128


def gradients(function, inputs, options):
    q, k, v, d_out, d_lse = inputs
    q, k, v = (x.detach().requires_grad_() for x in (q, k, v))
    out, lse = function(q, k, v, **options)
    return [out, lse, *torch.autograd.grad((out, lse), (q, k, v), (d_out.to(out), d_lse.to(lse)))]


def inputs_of(pack):
    q, k, v = pack.tensors()
    generator = torch.Generator().manual_seed(1)
    d_out = torch.randn(q.shape, generator=generator).to(q.dtype)
    return [q, k, v, d_out, torch.randn(q.shape[1::-1], generator=generator)]


def assert_right(got, pack, inputs):
    want = gradients(
        lambda *qkv, **options: reference_attention(*qkv, **options, return_lse=True),
        [x.double() for x in inputs],
        pack.options,
    )
    for name, a, b in zip(("out", "lse", "dq", "dk", "dv"), got, want):
        error = ((a.double() - b).norm() / b.norm()).item()
        assert error < 2e-3, f"{name}: relative error {error:.1e}"


def pack_of(lengths, block_size, top_k, heads, **options):
    return Pack(lengths, block_size, top_k, heads, head_dim=128, dtype=torch.float16, **options)


# pack, rows of a work item of the backward (for long blocks: for dK and dV)
CASES = {
    "grouped heads, tails, a document of one token": (pack_of([190, 1, 40], 160, 2, (4, 2)), None),
    "blocks of whole tiles, lists cut into items": (pack_of([290, 20], 256, 2, (2, 2)), 128),
    "queries are the last tokens; first block": (
        pack_of([150, 7], 160, 3, (2, 1), extra=[400, 90], first_blocks=1), None,
    ),
    "short blocks: grouped heads, tails, documents of one token and of one key tile": (
        pack_of([300, 1, 64, 225], 128, 3, (4, 2)), None,
    ),
    "blocks of 96 keys, lists cut into items": (pack_of([400, 20], 96, 3, (2, 2)), 128),
    "blocks of 65 keys": (pack_of([150, 70], 65, 2, (2, 1)), None),
    "blocks of 128 keys, lists cut into items": (pack_of([384], 128, 2, (4, 1)), 128),
    "short blocks whose first tokens are no queries; first block": (
        pack_of([150, 7], 128, 3, (2, 1), extra=[300, 90], first_blocks=1), None,
    ),
}  # fmt: skip


@interpreted
@pytest.mark.parametrize("case", CASES)
def test_emulated_kernels_match_the_definition(case, monkeypatch):
    """Catches wrong masks, wrong tiles and rows, products of the wrong operands, and barriers that let a partition
    read too early or overwrite too early, or that deadlock."""
    pack, item_rows = CASES[case]
    inputs = inputs_of(pack)
    assert_right(run(pack, inputs, monkeypatch, item_rows=item_rows), pack, inputs)


@interpreted
@pytest.mark.parametrize("block_size", [160, 128, 96])
def test_a_document_does_not_see_the_next(block_size, monkeypatch):
    """Tiles that end past a block hold keys and values of the next document. Catches a weight of zero times NaN, as
    without `clear_past_end` in the forward, or for dQ, or with dQ's mask on the weights alone; in short blocks without
    it on the keys of both consumers, or on the values."""
    pack = pack_of([170, 30], block_size, 2, (2, 1))
    inputs = inputs_of(pack)
    clean = run(pack, inputs, monkeypatch)
    for x in inputs[:4]:
        x[170::2], x[171::2] = float("nan"), float("inf")
    for a, b in zip(run(pack, inputs, monkeypatch), clean):
        a, b = (x[:, :170] if x.dim() == 2 else x[:170] for x in (a, b))
        assert torch.equal(a, b)


# file, what is there, what stands there instead
ERRORS = {
    "forward mask off by one": ("gluon_forward", "key[None, :] <= last_key", "key[None, :] < last_key"),
    "last row counted twice": ("gluon_backward", "length, GROUP), -1)", "length, GROUP), length - 1)"),
    "one arrival where two consumers read": ("gluon_backward", "make_barriers(STAGES, 2)", "make_barriers(STAGES, 1)"),
    "rows handed over before they came": ("gluon_backward", "async_copy.wait_group(1)", "async_copy.wait_group(2)"),
    "short: mask off by one": ("gluon_short", "key[:, None] <= last_key", "key[:, None] < last_key"),
    "short: last row counted twice": ("gluon_short", "length, GROUP), -1)", "length, GROUP), length - 1)"),
    "short: one half of dS for both": ("gluon_short", "make_barriers(2, 2), make", "make_barriers(2, 1), make"),
    "short: dS overwritten while it is read": (
        "gluon_short", "mbarrier.wait(d_empty.index(place), ((t // 2) & 1) ^ 1)", "pass",
    ),
    "short: dQ of a tile stored over the one before": ("gluon_short", "tma.store_wait(0)  #", "#"),
    "short: dQ past an item's end": ("gluon_short", "(first_slot + TILE <= end)", "(first_slot <= end)"),
}  # fmt: skip


@interpreted
@pytest.mark.parametrize("error", ERRORS)
def test_the_emulator_notices(error, monkeypatch):
    """A wrong mask, count or wait put into the kernels fails: else the tests above would show nothing."""
    file, there, instead = ERRORS[error]

    def edit(name, source):
        assert name != file or there in source
        return source.replace(there, instead) if name == file else source

    block_size = 128 if file == "gluon_short" else 160
    pack = pack_of([290, 30] if file == "gluon_short" else [190, 30], block_size, 2, (2, 1))
    inputs = inputs_of(pack)
    with pytest.raises((AssertionError, RuntimeError, IndexError)):
        assert_right(run(pack, inputs, monkeypatch, edit), pack, inputs)


def test_arrivals_that_come_too_early_are_counted():
    """Catches a count that sees nothing: of three arrivals one comes after a load without a barrier of the threads, and
    one after a product."""
    product, load = "wgmma.mma_async.sync.aligned.m64n128k16 ...", "ld.shared.b32 %r1, [%r2];"
    arrive, barrier = "@%p1 mbarrier.arrive.shared::cta.b64 _, [%r3];", "bar.sync 2, 128;"
    assert arrivals("\n".join([load, arrive, barrier, arrive, barrier, product, arrive])) == (3, 2)


def test_kernels_compile_for_hopper(tmp_path):
    """Catches what Gluon or the assembler of this Triton does not take, more shared memory than a multiprocessor has
    (227 KB), matrix products that the assembler makes wait for each other, which halves the speed (it does so where
    registers do not suffice, and says so in its log alone), and a thread that tells a barrier that its group is done
    before the group's other threads are."""
    if not (Path(triton.__file__).parent / "backends" / "nvidia" / "bin" / "ptxas").exists():
        pytest.skip("this Triton comes without an assembler for NVIDIA GPUs")
    script = Path(__file__).with_name("gluon_compile.py")
    environment = {**os.environ, "TRITON_INTERPRET": "0", "TRITON_CACHE_DIR": str(tmp_path)}
    environment["TRITON_DUMP_PTXAS_LOG"] = "1"
    environment["PYTHONPATH"] = str(script.parents[2])
    done = subprocess.run([sys.executable, script], env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    lines = done.stdout.splitlines()
    compiled = [[int(x) for x in line.split()[1:]] for line in lines if line.startswith("compiled")]
    assert len(compiled) == 4
    for shared, number, early in compiled:
        assert 128 * 1024 < shared <= 227 * 1024 and number > 4 and early == 0
    assert sum("Used" in line and "registers" in line for line in lines) == 4, "the assembler's log"
    assert not [line for line in lines if "wgmma" in line and "serializ" in line]
