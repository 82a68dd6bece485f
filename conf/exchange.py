"""How processes that share a sequence attend to each other's tokens (`parallel.sequence_by`), and why so."""

from __future__ import annotations

from typing import NamedTuple

from conf.schema import RunConfig

AUTO, HEADS, BLOCKS = "auto", "heads", "blocks"
SEQUENCE_BY = (AUTO, HEADS, BLOCKS)
WHERE = "slices of documents (parallel.sequence_by=blocks)"


class Exchange(NamedTuple):
    """One of HEADS and BLOCKS, and the reason in words."""

    by: str
    reason: str


def exchange(config: RunConfig) -> Exchange:
    """The exchange of this run, of a model whose numbers of heads are filled in.

    `auto` goes by heads, which needs the least memory, unless there are fewer heads than processes, or key/value heads
    would have to be sent to several processes and more would be sent in all than by blocks. For each token, heads send
    queries, outputs, keys and values once, H + H + 2 K vectors (K: key/value heads, counted at each process that reads
    them); blocks send the 2 G of keys and values to each of the S processes.
    """
    size, chosen = config.parallel.sequence, config.parallel.sequence_by
    if chosen != AUTO:
        return Exchange(chosen, "as set by parallel.sequence_by")
    num_heads = config.model.num_heads
    num_kv = num_heads if config.model.num_kv_heads is None else config.model.num_kv_heads
    assert num_heads is not None and num_kv is not None
    if size > num_heads:
        return Exchange(BLOCKS, f"{num_heads} heads are fewer than {size} processes")
    if size > num_kv and num_kv * size < num_heads + size and refusal(config) is None:
        many = "one key/value head" if num_kv == 1 else f"{num_kv} key/value heads"
        return Exchange(BLOCKS, f"sends less than {many} would, repeated for {size} processes")
    return Exchange(HEADS, "needs less memory than blocks")


def by_blocks(config: RunConfig) -> bool:
    """Whether processes share sequences, and by blocks."""
    return config.parallel.sequence > 1 and exchange(config).by == BLOCKS


def most_processes(config: RunConfig) -> float:
    """How many processes may share a sequence: by heads as many as there are, by blocks any number."""
    if config.parallel.sequence_by == HEADS or refusal(config) is not None:
        assert config.model.num_heads is not None
        return config.model.num_heads
    return float("inf")


def refusal(config: RunConfig) -> tuple[str, object, str] | None:
    """(key, value, what would work) of the first setting that cannot go by blocks; None if all can."""
    for name, stage in config.schedule.stages.items():
        key, attention = f"schedule.stages.{name}.attention", stage.attention
        if attention is None:
            continue
        if attention.backend == "cudnn":
            return f"{key}.backend", "cudnn", f"cannot attend from {WHERE}; use auto or flash"
        if attention.options.get("gate") == "random":
            return f"{key}.gate", "random", f"cannot draw alike in {WHERE}; use parallel.sequence_by=heads"
    return None
