"""Times MoBA attention against dense attention on one GPU: checks first, then a table, a json file and a figure.

    python benchmarks/attention.py                      # all rows, some minutes on an H100
    python benchmarks/attention.py --rows 64K --out results
    python benchmarks/attention.py --model models/SmolLM2-135M --text held_out.parquet --out results

What is measured: `triton` and `flash` (the backends of moba), `cudnn` and `fa2` (torch's dense attention). Forward,
forward+backward, the triton backend's routing (means, gate, top-k, lists) and the peak of allocated memory, inputs
included. Batch 1, bfloat16, random normal inputs drawn afresh for every row, all in one process. Each time is the
median over repeats that are queued without waiting, so that launches overlap with the work as they do in training; the
inputs of every row exceed the L2 cache.

With --model the rows are packs of 64K tokens of that model's shape: q (after RoPE), k and v of some of its layers,
recorded with full attention on documents of --text (benchmarks/recorded.py), and random ones for comparison.

TFLOP/s count attended pairs only: 4 * pairs * H * D forward, three times that with the backward (moba.flops); routing
counts as time but not as work. Ratios are dense cuDNN's time over the row's, forward+backward, in the same run.
"""

from __future__ import annotations

import argparse
import functools
import json
import statistics
import sys
from collections.abc import Iterable, Mapping
from dataclasses import asdict, dataclass, field, replace
from datetime import UTC, datetime
from itertools import pairwise
from pathlib import Path

import torch
import torch.nn.functional as F
from torch.nn.attention import SDPBackend, sdpa_kernel

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))

from matplotlib.figure import Figure  # noqa: E402

from benchmarks.common import cell, device_name  # noqa: E402
from benchmarks.recorded import Recorded, record_layers  # noqa: E402
from conf.numbers import format_length  # noqa: E402
from evals.results import commit, write_json  # noqa: E402
from evals.style import look, save  # noqa: E402
from moba.documents import Documents  # noqa: E402
from moba.flops import attended_pairs, attention_flops  # noqa: E402
from moba.kinds import Full, Moba  # noqa: E402
from moba.reference import reference_attention  # noqa: E402

K = 1024
TIME_BUDGET_MS = 400.0
SECONDS_LONG = 2.5
MOBA = ("triton", "flash")


@dataclass(frozen=True)
class Row:
    """One line of the table."""

    name: str
    num_tokens: int
    block_size: int
    top_k: int
    heads: tuple[int, int] = (32, 8)
    head_dim: int = 128
    dense: tuple[str, ...] = ("cudnn", "fa2")
    flash: bool = True
    backward: bool = True
    skewed: bool = False
    """A few blocks attract most queries, as attention sinks do."""
    lengths: tuple[int, ...] | None = None
    """Lengths of packed documents."""
    recorded: tuple[torch.Tensor, ...] | None = field(default=None, compare=False)
    """q, k, v of a model's layer, in place of random ones."""

    @property
    def implementations(self) -> list[str]:
        """What is measured, in order."""
        return [*self.dense, *(["flash"] if self.flash else []), "triton"]


def document_lengths(total: int, shortest: int, longest: int, seed: int) -> tuple[int, ...]:
    """Random document lengths that fill a pack of `total` tokens."""
    generator, lengths = torch.Generator().manual_seed(seed), []
    while (left := total - sum(lengths)) > 0:
        lengths.append(min(left, int(torch.randint(shortest, longest + 1, (1,), generator=generator))))
    return tuple(lengths)


