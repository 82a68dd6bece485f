"""What the commands beside Hydra's share: key=value arguments, --help, and the exit on a user's mistake.

Arguments are split at the first "=" and have no further grammar, because prompts and paths contain commas, quotes and
brackets. A script in launch/ also has to mend sys.path before it imports ours, since Python puts launch/ itself first,
where `train` would be launch/train.py:

    ROOT = Path(__file__).resolve().parents[1]
    sys.path[:] = [str(ROOT)] + [p for p in sys.path if Path(p or ".").resolve() != ROOT / "launch"]
"""

from __future__ import annotations

import difflib
import functools
import re
import sys
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path

from conf.files import user_path
from conf.words import LONGEST_MESSAGE, cut

OF_HELD_OUT = {"path=": "data=", "eval.seq_len": "seq_len=", "data.validation": "data="}
"""Keys of held-out documents in a run -> in the commands that measure."""


class UsageError(Exception):
    """The arguments do not make sense; the text is a complete message."""


def key_values(
    argv: Sequence[str], allowed: Mapping[str, str], *, about: str | None = "", required: Iterable[str] = ()
) -> dict[str, str]:
    """The arguments `key=value` as a dict of strings. allowed: key -> help.

    Prints `about` and the keys and exits 0 on --help or -h. Raises UsageError listing every problem: an unknown key,
    one given twice, one of `required` missing, an argument without "=".
    """
    if "--help" in argv or "-h" in argv:
        print(usage(allowed, about))
        raise SystemExit(0)
    values: dict[str, str] = {}
    problems = []
    for argument in argv:
        key, equals, value = argument.partition("=")
        if not equals:
            problems.append(f"{cut(argument)!r} is not of the form key=value")
        elif key not in allowed:
            near = difflib.get_close_matches(key, allowed, n=1)
            problems.append(f"unknown key {cut(key)!r}" + (f" (do you mean {near[0]!r}?)" if near else ""))
        elif key in values:
            problems.append(f"{key} is given twice: {cut(values[key])!r} and {cut(value)!r}")
        else:
            values[key] = value
    problems += [f"{key}=... is missing" for key in required if key not in values]
    if problems:
        raise UsageError("; ".join(problems) + f". The keys are {', '.join(allowed)} (--help explains them)")
    return values


def split_paths(argv: Sequence[str]) -> tuple[list[Path], list[str]]:
    """(paths, arguments) of a command that takes both. A directory may well be called lr=3e-4, so what exists is a
    path, and an argument only what looks like one and does not."""
    is_path = [not (text.startswith("-") or "=" in text) or user_path(text).exists() for text in argv]
    paths = [user_path(text) for text, own in zip(argv, is_path) if own]
    return paths, [text for text, own in zip(argv, is_path) if not own]


def usage(allowed: Mapping[str, str], about: str | None) -> str:
    """The text of --help."""
    width = max(map(len, allowed)) + 2
    lines = [f"  {key + '=':<{width}}{text}" for key, text in allowed.items()]
    return "\n".join([about.strip(), "", "arguments, as key=value:", *lines] if about else lines)


def result_folder(values: Mapping[str, str], default: Path) -> Path:
    """The directory that to= names, or the default, made if it is not there; UsageError where that cannot be. Called
    before the work, which it would be a pity to lose."""
    folder = user_path(values["to"]) if "to" in values else default
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise UsageError(f"to={cut(folder)}: cannot be made a directory ({error.strerror}); choose another") from None
    return folder


def exits_on(
    *errors: type[Exception], speaks: Callable[[], bool] = lambda: True, typed: Mapping[str, str] | None = None
) -> Callable:
    """Decorator for a command's main(): UsageError and these errors become one message on stderr and exit code 2,
    Ctrl-C 130. `speaks`: whether this process prints it (one of several does). `typed`: keys of a run -> what the user
    of this command typed in their place, in messages."""

    def decorate(main: Callable) -> Callable:
        @functools.wraps(main)
        def wrapped(*args, **kwargs):
            try:
                return main(*args, **kwargs)
            except (UsageError, *errors) as error:
                if speaks():
                    text = str(error)
                    for key, own in (typed or {}).items():
                        text = re.sub(rf"(?<![\w.]){re.escape(key)}", own, text)
                    text = text if len(text) <= LONGEST_MESSAGE else f"{text[:LONGEST_MESSAGE]}..."
                    print(f"error: {text}", file=sys.stderr)
                raise SystemExit(2) from None
            except KeyboardInterrupt:
                print("interrupted", file=sys.stderr)
                raise SystemExit(130) from None

        return wrapped

    return decorate
