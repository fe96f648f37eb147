"""HellaSwag: what is chosen, and what is counted."""

import copy
import gc
import json
from dataclasses import replace

import numpy as np
import pytest
import torch
from questions import CONFIG, EXAMPLES, HOW_TO, VIDEO, make_model
from test_rendering import harness_text

from aymen_gpt.errors import DataError
from aymen_gpt.evaluation import hellaswag
from aymen_gpt.evaluation.hellaswag import Tally, evaluate
from aymen_gpt.evaluation.partial import PartialScores
from aymen_gpt.evaluation.rendering import tokenize
from aymen_gpt.evaluation.scoring import EndingScores
from aymen_gpt.model.gpt import GPT, GPTConfig


def test_length_counts_in_tokens_or_in_characters():
    scores = EndingScores([-10.0, -9.0, -12.0, -30.0], [4, 3, 6, 9])
    texts = replace(VIDEO, endings=["a" * 10, "b" * 2, "c" * 11, "d" * 60])
    completion = hellaswag.answer(texts, scores, "completion")
    assert (completion.choice, completion.choice_norm) == (1, 2)  # -12 / 6 tokens
    harness = hellaswag.answer(texts, scores, "harness")
    assert (harness.choice, harness.choice_norm) == (1, 3)  # -30 / 60 characters


def test_characters_are_those_of_the_cleaned_text():
    texts = replace(VIDEO, endings=["naïve", "[cut away] abcd", "  abcdefg  ", "ab"])
    scores = EndingScores([-5.0, -6.0, -6.9, -20.0], [1, 1, 1, 1])
    assert hellaswag.answer(texts, scores, "harness").choice_norm == 2  # -6.9 / 7 beats -5 / 5 and -6 / 5


def test_of_equals_the_first_is_chosen():
    scores = EndingScores([-4.0, -2.0, -2.0, -2.0], [2, 1, 1, 1])
    answer = hellaswag.answer(VIDEO, scores, "completion")
    assert (answer.choice, answer.choice_norm) == (1, 0)


def test_standard_error_is_that_of_the_sample_mean():
    right = np.repeat([1.0, 0.0], [334, 666])
    s = Tally(1000, 334, 250).as_dict()
    assert s["acc"] == right.mean()
    assert s["acc_stderr"] == pytest.approx(right.std(ddof=1) / 1000**0.5, rel=1e-12)
    assert s["acc_norm"] == 0.25
    assert Tally(1, 1, 0).as_dict()["acc_stderr"] is None


@pytest.mark.parametrize("protocol", hellaswag.PROTOCOLS)
def test_evaluate_chooses_as_a_plain_scorer_does(real, protocol):
    """One row per ending, all logits, with the texts cut on the left to the model's 64 tokens."""
    model, examples = make_model(), [*EXAMPLES, *real[5::1500]]
    found = evaluate(model, examples, protocols=[protocol])
    for example, answer in zip(examples, found.answers[protocol], strict=True):
        tokens = tokenize(example, protocol)
        sums = []
        for ending in tokens.endings:
            text = (tokens.context + ending)[-65:]
            with torch.no_grad():
                log_p = model(torch.tensor([text[:-1]]))[0].log_softmax(-1)
            n = min(len(ending), 64)
            sums.append(log_p[-n:].gather(1, torch.tensor(text[-n:])[:, None]).sum().item())
        np.testing.assert_allclose(answer.log_likelihoods, sums, atol=1e-3)
        lengths = [len(e) for e in tokens.endings]
        if protocol == "harness":
            lengths = [max(1, len(harness_text(e))) for e in example.endings]
        assert answer.choice == int(np.argmax(sums))
        assert answer.choice_norm == int(np.argmax(np.array(sums) / lengths))


def test_the_record_has_every_answer():
    result = evaluate(make_model(), EXAMPLES)
    found = json.loads(json.dumps(result.as_dict(), allow_nan=False))
    assert found["n"] == 3
    for protocol in ("completion", "harness"):
        assert found[protocol].keys() == {"acc", "acc_stderr", "acc_norm", "acc_norm_stderr", "questions_sha256"}
        rows = [row[protocol] for row in found["examples"]]
        right = [row["choice"] == e.label for row, e in zip(rows, EXAMPLES, strict=True)]
        assert found[protocol]["acc"] == sum(right) / 3
        assert all(len(row["log_likelihoods"]) == len(row["token_counts"]) == 4 for row in rows)
    assert [(row["ind"], row["label"]) for row in found["examples"]] == [(24, 2), (7, 0), (8, 1)]


@pytest.mark.parametrize("protocol", hellaswag.PROTOCOLS)
def test_the_hash_of_questions_is_that_of_what_the_model_reads(protocol):
    changes = [
        {"ctx_b": "he quickly", "ctx": "Another."},
        {"endings": [*VIDEO.endings[:3], "leaves."]},
        {"label": 1},
    ]
    sets = [EXAMPLES[:2], *([replace(VIDEO, **change), HOW_TO] for change in changes)]
    assert len({hellaswag.questions_sha256(examples, protocol) for examples in sets}) == 4
    unread = {"completion": {"activity_label": "x"}, "harness": {"ctx": "x"}}[protocol]
    same = [replace(VIDEO, ind=9, **unread), HOW_TO]
    assert hellaswag.questions_sha256(same, protocol) == hellaswag.questions_sha256(EXAMPLES[:2], protocol)


