"""HellaSwag: what the model reads (against a second statement of it), what is chosen, and what is counted."""

import copy
import gc
import json
from dataclasses import replace

import numpy as np
import pytest
import torch
from questions import EXAMPLES, HOW_TO, ODD, VIDEO, make_model

from aymen_gpt.data import tokenizer
from aymen_gpt.evaluation import hellaswag
from aymen_gpt.evaluation.hellaswag import Answer, Result, evaluate, render, tokenize
from aymen_gpt.evaluation.scoring import Score


@pytest.mark.parametrize(
    ("example", "context", "endings"),
    [
        (
            VIDEO,
            "Roof work: A man is sitting on a roof. He slowly",
            ["pulls up tiles.", "wraps skis.", "sings to a cat twice.", "leaves, naïvely."],
        ),
        (
            HOW_TO,
            "Food and Entertaining: How to make tea. Boil water. Use a kettle.",
            [" Wait.", "Pour it. Drink. Slowly.", " Stop.", "Add  milk."],
        ),
        (ODD, "Odd here: One two  three.  École ends ", ["", "", "a. ", "x"]),
    ],
)
def test_texts_and_tokens_of_the_harness_by_eye(example, context, endings):
    """Blanks that end a context go to the endings. test_lm_eval_bridge.py asks the harness itself."""
    assert render(example, "harness") == (context, endings)
    encode = tokenizer.gpt2().encode_ordinary
    ids, blanks = encode(context.rstrip()), context[len(context.rstrip()) :]
    assert tokenize(example, "harness") == [(ids, encode(f"{blanks} {ending}")) for ending in endings]


def test_completion_texts_are_untouched_and_tokenized_apart():
    assert render(HOW_TO, "completion") == (HOW_TO.ctx, HOW_TO.endings)
    encode = tokenizer.gpt2().encode_ordinary
    texts = [(encode(HOW_TO.ctx), encode(" " + ending)) for ending in HOW_TO.endings]
    assert tokenize(HOW_TO, "completion") == texts


def test_length_counts_in_tokens_or_in_characters_of_the_cleaned_text():
    scores = [Score(*values, False) for values in ((-10.0, 4), (-9.0, 3), (-12.0, 6), (-30.0, 9))]
    texts = replace(VIDEO, endings=["a" * 10, "b" * 2, "c" * 11, "[cut away]" + "d" * 60])
    completion, harness = (hellaswag.answer(texts, scores, protocol) for protocol in hellaswag.PROTOCOLS)
    assert (completion.choice, completion.choice_norm) == (1, 2)  # -12 / 6 tokens
    assert (harness.choice, harness.choice_norm) == (1, 3)  # -30 / 60 characters
    scores = [Score(*values, False) for values in ((-4.0, 2), (-2.0, 1), (-2.0, 1), (-2.0, 1))]
    tied = hellaswag.answer(VIDEO, scores, "completion")
    assert (tied.choice, tied.choice_norm) == (1, 0)  # of equals the first


def test_accuracies_are_means_with_the_error_of_the_sample_mean():
    right = np.repeat([1.0, 0.0], [334, 666])
    answers = [Answer([], [], choice=2 if hit else 3, choice_norm=0) for hit in right]
    found = Result([VIDEO] * 1000, {"harness": answers}).scores("harness")
    error = pytest.approx(right.std(ddof=1) / 1000**0.5, rel=1e-12)
    assert found == {"acc": 0.334, "acc_stderr": error, "acc_norm": 0.0, "acc_norm_stderr": 0.0}
    one = Result([VIDEO], {"harness": answers[:1]}).scores("harness")
    assert one == {"acc": 1.0, "acc_stderr": None, "acc_norm": 0.0, "acc_norm_stderr": None}


@pytest.mark.parametrize("protocol", hellaswag.PROTOCOLS)
def test_evaluate_chooses_as_a_plain_scorer_does(real, protocol):
    """One row per ending, all logits, with the texts cut on the left to the model's 64 tokens."""
    model, examples = make_model(), [*EXAMPLES, *real[5::1500]]
    found = evaluate(model, examples, protocols=[protocol])
    for example, answer in zip(examples, found.answers[protocol], strict=True):
        sums, lengths = [], []
        for context, ending in tokenize(example, protocol):
            text = (context + ending)[-65:]
            with torch.no_grad():
                log_p = model(torch.tensor([text[:-1]]))[0].log_softmax(-1)
            n = min(len(ending), 64)
            sums.append(log_p[-n:].gather(1, torch.tensor(text[-n:])[:, None]).sum().item())
            lengths.append(len(ending))
        np.testing.assert_allclose(answer.log_likelihoods, sums, atol=1e-3)
        if protocol == "harness":
            lengths = [max(1, len(e)) for e in render(example, protocol)[1]]
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


@pytest.mark.parametrize("protocols", [("harness",), hellaswag.PROTOCOLS])
def test_progress_counts_examples_whatever_the_protocols(protocols):
    heard = []
    evaluate(make_model(), EXAMPLES, protocols=protocols, batch_tokens=50, progress=lambda *at: heard.append(at))
    assert heard[0] == (0, 3)
    assert heard[-1] == (3, 3)
    assert heard == sorted(heard)


def test_the_results_of_ranks_merge_to_the_whole(real):
    model, examples = make_model(), real[:7]
    whole = evaluate(model, examples)
    for world_size in (1, 2, 3):
        merged = hellaswag.merge([evaluate(model, examples[rank::world_size]) for rank in range(world_size)])
        assert merged.examples == examples
        for protocol in hellaswag.PROTOCOLS:
            assert merged.scores(protocol) == whole.scores(protocol)
            likely = ([a.log_likelihoods for a in result.answers[protocol]] for result in (merged, whole))
            np.testing.assert_allclose(*likely, atol=1e-4)


@pytest.mark.slow
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
