"""Makes a wandb workspace and a report with the panels of a run: `python launch/dashboard.py project=moba-train`.

Without a wandb login, or with to=, the panels' definition is written to a JSON file. Needs the extra `dashboard`
(wandb-workspaces) to reach wandb.
"""

from __future__ import annotations

import importlib.util
import json
import re
import sys
from dataclasses import asdict
from importlib import import_module
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[1]
sys.path[:] = [str(ROOT)] + [p for p in sys.path if Path(p or ".").resolve() != ROOT / "launch"]

from conf.files import user_path  # noqa: E402
from conf.schema import LoggingConfig  # noqa: E402
from conf.words import cut  # noqa: E402
from launch.cli import UsageError, exits_on, key_values  # noqa: E402
from train.record.series import AXIS, PANELS, Panel  # noqa: E402
from train.record.tracking import wandb_mode  # noqa: E402

FILE = "dashboard.json"
ALLOWED = {
    "project": f"wandb project (default {LoggingConfig.project})",
    "entity": "wandb entity (default: the account's default)",
    "name": "name of the workspace and the report (default MoBA training)",
    "to": f"write the panels to this JSON file without contacting the server (default without a login: {FILE})",
}


@exits_on(OSError, ValueError)
def main(argv: list[str]) -> None:
    values = key_values(argv, ALLOWED, about=__doc__)
    name, project = values.get("name", "MoBA training"), values.get("project", LoggingConfig.project)
    for key in ("project", "entity"):
        if not re.fullmatch(r"[^/\\#?%:]+", values.get(key, "-")):
            raise UsageError(f"{key}={cut(values[key])}: the name of a wandb {key}, without / \\ # ? % :")
    if "to" in values or wandb_mode("auto") != "online":
        path = user_path(values.get("to", FILE))
        path.write_text(json.dumps(definition(name), indent=1) + "\n", encoding="utf-8")
        why = "" if "to" in values else "not logged in to wandb (`wandb login`): "
        print(f"{why}the panels are in {path}")
        return
    if importlib.util.find_spec("wandb_workspaces") is None:
        raise UsageError("wandb-workspaces is not installed (pip install 'moba-train[dashboard]'); or to=<file>.json")
    print(*publish(name, project, values.get("entity")), sep="\n")


def definition(name: str) -> dict[str, Any]:
    """The sections and panels as plain values; every panel is over tokens."""
    sections = {section: [asdict(panel) for panel in panels] for section, panels in PANELS.items()}
    return {"name": name, "x": AXIS, "sections": sections}


def publish(name: str, project: str, entity: str | None) -> list[str]:
    """Saves a workspace and a report; their addresses. UsageError if the server refuses."""
    import wandb

    try:
        entity = entity or wandb.Api().default_entity
        made = [workspace(name, project, entity), report(name, project, entity)]
        for one in made:
            one.save()
        return [one.url for one in made]
    except (wandb.Error, ValueError, OSError) as error:  # requests' errors are OSErrors
        raise UsageError(f"wandb, project {project}: {error}; or to=<file>.json") from error


def workspace(name: str, project: str, entity: str | None) -> Any:
    """The wandb workspace, not saved: a section per group."""
    ws: Any = import_module("wandb_workspaces.workspaces")

    sections = [
        ws.Section(name=section, panels=[_chart(panel) for panel in panels], is_open=section in ("train", "eval"))
        for section, panels in PANELS.items()
    ]
    settings = ws.WorkspaceSettings(x_axis=AXIS, group_by_prefix="first")
    return ws.Workspace(entity=entity, project=project, name=name, sections=sections, settings=settings)


def report(name: str, project: str, entity: str | None) -> Any:
    """The wandb report, not saved: a heading and a grid a group, over all training runs of the project."""
    wr: Any = import_module("wandb_workspaces.reports.v2")

    blocks: list[Any] = [wr.TableOfContents()]
    for section, panels in PANELS.items():
        runs = wr.Runset(entity=entity, project=project, name="training", filters='JobType = "train"')
        blocks += [wr.H2(section), wr.PanelGrid(runsets=[runs], panels=[_chart(panel) for panel in panels])]
    return wr.Report(project=project, entity=entity, title=name, blocks=blocks, width="fluid")


def _chart(panel: Panel) -> Any:
    wr: Any = import_module("wandb_workspaces.reports.v2")

    if panel.media:
        return wr.MediaBrowser(title=panel.title, media_keys=list(panel.media), num_columns=len(panel.media))
    if panel.table is not None:
        fields = {"x": "context position", "y": "loss"}
        query = {"summaryTable": {"tableKey": f"{panel.table}_table"}}
        strings = {"title": panel.title}
        return wr.CustomChart(query=query, chart_name="wandb/line/v0", chart_fields=fields, chart_strings=strings)
    return wr.LinePlot(
        title=panel.title,
        x=AXIS,
        y=list(panel.series),
        metric_regex=panel.regex,
        title_x=AXIS,
        title_y=panel.y,
        log_y=panel.log_y or None,
    )


if __name__ == "__main__":
    main(sys.argv[1:])
