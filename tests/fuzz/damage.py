"""What happens to files and settings that people hand in: strategies for damage, and what an error has to look like."""

from __future__ import annotations

import copy
import json
from collections.abc import Callable, Sequence
from typing import Any

from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

LONGEST = 2500
DEEP = "[" * 50_000

scalars = st.one_of(
    st.none(),
    st.booleans(),
    st.integers(-(2**70), 2**70),
    st.sampled_from([0, -1, 10**30, 10**400, 1e308, -1e308, 1e-320]),
    st.floats(allow_nan=True, allow_infinity=True),
    st.text(max_size=20),
    st.sampled_from(
        ["../../etc/passwd", "/dev/null", "~nobody/x", "9" * 5000, "a\0b", "\ud800", "null", "1e999999999"]
    ),
)
values = st.recursive(
    scalars, lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=8), inner, max_size=3)
)


def quick(examples: int):
    """Settings of the version for every commit: the same examples each time, no deadline."""
    return settings(
        max_examples=examples,
        deadline=None,
        derandomize=True,
        database=None,
        suppress_health_check=list(HealthCheck),
    )


def thorough(examples: int):
    """Settings of the version for a release: other examples each time."""
    return settings(max_examples=examples, deadline=None, suppress_health_check=list(HealthCheck))


def places(value: Any, at: tuple = ()) -> list[tuple]:
    """The path of every node of nested dictionaries and lists."""
    found = [at]
    items = value.items() if isinstance(value, dict) else enumerate(value) if isinstance(value, list) else ()
    for key, inner in items:
        found += places(inner, (*at, key))
    return found


def put(value: Any, at: tuple, new: Any) -> Any:
    """`value` with the node at a path replaced."""
    if not at:
        return new
    changed = copy.copy(value)
    changed[at[0]] = put(value[at[0]], at[1:], new)
    return changed


def without(value: Any, at: tuple) -> Any:
    """`value` without the node at a path of one step or more."""
    changed = copy.deepcopy(value)
    inner = changed
    for key in at[:-1]:
        inner = inner[key]
    del inner[at[-1]]
    return changed


@st.composite
def other_json(draw, valid: Any) -> str:
    """JSON text like that of `valid`, with one to three nodes replaced by something else or gone."""
    changed = valid
    for _ in range(draw(st.integers(1, 3))):
        at = draw(st.sampled_from(places(changed)))
        if at and draw(st.booleans()):
            changed = without(changed, at)
        else:
            changed = put(changed, at, draw(values))
    return json.dumps(changed)


@st.composite
def other_bytes(draw, valid: bytes) -> bytes:
    """Bytes cut, flipped, doubled, emptied or of another kind of file."""
    how = draw(st.sampled_from(["cut", "flip", "insert", "random", "empty", "other"]))
    if how == "cut":
        return valid[: draw(st.integers(0, max(len(valid) - 1, 0)))]
    if how == "flip" and valid:
        place, bit = draw(st.integers(0, len(valid) - 1)), draw(st.integers(0, 7))
        return valid[:place] + bytes([valid[place] ^ 1 << bit]) + valid[place + 1 :]
    if how == "insert":
        place = draw(st.integers(0, len(valid)))
        return valid[:place] + draw(st.binary(min_size=1, max_size=20)) + valid[place:]
    if how == "random":
        return draw(st.binary(max_size=200))
    if how == "other":
        return draw(st.sampled_from([DEEP.encode(), b"PK\x03\x04rest", b"\x89PNG\r\n", b"<html></html>", b"\xff\xfe"]))
    return b""


def half_valid(valid: bytes, as_json: Any = None) -> list:
    """Two strategies for (bytes, whether they are the valid ones): valid, and of another shape or of other bytes."""
    shaped = other_bytes(valid) if as_json is None else other_json(as_json).map(lambda text: text.encode("utf-8"))
    numbered = st.integers(0, 2**32).map(lambda _: (valid, True))  # lest repetitions be left out
    return [numbered, st.one_of(shaped, other_bytes(valid)).map(lambda content: (content, content == valid))]


def in_equal_parts(how: settings, strategies: Sequence, check: Callable[[Any], None]) -> None:
    """Checks as many examples of each strategy: which of them hypothesis would choose, and so the share of valid ones,
    depends on what else was imported."""
    for strategy in strategies:
        settings(how, max_examples=how.max_examples // len(strategies))(given(strategy)(check))()


def assert_one_line(error: BaseException, *words: str) -> None:
    """A message that a user can read: one line, bounded, with these words."""
    text = str(error)
    assert text.strip() and "\n" not in text.strip() and len(text) <= LONGEST, repr(text[:3000])
    assert all(word in text for word in words), (words, text)
