"""evals/needle.py: prompts token by token, scores of models that are known to be right or wrong, and going on after an
interruption."""

import json
import re

import numpy as np
import pytest
import torch
from copier import Copier, make_job
from PIL import Image

from data.tokenizer import load_tokenizer
from evals import answering, needle, needle_report
from evals.context import Context
from evals.needle import run
from evals.needle_report import NeedleReport, page
from evals.needle_text import CANDIDATES, FORMS, SPARE_TOKENS, make_sample
from evals.protocol import Job
from evals.statistics import wilson
from moba.kinds import Full, Moba
from moba.kinds.plan_file import write_plan


def lookup(text, attention=None, wrong=False):
    """What comes next if the question at the end is answered from the text; with `wrong`, from another key."""
    asked = re.search(r"The line of the key (\w+) once more:\n\1:(.*)$", text, re.DOTALL)
    if asked is not None:
        pairs = re.findall(r"^(\w{8}): (\w{8})$", text, re.MULTILINE)
        key, written = asked.groups()
        value = next(value for name, value in pairs if (name != key) == wrong)
    elif (asked := re.search(r"Answer: The best thing to do in (\w+) is to(.*)$", text, re.DOTALL)) is None:
        return "?"
    else:
        city, written = asked.groups()
        value = re.search(rf"The best thing to do in {city} is to (.*?)\.", text)[1]
        value = value[::-1] if wrong else value
    rest = f" {value}\n"
    return rest[len(written) :] if rest.startswith(written) and written != rest else "?"


@pytest.mark.parametrize("name", ["bytes", "bpe-4k"])
@pytest.mark.parametrize("form", FORMS)
def test_prompts_are_what_they_should_be(form, name):
    """Catches a prompt of another length, a needle at another depth, twice or cut, one inside a word or a pair,
    candidates that repeat, and depths whose texts differ."""
    tokenizer = load_tokenizer(name)
    for index in range(3):
        sample = make_sample(form, tokenizer, 2048, 0, index)
        needle_text = tokenizer.decode(sample.needle)
        assert len({tuple(candidate) for candidate in sample.candidates}) == CANDIDATES
        assert len({len(tokenizer.decode(candidate).strip()) for candidate in sample.candidates}) == 1
        assert tokenizer.decode(sample.candidates[0]).strip() == sample.answer and sample.answer in needle_text
        for depth in (0, 0.3, 0.5, 1):
            prompt = sample.prompt(depth)
            assert len(prompt) + max(map(len, sample.candidates)) + SPARE_TOKENS == 2048
            text = tokenizer.decode(prompt)
            before, found, after = text.partition(needle_text)
            assert found and needle_text not in after and text.count(sample.answer) == 1
            assert abs(sample.place(depth) / len(sample.text) - depth) < 0.15
            behind = before.rstrip()[-1:]
            assert depth in (0, 1) or form == "key_value" or behind in (".", "!", "?"), before[-30:]
            if form == "key_value":
                lines = text.splitlines()
                assert needle_text.strip() in lines
                others = {tokenizer.decode(candidate).strip() for candidate in sample.candidates[1:]}
                assert others <= {line.partition(": ")[2] for line in lines}
            assert before + after == tokenizer.decode(sample.head + sample.text + sample.question)
    assert make_sample(form, tokenizer, 2048, 0, 1).prompt(0.5) == make_sample(form, tokenizer, 2048, 0, 1).prompt(0.5)
    assert make_sample(form, tokenizer, 2048, 0, 1).text != make_sample(form, tokenizer, 2048, 0, 2).text
    with pytest.raises(ValueError, match="lengths=64: too short for a needle, which takes"):
        make_sample(form, tokenizer, 64, 0, 0)


@pytest.mark.parametrize("wrong", [False, True])
def test_a_copier_is_right_and_one_of_a_wrong_key_is_not(tmp_path, wrong):
    """Catches a score that is not about the answer: who copies the answer is always right under both, who copies the
    value of another key never is under either."""
    model = Copier(lambda text, attention: lookup(text, wrong=wrong))
    result = run(make_job(tmp_path, model, lengths="[1K,1536]"))
    assert result.numbers and len(result.numbers) == 2 * 3 * 2
    for name, value in result.numbers.items():
        assert value == (0 if wrong and "essay" not in name else 1 if not wrong else value), name
    if wrong:
        assert result.numbers["essay_full_exact"] == 0
    cell = result.record["cells"]["key_value"]["moba"][0]
    assert cell["length"] == 1024 and cell["depth"] == 0 and cell["exact"]["right"] == (0 if wrong else 3)
    assert cell["exact"]["interval_95"] == pytest.approx(wilson(0.0 if wrong else 1.0, 3))


