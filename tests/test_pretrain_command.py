"""pretrain.py as a user runs it: real processes, real signals, two ranks over Gloo."""

import json
import os
import signal

import pytest
from conftest import make_shards
from training_runs import TINY, rows, start, wait_for_step

pytestmark = pytest.mark.slow


def test_two_processes_give_the_losses_of_one(door, shards, tmp_path):
    words = [*TINY, "--data", shards, "--steps", 8, "--micro-batch", 3]
    one = door("pretrain.py", *words, "--run-dir", "one")
    two = door("pretrain.py", *words, "--run-dir", "two", processes=2)
    assert (one.returncode, two.returncode) == (0, 0), one.stderr + two.stderr
    a, b = rows(tmp_path / "one"), rows(tmp_path / "two")
    assert len(a) == len(b) == 9
    for x, y in zip(a, b, strict=True):
        assert x.keys() == y.keys()
        for key in ("loss", "val_loss", "grad_norm"):
            assert y.get(key, 0) == pytest.approx(x.get(key, 0), abs=1e-5)
    assert json.loads((tmp_path / "two/config.json").read_text())["world_size"] == 2


@pytest.mark.fault(3)
def test_sigterm_saves_and_the_same_command_continues(door, shards, tmp_path):
    words = [*TINY, "--data", shards, "--steps", 30, "--run-dir", "run"]
    whole = door("pretrain.py", *words[:-1], "whole")
    assert whole.returncode == 0, whole.stderr
    process = start(tmp_path, *words)
    wait_for_step(tmp_path / "run", 7, process)
    process.send_signal(signal.SIGTERM)
    _, told = process.communicate(timeout=60)
    assert process.returncode == 75
    status = json.loads((tmp_path / "run/status.json").read_text())
    assert status["state"] == "stopped"
    assert f"\nstopped by SIGTERM at step {status['step']} of 30" in told
    assert (tmp_path / f"run/checkpoints/step-{status['step']:09d}/manifest.json").exists()
    again = door("pretrain.py", *words)
    assert again.returncode == 0
    assert f"resuming from step {status['step']}" in again.stderr
    assert rows(tmp_path / "run") == rows(tmp_path / "whole")


@pytest.mark.fault(1)
def test_after_kill_nine_the_losses_are_those_of_the_uninterrupted_run(door, shards, tmp_path):
    words = [*TINY, "--data", shards, "--steps", 16, "--run-dir", "run"]
    assert door("pretrain.py", *words[:-1], "whole").returncode == 0
    process = start(tmp_path, *words)
    wait_for_step(tmp_path / "run", 8, process)
    process.kill()
    process.communicate()
    again = door("pretrain.py", *words)
    assert again.returncode == 0, again.stderr
    assert "resuming from step" in again.stderr
    assert rows(tmp_path / "run") == rows(tmp_path / "whole")


@pytest.mark.fault(4, 11)
def test_three_ranks_with_uneven_rows_stop_together_and_continue_bit_for_bit(door, shards, tmp_path):
    """8 rows on 3 ranks are 3, 3 and 2, so with two rows a micro-batch the last rank takes one batch less."""
    words = [*TINY, "--data", shards, "--steps", 12, "--micro-batch", 2, "--run-dir"]
    one = door("pretrain.py", *words, "one")
    whole = door("pretrain.py", *words, "whole", processes=3)
    assert (one.returncode, whole.returncode) == (0, 0), one.stderr + whole.stderr
    process = start(tmp_path, *words, "run", processes=3)
    wait_for_step(tmp_path / "run", 3, process)
    process.send_signal(signal.SIGTERM)  # torchrun passes it on, and ends with 1 whatever its workers say
    process.communicate(timeout=60)
    status = json.loads((tmp_path / "run/status.json").read_text())
    assert status["state"] == "stopped"
    assert 3 <= status["step"] < 12
    again = door("pretrain.py", *words, "run", processes=3)
    assert f"resuming from step {status['step']}" in again.stderr
    assert rows(tmp_path / "run") == rows(tmp_path / "whole")
    for a, b in zip(rows(tmp_path / "one"), rows(tmp_path / "whole"), strict=True):
        assert b.get("loss", 0) == pytest.approx(a.get("loss", 0), abs=1e-5)


@pytest.mark.fault(25)
def test_a_second_process_on_the_same_run_is_refused(door, shards, tmp_path):
    words = [*TINY, "--data", shards, "--steps", 500, "--run-dir", "run"]
    process = start(tmp_path, *words)
    try:
        wait_for_step(tmp_path / "run", 1, process)
        second = door("pretrain.py", *words)
    finally:
        process.kill()
        process.communicate()
    assert second.returncode == 73
    assert f"error: run is in use by pid {process.pid}" in second.stderr


