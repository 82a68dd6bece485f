"""The search for a plan against brute force, what it measures against whole forward passes, and the command that
interrupted goes on where it was."""

import copy
import itertools
import json
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.multiprocessing.reductions import StorageWeakRef

from conf.validate import freeze
from data.tokenizer import load_tokenizer
from evals import tuning
from evals.context import Context
from evals.loading import TrainedModel
from evals.plan_search import allocate, best_alike, candidates, pairs_share, predicted_cost
from evals.protocol import Job
from evals.swap import under
from evals.tuning import ALIKE, KL, PER_LAYER, REFINED, chosen_objective, distances, split, tune
from evals.tuning_report import BOTH, LOSS, RETRIEVAL
from launch import tune_attention
from moba.attention import attend
from moba.backends.refusals import TRITON_TOP_K
from moba.documents import Documents
from moba.kinds import Full, Sliding
from moba.kinds.plan_file import read_plan
from train.model.decoder import Decoder
from train.schedule import build_schedule

LENGTH, LAYERS, IDLE = 256, 3, 1
"""Layer IDLE's attention adds nothing to the stream."""


@pytest.fixture
def job(tmp_path):
    """A random model of three layers, and ten documents in five clusters."""
    generator = torch.Generator().manual_seed(0)
    letters = [chr(97 + i) for i in torch.randint(0, 6, (10 * 300,), generator=generator).tolist()]
    texts = ["".join(letters[i * 300 : i * 300 + 300]) for i in range(10)]
    rows = [json.dumps({"id": f"book{i // 2}-{i}", "text": text}) for i, text in enumerate(texts)]
    (tmp_path / "held_out.jsonl").write_text("\n".join(rows))
    source = {"path": str(tmp_path / "held_out.jsonl")}
    sizes = {"hidden_size": 32, "num_layers": LAYERS, "num_heads": 4, "num_kv_heads": 2, "ffn_size": 48}
    config = freeze(
        {
            "run": {"dir": str(tmp_path), "device": "cpu", "name": "toy"},
            "model": {**sizes, "init_std": 0.4},
            "data": {"sources": {"main": source}, "validation": source, "cache_dir": str(tmp_path / "cache")},
            "schedule": {
                "tokens": 4096,
                "seq_len": LENGTH,
                "batch_tokens": 1024,
                "stages": {"full": {"attention": {"kind": "full"}}},
            },
        }
    )
    model = Decoder(config.model, 384)
    model.init_weights(2)
    model.model.layers[IDLE].self_attn.o_proj.weight.data.zero_()
    checkpoint = tmp_path / "checkpoint"
    checkpoint.mkdir()
    trained = TrainedModel(
        model.eval(), config, build_schedule(config).stages[0], 4096, checkpoint, torch.device("cpu")
    )
    context = Context(model, trained.device, cluster_of=lambda name: name.split("-")[0])
    return Job(context, trained, {}, tmp_path / "evals")


CHOICE = candidates(LENGTH, 0.3, [8, 16], [0, 1])


@settings(deadline=None, max_examples=60)
@given(st.integers(0, 10**6), st.integers(1, 4), st.integers(2, 6))
def test_a_plan_keeps_to_its_budget_and_no_other_choice_in_one_layer_is_better(seed, num_layers, num_candidates):
    """Catches budgets that are passed, room that is left unused, and steps taken from another candidate than the
    layer's; brute force bounds the plan from below, and it is never worse than that by more than one step."""
    random = np.random.default_rng(seed)
    pairs = np.sort(random.uniform(0.05, 1, num_candidates))
    cost = random.uniform(0, 1, (num_layers, num_candidates))
    budget = random.uniform(pairs[0], 1) * num_layers
    at = allocate(pairs, cost, budget)
    layers = np.arange(num_layers)
    spent, total = pairs[at].sum(), cost[layers, at].sum()
    assert spent <= budget * (1 + 1e-9)
    for layer, c in itertools.product(range(num_layers), range(num_candidates)):
        if spent - pairs[at[layer]] + pairs[c] <= budget:
            assert cost[layer, c] >= cost[layer, at[layer]]
    every = [np.array(choice) for choice in itertools.product(range(num_candidates), repeat=num_layers)]
    fitting = [cost[layers, choice].sum() for choice in every if pairs[choice].sum() <= budget]
    assert min(fitting) - 1e-12 <= total <= min(fitting) + cost.max()
    alike = best_alike(pairs, cost, budget)
    fitting = [cost[:, c].sum() for c in range(num_candidates) if num_layers * pairs[c] <= budget]
    assert cost[:, alike].sum() == min(fitting)


