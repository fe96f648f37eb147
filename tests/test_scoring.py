"""The scorer against the plain one: a row per ending, all logits, float32."""

from dataclasses import replace

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from transformers import GPT2Config, GPT2LMHeadModel

from aymen_gpt.errors import DataError
from aymen_gpt.evaluation import scoring
from aymen_gpt.evaluation.hellaswag import PROTOCOLS, tokenize
from aymen_gpt.evaluation.scoring import batches, collate, fit, rows_of, score
from aymen_gpt.model.generation import generate
from aymen_gpt.model.gpt import GPT, GPTConfig
from aymen_gpt.model.huggingface import config_to_huggingface, to_huggingface

V = 300
CONFIG = GPTConfig(block_size=48, vocab_size=V, n_layer=2, n_head=2, n_embd=32)


def make_model(config=CONFIG, seed=0):
    """Random weights ten times the usual size, so that endings differ by many nats."""
    model = GPT(config, torch.Generator().manual_seed(seed)).eval()
    with torch.no_grad():
        for p in model.parameters():
            if p.dim() == 2:
                p.mul_(10)
    return model


def make_texts(n=12, seed=0, context=(1, 20), ending=(1, 12)):
    """Four endings to each of ``n`` contexts."""
    rng = np.random.default_rng(seed)
    draw = lambda low, high: rng.integers(0, V, rng.integers(low, high + 1)).tolist()  # noqa: E731
    return [(c, draw(*ending)) for c in [draw(*context) for _ in range(n)] for _ in range(4)]


@torch.no_grad()
def plain(logits_of, texts, block_size=CONFIG.block_size):
    """One forward pass per ending; texts cut on the left to block_size inputs, as lm-evaluation-harness does."""
    sums = []
    for context, ending in texts:
        text = (context + ending)[-(block_size + 1) :]
        log_p = logits_of(torch.tensor([text[:-1]]))[0, :, :V].float().log_softmax(-1)
        n = min(len(ending), block_size)
        sums.append(sum(log_p[-n + i, t].item() for i, t in enumerate(text[-n:])))
    return np.array(sums)


def likely(*args, **options):
    return np.array([s.log_likelihood for s in score(*args, **options)])


def close(found, expected):
    np.testing.assert_allclose(found, expected, atol=1e-4)


def test_log_likelihoods_equal_hugging_face():
    model, texts = make_model(), make_texts()
    theirs = GPT2LMHeadModel(GPT2Config(**config_to_huggingface(CONFIG))).eval()
    theirs.load_state_dict(to_huggingface(model.state_dict(), V), strict=False)
    theirs.tie_weights()
    expected = plain(lambda ids: theirs(ids).logits, texts)
    assert np.ptp(expected.reshape(-1, 4), axis=1).min() > 1  # the endings do differ
    close(likely(model, texts), expected)


tokens = st.lists(st.integers(0, V - 1), min_size=1, max_size=60)


@settings(max_examples=50, deadline=None)
@given(
    st.lists(st.tuples(tokens, st.lists(tokens, min_size=1, max_size=5)), max_size=4),
    st.sampled_from([4, 16, 48]),
    st.sampled_from([1, 100, 10**6]),
)
def test_any_lengths_any_number_of_endings_and_any_batches(drawn, block_size, batch_tokens):
    """Texts too long for the model lose their beginning."""
    texts = [(context, ending) for context, endings in drawn for ending in endings]
    model = make_model(replace(CONFIG, block_size=block_size))
    found = score(model, texts, batch_tokens=batch_tokens)
    close([s.log_likelihood for s in found], plain(model, texts, block_size))
    assert [s.n_tokens for s in found] == [min(len(ending), block_size) for _, ending in texts]


few = st.lists(st.integers(0, 3), min_size=1, max_size=6)  # so that contexts are alike by chance


@settings(max_examples=200, deadline=None)
@given(st.lists(st.tuples(few, few), min_size=1, max_size=12), st.integers(1, 8))
def test_a_token_sees_its_text_and_no_other(texts, block_size):
    rows = rows_of(texts, block_size)
    assert sorted(number for row in rows for number in row.numbers) == list(range(len(texts)))
    assert len({tuple(row.context) for row in rows}) == len(rows)  # no context stands twice
    batch = collate(rows, torch.device("cpu"))
    flat, at = batch.tokens.flatten(), 0
    for row, mask in zip(rows, batch.mask[:, 0], strict=True):
        for number, ending in zip(row.numbers, row.endings, strict=True):
            context, scored = fit(*texts[number], block_size)
            assert (context, scored) == (row.context, ending)
            for k in range(len(scored)):
                source = batch.predictors[batch.sources[at]].item()
                b, t = divmod(source, batch.tokens.size(1))
                assert torch.equal(mask, batch.mask[b, 0])
                seen = mask[t].nonzero().flatten()
                assert flat[b * batch.tokens.size(1) + seen].tolist() == context + scored[:k]
                assert batch.positions[b, seen].tolist() == list(range(len(context) + k))
                assert batch.targets[at] == scored[k]
                at += 1
    assert at == len(batch.targets) == batch.counts.sum()


