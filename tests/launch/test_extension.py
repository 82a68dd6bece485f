"""A context that grows within a run: stopped and continued around the boundary, and as a chain of runs."""

import json

from launch_runs import LINE, TINY, Act, course, newest

LENGTHS, BATCHES, STEPS = (64, 128, 256), (256, 512, 512), (4, 3, 4)
SETTINGS = (
    ["lr.kind=cosine"],
    ["lr.peak=1e-3", "lr.warmup_tokens=50%", "rope.theta=40000", "long_documents.share=0.9", "mix.a=1", "mix.b=3"],
    ["lr.kind=constant", "lr.warmup_tokens=0", "reset_optimizer=true", "rope.scaling=linear", "rope.factor=2"],
)
NAMES = ("short", "middle", "long")
BOUNDARY = sum(batch * steps for batch, steps in zip(BATCHES[:2], STEPS))


def stages(*indices: int, without: str = "") -> list[str]:
    """The overrides of these stages, in order."""
    overrides = []
    for index in indices:
        key = f"schedule.stages.{NAMES[index]}"
        settings = [f"tokens={BATCHES[index] * STEPS[index]}", f"seq_len={LENGTHS[index]}"]
        settings += [f"batch_tokens={BATCHES[index]}", "attention.num_blocks=8", "attention.top_k=3", *SETTINGS[index]]
        settings = [text for text in settings if not (without and text.startswith(without))]
        overrides += [f"+{key}.{settings[0]}", *(f"{key}.{text}" for text in settings[1:])]
    return overrides


def common(house, name: str) -> list[str]:
    """The tiny run without stages, on two sources."""
    tiny = ["schedule=custom", *(text for text in TINY if "stages" not in text and "tokens=6K" not in text)]
    data = ["data=files", "~data.sources.main", f"data.cache_dir={house.root}/cache", "data.validation=null"]
    sources = [
        f"+data.sources.{s}.path={house.root}/books/{pattern}.txt" for s, pattern in (("a", "[0-4]"), ("b", "[5-9]"))
    ]
    return [*tiny, *data, *sources, "checkpoint.every_tokens=0", f"run.dir={house.runs / name}"]


def test_stops_around_a_boundary_and_a_chain_of_runs_change_nothing(launcher, house):
    """Catches anything that a change of length, RoPE, batch, mix, rate and moments loses or moves: the run of three
    lengths, stopped right before the last boundary, at it and right after it, against three chained runs that are never
    stopped. A chained run that starts without moments is what reset_optimizer has to equal."""
    grown = [*common(house, "grown"), *stages(0, 1, 2)]
    # The step behind the line at which the signal comes is the last; a start and a stage have a line of their own.
    stops = {BOUNDARY - BATCHES[1]: STEPS[0] + STEPS[1] + 1, BOUNDARY: 1, BOUNDARY + BATCHES[2]: 2}
    for tokens, line in stops.items():
        ended = launcher.run(grown, act=Act(LINE, line, signal=15))
        assert ended.code == 143 and f"at {tokens:,} tokens" in ended.out, ended
    assert launcher.run(grown).code == 0

    links, chained = [], []
    for index, name in enumerate(NAMES):
        link = [*common(house, f"link_{name}"), *stages(index, without="reset_optimizer")]
        if links:
            link += [f"init.source={links[-1]}", f"init.optimizer={str(index < 2).lower()}", "init.data=true"]
        ended = launcher.run(link)
        assert ended.code == 0, ended
        links.append(house.runs / f"link_{name}")
        start = chained[-1]["tokens"] if chained else 0
        chained += [r | {"tokens": r["tokens"] + start} for r in course(links[-1]) if r["kind"] == "train"]

    ours = [r for r in course(house.runs / "grown") if r["kind"] == "train"]
    keys = ("tokens", "stage", "seq_len", "attention", "loss", "trailing_loss", "grad_norm", "lr")
    assert [[r[key] for key in keys] for r in ours] == [[r[key] for key in keys] for r in chained]
    assert len({r["loss"] for r in ours}) == len(ours) == sum(STEPS)
    ends = [newest(house.runs / "grown"), newest(links[-1])]
    assert [path.name for path in ends] == [
        f"tokens_{sum(b * s for b, s in zip(BATCHES, STEPS)):015d}",
        f"tokens_{BATCHES[2] * STEPS[2]:015d}",
    ]
    for file in ("model-00001-of-00001.safetensors", "optimizer-00001-of-00001.safetensors"):
        assert (ends[0] / file).read_bytes() == (ends[1] / file).read_bytes(), file
    states = [json.loads((path / "state.json").read_text()) for path in ends]
    assert states[0]["state"]["loader"] == states[1]["state"]["loader"]
    assert states[0]["optimizer_step"] == STEPS[2], "the moments began anew at the boundary"
    assert any(">=" in name for name in states[0]["state"]["loader"]["counts"]), "long documents were drawn apart"
