"""Saves, kills inside a save, damage and new starts in any order: the newest whole checkpoint is never lost."""

import contextlib
import itertools
import json
import os
import tempfile
from functools import cache
from pathlib import Path

import pytest
import torch
from crashes import killed
from hypothesis import example, given, settings
from hypothesis import strategies as st

from aymen_gpt.data import tokenizer
from aymen_gpt.errors import DataError
from aymen_gpt.model.folders import checkpoint_folder, checkpoints
from aymen_gpt.model.gpt import GPT, GPTConfig
from aymen_gpt.training import checkpoint, optim
from aymen_gpt.training.guard import Guard
from aymen_gpt.training.resume import find_checkpoint

CONFIG = GPTConfig(block_size=4, vocab_size=50, n_layer=1, n_head=1, n_embd=4)
KEEP = {"keep_last": 2, "keep": lambda step: step % 5 == 0}
FILES = ("config.json", "state.json", "model.safetensors", "optimizer.safetensors", "manifest.json")
SAVE = "aymen_gpt.training.checkpoint"
FUNCTIONS = [f"{SAVE}:{name}" for name in ("write_json", "sync", "_write_manifest", "_drop_old")]
FUNCTIONS += ["aymen_gpt.training.tensor_files:save_file", "os.replace", "shutil.rmtree", "pathlib:Path.rename"]
POINTS = [f"{moment}:{nth}:{f}" for f in FUNCTIONS for nth in (1, 2, 3) for moment in ("before", "after")]


def flipped(content):
    middle = len(content) // 2
    return content[:middle] + bytes(byte ^ 1 for byte in content[middle : middle + 1]) + content[middle + 1 :]


DAMAGE = [flipped, lambda c: c[:-1], lambda c: b"", lambda c: b"[]", lambda c: b"null", lambda c: b'{"files": {}}',
          lambda c: None]  # fmt: skip


@cache
def captured(step):
    model = GPT(CONFIG, torch.Generator().manual_seed(step))
    optimizer = optim.adamw(model, lr=1e-2, betas=(0.9, 0.95), weight_decay=0.1)
    optim.start_moments(model, optimizer)
    return checkpoint.capture(model, optimizer)


def save(run, step, **keep):
    snapshot = checkpoint.Snapshot(step, step, 8 * step, {}, {}, Guard().state(), {"step": step})
    return checkpoint.publish(run, captured(step), snapshot, **keep)


@cache
def reference(step):
    """The bytes of a checkpoint that nothing ever happened to."""
    with tempfile.TemporaryDirectory() as folder:
        saved = save(Path(folder), step, keep_last=2, keep=KEEP["keep"])
        return {name: (saved / name).read_bytes() for name in FILES}


def what_counts(manifest):
    """All of a manifest that training relies on; a flipped bit in the hash of the card harms nobody."""
    with contextlib.suppress(ValueError, KeyError, TypeError):
        found = json.loads(manifest)
        return [found["step"], [found["files"][name] for name in FILES[:-1]]]


class Story:
    """A run folder, the process that trains in it, and what must be true of both after each event."""

    def __init__(self, run):
        self.run, self.at = run, 0

    def whole(self):
        """Steps whose checkpoints are as they were written, newest last."""
        steps = [int(folder.name[5:]) for folder in checkpoints(self.run)]
        return sorted(step for step in steps if all(map(self.intact, itertools.repeat(step), FILES)))

    def intact(self, step, name):
        path = checkpoint_folder(self.run, step) / name
        if not path.is_file():
            return False
        found, expected = path.read_bytes(), reference(step)[name]
        return found == expected or (name == "manifest.json" and what_counts(found) == what_counts(expected))

    def write(self, path, content):
        path.unlink(missing_ok=True)
        if content is not None:
            path.write_bytes(content)
            os.utime(path, (1e9 + next(clock),) * 2)  # clocks of file systems tick every few ms only

    def save(self, point=None):
        before, step = self.whole(), self.at + 1
        reference(step)
        died = point is not None and killed(point, lambda: save(self.run, step, **KEEP))
        if point is None:
            save(self.run, step, **KEEP)
        after, self.at = self.whole(), step
        if died:
            assert before[-1:] == [s for s in after if s in before][-1:], "the newest whole checkpoint is gone"
            return self.start()
        earlier = [s for s in before if s < step]
        kept = {*earlier[-KEEP["keep_last"] + 1 :], *(s for s in earlier if KEEP["keep"](s))}
        assert after == sorted({*kept, step, *(s for s in before if s > step)})

    def start(self):
        whole = self.whole()
        if not whole and checkpoints(self.run):
            with pytest.raises(DataError, match="no checkpoint can be used"):
                find_checkpoint(self.run, "auto")
        else:
            found, _ = find_checkpoint(self.run, "auto")
            self.at = whole[-1] if whole else 0
            assert found == (checkpoint_folder(self.run, self.at) if whole else None)
        assert self.whole() == whole
        assert not list(self.run.glob("checkpoints/.tmp-*"))

    def damage(self, nth, name, change):
        folders = sorted(self.run.glob("checkpoints/step-*"), reverse=True)
        path = folders[nth % len(folders)] / name if folders else self.run / name
        if path.is_file():
            self.write(path, change(path.read_bytes()))

    def mend(self, nth):
        """A person brings back a copy of one of the newest checkpoints."""
        for folder in checkpoints(self.run)[nth : nth + 1]:
            for name in FILES:
                self.write(folder / name, reference(int(folder.name[5:]))[name])


clock = itertools.count(1)
few = st.integers(0, 3)
events = st.one_of(
    st.tuples(st.just("save")),
    st.tuples(st.just("save"), st.sampled_from(POINTS)),
    st.tuples(st.just("start")),
    st.tuples(st.just("damage"), few, st.sampled_from(FILES), st.sampled_from(DAMAGE)),
    st.tuples(st.just("mend"), few),
)


@pytest.mark.slow
@pytest.mark.fault(2, 14, 15, 16)
@settings(max_examples=60, deadline=None)
@given(st.lists(events, max_size=20))
@example(
    [("damage", 0, "state.json", DAMAGE[2]), ("start",), ("mend", 0), ("save", f"before:1:{SAVE}:write_json")]
)
def test_no_sequence_of_damage_kill_and_start_loses_the_newest_whole_checkpoint(story):
    with tempfile.TemporaryDirectory() as folder, pytest.MonkeyPatch.context() as patch:
        patch.setattr(tokenizer, "write_huggingface_files", lambda *_, **__: None)  # a second of every save
        told = Story(Path(folder))
        for event, *details in [("save",), ("save",), *story, ("start",)]:
            getattr(told, event)(*details)
