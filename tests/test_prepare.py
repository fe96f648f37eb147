"""prepare.py: the shards are the documents, whoever tokenized them and however often it was interrupted."""

import gzip
import hashlib
import itertools
import json
import os
import re
import threading
import time
from dataclasses import replace
from importlib.metadata import version
from itertools import chain
from multiprocessing.connection import Connection
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from crashes import killed, points
from fake_hub import COMMIT, FakeHub, talk_to
from hypothesis import given, settings
from hypothesis import strategies as st

from aymen_gpt.data import encoder, prepare, shards, slices, sources, tokenizer, workers
from aymen_gpt.data.loader import TokenRows
from aymen_gpt.data.prepare import Preparation, PrepareOptions
from aymen_gpt.data.shares import SharePreparation
from aymen_gpt.errors import AymenError, CannotWrite, DataError, NetworkError, UsageError

WORDS = ["the", "of", "a", "model", "language", "was", "in", "text", "data", "\n", "12", "<|endoftext|>", "é"]
REAL_WRITE = pq.write_table


def quiet(event):
    pass


def prepared(options, report=quiet):
    return Preparation(options, report).run()


def repaired(out):
    return Preparation(PrepareOptions(out=out, workers=0), quiet).repair()


def make_texts(n, seed=0, longest=60):
    rng = np.random.default_rng(seed)
    return [" ".join(rng.choice(WORDS, rng.integers(1, longest))) + f" {i}" for i in range(n)]


def write_parquet(path, texts, rows=50):
    path.parent.mkdir(parents=True, exist_ok=True)
    ids = [f"<urn:uuid:{path.stem}-{i}>" for i in range(len(texts))]
    table = {"text": texts, "id": ids, "url": [f"https://x/{i}" for i in range(len(texts))]}
    pq.write_table(pa.table(table), path, row_group_size=rows)
    return path


def write_jsonl(path, texts):
    path.write_text("".join(json.dumps({"text": text}) + "\n" for text in texts))
    return path


def reference(texts):
    """What the shards must hold together: each document behind one separator, by tiktoken itself."""
    encode = tokenizer.gpt2().encode_ordinary
    return [token for text in texts if text.strip() for token in (50256, *encode(text))]


def tokens_of(folder):
    paths = shards.list_shards(folder, "val") + shards.list_shards(folder, "train")
    return [np.fromfile(path, "<u2", offset=1024).tolist() for path in paths]


def joined(lists):
    return list(chain.from_iterable(lists))


def digest(folder):
    """{name: sha256} of everything in a folder but the lock, and what was found right already."""
    names = [path for path in folder.iterdir() if path.name not in (".lock", shards.CHECKED)]
    return {path.name: hashlib.sha256(path.read_bytes()).hexdigest() for path in names if path.is_file()}


@pytest.fixture
def options(tmp_path):
    """Two parquet files and a jsonl, about 20,000 tokens, to be cut into shards of 2,500."""
    folder = tmp_path / "in"
    write_parquet(folder / "a.parquet", make_texts(170, 1))
    write_parquet(folder / "b.parquet", ["", *make_texts(160, 2), " \n"])
    write_jsonl(folder / "c.jsonl", make_texts(130, 3))
    return PrepareOptions(source=(str(folder),), out=tmp_path / "out", shard_tokens=2500, workers=0)


ALL_TEXTS = make_texts(170, 1) + make_texts(160, 2) + make_texts(130, 3)


def test_the_shards_hold_every_document_behind_its_separator_as_the_manifest_says(options):
    summary = prepared(options)
    found, totals = tokens_of(options.out), summary.totals
    assert joined(found) == reference(ALL_TEXTS)
    assert {len(tokens) for tokens in found[1:-1]} == {2500}
    assert 0 < len(found[-1]) <= 2500
    assert (totals.documents, totals.tokens, totals.skipped) == (460, sum(map(len, found)), {"empty": 2})
    assert totals.bytes == sum(len(text.encode()) for text in ALL_TEXTS)
    assert (summary.shards, summary.already) == (len(found), False)
    manifest = json.loads((options.out / "manifest.json").read_text())
    names = ["shard_val_000000.bin"] + [f"shard_train_{i:06d}.bin" for i in range(1, len(found))]
    assert [record["file"] for record in manifest["shards"]] == names
    assert manifest["complete"] is True
    assert manifest["tokenizer"]["vocabulary_sha256"] == tokenizer.VOCAB_BPE_SHA256
    assert [file["name"] for file in manifest["source"]["files"]] == ["in/a.parquet", "in/b.parquet", "in/c.jsonl"]
    for before, after in zip(manifest["shards"], manifest["shards"][1:], strict=False):
        assert before["end"] == after["begin"]
    for record in manifest["shards"]:
        content = (options.out / record["file"]).read_bytes()
        assert hashlib.sha256(content).hexdigest() == record["sha256"]
        assert (len(content) - 1024) // 2 == record["tokens"]
    shards.check_shards(options.out)


def test_a_manifest_position_leads_to_the_source_row(options):
    prepared(options)
    for record in shards.read_manifest(options.out)["shards"]:
        begin = record["begin"]
        if begin["file"] == 2:
            continue
        path = Path(options.source[0]) / "ab"[begin["file"]]
        rows = pq.ParquetFile(path.with_suffix(".parquet")).read_row_group(begin["part"])["text"].to_pylist()
        text = rows[begin["row"]]
        expected = [50256, *tokenizer.gpt2().encode_ordinary(text)][begin["token"] :]
        first = np.fromfile(options.out / record["file"], "<u2", len(expected), offset=1024).tolist()
        assert first == expected[: len(first)]


