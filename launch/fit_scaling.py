"""Fits scaling laws, L = a C^b, over finished runs of three sizes or more.

    python launch/fit_scaling.py runs/moba_s runs/moba_m runs/moba_l runs/full_s runs/full_m runs/full_l [to=<folder>]

Runs that share their attention are one series; differences are taken from the last one. C is what training computed, in
PFLOP/s-days, with the attended pairs and as if attention were full. Writes scaling.json, table.md in the format of the
MoBA paper's Table 3, scaling.png (its figure 3) and layers.png (its figure 5b).
"""

from __future__ import annotations

import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
sys.path[:] = [str(ROOT)] + [p for p in sys.path if Path(p or ".").resolve() != ROOT / "launch"]

from data.errors import DataError  # noqa: E402
from evals.results import commit, write_json  # noqa: E402
from evals.run_files import ReportError  # noqa: E402
from evals.scaling import Scaling, read_points  # noqa: E402
from evals.scaling_figures import plot_layers, plot_scaling  # noqa: E402
from launch.cli import UsageError, exits_on, key_values, result_folder, split_paths  # noqa: E402

KEYS = {"to": "folder of the results (default: scaling/ beside the first run)"}


@exits_on(ReportError, DataError, ValueError, OSError)
def main(argv: list[str] | None = None) -> None:
    """The command; see the module's text."""
    folders, arguments = split_paths(sys.argv[1:] if argv is None else argv)
    values = key_values(arguments, KEYS, about=__doc__)
    if not folders:
        raise UsageError("name run directories of three sizes or more: python launch/fit_scaling.py runs/* (--help)")
    scaling = Scaling(read_points(folders))
    to = result_folder(values, folders[0].parent / "scaling")
    path = write_json(to / "scaling.json", {"commit": commit(), **scaling.summary()})
    text = scaling.text()
    (to / "table.md").write_text(text + "\n", encoding="utf-8")
    plot_scaling(scaling, to / "scaling.png")
    plot_layers(scaling, to / "layers.png")
    print(f"{text}\nwrote {path}, and its table and figures beside it")


if __name__ == "__main__":
    main()
