"""moba.transformers: MoBA inside Hugging Face models, against our decoder, against the same model fed differently, and
against transformers' own attention where MoBA is dense."""

import json

import pytest
import torch
from transformers import (
    AutoModelForCausalLM,
    DynamicCache,
    LlamaConfig,
    LlamaForCausalLM,
    MistralConfig,
    MistralForCausalLM,
    Qwen2Config,
    Qwen2ForCausalLM,
    Qwen3Config,
    Qwen3ForCausalLM,
)

from conf.schema import ModelConfig
from moba.documents import Documents
from moba.kinds import Sliding, from_entry
from moba.transformers import TokenLayout, configure, token_layout
from train.model.decoder import Decoder

VOCAB, LAYERS, LENGTH = 97, 3, 75
SPARSE = {"block_size": 8, "top_k": 2}
HYBRID = [("moba", 8, 2), ("full", None, None), ("moba", 4, 3)]
FAMILIES = {
    "llama": (LlamaConfig, LlamaForCausalLM, {}),
    "qwen2": (Qwen2Config, Qwen2ForCausalLM, {}),
    "qwen3": (Qwen3Config, Qwen3ForCausalLM, {"head_dim": 16}),
    "mistral": (MistralConfig, MistralForCausalLM, {"sliding_window": None}),
}
CLOSE = {"rtol": 1e-9, "atol": 1e-9}  # in float64: far below what one other block changes
CHANGED = 1e-3


@pytest.fixture(autouse=True)
def without_gradients():
    with torch.no_grad():
        yield


def hf_model(family="llama", attention="moba", **changes):
    """A random float64 model with grouped queries, with weights large enough for attention to matter."""
    config_class, model_class, own = FAMILIES[family]
    settings = {
        "vocab_size": VOCAB,
        "hidden_size": 32,
        "intermediate_size": 48,
        "num_hidden_layers": LAYERS,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "max_position_embeddings": 256,
        "initializer_range": 0.3,
        "tie_word_embeddings": False,
        "pad_token_id": 0,
        "bos_token_id": 1,
        "eos_token_id": None,
        "attn_implementation": attention,
    }
    torch.manual_seed(0)
    return model_class(config_class(**{**settings, **own, **changes})).double().eval()


def moba_model(family="llama", plan=None, decode="full", **changes):
    model = hf_model(family, **changes)
    configure(model, plan=plan, decode=decode, **({} if plan else SPARSE))
    return model


def tokens(length=LENGTH, rows=1, seed=1):
    return torch.randint(2, VOCAB, (rows, length), generator=torch.Generator().manual_seed(seed))


def difference(a, b):
    return (a - b).abs().max().item()


def padded_batch(lengths, side):
    """(ids, mask, position_ids) of rows of these lengths, padded on that side."""
    longest = max(lengths)
    ids, mask, positions = (torch.zeros(len(lengths), longest, dtype=torch.int64) for _ in range(3))
    for row, length in enumerate(lengths):
        real = slice(longest - length, None) if side == "left" else slice(0, length)
        ids[row, real] = tokens(length, seed=10 + row)[0]
        mask[row, real] = 1
        positions[row, real] = torch.arange(length)
    return ids, mask, positions


# -------------------- the same numbers as elsewhere