def test_every_document_a_row_reads_can_be_traced_to_its_id(options):
    prepared(options)
    texts = {f"<urn:uuid:a-{i}>": text for i, text in enumerate(make_texts(170, 1))}
    data = TokenRows(options.out, "train", block_size=64, seed=3)
    checked = 0
    for read in data.documents(0, data.rows_per_epoch):
        if read.id in texts:
            checked += 1
            assert read.url == f"https://x/{read.id[12:-1]}"
            path = options.out / read.shard
            starts = data._begins(data.paths.index(path))
            at = int(starts[read.document]) + read.start
            piece = np.fromfile(path, "<u2", offset=1024)[at : at + read.tokens].tolist()
            whole = str([50256, *tokenizer.gpt2().encode_ordinary(texts[read.id])])[1:-1]
            assert str(piece)[1:-1] in whole
    assert checked > 100


@pytest.mark.fault(50)
@pytest.mark.parametrize("workers", [1, 3])
def test_any_number_of_workers_writes_the_same_bytes(options, tmp_path, workers):
    prepared(options)
    prepared(replace(options, out=tmp_path / "other", workers=workers))
    assert digest(tmp_path / "other") == digest(options.out)


@pytest.mark.fault(39)
@settings(deadline=None, max_examples=25)
@given(
    st.lists(st.integers(0, 40), min_size=1, max_size=12).filter(lambda lengths: sum(lengths) >= 20),
    st.integers(1, 50),
)
def test_documents_of_any_length_are_cut_into_shards_of_any_size(tmp_path_factory, lengths, shard_tokens):
    folder = tmp_path_factory.mktemp("cut")
    texts = ["the " * n for n in lengths]
    write_jsonl(folder / "a.jsonl", texts)
    wanted = reference(texts)
    options = PrepareOptions((str(folder / "a.jsonl"),), folder / "out", shard_tokens, workers=0)
    prepared(options)
    found = tokens_of(folder / "out")
    assert joined(found) == wanted
    assert {len(tokens) for tokens in found[1:-1]} <= {shard_tokens}
    assert len(found) >= 2
    documents = sum(record["documents"] for record in shards.read_manifest(folder / "out")["shards"])
    cuts = sum(tokens[0] != 50256 for tokens in found)
    assert documents - cuts == wanted.count(50256)


@pytest.mark.fault(37)
@pytest.mark.parametrize(
    "texts",
    [["one document " * 300], make_texts(3), ["-" * 20_000], ["x " * 5000, "é" * 9999], [], [""], ["-" * 640]],
)
def test_a_corpus_smaller_than_a_shard_gives_both_splits_or_is_an_error(tmp_path, texts):
    options = PrepareOptions((str(write_jsonl(tmp_path / "a.jsonl", texts)),), tmp_path / "out", workers=0)
    if len(reference(texts)) < 20:
        with pytest.raises(DataError, match=r"has only \d+ tokens: too few for training and validation"):
            prepared(options)
        return
    prepared(options)
    val, train = tokens_of(options.out)
    assert val + train == reference(texts)
    assert 0.05 <= len(val) / len(val + train) <= 0.5


def test_validation_is_a_twentieth_of_a_middling_corpus_and_one_shard_of_a_large_one(monkeypatch):
    def val_tokens(n_bytes, shard_tokens=1000_000, max_tokens=None):
        monkeypatch.setattr(slices, "estimated_bytes", lambda source: n_bytes)
        options = PrepareOptions(shard_tokens=shard_tokens, max_tokens=max_tokens)
        return Preparation(options, quiet).val_tokens()

    assert val_tokens(4 * 10**9) == 1000_000
    assert val_tokens(4 * 10**6) == 50_000
    assert val_tokens(4 * 100_000) == 10_000
    assert val_tokens(4 * 5_000) == 1_250
    assert val_tokens(4 * 10**9, max_tokens=10**6) == 50_000
    assert val_tokens(0) == 1


def test_max_tokens_is_met_exactly(options):
    summary = prepared(replace(options, max_tokens=5001, restart=True))
    assert summary.totals.tokens == 5001
    assert joined(tokens_of(options.out)) == reference(ALL_TEXTS)[:5001]
    assert not list(options.out.glob("earlier-*"))  # there was nothing to set aside


