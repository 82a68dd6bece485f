"""The decoding kernels against the definition in float64, in Triton's interpreter on a CPU and on a GPU."""

from __future__ import annotations

from itertools import accumulate

import pytest
import torch

pytest.importorskip("triton", reason="the triton backend needs triton")

from moba import moba_attention
from moba.backends.triton_attention import INTERPRETED
from moba.backends.triton_decode import moba_decode
from moba.documents import Documents
from moba.kinds import Moba
from moba.kv_cache import KVCache, SequenceCache
from moba.reference import reference_attention, reference_selection
from moba.routing import block_means

DEVICE = "cpu" if INTERPRETED else "cuda"
pytestmark = [
    pytest.mark.skipif(not INTERPRETED and not torch.cuda.is_available(), reason="needs the interpreter, or CUDA"),
    pytest.mark.filterwarnings("ignore::RuntimeWarning"),  # the interpreter computes masked lanes too
]
HALF = torch.float16 if INTERPRETED else torch.bfloat16  # whose products the interpreter cannot do
LENGTHS = (70, 1, 33, 16, 17, 0)


def sequences(lengths, heads, head_dim, dtype, seed=0):
    """q [N, H, D] and for each sequence k, v [S, G, D]."""
    generator = torch.Generator().manual_seed(seed)
    num_heads, num_kv_heads = heads
    q = torch.randn(len(lengths), num_heads, head_dim, generator=generator).to(dtype)
    shapes = [(length, num_kv_heads, head_dim) for length in lengths]
    k, v = ([torch.randn(shape, generator=generator).to(dtype) for shape in shapes] for _ in range(2))
    return q, k, v


def decode(q, k, v, lengths, **sizes):
    """The kernels over sequences that stand one after the other."""
    means = [block_means(one, sizes["block_size"]) for one in k]
    starts, mean_starts = (
        torch.tensor([0, *accumulate(map(len, several))][:-1], device=DEVICE) for several in (k, means)
    )
    packed = [torch.cat(several).to(DEVICE) for several in (k, v, means)]
    length = torch.tensor(lengths, device=DEVICE)
    found = moba_decode(q.to(DEVICE), *packed, starts, length, mean_starts, **sizes)
    return [x.cpu() for x in found]


def definition(q, k, v, **sizes):
    """(out [H, D], lse [H], selection [H, K]) of the last token of one sequence, in float64."""
    queries = torch.zeros(len(k), *q.shape, dtype=torch.float64)
    queries[-1] = q.double()
    out, lse = reference_attention(queries, k.double(), v.double(), **sizes, return_lse=True)
    sizes.pop("softmax_scale", None)
    return out[-1], lse[:, -1], reference_selection(queries, k.double(), **sizes)[:, -1]


