"""Fine-tunes with full attention in the last n layers, for several n, as in figure 5b and 5c of the MoBA paper.

    python benchmarks/sft_layers.py to=docs/results/sft_layers jobs=2
    python benchmarks/sft_layers.py to=docs/results/sft_layers base=runs/moba_seed0,runs/moba_seed1,runs/moba_seed2 \\
        seq_len=16K block_size=512 top_k=3 full_last=0,1,3,5,10,20,30 held_out=48 sft_tokens=2M batch_tokens=64K \\
        lr=2e-4 jobs=4 schedule.micro_tokens=16K schedule.stages.sparse.rope.theta=400000

The first takes about an hour on two CPU cores, the second is for a GPU. For each seed a model is pretrained with MoBA
in all layers, or is taken from `base`; then it is fine-tuned once for each number of full layers, with the same data
and budget. What is compared is the loss on held-out answers, and how many of them come out right, each token being the
likeliest one behind the right ones before it. Everything runs through launch/train.py, to which arguments with a dot go
as they are. Finished runs are kept in `work`: the same command goes on after an interruption.

Models of `base` are fine-tuned on the embedded chat set (data/chat_set.py), whose answers are lines of a book far back
in the context; the loss of the answers in the last sixteenth of the context ("trailing") is given beside that of all.

Models made here are too small to read books and learn recall instead (data/synthetic.py). In pretraining keys stand
all over the first half of a document and are asked for seven times each all over the second (mqar): the loss starts at
many tokens. In fine-tuning each is asked for once, all of them at the end (multi_query): the loss starts at few tokens,
as in an answer behind a long prompt. The model has a key convolution and no positional encoding, as in
benchmarks/mqar.py. A document has 4 to 8 pairs: guessing among its values gets one answer in six right, and two in five
where those already given are left out (losses of 1.8 and 1.1).
"""

from __future__ import annotations

import json
import multiprocessing
import platform
import statistics
import sys
from collections.abc import Sequence
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))

import torch  # noqa: E402
from matplotlib.figure import Figure  # noqa: E402

from benchmarks.study import origin, read_json, run_all, split  # noqa: E402
from conf.numbers import parse_length, parse_tokens  # noqa: E402
from data.packing import IGNORED  # noqa: E402
from data.sources import open_validation  # noqa: E402
from data.tokenizer import load_tokenizer  # noqa: E402
from data.validation import held_out_documents  # noqa: E402
from evals.loading import load_trained  # noqa: E402
from evals.results import write_json  # noqa: E402
from launch.cli import UsageError, exits_on, key_values  # noqa: E402
from train.model.generation import Sampling, generate  # noqa: E402
from train.record.metrics import FILE_NAME, read_metrics  # noqa: E402

KEYS = {
    "to": "results: <to>.json and <to>.png",
    "work": "folder for data and runs (default runs/sft_layers)",
    "base": "runs or models, comma-separated, one for each seed, instead of pretraining models here",
    "jobs": "runs at a time (default 1)",
    "seq_len": "context (default 256)",
    "block_size": "tokens a block (default 8)",
    "top_k": "blocks a query attends to, its own included (default 4)",
    "layers": "layers of the model (default 12)",
    "hidden": "width (default 64)",
    "heads": "heads (default 1)",
    "full_last": "numbers of full layers (default 0,1,3,5,10 and all)",
    "seeds": "how many (default 3)",
    "pretrain_tokens": "budget of pretraining (default 3M)",
    "sft_tokens": "budget of each fine-tuning (default 400K)",
    "batch_tokens": "tokens a step (default 4K)",
    "lr": "peak of pretraining (default 3e-3); fine-tuning takes a third of it, and all of it with base=",
    "held_out": "held-out documents measured (default 64)",
    "commit": "commit of the code, where this is no git checkout",
}
RECALL = "pairs: 8, min_pairs: 4, symbols: 128"
SHOWN = 5  # answers kept to be read


