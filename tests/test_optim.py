"""AdamW: who decays, the update's arithmetic, and moments that survive a round trip."""

import pytest
import torch

from aymen_gpt.model.gpt import GPT, GPTConfig
from aymen_gpt.training import optim

CONFIG = GPTConfig(block_size=8, vocab_size=100, n_layer=2, n_head=2, n_embd=16)


def model_and_optimizer(weight_decay=0.1):
    model = GPT(CONFIG, torch.Generator().manual_seed(0))
    return model, optim.adamw(model, lr=1e-2, betas=(0.9, 0.95), weight_decay=weight_decay)


def update(model, optimizer, seed):
    g = torch.Generator().manual_seed(seed)
    for p in model.parameters():
        p.grad = torch.randn(p.shape, generator=g)
    optimizer.step()


def test_matrices_and_embeddings_decay_biases_and_norms_do_not():
    model, optimizer = model_and_optimizer()
    names = {p: name for name, p in model.named_parameters()}
    decayed, spared = ([names.pop(p) for p in group["params"]] for group in optimizer.param_groups)
    per_block = ["attn.c_attn", "attn.c_proj", "mlp.c_fc", "mlp.c_proj"]
    assert decayed == ["wte.weight", "wpe.weight"] + [f"h.{i}.{m}.weight" for i in range(2) for m in per_block]
    assert len(spared) == 2 * 8 + 2
    assert not names
    assert [group["weight_decay"] for group in optimizer.param_groups] == [0.1, 0.0]


def test_an_update_is_that_of_the_paper():
    """Algorithm 2 of arXiv:1711.05101, written out in float64 for two steps."""
    model, optimizer = model_and_optimizer()
    p = model.h[0].mlp.c_fc.weight
    w, m, v = p.detach().double().clone(), 0.0, 0.0
    for step in (1, 2):
        update(model, optimizer, seed=step)
        g = p.grad.double()
        m, v = 0.9 * m + 0.1 * g, 0.95 * v + 0.05 * g * g
        w = w - 1e-2 * 0.1 * w - 1e-2 * (m / (1 - 0.9**step)) / ((v / (1 - 0.95**step)).sqrt() + 1e-8)
    torch.testing.assert_close(p.detach().double(), w, rtol=1e-5, atol=1e-7)


def test_padding_rows_of_the_embedding_stay_zero():
    model, optimizer = model_and_optimizer()
    for p in model.parameters():
        p.grad = torch.ones_like(p)
    model.wte.weight.grad[100:] = 0
    for _ in range(3):
        optimizer.step()
    assert (model.wte.weight[100:] == 0).all()


def test_gradients_are_scaled_to_the_limit_and_the_norm_before_is_told():
    p = torch.nn.Parameter(torch.zeros(2))
    p.grad = torch.tensor([3.0, 4.0])
    assert optim.clip_gradients([p], None).item() == pytest.approx(5.0)
    assert optim.clip_gradients([p], 1.0).item() == pytest.approx(5.0)
    assert p.grad.norm().item() == pytest.approx(1.0, rel=1e-5)
    assert optim.clip_gradients([p], 2.0).item() == pytest.approx(1.0, rel=1e-5)
    assert p.grad.norm().item() == pytest.approx(1.0, rel=1e-5)
    p.grad = torch.tensor([torch.inf, 4.0])
    assert optim.clip_gradients([p], 1.0).item() == torch.inf
    assert p.grad.tolist() == [torch.inf, 4.0]  # for failure.json
