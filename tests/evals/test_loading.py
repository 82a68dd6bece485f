"""evals/loading.py and launch/evaluate.py on a small run directory, written by the real engine and checkpoint code."""

import json
import random
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
import yaml
from transformers import LlamaConfig, LlamaForCausalLM

from conf.build import ConfigError
from conf.schema import RopeConfig
from conf.trajectory import to_dict
from conf.validate import freeze
from data.tokenizer import load_tokenizer
from evals.loading import attention_plan, load_trained, resolve_device
from launch.compare import main as compare
from launch.evaluate import main
from moba.documents import Documents
from moba.kinds import Full, Moba, Sliding
from train.checkpoint.checkpoint_dir import CheckpointError
from train.model.decoder import Decoder
from train.record.position_loss import PositionCurve

ROOT = Path(__file__).resolve().parents[2]
MOBA = Moba(block_size=16, top_k=2)
FULL = Full()
WRITE_RUN = """
import sys
from pathlib import Path
import yaml
from conf.validate import freeze
from train.checkpoint import store
from train.engine.world import init_world, shutdown
from train.model.decoder import Decoder
from train.engine.optim import build_engine
run_dir = Path(sys.argv[1])
text = (run_dir / "config.yaml").read_text()
config = freeze(yaml.safe_load(text))
world = init_world("cpu")
model = Decoder(config.model, 384)
model.init_weights(5)
engine = build_engine(model, config, world)
common = dict(state={}, tensors={}, config_yaml=text, stage_end=True, keep=9)
for tokens in (1024, 2048, 3072):
    store.save(run_dir, engine, tokens=tokens, **common)
shutdown()
"""


@pytest.fixture(scope="module")
def run_dir(tmp_path_factory):
    """A run of two stages, MoBA to 2048 tokens and full attention after, with checkpoints at 1024, 2048 and 3072."""
    folder = tmp_path_factory.mktemp("run")
    words = random.Random(0)
    documents = [{"id": f"d{i}", "text": "".join(words.choices("abcde ", k=300 + 10 * i))} for i in range(4)]
    (folder / "held_out.jsonl").write_text("".join(json.dumps(d) + "\n" for d in documents), encoding="utf-8")
    source = {"path": str(folder / "held_out.jsonl")}
    config = freeze(
        {
            "run": {"dir": str(folder), "device": "cpu"},
            "model": {"hidden_size": 32, "num_layers": 2, "num_heads": 2, "ffn_size": 48, "init_std": 0.3},
            "data": {"sources": {"main": source}, "validation": source, "cache_dir": str(folder / "cache")},
            "schedule": {
                "tokens": 4096,
                "seq_len": 128,
                "batch_tokens": 1024,
                "stages": {
                    "sparse": {
                        "tokens": 2048,
                        "attention": {"block_size": 16, "top_k": 2, "full_last": 1, "backend": "torch"},
                        "rope": {"theta": 500.0},
                    },
                    "dense": {"tokens": 2048, "attention": {"kind": "full"}},
                },
            },
            "eval": {"documents": 4},
        }
    )
    (folder / "config.yaml").write_text(yaml.safe_dump(to_dict(config), sort_keys=False), encoding="utf-8")
    subprocess.run([sys.executable, "-c", WRITE_RUN, str(folder)], cwd=ROOT, check=True, timeout=200)
    return folder


def test_a_checkpoint_is_measured_as_it_was_trained(run_dir):
    """Catches weights, attention or RoPE of another stage: a checkpoint at a stage's end belongs to that stage."""
    trained = load_trained(run_dir / "checkpoints" / "tokens_000000000002048", "cpu")
    assert trained.tokens == 2048 and trained.stage.name == "sparse" and not trained.model.training
    assert trained.model.attention == (MOBA, FULL)  # on any backend: the run's own may not exist here
    expected = Decoder(trained.config.model, 384)
    expected.init_weights(5)
    for (name, ours), theirs in zip(trained.model.named_parameters(), expected.parameters()):
        assert torch.equal(ours, theirs), name
    expected.set_rope(RopeConfig(theta=500.0))
    assert torch.equal(trained.model.rope.inv_freq, expected.rope.inv_freq)


