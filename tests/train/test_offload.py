"""model.activation_checkpointing=offload: the same losses and gradients with nothing of a layer kept on the device."""

import pytest
import torch

from conf.schema import OFFLOAD, OFFLOADED, ModelConfig
from moba.documents import Documents
from moba.kinds import Full, Moba, Sliding
from train.model import offload
from train.model.decoder import Decoder
from train.plan import memory

triton_attention = pytest.importorskip("moba.backends.triton_attention")

SHAPE = {"hidden_size": 24, "num_layers": 3, "num_heads": 6, "num_kv_heads": 3, "head_dim": 4, "ffn_size": 40}


def losses_and_gradients(mode, dtype=torch.float64, **options):
    model = Decoder(ModelConfig(**SHAPE, activation_checkpointing=mode, loss_tile=16, **options), 61)
    model.init_weights(seed=1)
    model.to(dtype)
    model.set_attention([Moba(8, 2), Full(), Sliding(7)])
    generator = torch.Generator().manual_seed(0)
    tokens, labels = torch.randint(0, 61, (2, 75), generator=generator)
    documents = Documents.from_lengths([50, 1, 24])
    positions = torch.cat([torch.arange(n) for n in documents.lengths])
    losses = model(tokens, positions, documents, labels)
    losses.sum().backward()
    with torch.no_grad():
        unseen = model(tokens, positions, documents, labels)
    return [losses.detach(), unseen, *(parameter.grad for parameter in model.parameters())]


@pytest.mark.parametrize(
    "options", [{}, {"qkv_bias": True, "qk_norm": True}, {"key_conv": 3, "rope_pattern": "RNR", "tie_embeddings": True}]
)
@pytest.mark.parametrize("mode", OFFLOADED)
def test_offloaded_layers_give_the_same(mode, options, monkeypatch):
    """Catches heads or tiles left out, gradients that are added up twice or lost on the way to the host, and an MLP
    that is skipped where it is needed. The tile divides nothing."""
    monkeypatch.setattr(offload, "TILE_TOKENS", 32)
    expected, found = losses_and_gradients(False, **options), losses_and_gradients(mode, **options)
    for one, other in zip(found, expected, strict=True):
        torch.testing.assert_close(one, other, rtol=1e-10, atol=1e-10)


def test_only_inputs_are_kept_and_on_the_host(monkeypatch):
    """Catches activations that stay referenced: what autograd saves in a forward pass is the loss's alone."""
    kept = []
    monkeypatch.setattr(offload.Inputs, "keep", lambda self, x: kept.append(x.shape) or 0)
    saved = []
    with torch.autograd.graph.saved_tensors_hooks(lambda t: saved.append(t.shape) or t, lambda t: t):
        model = Decoder(ModelConfig(**SHAPE, activation_checkpointing=OFFLOAD, loss_tile=16), 61)
        model.init_weights(seed=1)
        tokens = torch.arange(40)
        model(tokens, tokens, Documents.from_lengths([40]), tokens)
    assert kept == [(40, 24)] * 3
    assert not [shape for shape in saved if len(shape) == 3 or (shape[-1:] == (40,) and shape[0] != 40)], saved
    assert len(saved) < 12, saved


def test_the_plan_counts_with_the_sizes_in_force():
    """Catches constants that the plan, which must not import torch, repeats, and that changed at one place."""
    assert (memory.TILE_TOKENS, memory.WORKSPACE_BYTES) == (offload.TILE_TOKENS, triton_attention.WORKSPACE_BYTES)


def test_buffers_are_used_again():
    """Catches host memory that grows from step to step."""
    buffers = offload.HostBuffers()
    for _ in range(3):
        inputs = offload.Inputs(buffers, torch.device("cpu"))
        places = [inputs.keep(torch.full((4, 2), float(i))) for i in range(3)]
        for place in reversed(places):
            assert (inputs.take(place) == place).all()
    assert sum(map(len, buffers._free.values())) == 3
