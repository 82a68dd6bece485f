"""The fused Triton kernels on a GPU, in half precision, against dense attention in float64 over the same blocks.

What the interpreter cannot show: tensor cores and their operand layouts, bfloat16, races, host synchronisation, offsets
past 2**31.
"""

from __future__ import annotations

import random
import time
from dataclasses import replace
from importlib import import_module
from unittest import mock

import pytest
import torch
from packs import by_bounds, documents_of

pytest.importorskip("triton", reason="the triton backend needs triton")

from moba.backends import gluon_choice, triton_backward, triton_lists, triton_tiles
from moba.backends import triton_attention as backend
from moba.backends.triton_routing import select_blocks
from moba.documents import Documents
from moba.routing import route

moba_triton = by_bounds(backend.moba_triton)

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device"),
]

STRESS_SECONDS = 120


def tensors(num_tokens, heads, head_dim, dtype=torch.bfloat16, seed=0):
    """q, k, v and a cotangent of the output."""
    generator = torch.Generator(device="cuda").manual_seed(seed)
    shapes = [(num_tokens, h, head_dim) for h in (heads[0], heads[1], heads[1], heads[0])]
    return [torch.randn(s, generator=generator, device="cuda", dtype=dtype) for s in shapes]


def bounds(values):
    return None if values is None else torch.tensor(values, dtype=torch.int32, device="cuda")


def run(q, k, v, d_out, **options):
    """[out, lse, dq, dk, dv]"""
    inputs = [x.detach().clone().requires_grad_() for x in (q, k, v)]
    out, lse = moba_triton(*inputs, **options)
    return [out, lse, *torch.autograd.grad(out, inputs, d_out)]


def dense(q, k, v, d_out, selection, layout):
    """The same in float64 by a dense mask that allows the selected blocks [T, H, K]."""
    q, k, v = (x.double().requires_grad_() for x in (q, k, v))
    group = q.shape[1] // k.shape[1]
    own = layout.own_block_T.long()
    picked = torch.zeros(*selection.shape[:2], layout.num_blocks + 1, dtype=torch.bool, device="cuda")
    picked.scatter_(2, torch.where(selection < 0, layout.num_blocks, selection).long(), True)
    token = torch.arange(q.shape[0], device="cuda")
    mask = picked[:, :, own].transpose(0, 1) & (token[None, :] <= token[:, None])
    scores = torch.einsum("thd,shd->hts", q, k.repeat_interleave(group, 1)) * q.shape[-1] ** -0.5
    scores = scores.masked_fill(~mask, float("-inf"))
    out = torch.einsum("hts,shd->thd", scores.softmax(-1), v.repeat_interleave(group, 1))
    return [out, scores.logsumexp(-1), *torch.autograd.grad(out, (q, k, v), d_out.double())]


@pytest.mark.parametrize("block_size", [128, 512])
def test_slices_of_a_pack_compute_what_the_pack_does(block_size):
    """As processes that share a sequence by blocks do: catches masks and gradients of blocks whose first tokens are no
    queries, which the interpreter shows in float32 alone. Selections are equal bit for bit."""
    lengths, options = [3000, 1, 9000, 4383], {"block_size": block_size, "top_k": 3}
    documents = Documents.from_lengths(lengths, device="cuda")
    q, k, v, d_out = tensors(sum(lengths), (8, 2), 128)
    inputs = [x.requires_grad_() for x in (q, k, v)]
    out, _ = backend.moba_triton(*inputs, documents, **options)
    expected = [out, *torch.autograd.grad(out, inputs, d_out)]
    whole = backend.route_triton(q, k, documents, **options)
    outs, picks = [], []
    for start, stop in ((0, 2900), (2900, 7001), (7001, 12001), (12001, 16384)):
        keys, pieces = documents.stretch(start, stop)
        outs.append(backend.moba_triton(q[start:stop], k[keys], v[keys], pieces, **options)[0])
        picks.append(backend.route_triton(q[start:stop], k[keys], pieces, **options))
    assert torch.equal(torch.cat(picks, 1), whole)
    got = [torch.cat(outs), *torch.autograd.grad(torch.cat(outs), inputs, d_out)]
    for a, b in zip(got, expected):
        assert (a - b).float().norm() < 0.01 * b.float().norm()


def check(num_tokens, heads, head_dim, block_size, top_k, documents=None, dtype=torch.bfloat16, seed=0, first_blocks=0):
    """Asserts relative errors below 1 % (bfloat16 rounding is 0.2-0.4 %), and equal bits when repeated."""
    q, k, v, d_out = tensors(num_tokens, heads, head_dim, dtype, seed)
    options = {"block_size": block_size, "top_k": top_k, "cu_seqlens": bounds(documents), "first_blocks": first_blocks}
    got = run(q, k, v, d_out, **options)
    assert all(torch.equal(a, b) for a, b in zip(got, run(q, k, v, d_out, **options))), "not repeatable"
    layout = documents_of(q, k, options["cu_seqlens"]).kernel_layout(block_size)
    selection = select_blocks(q, k, layout, block_size, top_k, first_blocks)
    want = dense(q, k, v, d_out, selection, layout)
    for name, a, b in zip(("out", "lse", "dq", "dk", "dv"), got, want):
        error = ((a.double() - b).norm() / b.norm()).item()
        assert error < 1e-2, f"{name}: relative error {error:.1e}"
    mine = torch.where(selection >= 0, selection - layout.first_block_T[:, None, None], -1).sort(-1).values
    theirs = route(q, k, **options).transpose(0, 1)
    assert (mine != theirs).any(-1).float().mean() < 1e-3, "selections differ by more than near-ties"


