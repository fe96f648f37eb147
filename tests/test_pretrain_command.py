"""pretrain.py as a user runs it: real signals, mistakes, options."""

import json
import os
import signal

import pytest
from conftest import make_shards
from training_runs import TINY, rows, start, wait_for_step

pytestmark = pytest.mark.slow


@pytest.mark.fault(1, 3)
def test_sigterm_saves_kill_nine_does_not_and_the_same_command_continues(call, shards, tmp_path):
    words = [*TINY, "--data", shards, "--steps", 20, "--val-every", 10, "--run-dir"]
    whole = call("pretrain.py", *words, "whole")
    assert whole.returncode == 0, whole.stderr
    process = start(tmp_path, *words, "run")
    wait_for_step(tmp_path / "run", 7, process)
    process.send_signal(signal.SIGTERM)
    _, told = process.communicate(timeout=60)
    assert process.returncode == 75
    status = json.loads((tmp_path / "run/status.json").read_text())
    assert status["state"] == "stopped"
    assert f"\nstopped by SIGTERM at step {status['step']} of 20" in told
    assert (tmp_path / f"run/checkpoints/step-{status['step']:09d}/manifest.json").exists()
    process = start(tmp_path, *words, "run")
    wait_for_step(tmp_path / "run", 16, process)
    process.kill()
    _, told = process.communicate()
    assert f"resuming from step {status['step']}" in told
    again = call("pretrain.py", *words, "run")
    assert again.returncode == 0, again.stderr
    assert "resuming from step 1" in again.stderr
    assert rows(tmp_path / "run") == rows(tmp_path / "whole")


@pytest.mark.fault(25)
def test_a_second_process_on_the_same_run_is_refused(call, shards, tmp_path):
    words = [*TINY, "--data", shards, "--steps", 500, "--run-dir", "run"]
    process = start(tmp_path, *words)
    try:
        wait_for_step(tmp_path / "run", 1, process)
        second = call("pretrain.py", *words)
    finally:
        process.kill()
        process.communicate()
    assert second.returncode == 73
    assert f"error: run is in use by pid {process.pid}" in second.stderr


MISTAKES = [
    (65, "no train shards in nowhere: run python fineweb.py --out nowhere first", "--data nowhere"),
    (65, "no train shards in edu_fineweb10B: run python fineweb.py first", ""),
    (65, "shard spoiled/edufineweb_train_000001.bin", "--data spoiled"),
    (65, "--config nowhere.toml: No such file or directory", "--config nowhere.toml"),
    (2, "--config '': expected a name", "--config="),
    (2, "--steps 0: expected a whole number from 1 to 1,000,000,000", "--steps 0"),
    (2, "--steps 1e300: expected a whole number", "--plan --steps 1e300"),
    (2, "--tokens-per-step 2**9999999999: expected", "--tokens-per-step 2**9999999999"),
    (2, "--timeout inf: expected a number from", "--timeout inf"),
    (2, "expected a name of 1 to 255 bytes", f"--run-dir {'r' * 300}"),
    (2, "--n-embd 100 is not a multiple of --n-head 12: try 96", "--n-embd 100"),
    (2, "--device tpu: expected auto, cpu, mps, cuda or cuda:N", "--device tpu"),
    (2, "no CUDA device that torch can use", "--device cuda"),
    (2, "--dtype int8: expected auto, float32, bfloat16, float16", "--dtype int8"),
    (2, "--gpus 8 is for planning, and this would train: add --plan", "--gpus 8"),
    (2, "--gpus 0: expected a whole number from 1", "--plan --gpus 0"),
    (2, "513 processes for 512 rows a step", "--plan --gpus 513"),
    (2, "--mfu nan: expected a number above 0 and up to 1", "--plan --mfu nan"),
    (2, "--mfu 0.5: a share of what?", "--plan --mfu 0.5"),
    (2, "--on h10: expected b200, gh200", "--plan --on h10"),
    (2, "--probe measures this machine: leave out --on", "--probe --on h100"),
    (1, "gpt3-175b does not fit: weights, gradients and moments take 2,794 GB", "--preset gpt3-175b"),
]


