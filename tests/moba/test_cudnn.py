"""Dense attention document by document: its padding and regrouping on a CPU against the fp64 definition, and on a GPU
cuDNN's kernels themselves."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from packs import HEADS, bounds

from moba import Documents, Full, Moba, attend
from moba.attention import planned_lengths, prepare, shape_of
from moba.backends import refusals
from moba.backends.choice import choose
from moba.backends.cudnn import (
    PLAIN_DENSE,
    Dense,
    build_plans,
    cudnn_attention,
    padded_length,
    padded_lengths,
    runs_of,
)
from moba.backends.refusals import BackendUnavailable
from moba.backends.varlen import PLAIN
from moba.kinds import QueryShape
from moba.reference import reference_attention


def inputs(lengths, heads, head_dim=8, dtype=torch.float64, device="cpu"):
    """q, k, v with gradients, and a cotangent."""
    generator = torch.Generator().manual_seed(sum(lengths))

    def tensor(num_heads):
        x = torch.randn(sum(lengths), num_heads, head_dim, generator=generator, dtype=torch.float64)
        return x.to(device=device, dtype=dtype).requires_grad_()

    return [tensor(heads[0]), tensor(heads[1]), tensor(heads[1])], tensor(heads[0]).detach()


def results(attention, tensors, cotangent):
    """out, lse and the gradients of q, k, v."""
    out, lse = attention(*tensors)
    return [out, lse, *torch.autograd.grad(out, tensors, cotangent)]


def dense_reference(lengths):
    options = {"block_size": max(1, *lengths), "top_k": 1, "cu_seqlens": bounds(lengths), "return_lse": True}
    return lambda q, k, v: reference_attention(q, k, v, **options)


def recorded(seen):
    """The plain provider, which notes the lengths that it is given."""

    def forward(q, k, v, scale):
        seen.append(q.shape[0])
        return PLAIN_DENSE.forward(q, k, v, scale)

    return Dense("recorded", forward, PLAIN_DENSE.backward)


@settings(max_examples=40, deadline=None)
@given(
    lengths=st.lists(st.sampled_from([0, 1, 3, 17, 40, 128, 129, 200, 260]), min_size=1, max_size=6).filter(any),
    heads=st.sampled_from(HEADS),
    shortest=st.sampled_from([1, 17, 129, 1000]),
)
def test_equals_dense_attention_of_each_document(lengths, heads, shortest):
    """Catches documents that see their padding or each other, gradients of padding that reach a neighbour, runs put
    together in the wrong order, and padding that is missing at the pack's end."""
    tensors, cotangent = inputs(lengths, heads)
    options = {"return_lse": True, "shortest": shortest}
    got = results(lambda q, k, v: cudnn_attention(q, k, v, lengths, **options), tensors, cotangent)
    want = results(dense_reference(lengths), tensors, cotangent)
    for name, a, b in zip(("out", "lse", "dq", "dk", "dv"), got, want):
        torch.testing.assert_close(a, b, rtol=1e-9, atol=1e-9, msg=lambda text, name=name: f"{name}: {text}")


def test_long_documents_alone_are_padded_and_to_few_lengths():
    """Catches short documents in calls of their own, an odd length that reaches cuDNN, and a second call for what the
    pack already holds: the padding of the first document is the second one's tokens."""
    lengths, seen, calls = [300, 5, 6, 150, 7], [], []

    def short(*arguments):
        calls.append(arguments[3].tolist())
        return PLAIN.forward(*arguments)

    tensors, _ = inputs(lengths, (2, 1))
    cudnn_attention(*tensors, lengths, shortest=100, dense=recorded(seen), varlen=PLAIN._replace(forward=short))
    assert seen == [384, 256] and calls == [[0, 5, 11], [0, 7]]
    assert [run.padded for run in runs_of(lengths, 100)] == [384, 0, 256, 0]


def test_padded_lengths_are_few_and_close():
    """Catches waste above an eighth, lengths that are not their own padding, and plans built within a step."""
    for length in (*range(1, 5000), 32767, 32768, 32769, 1 << 20):
        padded = padded_length(length)
        assert length <= padded and padded_length(padded) == padded and padded % 128 == 0
        assert padded <= length * 9 / 8 or padded - length < 128
    planned = padded_lengths(32768, 4096)
    assert {padded_length(length) for length in range(4096, 32769)} == set(planned) and len(planned) == 25


