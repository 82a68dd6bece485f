"""evals/lm_eval.py: the same numbers as lm-evaluation-harness's own HFLM has on an export, task by task and request by
request. Needs the extra `lm-eval`, but for the last test."""

import json
import math
from importlib.util import find_spec
from pathlib import Path

import numpy as np
import pytest
import yaml
from launch_runs import END
from PIL import Image

import evals.answering
from data.tokenizer import load_tokenizer
from evals import lm_eval as our_lm_eval
from evals.answering import Arm, Reader
from evals.context import Context
from evals.lm_eval import LmEvalReport, Score, page
from evals.loading import attention_plan, load_trained
from launch.evaluate import main
from launch.export import main as export

missing = [name for name in ("lm_eval", "accelerate") if find_spec(name) is None]
needs_package = pytest.mark.skipif(bool(missing), reason=f"without {missing}: pip install .[lm-eval]")
LENGTH = 512


@pytest.fixture(autouse=True)
def offline(monkeypatch):
    """Nothing is asked of a network."""
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    monkeypatch.setenv("HF_DATASETS_OFFLINE", "1")


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    """Four tasks in jsonl files: choices of one and of several tokens after short and long contexts, whole texts of
    which one is longer than the model's context, answers to be written, and an answer without a context."""
    folder = tmp_path_factory.mktemp("tasks")
    words = [
        f"It was the {word} of times, and {i} more."
        for i, word in enumerate(["best", "worst", "age", "epoch", "season"])
    ]
    questions = [" ".join(words[: i % 5 + 1] * (1 + 2 * (i % 3))) for i in range(9)]
    rows = {
        "choice": [
            {"q": q, "choices": ["a", "b", "the worst of times", f"x{i}"], "a": i % 4} for i, q in enumerate(questions)
        ],
        "last": [{"q": q, "a": f" {q.split()[3]}"} for q in questions],
        "texts": [{"t": " ".join(words * n)} for n in (1, 2, 5)],
        "writing": [{"q": q, "a": "e"} for q in questions],
    }
    kinds = {
        "choice": {"output_type": "multiple_choice", "doc_to_text": "{{q}} Answer:", "doc_to_choice": "{{choices}}"},
        "last": {"output_type": "loglikelihood", "doc_to_text": "{{q}}", "doc_to_target": "{{a}}"},
        "texts": {"output_type": "loglikelihood_rolling", "doc_to_text": "", "doc_to_target": "{{t}}"},
        "writing": {"output_type": "generate_until", "doc_to_text": "{{q}}", "doc_to_target": "{{a}}"},
    }
    kinds["choice"]["doc_to_target"] = "a"
    kinds["writing"]["generation_kwargs"] = {"until": ["e ", "\n"], "max_gen_toks": 12}
    metrics = {"choice": ("acc", "acc_norm"), "last": ("perplexity", "acc"), "writing": ("exact_match",)}
    metrics["texts"] = ("bits_per_byte", "word_perplexity")
    for name, lines in rows.items():
        path = folder / f"{name}.jsonl"
        path.write_text("".join(json.dumps(line) + "\n" for line in lines))
        data = {"dataset_path": "json", "dataset_kwargs": {"data_files": {"test": str(path)}}, "test_split": "test"}
        task = {"task": f"own_{name}", **data, **kinds[name], "metric_list": [{"metric": m} for m in metrics[name]]}
        (folder / f"{name}.yaml").write_text(yaml.safe_dump(task))
    return folder


@pytest.fixture(scope="module")
def exported(whole, tmp_path_factory) -> Path:
    to = tmp_path_factory.mktemp("export") / "model"
    export([f"run={whole}", f"to={to}", "dtype=fp32"])
    return to