def test_the_tallies_of_ranks_add_up(real):
    model, examples = make_model(), real[:7]
    whole = evaluate(model, examples)
    for world_size in (2, 3):
        parts = [evaluate(model, examples[rank::world_size]) for rank in range(world_size)]
        for protocol in hellaswag.PROTOCOLS:
            tallies = [part.tally(protocol) for part in parts]
            sums = [sum(getattr(t, name) for t in tallies) for name in ("n", "correct", "correct_norm")]
            assert Tally(*sums) == whole.tally(protocol)


@pytest.mark.fault(52)
def test_a_checkpoint_with_50304_rows_scores_as_with_50257():
    model = make_model()
    wide = GPT(GPTConfig(**{**vars(CONFIG), "vocab_size": 50304})).eval()
    state = {name: t.clone() for name, t in model.state_dict().items()}
    state["wte.weight"][50257:] = 3.0
    wide.load_state_dict(state)
    assert evaluate(wide, EXAMPLES).tally("completion") == evaluate(model, EXAMPLES).tally("completion")
    ours, theirs = (evaluate(m, EXAMPLES).answers["harness"] for m in (wide, model))
    for a, b in zip(ours, theirs, strict=True):
        np.testing.assert_allclose(a.log_likelihoods, b.log_likelihoods, atol=1e-4)


def test_a_model_of_another_vocabulary_is_refused():
    model = GPT(GPTConfig(block_size=8, vocab_size=100, n_layer=1, n_head=1, n_embd=8))
    with pytest.raises(DataError, match="knows 100 tokens"):
        evaluate(model, EXAMPLES)


def test_progress_counts_examples_over_both_protocols():
    heard = []
    evaluate(make_model(), EXAMPLES, batch_tokens=50, progress=lambda *at: heard.append(at))
    assert heard[-1] == (6, 6)
    assert (3, 6) in heard
    assert heard == sorted(heard)


def test_the_results_of_ranks_merge_to_the_whole(real):
    model, examples = make_model(), real[:7]
    whole = evaluate(model, examples)
    for world_size in (1, 2, 3):
        merged = hellaswag.merge([evaluate(model, examples[rank::world_size]) for rank in range(world_size)])
        assert merged.examples == examples
        for protocol in hellaswag.PROTOCOLS:
            assert merged.tally(protocol) == whole.tally(protocol)
            for a, b in zip(merged.answers[protocol], whole.answers[protocol], strict=True):
                np.testing.assert_allclose(a.log_likelihoods, b.log_likelihoods, atol=1e-4)


def test_what_is_partly_scored_is_gone_on_with(real, tmp_path):
    model, examples = make_model(), real[:30]
    whole = evaluate(model, examples, batch_tokens=500)
    first = PartialScores(tmp_path)
    heard = []

    def tire(done, total):
        heard.append(done)
        if done >= 40:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        evaluate(model, examples, batch_tokens=500, partial=first, progress=tire)
    again = PartialScores(tmp_path, resume=True)
    assert again.n_known == heard[-1]
    heard.clear()
    result = evaluate(
        model, examples, batch_tokens=500, partial=again, progress=lambda done, total: heard.append(done)
    )
    assert heard[0] == 30  # completion was done
    assert heard[1] >= 40
    assert result == whole


def test_scores_without_gradients_leave_a_compiled_training_step_alone(real):
    """As in training, every so often: the step is not compiled again, and no graph or gradient is left behind."""
    torch._dynamo.reset()
    model = make_model()
    step = torch.compile(lambda x: model(x).logsumexp(-1).sum(), backend="aot_eager", dynamic=False)
    x = torch.randint(0, 1000, (2, 32), generator=torch.Generator().manual_seed(0))

    def gradients():
        model.zero_grad()
        step(x).backward()
        return [p.grad.clone() for p in model.parameters()]

    before = gradients()
    assert torch._dynamo.utils.counters["stats"]["unique_graphs"] > 0
    with torch._dynamo.config.patch(error_on_recompile=True):
        counted = copy.deepcopy(torch._dynamo.utils.counters)
        tensors = count_tensors()
        for dtype in (torch.bfloat16, torch.float32):
            evaluate(model, real[:5], protocols=("completion",), dtype=dtype)
        assert count_tensors() == tensors
        after = gradients()
    assert torch._dynamo.utils.counters["stats"] == counted["stats"]
    assert all(torch.equal(a, b) for a, b in zip(before, after, strict=True))


def count_tensors():
    gc.collect()
    return sum(issubclass(type(thing), torch.Tensor) for thing in gc.get_objects())
