"""A checkpoint is a Hugging Face model folder with the training state beside it; it exists whole or not at all.

    runs/NAME/checkpoints/step-000005000/
        config.json  generation_config.json  model.safetensors  tokenizer.json  vocab.json  ...   Hugging Face's
        optimizer.safetensors    exp_avg.NAME, exp_avg_sq.NAME, momentum.NAME, in GPT-2's layout   ours
        state.json               step, rows consumed, the run's configuration, the step's metrics  ours
        manifest.json            step, size and sha256 of every file above                         ours
        README.md                model card: what it is, its scores, how to make it again          ours

Published by writing beside, syncing, hashing and renaming, from copies in memory while training goes on. No
random state is kept, since there is none: the initial weights, the data order and the samples are functions of
the seed and the step alone.
"""

import errno
import json
import os
import shutil
from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path
from threading import Thread
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor

from aymen_gpt.data import tokenizer
from aymen_gpt.errors import AymenError, CannotWrite, DataError
from aymen_gpt.files import read_json, set_aside, sha256, sync
from aymen_gpt.model.card import card
from aymen_gpt.model.folders import checkpoint_folder, checkpoints, problem, step_of
from aymen_gpt.model.gpt import GPT, GPTConfig
from aymen_gpt.model.huggingface import EOT, config_to_huggingface, from_huggingface, read_config, to_huggingface
from aymen_gpt.training import optim

FORMAT = 2
Tensors = dict[str, Tensor]


def write_json(path: Path, value: Any) -> None:
    path.write_text(json.dumps(value, indent=2, allow_nan=False) + "\n")


@dataclass(frozen=True)
class Snapshot:
    """All of a run at one step but its tensors: state.json."""

    step: int
    updates: int  # of the optimizer: steps less the skipped ones
    rows: int  # of the data order, consumed so far
    identity: dict[str, Any]  # what may not change between the parts of a run
    settings: dict[str, Any]  # what may
    guard: dict[str, Any]  # the losses that spikes are measured by
    metrics: dict[str, Any]  # this step's row of metrics.jsonl
    scaler: dict[str, Any] = field(default_factory=dict)  # the loss scale of float16 training


@dataclass(frozen=True)
class Capture:
    """Copies of a run's tensors in host memory, as the files of a checkpoint hold them."""

    config: GPTConfig
    weights: Tensors
    moments: Tensors


def capture(model: GPT, optimizer: torch.optim.Optimizer) -> Capture:
    """Copy what a checkpoint needs, so that training can go on while it is written.

    Raises AymenError when a weight is not finite: such a model is never saved.
    """
    bad = first_not_finite(model.state_dict())
    if bad:
        raise AymenError(f"{bad} holds NaN or infinity: nothing was saved; continue from an older checkpoint")

    def host(tensors: Tensors) -> Tensors:
        copies: Tensors = {}
        for name, t in tensors.items():  # one at a time: the layout change makes a second copy
            copies |= to_huggingface({name: t.to("cpu", copy=True)}, model.config.vocab_size)
        return copies

    moments = {
        f"{which}.{name}": t
        for which in optim.kinds(optimizer)
        for name, t in host(optim.moments(model, optimizer, which)).items()
    }
    return Capture(model.config, host(model.state_dict()), moments)


def first_not_finite(tensors: Tensors) -> str | None:
    return next((name for name, t in tensors.items() if not torch.isfinite(t).all()), None)


def publish(
    run: Path,
    captured: Capture,
    snapshot: Snapshot,
    *,
    keep_last: int,
    keep: Callable[[int], bool] = lambda step: False,
) -> Path:
    """Write the checkpoint of ``snapshot.step``, then drop old ones; its folder.

    The newest ``keep_last`` stay, and those whose step ``keep`` says yes to. What is written is read
    back before it gets its name. Raises CannotWrite when that fails, the disk is full or read-only; older
    checkpoints are untouched then. A whole checkpoint of this step stays, anything else there is set aside.
    """
    final = checkpoint_folder(run, snapshot.step)
    partial = final.with_name(f".tmp-{final.name}-{os.getpid()}")
    try:
        if unusable(final):
            _write_folder(partial, captured, snapshot)
            if os.path.lexists(final):
                set_aside(final)
            os.replace(partial, final)
            sync(final.parent)
    except (OSError, SafetensorError) as error:
        reason = getattr(error, "strerror", None) or str(error)
        raise CannotWrite(f"cannot save step {snapshot.step} in {final.parent}: {reason}") from error
    finally:
        shutil.rmtree(partial, ignore_errors=True)
    _drop_old(run, snapshot.step, keep_last, keep)
    return final


def unusable(folder: Path, *, remember: bool = False) -> str | None:
    """Why training cannot go on from a checkpoint, in words, or None; ``remember`` as in ``problem``."""
    if why := problem(folder, remember=remember):
        return why
    try:
        read_snapshot(folder)
    except DataError as error:
        return str(error)
    return None


def _write_folder(folder: Path, captured: Capture, snapshot: Snapshot) -> None:
    folder.mkdir(parents=True, exist_ok=True)
    needed = sum(t.nbytes for part in (captured.weights, captured.moments) for t in part.values())
    free = shutil.disk_usage(folder).free
    if free < needed:
        why = f"no space left on the disk (needs {needed / 1e9:.2g} GB, {free / 1e9:.2g} GB free)"
        raise OSError(errno.ENOSPC, why)
    write_json(folder / "config.json", config_to_huggingface(captured.config))
    write_json(folder / "generation_config.json", {"bos_token_id": EOT, "eos_token_id": EOT})
    tokenizer.write_huggingface_files(folder, model_max_length=captured.config.block_size)
    save_file(captured.weights, folder / "model.safetensors", metadata={"format": "pt"})
    save_file(captured.moments, folder / "optimizer.safetensors", metadata={"format": "pt"})
    write_json(folder / "state.json", {"format": FORMAT, **vars(snapshot)})
    _write_manifest(folder, snapshot.step)
    write_card(folder)
    if wrong := unusable(folder):
        raise OSError(errno.EIO, f"what was written reads otherwise ({wrong})")


