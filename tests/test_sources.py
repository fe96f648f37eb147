"""sources.py: every row of every kind of file is read once, by whoever reads its part, and bad rows are named."""

import gzip
import json
import os
from dataclasses import replace
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from aymen_gpt.data import sources
from aymen_gpt.data.sources import Document
from aymen_gpt.errors import DataError, UsageError


def read_all(words, **more):
    """[(file name, part, Document)] of a source, each part read alone."""
    source = sources.open_source([str(word) for word in words], **more)
    found = []
    for number, file in enumerate(source.files):
        for part in sources.parts(source, number, file.path):
            found += [(file.name, part.index, document) for document in sources.read(part)]
    return found


def texts(words, **more):
    return [document.text for _, _, document in read_all(words, **more) if not document.skipped]


def parquet(path, columns, **more):
    path.parent.mkdir(parents=True, exist_ok=True)
    pq.write_table(pa.table(columns), path, **more)
    return path


def test_row_groups_are_parts_and_rows_keep_their_id_and_url(tmp_path):
    n = 25
    table = {
        "text": [f"t{i}" for i in range(n)],
        "id": [f"i{i}" for i in range(n)],
        "url": [None] * n,
        "score": range(n),
    }
    path = parquet(tmp_path / "a.parquet", table, row_group_size=10)
    found = read_all([path])
    assert [(part, document.row) for _, part, document in found] == [divmod(i, 10) for i in range(n)]
    assert found[7][2] == Document(7, "t7", "i7", None)


def test_a_part_can_be_read_from_any_row_on(tmp_path):
    path = parquet(tmp_path / "a.parquet", {"text": [str(i) for i in range(1000)]})
    source = sources.open_source([str(path)])
    (part,) = sources.parts(source, 0, path)
    for skip in (0, 255, 256, 999, 1000):
        rows = [document.row for document in sources.read(replace(part, skip=skip))]
        assert rows == list(range(skip, 1000))


def test_files_of_a_folder_come_in_the_order_of_their_names_and_hidden_ones_not(tmp_path):
    for name in ("b.txt", "a/2.txt", "a/10.txt", ".hidden.txt", ".cache/x.txt", "notes.md"):
        (tmp_path / "d" / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / "d" / name).write_text(name)
    source = sources.open_source([str(tmp_path / "d")])
    assert [file.name for file in source.files] == ["d/a/10.txt", "d/a/2.txt", "d/b.txt"]
    assert texts([tmp_path / "d"]) == ["a/10.txt", "a/2.txt", "b.txt"]


@pytest.mark.parametrize(
    ("columns", "chosen"),
    [
        ({"id": ["x"], "text": ["yes"], "content": ["no"]}, None),
        ({"id": ["x"], "content": ["yes"]}, None),
        ({"n": [1], "story": ["yes"]}, None),
        ({"text": ["no"], "story": ["yes"]}, "story"),
        ({"text": pa.array([b"yes"], pa.binary())}, None),
        ({"text": pa.array(["yes"], pa.large_string())}, None),
        ({"text": pa.array(["yes"]).dictionary_encode()}, None),
    ],
)
def test_the_text_column_is_found(tmp_path, columns, chosen):
    assert texts([parquet(tmp_path / "a.parquet", columns)], text_column=chosen) == ["yes"]


@pytest.mark.fault(41)
@pytest.mark.parametrize("wanted", [None, "n", "nothing"])
def test_a_file_without_a_usable_text_column_lists_its_columns(tmp_path, wanted):
    path = parquet(tmp_path / "a.parquet", {"n": [1], "a": ["x"], "b": ["y"]})
    with pytest.raises(UsageError, match=r"n \(int64\), a \(string\), b \(string\); use --text-column NAME"):
        texts([path], text_column=wanted)


def test_bad_rows_of_parquet_are_named_and_the_others_kept(tmp_path):
    data = pa.array([b"good", b"\xff\xfe", None, b"", b" \n", "sp\u00e4t".encode()], pa.binary())
    strings = pa.Array.from_buffers(pa.string(), len(data), data.buffers())  # a string column that is not UTF-8
    for name, column in (("binary", data), ("string", strings)):
        found = read_all([parquet(tmp_path / f"{name}.parquet", {"text": column})])
        reasons = [None, "not UTF-8", "null", "empty", "empty", None]
        assert [document.skipped for _, _, document in found] == reasons
        assert [document.text for _, _, document in found if not document.skipped] == ["good", "spät"]


