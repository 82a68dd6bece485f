"""MoBA (Mixture of Block Attention) as a library: torch alone is needed, kernels are optional.

`from moba import Moba, moba_attention, full_attention, sliding_attention, route` is the public interface. The tensor
functions are imported when first used, so that code that only plans a run can read the kinds of attention without
importing torch.
"""

import importlib
from typing import TYPE_CHECKING

from moba.kinds import AttentionSpec, Full, Moba, Sliding

if TYPE_CHECKING:
    from moba.attention import attend, full_attention, moba_attention, sliding_attention
    from moba.documents import Documents
    from moba.routing import route

_LAZY = {
    "attend": "moba.attention",
    "moba_attention": "moba.attention",
    "full_attention": "moba.attention",
    "sliding_attention": "moba.attention",
    "Documents": "moba.documents",
    "route": "moba.routing",
}

__all__ = [
    "AttentionSpec",
    "Documents",
    "Full",
    "Moba",
    "Sliding",
    "attend",
    "full_attention",
    "moba_attention",
    "route",
    "sliding_attention",
]


def __getattr__(name):
    if name not in _LAZY:
        raise AttributeError(f"module 'moba' has no attribute {name!r}")
    return getattr(importlib.import_module(_LAZY[name]), name)
