"""Files that are whole, and folders that one process holds."""

import hashlib
import os
import subprocess
import sys

import pytest

from aymen_gpt import files
from aymen_gpt.errors import CannotWrite, DataError


def test_a_replaced_file_is_whole_and_leaves_nothing_beside_it(tmp_path):
    path = tmp_path / "a.txt"
    files.replace_text(path, "old")
    files.replace_text(path, "new ü")
    assert path.read_text(encoding="utf-8") == "new ü"
    assert list(tmp_path.iterdir()) == [path]


def test_a_replacement_that_fails_keeps_the_old_file(tmp_path, monkeypatch):
    path = tmp_path / "a.txt"
    files.replace_text(path, "old")
    monkeypatch.setattr(os, "replace", lambda *names: (_ for _ in ()).throw(OSError("no")))
    with pytest.raises(OSError, match="no"):
        files.replace_text(path, "new")
    assert path.read_text() == "old"


def test_sha256_is_that_of_the_content(tmp_path):
    (tmp_path / "f").write_bytes(b"abc" * 100_000)
    assert files.sha256(tmp_path / "f") == hashlib.sha256(b"abc" * 100_000).hexdigest()


def test_a_json_object_is_read(tmp_path):
    (tmp_path / "a.json").write_bytes('{"ü": [1, null]}'.encode())
    assert files.read_json(tmp_path / "a.json") == {"ü": [1, None]}


@pytest.mark.parametrize(
    ("content", "reason"),
    [(None, "No such file or directory"), (b"", r"no JSON \(Expecting value"), (b'{"a": ', "no JSON"),
     (b'{"a": "\xff"}', "no UTF-8 at byte 7"), (b"[1]", "JSON of a list, not of an object"), (b"null", "NoneType"),
     (b"5", "int"), (b'{"a": ' + b"[" * 100_000, "nested too deep"), (b'{"a": ' + b"9" * 5000 + b"}", "no JSON")],
    ids=range(9),
)  # fmt: skip
def test_anything_but_a_json_object_is_a_data_error_with_file_and_reason(tmp_path, content, reason):
    path = tmp_path / "a.json"
    if content is not None:
        path.write_bytes(content)
    with pytest.raises(DataError, match=rf"cannot read {path}: .*{reason}"):
        files.read_json(path)
    with pytest.raises(DataError, match="Is a directory"):
        files.read_json(tmp_path)


HOLD = """
import sys; from pathlib import Path; from aymen_gpt import files
held = files.lock(Path(sys.argv[1]), "--run"); print("held", flush=True); sys.stdin.read()
"""


@pytest.mark.fault(25)
def test_a_folder_has_one_holder_and_a_dead_one_holds_nothing(tmp_path):
    holder = subprocess.Popen(
        [sys.executable, "-c", HOLD, str(tmp_path / "run")],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
    )
    assert holder.stdout.readline() == "held\n"
    with pytest.raises(CannotWrite, match=rf"run is in use by pid {holder.pid} since .*; .* another --run"):
        files.lock(tmp_path / "run", "--run")
    holder.kill()
    holder.communicate()
    files.lock(tmp_path / "run", "--run").close()


@pytest.mark.fault(22, 26)
def test_a_full_or_read_only_folder_cannot_be_held_and_the_error_says_what_to_do(disk):
    with pytest.raises(
        CannotWrite, match=r"cannot write into .*a: Read-only file system; choose another folder with --out"
    ):
        files.lock(disk("ro") / "a", "--out")
    folder = disk("4k")
    (folder / "full").write_bytes(bytes(4096))
    with pytest.raises(CannotWrite, match=r"disk: No space left on device; make room or .* folder with --out"):
        files.lock(folder, "--out")
