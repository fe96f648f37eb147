"""The loop: tokens per step is the contract, and a resumed run repeats the uninterrupted one bit for bit."""

import contextlib
import dataclasses
import gc
import json

import pytest
import torch
from conftest import make_shards
from safetensors.torch import load_file, save_file

from aymen_gpt.commands.pretrain import build
from aymen_gpt.errors import AymenError, DataError, Stopped, UsageError
from aymen_gpt.model.folders import checkpoint_folder, checkpoints, latest_valid
from aymen_gpt.model.huggingface import load_pretrained
from aymen_gpt.training.checkpoint import capture, read_snapshot, restore
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


def fit(shards, run, stop=None, mode="auto", override=(), **options):
    t = trainer(shards, **options)
    with RunLog(run, t.config.steps) as log:
        t.fit(run, log, stop or Stop(), dict, mode, override)
    return t


def rows(run):
    """metrics.jsonl without the clock's share."""
    found = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    return [{k: v for k, v in row.items() if k not in ("step_seconds", "tokens_per_second")} for row in found]


def losses(run):
    return [row["loss"] for row in rows(run) if "loss" in row]


@pytest.mark.slow
def test_the_loss_falls(shards, tmp_path):
    fit(shards, tmp_path / "run", steps=20)
    found = losses(tmp_path / "run")
    assert found[0] == pytest.approx(10.83, abs=0.1)  # ln(50257): nothing known yet
    assert found[-1] < found[0] - 0.5


@pytest.mark.slow
def test_the_losses_are_those_of_the_day_this_was_written(shards, tmp_path):
    """20 steps in float32, here since 2026-11-22 (torch 2.13, AVX512): other CPUs round otherwise, no more."""
    fit(shards, tmp_path / "run", steps=20, micro_batch=4)
    expected = """10.82762 10.82873 10.78208 10.73489 10.66212 10.59060 10.48823 10.41006 10.34019 10.27769
        10.17386 10.09336 10.04012 9.97270 9.92352 9.88370 9.85667 9.84120 9.80091 9.79860"""
    assert losses(tmp_path / "run") == pytest.approx([float(x) for x in expected.split()], rel=1e-4)
    assert rows(tmp_path / "run")[-1]["val_loss"] == pytest.approx(9.80006, rel=1e-4)


@pytest.mark.slow
def test_python_collects_no_garbage_between_checkpoints(shards, tmp_path, monkeypatch):
    t = trainer(shards, steps=5, checkpoint_every=2)
    seen, collect = [], gc.collect
    monkeypatch.setattr(gc, "collect", lambda: seen.append("collected") or collect())
    step = t.train_step
    monkeypatch.setattr(t, "train_step", lambda *a, **k: seen.append(gc.isenabled()) or step(*a, **k))
    with RunLog(tmp_path / "run", 5) as log:
        t.fit(tmp_path / "run", log, Stop())
    assert seen == ["collected", False, False, "collected", False, False, "collected", False]
    assert gc.isenabled()
    assert gc.get_freeze_count() == 0


@pytest.mark.slow
@pytest.mark.parametrize("micro_batch", [1, 2, 3])
def test_the_micro_batch_changes_nothing(shards, tmp_path, micro_batch):
    fit(shards, tmp_path / "whole", micro_batch=8)
    fit(shards, tmp_path / "cut", micro_batch=micro_batch)
    assert losses(tmp_path / "cut") == pytest.approx(losses(tmp_path / "whole"), abs=1e-5)
    assert rows(tmp_path / "cut")[-1]["val_loss"] == pytest.approx(
        rows(tmp_path / "whole")[-1]["val_loss"], abs=1e-5
    )


@pytest.mark.slow
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


@pytest.mark.slow
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


