"""train/model/loss.py against torch's own cross-entropy in float64, and its promise never to hold all logits."""

import pytest
import torch
import torch.nn.functional as F
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from data.packing import IGNORED
from train.model.loss import tiled_cross_entropy


def make_case(num_tokens=53, width=24, vocab=71, dtype=torch.float32, seed=0):
    """Random hidden states, weight, labels (a third ignored, one whole stretch among them) and upstream gradients."""
    g = torch.Generator().manual_seed(seed)
    hidden = torch.randn(num_tokens, width, generator=g).to(dtype).requires_grad_()
    weight = torch.randn(vocab, width, generator=g).to(dtype).requires_grad_()
    labels = torch.randint(0, vocab, (num_tokens,), generator=g)
    labels[torch.rand(num_tokens, generator=g) < 0.2] = IGNORED
    labels[16:32] = IGNORED
    upstream = torch.randn(num_tokens, generator=g)
    return hidden, weight, labels, upstream


def reference(hidden, weight, labels, upstream):
    """Losses and both gradients in float64 by torch's dense cross-entropy."""
    h, w = (x.detach().double().requires_grad_() for x in (hidden, weight))
    losses = F.cross_entropy(h @ w.T, labels, reduction="none", ignore_index=IGNORED)
    losses.backward(upstream.double())
    return losses.detach(), h.grad, w.grad


def relative_error(actual, expected):
    return float((actual.detach().double() - expected).norm() / expected.norm())


@pytest.mark.parametrize("tile", [1, 8, 16, 53, 1000])
@pytest.mark.parametrize("dtype,tolerance", [(torch.float64, 1e-6), (torch.float32, 2e-6)])
def test_losses_and_gradients_equal_the_dense_float64_ones(tile, dtype, tolerance):
    """Catches a wrong gradient under non-uniform upstream gradients, ragged last tiles, and ignored labels that
    leak."""
    hidden, weight, labels, upstream = make_case(dtype=dtype)
    losses = tiled_cross_entropy(hidden, weight, labels, tile)
    losses.backward(upstream)
    expected, expected_dh, expected_dw = reference(hidden, weight, labels, upstream)
    assert losses.dtype == torch.float32
    assert relative_error(losses, expected) < tolerance
    assert relative_error(hidden.grad, expected_dh) < tolerance
    assert relative_error(weight.grad, expected_dw) < tolerance
    assert (losses[labels == IGNORED] == 0).all() and (labels == IGNORED).any()
    assert (hidden.grad[labels == IGNORED] == 0).all()


def test_bf16_inputs_get_float32_logits_and_a_float32_weight_sum():
    """Catches logits rounded to bf16 (losses off by 1e-2) and a weight gradient summed over tiles in bf16."""
    hidden, weight, labels, upstream = make_case(num_tokens=1024, dtype=torch.bfloat16)
    losses = tiled_cross_entropy(hidden, weight, labels, 4)
    losses.backward(upstream)
    expected, expected_dh, expected_dw = reference(hidden, weight, labels, upstream)
    assert relative_error(losses, expected) < 1e-5
    assert hidden.grad.dtype == weight.grad.dtype == torch.bfloat16
    assert relative_error(hidden.grad, expected_dh) < 5e-3
    assert relative_error(weight.grad, expected_dw) < 5e-3


def test_autocast_changes_nothing():
    """Catches a forward pass in bf16 whose backward pass, outside autocast, is in float32."""
    hidden, weight, labels, _ = make_case()
    plain = tiled_cross_entropy(hidden, weight, labels, 16)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert (hidden @ weight.T).dtype == torch.bfloat16
        assert torch.equal(tiled_cross_entropy(hidden, weight, labels, 16), plain)


def test_scaling_the_loss_scales_both_gradients():
    """Catches a loss that forms gradients in its forward pass: what scales it afterwards would miss the weight."""
    grads = []
    for scale in (1.0, 0.25):
        hidden, weight, labels, _ = make_case()
        (tiled_cross_entropy(hidden, weight, labels, 16).sum() * scale).backward()
        grads.append((hidden.grad, weight.grad))
    torch.testing.assert_close(grads[1][0], grads[0][0] * 0.25)
    torch.testing.assert_close(grads[1][1], grads[0][1] * 0.25)