def test_no_value_of_a_device_is_read():
    """Catches a length that is taken from a tensor: on CUDA that waits for the queue. A meta tensor has no values."""
    tensors = [torch.empty(700, heads, 64, device="meta", dtype=torch.bfloat16) for heads in (4, 2, 2)]

    def forward(q, k, v, scale):
        return torch.empty_like(q), q.new_empty(q.shape[1], q.shape[0])

    dense = Dense("meta", forward, forward)
    varlen = PLAIN._replace(forward=lambda q, k, v, *_: forward(q, k, v, 1.0))
    out = cudnn_attention(*tensors, [300, 20, 380], shortest=100, dense=dense, varlen=varlen)
    assert out.shape == (700, 4, 64)


# -------------------- when it is chosen

H100 = QueryShape("cuda", "bfloat16", num_tokens=32768, num_heads=32, num_kv_heads=8, head_dim=128)


def documents(*lengths, **options):
    return Documents.from_lengths(lengths, **options)


@pytest.mark.parametrize(("head_dim", "shortest"), [(128, 4096), (96, 4096), (64, 8192)])
def test_auto_takes_it_where_a_document_is_long(head_dim, shortest):
    """Catches cuDNN for packs of short documents, flash for long ones, one threshold for all head sizes, and a warning
    for packs where flash is the faster one anyway."""
    shape = H100._replace(head_dim=head_dim)
    assert choose(Full(), shape, documents(7, shortest, 9)) == ("cudnn", ())
    assert choose(Full(), shape, documents(7, shortest - 1, 9)) == ("flash", ())
    assert choose(Full(), shape._replace(longest=shortest), None).backend == "cudnn"
    assert choose(Full(), shape._replace(longest=shortest - 1), None).backend == "flash"
    assert choose(Full(), shape._replace(device="cpu"), documents(shortest)) == ("torch", ())
    # Where it hides nothing, MoBA is full attention.
    assert choose(Moba(shortest, 2).at(shortest), shape, documents(shortest)).backend == "cudnn"


@pytest.mark.parametrize(
    ("change", "pack", "words"),
    [
        ({"dtype": "float32"}, documents(8192), "dtype=torch.float32"),
        ({"head_dim": 136}, documents(8192), "head_dim=136"),
        ({"head_dim": 100}, documents(8192), "head_dim=100"),
        ({"deterministic": True}, documents(8192), "repeat"),
        ({"has_cudnn": False}, documents(8192), "8.0 or newer"),
        ({}, Documents(torch.tensor([0, 8192, 16384]), None, 16384, 16384, None, None), "on the CPU"),
        ({}, documents(8192, lengths_k=[9000]), "cu_seqlens_k"),
        ({}, documents(8192, lengths_k=[9000], starts=[100]), "cu_seqlens_k"),
        ({"device": "cpu"}, documents(8192), "needs CUDA"),
    ],
    ids=str,
)
def test_refuses_by_name_and_auto_says_so(change, pack, words):
    """Catches a crash inside cuDNN, wrong results for a cache that continues, a wait for the device, and gradients that
    do not repeat although they were to."""
    shape = H100._replace(**change)
    with pytest.raises(BackendUnavailable, match=f"{words}.*backend[ =]'(flash|torch)'"):
        choose(Full(backend="cudnn"), shape, pack)
    found = choose(Full(), shape, pack)
    assert found.backend in ("flash", "torch")
    assert shape.device == "cpu" or words in found.reasons[0]


def test_deterministic_mode_is_seen(monkeypatch):
    """Catches a trainer's run.deterministic, set globally, that the choice does not hear of."""
    q = torch.empty(4, 2, 8)
    assert not shape_of(q, q).deterministic and shape_of(q, q, deterministic=True).deterministic
    monkeypatch.setattr(torch, "are_deterministic_algorithms_enabled", lambda: True)
    assert shape_of(q, q).deterministic


