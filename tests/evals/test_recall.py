"""evals/recall.py: teacher-forced scores against greedy decoding, and the report's shares against plain counting."""

import json

import numpy as np
import pytest
import torch

from conf.schema import ModelConfig, SyntheticConfig
from data.synthetic import SyntheticSource
from evals.context import Context
from evals.recall import recall, result, score
from evals.recall_report import RecallReport, table
from evals.routing_numbers import model_hit_rate
from evals.swap import VARIANTS, under, variant
from moba.documents import Documents
from moba.kinds import Full, Moba
from moba.layer import MoBAAttention
from train.model.decoder import Decoder
from train.model.generation import Sampling, generate

LENGTH, SYMBOLS = 64, 8
MOBA = Moba(8, 2)


@pytest.fixture(scope="module")
def model():
    """A model that is right now and then by chance: few symbols, sharp scores, those of values above all."""
    config = ModelConfig(
        hidden_size=32, num_layers=2, num_heads=2, num_kv_heads=1, head_dim=16, ffn_size=48, init_std=0.5
    )
    model = Decoder(config, SYMBOLS)
    model.init_weights(1)
    model.model.embed_tokens.weight.data[SYMBOLS // 2 : SYMBOLS * 3 // 4] *= 4
    model.set_attention([MOBA, MOBA])
    return model.eval()


def make_source(task, value_tokens, **options):
    config = SyntheticConfig(task=task, length=LENGTH, value_tokens=value_tokens, symbols=SYMBOLS, **options)
    return SyntheticSource(task, config, SYMBOLS)


@pytest.mark.parametrize("gate", ["mean", "local"])
def test_teacher_forced_match_is_greedy_decoding(model, gate):
    """Catches scores read one token off, answers counted right by their first token, and an attention that sees more in
    one pass than while decoding: all documents are also generated, answer by answer."""
    source = make_source("mqar", 2, pairs=2, key_tokens=1)
    plan = [Moba(8, 2, gate=gate)] * 2
    matches = []
    with under(model, plan), torch.no_grad():
        for i in range(16):
            sample = source.sample(i)
            found = score(model, sample, "cpu")[0].bool().tolist()
            for answer, right in zip(sample.answers, found):
                prompt, wanted = sample.tokens[: answer.start], sample.tokens[answer.start : answer.start + 2]
                greedy = generate(
                    model, prompt.tolist(), max_new_tokens=2, sampling=Sampling(temperature=0), decode=plan
                )
                assert (list(greedy) == wanted.tolist()) == right
                matches.append(right)
    assert 2 <= sum(matches) < len(matches) - 2, "right now and then"


def test_report_counts_answers_by_distance_and_variant(model):
    """Catches answers of one variant under another's name, far answers that a local window sees, and padding."""
    source = make_source("mqar", 1, pairs=3, min_pairs=1, repeats=2)
    report = recall(Context(model, "cpu"), source, samples=12)
    assert report.variants == VARIANTS and report.gate_matters is False
    for name in VARIANTS:
        right, far_right = [], []
        with under(model, variant([MOBA, MOBA], name)), torch.no_grad():
            for i in range(12):
                sample = source.sample(i)
                scores = model.logits(
                    torch.from_numpy(sample.tokens[:-1]),
                    torch.arange(LENGTH),
                    Documents.from_lengths([LENGTH]),
                )
                for start, _, needle in sample.answers:
                    hit = scores[start - 1].argmax().item() == sample.tokens[start]
                    right.append(hit)
                    if (start - 1) // 8 - needle // 8 >= 2:
                        far_right.append(hit)
        rows = {row["attention"]: row for row in report.rows()}
        assert rows[name]["all"]["accuracy"] == pytest.approx(np.mean(right))
        assert rows[name]["all"]["answers"] == len(right) and rows[name]["far"]["answers"] == len(far_right)
        assert rows[name]["far"]["accuracy"] == pytest.approx(np.mean(far_right))
        assert 0 < len(far_right) < len(right) < 72


def test_evidence_in_the_first_blocks_is_not_far(model):
    """Catches answers credited to the gate though their evidence is always seen, or near ones that are taken out."""
    source = make_source("mqar", 1, pairs=3, min_pairs=1, repeats=2)
    with under(model, [Moba(8, 3, first_blocks=1)] * 2):
        report = recall(Context(model, "cpu"), source, samples=12)
    seen = 0
    for i in range(12):
        for a, (start, _, needle) in enumerate(source.sample(i).answers):
            back, is_first = (start - 1) // 8 - needle // 8, needle < 8
            assert report.far_NA[i, a] == (back >= 3 and not is_first)
            seen += back >= 3 and is_first
    assert seen and report.far_NA.any() and "behind the first 1" in report.summary()["far"]


@pytest.mark.parametrize("first", [0, 1])
def test_what_gates_do_with_the_evidence_equals_plain_counting(model, first):
    """Catches the block of another token or query, a ratio with the block itself or the first ones among the noise, and
    a head's numbers under another's name: every far answer is looked up in scores computed here, block by block."""
    source, top_k = make_source("mqar", 1, pairs=3, min_pairs=1, repeats=2), 3
    hits, ratios, numbers = ([[[] for _ in range(2)] for _ in range(2)] for _ in range(3))
    with under(model, [Moba(8, top_k, first_blocks=first)] * 2), torch.no_grad():
        report = recall(Context(model, "cpu"), source, samples=12)
        layers, seen = [module for module in model.modules() if isinstance(module, MoBAAttention)], []
        for layer in layers:
            layer.observer = lambda layer, q, k, v, documents: seen.append((q, k))
        for i in range(12):
            sample = source.sample(i)
            seen.clear()
            score(model, sample, "cpu")
            for a, (start, _, needle) in enumerate(sample.answers):
                if not report.far_NA[i, a]:
                    continue
                own, target = (start - 1) // 8, needle // 8
                for x, (q, k) in enumerate(seen):
                    for h in range(2):
                        means = [k[b * 8 : b * 8 + 8, 0].mean(0) for b in range(first, own)]
                        scores = np.array([float(mean @ q[start - 1, h]) for mean in means])
                        others = np.delete(scores, target - first)
                        hits[x][h].append((others > scores[target - first]).sum() < top_k - 1 - first)
                        gap = scores[target - first] - others.mean()
                        ratios[x][h].append(gap / others.std(ddof=1) / 2**0.5 if len(others) > 1 else np.nan)
                        numbers[x][h].append(own - first)
        for layer in layers:
            layer.observer = None
    rows = report.summary()["evidence"]
    assert [(row["layer"], row["head"]) for row in rows] == [(0, 0), (0, 1), (1, 0), (1, 1)]
    for row in rows:
        where = row["layer"], row["head"]
        own, ratio, number = (values[where[0]][where[1]] for values in (hits, ratios, numbers))
        assert row["hit"] == pytest.approx(np.mean(own)) and 0 < np.mean(own) < 1 and row["picks"] == 2 - first
        assert row["snr"] == pytest.approx(np.nanmean(ratio), rel=1e-5)
        assert row["candidates"] == pytest.approx(np.mean(number))
        model_hit = model_hit_rate(np.nanmean(ratio), np.mean(number), 2 - first)
        assert row["model_hit"] == pytest.approx(model_hit, abs=1e-6)
    assert len({row["snr"] for row in rows}) == 4


def test_local_blocks_cannot_reach_far_evidence():
    """Catches a distance in blocks that is off by one: under `local` no far answer depends on its evidence, so
    exchanging the value moves no score; under `oracle` with all blocks in reach it does."""
    config = ModelConfig(
        hidden_size=32, num_layers=1, num_heads=2, num_kv_heads=1, head_dim=16, ffn_size=48, init_std=0.5
    )
    model = Decoder(config, SYMBOLS)
    model.init_weights(6)
    model.set_attention([MOBA])
    source = make_source("passkey", 1)
    report = recall(Context(model, "cpu"), source, samples=30)
    moved = {True: [], False: []}
    with under(model, variant([MOBA], "local")), torch.no_grad():
        for i in range(30):
            sample = source.sample(i)
            ((start, _, needle),) = sample.answers
            changed = sample.tokens.copy()
            changed[needle] = (changed[needle] + 1) % SYMBOLS
            rows = torch.tensor([start - 1])
            pair = [
                model.logits(
                    torch.from_numpy(t[:-1]),
                    torch.arange(LENGTH),
                    Documents.from_lengths([LENGTH]),
                    rows=rows,
                )
                for t in (sample.tokens, changed)
            ]
            moved[bool(report.far_NA[i, 0])].append(not torch.equal(*pair))
    assert not any(moved[True]) and all(moved[False]) and moved[True] and moved[False]


def test_intervals_and_files(model, tmp_path):
    """Catches an interval of no width for 0 of 8, NaN in the json, and reports that cannot be drawn."""
    report = recall(Context(model, "cpu"), make_source("passkey", 4), samples=8)
    low, high = RecallReport.interval(report.accuracy("moba"))
    assert low == 0 and 0.2 < high < 0.6
    with under(model, [Full()] * 2):
        full = recall(Context(model, "cpu"), make_source("copy", 8), samples=4)
    assert full.variants == ("full",) and full.gate_matters is None and full.summary()["evidence"] is None
    path = result({"passkey": report, "copy": full}).write(tmp_path, "recall", run="x")
    record = json.loads(path.read_text(), parse_constant=lambda text: pytest.fail(text))
    assert record["tasks"]["passkey"]["gate_matters"] is False and record["tasks"]["copy"]["far"] is None
    assert path.with_suffix(".png").stat().st_size > 10_000
    assert "too few blocks" in table({"passkey": report})
