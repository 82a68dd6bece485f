"""Settings that libraries read when they are imported: Triton's interpreter where there is no GPU, and OpenMP threads
that do not spin while they wait.

Triton decides when a kernel is decorated, its own library included, so the choice has to come first.
"""

import os

os.environ.setdefault("OMP_WAIT_POLICY", "passive")

import torch

if not torch.cuda.is_available():
    os.environ.setdefault("TRITON_INTERPRET", "1")
