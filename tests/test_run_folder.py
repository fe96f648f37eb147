"""Reading a run folder: whatever state it is in, what can be read is read and the rest is said."""

import re

import pytest
from run_folders import write_run

from aymen_gpt.errors import DataError
from aymen_gpt.reporting.run_folder import read_run


def test_a_folder_without_a_run_is_refused_by_name(tmp_path):
    (tmp_path / "samples.jsonl").write_text('{"step": 1}\n')
    with pytest.raises(DataError, match=f"no run in {tmp_path}"):
        read_run(tmp_path)
    with pytest.raises(DataError, match="nowhere"):
        read_run(tmp_path / "nowhere")


def test_a_whole_run_is_read(tmp_path):
    run = read_run(
        write_run(
            tmp_path / "demo",
            config={"model": {"n_layer": 4}, "run": None},
            tail='{"step": 1, "loss": 9.5, "lr": 0.1}\n\n{"step": 2, "loss": 8.5}\n',
            status={"state": "running", "step": 2},
            samples=[{"step": 2, "prompt": "Hello", "text": " world\n> and\n````\n"}],
        )
    )
    assert run.name == "demo"
    assert run.get("model", "n_layer") == 4
    assert run.get("model", "n_head") is None
    assert run.get("run", "preset") is None
    assert run.series("loss") == [(1, 9.5), (2, 8.5)]
    assert run.series("lr") == [(1, 0.1)]
    assert run.status["state"] == "running"
    assert [(s.step, s.prompt, s.text) for s in run.samples] == [(2, "Hello", " world\n> and\n````\n")]
    assert run.problems == []


@pytest.mark.fault(61)
@pytest.mark.parametrize("name", ["metrics", "samples"])
@pytest.mark.parametrize(
    "line",
    [
        b'{"step": 2, "lo\xe2\x82',
        b"null",
        b"[1]",
        b"{}",
        b'{"step": "3"}',
        b'{"step": true}',
        b'{"step": -1}',
        b"[" * 9999,
    ],
)
def test_lines_that_are_no_row_are_left_out_and_counted(tmp_path, name, line):
    write_run(tmp_path, config={})
    (tmp_path / f"{name}.jsonl").write_bytes(line + b'\n\n{"step": 5, "loss": 9.5, "text": "a"}\n')
    run = read_run(tmp_path)
    assert run.series("loss") == ([(5, 9.5)] if name == "metrics" else [])
    assert [s.text for s in run.samples] == (["a"] if name == "samples" else [])
    assert [f"1 line of {name}.jsonl could not be read" in problem for problem in run.problems] == [True]


def test_rows_come_in_order_of_step_and_a_later_line_of_a_step_wins(tmp_path):
    text = '{"step": 2, "loss": 8}\n{"step": 1, "loss": 9}\n{"step": 2, "loss": 7, "val_loss": 6}\n'
    run = read_run(write_run(tmp_path, tail=text))
    assert run.rows == [{"step": 1, "loss": 9}, {"step": 2, "loss": 7, "val_loss": 6}]
    assert run.problems == []


def test_losses_that_are_not_finite_numbers_are_gaps_and_the_latest_finite_one_is_last(tmp_path):
    values = ["9", "8.5", "NaN", "null", "Infinity", "true", '"2"', "1" + "0" * 400]
    lines = "".join(f'{{"step": {step}, "loss": {value}}}\n' for step, value in enumerate(values))
    run = read_run(write_run(tmp_path, tail=lines))
    assert [value for _, value in run.series("loss")] == [9.0, 8.5, *6 * [None]]
    assert run.last("loss") == 8.5


@pytest.mark.parametrize("name", ["config", "status", "hellaswag"])
def test_a_damaged_file_is_said_and_the_rest_is_read(tmp_path, name):
    run = read_run(write_run(tmp_path, [{"step": 1, "loss": 9.0}], **{name: '{"run": '}))
    assert getattr(run, name) == {}
    (problem,) = run.problems
    assert re.fullmatch(rf"cannot read .*{name}\.json: no JSON .*; left out here\.", problem)
    assert run.last("loss") == 9.0


def part(value):
    return {"acc_norm": value, "acc_norm_stderr": 0.01}


SCORED = [
    {"step": 10, "hellaswag": {"n": 250, "completion": part(0.25)}},
    {"step": 20, "hellaswag": {"n": 250, "completion": part(0.3)}},
    {"step": 30, "hellaswag": None},
    {"step": 40, "hellaswag": {"completion": {"acc_norm": float("nan")}}},
]


@pytest.mark.parametrize(
    ("file", "last"),
    [
        (None, (20, 250, 0.3)),
        ({"step": 20, "n": 10042, "completion": part(0.29)}, (20, 10042, 0.29)),  # the larger one of its step
        ({"step": 20, "n": 100, "completion": part(0.29)}, (20, 250, 0.3)),
        ({"step": 10, "n": 10042, "completion": part(0.29)}, (20, 250, 0.3)),  # of an older checkpoint
        ({"n": 1000, "completion": part(0.29)}, (40, 1000, 0.29)),  # without a step that of the last one
        ({"step": 20, "n": 10042, "data": "own.jsonl", "completion": part(0.29)}, (20, 250, 0.3)),
        ({"step": "x", "n": "y", "completion": 3}, (20, 250, 0.3)),
    ],
)
def test_the_newest_and_largest_score_counts(tmp_path, file, last):
    run = read_run(write_run(tmp_path, SCORED, hellaswag=file))
    score = run.score("completion")
    assert (score.step, score.n, score.value) == last
    assert run.score("completion", step=15) is None
    assert run.score("completion", step=10).n == (10042 if (file or {}).get("step") == 10 else 250)
    assert [(s.step, s.value) for s in run.scores("completion")] == [(10, 0.25), (20, 0.3)]
    assert run.score("harness") is None
