"""A whole model of FlashMoBA's layout, sliding layers with RoPE and MoBA layers with NoPE and key convolution: its
decoding, packing, compilation and size, and the plan's words."""

import functools

import pytest
import torch
from test_model import VOCAB, losses_and_gradients, make_model, make_pack

import train.model.decoder
from moba.documents import Documents
from moba.kinds import Full, Moba, Sliding
from moba.layer import KVCache
from train.model.generation import Sampling, generate
from train.model.sizes import num_parameters
from train.plan.describe import describe_layers, describe_model

SLIDING, MOBA, FULL = Sliding(window=9), Moba(block_size=8, top_k=2), Full()
LAYOUT = {"num_layers": 4, "rope_pattern": "RN", "key_conv": 3, "key_conv_pattern": "-k"}


def patterned(plan=(SLIDING, MOBA) * 2, **changes):
    """Random weights, those of the convolutions included."""
    model = make_model(**{**LAYOUT, **changes})
    model.set_attention(plan)
    return model


@pytest.mark.parametrize("plan", [(SLIDING, MOBA) * 2, (SLIDING, FULL) * 2], ids=["SM", "SF"])
@torch.no_grad()
def test_token_by_token_equals_one_pass(plan):
    """Catches any state of decoding that is missing or stale: positions, windows, blocks, the convolution's tail."""
    model, (tokens, positions, documents, _) = patterned(plan), make_pack([45])
    expected = model.logits(tokens, positions, documents)
    for sizes in ([1] * 45, [20, 13, *[1] * 12]):
        cache, chunks = KVCache(4), []
        for token, position in zip(tokens.split(sizes), positions.split(sizes)):
            chunks.append(model.logits(token, position, Documents.from_lengths([len(token)]), cache))
        torch.testing.assert_close(torch.cat(chunks), expected, rtol=1e-4, atol=1e-5)
    for other in ({"rope_pattern": None}, {"key_conv": 0}, {"key_conv_pattern": None}):
        changed = patterned(plan, **other)
        changed.load_state_dict(model.state_dict(), strict=False)
        assert not torch.allclose(changed.logits(tokens, positions, documents), expected, atol=1e-3), other


@torch.no_grad()
def test_packed_documents_equal_each_alone():
    """Catches keys or windows that reach over a document's start, documents shorter than the convolution included."""
    model, (tokens, positions, documents, labels) = patterned(), make_pack([37, 1, 0, 2, 30])
    packed, alone = model(tokens, positions, documents, labels), []
    for start, end in zip(documents.cu_seqlens.tolist(), documents.cu_seqlens.tolist()[1:]):
        if end > start:
            one = Documents.from_lengths([end - start])
            alone.append(model(tokens[start:end], positions[start:end], one, labels[start:end]))
    torch.testing.assert_close(packed, torch.cat(alone), rtol=1e-5, atol=1e-5)


def test_a_switch_of_the_global_layers_touches_nothing_else():
    """Catches a stage's switch from SM to SF that takes the convolution or NoPE with it, or opens the windows."""
    model, pack = patterned((SLIDING, MOBA) * 2), make_pack([64])
    before = {name: value.clone() for name, value in model.state_dict().items()}
    with torch.no_grad():
        sparse = model(*pack)
        model.set_attention((SLIDING, FULL) * 2)
        dense, fresh = model(*pack), patterned((SLIDING, FULL) * 2)(*pack)
    assert torch.equal(dense, fresh) and not torch.allclose(dense, sparse, atol=1e-3)
    assert model.state_dict().keys() == before.keys()
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())
    assert [name for name in before if "k_conv" in name] == [
        f"model.layers.{i}.self_attn.k_conv.weight" for i in (1, 3)
    ]


def test_compiled_equals_eager_and_documents_compile_nothing(monkeypatch):
    """Catches a convolution that breaks the graph or is compiled for each number of documents, and recomputation of
    it that gives other bits."""
    from torch._dynamo.utils import counters

    compile_once = functools.cache(lambda function: torch.compile(function, backend="aot_eager"))
    monkeypatch.setattr(train.model.decoder, "_compiled", compile_once)
    torch._dynamo.reset()
    counters.clear()
    models = [patterned((SLIDING, MOBA), num_layers=2, compile=c) for c in (False, True)]
    for lengths in ([40, 24], [10, 0, 2, 20, 32]):
        eager, compiled = (losses_and_gradients(model, make_pack(lengths)) for model in models)
        for a, b in zip(eager, compiled):
            torch.testing.assert_close(b, a, rtol=1e-4, atol=1e-5)
        assert counters["stats"]["unique_graphs"] == 3  # two kinds of layers before attention, one after it
    assert not counters["graph_break"]
    torch._dynamo.reset()
    models[0].model.activation_checkpointing = True
    again = losses_and_gradients(models[0], make_pack([10, 0, 2, 20, 32]))
    assert all(torch.equal(a, b) for a, b in zip(eager, again))


def test_counts_and_words():
    """Catches convolutions left out of the size that the plan prints, and options it is silent about."""
    model = patterned()
    assert num_parameters(model.config, VOCAB)["total"] == sum(p.numel() for p in model.parameters())
    plain = num_parameters(make_model(num_layers=4).config, VOCAB)
    assert num_parameters(model.config, VOCAB)["non_embedding"] - plain["non_embedding"] == 2 * 3 * 2 * 16
    model.init_weights(0)
    assert not model.model.layers[1].self_attn.k_conv.weight.any()
    words = describe_model(type("Run", (), {"model": model.config}))
    assert "no RoPE in layers 1, 3" in words and "key convolution over 3 tokens in layers 1, 3" in words
    assert describe_layers(model.attention) == "sliding 9 (layers 0, 2), moba 8x2 (layers 1, 3)"


def test_dense_decoding_keeps_the_windows():
    """Catches generation that opens the windows of a model trained with them: by default new tokens see everything
    where a layer is MoBA, and only there."""
    model, prompt = patterned(), make_pack([30])[0].tolist()
    drawn = {"max_new_tokens": 20, "sampling": Sampling(temperature=1, seed=0)}
    default = list(generate(model, prompt, **drawn))
    assert default == list(generate(model, prompt, **drawn, decode=(SLIDING, FULL) * 2))
    assert default != list(generate(model, prompt, **drawn, decode=(FULL,) * 4))
