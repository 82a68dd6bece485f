"""What a profiler's trace of training steps says: milliseconds by kind of kernel, and how long the device idled.

A kernel's kind follows from where it was launched (the operators of the host that enclose the launch), and from its own
name where that does not tell. Without a GPU the host's operators are what is counted, each without those inside it.

matmul       matrix products with weights, forward and backward, the logits among them
attention    everything inside an attention's own operators: routing, lists and merging too
elementwise  norms, RoPE, activations, residuals, casts, copies, the sum of gradients over micro-batches
optimizer    everything between the last backward operator of a step and the next step's first: norm of the gradients,
             clipping, AdamW, the copy of the weights, and the log
loss         what the cross-entropy does besides its matrix products
other        communication, and what no rule knows
"""

from __future__ import annotations

import re
from bisect import bisect_right
from collections import defaultdict
from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import NamedTuple

KINDS: tuple[str, ...] = ("matmul", "attention", "elementwise", "optimizer", "loss", "other")
ON_DEVICE = ("kernel", "gpu_memcpy", "gpu_memset")
ON_HOST = ("cpu_op", "user_annotation")
CALLS = ("cuda_runtime", "cuda_driver")
UNKNOWN = -1
NAME_LENGTH = 80

# In the names of operators that enclose a launch.
_ATTENTION = re.compile(
    r"moba::|_flash_attention|scaled_dot_product|_VarlenAttention|_MixedAttention|_BlockSparse|_Sliding|_CudnnAttention"
)
_LOSS = re.compile(r"CrossEntropy|moba_train::cross_entropy")
_MATMUL_OPERATOR = re.compile(r"aten::(mm|bmm|addmm|_scaled_mm|matmul|linear)$")
_BACKWARD = "autograd::engine::evaluate_function"
_FORWARD_BEGINS = "aten::embedding"
_OPTIMIZER = "Optimizer.step#"
# In the names of kernels.
_MATMUL_KERNEL = re.compile(r"gemm|nvjet|xmma|cutlass|gemv|splitKreduce|cublas", re.IGNORECASE)
_ATTENTION_KERNEL = re.compile(r"flash|fmha|sdpa|attention", re.IGNORECASE)
_OTHER_KERNEL = re.compile(r"nccl", re.IGNORECASE)
# What an operator that only wraps others, or waits, spends itself is not work.
_NO_WORK = re.compile(r"^(autograd::engine|ProfilerStep|Optimizer\.|PyTorch |Activity )|Backward\d*$|^gloo:")


class Launch(NamedTuple):
    """A piece of work: microseconds, its name, the names around it from the outermost in, and when it was launched."""

    duration: float
    name: str
    around: tuple[str, ...]
    at: float


def milliseconds_by_kind(events: Sequence[Mapping], num_steps: int) -> dict[str, float]:
    """Milliseconds per step of each kind, from the `traceEvents` of a trace with the host's operators."""
    sums = dict.fromkeys(KINDS, 0.0)
    for kind, launch in _classified(events):
        sums[kind] += launch.duration / 1000 / num_steps
    return sums


def longest_kernels(events: Sequence[Mapping], num_steps: int, count: int = 6) -> dict[str, list[tuple[str, float]]]:
    """Of each kind what took longest, and its milliseconds per step: kernels by their names and, in brackets, the
    outermost and the innermost operator around their launch, since most elementwise kernels of torch are called the
    same."""
    sums: dict[str, dict[str, float]] = {kind: defaultdict(float) for kind in KINDS}
    for kind, launch in _classified(events):
        places = dict.fromkeys(name.removeprefix(f"{_BACKWARD}: ") for name in (launch.around[:1] + launch.around[-1:]))
        place = f" [{' > '.join(places)}]" if places else ""
        sums[kind][launch.name[:NAME_LENGTH] + place] += launch.duration / 1000 / num_steps
    return {kind: sorted(names.items(), key=lambda item: -item[1])[:count] for kind, names in sums.items()}


def idle_share(events: Iterable[Mapping]) -> float | None:
    """The part of the time between the first and the last kernel in which none runs; None without kernels."""
    kernels = [e for e in events if e.get("ph") == "X" and e.get("cat") in ON_DEVICE]
    return 1 - _covered(kernels) / _span(kernels) if kernels else None


def communication(events: Iterable[Mapping]) -> dict[str, float | None]:
    """Shares of the time that a profiler's trace spans, from its `traceEvents`: in which communication runs, and in
    which nothing else does (None on a CPU, where gloo's threads run beside the trainer's)."""
    events = [e for e in events if e.get("ph") == "X" and e.get("cat") != "Trace"]
    on_gpu = [e for e in events if e["cat"] in ON_DEVICE]
    name, everything = ("nccl", on_gpu) if on_gpu else ("gloo:", events)
    ours, others = ([e for e in everything if e["name"].startswith(name) == own] for own in (True, False))
    exposed = (_covered(everything) - _covered(others)) / _span(everything) if on_gpu else None
    return {"communication": _covered(ours) / _span(everything), "communication_exposed": exposed}


