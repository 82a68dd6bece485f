"""launch/report.py and evals/report.py: a report from run directories that needs nothing else, or one line of error."""

import base64
import html
import json
import re
import shutil
import struct
import subprocess
import sys
from html.parser import HTMLParser
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
from matplotlib.figure import Figure

from evals.report import stage_boundaries
from evals.run_files import read_run, unique_names
from launch.report import main
from moba.kinds import Full, Moba
from train.record.metrics import MetricsLog, stage_columns
from train.record.position_loss import PositionCurve, Trailing

ROOT = Path(__file__).resolve().parents[2]
FULL, MOBA = Full(), Moba(64, 4)


def make_run(folder: Path, attentions, *, loss=3.0, evaluate=True, name="x<b>"):
    """A run directory with one stage of 40 steps an attention; the loss is constant, so that every mean is known."""
    folder.mkdir(parents=True)
    log = MetricsLog(folder / "metrics.jsonl")
    log.write("run", 0, device=name, num_devices=2, peak_tflops=None, convention="how FLOPs are <counted>")
    for index, spec in enumerate(attentions):
        start = 4000 * index
        stage = SimpleNamespace(
            name=f"{spec.name}{index}",
            index=index,
            start=start,
            end=start + 4000,
            seq_len=2048,
            batch_tokens=100,
            attention=(spec, spec),
        )
        log.stage(stage)
        for step in range(1, 41):
            log.write(
                "train",
                start + 100 * step,
                **stage_columns(stage),
                loss=loss,
                trailing_loss=loss - 0.5,
                tokens_per_second=5000.0,
                tflops=0.25,
                mfu=None,
                mfu_dense_equivalent=None,
                attended_share=0.125,
                seconds=0.1,
                peak_memory_gib=None,
                skipped_steps=0,
            )
    if evaluate:
        log.write("eval", start + 4000, loss=loss, trailing_loss=loss - 0.25, trailing_se=0.125, documents=3)
        save_curve(folder, start + 4000, loss)
    return folder


def save_curve(folder: Path, tokens: int, loss: float):
    """An evaluation as evals.position_loss.Evaluation saves it."""
    ones = np.ones(16)
    curve = PositionCurve(
        2048,
        np.arange(17) * 128,
        loss * ones,
        0.1 * ones,
        256 * ones,
        2 * ones,
        Trailing(loss, 0.1, 256, 2),
        np.ones(2048),
        np.ones(2048),
    )
    (folder / "position_loss").mkdir(exist_ok=True)
    stem = folder / "position_loss" / f"eval_{tokens:015}"
    keys, rows = ["a", "b"], loss * np.ones((2, 16))
    np.savez_compressed(f"{stem}.npz", **curve.arrays(), document_ids=keys, document_keys=keys, document_loss=rows)
    record = {"tokens": tokens, "num_non_finite": 0, "cohort": "fixed: documents of full length"}
    Path(f"{stem}.json").write_text(json.dumps(record))


class Page(HTMLParser):
    """The cells of a page's tables, row by row, and the sources of what it loads."""

    def __init__(self, text):
        super().__init__()
        self.rows, self.sources = [], []
        self.feed(text)

    def handle_starttag(self, tag, attributes):
        self.sources += [value for key, value in attributes if key in ("src", "href")]
        if tag == "tr":
            self.rows.append([])
        if tag in ("td", "th"):
            self.rows[-1].append("")

    def handle_data(self, data):
        if self.rows and self.rows[-1]:
            self.rows[-1][-1] += (
                data.strip() if self.get_starttag_text() in ("<td>", "<th>", '<td class="text">') else ""
            )


