"""The packed scorer against the plain one: a row per ending, all logits, float32."""

import copy

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from transformers import GPT2Config, GPT2LMHeadModel

from aymen_gpt.errors import DataError
from aymen_gpt.evaluation import forward
from aymen_gpt.evaluation.packing import TokenizedExample
from aymen_gpt.evaluation.scoring import score, score_batches
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


def test_log_likelihoods_equal_one_row_per_ending():
    model, examples = make_model(), make_examples(30)
    ours, theirs = likelihoods(score(model, examples)), plain(model, examples)
    assert np.ptp(theirs, axis=1).min() > 1  # the endings do differ
    np.testing.assert_allclose(ours, theirs, atol=1e-4)
    assert (ours.argmax(1) == theirs.argmax(1)).all()


def test_log_likelihoods_equal_hugging_face():
    model, examples = make_model(), make_examples()
    theirs = GPT2LMHeadModel(GPT2Config(**config_to_huggingface(CONFIG))).eval()
    state = to_huggingface(model.state_dict(), V)
    assert theirs.load_state_dict(state, strict=False).missing_keys == ["lm_head.weight"]
    theirs.tie_weights()
    expected = plain(lambda ids: theirs(ids).logits, examples)
    np.testing.assert_allclose(likelihoods(score(model, examples)), expected, atol=1e-4)


@settings(max_examples=25, deadline=None)
@given(st.data())
def test_any_lengths_and_any_number_of_endings(data):
    tokens = st.lists(st.integers(0, V - 1), min_size=1, max_size=60)
    lists = st.lists(tokens, min_size=1, max_size=5)
    examples = [TokenizedExample(data.draw(tokens), data.draw(lists)) for _ in range(3)]
    model = make_model()
    for example, scores in zip(examples, score(model, examples, batch_tokens=100), strict=True):
        np.testing.assert_allclose(scores.log_likelihoods, plain(model, [example])[0], atol=1e-4)
        assert scores.token_counts == [min(len(e), CONFIG.block_size) for e in example.endings]


@pytest.mark.parametrize("block_size", [4, 9, 16])
def test_texts_too_long_for_the_model_lose_their_beginning(block_size):
    config = GPTConfig(block_size=block_size, vocab_size=V, n_layer=2, n_head=2, n_embd=32)
    model, examples = make_model(config), make_examples()
    assert any(len(e.context) + len(x) > block_size + 1 for e in examples for x in e.endings)
    np.testing.assert_allclose(likelihoods(score(model, examples)), plain(model, examples, block_size), atol=1e-4)


def test_an_ending_longer_than_the_model_counts_the_tokens_it_scores():
    config = GPTConfig(block_size=4, vocab_size=V, n_layer=1, n_head=1, n_embd=8)
    scores = score(make_model(config), [TokenizedExample([1, 2], [[3] * 3, [4] * 9])])
    assert scores[0].token_counts == [3, 4]


def test_batch_size_does_not_change_the_scores():
    model, examples = make_model(), make_examples(20)
    whole = likelihoods(score(model, examples, batch_tokens=10**6))
    for batch_tokens in (1, 64, 500):
        np.testing.assert_allclose(
            likelihoods(score(model, examples, batch_tokens=batch_tokens)), whole, atol=1e-4
        )


def test_ranks_score_their_share_to_the_same_numbers():
    model, examples = make_model(), make_examples(10)
    whole = likelihoods(score(model, examples))
    for world_size in (2, 3):
        for rank in range(world_size):
            part = likelihoods(score(model, examples[rank::world_size]))
            np.testing.assert_allclose(part, whole[rank::world_size], atol=1e-4)


def test_an_ending_does_not_see_the_others():
    model = make_model()
    a, b, c = [5, 6, 7], [8, 9], [10, 11, 12, 13]
    first = score(model, [TokenizedExample([1, 2, 3], [a, b])])[0].log_likelihoods[0]
    second = score(model, [TokenizedExample([1, 2, 3], [c, c, a])])[0].log_likelihoods[2]
    assert first == pytest.approx(second, abs=1e-5)