def test_a_run_directory_means_its_newest_checkpoint(run_dir):
    """Catches an older checkpoint, or the first stage's attention, for a finished run."""
    trained = load_trained(run_dir)
    assert trained.tokens == 3072 and trained.stage.name == "dense" and trained.model.attention == (FULL, FULL)


@torch.no_grad()
def test_a_hugging_face_directory_is_a_model_too(tmp_path):
    """Catches weights, RoPE or a MoBA plan that are not read, a plan that cannot be, and figures titled "None"."""
    sizes = {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 2}
    torch.manual_seed(0)
    theirs = LlamaForCausalLM(LlamaConfig(vocab_size=258, initializer_range=0.3, **sizes)).eval()
    theirs.save_pretrained(tmp_path)
    trained = load_trained(tmp_path, "cpu")
    assert trained.model.attention == (FULL, FULL) and trained.stage.seq_len == 2048
    assert trained.config.run.name == tmp_path.name
    with pytest.raises(ValueError, match="not trained with MoBA"):
        attention_plan("moba", trained)
    tokens = torch.randint(0, 258, (80,))
    pack = (tokens, torch.arange(80), Documents.from_lengths([80]))
    torch.testing.assert_close(trained.model.logits(*pack), theirs(tokens[None]).logits[0], rtol=1e-4, atol=1e-4)
    assert trained.model(*pack, tokens).shape == (80,)

    config = json.loads((tmp_path / "config.json").read_text())
    config["moba"] = {"plan": [["moba", 16, 2], ["full", None, None]]}
    (tmp_path / "config.json").write_text(json.dumps(config))
    sparse = load_trained(tmp_path, "cpu")
    assert sparse.model.attention == attention_plan("moba", sparse) == (MOBA, FULL)
    for plan in ([["moba", 16, 2]], [["moba", 16], ["full"]], "512x3"):
        (tmp_path / "config.json").write_text(json.dumps(config | {"moba": {"plan": plan}}))
        with pytest.raises(ConfigError, match=r"moba|MoBA"):
            load_trained(tmp_path, "cpu")


def test_attention_by_name(run_dir):
    """Catches MoBA put on layers that the run keeps full, and names that are misread."""
    sparse = load_trained(run_dir / "checkpoints" / "tokens_000000000001024")
    dense = load_trained(run_dir)
    other = Moba(block_size=1024, top_k=3)
    assert attention_plan("stage", sparse) == (MOBA, FULL)
    assert attention_plan("full", sparse) == (FULL, FULL)
    assert attention_plan("moba", sparse) == attention_plan("moba", dense) == (MOBA, FULL)
    assert attention_plan("1Kx3", sparse) == (other, FULL)
    assert attention_plan("1Kx3+1", sparse) == (Moba(1024, 3, first_blocks=1), FULL)
    assert attention_plan("1Kx3", dense) == (other, other)
    slide = Sliding(window=8)
    for kept, expected in ((MOBA, (slide, other)), (FULL, (slide, other))):
        patterned = replace(sparse, stage=replace(sparse.stage, attention=(slide, kept)))
        assert attention_plan("1Kx3", patterned) == expected and attention_plan("full", patterned) == (slide, FULL)
    for text in ("sparse", "512", "512x", "x3", "axb", "16x0", "16x3+", "16x2+2"):
        with pytest.raises(ValueError):
            attention_plan(text, sparse)


