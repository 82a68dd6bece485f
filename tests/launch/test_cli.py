"""key=value arguments and the exit of commands."""

import pytest

from launch.cli import UsageError, exits_on, key_values

ALLOWED = {"prompt": "what to say", "to": "where"}


def test_values_are_taken_literally():
    """Catches any grammar: prompts contain commas, quotes, brackets and equals signs."""
    prompt = "a=b, 'c' [d] ${e} \\"
    assert key_values([f"prompt={prompt}", "to="], ALLOWED) == {"prompt": prompt, "to": ""}


def test_all_problems_at_once():
    """Catches a message that shows only the first mistake."""
    with pytest.raises(UsageError) as raised:
        key_values(["promt=x", "loose", "to=a", "to=b"], ALLOWED, required=("prompt",))
    for named in (
        "'promt' (do you mean 'prompt'?)",
        "'loose' is not of the form",
        "to is given twice",
        "prompt=... is",
    ):
        assert named in str(raised.value)


def test_help_explains_every_key(capsys):
    """Catches a key that --help leaves out."""
    with pytest.raises(SystemExit) as exited:
        key_values(["to=x", "--help"], ALLOWED, about="Does things.")
    shown = capsys.readouterr().out
    assert not exited.value.code and all(text in shown for text in ("Does things.", "prompt=", "what to say", "to="))


@pytest.mark.parametrize(("error", "code"), [(KeyError("k"), 2), (UsageError("k"), 2), (KeyboardInterrupt(), 130)])
def test_exit_codes(error, code, capsys):
    """Catches tracebacks for the errors that were named."""

    @exits_on(KeyError)
    def main():
        raise error

    with pytest.raises(SystemExit) as exited:
        main()
    assert exited.value.code == code and capsys.readouterr().err.count("\n") == 1


def test_programmer_errors_keep_their_traceback():
    """Catches a decorator that hides bugs."""

    @exits_on(KeyError)
    def main():
        raise IndexError

    with pytest.raises(IndexError):
        main()
