"""Draws the figures of README and docs anew: `python docs/make_figures.py [part of a path]`, once results are replaced.

Figures of measurements come from the kept numbers beside them. In the pictures of docs/concepts.md what MoBA picks is
computed by `moba.route`, losses are those of docs/results/continual_cpu, the schedule is the quickstart's; nothing is
drawn by hand. Each PNG says what it was drawn from (a checksum of the files), so that a test sees one that is older.
"""

from __future__ import annotations

import hashlib
import json
import sys
import tempfile
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from typing import NamedTuple

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))

import numpy as np  # noqa: E402
import torch  # noqa: E402
import yaml  # noqa: E402
from matplotlib.colors import ListedColormap  # noqa: E402
from matplotlib.figure import Figure  # noqa: E402
from matplotlib.patches import Patch  # noqa: E402
from PIL import Image  # noqa: E402
from PIL.PngImagePlugin import PngInfo  # noqa: E402

from benchmarks import attention, panels, small_results, step_tables  # noqa: E402
from benchmarks.studies import STUDIES  # noqa: E402
from evals.comparison import plot_positions  # noqa: E402
from evals.needle_report import NeedleReport  # noqa: E402
from evals.routing_figures import draw_curves, draw_layers  # noqa: E402
from evals.routing_report import RoutingReport  # noqa: E402
from evals.ruler_report import RulerReport  # noqa: E402
from evals.style import LOSS, color, save  # noqa: E402
from evals.swap import load_evaluations  # noqa: E402
from launch.config import load  # noqa: E402
from moba import route  # noqa: E402
from moba.flops import attended_pairs, causal_pairs  # noqa: E402
from moba.kinds import Moba  # noqa: E402
from moba.routing import block_means  # noqa: E402
from train.schedule import build_schedule  # noqa: E402

RESULTS, BENCHMARKS, PICTURES = Path("docs/results"), Path("benchmarks/results"), Path("docs/pictures")
DRAWN_FROM = "Drawn from"
"""The name under which a PNG keeps the checksum."""
TOKENS, BLOCK, TOP_K, HEAD_DIM = 64, 8, 3, 16
OWN, PICKED, OTHER, NONE = color(0), color(1), "#d9d9d9", "#ffffff"
SHARED = ("parallel.sequence=2",)
QUERY = 52
"""The query of the first picture."""


class Drawing(NamedTuple):
    """A figure."""

    draw: Callable[[Path], None]
    sources: Sequence[Path]
    """Kept files that it is drawn from, by their paths in the repository."""

    def checksum(self) -> str:
        """Of the sources."""
        found = hashlib.sha256()
        for source in self.sources:
            found.update((ROOT / source).read_bytes())
        return found.hexdigest()[:16]


def record(path: Path) -> dict:
    """A kept result."""
    return json.loads((ROOT / path).read_text(encoding="utf-8"))


def drawings() -> dict[Path, Drawing]:
    """Every figure by its path in the repository."""
    found = {PICTURES / f"{f.__name__}.png": Drawing(lambda path, f=f: save(f(), path), ()) for f in PAINTED}
    found[PICTURES / "trailing_loss.png"] = Drawing(lambda path: save(trailing_loss(), path), BEFORE)
    quickstart = RESULTS / "quickstart"
    swap, routing = ((quickstart / f"{name}.json", quickstart / f"{name}.npz") for name in ("swap", "routing"))
    plans = RESULTS / "plans_h100" / "plan_quarter.yaml", RESULTS / "plans_h100" / "sweep.json"
    found[RESULTS / "plans_h100" / "figure.png"] = Drawing(partial(draw_plans, *plans), plans)
    found[quickstart / "swap.png"] = Drawing(partial(draw_swap, swap[0]), swap)
    found[quickstart / "routing.png"] = Drawing(partial(draw_routing, routing[0]), routing)
    router = RESULTS / "routing_h100" / "routing.json"
    found[router.with_name("layers.png")] = Drawing(partial(draw_heads, router), (router,))
    for source in sorted(ROOT.glob(f"{RESULTS}/*/results.json")):
        path = source.relative_to(ROOT)
        if STUDIES[record(path).get("study", "small")].panels:
            found[path.with_name("figure.png")] = Drawing(partial(draw_study, path), (path,))
        else:
            for name, draw in small_results.figures(record(path)).items():
                found[path.with_name(f"{name}.png")] = Drawing(draw, (path,))
    for path in sorted(path.relative_to(ROOT) for path in ROOT.glob(f"{RESULTS}/*/scaling.json")):
        found[path.with_suffix(".png")] = Drawing(partial(draw_scaling, path), (path,))
    for path in sorted(path.relative_to(ROOT) for path in ROOT.glob(f"{RESULTS}/*/needle.json")):
        both = path, path.with_suffix(".npz")
        for i, form in enumerate(record(path)["cells"]):
            found[path.with_name(f"{form}.png")] = Drawing(partial(draw_needle, path, i), both)
    for path in sorted(path.relative_to(ROOT) for path in ROOT.glob(f"{RESULTS}/*/ruler.json")):
        both = path, path.with_suffix(".npz")
        found[path.with_suffix(".png")] = Drawing(lambda to, path=path: RulerReport.load(ROOT / path).draw(to), both)
    for path in sorted(path.relative_to(ROOT) for path in ROOT.glob(f"{BENCHMARKS}/*/results.json")):
        if "variant" in record(path).get("rows", [{}])[0]:
            found[path.with_name("figure.png")] = Drawing(partial(draw_step, path), (path,))
    two = sorted(path.relative_to(ROOT) for path in ROOT.glob(f"{BENCHMARKS}/longest_context/*_two*/results.json"))
    found[BENCHMARKS / "two_gpus" / "figure.png"] = Drawing(partial(draw_two_gpus, two), two)
    kernels = BENCHMARKS / "attention.json"
    found[kernels.with_suffix(".png")] = Drawing(lambda path: attention.draw(record(kernels), path), (kernels,))
    return found


