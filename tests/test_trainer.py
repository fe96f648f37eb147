"""The loop: tokens per step is the contract, and a resumed run repeats the uninterrupted one bit for bit."""

import contextlib
import copy
import dataclasses
import json
import shutil

import pytest
import torch
from conftest import make_shards
from safetensors.torch import load_file, save_file
from training_runs import rows

from aymen_gpt.commands.pretrain import build
from aymen_gpt.data import tokenizer
from aymen_gpt.errors import AymenError, DataError, Stopped, UsageError
from aymen_gpt.model.folders import checkpoint_folder, checkpoints, latest_valid
from aymen_gpt.model.huggingface import load_pretrained
from aymen_gpt.training import trainer as trainer_module
from aymen_gpt.training.checkpoint import capture, read_snapshot, restore
from aymen_gpt.training.config import resolve
from aymen_gpt.training.device import choose_device
from aymen_gpt.training.distributed import Ranks
from aymen_gpt.training.runlog import RunLog

CPU, HALF = choose_device("cpu", "float32"), choose_device("cpu", "float16")
SMALL = {"preset": "tiny", "block_size": 16, "tokens_per_step": 8 * 16, "val_tokens": 64}
SMALL |= {"steps": 6, "val_every": 3, "checkpoint_every": 2}


@pytest.fixture(scope="module", autouse=True)
def quickly():
    """One sample, and checkpoints without the files of the vocabulary."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(trainer_module, "SAMPLES", 1)
        patch.setattr(tokenizer, "write_huggingface_files", lambda *_, **__: None)
        yield


@pytest.fixture(scope="module")
def shards(tmp_path_factory):
    return make_shards(tmp_path_factory.mktemp("data") / "shards")


class Stop:
    """A stop signal that comes in a chosen step."""

    name = "SIGTERM"

    def __init__(self, at=10**9):
        self.at, self.asked = at, 0

    @property
    def requested(self):
        self.asked += 1
        return self.asked >= self.at


def trainer(shards, device=CPU, **options):
    return build(resolve(SMALL | {"data": str(shards)} | options), device, Ranks())


def fit(t, run, stop=None, **how):
    with RunLog(run, t.config.steps) as log:
        t.fit(run, log, stop or Stop(), dict, **how)
    return t


@pytest.fixture(scope="module")
def whole(shards, tmp_path_factory):
    """A finished run of 6 steps, left alone: its trainer and its folder."""
    run = tmp_path_factory.mktemp("whole") / "run"
    return fit(trainer(shards), run), run


def contents(run):
    return {p: (p.stat().st_mtime_ns, p.read_bytes()) for p in run.rglob("*") if p.is_file() and p.name != ".lock"}


def losses(run):
    return [row["loss"] for row in rows(run) if "loss" in row]


def documents_of(t, first, n):
    return list(
        dict.fromkeys(f"{read.shard} document {read.document}" for read in t.train_rows.documents(first, n))
    )


def same_weights(t, others):
    return all(torch.equal(p, q) for p, q in zip(t.named.values(), others, strict=True))


@pytest.mark.slow
def test_the_losses_are_those_of_the_day_this_was_written(shards, tmp_path):
    """20 steps in float32, here since 2026-11-22 (torch 2.13, AVX512): other CPUs round otherwise, no more."""
    given = {"block_size": 64, "tokens_per_step": 512, "val_tokens": 1024, "steps": 20, "micro_batch": 4}
    fit(trainer(shards, **given), tmp_path / "run")
    expected = """10.82762 10.82873 10.78208 10.73489 10.66212 10.59060 10.48823 10.41006 10.34019 10.27769
        10.17386 10.09336 10.04012 9.97270 9.92352 9.88370 9.85667 9.84120 9.80091 9.79860"""
    assert losses(tmp_path / "run") == pytest.approx([float(x) for x in expected.split()], rel=1e-4)
    assert rows(tmp_path / "run")[-1]["val_loss"] == pytest.approx(9.80006, rel=1e-4)


def out_of_memory_above(t, rows):
    """Give the trainer a small card."""
    honest = t.batch_loss

    def batch_loss(tokens):
        if len(tokens) > rows:
            raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB")
        return honest(tokens)

    t.batch_loss = batch_loss
    return t


@pytest.mark.slow
@pytest.mark.fault(56)
def test_the_micro_batch_changes_nothing_and_is_halved_until_it_fits(shards, tmp_path, whole):
    found = out_of_memory_above(trainer(shards, val_tokens=48), 3)  # its validation takes one small batch
    assert found.micro_batch == 8  # of 16, for there are 8 rows a step
    for n, t in enumerate((trainer(shards, micro_batch=1), trainer(shards, micro_batch=3), found)):
        fit(t, tmp_path / str(n))
        assert losses(tmp_path / str(n)) == pytest.approx(losses(whole[1]), abs=1e-5)
    assert rows(tmp_path / "1")[-1]["val_loss"] == pytest.approx(rows(whole[1])[-1]["val_loss"], abs=1e-5)
    assert found.micro_batch == 2


@pytest.mark.fault(56)
def test_a_micro_batch_that_does_not_fit_is_answered_with_the_next(shards, tmp_path):
    with pytest.raises(
        AymenError, match=r"out of memory \(\d+ GB\) in step 1 with micro-batch 4: try --micro-batch 2"
    ):
        fit(out_of_memory_above(trainer(shards, micro_batch=5, val_tokens=48), 3), tmp_path / "run")
    with pytest.raises(
        AymenError, match="out of memory .* in the first try with micro-batch 1: .*a smaller --preset"
    ):
        out_of_memory_above(trainer(shards), 0).fit_micro_batch()


def test_the_second_micro_batch_of_a_step_must_fit_too(shards):
    t, sizes = trainer(shards), []
    t.micro_batch = 4
    t.batch_loss = lambda tokens: sizes.append(len(tokens)) or t._loss(tokens[:, :-1], tokens[:, 1:])
    t.fit_micro_batch()
    t.micro_batch = 8  # the whole step: there is no second
    t.fit_micro_batch()
    assert sizes == [4, 4, 8]


@pytest.mark.slow
@pytest.mark.fault(1, 3)
@pytest.mark.parametrize(("at", "lost"), [(1, None), (2, None), (3, "row"), (5, "checkpoint")])
def test_a_stopped_and_continued_run_repeats_the_uninterrupted_one_bit_for_bit(shards, tmp_path, whole, at, lost):
    """Also when kill -9 took the row of the last checkpoint, or the steps since a checkpoint."""
    run = tmp_path / "run"
    with pytest.raises(Stopped, match=f"stopped by SIGTERM at step {at} of 6"):
        fit(trainer(shards), run, Stop(at))
    if lost == "row":
        lines = (run / "metrics.jsonl").read_text().splitlines(keepends=True)
        (run / "metrics.jsonl").write_text("".join(lines[:-1]))
    elif lost == "checkpoint":
        shutil.rmtree(checkpoint_folder(run, at))
    continued = fit(trainer(shards), run)
    assert rows(run) == rows(whole[1])
    assert (run / "samples.jsonl").read_text() == (whole[1] / "samples.jsonl").read_text()
    assert same_weights(continued, whole[0].named.values())
    assert torch.equal(load_pretrained(checkpoint_folder(run, 6)).wte.weight, whole[0].model.wte.weight)


def test_a_finished_run_is_left_as_it_is_but_one_killed_after_its_last_checkpoint_is_not_finished(
    shards, tmp_path, whole, capsys
):
    run = shutil.copytree(whole[1], tmp_path / "run")
    before = contents(run)
    for mode, options in (("auto", {}), ("must", {}), ("auto", {"steps": 4}), ("auto", {"learning_rate": 1e-3})):
        fit(trainer(shards, **options), run, mode=mode)
        told = capsys.readouterr().err.splitlines()[-1]
        assert told == f"{run} is finished, at step 6: to train on, raise --steps"
    assert contents(run) == before
    (run / "status.json").write_text('{"state": "running", "step": 5}')
    lines = (run / "metrics.jsonl").read_text().splitlines(keepends=True)
    (run / "metrics.jsonl").write_text("".join(lines[:-1]))
    fit(trainer(shards), run)
    assert rows(run) == rows(whole[1])
    assert json.loads((run / "status.json").read_text())["state"] == "done"


@pytest.mark.slow
@pytest.mark.fault(13)
def test_what_makes_the_run_changes_only_when_overridden(shards, tmp_path):
    run = tmp_path / "run"
    fit(trainer(shards, steps=2), run)
    before = contents(run)
    other = make_shards(tmp_path / "other")
    next(other.glob("*train*")).unlink()
    override = r"choose a new --run-dir, or .*--override-resume "
    for change, message in (
        ({"seed": 7, "tokens_per_step": 64}, f"seed 1337 -> 7, tokens_per_step 128 -> 64.*{override}seed tokens"),
        ({"block_size": 32}, "block_size 16 -> 32.*: choose a new --run-dir$"),
        ({"n_layer": 3, "seed": 7}, "n_layer 2 -> 3, seed 1337 -> 7.*: choose a new --run-dir$"),
        ({"data": str(other)}, rf"data \w{{12}} -> \w{{12}}\).*{override}data$"),
    ):
        with pytest.raises(UsageError, match=message):
            fit(trainer(shards, **change), run)
    assert contents(run) == before
    again = {"seed": 7, "tokens_per_step": 64}
    t = fit(trainer(shards, **again), run, override=("seed", "tokens_per_step"))
    assert [row["tokens"] for row in rows(run)] == [0, 128, 256, 320, 384, 448, 512]
    assert t.first_row(6) == 2 * 8 + 4 * 4  # no row twice, none left out
    fit(trainer(shards, **again, steps=8), run)  # the new identity is the run's from then on


@pytest.mark.fault(12, 18)
def test_resume_must_and_none_and_what_may_change_is_told_and_recorded(shards, tmp_path, capsys):
    run = tmp_path / "run"
    with pytest.raises(UsageError, match=r"--resume must: .*run has no checkpoint to continue from"):
        fit(trainer(shards), run, mode="must")
    assert not run.exists()
    fit(trainer(shards, steps=2), run)
    fit(trainer(shards, steps=4, learning_rate=1e-3), run, mode="must")
    told = capsys.readouterr().err
    assert "changed since then: learning_rate 0.003 -> 0.001" in told
    assert "changed since then: steps 2 -> 4" in told
    history = json.loads((run / "config.json").read_text())["history"]
    assert [(entry["step"], entry["changed"]) for entry in history] == [
        (0, {}), (2, {"learning_rate": [0.003, 0.001], "steps": [2, 4]})
    ]  # fmt: skip
    fit(trainer(shards, steps=3), run, mode="none")
    assert [row["step"] for row in rows(run)] == [0, 1, 2, 3]
    assert [row["step"] for row in rows(run / "earlier-1")] == [0, 1, 2, 3, 4]
    assert latest_valid(run / "earlier-1")[0] is not None


def poison(t, steps, what="loss"):
    """Make the chosen steps' loss or gradient NaN, in the second micro-batch of each."""
    honest, calls = t.batch_loss, iter(range(10**9))
    per_step = t.config.rows_per_step // t.micro_batch

    def batch_loss(tokens):
        loss, call = honest(tokens), next(calls)
        if call // per_step + 1 in steps and call % per_step == 1:
            if what == "loss":
                return loss * float("nan")
            loss.register_hook(lambda grad: grad * float("inf"))
        return loss

    t.batch_loss = batch_loss
    t.validation_loss = lambda: 1.0  # it would take part in the count of batches
    return t


