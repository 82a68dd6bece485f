"""Long blocks by ragged attention: on a CPU with plain PyTorch in the place of cuDNN and the kernels around it in
Triton's interpreter, against the float64 definition; on a GPU cuDNN's kernels themselves."""

from __future__ import annotations

import pytest
import torch
from packs import by_bounds, documents_of

pytest.importorskip("triton", reason="the lists are made in Triton")

from moba import Documents
from moba.backends import cudnn_lists, triton_attention
from moba.backends.cudnn_ragged import rounded
from moba.backends.triton_routing import select_blocks
from moba.reference import reference_attention, reference_selection

moba_cudnn = by_bounds(cudnn_lists.moba_cudnn)
moba_triton = by_bounds(triton_attention.moba_triton)


def interpreted(test):
    """For tests of the kernels on a CPU."""
    test = pytest.mark.skipif(not triton_attention.INTERPRETED, reason="runs in Triton's interpreter")(test)
    return pytest.mark.filterwarnings("ignore::RuntimeWarning")(test)  # the interpreter computes masked lanes too


def tensors(num_tokens, heads, head_dim, dtype=torch.float32, device="cpu", seed=0):
    """q, k, v and a cotangent of the output."""
    generator = torch.Generator().manual_seed(seed)
    shapes = [(num_tokens, h, head_dim) for h in (heads[0], heads[1], heads[1], heads[0])]
    return [torch.randn(s, generator=generator).to(device, dtype) for s in shapes]


def results(attention, q, k, v, d_out):
    """out, lse, dq, dk, dv."""
    inputs = [x.detach().clone().requires_grad_() for x in (q, k, v)]
    out, lse = attention(*inputs)
    return [out, lse, *torch.autograd.grad(out, inputs, d_out.to(out))]


def bounds(values, device="cpu"):
    return None if values is None else torch.tensor(values, dtype=torch.int32, device=device)


# (tokens, (H, H_kv), head size, block size, top_k, cu_seqlens, first_blocks, workspace, rows of an item)
CASES = {
    "grouped heads, all at once": (100, (4, 2), 16, 16, 3, None, 0, None, 64),
    "lists in several items": (110, (4, 2), 16, 16, 3, None, 0, None, 7),
    "one head at a time, tokens in chunks": (110, (4, 2), 16, 16, 3, None, 0, 1, 8),
    "pack: empty document, short document, ragged tails": (110, (4, 2), 24, 12, 3, [0, 7, 60, 60, 110], 0, 1, 16),
    "first blocks": (90, (2, 1), 16, 12, 3, [0, 40, 90], 1, None, 16),
    "top_k 1 is block-local": (60, (2, 1), 16, 16, 1, [0, 25, 60], 0, None, 64),
    "more picks than blocks": (50, (2, 2), 16, 16, 6, None, 0, None, 64),
    "one token": (1, (2, 1), 16, 16, 3, None, 0, None, 64),
}


@interpreted
@pytest.mark.parametrize("deterministic", [False, True])
@pytest.mark.parametrize("case", CASES)
def test_matches_reference(case, deterministic, monkeypatch):
    """Output, log-sum-exp and gradients. Catches a row that is gathered, merged or added in the wrong place, an own
    block that is seen twice or not at all, a piece of a list that is left out, a part that was not given the joint
    log-sum-exp, and rows that belong to no list and are read (the plain provider leaves them NaN)."""
    num_tokens, heads, head_dim, block_size, top_k, documents, first_blocks, workspace, rows = CASES[case]
    monkeypatch.setattr(cudnn_lists, "item_rows", lambda block_size, deterministic: rows)
    if workspace is not None:
        monkeypatch.setattr(triton_attention, "WORKSPACE_BYTES", workspace)
    q, k, v, d_out = tensors(num_tokens, heads, head_dim)
    options = {"block_size": block_size, "top_k": top_k, "cu_seqlens": bounds(documents), "first_blocks": first_blocks}
    got = results(lambda *x: moba_cudnn(*x, **options, deterministic=deterministic), q, k, v, d_out)
    want = results(
        lambda *x: reference_attention(*x, **options, return_lse=True), q.double(), k.double(), v.double(), d_out
    )
    for name, a, b in zip(("out", "lse", "dq", "dk", "dv"), got, want):
        torch.testing.assert_close(a.double(), b, rtol=1e-4, atol=2e-5, msg=lambda text, name=name: f"{name}: {text}")
    selection = reference_selection(q, k, **options)
    dropped = bool(((selection >= 0).sum(-1) <= selection[..., -1]).any())
    assert dropped or case in ("more picks than blocks", "one token")