@pytest.mark.parametrize("family", FAMILIES)
def test_dense_moba_equals_sdpa(family):
    """Catches a wrong scale, grouping, order of heads or mask in any family; sparse MoBA differs, so it is in use."""
    model, ids = hf_model(family, "sdpa"), tokens(rows=2)
    expected = model(ids).logits
    configure(model, block_size=8, top_k=-(-LENGTH // 8))
    torch.testing.assert_close(model(ids).logits, expected, **CLOSE)
    configure(model, **SPARSE)
    sparse = model(ids).logits
    torch.testing.assert_close(sparse[:, :16], expected[:, :16], **CLOSE)  # block_size * top_k tokens: dense
    assert difference(sparse[:, 16:], expected[:, 16:]) > CHANGED


@pytest.mark.parametrize("family,changes", [("llama", {}), ("qwen2", {"qkv_bias": True}), ("qwen3", {"qk_norm": True})])
@pytest.mark.parametrize("plan", [[("moba", 8, 2)] * LAYERS, [("moba", 8, 3, 1)] * LAYERS, HYBRID])
def test_equals_our_decoder(family, changes, plan):
    """Catches routing that differs from training's, and a plan whose entries reach the wrong layers."""
    theirs, ids = moba_model(family, plan=plan, head_dim=16), tokens()
    config = ModelConfig(
        hidden_size=32, num_layers=LAYERS, num_heads=4, num_kv_heads=2, head_dim=16, ffn_size=48, tie_embeddings=False,
        rope_theta=theirs.config.rope_parameters["rope_theta"], norm_eps=theirs.config.rms_norm_eps, **changes,
    )  # fmt: skip
    ours = Decoder(config, VOCAB)
    ours.load_state_dict(theirs.state_dict())
    theirs.float(), ours.float()
    documents = Documents.from_lengths([LENGTH])

    def our_logits(plan):
        ours.set_attention([from_entry(entry) for entry in plan])
        return ours.logits(ids[0], torch.arange(LENGTH), documents)

    logits = theirs(ids).logits[0]
    torch.testing.assert_close(logits, our_logits(plan), rtol=1e-4, atol=1e-4)
    assert difference(logits, our_logits([("full", None, None)] * LAYERS)) > 1e-2
    if plan is HYBRID:
        assert difference(logits, our_logits(plan[::-1])) > 1e-2
    if len(plan[0]) == 4:
        assert difference(logits, our_logits([entry[:3] for entry in plan])) > 1e-4


@pytest.mark.parametrize("dense", [True, False])
def test_gradients_of_a_padded_batch_equal_those_of_its_rows(dense):
    """Catches a backward pass that loses something on the way through packing and unpacking (dense: against
    transformers' own attention), or padding that leaks into it."""
    ids, mask, positions = padded_batch([LENGTH, 50], "left")
    batches = {"padded": [(ids, mask, positions)], "alone": [(ids[:1], None, None), (ids[1:, -50:], None, None)]}
    grads = []
    for which, parts in batches.items():
        model = hf_model(attention="sdpa")
        if which == "padded" or not dense:
            configure(model, block_size=8, top_k=100 if dense else 2)
        with torch.enable_grad():
            for part_ids, part_mask, part_positions in parts:
                logits = model(part_ids, attention_mask=part_mask, position_ids=part_positions).logits
                real = torch.ones_like(part_ids) if part_mask is None else part_mask
                (logits.logsumexp(-1) * real).sum().backward()
        grads.append({name: parameter.grad for name, parameter in model.named_parameters()})
    for name, grad in grads[0].items():
        assert grad.abs().max() > 0, name
        torch.testing.assert_close(grad, grads[1][name], **CLOSE)


# -------------------- padding and packing


@pytest.mark.parametrize("side", ["left", "right"])
@pytest.mark.parametrize("family", ["llama", "mistral"])
def test_a_padded_row_equals_the_unpadded_one(family, side):
    """Catches a lost mask, and blocks that start at the padding (no length here is a multiple of the block size)."""
    model, lengths = moba_model(family, plan=HYBRID), [LENGTH, 41, 62]
    ids, mask, positions = padded_batch(lengths, side)
    logits = model(ids, attention_mask=mask, position_ids=positions).logits
    for row in range(len(lengths)):
        alone = model(ids[row][mask[row].bool()][None]).logits[0]
        torch.testing.assert_close(logits[row][mask[row].bool()], alone, **CLOSE)
    if side == "left":
        assert difference(model(ids).logits[1, -1], logits[1, -1]) > CHANGED


@pytest.mark.parametrize("side", ["left", "right"])
def test_padding_gets_zeros(side):
    """Catches attention output at padding, which would feed garbage (or NaN) into the layers behind."""
    model = moba_model()
    ids, mask, positions = padded_batch([LENGTH, 30], side)
    outputs = []
    module = model.model.layers[0].self_attn.o_proj
    module.register_forward_pre_hook(lambda _, args: outputs.append(args[0]))
    model(ids, attention_mask=mask, position_ids=positions)
    assert (outputs[0][mask == 0] == 0).all() and (mask == 0).any()
    assert (outputs[0][mask == 1].abs().sum(-1) > 0).all()


@pytest.mark.parametrize("how", ["position_ids", "cu_seq_lens"])
def test_packed_documents_do_not_see_each_other(how):
    """Catches packing that is ignored: by position_ids as transformers finds it, by flash attention's arguments."""
    model, lengths = moba_model(), [37, 24, 14]
    ids = tokens()
    positions = torch.cat([torch.arange(n) for n in lengths])[None]
    cu_seqlens = torch.tensor([0, 37, 61, 75], dtype=torch.int32)
    given = {"cu_seq_lens_q": cu_seqlens, "cu_seq_lens_k": cu_seqlens} if how == "cu_seq_lens" else {}
    logits = model(ids, position_ids=positions, use_cache=False, **given).logits[0]
    alone = torch.cat([model(part).logits[0] for part in ids.split(lengths, dim=1)])
    torch.testing.assert_close(logits, alone, **CLOSE)
    assert difference(logits, model(ids, use_cache=False).logits[0]) > CHANGED


def test_packed_rows_of_a_batch():
    """Catches documents that are joined across rows, or cut where another row has a start."""
    model, ids = moba_model(), tokens(rows=2)
    lengths = [[40, 35], [75]]
    positions = torch.stack([torch.cat([torch.arange(n) for n in row]) for row in lengths])
    logits = model(ids, position_ids=positions, use_cache=False).logits
    for row in range(2):
        alone = torch.cat([model(part[None]).logits[0] for part in ids[row].split(lengths[row])])
        torch.testing.assert_close(logits[row], alone, **CLOSE)


# -------------------- caches and generation


def in_chunks(model, ids, sizes, mask=None, positions=None):
    """Logits of ids read in chunks of these sizes into one DynamicCache."""
    cache, logits, start = DynamicCache(config=model.config), [], 0
    for size in sizes:
        stop = start + size
        given = {} if mask is None else {"attention_mask": mask[:, :stop], "position_ids": positions[:, start:stop]}
        logits.append(model(ids[:, start:stop], past_key_values=cache, **given).logits)
        start = stop
    assert start == ids.shape[1]
    return torch.cat(logits, dim=1)


@pytest.mark.parametrize("decode", ["moba", "full"])
def test_chunked_prefill_equals_one_shot(decode):
    """Catches a later chunk that becomes dense, or whose blocks are counted from the chunk."""
    model, ids = moba_model(plan=HYBRID, decode=decode), tokens(rows=2)
    expected = model(ids).logits
    torch.testing.assert_close(in_chunks(model, ids, [30, 2, 21, 22]), expected, **CLOSE)
    dense = hf_model(attention="sdpa")
    assert difference(in_chunks(dense, ids, [30, 45])[:, 30:], expected[:, 30:]) > CHANGED


def test_chunked_prefill_of_a_left_padded_batch():
    """Catches rows of which a chunk holds nothing (the first one here is all padding for row 1) or only a part."""
    model = moba_model()
    ids, mask, positions = padded_batch([LENGTH, 33], "left")
    logits = in_chunks(model, ids, [35, 20, 20], mask, positions)
    for row, length in enumerate([LENGTH, 33]):
        torch.testing.assert_close(logits[row, -length:], model(ids[row : row + 1, -length:]).logits[0], **CLOSE)


@pytest.mark.parametrize("family", ["llama", "qwen3"])
def test_moba_decoding_equals_the_forward_pass(family):
    """Catches decoding that picks other blocks than the forward pass: any other block changes the logits."""
    model, ids = moba_model(family, plan=HYBRID, decode="moba"), tokens()
    expected = model(ids).logits
    torch.testing.assert_close(in_chunks(model, ids, [20] + [1] * (LENGTH - 20)), expected, **CLOSE)
    model.config.moba["decode"] = "full"
    assert difference(in_chunks(model, ids, [LENGTH - 1, 1])[:, -1], expected[:, -1]) > CHANGED


def test_full_decoding_sees_everything():
    """Catches full decoding that is sparse: over a cache that full attention filled, it is full attention."""
    ids = tokens()
    dense = hf_model(attention="sdpa")
    cache = dense(ids[:, :-1], use_cache=True).past_key_values
    expected = dense(ids).logits[:, -1]
    model = moba_model(decode="full")
    torch.testing.assert_close(model(ids[:, -1:], past_key_values=cache).logits[:, -1], expected, **CLOSE)
    cache.crop(-1)
    model.config.moba["decode"] = "moba"
    assert difference(model(ids[:, -1:], past_key_values=cache).logits[:, -1], expected) > CHANGED


@pytest.mark.parametrize("side", ["left", "right"])
def test_generate_equals_teacher_forcing(side):
    """Catches generation that loses the cache, positions or padding: with MoBA decoding, every token that generate()
    picks for a padded batch is the argmax of one forward pass over that row alone."""
    model, new = moba_model(plan=HYBRID, decode="moba"), 14
    if side == "left":
        ids, mask, _ = padded_batch([46, 29], "left")
    else:
        ids, mask = tokens(46), torch.ones(1, 46, dtype=torch.int64)
    picked = model.generate(ids, attention_mask=mask, max_new_tokens=new, do_sample=False)[:, ids.shape[1] :]
    assert picked.shape[1] == new
    for row in range(len(ids)):
        text = torch.cat([ids[row][mask[row].bool()], picked[row]])
        assert torch.equal(model(text[None]).logits[0, -new - 1 : -1].argmax(-1), picked[row])
    assert len(picked.unique()) > 3
    chunked = model.generate(ids, attention_mask=mask, max_new_tokens=new, do_sample=False, prefill_chunk_size=20)
    assert torch.equal(chunked[:, ids.shape[1] :], picked)


def test_generation_decodes_with_full_attention_by_default():
    """Catches a default that is not the paper's: the prompt by MoBA, then steps that are dense over MoBA's cache."""
    model, ids = moba_model(), tokens(60)
    picked = model.generate(ids, max_new_tokens=10, do_sample=False)
    cache = DynamicCache(config=model.config)
    logits = model(ids, past_key_values=cache).logits[:, -1]
    configure(model, block_size=8, top_k=100, decode="moba")  # dense by another way
    for token in picked[0, 60:]:
        assert logits.argmax() == token
        logits = model(token[None, None], past_key_values=cache).logits[:, -1]
    configure(model, **SPARSE, decode="moba")
    assert not torch.equal(model.generate(ids, max_new_tokens=10, do_sample=False), picked)


# -------------------- settings


def test_configuration_survives_saving(tmp_path):
    """Catches a plan that does not come back from config.json."""
    model, ids = moba_model(plan=HYBRID, decode="moba"), tokens()
    model.save_pretrained(tmp_path)
    written = json.loads((tmp_path / "config.json").read_text())["moba"]
    assert written == {"plan": [["moba", 8, 2], ["full", None, None], ["moba", 4, 3]], "decode": "moba"}
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path, attn_implementation="moba", dtype=torch.float64)
    torch.testing.assert_close(loaded(ids).logits, model(ids).logits, **CLOSE)


def test_a_plan_alone_is_enough_in_a_config():
    """Catches a reader that needs more than what an exported config.json holds."""
    model, ids = hf_model(moba={"plan": [list(entry) for entry in HYBRID]}), tokens()
    torch.testing.assert_close(model(ids).logits, moba_model(plan=HYBRID)(ids).logits, **CLOSE)


def test_the_last_layers_stay_full():
    """Catches full_last counted from the wrong end."""
    model = hf_model()
    configure(model, **SPARSE, full_last=1)
    assert model.config.moba["plan"] == [["moba", 8, 2], ["moba", 8, 2], ["full", None, None]]


@pytest.mark.parametrize(
    "arguments,message",
    [
        ({}, "give block_size and top_k, or plan"),
        ({"block_size": 8}, "top_k=None"),
        ({"block_size": 8, "top_k": 0}, "top_k=0"),
        ({"plan": HYBRID[:2]}, "a MoBA plan of 2 layers for a model of 3"),
        ({"plan": [("moba", 8)] * LAYERS}, r"plan\[0\]"),
        ({"plan": [("mobo", 8, 2)] * LAYERS}, "kind='mobo'"),
        (
            {"plan": [Sliding(window=8)] * LAYERS},
            "sliding 8: transformers has no such attention here; say full or moba",
        ),
        ({"plan": HYBRID, "full_last": 1}, "full_last=1 with plan"),
        ({"plan": HYBRID, "first_blocks": 1}, "first_blocks=1 with plan"),
        ({**SPARSE, "first_blocks": 2}, "first_blocks=2: must be less than top_k=2"),
        ({"plan": [("full", None, None, 1)] * LAYERS}, r"plan\[0\]"),
        ({**SPARSE, "full_last": 4}, "full_last=4: the model has 3 layers"),
        ({**SPARSE, "decode": "dense"}, "decode='dense'"),
    ],
)
def test_wrong_settings_are_refused(arguments, message):
    """Catches a typo that is taken for something else; the model must keep what it had."""
    model = hf_model(attention="sdpa")
    with pytest.raises(ValueError, match=message):
        configure(model, **arguments)
    assert not hasattr(model.config, "moba") and model.config._attn_implementation == "sdpa"


def test_a_model_without_plan_says_what_to_do():
    """Catches a model that quietly runs some default, and a misspelt setting that is quietly ignored."""
    with pytest.raises(ValueError, match=r"config\.moba=None has no plan: call moba\.transformers\.configure"):
        hf_model()(tokens())
    with pytest.raises(ValueError, match=r"config\.moba has decoding"):
        hf_model(moba={"plan": HYBRID, "decoding": "moba"})(tokens())


# -------------------- refusals


@pytest.mark.parametrize(
    "given,message",
    [
        ({"output_attentions": True}, "output_attentions=True"),
        ({"softcap": 50.0}, "softcap: the model caps its scores"),
        ({"s_aux": torch.zeros(4)}, "s_aux: the model has attention sinks"),
        ({"is_causal": False}, "is_causal=False"),
        ({"attention_mask": torch.ones(1, 1, LENGTH, LENGTH)}, "an attention_mask of shape"),
        ({"attention_mask": torch.ones(1, LENGTH - 1)}, "attn_implementation='moba' needs"),
        ({"cu_seq_lens_q": torch.tensor([0, LENGTH])}, "needs both"),
        ({"position_ids": torch.arange(LENGTH)[None] % 40}, "position_ids start anew"),
    ],
)
def test_what_would_be_ignored_is_refused(given, message):
    """Catches arguments that attention takes and does nothing with."""
    model = moba_model()
    with pytest.raises(ValueError, match=message):
        model(tokens(), **given)
    model(tokens())


def test_dropout_is_refused_in_training_alone():
    """Catches dropout that is silently left out, and a refusal that would keep such models from being evaluated."""
    model = moba_model(attention_dropout=0.1)
    model(tokens())
    with pytest.raises(ValueError, match=r"dropout=0\.1"):
        model.train()(tokens())


@pytest.mark.parametrize("family", ["mistral", "qwen2"])
def test_sliding_windows_are_refused_where_they_hide_something(family):
    """Catches a window that is ignored, in the prompt or once decoding passes it; a longer one changes nothing."""
    window = {"sliding_window": 40}
    if family == "qwen2":
        window |= {"use_sliding_window": True, "layer_types": ["full_attention", "sliding_attention", "full_attention"]}
    model, ids = moba_model(family, **window), tokens()
    with pytest.raises(ValueError, match="sliding"):
        model(ids, use_cache=False)
    plain = moba_model(family)
    plain.load_state_dict(model.state_dict())
    torch.testing.assert_close(model(ids[:, :39]).logits, plain(ids[:, :39]).logits, **CLOSE)
    with pytest.raises(ValueError, match="sliding"):
        model.generate(ids[:, :36], max_new_tokens=10, do_sample=False)


def test_static_caches_are_refused():
    """Catches attention over the empty part of a preallocated cache."""
    model = moba_model()
    with pytest.raises(ValueError, match="static"):
        model.generate(tokens(), max_new_tokens=4, cache_implementation="static", disable_compile=True)


def test_custom_masks_are_refused():
    """Catches a mask pattern that is dropped because it is not among the known ones."""
    with pytest.raises(ValueError, match="custom mask pattern"):
        token_layout(1, 8, 8, use_vmap=True)
    assert token_layout(1, 8, 8) is None
    layout = token_layout(2, 4, 4, attention_mask=torch.tensor([[0, 0, 1, 1], [1, 1, 1, 1]], dtype=torch.bool))
    assert isinstance(layout, TokenLayout) and layout.documents.cu_seqlens.tolist() == [0, 2, 6]


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
def test_cuda_equals_cpu():
    """Catches indices or bounds on the wrong device, with padding, chunks and decoding."""
    model = moba_model(plan=HYBRID, decode="moba").float()
    ids, mask, positions = padded_batch([LENGTH, 33], "left")
    expected = in_chunks(model, ids, [40, 34, 1], mask, positions)
    logits = in_chunks(model.cuda(), ids.cuda(), [40, 34, 1], mask.cuda(), positions.cuda()).cpu()
    torch.testing.assert_close(logits[mask == 1], expected[mask == 1], rtol=1e-3, atol=1e-3)
