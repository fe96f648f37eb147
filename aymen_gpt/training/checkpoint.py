"""A checkpoint is a Hugging Face model folder with the training state beside it; it exists whole or not at all.

    runs/NAME/checkpoints/step-000005000/
        config.json  generation_config.json  model.safetensors  tokenizer.json  vocab.json  ...   Hugging Face's
        optimizer.safetensors    exp_avg.NAME and exp_avg_sq.NAME, in GPT-2's names and layout     ours
        state.json               step, rows consumed, the run's configuration, the step's metrics  ours
        manifest.json            size and sha256 of every file above, written last                 ours

Published by writing beside, syncing, hashing and renaming. No random state is kept, since there is none: the
initial weights, the data order and the samples are functions of the seed and the step alone.
"""

import json
import os
import shutil
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor

from aymen_gpt.data import tokenizer
from aymen_gpt.errors import CannotWrite
from aymen_gpt.files import sha256, sync
from aymen_gpt.model.folders import checkpoint_folder, checkpoints
from aymen_gpt.model.gpt import GPT
from aymen_gpt.model.huggingface import EOT, config_to_huggingface, from_huggingface, to_huggingface
from aymen_gpt.training import optim

FORMAT = 1


def write_json(path: Path, value: Any) -> None:
    path.write_text(json.dumps(value, indent=2, allow_nan=False) + "\n")


@dataclass(frozen=True)
class Snapshot:
    """All of a run at one step: what save writes and restore reads."""

    step: int
    rows: int  # of the data order, consumed so far
    run: dict[str, Any]  # the configuration, as plain values
    metrics: dict[str, Any]  # this step's row of metrics.jsonl


def save(run: Path, model: GPT, optimizer: torch.optim.AdamW, snapshot: Snapshot, *, keep_last: int) -> Path:
    """Publish the checkpoint of ``snapshot.step`` and drop all but the newest ``keep_last``; its folder.

    Raises CannotWrite when the disk is full or read-only; older checkpoints are untouched then.
    """
    final = checkpoint_folder(run, snapshot.step)
    partial = final.with_name(f".tmp-{final.name}-{os.getpid()}")
    try:
        shutil.rmtree(partial, ignore_errors=True)
        partial.mkdir(parents=True)
        _write_files(partial, model, optimizer, snapshot)
        _write_manifest(partial, snapshot.step)
        shutil.rmtree(final, ignore_errors=True)  # only ever a damaged one: valid steps are not retaken
        os.replace(partial, final)
        sync(final.parent)
    except (OSError, SafetensorError) as error:
        shutil.rmtree(partial, ignore_errors=True)
        raise CannotWrite(
            f"cannot save {final}: {getattr(error, 'strerror', None) or error}; free some space and run again"
        ) from error
    for old in checkpoints(run)[keep_last:]:
        shutil.rmtree(old)
    return final


def _write_files(folder: Path, model: GPT, optimizer: torch.optim.AdamW, snapshot: Snapshot) -> None:
    config = model.config
    write_json(folder / "config.json", config_to_huggingface(config))
    write_json(folder / "generation_config.json", {"bos_token_id": EOT, "eos_token_id": EOT})
    tokenizer.write_huggingface_files(folder, model_max_length=config.block_size)
    weights = to_huggingface(model.state_dict(), config.vocab_size)
    save_file(weights, folder / "model.safetensors", metadata={"format": "pt"})
    moments = {
        f"{which}.{name}": t
        for which in optim.MOMENTS
        for name, t in to_huggingface(optim.moments(model, optimizer, which), config.vocab_size).items()
    }
    save_file(moments, folder / "optimizer.safetensors", metadata={"format": "pt"})
    write_json(folder / "state.json", {"format": FORMAT, **vars(snapshot)})


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
    leftovers = list((run / "checkpoints").glob(".tmp-*"))
    for path in leftovers:
        shutil.rmtree(path, ignore_errors=True)
    return len(leftovers)


def read_snapshot(folder: Path) -> Snapshot:
    found = json.loads((folder / "state.json").read_text())
    return Snapshot(found["step"], found["rows"], found["run"], found["metrics"])


def restore(folder: Path, model: GPT, optimizer: torch.optim.AdamW) -> Snapshot:
    """Put model and optimizer where ``save`` found them."""
    snapshot = read_snapshot(folder)
    model.load_state_dict(from_huggingface(load_file(folder / "model.safetensors"), model.config))
    stored = load_file(folder / "optimizer.safetensors")
    by_moment: dict[str, dict[str, Tensor]] = {
        which: from_huggingface(
            {name.removeprefix(f"{which}."): t for name, t in stored.items() if name.startswith(f"{which}.")},
            model.config,
        )
        for which in optim.MOMENTS
    }
    optim.restore_moments(model, optimizer, snapshot.step, by_moment)
    return snapshot