def test_arms_attend_as_they_say(tmp_path):
    """Catches arms under each other's name: a model that knows the answer only while full attention reads, and whose
    first letter therefore comes from the prompt's plan."""
    dense = (Full(),)

    def answer(text, attention):
        rest = lookup(text)
        return rest if attention == dense or (rest.startswith(" ") and rest.endswith("\n") and len(rest) > 9) else "?"

    model = Copier(answer)
    found = run(make_job(tmp_path, model, lengths="1K", forms="key_value")).numbers
    assert found["key_value_full_exact"] == 1 and found["key_value_hybrid_exact"] == 1
    assert found["key_value_moba_exact"] == 0
    model = Copier(lambda text, attention: lookup(text) if attention == dense else "?")
    found = run(make_job(tmp_path / "2", model, lengths="1K", forms="key_value")).numbers
    assert found["key_value_full_exact"] == 1 and found["key_value_hybrid_exact"] == 0


def test_other_attentions_stand_beside(tmp_path):
    """Catches an attention of beside= that is not in force for prompt or answer, answers of a plan's file that are
    taken for those of a plan that stood in it before, and two arms of one name."""
    wanted = Moba(64, 3, first_blocks=1)
    model = Copier(lambda text, attention: lookup(text) if attention == (wanted,) else "?")
    arguments = {"lengths": "1K", "forms": "key_value", "arms": "full"}
    beside = f"64x3,64x3+1,{tmp_path / 'plan.yaml'}"
    for plan, expected in ((wanted, 1), (Moba(64, 3), 0)):
        write_plan(tmp_path / "plan.yaml", [plan], {})
        found = run(make_job(tmp_path, model, beside=beside, **arguments))
        assert list(found.record["cells"]["key_value"]) == ["full", "64x3", "64x3+1", "plan"]
        values = {name: found.numbers[f"key_value_{name}_exact"] for name in found.record["cells"]["key_value"]}
        assert values == {"full": 0, "64x3": 0, "64x3+1": 1, "plan": expected}
    with pytest.raises(ValueError, match="two have the same name"):
        run(make_job(tmp_path, model, beside="64x3,64x3", **arguments))


def test_an_interrupted_grid_goes_on(tmp_path):
    """Catches finished cells that are measured again, or lost, and a line that was cut off taken for a result."""
    arguments = {"lengths": "[1K,2K]", "forms": "key_value", "arms": "[moba,full]"}
    whole = Copier(lookup)
    expected = run(make_job(tmp_path / "whole", whole, **arguments))
    stop_at = whole.passes // 2

    def stops(text, attention):
        if first.passes == stop_at:
            raise KeyboardInterrupt
        return lookup(text)

    first = Copier(stops)
    with pytest.raises(KeyboardInterrupt):
        run(make_job(tmp_path / "cut", first, **arguments))
    (file,) = (tmp_path / "cut" / "evals" / "parts").glob("needle_*_0.jsonl")
    finished = len(file.read_text().splitlines()) - 1
    assert 0 < finished < 48
    with open(file, "a") as stream:
        stream.write('[["key_value", "full", 2048, 1')
    second = Copier(lookup)
    result = run(make_job(tmp_path / "cut", second, **arguments))
    assert result.record == expected.record and json.dumps(result.record)
    # What is measured again is the cell at which it stopped; what stands before it in its text is read again.
    a_cell = whole.passes / 16
    assert whole.passes <= first.passes + second.passes < whole.passes + 1.5 * a_cell + 2
    third = Copier(lookup)
    assert run(make_job(tmp_path / "cut", third, **arguments)).record == expected.record and third.passes == 0
    more = Copier(lookup)
    run(make_job(tmp_path / "cut", more, **arguments | {"samples": "4"}))
    assert 0 < more.passes < whole.passes * 1.1
    assert len(more.seen) == 4, "the new text of each length under each plan, and no other"


