"""Runs the source of the Gluon kernels on a CPU: the language on torch tensors, a thread for each partition.

It shows what the kernels compute and whether their barriers hold, which needs no GPU:
- An mbarrier counts arrivals and bytes and changes phase as one of the hardware does; when all partitions of a program
  wait for phases that nobody can complete, that is a deadlock and fails at once.
- Shared memory is NaN until it is written. A copy by TMA makes its target NaN when it is issued, and brings the data
  when somebody waits for its barrier; a cp.async when its issuer waits for its group. A product of warpgroup_mma reads
  its operands when it is waited for, a store by TMA its source. So who reads too early, or gives a place back too
  early, computes NaN.
- The second consumer lags behind the first, for the producer to get ahead of one of them alone.
- Addresses of loads and stores are checked against their tensors. Programs run in reverse order: what one writes past
  the end of its slots stays there.

It shows nothing of layouts, of the order in which threads of one partition see memory (barriers among threads and
proxy fences do nothing here), or of what compiles.
"""

from __future__ import annotations

import sys
import threading
import time
from pathlib import Path
from types import FunctionType, ModuleType, SimpleNamespace
from unittest.mock import patch

import torch
import triton.experimental

from moba.backends import triton_lists

NAMES = ("gluon_parts", "gluon_forward", "gluon_backward", "gluon_short")
PROGRAMS = 2
"""Of the kernels that walk through work items: few, for each to have several."""
LAG = 2e-3
"""Seconds that the second consumer sleeps at each barrier."""

CHANGED = threading.Condition()
PARTITION = threading.local()


class Program:
    """The partitions of the running program: how many have not ended, and the (barrier, phase) that each waits for."""

    index, grid = (0, 0, 0), (1, 1, 1)
    alive = 0
    waits: dict[int, tuple[Barrier, int]] = {}
    error: BaseException | None = None


class Barrier:
    def __init__(self):
        self.count = self.pending = self.phase = self.bytes = 0
        self.in_flight = []

    def advance(self, arrivals=0, num_bytes=0):
        with CHANGED:
            self.pending -= arrivals
            self.bytes += num_bytes
            assert self.count > 0 and self.pending >= 0, "more arrivals than the barrier counts"
            if self.pending == 0 and self.bytes == 0:
                self.phase ^= 1
                self.pending = self.count
            CHANGED.notify_all()

    def land(self):
        with CHANGED:
            copies, self.in_flight = self.in_flight, []
            for target, value in copies:
                target.copy_(value)
                self.advance(num_bytes=-value.numel() * value.element_size())


def init(barrier, count):
    barrier.count = barrier.pending = count


def expect(barrier, num_bytes):
    barrier.advance(1, num_bytes)


def arrive(barrier, count=1, pred=True):
    if pred:
        barrier.advance(count)


def wait(barrier, phase):
    """Until the phase of that parity is complete."""
    with CHANGED:
        Program.waits[PARTITION.index] = (barrier, int(phase))
        while barrier.phase == int(phase):
            barrier.land()
            if barrier.phase != int(phase):
                break
            stuck = all(b.phase == p and not b.in_flight for b, p in Program.waits.values())
            if Program.error is None and stuck and len(Program.waits) == Program.alive:
                Program.error = RuntimeError("deadlock: all partitions wait")
            if Program.error is not None:
                CHANGED.notify_all()
                raise Program.error
            CHANGED.wait(1.0)
        del Program.waits[PARTITION.index]
    if PARTITION.index == 1:
        time.sleep(LAG)


class Shared:
    """A descriptor of shared memory."""

    def __init__(self, data):
        self.data, self.dtype, self.shape = data, data.dtype, data.shape

    def index(self, i):
        return Shared(self.data[int(i)])

    def slice(self, start, length, dim=0):
        return Shared(self.data.narrow(dim, start, length))

    def permute(self, order):
        return Shared(self.data.permute(*order))

    def load(self, layout):
        return self.data.clone()

    def store(self, value):
        assert value.shape == self.data.shape and value.dtype == self.dtype
        self.data.copy_(value)


class Barriers(list):
    def index(self, i):
        return self[int(i)]


def allocate_shared_memory(dtype, shape, layout):
    if layout == "barrier":
        return Barriers(Barrier() for _ in range(shape[0]))
    return Shared(torch.full(shape, float("nan"), dtype=dtype))


