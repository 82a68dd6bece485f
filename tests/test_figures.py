"""README's and docs' figures and numbers: each is of the kept result files, which docs/make_figures.py draws."""

from __future__ import annotations

import importlib.util
import json
import re
from functools import cache, partial
from pathlib import Path

import numpy as np
import pytest
import yaml
from PIL import Image

from evals.plan_search import pairs_share
from moba.flops import attended_pairs, causal_pairs
from moba.kinds import Moba

ROOT = Path(__file__).resolve().parents[1]
PAGES = [ROOT / "README.md", *sorted((ROOT / "docs").rglob("*.md"))]
PHOTOGRAPHED = {"docs/results/dashboard.png"}
"""Of a run, not of kept numbers."""
MODELS = {"paper_545m": "545M", "paper_1_5b": "1.5B", "125m": "125m", "llama3_8b": "8B"}


@cache
def make_figures():
    """docs/make_figures.py as a module."""
    spec = importlib.util.spec_from_file_location("make_figures", ROOT / "docs" / "make_figures.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@cache
def kept(path: str) -> dict:
    """A kept result."""
    return json.loads((ROOT / path).read_text(encoding="utf-8"))


@cache
def page(name: str) -> str:
    """A page's text with single spaces."""
    return " ".join((ROOT / name).read_text(encoding="utf-8").split())


def table(name: str, head: str) -> list[list[str]]:
    """The cells of a page's table whose first line begins with `head`."""
    text = (ROOT / name).read_text(encoding="utf-8")
    assert text.count(f"\n{head}") == 1, f"{name} has no table that begins with {head!r}"
    lines = text.partition(f"\n{head}")[2].split("\n\n")[0].splitlines()[2:]
    return [[cell.strip() for cell in line.strip("|").split("|")] for line in lines]


def shown() -> set[str]:
    """Every picture of the pages, by its path in the repository."""
    found = set()
    for path in PAGES:
        for target in re.findall(r"!\[[^\]]*\]\(([^)]+)\)", path.read_text(encoding="utf-8")):
            found.add(str((path.parent / target).resolve().relative_to(ROOT)))
    return found


def test_every_figure_is_drawn_from_kept_results_as_they_are():
    """Catches a picture that no command makes, and one that is older than the numbers beside it."""
    drawings = {str(path): drawing for path, drawing in make_figures().drawings().items()}
    assert shown() - PHOTOGRAPHED <= drawings.keys() and len(shown()) > 12
    stale = []
    for path, drawing in drawings.items():
        assert (ROOT / path).is_file(), f"{path}: run docs/make_figures.py"
        with Image.open(ROOT / path) as image:
            if image.text.get(make_figures().DRAWN_FROM) != drawing.checksum():
                stale.append(path)
    assert not stale, "older than their results: run docs/make_figures.py and look at them"


def test_a_figure_is_drawn_again(tmp_path):
    """Catches results that the drawing code does not understand any more."""
    drawings = make_figures().drawings()
    for name in ("docs/results/recipes_h100/figure.png", "benchmarks/results/attention.png"):
        drawings[Path(name)].draw(tmp_path / "figure.png")
        with Image.open(tmp_path / "figure.png") as new, Image.open(ROOT / name) as old:
            assert new.size == old.size


# -------------------- tables


def measured(study: str, **what) -> dict:
    """The mean over seeds of what a study measured, of the rows with these values."""
    rows = [r for r in kept(f"docs/results/{study}/results.json")["measured"] if what.items() <= r.items()]
    assert rows, (study, what)
    return rows[0] | {key: float(np.mean([row[key] for row in rows])) for key in ("loss", "trailing")}


def gap(study: str, digits: int, sign: str = "+", **what) -> str:
    """The paired difference in the last bucket, with its interval."""
    rows = kept(f"docs/results/{study}/results.json")["differences"]
    (row,) = [r for r in rows if what.items() <= r.items()]
    return f"{row['difference'][-1]:{sign}.{digits}f} +- {row['interval_95'][-1]:.{digits}f}"


def hundreds(value: float) -> str:
    return f"{round(value, -2):,.0f}"


def step_rows():
    rows = {r["variant"]: r for r in kept("benchmarks/results/step_profile_h100/results.json")["rows"]}
    for model in ("paper_545m", "paper_1_5b", "125m"):
        own = [rows.get(f"{kind}_32k/{model}/compile=auto/activation_checkpointing=auto") for kind in ("moba", "full")]
        cells = [x for r in own for x in ((hundreds(r["tokens_per_second"]), f"{r['mfu']:.0%}") if r else ("", ""))]
        memory = {f"{r['peak_memory_gib']:.0f} GiB" for r in own if r}
        yield [MODELS[model], *(cell.replace("%", " %") for cell in cells), "/".join(sorted(memory))]


def recipe_rows():
    for arm, name in {"moba": "MoBA", "moba, then full": "MoBA, then full", "full": "full"}.items():
        row, paired = measured("recipes_h100", arm=arm), ["", ""]
        if arm != "full":
            (own,) = [d for d in kept("docs/results/recipes_h100/results.json")["differences"] if d["arm"] == arm]
            paired = [gap("recipes_h100", 3, arm=arm), ", ".join(f"{x:+.3f}" for x in own["by_seed"])]
        yield [name, f"{row['loss']:.3f}", f"{row['trailing']:.3f}", *paired]


def recall_rows():
    rows = kept("docs/results/mqar_cpu/results.json")["measured"]
    for arm in dict.fromkeys(row["arm"] for row in rows):
        seeds = {name: [r["right"][name]["far"] for r in rows if r["arm"] == arm] for name in rows[0]["right"]}
        yield [arm, *(f"{np.mean(own):.3f} ({min(own):.3f} to {max(own):.3f})" for own in seeds.values())]


def swap_rows():
    names = {"moba": "the gate's (MoBA)", "oracle": "best", "random": "random", "local": "latest"}
    for row in kept("docs/results/routing_h100/swap.json")["variants"]:
        cells = [names.get(row["attention"], "all (full attention)")]
        for what in ("loss", "trailing"):
            own = row[f"{what}_minus_full"]
            paired = f"{own['mean']:+.3f} +- {own['interval_95']:.3f}" if row["attention"] in names else ""
            cells += [f"{row[what]['mean']:.3f}", paired]
        yield cells


def sft_rows():
    runs = kept("docs/results/sft_layers_h100/results.json")["runs"]
    for arm in dict.fromkeys(run["arm"] for run in runs):
        ends = [run["held_out"][-1] for run in runs if run["arm"] == arm]
        name = {"0": "0 (MoBA)", "30": "30 (full)"}.get(arm.split()[0], arm.split()[0])
        yield [name, *(f"{np.mean([end[key] for end in ends]):.3f}" for key in ("loss", "trailing_loss"))]


def untrained_rows():
    for length in (8192, 16384):
        for arm in ("full", "MoBA 128x8", "MoBA 512x3"):
            mean = measured("pretrained_h100", arm=arm, seq_len=length)["mean"]
            head = f"{length // 1024}K" if arm == "full" else ""
            yield [head, arm, *(f"{x:.3f}" for x in mean), *[""] * (8 - len(mean))]


def continued_rows():
    full, sparse = "full", "moba 512x3"
    runs = {run["arm"]: run["stages"] for run in kept("docs/results/continual_h100/results.json")["runs"]}
    names = {("as it came", 0): "as it came", ("larger RoPE base", 0): "as it came, with the larger RoPE base"}
    names |= {("moba", 18087936): "MoBA run at 18.1M tokens", ("moba", 20185088): "MoBA run at its end, 20.2M"}
    names |= {("full", 20185088): "full twin at 20.2M"}
    speeds = {("moba", 18087936, sparse): ("moba", 0), ("moba", 20185088, full): ("moba", 1)}
    speeds |= {("full", 20185088, full): ("full", 1)}
    for (arm, tokens), name in names.items():
        order = (sparse, full) if tokens == 18087936 else (full,) if arm == "moba" else (full, sparse)
        for place, attention in enumerate(order):
            row, known = measured("continual_h100", arm=arm, tokens=tokens, attention=attention), ""
            if at := speeds.get((arm, tokens, attention)):
                known = f"{hundreds(runs[at[0]][at[1]]['tokens_per_second'])} tokens/s"
            cells = [f"{row['loss']:.3f}", f"{row['trailing']:.3f}", known]
            yield ["" if place else name, attention.replace("moba", "MoBA"), *cells]


def at_4k_rows():
    names = [("as it came", "before", "full"), ("", "before", "moba")]
    for name, when, attention in [*names, ("after 197K tokens with MoBA", "after", "moba"), ("", "after", "full")]:
        found = kept(f"docs/results/continual_cpu/{when}_{attention}.json")
        label = "MoBA 128x8" if attention == "moba" else "full"
        yield [name, label, f"{np.mean(found['mean']):.3f}", f"{found['trailing']['value']:.3f}"]


def extended_cpu_rows():
    rows = kept("docs/results/extension_cpu/results.json")["measured"]
    curves = {(row["arm"], row["stage"]): row for row in rows}

    def within(arm: str, stage: str, low: int, high: int) -> float:
        edges, mean = np.array(curves[arm, stage]["edges"]), np.array(curves[arm, stage]["mean"])
        return mean[(edges[:-1] >= low * 1024) & (edges[1:] <= high * 1024)].mean()

    for low in (2, 4, 8):
        cells = []
        for arm in dict.fromkeys(row["arm"] for row in rows):
            both = (within(arm, f"at_{length}K", low, 2 * low) for length in (low, 2 * low))
            cells.append(" -> ".join(f"{x:.3f}" for x in both))
        yield [f"{low}K to {2 * low}K", *cells]


def extended_rows():
    sparse, full = "MoBA, last 3 layers full", "full"
    stages = {run["arm"]: run["stages"] for run in kept("docs/results/extension_h100/results.json")["runs"]}
    for i, (length, blocks) in enumerate({"8K": "512x3", "32K": "2Kx3", "128K": "2Kx3"}.items()):
        own, other = stages[sparse][i], stages[full][i]
        memory = {f"{stage['peak_memory_gib']:.{0 if length == '128K' else 1}f}" for stage in (own, other)}
        assert max(map(float, memory)) - min(map(float, memory)) < 0.2
        losses = [measured("extension_h100", arm=arm, stage=f"at_{length}")["trailing"] for arm in (sparse, full)]
        cells = [f"{own['tokens'] / 1e6:.1f}M", *(hundreds(s["tokens_per_second"]) for s in (own, other))]
        cells += [f"{min(memory, key=float)} GiB", *(f"{loss:.3f}" for loss in losses)]
        yield [f"{length}, {blocks}", *cells, gap("extension_h100", 3, stage=f"at_{length}")]


def needle_rows():
    for row in kept("docs/results/needle_cpu/needle.json")["shares"]:
        if row["length"] is not None:
            scores = [[row[name]["share"], *row[name]["interval_95"]] for name in ("exact", "ranked")]
            cells = ("{:.0f} ({:.0f} to {:.0f})".format(*(100 * x for x in score)) for score in scores)
            yield [row["form"], f"`{row['arm']}`", *cells]


def gate_rows():
    names = {(None, None): "full attention", ("mean", 0): "mean (MoBA)"}
    names |= {("mean", 1): "mean, first block always selected (`first_blocks=1`)"}
    names |= {("local", 1): "the latest blocks and the first (a window with a sink)"}
    names |= {("random", 1): "random blocks and the first", ("oracle", 1): "the best blocks and the first (oracle)"}
    (row,) = kept("docs/results/gates_h200/results.json")["measured"]
    found = {(one.get("gate"), one.get("first_blocks")): one for one in row["settings"]}
    for key, name in names.items():
        own = found[key]["minus_full"]
        text = f"{own['mean']:+.3f} +- {own['interval_95']:.3f}"
        right = ["not measured" if x is None else f"{x:.0%}".replace("%", " %") for x in found[key]["right"].values()]
        yield [name, f"0 ({found[key]['last_eighth']:.3f})" if key == (None, None) else text, *right]


SMALL, SMALL_SIZES, SMALL_BEST = (f"docs/results/small_{name}/results.json" for name in ("h100", "sizes_h100", "h200"))
GATED = {"moba, first block": SMALL, "1024x2": SMALL, "best": SMALL_BEST}


def with_interval(value: dict) -> str:
    return f"{value['mean']:+.3f} +- {value['interval_95']:.3f}"


def small_rows():
    gaps = {row["arm"]: row for row in kept(SMALL)["gaps"] if row["reference"] == "full"}
    arms = ("full", "moba", "moba, then full", "moba, first block", "64x32", "1024x2", "latest", "random")
    for arm in arms:
        own, cells = kept(SMALL)["final"][arm], ["", ""]
        if row := gaps.get(arm):
            keys = {"mean_loss": "mean", "by_position": "by_position"}
            seeds = [", ".join(f"{one[key]:+.3f}" for one in row["by_seed"]) for key in keys.values()]
            cells = [f"{with_interval(row[key])} ({each})" for key, each in zip(keys, seeds)]
        yield [arm, str(len(own["seeds"])), f"{own['loss']:.3f}", f"{own['trailing']:.3f}", *cells]


def small_size_rows():
    found = kept(SMALL_SIZES)
    gaps = {(row["arm"], row["reference"]): row for row in found["gaps"]}
    for size in ("6.1M", "10.6M", "16.9M"):
        of_size = "" if size == "10.6M" else f", {size}"
        full, gap = found["final"][f"full{of_size}"], gaps[f"moba{of_size}", f"full{of_size}"]
        tokens = f"{full['tokens'] / 1e6:.1f}M"
        yield [size, tokens, f"{full['loss']:.3f}", with_interval(gap["mean_loss"]), with_interval(gap["by_position"])]


def small_context_rows():
    for arm in ("full", "moba", "64x32", "1024x2"):
        found = kept(SMALL)["final"][arm]["far_context"]
        yield [arm, *(with_interval(found[at]) if at in found else "" for at in ("1K", "2K", "4K"))]


def small_gate_rows():
    for arm, source in GATED.items():
        row = next(row for row in kept(source)["router"] if row["eval"] == "gates" and row["arm"] == arm)
        gates = (row["minus_full"][gate] for gate in ("mean", "local", "random", "oracle"))
        yield [arm, f"{row['last_eighth']['full']:.3f}", *map(with_interval, gates)]


def small_best_rows():
    arms = {"full": SMALL_SIZES, "moba": SMALL_SIZES, "moba, first block": SMALL_BEST, "best": SMALL_BEST}
    for arm, source in arms.items():
        found = kept(source)["final"][arm]
        place, far = found["seeds"].index(2), found["far_context"]["1K"]
        alone = with_interval(far) if found["seeds"] == [2] else f"{far['by_seed'][place]:+.3f}"
        own = found["by_seed"][place]
        yield [arm, f"{np.mean(own):.3f}", f"{own[-1]:.3f}", alone]


def small_tuned_rows():
    rows = kept(SMALL_BEST)["tuned"]
    last = max(row["tokens"] for row in rows)
    for row in (row for row in rows if row["tokens"] == last):
        losses = (f"{np.mean(row[key]):.3f}" for key in ("loss", "trailing_loss"))
        minus = with_interval(row["minus_most"]) if "minus_most" in row else ""
        yield [str(row["layers"]), str(len(row["seeds"])), *losses, minus]


def block_size_rows(seq_len: int):
    rows = make_figures().panels.by_block_size(kept("docs/results/mqar_blocks_cpu/results.json"))
    for row in (row for row in rows if row["seq_len"] == seq_len):
        low, high = row["right"]["moba"]["far_interval_95"]
        cells = [f"{row['right']['moba']['far']:.3f} ({low:.3f} to {high:.3f})"]
        cells += [f"{row['right'][gate]['far']:.3f}" for gate in ("local", "random", "oracle")]
        low, high = row["hit_interval_95"]
        cells += [f"{row['snr']:.2f}", f"{row['hit']:.3f} ({low:.3f} to {high:.3f})"]
        name = f"{row['arm']}, {row['block_size']}x{row['picks'] + 1}"
        yield [name, *cells, *(f"{row[key]:.3f}" for key in ("model_hit", "scaled_hit"))]


def plan_rows():
    folder = ROOT / "docs/results/plans_8k_h200"
    for plans in (("plan_quarter", "plan_eighth"), ("plan_retrieval_model",)):
        for i, name in enumerate(plans):
            found = yaml.safe_load((folder / f"{name}.yaml").read_text(encoding="utf-8"))["measured"]
            loss, asked = found["loss"], found["retrieval"]
            if i == 0:
                zeros = [f"0 ({part['dense_loss']:.3f})" for part in (loss, asked)]
                yield ["", "full", "100 %", zeros[0], percent(asked["dense_right"]), zeros[1]]
            block, top = (int(n) for n in re.findall(r"\d+", found["alike"])[:2])
            alike = pairs_share(Moba(block, top), found["seq_len"])
            equal = f"{block}x{top}{', first block,' * ('first' in found['alike'])} in all layers"
            budget = {0.25: "a quarter", 0.125: "an eighth"}[found["budget"]]
            for key, words, pairs in (("plan", f"plan, {budget}", found["pairs"]), ("alike", equal, alike)):
                gaps = [with_interval(part[f"{key}_minus_dense"]) for part in (loss, asked)]
                yield ["", words, percent(pairs), gaps[0], percent(asked[f"{key}_right"]["mean"]), gaps[1]]


def percent(share: float) -> str:
    return f"{share:.0%}".replace("%", " %")


def drop_in_rows():
    folder, probes = "docs/results/drop_in_h200", ("pass_key", "key_value")
    found = {(r["arm"], r["attention"]): r for r in kept(f"{folder}/results.json")["differences"]}
    plan, sparse, back = (
        found[key] for key in (("full", "plan"), *(("128x8, first block", a) for a in ("128x8+1", "full")))
    )

    def cells(row):
        right = [percent(row[key]["value"]) for key in probes]
        return [percent(row["attended_share"]), with_interval(row["trailing"]["minus_reference"]), *right]

    levels = [percent(plan[key]["value"] - plan[key]["minus_reference"]["mean"]) for key in probes]
    trained = kept(f"{folder}/at_the_end.json")["minus_full"]["plan"]["trailing"]
    yield ["", "full", "100 %", "0", *levels]
    yield ["", "the plan", *cells(plan)]
    yield ["", "the plan", percent(plan["attended_share"]), with_interval(trained), "", ""]
    yield ["", "128x8, first block", *cells(sparse)]
    yield ["", "full", *cells(back)]


def drop_in_rate_rows():
    probes = ("pass_key", "key_value")
    rows = kept("docs/results/drop_in_3e4_h200/results.json")["differences"]
    levels = [percent(rows[0][key]["value"] - rows[0][key]["minus_reference"]["mean"]) for key in probes]
    yield ["", "full", "100 %", "0", *levels]
    for row in rows:
        right = [percent(row[key]["value"]) if key in row else "" for key in probes]
        shown = {"plan": "the plan"}.get(row["attention"], row["attention"])
        yield ["", shown, percent(row["attended_share"]), with_interval(row["trailing"]["minus_reference"]), *right]


def model_routing_rows():
    results = kept("benchmarks/results/attention_smollm2.json")["results"]
    found = {(r["row"], r["implementation"]): r for r in results}
    for row, name in found:
        if name == "triton":
            own, dense = found[row, name], found[row, "varlen"]
            times = f"{own['forward_ms']:.2f} / {own['total_ms']:.2f} ({own['routing_ms']:.2f})"
            notes = own["notes"]
            yield [
                "", row.split(" ", 4)[4], times, f"{dense['forward_ms']:.2f} / {dense['total_ms']:.2f}",
                f"{own['ratio_to_cudnn']:.2f}x", f"{notes['longest list over the mean']:.1f}",
                f"{notes['distinct blocks of a group']:.1f} of {notes['picks of a group']:.1f}",
            ]  # fmt: skip


def ruler_rows():
    scores = kept("docs/results/ruler_h200/ruler.json")["scores"]
    for arm, pairs in {"full": 1.0, "plan_quarter": 0.25, "128x8+1": pairs_share(Moba(128, 8), 8192)}.items():
        yield [arm, percent(pairs), *(f"{cell['score']:.1f}" for cell in scores[arm]["average"][1:])]


def retrieval_rows():
    names = {"full": "full attention", "128x8": "128x8", "128x8+1": "128x8, first block"}
    for row in kept("docs/results/retrieval_h200/results.json")["measured"]:
        for key, right in row["right"].items():
            yield ["", names[key], *(f"{right[length]:.2f}" for length in ("1K", "2K", "4K", "8K"))]


LONG = "benchmarks/results/longest_context"


def long_rows():
    parts = (kept(path)["rows"] for path in ROOT.glob(f"{LONG}/*_two*/results.json"))
    for r in (row for rows in parts for row in rows if "failed" not in row):
        shares = [f"{r[key]:.1%}".replace("%", " %") for key in ("communication", "communication_exposed")]
        exchange = "" if r["num_gpus"] == 1 else shares[0]
        exchange += f", of which {shares[1]} is not hidden" if shares[0] != shares[1] else ""
        length = f"{r['seq_len'] // 1024}K" if r["seq_len"] < 2**20 else "1M"
        speed = [hundreds(r["tokens_per_second"]), f"{r['mfu']:.1%}".replace("%", " %")]
        yield [MODELS[r["model"]], length, str(r["num_gpus"]), *speed, f"{r['peak_memory_gib']:.1f} GiB", exchange]


TABLES = {
    ("README.md", "| model | MoBA 2048x3"): step_rows,
    ("docs/evals.md", "| recipe | loss"): recipe_rows,
    ("docs/evals.md", "| trained with"): recall_rows,
    ("docs/evals.md", "| form | arm"): needle_rows,
    ("docs/evals.md", "| blocks | loss"): swap_rows,
    ("docs/runs.md", "| full layers"): sft_rows,
    ("docs/bring-your-model.md", "| length | attention"): untrained_rows,
    ("docs/bring-your-model.md", "| model | attention"): continued_rows,
    ("docs/bring-your-model.md", "| | attention"): at_4k_rows,
    ("docs/recipes.md", "| | RoPE base times 4"): extended_cpu_rows,
    ("docs/recipes.md", "| length, blocks"): extended_rows,
    ("docs/findings.md", "| gate | trailing"): gate_rows,
    ("docs/findings.md", "| from nothing"): small_rows,
    ("docs/findings.md", "| parameters without"): small_size_rows,
    ("docs/findings.md", "| tokens before"): small_context_rows,
    ("docs/findings.md", "| trained with |"): small_gate_rows,
    ("docs/findings.md", "| trained with, seed 2"): small_best_rows,
    ("docs/findings.md", "| full last layers"): small_tuned_rows,
    ("docs/findings.md", "| model | attention | pairs"): plan_rows,
    ("docs/evals.md", "| continued at 8K"): retrieval_rows,
    ("docs/findings.md", "| attention | pairs at 8K"): ruler_rows,
    ("docs/findings.md", "| continued with"): drop_in_rows,
    ("docs/findings.md", "| continued at 3e-4"): drop_in_rate_rows,
    ("docs/kernels.md", "| 8 x 8K"): model_routing_rows,
    ("docs/findings.md", "| in 2K tokens"): partial(block_size_rows, 2048),
    ("docs/findings.md", "| in 256 tokens"): partial(block_size_rows, 256),
}


@pytest.mark.parametrize("name, head", TABLES, ids=lambda text: text.strip("| "))
def test_a_table_has_the_numbers_of_its_results(name, head):
    """Catches a number that was changed in the text, and results that were replaced without it."""
    expected = list(TABLES[name, head]())  # but for the first column, which has words
    assert [row[1:] for row in table(name, head)] == [row[1:] for row in expected] and len(expected) > 1


def test_the_table_of_long_contexts_has_the_numbers_of_its_results():
    """The same, of rows from several files in an order of their own, with settings in words."""
    both = (table("docs/long.md", f"| model | {head} | GPUs |") for head in ("context", "length", "sequences"))
    shown = [[*row[:2], row[2].split(",")[0], *row[4:]] for rows in both for row in rows]
    assert len(shown) == 17
    assert [row for row in shown if row not in list(long_rows())] == []


def test_the_table_of_kernels_has_the_numbers_of_its_results():
    """The same, of the kernels: forward, total, routing, TFLOP/s, memory and ratio of each row."""
    results = kept("benchmarks/results/attention.json")["results"]
    found = {(r["row"].replace(" ", ", ", 1), r["implementation"]): r for r in results}
    rows = [row for row in table("docs/kernels.md", "| N, B x k") if "pack" not in row[0] and "forward" not in row[0]]
    for row in rows:
        name = row[0].replace("128x8, skewed", "128x8 skewed").replace("512x3, skewed", "512x3 skewed")
        own = found[name.replace("128x8, 16/16 heads, d 64", "128x8 16/16 d64"), "triton"]
        said = [float(x) for x in re.findall(r"[\d.]+", " ".join(row[2:6]))]
        dense = found[name.replace("128x8, 16/16 heads, d 64", "128x8 16/16 d64"), "cudnn"]
        true = [own[key] for key in ("forward_ms", "total_ms", "routing_ms", "tflops", "peak_gib")]
        true += [dense["peak_gib"], own["ratio_to_cudnn"]]
        assert said == pytest.approx(true, rel=6e-3, abs=0.051), row[0]
    assert len(rows) >= 12


# -------------------- sentences


def ratio(row: str) -> float:
    results = kept("benchmarks/results/attention.json")["results"]
    return next(r["ratio_to_cudnn"] for r in results if r["row"] == row and r["implementation"] == "triton")


def sentences():
    """(page, what it has to say)"""
    last = {arm: gap("recipes_h100", 2, "", arm=arm).split(" ")[0] for arm in ("moba", "moba, then full")}
    yield "README.md", f"MoBA alone is {last['moba']} nats behind full attention"
    yield "README.md", f"the gap is {last['moba, then full']}, without a loss spike"
    end = {"arm": "moba", "tokens": 20185088, "attention": "full"}
    yield "README.md", f"With 20M tokens it is {gap('continual_h100', 2, '', **end).split(' ')[0]}"
    at = ("8K 128x8", "32K 128x8", "64K 512x3", "512K 128x8")
    short, middle, blocks, long = map(ratio, at)
    yield "README.md", f"{short:.1f} times as fast at 8K with blocks of 128, top 8, and {middle:.1f} times at 32K"
    yield "README.md", f"{blocks:.0f} times at 64K with 512x3; {long:.0f} times at 512K with 128x8"
    behind = {r["arm"]: r["difference"][-1] for r in kept(SMALL)["gaps"] if r["reference"] == "full"}
    yield "README.md", f"MoBA 128x8 is {behind['moba']:.2f} nats behind full attention in the last sixteenth"
    yield "README.md", f"for the last tenth of the tokens at 8K the gap is {behind['moba, then full']:.2f}"
    ends = {(run["arm"], run["seed"]): run["train"][-1][1] for run in kept(SMALL_BEST)["runs"]}
    none = [ends.pop(("sft, 0 full", seed)) for seed in (0, 2)]
    some = sorted(end for (arm, _), end in ends.items() if arm.startswith("sft"))
    low, high = f"{some[0]:.2f}", f"{some[-1]:.2f}"
    yield "docs/findings.md", f"to {none[0]:.2f} and {none[1]:.2f}, the others' to {low} to {high}"
    gates = {row[0]: row[1].split(" ")[0].strip("+") for row in gate_rows()}
    first = gates["mean, first block always selected (`first_blocks=1`)"]
    yield "README.md", f"loses {float(gates['mean (MoBA)']):.2f} nats on the last eighth"
    yield "README.md", f"and {float(first):.2f} with `attention.first_blocks=1`"
    yield (
        "docs/findings.md",
        f"Always selecting the first block closes {1 - float(first) / float(gates['mean (MoBA)']):.0%}".replace(
            "%", " %"
        ),
    )
    share = f"{attended_pairs(Moba(128, 16), [8192]) / causal_pairs([8192]):.0%}".replace("%", " %")
    yield "README.md", f"with 16 of 64 blocks per query ({share} of the pairs)"
    yield "docs/findings.md", f"all together to {share} of the pairs of full attention"
    swap = {r["attention"]: r["trailing_minus_full"] for r in kept("docs/results/quickstart/swap.json")["variants"]}
    own, random = (f"{swap[key]['mean']:.3f} +- {swap[key]['interval_95']:.3f}" for key in ("moba", "random"))
    yield "README.md", f"MoBA is {own} above full attention, random blocks {random}"
    rows = kept(f"{LONG}/h200_two_1m/results.json")["rows"]
    one, two = (r["tokens_per_second"] for r in rows[:2])
    yield (
        "README.md",
        f"1.5B at 128K reaches {hundreds(two)} tokens/s, {two / one:.1f} times the {hundreds(one)} of one",
    )
    yield "README.md", f"1.5B trains at 1M with {rows[2]['peak_memory_gib']:.0f} GiB per GPU"
    firsts = [-one["first"] for one in kept("docs/results/recipes_h100/results.json")["switches"]]
    yield (
        "docs/evals.md",
        f"the first step after it is {min(firsts):.2f} to {max(firsts):.2f} below MoBA on the same batch",
    )
    overall = kept("docs/results/routing_h100/routing.json")["overall"]
    share = {key: f"{overall[key]['mean']:.0%}".replace("%", " %") for key in ("oracle", "captured", "local", "random")}
    yield "docs/evals.md", f"although these blocks hold only {share['oracle']} of full attention's probability"
    yield "docs/evals.md", f"captures {share['captured']}, compared with {share['local']} in the most recent blocks"
    yield "docs/evals.md", f"blocks and {share['random']} in random ones"
    sparse = gap("continual_h100", 3, "", arm="moba", tokens=18087936, attention="moba 512x3")
    yield "docs/bring-your-model.md", f"the model is {sparse} above the full-attention run"
    yield "docs/bring-your-model.md", f"with full attention {gap('continual_h100', 3, '', **end)} (95 %"


@pytest.mark.parametrize("name, text", list(sentences()), ids=lambda text: text[:60])
def test_a_sentence_has_the_numbers_of_its_results(name, text):
    """Catches a number that was changed in the text, and results that were replaced without it."""
    assert text in page(name)


def test_what_is_compared_would_be_missed(monkeypatch):
    """Catches comparisons that pass whatever the text says: any digit of a number of the text changed."""
    name, text = next(iter(sentences()))
    changed = re.sub(r"\d(?=\D*$)", lambda m: str((int(m[0]) + 1) % 10), text)
    assert changed != text and changed not in page(name)
    rows = table("docs/evals.md", "| recipe | loss")
    assert [[cell.replace("2.052", "2.051") for cell in row] for row in rows] != list(recipe_rows())


def test_kills_on_gpus_are_as_documented():
    """Catches a text about killed processes that says more than the kept results."""
    (row,) = kept("benchmarks/results/two_gpus/kill.json")["kill"]
    text = " ".join(page("docs/runs.md").split())
    assert f"in one line, and all had ended after {row['rank_seconds']} s" in text and len(row["rank_said"]) == 1
    assert f"saved a checkpoint and all had ended after {row['torchrun_seconds']} s" in text
    _, *steps = sorted(set(row["started_from_steps"]))
    assert f"went on from steps {' and '.join(map(str, steps))}" in text
    assert row["largest_relative_difference"] == 0 and f"the losses of its {row['steps']} steps" in text
    later = kept("benchmarks/results/two_gpus/kill_to_one.json")
    two, one = (later["largest_relative_difference"][key] for key in ("on_two", "on_one"))
    assert two == 0 and f"{later['steps_on_two']} steps on two GPUs" in text
    assert (
        f"the next {later['steps_on_one']}," in text and f"differ from them by {one:.1e}".replace("e-0", "e-") in text
    )
