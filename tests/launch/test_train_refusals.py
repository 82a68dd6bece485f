"""What launch/train.py refuses, and what it says: exit code 2, the words that help, never a traceback.

Mistakes of a configuration as such are in tests/conf and test_config.py; here are those that need files, checkpoints,
disks, other processes or ranks.
"""

from __future__ import annotations

import os
import resource
import shutil
import signal
import time
from functools import partial
from pathlib import Path

import pytest
from launch_runs import (
    LINE,
    SAVE,
    SCRIPT,
    SWITCH,
    Act,
    assert_refused,
    assert_same_run,
    assert_tidy,
    course,
    finish_real,
    start_real,
)

from train.checkpoint import store


@pytest.fixture(scope="module")
def killed(launcher, command, house, whole) -> Path:
    """The run directory of a run that was killed after its checkpoints at 1536 and 3072 tokens; not to be changed."""
    ended = launcher.run(command("killed"), act=Act(f"os.rename {SAVE.format(SWITCH)}"))
    assert ended.code == -signal.SIGKILL, ended
    return house.runs / "killed"


@pytest.fixture
def interrupted(killed, house, request) -> str:
    """The name of a run of this test's own that was killed at the same place."""
    name = request.node.name.replace("[", "-").rstrip("]")
    shutil.copytree(killed, house.runs / name)
    return name


def saved_in(run_dir: Path) -> list[str]:
    return sorted(path.name for path in (run_dir / "checkpoints").glob("tokens_*"))


# -------------------- another run than the one that was begun


def test_a_configuration_that_would_change_the_losses_is_refused(launcher, command, house, interrupted):
    """Catches a resume that silently becomes another run, a list that leaves something out, and settings that may
    change but are refused."""
    before = (house.runs / interrupted / "metrics.jsonl").read_bytes()
    changes = ["optim.lr.peak=1e-3", "schedule.stages.sparse.attention.top_k=4", "run.seed=1"]
    ended = launcher.run(command(interrupted, *changes, "eval.documents=2", "checkpoint.keep=5"))
    differences = ["optim.lr.peak: 0.003 -> 0.001", "run.seed: 0 -> 1", "data.seed: 0 -> 1"]
    assert_refused(ended, "1 problem:", "run.allow_changes=true", *differences, "sparse.attention.top_k: 3 -> 4")
    assert "eval" not in ended.err and "keep" not in ended.err and ended.err.count("->") == 4
    assert (house.runs / interrupted / "metrics.jsonl").read_bytes() == before

    allowed = ["optim.lr.peak=1e-3", "schedule.stages.sparse.attention.top_k=4", "run.allow_changes=true"]
    ended = launcher.run(command(interrupted, *allowed))
    assert ended.code == 0 and "continuing from" in ended.out, ended
    rates = {r["tokens"]: r["lr"] for r in course(house.runs / interrupted) if r["kind"] == "train"}
    assert max(list(rates.values())[:6]) > 1e-3 >= rates[3584]


def test_a_batch_changed_by_hand_still_ends_its_stages(launcher, command, house, interrupted):
    """Catches a stage whose end is only seen where a step hits it exactly: no evaluation, no last checkpoint."""
    changed = ["schedule.stages.sparse.batch_tokens=2K", "schedule.stages.full.batch_tokens=1.5K"]
    ended = launcher.run(command(interrupted, *changed, "run.allow_changes=true"))
    assert ended.code == 0, ended
    run_dir = house.runs / interrupted
    steps = [(r["stage"], r["tokens"]) for r in course(run_dir) if r["kind"] == "train"]
    assert steps[-3:] == [("sparse", 5120), ("full", 6656), ("full", 8192)], "each stage was overshot"
    assert [r["tokens"] for r in course(run_dir) if r["kind"] == "eval"] == [2048, 5120, 6656, 8192]
    names = {path.name for path in (run_dir / "position_loss").glob("train_*")}
    assert names == {"train_0_sparse.npz", "train_1_full.npz"}
    assert {"tokens_000000000005120", "tokens_000000000008192"} < set(saved_in(run_dir))
    assert "is finished" in launcher.run(command(interrupted, *changed)).out


def test_other_data_are_refused(launcher, command, house, interrupted):
    """Catches a resume on a corpus that is no longer the same, which no key of the configuration shows."""
    other = house.root / "other-books"
    shutil.copytree(house.root / "books", other)
    (other / "9.txt").write_text("another end")
    ended = launcher.run(command(interrupted, f"data.path={other}"))
    assert_refused(ended, "the data changed since the checkpoint", "same sources and tokenizer")


