"""fineweb.py as a person uses it: words in, shards out, one clear line for a mistake, kill -9 forgiven."""

import json
import os
import random
import shlex
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
from conftest import door_command
from fake_hub import FakeHub
from test_prepare import digest, make_texts, tokens_of, write_jsonl, write_parquet

from aymen_gpt.files import read_json

pytestmark = pytest.mark.slow


@pytest.fixture
def texts(tmp_path):
    return write_jsonl(tmp_path / "texts.jsonl", ["", *make_texts(400)])


def test_text_becomes_shards_and_the_summary_says_what_happened(door, call, texts, tmp_path):
    (tmp_path / "more.txt").write_text("One more.")
    sources = ["--source", f"./{texts.name}", "--source", "more.txt", "--out"]
    done = door("fineweb.py", *sources, "my data", "--shard-tokens", "2e3", "--workers", 1)
    assert done.returncode == 0, done.stderr
    n_tokens = sum(map(len, tokens_of(tmp_path / "my data")))
    lines = done.stdout.splitlines()
    assert lines[0].startswith("prepared: my data, ")
    assert lines[1].split() == ["documents", "401"]
    assert lines[2].startswith(f"tokens     {n_tokens:,} (")
    assert lines[3].split() == ["skipped", "1", "empty"]
    assert lines[4].startswith("next       python pretrain.py --preset demo --data 'my data' --steps ")
    again = call("fineweb.py", *sources, "my data/", "--shard-tokens", "2_000")
    assert again.stdout.startswith("already prepared: my data, ")


@pytest.mark.fault(34)
def test_verify_and_repair(call, texts, tmp_path):
    words = ["fineweb.py", "--out", "d"]
    assert call(*words, "--source", texts, "--shard-tokens", 2000, "--workers", 0).returncode == 0
    assert call(*words, "--verify").stdout == "d: all files are as the manifest says\n"
    before = digest(tmp_path / "d")
    victim = tmp_path / "d/shard_train_000002.bin"
    victim.write_bytes(victim.read_bytes()[:-2] + b"\x01\x00")
    broken = call(*words, "--verify")
    assert broken.returncode == 65
    assert broken.stderr.startswith("error: 1 damaged file in d (shard_train_000002.bin: sha256 ")
    assert broken.stderr.endswith("): rebuild it with python fineweb.py --out d --repair\n")
    assert call(*words, "--repair", "--workers", 0).stdout.startswith("d: 1 file rebuilt")
    assert digest(tmp_path / "d") == before


MISTAKES = [
    (2, "--source nowhere: no such file or folder", "--source nowhere"),
    (2, "--shard-tokens 0: expected a whole number from 1 to 2,147,483,647", "--shard-tokens 0"),
    (2, "--shard-tokens 2**31: expected a whole number from 1 to 2,147,483,647", "--shard-tokens 2**31"),
    (2, "--source '': expected a name", "--source="),
    (2, "--source '': expected a name", "--source file ''"),
    (2, "--out '': expected a name", "--out="),
    (2, "--text-column '': expected a name", "--text-column="),
    (2, "--revision '': expected a name", "--revision="),
    (2, "--workers -1: expected a whole number from 0 to 10,000", "--workers -1"),
    (2, "--max-tokens 1.5: expected a whole number", "--max-tokens 1.5"),
    (2, "not allowed with argument", "--verify --repair"),
    (2, "--restart begins anew, --verify does not", "--verify --restart"),
    (2, "--restart begins anew, --repair does not", "--repair --restart"),
    (65, "has no manifest.json", "--verify"),
    (65, "has no manifest.json", "--repair"),
    pytest.param(69, "HF_HUB_OFFLINE is set", "", marks=pytest.mark.fault(45)),
    (73, "cannot write into file", "--out file"),
]


@pytest.mark.parametrize(("code", "message", "words"), MISTAKES)
def test_a_mistake_is_one_line_and_its_exit_code(refused, tmp_path, code, message, words):
    (tmp_path / "file").touch()
    refused(code, message, "fineweb.py", *shlex.split(words))


