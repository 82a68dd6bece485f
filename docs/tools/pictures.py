"""Draws the pictures of docs/concepts.md into docs/pictures/: `python docs/tools/pictures.py`.

What MoBA picks is computed by `moba.route`, losses are those of docs/results/continual_cpu, the schedule is the
quickstart's; nothing is drawn by hand.
"""

from __future__ import annotations

import json
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
sys.path.insert(0, str(ROOT))

import matplotlib  # noqa: E402

matplotlib.use("Agg")

import matplotlib.pyplot as plt  # noqa: E402
import numpy as np  # noqa: E402
import torch  # noqa: E402
from matplotlib.colors import ListedColormap  # noqa: E402
from matplotlib.figure import Figure  # noqa: E402
from matplotlib.patches import Patch  # noqa: E402

from launch.config import load  # noqa: E402
from moba import route  # noqa: E402
from moba.flops import attended_pairs, causal_pairs  # noqa: E402
from moba.kinds import Moba  # noqa: E402
from moba.routing import block_means  # noqa: E402
from train.schedule import build_schedule  # noqa: E402

TO = ROOT / "docs" / "pictures"
TOKENS, BLOCK, TOP_K, HEAD_DIM = 64, 8, 3, 16
OWN, PICKED, OTHER, NONE = "#1f77b4", "#ff7f0e", "#d9d9d9", "#ffffff"
QUERY = 52
"""The query of the first picture."""


def main() -> None:
    """Draws all of them."""
    TO.mkdir(exist_ok=True)
    q, k = text()
    for name, figure in {
        "one_query": one_query(q, k),
        "all_queries": all_queries(q, k),
        "trailing_loss": trailing_loss(),
        "stages": stages(),
    }.items():
        figure.savefig(TO / f"{name}.png", dpi=100, metadata={"Software": None})
        print(f"docs/pictures/{name}.png: {(TO / f'{name}.png').stat().st_size // 1024} KiB")


def text() -> tuple[torch.Tensor, torch.Tensor]:
    """Queries and keys [T, 1, D] of one head: each block has a direction of its own, and queries like some of them."""
    generator = torch.Generator().manual_seed(5)
    topic_MD = torch.randn(TOKENS // BLOCK, HEAD_DIM, generator=generator)
    k = topic_MD.repeat_interleave(BLOCK, 0) + 0.8 * torch.randn(TOKENS, HEAD_DIM, generator=generator)
    wanted_T = torch.randint(TOKENS // BLOCK, (TOKENS,), generator=generator)
    q = topic_MD[wanted_T] + 0.8 * torch.randn(TOKENS, HEAD_DIM, generator=generator)
    return q[:, None], k[:, None]


def one_query(q: torch.Tensor, k: torch.Tensor) -> Figure:
    """What happens for one query: keys, block means, scores, choice."""
    own = QUERY // BLOCK
    picked = set(route(q, k, block_size=BLOCK, top_k=TOP_K)[0, QUERY].tolist()) - {own}
    score_M = (block_means(k, BLOCK)[: TOKENS // BLOCK, 0] @ q[QUERY, 0]).numpy()
    figure, (keys, scores) = plt.subplots(2, figsize=(8, 4), height_ratios=[1, 2.6], sharex=True, layout="constrained")
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


def all_queries(q: torch.Tensor, k: torch.Tensor) -> Figure:
    """Which keys every query sees: full attention beside MoBA."""
    position = np.arange(TOKENS)
    causal = position[:, None] >= position
    own = position[:, None] // BLOCK == position // BLOCK
    picked = np.zeros((TOKENS, TOKENS), bool)
    for query, blocks in enumerate(route(q, k, block_size=BLOCK, top_k=TOP_K)[0].tolist()):
        for block in blocks:
            picked[query] |= (position // BLOCK == block) & (block >= 0)
    share = attended_pairs(Moba(BLOCK, TOP_K), [TOKENS]) / causal_pairs([TOKENS])
    assert share == (picked & causal).sum() / causal.sum()
    figure, both = plt.subplots(1, 2, figsize=(8, 4.8), layout="constrained")
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
    figure, axes = plt.subplots(figsize=(8, 3.6), layout="constrained")
    for name, label, colour in (
        ("before_full", "full attention", OWN),
        ("before_moba", "the same weights under MoBA 128x8", PICKED),
    ):
        found = json.loads((ROOT / "docs" / "results" / "continual_cpu" / f"{name}.json").read_text(encoding="utf-8"))
        edges = np.array(found["edges"])
        axes.stairs(found["mean"], edges, baseline=None, color=colour, linewidth=2, label=label)
        axes.plot((edges[-1] + edges[-2]) / 2, found["trailing"]["value"], "*", color=colour, ms=14, mec="black")
    axes.axvspan(edges[-2], edges[-1], color="0.9", zorder=0)
    axes.annotate("trailing loss", (edges[-2], 2.3), (edges[-4], 2.3), ha="right", arrowprops={"arrowstyle": "->"})
    axes.set(xlabel="position in the document (tokens)", ylabel="loss (nats per token)", xlim=(0, edges[-1]))
    axes.set_xticks(range(0, int(edges[-1]) + 1, 512))
    axes.set_ylim(2, 4)
    axes.legend(frameon=False, loc="upper right")
    axes.spines[["top", "right"]].set_visible(False)
    return figure


def stages() -> Figure:
    """The quickstart's schedule: attention and learning rate over tokens."""
    schedule = build_schedule(load(["+exp=quickstart"]))
    figure, axes = plt.subplots(figsize=(8, 3.2), layout="constrained")
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


if __name__ == "__main__":
    main()
