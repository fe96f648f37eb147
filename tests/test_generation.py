"""Sampling: greedy as transformers does it, the filters on distributions one can compute by hand."""

import pytest
import torch
from transformers import GPT2Config, GPT2LMHeadModel

from aymen_gpt.model.generation import choose, generate
from aymen_gpt.model.gpt import GPT, GPTConfig
from aymen_gpt.model.huggingface import config_to_huggingface, to_huggingface

CONFIG = GPTConfig(block_size=32, vocab_size=300, n_layer=2, n_head=2, n_embd=32)
LOGITS = torch.tensor([0.5, 0.3, 0.15, 0.05]).log()


@pytest.fixture(scope="module")
def model():
    m = GPT(CONFIG, torch.Generator().manual_seed(0))
    with torch.no_grad():
        m.wte.weight[:300] *= 20  # spread the logits: greedy choices must not hang on rounding
    return m


def drawn(n=3000, **options):
    g = torch.Generator().manual_seed(0)
    draws = torch.tensor([choose(LOGITS, generator=g, **options) for _ in range(n)])
    return torch.bincount(draws, minlength=4) / n


def test_greedy_equals_transformers(model):
    theirs = GPT2LMHeadModel(GPT2Config(**config_to_huggingface(CONFIG))).eval()
    theirs.load_state_dict(to_huggingface(model.state_dict(), 300), strict=False)
    prompt = [7, 3, 100]
    expected = theirs.generate(
        torch.tensor([prompt]), max_new_tokens=20, do_sample=False, pad_token_id=0, eos_token_id=None
    )
    assert list(generate(model, prompt, 20, temperature=0)) == expected[0, 3:].tolist()


def test_the_whole_distribution_is_sampled_at_temperature_one():
    assert torch.allclose(drawn(), torch.tensor([0.5, 0.3, 0.15, 0.05]), atol=0.03)


def test_temperature_sharpens():
    squares = torch.tensor([0.25, 0.09, 0.0225, 0.0025])
    assert torch.allclose(drawn(temperature=0.5), squares / squares.sum(), atol=0.03)


def test_top_k_keeps_the_k_likeliest():
    assert torch.allclose(drawn(top_k=2), torch.tensor([0.625, 0.375, 0, 0]), atol=0.03)


@pytest.mark.parametrize(("top_p", "kept"), [(0.4, 1), (0.6, 2), (0.81, 3), (0.96, 4), (1.0, 4)])
def test_top_p_keeps_the_smallest_sufficient_set(top_p, kept):
    assert (drawn(top_p=top_p) > 0).tolist() == [i < kept for i in range(4)]


def test_the_same_seed_writes_the_same_text(model):
    first, again, other = (list(generate(model, [1], 15, seed=s, temperature=2.0)) for s in (5, 5, 6))
    assert first == again
    assert first != other


def test_generation_goes_on_past_the_context(model):
    tokens = list(generate(model, list(range(20)), 60, temperature=0))
    assert len(tokens) == 60
    whole = list(range(20)) + tokens
    expected = model(torch.tensor([whole[16:32]]))[0, -1].argmax()  # the context after the first 32 tokens
    assert tokens[12] == int(expected)


def test_a_prompt_longer_than_the_context_keeps_its_end(model):
    assert list(generate(model, list(range(100)), 3, temperature=0)) == list(
        generate(model, list(range(68, 100)), 3, temperature=0)
    )


def test_generation_ends_before_the_stop_token(model):
    tokens = list(generate(model, [1, 2], 10, temperature=0))
    assert list(generate(model, [1, 2], 10, temperature=0, stop=tokens[4])) == tokens[: tokens.index(tokens[4])]


@pytest.mark.parametrize(
    ("options", "message"),
    [({"temperature": -1.0}, "temperature"), ({"temperature": float("nan")}, "temperature"),
     ({"top_k": 0}, "top-k"), ({"top_p": 0.0}, "top-p"), ({"top_p": 1.5}, "top-p")],
)  # fmt: skip
def test_senseless_sampling_is_refused_by_name(model, options, message):
    with pytest.raises(ValueError, match=message):
        list(generate(model, [1], 1, **options))


def test_an_empty_prompt_is_refused(model):
    with pytest.raises(ValueError, match="prompt is empty"):
        list(generate(model, [], 1))
