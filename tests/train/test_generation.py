"""Generation against forward passes over whole texts, and drawing against the definition of its options."""

import collections

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

import train.model.generation
from conf.schema import ModelConfig
from data.tokenizer import load_tokenizer
from moba.documents import Documents
from moba.kinds import Full, Moba
from train.model.decoder import Decoder
from train.model.generation import Sampling, TextStream, draw, generate

VOCAB, LENGTH, NEW = 96, 50, 16
MOBA, OTHER, FULL = Moba(8, 2), Moba(4, 3), Full()
HYBRID, DENSE = (MOBA, FULL, OTHER), (FULL, FULL, FULL)
GREEDY = Sampling(temperature=0)


@pytest.fixture
def model():
    """A random model whose attention matters to what it says, with MoBA in two of three layers."""
    model = Decoder(ModelConfig(hidden_size=48, num_layers=3, num_heads=4, num_kv_heads=2, ffn_size=80), VOCAB).double()
    model.init_weights(0)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.mul_(15 if parameter.ndim > 1 else 1)
    model.set_attention(HYBRID)
    return model


def make_prompt(length=LENGTH, seed=0):
    return torch.randint(0, VOCAB, (length,), generator=torch.Generator().manual_seed(seed)).tolist()


@torch.no_grad()
def whole(model, ids):
    """Scores [T, V] of one forward pass without a cache."""
    return model.logits(torch.tensor(ids), torch.arange(len(ids)), Documents.from_lengths([len(ids)]))


def test_room_for_a_long_prompt_is_made_once(model, monkeypatch):
    """Catches a cache of up to twice the text's length, which is copied each time it doubles."""
    caches, make = [], train.model.generation.KVCache
    monkeypatch.setattr(
        train.model.generation, "KVCache", lambda *given, **more: caches.append(make(*given, **more)) or caches[-1]
    )
    list(generate(model, make_prompt(300), max_new_tokens=5, chunk_tokens=100))
    assert [layer.sequences[0].storage.capacity for layer in caches[0].layers] == [305] * 3


@pytest.mark.parametrize("chunk_tokens", [7, 1000])
@pytest.mark.parametrize("plan", [HYBRID, DENSE])
def test_greedy_text_equals_teacher_forcing(model, plan, chunk_tokens):
    """Catches a cache, positions, chunks or a decoding step that differ from the forward pass over the whole text."""
    prompt = make_prompt()
    picked = list(
        generate(
            model, prompt, max_new_tokens=NEW, sampling=GREEDY, prefill=plan, decode=plan, chunk_tokens=chunk_tokens
        )
    )
    assert len(picked) == NEW and len(set(picked)) > 4
    model.set_attention(plan)
    assert whole(model, prompt + picked)[LENGTH - 1 : -1].argmax(-1).tolist() == picked
    model.set_attention(HYBRID if plan == DENSE else DENSE)
    assert whole(model, prompt + picked)[LENGTH - 1 : -1].argmax(-1).tolist() != picked


@pytest.mark.parametrize(
    "given_plans,prefill,decode",
    [({}, HYBRID, DENSE), ({"decode": HYBRID}, HYBRID, HYBRID), ({"prefill": DENSE, "decode": HYBRID}, DENSE, HYBRID)],
)
def test_prompt_and_new_tokens_have_their_own_attention(model, monkeypatch, given_plans, prefill, decode):
    """Catches attention that is mixed up, and a model that is left with another attention than it came with."""
    read, original = [], model.logits

    def logits(tokens, *arguments, **options):
        read.append((len(tokens), model.attention))
        return original(tokens, *arguments, **options)

    monkeypatch.setattr(model, "logits", logits)
    for _ in generate(model, make_prompt(), max_new_tokens=4, chunk_tokens=40, **given_plans):
        assert model.attention == HYBRID
    assert read == [(40, prefill), (10, prefill)] + [(1, decode)] * 3
    assert model.attention == HYBRID


def test_the_seed_decides(model):
    """Catches sampling that ignores the seed, or that depends on torch's global random state."""

    def sample(seed):
        return list(generate(model, make_prompt(), max_new_tokens=12, sampling=Sampling(temperature=3.0, seed=seed)))

    first = sample(1)
    torch.manual_seed(99)
    torch.rand(3)
    assert sample(1) == first != sample(2)


