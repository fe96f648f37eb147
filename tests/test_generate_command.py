"""generate.py as a user runs it."""

import os
import pty
import stat
import subprocess

import pytest
import torch
from conftest import door_command
from test_checkpoint import snapshot

from aymen_gpt.model.gpt import GPT, PRESETS
from aymen_gpt.training import checkpoint, optim

pytestmark = pytest.mark.slow


@pytest.fixture
def run(tmp_path):
    model = GPT(PRESETS["tiny"], torch.Generator().manual_seed(0))
    with torch.no_grad():
        model.wte.weight *= 10  # a model with opinions
    optimizer = optim.adamw(model, lr=0.0, betas=(0.9, 0.9), weight_decay=0.0)
    model(torch.zeros(1, 4, dtype=torch.long)).sum().backward()
    optimizer.step()
    checkpoint.publish(tmp_path / "runs/x", checkpoint.capture(model, optimizer), snapshot(3), keep_last=1)
    return "runs/x"


def test_the_prompt_and_its_continuation_are_streamed(door, run):
    done = door("generate.py", "-m", run, "Hello", "--max-tokens", 5)
    assert done.returncode == 0, done.stderr
    assert done.stdout.startswith("Hello")
    assert len(done.stdout) > len("Hello") + 5
    assert door("generate.py", "-m", run, "Hello", "--max-tokens", 5).stdout == done.stdout


def test_samples_differ_and_greedy_does_not(door, run):
    options = ["-m", run, "A", "--max-tokens", 4, "-n", 2]
    _, first, second = door("generate.py", *options).stdout.split("--- sample ")
    assert first[1:] != second[1:]
    _, first, second = door("generate.py", *options, "--temperature", 0).stdout.split("--- sample ")
    assert first[1:] == second[1:]


def test_without_a_prompt_it_begins_a_document(door, run):
    done = door("generate.py", "-m", run, "--max-tokens", 3)
    assert done.returncode == 0
    assert done.stdout.strip()


@pytest.mark.parametrize(
    ("words", "code", "message"),
    [
        (["--top-p", "2"], 2, "error: --top-p 2: expected a number above 0 and up to 1"),
        (["--temperature", "nan"], 2, "error: --temperature nan: expected a number from 0 to 1,000"),
        (["--temperature", "-1"], 2, "error: --temperature -1: expected a number from 0 to 1,000"),
        (["--top-k", "0"], 2, "error: --top-k 0: expected a whole number from 1"),
        (["-n", "0"], 2, "error: --samples 0: expected a whole number from 1"),
        (["--max-tokens", "1e300"], 2, "error: --max-tokens 1e300: expected a whole number from 1"),
        (["--seed", "2**64"], 2, "error: --seed 2**64: expected a whole number from 0"),
        (["-m", ""], 2, "error: --model '': expected a name"),
        (["-m", "runs/nothing"], 65, "error: no model at runs/nothing"),
    ],
)
def test_mistakes_are_answered_in_one_line(door, words, code, message):
    done = door("generate.py", "-m", "runs/nothing", "prompt", *words)
    assert done.returncode == code
    assert done.stderr.startswith(message)
    assert len(done.stderr.strip().splitlines()) == 1


def test_the_least_temperature_is_the_likeliest_token(door, run):
    words = ["-m", run, "A", "--max-tokens", 4]
    likeliest = door("generate.py", *words, "--temperature", 0).stdout
    for cold in ("1e-40", "1e-400"):
        assert door("generate.py", *words, "--temperature", cold, "--top-p", "1e-300").stdout == likeliest


@pytest.mark.parametrize(
    ("words", "stdin", "code", "message"),
    [
        (["-"], b"a\xff", 65, "error: standard input is no UTF-8 text: byte 0xff at 1\n"),
        ([b"a\xff"], b"", 65, "error: the prompt is no UTF-8 text: byte 0xff at 1\n"),
    ],
)
def test_a_prompt_that_is_no_text_is_bad_data(tmp_path, words, stdin, code, message):
    command = [*door_command("generate.py", "-m", "runs/x"), *words]
    done = subprocess.run(command, input=stdin, cwd=tmp_path, capture_output=True)
    assert (done.returncode, done.stderr.decode()) == (code, message)


def test_a_full_disk_under_the_output_is_said_once(tmp_path, run):
    try:
        os.mknod(tmp_path / "full", 0o666 | stat.S_IFCHR, os.makedev(1, 7))
        full = (tmp_path / "full").open("wb", buffering=0)
    except OSError:
        pytest.skip("making a device needs root, and a disk that allows devices")
    for words in (["-m", run, "Hello", "--max-tokens", 2], ["--help"], ["--version"]):
        done = subprocess.run(
            door_command("generate.py", *words), cwd=tmp_path, stdout=full, stderr=subprocess.PIPE, text=True
        )
        told = "error: cannot write standard output: No space left on device\n"
        assert (done.returncode, done.stderr) == (73, told)


def test_a_closed_output_is_no_crash(tmp_path, run):
    command = ["sh", "-c", '"$@" >&- 2>&-', "sh", *door_command("generate.py", "-m", run, "A", "--max-tokens", 1)]
    assert subprocess.run(command, cwd=tmp_path).returncode == 0


def test_a_terminal_is_given_no_control_characters_and_a_pipe_all(door, tmp_path, run):
    prompt = "a\x1b[2J\tb\nc\x9b\u202e"
    words = ["-m", run, prompt, "--max-tokens", 1]
    assert door("generate.py", *words).stdout.startswith(prompt)
    ours, theirs = pty.openpty()
    done = subprocess.run(door_command("generate.py", *words), cwd=tmp_path, stdout=theirs, stderr=subprocess.PIPE)
    os.close(theirs)
    shown = os.read(ours, 10_000).decode()
    os.close(ours)
    assert done.returncode == 0, done.stderr
    assert shown.startswith("a\\x1b[2J\tb\r\nc\\x9b\\u202e")
