"""Reading in chunks and token by token against the forward pass over everything at once."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

import moba.kv_cache
from moba.documents import Documents
from moba.kinds import Full, Moba, Sliding
from moba.kv_cache import KVCache, SequenceCache, decode_moba
from moba.layer import MoBAAttention
from moba.reference import reference_attention, reference_selection
from moba.routing import block_means

HIDDEN, HEADS, KV_HEADS, HEAD_DIM = 32, 4, 2, 8
SPARSE = Moba(block_size=8, top_k=3)


@pytest.fixture(autouse=True)
def without_gradients():
    with torch.no_grad():
        yield


def make_layer(spec=SPARSE):
    torch.manual_seed(0)
    return MoBAAttention(HIDDEN, HEADS, KV_HEADS, HEAD_DIM, spec=spec).double()


def make_tokens(num_tokens, seed=1):
    return torch.randn(num_tokens, HIDDEN, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def rope_at(positions):
    angles = positions[:, None] * 10000.0 ** (-torch.arange(0, HEAD_DIM, 2, dtype=torch.float64) / HEAD_DIM)
    angles = torch.cat([angles, angles], dim=-1)
    return angles.cos(), angles.sin()


def one_shot(layer, x):
    return layer(x, *rope_at(torch.arange(len(x))), Documents.from_lengths([len(x)]))


def in_chunks(layer, x, sizes, cache):
    """The layer's outputs when x is read in chunks of these sizes."""
    outs = []
    for chunk in x.split(sizes):
        start = cache.lengths[0]
        positions = torch.arange(start, start + len(chunk))
        outs.append(layer(chunk, *rope_at(positions), Documents.from_lengths([len(chunk)]), cache[0]))
    return torch.cat(outs)


def make_qkv(num_tokens, num_heads=HEADS, num_kv_heads=KV_HEADS, dtype=torch.float64, seed=2):
    generator = torch.Generator().manual_seed(seed)
    shapes = [(num_tokens, heads, HEAD_DIM) for heads in (num_heads, num_kv_heads, num_kv_heads)]
    return [torch.randn(shape, generator=generator, dtype=torch.float64).to(dtype) for shape in shapes]


def test_decoding_token_by_token_equals_one_forward(monkeypatch):
    """Catches stale or early block means and off-by-one blocks, at every length and so at every block boundary."""
    num_tokens = 67
    selected = []
    select = moba.kv_cache.select_blocks

    def recording_select(q, means, layout, *sizes):
        selected.append((q, select(q, means, layout, *sizes)))
        return selected[-1][1]

    monkeypatch.setattr(moba.kv_cache, "select_blocks", recording_select)
    layer, x, cache = make_layer(), make_tokens(num_tokens), KVCache(1)
    got = in_chunks(layer, x, [1] * num_tokens, cache)
    torch.testing.assert_close(got, one_shot(layer, x), rtol=1e-9, atol=1e-9)

    # The same blocks as the definition picks from all queries and keys at once (the first token needs no choice).
    assert len(selected) == num_tokens - 1
    keys = cache[0].sequences[0].k
    queries = torch.cat([torch.zeros_like(selected[0][0]), *[q for q, _ in selected]])
    want = reference_selection(queries, keys, block_size=8, top_k=3)
    assert torch.equal(torch.cat([s for _, s in selected], dim=1), want[:, 1:])
    assert ((want >= 0).sum(-1) <= want[..., -1]).any()  # some query dropped some block


@settings(deadline=None, max_examples=25)
@given(
    sizes=st.lists(st.integers(1, 30), min_size=1, max_size=6),
    block_size=st.integers(1, 12),
    top_k=st.integers(1, 5),
)
def test_chunked_prefill_equals_one_forward(sizes, block_size, top_k):
    """Catches chunks that attend densely, or whose blocks start at the chunk instead of the document."""
    with torch.no_grad():
        layer, x = make_layer(Moba(block_size, top_k)), make_tokens(sum(sizes))
        got = in_chunks(layer, x, sizes, KVCache(1))
        torch.testing.assert_close(got, one_shot(layer, x), rtol=1e-9, atol=1e-9)