@pytest.mark.fault(27, 28)
@pytest.mark.parametrize(
    ("what", "reason", "documents"), [("loss", "non-finite loss", 4), ("gradient", "non-finite gradient", 8)]
)
def test_a_step_that_is_not_finite_is_skipped_and_its_documents_named(
    shards, tmp_path, capsys, what, reason, documents
):
    run = tmp_path / "run"
    t = fit(poison(trainer(shards, micro_batch=4), {3}, what), run)
    row = rows(run)[3]
    assert (row["step"], row["skipped"], row["grad_norm"]) == (3, reason, None)
    assert (row["loss"] is None) == (what == "loss")
    first = 16 + 8 - documents  # the loss betrays its micro-batch, a gradient only its step
    assert row["documents"] == documents_of(t, first, documents)
    assert f"warning: {reason} at step 3 (documents {row['documents'][0]}" in capsys.readouterr().err
    assert all(row["loss"] for row in rows(run)[4:])
    assert read_snapshot(checkpoints(run)[0]).updates == 5  # of 6 steps


@pytest.mark.fault(27)
def test_the_weights_after_a_skipped_step_are_those_before_it(shards):
    t = poison(trainer(shards, micro_batch=4), {1})
    before = [p.clone() for p in t.named.values()]
    for step, skipped in ((0, True), (1, False)):
        row, _ = t.train_step(step, t.batches_of(step))
        assert ("skipped" in row) == same_weights(t, before) == skipped


