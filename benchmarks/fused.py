"""What fusing the elementwise work of a training step gains, piece by piece, beside what its bytes take at least.

    python benchmarks/fused.py to=results/fused                     # one GPU, some three minutes
    python benchmarks/fused.py to=runs/fused_cpu device=cpu models=tiny tokens=256 repeats=1

For each model the pieces of a layer around its matrix products, forward + backward on bf16 inputs: eager, compiled by
torch, and the floor, the bytes that must be moved over the bandwidth of a large device copy in the same run. `a step`
is what is between compiled and floor, for all layers and the tokens of a step: no kernel of our own can gain more. Then
the loss: the definition (train/model/loss.py's torch operators) and the fused one, whole and the kernel alone, checked
against each other first, for several shapes of the kernel and sizes of a tile.
"""

from __future__ import annotations

import statistics
import sys
import time
from collections.abc import Callable, Sequence
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))

import torch  # noqa: E402
import torch.nn.functional as F  # noqa: E402
from torch import Tensor  # noqa: E402

from benchmarks.study import origin  # noqa: E402
from conf.numbers import parse_length  # noqa: E402
from conf.schema import ModelConfig  # noqa: E402
from evals.results import write_json  # noqa: E402
from launch.cli import UsageError, exits_on, key_values  # noqa: E402
from launch.config import load  # noqa: E402
from moba.layer import RMSNorm, apply_rope  # noqa: E402
from train.model import fused_loss, loss  # noqa: E402
from train.model.sizes import head_dim, num_kv_heads  # noqa: E402

KEYS = {
    "to": "folder of the results",
    "models": "files of conf/model (default paper_545m,paper_1_5b,125m)",
    "tokens": "tokens of a micro-batch (default 32K)",
    "step_tokens": "tokens of a step, for the last column (default 64K)",
    "vocab": "rows of the vocabulary (default 32K)",
    "repeats": "timed calls (default 20)",
    "device": "cuda (default) or cpu",
    "commit": "commit of the code, where this is no git checkout",
}
SHAPES = ((32768, 32), (32768, 16), (8192, 8), (8192, 16), (4096, 4), (4096, 8))
TILES = (2048, 4096, 8192)


@exits_on()
def main() -> None:
    """The command; see the module's text."""
    values = key_values(sys.argv[1:], KEYS, about=__doc__, required=["to"])
    device = torch.device(values.get("device", "cuda"))
    if device.type == "cuda" and not torch.cuda.is_available():
        raise UsageError("device=cuda: torch sees no GPU here; device=cpu tries the script without one")
    tokens, vocab = parse_length(values.get("tokens", "32K")), parse_length(values.get("vocab", "32K"))
    step_tokens, repeats = parse_length(values.get("step_tokens", "64K")), int(values.get("repeats", 20))
    record = {
        **origin(sys.argv[1:], values.get("commit")),
        "device": torch.cuda.get_device_name() if device.type == "cuda" else "cpu",
        "torch": torch.__version__,
        "bandwidth": _bandwidth(device, repeats),
        "pieces": [],
        "kernel": _kernels(device, min(tokens, 2048), vocab, repeats) if device.type == "cuda" else [],
        "losses": [],
    }
    for name in values.get("models", "paper_545m,paper_1_5b,125m").split(","):
        print(f"== {name}", flush=True)
        model = load([f"model={name}", "data=embedded", "+exp=quickstart"]).model
        for piece in _pieces(model, tokens, device):
            row = _piece_row(*piece, record["bandwidth"], repeats)
            row |= {"model": name, "gap_a_step": _gap(row, model.num_layers * step_tokens / tokens)}
            record["pieces"].append(row)
        record["losses"] += [{"model": name} | row for row in _losses(model, tokens, vocab, device, repeats)]
        write_json(Path(values["to"]) / "fused.json", record)
    text = _table(record)
    (Path(values["to"]) / "fused.md").write_text(text + "\n", encoding="utf-8")
    print(text)


# -------------------- pieces of a layer


