"""Retrieval in a small model that was trained for it: a needle grid under each attention, for full attention, MoBA and
MoBA with the first block always seen, each trained from the same start.

    python benchmarks/retrieval.py to=results/retrieval jobs=3

Texts are made (data/retrieval_set.py) and tokenised; a start is trained at a quarter of the length with full attention,
from which each attention is trained on at the whole length. The grid then asks each of them under its own attention,
under full attention and under the others'. An interrupted study goes on where it was.
A Qwen3-shaped model of 28M parameters with a key convolution; overrides of launch/train.py change it, such as
model.num_layers=4.
"""

from __future__ import annotations

import json
import lzma
import re
import sys
from concurrent.futures import ProcessPoolExecutor, ThreadPoolExecutor
from functools import partial
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import numpy as np
from matplotlib.figure import Figure

from benchmarks.common import evaluate, markdown, origin, read_json, split, train, whole_numbers, write
from conf.numbers import format_length, given_length, parse_tokens
from data import retrieval_set
from data.sources import SHIPPED_TEXT
from evals.style import save
from launch import prepare_data
from launch.cli import UsageError, exits_on, key_values

MODEL = [
    "model=tiny",
    "model.hidden_size=512",
    "model.num_layers=8",
    "model.num_heads=8",
    "model.num_kv_heads=4",
    "model.head_dim=64",
    "model.ffn_size=1408",
    "model.qk_norm=true",
    "model.rope_theta=200000",
    "model.key_conv=3",  # 48M tokens were too few without it, at 28M parameters and steps of 64K tokens
    "optim.lr.warmup_tokens=5%",
    "eval.documents=16",
    "eval.every_tokens=0",
    "checkpoint.every_tokens=0",
    "logging.wandb=disabled",
    "logging.every_tokens=1M",
]
START = "start"
KEYS = {
    "to": "folder of the results",
    "work": "folder of the texts and runs (default: in it)",
    "length": "of the contexts at the end (default 8K)",
    "attention": "MoBA, without the first block (default 128x8)",
    "documents": "that are made, 48,000 characters each (default 1200)",
    "start_tokens": "trained at a quarter of the length, with full attention (default 48M)",
    "tokens": "trained at the whole length, each attention (default 24M)",
    "batch": "tokens of a step (default 32K)",
    "beside": "attentions of the grid besides full, such as blocks of other sizes (default <attention>,<attention>+1)",
    "depths": "of the grid (default 10)",
    "samples": "of the grid (default 10)",
    "seed": "default 0",
    "workers": "processes that make and tokenise texts (default 8)",
    "jobs": "attentions trained at a time; several fit one GPU, which a model so small does not fill (default 1)",
    "device": "auto, cpu or cuda",
    "commit": "commit of the code, where this is no git checkout",
}


@exits_on(ValueError, OSError)
def main() -> None:
    """The command; see the module's text."""
    overrides, arguments = split(sys.argv[1:])
    values = key_values(arguments, KEYS, about=__doc__, required=["to"])
    to, device = Path(values["to"]), values.get("device", "auto")
    numbers = {"seed": "0", "workers": "8", "documents": "1200", "jobs": "1"}
    seed, workers, documents, jobs = (
        whole_numbers(values, key, default, least=int(key != "seed"))[0] for key, default in numbers.items()
    )
    work, attention = Path(values.get("work", to)), values.get("attention", "128x8")
    if attention.count("x") != 1 or "+" in attention:
        raise UsageError(f"attention={attention}: <block size>x<top_k>, such as 128x8")
    length = given_length({"length": "8K"} | values, "length")
    beside = values.get("beside", f"{attention},{attention}+1")
    if unknown := [one for one in beside.split(",") if not re.fullmatch(r"[0-9]+K?x[0-9]+(\+[0-9]+)?", one)]:
        raise UsageError(f"beside={beside}: {unknown[0]}: <block size>x<top_k>, such as 128x8 or 128x8+1")
    shards = texts(work, documents, workers)
    common = [*MODEL, "data=files", f"data.path={shards}", "data.tokenizer=bpe-4k", f"run.device={device}"]
    common += [f"schedule.batch_tokens={values.get('batch', '32K')}", *overrides]
    budgets = {name: parse_tokens(values.get(name, default)) for name, default in DEFAULT_TOKENS.items()}
    first = [f"schedule.seq_len={length // 4}", f"schedule.tokens={budgets['start_tokens']}", "schedule=full_only"]
    start = train(work / START, [*common, *first, "optim.lr.peak=2e-3"], seed)
    asked = [f"lengths={lengths(length)}", "forms=key_value", "arms=full", "attention=full", f"beside={beside}"]
    asked += [f"{key}={values[key]}" for key in ("depths", "samples") if key in values]
    then = [*common, f"schedule.seq_len={length}", f"schedule.tokens={budgets['tokens']}", "optim.lr.peak=1e-3"]

    def measured(item: tuple[str, list[str]]) -> dict:
        name, own = item
        run = train(work / name, [*then, *own, f"init.source={start}"], seed)
        return read_json(evaluate(run, "needle", *asked, f"device={device}"))

    arms = trainings(attention)
    with ThreadPoolExecutor(jobs) as pool:
        found = dict(zip(arms, pool.map(measured, arms.items())))
    record = {**origin(sys.argv[1:], values.get("commit")), "seed": seed, "trained": found}
    text = write(record, table(found), to)
    draw(found, to / "retrieval.png")
    print(text)


