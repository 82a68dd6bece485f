"""Runs a generator of NVIDIA's package (extra `ruler`) with one of our tokenizers: the process behind
evals/ruler_data.py.

The package's files run unmodified. In this process, its tokenizer loading is replaced, as it supports neither bytes nor
a tokenizer.json; and where nltk's punkt_tab is not installed, sentences are split by Punkt without the English model. A
generator whose task does not fit a length loops for ever: it is ended as soon as that is clear.
"""

from __future__ import annotations

import os
import re
import runpy
import sys
from collections.abc import Iterable, Iterator
from pathlib import Path
from types import ModuleType

from data.tokenizer import load_tokenizer

TOO_SHORT = 3
"""Exit status: the task does not fit the length."""
MOST_TRIES = 1000
"""Texts tried for one sample; a generator that can still shorten them needs fewer."""
SIZES = r"(?:Num haystack|Num noises|num_words|Number of documents): (-?[0-9]+)$"
"""What the generators print about the amount of text that fits."""


class Counter:
    """Stands in for the package's tokenizer: it only counts tokens. `samples` stands in for its progress bar."""

    def __init__(self, name: str):
        self._tokenizer, self._tries = load_tokenizer(name), -(10**9)

    def text_to_tokens(self, text: str) -> list[int]:
        """The tokens of a text."""
        self._tries += 1
        if self._tries > MOST_TRIES:
            os._exit(TOO_SHORT)  # the generators catch every exception
        return self._tokenizer.encode(text).tolist()

    def samples(self, numbers: Iterable[int]) -> Iterator[int]:
        """Yields the sample numbers; each resets the count of tries."""
        for number in numbers:
            self._tries = 0
            yield number


class Watch:
    """Replaces the generators' standard output, and ends the process where no text fits, since they would never end."""

    def __init__(self) -> None:
        self._line = ""

    def write(self, text: str) -> int:
        """Checks the output, and prints nothing."""
        self._line += text
        *lines, self._line = self._line.split("\n")
        if any((size := re.match(SIZES, line)) and int(size[1]) <= 0 for line in lines):
            os._exit(TOO_SHORT)
        return len(text)

    def flush(self) -> None:
        """Does nothing."""


def splits_exactly() -> bool:
    """Whether nltk finds the English Punkt model, with which NVIDIA splits essays into sentences."""
    try:
        import nltk  # pyright: ignore[reportMissingImports]  # optional

        nltk.data.find("tokenizers/punkt_tab/english/")
    except (ImportError, LookupError):
        return False
    return True


def main(tokenizer: str, script: str, *arguments: str) -> None:
    """Runs the script as if it had been started with these arguments, and those of the tokenizer (data.tokenizer)."""
    counter, module, bars = Counter(tokenizer), ModuleType("tokenizer"), ModuleType("tqdm")
    vars(module)["select_tokenizer"] = lambda kind, path: counter
    vars(bars)["tqdm"] = counter.samples
    sys.modules |= {"tokenizer": module, "long_context_eval.data.tokenizer": module, "tqdm": bars}
    if not splits_exactly():
        from nltk import tokenize  # pyright: ignore[reportMissingImports]  # optional
        from nltk.tokenize.punkt import PunktSentenceTokenizer  # pyright: ignore[reportMissingImports]  # optional

        tokenize.sent_tokenize = PunktSentenceTokenizer().tokenize
    sys.argv = [script, *arguments, "--tokenizer_path", tokenizer, "--tokenizer_type", "hf"]
    sys.path.insert(0, str(Path(script).parent))
    sys.stdout = Watch()
    runpy.run_path(script, run_name="__main__")