def test_plans_cover_every_document_that_runs_on_it():
    """Catches a length that is left to its first step, and plans for lengths that MoBA computes sparsely or flash
    does."""
    everything = planned_lengths([Full(), Moba(512, 3)], H100, 32768)
    assert everything == padded_lengths(32768, 4096) and planned_lengths([Moba(512, 3)], H100, 32768) == []
    # Dense up to 6144 tokens: those are all documents at these lengths, though not all at the last.
    at = Moba(2000, 3)
    dense = [n for n in range(4096, 32769) if at.at(n) == Full()]
    assert planned_lengths([at], H100, 32768) == sorted({padded_length(n) for n in dense})
    for shape in (H100._replace(deterministic=True), H100._replace(dtype="float32"), H100._replace(device="cpu")):
        assert planned_lengths([Full()], shape, 32768) == []
    assert planned_lengths([Full(backend="flash")], H100, 32768) == []


def test_nothing_is_prepared_on_a_cpu(monkeypatch):
    """Catches seconds of dense attention at the start of a run that has no cuDNN."""
    monkeypatch.setattr("moba.backends.cudnn.build_plans", None)
    q = torch.empty(0, 2, 128)
    assert prepare([Full()], q, q, 1 << 20) == 0


gpu = pytest.mark.gpu
needs_cuda = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")


@gpu
@needs_cuda
@pytest.mark.parametrize("heads", [(4, 4), (4, 2), (8, 1)], ids=str)
@pytest.mark.parametrize("head_dim", [64, 128])
def test_kernels_equal_the_definition(heads, head_dim):
    """Catches grouped heads that cuDNN reads in another order, a log-sum-exp of another base, and padding that leaks
    into a gradient. bf16 against fp64."""
    lengths = [700, 40, 1000, 300, 5]
    tensors, cotangent = inputs(lengths, heads, head_dim, torch.bfloat16, "cuda")
    if problem := refusals.cudnn(Full(), shape_of(*tensors[:2]), Documents.from_lengths(lengths)):
        pytest.skip(problem)
    build_plans(*tensors[:2], padded_lengths(1000, 128))
    options = {"return_lse": True, "shortest": 128}
    got = results(lambda q, k, v: cudnn_attention(q, k, v, lengths, **options), tensors, cotangent)
    exact = [x.detach().double().cpu().requires_grad_() for x in tensors]
    want = results(dense_reference(lengths), exact, cotangent.double().cpu())
    for name, a, b in zip(("out", "lse", "dq", "dk", "dv"), got, want):
        error = (a.double().cpu() - b).norm() / b.norm()
        assert error < 1e-2, (name, float(error))


@gpu
@needs_cuda
@pytest.mark.parametrize("lengths", [[4300, 40, 4096, 5], [5000]], ids=str)
@pytest.mark.parametrize("heads", [(2, 2), (2, 1)], ids=str)
def test_full_attention_takes_it_and_equals_the_definition(lengths, heads):
    """Catches a backend that does not fit the entry, tensors of other strides, plans that are left to the first call,
    and a wait for the device. bf16 against fp64."""
    tensors, cotangent = inputs(lengths, heads, 128, torch.bfloat16, "cuda")
    pack = Documents.from_lengths(lengths, device="cuda")
    if problem := refusals.cudnn(Full(), shape_of(*tensors[:2]), pack):
        pytest.skip(problem)
    assert choose(Full(), shape_of(*tensors[:2]), pack).backend == "cudnn"
    assert prepare([Full()], *tensors[:2], max(lengths)) > 1

    def attention(q, k, v):
        q = q.transpose(0, 1).contiguous().transpose(0, 1)
        return attend(q, k, v, Full(), pack, return_lse=True)

    results(attention, tensors, cotangent)
    torch.cuda.set_sync_debug_mode("error")
    try:
        got = results(attention, tensors, cotangent)
    finally:
        torch.cuda.set_sync_debug_mode("default")
    exact = [x.detach().double().cpu().requires_grad_() for x in tensors]
    want = results(dense_reference(lengths), exact, cotangent.double().cpu())
    for name, a, b in zip(("out", "lse", "dq", "dk", "dv"), got, want):
        error = (a.double().cpu() - b).norm() / b.norm()
        assert error < 1e-2, (name, float(error))