@interpreted
def test_recorded_selection_is_attended_to():
    """The blocks of a recorded selection instead of routing: those of other keys, so that routing would differ."""
    q, k, v, d_out = tensors(80, (4, 2), 16)
    options = {"block_size": 12, "top_k": 3, "cu_seqlens": bounds([0, 30, 80])}
    selection = reference_selection(q, -k, **options)
    got = results(lambda *x: moba_cudnn(*x, **options, selection=selection), q, k, v, d_out)
    want = results(lambda *x: moba_triton(*x, **options, selection=selection), q, k, v, d_out)
    for a, b in zip(got, want):
        torch.testing.assert_close(a, b, rtol=1e-4, atol=2e-5)
    assert not torch.equal(selection, reference_selection(q, k, **options))


@interpreted
def test_operators_have_fake_versions(monkeypatch):
    """Shapes and dtypes without running, also of several chunks of tokens, which torch.compile traces with."""
    from torch._subclasses.fake_tensor import FakeTensorMode

    monkeypatch.setattr(triton_attention, "WORKSPACE_BYTES", 1)
    q, k, v, _ = tensors(50, (4, 2), 16)
    found = Documents.from_lengths([20, 30]).kernel_layout(16)
    layout = (found.start_M, found.length_M, found.first_block_T, found.own_block_T)
    real = cudnn_lists.cudnn_forward(q, k, v, *layout, 16, 3, 0.25)
    assert real[4].shape[0] > 1, "one chunk"
    grads = cudnn_lists.cudnn_backward(torch.ones_like(q), q, k, v, *real, *layout[:2], 16, 0.25)
    with FakeTensorMode(allow_non_fake_inputs=True) as mode:
        fq, fk, fv, *fakes = (mode.from_tensor(x) for x in (q, k, v, *layout))
        fake = cudnn_lists.cudnn_forward(fq, fk, fv, *fakes, 16, 3, 0.25)
        fake_grads = cudnn_lists.cudnn_backward(fq, fq, fk, fv, *fake, *fakes[:2], 16, 0.25)
    for a, b in zip((*real, *grads), (*fake, *fake_grads), strict=True):
        assert a.shape == b.shape and a.dtype == b.dtype


@interpreted
def test_no_gradient_of_the_log_sum_exp():
    """cuDNN's backward has no place for one: an error instead of a gradient that lacks it. And no tokens, no launch."""
    q, k, v, _ = tensors(20, (2, 1), 16)
    with pytest.raises(ValueError, match="log-sum-exp"):
        moba_cudnn(q.requires_grad_(), k, v, block_size=16, top_k=2)[1].sum().backward()
    empty = [x.detach()[:0] for x in (q, k, v, q)]
    out, lse, *grads = results(lambda *x: moba_cudnn(*x, block_size=16, top_k=2), *empty)
    assert out.shape == grads[0].shape == (0, 2, 16) and lse.shape == (2, 0)


def test_work_fits_its_budget():
    """Rows of a part stay within the workspace whatever the length; heads go first, then tokens. 128K 4096x12 and 64K
    2048x3 with 32/8 heads of 128 are the paper's."""
    gib = 1 << 30
    for num_tokens, block_size, top_k, heads_at_once in (
        (1 << 16, 2048, 3, 1),
        (1 << 17, 4096, 12, 1),
        (8192, 1024, 3, 8),
    ):
        q, k = (torch.empty(num_tokens, heads, 128, dtype=torch.bfloat16, device="meta") for heads in (32, 8))
        work = cudnn_lists._Work(q, k, block_size, top_k)
        assert work.kv_heads_at_once == heads_at_once
        rows = work.chunk_tokens * work.kv_heads_at_once * 4 * (top_k - 1)
        assert rows * 128 * (4 * 2 + 4) <= 1.25 * gib
        assert sum(heads.num_q for heads in work.head_groups()) == 32
        assert (work.num_chunks - 1) * work.chunk_tokens < num_tokens <= work.num_chunks * work.chunk_tokens


