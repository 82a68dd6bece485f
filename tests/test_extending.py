"""docs/extending.md: its code, run from outside the project as a reader would."""

import gzip
import json
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from conf.formats import FORMATS
from conf.rates import RATES
from conf.validate import ConfigError, trajectory_diff
from data.shards import TokenShards
from data.text import READERS
from launch import prepare_data
from launch.config import load
from train.record.metrics import read_metrics

ROOT = Path(__file__).resolve().parents[1]
PAGE = (ROOT / "docs" / "extending.md").read_text(encoding="utf-8")
KIND, DATA, EVAL, RATE = re.findall(r"```python\n(.*?)```", PAGE, re.S)

HEAD = "import sys\nfrom pathlib import Path\nsys.path.insert(0, {!r})\nimport train.engine.world\n"
RUN = """
import sys
run, at = sys.argv[1], "schedule.stages.sparse.attention"
length = ["schedule.seq_len=256", "schedule.batch_tokens=1K", "schedule.block_size=16", "schedule.tokens=12K"]
overrides = ["+exp=quickstart", f"{at}.kind=strided", f"{at}.stride=2", *length, f"run.dir={run}", "run.device=cpu"]
overrides += ["eval.documents=2", "logging=quiet"]
from launch import train
train.main(overrides)
# As the command ends: threads of the process group may meet an interpreter in ruins otherwise, and abort.
train.leave(0)
"""

LOOK = """
import sys
import torch
from launch import evaluate, export, generate
from launch.config import load
from moba.documents import Documents
from moba.kv_cache import KVCache
from evals.loading import attention_plan, load_trained
from train.plan.plan import make_plan
run, at = sys.argv[1], "schedule.stages.sparse.attention"
plan = make_plan(load(["+exp=quickstart", f"{at}.kind=strided", f"{at}.stride=2"]), 384).text()
assert "strided 64/2 on torch" in plan, plan

kind = Strided(8, 3)
seen = [[k <= q and (k // 8 == q // 8 or k // 8 % 3 == 0) for k in range(100)] for q in range(100)]
assert kind.attended_pairs(100) == sum(map(sum, seen))

checkpoint = sorted(p for p in (Path(run) / "checkpoints").iterdir() if p.name.startswith("tokens"))[0]
trained = load_trained(checkpoint, "cpu")
model, tokens = trained.model, torch.arange(100) % 50
assert str(model.attention[0]) == "strided 16/2", model.attention
with torch.no_grad():
    whole = model.logits(tokens, torch.arange(100), Documents.from_lengths([100]))
    cache = KVCache(len(model.attention))
    one = Documents.from_lengths([1])
    parts = [model.logits(tokens[i : i + 1], torch.tensor([i]), one, cache) for i in range(100)]
    torch.testing.assert_close(torch.cat(parts), whole, rtol=1e-3, atol=1e-4)
    model.set_attention(attention_plan("full", trained))
    dense = model.logits(tokens, torch.arange(100), Documents.from_lengths([100]))
assert not torch.allclose(dense[40:], whole[40:], atol=1e-3)
evaluate.main([f"run={checkpoint}", "evals=[position_loss]", "documents=2", "device=cpu", "seq_len=256"])
print("all done", flush=True)
export.main([f"run={checkpoint}", f"to={run}/hf"])
"""


def test_a_kind_of_attention_is_what_the_page_says(tmp_path):
    """Catches a place outside the kind's own file that has to know of it: a kind added from outside is planned, trains
    on two ranks, decodes as it reads, is evaluated, densely too, and is refused by export."""
    train, look, run = tmp_path / "train.py", tmp_path / "look.py", tmp_path / "run"
    train.write_text(HEAD.format(str(ROOT)) + KIND + RUN)
    look.write_text(HEAD.format(str(ROOT)) + KIND + LOOK)
    torchrun = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node=2"]
    options = {"cwd": tmp_path, "capture_output": True, "text": True, "timeout": 280}
    done = subprocess.run([*torchrun, str(train), str(run)], **options)
    assert done.returncode == 0, done.stdout[-2000:] + done.stderr[-4000:]
    done = subprocess.run([sys.executable, str(look), str(run)], **options)
    assert "all done" in done.stdout, done.stdout[-2000:] + done.stderr[-4000:]
    assert done.returncode == 2 and "strided attention" in done.stderr and "Traceback" not in done.stderr, done.stderr
    assert not (run / "hf").exists()