def _drop_old(run: Path, step: int, keep_last: int, keep: Callable[[int], bool]) -> None:
    """Delete what is older than the newest ``keep_last`` whole checkpoints up to ``step``, but for those to keep.

    To count the whole ones costs little: the newest was hashed a moment ago, the others once in this process.
    Damaged ones and folders of others do not count, and stay if their manifest does not have their step.
    """
    kept = 0
    for old in checkpoints(run):
        if step_of(old) > step or old.is_symlink():
            continue
        if kept < keep_last:
            kept += unusable(old, remember=True) is None
        elif not keep(step_of(old)) and problem(old, needed=()) is None:
            gone = old.with_name(f".tmp-{old.name}-{os.getpid()}")
            with suppress(OSError):
                old.rename(gone)  # at once, however long the deletion takes
            shutil.rmtree(gone, ignore_errors=True)


def write_card(folder: Path, scores: dict[str, Any] | None = None) -> None:
    """README.md of a checkpoint, with HellaSwag's ``scores`` of its step by protocol; see card.

    A card has the time of change of state.json while it is ours; with another time a person has edited it, and it
    stays. A run whose config.json cannot be read has a card all the same: it is no reason to lose a checkpoint.
    """
    final, ours = folder / "README.md", (folder / "state.json").stat().st_mtime_ns
    if final.exists() and final.stat().st_mtime_ns != ours:
        return
    snapshot, shape = read_snapshot(folder), read_config(folder)
    run: dict[str, Any] = {}
    with suppress(DataError):
        run = read_json(folder.parent.parent / "config.json")
    temporary = folder / ".README.md.tmp"
    temporary.write_text(card(snapshot.step, vars(shape), snapshot.metrics, run, scores or {}))  # makes no folder
    os.utime(temporary, ns=(ours, ours))
    os.replace(temporary, final)


def _write_manifest(folder: Path, step: int) -> None:
    files = {}
    for path in sorted(folder.iterdir()):
        path.chmod(0o644)  # safetensors makes files that only their owner may read
        sync(path)
        files[path.name] = {"bytes": path.stat().st_size, "sha256": sha256(path)}
    write_json(folder / "manifest.json", {"format": FORMAT, "step": step, "files": files})
    sync(folder / "manifest.json")
    sync(folder)


def remove_partial(run: Path) -> int:
    """Delete what a killed save left behind; how many folders that was."""
    leftovers = list((run / "checkpoints").glob(f".tmp-step-{9 * '[0-9]'}-*"))
    for path in leftovers:
        shutil.rmtree(path, ignore_errors=True)
    return len(leftovers)


def read_snapshot(folder: Path) -> Snapshot:
    """state.json of a checkpoint; DataError when another version of this code wrote it."""
    path = folder / "state.json"
    found = read_json(path)
    with suppress(TypeError):
        if found.pop("format", None) == FORMAT:
            return Snapshot(**found)
    raise DataError(f"{path} was written by another version of Aymen-GPT: its model can be used, not continued")


def restore(folder: Path, model: GPT, optimizer: torch.optim.Optimizer) -> Snapshot:
    """Put model and optimizer where ``capture`` found them; DataError when a tensor holds NaN or infinity."""
    snapshot = read_snapshot(folder)
    weights, stored = load_file(folder / "model.safetensors"), load_file(folder / "optimizer.safetensors")
    bad = first_not_finite(weights) or first_not_finite(stored)
    if bad:
        raise DataError(
            f"{folder}: {bad} holds NaN or infinity; delete the folder to continue from the one before"
        )
    model.load_state_dict(from_huggingface(weights, model.config))
    by_moment: dict[str, Tensors] = {
        which: from_huggingface(
            {name.removeprefix(f"{which}."): t for name, t in stored.items() if name.startswith(f"{which}.")},
            model.config,
        )
        for which in optim.kinds(optimizer)
    }
    optim.restore_moments(model, optimizer, snapshot.updates, by_moment)
    return snapshot


class Saver:
    """Publishes checkpoints in a thread while training goes on; leaving the ``with`` waits for the last one."""

    def __init__(
        self, run: Path, warn: Callable[[str], None], keep_last: int, keep: Callable[[int], bool]
    ) -> None:
        self.run, self.warn, self.keep_last, self.keep = run, warn, keep_last, keep  # as publish has them
        self.failures = 0  # in a row
        self.error: Exception | None = None  # of the newest save
        self._thread = Thread()

    def __enter__(self) -> "Saver":
        return self

    def __exit__(self, *error: object) -> None:
        self.wait()

    def start(self, model: GPT, optimizer: torch.optim.Optimizer, snapshot: Snapshot) -> None:
        """Copy the tensors and return; the files follow. Waits for the save before, so there is one at a time."""
        self.wait()
        captured = capture(model, optimizer)
        self._thread = Thread(target=self._publish, args=(captured, snapshot), name="checkpoint")
        self._thread.start()

    def wait(self) -> None:
        """Return when no save is under way."""
        if self._thread.is_alive():
            self._thread.join()

    def _publish(self, captured: Capture, snapshot: Snapshot) -> None:
        try:
            publish(self.run, captured, snapshot, keep_last=self.keep_last, keep=self.keep)
            self.error, self.failures = None, 0
        except Exception as error:  # a thread has nobody to raise to
            self.error = error
            self.failures += 1
            self.warn(f"warning: {error}; training goes on and will try again at the next checkpoint")
