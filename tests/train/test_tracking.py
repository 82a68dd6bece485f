"""Tracking: what reaches wandb's offline files is what was logged; nothing that wandb does can stop a run."""

import json

import pytest
import wandb
from matplotlib.figure import Figure
from wandb_files import history, kinds_of, summary_of

from conf.schema import LoggingConfig
from train.record.dashboard import Sample
from train.record.tracking import Tracker, run_id, wandb_mode


@pytest.fixture(autouse=True)
def no_account(tmp_path, monkeypatch):
    """An empty home and no wandb settings, so that a developer's login does not decide what these tests see."""
    for name in ("WANDB_API_KEY", "WANDB_MODE", "WANDB_BASE_URL", "WANDB_DIR", "NETRC"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("HOME", str(tmp_path / "home"))
    monkeypatch.setenv("WANDB_CONFIG_DIR", str(tmp_path / "config"))
    monkeypatch.setenv("WANDB_CACHE_DIR", str(tmp_path / "cache"))
    wandb.teardown()
    yield
    wandb.teardown()


def open_tracker(run_dir, mode="auto", **options):
    said = []
    config = options.pop("logging", LoggingConfig(wandb=mode))
    tracker = Tracker(run_dir, config, name="test", config={"model": {"hidden_size": 8}}, warn=said.append, **options)
    return tracker, said


def test_offline_run_holds_what_was_logged_and_is_one_run_after_a_resume(tmp_path, capfd):
    """Catches values lost or put at the wrong tokens, a second id after a resume, noise and prompts without a login."""
    tracker, said = open_tracker(tmp_path)
    tracker.scalars({"train/loss": 2.5, "routing/load_entropy": 0.75}, 100)
    tracker.scalars({"eval/loss": 2.25}, 100)
    tracker.scalars({"train/loss": 1.0 / 3}, 200)
    picture = tmp_path / "heat.png"
    Figure(figsize=(1, 1)).savefig(picture)
    tracker.image("position_loss/heat_map", picture, 200, "Heat map")
    tracker.curve("position_loss/curve_eval", "A title", [1024, 3072, 5120], [3.0, float("nan"), 2.0], 200)
    tracker.samples([Sample("book", "It was", " a night", " the best")], 200)
    tracker.finish()
    assert len(said) == 1 and said[0].startswith("wandb: offline run in") and str(tmp_path) in said[0]
    first = run_id(tmp_path)

    again, _ = open_tracker(tmp_path)
    again.scalars({"train/loss": 0.25}, 300)
    again.finish()
    assert run_id(tmp_path) == first
    assert {path.name for path in tmp_path.glob("wandb/offline-run-*/*.wandb")} == {f"run-{first}.wandb"}

    rows = {row["_step"]: row for row in history(tmp_path)}
    assert sorted(rows) == [100, 200, 300]
    assert [rows[step]["tokens"] for step in sorted(rows)] == [100, 200, 300]
    assert [rows[step]["train/loss"] for step in sorted(rows)] == [2.5, 1.0 / 3, 0.25]
    assert rows[100]["eval/loss"] == 2.25 and rows[100]["routing/load_entropy"] == 0.75
    assert rows[200]["position_loss/heat_map/caption"] == "Heat map"
    media = [path.name for path in tmp_path.glob("wandb/offline-run-*/files/media/**/*") if path.is_file()]
    assert any(name.endswith(".png") for name in media)
    tables = [json.loads(path.read_text()) for path in tmp_path.glob("wandb/offline-run-*/files/media/table/**/*.json")]
    rows = {tuple(table["columns"]): table["data"] for table in tables}
    assert rows[("context position", "loss")] == [[1024, 3.0], [5120, 2.0]]
    assert rows[("tokens", *Sample._fields)] == [[200, "book", "It was", " a night", " the best"]]
    out, err = capfd.readouterr()
    assert out == "" and err == "", "wandb itself stays silent"


def test_what_tells_a_run_from_others_is_in_it(tmp_path):
    """Catches plots over steps instead of tokens, constants that become charts of one point, summaries that show the
    last loss alone, and a run that does not say how it was made or cannot be found among others."""
    logging = LoggingConfig(wandb="offline", group="quickstart", tags=["mine", "x" * 100])
    tracker, _ = open_tracker(tmp_path, logging=logging, tags=["tiny", "mine"], notes="in words")
    tracker.scalars({"train/loss": 2.5, "train/trailing_loss": 2.0}, 100)
    tracker.scalars({"train/loss": 3.5, "train/trailing_loss": 3.0}, 200)
    tracker.constants({"machine/device": "cpu", "eval/documents": 8})
    tracker.alert("Skipped steps", "one")
    tracker.finish()
    kinds = kinds_of(tmp_path)
    run = kinds["run"][0]
    update = {item.key: json.loads(item.value_json) for item in run.config.update}
    assert update["model"] == {"hidden_size": 8}
    assert (run.display_name, run.run_group, run.job_type, run.notes) == ("test", "quickstart", "train", "in words")
    assert list(run.tags) == ["tiny", "mine", "x" * 64]
    assert any(metric.glob_name == "*" and metric.step_metric == "tokens" for metric in kinds["metric"])
    summary = summary_of(kinds)
    assert summary["train/loss"] == {"min": 2.5, "last": 3.5} and summary["train/trailing_loss"] == {"last": 3.0}
    assert summary["eval/documents"] == 8
    machine = [json.loads(i.value_json) for record in kinds["config"] for i in record.update if i.key == "machine"]
    assert machine == [{"device": "cpu"}]
    assert not {"eval/documents", "machine/device"} & {key for row in history(tmp_path) for key in row}
    assert [(alert.title, alert.text, alert.level) for alert in kinds["alert"]] == [("Skipped steps", "one", "WARN")]


@pytest.mark.parametrize(("variable", "expected"), [("", "offline"), ("offline", "offline"), ("disabled", None)])
def test_wandb_mode_of_the_environment_is_honoured(tmp_path, monkeypatch, variable, expected):
    """Catches an empty WANDB_MODE, which wandb itself refuses, and a user's WANDB_MODE=disabled that is ignored."""
    monkeypatch.setenv("WANDB_MODE", variable)
    wandb.teardown()
    tracker, said = open_tracker(tmp_path)
    tracker.scalars({"train/loss": 2.5}, 100)
    tracker.finish()
    assert [expected in line for line in said] == ([True] if expected else [])
    assert len(list(tmp_path.glob("wandb/offline-run-*"))) == (1 if expected else 0)


def test_online_without_an_account_goes_offline_with_one_line(tmp_path):
    """Catches a prompt, a wait or a crash where somebody asks for online without being logged in."""
    tracker, said = open_tracker(tmp_path, "online")
    tracker.finish()
    assert len(said) == 2 and "not logged in" in said[0] and "offline run" in said[1]


def test_an_unreachable_server_does_not_stop_the_run(tmp_path, monkeypatch):
    """Catches an exception or a long wait where there is a key but no network."""
    monkeypatch.setenv("WANDB_API_KEY", "0" * 40)
    monkeypatch.setenv("WANDB_BASE_URL", "http://127.0.0.1:9")
    monkeypatch.setattr("train.record.tracking.INIT_SECONDS", 2.0)
    wandb.teardown()
    tracker, said = open_tracker(tmp_path)
    tracker.scalars({"train/loss": 2.5}, 100)
    tracker.finish()
    assert len(said) == 2 and "online did not start" in said[0] and "offline run" in said[1]
    assert [row["train/loss"] for row in history(tmp_path)] == [2.5]


def test_a_failure_while_logging_switches_wandb_off_once(tmp_path):
    """Catches a full disk or a dead wandb process that ends training, or a warning for each step after it."""
    tracker, said = open_tracker(tmp_path, "offline")

    def fail(*args, **options):
        raise OSError("no space left on device")

    real, tracker._run.log = tracker._run, fail
    tracker.scalars({"train/loss": 2.5}, 100)
    tracker.scalars({"train/loss": 2.5}, 200)
    tracker.finish()
    real.finish()
    assert [line for line in said if "off from now on" in line] == said[1:] and len(said) == 2
    assert "no space left" in said[1]


def test_disabled_imports_and_writes_nothing(tmp_path):
    """Catches files or an id that appear although wandb was switched off."""
    tracker, said = open_tracker(tmp_path, "disabled")
    tracker.scalars({"train/loss": 2.5}, 100)
    tracker.curve("position_loss/curve_eval", "title", [1.0], [2.0], 100)
    tracker.image("heat", tmp_path / "missing.png", 100)
    tracker.finish()
    assert said == [] and list(tmp_path.iterdir()) == []


def test_a_torn_id_file_is_replaced(tmp_path):
    """Catches a resume that fails because a kill left an empty id file."""
    (tmp_path / "wandb_id.txt").write_text("")
    first = run_id(tmp_path)
    assert len(first) == 8 and run_id(tmp_path) == first


def test_a_mode_that_wandb_does_not_know_is_named(monkeypatch):
    """Catches wandb's own traceback of three lines."""
    monkeypatch.setenv("WANDB_MODE", "nonsense")
    with pytest.raises(ValueError, match=r"^WANDB_MODE=nonsense: choose one of online, offline"):
        wandb_mode("auto")
