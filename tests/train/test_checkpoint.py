"""Checkpoints: exact resumption on every engine, and what is on disk after a kill, a full disk or a changed byte."""

import json
import random
import re
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
from engine_runs import ENGINES, LAST, ROOT, SAVE_AT, build_model, launch, other_stage
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.torch import load_file, save_file

from train.checkpoint import checkpoint_dir, host_buffer, saving, store
from train.checkpoint.store import CheckpointError, newest, verify
from train.engine.engine import Slot

WORLDS = (1, 2)
NAME = checkpoint_dir.directory_name(SAVE_AT)
CASES = [(name, world_size) for name in ENGINES for world_size in WORLDS]


def losses(steps):
    return [step["loss"] for step in steps]


# Resumption (reports of tests/train/engine_worker.py)


@pytest.mark.parametrize(("name", "world_size"), CASES)
def test_a_resumed_run_equals_the_uninterrupted_one_bit_for_bit(first_runs, second_runs, name, world_size):
    """Catches a moment, step count, master weight or low-precision weight that is lost, rounded or stale after
    loading in a new process; and a save that disturbs the run it is made from."""
    resumed = second_runs[world_size][name]["same"]
    uninterrupted = first_runs[world_size][name]["steps"][SAVE_AT:]
    assert resumed["exact"]
    assert resumed["steps"] == uninterrupted
    assert len(set(losses(uninterrupted))) == len(uninterrupted) > 3


@pytest.mark.parametrize(("name", "world_size"), CASES)
def test_a_save_beside_the_training_holds_what_was_there_when_it_began(first_runs, runs_dir, name, world_size):
    """Catches a copy that shares memory with what the optimizer steps: the files were written while all weights and
    moments had other values, against those that were written at once."""
    beside, at_once = (
        runs_dir / run / "checkpoints" / NAME for run in (f"{name}-{world_size}", f"at-once-{name}-{world_size}")
    )
    files = sorted(path.name for path in at_once.iterdir())
    assert files == sorted(path.name for path in beside.iterdir()) and len(files) > 8
    for file in files:
        assert (beside / file).read_bytes() == (at_once / file).read_bytes(), file


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
def test_copies_that_nobody_waits_for_are_of_the_moment_of_the_save(tmp_path):
    """Catches files written before their copies have come, copies behind the next step's changes, and memory that
    another save still needs: the device is a second behind its host at every save."""
    report = launch("pinned", tmp_path, (1,))[1]
    for name in ENGINES:
        assert report[name] == {"exact": [True, True], "pinned": True, "said": []}, name


def test_what_cannot_be_pinned_is_said_once_and_used(monkeypatch):
    """Catches a save that fails where the system allows no pinned memory."""
    monkeypatch.setattr(host_buffer, "pin", lambda buffer: 2)
    monkeypatch.setattr(torch.cuda, "set_device", lambda device: None)
    said = []
    buffer = host_buffer.HostBuffer(2**26, torch.device("cuda"), said.append)
    buffer.rewind()
    first = buffer.take(3).fill_(1)
    assert not (buffer.take(2) == 1).any()
    buffer.rewind()
    assert buffer.take(3).data_ptr() == first.data_ptr()
    assert len(said) == 1 and said[0].startswith("0.2 GiB of host memory cannot be pinned (CUDA error 2)")


@pytest.mark.parametrize(("name", "world_size"), CASES)
def test_another_number_of_ranks_continues(first_runs, second_runs, name, world_size):
    """Catches a share of a parameter read from the wrong place: state is exact, losses follow to rounding."""
    resumed = second_runs[world_size][name]["other_world"]
    uninterrupted = first_runs[3 - world_size][name]["steps"][SAVE_AT : LAST - 1]
    assert resumed["exact"]
    assert losses(resumed["steps"]) == pytest.approx(losses(uninterrupted), rel=5e-3 if "bf16" in name else 1e-5)


@pytest.mark.parametrize(("name", "world_size"), [case for case in CASES if other_stage(case[0])])
def test_another_zero_stage_continues(first_runs, second_runs, name, world_size):
    """Catches a format that knows the stage it was written by: 3 -> 1, 1 -> 3, 2 -> 0 and in bf16."""
    resumed = second_runs[world_size][name]["other_stage"]
    uninterrupted = first_runs[world_size][other_stage(name)]["steps"][SAVE_AT : LAST - 1]
    assert resumed["exact"]
    assert losses(resumed["steps"]) == pytest.approx(losses(uninterrupted), rel=5e-3 if "bf16" in name else 1e-5)


