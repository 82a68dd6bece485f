"""benchmarks/longest_context.py: what a case asks for, and what stands in its row."""

import pytest

from benchmarks.longest_context import HEADS, Case, _cells
from launch.cli import UsageError


def test_a_case_says_its_steps_its_seconds_and_its_batch():
    """Catches a batch that a shared sequence gets by other means than data parallelism does, so that two ways to use
    two GPUs are compared over different batches, and what is a case's own and goes to its run as an override."""
    ways = [Case.parse(f"tiny/1K/{how}/batch=2K/limit=9", 3, 200) for how in ("1", "2", "2/parallel.sequence=2")]
    assert [way.batch_tokens(1024) for way in ways] == [2048] * 3
    assert [(way.steps, way.limit) for way in ways] == [(3, 9)] * 3
    assert [way.overrides for way in ways] == [(), (), ("parallel.sequence=2",)]
    assert len({way.name for way in ways}) == 3
    alone = [Case.parse(f"tiny/1K/{how}/steps=5", 3, 200) for how in ("1", "2", "2/parallel.sequence=2")]
    assert [way.batch_tokens(1024) for way in alone] == [1024, 2048, 1024]
    assert [(way.steps, way.limit) for way in alone] == [(5, 200)] * 3
    with pytest.raises(UsageError, match="paper_1_5b/128K/1"):
        Case.parse("tiny/1K", 3, 200)


def test_a_row_says_how_many_sequences_a_step_had():
    """Catches a failed case whose columns are shifted, and a count of tokens that stands for one of sequences."""
    row = {
        "model": "tiny",
        "seq_len": 1024,
        "batch_tokens": 2048,
        "num_gpus": 2,
        "overrides": ["a.b=c"],
        "failed": "no",
    }
    cells = dict(zip(HEADS, _cells(row), strict=True))
    assert (cells["context"], cells["sequences per step"], cells["with"], cells["tokens/s"]) == (
        "1K",
        "2",
        "a.b=c",
        "no",
    )
