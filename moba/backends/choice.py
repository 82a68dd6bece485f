"""Which backend computes a kind of attention: the one that was named, or the fastest that does not refuse.

Imports no torch: the same table decides at run time and is printed with a plan.
"""

from __future__ import annotations

import functools
import logging
from typing import TYPE_CHECKING, NamedTuple

from moba.backends.refusals import BackendUnavailable

if TYPE_CHECKING:
    from moba.documents import Documents
    from moba.kinds.base import AttentionSpec, QueryShape

logger = logging.getLogger(__name__.split(".")[0])


class Choice(NamedTuple):
    """The backend that will run, and why no faster one, or not the one that was named."""

    backend: str
    reasons: tuple[str, ...] = ()

    def __str__(self) -> str:
        return f"{self.backend} ({'; '.join(self.reasons)})" if self.reasons else self.backend


def choose(kind: AttentionSpec, q: QueryShape, documents: Documents | None) -> Choice:
    """The choice for these tensors and documents (None: packs of whole documents, to be planned).

    Raises BackendUnavailable if the backend that was named refuses, or every one does. One that a kind does not have
    at all stands for "auto".
    """
    known = {backend.name: backend for backend in kind.backends}
    if kind.backend in known:
        problem = known[kind.backend].refuses(kind, q, documents)
        if problem is not None:
            raise BackendUnavailable(problem)
        return Choice(kind.backend)
    named = kind.backend != "auto"
    reasons = [f"not {kind.backend!r} (there is no kernel of {kind.name} attention)"] if named else []
    for backend in kind.backends:
        considered = backend.device in (None, q.device) and (backend.pays is None or backend.pays(q, documents))
        if considered:
            problem = backend.refuses(kind, q, documents)
            if problem is None:
                return Choice(backend.name, tuple(reasons))
            reasons.append(f"not {backend.name!r} ({problem})")
    raise BackendUnavailable("; ".join(reasons))


@functools.cache
def log_choice(name: str, choice: Choice) -> None:
    """Says once which backend a kind runs on; a warning where a faster one, or the one that was named, could not."""
    if choice.reasons:
        logger.warning("%s attention runs on backend %r: %s", name, choice.backend, "; ".join(choice.reasons))
    else:
        logger.info("%s attention runs on backend %r", name, choice.backend)
