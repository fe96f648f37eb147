"""A checkpoint opens in transformers, restores every bit, and exists whole or not at all."""

import json
import re
import resource
import shutil
import signal
from types import SimpleNamespace

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from aymen_gpt.data import tokenizer
from aymen_gpt.errors import CannotWrite, DataError, UsageError
from aymen_gpt.files import sha256
from aymen_gpt.model import folders
from aymen_gpt.model.folders import TRAINING, checkpoints, latest_valid, problem
from aymen_gpt.model.gpt import GPT, GPTConfig
from aymen_gpt.training import checkpoint, optim
from aymen_gpt.training.guard import Guard
from aymen_gpt.training.resume import find_checkpoint

CONFIG = GPTConfig(block_size=16, vocab_size=50257, n_layer=1, n_head=2, n_embd=16)


@pytest.fixture(autouse=True)
def no_vocabulary(request, monkeypatch):
    """Without the files of the vocabulary a save takes 20 ms, not 200."""
    if "transformers" not in request.node.name:
        monkeypatch.setattr(tokenizer, "write_huggingface_files", lambda *_, **__: None)


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


def save(run, step=2, model_and_optimizer=None, keep_last=3, keep=lambda step: False):
    model, optimizer = model_and_optimizer or trained(updates=0)
    captured = checkpoint.capture(model, optimizer)
    return checkpoint.publish(run, captured, snapshot(step), keep_last=keep_last, keep=keep)


def snapshot(step=2):
    metrics = {"step": step, "loss": 3.5}
    return checkpoint.Snapshot(step, 2, step * 8, {"seed": 1}, {"device": "cpu"}, Guard().state(), metrics)


def steps(run):
    return [int(folder.name[5:]) for folder in checkpoints(run)]


def cut(folder, name="model.safetensors"):
    (folder / name).write_bytes((folder / name).read_bytes()[:100])


def test_transformers_opens_the_folder_as_it_stands_and_nothing_in_it_is_a_pickle(tmp_path):
    model, optimizer = trained()
    folder = save(tmp_path, model_and_optimizer=(model, optimizer))
    assert {path.suffix for path in folder.iterdir()} == {".json", ".safetensors", ".txt", ".md"}
    idx = torch.arange(16)[None]
    with torch.no_grad():
        theirs = AutoModelForCausalLM.from_pretrained(folder)(idx).logits
        assert (model(idx) - theirs).abs().max() < 1e-4
    assert theirs.shape[-1] == 50257
    assert AutoTokenizer.from_pretrained(folder)("Hello world")["input_ids"] == [15496, 995]


def test_restoring_gives_back_every_bit_of_the_moment_of_start_whatever_training_does_next(tmp_path):
    """The weights are changed right after start returns, while the files are being written."""
    model, optimizer = trained()
    before, befores_optimizer = trained()
    with checkpoint.Saver(tmp_path, print, keep_last=3, keep=lambda step: False) as saver:
        saver.start(model, optimizer, snapshot(2))
        with torch.no_grad():
            for p in model.parameters():
                p.fill_(7.0)
                for which in optim.MOMENTS:
                    optimizer.state[p][which].fill_(7.0)
    twin, twins_optimizer = trained(seed=5, updates=0)
    assert checkpoint.restore(checkpoints(tmp_path)[0], twin, twins_optimizer) == snapshot(2)
    for (name, p), q in zip(before.named_parameters(), twin.parameters(), strict=True):
        assert torch.equal(p, q), name
        for which in ("step", *optim.MOMENTS):
            assert torch.equal(befores_optimizer.state[p][which], twins_optimizer.state[q][which]), (name, which)


@pytest.mark.fault(14)
def test_the_newest_whole_ones_are_kept_and_milestones_and_later_ones_too(tmp_path, monkeypatch):
    read = []
    monkeypatch.setattr(folders, "sha256", lambda path: read.append(path) or sha256(path))
    for step in range(1, 8):
        save(tmp_path / "a", step, keep_last=2, keep=lambda step: step in (3, 6))
    assert steps(tmp_path / "a") == [7, 6, 3]
    assert len(read) == 7 * len(TRAINING)  # each is read back once in a process
    for step in (10, 20, 30):
        save(tmp_path / "b", step)
    cut(checkpoints(tmp_path / "b")[0])
    cut(checkpoints(tmp_path / "b")[1])
    save(tmp_path / "b", 12, keep_last=2)
    assert steps(tmp_path / "b") == [30, 20, 12, 10]  # damaged ones do not count
    assert latest_valid(tmp_path / "b")[0].name == "step-000000012"
    for step in (13, 14):
        save(tmp_path / "b", step, keep_last=2)
    assert steps(tmp_path / "b") == [30, 20, 14, 13]
    for step in (10, 30, 40, 12, 13):
        save(tmp_path / "c", step, keep_last=2)
    assert steps(tmp_path / "c") == [40, 30, 13, 12]


