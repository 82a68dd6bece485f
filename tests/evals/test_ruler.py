"""evals/ruler.py: scores and samples against the commands of NVIDIA's package, and what is said of them.

Needs the extra `ruler`, but for the last tests."""

import csv
import json
import os
import random
import re
import runpy
import subprocess
import sys
from importlib.util import find_spec
from pathlib import Path
from types import ModuleType

import numpy as np
import pytest
from copier import Copier, make_job
from PIL import Image

from data.tokenizer import EMBEDDED, load_tokenizer
from evals import ruler_data
from evals.ruler import run
from evals.ruler_data import Ruler, cleaned
from evals.ruler_report import RulerReport, page

needs_package = pytest.mark.skipif(
    any(find_spec(name) is None for name in (ruler_data.PACKAGE, *ruler_data.GENERATORS_NEED)),
    reason="without the extra: pip install .[ruler]",
)
TASKS = {"qa_1": 8192, "fwe": 1024}


def package_folder() -> Path:
    return Path(find_spec("long_context_eval").submodule_search_locations[0])


@pytest.fixture(scope="module")
def samples(tmp_path_factory):
    """A folder of samples, made once."""
    folder, tokenizer, ruler = tmp_path_factory.mktemp("ruler"), load_tokenizer("bytes"), Ruler()
    for task, length in TASKS.items():
        assert len(ruler.samples(task, tokenizer, length, 4, folder)) == 4
    return folder


def make(tmp_path, samples, model, task, **values):
    """A job that finds its samples made."""
    job = make_job(tmp_path, model, tasks=task, lengths=str(TASKS[task]), **{"samples": "4"} | values)
    job.folder.mkdir(exist_ok=True)
    if not (job.folder / "ruler_samples").exists():
        (job.folder / "ruler_samples").symlink_to(samples)
    return job


class Speaker(Copier):
    """Writes after each prompt a text that depends on it."""

    def __init__(self, speech):
        self.speech, self.prompts = speech, []
        super().__init__(self.go_on)

    def go_on(self, text, attention):
        prompt = next((prompt for prompt in self.prompts if text.startswith(prompt)), None)
        if prompt is None:
            if not text.endswith(("are:", "Answer:")):
                return "?"
            self.prompts.append(prompt := text)
        return self.speech(self.prompts.index(prompt))[len(text) - len(prompt) :] or "."


