"""The run folder's records: one row a step whatever happens, and one writer."""

import json
import os
from datetime import datetime

import pytest

from aymen_gpt.errors import CannotWrite, Stopped, UsageError
from aymen_gpt.training.runlog import RunLog, console_line


def row(step, **more):
    return {
        "step": step,
        "loss": 5.0,
        "lr": 1e-3,
        "grad_norm": 1.0,
        "step_seconds": 0.5,
        "tokens_per_second": 100.0,
    } | more


def steps(folder):
    return [json.loads(line)["step"] for line in (folder / "metrics.jsonl").read_text().splitlines()]


def write(folder, first, last, resume_at=None):
    with RunLog(folder, steps=10) as log:
        log.start({}, resume_at)
        for step in range(first, last + 1):
            log.write(row(step), [{"step": step}])


def test_no_step_appears_twice_however_a_run_is_begun_again(tmp_path):
    write(tmp_path, 0, 3)
    write(tmp_path, 0, 7)  # the first one never saved
    assert steps(tmp_path) == list(range(8))
    with (tmp_path / "metrics.jsonl").open("a") as f:
        f.write('{"step": 8, "lo')  # cut short by a kill
    write(tmp_path, 5, 8, resume_at=4)
    assert steps(tmp_path) == list(range(9))


def test_step_lines_say_how_long_is_left(tmp_path, capsys, monkeypatch):
    now = [0.0]
    monkeypatch.setattr("time.monotonic", lambda: now[0])
    with RunLog(tmp_path, steps=20) as log:
        log.start({}, 10)
        for step in (11, 12, 20):
            now[0] += 30.0
            log.write(row(step))
    lines = [line for line in capsys.readouterr().err.splitlines() if line.startswith("step")]
    assert lines[0].endswith(" | 4 min 30 s left")  # 9 steps of 30 s
    assert lines[1].endswith(" | 4 min 00 s left")
    assert "left" not in lines[2]


def test_the_console_line_carries_units():
    line = console_line(row(50, val_loss=6.5, mfu=0.421), 300)
    assert line.split(" | ") == [
        "step  50/300",
        "loss  5.0000",
        "lr 1.00e-03",
        "norm  1.000",
        "   500 ms",
        "      100 tok/s",
        "mfu 42.1%",
        "val 6.5000",
    ]


@pytest.mark.fault(25)
def test_a_second_writer_is_refused_and_told_who_the_first_is_and_no_folder_can_be_in_a_file(tmp_path):
    with RunLog(tmp_path, 1) as log:
        log.start({}, None)
        with pytest.raises(CannotWrite, match=f"in use by pid {os.getpid()}"), RunLog(tmp_path, 1):
            pass
    with RunLog(tmp_path, 1) as log:  # free again
        log.start({}, None)
    (tmp_path / "file").write_text("")
    with pytest.raises(CannotWrite, match="file/run"), RunLog(tmp_path / "file" / "run", 1):
        pass


@pytest.mark.parametrize(
    ("error", "state"), [(None, "done"), (Stopped("by SIGTERM"), "stopped"), (RuntimeError("bug"), "failed")]
)
def test_status_json_says_how_the_run_ended(tmp_path, error, state):
    try:
        with RunLog(tmp_path, 10) as log:
            log.start({}, None)
            log.write(row(3))
            assert json.loads((tmp_path / "status.json").read_text())["state"] == "running"
            if error:
                raise error
    except (Stopped, RuntimeError):
        pass
    status = json.loads((tmp_path / "status.json").read_text())
    assert (status["state"], status["step"], status["message"]) == (state, 3, str(error or ""))


def test_samples_of_steps_done_again_are_there_once(tmp_path):
    """A kill may come between a step's samples and its row, too: then both are logged again."""
    for logged, resume_at in (((0, 5, 10), None), ((10,), 5)):
        with RunLog(tmp_path, 10) as log:
            log.start({}, resume_at)
            for step in logged:
                log.write(row(step), [{"step": step, "prompt": "a\nb", "text": f"text of {step}\u2028"}])
        if resume_at is None:
            lines = (tmp_path / "metrics.jsonl").read_text().splitlines(keepends=True)
            (tmp_path / "metrics.jsonl").write_text("".join(lines[:-1]))
    samples = [json.loads(line) for line in (tmp_path / "samples.jsonl").read_text().splitlines()]
    assert [sample["text"] for sample in samples] == ["text of 0\u2028", "text of 5\u2028", "text of 10\u2028"]


def test_each_part_of_a_run_keeps_its_own_command_and_times(tmp_path):
    for step, command, started in ((None, "one", "t1"), (3, "two", "t2")):
        with RunLog(tmp_path, steps=10) as log:
            log.start({"command": [command], "started": started}, step)
    config = json.loads((tmp_path / "config.json").read_text())
    first, second = config["history"]
    assert (config["started"], config["command"]) == ("t1", ["two"])
    assert [part["command"] for part in (first, second)] == [["one"], ["two"]]
    assert [part["started"] for part in (first, second)] == ["t1", "t2"]
    assert datetime.fromisoformat(first["ended"])
    assert "ended" not in second  # that is status.json's


DAMAGE = [
    ("metrics.jsonl", b, True)
    for b in (b"\xff\n", b"5\n", b'{"step": null}\n', b'{"step": ' + b"[" * 100_000 + b"\n")
]
DAMAGE += [("samples.jsonl", b, True) for b in (b"\xff\xfe\n", b"one\n", b"[]\n")]
DAMAGE += [("config.json", b, False) for b in (b"\xff", b"[]", b"", b"[" * 100_000)]


@pytest.mark.fault(61)
@pytest.mark.parametrize(("name", "content", "appended"), DAMAGE, ids=range(len(DAMAGE)))
def test_what_cannot_be_read_is_set_aside_and_the_run_goes_on(tmp_path, capsys, name, content, appended):
    write(tmp_path, 0, 3)
    path = tmp_path / name
    damaged = path.read_bytes() + content if appended else content
    path.write_bytes(damaged)
    write(tmp_path, 4, 5, resume_at=9)
    assert steps(tmp_path) == [0, 1, 2, 3, 4, 5]
    told = [line for line in capsys.readouterr().err.splitlines() if "warning" in line]
    assert len(told) == 1
    assert f" {path}" in told[0]
    assert told[0].endswith(f"set aside as {name}.damaged-1")
    assert (tmp_path / f"{name}.damaged-1").read_bytes() == damaged


def test_a_start_that_is_refused_leaves_no_trace_in_a_folder_of_others(tmp_path):
    (tmp_path / "mine").write_text("")
    with pytest.raises(UsageError), RunLog(tmp_path, 1):
        raise UsageError("no")
    assert list(tmp_path.iterdir()) == [tmp_path / "mine"]
