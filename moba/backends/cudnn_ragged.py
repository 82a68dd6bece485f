"""Attention of ragged sequences on cuDNN, forward and backward as two plain functions: the queries and keys of a
sequence lie where the caller says.

torch reaches cuDNN's ragged kernels only in part: up to the middle of 2026 its backward operator took the head size for
the length of the longest sequence, and read out of bounds. So graphs are built here, by the package
nvidia-cudnn-frontend (optional; it has no kernels, cuDNN comes with torch), and kept. A graph depends on shapes alone:
how many sequences and tokens there may be, and how long a sequence may be. Where sequences lie and how long they are is
read on the device, so that nothing waits; a sequence may be empty. Bounds are rounded up, so that graphs are few.

Shapes: q [R, H, D]; k, v [S, G, D], H % G == 0, the stride between tokens as it is; starts int32 [N] in tokens, lengths
int32 [N]; lse [R, H], natural logarithm, float32 (float64 for float64). Rows outside all sequences are neither read nor
written. Causal sequences have as many queries as keys.
"""

from __future__ import annotations

import functools
import importlib
import importlib.util
import threading
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from moba.backends.varlen import PLAIN
from moba.routing import score_dtype

PARTS = 8
"""Bounds between a power of two and the next: an eighth of the power is the most that rounding adds."""


