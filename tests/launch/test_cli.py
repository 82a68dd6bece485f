"""key=value arguments and the exit of commands."""

import pytest

from conf.words import listed, show
from launch.cli import OF_HELD_OUT, UsageError, exits_on, key_values, result_folder
from train.engine.world import launch_environment

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


def test_messages_stay_short(capsys):
    """Catches a terminal full of one value: 10,000 characters given, or quoted by whoever raises."""

    @exits_on(ValueError)
    def fails(text):
        raise ValueError(text)

    for text in ("x" * 10_000, " ".join(map(str, range(10_000)))):
        with pytest.raises(SystemExit):
            fails(text)
        assert len(capsys.readouterr().err) < 2100
    with pytest.raises(UsageError) as error:
        key_values(["a=" + "y" * 10_000, "a=" + "z" * 10_000, "w" * 10_000], {"a": "", "b": ""})
    assert len(str(error.value)) < 1200
    assert listed(range(25)) == "0, 1, 2, 3, 4, 5, 6, 7, 8, 9 and 15 more" and listed([]) == "none"
    assert len(show({"a": ["b" * 500] * 50})) <= 230 and show([True, None]) == "[true, null]"
    assert show(10**5000) == "a number of 5,001 digits"


def test_messages_name_the_keys_of_the_command(capsys):
    """Catches a mistake in data= that is reported under a run's key, which nobody typed here."""

    @exits_on(KeyError, typed=OF_HELD_OUT)
    def main():
        raise UsageError("path='x': nothing there, nor in text_path='y'. Set eval.seq_len lower, or data.validation")

    with pytest.raises(SystemExit):
        main()
    said = capsys.readouterr().err
    assert said == "error: data='x': nothing there, nor in text_path='y'. Set seq_len= lower, or data=\n"


def test_a_place_for_results_is_made_or_refused_by_its_key(tmp_path):
    """Catches hours of measuring before a file in the way of the results is found."""
    (tmp_path / "file").touch()
    assert result_folder({"to": str(tmp_path / "a" / "b")}, tmp_path).is_dir()
    assert result_folder({}, tmp_path / "c").is_dir()
    with pytest.raises(UsageError, match=r"to=.*/file: cannot be made a directory \(File exists\); choose another"):
        result_folder({"to": str(tmp_path / "file")}, tmp_path)


@pytest.mark.parametrize(
    "given", [{"RANK": "x"}, {"WORLD_SIZE": "0"}, {"RANK": "5", "WORLD_SIZE": "2"}, {"RANK": "-1"}]
)
def test_a_place_that_there_is_not_is_a_line(given, monkeypatch, capsys):
    """Catches tracebacks, and a process that takes itself for the sixth of two, where a scheduler's variables are
    left over."""
    for key, text in given.items():
        monkeypatch.setenv(key, text)
    with pytest.raises(SystemExit) as exited:
        launch_environment()
    ((key, text), *_) = given.items()
    assert exited.value.code == 2 and f"{key}={text}" in capsys.readouterr().err
