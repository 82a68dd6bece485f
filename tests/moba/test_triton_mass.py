"""The kernel of block masses against their definition in float64, in Triton's interpreter on a CPU and on a GPU, where
it also serves the gate "oracle" and the shares of a router."""

from __future__ import annotations

import pytest
import torch
from packs import Pack, documents_of, drops_and_keeps

pytest.importorskip("triton", reason="the kernel needs triton")

from moba import gates
from moba.backends import triton_mass
from moba.backends.triton_attention import INTERPRETED
from moba.gates import block_log_mass, select
from moba.kinds import Routing
from moba.stats import block_mass

DEVICE = "cpu" if INTERPRETED else "cuda"
pytestmark = [
    pytest.mark.skipif(not INTERPRETED and not torch.cuda.is_available(), reason="needs the interpreter, or CUDA"),
    pytest.mark.filterwarnings("ignore::RuntimeWarning"),  # the interpreter computes masked lanes too
]
HALF = torch.float16 if INTERPRETED else torch.bfloat16  # whose products the interpreter cannot do

CASES = {
    "a tile of many blocks": (Pack([150, 0, 5, 70], 8, 4, (4, 2), head_dim=64), None),
    "blocks shorter than a product takes": (Pack([90, 41], 1, 5, (2, 1), head_dim=16), 0.3),
    "blocks that no tile divides": (Pack([150, 33], 24, 3, (3, 1), head_dim=24), None),
    "a block of a tile": (Pack([200, 3, 190], 32, 3, (2, 2), head_dim=128), -0.2),
    "blocks of several tiles": (Pack([270, 1, 150], 128, 2, (2, 1), head_dim=64), None),
    "longer blocks than a program's stretch": (Pack([30, 20], 150, 2, (2, 1), [470, 305], head_dim=16), None),
    "pieces of tiles": (Pack([190, 150], 45, 3, (2, 1), head_dim=16), 2.0),
    "keys before the first query": (Pack([40, 25], 16, 3, (6, 2), [30, 64], head_dim=64), None),
}


@pytest.fixture(params=[torch.float32, HALF], ids=str)
def dtype(request):
    return request.param


def case(name, dtype, monkeypatch):
    """(pack, scale, q, k, documents) on the device, where `block_log_mass` asks the kernel."""
    pack, scale = CASES[name]
    q, k, _ = (x.to(DEVICE, dtype) for x in pack.tensors())
    monkeypatch.setattr(gates, "_has_kernel", triton_mass.takes)
    monkeypatch.setattr(triton_mass, "STRETCH", 128)
    bounds = (pack.options[x] for x in ("cu_seqlens", "cu_seqlens_k"))
    return pack, scale, q, k, documents_of(q, k, *bounds)


def definition(q, k, documents, block_size, scale):
    """float64 [H, T, M] from dense products: nothing of documents' layouts is used."""
    lengths, lengths_k = documents.host_lengths()
    q, k = q.double().cpu(), k.double().cpu().repeat_interleave(q.shape[1] // k.shape[1], 1)
    products_HTS = torch.einsum("thd,shd->hts", q, k) * (q.shape[2] ** -0.5 if scale is None else scale)
    out = torch.full((q.shape[1], len(q), len(k) // block_size + len(lengths)), float("-inf"), dtype=torch.float64)
    t = s = m = 0
    for length, length_k in zip(lengths, lengths_k):
        for i in range(length):
            seen = products_HTS[:, t + i, s : s + length_k - length + i + 1].split(block_size, dim=1)
            out[:, t + i, m : m + len(seen)] = torch.stack([x.logsumexp(1) for x in seen], 1)
        t, s, m = t + length, s + length_k, m + -(-length_k // block_size)
    return out


@pytest.mark.parametrize("name", CASES)
def test_masses_are_those_of_dense_products(name, dtype, monkeypatch):
    """Catches keys of other blocks, documents, heads or the future, tails, tiles that are left out, overflow in sums of
    large exponents, rounded products; for all queries, a stretch of blocks, and single queries in any order."""
    pack, scale, q, k, documents = case(name, dtype, monkeypatch)
    layout, num_blocks = documents.layout(pack.block_size), documents.layout(pack.block_size).num_blocks
    want = definition(q, k, documents, pack.block_size, scale)
    every = slice(0, len(q)), slice(0, num_blocks)
    close = {"rtol": 1e-5, "atol": 2e-5}
    found = block_log_mass(q, k, layout, *every, scale)
    assert found.dtype == torch.float32
    torch.testing.assert_close(found.cpu().double(), want, **close)
    some, few = slice(num_blocks // 3, num_blocks - 1), torch.randperm(len(q))[:7].to(DEVICE)
    for times in (1, 32):
        found = block_log_mass(q[few] * times, k, layout, few, some, scale)
        want = definition(q * times, k, documents, pack.block_size, scale)[:, few.cpu(), some]
        torch.testing.assert_close(found.cpu().double(), want, **close)


@pytest.mark.parametrize("name", CASES)
def test_oracle_and_shares_are_those_without_the_kernel(name, dtype, monkeypatch):
    """Catches masses that reach the choice of blocks or the shares of a router in another place: against float64, where
    no kernel is."""
    pack, scale, q, k, documents = case(name, dtype, monkeypatch)
    routing = Routing(pack.block_size, pack.top_k, "oracle")
    found = select(routing, q, k, documents=documents, softmax_scale=scale).cpu()
    want = select(routing, q.double(), k.double(), documents=documents, softmax_scale=scale).cpu()
    assert (found != want).any(-1).float().mean() < 0.001, "near ties"
    assert all(drops_and_keeps(found)), "nothing was chosen"
    layout, rows = documents.layout(pack.block_size), torch.arange(0, len(q), 3, device=DEVICE)
    shares = block_mass(q, k, layout, rows, scale), block_mass(q.double(), k.double(), layout, rows, scale)
    for ours, theirs in zip(*shares):
        torch.testing.assert_close(ours.double(), theirs.double(), rtol=1e-4, atol=1e-6)


def test_a_compiled_model_chooses_the_same_blocks(monkeypatch):
    """Catches a launch that torch.compile traces into, and cannot."""
    pack, scale, q, k, documents = case("a block of a tile", torch.float32, monkeypatch)

    def chosen(q, k):
        routing = Routing(pack.block_size, pack.top_k, "oracle")
        return select(routing, q, k, documents=documents, softmax_scale=scale)

    assert torch.equal(torch.compile(chosen, backend="eager")(q, k), chosen(q, k))