@pytest.mark.slow
def test_a_row_lost_between_checkpoint_and_log_is_written_on_resume(shards, tmp_path):
    run = tmp_path / "run"
    fit(shards, tmp_path / "whole")
    with pytest.raises(Stopped):
        fit(shards, run, stop=Stop(4))
    lines = (run / "metrics.jsonl").read_text().splitlines(keepends=True)
    (run / "metrics.jsonl").write_text("".join(lines[:-1]))
    fit(shards, run)
    assert rows(run) == rows(tmp_path / "whole")


@pytest.mark.slow
@pytest.mark.parametrize("again", [{}, {"mode": "must"}, {"steps": 4}, {"learning_rate": 1e-3}])
def test_a_finished_run_is_left_as_it_is(shards, tmp_path, capsys, again):
    run = tmp_path / "run"
    fit(shards, run)
    before = {
        p: (p.stat().st_mtime_ns, p.read_bytes()) for p in run.rglob("*") if p.is_file() and p.name != ".lock"
    }
    fit(shards, run, **again)
    assert capsys.readouterr().err.splitlines()[-1] == f"{run} is finished, at step 6: to train on, raise --steps"
    assert {p: (p.stat().st_mtime_ns, p.read_bytes()) for p in before} == before


@pytest.mark.slow
def test_a_run_killed_after_its_last_checkpoint_is_not_finished(shards, tmp_path):
    run = tmp_path / "run"
    fit(shards, run)
    before = rows(run)
    (run / "status.json").write_text('{"state": "running", "step": 5}')
    lines = (run / "metrics.jsonl").read_text().splitlines(keepends=True)
    (run / "metrics.jsonl").write_text("".join(lines[:-1]))
    fit(shards, run)
    assert rows(run) == before
    assert json.loads((run / "status.json").read_text())["state"] == "done"


@pytest.mark.slow
def test_a_checkpoint_is_taken_after_the_update_it_is_named_for(shards, tmp_path):
    t = fit(shards, tmp_path / "run")
    stored = load_pretrained(checkpoint_folder(tmp_path / "run", 6))
    assert torch.equal(stored.wte.weight, t.model.wte.weight)
    t.train_step(6, t.batches_of(6))
    assert not torch.equal(stored.wte.weight, t.model.wte.weight)


@pytest.mark.fault(13)
@pytest.mark.parametrize("change", [{"seed": 1}, {"tokens_per_step": 256}, {"block_size": 32}, {"preset": "demo"}])
def test_another_run_in_the_same_folder_is_refused_with_the_difference(shards, tmp_path, change):
    fit(shards, tmp_path / "run", steps=2)
    with pytest.raises(UsageError, match="holds another run .* -> .*: choose a new --run-dir"):
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


def poison(t, steps, what="loss"):
    """Make the chosen steps' loss or gradient NaN, in the second micro-batch of each."""
    honest, calls = t.batch_loss, iter(range(10**9))
    per_step = t.config.rows_per_step // t.micro_batch

    def batch_loss(tokens):
        loss, call = honest(tokens), next(calls)
        if torch.is_grad_enabled() and call // per_step + 1 in steps and call % per_step == 1:
            if what == "loss":
                return loss * float("nan")
            loss.register_hook(lambda grad: grad * float("inf"))
        return loss

    t.batch_loss = batch_loss


def fit_poisoned(shards, run, steps, what="loss", **options):
    t = trainer(shards, micro_batch=4, val_every=0, **options)
    t.validation_loss = lambda: 1.0  # it would take part in the count of batches
    poison(t, steps, what)
    with RunLog(run, t.config.steps) as log:
        t.fit(run, log, Stop(), dict)
    return t


