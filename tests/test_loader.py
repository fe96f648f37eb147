"""loader.py: every token once an epoch, in an order that only (seed, epoch) decides; resuming is a seek."""

from collections import Counter
from itertools import chain, count, pairwise

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from aymen_gpt.data import loader, shards
from aymen_gpt.data.loader import TokenRows, deal
from aymen_gpt.data.tokenizer import EOT
from aymen_gpt.errors import DataError

T = 8


def write(folder, lists, split="train"):
    folder.mkdir(exist_ok=True)
    for index, tokens in enumerate(lists):
        shards.write_shard(folder / shards.shard_name(split, index), np.array(list(tokens), np.uint16))
    return folder


def documents(rng, n_documents, longest, first=0):
    """Documents behind their separators; the other tokens count up from ``first``, so no two are equal."""
    lengths = rng.integers(0, longest, n_documents).tolist()
    ends = np.cumsum(lengths).tolist()
    return [[EOT, *range(first + end - n, first + end)] for n, end in zip(lengths, ends, strict=True)]


@pytest.fixture
def corpus(tmp_path):
    """Three shards: a plain one, one that begins inside a document, and one too short for a row."""
    rng = np.random.default_rng(5)
    parts = [documents(rng, 40, 30), [[10_000, 10_001], *documents(rng, 20, 30, 10_002)], [[EOT, 20_000, 20_001]]]
    return write(tmp_path / "data", [chain.from_iterable(shard) for shard in parts]), parts


