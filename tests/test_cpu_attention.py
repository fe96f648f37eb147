"""Attention for CPUs against PyTorch's kernel, both in bfloat16, with the kernel in float32 as the truth."""

import pytest
import torch

from aymen_gpt.model import cpu_attention, gpt


def result(f, qkv, n_head, grad):
    qkv = qkv.clone().requires_grad_()
    y = f(qkv, n_head)
    y.backward(grad.to(y.dtype))
    return y.detach().float(), qkv.grad.float()


def error(found, truth):
    return ((found - truth).norm() / truth.norm()).item()


@pytest.mark.parametrize("scale", [0.3, 1, 3])  # of the scores: flat to peaked
@pytest.mark.parametrize(("T", "n_head", "C"), [(256, 4, 256), (200, 2, 64), (77, 3, 96), (1, 2, 32)])
def test_it_is_as_near_to_float32_as_the_kernel(scale, T, n_head, C):
    torch.manual_seed(0)
    qkv = (scale * torch.randn(3, T, 3 * C)).bfloat16()
    grad = torch.randn(3, T, C).bfloat16()
    truth = result(gpt.attention, qkv.float(), n_head, grad)
    kernel = result(gpt.attention, qkv, n_head, grad)
    ours = result(cpu_attention.attention, qkv, n_head, grad)
    for found, theirs, right, more in zip(ours, kernel, truth, (1.5, 1.1), strict=True):
        assert error(found, right) <= more * error(theirs, right) + 1e-4


def test_in_float32_it_is_exact():
    torch.manual_seed(0)
    qkv, grad = torch.randn(2, 150, 96, dtype=torch.float32), torch.randn(2, 150, 32)
    truth, ours = (result(f, qkv, 2, grad) for f in (gpt.attention, cpu_attention.attention))
    for found, right in zip(ours, truth, strict=True):
        torch.testing.assert_close(found, right, atol=1e-5, rtol=1e-4)


def test_no_token_sees_a_later_one():
    qkv = torch.randn(1, 20, 96).bfloat16()
    changed = qkv.clone()
    changed[:, 12:] += 1
    before, after = (cpu_attention.attention(x, 2) for x in (qkv, changed))
    assert torch.equal(before[:, :12], after[:, :12])
    assert not torch.equal(before[:, 12:], after[:, 12:])


def test_a_model_that_uses_it_is_saved_and_generates_as_before():
    config = gpt.GPTConfig(block_size=16, n_layer=2, n_head=2, n_embd=32)
    model, plain = (gpt.GPT(config, torch.Generator().manual_seed(0)) for _ in range(2))
    cpu_attention.use(model)
    assert model.state_dict().keys() == plain.state_dict().keys()
    tokens = torch.arange(12)[None]
    torch.testing.assert_close(model(tokens), plain(tokens), atol=1e-5, rtol=1e-4)
    assert torch.equal(model(tokens, model.new_caches(1)), plain(tokens, plain.new_caches(1)))
