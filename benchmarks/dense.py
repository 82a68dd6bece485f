"""Which kernels dense attention should run on: FlashAttention varlen or cuDNN document by document, by lengths.

    python benchmarks/dense.py to=results/dense                  # one GPU, some five minutes
    python benchmarks/dense.py to=runs/dense_cpu tokens=1K device=cpu repeats=1      # a dry run of the script

For packs of equal documents of ever shorter lengths, and for mixed ones as the shipped books give them, forward and
backward on random bf16 inputs: flash varlen, cuDNN with every document on it, and cuDNN as moba/backends/cudnn.py does
it (`mixed`: short documents on flash); before that each result is compared with float64 on a short pack. `first` is the
time of the first call, which builds a plan where the length is new; `host` that of handing a warm call to the device.
The rule it prints, the shortest length from which cuDNN is faster on every layout measured, is what shortest_on_cudnn
in moba/backends/refusals.py says, by head size: 4K at 128, 8K at 64.
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

from benchmarks.common import cell, device_name, heading, markdown, origin, write  # noqa: E402
from conf.numbers import format_length, parse_length  # noqa: E402
from launch.cli import UsageError, exits_on, key_values  # noqa: E402
from moba.backends import cudnn  # noqa: E402
from moba.backends.varlen import default_primitive, varlen_attention  # noqa: E402
from moba.flops import attention_flops, causal_pairs  # noqa: E402
from moba.reference import reference_attention  # noqa: E402

KEYS = {
    "to": "folder of the results",
    "tokens": "tokens of a pack (default 32K)",
    "heads": "layouts as heads/key heads/head size (default 14/14/128,20/20/128,32/8/128,12/12/64)",
    "repeats": "timed calls (default 15)",
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
WAYS = ("flash", "cudnn", "mixed")


@exits_on()
def main() -> None:
    """The command; see the module's text."""
    values = key_values(sys.argv[1:], KEYS, about=__doc__, required=["to"])
    tokens, repeats = parse_length(values.get("tokens", "32K")), int(values.get("repeats", 15))
    device = torch.device(values.get("device", "cuda"))
    if device.type == "cuda" and not torch.cuda.is_available():
        raise UsageError("device=cuda: torch sees no GPU here; device=cpu tries the script without one")
    record = {
        **origin(sys.argv[1:], values.get("commit")),
        "device": device_name() if device.type == "cuda" else "cpu",
        "torch": torch.__version__,
        "cudnn": torch.backends.cudnn.version(),
        "convention": CONVENTION,
        "layouts": [],
    }
    for text in values.get("heads", "14/14/128,20/20/128,32/8/128,12/12/64").split(","):
        heads, kv_heads, size = layout = tuple(map(int, text.split("/")))
        print(f"== heads {heads}/{kv_heads} of {size}", flush=True)
        inputs = _inputs(tokens, layout, device)
        record["flash"] = default_primitive(inputs[0]).name
        found = {"heads": layout, "errors": _errors(layout, device), "rows": []}
        record["layouts"].append(found)
        for name, lengths in _packs(tokens).items():
            row = {"pack": name, "lengths": lengths}
            row["flops"] = attention_flops(causal_pairs(lengths), heads, size, backward=True)
            row |= {way: _attempt(_time, run, inputs, repeats) for way, run in _ways(lengths, device).items()}
            found["rows"].append(row)
        record["shortest"] = _shortest(record["layouts"])
        text = write(record, _table(record), Path(values["to"]), "dense")
    print(text)


