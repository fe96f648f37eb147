"""The loop: tokens per step is the contract, and a resumed run repeats the uninterrupted one bit for bit."""

import dataclasses
import json

import pytest
import torch
from conftest import make_shards

from aymen_gpt.commands.pretrain import build
from aymen_gpt.errors import AymenError, DataError, Stopped, UsageError
from aymen_gpt.model.folders import checkpoint_folder, checkpoints
from aymen_gpt.model.huggingface import load_pretrained
from aymen_gpt.training.config import resolve
from aymen_gpt.training.device import choose_device
from aymen_gpt.training.distributed import Ranks
from aymen_gpt.training.runlog import RunLog

CPU = choose_device("cpu", "float32")


class Stop:
    """A stop signal that comes in a chosen step."""

    name = "SIGTERM"

    def __init__(self, at=10**9):
        self.at, self.asked = at, 0

    @property
    def requested(self):
        self.asked += 1
        return self.asked >= self.at


def trainer(shards, **options):
    given = {
        "preset": "tiny",
        "data": str(shards),
        "steps": 6,
        "val_every": 3,
        "checkpoint_every": 2,
        "dtype": "float32",
    }
    return build(resolve(given | options), CPU, Ranks())


def fit(shards, run, stop=None, **options):
    t = trainer(shards, **options)
    with RunLog(run, t.config.steps) as log:
        t.fit(run, log, stop or Stop(), {})
    return t


def rows(run):
    """metrics.jsonl without the clock's share."""
    found = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    return [{k: v for k, v in row.items() if k not in ("step_seconds", "tokens_per_second")} for row in found]


def losses(run):
    return [row["loss"] for row in rows(run) if "loss" in row]


def test_the_loss_falls(shards, tmp_path):
    fit(shards, tmp_path / "run", steps=20)
    found = losses(tmp_path / "run")
    assert found[0] == pytest.approx(10.83, abs=0.1)  # ln(50257): nothing known yet
    assert found[-1] < found[0] - 0.5


@pytest.mark.parametrize("micro_batch", [1, 2, 3])
def test_the_micro_batch_changes_nothing(shards, tmp_path, micro_batch):
    fit(shards, tmp_path / "whole", micro_batch=8)
    fit(shards, tmp_path / "cut", micro_batch=micro_batch)
    assert losses(tmp_path / "cut") == pytest.approx(losses(tmp_path / "whole"), abs=1e-5)
    assert rows(tmp_path / "cut")[-1]["val_loss"] == pytest.approx(
        rows(tmp_path / "whole")[-1]["val_loss"], abs=1e-5
    )


@pytest.mark.fault(3)
@pytest.mark.parametrize("at", [1, 2, 3, 5])
def test_a_stopped_and_continued_run_repeats_the_uninterrupted_one_bit_for_bit(shards, tmp_path, at):
    whole = fit(shards, tmp_path / "whole")
    with pytest.raises(Stopped, match=f"stopped by SIGTERM at step {at} of 6"):
        fit(shards, tmp_path / "parts", stop=Stop(at))
    continued = fit(shards, tmp_path / "parts")
    assert rows(tmp_path / "parts") == rows(tmp_path / "whole")
    for p, q in zip(whole.parameters, continued.parameters, strict=True):
        assert torch.equal(p, q)


@pytest.mark.fault(1)
def test_lost_steps_are_taken_again_from_the_last_checkpoint(shards, tmp_path):
    """As after kill -9 at step 5: rows up to 5 are logged, the newest checkpoint is of step 4."""
    run = tmp_path / "run"
    fit(shards, tmp_path / "whole")
    with pytest.raises(Stopped):
        fit(shards, run, stop=Stop(5))
    for path in checkpoint_folder(run, 5).iterdir():
        path.unlink()
    checkpoint_folder(run, 5).rmdir()
    fit(shards, run)
    assert rows(run) == rows(tmp_path / "whole")


def test_a_row_lost_between_checkpoint_and_log_is_written_on_resume(shards, tmp_path):
    run = tmp_path / "run"
    fit(shards, tmp_path / "whole")
    with pytest.raises(Stopped):
        fit(shards, run, stop=Stop(4))
    lines = (run / "metrics.jsonl").read_text().splitlines(keepends=True)
    (run / "metrics.jsonl").write_text("".join(lines[:-1]))
    fit(shards, run)
    assert rows(run) == rows(tmp_path / "whole")