def hflm(exported, attention=None):
    """The harness's own model on our export, one request at a time."""
    from lm_eval.models.huggingface import HFLM
    from transformers import AutoModelForCausalLM, AutoTokenizer

    import moba.transformers  # noqa: F401 - registers the attention

    options = {} if attention is None else {"attn_implementation": attention}
    model = AutoModelForCausalLM.from_pretrained(exported, **options).eval()
    tokenizer = AutoTokenizer.from_pretrained(exported)
    return HFLM(pretrained=model, tokenizer=tokenizer, max_length=LENGTH, batch_size=1)


@needs_package
def test_full_attention_scores_as_hflm_on_the_export(whole, exported, folder, tmp_path, capsys):
    """Catches texts encoded in another way, contexts cut or shared wrongly, windows of whole texts, stop sequences and
    answers of another model: every metric of every task within 1e-4 of HFLM's."""
    from lm_eval import simple_evaluate
    from lm_eval.tasks import TaskManager

    main(
        [f"run={whole}", "device=cpu", "evals=[lm_eval]", "attention=full", f"tasks_folder={folder}", f"to={tmp_path}"]
    )
    record = json.loads((tmp_path / f"lm_eval_{END:015d}_{LENGTH}_full.json").read_text())
    ours = {(row["task"], row["metric"]): row["arms"]["full"]["value"] for row in record["scores"]}
    manager = TaskManager(include_path=str(folder), include_defaults=False)
    found = simple_evaluate(
        hflm(exported), tasks=list(manager.all_subtasks), task_manager=manager, bootstrap_iters=0, log_samples=False
    )
    theirs = {
        (task, key.removesuffix(",none")): value
        for task, values in found["results"].items()
        for key, value in values.items()
        if key.endswith(",none") and "_stderr" not in key
    }
    assert ours.keys() == theirs.keys() and len(ours) == 7 and {task for task, _ in ours} == set(manager.all_subtasks)
    for key, value in theirs.items():
        assert ours[key] == pytest.approx(value, rel=1e-4, abs=1e-4), key
    assert record["n-samples"]["own_texts"]["effective"] == 3 and "full attention" in record["about_length"]
    assert "own_choice" in capsys.readouterr().out


@needs_package
def test_requests_under_moba_beyond_block_size_x_top_k(whole, exported, capsys):
    """Catches a cache that routes otherwise than one pass: each request's log-likelihood under MoBA within 1e-4 of
    HFLM's with the export's MoBA; and an attention that was not in force: those in which blocks are dropped differ
    from full."""
    from lm_eval.api.instance import Instance

    from evals.lm_eval_model import RunLM

    trained = load_trained(whole, "cpu")
    plan = attention_plan("moba", trained)
    dense_up_to = plan[0].block_size * plan[0].top_k
    tokens = trained.config.data.tokenizer
    rng = np.random.default_rng(0)
    pairs = [("", "It was")]
    for length in (10, 40, 100, 100, 300, 700):
        text = "".join(rng.choice(list("abcdefgh .\n"), length))
        pairs += [(text, " the best of"), (text, " the"), (text, "x" * 60)]
    requests = [Instance("loglikelihood", {}, pair, i) for i, pair in enumerate(pairs)]

    def scores(prefill, decode):
        arm = Arm("x", prefill, decode)
        model = RunLM(Context(trained.model, "cpu"), arm, load_tokenizer(tokens), LENGTH, Kept())
        return [total for total, _ in model.loglikelihood(requests)], model.lengths

    full = tuple(spec.dense() for spec in plan)
    sparse, lengths = scores(plan, plan)
    dense, _ = scores(full, full)
    np.testing.assert_allclose(
        sparse, [t for t, _ in hflm(exported, "moba").loglikelihood(requests)], atol=1e-4, rtol=1e-5
    )
    np.testing.assert_allclose(dense, [t for t, _ in hflm(exported).loglikelihood(requests)], atol=1e-4, rtol=1e-5)
    gaps = np.abs(np.subtract(sparse, dense))
    short = np.array(lengths) <= dense_up_to
    assert 3 < short.sum() < len(pairs) - 3 and gaps[short].max() < 1e-5 and (gaps[~short] > 1e-4).mean() > 0.7
    hybrid, _ = scores(plan, full)
    assert hybrid[-1] != sparse[-1] and hybrid[-1] != dense[-1], "the answer alone is read with full attention"


