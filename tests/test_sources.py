"""sources.py: every row of every kind of file is read once, by whoever reads its slice, and bad rows are named."""

import gzip
import json
import os
from dataclasses import replace
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from aymen_gpt.data import slices, sources
from aymen_gpt.data.slices import Document
from aymen_gpt.errors import DataError, UsageError

DAMAGED = r"is damaged or cut off .*: get it again or remove it, then type .* --restart"


def read_all(words, **more):
    """[(file name, slice, Document)] of a source, each slice read alone."""
    source = sources.open_source([str(word) for word in words], **more)
    found = []
    for number, file in enumerate(source.files):
        for slice in slices.slices_of(source, number, file.path):
            found += [(file.name, slice.part, document) for document in slices.read(slice)]
    return found


def texts(words, **more):
    return [document.text for _, _, document in read_all(words, **more) if not document.skipped]


def parquet(path, columns, **more):
    path.parent.mkdir(parents=True, exist_ok=True)
    pq.write_table(pa.table(columns), path, **more)
    return path


def test_row_groups_are_slices_and_rows_keep_their_id_and_url(tmp_path):
    names = {letter: [f"{letter}{i}" for i in range(25)] for letter in "ti"}
    table = {"text": names["t"], "id": names["i"], "url": [None] * 25, "score": range(25)}
    found = read_all([parquet(tmp_path / "a.parquet", table, row_group_size=10)])
    assert [(slice, document.row) for _, slice, document in found] == [divmod(i, 10) for i in range(25)]
    assert found[7][2] == Document(7, "t7", "i7", None)


def test_files_of_a_folder_come_in_the_order_of_their_names_and_hidden_ones_not(tmp_path):
    for name in ("b.txt", "a/2.txt", "a/10.txt", ".hidden.txt", ".cache/x.txt", "notes.md", "x.csv"):
        (tmp_path / "d" / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / "d" / name).write_text(name)
    source = sources.open_source([str(tmp_path / "d")])
    assert [file.name for file in source.files] == ["d/a/10.txt", "d/a/2.txt", "d/b.txt", "d/notes.md"]
    assert texts([tmp_path / "d"]) == ["a/10.txt", "a/2.txt", "b.txt", "notes.md"]


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
    for name, column in (("binary", data), ("string", strings), ("dictionary", strings.dictionary_encode())):
        found = read_all([parquet(tmp_path / f"{name}.parquet", {"text": column})])
        reasons = [None, "not UTF-8", "null", "empty", "empty", None]
        assert [document.skipped for _, _, document in found] == reasons
        assert [document.text for _, _, document in found if not document.skipped] == ["good", "spät"]


@pytest.mark.parametrize("kept", [0, 4, 100, -1, "zeros in a page"])
def test_a_damaged_parquet_file_is_named_with_the_way_out(tmp_path, kept):
    path = parquet(tmp_path / "a.parquet", {"text": [str(i) * 99 for i in range(999)]}, compression="zstd")
    content = path.read_bytes()
    path.write_bytes(content[:kept] if isinstance(kept, int) else content[:100] + bytes(1900) + content[2000:])
    with pytest.raises(DataError, match=rf"a.parquet {DAMAGED}"):
        texts([path])


JSONL = [
    '{"text": "one", "id": 7, "url": "u"}',
    '{"text": ""}',
    '{"text": null}',
    '{"text": 5}',
    '{"other": "two"}',
]
JSONL += ['{"a": 1, "b": 2}', "", "{broken", '"bare"', '{"text": "last \\ud800"}']


