"""The flash backend and its varlen primitives against the fp64 definition; on a CPU with the plain primitive."""

import sys
import types

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from packs import by_bounds

from moba.backends import flash as flash_module
from moba.backends import varlen as varlen_module
from moba.backends.choice import choose
from moba.backends.refusals import BackendUnavailable
from moba.backends.varlen import PLAIN, default_primitive, varlen_attention
from moba.documents import Documents
from moba.kinds import Full, Moba, QueryShape
from moba.reference import reference_attention, reference_selection

moba_flash = by_bounds(flash_module.moba_flash)

gpu = pytest.mark.gpu
needs_cuda = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")


def make_inputs(
    lengths, num_heads, num_kv_heads, head_dim, *, seed=0, lengths_k=None, dtype=torch.float64, device="cpu"
):
    """q, k, v with gradients, cu_seqlens and, if lengths_k is given, cu_seqlens_k (else None)."""
    generator = torch.Generator().manual_seed(seed)

    def tensor(num_tokens, heads):
        x = torch.randn(num_tokens, heads, head_dim, generator=generator, dtype=torch.float64)
        return x.to(device=device, dtype=dtype).requires_grad_()

    num_keys = sum(lengths if lengths_k is None else lengths_k)
    q, k, v = tensor(sum(lengths), num_heads), tensor(num_keys, num_kv_heads), tensor(num_keys, num_kv_heads)
    cu = cu_of(lengths, device)
    return q, k, v, cu, None if lengths_k is None else cu_of(lengths_k, device)


def cu_of(lengths, device="cpu"):
    return torch.tensor([0, *lengths], device=device).cumsum(0).to(torch.int32)


def with_gradients(function, q, k, v, **options):
    """(out, lse, dq, dk, dv) under a fixed random cotangent."""
    out, lse = function(q, k, v, **options)
    cotangent = torch.randn(out.shape, generator=torch.Generator().manual_seed(1), dtype=torch.float64).to(out)
    return out, lse, *torch.autograd.grad(out, (q, k, v), cotangent)


def reference(q, k, v, **options):
    return reference_attention(q, k, v, return_lse=True, **options)


def assert_equal_to_reference(q, k, v, **options):
    for name, got, want in zip(
        ("out", "lse", "dq", "dk", "dv"),
        with_gradients(moba_flash, q, k, v, varlen=PLAIN, **options),
        with_gradients(reference, q, k, v, **options),
    ):
        torch.testing.assert_close(got, want, rtol=1e-9, atol=1e-9, msg=lambda text, name=name: f"{name}: {text}")


def has_dropped_and_kept(q, k, **options):
    """Whether some query drops a complete past block and some query picks one."""
    selection = reference_selection(q, k, **options)
    history, own = selection[..., :-1], selection[..., -1]
    picked = (history >= 0).sum(-1)
    return bool((picked < own).any()), bool((picked > 0).any())


@settings(deadline=None, max_examples=30)
@given(
    lengths=st.lists(st.integers(0, 40), min_size=1, max_size=4).filter(sum),
    block_size=st.integers(1, 12),
    top_k=st.integers(1, 5),
    heads=st.sampled_from([(1, 1), (2, 2), (4, 2), (6, 2), (3, 1)]),
    seed=st.integers(0, 99),
)
def test_random_packs_equal_reference(lengths, block_size, top_k, heads, seed):
    """Catches errors of grouping, merging or gradients for any documents (empty, ragged), GQA, block size, top_k."""
    q, k, v, cu, _ = make_inputs(lengths, *heads, 8, seed=seed)
    assert_equal_to_reference(q, k, v, block_size=block_size, top_k=top_k, cu_seqlens=cu)


@settings(deadline=None, max_examples=15)
@given(
    pairs=st.lists(st.tuples(st.integers(0, 12), st.integers(0, 30)), min_size=1, max_size=3).filter(
        lambda pairs: sum(p[0] for p in pairs)
    ),
    block_size=st.integers(1, 9),
    top_k=st.integers(1, 4),
)
def test_more_keys_than_queries_equal_reference(pairs, block_size, top_k):
    """Catches queries misaligned within their block, or picks counted from the wrong start (chunked prefill)."""
    lengths, lengths_k = [a for a, _ in pairs], [a + b for a, b in pairs]
    q, k, v, cu, cu_k = make_inputs(lengths, 4, 2, 8, lengths_k=lengths_k)
    assert_equal_to_reference(q, k, v, block_size=block_size, top_k=top_k, cu_seqlens=cu, cu_seqlens_k=cu_k)