def test_a_finished_run_is_left_as_it_is(shards, tmp_path):
    fit(shards, tmp_path / "run")
    before = {p: p.stat().st_mtime_ns for p in checkpoints(tmp_path / "run")}
    fit(shards, tmp_path / "run")
    assert {p: p.stat().st_mtime_ns for p in checkpoints(tmp_path / "run")} == before
    assert [row["step"] for row in rows(tmp_path / "run")] == list(range(7))


def test_a_checkpoint_is_taken_after_the_update_it_is_named_for(shards, tmp_path):
    t = fit(shards, tmp_path / "run")
    stored = load_pretrained(checkpoint_folder(tmp_path / "run", 6))
    assert torch.equal(stored.wte.weight, t.model.wte.weight)
    t.train_step(6, t.batches(t.train_rows, 48, 8), stop=False)
    assert not torch.equal(stored.wte.weight, t.model.wte.weight)


@pytest.mark.fault(13)
@pytest.mark.parametrize("change", [{"seed": 1}, {"tokens_per_step": 256}, {"block_size": 32}, {"preset": "demo"}])
def test_another_run_in_the_same_folder_is_refused_with_the_difference(shards, tmp_path, change):
    fit(shards, tmp_path / "run", steps=2)
    with pytest.raises(UsageError, match="holds another run .* was .*, is .*: choose a new --run"):
        fit(shards, tmp_path / "run", **({"block_size": 64, "tokens_per_step": 512} | change))
    assert [row["step"] for row in rows(tmp_path / "run")] == [0, 1, 2]


def test_another_data_folder_is_another_run(shards, tmp_path):
    fit(shards, tmp_path / "run", steps=2)
    shard = next(iter(make_shards(tmp_path / "other").glob("*train*1.bin")))
    shard.write_bytes(shard.read_bytes()[:-200])
    with pytest.raises((UsageError, DataError)):
        fit(tmp_path / "other", tmp_path / "run")


@pytest.mark.fault(17)
def test_damaged_checkpoints_alone_never_mean_a_silent_new_start(shards, tmp_path):
    fit(shards, tmp_path / "run", steps=2)
    for folder in checkpoints(tmp_path / "run"):
        (folder / "model.safetensors").write_bytes(b"")
    with pytest.raises(
        DataError, match="no checkpoint can be used: .*step-000000002: model.safetensors is 0 bytes"
    ):
        fit(shards, tmp_path / "run")


def test_a_loss_that_is_not_finite_updates_nothing(shards, tmp_path):
    t = trainer(shards)
    with torch.no_grad():
        t.model.ln_f.bias[0] = float("nan")
    before = [p.clone() for p in t.parameters]
    with pytest.raises(AymenError, match="loss nan .* in step 1: no update was made"):
        t.train_step(0, t.batches(t.train_rows, 0, 8), stop=False)
    assert all(torch.equal(p, q) for p, q in zip(t.parameters[1:-1], before[1:-1], strict=True))


@pytest.mark.fault(11)
def test_more_processes_than_rows_are_refused_with_the_numbers(shards):
    t = trainer(shards)
    with pytest.raises(
        UsageError, match="9 processes for 8 rows a step: use fewer, or raise --tokens-per-step to at least 576"
    ):
        dataclasses.replace(t, ranks=Ranks(rank=0, world_size=9))


@pytest.mark.fault(11)
def test_ranks_share_the_rows_of_a_step_without_gap_or_overlap(shards):
    t = trainer(shards, micro_batch=2)
    for world_size in (1, 2, 3, 5, 8):
        found = []
        for rank in range(world_size):
            one = dataclasses.replace(t, ranks=Ranks(rank, world_size))
            found += [row for first, n in one.micro_batches(40, 8) for row in range(first, first + n)]
        assert found == list(range(40, 48))


def test_the_score_of_a_due_step_is_in_its_row(shards, tmp_path):
    t = trainer(shards, hellaswag_every=4)
    calls = []
    t.score = lambda model: calls.append(model) or {"completion": {"acc_norm": 0.25, "acc_norm_stderr": 0.01}}
    with RunLog(tmp_path / "run", 6) as log:
        t.fit(tmp_path / "run", log, Stop(), {})
    assert [row["step"] for row in rows(tmp_path / "run") if "hellaswag" in row] == [4, 6]
    assert calls == [t.model, t.model]
