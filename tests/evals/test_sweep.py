"""evals/sweep.py: every setting against the plan it stands for, shares against closed forms, going on after a kill."""

import json
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from PIL import Image

from conf.schema import DataConfig, ModelConfig, SourceConfig, SyntheticConfig
from data.packing import Batch
from data.tokenizer import ByteTokenizer
from evals import probes
from evals.context import Context
from evals.position_loss import evaluate
from evals.protocol import Job
from evals.recall import own_tasks, recall, synthetic_source
from evals.swap import OWN, under
from evals.sweep import run, whole_numbers
from evals.sweep_report import page
from moba.documents import Documents
from moba.gates import select
from moba.kinds import Full, Moba, Routing
from moba.kinds.plan_file import write_plan
from train.model.decoder import Decoder

LENGTH, COUNT = 64, 5
FULL, MOBA = Full(), Moba(8, 3)
TASK = SyntheticConfig(task="mqar", length=64, block_size=8, pairs=4)
GRID = {"block_sizes": "[8,16]", "top_k": "[1..3,9]", "gates": "[mean,random]", "first_blocks": "[0,1]", "samples": "3"}


class Killed(Exception):
    pass


class CountingDecoder(Decoder):
    """Counts its passes, and is killed in one of them."""

    passes, killed_at = 0, -1

    def forward(self, *arguments, **options):
        CountingDecoder.passes += 1
        if self.passes == CountingDecoder.killed_at:
            raise Killed
        return super().forward(*arguments, **options)


@pytest.fixture(scope="module")
def model():
    config = ModelConfig(
        hidden_size=32, num_layers=3, num_heads=4, num_kv_heads=2, head_dim=8, ffn_size=48, init_std=0.4, loss_tile=64
    )
    model = CountingDecoder(config, 384).double()
    model.init_weights(7)
    model.set_attention([MOBA, MOBA, FULL])
    return model.eval()


@pytest.fixture(scope="module")
def documents():
    generator = torch.Generator().manual_seed(2)
    found = []
    for i in range(COUNT):
        tokens = torch.randint(0, 250, (LENGTH + 1,), generator=generator)
        found.append((f"d{i}", Batch(tokens[:-1], tokens[1:], torch.arange(LENGTH), Documents.from_lengths([LENGTH]))))
    return found


def make_job(tmp_path, model, documents, context=None, synthetic=False, **values):
    """A job on these documents, of a run that knew a recall task if `synthetic`."""
    tmp_path.mkdir(exist_ok=True)
    sources = {"main": SourceConfig(synthetic=TASK)} if synthetic else {}
    config = SimpleNamespace(data=DataConfig(tokenizer="bytes", sources=sources), run=SimpleNamespace(name="toy"))
    config.eval = SimpleNamespace(seq_len=None, documents=COUNT)
    stage = SimpleNamespace(seq_len=LENGTH, attention=(MOBA, MOBA, FULL))
    trained = SimpleNamespace(config=config, stage=stage, tokens=7, checkpoint=tmp_path, device=torch.device("cpu"))

    class ToyJob(Job):
        def held_out(self, edges=None):
            return documents

    return ToyJob(context or Context(model, "cpu"), trained, values, tmp_path / "evals")


def test_settings_are_the_plans_they_name(model, documents, tmp_path):
    """Catches a setting that changes other layers or not all of them, differences of other documents, shares of other
    plans, settings that are full attention or cannot be, and a model that does not get its attention back."""
    job = make_job(tmp_path, model, documents, synthetic=True, **GRID)
    before = model.attention
    record = run(job).record
    assert model.attention == before
    rows = {row["attention"]: row for row in record["settings"]}
    expected = [f"{b}x{k}{f}{g}" for b in (8, 16) for g in ("", " random") for f in ("", "+1") for k in (1, 2, 3)]
    assert list(rows) == ["full", *(name for name in expected if "x1+1" not in name)], "9 blocks of 8 are all there is"
    full = evaluate(Context(model, "cpu"), documents, seq_len=LENGTH)
    with under(model, [FULL] * 3), torch.no_grad():
        full = evaluate(Context(model, "cpu"), documents, seq_len=LENGTH).document_loss
        task = recall(Context(model, "cpu"), synthetic_source(job, TASK), samples=3)
    assert rows["full"]["trailing"]["mean"] == pytest.approx(full[:, -1].mean(), abs=1e-8)
    for name, spec in (("8x2", Moba(8, 2)), ("16x3+1 random", Moba(16, 3, "random", 1)), ("16x1", Moba(16, 1))):
        with under(model, [spec, spec, FULL]), torch.no_grad():
            loss = evaluate(Context(model, "cpu"), documents, seq_len=LENGTH).document_loss
            ours = recall(Context(model, "cpu"), synthetic_source(job, TASK), samples=3, variants=(OWN,))
        row, gap = rows[name], (loss - full)[:, -1]
        assert row["loss"]["mean"] == pytest.approx(loss.mean(), abs=1e-8)
        assert row["trailing_minus_full"]["mean"] == pytest.approx(gap.mean(), abs=1e-8) and abs(gap.mean()) > 1e-4
        assert row["trailing_minus_full"]["se"] == pytest.approx(gap.std(ddof=1) / COUNT**0.5, abs=1e-8)
        right = row["recall"]["mqar"]
        assert right["right"] == ours.rows()[0]["all"]["accuracy"]
        assert right["minus_full"]["mean"] == pytest.approx(right["right"] - task.rows()[0]["all"]["accuracy"])
    # 8x2: a query sees its own block, to itself, and one before, in two layers of three.
    pairs = sum(p % 8 + 1 + 8 * (p >= 8) for p in range(LENGTH))
    causal = LENGTH * (LENGTH + 1) // 2
    assert rows["8x2"]["attended_share"] == pytest.approx((2 * pairs + causal) / (3 * causal))
    assert rows["full"]["attended_share"] == 1