def test_padding_rows_of_the_embedding_are_never_counted():
    model, examples = make_model(), make_examples()
    before = likelihoods(score(model, examples))
    with torch.no_grad():
        model.wte.weight[V:] = 100.0
    np.testing.assert_array_equal(likelihoods(score(model, examples)), before)


@pytest.mark.fault(52)
def test_vocab_size_leaves_out_columns_that_a_checkpoint_carries_as_padding():
    small, examples = make_model(), make_examples()
    wide = make_model(GPTConfig(**{**vars(CONFIG), "vocab_size": 384}))
    state = copy.deepcopy(small.state_dict())
    state["wte.weight"][V:] = 1.0
    wide.load_state_dict(state)
    expected = likelihoods(score(small, examples))
    assert np.abs(likelihoods(score(wide, examples)) - expected).max() > 0.1
    np.testing.assert_allclose(likelihoods(score(wide, examples, vocab_size=V)), expected, atol=1e-5)


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


def test_without_onednns_linear_layers_the_scores_are_the_same(monkeypatch):
    """As on a GPU or another CPU; where oneDNN is not used anyway both are plain."""
    model, examples = make_model(), make_examples(20)
    for dtype, near in ((torch.float32, 1e-4), (torch.bfloat16, 1.0)):
        monkeypatch.undo()
        ours = likelihoods(score(model, examples, dtype=dtype))
        monkeypatch.setattr(forward, "has_onednn", lambda weight: False)
        np.testing.assert_allclose(ours, likelihoods(score(model, examples, dtype=dtype)), atol=near)


def test_greedy_says_whether_an_ending_is_the_likeliest_text():
    model = make_model()
    start = [5, 6, 7]
    likeliest = list(generate(model, start, 6, temperature=0))
    other = [*likeliest[:5], (likeliest[5] + 1) % V]
    found = score(model, [TokenizedExample(start, [likeliest, other, likeliest[:1]])], greedy=True)
    assert found[0].greedy == [True, False, True]
    assert score(model, [TokenizedExample(start, [likeliest])])[0].greedy is None


def test_logits_in_pieces_are_the_whole(monkeypatch):
    model, examples = make_model(), make_examples(10)
    whole = score(model, examples, greedy=True)
    monkeypatch.setitem(forward.LOGITS, "cpu", (7, 64))
    pieces = score(model, examples, greedy=True)
    np.testing.assert_allclose(likelihoods(pieces), likelihoods(whole), atol=1e-4)
    assert [s.greedy for s in pieces] == [s.greedy for s in whole]


def test_what_is_known_is_left_out_and_changes_nothing():
    model, examples = make_model(), make_examples(40)
    whole = list(score_batches(model, examples, batch_tokens=200))
    assert len(whole) > 5
    known = {i for batch in whole[1:3] for i in batch} | set(list(whole[4])[1:])
    rest = list(score_batches(model, examples, batch_tokens=200, known=known))
    assert rest == whole[:1] + whole[3:]  # to the last bit, and a batch half known is done again


def test_the_model_is_only_read():
    model = make_model()
    before = {name: (p, p._version, p.data_ptr()) for name, p in model.named_parameters()}
    list(score_batches(model, make_examples(), dtype=torch.bfloat16))
    assert {name: (p, p._version, p.data_ptr()) for name, p in model.named_parameters()} == before
    assert all(p.grad is None and p.requires_grad for p in model.parameters())
    assert torch.is_grad_enabled()


def test_grad_mode_is_the_callers_between_batches():
    for _ in score_batches(make_model(), make_examples(), batch_tokens=100):
        assert torch.is_grad_enabled()


def test_no_examples_no_scores():
    assert score(make_model(), []) == []


@pytest.mark.fault(30)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
def test_a_likelihood_that_is_not_finite_is_never_a_score(dtype):
    model = make_model()
    with torch.no_grad():
        model.ln_f.weight.fill_(3e38)  # finite, but no product with it is
    with pytest.raises(DataError, match="likelihoods that are not finite"):
        score(model, make_examples(), dtype=dtype)
