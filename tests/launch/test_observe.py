"""launch/observe.py: what the suites of evaluation in training measure, and that they only observe."""

from types import SimpleNamespace

import pytest
import torch

from conf.schema import EvalConfig, LoggingConfig, ModelConfig, RunConfig, RunSection, SyntheticConfig
from data.synthetic import SyntheticSource
from data.tokenizer import load_tokenizer
from evals.swap import VARIANTS, under, variant
from launch.observe import HeldOutEvaluator
from moba.kinds import Full, Moba
from train.engine.world import World
from train.model.decoder import Decoder

LENGTH, MOBA = 64, Moba(4, 2)


class Engine:
    """What the loop hands over: callable, with the model as `model`."""

    def __init__(self, model):
        self.model = model

    def __call__(self, *arguments):
        return self.model(*arguments)


@pytest.fixture
def engine():
    config = ModelConfig(
        hidden_size=32, num_layers=2, num_heads=2, num_kv_heads=1, head_dim=16, ffn_size=48, loss_tile=64
    )
    model = Decoder(config, 16)
    model.init_weights(1)
    model.set_attention([MOBA, Full()])
    return Engine(model.eval())


@pytest.mark.parametrize("suite", ["loss", "swap"])
def test_suites(engine, suite, tmp_path, monkeypatch):
    """Catches a suite that leaves something out, measures another attention than it says, or does not give the model's
    own back; and files without what was found."""
    monkeypatch.setattr(World, "sum_over_data", lambda world, tensor: tensor)
    source = SyntheticSource("v", SyntheticConfig(length=LENGTH, pairs=4, symbols=16), 16, held_out=True)
    config = RunConfig(run=RunSection(dir=str(tmp_path)), eval=EvalConfig(suite=suite, documents=6))
    stage = SimpleNamespace(seq_len=LENGTH, name="sparse")
    evaluator = HeldOutEvaluator(source, config, SimpleNamespace(stages=[stage]), World(0, 1, 0, torch.device("cpu")))
    before, state = engine.model.attention, torch.random.get_rng_state()
    curve, scalars = evaluator(engine, stage, 1000)
    assert engine.model.attention == before and torch.equal(torch.random.get_rng_state(), state)
    assert all(layer.self_attn.observer is None for layer in engine.model.model.layers)
    routed = {
        "route/captured",
        "route/oracle_share",
        "route/load_entropy",
        "route/dead_share",
        "recall_all",
        "recall_far",
    }
    swapped = {f"trailing_{name}" for name in VARIANTS if name != "moba"}
    wanted = {"loss": set(), "swap": routed | swapped}[suite]  # mini is swap without the variants
    assert wanted <= set(scalars) and not (routed | swapped) - wanted & set(scalars)
    assert scalars["seconds"] > 0 and curve.trailing.clusters > 0
    layers = {} if suite == "loss" else {0: ("captured", "distance", "load_entropy")}  # the other one is full
    assert set(evaluator.routing) == set(layers) and all(set(layers[i]) <= set(evaluator.routing[i]) for i in layers)
    assert {path.suffix for path in (tmp_path / "position_loss").iterdir()} == {".npz", ".json", ".png"}
    if suite == "swap":
        assert 0 < scalars["route/captured"] <= scalars["route/oracle_share"] < 1
        with under(engine.model, variant(before, "local")):
            again, _ = HeldOutEvaluator(
                source, RunConfig(run=config.run, eval=EvalConfig(suite="loss", documents=6)),
                SimpleNamespace(stages=[stage]), World(0, 1, 0, torch.device("cpu")),
            )(engine, stage, 2000)  # fmt: skip
        assert scalars["trailing_local"] == again.trailing.value != curve.trailing.value


def test_samples_go_on_with_held_out_documents_and_change_nothing(engine, tmp_path, monkeypatch):
    """Catches samples off unless asked for, of other documents, at another place than the end of the context, that
    differ from call to call, or that change the model's attention, the random state or the losses."""
    monkeypatch.setattr(World, "sum_over_data", lambda world, tensor: tensor)
    source = SyntheticSource("v", SyntheticConfig(length=LENGTH, pairs=4, symbols=16), 16, held_out=True)
    stage, world = SimpleNamespace(seq_len=LENGTH, name="sparse"), World(0, 1, 0, torch.device("cpu"))
    found = []
    for samples in (0, 2, 2):
        config = RunConfig(run=RunSection(dir=str(tmp_path)), logging=LoggingConfig(samples=samples))
        evaluator = HeldOutEvaluator(source, config, SimpleNamespace(stages=[stage]), world)
        before, state = engine.model.attention, torch.random.get_rng_state()
        curve, _ = evaluator(engine, stage, 1000)
        assert engine.model.attention == before and torch.equal(torch.random.get_rng_state(), state)
        found.append((curve.total_mean, evaluator.samples))
    assert found[0][1] == [] and found[1] == found[2] and found[0][0] == found[1][0]
    samples = found[1][1]
    documents = list(evaluator._documents[LENGTH])
    assert [sample.document for sample in samples] == [name for name, _ in documents[:2]]
    text = load_tokenizer("bytes").decode(documents[0][1].tokens.tolist())
    assert samples[0].prompt + samples[0].reference == text and samples[0].generated
