"""evals/routing.py: numbers of each layer and head against dense softmax and plain loops; ranks; the model of hits."""

import json
import threading

import numpy as np
import pytest
import torch

from conf.schema import ModelConfig
from data.packing import Batch
from evals import routing
from evals.context import Context
from evals.routing import diagnose
from evals.routing_numbers import model_hit_rate
from evals.routing_report import HEAD, RoutingReport
from evals.swap import under
from moba.documents import Documents
from moba.gates import select
from moba.kinds import Full, Moba, Routing
from train.model.decoder import Decoder

LENGTH, SIZE, TOP_K, LAYERS, HEADS = 96, 8, 3, 2, 4


@pytest.fixture(scope="module")
def model():
    config = ModelConfig(
        hidden_size=32,
        num_layers=LAYERS,
        num_heads=HEADS,
        num_kv_heads=2,
        head_dim=8,
        ffn_size=48,
        init_std=0.4,
        loss_tile=64,
    )
    model = Decoder(config, 64).double()
    model.init_weights(3)
    model.set_attention([Full(), Moba(SIZE, TOP_K)])
    return model.eval()


def make_documents(count):
    generator = torch.Generator().manual_seed(1)
    documents = []
    for i in range(count):
        tokens = torch.randint(0, 64, (LENGTH + 1,), generator=generator)
        bounds = Documents.from_lengths([LENGTH])
        documents.append((f"d{i}", Batch(tokens[:-1], tokens[1:], torch.arange(LENGTH), bounds)))
    return documents