@pytest.mark.fault(27, 28)
@pytest.mark.parametrize(
    ("what", "reason", "documents"), [("loss", "non-finite loss", 4), ("gradient", "non-finite gradient", 8)]
)
def test_a_step_that_is_not_finite_is_skipped_and_its_documents_named(
    shards, tmp_path, capsys, what, reason, documents
):
    run = tmp_path / "run"
    t = fit_poisoned(shards, run, {3}, what)
    row = rows(run)[3]
    assert (row["step"], row["skipped"], row["grad_norm"]) == (3, reason, None)
    assert (row["loss"] is None) == (what == "loss")
    first = 16 + 8 - documents  # the loss betrays its micro-batch, a gradient only its step
    reads = t.train_rows.documents(first, documents)
    assert row["documents"] == list(dict.fromkeys(f"{r.shard} document {r.document}" for r in reads))
    assert f"warning: {reason} at step 3 (documents {row['documents'][0]}" in capsys.readouterr().err
    assert all(row["loss"] for row in rows(run)[4:])
    assert read_snapshot(checkpoints(run)[0]).updates == 5  # of 6 steps
    assert latest_valid(run)[1] == []


@pytest.mark.fault(27)
def test_the_weights_after_a_skipped_step_are_those_before_it(shards, tmp_path):
    t = trainer(shards, micro_batch=4)
    poison(t, {1})
    before = [p.clone() for p in t.parameters]
    row = t.train_step(0, t.batches_of(0))[0]
    assert row["skipped"] == "non-finite loss"
    assert all(torch.equal(p, q) for p, q in zip(t.parameters, before, strict=True))
    row = t.train_step(1, t.batches_of(1))[0]
    assert "skipped" not in row
    assert not torch.equal(t.parameters[0], before[0])


@pytest.mark.slow
@pytest.mark.fault(27)
def test_too_many_skipped_steps_in_a_row_end_the_run_with_what_is_known(shards, tmp_path):
    run = tmp_path / "run"
    with pytest.raises(AymenError, match="3 steps in a row were skipped.*weights are those before step 3.*lower"):
        fit_poisoned(shards, run, {3, 4, 5, 6}, max_skips=2)
    assert [row.get("skipped") for row in rows(run)[1:]] == [None, None, *["non-finite loss"] * 3]
    found = json.loads((run / "failure.json").read_text())
    assert found["documents"] == rows(run)[-1]["documents"]
    assert max(size["not_finite"] for size in found["gradients"].values()) > 0
    assert max(size["not_finite"] for size in found["weights"].values()) == 0
    assert json.loads((run / "status.json").read_text())["state"] == "failed"
    assert latest_valid(run)[1] == []  # the checkpoint of step 4 holds the weights of step 2, all finite
    fit(shards, run, micro_batch=4, val_every=0)  # and the run can be continued
    assert rows(run)[-1]["step"] == 6


@pytest.mark.fault(27)
def test_weights_beyond_all_bounds_end_a_run_by_the_guard_and_not_by_its_samples(shards, tmp_path):
    run, t = tmp_path / "run", trainer(shards, steps=20)
    with torch.no_grad():
        t.model.wte.weight *= 1e38
    message = "6 steps in a row were skipped, the last for a non-finite loss"
    with pytest.raises(AymenError, match=message), RunLog(run, 20) as log:
        t.fit(run, log, Stop(), dict)
    assert rows(run)[3]["val_loss"] is None
    assert "logits that are not finite" in (run / "samples.jsonl").read_text()


@pytest.mark.fault(29)
def test_a_spike_is_logged_and_only_skipped_when_asked(shards, tmp_path, monkeypatch):
    monkeypatch.setattr("aymen_gpt.training.guard.WINDOW", 4)
    for skip in (False, True):
        t = trainer(shards, micro_batch=4, skip_spikes=skip)
        honest = t.batch_loss
        for step in range(4):
            t.train_step(step, t.batches_of(step))
        before = [p.clone() for p in t.parameters]
        t.batch_loss = lambda tokens, honest=honest: 3 * honest(tokens)
        row = t.train_step(4, t.batches_of(4))[0]
        assert (row.get("spike"), row.get("skipped")) == ((None, "spike") if skip else (True, None))
        assert all(torch.equal(p, q) for p, q in zip(t.parameters, before, strict=True)) == skip


