"""launch/dashboard.py: the panels as a file without a login, and as wandb's own objects."""

from __future__ import annotations

import json

import pytest

import launch.dashboard as dashboard
from train.record.series import PANELS


@pytest.fixture(autouse=True)
def no_account(tmp_path, monkeypatch):
    monkeypatch.setattr(dashboard, "wandb_mode", lambda asked: "offline")
    monkeypatch.chdir(tmp_path)


def test_without_a_login_the_panels_become_a_file(tmp_path, capsys):
    """Catches a prompt, an error or a file that lacks panels."""
    dashboard.main([])
    assert "not logged in" in capsys.readouterr().out
    written = json.loads((tmp_path / "dashboard.json").read_text())
    assert written["x"] == "tokens" and list(written["sections"]) == list(PANELS)
    titles = [panel["title"] for panels in written["sections"].values() for panel in panels]
    assert titles == [panel.title for panels in PANELS.values() for panel in panels]


@pytest.mark.parametrize(
    ("argument", "word"),
    [("porject=x", "project"), ("x", "key=value"), ("project=", "project=: "), ("entity=a/b", "entity=a/b: ")],
)
def test_mistakes_are_a_line(argument, word, capsys):
    """Catches a traceback for a slip of the pen."""
    with pytest.raises(SystemExit) as ended:
        dashboard.main([argument])
    assert ended.value.code == 2 and word in capsys.readouterr().err


def test_wandb_takes_every_panel():
    """Catches a panel, a section or a filter that wandb-workspaces refuses, or charts over steps."""
    pytest.importorskip("wandb_workspaces")
    made = dashboard.workspace("name", "project", "entity")
    assert [section.name for section in made.sections] == list(PANELS)
    spec = json.loads(made._to_model().model_dump_json(by_alias=True))
    sections = spec["spec"]["section"]["panelBankConfig"]["sections"]
    lines = [p["config"] for s in sections for p in s["panels"] if p["viewType"] == "Run History Line Plot"]
    wanted = [panel for panels in PANELS.values() for panel in panels if panel.series or panel.regex]
    assert [line["chartTitle"] for line in lines] == [panel.title for panel in wanted]
    assert all(line["xAxis"] == "tokens" for line in lines)
    assert [tuple(line["metrics"] or ()) for line in lines] == [panel.series for panel in wanted]
    report = dashboard.report("name", "project", "entity")
    grids = [block for block in report.blocks if hasattr(block, "panels")]
    assert [len(grid.panels) for grid in grids] == [len(panels) for panels in PANELS.values()]