ROWS = [
    Row("8K 128x8", 8 * K, 128, 8),
    Row("16K 128x8", 16 * K, 128, 8),
    Row("32K 128x8", 32 * K, 128, 8),
    Row("64K 128x8", 64 * K, 128, 8),
    Row("64K 128x8 skewed", 64 * K, 128, 8, dense=("cudnn",), flash=False, skewed=True),
    Row("128K 128x8", 128 * K, 128, 8, dense=("cudnn",), flash=False),
    Row("256K 128x8", 256 * K, 128, 8, dense=("cudnn",), flash=False),
    Row("512K 128x8", 512 * K, 128, 8, dense=("cudnn",), flash=False),
    Row("64K 512x3", 64 * K, 512, 3, dense=("cudnn",)),
    Row("64K 512x3 skewed", 64 * K, 512, 3, dense=("cudnn",), flash=False, skewed=True),
    Row("64K 2048x3", 64 * K, 2048, 3, dense=("cudnn",)),
    Row("64K 2048x3 skewed", 64 * K, 2048, 3, dense=("cudnn",), flash=False, skewed=True),
    Row("32K 2048x3 14/14", 32 * K, 2048, 3, heads=(14, 14), dense=("cudnn",), flash=False),
    Row("64K 1024x4", 64 * K, 1024, 4, dense=("cudnn",), flash=False),
    Row("64K 1024x4 16/16 d64", 64 * K, 1024, 4, heads=(16, 16), head_dim=64, dense=("cudnn",), flash=False),
    Row("128K 4096x12", 128 * K, 4096, 12, dense=("cudnn",), flash=False),
    Row("64K 128x8 16/16 d64", 64 * K, 128, 8, heads=(16, 16), head_dim=64, dense=("cudnn",)),
    Row("32K pack 512x3", 32 * K, 512, 3, dense=("varlen",), lengths=document_lengths(32 * K, K, 4 * K, 0)),
    Row("64K pack 2048x3", 64 * K, 2048, 3, dense=("varlen",), lengths=document_lengths(64 * K, 6 * K, 20 * K, 1)),
    # Its ratio is to four times the dense forward at 512K.
    Row("1M 4096x12 forward", 1024 * K, 4096, 12, dense=(), flash=False, backward=False),
]
CHECKED = [
    Row("check", 1300, 128, 4, heads=(4, 2)),
    Row("check", 1300, 128, 4, heads=(4, 2), head_dim=64),
    Row("check", 1300, 256, 3, heads=(4, 2)),
]
SIZES = ((128, 8), (512, 3), (64, 16))
"""(block_size, top_k) of the rows of a model."""


def rows_of(recorded: Recorded) -> list[Row]:
    """For each of SIZES a row of random inputs, and one of each recorded layer."""
    inputs = {"random": None} | {f"layer {i}": qkv for i, qkv in recorded.qkv.items()}
    q, k, _ = next(iter(recorded.qkv.values()))
    number, length = len(q) // recorded.length, recorded.length
    pack = {"heads": (q.shape[1], k.shape[1]), "head_dim": q.shape[2], "lengths": (length,) * number}
    pack |= {"num_tokens": len(q), "dense": ("varlen",), "flash": False}
    return [
        Row(f"{number} x {format_length(length)} {b}x{k} {name}", block_size=b, top_k=k, recorded=qkv, **pack)
        for b, k in SIZES
        for name, qkv in inputs.items()
    ]


@dataclass
class Result:
    """Measurements of one implementation on one row; times in ms, None where not measured."""

    row: str
    implementation: str
    forward_ms: float | None = None
    total_ms: float | None = None
    routing_ms: float | None = None
    peak_gib: float | None = None
    tflops: float | None = None
    ratio_to_cudnn: float | None = None
    error: str | None = None
    notes: dict = field(default_factory=dict)


# -------------------- implementations


def moba(backend: str, row: Row, q, k, v):
    if backend == "triton":
        from moba.backends.triton_attention import moba_triton as function
    else:
        from moba.backends.flash import moba_flash as function
    return function(q, k, v, documents(row), block_size=row.block_size, top_k=row.top_k)[0]


def dense(backend: SDPBackend, row: Row, q, k, v):
    q, k, v = (x.transpose(0, 1)[None] for x in (q, k, v))
    with sdpa_kernel([backend]):
        return F.scaled_dot_product_attention(q, k, v, is_causal=True, enable_gqa=True)[0].transpose(0, 1)


def varlen(row: Row, q, k, v):
    from moba.backends.varlen import varlen_attention

    pack = documents(row)
    return varlen_attention(q, k, v, pack.cu_seqlens, pack.cu_seqlens, pack.longest, pack.longest)


IMPLEMENTATIONS = {
    "triton": functools.partial(moba, "triton"),
    "flash": functools.partial(moba, "flash"),
    "cudnn": functools.partial(dense, SDPBackend.CUDNN_ATTENTION),
    "fa2": functools.partial(dense, SDPBackend.FLASH_ATTENTION),
    "varlen": varlen,
}


@functools.cache
def documents(row: Row) -> Documents:
    """The pack, made once as a trainer does: all layers, and both passes, share its layout."""
    return Documents.from_lengths(row.lengths or [row.num_tokens], device="cuda")


