"""evals/context.py: which process works on what, and what belongs together."""

import pytest

from evals.context import Context, clusters_by


@pytest.mark.parametrize(("count", "world_size"), [(5, 2), (6, 3), (1, 4), (3, 1)])
def test_processes_share_the_work(count, world_size):
    """Catches work done twice or by nobody, and processes that do not go round equally often, which with sharded
    parameters hang."""
    shares = [
        list(Context(None, "cpu", rank=rank, world_size=world_size).share(count, "x")) for rank in range(world_size)
    ]
    assert sorted(index for share in shares for index, counts in share if counts) == list(range(count))
    assert {len(share) for share in shares} == {-(-count // world_size)}
    assert all(index == 0 for share in shares for index, counts in share if not counts)


@pytest.mark.parametrize(
    ("pattern", "cluster"),
    [(None, "numpy/core.py"), ("[a-z]*", "numpy"), ("([a-z])[a-z]*", "n"), ("core", "numpy/core.py"), ("", "")],
)
def test_clusters(pattern, cluster):
    """Catches a pattern that is searched for in the middle, and a group that is not what counts."""
    assert clusters_by(pattern)("numpy/core.py") == cluster