@pytest.mark.parametrize(
    ("block_size", "top_k", "drops", "picks"),
    [(8, 3, True, True), (8, 1, True, False), (8, 20, False, True), (200, 2, False, False), (64, 2, False, True)],
    ids=["sparse", "block-local", "k-exceeds-blocks", "one-block", "two-blocks"],
)
def test_regimes_equal_reference(block_size, top_k, drops, picks):
    """Catches the released code's dense fallback at top_k=1; each regime is checked to be what its name says."""
    q, k, v, cu, _ = make_inputs([0, 70, 0, 41, 3, 0], 4, 2, 16)
    options = {"block_size": block_size, "top_k": top_k, "cu_seqlens": cu}
    assert has_dropped_and_kept(q, k, **options) == (drops, picks)
    assert_equal_to_reference(q, k, v, **options, softmax_scale=0.7)


def test_lists_without_queries_leave_finite_gradients():
    """Catches NaN or garbage in the gradients of keys that no routed query sees: all pick block 0, none 1 to 3."""
    q, k, v, _, _ = make_inputs([40], 2, 1, 8)
    with torch.no_grad():
        q.abs_()
        k[:8] = k[:8].abs() + 5
        k[8:] = -k[8:].abs() - 5
    options = {"block_size": 8, "top_k": 2}
    history = reference_selection(q, k, **options)[:, 8:, 0]
    assert (history == 0).all()
    assert_equal_to_reference(q, k, v, **options)


def test_no_tokens():
    """Catches a crash on an empty pack, which a rank may see at the end of its data."""
    q, k, v, cu, _ = make_inputs([0, 0], 2, 1, 8)
    out, lse = moba_flash(q, k, v, block_size=4, top_k=2, cu_seqlens=cu)
    assert out.shape == (0, 2, 8) and lse.shape == (2, 0)
    out.sum().backward()


def test_keys_are_laid_out_once_under_gqa():
    """Catches keys repeated per query head: the routed call may see each (key/value head, token) at most once."""
    q, k, v, cu, _ = make_inputs([64], 8, 2, 8)
    seen = []

    def forward(q, k, v, *arguments):
        seen.append((q.shape, k.shape))
        return PLAIN.forward(q, k, v, *arguments)

    moba_flash(q, k, v, block_size=8, top_k=3, cu_seqlens=cu, varlen=PLAIN._replace(forward=forward))
    (own_q, own_k), (routed_q, routed_k) = seen
    assert own_q[0] == own_k[0] == 64
    picks = (reference_selection(q, k, block_size=8, top_k=3)[..., :-1] >= 0).sum()
    assert routed_q == (picks, 1, 8)
    assert routed_k[0] <= 2 * 56 and routed_k[1] == 1


@pytest.mark.parametrize(("heads", "num_chunks"), [(0, 9), (2, 6), (3, 3), (7, 2)])
def test_chunks_of_heads_equal_one_call(monkeypatch, heads, num_chunks):
    """Catches heads out of order, or key gradients lost, where memory limits the heads that go through at a time."""
    q, k, v, cu, _ = make_inputs([30, 12], 9, 3, 8)
    options = {"block_size": 4, "top_k": 3, "cu_seqlens": cu}
    whole = with_gradients(moba_flash, q, k, v, **options)
    calls = []
    monkeypatch.setattr(flash_module, "ROW_ELEMENTS", heads * 42 * 2 * 8)

    def forward(q, *arguments):
        calls.append(q.shape)
        return PLAIN.forward(q, *arguments)

    got = with_gradients(moba_flash, q, k, v, varlen=PLAIN._replace(forward=forward), **options)
    assert len(calls) == 2 * num_chunks  # own blocks and routed part
    for a, b in zip(got, whole):
        torch.testing.assert_close(a, b, rtol=1e-12, atol=1e-12)


