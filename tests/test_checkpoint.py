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

from aymen_gpt.errors import CannotWrite, DataError, UsageError
from aymen_gpt.files import sha256
from aymen_gpt.model import folders
from aymen_gpt.model.folders import TRAINING, checkpoints, latest_valid, problem
from aymen_gpt.model.gpt import GPT, GPTConfig
from aymen_gpt.training import checkpoint, optim
from aymen_gpt.training.guard import Guard
from aymen_gpt.training.resume import find_checkpoint

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
    return checkpoint.Snapshot(step, 2, step * 8, {"seed": 1}, {"device": "cpu"}, Guard().state(), metrics)


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


def steps(run):
    return [int(folder.name[5:]) for folder in checkpoints(run)]


def cut(folder, name="model.safetensors"):
    (folder / name).write_bytes((folder / name).read_bytes()[:100])


@pytest.mark.fault(14)
def test_damaged_checkpoints_do_not_count_as_kept(tmp_path):
    for step in (10, 20, 30):
        save(tmp_path, step)
    cut(checkpoints(tmp_path)[0])
    cut(checkpoints(tmp_path)[1])
    save(tmp_path, 12, keep_last=2)
    assert steps(tmp_path) == [30, 20, 12, 10]
    assert latest_valid(tmp_path)[0].name == "step-000000012"
    save(tmp_path, 13, keep_last=2)
    save(tmp_path, 14, keep_last=2)
    assert steps(tmp_path) == [30, 20, 14, 13]


def test_each_checkpoint_is_read_back_once_in_a_process(tmp_path, monkeypatch):
    read = []
    monkeypatch.setattr(folders, "sha256", lambda path: read.append(path) or sha256(path))
    for step in range(1, 7):
        save(tmp_path, step, keep_last=2, keep_every=2)
    assert len(read) == 6 * len(TRAINING)


def test_whole_checkpoints_later_than_the_new_one_are_left_alone(tmp_path):
    for step in (10, 30, 40, 12, 13):
        save(tmp_path, step, keep_last=2)
    assert steps(tmp_path) == [40, 30, 13, 12]


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
             "step-000000001", f"step-{9 * chr(0x661)}", "step-000000020"]  # fmt: skip
    others = [first.with_name(name) for name in names]
    for other in others[:-1]:
        shutil.copytree(first, other)
    others[-1].write_text("a file")
    found, notices = find_checkpoint(tmp_path, "auto")
    assert found == newest
    assert [n for n in notices if "step-000000040: manifest.json is that of step 10; using step-000000030" in n]
    save(tmp_path, 31, keep_last=1)
    assert all(other.exists() for other in others)
    assert not first.exists()
    assert not newest.exists()


def test_what_reads_otherwise_than_it_was_written_is_never_called_saved(tmp_path, monkeypatch):
    for step in (1, 2):
        save(tmp_path, step, keep_last=2)
    write = checkpoint._write_manifest
    monkeypatch.setattr(checkpoint, "_write_manifest", lambda folder, step: (write(folder, step), cut(folder)))
    with pytest.raises(
        CannotWrite, match=r"cannot save step 3 in .*reads otherwise \(model.safetensors is 100 byt"
    ):
        save(tmp_path, 3, keep_last=2)
    assert [p.name for p in sorted((tmp_path / "checkpoints").iterdir())] == ["step-000000001", "step-000000002"]


@pytest.mark.parametrize(
    "error", [ValueError("Out of range float values are not JSON compliant"), KeyboardInterrupt()]
)
def test_no_failed_save_leaves_its_files(tmp_path, monkeypatch, error):
    def fail(*_):
        raise error

    monkeypatch.setattr(checkpoint, "_write_manifest", fail)
    with pytest.raises(type(error)):
        save(tmp_path)
    assert list((tmp_path / "checkpoints").iterdir()) == []


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


