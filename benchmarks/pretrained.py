"""Holds a pretrained Hugging Face model against this project: its logits here and in transformers, its way in and out
again, and what MoBA does to its loss by position when it is switched on without training.

    python benchmarks/pretrained.py model=models/SmolLM2-135M documents=held_out.parquet to=docs/results \\
        lengths=8K:4,16K:2 attention=full,128x8,512x3

Documents are text or token shards; each evaluation takes the first tokens of those that are long enough, one document
a forward pass, in float32 on a CPU and bf16 on a GPU. `to` gets pretrained.json and pretrained.png; every figure is
written down as soon as it is there.
"""

from __future__ import annotations

import hashlib
import json
import platform
import sys
import tempfile
import time
from collections.abc import Iterator
from itertools import pairwise
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))

from train.engine.world import init_world, shutdown  # noqa: E402 - first: decides what torch reads

# isort: split
import torch  # noqa: E402
import yaml  # noqa: E402
from matplotlib.figure import Figure  # noqa: E402
from safetensors import safe_open  # noqa: E402

from conf.build import ConfigError  # noqa: E402
from conf.numbers import format_length, parse_length  # noqa: E402
from conf.schema import DataConfig, SourceConfig  # noqa: E402
from conf.trajectory import to_dict  # noqa: E402
from data.errors import DataError  # noqa: E402
from data.sources import Source, open_validation  # noqa: E402
from data.validation import held_out_documents  # noqa: E402
from evals.context import Context, clusters_by  # noqa: E402
from evals.figures import length_axis, save  # noqa: E402
from evals.loading import attention_plan, load_trained  # noqa: E402
from evals.position_loss import evaluate  # noqa: E402
from evals.results import commit  # noqa: E402
from evals.statistics import half_width  # noqa: E402
from launch import export  # noqa: E402
from launch.cli import exits_on, key_values  # noqa: E402
from launch.config import load  # noqa: E402
from train.checkpoint import store  # noqa: E402
from train.engine.optim import build_engine  # noqa: E402
from train.hf import pretrained, source_files  # noqa: E402
from train.model.decoder import Decoder  # noqa: E402

KEYS = {
    "model": "Hugging Face directory of the model",
    "documents": "held-out documents: text, parquet, or token shards of launch/prepare_data.py",
    "to": "folder of the results",
    "lengths": "<length>:<documents at most>, comma-separated (default 8K:4,16K:2)",
    "attention": "full and <block size>x<top_k>, comma-separated (default full,128x8,512x3)",
    "parts": "of logits, identity, position_loss (default: all)",
    "cluster": "regular expression; ids with the same match are one cluster of the errors (default: the whole id)",
    "commit": "commit of the code, where this is no git checkout",
}
LOGIT_DOCUMENTS, LOGIT_TOKENS = 4, 1024
BUCKET = 2048
FEW = 5  # clusters below which an interval says nothing


@exits_on(ConfigError, DataError, store.CheckpointError)
def main() -> None:
    """The command; see the module's text."""
    values = key_values(sys.argv[1:], KEYS, about=__doc__, required=["model", "documents", "to"])
    directory, to = Path(values["model"]).expanduser(), Path(values["to"]).expanduser()
    to.mkdir(parents=True, exist_ok=True)
    path = to / "pretrained.json"
    results = json.loads(path.read_text()) if path.exists() else {}
    results["model"] = directory.name
    stamp = {"machine": machine(), "commit": values.get("commit") or commit() or "unknown"}
    print(f"{directory.name} on {stamp['machine']}, commit {stamp['commit']}", flush=True)
    config = DataConfig(tokenizer=str(directory), validation=SourceConfig(path=values["documents"]))
    source = open_validation(config, log=print)

    def note(**found: Any) -> None:
        results.update(found)
        path.write_text(json.dumps(results, indent=1) + "\n", encoding="utf-8")

    for part in values.get("parts", "logits,identity,position_loss").split(","):
        if part == "logits":
            note(logits=stamp | compare_logits(directory, source))
            print("logits:", results["logits"], flush=True)
        elif part == "identity":
            note(identity=stamp | import_and_export(directory))
            print("identity:", results["identity"], flush=True)
        else:
            for record in position_losses(directory, source, values):
                kept = [r for r in results.get("position_loss", []) if _name(r) != _name(record)]
                note(position_loss=[*kept, stamp | record])
            print(table(results["position_loss"]))
            draw(results, to / "pretrained.png")


