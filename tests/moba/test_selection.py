"""Selections that are recorded by `moba.route` and replayed by `moba_attention(selection=...)`."""

from __future__ import annotations

import importlib.util

import pytest
import torch

from moba import moba_attention, route
from moba.reference import reference_attention

TRITON = importlib.util.find_spec("triton") is not None
DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
IS_HALF = DEVICE == "cuda"
DTYPE = torch.bfloat16 if IS_HALF else torch.float32
BACKENDS = ["torch", *(["triton"] if TRITON else [])]
SIZES = {"block_size": 8, "top_k": 3}
LENGTHS = [38, 3, 21]
pytestmark = pytest.mark.filterwarnings("ignore::RuntimeWarning")  # the interpreter computes masked lanes too


def tensors(seed=0):
    """q, k, v of a pack, and its bounds."""
    generator = torch.Generator().manual_seed(seed)
    q, k, v = (torch.randn(sum(LENGTHS), heads, 16, generator=generator).to(DEVICE, DTYPE) for heads in (4, 2, 2))
    return q, k, v, torch.tensor([0, *LENGTHS], dtype=torch.int32).cumsum(0, dtype=torch.int32)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("first_blocks", [0, 1])
def test_a_replayed_selection_is_what_is_attended(backend, first_blocks):
    """Catches a selection that is ignored, or counted from another start: that of other queries gives what the
    definition gives over their blocks, gradients too."""
    q, k, v, bounds = tensors()
    other = tensors(seed=1)[0]
    selection = route(other, k, **SIZES, first_blocks=first_blocks, cu_seqlens=bounds, backend=backend)
    given = [x.clone().requires_grad_() for x in (q, k, v)]
    out = moba_attention(*given, **SIZES, cu_seqlens=bounds, backend=backend, selection=selection)
    d_out = torch.randn(out.shape, generator=torch.Generator().manual_seed(2)).to(out)
    found = [out, *torch.autograd.grad(out, given, d_out)]

    exact = [x.detach().double().cpu().requires_grad_() for x in given]
    want = over_blocks(*exact, selection.cpu(), bounds)
    close = {"rtol": 2e-2, "atol": 2e-2} if IS_HALF else {"rtol": 1e-4, "atol": 1e-4}
    for one, expected in zip(found, [want, *torch.autograd.grad(want, exact, d_out.double().cpu())]):
        torch.testing.assert_close(one.double().cpu(), expected, **close)
    routed = reference_attention(*(x.detach() for x in exact), **SIZES, cu_seqlens=bounds)
    assert (routed - want).abs().max() > 0.1  # the selection is not the queries' own


