"""shards.py: llm.c's format by its description, other people's shards, damage named, the manifest as guard."""

import io
import json
import struct

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from aymen_gpt import files
from aymen_gpt.__main__ import command
from aymen_gpt.data import prepare, shards, tokenizer
from aymen_gpt.data.loader import TokenRows
from aymen_gpt.errors import CannotWrite, DataError, UsageError

TOKENS = np.array([50256, 1, 2, 3, 50256, 65535 % 50257, 0], np.uint16)


def llmc_bytes(tokens, magic=20240520, version=1, count=None):
    """llm.c's shard written from its description alone: 256 int32, then uint16, little-endian."""
    header = [magic, version, len(tokens) if count is None else count, *[0] * 253]
    return struct.pack("<256i", *header) + struct.pack(f"<{len(tokens)}H", *tokens)


@pytest.mark.parametrize("tokens", [TOKENS, np.arange(50257, dtype=np.uint16)])
@pytest.mark.parametrize("step", [None, 2])
def test_our_shard_is_llmcs_byte_for_byte_written_whole_or_piece_by_piece(tmp_path, tokens, step):
    path = tmp_path / "a b é" / shards.shard_name("train", 7)
    pieces = (tokens[i : i + step] for i in range(0, len(tokens), step)) if step else tokens
    assert shards.write_shard(path, pieces) == len(tokens)
    assert path.name == "edufineweb_train_000007.bin"
    assert path.read_bytes() == llmc_bytes(tokens.tolist())
    assert [entry.name for entry in path.parent.iterdir()] == [path.name]


def test_a_shard_that_fails_half_way_does_not_appear(tmp_path):
    def pieces():
        yield TOKENS
        raise OSError(28, "No space left on device")

    with pytest.raises(CannotWrite, match=r"x_train_000001.bin: No space left"):
        shards.write_shard(tmp_path / "x_train_000001.bin", pieces())
    assert list(tmp_path.iterdir()) == []


READABLE = {
    "x_train_000001.bin": lambda path: path.write_bytes(llmc_bytes(TOKENS.tolist())),
    "train.bin": lambda path: TOKENS.astype("<u2").tofile(path),
    "x_train_000002.npy": lambda path: np.save(path, TOKENS),
}


@pytest.mark.parametrize("name", READABLE)
def test_shards_of_llmc_nanogpt_and_numpy_are_mapped_read_only(tmp_path, name):
    READABLE[name](tmp_path / name)
    tokens = shards.open_shard(tmp_path / name)
    assert isinstance(tokens, np.memmap)
    assert (tokens.dtype, tokens.tolist()) == (np.uint16, TOKENS.tolist())
    with pytest.raises(ValueError, match="read-only"):
        tokens[0] = 1


def npy(descr="'<u2'", fortran="False", shape="(4,)", header=None, version=1):
    """The bytes of a .npy file, whatever its header says."""
    text = header or f"{{'descr': {descr}, 'fortran_order': {fortran}, 'shape': {shape}, }}"
    size = len(text).to_bytes(2 if version == 1 else 4, "little")
    return b"\x93NUMPY" + bytes([version, 0]) + size + text.encode() + bytes(8)


np.save(archive := io.BytesIO(), TOKENS)
np.savez(archives := io.BytesIO(), tokens=TOKENS)
ODD_HEADERS = [
    *(archive.getvalue()[:size] for size in (-3, 20)),
    archives.getvalue(),
    *(
        npy(descr)
        for descr in ("'|V0'", "'|S0'", "'|O'", "'<m8'", "'<M8[s]'", "[('a','<u2')]", "('<u2',(2,))", "''")
    ),
    *(npy(shape=shape) for shape in ("()", "(-1,)", "(0,)", "(2,2)", "4", "None", "(1e3,)", "(10**3,)", "(99,)")),
    *(npy(shape=shape) for shape in (f"({2**63 - 1},)", f"({2**62},)", f"({10**23},)", "[4]")),
    *(npy(header=header) for header in ("{" * 300, "(" * 5000, "-" * 5000 + "1", "{}", "1", "\0", "'\\N{x}'")),
    *(npy(version=version) for version in (2, 3, 4, 255)),
    npy(fortran="True"),
]


@pytest.mark.fault(33)
@pytest.mark.parametrize("content", ODD_HEADERS, ids=range(len(ODD_HEADERS)))
def test_an_odd_header_of_an_array_is_one_line(tmp_path, content):
    path = tmp_path / "x_train_000001.npy"
    path.write_bytes(content)
    if content in (npy(version=2), npy(fortran="True")):
        assert shards.open_shard(path).tolist() == [0, 0, 0, 0]
        return
    with pytest.raises(DataError, match=r"^shard [^\n]*x_train_000001.npy [^\n]*$"):
        shards.open_shard(path)


