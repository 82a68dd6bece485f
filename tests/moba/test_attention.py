"""The public entry: arguments that are wrong, the choice of a backend, and full attention."""

import logging
import sys
from dataclasses import replace

import pytest
import torch
from hypothesis import given, settings
from packs import Pack, attention, bounds, drops_and_keeps, packs, plain_full_attention

from moba import full_attention, moba_attention, route
from moba.attention import BackendUnavailable
from moba.backends.choice import choose, log_choice
from moba.kinds import Backend, Full, Moba, QueryShape
from moba.reference import reference_attention

needs_cuda = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
PACK = Pack([70, 0, 33], block_size=8, top_k=3, heads=(4, 2))


@pytest.fixture
def choices(caplog):
    """Messages of the choice of backends, from a clean start."""
    log_choice.cache_clear()
    caplog.set_level(logging.INFO, logger="moba")
    yield caplog
    log_choice.cache_clear()


# -------------------- MoBA


@pytest.mark.parametrize("backend", ["auto", "torch", "reference"])
def test_backends_equal_reference(backend):
    """Catches arguments that do not reach a backend, and a log-sum-exp in another layout."""
    q, k, v = PACK.tensors()
    assert all(drops_and_keeps(route(q, k, **PACK.options)))
    options = {**PACK.options, "softmax_scale": 0.3}
    got = moba_attention(q, k, v, backend=backend, return_lse=True, **options)
    for a, b in zip(got, reference_attention(q, k, v, return_lse=True, **options), strict=True):
        torch.testing.assert_close(a, b)
    torch.testing.assert_close(moba_attention(q, k, v, backend=backend, **options), got[0])


@settings(deadline=None, max_examples=15)
@given(packs(top_k=50))
def test_auto_takes_the_dense_path_where_it_is_the_same(pack):
    """Catches a shortcut to full attention that is not equal to what it replaces, also with more keys than queries."""
    q, k, v = pack.tensors()
    want = reference_attention(q, k, v, return_lse=True, **pack.options)
    for a, b in zip(moba_attention(q, k, v, return_lse=True, **pack.options), want, strict=True):
        torch.testing.assert_close(a, b)
    torch.testing.assert_close(moba_attention(q, k, v, **pack.options), want[0])


def test_auto_stays_sparse_where_one_token_is_too_many():
    """Catches a shortcut to full attention that is taken too early: at 25 tokens, 3 blocks of 8 leave one out."""
    pack = Pack([25, 9], block_size=8, top_k=3)
    q, k, v = pack.tensors()
    assert all(drops_and_keeps(route(q, k, **pack.options)))
    torch.testing.assert_close(moba_attention(q, k, v, **pack.options), reference_attention(q, k, v, **pack.options))


def test_log_sum_exp_carries_no_gradient():
    """Catches backends that differ in whether a gradient flows through the log-sum-exp."""
    q, k, v = PACK.tensors(requires_grad=True)
    for backend in ("torch", "reference"):
        out, lse = moba_attention(q, k, v, backend=backend, return_lse=True, **PACK.options)
        assert out.requires_grad and not lse.requires_grad
        assert not full_attention(q, k, v, backend=backend, return_lse=True)[1].requires_grad


def test_empty_pack():
    """Catches a rank without tokens bringing the run down, forward or backward."""
    q, k, v = Pack([0, 0], block_size=4, top_k=2).tensors(requires_grad=True)
    for spec in (Full(), Moba(4, 2), Moba(4, 2, backend="torch")):
        out, lse = attention(q, k, v, spec, cu_seqlens=bounds([0, 0]), return_lse=True)
        assert out.shape == q.shape and lse.shape == (2, 0)
        attention(q, k, v, spec, cu_seqlens=bounds([0, 0])).sum().backward()


def test_spec_chooses_the_kind():
    """Catches a plan that is read but not followed."""
    q, k, v = PACK.tensors()
    cu_seqlens = PACK.options["cu_seqlens"]
    sparse = attention(q, k, v, Moba(8, 3), cu_seqlens=cu_seqlens)
    dense = attention(q, k, v, Full(), cu_seqlens=cu_seqlens)
    torch.testing.assert_close(sparse, reference_attention(q, k, v, **PACK.options))
    torch.testing.assert_close(dense, plain_full_attention(q, k, v, PACK.lengths))
    assert not torch.allclose(sparse, dense)


# -------------------- choice of backend


def test_auto_says_once_what_it_took(choices):
    """Catches a silent choice, and a line for every layer of every step."""
    q, k, v = PACK.tensors()
    for _ in range(3):
        moba_attention(q, k, v, **PACK.options)
        full_attention(q, k, v)
    assert [(r.levelname, r.getMessage()) for r in choices.records] == [
        ("INFO", "moba attention runs on backend 'torch'"),
        ("INFO", "full attention runs on backend 'torch'"),
    ]