def _span(events: Sequence[Mapping]) -> float:
    """Microseconds from the begin of the first event to the end of the last."""
    return max(e["ts"] + e["dur"] for e in events) - min(e["ts"] for e in events)


def _covered(events: Iterable[Mapping]) -> float:
    """Microseconds in which at least one of the events runs."""
    total, until = 0.0, float("-inf")
    for begin, end in sorted((e["ts"], e["ts"] + e["dur"]) for e in events):
        total += max(0.0, end - max(begin, until))
        until = max(until, end)
    return total


def _classified(events: Sequence[Mapping]) -> Iterator[tuple[str, Launch]]:
    events = [e for e in events if e.get("ph") == "X" and e.get("cat") != "Trace"]
    host = [e for e in events if e["cat"] in ON_HOST]
    device = [e for e in events if e["cat"] in ON_DEVICE]
    between = _optimizer_times(host)
    for launch in _kernel_launches(events, device) if device else _operators(host):
        yield _kind(launch, between), launch


def _kind(launch: Launch, optimizer: Sequence[tuple[float, float]]) -> str:
    place = bisect_right(optimizer, (launch.at, float("inf"))) - 1
    if place >= 0 and launch.at < optimizer[place][1]:
        return "optimizer"
    around = " ".join(launch.around)
    if _OTHER_KERNEL.search(launch.name):
        return "other"
    if _ATTENTION.search(around) or _ATTENTION_KERNEL.search(launch.name):
        return "attention"
    if _MATMUL_KERNEL.search(launch.name) or any(_MATMUL_OPERATOR.search(name) for name in launch.around):
        return "matmul"
    if _LOSS.search(around):
        return "loss"
    return "elementwise" if launch.around else "other"


def _optimizer_times(host: Sequence[Mapping]) -> list[tuple[float, float]]:
    """From the last backward operator before each step of the optimizer to the first of the next forward pass."""
    ends = sorted(e["ts"] + e["dur"] for e in host if e["name"].startswith(_BACKWARD))
    begins = sorted(e["ts"] for e in host if e["name"] == _FORWARD_BEGINS)
    times = []
    for step in sorted(e["ts"] for e in host if e["name"].startswith(_OPTIMIZER)):
        before, after = bisect_right(ends, step), bisect_right(begins, step)
        end = begins[after] if after < len(begins) else float("inf")
        times.append((ends[before - 1] if before else step, end))
    return times


def _kernel_launches(events: Sequence[Mapping], device: Sequence[Mapping]) -> Iterator[Launch]:
    """The work of the device, each with the operators around the call that launched it."""
    calls = {e.get("args", {}).get("correlation"): e for e in events if e["cat"] in CALLS}
    around: dict[int, tuple[str, ...]] = {}
    by_thread = defaultdict(list)
    for event in events:
        if event["cat"] in ON_HOST + CALLS:
            by_thread[event["tid"]].append(event)
    for thread in by_thread.values():
        for event, outer in _nested(thread):
            if event["cat"] not in ON_HOST:
                names = tuple(o["name"] for o in outer if o["cat"] in ON_HOST)
                around[event.get("args", {}).get("correlation")] = names
    for event in device:
        correlation = event.get("args", {}).get("correlation", UNKNOWN)
        call = calls.get(correlation)
        at = event["ts"] if call is None else call["ts"]
        yield Launch(event["dur"], event["name"], around.get(correlation, ()), at)


def _operators(host: Sequence[Mapping]) -> Iterator[Launch]:
    """The host's operators, each with the time that it spent outside of those within it."""
    by_thread = defaultdict(list)
    for event in host:
        by_thread[event["tid"]].append(event)
    for thread in by_thread.values():
        own = {id(event): event["dur"] for event in thread}
        found = []
        for event, outer in _nested(thread):
            if outer:
                own[id(outer[-1])] -= event["dur"]
            found.append((event, tuple(o["name"] for o in [*outer, event])))
        for event, around in found:
            if not _NO_WORK.search(event["name"]):
                yield Launch(max(0.0, own[id(event)]), event["name"], around, event["ts"])


def _nested(events: Sequence[Mapping]) -> Iterator[tuple[Mapping, list[Mapping]]]:
    """Each event of one thread with those that enclose it, from the outermost in."""
    open_events: list[Mapping] = []
    for event in sorted(events, key=lambda e: (e["ts"], -e["dur"])):
        while open_events and open_events[-1]["ts"] + open_events[-1]["dur"] <= event["ts"]:
            open_events.pop()
        yield event, open_events
        open_events.append(event)
