"""Two models on the same examples: the test and the interval against their definitions, and what is refused."""

import json

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from aymen_gpt.errors import DataError
from aymen_gpt.evaluation import compare


def record(choices, *, protocols=("completion", "harness"), model="m", questions="abc"):
    """What --json writes of a model that chose ``choices``, by sum and by length alike, where 0 is right."""
    hashes = {protocol: {"acc": 0.5, "questions_sha256": f"{questions} {protocol}"} for protocol in protocols}
    rows = [{"label": 0} | {p: {"choice": c, "choice_norm": c} for p in protocols} for c in choices]
    return {"model": model, "step": None, "n": len(choices), **hashes, "examples": rows}


@pytest.fixture
def compared(tmp_path):
    def compared(*records):
        for name, found in zip("ab", records, strict=True):
            (tmp_path / f"{name}.json").write_text(json.dumps(found))
        return compare.compare_files(tmp_path / "a.json", tmp_path / "b.json")

    return compared


def test_counts_are_those_of_the_examples(compared):
    found = compared(record([0, 0, 0, 1, 1, 0, 2, 0]), record([0, 1, 0, 0, 0, 0, 2, 3])).comparisons
    assert [(c.protocol, c.measure) for c in found] == [
        (protocol, measure) for protocol in ("completion", "harness") for measure in ("acc", "acc_norm")
    ]
    assert {(c.n, c.right_a, c.right_b, c.only_a, c.only_b, c.difference) for c in found} == {(8, 5, 5, 2, 2, 0.0)}


@given(st.integers(0, 8), st.integers(0, 8))
def test_p_is_the_share_of_coin_tosses_that_fall_so_unevenly(a, b):
    """By counting all 2**n of them."""
    n = a + b
    tosses = (np.arange(2**n)[:, None] >> np.arange(n) & 1).sum(axis=1)
    assert compare.mcnemar(a, b) == pytest.approx((np.abs(2 * tosses - n) >= abs(a - b)).mean(), rel=1e-12)


def test_p_of_large_counts_is_the_normal_approximations():
    """Edwards' continuity correction is good to a few per mille here; erfc gives the tail of chi squared, 1 df."""
    from math import erfc, sqrt

    for a, b in ((500, 560), (1000, 1100), (3000, 3001)):
        chi = (max(abs(a - b) - 1, 0)) / sqrt(a + b)
        assert compare.mcnemar(a, b) == pytest.approx(erfc(chi / sqrt(2)), rel=0.02)
    assert compare.mcnemar(10_042, 0) < 1e-300


def test_the_interval_is_that_of_resampled_examples():
    rng = np.random.default_rng(1)
    differences = rng.permutation(np.repeat([1, -1, 0], [90, 60, 350]))  # b right alone, a right alone, else
    drawn = [rng.choice(differences, 500).mean() for _ in range(4000)]
    low, high = compare.bootstrap(60, 90, 500)
    assert (low, high) == pytest.approx(np.percentile(drawn, [2.5, 97.5]), abs=0.004)
    assert low < 0.06 < high
    assert compare.bootstrap(0, 0, 10) == (0.0, 0.0)


def test_a_real_difference_is_seen_and_luck_is_not(compared):
    rng = np.random.default_rng(0)
    base = rng.integers(0, 4, 1000).tolist()
    c = compared(record(base), record([0 if rng.random() < 0.1 else c for c in base])).comparisons[0]
    assert c.p < 1e-6
    assert c.low > 0
    c = compared(record(base), record(rng.permutation(base).tolist())).comparisons[0]
    assert c.low <= 0 <= c.high
    assert c.p == 1.0  # as many right


def test_only_protocols_of_both_are_compared(compared):
    found = compared(record([0]), record([1], protocols=("harness",))).comparisons
    assert {c.protocol for c in found} == {"harness"}
    with pytest.raises(DataError, match="no protocol in common"):
        compared(record([0], protocols=("completion",)), record([1], protocols=("harness",)))


@pytest.mark.parametrize("other", [record([0, 0]), record([0, 0, 0], questions="others, just as long")])
def test_files_about_other_questions_are_refused(compared, other):
    n = other["n"]
    message = rf"a\.json \(3 examples\) and .*b\.json \({n}\) do not compare: other questions.*--data and --limit"
    with pytest.raises(DataError, match=message) as caught:
        compared(record([0, 0, 0]), other)
    assert caught.value.exit_code == 65


ROW = record([0])["examples"][0]


@pytest.mark.parametrize(
    "change",
    [
        {"examples": [1]},
        {"examples": [{"ind": 1}]},
        {"examples": []},
        {"examples": {"label": 0}},
        {"harness": 5},
        {"harness": {"acc": 0.5}},
        {"examples": [ROW | {"label": "0"}]},
        *({"examples": [ROW | {"harness": {"choice": c, "choice_norm": 0}}]} for c in ([0], 4, 2**70, None)),
    ],
)
def test_files_that_are_something_else_are_refused(compared, change):
    with pytest.raises(DataError, match=r"b\.json is not what python hellaswag\.py --json writes; score the"):
        compared(record([0]), record([0]) | change)


def test_no_json_and_no_file_are_refused(compared, tmp_path):
    with pytest.raises(DataError, match=r"cannot read .*b\.json: expected a JSON object"):
        compared(record([0]), [])
    with pytest.raises(DataError, match=r"c\.json: no such file"):
        compare.compare_files(tmp_path / "a.json", tmp_path / "c.json")


def test_the_verdict_names_the_better_model_or_says_that_none_is_shown(compared):
    better, worse = record([0] * 60, model="runs/b"), record([0] * 40 + [1] * 20, model="runs/a") | {"step": 19073}
    found = compared(worse, better)
    assert found.names == ("runs/a, step 19,073", "runs/b")
    assert found.verdicts() == [
        f"By {protocol}, runs/b is better than runs/a, step 19,073: "
        "its acc_norm is 33.33 points higher (p = 1.9e-06)."
        for protocol in ("completion", "harness")
    ]
    even = compared(better, record([0] * 59 + [1], model="runs/c"))
    assert even.verdicts()[1] == "By harness, no difference between runs/b and runs/c is shown (acc_norm, p = 1)."
