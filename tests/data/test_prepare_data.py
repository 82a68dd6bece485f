"""launch/prepare_data.py: killed and restarted it gives the same bytes, for any number of workers; and its messages."""

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from data.errors import DataError
from data.prepare import prepare
from data.shards import TokenShards
from data.tokenizer import load_tokenizer
from launch.prepare_data import main

SCRIPT = Path(__file__).resolve().parents[2] / "launch" / "prepare_data.py"
BYTES = load_tokenizer("bytes")


def contents(directory):
    """File name -> bytes, without the lock."""
    return {p.name: p.read_bytes() for p in directory.iterdir() if p.name != ".lock"}


def corpus(path, documents=12, megabytes=2.4):
    """A jsonl file of varied text, so that tokenising takes a few seconds."""
    size = int(megabytes * 1e6 / documents)
    with open(path, "w") as file:
        for i in range(documents):
            words = [f"{(i * 7919 + j * 104729) % 99991:x} word{j % 1013}" for j in range(size // 12)]
            file.write(json.dumps({"id": f"doc{i}", "text": " ".join(words)}) + "\n")
    return path


def running(pid):
    """True while the process exists and is no zombie."""
    try:
        return Path(f"/proc/{pid}/stat").read_text().rsplit(")", 1)[1].split()[0] != "Z"
    except FileNotFoundError:
        return False


@pytest.mark.skipif(not Path("/proc/self/stat").exists(), reason="looks for the children of a process in /proc")
def test_killed_and_restarted_gives_the_same_bytes(tmp_path, capsys):
    """Catches half-written shards taken for finished, finished ones written again, orphaned workers."""
    arguments = [f"source={corpus(tmp_path / 'c.jsonl')}", "tokenizer=bpe-4k", "shard_mb=1"]
    killed = tmp_path / "killed"
    process = subprocess.Popen(
        [sys.executable, str(SCRIPT), *arguments, f"to={killed}", "workers=1"],
        cwd=tmp_path,
        stdout=subprocess.PIPE,
        text=True,
    )
    while process.poll() is None and not (killed / "00000.json").exists():
        time.sleep(0.02)
    tasks = Path(f"/proc/{process.pid}/task").glob("*/children")
    children = [pid for task in tasks for pid in task.read_text().split()]
    process.send_signal(signal.SIGKILL)
    process.communicate()
    assert children and not (killed / "meta.json").exists()
    kept = {p.name: p.stat().st_mtime_ns for p in killed.glob("00000.json")}
    (killed / ".00009.bin.1.tmp").write_bytes(b"half")  # what a kill during a write leaves
    deadline = time.monotonic() + 60
    while any(map(running, children)) and time.monotonic() < deadline:
        time.sleep(0.05)
    assert not any(map(running, children))

    main([*arguments, f"to={killed}"])
    assert "kept from before" in capsys.readouterr().out
    main([*arguments, f"to={tmp_path / 'whole'}"])
    assert contents(killed) == contents(tmp_path / "whole")
    assert len(list(killed.glob("*.bin"))) >= 3
    assert {name: (killed / name).stat().st_mtime_ns for name in kept} == kept


def test_workers_and_limits_do_not_change_the_bytes(tmp_path):
    """Catches shards that depend on how many processes wrote them, also where workers ran ahead of max_tokens."""
    documents = [(f"d{i}", f"{i} " * 400) for i in range(20)]
    for workers in (0, 2):
        to = tmp_path / str(workers)
        prepare(documents, BYTES, to, origin={}, title="t", workers=workers, max_tokens=5000, shard_chars=2000)
    assert contents(tmp_path / "0") == contents(tmp_path / "2")
    shards = TokenShards(tmp_path / "0")
    total = int(shards.lengths.sum())
    assert len(shards.meta["shards"]) > 1 and total - int(shards.lengths[-1]) < 5000 <= total


def test_source_that_fails_half_way(tmp_path):
    """Catches a bad row that leaves a directory which cannot be gone on with once the row is mended."""

    def documents(broken):
        for i in range(10):
            if broken and i == 6:
                raise DataError("row 6 is bad")
            yield f"d{i}", f"text {i} " * 100

    kwargs = {"origin": {"a": 1}, "title": "t", "shard_chars": 1500}
    with pytest.raises(DataError, match="row 6"):
        prepare(documents(True), BYTES, tmp_path / "x", **kwargs)
    prepare(documents(False), BYTES, tmp_path / "x", **kwargs)
    prepare(documents(False), BYTES, tmp_path / "y", **kwargs)
    assert contents(tmp_path / "x") == contents(tmp_path / "y")
    with pytest.raises(DataError, match="shards of something else: a was 1, now 2"):
        prepare(documents(False), BYTES, tmp_path / "x", **(kwargs | {"origin": {"a": 2}}))


def test_second_process_waits(tmp_path):
    """Catches two runs that write one cache directory at once."""
    code = "import sys; from data.prepare import _locked; from pathlib import Path\n" \
           "with _locked(Path(sys.argv[1]), print): print('in', flush=True); sys.stdin.read()"  # fmt: skip
    holder = subprocess.Popen(
        [sys.executable, "-c", code, str(tmp_path)],
        cwd=SCRIPT.parents[1],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
    )
    assert holder.stdout.readline() == b"in\n"
    said = []

    def log(line):
        said.append(line)
        if "waiting" in line:
            holder.stdin.close()

    prepare([("a", "text")], BYTES, tmp_path, origin={}, title="t", log=log)
    holder.wait()
    assert "waiting for another process" in said[0] and (tmp_path / "meta.json").exists()


def test_command(tmp_path, capsys):
    """Catches a summary that is wrong, and a second run that does not verify what is there."""
    (tmp_path / "a.txt").write_text("hello")
    arguments = [f"source={tmp_path / 'a.txt'}", f"to={tmp_path / 'out'}", "tokenizer=bytes"]
    main(arguments)
    assert "1 documents, 7 tokens of bytes in 1 shard(s)" in capsys.readouterr().out
    main(arguments)
    assert "is complete: checking it" in capsys.readouterr().out
    (tmp_path / "out" / "00000.bin").write_bytes(b"\0" * 14)
    with pytest.raises(SystemExit, match="2"):
        main(arguments)
    assert "00000.bin is damaged" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("arguments", "named"),
    [
        ([], "source=... is missing; to=... is missing; tokenizer=... is missing"),
        (["workes=2"], "unknown key 'workes' (do you mean 'workers'?)"),
        (["source={}/nope", "to={}/o", "tokenizer=bytes"], "/nope': no such file or directory"),
        (["source={}", "to={}/o", "tokenizer=byts"], "error: tokenizer='byts': no such tokenizer"),
        (["source={}/u16.jsonl", "to={}/o", "tokenizer=bytes"], "'utf-8' codec"),
        (["source={}/half", "to={}/o", "tokenizer=bytes"], "shards that are not finished"),
        (["source={}/a.txt", "to={}/o", "tokenizer=bytes", "workers=-1"], "workers='-1': a whole number of at least 0"),
        (["source={}/a.txt", "to={}/o", "tokenizer=bytes", "max_tokens=x"], "max_tokens='x': "),
        (["source={}/a.txt", "to={}/o", "tokenizer=bytes", "max_tokens=0"], "max_tokens=0: must be at least 1"),
        (
            ["source={}/a.txt", "to={}", "tokenizer=bytes"],
            "is not empty (a.txt, half, u16.jsonl) and holds no",
        ),
        (["source={}/a.txt", "to={}/a.txt", "tokenizer=bytes"], "File exists"),
    ],
)
def test_mistakes_are_one_line_and_exit_code_2(arguments, named, tmp_path, capsys):
    """Catches tracebacks and other exit codes."""
    (tmp_path / "a.txt").write_text("hello")
    (tmp_path / "u16.jsonl").write_bytes('{"text": "a"}\n'.encode("utf-16"))
    (tmp_path / "half").mkdir()
    (tmp_path / "half" / "plan.json").write_text("{}")
    with pytest.raises(SystemExit) as exited:
        main([a.format(tmp_path) for a in arguments])
    error = capsys.readouterr().err
    assert exited.value.code == 2 and named in error and error.startswith("error: ") and error.count("\n") == 1


def test_help_from_another_directory(tmp_path):
    """Catches a script that only runs from the repository root, or finds launch/ in front of the packages."""
    environment = {k: v for k, v in os.environ.items() if k != "PYTHONPATH"}
    done = subprocess.run(
        [sys.executable, str(SCRIPT), "--help"], cwd=tmp_path, env=environment, capture_output=True, text=True
    )
    assert done.returncode == 0 and "max_tokens=" in done.stdout, done.stderr
