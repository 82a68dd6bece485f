"""The attention module against transformers' modules on the same weights, and the switch between full and MoBA."""

import pytest
import torch
from transformers import LlamaConfig, Qwen2Config, Qwen3Config
from transformers.models.llama.modeling_llama import LlamaAttention, LlamaRMSNorm, LlamaRotaryEmbedding
from transformers.models.qwen2.modeling_qwen2 import Qwen2Attention
from transformers.models.qwen3.modeling_qwen3 import Qwen3Attention

from moba.documents import Documents
from moba.kinds import Full, Moba
from moba.layer import MoBAAttention, RMSNorm, apply_rope
from moba.reference import reference_attention, reference_selection
from moba.sequence import SequenceAxis

HIDDEN, HEADS, KV_HEADS, HEAD_DIM = 48, 6, 2, 16
SPARSE = Moba(block_size=8, top_k=2)


def make_layer(dtype=torch.float64, **options):
    torch.manual_seed(0)
    return MoBAAttention(HIDDEN, HEADS, KV_HEADS, HEAD_DIM, **options).to(dtype)


def rope_of(lengths, dtype=torch.float64):
    """cos, sin [T, D] for positions that restart with every document."""
    positions = torch.cat([torch.arange(n) for n in lengths])
    angles = positions[:, None] * 10000.0 ** (-torch.arange(0, HEAD_DIM, 2, dtype=torch.float64) / HEAD_DIM)
    angles = torch.cat([angles, angles], dim=-1)
    return angles.cos().to(dtype), angles.sin().to(dtype)


def cu_of(lengths):
    return torch.tensor([0, *lengths]).cumsum(0).to(torch.int32)


def make_tokens(num_tokens, seed=1):
    return torch.randn(num_tokens, HIDDEN, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


@pytest.mark.parametrize(
    ("config_class", "attention_class", "options"),
    [
        (LlamaConfig, LlamaAttention, {}),
        (Qwen2Config, Qwen2Attention, {"qkv_bias": True}),
        (Qwen3Config, Qwen3Attention, {"qk_norm": True}),
    ],
)
def test_full_attention_equals_transformers(config_class, attention_class, options):
    """Catches other parameter names, head order, RoPE convention, norm order or scale than pretrained weights
    expect."""
    config = config_class(
        hidden_size=HIDDEN,
        num_attention_heads=HEADS,
        num_key_value_heads=KV_HEADS,
        head_dim=HEAD_DIM,
        num_hidden_layers=1,
        attn_implementation="eager",
    )
    torch.manual_seed(0)
    theirs = attention_class(config, layer_idx=0)
    theirs.head_dim = HEAD_DIM
    with torch.no_grad():
        for parameter in theirs.parameters():
            parameter.copy_(torch.randn_like(parameter) * 0.3)
    ours = MoBAAttention(
        HIDDEN, HEADS, KV_HEADS, theirs.q_proj.out_features // HEADS, norm_eps=config.rms_norm_eps, **options
    )
    ours.load_state_dict(theirs.state_dict())  # strict: the names are the same

    num_tokens = 37
    x = make_tokens(num_tokens).float()
    cos, sin = LlamaRotaryEmbedding(config)(x[None], torch.arange(num_tokens)[None])
    mask = torch.full((num_tokens, num_tokens), float("-inf")).triu(1)[None, None]
    want = theirs(x[None], position_embeddings=(cos, sin), attention_mask=mask)[0][0]
    got = ours(x, cos[0], sin[0], Documents.from_lengths([len(x)]))
    torch.testing.assert_close(got, want, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_rms_norm_equals_transformers(dtype):
    """Catches a norm that rounds at another place than the models whose weights are imported."""
    ours, theirs = RMSNorm(64, 1e-6).to(dtype), LlamaRMSNorm(64, 1e-6).to(dtype)
    torch.manual_seed(0)
    with torch.no_grad():
        ours.weight.copy_(torch.randn(64))
        theirs.weight.copy_(ours.weight)
    x = (torch.randn(5, 3, 64) * 4).to(dtype)
    assert torch.equal(ours(x), theirs(x)) and ours(x).dtype == dtype


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
@pytest.mark.parametrize("shape", [(300, 768), (300, 12, 64)])
def test_fused_rms_norm_rounds_where_transformers_does(shape):
    """Catches a CUDA kernel that rounds at another place (a quarter of the elements would differ), or has no gradient
    without a weight."""
    ours, theirs = (norm(shape[-1], 1e-5).bfloat16().cuda() for norm in (RMSNorm, LlamaRMSNorm))
    torch.manual_seed(0)
    with torch.no_grad():
        ours.weight.copy_(torch.randn(shape[-1]))
        theirs.weight.copy_(ours.weight)
    x, upstream = ((torch.randn(shape) * 4).bfloat16().cuda() for _ in range(2))
    outs, grads = [], []
    for norm in (ours, theirs):
        x_norm = x.clone().requires_grad_()
        outs.append(norm(x_norm))
        outs[-1].backward(upstream)
        grads.append((x_norm.grad, norm.weight.grad))
    assert (outs[0] != outs[1]).float().mean() < 1e-3
    for got, want in [outs, *zip(*grads)]:
        assert (got.float() - want.float()).norm() < 0.01 * want.float().norm()


def definition_of_rope(x, cos, sin):
    """Hugging Face's formula."""
    first, second = x.chunk(2, dim=-1)
    return x * cos[:, None] + torch.cat([-second, first], dim=-1) * sin[:, None]


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16])
def test_rope_equals_its_definition_and_so_does_its_gradient(dtype):
    """Catches a wrong sign or half in either direction, and angles or products rounded to bf16 before the sum."""
    angle_dtype = torch.float64 if dtype == torch.float64 else torch.float32
    cos, sin = rope_of([70, 20], angle_dtype)
    torch.manual_seed(0)
    x, upstream = (torch.randn(90, 3, HEAD_DIM).to(dtype) for _ in range(2))
    exact, x = x.double().requires_grad_(), x.requires_grad_()
    want = definition_of_rope(exact, cos.double(), sin.double())
    got = apply_rope(x, cos, sin)
    got.backward(upstream)
    want.backward(upstream.double())
    assert got.dtype == x.grad.dtype == dtype and not torch.allclose(want, exact)
    rounding = {torch.float64: 1e-15, torch.float32: 2**-24, torch.bfloat16: 2**-8}[dtype]  # half a unit of the result
    for a, b in ((got, want), (x.grad, exact.grad)):
        torch.testing.assert_close(a.double(), b, rtol=rounding, atol=1e-14 if dtype == torch.float64 else 1e-6)