def main() -> None:
    """Draws those whose path contains the argument; all by default."""
    for path, drawing in drawings().items():
        if sys.argv[1:] and sys.argv[1] not in str(path):
            continue
        with tempfile.TemporaryDirectory() as folder:
            drawn, about = Path(folder) / "figure.png", PngInfo()
            drawing.draw(drawn)
            about.add_text(DRAWN_FROM, drawing.checksum())
            (ROOT / path).parent.mkdir(parents=True, exist_ok=True)
            with Image.open(drawn) as image:
                image.convert("RGB").quantize(256).save(ROOT / path, pnginfo=about, optimize=True)
        print(f"{path}: {(ROOT / path).stat().st_size // 1024} KiB", flush=True)


# -------------------- measurements


def draw_step(source: Path, path: Path) -> None:
    """Where the time of a step goes."""
    step_tables.draw(record(source), path)


def draw_two_gpus(sources: Sequence[Path], path: Path) -> None:
    """Two GPUs beside one at the same context, of each file that has both."""
    names = {(): "data parallel, ZeRO-1", ("deepspeed=zero3",): "data parallel, ZeRO-3", SHARED: "one sequence, heads"}
    names |= {(*SHARED, f"parallel.sequence_by={by}"): f"one sequence, {by}" for by in ("heads", "blocks")}
    bars = []
    for source in sources:
        kept = record(source)
        rows = [row for row in kept["rows"] if "failed" not in row]
        alone = {(row["model"], row["seq_len"]): row["tokens_per_second"] for row in rows if row["num_gpus"] == 1}
        for row in rows:
            one = alone.get((row["model"], row["seq_len"]))
            if row["num_gpus"] == 2 and one is not None:
                model = row["model"].removeprefix("paper_").replace("_", ".").upper()
                about = f"{model}, {row['seq_len'] // 1024}K, {kept['device'].split()[1]}"
                bars.append((about, names[tuple(row["overrides"])], one, row["tokens_per_second"]))
    bars.sort()
    figure = Figure(figsize=(8, 0.6 * len(bars) + 1), layout="constrained")
    axes = figure.subplots()
    for i, (number, hatch) in enumerate(((2, ""), (3, "//"))):
        at = np.arange(len(bars)) + 0.4 * i - 0.2
        label = ("one GPU", "two GPUs")[i]
        axes.barh(at, [bar[number] for bar in bars], 0.4, color=color(i), hatch=hatch, label=label)
    for at, (_, _, one, two) in enumerate(bars):
        axes.text(two, at + 0.2, f" {two / one:.2f} times", va="center", fontsize="small")
    axes.set_yticks(range(len(bars)), [f"{about}\n{how}" for about, how, *_ in bars])
    axes.invert_yaxis()
    axes.set_xlim(right=1.15 * max(bar[3] for bar in bars))
    axes.set_xlabel("tokens per second")
    axes.set_title("MoBA 2048x3 on two GPUs and on one")
    axes.xaxis.set_major_formatter("{x:,.0f}")
    axes.legend(fontsize="small", loc="upper right")
    save(figure, path)