def test_probes_and_named_attentions(model, tmp_path):
    """Catches probes of another document, length or attention than the setting's, a plan's file read as another one, a
    changed plan answered from what the old one gave, and shares of the length that become other numbers of blocks."""
    generator = torch.Generator().manual_seed(3)
    documents = []
    for i in range(3):
        tokens = torch.randint(97, 120, (1025,), generator=generator)
        documents.append((f"d{i}", Batch(tokens[:-1], tokens[1:], torch.arange(1024), Documents.from_lengths([1024]))))

    def swept():
        values = {"seq_len": "1K", "block_sizes": "[64,128]", "budgets": "1/4,1/8", "probes": "key_value"}
        job = make_job(tmp_path, model, documents, attentions=str(tmp_path / "plan.yaml"), **values)
        return {row["attention"]: row for row in run(job).record["settings"]}

    for plan in ((Moba(64, 5, first_blocks=1), FULL, FULL), (FULL, Moba(32, 3), FULL)):
        write_plan(tmp_path / "plan.yaml", plan, {})
        rows = swept()
        assert list(rows) == ["full", "64x2", "64x4", "128x1", "128x2", "plan"]
        for name, specs in (("full", [FULL] * 3), ("64x4", [Moba(64, 4)] * 2 + [FULL]), ("plan", plan)):
            asked = [p for d in documents for p in probes.of_document(*d, ByteTokenizer(), "key_value", 1024)]
            with under(model, specs), torch.no_grad():
                found = probes.score(model, asked, "cpu")
            recall = rows[name]["recall"]["key_value"]
            assert recall["right"] == np.mean([right for right, _ in found]) and len(found) == 12
            assert recall["nats"]["mean"] == pytest.approx(np.mean([nats for _, nats in found]), abs=1e-5), name
        assert rows["64x4"]["recall"]["key_value"]["nats_minus_full"]["mean"] != 0
    with pytest.raises(ValueError, match="budgets=2: shares of the length"):
        run(make_job(tmp_path, model, documents, block_sizes="8", budgets="2"))
    with pytest.raises(ValueError, match="give one of the two"):
        run(make_job(tmp_path, model, documents, block_sizes="8", budgets="1/2", top_k="3"))


