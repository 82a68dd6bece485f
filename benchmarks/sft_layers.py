"""Fine-tunes with full attention in the last n layers, for several n, as in figure 5b and 5c of the MoBA paper.

    python benchmarks/sft_layers.py to=docs/results/sft_layers
    python benchmarks/sft_layers.py to=docs/results/sft_layers seq_len=1K block_size=32 top_k=3 hidden=128 names=12 \\
        documents=30000 held_out=256 pretrain_tokens=100M sft_tokens=6M batch_tokens=32K lr=2e-3 jobs=6
    python benchmarks/sft_layers.py to=docs/results/sft_layers base=runs/moba_seed0,runs/moba_seed1,runs/moba_seed2 \\
        seq_len=16K block_size=512 top_k=3 full_last=0,1,3,5,10,20,30 held_out=48 sft_tokens=2M batch_tokens=64K \\
        lr=2e-4 jobs=4 schedule.micro_tokens=16K schedule.stages.sparse.rope.theta=400000

The first is for a CPU, the others for a GPU. For each seed a model is pretrained with MoBA in all layers, or is taken
from `base`; then it is fine-tuned once for each number of full layers, with the same data and budget. What is compared
is the loss on held-out answers: of all, and of those in the last sixteenth of the context ("trailing"); and how many
answers come out right, each of their tokens being the likeliest one behind the right ones before it. Everything runs
through launch/train.py, to which arguments with a dot go as they are. Finished runs are kept in `work`: the same
command goes on after an interruption.

Models of `base` are fine-tuned on the embedded chat set (data/chat_set.py), whose answers are lines of a book far back
in the context. For models made here, too small to read books, the data is made here as well. Names are signs ("@",
"#"), each with a digit in a line of its own ("@7"). A conversation has them in the first half of a passage, and asks
for one half way through and for another at its very end; the answer is the sign's line. So answers have to be copied
from far back, and the sign decides which. Other digits and signs are taken out of the passages. In pretraining such
lines stand in plain text again and again, about half of each document, so that a tiny model learns to look for them in
a short time, which it would not do for prose. By chance one answer in ten is right.
"""

from __future__ import annotations

import functools
import json
import math
import multiprocessing
import platform
import random
import statistics
import sys
from collections.abc import Sequence
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))

import torch  # noqa: E402
from matplotlib.figure import Figure  # noqa: E402

from benchmarks.study import read_json, run_all, split  # noqa: E402
from conf.numbers import parse_length, parse_tokens  # noqa: E402
from data.chat_set import read_works  # noqa: E402
from data.packing import IGNORED  # noqa: E402
from data.sft import ChatEncoder, load_template  # noqa: E402
from data.sources import SHIPPED_TEXT, open_validation  # noqa: E402
from data.tokenizer import load_tokenizer  # noqa: E402
from data.validation import held_out_documents  # noqa: E402
from evals.loading import load_trained  # noqa: E402
from evals.results import short_commit, write_json  # noqa: E402
from launch.cli import UsageError, exits_on, key_values  # noqa: E402
from train.generation import Sampling, generate  # noqa: E402
from train.metrics import FILE_NAME, read_metrics  # noqa: E402

KEYS = {
    "to": "results: <to>.json and <to>.png",
    "work": "folder for data and runs (default runs/sft_layers)",
    "base": "runs or models, comma-separated, one for each seed, instead of pretraining models here",
    "jobs": "runs at a time (default 1)",
    "names": "signs in a document (default 4)",
    "seq_len": "context (default 128)",
    "block_size": "tokens a block (default 16)",
    "top_k": "blocks a query attends to, its own included (default 2)",
    "layers": "layers of the model (default 12)",
    "hidden": "width (default 64)",
    "heads": "heads (default 2)",
    "full_last": "numbers of full layers (default 0,1,3,5,10 and all)",
    "seeds": "how many (default 3)",
    "pretrain_tokens": "budget of pretraining (default 500K)",
    "sft_tokens": "budget of each fine-tuning (default 80K)",
    "batch_tokens": "tokens a step (default 1K)",
    "lr": "peak of pretraining (default 3e-3); fine-tuning takes half",
    "documents": "documents and conversations to make (default 4000)",
    "held_out": "held-out conversations measured (default 64)",
    "commit": "commit of the code, where this is no git checkout",
}
DIGITS, SIGNS = "0123456789", "@#$%&*+=<>^~"
CODES_SHARE = 0.5  # of a document of pretraining
SHOWN = 5  # answers kept to be read