def _packs(tokens: int) -> dict[str, list[int]]:
    """Lengths of the documents of each pack; each pack has `tokens`."""
    counts = [1 << i for i in range(tokens.bit_length()) if tokens >> i >= 512]
    packs = {f"{count} x {format_length(tokens // count)}": [tokens // count] * count for count in counts}
    for name, shares in SHARES.items():
        lengths = [int(share * tokens) for share in shares[1:]]
        packs[name] = [tokens - sum(lengths), *lengths]
    return packs


def _inputs(tokens: int, layout: tuple[int, ...], device: torch.device, seed: int = 0) -> list[torch.Tensor]:
    """q, k, v with gradients, and the output's gradient."""
    generator = torch.Generator(device).manual_seed(seed)
    dtype = torch.bfloat16 if device.type == "cuda" else torch.float32
    shapes = [(tokens, heads, layout[2]) for heads in (layout[0], layout[1], layout[1], layout[0])]
    *qkv, cotangent = (torch.randn(shape, generator=generator, device=device).to(dtype) for shape in shapes)
    return [*(x.requires_grad_() for x in qkv), cotangent]


def _ways(lengths: list[int], device: torch.device) -> dict[str, Callable[..., torch.Tensor]]:
    """The attentions that are compared, of q, k, v."""
    bounds = torch.tensor([0, *lengths]).cumsum(0).to(device, torch.int32)
    return {
        "flash": lambda q, k, v: varlen_attention(q, k, v, bounds, bounds, max(lengths), max(lengths)),
        "cudnn": lambda q, k, v: cudnn.cudnn_attention(q, k, v, lengths, shortest=1),
        "mixed": lambda q, k, v: cudnn.cudnn_attention(q, k, v, lengths),
    }


def _attempt(function: Callable[..., dict], *arguments: object) -> dict:
    """function(...), or why it cannot be."""
    try:
        return function(*arguments)
    except RuntimeError as error:
        return {"failed": str(error).strip().splitlines()[0][:200]}


def _errors(layout: tuple[int, ...], device: torch.device) -> dict[str, dict]:
    """Of each way the largest relative error of out, dq, dk, dv against float64, on a pack with padding everywhere."""
    lengths = [700, 130, 1000, 300, 5]
    *tensors, cotangent = _inputs(sum(lengths), layout, device, seed=1)
    exact = [x.detach().cpu().double().requires_grad_() for x in tensors]
    bounds = torch.tensor([0, *lengths]).cumsum(0).to(torch.int32)
    out = reference_attention(*exact, block_size=max(lengths), top_k=1, cu_seqlens=bounds)
    want = [out, *torch.autograd.grad(out, exact, cotangent.cpu().double())]

    def error(way: Callable[..., torch.Tensor]) -> dict:
        out = way(*tensors)
        pairs = zip([out, *torch.autograd.grad(out, tensors, cotangent)], want)
        return {"largest": max(float((a.cpu().double() - b).norm() / b.norm()) for a, b in pairs)}

    return {name: _attempt(error, way) for name, way in _ways(lengths, device).items()}


def _time(attention: Callable[..., torch.Tensor], inputs: list[torch.Tensor], repeats: int) -> dict[str, float]:
    """Milliseconds: `first`, and medians of a warm call until the device is done, and until it was handed over."""
    *tensors, cotangent = inputs
    wait = torch.cuda.synchronize if cotangent.is_cuda else lambda: None
    total, host = [], []
    for _ in range(repeats + 2):
        wait()
        began = time.perf_counter()
        torch.autograd.grad(attention(*tensors), tensors, cotangent)
        host.append(1000 * (time.perf_counter() - began))
        wait()
        total.append(1000 * (time.perf_counter() - began))
    return {"first": total[0], "total": statistics.median(total[2:]), "host": statistics.median(host[2:])}


def _shortest(layouts: list[dict]) -> int | None:
    """The shortest document from which on cuDNN was faster than flash on packs of equal documents, on all layouts."""
    fits, equal = None, {}
    for row in (row for layout in layouts for row in layout["rows"]):
        if len({*row["lengths"]}) == 1 and "total" in row["cudnn"]:
            equal.setdefault(row["lengths"][0], []).append(row["cudnn"]["total"] < row["flash"]["total"])
    for length in sorted(equal, reverse=True):
        if not all(equal[length]):
            break
        fits = length
    return fits


def _table(record: dict) -> list[str]:
    lines = [*heading(record), f"cuDNN is faster on all layouts from documents of {record['shortest']} tokens on."]
    heads = ["pack", *(f"{way} ms" for way in WAYS), "flash TFLOP/s", "cudnn TFLOP/s", "cudnn / flash"]
    for layout in record["layouts"]:
        rows = []
        for row in layout["rows"]:
            times = [row[way].get("total") for way in WAYS]
            rates = [None if ms is None else row["flops"] / ms * 1e-9 for ms in times[:2]]
            faster = None if None in rates else rates[1] / rates[0]
            host = ", ".join(
                cell(row["cudnn"].get(key), form) for key, form in {"first": "{:.0f}", "host": "{:.2f}"}.items()
            )
            cells = [*(cell(ms, "{:.2f}") for ms in times), *(cell(rate, "{:.0f}") for rate in rates)]
            rows.append([row["pack"], *cells, cell(faster, "{:.2f}x"), host])
        errors = [f"{way} {e.get('failed') or format(e['largest'], '.1e')}" for way, e in layout["errors"].items()]
        about = f"Heads {{}}/{{}} of {{}}; errors against float64: {', '.join(errors)}".format(*layout["heads"])
        lines += ["", about, "", *markdown([*heads, "cudnn first, host ms"], rows)]
    return lines


if __name__ == "__main__":
    main()