@dataclass(frozen=True, eq=False)
class Sequences:
    """Where the queries and keys of each sequence lie, on the device, and the longest there can be."""

    start_q: Tensor
    length_q: Tensor
    start_k: Tensor
    length_k: Tensor
    start_dk: Tensor
    """Where the gradients of its keys are written: sequences over the same keys have a share each."""
    max_q: int
    max_k: int
    causal: bool
    made: dict[Any, Tensor] = field(default_factory=dict, repr=False)
    """What was derived for calls on the same sequences."""

    @property
    def number(self) -> int:
        """How many there are, the empty ones included."""
        return self.start_q.shape[0]

    def split(self, most: int) -> Iterator[Sequences]:
        """The sequences in order, at most so many at a time, in parts of even size."""
        size = -(-self.number // -(-self.number // most))
        places = (self.start_q, self.length_q, self.start_k, self.length_k, self.start_dk)
        for part in zip(*(x.split(size) for x in places)):
            yield Sequences(*part, max_q=self.max_q, max_k=self.max_k, causal=self.causal)

    def offset(self, tokens: str, stride: int, count: int) -> Tensor:
        """int64 [count + 1]: the start in elements of `stride` between tokens of each sequence and of empty ones.

        One more than there are sequences, as packed ones have it.
        """
        key = tokens, stride, count
        if key not in self.made:
            start = getattr(self, f"start_{tokens}")
            self.made[key] = F.pad(start.to(torch.int64), (0, count + 1 - self.number)).mul_(stride)
        return self.made[key]

    def length(self, tokens: str, count: int) -> Tensor:
        """int32 [count]: the length of each sequence and of empty ones."""
        key = tokens, count
        if key not in self.made:
            length = getattr(self, f"length_{tokens}")
            self.made[key] = F.pad(length, (0, count - self.number)) if count > self.number else length
        return self.made[key]


class Ragged(NamedTuple):
    """Attention of ragged sequences by one provider.

    forward(q, k, v, sequences, scale) -> out [R, H, D], lse [R, H]
    backward(dout, q, k, v, out, lse, sequences, scale, grads, deterministic)

    What forward returns is contiguous. backward takes whatever out and lse it is given: with those of a softmax over
    more keys it makes this part's share of the gradients. It fills `grads`: dq [R, H, D], dk and dv [any, G, D]; all
    its tensors are contiguous. `deterministic` asks for the same bits each time, at the cost of a workspace of a number
    per query and key.
    """

    name: str
    forward: Callable[..., tuple[Tensor, Tensor]]
    backward: Callable[..., None]


# -------------------- plain PyTorch


def _plain_forward(q, k, v, sequences: Sequences, scale):
    out = q.new_full(q.shape, float("nan"))
    lse = torch.full(q.shape[:2], float("nan"), dtype=score_dtype(q), device=q.device)
    for rows, keys in _slices(sequences):
        out[rows], lse_HR = PLAIN.forward(q[rows], k[keys], v[keys], *_bounds(rows, keys), sequences.causal, scale)
        lse[rows] = lse_HR.T
    return out, lse


def _plain_backward(dout, q, k, v, out, lse, sequences: Sequences, scale, grads, deterministic):
    dq, dk, dv = grads
    for (rows, keys), start in zip(_slices(sequences), sequences.start_dk[sequences.length_q > 0].tolist()):
        tensors = (dout[rows], q[rows], k[keys], v[keys], out[rows], lse[rows].T)
        to = slice(start, start + keys.stop - keys.start)
        dq[rows], dk[to], dv[to] = PLAIN.backward(*tensors, *_bounds(rows, keys), sequences.causal, scale, False)


def _slices(sequences: Sequences):
    """(rows, keys) of every sequence that has queries."""
    places = (sequences.start_q, sequences.length_q, sequences.start_k, sequences.length_k)
    for start_q, length_q, start_k, length_k in zip(*(x.tolist() for x in places)):
        if length_q:
            yield slice(start_q, start_q + length_q), slice(start_k, start_k + length_k)


def _bounds(rows: slice, keys: slice) -> tuple[Tensor, Tensor, int, int]:
    num_q, num_k = rows.stop - rows.start, keys.stop - keys.start
    return torch.tensor([0, num_q]), torch.tensor([0, num_k]), num_q, num_k


PLAIN_RAGGED = Ragged("plain", _plain_forward, _plain_backward)


# -------------------- cuDNN


class Plan(NamedTuple):
    """What a graph is built for; strides are those between the tokens of the inputs."""

    device: int
    dtype: torch.dtype
    num_sequences: int
    num_heads: int
    num_kv_heads: int
    head_dim: int
    stride_q: int
    stride_k: int
    stride_lse: int
    max_q: int
    max_k: int
    causal: bool
    scale: float
    num_rows: int = 0
    """In the backward: rows of q, which bound its workspace."""
    num_dk: int = 0
    deterministic: bool = False


class Graph(NamedTuple):
    """A graph with its plan, its tensors by name, and of its offsets (tokens, elements of one) by what they are."""

    graph: Any
    tensors: dict[str, Any]
    offsets: dict[tuple[str, int], Any]
    workspace_bytes: int


@functools.cache
def installed() -> bool:
    """Whether the package nvidia-cudnn-frontend is there."""
    return importlib.util.find_spec("cudnn") is not None


def _frontend() -> Any:
    """Its module, by name: a module of ours is called the same."""
    return importlib.import_module("cudnn")


def rounded(bound: int) -> int:
    """The smallest multiple of an eighth of a power of two, of those below it, that is no less than `bound`."""
    step = max((1 << max(bound - 1, 1).bit_length() - 1) // PARTS, 1)
    return -(-bound // step) * step


@functools.cache
def _handle(device: int, thread: int) -> Any:
    with torch.cuda.device(device):
        return _frontend().create_handle()


class _Builder:
    """A graph in the making."""

    def __init__(self, plan: Plan):
        self.plan, self.cudnn = plan, _frontend()
        cudnn = self.cudnn
        self.graph = cudnn.pygraph(
            io_data_type=cudnn.data_type.BFLOAT16 if plan.dtype == torch.bfloat16 else cudnn.data_type.HALF,
            intermediate_data_type=cudnn.data_type.FLOAT,
            compute_data_type=cudnn.data_type.FLOAT,
            handle=_handle(plan.device, threading.get_ident()),
        )
        self.offsets: dict[tuple[str, int], Any] = {}
        self.tensors = {name: self._numbers(name, plan.num_sequences) for name in ("length_q", "length_k")}
        self.q = self.input("q", plan.stride_q)
        self.k, self.v = self.input("k", plan.stride_k), self.input("v", plan.stride_k)
        self.options = {
            "q": self.q, "k": self.k, "v": self.v, "attn_scale": plan.scale, "use_causal_mask": plan.causal,
            "use_padding_mask": True, "seq_len_q": self.tensors["length_q"], "seq_len_kv": self.tensors["length_k"],
        }  # fmt: skip

    def _numbers(self, name: str, size: int, wide: bool = False):
        dtype = self.cudnn.data_type.INT64 if wide else self.cudnn.data_type.INT32
        return self.graph.tensor(name=name, dim=(size, 1, 1, 1), stride=(1, 1, 1, 1), data_type=dtype)

    def offset(self, tokens: str, stride: int):
        """Where sequences start in a tensor with so many elements from token to token."""
        if (tokens, stride) not in self.offsets:
            name = f"{tokens}_{stride}"
            self.offsets[tokens, stride] = self._numbers(name, self.plan.num_sequences + 1, wide=True)
        return self.offsets[tokens, stride]

    def layout(self, name: str, stride: int) -> dict[str, tuple[int, ...]]:
        """Dimensions and strides of a tensor of queries or of keys; that of the sequences is not used."""
        plan, keys = self.plan, name[-1] in "kv"
        heads, length = (plan.num_kv_heads, plan.max_k) if keys else (plan.num_heads, plan.max_q)
        width = 1 if name == "lse" else plan.head_dim
        return {
            "dim": (plan.num_sequences, heads, length, width),
            "stride": (length * stride, width, stride, 1),
        }

    def input(self, name: str, stride: int, **more):
        tensor = self.graph.tensor(name=name, **self.layout(name, stride), **more)
        tensor.set_ragged_offset(self.offset("k" if name[-1] in "kv" else "q", stride))
        self.tensors[name] = tensor
        return tensor

    def output(self, name: str, tensor, tokens: str) -> None:
        """A contiguous output."""
        plan = self.plan
        heads = plan.num_kv_heads if name[-1] in "kv" else plan.num_heads
        stride = heads * (1 if name == "lse" else plan.head_dim)
        layout = self.layout(name, stride)
        tensor.set_output(True).set_dim(layout["dim"]).set_stride(layout["stride"])
        tensor.set_ragged_offset(self.offset(tokens, stride))
        self.tensors[name] = tensor

    def build(self) -> Graph:
        graph = self.graph
        graph.validate()
        graph.build_operation_graph()
        graph.create_execution_plans([self.cudnn.heur_mode.A])
        graph.check_support()
        graph.build_plans()
        return Graph(graph, self.tensors, self.offsets, graph.get_workspace_size())


@functools.cache
def forward_graph(plan: Plan) -> Graph:
    """The graph of a forward pass."""
    builder = _Builder(plan)
    out, lse = builder.graph.sdpa(**builder.options, generate_stats=True)
    builder.output("out", out, "q")
    builder.output("lse", lse, "q")
    lse.set_data_type(builder.cudnn.data_type.FLOAT)
    return builder.build()


@functools.cache
def backward_graph(plan: Plan) -> Graph:
    """The graph of a backward pass."""
    builder = _Builder(plan)
    out, dout = (builder.input(name, plan.stride_q) for name in ("out", "dout"))
    lse = builder.input("lse", plan.stride_lse, data_type=builder.cudnn.data_type.FLOAT)
    grads = builder.graph.sdpa_backward(
        **builder.options, o=out, dO=dout, stats=lse,
        max_total_seq_len_q=plan.num_rows, max_total_seq_len_kv=plan.num_dk,
        use_deterministic_algorithm=plan.deterministic,
    )  # fmt: skip
    for name, grad in zip(("dq", "dk", "dv"), grads):
        builder.output(name, grad, "q" if name == "dq" else "dk")
    return builder.build()


def _plan(q: Tensor, k: Tensor, lse: Tensor, sequences: Sequences, scale: float, **backward: Any) -> Plan:
    assert q.stride()[1:] == (q.shape[2], 1) or q.shape[1] == 1, q.stride()
    return Plan(
        q.device.index, q.dtype, rounded(sequences.number), q.shape[1], k.shape[1], q.shape[2],
        q.stride(0), k.stride(0), lse.stride(0), sequences.max_q, sequences.max_k, sequences.causal, scale,
        **backward,
    )  # fmt: skip


def _execute(built: Graph, plan: Plan, tensors: dict[str, Tensor], sequences: Sequences) -> None:
    device, count = tensors["q"].device, plan.num_sequences
    given = {built.tensors[name]: tensor for name, tensor in tensors.items()}
    given |= {offset: sequences.offset(*key, count) for key, offset in built.offsets.items()}
    given |= {built.tensors[f"length_{tokens}"]: sequences.length(tokens, count) for tokens in "qk"}
    workspace = torch.empty(built.workspace_bytes, dtype=torch.uint8, device=device)
    handle = _handle(device.index, threading.get_ident())
    _frontend().set_stream(handle=handle, stream=torch.cuda.current_stream(device).cuda_stream)
    built.graph.execute(given, workspace, handle=handle)


def _cudnn_forward(q, k, v, sequences: Sequences, scale):
    out = torch.empty(q.shape, dtype=q.dtype, device=q.device)
    lse = torch.empty(q.shape[:2], dtype=torch.float32, device=q.device)
    plan = _plan(q, k, lse, sequences, scale)
    _execute(forward_graph(plan), plan, {"q": q, "k": k, "v": v, "out": out, "lse": lse}, sequences)
    return out, lse


def _cudnn_backward(dout, q, k, v, out, lse, sequences: Sequences, scale, grads, deterministic):
    # Where strides of inputs and gradients differed, cuDNN 9.19 made wrong gradients and wrote outside of memory.
    assert all(x.is_contiguous() for x in (dout, q, k, v, out, lse, *grads))
    dq, dk, dv = grads
    sizes = {"num_rows": rounded(q.shape[0]), "num_dk": rounded(dk.shape[0]), "deterministic": deterministic}
    plan = _plan(q, k, lse, sequences, scale, **sizes)
    tensors = {"q": q, "k": k, "v": v, "out": out, "dout": dout, "lse": lse, "dq": dq, "dk": dk, "dv": dv}
    _execute(backward_graph(plan), plan, tensors, sequences)


CUDNN_RAGGED = Ragged("cudnn", _cudnn_forward, _cudnn_backward)
