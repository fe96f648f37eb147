"""A checkpoint opens in transformers, restores every bit, and exists whole or not at all."""

import json
import re
import resource
import signal
from types import SimpleNamespace

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from aymen_gpt.errors import CannotWrite
from aymen_gpt.model.folders import checkpoints, latest_valid, problem
from aymen_gpt.model.gpt import GPT, GPTConfig
from aymen_gpt.training import checkpoint, optim

CONFIG = GPTConfig(block_size=16, vocab_size=50257, n_layer=1, n_head=2, n_embd=16)


def trained(seed=0, updates=2):
    model = GPT(CONFIG, torch.Generator().manual_seed(seed))
    optimizer = optim.adamw(model, lr=1e-2, betas=(0.9, 0.95), weight_decay=0.1)
    optim.start_moments(model, optimizer)
    for _ in range(updates):
        idx = torch.randint(50257, (2, 16), generator=torch.Generator().manual_seed(seed))
        model(idx).square().mean().backward()
        optimizer.step()
        optimizer.zero_grad()
    return model, optimizer


def save(run, step=2, model_and_optimizer=None, keep_last=3, keep_every=0):
    model, optimizer = model_and_optimizer or trained()
    captured = checkpoint.capture(model, optimizer)
    return checkpoint.publish(run, captured, snapshot(step), keep_last=keep_last, keep_every=keep_every)


def snapshot(step=2):
    metrics = {"step": step, "loss": 3.5}
    return checkpoint.Snapshot(step, 2, step * 8, {"seed": 1}, {"device": "cpu"}, {"skipped": 0}, metrics)


def test_transformers_opens_the_folder_as_it_stands(tmp_path):
    model, optimizer = trained()
    folder = save(tmp_path, model_and_optimizer=(model, optimizer))
    idx = torch.arange(16)[None]
    with torch.no_grad():
        theirs = AutoModelForCausalLM.from_pretrained(folder)(idx).logits
        assert (model(idx) - theirs).abs().max() < 1e-4
    assert theirs.shape[-1] == 50257
    assert AutoTokenizer.from_pretrained(folder)("Hello world")["input_ids"] == [15496, 995]


def test_restoring_gives_back_every_bit(tmp_path):
    model, optimizer = trained()
    folder = save(tmp_path, model_and_optimizer=(model, optimizer))
    twin, twins_optimizer = trained(seed=5, updates=0)
    assert checkpoint.restore(folder, twin, twins_optimizer) == snapshot(2)
    for (name, p), q in zip(model.named_parameters(), twin.parameters(), strict=True):
        assert torch.equal(p, q), name
        for which in ("step", *optim.MOMENTS):
            assert torch.equal(optimizer.state[p][which], twins_optimizer.state[q][which]), (name, which)


def test_only_the_newest_are_kept(tmp_path):
    for step in (1, 2, 3, 4):
        save(tmp_path, step, keep_last=2)
    assert [folder.name for folder in checkpoints(tmp_path)] == ["step-000000004", "step-000000003"]


def test_milestones_are_kept_for_good(tmp_path):
    for step in range(1, 8):
        save(tmp_path, step, keep_last=2, keep_every=3)
    assert [int(folder.name[5:]) for folder in checkpoints(tmp_path)] == [7, 6, 3]


def test_nothing_old_is_dropped_for_a_new_one_that_does_not_verify(tmp_path, monkeypatch):
    for step in (1, 2):
        save(tmp_path, step, keep_last=2)
    monkeypatch.setattr(checkpoint, "problem", lambda folder: "damaged on its way to the disk")
    save(tmp_path, 3, keep_last=2)
    assert [int(folder.name[5:]) for folder in checkpoints(tmp_path)] == [3, 2, 1]


def test_what_is_saved_is_the_moment_of_start_whatever_training_does_next(tmp_path):
    """The weights are changed right after start returns, while the files are being written."""
    model, optimizer = trained()
    twin, twins_optimizer = trained()
    with checkpoint.Saver(tmp_path, keep_last=3, keep_every=0, warn=print) as saver:
        saver.start(model, optimizer, snapshot(2))
        with torch.no_grad():
            for p in model.parameters():
                p.fill_(7.0)
                for which in optim.MOMENTS:
                    optimizer.state[p][which].fill_(7.0)
    asynchronous = checkpoint.checkpoints(tmp_path)[0]
    synchronous = save(tmp_path / "beside", 2, (twin, twins_optimizer))
    for path in synchronous.iterdir():
        assert (asynchronous / path.name).read_bytes() == path.read_bytes(), path.name