def test_the_budget_goes_where_it_saves_most():
    """Catches a layer that keeps its share though another one needs it: where costs are on a line, the best plan is
    that of brute force."""
    pairs, cost = np.array([1.0, 2.0, 4.0]), np.array([[9.0, 4.0, 0.0], [1.0, 0.5, 0.0], [2.0, 1.0, 0.0]])
    assert allocate(pairs, cost, 3) == [0, 0, 0]
    assert allocate(pairs, cost, 4) == [1, 0, 0]
    assert allocate(pairs, cost, 7) == [2, 1, 0] or allocate(pairs, cost, 7) == [2, 0, 1]
    assert allocate(pairs, cost, 12) == [2, 2, 2]


def test_candidates_come_close_to_each_level():
    """Catches a top_k that does not fit the share, one that could be larger, and dense ones."""
    assert {spec.block_size for spec in CHOICE} == {8, 16} and {spec.first_blocks for spec in CHOICE} == {0, 1}
    assert len(set(CHOICE)) == len(CHOICE) > 8
    for spec in CHOICE:
        wider = pairs_share(replace(spec, top_k=spec.top_k + 1), LENGTH)
        levels = [level for level in (0.3 / 4, 0.15, 0.225, 0.3, 0.45, 0.6, 0.9) if pairs_share(spec, LENGTH) <= level]
        assert wider > min(levels) and not spec.is_dense_at(LENGTH)


def test_candidates_are_what_the_kernels_take():
    """Catches small blocks that only a slow backend computes, and sizes beyond the kernels' tiles by default."""
    found = candidates(8192, 0.25, [16, 64], [1])
    assert max(spec.top_k for spec in found if spec.block_size == 16) == TRITON_TOP_K
    assert tune_attention._block_sizes({}, 8192) == [16, 32, 64, 128] and tune_attention._block_sizes({}, 512) == [16]


def test_cost_follows_the_squared_error():
    """Catches layers that are mixed up, and a division by nothing where a layer's output is exact."""
    cost = predicted_cost(np.array([0.1, 0.2, -1e-9]), np.array([[4.0, 2.0, 0], [0, 0, 0], [1, 2, 0]]), [1, 0, 0])
    np.testing.assert_allclose(cost, [[0.2, 0.1, 0], [0, 0, 0], [0, 0, 0]])


@pytest.mark.parametrize("length", [LENGTH, 203])
def test_distances_are_those_of_attention(length, monkeypatch):
    """Catches blocks of another head, keys of the future, a last block that is not full, and parts that are not added
    up: against attention itself."""
    torch.manual_seed(0)
    q, k, v = 3 * torch.randn(length, 4, 16), torch.randn(length, 2, 16), torch.randn(length, 2, 16)
    count = length // 8
    documents = Documents.from_lengths([count], [length])
    full, full_lse = attend(q[-count:], k, v, Full(), documents, return_lse=True)
    whole = distances(q, k, v, CHOICE, count)
    monkeypatch.setattr(tuning, "PRODUCTS", 1 << 14)
    torch.testing.assert_close(distances(q, k, v, CHOICE, count), whole)
    for spec, (error, captured) in zip(CHOICE, whole.T.tolist()):
        out, lse = attend(q[-count:], k, v, spec, documents, return_lse=True)
        expected = (out - full).square().sum() / full.square().sum()
        assert error == pytest.approx(expected.item(), rel=1e-4)
        assert captured == pytest.approx((lse - full_lse).exp().mean().item(), rel=1e-5)
    assert whole[0].min() > 0.005 and whole[1].max() < 0.99