@needs_package
@pytest.mark.parametrize("task", TASKS)
def test_scores_are_those_of_the_package(tmp_path, monkeypatch, samples, task):
    """Catches a score that is not NVIDIA's: answers right, in part, in capitals, wrong, and behind control characters
    are written by a model, and the files of what it wrote go through the package's evaluate.py (whose download at
    import is left out)."""
    asked = Ruler().samples(task, load_tokenizer("bytes"), TASKS[task], 4, samples)
    answers = [one.answers for one in asked]
    speeches = [
        f"\x01\t{answers[0][-1].upper()} {answers[0][0]}",
        " nothing of the kind",
        "\x0b\x0b",
        " " + answers[3][0],
    ]
    speaker = Speaker(lambda index: speeches[index])
    result = run(make(tmp_path, samples, speaker, task, arms="hybrid"))
    ours = result.record["scores"]["hybrid"][task][0]["score"]
    (ledger,) = (tmp_path / "evals" / "parts").glob("ruler_*.jsonl")
    written = {key[3]: text for key, text in map(json.loads, ledger.read_text().splitlines()[1:])}
    assert sorted(written) == [0, 1, 2, 3] and speeches[0][:5] in written[0]
    rows = [
        {"index": i, "input": one.prompt, "outputs": one.answers, "pred": written[i], "others": {}}
        for i, one in enumerate(asked)
    ]
    (tmp_path / f"{task}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    nltk = ModuleType("nltk")
    nltk.data = type("Data", (), {"find": staticmethod(lambda name: name)})
    monkeypatch.setitem(sys.modules, "nltk", nltk)
    monkeypatch.setattr(sys, "argv", ["evaluate.py", "--data_dir", str(tmp_path), "--benchmark", "synthetic"])
    monkeypatch.syspath_prepend(str(package_folder() / "eval"))
    runpy.run_path(str(package_folder() / "eval" / "evaluate.py"), run_name="__main__")
    theirs = {row[0]: row[1] for row in csv.reader((tmp_path / f"summary-{task}.csv").open())}["Score"]
    assert ours == float(theirs) and 0 < ours < 100


@needs_package
@pytest.mark.parametrize("task", ["vt", "niah_single_1"])
def test_samples_are_those_of_the_package(tmp_path, task):
    """Catches samples that are not NVIDIA's: its prepare.py makes the same from the same tokenizer, saved as it wants
    it."""
    from transformers import PreTrainedTokenizerFast

    PreTrainedTokenizerFast(tokenizer_file=str(EMBEDDED / "bpe-4k.json")).save_pretrained(tmp_path / "tokenizer")
    folder = package_folder() / "data"
    options = {"save_dir": tmp_path, "task": task, "tokenizer_path": tmp_path / "tokenizer", "tokenizer_type": "hf"}
    options |= {"max_seq_length": 1024, "num_samples": 3}
    words = [word for key, value in options.items() for word in (f"--{key}", str(value))]
    path = os.pathsep.join([str(Path(sys.executable).parent), os.environ["PATH"]])
    done = subprocess.run(
        [sys.executable, str(folder / "prepare.py"), *words], env=os.environ | {"PATH": path}, capture_output=True
    )
    file = tmp_path / task / "validation.jsonl"
    assert done.returncode == 0 and file.is_file(), done
    theirs = [json.loads(line) for line in file.read_text().splitlines()]
    ours = Ruler().samples(task, load_tokenizer("bpe-4k"), 1024, 3, tmp_path / "ours")
    assert [(one["input"], one["outputs"]) for one in theirs] == [(one.prompt, one.answers) for one in ours]
    assert len(ours) == 3


@needs_package
def test_a_task_that_does_not_fit_ends(tmp_path, capsys):
    """Catches a generator that tries for ever: variable tracking has an example of 500 tokens, which bytes exceed."""
    job = make_job(tmp_path, Copier(lambda text, attention: "?"), tasks="vt", lengths="1K", samples="2")
    result = run(job)
    assert result.record["scores"] == {"hybrid": {"vt": [None], "average": [None]}} and not result.numbers
    assert "-: the task does not fit the length" in result.text
    assert json.dumps(result.record, allow_nan=False) and result.write(tmp_path, "ruler_x").is_file()


@needs_package
def test_an_interrupted_evaluation_goes_on(tmp_path, samples, monkeypatch):
    """Catches answers that are written again, or lost."""
    monkeypatch.setattr("evals.ruler.batch_tokens", lambda _: 1024)
    whole = Speaker(lambda index: " abc" * index)
    expected = run(make(tmp_path / "whole", samples, whole, "fwe"))

    def stops(index):
        if first.passes == whole.passes * 5 // 8:
            raise KeyboardInterrupt
        return " abc" * index

    first, second, third = Speaker(stops), Speaker(lambda index: " abc" * index), Copier(lambda *_: "?")
    with pytest.raises(KeyboardInterrupt):
        run(make(tmp_path / "cut", samples, first, "fwe"))
    run(make(tmp_path / "cut", samples, second, "fwe"))
    a_sample = whole.passes // 4
    assert second.passes == 2 * a_sample and first.passes == whole.passes * 5 // 8
    assert run(make(tmp_path / "cut", samples, third, "fwe")).record == expected.record and third.passes == 0


@needs_package
def test_more_samples_than_there_are_questions_are_refused(tmp_path):
    """Catches a generator that looks for ever for a question that is not there."""
    with pytest.raises(ValueError, match="samples=9000: RULER's question sets have enough for 5000"):
        run(make_job(tmp_path, Copier(lambda *_: "?"), samples="9000"))


@needs_package
def test_all_tasks_are_there():
    """Catches a task that is not found in the package, or has another length to write or another score."""
    tasks = Ruler().tasks
    assert len(tasks) == 13
    assert sum(task.splits_sentences for task in tasks.values()) == 5
    lengths = {
        "niah": 128,
        "variable_tracking": 30,
        "common_words_extraction": 120,
        "freq_words_extraction": 50,
        "qa": 32,
    }
    for task in tasks.values():
        assert task.tokens_to_generate == lengths[Path(task.script).stem] and Path(task.script).is_file()
        part = task.name.startswith("qa")
        assert task.scores(["It is A."], [["a.", "b", "c", "d"]]) == [100.0 if part else 25.0], task.name


def make_report(means, tasks=None, **values):
    means_ATL = np.asarray(means, dtype=float)
    tasks = tasks or [f"t{i}" for i in range(means_ATL.shape[1])]
    return RulerReport(
        tasks=tasks,
        all_tasks=[f"t{i}" for i in range(means_ATL.shape[1])],
        arms=["hybrid", "full"][: len(means_ATL)],
        lengths=[4096, 8192, 16384][: means_ATL.shape[2]],
        scores_ATLN=np.nan_to_num(means_ATL)[..., None].repeat(2, -1),
        counts_TL=[[0 if np.isnan(x) else 2 for x in row] for row in means_ATL[0]],
        stand_in=["t1"],
        title="toy",
        dense_up_to=None,
        **values,
    )


def test_the_effective_length_is_the_longest_above_the_threshold():
    """Catches a threshold that counts itself, the first length instead of the longest, and a claim from few tasks."""
    report = make_report([[[100, 85.6, 90], [80, 85.6, 82]], [[85.6, 0, 0], [85.6, 0, 0]]])
    assert report.averages_AL.tolist() == [pytest.approx([90, 85.6, 86]), pytest.approx([85.6, 0, 0])]
    assert report.effective_length("hybrid") == 16384 and report.effective_length("full") == 0
    said = report.table()
    assert "effective length, hybrid: 16K (" in said and "effective length, full: none (below 4K" in said
    assert re.search(r"^t1\* +80\.0", said, re.MULTILINE) and "not NVIDIA-exact" in said
    assert make_report([[[99.0]]], tasks=["t7"]).effective_length("hybrid") is None
    gap = make_report([[[99, np.nan], [99, 99]]])
    assert gap.effective_length("hybrid") == 4096 and "-: the task does not fit" in gap.table()
    assert dict(gap.rows("hybrid"))["average"][1] is None


def test_figure_and_page(tmp_path):
    """Catches a figure or page that cannot be made, with a task missing."""
    rng = random.Random(0)
    report = make_report([[[rng.uniform(0, 100) for _ in range(3)] for _ in range(4)] for _ in range(2)])
    path = report.result(42).write(tmp_path, "ruler_x")
    with Image.open(path.with_suffix(".png")) as drawn:
        assert min(drawn.size) > 200 and np.asarray(drawn.convert("L")).std() > 10
    html = page(json.loads(path.read_text()), path)
    assert html.count("<img") == 1 and html.count("<table") == 2 and "t1*" in html and "not NVIDIA-exact" in html


def test_without_the_package_its_extra_is_named(tmp_path, monkeypatch):
    """Catches an import error in place of what to install."""
    monkeypatch.setattr(ruler_data, "find_spec", lambda name: None)
    with pytest.raises(ValueError, match=re.escape("ruler needs long_context_eval: pip install 'moba-train[ruler]'")):
        run(make_job(tmp_path, Copier(lambda *_: "?")))


@needs_package
def test_samples_made_elsewhere_need_no_generator(tmp_path, monkeypatch):
    """Catches samples copied from another machine that are not used, or made anew, where the generators' dependencies
    are missing; and exact ones passed over, or marked as a stand-in's."""
    tokenizer, ruler = load_tokenizer("bytes"), Ruler()
    monkeypatch.setattr(ruler_data, "find_spec", lambda name: None if name in ruler_data.GENERATORS_NEED else name)
    monkeypatch.setitem(sys.modules, "nltk", None)  # its import fails
    job = make_job(tmp_path, Copier(lambda *_: "7"), tasks="niah_single_2", lengths="1K", samples="2", arms="hybrid")
    with pytest.raises(ValueError, match=r"no samples in .*stand_in.*needs wonderwords, nltk, scipy: pip install"):
        run(job)
    for sentences, answer, score in (("stand_in", "8", 0.0), ("punkt", "7", 100.0)):
        place = job.folder / "ruler_samples" / f"{tokenizer.fingerprint}_1024_2_{sentences}" / "niah_single_2"
        place.mkdir(parents=True)
        rows = [{"index": i, "input": f"{sentences} {i}", "outputs": [answer]} for i in range(2)]
        (place / "validation.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
        found = run(job).record
        assert found["scores"]["hybrid"]["niah_single_2"][0]["score"] == score
        assert list(found["not_exact"]) == (["niah_single_2"] if sentences == "stand_in" else [])
    assert [s.prompt for s in ruler.samples("niah_single_2", tokenizer, 1024, 2, place.parents[1])] == [
        "punkt 0",
        "punkt 1",
    ]


def test_predictions_are_cleaned():
    """Catches control characters that keep an answer from being found."""
    assert cleaned(" \x00a\x07b\tc\n") == "a\nb\nc"
