"""moba.transformers: MoBA inside Hugging Face models, against our decoder, against the same model fed differently, and
against transformers' own attention where MoBA is dense."""

import copy
import dataclasses
import json

import pytest
import torch
from transformers import (
    CONFIG_MAPPING,
    AutoModel,
    AutoModelForCausalLM,
    DeepseekV3Config,
    DynamicCache,
    Lfm2Config,
    LlamaConfig,
    LlamaForCausalLM,
    MambaConfig,
    MistralConfig,
    MistralForCausalLM,
    Qwen2Config,
    Qwen2ForCausalLM,
    Qwen2MoeConfig,
    Qwen3Config,
    Qwen3ForCausalLM,
    masking_utils,
)

from conf.schema import ModelConfig
from moba.documents import Documents
from moba.kinds import Sliding, from_entry
from moba.transformers import TokenLayout, configure, prompt, token_layout
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
    for sizes in ([30, 2, 21, 22], [1, 1, 72, 1]):
        with prompt(LENGTH):
            torch.testing.assert_close(in_chunks(model, ids, sizes), expected, **CLOSE)
    dense = hf_model(attention="sdpa")
    assert difference(in_chunks(dense, ids, [30, 45])[:, 30:], expected[:, 30:]) > CHANGED


def test_chunked_prefill_of_a_left_padded_batch():
    """Catches rows of which a chunk holds nothing (the first one here is all padding for row 1) or only a part."""
    model = moba_model()
    ids, mask, positions = padded_batch([LENGTH, 33], "left")
    with prompt(LENGTH):
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
        ({"is_causal": False}, "bidirectional attention"),
        ({"attention_mask": torch.ones(1, 1, LENGTH, LENGTH)}, "an attention_mask of shape"),
        ({"attention_mask": torch.ones(1, LENGTH - 1)}, "attn_implementation='moba' needs"),
        ({"attention_mask": torch.arange(LENGTH)[None] // 40 + 1}, "attention_mask has values such as 2"),
        ({"attention_mask": -1e9 * (torch.arange(LENGTH) < 5)[None]}, "attention_mask has values such as -1e"),
        ({"attention_mask": torch.zeros(1, LENGTH)}, "as if to be added to scores"),
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
    assert "custom mask pattern" in token_layout(1, 8, 8, use_vmap=True).problem
    assert "the mask pattern test_custom" in token_layout(1, 8, 8, mask_function=lambda *_: torch.tensor(True)).problem
    assert token_layout(1, 8, 8).problem is None
    causal, packed = masking_utils.causal_mask_function, masking_utils.packed_sequence_mask_function(POSITIONS)
    assert "without a causal part" in token_layout(2, 8, 8, mask_function=packed).problem
    assert "see later ones" in token_layout(2, 8, 8, mask_function=masking_utils.or_masks(causal, packed)).problem
    assert token_layout(2, 8, 8, mask_function=masking_utils.and_masks(causal, packed)).problem is None
    layout = token_layout(2, 4, 4, attention_mask=torch.tensor([[0, 0, 1, 1], [1, 1, 1, 1]], dtype=torch.bool))
    assert isinstance(layout, TokenLayout) and layout.documents.cu_seqlens.tolist() == [0, 2, 6]


ROWS, COLUMNS = 2, 24
IMAGE = torch.where((torch.arange(COLUMNS) // 4 == 2)[None].expand(ROWS, -1), 0, -1)
POSITIONS = torch.cat([torch.arange(9), torch.arange(COLUMNS - 9)])[None].expand(ROWS, -1)
REAL = torch.arange(COLUMNS)[None] >= torch.tensor([[0], [5]])
HOLE = (torch.arange(COLUMNS) != 10)[None].expand(ROWS, -1)


@pytest.mark.parametrize(
    "make,given,problem",
    [
        (masking_utils.create_causal_mask, {}, None),
        (masking_utils.create_causal_mask, {"attention_mask": REAL}, None),
        (masking_utils.create_causal_mask, {"position_ids": POSITIONS}, None),
        (masking_utils.create_causal_mask, {"attention_mask": REAL ^ (torch.arange(COLUMNS) == 11)}, None),
        (masking_utils.create_causal_mask, {"block_sequence_ids": IMAGE}, "block_sequence_ids"),
        (masking_utils.create_causal_mask, {"block_sequence_ids": IMAGE, "position_ids": POSITIONS}, "as for images"),
        (masking_utils.create_causal_mask, {"block_sequence_ids": -IMAGE.abs() - 1}, None),
        (masking_utils.create_causal_mask, {"or_mask_function": lambda b, h, q, k: k < 5}, "custom mask pattern"),
        (masking_utils.create_causal_mask, {"and_mask_function": lambda b, h, q, k: k != 3}, "custom mask pattern"),
        (masking_utils.create_bidirectional_mask, {}, "bidirectional"),
        (masking_utils.create_bidirectional_mask, {"attention_mask": REAL}, "bidirectional"),
        (masking_utils.create_bidirectional_sliding_window_mask, {"window": 30}, "bidirectional"),
        (masking_utils.create_sliding_window_causal_mask, {"window": COLUMNS}, None),
        (masking_utils.create_sliding_window_causal_mask, {"window": COLUMNS - 1}, "hides part of a text"),
        (masking_utils.create_sliding_window_causal_mask, {"window": 15, "position_ids": POSITIONS}, None),
        (masking_utils.create_sliding_window_causal_mask, {"window": 14, "position_ids": POSITIONS}, "hides part"),
        (masking_utils.create_sliding_window_causal_mask, {"window": 23, "attention_mask": REAL}, "hides part"),
        (masking_utils.create_chunked_causal_mask, {"chunk": COLUMNS}, None),
        (masking_utils.create_chunked_causal_mask, {"chunk": COLUMNS, "attention_mask": REAL}, None),
        (masking_utils.create_chunked_causal_mask, {"chunk": 10}, None),
        (masking_utils.create_chunked_causal_mask, {"chunk": 10, "attention_mask": REAL}, None),
        (masking_utils.create_chunked_causal_mask, {"chunk": 10, "attention_mask": HOLE}, None),
    ],
)  # fmt: skip
def test_masks_are_documents_or_say_why_not(make, given, problem):
    """Catches a pattern that is taken for causal documents and is not, against transformers' own mask of it: who sees
    whom among real tokens, everywhere, and that nothing but the expected is refused."""
    given = dict(given)
    config = LlamaConfig(hidden_size=8, num_attention_heads=1, num_hidden_layers=1, vocab_size=8)
    config.sliding_window, config.attention_chunk_size = given.pop("window", None), given.pop("chunk", None)
    made = {}
    for attention in ("eager", "moba"):
        config._attn_implementation = attention
        embeds, real = torch.zeros(ROWS, COLUMNS, 8), given.get("attention_mask")
        made[attention] = make(config, embeds, real, None, **{n: v for n, v in given.items() if n != "attention_mask"})
    layout = made["moba"]
    if problem is not None:
        assert problem in layout.problem
        return
    assert layout.problem is None
    seen = (made["eager"] == 0)[:, 0].expand(ROWS, -1, -1)
    index = torch.arange(ROWS * COLUMNS) if layout.query_index_T is None else layout.query_index_T
    document = torch.full((ROWS * COLUMNS,), -1)
    document[index] = torch.repeat_interleave(layout.documents.cu_seqlens.diff().long())
    document = document.view(ROWS, COLUMNS)
    ours = (document[:, :, None] == document[:, None, :]) & torch.ones(COLUMNS, COLUMNS, dtype=torch.bool).tril()
    real = document >= 0
    assert torch.equal(real, given.get("attention_mask", torch.ones_like(real)).bool())
    assert torch.equal(ours & real[:, :, None], seen & real[:, :, None])


def test_a_mask_that_the_model_reads_itself_is_refused():
    """Catches a model that adds, indexes or asks its mask, and gets None or an AttributeError that says nothing."""
    layout, scores = token_layout(1, 8, 8), torch.zeros(1, 1, 8, 8)
    for use in (
        lambda: scores + layout,
        lambda: layout + scores,
        lambda: torch.where(layout, 0.0, 1.0),
        lambda: torch.cat([scores, layout]),
        lambda: layout[:, :, :4],
        lambda: layout.dtype,
        lambda: layout.to("cpu"),
        lambda: bool(layout),
        lambda: ~layout,
    ):
        with pytest.raises(ValueError, match="models that use their attention mask outside of their attention"):
            use()
    assert not hasattr(layout, "to") and copy.deepcopy(layout).problem is None


SMALL = {
    "vocab_size": VOCAB, "hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4, "n_head": 4, "n_layer": 2,
    "d_model": 32, "num_layers": 2, "attention_heads": 4, "n_heads": 4, "n_layers": 2, "ffn_dim": 32, "n_embd": 32,
    "attention_types": [[["global", "local"], 1]], "num_heads": 4, "pad_token_id": 0, "is_decoder": True,
}  # fmt: skip


@pytest.mark.parametrize(
    "family", ["bloom", "xglm", "falcon", "mpt", "gpt_neo", "openai-gpt", "gpt_neox_japanese", "git"]
)
def test_models_with_an_attention_of_their_own_are_refused(family):
    """Catches attention without a causal mask, full attention under the name of MoBA, and errors that say nothing, both
    for models that are made with MoBA and for those that are switched to it, which keep what they had."""
    config_class = CONFIG_MAPPING[family]
    known = {field.name for field in dataclasses.fields(config_class)} | set(config_class.attribute_map)
    config = config_class(**{key: value for key, value in SMALL.items() if key in known})
    with pytest.raises(ValueError, match="'moba' does not support models with an attention of their own"):
        AutoModelForCausalLM.from_config(config, attn_implementation="moba")
    config._attn_implementation = "eager"
    model = AutoModelForCausalLM.from_config(config, attn_implementation="eager")
    with pytest.raises(ValueError, match="'moba' does not support models with an attention of their own"):
        configure(model, **SPARSE)
    assert model.config._attn_implementation == "eager" and not hasattr(model.config, "moba")
    model(tokens(9))


@pytest.mark.parametrize("family", ["bert", "roberta", "t5"])
def test_encoders_are_refused(family):
    """Catches an encoder that becomes causal."""
    config_class = CONFIG_MAPPING[family]
    known = {field.name for field in dataclasses.fields(config_class)}
    config = config_class(**{key: value for key, value in SMALL.items() if key in known - {"is_decoder"}})
    model = AutoModel.from_config(config, attn_implementation="eager")
    with pytest.raises(ValueError, match=r"does not support (bidirectional attention|such models)"):
        configure(model, **SPARSE)
        model(tokens(9))


def test_a_model_that_keeps_its_attention_is_refused():
    """Catches a switch that reaches the outer model alone: one inside has a config of its own."""
    model = hf_model(attention="sdpa")
    model.model.config = copy.deepcopy(model.config)
    model._can_set_attn_implementation = lambda: True
    model.model._can_set_attn_implementation = lambda: False
    with pytest.raises(ValueError, match="LlamaModel in LlamaForCausalLM stays at attn_implementation='sdpa'"):
        configure(model, **SPARSE)
    assert model.config._attn_implementation == "sdpa" and not hasattr(model.config, "moba")


def test_a_model_without_attention_is_refused():
    """Catches a model that says it runs MoBA and has no layer that could."""
    config = MambaConfig(vocab_size=VOCAB, hidden_size=16, num_hidden_layers=2, state_size=4)
    model = AutoModelForCausalLM.from_config(config, attn_implementation="moba")
    with pytest.raises(ValueError, match=r"MambaForCausalLM: .*no layer attends through transformers' attention"):
        model(tokens(9))


def test_packing_signs_are_seen_by_the_first_layer_that_attends():
    """Catches packed documents that are joined where layer 0 has no attention, and under a mask with padding."""
    config = Lfm2Config(
        vocab_size=VOCAB, hidden_size=32, intermediate_size=32, num_hidden_layers=2, num_attention_heads=4,
        num_key_value_heads=2, layer_types=["conv", "full_attention"], pad_token_id=0,
    )  # fmt: skip
    model, packed = AutoModelForCausalLM.from_config(config), torch.arange(20)[None] % 12
    configure(model, **SPARSE)
    with pytest.raises(ValueError, match="position_ids start anew"):
        model(tokens(20), position_ids=packed, attention_mask=torch.ones(1, 20, dtype=torch.int64))
    padding = (torch.arange(20) >= 3)[None].long()
    for one in (model, moba_model()):
        with pytest.raises(ValueError, match="position_ids start anew"):
            one(tokens(20), position_ids=packed, attention_mask=padding)
        one(tokens(20), attention_mask=padding)
        one(tokens(20), position_ids=(padding.cumsum(1) - 1).clamp(min=0), attention_mask=padding)


def test_a_mask_that_no_layer_uses_is_not_refused():
    """Catches a refusal of a window that hides something where no layer has one (Qwen2-MoE makes such a mask)."""
    config = Qwen2MoeConfig(
        vocab_size=VOCAB, hidden_size=32, num_hidden_layers=2, num_attention_heads=4, num_key_value_heads=2,
        moe_intermediate_size=16, shared_expert_intermediate_size=16, num_experts=4, num_experts_per_tok=2,
    )  # fmt: skip
    model = AutoModelForCausalLM.from_config(config, attn_implementation="sdpa").eval()
    expected = model(tokens()).logits
    configure(model, block_size=8, top_k=100)
    torch.testing.assert_close(model(tokens()).logits, expected, rtol=1e-4, atol=1e-5)


def test_values_may_be_narrower_than_keys():
    """Catches latent attention (DeepSeek) refused or cut wrongly: all blocks, forward and backward."""
    config = DeepseekV3Config(
        vocab_size=VOCAB, hidden_size=32, intermediate_size=32, num_hidden_layers=2, num_attention_heads=4,
        num_key_value_heads=4, q_lora_rank=16, kv_lora_rank=16, qk_nope_head_dim=8, qk_rope_head_dim=8, v_head_dim=12,
        first_k_dense_replace=2,
    )  # fmt: skip
    model = AutoModelForCausalLM.from_config(config, attn_implementation="eager").eval()
    results = []
    for moba in (False, True):
        if moba:
            configure(model, block_size=8, top_k=100)
        model.zero_grad()
        with torch.enable_grad():
            logits = model(tokens()).logits
            logits.logsumexp(-1).square().sum().backward()
        results.append([logits.detach(), *[p.grad.clone() for p in model.parameters()]])
    for found, expected in zip(*results):
        torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-4)
    configure(model, **SPARSE)
    assert difference(model(tokens()).logits, results[0][0]) > 1e-4


def test_what_is_prompt_has_to_be_said():
    """Catches several tokens over a cache that are taken for prompt or for decoded ones, and a wrong prompt()."""
    model, ids = moba_model(decode="full"), tokens()
    with pytest.raises(ValueError, match=r"2 new tokens over 73 in the cache may be .*prompt\(tokens\)"):
        in_chunks(model, ids, [73, 2])
    for wrong in (0, -1, True, 2.0, None):
        with pytest.raises(ValueError, match="needs the number of the prompt's tokens"), prompt(wrong):
            pass
    packed = torch.cat([torch.arange(40), torch.arange(35)])[None]
    with pytest.raises(ValueError, match="within packed documents"), prompt(50):
        model(ids, position_ids=packed, use_cache=False)
    model.config.moba["plan"] = [["full", None, None]] * LAYERS
    in_chunks(model, ids, [73, 2])


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
def test_cuda_equals_cpu():
    """Catches indices or bounds on the wrong device, with padding, chunks and decoding."""
    model = moba_model(plan=HYBRID, decode="moba").float()
    ids, mask, positions = padded_batch([LENGTH, 33], "left")
    expected = in_chunks(model, ids, [40, 34, 1], mask, positions)
    logits = in_chunks(model.cuda(), ids.cuda(), [40, 34, 1], mask.cuda(), positions.cuda()).cpu()
    torch.testing.assert_close(logits[mask == 1], expected[mask == 1], rtol=1e-3, atol=1e-3)


def test_a_plan_file_says_what_each_layer_has(tmp_path):
    """Catches a path that is taken for a list of letters, and a file of another model."""
    path = tmp_path / "plan.yaml"
    path.write_text("plan: [[moba, 8, 3, 1], [full, null, null], [moba, 4, 3]]")
    for given in (path, str(path)):
        model = hf_model(attention="sdpa")
        configure(model, plan=given)
        assert model.config.moba["plan"] == [["moba", 8, 3, 1], ["full", None, None], ["moba", 4, 3]]
    path.write_text("plan: [[moba, 8, 3, 1]]")
    with pytest.raises(ValueError, match=r"plan\.yaml: plan has 1 entries for a model of 3 layers"):
        configure(hf_model(attention="sdpa"), plan=path)
