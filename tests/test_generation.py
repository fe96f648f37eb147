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


@pytest.mark.parametrize(
    ("options", "expected"),
    [
        ({}, [0.5, 0.3, 0.15, 0.05]),
        ({"temperature": 0.5}, [0.685, 0.247, 0.062, 0.007]),  # the squares
        ({"top_k": 2}, [0.625, 0.375, 0, 0]),
        ({"top_p": 0.4}, [1, 0, 0, 0]),  # the smallest sufficient set
        ({"top_p": 0.6}, [0.625, 0.375, 0, 0]),
        ({"top_p": 0.81}, [0.526, 0.316, 0.158, 0]),
        ({"top_p": 0.96}, [0.5, 0.3, 0.15, 0.05]),
    ],
)
def test_what_is_drawn_has_the_distribution_asked_for(options, expected):
    found = drawn(**options)
    assert torch.allclose(found, torch.tensor(expected, dtype=torch.float), atol=0.03)
    assert ((found > 0) == (torch.tensor(expected) > 0)).all()


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
    long = list(range(100))  # a prompt that keeps its end
    assert list(generate(model, long, 3, temperature=0)) == list(generate(model, long[68:], 3, temperature=0))


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
    with pytest.raises(ValueError, match="prompt is empty"):
        list(generate(model, [], 1))
