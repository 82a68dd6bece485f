"""Sliding-window attention: every backend against masks of a plain loop, and what it may cost."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from packs import LargestTensor, Pack, assert_same, attention, bounds, by_bounds, packs, with_gradients

from moba import sliding_attention
from moba.backends import torch_sliding
from moba.backends.varlen import PLAIN, varlen_attention
from moba.kinds import Full, Sliding
from moba.reference import reference_sliding

sliding_torch = by_bounds(torch_sliding.sliding_torch)

needs_cuda = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")


def plain_loop(q, k, v, *, window, cu_seqlens, cu_seqlens_k=None):
    """(out, lse), token by token: each looks back at the last `window` keys of its own document."""
    bounds_q, bounds_k = cu_seqlens.tolist(), (cu_seqlens if cu_seqlens_k is None else cu_seqlens_k).tolist()
    k, v = (x.repeat_interleave(q.shape[1] // x.shape[1], dim=1) for x in (k, v))
    outs, lses = [q[:0]], [q[:0, :, 0]]
    for i in range(len(bounds_q) - 1):
        for token in range(bounds_q[i], bounds_q[i + 1]):
            stop = bounds_k[i + 1] - (bounds_q[i + 1] - token) + 1
            seen = slice(max(bounds_k[i], stop - window), stop)
            scores = torch.einsum("hd,shd->hs", q[token], k[seen]) * q.shape[-1] ** -0.5
            outs.append(torch.einsum("hs,shd->hd", scores.softmax(-1), v[seen])[None])
            lses.append(scores.logsumexp(-1)[None])
    return torch.cat(outs), torch.cat(lses).T


def through_flash(q, k, v, *, window, cu_seqlens, cu_seqlens_k=None):
    """The way of backend "flash", on the primitive that runs on a CPU."""
    cu_k = cu_seqlens if cu_seqlens_k is None else cu_seqlens_k
    sizes = (int(cu_seqlens.diff().max()), int(cu_k.diff().max()))
    return varlen_attention(q, k, v, cu_seqlens, cu_k, *sizes, window=window, primitive=PLAIN, return_lse=True)


def by_backend(name):
    return lambda *qkv, **options: sliding_attention(*qkv, backend=name, return_lse=True, **options)


@settings(deadline=None, max_examples=20)
@given(packs(top_k=1), st.sampled_from([1, 2, 5, 16, 40]))
def test_backends_equal_a_plain_loop(pack, window):
    """Catches windows off by one, that reach over a document's start, or counted from the first query where keys
    outnumber queries; and wrong gradients or GQA groups."""
    documents = {name: pack.options[name] for name in ("cu_seqlens", "cu_seqlens_k")}
    qkv = pack.tensors(requires_grad=True)
    want = with_gradients(plain_loop, *qkv, window=window, **documents)
    for function in (*map(by_backend, ("auto", "torch", "reference")), sliding_torch, through_flash):
        assert_same(with_gradients(function, *qkv, window=window, **documents), want)


@pytest.mark.parametrize("window", [1, 100, 300])
def test_long_documents_equal_the_definition(window):
    """Catches errors at the edges of tiles (of 16 and 128 queries), gradients of keys that several tiles share, and a
    window that changes nothing here."""
    pack = Pack([700, 3, 260], block_size=1, top_k=1, heads=(4, 2))
    qkv, cu_seqlens = pack.tensors(requires_grad=True), bounds(pack.lengths)
    options = {"window": window, "cu_seqlens": cu_seqlens}
    want = with_gradients(lambda *a, **o: reference_sliding(*a, return_lse=True, **o), *qkv, **options)
    assert_same(with_gradients(by_backend("torch"), *qkv, **options), want)
    dense = attention(*qkv, Full(), cu_seqlens=cu_seqlens)
    assert not torch.allclose(dense, want[0])
    spec = Sliding(window=window)
    torch.testing.assert_close(attention(*qkv, spec, cu_seqlens=cu_seqlens), want[0])
    torch.testing.assert_close(attention(*qkv, Sliding(window=700), cu_seqlens=cu_seqlens), dense)


def test_memory_grows_with_the_window_alone():
    """Catches scores of the whole length, in either pass: 16384 tokens at a time would be 268 million elements."""
    q, k, v = Pack([16384], block_size=1, top_k=1, dtype=torch.float32).tensors(requires_grad=True)
    with LargestTensor() as largest:
        sliding_attention(q, k, v, window=64).sum().backward()
    assert 10**5 < largest.numel < 3 * 10**6


def test_empty_pack_and_triton(caplog):
    """Catches a rank without tokens bringing the run down, and a hybrid plan with backend=triton that cannot run."""
    q, k, v = Pack([0, 0], block_size=1, top_k=1).tensors(requires_grad=True)
    for backend in ("auto", "torch"):
        out, lse = sliding_attention(q, k, v, window=3, cu_seqlens=bounds([0, 0]), return_lse=True, backend=backend)
        assert out.shape == q.shape and lse.shape == (2, 0)
        out.sum().backward()
    q, k, v = Pack([30], block_size=1, top_k=1).tensors()
    with_triton = sliding_attention(q, k, v, window=3, backend="triton")
    assert torch.equal(with_triton, sliding_attention(q, k, v, window=3))


@pytest.mark.parametrize("window", [0, True, 2.0, None])
def test_a_window_is_a_positive_integer(window):
    """Catches a window that fails inside a kernel, or one that hides the own token."""
    q, k, v = Pack([6], block_size=1, top_k=1).tensors()
    with pytest.raises(ValueError, match=f"window={window}"):
        sliding_attention(q, k, v, window=window)
    with pytest.raises(ValueError, match=f"window={window}"):
        Sliding(window=window)


@pytest.mark.gpu
@needs_cuda
@pytest.mark.parametrize("backend", ["flash", "torch", "auto"])
@pytest.mark.parametrize("more_keys", [0, 90])
def test_cuda_equals_the_definition(backend, more_keys):
    """Catches what only a GPU shows: flash's own window arguments, forward and backward, against float64 masks."""
    lengths = [700, 0, 33, 300]
    extra = [more_keys] * 4 if more_keys else None
    pack = Pack(lengths, block_size=1, top_k=1, heads=(4, 2), extra=extra, head_dim=64, dtype=torch.bfloat16)
    qkv = pack.tensors()
    documents = {name: pack.options[name] for name in ("cu_seqlens", "cu_seqlens_k")}
    for window in (2, 65, 256):
        exact = [x.double().requires_grad_() for x in qkv]
        half = [x.cuda().requires_grad_() for x in qkv]
        want = with_gradients(
            lambda *a, **o: reference_sliding(*a, return_lse=True, **o), *exact, window=window, **documents
        )
        got = with_gradients(
            by_backend(backend), *half, window=window, **{n: b if b is None else b.cuda() for n, b in documents.items()}
        )
        for name, a, b in zip(("out", "lse", "dq", "dk", "dv"), got, want, strict=True):
            error = (a.detach().double().cpu() - b.detach()).norm() / b.detach().norm()
            assert error < 2e-2, (name, window, float(error))