def test_two_runs_give_one_page_with_everything_in_it(tmp_path, capsys):
    """Catches numbers of the wrong run or stage, figures left outside the page, and text that breaks the page."""
    a = make_run(tmp_path / "a", [MOBA, FULL], loss=3.0)
    b = make_run(tmp_path / "b", [FULL], loss=2.5)
    main([str(a), str(b), f"to={tmp_path / 'out'}"])
    path = tmp_path / "out" / "report.html"
    assert capsys.readouterr().out.strip() == f"report: {path}"
    text = path.read_text()
    page = Page(text)
    assert "x&lt;b&gt;" in text and "how FLOPs are &lt;counted&gt;" in text
    cells = {row[0]: dict(zip(page.rows[0], row)) for row in page.rows if row[0] in ("a", "b")}
    assert cells["a"]["tokens"] == "8K" and cells["b"]["tokens"] == "4K"
    assert cells["a"]["loss at the end"] == "3.000" and cells["b"]["held-out trailing"] == "2.250 +- 0.538"
    assert cells["a"]["device"] == "2 x x<b>"
    head = next(row for row in page.rows if row[0] == "stage")
    stages = {row[0]: dict(zip(head, row)) for row in page.rows if ":" in row[0]}
    assert list(stages) == ["a: moba0", "a: full1", "b: full0"]
    assert stages["a: moba0"]["attention"] == "moba 64x4" and stages["a: full1"]["attention"] == "full"
    assert stages["a: full1"]["tokens"] == "4K" and stages["a: moba0"]["length"] == "2K"
    assert stages["a: moba0"]["attended"] == "12.5%" and stages["a: moba0"]["tokens/s"] == "5K"
    assert stages["a: moba0"]["MFU"] == "" and stages["a: moba0"]["TFLOP/s"] == "0.25"
    pictures = [source for source in page.sources if not source.startswith("#")]
    assert len(pictures) == 5 and all(source.startswith("data:image/png;base64,") for source in pictures)
    gap = dict(zip(*(row for row in page.rows if row[0] in ("difference", "a - b"))))
    assert gap["last bucket"] == "+0.5000 +- 0.0000" and gap["measured on"] == "2 documents in common"
    for source in pictures:
        image = base64.b64decode(source.split(",", 1)[1])
        width, height = struct.unpack(">II", image[16:24])
        assert image[:8] == b"\x89PNG\r\n\x1a\n" and width > 500 and height > 300


def test_one_run_reports_into_its_own_directory(tmp_path):
    """Catches a report that needs an evaluation or a second run."""
    run = make_run(tmp_path / "a", [MOBA, FULL], evaluate=False)
    main([str(run)])
    assert (run / "report.html").is_file()
    assert {path.stem for path in (run / "figures").iterdir()} == {
        "report_loss",
        "report_trailing_loss",
        "report_speed",
    }


def add_results(run: Path, tokens: int, value: float):
    """The results of launch/evaluate.py in a run, each with a picture."""
    (run / "evals").mkdir(exist_ok=True)
    origin = {"tokens": tokens, "attention": "moba 64x4", "commit": None, "device": "cpu", "date": "2026-01-01"}
    mean = {"mean": value, "se": 0.1, "interval_95": 0.25}
    kinds = ("loss", "loss_minus_full", "trailing", "trailing_minus_full")
    cell = {"prefill": "moba", "decode": "full", "loss": mean, "minus_full": mean, "kl_from_full": mean}
    answers = {"accuracy": value, "interval_95": [0.0, 1.0], "nll": 2.0}
    records = {
        "swap": {
            "variants": [{"attention": "oracle", **dict.fromkeys(kinds, mean)}],
            "trailing_costs": {"sparsity costs": mean},
            "last_tokens": 16,
            "prefill_decode": [cell],
        },
        "recall": {
            "tasks": {
                "mqar": {"gate_matters": False, "variants": [{"attention": "local", "all": answers, "far": answers}]}
            }
        },
        "routing": {"overall": {"captured": {"mean": value, "se": None}}, "columns": {"captured": "what <it> is"}},
    }
    figure = Figure(figsize=(2, 1))
    for kind, record in records.items():
        stem = run / "evals" / f"{kind}_{tokens:015d}_2K_stage"
        stem.with_suffix(".json").write_text(json.dumps(origin | record))
        figure.savefig(f"{stem}_curves.png" if kind == "routing" else f"{stem}.png")


