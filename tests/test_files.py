"""Files that are whole, and folders that one process holds."""

import os
import shutil
import stat
import subprocess
import sys
from threading import Thread

import pytest

from aymen_gpt import files
from aymen_gpt.errors import CannotWrite, DataError


def test_a_replaced_file_is_whole_and_leaves_nothing_beside_it(tmp_path, monkeypatch):
    path = tmp_path / ("n" * 251 + ".txt")  # the longest name a disk allows
    files.replace_text(path, "old")
    files.replace_text(path, "new ü")
    monkeypatch.setattr(os, "replace", lambda *names: (_ for _ in ()).throw(OSError("no")))
    with pytest.raises(OSError, match="no"):
        files.replace_text(path, "newer")
    assert path.read_text(encoding="utf-8") == "new ü"
    assert list(tmp_path.iterdir()) == [path]


def test_a_link_stays_a_link_and_its_target_is_replaced(tmp_path):
    (tmp_path / "link").symlink_to("folder/new.txt")
    for text in ("first", "second"):
        files.replace_text(tmp_path / "link", text, follow=True)
        assert (tmp_path / "folder/new.txt").read_text() == text
    assert (tmp_path / "link").is_symlink()
    assert os.listdir(tmp_path / "folder") == ["new.txt"]


def test_a_link_to_standard_output_is_written_through_in_its_turn(tmp_path):
    """As /dev/stdout is where it was redirected to a file; the link is made here."""
    (tmp_path / "link").symlink_to("/proc/self/fd/1")
    write = (
        "from pathlib import Path; from aymen_gpt import files;"
        "files.replace_text(Path('link'), 'x\\n', follow=True)"
    )
    with (tmp_path / "out").open("w") as out:
        subprocess.run(
            [sys.executable, "-c", f"print('before'); {write}; print('after')"],
            cwd=tmp_path,
            stdout=out,
            check=True,
        )
    assert (tmp_path / "out").read_text() == "before\nx\nafter\n"


@pytest.mark.parametrize("linked", [False, True])
def test_a_pipe_is_written_through_and_stays_a_pipe(tmp_path, linked):
    os.mkfifo(tmp_path / "pipe")
    (tmp_path / "link").symlink_to("pipe")
    read: list[str] = []
    reader = Thread(target=lambda: read.append((tmp_path / "pipe").read_text()), daemon=True)
    reader.start()
    files.check_writable(tmp_path / "pipe")  # which must neither block nor write
    files.replace_text(tmp_path / ("link" if linked else "pipe"), "content", follow=True)
    reader.join(10)
    assert read == ["content"]
    assert stat.S_ISFIFO((tmp_path / "pipe").stat().st_mode)
    assert sorted(os.listdir(tmp_path)) == ["link", "pipe"]


def test_a_device_is_written_through_and_stays_a_device(tmp_path):
    """The node is a second /dev/full, made here: this test must not be able to hurt the real one."""
    node = tmp_path / "full"
    try:
        os.mknod(node, 0o666 | stat.S_IFCHR, os.makedev(1, 7))
        node.open("wb", buffering=0).close()
    except OSError:
        pytest.skip("making a device needs root, and a disk that allows devices")
    with pytest.raises(CannotWrite, match=r"cannot write .*full: No space left on device; make room"):
        files.replace_text(node, "content")
    assert stat.S_ISCHR(node.stat().st_mode)
    assert os.listdir(tmp_path) == ["full"]


@pytest.mark.parametrize(
    ("name", "reason"),
    [
        ("file/x", "a file stands where a folder should be"),
        ("file/new/x", "a file stands where a folder should be"),
        ("n" * 300, "File name too long"),
        ("new/" + "n" * 300, "File name too long"),
        ("folder", "this is a folder"),
        ("loop/x", "Too many levels of symbolic links"),
        ("gone/link", "a file stands where a folder should be"),
    ],
)
def test_whatever_stops_the_writing_is_said_before_and_after_the_work(tmp_path, name, reason):
    (tmp_path / "file").touch()
    (tmp_path / "folder").mkdir()
    (tmp_path / "gone").mkdir()
    (tmp_path / "loop").symlink_to("loop")
    (tmp_path / "gone/link").symlink_to("../file/x")
    with pytest.raises(CannotWrite, match=rf"cannot write .*: {reason}; choose another"):
        files.check_writable(tmp_path / name)
    assert sorted(os.listdir(tmp_path)) == ["file", "folder", "gone", "loop"]
    with pytest.raises(CannotWrite, match=rf"cannot write .*: {reason}; choose another"):
        files.replace_text(tmp_path / name, "text", follow=True)


def test_what_fails_inside_is_one_line_if_it_is_the_disk_and_else_stays_what_it_is(tmp_path):
    with pytest.raises(CannotWrite, match=r"cannot write .*x: No such file"), files.whole_file(tmp_path / "new/x"):
        shutil.rmtree(tmp_path / "new")
    for error in (ValueError("a bug"), CannotWrite("said already"), OSError("no number: a library's own")):
        with pytest.raises(type(error), match=str(error)), files.whole_file(tmp_path / "x"):
            raise error
    assert list(tmp_path.iterdir()) == []


def test_a_check_before_the_work_leaves_nothing_behind(tmp_path):
    files.check_writable(tmp_path / "new/folder/x")
    (tmp_path / "old").write_text("old")
    files.check_writable(tmp_path / "old")
    assert os.listdir(tmp_path) == ["old"]
    assert (tmp_path / "old").read_text() == "old"


@pytest.mark.parametrize(
    ("content", "reason"),
    [(None, "No such file or directory"), (b"", r"no JSON \(Expecting value"), (b'{"a": ', "no JSON"),
     (b'{"a": "\xff"}', "no JSON .*byte 0xff"), (b"[1]", "expected a JSON object"),
     (b'{"a": ' + b"[" * 100_000, "nested too deep"), (b'{"a": ' + b"9" * 5000 + b"}", "no JSON")],
    ids=range(7),
)  # fmt: skip
def test_anything_but_a_json_object_is_a_data_error_with_file_and_reason(tmp_path, content, reason):
    path = tmp_path / "a.json"
    if content is not None:
        path.write_bytes(content)
    with pytest.raises(DataError, match=rf"cannot read {path}: .*{reason}"):
        files.read_json(path)
    with pytest.raises(DataError, match="Is a directory"):
        files.read_json(tmp_path)
    path.write_bytes('{"ü": [1, null]}'.encode())
    assert files.read_json(path) == {"ü": [1, None]}


HOLD = """
import sys; from pathlib import Path; from aymen_gpt import files
held = files.lock(Path(sys.argv[1]), "--run-dir"); print("held", flush=True); sys.stdin.read()
"""


@pytest.mark.fault(25)
def test_a_folder_has_one_holder_and_a_dead_one_holds_nothing(tmp_path):
    command = [sys.executable, "-c", HOLD, str(tmp_path / "run")]
    holder = subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)
    assert holder.stdout.readline() == "held\n"
    with pytest.raises(CannotWrite, match=rf"run is in use by pid {holder.pid} since .*; .* another --run-dir"):
        files.lock(tmp_path / "run", "--run-dir")
    (tmp_path / "run/.lock").write_text("")  # before it has written its name
    with pytest.raises(CannotWrite, match=r"is in use by another process; stop it or use another --run-dir"):
        files.lock(tmp_path / "run", "--run-dir")
    holder.kill()
    holder.communicate()
    files.lock(tmp_path / "run", "--run-dir").close()


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