@pytest.mark.parametrize("suffix", [".jsonl", ".jsonl.gz", ".jsonl.zst"])
def test_jsonl_is_read_plain_and_compressed(tmp_path, suffix):
    path, lines = tmp_path / f"a{suffix}", "\n".join(JSONL).encode() + b"\n\xff\n"
    packed = pa.compress(lines, "zstd", asbytes=True) if suffix == ".jsonl.zst" else gzip.compress(lines)
    path.write_bytes(lines if suffix == ".jsonl" else packed)
    documents = [document for _, _, document in read_all([path])]
    assert documents[0] == Document(0, "one", "7", "u")
    expected = [None, "empty", "null", "not a string", None, "null", "not JSON", None, None, "not UTF-8"]
    assert [document.skipped for document in documents] == expected
    assert [document.row for document in documents] == [0, 1, 2, 3, 4, 5, 7, 8, 9, 10]
    assert documents[8].text == "last \ud800"
    path.write_bytes(path.read_bytes()[:-9])
    if suffix != ".jsonl":
        with pytest.raises(DataError, match=DAMAGED):
            read_all([path])


def test_compressed_files_and_large_row_groups_are_cut_into_slices_that_carry_their_rows(tmp_path, monkeypatch):
    monkeypatch.setattr(slices, "SLICE_BYTES", 500)
    monkeypatch.setattr(slices, "LARGE", 1000)
    wanted = [f"{'x' * (i * 7 % 23)}{i}" for i in range(300)]
    path = tmp_path / "a.jsonl.gz"
    path.write_bytes(gzip.compress("\n".join(json.dumps({"text": text}) for text in wanted).encode()))
    table = {"text": wanted, "id": list(map(str, range(300))), "other": wanted}
    for file in (path, parquet(tmp_path / "a.parquet", table, row_group_size=100)):
        source = sources.open_source([str(file)])
        found = list(slices.slices_of(source, 0, file))
        assert [slice.part for slice in found] == list(range(len(found)))
        assert len(found) > 5
        assert found[-1].fraction == 1
        assert [document.text for slice in found for document in slices.read(slice)] == wanted


@pytest.mark.parametrize("slice_bytes", [1, 7, 16, 33, 1000])
def test_slices_of_jsonl_hold_each_line_once(tmp_path, monkeypatch, slice_bytes):
    monkeypatch.setattr(slices, "SLICE_BYTES", slice_bytes)
    wanted = [f"{'x' * (i * 7 % 23)}{i}" for i in range(30)]
    path = tmp_path / "a.jsonl"
    path.write_text("\n".join(json.dumps({"text": text}) for text in wanted))
    assert texts([path]) == wanted


@pytest.mark.parametrize("suffix", [".txt", ".md"])
def test_a_txt_file_is_one_document_as_it_is(tmp_path, monkeypatch, suffix):
    monkeypatch.setattr(slices, "SLICE_BYTES", 7)
    content = "\n one\n<|endoftext|>\ntwo\r\n<|endoftext|>\r\n" + " " * 40 + "<|endoftext|>\nthree\n\n"
    path = tmp_path / f"a{suffix}"
    path.write_bytes(content.encode())
    assert [document for _, _, document in read_all([path])] == [Document(0, content, None, path.name)]
    path.write_bytes(f"\ufeff{content}".encode())  # a byte order mark is no text
    assert texts([path]) == [content]
    path.write_bytes(b"")
    assert read_all([path]) == []


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


NO_TEXT = pa.Array.from_buffers(pa.string(), 1, pa.array([b"x\xff"], pa.binary()).buffers())  # it says it is
ODD_IDS = {  # in a parquet column -> what is kept of it
    "not UTF-8": (pa.array([b"x\xff"], pa.binary()), "x\ufffd"),
    "not UTF-8, said to be": (NO_TEXT, "x\ufffd"),
    "a year of 9 digits": (pa.array([2**62], pa.timestamp("ms")), "<value out of range: 4611686018427387904>"),
    "a list of what is not UTF-8": (pa.ListArray.from_arrays([0, 1], NO_TEXT), None),
    "a number": (pa.array([7]), "7"),
}


@pytest.mark.parametrize("name", ["id", "url"])
@pytest.mark.parametrize("kind", ODD_IDS)
def test_an_odd_id_is_kept_as_far_as_it_is_text_and_hurts_nothing(tmp_path, name, kind):
    column, kept = ODD_IDS[kind]
    ((_, _, document),) = read_all([parquet(tmp_path / "a.parquet", {"text": ["a"], name: column})])
    assert document == replace(Document(0, "a"), **{name: kept})


