"""Times one decoding step of attention on one GPU, MoBA against dense attention over the same keys and values.

    python benchmarks/decode.py                       # a few minutes on an H100
    python benchmarks/decode.py --contexts 128K --batches 1

A step is one new token per sequence, its key and value already in the cache; all sequences are as long as the context.
bfloat16, random normal inputs, 32 query heads, 8 key/value heads of size 128. Implementations:
- `flash`, `cudnn`: torch's scaled_dot_product_attention with that kernel. `flash grouped` has the 4 query heads of a
  group as 4 queries of one head, so that keys and values are read once. `varlen`: torch's varlen flash kernel.
- `moba triton`: moba/backends/triton_decode.py, means of the complete blocks at hand as in the cache (their update,
  once in block_size steps, is not in the time). `moba triton shared`: the heads of a group have one query, so that they
  pick the same blocks: real models lie between. `moba torch`: the same step in torch (batch 1).

Time is the median over repeats of a CUDA graph of several steps over different caches, together larger than the L2
cache, divided by their number; `eager ms` is the same without a graph, launches queued as the host makes them. GB/s
counts what has to be read: of dense attention all keys and values, of MoBA all means, and the keys and values that each
head selects (heads that pick the same block count it each). Ratio: the fastest dense implementation's time over the
row's, in the same run.
"""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Callable
from datetime import UTC, datetime
from pathlib import Path

import torch
import torch.nn.functional as F
from torch.nn.attention import SDPBackend, sdpa_kernel

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))

from benchmarks.attention import median_ms  # noqa: E402
from benchmarks.common import cell  # noqa: E402
from evals.results import commit, write_json  # noqa: E402
from moba.backends.triton_decode import moba_decode  # noqa: E402
from moba.kv_cache import SequenceCache, decode_moba  # noqa: E402
from moba.reference import reference_attention, reference_selection  # noqa: E402
from moba.routing import block_means  # noqa: E402

K = 1024
HEADS, KV_HEADS, HEAD_DIM = 32, 8, 128
BLOCK_SIZE, TOP_K = 512, 8
CACHE_BYTES = 256 << 20
"""Of the caches that a repeat works through, at least: five times the L2 of an H100."""
DENSE = ("flash", "flash grouped", "cudnn", "varlen")
MOBA = ("moba torch", "moba triton", "moba triton shared")


