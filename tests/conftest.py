"""Chooses Triton's interpreter where there is no GPU, before any test module imports Triton.

Triton decides when a kernel is decorated, its own library included, so the choice has to come first.
"""

import os

import torch

if not torch.cuda.is_available():
    os.environ.setdefault("TRITON_INTERPRET", "1")
