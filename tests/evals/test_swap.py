"""evals/swap.py: each variant against the plan it stands for, prefill x decode against decoding token by token."""

import json

import numpy as np
import pytest
import torch

from conf.schema import ModelConfig
from data.packing import Batch
from evals.context import Context
from evals.swap import VARIANTS, load_evaluations, swap, under, variant
from moba.documents import Documents
from moba.kinds import Full, Moba
from moba.layer import KVCache
from train.model.decoder import Decoder

LENGTH, LAST = 64, 12
FULL, MOBA = Full(), Moba(8, 3)


@pytest.fixture(scope="module")
def model():
    config = ModelConfig(
        hidden_size=32, num_layers=3, num_heads=4, num_kv_heads=2, head_dim=8, ffn_size=48, init_std=0.4, loss_tile=64
    )
    model = Decoder(config, 64).double()
    model.init_weights(7)
    model.set_attention([MOBA, MOBA, FULL])
    return model.eval()


@pytest.fixture(scope="module")
def documents():
    generator = torch.Generator().manual_seed(2)
    found = []
    for i in range(4):
        tokens = torch.randint(0, 64, (LENGTH + 1,), generator=generator)
        bounds = Documents.from_lengths([LENGTH])
        found.append((f"d{i}", Batch(tokens[:-1], tokens[1:], torch.arange(LENGTH), bounds)))
    return found


@pytest.fixture(scope="module")
def report(model, documents):
    before = model.attention
    report = swap(Context(model, "cpu"), documents, last_tokens=LAST)
    assert model.attention == before, "the model gets its own attention back"
    return report


def test_variants_are_the_plans_they_name(model, documents, report):
    """Catches a variant that swaps nothing, or the full layers too, and differences of other documents."""
    plans = {
        "full": [FULL] * 3,
        "moba": [MOBA, MOBA, FULL],
        **{g: [Moba(8, 3, gate=g)] * 2 + [FULL] for g in ("oracle", "random", "local")},
    }
    means = {}
    for name in VARIANTS:
        assert list(variant(model.attention, name)) == plans[name]
        with under(model, plans[name]), torch.no_grad():
            batches = [batch for _, batch in documents]
            losses = [model(b.tokens, b.positions, b.documents, b.labels).double().numpy() for b in batches]
        means[name] = np.array([loss.mean() for loss in losses])
        found = report.evaluations[name].document_loss
        np.testing.assert_allclose(found, np.array(losses).reshape(4, 16, 4).mean(-1), atol=1e-9)
    for row in report.rows():
        gap = means[row["attention"]] - means["full"]
        assert row["loss"]["mean"] == pytest.approx(means[row["attention"]].mean(), abs=1e-9)
        assert row["loss_minus_full"]["mean"] == pytest.approx(gap.mean(), abs=1e-9)
        assert row["loss_minus_full"]["se"] == pytest.approx(gap.std(ddof=1) / 2, abs=1e-9)
    trailing = {name: one.document_loss[:, -1] for name, one in report.evaluations.items()}
    gate = report.costs()["the gate costs (moba - oracle)"]
    assert gate["mean"] == pytest.approx((trailing["moba"] - trailing["oracle"]).mean())
    assert gate["se"] == pytest.approx((trailing["moba"] - trailing["oracle"]).std(ddof=1) / 2)
    assert len({round(m.mean(), 6) for m in means.values()}) == len(VARIANTS), "no two variants are alike"


def test_last_tokens_score_as_if_decoded_one_by_one(model, documents, report):
    """Catches a chunk that sees other keys than single tokens would, and prefill and decode mixed up."""
    plans = {"moba": [MOBA, MOBA, FULL], "full": [FULL] * 3}
    _, batch = documents[1]
    with torch.no_grad():
        for p, prefill in enumerate(("moba", "full")):
            for d, decode in enumerate(("moba", "full")):
                cache, losses = KVCache(3), []
                bounds = Documents.from_lengths([LENGTH - LAST])
                with under(model, plans[prefill]):
                    model.logits(batch.tokens[:-LAST], batch.positions[:-LAST], bounds, cache)
                with under(model, plans[decode]):
                    for t in range(LENGTH - LAST, LENGTH):
                        one = Documents.from_lengths([1])
                        scores = model.logits(batch.tokens[t : t + 1], batch.positions[t : t + 1], one, cache)
                        losses.append(-scores[0].log_softmax(-1)[batch.labels[t]].item())
                assert report.last_loss_NPD[1, p, d] == pytest.approx(np.mean(losses), abs=1e-5)
    strict = report.evaluations["moba"].document_loss.reshape(4, 16)[:, -LAST // 4 :].mean(-1)
    np.testing.assert_allclose(report.last_loss_NPD[:, 0, 0], strict, atol=1e-5)
    assert (report.last_kl_NPD[:, 1, 1] == 0).all() and (report.last_kl_NPD[:, 0, 0] > 1e-4).all()
    assert len(np.unique(report.last_loss_NPD[1].round(5))) == 4


def test_report_is_written_and_needs_moba(model, documents, report, tmp_path):
    """Catches NaN in the json, a figure that fails, and a swap of a model that is full already."""
    path = report.result(dense_up_to=24).write(tmp_path, "swap")
    record = json.loads(path.read_text(), parse_constant=lambda text: pytest.fail(text))
    assert [row["attention"] for row in record["variants"]] == list(VARIANTS) and len(record["prefill_decode"]) == 4
    assert path.with_suffix(".png").stat().st_size > 10_000
    assert all(name in report.table() for name in VARIANTS)
    for name, loaded in load_evaluations(path).items():
        own = report.evaluations[name]
        assert loaded.curve.mean == pytest.approx(own.curve.mean) and loaded.curve.se == pytest.approx(own.curve.se)
        assert loaded.curve.trailing == pytest.approx(own.curve.trailing) and loaded.document_keys == own.document_keys
    with under(model, [FULL] * 3), pytest.raises(ValueError, match="512x3"):
        swap(Context(model, "cpu"), documents)
    with pytest.raises(ValueError, match="last_tokens=64"):
        swap(Context(model, "cpu"), documents, last_tokens=64)