@pytest.mark.fault(33)
@pytest.mark.parametrize("name", ["edufineweb_train_000001.bin", "manifest.json"])
def test_a_folder_in_place_of_a_file_is_one_line(folder, name):
    (folder / name).unlink()
    (folder / name).mkdir()
    for read in (shards.check_shards, shards.verify):
        with pytest.raises(DataError, match=rf"^cannot read [^\n]*{name}: Is a directory: [^\n]*$"):
            read(folder)


def test_only_whole_numbered_shards_are_listed_in_order_of_number(tmp_path):
    train = ["x_train_000002.npy", "x_train_000010.bin"]
    others = [".x_train_000003.bin.77.tmp", "x_train_000004.bin.tmp", "x_train_5.bin", "x_train_000006.txt"]
    for name in [*train[::-1], *others, "x_val_000000.bin"]:
        (tmp_path / name).touch()
    assert [path.name for path in shards.list_shards(tmp_path, "train")] == train
    assert [path.name for path in shards.list_shards(tmp_path, "val")] == ["x_val_000000.bin"]
    assert shards.list_shards(tmp_path / "nowhere", "val") == []
    (tmp_path / "y_train_000002.bin").touch()
    with pytest.raises(DataError, match="two train shards have number 2"):
        shards.list_shards(tmp_path, "train")


RIGHT = {
    "format": shards.FORMAT,
    "complete": True,
    "tokenizer": {"name": "gpt2", "vocabulary_sha256": tokenizer.VOCAB_BPE_SHA256, "separator": 50256},
    "options": {},
}


def describe_as_fineweb(folder):
    """Write the manifest that fineweb.py would have written beside these shards."""
    paths = shards.list_shards(folder, "val") + shards.list_shards(folder, "train")
    records = [
        {"file": path.name, "tokens": len(shards.open_shard(path)), "documents": 2, "sha256": files.sha256(path)}
        for path in paths
    ]
    shards.write_manifest(folder, RIGHT | {"shards": records})


@pytest.fixture
def folder(tmp_path):
    """Two small shards with a manifest."""
    for index, split in enumerate(("val", "train")):
        shards.write_shard(tmp_path / shards.shard_name(split, index), TOKENS)
    describe_as_fineweb(tmp_path)
    return tmp_path


def change(folder, **values):
    shards.write_manifest(folder, shards.read_manifest(folder) | values)


def write_all(folder, lists, write):
    for name, tokens in lists.items():
        write(folder / name, tokens)


def write_llmc(path, tokens):
    path.write_bytes(llmc_bytes(tokens.tolist()))


def modded_folder(folder, val, train):
    names = ("val_000000", val), ("train_000001", train[:500]), ("train_000002", train[500:])
    write_all(folder, {f"fineweb_{name}.bin": tokens for name, tokens in names}, write_llmc)


def nanogpt_folder(folder, val, train):
    write_all(folder, {"val.bin": val.astype("<u2"), "train.bin": train.astype("<u2")}, lambda p, t: t.tofile(p))
    (folder / "meta.pkl").touch()


def npy_folder(folder, val, train):
    write_all(folder, {"edufineweb_val_000000.npy": val, "edufineweb_train_000001.npy": train}, np.save)


FOLDERS = [
    modded_folder,
    nanogpt_folder,
    npy_folder,
    lambda folder, val, train: npy_folder(folder, val.astype("i8"), train.astype("u4")),
    lambda folder, val, train: write_all(folder, {"tiny_val.bin": val, "tiny_train.bin": train}, write_llmc),
]
FOUND = np.arange(1000, dtype=np.uint16) * 50
FOUND[::125] = 50256