DEFAULT_TOKENS = {"start_tokens": "48M", "tokens": "24M"}


def trainings(attention: str) -> dict[str, list[str]]:
    """Name -> overrides of what is trained from the start."""
    block_size, _, top_k = attention.partition("x")
    sparse = ["schedule=moba_only", f"schedule.block_size={block_size}", f"schedule.top_k={top_k}"]
    first = "schedule.stages.sparse.attention.first_blocks=1"
    return {"full": ["schedule=full_only"], "moba": sparse, "moba_first": [*sparse, first]}


def lengths(longest: int) -> str:
    """Those of the grid: 1/8 to all of the longest, by doubling."""
    return ",".join(str(longest // part) for part in (8, 4, 2, 1))


def texts(work: Path, number: int, workers: int) -> Path:
    """The folder of tokenised texts, made if it is not there."""
    folder, shards = work / "texts", work / "shards"
    folder.mkdir(parents=True, exist_ok=True)
    pieces = np.array_split(np.arange(number), max(1, workers))
    with ProcessPoolExecutor(max(1, workers)) as pool:
        list(pool.map(partial(_write, folder), range(len(pieces)), [piece.tolist() for piece in pieces]))
    arguments = [f"source={folder}/*.jsonl", f"to={shards}", "tokenizer=bpe-4k", f"workers={workers}", "shard_mb=2"]
    prepare_data.main(arguments)
    return shards


def _write(folder: Path, index: int, numbers: list[int]) -> None:
    file = folder / f"{index:03d}_{len(numbers)}.jsonl"
    if file.is_file():
        return
    with lzma.open(SHIPPED_TEXT["embedded"], "rt", encoding="utf-8") as books:
        known = [json.loads(row)["text"] for row in books]
    rows = (retrieval_set.document(number, known) for number in numbers)
    text = "".join(json.dumps({"id": name, "text": text}) + "\n" for name, text in rows)
    file.with_suffix(".part").write_text(text, encoding="utf-8")
    file.with_suffix(".part").rename(file)


def table(found: dict[str, dict]) -> list[str]:
    """Markdown: right answers of each training under each attention, exact and ranked, at all lengths together."""
    arms = list(dict.fromkeys(row["arm"] for record in found.values() for row in record["shares"]))
    rows = []
    for name, record in found.items():
        own = {row["arm"]: row for row in record["shares"] if row["length"] is None}
        rows.append([name, *(", ".join(_share(own[arm][score]) for score in ("exact", "ranked")) for arm in arms)])
    return markdown(["trained with", *(f"{arm}: exact, ranked (%)" for arm in arms)], rows)


def _share(found: dict) -> str:
    low, high = found["interval_95"]
    return f"{100 * found['share']:.0f} ({100 * low:.0f} to {100 * high:.0f})"


def draw(found: dict[str, dict], path: Path) -> None:
    """Heat maps of exact answers over length and depth: a row per training, a column per attention."""
    arms = list(next(iter(found.values()))["cells"]["key_value"])
    figure = Figure(figsize=(3.4 * len(arms) + 1, 3.2 * len(found) + 0.6), layout="constrained")
    grid = figure.subplots(len(found), len(arms), squeeze=False, sharex=True, sharey=True)
    mesh = None
    for row, (name, record) in zip(grid, found.items()):
        for axes, arm in zip(row, arms):
            cells = record["cells"]["key_value"][arm]
            sizes = sorted({cell["length"] for cell in cells})
            depths = sorted({cell["depth"] for cell in cells})
            share_DL = np.array([cell["exact"]["share"] for cell in cells]).reshape(len(sizes), len(depths)).T
            mesh = axes.imshow(100 * share_DL, cmap="cividis", vmin=0, vmax=100, aspect="auto")
            for (d, l), share in np.ndenumerate(share_DL):
                color = "black" if share > 0.5 else "white"
                axes.text(l, d, f"{100 * share:.0f}", ha="center", va="center", color=color, fontsize=7)
            axes.set_title(f"trained {name}, asked under {arm}", fontsize="small")
            axes.set_xticks(range(len(sizes)), [format_length(size) for size in sizes])
            axes.set_yticks(range(len(depths)), [f"{depth:g}" for depth in depths])
    assert mesh is not None
    samples = next(iter(found.values()))["samples"]
    figure.colorbar(mesh, ax=grid, label=f"right answers (% of {samples} samples)")
    figure.supxlabel("context length (tokens)", fontsize="small")
    figure.supylabel("depth of the needle (% of the text before it)", fontsize="small")
    save(figure, path)


if __name__ == "__main__":
    main()
