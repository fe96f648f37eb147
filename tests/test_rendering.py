"""The two renderings of an example, against a second statement of them, and the cache of their tokens."""

from dataclasses import replace

import pytest
from questions import EXAMPLES, HOW_TO, VIDEO

from aymen_gpt.data import tokenizer
from aymen_gpt.evaluation import rendering
from aymen_gpt.evaluation.rendering import tokenize


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
    context, endings = rendering.render_harness(example)
    assert endings == [harness_text(ending) for ending in example.endings]
    ours = tokenize(example, "harness")
    assert [(ours.context, ending) for ending in ours.endings] == list(harness_pairs(example))
    assert "[" not in context + "".join(endings)


def test_harness_tokens_are_the_harnesses_on_real_rows(real):
    for example in real[::100]:
        ours = tokenize(example, "harness")
        assert [(ours.context, ending) for ending in ours.endings] == list(harness_pairs(example))


def test_harness_texts_by_eye():
    assert rendering.render_harness(VIDEO) == (
        "Roof work: A man is sitting on a roof. He slowly",
        ["pulls up tiles.", "wraps skis.", "sings to a cat twice.", "leaves, naïvely."],
    )
    assert rendering.render_harness(HOW_TO) == (
        "Food and Entertaining: How to make tea. Boil water. Use a kettle.",
        [" Wait.", "Pour it. Drink. Slowly.", " Stop.", "Add  milk."],
    )


def test_completion_texts_are_untouched_and_tokenized_apart():
    assert rendering.render_completion(HOW_TO) == (HOW_TO.ctx, HOW_TO.endings)
    decode = tokenizer.gpt2().decode
    tokens = tokenize(HOW_TO, "completion")
    assert decode(tokens.context) == HOW_TO.ctx
    assert [decode(ending) for ending in tokens.endings] == [" " + ending for ending in HOW_TO.endings]


def test_every_real_example_has_tokens_in_both_protocols(real):
    for example in real[::50]:
        for protocol in rendering.PROTOCOLS:
            assert len(tokenize(example, protocol).endings) == 4


def test_tokens_of_a_set_are_made_once(real, own_cache, monkeypatch):
    examples = real[:1000]
    made = rendering.tokenize_all(examples, "harness")
    assert made == [tokenize(example, "harness") for example in examples]
    kept = list((own_cache / "hellaswag-tokens").iterdir())
    assert len(kept) == 1
    monkeypatch.setattr(rendering, "tokenize", lambda *_: pytest.fail("tokenized again"))
    assert rendering.tokenize_all(examples, "harness") == made


@pytest.mark.parametrize("change", ["protocol", "examples", "vocabulary"])
def test_what_tokens_follow_from_is_in_their_hash(real, own_cache, monkeypatch, change):
    monkeypatch.setattr(rendering, "CACHE_FROM", 3)
    examples, protocol = EXAMPLES, "harness"
    rendering.tokenize_all(examples, protocol)
    if change == "protocol":
        protocol = "completion"
    elif change == "examples":
        examples = [*EXAMPLES[:2], replace(EXAMPLES[2], ctx_a="Another")]
    else:
        monkeypatch.setattr(tokenizer, "VOCAB_BPE_SHA256", "another")
    assert rendering.tokenize_all(examples, protocol) == [tokenize(e, protocol) for e in examples]
    assert len(list((own_cache / "hellaswag-tokens").iterdir())) == 2


@pytest.mark.parametrize("damage", ["cut", "flip", "empty"])
def test_a_damaged_cache_of_tokens_is_made_anew(own_cache, monkeypatch, damage):
    monkeypatch.setattr(rendering, "CACHE_FROM", 3)
    made = rendering.tokenize_all(EXAMPLES, "harness")
    file = next((own_cache / "hellaswag-tokens").iterdir())
    good = file.read_bytes()
    middle = good.index(b"NUMPY") + 150
    bad = {"cut": good[: len(good) // 2], "empty": b"", "flip": good[:middle] + b"x" + good[middle + 1 :]}[damage]
    assert bad != good
    file.write_bytes(bad)
    assert rendering.tokenize_all(EXAMPLES, "harness") == made
    assert file.read_bytes() == good


def test_a_cache_that_cannot_be_written_is_done_without(own_cache, monkeypatch):
    monkeypatch.setattr(rendering, "CACHE_FROM", 3)
    own_cache.write_text("a file where the folder should be")
    assert len(rendering.tokenize_all(EXAMPLES, "harness")) == 3