def draw_study(source: Path, path: Path) -> None:
    """The panels of a training study."""
    study = record(source)
    declared = STUDIES[study["study"]]
    panels.draw(study | {"about": declared.about}, declared.panels, path)


def draw_swap(source: Path, path: Path) -> None:
    """The same weights under several attentions."""
    plot_positions(load_evaluations(ROOT / source), path, record(source)["dense_up_to"])


def draw_routing(source: Path, path: Path) -> None:
    """What the router captures."""
    about = record(source)
    title = f"{about['run']}, {about['attention']}: routing in {about['num_documents']} held-out documents"
    draw_curves(RoutingReport.load(ROOT / source), path, title)


def draw_needle(source: Path, form: int, path: Path) -> None:
    """Right answers by length and depth."""
    NeedleReport.load(ROOT / source).draw(form, path)


def draw_scaling(source: Path, path: Path) -> None:
    """Fits of launch/fit_scaling.py: loss over compute counted in two ways, and exponents by position."""
    found = record(source)
    figure = Figure(figsize=(12, 4), layout="constrained")
    *grid, exponents = figure.subplots(1, 3)
    for i, series in enumerate(dict.fromkeys(run["series"] for run in found["runs"])):
        own = [run for run in found["runs"] if run["series"] == series]
        name = series.split(" then ")[-1].partition(" (")[0]  # of its last stage
        for axes, axis in zip(grid, found["axes"]):
            fit, compute = found["fits"][axis][series], np.array([run["pflops_days"][axis] for run in own])
            for x, (what, line) in enumerate([("mean", "-"), ("trailing", "--")]):
                places = np.geomspace(compute.min() / 1.2, compute.max() * 1.2)
                label = f"{name}, {what}: {fit['a'][x]:.3f} C^{fit['b'][x]:.3f}"
                axes.plot(places, fit["a"][x] * places ** fit["b"][x], line, color=color(i), label=label)
                axes.plot(compute, [run["losses"][x] for run in own], "os"[i], color=color(i), markersize=5)
            axes.set(xscale="log", yscale="log", xlabel=f"PFLOP/s-days ({found['axes'][axis]})", ylabel=LOSS)
            axes.set_xticks(ticks := [2e-5, 5e-5, 1e-4, 2e-4], [f"{x:.0e}" for x in ticks])
            axes.set_xticks([], minor=True)
            axes.yaxis.set_minor_formatter("{x:.1f}")
        fit, places = found["fits"]["dense"][series], np.arange(len(found["ranges"]) - 2) + 0.2 * i
        b, low, high = (np.array(fit[key][2:]) for key in ("b", "b_low", "b_high"))
        exponents.errorbar(places, b, [b - low, high - b], fmt="os"[i], color=color(i), label=name, capsize=2)
    for axes in grid:
        axes.legend(fontsize="x-small")
    exponents.set(xlabel="context position", ylabel="exponent (every causal pair counted), 95 %")
    shown = range(0, len(found["ranges"]) - 2, 3)
    exponents.set_xticks(shown, [found["ranges"][2 + i] for i in shown], fontsize="x-small")
    exponents.legend(fontsize="small")
    save(figure, path)


def draw_plans(plan: Path, sweep: Path, path: Path) -> None:
    """What each layer costs as the only sparse one, and what plans for the layers keep."""
    layers = yaml.safe_load((ROOT / plan).read_text(encoding="utf-8"))["measured"]["layers"]
    figure = Figure(figsize=(11, 3.6), layout="constrained")
    single, loss, right = figure.subplots(1, 3, width_ratios=[2, 1, 1])
    for i, (what, words) in enumerate([("loss", "the end of the text"), ("retrieval", "answers that stand far back")]):
        costs = [max(layer[f"alone_kl_{what}"], 1e-4) for layer in layers]
        single.bar(np.arange(len(costs)) + 0.4 * i - 0.2, costs, 0.4, color=color(i), hatch="//" * i, label=words)
    single.set_yscale("log")
    single.set_xlabel("the one layer with MoBA (64x17+1 or 128x9+1)")
    single.set_ylabel("KL divergence (nats per token)")
    single.set_title("Cost of one sparse layer in the predictions")
    single.set_ylim(top=10)
    single.legend(fontsize="small", ncols=2, loc="upper left")
    full, *rows = record(sweep)["settings"]
    names = [f"{row['attention'].replace('_', chr(10))}\n{100 * row['attended_share']:.0f} %" for row in rows]
    colors = [color(0 if row["attention"].startswith("plan") else 2) for row in rows]
    trailing = [row["trailing_minus_full"] for row in rows]
    loss.bar(names, [x["mean"] for x in trailing], yerr=[x["interval_95"] for x in trailing], color=colors, capsize=3)
    loss.set_title("Trailing loss minus full")
    loss.set_ylabel("nats per token")
    right.bar(names, [100 * row["pass_key"]["right"] for row in rows], color=colors)
    right.axhline(100 * full["pass_key"]["right"], color="0.3", linestyle=":", label="full attention")
    right.set_title("Pass keys found")
    right.set_ylabel("right answers (%)")
    right.set_ylim(top=110)
    right.legend(fontsize="small", loc="upper right")
    for axes in (loss, right):
        axes.tick_params(axis="x", labelsize="x-small")
        axes.set_xlabel("attention, share of the causal pairs", fontsize="small")
    save(figure, path)