@pytest.mark.parametrize(
    "case",
    [
        (1500, (8, 2), 128, 128, 4),
        (1536, (4, 4), 64, 128, 3),
        (1800, (8, 2), 128, 512, 2),
        (1900, (4, 1), 96, 100, 5),
        (1111, (4, 2), 256, 64, 4),
        (1300, (4, 2), 256, 200, 3),
        (1800, (8, 2), 128, 130, 3, [0, 5, 5, 700, 1000, 1001, 1500, 1800]),
        (2048, (8, 8), 128, 32, 64),
        (2000, (4, 2), 128, 128, 1),
        (1024, (8, 2), 128, 16, 8, None, torch.float16),
    ],
    ids=str,
)
def test_matches_dense_attention(case):
    """Every head size, both kernel families, packs, float16 and k from 1 to 64."""
    check(*case)


@pytest.mark.parametrize("first_blocks", [1, 2])
@pytest.mark.parametrize(
    "case",
    [
        (1500, (8, 2), 128, 128, 4),
        (1800, (4, 2), 64, 64, 5, [0, 5, 5, 700, 1000, 1001, 1500, 1800]),
        (2300, (8, 2), 128, 512, 3),
    ],
    ids=str,
)
def test_first_blocks_are_always_seen(case, first_blocks):
    """Catches a list of the first block, in which all later queries of its document are, that is cut or read twice, in
    both kernel families, forward and backward; and first blocks of the pack instead of the document."""
    check(*case, first_blocks=first_blocks)
    num_tokens, heads, head_dim, block_size, top_k, *documents = case
    q, k, v, d_out = tensors(num_tokens, heads, head_dim)
    options = {"block_size": block_size, "top_k": top_k, "cu_seqlens": bounds(*documents or [None])}
    plain = run(q, k, v, d_out, **options)[0]
    assert (run(q, k, v, d_out, **options, first_blocks=first_blocks)[0] - plain).abs().max() > 0.1, "was vacuous"


needs_hopper = pytest.mark.skipif(
    not torch.cuda.is_available() or torch.cuda.get_device_capability() != (9, 0),
    reason="the Gluon kernels are for compute capability 9.0",
)


@needs_hopper
@pytest.mark.parametrize("heads", [(8, 2), (3, 3)], ids=str)
@pytest.mark.parametrize("block", [(65, 3), (96, 4), (128, 8), (256, 4), (512, 3), (600, 3), (2048, 3)], ids=str)
def test_gluon_kernels(block, heads, monkeypatch):
    """Float64 and equal bits, and the Triton kernels, which must be what runs with MOBA_GLUON=0. Packs with a document
    of one token and tails shorter than a tile; lists whole and cut. Short blocks have a backward only."""
    long = (("forward", "forward_long"), ("backward", "backward_q"), ("backward", "backward_kv"))
    calls = []
    for file, name in long if block[0] > 128 else [("short", "backward_short")]:
        module = import_module(f"moba.backends.gluon_{file}")
        launch = mock.Mock(wraps=getattr(module, name))
        monkeypatch.setattr(module, name, launch)
        calls.append(launch)
    documents = [0, 2800, 2805, 2806, 4200]
    q, k, v, d_out = tensors(documents[-1], heads, 128)
    options = {"block_size": block[0], "top_k": block[1], "cu_seqlens": bounds(documents)}
    check(documents[-1], heads, 128, *block, documents)
    results = [run(q, k, v, d_out, **options)]
    monkeypatch.setattr(triton_backward, "_long_item_rows", lambda *_: 512)
    short = triton_tiles.TILES["backward_short", 128]
    monkeypatch.setitem(triton_tiles.TILES, ("backward_short", 128), replace(short, tiles=8))
    results.append(run(q, k, v, d_out, **options))
    assert all(launch.called for launch in calls)
    before = [launch.call_count for launch in calls]
    monkeypatch.setattr(gluon_choice, "ENABLED", False)
    want = run(q, k, v, d_out, **options)
    assert before == [launch.call_count for launch in calls]
    for got in results:
        for name, a, b in zip(("out", "lse", "dq", "dk", "dv"), got, want):
            assert (a.float() - b.float()).norm() < 1e-2 * b.float().norm(), name


