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
import os
import shutil
import uuid
from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path
from threading import Thread
from typing import Any

import torch
from safetensors import SafetensorError

from aymen_gpt.data import tokenizer
from aymen_gpt.errors import AymenError, CannotWrite, DataError
from aymen_gpt.files import read_json, set_aside, sha256, sync
from aymen_gpt.model.card import card
from aymen_gpt.model.folders import checkpoint_folder, checkpoints, problem, step_of, trust
from aymen_gpt.model.gpt import GPT, GPTConfig
from aymen_gpt.model.huggingface import EOT, config_to_huggingface, read_config
from aymen_gpt.training import optim
from aymen_gpt.training.distributed import Ranks
from aymen_gpt.training.sharding import copy_size, local
from aymen_gpt.training.tensor_files import LIMIT, Entries, Files, Writers, collect, read, write_json

FORMAT = 2


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
    """Copies in host memory of what this rank writes of a run's tensors, and who writes with it."""

    config: GPTConfig
    weights: Files
    moments: Files
    writers: Writers


def capture(
    model: GPT, optimizer: torch.optim.Optimizer, ranks: Ranks | None = None, *, limit: int = LIMIT
) -> Capture:
    """Copy what a checkpoint needs, so that training can go on while it is written. All ranks must come.

    Raises AymenError when a weight is not finite: such a model is never saved.
    """
    ranks = ranks or Ranks()
    found = ranks.gather(next((n for n, p in model.named_parameters() if not local(p).isfinite().all()), None))
    if bad := next(filter(None, found), None):
        raise AymenError(f"{bad} holds NaN or infinity: nothing was saved; continue from an older checkpoint")
    size, vocab_size = copy_size(next(model.parameters())), model.config.vocab_size
    weights = collect("model", dict(model.named_parameters()), vocab_size, size, limit)
    files = len(set(weights.places.values()))
    moments = collect("optimizer", optim.moments(model, optimizer), vocab_size, size, limit, first=files)
    return Capture(model.config, weights, moments, Writers(ranks, size, ranks.broadcast(uuid.uuid4().hex)))


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

    Of a sharded model each rank of the first copy writes its files and posts their sizes and hashes, and the
    first one, when all have, writes the manifest and gives the folder its name.
    """
    final, writers = checkpoint_folder(run, snapshot.step), captured.writers
    partial = final.with_name(f".tmp-{final.name}-{writers.token}")
    try:
        with writers.telling(snapshot.step) as written:
            written |= _write_tensors(partial, captured)
        if not writers.ranks.is_first:
            return final
        written |= writers.wait(snapshot.step)
        if unusable(final):
            _complete_folder(partial, captured, snapshot, written)
            if os.path.lexists(final):
                set_aside(final)
            os.replace(partial, final)
            sync(final.parent)
            if writers.count > 1:
                trust(final)
    except (OSError, SafetensorError) as error:
        reason = getattr(error, "strerror", None) or str(error)
        raise CannotWrite(f"cannot save step {snapshot.step} in {final.parent}: {reason}") from error
    finally:
        if writers.ranks.is_first:
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


def _write_tensors(folder: Path, captured: Capture) -> Entries:
    """This rank's files of tensors, written and hashed."""
    folder.mkdir(parents=True, exist_ok=True)
    needed = captured.weights.nbytes + captured.moments.nbytes
    free = shutil.disk_usage(folder).free
    if free < needed:
        why = f"no space left on the disk (needs {needed / 1e9:.2g} GB, {free / 1e9:.2g} GB free)"
        raise OSError(errno.ENOSPC, why)
    first = captured.writers.ranks.is_first
    files = [path for part in (captured.weights, captured.moments) for path in part.write(folder, first=first)]
    return {path.name: _entry(path) for path in files}