def test_attention_from_a_file(run_dir, tmp_path, capsys):
    """Catches a plan file that reaches only some of the layers, or names its results by its path."""
    path = tmp_path / "tuned.yaml"
    path.write_text("plan: [[full, null, null], [moba, 16, 3, 1]]")
    trained = load_trained(run_dir)
    assert attention_plan(str(path), trained) == (FULL, Moba(16, 3, first_blocks=1))
    slide = replace(trained, stage=replace(trained.stage, attention=(Sliding(8), FULL)))
    with pytest.raises(ValueError, match="layer 0 has sliding 8, which no plan file"):
        attention_plan(str(path), slide)
    main([f"run={run_dir}", f"attention={path}", "device=cpu", f"to={tmp_path}"])
    record = json.loads((tmp_path / "position_loss_000000000003072_128_tuned.json").read_text())
    assert record["attention"] == "full (layer 0), moba 16x3 (first 1) (layer 1)"
    path.write_text("plan: [[full, null, null]]")
    with pytest.raises(SystemExit):
        main([f"run={run_dir}", f"attention={path}"])
    assert f"{path}: plan has 1 entries for a model of 2 layers" in capsys.readouterr().err


def test_evaluate_writes_what_the_model_scores(run_dir, capsys):
    """Catches a command that measures other weights, documents, lengths or attention than it says."""
    main([f"run={run_dir}", "evals=[position_loss]", "device=cpu", "attention=16x2"])
    main([f"run={run_dir}", "attention=full", "device=cpu", "documents=2", "seq_len=64", f"to={run_dir / 'elsewhere'}"])
    stem = run_dir / "evals" / "position_loss_000000000003072_128_16x2"
    record = json.loads(stem.with_suffix(".json").read_text())
    curve = PositionCurve.from_npz(stem.with_suffix(".npz"))
    assert record["attention"] == "moba 16x2" and record["num_documents"] == 4 and record["seq_len"] == 128
    assert f"{curve.trailing.value:.4f}" in capsys.readouterr().out
    assert stem.with_suffix(".png").exists()

    model = Decoder(freeze(yaml.safe_load((run_dir / "config.yaml").read_text())).model, 384)
    model.init_weights(5)
    text = json.loads((run_dir / "held_out.jsonl").read_text().splitlines()[1])["text"]
    tokens = torch.from_numpy(load_tokenizer("bytes").document(text)[:129].astype(np.int64))
    pack = (tokens[:-1], torch.arange(128), Documents.from_lengths([128]), tokens[1:])
    row = [document["id"] for document in record["documents"]].index("d1")
    model.set_attention([MOBA] * 2)
    with torch.no_grad():
        means = model(*pack).double().view(16, 8).mean(dim=1).numpy()
        model.set_attention([FULL] * 2)
        dense = model(*pack).double().view(16, 8).mean(dim=1).numpy()
    np.testing.assert_allclose(record["document_loss"][row], means, rtol=1e-5)
    assert not np.allclose(means, dense, rtol=1e-4)

    shorter = json.loads((run_dir / "elsewhere" / "position_loss_000000000003072_64_full.json").read_text())
    assert shorter["num_documents"] == 2 and shorter["seq_len"] == 64 and shorter["attention"] == "full"


@pytest.mark.parametrize(
    "arguments,words",
    [
        ([], ["run"]),
        (["evals=[needles]"], ["needles", "position_loss"]),
        (["evals=[routing]"], ["attention=512x3"]),
        (["evals=[recall]", "tasks=[chess]"], ["tasks=chess", "passkey"]),
        (["cohort=all"], ["cohort=all", "fixed"]),
        (["bucket=3"], ["bucket=3", "divide"]),
        (["cluster=("], ["cluster=(", "regular expression"]),
        (["cluster=shelf"], ["cluster=shelf: no document's id begins so; they are "]),
        (["id_field=package"], ["id_field", "data="]),
        (["attention=sparse"], ["attention", "512x3"]),
        (["documents=0"], ["documents=0"]),
        (["seq_len=1M"], ["seq_len=", "332"]),
        (["device=tpu"], ["tpu"]),
        (["lenght=3"], ["lenght"]),
    ],
)
def test_mistakes_are_one_message(run_dir, capsys, arguments, words):
    """Catches a traceback, or a message that does not name what is wrong."""
    with pytest.raises(SystemExit) as stopped:
        main([f"run={run_dir}", *arguments] if arguments else [])
    assert stopped.value.code == 2
    message = capsys.readouterr().err
    assert message.startswith("error: ") and all(word in message for word in words), message


