"""make record: a finished run's small files, and the pages that state its numbers."""

import json

import pytest
from run_folders import write_run

from aymen_gpt.errors import DataError
from aymen_gpt.reporting.run_folder import read_run
from tools import record


@pytest.fixture
def run(tmp_path):
    rows = [{"step": step, "tokens": step, "loss": 8.0, "val_loss": 5.0} for step in range(5)]
    part = {"acc_norm": 0.25, "acc_norm_stderr": 0.01}
    return write_run(
        tmp_path / "run",
        rows,
        config={"n_params": 7, "git_commit": "c0ffee"},
        status={"state": "done"},
        samples=[{"step": 4, "prompt": "a", "text": "b"}],
        hellaswag={"n": 1000, "completion": part, "examples": [1, 2]},
    )


def test_a_digest_gives_the_same_facts_from_less(run, tmp_path):
    print(record.digest(read_run(run), tmp_path / "digest"))
    assert record.shown(tmp_path / "digest") == record.shown(run) != {}
    assert "examples" not in json.loads((tmp_path / "digest/hellaswag.json").read_text())
    assert len(json.loads((tmp_path / "digest/digest.json").read_text())["sha256"]["metrics.jsonl"]) == 64


def test_a_digest_is_made_of_finished_runs_only(run, tmp_path):
    (run / "status.json").write_text('{"state": "running"}')
    with pytest.raises(DataError, match="is running: a digest is made of a finished run"):
        record.digest(read_run(run), tmp_path / "digest")
    (run / "hellaswag.json").unlink()
    with pytest.raises(DataError, match=r"has no hellaswag\.json"):
        record.digest(read_run(run), tmp_path / "digest")
    assert not (tmp_path / "digest").exists()


def test_pages_follow_a_new_digest(tmp_path):
    page, other = tmp_path / "a.md", tmp_path / "b.md"
    page.write_text("fell to 5.335<!--run.val-loss-->, not 5.335, in 5.335<!--run.other-->")
    other.write_text("5.335")
    old, new = {"run.val-loss": "5.335", "run.other": "5.335"}, {"run.val-loss": "4.100", "run.other": "5.335"}
    assert record.restate([page, other], old, new) == [page]
    assert page.read_text() == "fell to 4.100<!--run.val-loss-->, not 5.335, in 5.335<!--run.other-->"


def test_a_long_log_is_thinned_but_keeps_its_measurements():
    lines = [json.dumps({"step": i} | ({"val_loss": 1.0} if i % 1000 == 7 else {})) for i in range(10_000)]
    kept = record.thinned(lines)
    steps = [json.loads(line)["step"] for line in kept]
    assert len(steps) < 1600
    assert {*range(7, 10_000, 1000), 0, 9999} <= set(steps)
    assert steps == sorted(steps)
    assert record.thinned(lines[:30]) == lines[:30]
