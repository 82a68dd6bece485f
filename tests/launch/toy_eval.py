"""An eval in one file: how often the likeliest token is the right one. One line of evals/table.py is all it needs."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch

from evals.page import table
from evals.protocol import Eval, Job, Result


@torch.no_grad()
def run(job: Job) -> Result:
    """The share of right guesses over all held-out documents, their first `skip` tokens left out."""
    context, documents, skip = job.context, job.held_out(), job.integer("skip", 1)
    sums = torch.zeros(2, dtype=torch.int64, device=context.device)
    for index, counts in context.share(len(documents), "guesses"):
        batch = documents[index][1].to(context.device)
        scores = context.model.logits(batch.tokens, batch.positions, batch.documents)
        if counts:
            right = (scores.argmax(-1) == batch.labels)[skip:]
            sums += torch.stack([right.sum(), torch.tensor(len(right), device=right.device)])
    right, count = context.reduce(sums).tolist()
    return Result(
        length=job.seq_len,
        record={"skip": skip, "right": right, "tokens_scored": count},
        text=f"right {right / count:.3f} of {count} tokens",
        numbers={"right": right / count},
    )


def page(record: Mapping[str, Any], path: Path) -> str:
    """One row."""
    return table(("right", "of"), [(str(record["right"]), str(record["tokens_scored"]))])


EVAL = Eval(
    name="guesses",
    about="how often the likeliest token is the right one.",
    run=run,
    keys={"skip": "tokens at the start that are left out (default 1)", "style": "plain or fancy"},
    choices={"style": ("plain", "fancy")},
    heading="Guesses",
    page=page,
)
