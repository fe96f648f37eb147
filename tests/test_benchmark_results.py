"""docs/results/benchmarks/*.json becomes tables of the paper and facts that may be stated."""

import json

import pytest
from conftest import ROOT

from aymen_gpt.reporting import paper
from aymen_gpt.reporting.benchmarks import FOLDER, read_benchmarks
from aymen_gpt.reporting.facts import UNKNOWN


def step(shape, variant, speed, times):
    row = {
        "shape": shape,
        "variant": variant,
        "tokens_per_second": speed,
        "best": speed + 1,
        "ours_is_times": times,
    }
    return row | {"gflops": 500.4, "mfu": None, "peak_gb": 2.504, "last_loss": 9.0, "seconds": [1.0, 2.0, 3.0]}


TRAIN = {
    "machine": "CPU, 2 threads",
    "results": [step("small", "ours", 1500.2, 1.0), step("small", "transformers compiled", 1000.0, 1.5)],
}
TIMES = {"float32": 2.5, "bfloat16": float("nan")}
SCORED = {"scorer": "lm-eval, float32, 4 rows", "examples_per_second": 3.25, "best": 4.0, "ours_is_times": TIMES}
SAME = {
    "n": 1000,
    "completion": {"choice": 998, "choice_norm": 997},
    "harness": {"choice": 999, "choice_norm": 1000},
}


@pytest.fixture
def write(tmp_path):
    def write(name, record):
        (tmp_path / FOLDER).mkdir(parents=True, exist_ok=True)
        (tmp_path / FOLDER / name).write_text(json.dumps(record))
        return read_benchmarks(tmp_path)

    return write


def named(benchmark):
    return {fact.name: fact.shown for fact in benchmark.facts}


def test_the_training_step(write):
    (found,) = write("train.json", TRAIN)
    (table,) = found.tables
    assert table.section == "The training step, medians of 3 alternating rounds (CPU, 2 threads)"
    assert table.command == found.artefact.command == f"python benchmarks/train.py --json {FOLDER}/train.json"
    assert table.header == ["shape", "variant", "tokens/s", "best", "ours is", "GFLOP/s", "peak GB"]
    assert table.rows == [
        ["small", "ours", "1,500", "1,501", "1.00x", "500", "2.50"],
        ["", "transformers compiled", "1,000", "1,001", "1.50x", "500", "2.50"],
    ]
    assert named(found)["benchmark.train.small.transformers-compiled.ours-is-times"] == "1.50x"
    assert named(found)["benchmark.train.small.ours.mfu"] == UNKNOWN


def test_the_scorer_and_its_agreement(write):
    (found,) = write(
        "h100.json", {"machine": "H100", "command": "the very command", "speed": [SCORED], "agreement": SAME}
    )
    speed, same = found.tables
    assert speed.command == found.artefact.command == "the very command"
    assert speed.header == ["scorer", "examples/s", "best", "ours, float32, is"]
    assert speed.rows == [["lm-eval, float32, 4 rows", "3.25", "4.00", "2.50x"]]
    assert same.rows == [["completion", "1,000", "998", "997"], ["harness", "1,000", "999", "1,000"]]
    assert named(found)["benchmark.h100.lm-eval-float32-4-rows.ours-is-times-float32"] == "2.50x"
    assert named(found)["benchmark.h100.harness.choice-norm"] == "1,000"


@pytest.mark.parametrize("record", [{}, [], {"results": [1]}, {"speed": "fast", "agreement": {"n": 3}}])
def test_other_files_are_left_alone(write, record):
    assert write("other.json", record) == []


def test_what_is_not_there_is_said_to_be_not_measured(write, tmp_path):
    assert paper.against_others([]).count("was not measured against that of other programs") == 2
    text = paper.against_others(write("train.json", TRAIN))
    assert "The speed of scoring HellaSwag was not measured" in text
    assert "The training step was not" not in text


def test_a_table_is_not_printed_twice(write):
    page = "## A\n\n`python benchmarks/{}`\n\n| a | b |\n|---|---|\n| 1 | 2 |\n"
    found = write("train.json", TRAIN)
    assert paper.systems(page.format(f"train.py --json {FOLDER}/train.json"), found) == ""
    assert r"1 & 2 \\" in paper.systems(page.format("loader.py"), found)


def test_the_columns_are_those_that_the_scripts_write():
    """Every key that is read stands in the script that writes it."""
    from aymen_gpt.reporting.benchmarks import AGREEMENT, SCORER, SPEED, STEP, TRAIN

    for script, measures in ((STEP, TRAIN), (SCORER, SPEED + AGREEMENT)):
        if not (ROOT / script).is_file():
            pytest.skip(f"no {script} in this checkout")
        text = (ROOT / script).read_text()
        assert [m.path[0] for m in measures if f'"{m.path[0]}"' not in text] == []
