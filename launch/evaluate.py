"""Measures a trained model: json, arrays and figures into its run directory.

    python launch/evaluate.py run=runs/quickstart evals=[position_loss]
    python launch/evaluate.py run=runs/moba_32k attention=full seq_len=32K documents=64

position_loss: the loss by position on the held-out documents of the run's own data. The same weights can be measured
under another attention, and on documents of another length.
"""

from __future__ import annotations

import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
sys.path[:] = [str(ROOT)] + [p for p in sys.path if Path(p or ".").resolve() != ROOT / "launch"]

from conf.numbers import format_length, parse_length  # noqa: E402
from data.errors import DataError  # noqa: E402
from data.sources import open_validation  # noqa: E402
from data.validation import held_out_documents  # noqa: E402
from evals.figures import CONFIDENCE  # noqa: E402
from evals.loading import TrainedModel, attention_plan, load_trained  # noqa: E402
from evals.position_loss import evaluate  # noqa: E402
from launch.cli import UsageError, exits_on, key_values  # noqa: E402
from train.checkpoint import CheckpointError  # noqa: E402
from train.metrics import describe_plan  # noqa: E402

KEYS = {
    "run": "run directory (its newest checkpoint), or one checkpoint's directory",
    "evals": "which: [position_loss] (default: all)",
    "attention": "stage (as trained, default), full, or <block size>x<top_k> such as 512x3",
    "seq_len": "length of the held-out documents (default: eval.seq_len of the run, else its stage's length)",
    "documents": "held-out documents at most (default: eval.documents of the run)",
    "device": "auto (default), cpu or cuda",
    "to": "folder of the results (default: evals/ in the run directory)",
}


@exits_on(CheckpointError, DataError, ValueError, OSError)
def main(argv: list[str] | None = None) -> None:
    """The command; see the module's text."""
    values = key_values(sys.argv[1:] if argv is None else argv, KEYS, about=__doc__, required=["run"])
    chosen = [name.strip() for name in values.get("evals", ",".join(EVALS)).strip("[]").split(",")]
    unknown = [name for name in chosen if name not in EVALS]
    if unknown:
        raise UsageError(f"evals={','.join(unknown)}: choose from {', '.join(EVALS)}")
    trained = load_trained(values["run"], values.get("device", "auto"))
    trained.model.set_attention(attention_plan(values.get("attention", "stage"), trained))
    for name in chosen:
        EVALS[name](trained, values)


def position_loss(trained: TrainedModel, values: dict[str, str]) -> None:
    """Writes evals/position_loss_<tokens>_<length>_<attention>.json, .npz and .png, and prints the trailing loss."""
    config = trained.config
    seq_len = config.eval.seq_len or trained.stage.seq_len
    if "seq_len" in values:
        seq_len = parse_length(values["seq_len"])
    limit = values.get("documents", str(config.eval.documents))
    if not limit.isdecimal() or int(limit) < 1:
        raise UsageError(f"documents={limit}: must be a whole number of at least 1")
    source = open_validation(config.data, log=print)
    if source is None:
        raise UsageError(f"{trained.checkpoint} was trained without held-out documents (data.validation)")
    documents = held_out_documents(source, seq_len, int(limit))
    attention = describe_plan(trained.model.attention)
    print(f"position_loss: {len(documents)} documents of {format_length(seq_len)} tokens, {attention}", flush=True)
    found = evaluate(trained.model, documents, seq_len=seq_len, device=trained.device)

    folder = Path(values["to"]).expanduser() if "to" in values else trained.checkpoint.parents[1] / "evals"
    kind = values.get("attention", "stage")
    stem = f"position_loss_{trained.tokens:015d}_{format_length(seq_len)}_{kind}"
    info = {"tokens": trained.tokens, "stage": trained.stage.name, "attention": attention}
    path = found.save(folder, stem, checkpoint=trained.checkpoint.name, **info)
    value, se, _, _ = found.curve.trailing
    known = f"+- {CONFIDENCE * se:.4f} (95 %, documents as clusters)"
    print(f"trailing loss {value:.4f} {known if se == se else '(one document: no error estimate)'}\nwrote {path}")


EVALS = {"position_loss": position_loss}

if __name__ == "__main__":
    main()