@pytest.mark.fault(27)
def test_too_many_skipped_steps_in_a_row_end_the_run_with_what_is_known(shards, tmp_path):
    run = tmp_path / "run"
    with pytest.raises(AymenError, match="3 steps in a row were skipped.*weights are those before step 3.*lower"):
        fit(poison(trainer(shards, micro_batch=4, max_skips=2), {3, 4, 5, 6}), run)
    assert [row.get("skipped") for row in rows(run)[1:]] == [None, None, *["non-finite loss"] * 3]
    found = json.loads((run / "failure.json").read_text())
    assert found["documents"] == rows(run)[-1]["documents"]
    assert max(size["not_finite"] for size in found["gradients"].values()) > 0
    assert max(size["not_finite"] for size in found["weights"].values()) == 0
    assert json.loads((run / "status.json").read_text())["state"] == "failed"
    assert latest_valid(run)[1] == []  # the checkpoint of step 4 holds the weights of step 2, all finite
    fit(trainer(shards), run)  # and the run can be continued
    assert rows(run)[-1]["step"] == 6


@pytest.mark.fault(27)
def test_weights_beyond_all_bounds_end_a_run_by_the_guard_and_not_by_its_samples(shards, tmp_path):
    run, t = tmp_path / "run", trainer(shards, steps=20)
    with torch.no_grad():
        t.model.wte.weight *= 1e38
    with pytest.raises(AymenError, match="6 steps in a row were skipped, the last for a non-finite loss"):
        fit(t, run)
    assert rows(run)[3]["val_loss"] is None
    assert "logits that are not finite" in (run / "samples.jsonl").read_text()