def test_auto_says_why_it_is_not_the_fastest(choices, monkeypatch):
    """Catches a slow backend taken in silence, or one taken that had refused."""

    def closed(kind, q, documents):
        return "closed today"

    here = QueryShape("cpu", "float32", num_tokens=64, num_heads=2, num_kv_heads=2, head_dim=8)
    table = (Backend("triton", closed), Backend("flash", closed), Backend("torch", lambda *_: None))
    monkeypatch.setattr(Moba, "backends", table)
    found = choose(Moba(8, 2), here, None)
    log_choice("moba", found)
    (record,) = choices.records
    assert record.levelname == "WARNING"
    assert "'torch': not 'triton' (closed today); not 'flash' (closed today)" in record.getMessage()
    monkeypatch.setattr(Moba, "backends", table[:2])
    with pytest.raises(BackendUnavailable, match=r"not 'flash' \(closed today"):
        choose(Moba(8, 2), here, None)
    with pytest.raises(BackendUnavailable, match="closed today"):
        choose(Moba(8, 2, backend="flash"), here, None)


def test_auto_does_not_hide_other_errors(monkeypatch):
    """Catches a fallback that swallows a bug or an out-of-memory of the faster backend."""

    def run(*_, **__):
        raise RuntimeError("out of memory")

    q, k, v = PACK.tensors()
    monkeypatch.setattr("moba.backends.torch_blocks.moba_torch", run)
    with pytest.raises(RuntimeError, match="out of memory"):
        moba_attention(q, k, v, **PACK.options)


def test_a_backend_that_cannot_names_one_that_can(monkeypatch):
    """Catches an ImportError or a crash inside a kernel where a sentence belongs."""
    q, k, v = PACK.tensors()
    with pytest.raises(BackendUnavailable, match=r"backend='flash' needs CUDA .* use backend='torch'"):
        moba_attention(q, k, v, backend="flash", **PACK.options)
    with pytest.raises(BackendUnavailable, match=r"backend='flash' needs CUDA .* use backend='torch'"):
        full_attention(q, k, v, backend="flash")
    monkeypatch.setitem(sys.modules, "triton", None)
    with pytest.raises(BackendUnavailable, match=r"needs the triton package: use 'flash' on CUDA or 'torch'"):
        moba_attention(q, k, v, backend="triton", **PACK.options)
    assert issubclass(BackendUnavailable, ValueError)


def test_triton_has_no_dense_kernel_and_says_so(choices):
    """Catches a hybrid plan with backend=triton that cannot run its full layers, or runs them elsewhere in silence."""
    q, k, v = PACK.tensors()
    out = full_attention(q, k, v, backend="triton")
    torch.testing.assert_close(out, full_attention(q, k, v))
    assert choices.records[0].getMessage() == (
        "full attention runs on backend 'torch': not 'triton' (there is no kernel of full attention)"
    )


# -------------------- full attention


@settings(deadline=None, max_examples=25)
@given(packs(top_k=1))
def test_full_attention_equals_plain(pack):
    """Catches leaks between documents, misaligned late queries, GQA groups in another order, a wrong gradient."""
    q, k, v = pack.tensors(requires_grad=True)
    lengths_k = [a + b for a, b in zip(pack.lengths, pack.extra or [0] * 4)]
    want = plain_full_attention(q, k, v, pack.lengths, lengths_k)
    cotangent = torch.randn_like(want)
    want_grads = torch.autograd.grad(want, (q, k, v), cotangent, materialize_grads=True)
    documents = {name: pack.options[name] for name in ("cu_seqlens", "cu_seqlens_k")}
    for backend in ("auto", "torch", "reference"):
        out = full_attention(q, k, v, backend=backend, **documents)
        torch.testing.assert_close(out, want)
        grads = torch.autograd.grad(out, (q, k, v), cotangent, materialize_grads=True)
        for a, b in zip(grads, want_grads):
            torch.testing.assert_close(a, b)
        again, lse = full_attention(q, k, v, backend=backend, return_lse=True, **documents)
        torch.testing.assert_close(again, want)
        _, want_lse = reference_attention(q, k, v, block_size=99, top_k=1, return_lse=True, **documents)
        torch.testing.assert_close(lse, want_lse.detach())


def test_decoding_one_token_equals_the_last_row():
    """Catches a causal mask aligned at the first key, where a single query would see a single key."""
    pack = replace(PACK, lengths=[20, 31])
    q, k, v = pack.tensors()
    options = {"cu_seqlens": bounds([1, 1]), "cu_seqlens_k": bounds([20, 31])}
    last = torch.tensor([19, 50])
    want = plain_full_attention(q, k, v, [20, 31])[last]
    torch.testing.assert_close(full_attention(q[last], k, v, **options), want)
    sparse = moba_attention(q, k, v, **pack.options)[last]
    torch.testing.assert_close(moba_attention(q[last], k, v, block_size=8, top_k=3, **options), sparse)


# -------------------- arguments

