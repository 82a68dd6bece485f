"""evals/position_loss.py: documents as clusters, ranks, what is written; and evals/figures.py."""

import json
import math
import threading

import numpy as np
import pytest
import torch
from matplotlib.figure import Figure

from data.packing import Batch
from evals.context import Context
from evals.figures import length_axis, plot_curves, plot_heatmap, plot_history
from evals.position_loss import evaluate, load_evaluation
from moba.documents import Documents
from train.record.position_loss import PositionCurve, PositionLoss

LENGTH = 64


def make_document(name, tokens):
    """An (id, Batch) pair as data.validation gives it, of LENGTH + 1 tokens."""
    tokens = torch.from_numpy(tokens)
    return name, Batch(tokens[:-1], tokens[1:], torch.arange(LENGTH), Documents.from_lengths([LENGTH]))


def make_documents(count, seed=0):
    rng = np.random.default_rng(seed)
    return [make_document(f"doc-{i}", rng.integers(0, 1000, LENGTH + 1)) for i in range(count)]


def fake_loss(tokens, positions, documents, labels):
    """A loss that depends on tokens, labels and positions, so that any mix-up of them shows."""
    assert tokens.shape == positions.shape == labels.shape == (LENGTH,)
    assert documents.lengths == (LENGTH,) and not torch.is_grad_enabled()
    return (tokens.float() / 1000 + labels.float() / 500 + 10 / (positions + 1)).float()


def expected_losses(document):
    batch = document[1]
    return batch.tokens.double().numpy() / 1000 + batch.labels.double().numpy() / 500 + 10 / np.arange(1, LENGTH + 1)


def test_equals_means_over_documents():
    """Catches labels that are not the next token, positions off by one, and errors not taken over documents."""
    documents = make_documents(7)
    result = evaluate(Context(fake_loss, "cpu"), documents, seq_len=LENGTH)
    losses = np.stack([expected_losses(d) for d in documents])
    table = losses.reshape(7, 16, 4).mean(axis=2)
    np.testing.assert_allclose(result.document_loss, table, rtol=1e-6)
    np.testing.assert_allclose(result.curve.mean, table.mean(axis=0), rtol=1e-6)
    np.testing.assert_allclose(result.curve.se, table.std(axis=0, ddof=1) / np.sqrt(7), rtol=1e-4)
    np.testing.assert_allclose(result.curve.position_mean, losses.mean(axis=0), rtol=1e-6)
    assert result.curve.trailing.value == result.curve.mean[-1] and result.curve.trailing.clusters == 7
    assert result.num_non_finite == 0