def machine() -> str:
    """The GPU, or the processor with the threads that torch uses of it, and torch's version."""
    cpu = f"{platform.machine()} CPU, {torch.get_num_threads()} threads"
    return f"{torch.cuda.get_device_name() if torch.cuda.is_available() else cpu}, torch {torch.__version__}"


@torch.no_grad()
def compare_logits(directory: Path, source: Source) -> dict[str, Any]:
    """How far our logits are from transformers', both with full attention, on the beginnings of texts: in float32; and,
    on the first text, in float64, beside what float32 alone does to transformers' own."""
    from transformers import AutoModelForCausalLM

    ours = load_trained(directory, "cpu")
    theirs = AutoModelForCausalLM.from_pretrained(directory, dtype=torch.float32).eval()
    ours.model.set_attention(attention_plan("full", ours))
    documents = held_out_documents(source, LOGIT_TOKENS, LOGIT_DOCUMENTS)
    gaps, largest = [], 0.0
    for _, batch in documents:
        expected = theirs(batch.tokens[None], use_cache=False).logits[0]
        gaps.append((ours.model.logits(batch.tokens, batch.positions, batch.documents) - expected).abs())
        largest = max(largest, expected.abs().max().item())
    batch = documents[0][1]
    single = theirs(batch.tokens[None], use_cache=False).logits[0]
    exact = theirs.double()(batch.tokens[None], use_cache=False).logits[0]
    double = ours.model.double().logits(batch.tokens, batch.positions, batch.documents)
    return {
        "documents": documents.ids,
        "tokens_each": LOGIT_TOKENS,
        "max_abs_difference": [gap.max().item() for gap in gaps],
        "share_of_logits_beyond_1e-4": sum((gap > 1e-4).sum().item() for gap in gaps) / sum(g.numel() for g in gaps),
        "max_abs_logit": largest,
        "max_abs_difference_float64": (double - exact).abs().max().item(),
        "transformers_float32_from_its_float64": (single - exact).abs().max().item(),
    }


def import_and_export(directory: Path) -> dict[str, Any]:
    """Takes the model into a training engine, saves a checkpoint without a step, exports it, and compares every tensor
    by its SHA-256, config.json key by key, and the tokenizer's files byte by byte."""
    before = _digests(directory)
    dtype = {torch.bfloat16: "bf16", torch.float32: "fp32"}[next(iter(before.values()))[0]]
    world = init_world("cpu")
    config = load(["+exp=quickstart", "model=from_source", f"init.source={directory}"])
    engine = build_engine(Decoder(config.model, config.model.vocab_size), config, world)
    pretrained.load_engine(engine, config.model, directory)
    with tempfile.TemporaryDirectory() as folder:
        run, out = Path(folder) / "run", Path(folder) / "out"
        store.save(
            run,
            engine,
            tokens=1000,
            state={},
            tensors={},
            config_yaml=yaml.safe_dump(to_dict(config), sort_keys=False),
            stage_end=False,
            keep=1,
        )
        source_files.keep(config, run, directory)
        engine.destroy()
        shutdown()
        export.main([f"run={run}", f"to={out}", f"dtype={dtype}"])
        after = _digests(out)
        files = sorted(
            path.name for path in out.iterdir() if path.suffix != ".safetensors" and path.name != pretrained.CONFIG
        )
        raw = [json.loads((path / pretrained.CONFIG).read_text()) for path in (directory, out)]
        return {
            "tensors": len(before),
            "tensors_equal": sum(after.get(name) == digest for name, digest in before.items()),
            "tensors_added": sorted(after.keys() - before.keys()),
            "dtype": dtype,
            "config_differs_in": sorted(k for k in raw[0].keys() | raw[1].keys() if raw[0].get(k) != raw[1].get(k)),
            "files_equal": [
                f for f in files if (directory / f).is_file() and (directory / f).read_bytes() == (out / f).read_bytes()
            ],
        }