def test_backward_repeats_forward_under_checkpointing():
    """Catches state that a recomputed forward pass does not rebuild, or a selection that differs when recomputed."""
    q, k, v, cu, _ = make_inputs([50, 30], 4, 2, 8)
    options = {"block_size": 8, "top_k": 3, "cu_seqlens": cu}

    def checkpointed(q, k, v):
        return torch.utils.checkpoint.checkpoint(lambda *qkv: moba_flash(*qkv, **options), q, k, v, use_reentrant=False)

    for got, want in zip(with_gradients(checkpointed, q, k, v), with_gradients(moba_flash, q, k, v, **options)):
        assert torch.equal(got, want)


@settings(deadline=None, max_examples=15)
@given(
    pairs=st.lists(st.tuples(st.integers(0, 9), st.integers(0, 9)), min_size=1, max_size=3).filter(
        lambda pairs: sum(p[0] for p in pairs)
    ),
    causal=st.booleans(),
)
def test_plain_primitive_equals_autograd(pairs, causal):
    """Catches an error in the primitive that the tests above build on, by softmax and autograd per sequence."""
    lengths, lengths_k = [a for a, _ in pairs], [a + b for a, b in pairs]
    q, k, v, cu, cu_k = make_inputs(lengths, 4, 2, 8, lengths_k=lengths_k)

    def dense(q, k, v):
        outs, lses = [], []
        for a, b, c, d in zip(cu.tolist(), cu.tolist()[1:], cu_k.tolist(), cu_k.tolist()[1:]):
            scores = torch.einsum("thd,shd->hts", q[a:b], k[c:d].repeat_interleave(2, dim=1)) * 8**-0.5
            if causal:
                seen = torch.ones(b - a, d - c, dtype=torch.bool).tril((d - c) - (b - a))
                scores = scores.masked_fill(~seen, float("-inf"))
            outs.append(torch.einsum("hts,shd->thd", scores.softmax(-1), v[c:d].repeat_interleave(2, dim=1)))
            lses.append(scores.logsumexp(-1))
        return torch.cat(outs), torch.cat(lses, dim=1)

    def primitive(q, k, v):
        return varlen_attention(q, k, v, cu, cu_k, max(lengths), max(lengths_k), causal, return_lse=True)

    for got, want in zip(with_gradients(primitive, q, k, v), with_gradients(dense, q, k, v)):
        torch.testing.assert_close(got, want, rtol=1e-10, atol=1e-10)


@pytest.mark.parametrize(("version", "num_results", "num_window"), [("2.6.3", 8, 1), ("2.8.3", 4, 2)])
def test_flash_attn_signatures(monkeypatch, version, num_results, num_window):
    """Catches arguments or results out of place for either generation of flash-attn's private functions."""

    def plain_window(window):
        """Of (keys to the left, keys to the right) as that version takes them."""
        assert len(window) == num_window
        left, right = window[0] if num_window == 1 else window
        assert (left, right) == (-1, -1) or (left >= 0 and right == 0)
        return None if left < 0 else left + 1

    def varlen_forward(q, k, v, cu_q, cu_k, max_q, max_k, dropout_p, softmax_scale, causal, *window):
        assert dropout_p == 0.0
        out, lse = PLAIN.forward(q, k, v, cu_q, cu_k, max_q, max_k, causal, softmax_scale, plain_window(window))
        return (out, q, k, v, out, lse, None, None) if num_results == 8 else (out, lse, None, None)

    def varlen_backward(dout, q, k, v, out, lse, dq, dk, dv, cu_q, cu_k, max_q, max_k, dropout_p, scale, causal, *rest):
        *window, softcap, alibi_slopes, deterministic = rest
        assert (dropout_p, softcap, alibi_slopes, deterministic) == (0.0, 0.0, None, True)
        sizes = (cu_q, cu_k, max_q, max_k, causal, scale, deterministic)
        grads = PLAIN.backward(dout, q, k, v, out, lse, *sizes, plain_window(window))
        for target, grad in zip((dq, dk, dv), grads):
            target.copy_(grad)

    interface = types.ModuleType("flash_attn.flash_attn_interface")
    interface._flash_attn_varlen_forward, interface._flash_attn_varlen_backward = varlen_forward, varlen_backward
    package = types.ModuleType("flash_attn")
    package.__version__, package.flash_attn_interface = version, interface
    monkeypatch.setitem(sys.modules, "flash_attn", package)
    monkeypatch.setitem(sys.modules, "flash_attn.flash_attn_interface", interface)
    primitive = varlen_module._flash_attn_primitive.__wrapped__()
    q, k, v, cu, _ = make_inputs([30, 11], 4, 2, 8, dtype=torch.bfloat16)
    options = {"block_size": 4, "top_k": 3, "cu_seqlens": cu, "deterministic": True}
    got = with_gradients(moba_flash, q, k, v, varlen=primitive, **options)
    for a, b in zip(got, with_gradients(moba_flash, q, k, v, varlen=PLAIN, **options)):
        assert torch.equal(a, b)

    def sliding(q, k, v, primitive):
        options = {"window": 7, "deterministic": True, "return_lse": True, "primitive": primitive}
        return varlen_attention(q, k, v, cu, cu, 30, 30, **options)

    got, want = (with_gradients(sliding, q, k, v, primitive=p) for p in (primitive, PLAIN))
    for a, b in zip(got, want):
        assert torch.equal(a, b)