@exits_on(ValueError, OSError)
def main() -> None:
    """The command; see the module's text."""
    overrides, arguments = split(sys.argv[1:])
    values = key_values(arguments, KEYS, about=__doc__, required=["to"])
    work = Path(values.get("work", "runs/sft_layers"))
    bases = [Path(run) for run in values["base"].split(",")] if "base" in values else None
    setting = {
        "seq_len": parse_length(values.get("seq_len", "256")),
        "block_size": parse_length(values.get("block_size", "8")),
        "top_k": int(values.get("top_k", 4)),
        "layers": load_trained(bases[0], "cpu").config.model.num_layers if bases else int(values.get("layers", 12)),
        "hidden": int(values.get("hidden", 64)),
        "heads": int(values.get("heads", 1)),
        "pretrain_tokens": parse_tokens(values.get("pretrain_tokens", "3M")),
        "sft_tokens": parse_tokens(values.get("sft_tokens", "400K")),
        "batch_tokens": parse_length(values.get("batch_tokens", "4K")),
        "lr": float(values.get("lr", 3e-3)),
        "held_out": int(values.get("held_out", 64)),
        "base": [run.name for run in bases] if bases else None,
        "overrides": overrides,
    }
    layers = setting["layers"]
    default = ",".join(str(n) for n in (0, 1, 3, 5, 10) if n < layers) + f",{layers}"
    text = values.get("full_last", default)
    counts = [int(n) for n in text.split(",")]
    if any(not 0 <= n <= layers for n in counts):
        raise UsageError(f"full_last={text}: between 0 and layers={layers}")
    work.mkdir(parents=True, exist_ok=True)
    kept = work / "setting.json"
    if kept.exists() and json.loads(kept.read_text()) != setting:
        raise UsageError(f"{work} holds runs of another setting: choose another work=, or remove it")
    kept.write_text(json.dumps(setting, indent=1))
    jobs, seeds = int(values.get("jobs", 1)), range(len(bases) if bases else int(values.get("seeds", 3)))
    # Threads of several runs on the same cores would wait for each other.
    torch.set_num_threads(max(1, torch.get_num_threads() // jobs))
    if bases is None:
        bases = run_all(lambda seed: pretrain(work, setting, seed), seeds, jobs)
    results = {
        **origin(sys.argv[1:], values.get("commit")),
        "hardware": _hardware(),
        "unit": "nats a learnt token, held-out documents, at the end of fine-tuning",
        "setting": setting,
        "rows": run_all(
            lambda task: fine_tune(work, setting, *task, bases[task[0]]), [(s, n) for s in seeds for n in counts], jobs
        ),
    }
    to = Path(values["to"])
    to.parent.mkdir(parents=True, exist_ok=True)
    to.with_suffix(".json").write_text(json.dumps(results, indent=1) + "\n", encoding="utf-8")
    draw(results, to.with_suffix(".png"))
    _show(results)


# -------------------- runs


def pretrain(work: Path, setting: dict, seed: int) -> Path:
    """The run directory of a model trained with MoBA in all layers."""
    folder = work / f"pretrained_{seed}"
    hidden, heads = setting["hidden"], setting["heads"]
    shape = {
        "hidden_size": hidden,
        "num_layers": setting["layers"],
        "num_heads": heads,
        "num_kv_heads": heads,
        "head_dim": hidden // heads,
        "ffn_size": hidden,
        # Narrow models start faster with larger weights: products of width 64 at 0.02 are next to nothing.
        "init_std": round(0.48 / hidden**0.5, 4),
        "key_conv": 3,
        "rope_pattern": "N",
    }
    overrides = [
        "model=tiny",
        *(f"model.{key}={value}" for key, value in shape.items()),
        *_recall("mqar", ", repeats: 7"),
        "optim.lr.warmup_tokens=2%",
        # What is looked up is learnt all of a sudden, sooner or later: the rate must not have fallen by then.
        "optim.lr.kind=wsd",
    ]
    _train(folder, setting, seed, overrides, setting["pretrain_tokens"], setting["lr"], full_last=0)
    return folder


def _recall(task: str, more: str = "") -> list[str]:
    """Overrides for a task of data/synthetic.py; `more` goes to the training documents alone."""
    return [
        f"data=synthetic/{task}",
        f"data.sources.{task}.synthetic={{task: {task}, {RECALL}{more}}}",
        f"data.validation.synthetic={{task: {task}, {RECALL}}}",
        "optim.weight_decay=0.01",
    ]


def _chat(setting: dict) -> list[str]:
    """Overrides for the embedded chat set."""
    conversations = f"embedded-chat:{setting['seq_len']}"
    return [
        "data=sft",
        f"data.path={conversations}",
        "data.chat_template=plain",
        f"data.validation={{path: '{conversations}', format: chat}}",
    ]


def fine_tune(work: Path, setting: dict, seed: int, full_last: int, base: Path) -> dict:
    """What fine-tuning with full attention in the last layers comes to; kept in the run's folder."""
    folder = work / f"sft_{seed}_{full_last}"
    kept = folder / "sft_layers.json"
    if kept.exists():
        return read_json(kept)
    own = setting["base"] is None
    data = _recall("multi_query") if own else _chat(setting)
    lr = setting["lr"] / 3 if own else setting["lr"]
    overrides = ["model=from_source", f"init.source={base}", *data]
    _train(folder, setting, seed, overrides, setting["sft_tokens"], lr, full_last)
    records = read_metrics(folder / FILE_NAME)
    held_out = [record for record in records if record["kind"] == "eval"][-1]
    losses = [record["loss"] for record in records if record["kind"] == "train" and record["loss"] is not None]
    share, answers = answered(folder, setting["held_out"])
    print(f"{folder.name}: held-out loss {held_out['loss']:.4f}, answers right {share:.3f}", flush=True)
    row = {
        "seed": seed,
        "full_last": full_last,
        "loss": held_out["loss"],
        "trailing_loss": held_out["trailing_loss"],
        "train_loss": statistics.fmean(losses[-len(losses) // 4 :]),
        "right_answers": share,
        "answers": answers,
    }
    write_json(kept, row)
    return row


def _train(folder: Path, setting: dict, seed: int, overrides: Sequence[str], tokens: int, lr: float, full_last: int):
    """Runs launch/train.py in a process of its own, unless the run is there already."""
    common = {
        "run.dir": folder,
        "run.name": folder.name,
        "run.seed": seed,
        "data.cache_dir": folder.parent / "cache",
        "schedule": "moba_only",
        "schedule.tokens": tokens,
        "schedule.seq_len": setting["seq_len"],
        "schedule.batch_tokens": setting["batch_tokens"],
        # On a CPU larger batches at a time cost the same a token; on a GPU they are what keeps it busy.
        "schedule.micro_tokens": setting["batch_tokens"],
        "schedule.block_size": setting["block_size"],
        "schedule.top_k": setting["top_k"],
        "schedule.stages.sparse.attention.full_last": full_last,
        "optim.lr.peak": lr,
        "optim.lr.warmup_tokens": "10%",
        "eval.documents": setting["held_out"],
        "eval.every_tokens": 0,
        "checkpoint.every_tokens": 0,
        "logging.wandb": "disabled",
        "logging.figures": "false",
        "logging.progress": "false",
    }
    overrides = [*overrides, *setting["overrides"]]
    arguments = [*(f"{key}={value}" for key, value in common.items()), *overrides]
    log = folder.parent / f"{folder.name}.log"
    process = _context().Process(target=_child, args=(arguments, str(log), torch.get_num_threads()))
    process.start()
    process.join()
    if process.exitcode != 0:
        raise ValueError(f"the run of {folder} failed: see {log}")


def _context():
    """Processes forked from one that has imported everything and started nothing: imports take longer than a run."""
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(["launch.train"])
    return context


def _child(arguments: list[str], log: str, threads: int) -> None:
    """One run; what it says goes to the log."""
    import os

    from launch.config import run_command
    from launch.train import USAGE
    from launch.train import main as train

    with open(log, "w") as file:
        os.dup2(file.fileno(), 1)
        os.dup2(file.fileno(), 2)
    torch.set_num_threads(threads)
    sys.exit(run_command(train, arguments, USAGE))


@torch.no_grad()
def answered(run: Path, count: int) -> tuple[float, list[dict[str, str]]]:
    """(share of the answers of which every token is the likeliest given the right ones before, some answers and what
    was wanted). The latter: of the first conversations the last answer as the model writes it by itself; of the first
    recall documents all answers, each a token, as token numbers."""
    trained = load_trained(run)
    tokenizer = load_tokenizer(trained.config.data.tokenizer)
    recall = trained.config.data.validation.synthetic is not None
    held_out = held_out_documents(open_validation(trained.config.data), trained.stage.seq_len, count)
    right, shown = [], []
    for index in range(len(held_out)):
        batch = held_out[index][1].to(trained.device)
        rows = torch.nonzero(batch.labels != IGNORED)[:, 0]
        logits = trained.model.logits(batch.tokens, batch.positions, batch.documents, rows=rows)
        likeliest, labels = logits[:, : tokenizer.vocab_size].argmax(1).cpu(), batch.labels[rows].cpu()
        starts = torch.nonzero(torch.diff(rows.cpu()) > 1)[:, 0] + 1
        wanted = labels.tensor_split(starts)
        right.extend(bool((a == w).all()) for a, w in zip(likeliest.tensor_split(starts), wanted))
        if len(shown) < SHOWN and recall:
            shown.append({"wanted": _numbers(labels), "said": _numbers(likeliest)})
        elif len(shown) < SHOWN:
            # The last answer has the most context; its last token ends the turn.
            *text, end = wanted[-1].tolist()
            prompt = batch.tokens[: rows[-len(wanted[-1])] + 1].tolist()
            greedy, most = Sampling(temperature=0), 2 * len(text) + 8
            said = generate(trained.model, prompt, max_new_tokens=most, sampling=greedy, stop={end})
            shown.append({"wanted": tokenizer.decode(text), "said": tokenizer.decode(list(said))})
    return statistics.fmean(right), shown


def _numbers(tokens: torch.Tensor) -> str:
    return " ".join(map(str, tokens.tolist()))


# -------------------- results


def draw(results: dict, path: Path) -> None:
    """The figure: the loss of all answers; beside it that of the trailing ones, or for recall, where all answers are
    trailing ones, the share of right answers. A dot a seed, means, and a band of +- one standard deviation."""
    rows, setting = results["rows"], results["setting"]
    counts = sorted({row["full_last"] for row in rows})
    figure = Figure(figsize=(9, 4.4), layout="constrained")
    loss = "SFT loss (nats a learnt token)"
    panels = [("loss", "all answers", loss), ("trailing_loss", "answers in the last sixteenth of the context", loss)]
    if setting["base"] is None:
        panels[1] = ("right_answers", "right answers", "share of right answers")
    for axes, (key, title, unit) in zip(figure.subplots(1, 2), panels):
        values = [[row[key] for row in rows if row["full_last"] == n] for n in counts]
        means = [statistics.fmean(v) for v in values]
        spread = [statistics.stdev(v) if len(v) > 1 else 0.0 for v in values]
        axes.fill_between(
            counts,
            [m - s for m, s in zip(means, spread)],
            [m + s for m, s in zip(means, spread)],
            alpha=0.2,
            linewidth=0,
        )
        axes.plot(counts, means, marker="o")
        for n, v in zip(counts, values):
            axes.plot([n] * len(v), v, ".", color="0.3", markersize=4)
        axes.set_xticks(counts, ["0\n(MoBA)"] + [str(n) for n in counts[1:-1]] + [f"{counts[-1]}\n(full)"])
        axes.set_xlabel("full-attention layers, counted from the last")
        axes.set_ylabel(unit)
        axes.set_title(title, fontsize="medium")
        axes.grid(alpha=0.3)
    figure.suptitle(
        f"Fine-tuning with full attention in the last layers: {setting['layers']} layers, {setting['seq_len']} tokens,"
        f" MoBA {setting['block_size']}x{setting['top_k']}",
        fontsize="medium",
    )
    # An interrupted study has fewer seeds for some numbers of layers.
    seeds = " or ".join(str(n) for n in sorted({sum(row["full_last"] == n for row in rows) for n in counts}))
    figure.supxlabel(f"{seeds} seed(s): dots; band: +- one standard deviation. Held-out documents.", fontsize="x-small")
    figure.savefig(path, dpi=110)


def _show(results: dict) -> None:
    print(f"\n{results['hardware']}, commit {results['commit']}; {results['unit']}\n")
    print("| full layers | loss | trailing loss | answers right |\n|---|---|---|---|")
    for n in sorted({row["full_last"] for row in results["rows"]}):
        rows = [row for row in results["rows"] if row["full_last"] == n]
        cells = []
        for key in ("loss", "trailing_loss", "right_answers"):
            values = [row[key] for row in rows]
            cells.append(f"{statistics.fmean(values):.3f} ({', '.join(f'{v:.3f}' for v in values)})")
        print(f"| {n} | " + " | ".join(cells) + " |")
    for row in results["rows"]:
        if row["seed"] == 0:
            print(f"{row['full_last']} full layers: {row['answers']}")


def _hardware() -> str:
    if torch.cuda.is_available():
        return torch.cuda.get_device_name()
    return f"{platform.processor() or platform.machine()} CPU, {torch.get_num_threads()} thread(s) a run"


if __name__ == "__main__":
    main()
