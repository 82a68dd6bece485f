"""Imported once by the server that test runs are forked from: all that a run imports; one thread, no network."""

import os

os.environ |= {"OMP_NUM_THREADS": "1", "DS_ACCELERATOR": "cpu", "MPLBACKEND": "agg", "HF_HUB_OFFLINE": "1"}
os.environ["CUDA_VISIBLE_DEVICES"] = ""  # bits are compared, and a GPU cannot be shared with a fork

import datasets  # noqa: F401
import deepspeed.runtime.zero.muon.muon_optimizer  # noqa: F401 - imports torch's compiler, which takes seconds
import pytest  # noqa: F401 - every fork imports the main module of the process that asked for it
import torch

import launch.train  # noqa: F401

torch.use_deterministic_algorithms(False)  # imports more of the compiler
