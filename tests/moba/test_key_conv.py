"""Key convolution against a plain loop over tokens, and in the attention module: order, documents, cache."""

import pytest
import torch
import torch.nn.functional as F

from moba.documents import Documents
from moba.key_conv import KeyConvolution
from moba.kinds import Full, Moba, Sliding
from moba.layer import KVCache, MoBAAttention, apply_rope
from moba.reference import reference_attention

HIDDEN, HEADS, KV_HEADS, HEAD_DIM = 32, 4, 2, 8
LENGTHS = [1, 0, 37, 2, 24]


def bounds(lengths):
    return torch.tensor([0, *lengths]).cumsum(0).to(torch.int32)


def random(*shape, seed=0):
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def plain_loop(k_TC, weight_WC, cu_seqlens):
    """k' as the paper writes it: k_t + SiLU(sum over l of W_l * k_(t-l)), l reaching no further than the document."""
    rows = []
    for start, stop in zip(cu_seqlens.tolist(), cu_seqlens.tolist()[1:]):
        for t in range(start, stop):
            mixed = sum(w_C * k_TC[t - lag] for lag, w_C in enumerate(weight_WC) if t - lag >= start)
            rows.append(k_TC[t] + mixed / (1 + torch.exp(-mixed)))
    return torch.stack(rows)


def make_layer(width=3, **options):
    torch.manual_seed(0)
    layer = MoBAAttention(HIDDEN, HEADS, KV_HEADS, HEAD_DIM, key_conv=width, **options).double()
    with torch.no_grad():
        layer.k_conv.weight.copy_(random(width, KV_HEADS * HEAD_DIM, seed=3))
    return layer


def angles_at(positions):
    angles = positions[:, None] * 10000.0 ** (-torch.arange(0, HEAD_DIM, 2, dtype=torch.float64) / HEAD_DIM)
    angles = torch.cat([angles, angles], dim=-1)
    return angles.cos(), angles.sin()


@pytest.mark.parametrize("width", [3, 5])
@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16])
def test_equals_a_plain_loop_with_gradients(width, dtype):
    """Catches taps in the wrong order, SiLU outside or around the residual, keys of the document before, wrong
    gradients (documents shorter than the width included), and half precision that sums in half precision."""
    convolution = KeyConvolution(6, width).to(dtype)
    k = random(sum(LENGTHS), 6).to(dtype).requires_grad_()
    with torch.no_grad():
        convolution.weight.copy_(random(width, 6, seed=1))
    exact = [x.detach().double().requires_grad_() for x in (k, convolution.weight)]
    cu_seqlens = bounds(LENGTHS)
    got, want = convolution(k, Documents.from_lengths(LENGTHS).offsets()), plain_loop(*exact, cu_seqlens)
    upstream = random(*k.shape, seed=2)
    results = [got, *torch.autograd.grad(got, (k, convolution.weight), upstream.to(dtype))]
    expected = [want, *torch.autograd.grad(want, exact, upstream.to(dtype).double())]
    rounding = {"rtol": 1e-10, "atol": 1e-10} if dtype == torch.float64 else {"rtol": 2**-8, "atol": 2**-12}
    for a, b in zip(results, expected):
        assert a.dtype == dtype
        torch.testing.assert_close(a.double(), b, **rounding)
    one_document = plain_loop(*exact, bounds([len(k)]))
    assert not torch.allclose(one_document, want)
    torch.testing.assert_close(convolution(k).double(), one_document, **rounding)


def test_starts_as_nothing_and_still_learns():
    """Catches weights that change a model at once, or that sit where no gradient moves them."""
    convolution, k = KeyConvolution(6, 3), random(20, 6).float()
    out = convolution(k)
    assert torch.equal(out, k)
    out.square().sum().backward()
    assert (convolution.weight.grad != 0).all()


def test_layer_convolves_before_norm_rope_and_routing():
    """Catches block means of the keys as they were, a convolution of rotated or normed keys, and one that reaches over
    a document's start."""
    lengths, spec = [50, 3, 27], Moba(block_size=8, top_k=2)
    layer, x = make_layer(qk_norm=True, spec=spec), random(80, HIDDEN, seed=4)
    cu_seqlens, documents = bounds(lengths), Documents.from_lengths(lengths)
    cos, sin = angles_at(torch.cat([torch.arange(n) for n in lengths]))
    k = plain_loop(layer.k_proj(x), layer.k_conv.weight, cu_seqlens).view(80, KV_HEADS, HEAD_DIM)
    q, v = (projection(x).view(80, -1, HEAD_DIM) for projection in (layer.q_proj, layer.v_proj))
    q, k = apply_rope(layer.q_norm(q), cos, sin), apply_rope(layer.k_norm(k), cos, sin)
    want = reference_attention(q, k, v, block_size=8, top_k=2, cu_seqlens=cu_seqlens)
    torch.testing.assert_close(layer(x, cos, sin, documents), layer.o_proj(want.flatten(1)), rtol=1e-8, atol=1e-8)


def test_layers_without_rope_know_no_positions():
    """Catches RoPE applied to q or k of a NoPE layer, or left out of another."""
    x, angles = random(40, HIDDEN, seed=4), (angles_at(torch.arange(40)), angles_at(torch.arange(40) * 3.0))
    for rope in (False, True):
        layer = make_layer(rope=rope)
        near, far = (layer(x, *cos_sin, Documents.from_lengths([40])) for cos_sin in angles)
        assert torch.equal(near, far) != rope


