"""The fused output layer and cross-entropy: the textbook's numbers, with less memory."""

import pytest
import torch
import torch.nn.functional as F

from aymen_gpt.model import loss as losses
from aymen_gpt.model.loss import linear_cross_entropy


def problem(tokens=37, width=16, vocab=100, padded=128):
    g = torch.Generator().manual_seed(0)
    hidden = torch.randn(tokens, width, generator=g, requires_grad=True)
    weight = torch.randn(padded, width, generator=g, requires_grad=True)
    return hidden, weight, torch.randint(vocab, (tokens,), generator=g)


def textbook(hidden, weight, targets, vocab=100):
    return F.cross_entropy(F.linear(hidden, weight)[:, :vocab], targets, reduction="sum")


@pytest.fixture(params=["cpu", "gpu"])
def path(request, monkeypatch):
    """The CPU's own softmax, and the one that a GPU and a compiler take."""
    if request.param == "gpu":
        monkeypatch.setattr(losses.cpu, "logits_room", lambda rows, w: None)


@pytest.mark.parametrize("chunk_tokens", [1, 10, 37, 1000])
def test_loss_and_gradients_equal_the_textbook(chunk_tokens, path):
    hidden, weight, targets = problem()
    loss = linear_cross_entropy(hidden, weight, targets, 100, chunk_tokens=chunk_tokens)
    found = torch.autograd.grad(loss / 3, (hidden, weight))
    expected_loss = textbook(hidden, weight, targets)
    expected = torch.autograd.grad(expected_loss / 3, (hidden, weight))
    torch.testing.assert_close(loss, expected_loss, rtol=1e-6, atol=0)
    torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-6)


def test_rows_past_the_vocabulary_get_neither_probability_nor_gradient(path):
    hidden, weight, targets = problem()
    loss = linear_cross_entropy(hidden, weight, targets, 100)
    loss.backward()
    assert (weight.grad[100:] == 0).all()
    with torch.no_grad():
        weight[100:] += 1000.0
    torch.testing.assert_close(linear_cross_entropy(hidden, weight, targets, 100), loss, rtol=0, atol=0)


def test_batches_of_rows_are_flattened():
    hidden, weight, targets = problem(tokens=36)
    flat = linear_cross_entropy(hidden, weight, targets, 100)
    batched = linear_cross_entropy(hidden.view(4, 9, 16), weight, targets.view(4, 9), 100)
    assert torch.equal(flat, batched)


def test_without_gradients_none_are_computed(path):
    hidden, weight, targets = problem()
    with torch.no_grad():
        loss = linear_cross_entropy(hidden, weight, targets, 100)
    assert not loss.requires_grad
    torch.testing.assert_close(loss, textbook(hidden, weight, targets).detach(), rtol=1e-6, atol=0)


def test_autocast_multiplies_in_bfloat16_and_sums_in_float32(path):
    hidden, weight, targets = problem()
    exact = linear_cross_entropy(hidden, weight, targets, 100)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        rounded = linear_cross_entropy(hidden, weight, targets, 100)
        reference = F.cross_entropy(F.linear(hidden, weight)[:, :100].float(), targets, reduction="sum")
    assert rounded.dtype == torch.float32
    assert rounded != exact
    torch.testing.assert_close(rounded, reference, rtol=1e-5, atol=0)
    gradients = torch.autograd.grad(rounded, (hidden, weight))
    for found, expected in zip(gradients, torch.autograd.grad(exact, (hidden, weight)), strict=True):
        assert found.dtype == torch.float32
        assert (found - expected).norm() < 0.02 * expected.norm()