@pytest.mark.parametrize("count,world_size", [(5, 2), (7, 3), (2, 4)])
def test_ranks_together_equal_one(count, world_size):
    """Catches documents counted twice or dropped where ranks do not divide them, and ranks that run different numbers
    of forward passes (a hang, with sharded parameters)."""
    documents = make_documents(count)
    alone = evaluate(Context(fake_loss, "cpu"), documents, seq_len=LENGTH)
    calls = [0] * world_size
    results = [None] * world_size
    barrier = threading.Barrier(world_size)
    slots = [None] * world_size

    def run(rank):
        def loss(*args):
            calls[rank] += 1
            return fake_loss(*args)

        def reduce(tensor):
            slots[rank] = tensor.clone()
            barrier.wait()
            total = sum(slots)
            barrier.wait()
            return total

        context = Context(loss, "cpu", rank=rank, world_size=world_size, reduce=reduce)
        results[rank] = evaluate(context, documents, seq_len=LENGTH)

    threads = [threading.Thread(target=run, args=(rank,)) for rank in range(world_size)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert set(calls) == {-(-count // world_size)}
    for result in results:
        for name, value in alone.curve.arrays().items():
            np.testing.assert_array_equal(result.curve.arrays()[name], value, err_msg=name)
        np.testing.assert_array_equal(result.document_loss, alone.document_loss)


def test_keys_name_the_tokens():
    """Catches keys that depend on a document's name, or miss a changed token (the last is a label only)."""
    documents = make_documents(2)
    renamed = [("other name", batch) for _, batch in documents]
    changed = []
    for name, batch in documents:
        tokens = torch.cat((batch.tokens, batch.labels[-1:])).numpy().copy()
        tokens[-1] += 1
        changed.append(make_document(name, tokens))
    context = Context(fake_loss, "cpu")
    keys = [evaluate(context, ds, seq_len=LENGTH).document_keys for ds in (documents, renamed, changed)]
    assert keys[0] == keys[1] and len(set(keys[0])) == 2
    assert not set(keys[0]) & set(keys[2])


def test_non_finite_losses_are_reported():
    """Catches an infinite loss that silently leaves the mean."""

    def loss(tokens, positions, documents, labels):
        return torch.where(positions == 5, math.inf, 1.0)

    result = evaluate(Context(loss, "cpu"), make_documents(3), seq_len=LENGTH)
    assert result.num_non_finite == 3 and np.isfinite(result.curve.mean).all()
    assert np.isnan(result.document_loss[:, 1]).all() and np.isfinite(result.document_loss[:, 2]).all()


def test_save_writes_json_npz_and_png(tmp_path):
    """Catches a missing file or field, NaN in the json, and a curve that does not come back bit for bit."""
    result = evaluate(Context(fake_loss, "cpu"), make_documents(1), seq_len=LENGTH)
    folder, stem = tmp_path / "position_loss", "tokens_000000000001000"
    path = result.result("a run").write(folder, stem, tokens=1000, attention="moba 16x2")
    record = json.loads(path.read_text(), parse_constant=lambda text: pytest.fail(text))
    assert record["tokens"] == 1000 and record["seq_len"] == LENGTH and record["num_documents"] == 1
    assert record["trailing"]["value"] == result.curve.trailing.value and record["trailing"]["se"] is None
    back = load_evaluation(path)
    for name, value in result.curve.arrays().items():
        np.testing.assert_array_equal(back.curve.arrays()[name], value)
    assert back.document_clusters == result.document_clusters == ["doc-0"]
    with np.load(path.with_suffix(".npz")) as fields:
        np.testing.assert_array_equal(fields["document_loss"], result.document_loss)
        assert fields["document_keys"].tolist() == result.document_keys
    assert path.with_suffix(".png").read_bytes().startswith(b"\x89PNG")


def make_curve(length, num_documents=3, level=2.0) -> PositionCurve:
    tracker = PositionLoss(length, "cpu")
    for i in range(num_documents):
        losses = torch.full((length,), level + i)
        cu_seqlens = torch.tensor([0, length], dtype=torch.int32)
        tracker.add(losses, torch.arange(length), torch.zeros(length, dtype=torch.long), cu_seqlens)
    return tracker.curve()


def test_figures_take_what_a_run_has(tmp_path):
    """Catches figures that fail on different lengths, one document, no document or one point, or that touch pyplot."""
    curves = {"a": make_curve(64), "b": make_curve(32, 1), "c": make_curve(64, 0)}
    plot_curves(curves, tmp_path / "curves.png")
    plot_heatmap(
        [(100, curves["b"]), (200, curves["a"]), (300, curves["c"])], tmp_path / "heat.png", [(0, "x"), (100, "y")]
    )
    plot_heatmap([(100, curves["c"])], tmp_path / "empty.png")
    plot_history({"loss": ([1, 2], [3.0, math.nan]), "none": ([], [])}, tmp_path / "history.png", [(0, "sparse")])
    plot_history({"loss": (range(1, 50), [9 / x for x in range(1, 50)])}, tmp_path / "long.png")
    names = ("curves", "heat", "empty", "history", "long")
    assert all((tmp_path / f"{name}.png").stat().st_size > 5000 for name in names)


def test_figures_say_what_is_drawn(tmp_path, monkeypatch):
    """Catches a figure without unit, bucket size, trailing rule or what its bars are."""
    import evals.figures as figures

    drawn = []
    monkeypatch.setattr(figures, "save", lambda figure, path: drawn.append(figure))
    plot_curves({"run": make_curve(64)}, tmp_path / "x.png")
    axes = drawn[0].axes[0]
    assert axes.get_xlabel() == "context position (tokens), in buckets of 4"
    assert "nats" in axes.get_ylabel()
    assert axes.get_legend().get_texts()[0].get_text() == "run: trailing 3.000 +- 2.484 (3 clusters)"
    note = drawn[0].get_supxlabel()
    assert all(word in note for word in ("95 %", "clusters", "trailing loss", "full length"))


@pytest.mark.parametrize(
    ("longest", "labels"), [(32768, ["0", "4K", "8K"]), (8192, ["0", "1K", "2K"]), (2048, ["0", "256", "512"])]
)
def test_lengths_on_an_axis_are_in_one_unit(longest, labels):
    """Catches an axis that reads 256, 0.5K, 768, 1K."""
    axis = Figure().add_subplot().xaxis
    length_axis(axis, longest)
    assert [axis.get_major_formatter()(tick) for tick in axis.get_ticklocs()[:3]] == labels
    assert axis.get_ticklocs()[-1] == longest


def test_available_cohort_uses_what_documents_fill():
    """Catches short documents in buckets they do not fill, a trailing loss that counts them, ignored labels taken for
    losses of zero, and documents of one cluster taken for independent."""
    rng = np.random.default_rng(5)
    lengths, documents = [64, 16, 64, 36, 64], []
    for i, length in enumerate(lengths):
        tokens = torch.from_numpy(rng.integers(0, 1000, length + 1))
        whole = Documents.from_lengths([length])
        documents.append((f"c{i % 2}/{i}", Batch(tokens[:-1], tokens[1:], torch.arange(length), whole)))
    documents[0][1].labels[3:5] = -100

    def loss(tokens, positions, documents, labels):
        return torch.where(labels == -100, 0.0, tokens / 1000.0 + positions)

    context = Context(loss, "cpu", cluster_of=lambda name: name.split("/")[0])
    found = evaluate(context, documents, seq_len=64, num_buckets=16, cohort="available")
    rows = [[[] for _ in range(16)] for _ in documents]
    for row, (_, batch) in zip(rows, documents):
        for position, (token, label) in enumerate(zip(batch.tokens.tolist(), batch.labels.tolist())):
            if label != -100:
                row[position // 4].append(token / 1000 + position)
    for bucket in range(16):
        values = [x for row in rows for x in row[bucket]]
        assert found.curve.mean[bucket] == pytest.approx(np.mean(values), rel=1e-6)
        assert found.curve.count[bucket] == len(values)
    assert found.curve.clusters.tolist() == [2] * 9 + [1] * 7
    assert found.curve.trailing.value == pytest.approx(np.mean([x for i in (0, 2, 4) for x in rows[i][15]]), rel=1e-6)
    assert np.isnan(found.document_loss[1, 4:]).all() and np.isfinite(found.document_loss[1, :4]).all()
    assert found.document_loss[0, 0] == pytest.approx(np.mean(rows[0][0])) and len(rows[0][0]) == 3
    assert found.summary()["cohort"].startswith("available") and found.num_non_finite == 0