@pytest.mark.fault(29)
def test_a_spike_is_logged_and_only_skipped_when_asked(shards, monkeypatch):
    monkeypatch.setattr("aymen_gpt.training.guard.WINDOW", 4)
    for skip in (False, True):
        t = trainer(shards, skip_spikes=skip)
        honest = t.batch_loss
        for step in range(4):
            t.train_step(step, t.batches_of(step))
        before = [p.clone() for p in t.named.values()]
        t.batch_loss = lambda tokens, honest=honest: 3 * honest(tokens)
        row, _ = t.train_step(4, t.batches_of(4))
        assert (row.get("spike"), row.get("skipped")) == ((None, "spike") if skip else (True, None))
        assert same_weights(t, before) == skip


@pytest.mark.fault(30)
def test_a_checkpoint_with_nan_is_neither_written_nor_loaded(shards, tmp_path, whole):
    t, folder = trainer(shards), shutil.copytree(checkpoints(whole[1])[0], tmp_path / "step-000000006")
    with torch.no_grad():
        t.model.ln_f.bias[0] = float("nan")
    with pytest.raises(AymenError, match=r"ln_f.bias holds NaN or infinity: nothing was saved"):
        capture(t.model, t.optimizer)
    weights = load_file(folder / "model.safetensors")
    weights["transformer.ln_f.bias"][0] = float("inf")
    save_file(weights, folder / "model.safetensors")
    with pytest.raises(DataError, match=r"transformer.ln_f.bias holds NaN or infinity; delete the folder"):
        restore(folder, t.model, t.optimizer)


def test_where_nothing_can_be_compiled_the_run_goes_on_without_unless_compiling_was_asked_for(shards, tmp_path):
    def broken(x, y):
        raise torch._dynamo.exc.BackendCompilerFailed(
            lambda: None, RuntimeError("Failed to find C compiler"), None
        )

    for options in ({}, {"micro_batch": 4}):
        t = trainer(shards, steps=1, **options)
        t.compiled, t.loss = True, broken  # as on a GPU without a compiler
        with pytest.warns(UserWarning, match=r"slower without it \(.*Failed to find C compiler"):
            fit(t, tmp_path / f"run{len(options)}")
        assert not t.compiled
    asked = trainer(shards, compile=True)
    asked.loss = broken
    with pytest.raises(torch._dynamo.exc.BackendCompilerFailed):
        asked.fit_micro_batch()