def test_ends_before_a_stop_token_and_never_draws_unused_rows(model):
    """Catches an end of text that is printed or ignored, and ids that the tokenizer does not have."""
    prompt = make_prompt()
    free = list(generate(model, prompt, max_new_tokens=NEW, sampling=GREEDY))
    stop = free[5]
    stopped = list(generate(model, prompt, max_new_tokens=NEW, sampling=GREEDY, stop={stop}))
    assert stopped == free[: free.index(stop)]
    size = max(free)
    assert max(generate(model, prompt, max_new_tokens=NEW, sampling=GREEDY, vocab_size=size)) < size


@pytest.mark.parametrize(
    "sampling,expected",
    [
        (Sampling(), [0.05, 0.4, 0.15, 0.3, 0.1]),
        (Sampling(temperature=0.5), [0.0025, 0.16, 0.0225, 0.09, 0.01]),
        (Sampling(top_k=2), [0, 0.4, 0, 0.3, 0]),
        (Sampling(top_p=0.69), [0, 0.4, 0, 0.3, 0]),
        (Sampling(top_p=0.71), [0, 0.4, 0.15, 0.3, 0]),
        (Sampling(top_p=1e-6), [0, 1, 0, 0, 0]),
        (Sampling(top_k=3, top_p=0.8), [0, 0.4, 0, 0.3, 0]),  # 0.7 of the 0.85 that top_k leaves
        (Sampling(top_k=50), [0.05, 0.4, 0.15, 0.3, 0.1]),
        (Sampling(temperature=1e-320), [0, 1, 0, 0, 0]),
    ],
)
def test_draws_follow_the_options(sampling, expected):
    """Catches options that cut one token too many or too few, or in another order."""
    scores = torch.tensor([0.05, 0.4, 0.15, 0.3, 0.1]).log() + 7
    generator = torch.Generator().manual_seed(0)
    counts = collections.Counter(draw(scores, sampling, generator) for _ in range(3000))
    for token, weight in enumerate(expected):
        share = weight / sum(expected)
        assert counts[token] / 3000 == pytest.approx(share, abs=0.03)
        assert (counts[token] == 0) == (share == 0)


@pytest.mark.parametrize("name", ["bytes", "bpe-4k"])
@settings(deadline=None, max_examples=25)
@given(text=st.text(st.characters(codec="utf-8"), max_size=40), cut=st.integers(0, 20))
def test_streamed_text_equals_the_whole(name, text, cut):
    """Catches characters of several tokens that are printed in halves, and spaces lost between pieces."""
    tokenizer = load_tokenizer(name)
    ids = tokenizer.encode("A first part. ").tolist() + tokenizer.encode(text).tolist()
    before, new = ids[: len(ids) - cut], ids[len(ids) - cut :] if cut <= len(ids) else ids
    if tokenizer.decode(before).endswith("\ufffd"):
        return  # the prompt ends within a character
    stream = TextStream(tokenizer, before)
    pieces = [stream.add(token) for token in new] + [stream.rest()]
    assert tokenizer.decode(before) + "".join(pieces) == tokenizer.decode(before + new)
    if "\ufffd" not in text:
        assert not any("\ufffd" in piece for piece in pieces)


def test_characters_wait_for_their_last_byte():
    """Catches text that only comes out at the end."""
    stream = TextStream(load_tokenizer("bytes"))
    assert [stream.add(byte) for byte in "a\u00e9b".encode()] == ["a", "", "\u00e9", "b"]


@pytest.mark.parametrize(
    "arguments,message",
    [
        ({"temperature": -1.0}, "temperature=-1"),
        ({"top_k": -1}, "top_k=-1"),
        ({"top_p": 0.0}, "top_p=0"),
        ({"seed": -1}, "seed=-1"),
        ({"seed": 2**63}, "seed=9223"),
    ],
)
def test_senseless_sampling_is_refused(arguments, message):
    """Catches options out of range that would fail inside torch, or do something else."""
    with pytest.raises(ValueError, match=message):
        Sampling(**arguments)


def test_an_empty_prompt_is_refused(model):
    """Catches a crash deep in the cache."""
    with pytest.raises(ValueError, match="the prompt is empty"):
        next(generate(model, [], max_new_tokens=3))