@pytest.mark.parametrize(("code", "message", "words"), MISTAKES)
def test_mistakes_are_answered_in_one_line(refused, tmp_path, monkeypatch, code, message, words):
    monkeypatch.setattr("torch.cuda.is_available", lambda: False)
    shard = make_shards(tmp_path / "spoiled") / "edufineweb_train_000001.bin"
    shard.write_bytes(shard.read_bytes()[:-100])
    for folder in ("runs/gpt2", "runs/gpt3-175b"):  # training makes its folder before it looks at the data
        (tmp_path / folder).mkdir(parents=True)
    refused(code, message, "pretrain.py", *words.split())


def test_a_wrong_option_is_answered_once_by_two_ranks_with_the_nearest(door):
    done = door("pretrain.py", "--stpes", 3, processes=2)
    assert done.returncode == 1
    said = [line for line in done.stderr.splitlines() if line.startswith(("error", "usage"))]
    assert said == [
        "error: there is no option --stpes; did you mean --steps?",
        "usage: python pretrain.py [--preset NAME] [--data DIR] [--run-dir DIR] ... (--help lists all)",
    ]


def test_flags_win_over_the_file_and_zero_switches_clipping_off(call, shards, tmp_path):
    file = tmp_path / "mine.toml"
    file.write_text(f'preset = "tiny"\ndata = "{shards}"\nsteps = 9\nn_layer = 3\n')
    words = "--steps 2 --grad-clip 0 --warmup-steps 99_999 --hellaswag-every never --run-dir run"
    done = call("pretrain.py", "--config", file, *words.split())
    assert done.returncode == 0, done.stderr
    assert "warning: --warmup-steps 99,999 is more than --steps 2: the rate ends at" in done.stderr
    assert "next        python hellaswag.py -m run   or   python generate.py -m run" in done.stdout
    config = json.loads((tmp_path / "run/config.json").read_text())
    assert config["model"]["n_layer"] == 3
    assert {config["run"][name] for name in ("grad_clip", "hellaswag_every")} == {None}
    again = call("pretrain.py", "--config", "run/config.json", "--run-dir", "again")
    assert again.returncode == 0, again.stderr
    assert rows(tmp_path / "again") == rows(tmp_path / "run")


@pytest.mark.skipif(os.name == "nt", reason="compiling needs a C++ compiler")
def test_compiled_training_gives_the_losses_of_eager(call, shards, tmp_path):
    words = [*TINY, "--data", shards, "--steps", 3, "--micro-batch", 4, "--n-layer", 1]
    eager = call("pretrain.py", *words, "--run-dir", "eager", "--no-compile")
    compiled = call("pretrain.py", *words, "--run-dir", "compiled", "--compile")
    assert (eager.returncode, compiled.returncode) == (0, 0), compiled.stderr
    for a, b in zip(rows(tmp_path / "eager"), rows(tmp_path / "compiled"), strict=True):
        assert b.get("loss", 0) == pytest.approx(a.get("loss", 0), abs=1e-4)


def test_the_documents_of_a_step_are_listed_with_their_ids(call, tmp_path):
    texts = [f"{'some words about it ' * 9}{i}" for i in range(60)]
    table = [{"text": text, "id": f"id-{i}\n\t\x1b", "url": f"https://x/{i}"} for i, text in enumerate(texts)]
    (tmp_path / "t.jsonl").write_text("".join(json.dumps(row) + "\n" for row in table))
    assert call("fineweb.py", "--source", "t.jsonl", "--out", "d", "--workers", 0).returncode == 0
    words = ["pretrain.py", "--preset", "tiny", "--data", "d", "--tokens-per-step", 128]
    done = call(*words, "--show-batch", 3)
    assert done.returncode == 0, done.stderr
    header, *lines = (line.split("\t") for line in done.stdout.splitlines())
    assert header == ["row", "shard", "document", "first_token", "tokens", "id", "url"]
    assert {line[0] for line in lines} == {"4", "5"}  # two rows a step, steps count from 1
    assert sum(int(line[4]) for line in lines) == 2 * 65
    assert all(line[5] == rf"id-{line[6][10:]}\n\t\x1b" for line in lines)
    assert call(*words, "--show-batch", 3).stdout == done.stdout
    assert call(*words, "--show-batch", 0).returncode == 2