def draw_heads(source: Path, path: Path) -> None:
    """What is known of a router whose single documents were not kept."""
    about = record(source)
    heads_NLH = {name: np.array([values], dtype=float) for name, values in about["heads"].items()}
    specs = [Moba(*map(int, text.split()[1].split("x"))) for text in about["specs"]]
    none = np.empty(0)
    report = RoutingReport(about["layers"], specs, heads_NLH, none, none, none, none, about["candidates"], ["all"])
    draw_layers(report, path, f"{about['attention']} at 16K, {about['num_documents']} documents, {about['device']}")


# -------------------- pictures of the idea


def text() -> tuple[torch.Tensor, torch.Tensor]:
    """Queries and keys [T, 1, D] of one head: each block has a direction of its own, and queries like some of them."""
    generator = torch.Generator().manual_seed(5)
    topic_MD = torch.randn(TOKENS // BLOCK, HEAD_DIM, generator=generator)
    k = topic_MD.repeat_interleave(BLOCK, 0) + 0.8 * torch.randn(TOKENS, HEAD_DIM, generator=generator)
    wanted_T = torch.randint(TOKENS // BLOCK, (TOKENS,), generator=generator)
    q = topic_MD[wanted_T] + 0.8 * torch.randn(TOKENS, HEAD_DIM, generator=generator)
    return q[:, None], k[:, None]


def one_query() -> Figure:
    """What happens for one query: keys, block means, scores, choice."""
    q, k = text()
    own = QUERY // BLOCK
    picked = set(route(q, k, block_size=BLOCK, top_k=TOP_K)[0, QUERY].tolist()) - {own}
    score_M = (block_means(k, BLOCK)[: TOKENS // BLOCK, 0] @ q[QUERY, 0]).numpy()
    figure = Figure(figsize=(8, 4), layout="constrained")
    keys, scores = figure.subplots(2, height_ratios=[1, 2.6], sharex=True)
    for token in range(TOKENS):
        block = token // BLOCK
        colour = NONE if token > QUERY else OWN if block == own else PICKED if block in picked else OTHER
        keys.bar(token + 0.5, 1, width=0.9, color=colour, edgecolor="0.6", linewidth=0.5)
    keys.annotate("query", (QUERY + 0.5, 1), (QUERY + 0.5, 1.45), ha="center", arrowprops={"arrowstyle": "->"})
    keys.set(ylim=(0, 1.9), yticks=[], title=f"{TOKENS} keys in blocks of {BLOCK}; the query sees the coloured ones")
    for block, score in enumerate(score_M):
        if block < own:
            colour = PICKED if block in picked else OTHER
            scores.bar((block + 0.5) * BLOCK, score, width=BLOCK - 1, color=colour, edgecolor="0.5", linewidth=0.7)
    scores.axhline(0, color="0.4", linewidth=0.8)
    scores.axvspan(own * BLOCK, (own + 1) * BLOCK, color=OWN, alpha=0.15)
    scores.text((own + 0.5) * BLOCK, 0, "own block:\nalways", ha="center", va="bottom")
    scores.text((own + 1.5) * BLOCK, 0, "future", ha="center", va="bottom", color="0.5")
    scores.set(xlim=(0, TOKENS), ylabel="query times\nmean key of the block", xlabel="position")
    scores.set_xticks(range(0, TOKENS + 1, BLOCK))
    for axes in (keys, scores):
        axes.spines[["top", "right"]].set_visible(False)
    keys.spines["left"].set_visible(False)
    return figure


def all_queries() -> Figure:
    """Which keys every query sees: full attention beside MoBA."""
    q, k = text()
    position = np.arange(TOKENS)
    causal = position[:, None] >= position
    own = position[:, None] // BLOCK == position // BLOCK
    picked = np.zeros((TOKENS, TOKENS), bool)
    for query, blocks in enumerate(route(q, k, block_size=BLOCK, top_k=TOP_K)[0].tolist()):
        for block in blocks:
            picked[query] |= (position // BLOCK == block) & (block >= 0)
    share = attended_pairs(Moba(BLOCK, TOP_K), [TOKENS]) / causal_pairs([TOKENS])
    assert share == (picked & causal).sum() / causal.sum()
    figure = Figure(figsize=(8, 4.8), layout="constrained")
    both = figure.subplots(1, 2)
    colours = ListedColormap([NONE, OTHER, PICKED, OWN])
    for axes, title, values in (
        (both[0], "full attention: all pairs", np.where(causal, 3, 0)),
        (
            both[1],
            f"MoBA, blocks of {BLOCK}, top {TOP_K}: {share:.0%} of them",
            np.where(causal, np.where(own, 3, np.where(picked, 2, 1)), 0),
        ),
    ):
        axes.imshow(values, cmap=colours, vmin=0, vmax=3, interpolation="nearest", extent=(0, TOKENS, TOKENS, 0))
        axes.set(title=title, xlabel="key", xticks=range(0, TOKENS + 1, BLOCK), yticks=range(0, TOKENS + 1, BLOCK))
        axes.grid(color="white", linewidth=0.6)
    both[0].set_ylabel("query")
    names = {"own block": OWN, "picked block": PICKED, "not read": OTHER}
    figure.legend(handles=[Patch(color=c, label=n) for n, c in names.items()], loc="outside lower center", ncols=3)
    return figure


def trailing_loss() -> Figure:
    """Loss by position of one model under full attention and under MoBA, with the part that the trailing loss is of."""
    figure = Figure(figsize=(8, 3.6), layout="constrained")
    axes = figure.add_subplot()
    labels = ("full attention", "the same weights under MoBA 128x8")
    for path, label, colour, width in zip(BEFORE, labels, (OWN, PICKED), (3.5, 1.5)):
        found = record(path)
        edges = np.array(found["edges"])
        axes.stairs(found["mean"], edges, baseline=None, color=colour, linewidth=width, label=label)
        axes.plot((edges[-1] + edges[-2]) / 2, found["trailing"]["value"], "*", color=colour, ms=14, mec="black")
    axes.axvspan(edges[-2], edges[-1], color="0.9", zorder=0)
    axes.annotate("trailing loss", (edges[-2], 2.3), (edges[-4], 2.3), ha="right", arrowprops={"arrowstyle": "->"})
    axes.set(xlabel="position in the document (tokens)", ylabel=LOSS, xlim=(0, edges[-1]))
    axes.set_xticks(range(0, int(edges[-1]) + 1, 512))
    axes.set_ylim(2, 4)
    axes.legend(frameon=False, loc="upper right")
    axes.spines[["top", "right"]].set_visible(False)
    return figure


def stages() -> Figure:
    """The quickstart's schedule: attention and learning rate over tokens."""
    schedule = build_schedule(load(["+exp=quickstart"]))
    figure = Figure(figsize=(8, 3.2), layout="constrained")
    axes = figure.add_subplot()
    tokens = np.linspace(0, schedule.total_tokens - 1, 500).astype(int)
    axes.plot(tokens / 1000, [schedule.learning_rate(t) for t in tokens.tolist()], color="black")
    for stage, colour in zip(schedule.stages, (PICKED, OWN)):
        (spec,) = set(stage.attention)
        axes.axvspan(stage.start / 1000, stage.end / 1000, color=colour, alpha=0.2, linewidth=0)
        share = attended_pairs(spec, [stage.seq_len]) / causal_pairs([stage.seq_len])
        middle = (stage.start + stage.end) / 2000
        label = f"stage {stage.name}\n{spec}\n{share:.0%} of pairs"
        axes.text(middle, 0.97, label, ha="center", va="top", fontsize=8, transform=axes.get_xaxis_transform())
    axes.axvline(schedule.stages[0].end / 1000, color="0.3", linestyle="--", linewidth=1)
    axes.set(xlim=(0, schedule.total_tokens / 1000), xlabel="thousand tokens seen", ylabel="learning rate")
    axes.set_ylim(0, 1.45 * max(axes.get_ylim()))
    axes.spines[["top", "right"]].set_visible(False)
    return figure


BEFORE = tuple(RESULTS / "continual_cpu" / f"before_{name}.json" for name in ("full", "moba"))
PAINTED = (one_query, all_queries, stages)

if __name__ == "__main__":
    main()