def test_batches_take_every_row_once_within_the_budget():
    rows = rows_of(make_texts(300, context=(10, 40)), CONFIG.block_size)
    made = list(batches(rows, 512))
    assert sorted(map(id, rows)) == sorted(id(row) for batch in made for row in batch)
    padded = [len(batch) * max(map(len, batch)) for batch in made]
    assert max(padded) <= 512
    assert sum(padded) < 1.05 * sum(map(len, rows))
    assert [len(batch) for batch in batches(rows, 1)] == [1] * len(rows)


def test_real_examples_are_half_of_the_tokens_with_little_padding(real):
    for protocol in PROTOCOLS:
        texts = [text for example in real[::20] for text in tokenize(example, protocol)]
        padded = sum(len(batch) * len(batch[0]) for batch in batches(rows_of(texts, 1024), 1024))
        assert padded < 0.54 * sum(len(context) + len(ending) - 1 for context, ending in texts)


@pytest.mark.parametrize("text", [([], [1]), ([1], [])])
def test_texts_without_tokens_are_refused(text):
    with pytest.raises(ValueError, match="no likelihood"):
        score(make_model(), [([1], [2]), text])


def test_rows_and_logits_in_pieces_are_the_whole(monkeypatch):
    model, texts = make_model(), make_texts(10) + [([1, 2, 3], [i, i]) for i in range(100)]
    whole = score(model, texts, greedy=True)
    monkeypatch.setattr(scoring, "ROW_TOKENS", 20)
    monkeypatch.setitem(scoring.LOGIT_ROWS, "cpu", 7)
    monkeypatch.setitem(scoring.SOFTMAX_ROWS, "cpu", 3)
    pieces = score(model, texts, greedy=True)
    close(*([s.log_likelihood for s in found] for found in (pieces, whole)))
    assert [s.greedy for s in pieces] == [s.greedy for s in whole]
    assert max(map(len, rows_of(texts[40:], CONFIG.block_size))) == 20


def test_padding_rows_of_the_embedding_are_never_counted():
    model, texts = make_model(), make_texts()
    before = likely(model, texts)
    with torch.no_grad():
        model.wte.weight[V:] = 100.0
    np.testing.assert_array_equal(likely(model, texts), before)


def test_bfloat16_keeps_the_choices_and_the_model():
    model, texts = make_model(), make_texts(50)
    before = {name: (p, p._version, p.data_ptr()) for name, p in model.named_parameters()}
    exact, rough = (likely(model, texts, dtype=dtype) for dtype in (torch.float32, torch.bfloat16))
    assert 0 < np.abs(exact - rough).max() < 0.02 * np.abs(exact).max()
    assert (exact.reshape(-1, 4).argmax(1) == rough.reshape(-1, 4).argmax(1)).mean() >= 0.98
    assert {name: (p, p._version, p.data_ptr()) for name, p in model.named_parameters()} == before
    assert all(p.grad is None and p.requires_grad for p in model.parameters())
    assert torch.is_grad_enabled()


def test_bfloat16_bears_logits_far_from_zero_as_trained_models_have_them():
    """What all embeddings share moves every logit alike, here to about -100, and no probability."""
    model, texts = make_model(), make_texts(30)
    with torch.no_grad():
        model.wte.weight[:, 0] -= 10.0
        model.ln_f.bias[0] += 16.0
        assert model(torch.tensor([texts[0][0]])).mean() < -90
    exact = plain(model, texts)
    with torch.autocast("cpu", torch.bfloat16):
        rounded = np.abs(plain(model, texts) - exact).mean()
    assert np.abs(likely(model, texts, dtype=torch.bfloat16) - exact).mean() < rounded / 3


def test_greedy_says_whether_an_ending_is_the_likeliest_text():
    model, start = make_model(), [5, 6, 7]
    likeliest = list(generate(model, start, 6, temperature=0))
    other = [*likeliest[:5], (likeliest[5] + 1) % V]
    found = score(model, [(start, ending) for ending in (likeliest, other, likeliest[:1])], greedy=True)
    assert [s.greedy for s in found] == [True, False, True]


@pytest.mark.fault(30)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
def test_a_likelihood_that_is_not_finite_is_never_a_score(dtype):
    model = make_model()
    with torch.no_grad():
        model.ln_f.weight.fill_(3e38)  # finite, but no product with it is
    with pytest.raises(DataError, match="likelihoods that are not finite"):
        score(model, make_texts(), dtype=dtype)


def test_what_overflows_in_half_precision_is_scored_in_float32():
    model, texts = make_model(), make_texts()
    with torch.no_grad():
        model.h[0].ln_2.weight.mul_(1e5)  # past float16's 65,504 in the MLP
        model.h[0].mlp.c_fc.weight.mul_(1e-4)
    close(likely(model, texts, dtype=torch.float16), likely(model, texts))
    ranks = []  # another rank has more batches, and each of them overflows there
    found = likely(model, texts, most=lambda number: ranks.append(number) or number + 1, dtype=torch.bfloat16)
    assert np.array_equal(found, likely(model, texts, dtype=torch.bfloat16))
    assert ranks[1:] == [0] * (ranks[0] + 1)