def test_routing_swap_and_recall_by_one_command(run_dir, capsys):
    """Catches an eval that the command does not reach, measures another attention than asked for, or forgets where its
    numbers come from."""
    main([f"run={run_dir}", "evals=[routing,swap,recall]", "attention=16x2", "device=cpu", "documents=2", "samples=2",
          "tasks=[passkey,straddle]", "last_tokens=8", f"to={run_dir / 'all'}"])  # fmt: skip
    out, records = capsys.readouterr().out, {}
    for path in (run_dir / "all").glob("*.json"):
        records[path.stem.split("_")[0]] = record = json.loads(path.read_text())
        assert record["attention"] == "moba 16x2" and record["dense_up_to"] == 32 and record["seconds"] > 0
        assert {"commit", "config", "seed", "device", "date", "tokens", "torch"} <= set(record) and path.name in out
        figures = list(path.parent.glob(f"{path.stem}*.png"))
        assert len(figures) == (3 if "routing" in path.stem else 1)
        assert all(figure.stat().st_size > 10_000 for figure in figures)
    assert set(records) == {"routing", "swap", "recall"} and set(records["recall"]["tasks"]) == {"passkey", "straddle"}
    assert records["recall"]["tasks"]["straddle"]["task"]["block_size"] == 16 and records["recall"]["seed"] == 0
    assert records["routing"]["layers"] == [0, 1] and records["swap"]["last_tokens"] == 8


def test_compare_subtracts_document_by_document(run_dir, capsys, tmp_path):
    """Catches sides that are mixed up, or not paired, and a run directory that is not understood."""
    for attention in ("full", "16x2"):
        main([f"run={run_dir}", f"attention={attention}", "device=cpu", f"to={run_dir / 'sides'}"])
    sides = [
        run_dir / "sides" / f"position_loss_000000000003072_128_{attention}.json" for attention in ("16x2", "full")
    ]
    losses = [np.array(json.loads(side.read_text())["document_loss"]) for side in sides]
    capsys.readouterr()
    compare([*map(str, sides), "gap=0.5", f"to={tmp_path}"])
    out = capsys.readouterr().out
    record = json.loads(next(tmp_path.glob("*.json")).read_text())
    np.testing.assert_allclose(record["difference"], (losses[0] - losses[1]).mean(axis=0), atol=1e-9)
    assert record["num_documents"] == 4 and record["needed_for_interval"][-1] >= 2 and "4 documents" in out
    assert next(tmp_path.glob("*.png")).stat().st_size > 10_000
    assert f"{record['difference'][-1]:+.4f}" in out and abs(record["difference"][-1]) > 1e-3
    for arguments, words in (([str(sides[0])], "two"), ([str(run_dir), str(sides[0])], "no evaluation"),
                             ([*map(str, sides), "gap=-1"], "gap=-1")):  # fmt: skip
        with pytest.raises(SystemExit) as stopped:
            compare(arguments)
        assert stopped.value.code == 2 and words in capsys.readouterr().err


def test_no_checkpoint_and_no_gpu(tmp_path):
    """Catches a search that ends in a traceback."""
    with pytest.raises(CheckpointError):
        load_trained(tmp_path)
    assert resolve_device("cpu").type == "cpu"
    if not torch.cuda.is_available():
        with pytest.raises(ValueError, match="device=cuda"):
            resolve_device("cuda")
    assert issubclass(ConfigError, ValueError)  # what a damaged config.yaml raises is caught with the others