def test_captured_shares_are_those_of_the_dense_model(model, documents, tmp_path):
    """Catches queries and keys of the sparse model, a selection of another gate, sinks that are left out, queries that
    drop nothing, and layers that have full attention: against dense softmax and what each query may see."""
    grid = {"block_sizes": "8", "top_k": "3", "gates": "[mean,sinks,bounds]", "first_blocks": "[0,1]"}
    result = run(make_job(tmp_path, model, documents, **grid, captured="true"))
    rows = {row["attention"]: row for row in result.record["settings"]}
    assert list(rows) == ["full", "8x3", "8x3+1", "8x3 sinks", "8x3 bounds", "8x3+1 bounds"]
    assert rows["full"]["captured"]["mean"] == 1 and rows["full"]["captured_by_layer"] == [1] * 3
    seen = []
    for layer in (0, 1):
        attention = model.model.layers[layer].self_attn
        attention.observer = lambda _, q, k, v, documents: seen.append((q, k))
    with under(model, [FULL] * 3), torch.no_grad():
        for _, batch in documents:
            model.logits(batch.tokens, batch.positions, batch.documents)
    for layer in (0, 1):
        model.model.layers[layer].self_attn.observer = None
    for name, gate, first in (("8x3", "mean", 0), ("8x3 sinks", "mean", 0), ("8x3+1 bounds", "bounds", 1)):
        shares = []
        for q, k in seen:
            selection = select(Routing(8, 3, gate, first), q, k, documents=Documents.from_lengths([LENGTH]))
            for h in range(4):
                for t in range(24, LENGTH):
                    p = torch.softmax(k[: t + 1, h // 2] @ q[t, h] * 8**-0.5, 0)
                    chosen, tokens = selection[h, t].tolist(), range(4 if "sinks" in name else 0)
                    shares.append(sum(float(p[s]) for s in range(t + 1) if s // 8 in chosen or s in tokens))
        by_layer = np.array(shares).reshape(COUNT, 2, -1).mean((0, 2))
        assert rows[name]["captured_by_layer"] == pytest.approx([*by_layer, 1], abs=1e-9)
        assert rows[name]["captured"]["mean"] == pytest.approx((by_layer.sum() + 1) / 3, abs=1e-9)
    assert rows["8x3 sinks"]["captured"]["mean"] > rows["8x3"]["captured"]["mean"] > 0.3
    path = result.write(tmp_path / "evals", "sweep", commit=None)
    assert "8x3 sinks" in page(json.loads(path.read_text()), path) and "captured" in result.text
    smallest = {"block_sizes": "8", "top_k": "1", "gates": "sinks", "first_blocks": "1"}  # sinks need no room for it
    assert run(make_job(tmp_path, model, documents, **smallest)).record["settings"][1]["attention"] == "8x1 sinks"


def test_an_interrupted_sweep_goes_on(model, documents, tmp_path):
    """Catches documents measured twice or left out after a kill, and numbers that depend on it; a wider grid then
    measures the new settings alone."""
    grid = {"block_sizes": "8", "top_k": "1..3"}
    CountingDecoder.passes, CountingDecoder.killed_at = 0, -1
    whole = run(make_job(tmp_path / "whole", model, documents, **grid)).record
    assert CountingDecoder.passes == 4 * COUNT
    CountingDecoder.passes, CountingDecoder.killed_at = 0, 12
    with pytest.raises(Killed):
        run(make_job(tmp_path / "again", model, documents, **grid))
    assert model.attention == (MOBA, MOBA, FULL)
    CountingDecoder.passes, CountingDecoder.killed_at = 0, -1
    assert run(make_job(tmp_path / "again", model, documents, **grid)).record == whole
    assert CountingDecoder.passes == 4 * COUNT - 11
    CountingDecoder.passes = 0
    wider = run(make_job(tmp_path / "again", model, documents, **grid | {"top_k": "1..5"})).record
    assert CountingDecoder.passes == 2 * COUNT and wider["settings"][:4] == whole["settings"]


def test_processes_share_the_documents(model, documents, tmp_path):
    """Catches documents that are counted twice or by nobody: two ranks' shares add up to one's numbers."""
    one = run(make_job(tmp_path / "one", model, documents, block_sizes="8", synthetic=True))
    sums = []
    for rank in range(2):
        context = Context(model, "cpu", rank=rank, world_size=2, reduce=lambda t: sums.append(t.clone()) or t)
        run(make_job(tmp_path / "two", model, documents, context, block_sizes="8", synthetic=True))
    halves = len(sums) // 2
    for name, (first, second) in zip(("document_loss", "right_mqar"), zip(sums[:halves], sums[halves:])):
        np.testing.assert_array_equal((first + second).numpy(), one.arrays[name])


def test_figure_and_report_show_every_line(model, documents, tmp_path):
    """Catches a figure that is blank or fails with gates, first blocks and tasks, and a page without its settings."""
    result = run(make_job(tmp_path, model, documents, synthetic=True, **GRID))
    path = result.write(tmp_path / "evals", "sweep", commit=None)
    assert np.asarray(Image.open(path.with_suffix(".png")).convert("L")).std() > 10
    shown = page(json.loads(path.read_text()), path)
    assert "16x3+1 random" in shown and "mqar: right" in shown and "data:image/png" in shown
    assert set(result.numbers) == {f"trailing_minus_full_{row['attention']}" for row in result.record["settings"][1:]}


def test_mistakes_are_refused_by_name(model, documents, tmp_path):
    """Catches ranges that are none, sizes that are full attention, and a model without MoBA that is given no size."""
    cases = {
        "top_k=0": "'0' is no number from 1 to 10,000",
        "top_k=3..2": "'3..2' is no number",
        "top_k=two": "'two' is no",
    }
    cases |= {
        "first_blocks=-1": "'-1' is no number from 0 to 10,000",
        "block_sizes=[8,x]": "block_sizes=x",
        "gates=[best]": "best",
    }
    cases |= {"top_k=8": "every setting is full attention at 64 tokens"}
    for argument, words in cases.items():
        key, _, value = argument.partition("=")
        with pytest.raises(ValueError, match=words.replace("[", r"\[")):
            run(make_job(tmp_path, model, documents, **{key: value}))
    with under(model, [FULL] * 3):
        with pytest.raises(ValueError, match="name block_sizes="):
            run(make_job(tmp_path, model, documents))
        rows = run(make_job(tmp_path, model, documents, block_sizes="8", top_k="2")).record["settings"]
    assert [row["attention"] for row in rows] == ["full", "8x2"] and rows[1]["attended_share"] < 0.4
    assert whole_numbers({"top_k": "[4,1..3]"}, "top_k", "1", 1) == [1, 2, 3, 4]
    with pytest.raises(ValueError, match=r"from 1 to 10,000"):  # rather than count to it
        whole_numbers({"top_k": "1..999999999"}, "top_k", "1", 1)
    assert own_tasks(DataConfig()) == {}
