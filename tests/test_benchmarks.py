"""The benchmarks start and finish, so that they cannot rot between two machines worth measuring on."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
from conftest import ROOT, make_shards

pytestmark = pytest.mark.slow


def benchmark(found, *words):
    """Run a benchmark, and read what it wrote to the file ``found``."""
    path = f"{Path(sys.executable).parent}:{os.environ['PATH']}"
    env = os.environ | {"PYTHONPATH": str(ROOT), "OUT": str(found.parent), "PATH": path}
    done = subprocess.run(words, env=env, capture_output=True, text=True, timeout=580)
    assert done.returncode == 0, done.stdout + done.stderr
    return json.loads(found.read_text())


@pytest.mark.timeout(600)
def test_the_gpu_benchmark_runs_in_reduced_form_on_a_cpu(tmp_path):
    words = ("--quick", "--device", "cpu", "--data", make_shards(tmp_path / "shards"))
    found = benchmark(tmp_path / "gpu.json", ROOT / "benchmarks/gpu.sh", *words)
    parts = ["correct", "resume", "step", "hellaswag", "curve", "variants", "matrix"]
    assert [part for part in found if part in parts] == parts
    assert all("error" not in row and "skipped" not in row for part in parts for row in found[part])
    assert all(row["ok"] for part in ("correct", "resume") for row in found[part])
    assert [row["val_loss"] for row in found["curve"][:-1]][-1] < 10.9


def test_what_no_longer_fits_into_the_gpu_benchmarks_time_is_left_out_and_the_rest_kept(tmp_path):
    out = tmp_path / "gpu.json"
    words = ("--quick", "--device", "cpu", "--parts", "matrix", "correct", "--seconds", "0", "--json", out)
    found = benchmark(out, sys.executable, ROOT / "benchmarks/gpu.py", *words)
    assert found["matrix"] == found["correct"] == [{"skipped": "0 s are over"}]


@pytest.mark.timeout(600)
def test_the_step_benchmark_compares_losses_that_are_alike(tmp_path):
    out, variants = tmp_path / "train.json", ["ours", "textbook", "transformers"]
    words = ("--shape", "tiny", "--variant", *variants, "--rounds", "2", "--dtype", "float32", "--json", out)
    results = benchmark(out, sys.executable, ROOT / "benchmarks/train.py", *words)["results"]
    assert [r["variant"] for r in results] == variants
    assert all(r["last_loss"] == pytest.approx(10.85, abs=0.2) for r in results)
