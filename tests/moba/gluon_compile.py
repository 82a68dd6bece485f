"""Compiles the Gluon kernels for Hopper, without a GPU, and prints of each: bytes of shared memory, arrivals at
barriers in shared memory, and how many of them come too early. A program of its own, since Triton's interpreter must be
off."""

import multiprocessing
import re

import torch
from triton.backends.compiler import GPUTarget
from triton.runtime import driver

from moba.backends import gluon_backward, gluon_forward, gluon_short
from moba.backends.triton_lists import Items, Lists


class Hopper:
    """A driver that knows its target and nothing else."""

    get_current_target = staticmethod(lambda: GPUTarget("cuda", 90, 32))
    get_current_device = staticmethod(lambda: 0)
    get_current_stream = staticmethod(lambda device=None: 0)
    get_active_torch_device = staticmethod(lambda: torch.device("cpu"))


class Compiled:
    """In place of a kernel: a launch compiles it."""

    def __init__(self, kernel):
        self.kernel = kernel

    def __getitem__(self, grid):
        return lambda *arguments, **constants: self.compile(grid, arguments, constants)

    def compile(self, grid, arguments, constants):
        compiled = self.kernel.run(*arguments, grid=grid, warmup=True, **constants)
        print("compiled", compiled.metadata.shared, *arrivals(compiled.asm["ptx"]), flush=True)


def arrivals(ptx):
    """How often one thread gives its group's word to a barrier in shared memory, and how often without a barrier of the
    group's threads since one of them used shared memory: then others may still be at it."""
    number, early, waits_for_all = 0, 0, True
    for line in ptx.splitlines():
        if re.search(r"wgmma\.mma_async|(ld|st|cp\.async)[.a-z]*\.shared|stmatrix|ldmatrix", line):
            waits_for_all = False
        elif re.search(r"\bbar(rier)?\.sync", line):
            waits_for_all = True
        elif "mbarrier.arrive.shared" in line:
            number, early = number + 1, early + (not waits_for_all)
    return number, early


def compile_kernel(name):
    q, k = (torch.zeros(256, heads, 128, dtype=torch.bfloat16) for heads in (8, 2))
    numbers = torch.zeros(64, dtype=torch.int32)
    stats, sums = torch.zeros(64, dtype=torch.int64), torch.zeros(64)
    lists, items = Lists(1001, 5, *[numbers] * 6), Items(128, 7, 3, *[numbers] * 3)
    if name == "gluon_forward_kernel":
        gluon_forward.forward_long(q, k, k, lists, items, q, sums, 0, 2, 0.1)
    elif name == "gluon_q_kernel":
        gluon_backward.backward_q(q, k, k, q, stats, lists, items, q, 0, 2, 0.1)
    elif name == "gluon_short_backward_kernel":
        gluon_short.backward_short(
            q, k, k, q, stats, lists, items, q, k, k, sums, 0, (7, 2, 1), 1, 128, 0.1, 0.1
        )  # fmt: skip
    else:
        gluon_backward.backward_kv(q, k, k, q, stats, lists, items, k, k, sums, 0, 2, 512, 0.1, 0.1)


if __name__ == "__main__":
    driver.set_active(Hopper())
    kernels = {
        "gluon_forward_kernel": gluon_forward,
        "gluon_q_kernel": gluon_backward,
        "gluon_kv_kernel": gluon_backward,
        "gluon_short_backward_kernel": gluon_short,
    }
    for kernel, module in kernels.items():
        setattr(module, kernel, Compiled(getattr(module, kernel)))
        module.num_programs = lambda num_items, device: 132
    with multiprocessing.get_context("fork").Pool(2) as pool:
        pool.map(compile_kernel, kernels)