def test_a_tuning_says_what_whole_passes_say(job, capsys):
    """Catches regrets of other rows, documents or layers, documents that both choose and judge, pairs given to a layer
    that does not need them, and a plan beyond its budget."""
    found = tune(job, CHOICE, 0.3)
    assert found.pairs <= 0.3 and found.how in (ALIKE, PER_LAYER)
    (kl_L,), (judged,) = found.kl_L.values(), found.judged.values()
    assert kl_L[IDLE] == 0 and found.expected_L[IDLE] == 0
    assert min(kl_L[i] for i in range(LAYERS) if i != IDLE) > 1e-4
    if found.how == PER_LAYER:
        assert pairs_share(found.plan[IDLE], LENGTH) == min(pairs_share(spec, LENGTH) for spec in CHOICE)
    choosing, others = split(job)[LOSS]
    assert {piece.cluster for piece in choosing} == {"book0", "book4"} and len(choosing) == 4
    assert {piece.cluster for piece in others} == {"book1", "book2", "book3"} and len(others) == 6

    def losses(piece, plan):
        batch = piece.batch
        with torch.no_grad(), under(job.context.model, plan):
            return job.context.model(batch.tokens, batch.positions, batch.documents, batch.labels)[-LENGTH // 8 :]

    dense = [Full()] * LAYERS
    regret = np.mean([(losses(p, found.plan) - losses(p, dense)).mean().item() for p in others])
    assert judged.regret.mean == pytest.approx(regret, abs=1e-6) and abs(regret) > 1e-4
    assert judged.full_loss == pytest.approx(np.mean([losses(p, dense).mean().item() for p in others]), abs=1e-5)
    for layer in range(LAYERS):
        plan = [*dense[:layer], found.reference[layer], *dense[layer + 1 :]]
        alone = np.mean([(losses(p, plan) - losses(p, dense)).mean().item() for p in choosing])
        assert found.regret_L[layer].mean == pytest.approx(alone, abs=1e-6)
    assert np.isfinite(judged.regret.width) and np.isfinite(found.regret_L[0].width), "three clusters, and two"
    assert job.context.model.attention == (Full(),) * LAYERS, "given back"
    assert len(found.table().splitlines()) == LAYERS + 7


def test_a_plan_for_both_is_judged_by_both(job, tmp_path):
    """Catches probes of other documents than those that choose, predictions of other tokens than the answer's, costs of
    one part counted for the other, and right answers that are not: against whole passes over each probe."""
    rows = [
        {"id": f"book{i // 2}-{i}", "text": "".join(chr(97 + (i * j * j) % 23) for j in range(1200))} for i in range(8)
    ]
    (tmp_path / "long.jsonl").write_text("\n".join(map(json.dumps, rows)))
    values = {"data": str(tmp_path / "long.jsonl"), "seq_len": "1K"}
    job = replace(job, values=values)
    assert chosen_objective(job) == BOTH
    choice = candidates(1024, 0.3, [32, 64], [0, 1])
    found = tune(job, choice, 0.3)
    parts = split(job, BOTH)
    assert list(found.judged) == list(parts) == [LOSS, RETRIEVAL]
    assert {p.cluster for p in parts[RETRIEVAL].choosing} == {p.cluster for p in parts[LOSS].choosing} == {"book0"}
    assert [len(part) for part in parts[RETRIEVAL]] == [2 * len(part) for part in parts[LOSS]] == [4, 12]
    tokenizer = load_tokenizer("bytes")
    full, own, right = [], [], []
    for piece in parts[RETRIEVAL].others:
        batch, rows_R = piece.batch, piece.rows_R
        said = tokenizer.decode(batch.tokens.tolist() + batch.labels[-1:].tolist())
        answer = tokenizer.decode(batch.labels[rows_R].tolist())
        assert said.endswith(answer) and answer.strip().isdigit() and said.count(f"{answer}. Remember it.") == 1
        for plan, losses in (([Full()] * LAYERS, full), (found.plan, own)):
            with torch.no_grad(), under(job.context.model, plan):
                scores = job.context.model.logits(batch.tokens, batch.positions, batch.documents, rows=rows_R)
            losses.append(torch.nn.functional.cross_entropy(scores, batch.labels[rows_R]).item())
        right.append((scores.argmax(-1) == batch.labels[rows_R]).all().item())
    judged = found.judged[RETRIEVAL]
    assert judged.regret.mean == pytest.approx(np.mean(own) - np.mean(full), abs=1e-5) and judged.number == 12
    assert judged.right.mean == np.mean(right) and judged.full_loss == pytest.approx(np.mean(full), abs=1e-4)
    alone = tune(replace(job, values=values | {"objective": "loss"}), choice, 0.3)
    assert list(alone.judged) == [LOSS]
    same = [i for i in range(LAYERS) if alone.reference[i] == found.reference[i]]
    assert same and [alone.kl_L[LOSS][i] for i in same] == [found.kl_L[LOSS][i] for i in same]
    assert "answers right: full" in found.table() and found.record()["retrieval"]["number"] == 12


def test_probes_need_room(job):
    """Catches sentences that do not fit, found out in the middle."""
    assert chosen_objective(job) == LOSS
    with pytest.raises(ValueError, match="objective=both: probes take seq_len=1K or more"):
        chosen_objective(replace(job, values={"objective": "both"}))
    with pytest.raises(ValueError, match="objective=needle: choose from loss, retrieval, both"):
        chosen_objective(replace(job, values={"objective": "needle", "seq_len": "2K"}))


def test_refining_starts_from_what_was_best(job):
    """Catches changes of a plan that are measured over other layers than its own, a refined plan that is taken though
    it is no better, and further turns from one that was none: saving work alters nothing, and the least divergence on
    the documents that chose wins."""
    found = tune(job, CHOICE, 0.3)
    turns = [[f"{REFINED} {turn}", f"{REFINED} {turn}, half"] for turn in (1, 2)]
    assert list(found.chosen_kl)[:4] == [PER_LAYER, ALIKE, *turns[0]]
    is_better = min(map(found.chosen_kl.get, turns[0])) < min(found.chosen_kl[name] for name in (PER_LAYER, ALIKE))
    assert list(found.chosen_kl)[4:] == (turns[1] if is_better else [])
    assert found.chosen_kl[found.how] == min(found.chosen_kl.values()) and found.pairs <= 0.3


@pytest.mark.parametrize("pack", [1, LENGTH, 3 * LENGTH, 100 * LENGTH])
def test_plans_that_go_through_the_layers_together_are_measured_alone(job, pack):
    """Catches states of another plan or document, layers with another plan's attention, and attention that is not given
    back: plans that share their first layers, or later attention, against whole passes of each; and packs that are
    larger than they should be."""
    full, (a, b, c) = Full(), (CHOICE[i] for i in (0, 3, 5))
    plans = [(a, b, c), (full, b, c), (a, full, c), (a, b, full), (a, b, c), (full, full, full), (c, b, c)]
    pieces, model = split(job)[LOSS].choosing[:2], job.context.model
    meter = tuning._Meter(job, (full,) * LAYERS, LENGTH)
    meter.expect(1, 0)
    meter.pack_tokens, meter.stream_tokens = pack, 1 << 20
    with torch.inference_mode():
        found = meter._hidden(pieces, plans, tuning.PASSES)
        assert model.attention == (full,) * LAYERS
        for plan, own_PTC in zip(plans, found, strict=True):
            for piece, own_TC in zip(pieces, own_PTC, strict=True):
                batch = piece.batch
                with under(model, plan):
                    want = model.logits(batch.tokens, batch.positions, batch.documents, rows=batch.positions)
                torch.testing.assert_close(model.lm_head(model.model.norm(own_TC)), want, rtol=1e-4, atol=1e-4)
    sizes = []
    hooks = [layer.register_forward_hook(lambda layer, x, out: sizes.append(len(out))) for layer in model.model.layers]
    costs = meter.costs(pieces, plans)
    for hook in hooks:
        hook.remove()
    assert max(sizes) <= max(pack, LENGTH)
    assert np.ptp(costs[0, :, KL]) > 1e-4 and (costs[:, 5, KL] == 0).all() and (costs[:, 0] == costs[:, 4]).all()
    np.testing.assert_allclose(meter.costs(pieces[::-1], plans[::-1]), costs[::-1, ::-1])


def test_states_are_given_up_once_they_are_used(job):
    """Catches states of two layers that are all kept at once: of long documents there is room for one."""
    plans, held, most = [(spec, spec, spec) for spec in CHOICE[:8]], [], []
    meter = tuning._Meter(job, (Full(),) * LAYERS, LENGTH)
    meter.expect(1, 0)
    for layer in job.context.model.model.layers:
        layer.register_forward_hook(lambda layer, x, out: held.append(StorageWeakRef(out.untyped_storage())))
        layer.register_forward_hook(lambda *_: most.append(sum(not state.expired() for state in held)))
    with torch.inference_mode():
        meter._hidden(split(job)[LOSS].choosing[:1], plans, tuning.PASSES)
    assert len(plans) <= max(most) <= len(plans) + 1


def test_divergence_is_the_regret_of_text_from_the_dense_model(job):
    """Catches a divergence the other way round, or of other tokens: as the mean over the vocabulary of the losses'
    difference, weighted by full attention's probabilities."""
    found = tune(job, CHOICE, 0.3)
    (piece, *_), _ = split(job)[LOSS]
    meter = tuning._Meter(job, (Full(),) * LAYERS, LENGTH)
    meter.expect(1, 0)
    batch, logs = piece.batch, []
    for plan in ([Full()] * LAYERS, found.plan):
        with torch.no_grad(), under(job.context.model, plan):
            scores = job.context.model.logits(batch.tokens, batch.positions, batch.documents, rows=piece.rows_R)
        logs.append(scores.double().log_softmax(-1))
    expected = sum(logs[0][:, i].exp() * (logs[0][:, i] - logs[1][:, i]) for i in range(384)).mean().item()
    (row,) = meter.costs([piece], [found.plan])
    assert row[0, KL] == pytest.approx(expected, rel=1e-3) and expected > 1e-3


def test_bfloat16_is_measured_in_float16(job):
    """Catches costs of single layers that are bfloat16's rounding, and weights that do not come back: against float32
    with the same weights."""
    model = job.context.model.to(torch.bfloat16)
    exact = copy.deepcopy(model).float()
    piece, spec = split(job)[LOSS].choosing[0], CHOICE[-1]
    weights = {name: (weight.data_ptr(), weight.clone()) for name, weight in model.named_parameters()}

    def kl(own, folder):
        own_job = replace(job, context=replace(job.context, model=own), folder=job.folder / folder)
        meter = tuning._Meter(own_job, (Full(),) * LAYERS, LENGTH)
        meter.expect(1, 0)
        return meter.costs([piece], [(spec, Full(), Full())])[0, 0, KL]

    with tuning._finely(job, piece.batch):
        fine = kl(model, "fine")
    expected, rough = kl(exact, "exact"), kl(model, "rough")
    assert fine == pytest.approx(expected, rel=0.02) and abs(rough - expected) > 4 * abs(fine - expected)
    for name, weight in model.named_parameters():
        assert weight.data_ptr() == weights[name][0] and torch.equal(weight, weights[name][1])


def test_numbers_too_large_for_float16_stay_bfloat16(job, capsys):
    """Catches infinities that are taken for costs."""
    model = job.context.model.to(torch.bfloat16)
    model.model.layers[0].mlp.down_proj.weight.data.mul_(1e6)
    with tuning._finely(job, split(job)[LOSS].choosing[0].batch):
        assert {weight.dtype for weight in model.parameters()} == {torch.bfloat16}
    assert "bfloat16 is used" in capsys.readouterr().out


def test_interrupted_it_goes_on_where_it_was(job, monkeypatch):
    """Catches work that is lost or done again, and another result after it."""
    passes, whole = [], tuning._Meter._hidden

    def counted(self, *arguments):
        passes.append(1)
        if len(passes) == 11:
            raise KeyboardInterrupt
        return whole(self, *arguments)

    monkeypatch.setattr(tuning._Meter, "_hidden", counted)
    with pytest.raises(KeyboardInterrupt):
        tune(job, CHOICE, 0.3)
    found, after = tune(job, CHOICE, 0.3), len(passes) - 11
    assert tune(job, CHOICE, 0.3).table() == found.table() and len(passes) == 11 + after, "all is known"
    fresh = replace(job, folder=job.folder / "other")
    assert tune(fresh, CHOICE, 0.3).table() == found.table()
    assert len(passes) - 11 - after == after + 10


def test_the_command_writes_a_plan_that_can_be_read(job, monkeypatch, capsys, tmp_path):
    """Catches a file that says something else than the table, and default names."""
    monkeypatch.setattr(tune_attention, "load_trained", lambda *_: job.trained)
    monkeypatch.setattr(tune_attention, "run_directory", lambda _: tmp_path)
    tune_attention.main(["run=x", "budget=0.3", "block_sizes=8,16", "cluster=book."])
    out = capsys.readouterr().out
    path = tmp_path / "evals" / "attention_256_0.3.yaml"
    plan = read_plan(path, LAYERS)
    assert np.mean([pairs_share(spec, LENGTH) for spec in plan]) <= 0.3
    assert all(str(spec) in out for spec in plan) and f"wrote {path}" in out


@pytest.mark.parametrize(
    "arguments,words",
    [
        (["budget=25"], "budget=25: a share of the causal pairs above 0 and below 1"),
        (["budget=0.3", "to=plan.txt"], "to=plan.txt: a plan file ends in .yaml"),
        (["budget=0.3", "block_sizes=0"], "block_sizes=0: must be at least 1"),
        (["budget=0.3", "first_blocks=one"], "first_blocks=one: whole numbers"),
        (["budget=0.01", "block_sizes=64"], "block_sizes: none leaves 3 blocks per query within budget=0.01"),
        (["budget=0.11", "block_sizes=16"], "budget=0.11: a layer attends to 0.2"),
        (["budget=0.3", "cluster=("], "cluster=(: not a regular expression"),
        (["budget=0.3", "cluster=shelf"], "cluster=shelf: no document's id begins so"),
        (["budget=0.3", "documents=1"], "documents: 1 of 256 tokens, 1 cluster(s)"),
        ([], "budget=... is missing"),
    ],
)
def test_mistakes_are_one_message(job, monkeypatch, capsys, arguments, words):
    """Catches a traceback, and minutes of measuring before a mistake is seen."""
    monkeypatch.setattr(tune_attention, "load_trained", lambda *_: job.trained)
    with pytest.raises(SystemExit) as stopped:
        tune_attention.main(["run=x", *arguments])
    message = capsys.readouterr().err
    assert stopped.value.code == 2 and message.startswith("error: ") and words in message, message


def test_windows_are_refused(job):
    """Catches a model whose layers no plan file can hold, found out when all is measured."""
    job.context.model.set_attention([Full(), Sliding(8), Full()])
    with pytest.raises(ValueError, match="sliding 8"):
        tune(job, CHOICE, 0.3)
    assert not Path(job.folder).exists()
