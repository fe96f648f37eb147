"""generate.py as a user runs it."""

import pytest
import torch
from test_checkpoint import snapshot

from aymen_gpt.model.gpt import GPT, PRESETS
from aymen_gpt.training import checkpoint, optim


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
        (["--top-p", "2"], 2, "error: --top-p must be above 0 and at most 1, got 2.0"),
        (["--temperature", "nan"], 2, "error: --temperature must be 0 (greedy) or a positive number"),
        (["--top-k", "0"], 2, "error: --top-k must be at least 1, got 0"),
        (["-n", "0"], 2, "error: --samples and --max-tokens must be at least 1"),
        (["-m", "runs/nothing"], 65, "error: no model at runs/nothing"),
    ],
)
def test_mistakes_are_answered_in_one_line(door, words, code, message):
    done = door("generate.py", "-m", "runs/nothing", "prompt", *words)
    assert done.returncode == code
    assert done.stderr.startswith(message)
    assert len(done.stderr.strip().splitlines()) == 1