def test_chunks_would_differ_from_dense():
    """Catches a vacuous comparison: the sizes used here must drop blocks."""
    layer, x = make_layer(), make_tokens(67)
    sparse = one_shot(layer, x)
    layer.spec = Full()
    assert not torch.allclose(sparse, one_shot(layer, x))


def test_dense_decode_after_sparse_prefill():
    """Catches a decode mode that routes the new token, or that turns the prompt dense."""
    layer, x = make_layer(), make_tokens(70)
    got = in_chunks(layer, x, [40, 26, 1, 1, 1, 1], KVCache(1, decode="full", prompts=[66]))
    torch.testing.assert_close(got[:66], one_shot(layer, x)[:66], rtol=1e-9, atol=1e-9)
    layer.spec = Full()
    torch.testing.assert_close(got[66:], one_shot(layer, x)[66:], rtol=1e-9, atol=1e-9)


@settings(deadline=None, max_examples=40)
@given(
    cuts=st.lists(st.lists(st.integers(1, 12), min_size=1, max_size=6), min_size=2, max_size=2),
    prompts=st.tuples(st.integers(1, 30), st.integers(1, 30)),
)
def test_what_is_prompt_does_not_depend_on_the_cut(cuts, prompts):
    """Catches a phase that is taken from a step's length: prompts in chunks, of one token, with a last chunk of one
    token, and several decoded tokens per step, for two sequences whose prompts end in different steps."""
    lengths = [sum(cut) for cut in cuts]
    steps = max(map(len, cuts))
    cuts = [cut + [0] * (steps - len(cut)) for cut in cuts]
    qkv = [make_qkv(n, seed=n) for n in lengths]
    cache, outs = KVCache(1, 2, decode="full", prompts=prompts), [[], []]
    done = [0, 0]
    for step in zip(*cuts):
        parts = [[x[d : d + n] for x in one] for one, d, n in zip(qkv, done, step)]
        joined = [torch.cat(one) for one in zip(*parts)]
        for out, piece in zip(outs, cache[0].attend(*joined, SPARSE, Documents.from_lengths(step)).split(step)):
            out.append(piece)
        done = [d + n for d, n in zip(done, step)]
    for one, out, prompt in zip(qkv, outs, prompts):
        want = reference_attention(*one, block_size=8, top_k=3)
        want[prompt:] = reference_attention(*one, block_size=64, top_k=1)[prompt:]
        torch.testing.assert_close(torch.cat(out), want, rtol=1e-9, atol=1e-9)


def test_full_layers_stay_full():
    """Catches MoBA decode in a layer whose spec is full (the last layers of a hybrid)."""
    layer, x = make_layer(Full()), make_tokens(40)
    got = in_chunks(layer, x, [20, 1, 18, 1], KVCache(1, decode="moba"))
    torch.testing.assert_close(got, one_shot(layer, x), rtol=1e-9, atol=1e-9)


def test_switching_the_spec_rebuilds_the_means():
    """Catches means of another block size used after a switch."""
    layer, x, cache = make_layer(), make_tokens(80), KVCache(1)
    in_chunks(layer, x[:60], [50] + [1] * 10, cache)
    layer.spec = Moba(block_size=5, top_k=4)
    got = in_chunks(layer, x[60:], [1] * 20, cache)
    torch.testing.assert_close(got, one_shot(layer, x)[60:], rtol=1e-9, atol=1e-9)