def inputs(row: Row, seed: int) -> list[torch.Tensor]:
    """q, k, v and a cotangent of the output."""
    generator = torch.Generator(device="cuda").manual_seed(seed)
    shapes = [(row.num_tokens, h, row.head_dim) for h in (row.heads[0], row.heads[1], row.heads[1], row.heads[0])]
    q, k, v, d_out = (torch.randn(s, generator=generator, device="cuda", dtype=torch.bfloat16) for s in shapes)
    if row.skewed:
        direction = torch.randn(row.head_dim, generator=generator, device="cuda", dtype=torch.bfloat16)
        q += 0.2 * direction
        for block in (0, 7, row.num_tokens // row.block_size // 3):
            k[block * row.block_size : (block + 1) * row.block_size] += 0.3 * direction
    if row.recorded is not None:
        q, k, v = (x.detach() for x in row.recorded)
    return [q, k, v, d_out]


# -------------------- measuring


def median_ms(function) -> float:
    """Median time of a call in steady state: after one warm-up, repeats by time, queued back to back.

    A call of several seconds is its own warm-up, and is timed once.
    """
    for attempt in range(2):
        start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        start.record()
        function()
        end.record()
        torch.cuda.synchronize()
        once = start.elapsed_time(end)
        if once > SECONDS_LONG * 1e3 or (attempt == 1 and once > TIME_BUDGET_MS):
            return once
    repeats = max(3, min(50, int(TIME_BUDGET_MS / once)))
    events = [torch.cuda.Event(enable_timing=True) for _ in range(repeats + 1)]
    events[0].record()
    for event in events[1:]:
        function()
        event.record()
    torch.cuda.synchronize()
    return statistics.median(a.elapsed_time(b) for a, b in pairwise(events))


def measure(row: Row, implementation: str, seed: int) -> Result:
    """One row of one implementation. An implementation that cannot do it, or runs out of memory, is reported as
    such."""
    result = Result(row.name, implementation)
    torch.cuda.empty_cache()
    try:
        _measure_into(result, row, IMPLEMENTATIONS[implementation], seed)
    except (ValueError, RuntimeError) as error:  # an out-of-memory error is a RuntimeError
        result.error = f"{type(error).__name__}: {str(error).splitlines()[0][:120]}"
    return result


def _measure_into(result: Result, row: Row, function, seed: int) -> None:
    q, k, v, d_out = inputs(row, seed)
    if result.implementation in MOBA:
        warm_up(row, function, q, k, v, d_out)
    with torch.no_grad():
        result.forward_ms = median_ms(lambda: function(row, q, k, v))
    if result.implementation == "triton":
        result.routing_ms = median_ms(lambda: routing(row, q, k))
        result.notes = picks(row, q, k)
    for x in (q, k, v):
        x.requires_grad_(row.backward)

    def both():
        return torch.autograd.grad(function(row, q, k, v), (q, k, v), d_out)

    torch.cuda.reset_peak_memory_stats()
    if row.backward:
        result.total_ms = median_ms(both)
    else:
        function(row, q, k, v)
    result.peak_gib = torch.cuda.max_memory_allocated() / 2**30
    spec = Moba(row.block_size, row.top_k) if result.implementation in MOBA else Full()
    pairs = attended_pairs(spec, row.lengths or [row.num_tokens])
    flops = attention_flops(pairs, row.heads[0], row.head_dim, backward=row.backward)
    result.tflops = flops / (result.total_ms if row.backward else result.forward_ms) / 1e9


def warm_up(row: Row, function, q, k, v, d_out) -> None:
    """One forward and backward: compiles what this row needs, which must not count as time."""
    x = [y.detach().requires_grad_(row.backward) for y in (q, k, v)]
    out = function(row, *x)
    if row.backward:
        torch.autograd.grad(out, x, d_out)


def routing(row: Row, q, k):
    """The triton backend's way from q and k to its selection and lists."""
    from moba.backends.triton_lists import build_lists
    from moba.backends.triton_routing import select_blocks

    layout = documents(row).kernel_layout(row.block_size)
    selection = select_blocks(q, k, layout, row.block_size, row.top_k)
    return selection, build_lists(selection, layout, k.shape[1])


def picks(row: Row, q, k) -> dict[str, float]:
    """How the picks of a row lie, own blocks included: the share of a key/value head's queries that pick its most
    popular block, the largest over heads; the longest list over the mean; and of each group of query heads (those of a
    key/value head), mean over tokens, the number of picks and of distinct blocks among them."""
    selection, lists = routing(row, q, k)
    lengths = lists.list_start.diff(dim=1)[:, lists.length_M > 0]
    blocks = selection.unflatten(1, (row.heads[1], -1)).flatten(2).sort(-1).values  # [T, G, picks]
    repeated = (blocks.diff(dim=-1) == 0) & (blocks[..., 1:] >= 0)
    of_group = (blocks >= 0).sum() / blocks[..., 0].numel()
    return {
        "picks of the most popular block": lengths.max().item() / (row.num_tokens * row.heads[0] // row.heads[1]),
        "longest list over the mean": (lengths.max() / lengths.double().mean()).item(),
        "picks of a group": of_group.item(),
        "distinct blocks of a group": (of_group - repeated.sum() / blocks[..., 0].numel()).item(),
    }


def check(rows: Iterable[Row]) -> None:
    """Compares outputs and gradients of the triton backend with the float64 definition; raises if they are off."""
    for row in rows:
        block_size, top_k = row.block_size, row.top_k
        q, k, v, d_out = inputs(row, seed=block_size)
        results = []
        for function, dtype in ((functools.partial(moba, "triton", row), None), (None, torch.float64)):
            x = [y.to(dtype or y.dtype).clone().requires_grad_() for y in (q, k, v)]
            out = function(*x) if function else reference_attention(*x, block_size=block_size, top_k=top_k)
            results.append([out, *torch.autograd.grad(out, x, d_out.to(out))])
        errors = [((a.double() - b).norm() / b.norm()).item() for a, b in zip(*results)]
        print(f"check {block_size}x{top_k} d{row.head_dim}: relative errors", " ".join(f"{e:.1e}" for e in errors))
        if not max(errors) < 1e-2:
            raise SystemExit("the triton backend disagrees with the reference: not timing it")


def check_routing(num_tokens: int, keys: str, num_sampled: int = 1024) -> dict:
    """Agreement of the routing kernels with a float64 gate, for 128x8 at 32/8 heads: picks of history blocks that
    differ, over `num_sampled` random queries of every head.

    `keys`: "random" normal; "skewed" as in the skewed rows; "offset", random plus one common vector four times as
    large, so that all scores of a query are nearly the same and rounding matters most.
    """
    from moba.backends.triton_routing import select_blocks

    row = Row("check", num_tokens, 128, 8, skewed=keys == "skewed")
    q, k = inputs(row, seed=1)[:2]
    if keys == "offset":
        k += 4 * torch.randn(row.head_dim, device="cuda", dtype=torch.bfloat16)
    layout = documents(row).kernel_layout(row.block_size)
    token = torch.randperm(num_tokens, device="cuda")[:num_sampled]
    chosen = select_blocks(q, k, layout, row.block_size, row.top_k)[token, :, :-1]
    means = k.double().view(-1, row.block_size, *k.shape[1:]).mean(1).repeat_interleave(4, 1)
    different = picks = 0
    for part, part_chosen in zip(token.split(64), chosen.split(64)):
        score = torch.einsum("thd,mhd->thm", q[part].double(), means)
        is_history = torch.arange(len(means), device="cuda") < (part // row.block_size)[:, None, None]
        score = score.masked_fill(~is_history, float("-inf"))
        value, best = score.topk(row.top_k - 1)
        picked = torch.zeros(*score.shape[:2], len(means) + 1, dtype=torch.bool, device="cuda")
        picked.scatter_(2, torch.where(part_chosen < 0, len(means), part_chosen).long(), True)
        exists = value > float("-inf")
        different += (exists & ~picked.gather(2, best)).sum().item()
        picks += exists.sum().item()
    return {"tokens": num_tokens, "keys": keys, "picks": picks, "different": different}


# -------------------- reporting


def ceilings() -> dict:
    """What this card reaches: bfloat16 matrix product in TFLOP/s, device copy in GB/s (read + write)."""
    a, b = (torch.randn(8192, 8192, device="cuda", dtype=torch.bfloat16) for _ in range(2))
    source = torch.randn(1 << 29, device="cuda")
    target = torch.empty_like(source)
    return {
        "matmul_tflops": 2 * 8192**3 / median_ms(lambda: a @ b) / 1e9,
        "copy_gb_per_s": 2 * source.numel() * 4 / median_ms(lambda: target.copy_(source)) / 1e6,
    }


def add_ratios(results: list[Result]) -> None:
    """Fills ratio_to_cudnn: of a row's own dense time; for the forward at 1M of four times that at 512K."""
    total = {r.row: r.total_ms for r in results if r.implementation in ("cudnn", "varlen")}
    forward = {r.row: r.forward_ms for r in results if r.implementation == "cudnn"}
    for r in results:
        if total.get(r.row) and r.total_ms:
            r.ratio_to_cudnn = total[r.row] / r.total_ms
        elif r.row.startswith("1M") and forward.get("512K 128x8") and r.forward_ms:
            r.ratio_to_cudnn = 4 * forward["512K 128x8"] / r.forward_ms


COLUMNS = {"forward_ms": 2, "total_ms": 2, "routing_ms": 2, "peak_gib": 1, "tflops": 0, "ratio_to_cudnn": 2}


def format_line(r: Result) -> str:
    cells = "".join(f"{cell(getattr(r, key), f'{{:.{digits}f}}'):>15}" for key, digits in COLUMNS.items())
    return f"{r.row:22s} {r.implementation:8s}{cells}  {r.error or ''}"


HEADER = f"{'row':22s} {'':8s}" + "".join(f"{key:>15}" for key in COLUMNS)
NAMES = {
    "triton": "MoBA, Triton kernels",
    "flash": "MoBA, two varlen flash calls",
    "cudnn": "dense, cuDNN",
    "fa2": "dense, FlashAttention 2",
}


def draw(record: Mapping, path: Path) -> None:
    """Forward + backward time over length, for the 128x8 rows of an attention.json."""
    lengths = {row.name: row.num_tokens for row in ROWS if row.name.endswith("K 128x8")}
    figure = Figure(figsize=(7, 4.5), layout="constrained")
    axes = figure.add_subplot()
    for i, (implementation, label) in enumerate(NAMES.items()):
        own = [r for r in record["results"] if r["implementation"] == implementation and r["row"] in lengths]
        points = sorted((lengths[r["row"]], r["total_ms"]) for r in own if r["total_ms"])
        if points:
            axes.loglog(*zip(*points), label=label, **(look(i) | {"markersize": 5}))
    title = "Forward and backward of one layer, blocks of 128, top 8, 32/8 heads of 128, bf16"
    axes.set(xlabel="tokens of the document", ylabel="milliseconds")
    axes.set_title(f"{title}\n{record['device']}, commit {(record['commit'] or 'unknown')[:7]}", fontsize="medium")
    ticks = sorted(set(lengths.values()))
    axes.set_xticks(ticks, [f"{n // K}K" for n in ticks])
    axes.minorticks_off()
    axes.grid(alpha=0.3)
    axes.legend()
    save(figure, path)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--rows", default="", help="only rows whose name contains one of these, by commas")
    parser.add_argument("--out", type=Path, default=ROOT / "benchmarks" / "results", help="folder for json and figure")
    parser.add_argument("--commit", default=commit(), help="recorded in the json; default: git's HEAD")
    parser.add_argument("--model", help="rows of this model instead: a Hugging Face directory, a run or a checkpoint")
    parser.add_argument("--text", help="its documents: file, glob or directory (parquet, jsonl, txt)")
    parser.add_argument("--length", help="tokens of each document (default: what the model was trained for)")
    parser.add_argument("--layers", help="layers recorded, by commas, from 0 (default: first, middle, last)")
    arguments = parser.parse_args()
    model = [arguments.model, arguments.text, arguments.length, arguments.layers]
    if None in model[:2] and any(model):
        parser.error("--model and --text go together; --length and --layers are for them")
    if not torch.cuda.is_available():
        raise SystemExit("benchmarks/attention.py needs a CUDA device")
    import triton

    recorded = record_layers(*model) if arguments.model else None
    rows = rows_of(recorded) if recorded else ROWS
    rows = [row for row in rows if any(name in row.name for name in arguments.rows.split(","))]
    short = {row.block_size: replace(row, num_tokens=2300, lengths=None, recorded=None) for row in rows}
    check(short.values() if recorded else CHECKED)
    environment = {
        "device": device_name(),
        "torch": torch.__version__,
        "triton": triton.__version__,
        "commit": arguments.commit,
        "command": " ".join(["python", *sys.argv]),
        "date": datetime.now(UTC).isoformat(timespec="seconds"),
        "convention": __doc__.split("\n\n", 2)[2],
        "ceilings": ceilings(),
    }
    if recorded:
        environment["model"], environment["documents"] = recorded.model, recorded.ids
    else:
        environment["routing_against_float64"] = [
            check_routing(n, keys) for n in (64 * K, 512 * K) for keys in ("random", "skewed", "offset")
        ]
    print(json.dumps({k: v for k, v in environment.items() if k != "convention"}))
    print(HEADER)
    results: list[Result] = []
    record = environment
    for i, row in enumerate(rows):
        for implementation in row.implementations:
            results.append(measure(row, implementation, seed=i))
            add_ratios(results)
            print(format_line(results[-1]), flush=True)
            record = {**environment, "results": [asdict(r) for r in results]}
            write_json(arguments.out / "attention.json", record)
    if not recorded:
        draw(record, arguments.out / "attention.png")


if __name__ == "__main__":
    main()