def expected(model, batch, first=0):
    """The HEAD values of the MoBA layer for one document, [H] each, from dense attention and loops over queries."""
    seen = []
    module = model.model.layers[1].self_attn
    module.observer = lambda layer, q, k, v, documents: seen.append((q, k, v))
    with torch.no_grad():
        model.logits(batch.tokens, batch.positions, batch.documents)
    module.observer = None
    ((q, k, v),) = seen
    selection = select(Routing(SIZE, TOP_K, "mean", first), q, k, documents=batch.documents)
    values = {name: [] for name in HEAD}
    for h in range(HEADS):
        kh, vh, rows, errors, norms, picks = k[:, h // 2], v[:, h // 2], {name: [] for name in HEAD}, 0, 0, np.zeros(12)
        means = kh.view(-1, SIZE, 8).mean(1)
        for t in range(LENGTH):
            own = t // SIZE
            chosen = [b for b in selection[h, t, :-1].tolist() if b >= 0]
            free = [b for b in chosen if b >= first]
            np.add.at(picks, free, 1)
            if own < TOP_K:
                continue
            p = torch.softmax(kh[: t + 1] @ q[t, h] * 8**-0.5, 0)
            mass = [p[b * SIZE : (b + 1) * SIZE].sum().item() for b in range(own + 1)]
            ranked, room = sorted(range(first, own), key=lambda b: -mass[b]), TOP_K - 1 - first
            best, always = ranked[:room], mass[own] + sum(mass[:first])
            scores = (means[first:own] @ q[t, h]).numpy()
            keys = [s for s in range(t + 1) if s // SIZE in [*chosen, own]]
            sparse = torch.softmax(kh[keys] @ q[t, h] * 8**-0.5, 0) @ vh[keys]
            full = p @ vh[: t + 1]
            errors, norms = errors + ((sparse - full) ** 2).sum().item(), norms + (full**2).sum().item()
            captured, oracle = mass[own] + sum(mass[b] for b in chosen), always + sum(mass[b] for b in best)
            others = np.delete(scores, ranked[0] - first)
            ordered = np.sort(scores)[::-1]
            found = {
                "captured_all": captured,
                "captured": captured,
                "oracle": oracle,
                "local": always + sum(mass[own - room : own]),
                "random": always + (1 - always) * room / (own - first),
                "own": mass[own],
                "regret": oracle - captured,
                "recall": len(set(best) & set(free)) / room,
                "hit": float(ranked[0] in free),
                "margin": (ordered[room - 1] - ordered[room]) / scores.std(ddof=1),
                "snr": (scores[ranked[0] - first] - others.mean()) / (2**0.5 * others.std(ddof=1))
                if len(others) > 1
                else np.nan,
            }
            for name, value in found.items():
                rows[name].append(value)
        even = np.array(
            [
                sum(min(1, (TOP_K - 1 - first) / (t // SIZE - first)) for t in range(LENGTH) if t // SIZE > b)
                for b in range(first, 11)
            ]
        )
        load = picks[first:11] / even
        share = load / load.sum()
        rows["output_error"] = [(errors / norms) ** 0.5]
        rows["load_entropy"] = [-(share[share > 0] * np.log(share[share > 0])).sum() / np.log(11 - first)]
        rows["max_load"], rows["dead_share"] = [load.max()], [(load == 0).mean()]
        for name in HEAD:
            values[name].append(np.nanmean(rows[name]))
    return {name: np.array(value) for name, value in values.items()}


@pytest.mark.parametrize("first", [0, 1])
def test_every_number_of_every_head_equals_the_dense_computation(model, first):
    """Catches masses of another head, queries that drop nothing among the means, each formula, and first blocks that
    count as picked, or as wanted. All routed queries are sampled, so that the sampled means are exact too."""
    documents = make_documents(2)
    with under(model, [Full(), Moba(SIZE, TOP_K, first_blocks=first)]):
        report = diagnose(Context(model, "cpu"), documents, queries=LENGTH)
    assert report.layers == [1]
    for i, (_, batch) in enumerate(documents):
        for name, value in expected(model, batch, first).items():
            np.testing.assert_allclose(report.heads_NLH[name][i, 0], value, rtol=1e-6, atol=1e-12, err_msg=name)
    assert (report.heads_NLH["regret"] > 1e-3).any() and report.heads_NLH["captured"].max() < 0.99
    picks, mass = report.maps_LH2YY[0, :, 0], report.maps_LH2YY[0, :, 1]
    np.testing.assert_allclose(picks.sum(-1)[:, 3:], TOP_K)
    np.testing.assert_allclose(mass.sum(-1)[:, 3:], 1)
    assert np.triu(picks[0], 1).sum() == 0 and np.nansum(np.triu(mass[0], 1)) == 0
    np.testing.assert_allclose(report.distance_NL2E.sum(-1), 1)
    by_position = report.by_position().mean
    assert np.isnan(by_position[:4]).all() and np.isfinite(by_position[4:]).all()
    assert (by_position[4:, 1] >= by_position[4:, 0]).all()
    assert report.candidates == np.mean([t // SIZE - first for t in range(TOP_K * SIZE, LENGTH)])


def test_ranks_together_equal_one(model):
    """Catches documents counted twice where ranks do not divide them, or left out."""
    documents = make_documents(3)
    alone = diagnose(Context(model, "cpu"), documents, queries=20)
    barrier, slots, results = threading.Barrier(2), [None] * 2, [None] * 2

    def run(rank):
        def reduce(tensor):
            slots[rank] = tensor.clone()
            barrier.wait()
            total = slots[0] + slots[1]
            barrier.wait()
            return total

        twin = Decoder(model.config, 64).double()
        twin.load_state_dict(model.state_dict())
        twin.set_attention(model.attention)
        context = Context(twin, "cpu", rank=rank, world_size=2, reduce=reduce)
        results[rank] = diagnose(context, documents, queries=20)

    threads = [threading.Thread(target=run, args=(rank,)) for rank in range(2)]
    [thread.start() for thread in threads]
    [thread.join() for thread in threads]
    for result in results:
        for name in HEAD:
            np.testing.assert_array_equal(result.heads_NLH[name], alone.heads_NLH[name])
        np.testing.assert_array_equal(result.shares_NLPS, alone.shares_NLPS)
        np.testing.assert_allclose(result.maps_LH2YY, alone.maps_LH2YY, rtol=1e-12)


def test_results_can_be_written_and_dense_attention_is_refused(model, tmp_path):
    """Catches a figure that fails, NaN in the json, and diagnostics of a gate that drops nothing."""
    report = diagnose(Context(model, "cpu"), make_documents(2), queries=16)
    path = routing.result(report, "a run", queries=16).write(tmp_path, "routing", run="x")
    record = json.loads(path.read_text(), parse_constant=lambda text: pytest.fail(text))
    assert record["run"] == "x" and record["specs"] == ["moba 8x3"] and record["num_documents"] == 2
    assert np.shape(record["heads"]["captured"]) == (1, HEADS) and record["overall"]["regret"]["se"] > 0
    assert len(report.table().splitlines()) == len(HEAD)
    for figure in ("heads", "curves", "maps"):
        assert (tmp_path / f"routing_{figure}.png").stat().st_size > 10_000
    loaded = RoutingReport.load(path)
    assert loaded.table() == report.table() and loaded.specs == report.specs
    assert np.array_equal(loaded.by_position().se, report.by_position().se, equal_nan=True)
    plan = model.attention
    for spec, words in (
        (Full(), "no layer"),
        (Moba(32, 3), "nothing is routed"),
        (Moba(8, 1), "top_k=1"),
    ):
        model.set_attention([spec] * LAYERS)
        with pytest.raises(ValueError, match=words):
            diagnose(Context(model, "cpu"), make_documents(1))
    model.set_attention(plan)


@pytest.mark.parametrize(("snr", "candidates", "picks"), [(0.57, 32, 3), (2.26, 32, 3), (1.13, 16, 2), (0.0, 10, 4)])
def test_hit_model_equals_its_simulation(snr, candidates, picks):
    """Catches a wrong quadrature, and comparisons taken for independent though they share the wanted block's noise."""
    rng = np.random.default_rng(0)
    wanted = 2**0.5 * snr + rng.normal(size=40_000)
    others = rng.normal(size=(40_000, candidates - 1))
    simulated = ((others > wanted[:, None]).sum(1) < picks).mean()
    assert model_hit_rate(snr, candidates, picks) == pytest.approx(simulated, abs=0.01)
