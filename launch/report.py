"""Writes an HTML report that compares runs: loss over tokens, loss by position, speed, and the differences from the
last run named.

    python launch/report.py runs/moba_32k runs/full_32k [to=<folder>]

One run gives its own report. The result is report.html, which needs no other file, and its figures as PNG beside it.
Works on a run that is still going on.
"""

from __future__ import annotations

import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
sys.path[:] = [str(ROOT)] + [p for p in sys.path if Path(p or ".").resolve() != ROOT / "launch"]

from evals.report import ReportError, read_runs, write_report  # noqa: E402
from evals.run_files import unique_names  # noqa: E402
from launch.cli import UsageError, exits_on, key_values, result_folder, split_paths  # noqa: E402

KEYS = {"to": "folder of the report (default: one run's own directory; for several, report_<names> beside the first)"}


@exits_on(ReportError, OSError)
def main(argv: list[str] | None = None) -> None:
    """The command; see the module's text."""
    folders, arguments = split_paths(sys.argv[1:] if argv is None else argv)
    values = key_values(arguments, KEYS, about=__doc__)
    if not folders:
        raise UsageError("name at least one run directory: python launch/report.py runs/a runs/b (--help explains)")
    runs = read_runs(folders)
    print(f"report: {write_report(runs, result_folder(values, _default_folder(folders)))}")


def _default_folder(folders: list[Path]) -> Path:
    """Where a report goes by default."""
    if len(folders) == 1:
        return folders[0]
    names = (name.replace("/", "_") for name in unique_names(folders))
    return folders[0].parent / ("report_" + "_vs_".join(names))


if __name__ == "__main__":
    main()
