"""Quantities: exact, reversible, and refused with words that help."""

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from conf.numbers import (
    format_count,
    format_length,
    format_memory,
    format_tokens,
    given_length,
    parse_length,
    parse_memory,
    parse_share,
    parse_tokens,
)


@pytest.mark.parametrize(
    "text, value",
    [("32K", 32768), ("1M", 1048576), ("1.5k", 1536), ("2048", 2048), (2048, 2048), (2048.0, 2048), (" 8 K ", 8192)],
)
def test_lengths_are_binary(text, value):
    """Catches K = 1000 for lengths."""
    assert parse_length(text) == value


@pytest.mark.parametrize(
    "text, value",
    [
        ("27B", 27_000_000_000),
        ("1.5B", 1_500_000_000),
        ("10.8b", 10_800_000_000),
        (27e9, 27_000_000_000),
        ("2.7e10", 27_000_000_000),
        ("200_000", 200_000),
        ("200,015,872", 200_015_872),
        ("0.3K", 300),
        ("1T", 10**12),
        (0, 0),
        ("90071992547409931", 90071992547409931),
    ],
)
def test_budgets_are_decimal_and_exact(text, value):
    """Catches K = 1024 for budgets, and a float on the way (the last case is beyond 2**53)."""
    assert parse_tokens(text) == value


@pytest.mark.parametrize(
    "parse, text, words",
    [
        (parse_length, "32Q", ["'Q'", "K, M", "32K"]),
        (parse_length, "27B", ["'B'", "K, M"]),
        (parse_length, "0.3K", ["whole number", "307 or 308"]),
        (parse_length, "long", ["for example", "32K"]),
        (parse_length, True, ["32K"]),
        (parse_length, None, ["32K"]),
        (parse_length, "-2K", ["negative"]),
        (parse_length, float("nan"), ["not a quantity"]),
        (parse_tokens, "1.5", ["whole number", "1 or 2"]),
        (parse_tokens, "90%", ["'%'", "27B"]),
        (parse_tokens, "", ["27B"]),
        (parse_memory, "80 apples", ["80GB"]),
    ],
)
def test_errors_say_what_would_work(parse, text, words):
    """Catches a bare 'invalid literal'."""
    with pytest.raises(ValueError) as error:
        parse(text)
    for word in words:
        assert word in str(error.value)


def test_shares():
    """Catches shares of the wrong total, and rounding that lets shares of 100 % exceed the whole."""
    assert parse_share("90%", 30_000_000_000) == 27_000_000_000
    assert parse_share("27B", 1) == 27_000_000_000
    assert parse_share("0%", 100) == 0
    assert parse_share("0.001%", 10) == 1
    assert sum(parse_share(share, 10) for share in ("33%", "33%", "34%")) <= 10
    assert parse_share("0.1%", 3 * 10**17) == 3 * 10**14
    for wrong in ("101%", "-1%"):
        with pytest.raises(ValueError, match="between 0% and 100%"):
            parse_share(wrong, 10)


@settings(deadline=None, max_examples=200)
@given(st.integers(0, 10**15), st.integers(0, 10**6))
def test_formatting_reads_back_exactly(number, factor):
    """Catches a rounded figure in a message that a user would copy into the command line."""
    for value in (number, factor * 1000, factor * 1024, factor * 10_000_000):
        assert parse_tokens(format_tokens(value)) == value
        assert parse_length(format_length(value)) == value


def test_formatting_is_short():
    """Catches digits where a unit would do."""
    assert format_length(32768) == "32K"
    assert format_length(1048576) == "1M"
    assert format_tokens(27_400_000_000) == "27.4B"
    assert format_tokens(200_015_872) == "200,015,872"
    assert format_count(124_500_000) == "124M"
    assert format_count(999_900) == "1000K"
    assert format_memory(80 * 1024**3) == "80.0 GB"
    assert parse_memory("80GB") == parse_memory("80GiB") == parse_memory("80g") == 80 * 1024**3


@pytest.mark.parametrize("text", ["0", "-1", "1.5", "x", ""])
def test_a_length_that_is_given_is_at_least_one(text):
    """Catches a length of 0, which fails somewhere inside, and a message without the key."""
    with pytest.raises(ValueError, match=f"^seq_len={text}: "):
        given_length({"seq_len": text}, "seq_len")
    assert given_length({"seq_len": "2K"}, "seq_len") == 2048