@pytest.mark.fault(34, 35)
@pytest.mark.filterwarnings("ignore:.*read into memory as uint16")
@pytest.mark.parametrize("make", FOLDERS)
def test_tokens_of_other_programs_get_a_manifest_when_they_are_read_first(tmp_path, monkeypatch, make):
    make(tmp_path, FOUND[:300], FOUND)
    for split, n_tokens in (("val", 300), ("train", 1000)):
        assert TokenRows(tmp_path, split, block_size=8, seed=None).n_tokens == n_tokens
    count = 3 if make is modded_folder else 2
    said = rf"has no manifest.json: its {count} shards hold 1,300 tokens in 11 documents; it is written now"
    with pytest.warns(UserWarning, match=said):
        identity = shards.check_shards(tmp_path)
    records = shards.read_manifest(tmp_path)["shards"]
    assert {r["file"]: r["sha256"] for r in records} == {
        r["file"]: files.sha256(tmp_path / r["file"]) for r in records
    }
    assert sum(record["tokens"] for record in records) == 1300
    with monkeypatch.context() as patch:
        patch.setattr(shards, "_read_through", None)  # nothing is read again
        assert shards.check_shards(tmp_path) == identity
    command("fineweb", ["--out", str(tmp_path), "--verify"])
    victim = tmp_path / records[-1]["file"]
    flip(victim, -300)
    again = f"get it again, or delete {tmp_path / 'manifest.json'} if it was changed on purpose"
    for check in (shards.check_shards, lambda folder: command("fineweb", ["--out", str(folder), "--verify"])):
        with pytest.raises(DataError, match=rf"{victim.name}.* sha256 .*: {again}"):
            check(tmp_path)
    with pytest.raises(DataError, match=rf"cannot be repaired, {victim.name}: get its files again"):
        command("fineweb", ["--out", str(tmp_path), "--repair"])
    (tmp_path / "manifest.json").unlink()
    with pytest.warns(UserWarning, match="has no manifest.json"):
        assert shards.check_shards(tmp_path) != identity


def test_a_shard_that_came_later_is_taken_in_without_the_manifest(tmp_path):
    modded_folder(tmp_path, FOUND[:300], FOUND)
    with pytest.warns(UserWarning, match="has no manifest.json"):
        before = shards.check_shards(tmp_path)
    (tmp_path / "fineweb_train_000003.bin").write_bytes(llmc_bytes(FOUND.tolist()))
    with pytest.raises(DataError, match=r"does not list: move it away, or delete manifest.json to have all files"):
        shards.check_shards(tmp_path)
    with pytest.raises(UsageError, match="holds tokens that fineweb.py did not make: take another --out"):
        prepare.Preparation(prepare.PrepareOptions(("a.txt",), tmp_path), print).run()
    (tmp_path / "manifest.json").unlink()
    with pytest.warns(UserWarning, match="its 4 shards hold 2,300 tokens"):
        assert shards.check_shards(tmp_path) != before


def test_tokens_in_a_folder_that_cannot_be_written_have_the_same_identity(tmp_path, disk):
    for folder in (tmp_path, disk("1m")):
        nanogpt_folder(folder, FOUND[:300], FOUND)
    disk("ro")
    with pytest.warns(UserWarning, match="it is written now"):
        identity = shards.check_shards(tmp_path)
    with pytest.warns(UserWarning, match="they are read at every start, because nothing can be written there"):
        assert shards.check_shards(folder) == identity
    assert not (folder / "manifest.json").exists()


def test_tokens_without_any_separator_are_doubted(tmp_path):
    nanogpt_folder(tmp_path, np.arange(100), np.arange(100))
    with pytest.warns(UserWarning, match=r"hold 200 tokens and no separator \(id 50256\); are they GPT-2's\?"):
        shards.check_shards(tmp_path)


def test_a_folder_of_one_split_says_how_a_file_becomes_the_other(tmp_path):
    (tmp_path / "fineweb_train_000001.bin").write_bytes(llmc_bytes(FOUND.tolist()))
    with pytest.raises(
        DataError, match=r"no val shards in .*: rename one of its files to fineweb_val_000000.bin$"
    ):
        TokenRows(tmp_path, "val", block_size=8, seed=None)


def flip(path, position=-1):
    content = bytearray(path.read_bytes())
    content[position] ^= 1
    path.write_bytes(content)


@pytest.mark.fault(34)
def test_training_refuses_a_flipped_bit_and_reads_right_shards_only_once(folder, monkeypatch):
    victim = folder / shards.shard_name("train", 1)
    shards.check_shards(folder)
    read = []
    real = shards._read_through
    monkeypatch.setattr(shards, "_read_through", lambda path, *more: read.append(path.name) or real(path, *more))
    shards.check_shards(folder)
    assert read == []
    flip(victim)
    for _ in range(2):
        with pytest.raises(
            DataError, match=r"000001.bin has sha256 .*…, not .*…: rebuild it with python fineweb.py --out"
        ):
            shards.check_shards(folder)
    assert read == 2 * [victim.name]
    flip(victim)
    shards.check_shards(folder)
    assert read == 3 * [victim.name]
    (folder / ".checked.json").write_text("[1")  # torn: as if it were not there
    shards.check_shards(folder)
    assert sorted(read[3:]) == sorted(path.name for path in folder.glob("*.bin"))