@pytest.mark.parametrize("keep", [0, 4, 100, -1])
def test_a_cut_parquet_file_is_named_with_the_way_out(tmp_path, keep):
    path = parquet(tmp_path / "a.parquet", {"text": ["x" * 50] * 50})
    path.write_bytes(path.read_bytes()[:keep])
    with pytest.raises(DataError, match=r"a.parquet is damaged or cut off .*: delete it and get it again"):
        texts([path])


def test_a_damaged_page_of_parquet_is_named(tmp_path):
    path = parquet(tmp_path / "a.parquet", {"text": [str(i) * 99 for i in range(999)]}, compression="zstd")
    content = bytearray(path.read_bytes())
    content[100:2000] = bytes(1900)
    path.write_bytes(content)
    with pytest.raises(DataError, match=r"a.parquet is damaged or cut off"):
        texts([path])


JSONL = [
    {"text": "one", "id": 7, "url": "u"},
    {"text": ""},
    {"text": None},
    {"text": 5},
    {"other": "two"},
    {"a": 1, "b": 2},
]


@pytest.mark.parametrize("suffix", [".jsonl", ".jsonl.gz", ".jsonl.zst"])
def test_jsonl_is_read_plain_and_compressed(tmp_path, suffix):
    lines = (
        "\n".join([*map(json.dumps, JSONL), "", "{broken", '"bare"', '{"text": "last \\ud800"}']).encode()
        + b"\n\xff\n"
    )
    path = tmp_path / f"a{suffix}"
    if suffix == ".jsonl":
        path.write_bytes(lines)
    elif suffix == ".jsonl.gz":
        path.write_bytes(gzip.compress(lines))
    else:
        with pa.CompressedOutputStream(str(path), "zstd") as file:
            file.write(lines)
    documents = [document for _, _, document in read_all([path])]
    assert documents[0] == Document(0, "one", "7", "u")
    expected = [None, "empty", "null", "not a string", None, "null", "not JSON", None, None, "not UTF-8"]
    assert [document.skipped for document in documents] == expected
    assert [document.row for document in documents] == [0, 1, 2, 3, 4, 5, 7, 8, 9, 10]
    assert documents[8].text == "last \ud800"
    path.write_bytes(path.read_bytes()[:-9])
    if suffix != ".jsonl":
        with pytest.raises(DataError, match=r"is damaged or cut off .*: delete it and get it again"):
            read_all([path])


def test_compressed_files_and_large_row_groups_are_cut_into_parts_that_carry_their_rows(tmp_path, monkeypatch):
    monkeypatch.setattr(sources, "SLICE", 500)
    monkeypatch.setattr(sources, "LARGE", 1000)
    wanted = [f"{'x' * (i * 7 % 23)}{i}" for i in range(300)]
    path = tmp_path / "a.jsonl.gz"
    path.write_bytes(gzip.compress("\n".join(json.dumps({"text": text}) for text in wanted).encode()))
    table = {"text": wanted, "id": list(map(str, range(300))), "other": wanted}
    for file in (path, parquet(tmp_path / "a.parquet", table, row_group_size=100)):
        source = sources.open_source([str(file)])
        found = list(sources.parts(source, 0, file))
        assert [part.index for part in found] == list(range(len(found)))
        assert len(found) > 5
        assert found[-1].fraction == 1
        assert [document.text for part in found for document in sources.read(part)] == wanted
        later = [document.text for document in sources.read(replace(found[3], skip=5))]
        assert later == [document.text for document in sources.read(found[3])][5:]


@pytest.mark.parametrize("slice_bytes", [1, 7, 16, 33, 1000])
def test_slices_of_jsonl_hold_each_line_once(tmp_path, monkeypatch, slice_bytes):
    monkeypatch.setattr(sources, "SLICE", slice_bytes)
    wanted = [f"{'x' * (i * 7 % 23)}{i}" for i in range(30)]
    path = tmp_path / "a.jsonl"
    path.write_text("\n".join(json.dumps({"text": text}) for text in wanted))
    assert texts([path]) == wanted