@pytest.mark.parametrize(("dtype", "head_dim", "names"), [("float32", 64, "float32"), ("bfloat16", 20, "head_dim=20")])
def test_flash_kernels_refuse_by_name(dtype, head_dim, names):
    """Catches a crash inside a kernel, or a silent fallback, where a dtype or head size is not supported."""
    shape = QueryShape("cuda", dtype, num_tokens=16, num_heads=2, num_kv_heads=1, head_dim=head_dim)
    for kind in (Moba(4, 2, backend="flash"), Full(backend="flash")):
        with pytest.raises(BackendUnavailable, match=f"{names}.*'torch'"):
            choose(kind, shape, Documents.from_lengths([16]))


def test_too_many_rows_are_refused_before_any_work():
    """Catches a call that the kernels would index out of bounds, and a message that names no way out."""
    tokens = 1 << 20
    shape = QueryShape("cuda", "bfloat16", num_tokens=tokens, num_heads=8, num_kv_heads=8, head_dim=128)
    with pytest.raises(BackendUnavailable, match=r"block_size=4096, top_k=18.*1048576 tokens.*'torch'"):
        choose(Moba(4096, 18, backend="flash"), shape, Documents.from_lengths([tokens]))
    choose(Moba(4096, 17, backend="flash"), shape, Documents.from_lengths([tokens]))


# -------------------- on CUDA


def cuda_primitives():
    """Names of the CUDA primitives that can run here."""
    installed = varlen_module._flash_attn_primitive() if torch.cuda.is_available() else None
    return {"aten": varlen_module.ATEN} | ({"flash-attn": installed} if installed else {})


def assert_close_in_bf16(got, want, name):
    """Largest and mean error within bf16's rounding (2^-8 = 4e-3) of the largest and mean value."""
    got, want = got.double().cpu(), want.double().cpu()
    assert torch.isfinite(got).all(), name
    error = (got - want).abs()
    assert error.max() <= 2e-2 * want.abs().max(), f"{name}: largest error {error.max()} of {want.abs().max()}"
    assert error.mean() <= 8e-3 * want.abs().mean(), f"{name}: mean error {error.mean()} of {want.abs().mean()}"


@gpu
@needs_cuda
@pytest.mark.parametrize("primitive", ["aten", "flash-attn"])
@pytest.mark.parametrize(
    ("lengths", "heads", "head_dim", "block_size", "top_k"),
    [
        ([300, 0, 513, 64], (4, 2), 64, 64, 3),
        ([700], (8, 1), 128, 32, 1),
        ([257, 255], (2, 2), 80, 128, 9),
        ([1000], (4, 4), 128, 16, 4),
    ],
)
def test_cuda_equals_reference(primitive, lengths, heads, head_dim, block_size, top_k):
    """Catches wrong arguments of the CUDA kernels (LSE layout, alignment, empty sequences) in outputs and gradients."""
    if primitive not in cuda_primitives():
        pytest.skip("flash-attn is not installed")
    q, k, v, cu, _ = make_inputs(lengths, *heads, head_dim, dtype=torch.bfloat16, device="cuda")
    options = {"block_size": block_size, "top_k": top_k}
    got = with_gradients(moba_flash, q, k, v, cu_seqlens=cu, varlen=cuda_primitives()[primitive], **options)
    exact = [x.detach().cpu().double().requires_grad_() for x in (q, k, v)]
    want = with_gradients(reference, *exact, cu_seqlens=cu.cpu(), **options)
    for name, a, b in zip(("out", "lse", "dq", "dk", "dv"), got, want):
        assert_close_in_bf16(a, b, name)