def test_the_residual_stream_may_be_bfloat16(shards):
    """Blocks see sums in that dtype, the loss is near, and without autocast nothing changes."""
    found = {}
    for residual, dtype in (("float32", "bfloat16"), ("bfloat16", "bfloat16"), ("bfloat16", "float32")):
        t, seen = trainer(shards, choose_device("cpu", dtype), residual=residual), []
        t.model.h[1].register_forward_pre_hook(lambda block, args, seen=seen: seen.append(args[0].dtype))
        found[residual, dtype] = (t.train_step(0, t.batches_of(0))[0]["loss"], seen[0])
    assert [seen for _, seen in found.values()] == [torch.float32, torch.bfloat16, torch.float32]
    losses = [loss for loss, _ in found.values()]
    assert losses[0] != losses[1] == pytest.approx(losses[0], abs=0.01)


def test_deterministic_runs_ask_the_compiler_for_the_same_kernels_every_time(shards, monkeypatch):
    asked = []
    monkeypatch.setattr(torch, "compile", lambda f, **options: asked.append(options.get("options")) or f)
    trainer(shards, compile=True)
    trainer(shards, compile=True, deterministic=True)
    assert asked == [None, {"deterministic": True}]


@pytest.mark.fault(57)
def test_a_clock_set_back_makes_no_speed_negative(shards, tmp_path, monkeypatch):
    now = iter(range(10**9, 0, -1000))
    monkeypatch.setattr("time.time", lambda: float(next(now)))
    fit(trainer(shards, steps=3), tmp_path / "run")
    found = [json.loads(line) for line in (tmp_path / "run" / "metrics.jsonl").read_text().splitlines()]
    assert all(row["tokens_per_second"] > 0 and row["step_seconds"] > 0 for row in found[1:])


@pytest.mark.slow
def test_float16_trains_with_a_loss_scale_and_resumes_bit_for_bit(shards, tmp_path, whole):
    for name, stop in (("whole", None), ("parts", Stop(2)), ("parts", None)):
        with contextlib.suppress(Stopped):
            fit(trainer(shards, HALF, steps=3, warmup_steps=0, val_every=0), tmp_path / name, stop)
    assert rows(tmp_path / "parts") == rows(tmp_path / "whole")
    assert losses(tmp_path / "whole") == pytest.approx(losses(whole[1])[:3], abs=0.02)
    run = shutil.copytree(whole[1], tmp_path / "run")
    fit(trainer(shards, HALF, steps=7), run)  # a run in float32 can go on in float16
    assert [row["step"] for row in rows(run)] == list(range(8))


def test_a_float16_overflow_lowers_the_scale_and_is_no_failure(shards):
    t = poison(trainer(shards, HALF, micro_batch=4, max_skips=0), {1}, "gradient")
    scale = t.scaler.get_scale()
    row, _ = t.train_step(0, t.batches_of(0))
    assert row["skipped"] == "float16 overflow"
    assert t.scaler.get_scale() == scale / 2
    assert t.guard.skipped == 0


def test_a_run_can_start_from_another_models_weights(shards, tmp_path, whole):
    t, states = trainer(shards, init_from=str(whole[1])), []
    t.report = lambda log, row: row["step"] or states.append([p.clone() for p in t.named.values()])
    fit(t, tmp_path / "second")
    assert same_weights(whole[0], states[0])


@pytest.mark.fault(11)
def test_ranks_share_the_rows_of_a_step_without_gap_or_overlap_and_more_ranks_than_rows_are_refused(shards):
    t = trainer(shards, micro_batch=2)
    for world_size in (1, 2, 3, 5, 8):
        found = []
        for rank in range(world_size):
            one = copy.copy(t)
            one.ranks = Ranks(rank, world_size)
            found += [row for first, n in one.micro_batches(40, 8) for row in range(first, first + n)]
        assert found == list(range(40, 48))
    with pytest.raises(
        UsageError, match="9 processes for 8 rows a step: use fewer, or raise --tokens-per-step to at least 144"
    ):
        dataclasses.replace(t, ranks=Ranks(rank=0, world_size=9))


def test_the_score_of_a_due_step_is_in_its_row(shards, tmp_path):
    t, calls = trainer(shards, hellaswag_every=4), []
    t.score = lambda model: calls.append(model) or {"completion": {"acc_norm": 0.25, "acc_norm_stderr": 0.01}}
    fit(t, tmp_path / "run")
    assert [row["step"] for row in rows(tmp_path / "run") if "hellaswag" in row] == [4, 6]
    assert calls == [t.model, t.model]