@pytest.mark.parametrize("dtype", [torch.float32, HALF], ids=str)
@pytest.mark.parametrize(
    ("heads", "head_dim", "sizes"),
    [
        ((4, 2), 64, {"block_size": 16, "top_k": 3}),
        ((4, 1), 80, {"block_size": 16, "top_k": 2, "first_blocks": 1}),
        ((2, 2), 128, {"block_size": 16, "top_k": 1}),
        ((2, 1), 24, {"block_size": 5, "top_k": 6, "first_blocks": 2, "softmax_scale": 0.4}),
        ((2, 1), 16, {"block_size": 7, "top_k": 20}),
        ((20, 1), 16, {"block_size": 16, "top_k": 3}),
    ],
    ids=str,
)
def test_the_newest_tokens_equal_the_definition(dtype, heads, head_dim, sizes):
    """Catches a wrong block, mask, key head, tail or weight, in ragged batches with short and empty sequences, where
    top_k exceeds the blocks, and blocks that no piece divides; the selection is that of the definition."""
    q, k, v = sequences(LENGTHS, heads, head_dim, dtype)
    out, lse, selection = decode(q, k, v, LENGTHS, **sizes)
    close = {"rtol": 1e-4, "atol": 1e-5} if dtype == torch.float32 else {"rtol": 1e-2, "atol": 1e-2}
    for n, length in enumerate(LENGTHS):
        if length == 0:
            assert not out[n].any() and lse[:, n].eq(float("-inf")).all() and selection[:, n].eq(-1).all()
            continue
        want, want_lse, want_selection = definition(q[n], k[n], v[n], **sizes)
        torch.testing.assert_close(out[n].double(), want, **close)
        torch.testing.assert_close(lse[:, n].double(), want_lse, rtol=1e-4, atol=1e-4)
        assert torch.equal(selection[:, n], want_selection.int())
    num_blocks = -(-LENGTHS[0] // sizes["block_size"])
    assert sizes["top_k"] < num_blocks or sizes["block_size"] == 7  # else nothing is dropped


def test_heads_that_pick_the_same_blocks():
    """Catches a block that is read once and not given to each of the heads that picked it, wholly or in part shared."""
    q, k, v = sequences([150, 150], (4, 1), 16, torch.float32)
    q[0] = q[0, :1]
    q[1, 1] = q[1, 0]
    sizes = {"block_size": 16, "top_k": 3}
    out, _, selection = decode(q, k, v, [150, 150], **sizes)
    assert (selection[:, 0] == selection[:1, 0]).all() and len(selection[:, 1].unique(dim=0)) > 1
    for n in range(2):
        want, _, want_selection = definition(q[n], k[n], v[n], **sizes)
        assert torch.equal(selection[:, n], want_selection.int())
        torch.testing.assert_close(out[n].double(), want, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("first_blocks", [0, 2])
def test_more_blocks_than_a_program_looks_at_together(first_blocks):
    """Catches blocks of a later tile that are left out or numbered as those of the first, and a best that is lost."""
    lengths = [601, 257]
    q, k, v = sequences(lengths, (2, 1), 16, torch.float32)
    sizes = {"block_size": 1, "top_k": 9, "first_blocks": first_blocks}
    out, _, selection = decode(q, k, v, lengths, **sizes)
    assert (selection[:, 0, :-1] < 256).any() and (selection[:, 0, :-1] >= 512).any()
    for n in range(2):
        want, _, want_selection = definition(q[n], k[n], v[n], **sizes)
        assert torch.equal(selection[:, n], want_selection.int())
        torch.testing.assert_close(out[n].double(), want, rtol=1e-4, atol=1e-5)


def test_long_blocks_are_read_in_pieces():
    """Catches a piece that is left out, read twice, or reaches into the next block."""
    q, k, v = sequences([700], (2, 1), 16, torch.float32)
    sizes = {"block_size": 200, "top_k": 2}
    out, _, selection = decode(q, k, v, [700], **sizes)
    want, _, want_selection = definition(q[0], k[0], v[0], **sizes)
    assert torch.equal(selection[:, 0], want_selection.int())
    torch.testing.assert_close(out[0].double(), want, rtol=1e-4, atol=1e-5)


def test_a_sequence_does_not_depend_on_its_batch():
    """Catches results that change in the last bit with the batch, and rows of a neighbour that are read."""
    lengths = [70, 33, 52]
    q, k, v = sequences(lengths, (4, 2), 16, torch.float32)
    sizes = {"block_size": 16, "top_k": 3}
    out, lse, selection = decode(q, k, v, lengths, **sizes)
    for n, length in enumerate(lengths):
        alone = decode(q[n : n + 1], k[n : n + 1], v[n : n + 1], [length], **sizes)
        for found, want in zip(alone, (out[n : n + 1], lse[:, n : n + 1], selection[:, n : n + 1])):
            assert torch.equal(found, want)


def test_only_selected_blocks_are_read():
    """Catches a step whose cost grows with the length: other blocks may hold anything."""
    q, k, v = sequences([200], (4, 2), 16, torch.float32)
    sizes = {"block_size": 16, "top_k": 3}
    means = block_means(k[0], 16).to(DEVICE)
    zero, length = torch.zeros(1, dtype=torch.int64, device=DEVICE), torch.tensor([200], device=DEVICE)

    def run(k, v):
        given = (x.to(DEVICE) for x in (q, k, v))
        return moba_decode(*given, means, zero, length, zero, **sizes)

    want, _, selection = run(k[0], v[0])
    spoiled = torch.tensor([b not in selection for b in range(13)]).repeat_interleave(16)[:200]
    assert spoiled.sum() >= 5 * 16
    k[0][spoiled] = v[0][spoiled] = float("nan")
    assert torch.equal(run(k[0], v[0])[0], want)


def test_keys_by_head_are_read_where_they_lie():
    """Catches strides that are taken for those of [S, G, D]: transformers keeps [B, G, S, D]."""
    q, k, v = sequences([40, 40], (4, 2), 16, torch.float32)
    sizes = {"block_size": 8, "top_k": 2}
    want = decode(q, k, v, [40, 40], **sizes)[0]
    k_BGSD, v_BGSD = (torch.stack(x).transpose(1, 2).contiguous().to(DEVICE) for x in (k, v))
    rows = [x.as_strided((1, 2, 16), (16, 40 * 16, 1)) for x in (k_BGSD, v_BGSD)]
    means = torch.cat([block_means(one, 8) for one in k]).to(DEVICE)
    starts = [torch.tensor(values, device=DEVICE) for values in ([0, 2 * 40], [40, 40], [0, len(means) // 2])]
    found = moba_decode(q.to(DEVICE), *rows, means, *starts, **sizes)[0]
    assert torch.equal(found.cpu(), want)


def test_the_backend_takes_the_last_tokens_of_documents():
    """Catches a decoding step of attend() that goes elsewhere, or one whose gradient is lost."""
    lengths, dtype = [70, 33, 1], torch.float32 if INTERPRETED else torch.bfloat16
    q, k, v = sequences(lengths, (4, 2), 16, dtype)
    bounds = [torch.tensor([0, *accumulate(one)], dtype=torch.int32) for one in ([1, 1, 1], lengths)]
    options = {"block_size": 16, "top_k": 3, "cu_seqlens": bounds[0], "cu_seqlens_k": bounds[1]}
    given = [x.to(DEVICE) for x in (q, torch.cat(k), torch.cat(v))]
    found = moba_attention(*given, **options, backend="triton", return_lse=True)
    want = moba_attention(*(x.double().cpu() for x in given), **options, backend="torch", return_lse=True)
    close = {"rtol": 1e-4, "atol": 1e-5} if INTERPRETED else {"rtol": 1e-2, "atol": 1e-2}
    for one, other in zip(found, want):
        torch.testing.assert_close(one.double().cpu(), other, **close)
    given[0].requires_grad_()
    moba_attention(*given, **options, backend="triton").sum().backward()
    gradient, given[0].grad = given[0].grad, None
    moba_attention(*(x.double().cpu() for x in given), **options, backend="torch").sum().backward()
    torch.testing.assert_close(gradient, given[0].grad, **close)


@torch.no_grad()
def test_sequences_of_a_cache_are_decoded_in_one_call(monkeypatch):
    """Catches a launch for each sequence, keys that are read in another one's row, blocks counted from the wrong mean,
    and a sequence that pauses and shifts the others."""
    from moba.backends import triton_decode

    calls, kernels = [], triton_decode.moba_decode
    monkeypatch.setattr(triton_decode, "moba_decode", lambda *a, **b: calls.append(len(a[0])) or kernels(*a, **b))
    lengths, spec = [70, 17, 48], Moba(16, 3, backend="triton")
    _, k, v = sequences([length + 3 for length in lengths], (4, 2), 16, HALF)
    queries = torch.randn(3, 3, 4, 16).to(HALF)
    cache, done = KVCache(1, 3, capacity=71)[0], [0, 0, 0]
    for number, step in enumerate((lengths, [1, 1, 1], [1, 0, 1], [0, 1, 1])):
        parts = [[x[n : n + size] for x in pair] for *pair, n, size in zip(k, v, done, step)]
        done = [n + size for n, size in zip(done, step)]
        q = queries[number - 1, : sum(step)] if number else torch.zeros(sum(step), 4, 16, dtype=HALF)
        given = [x.to(DEVICE) for x in (q, *map(torch.cat, zip(*parts)))]
        out = cache.attend(*given, spec, Documents.from_lengths(step, device=DEVICE))
        going = [i for i, size in enumerate(step) if size]
        for row, i in enumerate(going if number else ()):
            want = definition(q[row], k[i][: done[i]], v[i][: done[i]], block_size=16, top_k=3)[0]
            torch.testing.assert_close(out[row].double().cpu(), want, rtol=2e-2, atol=2e-2)
    assert calls == [3, 2, 2] and cache.sequences[0].storage.capacity > 71


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
def test_a_cache_on_a_gpu_decodes_by_the_kernels(monkeypatch):
    """Catches a cache that goes on in torch, and means that fall behind the keys."""
    from moba.backends import triton_decode

    calls, kernels = [], triton_decode.moba_decode
    monkeypatch.setattr(triton_decode, "moba_decode", lambda *a, **b: calls.append(1) or kernels(*a, **b))
    _, k, v = sequences([300], (8, 2), 128, torch.bfloat16)
    queries = torch.randn(300, 8, 128).bfloat16()
    sequence, spec = SequenceCache(), Moba(32, 3, first_blocks=1)
    sequence.append(k[0][:100].cuda(), v[0][:100].cuda())
    for place in range(100, 300):
        sequence.append(k[0][place : place + 1].cuda(), v[0][place : place + 1].cuda())
        out = spec.decode(queries[place : place + 1].cuda(), [sequence], sequence.documents(1), dense=False)
        if place % 31 == 0 or place % 32 in (0, 31):
            some = slice(0, place + 1)
            want = definition(queries[place], k[0][some], v[0][some], block_size=32, top_k=3, first_blocks=1)[0]
            torch.testing.assert_close(out[0].double().cpu(), want, rtol=2e-2, atol=2e-2)
    assert len(calls) == 200


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
def test_replays_of_a_graph_give_the_bits_of_a_call():
    """Catches a kernel that reads what the one before it has yet to write: steps follow each other without a pause, and
    their partial results and selections lie in the same memory."""
    lengths = [5000, 1, 2048, 700]
    steps = [sequences(lengths, (8, 2), 128, torch.bfloat16, seed) for seed in range(4)]
    given = []
    for q, k, v in steps:
        means = [block_means(one, 64) for one in k]
        starts = (torch.tensor([0, *accumulate(map(len, several))][:-1]).cuda() for several in (k, means))
        keys, mean_starts = starts
        given.append([q.cuda(), *(torch.cat(x).cuda() for x in (k, v, means)), keys, mean_starts])
    length = torch.tensor(lengths).cuda()

    def step(q, k, v, means, keys, mean_starts):
        return moba_decode(q, k, v, means, keys, length, mean_starts, block_size=64, top_k=6)

    want = [[x.clone() for x in step(*one)] for one in given]
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        found = [step(*one) for one in given]
    for _ in range(20):
        for outputs in found:
            for x in outputs:
                x.zero_()
        for _ in range(3):
            graph.replay()
        assert all(torch.equal(a, b) for pair in zip(found, want) for a, b in zip(*pair))