def test_a_whole_checkpoint_of_the_same_step_is_kept_and_a_damaged_one_set_aside(tmp_path):
    folder = save(tmp_path)
    before = {p.name: p.stat().st_mtime_ns for p in folder.iterdir()}
    assert save(tmp_path, model_and_optimizer=trained(seed=1)) == folder
    assert {p.name: p.stat().st_mtime_ns for p in folder.iterdir()} == before
    cut(folder)
    assert problem(save(tmp_path)) is None
    assert (folder.with_name(f"{folder.name}.damaged-1") / "model.safetensors").stat().st_size == 100


@pytest.mark.fault(16)
def test_a_folder_that_is_no_checkpoint_of_the_run_is_neither_used_nor_deleted(tmp_path):
    first, newest = save(tmp_path, 10), save(tmp_path, 30)
    names = ["step-000010bak", "step-best_aaaa", "step-best_bbbb", "step-zzzzzzzzz", "step-000000040",
             "step-000000001", f"step-{9 * chr(0x661)}", ".tmp-mine", "step-000000020"]  # fmt: skip
    others = [first.with_name(name) for name in names]
    for other in others[:-1]:
        shutil.copytree(first, other)
    others[-1].write_text("a file")
    killed = first.with_name(".tmp-step-000000002-77")  # of a killed save
    killed.mkdir()
    found, notices = find_checkpoint(tmp_path, "auto")
    assert found == newest
    assert not killed.exists()
    assert "warning: removed 1 checkpoint of a save that was cut short" in notices
    assert [n for n in notices if "step-000000040: manifest.json is that of step 10; using step-000000030" in n]
    save(tmp_path, 31, keep_last=1)
    assert all(other.exists() for other in others)
    assert not first.exists()
    assert not newest.exists()


@pytest.mark.parametrize("error", [ValueError("Out of range float values"), KeyboardInterrupt(), None])
def test_no_failed_save_leaves_its_files_and_what_reads_otherwise_is_never_called_saved(
    tmp_path, monkeypatch, error
):
    good, write = save(tmp_path, 1), checkpoint._write_manifest

    def fail(folder, step, written):
        if error:
            raise error
        write(folder, step, written)
        cut(folder)

    monkeypatch.setattr(checkpoint, "_write_manifest", fail)
    message = None if error else r"cannot save step 3 in .*reads otherwise \(model.safetensors is 100 byt"
    with pytest.raises(type(error) if error else CannotWrite, match=message):
        save(tmp_path, 3)
    assert list((tmp_path / "checkpoints").iterdir()) == [good]


def test_a_save_that_fails_in_the_middle_of_a_file_leaves_nothing_and_harms_nothing(tmp_path):
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
    assert list((tmp_path / "checkpoints").iterdir()) == [good]
    assert problem(good) is None


def test_a_failed_save_is_told_counted_and_forgotten_by_the_next_good_one(tmp_path, monkeypatch):
    told = []
    model, optimizer = trained()
    with checkpoint.Saver(tmp_path, told.append, keep_last=3, keep=lambda step: False) as saver:
        with monkeypatch.context() as full:
            full.setattr(checkpoint.shutil, "disk_usage", lambda path: SimpleNamespace(free=1_000_000))
            for step in (1, 2):
                saver.start(model, optimizer, snapshot(step))
                saver.wait()
        assert saver.failures == 2
        assert re.search(
            r"cannot save step 1 in .*: no space left on the disk \(needs 0.0097 GB, 0.001 GB free\); "
            "training goes on and will try again at the next checkpoint",
            told[0],
        )
        saver.start(model, optimizer, snapshot(3))
        saver.wait()
        assert (saver.failures, saver.error) == (0, None)
    assert [path.name for path in (tmp_path / "checkpoints").iterdir()] == ["step-000000003"]


def flipped(content):
    """One bit is another: of a manifest in the first sha256, of other files in the middle."""
    place = content.find(b'"sha256": "') + 11 if b'"sha256": "' in content else len(content) // 2
    return content[:place] + bytes([content[place] ^ 1]) + content[place + 1 :]