def _pieces(model: ModelConfig, tokens: int, device: torch.device) -> list[tuple]:
    """(name, function, inputs, bytes that must be moved forward and backward) of each piece."""
    dtype = torch.bfloat16 if device.type == "cuda" else torch.float32
    size, heads, kv_heads = head_dim(model), model.num_heads, num_kv_heads(model)
    generator = torch.Generator(device).manual_seed(0)

    def tensor(*shape: int, grad: bool = True) -> Tensor:
        x = torch.randn(*shape, generator=generator, device=device).to(dtype)
        return x.requires_grad_(grad)

    norm = RMSNorm(model.hidden_size, model.norm_eps).to(device, dtype)
    angles = torch.rand(tokens, size, device=device)
    cos, sin = angles.cos(), angles.sin()

    def add_norm(x: Tensor, o: Tensor) -> tuple[Tensor, Tensor]:
        added = x + o
        return added, norm(added)

    def rope(q: Tensor, k: Tensor) -> tuple[Tensor, Tensor]:
        return apply_rope(q, cos, sin), apply_rope(k, cos, sin)

    def swiglu(gate: Tensor, up: Tensor) -> tuple[Tensor]:
        return (F.silu(gate) * up,)

    width = tokens * model.hidden_size * dtype.itemsize
    qk = tokens * (heads + kv_heads) * size * dtype.itemsize
    ffn = tokens * model.ffn_size * dtype.itemsize
    stream = [tensor(tokens, model.hidden_size) for _ in range(2)]
    rotated = [tensor(tokens, heads, size), tensor(tokens, kv_heads, size)]
    return [
        ("residual + norm", add_norm, stream, 8 * width),
        ("RoPE of q and k", rope, rotated, 4 * qk + 4 * tokens * size * 4),
        ("SwiGLU", swiglu, [tensor(tokens, model.ffn_size) for _ in range(2)], 8 * ffn),
    ]


def _piece_row(name: str, function: Callable, inputs: list[Tensor], moved: int, bandwidth: float, repeats: int) -> dict:
    """Milliseconds of a piece, forward + backward."""
    outputs = function(*inputs)
    cotangents = [torch.randn_like(out) for out in outputs]

    def step(f: Callable) -> Callable[[], None]:
        return lambda: torch.autograd.grad(f(*inputs), inputs, cotangents)

    row = {"piece": name, "bytes": moved, "floor": 1000 * moved / bandwidth}
    row["eager"] = _milliseconds(step(function), inputs[0], repeats)
    row["compiled"] = _milliseconds(step(torch.compile(function, dynamic=False)), inputs[0], repeats)
    print(
        f"   {name}: eager {row['eager']:.3f}, compiled {row['compiled']:.3f}, floor {row['floor']:.3f} ms", flush=True
    )
    return row


def _gap(row: dict, times: float) -> float:
    return (row["compiled"] - row["floor"]) * times


# -------------------- the loss