@pytest.mark.parametrize("slice_bytes", [1, 5, 14, 20, 64, 10_000])
@pytest.mark.parametrize("newline", ["\n", "\r\n"])
def test_slices_of_txt_hold_each_document_once(tmp_path, monkeypatch, slice_bytes, newline):
    monkeypatch.setattr(sources, "SLICE", slice_bytes)
    wanted = [f"story {i}" + "\nmore <|endoftext|> inside\n" * (i % 3) + "end" * (i % 5) for i in range(20)]
    path = tmp_path / "a.txt"
    path.write_bytes(f"\n<|endoftext|>{newline}".join(wanted).encode())
    assert texts([path]) == wanted
    path.write_bytes(
        path.read_bytes() + f"\n<|endoftext|>{newline}".encode()
    )  # a separator at the end adds nothing
    assert [(d.text, d.skipped) for _, _, d in read_all([path])] == [(text, None) for text in wanted]


def test_a_txt_file_without_separators_is_one_document_as_it_is(tmp_path):
    content = "\n line one\r\nline two\n\n"
    (tmp_path / "a.txt").write_bytes(content.encode())
    assert texts([tmp_path / "a.txt"]) == [content]
    (tmp_path / "a.txt").write_bytes("\ufeffwith a byte order mark".encode())
    assert texts([tmp_path / "a.txt"]) == ["with a byte order mark"]
    (tmp_path / "a.txt").write_bytes(b"")
    assert texts([tmp_path / "a.txt"]) == []


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["nowhere"], "--source nowhere: no such file or folder"),
        (["empty"], "--source empty: the folder holds none of .parquet"),
        (["a.csv"], "--source a.csv: cannot read this kind of file"),
        (["a.txt", "a.txt"], "--source holds a.txt twice"),
        (["a.txt", "hub"], "hub cannot be mixed"),
    ],
)
def test_words_that_mean_nothing_are_refused(tmp_path, monkeypatch, words, message):
    monkeypatch.chdir(tmp_path)
    Path("empty").mkdir()
    Path("a.csv").touch()
    Path("a.txt").touch()
    with pytest.raises(UsageError, match=message):
        sources.open_source(words)
    with pytest.raises(UsageError, match="--revision"):
        sources.open_source(["a.txt"], revision="main")


def test_files_that_cannot_be_read_are_named_and_never_left_out(tmp_path, monkeypatch):
    folder = tmp_path / "in"
    (folder / "locked").mkdir(parents=True)
    (folder / "a.txt").write_text("a")

    def refused(path, scan=os.scandir):
        if Path(path).name == "locked":
            raise PermissionError(13, "Permission denied", str(path))
        return scan(path)

    monkeypatch.setattr(os, "scandir", refused)
    with pytest.raises(DataError, match=r"cannot read .*in/locked: Permission denied"):
        sources.open_source([str(folder)])
    monkeypatch.undo()
    (folder / "b.txt").symlink_to("nowhere")
    for word in (folder, folder / "b.txt"):
        with pytest.raises(DataError, match=r"cannot read .*in/b.txt: No such file"):
            sources.open_source([str(word)])
    (folder / "b.txt").unlink()
    os.mkfifo(folder / "b.txt")
    for word in (folder, folder / "b.txt"):
        with pytest.raises(UsageError, match=r"in/b.txt: a pipe or a device, no file"):
            sources.open_source([str(word)])


@pytest.mark.parametrize("word", [".", "../d", "../d/", "./../d/."])
def test_a_folder_has_the_same_name_however_it_is_written(tmp_path, monkeypatch, word):
    (tmp_path / "d").mkdir()
    (tmp_path / "d/a.txt").write_text("a")
    monkeypatch.chdir(tmp_path / "d")
    assert [file.name for file in sources.open_source([word]).files] == ["d/a.txt"]


def test_the_pinned_revision_is_a_commit():
    assert len(sources.REVISION) == 40
    assert set(sources.REVISION) <= set("0123456789abcdef")
