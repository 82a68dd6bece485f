"""attn_implementation="moba" under any padding, cache and way of decoding, against MoBA by its definition: one pass
with dense masks over each text alone. What MoBA cannot compute is refused in one line that names it."""

from __future__ import annotations

from contextlib import nullcontext
from copy import deepcopy
from dataclasses import dataclass, field
from functools import lru_cache

import pytest
import torch
from damage import assert_one_line, in_equal_parts, quick, thorough
from hypothesis import strategies as st
from torch import Tensor
from transformers import (
    AttentionInterface,
    AttentionMaskInterface,
    DynamicCache,
    LlamaConfig,
    LlamaForCausalLM,
    StaticCache,
)

from moba.transformers import configure, prompt

VOCAB, LAYERS, LONGEST = 31, 2, 26
DEFINITION = "moba_by_definition"
FIRST_DECODED: list[int] = []
"""Where decoding starts in the text that the definition is applied to; empty: nowhere."""


# -------------------- MoBA by its definition


def by_definition(module, query, key, value, attention_mask, scaling, **_) -> tuple[Tensor, None]:
    """Dense masks over rows without padding: the own block, the first ones, and the best of the complete others."""
    settings = module.config.moba
    kind, block_size, top_k, *first_blocks = settings["plan"][module.layer_idx]
    key, value = (x.repeat_interleave(query.shape[1] // x.shape[1], dim=1) for x in (key, value))
    length = key.shape[2]
    seen = torch.ones(length, length, dtype=torch.bool).tril().expand(query.shape[0], query.shape[1], -1, -1)
    if kind == "moba":
        block = torch.arange(length) // block_size
        picked = torch.zeros(*query.shape[:3], int(block[-1]) + 1, dtype=torch.bool)
        for t in range(length):
            own, always = int(block[t]), (first_blocks or [0])[0]
            wanted = [own, *range(min(always, own))]
            others = [b for b in range(own) if b not in wanted]
            if others and top_k > len(wanted):
                means = torch.stack([key[:, :, block == b].mean(2) for b in others], dim=2)
                gate = torch.einsum("bhd,bhnd->bhn", query[:, :, t], means)
                best = gate.topk(min(top_k - len(wanted), len(others)), dim=-1).indices
                picked[:, :, t].scatter_(-1, torch.tensor(others)[best], True)
            picked[:, :, t, wanted] = True
        sparse = picked[..., block] & seen
        decoded = torch.arange(length)[:, None] >= (FIRST_DECODED or [length])[0]
        seen = torch.where(decoded & (settings["decode"] == "full"), seen, sparse)
    scores = (query @ key.transpose(2, 3) * scaling).masked_fill(~seen, float("-inf"))
    return (scores.softmax(-1) @ value).transpose(1, 2).contiguous(), None


AttentionInterface.register(DEFINITION, by_definition)
AttentionMaskInterface.register(DEFINITION, lambda **_: None)


@lru_cache(maxsize=2)
def model_of(attention: str) -> LlamaForCausalLM:
    """The same small float64 model, with weights large enough for attention to matter."""
    config = LlamaConfig(
        vocab_size=VOCAB, hidden_size=16, intermediate_size=16, num_hidden_layers=LAYERS, num_attention_heads=4,
        num_key_value_heads=2, initializer_range=0.4, max_position_embeddings=128, pad_token_id=0, bos_token_id=1,
        eos_token_id=None, attn_implementation="eager",
    )  # fmt: skip
    torch.manual_seed(0)
    model = LlamaForCausalLM(config).double().eval()
    if attention == DEFINITION:
        model.set_attn_implementation(attention)
    return model


def expected_logits(ids: list[int], first_decoded: int | None) -> Tensor:
    """[T, V] of one text, read at once."""
    FIRST_DECODED[:] = [] if first_decoded is None else [first_decoded]
    return model_of(DEFINITION)(torch.tensor([ids]), use_cache=False).logits[0]


# -------------------- what is drawn


@dataclass
class Case:
    """A batch and how it is read."""

    plan: list
    decode: str
    real: list[list[bool]]
    """Which of the first columns are tokens, row by row; the others are padding."""
    steps: list[tuple]
    """("read", columns), ("rows", their new order), ("crop", columns)."""
    told: int | None
    """Columns that prompt() is told; None: it is not used."""
    seed: int
    """Of the tokens."""
    cached: bool = True
    mask_as: torch.dtype | None = torch.int64
    """None: no mask where there is no padding."""
    breaks: dict = field(default_factory=dict)
    """What makes it one that has to be refused, by name of what _read does."""


SEEDS = st.integers(0, 2**32)


@st.composite
def plans(draw) -> list:
    """A plan with MoBA in it."""
    entries = []
    for _ in range(LAYERS):
        top_k = draw(st.integers(1, 4))
        entries.append(["moba", draw(st.integers(1, 7)), top_k, draw(st.integers(0, top_k - 1))])
    if draw(st.booleans()):
        entries[draw(st.integers(0, LAYERS - 1))] = ["full", None, None]
    return entries


@st.composite
def valid(draw) -> Case:
    """A batch that MoBA can compute, read in a way of which it is clear what is prompt."""
    rows, first = draw(st.integers(1, 3)), draw(st.integers(1, 14))
    padding = draw(st.sampled_from(["none", "left", "right", "anywhere"]))
    real = []
    for _ in range(rows):
        length = draw(st.integers(1, first))
        row = {"none": [True] * first, "left": [False] * (first - length) + [True] * length}.get(padding)
        row = row or {"right": [True] * length + [False] * (first - length)}.get(padding)
        real.append(row or draw(st.lists(st.booleans(), min_size=first, max_size=first)))
    decode, cached = draw(st.sampled_from(["full", "moba"])), draw(st.booleans())
    told = draw(st.none() | st.integers(1, 20))
    several = not cached or decode == "moba" or told is not None
    sizes = st.integers(1, 5 if several else 1)
    columns = [draw(st.integers(1, first))] if several else [first]
    steps: list[tuple] = [("read", columns[0])]
    total = columns[0]
    for _ in range(draw(st.integers(0, 5))):
        kind = draw(st.sampled_from(["read", "read", "rows", "crop"] if cached else ["read"]))
        if kind == "read":
            size = min(draw(sizes), LONGEST - total)
            total += size
            steps += [("read", size)] if size else []
        elif kind == "rows":
            steps.append(("rows", draw(st.lists(st.integers(0, rows - 1), min_size=rows, max_size=rows))))
        elif total > 1:
            size = draw(st.integers(1, min(3, total - 1)))
            total -= size
            steps.append(("crop", size))
    as_types = [torch.bool, torch.int64, torch.int32] + ([None] if all(map(all, real)) else [])
    if all(row[0] for row in real):  # zeros alone look like a mask to be added
        as_types.append(torch.float32)
    return Case(draw(plans()), decode, real, steps, told, draw(SEEDS), cached, draw(st.sampled_from(as_types)))


BREAKS = {
    "mask values": ["0/1/2", "documents", "additive", "zeros"],
    "mask shape": ["4-D", "short"],
    "given": [
        {"output_attentions": True},
        {"is_causal": False},
        {"softcap": 5.0},
        {"s_aux": torch.zeros(4)},
        {"sliding_window": 1},
    ],
    "cache": ["static"],
    "positions": ["anew"],
    "phase": ["untold"],
    "dropout": [0.5],
}


@st.composite
def invalid(draw) -> Case:
    """One that has to be refused: it reads six columns or more, and one thing is wrong."""
    real = [[False] * draw(st.integers(1, 2)) + [True] * 6, [True] * 8]
    real[0] += [True] * (8 - len(real[0]))
    broken = draw(st.sampled_from(sorted(BREAKS)))
    case = Case([["moba", 2, 2, 0]] * LAYERS, "full", real, [("read", 8), ("read", 2)], 8, draw(SEEDS))
    case.breaks = {broken: draw(st.sampled_from(BREAKS[broken]))}
    if broken == "phase":
        case.told, case.steps = None, [("read", 8 - draw(st.integers(1, 5))), ("read", draw(st.integers(2, 4)))]
    if broken == "positions":
        case.real = [[True] * 8] * 2
    return case


# -------------------- running it


def broken_inputs(case: Case, given: dict, stop: int) -> dict:
    """The arguments of a forward pass with what is wrong put in."""
    mask = given["attention_mask"]
    how = case.breaks.get("mask values")
    if how == "additive":
        given["attention_mask"] = torch.where(mask.bool(), 0.0, float("-inf"))
    elif how == "zeros":
        given["attention_mask"] = torch.zeros_like(mask, dtype=torch.float32)
    elif how is not None:
        given["attention_mask"] = mask * (2 if how == "documents" else 1 + torch.arange(stop) % 2)
    if case.breaks.get("mask shape") == "4-D":
        given["attention_mask"] = torch.ones(len(mask), 1, given["input_ids"].shape[1], stop)
    elif "mask shape" in case.breaks:
        given["attention_mask"] = mask[:, 1:]
    if "positions" in case.breaks:
        given["position_ids"] = given["position_ids"] % 3
    return given | case.breaks.get("given", {})


def read(case: Case) -> None:
    """Reads the batch as the case says, and holds the logits of every pass against the definition."""
    for attention in ("moba", DEFINITION):
        if attention == "moba":
            configure(model_of(attention), plan=case.plan, decode=case.decode)
        else:
            model_of(attention).config.moba = {"plan": case.plan, "decode": case.decode}
    model = model_of("moba")
    generator = torch.Generator().manual_seed(case.seed)
    rows, first = len(case.real), len(case.real[0])
    ids = torch.randint(1, VOCAB, (rows, LONGEST), generator=generator)
    real = torch.cat([torch.tensor(case.real), torch.ones(rows, LONGEST - first, dtype=torch.bool)], dim=1)
    cache = DynamicCache() if case.cached else None
    if "cache" in case.breaks:
        cache = StaticCache(config=model.config, max_cache_len=LONGEST)
    stop, boundary = 0, case.told
    for what, how in case.steps:
        if what == "rows":
            cache.reorder_cache(torch.tensor(how))
            ids, real = ids[how], real[how]
        elif what == "crop":
            cache.crop(-how)
            stop -= how
            ids[:, stop:] = torch.randint(1, VOCAB, (rows, LONGEST - stop), generator=generator)
            boundary = boundary if case.told is not None else min(boundary, stop)
        if what != "read":
            continue
        start, stop = (stop if case.cached else 0), stop + how
        if case.told is None and (not case.cached or boundary is None):
            boundary = stop
        positions = (real.cumsum(1) - 1).clamp(min=0)
        mask = real[:, :stop].to(case.mask_as or torch.bool)
        given = {
            "input_ids": ids[:, start:stop],
            "attention_mask": None if case.mask_as is None else mask,
            "position_ids": positions[:, start:stop],
            "past_key_values": cache,
            "use_cache": case.cached,
        }
        with nullcontext() if case.told is None else prompt(case.told):
            logits = model(**broken_inputs(case, given, stop)).logits
        for row in range(rows):
            here = real[row, :stop]
            if not here[start:].any():
                continue
            text = ids[row, :stop][here].tolist()
            expected = expected_logits(text, int(here[:boundary].sum()))
            torch.testing.assert_close(
                logits[row][here[start:]], expected[len(text) - int(here[start:].sum()) :], rtol=1e-8, atol=1e-8
            )


def fuzz(how) -> None:
    seen = {"computed": 0, "refused": 0, "sparse": 0}

    def check(case: Case) -> None:
        model = model_of("moba")
        if "dropout" in case.breaks:
            model.train()
            for layer in model.model.layers:
                layer.self_attn.attention_dropout = case.breaks["dropout"]
        try:
            with torch.no_grad():
                read(case)
        except ValueError as error:
            assert case.breaks, error
            assert_one_line(error, "moba")
            seen["refused"] += 1
            return
        finally:
            model.eval()
            for layer in model.model.layers:
                layer.self_attn.attention_dropout = 0.0
        assert not case.breaks, case
        seen["computed"] += 1
        seen["sparse"] += any(e[0] == "moba" and e[1] * e[2] < 10 for e in case.plan)

    in_equal_parts(how, [valid(), invalid()], check)
    print(seen)
    everything = seen["computed"] + seen["refused"]
    assert min(seen["computed"], seen["refused"]) >= everything / 3 and seen["sparse"] >= seen["computed"] / 3, seen


def test_any_mask_cache_and_cut():
    """Catches a lost or shifted mask, blocks counted from padding, a phase guessed from a step's length, rows of a
    cache mixed up, and anything that is taken and ignored."""
    fuzz(quick(80))


@pytest.mark.long
@pytest.mark.timeout(3600)
def test_any_mask_cache_and_cut_at_length():
    """The same for many more examples, other ones each time."""
    fuzz(thorough(6000))


# -------------------- generate()


WAYS = {
    "greedy": {},
    "a cache that is made before": {"cache": True},
    "chunks": {"prefill_chunk_size": 5},
    "chunks whose last is one token": {"prefill_chunk_size": 10},
    "chunks of one token": {"prefill_chunk_size": 1},
    "prompt lookup": {"prompt_lookup_num_tokens": 4},
    "an assistant": {"assistant": True},
    "no cache": {"use_cache": False},
}


@pytest.mark.parametrize("decode", ["full", "moba"])
@pytest.mark.parametrize("way", WAYS)
def test_generate_writes_the_same_however_it_decodes(way, decode):
    """Catches tokens that depend on how the text was cut: prompts in chunks, speculative steps, no cache. Against a
    loop over the definition; a text that repeats itself, so that prompt lookup finds something."""
    plan, new = [["moba", 3, 2, 0], ["moba", 4, 2, 0]], 12
    model = model_of("moba")
    configure(model, plan=plan, decode=decode)
    model_of(DEFINITION).config.moba = {"plan": plan, "decode": decode}
    ids = torch.randint(1, VOCAB, (1, 7), generator=torch.Generator().manual_seed(5)).repeat(1, 3)[:, :21]
    given = dict(WAYS[way])
    if given.pop("assistant", False):
        given["assistant_model"] = deepcopy(model)
        configure(given["assistant_model"], plan=[["full", None, None]] * LAYERS)
    if given.pop("cache", False):
        given["past_key_values"] = DynamicCache()
    with torch.no_grad():
        text = ids[0].tolist()
        for _ in range(new):
            text.append(int(expected_logits(text, ids.shape[1])[-1].argmax()))
        with prompt(ids.shape[1]):
            found = model.generate(ids, max_new_tokens=new, do_sample=False, **given)
        assert found[0].tolist() == text
        if decode == "full" and {"prefill_chunk_size", "prompt_lookup_num_tokens", "assistant_model"} & given.keys():
            if given.get("prefill_chunk_size") == 1:
                return  # what follows one by one is decoded, where nothing else is said
            with pytest.raises(ValueError, match="may be a chunk of the prompt or several decoded tokens"):
                model.generate(ids, max_new_tokens=new, do_sample=False, **given)


def test_beams_are_those_of_dense_attention():
    """Catches a reordered cache that MoBA reads by its old rows: with all blocks, beams are transformers' own (sdpa:
    eager rounds float64 to float32, where its mask overflows)."""
    model, ids = model_of("moba"), torch.randint(1, VOCAB, (2, 17), generator=torch.Generator().manual_seed(5))
    ids[1, :4], mask = 0, torch.ones(2, 17, dtype=torch.int64)
    mask[1, :4] = 0
    given = {"attention_mask": mask, "max_new_tokens": 10, "num_beams": 3, "do_sample": False}
    dense = deepcopy(model)
    dense.set_attn_implementation("sdpa")
    configure(model, block_size=5, top_k=30, decode="moba")
    with torch.no_grad():
        expected = dense.generate(ids, **given)
        assert torch.equal(model.generate(ids, **given), expected)
        assert not torch.equal(dense.generate(ids, **given | {"num_beams": 1}), expected)