class Caches:
    """Keys and values [B, S, G, D] of several caches of a size, and a query for each."""

    def __init__(self, batch: int, context: int):
        self.batch, self.context = batch, context
        bytes_each = 2 * batch * context * KV_HEADS * HEAD_DIM * 2
        self.number = max(1, min(16, -(-CACHE_BYTES // bytes_each)))
        shape = (batch, context, KV_HEADS, HEAD_DIM)
        self.k, self.v = ([self._random(*shape) for _ in range(self.number)] for _ in range(2))
        self.q = [self._random(batch, HEADS, HEAD_DIM) for _ in range(self.number)]
        self.means = [
            torch.cat([block_means(one, BLOCK_SIZE)[: context // BLOCK_SIZE] for one in keys]) for keys in self.k
        ]

    def _random(self, *shape: int) -> torch.Tensor:
        return torch.randn(shape, device="cuda", dtype=torch.bfloat16)


def step_of(name: str, caches: Caches) -> Callable[[int], torch.Tensor]:
    """step(i): the attention of cache i's new tokens, [B, H, D] up to its shape."""
    batch, context = caches.batch, caches.context
    if name in ("flash", "cudnn", "flash grouped"):
        backend = SDPBackend.CUDNN_ATTENTION if name == "cudnn" else SDPBackend.FLASH_ATTENTION
        heads = KV_HEADS if name == "flash grouped" else HEADS

        def step(i: int) -> torch.Tensor:
            q = caches.q[i].view(batch, heads, HEADS // heads, HEAD_DIM)
            k, v = caches.k[i].transpose(1, 2), caches.v[i].transpose(1, 2)
            with sdpa_kernel(backend):
                return F.scaled_dot_product_attention(q, k, v, enable_gqa=heads != KV_HEADS)
    elif name == "varlen":
        bounds, bounds_k = (
            torch.arange(batch + 1, device="cuda", dtype=torch.int32) * length for length in (1, context)
        )

        def step(i: int) -> torch.Tensor:
            k, v = caches.k[i].flatten(0, 1), caches.v[i].flatten(0, 1)
            sizes = (bounds, bounds_k, 1, context, 0.0, False, False)
            return torch.ops.aten._flash_attention_forward(caches.q[i], k, v, *sizes)[0]
    elif name == "moba torch":
        sequences = [SequenceCache() for _ in range(caches.number)]
        for sequence, k, v in zip(sequences, caches.k, caches.v):
            sequence.append(k[0], v[0])
            sequence.block_means(BLOCK_SIZE)

        def step(i: int) -> torch.Tensor:
            return decode_moba(caches.q[i], [sequences[i]], sequences[i].documents(1), BLOCK_SIZE, TOP_K)
    else:
        row = torch.arange(batch, device="cuda")
        length, means = torch.full((batch,), context, device="cuda"), context // BLOCK_SIZE
        queries = caches.q
        if name.endswith("shared"):
            queries = [q[:, :: HEADS // KV_HEADS].repeat_interleave(HEADS // KV_HEADS, 1) for q in caches.q]

        def step(i: int) -> torch.Tensor:
            k, v = caches.k[i].flatten(0, 1), caches.v[i].flatten(0, 1)
            places = (row * context, length, row * means)
            sizes = {"block_size": BLOCK_SIZE, "top_k": TOP_K}
            return moba_decode(queries[i], k, v, caches.means[i], *places, **sizes)[0]

    return step


def measure(name: str, caches: Caches) -> dict:
    """The row of one implementation."""
    step = step_of(name, caches)

    def steps() -> None:
        for i in range(caches.number):
            step(i)

    row = {"implementation": name, "context": caches.context, "batch": caches.batch, "caches": caches.number}
    try:
        for _ in range(3):
            steps()
        row["eager_ms"] = median_ms(steps) / caches.number
    except RuntimeError as error:
        return row | {"error": str(error).splitlines()[0][:120]}
    try:
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            steps()
        row["ms"] = median_ms(graph.replay) / caches.number
    except RuntimeError as error:  # what waits for the device cannot be captured
        torch.cuda.synchronize()
        row |= {"ms": row["eager_ms"], "note": f"no graph: {str(error).splitlines()[0][:80]}"}
    row["gb_per_s"] = bytes_read(name, caches) / row["ms"] / 1e6
    return row


def bytes_read(name: str, caches: Caches) -> int:
    if name in DENSE:
        return caches.batch * caches.context * KV_HEADS * HEAD_DIM * 2 * 2
    means = caches.batch * (caches.context // BLOCK_SIZE) * KV_HEADS * HEAD_DIM * 4
    return means + caches.batch * HEADS * min(TOP_K * BLOCK_SIZE, caches.context) * HEAD_DIM * 2 * 2


def check() -> dict:
    """The kernels against the definition in float64: AssertionError where they differ."""
    torch.manual_seed(0)
    lengths = [9000, 512, 513, 1, 4095]
    q = torch.randn(len(lengths), HEADS, HEAD_DIM, device="cuda", dtype=torch.bfloat16)
    shapes = [(n, KV_HEADS, HEAD_DIM) for n in lengths]
    k, v = ([torch.randn(s, device="cuda", dtype=torch.bfloat16) for s in shapes] for _ in range(2))
    means = [block_means(one, BLOCK_SIZE) for one in k]
    starts, mean_starts = (torch.tensor([0, *map(len, x)], device="cuda").cumsum(0)[:-1] for x in (k, means))
    places = (starts, torch.tensor(lengths, device="cuda"), mean_starts)
    sizes = {"block_size": BLOCK_SIZE, "top_k": TOP_K}
    out, _, selection = moba_decode(q, torch.cat(k), torch.cat(v), torch.cat(means), *places, **sizes)
    worst, turned = 0.0, 0
    for n, length in enumerate(lengths):
        bounds = {f"cu_seqlens{of}": torch.tensor([0, m], dtype=torch.int32) for of, m in (("", 1), ("_k", length))}
        exact = [x.double().cpu() for x in (q[n][None], k[n], v[n])]
        picked = reference_selection(*exact[:2], **bounds, **sizes)[:, 0]
        same = (picked == selection[:, n].cpu()).all(-1)
        turned += int((~same).sum())
        difference = out[n].double().cpu() - reference_attention(*exact, **bounds, **sizes)[0]
        worst = max(worst, difference[same].abs().max().item())
    assert worst < 2e-2, worst
    assert turned <= 2, turned  # near-ties of means in float32 and float64
    return {"largest error": worst, "selections that differ from float64": turned, "rows": len(lengths) * HEADS}


COLUMNS = {"ms": "{:.4f}", "eager_ms": "{:.4f}", "gb_per_s": "{:.0f}", "ratio": "{:.2f}"}


def line(row: dict) -> str:
    """A row on the screen."""
    cells = "".join(f"{cell(row.get(key), form):>10s}" for key, form in COLUMNS.items())
    note = row.get("error", row.get("note", ""))
    return f"{row['context'] // K:>4d}K x {row['batch']:<4d}{row['implementation']:20s}{cells}  {note}"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--contexts", default="8K,32K,64K,128K", help="tokens in the cache")
    parser.add_argument("--batches", default="1,16", help="sequences")
    parser.add_argument("--out", type=Path, default=ROOT / "benchmarks" / "results" / "decode.json")
    parser.add_argument("--commit", default=commit(), help="recorded in the json; default: git's HEAD")
    arguments = parser.parse_args()
    if not torch.cuda.is_available():
        raise SystemExit("benchmarks/decode.py needs a CUDA device")
    import triton

    environment = {
        "device": torch.cuda.get_device_name(),
        "torch": torch.__version__,
        "triton": triton.__version__,
        "commit": arguments.commit,
        "command": " ".join(["python", *sys.argv]),
        "date": datetime.now(UTC).isoformat(timespec="seconds"),
        "block_size": BLOCK_SIZE,
        "top_k": TOP_K,
        "heads": [HEADS, KV_HEADS],
        "head_dim": HEAD_DIM,
        "check": check(),
        "convention": __doc__.split("\n\n", 2)[2],
    }
    print(json.dumps(environment), f"columns: {', '.join(COLUMNS)}", sep="\n")
    rows: list[dict] = []
    for context in (int(one.removesuffix("K")) * K for one in arguments.contexts.split(",")):
        for batch in map(int, arguments.batches.split(",")):
            caches = Caches(batch, context)
            here = [measure(name, caches) for name in (*DENSE, *MOBA) if batch == 1 or name != "moba torch"]
            dense = [row["ms"] for row in here if row["implementation"] in DENSE and "ms" in row]
            for row in here:
                row["ratio"] = min(dense) / row["ms"] if dense and "ms" in row else None
                print(line(row), flush=True)
            rows += here
            del caches
            torch.cuda.empty_cache()
            write_json(arguments.out, {**environment, "results": rows})


if __name__ == "__main__":
    main()