class Pointer:
    """A tensor of addresses in `data`, at offsets."""

    def __init__(self, data, offset=0):
        self.data, self.offset = data, offset
        self.dtype = SimpleNamespace(element_ty=data.dtype)

    def __add__(self, offset):
        return Pointer(self.data, self.offset + offset)

    def checked(self, mask):
        offset, mask = torch.broadcast_tensors(torch.as_tensor(self.offset), torch.as_tensor(mask))
        assert ((offset >= 0) & (offset < self.data.numel()))[mask].all(), "address outside of its tensor"
        return offset, mask


def load(pointer, mask=True, other=0):
    offset, mask = pointer.checked(mask)
    return torch.where(mask, pointer.data[torch.where(mask, offset, 0)], other)


def store(pointer, value, mask):
    offset, mask = pointer.checked(mask)
    pointer.data[offset[mask]] = value.to(pointer.data.dtype)[mask]


def copy_by_tma(descriptor, place, barrier, target):
    row, column = int(place[0]), int(place[1])
    value = torch.zeros(descriptor.shape, dtype=target.dtype)
    part = descriptor.data[row : row + descriptor.shape[0], column : column + descriptor.shape[1]]
    value[: part.shape[0], : part.shape[1]] = part
    target.data.fill_(float("nan"))
    with CHANGED:
        barrier.in_flight.append((target.data, value))
        CHANGED.notify_all()


def store_by_tma(descriptor, place, source):
    PARTITION.stores.append((descriptor, int(place[0]), int(place[1]), source.data))


def wait_stores(number):
    while len(PARTITION.stores) > number:
        descriptor, row, column, source = PARTITION.stores.pop(0)
        assert row >= 0 and column >= 0, "TMA to an address before its tensor"
        part = descriptor.data[row : row + descriptor.shape[0], column : column + descriptor.shape[1]]
        part.copy_(source[: part.shape[0], : part.shape[1]])


def copy_async(target, pointer):
    target.data.fill_(float("nan"))
    PARTITION.copies.append((target.data, load(pointer)))


def commit_group():
    PARTITION.groups.append(PARTITION.copies)
    PARTITION.copies = []


def wait_group(number):
    while len(PARTITION.groups) > number:
        for target, value in PARTITION.groups.pop(0):
            target.copy_(value)


class Product:
    """A product in flight; it has no value before it is waited for."""

    def __init__(self, left, right, start):
        self.left, self.right, self.start, self.value = left, right, start, None

    def finish(self):
        left, right = (x.data if isinstance(x, Shared) else x for x in (self.left, self.right))
        start = self.start.value if isinstance(self.start, Product) else self.start
        self.value = left.float() @ right.float() + start
        assert self.value.shape == start.shape


def warpgroup_mma(left, right, start, use_acc=True, is_async=False):
    assert is_async
    product = Product(left, right, start if use_acc else torch.zeros_like(start))
    PARTITION.products.append(product)
    return product


def warpgroup_mma_wait(number, deps):
    while len(PARTITION.products) > number:
        PARTITION.products.pop(0).finish()
    values = [x.value if isinstance(x, Product) else x for x in deps]
    return values[0] if len(values) == 1 else values