# --- data and learning rate: one run with both

PEAK, MIN_RATIO, POWER, WARMUP, STEP, SPAN = 1e-3, 0.25, 1.5, 512, 256, 3072
SMALL = [
    "+exp=quickstart",
    "schedule=full_only",
    *(f"model.{key}" for key in ("hidden_size=32", "num_layers=2", "num_heads=2", "num_kv_heads=1", "ffn_size=64")),
    *(f"schedule.{key}" for key in (f"tokens={SPAN}", "seq_len=64", f"batch_tokens={STEP}")),
    *(f"optim.lr.{key}" for key in ("kind=polynomial", f"peak={PEAK}", f"min_ratio={MIN_RATIO}", f"power={POWER}")),
    *("data=files", "data.chat_template=plain", "data.cache_dir=cache", "data.sources.main.format=quiz"),
    *("data.sources.main.answer_field=solution", f"optim.lr.warmup_tokens={WARMUP}", "~data.validation"),
    *(
        "run.device=cpu",
        "data.path=quiz.csv",
        "run.dir=run",
        "checkpoint.every_tokens=1024",
        "logging=quiet",
        "logging.wandb=disabled",
    ),
]
TRAIN = """
from launch import config, train
train.leave(config.run_command(train.main, sys.argv[1:], ""))
"""
EVALUATE = """
from launch import evaluate
evaluate.main(sys.argv[1:])
"""


def python(folder: Path, code: str, *arguments: str, root: Path = ROOT) -> subprocess.CompletedProcess[str]:
    """`code`, behind the page's on data and learning rate, run in `folder` with the project in `root`."""
    script = folder / "script.py"
    script.write_text(HEAD.format(str(root)) + DATA + RATE + code)
    command = [sys.executable, str(script), *arguments]
    return subprocess.run(command, cwd=folder, capture_output=True, text=True, timeout=200)


@pytest.fixture(scope="module")
def trained(tmp_path_factory) -> tuple[Path, str]:
    """(folder with quiz.csv, cache/ and the run directory run/, what the run said) of a run with both."""
    folder = tmp_path_factory.mktemp("extended")
    lines = [f'{i},"{i} and ""{i}""?",{2 * i}\n' for i in range(40)]
    (folder / "quiz.csv").write_text("id,question,solution\n" + "".join(lines))
    done = python(folder, TRAIN, *SMALL)
    assert done.returncode == 0, done.stdout[-2000:] + done.stderr[-4000:]
    return folder, done.stdout


@pytest.fixture
def page(monkeypatch) -> None:
    """What the page adds on data and learning rate, in this process for the time of a test."""
    for table, code, name in ((READERS, DATA, ".csv"), (FORMATS, DATA, "quiz"), (RATES, RATE, "polynomial")):
        found: dict = {}
        exec(compile(code, "docs/extending.md", "exec"), found)
        monkeypatch.setitem(table, name, table.pop(name))


def test_a_format_of_data_is_what_the_page_says(trained, page, monkeypatch, capsys):
    """Catches a place that knows formats or endings by name: the answers of a CSV file alone are supervised, by
    training and by prepare_data, which make the same tokens; a column that is not there, and a damaged file, are
    named."""
    folder, _ = trained
    (cached,) = (path.parent for path in (folder / "cache").glob("*/meta.json"))
    assert len(read_metrics(folder / "run" / "metrics.jsonl")) >= SPAN // STEP
    shards = TokenShards(cached)
    tokens, supervised = (read(7, 0, int(shards.lengths[7])) for read in (shards.tokens, shards.supervised))
    assert bytes(t for t in tokens.tolist() if t < 256) == b'User: 7 and "7"?\nAssistant: 14\n'
    assert bytes(t for t in tokens[supervised].tolist() if t < 256) == b" 14" and shards.ids[7] == "7"

    monkeypatch.chdir(folder)
    Path("quiz.csv.gz").write_bytes(gzip.compress(Path("quiz.csv").read_bytes()))
    arguments = ["tokenizer=bytes", "format=quiz", "chat_template=plain"]
    prepare_data.main(["source=quiz.csv.gz", "to=shards", "answer_field=solution", *arguments])
    assert TokenShards(folder / "shards").fingerprint == shards.fingerprint and len(shards.ids) == 40

    Path("damaged.csv").write_text('question,answer\n"a"b,c\n')
    for source, named in (
        (
            "quiz.csv",
            "quiz.csv, conversation 0: a row has no 'answer'; it has id, question, solution. Set answer_field",
        ),
        ("damaged.csv", "damaged.csv cannot be read as csv: ',' expected after '\"'"),
    ):
        with pytest.raises(SystemExit):
            prepare_data.main([f"source={source}", f"to=no_{source}", *arguments])
        assert named in capsys.readouterr().err


