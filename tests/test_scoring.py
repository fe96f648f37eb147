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
from aymen_gpt.evaluation.scoring import TokenizedExample, batches, collate, fit, rows_of, score
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


def make_examples(n=12, seed=0, context=(1, 20), ending=(1, 12)):
    rng = np.random.default_rng(seed)
    draw = lambda low, high: rng.integers(0, V, rng.integers(low, high + 1)).tolist()  # noqa: E731
    return [TokenizedExample(draw(*context), [draw(*ending) for _ in range(4)]) for _ in range(n)]


@torch.no_grad()
def plain(logits_of, examples, block_size=CONFIG.block_size, vocab_size=V):
    """One forward pass per ending; texts cut on the left to block_size inputs, as lm-evaluation-harness does."""
    out = []
    for example in examples:
        sums = []
        for ending in example.endings:
            text = (example.context + ending)[-(block_size + 1) :]
            log_p = logits_of(torch.tensor([text[:-1]]))[0, :, :vocab_size].float().log_softmax(-1)
            n = min(len(ending), block_size)
            sums.append(sum(log_p[-n + i, t].item() for i, t in enumerate(text[-n:])))
        out.append(sums)
    return np.array(out)


def likelihoods(scores):
    return np.array([s.log_likelihoods for s in scores])


def test_log_likelihoods_equal_hugging_face():
    model, examples = make_model(), make_examples()
    theirs = GPT2LMHeadModel(GPT2Config(**config_to_huggingface(CONFIG))).eval()
    state = to_huggingface(model.state_dict(), V)
    assert theirs.load_state_dict(state, strict=False).missing_keys == ["lm_head.weight"]
    theirs.tie_weights()
    expected = plain(lambda ids: theirs(ids).logits, examples)
    assert np.ptp(expected, axis=1).min() > 1  # the endings do differ
    np.testing.assert_allclose(likelihoods(score(model, examples)), expected, atol=1e-4)


@settings(max_examples=50, deadline=None)
@given(st.data())
def test_any_lengths_and_any_number_of_endings(data):
    """Texts too long for the model lose their beginning; the order and the size of batches change nothing."""
    block_size = data.draw(st.sampled_from([4, 16, 48]))
    tokens = st.lists(st.integers(0, V - 1), min_size=1, max_size=60)
    lists = st.lists(tokens, min_size=1, max_size=5)
    examples = [TokenizedExample(data.draw(tokens), data.draw(lists)) for _ in range(data.draw(st.integers(0, 4)))]
    model = make_model(replace(CONFIG, block_size=block_size))
    found = score(model, examples, batch_tokens=data.draw(st.sampled_from([1, 100, 10**6])))
    for example, scores in zip(examples, found, strict=True):
        np.testing.assert_allclose(scores.log_likelihoods, plain(model, [example], block_size)[0], atol=1e-4)
        assert scores.token_counts == [min(len(e), block_size) for e in example.endings]


tokens = st.integers(0, 3)  # few, so that contexts are alike by chance
tiny_example = st.builds(
    TokenizedExample,
    st.lists(tokens, min_size=1, max_size=6),
    st.lists(st.lists(tokens, min_size=1, max_size=6), min_size=1, max_size=4),
)


@settings(max_examples=200, deadline=None)
@given(st.lists(tiny_example, min_size=1, max_size=4), st.integers(1, 8))
def test_a_token_sees_its_text_and_no_other(examples, block_size):
    rows = rows_of(examples, block_size)
    assert sorted(place for row in rows for place in row.places) == [
        (i, j) for i, example in enumerate(examples) for j in range(len(example.endings))
    ]
    assert len({tuple(row.context) for row in rows}) == len(rows)  # no context stands twice
    batch = collate(rows, torch.device("cpu"))
    flat, at = batch.tokens.flatten(), 0
    for row, mask in zip(rows, batch.mask[:, 0], strict=True):
        for (i, j), ending in zip(row.places, row.endings, strict=True):
            context, scored = fit(examples[i].context, examples[i].endings[j], block_size)
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
    rows = rows_of(make_examples(300, context=(10, 40)), CONFIG.block_size)
    made = list(batches(rows, 512))
    assert sorted(map(id, rows)) == sorted(id(row) for batch in made for row in batch)
    padded = [len(batch) * max(map(len, batch)) for batch in made]
    assert max(padded) <= 512
    assert sum(padded) < 1.05 * sum(map(len, rows))
    assert [len(batch) for batch in batches(rows, 1)] == [1] * len(rows)


