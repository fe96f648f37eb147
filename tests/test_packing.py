"""Packing: every shared token once, every text whole, little padding."""

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from test_scoring import make_examples

from aymen_gpt.evaluation import packing
from aymen_gpt.evaluation.packing import TokenizedExample, batches, collate, fit
from aymen_gpt.evaluation.rendering import PROTOCOLS, tokenize

CPU = torch.device("cpu")


def test_the_example_of_the_docstring():
    batch = collate([TokenizedExample([50, 51], [[60, 61], [70, 71, 72]])], 8, CPU)
    assert batch.tokens.tolist() == [50, 51, 60, 70, 71]
    assert batch.positions.tolist() == [0, 1, 2, 2, 3]
    assert batch.predictors.tolist() == [1, 2, 3, 4]
    assert batch.sources.tolist() == [0, 1, 0, 2, 3]
    assert batch.targets.tolist() == [60, 61, 70, 71, 72]
    assert batch.endings.tolist() == [0, 0, 1, 1, 1]


def looked_at(layer):
    """What each query of a layer looks at: {query: sorted nodes}, found through ``places`` as attention does."""
    seen = []
    for group in layer.groups:
        for g, queries in enumerate(group.queries):
            for q in range(len(queries)):
                seen.append((int(queries[q]), sorted(group.keys[g][group.mask[g, 0, q]].tolist())))
    found = {}
    for query, place in enumerate(layer.places.tolist()):
        assert seen[place][0] == query
        found[query] = seen[place][1]
    return found


tokens = st.integers(0, 3)  # few, so that texts begin alike by chance
example = st.builds(
    TokenizedExample,
    st.lists(tokens, min_size=1, max_size=6),
    st.lists(st.lists(tokens, min_size=1, max_size=6), min_size=1, max_size=4),
)


@settings(max_examples=200, deadline=None)
@given(st.lists(example, min_size=1, max_size=4), st.integers(1, 8))
def test_a_node_looks_at_its_text_and_no_other(examples, block_size):
    batch = collate(examples, block_size, CPU)
    inner, last = looked_at(batch.inner), looked_at(batch.last)
    prefixes = {tuple(batch.tokens[inner[node]].tolist()): node for node in inner}
    assert len(prefixes) == len(inner) == len(batch.tokens)  # no beginning of a text stands twice
    assert [len(nodes) - 1 for nodes in inner.values()] == batch.positions.tolist()
    assert {batch.predictors[query].item(): nodes for query, nodes in last.items()} == {
        node: inner[node] for node in batch.predictors.tolist()
    }
    at = 0
    for i, ending in enumerate(e for x in examples for e in [(x.context, ending) for ending in x.endings]):
        text, scored = fit(*ending, block_size)
        for k in range(len(text) - scored, len(text)):
            node = batch.predictors[batch.sources[at]].item()
            assert node == prefixes[tuple(text[:k])]
            assert batch.targets[at] == text[k]
            assert batch.endings[at] == i
            at += 1
    assert at == len(batch.targets)


def test_the_last_layer_asks_only_what_predicts():
    batch = collate([TokenizedExample([1] * 20, [[2] * 5, [3] * 1, [4] * 7, [5] * 3])], 64, CPU)
    assert len(batch.tokens) == 20 + (5 - 1) + 0 + (7 - 1) + (3 - 1)
    assert len(batch.last.places) == len(batch.predictors) == 1 + (5 - 1) + 0 + (7 - 1) + (3 - 1)
    assert sum(group.queries.numel() for group in batch.last.groups) < len(batch.tokens)


def test_batches_take_every_example_once_within_the_budget():
    examples = make_examples(300, context=(10, 40))
    made = list(batches(examples, 512))
    assert sorted(i for chosen in made for i in chosen) == list(range(300))
    sizes = [sum(len(examples[i]) for i in chosen) for chosen in made]
    assert max(sizes) <= 512
    assert min(sizes[:-1]) > 512 - max(map(len, examples))
    assert list(batches(examples, 1)) == [[i] for chosen in batches(examples, 1) for i in chosen]


def test_real_examples_have_few_tokens_and_little_padding(real):
    for protocol in PROTOCOLS:
        examples = [tokenize(example, protocol) for example in real[::20]]
        read = needed = padded = 0
        for chosen in batches(examples, 2048):
            batch = collate([examples[i] for i in chosen], 1024, CPU)
            assert len(batch.tokens) <= 2048
            read += len(batch.tokens)
            needed += sum(map(len, looked_at(batch.inner).values()))
            padded += sum(group.mask.numel() for group in batch.inner.groups)
        apart = sum(len(x.context) + len(ending) - 1 for x in examples for ending in x.endings)
        assert read < 0.54 * apart
        assert padded < 2 * needed  # half of a square is what causality leaves out


def test_groups_of_attention_stay_small_however_long_the_context(monkeypatch):
    monkeypatch.setattr(packing, "KEYS_AT_ONCE", 256)
    batch = collate([TokenizedExample([1] * 60, [[i] * 8 for i in range(2, 40)])], 128, CPU)
    assert all(group.keys.numel() <= 256 for group in batch.inner.groups)
    assert len(looked_at(batch.inner)) == len(batch.tokens) == 60 + 38 * 7


@pytest.mark.parametrize(("context", "endings"), [([], [[1]]), ([1], [[2], []])])
def test_texts_without_tokens_are_refused(context, endings):
    with pytest.raises(ValueError, match="no likelihood"):
        TokenizedExample(context, endings)


def test_padding_keeps_rows_apart():
    assert packing._padded([np.array([1, 2]), np.array([3])], 0).tolist() == [[1, 2], [3, 0]]
    assert packing.common_beginning([[1, 2, 3], [1, 2], [1, 2, 4]]) == [1, 2]
    assert packing.common_beginning([[1], [2]]) == []
