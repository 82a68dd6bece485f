"""Compares two evaluations of the loss by position, document by document.

    python launch/compare.py runs/moba_32k runs/full_32k gap=0.01
    python launch/compare.py runs/a/evals/position_loss_..._stage.json runs/a/evals/position_loss_..._full.json

Each side is a run directory (its newest evaluation during training) or the .json of an evaluation that
launch/evaluate.py wrote: of another run, another checkpoint, or the same weights under another attention. Prints the
difference, first minus second, in each bucket, with its 95 % interval; writes it as .json and .png.
"""

from __future__ import annotations

import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
sys.path[:] = [str(ROOT)] + [p for p in sys.path if Path(p or ".").resolve() != ROOT / "launch"]

import numpy as np  # noqa: E402

from evals.comparison import plot_positions  # noqa: E402
from evals.paired import Difference, difference  # noqa: E402
from evals.position_loss import Evaluation, load_evaluation  # noqa: E402
from evals.results import commit, write_json  # noqa: E402
from evals.run_files import newest_evaluation  # noqa: E402
from launch.cli import UsageError, exits_on, key_values, result_folder, split_paths  # noqa: E402

KEYS = {
    "gap": "a difference in nats: says how many documents would show it (default: the one found)",
    "to": "folder of the results (default: comparisons/ in the current directory)",
}


@exits_on(ValueError, OSError)
def main(argv: list[str] | None = None) -> None:
    """The command; see the module's text."""
    paths, arguments = split_paths(sys.argv[1:] if argv is None else argv)
    values = key_values(arguments, KEYS, about=__doc__)
    if len(paths) != 2:
        raise UsageError(f"name two evaluations or run directories, not {len(paths)} (--help explains)")
    if paths[0].resolve() == paths[1].resolve():
        raise UsageError(f"{paths[0]} is given twice: name two evaluations or run directories")
    try:
        gap = float(values["gap"]) if "gap" in values else None
    except ValueError:
        gap = float("nan")
    if gap is not None and not 0 < gap < float("inf"):
        raise UsageError(f"gap={values['gap']}: must be a number of nats above 0, such as 0.01")
    sides = {_label(path, paths): _evaluation(path) for path in paths}
    (first, run), (second, reference) = sides.items()
    found = difference(run, reference)
    folder = result_folder(values, Path("comparisons"))
    stem = f"{first}_vs_{second}".replace("/", "_")
    plot_positions(sides, folder / f"{stem}.png")
    record = {"commit": commit(), "run": str(paths[0]), "reference": str(paths[1]), **found.summary(gap)}
    path = write_json(folder / f"{stem}.json", record)
    print(f"{first} minus {second}, nats per token\n{table(found, gap)}\nwrote {path}")


def _label(path: Path, paths: list[Path]) -> str:
    """A short name, unlike the other one's."""
    stems = [other.stem for other in paths]
    runs = [(other.resolve().parents[1] if other.suffix == ".json" else other.resolve()).name for other in paths]
    for names in (runs, stems):
        if len(set(names)) == len(names):
            return names[paths.index(path)]
    return str(path).removesuffix(".json").strip("/.")


def _evaluation(path: Path) -> Evaluation:
    if path.suffix == ".json":
        return load_evaluation(path)
    found = newest_evaluation(path / "position_loss")
    if found is None:
        raise UsageError(f"{path} has no evaluation in position_loss/; pass the .json of one (launch/evaluate.py)")
    return found


def table(found: Difference, gap: float | None = None) -> str:
    """The differences as text, one line per bucket, and what they rest on."""
    lines = [f"{'position':>15}  {'difference':>10}  {'95 %':>8}  {'sd':>7}  clusters"]
    intervals = found.interval()
    for b, (low, high) in enumerate(zip(found.edges, found.edges[1:])):
        mean, clusters = found.by_bucket.mean[b], found.by_bucket.clusters[b]
        lines.append(f"{low:>7}-{high:<7}  {mean:>+10.4f}  {intervals[b]:>8.4f}  {found.sd[b]:>7.4f}  {clusters:>8.0f}")
    how = (
        f"{found.num_documents} documents, each evaluated in both"
        if found.paired
        else "different documents: errors added"
    )
    lines.append(
        f"{how}; 95 %: half-width of the interval of one bucket; the variation between training seeds is not included"
    )
    if found.paired and not np.isfinite(intervals).all():
        lines.append("nan: fewer than two clusters, or one cluster with too many of the documents for a valid interval")
    if found.no_band is not None:
        lines.append(f"no simultaneous band over all buckets: {found.no_band}")
    last = found.by_bucket.mean[-1] if gap is None else gap
    if found.paired and np.isfinite(found.sd[-1]) and last:
        needed = found.summary(abs(last))
        lines.append(
            f"to see {abs(last):.4f} in the last bucket: {needed['needed_for_interval'][-1]} such clusters for an "
            f"interval that narrow, {needed['needed_for_80_percent_power'][-1]} for 80 % power"
        )
    return "\n".join(lines)


if __name__ == "__main__":
    main()