def test_lone_surrogates_in_ids_become_letters_that_can_be_written(tmp_path):
    path = tmp_path / os.fsdecode(b"x\xff.txt")
    path.write_text("a")
    (tmp_path / "a.jsonl").write_text(json.dumps({"text": "a", "id": "x\ud800", "url": ["\udfff"]}))
    found = [document for _, _, document in read_all([tmp_path / "a.jsonl", path])]
    assert found == [Document(0, "a", "x\ufffd", "['\\udfff']"), Document(0, "a", None, "x\ufffd.txt")]


def test_json_that_is_nested_too_deep_is_skipped(tmp_path):
    deep = '{"a":' * 10**5
    (tmp_path / "a.jsonl").write_text(f'{deep}\n{{"text": "b"}}\n{"[" * 10**5}{"]" * 10**5}\n')
    found = [document for _, _, document in read_all([tmp_path / "a.jsonl"])]
    assert [document.skipped for document in found] == ["nested too deep", None, "nested too deep"]


def test_a_column_that_is_there_twice_is_named_or_without_effect(tmp_path):
    path, columns = tmp_path / "a.parquet", [pa.array(["a"]), pa.array(["b"]), pa.array(["b"])]
    pq.write_table(pa.Table.from_arrays(columns, names=["text", "id", "id"]), path)
    assert read_all([path]) == [("a.parquet", 0, Document(0, "a"))]
    pq.write_table(pa.Table.from_arrays(columns[:2], names=["text", "text"]), path)
    with pytest.raises(
        UsageError, match=r"a.parquet has 2 columns text; its columns: text \(string\), text \(str"
    ):
        texts([path])


def test_a_gz_file_may_end_in_zeros_and_have_members(tmp_path):
    lines = [json.dumps({"text": text}).encode() + b"\n" for text in "ab"]
    (tmp_path / "a.jsonl.gz").write_bytes(gzip.compress(lines[0]) + gzip.compress(lines[1]) + bytes(1000))
    assert texts([tmp_path / "a.jsonl.gz"]) == ["a", "b"]


# zstd --long=31 of 200 lines would need 2 GB: a frame's header alone says so
LONG_WINDOW = bytes.fromhex("28b52ffd 00 a8") + bytes(99)


@pytest.mark.parametrize(
    ("name", "spoil", "reason"),
    [
        ("a.jsonl", Path.unlink, r"cannot read .*a.jsonl: No such file or directory"),
        ("a.parquet", Path.unlink, r"cannot read .*a.parquet: No such file or directory"),
        ("a.txt", None, r"cannot read .*a.txt: Permission denied"),
        ("a.parquet", None, r"cannot read .*a.parquet: Permission denied"),
        (
            "a.jsonl.zst",
            None,
            r"a.jsonl.zst was compressed with a window of more than 128 MB .*: compress it again",
        ),
    ],
)
def test_the_true_reason_is_said_why_a_file_cannot_be_read(tmp_path, monkeypatch, name, spoil, reason):
    path = tmp_path / name
    path.write_bytes(LONG_WINDOW) if name.endswith("zst") else parquet(path, {"text": ["a"]})
    source = sources.open_source([str(path)])

    def refused(*args, **more):
        raise PermissionError(13, "Permission denied")

    if spoil:
        spoil(path)
    else:
        monkeypatch.setattr(Path, "read_bytes", refused)
        monkeypatch.setattr(pq, "read_metadata", refused)
    with pytest.raises(DataError, match=reason):
        [list(slices.read(slice)) for slice in slices.slices_of(source, 0, path)]


@pytest.mark.parametrize("with_text", [False, True])
def test_token_shards_are_never_mistaken_for_text(shards, with_text):
    if with_text:
        (shards / "a.jsonl").write_text('"some text"')
    for word in (shards, shards / "edufineweb_val_000000.bin"):
        with pytest.raises(UsageError, match=rf"no text; pretrain.py --data {shards} trains on them"):
            sources.open_source([str(word)])