@pytest.mark.parametrize("world_size", WORLDS)
def test_random_state_continues_on_each_rank(first_runs, second_runs, world_size):
    """Catches a generator left out, one state for all ranks, and a new rank that repeats another's numbers."""
    saved = first_runs[world_size]["z1"]["draws"]
    assert second_runs[world_size]["z1"]["same"]["draws"] == saved
    other = second_runs[world_size]["z1"]["other_world"]["draws"]
    assert other[0] == first_runs[3 - world_size]["z1"]["draws"][0]
    every = [number for rank in other for number in rank]
    assert len(set(every)) == len(every)


@pytest.mark.parametrize("world_size", WORLDS)
def test_a_full_disk_on_one_rank_fails_the_save_on_all_and_harms_nothing(first_runs, world_size):
    """Catches a deadlock, a half-written directory left behind, and a damaged predecessor."""
    full = first_runs[world_size]["z1"]["full_disk"]
    assert len(full["messages"]) == 2 * world_size, "on every rank, at once and beside the training"
    assert all(re.search(rf"rank {world_size - 1}: .*File too large.*Earlier", message) for message in full["messages"])
    assert full["left"] == ["latest", NAME]
    assert full["newest_kept"]


def test_a_failed_write_without_a_message_is_a_failure(monkeypatch, tmp_path):
    """Catches an error whose text is empty, as OSError()'s is, taken for none: a checkpoint that lacks files."""
    monkeypatch.setattr(saving, "gather_objects", lambda value: [value])
    monkeypatch.setattr(saving, "barrier", lambda: None)
    monkeypatch.setattr(torch.distributed, "get_rank", lambda: 0)

    def fail() -> None:
        raise OSError

    with pytest.raises(CheckpointError, match=r"rank 0: OSError\(\)"):
        saving.attempt(tmp_path / "saving", fail)


# Content


@pytest.fixture
def saved(first_runs, runs_dir, tmp_path) -> Path:
    """A copy of the run directory of the bf16 ZeRO-3 run on two ranks."""
    return Path(shutil.copytree(runs_dir / "z3-bf16-2", tmp_path / "run"))


def test_a_checkpoint_holds_what_was_given(saved):
    """Catches state that does not come back, and a tied weight stored twice."""
    content = store.read(newest(saved))
    assert content.state == {"step": SAVE_AT, "names": ["a", "b"]}
    assert content.tokens == SAVE_AT
    assert content.tensors["sums"].tolist() == [0, 1, 2]
    assert content.config_yaml == "run:\n  name: test\n"
    assert content.meta["optimizer_step"] == SAVE_AT
    names = list(store.read_index(newest(saved)))
    assert sorted(names) == sorted(content.meta["parameters"]) == sorted(dict(build_model().named_parameters()))
    assert "model.embed_tokens.weight" in names
    assert "lm_head.weight" not in names
    assert not list(newest(saved).glob("*.pt"))


def test_weights_load_into_a_plain_model(saved):
    """Catches weights of init.source that differ from the files, are rounded to bf16, or break the tie."""
    model = build_model()
    used = store.load_weights(model, saved)
    assert used == newest(saved)
    tensors = {}
    for file in used.glob("model-*.safetensors"):
        tensors |= load_file(file)
    assert all(torch.equal(tensors[name], p) for name, p in model.named_parameters())
    assert any((p != p.bfloat16()).any() for p in model.parameters())
    assert model.lm_head.weight is model.model.embed_tokens.weight


def test_a_checkpoint_before_the_first_step_has_no_moments(first_runs, runs_dir):
    """Catches a save that needs optimizer state, and weights that are not those of the model."""
    path = runs_dir / "z2-bf16-2" / "checkpoints" / checkpoint_dir.directory_name(0)
    assert not list(path.glob("optimizer*"))
    model = build_model()
    start = [p.detach().bfloat16().float() for p in model.parameters()]
    store.load_weights(model, path)
    assert all(torch.equal(a, b) for a, b in zip(start, model.parameters()))


def test_weights_of_another_model_are_refused_by_name(saved):
    """Catches a partial load of a model with other shapes."""
    model = build_model()
    model.model.layers[0].mlp.up_proj = torch.nn.Linear(16, 8, bias=False)
    says = r"layers\.0\.mlp\.up_proj\.weight is \(24, 16\) in the checkpoint and \(8, 16\) in the model"
    with pytest.raises(CheckpointError, match=says):
        store.load_weights(model, saved)


def test_a_directory_without_a_checkpoint_is_said_to_be_one(tmp_path):
    """Catches random weights where a source was asked for."""
    with pytest.raises(CheckpointError, match="neither a checkpoint nor a run directory"):
        store.load_weights(build_model(), tmp_path)


