"""Reading a run folder: whatever state it is in, what can be read is read and the rest is said."""

import json

import pytest

from aymen_gpt.errors import DataError
from aymen_gpt.reporting.runs import number, parse_metrics, parse_samples, read_run


def write_run(folder, *, config=None, metrics=None, status=None, samples=None):
    folder.mkdir(parents=True, exist_ok=True)
    files = {"config.json": config, "metrics.jsonl": metrics, "status.json": status, "samples.md": samples}
    for name, value in files.items():
        if value is not None:
            (folder / name).write_bytes(
                value
                if isinstance(value, bytes)
                else (value if isinstance(value, str) else json.dumps(value)).encode()
            )
    return folder


def test_a_folder_without_a_run_is_refused_by_name(tmp_path):
    (tmp_path / "samples.md").write_text("## step 1\n")
    with pytest.raises(DataError, match=f"no run in {tmp_path}"):
        read_run(tmp_path)
    with pytest.raises(DataError, match="nowhere"):
        read_run(tmp_path / "nowhere")


def test_a_whole_run_is_read(tmp_path):
    run = read_run(
        write_run(
            tmp_path / "demo",
            config={"model": {"n_layer": 4}, "run": "text instead of an object"},
            metrics='{"step": 1, "loss": 9.5, "lr": 0.1}\n{"step": 2, "loss": 8.5}\n',
            status={"state": "running", "step": 2},
            samples="# Samples\n\n## step 2\n\n> Hello\n\n````text\n world\n````\n",
        )
    )
    assert run.name == "demo"
    assert run.get("model", "n_layer") == 4
    assert run.get("model", "n_head") is None
    assert run.get("run", "preset") is None
    assert run.series("loss") == [(1, 9.5), (2, 8.5)]
    assert run.series("lr") == [(1, 0.1)]
    assert run.status["state"] == "running"
    assert [(s.step, s.prompt, s.text) for s in run.samples] == [(2, "Hello", " world")]
    assert (run.n_bad_lines, run.problems) == (0, [])


@pytest.mark.fault(61)
def test_a_half_written_last_line_is_left_out_and_counted(tmp_path):
    run = read_run(write_run(tmp_path, metrics=b'{"step": 1, "loss": 9.5}\n{"step": 2, "lo\xe2\x82'))
    assert run.series("loss") == [(1, 9.5)]
    assert run.n_bad_lines == 1
    assert "1 line of metrics.jsonl" in run.problems[0]


@pytest.mark.parametrize(
    "line", ["null", "[1]", "7", "{}", '{"step": "3"}', '{"step": true}', '{"step": -1}', "{"]
)
def test_lines_that_are_no_row_are_counted(line):
    assert parse_metrics(f'{line}\n\n{{"step": 5}}\n') == ([{"step": 5}], 1)


def test_rows_come_in_order_of_step_and_a_later_line_of_a_step_wins():
    text = '{"step": 2, "loss": 8}\n{"step": 1, "loss": 9}\n{"step": 2, "loss": 7, "val_loss": 6}\n'
    rows, bad = parse_metrics(text)
    assert rows == [{"step": 1, "loss": 9}, {"step": 2, "loss": 7, "val_loss": 6}]
    assert bad == 0


def test_losses_that_are_not_finite_are_gaps_and_the_latest_finite_one_is_last(tmp_path):
    metrics = '{"step":1,"loss":9.0}\n{"step":2,"loss":NaN}\n{"step":3,"loss":null}\n{"step":4,"loss":Infinity}\n'
    run = read_run(write_run(tmp_path, metrics=metrics))
    assert run.series("loss") == [(1, 9.0), (2, None), (3, None), (4, None)]
    assert run.last("loss") == 9.0


@pytest.mark.parametrize(
    ("value", "expected"),
    [(2, 2.0), (2.5, 2.5), (True, None), ("2", None), (None, None), (float("nan"), None), (10**400, None)],
)
def test_number_takes_finite_numbers_only(value, expected):
    assert number(value) == expected


def test_a_damaged_config_is_said_and_the_rest_is_read(tmp_path):
    run = read_run(write_run(tmp_path, config='{"run": ', metrics='{"step": 1, "loss": 9.0}\n'))
    assert run.config == {}
    assert run.problems == ["config.json is not a JSON object and is left out."]
    assert run.last("loss") == 9.0


def test_both_forms_of_a_hellaswag_row_are_read(tmp_path):
    one = {
        "step": 10,
        "hellaswag": {"protocol": "completion", "n": 1000, "acc_norm": 0.25, "acc_norm_stderr": 0.014},
    }
    two = {"step": 20, "hellaswag": {"n": 500, "completion": {"acc_norm": 0.3}, "harness": {"acc_norm": 0.31}}}
    odd = [{"step": 30, "hellaswag": None}, {"step": 40, "hellaswag": {"completion": {"acc_norm": float("nan")}}}]
    run = read_run(write_run(tmp_path, metrics="".join(json.dumps(r) + "\n" for r in [one, two, *odd])))
    assert [(s.step, s.n, s.acc_norm, s.acc_norm_stderr) for s in run.scores("completion")] == [
        (10, 1000, 0.25, 0.014),
        (20, 500, 0.3, None),
    ]
    assert [(s.step, s.acc_norm) for s in run.scores("harness")] == [(20, 0.31)]


def test_samples_keep_what_looks_like_markup_inside_their_fence():
    text = "## step 5\n\n> p\n\n````text\n```python\n> not a prompt\n```\n````\n\n> q\n\n````\nsecond\n````\n"
    assert [(s.prompt, s.text) for s in parse_samples(text)] == [
        ("p", "```python\n> not a prompt\n```"),
        ("q", "second"),
    ]


def test_samples_survive_a_torn_section_and_a_repeated_step():
    text = "## step 5\n> p\n````text\ntorn off in the mid\n"
    text += "".join(f"## step 10\n> p\n````\n{word}\n````\n" for word in ("old", "new"))
    assert [(s.step, s.text) for s in parse_samples(text)] == [(5, "torn off in the mid"), (10, "new")]


def test_samples_without_a_fence_or_a_header_do_no_harm():
    assert parse_samples("just text\n> and a quote\n") == []
    assert [(s.step, s.prompt, s.text) for s in parse_samples("## step 1,000\n> p\n\nplain words\n")] == [
        (1000, "p", "plain words")
    ]