def test_several_sequences_in_a_packed_batch():
    """Catches sequences mixed up in the cache, with different prompts, one of them starting later and one pausing."""
    layer, cache = make_layer(), KVCache(1, num_sequences=3)
    texts = [make_tokens(n, seed=n) for n in (45, 30, 12)]
    steps = [[40, 20, 0], [1, 1, 10], [1, 0, 1], [1, 9, 1], [2, 0, 0]]
    done, outs = [0, 0, 0], [[], [], []]
    for step in steps:
        chunk = torch.cat([text[d : d + n] for text, d, n in zip(texts, done, step)])
        positions = torch.cat([torch.arange(d, d + n) for d, n in zip(done, step)])
        out = layer(chunk, *rope_at(positions), Documents.from_lengths(step), cache[0]).split(step)
        for i, n in enumerate(step):
            outs[i].append(out[i])
            done[i] += n
        assert cache.lengths == done
    for text, out in zip(texts, outs):
        torch.testing.assert_close(torch.cat(out), one_shot(layer, text), rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_incremental_means_equal_those_of_one_forward_bit_for_bit(dtype):
    """Catches means that depend on how the text was cut, which would flip near-ties between prefill and decode."""
    _, k, v = make_qkv(1000, dtype=dtype)
    whole = block_means(k, 64)[: 1000 // 64]
    for sizes in ([1000], [63, 1, 1, 127, 500, 308], [1] * 1000):
        sequence = SequenceCache()
        for part_k, part_v in zip(k.split(sizes), v.split(sizes)):
            sequence.append(part_k, part_v)
            means = sequence.block_means(64)
        assert torch.equal(means, whole) and means.dtype == torch.float32
        assert torch.equal(sequence.k, k) and torch.equal(sequence.v, v)


@pytest.mark.parametrize("length", [1, 7, 8, 9, 16, 17, 63, 64, 65])
@pytest.mark.parametrize("top_k", [1, 3, 20])
@pytest.mark.parametrize("heads", [(4, 4), (4, 1)])
def test_newest_token_equals_the_definition(length, top_k, heads):
    """Catches a wrong block, mask or key head of the decode step, around block boundaries and where top_k exceeds the
    blocks."""
    q, k, v = make_qkv(length, *heads)
    sequence = SequenceCache()
    sequence.append(k, v)
    got = decode_moba(q[-1:], [sequence], sequence.documents(1), block_size=8, top_k=top_k)
    want = reference_attention(q, k, v, block_size=8, top_k=top_k)[-1:]
    torch.testing.assert_close(got, want, rtol=1e-9, atol=1e-9)


def test_decoding_reads_only_selected_blocks():
    """Catches a decode step whose cost grows with the length: blocks that were not selected may hold anything."""
    q, k, v = make_qkv(200)
    sequence = SequenceCache()
    sequence.append(k, v)
    want = decode_moba(q[-1:], [sequence], sequence.documents(1), block_size=8, top_k=3)
    selected = reference_selection(q, k, block_size=8, top_k=3)[:, -1].unique()
    spoiled = torch.tensor([b not in selected for b in range(25)]).repeat_interleave(8)
    assert spoiled.sum() >= 8 * 8
    sequence.k[spoiled] = float("nan")
    sequence.v[spoiled] = float("nan")
    assert torch.equal(decode_moba(q[-1:], [sequence], sequence.documents(1), block_size=8, top_k=3), want)


@settings(deadline=None, max_examples=40)
@given(
    lengths=st.lists(st.integers(1, 70), min_size=2, max_size=4),
    steps=st.lists(st.lists(st.sampled_from([0, 1, 1, 1, 5]), min_size=4, max_size=4), min_size=1, max_size=4),
    spec=st.sampled_from([SPARSE, Moba(8, 4, first_blocks=2), Moba(8, 3, gate="local"), Full(), Sliding(11)]),
)
def test_sequences_together_are_each_alone(lengths, steps, spec):
    """Catches sequences that see each other's keys, means in another one's slots, blocks counted from the wrong start,
    and sequences without new tokens that shift the others; from one new token to several."""
    with torch.no_grad():
        steps = [lengths, *(step[: len(lengths)] for step in steps)]
        qkv = [make_qkv(sum(sizes), seed=i) for i, sizes in enumerate(zip(*steps))]
        together, alone, done = KVCache(1, len(lengths)), [KVCache(1) for _ in lengths], [0] * len(lengths)
        for step in steps:
            parts = [[x[d : d + n] for x in one] for one, d, n in zip(qkv, done, step)]
            done = [d + n for d, n in zip(done, step)]
            got = together[0].attend(*map(torch.cat, zip(*parts)), spec, Documents.from_lengths(step)).split(step)
            for i, (part, n) in enumerate(zip(parts, step)):
                if n:
                    want = alone[i][0].attend(*part, spec, Documents.from_lengths([n]))
                    torch.testing.assert_close(got[i], want, rtol=1e-9, atol=1e-9)


def test_sequences_are_decoded_in_one_call(monkeypatch):
    """Catches a batch whose new tokens are attended one sequence after the other: one choice of blocks for all."""
    chosen = []
    select = moba.kv_cache.select_blocks
    monkeypatch.setattr(moba.kv_cache, "select_blocks", lambda q, *rest: chosen.append(len(q)) or select(q, *rest))
    cache = KVCache(1, 3)
    for sizes in ([40, 33, 64], [1, 1, 1], [1, 0, 1]):
        qkv = make_qkv(sum(sizes))
        cache[0].attend(*qkv, SPARSE, Documents.from_lengths(sizes))
    assert chosen == [3, 2]


@pytest.mark.parametrize("longest", [30, 31])
@pytest.mark.parametrize("copied", [0, 100])
def test_dense_decoding_copies_no_long_keys(monkeypatch, longest, copied):
    """Catches keys of another sequence, or behind a sequence's end, and a copy of all that is cached for each token:
    sequences of one length, long ones, and short ones whose lengths differ."""
    copies = []
    joined = moba.kv_cache.joined
    monkeypatch.setattr(moba.kv_cache, "joined", lambda sequences: copies.append(1) or joined(sequences))
    monkeypatch.setattr(moba.kv_cache, "COPIED_TOKENS", copied)
    qkv, cache = [make_qkv(40, seed=i) for i in range(3)], KVCache(1, 3)
    lengths = [30, longest, 30]
    first = [torch.cat([x[:n] for x, n in zip(xs, lengths)]) for xs in zip(*qkv)]
    cache[0].attend(*first, SPARSE, Documents.from_lengths(lengths))
    new = [torch.cat([x[n : n + 1] for x, n in zip(xs, lengths)]) for xs in zip(*qkv)]
    got = cache[0].attend(*new, Full(), Documents.from_lengths([1, 1, 1]))
    for one, n, out in zip(qkv, lengths, got):
        want = reference_attention(*(x[: n + 1] for x in one), block_size=64, top_k=1)[-1]
        torch.testing.assert_close(out, want, rtol=1e-9, atol=1e-9)
    assert len(copies) == (longest == 31 and copied == 100)


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
@pytest.mark.parametrize("spec", [Moba(32, 3), Moba(32, 4, first_blocks=1), Full()])
def test_cuda_sequences_together_are_each_alone(spec):
    """Catches what only a GPU shows: blocks of several documents scored together in half precision."""
    lengths, steps = [300, 77, 640], ([1, 1, 1], [7, 0, 3], [1, 1, 0])
    qkv = [[x.cuda() for x in make_qkv(n + 9, dtype=torch.bfloat16, seed=n)] for n in lengths]
    together, alone, done = KVCache(1, 3), [KVCache(1) for _ in lengths], [0] * 3
    for step in (lengths, *steps):
        parts = [[x[d : d + n] for x in one] for one, d, n in zip(qkv, done, step)]
        done = [d + n for d, n in zip(done, step)]
        documents = Documents.from_lengths(step, device="cuda")
        got = together[0].attend(*map(torch.cat, zip(*parts)), spec, documents).split(step)
        for i, (part, n) in enumerate(zip(parts, step)):
            if n:
                want = alone[i][0].attend(*part, spec, Documents.from_lengths([n], device="cuda"))
                torch.testing.assert_close(got[i], want, rtol=0, atol=2e-2)


@pytest.mark.parametrize("spec", [Moba(32, 3), Moba(32, 4, first_blocks=1), Sliding(20), Full()])
@pytest.mark.parametrize(
    "device",
    [
        "cpu",
        pytest.param(
            "cuda",
            marks=[pytest.mark.gpu, pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")],
        ),
    ],
)
def test_ways_are_each_alone(device, spec):
    """Catches a way that sees another's keys, or another sequence's, and one that is kept: each way of each sequence
    against the same tokens read by a cache of its own, and then a token of all sequences, which are of one length."""
    number, ways, size, length, dtype = 3, 4, 9, 316, torch.float64 if device == "cpu" else torch.bfloat16
    close = {"rtol": 1e-9, "atol": 1e-9} if device == "cpu" else {"rtol": 0, "atol": 2e-2}
    prompts = [[x.to(device) for x in make_qkv(length, dtype=dtype, seed=i)] for i in range(number)]
    told = [[x.to(device) for x in make_qkv(size, dtype=dtype, seed=50 + i)] for i in range(number * ways)]
    cache = KVCache(1, number)

    def attend(parts, to=cache):
        lengths = [len(part[0]) for part in parts]
        documents = Documents.from_lengths(lengths, device=device)
        return to[0].attend(*map(torch.cat, zip(*parts)), spec, documents).split(lengths)

    attend(prompts)
    with cache.in_ways(ways):
        found = attend(told)
    newest = attend([[x[:1] for x in one] for one in told[:number]])
    assert cache.lengths == [length + 1] * number
    for i, (one, got) in enumerate(zip(told, found)):
        alone = KVCache(1)
        attend([prompts[i % number]], alone)
        torch.testing.assert_close(got, attend([one], alone)[0], **close)
        if i < number:
            torch.testing.assert_close(newest[i], got[:1], **close)
    assert max((found[0] - other).abs().max() for other in found[number::number]) > 0.1


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
@pytest.mark.parametrize("decode", ["moba", "full"])
def test_cuda_reading_and_decoding(decode):
    """Catches what only a GPU shows: half-precision kernels with more keys than queries, bounds on another device."""
    q, k, v = (x.cuda() for x in make_qkv(300, 4, 2, dtype=torch.bfloat16))
    cache = KVCache(1, decode=decode, prompts=[290] if decode == "full" else None)
    spec = Moba(block_size=32, top_k=3)
    sizes = [100, 130, 60] + [1] * 10
    parts = zip(q.split(sizes), k.split(sizes), v.split(sizes), sizes)
    got = (
        torch.cat([cache[0].attend(*qkv, spec, Documents.from_lengths([n], device="cuda")) for *qkv, n in parts])
        .double()
        .cpu()
    )
    exact = [x.double().cpu() for x in (q, k, v)]
    want = reference_attention(*exact, block_size=32, top_k=3)
    if decode == "full":
        want[290:] = reference_attention(*exact, block_size=300, top_k=1)[290:]
    assert (got - want).abs().max() < 2e-2


def test_misuse_is_refused():
    """Catches silently lost gradients, a batch that does not fit the cache, and an unknown mode."""
    layer, x = make_layer(), make_tokens(4)
    with torch.enable_grad(), pytest.raises(ValueError, match=r"torch\.no_grad"):
        in_chunks(layer, x, [4], KVCache(1))
    with pytest.raises(ValueError, match="1 sequences but the cache was made for 2"):
        in_chunks(layer, x, [4], KVCache(1, num_sequences=2))
    with pytest.raises(ValueError, match="decode='sparse'"):
        KVCache(1, decode="sparse")
    for arguments in ({"decode": "full"}, {"prompts": [3]}, {"decode": "full", "prompts": [3, 4]}):
        with pytest.raises(ValueError, match="needs the tokens of each sequence's prompt"):
            KVCache(1, **arguments)


@pytest.mark.parametrize("kept", [23, 24, 25])
def test_going_back_leaves_no_trace(kept):
    """Catches means of blocks that were filled by forgotten tokens, and a place that is off by one: after other tokens
    were read and forgotten, those that follow are decoded as if nothing had been there, bit for bit."""
    layer, x = make_layer(), make_tokens(40)
    plain, back = KVCache(1), KVCache(1)
    for cache in (plain, back):
        in_chunks(layer, x[:kept], [kept], cache)
    mark = back.mark()
    in_chunks(layer, make_tokens(30, seed=9), [1] * 30, back)
    back.rewind(mark)
    assert back.lengths == [kept]
    assert torch.equal(*(in_chunks(layer, x[kept:], [1] * (40 - kept), cache) for cache in (plain, back)))