@pytest.mark.parametrize(
    ("words", "code", "message"),
    [
        (
            ["--data", "nowhere"],
            65,
            "error: no train shards in nowhere: run python fineweb.py --out nowhere first",
        ),
        ([], 65, "error: no train shards in edu_fineweb10B: run python fineweb.py first"),
        (["--steps", "0"], 2, "error: --steps 0: expected a whole number from 1 to 1,000,000,000"),
        (["--plan", "--steps", "1e300"], 2, "error: --steps 1e300: expected a whole number"),
        (["--tokens-per-step", "2**9999999999"], 2, "error: --tokens-per-step 2**9999999999: expected"),
        (["--timeout", "inf"], 2, "error: --timeout inf: expected a number above 0"),
        (["--run-dir", "r" * 300], 2, "expected a name of 1 to 255 bytes"),
        (["--config", ""], 2, "error: --config '': expected a name"),
        (["--n-embd", "100"], 2, "error: --n-embd 100 is not a multiple of --n-head 12: try 96"),
        (["--gpus", "8"], 2, "error: --gpus 8 is for planning, and this would train: add --plan"),
        (["--plan", "--gpus", "0"], 2, "error: --gpus 0: expected a whole number from 1"),
        (["--plan", "--gpus", "513"], 2, "error: 513 processes for 512 rows a step"),
        (["--plan", "--mfu", "nan"], 2, "error: --mfu nan: expected a number above 0 and up to 1"),
        (["--plan", "--mfu", "0.5"], 2, "error: --mfu 0.5: a share of what?"),
        (["--plan", "--on", "h10"], 2, "error: --on h10: expected b200, gh200"),
        (["--probe", "--on", "h100"], 2, "error: --probe measures this machine: leave out --on"),
        (
            ["--preset", "gpt3-175b"],
            1,
            "error: gpt3-175b does not fit: weights, gradients and moments take 2,794 GB",
        ),
        (["--config", "nowhere.toml"], 65, "error: --config nowhere.toml: No such file or directory"),
        (["--device", "tpu"], 2, "error: --device tpu: expected auto, cpu, mps, cuda or cuda:N"),
        (["--device", "cuda"], 2, "no CUDA device that torch can use"),
        (["--data", "spoiled"], 65, "error: shard spoiled/edufineweb_train_000001.bin"),
        (["--dtype", "int8"], 2, "error: --dtype int8: expected auto, float32, bfloat16, float16"),
    ],
)
def test_mistakes_are_answered_in_one_line(door, tmp_path, words, code, message):
    if "spoiled" in words:
        shard = make_shards(tmp_path / "spoiled") / "edufineweb_train_000001.bin"
        shard.write_bytes(shard.read_bytes()[:-100])
    done = door("pretrain.py", *words, CUDA_VISIBLE_DEVICES="")
    assert done.returncode == code
    assert message in done.stderr
    assert "Traceback" not in done.stderr
    assert len(done.stderr.strip().splitlines()) == 1
    assert {path.name for path in tmp_path.iterdir()} <= {"spoiled", "runs"}


def test_a_wrong_option_is_answered_once_with_the_nearest(door):
    for processes in (None, 2):
        done = door("pretrain.py", "--stpes", 3, processes=processes)
        assert done.returncode == (1 if processes else 2)
        said = [line for line in done.stderr.splitlines() if line.startswith(("error", "usage"))]
        assert said == [
            "error: there is no option --stpes; did you mean --steps?",
            "usage: python pretrain.py [--preset NAME] [--data DIR] [--run-dir DIR] ... (--help lists all)",
        ]


def test_flags_win_over_the_file_and_zero_switches_clipping_off(door, shards, tmp_path):
    file = tmp_path / "mine.toml"
    file.write_text(f'preset = "tiny"\ndata = "{shards}"\nsteps = 9\nn_layer = 3\n')
    words = [
        "--steps",
        2,
        "--grad-clip",
        0,
        "--warmup-steps",
        99_999,
        "--hellaswag-every",
        "never",
        "--run-dir",
        "run",
    ]
    done = door("pretrain.py", "--config", file, *words)
    assert done.returncode == 0, done.stderr
    assert "warning: --warmup-steps 99,999 is more than --steps 2: the rate ends at" in done.stderr
    assert "next        python hellaswag.py -m run   or   python generate.py -m run" in done.stdout
    config = json.loads((tmp_path / "run/config.json").read_text())
    assert config["model"]["n_layer"] == 3
    assert {config["run"][name] for name in ("grad_clip", "hellaswag_every")} == {None}
    again = door("pretrain.py", "--config", "run/config.json", "--run-dir", "again")
    assert again.returncode == 0, again.stderr
    assert rows(tmp_path / "again") == rows(tmp_path / "run")


@pytest.mark.skipif(os.name == "nt", reason="compiling needs a C++ compiler")
def test_compiled_training_gives_the_losses_of_eager(door, shards, tmp_path):
    words = [*TINY, "--data", shards, "--steps", 3, "--micro-batch", 4]
    eager = door("pretrain.py", *words, "--run-dir", "eager", "--no-compile")
    compiled = door("pretrain.py", *words, "--run-dir", "compiled", "--compile")
    assert (eager.returncode, compiled.returncode) == (0, 0), compiled.stderr
    for a, b in zip(rows(tmp_path / "eager"), rows(tmp_path / "compiled"), strict=True):
        assert b.get("loss", 0) == pytest.approx(a.get("loss", 0), abs=1e-4)


def test_the_documents_of_a_step_are_listed_with_their_ids(door, tmp_path):
    write_jsonl(tmp_path / "t.jsonl", [f"{'some words about it ' * 9}{i}" for i in range(60)])
    assert door("fineweb.py", "--source", "t.jsonl", "--out", "d", "--workers", 0).returncode == 0
    words = ["pretrain.py", "--preset", "tiny", "--data", "d", "--tokens-per-step", 128]
    done = door(*words, "--show-batch", 3)
    assert done.returncode == 0, done.stderr
    header, *lines = (line.split("\t") for line in done.stdout.splitlines())
    assert header == ["row", "shard", "document", "first_token", "tokens", "id", "url"]
    assert {line[0] for line in lines} == {"4", "5"}  # two rows a step, steps count from 1
    assert sum(int(line[4]) for line in lines) == 2 * 65
    assert all(line[5] == rf"id-{line[6][10:]}\n\t\x1b" for line in lines)
    assert door(*words, "--show-batch", 3).stdout == done.stdout
    assert door(*words, "--show-batch", 0).returncode == 2


def write_jsonl(path, texts):
    rows = [{"text": text, "id": f"id-{i}\n\t\x1b", "url": f"https://x/{i}"} for i, text in enumerate(texts)]
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