def _digests(directory: Path) -> dict[str, tuple[torch.dtype, str]]:
    """Tensor name -> (dtype, SHA-256 of its bytes)."""
    digests = {}
    for file in sorted(set(pretrained.weight_map(directory).values())):
        with safe_open(directory / file, framework="pt") as tensors:
            for name in tensors.keys():  # noqa: SIM118 - not a dict
                tensor = tensors.get_tensor(name).contiguous()
                digests[name] = tensor.dtype, hashlib.sha256(tensor.view(torch.uint8).numpy()).hexdigest()
    return digests


def position_losses(directory: Path, source: Source, values: dict[str, str]) -> Iterator[dict]:
    """Yields a record for each length and attention."""
    trained = load_trained(directory)
    for entry in values.get("lengths", "8K:4,16K:2").split(","):
        length, _, limit = entry.partition(":")
        seq_len = parse_length(length)
        documents = held_out_documents(source, seq_len, int(limit or 4))
        for attention in values.get("attention", "full,128x8,512x3").split(","):
            trained.model.set_attention(attention_plan(attention, trained))
            began = time.monotonic()
            context = Context(trained.model, trained.device, cluster_of=clusters_by(values.get("cluster", ".*")))
            found = evaluate(context, documents, seq_len=seq_len, num_buckets=max(1, seq_len // BUCKET))
            seconds = round(time.monotonic() - began, 1)
            print(
                f"{format_length(seq_len)} {attention}: {found.curve.mean.round(3).tolist()}, {seconds} s", flush=True
            )
            yield {"attention": attention, "native": trained.stage.seq_len, "seconds": seconds} | found.summary()


def _name(record: dict) -> tuple:
    return record["seq_len"], record["attention"]


def table(records: list[dict]) -> str:
    """The losses by position as a Markdown table."""
    edges = max((record["edges"] for record in records), key=len)
    heads = [f"to {format_length(edge)}" for edge in edges[1:]]
    lines = [f"| length | documents | attention | {' | '.join(heads)} |", "|---" * (3 + len(heads)) + "|"]
    for record in records:
        means = [f"{mean:.3f}" for mean in record["mean"]] + [""] * (len(heads) - len(record["mean"]))
        cells = [format_length(record["seq_len"]), str(record["num_documents"]), record["attention"], *means]
        lines.append(f"| {' | '.join(cells)} |")
    return "\n".join(lines)


def draw(results: dict, path: Path) -> None:
    """Loss by position, a panel a length."""
    records = results["position_loss"]
    lengths = sorted({record["seq_len"] for record in records})
    figure = Figure(figsize=(6 * len(lengths), 4.5), layout="constrained")
    for axes, length in zip(figure.subplots(1, len(lengths), squeeze=False)[0], lengths):
        for i, record in enumerate(r for r in records if r["seq_len"] == length):
            centres = [(a + b) / 2 for a, b in pairwise(record["edges"])]
            name = "full" if record["attention"] == "full" else f"MoBA {record['attention']}"
            axes.plot(centres, record["mean"], color=f"C{i}", marker="o", markersize=5, label=name)
            if record["num_clusters"] >= FEW:
                errors = half_width(record["se"], [count - 1 for count in record["clusters"]])
                axes.errorbar(centres, record["mean"], yerr=errors, color=f"C{i}", fmt="none", capsize=2)
            else:
                for losses in record["document_loss"]:
                    axes.plot(centres, losses, color=f"C{i}", linestyle="", marker="_", markersize=9)
        if record["native"] < length:
            axes.axvline(record["native"], color="black", linestyle="--", linewidth=1)
            axes.annotate(
                " native length", (record["native"], 1), xycoords=("data", "axes fraction"), va="top", fontsize="small"
            )
        length_axis(axes.xaxis, length)
        axes.set_xlim(0, length)
        axes.set_title(f"{record['num_documents']} documents of {format_length(length)}")
        axes.set_xlabel("visible tokens of the own document")
        axes.set_ylabel("loss (nats a token)")
        axes.grid(alpha=0.3)
        axes.legend(fontsize="small")
    figure.supxlabel(
        f"{results['model']} as it came, not trained with MoBA.\n"
        f"Bars: 95 % intervals; dashes: single documents, where there are fewer than {FEW} clusters.\n"
        f"{records[-1]['machine']}, commit {records[-1]['commit']}",
        fontsize="x-small",
    )
    save(figure, path)


if __name__ == "__main__":
    main()