@pytest.mark.fault(38)
def test_an_epoch_reads_every_token_once_and_only_drops_the_stated_tails(corpus):
    folder, parts = corpus
    data = TokenRows(folder, "train", block_size=T, seed=1)
    lengths = [sum(map(len, shard)) for shard in parts]
    assert data.n_tokens == sum(lengths)
    assert data.rows_per_epoch == sum((n - 1) // T for n in lengths)
    for epoch in range(3):
        rows = data.rows(epoch * data.rows_per_epoch, data.rows_per_epoch)
        for read in (Counter(rows[:, :-1].ravel().tolist()), Counter(rows[:, 1:].ravel().tolist())):
            assert max(count for token, count in read.items() if token != EOT) == 1
            for shard, length in enumerate(lengths[:2]):
                own = sum(10_000 * shard <= token < 10_000 * (shard + 1) for token in read)
                assert own + read[EOT] >= length - T
        assert len(np.unique(rows[:, :-1])) < data.n_tokens  # it did read


def test_documents_stay_whole_behind_their_separators(corpus):
    folder, parts = corpus
    follows = {(a, b) for shard in parts for document in shard for a, b in pairwise(document)}
    last = {document[-1] for shard in parts for document in shard}
    rows = TokenRows(folder, "train", block_size=T, seed=1).rows(0, 200).tolist()
    borders = 0
    for a, b in (pair for row in rows for pair in pairwise(row)):
        if (a, b) not in follows:
            borders += 1
            assert a in last
            assert b in (EOT, 10_000)  # 10,000 begins the piece of a document whose separator is in another shard
    assert borders > 20


def test_epochs_and_seeds_differ_and_each_is_reproducible(corpus):
    folder, _ = corpus
    data = TokenRows(folder, "train", block_size=T, seed=1)
    n = data.rows_per_epoch
    epochs = [data.rows(e * n, n) for e in range(3)]
    assert not np.array_equal(epochs[0], epochs[1])
    assert not np.array_equal(epochs[1], epochs[2])
    again = TokenRows(folder, "train", block_size=T, seed=1).rows(0, 3 * n)
    assert np.array_equal(again, np.concatenate(epochs))
    other = TokenRows(folder, "train", block_size=T, seed=2).rows(0, n)
    assert not np.array_equal(other, epochs[0])


def test_the_order_never_changes_between_releases(tmp_path):
    """Golden values: a run started with one version of us or of numpy is continued exactly by another."""
    folder = write(tmp_path / "d", [[EOT, i, EOT, i + 1, i + 2, EOT, i + 3] for i in (10, 20, 30)])
    rows = TokenRows(folder, "train", block_size=2, seed=42).rows(0, 18)
    assert rows[:9, 1].tolist() == [50256, 31, 33, 13, 11, 10, 21, 23, 20]
    assert rows[9:, 1].tolist() == [50256, 31, 50256, 21, 50256, 20, 10, 13, 11]


def test_a_batch_is_not_a_stretch_of_one_long_document(tmp_path):
    folder = write(tmp_path / "d", [[EOT, *range(8000), *([EOT, 9000] * 10)]])
    first = TokenRows(folder, "train", block_size=T, seed=0).rows(0, 64)[:, 1]
    assert np.median(np.abs(np.diff(np.sort(first.astype(int))))) > 2 * T


def test_without_a_seed_rows_follow_the_files(tmp_path):
    folder = write(tmp_path / "d", [range(0, 20), range(100, 117)], "val")
    rows = TokenRows(folder, "val", block_size=T, seed=None).rows(0, 6)
    starts = [0, 8, 100, 108, 0, 8]
    assert rows.tolist() == [list(range(start, start + T + 1)) for start in starts]


@pytest.fixture(scope="module")
def small(tmp_path_factory):
    """Builds the rows of four small shards anew."""
    rng = np.random.default_rng(0)
    lists = [chain.from_iterable(documents(rng, 15, 9, 1000 * i)) for i in range(4)]
    folder = write(tmp_path_factory.mktemp("small") / "data", lists)
    return lambda: TokenRows(folder, "train", block_size=4, seed=3)


@settings(deadline=None, max_examples=60)
@given(st.data())
def test_seeking_equals_reading_from_the_start(small, data):
    count = 3 * small().rows_per_epoch
    start = data.draw(st.integers(0, count))
    length = data.draw(st.integers(0, count - start))
    assert np.array_equal(small().rows(start, length), small().rows(0, count)[start:][:length])


@pytest.mark.parametrize("world_size", [1, 2, 3, 8])
@pytest.mark.parametrize("micro_batch", [1, 3, 50])
def test_the_global_batch_is_the_same_however_it_is_dealt(small, world_size, micro_batch):
    read = []
    for rank in range(world_size):
        data = small()
        start, count = deal(20, rank, world_size)
        for at in range(start, start + count, micro_batch):
            read.append(data.rows(20 + at, min(micro_batch, start + count - at)))
    assert np.array_equal(np.concatenate(read), small().rows(20, 20))


@given(st.integers(0, 1000), st.integers(1, 64))
def test_rows_are_dealt_without_gap_or_overlap_and_evenly(count, world_size):
    shares = [deal(count, rank, world_size) for rank in range(world_size)]
    assert [row for start, n in shares for row in range(start, start + n)] == list(range(count))
    assert max(n for _, n in shares) - min(n for _, n in shares) <= 1
    assert [deal(512, rank, 3) for rank in range(3)] == [(0, 171), (171, 171), (342, 170)]


def test_documents_tells_what_rows_read(tmp_path):
    folder = write(tmp_path / "d", [[5, 6, EOT, 1, 2, 3, EOT, 4, EOT]])
    path = folder / shards.shard_name("train", 0)
    shards.write_document_sources(path, ["a", "b", "c", "d"], ["ua", None, "uc", "ud"])
    data = TokenRows(folder, "train", block_size=4, seed=None)
    reads = data.documents(0, 2)
    assert [(r.row, r.document, r.start, r.tokens, r.id, r.url) for r in reads] == [
        (0, 0, 0, 2, "a", "ua"),
        (0, 1, 0, 3, "b", None),
        (1, 1, 2, 2, "b", None),
        (1, 2, 0, 2, "c", "uc"),
        (1, 3, 0, 1, "d", "ud"),
    ]


def test_documents_agree_with_the_rows_under_permutation(corpus):
    folder, parts = corpus
    data = TokenRows(folder, "train", block_size=T, seed=9)
    for row in range(data.rows_per_epoch - 2, data.rows_per_epoch + 3):
        tokens = []
        for read in data.documents(row, 1):
            document = parts[int(read.shard[-10:-4])][read.document]
            tokens += document[read.start : read.start + read.tokens]
            assert read.id is None
        assert tokens == data.rows(row, 1)[0].tolist()


def test_only_two_shards_are_at_hand_and_nothing_is_widened(corpus, monkeypatch):
    opened = []
    real = loader.open_shard
    monkeypatch.setattr(loader, "open_shard", lambda path: opened.append(path.name) or real(path))
    data = TokenRows(corpus[0], "train", block_size=T, seed=1)
    opened.clear()
    for row in range(data.rows_per_epoch):
        assert data.rows(row, 1).dtype == np.uint16
    assert len(opened) == 2  # each of the two shards with rows once, although rows were read one by one
    assert data._tokens.cache_info().maxsize == 2
    assert isinstance(data._tokens(0).base, np.memmap)


def test_document_starts_are_found_across_scan_borders(tmp_path, monkeypatch):
    monkeypatch.setattr(loader, "CHUNK", 3)
    folder = write(tmp_path / "d", [[EOT, 1, 2, EOT, 4, 5, 6, 7, EOT, EOT, 1]])
    data = TokenRows(folder, "train", block_size=2, seed=None)
    assert data._begins(0).tolist() == [0, 3, 8, 9]


@pytest.mark.fault(36)
@pytest.mark.parametrize(
    ("lists", "split", "message"),
    [
        (
            [range(12)],
            "val",
            "validation needs at least 1025 tokens, .*d has 12: prepare more text, or lower --block-size",
        ),
        (
            [range(12), range(900)],
            "train",
            "training needs at least 1025 tokens, .*d has 900 in the largest of its 2 shards: prepare more",
        ),
    ],
)
def test_too_few_tokens_for_one_row_are_named_with_numbers(tmp_path, lists, split, message):
    folder = write(tmp_path / "d", lists, split)
    with pytest.raises(DataError, match=message):
        TokenRows(folder, split, block_size=1024, seed=0)


@pytest.mark.fault(49)
@pytest.mark.parametrize("lists", [[range(12)], [range(2000)], []])
def test_shards_that_are_not_all_there_yet_are_named_as_such(tmp_path, lists):
    folder = write(tmp_path / "d", lists)
    shards.write_manifest(folder, {"format": shards.FORMAT, "complete": False, "tokenizer": {}, "shards": []})
    with pytest.raises(DataError, match=r"d is not finished: run the same fineweb.py command again"):
        TokenRows(folder, "train", block_size=1024, seed=0)


@pytest.mark.fault(38)
@settings(deadline=None, max_examples=100)
@given(st.integers(1, 9), st.data())
def test_shards_about_as_long_as_a_row_lose_their_tail_and_nothing_else(tmp_path_factory, block_size, data):
    """Every token but the separators is another number, so that each can be counted."""
    lengths = st.one_of(
        st.sampled_from([1, block_size, block_size + 1, block_size + 2]), st.integers(1, 5 * block_size)
    )
    drawn = data.draw(st.lists(st.tuples(lengths, st.sets(st.integers(0, 45))), min_size=1, max_size=6))
    numbers = count()
    lists = [[EOT if i in separators else next(numbers) for i in range(n)] for n, separators in drawn]
    folder = write(tmp_path_factory.mktemp("short") / "d", lists)
    expected = sum((len(tokens) - 1) // block_size for tokens in lists)
    if expected == 0:
        with pytest.raises(DataError, match="training needs at least"):
            TokenRows(folder, "train", block_size=block_size, seed=1)
        return
    rows = TokenRows(folder, "train", block_size=block_size, seed=1)
    assert rows.rows_per_epoch == expected
    for epoch in range(2):
        found = rows.rows(epoch * expected, expected)
        targets, inputs = Counter(found[:, 1:].ravel().tolist()), Counter(found[:, :-1].ravel().tolist())
        separators = sum(tokens.count(EOT) for tokens in lists)
        assert max(targets.pop(EOT, 0), inputs.pop(EOT, 0)) <= separators
        assert {*targets.values(), *inputs.values()} <= {1}  # none twice
        for tokens in lists:
            lost = set(tokens) - {EOT} - targets.keys() - inputs.keys()
            assert len(lost) <= (len(tokens) - 1) % block_size + (len(tokens) <= block_size)


@pytest.mark.fault(36)
def test_a_missing_folder_says_which_command_makes_it(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(DataError, match=r"^no train shards in edu_fineweb10B: run python fineweb.py first$"):
        TokenRows(loader.Path("edu_fineweb10B"), "train", block_size=8, seed=0)
    with pytest.raises(DataError, match=r"no val shards in data/x: run python fineweb.py --out data/x first"):
        TokenRows(loader.Path("data/x"), "val", block_size=8, seed=0)