class Spy(TorchDispatchMode):
    """Records the largest tensor any operation returned, and how many matrix products ran."""

    def __init__(self):
        super().__init__()
        self.largest = 0
        self.num_products = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        out = func(*args, **(kwargs or {}))
        self.num_products += func.overloadpacket is torch.ops.aten.mm
        self.largest = max([self.largest, *(x.numel() for x in tree_leaves(out) if isinstance(x, torch.Tensor))])
        return out


def test_no_tensor_of_all_logits_exists():
    """Catches any [T, V] tensor in forward or backward; the dense loss shows that the spy would see one."""
    num_tokens, vocab, tile = 512, 640, 32
    hidden, weight, labels, upstream = make_case(num_tokens, 8, vocab)
    with Spy() as spy:
        tiled_cross_entropy(hidden, weight, labels, tile).backward(upstream)
    assert spy.largest <= tile * vocab
    with Spy() as dense:
        F.cross_entropy(hidden @ weight.T, labels, reduction="none").backward(upstream)
    assert dense.largest >= num_tokens * vocab


def test_tiles_without_labels_cost_nothing():
    """Catches work spent on masked prompts: 1 of 8 tiles has labels, so 1 product forward and 3 backward."""
    hidden, weight, labels, upstream = make_case(num_tokens=128)
    labels[:] = IGNORED
    labels[70] = 3
    with Spy() as spy:
        losses = tiled_cross_entropy(hidden, weight, labels, 16)
        losses.backward(upstream)
    assert spy.num_products == 4
    expected, expected_dh, expected_dw = reference(hidden, weight, labels, upstream)
    assert relative_error(losses, expected) < 1e-6
    assert relative_error(hidden.grad, expected_dh) < 1e-6 and relative_error(weight.grad, expected_dw) < 1e-6


def test_frozen_inputs_get_no_gradient_work():
    """Catches computing the weight's gradient when only the hidden states need one, and the reverse."""
    for frozen in (0, 1):
        hidden, weight, labels, upstream = make_case()
        (hidden, weight)[frozen].requires_grad_(False)
        with Spy() as spy:
            tiled_cross_entropy(hidden, weight, labels, 1000).backward(upstream)
        assert spy.num_products == 3
        assert (hidden, weight)[frozen].grad is None and (weight, hidden)[frozen].grad is not None


def test_extreme_logits_stay_finite():
    """Catches an exponential that overflows: logits of +-1e4 have a finite loss."""
    hidden = torch.tensor([[1e4], [-1e4]], requires_grad=True)
    weight = torch.tensor([[1.0], [-1.0], [0.0]])
    losses = tiled_cross_entropy(hidden, weight, torch.tensor([0, 0]), 2)
    torch.testing.assert_close(losses, torch.tensor([0.0, 2e4]))
    losses.sum().backward()
    assert torch.isfinite(hidden.grad).all()


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
@pytest.mark.parametrize("dtype,tolerance", [(torch.float32, 1e-5), (torch.bfloat16, 5e-3)])
@pytest.mark.parametrize("vocab", [512, 32768, 40064])
@pytest.mark.parametrize("uniform", [True, False], ids=["sum", "each"])
def test_cuda_equals_float64_and_never_synchronises(dtype, tolerance, vocab, uniform):
    """Catches a device-specific product or kernel that is wrong, for vocabularies that stay on chip and larger ones,
    under a sum and under an upstream gradient of each token's own; and any wait for the device."""
    hidden, weight, labels, upstream = (
        x.detach().cuda() for x in make_case(num_tokens=1024, width=64, vocab=vocab, dtype=dtype)
    )
    if uniform:
        upstream = torch.full((1,), 0.37, device="cuda").expand(1024)
    hidden.requires_grad_(), weight.requires_grad_()
    torch.cuda.set_sync_debug_mode("error")
    try:
        losses = tiled_cross_entropy(hidden, weight, labels, 100)
        losses.backward(upstream)
    finally:
        torch.cuda.set_sync_debug_mode("default")
    expected, expected_dh, expected_dw = reference(hidden, weight, labels, upstream)
    assert relative_error(losses, expected) < 1e-5
    assert relative_error(hidden.grad, expected_dh) < tolerance
    assert relative_error(weight.grad, expected_dw) < tolerance