@pytest.mark.parametrize(
    "spec",
    [Full(), Moba(block_size=8, top_k=2), Sliding(window=11)],
    ids=str,
)
@pytest.mark.parametrize("rope", [False, True])
@torch.no_grad()
def test_cached_sequences_equal_one_pass(spec, rope):
    """Catches a convolution that starts anew with each chunk or token, tails of another sequence, and a window counted
    from a chunk's start: two sequences in chunks and token by token, one of them pausing."""
    layer, cache = make_layer(width=5, spec=spec, rope=rope), KVCache(1, num_sequences=2)
    texts = [random(45, HIDDEN, seed=5), random(31, HIDDEN, seed=6)]
    steps = [[1, 20], [1, 0], [30, 1], [2, 1], *[[1, 1]] * 9, [2, 0]]
    done, outs = [0, 0], [[], []]
    for step in steps:
        chunks = [text[start : start + n] for text, start, n in zip(texts, done, step)]
        positions = torch.cat([torch.arange(start, start + n) for start, n in zip(done, step)])
        parts = layer(torch.cat(chunks), *angles_at(positions), Documents.from_lengths(step), cache[0]).split(step)
        outs = [[*out, part] for out, part in zip(outs, parts)]
        done = [a + b for a, b in zip(done, step)]
    assert done == [45, 31] == cache.lengths
    for text, out in zip(texts, outs):
        want = layer(text, *angles_at(torch.arange(len(text))), Documents.from_lengths([len(text)]))
        torch.testing.assert_close(torch.cat(out), want, rtol=1e-9, atol=1e-9)
    # Or nothing was tested: the kind of attention and the convolution matter here.
    layer.spec, angles = Full(), angles_at(torch.arange(45))
    dense = layer(texts[0], *angles, Documents.from_lengths([45]))
    assert torch.allclose(dense, torch.cat(outs[0])) == (spec == Full())
    layer.k_conv.weight.zero_()
    assert not torch.allclose(layer(texts[0], *angles, Documents.from_lengths([45])), dense)


@torch.no_grad()
def test_sequences_of_a_cache_are_convolved_together():
    """Catches a convolution for each sequence, whose launches are the time of a step on a GPU, and a past that keeps
    the chunk it came from in memory."""
    layer, cache, calls = make_layer(width=3), KVCache(1, num_sequences=3), []
    layer.k_conv.register_forward_hook(lambda *_: calls.append(1))
    for step in ([500, 0, 2], [1, 1, 1], [0, 5, 0]):
        positions = torch.cat([torch.arange(start, start + n) for start, n in zip(cache.lengths, step)])
        layer(random(sum(step), HIDDEN), *angles_at(positions), Documents.from_lengths(step), cache[0])
        tails = [sequence.key_tail for sequence in cache[0].sequences]
        assert [len(tail) for tail in tails] == [min(length, 2) for length in cache.lengths]
        assert max(tail.untyped_storage().nbytes() for tail in tails) <= 6 * KV_HEADS * HEAD_DIM * 8
    assert len(calls) == 3


@torch.no_grad()
def test_windows_stay_when_decoding_is_dense():
    """Catches decode="full", which is meant for MoBA layers, opening the window of a sliding one, and a window's end
    off by one where a single token is decoded."""
    layer, x = make_layer(spec=Sliding(window=4)), random(30, HIDDEN, seed=7)
    cache, outs = KVCache(1, decode="full", prompts=[1]), []
    for i, token in enumerate(x.split(1)):
        outs.append(layer(token, *angles_at(torch.tensor([i])), Documents.from_lengths([1]), cache[0]))
    want = layer(x, *angles_at(torch.arange(30)), Documents.from_lengths([30]))
    torch.testing.assert_close(torch.cat(outs), want, rtol=1e-9, atol=1e-9)
    # By hand: the last token over the last four keys.
    q, k, v = layer.project(x, *angles_at(torch.arange(30)))
    scores = torch.einsum("hd,shd->hs", q[-1], k[-4:].repeat_interleave(2, 1)) * HEAD_DIM**-0.5
    last = torch.einsum("hs,shd->hd", F.softmax(scores, -1), v[-4:].repeat_interleave(2, 1))
    torch.testing.assert_close(layer.o_proj(last.flatten()), want[-1])


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
@pytest.mark.parametrize("spec", [Full(), Sliding(window=11)], ids=str)
def test_cuda_layer_equals_the_cpu(spec):
    """Catches bounds of documents on another device, and half precision summed in half precision, with gradients."""
    lengths, results = [50, 3, 0, 127], []
    cos, sin = angles_at(torch.cat([torch.arange(n) for n in lengths]))
    exact = make_layer(width=5, spec=spec)
    half = make_layer(width=5, spec=spec).bfloat16().cuda()
    exact.load_state_dict({name: value.double() for name, value in half.state_dict().items()})
    x = random(sum(lengths), HIDDEN, seed=4).bfloat16()
    for layer in (half, exact):
        parameter = layer.k_conv.weight
        angles = (angle.to(parameter.device, torch.float32 if layer is half else torch.float64) for angle in (cos, sin))
        out = layer(x.to(parameter), *angles, Documents.from_lengths(lengths, device=parameter.device))
        (gradient,) = torch.autograd.grad(out.square().sum(), parameter)
        results.append([y.detach().double().cpu() for y in (out, gradient)])
    for got, want in zip(*results):
        assert (got - want).norm() < 3e-2 * want.norm()
