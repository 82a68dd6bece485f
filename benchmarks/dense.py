"""Which kernels dense attention should run on: FlashAttention varlen or cuDNN document by document, by lengths.

    python benchmarks/dense.py to=results/dense                  # one GPU, some five minutes
    python benchmarks/dense.py to=runs/dense_cpu tokens=1K device=cpu repeats=1      # a dry run of the script

For packs of equal documents of ever shorter lengths, and for mixed ones as the shipped books give them, forward +
backward on random bf16 inputs: flash varlen (which one is said), cuDNN with every document on it, cuDNN as
moba/backends/cudnn.py does it (short documents on flash), and, with packed=true, cuDNN's own kernels for packs, which
torch has but keeps switched off: an error of theirs may end the process, so ask for them last.
Medians of `repeats` timed by events; before that each result is compared with float64 on a short pack. `first` is the
time of the first call, which builds a plan where the length is not among those built before; `host` that of handing a
warm call to the device. The rule it prints, the shortest length from which cuDNN is faster on every layout measured, is
what shortest_on_cudnn in moba/backends/refusals.py says, by head size: 4K at 128, 8K at 64.
"""

from __future__ import annotations

import statistics
import sys
import time
from collections.abc import Callable
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))

import torch  # noqa: E402

from benchmarks.common import origin  # noqa: E402
from conf.numbers import format_length, parse_length  # noqa: E402
from evals.results import write_json  # noqa: E402
from launch.cli import UsageError, exits_on, key_values  # noqa: E402
from moba.backends import cudnn  # noqa: E402
from moba.backends.refusals import shortest_on_cudnn  # noqa: E402
from moba.backends.varlen import default_primitive, varlen_attention  # noqa: E402
from moba.flops import attention_flops, causal_pairs  # noqa: E402
from moba.reference import reference_attention  # noqa: E402

KEYS = {
    "to": "folder of the results",
    "tokens": "tokens of a pack (default 32K)",
    "heads": "layouts as heads/key heads/head size (default 14/14/128,20/20/128,32/8/128,12/12/64)",
    "repeats": "timed calls (default 15)",
    "packed": "true: cuDNN's kernels for packs as well (default false)",
    "device": "cuda (default) or cpu",
    "commit": "commit of the code, where this is no git checkout",
}
CONVENTION = (
    "Milliseconds of forward + backward of one layer, median. TFLOP/s: 4 x heads x head size FLOPs a causal pair "
    "forward, three times that in all; padding is not counted."
)
SHARES = {  # of a pack: documents as the shipped books give them, from a chapter and its end to many short works
    "one cut": (0.83, 0.17),
    "three": (0.55, 0.3, 0.15),
    "long and short": (0.4, 0.2, 0.12, 0.08, 0.06, 0.05, 0.04, 0.03, 0.02),
}


@exits_on()
def main() -> None:
    """The command; see the module's text."""
    values = key_values(sys.argv[1:], KEYS, about=__doc__, required=["to"])
    tokens, repeats = parse_length(values.get("tokens", "32K")), int(values.get("repeats", 15))
    device = torch.device(values.get("device", "cuda"))
    if device.type == "cuda" and not torch.cuda.is_available():
        raise UsageError("device=cuda: torch sees no GPU here; device=cpu tries the script without one")
    packed = values.get("packed", "false") == "true" and device.type == "cuda"
    layouts = [
        tuple(map(int, text.split("/")))
        for text in values.get("heads", "14/14/128,20/20/128,32/8/128,12/12/64").split(",")
    ]
    record = {
        **origin(sys.argv[1:], values.get("commit")),
        "device": torch.cuda.get_device_name() if device.type == "cuda" else "cpu",
        "torch": torch.__version__,
        "cudnn": torch.backends.cudnn.version(),
        "convention": CONVENTION,
        "layouts": [],
    }
    for layout in layouts:
        print(f"== heads {layout}", flush=True)
        inputs = _inputs(tokens, layout, device)
        record["flash"] = default_primitive(inputs[0]).name
        plans = _plans(inputs, tokens) if device.type == "cuda" else None
        found = {"heads": layout, "errors": _errors(layout, device, packed), "plans": plans, "rows": []}
        for name, lengths in _packs(tokens).items():
            found["rows"].append(_row(name, lengths, inputs, repeats, packed))
            print(_line(found["rows"][-1]), flush=True)
        record["layouts"].append(found)
        record["shortest"] = _shortest(record["layouts"])
        write_json(Path(values["to"]) / "dense.json", record)
    text = _table(record)
    (Path(values["to"]) / "dense.md").write_text(text + "\n", encoding="utf-8")
    print(text)


