"""How fast a run is: tokens/s, TFLOP/s and MFU by attended (query, key) pairs, and the time left.

CONVENTION is the text shown with these figures.
"""

from __future__ import annotations

import re
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from functools import lru_cache
from typing import Any, NamedTuple, TypedDict

from conf.schema import ModelConfig
from moba.flops import attended_pairs, attention_flops, causal_pairs
from moba.kinds import AttentionSpec
from train.model.sizes import head_dim, matmul_flops_per_token

CONVENTION = (
    "TFLOP/s and MFU are those of one device. They count model FLOPs of forward and backward (3 x forward; what is "
    "recomputed is not counted): for a token 2 x the weights of every matrix product, with the output projection and "
    "without the embedding lookup; for an attended (query, key) pair, causal and inside its document, 4 x heads x head "
    "size; routing is not counted. mfu counts the pairs that the attention in force attends to; mfu_dense_equivalent "
    "counts every causal pair, as if attention were full, so it may exceed 1. Both divide by the device's dense bf16 "
    "peak and are null where that is unknown and on CPUs."
)

# Dense bf16 TFLOP/s of the tensor cores, no sparsity, from the vendors' data sheets, by words of the name the driver
# reports. The first row whose words all occur wins, so special models come before their family.
_PEAK_TFLOPS: tuple[tuple[str, float], ...] = (
    ("GB200", 2500.0),
    ("B200", 2250.0),
    ("GH200", 989.4),
    ("H200 NVL", 835.5),
    ("H200", 989.4),
    ("H100 NVL", 835.5),
    ("H100 PCIe", 756.5),
    ("H100", 989.4),
    ("H800 PCIe", 756.5),
    ("H800", 989.4),
    ("H20", 148.0),
    ("A100", 312.0),
    ("A800", 312.0),
    ("A40", 149.7),
    ("A30", 165.0),
    ("A10", 125.0),
    ("L40S", 362.0),
    ("L40", 181.0),
    ("L4", 121.0),
    ("RTX 4090", 165.2),
    ("RTX 3090", 71.2),
    ("MI325X", 1307.4),
    ("MI300X", 1307.4),
)


def peak_tflops(device_name: str | None) -> float | None:
    """Dense bf16 TFLOP/s that a device of this name reaches at best; None on a CPU (None) and for names not listed."""
    words = set(re.split(r"[\s\-_/]+", (device_name or "").upper()))
    for name, peak in _PEAK_TFLOPS:
        if set(name.upper().split()) <= words:
            return peak
    return None


class Work(NamedTuple):
    """The work of training on some tokens. Three plain counts: ranks add theirs up as a tensor and rebuild it as
    Work(*sums)."""

    tokens: int = 0
    attended_pairs: int = 0
    """(query, key) pairs of one head, summed over layers, that the attention plan attends to."""
    causal_pairs: int = 0
    """The same under full attention."""


@lru_cache(maxsize=1024)
def batch_work(plan: tuple[AttentionSpec, ...], lengths: tuple[int, ...]) -> Work:
    """Work of one pass over documents of `lengths` tokens with one AttentionSpec per layer."""
    attended = {spec: attended_pairs(spec, lengths) for spec in set(plan)}
    return Work(sum(lengths), sum(attended[spec] for spec in plan), len(plan) * causal_pairs(lengths))


class Rates(TypedDict):
    """Columns of a train line, as `Throughput.rates` says."""

    tokens_per_second: float
    tflops: float
    mfu: float | None
    mfu_dense_equivalent: float | None
    attended_share: float
    seconds: float


class Throughput:
    """A stopwatch, and a counter of work.

    On a GPU the time is right after a synchronisation: call `lap` when the end of a step is known, which may be after
    its work was taken, and before that of the next one is added.
    """

    def __init__(
        self, model: ModelConfig, vocab_size: int, *, num_devices: int = 1, device_name: str | None = None
    ) -> None:
        """`device_name`: torch.cuda.get_device_name(), None on a CPU."""
        self.num_devices = num_devices
        self.device_name = device_name
        self.peak = peak_tflops(device_name)
        self._heads = model.num_heads
        self._head_dim = head_dim(model)
        self._matmul_flops = matmul_flops_per_token(model, vocab_size)
        self._work = Work()
        self._since = time.perf_counter()

    def add(self, plan: Sequence[AttentionSpec], lengths: Sequence[int]) -> None:
        """Counts one micro-batch of this rank: the current attention plan and its documents' lengths in tokens."""
        work = batch_work(tuple(plan), tuple(lengths))
        self._work = Work(*(have + more for have, more in zip(self._work, work)))

    def take(self) -> Work:
        """This rank's work since the last `take`."""
        work, self._work = self._work, Work()
        return work

    def lap(self) -> float:
        """Seconds since the last `lap`."""
        now = time.perf_counter()
        seconds, self._since = now - self._since, now
        return seconds

    @contextmanager
    def paused(self) -> Iterator[None]:
        """Excludes what happens inside (an evaluation, a checkpoint) from the measured time."""
        began = time.perf_counter()
        try:
            yield
        finally:
            self._since += time.perf_counter() - began

    def flops(self, tokens: int, pairs: int) -> int:
        """Model FLOPs of training on so many tokens and attention pairs (see CONVENTION)."""
        return tokens * self._matmul_flops + attention_flops(pairs, self._heads, self._head_dim, backward=True)

    def rates(self, work: Work, seconds: float) -> Rates:
        """Columns of a train line, from the work of all ranks together (at least a token) and the seconds it took.

        tokens_per_second is that of the whole run, tflops and both mfu are one device's; attended_share is the part of
        the causal pairs that is attended to.
        """
        scale = 1e-12 / seconds / self.num_devices
        attended = self.flops(work.tokens, work.attended_pairs) * scale
        dense = self.flops(work.tokens, work.causal_pairs) * scale
        return {
            "tokens_per_second": work.tokens / seconds,
            "tflops": attended,
            "mfu": attended / self.peak if self.peak else None,
            "mfu_dense_equivalent": dense / self.peak if self.peak else None,
            "attended_share": work.attended_pairs / work.causal_pairs,
            "seconds": seconds,
        }

    def eta_seconds(self, stages: Sequence[Any], tokens: int, tokens_per_second: float) -> float:
        """Seconds from `tokens` until the last stage ends, at the speed of the current stage.

        stages: train.schedule.Stage, in order. A later stage is taken to be slower or faster by its FLOPs per token of
        full-length documents, so that the estimate holds before a switch to full attention.
        """
        ahead = [stage for stage in stages if stage.end > tokens]
        left = sum((stage.end - max(stage.start, tokens)) * self._stage_cost(stage) for stage in ahead)
        return left / self._stage_cost(ahead[0]) / tokens_per_second if ahead else 0.0

    def _stage_cost(self, stage: Any) -> float:
        """FLOPs per token of documents that fill the stage's length."""
        work = batch_work(tuple(stage.attention), (stage.seq_len,))
        return self.flops(work.tokens, work.attended_pairs) / work.tokens

    def describe(self) -> dict[str, Any]:
        """Convention and hardware of the rates: columns of a `run` line."""
        return {
            "device": self.device_name or "cpu",
            "num_devices": self.num_devices,
            "peak_tflops": self.peak,
            "convention": CONVENTION,
        }