@settings(deadline=None, max_examples=25)
@given(st.lists(st.integers(1, 400), min_size=1, max_size=30), st.integers(1, 5))
def test_every_parameter_is_written_once_by_its_owner(sizes, world_size):
    """Catches a parameter lost or written twice, an unbounded shard, a rank with two in a round, a reused name."""
    slots = [Slot(str(i), (n,), None, 0, 0, 0, False) for i, n in enumerate(sizes)]
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(store, "SHARD_BYTES", 2000)
        rounds = store._plan(slots, "model", 8, world_size)
    shards = [shard for turn in rounds for shard in turn]
    assert sorted(int(slot.name) for shard in shards for slot in shard.slots) == list(range(len(sizes)))
    assert all(int(slot.name) % world_size == shard.owner for shard in shards for slot in shard.slots)
    assert all(len(shard.slots) == 1 or sum(8 * s.numel for s in shard.slots) <= 2000 for shard in shards)
    assert all(len({shard.owner for shard in turn}) == len(turn) for turn in rounds)
    assert len({shard.file for shard in shards}) == len(shards)


@settings(deadline=None, max_examples=25)
@given(st.lists(st.integers(1, 7), min_size=1, max_size=3), st.data())
def test_any_range_of_a_tensor_is_read_right(tmp_path_factory, shape, data):
    """Catches a share that begins or ends inside a row."""
    directory = tmp_path_factory.mktemp("tensor")
    tensor = torch.randn(shape)
    save_file({"x": tensor}, directory / "x.safetensors")
    start = data.draw(st.integers(0, tensor.numel() - 1))
    size = data.draw(st.integers(1, tensor.numel() - start))
    with store.ExitStack() as stack:
        files = store.TensorFiles(directory, {"x": "x.safetensors"}, stack)
        assert torch.equal(files.elements("x", tuple(shape), start, size), tensor.flatten()[start : start + size])


# Directories


def write(run_dir: Path, tokens: int, stage_end: bool = False, keep: int = 2) -> Path:
    """A checkpoint made of small files, through the same steps as a real one."""
    temporary = checkpoint_dir.begin(run_dir, tokens)
    (temporary / "model-00001-of-00001.safetensors").write_bytes(random.randbytes(5000))
    (temporary / "state.json").write_text(json.dumps({"stage_end": stage_end}))
    path = checkpoint_dir.commit(temporary, {f.name: checkpoint_dir.seal(f) for f in sorted(temporary.iterdir())})
    checkpoint_dir.prune(run_dir, keep)
    return path


def names(run_dir: Path) -> list[str]:
    return sorted(path.name for path in (run_dir / "checkpoints").iterdir())


def test_the_newest_and_the_stage_ends_are_kept(tmp_path):
    """Catches a stage's end that is removed, and `latest` left behind."""
    for tokens in range(1, 7):
        write(tmp_path, tokens, stage_end=tokens == 2)
    assert names(tmp_path) == ["latest", *(checkpoint_dir.directory_name(tokens) for tokens in (2, 5, 6))]
    assert (tmp_path / "checkpoints" / "latest").read_text() == newest(tmp_path).name + "\n"


def test_a_changed_byte_is_found_and_the_good_predecessor_named(tmp_path):
    """Catches a checksum that is not compared, and advice that points to another damaged checkpoint."""
    good, worse, bad = (write(tmp_path, tokens, keep=9) for tokens in (1, 2, 3))
    for path in (worse, bad):
        file = path / "model-00001-of-00001.safetensors"
        content = bytearray(file.read_bytes())
        content[1234] ^= 1
        file.write_bytes(content)
    assert newest(tmp_path) == bad, "the size is right: only reading it can tell"
    with pytest.raises(
        CheckpointError, match=rf"{bad}/model-00001.*SHA-256.*newest good one before it is {good}: remove"
    ):
        verify(bad)
    verify(good)


def test_damage_is_found_when_weights_are_loaded(saved):
    """Catches a load that trusts its files."""
    file = next(newest(saved).glob("model-*.safetensors"))
    file.write_bytes(file.read_bytes()[:-1] + b"\x01")
    with pytest.raises(
        CheckpointError, match=rf"{file.name} does not match its SHA-256.*There is no good one before it"
    ):
        store.load_weights(build_model(), newest(saved))


def test_what_is_not_whole_is_never_the_newest(tmp_path):
    """Catches a truncated file, a missing file and a missing manifest taken for a checkpoint."""
    whole = write(tmp_path, 1, keep=9)
    truncated, missing, unlisted = (write(tmp_path, tokens, keep=9) for tokens in (2, 3, 4))
    (truncated / "state.json").write_text("{")
    (missing / "state.json").unlink()
    (unlisted / "manifest.json").unlink()
    checkpoint_dir.begin(tmp_path, 5)
    assert newest(tmp_path) == whole
    with pytest.raises(CheckpointError, match=r"state\.json has 1 bytes instead of"):
        verify(truncated)
    with pytest.raises(CheckpointError, match=r"state\.json cannot be read"):
        verify(missing)