def rate(tokens: int) -> float:
    """The learning rate of the step that ends after `tokens`, from the page's words."""
    left = (SPAN - tokens) / (SPAN - WARMUP)
    return PEAK * (tokens / WARMUP if tokens < WARMUP else MIN_RATIO + (1 - MIN_RATIO) * left**POWER)


def test_a_kind_of_learning_rate_is_what_the_page_says(trained, page):
    """Catches a place that knows kinds of rate by name: the plan says it, the steps have it, before and after a resume,
    for which another power is another run; a wrong one is named, and a stage may have its own."""
    folder, said = trained
    run, end = folder / "run", f"tokens_{SPAN:015d}"

    def check() -> None:
        rows = [row for row in read_metrics(run / "metrics.jsonl") if row["kind"] == "train"]
        assert [row["tokens"] for row in rows] == list(range(STEP, SPAN + 1, STEP))
        assert [row["lr"] for row in rows] == pytest.approx([rate(row["tokens"]) for row in rows])

    assert "polynomial, peak 0.001, warm-up 512 tokens, power 1.5, down to 0.00025" in said, said
    check()
    (run / "checkpoints" / end).rename(folder / "end")
    done = python(folder, TRAIN, *SMALL)
    assert done.returncode == 0 and (run / "checkpoints" / end).is_dir(), done.stdout + done.stderr
    assert "2,048" in done.stdout, done.stdout
    check()

    kind = ["+exp=quickstart", "optim.lr.kind=polynomial"]
    base = load(kind)
    assert trajectory_diff(base, load([*kind, "optim.lr.power=1.5"])) == ["optim.lr.power: 2.0 -> 1.5"]
    own = load([*kind, "optim.lr.power=3", "schedule.stages.full.lr.min_ratio=0"]).schedule.stages["full"].own_lr
    assert own is not None and own.options["power"] == 3.0 and own.min_ratio == 0
    with pytest.raises(ConfigError, match=r"optim.lr.power=0.0: must be above 0; 1 is linear"):
        load([*kind, "optim.lr.power=0"])


# --- an evaluation


def test_an_evaluation_is_what_the_page_says(trained, tmp_path):
    """Catches a second place that has to know of an eval: one file and one line, in a copy of the project."""
    for name in ("conf", "data", "moba", "train"):
        (tmp_path / name).symlink_to(ROOT / name)
    for name in ("evals", "launch"):
        shutil.copytree(ROOT / name, tmp_path / name, ignore=shutil.ignore_patterns("__pycache__"))
    (tmp_path / "evals" / "guesses.py").write_text(EVAL)
    table = tmp_path / "evals" / "table.py"
    table.write_text(table.read_text().replace('    "ruler",\n', '    "ruler",\n    "guesses",\n'))
    command = [sys.executable, str(tmp_path / "launch" / "evaluate.py"), "--help"]
    shown = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, timeout=200).stdout
    assert "\nguesses: how often the likeliest token is the right one.\n" in shown
    assert "guesses: tokens at the start that are left out (default 1)" in shown
    arguments = [f"run={trained[0] / 'run'}", "evals=[guesses]", "skip=56", "device=cpu", f"to={tmp_path / 'to'}"]
    arguments += ["data=embedded-validation", "documents=2", "seq_len=256"]
    done = python(tmp_path, EVALUATE, *arguments, root=tmp_path)
    assert done.returncode == 0 and "of 400 tokens" in done.stdout, done.stdout + done.stderr
    (path,) = (tmp_path / "to").glob("guesses_*_256_stage.json")
    assert json.loads(path.read_text())["tokens_scored"] == 2 * (256 - 56)
