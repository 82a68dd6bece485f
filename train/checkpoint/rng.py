"""The random state of a process (torch, CUDA, numpy, python) as tensors, for checkpoints without pickles."""

from __future__ import annotations

import random
from pathlib import Path

import numpy as np
import torch
from safetensors.torch import load_file
from torch import distributed as dist


def random_state() -> dict[str, torch.Tensor]:
    """Returns the state of this process's generators, for `restore`."""
    legacy = np.random.get_state()
    assert isinstance(legacy, tuple)
    _, keys, position, has_gauss, gauss = legacy
    version, words, gauss_next = random.getstate()
    state = {
        "torch": torch.get_rng_state(),
        "numpy_keys": torch.from_numpy(keys.astype(np.int64)),
        "numpy_rest": torch.tensor([position, has_gauss, gauss], dtype=torch.float64),
        "python_words": torch.tensor([version, *words], dtype=torch.int64),
        "python_gauss": torch.tensor([] if gauss_next is None else [gauss_next], dtype=torch.float64),
    }
    if torch.cuda.is_available():
        state["cuda"] = torch.cuda.get_rng_state()
    return state


def restore(state: dict[str, torch.Tensor]) -> None:
    """Restores this process's generators to what `random_state` returned."""
    torch.set_rng_state(state["torch"])
    if "cuda" in state and torch.cuda.is_available():
        torch.cuda.set_rng_state(state["cuda"])
    position, has_gauss, gauss = state["numpy_rest"].tolist()
    keys = state["numpy_keys"].numpy().astype(np.uint32)
    np.random.set_state(("MT19937", keys, int(position), int(has_gauss), gauss))
    version, *words = state["python_words"].tolist()
    random.setstate((version, tuple(words), next(iter(state["python_gauss"].tolist()), None)))


def file_name(rank: int) -> str:
    """Returns the name of a rank's file in a checkpoint."""
    return f"rng-rank{rank:05d}.safetensors"


def load_rng(checkpoint: Path, *, seed: int) -> None:
    """Restores this rank's generators; a rank that the checkpoint has no file for is seeded from (seed, rank)."""
    path = checkpoint / file_name(dist.get_rank())
    if path.exists():
        restore(load_file(path))
    else:
        seed_rank(seed)


def seed_rank(seed: int) -> None:
    """Seeds this process's generators from (seed, rank): every rank differently, every process of a rank alike."""
    words = np.random.SeedSequence([seed, dist.get_rank()]).generate_state(3)
    torch.manual_seed(int(words[0]))
    np.random.seed(words[1])
    random.seed(int(words[2]))
