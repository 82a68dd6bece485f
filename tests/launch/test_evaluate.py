"""launch/evaluate.py: in several processes on a run of the real command, its arguments, and evals from outside."""

import json
import re
import shutil
import time
from dataclasses import replace
from importlib.util import find_spec

import pytest
import toy_eval
from launch_runs import END, ROOT

from evals.table import EVALS, NAMES
from launch.evaluate import keys, main
from launch.report import main as report

SCRIPT = ROOT / "launch" / "evaluate.py"


def test_two_processes_give_the_bits_of_one(launcher, whole, house, tmp_path):
    """Catches documents that are counted twice or not at all, sums that depend on who adds what, and a command that
    does not run under torchrun: 3 documents, the other cohort, other buckets and clusters, 1 and 2 processes."""
    arguments = [f"run={whole}", "device=cpu", "documents=3", "cohort=available", "seq_len=256", "bucket=64"]
    arguments += ["cluster=.", "attention=16x2"]
    one = launcher.run([*arguments, f"to={tmp_path / 'one'}"], script=SCRIPT)
    two = launcher.run_ranks([*arguments, f"to={tmp_path / 'two'}"], 2, script=SCRIPT)
    assert [ended.code for ended in (one, *two)] == [0, 0, 0], (one, *two)
    assert "wrote" in two[0].out and two[1].out == ""
    name = f"position_loss_{END:015d}_256_16x2_available"
    assert (tmp_path / "one" / f"{name}.npz").read_bytes() == (tmp_path / "two" / f"{name}.npz").read_bytes()
    records = [json.loads((tmp_path / folder / f"{name}.json").read_text()) for folder in ("one", "two")]
    assert [record["num_processes"] for record in records] == [1, 2] and records[0]["mean"] == records[1]["mean"]
    for record in records:
        assert record["dense_up_to"] == 32 and record["config"]["eval"]["documents"] == 3 and record["device"] == "cpu"
        assert record["num_documents"] == 3 and record["edges"] == [0, 64, 128, 192, 256]
        # Ids are file names, of which any two begin differently or alike; the bits would differ with another grouping.
        assert record["num_clusters"] == len({document["id"][0] for document in record["documents"]})
    refused = launcher.run_ranks([f"run={tmp_path}"], 2, script=SCRIPT)
    assert refused[0].code == 2 and refused[0].err.count("error: ") == 1 and "error: " not in refused[1].err


@pytest.fixture
def toy(monkeypatch) -> None:
    """An eval from outside: one file, and a line of the table."""
    monkeypatch.setitem(EVALS, toy_eval.EVAL.name, toy_eval.EVAL)


def test_an_eval_is_one_file_and_one_line(toy, whole, house, tmp_path, capsys):
    """Catches a place besides the table that has to know of an eval: it runs beside another one, its arguments reach
    it, its file has the common name, the origin and its numbers, wandb is sent them, and a report shows them."""
    run = tmp_path / "run"
    shutil.copytree(whole, run)
    arguments = [f"run={run}", "device=cpu", "attention=16x2", "documents=2", "wandb=offline"]
    main([*arguments, "evals=[guesses,position_loss]", "skip=200"])
    said, path = capsys.readouterr().out, run / "evals" / f"guesses_{END:015d}_512_16x2.json"
    found = json.loads(path.read_text())
    assert f"right {found['right'] / 624:.3f} of 624 tokens, " in said and f"wrote {path}\n" in said
    assert "position_loss: 2 documents" in said
    assert found["skip"] == 200 and found["tokens_scored"] == 2 * (512 - 200)
    assert found["run"] == "quickstart" and found["attention"] == "moba 16x2" and found["num_processes"] == 1
    assert not path.with_suffix(".npz").exists() and not path.with_suffix(".png").exists()
    (sent,) = (run / "evals" / "wandb").glob("offline-run-*/*.wandb")
    for _ in range(300):  # wandb's own process writes it
        if b"guesses/right" in sent.read_bytes():
            break
        time.sleep(0.1)
    assert b"guesses/right" in sent.read_bytes()
    report([str(run)])
    page = (run / "report.html").read_text()
    assert ">Guesses</h2>" in page and f"<td>{found['right']}</td><td>624</td>" in page


def test_help_has_the_arguments_of_every_eval(toy, monkeypatch, capsys):
    """Catches an eval or its arguments left out, and a key of two evals that is explained for one alone."""
    other = replace(EVALS["routing"], name="other", keys={"samples": "how many of its own"})
    monkeypatch.setitem(EVALS, "other", other)
    with pytest.raises(SystemExit) as stopped:
        main(["--help"])
    shown = capsys.readouterr().out
    assert stopped.value.code == 0
    assert "\nguesses: how often the likeliest token is the right one.\n" in shown
    assert "  skip= guesses: tokens at the start that are left out (default 1)\n" in re.sub("= +", "= ", shown)
    known = keys()["samples"]
    assert known.startswith("recall: documents of each task (default 64); ")
    assert known.endswith("; other: how many of its own")


def test_needle_and_ruler_by_the_command(launcher, whole, house, tmp_path):
    """Catches evals that work on models of tests alone: both on a run, in two processes and in one, which agree."""
    arguments = [f"run={whole}", "device=cpu", "attention=16x2", "lengths=512", "samples=2", "depths=3"]
    found = find_spec("long_context_eval") is not None
    evals = "evals=[needle,ruler]" if found else "evals=[needle]"
    arguments += [evals, "tasks=[fwe]", "arms=[moba,hybrid,full]"]
    one = launcher.run([*arguments, f"to={tmp_path / 'one'}"], script=SCRIPT)
    two = launcher.run_ranks([*arguments, f"to={tmp_path / 'two'}"], 2, script=SCRIPT)
    assert [ended.code for ended in (one, *two)] == [0, 0, 0], (one, *two)
    for name in ("needle", "ruler")[: 1 + found]:
        stem = f"{name}_{END:015d}_512_16x2"
        first, second = (json.loads((tmp_path / folder / f"{stem}.json").read_text()) for folder in ("one", "two"))
        assert first["num_processes"] == 1 and second["num_processes"] == 2
        key = "cells" if name == "needle" else "scores"
        assert first[key] == second[key] and set(first[key]) >= ({"essay", "key_value"} if key == "cells" else {"full"})
    assert (tmp_path / "one" / f"needle_{END:015d}_512_16x2_essay.png").is_file()


@pytest.mark.parametrize(
    ("argument", "words"),
    [
        ("skp=3", ("unknown key 'skp'", "do you mean 'skip'?", "skip, style, device, wandb, to")),
        ("style=odd", ("style=odd: choose one of plain, fancy",)),
        ("evals=gueses", (f"evals=gueses: choose from {', '.join(NAMES)}, guesses",)),
    ],
)
def test_what_an_eval_does_not_take_is_refused_by_name(toy, argument, words, tmp_path, capsys):
    """Catches arguments of evals that are not checked before anything is loaded: there is no run here."""
    with pytest.raises(SystemExit) as stopped:
        main([f"run={tmp_path}", argument])
    said = capsys.readouterr().err
    assert stopped.value.code == 2 and said.count("error: ") == 1 and all(word in said for word in words), said


def test_the_table_names_files():
    """Catches an eval whose name, and so that of its results, is not its file's."""
    assert [one.name for one in EVALS.values()] == list(EVALS) == list(NAMES)