def test_another_tokenizer_is_refused(launcher, command, house, interrupted):
    """Catches weights under token ids that they were not trained on, in a resume and in a new run."""
    other = "data.tokenizer=bpe-4k"
    assert_refused(launcher.run(command(interrupted, other)), "data.tokenizer: bytes -> bpe-4k")
    ended = launcher.run(command(interrupted, other, "run.allow_changes=true"))
    assert_refused(ended, "does not fit model.*", "model.embed_tokens.weight is (384, 32)")
    ended = launcher.run(command(f"{interrupted}-new", other, f"init.source={house.runs / interrupted}"))
    assert_refused(ended, "another tokenizer, 'bytes'", "data.tokenizer is 'bpe-4k'")
    # One embedding size does not make two vocabularies one.
    same_size = ["model.vocab_size=4096", f"init.source={house.runs / interrupted}"]
    assert_refused(launcher.run(command(f"{interrupted}-new", other, *same_size)), "another tokenizer, 'bytes'")


# -------------------- damaged files


def flip(path: Path) -> None:
    """Changes one byte in the middle."""
    content = bytearray(path.read_bytes())
    content[len(content) // 2] ^= 1
    path.write_bytes(content)


def cut(path: Path) -> None:
    path.write_bytes(path.read_bytes()[:-1])


@pytest.mark.parametrize(
    ("file", "harm"),
    [
        ("model-00001-of-00001.safetensors", flip),
        ("model-00001-of-00001.safetensors", cut),
        ("rng-rank00000.safetensors", flip),
        ("state.json", flip),
        ("config.yaml", flip),
        ("position_loss.safetensors", Path.unlink),
    ],
    ids=["flipped-weights", "short-weights", "flipped-rng", "flipped-state", "flipped-config", "lost-sums"],
)
def test_a_damaged_checkpoint_is_named_with_the_good_one_before(
    launcher, command, house, whole, interrupted, file, harm
):
    """Catches damage that is loaded, that is a traceback, or that silently costs the tokens since the one before,
    which is to be named."""
    folder = house.runs / interrupted / "checkpoints"
    newest, before = (folder / f"tokens_{tokens:015d}" for tokens in (3072, 1536))
    harm(newest / file)
    ended = launcher.run(command(interrupted))
    advice = f"The newest good one before it is {before}: remove {newest}"
    assert_refused(ended, "1 problem:", f"{newest} is damaged", file, advice)
    assert (newest / "manifest.json").exists(), "nothing is removed unasked"
    if harm is cut:
        shutil.rmtree(newest)  # as the message says
        ended = launcher.run(command(interrupted))
        assert ended.code == 0 and "tokens_000000000001536: 1,536 of" in ended.out, ended
        assert_same_run(house.runs / interrupted, whole)


def test_an_unreadable_metrics_line_is_named(launcher, command, house, interrupted):
    """Catches a traceback, or history that is dropped."""
    path = house.runs / interrupted / "metrics.jsonl"
    lines = path.read_bytes().splitlines(keepends=True)
    path.write_bytes(b"".join([*lines[:2], b"\x00\x00\n", *lines[2:]]))
    assert_refused(launcher.run(command(interrupted)), "metrics.jsonl, line 3", "remove it to continue")


# -------------------- a full disk


def limit_file_size(num_bytes: int) -> None:
    """Makes every write of this process beyond this size in a file fail, as on a full disk."""
    resource.setrlimit(resource.RLIMIT_FSIZE, (num_bytes, resource.getrlimit(resource.RLIMIT_FSIZE)[1]))


def test_a_full_disk_costs_nothing_that_was_saved(launcher, command, house, whole, interrupted):
    """Catches a failed save that harms an older checkpoint or leaves half a one, a failed line of metrics.jsonl that is
    a traceback, and either that cannot be continued once there is room."""
    run_dir = house.runs / interrupted
    ended = launcher.run(command(interrupted), prepare=partial(limit_file_size, 100_000))
    words = f"could not save tokens_{SWITCH:015d}", "Earlier checkpoints are unchanged"
    assert_refused(ended, "1 problem:", *words)
    assert saved_in(run_dir) == [f"tokens_{tokens:015d}" for tokens in (1536, 3072)]
    for name in saved_in(run_dir):
        store.verify(run_dir / "checkpoints" / name)
    assert_tidy(run_dir)

    size = (run_dir / "metrics.jsonl").stat().st_size
    assert size > (run_dir / "config.yaml").stat().st_size, "otherwise that would fail first"
    ended = launcher.run(command(interrupted), prepare=partial(limit_file_size, size))
    assert_refused(ended, "1 problem:", "File too large", str(run_dir), "Saved checkpoints are unchanged")
    assert launcher.run(command(interrupted)).code == 0
    assert_same_run(run_dir, whole)


def test_a_run_directory_that_cannot_be_is_a_message(launcher, command, house):
    """Catches a traceback for a path that runs through a file."""
    (house.root / "file").write_text("")
    ended = launcher.run([*command("x"), f"run.dir={house.root}/file/run"])
    assert_refused(ended, "Not a directory", f"{house.root}/file/run")


# -------------------- two at once


def test_a_second_live_process_is_refused(launcher, command, house, whole):
    """Catches two processes that write to one run directory, and a refusal that disturbs the first."""
    first = launcher.start(command("locked"), act=Act(LINE, 4, signal.SIGSTOP))
    stat = Path(f"/proc/{first.process.pid}/stat")
    deadline = time.monotonic() + 120
    while ") T " not in stat.read_text():
        assert time.monotonic() < deadline and first.process.exitcode is None
        time.sleep(0.05)
    ended = launcher.run(command("locked"))
    assert_refused(ended, f"in use by process {first.process.pid} on", "run.dir")
    os.kill(first.process.pid, signal.SIGCONT)
    ended = first.wait()
    assert ended.code == 0, ended
    assert_same_run(house.runs / "locked", whole)


# -------------------- what is missing or cannot be here

MISSING = {
    "path": (["data.path=/no/such/books"], ["/no/such/books", "no such file or directory"]),
    "empty": (["data.path={root}/empty"], ["{root}/empty", "there is no text in it"]),
    "folder": (["data.path={root}/nothing"], ["{root}/nothing", "holds no files"]),
    "held-out": (["data.validation.path=/no/such/books"], ["/no/such/books"]),
    "short-held-out": (["data.validation.path={root}/short.txt"], ["validation: 0 of 1 documents", "257 tokens"]),
    "hub": (
        ["data=hub", "data.path=null", "data.name=nobody/nothing"],
        ["'nobody/nothing'", "cannot be read", "data=files data.path=", "data=embedded"],
    ),
    "tokenizer": (["data.tokenizer=/no/tokenizer.json"], ["data.tokenizer='/no/tokenizer.json'", "bpe-32k"]),
    "source": (["init.source={root}/nothing"], ["{root}/nothing"]),
    "keys": (["optim.lr.paek=1", "model.size=tiny"], ["2 problems:", "optim.lr.paek=1", "peak", "model.size=tiny"]),
    "triton": (
        ["schedule.stages.sparse.attention.backend=triton"],
        ["schedule.stages.sparse.attention.backend=triton", "needs a GPU and this run is on a CPU", "auto or torch"],
    ),
    "cuda": (["run.device=cuda"], ["run.device=cuda", "no CUDA device"]),
    "engine": (["deepspeed.extra={bf16: {enabled: true}}"], ["deepspeed.extra.bf16", "deepspeed.precision"]),
    "engine-section": (
        ["deepspeed.extra={zero_optimization: {nonsense: 1, reduce_bucket_size: big}}"],
        ["2 problems:", "deepspeed.extra", "nonsense=1", "reduce_bucket_size=big"],
    ),
    "rope": (
        ["model.rope_scaling={rope_type: yarn, factor: 2, original_max_position_embeddings: 128}"]
        + [f"schedule.stages.full.rope.{setting}" for setting in ("scaling=yarn", "factor=2", "original_length=256")],
        ["schedule.stages.full: rope.scaling=yarn on a model that has yarn"],
    ),
}


@pytest.mark.parametrize("case", MISSING)
def test_what_cannot_work_is_said(launcher, command, house, case):
    """Catches tracebacks, and mistakes of the configuration that are found only after data or a model were loaded."""
    (house.root / "empty").mkdir(exist_ok=True)
    (house.root / "empty" / "a.txt").write_text("")
    (house.root / "nothing").mkdir(exist_ok=True)
    (house.root / "short.txt").write_text("too short")
    overrides, words = ([text.replace("{root}", str(house.root)) for text in texts] for texts in MISSING[case])
    arguments = [text for text in command(f"missing-{case}") if not (case == "hub" and text.startswith("data.path="))]
    ended = launcher.run([*arguments, *(text for text in overrides if text != "data.path=null")])
    assert_refused(ended, *words)
    if case in {"tokenizer", "keys", "triton", "cuda", "engine", "rope"}:
        assert ended.out == "" and not (house.runs / f"missing-{case}").exists(), "found before anything was done"


def test_a_world_that_does_not_divide_the_batch(launcher, command):
    """Catches ranks that start and fail in the loader."""
    ended, *_ = launcher.run_ranks(command("three"), 3)
    assert_refused(ended, "3 processes", "batch_tokens=512", "batch_tokens=768")


def test_under_torchrun_rank_0_speaks_first_and_once(command, house):
    """Catches two ranks that both complain, one that ends rank 0 before it has spoken, and an exit code of 0."""
    ended = finish_real(start_real(command("torchrun", "optim.lr.peak=0"), house.root, num_ranks=2))
    assert ended.code != 0 and ended.out == "", ended
    assert ended.err.count("optim.lr.peak=0.0: must be above 0") == 1, ended
    assert f'File "{SCRIPT}"' not in ended.err, "no traceback of ours; torchrun's own cannot be helped"
    said = [line for line in ended.err.splitlines() if line and "OMP_NUM_THREADS" not in line and "****" not in line]
    assert said[0] == "1 problem:" and "optim.lr.peak" in said[1], ended
