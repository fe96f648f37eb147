"""--forecast: the law is found again, intervals hold the ends of real runs, and run, page and paper tell of it."""

import json
import math
from types import SimpleNamespace

import numpy as np
import pytest
from conftest import ROOT
from run_folders import write_run

from aymen_gpt.reporting.page import forecast_notes, write_report
from aymen_gpt.reporting.run_folder import read_run
from aymen_gpt.training import forecast as module
from aymen_gpt.training.config import resolve
from aymen_gpt.training.forecast import GAIN, ODDS, PAIRS, WIDTH, forecast, forecaster, hellaswag
from aymen_gpt.training.optim import scheduled_rate
from aymen_gpt.training.trainer import Trainer
from paper.facts import run_facts

RESULTS = ROOT / "docs/results"  # of which GAIN and WIDTH are from LEARNT, not from the others
LEARNT = [*RESULTS.glob("forecast/*.jsonl"), *RESULTS.glob("recipe/edu/*-1000000-*.jsonl")]
SMALL, LONGEST = [*RESULTS.glob("recipe/small/*.jsonl")], [*RESULTS.glob("recipe/edu/*-10000000-*.jsonl")]
RUN = resolve({"steps": 1000, "warmup_steps": 50, "learning_rate": 1, "min_lr_ratio": 0.1})


def curve(beta, noise=0.0, seed=0):
    """A validation every ten steps of a thousand by the law; the last one is 3.5."""
    rng = np.random.default_rng(seed)
    law = [(s, 3 + 0.5 * (s / 1000) ** -beta + GAIN * (scheduled_rate(RUN, s) - 0.1)) for s in range(10, 1001, 10)]
    return [(s, loss + noise * rng.normal()) for s, loss in law]


@pytest.mark.parametrize("beta", [0.1, 0.33, 0.9])
def test_the_law_is_found_again(beta):
    found = forecast(curve(beta)[:40], RUN)
    assert found["loss"] == pytest.approx(3.5, abs=0.01)
    assert found["low"] <= found["loss"] <= found["high"]
    noisy = [forecast(curve(beta, 0.02, seed)[:40], RUN) for seed in range(20)]
    assert sum(f["low"] < 3.5 < f["high"] for f in noisy) >= 20 * ODDS
    later = forecast(curve(beta, 0.02)[:90], RUN)
    assert later["high"] - later["low"] < noisy[0]["high"] - noisy[0]["low"]


def test_nothing_is_forecast_too_early_from_too_few_or_at_the_end():
    points = curve(0.5)
    assert forecast(points[:24], RUN) == {}  # before a quarter
    assert forecast(points[:25], RUN)
    assert forecast(points[:25], resolve({"steps": 1000, "warmup_steps": 210})) == {}  # four after the warm-up
    assert forecast(points, RUN) == {}
    assert forecast([], RUN) == {}


# ---- held against real curves ------------------------------------------------------------------------


def ends(paths):
    """{curve: [(missed, unit)]} of every forecast: how far above the end it was, and what WIDTH multiplies."""
    found = {}
    for path in paths:
        head, *rows = map(json.loads, path.read_text().splitlines())
        points, run = [(row["step"], row["val_loss"]) for row in rows], SimpleNamespace(**head["run"])
        assert points[-1][0] == run.steps
        made = [forecast(points[:n], run) for n in range(1, len(points))]
        misses = [(f["loss"] - points[-1][1], (f["high"] - f["loss"]) / WIDTH) for f in made if f]
        found[path] = misses
    assert all(found.values())
    return found


def width(curves):
    """WIDTH by split conformal prediction over curves: each weighs the same, and one more is to come."""
    scores = sorted((abs(miss) / unit, 1 / len(found)) for found in curves for miss, unit in found)
    total, enough = 0.0, ODDS * (len(curves) + 1)
    for score, weight in scores:
        total += weight
        if total >= enough:
            return score
    return math.inf


def held(curves, wide):
    """How many forecasts held the end, of how many."""
    found = [abs(miss) <= wide * unit for curve in curves for miss, unit in curve]
    return sum(found), len(found)


def test_the_interval_is_learnt_from_our_curves_and_holds_the_ends_of_others():
    learnt = ends(LEARNT)
    assert abs(WIDTH - width(learnt.values())) < 0.01
    left_out = [held([learnt[name]], width([v for k, v in learnt.items() if k != name])) for name in learnt]
    counts = {
        "left out": tuple(map(sum, zip(*left_out, strict=True))),
        "small": held(ends(SMALL).values(), WIDTH),
        "longest": held(ends(LONGEST).values(), WIDTH),
    }
    page = (ROOT / "docs/evaluation.md").read_text()
    for name, (right, of) in counts.items():
        assert right >= ODDS * of, name
        assert f"{right} of {of}" in page, name