def test_a_context_with_very_many_endings_is_several_rows(monkeypatch):
    model, examples = make_model(), [TokenizedExample([1, 2, 3], [[i, i] for i in range(100)])]
    whole = likelihoods(score(model, examples))
    monkeypatch.setattr(scoring, "ROW_TOKENS", 20)
    assert max(map(len, rows_of(examples, CONFIG.block_size))) == 20
    np.testing.assert_allclose(likelihoods(score(model, examples)), whole, atol=1e-4)


def test_real_examples_are_half_of_the_tokens_with_little_padding(real):
    for protocol in PROTOCOLS:
        examples = [tokenize(example, protocol) for example in real[::20]]
        padded = sum(len(batch) * len(batch[0]) for batch in batches(rows_of(examples, 1024), 1024))
        apart = sum(len(x.context) + len(ending) - 1 for x in examples for ending in x.endings)
        assert padded < 0.54 * apart


@pytest.mark.parametrize(("context", "endings"), [([], [[1]]), ([1], [[2], []])])
def test_texts_without_tokens_are_refused(context, endings):
    with pytest.raises(ValueError, match="no likelihood"):
        TokenizedExample(context, endings)


def test_padding_rows_of_the_embedding_are_never_counted():
    model, examples = make_model(), make_examples()
    before = likelihoods(score(model, examples))
    with torch.no_grad():
        model.wte.weight[V:] = 100.0
    np.testing.assert_array_equal(likelihoods(score(model, examples)), before)


def test_bfloat16_keeps_the_choices_and_the_model():
    model, examples = make_model(), make_examples(50)
    exact = likelihoods(score(model, examples))
    rough = likelihoods(score(model, examples, dtype=torch.bfloat16))
    assert 0 < np.abs(exact - rough).max() < 0.02 * np.abs(exact).max()
    assert (exact.argmax(1) == rough.argmax(1)).mean() >= 0.98
    assert model.wte.weight.dtype == torch.float32


def test_bfloat16_bears_logits_far_from_zero_as_trained_models_have_them():
    """What all embeddings share moves every logit alike, here to about -100, and no probability."""
    model, examples = make_model(), make_examples(30)
    with torch.no_grad():
        model.wte.weight[:, 0] -= 10.0
        model.ln_f.bias[0] += 16.0
        assert model(torch.tensor([examples[0].context])).mean() < -90
    exact = plain(model, examples)
    with torch.autocast("cpu", torch.bfloat16):
        rounded = np.abs(plain(model, examples) - exact).mean()
    ours = np.abs(likelihoods(score(model, examples, dtype=torch.bfloat16)) - exact).mean()
    assert ours < rounded / 3


def test_greedy_says_whether_an_ending_is_the_likeliest_text():
    model = make_model()
    start = [5, 6, 7]
    likeliest = list(generate(model, start, 6, temperature=0))
    other = [*likeliest[:5], (likeliest[5] + 1) % V]
    found = score(model, [TokenizedExample(start, [likeliest, other, likeliest[:1]])], greedy=True)
    assert found[0].greedy == [True, False, True]


def test_logits_in_pieces_are_the_whole(monkeypatch):
    model, examples = make_model(), make_examples(10)
    whole = score(model, examples, greedy=True)
    monkeypatch.setitem(scoring.LOGIT_ROWS, "cpu", 7)
    monkeypatch.setitem(scoring.SOFTMAX_ROWS, "cpu", 3)
    pieces = score(model, examples, greedy=True)
    np.testing.assert_allclose(likelihoods(pieces), likelihoods(whole), atol=1e-4)
    assert [s.greedy for s in pieces] == [s.greedy for s in whole]


def test_the_model_is_only_read():
    model = make_model()
    before = {name: (p, p._version, p.data_ptr()) for name, p in model.named_parameters()}
    score(model, make_examples(), dtype=torch.bfloat16)
    assert {name: (p, p._version, p.data_ptr()) for name, p in model.named_parameters()} == before
    assert all(p.grad is None and p.requires_grad for p in model.parameters())
    assert torch.is_grad_enabled()


@pytest.mark.fault(30)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
def test_a_likelihood_that_is_not_finite_is_never_a_score(dtype):
    model = make_model()
    with torch.no_grad():
        model.ln_f.weight.fill_(3e38)  # finite, but no product with it is
    with pytest.raises(DataError, match="likelihoods that are not finite"):
        score(model, make_examples(), dtype=dtype)


def test_what_overflows_in_half_precision_is_scored_in_float32():
    model, examples = make_model(), make_examples()
    with torch.no_grad():
        model.h[0].ln_2.weight.mul_(1e5)  # past float16's 65,504 in the MLP
        model.h[0].mlp.c_fc.weight.mul_(1e-4)
    exact = likelihoods(score(model, examples))
    np.testing.assert_allclose(likelihoods(score(model, examples, dtype=torch.float16)), exact, atol=1e-4)