@pytest.mark.fault(31)
@pytest.mark.parametrize("place", [0, 40_050, 2**20 - 1])
def test_an_id_outside_the_vocabulary_is_found_before_training(tmp_path, monkeypatch, place):
    monkeypatch.setattr(shards, "CHUNK", 2**15)
    tokens = np.zeros(2**20, np.uint16)
    tokens[place] = 60000
    shards.write_shard(tmp_path / shards.shard_name("train", 1), tokens)
    with pytest.raises(DataError, match=rf"1.bin has id 60000 at position {place:,} \(vocabulary 50257\)"):
        shards.check_shards(tmp_path)


@pytest.mark.fault(53)
@pytest.mark.parametrize("name", ["../outside.bin", "/etc/passwd", "a/b.bin", "", ".hidden.bin", "..", "x.txt"])
def test_a_manifest_cannot_name_a_file_outside_its_folder(folder, name):
    change(folder, shards=[shards.read_manifest(folder)["shards"][0] | {"file": name}])
    with pytest.raises(DataError, match="unsafe path"):
        shards.verify(folder)


@pytest.mark.fault(34)
@pytest.mark.parametrize("name", ["format", "complete", "tokenizer", "shards", "file", "tokens", "sha256"])
def test_a_manifest_that_lacks_something_or_was_changed_is_one_line(folder, name):
    """A manifest that somebody edited has no checksum; it must have what is needed of any folder of shards."""
    right = shards.read_manifest(folder)
    path = folder / "manifest.json"
    for without_checksum in (True, False):
        manifest = json.loads(path.read_text()) if not without_checksum else json.loads(json.dumps(right))
        del (manifest if name in manifest else manifest["shards"][1])[name]
        path.write_text(json.dumps(manifest))
        for read in (shards.check_shards, shards.verify):
            with pytest.raises(
                DataError, match=r"^[^\n]*manifest.json is damaged \([^\n]*: delete it, then [^\n]*$"
            ):
                read(folder)
        shards.write_manifest(folder, right)


def test_the_identity_follows_the_tokens_and_nothing_else(folder):
    before = shards.check_shards(folder)
    change(folder, totals={"documents": 5})
    assert shards.check_shards(folder) == before
    victim = folder / shards.shard_name("train", 1)
    shards.write_shard(victim, TOKENS[::-1])
    records = shards.read_manifest(folder)["shards"]
    change(folder, shards=[records[0], records[1] | {"sha256": files.sha256(victim)}])
    assert shards.check_shards(folder) != before


def test_document_sources_are_kept_beside_the_shard(tmp_path):
    path = tmp_path / shards.shard_name("train", 1)
    assert shards.read_document_sources(path, 2) is None
    shards.write_document_sources(path, ["a", None], ["u", "v"])
    assert shards.read_document_sources(path, 2) == [("a", "u"), (None, "v")]
    assert shards.list_shards(tmp_path, "train") == []


@pytest.mark.fault(33)
@pytest.mark.parametrize("content", [b"", b"<html>", "cut", "folder", "other columns", "one row", "no text"])
def test_a_damaged_table_of_documents_is_one_line(tmp_path, content):
    """A step's documents cannot be told then; training never reads the table."""
    path = tmp_path / shards.shard_name("train", 1)
    shards.write_shard(path, np.tile(TOKENS, 4))
    shards.write_document_sources(path, ["a"] * 8, ["u"] * 8)
    rows = TokenRows(tmp_path, "train", block_size=4, seed=1)
    assert {(read.id, read.url) for read in rows.documents(0, 6)} == {("a", "u")}
    table = shards.sources_path(path)
    whole = table.read_bytes()
    table.unlink()
    if content == "folder":
        table.mkdir()
    elif content == "one row":
        shards.write_document_sources(path, ["a"], ["u"])
    elif content in ("other columns", "no text"):
        columns = (
            {"id": pa.array([b"\xff"] * 8), "url": pa.array([b""] * 8)} if content == "no text" else {"x": [1]}
        )
        pq.write_table(pa.table(columns), table)
    else:
        table.write_bytes(whole[:-9] if content == "cut" else content)
    rows = TokenRows(tmp_path, "train", block_size=4, seed=1)
    with pytest.raises(DataError, match=rf"^[^\n]*{table.name}[^\n]*: [^\n]*$"):
        rows.documents(0, 6)
    assert len(rows.rows(0, 6)) == 6