@pytest.mark.fault(30)
def test_a_checkpoint_with_nan_is_neither_written_nor_loaded(shards, tmp_path):
    t = fit(shards, tmp_path / "run", steps=2)
    with torch.no_grad():
        t.model.ln_f.bias[0] = float("nan")
    with pytest.raises(AymenError, match=r"ln_f.bias holds NaN or infinity: nothing was saved"):
        capture(t.model, t.optimizer)
    folder = checkpoints(tmp_path / "run")[0]
    weights = load_file(folder / "model.safetensors")
    weights["transformer.ln_f.bias"][0] = float("inf")
    save_file(weights, folder / "model.safetensors")
    with pytest.raises(DataError, match=r"transformer.ln_f.bias holds NaN or infinity; delete the folder"):
        restore(folder, t.model, t.optimizer)


@pytest.mark.slow
@pytest.mark.fault(12)
def test_options_that_may_change_are_told_and_recorded(shards, tmp_path, capsys):
    run = tmp_path / "run"
    fit(shards, run, steps=2)
    fit(shards, run, steps=4, learning_rate=1e-3)
    told = capsys.readouterr().err
    assert "changed since then: learning_rate 0.003 -> 0.001" in told
    assert "changed since then: steps 2 -> 4" in told
    history = json.loads((run / "config.json").read_text())["history"]
    assert [entry["step"] for entry in history] == [0, 2]
    assert history[0]["changed"] == {}
    assert history[1]["changed"] == {"learning_rate": [0.003, 0.001], "steps": [2, 4]}


@pytest.mark.slow
@pytest.mark.fault(13)
def test_what_makes_the_run_changes_only_when_overridden(shards, tmp_path, capsys):
    run = tmp_path / "run"
    fit(shards, run, steps=2)
    before = {p: p.read_bytes() for p in run.rglob("*") if p.is_file() and p.name != ".lock"}
    with pytest.raises(
        UsageError, match="seed 1337 -> 7.*choose a new --run-dir, or .*--override-resume seed tokens"
    ):
        fit(shards, run, seed=7, tokens_per_step=256)
    assert {p: p.read_bytes() for p in run.rglob("*") if p.is_file() and p.name != ".lock"} == before
    t = fit(shards, run, override=("seed", "tokens_per_step"), seed=7, tokens_per_step=256)
    assert [row["tokens"] for row in rows(run)] == [0, 512, 1024, 1280, 1536, 1792, 2048]
    assert t.first_row(6) == 2 * 8 + 4 * 4  # no row twice, none left out
    with pytest.raises(UsageError, match="n_layer 2 -> 6.*choose a new --run-dir$"):
        fit(shards, run, preset="demo", seed=7, tokens_per_step=256)
    fit(shards, run, seed=7, tokens_per_step=256, steps=8)  # the new identity is the run's from then on


@pytest.mark.slow
@pytest.mark.fault(18)
def test_resume_must_and_none(shards, tmp_path):
    run = tmp_path / "run"
    with pytest.raises(UsageError, match=r"--resume must: .*run has no checkpoint to continue from"):
        fit(shards, run, mode="must")
    assert not run.exists()
    fit(shards, run, steps=2)
    fit(shards, run, mode="must", steps=4)
    fit(shards, run, mode="none", steps=3)
    assert [row["step"] for row in rows(run)] == [0, 1, 2, 3]
    assert [row["step"] for row in rows(run / "earlier-1")] == [0, 1, 2, 3, 4]
    assert latest_valid(run / "earlier-1")[0] is not None


@pytest.mark.slow
@pytest.mark.fault(56)
def test_the_micro_batch_is_halved_until_it_fits_and_changes_nothing(shards, tmp_path, monkeypatch):
    fit(shards, tmp_path / "whole", micro_batch=8)
    t = trainer(shards)
    assert t.micro_batch == 8  # of 16, for there are 8 rows a step
    honest = t.batch_loss

    def small_card(tokens):
        if len(tokens) > 3:
            raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB")
        return honest(tokens)

    t.batch_loss = small_card
    t.val_rows.rows_per_epoch = 3  # its validation takes one small batch
    with RunLog(tmp_path / "run", 6) as log:
        t.fit(tmp_path / "run", log, Stop(), dict)
    assert t.micro_batch == 2
    assert losses(tmp_path / "run") == pytest.approx(losses(tmp_path / "whole"), abs=1e-5)