@pytest.mark.fault(26)
@pytest.mark.skipif(not hasattr(os, "WUNTRACED"), reason="stops a process and waits for that")
def test_a_second_preparation_is_refused_and_disturbs_neither_the_first_nor_readers(call, texts, tmp_path):
    words = ["--source", texts, "--shard-tokens", 2000, "--workers", 0, "--out"]
    assert call("fineweb.py", *words, "whole").returncode == 0
    command = door_command("tests/crashes.py", "stop:8:os.replace", "fineweb.py", *words, "d")
    first = subprocess.Popen(command, cwd=tmp_path, stdout=subprocess.PIPE, text=True)
    try:
        assert os.WIFSTOPPED(os.waitpid(first.pid, os.WUNTRACED)[1])
        before = digest(tmp_path / "d")
        second = call("fineweb.py", *words, "d")
        assert second.returncode == 73
        assert second.stderr.startswith(f"error: d is in use by pid {first.pid} since ")
        assert second.stderr.endswith(" UTC; stop it or use another --out\n")
        assert call("fineweb.py", "--out", "d", "--repair").returncode == 73
        verified = call("fineweb.py", "--out", "d", "--verify")
        assert verified.stdout.endswith("says; more are to come: run the same fineweb.py command again\n")
        assert [len(tokens) for tokens in tokens_of(tmp_path / "d")][1:] == [2000, 2000]
        assert digest(tmp_path / "d") == before
        first.send_signal(signal.SIGCONT)
        assert first.communicate(timeout=60)[0].startswith("prepared: d, ")
    finally:
        first.kill()
    assert digest(tmp_path / "d") == digest(tmp_path / "whole")


@pytest.mark.fault(22)
def test_a_full_disk_is_exit_73_and_the_same_command_continues(call, texts, tmp_path):
    resource = pytest.importorskip("resource")
    words = ["fineweb.py", "--source", texts, "--shard-tokens", 8000, "--workers", 0, "--out"]
    assert call(*words, "whole").returncode == 0
    largest = (tmp_path / "whole/shard_val_000000.bin").stat().st_size

    def full():  # shard 0 (validation) fits, shard 1 does not
        resource.setrlimit(resource.RLIMIT_FSIZE, (largest, resource.RLIM_INFINITY))

    out = tmp_path / "full"
    done = subprocess.run(door_command(*words, out), preexec_fn=full, capture_output=True, text=True)
    assert done.returncode == 73, done.stderr
    assert "shard_train_000001.bin: File too large; make room" in done.stderr
    assert [path.name for path in out.glob("*.bin")] == ["shard_val_000000.bin"]
    assert not list(out.glob(".*.tmp"))
    assert call(*words, out).returncode == 0
    assert digest(out) == digest(tmp_path / "whole")


@pytest.mark.fault(58)
def test_paths_with_blanks_and_letters_of_all_kinds_work_from_text_to_a_story(door, call, tmp_path):
    place = tmp_path / "my té xt's; $HOME & 中 100%"
    place.mkdir()
    texts = write_jsonl(place / "á b.jsonl", make_texts(400))
    made = door("fineweb.py", "--source", texts, "--out", place / "out put", "--workers", 2)
    assert made.returncode == 0, made.stderr
    then = shlex.split(made.stdout.splitlines()[-1])
    assert then[:7] == ["next", "python", "pretrain.py", "--preset", "demo", "--data", str(place / "out put")]
    small = ["--preset", "tiny", "--steps", "2", "--val-tokens", "256", "--hellaswag-every", "0", "--run-dir"]
    trained = call(*then[2:], *small, place / "rün")
    assert trained.returncode == 0, trained.stderr
    assert (place / "rün/report.html").is_file()
    wrote = door("generate.py", "-m", place / "rün", "日本 é", "--max-tokens", 3, PYTHONIOENCODING="ascii")
    assert wrote.returncode == 0, wrote.stderr
    assert wrote.stdout.startswith("\\u65e5\\u672c \\xe9")