@pytest.mark.fault(14, 15, 16)
@pytest.mark.parametrize(
    ("damage", "message"),
    [(damage_truncate, r"model.safetensors is [\d,]+ bytes, its manifest says [\d,]+"),
     (damage_bit, "optimizer.safetensors has another sha256"),
     (damage_missing, "state.json is missing"),
     (damage_manifest, "manifest.json is missing or unreadable")],
)  # fmt: skip
def test_a_damaged_checkpoint_is_named_and_the_one_before_is_used(tmp_path, damage, message):
    good, bad = save(tmp_path, 1), save(tmp_path, 2)
    damage(bad)
    found, problems = latest_valid(tmp_path)
    assert found == good
    assert len(problems) == 1
    assert re.search(message, problems[0])


@pytest.fixture
def manifest(tmp_path):
    """A checkpoint of tiny files; manifest(content) is the problem with it when its manifest has this content."""
    folder = tmp_path / "step-000000007"
    folder.mkdir()
    for name in (*TRAINING, "README.md"):
        (folder / name).write_text(f"{name} of this run")
    checkpoint._write_manifest(folder, 7)

    def replaced(content):
        (folder / "manifest.json").write_bytes(content)
        return problem(folder)

    replaced.content = (folder / "manifest.json").read_bytes()
    replaced.folder = folder
    return replaced


@pytest.mark.fault(15)
@pytest.mark.parametrize("damaged", [False, True])
def test_no_flipped_bit_of_a_manifest_hides_a_damaged_file(manifest, damaged):
    content = bytearray(manifest.content)
    if damaged:
        (manifest.folder / "model.safetensors").write_text("Model.safetensors of this run")
    for bit in range(0, 8 * len(content), 5):
        content[bit // 8] ^= 1 << bit % 8
        assert manifest(bytes(content)) or not damaged
        content[bit // 8] ^= 1 << bit % 8


@pytest.mark.parametrize(
    "change",
    [lambda m: [m], lambda m: None, lambda m: {"step": 7, "files": {}}, lambda m: m | {"files": list(m["files"])},
     lambda m: m | {"step": 8}, lambda m: {"files": m["files"]},
     lambda m: m | {"files": {n: [] for n in m["files"]}},
     lambda m: m | {"files": {n: f | {"bytes": str(f["bytes"])} for n, f in m["files"].items()}},
     *(lambda m, name=name: m | {"files": {n: f for n, f in m["files"].items() if n != name}}
       for name in TRAINING)],
    ids=range(8 + len(TRAINING)),
)  # fmt: skip
def test_a_manifest_of_another_shape_is_damage(manifest, change):
    found = json.loads(manifest.content)
    assert manifest(json.dumps(found).encode()) is None
    assert "manifest.json " in manifest(json.dumps(change(found)).encode())
    assert "manifest.json " in manifest(b'{"files": ' + b"[" * 100_000)


@pytest.mark.parametrize(
    "change",
    [lambda s: [s], lambda s: {}, lambda s: s | {"more": 1}, lambda s: s | {"step": "2"},
     lambda s: s | {"step": 3}, lambda s: s | {"rows": 1.5}, lambda s: s | {"format": 1},
     lambda s: s | {"metrics": {}}, lambda s: s | {"identity": None}, lambda s: s | {"guard": {}},
     lambda s: s | {"guard": s["guard"] | {"losses": ["a"]}}],
    ids=range(11),
)  # fmt: skip
def test_a_state_of_another_shape_is_passed_over_although_its_hash_is_right(tmp_path, change):
    good, bad = save(tmp_path, 1), save(tmp_path, 2)
    found = json.loads((bad / "state.json").read_text())
    (bad / "state.json").write_text(json.dumps(change(found)))
    (bad / "manifest.json").unlink()
    checkpoint._write_manifest(bad, 2)
    newest, notices = find_checkpoint(tmp_path, "auto")
    assert newest == good
    assert re.search(r"step-000000002: .*state.json\b.*; using step-000000001$", notices[0])


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
    (tmp_path / "checkpoints" / ".tmp-mine").mkdir()
    assert latest_valid(tmp_path) == (good, [])
    assert checkpoint.remove_partial(tmp_path) == 1
    assert {path.name for path in (tmp_path / "checkpoints").iterdir()} == {"step-000000001", ".tmp-mine"}


def test_nothing_in_it_is_a_pickle(tmp_path):
    for path in save(tmp_path).iterdir():
        assert path.suffix in (".json", ".safetensors", ".txt", ".md"), path