def over_blocks(q, k, v, selection_HTK, bounds):
    """Dense attention [T, H, D] of each query over the keys up to it in the blocks of a selection."""
    outs = []
    for start, stop in zip(bounds.tolist(), bounds.tolist()[1:]):
        block_S = torch.arange(stop - start) // SIZES["block_size"]
        seen_HTS = (selection_HTK[:, start:stop, :, None] == block_S).any(2).tril()
        k_HSD, v_HSD = (x[start:stop].repeat_interleave(q.shape[1] // k.shape[1], 1).transpose(0, 1) for x in (k, v))
        scores = q[start:stop].transpose(0, 1) @ k_HSD.mT * q.shape[2] ** -0.5
        outs.append((scores.masked_fill(~seen_HTS, float("-inf")).softmax(-1) @ v_HSD).transpose(0, 1))
    return torch.cat(outs)


@pytest.mark.parametrize("backend", BACKENDS)
def test_recording_and_replaying_changes_nothing(backend):
    """Catches a record that is not of what the backend attends to."""
    q, k, v, bounds = tensors()
    recorded = route(q, k, **SIZES, first_blocks=1, cu_seqlens=bounds, backend=backend)
    plain = moba_attention(q, k, v, **SIZES, first_blocks=1, cu_seqlens=bounds, backend=backend)
    replayed = moba_attention(q, k, v, **SIZES, cu_seqlens=bounds, backend=backend, selection=recorded)
    close = {"rtol": 1e-2, "atol": 1e-2} if IS_HALF else {"rtol": 1e-5, "atol": 1e-6}
    torch.testing.assert_close(replayed, plain, **close)


@pytest.mark.parametrize("backend", BACKENDS)
def test_a_document_selects_the_same_alone_and_in_a_pack(backend):
    """Catches a selection that depends on the batch it is made in; bit for bit, in the form of the definition."""
    q, k, _, bounds = tensors()
    packed = route(q, k, **SIZES, cu_seqlens=bounds, backend=backend)
    assert packed.dtype == torch.int32 and (packed[:, :38, 0] >= 0).any()  # three blocks, of up to five
    for start, stop in zip(bounds.tolist(), bounds.tolist()[1:]):
        alone = route(q[start:stop], k[start:stop], **SIZES, backend=backend)
        assert torch.equal(alone, packed[:, start:stop])
    again = route(torch.cat([q[38:], q[:38]]), torch.cat([k[38:], k[:38]]), **SIZES, backend=backend,
                  cu_seqlens=torch.tensor([0, 3, 24, 62], dtype=torch.int32))  # fmt: skip
    assert torch.equal(again, torch.cat([packed[:, 38:], packed[:, :38]], dim=1))
    if not IS_HALF:
        assert torch.equal(packed, route(q, k, **SIZES, cu_seqlens=bounds))


@pytest.mark.parametrize("backend", BACKENDS)
def test_heads_can_be_replayed_in_parts(backend):
    """Catches a selection that depends on which heads are there: how processes that share a sequence hold them."""
    q, k, v, bounds = tensors()
    options = {**SIZES, "cu_seqlens": bounds, "backend": backend}
    selection = route(q, k, **options)
    whole = moba_attention(q, k, v, **options, selection=selection)
    for kv_head in range(2):
        heads = slice(2 * kv_head, 2 * kv_head + 2)
        part = (q[:, heads], k[:, kv_head : kv_head + 1], v[:, kv_head : kv_head + 1])
        assert torch.equal(route(*part[:2], **options), selection[heads])
        out = moba_attention(*part, **options, selection=selection[heads])
        torch.testing.assert_close(out, whole[:, heads], rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("backend", BACKENDS)
def test_decoding_replays_too(backend):
    """Catches a selection that is dropped where keys outnumber queries."""
    q, k, v, bounds = tensors()
    last = (bounds[1:] - 1).tolist()
    rows = torch.arange(4, dtype=torch.int32)
    options = {**SIZES, "cu_seqlens": rows, "cu_seqlens_k": bounds}
    selection = route(tensors(seed=1)[0], k, **SIZES, cu_seqlens=bounds)
    whole = moba_attention(q, k, v, **SIZES, cu_seqlens=bounds, backend="torch", selection=selection)
    found = moba_attention(q[last], k, v, **options, backend=backend, selection=selection[:, last])
    close = {"rtol": 1e-2, "atol": 1e-2} if IS_HALF else {"rtol": 1e-4, "atol": 1e-5}
    torch.testing.assert_close(found, whole[last], **close)


@pytest.mark.skipif(DEVICE == "cuda", reason="values are checked on the CPU alone")
@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda s: s.long(), "selection is torch.int64"),
        (lambda s: s[:, :, 1:], r"needs torch.int32 \[4, 62, 3\]"),
        (lambda s: s.flip(-1), "blocks that a query cannot have"),
        (lambda s: torch.where(s >= 0, s + 1, s), "blocks that a query cannot have"),
        (lambda s: s[:, :, [1, 1, 2]], "blocks that a query cannot have"),
    ],
)
def test_wrong_selections_are_refused(change, message):
    """Catches blocks of the future, or of another document, that would be attended to."""
    q, k, v, bounds = tensors()
    selection = route(q, k, **SIZES, cu_seqlens=bounds)
    with pytest.raises(ValueError, match=message):
        moba_attention(q, k, v, **SIZES, cu_seqlens=bounds, selection=change(selection))
    with pytest.raises(ValueError, match="for MoBA on auto, triton, flash or torch"):
        moba_attention(q, k, v, **SIZES, cu_seqlens=bounds, selection=selection, backend="reference")
