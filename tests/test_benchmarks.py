"""The benchmarks start and finish, so that they cannot rot between two machines worth measuring on."""

import json
import os
import subprocess
import sys

import pytest
from conftest import ROOT, make_shards


@pytest.mark.slow
@pytest.mark.timeout(600)
def test_the_gpu_benchmark_runs_in_reduced_form_on_a_cpu(tmp_path):
    shards = make_shards(tmp_path / "shards")
    done = subprocess.run(
        [ROOT / "benchmarks/gpu.sh", "--quick", "--device", "cpu", "--data", shards],
        env=os.environ | {"OUT": str(tmp_path), "PATH": f"{os.path.dirname(sys.executable)}:{os.environ['PATH']}"},
        capture_output=True,
        text=True,
        timeout=580,
    )
    assert done.returncode == 0, done.stdout + done.stderr
    found = json.loads((tmp_path / "gpu.json").read_text())
    parts = ["correct", "resume", "step", "hellaswag", "curve", "variants", "matrix"]
    assert [part for part in found if part in parts] == parts
    assert all("error" not in row and "skipped" not in row for part in parts for row in found[part])
    assert all(row["ok"] for part in ("correct", "resume") for row in found[part])
    assert [row["val_loss"] for row in found["curve"][:-1]][-1] < 10.9


def test_what_no_longer_fits_into_the_gpu_benchmarks_time_is_left_out_and_the_rest_kept(tmp_path):
    words = [
        sys.executable,
        ROOT / "benchmarks/gpu.py",
        "--quick",
        "--device",
        "cpu",
        "--parts",
        "matrix",
        "correct",
    ]
    done = subprocess.run(
        [*words, "--seconds", "0", "--json", tmp_path / "gpu.json"],
        env=os.environ | {"PYTHONPATH": str(ROOT)},
        capture_output=True,
        text=True,
        timeout=120,
    )
    assert done.returncode == 0, done.stderr
    found = json.loads((tmp_path / "gpu.json").read_text())
    assert found["matrix"] == found["correct"] == [{"skipped": "0 s are over"}]


@pytest.mark.slow
@pytest.mark.timeout(600)
def test_the_step_benchmark_compares_losses_that_are_alike(tmp_path):
    words = [
        "--shape",
        "tiny",
        "--variant",
        "ours",
        "textbook",
        "transformers",
        "--rounds",
        "2",
        "--dtype",
        "float32",
    ]
    done = subprocess.run(
        [sys.executable, ROOT / "benchmarks/train.py", *words, "--json", tmp_path / "train.json"],
        env=os.environ | {"PYTHONPATH": str(ROOT)},
        capture_output=True,
        text=True,
        timeout=580,
    )
    assert done.returncode == 0, done.stdout + done.stderr
    results = json.loads((tmp_path / "train.json").read_text())["results"]
    assert [r["variant"] for r in results] == ["ours", "textbook", "transformers"]
    assert all(r["last_loss"] == pytest.approx(10.85, abs=0.2) for r in results)