def warp_specialize(partitions, num_warps, num_registers):
    assert len(partitions) == len(num_warps) + 1 == len(num_registers) + 1
    Program.alive, Program.waits = len(partitions), {}

    def run(index, function, arguments):
        PARTITION.index, PARTITION.copies, PARTITION.groups = index, [], []
        PARTITION.products, PARTITION.stores = [], []
        try:
            with torch.no_grad():
                function(*arguments)
            left = (PARTITION.copies, PARTITION.groups, PARTITION.products, PARTITION.stores)
            assert not any(left), "copies, products or stores never waited for"
        except BaseException as error:
            Program.error = Program.error or error
        with CHANGED:
            Program.alive -= 1
            CHANGED.notify_all()

    threads = [threading.Thread(target=run, args=(i, *partition)) for i, partition in enumerate(partitions)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    if Program.error is not None:
        raise Program.error


class Kernel:
    """A function of the language; with a grid, a launch."""

    def __init__(self, function):
        self.function = function

    def __call__(self, *arguments, **constants):
        return self.function(*arguments, **constants)

    def __getitem__(self, grid):
        def launch(*arguments, num_warps, **constants):
            Program.error, Program.grid = None, (*grid, 1, 1)[:3]
            values = [
                Pointer(x.detach().view(-1)) if isinstance(x, torch.Tensor) else
                torch.tensor(x) if isinstance(x, int) else x
                for x in arguments
            ]  # fmt: skip
            for z in reversed(range(Program.grid[2])):
                for y in reversed(range(Program.grid[1])):
                    for x in reversed(range(Program.grid[0])):
                        Program.index = (x, y, z)
                        self.function(*values, **constants)

        return launch


def jit(function=None, do_not_specialize=()):
    if function is None:
        return Kernel
    if "tl" in function.__globals__:  # of Triton, used in Gluon too
        function = FunctionType(function.__code__, {**function.__globals__, "tl": LANGUAGE})
    return Kernel(function)


class Layout:
    def __init__(self, *arguments):
        self.value = self

    get_default_for = staticmethod(lambda *arguments: Layout())


class TensorDescriptor:
    def __init__(self, data, shape, layout):
        self.data, self.shape, self.layout = data.detach(), shape, layout

    from_tensor = classmethod(lambda cls, *arguments: cls(*arguments))


def elementwise(function):
    return lambda a, b: function(torch.as_tensor(a), torch.as_tensor(b))


LANGUAGE = SimpleNamespace(
    constexpr=lambda x: x,
    bfloat16=torch.bfloat16, float16=torch.float16, float32=torch.float32, int64=torch.int64, int32=torch.int32,
    NVMMASharedLayout=Layout, SwizzledSharedLayout=Layout, BlockedLayout=Layout, SliceLayout=Layout,
    NVMMADistributedLayout=Layout, DotOperandLayout=Layout,
    program_id=lambda axis: torch.tensor(Program.index[axis]), num_programs=lambda axis: Program.grid[axis],
    load=load, store=store,
    minimum=elementwise(torch.minimum), maximum=elementwise(torch.maximum),
    where=lambda condition, a, b: torch.where(torch.as_tensor(condition), a, b),
    arange=lambda begin, end, layout=None: torch.arange(begin, end),
    zeros=lambda shape, dtype, layout: torch.zeros(shape, dtype=dtype),
    full=lambda shape, value, dtype, layout: torch.full(shape, value, dtype=dtype),
    max=lambda x, axis: x.max(axis).values, sum=lambda x, axis: x.sum(axis),
    exp2=torch.exp2, log2=torch.log2, convert_layout=lambda x, layout: x,
    barrier=lambda: None, static_range=range, allocate_shared_memory=allocate_shared_memory,
    warp_specialize=warp_specialize,
)  # fmt: skip

HOPPER = {
    "async_copy": SimpleNamespace(
        async_copy_global_to_shared=copy_async, commit_group=commit_group, wait_group=wait_group
    ),
    "mbarrier": SimpleNamespace(MBarrierLayout=lambda: "barrier", init=init, expect=expect, arrive=arrive, wait=wait),
    "tma": SimpleNamespace(
        async_copy_global_to_shared=copy_by_tma, async_copy_shared_to_global=store_by_tma, store_wait=wait_stores
    ),
    "fence_async_shared": lambda: None,
    "warpgroup_mma": warpgroup_mma,
    "warpgroup_mma_wait": warpgroup_mma_wait,
}


def fake_module(name, **contents):
    module = ModuleType(name)
    module.__dict__.update(contents)
    return module


def emulated(edit=lambda name, source: source):
    """The modules of NAMES with the language replaced, by their last name; `edit` may change their source."""
    gluon, folder = "triton.experimental.gluon", Path(triton_lists.__file__).parent
    modules = {
        gluon: fake_module(gluon, jit=jit, language=LANGUAGE),
        f"{gluon}.language.nvidia.hopper": fake_module("hopper", **HOPPER),
        f"{gluon}.nvidia.hopper": fake_module("hopper", TensorDescriptor=TensorDescriptor),
        **{f"moba.backends.{name}": fake_module(f"moba.backends.{name}") for name in NAMES},
    }
    with patch.dict(sys.modules, modules), patch.object(triton.experimental, "gluon", modules[gluon], create=True):
        for name in NAMES:
            source = edit(name, (folder / f"{name}.py").read_text(encoding="utf-8"))
            module = modules[f"moba.backends.{name}"].__dict__
            exec(compile(source, str(folder / f"{name}.py"), "exec"), module)
            module["num_programs"] = lambda num_items, device: min(num_items, PROGRAMS)
    return {name: modules[f"moba.backends.{name}"] for name in NAMES}