def _losses(model: ModelConfig, tokens: int, vocab: int, device: torch.device, repeats: int) -> list[dict]:
    """Milliseconds of the whole loss, forward + backward, by both ways and for each size of a tile."""
    dtype = torch.bfloat16 if device.type == "cuda" else torch.float32
    hidden = torch.randn(tokens, model.hidden_size, device=device).to(dtype).requires_grad_()
    weight = (0.02 * torch.randn(vocab, model.hidden_size, device=device)).to(dtype).requires_grad_()
    labels = torch.randint(0, vocab, (tokens,), device=device)
    ways = {"definition": loss._TiledCrossEntropy.apply}
    if device.type == "cuda":
        ways["fused"] = fused_loss.fused_cross_entropy
    rows = []
    for tile in (t for t in TILES if t <= tokens) if tokens > TILES[0] else (tokens,):
        row: dict = {"tile": tile}
        results = {}
        for name, way in ways.items():

            def step(way: Callable = way, tile: int = tile) -> tuple[Tensor, ...]:
                found = way(hidden, weight, labels, tile)
                return found, *torch.autograd.grad(found.sum() * (1 / tokens), (hidden, weight))

            row[name] = _milliseconds(step, hidden, max(repeats // 2, 1))
            results[name] = step()
        if len(results) == 2:
            pairs = zip(results["fused"], results["definition"])
            row["differences"] = [float((a - b).float().norm() / b.float().norm()) for a, b in pairs]
        print(f"   loss, tile {tile}: " + ", ".join(f"{n} {row[n]:.2f} ms" for n in ways), flush=True)
        rows.append(row)
    return rows


def _kernels(device: torch.device, rows: int, vocab: int, repeats: int) -> list[dict]:
    """Milliseconds and GB/s of the kernel alone on a tile, for each (columns at a time, warps)."""
    logits = torch.randn(rows, vocab, device=device)
    labels = torch.randint(0, vocab, (rows,), device=device)
    out, grad = torch.empty(rows, device=device), torch.empty(rows, vocab, device=device, dtype=torch.bfloat16)
    found = []
    for chunk, warps in SHAPES:

        def step(chunk: int = chunk, warps: int = warps) -> None:
            fused_loss.cross_entropy_kernel[(rows,)](
                logits, labels, labels, out, grad, vocab, vocab,
                V=vocab, CHUNK=chunk, IGNORED=loss.IGNORED, WITH_GRAD=True, WITH_UPSTREAM=False, num_warps=warps,
            )  # fmt: skip

        ms = _milliseconds(step, logits, repeats)
        found.append({"chunk": chunk, "warps": warps, "ms": ms, "gb_per_s": rows * vocab * 6e-6 / ms})
        print(f"   kernel, {chunk} columns, {warps} warps: {ms:.3f} ms", flush=True)
    return found


# -------------------- time


def _bandwidth(device: torch.device, repeats: int) -> float:
    """Bytes a second of a large copy, read + written."""
    source = torch.empty(1 << (30 if device.type == "cuda" else 24), dtype=torch.uint8, device=device)
    target = torch.empty_like(source)
    return 2000 * source.numel() / _milliseconds(lambda: target.copy_(source), source, repeats)


def _milliseconds(function: Callable[[], object], on: Tensor, repeats: int) -> float:
    """The median time of a call after two for warming up."""
    times = []
    for number in range(repeats + 2):
        if on.is_cuda:
            begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
            begin.record()
            function()
            end.record()
            torch.cuda.synchronize()
            times.append(begin.elapsed_time(end))
        else:
            began = time.perf_counter()
            function()
            times.append(1000 * (time.perf_counter() - began))
        if number == 1:
            times.clear()
    return statistics.median(times)


def _table(record: dict) -> str:
    lines = [
        f"{record['device']}; torch {record['torch']}, commit {record['commit']}; a copy moves "
        f"{record['bandwidth'] / 1e9:,.0f} GB/s",
        "",
        f"`{record['command']}`",
        "",
        *_rows(("model", "piece", "eager ms", "compiled ms", "floor ms", "compiled - floor, ms a step")),
    ]
    keys = ("eager", "compiled", "floor", "gap_a_step")
    lines += [_line(r["model"], r["piece"], *(f"{r[key]:.2f}" for key in keys)) for r in record["pieces"]]
    lines += ["", *_rows(("columns at a time", "warps", "kernel ms", "GB/s"))]
    lines += [_line(r["chunk"], r["warps"], f"{r['ms']:.3f}", f"{r['gb_per_s']:,.0f}") for r in record["kernel"]]
    heads = ("model", "tile", "definition ms", "fused ms", "differences of losses and gradients")
    lines += ["", *_rows(heads)]
    for row in record["losses"]:
        fused = f"{row['fused']:.2f}" if "fused" in row else "-"
        differences = ", ".join(f"{x:.1e}" for x in row.get("differences", []))
        lines.append(_line(row["model"], row["tile"], f"{row['definition']:.2f}", fused, differences))
    return "\n".join(lines)


def _rows(heads: Sequence[str]) -> list[str]:
    return [_line(*heads), "|" + "---|" * len(heads)]


def _line(*cells: object) -> str:
    return f"| {' | '.join(map(str, cells))} |"


if __name__ == "__main__":
    main()