@pytest.fixture(scope="module", autouse=True)
def no_waiting_for_the_disk():
    """Hundreds of tiny shards are written here; that each is synced is asserted in one test."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(os, "fsync", lambda handle: None)
        yield


@pytest.mark.slow
@pytest.mark.fault(49)
def test_killed_before_or_after_any_rename_the_same_command_continues_to_the_same_bytes(options, tmp_path):
    options = replace(options, shard_tokens=5000)
    prepared(options)
    expected = digest(options.out)
    kills = 0
    for point in points("os.replace"):
        again = replace(options, out=tmp_path / f"kill{kills}")
        if not killed(point, lambda again=again: prepared(again)):
            break
        kills += 1
        finished = digest(again.out)
        assert any(name.endswith(".tmp") for name in finished) == point.startswith("before")
        if "manifest.json" in finished:
            listed = {record["file"]: record["sha256"] for record in shards.read_manifest(again.out)["shards"]}
            assert listed.items() <= finished.items()
        prepared(again)
        assert digest(again.out) == expected
    assert kills == 2 * (3 * len(tokens_of(options.out)) + 1)  # a shard, its ids, the manifest; the manifest


@pytest.mark.fault(49)
def test_a_small_corpus_that_is_cut_anew_survives_a_kill_too(tmp_path):
    write_jsonl(tmp_path / "a.jsonl", ["-" * 20_000, "=" * 20_000])  # many bytes a token: the estimate is too high
    options = PrepareOptions((str(tmp_path / "a.jsonl"),), tmp_path / "out", workers=0)
    events = []
    prepared(options, events.append)
    assert any("a small corpus" in event for event in events if isinstance(event, str))
    expected = digest(options.out)
    for nth in range(1, 11):
        again = replace(options, out=tmp_path / f"kill{nth}")
        assert killed(f"before:{nth}:os.replace", lambda again=again: prepared(again))
        prepared(again)
        assert digest(again.out) == expected


def test_a_finished_folder_needs_nothing_even_without_its_source(options):
    first = prepared(options)
    before = {path.name: path.stat().st_mtime_ns for path in options.out.glob("[!.]*")}
    for path in Path(options.source[0]).iterdir():
        path.unlink()
    again = prepared(replace(options, workers=7, source=(f"{options.source[0]}//",)))
    assert again == replace(first, already=True)
    assert before == {path.name: path.stat().st_mtime_ns for path in options.out.glob("[!.]*")}


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"shard_tokens": 2000}, "--shard-tokens 2500, not 2000"),
        ({"max_tokens": 9}, "--max-tokens unset, not 9"),
        ({"source": ("builtin",)}, "--source .*in, not builtin"),
        ({"text_column": "content"}, "--text-column unset, not content"),
    ],
)
def test_a_folder_of_other_options_is_refused_and_left_alone(options, change, message):
    prepared(options)
    before = digest(options.out)
    with pytest.raises(UsageError, match=f"was prepared with {message}: give the same options, or another --out"):
        prepared(replace(options, **change))
    assert digest(options.out) == before


@pytest.mark.fault(34)
def test_a_flipped_bit_of_the_manifest_is_found(options):
    prepared(options)
    path = options.out / "manifest.json"
    text, whole = path.read_bytes(), shards.read_manifest(options.out)
    found = 0
    for bit in range(0, 8 * len(text), 61):
        flipped = bytearray(text)
        flipped[bit // 8] ^= 1 << bit % 8
        path.write_bytes(flipped)
        try:
            known = shards.read_manifest(options.out)
            assert known | whole == known, bit  # of a blank, or of the word "checksum": nothing else has changed
        except DataError:
            found += 1
    assert found > 200


def stop_after(options, n_shards):
    assert killed(f"after:{n_shards}:aymen_gpt.data.shards:write_manifest", lambda: prepared(options))


def test_a_source_that_changed_half_way_is_refused(options):
    stop_after(options, 2)
    write_jsonl(Path(options.source[0]) / "c.jsonl", make_texts(10))
    write_jsonl(Path(options.source[0]) / "d.jsonl", make_texts(10))
    (Path(options.source[0]) / "b.parquet").unlink()
    changes = r"in/b.parquet is gone, in/c.jsonl is not the same, in/d.jsonl is new"
    with pytest.raises(DataError, match=rf"has changed since .*out was begun \({changes}\): type .* --restart"):
        prepared(options)


def damage(path, change):
    """What happens to a source file while it is read, or between two commands."""
    content = path.read_bytes()
    os.utime(path, ns=(1, 1))
    path.write_bytes({"cut": content[:-40], "same size": content[::-1], "longer": content + content}[change])


@pytest.mark.parametrize("kind", [".parquet", ".jsonl", ".jsonl.gz", ".txt"])
@pytest.mark.parametrize("change", ["cut", "same size", "longer"])
def test_a_file_that_changes_is_named_and_never_counts_as_read_nor_is_mixed(tmp_path, monkeypatch, kind, change):
    monkeypatch.setattr(slices, "SLICE_BYTES", 2000)
    paths = [
        write_parquet(tmp_path / "in" / f"{name}.parquet", make_texts(150, ord(name)), rows=30) for name in "ab"
    ]
    for path in paths if kind != ".parquet" else []:
        content = write_jsonl(tmp_path / "plain", make_texts(150, ord(path.stem))).read_bytes()
        path.unlink()
        path.with_suffix(kind).write_bytes(gzip.compress(content) if kind == ".jsonl.gz" else content)
    victim = tmp_path / "in" / f"{'b' if kind == '.txt' else 'a'}{kind}"
    options = PrepareOptions(source=(str(tmp_path / "in"),), out=tmp_path / "out", shard_tokens=500, workers=0)
    later = replace(options, out=tmp_path / "later")
    stop_after(later, 3)

    def report(event):
        if getattr(event, "shards", 0) == 3:
            damage(victim, change)

    for when in ("changed while it was read", "is not the same"):  # then, and when it is typed again
        with pytest.raises(DataError, match=rf"{victim.name} {when}.*: type the same command with --restart"):
            prepared(options, report)
    assert not shards.read_manifest(options.out)["complete"]
    with pytest.raises(DataError, match=rf"changed since .*in/{victim.name} is not the same.*: type .* --restart"):
        prepared(later)  # which was killed before


def test_an_output_folder_inside_the_source_is_no_source(options, tmp_path):
    inside = replace(options, out=Path(options.source[0]) / "tokens/all")
    prepared(options)
    stop_after(inside, 3)
    prepared(inside)
    sorted(inside.out.glob("*.bin"))[2].unlink()
    repaired(inside.out)
    assert digest(inside.out) == digest(options.out)
    prepared(replace(inside, out=tmp_path / "in/more"))  # the shards in tokens/all are no text
    with pytest.raises(
        UsageError, match=r"--out .*in is the source itself: take a folder of its own, as .*in/tok"
    ):
        prepared(replace(options, out=tmp_path / "in"))


@pytest.mark.fault(22)
def test_a_shard_counts_only_when_it_its_table_and_the_manifest_are_synced(options, monkeypatch):
    syncs = itertools.count()

    def full(handle):
        if next(syncs) == 14:  # a file and its folder, three times for each of two shards, and two syncs
            raise OSError(28, os.strerror(28))

    monkeypatch.setattr(os, "fsync", full)
    with pytest.raises(CannotWrite, match=r"cannot write .*No space left on device; make room"):
        prepared(options)
    assert len(shards.read_manifest(options.out)["shards"]) == 2
    assert shards.verify(options.out) == {}
    prepared(options)
    assert joined(tokens_of(options.out)) == reference(ALL_TEXTS)


def grow_until_done(disk, folder, work, used=0):
    """Do the work, again each time a disk that grows by 4 kB is full; how often it was. ``used`` is what it holds.

    What is finished must stay, never be written twice, and nothing half-written may lie beside it.
    """
    finished = {}
    for failures in range(200):
        disk(used + 4096 * (failures + 1))
        try:
            work()
        except CannotWrite as error:
            says = str(error)
        else:
            return failures
        assert re.search(r"[Nn]o space left.*(make room|free some)", says)
        found = {path: path.stat().st_mtime_ns for path in folder.glob("*_0*")}
        assert finished.items() <= found.items()
        if (manifest := shards.read_manifest(folder)) is not None:
            assert shards.verify(folder) == {}
            finished = {folder / record["file"]: found[folder / record["file"]] for record in manifest["shards"]}
        assert not list(folder.glob(".*.tmp"))
    raise AssertionError("800 kB are not enough")


@pytest.mark.fault(22)
def test_on_a_disk_that_is_full_again_and_again_finished_shards_stay_and_the_rest_follows(options, disk):
    prepared(options)
    small = replace(options, out=disk("4k") / "out")
    assert grow_until_done(disk, small.out, lambda: prepared(small)) > 20
    assert digest(small.out) == digest(options.out)


BAD_ROWS = {"null": None, "not UTF-8": b"caf\xe9"}


def with_bad_rows(tmp_path, n, bad, reason):
    texts = [text.encode() for text in make_texts(n, longest=6)]
    column = [BAD_ROWS[reason] if i in bad else text for i, text in enumerate(texts)]
    path = write_parquet(tmp_path / "bad.parquet", column, rows=1000)
    good = [text.decode() for i, text in enumerate(texts) if i not in bad]
    return PrepareOptions((str(path),), tmp_path / "out", 1000, workers=0), good


@pytest.mark.fault(41)
@pytest.mark.parametrize("reason", BAD_ROWS)
def test_few_bad_rows_are_skipped_and_many_are_an_error_that_names_the_first(tmp_path, reason):
    options, good = with_bad_rows(tmp_path, 2000, {5, 1999}, reason)
    assert prepared(options).totals.skipped == {reason: 2}
    assert joined(tokens_of(options.out)) == reference(good)
    options, _ = with_bad_rows(tmp_path, 2000, {1005, 1006, 1007}, reason)
    message = r"3 of 2,000 rows have no usable text .more than 0.1%.: bad.parquet, slice 1, row 5: " + reason
    for _ in range(2):  # and again, from where it stood
        with pytest.raises(DataError, match=message):
            prepared(replace(options, out=tmp_path / "many"))


@pytest.fixture
def dead_end(tmp_path):
    """A folder of texts with a bad row and a file in another encoding, prepared in vain; its good texts."""
    folder = tmp_path / "in"
    (write_jsonl(write_parquet(folder / "a.parquet", make_texts(300)).with_name("bad.jsonl"), ["no"])).write_text(
        "{"
    )
    (folder / "latin.txt").write_bytes(b"caf\xe9")
    options = PrepareOptions((str(folder),), tmp_path / "out", 500, workers=0)
    bad = r"bad.jsonl, slice 0, row 0: not JSON; in/latin.txt, slice 0, row 0: not UTF-8"
    with pytest.raises(DataError, match=rf"2 of 302 rows .*: in/{bad}; .* --restart, or .* with --skip-bad-rows"):
        prepared(options)
    return options, make_texts(300)


@pytest.mark.parametrize("workers", [0, 2])
def test_bad_rows_can_be_left_out(dead_end, workers):
    options, good = dead_end
    for chosen in (options, replace(options, out=options.out / "anew", workers=workers)):
        summary = prepared(replace(chosen, skip_bad_rows=True))
        assert summary.totals.skipped == {"not JSON": 1, "not UTF-8": 1}
        assert joined(tokens_of(chosen.out)) == reference(good)
    assert digest(options.out) == digest(options.out / "anew")


def test_a_mended_source_is_prepared_anew_and_what_was_there_is_kept(dead_end):
    options, good = dead_end
    for name in ("bad.jsonl", "latin.txt"):
        (Path(options.source[0]) / name).unlink()
    with pytest.raises(DataError, match=r"in/bad.jsonl is gone, in/latin.txt is gone\): type .* with --restart"):
        prepared(options)
    before = digest(options.out)
    (options.out / "notes_202411.txt").write_text("mine")
    (options.out / "earlier-²").mkdir()
    events = []
    prepared(replace(options, restart=True), events.append)
    assert f"{options.out}/earlier-1 holds what was there" in "".join(filter(lambda e: isinstance(e, str), events))
    assert joined(tokens_of(options.out)) == reference(good)
    assert digest(options.out / "earlier-1") == before
    assert (options.out / "notes_202411.txt").read_text() == "mine"
    assert prepared(options).already
    shards.check_shards(options.out)
    prepared(replace(options, restart=True, shard_tokens=700))
    assert len(digest(options.out / "earlier-2")) == len(before)


@pytest.mark.parametrize("point", [*range(1, 9, 3)])
def test_a_restart_can_be_killed_and_typed_again(dead_end, point):
    options, good = dead_end
    before = digest(options.out)
    again = replace(options, restart=True, skip_bad_rows=True)
    assert killed(f"before:{point}:os.rename", lambda: prepared(again))
    prepared(again)
    assert joined(tokens_of(options.out)) == reference(good)
    kept = [digest(folder) for folder in options.out.glob("earlier-*")]
    assert {name: sha for found in kept for name, sha in found.items()} == before


@pytest.mark.parametrize("work", [prepared, lambda options: SharePreparation(options, 1, 1, quiet).run()])
def test_a_change_of_the_source_of_a_finished_folder_is_said(options, work):
    work(options)
    assert work(options).already
    write_jsonl(Path(options.source[0]) / "d.jsonl", make_texts(10))
    with pytest.raises(
        DataError, match=r"has changed since .* was begun \(in/d.jsonl is new\): type .* --restart"
    ):
        work(options)
    assert work(replace(options, restart=True)).totals.documents == 470
    assert work(options).already


def test_a_finished_folder_does_not_ask_whether_the_builtin_corpus_is_another_now(options, monkeypatch):
    path = write_parquet(options.out.parent / "builtin-1.parquet", make_texts(20))
    monkeypatch.setattr(sources.builtin, "build", lambda: path)
    options = replace(options, source=("builtin", *options.source))
    prepared(options)
    monkeypatch.setattr(sources.builtin, "build", None)
    assert prepared(options).already


ODD_TEXTS = {  # what a document holds -> the text that its tokens are, None when it is skipped
    "nothing": ("", None),
    "blanks": (" \n\t\u3000\xa0\x1c", None),
    "NUL": ("a\0b\0\0", "a\0b\0\0"),
    "lone surrogates": ("x\ud800y\udfffz", "x\ufffdy\ufffdz"),
    "separator": ("<|endoftext|>a<|endoftext|>", "<|endoftext|>a<|endoftext|>"),
    "one letter for ever": ("a" * 10**6, "a" * 10**6),
    "one sign for ever": ("!" * 10**6, "!" * 10**6),
    "a letter of Unicode 17": ("a \U000323b0's", "a \U000323b0's"),
    "blanks for ever": ("a" + " " * 10**6, "a" + " " * 10**6),
}


@pytest.mark.fault(40)
@pytest.mark.timeout(60)  # a tokenizer that is quadratic in the length of a word needs hours
@pytest.mark.parametrize("name", ["gigatoken", "tiktoken"])
def test_odd_texts_become_their_own_tokens_or_are_counted(tmp_path, name):
    path = write_jsonl(tmp_path / "a.jsonl", [text for text, _ in ODD_TEXTS.values()])
    options = PrepareOptions((str(path),), tmp_path / "out", 100_000, workers=0, encoder=name)
    summary = prepared(options)
    texts = [text for _, text in ODD_TEXTS.values() if text is not None]
    found = joined(tokens_of(options.out))
    assert found == reference(texts)
    assert tokenizer.gpt2().decode(found) == "".join("<|endoftext|>" + text for text in texts)
    assert found.count(50256) == summary.totals.documents == len(texts)
    assert summary.totals.skipped == {"empty": 2}


@pytest.mark.fault(42)
@pytest.mark.parametrize(("kept", "workers"), [(0, 0), (3, 0), (1500, 0), (-1, 0), ("zeros", 0), ("zeros", 2)])
def test_a_damaged_or_half_written_file_is_named_and_the_shards_before_it_stay(options, kept, workers):
    path = Path(options.source[0]) / "b.parquet"
    content = path.read_bytes()
    path.write_bytes(content[:kept] if isinstance(kept, int) else content[:4] + bytes(2996) + content[3000:])
    with pytest.raises(
        DataError, match=r"b.parquet is damaged or cut off .*: get it again or remove it, then type .* --restart"
    ) as caught:
        prepared(replace(options, workers=workers))
    assert caught.value.exit_code == 65
    if isinstance(kept, int):  # that its end is missing is seen before anything is written
        assert not options.out.exists()
        path.write_bytes(content)
        prepared(options)
        assert joined(tokens_of(options.out)) == reference(ALL_TEXTS)
    else:
        done = [record["file"] for record in shards.read_manifest(options.out)["shards"]]
        assert len(done) >= 2
        assert {path.name for path in options.out.glob("*.bin")} == set(done)


def die_in_the_middle_of_the_answer():
    """In a worker: what it answers goes through a pipe; half of the first piece is all that comes."""

    def half(connection, content, *more):
        os.write(connection.fileno(), bytes(content)[: len(content) // 2])
        os._exit(9)

    Connection._send = half
    return bytes(100_000)


@pytest.mark.fault(49)
@pytest.mark.parametrize("death", [(os._exit, 9), (die_in_the_middle_of_the_answer,)])
def test_a_worker_that_dies_is_an_error_not_a_hang(options, monkeypatch, death):
    class Dying(workers.ProcessPoolExecutor):
        def submit(self, function, slice, *more):
            if (slice.file, slice.part) == (1, 2):
                return super().submit(*death)
            return super().submit(function, slice, *more)

    threads = threading.active_count()
    monkeypatch.setattr(workers, "ProcessPoolExecutor", Dying)
    with pytest.raises(AymenError, match=r"a worker process died; finished shards are safe: run the same command"):
        prepared(replace(options, workers=2))
    deadline = time.monotonic() + 30
    while threading.active_count() > threads and time.monotonic() < deadline:
        time.sleep(0.01)
    assert threading.active_count() <= threads  # or Python would wait for them when it ends
    monkeypatch.undo()
    prepared(replace(options, workers=2))
    assert joined(tokens_of(options.out)) == reference(ALL_TEXTS)


def test_slices_are_dealt_only_so_far_ahead(tmp_path):
    path = write_parquet(tmp_path / "a.parquet", make_texts(40), rows=1)
    dealt = []
    found = slices.slices_of(sources.open_source([str(path)]), 0, path)
    batches = workers.tokenize_all((dealt.append(slice) or slice for slice in found), 1, "tiktoken")
    for read in range(1, 31):
        assert next(batches).part == read - 1
        assert len(dealt) <= read + workers.AHEAD
    batches.close()


@pytest.mark.fault(34)
def test_repair_rebuilds_only_the_shards_and_tables_of_documents_that_are_damaged(options):
    prepared(options)
    expected = digest(options.out)
    paths, tables = sorted(options.out.glob("*.bin")), sorted(options.out.glob("*.documents.parquet"))
    tables[0].write_bytes(tables[0].read_bytes()[:-9])
    for path in (tables[1], paths[3]):
        flipped = bytearray(path.read_bytes())
        flipped[100] ^= 1
        path.write_bytes(flipped)
    tables[2].unlink()
    paths[-1].unlink()
    damaged = [*tables[:3], paths[3], paths[-1]]
    others = {path: path.stat().st_mtime_ns for path in [*paths[4:-1], *tables[4:-1]]}
    names = sorted(path.name for path in damaged)
    assert sorted(shards.verify(options.out)) == sorted(repaired(options.out)) == names
    assert digest(options.out) == expected
    assert others == {path: path.stat().st_mtime_ns for path in others}
    assert repaired(options.out) == []


@pytest.mark.fault(34)
def test_a_table_that_another_pyarrow_writes_otherwise_is_repaired_too(options, monkeypatch):
    prepared(options)
    next(options.out.glob("*_000002.documents.parquet")).unlink()
    monkeypatch.setattr(pq, "write_table", lambda table, file, compression: REAL_WRITE(table, file))
    assert repaired(options.out) == ["shard_train_000002.documents.parquet"]
    assert shards.verify(options.out) == {}
    record = shards.read_manifest(options.out)["shards"][2]
    assert shards.read_document_sources(options.out / record["file"], record["documents"])


@pytest.mark.fault(49)
def test_repair_killed_again_and_again_keeps_what_it_repaired_and_leaves_no_pile(options):
    prepared(options)
    expected = digest(options.out)
    paths = sorted(options.out.glob("*.bin"))[2:5]
    for path in paths:
        path.unlink()
    foreign, live = options.out / ".mine.tmp", options.out / f".checked.json.{os.getppid()}.tmp"
    foreign.touch()
    live.touch()
    there = []
    for point in ["before:1:os.replace"] * 3 + ["before:4:os.replace"] * 3:  # the shard's, its table's, both moved
        assert killed(point, lambda: repaired(options.out))
        assert len(list((options.out / prepare.REBUILT).iterdir())) == 1
        there.append([path.exists() for path in paths].count(True))
    assert there == [0, 0, 0, 1, 2, 3]
    repaired(options.out)
    assert foreign.exists()
    assert live.exists()
    foreign.unlink()
    live.unlink()
    assert digest(options.out) == expected


@pytest.mark.parametrize("damaged", [".bin", ".documents.parquet"])
def test_repair_from_a_source_with_other_content_changes_nothing(options, damaged):
    prepared(options)
    path = Path(options.source[0]) / "c.jsonl"
    path.write_text(path.read_text().replace("model", "novel"))
    shard = sorted(options.out.glob("*_train_*.bin"))[-1]
    victim = shard.with_suffix(damaged)
    victim.write_bytes(victim.read_bytes()[:-1])
    before = digest(options.out)
    with pytest.raises(DataError, match=f"{shard.name} cannot be rebuilt"):
        repaired(options.out)
    assert digest(options.out) == before


@pytest.fixture
def hub(tmp_path, monkeypatch):
    """FineWeb-Edu on a fake Hub: three files of a sample-10BT, and one that is not part of it."""
    contents = {}
    for number in range(3):
        path = write_parquet(tmp_path / "hub" / f"{number}.parquet", make_texts(120, number))
        contents[f"sample/10BT/00{number}_00000.parquet"] = path.read_bytes()
    contents["data/other.parquet"] = b""
    with FakeHub(contents) as hub:
        talk_to(hub, monkeypatch, tmp_path / "hf")
        yield hub


@pytest.fixture
def hub_options(hub, tmp_path):
    return PrepareOptions(out=tmp_path / "out", shard_tokens=1000, workers=0)


HUB_TEXTS = [text for number in range(3) for text in make_texts(120, number)]


def test_fineweb_edu_comes_from_the_hub_file_by_file_and_is_not_kept(hub_options, hub, tmp_path):
    kept = []

    def report(event):
        kept.append(len(list((tmp_path / "out/.source").rglob("*.parquet"))))

    prepared(hub_options, report)
    assert joined(tokens_of(hub_options.out)) == reference(HUB_TEXTS)
    assert max(kept) <= 2
    assert not (hub_options.out / ".source").exists()
    manifest = shards.read_manifest(hub_options.out)
    assert manifest["source"]["repo"] == "HuggingFaceFW/fineweb-edu"
    names = [record["file"] for record in manifest["shards"]]
    assert names[:2] == ["edufineweb_val_000000.bin", "edufineweb_train_000001.bin"]
    assert manifest["source"]["revision"] == COMMIT
    assert f"GET /api/datasets/HuggingFaceFW/fineweb-edu/revision/{sources.REVISION}" in hub.requests
    assert (
        hub.count("GET", f"/datasets/HuggingFaceFW/fineweb-edu/resolve/{COMMIT}/sample/10BT/001_00000.parquet")
        == 1
    )
    prepared(replace(hub_options, out=tmp_path / "kept", keep_source=True))
    assert len(list((tmp_path / "kept/.source/sample/10BT").glob("*.parquet"))) == 3


@pytest.mark.fault(22)
@pytest.mark.filterwarnings("ignore:Not enough free disk space")
def test_a_download_that_fills_the_disk_is_made_again_when_there_is_room(hub_options, hub, tmp_path, disk):
    prepared(hub_options)
    small = replace(hub_options, out=disk("4k") / "out")
    assert grow_until_done(disk, small.out, lambda: prepared(small)) > 5
    assert digest(small.out) == digest(hub_options.out)


@pytest.mark.fault(46)
def test_after_a_hub_that_failed_a_run_and_a_repair_need_neither_its_list_nor_the_first_file(
    hub_options, hub, tmp_path
):
    hub.faults["HEAD 002_00000.parquet"] = ["403", ...]
    with pytest.raises(NetworkError, match="002_00000.parquet of HuggingFaceFW/fineweb-edu: not found or private"):
        prepared(hub_options)
    done = len(shards.read_manifest(hub_options.out)["shards"])
    assert done > 2
    hub.faults.clear()
    hub.requests.clear()
    prepared(hub_options)
    assert joined(tokens_of(hub_options.out)) == reference(HUB_TEXTS)
    sorted(hub_options.out.glob("*.bin"))[-2].write_bytes(b"")
    assert len(repaired(hub_options.out)) == 1
    assert joined(tokens_of(hub_options.out)) == reference(HUB_TEXTS)
    assert not (hub_options.out / ".source").exists()
    assert not any("/api/" in request or "000_00000" in request for request in hub.requests)


@pytest.mark.fault(43)
def test_wrong_bytes_from_the_hub_are_fetched_again_and_never_tokenized(hub_options, hub, tmp_path):
    hub.faults["GET 000_00000.parquet"] = ["wrong"]
    hub.faults["GET 001_00000.parquet"] = ["wrong", ...]
    with pytest.raises(NetworkError, match="001_00000.parquet of .*: downloaded twice, its sha256 is ") as caught:
        prepared(hub_options)
    assert caught.value.exit_code == 69
    assert len(shards.read_manifest(hub_options.out)["shards"]) > 1
    assert (hub.count("GET", "000_00000.parquet"), hub.count("GET", "001_00000.parquet")) == (2, 2)
    assert not list(hub_options.out.rglob("001_00000.parquet"))
    hub.faults.clear()
    prepared(hub_options)
    assert joined(tokens_of(hub_options.out)) == reference(HUB_TEXTS)


@pytest.mark.fault(45)
def test_without_the_hub_a_file_put_in_its_place_by_hand_is_checked_and_taken(hub_options, hub, tmp_path):
    prepared(replace(hub_options, out=tmp_path / "whole"))
    hub.faults["GET 002_00000.parquet"] = ["500", ...]
    place = hub_options.out / ".source/sample/10BT/002_00000.parquet"
    with pytest.raises(NetworkError, match=rf"HTTP 500; .*run the same command again; or put it at {place}"):
        prepared(hub_options)
    finished = digest(hub_options.out)
    assert len(finished) > 5
    hub.__exit__()
    place.write_bytes(b"another file")
    with pytest.raises(NetworkError, match="cannot get sample/10BT/002_00000.parquet"):
        prepared(hub_options)
    assert digest(hub_options.out) == finished
    place.write_bytes(hub.files["sample/10BT/002_00000.parquet"])
    prepared(hub_options)
    assert digest(hub_options.out) == digest(tmp_path / "whole")


@pytest.mark.fault(53)
def test_a_manifest_cannot_make_us_touch_files_outside(hub_options, hub, tmp_path):
    prepared(hub_options)
    manifest = shards.read_manifest(hub_options.out)
    victim = tmp_path / "victim.parquet"
    victim.touch()
    manifest["source"]["files"][0]["name"] = "../../victim.parquet"
    manifest["complete"] = False
    shards.write_manifest(hub_options.out, manifest)
    with pytest.raises(DataError, match="unsafe path"):
        prepared(hub_options)
    assert victim.exists()


@pytest.mark.fault(53)
def test_links_in_the_folder_never_make_us_write_or_delete_outside(hub_options, hub, tmp_path):
    outside = tmp_path / "outside"
    (outside / "10BT").mkdir(parents=True)
    victim = outside / "10BT/000_00000.parquet"
    victim.write_bytes(b"mine")
    (hub_options.out / ".source").mkdir(parents=True)
    (hub_options.out / ".source/sample").symlink_to(outside)
    with pytest.raises(
        DataError, match=r"unsafe path 'sample/10BT/000_00000.parquet': a link leads out of .*source"
    ):
        prepared(hub_options)
    preparation = Preparation(hub_options, quiet)
    preparation.source = preparation.open_source()
    with pytest.raises(DataError, match="unsafe path"):
        preparation.drop_downloads(1)
    (hub_options.out / ".source/sample").unlink()
    prepared(hub_options)
    shard = sorted(hub_options.out.glob("*.bin"))[1]
    expected = digest(hub_options.out)
    shard.unlink()
    shard.symlink_to(victim)
    assert repaired(hub_options.out) == [shard.name]
    assert not shard.is_symlink()
    assert digest(hub_options.out) == expected
    assert [(path.name, path.read_bytes()) for path in outside.rglob("*.*")] == [(victim.name, b"mine")]


class Broken:
    """An encoder that is right but for the texts with a 7 in their last word."""

    def encode(self, text):
        ids = tokenizer.encode(text.decode())
        return ids[:-1] if b"7" in text.split()[-1] else ids


REAL_TOKENIZE = workers.tokenize


def tokenize_broken(*work):
    """What the workers do when gigatoken is broken; it is looked up by name in their processes."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(encoder, "_gigatoken", Broken)
        patch.setattr(encoder, "version", lambda name: "0")
        return REAL_TOKENIZE(*work)