def test_a_failed_save_is_told_counted_and_forgotten_by_the_next_good_one(tmp_path, monkeypatch):
    told = []
    model, optimizer = trained()
    with checkpoint.Saver(tmp_path, keep_last=3, keep_every=0, warn=told.append) as saver:
        monkeypatch.setattr(checkpoint.shutil, "disk_usage", lambda path: SimpleNamespace(free=1_000_000))
        for step in (1, 2):
            saver.start(model, optimizer, snapshot(step))
            saver.wait()
        assert saver.failures == 2
        assert re.search(
            r"cannot save step 1 in .*: no space left on the disk \(needs 0.0097 GB, 0.001 GB free\); "
            "training goes on and will try again at the next checkpoint",
            told[0],
        )
        monkeypatch.undo()
        saver.start(model, optimizer, snapshot(3))
        saver.wait()
        assert (saver.failures, saver.error) == (0, None)
    assert [path.name for path in (tmp_path / "checkpoints").iterdir()] == ["step-000000003"]


def damage_truncate(folder):
    path = folder / "model.safetensors"
    path.write_bytes(path.read_bytes()[:-10])


def damage_bit(folder):
    path = folder / "optimizer.safetensors"
    content = bytearray(path.read_bytes())
    content[-1] ^= 1
    path.write_bytes(content)


def damage_missing(folder):
    (folder / "state.json").unlink()


def damage_manifest(folder):
    (folder / "manifest.json").write_text('{"files": {')


def damage_outside(folder):
    manifest = json.loads((folder / "manifest.json").read_text())
    manifest["files"]["../../secret"] = {"bytes": 1, "sha256": ""}
    (folder / "manifest.json").write_text(json.dumps(manifest))


@pytest.mark.fault(14, 15, 16, 53)
@pytest.mark.parametrize(
    ("damage", "message"),
    [(damage_truncate, r"model.safetensors is [\d,]+ bytes, its manifest says [\d,]+"),
     (damage_bit, "optimizer.safetensors has another sha256"),
     (damage_missing, "state.json is missing"),
     (damage_manifest, "manifest.json is missing or unreadable"),
     (damage_outside, "outside")],
)  # fmt: skip
def test_a_damaged_checkpoint_is_named_and_the_one_before_is_used(tmp_path, damage, message):
    good, bad = save(tmp_path, 1), save(tmp_path, 2)
    damage(bad)
    found, problems = latest_valid(tmp_path)
    assert found == good
    assert len(problems) == 1
    assert re.search(message, problems[0])


def test_a_save_that_fails_leaves_nothing_and_harms_nothing(tmp_path):
    """The file-size limit stands for a full disk: both fail in the middle of writing model.safetensors."""
    good = save(tmp_path, 1)
    ignored = signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (1_500_000, limits[1]))
    try:
        with pytest.raises(CannotWrite, match="cannot save step 2 in .*checkpoints"):
            save(tmp_path, 2)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
        signal.signal(signal.SIGXFSZ, ignored)
    assert [path.name for path in (tmp_path / "checkpoints").iterdir()] == ["step-000000001"]
    assert problem(good) is None


def test_what_a_killed_save_left_is_swept_away(tmp_path):
    good = save(tmp_path, 1)
    (tmp_path / "checkpoints" / ".tmp-step-000000002-77").mkdir()
    assert latest_valid(tmp_path) == (good, [])
    assert checkpoint.remove_partial(tmp_path) == 1
    assert [path.name for path in (tmp_path / "checkpoints").iterdir()] == ["step-000000001"]


def test_nothing_in_it_is_a_pickle(tmp_path):
    for path in save(tmp_path).iterdir():
        assert path.suffix in (".json", ".safetensors", ".txt", ".md"), path
