"""train/model/fused_loss.py in Triton's interpreter (tests/conftest.py switches it on), against the dense cross-entropy
in float64. On a GPU the tests of test_loss.py go through it."""

import pytest
import torch
import torch.nn.functional as F

pytest.importorskip("triton", reason="the fused cross-entropy needs triton")

from data.packing import IGNORED
from train.model import fused_loss
from train.model.fused_loss import fused_cross_entropy

pytestmark = [
    pytest.mark.skipif(torch.cuda.is_available(), reason="these run in the interpreter; test_loss.py runs on a GPU"),
    pytest.mark.filterwarnings("ignore::RuntimeWarning"),  # the interpreter computes masked lanes too
]


def make_case(num_tokens=21, width=24, vocab=71, dtype=torch.float32, seed=0):
    """Hidden states, weight, labels (some ignored, one tile of 8 wholly) and upstream gradients."""
    generator = torch.Generator().manual_seed(seed)
    hidden = torch.randn(num_tokens, width, generator=generator).to(dtype).requires_grad_()
    weight = torch.randn(vocab, width, generator=generator).to(dtype).requires_grad_()
    labels = torch.randint(0, vocab, (num_tokens,), generator=generator)
    labels[2] = labels[8:16] = IGNORED
    return hidden, weight, labels, torch.randn(num_tokens, generator=generator)


def reference(hidden, weight, labels, upstream):
    """Losses and both gradients in float64."""
    h, w = (x.detach().double().requires_grad_() for x in (hidden, weight))
    losses = F.cross_entropy(h @ w.T, labels, reduction="none", ignore_index=IGNORED)
    losses.backward(upstream.double())
    return losses.detach(), h.grad, w.grad


def assert_close(case, upstream, losses, dtype=torch.float32):
    hidden, weight, labels, _ = case
    expected, expected_dh, expected_dw = reference(hidden, weight, labels, upstream)
    tolerance = 2e-6 if dtype == torch.float32 else 6e-3
    for name, got, want, bound in (
        ("losses", losses, expected, 1e-5),
        ("hidden", hidden.grad, expected_dh, tolerance),
        ("weight", weight.grad, expected_dw, tolerance),
    ):
        assert float((got.detach().double() - want).norm() / want.norm()) < bound, name
    assert (losses[labels == IGNORED] == 0).all() and (hidden.grad[labels == IGNORED] == 0).all()
    assert losses.dtype == torch.float32 and hidden.grad.dtype == weight.grad.dtype == dtype


@pytest.mark.parametrize("tile", [1, 8, 21, 1000])
@pytest.mark.parametrize("chunk", [16, 128], ids=["row in chunks", "row on chip"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16], ids=str)
def test_equals_the_dense_cross_entropy_under_a_sum(monkeypatch, tile, chunk, dtype):
    """Catches a ragged last tile or chunk, ignored labels that leak, a scale that reaches one gradient alone, and one
    that is rounded to the inputs' dtype before it is applied."""
    monkeypatch.setattr(fused_loss, "_shape", lambda vocab_size: (chunk, 4))
    case = make_case(dtype=dtype)
    losses = fused_cross_entropy(*case[:3], tile)
    scale = 0.3701
    (losses.sum() * scale).backward()
    assert_close(case, torch.full_like(case[3], scale), losses, dtype)


@pytest.mark.parametrize("chunk", [16, 128], ids=["row in chunks", "row on chip"])
def test_equals_it_under_any_upstream_gradient(monkeypatch, chunk):
    """Catches gradients made for a sum that are used for something else: each token has its own weight here."""
    monkeypatch.setattr(fused_loss, "_shape", lambda vocab_size: (chunk, 4))
    case = make_case()
    losses = fused_cross_entropy(*case[:3], 8)
    losses.backward(case[3])
    assert_close(case, case[3], losses)


def test_a_sum_needs_one_product_with_the_vocabulary_fewer(monkeypatch):
    """Catches a sum whose upstream gradient is no longer seen to be one number: all would be computed twice."""
    calls, kernel_tiles = [], fused_loss._tiles
    monkeypatch.setattr(fused_loss, "_tiles", lambda *arguments: calls.append(1) or kernel_tiles(*arguments))
    for weights, num_calls in ((None, 1), (torch.arange(21.0), 2)):
        calls.clear()
        losses = fused_cross_entropy(*make_case()[:3], 8)
        loss = losses.sum() if weights is None else (losses * weights).sum()
        loss = loss * 0.5
        (loss * torch.where(loss.isfinite(), 1.0, torch.nan)).backward()
        assert len(calls) == num_calls


def test_without_gradients_none_are_made(monkeypatch):
    """Catches an evaluation that pays for gradients, and a frozen input that does."""
    needed, kernel_tiles = [], fused_loss._tiles
    monkeypatch.setattr(fused_loss, "_tiles", lambda *a: needed.append(a[4]) or kernel_tiles(*a))
    hidden, weight, labels, _ = make_case()
    with torch.no_grad():
        fused_cross_entropy(hidden, weight, labels, 8)
    assert needed == [(False, False)]
    for frozen in (0, 1):
        inputs = [hidden.detach(), weight.detach()]
        inputs[1 - frozen].requires_grad_()
        fused_cross_entropy(*inputs, labels, 8).sum().backward()
        assert needed[-1] == (frozen == 1, frozen == 0)
        assert inputs[frozen].grad is None and inputs[1 - frozen].grad is not None


def test_extreme_logits_stay_finite_and_bad_ones_show():
    """Catches an exponential that overflows, and a NaN that a maximum swallows."""
    hidden = torch.tensor([[1e4], [-1e4]], requires_grad=True)
    weight = torch.tensor([[1.0], [-1.0], [0.0]])
    losses = fused_cross_entropy(hidden, weight, torch.tensor([0, 0]), 2)
    torch.testing.assert_close(losses, torch.tensor([0.0, 2e4]))
    losses.sum().backward()
    assert torch.isfinite(hidden.grad).all()
    bad = torch.tensor([[1.0], [float("nan")]])
    losses = fused_cross_entropy(bad, weight, torch.tensor([0, 0]), 2)
    assert losses[0].isfinite() and losses[1].isnan()