def test_another_format_version_is_refused(tmp_path):
    """Catches a checkpoint of a later program read as if it were of this one."""
    path = write(tmp_path, 1)
    text = (path / "manifest.json").read_text()
    (path / "manifest.json").write_text(text.replace('"format_version": 1', '"format_version": 2'))
    with pytest.raises(CheckpointError, match="format version 2; this program reads 1"):
        verify(path)


SAVER = """
import random, sys
from pathlib import Path
sys.path.insert(0, sys.argv[3])
from train.checkpoint import checkpoint_dir as cd
run_dir, tokens = Path(sys.argv[1]), int(sys.argv[2])
while True:
    for _ in range(2):  # the second save replaces the first
        temporary = cd.begin(run_dir, tokens)
        for name in ("a", "b", "c"):
            (temporary / name).write_bytes(random.randbytes(random.randrange(300_000)))
        cd.write_text(temporary / "state.json", '{"stage_end": false}')
        cd.commit(temporary, {f.name: cd.seal(f) for f in sorted(temporary.iterdir())})
    cd.prune(run_dir, 2)
    print(tokens, flush=True)
    tokens += 1
"""


def test_kills_at_random_moments_leave_a_good_checkpoint(tmp_path):
    """Catches any moment at which SIGKILL loses the finished checkpoints, or makes an unfinished one count."""
    generator, tokens, died_inside = random.Random(0), 1, 0
    for _ in range(12):
        command = [sys.executable, "-c", SAVER, str(tmp_path), str(tokens), str(ROOT)]
        process = subprocess.Popen(command, stdout=subprocess.PIPE, text=True)
        process.stdout.readline()
        time.sleep(generator.uniform(0, 0.05))
        process.send_signal(signal.SIGKILL)
        finished = [int(line) for line in process.stdout.read().split()]
        process.wait()
        died_inside += any(name.startswith(".saving") for name in names(tmp_path))
        checkpoint_dir.clean_stale(tmp_path)
        assert not [name for name in names(tmp_path) if name.startswith((".saving", ".replaced"))]
        verify(newest(tmp_path))
        reached = int(newest(tmp_path).name.removeprefix("tokens_"))
        assert reached >= max([tokens, *finished])
        tokens = reached
    assert died_inside > 2, "the kills must fall into saves"


def test_a_kill_between_the_two_renames_of_a_replacement_is_mended(tmp_path):
    """Catches the one moment at which a replaced checkpoint has no name."""
    path = write(tmp_path, 1)
    path.rename(path.with_name(".replaced_" + path.name))
    checkpoint_dir.clean_stale(tmp_path)
    assert newest(tmp_path) == path


@pytest.mark.parametrize(
    "text",
    [
        "[]",
        "null",
        '{"format_version": 1}',
        '{"format_version": 1, "files": {"state.json": 5}}',
        "[" * 100_000,
        "\x00",
        '{"format_version": 1, "files": {"../../secret": {"size": 1, "sha256": "x"}}}',
    ],
    ids=["list", "null", "no files", "numbers", "deep", "bytes", "outside"],
)
def test_a_manifest_of_another_shape_is_damage(tmp_path, text):
    """Catches a traceback, a file outside the checkpoint that is read, and advice without the newest good one."""
    good, bad = write(tmp_path, 1, keep=9), write(tmp_path, 2, keep=9)
    (bad / "manifest.json").write_text(text)
    for looks in (lambda: verify(bad), lambda: store.find(tmp_path), lambda: store.find(bad) and verify(bad)):
        with pytest.raises(CheckpointError, match=rf"{bad}.*manifest.json.*newest good one before it is {good}"):
            looks()
    assert newest(tmp_path) == good


def test_what_is_not_ours_in_the_folder_does_not_matter(tmp_path):
    """Catches a folder or a file with a name like a checkpoint's that blocks a run."""
    whole = write(tmp_path, 1)
    (tmp_path / "checkpoints" / "tokens_abc").mkdir()
    (tmp_path / "checkpoints" / "tokens_12").write_text("x")
    checkpoint_dir.refuse_incomplete(tmp_path)
    assert newest(tmp_path) == whole == store.find(tmp_path)


def test_a_source_is_not_taken_from_before_its_damage(tmp_path):
    """Catches weights of an older checkpoint where the newest was asked for: init.source=<run>, export, evaluation."""
    write(tmp_path, 1, keep=9)
    damaged = write(tmp_path, 2, keep=9)
    (damaged / "state.json").write_text("{")
    with pytest.raises(CheckpointError, match=rf"{damaged} is damaged.*remove {damaged}"):
        store.find(tmp_path)
