"""MoBA (Mixture of Block Attention) as a library: torch alone is needed, kernels are optional.

`from moba import AttentionSpec, moba_attention, full_attention, sliding_attention, route` is the public interface. The
tensor functions are imported when first used, so that code that only plans a run can read AttentionSpec without
importing torch.
"""

import importlib

from moba.spec import AttentionSpec

_LAZY = {
    "moba_attention": "moba.attention",
    "full_attention": "moba.attention",
    "sliding_attention": "moba.attention",
    "route": "moba.routing",
}

__all__ = ["AttentionSpec", "full_attention", "moba_attention", "route", "sliding_attention"]


def __getattr__(name):
    if name not in _LAZY:
        raise AttributeError(f"module 'moba' has no attribute {name!r}")
    return getattr(importlib.import_module(_LAZY[name]), name)
