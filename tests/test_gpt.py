"""The network: equal to transformers' GPT-2, initialised by its law, copyable out of the repository."""

import dataclasses
import math
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from transformers import GPT2Config, GPT2LMHeadModel

from aymen_gpt.model import gpt as gpt_module
from aymen_gpt.model.gpt import GPT, PRESETS, GPTConfig
from aymen_gpt.model.huggingface import config_to_huggingface, from_huggingface, to_huggingface

SMALL = GPTConfig(block_size=48, vocab_size=1000, n_layer=3, n_head=4, n_embd=64)
WIDE = GPTConfig(block_size=128, vocab_size=50257, n_layer=2, n_head=6, n_embd=192)


def generator(seed=0):
    return torch.Generator().manual_seed(seed)


def reference(config):
    torch.manual_seed(1)
    return GPT2LMHeadModel(GPT2Config(**config_to_huggingface(config))).eval()


@pytest.mark.parametrize("config", [SMALL, WIDE])
def test_logits_and_loss_equal_transformers_on_its_weights_and_on_ours(config):
    theirs, ours = reference(config), GPT(config)
    ours.load_state_dict(from_huggingface(theirs.state_dict(), config))
    idx = torch.randint(config.vocab_size, (3, config.block_size), generator=generator())
    with torch.no_grad():
        expected, found = theirs(idx, labels=idx), ours(idx)
    assert (found - expected.logits).abs().max() < 1e-4
    loss = torch.nn.functional.cross_entropy(found[:, :-1].flatten(0, 1), idx[:, 1:].flatten())
    assert abs(loss - expected.loss) < 1e-4
    ours = GPT(config, generator())
    left = theirs.load_state_dict(to_huggingface(ours.state_dict(), config.vocab_size), strict=False)
    assert (left.unexpected_keys, left.missing_keys) == ([], ["lm_head.weight"])  # tied
    with torch.no_grad():
        assert (ours(idx) - theirs(idx).logits).abs().max() < 1e-4


@pytest.mark.parametrize("recompute", ["attention", "block"])
def test_what_backward_computes_again_changes_no_gradient(recompute):
    model, idx = GPT(SMALL, generator()), torch.randint(1000, (2, 48), generator=generator())
    model(idx).square().sum().backward()
    expected = {name: p.grad.clone() for name, p in model.named_parameters()}
    model.zero_grad()
    model.recompute, passes = recompute, []
    model.h[0].attn.register_forward_pre_hook(lambda *_: passes.append(recompute))  # the second one stops early
    model(idx).square().sum().backward()
    assert len(passes) == 2
    assert all(torch.equal(p.grad, expected[name]) for name, p in model.named_parameters())


@pytest.mark.parametrize(
    ("name", "millions"),
    [("gpt2", 124), ("gpt2-medium", 355), ("gpt2-large", 774), ("gpt2-xl", 1558), ("gpt3-small", 125),
     ("gpt3-medium", 356), ("gpt3-large", 760), ("gpt3-xl", 1316), ("gpt3-2.7b", 2652), ("gpt3-6.7b", 6658),
     ("gpt3-13b", 12853), ("gpt3-175b", 174_604)],
)  # fmt: skip
def test_presets_have_the_sizes_of_the_papers(name, millions):
    config = PRESETS[name]
    assert round(config.n_params / 1e6) == pytest.approx(millions, abs=0.6)
    with torch.device("meta"):
        held = sum(p.numel() for p in GPT(config).parameters())
    assert held == config.n_params + (config.padded_vocab_size - config.vocab_size) * config.n_embd
    assert name != "gpt2" or (config.n_params, held) == (124_439_808, 124_475_904)  # 50,257 and 50,304 rows


def test_initial_weights_follow_the_law():
    model = GPT(dataclasses.replace(WIDE, n_layer=8), generator())
    residual_std = 0.02 / math.sqrt(2 * 8)
    for name, p in model.named_parameters():
        if name == "wte.weight":
            assert p[50257:].abs().max() == 0
            p = p[:50257]
        if p.dim() == 2:
            expected = residual_std if name.endswith("c_proj.weight") else 0.02
            assert p.std().item() == pytest.approx(expected, rel=0.02), name
            assert abs(p.mean().item()) < 5 * expected / math.sqrt(p.numel()), name
        else:
            assert (p == (1 if "ln_" in name and name.endswith("weight") else 0)).all(), name
    a, b, c = (GPT(SMALL, generator(seed)).h[2].mlp.c_fc.weight for seed in (1, 1, 2))
    assert torch.equal(a, b)
    assert not torch.equal(a, c)


def test_a_token_sees_only_what_is_before_it():
    model = GPT(SMALL, generator())
    idx = torch.randint(1000, (1, 20), generator=generator())
    changed = idx.clone()
    changed[0, 12] = (changed[0, 12] + 1) % 1000
    with torch.no_grad():
        a, b = model(idx), model(changed)
    assert torch.equal(a[:, :12], b[:, :12])
    assert not torch.allclose(a[:, 12:], b[:, 12:])


def test_cached_keys_and_values_give_the_logits_of_the_whole_text():
    model = GPT(SMALL, generator())
    idx = torch.randint(1000, (2, 30), generator=generator())
    caches = model.new_caches(2)
    with torch.no_grad():
        parts = [model(idx[:, :11], caches)] + [model(idx[:, t : t + 1], caches) for t in range(11, 30)]
        assert torch.allclose(torch.cat(parts, 1), model(idx), atol=1e-5)


def test_a_text_longer_than_the_context_and_heads_that_do_not_divide_the_width_are_refused():
    with pytest.raises(ValueError, match="49 tokens do not fit into a context of 48"):
        GPT(SMALL)(torch.zeros(1, 49, dtype=torch.long))
    with pytest.raises(ValueError, match="n_embd 64 does not divide into n_head 5"):
        GPTConfig(n_embd=64, n_head=5)


def test_flops_per_token_are_those_of_the_products_counted_by_torch():
    """FlopCounterMode sees the matrix products; 6N also charges biases and norms, under 1% here."""
    from torch.utils.flop_counter import FlopCounterMode

    model = GPT(WIDE, generator())
    idx = torch.randint(50257, (1, WIDE.block_size))
    with FlopCounterMode(display=False) as counter:
        model(idx).sum().backward()
    per_token = counter.get_total_flops() / WIDE.block_size
    # torch recomputes the scores in the backward pass of attention: 14 instead of 12 LCT
    recomputed = 2 * WIDE.n_layer * WIDE.n_embd * WIDE.block_size
    assert per_token - recomputed == pytest.approx(WIDE.flops_per_token, rel=0.02)


def test_the_file_works_alone(tmp_path):
    (tmp_path / "gpt.py").write_text(Path(gpt_module.__file__).read_text())
    code = "import gpt, torch; print(gpt.GPT(gpt.PRESETS['tiny'])(torch.zeros(1, 5, dtype=torch.long)).shape)"
    alone = [sys.executable, "-I", "-c", f"import sys; sys.path.insert(0, '{tmp_path}'); {code}"]
    done = subprocess.run(alone, capture_output=True, text=True)
    assert done.stdout == "torch.Size([1, 5, 50257])\n", done.stderr
    assert "aymen_gpt" not in (tmp_path / "gpt.py").read_text()