@pytest.mark.fault(58)
@pytest.mark.skipif(sys.platform != "linux", reason="names of files are letters there, not bytes")
def test_names_that_are_no_letters_at_all_work_too(door, tmp_path):
    write_jsonl(tmp_path / os.fsdecode(b"in\xff.jsonl"), make_texts(50))
    words = ["--source", os.fsdecode(b"in\xff.jsonl"), "--out", os.fsdecode(b"o\xfe"), "--workers", 1]
    for _ in range(2):
        done = door("fineweb.py", *words)
        assert done.returncode == 0, done.stderr
    assert done.stdout.startswith("already prepared: o\\udcfe, ")


@pytest.mark.fault(46, 54)
def test_the_published_command_speaks_to_the_hub_through_its_environment(door, tmp_path):
    files = {f"sample/10BT/00{i}_00000.parquet": f"{i}.parquet" for i in range(2)}
    for number, name in enumerate(files.values()):
        write_parquet(tmp_path / name, make_texts(50, number))
    contents = {name: (tmp_path / path).read_bytes() for name, path in files.items()}
    with FakeHub(contents) as hub:
        environment = {"HF_ENDPOINT": hub.endpoint, "HF_HUB_OFFLINE": "0", "HF_HOME": str(tmp_path / "hf")}
        environment["HF_TOKEN"] = "hf_canary_secret"
        done = door("fineweb.py", "--workers", 1, **environment)
        hub.faults["GET api"] = ["404", ...]
        refused = door("fineweb.py", "--out", "other", "--workers", 0, **environment)
    assert done.returncode == 0, done.stderr
    assert "downloading sample/10BT/001_00000.parquet" in done.stderr
    assert "pretrain.py --preset demo --data edu_fineweb10B --steps " in done.stdout.splitlines()[-1]
    manifest = (tmp_path / "edu_fineweb10B/manifest.json").read_text()
    assert json.loads(manifest)["totals"]["documents"] == 100
    assert refused.returncode == 69
    assert "not found or private (HTTP 404)" in refused.stderr
    assert "canary" not in manifest + done.stderr + done.stdout + refused.stderr


def workers_of(pid):
    """The processes that tokenize for a fineweb.py (Python's own resource tracker is no worker)."""
    path = Path(f"/proc/{pid}/task/{pid}/children")
    found = path.read_text().split() if path.exists() else []
    return [int(child) for child in found if b"spawn_main" in Path(f"/proc/{child}/cmdline").read_bytes()]


@pytest.mark.fault(49)
@pytest.mark.skipif(not Path("/proc/self/task").exists(), reason="finds worker processes through /proc")
def test_kill_minus_nine_at_any_moment_then_the_same_command_gives_the_same_bytes(tmp_path):
    texts = write_parquet(tmp_path / "texts.parquet", make_texts(6000, longest=90), rows=100)
    command = ["fineweb.py", "--source", texts, "--shard-tokens", 25_000, "--workers", 2, "--out"]
    subprocess.run(door_command(*command, tmp_path / "whole"), check=True, capture_output=True)
    whole = digest(tmp_path / "whole")
    dice = random.Random(7)
    kills = rounds = 0
    while kills < 6:
        rounds += 1
        out = tmp_path / f"out{rounds}"
        while not ((out / "manifest.json").exists() and read_json(out / "manifest.json")["complete"]):
            wanted = len(list(out.glob("*.bin"))) + dice.randint(0, 4)
            process = subprocess.Popen(door_command(*command, out), stderr=subprocess.PIPE, text=True)
            while process.poll() is None and len(list(out.glob("*.bin"))) < wanted:
                time.sleep(0.005)
            time.sleep(dice.uniform(0.0, 0.05))
            workers = workers_of(process.pid)
            victim = dice.choice(workers) if workers and kills % 3 == 2 else process.pid
            if process.poll() is None:
                os.kill(victim, signal.SIGKILL)
            said, code = process.communicate(timeout=60)[1], process.returncode
            kills += code != 0
            assert code in (0, 1, -9), said
            assert code != 1 or said.splitlines()[-1].startswith("error: a worker process died"), said
        assert digest(out) == whole