def test_results_and_plans_are_in_the_page(tmp_path):
    """Catches results of an older checkpoint, tables and pictures left out, and a plan that is not shown."""
    run = make_run(tmp_path / "a", [MOBA])
    (run / "plan.txt").write_text("stage <sparse>")
    add_results(run, 1000, 0.125)
    add_results(run, 4000, 0.375)
    main([str(run)])
    text = (run / "report.html").read_text()
    page = Page(text)
    rows = {row[0]: row[1:] for row in page.rows}
    assert rows["oracle"] == ["0.3750 +- 0.2500"] * 4 and rows["moba x full"][-1] == "0.37500"
    assert rows["sparsity costs"] == ["0.3750 +- 0.2500"]
    assert rows["mqar"] == ["local", "0.375 (0.000 to 1.000)", "0.375 (0.000 to 1.000)", "2.000", "no: too few blocks"]
    assert rows["captured"] == ["0.3750", "what <it> is"] and "0.125" not in text
    assert "stage &lt;sparse&gt;" in text and len([s for s in page.sources if s[0] != "#"]) == 5 + 3


def test_ten_runs_fit_in_a_page_and_old_figures_go(tmp_path):
    """Catches a report that only works for a few runs, and figures of an earlier report shown as this one's."""
    runs = [make_run(tmp_path / f"r{i}", [MOBA, FULL], loss=3.0 + i / 10, evaluate=False) for i in range(10)]
    stale = tmp_path / "out" / "figures" / "report_position.png"
    stale.parent.mkdir(parents=True)
    stale.write_bytes(b"an earlier one")
    main([*map(str, runs), f"to={tmp_path / 'out'}"])
    page = Page((tmp_path / "out" / "report.html").read_text())
    assert [row[0] for row in page.rows if len(row[0]) == 2 and row[0][0] == "r"] == [f"r{i}" for i in range(10)]
    assert not stale.exists() and sum(source[0] != "#" for source in page.sources) == 3


CHROME = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome", "chrome"))), None)