def test_what_the_falling_rate_gives_is_learnt_from_our_curves_and_helps_others(monkeypatch):
    """Root of the mean over curves of the mean square: GAIN is within 2 % of the best, and better than none."""

    def error(paths, gain):
        monkeypatch.setattr(module, "GAIN", gain)
        return np.mean([np.mean([miss**2 for miss, _ in found]) for found in ends(paths).values()]) ** 0.5

    assert error(LEARNT, GAIN) < 1.02 * min(error(LEARNT, gain) for gain in (0.05, 0.1, 0.2, 0.25))
    assert error(LEARNT, GAIN) < 0.8 * error(LEARNT, 0)
    assert error(SMALL + LONGEST, GAIN) < error(SMALL + LONGEST, 0)


def test_the_score_is_that_of_published_runs_and_only_between_them():
    for loss, score in PAIRS:
        found = hellaswag(loss, loss - 0.01, loss + 0.01)
        assert found["hellaswag_low"] < score < found["hellaswag_high"]
        assert f"{loss}" in (ROOT / "docs/evaluation.md").read_text()
    assert hellaswag(3.1, 3.0, 3.2)["hellaswag"] > hellaswag(3.3, 3.2, 3.4)["hellaswag"]
    assert hellaswag(2.9, 2.8, 3.0) == hellaswag(5.0, 4.9, 5.1) == {}


# ---- in a run, its page and its paper ----------------------------------------------------------------


@pytest.mark.parametrize(("repo", "scored"), [("HuggingFaceFW/fineweb-edu", True), (None, False)])
def test_a_score_is_forecast_only_for_the_text_of_the_published_runs(monkeypatch, repo, scored):
    monkeypatch.setattr(module, "read_manifest", lambda folder: {"source": {"repo": repo}})
    found = forecaster(RUN)([(s, loss - 0.3) for s, loss in curve(0.5)[:50]])
    assert found["loss"] == pytest.approx(3.2, abs=0.01)
    assert ("hellaswag" in found) == scored


def test_a_fit_that_fails_ends_no_training(monkeypatch):
    def fail(*_):
        raise np.linalg.LinAlgError

    monkeypatch.setattr(np.linalg, "lstsq", fail)
    assert forecaster(RUN)(curve(0.5)[:50]) == {}


def test_a_run_says_what_to_expect_and_goes_on_doing_so_when_it_is_continued(call, shards, tmp_path, monkeypatch):
    monkeypatch.setattr(Trainer, "sample", lambda self, step: [])
    words = ["--preset", "tiny", "--data", shards, "--val-every", 1, "--run-dir", "run", "--forecast"]
    done = call("pretrain.py", *words, "--steps", 8)
    assert done.returncode == 0, done.stderr
    rows = [json.loads(line) for line in (tmp_path / "run/metrics.jsonl").read_text().splitlines()]
    assert [row["step"] for row in rows if "forecast" in row] == [5, 6, 7]
    assert all(row["forecast"]["low"] <= row["forecast"]["high"] for row in rows[5:8])
    assert "| forecast " in next(line for line in done.stderr.splitlines() if line.startswith("step 7/8"))
    assert "of the run&#39;s 3 forecasts" in (tmp_path / "run/report.html").read_text()
    done = call("pretrain.py", *words, "--steps", 10)
    rows = [json.loads(line) for line in (tmp_path / "run/metrics.jsonl").read_text().splitlines()]
    assert "forecast" in rows[9], done.stderr  # from the validations before it was continued
    assert "forecast" not in rows[10]


def test_page_and_paper_tell_of_it(tmp_path):
    told = {"loss": 3.2, "low": 3.1, "high": 3.3, "odds": 0.8}
    score = {"hellaswag": 0.29, "hellaswag_low": 0.27, "hellaswag_high": 0.31}
    rows = [{"step": s, "tokens": 10 * s, "val_loss": 4.0} for s in (1, 2)]
    rows[1]["forecast"] = told | score
    run = read_run(write_run(tmp_path / "run", rows, config={"run": {"steps": 4}}))
    page = write_report(run).read_text()
    words = "forecast as 3.200 (3.100 to 3.300), HellaSwag 29.0 % (27.0 % to 31.0 %); odds 80 %"
    assert words in page
    assert "forecast of the end" in page
    assert {f.name: f.shown for f in run_facts(run)}["run.forecast-low"] == "3.100"
    rows += [{"step": 3, "val_loss": 3.5, "forecast": told}, {"step": 4, "tokens": 40, "val_loss": 3.25}]
    run = read_run(write_run(tmp_path / "run", [*rows, {"step": 5, "forecast": {"low": None}}]))
    assert forecast_notes(run)[0].startswith("2 of the run's 2 forecasts")
    assert "forecast of the end" not in write_report(run).read_text()