def test_rope_keeps_lengths_and_relative_angles():
    """Catches a rotation that is none, or that depends on more than the distance between two tokens."""
    q, k = torch.randn(2, 1, HEAD_DIM, dtype=torch.float64).unbind(0)
    cos, sin = rope_of([50])
    rotated_q, rotated_k = (apply_rope(x.expand(50, 1, -1), cos, sin)[:, 0] for x in (q, k))
    torch.testing.assert_close(rotated_q.norm(dim=-1), q.norm().expand(50))
    torch.testing.assert_close(rotated_q[7] @ rotated_k[3], rotated_q[44] @ rotated_k[40])
    assert not torch.allclose(rotated_q[7] @ rotated_k[3], rotated_q[7] @ rotated_k[4])


def test_moba_layer_equals_the_definition_between_its_projections():
    """Catches a layer that routes before RoPE or norm, on the wrong heads, or across documents."""
    lengths = [50, 0, 21, 5]
    layer, x, (cos, sin) = make_layer(qk_norm=True, qkv_bias=True, spec=SPARSE), make_tokens(76), rope_of(lengths)
    q, k, v = (projection(x).view(76, -1, HEAD_DIM) for projection in (layer.q_proj, layer.k_proj, layer.v_proj))
    q, k = apply_rope(layer.q_norm(q), cos, sin), apply_rope(layer.k_norm(k), cos, sin)
    options = {"block_size": 8, "top_k": 2, "cu_seqlens": cu_of(lengths)}
    selection = reference_selection(q, k, **options)
    assert (selection[:, :, 0] >= 0).any() and ((selection >= 0).sum(-1) <= selection[..., -1]).any()
    want = layer.o_proj(reference_attention(q, k, v, **options).flatten(1))
    got = layer(x, cos, sin, Documents.from_lengths(lengths))
    torch.testing.assert_close(got, want, rtol=1e-6, atol=1e-6)


def test_switching_touches_no_parameter():
    """Catches state, buffers or parameters that depend on the kind of attention."""
    layer, x, (cos, sin) = make_layer(), make_tokens(60), rope_of([60])
    before = {name: value.clone() for name, value in layer.state_dict().items()}
    objects = [id(p) for p in layer.parameters()]
    outputs = {}
    for spec in (Full(), SPARSE, Moba(8, 8), Full()):
        layer.spec = spec
        outputs.setdefault(str(spec), []).append(layer(x, cos, sin, Documents.from_lengths([60])))
    assert objects == [id(p) for p in layer.parameters()] and layer.state_dict().keys() == before.keys()
    for name, value in layer.state_dict().items():
        assert torch.equal(value, before[name])
    first, again = outputs["full"]
    assert torch.equal(first, again)
    torch.testing.assert_close(outputs["moba 8x8"][0], first)  # 8 blocks of 8 hold all 60 tokens
    assert not torch.allclose(outputs["moba 8x2"][0], first)


def test_every_parameter_gets_a_gradient():
    """Catches a detached projection: the gate has no gradient, but keys and queries still have the attention's."""
    layer, (cos, sin) = make_layer(qk_norm=True, qkv_bias=True, spec=SPARSE), rope_of([60])
    layer(make_tokens(60), cos, sin, Documents.from_lengths([60])).square().sum().backward()
    for name, parameter in layer.named_parameters():
        assert parameter.grad is not None and parameter.grad.norm() > 0, name


def test_a_gate_of_a_group_s_heads_keeps_them_together_in_a_shared_sequence():
    """Attention by groups of heads, each dealt over the processes: catches groups of so few key/value heads that a
    process gets some of the query heads of one, whose mean score would then be another."""
    layer = MoBAAttention(HIDDEN, 8, 4, HEAD_DIM)
    axis = SequenceAxis(None, 0, 2)
    for gate, alone, dealt in (("mean", 4, 4), ("shared", 4, 1)):
        layer.spec, layer.axis = Moba(8, 2, gate), None
        assert len(layer.head_groups(4)) == alone
        layer.axis = axis
        assert len(layer.head_groups(4)) == dealt
    assert layer.head_groups(4) == [slice(0, 4)]


def test_impossible_heads_are_refused():
    """Catches head counts that would fail later, inside a reshape."""
    with pytest.raises(ValueError, match="num_heads=6, num_kv_heads=4"):
        MoBAAttention(HIDDEN, 6, 4, HEAD_DIM)
