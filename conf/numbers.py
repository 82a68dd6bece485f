"""Quantities as people write them ("32K", "1.5B", "90%") turned into exact integers, and back.

Two readings of the same letters, so every function says which it uses: lengths and block sizes are binary (K = 1024),
token budgets and cadences are decimal (K = 1000), memory is binary. All arithmetic is exact; a quantity that isn't a
whole number is an error, never rounded.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from fractions import Fraction

from conf.words import cut

LENGTH_UNITS = {"": 1, "K": 1024, "M": 1024**2}
TOKEN_UNITS = {"": 1, "K": 1000, "M": 1000**2, "B": 1000**3, "T": 1000**4}
MEMORY_UNITS = {"": 1, "K": 1024, "M": 1024**2, "G": 1024**3, "T": 1024**4}

_NUMBER = re.compile(r"([+-]?(?:\d[\d_,]*\.?\d*|\.\d+)(?:[eE][+-]?\d{1,3})?)\s*([A-Za-z%]*)")
LONGEST = 64  # characters of a quantity
LARGEST = 2**63 - 1


def _split(text: object, example: str) -> tuple[Fraction, str]:
    """The exact number and the unit in `text` (upper case); ValueError with an example of what would be read."""
    if isinstance(text, bool) or not isinstance(text, int | float | str):
        raise ValueError(f"expected a quantity such as {example}")
    if isinstance(text, int) and abs(text) > LARGEST:
        raise ValueError(f"does not fit 64 bits; write for example {example}")
    text = str(text).strip()
    match = _NUMBER.fullmatch(text) if len(text) <= LONGEST and text.isascii() else None
    if match is None:
        raise ValueError(f"not a quantity; write for example {example}")
    return Fraction(match[1].replace("_", "").replace(",", "")), match[2].upper()


def _scaled(text: object, units: dict[str, int], example: str) -> int:
    number, unit = _split(text, example)
    if unit not in units:
        known = ", ".join(name for name in units if name)
        raise ValueError(f"unknown unit {unit!r}; this quantity takes {known} or none, for example {example}")
    value = number * units[unit]
    if value.denominator != 1 and abs(value) <= LARGEST:
        below = value.numerator // value.denominator
        raise ValueError(f"is not a whole number; write {below} or {below + 1}")
    if value < 0:
        raise ValueError(f"is negative; write for example {example}")
    if value > LARGEST:
        raise ValueError(f"does not fit 64 bits; write for example {example}")
    return int(value)


def parse_length(text: object) -> int:
    """Tokens of a sequence, block or batch: K = 1024, M = 1024**2. "32K" is 32768; ValueError if unreadable."""
    return _scaled(text, LENGTH_UNITS, '"32K" (= 32768)')


def given_length(values: Mapping[str, str], key: str) -> int:
    """The length of at least 1 that `key` has; ValueError with the key."""
    try:
        length = parse_length(values[key])
    except ValueError as error:
        raise ValueError(f"{key}={cut(values[key])}: {error}") from None
    if length < 1:
        raise ValueError(f"{key}={values[key]}: must be at least 1")
    return length


def parse_tokens(text: object) -> int:
    """Tokens of a budget or cadence: K = 1000, M, B, T likewise. "1.5B" is 1500000000; ValueError if unreadable."""
    return _scaled(text, TOKEN_UNITS, '"27B" (= 27000000000)')


def parse_memory(text: object) -> int:
    """Bytes of memory, binary: "80GB", "80GiB" and "80G" are 80 * 1024**3; ValueError if unreadable."""
    if isinstance(text, str):
        text = re.sub(r"(?<=[KMGTkmgt])i?[bB]$", "", text.strip())
    return _scaled(text, MEMORY_UNITS, '"80GB"')


def is_share(text: object) -> bool:
    """True for a percentage such as "90%"."""
    return isinstance(text, str) and text.strip().endswith("%")


def parse_share(text: object, total: int) -> int:
    """Tokens written as a budget ("27B") or as a share of `total` ("90%"), decimal K; ValueError if unreadable.

    A share is rounded down (shares that sum to 100 % never exceed the total), but to no less than 1 unless it is 0 %.
    """
    if not is_share(text):
        return parse_tokens(text)
    number, _ = _split(text, '"90%" or "27B"')
    if not 0 <= number <= 100:
        raise ValueError("a share lies between 0% and 100%")
    share = number * total / 100
    return max(1, int(share)) if share else 0


def format_length(value: int) -> str:
    """A length as parse_length reads it: 32768 is "32K", 1000 is "1,000"."""
    for unit in ("M", "K"):
        if value and value % LENGTH_UNITS[unit] == 0:
            return f"{value // LENGTH_UNITS[unit]}{unit}"
    return f"{value:,}"


def format_tokens(value: int) -> str:
    """A budget as parse_tokens reads it: 1500000000 is "1.5B", 200015872 is "200,015,872"."""
    for unit in ("T", "B", "M", "K"):
        hundredths, rest = divmod(value * 100, TOKEN_UNITS[unit])
        if hundredths >= 100:
            whole = f"{hundredths / 100:.2f}".rstrip("0").rstrip(".") + unit
            return whole if rest == 0 else f"{value:,}"
    return f"{value:,}"


def format_memory(value: float) -> str:
    """Bytes for reading, rounded: "61.3 GB" (binary, as parse_memory), "12 MB" below one."""
    if value >= MEMORY_UNITS["G"]:
        return f"{value / MEMORY_UNITS['G']:.1f} GB"
    return f"{value / MEMORY_UNITS['M']:.0f} MB"


def format_count(value: float) -> str:
    """A count for reading, rounded to three digits: "1.53B", "125M", "840"."""
    for unit, size in (("T", 1e12), ("B", 1e9), ("M", 1e6), ("K", 1e3)):
        if value >= size:
            return f"{value / size:.3g}{unit}" if value < 999.5 * size else f"{value / size:.0f}{unit}"
    return f"{value:.0f}"