def test_two_processes_share_the_cells(tmp_path, monkeypatch):
    """Catches cells that no process measures, or two count."""
    monkeypatch.setattr(needle, "batch_tokens", lambda _: 1024)
    parts, arguments = [], {"lengths": "[1K,1536]", "forms": "key_value", "arms": "full"}
    for rank in (0, 1):
        job = make_job(tmp_path, Copier(lookup), **arguments)
        context = Context(job.context.model, "cpu", rank=rank, world_size=2, reduce=lambda t: parts.append(t) or t)
        run(Job(context, job.trained, job.values, job.folder))
    assert torch.equal(parts[0] + parts[1], torch.ones_like(parts[0])) and all(part.any() for part in parts)


def test_figures_and_page(tmp_path):
    """Catches a figure or page that cannot be made, with one length and depth as with several."""
    for folder, arguments in (
        ("one", {"lengths": "1K", "depths": "1", "arms": "full"}),
        ("more", {"lengths": "1K,2K"}),
    ):
        result = run(make_job(tmp_path, Copier(lookup), forms="key_value", **arguments))
        path = result.write(tmp_path / folder, "needle_x", run="toy", attention="moba 64x2", dense_up_to=128)
        with Image.open(tmp_path / folder / "needle_x_key_value.png") as drawn:
            assert min(drawn.size) > 300 and np.asarray(drawn.convert("L")).std() > 10
        again = NeedleReport.load(path)
        assert again.table() == result.text and again.title == "toy, moba 64x2"
        html = page(json.loads(path.read_text()), path)
        assert html.count("<img") == 1 and "<td>100.0 (" in html


def test_the_line_of_dense_lengths_is_in_the_panels_that_it_is_about(tmp_path, monkeypatch):
    """Catches B x k of the attention in force marked where another attention is measured."""
    drawn = []
    monkeypatch.setattr(needle_report, "save", lambda figure, path: drawn.append(figure))
    right = np.ones((2, 1, 4, 2, 1, 1))
    arms = ["moba", "hybrid", "full", "512x3"]
    NeedleReport(["essay"], arms, [1024, 2048], [50.0], right, "toy, moba 128x8", 1024).draw(0, tmp_path)
    marked = [axes.get_title().split()[0] for axes in drawn[0].axes if axes.lines]
    assert marked == ["moba", "hybrid"] * 2


@pytest.mark.parametrize(
    ("values", "words"),
    [
        ({"forms": "essays"}, "forms=essays: choose from essay, key_value"),
        ({"lengths": "1K,many"}, "lengths=1K,many: 'many'"),
        ({"arms": "sparse"}, "arms=sparse: choose from moba, hybrid, full"),
        ({"depths": "0"}, "depths=0: must be a whole number of at least 1"),
        ({"lengths": "100"}, "lengths=100: too short for a needle"),
    ],
)
def test_what_cannot_be_is_refused(tmp_path, values, words):
    """Catches a wrong value that is found out after hours, or not at all."""
    with pytest.raises(ValueError, match=re.escape(words)):
        run(make_job(tmp_path, Copier(lookup), **values))


def test_a_full_model_has_one_arm(tmp_path):
    """Catches three panels of the same, and an arm that was asked for by name and left out in silence."""
    model = Copier(lookup, plan=[Full()])
    result = run(make_job(tmp_path, model, lengths="1K", forms="key_value"))
    assert list(result.record["cells"]["key_value"]) == ["full"]
    with pytest.raises(ValueError, match="no layer is sparse here"):
        run(make_job(tmp_path, model, lengths="1K", arms="[hybrid,full]"))
    assert answering.ARMS == ("moba", "hybrid", "full")


def test_who_knows_nothing_is_right_by_chance(tmp_path):
    """Catches a ranking in which the right answer has an advantage, such as winning where all are equal: letters drawn
    at random put it first in about one of ten, and scores that are all alike never."""
    rng = np.random.default_rng(0)

    class Guesser(Copier):
        def logits(self, *arguments, **options):
            scores = super().logits(*arguments, **options)
            return torch.from_numpy(rng.normal(size=scores.shape)) * 5

    found = run(make_job(tmp_path, Guesser(lambda *_: "?"), lengths="1K", arms="full", samples="12")).record
    for row in found["shares"]:
        assert 0 < row["ranked"]["share"] < 0.3 and row["exact"]["share"] == 0, row
    same = run(make_job(tmp_path / "same", Copier(lambda *_: "?"), lengths="1K", arms="full")).record
    assert all(row["ranked"]["share"] == 0 for row in same["shares"])