def _complete_folder(folder: Path, captured: Capture, snapshot: Snapshot, written: Entries) -> None:
    """All other files; the manifest, with what the ranks say they have ``written``, is the last."""
    write_json(folder / "config.json", config_to_huggingface(captured.config))
    write_json(folder / "generation_config.json", {"bos_token_id": EOT, "eos_token_id": EOT})
    tokenizer.write_huggingface_files(folder, model_max_length=captured.config.block_size)
    write_json(folder / "state.json", {"format": FORMAT, **vars(snapshot)})
    _write_manifest(folder, snapshot.step, written)
    write_card(folder)
    if wrong := unusable(folder) if captured.writers.count == 1 else None:  # large files are read once
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


def _write_manifest(folder: Path, step: int, written: Entries) -> None:
    files = {path.name: written.get(path.name) or _entry(path) for path in sorted(folder.iterdir())}
    write_json(folder / "manifest.json", {"format": FORMAT, "step": step, "files": files})
    sync(folder / "manifest.json")
    sync(folder)


def _entry(path: Path) -> dict[str, Any]:
    """What the manifest says of a file, which is on the disk then."""
    path.chmod(0o644)  # safetensors makes files that only their owner may read
    sync(path)
    return {"bytes": path.stat().st_size, "sha256": sha256(path)}


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


def restore(folder: Path, model: GPT, optimizer: torch.optim.Optimizer, ranks: Ranks | None = None) -> Snapshot:
    """Put model and optimizer where ``capture`` found them; DataError when a tensor holds NaN or infinity."""
    snapshot, vocab_size = read_snapshot(folder), model.config.vocab_size
    bad = read(folder, "model", dict(model.named_parameters()), vocab_size)
    bad = read(folder, "optimizer", optim.moments(model, optimizer), vocab_size) or bad
    if bad := next(filter(None, (ranks or Ranks()).gather(bad)), None):
        raise DataError(
            f"{folder}: {bad} holds NaN or infinity; delete the folder to continue from the one before"
        )
    optim.set_updates(optimizer, snapshot.updates)
    return snapshot


class Saver:
    """Publishes checkpoints in a thread while training goes on; leaving the ``with`` waits for the last one."""

    def __init__(
        self,
        run: Path,
        warn: Callable[[str], None],
        keep_last: int,
        keep: Callable[[int], bool],
        ranks: Ranks | None = None,
    ) -> None:
        self.run, self.warn, self.keep_last, self.keep = run, warn, keep_last, keep  # as publish has them
        self.ranks = ranks or Ranks()
        self._writers: Writers | None = None  # of the newest save
        self.failures = 0  # in a row
        self.error: Exception | None = None  # of the newest save
        self._thread = Thread()

    def __enter__(self) -> "Saver":
        return self

    def __exit__(self, error: type[BaseException] | None, *_: object) -> None:
        if error and self._writers:
            self._writers.hurry(10)
        self.wait()

    def start(self, model: GPT, optimizer: torch.optim.Optimizer, snapshot: Snapshot) -> None:
        """Copy the tensors and return; the files follow. Waits for the save before, so there is one at a time.

        All ranks must come; of those that have nothing to write none has a thread.
        """
        self.wait()
        captured = capture(model, optimizer, self.ranks)
        self._writers = captured.writers
        if self.ranks.rank >= captured.writers.count:
            return
        self._thread = Thread(target=self._publish, args=(captured, snapshot), name="checkpoint")
        self._thread.start()

    def wait(self) -> None:
        """Return when no save is under way. Other ranks now have no longer than --timeout for their part of it."""
        if self._writers and self._thread.is_alive():
            self._writers.hurry(self.ranks.timeout)
            self._thread.join()

    def _publish(self, captured: Capture, snapshot: Snapshot) -> None:
        try:
            publish(self.run, captured, snapshot, keep_last=self.keep_last, keep=self.keep)
            self.error, self.failures = None, 0
        except Exception as error:  # a thread has nobody to raise to
            self.error = error
            self.failures += 1
            self.warn(f"warning: {error}; training goes on and will try again at the next checkpoint")