@pytest.mark.skipif(CHROME is None, reason="no chromium or chrome on the path")
def test_a_browser_shows_the_page(tmp_path):
    """Catches a page whose pictures a browser cannot decode, or whose markup it has to mend into something else."""
    run = make_run(tmp_path / "a", [MOBA, FULL])
    add_results(run, 4000, 0.5)
    main([str(run)])
    probe = (
        "<script>onload = () => { document.title = JSON.stringify({"
        "widths: [...document.images].map(i => i.naturalWidth), tables: document.querySelectorAll('tbody').length,"
        "headings: [...document.querySelectorAll('h2')].map(h => h.textContent),"
        "loaded: performance.getEntriesByType('resource').filter(r => !r.name.startsWith('data:')).length }) }</script>"
    )
    page = tmp_path / "probe.html"
    page.write_text((run / "report.html").read_text().replace("</head>", f"{probe}</head>"))
    command = [CHROME, "--headless", "--no-sandbox", "--disable-gpu", f"--user-data-dir={tmp_path / 'profile'}"]
    done = subprocess.run([*command, "--dump-dom", page.as_uri()], capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr[-2000:]
    found = json.loads(html.unescape(re.search(r"<title>(.*?)</title>", done.stdout)[1]))
    assert len(found["widths"]) == 8 and min(found["widths"]) > 100 and found["loaded"] == 0
    assert found["tables"] == 7 and {"Runs", "Attention swap", "Recall", "Routing"} <= set(found["headings"])


def test_the_newest_evaluation_is_shown(tmp_path):
    """Catches an earlier evaluation, or training losses, in place of the last held-out curve."""
    run = make_run(tmp_path / "a", [MOBA], loss=3.0)
    save_curve(run, 1000, 9.0)
    held_out = read_run(run).held_out
    held_out.curve.to_npz(run / "position_loss" / "train_0_moba0.npz")  # no json beside it: not an evaluation
    assert read_run(run).held_out.curve.mean[0] == 3.0
    assert list(read_run(run).held_out.document_keys) == ["a", "b"]


def test_a_running_run_can_be_reported(tmp_path):
    """Catches a torn last line that stops a report on a run that is still writing."""
    run = make_run(tmp_path / "a", [MOBA], evaluate=False)
    with open(run / "metrics.jsonl", "a") as file:
        file.write('{"kind": "train", "tok')
    main([str(run)])
    assert (run / "report.html").is_file()


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda folder: None, "is not a directory"),
        (lambda folder: folder.mkdir(), "has no metrics.jsonl"),
        (lambda folder: (folder.mkdir(), (folder / "metrics.jsonl").write_text("")), "no train line yet"),
        (
            lambda folder: (folder.mkdir(), (folder / "metrics.jsonl").write_text("x\ny\n")),
            "line 1: not a line of metrics",
        ),
    ],
)
def test_what_is_missing_is_said_in_one_line(tmp_path, capsys, make, message):
    """Catches tracebacks, and half a report left behind, for a mistake of the user's."""
    good = make_run(tmp_path / "good", [MOBA])
    make(tmp_path / "bad")
    with pytest.raises(SystemExit) as stopped:
        main([str(good), str(tmp_path / "bad"), f"to={tmp_path / 'out'}"])
    error = capsys.readouterr().err
    assert stopped.value.code == 2
    assert error.count("\n") == 1 and message in error and str(tmp_path / "bad") in error
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("arguments", [[], ["form=pdf"], ["--verbose"]])
def test_wrong_arguments_are_refused(arguments, capsys):
    """Catches an argument that is silently ignored."""
    with pytest.raises(SystemExit) as stopped:
        main(arguments)
    assert stopped.value.code == 2 and capsys.readouterr().err.startswith("error: ")


def test_a_directory_may_contain_an_equals_sign(tmp_path):
    """Catches a run called lr=3e-4 that is taken for an argument."""
    run = make_run(tmp_path / "lr=3e-4", [MOBA], evaluate=False)
    main([str(run)])
    assert (run / "report.html").is_file()


def test_runs_of_the_same_name_are_told_apart(tmp_path):
    """Catches two lines with one label, and a run given twice."""
    assert unique_names([tmp_path / "x" / "run", tmp_path / "y" / "run"]) == ["x/run", "y/run"]
    assert unique_names([tmp_path / "x" / "run"]) == ["run"]
    with pytest.raises(ValueError, match="given twice"):
        unique_names([tmp_path / "x", tmp_path / "y" / ".." / "x"])


def test_boundaries_name_the_run_where_stages_differ(tmp_path):
    """Catches a stage switch that is drawn as if every run had it."""
    hybrid = read_run(make_run(tmp_path / "hybrid", [MOBA, FULL], evaluate=False))
    full = read_run(make_run(tmp_path / "full", [FULL], evaluate=False))
    assert stage_boundaries([hybrid]) == [(0, "moba0"), (4000, "full1")]
    assert stage_boundaries([hybrid, full]) == [(4000, "hybrid: full1")]


def test_the_command_runs_from_any_directory(tmp_path):
    """Catches an import that only works in the checkout, and help that is missing."""
    make_run(tmp_path / "a", [MOBA], evaluate=False)
    script = str(ROOT / "launch" / "report.py")
    done = subprocess.run([sys.executable, script, "a"], cwd=tmp_path, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert re.fullmatch(r"report: a/report\.html\n", done.stdout) and done.stderr == ""
    shown = subprocess.run([sys.executable, script, "--help"], cwd=tmp_path, capture_output=True, text=True)
    assert shown.returncode == 0 and "to=" in shown.stdout