@pytest.mark.fault(56)
def test_a_micro_batch_of_ones_own_that_does_not_fit_is_answered_with_the_next(shards, tmp_path):
    t = trainer(shards, micro_batch=4)

    def small_card(tokens):
        raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB")

    t.batch_loss = small_card
    t.validation_loss = lambda: 1.0
    with pytest.raises(
        AymenError, match=r"out of memory in step 1 with micro-batch 4 .*GB.*: try --micro-batch 2"
    ):
        t.fit(tmp_path, None, Stop())
    t.batch_loss = trainer(shards).batch_loss
    monster = trainer(shards)
    monster.batch_loss = small_card
    with pytest.raises(AymenError, match="out of memory in the first try with micro-batch 1 .*a smaller --preset"):
        monster.fit_micro_batch()


def test_the_second_micro_batch_of_a_step_must_fit_too(shards):
    t, sizes = trainer(shards, tokens_per_step=8 * 64), []
    t.micro_batch = 4
    t.batch_loss = lambda tokens: sizes.append(len(tokens)) or t._loss(tokens[:, :-1], tokens[:, 1:])
    t.fit_micro_batch()
    assert sizes == [4, 4]
    t.micro_batch = 8  # the whole step: there is no second
    t.fit_micro_batch()
    assert sizes == [4, 4, 8]


def test_where_nothing_can_be_compiled_the_run_goes_on_without_unless_compiling_was_asked_for(shards, tmp_path):
    def broken(x, y):
        raise torch._dynamo.exc.BackendCompilerFailed(
            lambda: None, RuntimeError("Failed to find C compiler"), None
        )

    t = trainer(shards)
    t.compiled, t.loss = True, broken  # as on a GPU without a compiler
    with pytest.warns(UserWarning, match=r"slower without it \(.*Failed to find C compiler"):
        t.fit_micro_batch()
    assert not t.compiled
    assert t.train_step(0, t.batches_of(0))[0]["loss"] > 0
    fixed = trainer(shards, micro_batch=4, steps=1, val_every=0)
    fixed.compiled, fixed.loss = True, broken
    with pytest.warns(UserWarning, match="slower without it"), RunLog(tmp_path / "run", 1) as log:
        fixed.fit(tmp_path / "run", log, Stop(), dict)
    assert not fixed.compiled
    asked = trainer(shards, compile=True)
    asked.loss = broken
    with pytest.raises(torch._dynamo.exc.BackendCompilerFailed):
        asked.fit_micro_batch()


def test_the_residual_stream_may_be_bfloat16(shards):
    """Blocks see sums in that dtype, the loss is near, and without autocast nothing changes."""
    found = {}
    for residual, dtype in (("float32", "bfloat16"), ("bfloat16", "bfloat16"), ("bfloat16", "float32")):
        config = resolve({"preset": "tiny", "data": str(shards), "residual": residual})
        t = build(config, choose_device("cpu", dtype), Ranks())
        seen = []
        t.model.h[1].register_forward_pre_hook(lambda block, args, seen=seen: seen.append(args[0].dtype))
        found[residual, dtype] = (t.train_step(0, t.batches_of(0))[0]["loss"], seen[0])
    assert [seen for _, seen in found.values()] == [torch.float32, torch.bfloat16, torch.float32]
    losses = [loss for loss, _ in found.values()]
    assert losses[0] != losses[1] == pytest.approx(losses[0], abs=0.01)
    with pytest.raises(UsageError, match="--residual half: expected float32 or bfloat16"):
        trainer(shards, residual="half")