@needs_hopper
@pytest.mark.parametrize("block_size", [96, 128, 256, 600])
@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
def test_documents_do_not_see_each_other(block_size, bad):
    """A document between others of NaN or infinity has the bits that it has between good ones: catches tiles that end
    past a block, where a weight of zero times NaN is NaN."""
    documents, own = [0, 700, 1500, 2100], slice(700, 1500)
    inputs = tensors(documents[-1], (8, 2), 128)
    options = {"block_size": block_size, "top_k": 3, "cu_seqlens": bounds(documents)}
    want = run(*inputs, **options)
    for x in inputs:
        x[:700], x[1500:] = bad, bad
    for name, a, b in zip(("out", "lse", "dq", "dk", "dv"), run(*inputs, **options), want):
        a, b = (x[:, own] if name == "lse" else x[own] for x in (a, b))
        assert torch.equal(a, b), name


@pytest.mark.parametrize("block_size", [64, 128])
def test_small_workspace_changes_nothing(block_size, monkeypatch):
    """Working through the heads one at a time gives the same bits as all at once."""
    q, k, v, d_out = tensors(1000, (8, 4), 128)
    one = run(q, k, v, d_out, block_size=block_size, top_k=3)
    monkeypatch.setattr(backend, "WORKSPACE_BYTES", 1)
    assert all(torch.equal(a, b) for a, b in zip(one, run(q, k, v, d_out, block_size=block_size, top_k=3)))


@pytest.mark.parametrize("block_size", [64, 128, 512])
def test_turns_of_heads_change_nothing(block_size, monkeypatch):
    """Four heads in turn, as in short launches, give the same bits as one after another."""
    q, k, v, d_out = tensors(3000, (8, 4), 128)
    in_turn = run(q, k, v, d_out, block_size=block_size, top_k=3)
    monkeypatch.setattr(triton_lists, "SHORT_LAUNCH", 0)
    assert all(torch.equal(a, b) for a, b in zip(in_turn, run(q, k, v, d_out, block_size=block_size, top_k=3)))


@pytest.mark.parametrize("block_size", [64, 128, 512])
def test_never_waits_for_the_device(block_size):
    """No host synchronisation in forward or backward, after the kernels are compiled."""
    q, k, v, d_out = tensors(2000, (8, 2), 128)
    options = {"block_size": block_size, "top_k": 3, "cu_seqlens": bounds([0, 700, 700, 2000])}
    run(q, k, v, d_out, **options)
    torch.cuda.set_sync_debug_mode("error")
    try:
        run(q, k, v, d_out, **options)
    finally:
        torch.cuda.set_sync_debug_mode("default")


def test_compiles_around_the_operators():
    """torch.compile traces a function that calls the backend, forward and backward, without a graph break."""
    q, k, v, d_out = tensors(512, (4, 2), 64)

    def loss(q, k, v):
        return (moba_triton(q * 2, k, v, block_size=64, top_k=2)[0] * d_out).float().sum()

    results = []
    for function in (loss, torch.compile(loss, fullgraph=True)):
        inputs = [x.detach().clone().requires_grad_() for x in (q, k, v)]
        results.append(torch.autograd.grad(function(*inputs), inputs))
    for a, b in zip(*results):
        assert (a.double() - b.double()).norm() / a.double().norm() < 1e-2


def test_offsets_past_32_bits():
    """q of more than 2**31 elements: its last queries must match the same tokens computed as a short sequence.

    With top_k = 1 attention is block-local, so the tail of the long sequence equals the tail alone.
    """
    if torch.cuda.get_device_properties(0).total_memory < 60 << 30:
        pytest.skip("needs 60 GiB of device memory")
    num_tokens, tail = (1 << 31) // (32 * 128) + 4096, 1024
    q, k, v, _ = tensors(num_tokens, (32, 1), 128)
    with torch.no_grad():
        out, lse = moba_triton(q, k, v, block_size=256, top_k=1)
        want, want_lse = moba_triton(q[-tail:], k[-tail:], v[-tail:], block_size=256, top_k=1)
    assert q.numel() > 1 << 31
    assert torch.equal(out[-tail:], want) and torch.equal(lse[:, -tail:], want_lse)


@pytest.mark.timeout(STRESS_SECONDS + 240)
def test_random_shapes():
    """Random packs under random heads, blocks and k for STRESS_SECONDS, other ones in every run.

    Kernels are compiled for heads, head size and k, so a run draws few of those and many packs.
    """
    rng = random.Random(time.time_ns())
    kinds = []
    for _ in range(8):
        num_kv_heads, group = rng.choice([1, 2, 3]), rng.choice([1, 2, 4])
        head_dim, block_size = rng.choice([64, 96, 128]), rng.choice([16, 17, 64, 100, 128, 129, 256, 1000])
        kinds.append(((num_kv_heads * group, num_kv_heads), head_dim, block_size, rng.choice([1, 2, 3, 8, 20])))
    deadline, num_packs = time.monotonic() + STRESS_SECONDS, 0
    while time.monotonic() < deadline:
        cuts = sorted(rng.randint(0, 1200) for _ in range(rng.randint(0, 6)))
        documents = [0, *cuts, 1200 + rng.randint(1, 400)]
        case, seed = (documents[-1], *rng.choice(kinds), documents), rng.randint(0, 999)
        try:
            check(*case, seed=seed)
        except AssertionError as error:
            raise AssertionError(f"check{case}, seed={seed}: {error}") from error
        num_packs += 1
    print(f"{num_packs} packs of {kinds}")