@pytest.mark.parametrize("count", [0, 2])
def test_an_encoder_that_errs_ends_the_command_with_the_document_and_the_way_out(options, monkeypatch, count):
    """Broken gets one document wrong, in the last file, in the first row."""
    pytest.importorskip("gigatoken")
    folder = options.out.parent / "late"
    write_parquet(folder / "a.parquet", [f"{text} no" for text in make_texts(340)])
    lines = [{"text": text, "id": f"id-{i}"} for i, text in enumerate(["the 7", *make_texts(130, 3)])]
    (folder / "c.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    options = replace(options, source=(str(folder),), workers=count)
    prepared(replace(options, out=options.out / "right", encoder="tiktoken"))
    message = (
        r"^gigatoken 0 gave other ids than tiktoken for c.jsonl, slice 0, row 0, id-0: "
        "prepare all of it anew, with --restart --encoder tiktoken$"
    )
    monkeypatch.setattr(workers, "tokenize", tokenize_broken)
    with pytest.raises(DataError, match=message):
        prepared(options)
    assert len(shards.read_manifest(options.out)["shards"]) > 2
    prepared(replace(options, restart=True, encoder="tiktoken"))
    assert digest(options.out) == digest(options.out / "right")


def test_the_sample_is_one_document_in_a_hundred_and_some_of_every_slice(tmp_path):
    slice = slices.Slice(3, 8, tmp_path, 0, 0, None, (0, 0))
    chosen = [row for row in range(100_000) if workers._sampled(slice, row)]
    assert chosen[:2] == [0, 1]
    assert 900 < len(chosen) < 1100
    assert workers._sampled(replace(slice, part=9), chosen[5]) is False


def test_both_encoders_write_the_same_shards_and_the_manifest_names_them(options, tmp_path):
    pytest.importorskip("gigatoken")
    folders = {name: replace(options, out=tmp_path / name, encoder=name) for name in ("gigatoken", "tiktoken")}
    manifests = {}
    for name, chosen in folders.items():
        prepared(chosen)
        manifests[name] = shards.read_manifest(chosen.out)
        assert manifests[name].pop("encoder") == {"name": name, "version": version(name)}
    assert manifests["gigatoken"] == manifests["tiktoken"]
    assert len({shards.check_shards(chosen.out) for chosen in folders.values()}) == 1


def test_a_folder_that_tiktoken_worked_on_stays_with_it(options, monkeypatch):
    stop_after(replace(options, encoder="tiktoken"), 2)
    monkeypatch.setattr(encoder, "_gigatoken", None)
    prepared(options)
    assert joined(tokens_of(options.out)) == reference(ALL_TEXTS)
    expected = digest(options.out)
    sorted(options.out.glob("*.bin"))[2].unlink()
    assert len(repaired(options.out)) == 1
    assert digest(options.out) == expected


def test_without_gigatoken_tiktoken_works_and_one_line_says_so(options, monkeypatch):
    monkeypatch.setattr(encoder, "missing", lambda: "`pip install it`")
    monkeypatch.setattr(encoder, "_gigatoken", None)
    events = []
    prepared(options, events.append)
    assert [event for event in events if isinstance(event, str)] == ["encoding with tiktoken: `pip install it`"]
    assert joined(tokens_of(options.out)) == reference(ALL_TEXTS)