@gpu
@needs_cuda
def test_cuda_gradients_of_queryless_keys_are_zero():
    """Catches uninitialised gradients of sequences without queries, which chunked prefill has in the self part."""
    q, k, v, cu, cu_k = make_inputs([10], 2, 1, 64, lengths_k=[1000], dtype=torch.bfloat16, device="cuda")
    for _ in range(3):
        junk = torch.full((1 << 24,), float("nan"), device="cuda")
        del junk  # so that the allocator hands out NaNs
        options = {"block_size": 64, "top_k": 2, "cu_seqlens": cu, "cu_seqlens_k": cu_k}
        _, _, _, dk, dv = with_gradients(moba_flash, q, k, v, **options)
        assert torch.isfinite(dk).all() and torch.isfinite(dv).all()
        unseen = torch.ones(1000, dtype=torch.bool)
        for block in (
            reference_selection(q.cpu(), k.cpu(), block_size=64, top_k=2, cu_seqlens=cu.cpu(), cu_seqlens_k=cu_k.cpu())
            .unique()
            .tolist()
        ):
            unseen[block * 64 : (block + 1) * 64] = False
        assert unseen.sum() > 64 and (dk[unseen.cuda()] == 0).all() and (dv[unseen.cuda()] == 0).all()


@gpu
@needs_cuda
@pytest.mark.parametrize("more_keys", [False, True])
def test_cuda_dense_equals_sdpa(more_keys):
    """Catches a misaligned causal mask or a wrong LSE of dense attention on CUDA."""
    lengths, lengths_k = [130, 0, 257], [130, 0, 257]
    if more_keys:
        lengths_k = [200, 5, 300]
    q, k, v, cu, cu_k = make_inputs(lengths, 4, 2, 64, lengths_k=lengths_k, dtype=torch.bfloat16, device="cuda")

    def flash(q, k, v):
        return varlen_attention(q, k, v, cu, cu_k, max(lengths), max(lengths_k), True, return_lse=True)

    def sdpa(q, k, v):
        outs = []
        for a, b, c, d in zip(cu.tolist(), cu.tolist()[1:], cu_k.tolist(), cu_k.tolist()[1:]):
            seen = torch.ones(b - a, d - c, dtype=torch.bool, device="cuda").tril((d - c) - (b - a))
            x = [t.transpose(0, 1)[None] for t in (q[a:b], k[c:d], v[c:d])]
            if b > a:
                outs.append(torch.nn.functional.scaled_dot_product_attention(*x, attn_mask=seen, enable_gqa=True))
        return torch.cat([x[0].transpose(0, 1) for x in outs]), None

    got = with_gradients(flash, q, k, v)
    exact = [x.detach().double().requires_grad_() for x in (q, k, v)]
    want = with_gradients(sdpa, *exact)
    for name, a, b in zip(("out", "lse", "dq", "dk", "dv"), got, want):
        if name != "lse":
            assert_close_in_bf16(a, b, name)
    assert got[1].shape == (4, sum(lengths)) and got[1].dtype == torch.float32


@gpu
@needs_cuda
def test_cuda_deterministic_gradients_repeat():
    """Catches a deterministic flag that is not passed on, and a global setting that is not restored."""
    q, k, v, cu, _ = make_inputs([3000, 1000], 8, 2, 64, dtype=torch.bfloat16, device="cuda")
    options = {"block_size": 64, "top_k": 8, "cu_seqlens": cu, "deterministic": True}
    first = with_gradients(moba_flash, q, k, v, **options)
    for _ in range(3):
        for a, b in zip(first, with_gradients(moba_flash, q, k, v, **options)):
            assert torch.equal(a, b)
    assert not torch.are_deterministic_algorithms_enabled()
    assert default_primitive(q) is not PLAIN