@pytest.mark.fault(14, 15, 16)
@pytest.mark.parametrize("name", ["model.safetensors", "optimizer.safetensors", "state.json", "manifest.json"])
def test_a_damaged_checkpoint_is_named_and_the_one_before_is_used(tmp_path, name):
    good, bad = save(tmp_path, 1), save(tmp_path, 2)
    path, whole = bad / name, (bad / name).read_bytes()
    damage = {
        "bytes, its manifest says": whole[:-10],
        "has another sha256": flipped(whole),
        "is missing": None,
    }
    for message, content in damage.items():
        path.unlink()
        if content is not None:
            path.write_bytes(content)
        blame = f"{name} .*{message}"
        if name == "manifest.json":
            blame = message if message == "has another sha256" else "manifest.json is missing or unreadable"
        newest, notices = find_checkpoint(tmp_path, "auto")
        assert newest == good
        assert re.search(f"warning: .*step-000000002: .*{blame}.*; using step-000000001$", notices[0])
        path.write_bytes(whole)
    assert find_checkpoint(tmp_path, "auto") == (bad, [])


@pytest.mark.fault(15)
def test_no_manifest_with_a_flipped_bit_or_of_another_shape_hides_a_damaged_file(tmp_path):
    folder = tmp_path / "step-000000007"
    folder.mkdir()
    for name in (*TRAINING, "README.md"):
        (folder / name).write_text(f"{name} of this run")
    checkpoint._write_manifest(folder, 7, {})
    content = bytearray((folder / "manifest.json").read_bytes())

    def found(manifest):
        (folder / "manifest.json").write_bytes(manifest)
        return problem(folder)

    right = json.loads(content)
    files = right["files"]
    assert found(json.dumps(right).encode()) is None
    for wrong in (
        *([right], None, right | {"step": 8}, {"files": files}, {"step": 7, "files": {}}),
        *(right | {"files": {n: f for n, f in files.items() if n != name}} for name in TRAINING),
        right | {"files": {n: f | {"bytes": str(f["bytes"])} for n, f in files.items()}},
    ):
        assert found(json.dumps(wrong).encode())
    assert "manifest.json" in found(b'{"files": ' + b"[" * 100_000)
    (folder / "model.safetensors").write_text("Model.safetensors of this run")
    for bit in range(0, 8 * len(content), 37):
        content[bit // 8] ^= 1 << bit % 8
        assert found(bytes(content))
        content[bit // 8] ^= 1 << bit % 8


@pytest.mark.parametrize("change", [lambda s: {}, lambda s: s | {"more": 1}, lambda s: s | {"format": 1}])
def test_a_state_of_another_version_is_passed_over_although_its_hash_is_right(tmp_path, change):
    good, bad = save(tmp_path, 1), save(tmp_path, 2)
    found = json.loads((bad / "state.json").read_text())
    (bad / "state.json").write_text(json.dumps(change(found)))
    (bad / "manifest.json").unlink()
    checkpoint._write_manifest(bad, 2, {})
    newest, notices = find_checkpoint(tmp_path, "auto")
    assert newest == good
    assert re.search(r"step-000000002: .*state.json was written by another .*; using step-000000001$", notices[0])


def test_only_the_records_of_a_run_are_set_aside(tmp_path):
    for name in ("earlier-\u00b2", "earlier-1", ".git", "code", "other-run"):
        (tmp_path / name).mkdir()
    for name in ("train.py", "config.json"):
        (tmp_path / name).write_text("{}")
    before = set(tmp_path.iterdir())
    with pytest.raises(
        UsageError, match=r"is no run, it holds code, config.json, other-run and 1 more: .* --run-dir"
    ):
        find_checkpoint(tmp_path, "none")
    assert set(tmp_path.iterdir()) == before
    save(tmp_path)
    assert find_checkpoint(tmp_path, "none") == (None, [])
    assert {p.name for p in (tmp_path / "earlier-2").iterdir()} == {"checkpoints", "config.json"}
    assert set(tmp_path.iterdir()) == {*before, tmp_path / "earlier-2"} - {tmp_path / "config.json"}


def test_a_file_in_the_place_of_all_checkpoints_is_no_new_start(tmp_path):
    for name in ("checkpoints", "metrics.jsonl"):
        (tmp_path / name).write_text("")
    with pytest.raises(
        DataError, match=r"cannot read .*checkpoints: Not a directory; move it away, or name another"
    ):
        find_checkpoint(tmp_path, "auto")
    assert find_checkpoint(tmp_path, "none") == (None, [])


def test_the_card_may_be_edited_and_files_added(tmp_path):
    folder = save(tmp_path)
    (folder / "README.md").write_text("my model")
    (folder / "notes.txt").write_text("mine")
    assert find_checkpoint(tmp_path, "auto") == (folder, [])
