"""The benchmarks start and finish, so that they cannot rot between two machines worth measuring on."""

import doctest
import json
import os
import re
import subprocess
import sys
import xml.etree.ElementTree as ET
from pathlib import Path

import pytest
from conftest import ROOT, make_shards

from aymen_gpt.errors import UsageError
from aymen_gpt.model.gpt import GPT, PRESETS
from aymen_gpt.reporting import plots
from benchmarks import ranks, recipe

pytestmark = pytest.mark.slow
ENV = os.environ | {"PYTHONPATH": str(ROOT), "PATH": f"{Path(sys.executable).parent}:{os.environ['PATH']}"}


def benchmark(found, *words):
    """Run a benchmark, and read what it wrote to the file ``found``."""
    done = subprocess.run(words, env=ENV | {"OUT": str(found.parent)}, capture_output=True, text=True, timeout=580)
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


def test_the_benchmark_of_ranks_counts_an_all_reduce_of_each_gradient():
    taken = ranks.collectives("tiny", 2, 1)
    assert taken.keys() == {"allreduce_"}
    assert sum(taken["allreduce_"]) == 4 * sum(p.numel() for p in GPT(PRESETS["tiny"]).parameters())


@pytest.mark.timeout(600)
def test_the_recipe_benchmark_trains_nothing_twice(tmp_path, monkeypatch, capsys):
    words = [ROOT / "benchmarks/recipe.py", "--tokens", 20_000, "--arms", "muon", "--trials", 1]
    words += ["--seeds", 1, "--shares", "--validations", 4, "--out", tmp_path / "out", "--work", tmp_path / "work"]
    words += ["--preset", "tiny", "--data", make_shards(tmp_path / "shards"), "--val-tokens", 1024]
    monkeypatch.setattr(recipe.signal, "signal", lambda *_: None)
    monkeypatch.setattr(sys, "argv", [*map(str, words)])
    recipe.main()
    first = capsys.readouterr().out
    assert "| muon | 0.02, 0.003 | 20,000 |" in first
    assert (tmp_path / "out/curves.svg").read_text().startswith("<svg xmlns")
    (tmp_path / "out/curves.svg").unlink()
    curves = {path.name: path.stat().st_mtime_ns for path in (tmp_path / "out").glob("*.jsonl")}
    assert sorted(curves) == ["muon-0.02-0.003-20000-seed1.jsonl", "muon-0.02-0.003-4000-seed1000.jsonl"]
    head, *rows = [json.loads(line) for line in (tmp_path / "out" / min(curves)).open()]
    assert head["run"]["optimizer"] == "muon"
    assert rows[0]["val_loss"] > rows[-1]["val_loss"]
    recipe.main()
    assert capsys.readouterr().out == first
    assert (tmp_path / "out/curves.svg").exists()  # a finished comparison is drawn again
    assert {path.name: path.stat().st_mtime_ns for path in (tmp_path / "out").glob("*.jsonl")} == curves
    sys.argv += ["--micro-batch", "2"]
    with pytest.raises(UsageError, match="is of a run with another micro_batch: choose another --out"):
        recipe.main()


def test_runs_that_are_compared_are_validated_on_the_same_text(tmp_path):
    run = recipe.Runner({}, 1e7, 20, tmp_path, tmp_path, 1)
    seen = [
        run.config(recipe.Run("muon", (0.02, 0.003), tokens, seed)).val_tokens
        for tokens, seed in ((10_000_000, 1), (6_000_000, 1), (1_000_000, recipe.TUNING_SEED))
    ]
    assert seen == [150_000, 150_000, 2**14]


def test_the_recipe_benchmarks_climb_and_crossing_are_as_its_examples_say():
    found = doctest.testmod(recipe)
    assert (found.attempted, found.failed) == (2, 0)


def test_the_recipe_benchmark_draws_a_line_for_each_final_run_and_marks_where_muon_is_at_adamws_end():
    folder = ROOT / "docs/results/recipe/edu"
    axes = recipe.draw(curves := recipe.finals(folder)).axes[0]
    drawn = {arm: [line for line in axes.lines if line.get_label() == arm] for arm in ("adamw", "muon")}
    assert {key: len(found) for key, found in drawn.items()} == {"adamw": 3, "muon": 3}
    assert [line.get_ydata()[-1] for line in drawn["muon"]] == [
        curves["muon", 1.0, seed][-1]["val_loss"] for seed in (1, 2, 3)
    ]
    assert {line.get_color() for line in drawn["muon"]} != {line.get_color() for line in drawn["adamw"]}
    at = [line.get_xdata()[0] / 9_998_336 for line in axes.lines if line.get_label().startswith("as low as")]
    assert (
        "muon | 0.02, 0.006 | 10,000,000 | 5.142 (5.134 to 5.147) | " + recipe.spread(at, 2)
        in (folder / "table.md").read_text()
    )
    shorter = curves | {("muon", 0.6, 1): curves["muon", 1.0, 1][:8]}
    assert [line.get_linestyle() for line in recipe.draw(shorter).axes[0].lines].count("--") == 1


def test_the_committed_picture_of_the_recipe_benchmark_is_of_the_committed_curves_light_and_dark():
    folder = ROOT / "docs/results/recipe/edu"
    kept = ET.fromstring(text := (folder / "curves.svg").read_text())
    new = ET.fromstring(plots.picture(recipe.draw(recipe.finals(folder)), "recipe", "Held-out loss by tokens"))
    drawn, again = ([e.get("d") for e in root.findall(".//{*}path") if e.get("clip-path")] for root in (kept, new))
    assert len(drawn) >= 6
    assert drawn == again
    assert "prefers-color-scheme:dark" in text
    assert set(re.findall(r"var\(--(\w+)\)", text)) - {"sans"} <= set(plots.COLOURS)