class Kept(dict):
    """A ledger without a file."""

    put = dict.update


@needs_package
def test_interrupted_it_goes_on(whole, folder, tmp_path, monkeypatch, capsys):
    """Catches answers that are lost, read again, or taken for another arm's or request's."""
    passes, forward = [], Reader._forward

    def counted(self, *arguments):
        passes.append(1)
        if len(passes) == stop_at:
            raise KeyboardInterrupt
        return forward(self, *arguments)

    monkeypatch.setattr(Reader, "_forward", counted)
    monkeypatch.setattr("evals.lm_eval_model.batch_tokens", lambda _: 600)

    def scores(name):
        arguments = [f"run={whole}", "device=cpu", "evals=[lm_eval]", "attention=moba", "arms=[moba,full]"]
        main([*arguments, f"tasks_folder={folder}", f"to={tmp_path / name}"])
        record = json.loads(next((tmp_path / name).glob("lm_eval_*.json")).read_text())
        return [{arm: value["value"] for arm, value in row["arms"].items()} for row in record["scores"]]

    stop_at = -1
    expected, whole_passes = scores("whole"), len(passes)
    assert any(row["moba"] != row["full"] for row in expected)
    stop_at = len(passes) + whole_passes // 2
    with pytest.raises(SystemExit):
        scores("cut")
    assert scores("cut") == expected
    assert whole_passes <= len(passes) - whole_passes < whole_passes * 1.25, "a batch is read again"
    before = len(passes)
    assert scores("cut") == expected and len(passes) == before


@needs_package
def test_processes_share_the_requests(whole, folder, launcher, house, tmp_path):
    """Catches requests that two processes answer twice or not at all."""
    arguments = [
        f"run={whole}",
        "device=cpu",
        "evals=[lm_eval]",
        "attention=moba",
        f"tasks_folder={folder}",
        "samples=3",
    ]
    script = Path(our_lm_eval.__file__).parents[1] / "launch" / "evaluate.py"
    one = launcher.run([*arguments, f"to={tmp_path / 'one'}"], script=script)
    two = launcher.run_ranks([*arguments, f"to={tmp_path / 'two'}"], 2, script=script)
    assert [ended.code for ended in (one, *two)] == [0, 0, 0], (one, *two)
    records = [json.loads(next((tmp_path / name).glob("lm_eval_*.json")).read_text()) for name in ("one", "two")]
    first, second = ([row["arms"]["moba"]["value"] for row in record["scores"]] for record in records)
    assert first == pytest.approx(second, abs=1e-6) and records[1]["num_processes"] == 2
    assert records[0]["longer_than_dense"] > 0 and records[0]["n-samples"]["own_choice"]["effective"] == 3


@needs_package
@pytest.mark.parametrize(
    ("argument", "words"),
    [
        ("tasks=[own_choice,nothing]", "tasks=nothing: lm-evaluation-harness 0.4"),
        ("tasks_folder=nowhere", "tasks_folder=nowhere: no such folder"),
        ("num_fewshot=two", "num_fewshot=two: must be a whole number"),
        ("documents=1", "needs tasks=[...] of lm-evaluation-harness, or a tasks_folder="),
    ],
)
def test_mistakes_are_refused_by_name(whole, folder, argument, words, capsys):
    """Catches a mistake that becomes the harness's traceback."""
    more = [f"tasks_folder={folder}"] if argument.startswith(("tasks=", "num")) else []
    with pytest.raises(SystemExit) as stopped:
        main([f"run={whole}", "device=cpu", "evals=[lm_eval]", argument, *more])
    said = capsys.readouterr().err
    assert stopped.value.code == 2 and words in said and "Traceback" not in said, said