X, Y = torch.zeros(6, 4, 8), torch.zeros(6, 3, 8)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"block_size": 0}, "block_size=0: needs an integer of at least 1"),
        ({"block_size": 2.0}, "block_size=2.0"),
        ({"top_k": True}, "top_k=True"),
        ({"backend": "cuda"}, "backend='cuda': choose one of auto, reference, torch, flash, triton, cudnn"),
        ({"q": torch.zeros(6, 8)}, r"q has shape \[6, 8\]: needs three dimensions"),
        ({"q": X.long()}, "q has dtype torch.int64"),
        ({"v": X.double()}, "v is torch.float64 on cpu but q is torch.float32"),
        ({"k": Y, "v": Y}, "q has 4 heads and k has 3: q's must be a multiple"),
        ({"k": torch.zeros(6, 4, 16)}, "k has head size 16 but q has 8"),
        ({"v": torch.zeros(6, 4, 9)}, r"v has shape \[6, 4, 9\] but k has \[6, 4, 8\]"),
        ({"k": torch.zeros(7, 4, 8), "v": torch.zeros(7, 4, 8)}, "k has 7 tokens but q has 6: give cu_seqlens"),
        ({"softmax_scale": float("nan")}, "softmax_scale=nan: needs a finite number"),
        ({"cu_seqlens": torch.tensor([0, 6])}, "cu_seqlens has dtype torch.int64.*needs int32.*such as .0, 6."),
        ({"cu_seqlens": torch.tensor([[0, 6]], dtype=torch.int32)}, r"cu_seqlens has .*shape \[1, 2\]"),
        ({"cu_seqlens": bounds([5])}, "cu_seqlens goes from 0 to 5: must start at 0 and end at 6"),
        ({"cu_seqlens": bounds([6]) + 1}, "cu_seqlens goes from 1 to 7"),
        (
            {"cu_seqlens": torch.tensor([0, 4, 3, 6], dtype=torch.int32)},
            r"cu_seqlens=\[0, 4, 3, 6\]: must not decrease",
        ),
        ({"cu_seqlens_k": bounds([6])}, "cu_seqlens_k is given but cu_seqlens is not"),
        ({"cu_seqlens": bounds([6]), "cu_seqlens_k": bounds([2, 4])}, "cu_seqlens_k describes 2 documents but .* 1"),
        ({"cu_seqlens": bounds([3, 3]), "cu_seqlens_k": bounds([4, 2])}, r"documents \[1\] more queries than"),
    ],
)
def test_bad_arguments_are_named(change, message):
    """Catches an argument that fails inside a kernel, or not at all, instead of by name, with value and remedy."""
    arguments = {"q": X, "k": X, "v": X, "block_size": 2, "top_k": 2, **change}
    q, k, v = (arguments.pop(name) for name in "qkv")
    with pytest.raises(ValueError, match=message):
        moba_attention(q, k, v, **arguments)
    if "block_size" not in change and "top_k" not in change:
        del arguments["block_size"], arguments["top_k"]
        with pytest.raises(ValueError, match=message):
            full_attention(q, k, v, **arguments)


# -------------------- CUDA


@pytest.mark.gpu
@needs_cuda
@pytest.mark.parametrize("backend", ["auto", "triton", "flash", "torch"])
def test_backends_on_cuda(backend):
    """Catches a backend that does not fit the entry: all must equal the definition, with gradients, in bfloat16."""
    pack = Pack([700, 0, 301], block_size=64, top_k=3, heads=(4, 2), head_dim=64, dtype=torch.bfloat16)
    q, k, v = (x.detach().cuda().requires_grad_() for x in pack.tensors())
    options = {**pack.options, "cu_seqlens": pack.options["cu_seqlens"].cuda()}
    out, lse = moba_attention(q, k, v, backend=backend, return_lse=True, **options)
    want, want_lse = reference_attention(q, k, v, return_lse=True, **options)
    torch.testing.assert_close(out, want, rtol=2e-2, atol=2e-2)
    torch.testing.assert_close(lse, want_lse, rtol=1e-3, atol=1e-3)
    cotangent = torch.randn_like(out)
    for a, b in zip(torch.autograd.grad(out, (q, k, v), cotangent), torch.autograd.grad(want, (q, k, v), cotangent)):
        torch.testing.assert_close(a, b, rtol=5e-2, atol=5e-2)


@pytest.mark.gpu
@needs_cuda
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
def test_full_attention_on_cuda(dtype, choices):
    """Catches float32 that fails on flash kernels instead of falling back with a reason, and waiting for the device."""
    q, k, v = (x.to(dtype).cuda().requires_grad_() for x in Pack([700, 0, 301], 64, 3, (4, 2), head_dim=64).tensors())
    cu_seqlens = bounds([700, 0, 301]).cuda()
    full_attention(q, k, v, cu_seqlens=cu_seqlens)
    torch.cuda.set_sync_debug_mode("error" if dtype == torch.bfloat16 else "default")
    try:
        out = full_attention(q, k, v, cu_seqlens=cu_seqlens)
    finally:
        torch.cuda.set_sync_debug_mode("default")
    want = plain_full_attention(*(x.detach().cpu().double() for x in (q, k, v)), [700, 0, 301])
    torch.testing.assert_close(out.cpu().double(), want, rtol=2e-2, atol=2e-2)
    level = "INFO" if dtype == torch.bfloat16 else "WARNING"
    assert [r.levelname for r in choices.records] == [level]
