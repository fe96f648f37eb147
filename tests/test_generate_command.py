"""generate.py as a user runs it."""

import os
import pty
import stat
import subprocess

import pytest
from conftest import door_command
from questions import write_model

pytestmark = pytest.mark.slow


@pytest.fixture
def run(tmp_path):
    return write_model(tmp_path / "model").name


@pytest.fixture
def write(call, run):
    def say(*words):
        done = call("generate.py", "-m", run, *words)
        assert done.returncode == 0, done.stderr
        return done.stdout

    return say


def test_the_prompt_and_its_continuation_are_streamed(write):
    text = write("Hello", "--max-tokens", 5)
    assert text.startswith("Hello")
    assert len(text) > len("Hello") + 5
    assert write("Hello", "--max-tokens", 5) == text
    assert write("--max-tokens", 3).strip()  # without a prompt it begins a document


def test_samples_differ_and_greedy_does_not(write):
    words = ["A", "--max-tokens", 4]
    _, first, second = write(*words, "-n", 2).split("--- sample ")
    assert first[1:] != second[1:]
    _, first, second = write(*words, "-n", 2, "--temperature", 0).split("--- sample ")
    assert first[1:] == second[1:]
    for cold in ("1e-40", "1e-400"):  # the least temperature is the likeliest token
        assert f"\n{write(*words, '--temperature', cold, '--top-p', '1e-300')}" == second[1:]


@pytest.mark.parametrize(
    ("code", "message", "words"),
    [
        (2, "--top-p 2: expected a number above 0 and up to 1", ["--top-p", "2"]),
        (2, "--temperature nan: expected a number from 0 to 1,000", ["--temperature", "nan"]),
        (2, "--temperature -1: expected a number from 0 to 1,000", ["--temperature", "-1"]),
        (2, "--top-k 0: expected a whole number from 1", ["--top-k", "0"]),
        (2, "--samples 0: expected a whole number from 1", ["-n", "0"]),
        (2, "--max-tokens 1e300: expected a whole number from 1", ["--max-tokens", "1e300"]),
        (2, "--seed 2**64: expected a whole number from 0", ["--seed", "2**64"]),
        (2, "--model '': expected a name", ["-m", ""]),
        (65, "no model at runs/nothing", []),
        (65, "the prompt is no UTF-8 text: byte 0xff at 1", [os.fsdecode(b"a\xff")]),
    ],
)
def test_mistakes_are_answered_in_one_line(refused, code, message, words):
    refused(code, message, "generate.py", "-m", "runs/nothing", *words)


def test_standard_input_that_is_no_text_is_bad_data(tmp_path):
    command = door_command("generate.py", "-m", "runs/x", "-")
    done = subprocess.run(command, input=b"a\xff", cwd=tmp_path, capture_output=True)
    message = "error: standard input is no UTF-8 text: byte 0xff at 1\n"
    assert (done.returncode, done.stderr.decode()) == (65, message)


def test_a_full_disk_under_the_output_is_said_once(tmp_path, run):
    try:
        os.mknod(tmp_path / "full", 0o666 | stat.S_IFCHR, os.makedev(1, 7))
        full = (tmp_path / "full").open("wb", buffering=0)
    except OSError:
        pytest.skip("making a device needs root, and a disk that allows devices")
    for words in (["-m", run, "Hello", "--max-tokens", 2], ["--help"]):
        done = subprocess.run(
            door_command("generate.py", *words), cwd=tmp_path, stdout=full, stderr=subprocess.PIPE, text=True
        )
        told = "error: cannot write standard output: No space left on device\n"
        assert (done.returncode, done.stderr) == (73, told)


def test_a_closed_output_is_no_crash(tmp_path, run):
    command = ["sh", "-c", '"$@" >&- 2>&-', "sh", *door_command("generate.py", "-m", run, "A", "--max-tokens", 1)]
    assert subprocess.run(command, cwd=tmp_path).returncode == 0


def test_a_terminal_is_given_no_control_characters_and_a_pipe_all(write, tmp_path, run):
    words = ["a\x1b[2J\tb\nc\x9b\u202e", "--max-tokens", 1]
    assert write(*words).startswith(words[0])
    ours, theirs = pty.openpty()
    command = door_command("generate.py", "-m", run, *words)
    done = subprocess.run(command, cwd=tmp_path, stdout=theirs, stderr=subprocess.PIPE)
    os.close(theirs)
    shown = os.read(ours, 10_000).decode()
    os.close(ours)
    assert done.returncode == 0, done.stderr
    assert shown.startswith("a\\x1b[2J\tb\r\nc\\x9b\\u202e")