def test_few_bounds():
    """Graphs are built for rounded bounds: no smaller, at most an eighth larger, and few."""
    found = [rounded(n) for n in range(1, 5000)]
    assert all(n <= bound <= n * 9 / 8 for n, bound in enumerate(found, 1))
    assert len(set(found)) < 8 * 13


# -------------------- on a GPU


def on_gpu():
    """Skips without a Hopper GPU and the package."""
    if not torch.cuda.is_available() or torch.cuda.get_device_capability()[0] != 9:
        pytest.skip("needs a Hopper GPU")
    pytest.importorskip("cudnn", reason="needs nvidia-cudnn-frontend")


GPU_CASES = [
    (3000, (8, 2), 128, 256, 3, None),
    (2900, (4, 4), 64, 512, 2, [0, 5, 5, 700, 1000, 1001, 1500, 2900]),
    (3000, (4, 1), 96, 300, 4, [0, 1000, 3000]),
    (2048, (4, 2), 128, 1024, 1, None),
    (2048, (4, 2), 128, 256, 20, None),
]


@pytest.mark.gpu
@pytest.mark.parametrize("deterministic", [False, True])
@pytest.mark.parametrize("workspace", [None, 1])
@pytest.mark.parametrize("case", GPU_CASES, ids=str)
def test_kernels_match_dense_attention(case, workspace, deterministic, monkeypatch):
    """Against float64 over the same blocks; whole and by single heads and chunks of tokens. Lists in several items."""
    on_gpu()
    from test_triton_gpu import dense

    num_tokens, heads, head_dim, block_size, top_k, documents = case
    monkeypatch.setattr(cudnn_lists, "item_rows", lambda block_size, deterministic: 1000)
    if workspace is not None:
        monkeypatch.setattr(triton_attention, "WORKSPACE_BYTES", workspace)
    q, k, v, d_out = tensors(num_tokens, heads, head_dim, torch.bfloat16, "cuda")
    options = {"block_size": block_size, "top_k": top_k, "cu_seqlens": bounds(documents, "cuda")}
    got = results(lambda *x: moba_cudnn(*x, **options, deterministic=deterministic), q, k, v, d_out)
    layout = documents_of(q, k, options["cu_seqlens"]).kernel_layout(block_size)
    want = dense(q, k, v, d_out, select_blocks(q, k, layout, block_size, top_k), layout)
    for name, a, b in zip(("out", "lse", "dq", "dk", "dv"), got, want):
        error = ((a.double() - b).norm() / b.norm()).item()
        assert error < 1e-2, f"{name}: relative error {error:.1e}"


@pytest.mark.gpu
@pytest.mark.parametrize("deterministic", [False, True])
def test_it_never_waits_and_repeats(deterministic):
    """No host synchronisation after the first call; the forward gives the same bits again, as activation checkpointing
    needs, and deterministic also the gradients."""
    on_gpu()
    q, k, v, d_out = tensors(9000, (8, 2), 128, torch.bfloat16, "cuda")
    options = {"block_size": 1024, "top_k": 3, "cu_seqlens": bounds([0, 700, 700, 9000], "cuda")}
    options["deterministic"] = deterministic
    one = results(lambda *x: moba_cudnn(*x, **options), q, k, v, d_out)
    torch.cuda.set_sync_debug_mode("error")
    try:
        two = results(lambda *x: moba_cudnn(*x, **options), q, k, v, d_out)
    finally:
        torch.cuda.set_sync_debug_mode("default")
    assert all(torch.equal(a, b) for a, b in zip(one[: None if deterministic else 2], two))