def _packs(tokens: int) -> dict[str, list[int]]:
    """Lengths of the documents of each pack; each pack has `tokens`."""
    packs, count = {}, 1
    while tokens // count >= 512:
        packs[f"{count} x {format_length(tokens // count)}"] = [tokens // count] * count
        count *= 2
    for name, shares in SHARES.items():
        lengths = [int(share * tokens) for share in shares[1:]]
        packs[name] = [tokens - sum(lengths), *lengths]
    return packs


def _inputs(tokens: int, layout: tuple[int, int, int], device: torch.device, seed: int = 0) -> list[torch.Tensor]:
    """q, k, v with gradients, and the output's gradient."""
    generator = torch.Generator(device).manual_seed(seed)
    dtype = torch.bfloat16 if device.type == "cuda" else torch.float32

    def tensor(heads: int) -> torch.Tensor:
        return torch.randn(tokens, heads, layout[2], generator=generator, device=device).to(dtype)

    heads, kv_heads, _ = layout
    return [*(tensor(n).requires_grad_() for n in (heads, kv_heads, kv_heads)), tensor(heads)]


def _ways(lengths: list[int], device: torch.device, packed: bool) -> dict[str, Callable[..., torch.Tensor]]:
    """The attentions that are compared, of q, k, v."""
    bounds = torch.tensor([0, *lengths]).cumsum(0).to(device, torch.int32)
    longest = max(lengths)
    ways = {
        "flash": lambda q, k, v: varlen_attention(q, k, v, bounds, bounds, longest, longest),
        "cudnn": lambda q, k, v: cudnn.cudnn_attention(q, k, v, lengths, shortest=1),
        "mixed": lambda q, k, v: cudnn.cudnn_attention(q, k, v, lengths),
    }
    if packed:
        ways["packed cudnn"] = lambda q, k, v: _PackedCudnn.apply(q, k, v, bounds, longest)
    return ways


class _PackedCudnn(torch.autograd.Function):
    """cuDNN's kernels for packs, as torch.nn.attention.varlen would call them (where they are switched off today)."""

    @staticmethod
    def forward(ctx, q, k, v, bounds, longest):
        scale = q.shape[-1] ** -0.5
        out, lse, _, _, _, _, seed, offset, _ = torch.ops.aten._cudnn_attention_forward(
            q, k, v, None, bounds, bounds, longest, longest, True, 0.0, True, False, scale=scale
        )
        ctx.save_for_backward(q, k, v, out, lse, seed, offset, bounds)
        ctx.longest, ctx.scale = longest, scale
        return out

    @staticmethod
    def backward(ctx, dout):
        q, k, v, out, lse, seed, offset, bounds = ctx.saved_tensors
        sizes = (ctx.longest, ctx.longest, 0.0, True)
        grads = torch.ops.aten._cudnn_attention_backward(
            dout.contiguous(), q, k, v, out, lse, seed, offset, None, bounds, bounds, *sizes, scale=ctx.scale
        )
        return (*grads, None, None)


def _plans(inputs: list[torch.Tensor], tokens: int) -> dict[str, float] | str:
    """How many plans there can be for documents up to a pack's length, and the seconds that building them all takes."""
    began = time.perf_counter()
    try:
        lengths = cudnn.padded_lengths(tokens, shortest_on_cudnn(inputs[0].shape[-1]))
        cudnn.build_plans(*inputs[:2], lengths)
    except RuntimeError as error:
        return _first_line(error)
    torch.cuda.synchronize()
    return {"count": len(lengths), "seconds": time.perf_counter() - began}


def _errors(layout: tuple[int, int, int], device: torch.device, packed: bool) -> dict[str, float | str]:
    """Of each way the largest relative error of out, dq, dk, dv against float64, on a pack with padding everywhere."""
    lengths = [700, 130, 1000, 300, 5]
    *tensors, cotangent = _inputs(sum(lengths), layout, device, seed=1)
    exact = [x.detach().cpu().double().requires_grad_() for x in tensors]
    bounds = torch.tensor([0, *lengths]).cumsum(0).to(torch.int32)
    want = reference_attention(*exact, block_size=max(lengths), top_k=1, cu_seqlens=bounds)
    want = [want, *torch.autograd.grad(want, exact, cotangent.cpu().double())]
    errors = {}
    for name, way in _ways(lengths, device, packed).items():
        try:
            out = way(*tensors)
            got = [out, *torch.autograd.grad(out, tensors, cotangent)]
        except RuntimeError as error:
            errors[name] = _first_line(error)
            continue
        errors[name] = max(
            float((a.detach().cpu().double() - b.detach()).norm() / b.detach().norm()) for a, b in zip(got, want)
        )
        if not errors[name] < 0.02:
            print(f"   {name}: relative error {errors[name]:.2g}", flush=True)
    return errors


def _row(name: str, lengths: list[int], inputs: list[torch.Tensor], repeats: int, packed: bool) -> dict:
    _, heads, head_dim = inputs[0].shape
    flops = attention_flops(causal_pairs(lengths), heads, head_dim, backward=True)
    row: dict = {"pack": name, "lengths": lengths, "flops": flops}
    for way, attention in _ways(lengths, inputs[0].device, packed).items():
        try:
            row[way] = _time(attention, inputs, repeats)
        except RuntimeError as error:
            row[way] = {"failed": _first_line(error)}
    return row


def _time(attention: Callable[..., torch.Tensor], inputs: list[torch.Tensor], repeats: int) -> dict[str, float]:
    """Milliseconds: `first`, and medians of the device's time forward and in all, and of the host's."""
    *tensors, cotangent = inputs
    on_gpu = cotangent.is_cuda

    def wait() -> None:
        if on_gpu:
            torch.cuda.synchronize()

    def moment() -> torch.cuda.Event | float:
        if not on_gpu:
            return time.perf_counter()
        event = torch.cuda.Event(enable_timing=True)
        event.record()
        return event

    def between(a, b) -> float:
        return a.elapsed_time(b) if on_gpu else 1000 * (b - a)

    times: dict[str, list[float]] = {"forward": [], "total": [], "host": []}
    for number in range(repeats + 2):
        wait()
        began = time.perf_counter()
        start = moment()
        out = attention(*tensors)
        middle = moment()
        torch.autograd.grad(out, tensors, cotangent)
        end, handed = moment(), time.perf_counter()
        wait()
        if number == 0:
            first = 1000 * (time.perf_counter() - began)
        if number >= min(2, repeats):
            times["forward"].append(between(start, middle))
            times["total"].append(between(start, end))
            times["host"].append(1000 * (handed - began))
    return {"first": first} | {key: statistics.median(values) for key, values in times.items()}


def _first_line(error: Exception) -> str:
    return str(error).strip().splitlines()[0][:200]


def _shortest(layouts: list[dict]) -> int | None:
    """The shortest document from which on cuDNN was faster than flash on packs of equal documents, on all layouts."""
    fits = None
    equal: dict[int, list[bool]] = {}
    for layout in layouts:
        for row in layout["rows"]:
            if len({*row["lengths"]}) == 1 and "total" in row["cudnn"]:
                equal.setdefault(row["lengths"][0], []).append(row["cudnn"]["total"] < row["flash"]["total"])
    for length in sorted(equal, reverse=True):
        if not all(equal[length]):
            break
        fits = length
    return fits


def _line(row: dict) -> str:
    parts = [f"   {row['pack']:<16}"]
    for way in ("flash", "cudnn", "mixed", "packed cudnn"):
        if way in row:
            parts.append(f"{way} {row[way]['total']:.2f}" if "total" in row[way] else f"{way} -")
    return "  ".join(parts)


def _table(record: dict) -> str:
    ways = ("flash", "cudnn", "mixed", "packed cudnn")
    lines = [
        f"{record['device']}; torch {record['torch']}, cuDNN {record['cudnn']}, flash: {record['flash']}, commit "
        f"{record['commit']}",
        "",
        f"`{record['command']}`",
        "",
        record["convention"],
        "",
        f"cuDNN is faster on all layouts from documents of {record['shortest']} tokens on.",
    ]
    for layout in record["layouts"]:
        heads, kv_heads, size = layout["heads"]
        errors = ", ".join(f"{k} {v if isinstance(v, str) else f'{v:.1e}'}" for k, v in layout["errors"].items())
        lines += [
            "",
            f"Heads {heads}/{kv_heads} of {size}; errors against float64: {errors}; plans: {layout['plans']}",
            "",
        ]
        columns = ["pack", *ways, "flash TFLOP/s", "cudnn TFLOP/s", "cudnn / flash", "cudnn first ms", "cudnn host ms"]
        lines += [f"| {' | '.join(columns)} |", "|" + "---|" * len(columns)]
        for row in layout["rows"]:
            cells = [row["pack"]]
            cells += [f"{row[w]['total']:.2f}" if "total" in row.get(w, {}) else "-" for w in ways]
            rates = [row["flops"] / row[w]["total"] * 1e-9 if "total" in row[w] else None for w in ways[:2]]
            cells += ["-" if rate is None else f"{rate:.0f}" for rate in rates]
            if None in rates:
                cells += ["-", "-", "-"]
            else:
                cells += [f"{rates[1] / rates[0]:.2f}x", f"{row['cudnn']['first']:.0f}", f"{row['cudnn']['host']:.2f}"]
            lines.append(f"| {' | '.join(cells)} |")
    return "\n".join(lines)


if __name__ == "__main__":
    main()
