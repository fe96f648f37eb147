"""The run folder's records: one row a step whatever happens, and one writer."""

import json
import os

import pytest

from aymen_gpt.errors import CannotWrite, Stopped
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
            log.write(row(step))


def test_after_a_resume_no_step_appears_twice(tmp_path):
    write(tmp_path, 0, 7)
    write(tmp_path, 5, 8, resume_at=4)
    assert steps(tmp_path) == list(range(9))


def test_a_fresh_start_drops_the_rows_of_a_run_that_never_saved(tmp_path):
    write(tmp_path, 0, 3)
    write(tmp_path, 0, 1)
    assert steps(tmp_path) == [0, 1]


def test_a_line_cut_short_by_a_kill_is_dropped(tmp_path):
    write(tmp_path, 0, 3)
    with (tmp_path / "metrics.jsonl").open("a") as f:
        f.write('{"step": 4, "lo')
    write(tmp_path, 4, 5, resume_at=4)
    assert steps(tmp_path) == [0, 1, 2, 3, 4, 5]


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
def test_a_second_writer_is_refused_and_told_who_the_first_is(tmp_path):
    with RunLog(tmp_path, 1) as log:
        log.start({}, None)
        with pytest.raises(CannotWrite, match=f"in use by pid {os.getpid()}"), RunLog(tmp_path, 1):
            pass
    with RunLog(tmp_path, 1) as log:  # free again
        log.start({}, None)


def test_a_folder_that_cannot_be_made_is_named(tmp_path):
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
                log.samples([{"step": step, "prompt": "a\nb", "text": f"text of {step}\u2028"}])
                if step < 10 or resume_at:
                    log.write(row(step))
    samples = [json.loads(line) for line in (tmp_path / "samples.jsonl").read_text().splitlines()]
    assert [sample["text"] for sample in samples] == ["text of 0\u2028", "text of 5\u2028", "text of 10\u2028"]