@exits_on(ValueError, OSError)
def main() -> None:
    """The command; see the module's text."""
    overrides, arguments = split(sys.argv[1:])
    values = key_values(arguments, KEYS, about=__doc__, required=["to"])
    work = Path(values.get("work", "runs/sft_layers"))
    bases = [Path(run) for run in values["base"].split(",")] if "base" in values else None
    setting = {
        "names": int(values.get("names", 4)),
        "seq_len": parse_length(values.get("seq_len", "128")),
        "block_size": parse_length(values.get("block_size", "16")),
        "top_k": int(values.get("top_k", 2)),
        "layers": load_trained(bases[0], "cpu").config.model.num_layers if bases else int(values.get("layers", 12)),
        "hidden": int(values.get("hidden", 64)),
        "heads": int(values.get("heads", 2)),
        "pretrain_tokens": parse_tokens(values.get("pretrain_tokens", "500K")),
        "sft_tokens": parse_tokens(values.get("sft_tokens", "80K")),
        "batch_tokens": parse_length(values.get("batch_tokens", "1K")),
        "lr": float(values.get("lr", 3e-3)),
        "documents": int(values.get("documents", 4000)),
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
    if not 2 <= setting["names"] <= len(SIGNS):
        raise UsageError(f"names={setting['names']}: between 2 and {len(SIGNS)}")
    work.mkdir(parents=True, exist_ok=True)
    kept = work / "setting.json"
    if kept.exists() and json.loads(kept.read_text()) != setting:
        raise UsageError(f"{work} holds runs of another setting: choose another work=, or remove it")
    kept.write_text(json.dumps(setting, indent=1))
    jobs, seeds = int(values.get("jobs", 1)), range(len(bases) if bases else int(values.get("seeds", 3)))
    if bases is None:
        make_data(work, setting)
        bases = run_all(lambda seed: pretrain(work, setting, seed), seeds, jobs)
    results = {
        "command": " ".join(["python benchmarks/sft_layers.py", *(a for a in sys.argv[1:] if "commit=" not in a)]),
        "commit": values.get("commit") or short_commit(),
        "hardware": _hardware(),
        "unit": "nats a learnt token, held-out conversations, at the end of fine-tuning",
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


# -------------------- data


def make_data(work: Path, setting: dict) -> None:
    """Writes text.jsonl, chat.jsonl and held_out.jsonl into `work`, the same bytes each time."""
    for name, count, books in (
        ("text", setting["documents"], "embedded"),
        ("chat", setting["documents"], "embedded"),
        ("held_out", setting["held_out"], "embedded-validation"),
    ):
        works = [_cleaned(lines) for _, lines in read_works(SHIPPED_TEXT[books])]
        rng, make = random.Random(f"{name} {setting['seq_len']}"), _text if name == "text" else _talk
        rows = [make(rng, _passage(rng, works, setting["seq_len"]), setting) for _ in range(count)]
        (work / f"{name}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")


def _cleaned(lines: list[str]) -> list[str]:
    """The lines without what a code is made of, and in ASCII: a character is a token then."""
    taken = dict.fromkeys(map(ord, DIGITS + SIGNS))
    return [line.translate(taken).encode("ascii", "ignore").decode() for line in lines]


def _passage(rng: random.Random, works: list[list[str]], size: int) -> list[str]:
    """Lines from somewhere in one of the works, `size` characters and a little more."""
    while True:
        lines = rng.choice(works)
        start, stop, chars = (first := rng.randrange(len(lines))), first, 0
        while chars < size and stop < len(lines):
            chars += len(lines[stop]) + 1
            stop += 1
        if chars >= size:
            return lines[start:stop]


def _codes(rng: random.Random, names: int) -> dict[str, str]:
    """A line for each of some signs."""
    return {sign: sign + rng.choice(DIGITS) for sign in rng.sample(SIGNS, names)}


@functools.cache
def _encoder() -> ChatEncoder:
    tokenizer = load_tokenizer("bytes")
    return ChatEncoder(tokenizer, load_template("plain", tokenizer))


def _text(rng: random.Random, passage: list[str], setting: dict) -> dict:
    """A document of pretraining that fills the context: the passage, with each sign's line many times."""
    seq_len = setting["seq_len"]
    repeats = max(1, round(CODES_SHARE * seq_len / (3 * setting["names"])))
    codes = [line for line in _codes(rng, setting["names"]).values() for _ in range(repeats)]
    room = seq_len - len("\n".join(codes)) - 2
    lines = "\n".join(passage)[:room].split("\n")
    for code in codes:
        lines.insert(rng.randrange(len(lines) + 1), code)
    return {"text": "\n".join(lines)}


def _talk(rng: random.Random, passage: list[str], setting: dict) -> dict:
    """A conversation that fills the context: the first half of the passage holds the codes; one is asked for behind
    it, another behind the rest."""
    codes = _codes(rng, setting["names"])
    order, seed = rng.sample(sorted(codes), 2), rng.random()
    text = "\n".join(passage)
    while True:
        places, lines = random.Random(str(seed)), text.split("\n")
        half = len(lines) // 2
        first, second = lines[:half], lines[half:]
        for line in codes.values():
            first.insert(places.randrange(len(first) + 1), line)
        messages = []
        for name, part in zip(order, (first, second)):
            messages.append({"role": "user", "content": "\n".join([*part, name])})
            messages.append({"role": "assistant", "content": codes[name]})
        over = len(_encoder().encode(messages)[0]) - (setting["seq_len"] + 1)
        if over <= 0:
            return {"messages": messages}
        text = text[over:]


# -------------------- runs


def pretrain(work: Path, setting: dict, seed: int) -> Path:
    """The run directory of a model trained with MoBA in all layers."""
    folder = work / f"pretrained_{seed}"
    overrides = ["data=files", f"data.path={work}/text.jsonl", "~data.validation"]
    _train(folder, setting, seed, overrides, setting["pretrain_tokens"], setting["lr"], full_last=0)
    return folder


def fine_tune(work: Path, setting: dict, seed: int, full_last: int, base: Path) -> dict:
    """What fine-tuning with full attention in the last layers comes to; kept in the run's folder."""
    folder = work / f"sft_{seed}_{full_last}"
    kept = folder / "sft_layers.json"
    if kept.exists():
        return read_json(kept)
    own, length = setting["base"] is None, setting["seq_len"]
    train_set, held_out = (
        f"{work}/{name}.jsonl" if own else f"embedded-chat:{length}" for name in ("chat", "held_out")
    )
    overrides = [
        "data=sft",
        f"data.path={train_set}",
        "data.chat_template=plain",
        f"data.validation={{path: '{held_out}', format: chat}}",
        f"eval.documents={setting['held_out']}",
        "eval.every_tokens=0",
        f"init.source={base}",
    ]
    lr = setting["lr"] / 2 if own else setting["lr"]
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
    hidden, heads = setting["hidden"], setting["heads"]
    shape = {
        "model.name": "sft_layers",
        "model.hidden_size": hidden,
        "model.num_layers": setting["layers"],
        "model.num_heads": heads,
        "model.num_kv_heads": heads,
        "model.head_dim": hidden // heads,
        "model.ffn_size": 2 * hidden,
        # Narrow models start faster with larger weights: products of width 64 at 0.02 are next to nothing.
        "model.init_std": round(0.5 / hidden**0.5, 4),
    }
    common = {
        "run.dir": folder,
        "run.name": folder.name,
        "run.seed": seed,
        "data.cache_dir": folder.parent / "cache",
        **(shape if setting["base"] is None else {"model": "from_source"}),
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
        "checkpoint.every_tokens": 0,
        "logging.wandb": "disabled",
        "logging.figures": "false",
        "logging.progress": "false",
    }
    overrides = [*overrides, *setting["overrides"]]
    arguments = [*(f"{key}={value}" for key, value in common.items()), *overrides]
    log = folder.parent / f"{folder.name}.log"
    process = _context().Process(target=_child, args=(arguments, str(log)))
    process.start()
    process.join()
    if process.exitcode != 0:
        raise ValueError(f"the run of {folder} failed: see {log}")


def _context():
    """Processes forked from one that has imported everything and started nothing: imports take longer than a run."""
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(["launch.train"])
    return context


def _child(arguments: list[str], log: str) -> None:
    """One run; what it says goes to the log."""
    import os

    from launch.config import run_command
    from launch.train import USAGE
    from launch.train import main as train

    with open(log, "w") as file:
        os.dup2(file.fileno(), 1)
        os.dup2(file.fileno(), 2)
    sys.exit(run_command(train, arguments, USAGE))


@torch.no_grad()
def answered(run: Path, count: int) -> tuple[float, list[dict[str, str]]]:
    """(share of the answers of which every token is the likeliest given the right ones before, what the model writes
    by itself as the last answer of the first conversations, and what was wanted)."""
    trained = load_trained(run)
    tokenizer = load_tokenizer(trained.config.data.tokenizer)
    held_out = held_out_documents(open_validation(trained.config.data), trained.stage.seq_len, count)
    right, shown = [], []
    for index in range(len(held_out)):
        batch = held_out[index][1].to(trained.device)
        rows = torch.nonzero(batch.labels != IGNORED)[:, 0]
        logits = trained.model.logits(batch.tokens, batch.positions, batch.cu_seqlens, rows=rows)
        likeliest, labels = logits[:, : tokenizer.vocab_size].argmax(1).cpu(), batch.labels[rows].cpu()
        starts = torch.nonzero(torch.diff(rows.cpu()) > 1)[:, 0] + 1
        wanted = labels.tensor_split(starts)
        right.extend(bool((a == w).all()) for a, w in zip(likeliest.tensor_split(starts), wanted))
        if len(shown) < SHOWN:
            # The last answer has the most context; its last token ends the turn.
            *text, end = wanted[-1].tolist()
            prompt = batch.tokens[: rows[-len(wanted[-1])] + 1].tolist()
            greedy, most = Sampling(temperature=0), 2 * len(text) + 8
            said = generate(trained.model, prompt, max_new_tokens=most, sampling=greedy, stop={end})
            shown.append({"wanted": tokenizer.decode(text), "said": tokenizer.decode(list(said))})
    return statistics.fmean(right), shown


# -------------------- results


def draw(results: dict, path: Path) -> None:
    """The figure: a panel for all answers and one for the trailing ones, a dot a seed, means, and a band of +- one
    standard deviation over seeds."""
    rows, setting = results["rows"], results["setting"]
    counts = sorted({row["full_last"] for row in rows})
    figure = Figure(figsize=(9, 4.4), layout="constrained")
    panels = (("loss", "all answers"), ("trailing_loss", "answers in the last sixteenth of the context"))
    for axes, (key, title) in zip(figure.subplots(1, 2), panels):
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
        if setting["base"] is None:
            axes.axhline(math.log(len(DIGITS)) / 4, color="0.6", linestyle=":", linewidth=1)
        axes.set_xticks(counts, ["0\n(MoBA)"] + [str(n) for n in counts[1:-1]] + [f"{counts[-1]}\n(full)"])
        axes.set_xlabel("full-attention layers, counted from the last")
        axes.set_ylabel("SFT loss (nats a learnt token)")
        axes.set_title(title, fontsize="medium")
        axes.grid(alpha=0.3)
    figure.suptitle(
        f"Fine-tuning with full attention in the last layers: {setting['layers']} layers, {setting['seq_len']} tokens,"
        f" MoBA {setting['block_size']}x{setting['top_k']}",
        fontsize="medium",
    )
    # An interrupted study has fewer seeds for some numbers of layers.
    seeds = " or ".join(str(n) for n in sorted({sum(row["full_last"] == n for row in rows) for n in counts}))
    guess = " Dotted: an answer whose digit is guessed, all else known." if setting["base"] is None else ""
    figure.supxlabel(
        f"{seeds} seed(s): dots; band: +- one standard deviation. Held-out conversations.{guess}",
        fontsize="x-small",
    )
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
    return f"{platform.processor() or platform.machine()} CPU, {torch.get_num_threads()} thread(s)"


if __name__ == "__main__":
    main()