def test_deterministic_runs_ask_the_compiler_for_the_same_kernels_every_time(shards, monkeypatch):
    asked = []
    monkeypatch.setattr(torch, "compile", lambda f, **options: asked.append(options.get("options")) or f)
    trainer(shards, compile=True)
    trainer(shards, compile=True, deterministic=True)
    assert asked == [None, {"deterministic": True}]


@pytest.mark.slow
@pytest.mark.fault(57)
def test_a_clock_set_back_makes_no_speed_negative(shards, tmp_path, monkeypatch):
    now = iter(range(10**9, 0, -1000))
    monkeypatch.setattr("time.time", lambda: float(next(now)))
    fit(shards, tmp_path / "run")
    found = [json.loads(line) for line in (tmp_path / "run" / "metrics.jsonl").read_text().splitlines()]
    assert all(row["tokens_per_second"] > 0 and row["step_seconds"] > 0 for row in found if "loss" in row)


@pytest.mark.slow
def test_float16_trains_with_a_loss_scale_and_resumes_bit_for_bit(shards, tmp_path):
    half = choose_device("cpu", "float16")
    for name, stop in (("whole", None), ("parts", Stop(3)), ("parts", None)):
        t = build(
            resolve({"preset": "tiny", "data": str(shards), "steps": 6, "checkpoint_every": 2}), half, Ranks()
        )
        with RunLog(tmp_path / name, 6) as log, contextlib.suppress(Stopped):
            t.fit(tmp_path / name, log, stop or Stop(), dict)
    assert rows(tmp_path / "parts") == rows(tmp_path / "whole")
    fit(shards, tmp_path / "float32")
    assert losses(tmp_path / "whole") == pytest.approx(losses(tmp_path / "float32"), abs=0.02)


@pytest.mark.slow
def test_a_run_can_go_on_in_float16(shards, tmp_path):
    fit(shards, tmp_path / "run", steps=2)
    half = choose_device("cpu", "float16")
    t = build(resolve({"preset": "tiny", "data": str(shards), "steps": 3, "warmup_steps": 0}), half, Ranks())
    with RunLog(tmp_path / "run", 3) as log:
        t.fit(tmp_path / "run", log, Stop(), dict)
    assert [row["step"] for row in rows(tmp_path / "run")] == [0, 1, 2, 3]


def test_a_float16_overflow_lowers_the_scale_and_is_no_failure(shards, tmp_path):
    half = choose_device("cpu", "float16")
    t = build(resolve({"preset": "tiny", "data": str(shards), "micro_batch": 4, "max_skips": 0}), half, Ranks())
    poison(t, {1}, "gradient")
    scale = t.scaler.get_scale()
    row = t.train_step(0, t.batches_of(0))[0]
    assert row["skipped"] == "float16 overflow"
    assert t.scaler.get_scale() == scale / 2
    assert t.guard.skipped == 0


@pytest.mark.slow
def test_a_run_can_start_from_another_models_weights(shards, tmp_path):
    first = fit(shards, tmp_path / "first")
    t = trainer(shards, init_from=str(tmp_path / "first"))
    with RunLog(tmp_path / "second", 6) as log:
        t.report = lambda log, row: row["step"] or states.append([p.clone() for p in t.parameters])
        states = []
        t.fit(tmp_path / "second", log, Stop(), dict)
    assert all(torch.equal(p, q) for p, q in zip(states[0], first.parameters, strict=True))


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


@pytest.mark.slow
def test_the_score_of_a_due_step_is_in_its_row(shards, tmp_path):
    t = trainer(shards, hellaswag_every=4)
    calls = []
    t.score = lambda model: calls.append(model) or {"completion": {"acc_norm": 0.25, "acc_norm_stderr": 0.01}}
    with RunLog(tmp_path / "run", 6) as log:
        t.fit(tmp_path / "run", log, Stop(), dict)
    assert [row["step"] for row in rows(tmp_path / "run") if "hellaswag" in row] == [4, 6]
    assert calls == [t.model, t.model]