@needs_package
def test_batches_fit_the_room(whole, monkeypatch):
    """Catches a cache that doubles behind the longest context when a shorter one's answer is longer, thousands of short
    texts in a batch, and a prompt without a token."""
    from lm_eval.api.instance import Instance

    from evals.lm_eval_model import RunLM

    caches, make = [], evals.answering.KVCache
    monkeypatch.setattr(
        evals.answering, "KVCache", lambda *given, **more: caches.append(make(*given, **more)) or caches[-1]
    )
    trained = load_trained(whole, "cpu")
    plan = attention_plan("moba", trained)
    model = RunLM(
        Context(trained.model, "cpu"), Arm("x", plan, plan), load_tokenizer(trained.config.data.tokenizer), 512, Kept()
    )
    pairs = [("a" * 400, "b"), ("a" * 100, "b" * 40)]
    model.loglikelihood([Instance("loglikelihood", {}, pair, i) for i, pair in enumerate(pairs)])
    room = len(model.tok_encode("a" * 400)) + len(model.tok_encode("b" * 40, add_special_tokens=False))
    assert [layer.sequences[0].storage.capacity for layer in caches[0].layers] == [room] * len(plan)
    sizes = [len(batch) for batch in model._batches([3] * 600 + [200] * 3, "texts")]
    assert sizes == [256, 256, 91]
    options = {"until": ["e "], "max_gen_toks": 3}
    texts = [Instance("generate_until", {}, (text, options), i) for i, text in enumerate(("", "It was"))]
    assert len(model.generate_until(texts[:1])) == 1 and len(model.generate_until(texts)) == 2


def test_answers_read_in_parts_score_the_same(whole, monkeypatch):
    """Catches tokens lost between the parts in which long answers are read, and answers called the likeliest that are
    not."""
    trained = load_trained(whole, "cpu")
    plan, rows = attention_plan("moba", trained), trained.model.model.embed_tokens.weight.shape[0]
    texts, answers = [list(b"abc" * 30), list(b"xyz")], [[list(b"lorem ipsum" * 20)], [list(b"e")]]

    def read() -> Reader:
        reader = Reader(trained.model, 2, rows)
        reader.read(texts, plan)
        return reader

    whole_answers = read().score(answers, plan)
    likeliest = read().greedy(4, plan)
    assert [own[0][1] for own in read().score([[part] for part in likeliest], plan)] == [True, True]
    assert [own[0][1] for own in read().score([[[*part[:-1], 0]] for part in likeliest], plan)] == [False, False]
    for step in (2, 6, 64):
        monkeypatch.setattr("evals.answering.SCORED_TOKENS", step)
        for ((total, _),), ((known, _),) in zip(read().score(answers, plan), whole_answers):
            assert total == pytest.approx(known, abs=1e-4)


def test_reports_show_the_scores_and_what_they_say_of_sparsity(tmp_path):
    """Catches results without error bars that fail, scores that are infinite, and a page that leaves out that nothing
    was beyond block size x top_k."""
    scores = {
        "moba": [Score("a", "acc", 0.5, 0.1), Score("b", "word_perplexity", math.inf, None)],
        "full": [Score("a", "acc", 0.25, 0.1), Score("b", "word_perplexity", 9.0, None)],
    }
    report = LmEvalReport(scores, {}, 512, requests=9, beyond=0, longest=40, title="toy")
    result = report.result(48)
    path = result.write(tmp_path, "lm_eval", commit=None)
    assert np.asarray(Image.open(path.with_suffix(".png")).convert("L")).std() > 10
    record = json.loads(path.read_text())
    shown = page(record, path)
    assert "0 of 9 requests" in shown and "full attention throughout" in shown and "<td>0.5000 +- 0.1000</td>" in shown
    assert record["scores"][1]["arms"] == {
        "moba": {"value": None, "stderr": None},
        "full": {"value": 9.0, "stderr": None},
    }
